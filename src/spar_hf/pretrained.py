"""The one way into a checkpoint: its code never runs, its files stay in its folder, and a broken one is named.

transformers reads the files; this says what it may read, and puts whatever it raises into one line. Models, second
networks, tokenizers and image processors are all opened here.
"""

from __future__ import annotations

import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from .downloads import CONFIG, PICKLES, PROCESSOR_FILES, SAFETENSORS, TOKENIZER_FILES
from .image_processing_spar import SparImageProcessor

REMEDY = "Get the file anew from where the model came from, or save the model again with save_pretrained"
# What a configuration may not choose: transformers would fetch a kernel, or read its weights from elsewhere.
ATTENTION_FIELDS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
PLAIN_ATTENTION = (None, "eager", "sdpa")
DETOURS = ("transformers_weights", "fusion_config", "kernel_config", "distributed_config")
QUANTIZERS = ("torchao", "bitsandbytes")
MAX_LABELS = 100_000
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Fields that are the length of a side of some weight, in the families' configurations.
SIDES = ("hidden_size", "intermediate_size", "projection_dim", "vocab_size", "max_position_embeddings")


class CheckpointError(ValueError):
    """A file of a checkpoint can't be used; the message names it and says what to do, on one line."""


def refuse(path: Path, reason: str, remedy: str = REMEDY) -> NoReturn:
    """Raises the `CheckpointError` about a file."""
    raise CheckpointError(f"{path} cannot be used: {reason}. {remedy}.")


@contextmanager
def naming(*paths: Path, what: str = "") -> Iterator[None]:
    """Turns whatever is raised while these files are read into one line that names them.

    Args:
        paths: the file, and those it is read together with.
        what: what the file must be, where the readers' own messages don't say it.
    """
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except BaseException as error:
        # A panic of the tokenizers' Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason, remedy = _one_line(error).replace(str(paths[0].parent), "the folder"), REMEDY
        if "trust_remote_code" in reason:
            reason, remedy = "it asks to run code of its own, which is never done", "Give a model of a known class"
        elif what:
            reason = f"it is no {what} ({reason})"
        named = " with ".join([str(paths[0]), *(path.name for path in paths[1:])])
        kind = OSError if isinstance(error, OSError) else CheckpointError
        raise kind(f"{named} cannot be used: {reason}. {remedy}.") from error


def _one_line(error: BaseException) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split()).rstrip(".")
    if isinstance(error, TypeError | AttributeError | LookupError | ArithmeticError):
        text = f"a value is missing or of a wrong kind ({type(error).__name__}: {text})"
    return text[:400] or type(error).__name__


# ---------------------------------------------------------------------------------------------- files


