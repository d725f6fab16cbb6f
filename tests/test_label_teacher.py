"""Any segmenter as a teacher: probabilities of patches, features that say what they say, and training with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import SIZES_HW
from torch.nn import functional as F

from spar_hf import build_segmenter
from spar_hf.distillation.label_teacher import LabelTeacher, Settings, patch_probabilities
from spar_hf.segmentation_spar import GridScores, label_map

LABELS = "road; car, automobile; sky; tree"
TEMPLATES = ("a photo of a {}.",)


@pytest.mark.parametrize(
    ("size_hw", "extent_hw", "grid_hw"),
    [((48, 64), (48, 64), (3, 4)), ((53, 70), (48, 64), (3, 4)), ((40, 60), (48, 64), (3, 4))],
)
def test_probabilities_are_means_over_the_pixels_of_a_patch(size_hw, extent_hw, grid_hw):
    scores = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))
    found = patch_probabilities(GridScores.of(scores, size_hw), grid_hw, extent_hw, 3.0)
    full = F.interpolate(scores[None].double(), size=size_hw, mode="bilinear", align_corners=False)[0]
    probabilities = (3.0 * full).softmax(0).numpy()
    for row in range(grid_hw[0]):
        for column in range(grid_hw[1]):
            inside = probabilities[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            np.testing.assert_allclose(found[row, column].numpy(), inside.mean((1, 2)), atol=1e-5)


@pytest.fixture
def teacher(make_spar, spar_processor):
    def make(settings: Settings, refine=("pamr",)) -> LabelTeacher:
        model = make_spar(num_hidden_layers=3)
        segmenter = build_segmenter(model, spar_processor, "naclip", refine=refine)
        encoded = segmenter.encode_labels(LABELS, TEMPLATES)
        return LabelTeacher(segmenter, encoded, encoded.text_embeds, model.vision_model, settings)

    return make


@pytest.mark.parametrize("target", ["moved", "text"])
@pytest.mark.parametrize("size", SIZES_HW)
@torch.no_grad()
def test_features_equal_the_plain_formulation(size, target, teacher, pixels):
    images = pixels(size, batch=2)
    teaches = teacher(Settings(target=target, steps=3, step_size=0.2))
    found = teaches(images).patch_embeds
    own = teaches.encoder(images).patch_embeds.double()
    text = F.normalize(teaches.text_embeds.double(), dim=-1).numpy()
    for image in range(2):
        (maps,) = teaches.segmenter(images[image : image + 1], teaches.encoded)
        grid_hw = own.shape[1:3]
        extent_hw = tuple(side // 16 * 16 for side in images.shape[2:])
        probabilities = patch_probabilities(maps, grid_hw, extent_hw, 40.0).double().numpy()
        for row in range(grid_hw[0]):
            for column in range(grid_hw[1]):
                p, f = probabilities[row, column], own[image, row, column].numpy()
                confidence = 1 + (p * np.log(np.maximum(p, 1e-12))).sum() / np.log(len(p))
                length = np.linalg.norm(f)
                unit = f / length
                if target == "text":
                    words = p @ text / np.linalg.norm(p @ text)
                    wanted = length * (confidence * words + (1 - confidence) * unit)
                else:
                    for _ in range(3):
                        q = np.exp(40 * text @ unit)
                        unit = unit + 0.2 * confidence * ((p - q / q.sum()) @ text)
                        unit /= np.linalg.norm(unit)
                    wanted = length * unit
                np.testing.assert_allclose(found[image, row, column].numpy(), wanted, atol=2e-5 * max(length, 1))


@torch.no_grad()
def test_the_words_find_in_the_features_what_the_method_found(teacher, pixels):
    """With a method that is sure everywhere, the label map of the target is the method's."""
    images = pixels("larger")
    teaches = teacher(Settings(steps=30, step_size=0.5))
    grid_hw = (images.shape[2] // 16, images.shape[3] // 16)
    wanted = torch.randint(0, 5, grid_hw, generator=torch.Generator().manual_seed(1))
    sure = F.one_hot(wanted, 5).float()
    found = teaches.target(teaches.encoder(images).patch_embeds[0], sure)
    maps = GridScores.of(torch.einsum("kd,ijd->kij", teaches.text_embeds, F.normalize(found, dim=-1)), grid_hw)
    assert torch.equal(label_map(maps, torch.arange(5)).long(), wanted)


@torch.no_grad()
def test_an_unsure_method_changes_nothing(teacher, pixels):
    images = pixels("native")
    teaches = teacher(Settings())
    own = teaches.encoder(images).patch_embeds[0]
    even = torch.full((*own.shape[:2], 5), 0.2)
    torch.testing.assert_close(teaches.target(own, even), own, atol=1e-5, rtol=1e-5)


def test_mistakes_say_what_to_do(teacher):
    with pytest.raises(ValueError, match=r"target is 'mean'; choose one of 'moved', 'text'"):
        Settings(target="mean")
    made = teacher(Settings())
    with pytest.raises(ValueError, match="there are 3 text features for 5 names"):
        LabelTeacher(made.segmenter, made.encoded, made.text_embeds[:3], made.encoder)
