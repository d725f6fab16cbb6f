"""Open-vocabulary segmentation in one forward pass, on the Hugging Face stack.

Importing the package registers its models, processors and the pipeline task with transformers' Auto classes, and makes
whatever it saves carry the `*_spar.py` files, so that saved models load without the package as well.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .anyup_spar import SparAnyUp, SparAnyUpConfig
from .build import build_encoder, build_segmenter
from .checkpoints import convert_stock, load, pipeline, resolve
from .clip_spar import SparConfig, SparModel, SparVisionConfig, SparVisionModel
from .dinov3_spar import SparDinov3Config, SparDinov3Model, SparDinov3VisionConfig, SparDinov3VisionModel
from .encoder_spar import SparOutput, SparVisionOutput
from .encoders.base import DenseEncoder
from .encoders.sliding_window import SlidingWindow
from .encoders.upsampled import Upsampled
from .eva_spar import SparEvaConfig, SparEvaModel, SparEvaVisionConfig, SparEvaVisionModel
from .exporting import export
from .families import FAMILIES
from .image_file_spar import InvalidImageError
from .image_processing_spar import SparImageProcessor
from .metaclip_spar import SparMetaclipConfig, SparMetaclipModel
from .methods.table import METHODS, Method
from .pipeline_spar import OpenVocabularySegmentationPipeline, register_pipeline
from .processing_spar import LabelFeatures, Labels, SparProcessor
from .radio_spar import SparRadioConfig, SparRadioModel, SparRadioVisionConfig, SparRadioVisionModel
from .refinement import REFINEMENTS, Refined, Refinement, floss_templates
from .segmentation_spar import FromFeatures, ScoreMaps, Segmenter, label_map
from .segmenters import SlidingScores
from .siglip_spar import SparSiglipConfig, SparSiglipModel, SparSiglipVisionConfig, SparSiglipVisionModel
from .tips_spar import SparTipsConfig, SparTipsModel, SparTipsVisionConfig, SparTipsVisionModel
from .upsampling import UPSAMPLERS, load_upsampler

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "REFINEMENTS",
    "UPSAMPLERS",
    "DenseEncoder",
    "FromFeatures",
    "InvalidImageError",
    "LabelFeatures",
    "Labels",
    "Method",
    "OpenVocabularySegmentationPipeline",
    "Refined",
    "Refinement",
    "ScoreMaps",
    "Segmenter",
    "SlidingScores",
    "SlidingWindow",
    "SparAnyUp",
    "SparAnyUpConfig",
    "SparConfig",
    "SparDinov3Config",
    "SparDinov3Model",
    "SparDinov3VisionConfig",
    "SparDinov3VisionModel",
    "SparEvaConfig",
    "SparEvaModel",
    "SparEvaVisionConfig",
    "SparEvaVisionModel",
    "SparImageProcessor",
    "SparMetaclipConfig",
    "SparMetaclipModel",
    "SparModel",
    "SparOutput",
    "SparProcessor",
    "SparRadioConfig",
    "SparRadioModel",
    "SparRadioVisionConfig",
    "SparRadioVisionModel",
    "SparSiglipConfig",
    "SparSiglipModel",
    "SparSiglipVisionConfig",
    "SparSiglipVisionModel",
    "SparTipsConfig",
    "SparTipsModel",
    "SparTipsVisionConfig",
    "SparTipsVisionModel",
    "SparVisionConfig",
    "SparVisionModel",
    "SparVisionOutput",
    "Upsampled",
    "build_encoder",
    "build_segmenter",
    "export",
    "floss_templates",
    "label_map",
    "load",
    "load_upsampler",
    "pipeline",
]

for _family in FAMILIES:
    for _model in _family:
        _config = _model.config_class
        AutoConfig.register(_config.model_type, _config, exist_ok=True)
        AutoModel.register(_config, _model, exist_ok=True)
        # Both keys: without the second, transformers warns of a fallback wherever torchvision is installed.
        AutoImageProcessor.register(
            _config,
            image_processor_classes={"pil": SparImageProcessor, "torchvision": SparImageProcessor},
            exist_ok=True,
        )
        _config.register_for_auto_class()
        _model.register_for_auto_class("AutoModel")
    _whole = _family[0]
    AutoModelForZeroShotImageClassification.register(_whole.config_class, _whole, exist_ok=True)
    AutoProcessor.register(_whole.config_class, SparProcessor, exist_ok=True)
AutoConfig.register(SparAnyUpConfig.model_type, SparAnyUpConfig, exist_ok=True)
AutoModel.register(SparAnyUpConfig, SparAnyUp, exist_ok=True)
SparAnyUpConfig.register_for_auto_class()
SparAnyUp.register_for_auto_class("AutoModel")
SparImageProcessor.register_for_auto_class()
SparProcessor.register_for_auto_class()
register_pipeline(resolve("tiny"), convert_stock)
