"""Times every method of the table on ViT-B/16 (random weights) against one plain pass, on this machine.

    python benchmarks/methods.py                                  # 448, 672 x 896 and 1024 x 1024 px
    python benchmarks/methods.py --sizes 448x448 --methods naclip gem
    python benchmarks/methods.py --sizes 512x512 --rounds 1 --names 3 --methods diffsegmenter   # only where asked for

For each size: milliseconds of the processor (median; the methods share one tower and take turns in every round), the
part of it that the networks' own blocks and passes take, peak memory over the loaded networks, and time and memory as
ratios to one plain pass (maskclip); the time's is the median over the rounds. With one thread (--threads 1) other work
on the machine disturbs it little. Further networks are random ones of the authors' size (SSD-1B: Stable Diffusion 1's,
which its authors ran too). A method that gives scores makes a label map of 21 names. Passes are those of a diffusion
model's UNet for a picture; methods around one are timed only where they are named. Writes
benchmarks/results/methods.json, a size at a time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from record import PeakMemory, origin
from transformers import SamVisionConfig, SamVisionModel

from spar_hf import METHODS, SparConfig, SparModel, build_encoder, build_segmenter, label_map, load
from spar_hf.evaluation.evaluate import markdown_table
from spar_hf.families import make_processor
from spar_hf.files import write_json
from spar_hf.methods.bank import Bank, network_digest
from spar_hf.networks.blip import Blip
from spar_hf.networks.diffusion import Diffusion
from spar_hf.networks.masks import Regions
from spar_hf.networks.saliency import Found
from spar_hf.networks.vit import ViT

RESULTS = Path(__file__).parent / "results" / "methods.json"
SIZES = ("448x448", "672x896", "1024x1024")
REFERENCE = "maskclip"


class Squares(torch.nn.Module):
    """A source of regions that costs nothing: 8 x 8 rectangles."""

    def forward(self, pixel_values: torch.Tensor, config: Any) -> Regions:
        rows, columns = (torch.arange(side) * 8 // side for side in pixel_values.shape[2:])
        return Regions(ids=1 + 8 * rows[:, None] + columns)


def vit(hidden: int, patch_px: int, side_px: int = 224) -> Any:
    """A ViT of DINO's: small (384) or base (768)."""
    from transformers import ViTConfig, ViTModel

    own = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
    return ViTModel(ViTConfig(**own, patch_size=patch_px, image_size=side_px), add_pooling_layer=False).eval()


def dinov2(hidden: int, layers: int, registers: bool) -> Any:
    """A ViT/14 of DINOv2's: base (768, 12) or large (1024, 24)."""
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    own = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 64}
    own |= {"image_size": 518, "patch_size": 14}
    if registers:
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**own)).eval()
    return Dinov2Model(Dinov2Config(**own)).eval()


def blip() -> Any:
    """BLIP large, with a tokenizer of letters and digits."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BlipConfig, BlipForImageTextRetrieval, PreTrainedTokenizerFast

    signs = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *signs, *(f"##{sign}" for sign in signs)]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"encoder_hidden_size": 1024, "num_attention_heads": 12, "vocab_size": len(words)}
    text |= {"bos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3}
    network = BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config={**vision, "image_size": 384}))
    return Blip(network.eval(), PreTrainedTokenizerFast(tokenizer_object=backend, **special))


def saliency() -> Any:
    """FOUND on DINO ViT-S/8."""
    return Found(ViT(vit(384, 8)), torch.randn(1, 384, 1, 1), torch.zeros(1))


def diffusion(width: int, heads: int | tuple[int, ...]) -> Diffusion:
    """A Stable Diffusion of 512 px, 1 (768, 8) or 2 (1024, 5 to 20 heads), with a vocabulary of `tiny`'s."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = load("tiny")[1].tokenizer
    text = {"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 4 * width}
    text |= {"num_hidden_layers": 12 if width == 768 else 23, "num_attention_heads": width // 64}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(
            sample_size=64, cross_attention_dim=width, attention_head_dim=heads, use_linear_projection=width == 1024
        ),
        "vae": AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        "scheduler": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
    }
    more: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return Diffusion(StableDiffusionPipeline(**parts, tokenizer=tokenizer, **more))


