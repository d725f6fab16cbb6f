"""Trains `tiny`, the CLIP that ships with the package, from nothing on the picture book.

    python training/pretrain_tiny.py --output tiny                      # 70 minutes on two CPU cores
    python training/pretrain_tiny.py --output tiny --resume             # goes on after an interruption
    python training/pretrain_tiny.py --output tiny --steps 2700 --device cuda
    python training/pretrain_tiny.py --output tiny --evaluate_only      # writes native_evaluation.json again

One process draws views of training scenes (the whole scene, or a close-up of down to a sixth of its side, always
128 x 128 px) into a pool; the other trains on batches from the pool. Three losses share one temperature:

1. image-text contrast: the CLS embedding against the caption of the view;
2. patch-class alignment: every patch against the names of all classes (a random synonym in a random template), with
   the share of each class in the patch as target;
3. patch-phrase alignment: patches of things against phrases such as "red house" or "striped pink fish".

The patches of 2 and 3 come from the last block now through its values alone (MaskCLIP, ECCV 2022), now through its
attention, so that either way of reading the network names what it sees. No other grid than 8 x 8 patches is ever seen.
The folder gets the averaged weights (EMA), the tokenizer, the image processor, `train.log` and, at the end,
`native_evaluation.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import multiprocessing as mp
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_views import COLOUR_NAMES, GRID, NONE, PATCH_PX, SIDE_PX, Views, Words, draw_forever
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from spar_hf.arithmetic_spar import fast_half
from spar_hf.picture_book.dataset import CLASSES, COLOURS, HELD_OUT, NUM_THINGS, PATTERNS, PictureBook
from spar_hf.prompts_spar import IMAGENET_TEMPLATES

MAX_TEXT_TOKENS = 40
WARMUP_STEPS = 200
log = logging.getLogger("pretrain_tiny")


def train_tokenizer(seed: int, vocab_size: int = 1280) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's layout: 256 bytes, the same at the end of a word, merges, two marks.

    Every byte is a token, so that any text can be written; the merges come from names and phrases of the picture book,
    and end when all of its words are whole, or at `vocab_size`.
    """
    words = Words(np.random.default_rng(seed))
    rng = words.rng
    corpus = [words.prompt(words.name(int(rng.integers(len(CLASSES))))) for _ in range(20_000)]
    counts = (NUM_THINGS, len(COLOURS), len(PATTERNS))
    corpus += [words.prompt(words.phrase(*(int(rng.integers(n)) for n in counts))) for _ in range(20_000)]
    corpus += ["in front of the and on a an"] * 2_000
    marks = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # CLIPTokenizer splits and lower-cases as CLIP does; the trainer must see words split the same way.
    clip = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(alphabet) - len(marks),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # dict.fromkeys: two merges may give one token.
    tokens = dict.fromkeys([*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges)])
    vocab = {token: number for number, token in enumerate([*tokens, *marks])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TEXT_TOKENS)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP in stock shapes: image tower 192 x 6, text tower 128 x 3, a shared space of 128."""
    text = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": MAX_TEXT_TOKENS, "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "hidden_act": "gelu", "projection_dim": 128,
    }  # fmt: skip
    vision = {
        "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6,
        "image_size": SIDE_PX, "patch_size": PATCH_PX, "hidden_act": "gelu", "projection_dim": 128,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def encode_images(model: CLIPModel, pixel_values: torch.Tensor, by_value: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """CLS and patch embeddings in the text space, both of unit length.

    Args:
        model: The CLIP.
        pixel_values: (batch, 3, 128, 128).
        by_value: Patches of the last block through its values alone (MaskCLIP); else through its attention.

    Returns:
        image embeddings (batch, dim) and patch embeddings (batch, 64, dim).
    """
    vision = model.vision_model
    x = vision.pre_layrnorm(vision.embeddings(pixel_values))
    *body, last = vision.encoder.layers
    for layer in body:
        x = layer(x, attention_mask=None)
    tokens = last(x, attention_mask=None)
    image, patches = tokens[:, 0], tokens[:, 1:]
    if by_value:
        patches = x[:, 1:] + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(x[:, 1:])))
        patches = patches + last.mlp(last.layer_norm2(patches))
    image, patches = (model.visual_projection(vision.post_layernorm(t)) for t in (image, patches))
    return F.normalize(image.float(), dim=-1), F.normalize(patches.float(), dim=-1)


def encode_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Text embeddings of unit length, (texts, dim)."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TEXT_TOKENS, return_tensors="pt").to(
        model.device
    )
    return F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1)


def to_pixel_values(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """(batch, H, W, 3) uint8 -> (batch, 3, H, W) float, normalised as CLIPImageProcessor does."""
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std


def training_losses(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    views: Views,
    slots: np.ndarray,
    words: Words,
    by_value: bool,
    with_captions: bool,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The losses on one batch of the pool; and the share of pure patches (of all, of things) that are named right."""
    rng, device, batch = words.rng, model.device, len(slots)
    shares = views.shares[slots].reshape(batch, GRID, GRID, -1)
    images, flipped = views.images[slots], rng.random(batch) < 0.5
    images[flipped], shares[flipped] = images[flipped, :, ::-1], shares[flipped, :, ::-1]
    pixels = to_pixel_values(images, device)
    gain, offset = (torch.from_numpy(rng.normal(0, 0.1, (batch, 1, 1, 1)).astype(np.float32)).to(device) for _ in "ab")
    target = torch.from_numpy(shares.reshape(batch, GRID * GRID, -1)).to(device).float()
    target = target / target.sum(-1, keepdim=True)  # (batch, 64, classes)

    # The names are read at every step, captions and phrases in turn: text is a third of the cost otherwise.
    names = [words.prompt(words.name(class_id)) for class_id in range(len(CLASSES))]
    scale = model.logit_scale.exp().clamp(max=100)
    image_embeds, patch_embeds = encode_images(model, pixels * (1 + gain) + offset, by_value)
    losses = {}
    if with_captions:
        captions = [
            words.caption(views.things[slot][views.visible[slot]], views.stuff[slot][views.stuff[slot] != NONE])
            for slot in slots
        ]
        logits = scale * image_embeds @ encode_texts(model, tokenizer, captions).T
        diagonal = torch.arange(batch, device=device)
        losses["contrast"] = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
        name_embeds = encode_texts(model, tokenizer, names)
    else:
        with_pattern = rng.random() < 0.5
        phrase_of: dict[tuple[int, ...], int] = {}
        phrase_ids = torch.full((batch, NUM_THINGS), -1)  # of the thing of a class in a view, -1 where there is none
        for row, slot in enumerate(slots):
            for class_id, colour, pattern in views.things[slot][views.visible[slot]].tolist():
                key = (class_id, colour, pattern) if with_pattern else (class_id, colour)
                phrase_ids[row, class_id] = phrase_of.setdefault(key, len(phrase_of))
        phrases = [words.phrase(key[0], key[1], key[2] if with_pattern else None) for key in phrase_of]
        name_embeds, phrase_embeds = encode_texts(model, tokenizer, names + phrases).split([len(names), len(phrases)])
        share, class_ids = target[..., :NUM_THINGS].max(-1)  # (batch, 64)
        ids = phrase_ids.to(device).gather(1, class_ids)
        chosen = (share > 0.6) & (ids >= 0)
        losses["phrases"] = F.cross_entropy(scale * patch_embeds[chosen] @ phrase_embeds.T, ids[chosen])

    logits = scale * patch_embeds @ name_embeds.T  # (batch, 64, classes)
    losses["names"] = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))
    right = logits.argmax(-1) == target.argmax(-1)
    pure = target.amax(-1) > 0.9
    things = pure & (target.argmax(-1) < NUM_THINGS)
    return losses, {"accuracy": right[pure].float().mean(), "things": right[things].float().mean()}


