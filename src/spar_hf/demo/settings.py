"""Models and limits of the demonstration, environment variables that `python -m spar_hf.demo.settings` lists."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ..checkpoints import ASSETS, SHIPPED
from ..methods.table import METHODS
from ..refinement.table import find_refinements

# The best checkpoint that this installation has: `tiny-spar`, which is distilled, or `tiny`, which it starts from.
DEFAULT_MODEL = "tiny-spar" if (ASSETS / "tiny-spar" / "config.json").is_file() else "tiny"

# Plain CLIP checkpoints on the Hub that the menu offers beside the shipped ones; for photographs.
KNOWN = ("openai/clip-vit-base-patch16", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K")


@dataclass(frozen=True)
class Settings:
    """What a visitor may ask for. The variable of a field is SPAR_ and its name in capitals, such as SPAR_MAX_LABELS.

    Attributes:
        model: The model that is chosen first: a shipped one, a folder or a Hub id.
        device: `auto` takes an accelerator if there is one.
        networks: Second networks, `dino=facebook/dino-vitb8` and more of these split by commas; methods that need
            them join the menu. A network's own memory comes on top.
        refinements: Refinements on the menu, split by commas. Those that need a second network find it in `networks`.
        hosts: Further names that the page is called by, split by commas, where it is served to this machine alone and
            reached through a proxy.
        max_file_mb: Largest upload.
        max_image_pixels: Larger pictures are refused before they are decoded.
        max_input_pixels: Larger pictures are shrunk to this for the model; the label map keeps their own size.
        max_labels: Names in one vocabulary, synonyms included.
        max_windows: Windows of one sliding-window pass.
        quick_at_once: Single passes that run at the same time.
        slow_at_once: Sliding windows that run at the same time; these never wait for each other.
        queue_size: Requests that wait; more are told to come back.
        models_in_memory: Models kept loaded, the last used ones.
        keep_files_s: Seconds that uploads and results are kept on disk.
    """

    model: str = DEFAULT_MODEL
    device: str = "auto"
    networks: str = ""
    refinements: str = "pamr, flip, image-engineering, prompt-denoising, key-smoothing"
    hosts: str = ""
    max_file_mb: int = 20
    max_image_pixels: int = 40_000_000
    max_input_pixels: int = 1024 * 1024
    max_labels: int = 300
    max_windows: int = 3000
    quick_at_once: int = 2
    slow_at_once: int = 1
    queue_size: int = 60
    models_in_memory: int = 4
    keep_files_s: int = 1800

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Settings from the variables that are set, defaults for the others.

        Raises:
            ValueError: A variable that should be a whole number from 1 up is not, a network is not NAME=ID, or there
                is no such refinement.
        """
        given: dict[str, str | int] = {}
        for field in fields(cls):
            variable = f"SPAR_{field.name.upper()}"
            word = environment.get(variable, "").strip()
            if not word:
                continue
            if field.type == "str":
                given[field.name] = word
            elif word.isascii() and word.isdigit() and 0 < int(word) < 10**12:
                given[field.name] = int(word)
            else:
                raise ValueError(f"{variable} is {word!r}; give a whole number, at least 1.")
        return cls(**given)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        for part in _parts(self.networks):
            name, equals, origin = part.partition("=")
            if not (name and equals and origin):
                raise ValueError(
                    f"SPAR_NETWORKS is {self.networks!r}; write NAME=ID, such as dino=facebook/dino-vitb8."
                )
        for name, row in find_refinements(_parts(self.refinements)).items():
            if row.stage == "templates":
                raise ValueError(f"SPAR_REFINEMENTS has {name}, which needs unlabelled images; take it out.")
            for network in row.networks:
                if network not in self.second_networks:
                    raise ValueError(f"SPAR_REFINEMENTS has {name}; give its network, SPAR_NETWORKS={network}=ID.")

    @property
    def menu(self) -> dict[str, str]:
        """What visitors call each model, and what is loaded: of a folder they see its name, not where it is."""
        shipped = [name for name in SHIPPED if (ASSETS / name / "config.json").is_file()]
        models = dict.fromkeys([self.model, *shipped, *KNOWN])
        return {_public_name(name): name for name in models}

    @property
    def models(self) -> tuple[str, ...]:
        """The menu of models: the first model, the shipped ones, the known ones of the Hub."""
        return tuple(self.menu)

    @property
    def second_networks(self) -> dict[str, str]:
        """Id or folder of each second network, by the name that methods call it."""
        pairs = (part.partition("=") for part in _parts(self.networks))
        return {name: origin for name, _, origin in pairs}

    @property
    def methods(self) -> tuple[str, ...]:
        """The menu of methods: rows of the table whose networks are there."""
        networks = set(self.second_networks)
        return tuple(name for name, row in METHODS.items() if set(row.needs) <= networks)

    @property
    def refinement_menu(self) -> dict[str, str]:
        """What each refinement of the menu does, by name."""
        return {name: row.title for name, row in find_refinements(_parts(self.refinements)).items()}


def _public_name(model: str) -> str:
    """A model's name without the place of its folder."""
    if model in SHIPPED or not Path(model).is_dir():
        return model
    name = Path(model).resolve().name
    return f"{name} (folder)" if name in SHIPPED else name


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    for _field in fields(Settings):
        print(f"SPAR_{_field.name.upper()}={getattr(Settings(), _field.name)}")
