"""Small random CLIPs, a tokenizer, processors and pixels that the tests share. Nothing is downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Before anything reads it: what asks the Hub fails at once, and doesn't wait for a network. Subprocesses inherit it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from spar_hf import METHODS, SparConfig, SparModel, SparVisionConfig, SparVisionModel

ROWS = [name for name, method in METHODS.items() if method.recipe]  # methods that are a last block and no more
PATCH_PX = 16
NATIVE_PX = 64
# Height and width of the four kinds of image. 32 x 128 has as many patches as the native 64 x 64 in another grid.
SIZES_HW = {"native": (64, 64), "larger": (112, 128), "same_count": (32, 128), "off_grid": (90, 75)}
# All widths differ, so that a transposed or mixed-up axis cannot fit by chance.
VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 3,
    "num_hidden_layers": 12,
    "image_size": NATIVE_PX,
    "patch_size": PATCH_PX,
    "projection_dim": 24,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 77,
    "projection_dim": 24,
}
WORDS = (
    "a photo of the my one small large many cropped bright dark blurry good bad low resolution close-up picture "
    "drawing sketch rendering itap origami road car automobile sky tree house person grass sea sand dog cat"
)

torch.set_num_threads(1)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Gives every weight a value that matters.

    transformers starts with zero biases, unit norms and projections so small that each soft-max is nearly uniform:
    a wrong bias, norm or attention map would go unseen. Here scores have a standard deviation of about one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name == "logit_scale":
                weight.fill_(2.0)
            elif name == "temperature":
                weight.fill_(0.1)
            elif "norm" in name or "layrnorm" in name:
                weight.copy_(0.3 * noise + name.endswith("weight"))
            elif weight.ndim < 2 or ("embedding.weight" in name and "patch" not in name):
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise * weight[0].numel() ** -0.5)


@pytest.fixture(scope="session")
def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with its layout of the vocabulary: bytes, bytes that end a word, merges, start, end."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.train_from_iterator([WORDS] * 2, trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>"))
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT["max_position_embeddings"])


@pytest.fixture(scope="session")
def make_clip(clip_tokenizer: CLIPTokenizer) -> Callable[..., CLIPModel]:
    """`make_clip(num_hidden_layers=6, ...)`: a random stock CLIP; fields are those of `CLIPVisionConfig`."""
    special = {"bos_token_id": clip_tokenizer.bos_token_id, "eos_token_id": clip_tokenizer.eos_token_id}
    text = {**TEXT, **special, "pad_token_id": clip_tokenizer.pad_token_id, "vocab_size": len(clip_tokenizer)}

    @cache
    def make(**vision: Any) -> CLIPModel:
        config = CLIPConfig(
            text_config=text, vision_config={**VISION, **vision}, projection_dim=VISION["projection_dim"]
        )
        model = CLIPModel(config).eval()
        randomise(model, seed=0)
        return model

    return make


@pytest.fixture(scope="session")
def make_vision(make_clip: Callable[..., CLIPModel]) -> Callable[..., SparVisionModel]:
    """`make_vision(method="naclip", num_hidden_layers=6)`: our tower with the weights of the stock CLIP."""

    def make(num_hidden_layers: int = 12, **config: Any) -> SparVisionModel:
        clip = make_clip(num_hidden_layers=num_hidden_layers)
        model = SparVisionModel(
            SparVisionConfig(**{**VISION, "num_hidden_layers": num_hidden_layers, **config})
        ).eval()
        weights = {**clip.vision_model.state_dict(), "visual_projection.weight": clip.visual_projection.weight}
        model.load_state_dict(weights)
        return model

    return make


@pytest.fixture(scope="session")
def make_spar(make_clip: Callable[..., CLIPModel]) -> Callable[..., SparModel]:
    """`make_spar(method="naclip", num_hidden_layers=6)`: our whole model with the weights of the stock CLIP."""

    def make(num_hidden_layers: int = 12, **config: Any) -> SparModel:
        clip = make_clip(num_hidden_layers=num_hidden_layers)
        vision = {**VISION, "num_hidden_layers": num_hidden_layers, **config}
        model = SparModel(
            SparConfig(
                text_config=clip.config.text_config.to_dict(),
                vision_config=vision,
                projection_dim=VISION["projection_dim"],
            )
        ).eval()
        renamed = {
            name.replace("visual_projection", "vision_model.visual_projection"): weight
            for name, weight in clip.state_dict().items()
        }
        model.load_state_dict(renamed)
        return model

    return make


@pytest.fixture(scope="session")
def clip_folder(make_clip: Callable[..., CLIPModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock CLIP checkpoint of 6 blocks on disk, as `CLIPModel.save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("clip")
    make_clip(num_hidden_layers=6).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def spar_processor(clip_tokenizer: CLIPTokenizer) -> Any:
    """A `SparProcessor` for the tiny models."""
    from spar_hf import SparImageProcessor, SparProcessor

    return SparProcessor(image_processor=SparImageProcessor(), tokenizer=clip_tokenizer)


@pytest.fixture(scope="module")
def model(make_spar: Callable[..., SparModel]) -> SparModel:
    """A tiny random SPAR model, which `model_folder` holds."""
    return make_spar(num_hidden_layers=2)


@pytest.fixture(scope="session")
def model_folder(make_spar, spar_processor, tmp_path_factory) -> str:
    """The tiny random SPAR model with its processor, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("model")
    make_spar(num_hidden_layers=2).save_pretrained(folder)
    spar_processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pixels() -> Callable[..., torch.Tensor]:
    """`pixels("off_grid", batch=2)` or `pixels((90, 75))`: normalised pixels (B, 3, H, W), the same on each call."""

    def make(size_hw: str | tuple[int, int], batch: int = 1) -> torch.Tensor:
        height, width = SIZES_HW[size_hw] if isinstance(size_hw, str) else size_hw
        return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))

    return make
