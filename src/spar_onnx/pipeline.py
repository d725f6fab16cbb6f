"""The pipeline on an exported folder: pictures and words in, label maps out. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .folder import LABEL_MAP, TEXT, VISION, Exported, read_json
from .library import library
from .words import TextSide, WordReader, encode_names

if TYPE_CHECKING:
    from PIL import Image

    from spar_hf.input_pixels_spar import InputPixels
    from spar_hf.prompts_spar import Labels

READS = {"max_image_pixels": "max_pixels", "max_image_ratio": "max_ratio", "max_file_bytes": "max_file_bytes"}


@dataclass(frozen=True, eq=False)
class LabelEmbeds:
    """A vocabulary and its text features: what takes words takes it too, and encodes them once.

    Attributes:
        labels: the classes and their names.
        text_embeds: one row of length 1 per name (K, D), fp32.
    """

    labels: Labels
    text_embeds: np.ndarray


def load(folder: str | Path, dtype: str | None = None, threads: int | None = None) -> OnnxPipeline:
    """The pipeline of an exported folder.

    Args:
        folder: what `spar export --format onnx` wrote.
        dtype: `float32`, `float16`, `int8` or `int8-static`, of those that were exported; None is the first of these
            that is there.
        threads: of each session; None is one a core.

    Raises:
        ValueError: the folder, or one of its files, is none that can be run; the message says which and what to do.
    """
    exported = Exported.read(folder)
    return OnnxPipeline(exported, exported.dtypes[0] if dtype is None else dtype, threads)


class OnnxPipeline:
    """Segments pictures into classes named in words; `load` makes it.

    It is `OpenVocabularySegmentationPipeline` in one pass: the same arguments, the same result.
    """

    def __init__(self, exported: Exported, dtype: str, threads: int | None = None) -> None:
        self.exported, self.dtype = exported, dtype
        self._sessions = {graph: exported.session(graph, dtype, threads) for graph in (VISION, TEXT, LABEL_MAP)}
        stored = read_json(exported.folder / "processor_config.json")
        self.templates: list[str] | None = stored.get("templates")
        image = stored.get("image_processor", {})
        values = library("image_values_spar")
        names = {**{name: name for name in ("bands", "alpha", "value_range")}, **READS}
        given = {ours: image[theirs] for theirs, ours in names.items() if image.get(theirs) is not None}
        self.reading: Any = values.ReadOptions(**given)
        pixels = library("input_pixels_spar").InputPixels
        try:
            self.pixels: InputPixels = pixels(**{field.name: image[field.name] for field in fields(pixels)})
        except KeyError as error:
            path = exported.folder / "processor_config.json"
            raise ValueError(f"{path} lacks {error}; export the model again with 'spar export'.") from None

    def __repr__(self) -> str:
        return f"OnnxPipeline({str(self.exported.folder)!r}, dtype={self.dtype!r})"

    def __call__(
        self,
        images: Any,
        candidate_labels: Any,
        *,
        templates: str | Iterable[str] | None = None,
        size: int | dict[str, int] | None = None,
        do_resize: bool | None = None,
        against: Any = None,
        return_scores: bool = False,
        return_top_k: int | None = None,
        **thresholds: Any,
    ) -> Any:
        """Segments one picture or several.

        Args:
            images: a path, encoded bytes, a `PIL.Image` or an array, or a list of them.
            candidate_labels: the vocabulary, see `Labels.parse`; or what `encode_labels` made of it.
            templates: prompt templates; None is the model's own.
            size: size for the network; see `SparImageProcessor`. `do_resize=False` keeps the picture's own.
            do_resize: None as exported.
            against: names that compete with the classes and are never reported; True is everyday words.
            return_scores: also return the probability of the best class at each pixel.
            return_top_k: also return so many of the likeliest classes of each pixel, whatever the thresholds.
            thresholds: `logit_scale`, `background_threshold`, `background_class`, `score_threshold`,
                `area_threshold`, `synonyms`; see `segmentation_spar.segment`.

        Returns:
            The `SegmentationResult` of the picture, or a list of them.

        Raises:
            ValueError: malformed labels or arguments, or a picture that cannot be read (`InvalidImageError`).
        """
        results = library("results_spar")
        if unknown := sorted(set(thresholds) - set(results.POST_PROCESSING)):
            raise ValueError(
                f"the pipeline does not know {', '.join(unknown)}; allowed are templates, size, do_resize, against, "
                f"return_scores, return_top_k, {', '.join(results.POST_PROCESSING)}."
            )
        results.check_top_k(return_top_k)
        checked = ("logit_scale", "background_threshold", "area_threshold")
        results.check_thresholds(*(thresholds.get(name) for name in checked))
        encoded = candidate_labels
        if not isinstance(encoded, LabelEmbeds):
            prompts = library("prompts_spar")
            labels = prompts.Labels.parse(candidate_labels)
            if against is None and labels.wants_rivals(thresholds.get("background_threshold")):
                against = True
            if against:
                labels = labels.against(prompts.EVERYDAY_WORDS if against is True else against)
            encoded = self.encode_labels(labels, templates)
        changes: dict[str, Any] = {} if do_resize is None else {"do_resize": do_resize}
        if size is not None:
            changes |= {"size": library("input_pixels_spar").check_size(size), "do_resize": True, **changes}

        def one(image: Any) -> Any:
            return self._segment(self.open_rgb(image), encoded, return_scores, return_top_k, changes, thresholds)

        return [one(image) for image in images] if isinstance(images, list | tuple) else one(images)

    def open_rgb(self, image: Any) -> Image.Image:
        """One picture as the network will see it, before it is resized: upright, 8-bit RGB, at its own size.

        Raises:
            InvalidImageError: it cannot be read, or is over a limit.
        """
        return library("image_io_spar").read_image(image, self.reading)

    def encode_labels(self, labels: Any, templates: str | Iterable[str] | None = None) -> LabelEmbeds:
        """The vocabulary with its text features.

        Raises:
            ValueError: labels or templates are malformed.
        """
        prompts = library("prompts_spar")
        labels = prompts.Labels.parse(labels)
        common = prompts.check_templates(templates or self.templates or prompts.IMAGENET_TEMPLATES)
        return LabelEmbeds(labels, encode_names(labels, common, self.words, self._sessions[TEXT]))

    @cached_property
    def words(self) -> WordReader:
        """The tokenizer."""
        return WordReader(self.exported.folder / "tokenizer.json", TextSide(**self.exported.record["text"]))

    def features(self, pixel_values: np.ndarray) -> np.ndarray:
        """Patch features (B, h, w, D) of normalised pixels (B, 3, H, W).

        Raises:
            ValueError: the pixels are smaller than a patch.
        """
        patch_px = self.exported.record["patch_px"]
        height, width = pixel_values.shape[2:]
        if min(height, width) < patch_px:
            raise ValueError(
                f"the image is {height}x{width} px (height x width) and the graph reads patches of {patch_px} px; "
                "both sides must be at least one patch. Resize it."
            )
        (embeds,) = self._sessions[VISION].run(["patch_embeds"], {"pixel_values": pixel_values})
        return embeds

    def _segment(
        self,
        rgb: Image.Image,
        encoded: LabelEmbeds,
        with_scores: bool,
        top_k: int | None,
        changes: dict[str, Any],
        thresholds: Any,
    ) -> Any:
        results = library("results_spar")
        pixel_values = replace(self.pixels, **changes).values(rgb)[None]
        image_hw = pixel_values.shape[2:]
        (patch_embeds,) = self.features(pixel_values)
        if not np.isfinite(patch_embeds).all():
            raise ValueError("the features hold NaN or infinite numbers; take another --dtype, float32 for one.")

        def run(outputs: list[str], **more: Any) -> list[np.ndarray]:
            feed = {
                "patch_embeds": patch_embeds,
                "text_embeds": encoded.text_embeds,
                "size_hw": np.array([rgb.height, rgb.width], np.int64),
                "image_hw": np.array(image_hw, np.int64),
            }
            return self._sessions[LABEL_MAP].run(outputs, {**feed, **more})

        least = encoded.labels.least_probabilities(thresholds.get("background_threshold"))
        asked = {**thresholds, "background_threshold": least}
        segmentation, scores = label_map(run, encoded.labels.class_ids, with_scores=with_scores, **asked)
        found = results.SegmentationResult(
            segmentation=segmentation,
            segments=results.segments_of(segmentation, encoded.labels.class_names, scores),
            labels=encoded.labels,
            size_hw=tuple(image_hw),
            grid_hw=tuple(patch_embeds.shape[:2]),
        )
        if scores is not None:
            found["scores"] = scores
        if top_k is not None:
            ranked = top_classes(run, encoded.labels.class_ids, top_k, thresholds.get("logit_scale"))
            found["top_classes"], found["top_probabilities"] = ranked
        return found


def top_classes(
    run: Callable[..., list[np.ndarray]], class_ids: Iterable[int], count: int, logit_scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`segmentation_spar.top_classes` with the graph of the label map, which runs once for each class.

    Args:
        run, class_ids, logit_scale: see `label_map`.
        count: how many classes; no more than there are.
    """
    ids = np.array(list(class_ids), np.int64)
    scale = np.array(library("results_spar").COSINE_SCALE if logit_scale is None else logit_scale, np.float32)
    order = probabilities = np.empty(0)
    for index in range(int(ids.max()) + 1):
        # With none but its own names to win, the winner's class is this one everywhere.
        (own,) = run(
            ["probabilities"],
            class_ids=ids,
            contending=ids == index,
            logit_scale=scale,
            with_probabilities=np.array(True),
        )
        if index == 0:
            order = np.zeros((count, *own.shape), np.int32)
            probabilities = np.full((count, *own.shape), -1, np.float32)
        number = np.full(own.shape, index, np.int32)
        for place in range(min(count, index + 1)):
            better = own > probabilities[place]
            for new, kept in ((own, probabilities[place]), (number, order[place])):
                swapped = np.where(better, kept, new)
                kept[better] = new[better]
                new[...] = swapped
    kept_classes = min(count, int(ids.max()) + 1)
    return order[:kept_classes], probabilities[:kept_classes].astype(np.float16)


