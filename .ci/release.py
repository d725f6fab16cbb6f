"""Builds the sdist and the wheel into dist/ and checks what people would get. `make release` runs it.

    python .ci/release.py                       # with every Python from 3.10 to 3.13 on this machine
    python .ci/release.py 3.11 3.12             # with these
    python .ci/release.py --no-install          # builds and checks the files alone

1. `python -m build` makes the sdist, and the wheel out of the sdist.
2. `twine check --strict` reads their descriptions as an index would.
3. The wheel holds the package's files, each as it is here, and nothing else; the sdist those of the repository.
4. In a clean environment of each Python the wheel is installed with its dependencies; the command segments the shipped
   picture there, and finds what is in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PACKAGES = ("spar_hf", "spar_cli", "spar_onnx")
IN_SDIST = (
    "README.md",
    "LICENSE",
    "NOTICE",
    "CHANGELOG.md",
    "CITATION.cff",
    "Makefile",
    "mkdocs.yml",
    "pyproject.toml",
)
WORDS = "cake; car, automobile; tree; apple; star; sea; sky; sand"


def version() -> str:
    """The one place: `__version__` of the package, which the build reads too.

    Raises:
        SystemExit: the changelog has no entry for it.
    """
    text = (ROOT / "src/spar_hf/__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.M)
    assert match, "src/spar_hf/__init__.py has no __version__"
    if f"## {match[1]}" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        sys.exit(
            f"release: CHANGELOG.md has no section '## {match[1]}'; write the release notes, or mend the version."
        )
    return match[1]


def run(*command: str | Path, **options: object) -> str:
    """The output of a command; what it says goes on when it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"release: {' '.join(map(str, command))} failed\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def build(name: str) -> tuple[Path, Path]:
    """Writes both files, drafts of a failed build stay out of dist/."""
    with tempfile.TemporaryDirectory() as draft:
        run(sys.executable, "-m", "build", "--outdir", draft, ROOT)
        (sdist,) = Path(draft).glob(f"spar_hf-{name}.tar.gz")
        (wheel,) = Path(draft).glob(f"spar_hf-{name}-py3-none-any.whl")
        print(run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel).strip())
        check_wheel(wheel)
        check_sdist(sdist)
        DIST.mkdir(exist_ok=True)
        return Path(shutil.copy(sdist, DIST)), Path(shutil.copy(wheel, DIST))


def tracked(*folders: str) -> list[str]:
    """The files of the repository, as git has them."""
    return run("git", "-C", ROOT, "ls-files", "-z", *folders).rstrip("\0").split("\0")


def check_wheel(wheel: Path) -> None:
    """Every tracked file of the packages, byte for byte, and nothing else."""
    files = zipfile.ZipFile(wheel)
    packed = {name for name in files.namelist() if ".dist-info/" not in name}
    ours = {path.removeprefix("src/"): path for path in tracked(*(f"src/{name}" for name in PACKAGES))}
    if packed != ours.keys():
        sys.exit(f"release: the wheel lacks {sorted(ours.keys() - packed)} and holds {sorted(packed - ours.keys())}")
    changed = [name for name, path in ours.items() if files.read(name) != (ROOT / path).read_bytes()]
    if changed:
        sys.exit(f"release: the wheel has other contents of {changed}")
    print(f"{wheel.name}: {len(packed)} files, {wheel.stat().st_size / 1e6:.1f} MB, as in the repository")


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    missing = [name for name in (*IN_SDIST, *tracked("src", "tests", "docs", "spaces")) if name not in packed]
    if missing:
        sys.exit(f"release: the sdist lacks {missing}")
    print(f"{sdist.name}: {len(packed)} files, {sdist.stat().st_size / 1e6:.1f} MB")


def interpreter(python: str) -> Path | None:
    """A Python of that version: on the path, or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*sorted(pyenv.glob(f"{python}.*/bin/python"), reverse=True), shutil.which(f"python{python}")]
    for path in filter(None, candidates):
        said = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=False)
        if said.returncode == 0 and said.stdout.startswith(f"Python {python}."):
            return Path(path)
    return None


def try_wheel(wheel: Path, python: str, path: Path, name: str) -> str:
    """Installs the wheel in a clean environment and segments the shipped picture."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run(path, "-m", "venv", place / "venv")
        own = place / "venv" / "bin"
        run(own / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
        quiet = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        options = {"cwd": place, "env": {**quiet, "HF_HUB_OFFLINE": "1"}}
        said = run(own / "spar", "--version", **options).strip()
        if said != f"spar-hf {name}":
            sys.exit(f"release: Python {python}: spar --version says {said!r} in place of 'spar-hf {name}'")
        where = run(own / "python", "-c", "import spar_hf; print(spar_hf.__path__[0])", **options).strip()
        if not Path(where).is_relative_to(place):
            sys.exit(f"release: Python {python}: the package of {where} ran, not the wheel's")
        picture = Path(where) / "assets/pictures/demo.png"
        run(own / "spar", "segment", picture, "--labels", WORDS, "--json", "found.json", **options)
        found = json.loads((place / "found.json").read_text(encoding="utf-8"))
        labels = {segment["label"] for segment in found["images"][0]["segments"]}
        if not {"apple", "car", "sky", "sand"} <= labels:
            sys.exit(f"release: Python {python}: the shipped picture has {sorted(labels)}")
        torch = run(own / "python", "-c", "import torch; print(torch.__version__)", **options).strip()
        return f"Python {python}: installed with torch {torch}, found {len(labels)} classes in the shipped picture"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", default=PYTHONS, metavar="VERSION", help=f"of {', '.join(PYTHONS)}")
    parser.add_argument("--no-install", action="store_true", help="build and check the files alone")
    args = parser.parse_args()
    name = version()
    sdist, wheel = build(name)
    skipped = []
    for python in () if args.no_install else args.pythons:
        path = interpreter(python)
        if path is None:
            skipped.append(python)
            continue
        print(try_wheel(wheel, python, path, name), flush=True)
    for file in (sdist, wheel):
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(ROOT)}")
    if skipped:
        print(f"release: NOT tried with Python {', '.join(skipped)}, which this machine lacks")


if __name__ == "__main__":
    main()
