"""Labels: classes with their names, and the prompt templates that turn a name into sentences for the text tower."""

from __future__ import annotations

import csv
import json
import logging
import string
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .classes_spar import (
    MAX_CHARACTERS,
    ClassEntry,
    check_ids,
    check_templates,
    check_threshold,
    check_unique,
    clean_name,
    read_class,
    read_row,
)
from .names_spar import shown, unknown

__all__ = [
    "EVERYDAY_WORDS",
    "IMAGENET_TEMPLATES",
    "MAX_CHARACTERS",
    "MAX_LABELS",
    "Labels",
    "as_read",
    "check_templates",
    "fill_template",
]

logger = logging.getLogger(__name__)

# Ten thousand names are the largest vocabularies in use (ImageNet-21k filtered, LVIS and Objects365 together); more
# is nearly always a file passed by mistake. `Labels.parse(..., max_labels=N)` raises the limit.
MAX_LABELS = 10_000
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

# What pictures mostly show. Names that compete with a single class, which has nothing else to lose against.
EVERYDAY_WORDS = (
    "person", "animal", "building", "tree", "grass", "plant", "flower", "sky", "cloud", "water", "road", "pavement",
    "ground", "sand", "snow", "rock", "mountain", "wall", "floor", "ceiling", "window", "door", "furniture", "fabric",
    "vehicle", "food", "paper", "sign", "tool", "light",
)  # fmt: skip

# The 80 templates of CLIP's ImageNet prompt engineering (MIT licence), as used by SPAR and the SCLIP family.
# https://github.com/openai/CLIP/blob/main/notebooks/Prompt_Engineering_for_ImageNet.ipynb
IMAGENET_TEMPLATES = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)


