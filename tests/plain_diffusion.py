"""Stable Diffusion read plainly: the pipeline's own calls, every attention as a whole matrix, numbers in fp64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from plain_vfm import bilinear
from torch.nn import functional as F


class PlainDiffusion:
    """A pipeline of diffusers and the noises that are taken, (n, C, s, s)."""

    def __init__(self, pipeline: Any, noise: torch.Tensor) -> None:
        self.pipe, self.noise = pipeline, noise

    def square(self, pixels: np.ndarray, config: Any, side: int, mode: str = "bilinear") -> torch.Tensor:
        """Colours (1, 3, S, S) of normalised pixels (3, H, W)."""
        mean, std = (np.array(v)[:, None, None] for v in (config.image_mean, config.image_std))
        colours = np.clip(pixels.astype(np.float64) * std + mean, 0, 1)
        if mode == "nearest":
            rows, columns = (np.arange(side) * n // side for n in colours.shape[1:])
            colours = colours[:, rows][:, :, columns]
        elif mode == "antialias":
            image = torch.from_numpy(colours)[None]
            colours = F.interpolate(image, size=(side, side), mode="bilinear", antialias=True)[0].numpy()
        else:
            colours = bilinear(colours, (side, side))
        return torch.from_numpy(colours)[None].float()

    def noised(self, square: torch.Tensor, step: int, sampled: bool = False) -> torch.Tensor:
        """The latent under noise; sampled: the first noise is the posterior's."""
        posterior = self.pipe.vae.encode(2 * square - 1).latent_dist
        latent = posterior.mean + posterior.std * self.noise[:1] if sampled else posterior.mean
        noise = self.noise[1:2] if sampled else self.noise[:1]
        latent = latent * self.pipe.vae.config.scaling_factor
        return self.pipe.scheduler.add_noise(latent, noise, torch.tensor([step]))

    def words(self, prompt: str) -> torch.Tensor:
        """(1, L, C)."""
        return self.pipe.encode_prompt(prompt, torch.device("cpu"), 1, False)[0]

    def ids(self, text: str) -> list[int]:
        return self.pipe.tokenizer(text)["input_ids"]

    def run(self, latent: torch.Tensor, step: int, states: torch.Tensor) -> dict[str, dict[str, np.ndarray]]:
        """What each attention did: q, raw (heads, N, M), probs (heads, N, M), out (N, C), in the order they ran."""
        kept: dict[str, dict[str, np.ndarray]] = {}

        class Keep:
            def __init__(self, name: str) -> None:
                self.name = name

            def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
                context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
                heads = [part.chunk(attn.heads, dim=-1) for part in (
                    attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
                )]  # fmt: skip
                raws = [(q @ k.transpose(1, 2)) / q.shape[-1] ** 0.5 for q, k, _ in zip(*heads, strict=True)]
                probs = [raw.softmax(dim=-1) for raw in raws]
                mixed = torch.cat([p @ v for p, v in zip(probs, heads[2], strict=True)], dim=-1)
                out = attn.to_out[1](attn.to_out[0](mixed))
                found = {"q": torch.cat(heads[0], dim=-1)[0], "raw": torch.cat(raws), "probs": torch.cat(probs)}
                kept[self.name] = {key: v.double().numpy() for key, v in {**found, "out": out[0]}.items()}
                return out

        unet = self.pipe.unet
        former = dict(unet.attn_processors)
        unet.set_attn_processor({name: Keep(name.removesuffix(".processor")) for name in former})
        unet(latent, step, encoder_hidden_states=states)
        unet.set_attn_processor(former)
        return kept


def minmax(x: np.ndarray, least: float = 0.0) -> np.ndarray:
    return (x - x.min()) / (x.max() - x.min() + least)


def grid(rows: np.ndarray) -> np.ndarray:
    """(N,) or (N, L) -> (s, s) or (L, s, s)."""
    side = round(len(rows) ** 0.5)
    return rows.reshape(side, side) if rows.ndim == 1 else rows.T.reshape(-1, side, side)


def sure_labels(scores: list[np.ndarray], ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The id of the best score at each pixel, and where no other one is near; names of one id are one."""
    best = {number: np.max([s for s, i in zip(scores, ids, strict=True) if i == number], axis=0) for number in ids}
    order = np.sort(list(best.values()), axis=0)
    sure = order[-1] - order[-2] > 1e-4 if len(best) > 1 else np.ones(order[0].shape, bool)
    return np.array(list(best))[np.argmax(list(best.values()), axis=0)], sure
