"""The families beside CLIP: features, loading, refusals, and everything built on a dense encoder, as for CLIP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZES_HW
from distillation_help import SIZES, run, save_pictures
from families import (
    DINOV3_VISION,
    KINDS,
    RADIO_VISION,
    Family,
    radio_text,
    radio_tower,
    spar_radio,
    stock_metaclip,
    stock_naflex,
    stock_radio,
    stock_siglip,
    stock_tips,
    whole_model,
)
from plain_families import plain_radio_head, plain_siglip
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPTextModelWithProjection,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
    pipeline,
)

import spar_hf
from spar_hf import (
    SlidingWindow,
    SparDinov3Config,
    SparDinov3Model,
    SparDinov3VisionConfig,
    SparDinov3VisionModel,
    SparRadioConfig,
    SparRadioModel,
    SparRadioVisionConfig,
    SparRadioVisionModel,
    SparSiglipConfig,
    SparSiglipModel,
    SparSiglipVisionConfig,
    SparSiglipVisionModel,
    SparVisionModel,
)
from spar_hf.build import reconfigured
from spar_hf.checkpoints import load_tower
from spar_hf.evaluation import load_benchmark, load_protocol
from spar_hf.evaluation.evaluate import evaluate
from spar_hf.families import TOWERS, WHOLE, make_processor

CLEAN = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
EXACT = {"atol": 0, "rtol": 0}
CLOSE = {"atol": 2e-5, "rtol": 0}  # features are about 1 in magnitude
# What compiles or starts another Python: for one kind, and for the rest when asked.
FEW = [pytest.param(kind, marks=[] if kind == "tips" else pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module", params=KINDS)
def family(request, clip_tokenizer, tmp_path_factory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    KINDS[request.param].save(clip_tokenizer, folder)
    clip_tokenizer.save_pretrained(folder)
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    tower_class = TOWERS.get(model_type) or type(WHOLE[model_type].from_pretrained(folder).vision_model)
    tower = tower_class.from_pretrained(folder)
    plain = {name: weight.double().numpy() for name, weight in tower.state_dict().items()}
    return Family(request.param, folder, plain, tower)


@pytest.fixture(scope="module", params=KINDS)
def whole(request, clip_tokenizer, tmp_path_factory) -> tuple[Any, Any, Path]:
    """A whole model, its processor, and the folder that holds both."""
    folder, stock = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("stock")
    model = whole_model(request.param, clip_tokenizer, stock)
    processor = make_processor(model.config, clip_tokenizer)
    processor.templates = ["a photo of a {}.", "my {}"]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


# ------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("size", SIZES_HW)
@torch.no_grad()
def test_features_equal_the_plain_formulation(family, size, pixels):
    images = pixels(size, batch=2)
    expected = family.plain(images)
    found = family.tower(images)
    torch.testing.assert_close(found.patch_embeds, expected, **CLOSE)
    torch.testing.assert_close(family.tower(images[:1]).patch_embeds, expected[:1], **CLOSE)
    assert found.image_hw == tuple(images.shape[2:])
    reaching = reconfigured(family.tower, attention_reach="window")
    torch.testing.assert_close(reaching(images).patch_embeds, family.plain(images, window=64 // 16), **CLOSE)
    padded = tuple(-(-side // 16) * 16 for side in found.image_hw)
    whole = tuple(side // 16 * 16 for side in found.image_hw)
    assert family.tower.config.size_rule == family.kind.size_rule
    assert found.extent_hw == {"pad": padded, "floor": whole, "stretch": found.image_hw}[family.kind.size_rule]
    assert 0.3 < expected.std() < 30  # neither vanishing nor huge, so that the tolerance means something


@torch.no_grad()
def test_siglip_equals_the_stock_classes(pixels, tmp_path):
    stock = stock_siglip()
    stock.save_pretrained(tmp_path)
    ours = SparSiglipModel.from_pretrained(tmp_path)
    images, words = pixels("native", batch=2), torch.randint(2, 600, (3, 64), generator=torch.manual_seed(0))
    found, expected = ours(images, words), stock(pixel_values=images, input_ids=words)
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, **CLOSE)
    torch.testing.assert_close(found.pooler_output, expected.vision_model_output.pooler_output, **CLOSE)
    torch.testing.assert_close(found.image_embeds, found.pooler_output, **EXACT)
    torch.testing.assert_close(found.last_hidden_state, expected.vision_model_output.last_hidden_state, **CLOSE)
    text = ours.get_text_features(words).pooler_output
    torch.testing.assert_close(text, stock.get_text_features(words).pooler_output, **CLOSE)
    # Off the native size as well: the positions' rule is transformers' own.
    other = pixels("larger")
    stock_pooled = stock.vision_model(other, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(ours.vision_model(other).pooler_output, stock_pooled, **CLOSE)
    # One patch alone: the soft-max over one token is 1, so the pooled vector is the patch's own.
    one = pixels((16, 16))
    torch.testing.assert_close(
        ours.vision_model(one).patch_embeds[:, 0, 0], ours.vision_model(one).image_embeds, **CLOSE
    )


def flat_patches(pixels):
    """(B, 3, H, W) -> (B, h * w, p * p * 3): a patch as NaFlex' image processor hands it over, by a loop."""
    rows = [
        image[:, y : y + 16, x : x + 16].permute(1, 2, 0).flatten()
        for image in pixels
        for y in range(0, pixels.shape[2], 16)
        for x in range(0, pixels.shape[3], 16)
    ]
    return torch.stack(rows).unflatten(0, (len(pixels), -1))


