"""`spar publish`: a model's folder to the Hugging Face Hub, with its card."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Publish a model on the Hugging Face Hub: weights, processor, remote code and model card, in one commit."
EPILOG = """examples:
  spar publish runs/spar/model --repo-id you/spar --license apache-2.0
  spar publish runs/spar/model --repo-id you/spar --with-space
      also the Space you/spar-space, a page on which anyone can try the model
  spar evaluate --benchmark picturebook --scale 4 --model runs/spar/model --json runs/spar/model/picturebook-4x.json
  spar publish runs/spar/model --repo-id you/spar
      what was measured goes into the card; the same command again uploads only what changed

Before the first time: hf auth login"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="what save_pretrained or training/distill.py wrote"
    )
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="where on the Hub")
    parser.add_argument("--license", metavar="ID", help="licence for the card, such as apache-2.0")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--with-space", action="store_true", help="also create the Space OWNER/NAME-space")
    parser.add_argument(
        "--with-page",
        type=Path,
        metavar="PAGE",
        help="also create the static Space OWNER/NAME-page from what 'python spaces/browser/build.py --model FOLDER "
        "--output PAGE' built",
    )


def run(args: argparse.Namespace) -> None:
    from spar_hf.hub.publish import publish

    done = publish(
        args.folder,
        args.repo_id,
        private=args.private,
        create_pr=args.create_pr,
        with_space=args.with_space,
        with_page=args.with_page,
        license=args.license,
    )
    print(f"{'published' if done.changed else 'nothing has changed at'} {done.url}")
    print(f"  commit    {done.commit}")
    print(f"  files     {', '.join(done.files)}")
    if done.left_out:
        print(f"  left out  {', '.join(done.left_out)}")
    if done.space_url:
        print(f"  space     {done.space_url}")
    if done.page_url:
        print(f"  page      {done.page_url}")
