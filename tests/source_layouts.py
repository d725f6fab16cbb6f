"""Checkpoints as others release them, with random weights: names and shapes from the public code of each."""

from __future__ import annotations

import re

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Draw:
    """Random weights of which each matters: scores have a standard deviation of about one."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.weights: Weights = {}

    def add(self, name: str, *shape: int, scale: float | None = None) -> None:
        scale = (shape[-1] if len(shape) < 4 else shape[1] * shape[2] * shape[3]) ** -0.5 if scale is None else scale
        self.weights[name] = torch.randn(*shape, generator=self.generator) * scale

    def linear(self, name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        self.add(f"{name}.weight", outputs, inputs)
        if bias:
            self.add(f"{name}.bias", outputs, scale=0.3)

    def norm(self, name: str, width: int) -> None:
        self.weights[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=self.generator)
        self.add(f"{name}.bias", width, scale=0.3)

    def resblock(self, name: str, width: int, hidden: int) -> None:
        self.add(f"{name}.attn.in_proj_weight", 3 * width, width)
        self.add(f"{name}.attn.in_proj_bias", 3 * width, scale=0.3)
        self.linear(f"{name}.attn.out_proj", width, width)
        self.norm(f"{name}.ln_1", width)
        self.norm(f"{name}.ln_2", width)
        self.linear(f"{name}.mlp.c_fc", width, hidden)
        self.linear(f"{name}.mlp.c_proj", hidden, width)

    def open_clip_text(self, prefix: str, vocab_size: int, length: int, width: int = 32, layers: int = 2) -> None:
        self.add(f"{prefix}token_embedding.weight", vocab_size, width, scale=0.5)
        self.add(f"{prefix}positional_embedding", length, width, scale=0.5)
        for n in range(layers):
            self.resblock(f"{prefix}transformer.resblocks.{n}", width, 40)
        self.norm(f"{prefix}ln_final", width)


def open_clip_vit(vocab_size: int, patch_px: int = 16, grid: int = 4, prefix: str = "") -> Weights:
    """open_clip's CLIP: 3 blocks, 48 wide (3 heads), text 32 wide (2 heads), 24 numbers."""
    draw = Draw()
    draw.add("visual.class_embedding", 48, scale=0.5)
    draw.add("visual.positional_embedding", grid**2 + 1, 48, scale=0.5)
    draw.add("visual.proj", 48, 24)
    draw.add("visual.conv1.weight", 48, 3, patch_px, patch_px)
    draw.norm("visual.ln_pre", 48)
    draw.norm("visual.ln_post", 48)
    for n in range(3):
        draw.resblock(f"visual.transformer.resblocks.{n}", 48, 80)
    draw.open_clip_text("", vocab_size, 77)
    draw.add("text_projection", 32, 24)
    draw.weights["logit_scale"] = torch.tensor(2.0)
    return {prefix + name: weight for name, weight in draw.weights.items()}


def timm_siglip(vocab_size: int | None, patch_px: int = 16, grid: int = 4, prefix: str = "") -> Weights:
    """SigLIP in open_clip with timm's trunk; without a vocabulary the trunk alone. Sizes as above, 48 numbers."""
    draw, trunk = Draw(1), "" if vocab_size is None else "visual.trunk."
    draw.add(f"{trunk}pos_embed", 1, grid**2, 48, scale=0.5)
    draw.add(f"{trunk}patch_embed.proj.weight", 48, 3, patch_px, patch_px)
    draw.add(f"{trunk}patch_embed.proj.bias", 48, scale=0.3)
    for n in range(3):
        timm_block(draw, f"{trunk}blocks.{n}")
    draw.norm(f"{trunk}norm", 48)
    timm_pool(draw, f"{trunk}attn_pool", 80)
    if vocab_size is not None:
        draw.open_clip_text("text.", vocab_size, 64)
        draw.linear("text.text_projection", 32, 48)
        draw.weights |= {"logit_scale": torch.tensor(2.0), "logit_bias": torch.tensor(-10.0)}
    return {prefix + name: weight for name, weight in draw.weights.items()}


