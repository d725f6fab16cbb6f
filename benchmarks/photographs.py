"""Whether a network keeps its quality above its native size: a linear probe on photographs with masks, no words.

    python benchmarks/photographs.py --weights facebook/dinov2-small --images train --masks masks --classes names.txt
    python benchmarks/photographs.py --weights openai/clip-vit-base-patch16 --benchmark voc21 --data VOCdevkit
    python benchmarks/photographs.py --weights tiny --benchmark picturebook --limit 16         # drawings, to try it

Every other picture teaches the probe, a linear classifier of patches, at the network's native size (shorter side); the
others are measured at multiples of it: in one pass, in one pass within the window's reach, in a sliding window of the
native size, and in one pass upsampled. A network of spar_hf's families (CLIP, SigLIP, DINOv3, ...) has all four; any
other ViT of transformers (DINO, DINOv2) has no reach. Pictures smaller than a size are enlarged to it. Writes JSON
with the command, a row at a time, and goes on from there when it is given again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from record import origin
from torch import Tensor, nn
from torch.nn import functional as F

from spar_hf import (
    Labels,
    SlidingWindow,
    SparImageProcessor,
    SparVisionOutput,
    Upsampled,
    build_encoder,
    load_upsampler,
)
from spar_hf.checkpoints import load_tower
from spar_hf.encoder_spar import EncoderWrapper
from spar_hf.encoders.base import DenseEncoder
from spar_hf.evaluation import BENCHMARKS, evaluate, load_benchmark
from spar_hf.evaluation.benchmarks import BenchmarkData
from spar_hf.evaluation.evaluate import markdown_table
from spar_hf.evaluation.protocols import Protocol
from spar_hf.evaluation.samples import IGNORED, Sample
from spar_hf.files import write_json
from spar_hf.grid_spar import coverage
from spar_hf.networks.vit import ViT
from spar_hf.segmentation_spar import GridScores, ScoreMaps

RESULTS = Path(".work") / "photographs.json"
ROWS = ("one pass", "within reach", "sliding window", "upsampled")
WEIGHT_DECAY, STEPS = 1e-3, 60  # of the probe; L-BFGS


class AnyViT(nn.Module):
    """Any ViT of transformers as a dense encoder, in one pass."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.vit = ViT(name)
        own = self.vit.network.config
        self.config = SimpleNamespace(
            patch_size=self.vit.patch_px, image_size=own.image_size, num_channels=3, size_rule="floor",
            image_mean=self.vit.image_mean, image_std=self.vit.image_std,
        )  # fmt: skip
        self.dtype, self.device = self.vit.dtype, torch.device("cpu")

    def forward(self, pixel_values: Tensor) -> SparVisionOutput:
        patches = self.vit(pixel_values, self.config)
        image_hw = (pixel_values.shape[2], pixel_values.shape[3])
        return SparVisionOutput(
            patch_embeds=patches.features.permute(0, 2, 3, 1), image_hw=image_hw, extent_hw=patches.extent_hw
        )


