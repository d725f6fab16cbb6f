"""`spar reproduce`: published numbers made again: get what is needed, evaluate row by row, write a report."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from .compare import evaluated, pairs
from .output import command_line, complain, table
from .parser import check_one_of, name_and_value, path, positive_or_0, whole_number

if TYPE_CHECKING:
    from spar_hf.reproduction import Outcome, Row

SPEED_IMAGES = 4
ONE_PASS = ("single", "spar", "spar-new")  # what is done when weights are used as they are
HELP = "Make published numbers again: download, convert, evaluate, compare; may be stopped and started again."
EPILOG = """examples:
  spar reproduce paper --root reproduction --dry-run
      the rows, and what they need: weights, data sets, sizes, licences, what has to be got by hand
  spar reproduce paper --root reproduction --only voc20,siglip2-b16,single,spar
      some of SPAR's table; words of one kind (benchmark, network, setting) are alternatives
  spar reproduce methods --root reproduction --data /data --only voc21,naclip
      training-free methods under protocol sclip and their authors' own, on data sets that are there
  spar reproduce speed --root reproduction
      seconds per image of one pass and of windows, on drawings
  spar reproduce paper --root reproduction --limit 50
      50 images of each benchmark: a first look, without verdicts

The same command goes on where it was stopped. Each row is a 'spar evaluate', whose line the report has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", metavar="paper|methods|speed", help="which numbers")
    parser.add_argument(
        "--root",
        type=path,
        default=Path("reproduction"),
        metavar="FOLDER",
        help="for downloads, weights, results and the report (default: reproduction)",
    )
    parser.add_argument(
        "--data", type=path, metavar="FOLDER", help="data sets as MMSegmentation has them (default: ROOT/data)"
    )
    parser.add_argument(
        "--only",
        metavar="WORD,WORD",
        help="rows with these benchmarks, networks and settings, such as voc20,openclip-b16,stride-24 or naclip",
    )
    parser.add_argument("--limit", type=whole_number, metavar="N", help="N images of each benchmark; no verdicts then")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and what it needs; no more")
    parser.add_argument(
        "--tolerance",
        type=positive_or_0,
        default=0.5,
        metavar="POINTS",
        help="of mean IoU, within which a number counts as reproduced (default: 0.5)",
    )
    parser.add_argument(
        "--network",
        action="append",
        default=[],
        type=name_and_value,
        metavar="[METHOD.]NAME=ID|FOLDER",
        help="a second network, or a bank, that cannot be downloaded; may be given again",
    )
    parser.add_argument(
        "--processes", type=whole_number, default=1, metavar="N", help="that share the images of a row, one to a GPU"
    )
    parser.add_argument("--dtype", metavar="NAME", help="as for spar evaluate")
    parser.add_argument("--device", metavar="NAME", help="as for spar evaluate")


def run(args: argparse.Namespace) -> int:
    from spar_hf.processes import launched
    from spar_hf.reproduction import PARTS, plan, select

    check_one_of("part", args.part, PARTS)
    if launched():
        raise ValueError("each row is launched anew; leave 'accelerate launch' out and give --processes N")
    words = [word.strip() for word in (args.only or "").split(",") if word.strip()]
    rows = select(plan(args.part, args.network), words)
    args.root = args.root.absolute()
    args.data = (args.data or args.root / "data").absolute()
    if args.part == "speed" and args.limit is None:
        args.limit = SPEED_IMAGES
    print(f"{PARTS[args.part]}: {len(rows)} rows\n")
    print(listing(rows, args))
    return 0 if args.dry_run else reproduce(rows, args)