def label_map(
    run: Callable[..., list[np.ndarray]],
    class_ids: Iterable[int],
    *,
    logit_scale: float | None = None,
    background_threshold: float | Sequence[float] | None = None,
    background_class: int | None = None,
    score_threshold: float | None = None,
    area_threshold: float | None = None,
    synonyms: str = "sum",
    with_scores: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The thresholds of `segmentation_spar.segment` around the graph of the label map.

    Args:
        run: (names of outputs, more inputs) -> outputs of the graph on one image.
        class_ids: the class of each name (K).
        with_scores: also return the probability of the best class at each pixel.
        logit_scale, background_threshold, background_class, score_threshold, area_threshold, synonyms: see `segment`.

    Returns:
        Class ids (H, W), int32; and probabilities (H, W) or None.
    """
    results = library("results_spar")
    library("names_spar").one_of("synonyms", synonyms, results.SYNONYMS)
    ids = np.array(list(class_ids), np.int64)
    background = results.NO_CLASS if background_class is None else background_class
    # What adds up its probabilities: the names of a class, and those that only compete; for `max` each name is alone.
    classes, groups = np.unique(ids, return_inverse=True) if synonyms == "sum" else (ids, np.arange(len(ids)))
    called = np.where(classes == results.NO_CLASS, background, classes).astype(np.int32)  # of each, in the result
    contending = np.ones(len(ids), bool)
    scale = np.array(results.COSINE_SCALE if logit_scale is None else logit_scale, np.float32)
    if area_threshold is not None:
        plain = {"contending": contending, "logit_scale": scale, "with_probabilities": np.array(False)}
        (found,) = run(["labels"], class_ids=groups, **plain)
        labels = called[found]
        area = np.bincount(labels.ravel() + 1, minlength=max(ids.max(), background) + 2)[1:]
        foreground = np.arange(len(area)) != background
        masked_out = foreground & (area <= area_threshold * area[foreground].sum())
        contending = ~masked_out[ids.clip(min=0)] | (ids == results.NO_CLASS)
        if not contending.any():
            certain = np.ones(labels.shape, np.float32)
            return np.full(labels.shape, background, np.int32), certain if with_scores else None
    found, best, probability = run(
        ["labels", "cosines", "probabilities"],
        class_ids=groups,
        contending=contending,
        logit_scale=scale,
        with_probabilities=np.array(background_threshold is not None or with_scores),
    )
    labels = called[found]
    if score_threshold is not None:
        labels[best < score_threshold] = background
    if background_threshold is not None:
        each = background_threshold if isinstance(background_threshold, Sequence) else [background_threshold]
        limits = np.array([*np.broadcast_to(each, int(ids.max()) + 1), each[0] if len(each) == 1 else 0], np.float32)
        labels[probability < limits[classes[found]]] = background
    return labels, probability if with_scores else None
