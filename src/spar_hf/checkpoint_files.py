"""The files of a checkpoint: which there are, what they may hold, and one line for each that is broken."""

from __future__ import annotations

import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import torch
from safetensors import safe_open

from .downloads import PICKLES, SAFETENSORS

REMEDY = "Get the file anew from where the model came from, or save the model again with save_pretrained"


class CheckpointError(ValueError):
    """A file of a checkpoint can't be used; the message names it and says what to do, on one line."""


def refuse(path: Path, reason: str, remedy: str = REMEDY) -> NoReturn:
    """Raises the `CheckpointError` about a file."""
    raise CheckpointError(f"{path} cannot be used: {printable(reason)}. {remedy}.")


def printable(text: str) -> str:
    """A text on one line, without what a file could have put there to confuse a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


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
        reason, remedy = one_line(error), REMEDY
        if reason.startswith(f"{paths[0].parent} "):
            reason = reason.replace(str(paths[0].parent), "the folder", 1)
        if "trust_remote_code" in str(error):
            reason, remedy = "it asks to run code of its own, which is never done", "Give a model of a known class"
        elif what:
            reason = f"it is no {what} ({reason})"
        named = " with ".join([str(paths[0]), *(path.name for path in paths[1:])])
        kind = OSError if isinstance(error, OSError) else CheckpointError
        raise kind(f"{named} cannot be used: {reason}. {remedy}.") from error


def one_line(error: BaseException) -> str:
    """What an error says, printable and short."""
    text = printable(str(error)).rstrip(".")
    text = re.sub(r"^Validation error for field '\w+': \w+: ", "", text)  # of strict configurations; they repeat it
    if isinstance(error, TypeError | AttributeError | LookupError | ArithmeticError):
        text = f"a value is missing or of a wrong kind ({type(error).__name__}: {text})"
    return text[:400] or type(error).__name__


def own_file(folder: Path, name: str) -> Path:
    """A file of a folder.

    Raises:
        CheckpointError: there is no such file, or it lies elsewhere: its name has a path, or it is a link out of the
            folder, but for those of the Hub's cache, of which the folder may be a snapshot or a part of one.
    """
    path = folder / name
    if Path(name).name != name:
        refuse(path, "it lies outside the model's folder", "Put all files of a model into one folder")
    if path.is_symlink():
        home = folder.resolve()
        snapshots = [place for place in (home, home.parent) if place.parent.name == "snapshots"]
        homes = [home, *(place.parents[1] / "blobs" for place in snapshots)]
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
            if Path(name).name != name:
                refuse(path, f"it lists {name!r:.80}, which lies outside the model's folder")
            if not name.endswith(Path(whole).suffix):
                refuse(path, f"it lists {name!r:.80}, which is no {Path(whole).suffix} file")
            if not (folder / name).exists():
                refuse(path, f"it lists {name!r:.80}, and there is no such file beside it")
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


def load_pickle(path: Path, device: str = "cpu", plain: Mapping[str, type] | None = None) -> Any:
    """What `torch.save` wrote, if that is plain data and tensors; nothing in the file runs.

    Args:
        path: the file.
        device: where the tensors go.
        plain: names of classes that are plain data too -> what is made of each: setting its fields runs nothing.

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
            with torch.serialization.safe_globals([(kind, name) for name, kind in (plain or {}).items()]):
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


def check_finite(path: Path, name: str, weight: torch.Tensor) -> None:
    """Raises a `CheckpointError` for a weight that holds NaN or infinity."""
    if weight.is_meta or not weight.is_floating_point() or not weight.numel():
        return
    low, high = weight.aminmax()  # NaN goes through
    if not (math.isfinite(low) and math.isfinite(high)):
        refuse(path, f"{name:.200} holds NaN or infinity in {str(weight.dtype).removeprefix('torch.')}")
