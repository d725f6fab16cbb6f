"""Checkpoints of every layout load whole; ours come back as they were, with the package and without it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROWS, VISION
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from spar_hf import (
    METHODS,
    SparConfig,
    SparImageProcessor,
    SparModel,
    SparProcessor,
    SparVisionConfig,
    SparVisionModel,
)

CLEAN = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
EXACT = {"atol": 0, "rtol": 0}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def projected_folder(clip_folder, tmp_path_factory) -> Path:
    """The vision tower with its projection, as `CLIPVisionModelWithProjection` saves it."""
    folder = tmp_path_factory.mktemp("projected")
    clip = CLIPModel.from_pretrained(clip_folder)
    model = CLIPVisionModelWithProjection(clip.config.vision_config)
    model.vision_model.load_state_dict(clip.vision_model.state_dict())
    model.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    model.save_pretrained(folder)
    return folder


def write_checkpoint(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> Path:
    """A folder as an older library left it: a configuration and one file of weights under the names given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    copies = {name: weight.clone().contiguous() for name, weight in weights.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def old_names(clip: CLIPModel) -> dict[str, torch.Tensor]:
    """The names of `CLIPModel`'s weights up to transformers 4.30: with the two index buffers."""
    weights = dict(clip.state_dict())
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in weights
    for tower, length in (("vision_model", 17), ("text_model", 77)):
        weights[f"{tower}.embeddings.position_ids"] = torch.arange(length)[None]
    return weights


def same_features(model: SparModel | SparVisionModel, clip: CLIPModel, images: torch.Tensor) -> None:
    """The model holds the weights of `clip`: the image embedding passes through all of the tower."""
    vision = model.vision_model if isinstance(model, SparModel) else model
    vision.config.position_interpolation = "size"
    expected = clip.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(vision(images).image_embeds, expected, atol=1e-5, rtol=0)
    for name, weight in vision.encoder.layers.state_dict().items():
        torch.testing.assert_close(weight, clip.vision_model.encoder.layers.state_dict()[name], **EXACT)
    if isinstance(model, SparModel):
        words = torch.tensor([[5, 9, 7, clip.config.text_config.eos_token_id]])
        theirs = clip.get_text_features(words).pooler_output
        torch.testing.assert_close(model.get_text_features(words).pooler_output, theirs, atol=1e-6, rtol=0)
        assert model.logit_scale == clip.logit_scale


# ------------------------------------------------------------------------------------ CLIP's layouts


@pytest.mark.parametrize("cls", [SparVisionModel, SparModel])
def test_whole_clip(cls, clip_folder, make_clip, pixels):
    model, info = cls.from_pretrained(clip_folder, output_loading_info=True)
    assert info == CLEAN
    assert not model.training
    same_features(model, make_clip(num_hidden_layers=6), pixels("off_grid"))


def test_vision_tower_with_projection(projected_folder, make_clip, pixels):
    model, info = SparVisionModel.from_pretrained(projected_folder, output_loading_info=True)
    assert info == CLEAN
    same_features(model, make_clip(num_hidden_layers=6), pixels("off_grid"))


@pytest.mark.parametrize("cls", [SparVisionModel, SparModel])
def test_sharded_clip(cls, make_clip, pixels, tmp_path):
    make_clip(num_hidden_layers=6).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert info == CLEAN
    same_features(model, make_clip(num_hidden_layers=6), pixels("larger"))


@pytest.mark.parametrize("cls", [SparVisionModel, SparModel])
def test_old_names_with_index_buffers(cls, clip_folder, make_clip, pixels, tmp_path, caplog):
    config = json.loads((clip_folder / "config.json").read_text())
    clip = make_clip(num_hidden_layers=6)
    write_checkpoint(tmp_path, config, old_names(clip))
    with caplog.at_level(logging.WARNING, logger="transformers"):
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert info == CLEAN
    same_features(model, clip, pixels("off_grid"))


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_vision_only_files_of_both_ages(prefix, make_clip, pixels, tmp_path):
    clip = make_clip(num_hidden_layers=6)
    weights = {prefix + name: weight for name, weight in clip.vision_model.state_dict().items()}
    weights[f"{prefix}embeddings.position_ids"] = torch.arange(17)[None]
    weights["visual_projection.weight"] = clip.visual_projection.weight
    write_checkpoint(tmp_path, clip.config.vision_config.to_dict(), weights)
    model, info = SparVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info == CLEAN
    same_features(model, clip, pixels("off_grid"))


@pytest.mark.parametrize("cls", [SparVisionModel, SparModel])
@pytest.mark.parametrize("style", ["laion", "openai"])
def test_configurations_that_say_little_or_say_it_twice(style, cls, make_clip, pixels, tmp_path):
    """LAION's name few fields and use gelu; OpenAI's large ones repeat each tower as `vision_config_dict`."""
    clip = make_clip(num_hidden_layers=6, hidden_act="gelu", patch_size=32)
    fields = {name: value for name, value in VISION.items() if name not in ("patch_size", "projection_dim")}
    vision = {
        **fields,
        "num_hidden_layers": 6,
        "hidden_act": "gelu",
        "model_type": "clip_vision_model",
        "dropout": 0.0,
    }
    text = {**clip.config.text_config.to_dict(), "model_type": "clip_text_model"}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "projection_dim": 24,  # the tower's own default, 512, is wrong and left out
        "text_config": text,
        "text_config_dict": text if style == "openai" else None,
        "torch_dtype": "float32",
        "transformers_version": "4.21.0.dev0",
        "vision_config": vision,  # no patch_size: 32 is CLIP's default
        "vision_config_dict": vision if style == "openai" else None,
    }
    write_checkpoint(
        tmp_path, config, old_names(clip) | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    )
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert info == CLEAN
    tower = model.config.vision_config if cls is SparModel else model.config
    assert isinstance(tower, SparVisionConfig)
    assert (tower.patch_size, tower.hidden_act, tower.projection_dim) == (32, "gelu", 24)
    same_features(model, clip, pixels("off_grid"))


