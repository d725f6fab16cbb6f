"""The families: which classes load a checkpoint of a given model type, and the processor that goes with a model."""

from __future__ import annotations

from typing import Any

from .clip_spar import SparModel, SparVisionModel
from .configuration_spar import DenseConfig
from .dinov3_spar import SparDinov3Model, SparDinov3VisionModel
from .eva_spar import SparEvaModel, SparEvaVisionModel
from .image_processing_spar import SparImageProcessor
from .metaclip_spar import SparMetaclipModel
from .processing_spar import SparProcessor
from .radio_spar import SparRadioModel, SparRadioVisionModel
from .siglip_spar import SparSiglipModel, SparSiglipVisionModel
from .tips_spar import SparTipsModel, SparTipsVisionModel

# Whole model and vision tower. Nothing else in the code lists them.
FAMILIES: tuple[tuple[Any, Any], ...] = (
    (SparModel, SparVisionModel),
    (SparSiglipModel, SparSiglipVisionModel),
    (SparDinov3Model, SparDinov3VisionModel),
    (SparMetaclipModel, SparVisionModel),
    (SparTipsModel, SparTipsVisionModel),
    (SparEvaModel, SparEvaVisionModel),
    (SparRadioModel, SparRadioVisionModel),
)
WHOLE = {
    model_type: whole
    for whole, _ in FAMILIES
    for model_type in (*whole.config_class.stock_types, whole.config_class.model_type)
}
TOWERS = {model_type: tower for _, tower in FAMILIES for model_type in tower.config_class.vision_types}


def make_processor(config: DenseConfig, tokenizer: Any) -> SparProcessor:
    """A processor for a model of this configuration."""
    image_processor = SparImageProcessor(
        size={"shortest_edge": 672},  # SPAR, section 4: the size of the paper's results
        image_mean=config.vision_config.image_mean,
        image_std=config.vision_config.image_std,
        min_side_px=config.vision_config.patch_size,
    )
    return SparProcessor(image_processor=image_processor, tokenizer=tokenizer, **config.text_inputs)
