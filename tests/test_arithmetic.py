"""Half precision on a CPU that is slow at it: half-precision weights, fp32 products, the same numbers."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import KINDS, spar_radio, whole_model
from second_networks import SETTINGS, bank_for, networks_for
from torch.utils._python_dispatch import TorchDispatchMode

from spar_hf import METHODS, REFINEMENTS, arithmetic_spar, build_encoder, build_segmenter
from spar_hf.arithmetic_spar import HALF, FullProducts, best_dtype, cpu_is_fast_at, fast_half, products
from spar_hf.families import make_processor
from spar_hf.prompts_spar import Labels
from spar_hf.segmentation_spar import label_map

PRODUCTS = (
    "aten.mm",
    "aten.bmm",
    "addmm",
    "baddbmm",
    "convolution",
    "_scaled_dot_product",
    "layer_norm",
    "aten.linear",
)


class Products(TorchDispatchMode):
    """Notes the type of every product's operands."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in PRODUCTS):
            self.types |= {argument.dtype for argument in args if isinstance(argument, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.fixture
def slow_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is slow at half precision."""
    monkeypatch.setattr(arithmetic_spar, "FAST_ON_CPU", dict.fromkeys(HALF, False))


@pytest.fixture(scope="module")
def small(make_spar: Any, clip_tokenizer: Any) -> dict[str, tuple[Any, Any]]:
    """A model of each family that has methods, and its processor."""
    models = {"clip": make_spar(num_hidden_layers=12).bfloat16(), "radio": spar_radio(clip_tokenizer).bfloat16()}
    return {name: (model, make_processor(model.config, clip_tokenizer)) for name, model in models.items()}


@pytest.fixture(scope="module", params=["clip", *KINDS])
def model(request: Any, make_spar: Any, clip_tokenizer: Any, tmp_path_factory: Any) -> Any:
    if request.param == "clip":
        return make_spar(num_hidden_layers=3, method="gem")
    return whole_model(request.param, clip_tokenizer, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(2, 3, 90, 112, generator=generator),
        "input_ids": torch.randint(2, 400, (3, 9), generator=generator),
    }


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "asked", [{}, {"output_attentions": True, "output_hidden_states": True}], ids=["plain", "all"]
)
@torch.no_grad()
def test_weights_stay_half_and_products_are_full(
    dtype: torch.dtype, asked: Any, model: Any, inputs: Any, slow_half: None
) -> None:
    half = copy.deepcopy(model).to(dtype)
    rounded = copy.deepcopy(half).float()  # the same weights, computed with in fp32
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
    with Products() as seen:
        outputs = half(**inputs, **asked)
    assert seen.types == {torch.float32}
    assert {weight.dtype for weight in half.parameters()} == {dtype}
    wanted = rounded(inputs["pixel_values"].float(), inputs["input_ids"], **asked)
    for name in ("patch_embeds", "image_embeds", "text_embeds", "logits_per_image", "last_hidden_state"):
        assert outputs[name].dtype == dtype
        difference = (outputs[name].float() - wanted[name]).norm() / wanted[name].norm()
        assert difference < 2 * torch.finfo(dtype).eps  # the rounding of the result and of the stored positions
    for name in ("hidden_states", "attentions") if asked else ():
        assert {value.dtype for value in outputs[name]} == {dtype}
    assert outputs.image_hw == (90, 112) and outputs.extent_hw == wanted.extent_hw


@torch.no_grad()
def test_every_way_into_a_model(model: Any, inputs: Any, slow_half: None) -> None:
    half = copy.deepcopy(model).bfloat16()
    pixels, ids = inputs["pixel_values"].bfloat16(), inputs["input_ids"]
    tokens = torch.randn(1, half.vision_model.num_prefix_tokens + 6, 48, dtype=torch.bfloat16)
    with Products() as seen:
        found = [
            half.vision_model(pixels).patch_embeds,
            half.get_text_features(ids).pooler_output,
            half.get_image_features(pixels).pooler_output,
            half.vision_model.patches_from(tokens, (2, 3), first_block=0),
        ]
    assert seen.types == {torch.float32}
    assert {value.dtype for value in found} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["cliper", "sc_clip"])
@torch.no_grad()
def test_methods_that_are_a_file(method: str, make_vision: Any, inputs: Any, slow_half: None) -> None:
    half = make_vision(num_hidden_layers=12).bfloat16()
    with Products() as seen:
        found = build_encoder(half, method)(inputs["pixel_values"].bfloat16()).patch_embeds
    assert seen.types == {torch.float32} and found.dtype == torch.bfloat16
    wanted = build_encoder(copy.deepcopy(half).float(), method)(inputs["pixel_values"]).patch_embeds
    assert (found.float() - wanted).norm() / wanted.norm() < 0.02


def _row(name: str) -> Any:
    """A row of the table of methods; those with a bank or a diffusion model take long to set up."""
    slow = "bank" in METHODS[name].needs or METHODS[name].branch == "generative"
    return pytest.param(name, (), marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(
    ("method", "refine"), [*(_row(name) for name in METHODS), *((None, (name,)) for name in REFINEMENTS)]
)
@torch.no_grad()
def test_every_row_of_the_tables(method: Any, refine: Any, small: Any, slow_half: None, tmp_path: Any) -> None:
    model, processor = small[METHODS[method].family if method else "clip"]
    networks = {
        name: copy.deepcopy(network).bfloat16() if isinstance(network, torch.nn.Module) else network
        for name, network in networks_for(method, refine).items()
    }
    labels = replace(Labels.parse("a red car; the sky, clouds; grass"), definitions=("a thing", None, "it is green"))
    if method and "bank" in METHODS[method].needs:  # made in fp32
        whole = networks_for(method, refine)
        exact = copy.deepcopy(model).float()
        networks["bank"] = bank_for(method, tmp_path / "bank", exact, processor, whole, labels)
    settings = SETTINGS.get(method)
    segmenter = build_segmenter(model, processor, method, networks=networks, settings=settings, refine=refine)
    image = torch.randn(1, 3, 90, 112, dtype=torch.bfloat16)
    with Products() as seen:
        encoded = segmenter.encode_labels(labels, unlabelled=[image])
        (maps,) = segmenter(image, encoded)
        label_map(maps, torch.tensor([0, 1, 1, 2]))
    assert {dtype for dtype in seen.types if dtype in HALF} == set()


def test_gradients_have_the_weights_type(model: Any, inputs: Any, slow_half: None) -> None:
    half = copy.deepcopy(model).bfloat16().train()
    rounded = copy.deepcopy(half).float()
    half(inputs["pixel_values"].bfloat16()).patch_embeds.float().square().mean().backward()
    rounded(inputs["pixel_values"].bfloat16().float()).patch_embeds.square().mean().backward()
    wanted = dict(rounded.vision_model.named_parameters())
    for name, weight in half.vision_model.named_parameters():
        if wanted[name].grad is not None:
            assert weight.grad.dtype == torch.bfloat16
            torch.testing.assert_close(weight.grad.float(), wanted[name].grad, rtol=0.05, atol=0.02)


def test_it_is_said_once(model: Any, inputs: Any, slow_half: None, caplog: Any, monkeypatch: Any) -> None:
    logger = logging.getLogger("spar_hf.arithmetic_spar")
    monkeypatch.setattr(logger, "propagate", True)
    logger.warning_once.cache_clear()
    half = copy.deepcopy(model).bfloat16()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            half(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
        model(**inputs)
    (record,) = caplog.records
    assert "has no fast bfloat16: the weights stay bfloat16, products are made in float32." in record.message


def test_full_precision_and_fast_devices_are_left_alone(monkeypatch: Any) -> None:
    assert not isinstance(products(torch.device("cpu"), torch.float32), FullProducts)
    monkeypatch.setattr(arithmetic_spar, "FAST_ON_CPU", dict.fromkeys(HALF, True))
    assert not isinstance(products(torch.device("cpu"), torch.bfloat16), FullProducts)


def test_the_rule(monkeypatch: Any) -> None:
    assert fast_half("cuda:1", torch.float16) and fast_half("mps", torch.float16)
    for dtype in HALF:
        assert fast_half("cpu", dtype) == cpu_is_fast_at(dtype)
    assert best_dtype("cpu") == (torch.bfloat16 if cpu_is_fast_at(torch.bfloat16) else torch.float32)
    for bf16, fp16 in ((True, True), (True, False), (False, False)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda fp16=fp16: fp16)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        assert cpu_is_fast_at(torch.bfloat16) == bf16 and cpu_is_fast_at(torch.float16) == fp16
    # AVX-512 without bf16 instructions: oneDNN emulates them.
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert not cpu_is_fast_at(torch.bfloat16)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_is_fast_at(torch.bfloat16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not cpu_is_fast_at(torch.bfloat16) and not cpu_is_fast_at(torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
@torch.no_grad()
def test_half_precision_compiles(fast: bool, make_vision: Any, inputs: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(arithmetic_spar, "FAST_ON_CPU", dict.fromkeys(HALF, fast))
    torch._dynamo.reset()
    half, pixels = make_vision(num_hidden_layers=1).bfloat16(), inputs["pixel_values"].bfloat16()
    compiled = torch.compile(half, fullgraph=fast, backend="eager")  # a mode breaks the graph
    found, wanted = compiled(pixels).patch_embeds, half(pixels).patch_embeds
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted.float(), atol=0.02, rtol=0.02)


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.slow
def test_on_a_cpu_held_to_avx2() -> None:
    code = """
import torch
from spar_hf.arithmetic_spar import best_dtype, cpu_capability, fast_half
from spar_hf import SparVisionConfig, SparVisionModel
assert best_dtype("cpu") == torch.float32 and not fast_half("cpu", torch.float16)
assert cpu_capability() == "AVX2", cpu_capability()
model = SparVisionModel(SparVisionConfig(num_hidden_layers=1)).bfloat16()
print(model(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)).patch_embeds.dtype)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **AVX2}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.bfloat16"
    assert "this CPU (AVX2) has no fast bfloat16: the weights stay bfloat16" in done.stderr
