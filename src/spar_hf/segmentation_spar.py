"""Score maps, the one currency of segmentation; whoever makes them (`Segmenter`), and their one arg-max (`label_map`).

Everything is computed in tiles, so that (names x height x width) is never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .encoder_spar import EncoderWrapper
from .grid_spar import axis_block, coverage, upsample
from .names_spar import one_of
from .results_spar import COSINE_SCALE, NO_CLASS, SYNONYMS, check_thresholds

# Numbers (names x pixels) of a tile: 2 MB of fp32 stay in a CPU's cache, 256 MB fill a GPU.
TILE_NUMBERS = {"cpu": 2**19, "cuda": 2**26}
# Numbers of the full-resolution maps made at a time, where scores do not live on a grid: 4 MB; 512 MB on a GPU.
MAP_NUMBERS = {"cpu": 2**20, "cuda": 2**27}
# Names that `_max_over_names` reduces together: the fast reduction first, the slow one with indices on what is left.
GROUP_NAMES = 8
AREA_PIXELS = 2**18  # of a label map that are counted at a time

Tile = tuple[slice, slice]
Chunks = Iterable[tuple[slice, Tensor]]  # some names, their scores (k, height, width) in a tile


# ------------------------------------------------------------------------------------------- score maps


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreMaps:
    """The score of every name at every pixel of one image, made when asked for.

    Attributes:
        size_hw: height and width of the label map to come; `at` gives the same scores at another size.
        num_names: K.
        device: where the scores are made.
        logit_scale: factor on the scores before the soft-max over names; None where they are cosines, whose factor is
            the caller's.
        corrections: what is done to the finished label map (H, W), in this order (votes of clusters or masks).
    """

    size_hw: tuple[int, int]
    num_names: int
    device: torch.device
    logit_scale: float | None = None
    corrections: tuple[Callable[[Tensor], Tensor], ...] = ()

    @property
    def grid(self) -> Tensor | None:
        """Scores (K, h, w) where they live on a patch grid, else None."""
        return None

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of the grid that the scores live on; the label map's own where there is no other."""
        return self.size_hw

    def at(self, size_hw: tuple[int, int]) -> ScoreMaps:
        """The same for a label map of another height and width."""
        return replace(self, size_hw=size_hw)

    def __call__(self, names: slice) -> Tensor:
        """The maps of some names, (k, H, W) fp32."""
        raise NotImplementedError

    def tiles(self) -> Iterator[tuple[Tile, Chunks]]:
        """The scores tile by tile; the tiles cover the label map and the chunks of each the names, in order."""
        step = max(1, MAP_NUMBERS.get(self.device.type, MAP_NUMBERS["cpu"]) // (self.size_hw[0] * self.size_hw[1]))
        names = (slice(start, min(start + step, self.num_names)) for start in range(0, self.num_names, step))
        yield (slice(0, self.size_hw[0]), slice(0, self.size_hw[1])), ((part, self(part)) for part in names)


@dataclass(frozen=True, eq=False, kw_only=True)
class GridScores(ScoreMaps):
    """Scores on a patch grid, bilinear between the patches (`align_corners=False`).

    Attributes:
        scores: (K, h, w), fp32.
        coverage_hw: image size over the pixels that the grid covers, per axis; see `grid_spar.coverage`.
    """

    scores: Tensor
    coverage_hw: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def of(cls, scores: Tensor, size_hw: tuple[int, int], **fields: Any) -> GridScores:
        """The maps of scores (K, h, w)."""
        return cls(scores=scores, size_hw=size_hw, num_names=len(scores), device=scores.device, **fields)

    @property
    def grid(self) -> Tensor:
        return self.scores

    @property
    def grid_hw(self) -> tuple[int, int]:
        return (self.scores.shape[1], self.scores.shape[2])

    def rows(self, rows: slice) -> Tensor:
        """Scores of some rows of the grid, (K, r, w)."""
        return self.scores[:, rows]

    def __call__(self, names: slice) -> Tensor:
        return upsample(self.grid[names], self.size_hw, self.coverage_hw)

    def tiles(self) -> Iterator[tuple[Tile, Chunks]]:
        numbers = TILE_NUMBERS.get(self.device.type, TILE_NUMBERS["cpu"])
        tile_px = max(16, int((numbers / self.num_names) ** 0.5))
        (height, width), (grid_rows, grid_columns) = self.size_hw, self.grid_hw
        across = [
            (pixels, *axis_block(pixels, width, grid_columns, self.coverage_hw[1], self.device))
            for pixels in _runs(width, tile_px)
        ]
        every = slice(0, self.num_names)
        for y in _runs(height, tile_px):
            i, down = axis_block(y, height, grid_rows, self.coverage_hw[0], self.device)
            band = self.rows(i)  # (K, rows of the band, w)
            for x, j, weights in across:
                yield (y, x), [(every, down @ (band[:, :, j] @ weights.T))]


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureScores(GridScores):
    """Cosines of patch features and text features, made band by band.

    Attributes:
        scores: the patch features (h, w, D), L2-normalised or what counts as such.
        text: text features (K, D), L2-normalised.
    """

    text: Tensor

    @property
    def grid(self) -> Tensor:
        return self.rows(slice(0, len(self.scores)))

    @property
    def grid_hw(self) -> tuple[int, int]:
        return (self.scores.shape[0], self.scores.shape[1])

    def rows(self, rows: slice) -> Tensor:
        return torch.einsum("kd,ijd->kij", self.text, self.scores[rows])

    def __call__(self, names: slice) -> Tensor:
        cosines = torch.einsum("kd,ijd->kij", self.text[names], self.scores)
        return upsample(cosines, self.size_hw, self.coverage_hw)


@dataclass(frozen=True, eq=False, kw_only=True)
class FullScores(ScoreMaps):
    """Scores that are made at the label map's own resolution, some names at a time.

    Attributes:
        make: (names, (H, W)) -> their maps (k, H, W), fp32.
        patches_hw: rows and columns of the patches that they come from, where they come from patches.
    """

    make: Callable[[slice, tuple[int, int]], Tensor]
    patches_hw: tuple[int, int] | None = None

    @property
    def grid_hw(self) -> tuple[int, int]:
        return self.size_hw if self.patches_hw is None else self.patches_hw

    def __call__(self, names: slice) -> Tensor:
        return self.make(names, self.size_hw)


# -------------------------------------------------------------------------------------------- segmenters


class Segmenter(Protocol):
    """Whatever turns pixels and words into score maps, one set per image.

    The pipeline, the evaluation, the command line and the page see this call alone, whether it is one pass of a
    network, a window, a diffusion model or a refinement around any of them.
    """

    @property
    def config(self) -> Any: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def networks(self) -> tuple[torch.nn.Module, ...]:
        """All that has weights, for fingerprints."""
        ...

    def encode_labels(
        self,
        labels: Any,
        templates: str | Iterable[str] | None = None,
        unlabelled: Iterable[Tensor] = (),
    ) -> Any:
        """What this segmenter wants of the words: text features, prompts, ...

        Opaque to the caller, but for `labels`, the `Labels` that it is about.

        Args:
            labels: a vocabulary; see `Labels.parse`.
            templates: prompt templates; None is the model's own.
            unlabelled: pixels (1, 3, H, W) of images like those to come. Read only by what learns from such images.
        """
        ...

    def __call__(self, pixel_values: Tensor, encoded: Any) -> list[ScoreMaps]:
        """The score maps of each image of a batch (B, 3, H, W), at the size of its pixels."""
        ...


class FromFeatures(EncoderWrapper):
    """The segmenter of a dense encoder: cosine of patch features and text features.

    Args:
        encoder: any dense encoder; `SparVisionModel` in one pass, a `SlidingWindow` around one, ...
        model: has the text tower, `get_text_features`.
        processor: its `SparProcessor`.
    """

    def __init__(self, encoder: Any, model: Any, processor: Any) -> None:
        self.encoder = encoder
        self.model = model
        self.processor = processor

    def __repr__(self) -> str:
        return f"FromFeatures({self.encoder!r})"

    @property
    def networks(self) -> tuple[torch.nn.Module, ...]:
        return tuple(part for part in (self.encoder, self.model) if isinstance(part, torch.nn.Module))

    def encode_labels(
        self, labels: Any, templates: str | Iterable[str] | None = None, unlabelled: Iterable[Tensor] = ()
    ) -> Any:
        """`SparProcessor.encode_labels`; the images are not read."""
        return self.processor.encode_labels(self.model, labels, templates)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, encoded: Any) -> list[ScoreMaps]:
        """See `Segmenter`; `encoded` are `LabelFeatures`."""
        outputs = self.encoder(pixel_values.to(self.device, self.dtype))
        return feature_scores(outputs, encoded.text_embeds, (pixel_values.shape[2], pixel_values.shape[3]))


