"""Compares the methods as teachers: mean IoU of each teacher and of the students that it taught, on the picture book.

    python benchmarks/teachers.py --markdown docs/methods.md                    # every method, three seeds, then a mix
    python benchmarks/teachers.py --teachers maskclip naclip --scenes 16 --epochs 1 --limit 2 --output /tmp/t.json
    python benchmarks/teachers.py --report-only --markdown docs/methods.md      # table and picture from the JSON

For each teacher: its features (training/cache_teacher.py) once, students on them (training/distill.py), and mean IoU
of the teacher in its own sliding window, of its single pass and of each student's single pass. The student's last
block is the checkpoint's (`own`), and for one seed the teacher's (`teacher`) where that is a row of the table. Last,
--mixed teachers become one, the mean of their normalised features: the best of the validation split, while all that
is reported is of the test split. Every step goes on where it was when the command is given again.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from quality import Row, load

import spar_hf
from spar_cli.methods import renew
from spar_hf.checkpoints import resolve
from spar_hf.composition import MeanOf
from spar_hf.data import load_benchmark
from spar_hf.evaluation import evaluate, markdown_table, write_atomically
from spar_hf.methods_spar import METHODS
from spar_hf.reach_spar import REACHES
from spar_hf.visualize import FRAME, INK, OKABE_ITO, PAPER

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "teachers.json"
FONT = Path(spar_hf.__file__).parent / "assets" / "fonts" / "DejaVuSans.ttf"
CHECKPOINT, PAPERS = "tiny", "maskclip"  # who learns, and the paper's teacher
NAMES = [name for name, row in METHODS.items() if row.kind == "feature" and not row.needs]
# Up to four times the native side, the largest scale that is measured by default.
DATA = (
    f"--student {CHECKPOINT} --long-side-px 512 --short-side-px 512 --scale-range 0.25 1 --scale-law log-uniform "
    "--min-side-px 128 --teacher-dtype float32 --workers 0"
)
LEARNING = (
    "--train last:2 --learning-rate 1e-3 --schedule cosine --warmup-steps 30 --clip-norm 1 --accumulate 4 "
    "--save-every 100 --tracker none --resume"
)
TRUNK = ("--trunk-blocks", "2")
QUIET_ON_ONE_THREAD = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a checkpoint as some methods run it (None: its own; several: the mean of their features)."""

    checkpoint: str
    methods: tuple[str | None, ...] = (None,)
    window: str | None = None
    reach: str | None = None


def measure(subject: Subject, split: str, scale: float, limit: int, state_path: Path) -> dict[str, Any]:
    """Evaluates a subject at one scale; runs in a worker process."""
    model, processor = load(subject.checkpoint, "cpu")
    rows = [
        Row("", subject.checkpoint, method=method, window=subject.window, reach=subject.reach)
        for method in subject.methods
    ]
    encoders = [row.encoder(model, batch=32) for row in rows]
    encoder = encoders[0] if len(encoders) == 1 else MeanOf(encoders, normalise=True)
    data = load_benchmark("picturebook", scale=scale, split=split, native_px=encoder.config.image_size)
    result = evaluate(encoder, model, processor, data, limit=limit, progress=False, state_path=state_path)
    kept = ("num_images", "mean_iou", "pixel_accuracy", "boundary_iou", "seconds_per_image")
    return {"split": split, "scale": scale, **{name: getattr(result, name) for name in kept}}


