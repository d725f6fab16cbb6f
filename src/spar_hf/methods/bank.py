"""A bank of references: what a method keeps of other pictures, so that it can look up what is like them.

`spar prototypes` makes one (`spar_hf.prototypes`) and a method takes it as its network `bank`. The classes that make
the entries are the `Prototypes` of the methods' files. A bank is one safetensors file: its entries, row by row, and a
record of what made it: the method, the names, the networks by the hash of their weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import check_finite, digest, tensors_digest, whole_files
from ..grid_spar import axis_positions, resample_axis
from ..names_spar import shown
from ..prompts_spar import Labels
from .segmenter import MethodParts

# Numbers of a matrix of similarities to the entries that are held at once, 16 MB in fp32.
SIMILARITY_NUMBERS = 2**22


@dataclass(frozen=True, eq=False)
class Bank:
    """Entries of a bank, and what made them.

    Attributes:
        path: the file; for messages.
        tensors: by name, a row for each entry: `features` (M, F) in the second network's space; `name` (M) int64, an
            index of `names`; others as the method has it.
        record: method, names, networks (their hashes), settings, and whatever else its maker kept.
    """

    path: Path
    tensors: dict[str, Tensor]
    record: dict[str, Any]

    def __len__(self) -> int:
        return len(self.features)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        """With a digest of its contents, since it is part of fingerprints."""
        return f"Bank({str(self.path)!r}, {tensors_digest(json.dumps(self.record), self.tensors)})"

    @property
    def features(self) -> Tensor:
        return self.tensors["features"]

    @property
    def names(self) -> list[str]:
        return list(self.record["names"])

    @classmethod
    def of(cls, given: Bank | str | Path) -> Bank:
        """The bank itself, or one read from a file."""
        return given if isinstance(given, Bank) else cls.read(Path(given))

    @classmethod
    def read(cls, path: Path) -> Bank:
        """A bank that `write` wrote.

        Raises:
            ValueError: there is no such file, or it is broken or no bank.
        """
        if not path.is_file():
            raise ValueError(f"there is no bank of references {path}; spar prototypes --output {path} makes one.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is no bank of references ({error}); make it anew with spar prototypes."
            ) from error
        if "bank" not in metadata or "features" not in tensors:
            raise ValueError(f"{path} is no bank of references; make one with spar prototypes.")
        if tensors_digest(metadata["bank"], tensors) != metadata.get("digest"):
            raise ValueError(f"{path} is broken (check sum); make it anew with spar prototypes.")
        return cls(path, tensors, json.loads(metadata["bank"]))

    def write(self) -> None:
        """Writes the file, whole or not at all.

        Raises:
            ValueError: an entry holds NaN or infinity.
        """
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
        check_finite(f"{self.path} is not written", tensors)
        text = json.dumps(self.record)
        with whole_files(self.path) as (draft,):
            save_file(tensors, draft, metadata={"bank": text, "digest": tensors_digest(text, tensors)})

    def check(self, method: str, settings: dict[str, Any], networks: dict[str, nn.Module]) -> None:
        """Raises a `ValueError` unless the bank is of this method, these settings and these networks."""
        again = f"make another one with spar prototypes --method {method}."
        if self.record["method"] != method:
            raise ValueError(f"bank {self.path} is of method {self.record['method']!r}, not {method!r}; {again}")
        for name, value in settings.items():
            if self.record["settings"][name] != value:
                made = self.record["settings"][name]
                raise ValueError(f"bank {self.path} was made with {name}={made} and is read with {value}; {again}")
        for name, network in networks.items():
            if self.record["networks"][name] != network_digest(network):
                raise ValueError(f"bank {self.path} was made with another network {name!r} than is given; {again}")

    def places(self, labels: Labels) -> dict[int, int]:
        """The index in `names` of each name of a vocabulary that the bank has, by its number; case does not count."""
        known = {name.casefold(): index for index, name in enumerate(self.names)}
        return {number: known[name.casefold()] for number, name in enumerate(labels.names) if name.casefold() in known}

    def missing(self, names: Sequence[str]) -> str:
        """The sentence about names that the bank lacks."""
        return (
            f"bank {self.path} lacks {', '.join(map(shown, names[:5]))}{', ...' if len(names) > 5 else ''}; it has "
            f"{', '.join(self.names[:20])}{', ...' if len(self.names) > 20 else ''}. Make one with these labels: "
            f"spar prototypes --method {self.record['method']}."
        )


def network_digest(network: nn.Module) -> str:
    """A digest of a network's weights as bf16 has them, so that it is the same in fp32 and in bf16."""

    def parts() -> Any:
        for name, tensor in sorted(network.state_dict().items()):
            yield f"{name} {tuple(tensor.shape)}".encode()
            if tensor.is_floating_point():
                tensor = tensor.to(torch.bfloat16)
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return digest(parts())


