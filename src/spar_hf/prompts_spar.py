"""Labels: classes with their names, and the prompt templates that turn a name into sentences for the text tower."""

from __future__ import annotations

import csv
import json
import logging
import re
import string
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ImageColor

from .names_spar import shown, unknown

logger = logging.getLogger(__name__)

# Ten thousand names are the largest vocabularies in use (ImageNet-21k filtered, LVIS and Objects365 together); more
# is nearly always a file passed by mistake. `Labels.parse(..., max_labels=N)` raises the limit.
MAX_LABELS = 10_000
# No text tower reads more than some hundred characters; a longer name is a mistake, and slow to cut into tokens.
MAX_CHARACTERS = 2_000

MAX_ID = 65_534  # of a class; what 16 bits hold, less one for no class

# Of a class in a file of labels.
FIELDS = ("id", "name", "names", "synonyms", "colour", "threshold", "templates", "definition")

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
        entries: list[_Class] = []
        num_names = 0
        for number, entry in enumerate(labels, start=1):
            entries.append(_parse_class(entry, number))
            num_names += len(entries[-1].names)
            if num_names > max_labels:
                raise ValueError(
                    f"there are over {max_labels} labels; at most {max_labels} are allowed. "
                    "Pass fewer, or raise max_labels if this is meant."
                )
        if not entries:
            raise ValueError("there are no labels; at least one is needed. Pass some, such as 'road; car; sky'.")
        classes = tuple(entry.names for entry in entries)
        _check_unique(classes)
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
        columns = _Class(*zip(*entries, strict=True))
        _check_ids(columns.id)

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
                labels = [_row_of_csv(row) for row in csv.DictReader(text.splitlines())]
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
        cleaned = [_clean(name, "negative label") for name in names]
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
            own[self.class_names.index(name)] = _parse_threshold(threshold, f"class {shown(name)}")
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


class _Class(NamedTuple):
    """One class as it is read; None for what it does not say."""

    title: Any  # what it is called; None: as its first name
    names: Any
    templates: Any = None
    definition: Any = None
    id: Any = None
    colour: Any = None
    threshold: Any = None


def _parse_class(entry: Any, number: int) -> _Class:
    """Reads one class.

    Args:
        entry: a form of `Labels.parse`.
        number: of the class from 1, for messages.
    """
    what = f"label {number}"
    if not isinstance(entry, Mapping):
        return _Class(None, _parse_names(entry, what))
    for key in entry:
        if key not in FIELDS:
            raise ValueError(f"{what}: " + unknown("field", key, FIELDS))
    if not isinstance(entry.get("name"), str):
        raise ValueError(f"{what} has no name; give {{'name': 'car', 'names': ['car', 'automobile']}}.")
    title = _clean(entry["name"], what)
    names, synonyms = ((None if entry.get(key) in (None, "", [], ()) else entry[key]) for key in ("names", "synonyms"))
    if names is not None and synonyms is not None:
        raise ValueError(f"{what} has names and synonyms; give all its names, or those besides {shown(title)}.")
    every = [title] if names is None else names
    if synonyms is not None:
        every = [title, *_parse_names(synonyms, what)]
    definition = entry.get("definition") or None
    if definition is not None and not isinstance(definition, str):
        raise ValueError(f"{what}'s definition is {shown(definition)}; give one text.")
    return _Class(
        title,
        _parse_names(every, what),
        check_templates(entry["templates"]) if entry.get("templates") else None,
        None if definition is None else _clean(definition, f"{what}'s definition"),
        _parse_id(entry.get("id"), what),
        _parse_colour(entry.get("colour"), what),
        _parse_threshold(entry.get("threshold"), what),
    )


def _parse_names(entry: Any, what: str) -> tuple[str, ...]:
    names = entry.split(",") if isinstance(entry, str) else entry
    if not isinstance(names, Sequence) or isinstance(names, bytes) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{what} is {shown(entry)}; allowed are a string, a list of strings or a mapping.")
    if not names or not all(name.strip() for name in names):
        raise ValueError(f"{what} is empty in {shown(entry)}; every label needs a name. Remove it or name it.")
    return tuple(_clean(name, what) for name in names)