def feature_scores(outputs: Any, text_embeds: Tensor, image_hw: tuple[int, int]) -> list[ScoreMaps]:
    """The score maps of each image of a dense encoder's output.

    Args:
        outputs: `patch_embeds` (B, h, w, D), `image_hw`, `extent_hw`, `normalized`.
        text_embeds: (K, D).
        image_hw: height and width of the image's pixels.

    Raises:
        ValueError: the features do not fit together, or hold NaN.
    """
    patch_embeds = outputs.patch_embeds
    text_embeds = text_embeds.to(patch_embeds.device)
    if patch_embeds.shape[-1] != text_embeds.shape[-1]:
        raise ValueError(
            f"patch features have {patch_embeds.shape[-1]} numbers and text features {text_embeds.shape[-1]}; "
            "they must come from the same model."
        )
    if not all(torch.stack(features.aminmax()).isfinite().all() for features in (patch_embeds, text_embeds)):
        raise ValueError("the features hold NaN or infinite numbers; run the model in fp32 or bf16, not in fp16.")
    text = F.normalize(text_embeds.float(), dim=-1)
    coverage_hw = coverage(outputs.image_hw, outputs.extent_hw)
    patches = patch_embeds.float() if outputs.normalized else F.normalize(patch_embeds.float(), dim=-1)
    return [
        FeatureScores(
            scores=single,
            text=text,
            size_hw=image_hw,
            num_names=len(text),
            device=text.device,
            coverage_hw=coverage_hw,
        )
        for single in patches
    ]


