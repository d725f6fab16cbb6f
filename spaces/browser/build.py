"""Builds the page that runs in the browser: a folder of plain files, for any web server or a static Space.

    python spaces/browser/build.py                                  # ships with tiny, exported on the way
    python spaces/browser/build.py --model my-onnx --output site    # ships with a folder of `spar export`
    python -m http.server -b 127.0.0.1 -d dist/browser 8000

Needs npm, whose packages are pinned in package-lock.json; the page itself asks for nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import SpaceCard, SpaceCardData

import spar_hf
from spar_hf.checkpoints import ASSETS
from spar_hf.demo.engine import CHARACTERS_PER_LABEL
from spar_hf.demo.payload import HEAT, MIN_SHOWN_PX
from spar_hf.demo.pictures import SHOWN_PX
from spar_hf.demo.settings import Settings
from spar_hf.demo.texts import EXAMPLES, FEATURES_HINT, SEGMENT_HINT, vocabularies
from spar_hf.files import whole_folder
from spar_hf.prompts_spar import EVERYDAY_WORDS, IMAGENET_TEMPLATES, MAX_CHARACTERS
from spar_hf.results_spar import COSINE_SCALE
from spar_hf.visualize import palette
from spar_onnx import Exported
from spar_onnx.folder import LAYOUT, RECORD

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VIEWERS = ROOT / "src" / "spar_hf" / "demo" / "page"  # the same viewers as on the other page
# Of onnxruntime-web: one build for the CPU, one that has the GPU as well; a visitor fetches one of them.
RUNTIMES = (
    ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
)
SIZES = (250_000, 500_000, 1_000_000, 2_000_000, 4_000_000, 16_000_000)  # pixels for the network, at most
USUAL_SIZE = 1_000_000
MARK = "service-worker.js"  # a folder that holds it is an earlier build

MOUNT = """
/** Puts a viewer into an element. `trigger(name, data)` is told of what is chosen; `show(value)` draws. */
export function mount(name, element, hint, trigger = () => {}) {
  const watching = [], props = { value: {}, hint };
  element.innerHTML = PAGES[name].html;   // fixed text of the package
  PAGES[name].run(element, props, trigger, (_, run) => watching.push(run));
  return { show(value) { props.value = value; for (const run of watching) run(); } };
}
"""
CARD = """---
{{ card_data }}
---

# SPAR in the browser

Name what you look for and the picture answers: any image, any size, any words, in one forward pass, in the visitor's
own browser. The picture stays there. Made by `spaces/browser/build.py` of spar-hf; the model is {{ model }}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="of 'spar export --format onnx' (default: tiny)")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "browser", metavar="FOLDER")
    args = parser.parse_args()
    try:
        build(args.output, args.model)
    except (ValueError, OSError) as error:
        parser.exit(1, f"build.py: {error}\n")
    print(f"wrote {args.output}")


def build(output: Path, model: Path | None = None) -> None:
    """Writes the page, whole or not at all.

    Args:
        output: a folder that is not there, or an earlier build, which is replaced.
        model: an exported folder that the page ships with; None exports `tiny`.

    Raises:
        ValueError: `output` is another folder, the model is none, or npm is missing or fails.
    """
    if output.exists() and not (output / MARK).is_file():
        raise ValueError(f"{output} is there and no built page; give a folder that is not there yet.")
    packages = npm_packages()
    with TemporaryDirectory() as scratch, whole_folder(output) as draft:
        if model is None:
            model = Path(scratch) / "tiny"
            spar_hf.export(*spar_hf.load("tiny"), model)
        exported = Exported.read(model)
        shutil.copytree(HERE / "page", draft, dirs_exist_ok=True)
        tokenizers = packages / "@huggingface/tokenizers"
        copy(tokenizers / "dist/tokenizers.min.mjs", draft / "tokenizers.js")
        copy(tokenizers / "LICENSE", draft / "tokenizers.LICENSE")  # onnxruntime-web's stands in its files
        for name in (name for names in RUNTIMES for name in names):
            copy(packages / "onnxruntime-web/dist" / name, draft / "ort" / name)
        for name, _ in EXAMPLES:
            copy(ASSETS / "pictures" / name, draft / "pictures" / name)
        (draft / "viewers.js").write_text(viewers_js(), encoding="utf-8")
        (draft / "viewers.css").write_text(viewers_css(), encoding="utf-8")
        text = json.dumps(constants(model.name), ensure_ascii=False)
        (draft / "constants.js").write_text(f"export default {text};\n", encoding="utf-8")
        files = sorted(path.relative_to(draft).as_posix() for path in draft.rglob("*") if path.is_file())
        worker = draft / MARK
        worker.write_text(f"const BUILD = {json.dumps(record(draft, files))};\n{worker.read_text('utf-8')}", "utf-8")
        for path in model_files(exported):
            copy(path, draft / "models" / model.name / path.relative_to(model))
        (draft / "README.md").write_text(card(model.name), encoding="utf-8")


