"""The feature store: teacher features (and inputs of the trained blocks) in fp16 shards, each whole or absent.

    FOLDER/cache.json                  what the features were made from; how many views and shards
    FOLDER/shard-00003.safetensors     "<view>.features" (h, w, D), "<view>.trunk" (P + h * w, C) where asked for;
                                       the header ties each to image, view, pixels and check sums

A store is used only by a run that would make the same features: everything they depend on is compared.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..files import write_atomically, write_json

FORMAT = "spar_hf feature store 1"


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
        folder: where.
        made_from: what the features depend on, as JSON: data, augmentation, seed, draws, teacher, trunk.
        num_views: how many views there are.
        shard_views: views in a shard.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any], num_views: int, shard_views: int):
        self.folder, self.made_from, self.num_views, self.shard_views = folder, made_from, num_views, shard_views
        self.index: dict[int, tuple[Path, dict[str, Any]]] = {}  # view -> (shard, its row); filled by `load_index`
        self.bad: dict[str, str] = {}

    @property
    def num_shards(self) -> int:
        return -(-self.num_views // self.shard_views)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def views_of(self, shard: int) -> range:
        return range(shard * self.shard_views, min((shard + 1) * self.shard_views, self.num_views))

    # ---- writing

    def create(self) -> None:
        """Writes cache.json, or checks that the one there was made from the same.

        Raises:
            ValueError: the folder holds a store made from something else.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "cache.json").exists():
            there = read_cache_json(self.folder)
            here = {**there, "made_from": self.made_from, "num_views": self.num_views, "shard_views": self.shard_views}
            refuse_differences(self.folder, here, there)
            for draft in self.folder.glob("*.tmp"):  # of a writer that was killed
                draft.unlink()
            return
        write_json(
            self.folder / "cache.json",
            {
                "format": FORMAT,
                "made_from": self.made_from,
                "num_views": self.num_views,
                "shard_views": self.shard_views,
            },
        )

    def finished(self, shard: int) -> bool:
        """True for a shard that is there, whole, and of this store."""
        path = self.path(shard)
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                return json.loads(file.metadata()["index"])["made_from"] == self.made_from
        except (SafetensorError, KeyError, TypeError):
            return False

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
        metadata = {"made_from": self.made_from, "views": rows, "sums": sums, "bad": bad}
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
        missing = [shard for shard in range(store.num_shards) if not store.finished(shard)]
        if missing:
            raise ValueError(
                f"cache {folder} is unfinished or broken: {len(missing)} of {store.num_shards} shards are missing, "
                f"the first is {store.path(missing[0]).name}. Run training/cache_teacher.py again; it goes on there."
            )
        store.load_index()
        return store

    def load_index(self) -> None:
        """Reads the headers of all shards."""
        for shard in range(self.num_shards):
            with safe_open(self.path(shard), "pt") as file:
                metadata = json.loads(file.metadata()["index"])
            for view, row in metadata["views"].items():
                self.index[int(view)] = (self.path(shard), {**row, "sums": metadata["sums"]})
            self.bad |= metadata["bad"]

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
    """cache.json of a store."""
    path = folder / "cache.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no feature store (no cache.json); make one with training/cache_teacher.py.")
    content = json.loads(path.read_text())
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {content.get('format')!r}; this version reads {FORMAT!r}.")
    return content


def refuse_differences(folder: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises a `ValueError` that lists the differences, if there are any."""
    found = list(differences(ours, theirs))
    if found:
        raise ValueError(
            f"cache {folder} was made from something else: {'; '.join(found)}. "
            "Give the flags it was made with, or another folder."
        )
