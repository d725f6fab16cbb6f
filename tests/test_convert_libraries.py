"""Conversion against open_clip and timm themselves: their models saved, converted, compared. Skips without them."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

import spar_hf
from spar_hf.conversion import convert
from spar_hf.conversion.layouts import Asked

if importlib.util.find_spec("torchvision") is not None:
    # open_clip needs torchvision's transforms alone; where its operators do not fit this torch, the import fails.
    for operator in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed", exc_type=ImportError)

SIZES = ((64, 64), (96, 96), (64, 112), (90, 75))
TEXT = {"context_length": 64, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}


@pytest.fixture(scope="module")
def bpe() -> str:
    return str(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz")


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "logit" not in name:
                std = weight[0].numel() ** -0.5 if weight.ndim > 1 and "embed" not in name else 0.4
                weight.copy_(std * torch.randn(weight.shape, generator=generator) + (weight.ndim == 1) * weight)


def pixels_of(size_hw):
    return torch.randn(2, 3, *size_hw, generator=torch.Generator().manual_seed(sum(size_hw)))


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize(("patch_px", "image_px"), [(16, 64), (32, 64), (14, 56)])
@torch.no_grad()
def test_open_clips_vit(patch_px, image_px, quick_gelu, bpe, tmp_path):
    vision = {"image_size": image_px, "layers": 3, "width": 128, "head_width": 64, "patch_size": patch_px}
    theirs = open_clip.CLIP(64, vision, {**TEXT, "context_length": 77}, quick_gelu=quick_gelu).eval()
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    asked = Asked("quick_gelu" if quick_gelu else "gelu", heads=2, text_heads=2)
    convert([tmp_path / "clip.pt"], "clip", tmp_path / "out", asked, bpe)
    model, processor = spar_hf.load(tmp_path / "out", method="clip")
    pixels = pixels_of((image_px, image_px))
    torch.testing.assert_close(model.vision_model(pixels).image_embeds, theirs.encode_image(pixels), atol=2e-5, rtol=0)
    # open_clip's own tokens and text tower, and ours.
    texts = ["a photo of a dog", "Two cats, one street!"]
    ids = open_clip.SimpleTokenizer(bpe)(texts)
    ours = processor(text=texts)
    assert [row[row != 0].tolist() for row in ids] == [
        row[mask.bool()].tolist() for row, mask in zip(ours["input_ids"], ours["attention_mask"], strict=True)
    ]
    torch.testing.assert_close(
        model.get_text_features(**ours).pooler_output, theirs.encode_text(ids), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_512", "vit_base_patch32_siglip_256"])
@torch.no_grad()
def test_timms_siglip_through_open_clip(name, bpe, tmp_path):
    """The trunk is timm's own, at 64 px and of 3 blocks; dense features by SPAR's description, on timm's modules."""
    timm = pytest.importorskip("timm")
    patch_px = 32 if "patch32" in name else 16
    trunk = timm.create_model(name, img_size=64 if patch_px == 16 else 128, depth=3, num_classes=0).eval()
    randomise(trunk)
    torch.save(trunk.state_dict(), tmp_path / "trunk.pt")
    activation = "gelu_pytorch_tanh" if patch_px == 32 else "gelu"
    convert([tmp_path / "trunk.pt"], "siglip2", tmp_path / "out", Asked(activation))
    tower = AutoModel.from_pretrained(tmp_path / "out")
    native = tower.config.image_size
    pixels = pixels_of((native, native))
    torch.testing.assert_close(tower(pixels).pooler_output, trunk(pixels), atol=5e-5, rtol=0)
    for size_hw in SIZES:
        pixels = pixels_of(size_hw)
        padded = F.pad(pixels, (0, -size_hw[1] % patch_px, 0, -size_hw[0] % patch_px))
        trunk.patch_embed.strict_img_size = False
        x = trunk.patch_embed(padded)
        grid_hw = (padded.shape[2] // patch_px, padded.shape[3] // patch_px)
        side = native // patch_px
        table = trunk.pos_embed
        if grid_hw != (side, side):
            table = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
            table = F.interpolate(table, size=grid_hw, mode="bicubic").flatten(2).transpose(1, 2)
        x = trunk.norm(trunk.blocks(x + table))
        pool = trunk.attn_pool
        values = pool.proj(pool.kv(x)[..., x.shape[-1] :])
        expected = (values + pool.mlp(pool.norm(values))).unflatten(1, grid_hw)
        torch.testing.assert_close(tower(pixels).patch_embeds, expected, atol=5e-5, rtol=0)


@torch.no_grad()
def test_open_clips_siglip_text(bpe, tmp_path):
    """SigLIP2's text tower: no mask, last token, projection with a bias, the tanh form of GELU."""
    text = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    text |= {"act_kwargs": {"approximate": "tanh"}}
    vision = {
        "image_size": 512,
        "timm_model_name": "vit_base_patch16_siglip_512",
        "timm_pool": "map",
        "timm_proj": "none",
    }
    theirs = open_clip.CustomTextCLIP(768, vision, text, init_logit_bias=-10).eval()
    state = {f"segmentor.net.model.{key}": value for key, value in theirs.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "spar.ckpt")
    asked = Asked("gelu", "gelu_pytorch_tanh", text_heads=2)
    report = convert([tmp_path / "spar.ckpt"], "siglip2", tmp_path / "out", asked, bpe)
    assert all(check.agrees for check in report.comparisons)
    model, _ = spar_hf.load(tmp_path / "out")
    ids = torch.randint(0, 49407, (3, 64), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.get_text_features(ids).pooler_output, theirs.encode_text(ids), atol=5e-5, rtol=0)
    assert model.logit_bias.item() == -10
