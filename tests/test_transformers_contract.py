"""Every family behaves as any other model of transformers: its common model tests, adapters, int8, offloading."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import KINDS, spar_siglip, whole_model
from huggingface_hub import ModelHubMixin
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, CLIPVisionModel

from spar_hf.encoders.sliding_window import SlidingWindow
from spar_hf.processing_spar import SparProcessor

# The other families share their code with these.
FAMILIES = [
    "clip", *(name if name in ("siglip", "dinov3") else pytest.param(name, marks=pytest.mark.slow) for name in KINDS)
]  # fmt: skip
EXACT = {"atol": 0.0, "rtol": 0.0}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
EMBEDS = ("patch_embeds", "image_embeds", "text_embeds")
# Of CLIP a recipe that looks at blocks before the last, so that what goes from block to block is tested too.
METHOD = "resclip"


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: Any, make_spar: Any, clip_tokenizer: Any, tmp_path_factory: Any) -> Any:
    """A small whole model of each family with random weights; tests that change it take a copy."""
    if request.param == "clip":
        return make_spar(num_hidden_layers=6, method=METHOD)
    return whole_model(request.param, clip_tokenizer, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def inputs(pixels_of: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 400, (3, 9), generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels_of(90, 75, 2), "input_ids": ids}


@pytest.fixture(scope="module")
def pixels_of() -> Callable[..., torch.Tensor]:
    def make(height: int, width: int, batch: int = 1) -> torch.Tensor:
        return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))

    return make


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    outputs = model(**inputs)
    return {name: outputs[name].float() for name in (*EMBEDS, "logits_per_image")}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference, as a share of the wanted norm."""
    return float((found - wanted).norm() / wanted.norm())


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], **tolerance: float) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **(tolerance or CLOSE))


# ------------------------------------------------------------------- transformers' common model tests


def test_runs_are_the_same_each_time(model: Any, inputs: Any) -> None:
    same(run(model, inputs), run(model, inputs), **EXACT)


@pytest.mark.parametrize("part", ["whole", "vision_model"])
def test_save_and_load(part: str, model: Any, inputs: Any, tmp_path: Path) -> None:
    model = model if part == "whole" else model.vision_model
    inputs = inputs if part == "whole" else {"pixel_values": inputs["pixel_values"]}
    model.save_pretrained(tmp_path)
    for again in (type(model).from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(again) is type(model)
        assert again.state_dict().keys() == model.state_dict().keys()
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(**inputs).patch_embeds, model(**inputs).patch_embeds, **EXACT)


