"""SAM and SAM 2 of transformers as second networks: an image encoder, and masks from prompts.

Images go in as the authors' preprocessing has them: SAM's by their longer side, zeros at the right and the bottom;
SAM 2's stretched to a square. Resizing is bilinear with antialias, on floats (theirs rounds to bytes in between).
`networks.masks` makes region maps of what is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Sam2Model, SamModel, SamVisionModel

from ..arithmetic_spar import with_fast_products
from .loading import SecondNetwork

# Numbers of the masks that are resized at a time, 128 MB in fp32.
MASK_NUMBERS = 2**25


@dataclass(frozen=True)
class GlobalAttention:
    """The last block of a SAM's image encoder on one image, which attends over its whole grid, padding included.

    Attributes:
        query, key, value: (H, n, n, d).
        rel_pos: decomposed relative positions along rows and columns, each (2 n - 1, d); None where it has none.
        valid_hw: rows and columns of the grid that the image fills; the rest is padding.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rel_pos: tuple[Tensor, Tensor] | None
    valid_hw: tuple[int, int]

    @property
    def valid_values(self) -> Tensor:
        """(H, N, d) of the N patches that the image fills."""
        return self.valid(self.value)

    def valid(self, grid: Tensor) -> Tensor:
        """(H, n, n, d) -> (H, N, d)."""
        return grid[:, : self.valid_hw[0], : self.valid_hw[1]].flatten(1, 2)

    def rows(self, first: int, last: int) -> Tensor:
        """The attention of some of the N patches that the image fills to all N: (H, last - first, N).

        The soft-max runs over the padding too, so that rows do not add to one.
        """
        side, head_dim = self.key.shape[2:]
        query = self.valid(self.query)[:, first:last]
        scores = query @ self.key.flatten(1, 2).transpose(1, 2) * head_dim**-0.5
        if self.rel_pos is not None:
            at = torch.arange(first, last, device=query.device)
            place = torch.arange(side, device=query.device)
            down, across = (  # of each query to each row, and to each column: (H, m, n)
                torch.einsum("hmd,mnd->hmn", query, table[axis[:, None] - place + side - 1])
                for axis, table in zip((at // self.valid_hw[1], at % self.valid_hw[1]), self.rel_pos, strict=True)
            )
            scores = (scores.unflatten(2, (side, side)) + down[..., None] + across[:, :, None]).flatten(2)
        weights = scores.float().softmax(dim=-1).to(query.dtype)
        return weights.unflatten(2, (side, side))[:, :, : self.valid_hw[0], : self.valid_hw[1]].flatten(2)


@dataclass(frozen=True)
class SamImage:
    """An image that a SAM has seen, to be prompted.

    Attributes:
        embeddings: what the mask decoder takes of it.
        image_hw: its height and width, pixels.
        resized_hw: what the network saw of it, pixels.
    """

    embeddings: Any
    image_hw: tuple[int, int]
    resized_hw: tuple[int, int]


class Sam(SecondNetwork):
    """A SAM or SAM 2 as a second network: a `SamModel`, `Sam2Model` or, as an image encoder only, `SamVisionModel`.

    See `SecondNetwork`.

    Raises:
        ValueError: it is another network.
    """

    def __init__(self, network: str | nn.Module, *normalisation: Sequence[float] | None) -> None:
        super().__init__(network, *normalisation)
        if not isinstance(self.network, (SamModel, Sam2Model, SamVisionModel)):
            raise ValueError(
                f"the second network is a {type(self.network).__name__}; give a SAM or SAM 2, such as "
                "facebook/sam-vit-base or facebook/sam2.1-hiera-large."
            )
        config: Any = self.network.config
        self.image_px: int = getattr(config, "prompt_encoder_config", config).image_size
        self.stretches = isinstance(self.network, Sam2Model)
        self._last: tuple[Tensor, Any, Tensor | None] | None = None  # pixels, embeddings, last projections
        self.kept: tuple[Any, Any] | None = None  # what was drawn last, and what it depends on; see `SamRegions`

    def resized_hw(self, image_hw: tuple[int, int], long_px: int | None = None) -> tuple[int, int]:
        """Height and width at which the network sees an image; `long_px` is the longer side, or the network's own."""
        long_px = self.image_px if long_px is None else long_px
        if self.stretches:
            return long_px, long_px
        scale = long_px / max(image_hw)
        return int(image_hw[0] * scale + 0.5), int(image_hw[1] * scale + 0.5)

    def prepare(self, pixel_values: Tensor, config: Any) -> tuple[Tensor, tuple[int, int]]:
        """Pixels (B, 3, H, W) normalised by `config` -> the network's (B, 3, S, S), and what the image fills of it."""
        resized_hw = self.resized_hw((pixel_values.shape[2], pixel_values.shape[3]))
        pixels = self.renormalised(pixel_values, config)
        if pixels.shape[2:] != resized_hw:
            pixels = F.interpolate(pixels, size=resized_hw, mode="bilinear", align_corners=False, antialias=True)
        pixels = F.pad(pixels, (0, self.image_px - resized_hw[1], 0, self.image_px - resized_hw[0]))
        return pixels.to(self.dtype), resized_hw

    def _encoded(self, pixels: Tensor) -> tuple[Any, Tensor | None]:
        """The network's embeddings of prepared pixels, and its last block's projections where they are one layer's.

        Those of the last image are kept: the same image is often looked at and then prompted.
        """
        if self._last is not None and torch.equal(self._last[0], pixels):
            return self._last[1:]
        kept: list[Tensor] = []
        layers = getattr(self.network.vision_encoder, "layers", None)
        hook = (
            layers[-1].attn.qkv.register_forward_hook(lambda module, args, out: kept.append(out)) if layers else None
        )
        try:
            if isinstance(self.network, SamVisionModel):
                embeddings = self.network.vision_encoder(pixels).last_hidden_state
            else:
                embeddings = self.network.get_image_embeddings(pixels)
        finally:
            if hook is not None:
                hook.remove()
        self._last = (pixels, embeddings, kept[0] if kept else None)
        return self._last[1:]

    @torch.no_grad()
    @with_fast_products
    def last_attention(self, pixel_values: Tensor, config: Any) -> list[GlobalAttention]:
        """What the image encoder's last block attends with, for each image of (B, 3, H, W).

        Raises:
            ValueError: the network is no SAM of the first generation, or its last block attends in windows.
        """
        layers = getattr(getattr(self.network, "vision_encoder", None), "layers", None)
        if layers is None or layers[-1].window_size:
            raise ValueError(
                f"the second network is a {type(self.network).__name__} whose last block does not attend over the "
                "whole image; give a SAM such as facebook/sam-vit-base."
            )
        attention = layers[-1].attn
        pixels, resized_hw = self.prepare(pixel_values, config)
        _, projections = self._encoded(pixels)
        assert projections is not None
        patch_px = pixels.shape[2] // projections.shape[1]
        valid_hw = (resized_hw[0] // patch_px, resized_hw[1] // patch_px)
        if not min(valid_hw):
            raise ValueError(
                f"image is {pixel_values.shape[2]}x{pixel_values.shape[3]} px (height x width), of which SAM sees less"
                f" than one patch in one direction; cut it to a ratio below {self.image_px // patch_px}."
            )
        rel_pos = (attention.rel_pos_h, attention.rel_pos_w) if attention.use_rel_pos else None
        heads = projections.unflatten(-1, (3, attention.num_attention_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        return [  # heads: (3, B, H, n, n, d)
            GlobalAttention(query, key, value, rel_pos, valid_hw) for query, key, value in zip(*heads, strict=True)
        ]

    @torch.no_grad()
    @with_fast_products
    def encode(self, pixel_values: Tensor, config: Any) -> SamImage:
        """One image (1, 3, H, W), to be prompted.

        Raises:
            ValueError: the network is an image encoder alone.
        """
        if isinstance(self.network, SamVisionModel):
            raise ValueError("the second network is SAM's image encoder alone; masks need a whole SamModel.")
        pixels, resized_hw = self.prepare(pixel_values, config)
        embeddings, _ = self._encoded(pixels)
        return SamImage(embeddings, (pixel_values.shape[2], pixel_values.shape[3]), resized_hw)

    @torch.no_grad()
    @with_fast_products
    def prompted(
        self,
        image: SamImage,
        points: Tensor | None = None,
        boxes: Tensor | None = None,
        mask: Tensor | None = None,
        frame_hw: tuple[int, int] | None = None,
        several: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Masks of prompts.

        Args:
            image: from `encode`.
            points: (N, P, 2), foreground points of each prompt, x first.
            boxes: (N, 4), left, top, right, bottom.
            mask: (s, s), one map of logits for all prompts, in the decoder's own frame; see `mask_prompt`.
            frame_hw: size of the image that points and boxes are in; None is the image's own.
            several: three masks a prompt instead of one.

        Returns:
            Mask logits (N, M, s, s) in the decoder's own frame, see `at_image_size`, and the expected IoU (N, M).
        """
        dtype = self.dtype
        frame_hw = image.image_hw if frame_hw is None else frame_hw
        sides = zip(self.resized_hw(frame_hw), frame_hw, strict=True)
        to_network = torch.tensor([resized / side for resized, side in sides]).flip(0)  # x first
        prompts: dict[str, Any] = {}
        if points is not None:
            prompts["input_points"] = (points * to_network.to(points)).to(dtype)[None]
            prompts["input_labels"] = torch.ones(points.shape[:2], dtype=torch.int32, device=points.device)[None]
        if boxes is not None:
            prompts["input_boxes"] = (boxes * to_network.repeat(2).to(boxes)).to(dtype)[None]
        if mask is not None:
            prompts["input_masks"] = mask.to(dtype)[None, None]
        output = self.network(image_embeddings=image.embeddings, multimask_output=several, **prompts)
        return output.pred_masks[0].float(), output.iou_scores[0].float()

    @property
    def mask_px(self) -> int:
        """Side of the decoder's maps."""
        return 4 * self.image_px // self.network.config.prompt_encoder_config.patch_size

    def mask_prompt(self, scores: Tensor, image_hw: tuple[int, int]) -> Tensor:
        """A map (h, w) of an image, bilinear in the decoder's frame (s, s), zeros where the image is padded."""
        size = self.resized_hw(image_hw, self.mask_px)
        small = F.interpolate(scores[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        return F.pad(small, (0, self.mask_px - size[1], 0, self.mask_px - size[0]))

    def at_image_size(self, logits: Tensor, image: SamImage) -> Tensor:
        """Mask logits (N, M, s, s) -> (N, M, H, W) of the image, bilinear."""
        if not self.stretches:
            logits = F.interpolate(logits, size=(self.image_px,) * 2, mode="bilinear", align_corners=False)
            logits = logits[..., : image.resized_hw[0], : image.resized_hw[1]]
        return F.interpolate(logits, size=image.image_hw, mode="bilinear", align_corners=False)

    def grid_masks(
        self, image: SamImage, points_per_side: int, several: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Masks of a grid of points, three a point or one, some at a time: logits (n, H, W), expected IoU (n)."""
        place = (torch.arange(points_per_side) + 0.5) / points_per_side
        points = torch.stack([place.repeat(points_per_side), place.repeat_interleave(points_per_side)], dim=-1)
        points = (points * torch.tensor(image.image_hw[::-1])).to(self.device)
        batch = min(max(MASK_NUMBERS // (3 * image.image_hw[0] * image.image_hw[1]), 1), 64)
        for chunk in points.split(batch):
            logits, scores = self.prompted(image, points=chunk[:, None], several=several)
            yield self.at_image_size(logits, image).flatten(0, 1), scores.flatten()