def timm_vit(draw: Draw, trunk: str, patch_px: int, grid: int, class_token: bool = True, bias: bool = False) -> None:
    """What timm's ViTs of 48 numbers share: patches, positions, first and last norm, head to 24 numbers."""
    if class_token:
        draw.add(f"{trunk}cls_token", 1, 1, 48, scale=0.5)
    draw.add(f"{trunk}pos_embed", 1, grid**2 + class_token, 48, scale=0.5)
    draw.add(f"{trunk}patch_embed.proj.weight", 48, 3, patch_px, patch_px)
    if bias:
        draw.add(f"{trunk}patch_embed.proj.bias", 48, scale=0.3)
    else:
        draw.norm(f"{trunk}norm_pre", 48)
    draw.norm(f"{trunk}norm", 48)
    draw.linear(f"{trunk}head", 48, 24)


def timm_block(draw: Draw, name: str) -> None:
    draw.norm(f"{name}.norm1", 48)
    draw.linear(f"{name}.attn.qkv", 48, 144)
    draw.linear(f"{name}.attn.proj", 48, 48)
    draw.norm(f"{name}.norm2", 48)
    draw.linear(f"{name}.mlp.fc1", 48, 80)
    draw.linear(f"{name}.mlp.fc2", 80, 48)


def timm_pool(draw: Draw, pool: str, hidden: int) -> None:
    draw.add(f"{pool}.latent", 1, 1, 48)
    draw.linear(f"{pool}.q", 48, 48)
    draw.linear(f"{pool}.kv", 48, 96)
    draw.linear(f"{pool}.proj", 48, 48)
    draw.norm(f"{pool}.norm", 48)
    draw.linear(f"{pool}.mlp.fc1", 48, hidden)
    draw.linear(f"{pool}.mlp.fc2", hidden, 48)


def with_text(draw: Draw, vocab_size: int | None) -> Weights:
    """The weights, with open_clip's text tower where there is a vocabulary."""
    if vocab_size is not None:
        draw.open_clip_text("text.", vocab_size, 77)
        draw.add("text.text_projection", 32, 24)
        draw.weights["logit_scale"] = torch.tensor(2.0)
    return draw.weights


def timm_clip(vocab_size: int | None = None, patch_px: int = 16, grid: int = 4) -> Weights:
    """CLIP's ViT of timm: alone, or in open_clip with a vocabulary."""
    draw, trunk = Draw(5), "" if vocab_size is None else "visual.trunk."
    timm_vit(draw, trunk, patch_px, grid)
    draw.weights[f"{trunk}head.bias"].zero_()
    for n in range(3):
        timm_block(draw, f"{trunk}blocks.{n}")
    return with_text(draw, vocab_size)


def timm_eva02(vocab_size: int | None = None, patch_px: int = 16, grid: int = 4) -> Weights:
    """EVA-02-CLIP of timm: alone, or in open_clip with a vocabulary."""
    draw, trunk = Draw(6), "" if vocab_size is None else "visual.trunk."
    timm_vit(draw, trunk, patch_px, grid, bias=True)
    for n in range(3):
        name = f"{trunk}blocks.{n}"
        draw.norm(f"{name}.norm1", 48)
        for part in "qkv":
            draw.linear(f"{name}.attn.{part}_proj", 48, 48, bias=part != "k")
        draw.norm(f"{name}.attn.norm", 48)
        draw.linear(f"{name}.attn.proj", 48, 48)
        draw.norm(f"{name}.norm2", 48)
        draw.linear(f"{name}.mlp.fc1_g", 48, 64)
        draw.linear(f"{name}.mlp.fc1_x", 48, 64)
        draw.norm(f"{name}.mlp.norm", 64)
        draw.linear(f"{name}.mlp.fc2", 64, 48)
    return with_text(draw, vocab_size)