def test_save_and_load_with_torch_and_by_pickle(model: Any, inputs: Any, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = type(model)(model.config).eval()
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    same(run(again, inputs), run(model, inputs), **EXACT)
    torch.save(model, tmp_path / "model.pt")
    same(run(torch.load(tmp_path / "model.pt", weights_only=False), inputs), run(model, inputs), **EXACT)


def test_config_survives_the_round_trip(model: Any, tmp_path: Path) -> None:
    config = model.config
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    again.name_or_path = config.name_or_path
    assert again.to_dict() == config.to_dict()
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert json.loads(config.to_json_string())["model_type"] == config.model_type
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    vision = config.vision_config
    assert type(vision)(**vision.to_dict()).to_dict() == vision.to_dict()


def test_forward_signature(model: Any) -> None:
    parameters = inspect.signature(model.forward).parameters
    assert list(parameters)[:2] == ["pixel_values", "input_ids"]
    assert model.main_input_name == model.vision_model.main_input_name == "pixel_values"
    assert next(iter(inspect.signature(model.vision_model.forward).parameters)) == "pixel_values"


def test_tuples_hold_what_dictionaries_hold(model: Any, inputs: Any) -> None:
    vision = model.vision_model
    with torch.no_grad():
        whole, tower = model(**inputs), vision(inputs["pixel_values"])
        whole_tuple, tower_tuple = (
            model(**inputs, return_dict=False),
            vision(inputs["pixel_values"], return_dict=False),
        )
    for found, wanted in ((whole_tuple, whole), (tower_tuple, tower)):
        assert isinstance(found, tuple) and len(found) == len(wanted.to_tuple())
        torch.testing.assert_close(found[0], wanted.patch_embeds, **EXACT)


@pytest.mark.parametrize("by", ["argument", "config"])
def test_hidden_states_and_attentions(by: str, model: Any, inputs: Any) -> None:
    vision = copy.deepcopy(model.vision_model)
    asked = {"output_hidden_states": True, "output_attentions": True}
    if by == "config":
        vision.set_attn_implementation("eager")  # transformers takes output_attentions with no other
        vision.config.output_hidden_states, vision.config.output_attentions = True, True
    with torch.no_grad():
        plain = model.vision_model(inputs["pixel_values"])
        outputs = vision(inputs["pixel_values"], **(asked if by == "argument" else {}))
    rows, columns = outputs.patch_embeds.shape[1:3]
    tokens, layers = vision.num_prefix_tokens + rows * columns, vision.config.num_hidden_layers
    assert [state.shape for state in outputs.hidden_states] == [(2, tokens, 48)] * (layers + 1)
    assert [weights.shape for weights in outputs.attentions] == [(2, 3, tokens, tokens)] * layers
    assert plain.hidden_states is None and plain.attentions is None
    torch.testing.assert_close(outputs.patch_embeds, plain.patch_embeds, **CLOSE)


def test_gradients_reach_hidden_states_and_attentions(model: Any, inputs: Any) -> None:
    vision = copy.deepcopy(model.vision_model).train()
    outputs = vision(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    states, maps = outputs.hidden_states[0], outputs.attentions[0]
    states.retain_grad()
    maps.retain_grad()
    outputs.patch_embeds.square().sum().backward()
    assert states.grad.abs().sum() > 0 and maps.grad.abs().sum() > 0


def test_every_weight_learns(model: Any, inputs: Any) -> None:
    model = copy.deepcopy(model).train()
    outputs = model(**inputs)
    (outputs.patch_embeds.square().sum() + outputs.logits_per_image.square().sum()).backward()
    unused = [name for name, weight in model.named_parameters() if weight.grad is None]
    # DINOv3's mask token is for its own training.
    assert [name for name in unused if "mask_token" not in name] == []


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool, model: Any, inputs: Any) -> None:
    gradients = {}
    for checkpointed in (False, True):
        student = copy.deepcopy(model).train()
        if checkpointed:
            student.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert student.vision_model.blocks[0].gradient_checkpointing
        outputs = student(**inputs)
        (outputs.patch_embeds.square().mean() + outputs.image_embeds.square().mean()).backward()
        gradients[checkpointed] = {n: w.grad for n, w in student.named_parameters() if w.grad is not None}
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, **CLOSE)