# --------------------------------------------------------------------------------------------- label maps


class Segmentation(NamedTuple):
    """What `segment` gives for one image.

    Attributes:
        labels: class ids (H, W), int32; `NO_CLASS` where no class is sure enough.
        scores: probability (H, W) of the best class at each pixel, fp32; None unless asked for.
    """

    labels: Tensor
    scores: Tensor | None


def label_map(maps: ScoreMaps, class_ids: Tensor, **thresholds: Any) -> Tensor:
    """The class of every pixel of one image; see `segment` for the arguments."""
    return segment(maps, class_ids, **thresholds).labels


def segment(
    maps: ScoreMaps,
    class_ids: Tensor,
    *,
    logit_scale: float | None = None,
    background_threshold: float | Sequence[float] | None = None,
    background_class: int | None = None,
    score_threshold: float | None = None,
    area_threshold: float | None = None,
    synonyms: str = "sum",
    with_scores: bool = False,
) -> Segmentation:
    """The class of every pixel of one image, and how sure it is (SPAR, arXiv 2604.02252; SCLIP's thresholds).

    The class with the best name wins. Its probability comes from the soft-max of `logit_scale * scores` over all
    names, those that only compete included; it is computed only where a threshold or the caller asks for it.

    Args:
        maps: the scores.
        class_ids: the class of each name (K); `NO_CLASS` for a name that only competes: pixels it wins have no class.
        logit_scale: factor on cosines before the soft-max; None is 40 (SPAR, SCLIP). Other scores bring their own.
        background_threshold: pixels whose best class has a lower probability become background; a number, or one
            for each class.
        background_class: what background pixels are called; None is `NO_CLASS`.
        score_threshold: pixels whose best score (for features: cosine) is lower become background. It works for a
            single class too, whose probability is always 1.
        area_threshold: foreground classes with at most this fraction of the foreground pixels are masked out, and
            the arg-max is taken again among the others.
        synonyms: probability of a class with several names: `sum` of theirs, or the highest (`max`, as SCLIP's
            evaluation has it, where a class is less sure the more names it has).
        with_scores: also return the probability of the best class at each pixel.

    Raises:
        ValueError: a threshold is out of range, or the ids do not fit the maps.
    """
    check_thresholds(logit_scale, background_threshold, area_threshold)
    one_of("synonyms", synonyms, SYNONYMS)
    if len(class_ids) != maps.num_names:
        raise ValueError(f"there are {len(class_ids)} class ids for {maps.num_names} names; give one for each.")
    device = maps.device
    class_ids = class_ids.to(device)
    background = NO_CLASS if background_class is None else background_class
    scale = scale_of(maps, logit_scale)
    ids = class_ids.masked_fill(class_ids == NO_CLASS, background).int()
    running = torch.ones_like(class_ids, dtype=torch.bool)

    labels = torch.empty(maps.size_hw, dtype=torch.int32, device=device)
    if area_threshold is not None:
        for tile, chunks in maps.tiles():
            labels[tile] = ids[_reduce(chunks, running).winner]
        running = _foreground_left(labels, class_ids, background, area_threshold)
        if not running.any():
            return Segmentation(labels.fill_(background), torch.ones(labels.shape) if with_scores else None)

    need_probability = background_threshold is not None or with_scores
    limits = _limits(background_threshold, class_ids)
    groups = None  # of each name: those of a group add up their probabilities
    if need_probability and synonyms == "sum" and len(class_ids.unique()) < len(class_ids):
        groups = class_ids.unique(return_inverse=True)[1]
    scores = torch.empty(maps.size_hw, device=device) if with_scores else None
    for tile, chunks in maps.tiles():
        found = _reduce(chunks, running, scale if need_probability else None, groups)
        labels[tile] = ids[found.winner]
        if score_threshold is not None:
            labels[tile].masked_fill_(found.best < score_threshold, background)
        if found.probability is not None:
            if limits is not None:
                labels[tile].masked_fill_(found.probability < limits[class_ids[found.winner]], background)
            if scores is not None:
                scores[tile] = found.probability
    for correct in maps.corrections:
        labels = correct(labels)
    return Segmentation(labels, scores)