def reproduce(rows: Sequence[Row], args: argparse.Namespace) -> int:
    """Gets what is needed, evaluates, reports; 1 if some rows could not be run."""
    from filelock import FileLock, Timeout

    from spar_hf.reproduction import get

    args.root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(args.root / ".lock", timeout=0):
            models, lacking = get(rows, args.root, args.data, tell, complain)
            outcomes = evaluate_rows(rows, models, lacking, args)
    except Timeout:
        raise ValueError(
            f"another spar reproduce is at work in {args.root}; wait for it, or give another --root"
        ) from None
    report = args.root / args.part / "reproduction.md"
    print(f"\n{report.read_text(encoding='utf-8')}")
    print(f"wrote {report} and {report.with_suffix('.json').name} beside it")
    print(f"\nIn a clone of this project, this opens a pull request with the report:\n\n  {pull_request(report)}")
    return 1 if any(outcome.error for outcome in outcomes) else 0


def listing(rows: Sequence[Row], args: argparse.Namespace) -> str:
    """What the rows need, as text."""
    from spar_hf.reproduction import needs

    found = needs(rows, args.root, args.data)
    cells = [("needed", "GB", "licence", "check sum", "from", "")]
    for need in found:
        size = f"{need.gigabytes:.1f}" if need.gigabytes else "-"
        cells.append((need.name, size, need.licence, need.checksum or "-", need.source, need.state))
    lines = [table(cells, "<><<<<")]
    total = sum(need.gigabytes for need in found if need.state == "downloaded")
    lines += [
        "",
        f"About {total:.1f} GB will be downloaded; archives need their size once more when they are unpacked.",
    ]
    if hands := [need for need in found if need.how]:
        lines += ["", "To be got by hand:", *(f"- {need.name}: {need.how}." for need in hands)]
    if problems := dict.fromkeys(f"- {row.setting}: {row.problem}." for row in rows if row.problem):
        lines += ["", "Rows that cannot be run as they are:", *problems]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- rows


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def evaluate_rows(
    rows: Sequence[Row], models: Mapping[str, str], lacking: Mapping[str, str], args: argparse.Namespace
) -> list[Outcome]:
    """Evaluates the rows one after the other; the report is renewed after each.

    Args:
        rows: of the plan.
        models, lacking: see `reproduction.get`.
        args: of the command.
    """
    from spar_hf.files import readable
    from spar_hf.reproduction import Outcome

    outcomes: dict[str, Outcome] = {}
    ready = []
    for row in rows:
        names = [row.weights, row.benchmark, *(where for _, where in row.networks)]
        reason = row.problem or next((lacking[name] for name in names if name in lacking), "")
        outcomes[row.name] = Outcome(row, error=reason or "not evaluated yet")
        ready += [] if reason else [row]
    for number, row in enumerate(ready, start=1):
        outcomes[row.name] = outcome = evaluate_row(row, models[row.weights], f"[{number}/{len(ready)}]", args)
        write_report(list(outcomes.values()), args)
        left = seconds_left(list(outcomes.values()), ready[number:], args)
        score = outcome.error or f"{outcome.ours or 0:.1f}, published: {row.published or 'nothing'}"
        tell(f"  {score}" + (f"; about {readable(left)} left" if left else ""))
    write_report(list(outcomes.values()), args)
    return list(outcomes.values())


def evaluate_row(row: Row, model: str, number: str, args: argparse.Namespace) -> Outcome:
    """What came of one row: a new result, or that of an earlier run of the same command."""
    from spar_hf.files import write_json
    from spar_hf.reproduction import Outcome

    file = result_file(row, args)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = evaluated(f"{number} {row.name}", words_of(row, model, file, args), file, args.processes)
    except ValueError as error:  # the file is another command's, and stays
        result = {"error": str(error)}
    if "error" in result:
        return Outcome(row, error=result["error"])
    outcome = Outcome(row, result)
    as_it_is = row.protocol == "spar" and row.setting in ONE_PASS
    if as_it_is and outcome.is_whole and Path(model).parent == args.root / "models":
        published = None if row.published is None else row.published / 100
        write_json(Path(model) / f"{row.benchmark}.json", {**result, "published": published})  # for its card
    return outcome


