"""What `pretrain_tiny.py` trains: tokenizer, CLIP and optimisers, and their state as tensors; `pretrain_vit.py` shares
the last two."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from tiny_views import PATCH_PX, SIDE_PX, Words
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from spar_hf.picture_book.dataset import CLASSES, COLOURS, NUM_THINGS, PATTERNS

MAX_TEXT_TOKENS = 40


def train_tokenizer(seed: int, vocab_size: int = 1280) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's layout: 256 bytes, the same at the end of a word, merges, two marks.

    Every byte is a token, so that any text can be written; the merges come from names and phrases of the picture book,
    and end when all of its words are whole, or at `vocab_size`.
    """
    words = Words(np.random.default_rng(seed))
    rng = words.rng
    corpus = [words.prompt(words.name(int(rng.integers(len(CLASSES))))) for _ in range(20_000)]
    counts = (NUM_THINGS, len(COLOURS), len(PATTERNS))
    corpus += [words.prompt(words.phrase(*(int(rng.integers(n)) for n in counts))) for _ in range(20_000)]
    corpus += ["in front of the and on a an"] * 2_000
    marks = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # CLIPTokenizer splits and lower-cases as CLIP does; the trainer must see words split the same way.
    clip = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(alphabet) - len(marks),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # dict.fromkeys: two merges may give one token.
    tokens = dict.fromkeys([*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges)])
    vocab = {token: number for number, token in enumerate([*tokens, *marks])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TEXT_TOKENS)


def build_model(tokenizer: CLIPTokenizer, width: int = 192, blocks: int = 6) -> CLIPModel:
    """A CLIP in stock shapes: image tower `width` x `blocks`, text tower 128 x 3, a shared space of 128."""
    text = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": MAX_TEXT_TOKENS, "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "hidden_act": "gelu", "projection_dim": 128,
    }  # fmt: skip
    vision = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": blocks,
        "num_attention_heads": width // 32, "image_size": SIDE_PX, "patch_size": PATCH_PX, "hidden_act": "gelu",
        "projection_dim": 128,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def make_optimizers(model: nn.Module, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest; biases, norms and the temperature without decay."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    tables = [p for name, p in model.named_parameters() if p.ndim > 1 and not (p.ndim == 2 and ".layers." in name)]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # With this adjustment one learning rate serves both (Liu et al. 2025, Muon is scalable for LLM training).
    muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.98))]


def state_of(model: nn.Module, average: nn.Module, optimizers: list) -> dict[str, torch.Tensor]:
    """All that `put_back` needs."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for row, buffers in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number} {row} {name}": value for name, value in buffers.items()}
    return tensors


def put_back(tensors: Mapping[str, torch.Tensor], model: nn.Module, average: nn.Module, optimizers: list) -> None:
    """Gives a run the state that was written down; the settings of the optimizers are those of this run.

    Raises:
        ValueError: the state is that of another network.
    """
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    own, stored = (
        {key: tuple(value.shape) for key, value in state.items()} for state in (model.state_dict(), parts["model"])
    )
    if own != stored:
        raise ValueError("the run there is of a network of another size; give the flags that it was started with.")
    model.load_state_dict(parts["model"])
    average.load_state_dict(parts["average"])
    buffers: list[dict[int, dict[str, torch.Tensor]]] = [defaultdict(dict) for _ in optimizers]
    for key, value in parts["optimizer"].items():
        number, row, name = key.split(" ")
        buffers[int(number)][int(row)][name] = value
    for optimizer, state in zip(optimizers, buffers, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(state)})
