"""What `spar export` wrote: its record, its graphs as sessions, and one line for whatever is wrong with them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = "export.json"
LAYOUT = 2  # of the folder; another number is another spar-hf's
VISION, TEXT, LABEL_MAP = "vision_model", "text_model", "label_map"
# Endings of the files by arithmetic, as @huggingface/transformers and Optimum have them.
SUFFIXES = {"float32": "", "float16": "_fp16", "int8": "_int8", "int8-static": "_int8_static"}
AGAIN = "export the model again with 'spar export'"


def graph_file(graph: str, dtype: str) -> str:
    """The file of a graph within the folder. The label map is made in fp32 always."""
    return f"onnx/{graph}{'' if graph == LABEL_MAP else SUFFIXES[dtype]}.onnx"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, its first 16 hexadecimal digits."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            sha.update(chunk)
    return sha.hexdigest()[:16]


def is_exported(folder: str | Path) -> bool:
    """Whether a folder is one that `spar export` wrote."""
    return (Path(folder) / RECORD).is_file()


@dataclass(frozen=True)
class Exported:
    """An exported folder.

    Attributes:
        folder: where it is.
        record: what export.json says: patch and size rule, text side, files with their digests, what was measured.
    """

    folder: Path
    record: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> Exported:
        """The folder, once its record is read and its graphs are there.

        Raises:
            ValueError: it is no exported folder, one of another version, or lacks a file.
        """
        folder = Path(folder)
        if not is_exported(folder):
            raise ValueError(
                f"{folder} holds no {RECORD}, so it is no exported model; make one with 'spar export MODEL --format "
                f"onnx --output FOLDER'."
            )
        record = read_json(folder / RECORD)
        if record.get("layout") != LAYOUT:
            raise ValueError(
                f"{folder} was exported by spar-hf {record.get('spar_hf')!s:.40} in layout "
                f"{record.get('layout')!s:.40}, and this version reads layout {LAYOUT}; {AGAIN}, or install that "
                "version."
            )
        if record.get("format") != "onnx":
            raise ValueError(
                f"{folder} holds programs of {record.get('format')!s:.40}, which PyTorch runs; give a folder of "
                "'spar export --format onnx'."
            )
        missing = {"patch_px", "size_rule", "text", "files", "dtypes"} - record.keys()
        if missing:
            raise ValueError(f"{folder / RECORD} lacks {', '.join(sorted(missing))}; {AGAIN}.")
        return cls(folder, record)

    @property
    def dtypes(self) -> list[str]:
        """The arithmetics that it holds graphs of, in the order of `SUFFIXES`."""
        return [dtype for dtype in SUFFIXES if dtype in self.record["dtypes"]]

    def session(self, graph: str, dtype: str, threads: int | None = None) -> Any:
        """A graph, ready to run.

        Raises:
            ValueError: there is none of this arithmetic, or its file is missing or not what was exported.
        """
        if dtype not in self.dtypes:
            raise ValueError(
                f"{self.folder} holds graphs of {', '.join(self.dtypes)} and none of {dtype}; choose one of them, or "
                f"export with --dtype {dtype}."
            )
        name = graph_file(graph, dtype)
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; {AGAIN}.")
        if file_digest(path) != self.record["files"].get(name):
            raise ValueError(f"{path} is corrupt or of another export: its check sum differs; {AGAIN}.")
        return open_session(path, threads)


def open_session(path: Path, threads: int | None = None) -> Any:
    """A session of a graph file on the CPU; `threads` None is onnxruntime's own choice, one a core.

    Raises:
        ValueError: onnxruntime is not installed, or can't read the file.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class of their own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be run by onnxruntime {ort.__version__} ({reason}); {AGAIN}.") from error


def onnxruntime() -> Any:
    """The package, imported.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import onnxruntime as package
    except ModuleNotFoundError:
        raise ValueError('onnxruntime is needed and not installed; run: pip install "spar-hf[onnx]"') from None
    return package


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        ValueError: it holds none.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); {AGAIN}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; {AGAIN}.")
    return content
