"""Upsampling: AnyUp, joint bilateral, Upsample Anything; the encoder with a finer grid and its score maps."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import SIZES_HW
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from spar_cli.main import main
from spar_hf import (
    UPSAMPLERS,
    FromFeatures,
    SlidingWindow,
    SparAnyUp,
    SparAnyUpConfig,
    Upsampled,
    build_encoder,
    build_segmenter,
    label_map,
    load_upsampler,
)
from spar_hf.conversion import convert_anyup
from spar_hf.conversion.anyup import ENCODERS, reference
from spar_hf.encoders.upsampled import FromUpsampled, UpsampledScores, fit_grid
from spar_hf.upsampling.bilateral import BilateralWeights, Kernels, resized
from spar_hf.upsampling.upsample_anything import Settings, _Problem, fit, radius_of

WIDTH = 16
# Image, patch grid, output: native, larger than the image, off the grid, one row of patches only seen in part.
SIZES = {
    "native": ((64, 64), (4, 4), (64, 64)),
    "larger": ((48, 64), (6, 8), (80, 100)),
    "off_grid": ((90, 75), (5, 4), (37, 41)),
    "oblong": ((32, 128), (2, 8), (32, 128)),
}


def authors_anyup(width: int = WIDTH, seed: int = 0) -> dict[str, Tensor]:
    """A random state dict with the authors' names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float | None = None, around: float = 0.0) -> Tensor:
        fan = math.prod(shape[1:]) or 1
        return around + torch.randn(shape, generator=generator) * (fan**-0.5 if scale is None else scale)

    weights: dict[str, Tensor] = {"rope.freqs": random(2, width, scale=3.0)}
    for name in ENCODERS.values():
        if name == "key_features_encoder":
            weights[f"{name}.0.basis"] = random(width, 1, 5, 5, scale=1.0)
        else:
            inputs, size = {"image_encoder": (3, 1), "aggregation": (2 * width, 3)}.get(name, (width, 1))
            weights[f"{name}.0.weight"] = random(width, inputs, size, size)
        for block in (1, 2):
            for norm in (0, 3):
                weights[f"{name}.{block}.block.{norm}.weight"] = random(width, scale=0.2, around=1.0)
                weights[f"{name}.{block}.block.{norm}.bias"] = random(width, scale=0.2)
                weights[f"{name}.{block}.block.{norm + 2}.weight"] = random(width, width, 1, 1)
    weights["cross_decode.conv2d.weight"] = random(width, width, 3, 3)
    attention = "cross_decode.cross_attn"
    for name in ("norm_q", "norm_k"):
        weights[f"{attention}.{name}.weight"] = random(width, scale=0.2, around=1.5)
    weights[f"{attention}.attention.in_proj_weight"] = random(3 * width, width)
    weights[f"{attention}.attention.in_proj_bias"] = random(3 * width, scale=0.2)
    weights[f"{attention}.attention.out_proj.weight"] = random(width, width)
    weights[f"{attention}.attention.out_proj.bias"] = random(width)
    return weights


@pytest.fixture(scope="module")
def anyup_folder(tmp_path_factory):
    """The authors' file and the folder that it was converted to."""
    folder = tmp_path_factory.mktemp("anyup")
    torch.save(authors_anyup(), folder / "authors.pth")
    report = convert_anyup(folder / "authors.pth", folder / "converted")
    assert max(found.max_difference for found in report.comparisons) < 1e-10
    assert all(0.05 < found.magnitude < 2 for found in report.comparisons)
    return folder


@pytest.fixture(scope="module")
def anyup(anyup_folder) -> SparAnyUp:
    return SparAnyUp.from_pretrained(anyup_folder / "converted").eval()


def scene(size: str, depth: int = 24, batch: int = 2) -> tuple[Tensor, Tensor, tuple[int, int]]:
    image_hw, grid_hw, out_hw = SIZES[size]
    generator = torch.Generator().manual_seed(sum(image_hw))
    image = torch.rand(batch, 3, *image_hw, generator=generator)
    return image, torch.randn(batch, *grid_hw, depth, generator=generator), out_hw


