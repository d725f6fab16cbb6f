"""Tests of distillation: equal to a plain loop, however it is split and cached. Faults: test_training_faults.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from distillation_help import SIZES, Process, finish, run, save_network, save_pictures, start
from fsdp_on_cpu import enable as with_fsdp
from PIL import Image
from safetensors.torch import load_file

from spar_hf import SlidingWindow, SparVisionModel
from spar_hf.distillation.batches import plan_steps
from spar_hf.distillation.losses import LOSSES
from spar_hf.distillation.selection import select_parameters
from spar_hf.distillation.specs import StudentSpec, TeacherSpec
from spar_hf.distillation.teacher import build_teacher, normalise
from spar_hf.distillation.views import Augmentation, Views
from spar_hf.encoders.composition import Resized
from spar_hf.sources import image_folder

LEARNING = ("--learning-rate", "1e-3", "--epochs", 2)
SMALL = Augmentation(long_side_px=64, short_side_px=64, min_side_px=32, multiple_px=8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A network, six pictures."""
    folder = tmp_path_factory.mktemp("world")
    return save_network(folder / "net"), save_pictures(folder / "pictures")


def flags(world, output, *more):
    network, pictures = world
    return ("--student", network, "--images", pictures, "--output", output, "--stride-px", 12, "--workers", 0,
            "--tracker", "none", *SIZES, *LEARNING, *more)  # fmt: skip


def weights(output):
    return load_file(output / "model" / "model.safetensors")


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    """A run of 12 steps, on line, without a disturbance."""
    output = tmp_path_factory.mktemp("reference") / "run"
    run("distill.py", *flags(world, output))
    return output


# ---- the method


def test_training_equals_a_plain_loop(world, reference):
    """Independent of the script: student, teacher, mean squared error and AdamW written out."""
    network, pictures = world
    views = Views(image_folder(pictures), SMALL, draws=2, seed=0)
    student = SparVisionModel.from_pretrained(network)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    teacher = SlidingWindow(SparVisionModel.from_pretrained(network).eval(), 32, 12)
    learns = [
        weight
        for name, weight in student.named_parameters()
        if name.startswith("encoder.layers.1.")
        or (name.startswith("encoder.layers.2.") and "q_proj" not in name and "k_proj" not in name)
    ]
    optimizer = torch.optim.AdamW(learns, lr=1e-3, weight_decay=1e-4)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (student.config.image_mean, student.config.image_std)
    )
    losses = []
    for step in plan_steps(views, None, epochs=2, batch_size=1, batches_per_step=1, seed=0):
        ((number,),) = step
        x = ((torch.from_numpy(views.pixels(number)).permute(2, 0, 1) / 255 - mean) / std)[None]
        loss = ((student(x).patch_embeds - teacher(x).patch_embeds) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = weights(reference)
    assert largest_difference(found, student.state_dict()) < 1e-6
    logged = [json.loads(line) for line in (reference / "log.jsonl").read_text().splitlines()]
    assert logged[0]["loss"] == pytest.approx(np.mean(losses[:10]), rel=1e-4)
    # What does not train is bit-identical; what trains has moved.
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed == {name for name, weight in student.named_parameters() if any(weight is w for w in learns)}


def test_result_loads_and_names_its_teacher(reference):
    model = SparVisionModel.from_pretrained(reference / "model")
    teacher = model.config.teacher
    assert (teacher["model"], teacher["method"], teacher["window_px"], teacher["stride_px"]) == (
        "net",
        "maskclip",
        32,
        12,
    )
    assert teacher["data"]["images"] == 6 and teacher["loss"] == "mse" and "revision" in teacher
    record = json.loads((reference / "run.json").read_text())
    assert record["seed"] == 0 and "distill.py" in record["command"] and record["versions"]["torch"]


def test_whole_models_keep_text_tower_and_processor(clip_folder, clip_tokenizer, world, tmp_path):
    from transformers import AutoModel, AutoProcessor

    clip_tokenizer.save_pretrained(clip_folder)
    run("distill.py", *flags((clip_folder, world[1]), tmp_path / "run", "--stride-px", 32, "--max-steps", 1))
    model = AutoModel.from_pretrained(tmp_path / "run" / "model")
    text = AutoProcessor.from_pretrained(tmp_path / "run" / "model")(text=["a photo of a cat"], return_tensors="pt")
    assert model.get_text_features(**text).pooler_output.shape == (1, 24)
    assert model.config.vision_config.teacher["stride_px"] == model.vision_model.config.teacher["stride_px"] == 32


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("last:1", "encoder.layers.2."),
        ("last:3", "encoder.layers."),
        ("positions", "embeddings.position_embedding.weight"),
        ("patch-embed", "embeddings.patch_embedding.weight"),
        ("all", ""),
    ],
)
def test_selection(world, selection, expected):
    names = [name for name, _ in SparVisionModel.from_pretrained(world[0]).named_parameters()]
    chosen = select_parameters(names, selection)
    assert chosen == {name for name in names if name.startswith(expected)}
    assert select_parameters(names, f"last:1, {selection}") == chosen | {n for n in names if "layers.2." in n}


