"""Other arithmetic for an ONNX graph: fp16, and int8 products with scales found at run time or on pictures before."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..extras import extra_package
from .graphs import quiet

PRODUCTS = ("MatMul", "Gemm")
# Products of two activations (queries with keys, maps with values) stay fp32: in int8 they gain little and cost most
# of the accuracy.
WEIGHTS_ONLY = {"MatMulConstBOnly": True}


def to_float16(source: Path, target: Path) -> None:
    """Weights and products in fp16; inputs and outputs stay fp32, and so does what finds places on a grid."""
    onnx = extra_package("onnx", "onnx")
    float16 = extra_package("onnxruntime.transformers.float16", "onnx")
    # Positions are found once an image, in numbers that fp16 can't hold: 2 * 256 + 1 over 2,048 pixels.
    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, "GridSample", "Range", "Log", "Cos", "Sin"]
    with quiet():
        model = float16.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True, op_block_list=blocked)
        onnx.save(model, str(target))


def to_int8(source: Path, target: Path) -> None:
    """Products with weights in int8, a scale for each output channel; activations are scaled as they come."""
    quantization = extra_package("onnxruntime.quantization", "onnx")
    with quiet():
        quantization.quantize_dynamic(
            source,
            target,
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            extra_options=WEIGHTS_ONLY,
        )


def to_static_int8(source: Path, target: Path, name: str, inputs: Iterable[np.ndarray]) -> None:
    """Products with weights in int8, and activations whose scales are found beforehand (QDQ).

    Args:
        source, target: files of graphs.
        name: of the graph's input.
        inputs: what it may get; the largest and smallest value of each activation on them make its scale.
    """
    quantization = extra_package("onnxruntime.quantization", "onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.left = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            values = next(self.left, None)
            return None if values is None else {name: values}

    with quiet():
        quantization.quantize_static(
            source,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options=WEIGHTS_ONLY,
        )
