"""What a distillation leaves behind: a model folder, and mean IoU before and after."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import load_tower
from ..evaluation import evaluate, load_benchmark
from ..files import whole_folder, write_json
from ..segmentation_spar import FromFeatures
from .specs import StudentSpec
from .teacher import load_student

# Of what a run was made from, beside the teacher: what the model's configuration remembers.
KEPT = (
    "data", "augmentation", "augmentation_seed", "draws", "train", "loss", "head", "learning_rate", "steps", "seed",
)  # fmt: skip


def describe_software(folder: Path) -> dict[str, Any]:
    """Revision of the code in a folder and versions of what it runs on, for the record of a run."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:  # a machine without git
            return ""

    revision = git("rev-parse", "HEAD") + ("-modified" if git("status", "--porcelain", "-uno") else "")
    packages = ("spar-hf", "torch", "transformers", "accelerate", "numpy", "pillow")
    versions = {"python": sys.version.split()[0], **{name: version(name) for name in packages}}
    return {"git_revision": revision or None, "versions": versions}


def write_student(
    folder: Path,
    spec: StudentSpec,
    weights: Mapping[str, torch.Tensor],
    made_from: Mapping[str, Any],
    git_revision: str | None,
) -> tuple[Any, Any]:
    """Writes the starting checkpoint with the new vision tower, for `AutoModel.from_pretrained` and `spar_hf.load`.

    Args:
        folder: appears whole, in the place of one that is there.
        spec: of the student.
        weights: of its vision tower.
        made_from: what the run depends on; goes into the configuration.
        git_revision: of the code.

    Returns:
        The model and its processor; the processor is None for a vision tower alone.

    Raises:
        OSError: the disk is full; nothing is left behind.
    """
    model, vision, processor = load_student(spec)
    vision.load_state_dict(weights)
    teacher = {**made_from["teacher"], **{name: made_from[name] for name in KEPT}, "git_revision": git_revision}
    for config in (vision.config, getattr(model.config, "vision_config", vision.config)):
        config.teacher = teacher
    with whole_folder(folder) as draft:
        model.save_pretrained(draft)
        if processor is not None:
            processor.save_pretrained(draft)
    return model, processor


def evaluate_before_and_after(
    path: Path, start: str, student: Any, processor: Any, scales: Sequence[float], scenes: int
) -> dict[str, dict[str, float]]:
    """Mean IoU in one pass on the picture book, before and after; also written as JSON.

    The teacher's own is `spar evaluate --window-px native --stride-px 24`.

    Args:
        path: metrics.json.
        start: the checkpoint that training began with.
        student: the model.
        processor: its processor.
        scales: sizes, times the native side.
        scenes: of each evaluation.

    Returns:
        `start` and `student`: scale ("4x") -> mean IoU from 0 to 1.
    """
    models = {"start": load_tower(start)[0], "student": student}
    metrics: dict[str, dict[str, float]] = {name: {} for name in models}
    for scale in scales:
        data = load_benchmark("picturebook", scale=scale, native_px=student.vision_model.config.image_size)
        for name, model in models.items():
            segmenter = FromFeatures(model.vision_model, model, processor)
            metrics[name][f"{scale:g}x"] = evaluate(segmenter, processor, data, limit=scenes).mean_iou
    write_json(path, {"mean_iou": metrics, "scenes": scenes})
    return metrics
