"""The teacher: any dense encoder, by default the student's own starting weights in a sliding window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin

from ..build import build_encoder, build_segmenter, record, window_of
from ..checkpoints import load_tower
from ..encoder_spar import DenseVisionModel
from ..encoders.base import DenseEncoder
from ..encoders.composition import Ensemble, Regridded, Resized
from ..encoders.sliding_window import SlidingWindow
from ..encoders.upsampled import Upsampled
from ..files import check_finite, weights_digest
from ..methods.table import find_method
from ..sources import BadImage
from ..upsampling import check_upsampler, load_upsampler
from .cache import FeatureStore
from .label_teacher import LabelTeacher
from .specs import StudentSpec, TeacherSpec
from .views import Views


def normalise(pixels: torch.Tensor, config: Any) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float with the configuration's mean and std."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (config.image_mean, config.image_std))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def load_student(spec: StudentSpec) -> tuple[Any, Any, ProcessorMixin | None]:
    """`load_tower` of the network that learns.

    Raises:
        ValueError: there is no such network, or its weights hold NaN or infinity.
    """
    wanted = {"method": spec.method, "attention_reach": spec.reach}
    loaded = load_tower(spec.model, **{field: value for field, value in wanted.items() if value is not None})
    check_finite(f"student {spec.model}", loaded[1].state_dict())
    return loaded


def describe_trunk(vision: DenseVisionModel, first_block: int) -> dict[str, Any]:
    """What the tokens that enter a block depend on, as JSON."""
    # Not on the method and its last block, which come after it.
    fields = ("position_interpolation", "size_rule", "attention_reach")
    runs = {field: getattr(vision.config, field) for field in fields}
    return {"first_block": first_block, "weights": weights_digest(vision), **runs}


def build_teacher(spec: TeacherSpec, student: StudentSpec, patch_px: int) -> tuple[DenseEncoder, dict[str, Any]]:
    """The dense encoder of a specification, without gradients.

    Args:
        spec: what to build; its `dtype` is settled, see `TeacherSpec.on`.
        student: its checkpoint is the teacher's where that has none.
        patch_px: the student's patch, whose grid the features get.

    Returns:
        The encoder, and what its features depend on, as JSON.

    Raises:
        ValueError: a method, network, window or size that can't be, or weights with NaN or infinity.
    """
    name = spec.model or student.model
    model, vision, processor = load_tower(name, dtype=getattr(torch, spec.dtype))
    vision.requires_grad_(False)
    check_finite(f"teacher {name}", vision.state_dict())
    if spec.label_method is not None:
        if processor is None:
            raise ValueError(
                f"a label method needs words, and {name} is a vision tower alone; give a whole checkpoint."
            )
        return build_label_teacher(spec, student, model.requires_grad_(False), processor)
    upsampler = None if spec.upsample is None else load_upsampler(spec.upsample)
    teachers: list[DenseEncoder] = []
    depend_on = []
    for method in spec.methods or (None,):
        needs = find_method(method).networks if method else {}
        networks = {network: given for network, given in spec.networks.items() if network in needs}
        encoder: Any = build_encoder(vision, method, networks=networks or None, reach=spec.reach)
        encoder.requires_grad_(False)
        for network in networks:
            check_finite(f"network {network} of the teacher, {networks[network]}", encoder.state_dict())
        makes_windows = method is not None and find_method(method).whole_image
        windows, window_px, strides_px = in_windows(encoder, spec, makes_windows)
        fields = {
            "weights": weights_digest(encoder),
            **encoder.config.features_depend_on(),
            "window_px": window_px,
            "stride_px": single(strides_px),
        }
        if not isinstance(encoder, DenseVisionModel):
            fields["recipe"] = None  # the method is in a file
        if upsampler is not None:
            windows = [Upsampled(window, upsampler, spec.upsample_factor) for window in windows]
            fields["upsample"] = upsampling(spec, upsampler, encoder.config.patch_size)
        if windows[0].config.patch_size != patch_px or makes_windows:
            windows = [Regridded(window, patch_px) for window in windows]
        sides = spec.short_sides_px or (0,)
        teachers += [Resized(window, side) if side else window for window in windows for side in sides]
        depend_on.append(fields)
    described = {
        "model": Path(name).name if Path(name).is_dir() else name,  # no path of this machine in the weights
        "revision": getattr(vision.config, "_commit_hash", None),
        **{field: single([fields[field] for fields in depend_on]) for field in depend_on[0]},
        "dtype": spec.dtype,
        "short_side_px": single(list(spec.short_sides_px) or [None]),
        "mean": None if len(teachers) == 1 else "normalised features" if len(depend_on) > 1 else "features",
    }
    return teachers[0] if len(teachers) == 1 else Ensemble(teachers, normalise=len(depend_on) > 1), described


def build_label_teacher(
    spec: TeacherSpec, student: StudentSpec, model: Any, processor: Any
) -> tuple[DenseEncoder, dict[str, Any]]:
    """The teacher whose score maps become features of the student's space; see `build_teacher`."""
    upsampler = None if spec.upsample is None else load_upsampler(spec.upsample)
    segmenter = build_segmenter(
        model,
        processor,
        spec.label_method,
        networks=spec.networks or None,
        settings=spec.settings,
        window=None if spec.window_px == 0 else spec.window_px or "paper",
        stride_px=spec.strides_px[0] if spec.strides_px else None,
        window_batch=spec.window_batch,
        reach=spec.reach,
        refine=spec.refine,
        upsample=upsampler,
        upsample_factor=spec.upsample_factor,
    )
    # The student's own starting tower: its features are moved, in its own text space.
    own, tower, words = load_student(student)
    if words is None:
        raise ValueError(f"a label method needs words, and {student.model} is a vision tower alone.")
    text_embeds = words.encode_labels(own, spec.labels).text_embeds  # type: ignore[attr-defined]
    encoder = tower.to(getattr(torch, spec.dtype))
    teacher = LabelTeacher(segmenter, segmenter.encode_labels(spec.labels), text_embeds, encoder, spec.target)
    teacher.requires_grad_(False)
    name = spec.model or student.model
    return teacher, {
        "model": Path(name).name if Path(name).is_dir() else name,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": weights_digest(teacher),
        "method": spec.label_method,
        **record(spec.label_method, spec.networks, spec.settings, spec.refine),
        "attention_reach": spec.reach or encoder.config.attention_reach,
        "window_px": spec.window_px,
        "stride_px": spec.strides_px[0] if spec.strides_px else None,
        **({} if upsampler is None else {"upsample": upsampling(spec, upsampler, encoder.config.patch_size)}),
        "labels": [list(names) for names in spec.labels.classes],  # type: ignore[union-attr]
        "target": asdict(spec.target),
        "dtype": spec.dtype,
        "short_side_px": None,
        "mean": None,
    }


