"""AnyUp: feature upsampling by attention from pixels to patches, for features of any width.

Source: AnyUp (Wimmer et al., ICLR 2026, arXiv 2510.12764) and the behaviour of its released code, which the weights
were learned with. Where the two differ, the code counts: see `unify`. Inference is exact, group norms see the whole
image, and memory grows with the pixels alone: about two maps of `hidden_size` channels at the image's size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .upsampling_spar import LocalWeights, Tile, Upsampler

# Pixels that go through the 1x1 convolutions at a time: 2 MB of 128 channels stay in a CPU's cache.
CHUNK_PIXELS = {"cpu": 2**12, "cuda": 2**18}


class SparAnyUpConfig(PreTrainedConfig):
    """Sizes of an AnyUp; the defaults are its authors'.

    Args:
        hidden_size: channels of the image's and the keys' encodings, and number of bases that unify features.
        num_attention_heads: of the attention from pixels to patches.
        num_groups: of each group norm.
        basis_size: side of a basis, in patches.
        window_ratio: a pixel sees the patches up to this share of the image's side away; 0: all.
        image_mean, image_std: normalisation the weights were trained with, RGB.
        source: where the weights came from.
    """

    model_type = "spar_anyup"

    hidden_size: int = 128
    num_attention_heads: int = 4
    num_groups: int = 8
    basis_size: int = 5
    window_ratio: float = 0.1
    image_mean: list[float] | tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN)
    image_std: list[float] | tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD)
    initializer_range: float = 0.02
    source: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("num_attention_heads", "num_groups"):
            if getattr(self, name) < 1 or self.hidden_size % getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}; it must divide hidden_size, {self.hidden_size}.")
        if self.hidden_size % 4:  # halves turn by the row and by the column, each in pairs
            raise ValueError(f"hidden_size is {self.hidden_size}; it must be a multiple of 4.")
        if self.basis_size < 1 or self.basis_size % 2 == 0:
            raise ValueError(f"basis_size is {self.basis_size}; it must be odd.")
        if not self.window_ratio >= 0:
            raise ValueError(f"window_ratio is {self.window_ratio}; it must be 0 (all patches) or more.")


# ---------------------------------------------------------------------------------- 1x1 networks on pixels


class AnyUpBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x))))) of 1x1 convolutions, on rows of pixels (N, C)."""

    def __init__(self, config: SparAnyUpConfig):
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.GroupNorm(config.num_groups, width)
        self.linear1 = nn.Linear(width, width, bias=False)
        self.norm2 = nn.GroupNorm(config.num_groups, width)
        self.linear2 = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """All at once, with gradients."""
        hidden = F.linear(F.silu(norm_pixels(x, self.norm1, Moments.of(x, self.norm1))), self.linear1.weight.to(x))
        hidden = F.silu(norm_pixels(hidden, self.norm2, Moments.of(hidden, self.norm2)))
        return x + F.linear(hidden, self.linear2.weight.to(x))

    def run_in_place(self, x: Tensor) -> None:
        """The same in place, some pixels at a time; a norm still sees all of them, so the first half runs twice."""
        chunks = x.split(CHUNK_PIXELS.get(x.device.type, CHUNK_PIXELS["cpu"]))
        first, second = Moments(), Moments()
        for chunk in chunks:
            first.add(chunk, self.norm1)

        def hidden(chunk: Tensor) -> Tensor:
            normed = norm_pixels(chunk, self.norm1, first)
            return F.linear(F.silu(normed, inplace=True), self.linear1.weight.to(x))

        for chunk in chunks:
            second.add(hidden(chunk), self.norm2)
        for chunk in chunks:
            normed = norm_pixels(hidden(chunk), self.norm2, second)
            chunk += F.linear(F.silu(normed, inplace=True), self.linear2.weight.to(x))


