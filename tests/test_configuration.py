"""Configurations: defaults from the table of methods, validation, and the way to JSON and back."""

from __future__ import annotations

import json

import pytest
from conftest import ROWS, TEXT, VISION
from transformers import AutoConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN as CLIP_MEAN
from transformers.image_utils import OPENAI_CLIP_STD as CLIP_STD

from spar_hf import METHODS, SparConfig, SparVisionConfig
from spar_hf.methods_spar import Recipe, Term


def test_defaults_are_those_of_spars_clip():
    config = SparVisionConfig()
    assert (config.model_type, config.method, config.position_interpolation) == ("spar_vision", "maskclip", "offset")
    assert (config.size_rule, config.window_px, config.stride_px) == ("floor", None, 24)
    assert (config.image_size, config.patch_size, config.hidden_act) == (224, 16, "quick_gelu")
    assert (list(config.image_mean), list(config.image_std)) == (list(CLIP_MEAN), list(CLIP_STD))
    assert Recipe(**config.recipe) == Recipe((Term("identity"),))
    assert isinstance(config, CLIPVisionConfig)


@pytest.mark.parametrize("name", ROWS)
def test_a_method_fills_in_what_is_not_given(name):
    config = SparVisionConfig(method=name)
    assert Recipe(**config.recipe) == METHODS[name].recipe
    assert config.position_interpolation == METHODS[name].position_interpolation
    assert SparVisionConfig(method=name, position_interpolation="antialias").position_interpolation == "antialias"
    own = Recipe((Term("vv", sigma_patches=3.0),), residual=False)
    assert Recipe(**SparVisionConfig(method=name, recipe=own.to_dict()).recipe) == own


