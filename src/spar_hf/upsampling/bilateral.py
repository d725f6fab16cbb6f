"""What the training-free upsamplers share: weights that fall with the distance and with the difference in colour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..upsampling_spar import LocalWeights, Tile

SMALL = 1e-8


@dataclass(frozen=True)
class Kernels:
    """One Gaussian for each patch.

    Attributes:
        sigma_x, sigma_y: its width along its own axes, (h, w), in pixels of the output.
        angle: its turn, (h, w), radians.
        sigma_colour: its width in RGB from 0 to 1, (h, w).
    """

    sigma_x: Tensor
    sigma_y: Tensor
    angle: Tensor
    sigma_colour: Tensor


class BilateralWeights(LocalWeights):
    """Soft-max, over the patches within a radius, of a Gaussian in place plus one in colour; each patch has its own.

    Patches beyond the border are those at the border again, and count again.

    Args:
        guide: (3, H, W), the image at the output's size.
        patch_colours: (3, h, w), of each patch.
        kernels: each patch's Gaussian.
        most: how many patches to each side are looked at.
        radius: of each pixel, in patches, (H, W); None: the whole square.
    """

    def __init__(
        self, guide: Tensor, patch_colours: Tensor, kernels: Kernels, most: int, radius: Tensor | None = None
    ) -> None:
        self.guide, self.patch_colours, self.kernels, self.radius = guide, patch_colours, kernels, radius
        self.size_hw = (guide.shape[1], guide.shape[2])
        self.grid_hw = (patch_colours.shape[1], patch_colours.shape[2])
        self.offsets = offsets(most, guide.device)

    def tile(self, rows: slice, columns: slice) -> Tile:
        """See `LocalWeights.tile`."""
        device = self.guide.device
        places, cells, centres = [], [], []
        for axis, run in enumerate((rows, columns)):
            place = torch.arange(run.start, run.stop, device=device)
            scale = self.size_hw[axis] / self.grid_hw[axis]
            own = ((place + 0.5) / scale).long().clamp(max=self.grid_hw[axis] - 1)
            cell = (own[:, None] + self.offsets[:, axis]).clamp(0, self.grid_hw[axis] - 1)  # (pixels, O)
            places.append(place)
            cells.append(cell)
            centres.append((cell + 0.5) * scale - 0.5)
        down = (places[0][:, None] - centres[0])[:, None]  # (rows, 1, O)
        across = (places[1][:, None] - centres[1])[None]  # (1, columns, O)
        index = cells[0][:, None] * self.grid_hw[1] + cells[1][None]  # (rows, columns, O)
        colour = self.guide[:, rows, columns, None] - self.patch_colours.flatten(1)[:, index]
        fields = (self.kernels.sigma_x, self.kernels.sigma_y, self.kernels.angle, self.kernels.sigma_colour)
        logits = log_weight(down, across, colour, Kernels(*(field.flatten()[index] for field in fields)))
        if self.radius is not None:
            beyond = self.offsets.square().sum(1) > self.radius[rows, columns, None].square()
            logits = logits.masked_fill(beyond, -torch.inf)
        weights = logits.softmax(-1).flatten(0, 1)  # (pixels, O)
        box = [slice(int(cell.min()), int(cell.max()) + 1) for cell in cells]
        inner_columns = box[1].stop - box[1].start
        inner = (cells[0] - box[0].start)[:, None] * inner_columns + (cells[1] - box[1].start)[None]
        dense = weights.new_zeros(len(weights), (box[0].stop - box[0].start) * inner_columns)
        return Tile(box[0], box[1], dense.scatter_add_(1, inner.flatten(0, 1), weights))


def offsets(most: int, device: torch.device) -> Tensor:
    """Steps to the patches around one, (O, 2), rows first."""
    steps = torch.arange(-most, most + 1, device=device)
    return torch.cartesian_prod(steps, steps)


def log_weight(down: Tensor, across: Tensor, colour: Tensor, patch: Kernels) -> Tensor:
    """Log of a patch's Gaussian at a pixel: its distance, turned by the patch's own angle, and its colour's.

    Args:
        down, across: from the patch's centre to the pixel.
        colour: (3, ...), the pixel's less the patch's.
        patch: the patch's kernel.
    """
    along = across * patch.angle.cos() + down * patch.angle.sin()
    athwart = down * patch.angle.cos() - across * patch.angle.sin()
    place = along.square() / (2 * patch.sigma_x.square() + SMALL)
    place = place + athwart.square() / (2 * patch.sigma_y.square() + SMALL)
    return -place - colour.square().sum(0) / (2 * patch.sigma_colour.square() + SMALL)


def resized(image: Tensor, size_hw: tuple[int, int], antialias: bool = True) -> Tensor:
    """An image (3, H, W) at another size, bilinear."""
    if size_hw == tuple(image.shape[1:]):
        return image
    return F.interpolate(image[None], size=size_hw, mode="bilinear", align_corners=False, antialias=antialias)[0]
