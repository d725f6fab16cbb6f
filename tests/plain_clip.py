"""CLIP and the training-free methods in plain NumPy, float64, one image at a time: what the tests compare with.

Written from the papers and from nothing in the package: every map is a full matrix, every head a turn of a loop.
"""

from __future__ import annotations

import math

import numpy as np
from transformers import CLIPModel, CLIPVisionConfig

# ------------------------------------------------------------------------------------------ positions


def cubic_kernel(distance: float, a: float) -> float:
    """Keys' cubic convolution kernel (1981)."""
    t = abs(distance)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    if t < 2:
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return 0.0


def sampling_matrix(n_in: int, n_out: int, rule: str) -> np.ndarray:
    """(n_out, n_in): the weight of each input sample in each output sample, by the position rule."""
    weights = np.zeros((n_out, n_in))
    for row in range(n_out):
        if rule.endswith("antialias"):  # Pillow's filter: the kernel stretched over the inputs that one output covers
            step = max(n_in / n_out, 1.0)
            centre = (row + 0.5) * n_in / n_out
            for column in range(n_in):
                distance = (column + 0.5 - centre) / step
                hat = max(1 - abs(distance), 0.0)
                weights[row, column] = hat if rule.startswith("bilinear") else cubic_kernel(distance, a=-0.5)
            weights[row] /= weights[row].sum()
            continue
        scale = (n_out + 0.1) / n_in if rule == "offset" else n_out / n_in
        place = (row + 0.5) / scale - 0.5
        if rule == "bilinear":
            place = min(max(place, 0.0), n_in - 1.0)
        below = math.floor(place)
        for tap in range(below - 1, below + 3):
            distance = place - tap
            weight = max(1 - abs(distance), 0.0) if rule == "bilinear" else cubic_kernel(distance, a=-0.75)
            weights[row, min(max(tap, 0), n_in - 1)] += weight
    return weights


def plain_positions(table: np.ndarray, rows: int, columns: int, rule: str) -> np.ndarray:
    """(n * n, C) -> (rows * columns, C); the table itself on its own grid."""
    side = math.isqrt(len(table))
    if (rows, columns) == (side, side):
        return table
    grid = table.reshape(side, side, -1)
    if rule == "square":
        longer = max(rows, columns)
        whole = plain_positions(table, longer, longer, "bilinear").reshape(longer, longer, -1)
        return whole[:rows, :columns].reshape(rows * columns, -1)
    down, across = sampling_matrix(side, rows, rule), sampling_matrix(side, columns, rule)
    return np.einsum("yv,vuc,xu->yxc", down, grid, across, optimize=True).reshape(rows * columns, -1)


# ------------------------------------------------------------------------------------------------ CLIP


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


