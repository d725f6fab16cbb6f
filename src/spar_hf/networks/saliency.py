"""Saliency: how probable it is that a pixel belongs to a thing in front, whatever it is.

FOUND ("Unsupervised Object Localization: Observing the Background to Discover Objects", Siméoni et al., CVPR 2023) is
a 1 x 1 convolution on the keys of DINO ViT-S/8's last block. Its file, `decoder_weights.pt` of valeoai/FOUND, is read
as it is, without running anything in it; or as safetensors. Any semantic segmentation model of transformers with one
label, or two of which the second is the thing, does as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSemanticSegmentation

from ..checkpoint_files import load_pickle
from ..checkpoints import folder_of
from ..pretrained import open_model
from .loading import SecondNetwork, normalisation_of
from .vit import ViT

FOUND_DINO = "facebook/dino-vits8"
FILES = (".pt", ".pth", ".safetensors")


class Found(nn.Module):
    """FOUND on a DINO.

    Args:
        dino: the ViT whose keys it reads.
        weight, bias: of the convolution, (1, C, 1, 1) and (1).

    Raises:
        ValueError: they don't fit.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, dino: ViT, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        width = dino.network.config.hidden_size
        if tuple(weight.shape) != (1, width, 1, 1) or tuple(bias.shape) != (1,):
            raise ValueError(
                f"FOUND's weights are of shapes {tuple(weight.shape)} and {tuple(bias.shape)}, and network 'dino' has "
                f"{width} channels; give those of shape {(1, width, 1, 1)} and (1,), or the DINO they were trained on."
            )
        self.dino = dino
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, pixel_values: Tensor, config: Any) -> Tensor:
        """Probabilities (B, H, W) fp32 of pixels (B, 3, H, W) normalised by `config`."""
        height, width = pixel_values.shape[2:]
        patch_px = self.dino.patch_px
        down, across = -height % patch_px, -width % patch_px
        mean, std = (torch.tensor(v).to(pixel_values).view(1, 3, 1, 1) for v in (config.image_mean, config.image_std))
        # FOUND pads with zeros what DINO's own mean and deviation have normalised.
        ours = torch.tensor(self.dino.image_mean).to(pixel_values).view(1, 3, 1, 1)
        shift = (ours - mean) / std
        padded = F.pad(pixel_values - shift, (0, across, 0, down)) + shift
        keys = self.dino(padded, config, heads="k").heads["k"].float()
        logits = F.conv2d(keys, self.weight.float(), self.bias.float())
        pixels = F.interpolate(logits, scale_factor=patch_px, mode="bilinear", align_corners=False)
        return pixels[:, 0, :height, :width].sigmoid()


class Foreground(SecondNetwork):
    """A semantic segmentation model of one label, or of two, as saliency; see `SecondNetwork`.

    Raises:
        ValueError: it is another network.
    """

    def __init__(self, network: str | nn.Module) -> None:
        mean = std = None
        if isinstance(network, str):
            mean, std = normalisation_of(network)
            network = open_model(AutoModelForSemanticSegmentation, folder_of(network, {}))
        super().__init__(network, mean, std)
        labels = getattr(getattr(network, "config", None), "num_labels", 0)
        if not type(network).__name__.endswith("ForSemanticSegmentation") or labels not in (1, 2):
            raise ValueError(
                f"the saliency network is a {type(network).__name__} of {labels} labels; give FOUND's weights "
                f"({', '.join(FILES)}), or a semantic segmentation model of one label, or of background and thing."
            )

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, config: Any) -> Tensor:
        """See `Found.forward`."""
        logits = self.network(self.renormalised(pixel_values, config).to(self.dtype)).logits.float()
        logits = F.interpolate(logits, size=pixel_values.shape[2:], mode="bilinear", align_corners=False)
        return logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)[:, 1]


def open_saliency(given: Any, dino: Any = None) -> nn.Module:
    """What `saliency` stands for: FOUND's file, with the DINO it is for; or a network, its id or folder.

    Args:
        given: see above; an adapter is given back.
        dino: for FOUND; None is its authors'.

    Raises:
        ValueError: the file is broken, or the network of another kind.
    """
    if isinstance(given, Found | Foreground):
        return given
    if not isinstance(given, str | Path) or Path(given).suffix not in FILES:
        return Foreground(str(given) if isinstance(given, Path) else given)
    weight, bias = read_found(Path(given))
    return Found(ViT.of(dino or FOUND_DINO), weight, bias)


def read_found(path: Path) -> tuple[Tensor, Tensor]:
    """The weight and bias in FOUND's file; no code in it is run.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give FOUND's decoder_weights.pt, as network 'saliency'.")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else load_pickle(path)
        state = state.get("decoder", state)
        return state["weight"], state["bias"]
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        brief = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise ValueError(f"{path} holds no weights of FOUND ({brief}); give its decoder_weights.pt.") from None
