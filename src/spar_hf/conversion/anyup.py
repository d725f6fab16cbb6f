"""AnyUp's weights as its authors released them, into `save_pretrained` form, checked against a plain forward pass.

The reference is written with PyTorch's own layers on the source's own names, whole matrices and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..anyup_spar import SparAnyUp, SparAnyUpConfig
from ..pretrained import open_model
from .convert import Comparison, Converted, measure, new_folder, rename_weights, set_weights, write_checked
from .layouts import Layout, Table, rename, same, third
from .source import Source, read_source

# Ours -> theirs.
ENCODERS = {
    "image_encoder": "image_encoder",
    "query_encoder": "query_encoder",
    "key_encoder": "key_encoder",
    "feature_encoder": "key_features_encoder",
    "aggregation": "aggregation",
}
ATTENTION = "cross_decode.cross_attn"


def anyup_layout(source: Source) -> Layout:
    """The released network; heads, groups and the window cannot be seen in the shapes and are the published ones.

    Raises:
        ValueError: this is no AnyUp.
    """
    weights = source.weights
    bases, freqs = weights.get("key_features_encoder.0.basis"), weights.get("rope.freqs")
    if bases is None or freqs is None:
        missing = "key_features_encoder.0.basis" if bases is None else "rope.freqs"
        raise ValueError(f"there is no {missing}; this is no AnyUp of its authors. Check --backbone.")
    if bases.shape[0] != freqs.shape[1]:
        raise ValueError(
            f"there are {bases.shape[0]} bases for {freqs.shape[1]} channels; the released networks have as many."
        )
    table: Table = {"frequencies": (("rope.freqs",), same)}
    for ours, theirs in ENCODERS.items():
        if ours == "feature_encoder":
            table[f"{ours}.first.weight"] = ((f"{theirs}.0.basis",), lambda weight: weight[:, 0])
        else:
            rule = same if ours == "aggregation" else flat
            table[f"{ours}.first.weight"] = ((f"{theirs}.0.weight",), rule)
        for block in (0, 1):
            for index in (0, 1):
                mine, other = f"{ours}.blocks.{block}", f"{theirs}.{block + 1}.block"
                table |= rename(f"{mine}.norm{index + 1}", f"{other}.{3 * index}")
                table[f"{mine}.linear{index + 1}.weight"] = ((f"{other}.{3 * index + 2}.weight",), flat)
    table["query_convolution.weight"] = (("cross_decode.conv2d.weight",), same)
    for index, name in enumerate(("query", "key")):
        table[f"{name}_norm.weight"] = ((f"{ATTENTION}.norm_{name[0]}.weight",), same)
        for kind in ("weight", "bias"):
            table[f"{name}_projection.{kind}"] = ((f"{ATTENTION}.attention.in_proj_{kind}",), third(index))
    left_out = {
        f"{ATTENTION}.attention.out_proj.{kind}": "features go through as they are" for kind in ("weight", "bias")
    }
    sizes = {"hidden_size": freqs.shape[1], "basis_size": bases.shape[2]}
    return Layout(f"AnyUp, {sizes['hidden_size']} channels", (SparAnyUp, SparAnyUp), sizes, {}, table, left_out)


def flat(weight: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix."""
    return weight[:, :, 0, 0]


def convert_anyup(path: Path | str, output: Path | str, allow: Sequence[str] = ()) -> Converted:
    """Writes OUTPUT, a folder for `SparAnyUp.from_pretrained` and `--upsample anyup=OUTPUT`, and checks it.

    Args:
        path: the authors' file, a plain state dict.
        output: a folder that is not there yet or is empty.
        allow: patterns of weights that may be unused.

    Raises:
        ValueError: the file cannot be read safely or is no AnyUp, a weight is unused or missing, or the written
            network does not agree with the source.
    """
    output = new_folder(output)
    source = read_source([Path(path)])
    layout = anyup_layout(source)
    weights, used, left_out, allowed = rename_weights(source, layout, allow)
    provenance = f"{source.name} (SHA-256 {source.digest}...), {layout.name}; Wimmer et al., CC-BY-4.0"
    model = SparAnyUp(SparAnyUpConfig(**layout.vision, source=provenance)).eval()
    set_weights(model, weights, allowed)

    def write(draft: Path) -> Converted:
        model.save_pretrained(draft)
        comparisons = compare(open_model(SparAnyUp, draft), source.weights)
        return Converted(
            source.name, source.digest, layout.name, used, left_out, allowed, layout.vision, {}, comparisons
        )

    return write_checked(output, write)


