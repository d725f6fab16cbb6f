"""The layouts that can be read: how each is recognised, what its shapes say, and which weight becomes which of ours.

A layout is a table: our name -> (names there, how their tensors become ours). What the table does not name is unused,
what it names in vain is missing. Written from the public code of open_clip, timm and facebookresearch/dinov3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..clip_spar import SparModel, SparVisionModel
from ..dinov3_spar import SparDinov3Model, SparDinov3VisionModel
from ..eva_spar import SparEvaModel, SparEvaVisionModel
from ..metaclip_spar import SparMetaclipModel
from ..siglip_spar import SparSiglipModel, SparSiglipVisionModel
from .source import Source

Rule = tuple[tuple[str, ...], Callable[..., Tensor]]
Table = dict[str, Rule]
# Heads cannot be seen in the shapes; these are the published sizes, width -> heads.
CLIP_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
CLIP_TEXT_HEADS = {512: 8, 640: 10, 768: 12, 1024: 16, 1280: 20}
SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}
EVA_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1536: 16}
DINOV3_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32}
# timm's SigLIPs with the tanh form of GELU in the vision tower; the others have the exact one.
TIMM_TANH = re.compile(r"patch32_siglip|large_patch16_siglip_512|so400m_patch16|giantopt")
# What a CLIP's vision tower is called: by open_clip behind "visual.", by timm behind "visual.trunk." or nothing.
OPEN_CLIP = {
    "patches": "conv1",
    "class_token": "class_embedding",
    "positions": "positional_embedding",
    "pre_norm": "ln_pre",
    "blocks": "transformer.resblocks",
    "hidden": "mlp.c_fc",
    "post_norm": "ln_post",
    "projection": "proj",
}
TIMM_CLIP = {
    "patches": "patch_embed.proj",
    "class_token": "cls_token",
    "positions": "pos_embed",
    "pre_norm": "norm_pre",
    "blocks": "blocks",
    "hidden": "mlp.fc1",
    "post_norm": "norm",
    "projection": "head.weight",
}
METACLIP_VOCABULARY = 901_629  # MetaCLIP 2's, XLM-V's; no other CLIP of open_clip has so many tokens
# Design of timm's Eva -> weights that it alone has together.
EVA_MARKS = {"eva02": ("pos_embed", "blocks.0.attn.norm.weight"), "pe_core": ("norm_pre.weight", "attn_pool.latent")}
# Our names of what a block has beside its attention -> theirs.
OPEN_CLIP_BLOCK = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
TIMM_BLOCK = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
TIMM_POOL = {"attention.out_proj": "proj", "layernorm": "norm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
DINOTXT_BLOCK = {
    "layer_norm1": "attention_norm",
    "layer_norm2": "ffn_norm",
    "mlp.fc1": "feed_forward.fc1",
    "mlp.fc2": "feed_forward.fc2",
}


@dataclass(frozen=True)
class Asked:
    """What shapes cannot tell; None where it was not given."""

    activation: str | None = None
    text_activation: str | None = None
    heads: int | None = None
    text_heads: int | None = None
    adaptor: str | None = None  # RADIO: whose head


@dataclass(frozen=True)
class Layout:
    """A recognised checkpoint.

    Attributes:
        name: what it is, in words.
        family: the classes of the whole model and of the vision tower.
        vision, text: fields of the two configurations; no text for a vision tower alone.
        table: our names for the weights.
        left_out: weights that are known and not needed, and why.
    """

    name: str
    family: tuple[Any, Any]
    vision: dict[str, Any]
    text: dict[str, Any]
    table: Table
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def model_class(self) -> Any:
        whole, tower = self.family
        return whole if self.text else tower


def same(weight: Tensor) -> Tensor:
    return weight


def transposed(weight: Tensor) -> Tensor:
    return weight.T


def third(index: int) -> Callable[[Tensor], Tensor]:
    """One of the fused queries, keys and values."""
    return lambda weight: weight.chunk(3)[index]


def masked(index: int) -> Callable[..., Tensor]:
    """One of the fused queries', keys' and values' biases, times its mask where there is one."""
    return lambda bias, mask=1: (bias * mask).chunk(3)[index]


