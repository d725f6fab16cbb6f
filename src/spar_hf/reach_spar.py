"""How far attention reaches: over the whole image, or each patch as far as the native windows that hold it."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

REACHES = ("image", "window")


class Tile(NamedTuple):
    """A rectangle of querying patches and the larger one of the patches they reach, as slices of rows and columns."""

    rows: slice
    columns: slice
    key_rows: slice
    key_columns: slice
    bias: torch.Tensor  # (patches of the tile, patches reached)


class WindowReach:
    """The mean window: how much of the sliding windows around a patch hold another patch too.

    A network that learned on n x n patches and is run on more of them spreads its attention over an area it never
    saw. Slid over the image patch by patch, its native window holds patches i and k together in some of its places:
    the share s(i, k) of those that hold i. Here attention reaches in one pass what it reaches in the mean of those
    places: the weight of k is multiplied by s(i, k) before the soft-max is normalised, which is log s(i, k) added to
    the score. The share is a product of one along the rows and one along the columns, falls about linearly with the
    distance and is zero from n patches on. No number is chosen, and an image of the native size or less is left
    alone. Tokens that are no patches (class token, registers) reach and are reached by all.

    Beyond SPAR, whose student attends over the whole image. Near kin: NACLIP's Gaussian in the last block (WACV 2025).

    Args:
        grid_hw: rows and columns of patches.
        window: side of the native window in patches.
        device: of the tokens.
    """

    def __init__(self, grid_hw: tuple[int, int], window: int, device: torch.device) -> None:
        self.grid_hw, self.window = grid_hw, window
        # log s along the rows (h, h) and along the columns (w, w); -inf where no window holds both.
        self.log_shares = tuple(_log_share(length, window, device) for length in grid_hw)

    @cached_property
    def tiles(self) -> list[list[Tile]]:
        """The grid in squares of the window's side, by row."""
        down, across = self.log_shares
        rows, columns = (_stretches(length, self.window) for length in self.grid_hw)
        return [
            [
                Tile(y, x, near_y, near_x, _outer_sum(down[y, near_y], across[x, near_x]))
                for x, near_x in columns
            ]
            for y, near_y in rows
        ]  # fmt: skip

    def bias(self, queries: int, keys: int) -> torch.Tensor:
        """log s between all tokens, (queries, keys): a whole matrix.

        Args:
            queries, keys: numbers of tokens; what they exceed the patches by are other tokens, which come first.
        """
        patches = _outer_sum(*self.log_shares)
        return nn.functional.pad(patches, (keys - patches.shape[1], 0, queries - patches.shape[0], 0))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """softmax(d^-0.5 query keyᵀ + log s) value, a tile at a time: cost and memory grow with the patches only.

        Args:
            query: (B, H, P + N, d), P tokens that are no patches first, P may be 0.
            key, value: (B, H, P' + N, d), likewise.

        Returns:
            (B, H, P + N, d).
        """
        attention = nn.functional.scaled_dot_product_attention
        count = self.grid_hw[0] * self.grid_hw[1]
        others, key_others = query.shape[2] - count, key.shape[2] - count
        if torch.compiler.is_compiling():  # a loop over tiles would be compiled anew for each size
            return attention(query, key, value, attn_mask=self.bias(query.shape[2], key.shape[2]).to(query))
        query_grid, key_grid, value_grid = (
            tokens[:, :, extra:].unflatten(2, self.grid_hw)  # (B, H, N, d) -> (B, H, h, w, d)
            for tokens, extra in ((query, others), (key, key_others), (value, key_others))
        )

        def reached(tokens: torch.Tensor, grid: torch.Tensor, tile: Tile) -> torch.Tensor:
            patches = grid[:, :, tile.key_rows, tile.key_columns].flatten(2, 3)
            return torch.cat([tokens[:, :, :key_others], patches], dim=2) if key_others else patches

        def mixed(tile: Tile) -> torch.Tensor:
            patches = query_grid[:, :, tile.rows, tile.columns]
            out = attention(
                patches.flatten(2, 3),
                reached(key, key_grid, tile),
                reached(value, value_grid, tile),
                attn_mask=nn.functional.pad(tile.bias, (key_others, 0)).to(query),
            )
            return out.unflatten(2, patches.shape[2:4])

        rows = [torch.cat([mixed(tile) for tile in row], dim=3) for row in self.tiles]
        out = torch.cat(rows, dim=2).flatten(2, 3)  # (B, H, h, w, d) -> (B, H, N, d)
        return torch.cat([attention(query[:, :, :others], key, value), out], dim=2) if others else out


def _log_share(length: int, window: int, device: torch.device) -> torch.Tensor:
    """log of the share of the windows over patch i that are over patch k too, along one side: (length, length)."""
    last = torch.sym_max(length - window, 0)  # windows begin at 0 .. last; a shorter side is taken whole
    place = torch.arange(length, device=device)
    # Windows over both: from the first that reaches the farther patch to the last that begins at the nearer.
    nearer, farther = torch.minimum(place[:, None], place), torch.maximum(place[:, None], place)
    both = nearer.clamp(max=last) - (farther - window + 1).clamp(min=0) + 1
    both = both.clamp(min=0).float()
    return (both / both.diagonal()[:, None]).log()


def _outer_sum(down: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """(rows, key rows) and (columns, key columns) -> (rows * columns, key rows * key columns)."""
    total = down[:, None, :, None] + across[None, :, None, :]
    return total.flatten(2, 3).flatten(0, 1)


def _stretches(length: int, window: int) -> list[tuple[slice, slice]]:
    """A side in stretches of the window's length, and what each reaches."""
    stretches = []
    for first in range(0, length, window):
        end = min(first + window, length)
        stretches.append((slice(first, end), slice(max(first - window + 1, 0), min(end + window - 1, length))))
    return stretches
