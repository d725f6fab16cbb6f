"""ViewEnsemble: a dense encoder that runs another one on several views of the image and averages. ITACLIP.

Paper: ITACLIP (Aydın et al., CVPR Workshops 2025, arXiv 2411.12044), section 3.2, image engineering: the L2-normalised
features of the image, of its greyscale and of its Gaussian blur are averaged; the logits of the vertically and of the
horizontally flipped image, flipped back, are averaged; the two are mixed 0.7 to 0.3. Logits are linear in normalised
features and flips commute with the upsampling, so all of it is one weighted mean of normalised features.

Choices: the mix is 0.7 as for VOC21 and Cityscapes in the authors' configurations (0.75 for the others). Greyscale and
blur (11 pixels, sigma 5, mirrored borders) act on the normalised pixels, as theirs do. With a sliding window, each
window has its views, as theirs: `SlidingWindow(ViewEnsemble(...))`. The mean is not normalised again: the cosines are
what is averaged. Deviation: an image that is no multiple of the patch is cut to whole patches before it is flipped, so
that both grids cover the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoder_spar import EncoderWrapper, SparVisionOutput
from ..encoders.base import DenseEncoder
from .clip_internals import covered_pixels

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision rounds it


@dataclass(frozen=True)
class EngineeringSettings:
    """Side and standard deviation of the Gaussian that blurs."""

    blur_px: int = 11
    blur_sigma_px: float = 5.0


@dataclass(frozen=True)
class FlipSettings:
    """Weight of all flipped images together."""

    weight: float = 0.3


def greyscale(pixel_values: Tensor) -> Tensor:
    """(B, 3, H, W) with the luma in all three channels."""
    luma = torch.tensor(LUMA, device=pixel_values.device)
    grey = torch.einsum("bchw,c->bhw", pixel_values.float(), luma)[:, None]
    return grey.to(pixel_values.dtype).expand_as(pixel_values)


def blur(pixel_values: Tensor, settings: EngineeringSettings) -> Tensor:
    """(B, 3, H, W) after a Gaussian filter along the rows, then along the columns."""
    offset = torch.arange(settings.blur_px, dtype=torch.float32, device=pixel_values.device) - settings.blur_px // 2
    kernel = torch.exp(-0.5 * (offset / settings.blur_sigma_px) ** 2)
    kernel = (kernel / kernel.sum()).expand(pixel_values.shape[1], 1, 1, -1)
    padded = F.pad(pixel_values.float(), [settings.blur_px // 2] * 4, mode="reflect")
    across = F.conv2d(padded, kernel, groups=pixel_values.shape[1])
    return F.conv2d(across, kernel.transpose(2, 3), groups=pixel_values.shape[1]).to(pixel_values.dtype)


@dataclass(frozen=True)
class View:
    """A changed image whose features are averaged with the others'.

    Attributes:
        name: for the record.
        change: pixels (B, 3, H, W) -> pixels of the same size.
        undo: features (B, h, w, D) -> features that lie over the image again; None for a view that moves nothing.
        weight: of it and the others that are moved, together; for those that move nothing, what is left is shared.
    """

    name: str
    change: Callable[[Tensor], Tensor]
    undo: Callable[[Tensor], Tensor] | None = None
    weight: float = 0.0


def image_engineering(settings: EngineeringSettings) -> tuple[View, ...]:
    """The image's greyscale and its blur."""
    return (View("greyscale", greyscale), View(f"blur of {settings}", partial(blur, settings=settings)))


def flips(settings: FlipSettings) -> tuple[View, ...]:
    """The image upside down, and mirrored."""
    return tuple(
        View(name, partial(torch.flip, dims=(axis,)), partial(torch.flip, dims=(axis - 1,)), settings.weight)
        for name, axis in (("vertical flip", 2), ("horizontal flip", 3))
    )


class ViewEnsemble(EncoderWrapper, nn.Module):
    """Weighted mean of the L2-normalised features of an image and of views of it; itself a dense encoder.

    The plain image and the changed ones weigh the same; all flips together weigh 0.3 of the whole.

    Args:
        encoder: any dense encoder.
        views: beside the image itself.
    """

    def __init__(self, encoder: DenseEncoder, views: Sequence[View]) -> None:
        super().__init__()
        self.encoder = encoder
        self.views = tuple(views)

    def extra_repr(self) -> str:
        return f"views={', '.join(f'{view.name} {view.weight:g}' for view in self.views)}"

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D), vectors of at most unit length."""
        covered = covered_pixels(pixel_values, self.config)
        moved = [view for view in self.views if view.undo is not None]
        moved_weight = moved[0].weight if moved else 0.0
        plain_weight = (1 - moved_weight) / (1 + len(self.views) - len(moved))  # of each, the image itself too

        outputs = self.encoder(pixel_values)
        mean = F.normalize(outputs.patch_embeds.float(), dim=-1) * plain_weight
        for view in self.views:
            if view.undo is None:
                features, weight = self.encoder(view.change(pixel_values)).patch_embeds, plain_weight
            else:
                features = view.undo(self.encoder(view.change(covered)).patch_embeds)
                weight = moved_weight / len(moved)
            mean = mean + weight * F.normalize(features.float(), dim=-1)
        return SparVisionOutput(
            patch_embeds=mean, image_hw=outputs.image_hw, extent_hw=outputs.extent_hw, normalized=True
        )