@torch.no_grad()
def test_naflex_equals_the_stock_class_with_images_packed(clip_tokenizer, pixels, tmp_path):
    """Images of three grids, packed and padded to as many patches, are to the stock class what each alone is to us."""
    stock = stock_naflex(clip_tokenizer)
    stock.save_pretrained(tmp_path)
    ours = SparSiglipModel.from_pretrained(tmp_path)
    images = [pixels(size) for size in ("native", "larger", "same_count")]
    grids = [(image.shape[2] // 16, image.shape[3] // 16) for image in images]
    longest = max(rows * columns for rows, columns in grids)
    packed, mask = torch.zeros(3, longest, 768), torch.zeros(3, longest, dtype=torch.long)
    for row, (image, grid_hw) in enumerate(zip(images, grids, strict=True)):
        mask[row, : grid_hw[0] * grid_hw[1]] = 1
        packed[row, : grid_hw[0] * grid_hw[1]] = flat_patches(image)[0]
    words = torch.randint(2, 600, (3, 64), generator=torch.Generator().manual_seed(0))
    expected = stock(
        pixel_values=packed, pixel_attention_mask=mask, spatial_shapes=torch.tensor(grids), input_ids=words
    )
    for row, image in enumerate(images):
        found = ours(image, words)
        states = expected.vision_model_output.last_hidden_state[row, mask[row].bool()]
        torch.testing.assert_close(found.last_hidden_state[0], states, **CLOSE)
        torch.testing.assert_close(found.logits_per_image[0], expected.logits_per_image[row], **CLOSE)
    _, info = type(stock).from_pretrained(saved(ours, tmp_path / "saved"), output_loading_info=True)
    assert info["missing_keys"] == set() == info["unexpected_keys"]


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [stock_tips, stock_metaclip])
@torch.no_grad()
def test_whole_models_equal_the_stock_classes(make, clip_tokenizer, pixels, tmp_path):
    stock = make(clip_tokenizer)
    stock.save_pretrained(tmp_path / "stock")
    ours = WHOLE[stock.config.model_type].from_pretrained(tmp_path / "stock")
    clip = stock.config.model_type == "metaclip_2"
    if clip:
        ours.vision_model = reconfigured(ours.vision_model, method="clip")
    words = torch.randint(2, 500, (3, 20), generator=torch.Generator().manual_seed(0))
    words[:, 12] = clip_tokenizer.eos_token_id
    mask = torch.ones_like(words)
    mask[1, 15:] = 0
    for size in SIZES_HW:
        images, more = pixels(size, batch=2), {"interpolate_pos_encoding": True} if clip else {}
        found = ours(images, words, mask)
        expected = stock(input_ids=words, pixel_values=images, attention_mask=mask, **more)
        torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, **CLOSE)
        tokens = expected.vision_model_output.last_hidden_state
        if not clip:  # the features themselves; those of CLIP leave the last block by a recipe
            torch.testing.assert_close(found.patch_embeds.flatten(1, 2), tokens[:, 2:], **CLOSE)
    _, info = type(stock).from_pretrained(saved(ours, tmp_path / "saved"), output_loading_info=True)
    assert info["missing_keys"] == set() == info["unexpected_keys"]


