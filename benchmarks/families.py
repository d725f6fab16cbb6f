"""Times one pass of each family's ViT-B (random weights) against the source's own class, on this machine.

    python benchmarks/families.py

`stock` is the vision model of transformers, or of timm for EVA-02 and PE-Core (left out where timm is not installed):
for SigLIP and PE-Core it gives one vector per image and none of the text space per patch, for RADIO the trunk without
a head. `stock+head` is the same and the head on each patch, written plainly (SigLIP's pooling head's value, projection
and MLP; a head of RADIO's, on the class token too): what `ours` gives. Models take turns in every round, every other
round in reverse. Figures are CPU seconds of the process, which other work on the machine changes little, the least of
the rounds. On Linux the heap keeps what it has, for all models alike: left alone, glibc gives a model's largest
buffers back after each block or not, as the heap happens to lie, and taking them again costs up to 6 % of a pass.
Writes benchmarks/results/families.json with the command.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mismatched_torchvision  # noqa: F401 - before transformers looks for it
import torch
from record import origin
from torch import nn

from spar_hf.files import write_json

RESULTS = Path(__file__).parent / "results" / "families.json"
SIZES = ("512x512", "1024x1024")
SIGLIP = {"image_size": 512, "patch_size": 16}
VIT_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
PE_CORE = {
    "design": "pe_core",
    "intermediate_size": 3072,
    "projection_dim": 512,
    "layer_norm_eps": 1e-5,
    "rope_grid": 14,
    "rope_offset": 1.0,
}
DINOV3 = {**VIT_B, "num_register_tokens": 4, "image_size": 512}
RADIO = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_cls_tokens": 4,
    "num_registers": 4,
}
RADIO_HEAD = {"adaptor_hidden_size": 1536, "adaptor_num_blocks": 2, "projection_dim": 1536}


def siglip(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    from spar_hf import SparSiglipVisionConfig, SparSiglipVisionModel

    model = SparSiglipVisionModel(SparSiglipVisionConfig(**SIGLIP)).eval().to(dtype)
    return lambda pixels: model(pixels).patch_embeds


def stock_siglip(height_px: int, width_px: int, dtype: torch.dtype, head: bool = False) -> Callable:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = SiglipVisionModel(SiglipVisionConfig(**SIGLIP)).eval().to(dtype)

    def run(pixels: torch.Tensor) -> torch.Tensor:
        output = model(pixels, interpolate_pos_encoding=True)
        if not head:
            return output.pooler_output
        attention, width = model.head.attention, model.config.hidden_size
        weight, bias = attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
        values = attention.out_proj(nn.functional.linear(output.last_hidden_state, weight, bias))
        return values + model.head.mlp(model.head.layernorm(values))

    return run


def stock_siglip_head(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    return stock_siglip(height_px, width_px, dtype, head=True)


def dinov3(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    from spar_hf import SparDinov3VisionConfig, SparDinov3VisionModel

    model = SparDinov3VisionModel(SparDinov3VisionConfig(**DINOV3)).eval().to(dtype)
    return lambda pixels: model(pixels).patch_embeds


def stock_dinov3(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    model = DINOv3ViTModel(DINOv3ViTConfig(**DINOV3)).eval().to(dtype)
    return lambda pixels: model(pixels).last_hidden_state


def naflex(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    from spar_hf import SparSiglipVisionConfig, SparSiglipVisionModel

    config = SparSiglipVisionConfig(image_size=256, patch_size=16, num_patches=256, size_rule="stretch")
    model = SparSiglipVisionModel(config).eval().to(dtype)
    return lambda pixels: model(pixels).patch_embeds


def stock_naflex(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    model = Siglip2VisionModel(Siglip2VisionConfig()).eval().to(dtype)
    grid_hw = (height_px // 16, width_px // 16)
    mask, shapes = torch.ones(1, grid_hw[0] * grid_hw[1], dtype=torch.long), torch.tensor([grid_hw])

    def run(pixels: torch.Tensor) -> torch.Tensor:
        patches = pixels.unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).permute(0, 2, 4, 3, 5, 1)
        return model(patches.flatten(3).flatten(1, 2), mask, shapes).pooler_output

    return run


def tips(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    from spar_hf import SparTipsVisionConfig, SparTipsVisionModel

    model = SparTipsVisionModel(SparTipsVisionConfig()).eval().to(dtype)
    return lambda pixels: model(pixels).patch_embeds


def stock_tips(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    from transformers import Tipsv2VisionConfig, Tipsv2VisionModel

    model = Tipsv2VisionModel(Tipsv2VisionConfig()).eval().to(dtype)
    return lambda pixels: model(pixels).last_hidden_state


def eva(height_px: int, width_px: int, dtype: torch.dtype, **design: Any) -> Callable:
    from spar_hf import SparEvaVisionConfig, SparEvaVisionModel

    model = SparEvaVisionModel(SparEvaVisionConfig(**design)).eval().to(dtype)
    return lambda pixels: model(pixels).patch_embeds


def pe_core(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    return eva(height_px, width_px, dtype, **PE_CORE)


def stock_eva(
    height_px: int, width_px: int, dtype: torch.dtype, name: str = "eva02_base_patch16_clip_224"
) -> Callable:
    import timm

    model = timm.create_model(name, dynamic_img_size=True, num_classes=PE_CORE["projection_dim"]).eval().to(dtype)
    return lambda pixels: model(pixels)


def stock_pe_core(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    return stock_eva(height_px, width_px, dtype, "vit_pe_core_base_patch16_224")


def stock_pe_core_head(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    import timm

    name, text_width = "vit_pe_core_base_patch16_224", PE_CORE["projection_dim"]
    model = timm.create_model(name, dynamic_img_size=True, num_classes=text_width).eval().to(dtype)
    pool = model.attn_pool
    width = pool.kv.weight.shape[1]

    def run(pixels: torch.Tensor) -> torch.Tensor:
        tokens = model.forward_features(pixels)
        values = pool.proj(nn.functional.linear(tokens, pool.kv.weight[width:], pool.kv.bias[width:]))
        return model.head(values + pool.mlp(pool.norm(values)))

    return run


def radio(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    from spar_hf import SparRadioVisionConfig, SparRadioVisionModel

    model = SparRadioVisionModel(SparRadioVisionConfig(**RADIO, **RADIO_HEAD)).eval().to(dtype)
    return lambda pixels: model(pixels).patch_embeds


def stock_radio(height_px: int, width_px: int, dtype: torch.dtype, head: bool = False) -> Callable:
    from transformers import RadioConfig, RadioModel

    model = RadioModel(RadioConfig(**RADIO)).eval().to(dtype)
    if not head:
        return lambda pixels: model(pixels).features
    width = RADIO_HEAD["adaptor_hidden_size"]
    first = nn.Linear(model.config.hidden_size, width).to(dtype)
    steps = [nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width)).to(dtype) for _ in range(3)]

    def run(pixels: torch.Tensor) -> torch.Tensor:
        output = model(pixels)
        x = first(torch.cat([output.summary[:, None, : model.config.hidden_size], output.features], dim=1))
        for step in steps[:-1]:
            x = x + step(x)
        return steps[-1](x)

    return run


def stock_radio_head(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    return stock_radio(height_px, width_px, dtype, head=True)


FAMILIES = {
    "siglip": {"ours": siglip, "stock": stock_siglip, "stock+head": stock_siglip_head},
    "dinov3": {"ours": dinov3, "stock": stock_dinov3},
    "naflex": {"ours": naflex, "stock": stock_naflex},
    "tips": {"ours": tips, "stock": stock_tips},
    "radio": {"ours": radio, "stock": stock_radio, "stock+head": stock_radio_head},
}
if importlib.util.find_spec("timm") is not None:
    FAMILIES |= {
        "eva02": {"ours": eva, "stock": stock_eva},
        "pe_core": {"ours": pe_core, "stock": stock_pe_core, "stock+head": stock_pe_core_head},
    }


def keep_heap() -> None:
    """Memory once taken from the system stays with the process; glibc only."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_max, 0)


