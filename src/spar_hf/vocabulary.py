"""A vocabulary in a file with its text features, so that thousands of classes start at once. Imports no PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from spar_onnx.folder import TEXT, file_digest, graph_file

from .files import digest, weights_digest, whole_files
from .prompts_spar import IMAGENET_TEMPLATES, Labels

LAYOUT = 1  # of the file; another number is another spar-hf's


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Classes, and what a text tower made of their names.

    Attributes:
        labels: the classes.
        text_embeds: one row of length 1 per name (K, D), fp32.
        text_side: fingerprint of all that made the rows; see `text_side_of`.
        model: what that model was called.
    """

    labels: Labels
    text_embeds: np.ndarray
    text_side: str
    model: str

    def save(self, path: Path) -> None:
        """Writes the file, whole, with a check sum."""
        from safetensors.numpy import save_file

        record = {name: getattr(self, name) for name in ("text_side", "model")}
        text = json.dumps({"layout": LAYOUT, "labels": asdict(self.labels), **record}, ensure_ascii=False)
        embeds = np.ascontiguousarray(self.text_embeds, np.float32)
        metadata = {"vocabulary": text, "digest": digest([text.encode(), embeds.tobytes()])}
        with whole_files(path) as (draft,):
            save_file({"text_embeds": embeds}, draft, metadata=metadata)

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """What `save` wrote.

        Raises:
            ValueError: the file is broken or another one; the message names it.
            OSError: there is none.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        remedy = "make it again with 'spar labels --save'"
        try:
            with safe_open(path, "np") as file:
                metadata, embeds = file.metadata() or {}, file.get_tensor("text_embeds")
        except SafetensorError as error:
            raise ValueError(f"{path} is no vocabulary, or a broken one ({error}); {remedy}.") from error
        if not {"vocabulary", "digest"} <= metadata.keys():
            raise ValueError(f"{path} is no vocabulary; {remedy}.")
        if digest([metadata["vocabulary"].encode(), embeds.tobytes()]) != metadata["digest"]:
            raise ValueError(f"{path} is broken: its check sum differs; {remedy}.")
        record = json.loads(metadata["vocabulary"])
        if record["layout"] != LAYOUT:
            raise ValueError(f"{path} has layout {record['layout']}, and this spar-hf reads {LAYOUT}; {remedy}.")
        labels = Labels(**{name: _as_tuples(value) for name, value in record["labels"].items()})
        return cls(labels, embeds, record["text_side"], record["model"])

    def check_made_by(self, text_side: str, path: str | Path, model: str) -> None:
        """Raises a `ValueError` where another text side than a model's made it."""
        if self.text_side != text_side:
            raise ValueError(
                f"{path} was made with {self.model}, and {model} reads words otherwise: its text tower, tokenizer, "
                f"templates or --dtype differ. Make it again: spar labels --labels ... --model {model} --save {path}"
            )

    def embeds_of(self, labels: Labels, encode: Callable[[Labels], np.ndarray]) -> np.ndarray:
        """Text features of its classes, with names that compete; only these are encoded.

        Args:
            labels: its own, but for negatives, thresholds and the like.
            encode: labels -> their text features (K, D).
        """
        if not labels.negatives:
            return self.text_embeds
        return np.concatenate([self.text_embeds, encode(Labels(tuple((name,) for name in labels.negatives)))])


def is_vocabulary(path: str | Path) -> bool:
    """Whether a file of labels is one with text features, by its suffix."""
    return Path(path).suffix.lower() == ".safetensors"


def text_side_of(model: Any, processor: Any) -> str:
    """Fingerprint of all that text features depend on: the text tower, the tokenizer, how words are put to it.

    Args:
        model: a whole model.
        processor: its `SparProcessor`.
    """
    towers = [part for name, part in model.named_children() if name != "vision_model"]
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    words = {key: value for key, value in words.items() if key not in ("padding", "truncation")}  # set by each call
    settings = {
        name: getattr(processor, name) for name in ("text_padding", "max_length", "lowercase", "strip_punctuation")
    }
    return _fingerprint(weights_digest(*towers), words, settings, processor.templates, tokenizer.model_max_length)


def text_side_of_export(pipeline: Any) -> str:
    """The same of an exported model, an `OnnxPipeline`."""
    exported = pipeline.exported
    graph = exported.record["files"][graph_file(TEXT, pipeline.dtype)]
    return _fingerprint(
        graph, file_digest(exported.folder / "tokenizer.json"), exported.record["text"], pipeline.templates
    )


def _fingerprint(*parts: Any) -> str:
    return digest([json.dumps([*parts, IMAGENET_TEMPLATES], sort_keys=True).encode()])


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(part) for part in value) if isinstance(value, list) else value
