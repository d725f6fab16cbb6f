"""C-RADIO as NVIDIA releases it, and its text teacher's checkpoint: the layout, and the source's own forward pass.

Two forms are read: the `*_half.pth.tar` with every teacher's head, and the Hub's `model.safetensors` with its
`config.json`, which has the trunk and, if it was saved so, some heads. Neither has a text tower. Written from the
public description of both and from what transformers' `RadioModel` reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig

from ..checkpoint_files import load_pickle, weight_files
from ..downloads import fetch
from ..families import WHOLE
from ..names_spar import unknown
from ..pretrained import open_config, read_config
from ..radio_spar import SparRadioModel, SparRadioVisionModel
from .layouts import Asked, Layout, Rule, Table, count_blocks, heads_of, rename, same, third
from .reference import ACTIVATIONS, Reference
from .source import Source

RADIO_HEADS = {768: 12, 1024: 16, 1152: 16, 1280: 16, 1536: 24}
NO_HEAD = "none"
# Kinds of teacher that read words, and where the text tower of one is published, by the name it has in the file.
TEXT_TEACHERS = ("siglip2", "open_clip")
PUBLISHED = {"siglip2-g-384": "google/siglip2-giant-opt-patch16-384"}
# The Hub's names -> those of the .pth.tar.
HUB_NAMES = (
    (re.compile(r"^radio_model\.model\."), "base_model."),
    (re.compile(r"^radio_model\.adaptors\.([^.]+)\.head_mlp\."), r"_heads.\1."),
    (re.compile(r"^radio_model\.adaptors\.([^.]+)\.feat_mlp\."), r"_feature_projections.\1."),
    (re.compile(r"^radio_model\.inter_feature_normalizer\."), "_intermediate_feature_normalizer."),
    (re.compile(r"^radio_model\.feature_normalizer\."), "_feature_normalizer."),
    (re.compile(r"^radio_model\."), ""),
)
TRUNK = "base_model."
GENERATOR = f"{TRUNK}patch_generator."
TEXT_NAME = re.compile(r"^(?:text_model\.(?!.*position_ids$)|text_projection\.weight$|logit_scale$|logit_bias$)")
TEXT_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
)
NOT_NEEDED = {
    "_heads.": "the head of another teacher",
    "_feature_projections.": "a head for a teacher's patches; words go with the summary head",
    "_intermediate_feature_normalizer.": "for the features of earlier blocks",
    f"{GENERATOR}video_embedder.": "for videos",
}


# -------------------------------------------------------------------------------- what the file says


def teachers_of(source: Source) -> list[dict[str, Any]]:
    """The teachers in the order of the file.

    Raises:
        ValueError: they are not named.
    """
    teachers = source.args.get("teachers")
    if not isinstance(teachers, list) or not all(
        isinstance(t, dict) and isinstance(t.get("name"), str) for t in teachers
    ):
        raise ValueError(
            f"{source.name} does not name its teachers, and they tell class tokens from registers. Give NVIDIA's "
            "*_half.pth.tar as it is, or keep their config.json beside model.safetensors."
        )
    return teachers


def chosen_teacher(source: Source, adaptor: str | None) -> tuple[int, dict[str, Any]] | None:
    """Place and entry of the teacher whose head is taken; None for `none`.

    Raises:
        ValueError: none was named, there is no such teacher, or it reads no words.
    """
    teachers = teachers_of(source)
    reading = list(dict.fromkeys(t["name"] for t in teachers if t.get("type") in TEXT_TEACHERS))
    if adaptor is None:
        raise ValueError(
            f"--adaptor is not given; the teachers with words are {', '.join(reading) or 'none'}, and {NO_HEAD} takes "
            "the trunk alone."
        )
    if adaptor == NO_HEAD:
        return None
    for place, teacher in enumerate(teachers):
        if teacher["name"] == adaptor:
            if adaptor not in reading:
                raise ValueError(
                    f"teacher {adaptor!r} reads no words; those that do are {', '.join(reading) or 'none'}. Give one "
                    f"of them, or {NO_HEAD} for the trunk alone."
                )
            return place, teacher
    raise ValueError(unknown("adaptor", adaptor, [*reading, NO_HEAD]))


def described(teacher: dict[str, Any]) -> str:
    """A teacher in words: its name in the file, its model and that model's weights."""
    model = ", ".join(str(teacher[field]) for field in ("model", "pretrained") if field in teacher)
    return f"{teacher['name']!r} ({model})"


