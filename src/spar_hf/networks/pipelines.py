"""Stable Diffusion's parts, from a pipeline in memory, a folder or the Hub: the only file that knows `diffusers`.

A pipeline is read part by part, each as a class that is known here; nothing of its own code runs, weights are
safetensors alone, and a safety checker is not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..checkpoint_files import check_finite, naming, own_file, read_json, refuse, shapes_of
from ..downloads import fetch_files
from ..extras import extra_package
from ..pretrained import open_model, open_tokenizer

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
EXAMPLE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def parts_of(pipeline: Any) -> dict[str, Any]:
    """The parts of a pipeline in memory, if they are of the kinds that this file knows."""
    diffusers: Any = extra_package("diffusers", "diffusion")
    parts: dict[str, Any] = {
        name: getattr(pipeline, name, None)
        for name in ("unet", "vae", "scheduler", "tokenizer", "tokenizer_2", *TEXT_CLASSES)
    }
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL, **TEXT_CLASSES}
    for name, kind in kinds.items():
        _check_kind(name, type(parts[name]).__name__ if parts[name] is not None else None, kind)
    parts["scheduler"] = diffusers.DDIMScheduler.from_config(parts["scheduler"].config)
    return parts


def _check_kind(name: str, found: str | None, kind: type) -> None:
    if found != kind.__name__ and not (found is None and name == "text_encoder_2"):
        raise ValueError(
            f"the diffusion model's {name} is {'missing' if found is None else f'a {found}'} and must be a "
            f"{kind.__name__}; give Stable Diffusion 1, 2 or XL, such as {EXAMPLE}."
        )


def load_parts(name: str) -> dict[str, Any]:
    """The parts of a pipeline by the id or folder it was saved to; nothing of its own code runs."""
    diffusers: Any = extra_package("diffusers", "diffusion")
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ValueError(
            f"there is no folder {name} of a diffusion model; give one that save_pretrained wrote, or an id of the "
            f"Hub such as {EXAMPLE}."
        )
    folder = fetch_files(name, (INDEX,))
    index = read_json(own_file(folder, INDEX))
    classes = {part: (entry or [None, None])[1] for part, entry in index.items() if isinstance(entry, list | None)}
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    for part, kind in {**kinds, **TEXT_CLASSES}.items():
        _check_kind(part, classes.get(part), kind)
    towers = [part for part in TEXT_CLASSES if classes.get(part)]
    wanted = [f"{part}/{file}" for part in kinds for file in ("config.json", WEIGHTS)]
    wanted += [f"{part}/{file}" for part in towers for file in ("config.json", "model.safetensors")]
    wanted += [f"{part.replace('text_encoder', 'tokenizer')}/*" for part in towers]
    folder = fetch_files(name, (INDEX, "scheduler/scheduler_config.json", *wanted))
    parts: dict[str, Any] = {part: _open_part(kind, folder / part) for part, kind in kinds.items()}
    for part in towers:
        parts[part] = open_model(TEXT_CLASSES[part], folder / part)
        parts[part.replace("text_encoder", "tokenizer")] = open_tokenizer(
            folder / part.replace("text_encoder", "tokenizer")
        )
    with naming(folder / "scheduler" / "scheduler_config.json"):
        config = read_json(own_file(folder / "scheduler", "scheduler_config.json"))
        parts["scheduler"] = diffusers.DDIMScheduler.from_config(config)
    return parts


def _open_part(kind: Any, folder: Path) -> Any:
    """A model of diffusers from its folder, whole and finite."""
    path = own_file(folder, WEIGHTS)
    shapes_of(path)  # diffusers says of a broken file only that it could not load it
    read_json(own_file(folder, "config.json"))
    with naming(path, folder / "config.json"):
        model, info = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    if info["missing_keys"]:
        refuse(path, f"it lacks {sorted(info['missing_keys'])[0]:.200}, which config.json asks for")
    for name, weight in model.state_dict().items():
        check_finite(path, name, weight)
    return model
