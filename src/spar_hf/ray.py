"""Segmentation and features on a Ray cluster: callable classes for `ray.data.Dataset.map_batches`.

    import ray
    from spar_hf.ray import Segment

    photos = ray.data.read_parquet("photos/")  # a column `image` of encoded pictures, paths or arrays
    found = photos.map_batches(
        Segment,
        fn_constructor_kwargs={"model": "you/spar", "labels": "road; car, automobile; sky"},
        batch_size=16,
        concurrency=4,  # actors, each of which loads the model once
        num_gpus=1,  # of each
    )
    found.write_parquet("found/")

Ray reads, schedules and writes, and does the pictures of a dead actor again. The extra `ray` installs it.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from .build import build_encoder, build_segmenter
from .checkpoints import load
from .image_file_spar import InvalidImageError
from .image_io_spar import read_image
from .names_spar import unknown
from .pipeline_spar import OpenVocabularySegmentationPipeline
from .results_spar import SegmentationResult
from .visualize import label_map_image


def _column(values: list[Any]) -> np.ndarray:
    """A column of Python objects; NumPy would make fixed-width text of bytes, and cut their zeros."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _png(result: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    label_map_image(result["segmentation"], result["labels"]).save(buffer, format="PNG")
    return buffer.getvalue()


def _areas(result: Mapping[str, Any]) -> str:
    return json.dumps({segment["label"]: segment["area_fraction"] for segment in result["segments"]})


def _rle(result: SegmentationResult) -> str:
    names = result["labels"].class_names
    ids = dict(zip(result["labels"].written_ids, names, strict=True))
    masks = result.to_coco()["annotations"]
    return json.dumps([{"label": ids[mask["category_id"]], **mask} for mask in masks])


RESULTS = {"label_map": _png, "rle": _rle, "areas": _areas}