def upsampling(spec: TeacherSpec, upsampler: Any, patch_px: int) -> dict[str, Any]:
    """What the features depend on by their upsampler, as JSON."""
    learned = isinstance(upsampler, nn.Module) and next(upsampler.parameters(), None) is not None
    weights = {"weights": weights_digest(upsampler)} if learned else {}
    factor = spec.upsample_factor or patch_px
    return {"name": check_upsampler(spec.upsample or ""), "factor": factor, **weights}


def in_windows(encoder: Any, spec: TeacherSpec, makes_windows: bool) -> tuple[list[Any], int | None, list[int | None]]:
    """The encoder in the windows of a specification, one for each step; the side of the window; the steps.

    An encoder that makes windows of its own runs in one pass unless the specification has a window.
    """
    if spec.window_px == 0 or (makes_windows and spec.window_px is None):
        return [encoder], None, [None]
    sizes = [window_of(encoder.config, spec.window_px, stride_px) for stride_px in spec.strides_px or (None,)]
    windows = [SlidingWindow(encoder, window_px, stride_px, spec.window_batch) for window_px, stride_px in sizes]
    return windows, sizes[0][0], [stride_px for _, stride_px in sizes]


def single(values: list) -> Any:
    """The value itself where all are the same, so that the record of an ordinary teacher has no lists."""
    return values[0] if all(value == values[0] for value in values) else values