def row(weight: Tensor) -> Tensor:
    return weight.reshape(-1)


def first(weight: Tensor) -> Tensor:
    return weight[0]


def halves(num_heads: int, part: int | None = None) -> Callable[[Tensor], Tensor]:
    """Queries or keys whose channels (2 i, 2 i + 1) turn together -> (i, i + d / 2); `part` of fused ones first."""

    def rule(weight: Tensor) -> Tensor:
        weight = weight if part is None else weight.chunk(3)[part]
        return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    return rule


def joined(*weights: Tensor) -> Tensor:
    return torch.cat(weights)


def rename(ours: str, theirs: str, kinds: Iterable[str] = ("weight", "bias")) -> Iterator[tuple[str, Rule]]:
    for kind in kinds:
        yield f"{ours}.{kind}", ((f"{theirs}.{kind}",), same)


def timm_trunk(weights: dict[str, Tensor]) -> str:
    """What stands before the names of timm's network: alone, or within an open_clip model."""
    return "visual.trunk." if "visual.trunk.pos_embed" in weights else ""


def count_blocks(weights: Iterable[str], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(found[1]) for name in weights if (found := pattern.match(name))), default=-1)


def heads_of(width: int, known: dict[int, int], given: int | None, flag: str) -> int:
    if given is None and width not in known:
        raise ValueError(f"the number of heads of a tower {width} wide cannot be seen in its weights; give {flag}.")
    heads = known[width] if given is None else given
    if heads < 1 or width % heads:
        raise ValueError(f"{flag} is {heads}; it must divide the width, {width}.")
    return heads


def open_clip_block(ours: str, theirs: str) -> Iterator[tuple[str, Rule]]:
    """A block of open_clip's transformer as one of CLIP's or SigLIP's."""
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        for kind in ("weight", "bias"):
            yield f"{ours}.self_attn.{name}.{kind}", ((f"{theirs}.attn.in_proj_{kind}",), third(index))
    yield from rename(f"{ours}.self_attn.out_proj", f"{theirs}.attn.out_proj")
    for mine, other in OPEN_CLIP_BLOCK.items():
        yield from rename(f"{ours}.{mine}", f"{theirs}.{other}")


def timm_block(ours: str, theirs: str) -> Iterator[tuple[str, Rule]]:
    """A block of timm's ViT as one of SigLIP's."""
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        for kind in ("weight", "bias"):
            yield f"{ours}.self_attn.{name}.{kind}", ((f"{theirs}.attn.qkv.{kind}",), third(index))
    yield from rename(f"{ours}.self_attn.out_proj", f"{theirs}.attn.proj")
    for mine, other in TIMM_BLOCK.items():
        yield from rename(f"{ours}.{mine}", f"{theirs}.{other}")


def timm_pool(head: str, pool: str) -> Iterator[tuple[str, Rule]]:
    """timm's attention-pooling head as SigLIP's."""
    yield f"{head}.probe", ((f"{pool}.latent",), same)
    for kind in ("weight", "bias"):
        yield f"{head}.attention.in_proj_{kind}", ((f"{pool}.q.{kind}", f"{pool}.kv.{kind}"), joined)
    for mine, other in TIMM_POOL.items():
        yield from rename(f"{head}.{mine}", f"{pool}.{other}")


def open_clip_text(weights: dict[str, Tensor], prefix: str, known: dict[int, int], asked: Asked) -> tuple[dict, Table]:
    """Sizes and table of open_clip's text transformer, without its projection."""
    layers = count_blocks(weights, f"{prefix}transformer.resblocks.")
    vocab_size, width = weights[f"{prefix}token_embedding.weight"].shape
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": weights[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads_of(width, known, asked.text_heads, "--text-heads"),
        "max_position_embeddings": weights[f"{prefix}positional_embedding"].shape[0],
    }
    table: Table = dict(rename("text_model.embeddings.token_embedding", f"{prefix}token_embedding", ("weight",)))
    table["text_model.embeddings.position_embedding.weight"] = ((f"{prefix}positional_embedding",), same)
    table |= rename("text_model.final_layer_norm", f"{prefix}ln_final")
    for n in range(layers):
        table |= open_clip_block(f"text_model.encoder.layers.{n}", f"{prefix}transformer.resblocks.{n}")
    return sizes, table


