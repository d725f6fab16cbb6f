"""Rasters: features block by block against the whole pass, files of every kind read back with rasterio."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import KINDS, whole_model

from spar_hf.build import build_encoder
from spar_hf.grid_spar import POSITION_RULES, Part, part_of, resize_positions
from spar_hf.rasters.blocks import Grid, Surroundings, cut
from spar_hf.rasters.features import Journal, tower_features
from spar_hf.rasters.store import grid_file
from spar_hf.reach_spar import Pool

WORDS = "sky; grass; sea; sand; tree; house"
SIZES_HW = {"native": (64, 64), "larger": (208, 176), "oblong": (64, 320), "off_grid": (150, 201)}


class ArrayRaster:
    """A raster in memory."""

    name = "array"

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.size_hw = values, values.shape[:2]

    def rgb(self, window: Any) -> np.ndarray:
        return self.values[window]


def noise(size_hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def grid_of(values: np.ndarray, config: Any) -> Grid:
    return Grid(ArrayRaster(values), config.patch_size, config.size_rule, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def whole_pixels(values: np.ndarray) -> torch.Tensor:
    normalised = (values / 255 - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.3, 0.25])
    return torch.from_numpy(normalised.transpose(2, 0, 1)).float()[None]


def stored(features: Any) -> torch.Tensor:
    with grid_file(features.path, features.grid_hw, features.width, features.dtype) as file:
        return file.read(tuple(slice(0, length) for length in features.grid_hw))


# ------------------------------------------------------------------------------------------- features in blocks


@pytest.mark.parametrize("rule", POSITION_RULES)
@pytest.mark.parametrize("whole_hw", [(23, 31), (4, 19), (4, 4), (3, 2)], ids=str)
def test_positions_of_a_part_are_those_of_the_whole(rule, whole_hw):
    table = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    whole = resize_positions(table, whole_hw, rule).unflatten(0, whole_hw)
    rows, columns = slice(1, 3), slice(0, 2)
    with part_of(Part(whole_hw, (1, 0), (slice(0, 2), slice(0, 2)))):
        part = resize_positions(table, (2, 2), rule).unflatten(0, (2, 2))
    torch.testing.assert_close(part, whole[rows, columns], atol=1e-5, rtol=0)


def test_a_pool_is_attention_to_all_parts():
    query, key, value = (torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 50, 51))
    value = value[:, :, :50]
    pool = Pool()
    for part in (slice(0, 7), slice(7, 8), slice(8, 50)):
        found = pool.add(query * 30, key[:, :, part], value[:, :, part])
    scores = (query.double() * 30) @ key.double().transpose(2, 3) / 8**0.5
    torch.testing.assert_close(found, (scores.softmax(-1) @ value.double()).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid_hw", [(1, 1), (7, 40), (33, 5)], ids=str)
@pytest.mark.parametrize("side", [1, 6, 12, 100])
@pytest.mark.parametrize("around", [Surroundings(3, 3), Surroundings(4, 5, 3)], ids=str)
def test_blocks_are_a_partition(grid_hw, side, around):
    times = np.zeros(grid_hw, dtype=int)
    for block in cut(grid_hw, around, side):
        times[block.own] += 1
        for own, given, length in zip(block.own, block.given, grid_hw, strict=True):
            assert given.start == 0 or (given.start <= own.start - around.before and given.start % around.unit == 0)
            assert given.stop == min(own.stop + around.after, length)
    assert (times == 1).all()


@pytest.fixture(scope="module", params=["clip", *KINDS])
def tower(request, make_vision, clip_tokenizer, tmp_path_factory):
    """A tower of each family, attention within reach."""
    if request.param == "clip":
        return make_vision(num_hidden_layers=4, attention_reach="window")
    folder = tmp_path_factory.mktemp(request.param)
    return build_encoder(whole_model(request.param, clip_tokenizer, folder).vision_model, reach="window")


@pytest.mark.parametrize("size", SIZES_HW)
def test_a_tower_in_blocks_is_its_whole_pass(tower, size, tmp_path):
    values = noise(SIZES_HW[size])
    if tower.config.size_rule == "stretch":  # of whole patches: a raster is not stretched
        values = values[: values.shape[0] // 16 * 16, : values.shape[1] // 16 * 16]
    with torch.inference_mode():
        whole = tower(whole_pixels(values)).patch_embeds[0]
    seen = []
    found = stored(
        tower_features(
            tower, grid_of(values, tower.config), Journal(tmp_path, "key"), 9, lambda *done: seen.append(done)
        )
    )
    torch.testing.assert_close(found, whole, atol=2e-4 * float(whole.abs().max()), rtol=0)
    assert seen[-1][0] == seen[-1][1] and len(seen) == seen[-1][1]
