"""Measures whether patches of one object are alike to a network, on the picture book's validation split.

    python benchmarks/affinity.py tiny tiny-spar random                 # at 1x and 4x the native side of 128 px
    python benchmarks/affinity.py .work/tiny-vit/model --limit 8 --scales 1

A network is what `--network dino=...` takes, and its features are those that ProxyCLIP and Trident compare; `random`
is `ViTModel` with the shape of `tiny-vit` and no training. A network sees the middle of a scene, at most 192 px a
side: the window of those methods. It is cut into cells of 8 px, features go to the cells bilinearly, and cells of
which less than 9/10 are of one class are left out (no scene has two things of a class). Written down is the area
under the curve (AUC) of the cosine as the answer to "do these two cells show one object?", for all pairs of cells of
a scene and for those with a thing in them; and the mean cosine within and across.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import origin
from scipy.stats import rankdata
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from spar_hf import SparVisionConfig
from spar_hf.evaluation.evaluate import markdown_table
from spar_hf.files import write_json
from spar_hf.networks.vit import ViT
from spar_hf.picture_book.dataset import NUM_THINGS, PictureBook

RESULTS = Path(__file__).parent / "results" / "affinity.json"
NATIVE_PX, WINDOW_PX, CELL_PX = 128, 192, 8
PURE = 0.9


def network(name: str) -> ViT:
    """The adapter of a network by name."""
    if name != "random":
        return ViT(name)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=6, image_size=96, patch_size=8
    )
    return ViT(ViTModel(config, add_pooling_layer=False))


def auc(scores: np.ndarray, same: np.ndarray) -> float:
    """How often a pair of one object scores above a pair of two, ties counted half."""
    positive = int(same.sum())
    ranks = rankdata(scores)[same].sum() - positive * (positive + 1) / 2
    return float(ranks / (positive * (same.size - positive)))


def classes_of_cells(mask: np.ndarray) -> np.ndarray:
    """(H, W) class ids -> (cells), the class of each pure cell, -1 of the others."""
    rows, columns = (side // CELL_PX for side in mask.shape)
    cells = mask.reshape(rows, CELL_PX, columns, CELL_PX).swapaxes(1, 2).reshape(rows * columns, -1)
    counts = np.stack([(cells == class_id).sum(1) for class_id in range(mask.max() + 1)], axis=1)
    return np.where(counts.max(1) >= PURE * cells.shape[1], counts.argmax(1), -1)


def measure(vit: ViT, scale: int, limit: int) -> dict[str, float]:
    """Means over the first scenes."""
    side_px, config = scale * NATIVE_PX, SparVisionConfig()
    window_px = min(side_px, WINDOW_PX)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
    found = []
    for index in range(limit):
        scene = PictureBook("validation", side_px, side_px).scene(index)
        seen = slice((side_px - window_px) // 2, (side_px + window_px) // 2)
        image = torch.from_numpy(scene.image[seen, seen]).permute(2, 0, 1).float() / 255
        features = vit(((image - mean) / std)[None], config).features
        features = F.interpolate(features, size=(window_px // CELL_PX,) * 2, mode="bilinear", align_corners=False)
        labels = classes_of_cells(scene.mask[seen, seen])
        unit = F.normalize(features[0].flatten(1).T, dim=-1)[torch.from_numpy(labels >= 0)]
        labels = labels[labels >= 0]
        one, other = np.triu_indices(len(labels), 1)
        cosines, same = (unit @ unit.T).numpy()[one, other], labels[one] == labels[other]
        thing = (labels[one] < NUM_THINGS) | (labels[other] < NUM_THINGS)
        found.append(
            {
                "auc": auc(cosines, same),
                "auc_things": auc(cosines[thing], same[thing]),
                "cosine_same": float(cosines[same].mean()),
                "cosine_other": float(cosines[~same].mean()),
            }
        )
    return {key: round(float(np.mean([each[key] for each in found])), 4) for key in found[0]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="NAME")
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 4], help="multiples of the native side")
    parser.add_argument("--limit", type=int, default=32, help="scenes (32)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for name in args.networks:
        vit = network(name)
        rows += [{"network": name, "scale": scale, **measure(vit, scale, args.limit)} for scale in args.scales]
        write_json(args.output, {**origin(), "scenes": args.limit, "rows": rows})
    print("\n".join(markdown_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])))


if __name__ == "__main__":
    main()
