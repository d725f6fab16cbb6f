"""load(): a model and its processor by name: a checkpoint that ships with the package, a folder, or a Hub id."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoTokenizer

from .configuration_spar import SparConfig, SparVisionConfig
from .image_processing_spar import SparImageProcessor
from .modeling_spar import SparModel
from .processing_spar import SparProcessor

ASSETS = Path(__file__).parent / "assets"
SHIPPED = ("tiny", "tiny-spar")


def resolve(name: str | Path) -> str:
    """Folder or Hub id behind a name.

    Raises:
        ValueError: the name is neither shipped, nor a folder with a model, nor of the form owner/name.
    """
    if str(name) in SHIPPED:
        return str(ASSETS / str(name))
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"folder {name} holds no config.json; give a folder that save_pretrained wrote.")
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"folder {name} holds no weights (*.safetensors); give a folder that save_pretrained wrote."
            )
        return str(folder)
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        near = difflib.get_close_matches(str(name), SHIPPED, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no model {str(name)!r}; give {' or '.join(SHIPPED)}, a folder, or a Hub id such as "
            f"openai/clip-vit-base-patch16.{hint}"
        )
    return str(name)


def load(name: str | Path = "tiny", **overrides: Any) -> tuple[SparModel, SparProcessor]:
    """A model, ready to run, and its processor.

    Args:
        name: `tiny` or `tiny-spar` (shipped), a folder of `save_pretrained`, or a Hub id: a SPAR model or plain CLIP.
        overrides: fields of `SparVisionConfig` (`method="naclip"`), or arguments of `from_pretrained`
            (`dtype=torch.bfloat16`, `revision="..."`).

    Returns:
        The model in evaluation mode and the processor.

    Raises:
        ValueError: there is no such model, or a field is out of range.
        OSError: the Hub or the files cannot be read.
    """
    path = resolve(name)
    model_class = AutoModel if AutoConfig.from_pretrained(path).model_type == SparConfig.model_type else SparModel
    model = model_class.from_pretrained(path, **overrides).eval()
    return model, load_processor(path, model.config.vision_config)


def load_processor(path: str, vision_config: SparVisionConfig) -> SparProcessor:
    """The checkpoint's own processor, or for plain CLIP one made from the configuration and the tokenizer."""
    config = AutoConfig.from_pretrained(path)
    if config.model_type == SparConfig.model_type:
        return SparProcessor.from_pretrained(path)
    image_processor = SparImageProcessor(
        size={"shortest_edge": 672},  # SPAR, section 4: the size of the paper's results
        image_mean=vision_config.image_mean,
        image_std=vision_config.image_std,
        min_side_px=vision_config.patch_size,
    )
    return SparProcessor(image_processor=image_processor, tokenizer=AutoTokenizer.from_pretrained(path))
