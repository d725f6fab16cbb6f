"""The one way into a checkpoint: its code never runs, its files stay in its folder, and a broken one is named.

transformers reads the files; this says what it may read, and puts whatever it raises into one line. Models, second
networks, tokenizers and image processors are all opened here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from .checkpoint_files import (
    CheckpointError,
    check_finite,
    naming,
    one_line,
    own_file,
    read_json,
    refuse,
    weight_files,
)
from .downloads import CONFIG, PROCESSOR_FILES, TOKENIZER_FILES, revision_of
from .image_processing_spar import SparImageProcessor

# What a configuration may not choose: transformers would fetch a kernel, or read its weights from elsewhere.
ATTENTION_FIELDS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
PLAIN_ATTENTION = (None, "eager", "sdpa")
DETOURS = ("transformers_weights", "fusion_config", "kernel_config", "distributed_config")
QUANTIZERS = ("torchao", "bitsandbytes")
MAX_LABELS = 100_000
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# A network may have so many times the numbers that its files hold (packed ones hold several in one), and a few more.
TIMES_LARGER, A_FEW = 8, 10**7


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, if it sends transformers nowhere else.

    Raises:
        CheckpointError: it can't be read, or chooses a kernel, a quantizer or other files.
    """
    path = own_file(folder, CONFIG)
    config = read_json(path)

    def check(part: Mapping[str, Any]) -> None:
        for name, value in part.items():
            if isinstance(value, dict):
                check(value)
            if name in ATTENTION_FIELDS and value not in PLAIN_ATTENTION:
                refuse(path, f"{name} is {value!r:.80}, and a file may ask for 'eager' or 'sdpa'", "Remove that field")
            if name == "num_labels" and isinstance(value, int) and value > MAX_LABELS:
                refuse(path, f"num_labels is {value}, and transformers would list them all", "Remove that field")
            if name in DETOURS and value is not None:
                refuse(path, f"{name} would have other files or code read", "Remove that field")
            if name == "quantization_config" and value is not None:
                method = value.get("quant_method") if isinstance(value, dict) else None
                if method not in QUANTIZERS:
                    refuse(path, f"it is quantized with {method!r:.80}; {' and '.join(QUANTIZERS)} can be read")

    check(config)
    return config


def open_config(config_class: Any, folder: Path) -> Any:
    """The configuration of a folder.

    Raises:
        CheckpointError: it can't be read.
    """
    with naming(folder / CONFIG):
        return config_class.from_pretrained(folder, trust_remote_code=False)


def open_model(model_class: Any, folder: Path, **overrides: Any) -> Any:
    """`model_class.from_pretrained(folder)` in evaluation mode.

    Args:
        model_class: a class of transformers or of ours, or an Auto class.
        folder: what `fetch` gave.
        overrides: fields of the configuration, or arguments of `from_pretrained`.

    Raises:
        CheckpointError: a file is broken, asks for code, or holds NaN or infinity.
        ValueError: an override is out of its range.
    """
    read_config(folder)
    files, shapes = weight_files(folder)
    config_path = folder / CONFIG
    config_class = getattr(model_class, "config_class", None) or AutoConfig
    config = open_config(config_class, folder)
    if overrides:  # what is wrong from here on is the caller's
        config = _overridden(config_class, folder, overrides)
    _check_size(model_class, config, shapes, config_path)
    try:
        with naming(files[0], config_path):
            model, info = model_class.from_pretrained(
                folder,
                trust_remote_code=False,
                weights_only=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # to name them
                output_loading_info=True,
                **overrides,
            )
    except CheckpointError as error:
        if isinstance(error.__cause__, TypeError) and any(name in str(error.__cause__) for name in overrides):
            raise error.__cause__ from None  # an argument that nobody knows
        raise
    for name, found, wanted in sorted(info["mismatched_keys"]):
        refuse(files[0], f"{name:.200} is {tuple(found)} and by {CONFIG} must be {tuple(wanted)}")
    _check_weights(model, files[0])
    for part in model.modules():  # what transformers notes only where it downloads by itself
        if isinstance(config := getattr(part, "config", None), PreTrainedConfig):
            config._commit_hash = revision_of(folder)
    return model.eval()