def compare(models: dict[str, Callable], size: str, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """CPU seconds of each model at one size and type, after a pass that is not counted."""
    height_px, width_px = map(int, size.split("x"))
    pixels = torch.randn(1, 3, height_px, width_px, dtype=dtype)
    runs = {name: build(height_px, width_px, dtype) for name, build in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        for name in names[:: -1 if turn % 2 else 1]:
            started = time.process_time()
            runs[name](pixels)
            if turn:
                seconds[name].append(time.process_time() - started)
    return {name: min(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="height x width in pixels, such as 512x768")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if sys.platform == "linux":
        keep_heap()
    table = []
    print(f"{'size':>10} {'type':>9} {'family':>8} {'model':>11} {'CPU s':>8} {'vs ours':>8}")
    for size in args.sizes:
        for dtype in args.dtypes:
            for family in args.families:
                with torch.inference_mode():
                    seconds = compare(FAMILIES[family], size, getattr(torch, dtype), args.rounds)
                for name, value in seconds.items():
                    ratio = value / seconds["ours"]
                    row = {"size": size, "dtype": dtype, "family": family, "model": name}
                    table.append({**row, "cpu_seconds": value, "ratio_to_ours": ratio})
                    print(f"{size:>10} {dtype:>9} {family:>8} {name:>11} {value:>8.2f} {ratio:>8.2f}", flush=True)
    write_json(args.output, {**origin(), "rows": table})
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
