"""ProxyCLIP: the patches of a vision foundation model say which values of CLIP's last block belong together.

Paper: "ProxyCLIP: Proxy Attention Improves CLIP for Open-Vocabulary Segmentation", Lan et al., ECCV 2024.
Changes: F = the second network's patch features after its final norm; S = cos(F, F);
A = softmax(3 (S - 1.2 mean S)) over the keys with S >= 1.2 mean S, one map for all heads; the last block's values of
the patches go to the second network's grid bilinearly; the patches are out_proj(A V), without residual and MLP. They
lie on the second network's grid: with DINO ViT-B/8 there are four times as many. No N x N matrix is held.
The second network is any ViT of `AutoModel`, the vision tower of a CLIP included, or any `AutoBackbone`; the authors
took DINO ViT-B/8, DINOv2 ViT-B/14 with registers, SAM and MAE. It sees the pixels with its own mean and standard
deviation, as its preprocessor_config.json gives them, or else ImageNet's.
A `ViTModel`'s position table, DINO's, is resized with DINO's own scale, (rows + 0.1) / n; another network's by its
transformers class.
Deviations: rows and columns are kept apart (theirs takes the rows twice); sides that are no multiple of a patch follow
the size rule in each network by its own patch, and values are looked up by their place in the image (theirs pads to a
multiple of 56 px, resizes the image to 1024 px for SAM and to 336 px for MAE); a patch with no key left keeps itself
(theirs is NaN). Similarities are fp32.
To reach: mean IoU 61.3 on VOC21, 39.1 on Context59 with CLIP ViT-B/16 and DINO ViT-B/8, windows of 336 px, step 112.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig, AutoModel, ViTModel
from transformers.image_processing_base import ImageProcessingMixin

from ..checkpoints import resolve
from ..clip_spar import SparVisionModel
from ..dense_spar import merge_heads, project_heads
from ..encoder_spar import SparVisionOutput
from ..encoders.composition import resample
from ..grid_spar import fit_to_patches, resize_positions
from .encoder import MethodEncoder, above_mean, attend_by_similarity, mean_similarity

SHIFT, SHARPNESS = 1.2, 3.0  # beta and gamma
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Settings:
    """The method's numbers."""


class Encoder(MethodEncoder):
    """ProxyCLIP around a CLIP vision tower; see the head of the file.

    Args:
        vision: the tower.
        network: the second network, or the id or folder to load it from.
        image_mean, image_std: what the second network's pixels are normalised with; None as it was saved with.

    Raises:
        ValueError: the second network is no ViT with square patches.
    """

    def __init__(
        self,
        vision: SparVisionModel,
        networks: Mapping[str, str | nn.Module],
        settings: Settings = Settings(),
        method: str = "proxyclip",
        image_mean: tuple[float, ...] | None = None,
        image_std: tuple[float, ...] | None = None,
    ):
        super().__init__(vision, method)
        network = networks["dino"]
        if isinstance(network, str):
            mean, std = normalisation_of(network)
            image_mean, image_std = image_mean or mean, image_std or std
            network = load_network(network).to(vision.device, vision.dtype)
        self.network = network.eval()
        self.image_mean, self.image_std = image_mean or IMAGENET_MEAN, image_std or IMAGENET_STD
        patch_px = getattr(network.config, "patch_size", None)
        sides_px = {patch_px} if isinstance(patch_px, int) else set(patch_px or ())
        if len(sides_px) != 1:
            raise ValueError(
                f"the second network is a {type(network).__name__} with patch_size {patch_px}; give a ViT with square "
                "patches, such as facebook/dino-vitb8."
            )
        self.config.patch_size = sides_px.pop()

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D) on the second network's grid."""
        x, clip_grid_hw, clip_extent_hw = self.embed(pixel_values)
        reach = self.vision.reach(clip_grid_hw, x.device)
        for layer in self.vision.blocks[:-1]:
            x = layer(x, reach=reach)
        layer = self.last_layer
        values = merge_heads(project_heads(layer.self_attn, layer.layer_norm1(x), "v")["v"])[:, 1:]

        features, extent_hw = self.features(pixel_values)  # (B, F, h, w)
        grid_hw = (features.shape[2], features.shape[3])
        unit = nn.functional.normalize(features.flatten(2).transpose(1, 2).float(), dim=-1)
        image = values.transpose(1, 2).unflatten(2, clip_grid_hw)  # (B, N, C) -> (B, C, rows, columns)
        image = resample(image, clip_extent_hw, grid_hw, extent_hw)
        weigh = above_mean(SHIFT * mean_similarity(unit), SHARPNESS)
        mixed = attend_by_similarity(unit, image.flatten(2).transpose(1, 2), weigh)
        return self.output(layer.self_attn.out_proj(mixed), x, grid_hw, extent_hw, pixel_values)

    def features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """The second network's patches (B, F, h, w), and the height and width in pixels that they cover."""
        patch_px, rule = self.config.patch_size, self.config.size_rule
        ours, theirs = (
            [torch.tensor(v, device=pixel_values.device).view(1, -1, 1, 1) for v in pair]
            for pair in ((self.config.image_mean, self.config.image_std), (self.image_mean, self.image_std))
        )
        pixels = (pixel_values.float() * ours[1] + ours[0] - theirs[0]) / theirs[1]
        pixels, extent_hw = fit_to_patches(pixels, patch_px, rule)
        grid_hw = (pixels.shape[2] // patch_px, pixels.shape[3] // patch_px)
        pixels = pixels[:, :, : grid_hw[0] * patch_px, : grid_hw[1] * patch_px].to(
            next(self.network.parameters()).dtype
        )
        # ViT refuses other sizes unless told; the others have no such argument.
        takes = "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters
        with dino_positions(self.network, grid_hw):
            output = self.network(pixels, **({"interpolate_pos_encoding": True} if takes else {}))
        if output.get("feature_maps") is not None:
            return output.feature_maps[-1], extent_hw
        # The class token and registers come first.
        patches = output.last_hidden_state[:, -grid_hw[0] * grid_hw[1] :]
        return patches.transpose(1, 2).unflatten(2, grid_hw), extent_hw


def dino_positions(network: nn.Module, grid_hw: tuple[int, int]) -> AbstractContextManager:
    """While it holds, a `ViTModel` adds the positions of DINO's own code; any other network is left alone."""
    if not isinstance(network, ViTModel):
        return nullcontext()
    table = network.embeddings.position_embeddings[0, 1:]
    change = resize_positions(table, grid_hw, "offset") - resize_positions(table, grid_hw, "size")
    change = nn.functional.pad(change, (0, 0, 1, 0))  # the class token's stays
    return network.embeddings.register_forward_hook(lambda module, args, tokens: tokens + change)


def load_network(name: str) -> nn.Module:
    """The second network by id or folder: a backbone where it was saved as one, the vision tower of a CLIP."""
    name = resolve(name)
    config = AutoConfig.from_pretrained(name)
    if (config.architectures or [""])[0].endswith("Backbone"):
        backbone: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]  # AutoBackbone itself reads no folders
        return backbone.from_pretrained(name)
    model = AutoModel.from_pretrained(name)
    return getattr(model, "vision_model", model)


def normalisation_of(name: str) -> tuple[Any, Any]:
    """Mean and standard deviation in a checkpoint's preprocessor_config.json; None where it has none."""
    try:
        stored, _ = ImageProcessingMixin.get_image_processor_dict(resolve(name))
    except OSError:
        return None, None
    return stored.get("image_mean"), stored.get("image_std")