class Benchmark:
    """The run: its steps, and the results so far.

    Args:
        args: the flags.
        workers: processes for the evaluations; the commands are processes of their own.
    """

    def __init__(self, args: argparse.Namespace, workers: Executor) -> None:
        self.args, self.workers = args, workers
        self.data = [*shlex.split(DATA), "--picture-book", str(args.scenes), "--student-reach", args.reach]
        self.running: set[subprocess.Popen] = set()
        self.stopping = False
        self.lock = threading.Lock()
        self.document: dict[str, Any] = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": {"cpu": platform.processor() or platform.machine(), "threads": 1},
            "versions": {module.__name__: module.__version__ for module in (spar_hf, torch, transformers)},
            "checkpoint": CHECKPOINT,
            "own_block": spar_hf.SparVisionConfig.from_pretrained(resolve(CHECKPOINT)).method,
            **{name: getattr(args, name) for name in ("scenes", "epochs", "seeds", "scales", "reach")},
            "teachers": {},
            "results": [],
        }

    def teach_all(self, threads: Executor, teachers: Sequence[Sequence[str]]) -> bool:
        """Several teachers, as many at once as there are threads; whether all went well."""
        tasks = [threads.submit(self.teach, methods) for methods in teachers]
        done = True
        for task in as_completed(tasks):
            if error := task.exception():
                say(f"error: {error}")
                done = False
        return done

    def teach(self, methods: Sequence[str]) -> None:
        """All steps of one teacher."""
        name, folder = "+".join(methods), self.args.work / "+".join(methods)
        with self.lock:
            self.document["teachers"][name] = list(methods)
        self.evaluate(name, "sliding", Subject(CHECKPOINT, tuple(methods), window="own"))
        if self.args.mixed:
            self.evaluate(name, "sliding", Subject(CHECKPOINT, tuple(methods), window="own"), split="validation")
        self.evaluate(name, "single pass", Subject(CHECKPOINT, tuple(methods)))

        data = [*self.data, "--teacher-method", *methods, "--cache", str(folder / "features")]
        runs = {student: folder / f"{student[0]}-seed{student[1]}" for student in self.students(methods)}
        commands = {}
        for (block, seed), output in runs.items():
            which = [] if block == "own" else ["--student-method", *methods]
            which += TRUNK if block == "own" or self.shares_trunk(methods[0]) else []
            learning = (*shlex.split(LEARNING), "--epochs", str(self.args.epochs), "--seed", str(seed))
            commands[output] = ["training/distill.py", *data, *which, *learning, "--output", str(output)]
        if not all(finished(output, command) for output, command in commands.items()):
            features = ["training/cache_teacher.py", *data, *TRUNK]
            self.run(f"{name}: features of {self.args.scenes} scenes", features, folder / "features.log")
        for (block, seed), output in runs.items():
            if not finished(output, commands[output]):
                for state in (folder / "evaluation").glob(f"{output.name}-*"):  # of another student of that name
                    state.unlink()
                self.run(f"{name}: student {output.name}", commands[output], folder / f"{output.name}.log")
            self.evaluate(name, block, Subject(str(output / "model")), seed)

    def shares_trunk(self, method: str) -> bool:
        """Whether a student with this row for its last block can learn on the stored trunk."""
        row, own = METHODS[method], METHODS[self.document["own_block"]]
        if row.recipe is None or row.position_interpolation != own.position_interpolation:
            return False
        return row.recipe.blocks <= 2 and all(term.block == 12 for term in row.recipe.terms)

    def students(self, methods: Sequence[str]) -> list[tuple[str, int]]:
        """(last block, seed) of a teacher's students: the teacher's block only where it is a row, and another one."""
        kinds, seeds = self.args.students, self.args.seeds
        own = [("own", seed) for seed in seeds if "own" in kinds]
        row = len(methods) == 1 and METHODS[methods[0]].recipe is not None
        other = row and methods[0] != self.document["own_block"] and "teacher" in kinds
        return own + [("teacher", seeds[0])] * other

    def best(self, count: int) -> list[str]:
        """The methods that are the best teachers by the validation split at the largest scale."""
        scale = max(self.args.scales)
        known = {name: mean(self.document, name, "sliding", scale, "validation") for name in self.args.teachers}
        return sorted(known, key=lambda name: -known[name])[:count]

    def evaluate(self, name: str, what: str, subject: Subject, seed: int | None = None, split: str = "test") -> None:
        """Measures a subject at each scale, at the largest only for the split that chooses."""
        for scale in self.args.scales if split == "test" else [max(self.args.scales)]:
            if self.stopping:
                raise KeyboardInterrupt
            parts = [what, *([] if seed is None else [f"seed{seed}"]), split, f"{scale:g}x", self.args.limit]
            state_path = self.args.work / name / "evaluation" / f"{'-'.join(map(str, parts))}.safetensors"
            score = self.workers.submit(measure, subject, split, scale, self.args.limit, state_path).result()
            say(f"{name}: {', '.join(map(str, parts[:-1]))}: {100 * score['mean_iou']:.1f}")
            with self.lock:
                self.document["results"].append({"teacher": name, "what": what, "seed": seed, **score})
                content = json.dumps(self.document, indent=1) + "\n"
                write_atomically(self.args.output, content.encode())

    def run(self, title: str, command: list[str], log: Path) -> None:
        """Runs a script of the repository; what it prints is in a file.

        Raises:
            RuntimeError: it failed; has its last line.
        """
        started = time.perf_counter()
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            with self.lock:  # so that `stop` sees every process or none is started after it
                if self.stopping:
                    raise KeyboardInterrupt
                process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file)
                self.running.add(process)
            code = process.wait()
        self.running.discard(process)
        if self.stopping:
            raise KeyboardInterrupt
        if code:
            raise RuntimeError(f"{title} failed: {log.read_text().splitlines()[-1]} ({log})")
        say(f"{title}: {time.perf_counter() - started:.0f} s")

    def stop(self) -> None:
        """Ends what runs; a training command saves a checkpoint first."""
        with self.lock:
            self.stopping = True
            for process in self.running:
                process.terminate()
            for worker in multiprocessing.active_children():
                worker.terminate()


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def finished(output: Path, command: list[str]) -> bool:
    """Whether this very command made OUTPUT/model: distill.py notes it first and writes the model last."""
    record = output / "run.json"
    if not (record.exists() and (output / "model").is_dir()):
        return False
    return json.loads(record.read_text())["command"] == shlex.join(["python", *command])


