"""load(): a model and its processor by name: a checkpoint that ships with the package, a folder, or a Hub id.

`load_tower` takes a vision tower alone as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import transformers

from .checkpoint_files import naming, read_json, refuse, weight_files
from .configuration_spar import DenseConfig
from .downloads import CONFIG, HUB_ARGUMENTS, fetch
from .encoder_spar import DenseModel
from .families import TOWERS, WHOLE, make_processor
from .names_spar import unknown
from .pipeline_spar import TASK, OpenVocabularySegmentationPipeline
from .pretrained import open_image_processor, open_model, open_tokenizer, processor_file, read_config
from .processing_spar import SparProcessor

ASSETS = Path(__file__).parent / "assets"
SHIPPED = ("tiny", "tiny-spar")
# Text towers whose features are those of the end token; old files give 2 for it, and mean the highest id.
END_TOKEN_POOLED, LEGACY_END = ("clip_text_model", "spar_dinov3_text", "metaclip_2_text_model"), 2


def resolve(name: str | Path) -> str:
    """Folder or Hub id behind a name.

    Raises:
        ValueError: the name is neither shipped, nor a folder with a model, nor of the form owner/name.
    """
    if str(name) in SHIPPED:
        return str(ASSETS / str(name))
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise ValueError(f"folder {name} holds no config.json; give a folder that save_pretrained wrote.")
        weight_files(folder)
        return str(folder)
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise ValueError(
            unknown("model", str(name), SHIPPED)
            + " Or give a folder, or a Hub id such as openai/clip-vit-base-patch16."
        )
    return str(name)


def folder_of(name: str | Path, options: dict[str, Any]) -> Path:
    """The folder behind a name, downloaded where it is on the Hub; takes what is about the Hub out of the options.

    Raises:
        ValueError: as `resolve`.
        OSError: as `fetch`.
    """
    return fetch(resolve(name), **{key: options.pop(key) for key in HUB_ARGUMENTS if key in options})


def class_of(folder: Path, table: dict[str, Any]) -> Any:
    """The class of `table` that loads a checkpoint, by its configuration's model type.

    Args:
        folder: its folder.
        table: `WHOLE` or `TOWERS`, or both.

    Raises:
        ValueError: no class there loads it; the message lists what can be loaded.
    """
    config = read_config(folder)
    model_type = str(config.get("model_type"))
    if config.get("architectures") == ["RADIOModel"]:  # whose configuration is NVIDIA's code's
        raise ValueError(
            f"{folder} is a folder of NVIDIA's own; spar convert {folder} --backbone radio makes one that loads."
        )
    if model_type in table:
        return table[model_type]
    if model_type in TOWERS:
        raise ValueError(
            f"{folder} holds a vision tower alone ({model_type}), and labels need the text tower too. Give a whole "
            f"checkpoint, or load the tower with spar_hf.{TOWERS[model_type].__name__}. The type stands in {CONFIG}."
        )
    raise ValueError(
        f"{folder} is a checkpoint of type {model_type!r:.80}; those that can be loaded are "
        f"{', '.join(sorted(table))}. The type stands in {CONFIG}."
    )


def load(name: str | Path = "tiny", **overrides: Any) -> tuple[DenseModel, SparProcessor]:
    """A model, ready to run, and its processor; the family is the checkpoint's.

    No code of a checkpoint is run, and pickled weights (`pytorch_model.bin`) are read as plain tensors.

    Args:
        name: `tiny` or `tiny-spar` (shipped), a folder of `save_pretrained`, or a Hub id: a SPAR model, plain CLIP,
            or another family's plain checkpoint.
        overrides: fields of the vision configuration (`method="naclip"`), or arguments of `from_pretrained`
            (`dtype=torch.bfloat16`, `revision="..."`).

    Returns:
        The model in evaluation mode and the processor.

    Raises:
        ValueError: there is no such model, a field is out of range, or a file is broken; the message names it.
        OSError: the Hub or the files cannot be read.
    """
    folder = folder_of(name, overrides)
    model = open_model(class_of(folder, WHOLE), folder, **overrides)
    return model, load_processor(folder, model.config)


def pipeline(model: str | Path | Any = "tiny", **kwargs: Any) -> OpenVocabularySegmentationPipeline:
    """`transformers.pipeline("open-vocabulary-segmentation", ...)`, which also knows the names that `load` knows.

    Args:
        model: as for `load`, which opens it; or a model, ours or a stock one, with `processor=`.
        kwargs: arguments of `transformers.pipeline`, and of each call (`candidate_labels`, ...).

    Raises:
        ValueError, OSError: as `load`.
    """
    task: Any = TASK  # which transformers' types don't list
    if isinstance(model, str | Path):
        options = {name: kwargs.pop(name) for name in ("dtype", "device_map", *HUB_ARGUMENTS) if name in kwargs}
        model, processor = load(model, **options, **kwargs.pop("model_kwargs", {}))
        kwargs.setdefault("processor", processor)
    return transformers.pipeline(task, model=model, trust_remote_code=False, **kwargs)


def load_tower(name: str | Path, **overrides: Any) -> tuple[Any, Any, SparProcessor | None]:
    """A checkpoint, its vision tower, and its processor; a vision tower alone is its own and has no processor.

    Args:
        name: `tiny`, a folder or a Hub id.
        overrides: fields of the vision configuration, or arguments of `from_pretrained`.

    Raises:
        ValueError, OSError: as `load`.
    """
    folder = folder_of(name, overrides)
    model_class = class_of(folder, {**WHOLE, **TOWERS})
    if model_class in TOWERS.values():
        vision = open_model(model_class, folder, **overrides)
        return vision, vision, None
    model, processor = load(folder, **overrides)
    return model, model.vision_model, processor


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


def load_processor(folder: Path, config: DenseConfig) -> SparProcessor:
    """The checkpoint's own processor, or for a stock checkpoint one made from the configuration and the tokenizer.

    Raises:
        ValueError: a file is broken, or makes token ids that the model does not have; the message names it.
    """
    tokenizer = open_tokenizer(folder)
    if read_config(folder).get("model_type") == config.model_type:
        path = processor_file(folder)
        image_processor = open_image_processor(folder)
        with naming(path):
            processor = SparProcessor.from_args_and_dict([image_processor, tokenizer], read_json(path))
    else:
        path = folder / CONFIG
        processor = make_processor(config, tokenizer)
    _try_out(processor, config, path, folder)
    return processor


def _try_out(processor: SparProcessor, config: Any, path: Path, folder: Path) -> None:
    """Runs a processor once, and refuses what the model could not take."""
    with naming(path):
        processor(images=np.zeros((2, 2, 3), np.uint8), size=None)
    tokens_path = folder / "tokenizer_config.json"
    if not tokens_path.exists():
        tokens_path = folder / "tokenizer.json"
    text = config.text_config
    with naming(tokens_path, path):
        limit = processor.tokenizer.model_max_length
        if limit > text.max_position_embeddings:  # transformers writes 1e30 where there is none
            processor.tokenizer.model_max_length = text.max_position_embeddings
        ids = processor(text=["a " * text.max_position_embeddings])["input_ids"][0].tolist()
    if len(ids) > text.max_position_embeddings or not ids:
        refuse(tokens_path, f"a long text gives {len(ids)} tokens and the model reads {text.max_position_embeddings}")
    if (highest := max(*ids, len(processor.tokenizer) - 1)) >= text.vocab_size:
        refuse(tokens_path, f"it gives token {highest} and the model's vocabulary has {text.vocab_size}")
    legacy = text.eos_token_id == LEGACY_END and text.model_type != "metaclip_2_text_model"  # whose end token is 2
    if text.model_type in END_TOKEN_POOLED and not legacy and text.eos_token_id not in ids:
        refuse(tokens_path, f"its texts lack token {text.eos_token_id}, with which the model's end (eos_token_id)")
