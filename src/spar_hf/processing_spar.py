"""SparProcessor: images and words in, label maps out. Prompts, text features, post-processing."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import logging

from .prompts_spar import IMAGENET_TEMPLATES, Labels, check_templates, fill_template
from .segmentation_spar import feature_scores, label_map

__all__ = ["LabelFeatures", "Labels", "SparProcessor"]

logger = logging.get_logger(__name__)

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
QUIET_BATCHES = 8  # encoding that takes more batches than this shows a progress bar


@dataclass(frozen=True, eq=False)
class LabelFeatures:
    """A vocabulary and its text features.

    Attributes:
        labels: The classes and their names.
        text_embeds: One L2-normalised row per name (K, D), fp32.
    """

    labels: Labels
    text_embeds: Tensor

    @property
    def class_ids(self) -> Tensor:
        """The class of each name (K), on the features' device."""
        return torch.tensor(self.labels.class_ids, device=self.text_embeds.device)


class SparProcessor(ProcessorMixin):
    """An image processor, a tokenizer and the prompts of a model.

    Args:
        image_processor: A `SparImageProcessor`.
        tokenizer: The text tower's tokenizer.
        templates: Prompt templates, each with one `{}`; None is CLIP's 80 for ImageNet.
        text_padding: `"longest"` for a causal text tower (CLIP), `"max_length"` for one trained at full length
            (SigLIP), which reads the padding too: right of the words, and without a mask.
        max_length: Tokens the text tower reads; None is the tokenizer's own limit.
        lowercase: Lower the text's case first (SigLIP2; CLIP's tokenizer does so itself).
        strip_punctuation: Take ASCII punctuation out first, underscores as spaces, each run of spaces as one
            (big_vision's canonical text; RADIO's SigLIP2 heads).
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        templates: Sequence[str] | None = None,
        text_padding: str = "longest",
        max_length: int | None = None,
        lowercase: bool = False,
        strip_punctuation: bool = False,
    ) -> None:
        if text_padding not in ("longest", "max_length"):
            raise ValueError(f"text_padding is {text_padding!r}; allowed are 'longest' and 'max_length'.")
        super().__init__(image_processor, tokenizer)
        self.templates = None if templates is None else list(check_templates(templates))
        self.text_padding = text_padding
        self.max_length = max_length
        self.lowercase = lowercase
        self.strip_punctuation = strip_punctuation

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Inputs of `SparModel`.

        Args:
            images: See `SparImageProcessor.preprocess`.
            text: One text or several, taken as they are (prompts for labels are `encode_labels`' work).
            return_tensors: `"pt"` or `"np"`.
            **kwargs: `padding`, `truncation` and `max_length` go to the tokenizer, the rest to the image processor.

        Returns:
            `pixel_values` and `original_sizes` for images; `input_ids` and what else the tokenizer gives for text.

        Raises:
            ValueError: Neither images nor text, or an unknown argument.
        """
        if images is None and text is None:
            raise ValueError("there is nothing to process; pass images, text or both.")
        text_kwargs = {key: kwargs.pop(key) for key in ("padding", "truncation", "max_length") if key in kwargs}
        if images is None and kwargs:
            raise ValueError(f"{', '.join(kwargs)} only have a meaning with images, and there are none.")
        inputs: dict[str, Any] = {}
        if text is not None:
            inputs.update(self._tokenize(text, return_tensors=return_tensors, **text_kwargs))
        if images is not None:
            inputs.update(self.image_processor(images, return_tensors=return_tensors, **kwargs))
        return BatchFeature(inputs)

    @torch.no_grad()
    def encode_labels(
        self,
        model: Any,
        labels: Any,
        templates: str | Iterable[str] | None = None,
        batch_size: int = 256,
    ) -> LabelFeatures:
        """One vector per name: the mean over templates of L2-normalised text features, L2-normalised (SPAR, CLIP).

        Nothing is cached, since no cache could know what an adapter, a hook or an optimiser does to the text tower.
        Keep the result for as long as the model stays as it is: whatever takes labels takes it too.

        Args:
            model: Has `get_text_features` and `config.text_config`, as `SparModel`.
            labels: A vocabulary; see `Labels.parse`. `LabelFeatures` are given back as they are.
            templates: Prompt templates for this call; None is the processor's own. A class with templates of its own
                keeps them.
            batch_size: Prompts encoded at once; it bounds the memory.

        Raises:
            ValueError: Labels or templates are malformed.
        """
        if isinstance(labels, LabelFeatures):
            return labels
        labels = Labels.parse(labels)
        templates = check_templates(templates or self.templates or IMAGENET_TEMPLATES)
        return LabelFeatures(labels, self._encode_names(model, labels, templates, batch_size))

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        label_features: LabelFeatures | Tensor | None = None,
        **thresholds: Any,
    ) -> list[Tensor]:
        """Label maps from patch features.

        Args:
            outputs: A dense encoder's: `patch_embeds` (B, h, w, D), `image_hw`, `extent_hw`.
            target_sizes: Height and width of each label map, such as the `original_sizes` of the processor's output;
                None is the size of the pixels that the encoder saw.
            label_features: From `encode_labels`; or text features (K, D), each its own class; None is
                `outputs.text_embeds`.
            **thresholds: See `segmentation_spar.segment`: `logit_scale`, `background_threshold`, `background_class`,
                `score_threshold`, `area_threshold`, `synonyms`.

        Returns:
            One label map (H, W) of class ids, int32, per image; -1 where no class is sure enough.

        Raises:
            ValueError: Sizes that don't fit the batch, a threshold or scale out of range, features that hold NaN.
        """
        text_embeds, class_ids = self._text_side(outputs, label_features, outputs.patch_embeds.device)
        sizes_hw = _sizes_hw(outputs, target_sizes)
        return [
            label_map(maps.at(size_hw), class_ids, **thresholds)
            for maps, size_hw in zip(feature_scores(outputs, text_embeds, sizes_hw[0]), sizes_hw, strict=True)
        ]

    def _encode_names(self, model: Any, labels: Labels, templates: tuple[str, ...], batch_size: int) -> Tensor:
        """(K, D): prompts go through the text tower in batches, and each adds to the row of its name."""
        limit = min(self._token_limit(), model.config.text_config.max_position_embeddings)
        of_name = labels.templates_of(templates)
        self._warn_of_cut_labels(labels.names, [max(own, key=len) for own in of_name], limit)
        device = next(model.parameters()).device
        sums = torch.empty(0)
        # The first prompt of each name, counted through; prompts are written when their turn comes.
        firsts = torch.tensor([0, *(len(own) for own in of_name)]).cumsum(0)
        num_prompts = int(firsts[-1])
        starts = range(0, num_prompts, batch_size)
        for start in logging.tqdm(starts, desc="Encoding labels", disable=len(starts) <= QUIET_BATCHES, leave=False):
            numbers = torch.arange(start, min(start + batch_size, num_prompts))
            name_of = torch.searchsorted(firsts, numbers, right=True) - 1
            prompts = [
                fill_template(of_name[name][number], labels.names[name])
                for name, number in zip(name_of.tolist(), (numbers - firsts[name_of]).tolist(), strict=True)
            ]
            tokens = self._tokenize(prompts, max_length=limit).to(device)
            embeds = F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1)
            if start == 0:
                sums = embeds.new_zeros(len(labels.names), embeds.shape[-1])
            sums.index_add_(0, name_of.to(embeds.device), embeds)
        return F.normalize(sums, dim=-1)

    def _tokenize(self, text: str | Sequence[str], **kwargs: Any) -> Any:
        texts = [text] if isinstance(text, str) else list(text)
        defaults = {
            "padding": self.text_padding,
            "truncation": True,
            "max_length": self._token_limit(),
            "return_tensors": "pt",
        }
        if self.text_padding == "max_length":
            defaults |= {"return_attention_mask": False, "padding_side": "right"}
        return self.tokenizer([self._written(text) for text in texts], **{**defaults, **kwargs})

    def _written(self, text: str) -> str:
        """A text as the text tower learned to read it."""
        if self.strip_punctuation:
            text = " ".join(text.replace("_", " ").translate(NO_PUNCTUATION).split())
        return text.lower() if self.lowercase else text

    def _token_limit(self) -> int:
        # transformers writes 1e30 where a tokenizer has no limit.
        return min(self.tokenizer.model_max_length, 10**5) if self.max_length is None else self.max_length

    def _warn_of_cut_labels(self, names: Sequence[str], templates: Sequence[str], limit: int) -> None:
        """Says which prompts are longer than the text tower reads, and what of them is lost."""
        room = limit - self.tokenizer.num_special_tokens_to_add()
        filled = (fill_template(template, name) for template, name in zip(templates, names, strict=True))
        prompts = [self._written(prompt) for prompt in filled]
        ids = self.tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
        too_long = [index for index, tokens in enumerate(ids) if len(tokens) > room]
        for index in too_long[:3]:
            lost = self.tokenizer.decode(ids[index][room:])
            logger.warning(
                f"label {_short(names[index])!r} is {len(ids[index])} tokens long in its prompt and the text tower "
                f"reads {room}; cut off: {_short(lost)!r}."
            )
        if len(too_long) > 3:
            logger.warning(f"{len(too_long) - 3} more labels are too long and were cut off.")

    def _text_side(
        self, outputs: Any, label_features: LabelFeatures | Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Text features (K, D) and the class of each (K)."""
        if isinstance(label_features, LabelFeatures):
            return label_features.text_embeds.to(device), label_features.class_ids.to(device)
        text_embeds = getattr(outputs, "text_embeds", None) if label_features is None else label_features
        if text_embeds is None:
            raise ValueError("there are no text features; pass label_features, which encode_labels makes.")
        return text_embeds.to(device), torch.arange(len(text_embeds), device=device)


def _sizes_hw(outputs: Any, target_sizes: Sequence[tuple[int, int]] | Tensor | None) -> list[tuple[int, int]]:
    batch = len(outputs.patch_embeds)
    if target_sizes is None:
        if outputs.image_hw is None:
            raise ValueError(
                "the encoder doesn't say its image's size; pass target_sizes, one (height, width) an image."
            )
        return [tuple(outputs.image_hw)] * batch
    sizes = torch.as_tensor(target_sizes)
    if sizes.shape != (batch, 2) or bool((sizes < 1).any()):
        raise ValueError(
            f"target_sizes is {sizes.tolist()}; one (height, width) of at least one pixel is needed for each of "
            f"{batch} images."
        )
    return [(int(height), int(width)) for height, width in sizes.tolist()]


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
