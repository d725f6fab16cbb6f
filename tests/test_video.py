"""Videos: real files of several kinds, read and written frame by frame, read back by PyAV."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import spar_hf
from spar_cli.main import main
from spar_hf import FromFeatures, OpenVocabularySegmentationPipeline
from spar_hf.image_file_spar import InvalidImageError
from spar_hf.segmentation_spar import FullScores
from spar_hf.segmenters import Smoothed
from spar_hf.video import VideoWriter, fitted, read_frames

LABELS = "road; car, automobile; sky"


def picture(size_hw: tuple[int, int], number: int) -> Image.Image:
    """Coloured squares that move by the frame."""
    y, x = np.mgrid[: size_hw[0], : size_hw[1]]
    return Image.fromarray(
        np.stack([(y // 16 * 60 + 9 * number) % 256, x // 16 * 40 % 256, 0 * x + 90], -1).astype("u1")
    )


def make_video(path: Path, size_hw=(64, 96), count=6, kind=None, codec="libx264", **options) -> Path:
    with av.open(str(path), "w", format=kind, options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *size_hw, "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_image(picture(size_hw, number))
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def of_changing_size(path: Path) -> Path:
    """Three frames of 64 x 96 px, then two of 80 x 48, in one stream."""
    parts = [
        make_video(path.with_name(f"{n}.h264"), s, c, "h264")
        for n, (s, c) in enumerate((((64, 96), 3), ((80, 48), 2)))
    ]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def turned(path: Path, degrees: int) -> Path:
    """The same MP4 with a display matrix, as phones write it."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, times, id and duration; layer to reserved
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    for number, value in enumerate((cos, sin, 0, -sin, cos, 0)):
        content[place + 4 * number : place + 4 * number + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    out = path.with_name(f"turned-{degrees}.mp4")
    out.write_bytes(content)
    return out


def close(found: Image.Image, expected: Image.Image) -> bool:
    """Equal but for what compression does."""
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int))
    return found.size == expected.size and difference.mean() < 12


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts", "a.h264"])
def test_frames_come_in_order_with_their_times(tmp_path, name):
    kind = {"ts": "mpegts"}.get(name[2:])
    frames = list(read_frames(make_video(tmp_path / name, kind=kind)))
    assert len(frames) == 6 and all(close(frame.image, picture((64, 96), n)) for n, frame in enumerate(frames))
    assert not close(frames[0].image, picture((64, 96), 5))
    steps = np.diff([float(frame.seconds) for frame in frames])
    assert np.allclose(steps, 0.1, atol=0.002) or (name == "a.h264" and (steps > 0).all())


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_frames_of_a_phone_are_upright(tmp_path, degrees):
    (frame,) = read_frames(turned(make_video(tmp_path / "a.mp4", count=1), degrees))
    assert close(frame.image, picture((64, 96), 0).rotate(-degrees, expand=True))  # players turn it clockwise


def test_a_written_video_has_its_frames_and_times(tmp_path):
    times = [Fraction(0), Fraction(1, 30), Fraction(1, 2)]
    with VideoWriter(tmp_path / "no-suffix") as video:
        for number, seconds in enumerate(times):
            video.add(picture((63, 97), number), seconds)
    frames = list(read_frames(tmp_path / "no-suffix"))
    assert [frame.image.size for frame in frames] == [(98, 64)] * 3  # even sides
    assert [float(frame.seconds) for frame in frames] == pytest.approx([float(t) for t in times], abs=1e-4)
    assert all(close(f.image.crop((0, 0, 97, 63)), picture((63, 97), n)) for n, f in enumerate(frames))


def test_a_picture_is_fitted_into_a_canvas():
    white = Image.new("RGB", (20, 10), "white")
    assert fitted(white, (20, 10)) is white
    box = np.asarray(fitted(white, (40, 40)))[..., 0]
    assert (box[10:30] == 255).all() and (box[:10] == 0).all() and (box[30:] == 0).all()


# --- smoothing -------------------------------------------------------------------------------------------------


