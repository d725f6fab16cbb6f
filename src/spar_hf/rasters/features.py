"""The features of every patch of a raster, block by block, in a file: as one pass over the whole would give them.

A tower whose attention is within reach runs one of its blocks at a time over the whole raster. What a patch attends to
in that one block lies at most n - 1 patches away (n: side of the native window in patches), so that much is read
around each block of patches and nothing is approximated: positions and shares are those of the whole raster, and the
class token, which attends to everything, adds up over all blocks before the next step begins. A halo for all of the
network at once would have to be as many times as wide, and could give the class token no more than a guess.

A sliding window needs one step: the windows over a block's patches are the windows of the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arithmetic_spar import HALF, fast_half, products
from ..encoder_spar import DenseVisionModel
from ..encoders.sliding_window import SlidingWindow
from ..files import read_state, write_state
from ..grid_spar import Part, part_of
from ..reach_spar import Pool
from .blocks import Block, Grid, Surroundings, cut
from .store import GridFile, grid_file

RECORD_S = 20.0  # seconds between two records, each of which waits for the disk
STATE = "state.safetensors"
Progress = Callable[[int, int], None]  # blocks that are done, and all of them


@dataclass(frozen=True)
class Features:
    """A file of one vector for each patch, (h, w, D), as a dense encoder gives them.

    Attributes:
        path, grid_hw, width, dtype: see `GridFile`.
        normalized: as `SparVisionOutput` has it.
    """

    path: Path
    grid_hw: tuple[int, int]
    width: int
    dtype: torch.dtype
    normalized: bool = False


@dataclass
class Journal:
    """How far a run is, in a file that is whole after a kill.

    Attributes:
        folder: where the run works.
        key: what the features depend on; a record of another key is of no use.
        step, blocks: steps that are done, and blocks of the next one.
        tensors: what the next block needs: prefix tokens, and the sums of the attention pools.
    """

    folder: Path
    key: str
    step: int = 0
    blocks: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    written_at: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, folder: Path, key: str) -> Journal:
        """The journal in a folder, or a new one where there is none of this key that can be read."""
        try:
            record, tensors = read_state(folder / STATE)
        except (ValueError, OSError):
            return cls(folder, key)
        if record.get("key") != key:
            return cls(folder, key)
        return cls(folder, key, record["step"], record["blocks"], tensors)

    def note(self, step: int, blocks: int, tensors: dict[str, Tensor], file: GridFile, now: bool = False) -> None:
        """Keeps it in mind, and on the disk if the last record is old or `now`."""
        self.step, self.blocks, self.tensors = step, blocks, tensors
        if now or time.monotonic() - self.written_at > RECORD_S:
            file.flush()
            write_state(self.folder / STATE, tensors, {"key": self.key, "step": step, "blocks": blocks})
            self.written_at = time.monotonic()


def tower_features(vision: DenseVisionModel, grid: Grid, journal: Journal, side: int, progress: Progress) -> Features:
    """Runs a tower whose attention is within the window's reach, one of its blocks at a time.

    Args:
        vision: the tower, `attention_reach` "window".
        grid: the raster.
        journal: where the run works, and how far it is.
        side: patches along the side of a block, surroundings included.
        progress: is told of each block.

    Raises:
        ValueError: the features hold NaN or infinity.
        OSError: the disk is full.
    """
    config = vision.config
    blocks = cut(grid.size_hw, Surroundings.of_reach(config.image_size // config.patch_size), side)
    steps, prefix_tokens = len(vision.blocks), vision.num_prefix_tokens
    dtype = torch.float32 if vision.dtype in HALF and not fast_half(vision.device, vision.dtype) else vision.dtype
    widths = [config.hidden_size] * (steps - 1) + [config.projection_dim or config.hidden_size]
    paths = [journal.folder / f"tokens-{step % 2}" for step in range(steps - 1)] + [journal.folder / "features"]

    for step in range(journal.step, steps):
        last = step == steps - 1
        with ExitStack() as files:
            target = files.enter_context(grid_file(paths[step], grid.size_hw, widths[step], dtype))
            source = None
            if step:
                source = files.enter_context(grid_file(paths[step - 1], grid.size_hw, widths[step - 1], dtype))
            state = {name: tensor.to(vision.device) for name, tensor in journal.tensors.items()}
            pool = Pool(*(state.get(name) for name in ("maximum", "total", "weighted")))
            found = state.get("found")  # the prefix tokens after this step, right after its last block
            for number in range(journal.blocks, len(blocks)):
                block = blocks[number]
                part = Part(grid.size_hw, block.start, _asked(block, last), None if last else pool)
                with torch.inference_mode(), part_of(part), products(vision.device, vision.dtype):
                    tokens = _given(vision, grid, source, block, state.get("prefix"))
                    tokens = vision.run_blocks(tokens, block.given_hw, step, stop=step + 1)[0]
                    if last:
                        vectors = vision.project(tokens)["patch_embeds"].unflatten(1, block.given_hw)
                        vectors = vectors[0][block.own_in_given]
                    else:
                        found, vectors = tokens[:, :prefix_tokens], tokens[0, prefix_tokens:]
                        vectors = vectors.unflatten(0, block.own_hw)
                target.write(block.own, _finite(vectors))
                kept = {"prefix": state.get("prefix"), "found": found, **vars(pool)}
                kept = {name: tensor for name, tensor in kept.items() if tensor is not None and tensor.numel()}
                journal.note(step, number + 1, kept, target)
                progress(step * len(blocks) + number + 1, steps * len(blocks))
            after = {} if last or found is None or not prefix_tokens else {"prefix": found}
            journal.note(step + 1, 0, after, target, now=True)
    return Features(paths[-1], grid.size_hw, widths[-1], dtype)


def _asked(block: Block, last: bool) -> tuple[slice, slice]:
    """The patches that attend: the block's own. In the last step, which may be a recipe, all, to be cut off after."""
    return (slice(0, block.given_hw[0]), slice(0, block.given_hw[1])) if last else block.own_in_given