@torch.no_grad()
def evaluate(
    model: CLIPModel, tokenizer: CLIPTokenizer, split: str, scenes: int, num_templates: int = 80
) -> dict[str, Any]:
    """mIoU (%) at the native size, MaskCLIP reading, over all classes; and the naming of colours on patches of things.

    The colour of a patch is the arg-max over "<colour> <thing>" for the nine colours, given the thing; it is reported
    apart for pairs that training shows and pairs that it never shows.
    """
    templates = IMAGENET_TEMPLATES[:num_templates]
    mean_embeds = torch.stack(
        [
            encode_texts(model, tokenizer, [t.format(name) for name in names for t in templates]).mean(0)
            for names in CLASSES
        ]
    )
    mean_embeds = F.normalize(mean_embeds, dim=-1)
    pairs = [f"{colour} {CLASSES[thing][0]}" for thing in range(NUM_THINGS) for colour in COLOURS]
    pair_embeds = encode_texts(model, tokenizer, pairs).view(NUM_THINGS, len(COLOURS), -1)
    confusion = np.zeros((len(CLASSES), len(CLASSES)))
    hits: dict[bool, list[float]] = {True: [], False: []}
    book = PictureBook(split, SIDE_PX, SIDE_PX)
    for start in range(0, scenes, 32):
        drawn = [book.scene(index) for index in range(start, min(start + 32, scenes))]
        _, patches = encode_images(model, to_pixel_values(np.stack([s.image for s in drawn]), model.device), True)
        grid = (patches @ mean_embeds.T).unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)  # (batch, classes, 8, 8)
        labels = F.interpolate(grid, (SIDE_PX, SIDE_PX), mode="bilinear").argmax(1).cpu().numpy()
        for scene, label, patch in zip(drawn, labels, patches, strict=True):
            cells = scene.mask.astype(np.int64) * len(CLASSES) + label
            confusion += np.bincount(cells.ravel(), minlength=confusion.size).reshape(confusion.shape)
            blocks = scene.mask.reshape(GRID, PATCH_PX, GRID, PATCH_PX).swapaxes(1, 2).reshape(GRID * GRID, -1)
            for thing in scene.things:
                inside = torch.from_numpy((blocks == thing.class_id).mean(1) > 0.6)
                if inside.any():
                    choice = (patch[inside.to(patch.device)] @ pair_embeds[thing.class_id].T).argmax(-1)
                    right = (choice == COLOUR_NAMES.index(thing.colour)).float().mean()
                    hits[(thing.class_id, COLOUR_NAMES.index(thing.colour)) in HELD_OUT].append(float(right))
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    iou = 100 * confusion.diagonal() / np.maximum(union, 1)
    seen = union > 0
    return {
        "split": split,
        "scenes": scenes,
        "miou": float(iou[seen].mean()),
        "miou_things": float(iou[:NUM_THINGS][seen[:NUM_THINGS]].mean()),
        "miou_stuff": float(iou[NUM_THINGS:][seen[NUM_THINGS:]].mean()),
        "pixel_accuracy": float(100 * confusion.diagonal().sum() / confusion.sum()),
        "colour_accuracy_seen_pairs": float(100 * np.mean(hits[False])),
        "colour_accuracy_unseen_pairs": float(100 * np.mean(hits[True])) if hits[True] else None,
        "iou": {names[0]: round(float(value), 1) for names, value in zip(CLASSES, iou, strict=True)},
    }