# By checkpoint, or by method and name where there is none of transformers, or none of the authors'.
FURTHER: dict[str, Callable[[], Any]] = {
    "facebook/dino-vitb8": lambda: vit(768, 8),
    "facebook/dino-vitb16": lambda: vit(768, 16),
    "facebook/dinov2-large": lambda: dinov2(1024, 24, False),
    "facebook/dinov2-with-registers-large": lambda: dinov2(1024, 24, True),
    "facebook/sam-vit-base": lambda: SamVisionModel(SamVisionConfig()).eval(),
    "facebook/sam2-hiera-large": Squares,
    "facebook/sam2.1-hiera-large": Squares,
    "Salesforce/blip-itm-large-coco": blip,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": lambda: diffusion(768, 8),
    "CompVis/stable-diffusion-v1-4": lambda: diffusion(768, 8),
    "stabilityai/stable-diffusion-2-1-base": lambda: diffusion(1024, (5, 10, 20, 20)),
    "segmind/SSD-1B": lambda: diffusion(768, 8),
    "clip_diy.saliency": saliency,
    "reco.dino": lambda: vit(384, 16),
    "knn_clip.dino": lambda: dinov2(768, 12, False),
}
SETTINGS = {"knn_clip": {"neighbours": 16, "threshold": 0.5, "weight": 0.5}}  # the numbers don't change the time
ENTRIES = 10_000  # of a bank of references


def further_networks(name: str, model: Any, names: list[str]) -> dict[str, Any]:
    """Random networks of the size of the authors', and a random bank of references."""
    row = METHODS[name]
    networks = {
        key: FURTHER[checkpoint or f"{name}.{key}"]() for key, checkpoint in row.needs.items() if key != "bank"
    }
    if "bank" in row.needs:
        widths = {"features": networks["dino"].config.hidden_size, "clip": model.config.projection_dim}
        entries = len(names) if name == "reco" else ENTRIES  # a prototype a name
        tensors = {key: torch.randn(entries, width) for key, width in widths.items()}
        tensors["name"] = torch.arange(entries) % len(names)
        digests = {"dino": network_digest(ViT.of(networks["dino"])), "clip": network_digest(model.vision_model)}
        settings = asdict(row.module.Settings())
        record = {"method": name, "names": names, "settings": settings, "networks": digests}
        networks["bank"] = Bank(Path("random"), tensors, record)
    return networks


class Timed:
    """A method as a function of pixels, and the processor time that its networks' own passes took so far."""

    def __init__(self, name: str, model: SparModel, processor: Any, count: int) -> None:
        self.seconds = 0.0
        self.passes = 0  # of a UNet
        self.started: list[float] = []
        row, names = METHODS[name], [f"name {number}" for number in range(count)]
        networks = further_networks(name, model, names)
        if row.kind == "feature":
            encoder: Any = build_encoder(model.vision_model, name, networks=networks)
            self.run: Any = encoder
        else:
            segmenter = build_segmenter(model, processor, name, networks=networks, settings=SETTINGS.get(name))
            encoder = segmenter.encoder
            words = segmenter.encode_labels(names, ("a photo of a {}.",))
            self.run = lambda pixels: [label_map(maps, words.class_ids) for maps in segmenter(pixels, words)]
        tower = getattr(encoder, "vision", encoder)
        self.unets = [network.unet for network in networks.values() if isinstance(network, Diffusion)]
        for unet in self.unets:
            unet.register_forward_hook(self._passed)
        for module in (tower.embeddings, *tower.blocks, *networks.values(), *self.unets):
            module = getattr(module, "vision_encoder", module)
            if not isinstance(module, torch.nn.Module):  # a bank
                continue
            module.register_forward_pre_hook(lambda *_: self.started.append(time.process_time()))
            module.register_forward_hook(self._ended)

    def _ended(self, *_: Any) -> None:
        self.seconds += time.process_time() - self.started.pop()

    def _passed(self, module: Any, args: Any, output: Any) -> None:
        self.passes += len(output.sample)

    def __call__(self, pixels: torch.Tensor) -> Any:
        self.passes = 0
        return self.run(pixels)


