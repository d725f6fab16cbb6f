"""Which networks learn and teach: plain values that the command line fills in and a record of a run keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..arithmetic_spar import best_dtype
from ..methods.table import find_method
from ..names_spar import one_of, unknown
from ..prompts_spar import Labels
from ..refinement import find_refinements
from ..upsampling import check_upsampler
from .label_teacher import Settings

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class StudentSpec:
    """Which network learns.

    Attributes:
        model: `tiny`, a folder or a Hub id.
        method: its last block, a row of `METHODS`; None leaves it as the checkpoint has it.
        reach: how far its attention reaches, `image` or `window`; None likewise.
    """

    model: str
    method: str | None = None
    reach: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TeacherSpec:
    """Which dense encoder teaches. Several methods, strides or sizes make several, and the student learns their mean.

    Attributes:
        model: checkpoint; None is the student's.
        methods: rows of `METHODS`; none is the checkpoint's own.
        networks: further networks of the methods by the name they have in their rows; those left out are the authors'.
        reach: how far attention reaches, `image` or `window`; None is the checkpoint's.
        window_px: side of the sliding window, `native`, `paper`, or None, which is `paper`; 0 is one pass.
        strides_px: steps of the window; none is the method's own.
        short_sides_px: sizes at which the teacher sees every picture, 0 is the student's; none is the student's alone.
        window_batch: windows at once.
        dtype: of weights and arithmetic; `auto` is the fastest that the device has.
        label_method: a row of `METHODS` whose score maps teach, in the place of features; see `LabelTeacher`.
        labels: the vocabulary of those score maps.
        settings: numbers of the label method and its refinements that differ from the authors'; see `build_segmenter`.
        refine: refinements of those score maps, keys of `REFINEMENTS`.
        target: how score maps become features.
        upsample: an upsampler of the features, `jbu` or `anyup=FOLDER`; a patch learns the mean of its cells.
        upsample_factor: cells of the finer grid to a patch's side; None is one for each pixel.
    """

    model: str | None = None
    methods: tuple[str, ...] = ()
    networks: Mapping[str, str] = field(default_factory=dict)
    reach: str | None = None
    window_px: int | str | None = None
    strides_px: tuple[int, ...] = ()
    short_sides_px: tuple[int, ...] = ()
    window_batch: int = 64
    dtype: str = "auto"
    label_method: str | None = None
    labels: Labels | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    refine: tuple[str, ...] = ()
    target: Settings = field(default_factory=Settings)
    upsample: str | None = None
    upsample_factor: int | None = None

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        methods = (*self.methods, self.label_method) if self.label_method else self.methods
        needed = [name for method in methods for name in find_method(method).networks]
        find_refinements(self.refine)
        if (self.label_method is None) != (self.labels is None):
            raise ValueError("a label method teaches about words: give both, the method and the labels.")
        if self.label_method is not None and (self.methods or len(self.strides_px) > 1 or self.short_sides_px):
            raise ValueError("a label method teaches alone; leave other methods, strides and sizes out.")
        if self.settings and self.label_method is None:
            raise ValueError(f"setting {next(iter(self.settings))!r} is of a label method; name the method.")
        if self.refine and self.label_method is None:
            raise ValueError(f"refinement {self.refine[0]!r} is of score maps; name the method that makes them.")
        for name in self.networks:
            if not needed:
                raise ValueError(f"no method of the teacher takes a further network; leave {name!r} out.")
            if name not in needed:
                raise ValueError(f"methods {', '.join(methods)}: " + unknown("network", name, needed))
        if self.upsample is not None:
            check_upsampler(self.upsample)
        elif self.upsample_factor is not None:
            raise ValueError("upsample_factor is of an upsampler; name it too, or leave the factor out.")
        if self.window_px == 0 and self.strides_px:
            raise ValueError("window_px is 0, one pass, which has no stride_px; leave one of them out.")

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def on(self, device: torch.device) -> TeacherSpec:
        """The same with `auto` settled for a device."""
        return replace(self, dtype=str(best_dtype(device)).removeprefix("torch.")) if self.dtype == "auto" else self
