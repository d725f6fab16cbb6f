"""SparVisionModel and SparModel: equal to the stock CLIP where they should be, at any size, type and batch."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from conftest import ROWS, SIZES_HW, VISION, randomise
from torch import nn
from transformers import CLIPVisionModelWithProjection

from spar_hf import SparVisionConfig, SparVisionModel, SparVisionOutput

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(autouse=True)
def _no_gradients(request):
    with torch.set_grad_enabled(request.node.name.startswith("test_gradient")):
        yield


def stock_projected(clip) -> CLIPVisionModelWithProjection:
    model = CLIPVisionModelWithProjection(clip.config.vision_config).eval()
    model.vision_model.load_state_dict(clip.vision_model.state_dict())
    model.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    return model


# --------------------------------------------------------------------------------------- equal to CLIP


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", SIZES_HW)
def test_identity_row_equals_the_stock_model(size, batch, make_clip, make_vision, pixels):
    clip, images = make_clip(), pixels(size, batch)
    ours = make_vision(method="clip")(images, output_hidden_states=True)
    stock = clip.vision_model(images, interpolate_pos_encoding=True, output_hidden_states=True)
    torch.testing.assert_close(ours.last_hidden_state, stock.last_hidden_state, **CLOSE)
    torch.testing.assert_close(ours.pooler_output, stock.pooler_output, **CLOSE)
    assert len(ours.hidden_states) == len(stock.hidden_states) == 13
    for one, other in zip(ours.hidden_states, stock.hidden_states, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    projected = stock_projected(clip)(images, interpolate_pos_encoding=True)
    torch.testing.assert_close(ours.image_embeds, projected.image_embeds, **CLOSE)

    height, width = SIZES_HW[size]
    assert ours.patch_embeds.shape == (batch, height // 16, width // 16, VISION["projection_dim"])
    normed = nn.functional.layer_norm(
        stock.last_hidden_state[:, 1:],
        (48,),
        clip.vision_model.post_layernorm.weight,
        clip.vision_model.post_layernorm.bias,
    )
    patches = (normed @ clip.visual_projection.weight.T).view(ours.patch_embeds.shape)
    torch.testing.assert_close(ours.patch_embeds, patches, **CLOSE)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_identity_row_with_other_activations(activation, pixels):
    config = {**VISION, "num_hidden_layers": 2, "hidden_act": activation}
    stock = CLIPVisionModelWithProjection._from_config(SparVisionConfig(**config)).eval()
    randomise(stock, seed=1)
    ours = SparVisionModel(SparVisionConfig(**config, method="clip")).eval()
    ours.load_state_dict({name.removeprefix("vision_model."): w for name, w in stock.state_dict().items()})
    expected = stock(pixels("off_grid"), interpolate_pos_encoding=True)
    torch.testing.assert_close(ours(pixels("off_grid")).last_hidden_state, expected.last_hidden_state, **CLOSE)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("size", ["larger", "off_grid"])
def test_every_method_leaves_the_image_embedding_alone(name, size, make_clip, make_vision, pixels):
    images = pixels(size, batch=2)
    ours = make_vision(method=name, num_hidden_layers=6, position_interpolation="size")(images)
    stock = stock_projected(make_clip(num_hidden_layers=6))(images, interpolate_pos_encoding=True)
    torch.testing.assert_close(ours.image_embeds, stock.image_embeds, **CLOSE)
    torch.testing.assert_close(
        ours.pooler_output @ make_clip(num_hidden_layers=6).visual_projection.weight.T, stock.image_embeds, **CLOSE
    )


def test_whole_model_equals_the_stock_model(make_clip, make_spar, clip_tokenizer, pixels):
    clip, images = make_clip(num_hidden_layers=6), pixels("larger", batch=2)
    ours = make_spar(num_hidden_layers=6, position_interpolation="size")
    words = clip_tokenizer(["a photo of a dog", "sky", "the sea"], padding=True, return_tensors="pt")
    output = ours(images, **words)
    stock = clip(pixel_values=images, interpolate_pos_encoding=True, **words)
    torch.testing.assert_close(output.logits_per_image, stock.logits_per_image, atol=1e-4, rtol=0)
    features = clip.get_text_features(**words).pooler_output
    torch.testing.assert_close(output.text_embeds, features, **CLOSE)
    torch.testing.assert_close(ours.get_text_features(**words).pooler_output, features, **CLOSE)
    features = clip.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(ours.get_image_features(images).pooler_output, features, **CLOSE)
    torch.testing.assert_close(output.patch_embeds, ours.vision_model(images).patch_embeds, **CLOSE)
    assert output.extent_hw == (112, 128)
    assert ours(images).text_embeds is None and ours(images).logits_per_image is None


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size_hw", [(90, 75), (16, 16), (16, 200), (64, 64)], ids=str)
def test_pad_and_stretch_are_the_plain_model_on_fitted_pixels(size_hw, make_vision, pixels):
    images = pixels(size_hw, batch=2)
    padded_hw = tuple(-(-side // 16) * 16 for side in size_hw)
    padded = torch.zeros(2, 3, *padded_hw)
    padded[:, :, : size_hw[0], : size_hw[1]] = images
    stretched = nn.functional.interpolate(images, padded_hw, mode="bicubic") if padded_hw != size_hw else images
    floored = images[:, :, : size_hw[0] // 16 * 16, : size_hw[1] // 16 * 16]
    plain = make_vision(num_hidden_layers=2)
    for rule, fitted, extent_hw in (
        ("floor", floored, tuple(floored.shape[2:])),
        ("pad", padded, padded_hw),
        ("stretch", stretched, size_hw),
    ):
        output = make_vision(num_hidden_layers=2, size_rule=rule)(images)
        torch.testing.assert_close(output.patch_embeds, plain(fitted).patch_embeds, **CLOSE)
        torch.testing.assert_close(output.image_embeds, plain(fitted).image_embeds, **CLOSE)
        assert tuple(output.image_hw) == size_hw and tuple(output.extent_hw) == extent_hw


@pytest.mark.parametrize("name", ROWS)
def test_a_batch_is_its_images_one_by_one(name, make_vision, pixels):
    model, images = make_vision(method=name, num_hidden_layers=6), pixels("off_grid", batch=3)
    images[1] *= 5  # a statistic that leaked across the batch would show
    together = model(images)
    for image, patches, vector in zip(images, together.patch_embeds, together.image_embeds, strict=True):
        alone = model(image[None])
        torch.testing.assert_close(patches, alone.patch_embeds[0], **CLOSE)
        torch.testing.assert_close(vector, alone.image_embeds[0], **CLOSE)


def test_nothing_is_changed_by_running(make_vision, pixels):
    for name in ROWS:
        model = make_vision(method=name, num_hidden_layers=6)
        images = pixels("off_grid")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        first, copy = model(images).patch_embeds, images.clone()
        model(pixels("larger"))
        torch.testing.assert_close(model(images).patch_embeds, first, rtol=0, atol=0)
        assert torch.equal(images, copy)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("came", "message"),
    [
        (None, r"pixel_values is NoneType; it must be a \(batch, 3, height, width\) tensor. Use SparImageProcessor"),
        (torch.zeros(3, 64, 64), r"pixel_values is \(3, 64, 64\); it must be"),
        (torch.zeros(1, 4, 64, 64), r"pixel_values is \(1, 4, 64, 64\); it must be"),
        (torch.zeros(1, 3, 64, 15), r"image is 64x15 px"),
    ],
)
def test_pixels_that_are_no_image_are_refused(came, message, make_vision):
    with pytest.raises(ValueError, match=message):
        make_vision(num_hidden_layers=2)(came)


def test_outputs_come_as_a_tuple_where_asked(make_vision, pixels):
    model = make_vision(num_hidden_layers=2)
    output = model(pixels("native"))
    assert isinstance(output, SparVisionOutput)
    assert output.hidden_states is None and output.attentions is None
    torch.testing.assert_close(model(pixels("native"), return_dict=False)[0], output.patch_embeds)
    model.set_attn_implementation("eager")  # transformers lets the configuration ask for maps only then
    model.config.output_attentions = model.config.output_hidden_states = True
    assert len(model(pixels("native")).attentions) == 2 and len(model(pixels("native")).hidden_states) == 3
    assert model(pixels("native"), output_attentions=False).attentions is None


# ----------------------------------------------------------------------------------------------- cost


def test_maskclip_computes_neither_queries_nor_attention_for_patches(make_vision, pixels, monkeypatch):
    model = make_vision(method="maskclip")
    calls = {"q_proj": [], "k_proj": [], "v_proj": [], "sdpa": []}
    attention = model.encoder.layers[-1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(
            lambda _, args, __, name=name: calls[name].append(tuple(args[0].shape))
        )
    real = nn.functional.scaled_dot_product_attention

    def spy(query, *args, **kwargs):
        calls["sdpa"].append(tuple(query.shape))
        return real(query, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    model(pixels("larger", batch=2))
    tokens = 1 + 7 * 8
    assert calls["v_proj"] == [(2, tokens, 48)]
    assert calls["q_proj"] == [(2, 1, 48)]  # the class token's query, for image_embeds
    assert calls["k_proj"] == [(2, tokens, 48)]  # and the keys it looks at
    assert calls["sdpa"] == [(2, 3, tokens, 16)] * 11  # twelve blocks, none of it in the last


def test_maskclip_spends_what_the_formula_says(make_vision):
    from torch.utils.flop_counter import FlopCounterMode

    spent = {}
    for name in ("clip", "maskclip"):
        model = make_vision(method=name, num_hidden_layers=1)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 160, 160))
        spent[name] = counter.get_total_flops()
    tokens, width, hidden, out = 101, 48, 64, 24
    patches = 2 * (tokens - 1) * width * 3 * 256
    dense = 2 * tokens * width * (width + width) + 2 * tokens * 2 * width * hidden  # v, out_proj and the MLP
    class_token = 2 * width * width + 2 * tokens * width * width + 2 * 2 * tokens * width  # q, k, scores, mixing
    assert spent["maskclip"] == patches + dense + class_token + 2 * tokens * width * out
    # The queries of the patches; the fused attention is not counted.
    assert spent["clip"] - spent["maskclip"] == 2 * tokens * width * width


# ---------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_half_precision_is_close(name, dtype, make_vision, pixels):
    model, images = make_vision(method=name, num_hidden_layers=6), pixels("off_grid", batch=2)
    exact = model(images)
    half = model.to(dtype)(images, output_attentions=True)
    assert half.patch_embeds.dtype == half.image_embeds.dtype == half.attentions[-1].dtype == dtype
    tolerance = 0.03 if dtype == torch.bfloat16 else 0.004
    for ours, reference in ((half.patch_embeds, exact.patch_embeds), (half.image_embeds, exact.image_embeds)):
        assert (ours.float() - reference).norm() / reference.norm() < tolerance


def test_half_precision_is_as_close_as_the_stock_model(make_clip, make_vision, pixels):
    images = pixels("larger", batch=2)
    exact = make_vision(method="clip")(images).last_hidden_state
    ours = make_vision(method="clip").bfloat16()(images).last_hidden_state.float()
    stock = CLIPVisionModelWithProjection(make_clip().config.vision_config).eval()
    stock.vision_model.load_state_dict(make_clip().vision_model.state_dict())
    theirs = stock.bfloat16().vision_model(images, interpolate_pos_encoding=True).last_hidden_state.float()
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()


def test_autocast_runs_and_is_close(make_vision, pixels):
    images = pixels("off_grid")
    for name in ROWS:
        model = make_vision(method=name, num_hidden_layers=6)
        exact = model(images).patch_embeds
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images).patch_embeds
        assert (mixed.float() - exact).norm() / exact.norm() < 0.03


def test_eager_attention_gives_the_same(make_vision, pixels):
    model = make_vision(method="naclip", num_hidden_layers=6)
    expected = model(pixels("larger")).patch_embeds
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(pixels("larger")).patch_embeds, expected, **CLOSE)


# ------------------------------------------------------------------------------------------- training


def gradients(model, images):
    model.zero_grad()
    output = model(images)
    (output.patch_embeds.square().mean() + output.image_embeds.sin().mean()).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("name", ROWS)
def test_gradient_checkpointing_gives_the_same_gradients(name, make_vision, pixels):
    model, images = make_vision(method=name, num_hidden_layers=6).train(), pixels("off_grid", batch=2)
    plain = gradients(model, images)
    model.gradient_checkpointing_enable()
    runs = []
    model.encoder.layers[2].mlp.fc1.register_forward_hook(lambda *_: runs.append(1))
    checkpointed = gradients(model, images)
    assert len(runs) == 2  # once forward, once again backward
    assert plain.keys() == checkpointed.keys()
    for weight, gradient in plain.items():
        torch.testing.assert_close(checkpointed[weight], gradient, atol=1e-5, rtol=1e-4, msg=weight)


def test_gradients_of_patches_pass_by_the_unused_weights(make_vision, pixels):
    model = make_vision(method="maskclip", num_hidden_layers=3)
    model(pixels("larger")).patch_embeds.square().sum().backward()
    last = dict(model.encoder.layers[-1].named_parameters())
    reached = {name for name, weight in last.items() if weight.grad is not None and weight.grad.abs().sum() > 0}
    assert {name for name in last if name not in reached} == {
        f"self_attn.{projection}_proj.{kind}" for projection in "qk" for kind in ("weight", "bias")
    }
    earlier = model.encoder.layers[0].self_attn
    assert earlier.q_proj.weight.grad.abs().sum() > 0 and earlier.k_proj.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------- compiling


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_compiles_whole_for_any_size(name, make_vision):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_vision(method=name, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for size_hw in ((96, 112), (90, 75), (64, 64), (32, 128), (128, 64), (160, 96)):
        images = torch.randn(2, 3, *size_hw)
        torch.testing.assert_close(compiled(images).patch_embeds, model(images).patch_embeds, **CLOSE)
    # One graph for the native grid, whose positions need no resizing, and one for all other sizes.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_inductor_compiles_it(make_vision):
    torch._dynamo.reset()
    model = make_vision(method="maskclip", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size_hw in ((96, 112), (90, 75)):
        images = torch.randn(2, 3, *size_hw)
        torch.testing.assert_close(compiled(images).patch_embeds, model(images).patch_embeds, atol=1e-4, rtol=0)


def test_running_says_nothing(make_spar, make_vision, clip_tokenizer, pixels, caplog, capfd):
    words = clip_tokenizer(["a dog"], return_tensors="pt")
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        make_spar(num_hidden_layers=2)(pixels("off_grid"), **words)
        for name in ROWS:
            make_vision(method=name, num_hidden_layers=2)(pixels("off_grid"), output_attentions=True)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