def build(names: list[str], count: int = 21) -> dict[str, Timed]:
    """The methods around one tower; those that give scores are asked for so many names."""
    torch.manual_seed(0)
    tokenizer = load("tiny")[1].tokenizer
    text = {"num_hidden_layers": 2, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    model = SparModel(SparConfig(text_config=text, vision_config={})).eval()
    processor = make_processor(model.config, tokenizer)
    return {name: Timed(name, model, processor, count) for name in names}


def pixels_of(size: str) -> torch.Tensor:
    height_px, width_px = map(int, size.split("x"))
    return torch.randn(1, 3, height_px, width_px, generator=torch.Generator().manual_seed(0))


def milliseconds(encoders: dict[str, Timed], size: str, rounds: int) -> tuple[dict[str, list[float]], ...]:
    """CPU time of each method in each round, and its networks' part; every round starts with another method."""
    pixels = pixels_of(size)
    times: dict[str, list[float]] = {name: [] for name in encoders}
    passes: dict[str, list[float]] = {name: [] for name in encoders}
    order = list(encoders)
    with torch.inference_mode():
        for turn in range(rounds):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                start, before = time.process_time(), encoders[name].seconds
                encoders[name](pixels)
                times[name].append(1000 * (time.process_time() - start))
                passes[name].append(1000 * (encoders[name].seconds - before))
    return times, passes


def peak_mb(encoder: Any, size: str) -> float:
    """Peak megabytes of one pass over what the process holds before it; Linux only."""
    pixels = pixels_of(size)
    with torch.inference_mode():
        if not encoder.unets:  # a pass of one takes as long at any size
            encoder(pixels[:, :, :64, :64])  # libraries set up with the first pass
        with PeakMemory() as memory:
            encoder(pixels)
    return memory.mb


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, row in METHODS.items() if row.family == "clip"]
    usual = [name for name in names if "diffusion" not in METHODS[name].needs]
    parser.add_argument("--methods", nargs="+", choices=names, default=usual)
    parser.add_argument("--names", type=int, default=21, help="of the label maps (21)")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="height x width in pixels, such as 672x896")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    names = [REFERENCE, *(name for name in args.methods if name != REFERENCE)]
    encoders = build(names, args.names)
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        peak_mb(encoders[REFERENCE], size)  # libraries keep some memory for each new size
        peaks = {name: peak_mb(encoders[name], size) for name in names}
        times, passes = milliseconds(encoders, size, args.rounds)
        for name in names:
            rows.append(
                {
                    "method": name,
                    "size": size,
                    "milliseconds": round(statistics.median(times[name]), 1),
                    "networks_ms": round(statistics.median(passes[name]), 1),
                    "unet_passes": encoders[name].passes,
                    "peak_mb": round(peaks[name]),
                    "time_ratio": round(statistics.median(map(truediv, times[name], times[REFERENCE])), 2),
                    "memory_ratio": round(peaks[name] / peaks[REFERENCE], 2),
                }
            )
        write_json(args.output, {**origin(), "rows": rows})
        cells = [[str(value) for key, value in row.items() if key != "size"] for row in rows if row["size"] == size]
        print(f"\n{size}, {args.threads} threads:\n", flush=True)
        header = ["method", "ms", "networks", "UNet passes", "MB over network", "time", "memory"]
        print("\n".join(markdown_table(header, cells)), flush=True)


if __name__ == "__main__":
    main()
