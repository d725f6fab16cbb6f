"""Whether what was exported does what PyTorch does, and what other arithmetic costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..evaluation.benchmarks import load_benchmark
from ..evaluation.counts import SegmentationCounts
from ..evaluation.samples import IGNORED
from ..picture_book import PictureBook
from ..segmentation_spar import FromFeatures, segment

TOLERANCE = 1e-4  # relative, of features in fp32
EQUAL_LABELS = 0.999  # share of the pixels whose class fp32 must give as PyTorch does
PROMPTS = ("a photo of a cat.", "sky", "the close-up photo of a large wooden house, a car and many trees on the lawn")
TEMPLATES = ("a photo of a {}.",)


def sizes_to_check(patch_px: int, native_px: int) -> dict[str, tuple[int, int]]:
    """The four kinds of size, (height, width) in pixels."""
    side = native_px // patch_px
    return {
        "native": (native_px, native_px),
        "larger": ((side + 1) * patch_px, 2 * native_px),
        "oblong": (max(side // 2, 1) * patch_px, 2 * native_px),
        "off-grid": (native_px + patch_px // 2 + 1, native_px - patch_px // 3 - 1),
    }


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """‖ours − theirs‖ / ‖theirs‖; infinite where ours holds NaN."""
    difference = float(np.linalg.norm(ours - theirs)) / max(float(np.linalg.norm(theirs)), 1e-30)
    return difference if np.isfinite(difference) else float("inf")


@torch.no_grad()
def vision_differences(vision: Any, run: Callable[[np.ndarray], list[np.ndarray]]) -> dict[str, float]:
    """The largest relative difference of both outputs at each kind of size, of batches of 1 and 2.

    Args:
        vision: the tower in PyTorch.
        run: pixels (B, 3, H, W) -> `patch_embeds`, `image_embeds` of what was exported.
    """
    config = vision.config
    generator = torch.Generator().manual_seed(0)
    found = {}
    for kind, (height, width) in sizes_to_check(config.patch_size, config.image_size).items():
        pixels = torch.randn(2, config.num_channels, height, width, generator=generator)
        outputs = vision(pixels)
        expected = (outputs.patch_embeds.numpy(), outputs.image_embeds.numpy())
        found[kind] = max(
            relative_difference(ours, theirs[:batch])
            for batch in (1, 2)
            for ours, theirs in zip(run(pixels[:batch].numpy()), expected, strict=True)
        )
    return found


@torch.no_grad()
def text_difference(model: Any, processor: Any, run: Callable[[np.ndarray], np.ndarray]) -> float:
    """The largest relative difference of text features, of batches of 1 and 3."""
    largest = 0.0
    for texts in (PROMPTS[:1], PROMPTS):
        ids = processor(text=list(texts))["input_ids"]
        expected = model.get_text_features(input_ids=ids).pooler_output.numpy()
        largest = max(largest, relative_difference(run(ids.numpy()), expected))
    return largest


def check_tokens(processor: Any, read: Callable[[list[str]], np.ndarray]) -> None:
    """Raises a `ValueError` unless the `tokenizers` package reads texts as the processor does."""
    texts = [*PROMPTS, "Ünïcode, it's 3 words!", "word " * 200]
    expected = processor(text=texts)["input_ids"].numpy()
    ours = read(texts)
    if ours.shape != expected.shape or (ours != expected).any():
        raise ValueError(
            "the tokenizer's file tokenizer.json does not read texts as the tokenizer does, so the folder would not "
            "work without transformers. Save the tokenizer with save_pretrained, and load the model from there."
        )


def calibration_scenes(native_px: int, count: int = 8) -> list[Any]:
    """Pictures of the picture book's training split, at up to 4 times the native side."""
    sides = [(1 + number % 4) * native_px for number in range(count)]
    return [Image.fromarray(PictureBook("train", side, side).scene(number).image) for number, side in enumerate(sides)]


class PictureBookCheck:
    """Some scenes of the picture book, segmented by PyTorch and by what was exported.

    Args:
        model, vision, processor: in PyTorch.
        scenes: how many.
    """

    def __init__(self, model: Any, vision: Any, processor: Any, scenes: int) -> None:
        self.book = load_benchmark("picturebook", scale=2, native_px=vision.config.image_size)
        self.numbers = [number * len(self.book) // scenes for number in range(scenes)]
        segmenter = FromFeatures(vision, model, processor)
        encoded = segmenter.encode_labels(self.book.labels, TEMPLATES)
        class_ids = torch.tensor(self.book.labels.class_ids)

        def by_pytorch(image: Any) -> np.ndarray:
            pixels = processor(images=image, do_resize=False)["pixel_values"]
            (maps,) = segmenter(pixels, encoded)
            return segment(maps.at((image.height, image.width)), class_ids).labels.numpy()

        self.expected, self.mean_iou = self._run(by_pytorch)

    def of(self, pipeline: Any) -> dict[str, float]:
        """`mean_iou` on the scenes, and the share of `equal_labels` with PyTorch; `pipeline` is an `OnnxPipeline`."""
        encoded = pipeline.encode_labels(self.book.labels, TEMPLATES)
        found, mean_iou = self._run(lambda image: pipeline(image, encoded, do_resize=False)["segmentation"])
        equal = [float((ours == theirs).mean()) for ours, theirs in zip(found, self.expected, strict=True)]
        return {"mean_iou": mean_iou, "equal_labels": sum(equal) / len(equal)}

    def _run(self, segment_one: Callable[[Any], np.ndarray]) -> tuple[list[np.ndarray], float]:
        counts = SegmentationCounts(len(self.book.labels), ignore_index=IGNORED)
        found = []
        for number in self.numbers:
            sample = self.book.read(number)
            found.append(segment_one(sample.image))
            counts.update(found[-1], sample.target)
        return found, float(counts.scores()["mean_iou"])