def _limits(background_threshold: float | Sequence[float] | None, class_ids: Tensor) -> Tensor | None:
    """The least probability of each class, and last that of names that only compete."""
    if background_threshold is None:
        return None
    num_classes = int(class_ids.max()) + 1
    if not isinstance(background_threshold, Sequence):
        return torch.full((num_classes + 1,), background_threshold, device=class_ids.device)
    if len(background_threshold) != num_classes:
        raise ValueError(
            f"background_threshold has {len(background_threshold)} numbers for {num_classes} classes; give one for "
            "all, or one for each."
        )
    return torch.tensor([*background_threshold, 0.0], device=class_ids.device)


def class_probabilities(
    maps: ScoreMaps, class_ids: Tensor, logit_scale: float | None = None
) -> Iterator[tuple[Tile, Tensor]]:
    """The probability of every class at every pixel, tile by tile: (C, height, width), those of its names added up.

    Args:
        maps: the scores.
        class_ids: the class of each name (K), from 0 up, and `NO_CLASS` for names that only compete.
        logit_scale: see `segment`.
    """
    scale = scale_of(maps, logit_scale)
    class_ids = class_ids.to(maps.device)
    num_classes = int(class_ids.max()) + 1
    columns = class_ids.masked_fill(class_ids == NO_CLASS, num_classes)
    for tile, chunks in maps.tiles():
        shape = (tile[0].stop - tile[0].start, tile[1].stop - tile[1].start)
        sums = torch.zeros(num_classes + 1, *shape, device=maps.device)
        highest = torch.full(shape, -torch.inf, device=maps.device)
        for names, chunk in chunks:
            logits = chunk * scale
            top = torch.maximum(highest, logits.amax(0))
            sums *= (highest - top).exp()  # the soft-max in one pass: what is there is rescaled to the new maximum
            sums.index_add_(0, columns[names], (logits - top).exp())
            highest = top
        yield tile, sums[:num_classes] / sums.sum(0)


