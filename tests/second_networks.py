"""Small random second networks for any row of the table, by the name that the row gives them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import randomise
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2Model,
    Sam2VisionConfig,
    SamConfig,
    SamModel,
    SamVisionConfig,
    SamVisionModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTModel,
)

from spar_hf import METHODS, REFINEMENTS, Labels
from spar_hf.checkpoints import ASSETS
from spar_hf.evaluation.samples import IGNORED, Sample
from spar_hf.methods.bank import Bank
from spar_hf.networks.blip import Blip
from spar_hf.networks.diffusion import Diffusion
from spar_hf.pretrained import open_tokenizer
from spar_hf.prototypes import Pictures, build_bank

# Of methods whose own are too large for these networks, or have to be given.
SETTINGS: dict[str | None, dict[str, Any]] = {
    "lavg": {"side_px": 96},
    "clip_diy": {"side_px": 64, "crops_px": (64, 32)},
    "reco": {"side_px": 48, "pictures": 2},
    "freeda": {"side_px": 64, "neighbours": 3},
    "knn_clip": {"neighbours": 3, "threshold": 0.5, "weight": 0.7},
    "corrclip_v2_bank": {"neighbours": 3},
    "iseg": {"heads_quarter": (1, 4, 12), "heads_half": (0, 5), "ending": "and other object"},
    "maskdiffusion": {"rows": 40, "columns": 48},
}
NAMES = "road; car, automobile; sky; grass"


@cache
def small(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "dino":  # three heads, as conftest's CLIP has
        own = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3, "image_size": 64, "patch_size": 8}
        return ViTModel(ViTConfig(num_hidden_layers=2, **own)).eval()
    if name == "sam":
        return sam_model()
    if name == "sam_vision":  # its image encoder alone
        own = {"hidden_size": 24, "mlp_dim": 32, "num_attention_heads": 2, "image_size": 128, "patch_size": 16}
        own |= {"num_hidden_layers": 2, "output_channels": 8, "window_size": 3, "global_attn_indexes": [1]}
        return SamVisionModel(SamVisionConfig(**own)).eval()
    if name == "regions":  # its masks are chosen by settings; superpixels are there for any image
        return "slic"  # type: ignore[return-value]
    if name == "blip":
        return blip_model()
    if name == "diffusion":
        return Diffusion(diffusion_pipeline())
    if name == "saliency":
        own = {"num_encoder_blocks": 1, "depths": [1], "hidden_sizes": [8], "sr_ratios": [4], "strides": [4]}
        own |= {"patch_sizes": [7], "num_attention_heads": [2], "mlp_ratios": [2], "decoder_hidden_size": 8}
        return SegformerForSemanticSegmentation(SegformerConfig(**own, num_labels=1)).eval()
    raise KeyError(f"tests/second_networks.py makes no network {name!r}; add one")


def networks_for(method: str | None, refine: Iterable[str] = ()) -> dict[str, Any]:
    """Networks for `build_encoder` and `build_segmenter`: all that the method and the refinements need but a bank."""
    needs = {} if method is None else METHODS[method].needs
    known = [REFINEMENTS[row] for row in refine if row in REFINEMENTS]
    wanted = [*needs, *(name for row in known for name in row.networks)]
    return {name: small(name) for name in wanted if name != "bank"}


def pictures(
    count: int = 4, labels: Any = NAMES, whole: bool = False, size_hw: tuple[int, int] = (80, 96)
) -> Pictures:
    """Small random pictures, each with two of the classes, or one all over, and a strip of none."""
    vocabulary = Labels.parse(labels)

    def read(number: int) -> Sample:
        noise = np.random.default_rng(number).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize(size_hw[::-1], Image.Resampling.BICUBIC)
        target = np.full(size_hw, number % len(vocabulary), np.int32)
        if not whole:
            target[:, size_hw[1] // 3 :] = (number + 1) % len(vocabulary)
            target[: size_hw[0] // 5] = IGNORED
        return Sample(f"picture {number}", image, target)

    return Pictures(vocabulary, tuple(f"picture {number}" for number in range(count)), read)


def bank_for(
    method: str, path: Path, model: Any, processor: Any, networks: dict[str, Any], labels: Any = NAMES
) -> Bank:
    """A bank of small random pictures for a method and these networks."""
    given = {**{name: small("dino") for name in METHODS[method].bank}, **networks}
    chosen = {"networks": given, "settings": SETTINGS.get(method)}
    references = pictures(1, labels, size_hw=(48, 64)) if METHODS[method].bank else pictures(6, labels)  # slow
    return build_bank(path, method, model, processor, references, progress=False, **chosen)


def blip_model() -> Blip:
    """A BLIP of 64 px whose text encoder has the block and the head that PnP-OVSS reads; word pieces are letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "picture", "of", "road", *letters, *(f"##{c}" for c in letters)]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    text = {"vocab_size": len(words) + 2, "hidden_size": 20, "num_attention_heads": 10, "num_hidden_layers": 9}
    text |= {"intermediate_size": 24, "max_position_embeddings": 64, "encoder_hidden_size": 16}
    text |= {"bos_token_id": len(words), "pad_token_id": 0, "sep_token_id": 3, "initializer_range": 0.2}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 64, "patch_size": 16, "initializer_range": 0.2}
    return Blip(BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision)), tokenizer)


