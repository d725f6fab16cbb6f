"""MetaCLIP 2: CLIP whose texts end with a token that is not the highest id; its vision tower is CLIP's."""

from __future__ import annotations

from transformers import CLIPTextConfig, MetaClip2TextConfig, MetaClip2TextModel
from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .clip_spar import SparConfig, SparModel, SparVisionConfig, SparVisionModel


class SparMetaclipTextConfig(CLIPTextConfig):
    """`MetaClip2TextConfig`, whose fields are CLIP's, as a kind of CLIP's."""

    model_type = MetaClip2TextConfig.model_type


class SparMetaclipConfig(SparConfig):
    """A `SparVisionConfig` and MetaCLIP 2's text configuration; see `DenseConfig`."""

    model_type = "spar_metaclip"
    stock_types = ("metaclip_2",)
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=SparVisionConfig),
        "text_config": SubConfigSpec(config_class=SparMetaclipTextConfig),
    }

    text_config: dict | SparMetaclipTextConfig | None = None


class SparMetaclipModel(SparModel):
    """MetaCLIP 2 with a `SparVisionModel` for its vision tower: `vision_model`, `text_model`, `text_projection`.

    Plain MetaCLIP 2 checkpoints load straight into it; what it saves has their layout. The text's vector is at its
    first end token: by CLIP's rule for an end token of id 2, which is MetaCLIP 2's, it would be at the highest id.
    Source: MetaCLIP 2 (Chuang et al., 2025), as transformers has it.
    """

    config: SparMetaclipConfig
    config_class = SparMetaclipConfig  # type: ignore[assignment]
    weights_needed = "a MetaCLIP 2 checkpoint, such as facebook/metaclip-2-worldwide-huge-quickgelu"
    _no_split_modules = ["MetaClip2TextEmbeddings", "MetaClip2EncoderLayer", *SparVisionModel._no_split_modules]

    def __init__(self, config: SparMetaclipConfig):
        super().__init__(config)
        self.text_model = MetaClip2TextModel._from_config(config.text_config)
        self.post_init()


register_checkpoint_conversion_mapping(
    "SparMetaclipModel", [WeightRenaming(r"^visual_projection", "vision_model.visual_projection")], overwrite=True
)
