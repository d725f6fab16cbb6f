"""The other families' dense features in plain NumPy, float64, one image at a time: what the tests compare with.

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
    naflex: bool = False,
) -> np.ndarray:
    """Patch features (h, w, C) of one image (3, H, W), from the weights of a stock `SiglipVisionModel`.

    Or of a `Siglip2VisionModel` (NaFlex), which sees an image stretched to whole patches.
    """
    _, height, width = pixels.shape
    fitted = np.zeros((3, -(-height // patch_px) * patch_px, -(-width // patch_px) * patch_px))
    fitted[:, :height, :width] = pixels
    if naflex:
        fitted = stretch(pixels, patch_px)
        rows = weights["embeddings.patch_embedding.weight"].reshape(-1, patch_px, patch_px, 3)  # y, x, channel
        weights = {**weights, "embeddings.patch_embedding.weight": rows.transpose(0, 3, 1, 2)}
    x, grid_hw = patch_tokens(weights, "embeddings.patch_embedding", fitted, patch_px)
    rule = "bilinear_antialias" if naflex else "size"
    x = x + plain_positions(weights["embeddings.position_embedding.weight"], *grid_hw, rule)
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


def plain_tips(
    weights: Weights,
    pixels: np.ndarray,
    patch_px: int,
    num_layers: int,
    num_heads: int,
    num_registers: int,
    window: int | None = None,
) -> np.ndarray:
    """Patch features (h, w, C) of one image (3, H, W), from the weights of a stock `Tipsv2VisionModel`."""
    rows, columns = pixels.shape[1] // patch_px, pixels.shape[2] // patch_px
    whole = pixels[:, : rows * patch_px, : columns * patch_px]
    patches, grid_hw = patch_tokens(weights, "embeddings.patch_embeddings.projection", whole, patch_px)
    table = weights["embeddings.position_embeddings"][0]
    patches = patches + plain_positions(table[1:], *grid_hw, "bilinear_antialias")
    class_token = weights["embeddings.cls_token"][0] + table[:1]
    x = np.vstack([class_token, weights["embeddings.register_tokens"][0], patches])
    reach = 0.0 if window is None else mean_window(grid_hw, window, others=1 + num_registers)
    for block in range(num_layers):
        name = f"encoder.layer.{block}"
        y = norm(weights, f"{name}.norm1", x, 1e-6)
        q, k, v = (np.split(linear(weights, f"{name}.attention.{part}_proj", y), num_heads, axis=-1) for part in "qkv")
        mixed = [softmax(q[h] @ k[h].T / math.sqrt(q[h].shape[-1]) + reach) @ v[h] for h in range(num_heads)]
        y = linear(weights, f"{name}.attention.o_proj", np.concatenate(mixed, axis=-1))
        x = x + y * weights[f"{name}.layer_scale1.lambda1"]
        y = linear(weights, f"{name}.mlp.fc1", norm(weights, f"{name}.norm2", x, 1e-6))
        y = linear(weights, f"{name}.mlp.fc2", ACTIVATIONS["gelu"](y))
        x = x + y * weights[f"{name}.layer_scale2.lambda1"]
    return norm(weights, "layernorm", x, 1e-6)[1 + num_registers :].reshape(*grid_hw, -1)


def turn_by_grid(heads: np.ndarray, grid_hw: tuple[int, int], num_prefix: int, counted: int, pe: bool) -> np.ndarray:
    """Rotary positions of EVA-02 or PE-Core, in one head's tokens (P + h * w, d), a pair (i, i + d / 2) at a time."""
    out, quarter = heads.copy(), heads.shape[-1] // 4
    rows, columns = grid_hw
    offset = num_prefix if pe else 0
    for y in range(rows):
        for x in range(columns):
            token = num_prefix + y * columns + x
            places = ((y + offset) / rows * counted, (x + offset) / columns * counted)
            for i in range(2 * quarter):
                axis = i // quarter
                angle = places[1 - axis if pe else axis] * 10000.0 ** (-(i % quarter) / quarter)
                a, b = heads[token, i], heads[token, i + 2 * quarter]
                out[token, i] = a * math.cos(angle) - b * math.sin(angle)
                out[token, i + 2 * quarter] = b * math.cos(angle) + a * math.sin(angle)
    return out


def plain_eva(
    weights: Weights,
    pixels: np.ndarray,
    patch_px: int,
    num_layers: int,
    num_heads: int,
    pe: bool,
    window: int | None = None,
) -> np.ndarray:
    """Patch features (h, w, D) of one image (3, H, W), from the weights of our EVA-02 or PE-Core tower."""
    eps, prefix = 1e-5 if pe else 1e-6, int("class_embedding" in weights)
    rows, columns = pixels.shape[1] // patch_px, pixels.shape[2] // patch_px
    whole = pixels[:, : rows * patch_px, : columns * patch_px]
    weights = {"patch_embedding.bias": np.zeros(1), **weights}
    x, grid_hw = patch_tokens(weights, "patch_embedding", whole, patch_px)
    table = weights["position_embedding"]
    x = x + plain_positions(table[prefix:], *grid_hw, "antialias")
    if prefix:
        x = np.vstack([weights["class_embedding"] + table[:1], x])
    if pe:
        x = norm(weights, "pre_norm", x, eps)
    counted = math.isqrt(len(table) - prefix) if pe else 16
    reach = 0.0 if window is None else mean_window(grid_hw, window, others=prefix)
    for block in range(num_layers):
        name = f"layers.{block}"
        y = norm(weights, f"{name}.norm1", x, eps)
        q, k, v = (np.split(linear(weights, f"{name}.self_attn.{part}_proj", y), num_heads, axis=-1) for part in "qkv")
        mixed = []
        for h in range(num_heads):
            query, key = (turn_by_grid(heads[h], grid_hw, prefix, counted, pe) for heads in (q, k))
            weight = softmax(query @ key.T / math.sqrt(query.shape[-1]) + reach)
            if not pe and block == num_layers - 1:
                weight[1:] = np.eye(len(weight))[1:]  # each patch its own value
            mixed.append(weight @ v[h])
        y = np.concatenate(mixed, axis=-1)
        y = y if pe else norm(weights, f"{name}.self_attn.norm", y, eps)
        x = x + linear(weights, f"{name}.self_attn.out_proj", y)
        y = norm(weights, f"{name}.norm2", x, eps)
        if pe:
            y = linear(weights, f"{name}.mlp.fc2", ACTIVATIONS["gelu"](linear(weights, f"{name}.mlp.fc1", y)))
        else:
            gate = linear(weights, f"{name}.mlp.gate_proj", y)
            y = gate / (1 + np.exp(-gate)) * linear(weights, f"{name}.mlp.up_proj", y)
            y = linear(weights, f"{name}.mlp.down_proj", norm(weights, f"{name}.mlp.norm", y, eps))
        x = x + y
    x = norm(weights, "post_norm", x, eps)[prefix:]
    if pe:
        channels = x.shape[-1]
        value_weight = weights["head.attention.in_proj_weight"][2 * channels :]
        y = x @ value_weight.T + weights["head.attention.in_proj_bias"][2 * channels :]
        y = linear(weights, "head.attention.out_proj", y)
        z = ACTIVATIONS["gelu"](linear(weights, "head.mlp.fc1", norm(weights, "head.layernorm", y, eps)))
        x = y + linear(weights, "head.mlp.fc2", z)
    return linear(weights, "visual_projection", x).reshape(*grid_hw, -1)


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
