"""Every row of the table of methods against a plain formulation, at every kind of size, and the identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import SIZES_HW
from plain_clip import PLAIN_METHODS, PlainClip, plain_method

from spar_hf import METHODS
from spar_hf.dense_spar import Recipe, Term
from spar_hf.methods_spar import find_method


def test_every_row_has_a_plain_formulation():
    assert set(METHODS) == set(PLAIN_METHODS)


@pytest.mark.parametrize("layers", [12, 6])
@pytest.mark.parametrize("size", SIZES_HW)
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_method_equals_its_plain_formulation(name, size, layers, make_clip, make_vision, pixels):
    images = pixels(size)
    output = make_vision(method=name, num_hidden_layers=layers)(images)
    patches, image = plain_method(PlainClip(make_clip(num_hidden_layers=layers)), images[0].numpy(), name)
    np.testing.assert_allclose(output.patch_embeds[0].numpy(), patches, atol=2e-5)
    np.testing.assert_allclose(output.image_embeds[0].numpy(), image, atol=2e-5)
