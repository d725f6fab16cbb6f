"""Trains `tiny`, the CLIP that ships with the package, from nothing on the picture book.

examples:
  python training/pretrain_tiny.py --output .work/tiny
      70 minutes on two CPU cores
  python training/pretrain_tiny.py --output .work/tiny --resume
      goes on after an interruption
  python training/pretrain_tiny.py --output .work/tiny --steps 2700 --device cuda
  python training/pretrain_tiny.py --output .work/tiny --evaluate-only
      writes native_evaluation.json again
  python training/pretrain_tiny.py --output .work/captions --losses contrast --blocks 12 --minutes 480
      from whole pictures and captions alone, as CLIP was trained: a night on two CPU cores

One process draws views of training scenes (the whole scene, or a close-up of down to a sixth of its side, always
128 x 128 px) into a pool; the other trains on batches from the pool. Three losses share one temperature:

1. image-text contrast: the CLS embedding against the caption of the view;
2. patch-class alignment: every patch against the names of all classes (a random synonym in a random template), with
   the share of each class in the patch as target;
3. patch-phrase alignment: patches of things against phrases such as "red house" or "striped pink fish".

The patches of 2 and 3 come from the last block now through its values alone (MaskCLIP, ECCV 2022), now through its
attention, so that either way of reading the network names what it sees. `--losses contrast` is the first alone, which
says of no thing where it is. No other grid than 8 x 8 patches is ever seen.
OUTPUT/model gets the averaged weights (EMA), tokenizer and image processor; OUTPUT gets `train.log` and, at the end,
`native_evaluation.json`.

exit status: 0; 2 after a mistake, before anything is written; 128 + the number of the signal (130 for Ctrl-C, 143 for
SIGTERM) when one stopped the run, which then has saved its state.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import multiprocessing as mp
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tiny_model import MAX_TEXT_TOKENS, build_model, make_optimizers, put_back, state_of, train_tokenizer
from tiny_views import COLOUR_NAMES, GRID, NONE, PATCH_PX, SIDE_PX, Views, Words, draw_forever
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from spar_cli.errors import caught_signals
from spar_cli.parser import Parser, fraction, path, positive, positive_or_0, whole_number, whole_number_or_0
from spar_cli.training_options import check_folder, run_script, script_parser
from spar_hf.arithmetic_spar import fast_half
from spar_hf.files import clear_drafts, read_state, whole_folder, write_json, write_state
from spar_hf.picture_book.dataset import CLASSES, COLOURS, HELD_OUT, NUM_THINGS, PictureBook
from spar_hf.prompts_spar import IMAGENET_TEMPLATES

WARMUP_STEPS = 200
FIRST_VIEWS = 2_000  # in the pool before training starts
log = logging.getLogger("pretrain_tiny")


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
    with_patches: bool,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The losses on one batch of the pool, and shares: of pure patches (of all, of things) that are named right, or
    of views whose own caption is the nearest, where patches are left alone."""
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
        if not with_patches:
            return losses, {"matched": (logits.argmax(-1) == diagonal).float().mean()}
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
    # The file would keep the padding and truncation of the last call.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    crop = {"height": SIDE_PX, "width": SIDE_PX}
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size=crop)
    with whole_folder(folder) as draft:
        for part in (model, tokenizer, processor):
            part.save_pretrained(draft)


def write_evaluation(folder: Path, counts: dict, model: CLIPModel, tokenizer: CLIPTokenizer, scenes: int) -> None:
    """Measures the weights on the test split and writes `native_evaluation.json` beside them."""
    result = {**counts, **evaluate(model, tokenizer, "test", scenes)}
    write_json(folder / "native_evaluation.json", result)
    log.info("test: mIoU %.1f, of things %.1f", result["miou"], result["miou_things"])


def parser() -> Parser:
    parser = script_parser(__doc__, "--output FOLDER")
    count = {"type": whole_number, "metavar": "N"}
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER", help="for weights, log and state")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--minutes", type=positive, metavar="M", default=70, help="the learning rate ends with it (70)"
    )
    budget.add_argument("--steps", **count, help="budget in steps instead")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--resume", action="store_true", help="go on from the state in --output, if any")
    which.add_argument("--evaluate-only", action="store_true", help="measure the weights in --output and stop")
    parser.add_argument("--losses", choices=("all", "contrast"), default="all", help="the three, or the first (all)")
    parser.add_argument("--blocks", **count, default=6, help="of the image tower (6)")
    parser.add_argument("--width", **count, default=192, help="of the image tower, a multiple of 32 (192)")
    parser.add_argument("--batch-size", **count, default=64, help="(64)")
    parser.add_argument("--learning-rate", type=positive, metavar="R", default=1.5e-3, help="(1.5e-3)")
    parser.add_argument("--weight-decay", type=positive_or_0, metavar="R", default=0.05, help="(0.05)")
    parser.add_argument("--ema-decay", type=fraction, metavar="F", default=0.997, help="(0.997)")
    parser.add_argument("--pool-views", **count, default=60_000, help="views kept in memory, 52 KB each (60000)")
    parser.add_argument(
        "--save-minutes", type=positive, metavar="M", default=5, help="between saves, each validated (5)"
    )
    parser.add_argument("--test-scenes", **count, default=512, help="of the evaluation at the end (512)")
    parser.add_argument("--threads", **count, default=2, help="(2)")
    parser.add_argument("--device", type=device, default="cpu", help="(cpu)")
    parser.add_argument("--seed", type=whole_number_or_0, metavar="N", default=0, help="(0)")
    return parser


