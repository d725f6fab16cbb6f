"""Stable Diffusion as a second network: words and pixels in, what one pass of its UNet attends to out.

Any folder or Hub id of Stable Diffusion 1, 2 or XL and what is distilled from them (SSD-1B): a `UNet2DConditionModel`,
an `AutoencoderKL` and CLIP's text towers (`pipelines.py`). Attention is read through the processors of the layers
asked for, head by head, while they run; the others keep theirs, and so do all of them afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arithmetic_spar import with_fast_products
from ..encoders.base import rgb
from ..names_spar import shown
from .attention import Attention, Reader, Reading
from .pipelines import EXAMPLE, TEXT_CLASSES, load_parts, parts_of

__all__ = ["Attention", "Diffusion", "Prompt", "Texts"]

MIN_PX = 64  # of a picture's shorter side: smaller ones hold nothing that a network for 512 px and more could know


@dataclass(frozen=True)
class Prompt:
    """A text for the network.

    Attributes:
        ids: its tokens, start and end included.
        places: those of each of the parts it was put together from.
    """

    ids: tuple[int, ...]
    places: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Texts:
    """What the network's text towers make of prompts.

    Attributes:
        states: (P, L, C), a vector for each token, the padding's too.
        pooled: (P, D), one for each prompt; XL only.
    """

    states: Tensor
    pooled: Tensor | None = None


class Diffusion(nn.Module):
    """A Stable Diffusion pipeline; see the head of the file. No gradients.

    Args:
        pipeline: the id or folder to load it from, or a pipeline of diffusers.
        noise: (n, C, s, s): noise to take where `noise_for` would draw some.

    Raises:
        ValueError: it is another network, or a file of it is broken.
        OSError: the Hub or the files cannot be read.
    """

    noise: Tensor | None

    def __init__(self, pipeline: str | Path | Any, noise: Tensor | None = None) -> None:
        super().__init__()
        parts = load_parts(str(pipeline)) if isinstance(pipeline, str | Path) else parts_of(pipeline)
        self.unet: Any = parts["unet"].eval()
        self.vae: Any = parts["vae"].eval()
        towers = [name for name in TEXT_CLASSES if parts.get(name) is not None]
        self.text_encoders: Any = nn.ModuleList(parts[name].eval() for name in towers)
        self.tokenizers = [parts[name.replace("text_encoder", "tokenizer")] for name in towers]
        self.scheduler: Any = parts["scheduler"]
        self.alphas: list[float] = self.scheduler.alphas_cumprod.double().tolist()  # no buffer: half would round them
        self.register_buffer("noise", noise, persistent=noise is not None)
        self.is_xl = self.unet.config.addition_embed_type == "text_time"
        width = sum(parts[name].config.hidden_size for name in towers)
        if width != self.unet.config.cross_attention_dim or self.is_xl != (len(towers) == 2):
            raise ValueError(
                f"the diffusion model's text tower has {width} numbers a token and its UNet reads "
                f"{self.unet.config.cross_attention_dim}; give a pipeline whose parts are of one model, such as "
                f"{EXAMPLE}."
            )

    @classmethod
    def of(cls, given: Diffusion | str | Path | Any) -> Diffusion:
        """The adapter itself, or one around a pipeline, its id or its folder."""
        return given if isinstance(given, cls) else cls(given)

    def __repr__(self) -> str:
        return f"Diffusion({type(self.unet).__name__}, {self.side_px} px)"

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def latent_px(self) -> int:
        """Pixels of the picture to one of a latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def side_px(self) -> int:
        """Side of the square pictures it was trained with."""
        size = self.unet.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.latent_px

    # ------------------------------------------------------------------------------------------ words

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt, start and end included: 77."""
        return self.text_encoders[0].config.max_position_embeddings

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text without start and end.

        Raises:
            ValueError: the tokenizer has none for it, or one that stands for nothing.
        """
        tokenizer = self.tokenizers[0]
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not found or set(found) & set(tokenizer.all_special_ids):
            raise ValueError(
                f"the diffusion model's tokenizer has no words for {shown(text)}; write it in other words."
            )
        return list(found)

    def prompt(self, parts: Sequence[str]) -> Prompt:
        """A prompt of some parts, one after the other; an empty part has no tokens.

        Raises:
            ValueError: it is too long, or `tokens` fails.
        """
        tokenizer = self.tokenizers[0]
        ids, places = [tokenizer.bos_token_id], []
        for part in parts:
            found = self.tokens(part) if part.strip() else []
            places.append(slice(len(ids), len(ids) + len(found)))
            ids += found
        if len(ids) + 1 > self.max_tokens:
            text = " ".join(part.strip() for part in parts)
            cut = shown(tokenizer.decode(ids[self.max_tokens - 1 :]))
            raise ValueError(
                f"prompt {shown(text)} has {len(ids) + 1} tokens and the diffusion model reads {self.max_tokens}: "
                f"{cut} would be cut. Give a shorter one."
            )
        return Prompt((*ids, tokenizer.eos_token_id), tuple(places))

    def groups(self, names: Sequence[str], start: str, between: str, end: str) -> list[list[int]]:
        """Names by number, as many together as one prompt holds: start, names with `between` between them, end."""
        around = sum(len(self.tokens(part)) for part in (start, end) if part.strip()) + 2
        joint = len(self.tokens(between)) if between.strip() else 0
        groups: list[list[int]] = []
        left = 0
        for number, name in enumerate(names):
            count = len(self.tokens(name))
            if not groups or count + joint > left:
                groups.append([])
                left = self.max_tokens - around + joint
            groups[-1].append(number)
            left -= count + joint
        return groups

    @torch.no_grad()
    @with_fast_products
    def encode(self, prompts: Sequence[Prompt]) -> Texts:
        """What the text towers make of prompts, padded to their full length."""
        states, pooled = [], None
        for tokenizer, tower in zip(self.tokenizers, self.text_encoders, strict=True):
            rows = [[*p.ids, *[tokenizer.pad_token_id] * (self.max_tokens - len(p.ids))] for p in prompts]
            output = tower(torch.tensor(rows, device=self.device), output_hidden_states=self.is_xl)
            if self.is_xl:  # the last block but one, without the last norm
                states.append(output.hidden_states[-2])
                pooled = output.get("text_embeds", None)
            else:
                states.append(output.last_hidden_state)
        return Texts(torch.cat(states, dim=-1), pooled)

    # ----------------------------------------------------------------------------------------- pixels

    def check_side(self, side_px: int, whose: str) -> int:
        """A side in pixels of the square it is shown, its own for 0.

        Raises:
            ValueError: it is no multiple of what the network needs.
        """
        step = self.latent_px * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if side_px < 0 or side_px % step:
            raise ValueError(
                f"side_px of {whose} is {side_px}; it must be a multiple of {step}, or 0 for the diffusion model's "
                f"own ({self.side_px})."
            )
        return side_px or self.side_px

    def check_layers(self, names: Sequence[str], whose: str) -> None:
        """Raises a `ValueError` unless the UNet has attention layers of these names."""
        known = {name.removesuffix(".processor") for name in self.unet.attn_processors}
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{whose} reads layer {name} and this diffusion model has none; give one of Stable Diffusion 1 or "
                    f"2, such as {EXAMPLE}."
                )

    def layers(self, kind: str) -> dict[str, int]:
        """The layers of a kind, `attn1` or `attn2`: by name, how much coarser than the latent they are."""
        last = len(self.unet.config.block_out_channels) - 1
        found = {}
        for name in self.unet.attn_processors:
            if name.endswith(f".{kind}.processor"):
                block, number = name.split(".")[:2]
                level = last  # of the middle block
                if block in ("down_blocks", "up_blocks"):
                    level = int(number) if block == "down_blocks" else last - int(number)
                found[name.removesuffix(".processor")] = 2**level
        return found

    def square(self, image: Tensor, config: Any, side_px: int, mode: str = "bilinear") -> Tensor:
        """An image (1, 3, H, W) normalised by `config`, as colours from 0 to 1 in a square: (1, 3, S, S) fp32.

        Args:
            image, config: see above.
            side_px: of the square.
            mode: `bilinear`, `antialias` (the same with the filter) or `nearest`.

        Raises:
            ValueError: it is too small.
        """
        height, width = image.shape[2:]
        if min(height, width) < MIN_PX:
            raise ValueError(
                f"picture is {height}x{width} px (height x width) and a diffusion model sees nothing in one under "
                f"{MIN_PX} px; give a larger one, or enlarge it with --short-side {MIN_PX}."
            )
        colours = rgb(image, config).clamp(0, 1)
        size_hw = (side_px, side_px)
        if mode == "nearest":
            return F.interpolate(colours, size=size_hw, mode=mode)
        antialias = mode == "antialias"
        return F.interpolate(colours, size=size_hw, mode="bilinear", align_corners=False, antialias=antialias)

    def noise_for(self, seed: int, count: int, side_px: int) -> list[Tensor]:
        """Some noises (1, C, s, s) of a latent, fp32: those given, or drawn on the CPU, the same for every device."""
        side = side_px // self.latent_px
        shape = (1, self.vae.config.latent_channels, side, side)
        if self.noise is None:
            generator = torch.Generator().manual_seed(seed)
            return [torch.randn(shape, generator=generator).to(self.device) for _ in range(count)]
        if len(self.noise) < count or self.noise.shape[1:] != shape[1:]:
            raise ValueError(
                f"the diffusion model was given noise of shape {tuple(self.noise.shape)} and {count} of shape "
                f"{shape[1:]} are taken; give that, or none."
            )
        return [self.noise[number : number + 1].float() for number in range(count)]

    @torch.no_grad()
    @with_fast_products
    def latent(self, square: Tensor, noise: Tensor | None = None) -> Tensor:
        """The latent (1, C, s, s) fp32 of colours (1, 3, S, S): the posterior's mean, or with noise a sample of it.

        Raises:
            ValueError: it holds NaN or infinity, as fp16 can give.
        """
        if self.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.float()  # those of XL overflow
        posterior = self.vae.encode((2 * square - 1).to(self.vae.dtype)).latent_dist
        found = posterior.mean.float()
        if noise is not None:
            found = found + posterior.std.float() * noise
        if not found.isfinite().all():
            raise ValueError(
                f"the diffusion model's latent holds NaN or infinity in {str(self.dtype).removeprefix('torch.')}; run "
                "it in bfloat16 or float32 (--dtype)."
            )
        return found * self.vae.config.scaling_factor

    def noised(self, latent: Tensor, step: int, noise: Tensor) -> Tensor:
        """A latent under noise, as the network knows it at a step of its training."""
        if not 0 <= step < len(self.alphas):
            last = len(self.alphas) - 1
            raise ValueError(f"step is {step}; the diffusion model was trained with steps 0 to {last}. Give one.")
        return latent * self.alphas[step] ** 0.5 + noise * (1 - self.alphas[step]) ** 0.5

    # ------------------------------------------------------------------------------------------- UNet

    @torch.no_grad()
    @with_fast_products
    def look(self, latents: Tensor, step: int | Tensor, texts: Texts, readers: Mapping[str, Reader]) -> Tensor:
        """One pass of the UNet; what it predicts (P, C, s, s) fp32.

        Args:
            latents: (1 or P, C, s, s), under noise.
            step: of the training, which says how much.
            texts: of P prompts.
            readers: by layer, who is shown what it does, for one prompt after the other.

        Raises:
            ValueError: the prediction holds NaN or infinity.
        """
        states, added = texts.states, {}
        if self.is_xl:
            side = latents.shape[-1] * self.latent_px
            sizes = torch.tensor([[side, side, 0, 0, side, side]] * len(states), device=self.device, dtype=self.dtype)
            added = {"added_cond_kwargs": {"text_embeds": texts.pooled, "time_ids": sizes}}
        latents = latents.to(self.dtype).expand(len(states), *latents.shape[1:])
        with self.reading(readers):
            found = self.unet(latents, step, encoder_hidden_states=states.to(self.dtype), **added).sample.float()
        if not found.isfinite().all():
            raise ValueError(
                f"the diffusion model predicts NaN or infinity in {str(self.dtype).removeprefix('torch.')}; run it "
                "in bfloat16 or float32 (--dtype)."
            )
        return found

    @contextmanager
    def reading(self, readers: Mapping[str, Reader]) -> Iterator[None]:
        """While it holds, the layers named show what they do."""
        former = self.unet.attn_processors
        for name, read in readers.items():
            attn = self.unet.get_submodule(name)
            attn.set_processor(Reading(name, attn.processor, read))
        try:
            yield
        finally:
            self.unet.set_attn_processor(dict(former))

    @contextmanager
    def inputs(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """While it holds, what enters these modules of the UNet is kept by name: (B, C, h, w).

        Raises:
            ValueError: the UNet has no such module.
        """
        kept: dict[str, Tensor] = {}
        modules = dict(self.unet.named_modules())
        for name in names:
            if name not in modules:
                raise ValueError(f"the diffusion model has no {name}; give one of Stable Diffusion 1 or 2: {EXAMPLE}.")
        hooks = [
            modules[name].register_forward_pre_hook(lambda module, args, name=name: kept.update({name: args[0]}))
            for name in names
        ]
        try:
            yield kept
        finally:
            for hook in hooks:
                hook.remove()