def npm_packages() -> Path:
    """node_modules as package-lock.json says.

    Raises:
        ValueError: npm is missing, or can't install.
    """
    lock, folder = HERE / "package-lock.json", HERE / "node_modules"
    stamp = folder / ".package-lock.json"  # npm writes it last
    if stamp.is_file() and stamp.stat().st_mtime >= lock.stat().st_mtime:
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError("npm is needed to build the page; install Node.js 18 or later (apt-get install npm).")
    done = subprocess.run(
        [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=HERE, capture_output=True, text=True
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["it says nothing"]
        raise ValueError(f"npm ci failed ({lines[0].strip():.200}); check the network and run it again.")
    return folder


def model_files(exported: Exported) -> Iterator[Path]:
    """What the page reads of an exported folder, and its configuration."""
    names = (RECORD, "config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
    yield from (exported.folder / name for name in (*names, *exported.record["files"]))


def constants(model: str) -> dict[str, Any]:
    """What the page shares with the package; each has its one place there."""
    settings = Settings()
    return {
        "shipped": f"models/{model}/",
        "layout": LAYOUT,
        "logit_scale": COSINE_SCALE,
        "templates": IMAGENET_TEMPLATES,
        "everyday_words": EVERYDAY_WORDS,
        "max_labels": settings.max_labels,
        "max_characters": MAX_CHARACTERS,
        "characters_per_label": CHARACTERS_PER_LABEL,
        "palette": palette(settings.max_labels).tolist(),
        "heat": HEAT,
        "shown_px": SHOWN_PX,
        "min_shown_px": MIN_SHOWN_PX,
        "sizes": SIZES,
        "usual_size": USUAL_SIZE,
        "hints": {"segment": SEGMENT_HINT, "features": FEATURES_HINT},
        "examples": EXAMPLES,
        "vocabularies": vocabularies(),
    }


def viewers_js() -> str:
    """The viewers as a module; each file is the body of a function of `element`, `props`, `trigger` and `watch`."""
    pages = [
        f"  {name}: {{\n    html: {json.dumps((VIEWERS / f'{name}.html').read_text('utf-8'))},\n"
        f"    run(element, props, trigger, watch) {{\n{(VIEWERS / f'{name}.js').read_text('utf-8')}\n    }},\n  }},\n"
        for name in ("viewer", "features")
    ]
    return f"const PAGES = {{\n{''.join(pages)}}};\n{MOUNT}"


def viewers_css() -> str:
    """Each viewer's style, within its own place."""
    places = {"viewer": "#answer", "features": "#feature-view"}
    return "".join(f"{at} {{\n{(VIEWERS / f'{name}.css').read_text('utf-8')}}}\n" for name, at in places.items())


def record(draft: Path, files: list[str]) -> dict[str, Any]:
    """What the service worker knows of this build: all files and their common digest, and those fetched at once."""
    digest = hashlib.sha256()
    for name in files:
        digest.update(f"{name}\n".encode() + (draft / name).read_bytes())
    first = [name for name in files if name != MARK and not name.startswith("ort/")]
    return {"version": digest.hexdigest()[:16], "files": [name for name in files if name != MARK], "first": first}


def card(model: str) -> str:
    """README.md of a static Space, whose server sends the headers that threads need."""
    data = SpaceCardData(
        title="SPAR in the browser",
        sdk="static",
        app_file="index.html",
        license="apache-2.0",
        short_description="Open-vocabulary segmentation on your own machine",
        colorFrom="blue",
        colorTo="green",
        pinned=False,
        custom_headers={
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-embedder-policy": "require-corp",
            "cross-origin-resource-policy": "cross-origin",
        },
    )
    return f"{str(SpaceCard.from_template(data, template_str=CARD, model=f'`{model}`')).rstrip()}\n"


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


if __name__ == "__main__":
    main()