@torch.no_grad()
def teacher_features(teacher: DenseEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, h, w, D)."""
    return teacher(normalise(pixels, teacher.config).to(teacher.dtype)).patch_embeds


def sample_features(
    teacher: DenseEncoder | None, store: FeatureStore | None, views: Views, count: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Up to `count` views, spread over the first epoch, and their features (h, w, D) from the store or the teacher."""
    numbers = list(views.of_epoch(0)) if store is None else sorted(store.index)
    for number in numbers[:: -(-len(numbers) // count)]:
        if store is not None:
            yield number, store.read(number, "features").float()
        elif teacher is not None:
            try:
                pixels = torch.from_numpy(views.pixels(number)).to(teacher.device)
            except BadImage:
                continue  # training will report it
            yield number, teacher_features(teacher, pixels[None])[0].float().cpu()


def mean_feature(
    teacher: DenseEncoder | None, store: FeatureStore | None, views: Views
) -> tuple[torch.Tensor, torch.Tensor]:
    """The direction that all features share, over up to 64 views.

    Returns:
        Mean feature (D,) and the root mean square of the features' lengths.
    """
    vectors, squares = [], []
    for _, features in sample_features(teacher, store, views, 64):
        vectors.append(features.mean(dim=(0, 1)))
        squares.append(features.square().sum(-1).mean())
    return torch.stack(vectors).mean(0), torch.stack(squares).mean().sqrt()


@torch.no_grad()
def linear_head(
    student: Student, teacher: DenseEncoder | None, store: FeatureStore | None, views: Views, patches: int = 64
) -> torch.Tensor:
    """The affine map from the student's features, before it learns, to the teacher's: least squares, up to 400 views.

    A mean over windows or sizes is shorter than what it is a mean of, by directions unevenly. A student compared with
    it directly learns first to shorten its features so, which a linear map explains and which costs mean IoU
    (docs/experiments.md); compared through this map, it learns what no linear map of its own features gives. Beyond
    SPAR; a fixed form of the regressor of FitNets (Romero et al., ICLR 2015).

    Args:
        student: with its starting weights; on stored tokens if it has a `first_block`.
        teacher, store, views: as for training.
        patches: most patches of a view, evenly spread.

    Returns:
        (1 + D, D), the constant first.
    """
    ours, theirs = [], []
    for number, features in sample_features(teacher, store, views, 400):
        if student.first_block and store is not None:
            start = student(store.read(number, "trunk")[None], (features.shape[0], features.shape[1]))
        else:
            try:
                start = student(torch.from_numpy(views.pixels(number))[None])
            except BadImage:  # since its features were stored; training names and counts it
                continue
        chosen = torch.linspace(0, features.shape[0] * features.shape[1] - 1, patches).long().unique()
        ours.append(start[0].flatten(0, 1)[chosen].float())
        theirs.append(features.flatten(0, 1)[chosen])
    constant = nn.functional.pad(torch.cat(ours), (1, 0), value=1.0)
    return torch.linalg.lstsq(constant, torch.cat(theirs), driver="gelsd").solution  # gelsd: any rank


@singledispatch
def pixels_seen(teacher: Any, size_hw: tuple[int, int]) -> int:
    """What an image costs the teacher: pixels that go through its network, each window's counted."""
    return size_hw[0] * size_hw[1]


@pixels_seen.register
def _(teacher: SlidingWindow, size_hw: tuple[int, int]) -> int:
    window_hw = (min(size_hw[0], teacher.window_px), min(size_hw[1], teacher.window_px))
    return teacher.num_windows(*size_hw) * pixels_seen(teacher.encoder, window_hw)


@pixels_seen.register
def _(teacher: Regridded, size_hw: tuple[int, int]) -> int:
    return pixels_seen(teacher.encoder, size_hw)


@pixels_seen.register
def _(teacher: Resized, size_hw: tuple[int, int]) -> int:
    return pixels_seen(teacher.encoder, teacher.size_hw(*size_hw))


@pixels_seen.register
def _(teacher: LabelTeacher, size_hw: tuple[int, int]) -> int:
    return 2 * size_hw[0] * size_hw[1]  # the method's pass and the tower's; the method's windows are not counted


@pixels_seen.register
def _(teacher: Ensemble, size_hw: tuple[int, int]) -> int:
    return sum(pixels_seen(encoder, size_hw) for encoder in teacher.encoders)


class Student(nn.Module):
    """The network that learns: on pixels, or on the stored input of its first trained block.

    Args:
        vision: the vision tower.
        first_block: 0-based block that stored inputs belong to.
    """

    def __init__(self, vision: DenseVisionModel, first_block: int = 0):
        super().__init__()
        self.vision = vision
        self.first_block = first_block

    def forward(self, inputs: torch.Tensor, grid_hw: tuple[int, int] | None = None) -> torch.Tensor:
        """Patch features (B, h, w, D).

        Args:
            inputs: pixels (B, H, W, 3) uint8; or with `grid_hw` the tokens (B, P + h * w, C) that enter `first_block`.
            grid_hw: rows and columns of patches.
        """
        if grid_hw is None:
            return self.vision(normalise(inputs, self.vision.config)).patch_embeds
        return self.vision.patches_from(inputs.to(self.vision.dtype), grid_hw, self.first_block)

    @torch.no_grad()
    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        """The tokens (B, P + h * w, C) that enter `first_block`."""
        vision = self.vision
        return vision(normalise(pixels, vision.config), output_hidden_states=True).hidden_states[self.first_block]
