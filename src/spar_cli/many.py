"""The options of commands that take any number of pictures, and which pictures they name."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import command_line, complain, output_stems, say
from .parser import text, whole_number, whole_number_from, whole_number_or_0

if TYPE_CHECKING:
    from spar_hf.journal import Journal
    from spar_hf.processes import Processes
    from spar_hf.sources import Photographs

MAX_WORKERS = 8  # unless more are asked for
MOST_WORKERS = 1000
# Options that change nothing in a picture's results: a run goes on with others.
NOT_RECORDED = (
    "command", "argv", "verbose", "images", "dataset", "dataset_split", "image_column", "output", "json", "workers",
    "batch_size", "resume", "max_bad_images", "device",
)  # fmt: skip
EPILOG = """many pictures:
  IMAGE is a picture file, a folder (with its sub-folders), a pattern in quotes ("photos/**/*.jpg"), a tar of pictures
  (WebDataset), or @FILE, a list of files, one a line. Results are called after the path within the folder.
  spar-COMMAND.jsonl in the output folder has a line for each picture that is done; --resume goes on from there.
  accelerate launch -m spar_hf COMMAND ... shares the pictures among processes and machines with one output folder;
  on CPUs ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m spar_hf COMMAND ..."""


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="a picture file, folder, pattern in quotes, tar, or @FILE with a list; several are fine",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("spar-output"), metavar="FOLDER", help="default: spar-output"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    group = parser.add_argument_group("many pictures")
    group.add_argument("--dataset", metavar="ID|FOLDER", type=text, help="a Hugging Face data set, in place of IMAGE")
    group.add_argument("--dataset-split", metavar="NAME", type=text, help="of --dataset (default: train)")
    group.add_argument(
        "--image-column", metavar="NAME", type=text, help="of --dataset (default: the first image column)"
    )
    group.add_argument(
        "--batch-size",
        type=whole_number,
        metavar="N",
        help="pictures of one size that go through the network together (default: 8 on an accelerator, 1 on a CPU)",
    )
    group.add_argument(
        "--workers",
        type=whole_number_from(0, MOST_WORKERS - 1),
        metavar="N",
        help=f"processes that read ahead and write behind; 0: none (default: one a core, at most {MAX_WORKERS})",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="leave out what is done in --output; refused where options that change results are others",
    )
    group.add_argument(
        "--max-bad-images",
        type=whole_number_or_0,
        metavar="N",
        help="stop when a process has met more that are unreadable (default: go on, and count them)",
    )


def workers_of(args: argparse.Namespace, count: int) -> int:
    """How many processes read and write for this one: as asked, or its share of the cores."""
    if args.workers is not None:
        return int(args.workers)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if count < 2 else max(1, min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), MAX_WORKERS))


def writer_number(number: int) -> int:
    """Of the process of a number beside this one, a number that no process of the launch has but that one."""
    return int(os.environ.get("RANK", "0")) * MOST_WORKERS + number


def open_pictures(args: argparse.Namespace) -> tuple[Photographs, list[str]]:
    """The pictures that the line names, and what each is called; see `sources.pictures`.

    Raises:
        ValueError: there are none, or they cannot be found.
    """
    from spar_hf.sources import hub_dataset, pictures

    if args.dataset is None:
        for flag in ("dataset_split", "image_column"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag.replace('_', '-')} belongs to --dataset, which is not given; leave it out")
        if not args.images:
            raise ValueError("there is no IMAGE; name a picture, folder, pattern, tar or @LIST, or give --dataset")
        if any(word.is_dir() and word.resolve() == args.output.resolve() for word in args.images):
            raise ValueError(f"results would go among the pictures in {args.output}; give another --output")
        return pictures(args.images, leave_out=args.output)
    if args.images:
        raise ValueError(f"pictures are to come from {args.images[0]} and from --dataset; give one of them")
    source = hub_dataset(args.dataset, args.dataset_split or "train", args.image_column, None, None)
    digits = len(str(len(source.names)))
    return source, [f"{number:0{digits}d}" for number in range(len(source.names))]


@dataclass
class Batch:
    """The pictures of a command: those done are in the journal, bad ones are named and counted, the others go on.

    Attributes:
        args: of the command.
        source: the pictures.
        stems: what the outputs of each are called.
        processes: that share the work.
        journal: of what is done; None where the only picture has none.
        todo: numbers of the pictures that this process does.
        done_before: how many are done already, by earlier runs.
    """

    args: argparse.Namespace
    source: Photographs
    stems: list[str]
    processes: Processes
    journal: Journal | None
    todo: list[int]
    done_before: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    done: int = 0

    @property
    def one_by_one(self) -> bool:
        """Whether every picture is named on the line, and gets its own report."""
        return self.args.dataset is None and len(self.source.names) == len(self.args.images)

    @contextmanager
    def may_fail(self, *numbers: int) -> Iterator[None]:
        """Counts pictures that cannot be read instead of ending the command; other errors pass.

        Raises:
            ValueError: there are more than --max-bad-images.
        """
        from spar_hf.image_file_spar import InvalidImageError

        try:
            yield
        except InvalidImageError as error:
            if len(self.source.names) == 1:
                raise
            for number in numbers:
                self.failed.append((self.source.names[number], str(error)))
                complain(str(error))
            allowed = self.args.max_bad_images
            if allowed is not None and len(self.failed) > allowed:
                raise ValueError(
                    f"{len(self.failed)} pictures cannot be read and --max-bad-images is {allowed}; the last is "
                    f"{self.failed[-1][0]}. What is done is intact; repair them or allow more, and add --resume"
                ) from None

    def finish(self, number: int, record: dict[str, Any]) -> None:
        """Counts a picture whose results are written."""
        stem = self.stems[number]
        if self.journal is not None:
            self.journal.write(stem, record)
        if self.args.json is not None:
            self.records[stem] = record
        self.done += 1

    def close(
        self,
        facts: Mapping[str, Any],
        seconds: float,
        network_seconds: float,
        finish: Callable[[], None] = lambda: None,
    ) -> int:
        """Writes what is about all pictures, when every process has done its part.

        Args:
            facts: what ran, and how.
            seconds: that it took.
            network_seconds: that the network took of them.
            finish: what else is to be done at the end, by one process.

        Returns:
            The exit status: 0, or 1 where some pictures could not be done.
        """
        from spar_hf.files import readable, write_json

        if self.journal is not None:
            self.journal.close()
        parts = self.processes.gather((self.failed, self.done))
        if not self.processes.is_main:
            return 0
        finish()
        failed = [entry for part, _ in parts for entry in part]
        done = sum(count for _, count in parts)
        if self.journal is not None:
            self.journal.merge()
        if self.args.json is not None:
            content = {
                "command": command_line(self.args),
                **facts,
                "seconds": round(seconds, 3),
                "network_seconds": round(network_seconds, 3),
                "images": self._all_records(),
                "failed": [{"image": name, "error": reason} for name, reason in failed],
            }
            write_json(self.args.json, content)
        if not self.one_by_one:
            rate = f"{done / seconds:.2f} images/s, " if done and seconds else ""
            before = f", {self.done_before} were done before" if self.done_before else ""
            share = f"the network {100 * network_seconds / max(seconds, 1e-9):.0f} % of the time"
            say(
                f"{done} of {len(self.source.names)} pictures in {readable(seconds)} ({rate}{share}){before}; results "
                f"in {self.args.output}"
            )
        if not failed:
            return 0
        complain(f"{len(failed)} of {len(self.source.names)} pictures could not be done; the others are.")
        return 1

    def _all_records(self) -> list[dict[str, Any]]:
        """What is to know of each picture that is done, in the order of the line; earlier runs' as well."""
        found = self.records
        if self.journal is not None:
            wanted = set(self.stems) if self.args.resume or self.processes.count > 1 else set()
            for line in self.journal.lines() if wanted else ():
                if line.get("stem") in wanted and line["run"] == self.journal.run:
                    found[line["stem"]] = {key: line[key] for key in line if key not in ("run", "stem")}
        return [found[stem] for stem in self.stems if stem in found]


