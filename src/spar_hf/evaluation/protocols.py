"""The evaluation protocols: everything besides the model and the benchmark that changes a number."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..prompts_spar import IMAGENET_TEMPLATES


@dataclass(frozen=True)
class Protocol:
    """How a benchmark's images become label maps.

    Attributes:
        name: A key of `PROTOCOLS`, or "spar, changed" after `replace`.
        short_side_px: Images are resized to this shorter side, keeping the ratio; None leaves them as they are.
        long_side_px: ... but to no more than this longer side.
        antialias: Whether bilinear resizing looks at all pixels where it shrinks, or at four.
        window_px: Runs the segmenter in windows of this side, and averages their scores pixel by pixel; None runs it
            once on the whole image.
        stride_px: Step of that window.
        logit_scale: Factor on the cosine before the soft-max over all names.
        background_threshold: Pixels whose best probability is below it become class 0; None for never.
        area_threshold: Foreground classes with at most this fraction of the foreground are masked out; None for none.
        synonyms: How sure a class with several names is: as its best one (`max`, SCLIP), or as all together (`sum`).
        templates: Sentences into which a name is put; None leaves the choice to the processor.
    """

    name: str
    short_side_px: int | None = None
    long_side_px: int | None = None
    antialias: bool = True
    window_px: int | None = None
    stride_px: int | None = None
    logit_scale: float = 40.0
    background_threshold: float | None = None
    area_threshold: float | None = None
    synonyms: str = "max"
    templates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if (self.window_px is None) != (self.stride_px is None):
            raise ValueError(
                f"window_px is {self.window_px} and stride_px {self.stride_px}; a window needs both. Set both or none."
            )

    def replace(self, **changes: Any) -> Protocol:
        """The protocol with other constants; its name then says that it is changed."""
        return replace(self, **{"name": f"{self.name.removesuffix(', changed')}, changed", **changes})

    def thresholds(self) -> dict[str, Any]:
        """The arguments of `segmentation_spar.label_map`."""
        return {
            "logit_scale": self.logit_scale,
            "background_threshold": self.background_threshold,
            "background_class": None if self.background_threshold is None and self.area_threshold is None else 0,
            "area_threshold": self.area_threshold,
            "synonyms": self.synonyms,
        }

    def resize(self, image: Image.Image) -> Image.Image:
        """The image at the protocol's size; bilinear."""
        if self.short_side_px is None:
            return image
        factor = self.short_side_px / min(image.size)
        if self.long_side_px is not None:
            factor = min(factor, self.long_side_px / max(image.size))
        width, height = (max(1, int(side * factor + 0.5)) for side in image.size)
        if self.antialias:
            return image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
        pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
        return Image.fromarray(pixels[0].round().byte().permute(1, 2, 0).numpy())


# SPAR (arXiv 2604.02252): one pass at a short side of 672, Cityscapes whole. VOC21's thresholds are its authors' for
# CLIP; for other networks they set none (`load_protocol`). The paper does not evaluate COCO-Object; its constants are
# SCLIP's. The teacher's row is the same with a `SlidingWindow` for the encoder, which averages features, as the
# student learns them; the released code means to average logits there, and does not run.
_SPAR = Protocol("spar", short_side_px=672, long_side_px=2048, templates=IMAGENET_TEMPLATES)
# SCLIP (ECCV 2024) and the papers that follow its code: a short side of 336, window 224, stride 112, resized as OpenCV
# does. Cityscapes at 560, COCO-Stuff at 448, as their configuration files have it.
_SCLIP = Protocol(
    "sclip",
    short_side_px=336,
    long_side_px=2048,
    antialias=False,
    window_px=224,
    stride_px=112,
    templates=IMAGENET_TEMPLATES,
)
# What the benchmarks with a background class change, in both: (logit scale, background threshold, area threshold).
_BACKGROUND: dict[str, dict[str, Any]] = {
    "voc21": {"logit_scale": 65.0, "background_threshold": 0.1, "area_threshold": 0.1},
    "context60": {"logit_scale": 50.0, "background_threshold": 0.1},
    "coco_object": {"logit_scale": 50.0, "background_threshold": 0.1},
}
_NO_CLIP: dict[str, dict[str, Any]] = {"voc21": {"background_threshold": None, "area_threshold": None}}
_ON_DISK = ("voc21", "voc20", "context60", "context59", "cityscapes", "ade20k", "coco_object", "coco_stuff", "custom")

# Protocol -> benchmark -> its constants. "picturebook" draws at the size that is asked for, so nothing is resized.
PROTOCOLS: dict[str, dict[str, Protocol]] = {
    "spar": {name: replace(_SPAR, **_BACKGROUND.get(name, {})) for name in _ON_DISK}
    | {"cityscapes": replace(_SPAR, short_side_px=1024)},
    "sclip": {name: replace(_SCLIP, **_BACKGROUND.get(name, {})) for name in _ON_DISK}
    | {"cityscapes": replace(_SCLIP, short_side_px=560), "coco_stuff": replace(_SCLIP, short_side_px=448)},
    "picturebook": {"picturebook": Protocol("picturebook")},
}


def is_clip(config: Any) -> bool:
    """Whether a vision configuration is of CLIP, or of what has its blocks."""
    return bool(config.model_type == "spar_vision")


def load_protocol(name: str | None, benchmark: str, clip: bool = True) -> Protocol:
    """The constants of a protocol for a benchmark; None is the first protocol that has that benchmark.

    Args:
        name: a key of `PROTOCOLS`.
        benchmark: a key of `BENCHMARKS`.
        clip: whether the network is a CLIP: SPAR's authors set thresholds for it that others do not have.

    Raises:
        ValueError: If the protocol is unknown or not defined for the benchmark.
    """
    defined = [protocol for protocol, rows in PROTOCOLS.items() if benchmark in rows]
    if name is None and defined:
        name = defined[0]
    if name not in defined:
        raise ValueError(
            f"protocol {name!r} is not defined for benchmark {benchmark!r}, which has "
            f"{' and '.join(defined) or 'none'}. Choose one of these."
        )
    protocol = PROTOCOLS[name][benchmark]
    return protocol if clip or name != "spar" else replace(protocol, **_NO_CLIP.get(benchmark, {}))