def encoders(name: str, stride_px: int | None, upsampler: str, factor: int) -> dict[str, DenseEncoder]:
    """The rows that a network has."""
    try:
        vision: Any = load_tower(name)[1]
    except ValueError:
        vision = AnyViT(name)
    native, patch = vision.config.image_size, vision.config.patch_size
    found = {"one pass": vision}
    if not isinstance(vision, AnyViT):
        found["within reach"] = build_encoder(vision, reach="window")
    # The paper's cheapest stride with nearly all of the gain: 56 of 224 px.
    found["sliding window"] = SlidingWindow(vision, native, stride_px or max(patch, native // 4))
    found["upsampled"] = Upsampled(vision, load_upsampler(upsampler), factor)
    return found


class Probe(EncoderWrapper):
    """The segmenter of a dense encoder and a linear classifier of its patches.

    Args:
        encoder: gives features (B, h, w, D).
        weight, bias: (K, D) and (K), of features as the encoder gives them.
    """

    networks = ()

    def __init__(self, encoder: DenseEncoder, weight: Tensor, bias: Tensor) -> None:
        self.encoder, self.weight, self.bias = encoder, weight, bias

    def encode_labels(self, labels: Any, templates: Any = None, unlabelled: Any = ()) -> None:
        """The classes are in the weights."""

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, encoded: Any) -> list[ScoreMaps]:
        outputs = self.encoder(pixel_values)
        scores = F.linear(outputs.patch_embeds.float(), self.weight, self.bias).permute(0, 3, 1, 2)
        size_hw = (pixel_values.shape[2], pixel_values.shape[3])
        covered = coverage(outputs.image_hw, outputs.extent_hw)
        return [GridScores.of(single, size_hw, coverage_hw=covered) for single in scores]


def patch_classes(target: np.ndarray, num_classes: int, grid_hw: tuple[int, int], covered: Any) -> Tensor:
    """(H, W) class ids -> (h, w, K), the share of each class among a patch's pixels that are scored.

    Args:
        covered: image size over what the grid covers, for each axis.
    """
    height, width = target.shape
    rows, columns = (
        np.minimum((np.arange(side) + 0.5) / side * ratio * cells, cells - 1).astype(int)
        for side, ratio, cells in zip((height, width), covered, grid_hw, strict=True)
    )
    cells = rows[:, None] * grid_hw[1] + columns
    scored = target != IGNORED
    places = cells[scored] * num_classes + target[scored]
    counts = np.bincount(places, minlength=grid_hw[0] * grid_hw[1] * num_classes)
    shares = torch.from_numpy(counts).view(*grid_hw, num_classes).float()
    return shares / shares.sum(-1, keepdim=True).clamp(min=1)


def fit(features: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The linear classifier with the least cross-entropy.

    Args:
        features: (N, D).
        shares: (N, K), each row sums to 1.

    Returns:
        Weights (K, D) and bias (K).
    """
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    inputs = (features - mean) / std
    weight = torch.zeros(shares.shape[1], features.shape[1], requires_grad=True)
    bias = torch.zeros(shares.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), shares) + WEIGHT_DECAY * weight.square().sum() / 2
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        scaled = weight / std
        return scaled, bias - scaled @ mean


def taught(
    encoder: DenseEncoder, data: BenchmarkData, processor: Any, protocol: Protocol
) -> Iterator[tuple[Tensor, ...]]:
    """Features (N, D) and class shares (N, K) of the patches of each picture, without those of no scored pixel."""
    for number in range(len(data)):
        sample = data.read(number)
        pixels = processor(images=protocol.resize(sample.image), do_resize=False, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            outputs = encoder(pixels)
        covered = coverage(outputs.image_hw, outputs.extent_hw)
        grid_hw = (outputs.patch_embeds.shape[1], outputs.patch_embeds.shape[2])
        shares = patch_classes(sample.target, len(data.labels), grid_hw, covered).flatten(0, 1)
        seen = shares.sum(-1) > 0
        yield outputs.patch_embeds[0].flatten(0, 1).float()[seen], shares[seen]


def halves(data: BenchmarkData, limit: int | None) -> tuple[BenchmarkData, BenchmarkData]:
    """Every other picture each, spread over the data; at most `limit` of each."""
    count = len(data) // 2 if limit is None else min(limit, len(data) // 2)
    if count < 1:
        raise ValueError(f"{data.name} has {len(data)} picture; one is needed to learn from and one to measure.")
    parts = []
    for first in (0, 1):
        numbers = [2 * (place * (len(data) // 2) // count) + first for place in range(count)]

        def read(index: int, numbers: list[int] = numbers) -> Sample:
            return data.read(numbers[index])

        own = Labels.parse([[title] for title in data.labels.class_names])  # a class has one row of the probe
        parts.append(replace(data, labels=own, sample_names=tuple(data.sample_names[n] for n in numbers), read=read))
    return parts[0], parts[1]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rows = encoders(args.weights, args.stride_px, args.upsampler, args.upsample_factor)
    vision: Any = rows["one pass"]
    native = vision.config.image_size
    processor = SparImageProcessor(
        size=None, image_mean=vision.config.image_mean, image_std=vision.config.image_std,
        min_side_px=vision.config.patch_size,
    )  # fmt: skip
    book = args.benchmark == "picturebook"

    def pictures(scale: float) -> tuple[BenchmarkData, BenchmarkData]:
        if book:  # drawn at the size, sharp
            return halves(load_benchmark("picturebook", scale=scale, native_px=native), args.limit)
        given = {name: getattr(args, name) for name in ("data", "images", "masks", "classes")}
        return halves(load_benchmark(args.benchmark, **given), args.limit)

    def protocol(scale: float) -> Protocol:
        return Protocol("probe", short_side_px=round(scale * native), logit_scale=1.0)

    learning, measuring = pictures(1)
    stored = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {"rows": []}
    asked = {"weights": args.weights, "benchmark": args.benchmark, "pictures": len(measuring)}
    done = {(row["row"], row["scale"]) for row in stored["rows"] if asked.items() <= row.items()}
    wanted = [(name, scale) for scale in args.scales for name in args.rows or rows if name in rows]
    if all(entry in done for entry in wanted):
        return stored
    print(f"the probe learns from {len(learning)} pictures", flush=True)
    seen = list(taught(vision, learning, processor, protocol(1)))
    features, shares = (torch.cat(parts) for parts in zip(*seen, strict=True))
    weight, bias = fit(features, shares)
    for name, scale in wanted:
        if (name, scale) in done:
            continue
        result = evaluate(
            Probe(rows[name], weight, bias), processor, pictures(scale)[1], protocol(scale), record={"row": name}
        )
        scores = ("mean_iou", "pixel_accuracy", "boundary_iou", "seconds_per_image")
        found = {key: getattr(result, key) for key in scores}
        stored = {**origin(), "rows": [*stored["rows"], {**asked, "row": name, "scale": scale, **found}]}
        write_json(args.output, stored)
        print(f"{name:16} {scale:g}x  mIoU {100 * result.mean_iou:.1f}", flush=True)
    return stored


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Mean IoU (pixel accuracy), a row a way to run the network and a column a scale."""
    scales = sorted({row["scale"] for row in rows})
    found = {(row["row"], row["scale"]): row for row in rows}

    def cell(name: str, scale: float) -> str:
        row = found.get((name, scale))
        return "" if row is None else f"{100 * row['mean_iou']:.1f} ({100 * row['pixel_accuracy']:.1f})"

    lines = [[name, *(cell(name, scale) for scale in scales)] for name in ROWS if any(name == row for row, _ in found)]
    return markdown_table(["mIoU (pixel accuracy), %", *(f"{scale:g}x" for scale in scales)], lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, metavar="NAME", help="a folder or Hub id; tiny")
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="custom", help="(custom)")
    parser.add_argument("--data", metavar="DIR", help="of a benchmark, as 'spar evaluate' takes it")
    for name in ("images", "masks", "classes"):
        parser.add_argument(f"--{name}", metavar="PATH", help="of custom, as 'spar evaluate' takes it")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="(all that the network has)")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 2, 4], help="times the native side (1 2 4)")
    parser.add_argument("--limit", type=int, metavar="N", help="pictures to learn from, and to measure (all)")
    parser.add_argument("--stride-px", type=int, metavar="N", help="of the sliding window (a quarter of it)")
    parser.add_argument("--upsampler", default="jbu", metavar="NAME[=FOLDER]", help="(jbu)")
    parser.add_argument("--upsample-factor", type=int, default=2, metavar="N", help="cells to a patch's side (2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="(%(default)s)")
    args = parser.parse_args(argv)
    try:
        document = measure(args)
    except ValueError as error:
        parser.error(str(error))
    print("\n" + "\n".join(table([row for row in document["rows"] if row["weights"] == args.weights])))


if __name__ == "__main__":
    main()
