"""export(): towers and label map as a folder of graphs, checked against PyTorch, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spar_onnx.folder import (
    LABEL_MAP,
    LAYOUT,
    RECORD,
    SUFFIXES,
    TEXT,
    VISION,
    file_digest,
    graph_file,
    is_exported,
    onnxruntime,
    open_session,
)
from spar_onnx.pipeline import load as load_exported

from ..build import build_encoder
from ..encoder_spar import DenseVisionModel
from ..files import whole_folder, write_json
from ..methods.table import METHODS, find_method
from ..names_spar import one_of
from .arithmetic import to_float16, to_int8, to_static_int8
from .checks import (
    EQUAL_LABELS,
    TOLERANCE,
    PictureBookCheck,
    calibration_scenes,
    check_tokens,
    text_difference,
    vision_differences,
)
from .graphs import (
    MIN_OPSET,
    OPSET,
    TEXT_OUTPUTS,
    VISION_OUTPUTS,
    FusedAttention,
    first_line,
    text_program,
    to_onnx,
    vision_program,
)
from .label_graph import label_graph

FORMATS = ("onnx", "torch-export")
DTYPES = tuple(SUFFIXES)
MAX_OPSET = 22
SCENES = 4  # of the picture book, on which arithmetic is compared


@dataclass(frozen=True)
class Export:
    """What was exported.

    Attributes:
        folder: where.
        record: what its export.json says.
    """

    folder: Path
    record: dict[str, Any]


def export(
    model: Any,
    processor: Any,
    folder: str | Path,
    format: str = "onnx",
    *,
    dtypes: Iterable[str] = ("float32",),
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    reach: str | None = None,
    opset: int = OPSET,
    fused: bool = True,
    scenes: int = SCENES,
    calibration: Sequence[Any] = (),
) -> Export:
    """Exports a model for one forward pass at any size, and checks it against PyTorch.

    The folder holds config.json, processor and tokenizer, `onnx/vision_model.onnx`, `onnx/text_model.onnx` (with the
    endings `_fp16`, `_int8` and `_int8_static` for other arithmetic), `onnx/label_map.onnx` and export.json, the
    record of what was checked. It is written whole; nothing is kept when a check fails.

    Args:
        model: of any family, as `spar_hf.load` returns it: in fp32, on the CPU.
        processor: its processor.
        folder: where to; a folder that is not there, or an earlier export, which is replaced.
        format: `onnx`; or `torch-export`, programs of torch.export for PyTorch (towers only, fp32).
        dtypes: some of `float32`, `float16`, `int8` and `int8-static`. Both int8 are about weights, and products with
            them; activations are scaled as they come, or by what they are on some pictures (the vision tower alone).
        method, settings, reach: of one pass; see `build_encoder`.
        opset: version of ONNX's operators.
        fused: attention of the vision tower is onnxruntime's own operator (`com.microsoft`), which is faster and takes
            less memory; False keeps to ONNX's operators, for other runtimes.
        scenes: pictures of the picture book on which the arithmetic is compared.
        calibration: pictures for `int8-static`, PIL images in RGB; none are drawings of the picture book.

    Raises:
        ValueError: an argument is wrong, the model can't be exported, or the result differs from PyTorch's.
        OSError: the disk is full.
    """
    folder = Path(folder)
    dtypes = list(dict.fromkeys(dtypes))
    one_of("format", format, FORMATS)
    for dtype in dtypes:
        one_of("dtype", dtype, DTYPES)
    if not dtypes or (format == "torch-export" and dtypes != ["float32"]):
        raise ValueError(f"dtypes is {dtypes}; give one or more of {', '.join(DTYPES)}, and float32 for torch-export.")
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ValueError(
            f"opset is {opset}; the graphs need operators of ONNX opset {MIN_OPSET} and are written up to {MAX_OPSET}."
        )
    if folder.exists() and not is_exported(folder):
        raise ValueError(f"{folder} is there and no exported model; give a folder that is not there yet.")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(f"the model is {model.dtype} on {model.device}; load it in float32 on the CPU to export it.")
    vision = one_pass(model.vision_model, method, settings, reach)
    if format == "onnx":
        onnxruntime()
    with whole_folder(folder) as draft:
        record = {
            "layout": LAYOUT,
            "format": format,
            "spar_hf": metadata.version("spar-hf"),
            "model_type": model.config.model_type,
            "patch_px": vision.config.patch_size,
            "native_px": vision.config.image_size,
            **vision.config.features_depend_on(),
            "size_rule": vision.config.size_rule,
            "dim": vision.config.projection_dim or vision.config.hidden_size,
        }
        write = _write_onnx if format == "onnx" else _write_programs
        record |= write(draft, record, model, vision, processor, dtypes, opset, fused, scenes, calibration)
        write_json(draft / RECORD, record)
    return Export(folder, record)


def one_pass(vision: Any, method: str | None, settings: Mapping[str, Any] | None, reach: str | None) -> Any:
    """The tower that runs a method in one pass.

    Raises:
        ValueError: the method is more than that.
    """
    row = None if method is None else find_method(method)
    if row is not None and row.recipe is None:
        whole = [name for name, other in METHODS.items() if other.recipe is not None]
        why = (
            f"has a second network ({', '.join(row.needs)})"
            if row.needs
            else "decides by the values of each picture what it computes"
        )
        raise ValueError(f"method {method!r} {why}, which a graph does not hold; export one of {', '.join(whole)}.")
    tower = build_encoder(vision, method, settings=settings, reach=reach)
    assert isinstance(tower, DenseVisionModel)
    return tower.eval()


def _write_onnx(
    draft: Path,
    record: dict[str, Any],
    model: Any,
    vision: Any,
    processor: Any,
    dtypes: list[str],
    opset: int,
    fused: bool,
    scenes: int,
    calibration: Sequence[Any],
) -> dict[str, Any]:
    """Writes the graphs and what goes with them; returns the rest of the record."""
    (draft / "onnx").mkdir()
    exact = {graph: draft / graph_file(graph, "float32") for graph in (VISION, TEXT, LABEL_MAP)}
    with FusedAttention() if fused else nullcontext():
        program = vision_program(vision)
    to_onnx(program, exact[VISION], "pixel_values", VISION_OUTPUTS, opset)
    to_onnx(text_program(model), exact[TEXT], "input_ids", TEXT_OUTPUTS, opset)
    exact[LABEL_MAP].write_bytes(
        label_graph(vision.config.size_rule, vision.config.patch_size, opset).SerializeToString()
    )
    write_config(draft, model, vision, processor)

    side = text_side(model, processor)
    record = {**record, "opset": opset, "fused": fused, "text": side, "dtypes": {}, "files": {}}
    book = PictureBookCheck(model, vision, processor, scenes)
    pictures = calibration or calibration_scenes(vision.config.image_size)
    pixels = [processor(images=picture, return_tensors="np")["pixel_values"] for picture in pictures]
    measured: dict[str, Any] = {}
    for dtype in ("float32", *(dtype for dtype in dtypes if dtype != "float32")):
        if dtype != "float32":
            convert(exact, {graph: draft / graph_file(graph, dtype) for graph in (VISION, TEXT)}, dtype, pixels)
        files = {graph_file(graph, dtype): draft / graph_file(graph, dtype) for graph in (VISION, TEXT, LABEL_MAP)}
        record["files"] |= {name: file_digest(path) for name, path in files.items()}
        record["dtypes"][dtype] = measured[dtype] = {}
        write_json(draft / RECORD, record)  # for the pipeline, which is what is checked
        sessions = {graph: open_session(draft / graph_file(graph, dtype)) for graph in (VISION, TEXT)}
        differences = vision_differences(vision, partial(_run, sessions[VISION], "pixel_values"))
        words = text_difference(model, processor, partial(_first, sessions[TEXT], "input_ids"))
        pipeline = load_exported(draft, dtype)
        check_tokens(processor, pipeline.words)
        measured[dtype] |= {
            "vision_difference": differences,
            "text_difference": words,
            "picture_book": {**book.of(pipeline), "scenes": scenes, "pytorch_mean_iou": book.mean_iou},
        }
        _refuse_differences(dtype, measured[dtype])
    if "float32" not in dtypes:
        for graph in (VISION, TEXT):
            exact[graph].unlink()
            record["files"].pop(graph_file(graph, "float32"))
        record["dtypes"].pop("float32")
    return record


def convert(exact: dict[str, Path], targets: dict[str, Path], dtype: str, pixels: Sequence[np.ndarray]) -> None:
    """Writes the towers in another arithmetic; `pixels` (1, 3, H, W) is what the vision tower may see."""
    for graph, target in targets.items():
        if dtype == "float16":
            to_float16(exact[graph], target)
        elif dtype == "int8-static" and graph == VISION:
            to_static_int8(exact[graph], target, "pixel_values", pixels)
        else:  # words are few, and their scales are found fast
            to_int8(exact[graph], target)


def _run(session: Any, name: str, values: np.ndarray) -> list[np.ndarray]:
    try:
        return session.run(None, {name: values})
    except Exception as error:  # onnxruntime's errors have no class of their own
        raise ValueError(
            f"the graph does not run at {tuple(values.shape)} ({first_line(error)}); nothing was written. This model "
            "can't be exported to ONNX."
        ) from error


def _first(session: Any, name: str, values: np.ndarray) -> np.ndarray:
    return _run(session, name, values)[0]


def _refuse_differences(dtype: str, measured: dict[str, Any]) -> None:
    differences = {**measured["vision_difference"], "text": measured["text_difference"]}
    worst = max(differences, key=lambda kind: differences[kind])
    equal = measured["picture_book"]["equal_labels"]
    limit = TOLERANCE if dtype == "float32" else 1.0  # all of them gone
    if differences[worst] > limit or (dtype == "float32" and equal < EQUAL_LABELS):
        raise ValueError(
            f"the {dtype} graphs differ from PyTorch: features by {differences[worst]:.1e} of their length ({worst}), "
            f"labels in {100 * (1 - equal):.2f} % of the pixels; allowed are {limit:.0e} and "
            f"{100 * (1 - EQUAL_LABELS):.1f} %. Nothing was written; "
            + ("export with format torch-export." if dtype == "float32" else "leave this dtype out.")
        )


def _write_programs(
    draft: Path,
    record: dict[str, Any],
    model: Any,
    vision: Any,
    processor: Any,
    dtypes: list[str],
    opset: int,
    fused: bool,
    scenes: int,
    calibration: Sequence[Any],
) -> dict[str, Any]:
    """Writes programs of torch.export; returns the rest of the record."""
    differences: dict[str, Any] = {}
    files = {}
    for name, program in ((VISION, vision_program(vision)), (TEXT, text_program(model))):
        path = draft / f"{name}.pt2"
        torch.export.save(program, path)
        files[path.name] = file_digest(path)
        run = torch.export.load(path).module(check_guards=False)

        def of(values: np.ndarray, run: Any = run) -> Any:
            with torch.no_grad():
                found = run(torch.from_numpy(values))
            return [part.numpy() for part in found] if isinstance(found, tuple) else found.numpy()

        if name == VISION:
            differences |= vision_differences(vision, of)
        else:
            differences["text"] = text_difference(model, processor, of)
    worst = max(differences, key=lambda kind: differences[kind])
    if differences[worst] > TOLERANCE:
        raise ValueError(
            f"the programs differ from the model: {differences[worst]:.1e} of the features' length ({worst}); allowed "
            f"is {TOLERANCE:.0e}. Nothing was written; report it with the model's name."
        )
    write_config(draft, model, vision, processor)
    side = text_side(model, processor)
    return {"text": side, "files": files, "dtypes": {"float32": {"difference": differences}}}


def text_side(model: Any, processor: Any) -> dict[str, Any]:
    """How the text tower reads; the fields of `spar_onnx.words.TextSide`."""
    tokenizer = processor.tokenizer
    own = tokenizer.model_max_length if processor.max_length is None else processor.max_length
    return {
        "max_tokens": min(own, model.config.text_config.max_position_embeddings),
        "pad_id": tokenizer.pad_token_id,
        "pad_token": tokenizer.pad_token,
        "fills": processor.text_padding == "max_length",
        "strip_punctuation": processor.strip_punctuation,
        "lowercase": processor.lowercase,
    }


def write_config(draft: Path, model: Any, vision: Any, processor: Any) -> None:
    """Configuration, processor and tokenizer, in the layout of @huggingface/transformers and Optimum."""
    vision_fields = {name: value for name, value in vision.config.to_dict().items() if name != "auto_map"}
    config = {**model.config.to_dict(), "vision_config": vision_fields}
    config.pop("auto_map", None)
    write_json(draft / "config.json", config)
    processor.tokenizer.save_pretrained(draft)
    image = processor.image_processor
    own = {name: value for name, value in image.to_dict().items() if name not in ("auto_map", "processor_class")}
    parts = ("image_processor", "tokenizer")
    words = {name: getattr(processor, name) for name in signature(type(processor)).parameters if name not in parts}
    write_json(
        draft / "processor_config.json",
        {"processor_class": type(processor).__name__, **words, "image_processor": own},
    )
    # For readers that know CLIP's image processor and not ours: what they can follow of it.
    known_size = image.size is not None and "max_pixels" not in image.size
    write_json(
        draft / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": bool(image.do_resize and known_size),
            **({"size": image.size} if known_size else {}),
            "resample": image.resample,
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": image.image_mean,
            "image_std": image.image_std,
            "do_convert_rgb": True,
        },
    )
