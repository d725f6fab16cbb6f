"""convert(): recognise, rename, write, load again, compare with the source's own forward pass."""

from __future__ import annotations

import fnmatch
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from ..checkpoint_files import naming
from ..downloads import fetch
from ..families import make_processor
from ..files import whole_folder
from ..image_processing_spar import SparImageProcessor
from ..pretrained import open_model, open_tokenizer
from .layouts import LAYOUTS, Asked, Layout
from .radio import RadioReference, prepare_radio, radio_layout
from .reference import REFERENCES, Reference
from .source import Source, read_source

TOLERANCE = 1e-4  # of the features' root mean square
CLIP_BPE = "bpe_simple_vocab_16e6.txt.gz"
# How each kind of source is recognised, and its own forward pass.
SOURCES = {name: (LAYOUTS[name], REFERENCES[name]) for name in LAYOUTS} | {"radio": (radio_layout, RadioReference)}
# Where a family's tokenizer is published; SigLIP and SigLIP2 by the size of the vocabulary.
TOKENIZERS = {
    49408: "openai/clip-vit-base-patch16",
    32000: "google/siglip-base-patch16-224",
    256000: "google/siglip2-base-patch16-512",
    901629: "facebook/xlm-v-base",
}


@dataclass(frozen=True)
class Comparison:
    """Features of the written model beside the source's own.

    Attributes:
        what: image features of a size, or text features.
        max_difference: largest absolute difference.
        magnitude: root mean square of the source's features.
    """

    what: str
    max_difference: float
    magnitude: float

    @property
    def agrees(self) -> bool:
        return self.max_difference <= TOLERANCE * self.magnitude


@dataclass(frozen=True)
class Converted:
    """What a conversion did; `conversion.json` in the folder holds the same.

    Attributes:
        source, layout: the source's files and what they were recognised as.
        digest: start of the SHA-256 of the source.
        used: our name of each weight -> the names there it came from.
        left_out: weights that were known and not needed -> why.
        allowed: unused or missing weights that the caller named.
        vision, text: the recognised sizes.
        comparisons: the checks after writing.
    """

    source: str
    digest: str
    layout: str
    used: dict[str, list[str]]
    left_out: dict[str, str]
    allowed: list[str]
    vision: dict[str, Any]
    text: dict[str, Any]
    comparisons: list[Comparison]


def convert(
    paths: Sequence[Path | str],
    backbone: str,
    output: Path | str,
    asked: Asked | None = None,
    tokenizer: str | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    allow: Sequence[str] = (),
    text: str | None = None,
) -> Converted:
    """Writes OUTPUT, a folder for `from_pretrained` and `spar_hf.load`, and checks it.

    Args:
        paths: the source's files; see `read_source`.
        backbone: `clip`, `metaclip2`, `siglip2` (SigLIP too), `eva` (EVA-02-CLIP, PE-Core), `dinov3` or `radio`.
        output: a folder that is not there yet or is empty.
        asked: what the weights' shapes cannot tell.
        tokenizer: folder, Hub id, or CLIP's `bpe_simple_vocab_16e6.txt.gz`; None is the family's on the Hub.
        image_mean, image_std: normalisation, RGB; None is the source's own where a file beside it says so, else the
            family's.
        allow: patterns of weights that may be unused, or missing where they are single numbers.
        text: folder or Hub id of the checkpoint with the text tower (RADIO); None is where it is published.

    Raises:
        ValueError: the source cannot be read safely or is not what `backbone` says, something cannot be seen in its
            shapes, a weight is unused or missing, or the written model does not agree with the source.
        OSError: the tokenizer cannot be read.
    """
    output = new_folder(output)
    asked = asked or Asked()
    source = read_source([Path(path) for path in paths])
    if backbone == "radio":
        source, text = prepare_radio(source, asked, text)
        tokenizer = tokenizer or text
    elif text or asked.adaptor:
        raise ValueError(f"--text and --adaptor are RADIO's; with --backbone {backbone} leave them out.")
    recognise, reference = SOURCES[backbone]
    layout = recognise(source, asked)
    weights, used, left_out, allowed = rename_weights(source, layout, allow)
    words = load_tokenizer(tokenizer, layout.text["vocab_size"]) if layout.text else None
    model = build_model(source, layout, words, image_mean, image_std)
    set_weights(model, weights, allowed)

    def write(draft: Path) -> Converted:
        model.save_pretrained(draft)
        save_processor(model, words, draft)
        again = open_model(layout.model_class, draft)
        comparisons = compare(again, reference(source.weights, layout.vision, layout.text), layout)
        return Converted(
            source.name, source.digest, layout.name, used, left_out, allowed, layout.vision, layout.text, comparisons
        )

    return write_checked(output, write)