def clip_layout(source: Source, asked: Asked) -> Layout:
    """CLIP's ViT of open_clip (SPAR's OpenCLIP wrapper too) or of timm, with open_clip's text tower or alone."""
    weights = source.weights
    text_config = source.open_clip_config.get("model_cfg", {}).get("text_cfg", {})
    if text_config.get("pool_type") == "eos" or len(weights.get("token_embedding.weight", ())) == METACLIP_VOCABULARY:
        raise ValueError("this is a MetaCLIP 2, whose texts end otherwise than CLIP's; give --backbone metaclip2.")
    return clip_family(source, asked, (SparModel, SparVisionModel))


def metaclip_layout(source: Source, asked: Asked) -> Layout:
    """MetaCLIP 2 of open_clip (ViT-*-worldwide): CLIP's layout, other texts."""
    if "token_embedding.weight" not in source.weights:
        raise ValueError("there is no token_embedding.weight; this is no MetaCLIP 2 of open_clip. Check --backbone.")
    return clip_family(source, asked, (SparMetaclipModel, SparVisionModel))


def clip_family(source: Source, asked: Asked, family: tuple[Any, Any]) -> Layout:
    weights = source.weights
    trunk = timm_trunk(weights)
    if f"{trunk}norm_pre.weight" in weights and f"{trunk}cls_token" in weights:
        names = TIMM_CLIP
    elif "visual.conv1.weight" in weights and "visual.class_embedding" in weights:
        names, trunk = OPEN_CLIP, "visual."
    else:
        raise ValueError(
            "there is no visual.conv1.weight (open_clip) and no norm_pre.weight (timm); this is no ViT of CLIP. "
            "Check --backbone."
        )
    if names is TIMM_CLIP and (f"{trunk}attn_pool.latent" in weights or f"{trunk}head.weight" not in weights):
        raise ValueError(
            "this ViT of timm has no head.weight, CLIP's projection, or pools by attention; its patches are not in "
            "CLIP's text space. PE-Core is --backbone eva."
        )
    activation = asked.activation
    if activation is None and source.open_clip_config:
        config = source.open_clip_config.get("model_cfg", {})
        quick = config.get("quick_gelu", "quickgelu" in config.get("vision_cfg", {}).get("timm_model_name", ""))
        activation = "quick_gelu" if quick else "gelu"
    if activation is None:
        raise ValueError(
            "the activation cannot be seen in the weights; give --activation: gelu for LAION's and DataComp's, and "
            "for SPAR's own; quick_gelu for OpenAI's, MetaCLIP's and DFN's."
        )
    width, _, patch_px, _ = weights[f"{trunk}{names['patches']}.weight"].shape
    layers = count_blocks(weights, f"{trunk}{names['blocks']}.")
    projection = weights[f"{trunk}{names['projection']}"]
    projection_dim = projection.shape[0 if names is TIMM_CLIP else 1]
    vision = {
        "hidden_size": width,
        "intermediate_size": weights[f"{trunk}{names['blocks']}.0.{names['hidden']}.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads_of(width, CLIP_HEADS, asked.heads, "--heads"),
        "image_size": math.isqrt(weights[f"{trunk}{names['positions']}"].shape[-2] - 1) * patch_px,
        "patch_size": patch_px,
        "hidden_act": activation,
        "projection_dim": projection_dim,
    }
    prefix = "text." if "text.token_embedding.weight" in weights else ""
    has_text = f"{prefix}token_embedding.weight" in weights
    text: dict[str, Any] = {}
    table: Table = {}
    if has_text:
        text, table = open_clip_text(weights, prefix, CLIP_TEXT_HEADS, asked)
        text |= {"hidden_act": asked.text_activation or activation, "projection_dim": projection_dim}
        table["text_projection.weight"] = ((f"{prefix}text_projection",), transposed)
        table["logit_scale"] = (("logit_scale",), same)
    tower = "vision_model." if has_text else ""
    table[f"{tower}embeddings.class_embedding"] = ((f"{trunk}{names['class_token']}",), row)
    table[f"{tower}embeddings.position_embedding.weight"] = (
        (f"{trunk}{names['positions']}",),
        first if names is TIMM_CLIP else same,
    )
    table[f"{tower}embeddings.patch_embedding.weight"] = ((f"{trunk}{names['patches']}.weight",), same)
    table[f"{tower}visual_projection.weight"] = (
        (f"{trunk}{names['projection']}",),
        same if names is TIMM_CLIP else transposed,
    )
    table |= rename(f"{tower}pre_layrnorm", f"{trunk}{names['pre_norm']}")
    table |= rename(f"{tower}post_layernorm", f"{trunk}{names['post_norm']}")
    block = timm_block if names is TIMM_CLIP else open_clip_block
    for n in range(layers):
        table |= block(f"{tower}encoder.layers.{n}", f"{trunk}{names['blocks']}.{n}")
    left_out = {f"{prefix}attn_mask": "the causal mask", "attn_mask": "the causal mask"}
    for name in ("input_resolution", "context_length", "vocab_size"):
        left_out[name] = "a number that the shapes say too"
    bias = weights.get(f"{trunk}head.bias")
    if names is TIMM_CLIP and bias is not None and not bias.any():
        left_out[f"{trunk}head.bias"] = "zero: CLIP's projection has no bias"
    by = "timm" if names is TIMM_CLIP else "open_clip"
    name = f"{by} ViT, {layers} x {width}, patch {patch_px}{'' if has_text else ', vision alone'}"
    return Layout(name, family, vision, text, table, left_out)


def siglip_layout(source: Source, asked: Asked) -> Layout:
    """SigLIP and SigLIP2 in open_clip with timm's trunk, SPAR's SigLIP2 wrapper, or timm's trunk alone."""
    weights = source.weights
    trunk = timm_trunk(weights)
    if f"{trunk}attn_pool.latent" not in weights:
        raise ValueError(
            "there is no attn_pool.latent; this is no SigLIP of timm with its attention-pooling head, and without it "
            "the patches are not in the text space. Check --backbone."
        )
    config = source.open_clip_config.get("model_cfg", {})
    activation, text_activation = asked.activation, asked.text_activation
    if activation is None and "timm_model_name" in config.get("vision_cfg", {}):
        tanh = TIMM_TANH.search(config["vision_cfg"]["timm_model_name"])
        activation = "gelu_pytorch_tanh" if tanh else "gelu"
    if text_activation is None and "text_cfg" in config:
        tanh = config["text_cfg"].get("act_kwargs", {}).get("approximate") == "tanh"
        text_activation = "gelu_pytorch_tanh" if tanh else "gelu"
    if activation is None:
        raise ValueError(
            "the vision tower's activation cannot be seen in the weights; give --activation: gelu (exact) for "
            "ViT-B/16 and with it SPAR's own, so400m patch 14, and L/16 up to 384 px; gelu_pytorch_tanh for B/32, "
            "L/16-512, so400m patch 16 and giant-opt (timm's definitions)."
        )
    width, _, patch_px, _ = weights[f"{trunk}patch_embed.proj.weight"].shape
    layers = count_blocks(weights, f"{trunk}blocks.")
    vision = {
        "hidden_size": width,
        "intermediate_size": weights[f"{trunk}blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads_of(width, SIGLIP_HEADS, asked.heads, "--heads"),
        "image_size": math.isqrt(weights[f"{trunk}pos_embed"].shape[1]) * patch_px,
        "patch_size": patch_px,
        "hidden_act": activation,
    }
    has_text = "text.token_embedding.weight" in weights
    text: dict[str, Any] = {}
    table: Table = {}
    if has_text:
        if text_activation is None:
            raise ValueError(
                "the text tower's activation cannot be seen in the weights; give --text-activation: gelu_pytorch_tanh "
                "for SigLIP2 and with it SPAR's own, gelu for SigLIP through open_clip."
            )
        text, table = open_clip_text(weights, "text.", SIGLIP_HEADS, asked)
        text |= {"hidden_act": text_activation, "projection_size": weights["text.text_projection.weight"].shape[0]}
        table |= rename("text_model.head", "text.text_projection")
        for name in ("logit_scale", "logit_bias"):
            table[name] = ((name,), lambda weight: weight.reshape(1))
    tower = "vision_model." if has_text else ""
    table[f"{tower}embeddings.position_embedding.weight"] = ((f"{trunk}pos_embed",), lambda weight: weight[0])
    table |= rename(f"{tower}embeddings.patch_embedding", f"{trunk}patch_embed.proj")
    table |= rename(f"{tower}post_layernorm", f"{trunk}norm")
    for n in range(layers):
        table |= timm_block(f"{tower}encoder.layers.{n}", f"{trunk}blocks.{n}")
    table |= timm_pool(f"{tower}head", f"{trunk}attn_pool")
    name = f"SigLIP with timm's trunk, {layers} x {width}, patch {patch_px}{'' if has_text else ', vision alone'}"
    return Layout(name, (SparSiglipModel, SparSiglipVisionModel), vision, text, table)


def eva_layout(source: Source, asked: Asked) -> Layout:
    """EVA-02-CLIP and PE-Core in open_clip with timm's trunk, or timm's trunk alone."""
    weights = source.weights
    trunk = timm_trunk(weights)
    marked = (name for name, keys in EVA_MARKS.items() if all(f"{trunk}{key}" in weights for key in keys))
    design = next(marked, None)
    if design is None:
        own = any("inner_attn_ln" in name or "attn_pool.probe" in name for name in weights)
        large = f"{trunk}blocks.0.attn.q_bias" in weights
        raise ValueError(
            "this is EVA-02 E, whose blocks norm what they add and have no rotary positions; it is not read."
            if large
            else "this is a file of the authors' own code, and timm's names are read; take timm's copy of it, such as "
            "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k or timm/vit_pe_core_base_patch16_224.fb."
            if own
            else "there is no blocks.0.attn.norm.weight (EVA-02) and no attn_pool.latent beside norm_pre (PE-Core); "
            "check --backbone."
        )
    if f"{trunk}head.weight" not in weights:
        raise ValueError("there is no head.weight; without it the patches are not in the text space.")
    width, _, patch_px, _ = weights[f"{trunk}patch_embed.proj.weight"].shape
    layers = count_blocks(weights, f"{trunk}blocks.")
    pools, class_token = design == "pe_core", f"{trunk}cls_token" in weights
    grid = math.isqrt(weights[f"{trunk}pos_embed"].shape[1] - class_token)
    heads = heads_of(width, EVA_HEADS, asked.heads, "--heads")
    projection_dim = weights[f"{trunk}head.weight"].shape[0]
    vision = {
        "design": design,
        "hidden_size": width,
        "intermediate_size": weights[f"{trunk}blocks.0.mlp.{'fc1' if pools else 'fc1_g'}.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": grid * patch_px,
        "patch_size": patch_px,
        "projection_dim": projection_dim,
        "class_token": class_token,
    }
    if pools:
        middle = [0.5, 0.5, 0.5]
        vision |= {"layer_norm_eps": 1e-5, "rope_grid": grid, "rope_offset": float(class_token)}
        vision |= {"image_mean": middle, "image_std": middle}
    has_text = "text.token_embedding.weight" in weights
    text: dict[str, Any] = {}
    table: Table = {}
    if has_text:
        text, table = open_clip_text(weights, "text.", CLIP_TEXT_HEADS, asked)
        quick = source.open_clip_config.get("model_cfg", {}).get("quick_gelu", False)
        activation = asked.text_activation or ("quick_gelu" if quick else "gelu")
        text |= {"hidden_act": activation, "projection_dim": projection_dim}
        table["text_projection.weight"] = (("text.text_projection",), transposed)
        table["logit_scale"] = (("logit_scale",), same)
    tower = "vision_model." if has_text else ""
    table[f"{tower}position_embedding"] = ((f"{trunk}pos_embed",), first)
    kinds = ("weight",) if pools else ("weight", "bias")  # a norm follows PE-Core's
    table |= rename(f"{tower}patch_embedding", f"{trunk}patch_embed.proj", kinds)
    if class_token:
        table[f"{tower}class_embedding"] = ((f"{trunk}cls_token",), row)
    if pools:
        table |= rename(f"{tower}pre_norm", f"{trunk}norm_pre")
        table |= timm_pool(f"{tower}head", f"{trunk}attn_pool")
    table |= rename(f"{tower}post_norm", f"{trunk}norm")
    table |= rename(f"{tower}visual_projection", f"{trunk}head")
    for n in range(layers):
        table |= eva_block(f"{tower}layers.{n}", f"{trunk}blocks.{n}", heads, pools)
    name = f"{'PE-Core' if pools else 'EVA-02'}, {layers} x {width}, patch {patch_px}"
    name += "" if has_text else ", vision alone"
    family = (SparEvaModel, SparEvaVisionModel)
    return Layout(name, family, vision, text, table, {"text.attn_mask": "the causal mask"})


def eva_block(ours: str, theirs: str, num_heads: int, fused: bool) -> Iterator[tuple[str, Rule]]:
    """A block of timm's Eva: fused projections and a plain MLP (PE-Core), or neither (EVA-02)."""
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        for kind in ("weight", "bias"):
            if fused:
                rule = third(index) if name == "v_proj" else halves(num_heads, index)
                yield f"{ours}.self_attn.{name}.{kind}", ((f"{theirs}.attn.qkv.{kind}",), rule)
            elif (name, kind) != ("k_proj", "bias"):
                rule = same if name == "v_proj" else halves(num_heads)
                yield f"{ours}.self_attn.{name}.{kind}", ((f"{theirs}.attn.{name}.{kind}",), rule)
    names = {"self_attn.out_proj": "attn.proj", "norm1": "norm1", "norm2": "norm2"}
    if fused:
        names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    else:
        names |= {"self_attn.norm": "attn.norm", "mlp.norm": "mlp.norm"}
        names |= {"mlp.gate_proj": "mlp.fc1_g", "mlp.up_proj": "mlp.fc1_x", "mlp.down_proj": "mlp.fc2"}
    for mine, other in names.items():
        yield from rename(f"{ours}.{mine}", f"{theirs}.{other}")


def dinov3_layout(source: Source, asked: Asked) -> Layout:
    """DINOv3.txt as released by its authors in two files, SPAR's wrapper around it, or DINOv3's backbone alone."""
    weights = source.weights
    theirs = "visual_model.backbone."
    if f"{theirs}storage_tokens" not in weights:
        raise ValueError(
            "there are no storage_tokens; this is no DINOv3 ViT of its authors. The text encoder's file needs the "
            "backbone's beside it: spar convert BACKBONE.pth TEXT_ENCODER.pth. Or check --backbone."
        )
    width, _, patch_px, _ = weights[f"{theirs}patch_embed.proj.weight"].shape
    layers = count_blocks(weights, f"{theirs}blocks.")
    gated = f"{theirs}blocks.0.mlp.w1.weight" in weights
    heads = heads_of(width, DINOV3_HEADS, asked.heads, "--heads")
    periods = f"{theirs}rope_embed.periods"
    vision = {
        "hidden_size": width,
        "intermediate_size": weights[f"{theirs}blocks.0.mlp.{'w1' if gated else 'fc1'}.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_register_tokens": weights[f"{theirs}storage_tokens"].shape[1],
        "patch_size": patch_px,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "rope_periods": weights[periods].tolist() if periods in weights else None,
        "query_bias": has_bias(weights, theirs, 0),
        "value_bias": has_bias(weights, theirs, 2),
    }
    has_text = "text_model.backbone.token_embedding.weight" in weights
    text, table = dinov3_text(weights, asked) if has_text else ({}, {})
    tower = "vision_model." if has_text else ""
    table[f"{tower}embeddings.cls_token"] = ((f"{theirs}cls_token",), same)
    table[f"{tower}embeddings.mask_token"] = ((f"{theirs}mask_token",), lambda weight: weight.reshape(1, 1, -1))
    table[f"{tower}embeddings.register_tokens"] = ((f"{theirs}storage_tokens",), same)
    table |= rename(f"{tower}embeddings.patch_embeddings", f"{theirs}patch_embed.proj")
    table |= rename(f"{tower}norm", f"{theirs}norm")
    mlp = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
    has_biases = {"q_proj": vision["query_bias"], "k_proj": False, "v_proj": vision["value_bias"]}
    for n in range(layers):
        ours, other = f"{tower}model.layer.{n}", f"{theirs}blocks.{n}"
        for index, (name, biased) in enumerate(has_biases.items()):
            table[f"{ours}.attention.{name}.weight"] = ((f"{other}.attn.qkv.weight",), third(index))
            if biased:
                sources = (f"{other}.attn.qkv.bias", f"{other}.attn.qkv.bias_mask")
                table[f"{ours}.attention.{name}.bias"] = (tuple(s for s in sources if s in weights), masked(index))
        table |= rename(f"{ours}.attention.o_proj", f"{other}.attn.proj")
        for index in (1, 2):
            table[f"{ours}.layer_scale{index}.lambda1"] = ((f"{other}.ls{index}.gamma",), same)
            table |= rename(f"{ours}.norm{index}", f"{other}.norm{index}")
        for mine, name in mlp.items():
            table |= rename(f"{ours}.mlp.{mine}", f"{other}.mlp.{name}")
    left_out = {}
    for name in weights:
        if name.endswith(("attn.qkv.bias", "attn.qkv.bias_mask")) and not (
            vision["query_bias"] or vision["value_bias"]
        ):
            left_out[name] = "a bias that its mask makes zero"
        elif name == periods:
            left_out[name] = "the rotary periods; they go into the configuration"
        elif name.startswith("visual_model.head."):
            left_out[name] = "dino.txt's vision head; SPAR's features are the backbone's patches before it"
        elif name.startswith((f"{theirs}local_cls_norm.", f"{theirs}cls_norm.")):
            left_out[name] = "a norm of class tokens"
    name = f"DINOv3{'.txt' if has_text else ''}, {layers} x {width}, patch {patch_px}"
    return Layout(name, (SparDinov3Model, SparDinov3VisionModel), vision, text, table, left_out)


def has_bias(weights: dict[str, Tensor], tower: str, part: int) -> bool:
    """Whether the queries (0) or values (2) have a bias that is not masked in all blocks; the keys' always is.

    What is masked is zero for good: it has no gradient either.
    """
    biases = [name for name in weights if name.startswith(f"{tower}blocks.") and name.endswith("attn.qkv.bias")]
    masks = [weights[f"{name}_mask"] for name in biases if f"{name}_mask" in weights]
    return bool(biases) and (not masks or any(bool(mask.chunk(3)[part].any()) for mask in masks))


def dinov3_text(weights: dict[str, Tensor], asked: Asked) -> tuple[dict[str, Any], Table]:
    """dino.txt's text transformer and projection."""
    theirs = "text_model.backbone."
    vocab_size, width = weights[f"{theirs}token_embedding.weight"].shape
    layers = count_blocks(weights, f"{theirs}blocks.")
    text = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": weights[f"{theirs}blocks.0.feed_forward.fc1.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads_of(width, {1280: 20}, asked.text_heads, "--text-heads"),
        "max_position_embeddings": weights[f"{theirs}positional_embedding"].shape[0],
        "projection_dim": weights["text_model.head.linear_projection.weight"].shape[0],
    }
    table: Table = dict(rename("text_model.embeddings.token_embedding", f"{theirs}token_embedding", ("weight",)))
    table["text_model.embeddings.position_embedding.weight"] = ((f"{theirs}positional_embedding",), same)
    table |= rename("text_model.final_layer_norm", f"{theirs}ln_final")
    table["text_projection.weight"] = (("text_model.head.linear_projection.weight",), same)
    table["logit_scale"] = (("logit_scale",), lambda weight: weight.reshape(()))
    for n in range(layers):
        ours, other = f"text_model.encoder.layers.{n}", f"{theirs}blocks.{n}"
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            table[f"{ours}.self_attn.{name}.weight"] = ((f"{other}.attention.qkv.weight",), third(index))
        table |= rename(f"{ours}.self_attn.out_proj", f"{other}.attention.proj")
        for mine, name in DINOTXT_BLOCK.items():
            table |= rename(f"{ours}.{mine}", f"{other}.{name}")
    return text, table


LAYOUTS: dict[str, Callable[[Source, Asked], Layout]] = {
    "clip": clip_layout,
    "metaclip2": metaclip_layout,
    "siglip2": siglip_layout,
    "eva": eva_layout,
    "dinov3": dinov3_layout,
}
