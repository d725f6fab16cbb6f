"""The feature store: teacher features (and inputs of the trained blocks) in fp16 shards, each whole or absent.

    FOLDER/cache.json                  what the features were made from; how many views and shards; once all shards are
                                       there, a check sum of each
    FOLDER/shard-00003.safetensors     "<view>.features" (h, w, D), "<view>.trunk" (P + h * w, C) where asked for;
                                       the header ties each to store, shard, image, view, pixels and check sums

A store is used only by a run that would make the same features: everything they depend on is compared.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..files import clear_drafts, digest, write_atomically, write_json
from ..sources import BadImage
from .views import Views

FORMAT = "spar_hf feature store 2"
FIELDS = {"made_from": dict, "num_views": int, "shard_views": int, "shards": list}
AGAIN = "Run training/cache_teacher.py again; it goes on there."


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """Says where two JSON values differ, one line a place."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            yield from differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
    elif ours != theirs:
        yield f"{path} is {theirs!r} there and {ours!r} here"


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)


class FeatureStore:
    """A folder of shards.

    Args:
        folder: where; need not be there yet.
        made_from: what the features depend on, as JSON: data, augmentation, seed, draws, teacher, trunk.
        num_views: how many views there are.
        shard_views: views in a shard.

    Raises:
        ValueError: the folder holds a store made from something else, or a broken one.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any], num_views: int, shard_views: int):
        self.folder, self.made_from, self.num_views, self.shard_views = folder, made_from, num_views, shard_views
        self.index: dict[int, tuple[Path, dict[str, Any]]] = {}  # view -> (shard, its row); filled by `load_index`
        self.bad: dict[str, str] = {}
        self.sums: list[str] = []  # of the shards' headers, when all are there
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; give a folder for the feature store.")
        if (folder / "cache.json").exists():
            there = read_cache_json(folder)
            self.sums = there.pop("shards")
            refuse_differences(folder, self.facts(), there)

    def facts(self) -> dict[str, Any]:
        """What cache.json says of a store."""
        facts = {"made_from": self.made_from, "num_views": self.num_views, "shard_views": self.shard_views}
        return json.loads(json.dumps({"format": FORMAT, **facts}))  # tuples and lists are alike

    @property
    def identity(self) -> str:
        """What ties a shard to its store."""
        return digest([json.dumps(self.facts(), sort_keys=True).encode()])

    @property
    def num_shards(self) -> int:
        return -(-self.num_views // self.shard_views)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def views_of(self, shard: int) -> range:
        return range(shard * self.shard_views, min((shard + 1) * self.shard_views, self.num_views))

    def header(self, shard: int) -> str:
        """The header of a shard.

        Raises:
            ValueError: there is none, it is broken, or is not the one that belongs here; says which.
        """
        path = self.path(shard)
        if not path.is_file():
            raise ValueError(f"{path.name} is missing")
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata()["index"]
            content = json.loads(header)
            store, number = content["store"], content["shard"]
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"{path.name} is broken") from error
        if store != self.identity:
            raise ValueError(f"{path.name} is of another store")
        if number != shard:
            raise ValueError(f"{path.name} is a copy of shard {number}")
        if self.sums and digest([header.encode()]) != self.sums[shard]:
            raise ValueError(f"{path.name} is not the shard that the store was finished with")
        return header

    def faults(self) -> dict[int, str]:
        """Shard -> what is wrong with it."""
        found = {}
        for shard in range(self.num_shards):
            try:
                self.header(shard)
            except ValueError as error:
                found[shard] = str(error)
        return found

    # ---- writing

    def create(self) -> None:
        """Writes cache.json where there is none, and removes what killed writers left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        clear_drafts(self.folder)
        if not (self.folder / "cache.json").exists():
            write_json(self.folder / "cache.json", {**self.facts(), "shards": []})

    def finish(self) -> None:
        """Writes down the check sums of all shards: from here on the store can be read.

        Raises:
            ValueError: a shard is missing or broken.
        """
        self.sums = []
        sums = [digest([self.header(shard).encode()]) for shard in range(self.num_shards)]
        write_json(self.folder / "cache.json", {**self.facts(), "shards": sums})
        self.sums = sums

    def write(self, shard: int, rows: dict[int, dict[str, Any]], tensors: dict[str, torch.Tensor], bad: dict) -> None:
        """Writes a shard atomically.

        Args:
            shard: its number.
            rows: view -> what the index says about it.
            tensors: name -> fp16 tensor.
            bad: name -> reason of images that could not be read.

        Raises:
            OSError: the disk is full.
            ValueError: a number does not fit into fp16.
        """
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} in shard {shard} is not finite in fp16; this network's features do not fit.")
        sums = {name: checksum(tensor) for name, tensor in tensors.items()}
        metadata = {"store": self.identity, "shard": shard, "views": rows, "sums": sums, "bad": bad}
        # One entry, as safetensors writes several in any order: the same views give the same bytes.
        content = save(tensors, metadata={"index": json.dumps(metadata)})
        write_atomically(self.path(shard), content)

    # ---- reading

    @classmethod
    def open(cls, folder: Path, made_from: dict[str, Any]) -> FeatureStore:
        """Opens a finished store for a run that needs features made from `made_from`.

        Raises:
            ValueError: there is no store, it is unfinished, broken, or was made from something else; says what.
        """
        there = read_cache_json(folder)
        wanted = made_from
        if not made_from.get("trunk"):  # a run on pixels does not mind a stored trunk
            wanted = {**made_from, "trunk": there["made_from"].get("trunk")}
        refuse_differences(folder, {"made_from": wanted}, {"made_from": there["made_from"]})
        store = cls(folder, there["made_from"], there["num_views"], there["shard_views"])
        faults = list(store.faults().values())
        if faults:
            raise ValueError(
                f"cache {folder} is unfinished or broken: {len(faults)} of {store.num_shards} shards can't be used; "
                f"{faults[0]}. {AGAIN}"
            )
        if not store.sums:
            raise ValueError(f"cache {folder} is unfinished: its check sums are missing. {AGAIN}")
        store.load_index()
        return store

    def load_index(self) -> None:
        """Reads the headers of all shards."""
        for shard in range(self.num_shards):
            content = json.loads(self.header(shard))
            for view, row in content["views"].items():
                self.index[int(view)] = (self.path(shard), {**row, "sums": content["sums"]})
            self.bad |= content["bad"]

    def check_pictures(self, views: Views) -> None:
        """Compares every picture's file, whose bytes are read once, with the one that its features were made from.

        Raises:
            ValueError: a picture has changed, or can't be read any more; the message names it.
        """
        first = {self.index[view][1]["image"]: view for view in sorted(self.index, reverse=True)}

        def changed(view: int) -> str | None:
            row = self.index[view][1]
            try:
                same = views.name(view) == row["image"] and views.fingerprint(view) == row["fingerprint"]
            except BadImage as error:
                return str(error)
            return None if same else row["image"]

        with ThreadPoolExecutor(8) as pool:
            found = [name for name in pool.map(changed, sorted(first.values())) if name]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ValueError(
                f"cache {self.folder} is stale: {found[0]}{more} changed since its features were stored. "
                "Make a new cache with training/cache_teacher.py."
            )

    def read(self, view: int, kind: str) -> torch.Tensor:
        """`features` (h, w, D) or `trunk` (P + h * w, C) of a view, fp16.

        Raises:
            ValueError: the bytes are not those that were written.
        """
        path, row = self.index[view]
        name = f"{view}.{kind}"
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(name)
        if checksum(tensor) != row["sums"][name]:
            raise ValueError(
                f"{name} in {path} is corrupt (check sum). Delete that file and run cache_teacher.py again."
            )
        return tensor

    def check_pixels(self, view: int, pixels: Any) -> None:
        """Raises a `ValueError` when a view's pixels are not those the features were made from."""
        _, row = self.index[view]
        if zlib.crc32(pixels) != row["pixels_crc32"]:
            raise ValueError(
                f"cache {self.folder} is stale: the pixels of {row['image']} are not those it was made from. "
                "Make a new cache with training/cache_teacher.py."
            )


def read_cache_json(folder: Path) -> dict[str, Any]:
    """cache.json of a store.

    Raises:
        ValueError: there is none, it is broken or of another version.
    """
    path = folder / "cache.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no feature store (no cache.json); make one with training/cache_teacher.py.")
    try:
        content = json.loads(path.read_bytes())
        found = content.get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is broken; delete the folder and make the store again.") from error
    if found != FORMAT:
        raise ValueError(f"{path} has the format {found!r}; this version reads {FORMAT!r}. Make the store again.")
    for field, kind in FIELDS.items():
        if not isinstance(content.get(field), kind):
            raise ValueError(
                f"{path} is broken, its {field!r} is missing; delete the folder and make the store again."
            )
    counts = content["num_views"], content["shard_views"]
    if min(counts) < 1 or len(content["shards"]) not in (0, -(-counts[0] // counts[1])):
        raise ValueError(f"{path} is broken, its numbers don't fit; delete the folder and make the store again.")
    return content


def refuse_differences(folder: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises a `ValueError` that lists the differences, if there are any."""
    found = list(differences(ours, theirs))
    if found:
        raise ValueError(
            f"cache {folder} was made from something else: {'; '.join(found)}. "
            "Give the flags it was made with, or another folder."
        )
