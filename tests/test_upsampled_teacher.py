"""A teacher whose features are upsampled: what its student learns of each patch, and what the record says."""

from __future__ import annotations

import argparse

import pytest
import torch

from spar_cli.training_options import add_teacher_flags, teacher_spec
from spar_hf import build_encoder
from spar_hf.distillation.specs import StudentSpec, TeacherSpec
from spar_hf.distillation.teacher import build_teacher

SIZES_HW = ((64, 64), (96, 144), (48, 160), (70, 90))


@pytest.fixture(scope="module")
def folder(make_spar, spar_processor, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("student")
    make_spar(num_hidden_layers=2).save_pretrained(path)
    spar_processor.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("window_px", [0, 48])
@pytest.mark.parametrize("factor", [None, 4])
@torch.no_grad()
def test_a_patch_learns_the_mean_of_its_cells(window_px, factor, folder, make_spar):
    vision = make_spar(num_hidden_layers=2).vision_model
    spec = TeacherSpec(
        window_px=window_px, strides_px=(24,) if window_px else (), dtype="float32", upsample="jbu",
        upsample_factor=factor,
    )  # fmt: skip
    teacher, record = build_teacher(spec, StudentSpec(folder), patch_px=16)
    assert record["upsample"] == {"name": "jbu", "factor": factor or 16}
    window = {"window": window_px, "stride_px": 24} if window_px else {}
    fine = build_encoder(vision, **window, upsample="jbu", upsample_factor=factor)
    for size in SIZES_HW:
        pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(sum(size)))
        for batch in (1, 2):
            found, cells = teacher(pixels[:batch]), fine(pixels[:batch]).patch_embeds
            rows, columns = (side // 16 for side in size)
            side = factor or 16
            assert found.patch_embeds.shape[1:3] == (rows, columns)
            for row in range(rows):
                for column in range(columns):
                    own = cells[:, side * row : side * (row + 1), side * column : side * (column + 1)]
                    torch.testing.assert_close(
                        found.patch_embeds[:, row, column], own.flatten(1, 2).mean(1), atol=1e-5, rtol=1e-5
                    )


def test_score_maps_of_an_upsampled_segmenter_teach(folder):
    plain, finer = (
        build_teacher(
            TeacherSpec(
                window_px=0, dtype="float32", label_method="maskclip", labels=labels(), upsample=upsample,
                upsample_factor=4 if upsample else None,
            ),
            StudentSpec(folder),
            patch_px=16,
        )
        for upsample in (None, "jbu")
    )  # fmt: skip
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    assert "upsample" not in plain[1] and finer[1]["upsample"]["factor"] == 4
    assert not torch.allclose(plain[0](pixels).patch_embeds, finer[0](pixels).patch_embeds, atol=1e-4)


def labels():
    from spar_hf import Labels

    return Labels.parse("road; car; sky")


def test_the_flags():
    parser = argparse.ArgumentParser()
    add_teacher_flags(parser)
    spec = teacher_spec(
        parser.parse_args(["--student", "tiny", "--teacher-upsample", "jbu", "--teacher-upsample-factor", "4"])
    )
    assert (spec.upsample, spec.upsample_factor) == ("jbu", 4)
    with pytest.raises(ValueError, match=r"'jbo'.*jbu"):
        TeacherSpec(upsample="jbo")
    with pytest.raises(ValueError, match="upsample_factor is of an upsampler; name it too"):
        TeacherSpec(upsample_factor=4)