def test_smoothed_scores_are_the_mean_with_falling_weights(model, spar_processor):
    keep, pixels = 0.7, torch.randn(4, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    plain = FromFeatures(model.vision_model, model, spar_processor)
    encoded = plain.encode_labels(LABELS)
    each = torch.stack([maps(slice(0, 4)) for maps in plain(pixels, encoded)])
    smoothed = Smoothed(plain, keep)
    for number in range(4):
        (maps,) = smoothed(pixels[number : number + 1], encoded)
        weights = torch.tensor([keep**number, *((1 - keep) * keep ** (number - n) for n in range(1, number + 1))])
        expected = (weights[:, None, None, None] * each[: number + 1]).sum(0)
        torch.testing.assert_close(maps(slice(0, 4)), expected, atol=1e-5, rtol=1e-5)
    (batched,) = Smoothed(plain, keep)(pixels, encoded)[3:]
    torch.testing.assert_close(batched(slice(0, 4)), expected, atol=1e-5, rtol=1e-5)

    small = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    (anew,), (alone,) = smoothed(small, encoded), plain(small, encoded)
    assert torch.equal(anew(slice(0, 4)), alone(slice(0, 4)))
    with pytest.raises(ValueError, match=r"the share of the past is 1.0; it must be from 0 to below 1"):
        Smoothed(plain, 1.0)


def test_scores_without_a_grid_are_smoothed_at_every_pixel():
    pictures = torch.randn(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))

    class Plain:
        def __call__(self, pixel_values, encoded):
            return [
                FullScores(
                    make=lambda names, size_hw, one=one: one[names], size_hw=(20, 30), num_names=3, device=one.device,
                    logit_scale=2.0,
                )
                for one in pixel_values
            ]  # fmt: skip

    smoothed = Smoothed(Plain(), 0.25)
    (first,), (second,) = smoothed(pictures[:1], None), smoothed(pictures[1:], None)
    torch.testing.assert_close(first(slice(0, 3)), pictures[0])
    torch.testing.assert_close(second(slice(1, 3)), (0.25 * pictures[0] + 0.75 * pictures[1])[1:])
    assert second.logit_scale == 2.0


# --- the command -----------------------------------------------------------------------------------------------


