"""How far attention reaches: over the whole image, or each patch as far as the native windows that hold it."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from .grid_spar import Part

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
        self.log_shares = tuple(_log_share(length, window, torch.arange(length, device=device)) for length in grid_hw)

    @property
    def own(self) -> tuple[slice, slice]:
        """Rows and columns of the patches that attend."""
        return slice(0, self.grid_hw[0]), slice(0, self.grid_hw[1])

    def asking(self, tokens: torch.Tensor) -> torch.Tensor:
        """Those of (B, P + N, C) that attend."""
        return tokens

    @cached_property
    def tiles(self) -> list[list[Tile]]:
        """The grid in squares of the window's side, by row."""
        down, across = self.log_shares
        rows, columns = (
            _stretches(own, length, self.window) for own, length in zip(self.own, self.grid_hw, strict=True)
        )
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
            (B, H, P + N, d); of a part of a larger picture, for the patches of its own.
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
        return torch.cat([self.from_others(query[:, :, :others], key, value), out], dim=2) if others else out

    def from_others(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """What the tokens that are no patches attend to: everything."""
        return nn.functional.scaled_dot_product_attention(query, key, value)


class PartReach(WindowReach):
    """`WindowReach` of some patches of a larger picture, which need not fit in memory as a whole.

    Shares are those of the larger picture's windows. A patch attends n - 1 patches far, so with as many around the
    patches of its own this is exact. The tokens that are no patches attend to the whole picture: `pool` adds that up
    over its parts, and what they attend to is right once all of them are in.

    Args:
        grid_hw, window, device: as in `WindowReach`, of the patches given.
        part: where they lie.
    """

    def __init__(self, grid_hw: tuple[int, int], window: int, device: torch.device, part: Part) -> None:
        self.grid_hw, self.window, self.part = grid_hw, window, part
        self.log_shares = tuple(
            _log_share(whole, window, torch.arange(start, start + length, device=device))
            for whole, start, length in zip(part.whole_hw, part.start, grid_hw, strict=True)
        )

    @property
    def own(self) -> tuple[slice, slice]:
        return self.part.own

    def asking(self, tokens: torch.Tensor) -> torch.Tensor:
        others = tokens.shape[1] - self.grid_hw[0] * self.grid_hw[1]
        own = tokens[:, others:].unflatten(1, self.grid_hw)[:, self.own[0], self.own[1]].flatten(1, 2)
        return torch.cat([tokens[:, :others], own], dim=1) if others else own

    def from_others(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.part.pool is None:
            return super().from_others(query, key, value)
        others = key.shape[2] - self.grid_hw[0] * self.grid_hw[1]
        first = self.part.pool.maximum is None  # those that are no patches are in every part, and count once

        def counted(tokens: torch.Tensor) -> torch.Tensor:
            patches = tokens[:, :, others:].unflatten(2, self.grid_hw)[:, :, self.own[0], self.own[1]].flatten(2, 3)
            return torch.cat([tokens[:, :, :others], patches], dim=2) if first else patches

        return self.part.pool.add(query, counted(key), counted(value))


class Pool:
    """Attention of a few tokens to keys that come in parts: a soft-max whose sums grow, fp32.

    Attributes:
        maximum: the highest score yet, (B, H, P, 1); None before the first part.
        total: the sum of exp(score - maximum), likewise.
        weighted: the sum of exp(score - maximum) value, (B, H, P, d).
    """

    def __init__(self, maximum=None, total=None, weighted=None) -> None:  # type: ignore[no-untyped-def]
        self.maximum: torch.Tensor | None = maximum
        self.total: torch.Tensor = total
        self.weighted: torch.Tensor = weighted

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Takes in some keys and values (B, H, N, d); returns what (B, H, P, d) attend to of all that came."""
        scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
        maximum = scores.amax(dim=-1, keepdim=True)
        if self.maximum is not None:
            maximum = torch.maximum(maximum, self.maximum)
        weights = (scores - maximum).exp()
        total, weighted = weights.sum(dim=-1, keepdim=True), weights @ value.float()
        if self.maximum is not None:
            before = (self.maximum - maximum).exp()
            total, weighted = total + before * self.total, weighted + before * self.weighted
        self.maximum, self.total, self.weighted = maximum, total, weighted
        return (weighted / total).to(value.dtype)


def asking(tokens: torch.Tensor, reach: WindowReach | None) -> torch.Tensor:
    """The tokens (B, P + N, C) that attend, to which what they attended to is added."""
    return tokens if reach is None else reach.asking(tokens)


def _log_share(length: int, window: int, place: torch.Tensor) -> torch.Tensor:
    """log of the share of the windows over patch i that are over patch k too, of the patches at `place`: (m, m).

    Args:
        length: patches along this side of the whole picture.
        window: patches of the window.
        place: numbers of the patches asked about (m).
    """
    last = torch.sym_max(length - window, 0)  # windows begin at 0 .. last; a shorter side is taken whole
    # Windows over both: from the first that reaches the farther patch to the last that begins at the nearer.
    nearer, farther = torch.minimum(place[:, None], place), torch.maximum(place[:, None], place)
    both = nearer.clamp(max=last) - (farther - window + 1).clamp(min=0) + 1
    both = both.clamp(min=0).float()
    return (both / both.diagonal()[:, None]).log()


def _outer_sum(down: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """(rows, key rows) and (columns, key columns) -> (rows * columns, key rows * key columns)."""
    total = down[:, None, :, None] + across[None, :, None, :]
    return total.flatten(2, 3).flatten(0, 1)


def _stretches(own: slice, length: int, window: int) -> list[tuple[slice, slice]]:
    """Some of the patches of a side in stretches of the window's length, and what each reaches."""
    stretches = []
    for first in range(own.start, own.stop, window):
        end = min(first + window, own.stop)
        stretches.append((slice(first, end), slice(max(first - window + 1, 0), min(end + window - 1, length))))
    return stretches