class Moments:
    """Mean and variance of each group over all pixels, put together from parts in fp64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.spread = torch.zeros((), dtype=torch.float64)

    @classmethod
    def of(cls, x: Tensor, norm: nn.GroupNorm) -> Moments:
        moments = cls()
        moments.add(x, norm)
        return moments

    def add(self, x: Tensor, norm: nn.GroupNorm) -> None:
        """Some more pixels (n, C)."""
        channel_mean = x.mean(0)  # by channel first: ten times as fast on a CPU as `var_mean`
        channel_variance = (x - channel_mean).square().mean(0)
        means, variances = (y.double().unflatten(0, (norm.num_groups, -1)) for y in (channel_mean, channel_variance))
        mean = means.mean(1)
        variance = variances.mean(1) + means.var(1, correction=0)
        if self.count:  # Chan's rule
            share = len(x) / (self.count + len(x))
            shift = mean - self.mean
            variance = torch.lerp(self.spread, variance, share) + share * (1 - share) * shift.square()
            mean = self.mean + share * shift
        self.count += len(x)
        self.mean, self.spread = mean, variance


def norm_pixels(x: Tensor, norm: nn.GroupNorm, moments: Moments) -> Tensor:
    """Group norm of pixels (n, C) with the moments of the whole image."""
    channels = norm.num_channels // norm.num_groups
    scale = (moments.spread + norm.eps).rsqrt().repeat_interleave(channels) * norm.weight.double()
    shift = norm.bias.double() - moments.mean.repeat_interleave(channels) * scale
    return torch.addcmul(shift.to(x), x, scale.to(x))


class AnyUpEncoder(nn.Module):
    """A first layer and two blocks."""

    def __init__(self, config: SparAnyUpConfig, first: Any):
        super().__init__()
        self.first: Any = first
        self.blocks = nn.ModuleList([AnyUpBlock(config) for _ in range(2)])

    def run_blocks(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C); without gradients in place."""
        block: Any
        for block in self.blocks:
            if torch.is_grad_enabled():
                x = block(x)
            else:
                block.run_in_place(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels) -> (N, C), a new tensor."""
        return self.run_blocks(F.linear(x, self.first.weight.to(x)))


# ------------------------------------------------------------------------------------------------ the model


class SparAnyUp(Upsampler, PreTrainedModel):
    """AnyUp's network. `spar convert --backbone anyup` makes one from the authors' file.

    Works in fp32 at least, whatever the type of its weights: the unified features differ little between patches, and
    the norm after them amplifies every rounding.
    """

    config: SparAnyUpConfig
    config_class = SparAnyUpConfig
    base_model_prefix = "anyup"
    main_input_name = "image"

    def __init__(self, config: SparAnyUpConfig):
        super().__init__(config)
        width = config.hidden_size

        def linear(inputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, width, bias=bias)

        self.image_encoder = AnyUpEncoder(config, linear(3))
        self.query_encoder = AnyUpEncoder(config, linear(width))
        self.key_encoder = AnyUpEncoder(config, linear(width))
        self.feature_encoder = AnyUpEncoder(config, AnyUpBases(width, config.basis_size))
        self.aggregation = AnyUpEncoder(config, nn.Conv2d(2 * width, width, 3, bias=False))
        self.query_convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.query_norm, self.key_norm = AnyUpNorm(width), AnyUpNorm(width)
        self.query_projection, self.key_projection = linear(width, bias=True), linear(width, bias=True)
        self.frequencies = nn.Parameter(initial_frequencies(width))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SparAnyUp):
            init.copy_(module.frequencies, initial_frequencies(self.config.hidden_size))
        elif isinstance(module, AnyUpBases):
            init.normal_(module.weight)
        elif isinstance(module, AnyUpNorm):
            init.ones_(module.weight)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        name = pretrained_model_name_or_path
        # All mistakes at once, in one line; transformers would leave what is missing random.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = super().from_pretrained(name, *args, **kwargs)
        model, info = loaded
        for what in ("missing", "mismatched"):
            if wrong := sorted(str(entry[0] if what == "mismatched" else entry) for entry in info[f"{what}_keys"]):
                raise ValueError(
                    f"{name} has {len(wrong)} {what} weights of {cls.__name__}: {', '.join(wrong[:4])}"
                    f"{', ...' if len(wrong) > 4 else ''}. Give a folder that `spar convert --backbone anyup` wrote."
                )
        return (model, info) if output_loading_info else model

    def weights(self, image: Tensor, features: Tensor, size_hw: tuple[int, int]) -> AnyUpWeights:
        """See `Upsampler.weights`."""
        work = torch.promote_types(self.dtype, torch.float32)
        grid_hw = (features.shape[0], features.shape[1])
        encoded = self.encode_image(image.to(work))
        keys = self.encode_keys(encoded, features)  # first, so that its map at full size is gone before the queries'
        queries = self.encode_queries(encoded, size_hw)
        return AnyUpWeights(self, queries, keys, size_hw, grid_hw)

    def encode_image(self, image: Tensor) -> Tensor:
        """(3, H, W) -> (H, W, C), turned by where a pixel lies."""
        mean, std = (image.new_tensor(values) for values in (self.config.image_mean, self.config.image_std))
        height, width = image.shape[1:]
        x = self.image_encoder((image.flatten(1).T - mean) / std)
        rows, columns = (
            torch.linspace(0, 1, n, dtype=x.dtype, device=x.device)[:, None] * frequencies.to(x)
            for n, frequencies in zip((height, width), self.frequencies, strict=True)
        )  # (H, C), (W, C)
        x = x.unflatten(0, (height, width))
        turned: list[Tensor] | None = [] if torch.is_grad_enabled() else None
        for row, angle in zip(x, rows, strict=True):
            angle = angle + columns  # (W, C)
            first, second = row.chunk(2, dim=1)
            new = row * angle.cos() + torch.cat([-second, first], dim=1) * angle.sin()
            row.copy_(new) if turned is None else turned.append(new)
        return x if turned is None else torch.stack(turned)

    def encode_queries(self, encoded: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """(H, W, C) -> (1, C, rows, columns), before their convolution; may write into `encoded`."""
        x = self._encode(self.query_encoder, encoded, in_place=not torch.is_grad_enabled())
        return pool(x, size_hw)

    def encode_keys(self, encoded: Tensor, features: Tensor) -> Tensor:
        """The image (H, W, C) and features (h, w, D) -> projected keys (heads, h, w, C / heads)."""
        grid_hw = (features.shape[0], features.shape[1])
        image_part = pool(self._encode(self.key_encoder, encoded), grid_hw)  # (1, C, h, w)
        # In fp64: few numbers, and the norms amplify their rounding.
        unified = unify(features.to(encoded.dtype), self.feature_encoder.first.weight.to(encoded.dtype)).double()
        unified = self.feature_encoder.run_blocks(unified.flatten(0, 1)).T.unflatten(1, grid_hw)
        both = torch.cat([image_part.double(), unified[None]], dim=1)
        # PyTorch's own reflection needs two patches a side; one alone has nothing to reflect and repeats itself.
        for axis in (2, 3):
            n = both.shape[axis]
            order = [min(1, n - 1), *range(n), max(n - 2, 0)]
            both = both.index_select(axis, torch.tensor(order, device=both.device))
        x = F.conv2d(both, self.aggregation.first.weight.double())[0].flatten(1).T
        x = self.aggregation.run_blocks(x.contiguous()).to(encoded.dtype)
        x = F.linear(self.key_norm(x), self.key_projection.weight.to(x), self.key_projection.bias.to(x))
        heads = x.unflatten(1, (self.config.num_attention_heads, -1)).permute(1, 0, 2)
        return heads.unflatten(1, grid_hw)

    def _encode(self, encoder: AnyUpEncoder, encoded: Tensor, in_place: bool = False) -> Tensor:
        """(H, W, C) -> (H, W, C) through 1x1 layers."""
        rows = encoded.flatten(0, 1)
        if not in_place:
            return encoder(rows).unflatten(0, encoded.shape[:2])
        for chunk in rows.split(CHUNK_PIXELS.get(rows.device.type, CHUNK_PIXELS["cpu"])):
            chunk.copy_(F.linear(chunk, encoder.first.weight.to(chunk)))
        return encoder.run_blocks(rows).unflatten(0, encoded.shape[:2])


class AnyUpBases(nn.Module):
    """The bases (M, k, k) that features of any width are described by."""

    def __init__(self, count: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, size, size))


class AnyUpNorm(nn.Module):
    """RMS norm with the least number above 1 of the type, less 1, for epsilon, as PyTorch's own default has it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x))


