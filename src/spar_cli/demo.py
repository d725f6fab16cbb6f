"""`spar demo`: the demonstration in a browser, on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util

from .parser import port

HELP = "Open a page on this machine: drop a picture, type words, see the picture answer."
EPILOG = """examples:
  spar demo
  spar demo --model openai/clip-vit-base-patch16
  SPAR_MAX_FILE_MB=50 spar demo --port 8000 --open
      limits are environment variables; python -m spar_hf.demo.settings lists them

The page is served to this machine alone, unless --host says otherwise. Needs gradio: pip install "spar-hf[demo]" """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME|ID|FOLDER",
        help="the model chosen first (default: SPAR_MODEL, or the best that ships)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves the whole network (default: 127.0.0.1)")
    parser.add_argument("--port", type=port, help="default: the first free one from 7860")
    parser.add_argument("--device", help="cpu, cuda, mps; auto takes an accelerator if any (default: auto)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


def run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('the demo needs gradio; run: pip install "spar-hf[demo]"')
    from spar_hf.checkpoints import resolve
    from spar_hf.demo.app import build, serve
    from spar_hf.demo.settings import Settings

    given = {name: getattr(args, name) for name in ("model", "device") if getattr(args, name) is not None}
    settings = dataclasses.replace(Settings.from_environment(), **given)
    resolve(settings.model)
    serve(build(settings), host=args.host, port=args.port, open_browser=args.open)