class PlainClip:
    """A CLIP vision tower, for one image of (3, H, W) pixels."""

    def __init__(self, clip: CLIPModel):
        weights = {name: value.double().numpy() for name, value in clip.state_dict().items()}
        self.take(weights, clip.config.vision_config)

    @classmethod
    def of_tower(cls, tower: dict[str, np.ndarray], config: CLIPVisionConfig) -> PlainClip:
        """From the weights of a vision tower with its projection."""
        net = cls.__new__(cls)
        weights = {f"vision_model.{name}": weight for name, weight in tower.items()}
        net.take({**weights, "visual_projection.weight": tower["visual_projection.weight"]}, config)
        return net

    def take(self, weights: dict[str, np.ndarray], config: CLIPVisionConfig) -> None:
        self.weights = weights
        self.patch_px, self.num_heads, self.num_layers = (
            config.patch_size,
            config.num_attention_heads,
            config.num_hidden_layers,
        )
        assert config.hidden_act == "quick_gelu"
        self.reach: np.ndarray | None = None  # added to all scores, (1 + N, 1 + N)

    def reach_of(self, tokens: int) -> np.ndarray | float:
        """The reach between the last `tokens` tokens: all, or the patches alone."""
        return 0.0 if self.reach is None else self.reach[-tokens:, -tokens:]

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def embed(self, pixels: np.ndarray, rule: str) -> tuple[np.ndarray, tuple[int, int]]:
        """Tokens (1 + N, C) before the first block, and the grid; what is over a multiple of the patch is dropped."""
        p, name = self.patch_px, "vision_model.embeddings"
        rows, columns = pixels.shape[1] // p, pixels.shape[2] // p
        kernel = self.weights[f"{name}.patch_embedding.weight"]  # (C, 3, p, p)
        patches = [
            (kernel * pixels[:, y * p : (y + 1) * p, x * p : (x + 1) * p]).sum(axis=(1, 2, 3))
            for y in range(rows)
            for x in range(columns)
        ]
        table = self.weights[f"{name}.position_embedding.weight"]
        class_token = self.weights[f"{name}.class_embedding"] + table[0]
        tokens = np.vstack([class_token, np.array(patches) + plain_positions(table[1:], rows, columns, rule)])
        return self.norm("vision_model.pre_layrnorm", tokens), (rows, columns)

    def heads(self, block: int, x: np.ndarray, projection: str) -> list[np.ndarray]:
        """q, k or v of ln_1(x) for each head, (1 + N, d) each; `block` is 0-based."""
        name = f"vision_model.encoder.layers.{block}"
        return np.split(
            self.linear(f"{name}.self_attn.{projection}_proj", self.norm(f"{name}.layer_norm1", x)),
            self.num_heads,
            axis=-1,
        )

    def maps(self, block: int, x: np.ndarray, left: str, right: str, bias: np.ndarray | float = 0.0) -> np.ndarray:
        """softmax(d^-0.5 left rightᵀ + bias) of each head, (H, 1 + N, 1 + N)."""
        pairs = zip(self.heads(block, x, left), self.heads(block, x, right), strict=True)
        bias = bias + self.reach_of(len(x))
        return np.stack([softmax(a @ b.T / math.sqrt(a.shape[-1]) + bias) for a, b in pairs])

    def attend(self, block: int, x: np.ndarray, maps: np.ndarray) -> np.ndarray:
        """out_proj of each head's map times its values, (1 + N, C)."""
        values = self.heads(block, x, "v")
        mixed = np.concatenate([a @ v for a, v in zip(maps, values, strict=True)], axis=-1)
        return self.linear(f"vision_model.encoder.layers.{block}.self_attn.out_proj", mixed)

    def feed_forward(self, block: int, x: np.ndarray) -> np.ndarray:
        """x + mlp(ln_2(x))."""
        name = f"vision_model.encoder.layers.{block}"
        hidden = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.layer_norm2", x))
        return x + self.linear(f"{name}.mlp.fc2", hidden / (1 + np.exp(-1.702 * hidden)))

    def block(self, block: int, x: np.ndarray) -> np.ndarray:
        """CLIP's own block."""
        return self.feed_forward(block, x + self.attend(block, x, self.maps(block, x, "q", "k")))

    def inputs(self, tokens: np.ndarray) -> list[np.ndarray]:
        """The input of each block, and last the output of the last one."""
        states = [tokens]
        for block in range(self.num_layers):
            states.append(self.block(block, states[-1]))
        return states

    def project(self, tokens: np.ndarray) -> np.ndarray:
        """post_layernorm and projection, (N, C) -> (N, D)."""
        return self.linear("visual_projection", self.norm("vision_model.post_layernorm", tokens))


# --------------------------------------------------------------------------------------------- methods
# Each takes the network, the input of every block (and the last one's output), and the grid; it returns the tokens
# (1 + N, C) that go through post_layernorm and the projection. Row 0, the class token, is not looked at.

Inputs = list[np.ndarray]
GridHW = tuple[int, int]


def clip(net: PlainClip, inputs: Inputs, grid_hw: GridHW) -> np.ndarray:
    return inputs[-1]


