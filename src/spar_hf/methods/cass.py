"""CASS: the last block attends by CLIP's own keys, each head joined by the head of DINO's with a matching spectrum.

Paper: "Distilling Spectral Graph for Object-Context Aware Open-Vocabulary Semantic Segmentation", Kim et al., CVPR
2025. Changes, s = d^-0.5:
1. DINO sees the image resized to a square of its shorter side; its last keys go to CLIP's grid bilinearly, and all
   heads together onto the range of CLIP's keys.
2. Graphs C = s K Kᵀ of CLIP's heads and D of DINO's. The 20 largest eigenvalues of each, at length one and then at sum
   one; d(i, j) = the sum of their absolute differences between D_i and C_j. Heads are assigned so that the sum of d is
   largest.
3. D is cut to its 10 largest singular values, which are stretched to (0, 1.5 max - 0.5 min) + 0.5 min; its diagonal
   becomes 0, and its range that of the C it joins.
4. A = softmax((10 d D + C) / (10 d + 1) + NACLIP's Gaussian); the patches are out_proj(A V), without residual and MLP.
As the authors' code: what was matched as D_i and C_j is joined as D_j and C_i (`transposed`); the rank is always 10,
since its test of energy looks only at the values that it computed; matched heads are the least alike ones.
Graphs are of rank d, so that eigenvalues come from d x d matrices; rows of A are made some at a time, none is held.
Deviations: singular values are exact (theirs are random, features move by 0.02 to 0.08); DINO sees the image's own
colours (theirs mixes up two standard deviations, and bytes wrap around).
Many assignments tie: where D_i's and C_j's spectra cross at the same place for several i and j, d is a number of D_i
plus one of C_j. Rounding of the costs to fp32 decides, here as there, so that each image is run by itself.
Its text side, which pulls names towards the image, is no feature: see `cass_text`.
To reach: `cass_text`'s numbers in `spar_hf.published`, with CLIP ViT-B/16 and DINO ViT-B/8, with its text
side and PAMR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dense_spar import merge_heads, project_heads, split_heads
from ..encoder_spar import SparVisionOutput
from ..extras import extra_package
from ..networks.vit import ViT
from .encoder import ROW_NUMBERS, MethodEncoder


@dataclass(frozen=True)
class Settings:
    """CASS's constants (sections 3.2 and 3.3 and the authors' code).

    Attributes:
        eigenvalues: of a spectrum.
        rank: of a DINO graph.
        stretch: stretch the singular values; the authors do but for VOC20 and Cityscapes.
        weight: of DINO's graph, times its distance.
        sigma_patches: of the Gaussian.
        transposed: join D_j and C_i where D_i and C_j were matched, as in the released code; False joins the matched.
    """

    eigenvalues: int = 20
    rank: int = 10
    stretch: bool = True
    weight: float = 10.0
    sigma_patches: float = 5.0
    transposed: bool = True


class Encoder(MethodEncoder):
    """CASS around a CLIP vision tower; see the head of the file.

    Args:
        vision: the tower.
        networks: "dino": an adapter, a module, or the id or folder to load it from.
        settings: the method's constants.
        method: the row's name.

    Raises:
        ValueError: the second network is missing, no ViT, or has another number of heads than the tower.
    """

    settings: Settings
    dino: ViT

    def adapters(self) -> dict[str, Any]:
        return {"dino": ViT.of}

    def prepare(self) -> None:
        ours, theirs = self.vision.config.num_attention_heads, self.dino.num_heads
        if ours != theirs:
            raise ValueError(
                f"method {self.config.method!r} matches heads, and the tower has {ours} and network 'dino' {theirs}; "
                f"give a ViT with {ours} heads."
            )

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D)."""
        outputs = [self.of_one(image) for image in pixel_values.split(1)]
        names = ("patch_embeds", "image_embeds", "last_hidden_state", "pooler_output")
        fields: dict[str, Any] = {name: torch.cat([getattr(output, name) for output in outputs]) for name in names}
        return SparVisionOutput(**fields, image_hw=outputs[0].image_hw, extent_hw=outputs[0].extent_hw)

    def of_one(self, image: Tensor) -> SparVisionOutput:
        """`forward` of one image (1, 3, H, W)."""
        x, grid_hw, extent_hw = self.embed(image)
        x = self.run_to_last(x, grid_hw)
        layer = self.last_layer
        heads = project_heads(layer.self_attn, layer.layer_norm1(x), "kv")
        side = min(image.shape[2:])
        square = image.float()
        if image.shape[2] != image.shape[3]:
            square = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
        seen = self.dino(square, self.config, heads="k").heads["k"].float()
        seen = F.interpolate(seen, size=grid_hw, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
        dino_keys = split_heads(seen, seen.shape[-1] // self.dino.num_heads)
        mixed = self.mixed(heads["k"][0, :, 1:].float(), dino_keys[0], heads["v"][0, :, 1:].float(), grid_hw)
        patches = layer.self_attn.out_proj(merge_heads(mixed[None]).to(x.dtype))
        return self.output(patches, x, grid_hw, extent_hw, image)

    def mixed(self, keys: Tensor, dino_keys: Tensor, values: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """What each head of one image attends to: (H, N, d) each, fp32."""
        settings = self.settings
        scale = keys.shape[-1] ** -0.5
        low, high = dino_keys.aminmax()
        dino_keys = (dino_keys - low) / (high - low) * (keys.max() - keys.min()) + keys.min()
        spectra = [spectrum(each, scale, settings.eigenvalues) for each in (dino_keys, keys)]
        distance = (spectra[0][:, None] - spectra[1][None]).abs().sum(dim=-1)  # (DINO's heads, CLIP's heads)
        factors = [self.low_rank(each, scale) for each in dino_keys]
        out = torch.empty_like(values)
        down, across = (self.gaussian(length, keys) for length in grid_hw)
        for i, j in matched(distance):
            theirs, ours = (j, i) if settings.transposed else (i, j)
            weight = settings.weight * distance[i, j].float()
            out[ours] = attend_joined(keys[ours] * scale**0.5, factors[theirs], values[ours], weight, (down, across))
        return out

    def low_rank(self, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """A graph s K Kᵀ of keys (N, d) by its largest singular values: U (N, r) and their values (r), fp32."""
        keys = keys.double()
        squares, directions = torch.linalg.eigh(keys.T @ keys)
        rank = min(self.settings.rank, *keys.shape)
        squares, directions = squares[-rank:].clamp(min=0), directions[:, -rank:]
        lengths = squares.clamp(min=1e-12 * squares.max()).sqrt()
        sizes = scale * squares
        if self.settings.stretch:
            low, high = sizes.min(), sizes.max()
            spread = (high - low).clamp(min=torch.finfo(sizes.dtype).tiny)
            sizes = (sizes - low) / spread * (1.5 * high - 0.5 * low) + 0.5 * low
        return (keys @ directions / lengths).float(), sizes.float()

    def gaussian(self, length: int, like: Tensor) -> Tensor:
        """(n, n) along one side; NACLIP's is the product of both."""
        place = torch.arange(length, device=like.device, dtype=like.dtype)
        return (-((place[:, None] - place) ** 2) / (2 * self.settings.sigma_patches**2)).exp()


def spectrum(keys: Tensor, scale: float, count: int) -> Tensor:
    """The largest eigenvalues of s K Kᵀ of each head, (H, N, d) -> (H, count), falling, at sum one; fp64."""
    keys = keys.double()
    values = scale * torch.linalg.eigvalsh(keys.transpose(1, 2) @ keys).flip(-1).clamp(min=0)
    count = min(count, keys.shape[1])
    values = F.pad(values, (0, max(count - values.shape[1], 0)))[:, :count]  # a graph of N patches has N eigenvalues
    return F.normalize(F.normalize(values, dim=-1), p=1, dim=-1)


def matched(distance: Tensor) -> list[tuple[int, int]]:
    """The assignment (H, H) whose distances add up to most, as pairs of rows and columns."""
    solve = extra_package("scipy.optimize", "vfm").linear_sum_assignment
    rows, columns = solve((1 - distance).float().cpu().numpy())  # the authors' costs
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def attend_joined(
    keys: Tensor, factor: tuple[Tensor, Tensor], values: Tensor, weight: Tensor, gaussians: tuple[Tensor, Tensor]
) -> Tensor:
    """softmax of CLIP's graph joined by DINO's and the Gaussian, times the values; some rows at a time.

    Args:
        keys: (N, d), scaled so that the graph is keys keysᵀ.
        factor: U (N, r) and singular values (r) of DINO's graph.
        values: (N, d).
        weight: of DINO's graph.
        gaussians: along rows and columns of the grid, (h, h) and (w, w).

    Returns:
        (N, d).
    """
    vectors, sizes = factor
    count, columns = len(keys), len(gaussians[1])
    chunks = [slice(first, first + step) for step in [max(ROW_NUMBERS // count, 1)] for first in range(0, count, step)]

    def rows(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.arange(count, device=keys.device)[part]
        theirs = (vectors[part] * sizes) @ vectors.T
        theirs[torch.arange(len(at), device=at.device), at] = 0
        return keys[part] @ keys.T, theirs, at

    bounds = torch.stack([torch.stack([*ours.aminmax(), *theirs.aminmax()]) for ours, theirs, _ in map(rows, chunks)])
    (low, their_low), (high, their_high) = bounds[:, ::2].amin(0), bounds[:, 1::2].amax(0)
    spread = (their_high - their_low).clamp(min=torch.finfo(values.dtype).tiny)
    out = torch.empty_like(values)
    for part in chunks:
        ours, theirs, at = rows(part)
        theirs = (theirs - their_low) / spread * (high - low) + low
        scores = (weight * theirs + ours) / (weight + 1)
        near = gaussians[0][at // columns][:, :, None] * gaussians[1][at % columns][:, None]  # (n, h, w)
        out[part] = (scores + near.flatten(1)).softmax(dim=-1) @ values
    return out