def _overridden(config_class: Any, folder: Path, overrides: dict[str, Any]) -> Any:
    try:
        return config_class.from_pretrained(folder, trust_remote_code=False, return_unused_kwargs=True, **overrides)[0]
    except (ValueError, TypeError, OSError):
        raise
    except Exception as error:  # strict fields raise their own
        raise ValueError(one_line(error)) from error


def _check_size(model_class: Any, config: Any, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Refuses a network far larger than its files, before it fills the memory."""
    for part in (config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))):
        for name in ("num_hidden_layers", "num_attention_heads"):
            value = getattr(part, name, None)
            if isinstance(value, int) and not 1 <= value <= max(len(shapes), 1024):
                refuse(path, f"{name} is {value} and there are {len(shapes)} weights in all")
    with naming(path), torch.device("meta"):  # takes no memory
        make = model_class.from_config if hasattr(model_class, "from_config") else model_class
        network = make(copy.deepcopy(config))
    wanted = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    held = sum(math.prod(shape) for shape in shapes.values())
    if wanted > TIMES_LARGER * held + A_FEW:
        refuse(path, f"it describes a network of {wanted:.3g} numbers, and the files hold {held:.3g}")


@torch.no_grad()
def _check_weights(model: Any, path: Path) -> None:
    """Refuses weights that are no finite floating-point numbers."""
    quantized = getattr(model, "hf_quantizer", None) is not None
    for name, weight in model.named_parameters():
        if not quantized and weight.dtype not in DTYPES:
            refuse(path, f"{name} is {str(weight.dtype).removeprefix('torch.')}, and weights must be floats")
        if not quantized:
            check_finite(path, name, weight)
    temperature = getattr(model, "temperature", None)
    if isinstance(temperature, torch.Tensor) and not temperature.is_meta and not temperature > 0:
        refuse(path, f"temperature is {float(temperature):.3g}, and scores would be divided by it")
    scale = getattr(model, "logit_scale", None)
    if isinstance(scale, torch.Tensor) and not scale.is_meta and not 0 < scale.float().exp() < math.inf:
        refuse(path, f"logit_scale is {float(scale):.3g}, and scores would be multiplied by its exponential")


# --------------------------------------------------------------------------------- tokenizer and pixels


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, of one of transformers' classes.

    Raises:
        CheckpointError: there is none, one of its files is broken, or it asks for code.
    """
    names = [name for name in TOKENIZER_FILES if (folder / name).exists() or (folder / name).is_symlink()]
    if not names:
        raise CheckpointError(
            f"folder {folder} holds no tokenizer (tokenizer.json and tokenizer_config.json); save it there with "
            "save_pretrained."
        )
    for name in names:
        path = own_file(folder, name)
        if path.suffix == ".json":
            read_json(path)
    if "tokenizer.json" in names:
        with naming(folder / "tokenizer.json", what="file of tokenizers"):
            PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    blamed = [name for name in names if name != "tokenizer.json"] or names
    with naming(*(folder / name for name in sorted(blamed, key=lambda name: name != "tokenizer_config.json"))):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def processor_file(folder: Path) -> Path:
    """The file that says how pixels are made."""
    found = [name for name in PROCESSOR_FILES if (folder / name).exists() or (folder / name).is_symlink()]
    return own_file(folder, found[0] if found else PROCESSOR_FILES[0])


def open_image_processor(folder: Path) -> SparImageProcessor:
    """The `SparImageProcessor` of a folder of ours.

    Raises:
        CheckpointError: there is none, its file is broken, or it is of another class.
    """
    path = processor_file(folder)
    stored = read_json(path)
    if path.name == PROCESSOR_FILES[0]:
        stored = stored.get("image_processor", {})
    with naming(path):
        if not isinstance(stored, dict):
            raise ValueError(f"image_processor is {stored!r:.80} and must be an object, {{...}}")
        kind = stored.get("image_processor_type")
        if kind != SparImageProcessor.__name__:
            raise ValueError(f"its image processor is {kind!r:.80} and must be {SparImageProcessor.__name__!r}")
        return SparImageProcessor.from_dict(stored)
