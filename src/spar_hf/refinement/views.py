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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoder_spar import SparVisionOutput
from ..encoders.base import DenseEncoder, EncoderWrapper
from .clip_internals import covered_pixels

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision rounds it


@dataclass(frozen=True)
class Settings:
    """ITACLIP's numbers.

    Attributes:
        blur_px, blur_sigma_px: side and standard deviation of the Gaussian.
        plain_weight: of all unflipped views together, where there are flips.
    """

    blur_px: int = 11
    blur_sigma_px: float = 5.0
    plain_weight: float = 0.7


def greyscale(pixel_values: Tensor, settings: Settings) -> Tensor:
    """(B, 3, H, W) with the luma in all three channels."""
    luma = torch.tensor(LUMA, dtype=pixel_values.dtype, device=pixel_values.device)
    return torch.einsum("bchw,c->bhw", pixel_values, luma)[:, None].expand_as(pixel_values)


def blur(pixel_values: Tensor, settings: Settings) -> Tensor:
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
        change: pixels (B, 3, H, W) and the settings -> pixels of the same size.
        undo: features (B, h, w, D) -> features that lie over the image again; None for a view that moves nothing.
    """

    name: str
    change: Callable[[Tensor, Settings], Tensor]
    undo: Callable[[Tensor], Tensor] | None = None


IMAGE_ENGINEERING = (View("greyscale", greyscale), View("blur", blur))
FLIPS = (
    View("vertical flip", lambda pixels, _: pixels.flip(2), lambda features: features.flip(1)),
    View("horizontal flip", lambda pixels, _: pixels.flip(3), lambda features: features.flip(2)),
)


class ViewEnsemble(EncoderWrapper, nn.Module):
    """Weighted mean of the L2-normalised features of an image and of views of it; itself a dense encoder.

    The plain image and the changed ones weigh the same; all flips together weigh what is left of the whole.

    Args:
        encoder: any dense encoder.
        views: beside the image itself.
        settings: the blur and the weights.
    """

    def __init__(self, encoder: DenseEncoder, views: Sequence[View], settings: Settings = Settings()) -> None:
        super().__init__()
        self.encoder = encoder
        self.views = tuple(views)
        self.settings = settings

    def extra_repr(self) -> str:
        return f"views={', '.join(view.name for view in self.views)}, {self.settings}"

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D), vectors of at most unit length."""
        covered = covered_pixels(pixel_values, self.config)
        num_flips = sum(view.undo is not None for view in self.views)
        num_plain = 1 + len(self.views) - num_flips  # with the image itself
        plain_weight = self.settings.plain_weight if num_flips else 1.0

        outputs = self.encoder(pixel_values)
        mean = F.normalize(outputs.patch_embeds.float(), dim=-1) * (plain_weight / num_plain)
        for view in self.views:
            if view.undo is None:
                features = self.encoder(view.change(pixel_values, self.settings)).patch_embeds
                weight = plain_weight / num_plain
            else:
                features = view.undo(self.encoder(view.change(covered, self.settings)).patch_embeds)
                weight = (1 - plain_weight) / num_flips
            mean = mean + weight * F.normalize(features.float(), dim=-1)
        return SparVisionOutput(
            patch_embeds=mean, image_hw=outputs.image_hw, extent_hw=outputs.extent_hw, normalized=True
        )