def test_half_precision_is_chosen_at_loading(clip_folder):
    for cls in (SparVisionModel, SparModel):
        assert cls.from_pretrained(clip_folder).dtype == torch.float32
        assert cls.from_pretrained(clip_folder, dtype=torch.bfloat16).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------- what must not load


def test_a_tower_without_projection_is_refused(make_clip, pixels, tmp_path):
    clip = make_clip(num_hidden_layers=6)
    bare = CLIPVisionModel(CLIPVisionConfig(**{**VISION, "num_hidden_layers": 6}))
    bare.load_state_dict(clip.vision_model.state_dict())
    bare.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"lacks 1 of the weights of SparVisionModel: visual_projection.weight. Give a CLIP"
    ):
        SparVisionModel.from_pretrained(tmp_path)
    model, info = SparVisionModel.from_pretrained(tmp_path, projection_dim=0, output_loading_info=True)
    assert info == CLEAN
    output = model(pixels("native"))
    assert output.patch_embeds.shape == (1, 4, 4, 48)
    torch.testing.assert_close(output.image_embeds, output.pooler_output, **EXACT)


def test_missing_weights_are_refused(clip_folder, make_clip, tmp_path):
    config = json.loads((clip_folder / "config.json").read_text())
    weights = {n: w for n, w in make_clip(num_hidden_layers=6).state_dict().items() if "layers.3.mlp" not in n}
    write_checkpoint(tmp_path, config, weights)
    with pytest.raises(ValueError, match=r"lacks 4 of the weights of SparVisionModel: encoder.layers.3.mlp.fc1.bias"):
        SparVisionModel.from_pretrained(tmp_path)


def test_a_vision_tower_is_no_whole_model(projected_folder):
    with pytest.raises(
        ValueError, match=r"holds a vision tower alone, and SparModel needs the text tower too. Load it"
    ):
        SparModel.from_pretrained(projected_folder)


# -------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize("name", ROWS)
def test_the_method_is_chosen_at_loading(name, clip_folder, make_vision, pixels):
    expected = make_vision(method=name, num_hidden_layers=6)(pixels("off_grid")).patch_embeds
    for model in (
        SparVisionModel.from_pretrained(clip_folder, method=name),
        SparModel.from_pretrained(clip_folder, method=name).vision_model,
    ):
        torch.testing.assert_close(model(pixels("off_grid")).patch_embeds, expected, atol=1e-5, rtol=0)
        assert model.config.method == name
        assert model.config.position_interpolation == METHODS[name].position_interpolation


