"""Ways to break a model's folder, drawn by hypothesis, and what must hold for each."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import spar_hf

READ = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
# What a field might hold by mistake or malice.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), 10**9, 10**18,
    -(10**18), 10**30, "", " ", "x", "sdpa", "kernels-community/flash-attn", "naclip", "gelu_new", "float16", "../x",
    "/etc/passwd", "é\ud800", "\x00", "a" * 3000, [], [1], [[]], ["a", "b"], [0.0, 0.0, 0.0], [1.0] * 3, [None] * 3,
    {}, {"a": 1}, {"a": {"b": []}}, {"": None}, [float("nan")] * 3, {"content": "x", "special": True},
)  # fmt: skip
EXTRA_FIELDS = (
    "quantization_config", "_attn_implementation", "attn_implementation", "auto_map", "transformers_weights", "dtype",
    "torch_dtype", "architectures", "model_type", "tokenizer_class", "image_processor_type", "processor_class",
    "pruned_heads", "output_attentions", "return_dict", "use_return_dict", "tie_word_embeddings", "id2label",
    "num_labels", "problem_type", "is_encoder_decoder", "vision_config_dict", "text_config_dict", "added_tokens",
    "added_tokens_decoder", "extra_special_tokens", "model_max_length", "chat_template", "name_or_path", "recipe",
    "fusion_config", "per_layer_config", "layer_types", "chunk_size_feed_forward", "text_padding", "templates",
)  # fmt: skip


def break_bytes(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    place = rng.randrange(max(len(content), 1))
    how = rng.choice(
        ("truncate", "flip", "flips", "head", "insert", "empty", "utf16", "bom", "zeros", "twice", "html")
    )
    if how == "truncate":
        content = content[:place]
    elif how in ("flip", "flips", "head"):
        changed = bytearray(content)
        for _ in range(1 if how == "flip" else 20):
            if changed:
                changed[rng.randrange(min(len(changed), 2000) if how == "head" else len(changed))] = rng.randrange(256)
        content = bytes(changed)
    elif how == "insert":
        content = content[:place] + rng.randbytes(rng.choice((1, 8, 300))) + content[place:]
    elif how == "utf16":
        content = content.decode("latin-1").encode("utf-16")
    else:
        content = {
            "empty": b"",
            "bom": b"\xef\xbb\xbf" + content,
            "zeros": bytes(len(content)),
            "twice": content * 2,
            "html": b"<!DOCTYPE html><html>404</html>",
        }[how]
    path.write_bytes(content)
    return how


def break_place(path: Path, rng: random.Random) -> str:
    how = rng.choice(("delete", "rename", "folder", "other", "link", "outside", "git-lfs"))
    content = path.read_bytes()
    path.unlink()
    if how == "rename":
        path.with_name(rng.choice(("x.json", f"{path.name}.bak", path.name.upper()))).write_bytes(content)
    elif how == "folder":
        path.mkdir()
    elif how == "other":
        shutil.copy(rng.choice([other for other in path.parent.iterdir() if other.is_file()]), path)
    elif how == "link":
        path.symlink_to("nowhere")
    elif how == "outside":
        target = path.parent.parent / "outside"
        target.write_bytes(content)
        path.symlink_to(target)
    elif how == "git-lfs":
        path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 598\n")
    return how


def places(content: Any, path: tuple = ()) -> list[tuple]:
    """Where values stand in a tree of JSON; of a long list the first and the last."""
    found = [path] if path else []
    if isinstance(content, dict):
        keys = list(content)
        for key in keys if len(keys) < 60 else [*keys[:2], *keys[-2:]]:
            found += places(content[key], (*path, key))
    elif isinstance(content, list):
        for index in {0, len(content) - 1} if content else ():
            found += places(content[index], (*path, index))
    return found


def break_json(path: Path, rng: random.Random) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    said = []
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        found = places(content)
        if not found:
            break
        where = rng.choice(found)
        holder = content
        for step in where[:-1]:
            holder = holder[step]
        how = rng.choice(("value", "value", "value", "delete", "swap", "add"))
        value = rng.choice(VALUES)
        if how == "value":
            holder[where[-1]] = value
        elif how == "delete":
            del holder[where[-1]]
        elif how == "swap":
            value = content
            for step in rng.choice(found):
                value = value[step]
            holder[where[-1]] = json.loads(json.dumps(value))
        elif isinstance(holder, dict):
            holder[rng.choice(EXTRA_FIELDS)] = value
        said.append(f"{how} {'.'.join(map(str, where))} {value!r:.60}")
    if rng.random() < 0.02:
        content = rng.choice(VALUES)
        said.append(f"all {content!r:.60}")
    path.write_text(json.dumps(content), encoding="utf-8")
    return "; ".join(said)


def break_weights(path: Path, rng: random.Random) -> str:
    weights = load_file(path)
    name = rng.choice(sorted(weights))
    weight = weights[name]
    how = rng.choice(("nan", "inf", "shape", "flat", "empty", "delete", "rename", "dtype", "scalar", "huge", "extra"))
    if how in ("nan", "inf"):
        weight.view(-1)[rng.randrange(weight.numel())] = float(how)
    elif how == "shape":
        weights[name] = torch.zeros([side + rng.choice((0, 1)) for side in weight.shape])
    elif how == "flat":
        weights[name] = weight.flatten()
    elif how == "empty":
        weights[name] = torch.zeros(0)
    elif how == "scalar":
        weights[name] = torch.tensor(1.0)
    elif how == "delete":
        del weights[name]
    elif how == "rename":
        weights[name + rng.choice(("x", ".weight", "\u00e9"))] = weights.pop(name)
    elif how == "dtype":
        kind = rng.choice((torch.int64, torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float64,
                           torch.float8_e4m3fn, torch.complex64))  # fmt: skip
        one = rng.random() < 0.5
        weights = {key: value.to(kind) if key == name or not one else value for key, value in weights.items()}
    elif how == "huge":
        weights[name] = weight * 1e30
    elif how == "extra":
        weights["extra\n\x1b[31m"] = torch.zeros(3)
    save_file(weights, path, metadata=rng.choice(({"format": "pt"}, {"format": "pt"}, None, {"format": "tf"})))
    return f"{how} {name}"


def break_folder(folder: Path, rng: random.Random) -> str:
    """Breaks one file of a folder, or two; says what was done."""
    said = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        files = sorted(
            path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".safetensors", ".bin")
        )
        if not files:
            break
        path = rng.choice(files)
        ways: list[Callable[[Path, random.Random], str]] = [break_bytes, break_place]
        if path.suffix == ".json":
            ways += [break_json] * 4
        elif path.suffix == ".safetensors":
            ways += [break_weights] * 2
        way = rng.choice(ways)
        try:
            said.append(f"{path.name}: {way(path, rng)}")
        except Exception:  # broken already, in a way that this way does not understand
            said.append(f"{path.name}: {break_bytes(path, rng)}")
    return ", ".join(said)


def loads_or_says(folder: Path) -> str | None:
    """Loads and runs what is in the folder. The message where it is refused, which must be one line about a file."""
    files = {path.name for path in folder.iterdir()} | {*READ, "model.safetensors", "model-0000"}
    try:
        model, processor = spar_hf.load(folder)
    except (ValueError, OSError) as error:
        message = str(error)
        assert message and message.isprintable() and len(message) < 1500, repr(message)
        assert str(folder) in message and any(name in message for name in files), message
        assert "Traceback" not in message and "trust_remote_code" not in message, message
        return message
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    with torch.no_grad():
        inputs = processor(images=image, size={"shortest_edge": 64})
        features = model.vision_model(inputs["pixel_values"]).patch_embeds
        words = processor.encode_labels(model, "sky; a red car", templates=["a photo of {}."])
    assert features.ndim == 4 and words.text_embeds.shape == (2, features.shape[-1])
    return None