class _Pictures:
    """A model, and batches whose column of pictures is replaced by what it finds in them."""

    def __init__(
        self, model: str, column: str, batch_size: int, dtype: str, device: str | None, short_side: int | None
    ) -> None:
        self.column, self.batch_size = column, batch_size
        self.model, self.processor = load(model, dtype=getattr(torch, dtype))
        device = device or str(torch.accelerator.current_accelerator() or "cpu")
        self.model.to(torch.device(device)).eval()  # type: ignore[arg-type]
        self.image_processor = self.processor.image_processor
        if short_side is not None:
            self.image_processor.size, self.image_processor.do_resize = {"shortest_edge": short_side}, True

    def find(self, pixel_values: torch.Tensor, sizes_hw: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """New columns of pictures of one size (B, 3, H, W), which were of other sizes before."""
        raise NotImplementedError

    @property
    def columns(self) -> dict[str, Any]:
        """The new columns by name, and what stands there for a picture that cannot be read.

        It has the type of the others, for a block of nothing but nulls would have another in Parquet.
        """
        raise NotImplementedError

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with new columns in the place of that of the pictures.

        Args:
            batch: column by name, as Ray Data gives it (`batch_format="numpy"`).

        Returns:
            The other columns, the new ones, and `error`: why a picture cannot be read, whose new columns are empty;
            empty for the others.

        Raises:
            ValueError: there is no such column.
        """
        if self.column not in batch:
            raise ValueError(f"the data have no column {self.column!r}; their columns: {', '.join(batch)}")
        errors: list[str] = []
        of_one_size: defaultdict[Any, list[Any]] = defaultdict(list)  # (number, pixel values, size before)
        for number, stored in enumerate(batch[self.column]):
            try:
                pixels, size_hw = self._read(stored, f"picture {number} of the batch")
                of_one_size[pixels.shape].append((number, pixels, size_hw))
                errors.append("")
            except InvalidImageError as error:
                errors.append(str(error))
        rows: list[dict[str, Any]] = [self.columns for _ in errors]
        for pictures in of_one_size.values():
            for start in range(0, len(pictures), self.batch_size):
                numbers, of_all, sizes_hw = zip(*pictures[start : start + self.batch_size], strict=True)
                for number, row in zip(numbers, self.find(torch.stack(of_all), list(sizes_hw)), strict=True):
                    rows[number] = row
        return {
            **{name: values for name, values in batch.items() if name != self.column},
            **{name: _column([row[name] for row in rows]) for name in self.columns},
            "error": _column(errors),
        }

    def _read(self, stored: Any, name: str) -> tuple[torch.Tensor, tuple[int, int]]:
        """The pixels of an entry, and its own size: encoded, a path, an array, or `datasets`' pair of bytes and path.

        Raises:
            InvalidImageError: it cannot be read, or would be too large for the network.
        """
        if isinstance(stored, Mapping):
            stored = stored["bytes"] if stored.get("bytes") is not None else stored.get("path")
        if isinstance(stored, str):
            stored, name = Path(stored), f"image '{stored}'"
        image = read_image(stored, self.image_processor.read_options, name)
        pixels = torch.from_numpy(self.image_processor.input_pixels.values(image, name))
        return pixels, (image.height, image.width)


class Segment(_Pictures):
    """Pictures and words in, label maps out.

    Args:
        model: a folder, a Hub id, or a checkpoint that ships with the package.
        labels: the vocabulary, see `Labels.parse`.
        results: the new columns, some of
            `label_map`: a PNG, as bytes; the value of a pixel is the position of its class, the highest is no class.
            `rle`: JSON, COCO's annotation with its compressed mask for each class that occurs, and its `label`; by
            the extra `results`.
            `areas`: JSON, class to its fraction of the picture.
        column: of the pictures.
        batch_size: pictures of one size that go through the network together.
        short_side: resize to this shorter side; None as the model's processor does.
        dtype, device: of the network; an accelerator where there is one.
        method, networks, settings, window, stride_px, reach, refine: see `build_segmenter`.
        thresholds: `background_threshold`, `score_threshold`, ...; see the pipeline.

    Raises:
        ValueError: no such model, label, result or method.
    """

    def __init__(
        self,
        model: str,
        labels: Any,
        results: Iterable[str] = ("label_map", "areas"),
        *,
        column: str = "image",
        batch_size: int = 8,
        short_side: int | None = None,
        dtype: str = "float32",
        device: str | None = None,
        method: str | None = None,
        networks: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        window: int | str | None = None,
        stride_px: int | None = None,
        reach: str | None = None,
        refine: Iterable[str] = (),
        **thresholds: Any,
    ) -> None:
        self.results = tuple(results)
        for name in self.results:
            if name not in RESULTS:
                raise ValueError(unknown("result", name, RESULTS))
        super().__init__(model, column, batch_size, dtype, device, short_side)
        self.segmenter = build_segmenter(
            self.model,
            self.processor,
            method,
            networks=networks,
            settings=settings,
            window=window,
            stride_px=stride_px,
            reach=reach,
            refine=refine,
        )
        self.pipeline = OpenVocabularySegmentationPipeline(
            model=self.model, processor=self.processor, device=self.model.device
        )
        self.thresholds = thresholds
        self.encoded = self.pipeline.encode_labels(labels, segmenter=self.segmenter)  # once, for all pictures

    @property
    def columns(self) -> dict[str, Any]:
        return {name: b"" if name == "label_map" else "" for name in self.results}

    def find(self, pixel_values: torch.Tensor, sizes_hw: list[tuple[int, int]]) -> list[dict[str, Any]]:
        found = self.pipeline.from_pixels(pixel_values, sizes_hw, self.encoded, self.segmenter, **self.thresholds)
        return [{name: RESULTS[name](result) for name in self.results} for result in found]


class Features(_Pictures):
    """Pictures in, patch features out: column `features`, safetensors as bytes, with `patch_embeds` (h, w, D).

    Args:
        model: a folder, a Hub id, or a checkpoint that ships with the package.
        column: of the pictures.
        batch_size: pictures of one size that go through the network together.
        short_side: resize to this shorter side; None as the model's processor does.
        dtype, device: of the network; an accelerator where there is one.
        encoder: method, networks, settings, window, ...; see `build_encoder`.
    """

    def __init__(
        self,
        model: str,
        *,
        column: str = "image",
        batch_size: int = 8,
        short_side: int | None = None,
        dtype: str = "float32",
        device: str | None = None,
        **encoder: Any,
    ) -> None:
        super().__init__(model, column, batch_size, dtype, device, short_side)
        self.encoder = build_encoder(self.model.vision_model, encoder.pop("method", None), **encoder)

    @property
    def columns(self) -> dict[str, Any]:
        return {"features": b""}

    @torch.inference_mode()
    def find(self, pixel_values: torch.Tensor, sizes_hw: list[tuple[int, int]]) -> list[dict[str, Any]]:
        embeds = self.encoder(pixel_values.to(self.encoder.device, self.encoder.dtype)).patch_embeds.cpu()
        return [{"features": save({"patch_embeds": of_one.contiguous()})} for of_one in embeds]
