"""Compares the methods as teachers: mean IoU of each teacher and of the students that it taught, on the picture book.

    python benchmarks/teachers.py --markdown docs/methods.md                    # every method, three seeds, then a mix
    python benchmarks/teachers.py --teachers maskclip naclip --scenes 16 --epochs 1 --limit 2 --output /tmp/t.json
    python benchmarks/teachers.py --report-only --markdown docs/methods.md      # table and picture from the JSON
    python benchmarks/teachers.py --teachers trident lposs --network dino=DINO --network sam=SAM     # FOLDER or id

A further network is NAME=ID, or METHOD.NAME=ID for one method alone, and so is a setting of a label method. Label
methods teach through their score maps of the picture book's words, where --teachers names them.
For each teacher: its features (training/cache_teacher.py) once, students on them (training/distill.py), and mean IoU
of the teacher in its own sliding window, of its single pass and of each student's single pass. The student's last
block is the checkpoint's (`own`), and for one seed the teacher's (`teacher`) where that is a row of the table. Last,
--mixed teachers become one, the mean of their normalised features: the best of the validation split, while all that
is reported is of the test split. Every step goes on where it was when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quality import Row, load
from record import origin
from teachers_report import PAPERS, chapter, mean, plot

import spar_hf
from spar_cli.methods import renew
from spar_cli.parser import name_and_value
from spar_hf.build import build_encoder, build_segmenter
from spar_hf.checkpoints import resolve
from spar_hf.encoders.composition import Ensemble
from spar_hf.evaluation import evaluate, load_benchmark
from spar_hf.files import write_atomically, write_json
from spar_hf.methods.table import METHODS, for_method
from spar_hf.picture_book.dataset import CLASSES
from spar_hf.reach_spar import REACHES
from spar_hf.segmentation_spar import FromFeatures

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "teachers.json"
CHECKPOINT = "tiny"  # who learns
NAMES = [name for name, row in METHODS.items() if row.family == "clip"]
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
    """What is evaluated: a checkpoint as some methods run it (None: its own; several: the mean of their features).

    `networks` and `settings` are by NAME or METHOD.NAME; see `for_method`. A label method is alone.
    """

    checkpoint: str
    methods: tuple[str | None, ...] = (None,)
    networks: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    window: str | None = None
    reach: str | None = None


def measure(subject: Subject, split: str, scale: float, limit: int, state_path: Path) -> dict[str, Any]:
    """Evaluates a subject at one scale; runs in a worker process."""
    model, processor = load(subject.checkpoint, "cpu")
    choices = [
        {
            **Row("", subject.checkpoint, None, method, None, subject.window, subject.reach).choices(batch=32),
            "networks": taken(method, subject.networks) or None,
            "settings": for_method(method or "", subject.settings) or None,
        }
        for method in subject.methods
    ]
    if is_label(subject.methods[0]):
        segmenter: Any = build_segmenter(model, processor, **choices[0])
    else:
        encoders = [build_encoder(model.vision_model, **choice) for choice in choices]
        encoder = encoders[0] if len(encoders) == 1 else Ensemble(encoders, normalise=True)
        segmenter = FromFeatures(encoder, model, processor)
    data = load_benchmark("picturebook", scale=scale, split=split, native_px=segmenter.config.image_size)
    result = evaluate(segmenter, processor, data, limit=limit, progress=False, state_path=state_path)
    kept = ("num_images", "mean_iou", "pixel_accuracy", "boundary_iou", "seconds_per_image")
    return {"split": split, "scale": scale, **{name: getattr(result, name) for name in kept}}


def taken(method: str | None, networks: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The further networks of a method among those given."""
    wanted = METHODS[method].networks if method is not None else {}
    return {name: where for name, where in for_method(method or "", networks).items() if name in wanted}