def maskclip(net: PlainClip, inputs: Inputs, grid_hw: GridHW) -> np.ndarray:
    last, x = net.num_layers - 1, inputs[-2]
    values = np.concatenate(net.heads(last, x, "v"), axis=-1)
    x = x + net.linear(f"vision_model.encoder.layers.{last}.self_attn.out_proj", values)
    return net.feed_forward(last, x)


def sclip(net: PlainClip, inputs: Inputs, grid_hw: GridHW) -> np.ndarray:
    last, x = net.num_layers - 1, inputs[-2]
    maps = net.maps(last, x, "q", "q") + net.maps(last, x, "k", "k")
    return net.feed_forward(last, x + net.attend(last, x, maps))


def clearclip(net: PlainClip, inputs: Inputs, grid_hw: GridHW) -> np.ndarray:
    last, x = net.num_layers - 1, inputs[-2]
    return net.attend(last, x, net.maps(last, x, "q", "q"))


def gaussian(grid_hw: GridHW, sigma_patches: float) -> np.ndarray:
    """exp(-distance² / (2 sigma²)) between patches, (1 + N, 1 + N); the class token's row and column are 0."""
    places = [(y, x) for y in range(grid_hw[0]) for x in range(grid_hw[1])]
    bias = np.zeros((1 + len(places), 1 + len(places)))
    for i, (y, x) in enumerate(places, start=1):
        for j, (v, u) in enumerate(places, start=1):
            bias[i, j] = math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * sigma_patches**2))
    return bias


def naclip(net: PlainClip, inputs: Inputs, grid_hw: GridHW) -> np.ndarray:
    last, x = net.num_layers - 1, inputs[-2]
    return net.attend(last, x, net.maps(last, x, "k", "k", gaussian(grid_hw, 5.0)))


def cliptrase(net: PlainClip, inputs: Inputs, grid_hw: GridHW) -> np.ndarray:
    last, x = net.num_layers - 1, inputs[-2]
    maps = net.maps(last, x, "q", "q") + net.maps(last, x, "k", "k") + net.maps(last, x, "v", "v")
    return net.feed_forward(last, x + net.attend(last, x, maps))


def clip_surgery(net: PlainClip, inputs: Inputs, grid_hw: GridHW) -> np.ndarray:
    first = max(net.num_layers - 6, 0)
    path = inputs[first]
    for block in range(first, net.num_layers):
        path = path + net.attend(block, inputs[block], net.maps(block, inputs[block], "v", "v"))
    return path


def itaclip(net: PlainClip, inputs: Inputs, grid_hw: GridHW) -> np.ndarray:
    last = net.num_layers - 1
    earlier = {12: (6, 7, 9), 6: (3, 3, 4)}[net.num_layers]  # blocks 7, 8, 10 of twelve, counted from 0

    def both(block: int) -> np.ndarray:
        return net.maps(block, inputs[block], "q", "q") + net.maps(block, inputs[block], "k", "k")

    maps = 0.5 * both(last) + 0.5 * sum(both(block) for block in earlier) / 3
    return inputs[-2] + net.attend(last, inputs[-2], maps)


def resclip(net: PlainClip, inputs: Inputs, grid_hw: GridHW) -> np.ndarray:
    last = net.num_layers - 1
    earlier = {12: (5, 6, 7, 8), 6: (2, 3, 3, 4)}[net.num_layers]
    rest = sum(net.maps(block, inputs[block], "q", "k") for block in earlier) / 4
    local = net.maps(last, inputs[-2], "k", "k", gaussian(grid_hw, 5.0))
    return net.attend(last, inputs[-2], 2.0 * (0.6 * local + 0.4 * rest))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def gem(net: PlainClip, inputs: Inputs, grid_hw: GridHW) -> np.ndarray:
    first = max(net.num_layers - 6, 0)
    path = inputs[first]
    for block in range(first, net.num_layers):
        x = inputs[block]
        normed = net.norm(f"vision_model.encoder.layers.{block}.layer_norm1", x)
        length = np.mean([math.sqrt(sum(token**2)) for token in normed])
        heads = []
        for q, k, v in zip(*(net.heads(block, x, name) for name in "qkv"), strict=True):
            temperature = length / math.sqrt(v.shape[-1])
            mixed = []
            for y in (q, k, v):
                y = unit(y)
                y = unit(softmax(temperature * y @ y.T + net.reach_of(len(x))) @ y)
                mixed.append(softmax(temperature * y @ y.T + net.reach_of(len(x))) @ v)
            heads.append((mixed[0] + mixed[1] + mixed[2]) / 3)
        name = f"vision_model.encoder.layers.{block}.self_attn.out_proj"
        path = path + net.linear(name, np.concatenate(heads, axis=-1))
    return path


