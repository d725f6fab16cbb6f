"""What is installed: a wheel with all of the package's data, pinned dependencies, working make targets."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "spar_hf"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel that `pip install` would make of this source."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
    (path,) = folder.glob("spar_hf-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_file_of_the_package(wheel):
    ours = {
        path.relative_to(PACKAGE.parent).as_posix()
        for package in ("spar_hf", "spar_cli", "spar_onnx")
        for path in (PACKAGE.parent / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.endswith((".tmp", ".pyc"))
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == ours
    assert {"spar_hf/py.typed", "spar_hf/assets/fonts/DejaVuSans.ttf", "spar_hf/assets/fonts/LICENSE"} <= packed
    assert any(name.startswith("spar_hf/evaluation/vocabularies/") and name.endswith(".json") for name in packed)


def test_wheel_says_what_it_is(wheel):
    (info,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "\nName: spar-hf\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "spar = spar_cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()
    for name in ("LICENSE", "NOTICE"):
        assert wheel.read(f"{info}/licenses/{name}") == (ROOT / name).read_bytes()


def test_package_works_from_the_wheel_alone(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import spar_hf, spar_cli.main\n"
        "print(spar_hf.__file__)\n"
        "sys.exit(spar_cli.main.main(['methods']))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.splitlines()[0]).is_relative_to(tmp_path)
    assert "maskclip" in run.stdout


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_constraints_pin_one_version_of_everything_we_ask_for():
    constraints = pins()
    asked = [
        *PROJECT["dependencies"],
        *(line for lines in PROJECT["optional-dependencies"].values() for line in lines),
    ]
    for line in asked:
        wanted = Requirement(line)
        name = canonicalize_name(wanted.name)
        if name == "spar-hf":  # an extra that holds other extras
            assert wanted.extras <= set(PROJECT["optional-dependencies"])
            continue
        (pin,) = constraints[name].specifier
        assert pin.operator == "==" and wanted.specifier.contains(pin.version), line
    assert all(re.fullmatch(r"==[^*+]+", str(pin.specifier)) for pin in constraints.values())


def test_constraints_need_no_gpu_packages():
    constraints = pins()
    assert str(constraints["torch"].specifier) == "==2.13.0"
    assert not [name for name in constraints if re.match("nvidia|cuda|triton|torchvision", name)]


def test_the_version_is_written_once():
    import spar_hf

    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", spar_hf.__version__)
    assert "version" not in PROJECT


def test_make_help_lists_every_target():
    # Run from `make test` it is a make inside a make, which would announce the folders it enters and leaves.
    command = ["make", "--no-print-directory", "help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    listed = {line.split()[1] for line in run.stdout.splitlines()}
    assert listed == {"help", "demo", "test", "lint", "bench", "browser", "docs", "release"}


def test_ci_script_is_valid_and_executable():
    script = ROOT / ".ci" / "run"
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    assert script.stat().st_mode & 0o111


def test_the_release_script_finds_pythons_and_reads_the_one_version(monkeypatch, tmp_path):
    import importlib.util

    import spar_hf

    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    release = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(release)
    assert release.version() == spar_hf.__version__
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert release.interpreter(running) is None
    (tmp_path / f"python{running}").symlink_to(sys.executable)
    assert release.interpreter(running) == tmp_path / f"python{running}"
    other = tmp_path / "versions" / "3.99.1" / "bin"
    other.mkdir(parents=True)
    (other / "python").symlink_to(sys.executable)
    assert release.interpreter("3.99") is None, "its name alone is no proof"


def test_the_files_that_speak_for_the_project_agree():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and "version" not in citation
    assert citation["license"] == PROJECT["license"]
    assert citation["preferred-citation"]["url"].rpartition("/")[2] in (ROOT / "README.md").read_text(encoding="utf-8")
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) >= 4
    for form in forms:
        read = yaml.safe_load(form.read_text(encoding="utf-8"))
        if form.stem != "config":
            assert {"name", "description", "body"} <= read.keys()
            ids = [entry["id"] for entry in read["body"] if entry["type"] != "markdown"]
            assert len(ids) == len(set(ids)) and all(entry["attributes"]["label"] for entry in read["body"])
