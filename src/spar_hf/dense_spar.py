"""Attention over patches: fused, by rows, within reach; and the last block as a recipe of `methods_spar`.

Pure functions, no state. Shapes: B images, N = h * w patches, 1 + N tokens (class token first), C channels,
H heads of d channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .methods_spar import Term
from .reach_spar import WindowReach

# `_attend_in_rows`: from how many keys on it pays, and the rows of scores it holds at once (2 MB at 4,096 keys).
MIN_KEYS_IN_ROWS, ROWS = 512, 256


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
    ours = reach.bias(query.shape[2], key.shape[2]).to(query)
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
    attention: Any, tokens: torch.Tensor, values: torch.Tensor, keys: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The class token's own attention over all tokens, at the cost of one query.

    Args:
        attention: module with q_proj, k_proj, head_dim.
        tokens: (B, 1 + N, C), the block's normalised input.
        values: (B, H, 1 + N, d).
        keys: (B, H, 1 + N, d), where the caller has them. Making them costs under 1 % of a ViT-B pass; folding the
            key weights into the query would spare it, but read weights that adapters and quantisation replace.

    Returns:
        The attended values (B, H, 1, d) and the map (B, H, 1, 1 + N).
    """
    query = split_heads(attention.q_proj(tokens[:, :1]), attention.head_dim)  # (B, H, 1, d)
    if keys is None:
        keys = split_heads(attention.k_proj(tokens), attention.head_dim)
    weights = attention_map(query, keys)
    return weights @ values, weights
