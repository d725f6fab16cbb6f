"""Dense, text-aligned patch features from a ViT: size rules, position tables and the last block as a recipe.

Pure functions, no state. Shapes: B images, N = h * w patches, 1 + N tokens (class token first), C channels,
H heads of d channels. A *recipe* is a sum of attention maps, each applied to the last block's values; every
purely CLIP-based method that changes only the last block's attention is one choice of its numbers
("Training-Free Open-Vocabulary Semantic Segmentation", arXiv 2505.22209, gives the survey of them).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .reach_spar import WindowReach

POSITION_RULES = ("size", "offset", "antialias", "bilinear")
SIZE_RULES = ("floor", "pad", "stretch")
SCORES = ("identity", "qk", "qq", "kk", "vv")

# `_attend_in_rows`: from how many keys on it pays, and the rows of scores it holds at once (2 MB at 4,096 keys).
MIN_KEYS_IN_ROWS, ROWS = 512, 256


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raises the `ValueError` that every named choice shares: what came and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}.")


# ---------------------------------------------------------------------------------------------- sizes


def fit_to_patches(pixel_values: torch.Tensor, patch_px: int, rule: str) -> tuple[torch.Tensor, tuple[int, int]]:
    """Makes an image fit the patch grid.

    Args:
        pixel_values: (B, 3, H, W).
        patch_px: side of a patch.
        rule: `floor` leaves the pixels alone (the patch convolution drops the remainder; SPAR's CLIP), `pad` adds
            zeros at the right and the bottom (SPAR's SigLIP2), `stretch` resizes bicubically to the next multiple
            (SPAR's DINOv3.txt).

    Returns:
        The pixels to embed, and the (height, width) in pixels *of the image given* that the patch grid covers:
        less than the image for `floor`, more for `pad`, the image itself for `stretch`.

    Raises:
        ValueError: the image is smaller than one patch and the rule is `floor`.
    """
    height, width = pixel_values.shape[-2:]
    if rule == "floor":
        if height < patch_px or width < patch_px:
            raise ValueError(
                f"image is {height}x{width} px (height x width); both sides must be at least one patch, {patch_px} px."
                " Resize it with SparImageProcessor, or load the model with size_rule='pad'."
            )
        return pixel_values, (height // patch_px * patch_px, width // patch_px * patch_px)
    padded_hw = (math.ceil(height / patch_px) * patch_px, math.ceil(width / patch_px) * patch_px)
    if rule == "pad":
        return nn.functional.pad(pixel_values, (0, padded_hw[1] - width, 0, padded_hw[0] - height)), padded_hw
    if padded_hw != (height, width):
        pixel_values = nn.functional.interpolate(
            pixel_values.float(), size=padded_hw, mode="bicubic", align_corners=False
        ).to(pixel_values.dtype)
    return pixel_values, (height, width)


# ------------------------------------------------------------------------------------------ positions


def resize_positions(table: torch.Tensor, grid_hw: tuple[int, int], rule: str) -> torch.Tensor:
    """Resizes a square table of learned patch positions to any grid.

    Args:
        table: (n * n, C), row-major; no class token.
        grid_hw: rows and columns wanted.
        rule: `size`: bicubic to the grid (transformers' rule). `offset`: bicubic with the scale (rows + 0.1) / n
            of the old DINO code, which most training-free methods and SPAR's CLIP were run with. `antialias`:
            `size` with an antialiasing filter (GEM). `bilinear`: CLIP Surgery, CLIPer.

    Returns:
        (rows * columns, C) in the table's dtype; the table itself on its native grid.
    """
    side = math.isqrt(table.shape[0])
    rows, columns = grid_hw
    # The grid decides, not the number of tokens: 7 x 28 is not 14 x 14.
    if rows == side and columns == side:
        return table
    image = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)  # (n * n, C) -> (1, C, n, n)
    if rule == "offset":
        # The scale only sets the sampling points, (i + 0.5) * n / (rows + 0.1), here from -1 to 1 along the table. As
        # points they compile for any grid; interpolate takes a scale as a constant and compiles anew for each size.
        y, x = ((2 * torch.arange(n, device=table.device) + 1) / (n + 0.1) - 1 for n in grid_hw)
        points = torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1)  # (h, w, 2), x first
        image = nn.functional.grid_sample(
            image, points[None], mode="bicubic", padding_mode="border", align_corners=False
        )
    else:
        mode = "bilinear" if rule == "bilinear" else "bicubic"
        image = nn.functional.interpolate(
            image, size=(rows, columns), mode=mode, align_corners=False, antialias=rule == "antialias"
        )
    return image.flatten(2).squeeze(0).T.to(table.dtype)  # (1, C, h, w) -> (h * w, C)


# ------------------------------------------------------------------------------------------ attention


def block_index(block: int, num_layers: int) -> int:
    """0-based index, in a network of `num_layers` blocks, of a block counted from 1 in the methods' networks of 12."""
    return math.ceil(block * num_layers / 12) - 1


@dataclass(frozen=True)
class Term:
    """One attention map of a recipe: `weight * softmax(d^-0.5 X Yᵀ + locality)`, applied to the last block's values.

    Attributes:
        scores: which projections meet: `qk`, `qq`, `kk`, `vv`; or `identity`, the map that leaves each value alone.
        weight: factor of the map. Weights need not sum to one (SCLIP's maps are added).
        sigma_patches: adds exp(-distance² / (2 sigma²)) to the scores between patches (NACLIP); None adds nothing.
        block: whose projections, 1-based in a network of twelve blocks; scaled to other depths. 12 is the last.
        iterations: with n >= 1 and t = d^-0.5 times the image's mean length of a normalised token, X goes n times
            through X <- softmax(t X Xᵀ) X, at unit length before each turn and after the last one, and the map is
            softmax(t X Xᵀ) (GEM, CVPR 2024, section 3.2).
    """

    scores: str
    weight: float = 1.0
    sigma_patches: float | None = None
    block: int = 12
    iterations: int = 0

    def __post_init__(self) -> None:
        one_of("recipe term's scores", self.scores, SCORES)
        if self.sigma_patches is not None and not self.sigma_patches > 0:
            raise ValueError(f"sigma_patches is {self.sigma_patches}; it must be positive, or None for no locality.")
        if not 1 <= self.block <= 12:
            raise ValueError(f"recipe term's block is {self.block}; it must be 1 to 12 (12 is the last block).")
        if self.iterations < 0 or (self.iterations and self.scores not in ("qq", "kk", "vv")):
            raise ValueError(
                f"recipe term's iterations is {self.iterations} with scores {self.scores!r}; it must be 0, or at "
                "least 1 with qq, kk or vv."
            )

    def index(self, num_layers: int) -> int:
        """0-based index of the term's block in a network of `num_layers` blocks."""
        return block_index(self.block, num_layers)


@dataclass(frozen=True)
class Recipe:
    """How the patches leave the last block: `[x +] out_proj(sum of terms) [+ mlp]`.

    Attributes:
        terms: the attention maps that are summed.
        residual: keep the block's input.
        feed_forward: run the block's MLP on the result.
        blocks: with n > 1, a second path starts at the input of the n-th last block and collects out_proj(sum of
            terms) of each block from there, while the usual path goes on unchanged (CLIP Surgery).
    """

    terms: tuple[Term, ...]
    residual: bool = True
    feed_forward: bool = True
    blocks: int = 1

    def __post_init__(self) -> None:
        terms = tuple(term if isinstance(term, Term) else Term(**term) for term in self.terms)
        object.__setattr__(self, "terms", terms)
        if not terms:
            raise ValueError("recipe has no terms; give at least one, such as {'scores': 'identity'}.")
        if self.blocks < 1:
            raise ValueError(f"recipe's blocks is {self.blocks}; it must be at least 1.")
        if self.blocks > 1 and (self.feed_forward or any(term.block != 12 for term in terms)):
            raise ValueError("a recipe over several blocks takes feed_forward=False and terms of its own block only.")

    def to_dict(self) -> dict:
        """JSON form, for a configuration."""
        return {**asdict(self), "terms": [asdict(term) for term in self.terms]}


def locality_bias(grid_hw: tuple[int, int], sigma_patches: float, like: torch.Tensor) -> torch.Tensor:
    """(N, 1 + N) Gaussian of the distance between patches, zero towards the class token (NACLIP, WACV 2025)."""

    def along(length: int) -> torch.Tensor:
        position = torch.arange(length, device=like.device, dtype=torch.float32)
        return torch.exp(-((position[:, None] - position[None, :]) ** 2) / (2 * sigma_patches**2))

    rows, columns = grid_hw
    # A Gaussian of a distance is the product of one along the rows and one along the columns.
    bias = torch.einsum("yv,xu->yxvu", along(rows), along(columns)).reshape(rows * columns, rows * columns)
    return nn.functional.pad(bias, (1, 0)).to(like.dtype)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    reach: WindowReach | None = None,
) -> torch.Tensor:
    """softmax(d^-0.5 query keyᵀ + bias) value, without an N x N matrix: (B, H, M, d), (B, H, N, d) -> (B, H, M, d).

    `reach` adds its own bias; None reaches everything.
    """
    if reach is not None and bias is None:
        return reach.attend(query, key, value)
    bias = _with_reach(bias, reach, query, key)
    in_rows = query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] >= MIN_KEYS_IN_ROWS
    if in_rows and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _attend_in_rows(query, key, value, bias)
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def _attend_in_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`attend` for bf16 on a CPU: plain products over some rows of one head at a time, in one reused buffer.

    PyTorch's fused attention gains little from bf16 on a CPU without matrix tiles; its plain bf16 products do, if the
    buffer stays in the cache. benchmarks/speed.py has the whole pass in both types.
    """
    out = query.new_empty(query.shape)
    buffer = query.new_empty(ROWS, key.shape[2])
    scale = query.shape[-1] ** -0.5
    for image in range(query.shape[0]):
        for head in range(query.shape[1]):
            keys = key[image, head].T.contiguous()  # (d, N)
            for first in range(0, query.shape[2], ROWS):
                rows = slice(first, first + ROWS)
                scores = buffer[: min(ROWS, query.shape[2] - first)]
                torch.mm(query[image, head, rows] * scale, keys, out=scores)
                if bias is not None:
                    scores += bias[rows]
                torch.softmax(scores, -1, out=scores)
                torch.mm(scores, value[image, head], out=out[image, head, rows])
    return out


def _with_reach(
    bias: torch.Tensor | None, reach: WindowReach | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    if reach is None:
        return bias
    ours = reach.bias(query.shape[2], key.shape[2]).to(query.dtype)
    return ours if bias is None else bias + ours


def attention_map(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None = None, reach: WindowReach | None = None
) -> torch.Tensor:
    """softmax(d^-0.5 query keyᵀ + bias) itself, (B, H, M, N): only for those who ask to see it."""
    bias = _with_reach(bias, reach, query, key)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(dim=-1, dtype=torch.float32).to(query.dtype)


def split_heads(tokens: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(B, N, C) -> (B, H, N, d)."""
    return tokens.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(heads: torch.Tensor) -> torch.Tensor:
    """(B, H, N, d) -> (B, N, C)."""
    return heads.transpose(1, 2).flatten(2)


def project_heads(attention: Any, tokens: torch.Tensor, names: str) -> dict[str, torch.Tensor]:
    """The projections of an attention module that `names` spells ("q", "kv", ...), each (B, H, N, d)."""
    projections = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
    return {name: split_heads(projections[name](tokens), attention.head_dim) for name in sorted(set(names))}


def mean_length(tokens: torch.Tensor) -> torch.Tensor:
    """Mean L2 norm of an image's tokens, (B, N, C) -> (B, 1, 1, 1)."""
    return tokens.norm(dim=-1).mean(dim=1).view(-1, 1, 1, 1)


def _operands(
    term: Term, projected: dict[str, torch.Tensor], grid_hw: tuple[int, int], reach: WindowReach | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Patch queries (B, H, N, d), keys (B, H, 1 + N, d) and bias (N, 1 + N) or None of a term's map."""
    query, key = projected[term.scores[0]], projected[term.scores[1]]
    if term.iterations:
        key = nn.functional.normalize(key, dim=-1)
        for _ in range(term.iterations):
            # The scores' d^-0.5 is attend's; the rest of the temperature goes with the query.
            key = nn.functional.normalize(attend(key * projected["length"], key, key, reach=reach), dim=-1)
        query = key * projected["length"]
    query = query[:, :, 1:]
    return query, key, None if term.sigma_patches is None else locality_bias(grid_hw, term.sigma_patches, query)


def mix_patches(
    terms: tuple[Term, ...],
    heads: list[dict[str, torch.Tensor]],
    values: torch.Tensor,
    grid_hw: tuple[int, int],
    reach: WindowReach | None = None,
) -> torch.Tensor:
    """Sum over terms of attention map times values, for the patches.

    Args:
        terms: the recipe's terms.
        heads: for each term the projections of its block by name, each (B, H, 1 + N, d); for a term with iterations
            also `length` (B, 1, 1, 1), see `mean_length`.
        values: the last block's values, (B, H, 1 + N, d).
        grid_hw: rows and columns of patches.
        reach: how far the maps reach; None is everywhere.

    Returns:
        (B, H, N, d).
    """
    mixed = torch.zeros_like(values[:, :, 1:])
    for term, projected in zip(terms, heads, strict=True):
        if term.scores == "identity":
            part = values[:, :, 1:]
        else:
            query, key, bias = _operands(term, projected, grid_hw, reach)
            part = attend(query, key, values, bias, reach)
        mixed = torch.add(mixed, part, alpha=term.weight)
    return mixed


def mix_maps(
    terms: tuple[Term, ...],
    heads: list[dict[str, torch.Tensor]],
    like: torch.Tensor,
    grid_hw: tuple[int, int],
    reach: WindowReach | None = None,
) -> torch.Tensor:
    """The map that `mix_patches` applies, written out: (B, H, N, 1 + N). `like` is any (B, H, 1 + N, d) tensor."""
    batch, num_heads, tokens, _ = like.shape
    total = like.new_zeros(batch, num_heads, tokens - 1, tokens)
    for term, projected in zip(terms, heads, strict=True):
        if term.scores == "identity":
            part = torch.eye(tokens, dtype=like.dtype, device=like.device)[1:]
        else:
            part = attention_map(*_operands(term, projected, grid_hw, reach), reach)
        total = total + term.weight * part
    return total


def class_token_attention(
    attention: Any, tokens: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The class token's own attention over all tokens, at the cost of one query.

    q·(W x + b) = (Wᵀ q)·x + q·b: folding the key weights into the single query needs no key for any patch, and the
    key bias shifts all scores of a head alike, which the softmax ignores.

    Args:
        attention: module with q_proj, k_proj, head_dim.
        tokens: (B, 1 + N, C), the block's normalised input.
        values: (B, H, 1 + N, d).

    Returns:
        The attended values (B, H, 1, d) and the map (B, H, 1, 1 + N).
    """
    query = split_heads(attention.q_proj(tokens[:, :1]), attention.head_dim)  # (B, H, 1, d)
    key_weight = attention.k_proj.weight.unflatten(0, (-1, attention.head_dim))  # (C, C) -> (H, d, C)
    folded = torch.einsum("bhqd,hdc->bhqc", query, key_weight).squeeze(2)  # (B, H, C)
    scores = folded @ tokens.transpose(1, 2) * attention.head_dim**-0.5  # (B, H, 1 + N)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype).unsqueeze(2)
    return weights @ values, weights
