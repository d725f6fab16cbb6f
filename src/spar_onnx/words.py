"""Words to token ids to text features, with the `tokenizers` package and a session of the text tower."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .library import library

logger = logging.getLogger(__name__)
BATCH = 64  # prompts encoded at once


@dataclass(frozen=True)
class TextSide:
    """How the text tower reads.

    Attributes:
        max_tokens: of a text; more is cut off.
        pad_id, pad_token: what fills up shorter texts, right of the words.
        fills: texts are filled up to `max_tokens`, which the tower was trained with, and not to the longest.
        strip_punctuation, lowercase: what becomes of the text first.
    """

    max_tokens: int
    pad_id: int
    pad_token: str
    fills: bool
    strip_punctuation: bool
    lowercase: bool


class WordReader:
    """The tokenizer of an exported folder: texts to ids (K, length), as `SparProcessor` makes them.

    Raises:
        ValueError: the file is no tokenizer.
    """

    def __init__(self, path: Path, side: TextSide) -> None:
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no narrower class
            raise ValueError(f"{path} cannot be read ({error}); export the model again with 'spar export'.") from error
        self.side = side

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        side = self.side
        length = side.max_tokens if side.fills else None
        self.tokenizer.enable_truncation(side.max_tokens)
        self.tokenizer.enable_padding(pad_id=side.pad_id, pad_token=side.pad_token, length=length)
        return np.array([encoding.ids for encoding in self._encode(texts, True)], dtype=np.int64)

    def warn_of_cut(self, names: Sequence[str], prompts: Sequence[str]) -> None:
        """Says which prompts are longer than the text tower reads, and what of them is lost."""
        room = self.side.max_tokens - self.tokenizer.num_special_tokens_to_add(False)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        ids = [encoding.ids for encoding in self._encode(prompts, False)]
        too_long = [index for index, tokens in enumerate(ids) if len(tokens) > room]
        for index in too_long[:3]:
            # `</w>` ends a word of CLIP's; transformers' decoder makes spaces of it.
            lost = self.tokenizer.decode(ids[index][room:]).replace("</w>", " ").strip()
            logger.warning(
                f"label {_short(names[index])!r} is {len(ids[index])} tokens long in its prompt and the text tower "
                f"reads {room}; cut off: {_short(lost)!r}."
            )
        if len(too_long) > 3:
            logger.warning(f"{len(too_long) - 3} more labels are too long and were cut off.")

    def _encode(self, texts: Sequence[str], special: bool) -> list[Any]:
        as_read, side = library("prompts_spar").as_read, self.side
        written = [as_read(text, side.strip_punctuation, side.lowercase) for text in texts]
        return self.tokenizer.encode_batch(written, add_special_tokens=special)


def encode_names(labels: Any, templates: tuple[str, ...], reader: WordReader, session: Any) -> np.ndarray:
    """One vector a name, (K, D): the mean over templates of unit text features, at unit length.

    The rule of `SparProcessor.encode_labels`.

    Args:
        labels: `Labels`.
        templates: for the classes that have none of their own.
        reader: the tokenizer.
        session: the text tower.
    """
    fill = library("prompts_spar").fill_template
    of_name = labels.templates_of(templates)
    longest = [fill(max(own, key=len), name) for name, own in zip(labels.names, of_name, strict=True)]
    reader.warn_of_cut(labels.names, longest)

    def prompts() -> Iterator[tuple[int, str]]:
        for index, (name, own) in enumerate(zip(labels.names, of_name, strict=True)):
            for template in own:
                yield index, fill(template, name)

    everything = list(prompts())
    sums: Any = 0
    for start in range(0, len(everything), BATCH):
        indices, texts = zip(*everything[start : start + BATCH], strict=True)
        (embeds,) = session.run(["text_embeds"], {"input_ids": reader(texts)})
        if start == 0:
            sums = np.zeros((len(labels.names), embeds.shape[1]), np.float32)
        np.add.at(sums, list(indices), unit(embeds))
    return unit(sums)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., D) at length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
