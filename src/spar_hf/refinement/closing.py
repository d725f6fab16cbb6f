"""A morphological closing of the class ids, which ends ITACLIP: the highest id around each pixel, then the lowest.

Paper: Aydın et al., CVPR Workshops 2025. As the authors' code it takes ids for heights, so that the result depends on
the order of the classes: small gaps in a class are filled with it where what is in the gap has a lower id, such as the
background, 0. Outside the image there is nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from .clip_internals import ClipInternals


@dataclass(frozen=True)
class Settings:
    """Attributes:
    side_px: of the square around a pixel, odd.
    """

    side_px: int = 3

    def __post_init__(self) -> None:
        if self.side_px < 1 or self.side_px % 2 == 0:
            raise ValueError(f"closing's side_px is {self.side_px}; it must be odd.")


def closing(labels: Tensor, image: ClipInternals, settings: Settings) -> Tensor:
    """The label map (H, W), closed."""
    side = settings.side_px
    heights = labels[None, None].float()  # ids are far below 2^24
    for sign in (1, -1):
        heights = sign * F.max_pool2d(sign * heights, side, stride=1, padding=side // 2)
    return heights[0, 0].to(labels.dtype)