def _given(
    vision: DenseVisionModel, grid: Grid, source: GridFile | None, block: Block, prefix: Tensor | None
) -> Tensor:
    """The tokens (1, P + N, C) that enter a step."""
    if source is None:
        return vision.embed(grid.pixels(block.given).to(vision.device, vision.dtype))[0]
    patches = source.read(block.given).to(vision.device).flatten(0, 1)[None]
    return patches if prefix is None else torch.cat([prefix.to(patches.dtype), patches], dim=1)


def _finite(vectors: Tensor) -> Tensor:
    if not torch.stack(vectors.aminmax()).isfinite().all():
        raise ValueError("the features hold NaN or infinite numbers; run the model in fp32 or bf16, not in fp16.")
    return vectors


def window_features(encoder: SlidingWindow, grid: Grid, journal: Journal, side: int, progress: Progress) -> Features:
    """Runs a sliding window; see `tower_features` for the arguments."""
    surroundings = Surroundings.of_windows(encoder.window_px, encoder.stride_px, grid.patch_px)
    blocks, path = cut(grid.size_hw, surroundings, side), journal.folder / "features"
    kept, file = journal.tensors, None
    with ExitStack() as files:
        for number in range(journal.blocks, len(blocks)):
            block = blocks[number]
            outputs = encoder(grid.pixels(block.given).to(encoder.device, encoder.dtype))
            features = outputs.patch_embeds[0]
            if file is None:
                kept = {
                    "width": torch.tensor(features.shape[-1]),
                    "normalized": torch.tensor(bool(outputs.normalized)),
                }
                file = files.enter_context(grid_file(path, grid.size_hw, features.shape[-1], torch.float32))
            file.write(block.own, _finite(features[block.own_in_given]))
            journal.note(0, number + 1, kept, file, now=number + 1 == len(blocks))
            progress(number + 1, len(blocks))
    return Features(path, grid.size_hw, int(kept["width"]), torch.float32, bool(kept["normalized"]))


def work_bytes(encoder: Any, grid_hw: tuple[int, int]) -> int:
    """What the features and the steps before them take on disk."""
    patches, config = grid_hw[0] * grid_hw[1], encoder.config
    numbers = getattr(config, "projection_dim", 0) or config.hidden_size
    if not isinstance(encoder, SlidingWindow):
        numbers += config.hidden_size * min(len(encoder.blocks) - 1, 2)
    return 4 * patches * numbers
