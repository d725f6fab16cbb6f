"""load(): a model and its processor by name: a checkpoint that ships with the package, a folder, or a Hub id.

`load_tower` takes a vision tower alone as well.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedConfig

from .configuration_spar import DenseConfig
from .encoder_spar import DenseModel
from .families import TOWERS, WHOLE, make_processor
from .pipeline_spar import TASK, OpenVocabularySegmentationPipeline
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


def class_of(path: str, table: dict[str, Any], **kwargs: Any) -> Any:
    """The class of `table` that loads a checkpoint, by its configuration's model type.

    Args:
        path: folder or Hub id.
        table: `WHOLE` or `TOWERS`, or both.
        kwargs: `revision`, `token`, ... of `from_pretrained`.

    Raises:
        ValueError: no class there loads it; the message lists what can be loaded.
    """
    model_type = PreTrainedConfig.get_config_dict(path, **kwargs)[0].get("model_type")
    if model_type in table:
        return table[model_type]
    if model_type in TOWERS:
        raise ValueError(
            f"{path} holds a vision tower alone ({model_type}), and labels need the text tower too. Give a whole "
            f"checkpoint, or load the tower with spar_hf.{TOWERS[model_type].__name__}."
        )
    raise ValueError(
        f"{path} is a checkpoint of type {model_type!r}; those that can be loaded are {', '.join(sorted(table))}."
    )


def load(name: str | Path = "tiny", **overrides: Any) -> tuple[DenseModel, SparProcessor]:
    """A model, ready to run, and its processor; the family is the checkpoint's.

    Args:
        name: `tiny` or `tiny-spar` (shipped), a folder of `save_pretrained`, or a Hub id: a SPAR model, plain CLIP,
            or plain SigLIP or SigLIP2 of fixed resolution.
        overrides: fields of the vision configuration (`method="naclip"`), or arguments of `from_pretrained`
            (`dtype=torch.bfloat16`, `revision="..."`).

    Returns:
        The model in evaluation mode and the processor.

    Raises:
        ValueError: there is no such model, or a field is out of range.
        OSError: the Hub or the files cannot be read.
    """
    path = resolve(name)
    model = class_of(path, WHOLE).from_pretrained(path, **overrides).eval()
    return model, load_processor(path, model.config)


def pipeline(model: str | Path | Any = "tiny", **kwargs: Any) -> OpenVocabularySegmentationPipeline:
    """`transformers.pipeline("open-vocabulary-segmentation", ...)`, which also knows the names that `load` knows.

    Args:
        model: as for `load`; or a model, ours or a stock one, with `processor=`.
        kwargs: arguments of `transformers.pipeline`, and of each call (`candidate_labels`, ...).
    """
    task: Any = TASK  # which transformers' types don't list
    return transformers.pipeline(task, model=resolve(model) if isinstance(model, str | Path) else model, **kwargs)


def load_tower(name: str, **overrides: Any) -> tuple[Any, Any, SparProcessor | None]:
    """A checkpoint, its vision tower, and its processor; a vision tower alone is its own and has no processor.

    Args:
        name: `tiny`, a folder or a Hub id.
        overrides: fields of the vision configuration, or arguments of `from_pretrained`.
    """
    path = resolve(name)
    model_class = class_of(path, {**WHOLE, **TOWERS})
    if model_class in TOWERS.values():
        vision = model_class.from_pretrained(path, **overrides).eval()
        return vision, vision, None
    model, processor = load(name, **overrides)
    return model, model.vision_model, processor


def load_processor(path: str, config: DenseConfig) -> SparProcessor:
    """The checkpoint's own processor, or for a stock checkpoint one made from the configuration and the tokenizer."""
    if PreTrainedConfig.get_config_dict(path)[0].get("model_type") == config.model_type:
        return SparProcessor.from_pretrained(path)
    return make_processor(config, AutoTokenizer.from_pretrained(path))


def convert_stock(model: Any, tokenizer: Any) -> tuple[DenseModel, SparProcessor]:
    """A stock model in memory, of a family that we have, as ours, on its device; and a processor for it.

    Raises:
        ValueError: the model is of another kind.
    """
    family = WHOLE.get(model.config.model_type)
    if family is None:
        raise ValueError(
            f"{model.name_or_path or 'the model'} is a {type(model).__name__} of type {model.config.model_type!r}; "
            f"those that can be loaded are {', '.join(sorted(WHOLE))}."
        )
    converted = family.from_stock(model)
    return converted, make_processor(converted.config, tokenizer)
