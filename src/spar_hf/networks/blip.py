"""BLIP as a second network: how well a caption matches an image, and which patches that comes from, word by word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipForImageTextRetrieval
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..checkpoints import folder_of
from ..pretrained import open_model, open_tokenizer
from .loading import SecondNetwork, normalisation_of


class Blip(SecondNetwork):
    """A `BlipForImageTextRetrieval` and its tokenizer.

    Args:
        network: the network, or the id or folder to load both from.
        tokenizer: of a network that was not loaded by name.

    Raises:
        ValueError: it is another network, or has no tokenizer.
    """

    def __init__(self, network: str | nn.Module, tokenizer: Any = None) -> None:
        mean, std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD  # BLIP's, too
        if isinstance(network, str):
            own_mean, own_std = normalisation_of(network)
            mean, std, folder = own_mean or mean, own_std or std, folder_of(network, {})
            network, tokenizer = open_model(BlipForImageTextRetrieval, folder), open_tokenizer(folder)
        if not isinstance(network, BlipForImageTextRetrieval) or tokenizer is None:
            raise ValueError(
                f"the network is a {type(network).__name__} with {'no' if tokenizer is None else 'a'} tokenizer;"
                " give a BlipForImageTextRetrieval with its own, by id or folder: Salesforce/blip-itm-large-coco."
            )
        super().__init__(network, mean, std)
        self.tokenizer = tokenizer

    @property
    def patch_px(self) -> int:
        return self.network.config.vision_config.patch_size

    def caption(self, start: str, names: list[str]) -> tuple[Tensor, list[slice]]:
        """A caption of names in a row: its tokens (1, L), and the places of each name's word pieces among them.

        The first token is [ENC], the last one of the vocabulary, which BLIP was trained to match with; the processor
        of transformers leaves BERT's [CLS] there.

        Raises:
            ValueError: it is too long for the network, or a name has no word piece.
        """
        text = self.network.config.text_config

        def pieces(words: str) -> list[int]:
            return self.tokenizer(words, add_special_tokens=False)["input_ids"]

        tokens, places = [text.vocab_size - 1, *pieces(start)], []
        for name in names:
            found = pieces(name)
            if not found:
                raise ValueError(f"BLIP's tokenizer makes nothing of the name {name!r}; write it otherwise.")
            places.append(slice(len(tokens), len(tokens) + len(found)))
            tokens += found
        tokens.append(self.tokenizer.sep_token_id)
        if len(tokens) > text.max_position_embeddings:
            raise ValueError(
                f"the names make a caption of {len(tokens)} tokens and BLIP reads {text.max_position_embeddings}; "
                "give fewer names."
            )
        return torch.tensor([tokens], device=self.device), places

    @torch.inference_mode(False)  # whoever calls: what is made here has gradients
    def match_cam(self, pixels: Tensor, tokens: Tensor, layer: int, head: int) -> Tensor:
        """Grad-CAM of the match: attention times the positive part of its gradient, (L, h, w), fp32.

        Args:
            pixels: (1, 3, H, W), normalised for this network, whole patches.
            tokens: (1, L).
            layer: number of the text encoder's block, from 1.
            head: of its cross attention, from 0.

        Raises:
            ValueError: there is no such block or head.
        """
        text = self.network.config.text_config
        if not (0 < layer <= text.num_hidden_layers and 0 <= head < text.num_attention_heads):
            raise ValueError(
                f"layer {layer} and head {head} of BLIP's text encoder are asked for; it has layers 1 to "
                f"{text.num_hidden_layers} and heads 0 to {text.num_attention_heads - 1}. Give others."
            )
        kept: list[Tensor] = []

        def leaf(module: nn.Module, args: Any, attention: Tensor) -> Tensor:
            kept.append(attention.detach().requires_grad_())
            return kept[0]

        attends = self.network.text_encoder.encoder.layer[layer - 1].crossattention.self
        hook = attends.dropout.register_forward_hook(leaf)
        try:
            with torch.enable_grad():
                match = self.network(
                    input_ids=tokens.clone(),
                    pixel_values=pixels.clone().to(self.dtype),
                    attention_mask=torch.ones_like(tokens),
                    interpolate_pos_encoding=True,
                ).itm_score[0, 1]
                (gradient,) = torch.autograd.grad(match, kept[0])
        finally:
            hook.remove()
        cam = kept[0].detach()[0, head, :, 1:].float() * gradient[0, head, :, 1:].float().clamp(
            min=0
        )  # no class token
        return cam.unflatten(1, (pixels.shape[2] // self.patch_px, pixels.shape[3] // self.patch_px))