def is_label(method: str | None) -> bool:
    return method is not None and METHODS[method].kind == "label"


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
            **origin(threads=1),
            "checkpoint": CHECKPOINT,
            "own_block": spar_hf.SparVisionConfig.from_pretrained(resolve(CHECKPOINT)).method,
            **{name: getattr(args, name) for name in ("scenes", "epochs", "seeds", "scales", "reach")},
            "networks": dict(args.network),
            "settings": dict(args.settings),
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
        single_pass = Subject(CHECKPOINT, tuple(methods), tuple(self.args.network), tuple(self.args.settings))
        sliding = replace(single_pass, window="paper")
        self.evaluate(name, "sliding", sliding)
        if self.args.mixed:
            self.evaluate(name, "sliding", sliding, split="validation")
        self.evaluate(name, "single pass", single_pass)

        data = [*self.data, *self.teacher_flags(methods), "--cache", str(folder / "features")]
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

    def teacher_flags(self, methods: Sequence[str]) -> list[str]:
        """The words that say which teacher, for the scripts of training/."""
        networks = {name: where for method in methods for name, where in taken(method, self.args.network).items()}
        words = [word for name, where in networks.items() for word in ("--teacher-network", f"{name}={where}")]
        if not is_label(methods[0]):
            return ["--teacher-method", *methods, *words]
        labels = self.args.work / "labels.txt"
        write_atomically(labels, "".join(f"{', '.join(names)}\n" for names in CLASSES).encode())
        settings = for_method(methods[0], self.args.settings)
        words += [word for name, value in settings.items() for word in ("--teacher-set", f"{name}={value}")]
        return ["--teacher-labels", methods[0], "--labels", f"@{labels}", *words]

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
        recipe = METHODS[methods[0]].recipe if len(methods) == 1 else None
        # A recipe that looks at other blocks trains on pixels, through all of them: hours for GEM.
        alone = recipe is not None and recipe.blocks == 1 and all(term.block == 12 for term in recipe.terms)
        other = alone and methods[0] != self.document["own_block"] and "teacher" in kinds
        return own + [("teacher", seeds[0])] * other

    def best(self, count: int) -> list[str]:
        """The methods whose features are the best teachers by the validation split at the largest scale."""
        scale, names = max(self.args.scales), [name for name in self.args.teachers if not is_label(name)]
        known = {name: mean(self.document, name, "sliding", scale, "validation") for name in names}
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
                write_json(self.args.output, self.document)

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
        "--teachers",
        nargs="+",
        metavar="NAME",
        help="(default: the feature methods whose networks are given)",
    )
    parser.add_argument("--mixed", type=int, default=2, help="so many best ones make one more teacher; 0: none")
    parser.add_argument("--students", nargs="+", choices=("own", "teacher"), default=["own", "teacher"])
    parser.add_argument("--scenes", type=int, default=400, help="training scenes")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first is the `teacher` student's")
    parser.add_argument("--reach", choices=REACHES, default="image", help="of the student's attention")
    parser.add_argument(
        "--network",
        action="append",
        type=name_and_value,
        metavar="NAME=ID",
        help="a further network of the methods that need it; it should know drawings. May be given again; "
        f"METHOD.NAME=ID is for one method alone (default: dino={CHECKPOINT}, its own tower)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=name_and_value,
        dest="settings",
        metavar="METHOD.NAME=VALUE",
        help="a number of a label method that differs from its authors'",
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 4], help="multiples of the native side")
    parser.add_argument("--limit", type=int, default=32, help="scenes of each evaluation, spread over the split")
    parser.add_argument("--jobs", type=int, default=2, help="teachers at once, one thread each")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table there, and teachers.png beside")
    parser.add_argument("--report-only", action="store_true", help="measure nothing; report on --output")
    args = parser.parse_args(argv)
    args.work = args.work.resolve()
    args.network = args.network or [("dino", CHECKPOINT)]
    if args.teachers is None:
        given = [name for name in NAMES if METHODS[name].needs.keys() <= taken(name, args.network).keys()]
        args.teachers = sorted((name for name in given if not is_label(name)), key=lambda name: name != PAPERS)
    if unknown := [name for name in args.teachers if name not in NAMES]:
        parser.error(f"--teachers: {', '.join(unknown)}; choose of {', '.join(NAMES)}")
    code = 0 if args.report_only else run(args)
    if code:
        return code
    document = json.loads(args.output.read_text())
    print("\n" + chapter(document))
    if args.markdown is not None:
        write_atomically(args.markdown.with_name("teachers.png"), plot(document))
        renew(args.markdown, "teachers", chapter(document))
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
        if done and 1 < args.mixed <= sum(not is_label(name) for name in args.teachers):
            done = benchmark.teach_all(threads, [benchmark.best(args.mixed)])
        return 0 if done else 1
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        return 130
    finally:
        benchmark.stop()
        threads.shutdown(cancel_futures=True)
        workers.shutdown()


if __name__ == "__main__":
    sys.exit(main())
