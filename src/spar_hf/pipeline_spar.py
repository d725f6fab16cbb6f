"""The pipeline task "open-vocabulary-segmentation": an image and words in, a label map out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, Pipeline
from transformers.dynamic_module_utils import custom_object_save
from transformers.pipelines import PIPELINE_REGISTRY

from .processing_spar import SparProcessor
from .prompts_spar import EVERYDAY_WORDS, Labels
from .results_spar import POST_PROCESSING, SegmentationResult, check_thresholds, check_top_k, segments_of
from .segmentation_spar import FromFeatures, ScoreMaps, Segmenter, class_probabilities, segment, top_classes

TASK = "open-vocabulary-segmentation"
MAX_PROBABILITIES = 10**9  # numbers that `return_probabilities` may return, 2 GB


@dataclass
class PreparedImage:
    """One image on its way through the pipeline.

    The base class collates these as a list, so that images of different sizes may share a batch, and doesn't move
    them between devices, so that the label map is made where the scores are.

    Attributes:
        original_hw: Height and width of the image, upright.
        pixel_values: (3, H, W).
        maps: Its score maps, after the segmenter.
        labels: The vocabulary they are about.
    """

    original_hw: tuple[int, int]
    pixel_values: Tensor
    maps: ScoreMaps | None = None
    labels: Labels | None = None


class OpenVocabularySegmentationPipeline(Pipeline):
    """Segments images into classes that are named in words.

    Example:
        >>> segment = pipeline("open-vocabulary-segmentation", model="you/spar")
        >>> segment("street.jpg", candidate_labels=["road", "car, automobile", "sky"])
    """

    # "If there": a stock checkpoint's tokenizer is enough. The base class declares None for all.
    _load_processor = None
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    # Turns a stock model and its tokenizer into ours and a `SparProcessor`; the package sets it, remote code has none.
    convert: ClassVar[Callable[[Any, Any], tuple[Any, Any]] | None] = None

    def __init__(self, model: Any, processor: Any = None, device: Any = None, **kwargs: Any) -> None:
        """Takes what `transformers.pipeline` loads: our model and its processor, or a stock CLIP or SigLIP to convert.

        Raises:
            ValueError: The model is neither, its processor is missing, or the device holds no values ("meta").
        """
        if "meta" in (str(device), model.device.type):
            raise ValueError("the device is 'meta', where weights have no values; give one such as 'cpu' or 'cuda'.")
        # Told apart by what they can do: see `_of_our_code`.
        if not hasattr(getattr(model, "vision_model", None), "patches_from"):
            model, processor = self._converted(model, processor)
        elif not hasattr(processor, "encode_labels"):
            raise ValueError(
                f"the {TASK} pipeline got a {type(processor).__name__} for a processor; it needs a SparProcessor. "
                f"{model.name_or_path or 'The model'} lacks one that can be read; save it there with "
                "processor.save_pretrained, or pass model and processor as spar_hf.load returns them."
            )
        super().__init__(model=model, processor=_of_our_code(processor), device=device, **kwargs)

    def _converted(self, model: Any, processor: Any) -> tuple[Any, Any]:
        convert = type(self).convert
        if convert is None:
            raise ValueError(
                f"the {TASK} pipeline got a {type(model).__name__}; without the package spar_hf it takes SPAR models "
                "only. Install and import spar_hf to convert a stock CLIP or SigLIP."
            )
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            commit = getattr(model.config, "_commit_hash", None)
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, revision=commit, trust_remote_code=False)
        return convert(model, tokenizer)

    def __call__(self, images: Any, candidate_labels: Any = None, **kwargs: Any) -> Any:
        """Segments one image or several.

        Args:
            images: An image in any form that `SparImageProcessor` reads, or a list, a dataset or a generator of them.
            candidate_labels: The vocabulary, see `Labels.parse`; or what the segmenter's `encode_labels` made of it,
                which saves encoding the words again. It may be given to `pipeline(...)` once instead.
            templates: Prompt templates; see `SparProcessor.encode_labels`.
            segmenter: Any segmenter, such as `spar_hf.build_segmenter` makes; None is one pass of the model.
            encoder: Any dense encoder, such as a `SlidingWindow`, in the place of a segmenter.
            size: Size for the model; see `SparImageProcessor`. `do_resize=False` keeps the image's own.
            logit_scale, background_threshold, background_class, score_threshold, area_threshold, synonyms: See
                `segmentation_spar.segment`. With a threshold on probabilities, a single class competes with everyday
                words, as its probability would be 1 otherwise.
            against: Names that compete with the classes and are never reported; `True` is everyday words.
            return_scores: Also return the probability of the best class at each pixel.
            return_probabilities: Also return the probability of every class at each pixel.
            return_top_k: Also return so many of the likeliest classes of each pixel, whatever the thresholds.
            batch_size: Images read at once; those of equal size go through the model together.

        Returns:
            For each image a `SegmentationResult`, which is a dictionary; a list of them for a list, an iterator for a
            dataset or a generator:
                `segmentation`: class ids (H, W), int32, at the image's own, upright size; -1 where there is no class.
                `segments`: `{"id", "label", "area_fraction"}` of each class that occurs, largest
                    first; they sum to 1. With `return_scores` also `score`, the mean probability over its pixels.
                `scores`: (H, W) fp32, if asked for.
                `probabilities`: (C, H, W) fp16, if asked for.
                `top_classes`, `top_probabilities`: (k, H, W) int32 and fp16, the likeliest first, if asked for.
                `labels`: The `Labels`.
                `size_hw`: Height and width of the pixels that the model saw.
                `grid_hw`: Rows and columns of the grid of patches, or of what the method has in its place.

        Raises:
            ValueError: Malformed labels or arguments, or an image that cannot be read (`InvalidImageError`).
        """
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        if isinstance(images, tuple):
            images = list(images)
        if isinstance(images, list) and not images:
            return []
        # Words are encoded once for all images of a call, and anew in the next: the model may have changed.
        given = {name: value for name, value in kwargs.items() if name not in ("batch_size", "num_workers")}
        asked = {**self._forward_params, **self._sanitize_parameters(**given)[1]}
        if "labels" not in asked:
            raise ValueError("there are no labels; pass candidate_labels, such as 'road; car, automobile; sky'.")
        kwargs["candidate_labels"] = self.encode_labels(asked.pop("labels"), **asked)
        return super().__call__(images, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Also saves the processor and, of a pipeline that was itself loaded as remote code, the code."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        if not hasattr(self, "_registered_impl"):
            custom_object_save(self, save_directory)

    def segmenter_of(self, segmenter: Segmenter | None = None, encoder: Any = None) -> Segmenter:
        """The segmenter that runs: the one given, one of the encoder given, or one pass of the model."""
        if segmenter is not None:
            return segmenter
        return FromFeatures(self.model.vision_model if encoder is None else encoder, self.model, self.processor)

    def encode_labels(
        self, candidate_labels: Any, templates: Any = None, segmenter: Segmenter | None = None, encoder: Any = None
    ) -> Any:
        """What `candidate_labels` takes in the place of words, to encode them once for many calls."""
        if is_encoded(candidate_labels):
            return candidate_labels
        return self.segmenter_of(segmenter, encoder).encode_labels(Labels.parse(candidate_labels), templates)

    @torch.inference_mode()
    def from_pixels(
        self,
        pixel_values: Tensor,
        sizes_hw: list[tuple[int, int]],
        encoded: Any,
        segmenter: Callable[[Tensor, Any], list[ScoreMaps]] | None = None,
        **options: Any,
    ) -> list[SegmentationResult]:
        """The results of images whose pixels are prepared already, elsewhere.

        Args:
            pixel_values: (B, 3, H, W), from the image processor.
            sizes_hw: Height and width of each label map: of each image, upright.
            encoded: From `encode_labels`.
            segmenter: See `__call__`.
            **options: Thresholds and what to return; see `__call__`.
        """
        found = []
        of_all = (segmenter or self.segmenter_of())(pixel_values, encoded)
        for pixels, size_hw, maps in zip(pixel_values, sizes_hw, of_all, strict=True):
            prepared = PreparedImage(size_hw, pixels, maps, encoded.labels)
            found.append(self.postprocess({"image": prepared}, **options))
        return found

    def _sanitize_parameters(
        self,
        candidate_labels: Any = None,
        templates: Any = None,
        segmenter: Segmenter | None = None,
        encoder: Callable[[Tensor], Any] | None = None,
        against: Any = None,
        size: Any = None,
        do_resize: bool | None = None,
        return_scores: bool | None = None,
        return_probabilities: bool | None = None,
        return_top_k: int | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown := sorted(set(kwargs) - {*POST_PROCESSING, "local_files_only"}):
            raise ValueError(
                f"the {TASK} pipeline does not know {', '.join(unknown)}; allowed are candidate_labels, templates, "
                "segmenter, encoder, against, size, do_resize, return_scores, return_probabilities, return_top_k, "
                f"{', '.join(POST_PROCESSING)}."
            )
        options = {name: kwargs.get(name) for name in POST_PROCESSING}
        check_top_k(return_top_k)
        check_thresholds(options["logit_scale"], options["background_threshold"], options["area_threshold"])
        preprocess = {"size": size, "do_resize": do_resize}
        forward = {"segmenter": segmenter, "encoder": encoder, "templates": templates, "labels": candidate_labels}
        if candidate_labels is not None and not is_encoded(candidate_labels):
            labels = Labels.parse(candidate_labels)
            if against is None and labels.wants_rivals(options["background_threshold"]):
                against = True
            forward["labels"] = labels.against(EVERYDAY_WORDS if against is True else against) if against else labels
        returned = {"scores": return_scores, "probabilities": return_probabilities, "top_k": return_top_k}
        postprocess = {**options, **{f"return_{name}": value for name, value in returned.items()}}
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

    def _forward(
        self, model_inputs: dict[str, Any], labels: Any, segmenter: Any = None, encoder: Any = None, **_: Any
    ) -> dict[str, Any]:
        segmenter = self.segmenter_of(segmenter, encoder)
        # One image, or with batch_size > 1 a list of them.
        images = model_inputs["image"] if isinstance(model_inputs["image"], list) else [model_inputs["image"]]
        of_one_size = defaultdict(list)
        for image in images:
            of_one_size[image.pixel_values.shape].append(image)
        for group in of_one_size.values():
            pixel_values = torch.stack([image.pixel_values for image in group])
            for image, maps in zip(group, segmenter(pixel_values, labels), strict=True):
                image.maps, image.labels = maps, labels.labels
        return model_inputs

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        return_scores: bool = False,
        return_probabilities: bool = False,
        return_top_k: int | None = None,
        **options: Any,
    ) -> SegmentationResult:
        image, labels = model_outputs["image"], model_outputs["image"].labels
        maps, class_ids = image.maps.at(image.original_hw), torch.tensor(labels.class_ids)
        options["background_threshold"] = labels.least_probabilities(options.get("background_threshold"))
        found = segment(maps, class_ids, with_scores=return_scores, **options)
        segmentation = found.labels.cpu().numpy()
        scores = None if found.scores is None else found.scores.cpu().numpy()
        result = SegmentationResult(
            segmentation=segmentation,
            segments=segments_of(segmentation, labels.class_names, scores),
            labels=labels,
            size_hw=tuple(image.pixel_values.shape[1:]),
            grid_hw=image.maps.grid_hw,
        )
        if scores is not None:
            result["scores"] = scores
        if return_probabilities:
            result["probabilities"] = all_probabilities(maps, class_ids, len(labels), options.get("logit_scale"))
        if return_top_k is not None:
            ids, probabilities = top_classes(maps, class_ids, return_top_k, options.get("logit_scale"))
            result["top_classes"], result["top_probabilities"] = ids.numpy(), probabilities.numpy()
        return result


def _of_our_code(processor: Any) -> SparProcessor:
    """The processor as an instance of the class that this file imports.

    Remote code of a local folder is imported once for each file that transformers asks for, so the processor, its
    `Labels` and errors can be of classes with the same names and not the same.
    """
    if isinstance(processor, SparProcessor):
        return processor
    SparProcessor.register_for_auto_class()
    return SparProcessor(**{name: getattr(processor, name) for name in signature(SparProcessor).parameters})


def is_encoded(labels: Any) -> bool:
    """Whether labels are what a segmenter's `encode_labels` made of them: they hold their `Labels`."""
    return isinstance(getattr(labels, "labels", None), Labels)


