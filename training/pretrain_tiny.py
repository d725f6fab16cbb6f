"""Trains `tiny`, the CLIP that ships with the package, from nothing on the picture book, on two CPU cores.

    python training/pretrain_tiny.py --output .work/tiny --minutes 70
    python training/pretrain_tiny.py --output .work/tiny --resume            # goes on after an interruption

One process draws views of training scenes (the whole scene, or a close-up of down to a sixth of its side, always
128 x 128 px) into a pool; the other draws batches from the pool. Three losses share one temperature:

1. image-text contrast: the CLS embedding against the caption of the view;
2. patch-class alignment: every patch against the names of all classes (a random synonym in a random template), with the
   share of each class in the patch as target;
3. patch-phrase alignment: patches of things against phrases such as "red house" or "striped pink fish".

The patches of 2 and 3 come from the last block in turn through its values alone (MaskCLIP, ECCV 2022) and through its
attention, so that either way of reading the network names what it sees. Saved are the averaged weights (EMA).
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import mmap
import multiprocessing as mp
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from spar_hf.data.picture_book import CLASSES, COLOURS, HELD_OUT, NUM_THINGS, PATTERNS, PictureBook

SIDE_PX, PATCH_PX = 128, 16
GRID = SIDE_PX // PATCH_PX
MAX_ZOOM = 6.0
MAX_THINGS, MAX_STUFF, NONE = 5, 4, 255
COLOUR_NAMES = tuple(COLOURS)
TEMPLATES_FILE = Path(__file__).parents[1] / "src" / "spar_hf" / "data" / "templates.json"
log = logging.getLogger("pretrain_tiny")


# --- Views: drawn by one process, read by the other ---------------------------------------------------------------


class Views(NamedTuple):
    """Arrays over views, shared by the two processes. Things are rows of (class, colour, pattern); 255 is none."""

    images: np.ndarray  # (views, 128, 128, 3) uint8
    shares: np.ndarray  # (views, 64, classes) uint8: how much of a patch shows each class, 255 for all of it
    things: np.ndarray  # (views, 5, 3) uint8, the things of the scene
    visible: np.ndarray  # (views, 5) bool, those of them that cover at least 2 % of the view
    stuff: np.ndarray  # (views, 4) uint8, class ids of the stuff that covers at least 4 % of the view

    @classmethod
    def allocate(cls, views: int) -> Views:
        """Anonymous shared memory: a forked process sees the same arrays."""

        def shared(dtype: type, *shape: int) -> np.ndarray:
            count = int(np.prod(shape))
            return np.frombuffer(mmap.mmap(-1, count), dtype=dtype).reshape(shape)

        return cls(
            shared(np.uint8, views, SIDE_PX, SIDE_PX, 3),
            shared(np.uint8, views, GRID * GRID, len(CLASSES)),
            shared(np.uint8, views, MAX_THINGS, 3),
            shared(np.bool_, views, MAX_THINGS),
            shared(np.uint8, views, MAX_STUFF),
        )

    def write(self, slot: int, book: PictureBook, index: int, zoom: float, at: np.ndarray) -> None:
        """Draws a view of a scene: 1 / zoom of its side, at a place from (0, 0), top left, to (1, 1)."""
        sketch = book.sketch(index)
        drawing = sketch.draw(SIDE_PX, SIDE_PX, tuple(at * (1 - 1 / zoom)), SIDE_PX * zoom)
        patch = np.arange(GRID).repeat(PATCH_PX)
        cells = (patch[:, None] * GRID + patch[None]) * len(CLASSES) + drawing.mask  # (128, 128)
        counts = np.bincount(cells.ravel(), minlength=GRID * GRID * len(CLASSES)).reshape(GRID * GRID, len(CLASSES))
        area = counts.sum(axis=0) / drawing.mask.size
        self.images[slot] = drawing.image
        self.shares[slot] = np.minimum(counts, 255)
        self.things[slot], self.stuff[slot], self.visible[slot] = NONE, NONE, False
        for number, thing in enumerate(sketch.placements):
            self.things[slot, number] = thing.class_id, thing.colour_id, thing.pattern_id
            self.visible[slot, number] = area[thing.class_id] > 0.02
        ground = [class_id for class_id in range(NUM_THINGS, len(CLASSES)) if area[class_id] > 0.04]
        self.stuff[slot, : len(ground)] = ground


def draw_forever(views: Views, drawn: mp.Value, used: mp.Value, seed: int, first_index: int) -> None:
    """The drawing process: keeps ahead of training by 4 000 views and 0.75 views for each one used, in a ring.

    Two views of five are whole scenes; the zoom of the others is log-uniform.
    """
    os.setsid()  # with its own share of the cores, apart from training
    os.nice(5)
    book = PictureBook("train", SIDE_PX, SIDE_PX, seed)
    index = first_index
    while os.getppid() != 1:  # until the training process is gone
        if drawn.value > 4_000 + 0.75 * used.value:
            time.sleep(0.05)
            continue
        rng = np.random.default_rng([seed, index])
        zoom = 1.0 if rng.random() < 0.4 else MAX_ZOOM ** rng.random()
        views.write(drawn.value % len(views.images), book, index, zoom, rng.random(2))
        drawn.value += 1
        index += 1


# --- Words ----------------------------------------------------------------------------------------------------------


class Words:
    """Turns what a view shows into English, with synonyms and templates at random."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.templates: list[str] = json.loads(TEMPLATES_FILE.read_text())["templates"]

    def name(self, class_id: int) -> str:
        return str(self.rng.choice(CLASSES[class_id]))

    def prompt(self, phrase: str) -> str:
        """The bare phrase, or the phrase in one of the 80 templates."""
        return phrase if self.rng.random() < 0.25 else str(self.rng.choice(self.templates)).format(phrase)

    def phrase(self, class_id: int, colour: int, pattern: int | None) -> str:
        adjectives = [COLOUR_NAMES[colour]]
        if pattern is not None and (pattern > 0 or self.rng.random() < 0.3):
            adjectives.insert(int(self.rng.integers(2)), PATTERNS[pattern])
        return " ".join([*adjectives, self.name(class_id)])

    def caption(self, things: np.ndarray, stuff: np.ndarray) -> str:
        """"a red house and a striped fish on the grass". Shapes: things (n, 3), stuff (m,)."""
        phrases = []
        for class_id, colour, pattern in self.rng.permutation(things)[:4]:
            style = self.rng.random()
            words = self.phrase(class_id, colour, pattern if style < 0.4 else None)
            if 0.4 < style < 0.55:
                words = self.name(class_id)
            elif 0.55 < style < 0.7 and pattern > 0:
                words = f"{PATTERNS[pattern]} {self.name(class_id)}"
            phrases.append(f"{'an' if words[0] in 'aeiou' else 'a'} {words}")
        ground = " and ".join(self.name(class_id) for class_id in self.rng.permutation(stuff)[:3])
        if not phrases:
            return ground
        separator = " and " if self.rng.random() < 0.7 else ", "
        preposition = self.rng.choice([" on the ", " on ", " in front of "])
        return separator.join(phrases) + (f"{preposition}{ground}" if ground else "")