def test_training_mode_changes_nothing(model: Any, inputs: Any) -> None:
    same(run(copy.deepcopy(model).train(), inputs), run(model, inputs), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, model: Any, inputs: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    assert half.dtype == half.vision_model.dtype == dtype and half.config.dtype == dtype
    other = copy.deepcopy(model).to(dtype)
    halves = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
    with torch.no_grad():
        assert half(**halves).patch_embeds.dtype == half(**halves).logits_per_image.dtype == dtype
    found, wanted = run(half, halves), run(model, inputs)
    same(found, run(other, halves), **EXACT)
    for name in EMBEDS:
        assert error(found[name], wanted[name]) < 0.02
    half.save_pretrained(tmp_path / "half")
    assert type(model).from_pretrained(tmp_path / "half", dtype="auto").dtype == dtype


def test_a_batch_is_its_images_one_by_one(model: Any, inputs: Any) -> None:
    with torch.no_grad():
        together = model(**inputs).patch_embeds
        for index, image in enumerate(inputs["pixel_values"]):
            alone = model(pixel_values=image[None]).patch_embeds[0]
            torch.testing.assert_close(alone, together[index], **CLOSE)


def test_text_embeddings_can_be_resized(model: Any, inputs: Any) -> None:
    whole = copy.deepcopy(model)
    size = whole.config.text_config.vocab_size
    whole.text_model.resize_token_embeddings(size + 5)
    assert whole.text_model.get_input_embeddings().weight.shape[0] == size + 5
    same(run(whole, inputs), run(model, inputs), **CLOSE)


def test_input_embeddings_and_parts_are_where_transformers_looks(model: Any) -> None:
    assert isinstance(model.text_model.get_input_embeddings(), nn.Embedding)
    assert isinstance(model.vision_model.get_input_embeddings(), nn.Module)
    assert model.num_parameters() == sum(weight.numel() for weight in model.parameters())
    # Nothing is tied: two names for one tensor would be saved once.
    assert len({weight.data_ptr() for weight in model.parameters()}) == len(list(model.parameters()))


def test_initialisation_leaves_no_weight_out(model: Any) -> None:
    torch.manual_seed(0)
    fresh = type(model)(copy.deepcopy(model.config))
    for name, weight in fresh.named_parameters():
        assert torch.isfinite(weight).all() and weight.abs().max() < 50, name
    twin = type(model)._from_config(copy.deepcopy(model.config))
    assert twin.state_dict().keys() == fresh.state_dict().keys()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(attention: str, model: Any, inputs: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert other.config._attn_implementation == attention
    same(run(other, inputs), run(model, inputs))


# -------------------------------------------------------------- what is put around a model, or into it


def linear_layers(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers."""
    return sorted({name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)})


def lora(model: Any, targets: list[str]) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SigLIP's packed attention
        return peft.get_peft_model(copy.deepcopy(model), config)


def test_an_adapter_on_any_projection_is_the_merged_model(model: Any, inputs: Any) -> None:
    before = run(model, inputs)
    targets = sorted({*linear_layers(model)} - {"head"})  # SigLIP's vision head has that name and is no layer
    assert {"q_proj", "k_proj", "v_proj"} <= set(targets)
    for names in (["k_proj"], ["q_proj", "v_proj"], targets):
        adapted = lora(model, names)
        with_adapter = run(adapted, inputs)
        for name in ("patch_embeds", "image_embeds") if names != ["k_proj"] else ("image_embeds",):
            assert error(with_adapter[name], before[name]) > 0.01  # it does something
        with adapted.disable_adapter():
            same(run(adapted, inputs), before)
        same(run(adapted.merge_and_unload(), inputs), with_adapter, atol=1e-4, rtol=1e-4)


def test_an_adapter_on_siglips_packed_attention(clip_tokenizer: Any, inputs: Any, tmp_path: Path) -> None:
    model = spar_siglip(clip_tokenizer, tmp_path).eval()
    adapted = lora(model, ["attention"])
    with_adapter = run(adapted, inputs)
    assert error(with_adapter["patch_embeds"], run(model, inputs)["patch_embeds"]) > 0.05
    same(run(adapted.merge_and_unload(), inputs), with_adapter, atol=1e-4, rtol=1e-4)


def test_an_adapter_trains_alone(model: Any, inputs: Any) -> None:
    adapted = lora(model, ["k_proj", "v_proj"]).train()
    adapted(**inputs).image_embeds.square().mean().backward()
    learning = {name for name, weight in adapted.named_parameters() if weight.grad is not None}
    assert learning and all("lora_" in name for name in learning)
    last = adapted.base_model.model.vision_model.blocks[-1]
    grown = [part.lora_B["default"].weight.grad for name, part in last.named_modules() if name.endswith("k_proj")]
    assert grown and all(gradient.abs().sum() > 0 for gradient in grown)


def test_projections_are_called_and_not_read(model: Any, inputs: Any) -> None:
    """A forward hook sees every projection, and what it returns counts: adapters, quantisation, offloading need it."""
    before = run(model, inputs)
    for layer in linear_layers(model.vision_model):
        changed = copy.deepcopy(model)
        parts = {
            name: part
            for name, part in changed.vision_model.named_modules()
            if name.rsplit(".", 1)[-1] == layer and isinstance(part, nn.Linear)
        }
        seen = set()
        for name, part in parts.items():
            # Channels unlike each other: a norm that follows takes out what all share.
            scale = torch.linspace(0.5, 1.5, part.out_features)
            part.register_forward_hook(
                lambda _, __, output, name=name, seen=seen, scale=scale: seen.add(name) or output * scale
            )
        assert error(run(changed, inputs)["image_embeds"], before["image_embeds"]) > 1e-3, layer
        assert seen == set(parts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_int8_is_within_a_few_per_cent(model: Any, inputs: Any) -> None:
    eight_bits = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    found, wanted = run(eight_bits, inputs), run(model, inputs)
    for name in EMBEDS:
        assert 0 < error(found[name], wanted[name]) < 0.05
    assert (F.cosine_similarity(found["patch_embeds"], wanted["patch_embeds"], dim=-1) > 0.99).all()


def test_torchao_int8_is_within_a_few_per_cent(model: Any, inputs: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    eight_bits = copy.deepcopy(model)
    quantization.quantize_(eight_bits, quantization.Int8WeightOnlyConfig())
    found, wanted = run(eight_bits, inputs), run(model, inputs)
    for name in EMBEDS:
        assert 0 < error(found[name], wanted[name]) < 0.05


def test_cpu_offload(model: Any, inputs: Any) -> None:
    from accelerate import cpu_offload

    offloaded = copy.deepcopy(model)
    cpu_offload(offloaded, execution_device="cpu")
    assert all(weight.device.type == "meta" for weight in offloaded.parameters())
    assert offloaded.device == offloaded.vision_model.device == torch.device("cpu")
    same(run(offloaded, inputs), run(model, inputs), **EXACT)
    with torch.no_grad():
        tower = SlidingWindow(offloaded.vision_model, stride_px=32)(inputs["pixel_values"])
        wanted = SlidingWindow(model.vision_model, stride_px=32)(inputs["pixel_values"])
    torch.testing.assert_close(tower.patch_embeds, wanted.patch_embeds, **EXACT)


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(where: Any, model: Any, inputs: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    same(run(type(model).from_pretrained(tmp_path, device_map=where), inputs), run(model, inputs), **EXACT)


@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")
def test_device_map_with_parts_on_the_disk(model: Any, inputs: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    parts = {name: "disk" if "text" in name else "cpu" for name, _ in model.named_children()}
    parts |= {name: "cpu" for name, _ in model.named_parameters(recurse=False)}  # logit_scale
    spread = type(model).from_pretrained(tmp_path, device_map=parts, offload_folder=tmp_path / "offloaded")
    same(run(spread, inputs), run(model, inputs), **EXACT)


@pytest.mark.slow
def test_the_whole_model_compiles(model: Any, inputs: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    same(run(compiled, inputs), run(model, inputs))


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.slow
def test_torch_export_takes_any_size(model: Any, pixels_of: Any) -> None:
    """One program of transformers' own forward pass, for other batches and sizes than that of its example."""
    auto = torch.export.Dim.AUTO
    shapes = {"pixel_values": {0: auto, 2: auto, 3: auto}}
    with torch.no_grad():
        program = torch.export.export(
            model.vision_model, (), {"pixel_values": pixels_of(149, 115, 2)}, dynamic_shapes=shapes, strict=False
        )
        # Guards of the example's size class, such as H // 16 > 4, are no part of the arithmetic.
        exported = program.module(check_guards=False)
        for size in ((90, 75, 1), (112, 128, 3), (32, 128, 2)):
            pixels = pixels_of(*size)
            found, wanted = exported(pixel_values=pixels), model.vision_model(pixels)
            torch.testing.assert_close(found["patch_embeds"], wanted.patch_embeds, atol=1e-4, rtol=1e-4)


def test_heads_are_masked_by_nobody(model: Any) -> None:
    """transformers 5 took `head_mask` out of CLIP; where it returns, ours are to take it as well."""
    for forward in (CLIPVisionModel.forward, type(model.vision_model).forward, type(model).forward):
        assert "head_mask" not in inspect.signature(forward).parameters


# ------------------------------------------------------------------------- huggingface_hub's ModelHubMixin


def test_saving_and_loading_take_the_hubs_keywords(model: Any, inputs: Any, tmp_path: Path) -> None:
    """Those of `ModelHubMixin.from_pretrained` and `save_pretrained`; configuration given at loading wins."""
    folder = tmp_path / "saved"
    assert model.save_pretrained(folder, push_to_hub=False) is None
    hub = {"revision": None, "token": False, "cache_dir": tmp_path / "cache", "force_download": False}
    again = type(model).from_pretrained(str(folder), local_files_only=True, **hub)
    same(run(again, inputs), run(model, inputs), **EXACT)
    given = copy.deepcopy(model.config)
    given.vision_config.size_rule = "pad" if given.vision_config.size_rule != "pad" else "stretch"
    assert (
        type(model).from_pretrained(folder, config=given).config.vision_config.size_rule
        == given.vision_config.size_rule
    )
    wanted = set(inspect.signature(ModelHubMixin.push_to_hub).parameters)
    # transformers has no filters of files: what it uploads is what it saved.
    missing = wanted - set(inspect.signature(type(model).push_to_hub).parameters)
    assert missing <= {"config", "branch", "allow_patterns", "ignore_patterns", "delete_patterns", "model_card_kwargs"}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
def test_pixels_that_are_no_floats_are_refused(dtype: torch.dtype, model: Any) -> None:
    image = torch.zeros(1, 3, 64, 64, dtype=dtype)
    message = rf"pixel_values is of type {dtype}; it must hold floats, normalised .* Use SparImageProcessor\."
    for encoder in (model, model.vision_model, SlidingWindow(model.vision_model)):
        with pytest.raises(ValueError, match=message):
            encoder(image)


@pytest.mark.parametrize("brightest", [255, 60])
def test_pixels_of_0_to_255_are_refused(brightest: int, model: Any) -> None:
    image = torch.linspace(0, brightest, 64 * 64).view(1, 1, 64, 64).expand(1, 3, 64, 64)
    message = rf"pixel_values reach from 0 to {brightest}; normalised .* they lie in ±\d.* Use SparImageProcessor"
    for encoder in (model, model.vision_model, SlidingWindow(model.vision_model)):
        with pytest.raises(ValueError, match=message):
            encoder(image)
    with torch.no_grad():
        model.vision_model(image / brightest)  # not told from normalised pixels of a bright picture


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_pixels_that_are_no_numbers_are_refused(value: float, model: Any, pixels_of: Any) -> None:
    image = pixels_of(64, 64)
    image[0, 1, 5, 7] = value
    with pytest.raises(ValueError, match="pixel_values hold NaN or infinity"):
        model.vision_model(image)


def test_an_empty_batch_is_refused(model: Any) -> None:
    for encoder in (model, model.vision_model, SlidingWindow(model.vision_model)):
        with pytest.raises(ValueError, match=r"pixel_values is \(0, 3, 64, 64\): there is no image in the batch"):
            encoder(torch.zeros(0, 3, 64, 64))


def test_a_model_without_weights_is_refused_and_gives_shapes(model: Any, pixels_of: Any) -> None:
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match="the model is on the meta device, where weights have no values"):
        empty(pixel_values=pixels_of(64, 64))
    with torch.no_grad():
        found = empty.vision_model(pixels_of(64, 64).to("meta")).patch_embeds
    assert found.is_meta and found.shape == model(pixel_values=pixels_of(64, 64)).patch_embeds.shape


@pytest.mark.parametrize("field", ["image_mean", "image_std"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_means_and_deviations_that_are_no_numbers_are_refused(field: str, value: float, model: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} is \[0\.5, {value}, 0\.5\]"):
        type(model.config.vision_config)(**{field: [0.5, value, 0.5]})


# ------------------------------------------------------------------------- from the processor to the model


def test_what_the_processor_gives_goes_into_the_model(model: Any, spar_processor: SparProcessor) -> None:
    picture = torch.randint(0, 256, (70, 90, 3), dtype=torch.uint8).numpy()
    both = spar_processor(images=[picture, picture], text=["a photo of a dog", "sky"])
    assert "original_sizes" in both
    with torch.no_grad():
        outputs = model(**both)
        assert outputs.logits_per_image.shape == (2, 2)
        image = spar_processor(images=picture)
        for found in (model(**image), model.vision_model(**image)):
            assert found.patch_embeds.shape[:3] == outputs.patch_embeds[:1].shape[:3]
        assert model.get_image_features(**image).pooler_output.shape == outputs.image_embeds[:1].shape
        assert model(**spar_processor(images=picture), input_ids=both["input_ids"]).text_embeds.shape[0] == 2
