"""SigLIP's, DINOv3's and RADIO's dense features in plain NumPy, float64, one image at a time, to compare with.

Written from the papers and SPAR's description; nothing of the package and nothing of transformers is called.
"""

from __future__ import annotations

import math

import numpy as np
from plain_clip import mean_window, plain_positions, sampling_matrix, softmax

Weights = dict[str, np.ndarray]
_erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def norm(weights: Weights, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def patch_tokens(weights: Weights, name: str, pixels: np.ndarray, patch_px: int) -> tuple[np.ndarray, tuple[int, int]]:
    """(3, H, W) of whole patches -> (h * w, C) and (h, w)."""
    rows, columns = pixels.shape[1] // patch_px, pixels.shape[2] // patch_px
    kernel = weights[f"{name}.weight"]
    tokens = [
        (kernel * pixels[:, y * patch_px : (y + 1) * patch_px, x * patch_px : (x + 1) * patch_px]).sum(axis=(1, 2, 3))
        for y in range(rows)
        for x in range(columns)
    ]
    return np.array(tokens) + weights[f"{name}.bias"], (rows, columns)


def plain_siglip(
    weights: Weights,
    pixels: np.ndarray,
    patch_px: int,
    num_layers: int,
    num_heads: int,
    activation: str,
    window: int | None = None,
) -> np.ndarray:
    """Patch features (h, w, C) of one image (3, H, W), from the weights of a stock `SiglipVisionModel`."""
    _, height, width = pixels.shape
    padded = np.zeros((3, -(-height // patch_px) * patch_px, -(-width // patch_px) * patch_px))
    padded[:, :height, :width] = pixels
    x, grid_hw = patch_tokens(weights, "embeddings.patch_embedding", padded, patch_px)
    x = x + plain_positions(weights["embeddings.position_embedding.weight"], *grid_hw, "size")
    act = ACTIVATIONS[activation]
    reach = 0.0 if window is None else mean_window(grid_hw, window, others=0)
    for block in range(num_layers):
        name = f"encoder.layers.{block}"
        y = norm(weights, f"{name}.layer_norm1", x, 1e-6)
        q, k, v = (np.split(linear(weights, f"{name}.self_attn.{part}_proj", y), num_heads, axis=-1) for part in "qkv")
        mixed = [softmax(q[h] @ k[h].T / math.sqrt(q[h].shape[-1]) + reach) @ v[h] for h in range(num_heads)]
        x = x + linear(weights, f"{name}.self_attn.out_proj", np.concatenate(mixed, axis=-1))
        y = norm(weights, f"{name}.layer_norm2", x, 1e-6)
        x = x + linear(weights, f"{name}.mlp.fc2", act(linear(weights, f"{name}.mlp.fc1", y)))
    x = norm(weights, "post_layernorm", x, 1e-6)
    channels = x.shape[-1]
    value_weight = weights["head.attention.in_proj_weight"][2 * channels :]
    y = x @ value_weight.T + weights["head.attention.in_proj_bias"][2 * channels :]
    y = linear(weights, "head.attention.out_proj", y)
    z = norm(weights, "head.layernorm", y, 1e-6)
    y = y + linear(weights, "head.mlp.fc2", act(linear(weights, "head.mlp.fc1", z)))
    return y.reshape(*grid_hw, -1)


def stretch(pixels: np.ndarray, patch_px: int) -> np.ndarray:
    """(3, H, W) resized bicubically to the next multiples of the patch."""
    _, height, width = pixels.shape
    new_height, new_width = -(-height // patch_px) * patch_px, -(-width // patch_px) * patch_px
    down, across = sampling_matrix(height, new_height, "size"), sampling_matrix(width, new_width, "size")
    return np.einsum("yv,cvu,xu->cyx", down, pixels, across, optimize=True)


def turn(heads: np.ndarray, grid_hw: tuple[int, int], periods: list[float], num_prefix: int) -> np.ndarray:
    """Rotary positions of one head's tokens (P + h * w, d), a pair of channels at a time."""
    out, quarter = heads.copy(), heads.shape[-1] // 4
    rows, columns = grid_hw
    for y in range(rows):
        for x in range(columns):
            token = num_prefix + y * columns + x
            centre = (2 * (y + 0.5) / rows - 1, 2 * (x + 0.5) / columns - 1)
            for axis in range(2):
                for i in range(quarter):
                    angle = 2 * math.pi * centre[axis] / periods[i]
                    first = axis * quarter + i
                    second = first + 2 * quarter
                    a, b = heads[token, first], heads[token, second]
                    out[token, first] = a * math.cos(angle) - b * math.sin(angle)
                    out[token, second] = b * math.cos(angle) + a * math.sin(angle)
    return out


def plain_dinov3(
    weights: Weights,
    pixels: np.ndarray,
    patch_px: int,
    num_layers: int,
    num_heads: int,
    num_registers: int,
    window: int | None = None,
    periods: list[float] | None = None,
) -> np.ndarray:
    """Patch features (h, w, C) of one image (3, H, W), from the weights of a stock `DINOv3ViTModel`.

    `periods` of the rotary positions, if they are not the powers of 100.
    """
    patches, grid_hw = patch_tokens(weights, "embeddings.patch_embeddings", stretch(pixels, patch_px), patch_px)
    x = np.vstack([weights["embeddings.cls_token"][0], weights["embeddings.register_tokens"][0], patches])
    quarter = x.shape[1] // num_heads // 4
    periods = [100.0 ** (i / quarter) for i in range(quarter)] if periods is None else periods
    reach = 0.0 if window is None else mean_window(grid_hw, window, others=1 + num_registers)
    for block in range(num_layers):
        name = f"model.layer.{block}"
        y = norm(weights, f"{name}.norm1", x, 1e-5)
        q, k, v = (np.split(linear(weights, f"{name}.attention.{part}_proj", y), num_heads, axis=-1) for part in "qkv")
        mixed = []
        for h in range(num_heads):
            query, key = (turn(heads[h], grid_hw, periods, 1 + num_registers) for heads in (q, k))
            mixed.append(softmax(query @ key.T / math.sqrt(query.shape[-1]) + reach) @ v[h])
        y = linear(weights, f"{name}.attention.o_proj", np.concatenate(mixed, axis=-1))
        x = x + y * weights[f"{name}.layer_scale1.lambda1"]
        y = norm(weights, f"{name}.norm2", x, 1e-5)
        y = linear(weights, f"{name}.mlp.down_proj", ACTIVATIONS["gelu"](linear(weights, f"{name}.mlp.up_proj", y)))
        x = x + y * weights[f"{name}.layer_scale2.lambda1"]
    return norm(weights, "norm", x, 1e-5)[1 + num_registers :].reshape(*grid_hw, -1)


def plain_radio_tokens(
    weights: Weights,
    pixels: np.ndarray,
    patch_px: int,
    num_layers: int,
    num_heads: int,
    window: int | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Tokens (P + h * w, C) of one image (3, H, W) before the last `blocks - num_layers` blocks, and (h, w).

    From the weights of a stock `RadioModel`; the image comes normalised and in whole patches.
    """
    name = "embeddings"
    kernel = weights[f"{name}.patch_projection.weight"].reshape(-1, 3, patch_px, patch_px)
    as_convolution = {"patch.weight": kernel, "patch.bias": np.zeros(len(kernel))}
    patches, grid_hw = patch_tokens(as_convolution, "patch", pixels, patch_px)
    patches = patches + plain_positions(weights[f"{name}.position_embedding"][0], *grid_hw, "square")
    prefix = weights[f"{name}.cls_register_token"]
    x = np.vstack([prefix, patches])
    reach = 0.0 if window is None else mean_window(grid_hw, window, others=len(prefix))
    for block in range(num_layers):
        name = f"encoder.layer.{block}"
        y = norm(weights, f"{name}.norm1", x, 1e-6)
        q, k, v = (np.split(linear(weights, f"{name}.attention.{part}_proj", y), num_heads, axis=-1) for part in "qkv")
        mixed = [softmax(q[h] @ k[h].T / math.sqrt(q[h].shape[-1]) + reach) @ v[h] for h in range(num_heads)]
        x = radio_block_end(weights, name, x, linear(weights, f"{name}.attention.o_proj", np.hstack(mixed)))
    return x, grid_hw


def radio_block_end(weights: Weights, name: str, x: np.ndarray, attended: np.ndarray) -> np.ndarray:
    """What a block of RADIO does with what its attention gave."""
    x = x + attended * weights[f"{name}.layer_scale1.lambda1"]
    y = ACTIVATIONS["gelu"](linear(weights, f"{name}.mlp.fc1", norm(weights, f"{name}.norm2", x, 1e-6)))
    return x + linear(weights, f"{name}.mlp.fc2", y) * weights[f"{name}.layer_scale2.lambda1"]


def plain_radio_head(weights: Weights, x: np.ndarray) -> np.ndarray:
    """The head of a text teacher on tokens (..., C), two residual blocks."""

    def normed_linear(name: str, x: np.ndarray) -> np.ndarray:
        return linear(weights, f"{name}.linear", ACTIVATIONS["gelu"](norm(weights, f"{name}.norm", x, 1e-5)))

    x = linear(weights, "adaptor.fc1", x)
    for block in range(2):
        x = x + normed_linear(f"adaptor.blocks.{block}", x)
    return normed_linear("adaptor.final", x)


def plain_radio(
    weights: Weights,
    pixels: np.ndarray,
    patch_px: int,
    num_layers: int,
    num_heads: int,
    num_prefix: int,
    window: int | None = None,
) -> np.ndarray:
    """Patch features (h, w, D) of one image (3, H, W): the trunk's patches through the head."""
    x, grid_hw = plain_radio_tokens(weights, stretch(pixels, patch_px), patch_px, num_layers, num_heads, window)
    return plain_radio_head(weights, x[num_prefix:]).reshape(*grid_hw, -1)
