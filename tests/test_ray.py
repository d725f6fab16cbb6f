"""Pictures in columns, as Ray Data gives them; and on a real local cluster of two workers, one of them killed."""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

import spar_hf
from spar_hf.pipeline_spar import OpenVocabularySegmentationPipeline
from spar_hf.ray import Features, Segment

LABELS = "road; car, automobile; sky"
ROOT = Path(__file__).resolve().parents[1]


def picture(seed: int, height: int = 64, width: int = 80) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1))


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def column(values: list) -> np.ndarray:
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made


def test_a_batch_of_any_entries_gives_what_the_pipeline_finds(model_folder, tmp_path):
    images = [picture(0), picture(1, 80, 64), picture(2), picture(3)]
    images[3].save(tmp_path / "photo.png")
    entries = [encoded(images[0]), np.asarray(images[1]), {"bytes": encoded(images[2]), "path": None}]
    entries += [str(tmp_path / "photo.png"), b"no picture", str(tmp_path / "missing.png")]
    segment = Segment(model_folder, LABELS, ["label_map", "rle", "areas"], batch_size=2)
    found = segment({"image": column(entries), "id": np.arange(6)})
    assert set(found) == {"id", "label_map", "rle", "areas", "error"} and found["id"].tolist() == list(range(6))

    model, processor = spar_hf.load(model_folder)
    pipeline = OpenVocabularySegmentationPipeline(model=model, processor=processor)
    for number, image in enumerate(images):
        expected = pipeline(image, candidate_labels=LABELS)
        stored = np.asarray(Image.open(io.BytesIO(found["label_map"][number])))
        assert (stored != expected["segmentation"]).mean() <= 0.001
        assert found["error"][number] == ""
        areas = json.loads(found["areas"][number])
        assert sum(areas.values()) == pytest.approx(1) and set(areas) <= {"road", "car", "sky"}
        assert {mask["label"] for mask in json.loads(found["rle"][number])} == set(areas)
        assert sum(mask["area"] for mask in json.loads(found["rle"][number])) == image.width * image.height
    assert found["label_map"][4] == b"" and found["areas"][4] == "" and "is not an image" in found["error"][4]
    assert "missing.png' does not exist" in found["error"][5]
    with pytest.raises(ValueError, match="the data have no column 'image'; their columns: photo"):
        segment({"photo": column(entries)})
    with pytest.raises(ValueError, match="no result 'masks'"):
        Segment(model_folder, LABELS, ["masks"])


def test_features_of_a_batch(model_folder):
    images = [picture(0), picture(1, 80, 64), picture(2)]
    found = Features(model_folder, column="photo")({"photo": column([encoded(image) for image in images])})
    model, processor = spar_hf.load(model_folder)
    for number, image in enumerate(images):
        with torch.inference_mode():
            expected = model.vision_model(processor(images=image)["pixel_values"]).patch_embeds[0]
        assert torch.allclose(load(found["features"][number])["patch_embeds"], expected, atol=1e-5)


class KilledOnce(Segment):
    """Begins when two workers have a batch; kills its own process with its second batch, if no other has done so."""

    def __init__(self, *arguments, marker: str, **options):
        super().__init__(*arguments, **options)
        self.marker, self.batches = marker, 0

    def __call__(self, batch):
        self.batches += 1
        Path(f"{self.marker}-{os.getpid()}").touch()
        until = time.monotonic() + 120
        while len(list(Path(self.marker).parent.glob("killed-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        if self.batches == 2:
            try:
                os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return {**super().__call__(batch), "pid": np.full(len(batch["id"]), os.getpid())}


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_a_cluster_of_two_workers_one_killed_on_the_way(cluster, model_folder, tmp_path):
    import pyarrow.parquet

    rows = [{"id": number, "image": encoded(picture(number))} for number in range(24)]
    cluster.data.from_items(rows).write_parquet(str(tmp_path / "photos"))
    marker = tmp_path / "killed"
    # Ray makes one block of so little, and a block is what a worker takes.
    found = (
        cluster.data.read_parquet(str(tmp_path / "photos"))
        .repartition(12)
        .map_batches(
            KilledOnce,
            fn_constructor_args=(model_folder, LABELS),
            fn_constructor_kwargs={"marker": str(marker)},
            batch_size=2,
            concurrency=2,
            num_cpus=0.5,
        )
    )
    found.write_parquet(str(tmp_path / "found"))
    assert marker.exists()
    table = pyarrow.parquet.read_table(tmp_path / "found").to_pydict()
    assert sorted(table["id"]) == list(range(24)) and len(set(table["pid"])) >= 2
    segment = Segment(model_folder, LABELS)
    for number in (0, 11, 23):
        expected = segment({"image": column([rows[number]["image"]])})
        place = table["id"].index(number)
        assert table["label_map"][place] == expected["label_map"][0] and table["error"][place] == ""


@pytest.mark.slow
def test_the_example_reads_a_folder_and_writes_parquet(cluster, tmp_path, monkeypatch, capsys):
    import pyarrow.parquet

    for number in range(4):
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture(number).save(tmp_path / "photos" / f"{number}.png")
    script = ROOT / "examples" / "ray_data.py"
    words = [str(script), str(tmp_path / "photos"), str(tmp_path / "found"), "--actors", "1"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(script), run_name="__main__")
    table = pyarrow.parquet.read_table(tmp_path / "found").to_pydict()
    assert sorted(Path(path).name for path in table["path"]) == [f"{number}.png" for number in range(4)]
    assert all(Image.open(io.BytesIO(stored)).size == (80, 64) for stored in table["label_map"])
    assert "4 pictures" in capsys.readouterr().out