@torch.no_grad()
def test_metaclip2_reads_its_first_end_token(clip_tokenizer, tmp_path):
    """Its end token is 2; by CLIP's rule for that id, the text's vector would be at the highest id."""
    stock = stock_metaclip(clip_tokenizer, eos_token_id=2)
    stock.save_pretrained(tmp_path)
    ours = WHOLE["metaclip_2"].from_pretrained(tmp_path)
    words = torch.tensor([[7, 600, 9, 2, 1, 1], [5, 6, 2, 2, 600, 2]])
    found = ours.get_text_features(words).pooler_output
    torch.testing.assert_close(found, stock.get_text_features(words).pooler_output, **CLOSE)
    hidden = ours.text_model(words).last_hidden_state[[0, 1], [3, 2]]
    torch.testing.assert_close(found, hidden @ ours.text_projection.weight.T, **CLOSE)
    assert (hidden - ours.text_model(words).last_hidden_state[[0, 1], [1, 4]]).abs().max() > 0.1


@torch.no_grad()
def test_tips_without_a_temperature(clip_tokenizer, tmp_path):
    """Published files hold none: it is the configuration's."""
    stock = stock_tips(clip_tokenizer)
    stock.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for temperature, message in ((None, None), (0.0, "temperature is 0, and scores would be divided by it")):
        kept = {name: weight for name, weight in weights.items() if name != "temperature"}
        if temperature is not None:
            kept["temperature"] = torch.tensor(temperature)
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        clip_tokenizer.save_pretrained(tmp_path)
        if message:
            with pytest.raises(ValueError, match=message):
                spar_hf.load(tmp_path)
        else:
            model, processor = spar_hf.load(tmp_path)
            assert model.temperature.item() == pytest.approx(stock.config.temperature_init_value)
            assert (processor.image_processor.image_mean, processor.image_processor.image_std) == ([0] * 3, [1] * 3)


@pytest.mark.parametrize("family", ["dinov3"], indirect=True)
@torch.no_grad()
def test_dinov3_equals_the_stock_patch_tokens(family, pixels):
    """Settles that SPAR's image side is `DINOv3ViTModel`'s patch tokens after the final norm."""
    stock = DINOv3ViTModel.from_pretrained(family.folder).eval()
    for size in ("native", "larger", "same_count"):
        images = pixels(size, batch=2)
        found, expected = family.tower(images), stock(images)
        patches = expected.last_hidden_state[:, 5:].unflatten(1, found.patch_embeds.shape[1:3])
        torch.testing.assert_close(found.patch_embeds, patches, atol=5e-6, rtol=0)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=5e-6, rtol=0)
        torch.testing.assert_close(found.image_embeds, patches.mean(dim=(1, 2)), atol=5e-6, rtol=0)


@pytest.mark.parametrize("family", ["dinov3"], indirect=True)
@torch.no_grad()
def test_dinov3_positions_stay_exact_in_half_precision(family, pixels):
    images, exact = pixels("larger"), family.tower(pixels("larger")).patch_embeds

    def error(model, output):
        return float((output(model).float() - exact).norm() / exact.norm())

    ours = SparDinov3VisionModel.from_pretrained(family.folder, dtype=torch.bfloat16)
    stock = DINOv3ViTModel.from_pretrained(family.folder, dtype=torch.bfloat16)
    mine = error(ours, lambda model: model(images.bfloat16()).patch_embeds)
    theirs = error(
        stock, lambda model: model(images.bfloat16()).last_hidden_state[:, 5:].unflatten(1, exact.shape[1:3])
    )
    assert mine < 0.05 and mine < 1.1 * theirs


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_radios_trunk_equals_the_stock_model(gated, pixels, tmp_path):
    """Without a head: what transformers' `RadioModel` gives, below, on and beyond the grid of its table."""
    stock = stock_radio(use_swiglu_ffn=gated)
    stock.save_pretrained(tmp_path)
    ours, info = SparRadioVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info == CLEAN and ours.config.projection_dim == 0 and ours.config.image_size == 512
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ours.config.image_mean, ours.config.image_std))
    for size in ("native", "larger", "same_count", (96, 96), (48, 160)):
        images = pixels(size, batch=2)
        found, expected = ours(images), stock(images * std + mean)
        torch.testing.assert_close(found.patch_embeds.flatten(1, 2), expected.features, **CLOSE)
        torch.testing.assert_close(found.pooler_output, expected.summary, **CLOSE)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, **CLOSE)
        torch.testing.assert_close(found.image_embeds, expected.last_hidden_state[:, 0], **CLOSE)


