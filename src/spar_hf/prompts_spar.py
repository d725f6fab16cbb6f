"""Labels with synonyms, and the prompt templates that turn a name into sentences for the text tower."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

logger = logging.getLogger(__name__)

# Ten thousand names are the largest vocabularies in use (ImageNet-21k filtered, LVIS and Objects365 together); more
# is nearly always a file passed by mistake. `Labels.parse(..., max_labels=N)` raises the limit.
MAX_LABELS = 10_000

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
        classes: The names of each class; the index of a class is its id in a label map.
    """

    classes: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, labels: str | Sequence[str | Sequence[str]] | Labels, max_labels: int = MAX_LABELS) -> Labels:
        """Reads a vocabulary from one of three forms.

        Args:
            labels: `"road; car, automobile; sky"` (classes split by `;`, synonyms by `,`),
                `["road", "car, automobile"]` (one string a class) or `[["road"], ["car", "automobile"]]`
                (names taken as they are, so that a name may hold a comma).
            max_labels: Most names that are accepted.

        Raises:
            ValueError: No labels, an empty label, a name that occurs twice, or more than `max_labels` names.
        """
        if isinstance(labels, Labels):
            return labels
        if isinstance(labels, str):
            labels = labels.split(";") if labels.strip() else []
        elif not isinstance(labels, Iterable):
            raise ValueError(
                f"labels are a {type(labels).__name__}; allowed are a string such as 'road; car, automobile; sky' "
                "or a list. Pass one of these."
            )
        classes = tuple(_parse_class(entry, number) for number, entry in enumerate(labels, start=1))
        if not classes:
            raise ValueError("there are no labels; at least one is needed. Pass some, such as 'road; car; sky'.")
        num_names = sum(len(names) for names in classes)
        if num_names > max_labels:
            raise ValueError(
                f"there are {num_names} labels; at most {max_labels} are allowed. "
                "Pass fewer, or raise max_labels if this is meant."
            )
        _check_unique(classes)
        if len(classes) == 1 and num_names > 1:
            # Commas between classes are the likely slip, and its result (one class everywhere) looks like a bug.
            logger.warning(
                "the labels make one class with %d synonyms (%s); separate classes with ';'.",
                num_names,
                ", ".join(classes[0][:4]) + (", ..." if num_names > 4 else ""),
            )
        return cls(classes)

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All names of all classes, flat (K)."""
        return tuple(name for names in self.classes for name in names)

    @cached_property
    def class_ids(self) -> tuple[int, ...]:
        """The class id of each name (K)."""
        return tuple(class_id for class_id, names in enumerate(self.classes) for _ in names)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The first name of each class."""
        return tuple(names[0] for names in self.classes)


def _parse_class(entry: str | Sequence[str], number: int) -> tuple[str, ...]:
    """One class from `"car, automobile"` or `["car", "automobile"]`; `number` counts from 1, for messages."""
    names = entry.split(",") if isinstance(entry, str) else entry
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"label {number} is {entry!r}; allowed are a string or a list of strings.")
    names = [re.sub(r"\s+", " ", name).strip() for name in names]
    if not names or not all(names):
        raise ValueError(f"label {number} is empty in {entry!r}; every label needs a name. Remove it or name it.")
    return tuple(names)


def _check_unique(classes: tuple[tuple[str, ...], ...]) -> None:
    """A name means one class; case does not tell two names apart, since most text towers read lower case."""
    class_of: dict[str, int] = {}
    for class_id, names in enumerate(classes):
        for name in names:
            first = class_of.setdefault(name.casefold(), class_id)
            if first != class_id:
                raise ValueError(
                    f"label '{name}' is in two classes, {first + 1} ('{classes[first][0]}') and {class_id + 1} "
                    f"('{names[0]}'); a name belongs to one class. Remove one of them."
                )
        if len({name.casefold() for name in names}) != len(names):
            raise ValueError(
                f"label {class_id + 1} names the same thing twice: {', '.join(names)}. Remove the repeated name."
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
            raise ValueError(f"prompt template {template!r} must hold exactly one '{{}}', where the name goes.")
    return templates


def fill_template(template: str, name: str) -> str:
    """The prompt of one name; a brace inside a name or a template stays as it is."""
    return template.replace("{}", name)