def begin_worker() -> None:
    """Makes a worker end when `Benchmark.stop` says so, not before by Ctrl-C, and with a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".work/teachers", help="folder of what is made on the way")
    parser.add_argument(
        "--teachers", nargs="+", default=sorted(NAMES, key=lambda name: name != PAPERS), metavar="NAME"
    )
    parser.add_argument("--mixed", type=int, default=2, help="so many best ones make one more teacher; 0: none")
    parser.add_argument("--students", nargs="+", choices=("own", "teacher"), default=["own", "teacher"])
    parser.add_argument("--scenes", type=int, default=400, help="training scenes")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first is the `teacher` student's")
    parser.add_argument("--reach", choices=REACHES, default="image", help="of the student's attention")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 4], help="multiples of the native side")
    parser.add_argument("--limit", type=int, default=32, help="scenes of each evaluation, spread over the split")
    parser.add_argument("--jobs", type=int, default=2, help="teachers at once, one thread each")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table there, and teachers.png beside")
    parser.add_argument("--report-only", action="store_true", help="measure nothing; report on --output")
    args = parser.parse_args(argv)
    args.work = args.work.resolve()
    if unknown := [name for name in args.teachers if name not in NAMES]:
        parser.error(f"--teachers: {', '.join(unknown)}; choose of {', '.join(NAMES)}")
    code = 0 if args.report_only else run(args)
    if code:
        return code
    document = json.loads(args.output.read_text())
    print("\n" + block(document))
    if args.markdown is not None:
        write_atomically(args.markdown.with_name("teachers.png"), png(plot(document)))
        renew(args.markdown, "teachers", block(document))
    return 0


def run(args: argparse.Namespace) -> int:
    """All teachers; the exit status."""
    os.environ.update(QUIET_ON_ONE_THREAD)  # the commands' and the workers'
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Fresh processes: a forked one would have this one's threads of torch.
    workers = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), begin_worker)
    threads = ThreadPoolExecutor(args.jobs)
    benchmark = Benchmark(args, workers)
    try:
        benchmark.evaluate("start", "single pass", Subject(CHECKPOINT, reach=args.reach))
        done = benchmark.teach_all(threads, [[name] for name in args.teachers])
        if done and 1 < args.mixed <= len(args.teachers):
            done = benchmark.teach_all(threads, [benchmark.best(args.mixed)])
        return 0 if done else 1
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        return 130
    finally:
        benchmark.stop()
        threads.shutdown(cancel_futures=True)
        workers.shutdown()


# --- report -------------------------------------------------------------------------------------------------------

Document = dict[str, Any]
NAN = float("nan")


def scores(document: Document, teacher: str, what: str, scale: float, split: str = "test") -> dict[int | None, float]:
    """Seed (None of what has none) -> mean IoU in per cent, of what was measured."""
    wanted = {"teacher": teacher, "what": what, "scale": scale, "split": split}
    found = (entry for entry in document["results"] if wanted.items() <= entry.items())
    return {entry["seed"]: 100 * entry["mean_iou"] for entry in found}


def mean(document: Document, teacher: str, what: str, scale: float, split: str = "test") -> float:
    """Mean of the `scores`, nan where there are none."""
    found = scores(document, teacher, what, scale, split).values()
    return statistics.fmean(found) if found else NAN


def spread(document: Document, teacher: str, scale: float) -> float:
    """Standard deviation over the seeds of the students with their own last block; nan of fewer than two."""
    found = scores(document, teacher, "own", scale).values()
    return statistics.stdev(found) if len(found) > 1 else NAN


def gain_of_block(document: Document, teacher: str, scale: float) -> float:
    """What the student gains by the teacher's last block in place of its own, both of one seed; nan where unknown."""
    own, other = (scores(document, teacher, block, scale) for block in ("own", "teacher"))
    gains = [other[seed] - own[seed] for seed in other.keys() & own.keys()]
    return statistics.fmean(gains) if gains else NAN


