"""SC-CLIP: outlier patches are repaired, and mid-level similarity of patches steers the last block.

Paper: "Self-Calibrated CLIP for Training-Free Open-Vocabulary Segmentation", Bai et al., arXiv 2411.15869.
Changes, blocks counted from 1 in a network of twelve:
1. Patches of the last block's input that a local outlier factor singles out become the mean of their neighbours in
   the 3 x 3 around them that are none.
2. The last block's input is averaged over patches by the cosine S of block 9's output (repaired likewise), where
   S >= 0.4.
3. The last block: half softmax(3 (S - mean S)) over the keys with S >= mean S, shared by the heads, half
   softmax(d^-0.5 K Kᵀ); over patches only, without residual and MLP; plus 0.3 times the class token of its input.
4. The sum of the outputs of blocks 4 to 10 goes through 3. as well (class token: the sum's). Both results are averaged
   over patches by the cosine of block 4's output, where it is at least 0.4, and added.
As the authors' code: the outlier factor takes squared distances and each patch's own distance to its 30th neighbour
for its reach, where the textbook's takes the larger of two, so scikit-learn's has other values; the outliers are those
above the 95 % quantile. (Another public version of it takes the ten longest patches.) The cosines' matrices go by
rows; none is held.
Deviations: statistics are each image's own (theirs mixes a batch and takes one image); rows and columns are kept apart
(theirs swaps them on grids that are not square); fewer than 31 patches have fewer neighbours; other depths take the
blocks in proportion, each once, and never the last one. Similarities and outliers are fp32 whatever the network is.
To reach: the numbers in `spar_hf.published`, with CLIP ViT-B/16, no post-processing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..dense_spar import attend, merge_heads, project_heads
from ..encoder_spar import SparVisionOutput
from ..methods_spar import block_index
from ..reach_spar import WindowReach
from .encoder import ROW_NUMBERS, MethodEncoder, above_mean, attend_by_similarity, mean_similarity


@dataclass(frozen=True)
class Settings:
    """SC-CLIP's constants (sections 3.2 to 3.4 and the authors' code).

    Attributes:
        neighbours: of the local outlier factor.
        outlier_fraction: of an image's patches, the most outlying ones, that are repaired.
        threshold: cosine from which on patches are averaged.
        sharpness: factor on similarities before the soft-max.
        class_token_weight: of the class token that is added to each patch.
    """

    neighbours: int = 30
    outlier_fraction: float = 0.05
    threshold: float = 0.4
    sharpness: float = 3.0
    class_token_weight: float = 0.3


def outlier_factor(patches: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Mean density of a patch's nearest neighbours over its own, (B, N, C) -> (B, N).

    Density is one over the squared distance to the `neighbours`-th neighbour.
    """
    # Distances do not mind a shift, and around zero the products lose fewer digits.
    centred = patches.float() - patches.float().mean(dim=1, keepdim=True)
    batch, count, _ = centred.shape
    squares = centred.square().sum(dim=-1)
    neighbours = min(neighbours, count - 1)
    indices, reach = [], []
    step = max(ROW_NUMBERS // (batch * count), 1)
    for first in range(0, count, step):
        rows = slice(first, first + step)
        distance = torch.baddbmm(squares[:, None], centred[:, rows], centred.transpose(1, 2), alpha=-2)
        distance += squares[:, rows, None]
        distance.clamp_(min=torch.finfo(torch.float32).tiny)
        distance.diagonal(first, 1, 2).zero_()  # itself, always nearest
        nearest, index = distance.topk(neighbours + 1, largest=False)
        reach.append(nearest[..., -1])
        indices.append(index[..., 1:])
    density = 1 / torch.cat(reach, dim=1)
    around = density[:, None].expand(-1, count, -1).gather(2, torch.cat(indices, dim=1))  # (B, N, neighbours)
    return around.mean(dim=-1) / density


def repair(patches: torch.Tensor, outliers: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
    """Gives outliers the mean of the up to eight patches around them that are none; those without any stay.

    Args:
        patches: (B, N, C).
        outliers: (B, N), true for an outlier.
        grid_hw: rows and columns.
    """
    sound = (~outliers).unsqueeze(-1).to(patches.dtype)
    image = torch.cat([patches * sound, sound], dim=-1).transpose(1, 2).unflatten(2, grid_hw)  # (B, C + 1, h, w)
    # Nine times the mean over 3 x 3 is the sum; an outlier itself adds nothing to it.
    around = 9 * nn.functional.avg_pool2d(image, 3, stride=1, padding=1)
    total, count = around.flatten(2).transpose(1, 2).split([patches.shape[-1], 1], dim=-1)
    return torch.where(outliers.unsqueeze(-1) & (count > 0.5), total / count.clamp(min=1), patches)


def row_fractions(threshold: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Similarities from the threshold up, each row divided by its sum."""

    def weigh(cosines: torch.Tensor) -> torch.Tensor:
        cosines.masked_fill_(cosines < threshold, 0)
        return cosines.div_(cosines.sum(dim=-1, keepdim=True) + 1e-6)

    return weigh


class Encoder(MethodEncoder):
    """SC-CLIP around a CLIP vision tower; see the head of the file."""

    settings: Settings

    def prepare(self) -> None:
        num_layers = len(self.vision.blocks)
        first, late, end = (min(block_index(block, num_layers), num_layers - 2) for block in (4, 9, 10))  # 0-based
        self.first, self.late, self.summed = first, late, range(first, end + 1)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D)."""
        x, grid_hw, extent_hw = self.embed(pixel_values)
        outputs = []
        reach = self.vision.reach(grid_hw, x.device)
        for layer in self.vision.blocks[:-1]:
            x = layer(x, reach=reach)
            outputs.append(x)
        outliers = outlier_factor(x[:, 1:], self.settings.neighbours)
        # Two patches that are each other's farthest tie; rounding shall not make one of them an outlier.
        outliers = outliers > outliers.quantile(1 - self.settings.outlier_fraction, dim=1, keepdim=True) * (1 + 1e-5)

        late = unit(repair(outputs[self.late][:, 1:], outliers, grid_hw))
        fractions = row_fractions(self.settings.threshold)
        patches = attend_by_similarity(late, repair(x[:, 1:], outliers, grid_hw), fractions)
        many = torch.zeros_like(x)
        for index in self.summed:
            many += outputs[index]

        # The two paths meet here already: all that follows their soft-maxes is linear.
        class_tokens = self.settings.class_token_weight * (x[:, :1] + many[:, :1])
        attended = self.attend([patches, many[:, 1:]], late, reach) + class_tokens
        patches = attend_by_similarity(unit(outputs[self.first][:, 1:]), attended, fractions)
        return self.output(patches, x, grid_hw, extent_hw, pixel_values)

    def attend(self, paths: list[torch.Tensor], late: torch.Tensor, reach: WindowReach | None) -> torch.Tensor:
        """Sum over the paths of the last block's projected attention, patches only, (B, N, C)."""
        layer = self.last_layer
        heads = [project_heads(layer.self_attn, layer.layer_norm1(path), "kv") for path in paths]
        mixed = torch.zeros_like(paths[0])
        for each in heads:
            mixed += merge_heads(each["v"])
        mixed = attend_by_similarity(late, mixed, above_mean(mean_similarity(late), self.settings.sharpness))
        for each in heads:
            mixed += merge_heads(attend(each["k"], each["k"], each["v"], reach=reach))
        return layer.self_attn.out_proj(mixed / 2) + (len(paths) - 1) * layer.self_attn.out_proj.bias  # once a path


def unit(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens at length one, in fp32."""
    return nn.functional.normalize(tokens.float(), dim=-1)
