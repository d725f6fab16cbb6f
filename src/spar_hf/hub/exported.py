"""What is published of an exported folder: its graphs as they were checked, configuration, tokenizer and a card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from spar_onnx.folder import RECORD, Exported, file_digest

from ..downloads import CONFIG, PROCESSOR_FILES, TOKENIZER_FILES

CARD = """# {name}

Open-vocabulary segmentation in one forward pass, at any height and width, as ONNX graphs (opset {opset}) for
onnxruntime and onnxruntime-web. Method: `{method}`.

```python
import spar_onnx  # pip install "spar-hf[onnx]"; imports no PyTorch

segment = spar_onnx.load("FOLDER")  # this repository, downloaded
segment("street.jpg", "road; car, automobile; sky")["segments"]
```

Against PyTorch, when it was exported (largest relative difference of patch features at the native size, larger, oblong
and off the patch grid; scenes of the picture book):

| arithmetic | difference | equal labels | mIoU | in PyTorch |
|---|---|---|---|---|
{rows}
"""


def prepare_exported(folder: Path, draft: Path, repo_id: str, license: str | None) -> None:
    """Writes into `draft` exactly the files that are published.

    Raises:
        ValueError: a file is missing or not what was exported.
    """
    exported = Exported.read(folder)
    for name, digest in exported.record["files"].items():
        source = folder / name
        if not source.is_file() or file_digest(source) != digest:
            raise ValueError(f"{source} is missing or not what was exported; export the model again.")
    for name in (RECORD, CONFIG, *PROCESSOR_FILES, *TOKENIZER_FILES, *exported.record["files"]):
        if (folder / name).is_file():
            (draft / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, draft / name)
    data = ModelCardData(
        license=license,
        library_name="transformers.js",
        pipeline_tag="image-segmentation",
        tags=["onnx", "spar", "open-vocabulary-segmentation"],
    )
    text = CARD.format(
        name=repo_id.partition("/")[2],
        opset=exported.record.get("opset"),
        method=exported.record.get("method"),
        rows="\n".join(_row(dtype, measured) for dtype, measured in exported.record["dtypes"].items()),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(draft / "README.md")


def _row(dtype: str, measured: dict[str, Any]) -> str:
    book = measured["picture_book"]
    cells = (
        dtype,
        f"{max(measured['vision_difference'].values()):.1e}",
        f"{100 * book['equal_labels']:.2f} %",
        f"{100 * book['mean_iou']:.1f}",
        f"{100 * book['pytorch_mean_iou']:.1f}",
    )
    return f"| {' | '.join(cells)} |"