# --------------------------------------------------------------------------------------------------- AnyUp


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_anyup_equals_the_plain_network(size, anyup):
    image, features, out_hw = scene(size)
    expected = reference(authors_anyup(), image.double(), features.double(), out_hw)
    found = anyup(image, features, out_hw)
    assert found.shape == (2, *out_hw, 24) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    exact = copy.deepcopy(anyup).double()(image.double(), features.double(), out_hw)
    torch.testing.assert_close(exact, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(anyup(image[1:], features[1:], out_hw), found[1:], atol=1e-6, rtol=0)
    with torch.enable_grad():  # another path, for training
        torch.testing.assert_close(anyup(image, features, out_hw).detach(), found, atol=1e-5, rtol=0)
    assert expected.std() > 0.1


def test_anyup_has_gradients_everywhere(anyup):
    image, features, out_hw = scene("off_grid", batch=1)
    anyup.zero_grad()
    anyup(image, features, out_hw).square().mean().backward()
    assert [name for name, weight in anyup.named_parameters() if not weight.grad.abs().sum() > 0] == []
    anyup.zero_grad(set_to_none=True)


@torch.no_grad()
def test_anyup_sees_all_patches_at_ratio_0(anyup, anyup_folder):
    wide = SparAnyUp.from_pretrained(anyup_folder / "converted", window_ratio=0.0).eval()
    image, features, out_hw = scene("larger")
    tile = wide.weights(image[0], features[0], out_hw).tile(slice(0, 3), slice(5, 7))
    assert tile.weights.shape == (6, 48) and tile.weights.min() > 0
    narrow = anyup.weights(image[0], features[0], out_hw).tile(slice(0, 1), slice(0, 1))
    assert narrow.key_rows == narrow.key_columns == slice(0, 1)  # (0.5 / n + 0.1) of 6 and of 8 patches
    torch.testing.assert_close(tile.weights.sum(1), torch.ones(6))


@torch.no_grad()
def test_anyup_keeps_fp32_in_half_precision(anyup, anyup_folder):
    half = SparAnyUp.from_pretrained(anyup_folder / "converted", dtype=torch.bfloat16).eval()
    rounded = SparAnyUp(anyup.config).eval()
    rounded.load_state_dict({name: weight.bfloat16().float() for name, weight in anyup.state_dict().items()})
    image, features, out_hw = scene("native")
    found = half(image, features.bfloat16(), out_hw)
    expected = rounded(image, features.bfloat16().float(), out_hw)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=2**-7)


@pytest.mark.slow
def test_anyup_as_it_is_saved(anyup, anyup_folder, tmp_path):
    folder = anyup_folder / "converted"
    assert {path.name for path in folder.iterdir()} >= {"anyup_spar.py", "upsampling_spar.py", "conversion.json"}
    assert "CC-BY-4.0" in json.loads((folder / "config.json").read_text())["source"]
    assert type(AutoModel.from_pretrained(folder)) is SparAnyUp
    code = f"""
        import torch
        from transformers import AutoModel
        model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
        torch.manual_seed(0)
        torch.save(model(torch.rand(1, 3, 32, 48), torch.randn(1, 2, 3, 5), (9, 7)), {str(tmp_path / "out.pt")!r})
    """
    blocked = "import sys; sys.modules['spar_hf'] = None\n" + textwrap.dedent(code)
    subprocess.run(
        [sys.executable, "-c", blocked], check=True, env={"HF_HOME": str(tmp_path), "PATH": ""}, timeout=120
    )
    torch.manual_seed(0)
    with torch.no_grad():
        expected = anyup(torch.rand(1, 3, 32, 48), torch.randn(1, 2, 3, 5), (9, 7))
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, atol=0, rtol=0)