def own_file(folder: Path, name: str) -> Path:
    """A file of a folder.

    Raises:
        CheckpointError: there is no such file, or it lies elsewhere: its name has a path, or it is a link out of the
            folder, but for those of the Hub's cache.
    """
    path = folder / name
    if Path(name).name != name:
        refuse(path, "it lies outside the model's folder", "Put all files of a model into one folder")
    if path.is_symlink():
        home = folder.resolve()
        homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
        if not any(path.resolve().is_relative_to(place) for place in homes):
            refuse(path, "it is a link out of the model's folder", "Put the file itself into the folder")
    if not path.is_file():
        refuse(path, "there is no such file" if not path.exists() else "it is no ordinary file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON whose numbers are all finite."""

    def number(word: str) -> float:
        if not math.isfinite(value := float(word)):
            refuse(path, f"it holds {word:.40}, which is no number")
        return value

    with naming(path, what="JSON in UTF-8"):
        content = json.loads(path.read_text(encoding="utf-8"), parse_float=number, parse_constant=number)
    if not isinstance(content, dict):
        refuse(path, f"it holds a {type(content).__name__} where an object, {{...}}, must be")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, if it sends transformers nowhere else.

    Raises:
        CheckpointError: it can't be read, or chooses a kernel, a quantizer or other files.
    """
    path = own_file(folder, CONFIG)
    config = read_json(path)

    def check(part: Mapping[str, Any]) -> None:
        for name, value in part.items():
            if isinstance(value, dict):
                check(value)
            if name in ATTENTION_FIELDS and value not in PLAIN_ATTENTION:
                refuse(path, f"{name} is {value!r:.80}, and a file may ask for 'eager' or 'sdpa'", "Remove that field")
            if name == "num_labels" and isinstance(value, int) and value > MAX_LABELS:
                refuse(path, f"num_labels is {value}, and transformers would list them all", "Remove that field")
            if name in DETOURS and value is not None:
                refuse(path, f"{name} would have other files or code read", "Remove that field")
            if name == "quantization_config" and value is not None:
                method = value.get("quant_method") if isinstance(value, dict) else None
                if method not in QUANTIZERS:
                    refuse(path, f"it is quantized with {method!r:.80}; {' and '.join(QUANTIZERS)} can be read")

    check(config)
    return config


def weight_files(folder: Path) -> tuple[list[Path], dict[str, tuple[int, ...]]]:
    """The files that hold a model's weights, the index of a sharded one first, and the shape of each weight.

    Raises:
        CheckpointError: there are none, one can't be read, or an index leads out of the folder.
    """
    for stray in ("adapter_config.json", "shard-*.safetensors"):
        for path in folder.glob(stray):
            refuse(path, "it is part of an adapter or of a distributed state", "Merge it into the model and save that")
    for whole, index in (SAFETENSORS, PICKLES):
        if (folder / whole).exists() or (folder / whole).is_symlink():
            path = own_file(folder, whole)
            return [path], shapes_of(path)
        if not (folder / index).exists():
            continue
        path = own_file(folder, index)
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()) or not listed:
            refuse(path, "its weight_map must give the file of each weight")
        shards = {}
        for name in sorted(set(listed.values())):
            if not name.endswith(Path(whole).suffix):
                refuse(path, f"it lists {name!r:.80}, which is no {Path(whole).suffix} file")
            shards[name] = shapes_of(own_file(folder, name))
        if absent := [weight for weight, name in listed.items() if weight not in shards[name]]:
            refuse(folder / listed[absent[0]], f"it lacks {absent[0]!r:.80}, which {index} promises")
        shapes = {weight: shapes for part in shards.values() for weight, shapes in part.items()}
        return [path, *(folder / name for name in shards)], shapes
    raise CheckpointError(
        f"folder {folder} holds no weights ({SAFETENSORS[0]}, {PICKLES[0]} or their index); give a folder that "
        "save_pretrained wrote. Other layouts go through 'spar convert'."
    )


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each weight of a file, without reading the weights."""
    if path.suffix != ".safetensors":
        content = load_pickle(path, "meta")
        if not isinstance(content, dict) or not all(isinstance(weight, torch.Tensor) for weight in content.values()):
            refuse(path, "it holds other things than named weights")
        return {str(name): tuple(weight.shape) for name, weight in content.items()}
    with naming(path, what="file of safetensors"), safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def load_pickle(path: Path, device: str = "cpu") -> Any:
    """What `torch.save` wrote, if that is plain data and tensors; nothing in the file runs.

    Raises:
        CheckpointError: it holds more than that, or is damaged.
    """
    try:
        if _is_torchscript(path):
            raise CheckpointError(
                f"{path} is a TorchScript archive, as OpenAI's CLIP was released: it holds a program, and reading it "
                "runs that. Take the same weights as openai/clip-vit-base-patch16 (or -base-patch32, -large-patch14, "
                "-large-patch14-336) from the Hub, which need no conversion; or, if you trust the file, save its "
                "tensors alone: torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), NEW_FILE)."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's version
            return torch.load(path, map_location=device, weights_only=True)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # zipfile's, pickle's and torch's many
        said = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
        if isinstance(error, UnpicklingError) and (called := re.search(r"GLOBAL ([\w.]+)", said)):
            raise CheckpointError(
                f"{path} holds more than tensors and cannot be read safely (it calls {called[1]}). If you trust it, "
                "save its tensors alone where it was made: torch.save(model.state_dict(), NEW_FILE)."
            ) from error
        reason = said.partition(". ")[0].partition(" Check the")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} is no checkpoint of PyTorch, or a damaged one ({reason}). Get it again."
        ) from error


