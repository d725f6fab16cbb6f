"""Which arithmetic a device is fast at, and half-precision weights with fp32 products where half precision is slow."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

logger = logging.get_logger(__name__)

HALF = (torch.bfloat16, torch.float16)
# What runs in fp32 where half precision is slow: products, and the norms, which take no mixed types.
FULL = frozenset(
    {
        F.linear, F.conv2d, F.conv_transpose2d, F.layer_norm, F.group_norm, F.batch_norm,
        F.scaled_dot_product_attention,
        torch.einsum, torch.matmul, torch.mm, torch.bmm,
        torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.Tensor.mm, torch.Tensor.bmm,
    }
)  # fmt: skip


def cpu_capability() -> str:
    """The CPU's kind as PyTorch uses it, for records of measurements: "AVX2", "AVX512, fast bfloat16", ..."""
    fast = [str(dtype).removeprefix("torch.") for dtype in HALF if fast_half("cpu", dtype)]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *(f"fast {name}" for name in fast)])


def fast_half(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether a device multiplies matrices of a half-precision type at least as fast as those of fp32.

    On a CPU that is what oneDNN has kernels for; without them PyTorch's products are many times slower than fp32's.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return FAST_ON_CPU[dtype]
    if device.type == "cuda" and dtype == torch.bfloat16:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def cpu_is_fast_at(dtype: torch.dtype) -> bool:
    """`fast_half` of this CPU, asked of PyTorch."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    # oneDNN also says yes to AVX-512 without bf16 instructions, where it emulates them.
    native = platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_bf16_supported()
    return native and torch.ops.mkldnn._is_mkldnn_bf16_supported()


FAST_ON_CPU = {dtype: cpu_is_fast_at(dtype) for dtype in HALF}  # asked once: torch.compile can't ask


def best_dtype(device: torch.device | str) -> torch.dtype:
    """The fastest type that a device runs this library's models in: bf16, or fp32 where that is no faster."""
    return torch.bfloat16 if fast_half(device, torch.bfloat16) else torch.float32


class FullProducts(TorchFunctionMode):
    """Inside, products are made in fp32 whatever type the weights are stored in; results are fp32."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FULL:
            if func is F.linear and not torch.is_grad_enabled() and args[1].dtype in HALF:
                args = (args[0], self._widened(args[1]), *args[2:])
            args = [_full(argument) for argument in args]
            kwargs = {name: _full(argument) for name, argument in kwargs.items()}
        return func(*args, **kwargs)

    def _widened(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight in fp32, in one buffer for all: new memory for each costs more than the conversion."""
        if self._buffer is None or self._buffer.numel() < weight.numel():
            self._buffer = torch.empty(weight.numel(), dtype=torch.float32)
        return self._buffer[: weight.numel()].view(weight.shape).copy_(weight)


def _full(argument: Any) -> Any:
    half = isinstance(argument, torch.Tensor) and argument.dtype in HALF
    return argument.float() if half else argument


def products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """What to run a model of this type in on a device: `FullProducts` where half precision is slow; says so once."""
    if dtype not in HALF or fast_half(device, dtype):
        return nullcontext()
    if not torch.compiler.is_compiling():
        name = str(dtype).removeprefix("torch.")
        logger.warning_once(
            f"this {device.type.upper()} ({torch.backends.cpu.get_cpu_capability()}) has no fast {name}: the weights "
            f"stay {name}, products are made in float32."
        )
    return FullProducts()


def with_fast_products(method: Callable) -> Callable:
    """A method of something with `device` and `dtype`, in the arithmetic that its device is fast at."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with products(self.device, self.dtype):
            return method(self, *args, **kwargs)

    return run


def in_fast_arithmetic(forward: Callable) -> Callable:
    """`with_fast_products` of a model's forward; what it returns has the model's type."""
    forward = with_fast_products(forward)

    @wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        slow = self.dtype in HALF and not fast_half(self.device, self.dtype)
        return _cast(outputs, self.dtype) if slow else outputs

    return run


def _cast(outputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs.to(dtype) if outputs.is_floating_point() else outputs
    if isinstance(outputs, ModelOutput):
        return type(outputs)(**{name: _cast(value, dtype) for name, value in outputs.items()})
    return tuple(_cast(value, dtype) for value in outputs) if isinstance(outputs, tuple) else outputs