@pytest.mark.parametrize("selection", ["", "last:0", "last:4", "last:", "qkv", "last:2,", "positions,posembed"])
def test_wrong_selection_lists_what_exists(world, selection):
    names = [name for name, _ in SparVisionModel.from_pretrained(world[0]).named_parameters()]
    with pytest.raises(ValueError, match=r"choose of all, positions, patch-embed, last:1 to last:3"):
        select_parameters(names, selection)


def test_selection_knows_networks_without_learned_positions():
    names = ["embeddings.patch_embeddings.weight", "layer.0.attention.q_proj.weight", "layer.1.mlp.fc1.weight"]
    assert select_parameters(names, "last:1") == {"layer.1.mlp.fc1.weight"}
    with pytest.raises(ValueError, match="no part 'positions'"):
        select_parameters(names, "positions")


# ---- splits, stores


def test_batches_accumulation_and_processes_split_alike(world, tmp_path):
    """2 processes of 1 batch = 1 process of 2 batches, and 1 batch of 2 where sizes allow."""
    square = save_pictures(tmp_path / "square", 4)
    for path in square.iterdir():
        Image.open(path).resize((64, 64)).save(path)
    fixed = ("--scale-range", 1, 1, "--crop-probability", 0, "--seed", 3)
    one, two, batched = (tmp_path / name for name in ("one", "two", "batched"))
    run("distill.py", *flags((world[0], square), one, *fixed, "--accumulate", 2))
    run("distill.py", *flags((world[0], square), batched, *fixed, "--batch-size", 4))
    run("distill.py", *flags((world[0], square), tmp_path / "four", *fixed, "--accumulate", 4))
    Process("distill.py", *flags((world[0], square), two, *fixed), processes=2).finish()
    # Tolerance: sums in another order, twice (fp32); a step moves a weight by about 1e-3.
    assert largest_difference(weights(one), weights(two)) < 2e-6
    assert largest_difference(weights(batched), weights(tmp_path / "four")) < 2e-6
    assert largest_difference(weights(one), weights(batched)) > 1e-4


def test_fsdp_on_two_processes_trains_as_ddp_and_goes_on(world, tmp_path):
    """Sharded weights, gradients and optimiser state; resumed from the checkpoint before the last one."""
    common = ("--train", "all", "--max-steps", 4, "--save-every", 2)
    plain = Process("distill.py", *flags(world, tmp_path / "ddp", *common), processes=2)
    sharded = flags(world, tmp_path / "fsdp", *common)
    said = Process("distill.py", *sharded, processes=2, before=with_fsdp).finish()
    plain.finish()
    assert json.loads((tmp_path / "fsdp/run.json").read_text())["distributed"] == "FSDP", said
    whole = weights(tmp_path / "fsdp")
    assert largest_difference(whole, weights(tmp_path / "ddp")) < 5e-6
    assert largest_difference(whole, load_file(world[0] / "model.safetensors")) > 1e-3

    *_, last = sorted((tmp_path / "fsdp").glob("checkpoint-*"))
    last.unlink()
    said = Process("distill.py", *sharded, "--resume", processes=2, before=with_fsdp).finish()
    assert "going on after step 2" in said
    assert largest_difference(weights(tmp_path / "fsdp"), whole) == 0


