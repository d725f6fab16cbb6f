"""Upsample Anything: joint bilateral upsampling whose kernels are fitted to each image. Nothing is learned beforehand.

Source: Upsample Anything (Seo et al., arXiv 2511.16301) and the behaviour of its released code. Each patch has a
Gaussian of its own, wide in two directions and turned, and one in colour. They are fitted so that the image's own
small version (bicubic), upsampled, gives the image (L1, Adam, 51 steps); then features go through.
Deviation: sizes that are no multiple of the grid are fitted at the nearest multiple, where the code floors the ratio.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import upsampling_spar
from .bilateral import SMALL, BilateralWeights, Kernels, offsets, resized

NUMBERS = 2**22  # pixels x patches in sight that are fitted at a time, 16 MB


@dataclass(frozen=True)
class Settings:
    """The authors' numbers.

    Attributes:
        sigma_px: width of the Gaussians in place at the start, pixels.
        sigma_colour: width of those in colour at the start.
        radius: most patches to each side that a pixel sees.
        radius_sigmas: a pixel sees as many patches as this many widths are pixels (the code's own units).
        steps: of Adam.
        learning_rate: of Adam, at the start.
        decay: factor on the learning rate over `decay_steps` steps.
    """

    sigma_px: float = 16.0
    sigma_colour: float = 0.12
    radius: int = 8
    radius_sigmas: float = 2.0
    steps: int = 51
    learning_rate: float = 0.1
    decay: float = 1e-8
    decay_steps: int = 5100


class Upsampler(upsampling_spar.Upsampler):
    """See the header."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.settings = settings or Settings()

    def extra_repr(self) -> str:
        return str(self.settings)

    def weights(self, image: Tensor, features: Tensor, size_hw: tuple[int, int]) -> BilateralWeights:
        """See `Upsampler.weights`; of the features only the grid matters."""
        image = image.float()
        grid_hw = (features.shape[0], features.shape[1])
        scale_y, scale_x = (max(round(n / m), 1) for n, m in zip(image.shape[1:], grid_hw, strict=True))
        fitted_hw = (grid_hw[0] * scale_y, grid_hw[1] * scale_x)
        kernels = fit(resized(image, fitted_hw), grid_hw, self.settings)
        width = self.settings.radius_sigmas * torch.maximum(kernels.sigma_x, kernels.sigma_y)
        at_output = Kernels(
            kernels.sigma_x * (size_hw[1] / fitted_hw[1]),
            kernels.sigma_y * (size_hw[0] / fitted_hw[0]),
            kernels.angle,
            kernels.sigma_colour,
        )
        return BilateralWeights(
            resized(image, size_hw),
            resized(image, grid_hw, antialias=False),
            at_output,
            self.settings.radius,
            radius_of(width, size_hw, self.settings.radius),
        )


def radius_of(width: Tensor, size_hw: tuple[int, int], most: int) -> Tensor:
    """How many patches away each pixel sees, (H, W), from twice the patches' widths (h, w)."""
    smooth = F.interpolate(width[None, None], size=size_hw, mode="bilinear", align_corners=False)[0, 0]
    return smooth.ceil().clamp_(1, most)


def fit(image: Tensor, grid_hw: tuple[int, int], settings: Settings) -> Kernels:
    """The kernels that give the image (3, h * s, w * s) from its small version best."""
    with torch.inference_mode(False), torch.enable_grad():
        image = image.detach().clone()
        problem = _Problem(image, grid_hw, settings.radius)
        ones = torch.ones(grid_hw, device=image.device)
        raw = [
            ones * settings.sigma_px,
            ones * settings.sigma_px,
            torch.ones_like(ones),
            ones * settings.sigma_colour,
        ]
        raw = [field.log_().requires_grad_() for field in raw]  # the angle starts at log 1, 0
        adam = torch.optim.Adam(raw, lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(adam, settings.decay ** (1 / settings.decay_steps))
        for _ in range(settings.steps):
            adam.zero_grad()
            for part in problem.losses(lambda: kernels_of(raw), settings):
                part.backward()
            adam.step()
            schedule.step()
    with torch.no_grad():
        return kernels_of(raw)


def kernels_of(raw: list[Tensor]) -> Kernels:
    """Free numbers to kernels."""
    return Kernels(raw[0].exp(), raw[1].exp(), torch.pi * raw[2].tanh(), raw[3].exp())


class _Problem:
    """The image and its small version, patch by patch.

    The log of a weight is a quadratic form of a pixel's place in its own patch and of its colour, so that for each
    patch the logits of its pixels are one product, (patches in sight, 10) times (10, pixels).
    """

    def __init__(self, image: Tensor, grid_hw: tuple[int, int], radius: int) -> None:
        self.image_hw, self.grid_hw = (image.shape[1], image.shape[2]), grid_hw
        self.scales = tuple(n // m for n, m in zip(self.image_hw, grid_hw, strict=True))
        small = F.interpolate(image[None], size=grid_hw, mode="bicubic", align_corners=False)[0]
        self.small = small.flatten(1).T  # (cells, 3)
        self.colours = resized(image, grid_hw, antialias=False).flatten(1).T  # (cells, 3)
        steps = offsets(radius, image.device)
        self.steps = steps[steps.square().sum(1) <= radius**2]  # (O, 2)
        cells = torch.cartesian_prod(*(torch.arange(n, device=image.device) for n in grid_hw))  # (cells, 2)
        last = torch.tensor(grid_hw, device=image.device) - 1
        seen = (cells[:, None] + self.steps).clamp(min=0).minimum(last)  # (cells, O, 2)
        self.seen = seen[..., 0] * grid_hw[1] + seen[..., 1]  # (cells, O)
        # From a cell's centre to those it sees, in pixels.
        self.shifts = (seen - cells[:, None]) * torch.tensor(self.scales, device=image.device)
        y, x = torch.cartesian_prod(
            *(torch.arange(n, device=image.device, dtype=torch.float32) - (n - 1) / 2 for n in self.scales)
        ).T  # of a pixel from its cell's centre, (pixels)
        (rows, scale_y), (columns, scale_x) = zip(grid_hw, self.scales, strict=True)
        target = image.view(3, rows, scale_y, columns, scale_x).permute(1, 3, 0, 2, 4).flatten(3).flatten(0, 1)
        self.target = target  # (cells, 3, pixels)
        place = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y]).expand(len(cells), -1, -1)
        self.pixels = torch.cat([place, target.square().sum(1, keepdim=True), target], dim=1)  # (cells, 10, pixels)

    def losses(self, make: object, settings: Settings) -> Iterator[Tensor]:
        """Parts of the mean absolute difference, each with a graph of its own."""
        step = max(1, NUMBERS // (self.seen.shape[1] * self.pixels.shape[2]))
        for first in range(0, len(self.seen), step):
            part = slice(first, first + step)
            made = self.upsampled(make(), part, settings)  # type: ignore[operator]
            yield (made - self.target[part]).abs().sum() / self.target.numel()

    def upsampled(self, kernels: Kernels, cells: slice, settings: Settings) -> Tensor:
        """The small image upsampled at some cells, (cells, 3, pixels)."""
        logits = self.coefficients(kernels, cells) @ self.pixels[cells]  # (cells, O, pixels)
        with torch.no_grad():
            width = settings.radius_sigmas * torch.maximum(kernels.sigma_x, kernels.sigma_y)
            beyond = None
            if width.min() < settings.radius:
                radius = radius_of(width, self.image_hw, settings.radius)
                (rows, scale_y), (columns, scale_x) = zip(self.grid_hw, self.scales, strict=True)
                radius = radius.view(rows, scale_y, columns, scale_x).transpose(1, 2).flatten(2).flatten(0, 1)
                beyond = self.steps.square().sum(1)[:, None] > radius[cells, None].square()
        if beyond is not None:
            logits = logits.masked_fill(beyond, -torch.inf)
        return self.small[self.seen[cells]].transpose(1, 2) @ logits.softmax(1)

    def coefficients(self, kernels: Kernels, cells: slice) -> Tensor:
        """Of 1, x, y, xx, xy, yy, |g|², g, for each patch that a cell sees: (cells, O, 10)."""
        cosine, sine = kernels.angle.cos(), kernels.angle.sin()
        along, athwart = 1 / (2 * kernels.sigma_x.square() + SMALL), 1 / (2 * kernels.sigma_y.square() + SMALL)
        fields = (
            cosine.square() * along + sine.square() * athwart,
            2 * cosine * sine * (along - athwart),
            sine.square() * along + cosine.square() * athwart,
            1 / (2 * kernels.sigma_colour.square() + SMALL),
        )
        seen = self.seen[cells]
        xx, xy, yy, colour = torch.stack(fields).flatten(1)[:, seen]  # each (cells, O)
        down, across = self.shifts[cells].unbind(-1)
        theirs = self.colours[seen]  # (cells, O, 3)
        constant = xx * across.square() + xy * across * down + yy * down.square() + colour * theirs.square().sum(-1)
        linear_x, linear_y = -2 * xx * across - xy * down, -2 * yy * down - xy * across
        numbers = torch.stack([constant, linear_x, linear_y, xx, xy, yy, colour], dim=-1)
        return -torch.cat([numbers, -2 * colour[..., None] * theirs], dim=-1)
