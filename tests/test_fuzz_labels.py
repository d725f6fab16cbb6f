"""Any vocabulary is read whole, or refused in one line; drawn by hypothesis, the long runs with -m fuzz."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import pipeline

import spar_hf
from spar_hf import Labels
from spar_hf.prompts_spar import MAX_CHARACTERS, MAX_LABELS

# Control characters and escapes, surrogates, right-to-left, marks, emoji of several code points, other letters' cases,
# every separator and bracket that some parser cares about, and what a tokenizer might take for its own.
HOSTILE = (
    "\x00", "\x07", "\x1b[31m", "\r", "\n", "\t", "\x85", "\u2028", "\xa0", "\u200b", "\ufeff", "\ud800", "\udfff",
    "\udcff", "\u202e", "\u2066", "שלום", "عربي", "e\u0301", "\u0301", "👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "𝔘",
    "ß", "SS", "İ", "ı", "ﬁ", "K", ";", ",", ";;", ", ,", "{}", "{", "}", "{0}", "{name}", "%s", "\\", "'", '"', "<b>",
    "&amp;", "../x", "$(x)", "`", "<|endoftext|>", "<|startoftext|>", "</w>", "[PAD]", "car", "Car", "CAR ", " car",
    "a" * 70, "天空", "é",
)  # fmt: skip


def words() -> st.SearchStrategy[str]:
    anything = st.characters()  # surrogates too
    pieces = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(anything, max_size=3)), max_size=5).map("".join)
    long = st.builds(str.__mul__, st.sampled_from(HOSTILE), st.integers(500, 5000))
    return st.one_of(pieces, pieces, st.text(anything, max_size=30), st.sampled_from(("car", "road", "sky")), long)


def entries() -> st.SearchStrategy[Any]:
    names = st.lists(words(), max_size=4)
    templates = st.lists(st.one_of(words(), words().map(lambda word: word + "{}")), max_size=3)
    fields = st.fixed_dictionaries(
        {}, optional={"name": words(), "names": names, "templates": templates, "colour": words()}
    )
    numbers = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=5))
    odd = st.one_of(
        numbers, st.sets(words(), max_size=3), st.lists(names, max_size=2), st.dictionaries(words(), names)
    )
    return st.one_of(words(), words(), words(), names, names.map(tuple), fields, fields, odd)


def vocabularies() -> st.SearchStrategy[Any]:
    few = st.lists(entries(), max_size=6)
    strings = st.one_of(words(), st.lists(words(), max_size=6).map(";".join))
    mappings = st.dictionaries(words(), st.one_of(words(), st.lists(words(), max_size=3), entries()), max_size=5)
    odd = st.one_of(st.none(), st.integers(), st.binary(max_size=9), st.sets(words(), max_size=4), st.builds(object))
    good = st.lists(st.sampled_from(("car", "road", "sky", "tree, bush", "天空", "🚗")), max_size=6, unique=True)
    return st.one_of(good, strings, st.lists(words(), max_size=6), few, few, few.map(iter), mappings, odd)


def one_line(error: Exception) -> bool:
    """A message that a terminal, a log file and a page can show as they are."""
    message = str(error)
    return (
        0 < len(message) < 1500 + MAX_CHARACTERS and len(message.splitlines()) == 1 and bool(message.encode("utf-8"))
    )


def read(vocabulary: Any) -> Labels | None:
    """The labels, or None where they were refused as they should be."""
    try:
        return Labels.parse(vocabulary)
    except ValueError as error:
        assert one_line(error), ascii(error)
        return None


def check_labels(labels: Labels) -> None:
    """What every vocabulary that was accepted must be."""
    assert len(labels) >= 1 and len(labels.names) == len(labels.class_ids) <= MAX_LABELS
    assert len(set(labels.class_names)) == len(labels.class_names) == len(labels)
    for name in (*labels.names, *labels.class_names):
        assert 0 < len(name) <= MAX_CHARACTERS and name == " ".join(name.split()) and name.encode("utf-8")
    folded = [name.casefold() for name in labels.names]
    assert len(set(folded)) == len(folded)  # a name means one class
    for templates in labels.class_templates:
        assert templates is None or (templates and all(template.count("{}") == 1 for template in templates))
    # What was read can be written and read again.
    own = labels.class_templates or (None,) * len(labels)
    written = [
        {"name": title, "names": list(names), "templates": list(templates or ())}
        for title, names, templates in zip(labels.class_names, labels.classes, own, strict=True)
    ]
    again = Labels.parse(json.loads(json.dumps(written)))
    assert (again.classes, again.class_names, again.class_templates) == (
        labels.classes,
        labels.class_names,
        labels.class_templates,
    )


@pytest.fixture(scope="module")
def segment() -> Callable[[Any], Any]:
    """`segment(labels)`: a picture of 48 x 32 pixels by the shipped checkpoint, with one prompt a name."""
    model, processor = spar_hf.load("tiny")
    segment = pipeline("open-vocabulary-segmentation", model=model, processor=processor)
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)

    def run(labels: Any) -> Any:
        encoded = processor.encode_labels(model, labels, templates=("{}",))
        assert encoded.text_embeds.shape == (len(labels.names), model.config.projection_dim)
        lengths = encoded.text_embeds.norm(dim=-1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
        return segment(picture, candidate_labels=encoded, do_resize=False)

    return run


def check_vocabulary(vocabulary: Any, segment: Callable[[Any], Any]) -> bool:
    labels = read(vocabulary)
    if labels is None:
        return False
    check_labels(labels)
    result = segment(labels)
    found = result["segmentation"]
    assert found.shape == (32, 48) and set(np.unique(found)) <= set(range(-1, len(labels)))
    assert [entry["label"] for entry in result["segments"]] == [
        labels.class_names[e["id"]] for e in result["segments"]
    ]
    assert abs(sum(entry["area_fraction"] for entry in result["segments"]) - 1) < 1e-6
    assert json.dumps(result.to_dict(), ensure_ascii=False).encode("utf-8")
    return True


def check_file(suffix: str, content: bytes, folder: Path) -> bool:
    path = folder / f"labels{suffix}"
    path.write_bytes(content)
    try:
        labels = Labels.read(path)
    except ValueError as error:
        assert one_line(error) and str(path) in str(error), ascii(error)
        return False
    check_labels(labels)
    return True


def contents() -> st.SearchStrategy[bytes]:
    """Files of labels: bytes, text, JSON that holds anything, tables."""
    json_values = st.recursive(
        st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=8), st.sampled_from(("car", "road"))),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.sampled_from(("name", "names", "templates", "car", "")), inner, max_size=3),
        ),
        max_leaves=8,
    )
    text = st.lists(words(), max_size=6).map("\n".join)
    rows = st.lists(st.lists(st.sampled_from((*HOSTILE, "name", "names")), max_size=4).map(",".join), max_size=5)
    table = rows.map(lambda lines: "\n".join(["name,names,templates", *lines]))
    nested = st.integers(1, 100_000).map(lambda depth: "[" * depth)
    written = st.one_of(text, json_values.map(json.dumps), table, nested).map(
        lambda t: t.encode("utf-8", "surrogatepass")
    )
    return st.one_of(st.binary(max_size=60), written, written, written)


def draw(examples: int, check: Callable[..., bool], **strategies: st.SearchStrategy[Any]) -> Counter[bool]:
    """Runs a check on so many drawn inputs, the same each time; how many were accepted and refused."""
    seen: Counter[bool] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(**strategies)
    def run(**drawn: Any) -> None:
        seen[check(**drawn)] += 1

    run()
    return seen


@pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=pytest.mark.fuzz)])
def test_a_vocabulary_is_read_or_refused_in_one_line(examples, segment):
    seen = draw(examples, partial(check_vocabulary, segment=segment), vocabulary=vocabularies())
    print(f"{seen[True]} vocabularies read, {seen[False]} refused")
    assert min(seen[True], seen[False]) > examples / 5


@pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_a_file_is_read_or_refused_in_one_line(examples, tmp_path):
    suffixes = st.sampled_from((".txt", ".json", ".csv", ""))
    seen = draw(examples, partial(check_file, folder=tmp_path), suffix=suffixes, content=contents())
    print(f"{seen[True]} files read, {seen[False]} refused")
    assert min(seen[True], seen[False]) > examples / 10


def nested(depth: int) -> list:
    labels: list = []
    for _ in range(depth):
        labels = [labels]
    return labels


@pytest.mark.parametrize(
    "vocabulary",
    [
        nested(100_000),
        [nested(100_000)],
        {"car": nested(100_000)},
        ["a" * 30_000_000],
        [["a" * 30_000_000]],
        "a," * 1_000_000,
        ("name" for _ in iter(int, 1)),  # without end
        [{"name": "car", "names": [b"car"] * 1_000_000}],
    ],
    ids=["deep", "deep class", "deep names", "long", "long name", "many synonyms", "endless", "many bytes"],
)
def test_what_is_too_much_is_refused(vocabulary):
    assert read(vocabulary) is None