def timm_pe_core(
    vocab_size: int | None = None, patch_px: int = 16, grid: int = 4, class_token: bool = True
) -> Weights:
    """PE-Core of timm: alone, or in open_clip with a vocabulary; G/14 has no class token."""
    draw, trunk = Draw(7), "" if vocab_size is None else "visual.trunk."
    timm_vit(draw, trunk, patch_px, grid, class_token)
    for n in range(3):
        timm_block(draw, f"{trunk}blocks.{n}")
    timm_pool(draw, f"{trunk}attn_pool", 192)
    return with_text(draw, vocab_size)


def dinov3_backbone(gated: bool = False, prefix: str = "") -> Weights:
    """facebookresearch/dinov3's ViT: 3 blocks, 48 wide (3 heads), 4 registers."""
    draw = Draw(2)
    draw.add("cls_token", 1, 1, 48, scale=0.5)
    draw.add("storage_tokens", 1, 4, 48, scale=0.5)
    draw.add("mask_token", 1, 48, scale=0.5)
    draw.add("patch_embed.proj.weight", 48, 3, 16, 16)
    draw.add("patch_embed.proj.bias", 48, scale=0.3)
    draw.weights["rope_embed.periods"] = (100.0 ** (torch.arange(4) / 4)).bfloat16().float()  # as released
    for n in range(3):
        name = f"blocks.{n}"
        draw.norm(f"{name}.norm1", 48)
        draw.linear(f"{name}.attn.qkv", 48, 144)
        mask = torch.ones(144)
        mask[48:96] = 0
        draw.weights[f"{name}.attn.qkv.bias_mask"] = mask
        draw.linear(f"{name}.attn.proj", 48, 48)
        draw.add(f"{name}.ls1.gamma", 48, scale=0.5)
        draw.norm(f"{name}.norm2", 48)
        if gated:
            draw.linear(f"{name}.mlp.w1", 48, 64)
            draw.linear(f"{name}.mlp.w2", 48, 64)
            draw.linear(f"{name}.mlp.w3", 64, 48)
        else:
            draw.linear(f"{name}.mlp.fc1", 48, 80)
            draw.linear(f"{name}.mlp.fc2", 80, 48)
        draw.add(f"{name}.ls2.gamma", 48, scale=0.5)
    draw.norm("norm", 48)
    return {prefix + name: weight for name, weight in draw.weights.items()}


def dinotxt_rest(vocab_size: int, prefix: str = "") -> Weights:
    """dino.txt's other file: the vision head (unused by SPAR), the text tower (32 wide, 2 heads), the scale."""
    draw = Draw(3)
    draw.norm("visual_model.head.ln_final", 48)
    draw.linear("visual_model.head.blocks.0.attn.qkv", 48, 144)
    text = "text_model.backbone"
    draw.add(f"{text}.token_embedding.weight", vocab_size, 32, scale=0.5)
    draw.add(f"{text}.positional_embedding", 77, 32, scale=0.5)
    for n in range(2):
        name = f"{text}.blocks.{n}"
        draw.norm(f"{name}.attention_norm", 32)
        draw.linear(f"{name}.attention.qkv", 32, 96, bias=False)
        draw.linear(f"{name}.attention.proj", 32, 32)
        draw.norm(f"{name}.ffn_norm", 32)
        draw.linear(f"{name}.feed_forward.fc1", 32, 40)
        draw.linear(f"{name}.feed_forward.fc2", 40, 32)
    draw.norm(f"{text}.ln_final", 32)
    draw.linear("text_model.head.linear_projection", 32, 96, bias=False)
    draw.weights["logit_scale"] = torch.tensor([2.6])
    return {prefix + name: weight for name, weight in draw.weights.items()}


