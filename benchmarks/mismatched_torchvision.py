"""Lets a torchvision be imported whose compiled operators don't match this torch: import this module first.

open_clip needs its transforms alone, transformers none of it; the import fails over two operators that neither calls.
"""

import contextlib
import importlib.util

import torch

if importlib.util.find_spec("torchvision") is not None:
    for operator in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        with contextlib.suppress(RuntimeError):  # declared already, by a torchvision that works
            torch.library.define(f"torchvision::{operator}", schema)
