"""Towers out of PyTorch: programs of torch.export that take any batch and size, and their ONNX graphs."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..extras import extra_package

OPSET = 20  # onnxruntime-web reads it; bicubic sampling and antialiased resizing need it
MIN_OPSET = 20
MAX_GRAPH_BYTES = 2**31 - 2**24  # of one protobuf file
VISION_OUTPUTS, TEXT_OUTPUTS = ("patch_embeds", "image_embeds"), ("text_embeds",)
# What the axes of inputs and outputs are called.
AXES = {
    "pixel_values": ("batch", None, "height", "width"),
    "patch_embeds": ("batch", "rows", "columns", None),
    "image_embeds": ("batch", None),
    "input_ids": ("texts", "tokens"),
    "text_embeds": ("texts", None),
}


class VisionGraph(nn.Module):
    """Pixels (B, 3, H, W) -> `patch_embeds` (B, h, w, D), `image_embeds` (B, D)."""

    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vision: Any = self.vision
        outputs = vision(pixel_values)
        return outputs.patch_embeds, outputs.image_embeds


class TextGraph(nn.Module):
    """Token ids (K, length) -> `text_embeds` (K, D), not normalised.

    There is no attention mask: CLIP's and dino.txt's towers are causal and read the end token, which sees no padding,
    and SigLIP's was trained to read the padding.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        model: Any = self.model
        return model.get_text_features(input_ids=input_ids).pooler_output


class FusedAttention(TorchFunctionMode):
    """Inside, attention is exported as onnxruntime's `MultiHeadAttention`, which never holds an N x N map.

    Nearly all of the time that onnxruntime loses against PyTorch, and of the memory, is in such maps. Programs made so
    are for ONNX alone: PyTorch knows no kernel of that operator.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or len(args) != 3 or kwargs.keys() - {"attn_mask"}:
            return func(*args, **kwargs)
        heads = args[0].shape[1]
        tokens = [part.transpose(1, 2).flatten(2) for part in args]  # (B, H, N, d) -> (B, N, H * d)
        mask = kwargs.get("attn_mask")
        if mask is not None:
            tokens += [None, None, mask if mask.ndim == 4 else mask[None, None]]
        out = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            tokens,
            {"num_heads": heads},
            dtype=tokens[0].dtype,
            shape=tokens[0].shape,
            version=1,
        )
        return out.unflatten(2, (heads, -1)).transpose(1, 2)


def vision_program(vision: Any) -> torch.export.ExportedProgram:
    """The vision tower with dynamic batch, height and width."""
    patch_px, side = vision.config.patch_size, vision.config.image_size // vision.config.patch_size
    # Sizes that coincide with nothing: two or more of everything, no native grid, no multiple of the patch.
    example = torch.zeros(2, vision.config.num_channels, (side + 3) * patch_px + 5, (side + 1) * patch_px + 3)
    return _program(VisionGraph(vision), "pixel_values", example, (0, 2, 3))


def text_program(model: Any) -> torch.export.ExportedProgram:
    """The text tower with dynamic number and length of texts."""
    example = torch.zeros(3, min(7, model.config.text_config.max_position_embeddings), dtype=torch.long)
    return _program(TextGraph(model), "input_ids", example, (0, 1))


def _program(module: nn.Module, name: str, example: torch.Tensor, axes: tuple[int, ...]) -> Any:
    dynamic = {axis: torch.export.Dim.AUTO for axis in axes}
    with quiet(), torch.no_grad():
        try:
            return torch.export.export(module.eval(), (example,), dynamic_shapes={name: dynamic}, strict=False)
        except Exception as error:  # torch.export's many classes, and Python's own
            raise ValueError(
                f"{type(module).__name__} cannot be exported: {first_line(error)}. What a graph can't say must go: "
                "adapters that act by data, hooks."
            ) from error


def to_onnx(
    program: torch.export.ExportedProgram, path: Path, name: str, outputs: tuple[str, ...], opset: int
) -> None:
    """Writes a program as an ONNX file.

    Raises:
        ValueError: an operator is none of the opset's, or the weights do not fit into one file.
    """
    extra_package("onnx", "onnx")
    extra_package("onnxscript", "onnx")
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if size > MAX_GRAPH_BYTES:
        raise ValueError(
            f"{path.stem} has {size / 1e9:.1f} GB of weights, and an ONNX file holds {MAX_GRAPH_BYTES / 1e9:.1f} GB; "
            "export it with format torch-export."
        )
    with quiet():
        try:
            graph = torch.onnx.export(
                program,
                (),
                opset_version=opset,
                dynamo=True,
                verbose=False,
                input_names=[name],
                output_names=list(outputs),
            )
            assert graph is not None
            for value in (*graph.model.graph.inputs, *graph.model.graph.outputs):
                value.shape = _named(value)
            graph.save(str(path))
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(_about_operators(path.stem, error, opset)) from error


def _named(value: Any) -> Any:
    from onnx_ir import Shape  # comes with onnxscript

    names = AXES[value.name]
    return Shape([size if name is None else name for size, name in zip(value.shape, names, strict=True)])


def _about_operators(graph: str, error: BaseException, opset: int) -> str:
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    lacking = re.search(r"No (?:decompositions|ONNX function)[^']*?'?<?OpOverload[^']*'([\w.:]+)'", " ".join(chain))
    if lacking:
        return (
            f"{graph} uses the operator {lacking[1]}, which ONNX opset {opset} lacks; merge or remove the module that "
            "uses it, or export with format torch-export."
        )
    return f"{graph} cannot be written in ONNX opset {opset}: {first_line(error)}. Export with format torch-export."


def first_line(error: BaseException) -> str:
    """What an error says, its first line that says something."""
    lines = (" ".join(line.split()).strip(".") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own messages, of packages that are not used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
