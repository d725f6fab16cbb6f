"""How the authors of the methods evaluated them: sizes, windows, thresholds, and settings chosen for each data set.

Read from their configuration files and papers. A method is absent where that is not established here: its authors'
sizes are unknown (CLIP Surgery, GEM), it was run on squares (CLIPtrase), or its numbers need texts or templates that
are not at hand (ITACLIP's definitions, CLIPer's). Protocol `sclip` is the one that all methods share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..published import BENCHMARKS
from .protocols import PROTOCOLS, Protocol

Changes = Mapping[str, Mapping[str, Any]]  # benchmark -> what differs there


@dataclass(frozen=True)
class Own:
    """How one method was evaluated by its authors.

    Attributes:
        protocols: benchmark -> its constants.
        settings: benchmark -> settings of the method, and of a refinement (`sam.coarse`), that differ from its row's.
        refine: refinements that were on.
        model: whose blocks: a key of `spar_hf.reproduction.WEIGHTS`.
    """

    protocols: Mapping[str, Protocol]
    settings: Changes = field(default_factory=dict)
    refine: tuple[str, ...] = ()
    model: str = "clip-b16"


_FIELD = replace(PROTOCOLS["sclip"]["voc20"], name="own")  # what the papers that follow SCLIP share
_WHOLE: dict[str, Any] = {"window_px": None, "stride_px": None}  # it makes its own windows, or none


def _protocols(common: Mapping[str, Any], *changes: Changes, without: tuple[str, ...] = ()) -> dict[str, Protocol]:
    """The field's common protocol with what a method's authors had otherwise, for all benchmarks and for some."""
    base = replace(_FIELD, **common)
    found = {}
    for name in BENCHMARKS:
        own: dict[str, Any] = {}
        for change in changes:
            own |= change.get(name, {})
        found[name] = replace(base, **own)
    return {name: protocol for name, protocol in found.items() if name not in without}


def _sides(**short_side_px: int) -> Changes:
    return {name: {"short_side_px": side} for name, side in short_side_px.items()}


def _thresholds(voc21: float, context60: float, coco_object: float) -> Changes:
    given = {"voc21": voc21, "context60": context60, "coco_object": coco_object}
    return {name: {"background_threshold": value} for name, value in given.items()}


def _resclip(threshold: float, tau: float, weight: float, earlier_weight: float) -> dict[str, Any]:
    return {"threshold": threshold, "tau": tau, "weight": weight, "earlier_weight": earlier_weight}


def _cass(image_weight: float, patch_weight: float, height: float, **others: Any) -> dict[str, Any]:
    return {"image_weight": image_weight, "patch_weight": patch_weight, "height": height, "windows": True, **others}


_STREETS = _sides(cityscapes=560)
_SCLIP_SCALES: Changes = {
    "voc21": {"logit_scale": 65.0, "area_threshold": 0.1},
    "context60": {"logit_scale": 50.0},
    "coco_object": {"logit_scale": 50.0},
}

# Method -> how its authors evaluated it.
OWN: dict[str, Own] = {
    "sclip": Own({name: replace(PROTOCOLS["sclip"][name], name="own") for name in BENCHMARKS}),
    "naclip": Own(_protocols({}, _sides(cityscapes=560, coco_stuff=448), _thresholds(0.1, 0.1, 0.1))),
    "clearclip": Own(
        _protocols(
            {"short_side_px": 448, "window_px": 448, "stride_px": 224, "logit_scale": 50.0},
            {"cityscapes": {"window_px": 224}},
            _thresholds(0.5, 0.15, 0.4),
        )
    ),
    "sc_clip": Own(
        _protocols(
            {},
            _STREETS,
            _thresholds(0.15, 0.15, 0.35),
            {"voc21": {"logit_scale": 50.0, "area_threshold": 0.1}, "coco_object": {"logit_scale": 55.0}},
        )
    ),
    "proxyclip": Own(
        _protocols(
            {"window_px": 336},
            _sides(ade20k=448, cityscapes=448),
            {"cityscapes": {"window_px": 224}},
            _thresholds(0.2, 0.15, 0.25),
        )
    ),
    "trident": Own(
        _protocols(
            {"short_side_px": 448, **_WHOLE},
            _sides(voc20=336, context60=576, context59=576, ade20k=576, cityscapes=688),
            _thresholds(0.2, 0.15, 0.25),
        ),
        settings={
            "voc20": {"reach": 0.0, "stride_px": 112},
            "context60": {"sam.coarse": 0.15},
            "context59": {"sam.coarse": 0.15},
            "coco_object": {"sam.coarse": 0.25},
            "coco_stuff": {"sam.coarse": 0.05},
            "ade20k": {"negative_threshold": 0.6, "sam.coarse": 0.05},
            "cityscapes": {"reach": 3.0, "negative_threshold": 0.6, "columns": 2, "sam.coarse": 0.1},
        },
        refine=("sam",),
    ),
    # Cityscapes, in windows of 224 px, is left out: the window is the method's own, 336 px.
    "corrclip": Own(
        _protocols(_WHOLE, _sides(ade20k=448), _thresholds(0.2, 0.15, 0.25), without=("cityscapes",)),
        refine=("mask-vote",),
        model="metaclip-b16",
    ),
    "cass_text": Own(
        _protocols(_WHOLE, _STREETS, _thresholds(0.1, 0.1, 0.1)),
        settings={
            "voc21": _cass(0.1, 0.03, 0.1) | {"windows": False},
            "context60": _cass(0.25, 0.04, 0.09),
            "context59": _cass(0.25, 0.04, 0.09),
            "coco_object": _cass(0.25, 0.01, 0.1),
            "voc20": _cass(0.4, 0.03, 0.1, stretch=False),
            "coco_stuff": _cass(0.2, 0.02, 0.02),
            "cityscapes": _cass(0.1, 0.03, 0.14, stretch=False),
            "ade20k": _cass(0.3, 0.05, 0.06),
        },
        refine=("pamr",),
    ),
    "lposs": Own(_protocols({"short_side_px": 448, **_WHOLE}), model="openclip-b16"),
    "lavg": Own(
        _protocols(_WHOLE, _sides(cityscapes=560, coco_stuff=448), _thresholds(0.1, 0.1, 0.1), _SCLIP_SCALES),
        settings={"voc21": {"empty_rest": True}},
    ),
    "resclip_feedback": Own(
        _protocols({}, _STREETS, {"voc21": _WHOLE, "voc20": _WHOLE}, _thresholds(0.1, 0.1, 0.1)),
        settings={
            "voc21": _resclip(0.5, 2.2, 0.7, 0.3),
            "voc20": _resclip(0.1, 2.1, 0.6, 0.6),
            "context60": _resclip(0.3, 1.8, 0.7, 0.3),
            "context59": _resclip(0.25, 1.8, 0.7, 0.4),
            "coco_object": _resclip(0.11, 1.8, 0.7, 0.4),
            "coco_stuff": _resclip(0.11, 1.8, 0.7, 0.4),
            "cityscapes": _resclip(0.1, 2.1, 0.6, 0.2),
            "ade20k": _resclip(0.25, 2.1, 0.7, 0.3),
        },
    ),
}


def own_protocol(method: str | None, benchmark: str) -> Protocol:
    """The constants that a method's authors used for a benchmark.

    Raises:
        ValueError: no method is named, or its authors' constants are not known.
    """
    known = [name for name, row in OWN.items() if benchmark in row.protocols]
    if method not in known:
        named = "no method is named" if method is None else f"that of {method!r} is not known"
        raise ValueError(
            f"protocol 'own' is that of a method's authors for {benchmark}, and {named}; name one of "
            f"{', '.join(known)}, or take protocol 'sclip'."
        )
    return OWN[str(method)].protocols[benchmark]
