"""CorrCLIP v2 without its memory bank: CorrCLIP whose correlations come from dense features of the whole image.

Authors' code: github.com/zdk258/CorrCLIP, the journal extension of CorrCLIP (its file). Changes to it:
1. The second network sees the whole image once, its sides brought bilinearly to the nearest whole patches. Its patch
   features come bilinearly to the image's pixels, each of length one; in a window, bilinearly to twice CLIP's grid, at
   length one again: f. Padding repeats the border.
2. Regions that are alike stay apart.
The output lies on twice CLIP's grid. Only the pixels that a cell looks at are made, two by two of each.
Left out: retrieval, which averages the scores with those of alike regions in a bank of other images' regions.
Deviation: the second network, any that `networks.vit.ViT` takes, sees the pixels that CLIP sees, not the file's.
To reach: no published numbers are without the bank; those with it are `corrclip_v2_bank`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid_spar import axis_positions
from . import corrclip


@dataclass(frozen=True)
class Settings(corrclip.Settings):
    """CorrCLIP's constants; no regions are made one."""

    merge_distance: float = -1.0


class Encoder(corrclip.Encoder):
    """CorrCLIP v2 around a CLIP vision tower; see the head of the file and `corrclip.Encoder`."""

    def prepare(self) -> None:
        self.config.patch_size = max(self.vision.config.patch_size // 2, 1)

    def whole(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The second network's features of the image, (F, h, w) fp32 over all of it, and the image's size."""
        patch_px, image_hw = self.dino.patch_px, (image.shape[2], image.shape[3])
        size = [max(round(side / patch_px), 1) * patch_px for side in image_hw]
        pixels = F.interpolate(image.float(), size=size, mode="bilinear", align_corners=False).to(image.dtype)
        return self.dino(pixels, self.config).features[0].float(), image_hw

    def vectors(
        self, pixels: Tensor, places: list[tuple[int, ...]], around: tuple[int, ...], seen: Any
    ) -> tuple[Tensor, tuple[int, int]]:
        """See `corrclip.Encoder.vectors`."""
        features, image_hw = seen
        patch_px, frame_hw = self.vision.config.patch_size, (pixels.shape[2], pixels.shape[3])
        grid_hw = (2 * (frame_hw[0] // patch_px), 2 * (frame_hw[1] // patch_px))
        before, after = (around[2], around[0]), (around[3], around[1])
        found = []
        for place in places:
            tables, mixes = [], []
            for axis in (0, 1):
                every, frame, whole = slice(0, grid_hw[axis]), frame_hw[axis], image_hw[axis]
                # The two pixels of the padded window that a cell's centre lies between, and their weights.
                centres = axis_positions(every, grid_hw[axis], frame, 1.0, features.device)
                low = centres.floor().long()
                pair = torch.stack([low, (low + 1).clamp(max=frame - 1)], dim=1)  # (cells, 2)
                mixes.append(torch.stack([low + 1 - centres, centres - low], dim=1).float())
                # The same pixels in the image, and where they lie on the second network's patches.
                inside = (pair - before[axis]).clamp(0, frame - before[axis] - after[axis] - 1) + place[axis]
                count = features.shape[1 + axis]
                on_patches = axis_positions(slice(0, whole), whole, count, 1.0, features.device)[inside.flatten()]
                patches = torch.arange(count, device=features.device)
                tables.append((1 - (on_patches[:, None] - patches).abs()).clamp(min=0).float())
            looked_at = F.normalize(tables[0] @ features @ tables[1].T, dim=0)  # (F, 2 rows, 2 columns)
            looked_at = looked_at.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
            cells = torch.einsum("fyaxb,ya,xb->yxf", looked_at, *mixes).flatten(0, 1)
            found.append(F.normalize(cells, dim=-1))
        return torch.stack(found), grid_hw