def test_any_field_is_chosen_at_loading(clip_folder, make_vision, pixels, tmp_path):
    chosen = {"method": "naclip", "position_interpolation": "antialias", "size_rule": "pad", "stride_px": 40}
    expected = make_vision(num_hidden_layers=6, **chosen)(pixels("off_grid")).patch_embeds
    whole = SparModel.from_pretrained(clip_folder, **chosen)
    whole.save_pretrained(tmp_path / "whole")
    vision = SparVisionModel.from_pretrained(clip_folder, **chosen)
    vision.save_pretrained(tmp_path / "vision")
    models = [whole.vision_model, vision, SparVisionModel.from_pretrained(tmp_path / "whole")]
    models += [
        AutoModel.from_pretrained(tmp_path / "whole").vision_model,
        AutoModel.from_pretrained(tmp_path / "vision"),
    ]
    for model in models:
        torch.testing.assert_close(model(pixels("off_grid")).patch_embeds, expected, atol=1e-5, rtol=0)
        assert {name: getattr(model.config, name) for name in chosen} == chosen


@pytest.mark.parametrize("cls", [SparModel, SparVisionModel])
def test_a_saved_model_is_changed_at_loading(cls, clip_folder, make_vision, pixels, tmp_path):
    cls.from_pretrained(clip_folder, method="clip_surgery", size_rule="pad").save_pretrained(tmp_path)
    images = pixels("larger")
    for load in (cls.from_pretrained, AutoModel.from_pretrained):
        changed = load(tmp_path, method="naclip")
        tower = changed.vision_model if cls is SparModel else changed
        # A new method brings its own recipe and positions; what belongs to the weights stays.
        assert tower.config.position_interpolation == "offset" and tower.config.size_rule == "pad"
        expected = make_vision(method="naclip", num_hidden_layers=6)(images).patch_embeds
        torch.testing.assert_close(tower(images).patch_embeds, expected, atol=1e-5, rtol=0)
        positions = load(tmp_path, position_interpolation="antialias")
        tower = positions.vision_model if cls is SparModel else positions
        assert tower.config.method == "clip_surgery" and tower.config.recipe["blocks"] == 6
        expected = make_vision(method="clip_surgery", position_interpolation="antialias", num_hidden_layers=6)(images)
        torch.testing.assert_close(tower(images).patch_embeds, expected.patch_embeds, atol=1e-5, rtol=0)


def test_wrong_overrides_are_refused(clip_folder):
    for cls in (SparVisionModel, SparModel):
        with pytest.raises(ValueError, match=r"no recipe 'nacllip'.*Did you mean 'naclip'"):
            cls.from_pretrained(clip_folder, method="nacllip")
        with pytest.raises(ValueError, match=r"position_interpolation is 'nearest'; choose one of 'size'"):
            cls.from_pretrained(clip_folder, position_interpolation="nearest")
        with pytest.raises(TypeError, match="positon_interpolation"):
            cls.from_pretrained(clip_folder, positon_interpolation="size")


# ------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("cls", [SparModel, SparVisionModel])
def test_saved_is_loaded_as_it_was(cls, clip_folder, pixels, tmp_path):
    model = cls.from_pretrained(clip_folder, method="resclip", source="a test")
    model.save_pretrained(tmp_path)
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert info == CLEAN
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, **EXACT)
    torch.testing.assert_close(again(pixels("off_grid")).patch_embeds, model(pixels("off_grid")).patch_embeds, **EXACT)
    assert type(AutoModel.from_pretrained(tmp_path)) is cls
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))


def test_saved_weights_keep_clips_names(clip_folder, tmp_path):
    """What we save, plain CLIP reads: the files keep its layout."""
    SparModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as ours,
        safe_open(clip_folder / "model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
    theirs = load_file(clip_folder / "model.safetensors")
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(weight, theirs[name], **EXACT)


def test_a_saved_recipe_outlives_the_table(clip_folder, pixels, tmp_path, monkeypatch):
    """A distilled student keeps the last block it was trained with, whatever a later version calls the method."""
    model = SparModel.from_pretrained(clip_folder, method="naclip")
    model.save_pretrained(tmp_path)
    expected = model(pixels("larger")).patch_embeds
    monkeypatch.delitem(METHODS, "naclip")
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path)(pixels("larger")).patch_embeds, expected, **EXACT)
    tower = SparVisionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(tower(pixels("larger")).patch_embeds, expected, **EXACT)


def test_auto_classes_know_ours(clip_folder, spar_processor, tmp_path):
    SparModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    spar_processor.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SparConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is SparModel
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(tmp_path)) is SparModel
    assert type(AutoProcessor.from_pretrained(tmp_path)) is SparProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is SparImageProcessor