@torch.no_grad()
def test_radios_image_vector_is_its_teachers_class_token_through_the_head(pixels):
    tower, images = radio_tower(), pixels("larger", batch=2)
    found = tower(images)
    weights = {name: weight.double().numpy() for name, weight in tower.state_dict().items()}
    for token, image in zip(found.last_hidden_state[:, 2], found.image_embeds, strict=True):
        expected = plain_radio_head(weights, token.double().numpy())
        torch.testing.assert_close(image, torch.from_numpy(expected).float(), **CLOSE)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@torch.no_grad()
def test_radios_text_side_is_its_teachers(kind, clip_tokenizer, pixels, tmp_path):
    model = spar_radio(clip_tokenizer, kind)
    processor = make_processor(model.config, clip_tokenizer)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    loaded, processor = spar_hf.load(tmp_path)
    ids = processor(text=["A my_Dog, (sky)!"])
    found = loaded(pixels("larger"), **ids)
    weights = loaded.state_dict()
    if kind == "clip":
        assert ids["input_ids"].shape[1] < 15
        stock = CLIPTextModelWithProjection(loaded.config.text_config).eval()
        stock.text_model.load_state_dict(loaded.text_model.state_dict())
        stock.text_projection.weight.copy_(weights["text_projection.weight"])
        expected = stock(**ids).text_embeds
        bias = 0.0
    else:
        words = clip_tokenizer(["a my dog sky"], padding="max_length", max_length=64, padding_side="right")
        assert ids["input_ids"].tolist() == words["input_ids"]  # lower case, no punctuation, full length
        stock = SiglipTextModel(loaded.config.text_config).eval()
        stock.load_state_dict(loaded.text_model.state_dict())
        expected = stock(**ids).pooler_output
        bias = weights["logit_bias"]
    torch.testing.assert_close(found.text_embeds, expected, **CLOSE)
    cosine = torch.nn.functional.cosine_similarity(found.image_embeds, expected)[:, None]
    torch.testing.assert_close(found.logits_per_image, weights["logit_scale"].exp() * cosine + bias, **CLOSE)
    assert ("logit_bias" in weights) == (kind == "siglip") and ("text_projection.weight" in weights) == (
        kind == "clip"
    )


@torch.no_grad()
def test_states_maps_and_eager_attention(family, pixels):
    images = pixels("off_grid", batch=2)
    found = family.tower(images, output_hidden_states=True, output_attentions=True)
    plain = family.tower(images)
    torch.testing.assert_close(found.patch_embeds, plain.patch_embeds, **CLOSE)
    grid_hw = tuple(plain.patch_embeds.shape[1:3])
    assert grid_hw == ((5, 4) if family.kind.size_rule == "floor" else (6, 5))
    tokens = family.tower.num_prefix_tokens + grid_hw[0] * grid_hw[1]
    assert [state.shape for state in found.hidden_states] == [(2, tokens, 48)] * 4
    assert [weights.shape for weights in found.attentions] == [(2, 3, tokens, tokens)] * 3
    torch.testing.assert_close(found.attentions[1].sum(-1), torch.ones(2, 3, tokens), **CLOSE)
    assert plain.hidden_states is None and plain.attentions is None
    for block in (1, 2):  # what a trunk cache relies on
        again = family.tower.patches_from(found.hidden_states[block], grid_hw, block)
        torch.testing.assert_close(again, plain.patch_embeds, **CLOSE)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh"])
@torch.no_grad()
def test_siglips_activation_is_a_field(hidden_act, pixels, tmp_path):
    stock = stock_siglip()
    stock.save_pretrained(tmp_path)
    tower = SparSiglipVisionModel.from_pretrained(tmp_path, hidden_act=hidden_act)
    assert tower.config.hidden_act == hidden_act
    weights = {name: weight.double().numpy() for name, weight in stock.vision_model.state_dict().items()}
    expected = plain_siglip(weights, pixels("native")[0].double().numpy(), 16, 3, 3, hidden_act)
    torch.testing.assert_close(tower(pixels("native")).patch_embeds[0], torch.from_numpy(expected).float(), **CLOSE)


@pytest.mark.parametrize(("image_px", "patch_px", "native_px"), [(70, 14, 70), (74, 14, 70), (64, 32, 64)])
@torch.no_grad()
def test_siglip_of_any_patch(image_px, patch_px, native_px, pixels, tmp_path):
    """so400m-patch14-384 names a side that is no multiple of its patch; the network sees 27 patches a side."""
    stock = stock_siglip(image_size=image_px, patch_size=patch_px)
    stock.save_pretrained(tmp_path)
    model = SparSiglipModel.from_pretrained(tmp_path)
    assert model.config.vision_config.image_size == native_px
    pooled = stock.vision_model(pixels((image_px, image_px))).pooler_output
    found = model.vision_model(pixels((image_px, image_px))[:, :, :native_px, :native_px])
    torch.testing.assert_close(found.pooler_output, pooled, **CLOSE)
    assert SlidingWindow(model.vision_model, stride_px=24).window_px == native_px