def initial_frequencies(width: int) -> Tensor:
    """(2, C): angle of each channel over a whole side; the first half of the channels turns by row, the rest by
    column, 2 pi theta^-t with theta 100."""
    half = 2 * torch.pi * (100.0 ** torch.linspace(0, -1, width // 4)).tile(2)
    zeros = torch.zeros_like(half)
    return torch.stack([torch.cat([half, zeros]), torch.cat([zeros, half])])


def unify(features: Tensor, bases: Tensor) -> Tensor:
    """Features of any width (h, w, D) -> (h, w, M), a description of each patch's surroundings.

    Each channel of the features at unit length is convolved with each basis, divided by the number of taps inside.
    The released code reads a patch's D x M responses, channel by channel, as an M x D matrix, and takes the soft-max
    over its rows and the mean over its columns; the paper's own soft-max over bases is another function. A constant,
    1 / M, is subtracted and added in the end, so that what little differs between patches is not rounded away.
    """
    height, width, depth = features.shape
    count, size, _ = bases.shape
    half = size // 2
    unit = F.normalize(features, dim=-1).permute(2, 0, 1)  # (D, h, w)
    padded = F.pad(unit, (half, half, half, half))
    taps = F.unfold(F.pad(features.new_ones(1, height, width), (half,) * 4)[None], size)[0].sum(0)  # (h * w)
    rows = []
    for row in range(height):
        band = F.unfold(padded[:, None, row : row + size], size)  # (D, k * k, w)
        responses = band.permute(2, 0, 1) @ bases.flatten(1).T  # (w, D, M)
        responses = responses / taps[row * width : (row + 1) * width, None, None]
        grown = responses.flatten(1).unflatten(1, (count, depth)).expm1()
        mean = grown.mean(1, keepdim=True)
        rows.append(((grown - mean) / (count * (1 + mean))).mean(2))
    return torch.stack(rows) + 1 / count


def pool(x: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """(H, W, C) -> (1, C, rows, columns): the mean of the pixels under each output pixel."""
    image = x.permute(2, 0, 1)[None]
    return image if size_hw == tuple(x.shape[:2]) else F.adaptive_avg_pool2d(image, size_hw)


class AnyUpWeights(LocalWeights):
    """The mean over heads of the attention from output pixels to the patches in their windows."""

    def __init__(
        self, model: Any, queries: Tensor, keys: Tensor, size_hw: tuple[int, int], grid_hw: tuple[int, int]
    ) -> None:
        self.model, self.queries, self.keys = model, queries, keys
        self.size_hw, self.grid_hw = size_hw, grid_hw
        ratio = model.config.window_ratio
        self.windows = [windows(n, patches, ratio, keys.device) for n, patches in zip(size_hw, grid_hw, strict=True)]

    def tile(self, rows: slice, columns: slice) -> Tile:
        """See `LocalWeights.tile`."""
        seen, outside = [], []
        for (first, end), run in zip(self.windows, (rows, columns), strict=True):
            box = slice(int(first[run].min()), int(end[run].max()))
            place = torch.arange(box.start, box.stop, device=first.device)
            seen.append(box)
            outside.append((place < first[run, None]) | (place >= end[run, None]))  # (pixels, patches)
        model = self.model
        query = F.linear(
            model.query_norm(self._convolved(rows, columns)),
            model.query_projection.weight.to(self.queries),
            model.query_projection.bias.to(self.queries),
        ).unflatten(1, (len(self.keys), -1))  # (pixels, heads, d)
        keys = self.keys[:, seen[0], seen[1]].flatten(1, 2)  # (heads, n, d)
        scores = query.transpose(0, 1) @ keys.transpose(1, 2) * keys.shape[2] ** -0.5
        masked = outside[0][:, None, :, None] | outside[1][None, :, None, :]  # (rows, columns, key rows, key columns)
        masked = masked.flatten(2).flatten(0, 1)
        return Tile(seen[0], seen[1], scores.masked_fill(masked, -torch.inf).softmax(-1).mean(0))

    def _convolved(self, rows: slice, columns: slice) -> Tensor:
        """The convolved queries of a tile, (pixels, C): one pixel around it is read, zeros beyond the border."""
        halo, pads = [], []
        for run, length in zip((rows, columns), self.size_hw, strict=True):
            halo.append(slice(max(run.start - 1, 0), min(run.stop + 1, length)))
            pads.append((int(run.start == 0), int(run.stop == length)))
        patch = F.pad(self.queries[:, :, halo[0], halo[1]], (*pads[1], *pads[0]))
        made = F.conv2d(patch, self.model.query_convolution.weight.to(patch))
        return made[0].flatten(1).T


def windows(length: int, patches: int, ratio: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """First patch and the one after the last that each output pixel of an axis sees. In fp32, which decides ties."""
    if ratio <= 0:
        return torch.zeros(length, dtype=torch.long, device=device), torch.full((length,), patches, device=device)
    centres = (torch.arange(length, device=device, dtype=torch.float32) + 0.5) / length
    first, end = (centres - ratio).clamp(0, 1) * patches, (centres + ratio).clamp(0, 1) * patches
    return first.floor().long(), end.ceil().long()
