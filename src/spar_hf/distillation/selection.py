"""What trains: `last:2`, `all`, `positions`, `patch-embed`, joined by commas. Works on the names of any ViT."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

BLOCK = re.compile(r"(?:^|\.)layers?\.(\d+)\.")  # encoder.layers.3. (CLIP, SigLIP), layer.3. (DINOv3, RADIO)
PARTS = {"positions": ("position_embedding",), "patch-embed": ("patch_embedding", "patch_projection")}  # RADIO's


def block_of(name: str) -> int | None:
    """0-based block that a parameter belongs to; None for one outside the blocks."""
    found = BLOCK.search(name)
    return int(found[1]) if found else None


def select_parameters(names: Iterable[str], selection: str) -> set[str]:
    """Names of the parameters that train.

    Args:
        names: all parameters of the vision tower.
        selection: `all`, `last:N` (the last N blocks; SPAR trains `last:2`), `positions`, `patch-embed`, or several
            of them joined by commas.

    Raises:
        ValueError: an unknown or empty part; the message lists what exists in this network.
    """
    blocks = {name: block_of(name) for name in names}
    num_blocks = 1 + max((block for block in blocks.values() if block is not None), default=-1)
    existing = {"all": set(blocks)}
    existing |= {part: {name for name in blocks if any(key in name for key in keys)} for part, keys in PARTS.items()}
    for count in range(1, num_blocks + 1):
        first = num_blocks - count
        existing[f"last:{count}"] = {name for name, block in blocks.items() if block is not None and block >= first}
    existing = {part: found for part, found in existing.items() if found}
    chosen: set[str] = set()
    for part in selection.split(","):
        if part.strip() not in existing:
            listed = [name for name in existing if not name.startswith("last:")]
            raise ValueError(
                f"--train is {selection!r}: this network has no part {part.strip()!r}; choose of "
                f"{', '.join(listed)}, last:1 to last:{num_blocks}, joined by commas."
            )
        chosen |= existing[part.strip()]
    return chosen


def set_trainable(network: nn.Module, selection: str, probe: Callable[[], torch.Tensor]) -> list[str]:
    """Lets the selected parameters train and freezes all others.

    A selected parameter that the loss does not depend on (q and k of a MaskCLIP last block) is frozen too: its
    gradient is zero, so only weight decay would change it.

    Args:
        network: the vision tower.
        selection: see `select_parameters`.
        probe: runs the network on any image and returns its patch features.

    Returns:
        Names of the selected parameters that were frozen because the loss does not depend on them.
    """
    chosen = select_parameters((name for name, _ in network.named_parameters()), selection)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in chosen)
    probe().float().square().sum().backward()
    unreached = [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    for name, parameter in network.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(parameter.requires_grad and name not in unreached)
    return unreached


def first_trained_block(network: nn.Module) -> int:
    """0-based index of the first block that trains: what lies before it is the frozen trunk.

    Raises:
        ValueError: something before the blocks trains, so there is no frozen trunk.
    """
    trained = [(name, block_of(name)) for name, p in network.named_parameters() if p.requires_grad]
    early = [name for name, block in trained if block is None]
    if early:
        raise ValueError(
            f"a trunk cache needs a frozen trunk, but {early[0]} trains. Choose --train last:N, or leave out --trunk."
        )
    return min(block for _, block in trained if block is not None)