def top_classes(
    maps: ScoreMaps, class_ids: Tensor, count: int, logit_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The likeliest classes of each pixel, the first first: ids (k, H, W), int32, and probabilities (k, H, W), fp16.

    Args:
        maps, class_ids, logit_scale: see `class_probabilities`.
        count: how many classes; no more than there are.
    """
    count = min(count, int(class_ids.max()) + 1)
    ids = torch.empty(count, *maps.size_hw, dtype=torch.int32)
    probabilities = torch.empty(count, *maps.size_hw, dtype=torch.float16)
    for (rows, columns), tile in class_probabilities(maps, class_ids, logit_scale):
        best = tile.topk(count, dim=0)
        probabilities[:, rows, columns] = best.values.half().cpu()
        ids[:, rows, columns] = best.indices.int().cpu()
    return ids, probabilities


def scale_of(maps: ScoreMaps, logit_scale: float | None) -> float:
    """The factor on the scores before the soft-max: the maps' own, or for cosines the caller's."""
    if maps.logit_scale is not None:
        return maps.logit_scale
    return COSINE_SCALE if logit_scale is None else logit_scale


class _Best(NamedTuple):
    """Of each pixel of a tile: the highest score of the running names, its name, the probability of its class."""

    best: Tensor
    winner: Tensor
    probability: Tensor | None


def _reduce(chunks: Chunks, running: Tensor, scale: float | None = None, groups: Tensor | None = None) -> _Best:
    """The arg-max over names of a tile, chunk by chunk.

    Args:
        chunks: the scores of some names at a time, in order.
        running: which names (K) may win.
        scale: factor on the scores before the soft-max; None where no probability is asked for.
        groups: group of each name (K), from 0 up; the probability of the winner's group is that of its names added
            up. None: each name is alone.
    """
    best = winner = total = group_sum = torch.empty(0)
    unfinished: dict[int, Tensor] = {}  # groups that have names in later chunks too, and their sums so far
    everyone = bool(running.all())
    for names, scores in chunks:
        logits = scores if scale is None else scores * scale  # the arg-max doesn't need the scale
        first = names.start == 0
        if scale is not None:
            lse = logits.logsumexp(0)
            total = lse if first else torch.logaddexp(total, lse)
        contenders = logits if everyone else logits.masked_fill(~running[names, None, None], -torch.inf)
        top, index = _max_over_names(contenders)
        better = None if first else top > best
        if groups is not None:
            numbers, columns = groups[names].unique(return_inverse=True)
            sums = _group_logits(logits, columns, len(numbers))  # (G, height, width)
            for column, number in enumerate(numbers.tolist() if unfinished else ()):
                if number in unfinished:
                    sums[column] = torch.logaddexp(sums[column], unfinished[number])
                    group_sum = torch.where(groups[winner] == number, sums[column], group_sum)
            here = sums.gather(0, columns[index][None])[0]
            group_sum = here if better is None else torch.where(better, here, group_sum)
            for number in _with_more(groups, names.stop, numbers):
                unfinished[number] = sums[int((numbers == number).nonzero())]
        best = top if better is None else torch.where(better, top, best)
        winner = index if better is None else torch.where(better, index + names.start, winner)
    if scale is None:
        return _Best(best, winner, None)
    return _Best(best / scale, winner, ((best if groups is None else group_sum) - total).exp())


def _with_more(groups: Tensor, stop: int, numbers: Tensor) -> list[int]:
    """Those of some groups that have names from `stop` on."""
    rest = groups[stop:]
    return [] if len(rest) == 0 else numbers[torch.isin(numbers, rest)].tolist()


def _group_logits(logits: Tensor, columns: Tensor, count: int) -> Tensor:
    """Log-sum-exp over the names of each group, (k, h, w) -> (count, h, w); `columns` (k) from 0 to count - 1."""
    highest = logits.amax(0)
    sums = logits.new_zeros(count, *logits.shape[1:]).index_add_(0, columns, (logits - highest).exp())
    return sums.log_().add_(highest)


def _foreground_left(labels: Tensor, class_ids: Tensor, background: int, area_threshold: float) -> Tensor:
    """Which names (K) are in the running after foreground classes of too small an area are masked out."""
    area = torch.zeros(max(int(class_ids.max()), background) + 2, dtype=torch.int64, device=labels.device)
    for rows in labels.split(max(AREA_PIXELS // labels.shape[1], 1)):  # bincount takes 8 bytes a pixel
        area += torch.bincount(rows.flatten().long().add_(1), minlength=len(area))
    area = area[1:]
    is_foreground = torch.arange(len(area), device=area.device) != background
    masked_out = is_foreground & (area <= area_threshold * area[is_foreground].sum())
    return ~masked_out[class_ids.clamp(min=0)] | (class_ids == NO_CLASS)


def _runs(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _max_over_names(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`logits.max(0)` of (K, H, W), but faster on a CPU, whose arg-max over a leading axis is not vectorised."""
    if len(logits) < 4 * GROUP_NAMES:
        return logits.max(0)
    groups = F.pad(logits, (0, 0, 0, 0, 0, -len(logits) % GROUP_NAMES), value=-torch.inf)
    groups = groups.unflatten(0, (-1, GROUP_NAMES))  # (groups, GROUP_NAMES, H, W)
    best, group = groups.amax(1).max(0)
    members = torch.take_along_dim(groups, group[None, None], dim=0)[0]  # (GROUP_NAMES, H, W)
    return best, group * GROUP_NAMES + members.max(0).indices