def new_folder(output: Path | str) -> Path:
    """The folder to write.

    Raises:
        ValueError: something is there already.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already; give a folder that is new or empty.")
    return output


def write_checked(output: Path, write: Callable[[Path], Converted]) -> Converted:
    """Lets `write` fill a draft of the folder, adds its report, and keeps it if the comparisons agree.

    Raises:
        ValueError: they do not.
    """
    with whole_folder(output) as draft:
        report = write(draft)
        (draft / "conversion.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        if wrong := [c for c in report.comparisons if not c.agrees]:
            raise ValueError(
                f"the written model does not agree with the source: {wrong[0].what} differ by up to "
                f"{wrong[0].max_difference:.2g}, their size is {wrong[0].magnitude:.2g}. Nothing was kept."
            )
    return report


def rename_weights(
    source: Source, layout: Layout, allow: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, list[str]], dict[str, str], list[str]]:
    """Our weights; where each came from; what was left out and why; what was unused or missing and allowed.

    Raises:
        ValueError: a weight is unused or missing and not allowed.
    """
    weights: dict[str, Tensor] = {}
    used: dict[str, list[str]] = {}
    missing: list[str] = []
    for ours, (theirs, rule) in layout.table.items():
        if absent := [name for name in theirs if name not in source.weights]:
            missing += absent
            continue
        weights[ours] = rule(*(source.weights[name] for name in theirs)).float().contiguous()
        used[ours] = list(theirs)
    taken = {name for names in used.values() for name in names}
    left_out = {name: why for name, why in layout.left_out.items() if name in source.weights}
    unused = sorted(set(source.weights) - taken - set(left_out))

    def may(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in allow)

    for kind, names in (("unused", unused), ("missing", sorted(set(missing)))):
        if wrong := [name for name in names if not may(name)]:
            raise ValueError(
                f"{len(wrong)} weights of the source are {kind}: {', '.join(wrong[:5])}"
                f"{', ...' if len(wrong) > 5 else ''}. Check --backbone; --allow NAME accepts one."
            )
    return weights, used, left_out, [*unused, *sorted(set(missing))]


def build_model(
    source: Source, layout: Layout, tokenizer: Any, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Any:
    """An empty model of the layout's sizes, with its provenance."""
    beside = source.open_clip_config.get("preprocess_cfg", {})
    given = {"image_mean": mean or beside.get("mean"), "image_std": std or beside.get("std")}
    vision = {**layout.vision, **{name: list(value) for name, value in given.items() if value is not None}}
    vision["source"] = f"{source.name} (SHA-256 {source.digest}...), {layout.name}"
    config_class = layout.model_class.config_class
    if not layout.text:
        return layout.model_class(config_class(**vision)).eval()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**layout.text, **special, "pad_token_id": tokenizer.pad_token_id}
    named = "projection_dim" in config_class.__dataclass_fields__  # CLIP's says it twice
    whole = {"projection_dim": vision["projection_dim"]} if named else {}
    return layout.model_class(config_class(vision_config=vision, text_config=text, **whole)).eval()


