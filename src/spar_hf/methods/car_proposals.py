"""CaR's proposals: Grad-CAM of the last block, spread by attention; see car.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..encoder_spar import embed_patches, position_table
from ..encoders.base import column
from ..extras import extra_package
from ..grid_spar import resize_positions


class Proposals:
    """Masks of an image, by name.

    Args:
        vision: the tower.
        colours: (H, W, 3) uint8.
        scale: on cosines.
        settings: the method's constants.
    """

    def __init__(self, vision: Any, colours: np.ndarray, scale: Tensor, settings: Any) -> None:
        self.vision, self.scale, self.settings = vision, scale, settings
        patch_px = self.vision.config.patch_size
        height, width = (-(-side // patch_px) * patch_px for side in colours.shape[:2])
        resized = np.array(Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC))
        pixels = torch.from_numpy(resized).permute(2, 0, 1)[None].to(self.vision.device)
        x, self.grid_hw = embed(self.vision, normalised(pixels, self.vision.config))
        reach = self.vision.reach(self.grid_hw, x.device)
        total: Any = 0.0

        def visit(layer: Any, x: Tensor, y: Tensor) -> Tensor:
            nonlocal total
            out, weights = layer.update(x, y, need_weights=True, reach=reach)
            total = total + weights[0, :, 1:, 1:].float().mean(0)
            return out

        blocks = self.vision.blocks
        first = len(blocks) - settings.blocks
        for number, layer in enumerate(blocks[:-1]):
            x = layer(x, inside=visit) if number >= first else layer(x, reach=reach)
        self.x = x
        visit(blocks[-1], x, blocks[-1].layer_norm1(x))
        for _ in range(3):
            total = total / total.sum(dim=0, keepdim=True)
            total = total / total.sum(dim=1, keepdim=True)
        self.spread = (total + total.T) / 2  # half of T: T is its square

    def __call__(self, names: Tensor, background: Tensor) -> Tensor:
        """(n, D) and (B, D), L2-normalised -> (n, h, w)."""
        cams = self.cams(names, torch.cat([names, background]))
        unseen = cams.amax(dim=(1, 2)) == 0
        if unseen.any():
            cams[unseen] = self.cams(names, names)[unseen]
        boxes = torch.stack([in_boxes(cam, self.settings.box) for cam in cams])
        spread = self.spread @ (self.spread @ (boxes * cams).flatten(1).T)
        return to_unit(spread.T.unflatten(1, self.grid_hw))

    @torch.inference_mode(False)  # whoever calls: what is cloned here may have gradients
    @torch.enable_grad()
    def cams(self, names: Tensor, texts: Tensor) -> Tensor:
        """Grad-CAM of each name, which come first among the texts: (n, h, w) from 0 to 1."""
        layer, x, texts = self.vision.blocks[-1], self.x.detach().clone(), texts.detach().clone()
        y = layer.layer_norm1(x).detach().requires_grad_()
        out, _ = layer.update(x, y, reach=self.vision.reach(self.grid_hw, x.device))
        pooled = self.vision.post_layernorm(out[:, 1:]).mean(dim=1)
        seen = F.normalize(self.vision.visual_projection(pooled).float(), dim=-1)
        shares = (float(self.scale) * seen @ texts.T).softmax(dim=-1)[0]
        cams = []
        for number in range(len(names)):
            (gradient,) = torch.autograd.grad(shares[number], y, retain_graph=True)
            cams.append((y[0, 1:].detach().float() @ gradient[0, 1:].float().mean(dim=0)).clamp(min=0))
        return to_unit(to_unit(torch.stack(cams).unflatten(1, self.grid_hw)))


def embed(vision: Any, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Pixels (B, 3, H, W) -> the first block's input, positions in fp16 as theirs, and the grid."""
    embeddings = vision.embeddings
    patches, grid_hw = embed_patches(embeddings.patch_embedding, pixels)
    table = position_table(embeddings.position_embedding, embeddings.num_positions, patches.device).float()
    positions = torch.cat([table[:1], resize_positions(table[1:], grid_hw, "bilinear")]).half().to(patches.dtype)
    class_token = embeddings.class_embedding.expand(len(patches), 1, -1)
    return vision.pre_layrnorm(torch.cat([class_token, patches], dim=1) + positions), grid_hw


def normalised(colours: Tensor, config: Any) -> Tensor:
    """Bytes (B, 3, H, W) -> pixels."""
    return (colours.float() / 255 - column(config.image_mean, colours)) / column(config.image_std, colours)


def to_unit(maps: Tensor) -> Tensor:
    """Each map (n, h, w) from 0 to 1."""
    maps = maps - maps.amin(dim=(1, 2), keepdim=True)
    return maps / (1e-15 + maps.amax(dim=(1, 2), keepdim=True))


def in_boxes(cam: Tensor, share: float) -> Tensor:
    """1 inside the boxes of the parts (8 neighbours) of a map (h, w) above a share of its maximum, else 0."""
    ndimage = extra_package("scipy.ndimage", "vfm")
    levels = (cam * 255).byte().cpu().numpy()
    parts, _ = ndimage.label(levels > int(share * levels.max()), structure=np.ones((3, 3)))
    inside = torch.zeros_like(cam)
    height, width = cam.shape
    for rows, columns in ndimage.find_objects(parts):
        inside[rows.start : min(rows.stop, height - 1), columns.start : min(columns.stop, width - 1)] = 1
    return inside
