"""`spar evaluate --methods`: many methods under one protocol, each in a process of its own, and one table."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .parser import check_one_of

# Options of this command alone, and those that differ from method to method; each takes one value.
REPLACED = ("--methods", "--json-dir", "--network", "--set", "--region-masks", "--json", "--state")
SCORES = ("mean_iou", "boundary_iou")


def chosen(text: str, model: str) -> list[str]:
    """The methods that `--methods` names: all that are for the model's family, or some split by commas."""
    from spar_hf.build import methods_for
    from spar_hf.checkpoints import class_of, folder_of
    from spar_hf.families import FAMILIES, WHOLE
    from spar_hf.methods.table import METHODS

    if text == "all":
        return methods_for(dict(FAMILIES)[class_of(folder_of(model, {}), WHOLE)])
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [check_one_of("method", name, METHODS) for name in dict.fromkeys(names)]


def run_methods(args: argparse.Namespace) -> int:
    """Evaluates each method that has no result in the folder yet; writes the table; 1 if some could not be run."""
    from spar_hf.files import write_atomically

    if args.json_dir is None:
        raise ValueError("--methods needs --json-dir, the folder for the results; the same command goes on from there")
    for option in ("method", "json", "state"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} is for one method; leave it out, or leave --methods out")
    names = chosen(args.methods, args.model)
    args.json_dir.mkdir(parents=True, exist_ok=True)
    results = {name: result_of(name, args) for name in names}
    lines = table(results)
    write_atomically(args.json_dir / "table.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))
    return 1 if any("error" in result for result in results.values()) else 0


def result_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The result of one method; see `evaluated`."""
    return evaluated(name, command_for(name, args), args.json_dir / f"{name}.json")


def evaluated(name: str, command: Sequence[str], path: Path, processes: int = 1) -> dict[str, Any]:
    """The result of one `spar evaluate`: that in the file if the same command made it, or a new one.

    Args:
        name: what it is called while it runs.
        command: the words after `spar`, of which `--json` is the file's.
        path: of the result.
        processes: that share the images.

    Returns:
        What the command wrote, or under "error" why there is none.

    Raises:
        ValueError: the file is of another command.
    """
    line = shlex.join(["spar", *command])
    if path.exists():
        try:
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no result of an evaluation ({error}); delete it") from error
        if result.get("command") == line:
            print(f"{name}: done before", file=sys.stderr)
            return result
        raise ValueError(
            f"{path} was made by another command, {result.get('command')!r}; delete it or name another folder"
        )
    print(f"{name}:", file=sys.stderr, flush=True)
    status, said = run_aside(command, processes)
    if status == 130:
        raise KeyboardInterrupt
    if status:
        return {"error": said.removeprefix("spar: error: ") or f"exit status {status}"}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def run_aside(command: Sequence[str], processes: int = 1) -> tuple[int, str]:
    """Runs `spar` in a process of its own, or several; its messages are shown as they come.

    Its peak memory is its own, and what brings it down leaves the others alone.

    Returns:
        The exit status, and the last line of the messages.
    """
    launcher = [sys.executable, "-m", "spar_cli.main"]
    environment = dict(os.environ)
    if processes > 1:
        import torch

        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launcher += ["-m", "spar_hf"]
        if not torch.accelerator.is_available():
            environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.Popen([*launcher, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    assert done.stderr is not None
    tail = ""
    while block := os.read(done.stderr.fileno(), 1 << 16):
        text = block.decode(errors="replace")
        sys.stderr.write(text)
        sys.stderr.flush()
        tail = (tail + text)[-1 << 16 :]
    said = [line for line in tail.splitlines() if line.strip()]
    ours = [line for line in said if line.startswith("spar: error: ")]  # torchrun says more after it
    return done.wait(), (ours or said or [""])[-1].strip()


def command_for(name: str, args: argparse.Namespace) -> list[str]:
    """The words after `spar` that evaluate one method as this command line has it."""
    from spar_hf.methods.table import METHODS, for_method
    from spar_hf.refinement import find_refinements

    kept, words = [], iter(args.argv)
    for word in words:
        option, equals, _ = word.partition("=")
        if option in REPLACED:
            if not equals:
                next(words, None)
            continue
        kept.append(word)
    refined = [network for row in find_refinements(args.refine).values() for network in row.networks]
    taken = [*METHODS[name].networks, *refined]
    networks = {key: where for key, where in for_method(name, args.network).items() if key in taken}
    kept += ["--method", name, *pairs("--network", networks), *pairs("--set", for_method(name, args.settings))]
    if args.masks_of_regions is not None and "regions" in taken:
        kept += ["--region-masks", str(args.masks_of_regions)]
    folder = args.json_dir
    return [*kept, "--json", str(folder / f"{name}.json"), "--state", str(folder / f"{name}.safetensors")]


def pairs(option: str, values: dict[str, str]) -> list[str]:
    """The words that give an option's names and values, one by one."""
    return [word for name, value in values.items() for word in (option, f"{name}={value}")]


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The Markdown table, best first; methods that could not be run come last and say why."""
    from spar_hf.evaluation import markdown_table
    from spar_hf.methods.table import METHODS

    scored = {name: result for name, result in results.items() if "error" not in result}
    rows = []
    for name, result in sorted(scored.items(), key=lambda pair: -(pair[1]["mean_iou"] or 0)):
        row = METHODS[name]
        networks = result["record"].get("networks") or {}
        rows.append(
            [
                f"`{name}`",
                *(f"{100 * result[score]:.1f}" if result[score] is not None else "-" for score in SCORES),
                f"{result['seconds_per_image']:.2f}",
                f"{result['peak_memory_mb']:.0f}",
                ", ".join(f"{what}: {Path(where).name}" for what, where in networks.items()) or "-",
                row.licence or "none given",
            ]
        )
    header = ["method", "mIoU", "boundary IoU", "s / image", "peak MB", "networks", "licence of the authors' code"]
    first = next(iter(scored.values()), None)
    lines = []
    if first is not None:
        variant = f" ({first['variant']})" if first["variant"] else ""
        lines = [
            f"{first['benchmark']}{variant}, protocol {first['protocol']['name']}, {first['num_images']} images, "
            f"{first['device']} {first['dtype']}",
            "",
            *markdown_table(header, rows),
        ]
    failed = [f"- `{name}` was not run: {result['error']}" for name, result in results.items() if "error" in result]
    return [*lines, *([""] if lines and failed else []), *failed]
