"""Trains a small Stable Diffusion of the picture book, for the methods that read one: an autoencoder, then the UNet.

examples:
  python training/pretrain_diffusion.py --output .work/diffusion
      its budget, 105 minutes; it was not yet run to its end
  python training/pretrain_diffusion.py --output .work/diffusion --resume
      goes on after an interruption
  python training/pretrain_diffusion.py --output .work/diffusion --vae-steps 4000 --steps 40000 --device cuda
  spar segment page.png --labels "house; grass" --method diffsegmenter --network diffusion=.work/diffusion/model

Pictures are views of training scenes of 128 x 128 px, as for `pretrain_tiny.py`, drawn by a process of its own; the
words are captions, lists of names and single names, and their tower is `tiny`'s, as it is. The autoencoder makes
latents of 4 x 32 x 32, the UNet has Stable Diffusion's blocks: grids of 32, 16, 8 and 4, and predicts the noise of
1000 steps. OUTPUT/model gets a pipeline that `diffusers` loads (averaged weights), OUTPUT `train.log` and the state.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrain_tiny import device
from tiny_model import put_back, state_of
from tiny_views import NONE, SIDE_PX, Views, Words, draw_forever
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from spar_cli.errors import caught_signals
from spar_cli.parser import Parser, fraction, path, positive, whole_number, whole_number_or_0
from spar_cli.training_options import check_folder, run_script, script_parser
from spar_hf import load
from spar_hf.arithmetic_spar import fast_half
from spar_hf.extras import extra_package
from spar_hf.files import clear_drafts, read_state, whole_folder, write_state

LATENT_CHANNELS, LATENT_SIDE = 4, 32
VAE_WIDTHS, UNET_WIDTHS, HEADS = (16, 32, 64), (32, 64, 96, 96), 4
KL_WEIGHT = 1e-6
TRAIN_STEPS = 1000
SAMPLING = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's
WARMUP_STEPS = 100
FIRST_VIEWS = 1_000  # in the pool before training starts
log = logging.getLogger("pretrain_diffusion")


# -------------------------------------------------------------------------------------------- networks


def build_vae() -> Any:
    """An autoencoder of Stable Diffusion's kind: four pixels of the picture to one of the latent."""
    levels = len(VAE_WIDTHS)
    return extra_package("diffusers", "diffusion").AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=VAE_WIDTHS,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIDE_PX,
    )


def build_unet(text_width: int) -> Any:
    """A UNet with Stable Diffusion's blocks."""
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    return extra_package("diffusers", "diffusion").UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in down[::-1]),
        block_out_channels=UNET_WIDTHS,
        norm_num_groups=16,
        attention_head_dim=HEADS,  # diffusers' name for their number
        cross_attention_dim=text_width,
    )


def text_side() -> tuple[CLIPTextModel, Any]:
    """`tiny`'s text tower as a part of a pipeline, and its tokenizer."""
    model, processor = load("tiny")
    tower = CLIPTextModel(model.config.text_config)
    tower.load_state_dict(model.text_model.state_dict() if _is_flat(tower) else _prefixed(model))
    return tower.eval().requires_grad_(False), processor.tokenizer


def _is_flat(tower: nn.Module) -> bool:
    return not any(name.startswith("text_model.") for name in tower.state_dict())


def _prefixed(model: Any) -> dict[str, Tensor]:
    return {f"text_model.{name}": value for name, value in model.text_model.state_dict().items()}