def by_teacher(document: Document) -> list[str]:
    """The teachers, the best sliding window at the largest scale first."""
    known = {name: mean(document, name, "sliding", max(document["scales"])) for name in document["teachers"]}
    return sorted(known, key=lambda name: (math.isnan(known[name]), -known[name]))


def number(value: float, spread: float = NAN) -> str:
    return "" if math.isnan(value) else f"{value:.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")


def signed(value: float) -> str:
    return "" if math.isnan(value) else f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")  # no -0.0


def title(document: Document, teacher: str) -> str:
    return " + ".join(f"`{method}`" for method in document["teachers"][teacher])


def table(document: Document) -> list[str]:
    """The table, the best teacher first."""

    def student(name: str, scale: float) -> str:
        return number(mean(document, name, "own", scale), spread(document, name, scale))

    def difference(name: str, scale: float) -> str:
        return signed(mean(document, name, "own", scale) - mean(document, name, "sliding", scale))

    def other_block(name: str, scale: float) -> str:
        if document["teachers"][name] == [document["own_block"]]:
            return "the same"
        gain = signed(gain_of_block(document, name, scale))
        return number(mean(document, name, "teacher", scale)) + (f" ({gain})" if gain else "")

    columns: dict[str, Callable[[str, float], str]] = {
        "sliding": lambda name, scale: number(mean(document, name, "sliding", scale)),
        "single pass": lambda name, scale: number(mean(document, name, "single pass", scale)),
        "student": student,
        "student − teacher": difference,
        "student with the teacher's block": other_block,
    }
    scales = document["scales"]
    heads = ["teacher", *(f"{head}, {scale:g}x" for head in columns for scale in scales)]
    rows = [
        [title(document, name), *(cell(name, scale) for cell in columns.values() for scale in scales)]
        for name in by_teacher(document)
    ]
    return markdown_table(heads, rows)


