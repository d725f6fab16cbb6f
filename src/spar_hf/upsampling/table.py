"""The table of upsamplers: a finer grid of features by the image's own edges, one row each.

A row's file in this folder has a class `Upsampler`, whose argument is its `Settings`; AnyUp is a network and ships
(`anyup_spar`). Upsampling can hurt (SPAR reports gains with AnyUp, and on DINOv3.txt a loss: `published.json`), so it
is off unless asked for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from ..anyup_spar import SparAnyUp
from ..checkpoints import folder_of
from ..names_spar import unknown
from ..pretrained import open_model, read_config
from ..upsampling_spar import Upsampler


@dataclass(frozen=True)
class UpsamplerRow:
    """A row of the table.

    Attributes:
        name: what it is called everywhere; the file of `spar_hf.upsampling`, where it has one.
        title: its own name.
        paper: where it was published.
        weights: where its weights come from; "" where it has none.
        licence: of the authors' code; "" where none is given. No line of any of them is here.
        cost: what it takes beside the encoder's pass.
    """

    name: str
    title: str
    paper: str
    weights: str = ""
    licence: str = ""
    cost: str = ""

    def load(self, weights: str | None = None) -> Upsampler:
        """The upsampler, ready to run.

        Args:
            weights: folder or Hub id, for a row that has weights.

        Raises:
            ValueError: weights are missing, or given to a row that has none.
            OSError: the Hub or the files cannot be read.
        """
        if not self.weights:
            if weights is not None:
                raise ValueError(f"upsampler {self.name!r} has no weights; leave {weights!r} out.")
            return import_module(f"{__package__}.{self.name}").Upsampler()
        if weights is None:
            raise ValueError(f"upsampler {self.name!r} needs weights: {self.name}=FOLDER or ID; {self.weights}.")
        folder = folder_of(weights, {})
        model_type = read_config(folder).get("model_type")
        if model_type != SparAnyUp.config_class.model_type:
            raise ValueError(f"{weights} is a checkpoint of type {model_type!r} and no {self.title}; {self.weights}.")
        network: Upsampler = open_model(SparAnyUp, folder)
        return network

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


_ROWS = (
    UpsamplerRow(
        "anyup",
        "AnyUp",
        "Wimmer et al., ICLR 2026",
        weights="spar convert anyup_multi_backbone.pth --backbone anyup writes one from the authors' release",
        licence="CC-BY-4.0",
        cost="about 1.3 TFLOP at 1024 x 1024",
    ),
    UpsamplerRow(
        "jbu",
        "joint bilateral upsampling",
        "Kopf et al., SIGGRAPH 2007",
        cost="25 patches a pixel",
    ),
    UpsamplerRow(
        "upsample_anything",
        "Upsample Anything",
        "Seo et al., arXiv 2511.16301",
        cost="51 steps of gradient descent for each image",
    ),
)

UPSAMPLERS: dict[str, UpsamplerRow] = {row.name: row for row in _ROWS}


def check_upsampler(name: str) -> str:
    """The row of an upsampler that `load_upsampler` would load.

    Raises:
        ValueError: there is none; the message lists the rows and the nearest name.
    """
    row = name.partition("=")[0]
    if row not in UPSAMPLERS:
        raise ValueError(unknown("upsampler", row, UPSAMPLERS))
    return row


def load_upsampler(name: str | Upsampler) -> Upsampler:
    """The upsampler called `name`, or `name=weights` for one that has weights; an upsampler is its own.

    Raises:
        ValueError: there is none; the message lists the rows and the nearest name.
    """
    if isinstance(name, Upsampler):
        return name
    row, (_, equals, weights) = check_upsampler(name), name.partition("=")
    return UPSAMPLERS[row].load(weights if equals else None)
