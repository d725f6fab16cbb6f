"""Configurations: what every family shares. Every number that changes an output is a typed, validated field."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .grid_spar import POSITION_RULES, SIZE_RULES
from .names_spar import one_of
from .reach_spar import REACHES


class DenseVisionConfig(PreTrainedConfig):
    """Mixed into a family's vision configuration: the fields that dense features at any resolution need beside it.

    Args:
        method: how patch features leave the last block: for CLIP a row of the table of methods, for another family
            its one name.
        position_interpolation: `size`, `offset`, `antialias`, `bilinear`, `bilinear_antialias` or `square`; see
            `resize_positions`. None is the family's or method's own rule.
        size_rule: `floor`, `pad` or `stretch`, for sides that are no multiple of the patch; see `fit_to_patches`.
        attention_reach: `image`, over the whole image (the stock model); or `window`, as far as the native windows
            around a patch (`WindowReach`; beyond SPAR). The same up to the native size.
        image_mean, image_std: normalisation the weights were trained with, RGB.
        window_px: side of the teacher's window; None is the native `image_size`.
        stride_px: step of the teacher's window (SPAR, section 4: 24, which is no multiple of the patch).
        source: where the weights came from.
        teacher: what a distilled student learned from (checkpoint, method, window, stride, data, revision).

    Raises:
        ValueError: a value is out of its range; the message names the field, the value and what is allowed.
    """

    stock_class: ClassVar[type[PreTrainedConfig]]
    vision_types: ClassVar[tuple[str, ...]] = ()  # model types of vision towers alone, stock ones and ours

    method: str = ""
    position_interpolation: str | None = None
    size_rule: str = "floor"
    attention_reach: str = "image"
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    window_px: int | None = None
    stride_px: int = 24
    source: str | None = None
    teacher: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        self.settle_method()
        super().__post_init__(**kwargs)
        self.validate_spar()

    def settle_method(self) -> None:
        """Fills in what the method decides and was not given; refuses a method that the family lacks."""
        own = type(self).method
        if self.method != own:
            raise ValueError(
                f"method is {self.method!r}; the methods are CLIP's, and {type(self).__name__} has one way to dense "
                f"features, {own!r}. Leave the method out."
            )

    def features_depend_on(self) -> dict[str, Any]:
        """The fields that change the features of given weights, as JSON."""
        names = ("method", "position_interpolation", "size_rule", "attention_reach")
        return {name: getattr(self, name) for name in names}

    def validate_spar(self) -> None:
        """Checks the fields that the family's stock configuration does not know."""
        if self.position_interpolation is not None:
            one_of("position_interpolation", self.position_interpolation, POSITION_RULES)
        one_of("size_rule", self.size_rule, SIZE_RULES)
        one_of("attention_reach", self.attention_reach, REACHES)
        window_px = self.image_size if self.window_px is None else self.window_px
        sides_px = {"image_size": self.image_size, "patch_size": self.patch_size, "window_px": window_px}
        for name, value in {**sides_px, "stride_px": self.stride_px}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; give one whole number of pixels, at least 1.")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}.")
        if window_px % self.patch_size:
            raise ValueError(f"window_px is {window_px}; it must be a multiple of patch_size {self.patch_size}.")
        if self.stride_px > window_px:
            raise ValueError(f"stride_px is {self.stride_px}; it must be 1 to the window's {window_px} px.")
        if len(self.image_mean) != self.num_channels or len(self.image_std) != self.num_channels:
            raise ValueError(f"image_mean and image_std need {self.num_channels} numbers each, one a channel.")
        if not all(map(math.isfinite, self.image_mean)):
            raise ValueError(f"image_mean is {self.image_mean}; it is taken off the pixels, so all must be numbers.")
        if not all(0 < std < math.inf for std in self.image_std):
            raise ValueError(f"image_std is {self.image_std}; pixels are divided by it, so all must be positive.")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.vision_dict(config_dict), kwargs

    @classmethod
    def vision_dict(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """The vision part of a configuration of the family, whole or not, stock or ours, as fields of this class."""
        vision = dict(config_dict)
        if "vision_config" in config_dict:
            # Old files give the tower twice; as in CLIPConfig, `vision_config_dict` prevails.
            vision = {**(config_dict["vision_config"] or {}), **(config_dict.get("vision_config_dict") or {})}
            if config_dict.get("projection_dim") is not None:
                # The full model's projection counts: old files leave the tower's own at its default.
                vision["projection_dim"] = config_dict["projection_dim"]
        if vision.get("model_type") != cls.model_type:
            vision = {**cls.from_stock(vision, config_dict.get("model_type")), "model_type": cls.model_type}
        return vision

    @classmethod
    def from_stock(cls, vision: dict[str, Any], model_type: str | None) -> dict[str, Any]:
        """The stock vision configuration of a file of this model type, ready for this class."""
        # Files may leave out what equals the stock class's default, and that may not be ours.
        return {**{f.name: f.default for f in fields(cls.stock_class) if f.name in cls.__dict__}, **vision}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # Overrides go in before construction, so that they are validated, and a method asked for anew brings its own
        # recipe and position rule instead of the stored ones.
        known = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__dataclass_fields__}
        if "method" in known:
            config_dict = {k: v for k, v in config_dict.items() if k not in ("recipe", "position_interpolation")}
        return super().from_dict({**config_dict, **known}, **kwargs)


class DenseConfig(PreTrainedConfig):
    """Mixed into a family's whole configuration: fields of its vision configuration can be given directly.

    `SparModel.from_pretrained(folder, method="naclip")`.
    """

    vision_class: ClassVar[type[DenseVisionConfig]]
    stock_types: ClassVar[tuple[str, ...]] = ()  # model types of the family's whole models in transformers

    @property
    def text_inputs(self) -> dict[str, Any]:
        """How the text tower wants its tokens; arguments of `SparProcessor`."""
        return {}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type in cls.vision_class.vision_types:
            whole, tower = (
                cls.__name__.replace("Config", "Model"),
                cls.vision_class.__name__.replace("Config", "Model"),
            )
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a vision tower alone, and {whole} needs the text tower too. "
                f"Load it with {tower}, or give a whole checkpoint."
            )
        return cls.from_stock(config_dict), kwargs

    @classmethod
    def from_stock(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """A whole configuration of the family, stock or ours, as fields of this class."""
        if config_dict.get("model_type") != cls.model_type and "vision_config" in config_dict:
            vision = cls.vision_class.vision_dict(config_dict)
            config_dict = {**config_dict, "model_type": cls.model_type, "vision_config": vision}
            config_dict.pop("vision_config_dict", None)
        return config_dict

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if not cls.__module__.startswith("transformers_modules."):
            # Where a saved pipeline's code is. The package registers the task itself; with this entry transformers
            # would load the code of the folder in its place, and ask for trust_remote_code.
            config_dict = {name: value for name, value in config_dict.items() if name != "custom_pipelines"}
        own = set(cls.__dataclass_fields__)
        vision_fields = set(cls.vision_class.__dataclass_fields__) - own
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in vision_fields}
        if overrides:
            vision = cls.vision_class.vision_dict(config_dict)
            vision_config = cls.vision_class.from_dict(vision, **overrides)
            config_dict = {**config_dict, "vision_config": vision_config.to_dict()}
        return super().from_dict(config_dict, **kwargs)
