"""The model card: front matter and text from a model's configuration and the records of its training and evaluation.

Everything in a card was measured by this package or given by whoever publishes; what is not known is left out.
"""

from __future__ import annotations

import getpass
import json
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoint_files import naming

TEMPLATE = Path(__file__).parents[1] / "assets" / "model_card.md"
MADE_BY_US = "<!-- Written by `spar publish`. -->"
MADE_BY_OTHERS = "<!-- This model card has been generated automatically"  # of transformers' trainers
GIVEN = ("license", "license_name", "license_link", "language", "datasets", "base_model", "tags")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ABSOLUTE = re.compile(r"^(?:file:|~|/|\\|[A-Za-z]:[\\/])")


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        benchmark: Name of the benchmark.
        variant: Which one of that name, such as the scale of the picture book.
        protocol: Name of the protocol.
        num_images: Images that were counted.
        mean_iou: 0 to 1.
        start: The same of the checkpoint that training started from, where it was measured.
        command: What measured it.
        published: Mean IoU, 0 to 1, that was published of these weights under this protocol; see `spar_hf.published`.
    """

    benchmark: str
    variant: str
    protocol: str
    num_images: int
    mean_iou: float
    start: float | None = None
    command: str | None = None
    published: float | None = None

    @property
    def title(self) -> str:
        return f"{self.benchmark}, {self.variant}" if self.variant else self.benchmark

    def for_index(self) -> EvalResult:
        """As an entry of the `model-index`."""
        return EvalResult(
            task_type="image-segmentation",
            task_name="open-vocabulary semantic segmentation",
            dataset_type=self.benchmark,
            dataset_name=self.title,
            # Results are told apart by data set and configuration, so that names the variant and the protocol.
            dataset_config=", ".join(filter(None, [self.variant, f"protocol {self.protocol}"])),
            dataset_args={"num_images": self.num_images},
            metric_type="mean_iou",
            metric_name="mean IoU, %",
            metric_value=round(100 * self.mean_iou, 2),
        )


@dataclass(frozen=True)
class Records:
    """What was found with a model.

    Attributes:
        run: run.json of training/distill.py, if it is the record of this very model.
        results: Measurements, those of training first.
        given: Front matter of a README.md in the folder.
        notes: Its text.
    """

    run: dict[str, Any] | None
    results: tuple[Result, ...]
    given: dict[str, Any]
    notes: str


def read_records(folder: Path, teacher: dict[str, Any] | None) -> Records:
    """Reads what lies in `folder` and, if that is OUTPUT/model of a distillation, in OUTPUT.

    Args:
        folder: The model's folder.
        teacher: The provenance in the model's configuration; a run.json of another run is not used.

    Raises:
        ValueError: README.md has front matter that cannot be read, or a record of results lacks some of it.
    """
    run, results = None, []
    for place in (folder, folder.parent) if teacher else ():
        record = _read_json(place / "run.json")
        if record and _is_record_of(record, teacher):
            run = record
            with naming(place / "run.json"):
                shlex.split(run.get("command") or "")
            with naming(place / "metrics.json"):
                results += _of_training(_read_json(place / "metrics.json"))
            break
    for path in sorted(folder.glob("*.json")):
        with naming(path):
            results += _of_evaluation(_read_json(path))
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if not text or MADE_BY_US in text or MADE_BY_OTHERS in text:
        return Records(run, tuple(results), {}, "")
    try:
        card = ModelCard(text)
    except Exception as error:  # whatever the YAML parser and the card's own checks raise
        raise ValueError(f"{readme} has front matter that cannot be read ({error}); correct or remove it.") from error
    given = {key: value for key, value in card.data.to_dict().items() if key in GIVEN}
    return Records(run, tuple(results), given, re.sub(r"^# .*\n+", "", card.text.strip()))


def model_card(repo_id: str, model: Any, records: Records, whole: bool, license: str | None = None) -> ModelCard:
    """The card of a model.

    Args:
        repo_id: Where the model will be.
        model: A `SparModel`, or another model of this package.
        records: From `read_records`.
        whole: Whether there is a text tower and a processor, so that words can be given.
        license: Identifier of the licence; None takes that of the README, if there is one.
    """
    vision = getattr(model.config, "vision_config", model.config)
    run = records.run or {}
    given = dict(records.given)
    if license is not None:
        given["license"] = license
    tags = given.pop("tags", [])
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        base_model=given.pop("base_model", None) or _base_model(run, vision.source),
        datasets=given.pop("datasets", None) or _data_set(vision.teacher),
        tags=["open-vocabulary-segmentation", "spar", *([tags] if isinstance(tags, str) else tags)],
        model_name=repo_id.partition("/")[2],
        eval_results=[result.for_index() for result in records.results] or None,
        **given,
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=repo_id.partition("/")[2],
        repo_id=repo_id,
        whole=whole,
        vision=vision,
        teacher=vision.teacher,
        num_weights=sum(weight.numel() for weight in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        training=_training(vision.teacher, run),
        command=without_paths(run["command"]) if run.get("command") else None,
        results=[replace(row, command=without_paths(row.command) if row.command else None) for row in records.results],
        notes=records.notes,
    )
    return card


def without_paths(text: str) -> str:
    """A command line whose absolute paths are cut to their last part, for they name this machine and its user."""
    words = []
    for word in shlex.split(text):
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(flag + equals + without_path(value))
    return shlex.join(words)


def without_path(value: str) -> str:
    """A value as it is, or the last part of it where it is a path that names this machine or its user."""
    if ABSOLUTE.match(value) or getpass.getuser() in PurePosixPath(value).parts[:-1]:
        return (PureWindowsPath(value) if "\\" in value else PurePosixPath(value)).name
    return value


def _training(teacher: dict[str, Any] | None, run: dict[str, Any]) -> list[tuple[str, Any]]:
    """Lines of the section on training: those facts that the records hold."""
    teacher = teacher or {}
    told = {"model": "{}", "method": "method {}", "window_px": "window {} px", "stride_px": "stride {} px"}
    made = [words.format(teacher[name]) for name, words in told.items() if teacher.get(name)]
    data = _facts(teacher.get("data"))
    described = ", ".join(str(data[key]) for key in ("kind", "name", "split") if data.get(key) is not None)
    versions = _facts(run.get("versions"))
    lines = {
        "teacher": ", ".join(made) or None,
        "the teacher's attention reaches": teacher.get("attention_reach"),
        "the teacher sees pictures at a short side, px (0: their own)": teacher.get("short_side_px"),
        "teacher's revision": teacher.get("revision"),
        "data, without labels": f"{described}, {data['images']} images" if data.get("images") else described or None,
        "trained weights": teacher.get("train"),
        "loss": teacher.get("loss"),
        "learning rate": teacher.get("learning_rate"),
        "steps": teacher.get("steps"),
        "seed": teacher.get("seed"),
        "device": run.get("device"),
        "processes": run.get("processes"),
        "mixed precision": run.get("mixed_precision"),
        "revision of the code": teacher.get("git_revision"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or None,
    }
    return [(name, value) for name, value in lines.items() if value is not None]


def _base_model(run: dict[str, Any], source: str | None) -> str | None:
    """The Hub id of the checkpoint that training started from, if it was one."""
    teacher = _facts(_facts(run.get("made_from")).get("teacher")).get("model")  # a folder is recorded by its bare name
    own_teacher = "--teacher-model" not in shlex.split(run.get("command") or "")
    candidates = [teacher if own_teacher else None, source]
    return next((name for name in candidates if name and HUB_ID.fullmatch(name)), None)


def _data_set(teacher: dict[str, Any] | None) -> str | None:
    """The Hub id of the data that training read, if it has one."""
    data = _facts((teacher or {}).get("data"))
    name = data.get("name") if data.get("kind") == "dataset" else None
    return name if name and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _is_record_of(run: dict[str, Any], teacher: dict[str, Any] | None) -> bool:
    """Whether run.json and the configuration speak of the same training."""
    made_from = _facts(run.get("made_from"))
    same = {name: made_from.get(name) for name in ("steps", "seed", "learning_rate", "data")}
    return teacher is not None and all(teacher.get(name) == value for name, value in same.items())


def _of_training(metrics: dict[str, Any] | None) -> list[Result]:
    """metrics.json of training/distill.py."""
    if not metrics or "mean_iou" not in metrics:
        return []
    before, after = (metrics["mean_iou"].get(name, {}) for name in ("start", "student"))
    variants = {scale: f"{scale} the native side" for scale in after}
    return [
        Result("picturebook", variants[scale], "picturebook", int(metrics["scenes"]), float(value), before.get(scale))
        for scale, value in after.items()
    ]


def _of_evaluation(result: dict[str, Any] | None) -> list[Result]:
    """What `spar evaluate --json` writes, and `spar reproduce` with the published number beside it."""
    if not result or not {"benchmark", "protocol", "num_images", "mean_iou", "command"} <= set(result):
        return []
    if result["mean_iou"] is None:  # nothing was there to score
        return []
    shlex.split(result["command"])  # as the card will, where nobody could say which file is wrong
    return [
        Result(
            str(result["benchmark"]),
            str(result.get("variant") or ""),
            str(result["protocol"]["name"]),
            int(result["num_images"]),
            float(result["mean_iou"]),
            command=result["command"],
            published=result.get("published"),
        )
    ]


def _facts(record: Any) -> dict[str, Any]:
    """A part of a record that may be missing, or that another program wrote."""
    return record if isinstance(record, dict) else {}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