def findings(document: Document, scale: float) -> list[str]:
    """What the numbers say at a scale, as a list in Markdown."""
    taught = {name: mean(document, name, "own", scale) for name in by_teacher(document)}
    taught = {name: value for name, value in taught.items() if not math.isnan(value)}
    if not taught:
        return []
    windows = {name: mean(document, name, "sliding", scale) for name in taught}
    start = mean(document, "start", "single pass", scale)
    best, teacher = (max(values, key=values.__getitem__) for values in (taught, windows))

    def named(names: Iterable[str], values: dict[str, float]) -> str:
        return ", ".join(f"{title(document, name)} ({signed(values[name])})" for name in names) or "none"

    lines = [
        f"- The best teacher is {title(document, teacher)} ({number(windows[teacher])}), the best student that of "
        f"{title(document, best)} ({number(taught[best], spread(document, best, scale))}).",
        f"- Better than before distillation ({number(start)}): {sum(value > start for value in taught.values())} of "
        f"{len(taught)} students.",
    ]
    if PAPERS in taught:
        over = {name: value - taught[PAPERS] for name, value in taught.items()}
        ahead = sorted((name for name in over if over[name] > 0), key=lambda name: -over[name])
        lines.append(
            f"- Better than the student of {title(document, PAPERS)}, the paper's teacher: {named(ahead, over)}."
        )
    above = {name: value - windows[name] for name, value in taught.items() if value > windows[name]}
    lines.append(f"- Students above their teacher's sliding window: {named(above, above)}.")
    if len(taught) > 2:
        correlation = statistics.correlation(list(windows.values()), list(taught.values()))
        shown = f"{correlation:.2f}".replace("-", "−")
        lines.append(f"- Correlation of teacher and student over the {len(taught)} teachers: {shown}.")
    for name, methods in document["teachers"].items():
        if len(methods) > 1 and {name, *methods} <= taught.keys():
            gains = [signed(values[name] - max(values[part] for part in methods)) for values in (windows, taught)]
            lines.append(
                f"- {title(document, name)} against the best of its parts: teacher {gains[0]}, student {gains[1]}."
            )
    return lines + _advice(document, scale)


def _advice(document: Document, scale: float) -> list[str]:
    """Which last block the student should have, by teacher; a difference of two runs needs two standard deviations."""
    gains = {name: gain_of_block(document, name, scale) for name in by_teacher(document)}
    gains = {name: gain for name, gain in gains.items() if not math.isnan(gain)}
    variances = [value**2 for name in document["teachers"] if not math.isnan(value := spread(document, name, scale))]
    if not gains:
        return []
    least = 2 * math.sqrt(2 * statistics.fmean(variances)) if variances else 0.0
    groups = {
        "The student should take the teacher's last block for": [name for name, gain in gains.items() if gain > least],
        f"keep its own (`{document['own_block']}`) for": [name for name, gain in gains.items() if gain < -least],
    }
    if variances:
        groups[f"and it makes no difference beyond that of two seeds (±{least:.1f}) for"] = [
            name for name, gain in gains.items() if abs(gain) <= least
        ]
    parts = [
        f"{words} {', '.join(f'{title(document, name)} ({signed(gains[name])})' for name in names) or 'none'}"
        for words, names in groups.items()
    ]
    return [f"- {'; '.join(parts)}."]


def block(document: Document) -> str:
    """What stands in the documentation between the marks."""
    scales, seeds = document["scales"], document["seeds"]
    start = [f"{number(mean(document, 'start', 'single pass', scale))} at {scale:g}x" for scale in scales]
    count = next(entry["num_images"] for entry in document["results"] if entry["split"] == "test")
    reach = {
        "window": "Their attention reaches as far as the native window; the teachers', as published, everywhere.",
        "image": "Attention reaches over the whole image.",
    }[document["reach"]]
    return "\n".join(
        [
            f"Made by `{document['command']}`. Mean IoU in % on the picture book's test split, {count} scenes, at "
            f"{' and '.join(f'{scale:g}x' for scale in scales)} the native side. Teachers: `{document['checkpoint']}` "
            "as the method runs it, in its own sliding window and in a single pass. Students: a single pass of "
            f"`{document['checkpoint']}` with its last two blocks trained on {document['scenes']} scenes for "
            f"{document['epochs']} epochs, mean ± standard deviation of seeds {', '.join(map(str, seeds))}. {reach} "
            f"Before distillation the same student has {', '.join(start)}. Last columns: seed {seeds[0]} with the "
            "teacher's last block, and what it gains over the same seed with its own; empty where the method is more "
            "than a last block. A sum of names is the mean of their normalised features, chosen by the validation "
            "split.",
            "",
            *table(document),
            "",
            *(line for scale in scales for line in (f"At {scale:g}x:", "", *findings(document, scale), "")),
            f"![Student against teacher, mean IoU at {max(scales):g}x](teachers.png)",
        ]
    )


