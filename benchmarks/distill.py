"""Measures a training step: images per second with and without a stored trunk, against the plain loop, at equal loss.

    python benchmarks/distill.py --json benchmarks/results/distill.json
    python benchmarks/distill.py --student tiny --side-px 512

The plain loop is what SPAR's released code does: one image a step, gradients through the whole network, the teacher's
features read from one fp32 pickle per image. Ours reads fp16 shards and runs the same AdamW on the same blocks. The
variants take turns, image by image; each rate is one over the median step. Weights are random unless --student.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import origin

from spar_hf import SlidingWindow, SparVisionConfig, SparVisionModel
from spar_hf.checkpoints import load_tower
from spar_hf.distillation.batches import Batches
from spar_hf.distillation.cache import FeatureStore
from spar_hf.distillation.selection import set_trainable
from spar_hf.distillation.sources import PictureBookScenes
from spar_hf.distillation.teacher import Student, normalise, teacher_features
from spar_hf.distillation.views import Augmentation, Views
from spar_hf.files import write_json
from spar_hf.sources import image_folder

TRAINED_BLOCKS = 2
LEARNING_RATE = 2e-5


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--student", help="checkpoint; a CLIP ViT-B/16 with random weights when not given")
    parser.add_argument("--side-px", type=int, default=512)
    parser.add_argument("--images", type=int, default=6, help="images; the first is not timed")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.images * args.epochs < 2:
        parser.error("the first step is not timed; give at least two by --images and --epochs")
    return args


def new_student(args: argparse.Namespace) -> SparVisionModel:
    """The same starting weights at every call."""
    if args.student:
        return load_tower(args.student)[1]
    torch.manual_seed(0)
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return SparVisionModel(SparVisionConfig(**size, image_size=224, patch_size=16, projection_dim=512))


class PlainLoop:
    """One image, its pickle, gradients everywhere, a step."""

    def __init__(self, args: argparse.Namespace, folder: Path, views: Views):
        self.vision, self.folder, self.views, self.device = (
            new_student(args).to(args.device),
            folder,
            views,
            args.device,
        )
        # Gradients everywhere, but the optimiser has the last blocks only.
        last = [
            parameter for layer in self.vision.encoder.layers[-TRAINED_BLOCKS:] for parameter in layer.parameters()
        ]
        self.optimizer = torch.optim.AdamW(last, lr=LEARNING_RATE, weight_decay=1e-4)

    def step(self, number: int) -> float:
        pixels = torch.from_numpy(self.views.pixels(number))[None].to(self.device)
        target = pickle.loads((self.folder / f"{number}.pkl").read_bytes()).to(self.device)
        loss = (self.vision(normalise(pixels, self.vision.config)).patch_embeds - target).square().mean()
        self.vision.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Ours:
    """The same through the feature store; on pixels, or on the stored trunk."""

    def __init__(self, args: argparse.Namespace, views: Views, store: FeatureStore, on_trunk: bool):
        vision, self.device = new_student(args), args.device
        self.student = Student(vision, len(vision.encoder.layers) - TRAINED_BLOCKS)
        noise = torch.randint(256, (1, vision.config.image_size, vision.config.image_size, 3), dtype=torch.uint8)
        set_trainable(vision, f"last:{TRAINED_BLOCKS}", lambda: self.student(noise))
        self.student.to(args.device)
        trained = [parameter for parameter in vision.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=1e-4)
        self.batches = Batches([[number] for number in range(len(views))], views, store, on_trunk)

    def step(self, number: int) -> float:
        batch = self.batches[number]
        target = batch.target.to(self.device).float()
        loss = (self.student(batch.inputs.to(self.device), batch.grid_hw) - target).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def main() -> None:
    args = parse_flags()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenes = PictureBookScenes(args.images, seed=0)
        for number in range(args.images):
            Image.fromarray(scenes.draw(number, args.side_px, args.side_px)).save(folder / f"{number:03d}.png")
        whole = Augmentation(args.side_px, args.side_px, (1.0, 1.0), 0.0, (1.0, 1.0), args.side_px, 0.0)
        views = Views(image_folder(str(folder)), whole, draws=1, seed=0)

        # What the teacher writes: pickles for the plain loop, two stores for ours. Its stride is of no concern here.
        vision = new_student(args).eval().requires_grad_(False).to(args.device)
        teacher = SlidingWindow(vision, stride_px=vision.config.image_size)
        trunk = Student(vision, len(vision.encoder.layers) - TRAINED_BLOCKS)
        stores = {
            name: FeatureStore(folder / name, {"trunk": name}, len(views), len(views)) for name in ("none", "last")
        }
        rows: dict[int, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        for number in range(len(views)):
            pixels = views.pixels(number)
            features = teacher_features(teacher, torch.from_numpy(pixels)[None].to(args.device)).cpu()
            (folder / f"{number}.pkl").write_bytes(pickle.dumps(features))
            rows[number] = {"image": views.name(number), "pixels_crc32": zlib.crc32(pixels)}
            tensors[f"{number}.features"] = features[0].half()
            tensors[f"{number}.trunk"] = trunk.trunk(torch.from_numpy(pixels)[None].to(args.device))[0].half().cpu()
        features_only = {name: tensor for name, tensor in tensors.items() if name.endswith("features")}
        for name, content in (("none", features_only), ("last", tensors)):
            stores[name].create()
            stores[name].write(0, rows, content, {})
            stores[name].load_index()
        pickle_bytes = sum(path.stat().st_size for path in folder.glob("*.pkl"))
        store_bytes = stores["none"].path(0).stat().st_size

        variants = {
            "plain loop": PlainLoop(args, folder, views),
            "feature store": Ours(args, views, stores["none"], on_trunk=False),
            "feature store and trunk": Ours(args, views, stores["last"], on_trunk=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        losses: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(args.epochs * len(views)):
            for name, variant in variants.items():
                start = time.perf_counter()
                losses[name].append(variant.step(turn % len(views)))
                seconds[name].append(time.perf_counter() - start)

    plain = statistics.median(seconds["plain loop"][1:])
    result: dict[str, Any] = {
        **origin(),
        "student": args.student or "CLIP ViT-B/16, random weights",
        "side_px": args.side_px,
        "steps": args.epochs * args.images,
        "device": args.device,
        "store_bytes_over_pickle_bytes": store_bytes / pickle_bytes,
        "variants": {},
    }
    for name in variants:
        median = statistics.median(seconds[name][1:])
        result["variants"][name] = {
            "images_per_second": 1 / median,
            "times_plain": plain / median,
            "mean_loss": statistics.fmean(losses[name]),
        }
        print(
            f"{name:24} {1 / median:8.3f} images/s {plain / median:6.2f} x   loss {statistics.fmean(losses[name]):.6f}"
        )
    print(f"features on disk: {store_bytes / pickle_bytes:.4f} of the fp32 pickles")
    if args.json:
        write_json(args.json, result)
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