@pytest.mark.slow
def test_torchrun_starts_two_processes(world, reference, tmp_path):
    said = finish(start("distill.py", *flags(world, tmp_path / "run", "--max-steps", 2), processes=2))
    assert "wrote" in said and json.loads((tmp_path / "run/run.json").read_text())["processes"] == 2


def test_stored_features_and_trunk_train_as_on_line(world, tmp_path):
    cached = ("--student", world[0], "--images", world[1], "--stride-px", 12, "--workers", 0, *SIZES)
    run("cache_teacher.py", *cached, "--cache", tmp_path / "c", "--draws", 2, "--trunk-blocks", 2)
    one_draw = ("--draws", 2)
    run("distill.py", *flags(world, tmp_path / "online", *one_draw))
    run("distill.py", *flags(world, tmp_path / "stored", *one_draw, "--cache", tmp_path / "c"))
    run("distill.py", *flags(world, tmp_path / "trunk", *one_draw, "--cache", tmp_path / "c", "--trunk-blocks", 2))
    online = weights(tmp_path / "online")
    moved = largest_difference(online, load_file(world[0] / "model.safetensors"))
    assert moved > 5e-3
    # fp16 targets and tokens: a sign of a tiny gradient can turn in Adam's first steps, so compare in the mean.
    for name in ("stored", "trunk"):
        found = weights(tmp_path / name)
        learned = [n for n in online if not torch.equal(online[n], load_file(world[0] / "model.safetensors")[n])]
        apart = torch.cat([(found[n] - online[n]).abs().flatten() for n in learned]).mean()
        assert apart < 0.02 * moved, name
        losses = [
            json.loads((tmp_path / r / "log.jsonl").read_text().splitlines()[-1])["loss"] for r in (name, "online")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    with pytest.raises(ValueError, match="--train last:3 reaches blocks before the last 2"):
        run("distill.py", *flags(world, tmp_path / "x", *one_draw, "--cache", tmp_path / "c", "--trunk-blocks", 2,
                                 "--train", "last:3"))  # fmt: skip
    with pytest.raises(ValueError, match="needs a frozen trunk"):
        run("distill.py", *flags(world, tmp_path / "x", *one_draw, "--cache", tmp_path / "c", "--trunk-blocks", 2,
                                 "--train", "last:2,positions"))  # fmt: skip


def test_student_keeps_the_last_block_and_the_reach_it_was_given(world, tmp_path):
    cached = ("--student", world[0], "--images", world[1], "--stride-px", 12, "--workers", 0, *SIZES)
    runs = ("--student-method", "sclip", "--student-reach", "window")
    # The trunk comes before the last block: a store made for one row serves another of the same positions.
    run("cache_teacher.py", *cached, *runs[2:], "--cache", tmp_path / "c", "--trunk-blocks", 2)
    trunk = ("--cache", tmp_path / "c", "--trunk-blocks", 2)
    run("distill.py", *flags(world, tmp_path / "run", *runs, *trunk, "--max-steps", 1))
    student = SparVisionModel.from_pretrained(tmp_path / "run" / "model")
    config = student.config
    assert (config.method, config.attention_reach, len(config.recipe["terms"])) == ("sclip", "window", 2)
    # The teacher is the starting checkpoint as it is, and the loss is that of a student that runs as it says.
    assert config.teacher["method"] == "maskclip" and config.teacher["attention_reach"] == "image"
    start = SparVisionModel.from_pretrained(world[0], method="sclip", attention_reach="window").eval()
    teacher = SlidingWindow(SparVisionModel.from_pretrained(world[0]).eval(), 32, 12)
    views = Views(image_folder(world[1]), SMALL, draws=1, seed=0)
    (((number,),), *_) = plan_steps(views, None, epochs=1, batch_size=1, batches_per_step=1, seed=0)
    pixels = normalise(torch.from_numpy(views.pixels(number))[None], start.config)
    with torch.no_grad():
        expected = (start(pixels).patch_embeds - teacher(pixels).patch_embeds).square().mean().item()
    (logged,) = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert logged["loss"] == pytest.approx(expected, rel=2e-3)  # stored in fp16
    with pytest.raises(ValueError, match=r"trunk\.attention_reach is 'window' there and 'image' here"):
        run("distill.py", *flags(world, tmp_path / "x", "--student-method", "sclip", *trunk))


def test_a_teacher_may_see_pictures_at_their_own_size_too(world):
    spec = TeacherSpec(reach="window", window_px=0, short_sides_px=(0, 64), dtype="float32")
    teacher, described = build_teacher(spec, StudentSpec(str(world[0])), patch_px=8)
    assert (described["short_side_px"], described["mean"]) == ([0, 64], "features")
    assert described["attention_reach"] == "window"
    vision = SparVisionModel.from_pretrained(world[0], attention_reach="window").eval()
    pixels = torch.randn(1, 3, 48, 96)
    with torch.no_grad():
        expected = (vision(pixels).patch_embeds + Resized(vision, 64)(pixels).patch_embeds) / 2
        torch.testing.assert_close(teacher(pixels).patch_embeds, expected, atol=1e-5, rtol=0)


def test_the_linear_head_is_least_squares_and_goes_between(world, tmp_path):
    cached = ("--student", world[0], "--images", world[1], "--stride-px", 12, "--workers", 0, *SIZES)
    run("cache_teacher.py", *cached, "--cache", tmp_path / "c", "--trunk-blocks", 2)
    common = ("--head", "linear", "--draws", 1, "--cache", tmp_path / "c", "--max-steps", 1)
    run("distill.py", *flags(world, tmp_path / "pixels", *common))
    run("distill.py", *flags(world, tmp_path / "trunk", *common, "--trunk-blocks", 2))

    # In NumPy, over all patches of all views: these have no more than 64 each.
    start = SparVisionModel.from_pretrained(world[0]).eval()
    teacher = SlidingWindow(SparVisionModel.from_pretrained(world[0]).eval(), 32, 12)
    views = Views(image_folder(world[1]), SMALL, draws=1, seed=0)
    pairs = []
    for number in range(6):
        pixels = normalise(torch.from_numpy(views.pixels(number))[None], start.config)
        with torch.no_grad():
            maps = [network(pixels).patch_embeds[0].flatten(0, 1).double().numpy() for network in (start, teacher)]
        pairs.append(maps)
    ours, theirs = (np.concatenate(maps) for maps in zip(*pairs, strict=True))
    constant = np.concatenate([np.ones((len(ours), 1)), ours], axis=1)
    head = np.linalg.lstsq(constant, theirs, rcond=None)[0]
    (((first,),), *_) = plan_steps(views, None, epochs=1, batch_size=1, batches_per_step=1, seed=0)
    ours, theirs = pairs[first]
    expected = ((head[0] + ours @ head[1:] - theirs) ** 2).mean()
    assert expected < 0.5 * ((ours - theirs) ** 2).mean()
    for name in ("pixels", "trunk"):
        (logged,) = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert logged["loss"] == pytest.approx(expected, rel=0.02), name  # from fp16 features
        assert SparVisionModel.from_pretrained(tmp_path / name / "model").config.teacher["head"] == "linear"


def test_losses_against_numpy():
    student, teacher, centre = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.randn(5)
    ours, theirs, mean = (tensor.numpy() for tensor in (student, teacher, centre))

    def one_minus_cosine(a, b):
        return 1 - (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))

    expected = {
        "mse": ((ours - theirs) ** 2).mean((1, 2, 3)),
        "distance": np.sqrt(((ours - theirs) ** 2).sum(-1)).mean((1, 2)),
        "cosine": one_minus_cosine(ours, theirs).mean((1, 2)),
        "centred-cosine": one_minus_cosine(ours - mean, theirs - mean).mean((1, 2)),
    }
    assert LOSSES.keys() == expected.keys()
    for name, loss in LOSSES.items():
        np.testing.assert_allclose(loss(student, teacher, centre).numpy(), expected[name], rtol=1e-5)


@pytest.mark.parametrize("loss", ["distance", "cosine", "centred-cosine"])
def test_other_losses_fall(world, tmp_path, loss):
    run("distill.py", *flags(world, tmp_path / "run", "--loss", loss, "--epochs", 8, "--log-every", 6, "--draws", 1,
                             "--clip-norm", 1, "--schedule", "cosine", "--train", "all"))  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]