def diffusion_pipeline(xl: bool = False, **unet: Any) -> Any:
    """A Stable Diffusion of 64 px, or an XL of that size: four levels, latents of 16 px; the words are `tiny`'s."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    tokenizer = open_tokenizer(ASSETS / "tiny")
    tokenizer.model_max_length = 77
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "hidden_size": 20, "intermediate_size": 24, "num_attention_heads": 2}
    text = CLIPTextConfig(**text, num_hidden_layers=2, max_position_embeddings=77, projection_dim=10, **ids)
    towers = [CLIPTextModel(text), *([CLIPTextModelWithProjection(text)] if xl else [])]
    sides = {"block_out_channels": (12, 12, 24, 24), "norm_num_groups": 3, "sample_size": 16}
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4} if xl else {}
    more |= {"projection_class_embeddings_input_dim": 10 + 6 * 4} if xl else {}
    config = {"down_block_types": down, "up_block_types": tuple(name.replace("Down", "Up") for name in down[::-1])}
    config |= {"attention_head_dim": 3, "cross_attention_dim": 20 * len(towers), **sides, **more, **unet}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(**blocks, block_out_channels=(6, 6, 12), norm_num_groups=3, latent_channels=4)
    network = UNet2DConditionModel(**config)
    for seed, part in enumerate((network, vae, *towers)):
        randomise(part, seed)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    betas |= {"steps_offset": 1, "set_alpha_to_one": False}
    parts: dict[str, Any] = {"unet": network, "vae": vae, "scheduler": DDIMScheduler(**betas)}
    parts |= {"text_encoder": towers[0], "tokenizer": tokenizer}
    if xl:
        return StableDiffusionXLPipeline(**parts, text_encoder_2=towers[1], tokenizer_2=tokenizer)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def sam_model() -> torch.nn.Module:
    """A whole SAM of 128 px."""
    prompts = {"hidden_size": 8, "image_size": 128, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 8, "mlp_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    decoder |= {"attention_downsample_rate": 2, "iou_head_hidden_dim": 8, "iou_head_depth": 2}
    vision = {**small("sam_vision").config.to_dict(), "num_pos_feats": 4}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    return SamModel(config).eval()


def sam2_model() -> torch.nn.Module:
    """A whole SAM 2 of 128 px."""
    widths = [8, 16, 32, 64]
    trunk = Sam2HieraDetConfig(
        hidden_size=8,
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[1, 2, 4, 8],
        blocks_per_stage=[1, 1, 2, 1],
        global_attention_blocks=[3],
        window_size_per_stage=[8, 4, 4, 4],
        image_size=[128, 128],
    )
    vision = Sam2VisionConfig(
        backbone_config=trunk,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=16,
    )
    prompts = {"hidden_size": 16, "image_size": 128, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    config = Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    return Sam2Model(config).eval()


def folders_for(method: str, parent: Path, flag: str) -> list[str]:
    """The words of a command line that give a method the small networks it needs but a bank, saved as folders."""
    words = []
    for name, network in networks_for(method).items():
        if isinstance(network, str):
            words += [flag, f"{name}={network}"]
            continue
        if isinstance(network, Diffusion):
            diffusion_pipeline().save_pretrained(parent / name)
            words += [flag, f"{name}={parent / name}"]
            continue
        if isinstance(network, Blip):
            network.tokenizer.save_pretrained(parent / name)
            network = network.network
        network.save_pretrained(parent / name)
        words += [flag, f"{name}={parent / name}"]
    return words
