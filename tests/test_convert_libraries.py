"""Conversion against open_clip and timm themselves: their models saved, converted, compared. Skips without them."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedTokenizerFast

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


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("eva02_base_patch16_clip_224", {"embed_dim": 96, "num_heads": 6}),
        ("vit_pe_core_base_patch16_224", {"embed_dim": 96, "num_heads": 6, "ref_feat_shape": (4, 4)}),
        ("vit_pe_core_gigantic_patch14_448", {"embed_dim": 96, "num_heads": 6, "ref_feat_shape": (4, 4)}),
        ("vit_base_patch16_clip_quickgelu_224", {"embed_dim": 96, "num_heads": 6}),
    ],
)
@torch.no_grad()
def test_timms_eva_and_clip(name, more, tmp_path):
    """Image vectors by timm's own forward, at its native size and, by its own rule, at others."""
    timm = pytest.importorskip("timm")
    patch_px, clip = 14 if "patch14" in name else 16, "quickgelu" in name
    small = {"img_size": 4 * patch_px, "depth": 3, "num_classes": 24, **more}
    trunk = timm.create_model(name, **small, dynamic_img_size=True).eval()
    randomise(trunk)
    if clip:
        trunk.head.bias.zero_()
    torch.save(trunk.state_dict(), tmp_path / "trunk.pt")
    convert([tmp_path / "trunk.pt"], "clip" if clip else "eva", tmp_path / "out", Asked("quick_gelu", heads=6))
    own = {"method": "clip", "position_interpolation": "antialias"} if clip else {}
    tower = AutoModel.from_pretrained(tmp_path / "out", **own)
    for rows, columns in ((4, 4), (6, 6), (4, 7), (2, 8)):
        pixels = pixels_of((rows * patch_px, columns * patch_px))
        torch.testing.assert_close(tower(pixels).image_embeds, trunk(pixels), atol=2e-5, rtol=0)


@torch.no_grad()
def test_open_clips_eva(bpe, tmp_path):
    """EVA-02 with its text tower, as open_clip builds the two; the trunk is then a small one of the same kind."""
    timm = pytest.importorskip("timm")
    name = "eva02_base_patch16_clip_224"
    vision = {"image_size": 64, "timm_model_name": name, "timm_pool": "token", "timm_proj": None}
    theirs = open_clip.CustomTextCLIP(24, vision, {**TEXT, "context_length": 77}).eval()
    small = {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 6, "num_classes": 24}
    theirs.visual.trunk = timm.create_model(name, **small).eval()
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "eva.pt")
    convert([tmp_path / "eva.pt"], "eva", tmp_path / "out", Asked(heads=6, text_heads=2), bpe)
    model, processor = spar_hf.load(tmp_path / "out")
    pixels, texts = pixels_of((64, 64)), ["a photo of a dog", "Two cats, one street!"]
    torch.testing.assert_close(model.vision_model(pixels).image_embeds, theirs.encode_image(pixels), atol=2e-5, rtol=0)
    text = model.get_text_features(**processor(text=texts)).pooler_output
    expected = theirs.encode_text(open_clip.SimpleTokenizer(bpe)(texts))
    torch.testing.assert_close(text, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_open_clips_metaclip2(tmp_path):
    """ViT-*-worldwide: texts end with token 2, which is not the highest id."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {f"w{n}": n for n in range(4, 60)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "words")
    vision = {"image_size": 64, "layers": 3, "width": 128, "head_width": 64, "patch_size": 16}
    text = {**TEXT, "context_length": 77, "vocab_size": 60, "pool_type": "eos", "eos_id": 2}
    theirs = open_clip.CLIP(64, vision, text, quick_gelu=True).eval()
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "worldwide.pt")
    asked = Asked("quick_gelu", heads=2, text_heads=2)
    convert([tmp_path / "worldwide.pt"], "metaclip2", tmp_path / "out", asked, str(tmp_path / "words"))
    model = AutoModel.from_pretrained(tmp_path / "out", method="clip")
    pixels, ids = pixels_of((64, 64)), torch.randint(3, 60, (3, 77), generator=torch.Generator().manual_seed(0))
    ids[0, 5:], ids[1, 30], ids[2, 76] = 2, 2, 2
    torch.testing.assert_close(model.vision_model(pixels).image_embeds, theirs.encode_image(pixels), atol=2e-5, rtol=0)
    torch.testing.assert_close(model.get_text_features(ids).pooler_output, theirs.encode_text(ids), atol=2e-5, rtol=0)


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