def test_the_command_writes_a_video_and_a_label_map_for_each_frame(tmp_path, monkeypatch, capsys, model_folder):
    monkeypatch.chdir(tmp_path)
    make_video(Path("clip.mp4"), count=4)
    make_video(Path("before.mp4"), count=2)  # of the same size; nothing of it may reach the other
    words = [
        "segment",
        "before.mp4",
        "clip.mp4",
        "--labels",
        LABELS,
        "--model",
        model_folder,
        "--json",
        "r.json",
        "--smooth",
        "0.6",
    ]
    assert main([*words, "--format", "png", "--format", "coco", "--min-area", "20"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "spar-output/clip-overlay.mp4" in out

    model, processor = spar_hf.load(model_folder)
    segment = OpenVocabularySegmentationPipeline(model=model, processor=processor)
    smoothed = Smoothed(segment.segmenter_of(), 0.6)
    share = np.zeros(3)
    for number, frame in enumerate(read_frames(Path("clip.mp4")), start=1):
        found = segment(frame.image, candidate_labels=LABELS, segmenter=smoothed).cleaned(20)["segmentation"]
        assert (np.asarray(Image.open(f"spar-output/clip/{number:06d}-labels.png")) == found.astype(np.uint8)).all()
        share += [(found == index).mean() / 4 for index in range(3)]
    _, record = json.loads(Path("r.json").read_text())["images"]
    assert record["frames"] == 4 and record["image"] == "clip.mp4"
    assert [entry["area_fraction"] for entry in record["classes"]] == pytest.approx(share.tolist(), abs=1e-6)
    written = list(read_frames(Path("spar-output/clip-overlay.mp4")))
    assert [frame.image.size for frame in written] == [(96, 64)] * 4
    assert [float(frame.seconds) for frame in written] == pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-4)
    names = [image["file_name"] for image in COCO("spar-output/coco-instances.json").dataset["images"]]
    assert names[2:] == [f"clip.mp4#{number}" for number in range(1, 5)]


def test_a_video_whose_size_changes(tmp_path, monkeypatch, capsys, model_folder):
    monkeypatch.chdir(tmp_path)
    of_changing_size(Path("clip.h264"))
    assert main(["segment", "clip.h264", "--labels", LABELS, "--model", model_folder, "--smooth", "0.5"]) == 0
    sizes = [Image.open(path).size for path in sorted(Path("spar-output/clip").iterdir())]
    assert sizes == [(96, 64)] * 3 + [(48, 80)] * 2
    assert [f.image.size for f in read_frames(Path("spar-output/clip-overlay.mp4"))] == [(96, 64)] * 5


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_truncated_video_keeps_what_was_done(tmp_path, monkeypatch, capsys, model_folder, name):
    monkeypatch.chdir(tmp_path)
    options = {"movflags": "faststart"} if name == "clip.mp4" else {"cluster_time_limit": "300"}
    make_video(Path(name), count=24, **options)
    whole = Path(name).read_bytes()
    Path(name).write_bytes(whole[: 3 * len(whole) // 4])
    Image.new("RGB", (64, 64)).save("good.png")
    words = ["segment", name, "--labels", LABELS, "--model", model_folder, "--format", "palette"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(
        rf"spar: error: {name} breaks off after \d+ frames \(.*\). What was made of these is kept.*\n", err
    )
    count = int(re.search(r"after (\d+) frames", err)[1])
    assert 0 < count < 24 and len(list(Path("spar-output/clip").iterdir())) == count
    assert len(list(read_frames(Path("spar-output/clip-overlay.mp4")))) == count
    make_video(Path("good.mkv"), count=2)
    assert main(["segment", name, "good.mkv", *words[2:], "--output", "both"]) == 1
    assert "1 of 2 videos could not be done; the others are." in capsys.readouterr().err
    assert len(list(Path("both/good").iterdir())) == 2
    assert main(["segment", "good.mkv", "good.png", *words[2:]]) == 2
    assert "good.mkv is a video and good.png is none" in capsys.readouterr().err


def test_files_that_are_no_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video " * 100)
    with pytest.raises(InvalidImageError, match=r"a.mp4 cannot be read as a video \(invalid data"):
        list(read_frames(tmp_path / "a.mp4"))
    whole = make_video(tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) // 2])  # its table of frames is at the end
    with pytest.raises(InvalidImageError, match=r"b.mp4 cannot be read as a video"):
        list(read_frames(tmp_path / "b.mp4"))
    with av.open(str(tmp_path / "c.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        for frame in (silence, None):
            container.mux(stream.encode(frame))
    with pytest.raises(InvalidImageError, match=r"c.mp4 holds no video; give a video file"):
        list(read_frames(tmp_path / "c.mp4"))


def test_a_full_disk_keeps_the_frames_before(tmp_path, monkeypatch, capsys, model_folder):
    monkeypatch.chdir(tmp_path)
    make_video(Path("clip.mp4"), (128, 192), count=12)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))  # Python ignores the signal that comes of it
    try:
        status = main(["segment", "clip.mp4", "--labels", LABELS, "--model", model_folder, "--format", "palette"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1
    assert re.search(r"spar: error: disk full while writing .*clip-overlay.mp4", err), err
    assert not list(Path("spar-output").glob(".*.tmp")) and not Path("spar-output/clip-overlay.mp4").exists()
    for path in Path("spar-output/clip").iterdir():
        assert Image.open(path).size == (192, 128)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_frames(tmp_path, model_folder):
    peaks = {}
    for count in (30, 300):
        clip = make_video(tmp_path / f"{count}.mp4", (240, 320), count)
        code = (
            "import resource\nfrom spar_cli.main import main\n"
            f"assert main(['segment', {str(clip)!r}, '--labels', {LABELS!r}, '--model', {model_folder!r}, "
            f"'--output', {str(tmp_path / 'out')!r}, '--smooth', '0.8']) == 0\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks[count] = float(done.stdout.splitlines()[-1])
    print(f"peak over 30 frames {peaks[30]:.0f} MB, over 300 frames {peaks[300]:.0f} MB")
    assert peaks[300] - peaks[30] < 30