def result_file(row: Row, args: argparse.Namespace) -> Path:
    """Where the result of a row lies; another number of images or type is another file."""
    parts = [row.name, *([f"limit-{args.limit}"] if args.limit else []), *([args.dtype] if args.dtype else [])]
    return args.root / args.part / "results" / ("-".join(parts) + ".json")


def words_of(row: Row, model: str, file: Path, args: argparse.Namespace) -> list[str]:
    """The words after `spar` that evaluate a row."""
    words = ["evaluate", "--benchmark", row.benchmark, "--model", model]
    if row.benchmark != "picturebook":
        words += ["--data", str(args.data)]
    if row.protocol:
        words += ["--protocol", row.protocol]
    words += [*row.options, *pairs("--network", dict(row.networks))]
    for option in ("limit", "dtype", "device"):
        if (value := getattr(args, option)) is not None:
            words += [f"--{option}", str(value)]
    return [*words, "--json", str(file), "--state", str(file.with_suffix(".safetensors"))]


def seconds_left(outcomes: Sequence[Outcome], left: Sequence[Row], args: argparse.Namespace) -> float:
    """About how long the rows that are left will take, by what a forward pass took so far."""
    from spar_hf.reproduction import DATASETS, data_set_of

    spent = passes = 0.0
    for outcome in outcomes:
        if outcome.result is not None:
            spent += outcome.result["seconds_per_image_mean"] * outcome.result["num_images"] / args.processes
            passes += outcome.row.passes * outcome.result["num_images"]

    def images(row: Row) -> int:
        key = data_set_of(row.benchmark)
        whole = args.limit if key is None else DATASETS[key].images
        return min(whole, args.limit or whole)

    return sum(row.passes * images(row) for row in left) * spent / passes if passes else 0.0


# -------------------------------------------------------------------------------------------------- report


def write_report(outcomes: Sequence[Outcome], args: argparse.Namespace) -> None:
    """Writes reproduction.md and reproduction.json, without the names of this machine's folders."""
    from spar_hf.files import write_atomically
    from spar_hf.reproduction import as_json, as_markdown
    from spar_hf.reproduction.archives import read_records

    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    devices = dict.fromkeys(f"{result['device']} {result['dtype']}" for result in results)
    packages = ("spar-hf", "torch", "transformers")
    facts = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "tolerance": args.tolerance,
        "device": " and ".join(devices) or "nothing evaluated",
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "command": command_line(args),
        "archives": read_records(args.root / "downloads"),
    }
    folder = args.root / args.part
    page = as_markdown(args.part, outcomes, facts)
    data = json.dumps(as_json(args.part, outcomes, facts), indent=1, ensure_ascii=False)
    hidden = {str(args.data): "DATA", str(args.root): "ROOT", str(Path.home()): "~"}
    for name, text in (("reproduction.md", page), ("reproduction.json", data + "\n")):
        for place, word in sorted(hidden.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(place, word)
        write_atomically(folder / name, text.encode())


def pull_request(report: Path) -> str:
    """The command that opens a pull request with a report, in a clone of the project."""
    found = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))
    words = "".join(char if char.isalnum() else " " for char in f"{found['part']} {found['date']} {found['device']}")
    name = "-".join(words.lower().split())[:80]
    folder = "benchmarks/results/reproductions"
    files = [(str(report.with_suffix(suffix)), f"{folder}/{name}{suffix}") for suffix in (".md", ".json")]
    steps = [["git", "switch", "--create", f"reproduction-{name}"], ["mkdir", "-p", folder]]
    steps += [["cp", source, target] for source, target in files]
    steps += [["git", "add", *(target for _, target in files)]]
    steps += [["git", "commit", "--message", f"Reproduction: {found['part']}, {found['device']}"[:72]]]
    steps += [["gh", "pr", "create", "--fill"]]
    return " && ".join(shlex.join(step) for step in steps)