def prepare_radio(source: Source, asked: Asked, text: str | None) -> tuple[Source, str | None]:
    """The source under one set of names, its text teacher's tower beside it, and where that tower came from.

    Args:
        source: as it was read.
        asked: names the adaptor.
        text: folder or Hub id of the teacher's checkpoint; None is where it is published.

    Raises:
        ValueError: the teacher's text tower is not given, or is of no kind that is known.
        OSError: it cannot be read.
    """
    weights: dict[str, Tensor] = {}
    for name, weight in source.weights.items():
        for pattern, ours in HUB_NAMES:
            name = pattern.sub(ours, name)
        weights[name] = weight
    source = replace(source, weights=weights)
    chosen = chosen_teacher(source, asked.adaptor)
    if chosen is None:
        return source, None
    place, teacher = chosen
    for name in [name for name in weights if name.startswith(f"_heads.{place}.")]:
        weights[name.replace(f".{place}.", f".{teacher['name']}.", 1)] = weights.pop(name)
    text = text or PUBLISHED.get(str(teacher.get("model")))
    if text is None:
        raise ValueError(
            f"the text tower of {described(teacher)} is in no file of NVIDIA's; give --text: a folder or id of that "
            "CLIP or SigLIP. open_clip's own files go through spar convert --backbone clip first."
        )
    try:
        words, fields = read_text(text)
    except OSError as error:
        raise OSError(
            f"the text tower of {described(teacher)} cannot be read. Give --text: a folder or id of that teacher's "
            f"checkpoint. ({error})"
        ) from error
    return replace(source, weights={**weights, **words}, text=fields), text


