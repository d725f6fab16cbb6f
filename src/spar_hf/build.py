"""build_encoder and build_segmenter: method, networks, window, reach and refinements, chosen once for everybody.

The command line, the page, training and benchmarks call these two; nothing else knows how the parts go together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import nn

from .clip_spar import SparVisionModel
from .encoder_spar import DenseVisionModel
from .encoders.base import DenseEncoder
from .encoders.sliding_window import SlidingWindow
from .encoders.upsampled import FromUpsampled, Upsampled
from .methods.table import FAMILIES, METHODS, Method, find_method
from .names_spar import unknown
from .networks.masks import SamSettings, region_network, region_source
from .networks.sam import Sam
from .radio_spar import SparRadioVisionModel
from .refinement import Refined, find_refinements
from .refinement.views import ViewEnsemble
from .segmentation_spar import FromFeatures, Segmenter
from .segmenters import sliding_scores
from .upsampling import load_upsampler
from .upsampling_spar import Upsampler

WINDOWS = ("native", "paper")
Networks = Mapping[str, Any]  # a module, an id or a folder; for `regions` also a source of them
# The tower that a method of each family takes.
METHOD_TOWERS: dict[str, type] = {"clip": SparVisionModel, "radio": SparRadioVisionModel}
# What a refinement's network is taken for, by the name it has in the row.
ADAPTERS: dict[str, Any] = {"sam": Sam.of, "regions": region_network}
_SAM_NUMBERS = {field.name for field in fields(SamSettings)}


def build_encoder(
    vision: DenseVisionModel,
    method: str | None = None,
    *,
    networks: Networks | None = None,
    settings: Mapping[str, Any] | None = None,
    window: int | str | None = None,
    stride_px: int | None = None,
    window_batch: int = 32,
    reach: str | None = None,
    views: Iterable[str] | Mapping[str, Any] = (),
    upsample: str | Upsampler | None = None,
    upsample_factor: int | None = None,
    **config: Any,
) -> DenseEncoder:
    """A dense encoder that runs a method on a vision tower's weights; the tower itself stays as it is.

    Its configuration has the method's own window and step (`window_px`, `stride_px`), scaled to the network as
    `Method.window_for` says.

    Args:
        vision: the tower.
        method: name of a row of `METHODS`; None is the tower itself.
        networks: the further networks of a method that needs some, by the name they have in its row: a module, an id
            or a folder; for `regions` also `slic` or a `MaskFolder`. Those left out are its authors'.
        settings: numbers of the method that differ from its authors', by name; for a recipe, see `Recipe`.
        window: slide a window over the image and average the features: its side in pixels, `native` (what the tower
            was trained at) or `paper` (that of the method's authors; none around one that makes its own). None is one
            pass.
        stride_px: step of the window; None is that of the method's authors.
        window_batch: windows run at once.
        reach: how far attention reaches, `image` or `window`; None as the tower has it.
        views: refinements of stage `views`, or their settings by name: the features are a mean over changed images.
        upsample: a finer grid at the end: a row of `UPSAMPLERS`, `anyup=FOLDER` for one with weights, or an upsampler.
        upsample_factor: cells of the finer grid to a patch's side; None is one for each pixel.
        config: fields of the tower's configuration, to differ from the method's (`position_interpolation="size"`).

    Raises:
        ValueError: no such method, network or setting, a method that gives no features, or a tower of another family
            than the method's.
    """
    row = _row_for(vision, method, networks)
    if row is not None and row.kind == "label":
        raise ValueError(
            f"method {method!r} gives score maps and no features; build it with build_segmenter. As a teacher it is "
            "--teacher-labels."
        )
    if reach is not None:
        config["attention_reach"] = reach
    tower = _tower(vision, row, settings, config)
    encoder: Any = tower
    if row is not None and row.recipe is None:
        encoder = row.module.Encoder(tower, **_parts(row, networks, settings))
    changed = find_refinements(views, views if isinstance(views, Mapping) else None).values()
    if changed:
        encoder = ViewEnsemble(encoder, [view for row in changed for view in row.apply(row.settings)])
    window = _slid(row, window)
    if window is not None or stride_px is not None:
        encoder = SlidingWindow(encoder, *window_of(encoder.config, window, stride_px), batch_size=window_batch)
    if upsample is None:
        if upsample_factor is not None:
            raise ValueError(f"upsample_factor is {upsample_factor} without an upsampler; name one.")
        return encoder
    return Upsampled(encoder, load_upsampler(upsample).to(vision.device), upsample_factor)


def build_segmenter(
    model: Any,
    processor: Any,
    method: str | None = None,
    *,
    networks: Networks | None = None,
    settings: Mapping[str, Any] | None = None,
    window: int | str | None = None,
    stride_px: int | None = None,
    window_batch: int = 32,
    reach: str | None = None,
    refine: Iterable[str] = (),
    upsample: str | Upsampler | None = None,
    upsample_factor: int | None = None,
    **config: Any,
) -> Segmenter:
    """A segmenter: pixels and words in, score maps out, by any method of the table, with any refinements.

    Args:
        model: a `SparModel`, or one of another family.
        processor: its `SparProcessor`.
        method, networks, window, stride_px, window_batch, reach, upsample, upsample_factor, config: see
            `build_encoder`. Windows of a method that gives no features average its scores.
        settings: numbers of the method by name (`shift`), and of a refinement by both names (`pamr.steps`).
        refine: keys of `REFINEMENTS`.

    Raises:
        ValueError: as `build_encoder`, or a refinement that does not go with the method or the model.
    """
    own, of_refinement = _split_settings(settings or {}, refine)
    refinements = {
        name: replace(row, settings=_with(row.settings, of_refinement.get(name, {}), f"refinement {name!r}"))
        for name, row in find_refinements(refine).items()
    }
    views = {name: row.settings for name, row in refinements.items() if row.stage == "views"}
    others = {name: row.settings for name, row in refinements.items() if name not in views}
    vision = model.vision_model
    networks, further = _shared(refinements, networks or {}, method, vision)
    row = _row_for(vision, method, networks)
    segmenter: Any
    if row is not None and row.kind == "label":
        if upsample is not None:
            raise ValueError(f"an upsampler is for features, and method {method!r} has none; leave it out.")
        if views:
            raise ValueError(
                f"refinement {next(iter(views))!r} averages features, and method {method!r} has none; leave it out."
            )
        if reach is not None:
            config["attention_reach"] = reach
        parts = _parts(row, networks, own)
        segmenter = row.module.Segmenter(model, processor, _tower(vision, row, None, config), **parts)
        if others:
            segmenter = Refined(segmenter, others, model, others, further)
        window = _slid(row, window)
        if window is not None or stride_px is not None:
            segmenter = sliding_scores(segmenter, *window_of(segmenter.config, window, stride_px))
        return segmenter
    encoder = build_encoder(
        vision,
        method,
        networks=networks,
        settings=own,
        window=window,
        stride_px=stride_px,
        window_batch=window_batch,
        reach=reach,
        views=views,
        upsample=upsample,
        upsample_factor=upsample_factor,
        **config,
    )
    if isinstance(encoder, Upsampled):
        for name, refinement in refinements.items():
            if refinement.stage in ("texts", "scores", "templates"):
                raise ValueError(
                    f"refinement {name!r} acts on the scores of patches, and an upsampler makes others; leave one out."
                )
        segmenter = FromUpsampled(encoder, model, processor)
    else:
        segmenter = FromFeatures(encoder, model, processor)
    return Refined(segmenter, others, model, others, further) if others else segmenter


def _shared(
    refinements: Mapping[str, Any], networks: Networks, method: str | None, vision: Any
) -> tuple[Networks, dict[str, Any]]:
    """The networks given for the method, and those of the refinements, loaded once for both."""
    wanted = {name: default for row in refinements.values() for name, default in row.networks.items()}
    further = {name: ADAPTERS[name](networks.get(name, default)) for name, default in wanted.items()}
    for network in further.values():
        if isinstance(network, nn.Module):
            network.to(vision.device, vision.dtype)
    own = find_method(method).networks if method is not None else {}
    kept = {name: network for name, network in networks.items() if name not in wanted}
    networks = {**kept, **{name: network for name, network in further.items() if name in own}}
    for row in refinements.values():
        if "regions" in row.networks:  # one SAM, but each draws regions by its own settings
            chosen = {name: value for name, value in asdict(row.settings).items() if name in _SAM_NUMBERS}
            further["regions"] = region_source(further["regions"], SamSettings(**chosen))
    return networks, further


def _slid(row: Method | None, window: int | str | None) -> int | str | None:
    """The window to slide: the authors of a method that makes its own slid none around it."""
    return None if row is not None and row.whole_image and window == "paper" else window


def window_of(config: Any, window: int | str | None, stride_px: int | None) -> tuple[int, int]:
    """Side and step in pixels of a window that is given in pixels, as `native`, as `paper` or not at all (`paper`).

    Args:
        config: of the encoder; has the method's own window and step.
        window: see `build_encoder`.
        stride_px: see `build_encoder`.

    Raises:
        ValueError: another word.
    """
    if isinstance(window, str) and window not in WINDOWS:
        raise ValueError(unknown("window", window, WINDOWS) + " Or give its side in pixels.")
    own_px = config.image_size if config.window_px is None else config.window_px
    sides = {None: own_px, "paper": own_px, "native": config.image_size}
    side_px = window if isinstance(window, int) else sides[window]
    return side_px, min(config.stride_px, side_px) if stride_px is None else stride_px


def vision_config_of(vision: Any, method: str | None) -> Any:
    """The tower's configuration with a method's own window and step; see `Method.window_for`."""
    if method is None:
        return vision.config
    window_px, stride_px = find_method(method).window_for(vision.config.image_size, vision.config.patch_size)
    return type(vision.config).from_dict({**vision.config.to_dict(), "window_px": window_px, "stride_px": stride_px})


def record(
    method: str | None, networks: Networks | None, settings: Mapping[str, Any] | None, refine: Iterable[str]
) -> dict[str, Any]:
    """What was chosen, as JSON: networks by name and every number of the method and the refinements."""
    own, of_refinement = _split_settings(settings or {}, refine)
    row = None if method is None else find_method(method)
    of_refinements = {name: id for row in find_refinements(refine).values() for name, id in row.networks.items()}
    needs = {**({} if row is None else row.defaults), **of_refinements}
    chosen: dict[str, Any] = {"networks": {}, "settings": {}}
    if needs or networks:
        chosen["networks"] = {
            name: type(given).__name__ if isinstance(given, nn.Module) else str(given)
            for name, given in {**needs, **(networks or {})}.items()
        }
    if row is not None:
        if row.recipe is None:
            chosen["settings"] = asdict(_with(row.module.Settings(), own, f"method {method!r}"))
        else:
            chosen["settings"] = {**row.recipe.to_dict(), **own}
    chosen["refine"] = {
        name: asdict(_with(row.settings, of_refinement.get(name, {}), f"refinement {name!r}"))
        for name, row in find_refinements(refine).items()
    }
    return json.loads(json.dumps(chosen))  # tuples become lists, as they come back from a file


def methods_for(tower: type) -> list[str]:
    """The rows of `METHODS` that are for a class of vision towers."""
    return [name for name, row in METHODS.items() if issubclass(tower, METHOD_TOWERS[row.family])]


def _row_for(vision: Any, method: str | None, networks: Networks | None) -> Method | None:
    """The method's row, if its networks and the tower are such as it takes."""
    if method is None:
        if networks:
            raise ValueError(
                f"network {next(iter(networks))!r} is given without a method; name one that needs it (`spar methods`)."
            )
        return None
    row = find_method(method)
    for name in networks or ():
        if not row.networks:
            raise ValueError(f"method {method!r} takes no further network; leave {name!r} out.")
        if name not in row.networks:
            raise ValueError(f"method {method!r}: " + unknown("network", name, row.networks))
    if not isinstance(vision, METHOD_TOWERS[row.family]):
        raise ValueError(
            f"method {method!r} is about {FAMILIES[row.family]}'s blocks, and this network is a "
            f"{type(vision).__name__}. Leave the method out."
        )
    return row


def _tower(vision: Any, row: Method | None, settings: Mapping[str, Any] | None, config: dict[str, Any]) -> Any:
    """The tower with the method's recipe, position rule and window."""
    if row is None:
        if settings:
            raise ValueError(f"setting {next(iter(settings))!r} is given without a method; name one.")
        return reconfigured(vision, **config) if config else vision
    window_px, stride_px = row.window_for(vision.config.image_size, vision.config.patch_size)
    chosen = {"window_px": window_px, "stride_px": stride_px, **config}
    if row.recipe is None:
        return reconfigured(vision, **{"position_interpolation": row.position_interpolation, **chosen})
    if settings:
        recipe = _with(row.recipe, settings, f"method {row.name!r}")
        chosen = {"recipe": recipe.to_dict(), "position_interpolation": row.position_interpolation, **chosen}
    return reconfigured(vision, method=row.name, **chosen)


def _parts(row: Method, networks: Networks | None, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the class in a method's file takes beside the tower."""
    own = _with(row.module.Settings(), settings or {}, f"method {row.name!r}")
    return {"networks": {**row.defaults, **(networks or {})}, "settings": own, "method": row.name}


def method_class_arguments(
    vision: Any, method: str, networks: Networks | None, settings: Mapping[str, Any] | None, without: str
) -> tuple[Any, dict[str, Any]]:
    """The tower as a method has it, and the other arguments of a class in its file that does without one network.

    Raises:
        ValueError: as `build_encoder`.
    """
    row = _row_for(vision, method, networks)
    assert row is not None
    parts = _parts(row, {**row.bank, **(networks or {})}, settings)
    parts["networks"].pop(without, None)
    return _tower(vision, row, None, {}), parts


def _split_settings(
    settings: Mapping[str, Any], refine: Iterable[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings of the method, and those of each refinement."""
    own: dict[str, Any] = {}
    others: dict[str, dict[str, Any]] = {name: {} for name in find_refinements(refine)}
    for name, value in settings.items():
        whose, dot, field = name.partition(".")
        if not dot:
            own[name] = value
        elif whose in others:
            others[whose][field] = value
        else:
            raise ValueError(f"setting {name!r} is of a refinement that is not on; add it, or leave the setting out.")
    return own, others


def _with(settings: Any, changes: Mapping[str, Any], whose: str) -> Any:
    """Settings with some of their fields changed; a word is read as the field's own type."""
    known = {field.name for field in fields(settings)}
    for name in changes:
        if name not in known:
            raise ValueError(f"{whose}: " + unknown("setting", name, sorted(known)))
    return replace(
        settings, **{name: _as(getattr(settings, name), value, name, whose) for name, value in changes.items()}
    )


def _as(default: Any, value: Any, name: str, whose: str) -> Any:
    """A value from the command line in the type of the default; any other value as it is."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, tuple):
            return tuple(_as(default[0], part, name, whose) for part in value.split(",") if part)
        return type(default)(value) if isinstance(default, int | float) else float(value)
    except (ValueError, KeyError):
        raise ValueError(f"{whose}: setting {name} is {value!r}; it is a {type(default).__name__}.") from None


def reconfigured(vision: Any, **config: Any) -> Any:
    """The same weights under another configuration: nothing is copied, and `vision` keeps its own.

    Raises:
        ValueError: the configuration has no such field.
    """
    known = type(vision.config).__dataclass_fields__
    for name in config:
        if name not in known:
            raise ValueError(unknown("field", name, known))
    changed = type(vision.config).from_dict(vision.config.to_dict(), **config)
    changed._attn_implementation = vision.config._attn_implementation
    with torch.device("meta"):  # takes no memory; the weights are those of `vision`
        twin = type(vision)(changed)
    twin.load_state_dict(vision.state_dict(keep_vars=True), assign=True)
    for name, module in vision.named_modules():  # buffers that are no part of the weights
        twin.get_submodule(name)._buffers.update(module._buffers)
    return twin.train(vision.training)