def device(word: str) -> str:
    """An argparse type: a device that this machine has."""
    try:
        torch.empty(0, device=word)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"it is {word!r}; this machine has none of that name") from None
    return torch.device(word).type


def main(args: argparse.Namespace) -> int:
    state_file, tensors = args.output / "state.safetensors", None
    counts = {"step": 0, "views_seen": 0, "views_drawn": 0, "elapsed_s": 0.0}
    check_folder("--output", args.output)
    if args.width % 32:
        raise ValueError(f"--width is {args.width}; it must be a multiple of 32, the width of an attention head.")
    if args.batch_size > min(FIRST_VIEWS, args.pool_views):
        raise ValueError(
            f"--batch-size is {args.batch_size}; the pool starts with {min(FIRST_VIEWS, args.pool_views)}."
        )
    if args.evaluate_only:
        folder = args.output / "model"
        if not folder.is_dir():
            raise ValueError(f"--evaluate-only: there is no {folder}.")
        model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
        write_evaluation(args.output, {}, model.to(args.device).eval(), tokenizer, args.test_scenes)
        return 0
    if args.resume and state_file.exists():
        counts, tensors = read_state(state_file)
    elif state_file.exists():
        raise ValueError(f"{args.output} holds a run; add --resume to go on with it, or choose another --output.")
    args.output.mkdir(parents=True, exist_ok=True)
    clear_drafts(args.output)
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(args.output / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    drawn_before = counts["views_drawn"]

    # The drawing process is forked before PyTorch starts threads of its own.
    fork = mp.get_context("fork")
    views, drawn, used = Views.allocate(args.pool_views), fork.Value("q", 0), fork.Value("q", 0)
    fork.Process(target=draw_forever, args=(views, drawn, used, args.seed, drawn_before), daemon=True).start()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed)
    model = build_model(tokenizer, args.width, args.blocks).to(args.device)
    average = copy.deepcopy(model).eval()
    optimizers = make_optimizers(model, args.weight_decay)
    if tensors is not None:
        put_back(tensors, model, average, optimizers)
    words = Words(np.random.default_rng([args.seed, drawn_before]))
    log.info("%.2f M parameters, %d tokens", sum(p.numel() for p in model.parameters()) / 1e6, len(tokenizer))
    while drawn.value < min(FIRST_VIEWS, args.pool_views):
        time.sleep(0.1)

    started_s = time.monotonic() - counts["elapsed_s"]
    saved_s, sums = counts["elapsed_s"], defaultdict(list)
    with caught_signals() as stops:
        while not stops:
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
                    model,
                    tokenizer,
                    views,
                    slots,
                    words,
                    by_value=step % 3 < 2,
                    with_captions=args.losses == "contrast" or step % 2 == 0,
                    with_patches=args.losses == "all",
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
                log.info(
                    "step %d  views %d  %.1f min  %s", step, counts["views_seen"], counts["elapsed_s"] / 60, means
                )
                sums.clear()
            if counts["elapsed_s"] - saved_s > 60 * args.save_minutes:
                saved_s = counts["elapsed_s"]
                save(args.output / "model", average, tokenizer)
                write_state(state_file, state_of(model, average, optimizers), counts)
                result = evaluate(average, tokenizer, "validation", 64, num_templates=4)
                log.info("validation: mIoU %.1f, of things %.1f", result["miou"], result["miou_things"])

    write_state(state_file, state_of(model, average, optimizers), counts)
    if stops:
        name = signal.Signals(stops[0]).name
        log.info("stopped by %s after step %d; the same command with --resume goes on", name, counts["step"])
        return 128 + stops[0]
    save(args.output / "model", average, tokenizer)
    write_evaluation(args.output, counts, average, tokenizer, args.test_scenes)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(parser(), main))