def nearest(queries: Tensor, entries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest inner products of queries (R, F) with entries (M, F): values and indices (R, min(count, M)).

    Some queries at a time; of equal products any.
    """
    count = min(count, len(entries))
    step = max(SIMILARITY_NUMBERS // max(len(entries), 1), 1)
    values, indices = [queries.new_zeros(0, count)], [torch.zeros(0, count, dtype=torch.int64, device=queries.device)]
    for some in queries.split(step):
        found = (some @ entries.T).topk(count, dim=1)
        values.append(found.values)
        indices.append(found.indices)
    return torch.cat(values), torch.cat(indices)


# ------------------------------------------------------------------------------------- what makes the entries


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture of which entries are made.

    Attributes:
        pixels: (1, 3, H, W), normalised for the model.
        target: (H, W) int64, the class of each pixel; negative where it has none.
    """

    pixels: Tensor
    target: Tensor


Rows = dict[str, Tensor]
Steps = Callable[[str, int, Callable[[int, list[Rows]], Rows]], list[Rows]]


class MethodPrototypes(MethodParts):
    """Makes the entries of a method's bank; see `MethodParts` for the arguments.

    Attributes:
        kept_settings: settings that must be the same when the bank is read.
    """

    kept_settings: tuple[str, ...] = ()

    @property
    def made_with(self) -> dict[str, nn.Module]:
        """The networks by whose hash a bank is known to fit, by name."""
        raise NotImplementedError

    def of_picture(self, reference: Reference) -> Rows:
        """What is made of one picture: tensors by name, a row for each entry."""
        raise NotImplementedError

    def gathered(
        self, rows: list[Rows], read: Callable[[int], Reference], labels: Labels | None, steps: Steps
    ) -> tuple[Rows, list[str]]:
        """The bank's tensors and names.

        Args:
            rows: what `of_picture` made of each picture.
            read: a picture by its number.
            labels: the vocabulary, where there is one.
            steps: (title, count, work) -> the rows that `work(number, rows so far)` makes, kept on disk as they come.
        """
        return joined(rows), [] if labels is None else [names[0] for names in labels.classes]


def joined(rows: list[Rows]) -> Rows:
    """Rows one after the other."""
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def region_means(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean features of regions.

    Args:
        features: (F, h, w).
        weights: (R, h * w), of each patch in each region, at least 0.

    Returns:
        (R', F) of the regions that have any weight, and which those are, (R) bool.
    """
    total = weights.sum(dim=1)
    kept = total > 0
    return weights[kept] @ features.flatten(1).T / total[kept, None], kept


def pixel_means(
    features: Tensor, ids: Tensor, coverage_hw: tuple[float, float] = (1.0, 1.0), unit: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean over the pixels of each region of features that come to them bilinearly; never all pixels' are held.

    Args:
        features: (F, h, w).
        ids: (H, W) int64, the region of each pixel.
        coverage_hw: see `grid_spar.coverage`.
        unit: a pixel's features count at length one.

    Returns:
        The ids that occur, in their order (R), and (R, F).
    """
    numbers, place = ids.unique(return_inverse=True)
    height, width = ids.shape
    total = features.new_zeros(len(numbers), len(features))
    columns = axis_positions(slice(0, width), width, features.shape[2], coverage_hw[1], features.device)
    across = resample_axis(features, -1, columns)  # (F, h, W)
    step = max(SIMILARITY_NUMBERS // (len(features) * width), 1)
    for first in range(0, height, step):
        rows = slice(first, min(first + step, height))
        positions = axis_positions(rows, height, features.shape[1], coverage_hw[0], features.device)
        pixels = resample_axis(across, -2, positions).flatten(1).T  # (pixels, F)
        total.index_add_(0, place[rows].flatten(), F.normalize(pixels, dim=-1) if unit else pixels)
    return numbers, total / place.flatten().bincount()[:, None]