def train_tokenizer(seed: int, vocab_size: int = 1280) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's layout: 256 bytes, the same at the end of a word, merges, two marks."""
    words = Words(np.random.default_rng(seed))
    rng = words.rng
    corpus = [words.prompt(words.name(int(rng.integers(len(CLASSES))))) for _ in range(20_000)]
    corpus += [words.prompt(words.phrase(*(int(rng.integers(n)) for n in (NUM_THINGS, len(COLOURS), len(PATTERNS)))))
               for _ in range(20_000)]  # fmt: skip
    corpus += ["in front of the and on a an"] * 2_000
    marks = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # CLIPTokenizer splits and lower-cases as CLIP does; the trainer must see words split the same way.
    clip = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 256 - len(marks), initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    known = set(tokens)
    kept = []
    for pair in merges:
        token = "".join(pair)
        if len(tokens) == vocab_size - len(marks):
            break
        kept.append(pair)
        if token not in known:
            known.add(token)
            tokens.append(token)
    vocab = {token: number for number, token in enumerate([*tokens, *marks])}
    return CLIPTokenizer(vocab=vocab, merges=kept, model_max_length=40)


# --- Model ----------------------------------------------------------------------------------------------------------


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP in stock shapes: image tower 192 x 6, text tower 128 x 3, a shared space of 128."""
    text = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 40, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "hidden_act": "gelu",
        "projection_dim": 128,
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
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt").to(model.device)
    return F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1)


def to_pixel_values(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """(batch, H, W, 3) uint8 -> (batch, 3, H, W) float, normalised as CLIPImageProcessor does."""
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std


# --- Losses ---------------------------------------------------------------------------------------------------------


def training_losses(
    model: CLIPModel, tokenizer: CLIPTokenizer, views: Views, slots: np.ndarray, words: Words, by_value: bool,
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
        captions = [words.caption(views.things[s][views.visible[s]], views.stuff[s][views.stuff[s] != NONE]) for s in slots]
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


# --- Evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: CLIPModel, tokenizer: CLIPTokenizer, split: str, scenes: int, num_templates: int = 80) -> dict:
    """mIoU (%) at the native size, MaskCLIP reading, over all classes; and the naming of colours on patches of things.

    The colour of a patch is the arg-max over "<colour> <thing>" for the nine colours, given the thing; it is reported
    apart for pairs that training shows and pairs that it never shows.
    """
    templates = json.loads(TEMPLATES_FILE.read_text())["templates"][:num_templates]
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


# --- The loop -------------------------------------------------------------------------------------------------------


def save(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Writes the folder that `CLIPModel.from_pretrained` and `CLIPTokenizer.from_pretrained` read."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE_PX, "width": SIDE_PX}
    CLIPImageProcessor(size={"shortest_edge": SIDE_PX}, crop_size=size).save_pretrained(folder)


def write_atomically(path: Path, content: str) -> None:
    draft = path.with_suffix(path.suffix + ".tmp")
    draft.write_text(content)
    os.replace(draft, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights, the log and the state")
    parser.add_argument("--minutes", type=float, default=70, help="time budget; the learning rate ends with it")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--pool_views", type=int, default=60_000, help="views kept in memory, 52 KB each")
    parser.add_argument("--save_minutes", type=float, default=5)
    parser.add_argument("--threads", type=int, default=1, help="for training; drawing has a core of its own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--muon", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(arguments.output / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    state_file = arguments.output / "state.pt"
    state = torch.load(state_file, weights_only=True) if arguments.resume else None

    # The drawing process is forked before PyTorch starts threads of its own.
    views = Views.allocate(arguments.pool_views)
    drawn, used = (mp.get_context("fork").Value("q", 0) for _ in range(2))
    first_index = state["next_index"] if state else 0
    artist = mp.get_context("fork").Process(
        target=draw_forever, args=(views, drawn, used, arguments.seed, first_index), daemon=True
    )
    artist.start()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.seed)
    model = build_model(tokenizer).to(arguments.device)
    average = copy.deepcopy(model).eval()
    words = Words(np.random.default_rng([arguments.seed, first_index]))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    ids = {id(p) for p in matrices}
    decayed = [p for p in model.parameters() if p.ndim > 1 and id(p) not in ids]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": arguments.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers = []
    if arguments.muon:
        optimizers.append(torch.optim.Muon(matrices, lr=1, weight_decay=arguments.weight_decay, momentum=0.95,
                                           adjust_lr_fn="match_rms_adamw"))
    else:
        groups[0]["params"] += matrices
    optimizers.append(torch.optim.AdamW(groups, lr=1, betas=(0.9, 0.98)))
    step, seen, elapsed_s = 0, 0, 0.0
    if state:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for o, so in zip(optimizers, state["optimizers"]):
            o.load_state_dict(so)
        step, seen, elapsed_s = state["step"], state["seen"], state["elapsed_s"]
    while drawn.value < 2_000:
        time.sleep(0.1)
    log.info("model: %.2f M parameters; %d tokens", sum(p.numel() for p in model.parameters()) / 1e6, len(tokenizer))

    started, budget_s = time.monotonic() - elapsed_s, arguments.minutes * 60
    last_save_s, sums = elapsed_s, {}
    while (elapsed_s := time.monotonic() - started) < budget_s:
        progress = elapsed_s / budget_s
        warmup = min(1.0, (step + 1) / 200)
        lr = arguments.learning_rate * warmup * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = lr
        slots = words.rng.choice(min(drawn.value, arguments.pool_views), arguments.batch_size, replace=False)
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.bf16):
            losses, scores = training_losses(
                model, tokenizer, views, slots, words, by_value=step % 3 < 2, with_captions=step % 2 == 0
            )
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad()
        step, seen = step + 1, seen + arguments.batch_size
        used.value += arguments.batch_size
        decay = min(0.997, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

        for key, value in (losses | scores).items():
            total, count = sums.get(key, (0.0, 0))
            sums[key] = (total + value.item(), count + 1)
        if step % 25 == 0:
            text = "  ".join(f"{key} {total / count:.3f}" for key, (total, count) in sums.items())
            log.info("step %d  seen %d  drawn %d  %.1f min  %s  scale %.1f  lr %.1e", step, seen, drawn.value,
                     elapsed_s / 60, text, model.logit_scale.exp(), lr)
            sums = {}
        if elapsed_s - last_save_s > arguments.save_minutes * 60:
            last_save_s = elapsed_s
            save(arguments.output, average, tokenizer)
            draft = state_file.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "average": average.state_dict(),
                        "optimizers": [o.state_dict() for o in optimizers],
                        "step": step, "seen": seen, "elapsed_s": elapsed_s,
                        "next_index": first_index + drawn.value}, draft)
            os.replace(draft, state_file)
            result = evaluate(average, tokenizer, "validation", 64, num_templates=4)
            log.info("validation: %s", {k: v for k, v in result.items() if k != "iou"})
    save(arguments.output, average, tokenizer)
    result = {"steps": step, "views_seen": seen, "views_drawn": first_index + drawn.value,
              **evaluate(average, tokenizer, "test", 512)}
    write_atomically(arguments.output / "native_evaluation.json", json.dumps(result, indent=1) + "\n")
    log.info("test: %s", {k: v for k, v in result.items() if k != "iou"})


if __name__ == "__main__":
    main()