RADIO_TEACHERS = [
    {"name": "clip", "type": "open_clip", "model": "ViT-H-14-378-quickgelu", "pretrained": "dfn5b"},
    {"name": "dino_v2", "type": "dino_v2", "use_summary": False},
    {"name": "siglip2-g", "type": "siglip2", "model": "siglip2-g-384"},
    {"name": "siglip2-g", "type": "siglip2", "model": "siglip2-g-384", "fd_upsample_factor": 2},  # another size of it
]


def radio_trunk(spectral: bool = False) -> Weights:
    """NVIDIA's C-RADIO: 3 blocks, 48 wide (3 heads), 3 class tokens and 2 registers, a table of 6 x 6."""
    draw = Draw(5)
    generator = "base_model.patch_generator"
    draw.add(f"{generator}.embedder.weight", 48, 768)
    draw.add(f"{generator}.pos_embed", 1, 36, 48, scale=0.7)
    draw.add(f"{generator}.cls_token.token", 5, 48, scale=0.7)
    for n in range(3):
        name = f"base_model.blocks.{n}"
        draw.norm(f"{name}.norm1", 48)
        draw.linear(f"{name}.attn.qkv", 48, 144)
        draw.linear(f"{name}.attn.proj", 48, 48)
        draw.norm(f"{name}.norm2", 48)
        draw.linear(f"{name}.mlp.fc1", 48, 81)
        draw.linear(f"{name}.mlp.fc2", 81, 48)
        if spectral:
            spectrally(draw.weights, f"{name}.attn.qkv", parts=(3, 2)[n > 1])  # the last one's values as they are
            spectrally(draw.weights, f"{name}.mlp.fc1", version=n + 1)
    draw.weights["input_conditioner.norm_mean"] = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    draw.weights["input_conditioner.norm_std"] = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return draw.weights


def spectrally(weights: Weights, name: str, parts: int = 0, version: int = 2) -> None:
    """Stores a weight as training with a spectral norm does; the first form (1) has no softplus and no version."""
    original = weights.pop(f"{name}.weight")
    stored = f"{name}.parametrizations.weight"
    weights[f"{stored}.original"] = original
    pieces = original.chunk(3)[:parts] if parts else [original]
    for index, piece in enumerate(pieces):
        left, _, right = torch.linalg.svd(piece)
        at = f"{stored}.0.parts.{index}" if parts else f"{stored}.0"
        weights |= {f"{at}._u": left[:, 0].clone(), f"{at}._v": right[0].clone()}
        weights[f"{at}.scale"] = torch.tensor([[1.5 + index]])
        if version == 2:
            weights[f"{at}._sn_version"] = torch.tensor(2)


def radio_heads(names: tuple[str, ...] = ("clip", "dino_v2", "siglip2-g")) -> Weights:
    """The teachers' heads: 40 wide, two blocks, 24 numbers; those for patches with them."""
    draw = Draw(6)
    for name in names:
        for start in ("_heads", "_feature_projections"):
            draw.linear(f"{start}.{name}.fc1", 48, 40)
            for block in ("blocks.0", "blocks.1", "final"):
                draw.norm(f"{start}.{name}.{block}.0", 40)
                draw.linear(f"{start}.{name}.{block}.2", 40, 24 if block == "final" else 40)
    draw.add("_intermediate_feature_normalizer.means", 3, 48)
    return draw.weights


def on_the_hub(weights: Weights) -> Weights:
    """The same as NVIDIA's `save_pretrained` names it."""
    renamed = {}
    for name, weight in weights.items():
        name = re.sub(r"^_heads\.([^.]+)", r"adaptors.\1.head_mlp", name)
        name = re.sub(r"^_feature_projections\.([^.]+)", r"adaptors.\1.feat_mlp", name)
        name = name.replace("base_model.", "model.").replace("_intermediate_", "inter_")
        renamed[f"radio_model.{name}"] = weight
    return {**renamed, "radio_model.summary_idxs": torch.tensor([0, 2])}
