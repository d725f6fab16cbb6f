"""ITACLIP's text ensemble and its closing, alone and through the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spar_hf import build_segmenter
from spar_hf.prompts_spar import Labels
from spar_hf.refinement import closing

TEMPLATES = ("a photo of a {}", "a {} in the sea")
WORDS = [
    {"name": "sky", "names": ["sky", "cloud"]},
    {"name": "car", "names": ["car", "automobile"], "definition": "a small   road with a dog"},
    {"name": "dog", "definition": "a person of grass"},
]


@pytest.fixture(scope="module")
def spar(make_spar, spar_processor):
    return make_spar(num_hidden_layers=2), spar_processor


def unit_mean(spar, text) -> np.ndarray:
    """Mean over templates of unit text features, at length one."""
    model, processor = spar
    prompts = [template.replace("{}", text) for template in TEMPLATES]
    with torch.no_grad():
        embeds = model.get_text_features(**processor(text=prompts)).pooler_output.double()
    mean = F.normalize(embeds, dim=-1).mean(0)
    return (mean / mean.norm()).numpy()


@pytest.mark.parametrize("size", [(64, 64), (80, 112), (32, 128), (90, 75)])
@pytest.mark.parametrize("window", [None, 64])
@torch.no_grad()
def test_definitions_equal_their_plain_formulation(size, window, spar, pixels):
    images = pixels(size, batch=2)
    chosen = {"refine": ["definitions"], "settings": {"definitions.weight": 0.3}, "window": window}
    segmenter = build_segmenter(*spar, "itaclip", **chosen)
    plain = build_segmenter(*spar, "itaclip", window=window)
    encoded = segmenter.encode_labels(WORDS, TEMPLATES)
    expected = []
    for name, text in (("sky", None), ("cloud", None), ("car", 1), ("automobile", 1), ("dog", 2)):
        q = unit_mean(spar, name)
        if text is not None:
            q = 0.7 * q + 0.3 * unit_mean(spar, " ".join(WORDS[text]["definition"].split()))
        expected.append(q)
    np.testing.assert_allclose(encoded.text_embeds.numpy(), expected, atol=2e-5)
    assert abs(np.linalg.norm(expected[2]) - 1) > 1e-3  # not brought back to length one
    before = plain.encode_labels(WORDS, TEMPLATES)
    for ours, theirs in zip(segmenter(images, encoded), plain(images, before), strict=True):
        maps, names = ours(slice(0, 5)), theirs(slice(0, 5))
        torch.testing.assert_close(maps[:2], names[:2], atol=2e-5, rtol=0)
        # A score is linear in q: that of the name, and that of the definition as a name of its own.
        alone = plain.encode_labels([[WORDS[1]["definition"]], ["sky"]], TEMPLATES)
        (words,) = plain(images[:1], alone)
        if theirs is not None and torch.equal(names, plain(images[:1], before)[0](slice(0, 5))):
            torch.testing.assert_close(maps[2], 0.7 * names[2] + 0.3 * words(slice(0, 1))[0], atol=2e-5, rtol=0)


def test_definitions_come_from_a_file_of_their_own(spar, tmp_path):
    (tmp_path / "words.json").write_text(json.dumps(WORDS))
    (tmp_path / "words.csv").write_text("name,definition\nDog,a person of grass\n")
    inside = build_segmenter(*spar, refine=["definitions"]).encode_labels(Labels.read(tmp_path / "words.json"))
    path = str(tmp_path / "words.csv")
    segmenter = build_segmenter(*spar, refine=["definitions"], settings={"definitions.file": path})
    outside = segmenter.encode_labels("sky, cloud; car, automobile; dog")
    torch.testing.assert_close(outside.text_embeds[4], inside.text_embeds[4])
    plain = build_segmenter(*spar).encode_labels("sky, cloud; car, automobile; dog")
    assert torch.equal(outside.text_embeds[:4], plain.text_embeds[:4])
    assert not torch.equal(outside.text_embeds[4], plain.text_embeds[4])


def test_mistakes_say_what_to_do(spar):
    segmenter = build_segmenter(*spar, refine=["definitions"])
    with pytest.raises(ValueError, match="no class has one; give them as 'definition' in a file of labels"):
        segmenter.encode_labels("sky; car")
    with pytest.raises(ValueError, match="label 1's definition is 3; give one text"):
        Labels.parse([{"name": "sky", "definition": 3}])
    with pytest.raises(ValueError, match="label 1's definition has 3000 characters"):
        Labels.parse([{"name": "sky", "definition": "a" * 3000}])
    with pytest.raises(ValueError, match="'definitions' changes text features, and 'floss' makes its own"):
        build_segmenter(*spar, refine=["definitions", "floss"]).encode_labels(WORDS)
    with pytest.raises(ValueError, match=r"weight is 2.0; it must be from 0 to 1"):
        build_segmenter(*spar, refine=["definitions"], settings={"definitions.weight": 2.0})
    with pytest.raises(ValueError, match="side_px is 4; it must be odd"):
        closing.Settings(side_px=4)


@pytest.mark.parametrize("side", [1, 3, 5])
def test_closing_equals_its_plain_formulation(side):
    ids = torch.randint(-1, 4, (11, 14), generator=torch.Generator().manual_seed(side), dtype=torch.int32)

    def extreme(image: np.ndarray, pick) -> np.ndarray:
        reach, out = side // 2, np.zeros_like(image)
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                around = image[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
                out[y, x] = pick(around)
        return out

    expected = extreme(extreme(ids.numpy(), np.max), np.min)
    found = closing.closing(ids, None, closing.Settings(side_px=side))
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found.numpy(), expected)