def outlier_factors(patches: np.ndarray) -> np.ndarray:
    """SC-CLIP's: mean over the 30 nearest of (own squared reach / their squared reach)."""
    count = len(patches)
    neighbours = min(30, count - 1)
    nearest, reach = [], []
    for i in range(count):
        squared = [sum((patches[i] - patches[j]) ** 2) for j in range(count)]
        order = sorted((j for j in range(count) if j != i), key=lambda j: squared[j])[:neighbours]
        nearest.append(order)
        reach.append(squared[order[-1]])
    return np.array([np.mean([reach[i] / reach[j] for j in nearest[i]]) for i in range(count)])


def repaired(patches: np.ndarray, outliers: np.ndarray, grid_hw: GridHW) -> np.ndarray:
    """Outliers become the mean of the sound patches among their eight neighbours."""
    rows, columns = grid_hw
    result = patches.copy()
    for index in np.flatnonzero(outliers):
        y, x = divmod(index, columns)
        around = [
            v * columns + u
            for v in range(max(y - 1, 0), min(y + 2, rows))
            for u in range(max(x - 1, 0), min(x + 2, columns))
            if not outliers[v * columns + u]
        ]
        if around:
            result[index] = patches[around].mean(axis=0)
    return result


def sc_clip(net: PlainClip, inputs: Inputs, grid_hw: GridHW) -> np.ndarray:
    last = net.num_layers - 1
    outputs = inputs[1:]
    # Outputs of blocks 4, 9 and 4 to 10 of twelve, counted from 1; the same share of six.
    low, late, several = {12: (3, 8, range(3, 10)), 6: (1, 4, range(1, 5))}[net.num_layers]
    x = inputs[last]
    factors = outlier_factors(x[1:])
    outliers = factors > np.quantile(factors, 0.95) * (1 + 1e-5)  # not by rounding alone

    def averaged(values: np.ndarray, features: np.ndarray) -> np.ndarray:
        cosine = unit(features) @ unit(features).T
        weights = np.where(cosine >= 0.4, cosine, 0.0)
        return weights / (weights.sum(axis=1, keepdims=True) + 1e-6) @ values

    features = repaired(outputs[late][1:], outliers, grid_hw)
    cosine = unit(features) @ unit(features).T
    scores = 3 * (cosine - cosine.mean())
    shared = softmax(np.where(scores < 0, -np.inf, scores))

    def last_block(patches: np.ndarray) -> np.ndarray:
        return net.attend(last, patches, (shared[None] + net.maps(last, patches, "k", "k")) / 2)

    path = last_block(averaged(repaired(x[1:], outliers, grid_hw), features)) + 0.3 * x[0]
    path = averaged(path, outputs[low][1:])
    many = sum(outputs[i] for i in several)
    path = path + averaged(last_block(many[1:]) + 0.3 * many[0], outputs[low][1:])
    return np.vstack([x[:1], path])


def cliper(net: PlainClip, inputs: Inputs, grid_hw: GridHW) -> np.ndarray:
    last = net.num_layers - 1
    maps = sum(net.maps(block, inputs[block], "q", "k") for block in range(last))
    for _ in range(net.num_layers):
        maps = maps / maps.sum(axis=-2, keepdims=True)
        maps = maps / maps.sum(axis=-1, keepdims=True)
    maps = (maps + maps.transpose(0, 2, 1)) / 2
    maps = np.maximum(maps - maps.mean(axis=-2, keepdims=True), 0)
    maps = maps / maps.sum(axis=-1, keepdims=True)
    return net.attend(last, inputs[last], maps)