@dataclass(frozen=True)
class Labels:
    """A vocabulary: classes in order, each with one or more names (synonyms).

    Attributes:
        classes: The names of each class, as the text tower reads them; the index of a class is its id in a label map.
        titles: What each class is called in results; empty where that is its first name.
        class_templates: Prompt templates of each class, None where it has the common ones; empty where all have.
        negatives: Names that compete with the classes and are never reported: what they win has no class.
        background: The id of the class that is the background, if there is one.
        definitions: A text about each class, None where there is none; empty where no class has one. Only what asks
            for them reads them.
        ids: The id of each class in files of results; empty where that is its index, as it is in label maps in memory.
        colours: The colour of each class, None where it has none of its own; empty where no class has one.
        thresholds: The least probability of each class, None where the common one holds; empty where it holds for all.
    """

    classes: tuple[tuple[str, ...], ...]
    titles: tuple[str, ...] = ()
    class_templates: tuple[tuple[str, ...] | None, ...] = ()
    negatives: tuple[str, ...] = ()
    background: int | None = None
    definitions: tuple[str | None, ...] = ()
    ids: tuple[int, ...] = ()
    colours: tuple[tuple[int, int, int] | None, ...] = ()
    thresholds: tuple[float | None, ...] = ()

    @classmethod
    def parse(cls, labels: Any, max_labels: int = MAX_LABELS) -> Labels:
        """Reads a vocabulary from one of these forms.

        Args:
            labels: `"road; car, automobile; sky"` (classes split by `;`, synonyms by `,`),
                `["road", "car, automobile"]` (one string a class), `[["road"], ["car", "automobile"]]` (names taken as
                they are, so that a name may hold a comma), `{"car": ["a red car", "automobile"]}` (what a class is
                called, and its names), or a list that holds mappings with `name` and, as wanted, `names` (all that
                the text tower reads) or `synonyms` (further ones), `id`, `colour`, `threshold` (the least
                probability), `templates` and `definition`.
            max_labels: Most names that are accepted.

        Raises:
            ValueError: No labels, an empty label, a name that occurs twice, more than `max_labels` names, or another
                form, such as a set, whose order would be a matter of chance.
        """
        if isinstance(labels, Labels):
            return labels
        if isinstance(labels, str):
            labels = labels.split(";") if labels.strip() else []
        elif isinstance(labels, Mapping):
            labels = [{"name": name, "names": names} for name, names in labels.items()]
        elif isinstance(labels, Set | bytes) or not isinstance(labels, Iterable):
            raise ValueError(
                f"labels are a {type(labels).__name__}; allowed are a string such as 'road; car, automobile; sky', "
                "a list, or a mapping of class names to names. Pass one of these."
            )
        entries: list[ClassEntry] = []
        num_names = 0
        for number, entry in enumerate(labels, start=1):
            entries.append(read_class(entry, number))
            num_names += len(entries[-1].names)
            if num_names > max_labels:
                raise ValueError(
                    f"there are over {max_labels} labels; at most {max_labels} are allowed. "
                    "Pass fewer, or raise max_labels if this is meant."
                )
        if not entries:
            raise ValueError("there are no labels; at least one is needed. Pass some, such as 'road; car; sky'.")
        classes = tuple(entry.names for entry in entries)
        check_unique(classes)
        if len(classes) == 1 and num_names > 1 and entries[0].title is None:
            # Commas between classes are the likely slip, and its result (one class everywhere) looks like a bug.
            logger.warning(
                "the labels make one class with %d synonyms (%s); separate classes with ';'.",
                num_names,
                ", ".join(classes[0][:4]) + (", ..." if num_names > 4 else ""),
            )
        titles = tuple(entry.names[0] if entry.title is None else entry.title for entry in entries)
        if len(set(titles)) < len(titles):
            twice = next(title for title in titles if titles.count(title) > 1)
            raise ValueError(f"two classes are called {shown(twice)}; give each a name of its own.")
        columns = ClassEntry(*zip(*entries, strict=True))
        check_ids(columns.id)

        def given(values: Any) -> Any:
            return values if any(value is not None for value in values) else ()

        return cls(
            classes,
            titles if given(columns.title) else (),
            given(columns.templates),
            definitions=given(columns.definition),
            ids=given(columns.id),
            colours=given(columns.colour),
            thresholds=given(columns.threshold),
        )

    @classmethod
    def read(cls, path: str | Path, max_labels: int = MAX_LABELS) -> Labels:
        """A vocabulary from a file, UTF-8.

        `.json` holds a form of `parse`. `.csv` has a header with `name` and, as wanted, `id`, `names` or `synonyms`
        (split by `,`), `colour`, `threshold`, `templates` (split by `;`) and `definition`. Any other file has a class
        a line, synonyms split by `,`, `#` begins a comment.

        Raises:
            ValueError: The file is no such thing; the message names it.
            OSError: It cannot be read.
        """
        path = Path(path)
        if path.stat().st_size > max_labels * MAX_CHARACTERS:
            raise ValueError(f"{path} has {path.stat().st_size / 1e6:.0f} MB; a file of labels is far smaller.")
        try:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix.lower() == ".json":
                labels = json.loads(text)
            elif path.suffix.lower() == ".csv":
                labels = [read_row(row) for row in csv.DictReader(text.splitlines())]
            else:
                labels = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
                labels = [part for line in labels for part in line.strip().strip(";").split(";")]
            return cls.parse(labels, max_labels)
        except (ValueError, csv.Error, RecursionError) as error:  # bad JSON and bad UTF-8 are ValueErrors
            raise ValueError(f"{path} is no file of labels: {error}") from error

    def against(self, names: Iterable[str]) -> Labels:
        """The same classes, with names that compete and are never reported. Names of a class are left out.

        Raises:
            ValueError: A name is empty or malformed.
        """
        taken = {name.casefold() for name in self.names}
        cleaned = [clean_name(name, "negative label") for name in names]
        return replace(self, negatives=tuple(dict.fromkeys(n for n in cleaned if n.casefold() not in taken)))

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All names, flat (K): those of the classes in order, then the negatives."""
        return (*(name for names in self.classes for name in names), *self.negatives)

    @cached_property
    def class_ids(self) -> tuple[int, ...]:
        """The class id of each name (K); -1 for a negative."""
        ids = (class_id for class_id, names in enumerate(self.classes) for _ in names)
        return (*ids, *(-1 for _ in self.negatives))

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """What each class is called in results."""
        return self.titles or tuple(names[0] for names in self.classes)

    @cached_property
    def written_ids(self) -> tuple[int, ...]:
        """The id of each class in files of results."""
        return self.ids or tuple(range(len(self.classes)))

    def with_thresholds(self, thresholds: Mapping[str, float]) -> Labels:
        """The same classes, some with a least probability of their own, by what they are called.

        Raises:
            ValueError: there is no class of that name, or a number is not from 0 to 1.
        """
        if not thresholds:
            return self
        own = list(self.thresholds or (None,) * len(self.classes))
        for name, threshold in thresholds.items():
            if name not in self.class_names:
                raise ValueError(unknown("class", name, self.class_names[:50]))
            own[self.class_names.index(name)] = check_threshold(threshold, f"class {shown(name)}")
        return replace(self, thresholds=tuple(own))

    def wants_rivals(self, background_threshold: Any) -> bool:
        """Whether everyday words are to compete: a single class with a least probability has none to lose against."""
        return len(self) == 1 and (background_threshold is not None or bool(self.thresholds))

    def least_probabilities(self, common: Any) -> Any:
        """What `segment` takes for `background_threshold`: `common`, and of a class its own where it has one."""
        if not self.thresholds or isinstance(common, Sequence):
            return common
        return tuple((common or 0.0) if own is None else own for own in self.thresholds)

    def templates_of(self, common: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The prompt templates of each name (K), given those of classes that have none of their own."""
        own = self.class_templates or (None,) * len(self.classes)
        return [common if index < 0 else own[index] or common for index in self.class_ids]


def fill_template(template: str, name: str) -> str:
    """The prompt of one name; a brace inside a name or a template stays as it is."""
    return template.replace("{}", name)


def as_read(text: str, strip_punctuation: bool, lowercase: bool) -> str:
    """A text as a text tower learned to read it; see `SparProcessor`."""
    if strip_punctuation:
        text = " ".join(text.replace("_", " ").translate(NO_PUNCTUATION).split())
    return text.lower() if lowercase else text