def set_weights(model: Any, weights: dict[str, Tensor], allowed: Sequence[str]) -> None:
    """Fills the model.

    Raises:
        ValueError: a weight of the model is left without a value (a single number may be, if it was allowed), or a
            shape does not fit.
    """
    wanted = {name: weight.shape for name, weight in model.state_dict().items()}
    if wrong := [name for name, shape in wanted.items() if name in weights and weights[name].shape != shape]:
        name = wrong[0]
        raise ValueError(f"{name} would be {tuple(weights[name].shape)} and must be {tuple(wanted[name])}.")
    empty = [name for name, shape in wanted.items() if name not in weights]
    if made_up := [name for name in empty if name not in allowed or wanted[name].numel() > 1]:
        raise ValueError(f"nothing in the source gives {', '.join(made_up[:5])}; a weight is not made up.")
    model.load_state_dict(weights, strict=False)


# ------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(given: str | None, vocab_size: int) -> Any:
    """The tokenizer that belongs to a text tower.

    Raises:
        OSError: it cannot be read; the message says what to give.
        ValueError: it has more tokens than the tower.
    """
    name = given or TOKENIZERS.get(vocab_size)
    if name is None:
        raise ValueError(f"no published tokenizer has {vocab_size} tokens; give --tokenizer FOLDER or ID.")
    if name.endswith(CLIP_BPE):
        with naming(Path(name)):
            tokenizer = clip_tokenizer(Path(name))
    else:
        try:
            folder = fetch(name, weights=False)
        except OSError as error:
            bpe = f", or the file {CLIP_BPE} of CLIP, which open_clip and dino.txt ship" if vocab_size == 49408 else ""
            raise OSError(
                f"the tokenizer {name} cannot be read. Give --tokenizer: a folder that holds it, an id on the Hub"
                f"{bpe}. ({error})"
            ) from error
        tokenizer = open_tokenizer(folder)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer {name} has {len(tokenizer)} tokens and the text tower {vocab_size}; give its own."
        )
    return tokenizer


def clip_tokenizer(path: Path) -> CLIPTokenizer:
    """CLIP's tokenizer from the file of merges it was released as: bytes, bytes that end a word, merges, two marks."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges: Any = [(first, second) for first, second in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
    letters = [chr(n) for n in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(first + second for first, second in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def save_processor(model: Any, tokenizer: Any, folder: Path) -> None:
    """The processor of a whole model, the image processor of a vision tower."""
    if tokenizer is not None:
        make_processor(model.config, tokenizer).save_pretrained(folder)
        return
    config = model.config
    SparImageProcessor(
        image_mean=config.image_mean, image_std=config.image_std, min_side_px=config.patch_size
    ).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------ check


@torch.no_grad()
def compare(model: Any, reference: Reference, layout: Layout) -> list[Comparison]:
    """Image features at the native, a larger, a non-square and an off-grid size, and text features."""
    vision = model.vision_model if layout.text else model
    native, patch = vision.config.image_size, vision.config.patch_size
    larger, wider = native + 2 * patch, native + 3 * patch
    sizes = [(native, native), (larger, larger), (native, wider), (native + patch + 5, native - 3)]
    generator = torch.Generator().manual_seed(0)
    found = []
    for height, width in sizes:
        pixels = torch.randn(1, 3, height, width, generator=generator)
        expected = reference.image_features(pixels)
        found.append(measure(f"image features at {height} x {width}", vision(pixels).patch_embeds, expected))
    if layout.text:
        length, last = layout.text["max_position_embeddings"], layout.text["vocab_size"] - 1
        ids = torch.randint(0, last, (4, length), generator=generator)
        ids[:, -1] = model.config.text_config.eos_token_id  # CLIP's and dino.txt's is the highest id
        found.append(
            measure("text features", model.get_text_features(ids).pooler_output, reference.text_features(ids))
        )
    return found


def measure(what: str, ours: Tensor, theirs: Tensor) -> Comparison:
    if ours.shape != theirs.shape:
        raise ValueError(f"{what} are {tuple(ours.shape)} and in the source {tuple(theirs.shape)}.")
    return Comparison(what, float((ours - theirs).abs().max()), float(theirs.square().mean().sqrt()))