def save(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Writes the folder that `CLIPModel`, `CLIPTokenizer` and `CLIPImageProcessor` read with `from_pretrained`."""
    model.save_pretrained(folder)
    # The file would keep the padding and truncation of the last call.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    crop = {"height": SIDE_PX, "width": SIDE_PX}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size=crop).save_pretrained(folder)


def write_state(path: Path, model: CLIPModel, average: CLIPModel, optimizers: list, counts: dict[str, float]) -> None:
    """Everything that `--resume` needs, in one safetensors file, replaced at once."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for row, buffers in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number} {row} {name}": value for name, value in buffers.items()}
    draft = path.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, draft, {"counts": json.dumps(counts)})
    os.replace(draft, path)


def read_state(path: Path, model: CLIPModel, average: CLIPModel, optimizers: list) -> None:
    """Puts back what `write_state` wrote; the settings of the optimizers are those of this run."""
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in load_file(path).items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    model.load_state_dict(parts["model"])
    average.load_state_dict(parts["average"])
    buffers: list[dict[int, dict[str, torch.Tensor]]] = [defaultdict(dict) for _ in optimizers]
    for key, value in parts["optimizer"].items():
        number, row, name = key.split(" ")
        buffers[int(number)][int(row)][name] = value
    for optimizer, state in zip(optimizers, buffers, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(state)})


def make_optimizers(model: CLIPModel, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest; biases, norms and the temperature without decay."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    tables = [p for name, p in model.named_parameters() if p.ndim > 1 and not (p.ndim == 2 and ".layers." in name)]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # With this adjustment one learning rate serves both (Liu et al. 2025, Muon is scalable for LLM training).
    muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.98))]