def _parse_id(value: Any, what: str) -> int | None:
    if value is None or value == "":
        return None
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) or int(text) > MAX_ID:
        raise ValueError(f"{what}'s id is {shown(value)}; give a whole number from 0 to {MAX_ID}.")
    return int(text)


def _parse_colour(value: Any, what: str) -> tuple[int, int, int] | None:
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str):
            return ImageColor.getrgb(value.strip())[:3]
        red, green, blue = (int(part) for part in value if part == int(part))
        if len(value) == 3 and min(red, green, blue) >= 0 and max(red, green, blue) <= 255:
            return red, green, blue
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{what}'s colour is {shown(value)}; give one such as '#d55e00', 'red' or [213, 94, 0].")


def _parse_threshold(value: Any, what: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        threshold = float(value)
    except (TypeError, ValueError):
        threshold = -1.0
    if not 0 <= threshold <= 1 or isinstance(value, bool):
        raise ValueError(f"{what}'s threshold is {shown(value)}; give a probability from 0 to 1.")
    return threshold


def _check_ids(ids: Sequence[int | None]) -> None:
    """All classes have an id, each another, or none has one."""
    known = [number for number in ids if number is not None]
    if known and len(known) < len(ids):
        raise ValueError(f"label {ids.index(None) + 1} has no id and others have; give each class an id, or none.")
    if len(set(known)) < len(known):
        twice = next(number for number in known if known.count(number) > 1)
        raise ValueError(f"two classes have the id {twice}; give each an id of its own.")


def _clean(name: str, what: str) -> str:
    """A name with single spaces; refused where it is empty, too long or no text."""
    if len(name) > MAX_CHARACTERS:
        raise ValueError(f"{what} has {len(name)} characters; at most {MAX_CHARACTERS} are read. Shorten it.")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"{what} is {shown(name)}, which holds bytes that are no UTF-8 text. Write it as text.")
    name = re.sub(r"\s+", " ", name).strip()
    if not name:
        raise ValueError(f"{what} is empty; every label needs a name. Remove it or name it.")
    return name


def _row_of_csv(row: dict[str | None, Any]) -> dict[str, Any]:
    """A line of a CSV file as a mapping of `Labels.parse`."""
    if None in row:
        raise ValueError(
            f"a line has more cells than the header: {shown(row.get('name'))}; quote names that hold commas"
        )
    fields = {key.strip(): (value or "").strip() for key, value in row.items() if key is not None}
    split = {"names": ",", "synonyms": ",", "templates": ";"}
    return {
        key: [part for part in value.split(split[key]) if part.strip()] if key in split else value
        for key, value in fields.items()
    }


def _check_unique(classes: tuple[tuple[str, ...], ...]) -> None:
    """A name means one class; case does not tell two names apart, since most text towers read lower case."""
    class_of: dict[str, int] = {}
    for class_id, names in enumerate(classes):
        for name in names:
            first = class_of.setdefault(name.casefold(), class_id)
            if first != class_id:
                raise ValueError(
                    f"label {shown(name)} is in two classes, {first + 1} ({shown(classes[first][0])}) and "
                    f"{class_id + 1} ({shown(names[0])}); a name belongs to one class. Remove one of them."
                )
        if len({name.casefold() for name in names}) != len(names):
            raise ValueError(
                f"label {class_id + 1} names the same thing twice: {shown(', '.join(names))}. Remove one of them."
            )


def check_templates(templates: str | Iterable[str]) -> tuple[str, ...]:
    """Prompt templates as a tuple, each checked to hold exactly one `{}`.

    Raises:
        ValueError: No template, or one without exactly one `{}`.
    """
    templates = (templates,) if isinstance(templates, str) else tuple(templates)
    if not templates:
        raise ValueError("there are no prompt templates; at least one is needed, such as 'a photo of a {}.'.")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"prompt template {shown(template)} must hold exactly one '{{}}', where the name goes.")
    return templates


def fill_template(template: str, name: str) -> str:
    """The prompt of one name; a brace inside a name or a template stays as it is."""
    return template.replace("{}", name)


def as_read(text: str, strip_punctuation: bool, lowercase: bool) -> str:
    """A text as a text tower learned to read it; see `SparProcessor`."""
    if strip_punctuation:
        text = " ".join(text.replace("_", " ").translate(NO_PUNCTUATION).split())
    return text.lower() if lowercase else text