# -------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("layout", ["whole", "sharded", "vision_only"])
@torch.no_grad()
def test_siglips_files_load_whole(layout, pixels, tmp_path):
    stock = stock_siglip()
    saved: Any = stock
    if layout == "vision_only":
        saved = SiglipVisionModel(stock.config.vision_config).eval()
        saved.load_state_dict(stock.vision_model.state_dict())
    saved.save_pretrained(tmp_path, **({"max_shard_size": "100KB"} if layout == "sharded" else {}))
    assert layout != "sharded" or len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = stock.vision_model(pixels("native")).pooler_output
    model, info = SparSiglipVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info == CLEAN
    torch.testing.assert_close(model(pixels("native")).pooler_output, expected, **CLOSE)
    if layout == "vision_only":
        with pytest.raises(ValueError, match=r"holds a vision tower alone, and SparSiglipModel needs the text tower"):
            SparSiglipModel.from_pretrained(tmp_path)
        return
    whole, info = SparSiglipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info == CLEAN
    for name, weight in stock.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], weight, **EXACT)


@torch.no_grad()
def test_saved_towers_keep_the_stock_layout(family, pixels, tmp_path):
    family.tower.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {"AutoConfig", "AutoModel"}
    again, info = type(family.tower).from_pretrained(tmp_path, output_loading_info=True)
    assert info == CLEAN and type(AutoModel.from_pretrained(tmp_path)) is type(family.tower)
    assert again.config.to_diff_dict() == family.tower.config.to_diff_dict()
    images = pixels("off_grid")
    torch.testing.assert_close(again(images).patch_embeds, family.tower(images).patch_embeds, **EXACT)
    if family.kind.stock_tower is not None:
        _, info = family.kind.stock_tower.from_pretrained(tmp_path, output_loading_info=True)
        ours = {name for name in info["unexpected_keys"] if name.startswith(("visual_projection.", "adaptor."))}
        assert info["missing_keys"] == set() == info["unexpected_keys"] - ours


@torch.no_grad()
def test_saved_models_come_back(whole, pixels, tmp_path):
    model, _, folder = whole
    words = torch.tensor([[5, 9, 7, model.config.text_config.eos_token_id]])
    expected = model(pixels("off_grid"), words)
    for load in (type(model).from_pretrained, AutoModel.from_pretrained):
        again, info = load(folder, output_loading_info=True)
        assert type(again) is type(model) and info == CLEAN
        found = again(pixels("off_grid"), words)
        torch.testing.assert_close(found.patch_embeds, expected.patch_embeds, **EXACT)
        torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, atol=1e-6, rtol=0)
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(folder)) is type(model)
    tower, info = type(model.vision_model).from_pretrained(folder, output_loading_info=True)
    assert info == CLEAN
    torch.testing.assert_close(tower(pixels("off_grid")).patch_embeds, expected.patch_embeds, **EXACT)
    if model.config.model_type == "spar_siglip" and model.config.vision_config.num_patches is None:  # as SigLIP's own
        _, info = SiglipModel.from_pretrained(folder, output_loading_info=True)
        assert info["missing_keys"] == set() == info["unexpected_keys"]
    # Any field of the vision configuration, given to the whole model.
    changed = type(model).from_pretrained(folder, size_rule="floor", stride_px=40)
    assert (changed.config.vision_config.size_rule, changed.vision_model.config.stride_px) == ("floor", 40)
    assert changed.vision_model(pixels("off_grid")).patch_embeds.shape[1:3] == (5, 4)


