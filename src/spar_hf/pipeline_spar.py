"""The pipeline task "open-vocabulary-segmentation": an image and words in, a label map out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .processing_spar import SparProcessor
from .prompts_spar import Labels

TASK = "open-vocabulary-segmentation"
POST_PROCESSING = ("logit_scale", "background_threshold", "background_class", "area_threshold")


@dataclass
class PreparedImage:
    """One image on its way through the pipeline.

    The base class collates these as a list, so that images of different sizes may share a batch, and doesn't move
    them between devices, so that the label map is made where the features are.

    Attributes:
        original_hw: Height and width of the image, upright.
        pixel_values: (3, H, W).
        patch_embeds: (1, h, w, D), after the encoder.
        image_hw: Height and width of the pixels that the encoder saw.
        extent_hw: Height and width that the patches cover, in the same pixels; None where that is all.
    """

    original_hw: tuple[int, int]
    pixel_values: Tensor
    patch_embeds: Tensor | None = None
    image_hw: tuple[int, int] | None = None
    extent_hw: tuple[int, int] | None = None


class OpenVocabularySegmentationPipeline(Pipeline):
    """Segments images into classes that are named in words.

    Example:
        >>> segment = pipeline("open-vocabulary-segmentation", model="you/spar")
        >>> segment("street.jpg", candidate_labels=["road", "car, automobile", "sky"])
    """

    # The base class declares these None, which means "load if there".
    _load_processor = True  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.processor, SparProcessor):
            raise ValueError(
                f"the {TASK} pipeline got a {type(self.processor).__name__} for a processor; it needs a "
                "SparProcessor. For a plain CLIP checkpoint pass model and processor as spar_hf.load returns them."
            )

    def __call__(self, images: Any, candidate_labels: Any = None, **kwargs: Any) -> Any:
        """Segments one image or several.

        Args:
            images: An image in any form that `SparImageProcessor` reads, or a list, a dataset or a generator of them.
            candidate_labels: The vocabulary; see `Labels.parse`. It may be given to `pipeline(...)` once instead.
            templates: Prompt templates; see `SparProcessor.encode_labels`.
            encoder: Any dense encoder, such as a `SlidingWindow`; None is the model's vision tower.
            refinement: Label options that are on, a `spar_hf.Refinement`; its own encoder runs where none is given.
            size: Size for the encoder; see `SparImageProcessor`. `do_resize=False` keeps the image's own.
            logit_scale, background_threshold, background_class, area_threshold: See
                `SparProcessor.post_process_semantic_segmentation`.
            batch_size: Images read at once; those of equal size go through the encoder together.

        Returns:
            For each image a dictionary; a list of them for a list, an iterator for a dataset or a generator:
                `segmentation`: class ids (H, W), int32, at the image's own, upright size.
                `segments`: `{"id", "label", "area_fraction"}` of each class that occurs, largest
                    first; they sum to 1.
                `labels`: The `Labels`.
                `size_hw`: Height and width of the pixels that the encoder saw.
                `grid_hw`: Rows and columns of patches.

        Raises:
            ValueError: Malformed labels or arguments, or an image that cannot be read (`InvalidImageError`).
        """
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        if isinstance(images, tuple):
            images = list(images)
        if isinstance(images, list) and not images:
            return []
        return super().__call__(images, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Also saves the processor, which the base class leaves out."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(
        self,
        candidate_labels: Any = None,
        templates: Any = None,
        encoder: Callable[[Tensor], Any] | None = None,
        refinement: Any = None,
        size: Any = None,
        do_resize: bool | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown := sorted(set(kwargs) - {*POST_PROCESSING, "local_files_only"}):
            raise ValueError(
                f"the {TASK} pipeline does not know {', '.join(unknown)}; allowed are candidate_labels, templates, "
                f"encoder, refinement, size, do_resize, {', '.join(POST_PROCESSING)}."
            )
        preprocess = {"size": size, "do_resize": do_resize}
        if encoder is None and refinement is not None:
            encoder = refinement.encoder
        forward = {"encoder": encoder}
        postprocess = {name: kwargs.get(name) for name in POST_PROCESSING}
        postprocess |= {"templates": templates, "refinement": refinement}
        # Parsed here, so that a mistake is told before an image is read.
        postprocess["labels"] = None if candidate_labels is None else Labels.parse(candidate_labels)
        return _given(preprocess), _given(forward), _given(postprocess)

    def preprocess(self, image: Any, **size: Any) -> dict[str, Any]:
        processor: Any = self.processor
        inputs = processor(images=image, **size)
        if len(inputs["pixel_values"]) != 1:
            raise ValueError(
                f"a batch of {len(inputs['pixel_values'])} images came as one array; pass a list of images instead."
            )
        height, width = inputs["original_sizes"][0].tolist()
        return {"image": PreparedImage((height, width), inputs["pixel_values"][0])}

    def _forward(self, model_inputs: dict[str, Any], encoder: Any = None) -> dict[str, Any]:
        dense: Any = self.model.vision_model if encoder is None else encoder
        # One image, or with batch_size > 1 a list of them.
        images = model_inputs["image"] if isinstance(model_inputs["image"], list) else [model_inputs["image"]]
        of_one_size = defaultdict(list)
        for image in images:
            of_one_size[image.pixel_values.shape].append(image)
        for group in of_one_size.values():
            pixel_values = torch.stack([image.pixel_values for image in group]).to(dense.device, dense.dtype)
            outputs = dense(pixel_values)
            for image, patch_embeds in zip(group, outputs.patch_embeds.split(1), strict=True):
                image.patch_embeds = patch_embeds
                image.image_hw, image.extent_hw = tuple(pixel_values.shape[2:]), outputs.extent_hw
        return model_inputs

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        labels: Labels | None = None,
        templates: Any = None,
        refinement: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        if labels is None:
            raise ValueError("there are no labels; pass candidate_labels, such as 'road; car, automobile; sky'.")
        image = model_outputs["image"]
        if refinement is not None:
            options["label_maps"] = refinement.label_maps(image.pixel_values[None])
        (label_map,) = self.processor.post_process_semantic_segmentation(
            image, [image.original_hw], self.processor.encode_labels(self.model, labels, templates), **options
        )
        segmentation = label_map.cpu().numpy()
        return {
            "segmentation": segmentation,
            "segments": _segments(segmentation, labels.class_names),
            "labels": labels,
            "size_hw": image.image_hw,
            "grid_hw": tuple(image.patch_embeds.shape[1:3]),
        }


def _segments(segmentation: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """The classes that occur, largest area first; an id outside the vocabulary is the background's."""
    ids, counts = np.unique(segmentation, return_counts=True)
    areas = sorted(zip((counts / segmentation.size).tolist(), ids.tolist(), strict=True), reverse=True)
    return [
        {
            "id": index,
            "label": class_names[index] if 0 <= index < len(class_names) else "background",
            "area_fraction": area,
        }
        for area, index in areas
    ]


def _given(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def register_pipeline() -> None:
    """Makes `pipeline("open-vocabulary-segmentation", ...)` known to transformers; again is harmless."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=OpenVocabularySegmentationPipeline, pt_model=AutoModel, type="multimodal"
        )
