"""ITACLIP's text ensemble: q = (1 - alpha) name + alpha definition, both unit means over the templates.

Paper: "ITACLIP: Boosting Training-Free Semantic Segmentation with Image, Text, and Architectural Enhancements", Aydın
et al., CVPR Workshops 2025, section 3.4. q is not brought to length one again, as in the authors' code: a name whose
definition is far from it has lower scores. All names of a class have its one definition; a class without one, such as
the background, keeps its names as they are.
The authors' definitions and synonyms were written by Llama 3 8B. Here they are whatever the labels bring: `definition`
of a class in a file of labels, or in a file of their own (`--set definitions.file=FILE`) for a benchmark's labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prompts_spar import Labels


@dataclass(frozen=True)
class Settings:
    """Where the definitions are and what they weigh.

    Attributes:
        weight: alpha; VOC21, Cityscapes .05, Object .1, Context60 .15, Stuff .2.
        file: of labels with definitions, JSON or CSV, read where the labels have none; classes are found by name.
    """

    weight: float = 0.05
    file: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"definitions' weight is {self.weight}; it must be from 0 to 1.")


def with_definitions(
    encode: Callable[[Labels], Tensor], labels: Labels, text_embeds: Tensor, settings: Settings
) -> Tensor:
    """Text features (K, D), not of length one.

    Args:
        encode: a vocabulary -> its text features, in the templates at hand.
        labels: the vocabulary.
        text_embeds: its text features, (K, D).
        settings: the definitions.

    Raises:
        ValueError: no class has a definition.
    """
    of_class = list(labels.definitions) or [None] * len(labels)
    if not labels.definitions and settings.file:
        given = Labels.read(settings.file)
        texts = zip(given.class_names, given.definitions or (None,) * len(given), strict=True)
        known = {name.casefold(): text for name, text in texts}
        for number, names in enumerate(labels.classes):
            called = [labels.class_names[number], *names]
            of_class[number] = next((known[n.casefold()] for n in called if known.get(n.casefold())), None)
    texts_there = list(dict.fromkeys(text for text in of_class if text is not None))
    if not texts_there:
        raise ValueError(
            "refinement 'definitions' mixes a text about each class into its names, and no class has one; give them "
            "as 'definition' in a file of labels (JSON or CSV), or --set definitions.file=FILE."
        )
    embeds = encode(Labels(tuple((text,) for text in texts_there)))
    mixed = text_embeds.clone()
    for row, class_id in enumerate(labels.class_ids):
        text = of_class[class_id] if class_id >= 0 else None
        if text is not None:
            mixed[row] = torch.lerp(text_embeds[row], embeds[texts_there.index(text)], settings.weight)
    return mixed