@torch.no_grad()
def test_a_folder_with_a_pickle_alone(family, pixels, tmp_path):
    """As many old checkpoints are: read as tensors and nothing else, saved as safetensors."""
    for file in family.folder.iterdir():
        if file.suffix in (".json", ".txt"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(family.folder / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model, tower, _ = load_tower(tmp_path)
    expected = family.tower(pixels("off_grid")).patch_embeds
    torch.testing.assert_close(tower(pixels("off_grid")).patch_embeds, expected, **EXACT)
    model.save_pretrained(tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").glob("*model*")} == {"model.safetensors"}
    _, tower, _ = load_tower(saved(tower, tmp_path / "tower"))
    torch.testing.assert_close(tower(pixels("off_grid")).patch_embeds, expected, **EXACT)
    torch.save({**weights, "more": open}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"holds more than tensors and cannot be read safely .*save its tensors alone"
    ):
        load_tower(tmp_path)


def test_missing_weights_are_refused(family, tmp_path):
    config = json.loads((family.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    kept = {
        n: w for n, w in load_file(family.folder / "model.safetensors").items() if "mlp" not in n or ".1." not in n
    }
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \d+ of the weights of Spar\w*VisionModel: .*mlp.* Give a "):
        type(family.tower).from_pretrained(tmp_path)


def test_what_a_family_lacks_is_refused(family, tmp_path):
    if isinstance(family.tower, SparVisionModel):
        pytest.skip("MetaCLIP 2's tower is CLIP's and takes CLIP's methods")
    for name in ("naclip", "maskclip"):
        with pytest.raises(
            ValueError, match=rf"method is '{name}'; the methods are CLIP's, and .* Leave the method out"
        ):
            type(family.tower).from_pretrained(family.folder, method=name)
    with pytest.raises(ValueError, match=r"size_rule is 'crop'; choose one of 'floor', 'pad', 'stretch'"):
        type(family.tower).from_pretrained(family.folder, size_rule="crop")


def test_clear_refusals(family, clip_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"position_interpolation is 'size'; DINOv3's positions are rotary"):
        SparDinov3VisionConfig(position_interpolation="size")
    with pytest.raises(ValueError, match=r"vision_use_head is False; without its attention-pooling head"):
        SparSiglipVisionConfig(vision_use_head=False)
    with pytest.raises(ValueError, match=r"the text embedding has 2048 numbers and a patch 48"):
        SparDinov3Config(vision_config={"hidden_size": 48})
    with pytest.raises(ValueError, match=r"num_patches is 200; it must be the patches of a square .* 196, or None"):
        SparSiglipVisionConfig(num_patches=200)
    with pytest.raises(ValueError, match=r"class_token is 3; there are 3 class tokens, counted from 0"):
        SparRadioVisionConfig(**{**RADIO_VISION, "class_token": 3})
    with pytest.raises(ValueError, match=r"adaptor_hidden_size 0; a head has two positive widths"):
        SparRadioVisionConfig(**{**RADIO_VISION, "adaptor_hidden_size": 0})
    with pytest.raises(ValueError, match=r"video_temporal_patch_size is 2: this is a trunk for videos"):
        SparRadioVisionConfig(video_temporal_patch_size=2)
    with pytest.raises(ValueError, match=r"text embedding has 24 numbers and a patch 30; .* teacher \(siglip2-g\)"):
        SparRadioConfig(
            text_config=radio_text(clip_tokenizer, "clip"), vision_config={**RADIO_VISION, "projection_dim": 30}
        )
    with pytest.raises(ValueError, match=r"text tower is of type 'bert'; it must be one of siglip_text_model, "):
        SparRadioConfig(text_config={"model_type": "bert"}, vision_config=RADIO_VISION)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    if family.kind.whole is not None:
        with pytest.raises(
            ValueError,
            match=r"holds a vision tower alone \((dinov3_vit|spar_radio_vision)\), and labels need the text",
        ):
            spar_hf.load(family.folder)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"type 'bert'; those that can be loaded are clip, metaclip_2, siglip"):
        spar_hf.load(tmp_path)


def test_files_that_leave_out_stock_defaults(tmp_path):
    """A stock file need not name what equals the stock class's default, which is not ours."""
    DINOv3ViTModel(DINOv3ViTConfig(**{**DINOV3_VISION, "num_register_tokens": 0})).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_register_tokens", "image_size"):
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tower = SparDinov3VisionModel.from_pretrained(tmp_path)
    assert (tower.config.num_register_tokens, tower.config.image_size, tower.config.hidden_size) == (0, 224, 48)
    assert SparDinov3VisionConfig().image_size == 384  # SPAR's native window
    assert SparSiglipConfig().vision_config.size_rule == "pad" and SparDinov3Config().text_config.hidden_size == 1280


# ---------------------------------------------------------------------- what is built on a dense encoder


@torch.no_grad()
def test_text_side(whole):
    """SigLIP reads 64 tokens, padded, in lower case and without a mask, RADIO's SigLIP2 too; the others' padding makes
    no difference."""
    model, processor, _ = whole
    ids = processor(text=["A Dog"])
    if isinstance(model, SparSiglipModel | SparRadioModel):
        assert set(ids) == {"input_ids"} and ids["input_ids"].shape == (1, 64)
        assert ids["input_ids"][0, 5:].unique().tolist() == [processor.tokenizer.pad_token_id]
        return
    assert ids["input_ids"].shape[1] < 10
    expected = model.get_text_features(**ids).pooler_output[0]
    if isinstance(model, SparDinov3Model):  # the second half
        hidden = model.text_model(**ids).last_hidden_state[0, -1]  # ends with the end-of-text token
        torch.testing.assert_close(expected, (model.text_projection.weight @ hidden)[48:], **CLOSE)
    # The tower is causal and reads the end-of-text token, or averages by the mask.
    padded = processor.tokenizer(["A Dog"], padding="max_length", max_length=20, return_tensors="pt")
    torch.testing.assert_close(model.get_text_features(**padded).pooler_output[0], expected, **CLOSE)


def test_load_pipeline_window_and_evaluation(whole, tmp_path):
    model, processor, folder = whole
    loaded, loaded_processor = spar_hf.load(folder)
    assert type(loaded) is type(model)
    for field in ("templates", "text_padding", "max_length", "lowercase", "strip_punctuation"):
        assert getattr(loaded_processor, field) == getattr(processor, field)
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    segment = pipeline("open-vocabulary-segmentation", model=str(folder))
    result = segment(image, candidate_labels="road; car, automobile; sky", do_resize=False)
    grid_hw = (4, 5) if model.config.vision_config.size_rule == "floor" else (5, 6)
    assert result["segmentation"].shape == (70, 90) and result["grid_hw"] == grid_hw
    assert sum(entry["area_fraction"] for entry in result["segments"]) == pytest.approx(1)
    teacher = SlidingWindow(model.vision_model, window_px=64, stride_px=24)
    windowed = segment(image, candidate_labels="road; car; sky", do_resize=False, encoder=teacher)
    assert windowed["grid_hw"] == grid_hw
    data = load_benchmark("picturebook", scale=1.5, native_px=64)
    protocol = load_protocol(None, "picturebook").replace(templates=("a {}.",))
    segmenter = spar_hf.build_segmenter(model, processor)
    score = evaluate(segmenter, processor, data, protocol=protocol, limit=2, progress=False)
    assert score.num_images == 2 and 0 <= score.mean_iou <= 1
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "SparProcessor"


def test_plain_siglip_loads_with_a_processor_of_its_own(clip_tokenizer, tmp_path):
    stock_siglip(vocab_size=len(clip_tokenizer)).save_pretrained(tmp_path)
    clip_tokenizer.save_pretrained(tmp_path)
    model, processor = spar_hf.load(tmp_path)
    assert isinstance(model, SparSiglipModel)
    assert (processor.text_padding, processor.max_length, processor.lowercase) == ("max_length", 64, True)
    assert processor.image_processor.image_mean == [0.5, 0.5, 0.5] == processor.image_processor.image_std


@torch.no_grad()
def test_window_of_the_whole_image_is_one_pass(family, pixels):
    images = pixels("larger")
    single = family.tower(images)
    window = SlidingWindow(family.tower, window_px=128, stride_px=128)(images)
    torch.testing.assert_close(window.patch_embeds, single.patch_embeds, **CLOSE)


@pytest.mark.parametrize("train", ["last:2", "all", "positions", "patch-embed"])
def test_distillation(family, train, tmp_path):
    """One command as for CLIP: what trains moves, what is frozen is bit-identical, the result loads."""
    flags = ("--student", family.folder, "--images", save_pictures(tmp_path / "pictures", 2), "--output",
             tmp_path / "run", "--window-px", 32, "--stride-px", 24, "--workers", 0, "--tracker", "none", *SIZES,
             "--learning-rate", "1e-3", "--max-steps", 1, "--train", train)  # fmt: skip
    if train == "positions" and family.name == "dinov3":
        with pytest.raises(ValueError, match=r"has no part 'positions'; choose of all, patch-embed, last:1 to last:3"):
            run("distill.py", *flags)
        return
    run("distill.py", *flags)
    student = AutoModel.from_pretrained(tmp_path / "run" / "model")
    tower = getattr(student, "vision_model", student)
    before = dict(family.tower.named_parameters())
    changed = {name for name, weight in tower.named_parameters() if not torch.equal(weight, before[name])}
    prefixes = ("encoder.layers", "encoder.layer", "model.layer", "layers")
    blocks = tuple(f"{prefix}.{block}." for prefix in prefixes for block in (1, 2))
    wanted = {
        "last:2": {name for name in before if name.startswith(blocks) and name not in family.kind.still},
        "all": set(before) - set(family.kind.still),
        "positions": {name for name in before if "position_embedding" in name},
        "patch-embed": {name for name in before if "patch_embedding" in name or "patch_projection" in name},
    }[train]
    assert changed == wanted
    assert tower.config.teacher["method"] == family.tower.config.method


def test_trunk_cache(family, tmp_path):
    """Training on stored features and a stored trunk gives the weights of training on pixels, to fp16."""
    pictures = save_pictures(tmp_path / "pictures", 2)
    shared = ("--student", family.folder, "--images", pictures, "--window-px", 32, "--stride-px", 24, "--workers", 0,
              *SIZES)  # fmt: skip
    run("cache_teacher.py", *shared, "--cache", tmp_path / "cache", "--trunk-blocks", 2)
    results = []
    for name, more in (("pixels", ()), ("trunk", ("--cache", tmp_path / "cache", "--trunk-blocks", 2))):
        run("distill.py", *shared, "--output", tmp_path / name, "--tracker", "none", "--max-steps", 1, "--draws", 1,
            "--learning-rate", "1e-3", *more)  # fmt: skip
        log = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])
        results.append(log["loss"])
    assert results[1] == pytest.approx(results[0], rel=2e-2)
    with safe_open(next((tmp_path / "cache").glob("shard-*")), "pt") as file:
        (trunk,) = (file.get_tensor(name) for name in ["0.trunk"])
        grid = file.get_tensor("0.features").shape[:2]
    assert trunk.shape == (family.tower.num_prefix_tokens + grid[0] * grid[1], 48)
    with pytest.raises(ValueError, match=r"ends 4 blocks before the end; this network has 3 blocks"):
        family.tower.trunk_end(4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(family, pixels):
    model, images = type(family.tower).from_pretrained(family.folder).train(), pixels("off_grid", batch=2)

    def gradients():
        model.zero_grad()
        model(images).patch_embeds.square().mean().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() and len(plain) > 30
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", FEW, indirect=True)
@torch.no_grad()
def test_half_precision_and_compiling(family, pixels):
    images = pixels("off_grid", batch=2)
    exact = family.tower(images).patch_embeds
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.006)):
        half = type(family.tower).from_pretrained(family.folder, dtype=dtype)(images.to(dtype)).patch_embeds
        assert half.dtype == dtype and (half.float() - exact).norm() / exact.norm() < tolerance
    torch._dynamo.reset()
    compiled = torch.compile(family.tower, fullgraph=True, dynamic=True, backend="eager")
    for size in ((96, 112), (90, 75), (64, 64)):
        torch.testing.assert_close(
            compiled(pixels(size)).patch_embeds, family.tower(pixels(size)).patch_embeds, **CLOSE
        )


REMOTE = """
    import sys
    from safetensors.torch import load_file, save_file
    import torch
    from transformers import AutoModel, AutoProcessor
    folder, given, found = sys.argv[1:]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert "spar_hf" not in sys.modules
    inputs = processor(text=["a dog", "sky"])
    with torch.no_grad():
        output = model(load_file(given)["pixels"], **inputs)
    save_file({"patches": output.patch_embeds.contiguous(), "logits": output.logits_per_image.contiguous()}, found)
    print(type(model).__name__, type(processor).__name__)
"""


@pytest.mark.parametrize("whole", FEW, indirect=True)
@torch.no_grad()
def test_remote_code_runs_without_the_package(whole, pixels, tmp_path):
    model, processor, folder = whole
    given, found = tmp_path / "given.safetensors", tmp_path / "found.safetensors"
    save_file({"pixels": pixels("off_grid")}, given)
    assert all(file.name.endswith("_spar.py") for file in folder.glob("*.py"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, "-I", "-c", textwrap.dedent(REMOTE), str(folder), str(given), str(found)]
    run = subprocess.run(script, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [type(model).__name__, "SparProcessor"]
    expected = model(pixels("off_grid"), **processor(text=["a dog", "sky"]))
    torch.testing.assert_close(load_file(found)["patches"], expected.patch_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(load_file(found)["logits"], expected.logits_per_image, atol=1e-5, rtol=0)