@torch.no_grad()
def compare(model: SparAnyUp, weights: dict[str, Tensor]) -> list[Comparison]:
    """Features at the image's size, larger, smaller and off the patch grid, of several widths."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for size_hw, grid_hw, out_hw, depth in (
        ((64, 64), (4, 4), (64, 64), 48),
        ((64, 96), (4, 6), (96, 128), 24),
        ((90, 75), (5, 4), (33, 20), 100),
    ):
        image = torch.rand(1, 3, *size_hw, generator=generator, dtype=torch.float64)
        features = torch.randn(1, *grid_hw, depth, generator=generator, dtype=torch.float64)
        expected = reference(weights, image, features, out_hw)
        # In fp64: random weights amplify every rounding, in the source's own code as well.
        ours = model.double()(image, features, out_hw)
        found.append(
            measure(f"{depth} channels, {grid_hw[0]} x {grid_hw[1]} to {out_hw[0]} x {out_hw[1]}", ours, expected)
        )
    return found


def reference(weights: dict[str, Any], image: Tensor, features: Tensor, out_hw: tuple[int, int]) -> Tensor:
    """The network in PyTorch's own layers; see `SparAnyUp.forward` for the shapes."""
    weights = {name: weight.to(image.dtype) for name, weight in weights.items()}
    values = features.permute(0, 3, 1, 2)
    batch, depth, rows, columns = values.shape

    def blocks(name: str, x: Tensor) -> Tensor:
        for block in (f"{name}.1.block", f"{name}.2.block"):
            y = x
            for norm, convolution in ((0, 2), (3, 5)):
                y = F.group_norm(y, 8, weights[f"{block}.{norm}.weight"], weights[f"{block}.{norm}.bias"])
                y = F.conv2d(F.silu(y), weights[f"{block}.{convolution}.weight"])
            x = x + y
        return x

    def encode(name: str, x: Tensor) -> Tensor:
        return blocks(name, F.conv2d(x, weights[f"{name}.0.weight"]))

    mean, std = (image.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    x = encode("image_encoder", (image - mean) / std)
    down, across = (torch.linspace(0, 1, n, dtype=x.dtype) for n in x.shape[2:])
    by_row, by_column = weights["rope.freqs"].view(2, -1, 1, 1)
    angle = by_row * down[:, None] + by_column * across
    first, second = x.chunk(2, dim=1)
    x = x * angle.cos() + torch.cat([-second, first], dim=1) * angle.sin()

    queries = F.adaptive_avg_pool2d(encode("query_encoder", x), out_hw)
    queries = F.conv2d(queries, weights["cross_decode.conv2d.weight"], padding=1)

    basis = weights["key_features_encoder.0.basis"]
    count, size = basis.shape[0], basis.shape[-1]
    unit = F.normalize(values, dim=1)
    responses = F.conv2d(unit, basis.repeat(depth, 1, 1, 1), padding=size // 2, groups=depth)
    taps = F.conv2d(torch.ones_like(unit[:, :1]), torch.ones_like(basis[:1]), padding=size // 2)
    responses = (responses / taps).view(batch, count, depth, rows, columns)  # as released: channel-major, read so
    unified = blocks("key_features_encoder", responses.softmax(1).mean(2))
    keys = torch.cat([F.adaptive_avg_pool2d(encode("key_encoder", x), (rows, columns)), unified], dim=1)
    keys = F.conv2d(F.pad(keys, (1, 1, 1, 1), mode="reflect"), weights["aggregation.0.weight"])
    keys = blocks("aggregation", keys)

    heads = []
    for index, (name, tokens) in enumerate((("q", queries), ("k", keys))):
        tokens = F.rms_norm(tokens.flatten(2).mT, tokens.shape[1:2], weights[f"{ATTENTION}.norm_{name}.weight"])
        weight, bias = (
            weights[f"{ATTENTION}.attention.in_proj_{kind}"].chunk(3)[index] for kind in ("weight", "bias")
        )
        heads.append(F.linear(tokens, weight, bias).unflatten(2, (4, -1)).transpose(1, 2))
    scores = heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5
    seen = []
    for length, patches in zip(out_hw, (rows, columns), strict=True):
        centre = (torch.arange(length, dtype=torch.float32) + 0.5) / length
        low, high = (((centre + sign * 0.1).clamp(0, 1) * patches)[:, None] for sign in (-1, 1))
        place = torch.arange(patches)
        seen.append((place >= low.floor()) & (place < high.ceil()))
    mask = (seen[0][:, None, :, None] & seen[1][None, :, None, :]).flatten(2).flatten(0, 1)
    attention = scores.masked_fill(~mask, -torch.inf).softmax(-1).mean(1)
    return (attention @ features.flatten(1, 2)).unflatten(1, out_hw)