@pytest.mark.parametrize("cls", [SparVisionConfig, SparConfig])
def test_json_and_back(cls, tmp_path):
    fields = {
        "method": "resclip",
        "size_rule": "stretch",
        "window_px": 128,
        "stride_px": 40,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "source": "a test",
        "teacher": {"method": "naclip", "window_px": 64, "stride_px": 24, "revision": None},
    }
    vision = SparVisionConfig(**{**VISION, **fields})
    config = vision if cls is SparVisionConfig else SparConfig(text_config=dict(TEXT), vision_config=vision.to_dict())
    config.save_pretrained(tmp_path)
    for again in (cls.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is cls
        assert again.to_diff_dict() == config.to_diff_dict()
        tower = again if cls is SparVisionConfig else again.vision_config
        assert type(tower) is SparVisionConfig
        assert {name: getattr(tower, name) for name in fields} == fields
        assert Recipe(**tower.recipe) == METHODS["resclip"].recipe
    stored = json.loads((tmp_path / "config.json").read_text())
    stored = stored if cls is SparVisionConfig else stored["vision_config"]
    assert stored["recipe"]["terms"][0]["scores"] == "kk"  # written out, not only named


def test_whole_configuration_holds_both_towers():
    config = SparConfig(text_config=dict(TEXT), vision_config={**VISION, "method": "naclip"}, projection_dim=24)
    assert type(config.text_config) is CLIPTextConfig and type(config.vision_config) is SparVisionConfig
    assert config.vision_config.position_interpolation == "offset" and config.projection_dim == 24
    assert type(SparConfig().vision_config) is SparVisionConfig


def test_clips_configuration_is_read_as_ours(tmp_path):
    clip = CLIPConfig(text_config=dict(TEXT), vision_config={**VISION, "projection_dim": 512}, projection_dim=24)
    clip.save_pretrained(tmp_path)
    vision = SparVisionConfig.from_pretrained(tmp_path, method="sclip")
    whole = SparConfig.from_pretrained(tmp_path, method="sclip", size_rule="pad")
    for tower in (vision, whole.vision_config):
        assert (tower.model_type, tower.method, tower.hidden_size) == ("spar_vision", "sclip", 48)
        assert tower.projection_dim == 24  # the whole model's counts; old files leave the tower's at its default
    assert whole.vision_config.size_rule == "pad" and whole.model_type == "spar"
    assert whole.text_config.hidden_size == TEXT["hidden_size"]


def test_a_new_method_replaces_a_stored_recipe_and_other_fields_do_not(tmp_path):
    SparVisionConfig(**VISION, method="clip_surgery", stride_px=16).save_pretrained(tmp_path)
    for config in (
        SparVisionConfig.from_pretrained(tmp_path, method="naclip"),
        AutoConfig.from_pretrained(tmp_path, method="naclip"),
    ):
        assert Recipe(**config.recipe) == METHODS["naclip"].recipe
        assert (config.position_interpolation, config.stride_px) == ("offset", 16)
    kept = SparVisionConfig.from_pretrained(tmp_path, size_rule="pad")
    assert Recipe(**kept.recipe) == METHODS["clip_surgery"].recipe and kept.position_interpolation == "bilinear"
    both = SparVisionConfig.from_pretrained(tmp_path, method="naclip", position_interpolation="antialias")
    assert both.position_interpolation == "antialias"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "nacl"}, r"no recipe 'nacl'; choose one of .*Did you mean 'naclip'\?"),
        (
            {"position_interpolation": "nearest"},
            r"position_interpolation is 'nearest'; choose one of 'size', 'offset'",
        ),
        ({"size_rule": "crop"}, r"size_rule is 'crop'; choose one of 'floor', 'pad', 'stretch'"),
        ({"recipe": {"terms": []}}, r"recipe has no terms"),
        ({"recipe": {"terms": [{"scores": "qv"}]}}, r"scores is 'qv'"),
        ({"image_size": 100}, r"image_size 100 is no multiple of patch_size 16"),
        ({"patch_size": 0}, r"patch_size is 0; give one whole number of pixels, at least 1"),
        ({"window_px": 8}, r"window_px is 8; it must be a multiple of patch_size 16"),
        ({"window_px": 0}, r"window_px is 0; give one whole number"),
        ({"window_px": 100}, r"window_px is 100; it must be a multiple"),
        ({"stride_px": 0}, r"stride_px is 0; give one whole number"),
        ({"stride_px": 225}, r"stride_px is 225; it must be 1 to the window's 224 px"),
        ({"window_px": 64, "stride_px": 65}, r"stride_px is 65; it must be 1 to the window's 64 px"),
        ({"stride_px": "24"}, r"stride_px is '24'; give one whole number"),
        ({"image_size": [64, 64]}, r"image_size is \[64, 64\]; give one whole number"),
        ({"method": None}, r"no recipe None; choose one of"),
        ({"image_mean": [0.5]}, r"image_mean and image_std need 3 numbers each"),
        ({"image_std": [0.5, 0.0, 0.5]}, r"image_std is .*0\.0.*all must be positive"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SparVisionConfig(**fields)


def test_a_vision_towers_configuration_is_no_whole_one(tmp_path):
    SparVisionConfig(**VISION).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a vision tower alone, and SparModel needs .* SparVisionModel"):
        SparConfig.from_pretrained(tmp_path)


def test_what_equals_the_defaults_is_written_out_too(tmp_path):
    """A file must not depend on what a later version takes for the default."""
    SparVisionConfig().save_pretrained(tmp_path / "vision")
    SparConfig().save_pretrained(tmp_path / "whole")
    vision = json.loads((tmp_path / "vision" / "config.json").read_text())
    whole = json.loads((tmp_path / "whole" / "config.json").read_text())["vision_config"]
    for stored in (vision, whole):
        assert stored["recipe"] == METHODS["maskclip"].recipe.to_dict()
        assert stored["position_interpolation"] == "offset" and stored["patch_size"] == 16
        assert stored["size_rule"] == "floor" and stored["image_mean"] == list(CLIP_MEAN)
