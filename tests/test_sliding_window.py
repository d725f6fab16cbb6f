"""The sliding-window teacher against a slow loop over windows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SIZES_HW
from plain_clip import sampling_matrix
from torch import nn

from spar_hf import SlidingWindow, SparVisionOutput

SIZES = {**SIZES_HW, "wide": (64, 176), "less_than_a_window": (48, 128), "small_and_off_grid": (40, 100)}
STRIDES_PX = [16, 24, 32, 64, 20, 21]


class PatchEncoder(nn.Module):
    """A dense encoder whose features depend on the patch and, like a ViT's, on its place in the window."""

    def __init__(self, size_rule: str = "floor", window_px: int = 64, patch_px: int = 16):
        super().__init__()
        self.config = SimpleNamespace(
            patch_size=patch_px, image_size=window_px, num_channels=3, projection_dim=5, size_rule=size_rule
        )
        self.conv = nn.Conv2d(3, 5, patch_px, stride=patch_px)
        nn.init.normal_(self.conv.weight, std=0.05)
        self.calls: list[tuple[int, ...]] = []

    @property
    def dtype(self) -> torch.dtype:
        return self.conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv.weight.device

    def forward(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        self.calls.append(tuple(pixel_values.shape))
        features = self.conv(pixel_values.to(self.dtype)).permute(0, 2, 3, 1)
        rows, columns = (torch.arange(n, dtype=self.dtype) for n in features.shape[1:3])
        place = torch.sin(rows[:, None] * 1.3 + columns * 0.7)
        return SparVisionOutput(patch_embeds=features.tanh() + place[:, :, None])


@pytest.fixture
def encoder() -> PatchEncoder:
    torch.manual_seed(0)
    return PatchEncoder()


def starts_of(length: int, window: int, stride: int) -> list[int]:
    if length <= window:
        return [0]
    starts, start = [], 0
    while start + window <= length:
        starts.append(start)
        start += stride
    if starts[-1] + window < length:
        starts.append(length - window)
    return starts


def slow_teacher(encoder, image: torch.Tensor, window_px: int, stride_px: int) -> np.ndarray:
    """One image (3, H, W) -> (h, w, D), one window at a time; what is no whole patch is left out."""
    patch_px = encoder.config.patch_size
    image = image[:, : image.shape[1] // patch_px * patch_px, : image.shape[2] // patch_px * patch_px]
    refine = next(r for r in range(1, patch_px + 1) if patch_px % r == 0 and stride_px % (patch_px // r) == 0)
    cell_px = patch_px // refine
    height, width = image.shape[1:]
    last_y, last_x = starts_of(height, window_px, stride_px)[-1], starts_of(width, window_px, stride_px)[-1]
    canvas = counts = None
    for y in starts_of(height, window_px, stride_px):
        for x in starts_of(width, window_px, stride_px):
            window = image[None, :, y : y + window_px, x : x + window_px]
            features = encoder(window).patch_embeds[0].detach().double().numpy()
            rows, columns = features.shape[0] * refine, features.shape[1] * refine
            if canvas is None:
                canvas = np.zeros((last_y // cell_px + rows, last_x // cell_px + columns, features.shape[2]))
                counts = np.zeros(canvas.shape[:2])
            down = sampling_matrix(features.shape[0], rows, "bilinear")
            across = sampling_matrix(features.shape[1], columns, "bilinear")
            cells = np.s_[y // cell_px : y // cell_px + rows, x // cell_px : x // cell_px + columns]
            canvas[cells] += np.einsum("yv,vud,xu->yxd", down, features, across, optimize=True)
            counts[cells] += 1
    assert counts.min() > 0, "every cell is covered"
    down = sampling_matrix(len(canvas), height // patch_px, "bilinear")
    across = sampling_matrix(canvas.shape[1], width // patch_px, "bilinear")
    return np.einsum("yv,vud,xu->yxd", down, canvas / counts[:, :, None], across, optimize=True)


# --------------------------------------------------------------------------------------- the slow loop


@pytest.mark.parametrize("stride_px", STRIDES_PX)
@pytest.mark.parametrize("size", SIZES)
def test_teacher_equals_the_slow_loop(size, stride_px, encoder):
    images = torch.randn(2, 3, *SIZES[size])
    output = SlidingWindow(encoder, window_px=64, stride_px=stride_px, batch_size=5)(images)
    for image, features in zip(images, output.patch_embeds, strict=True):
        np.testing.assert_allclose(features.numpy(), slow_teacher(encoder, image, 64, stride_px), atol=1e-5)


@pytest.mark.parametrize(("window_px", "stride_px"), [(32, 24), (96, 40), (16, 8)])
def test_other_windows(window_px, stride_px, encoder):
    image = torch.randn(1, 3, 112, 144)
    output = SlidingWindow(encoder, window_px=window_px, stride_px=stride_px)(image)
    expected = slow_teacher(encoder, image[0], window_px, stride_px)
    np.testing.assert_allclose(output.patch_embeds[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("rule", ["pad", "stretch"])
def test_the_encoders_size_rule_comes_first(rule):
    torch.manual_seed(0)
    encoder, images = PatchEncoder(rule), torch.randn(1, 3, 90, 75)
    fitted = torch.zeros(1, 3, 96, 80)
    fitted[:, :, :90, :75] = images
    if rule == "stretch":
        fitted = nn.functional.interpolate(images, size=(96, 80), mode="bicubic", align_corners=False)
    teacher = SlidingWindow(encoder, stride_px=24)
    output = teacher(images)
    expected = slow_teacher(encoder, fitted[0], 64, 24)
    np.testing.assert_allclose(output.patch_embeds[0].numpy(), expected, atol=1e-5)
    assert tuple(output.image_hw) == (90, 75)
    assert tuple(output.extent_hw) == ((96, 80) if rule == "pad" else (90, 75))
    encoder.calls.clear()
    teacher(images)
    assert sum(call[0] for call in encoder.calls) == teacher.num_windows(90, 75)


def test_with_a_vit_and_its_method(make_vision, pixels):
    vision, images = make_vision(method="naclip", num_hidden_layers=6), pixels((90, 128), batch=2)
    with torch.no_grad():
        output = SlidingWindow(vision, stride_px=24, batch_size=4)(images)
        for image, features in zip(images, output.patch_embeds, strict=True):
            np.testing.assert_allclose(features.numpy(), slow_teacher(vision, image, 64, 24), atol=2e-5)


def test_one_window_at_a_patch_stride_is_one_pass_and_at_stride_24_is_smoothed(encoder):
    image = torch.randn(1, 3, 64, 64)
    single = encoder(image).patch_embeds.detach()
    torch.testing.assert_close(SlidingWindow(encoder, stride_px=64)(image).patch_embeds, single)
    # Up by two and back is a convolution with [1/8, 3/4, 1/8] along each axis, the border repeated.
    kernel = np.array([1, 6, 1]) / 8
    padded = np.pad(single[0].numpy(), ((1, 1), (1, 1), (0, 0)), mode="edge")
    smooth = sum(kernel[i] * kernel[j] * padded[i : i + 4, j : j + 4] for i in range(3) for j in range(3))
    np.testing.assert_allclose(SlidingWindow(encoder, stride_px=24)(image).patch_embeds[0].numpy(), smooth, atol=1e-6)


def test_it_composes(encoder):
    image = torch.randn(1, 3, 144, 176)
    inner = SlidingWindow(encoder, stride_px=24)
    output = SlidingWindow(inner, window_px=96, stride_px=40)(image)
    np.testing.assert_allclose(output.patch_embeds[0].numpy(), slow_teacher(inner, image[0], 96, 40), atol=1e-5)


# ---------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("patch_px", "stride_px", "cell_px"),
    [
        (16, 24, 8),
        (16, 16, 16),
        (16, 32, 16),
        (16, 64, 16),
        (16, 20, 4),
        (16, 21, 1),
        (16, 56, 8),
        (14, 24, 2),
        (14, 21, 7),
    ],
)
def test_cells_are_the_coarsest_that_hold_the_stride(patch_px, stride_px, cell_px):
    assert SlidingWindow(PatchEncoder(window_px=224, patch_px=patch_px), stride_px=stride_px).cell_px == cell_px


def test_the_numbers_of_windows_of_the_paper():
    assert SlidingWindow(PatchEncoder(window_px=224)).num_windows(672, 1008) == 680
    assert SlidingWindow(PatchEncoder(window_px=512)).num_windows(1024, 2048) == 1495
    native = SlidingWindow(PatchEncoder(window_px=224), stride_px=112)
    assert native.num_windows(224, 224) == native.num_windows(100, 224) == 1
    assert native.num_windows(225, 224) == 1  # the row that is left of the last whole patch is dropped
    assert native.num_windows(240, 224) == 2
    assert native.num_windows(336, 353) == 2 * 3


@pytest.mark.parametrize("stride_px", STRIDES_PX)
def test_constant_features_stay_constant(stride_px, encoder):
    constant = torch.randn(5)
    encoder.forward = lambda x: SparVisionOutput(
        patch_embeds=constant.expand(len(x), x.shape[2] // 16, x.shape[3] // 16, 5)
    )
    for size_hw in SIZES.values():
        output = SlidingWindow(encoder, stride_px=stride_px)(torch.zeros(2, 3, *size_hw))
        assert output.patch_embeds.shape == (2, size_hw[0] // 16, size_hw[1] // 16, 5)
        torch.testing.assert_close(output.patch_embeds, constant.expand_as(output.patch_embeds))


@pytest.mark.parametrize("stride_px", [16, 20, 21, 24])
@pytest.mark.parametrize("width", [175, 201, 208])
def test_features_lie_where_those_of_the_single_pass_lie(width, stride_px, encoder):
    """An encoder that reports where its patches are in the image: the teacher's grid must report the same places."""
    height = 64 * 4 + 15
    image = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))[None].float() + 0.5
    image = nn.functional.pad(image, (0, 0, 0, 0, 0, 1))  # pixel centres as the first two channels
    encoder.forward = lambda x: SparVisionOutput(patch_embeds=nn.functional.avg_pool2d(x, 16).permute(0, 2, 3, 1))
    output = SlidingWindow(encoder, stride_px=stride_px)(image)
    assert tuple(output.image_hw) == (height, width)
    assert tuple(output.extent_hw) == (height // 16 * 16, width // 16 * 16)
    single = encoder(image).patch_embeds
    for axis, found in enumerate((output.patch_embeds[0, :, 0, 0], output.patch_embeds[0, 0, :, 1])):
        centres = (torch.arange(len(found)) + 0.5) * output.extent_hw[axis] / len(found)
        torch.testing.assert_close(single[0, :, 0, 0] if axis == 0 else single[0, 0, :, 1], centres)
        # Resizing within a window repeats the outer patches, the same at either border.
        assert abs((found - centres).mean()) < 0.2
        assert (found - centres).abs().max() < 4.5


# --------------------------------------------------------------------------------- batches and memory


@pytest.mark.parametrize("batch_size", [1, 3, 7, 1000])
def test_batch_size_changes_only_the_calls(batch_size, encoder):
    images = torch.randn(2, 3, 112, 90)
    teacher = SlidingWindow(encoder, stride_px=24, batch_size=batch_size)
    output = teacher(images)
    windows = 2 * teacher.num_windows(112, 90)
    # Every call but the last is full, across images too: the size of the batch bounds the memory.
    assert [call[0] for call in encoder.calls] == [
        min(batch_size, windows - first) for first in range(0, windows, batch_size)
    ]
    assert {call[1:] for call in encoder.calls} == {(3, 64, 64)}
    torch.testing.assert_close(output.patch_embeds, SlidingWindow(encoder, batch_size=2)(images).patch_embeds)


def test_images_of_a_batch_do_not_mix(encoder):
    images = torch.randn(3, 3, 90, 128)
    images[1] *= 10
    teacher = SlidingWindow(encoder, stride_px=20, batch_size=4)
    together = teacher(images).patch_embeds
    for image, features in zip(images, together, strict=True):
        torch.testing.assert_close(teacher(image[None]).patch_embeds[0], features)


def test_sums_are_kept_in_fp32_under_bf16(encoder):
    images = torch.randn(1, 3, 160, 160)
    half = encoder.bfloat16()
    output = SlidingWindow(half, stride_px=8)(images.bfloat16())
    assert output.patch_embeds.dtype == torch.bfloat16
    expected = slow_teacher(half, images[0].bfloat16(), 64, 8)  # double sums of the same bf16 features
    rounding = 2**-8 * np.abs(expected) + 1e-4
    assert (np.abs(output.patch_embeds[0].float().numpy() - expected) <= rounding).all()


def test_no_gradients_and_the_encoders_own_attributes(make_vision, pixels):
    vision = make_vision(num_hidden_layers=2)
    teacher = SlidingWindow(vision)
    assert teacher.window_px == 64 and teacher.stride_px == 24 and teacher.batch_size == 32
    assert teacher.config is vision.config and teacher.dtype == torch.float32 and teacher.device == vision.device
    assert not teacher(pixels("larger")).patch_embeds.requires_grad


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_px": 8}, r"window_px is 8; .*16 px.*native size is 64"),
        ({"window_px": 40}, r"window_px is 40; it must be a multiple of the patch"),
        ({"window_px": 0}, r"window_px is 0"),
        ({"stride_px": 0}, r"stride_px is 0; it must be from 1 to the window's 64 px"),
        ({"stride_px": -8}, r"stride_px is -8"),
        ({"stride_px": 65}, r"stride_px is 65; it must be from 1 to the window's 64 px"),
        ({"batch_size": 0}, r"batch_size is 0; it must be at least 1"),
    ],
)
def test_impossible_windows_are_refused(options, message, encoder):
    with pytest.raises(ValueError, match=message):
        SlidingWindow(encoder, **options)


def test_impossible_pixels_are_refused(encoder):
    teacher = SlidingWindow(encoder)
    with pytest.raises(ValueError, match=r"pixel_values is \(3, 64, 64\)"):
        teacher(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match=r"image is 15x200 px"):
        teacher(torch.zeros(1, 3, 15, 200))