def proxyclip(net: PlainClip, inputs: Inputs, grid_hw: GridHW, features: np.ndarray, ratio: float) -> np.ndarray:
    """`features` (h, w, F) of the second network, whose patches are CLIP's side divided by `ratio`; (h * w, C)."""
    last = net.num_layers - 1
    rows, columns, _ = features.shape
    cosine = unit(features.reshape(rows * columns, -1)) @ unit(features.reshape(rows * columns, -1)).T
    scores = 3 * (cosine - 1.2 * cosine.mean())
    weights = softmax(np.where(scores < 0, -np.inf, scores))

    def lookup(n: int, n_in: int) -> np.ndarray:
        """(n, n_in): bilinear weights of CLIP's rows or columns at the centres of the second network's."""
        table = np.zeros((n, n_in))
        for i in range(n):
            place = min(max((i + 0.5) / ratio - 0.5, 0.0), n_in - 1.0)
            below = min(math.floor(place), max(n_in - 2, 0))
            table[i, below] += 1 - (place - below)
            if n_in > 1:
                table[i, below + 1] += place - below
        return table

    down, across = lookup(rows, grid_hw[0]), lookup(columns, grid_hw[1])
    heads = []
    for v in net.heads(last, inputs[last], "v"):
        image = v[1:].reshape(*grid_hw, -1)
        image = np.einsum("yv,vuc,xu->yxc", down, image, across, optimize=True).reshape(rows * columns, -1)
        heads.append(weights @ image)
    return net.linear(f"vision_model.encoder.layers.{last}.self_attn.out_proj", np.concatenate(heads, axis=-1))


# By name: the formulation, and the rule for positions that the authors ran with.
PLAIN_METHODS = {
    "clip": (clip, "size"),
    "maskclip": (maskclip, "offset"),
    "sclip": (sclip, "offset"),
    "clearclip": (clearclip, "offset"),
    "naclip": (naclip, "offset"),
    "cliptrase": (cliptrase, "offset"),
    "clip_surgery": (clip_surgery, "bilinear"),
    "itaclip": (itaclip, "offset"),
    "resclip": (resclip, "offset"),
    "gem": (gem, "antialias"),
    "sc_clip": (sc_clip, "offset"),
    "cliper": (cliper, "bilinear"),
}


def mean_window(grid_hw: GridHW, window: int, others: int = 1) -> np.ndarray:
    """log of the share of the windows over patch i that are over patch k too; 0 for the `others` tokens, first.

    A window of `window` patches (or the whole side, where that is shorter) is put at every place of the grid.
    """
    rows, columns = grid_hw
    height, width = min(window, rows), min(window, columns)
    both = np.zeros((rows * columns, rows * columns))
    for top in range(rows - height + 1):
        for left in range(columns - width + 1):
            inside = [y * columns + x for y in range(top, top + height) for x in range(left, left + width)]
            both[np.ix_(inside, inside)] += 1
    with np.errstate(divide="ignore"):
        return np.pad(np.log(both / both.diagonal()[:, None]), (others, 0))


def plain_method(
    net: PlainClip, pixels: np.ndarray, name: str, window: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Patch features (h, w, D) and the image's vector (D,) of one image (3, H, W), under the method's own rules.

    With `window`, attention reaches as far as the mean window of so many patches.
    """
    method, rule = PLAIN_METHODS[name]
    tokens, grid_hw = net.embed(pixels.astype(np.float64), rule)
    net.reach = None if window is None else mean_window(grid_hw, window)
    inputs = net.inputs(tokens)
    patches = net.project(method(net, inputs, grid_hw)[1:])
    return patches.reshape(*grid_hw, -1), net.project(inputs[-1][:1])[0]
