"""What is said of one class in a vocabulary: its names, and as wanted id, colour, threshold, templates, definition."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import ImageColor

from .names_spar import shown, unknown

# No text tower reads more than some hundred characters; a longer name is a mistake, and slow to cut into tokens.
MAX_CHARACTERS = 2_000

MAX_ID = 65_534  # of a class; what 16 bits hold, less one for no class

# Of a class in a file of labels.
FIELDS = ("id", "name", "names", "synonyms", "colour", "threshold", "templates", "definition")


class ClassEntry(NamedTuple):
    """One class as it is read; None for what it does not say."""

    title: Any  # what it is called; None: as its first name
    names: Any
    templates: Any = None
    definition: Any = None
    id: Any = None
    colour: Any = None
    threshold: Any = None


def read_class(entry: Any, number: int) -> ClassEntry:
    """Reads one class.

    Args:
        entry: a form of `Labels.parse`.
        number: of the class from 1, for messages.
    """
    what = f"label {number}"
    if not isinstance(entry, Mapping):
        return ClassEntry(None, _parse_names(entry, what))
    for key in entry:
        if key not in FIELDS:
            raise ValueError(f"{what}: " + unknown("field", key, FIELDS))
    if not isinstance(entry.get("name"), str):
        raise ValueError(f"{what} has no name; give {{'name': 'car', 'names': ['car', 'automobile']}}.")
    title = clean_name(entry["name"], what)
    names, synonyms = ((None if entry.get(key) in (None, "", [], ()) else entry[key]) for key in ("names", "synonyms"))
    if names is not None and synonyms is not None:
        raise ValueError(f"{what} has names and synonyms; give all its names, or those besides {shown(title)}.")
    every = [title] if names is None else names
    if synonyms is not None:
        every = [title, *_parse_names(synonyms, what)]
    definition = entry.get("definition") or None
    if definition is not None and not isinstance(definition, str):
        raise ValueError(f"{what}'s definition is {shown(definition)}; give one text.")
    return ClassEntry(
        title,
        _parse_names(every, what),
        check_templates(entry["templates"]) if entry.get("templates") else None,
        None if definition is None else clean_name(definition, f"{what}'s definition"),
        _parse_id(entry.get("id"), what),
        _parse_colour(entry.get("colour"), what),
        check_threshold(entry.get("threshold"), what),
    )


def _parse_names(entry: Any, what: str) -> tuple[str, ...]:
    names = entry.split(",") if isinstance(entry, str) else entry
    if not isinstance(names, Sequence) or isinstance(names, bytes) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{what} is {shown(entry)}; allowed are a string, a list of strings or a mapping.")
    if not names or not all(name.strip() for name in names):
        raise ValueError(f"{what} is empty in {shown(entry)}; every label needs a name. Remove it or name it.")
    return tuple(clean_name(name, what) for name in names)


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


def check_threshold(value: Any, what: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        threshold = float(value)
    except (TypeError, ValueError):
        threshold = -1.0
    if not 0 <= threshold <= 1 or isinstance(value, bool):
        raise ValueError(f"{what}'s threshold is {shown(value)}; give a probability from 0 to 1.")
    return threshold


def check_ids(ids: Sequence[int | None]) -> None:
    """All classes have an id, each another, or none has one."""
    known = [number for number in ids if number is not None]
    if known and len(known) < len(ids):
        raise ValueError(f"label {ids.index(None) + 1} has no id and others have; give each class an id, or none.")
    if len(set(known)) < len(known):
        twice = next(number for number in known if known.count(number) > 1)
        raise ValueError(f"two classes have the id {twice}; give each an id of its own.")


def clean_name(name: str, what: str) -> str:
    """A name with single spaces; refused where it is empty, too long or no text."""
    if len(name) > MAX_CHARACTERS:
        raise ValueError(f"{what} has {len(name)} characters; at most {MAX_CHARACTERS} are read. Shorten it.")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"{what} is {shown(name)}, which holds bytes that are no UTF-8 text. Write it as text.")
    name = re.sub(r"\s+", " ", name).strip()
    if not name:
        raise ValueError(f"{what} is empty; every label needs a name. Remove it or name it.")
    return name


def read_row(row: dict[str | None, Any]) -> dict[str, Any]:
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


def check_unique(classes: tuple[tuple[str, ...], ...]) -> None:
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