def test_loading_says_nothing(clip_folder, projected_folder, make_clip, tmp_path):
    """In a process of its own, as a user would see it; only the progress bar may move."""
    write_checkpoint(
        tmp_path, json.loads((clip_folder / "config.json").read_text()), old_names(make_clip(num_hidden_layers=6))
    )
    script = f"""
        from transformers.utils.logging import disable_progress_bar
        disable_progress_bar()
        import spar_hf
        for folder in {[str(clip_folder), str(projected_folder), str(tmp_path)]!r}:
            spar_hf.SparVisionModel.from_pretrained(folder)
        for folder in {[str(clip_folder), str(tmp_path)]!r}:
            spar_hf.SparModel.from_pretrained(folder, method="naclip")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (run.stdout, run.stderr) == ("", "")


# ------------------------------------------------------------------------------------------ remote code

REMOTE = """
    import sys
    sys.modules["spar_hf"] = None  # importing it fails, as where it is not installed
    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

    whole, vision, given, out = sys.argv[1:]
    given = load_file(given)
    model = AutoModel.from_pretrained(whole, trust_remote_code=True)
    tower = AutoModel.from_pretrained(vision, trust_remote_code=True, method="sclip")
    processor = AutoProcessor.from_pretrained(whole, trust_remote_code=True)
    image_processor = AutoImageProcessor.from_pretrained(whole, trust_remote_code=True)
    image = Image.fromarray(given["image"].numpy())
    found = {"pixel_values": image_processor(image, return_tensors="pt")["pixel_values"]}
    both = processor(images=image, text=["a dog", "sky"], return_tensors="pt", padding=True)
    found["processor_pixel_values"] = both["pixel_values"]
    with torch.no_grad():
        output = model(both["pixel_values"], both["input_ids"], both.get("attention_mask"))
        found["patch_embeds"], found["text_embeds"] = output.patch_embeds, output.text_embeds
        found["tower"] = tower(given["pixels"]).patch_embeds
    for thing in (model, tower, processor, image_processor):
        assert type(thing).__module__.startswith("transformers_modules."), type(thing)
    save_file({name: value.contiguous() for name, value in found.items()}, out)
    print(type(model).__name__, type(tower).__name__, type(processor).__name__, type(image_processor).__name__)
"""


def test_remote_code_runs_without_the_package(clip_folder, spar_processor, pixels, tmp_path):
    """`save_pretrained` carries the `*_spar.py` files; a fresh process that lacks the package loads them."""
    whole, vision = tmp_path / "whole", tmp_path / "vision"
    model = SparModel.from_pretrained(clip_folder, method="naclip")
    model.save_pretrained(whole)
    spar_processor.save_pretrained(whole)
    tower = SparVisionModel.from_pretrained(clip_folder)
    tower.save_pretrained(vision)
    assert "clip_spar.SparModel" in json.loads((whole / "config.json").read_text())["auto_map"]["AutoModel"]
    assert {"clip_spar.py", "dense_spar.py", "configuration_spar.py", "methods_spar.py", "processing_spar.py"} <= {
        file.name for file in whole.glob("*.py")
    }
    assert all(file.name.endswith("_spar.py") for file in whole.glob("*.py"))

    image = (torch.rand(75, 90, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    save_file({"image": image, "pixels": pixels("off_grid")}, tmp_path / "given.safetensors")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(path) for path in (whole, vision, tmp_path / "given.safetensors", tmp_path / "found.safetensors")]
    run = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(REMOTE), *arguments],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["SparModel", "SparVisionModel", "SparProcessor", "SparImageProcessor"]

    found = load_file(tmp_path / "found.safetensors")
    from PIL import Image

    inputs = spar_processor(
        images=Image.fromarray(image.numpy()), text=["a dog", "sky"], return_tensors="pt", padding=True
    )
    expected = model(inputs["pixel_values"], inputs["input_ids"], inputs.get("attention_mask"))
    torch.testing.assert_close(found["pixel_values"], inputs["pixel_values"], **EXACT)
    torch.testing.assert_close(found["processor_pixel_values"], inputs["pixel_values"], **EXACT)
    torch.testing.assert_close(found["patch_embeds"], expected.patch_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(found["text_embeds"], expected.text_embeds, atol=1e-6, rtol=0)
    sclip = SparVisionModel.from_pretrained(vision, method="sclip")
    torch.testing.assert_close(found["tower"], sclip(pixels("off_grid")).patch_embeds, atol=1e-6, rtol=0)