def save(folder: Path, vae: nn.Module, unet: nn.Module, tower: nn.Module, tokenizer: Any) -> None:
    """Writes the folder that `StableDiffusionPipeline.from_pretrained` and `--network diffusion=FOLDER` read."""
    diffusers = extra_package("diffusers", "diffusion")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=tower,
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(**BETAS, **SAMPLING, num_train_timesteps=TRAIN_STEPS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with whole_folder(folder) as draft:
        pipeline.save_pretrained(draft)


# ---------------------------------------------------------------------------------------------- losses


class Batches:
    """Pixels and words of random views.

    Args:
        views, drawn: the pool and how many views were ever written to it.
        words: makes English of what a view shows.
        size: of a batch.
        place: the device.
    """

    def __init__(self, views: Views, drawn: Any, words: Words, size: int, place: str) -> None:
        self.views, self.drawn, self.words, self.size, self.place = views, drawn, words, size, place

    def __call__(self) -> tuple[Tensor, list[str]]:
        """Pixels (B, 3, 128, 128) from -1 to 1, half of them mirrored, and a text for each."""
        rng = self.words.rng
        slots = rng.choice(min(self.drawn.value, len(self.views.images)), self.size, replace=False)
        images, flipped = self.views.images[slots], rng.random(self.size) < 0.5
        images[flipped] = images[flipped, :, ::-1]
        pixels = torch.from_numpy(images).to(self.place).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels, [self.text(slot) for slot in slots]

    def text(self, slot: int) -> str:
        """A caption, a list of all names, one name, or nothing, so that the network knows pictures without words."""
        views, words = self.views, self.words
        things, stuff = views.things[slot][views.visible[slot]], views.stuff[slot][views.stuff[slot] != NONE]
        kind = words.rng.random()
        names = [words.name(class_id) for class_id in words.rng.permutation([*things[:, 0], *stuff])]
        if kind < 0.1 or not names:
            return ""
        if kind < 0.6:
            return words.caption(things, stuff)
        return f"a photograph of {names[0]}" if kind < 0.75 else " and ".join(names)


def vae_loss(vae: Any, pixels: Tensor) -> Tensor:
    """Mean absolute error of the pictures, and a little of the latents' divergence from a normal distribution."""
    posterior = vae.encode(pixels).latent_dist
    found = vae.decode(posterior.sample()).sample
    return (found - pixels).abs().mean() + KL_WEIGHT * posterior.kl().mean()


def unet_loss(unet: Any, latents: Tensor, states: Tensor, alphas: Tensor) -> Tensor:
    """Mean squared error of the noise at steps drawn evenly.

    Args:
        unet: the network.
        latents: (B, 4, 32, 32), of variance 1.
        states: (B, L, C), the words.
        alphas: (1000), how much of the picture's variance a step leaves.
    """
    step = torch.randint(len(alphas), (len(latents),), device=latents.device)
    left = alphas[step].view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    found = unet(left.sqrt() * latents + (1 - left).sqrt() * noise, step, encoder_hidden_states=states).sample
    return F.mse_loss(found.float(), noise)


@torch.no_grad()
def text_states(tower: nn.Module, tokenizer: Any, texts: list[str], place: str) -> Tensor:
    """(B, L, C), padded to the tower's full length, as the pipeline pads."""
    length = tower.config.max_position_embeddings
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return tower(tokens["input_ids"].to(place)).last_hidden_state


# ------------------------------------------------------------------------------------------------ runs


class Phase:
    """A network under training, with what a run goes on from.

    Args:
        name: in the log and the state.
        network: to be trained.
        loss: of a batch.
        steps, minutes: the budget; steps go first.
        args: the options.
    """

    def __init__(
        self, name: str, network: nn.Module, loss: Callable[[], Tensor], steps: int | None, minutes: float, args: Any
    ) -> None:
        self.name, self.network, self.loss, self.args = name, network, loss, args
        self.steps, self.minutes = steps, minutes
        self.average = copy.deepcopy(network).eval()
        self.optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01, betas=(0.9, 0.99))
        self.counts: dict[str, Any] = {"phase": name, "step": 0, "elapsed_s": 0.0, "views_drawn": 0}
        self.file: Path = args.output / "state.safetensors"

    def put_back(self, counts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.counts = counts
        put_back(tensors, self.network, self.average, [self.optimizer])

    def write(self) -> None:
        write_state(self.file, state_of(self.network, self.average, [self.optimizer]), self.counts)

    def run(self, used: Any, drawn: Any, drawn_before: int, stops: list[int], save: Callable[[], None]) -> None:
        """Trains until the budget is used up or a signal came; saves on the way, and at the end."""
        counts, losses = self.counts, []
        started_s, saved_s = time.monotonic() - counts["elapsed_s"], counts["elapsed_s"]
        while not stops:
            counts["elapsed_s"] = time.monotonic() - started_s
            progress = counts["step"] / self.steps if self.steps else counts["elapsed_s"] / (60 * self.minutes)
            if progress >= 1:
                break
            losses.append(self.train(progress))
            used.value += self.args.batch_size
            counts |= {"step": counts["step"] + 1, "views_drawn": drawn_before + drawn.value}
            if counts["step"] % 25 == 0:
                minutes = counts["elapsed_s"] / 60
                log.info("%s step %d  %.1f min  loss %.4f", self.name, counts["step"], minutes, np.mean(losses))
                losses.clear()
            if counts["elapsed_s"] - saved_s > 60 * self.args.save_minutes:
                saved_s = counts["elapsed_s"]
                self.write()
                save()
        self.write()
        save()

    def train(self, progress: float) -> float:
        """One step; its loss."""
        step, args = self.counts["step"], self.args
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * cosine
        with torch.autocast(args.device, torch.bfloat16, enabled=fast_half(args.device, torch.bfloat16)):
            loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(args.ema_decay, (1 + step) / (10 + step))  # a young average forgets faster
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        return loss.item()


@torch.no_grad()
def scale_latents(vae: Any, batches: Batches) -> None:
    """Notes in the autoencoder's configuration what brings its latents to a variance of 1."""
    latents = torch.cat([vae.encode(batches()[0]).latent_dist.mean.float() for _ in range(16)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))


def parser() -> Parser:
    parser = script_parser(__doc__, "--output FOLDER")
    count = {"type": whole_number, "metavar": "N"}
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER", help="for weights, log and state")
    parser.add_argument("--vae-minutes", type=positive, metavar="M", default=25, help="for the autoencoder (25)")
    parser.add_argument("--minutes", type=positive, metavar="M", default=80, help="for the UNet (80)")
    parser.add_argument("--vae-steps", **count, help="for the autoencoder, in the place of minutes")
    parser.add_argument("--steps", **count, help="for the UNet, in the place of minutes")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output, if any")
    parser.add_argument("--batch-size", **count, default=16, help="(16)")
    parser.add_argument("--learning-rate", type=positive, metavar="R", default=1e-3, help="(1e-3)")
    parser.add_argument("--ema-decay", type=fraction, metavar="F", default=0.997, help="(0.997)")
    parser.add_argument("--pool-views", **count, default=20_000, help="views kept in memory, 52 KB each (20000)")
    parser.add_argument("--save-minutes", type=positive, metavar="M", default=5, help="between saves (5)")
    parser.add_argument("--threads", **count, default=2, help="(2)")
    parser.add_argument("--device", type=device, default="cpu", help="(cpu)")
    parser.add_argument("--seed", type=whole_number_or_0, metavar="N", default=0, help="(0)")
    return parser


def main(args: argparse.Namespace) -> int:
    check_folder("--output", args.output)
    if args.batch_size > min(FIRST_VIEWS, args.pool_views):
        raise ValueError(
            f"--batch-size is {args.batch_size}; the pool starts with {min(FIRST_VIEWS, args.pool_views)}."
        )
    extra_package("diffusers", "diffusion")
    state_file, vae_file = args.output / "state.safetensors", args.output / "vae.safetensors"
    counts, tensors = {"phase": "vae", "views_drawn": 0}, None
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
    torch.manual_seed(args.seed + drawn_before)
    tower, tokenizer = text_side()
    vae, unet = build_vae().to(args.device), build_unet(tower.config.hidden_size).to(args.device)
    tower.to(args.device)
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (vae, unet)]
    log.info("autoencoder %.2f M, UNet %.2f M parameters", *sizes)
    while drawn.value < min(FIRST_VIEWS, args.pool_views):
        time.sleep(0.1)
    words = Words(np.random.default_rng([args.seed, drawn_before]))
    batches = Batches(views, drawn, words, args.batch_size, args.device)

    with caught_signals() as stops:
        if not vae_file.exists():
            phase = Phase("vae", vae, lambda: vae_loss(vae, batches()[0]), args.vae_steps, args.vae_minutes, args)
            if tensors is not None:
                phase.put_back(counts, tensors)
                tensors = None
            phase.run(used, drawn, drawn_before, stops, lambda: None)
            if not stops:
                vae.load_state_dict(phase.average.state_dict())
                scale_latents(vae, batches)
                write_state(vae_file, vae.state_dict(), {"scaling_factor": vae.config.scaling_factor})
        if not stops:
            record, weights = read_state(vae_file)
            vae.load_state_dict(weights)
            vae.register_to_config(**record)
            vae.eval().requires_grad_(False)
            diffusers = extra_package("diffusers", "diffusion")
            alphas = diffusers.DDIMScheduler(**BETAS, num_train_timesteps=TRAIN_STEPS).alphas_cumprod.to(args.device)

            def loss() -> Tensor:
                pixels, texts = batches()
                with torch.no_grad():
                    latents = vae.encode(pixels).latent_dist.sample().float() * vae.config.scaling_factor
                return unet_loss(unet, latents, text_states(tower, tokenizer, texts, args.device), alphas)

            phase = Phase("unet", unet, loss, args.steps, args.minutes, args)
            if tensors is not None and counts["phase"] == "unet":
                phase.put_back(counts, tensors)
            phase.run(
                used, drawn, drawn_before, stops,
                lambda: save(args.output / "model", vae, phase.average, tower, tokenizer),
            )  # fmt: skip
    if stops:
        name = signal.Signals(stops[0]).name
        log.info("stopped by %s after step %d; the same command with --resume goes on", name, phase.counts["step"])
        return 128 + stops[0]
    return 0


if __name__ == "__main__":
    sys.exit(run_script(parser(), main))