# --- picture ------------------------------------------------------------------------------------------------------

SIZE_PX, SUPERSAMPLED = (960, 720), 2
MARGINS_PX = (76, 76, 28, 64)  # left, top, right, bottom
GRID = (228, 228, 228)
TAUGHT, BLOCK, BEFORE = OKABE_ITO[6], OKABE_ITO[5], OKABE_ITO[2]

Box = tuple[float, float, float, float]


def plot(document: Document) -> Image.Image:
    """Student against teacher at the largest scale: dots with bars are means over the seeds, rings one seed with the
    teacher's last block."""
    scale = max(document["scales"])
    points = [
        (name, mean(document, name, "sliding", scale), mean(document, name, "own", scale))
        for name in by_teacher(document)
    ]
    points = [point for point in points if not math.isnan(point[1] + point[2])]
    start = mean(document, "start", "single pass", scale)
    rings = {name: mean(document, name, "teacher", scale) for name, *_ in points}
    bars = {name: spread(document, name, scale) for name, *_ in points}
    heights = [
        start,
        *rings.values(),
        *(y + d * bars[n] for n, _, y in points for d in (-1, 1)),
        *(p[2] for p in points),
    ]
    across, up = _range(point[1] for point in points), _range(heights)
    left, top, right, bottom = MARGINS_PX
    right, bottom = SIZE_PX[0] - right, SIZE_PX[1] - bottom

    def x(value: float) -> float:
        return left + (value - across[0]) / (across[1] - across[0]) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - up[0]) / (up[1] - up[0]) * (bottom - top)

    pen = Pen()
    for value in _ticks(across):
        pen.line([(x(value), top), (x(value), bottom)], GRID)
        pen.text((x(value), bottom + 8), f"{value:g}", "ma")
    for value in _ticks(up):
        pen.line([(left, y(value)), (right, y(value))], GRID)
        pen.text((left - 8, y(value)), f"{value:g}", "rm")
    pen.line([(left, top), (left, bottom), (right, bottom)], FRAME)
    pen.text(((left + right) / 2, SIZE_PX[1] - 14), f"teacher, sliding window: mean IoU at {scale:g}x, %", "ms", 16)
    pen.text((left, 14), f"student, one pass: mean IoU at {scale:g}x, %", "la", 16)
    low, high = max(across[0], up[0]), min(across[1], up[1])
    if low < high:
        pen.line([(x(low), y(low)), (x(high), y(high))], FRAME, dashed=True)
        pen.text((x(low) + 14, y(low) - 6), "student = teacher", "ls", ink=FRAME)
    if not math.isnan(start):
        pen.line([(left, y(start)), (right, y(start))], BEFORE, dashed=True)
        pen.line([(left + 482, 54), (left + 512, 54)], BEFORE, dashed=True)
        pen.text((left + 520, 54), "student before distillation", "lm")

    pen.dot((left + 5, 54), TAUGHT)
    pen.text((left + 16, 54), "own last block, all seeds", "lm")
    pen.ring((left + 225, 54), BLOCK)
    pen.text((left + 236, 54), "teacher's last block, one seed", "lm")
    taken: list[Box] = []
    for name, teacher, student in points:
        place = (x(teacher), y(student))
        if not math.isnan(rings[name]):
            ring = (place[0], y(rings[name]))
            pen.line([place, ring], BLOCK)
            pen.ring(ring, BLOCK)
            taken += [_around(ring, 6), _upright(place, ring)]
        if not math.isnan(bars[name]):
            bar = [(place[0], y(student + sign * bars[name])) for sign in (1, -1)]
            pen.line(bar, TAUGHT, 2)
            taken.append(_upright(*bar))
        taken.append(_around(place, 6))
    for name, teacher, student in points:
        text = " + ".join(document["teachers"][name])
        place = (x(teacher), y(student))
        spot = _free_spot(place, pen.width_of(text), taken, (left, top, right, bottom))
        taken.append(spot)
        nearest = (min(max(place[0], spot[0]), spot[2]), min(max(place[1], spot[1]), spot[3]))
        if math.dist(place, nearest) > 14:
            pen.line([place, nearest], FRAME)
        pen.text((spot[0], (spot[1] + spot[3]) / 2), text, "lm")
    for _, teacher, student in points:  # over all lines
        pen.dot((x(teacher), y(student)), TAUGHT)
    return pen.picture()