def begin(
    args: argparse.Namespace,
    source: Photographs,
    called: list[str],
    options: Callable[[], Mapping[str, Any]],
    recorded: Callable[[str], bool] = lambda stem: True,
) -> Batch:
    """The batch of a command, after a look at what is done already.

    Args:
        args: of the command.
        source, called: from `open_pictures`.
        options: gives what decides the results, beside the options of the line, such as the weights.
        recorded: whether what is about all pictures knows of a stem.

    Raises:
        ValueError: with --resume, pictures were done with other options; or the processes see other pictures.
    """
    from spar_hf.files import digest
    from spar_hf.journal import Journal
    from spar_hf.processes import processes

    team = processes()
    if len(set(team.gather(digest(f"{name}\0".encode("utf-8", "replace") for name in source.names)))) > 1:
        raise ValueError("the processes see different pictures; give all of them the same folder, and change it later")
    journal: Journal | None = None
    if len(called) > 1 or args.resume or Journal.exists(args.output, args.command):  # else nothing to go on from
        chosen = {name: _as_json(value) for name, value in vars(args).items() if name not in NOT_RECORDED}
        journal = Journal(args.output, args.command, {**chosen, **options()}, team.index)
        if team.is_main:
            journal.merge()
    team.wait()
    before: dict[str, str] = {}
    finished: set[str] = set()
    if args.resume and journal is not None:
        before, finished = _done_before(journal, set(source.names))
    stems = output_stems(called, source.names, before)
    todo = [number for number, stem in enumerate(stems) if not (stem in finished and recorded(stem))]
    return Batch(args, source, stems, team, journal, list(team.share(todo)), len(stems) - len(todo))


def _done_before(journal: Journal, names: set[str]) -> tuple[dict[str, str], set[str]]:
    """Stems of earlier runs with their pictures' names, and those that are finished: their files are all there."""
    runs: dict[str, Any] = {}
    owner: dict[str, str] = {}
    made_by: dict[str, str] = {}
    for line in journal.lines():
        if "options" in line:
            runs[line["run"]] = line["options"]
            continue
        owner[line["stem"]] = line["image"]
        there = all(Path(path).exists() for path in line.get("files", {}).values())
        made_by[line["stem"]] = line["run"] if there else ""
    for stem, run in made_by.items():
        if owner[stem] in names and run not in ("", journal.run):
            earlier = runs.get(run, {})
            changed = sorted(name for name in journal.options if earlier.get(name) != journal.options[name])
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            raise ValueError(
                f"--resume: {journal.folder} holds results of other options, {flags}; give the same ones "
                "or another --output, or leave --resume out to do all pictures again"
            )
    return owner, {stem for stem, run in made_by.items() if run == journal.run}


def _as_json(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_json(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
