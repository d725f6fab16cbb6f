"""Pictures that Stable Diffusion draws of a word, and where in them it attended to that word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..arithmetic_spar import products
from ..grid_spar import upsample
from .diffusion import Attention, Diffusion, Prompt


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Attributes:
        prompt: what comes before the name (OVDiff's).
        side_px: of the picture; 0 is the network's own.
        steps: UNet passes, of DDIM.
        guidance: how far a step goes from what it is without words to what it is with them.
        threshold: share of the range of the name's attention from which on a pixel is of it.
        seed: of the first picture; the others have the next ones.
    """

    prompt: str = "A good photo of a"
    side_px: int = 0
    steps: int = 50
    guidance: float = 7.5
    threshold: float = 0.5
    seed: int = 0

    def prompt_of(self, diffusion: Diffusion, name: str) -> Prompt:
        """The prompt of a name; its second place is the name's."""
        return diffusion.prompt((self.prompt, name))


class Heat:
    """The mean cross attention to some tokens of the second prompt, over heads, layers and passes.

    Args:
        place: the tokens.
        side: of the grid that all layers come to, bilinearly.
    """

    def __init__(self, place: slice, side: int) -> None:
        self.place, self.side, self.total, self.count = place, side, torch.zeros(()), 0

    def __call__(self, attention: Attention) -> None:
        if attention.number != 1:
            return
        own = attention.mean()[:, self.place].mean(dim=1).view(attention.side, attention.side)
        self.total = self.total.to(own.device) + upsample(own, (self.side, self.side)) * attention.num_heads
        self.count += attention.num_heads


@torch.no_grad()
def draw(diffusion: Diffusion, name: str, settings: Drawing, seed: int) -> tuple[Image.Image, np.ndarray]:
    """A picture of a name, and where the name is (H, W) bool.

    Args:
        diffusion: draws.
        name: the words.
        settings: how.
        seed: of the noise it starts from, drawn on the CPU.

    Raises:
        ValueError: the name fits into no prompt, or the network gives NaN.
    """
    side_px = diffusion.check_side(settings.side_px, "a drawing")
    prompt = settings.prompt_of(diffusion, name)
    texts = diffusion.encode([diffusion.prompt(()), prompt])
    latent = diffusion.noise_for(seed, 1, side_px)[0]
    heat = Heat(prompt.places[1], latent.shape[-1])
    readers = dict.fromkeys(diffusion.layers("attn2"), heat)
    scheduler = diffusion.scheduler
    scheduler.set_timesteps(settings.steps)
    latent = latent * scheduler.init_noise_sigma
    for step in scheduler.timesteps.tolist():
        without, with_words = diffusion.look(latent, step, texts, readers).split(1)
        predicted = without + settings.guidance * (with_words - without)
        latent = scheduler.step(predicted, step, latent).prev_sample
    maps = upsample(heat.total / heat.count, (side_px, side_px))
    low, high = maps.aminmax()
    inside = maps >= low + settings.threshold * (high - low)
    return picture_of(diffusion, latent), inside.cpu().numpy()


def picture_of(diffusion: Diffusion, latent: Tensor) -> Image.Image:
    """The picture of a latent (1, C, s, s)."""
    with products(diffusion.device, diffusion.dtype):
        decoded = diffusion.vae.decode((latent / diffusion.vae.config.scaling_factor).to(diffusion.vae.dtype)).sample
    colours = ((decoded[0].float() + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(colours.permute(1, 2, 0).cpu().numpy())