class Pen:
    """Draws in pixels of the finished picture, on a larger one that is reduced at the end."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (SIZE_PX[0] * SUPERSAMPLED, SIZE_PX[1] * SUPERSAMPLED), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def font(self, size_px: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(str(FONT), size_px * SUPERSAMPLED)

    def width_of(self, text: str, size_px: int = 14) -> float:
        return self.font(size_px).getlength(text) / SUPERSAMPLED

    def line(self, points: list[tuple[float, float]], ink: Any, width_px: int = 1, dashed: bool = False) -> None:
        if dashed:
            (x0, y0), (x1, y1) = points
            length = math.dist(*points)
            for begin in range(0, int(length), 10):
                parts = begin / length, min(begin + 6, length) / length
                self.line([(x0 + part * (x1 - x0), y0 + part * (y1 - y0)) for part in parts], ink, width_px)
            return
        self.draw.line([(x * SUPERSAMPLED, y * SUPERSAMPLED) for x, y in points], ink, width_px * SUPERSAMPLED)

    def dot(self, place: tuple[float, float], ink: Any) -> None:
        self.draw.ellipse([side * SUPERSAMPLED for side in _around(place, 5)], ink)

    def ring(self, place: tuple[float, float], ink: Any) -> None:
        self.draw.ellipse([side * SUPERSAMPLED for side in _around(place, 5)], PAPER, ink, 2 * SUPERSAMPLED)

    def text(self, place: tuple[float, float], text: str, anchor: str, size_px: int = 14, ink: Any = INK) -> None:
        """With a margin of paper, so that lines under it do not cross it."""
        x, y = place
        self.draw.text(
            (x * SUPERSAMPLED, y * SUPERSAMPLED),
            text,
            ink,
            self.font(size_px),
            anchor,
            stroke_width=2 * SUPERSAMPLED,
            stroke_fill=PAPER,
        )

    def picture(self) -> Image.Image:
        return self.image.resize(SIZE_PX, Image.Resampling.LANCZOS)


def _around(place: tuple[float, float], radius: float) -> Box:
    return (place[0] - radius, place[1] - radius, place[0] + radius, place[1] + radius)


def _upright(one: tuple[float, float], other: tuple[float, float]) -> Box:
    """The box of an upright line."""
    return (one[0] - 3, min(one[1], other[1]), one[0] + 3, max(one[1], other[1]))


def _range(values: Iterable[float]) -> tuple[float, float]:
    """The multiples of five around the values, with some room."""
    known = [value for value in values if not math.isnan(value)]
    return 5 * math.floor((min(known) - 1) / 5), 5 * math.ceil((max(known) + 1) / 5)


def _ticks(ends: tuple[float, float]) -> range:
    step = next(step for step in (1, 2, 5, 10, 20) if (ends[1] - ends[0]) / step <= 10)
    return range(int(-(-ends[0] // step) * step), int(ends[1]) + 1, step)


def _free_spot(place: tuple[float, float], width: float, taken: list[Box], within: Box, height: float = 18) -> Box:
    """Where a label covers least of what is there already, near its point."""

    def candidates() -> Iterable[tuple[float, Box]]:
        for ring in range(5):
            away = 9 + 14 * ring
            for angle in range(0, 360, 30):
                dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
                middle_x = place[0] + dx * (away + width / 2)
                middle_y = place[1] + dy * (away + height / 2)
                box = (middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2)
                outside = width * height - _overlap(box, within)
                yield sum(_overlap(box, other) for other in taken) + 3 * outside + 8 * ring, box

    return min(candidates())[1]


def _overlap(one: Box, other: Box) -> float:
    across, up = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return across * up if across > 0 and up > 0 else 0.0


def png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()


if __name__ == "__main__":
    sys.exit(main())