def read_text(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Text tower, scale and bias of a CLIP or SigLIP in transformers' layout, and its configuration's fields.

    Raises:
        ValueError: it is of another kind.
        OSError: it cannot be read.
    """
    folder = fetch(name)
    model_type = str(read_config(folder).get("model_type"))
    whole = WHOLE.get(model_type)
    text = None if whole is None else open_config(whole.config_class, folder).text_config
    if text is None or text.model_type not in ("clip_text_model", "siglip_text_model"):
        raise ValueError(
            f"{name} is a checkpoint of type {model_type!r:.80}; the text tower must be that of a CLIP or a SigLIP."
        )
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder)[0]:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys() if TEXT_NAME.match(name)}  # noqa: SIM118
        elif path.suffix != ".json":
            weights |= {name: weight for name, weight in load_pickle(path).items() if TEXT_NAME.match(name)}
    fields = {field: getattr(text, field) for field in TEXT_FIELDS}
    width = "projection_dim" if isinstance(text, CLIPTextConfig) else "projection_size"
    projection = "text_projection.weight" if isinstance(text, CLIPTextConfig) else "text_model.head.weight"
    if projection not in weights:
        raise ValueError(f"{name} has no {projection}; its words do not reach the teacher's space. Give a whole CLIP.")
    return weights, {**fields, width: weights[projection].shape[0]}


# ------------------------------------------------------------------------------------------- the layout


def radio_layout(source: Source, asked: Asked) -> Layout:
    """C-RADIOv3 and v4, the trunk with one text teacher's head or alone; the source comes from `prepare_radio`."""
    weights = source.weights
    if f"{GENERATOR}embedder.weight" not in weights:
        raise ValueError("there is no patch_generator.embedder; this is no C-RADIO of NVIDIA. Check --backbone.")
    if any(name.startswith("_feature_normalizer.") for name in weights):
        raise ValueError(
            "its features are normalised (_feature_normalizer), which RadioModel cannot do. Give C-RADIOv3 or v4."
        )
    chosen = chosen_teacher(source, asked.adaptor)
    teachers, per_teacher = teachers_of(source), source.args.get("cls_token_per_teacher", True)
    width, patch_numbers = weights[f"{GENERATOR}embedder.weight"].shape
    patch_px = math.isqrt(patch_numbers // 3)
    layers = count_blocks(weights, f"{TRUNK}blocks.")
    prefix = weights[f"{GENERATOR}cls_token.token"].shape[0]
    num_classes = len({teacher["name"] for teacher in teachers}) if per_teacher else 1
    if num_classes > prefix:
        raise ValueError(f"there are {num_classes} teachers and {prefix} first tokens; each teacher has its own.")
    firsts: dict[str, int] = {}
    for place, teacher in enumerate(teachers):
        if teacher.get("use_summary", True):
            firsts.setdefault(teacher["name"], place)
    inner = weights[f"{TRUNK}blocks.0.mlp.fc1.bias"].shape[0]
    vision: dict[str, Any] = {
        "hidden_size": width,
        "mlp_ratio": ratio_of(inner, width),
        "num_hidden_layers": layers,
        "num_attention_heads": heads_of(width, RADIO_HEADS, asked.heads, "--heads"),
        "qkv_bias": f"{TRUNK}blocks.0.attn.qkv.bias" in weights,
        "patch_size": patch_px,
        "max_img_size": math.isqrt(weights[f"{GENERATOR}pos_embed"].shape[1]) * patch_px,
        "num_cls_tokens": num_classes,
        "num_registers": prefix - num_classes,
        "summary_idxs": sorted(firsts.values()) if per_teacher else [0],
    }
    for name in ("mean", "std"):
        if f"input_conditioner.norm_{name}" in weights:
            vision[f"image_{name}"] = weights[f"input_conditioner.norm_{name}"].flatten().tolist()
    tower = "vision_model." if chosen else ""
    table = trunk_table(source, tower, layers, width)
    table[f"{tower}summary_idxs"] = ((), lambda: torch.tensor(vision["summary_idxs"]))
    if chosen:
        place, teacher = chosen
        vision |= {"adaptor": teacher["name"], "class_token": teacher.get("token_slot", place) if per_teacher else 0}
        table |= head_table(source, tower, vision)
        table |= {name: ((name,), same) for name in weights if name.startswith("text_")}
        table |= {name: ((name,), lambda weight: weight.reshape(())) for name in ("logit_scale", "logit_bias")}
        if source.text["model_type"] == "clip_text_model":
            del table["logit_bias"]
    taken = {name for names, _ in table.values() for name in names}
    left_out = {
        name: why
        for start, why in NOT_NEEDED.items()
        for name in weights
        if name.startswith(start) and name not in taken
    }
    left_out["summary_idxs"] = "the file's teachers say the same"
    head = f", head of {vision['adaptor']}" if chosen else ", without a head"
    name = f"C-RADIO, {layers} x {width}, patch {patch_px}{head}; NVIDIA Open Model License"
    return Layout(name, (SparRadioModel, SparRadioVisionModel), vision, source.text, table, left_out)


def ratio_of(inner: int, width: int) -> float:
    """The number that gives `inner` when `width` is multiplied by it and the result cut to an integer."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)


def trunk_table(source: Source, tower: str, layers: int, width: int) -> Table:
    """Our names -> theirs, for the trunk."""
    weights = source.weights
    table: Table = {
        f"{tower}embeddings.patch_projection.weight": ((f"{GENERATOR}embedder.weight",), same),
        f"{tower}embeddings.position_embedding": ((f"{GENERATOR}pos_embed",), same),
        f"{tower}embeddings.cls_register_token": ((f"{GENERATOR}cls_token.token",), same),
    }
    for name in ("norm_mean", "norm_std"):
        table[f"{tower}input_conditioner.{name}"] = ((f"input_conditioner.{name}",), same)
    for n in range(layers):
        ours, theirs = f"{tower}encoder.layer.{n}", f"{TRUNK}blocks.{n}"
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            table[f"{ours}.attention.{name}.weight"] = matrix(source, f"{theirs}.attn.qkv", index)
            if f"{theirs}.attn.qkv.bias" in weights:
                table[f"{ours}.attention.{name}.bias"] = ((f"{theirs}.attn.qkv.bias",), third(index))
        for mine, name in {"attention.o_proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():
            table |= linear(source, f"{ours}.{mine}", f"{theirs}.{name}")
        for index in (1, 2):
            table |= rename(f"{ours}.norm{index}", f"{theirs}.norm{index}")
            scale = f"{theirs}.ls{index}.gamma"  # C-RADIO has none
            rule: Rule = ((scale,), same) if scale in weights else ((), lambda: torch.ones(width))
            table[f"{ours}.layer_scale{index}.lambda1"] = rule
    return table


def head_table(source: Source, tower: str, vision: dict[str, Any]) -> Table:
    """Our names -> theirs, for the summary head of the chosen teacher; its sizes go into `vision`.

    Raises:
        ValueError: the file has no such head, or one of another kind.
    """
    theirs = f"_heads.{vision['adaptor']}"
    names = [name for name in source.weights if name.startswith(f"{theirs}.")]
    if not names:
        raise ValueError(
            f"{source.name} has no head of {vision['adaptor']!r} (the Hub's model.safetensors has the trunk alone). "
            f"Give NVIDIA's *_half.pth.tar, which has them all, or --adaptor {NO_HEAD} for the trunk's own features."
        )
    if f"{theirs}.final.2.bias" not in source.weights:
        raise ValueError(
            f"the head of {vision['adaptor']!r} has no {theirs}.final.2; it is of a kind that C-RADIOv3 and v4 do not "
            "have. Give one of these."
        )
    blocks = count_blocks(source.weights, f"{theirs}.blocks.")
    vision["adaptor_hidden_size"] = source.weights[f"{theirs}.fc1.bias"].shape[0]
    vision["adaptor_num_blocks"] = blocks
    vision["projection_dim"] = source.weights[f"{theirs}.final.2.bias"].shape[0]
    ours = f"{tower}adaptor"
    table: Table = dict(linear(source, f"{ours}.fc1", f"{theirs}.fc1"))
    pairs = {f"{ours}.blocks.{n}": f"{theirs}.blocks.{n}" for n in range(blocks)}
    for mine, other in {**pairs, f"{ours}.final": f"{theirs}.final"}.items():
        table |= rename(f"{mine}.norm", f"{other}.0")
        table |= linear(source, f"{mine}.linear", f"{other}.2")
    return table


def linear(source: Source, ours: str, theirs: str) -> Iterator[tuple[str, Rule]]:
    yield f"{ours}.weight", matrix(source, theirs)
    yield from rename(ours, theirs, ("bias",))


def matrix(source: Source, theirs: str, part: int | None = None) -> Rule:
    """A weight, or one of the fused queries, keys and values; multiplied out where it is trained by its norm.

    Such a weight is stored as W₀ and a scale: W = W₀ · (softplus(scale) + 0.05) / (uᵀ W₀ v + eps), the older form
    without softplus and 0.05; u and v are W₀'s first singular vectors as training last had them.
    """
    stored = f"{theirs}.parametrizations.weight."
    cut: Callable[[Tensor], Tensor] = same if part is None else third(part)
    if f"{stored}original" not in source.weights:
        return (f"{theirs}.weight",), cut
    at = f"{stored}0." if part is None else f"{stored}0.parts.{part}."
    if f"{at}scale" not in source.weights:
        return (f"{stored}original",), cut  # the values' may be left as they are
    version = (f"{at}_sn_version",) if f"{at}_sn_version" in source.weights else ()
    options = source.args.get("spectral_reparam")
    eps = options.get("eps", 1e-12) if isinstance(options, dict) else 1e-6

    def multiplied(original: Tensor, u: Tensor, v: Tensor, scale: Tensor, version: Tensor | int = 1) -> Tensor:
        weight, scale = cut(original).float(), scale.float()
        factor = F.softplus(scale) + 0.05 if int(version) == 2 else scale
        return weight * (factor / (u.float() @ weight @ v.float() + eps))

    return (f"{stored}original", f"{at}_u", f"{at}_v", f"{at}scale", *version), multiplied


# ------------------------------------------------------------------------------------ its own forward pass


class RadioReference(Reference):
    """C-RADIO's trunk and a teacher's summary head on each patch; the teacher's text tower in transformers' names."""

    def matrix(self, name: str) -> Tensor:
        """The weight of a linear layer, its spectral norm set where the file stores it so."""
        stored = f"{name}.parametrizations.weight"
        if f"{stored}.original" not in self.weights:
            return self.weights[f"{name}.weight"]
        whole = self.weights[f"{stored}.original"]
        fused = any(key.startswith(f"{stored}.0.parts.") for key in self.weights)
        rows = []
        for index, part in enumerate(whole.chunk(3) if fused else [whole]):
            at = f"{stored}.0.parts.{index}" if fused else f"{stored}.0"
            if f"{at}.scale" in self.weights:
                scale = self.weights[f"{at}.scale"]
                if self.weights.get(f"{at}._sn_version") == 2:
                    scale = scale.exp().log1p() + 0.05
                part = (
                    part * scale / torch.einsum("i,ij,j->", self.weights[f"{at}._u"], part, self.weights[f"{at}._v"])
                )
            rows.append(part)
        return torch.cat(rows)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(name), self.weights.get(f"{name}.bias"))

    def image_features(self, pixels: Tensor) -> Tensor:
        patch_px = self.vision["patch_size"]
        rows, columns = (math.ceil(side / patch_px) for side in pixels.shape[2:])
        if (rows * patch_px, columns * patch_px) != pixels.shape[2:]:
            pixels = F.interpolate(pixels, (rows * patch_px, columns * patch_px), mode="bicubic", align_corners=False)
        patches = F.unfold(pixels, patch_px, stride=patch_px).mT  # channel, row, column of a patch
        x = patches @ self.weights[f"{GENERATOR}embedder.weight"].T
        table = self.weights[f"{GENERATOR}pos_embed"]
        side, longer = math.isqrt(table.shape[1]), max(rows, columns)
        grid = table.mT.unflatten(2, (side, side))
        if longer != side:
            grid = F.interpolate(grid, (longer, longer), mode="bilinear", align_corners=False)
        x = x + grid[:, :, :rows, :columns].flatten(2).mT
        x = torch.cat([self.weights[f"{GENERATOR}cls_token.token"].expand(len(x), -1, -1), x], dim=1)
        for n in range(self.vision["num_hidden_layers"]):
            x = self.block(f"{TRUNK}blocks.{n}", x)
        x = x[:, -rows * columns :]
        if "adaptor" in self.vision:
            x = self.head(f"_heads.{self.vision['adaptor']}", x)
        return x.unflatten(1, (rows, columns))

    def block(self, name: str, x: Tensor) -> Tensor:
        qkv = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x, 1e-6))
        y = self.linear(f"{name}.attn.proj", self.attend(qkv, self.vision["num_attention_heads"]))
        x = x + y * self.weights.get(f"{name}.ls1.gamma", 1)
        y = F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x, 1e-6)))
        return x + self.linear(f"{name}.mlp.fc2", y) * self.weights.get(f"{name}.ls2.gamma", 1)

    def head(self, name: str, x: Tensor) -> Tensor:
        x = self.linear(f"{name}.fc1", x)
        for n in range(self.vision["adaptor_num_blocks"]):
            x = x + self.linear(f"{name}.blocks.{n}.2", F.gelu(self.norm(f"{name}.blocks.{n}.0", x, 1e-5)))
        return self.linear(f"{name}.final.2", F.gelu(self.norm(f"{name}.final.0", x, 1e-5)))

    def text_features(self, ids: Tensor) -> Tensor:
        text, causal = self.text, self.text["model_type"] == "clip_text_model"
        act, eps, name = ACTIVATIONS[text["hidden_act"]], text["layer_norm_eps"], "text_model."
        x = F.embedding(ids, self.weights[f"{name}embeddings.token_embedding.weight"])
        x = x + self.weights[f"{name}embeddings.position_embedding.weight"][: ids.shape[1]]
        for n in range(text["num_hidden_layers"]):
            layer = f"{name}encoder.layers.{n}"
            y = self.norm(f"{layer}.layer_norm1", x, eps)
            qkv = torch.cat([self.linear(f"{layer}.self_attn.{part}_proj", y) for part in "qkv"], dim=-1)
            x = x + self.linear(f"{layer}.self_attn.out_proj", self.attend(qkv, text["num_attention_heads"], causal))
            y = act(self.linear(f"{layer}.mlp.fc1", self.norm(f"{layer}.layer_norm2", x, eps)))
            x = x + self.linear(f"{layer}.mlp.fc2", y)
        x = self.norm(f"{name}final_layer_norm", x, eps)
        if causal:
            return self.linear("text_projection", x[torch.arange(len(ids)), ids.argmax(-1)])
        return self.linear(f"{name}head", x[:, -1])