def write_evaluation(folder: Path, counts: dict, model: CLIPModel, tokenizer: CLIPTokenizer, scenes: int) -> None:
    """Measures the weights on the test split and writes `native_evaluation.json` beside them."""
    result = {**counts, **evaluate(model, tokenizer, "test", scenes)}
    draft = folder / "native_evaluation.tmp"
    draft.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(draft, folder / "native_evaluation.json")
    log.info("test: mIoU %.1f, of things %.1f", result["miou"], result["miou_things"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights, the log and the state")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=70, help="time budget; the learning rate ends with it")
    budget.add_argument("--steps", type=int, help="budget in steps instead")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output")
    parser.add_argument("--evaluate_only", action="store_true", help="measure the weights in --output and stop")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--ema_decay", type=float, default=0.997)
    parser.add_argument("--pool_views", type=int, default=60_000, help="views kept in memory, 52 KB each")
    parser.add_argument("--save_minutes", type=float, default=5, help="time between saves, each with a validation")
    parser.add_argument("--test_scenes", type=int, default=512, help="scenes of the evaluation at the end")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(args.output / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    if args.evaluate_only:
        model, tokenizer = CLIPModel.from_pretrained(args.output), CLIPTokenizer.from_pretrained(args.output)
        write_evaluation(args.output, {}, model.to(args.device).eval(), tokenizer, args.test_scenes)
        return
    state_file = args.output / "state.safetensors"
    counts = {"step": 0, "views_seen": 0, "views_drawn": 0, "elapsed_s": 0.0}
    if args.resume:
        if not state_file.exists():
            sys.exit(f"--resume: there is no {state_file}; nothing was saved there. Leave --resume out to start anew.")
        with safe_open(state_file, "pt") as file:
            counts = json.loads(file.metadata()["counts"])
    drawn_before = counts["views_drawn"]

    # The drawing process is forked before PyTorch starts threads of its own.
    fork = mp.get_context("fork")
    views, drawn, used = Views.allocate(args.pool_views), fork.Value("q", 0), fork.Value("q", 0)
    fork.Process(target=draw_forever, args=(views, drawn, used, args.seed, drawn_before), daemon=True).start()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed)
    model = build_model(tokenizer).to(args.device)
    average = copy.deepcopy(model).eval()
    optimizers = make_optimizers(model, args.weight_decay)
    if args.resume:
        read_state(state_file, model, average, optimizers)
    words = Words(np.random.default_rng([args.seed, drawn_before]))
    log.info("%.2f M parameters, %d tokens", sum(p.numel() for p in model.parameters()) / 1e6, len(tokenizer))
    while drawn.value < min(2_000, args.pool_views):
        time.sleep(0.1)

    started_s = time.monotonic() - counts["elapsed_s"]
    saved_s, sums = counts["elapsed_s"], defaultdict(list)
    while True:
        counts["elapsed_s"] = time.monotonic() - started_s
        progress = counts["step"] / args.steps if args.steps else counts["elapsed_s"] / (60 * args.minutes)
        if progress >= 1:
            break
        step = counts["step"]
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * cosine
        slots = words.rng.choice(min(drawn.value, args.pool_views), args.batch_size, replace=False)
        with torch.autocast(args.device, torch.bfloat16, enabled=fast_half(args.device, torch.bfloat16)):
            losses, scores = training_losses(
                model, tokenizer, views, slots, words, by_value=step % 3 < 2, with_captions=step % 2 == 0
            )
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        used.value += args.batch_size
        step += 1
        counts |= {"step": step, "views_seen": counts["views_seen"] + args.batch_size}
        counts["views_drawn"] = drawn_before + drawn.value
        decay = min(args.ema_decay, (1 + step) / (10 + step))  # a young average forgets faster
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

        for key, value in (losses | scores).items():
            sums[key].append(value.item())
        if step % 25 == 0:
            means = "  ".join(f"{key} {np.mean(values):.3f}" for key, values in sums.items())
            log.info("step %d  views %d  %.1f min  %s", step, counts["views_seen"], counts["elapsed_s"] / 60, means)
            sums.clear()
        if counts["elapsed_s"] - saved_s > 60 * args.save_minutes:
            saved_s = counts["elapsed_s"]
            save(args.output, average, tokenizer)
            write_state(state_file, model, average, optimizers, counts)
            result = evaluate(average, tokenizer, "validation", 64, num_templates=4)
            log.info("validation: mIoU %.1f, of things %.1f", result["miou"], result["miou_things"])

    save(args.output, average, tokenizer)
    write_evaluation(args.output, counts, average, tokenizer, args.test_scenes)


if __name__ == "__main__":
    main()