def _is_torchscript(path: Path) -> bool:
    """True for an archive with a program in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name or name.endswith("constants.pkl") for name in archive.namelist())


# --------------------------------------------------------------------------------------------- models


def open_model(model_class: Any, folder: Path, *, sides: tuple[str, ...] = (), **overrides: Any) -> Any:
    """`model_class.from_pretrained(folder)` in evaluation mode.

    Args:
        model_class: a class of transformers or of ours, or an Auto class.
        folder: what `fetch` gave.
        sides: fields of the configuration that are the length of some weight's side, as `SIDES` are for ours. A
            number that no weight has is told before it fills the memory.
        overrides: fields of the configuration, or arguments of `from_pretrained`.

    Raises:
        CheckpointError: a file is broken, asks for code, or holds NaN or infinity.
        ValueError: an override is out of its range.
    """
    read_config(folder)
    files, shapes = weight_files(folder)
    config_path = folder / CONFIG
    config_class = getattr(model_class, "config_class", None)
    if config_class is not None:
        with naming(config_path):
            config = config_class.from_pretrained(folder)
        _check_sizes(config, shapes, sides, config_path)
        if overrides:  # what is wrong from here on is the caller's
            _told_to_the_caller(config_class.from_pretrained, folder, **overrides)
    try:
        with naming(files[0], config_path):
            model, info = model_class.from_pretrained(
                folder,
                trust_remote_code=False,
                weights_only=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # to name them
                output_loading_info=True,
                **overrides,
            )
    except CheckpointError as error:
        if isinstance(error.__cause__, TypeError) and any(name in str(error.__cause__) for name in overrides):
            raise error.__cause__ from None  # an argument that nobody knows
        raise
    for name, found, wanted in sorted(info["mismatched_keys"]):
        refuse(files[0], f"{name:.200} is {tuple(found)} and by {CONFIG} must be {tuple(wanted)}")
    _check_weights(model, files[0])
    return model.eval()


def _told_to_the_caller(load: Callable, folder: Path, **overrides: Any) -> None:
    try:
        load(folder, return_unused_kwargs=True, **overrides)
    except (ValueError, TypeError, OSError):
        raise
    except Exception as error:  # strict fields raise their own
        raise ValueError(_one_line(error)) from error


def _check_sizes(config: Any, shapes: dict[str, tuple[int, ...]], sides: tuple[str, ...], path: Path) -> None:
    """Refuses numbers that the weights do not have, before a model of that size is built."""
    longest = max((side for shape in shapes.values() for side in shape), default=0)
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    for part in parts:
        blocks = getattr(part, "num_hidden_layers", 0) or 0
        if blocks > len(shapes):
            refuse(path, f"num_hidden_layers is {blocks} and there are {len(shapes)} weights in all")
        for name in sides:
            value = getattr(part, name, 0) or 0
            if value > longest:
                refuse(path, f"{name} is {value} and no side of a weight is longer than {longest}")
        image_px, patch_px = getattr(part, "image_size", None), getattr(part, "patch_size", None)
        if sides and isinstance(image_px, int) and isinstance(patch_px, int) and _has_positions(shapes):
            patches = (image_px // patch_px) ** 2
            if patches > longest:
                refuse(path, f"image_size {image_px} is {patches} patches and no weight has as many positions")


def _has_positions(shapes: dict[str, tuple[int, ...]]) -> bool:
    return any(name.endswith("position_embedding.weight") and "text" not in name for name in shapes)


@torch.no_grad()
def _check_weights(model: Any, path: Path) -> None:
    """Refuses weights that are no finite floating-point numbers."""
    quantized = getattr(model, "hf_quantizer", None) is not None
    for name, weight in model.named_parameters():
        if quantized or weight.is_meta or not weight.numel():
            continue
        if weight.dtype not in DTYPES:
            refuse(path, f"{name} is {str(weight.dtype).removeprefix('torch.')}, and weights must be floats")
        low, high = weight.aminmax()  # NaN goes through
        if not (math.isfinite(low) and math.isfinite(high)):
            refuse(path, f"{name} holds NaN or infinity in {str(weight.dtype).removeprefix('torch.')}")
    scale = getattr(model, "logit_scale", None)
    if isinstance(scale, torch.Tensor) and not scale.is_meta and not 0 < scale.float().exp() < math.inf:
        refuse(path, f"logit_scale is {float(scale):.3g}, and scores would be multiplied by its exponential")


# --------------------------------------------------------------------------------- tokenizer and pixels


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, of one of transformers' classes.

    Raises:
        CheckpointError: there is none, one of its files is broken, or it asks for code.
    """
    names = [name for name in TOKENIZER_FILES if (folder / name).exists() or (folder / name).is_symlink()]
    if not names:
        raise CheckpointError(
            f"folder {folder} holds no tokenizer (tokenizer.json and tokenizer_config.json); save it there with "
            "save_pretrained."
        )
    for name in names:
        path = own_file(folder, name)
        if path.suffix == ".json":
            read_json(path)
    if "tokenizer.json" in names:
        with naming(folder / "tokenizer.json", what="file of tokenizers"):
            PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    blamed = [name for name in names if name != "tokenizer.json"] or names
    with naming(*(folder / name for name in sorted(blamed, key=lambda name: name != "tokenizer_config.json"))):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def processor_file(folder: Path) -> Path:
    """The file that says how pixels are made."""
    found = [name for name in PROCESSOR_FILES if (folder / name).exists() or (folder / name).is_symlink()]
    return own_file(folder, found[0] if found else PROCESSOR_FILES[0])


def open_image_processor(folder: Path) -> SparImageProcessor:
    """The `SparImageProcessor` of a folder of ours.

    Raises:
        CheckpointError: there is none, its file is broken, or it is of another class.
    """
    path = processor_file(folder)
    stored = read_json(path)
    if path.name == PROCESSOR_FILES[0]:
        stored = stored.get("image_processor", {})
    with naming(path):
        if not isinstance(stored, dict):
            raise ValueError(f"image_processor is {stored!r:.80} and must be an object, {{...}}")
        kind = stored.get("image_processor_type")
        if kind != SparImageProcessor.__name__:
            raise ValueError(f"its image processor is {kind!r:.80} and must be {SparImageProcessor.__name__!r}")
        return SparImageProcessor.from_dict(stored)