def test_foreign_and_partial_anyups_are_refused(anyup, anyup_folder, tmp_path):
    weights = authors_anyup()
    torch.save({"visual.conv1.weight": torch.zeros(3)}, tmp_path / "clip.pth")
    with pytest.raises(ValueError, match=r"no key_features_encoder\.0\.basis; this is no AnyUp"):
        convert_anyup(tmp_path / "clip.pth", tmp_path / "out")
    del weights["cross_decode.conv2d.weight"]
    torch.save(weights, tmp_path / "partial.pth")
    with pytest.raises(ValueError, match=r"1 weights of the source are missing: cross_decode.conv2d.weight"):
        convert_anyup(tmp_path / "partial.pth", tmp_path / "out")
    torch.save({**authors_anyup(), "more": torch.zeros(2)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="1 weights of the source are unused: more"):
        convert_anyup(tmp_path / "more.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    anyup.save_pretrained(tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(ValueError, match=r"mismatched weights of SparAnyUp: aggregation\S+, .*\.\.\.\. Give a folder"):
        load_upsampler(f"anyup={tmp_path / 'wide'}")
    for fields, message in (
        ({"hidden_size": 18}, "num_attention_heads is 4; it must divide hidden_size, 18"),
        ({"hidden_size": 16, "basis_size": 4}, "basis_size is 4; it must be odd"),
        ({"window_ratio": -1.0}, "window_ratio is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SparAnyUpConfig(**fields)


@pytest.mark.slow
def test_anyup_at_1024_px_of_512_channels_takes_less_than_2_gb(tmp_path):
    """Beside its input and output; and in whole where 20 names' scores go through in place of the features."""
    code = """
        import resource, sys
        import torch
        from spar_hf import SparAnyUp, SparAnyUpConfig
        def peak_gb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        torch.set_grad_enabled(False)
        model = SparAnyUp(SparAnyUpConfig()).eval()
        image, features = torch.rand(1, 3, 1024, 1024), torch.randn(1, 64, 64, 512)
        before = peak_gb()
        weights = model.weights(image[0], features[0], (1024, 1024))
        for row in range(0, 1024, 128):
            weights.scores(features[0], features[0, 0, :20], slice(row, row + 128))
        scores = peak_gb() - before
        made = weights.apply(features[0])
        print(scores, peak_gb() - before - made.numel() * 4e-9)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True)
    scores_gb, features_gb = map(float, run.stdout.split())
    assert 0.9 < scores_gb < 2 and features_gb < 2


# ---------------------------------------------------------------------------------------- training-free


def plain_bilateral(
    guide: Tensor, colours: Tensor, values: Tensor, kernels: Kernels, most: int, radius: Tensor | None
) -> Tensor:
    """The formula pixel by pixel, offset by offset: (C, H, W)."""
    (height, width), (rows, columns) = guide.shape[1:], colours.shape[1:]
    scale_y, scale_x = height / rows, width / columns
    out = torch.zeros(len(values), height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            logits, cells = [], []
            for dy in range(-most, most + 1):
                for dx in range(-most, most + 1):
                    if radius is not None and dy * dy + dx * dx > float(radius[y, x]) ** 2:
                        continue
                    i = min(max(int((y + 0.5) / scale_y) + dy, 0), rows - 1)
                    j = min(max(int((x + 0.5) / scale_x) + dx, 0), columns - 1)
                    down, across = y - ((i + 0.5) * scale_y - 0.5), x - ((j + 0.5) * scale_x - 0.5)
                    turn = float(kernels.angle[i, j])
                    along = across * math.cos(turn) + down * math.sin(turn)
                    athwart = -across * math.sin(turn) + down * math.cos(turn)
                    colour = float((guide[:, y, x] - colours[:, i, j]).square().sum())
                    logits.append(
                        -(along**2) / (2 * float(kernels.sigma_x[i, j]) ** 2 + 1e-8)
                        - athwart**2 / (2 * float(kernels.sigma_y[i, j]) ** 2 + 1e-8)
                        - colour / (2 * float(kernels.sigma_colour[i, j]) ** 2 + 1e-8)
                    )
                    cells.append((i, j))
            weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
            for weight, (i, j) in zip(weights, cells, strict=True):
                out[:, y, x] += weight * values[:, i, j]
    return out


def random_kernels(grid_hw: tuple[int, int]) -> Kernels:
    generator = torch.Generator().manual_seed(5)
    fields = [torch.rand(grid_hw, generator=generator) for _ in range(4)]
    return Kernels(0.4 + 3 * fields[0], 0.4 + 3 * fields[1], 6 * fields[2] - 3, 0.1 + 0.5 * fields[3])


@pytest.mark.parametrize(("size_hw", "grid_hw"), [((12, 12), (3, 3)), ((20, 11), (3, 2)), ((8, 16), (2, 4))])
def test_bilateral_weights_equal_the_formula(size_hw, grid_hw):
    generator = torch.Generator().manual_seed(1)
    guide, values = torch.rand(3, *size_hw, generator=generator), torch.randn(*grid_hw, 7, generator=generator)
    colours, kernels = resized(guide, grid_hw), random_kernels(grid_hw)
    for radius in (None, radius_of(torch.maximum(kernels.sigma_x, kernels.sigma_y), size_hw, 2)):
        found = BilateralWeights(guide, colours, kernels, 2, radius).apply(values)
        expected = plain_bilateral(guide, colours, values.permute(2, 0, 1), kernels, 2, radius)
        torch.testing.assert_close(found.permute(2, 0, 1).double(), expected, atol=1e-5, rtol=0)


def test_joint_bilateral_upsampling_is_its_formula():
    image, values = torch.rand(1, 3, 9, 12, generator=torch.manual_seed(2)), torch.randn(1, 3, 4, 5)
    ones = torch.ones(3, 4)
    kernels = Kernels(0.5 * 3 * ones, 0.5 * 3 * ones, 0 * ones, 0.1 * ones)
    colours = F.avg_pool2d(image, 3)[0]
    found = load_upsampler("jbu")(image, values, (9, 12))[0]
    upsampler = load_upsampler("jbu").weights(image[0], values[0], (9, 12))
    upsampler.patch_colours = colours  # bilinear with antialias is near the mean, not the mean
    expected = plain_bilateral(image[0], colours, values[0].permute(2, 0, 1), kernels, 2, None)
    torch.testing.assert_close(upsampler.apply(values[0]).permute(2, 0, 1).double(), expected, atol=1e-5, rtol=0)
    assert (found.permute(2, 0, 1) - expected).abs().mean() < 0.3 * expected.std()


def test_upsample_anything_fits_what_it_applies():
    image = F.interpolate(torch.rand(1, 3, 3, 4, generator=torch.manual_seed(3)), size=(24, 32), mode="bilinear")[0]
    image = (image + (torch.arange(32) > 13) * 0.5).clamp(0, 1)
    settings = Settings(steps=8, sigma_px=4.0, radius=3, radius_sigmas=0.3)
    problem, kernels = _Problem(image, (3, 4), 3), random_kernels((3, 4))
    width = 0.3 * torch.maximum(kernels.sigma_x, kernels.sigma_y)
    weights = BilateralWeights(
        image, resized(image, (3, 4), antialias=False), kernels, 3, radius_of(width, (24, 32), 3)
    )
    small = F.interpolate(image[None], size=(3, 4), mode="bicubic")[0]
    expected = weights.apply(small.permute(1, 2, 0))  # (24, 32, 3)
    found = problem.upsampled(kernels, slice(0, 12), settings).view(3, 4, 3, 8, 8)
    found = found.permute(0, 3, 1, 4, 2).reshape(24, 32, 3)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)

    def loss(kernels: Kernels) -> float:
        return float(sum(problem.losses(lambda: kernels, settings)))

    start = Kernels(*(torch.full((3, 4), value) for value in (4.0, 4.0, 0.0, 0.12)))
    torch.testing.assert_close(fit(image, (3, 4), Settings(steps=0, sigma_px=4.0)).sigma_x, start.sigma_x)
    assert loss(fit(image, (3, 4), settings)) < 0.8 * loss(start)
    # One step of Adam is the learning rate along each sign, wherever the gradient isn't 0 to begin with (the angle's).
    one = fit(image, (3, 4), Settings(steps=1, sigma_px=4.0, radius=3, radius_sigmas=0.3))
    torch.testing.assert_close((one.sigma_x / 4).log().abs(), torch.full((3, 4), 0.1), atol=1e-3, rtol=0)


# --------------------------------------------------------------------------------------------- the encoder


def upsamplers(anyup: SparAnyUp) -> dict[str, torch.nn.Module]:
    fast = UPSAMPLERS["upsample_anything"].load()
    fast.settings = Settings(steps=2, radius=2)
    return {"anyup": anyup, "jbu": load_upsampler("jbu"), "upsample_anything": fast}


@pytest.mark.parametrize("size", SIZES_HW)
@pytest.mark.parametrize("rule", ["floor", "pad", "stretch"])
@torch.no_grad()
def test_the_finer_grid_covers_what_the_size_rule_says(size, rule, make_vision, anyup, pixels):
    vision = make_vision(num_hidden_layers=2, size_rule=rule)
    encoder = build_encoder(vision, upsample=anyup, upsample_factor=4)
    images = pixels(size, batch=2)
    (height, width), coarse, found = images.shape[2:], vision(images), encoder(images)
    assert encoder.config.patch_size == 4 and vision.config.patch_size == 16
    ceil = rule != "floor"
    grid_hw = (-(-height // 4), -(-width // 4)) if ceil else (height // 4, width // 4)
    assert found.patch_embeds.shape == (2, *grid_hw, 24) and found.image_hw == (height, width)
    assert found.extent_hw == ((height, width) if rule == "stretch" else (4 * grid_hw[0], 4 * grid_hw[1]))
    # What the patches cover, by hand.
    covered = coarse.extent_hw
    guide = F.pad(images, (0, covered[1] - width, 0, covered[0] - height))
    mean, std = (torch.tensor(getattr(vision.config, name)).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    made = anyup(guide * std + mean, coarse.patch_embeds, (-(-covered[0] // 4), -(-covered[1] // 4)))
    rows = torch.arange(grid_hw[0]).clamp(max=made.shape[1] - 1)
    columns = torch.arange(grid_hw[1]).clamp(max=made.shape[2] - 1)
    torch.testing.assert_close(found.patch_embeds, made[:, rows][:, :, columns], atol=1e-5, rtol=0)


@torch.no_grad()
def test_upsampled_goes_around_windows_and_into_them(make_vision, anyup, pixels):
    vision = make_vision(num_hidden_layers=2)
    images = pixels((112, 100))
    around = build_encoder(vision, window="native", stride_px=24, upsample=anyup, upsample_factor=2)
    assert isinstance(around, Upsampled) and isinstance(around.encoder, SlidingWindow)
    assert around(images).patch_embeds.shape == (1, 14, 12, 24)
    inside = SlidingWindow(Upsampled(vision, anyup, 2), stride_px=24)
    assert inside(images).patch_embeds.shape == (1, 14, 12, 24)
    assert inside(images).extent_hw == around(images).extent_hw == (112, 96)
    whole = Upsampled(vision, anyup, 2)(pixels("native")).patch_embeds
    torch.testing.assert_close(inside(pixels("native")).patch_embeds, whole, atol=1e-6, rtol=0)


def test_fit_grid():
    grid = torch.arange(6.0).view(1, 2, 3, 1)
    assert fit_grid(grid, (3, 2))[0, :, :, 0].tolist() == [[0, 1], [3, 4], [3, 4]]
    assert fit_grid(grid, (1, 5))[0, :, :, 0].tolist() == [[0, 1, 2, 2, 2]]


# --------------------------------------------------------------------------------------------- score maps


@pytest.mark.parametrize(
    ("name", "size"), [*(("anyup", size) for size in SIZES_HW), ("jbu", "off_grid"), ("upsample_anything", "off_grid")]
)
@torch.no_grad()
def test_score_maps_are_those_of_the_upsampled_features(size, name, make_spar, spar_processor, anyup, pixels):
    model = make_spar(num_hidden_layers=2)
    upsampler = upsamplers(anyup)[name]
    segmenter = build_segmenter(model, spar_processor, upsample=upsampler, upsample_factor=4)
    assert isinstance(segmenter, FromUpsampled)
    plain = FromFeatures(segmenter.encoder, model, spar_processor)
    names = [f"a{i}" for i in range(40)]
    for count, batch in ((3, 2), (40, 1)):  # fewer names than channels, and more
        encoded = segmenter.encode_labels(names[:count], ["{}"])
        images = pixels(size, batch=batch)
        found, expected = segmenter(images, encoded), plain(images, encoded)
        for mine, theirs in zip(found, expected, strict=True):
            assert isinstance(mine, UpsampledScores) and mine.grid_hw == theirs.grid_hw
            torch.testing.assert_close(mine.grid, theirs.grid, atol=1e-5, rtol=0)
            torch.testing.assert_close(mine(slice(1, 3)), theirs(slice(1, 3)), atol=1e-5, rtol=0)
            ids = torch.arange(count)
            for maps in ((mine, theirs), (mine.at((70, 40)), theirs.at((70, 40)))):
                labels = [label_map(one, ids, background_threshold=0.03) for one in maps]
                assert (labels[0] == labels[1]).float().mean() > 0.999
                assert count == 3 or labels[0].unique().numel() > 1


@torch.no_grad()
def test_scores_take_the_smaller_way(anyup):
    """Fewer names than channels less patches in sight: no feature is made."""
    image, features, out_hw = scene("larger", depth=200, batch=1)
    weights = anyup.weights(image[0], features[0], out_hw)
    made = []
    weights.tile, tile = lambda *run: made.append(tile(*run)) or made[-1], weights.tile
    text = F.normalize(torch.randn(160, 200, generator=torch.manual_seed(0)), dim=1)
    whole = F.normalize(weights.apply(features[0]), dim=-1) @ text.T
    assert {len(one.weights.T) < 40 for one in made} == {True, False} or max(len(one.weights.T) for one in made) < 40
    for count in (1, 30, 160):  # by scores, by scores, by features
        found = weights.scores(features[0], text[:count], slice(10, 70))
        torch.testing.assert_close(found, whole[10:70, :, :count].permute(2, 0, 1), atol=1e-5, rtol=0)
    raw = weights.scores(features[0], text[:5], slice(0, 3), cosine=False)
    expected = weights.apply(features[0], slice(0, 3)) @ text[:5].T
    torch.testing.assert_close(raw, expected.permute(2, 0, 1), atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------- choosing, command line


def test_wrong_choices_are_told(make_spar, spar_processor, anyup, tmp_path):
    model = make_spar(num_hidden_layers=6)
    for fields, message in (
        ({"upsample": "jbi"}, "there is no upsampler 'jbi'; .* Did you mean 'jbu'"),
        ({"upsample": "anyup"}, "upsampler 'anyup' needs weights: anyup=FOLDER or ID; spar convert"),
        ({"upsample": "jbu=folder"}, "upsampler 'jbu' has no weights; leave 'folder' out"),
        ({"upsample": f"anyup={tmp_path}"}, "holds no config.json"),
        ({"upsample": "anyup=tiny"}, "tiny is a checkpoint of type 'spar' and no AnyUp"),
        ({"upsample": "jbu", "upsample_factor": 3}, "the factor is 3; it must divide the patch, 16 px"),
        ({"upsample_factor": 4}, "upsample_factor is 4 without an upsampler"),
        ({"upsample": "jbu", "refine": ["key-smoothing"]}, "'key-smoothing' acts on the scores of patches"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            build_segmenter(model, spar_processor, **fields)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\) and the features \(1, 2, 2, 5\)"):
        anyup(torch.rand(2, 3, 8, 8), torch.rand(1, 2, 2, 5), (8, 8))
    with pytest.raises(ValueError, match="the output size is 0 x 4"):
        anyup(torch.rand(1, 3, 8, 8), torch.rand(1, 2, 2, 5), (0, 4))


def test_command_line(anyup_folder, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (70, 60), "red").save(tmp_path / "p.png")
    run = ["segment", str(tmp_path / "p.png"), "--labels", "cake; sky", "--output", str(tmp_path / "out")]
    json_file = tmp_path / "r.json"
    name = f"anyup={anyup_folder / 'converted'}"
    assert main([*run, "--upsample", name, "--upsample-factor", "4", "--json", str(json_file)]) == 0
    assert json.loads(json_file.read_text())["upsample"] == {"name": name, "factor": 4}
    capsys.readouterr()
    assert main([*run, "--upsample", "jbuu"]) == 2
    error = capsys.readouterr().err
    assert "there is no upsampler 'jbuu'" in error and error.count("\n") == 1
    torch.save(authors_anyup(), tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), "--backbone", "anyup", "--output", str(tmp_path / "a")]) == 0
    assert "features go through as they are" in capsys.readouterr().out