def all_probabilities(maps: ScoreMaps, class_ids: Tensor, num_classes: int, logit_scale: float | None) -> np.ndarray:
    """The probability of every class at every pixel, (C, H, W) fp16.

    Raises:
        ValueError: They would take more memory than `MAX_PROBABILITIES`.
    """
    shape = (num_classes, *maps.size_hw)
    if np.prod(shape, dtype=np.int64) > MAX_PROBABILITIES:
        raise ValueError(
            f"the probabilities of {num_classes} classes at {shape[1]} x {shape[2]} pixels are "
            f"{2 * np.prod(shape, dtype=np.int64) / 1e9:.1f} GB; at most {2 * MAX_PROBABILITIES / 1e9:.0f} GB are "
            "returned. Take fewer classes, a smaller image, or class_probabilities, which gives them tile by tile."
        )
    probabilities = np.empty(shape, np.float16)
    for (rows, columns), tile in class_probabilities(maps, class_ids, logit_scale):
        probabilities[:, rows, columns] = tile.cpu().numpy()
    return probabilities


def _given(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def register_pipeline(default_model: str, convert: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    """Makes `pipeline("open-vocabulary-segmentation", ...)` known to transformers; again is harmless.

    Args:
        default_model: What `pipeline` loads when it is told the task alone.
        convert: Turns a stock model and its tokenizer into ours and a `SparProcessor`.
    """
    OpenVocabularySegmentationPipeline.convert = staticmethod(convert)
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=OpenVocabularySegmentationPipeline,
            pt_model=AutoModel,
            default={"model": (default_model, "main")},
            type="multimodal",
        )
        # What a saved pipeline says of itself; the default is a folder of this machine.
        saved = {name: value for name, value in PIPELINE_REGISTRY.check_task(TASK)[1].items() if name != "default"}
        OpenVocabularySegmentationPipeline._registered_impl = {TASK: saved}
