"""The house: imports go down the layers and never in a circle, what ships stands alone, extras are imported late."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "spar_hf"
REMOTE_CODE = sorted(PACKAGE.glob("*_spar.py"))
# From top to bottom. A module may import from its own layer and from those below. `spar_hf` itself is its __init__.
LAYERS = (
    ("benchmarks", "training", "spaces", "examples", "spar_hf.__main__"),
    ("spar_cli",),
    ("spar_hf",),
    ("spar_hf.hub",),
    ("spar_hf.distillation",),
    ("spar_hf.demo",),
    ("spar_hf.reproduction",),
    ("spar_hf.exporting", "spar_hf.ray", "spar_hf.prototypes"),
    ("spar_hf.build",),
    ("spar_hf.rasters",),
    ("spar_hf.evaluation",),
    ("spar_hf.methods",),
    ("spar_hf.networks",),
    ("spar_hf.refinement",),
    ("spar_hf.segmenters",),
    ("spar_hf.encoders",),
    ("spar_hf.upsampling",),
    ("spar_hf.checkpoints",),
    ("spar_hf.conversion",),
    ("spar_hf.picture_book",),
    ("spar_hf.outputs",),
    ("spar_hf.pretrained", "spar_hf.checkpoint_files", "spar_hf.downloads"),
    ("spar_hf.sources", "spar_hf.journal", "spar_hf.workers", "spar_hf.processes"),
    (
        "spar_hf.files",
        "spar_hf.extras",
        "spar_hf.visualize",
        "spar_hf.families",
        "spar_hf.published",
        "spar_hf.video",
        "spar_hf.vocabulary",
    ),
    ("spar_onnx",),
    tuple(f"spar_hf.{path.stem}" for path in REMOTE_CODE),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# The page is what its extra is for: there it is imported at the top, and nothing outside imports the page at its own.
HOMES = {"gradio": "spar_hf.demo", "starlette": "spar_hf.demo"}


@dataclass(frozen=True)
class Import:
    """`source` imports `target`; the target is a module of ours with its full name, or another top-level package."""

    source: str
    target: str
    at_top: bool
    line: int

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}: {self.target}"


def modules_of(root: Path) -> dict[str, Path]:
    """Our modules by full name. The scripts of a folder import each other by the bare name."""
    names = {}
    for folder in ("src", "training", "benchmarks", "spaces", "examples"):
        base = root / "src" if folder == "src" else root
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def at_module_top(tree: ast.Module) -> set[ast.AST]:
    """The nodes that run when the module is imported: all but those inside functions."""
    found: set[ast.AST] = set()
    left: list[ast.AST] = list(tree.body)
    while left:
        node = left.pop()
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found.add(node)
            left += ast.iter_child_nodes(node)
    return found


def imports_of(root: Path) -> list[Import]:
    """Every import of our modules, those inside functions and under TYPE_CHECKING included."""
    modules = modules_of(root)
    found = []
    for source, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = source if path.name == "__init__.py" else source.rpartition(".")[0]
        top = at_module_top(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*parents, *([node.module] if node.module else [])])
                # `from package import module` is an import of the module.
                names = [n if (n := f"{base}.{alias.name}") in modules else base for alias in node.names]
            else:
                continue
            for name in dict.fromkeys(names):
                sibling = f"{package}.{name}"
                script = not source.startswith("spar_") and sibling in modules
                target = sibling if script else name if name.startswith("spar_") else name.partition(".")[0]
                found.append(Import(source, target, node in top, node.lineno))
    return found


def rank(module: str) -> int | None:
    """The layer of a module: its own entry, or that of the nearest package around it that has one."""
    parts = module.split(".")
    if parts[0] == "spar_hf" and len(parts) > 1:
        return RANK.get(".".join(parts[:2]))
    return RANK.get(parts[0])


def upward(imports: list[Import]) -> list[str]:
    ranks = [(found, rank(found.source), rank(found.target)) for found in imports]
    return [str(found) for found, own, other in ranks if own is not None and other is not None and other < own]


def circles(imports: list[Import]) -> list[str]:
    """Each circle of imports once, as `a -> b -> a`."""
    edges: dict[str, set[str]] = {}
    for found in imports:
        edges.setdefault(found.source, set()).add(found.target)
    done: set[str] = set()
    found_circles = []

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found_circles.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for target in sorted(edges.get(module, ())):
                walk(target, [*path, module])
            done.add(module)

    for module in sorted(edges):
        walk(module, [])
    return found_circles


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return imports_of(ROOT)


def test_every_module_has_a_layer(imports):
    modules = modules_of(ROOT)
    assert len(modules) > 80 and len(imports) > 500
    assert [name for name in modules if rank(name) is None] == []
    ours = {found.target for found in imports if found.target.startswith("spar_")}
    assert ours <= set(modules)


def test_imports_go_down_the_layers(imports):
    assert upward(imports) == []


def test_there_is_no_circle_of_imports(imports):
    assert circles(imports) == []


def test_the_checks_see_what_they_are_for(tmp_path):
    package = tmp_path / "src" / "spar_hf"
    for name, text in {
        "__init__.py": "from .build import build\n",
        "build.py": "def build():\n    from .methods import table\n",
        "methods/__init__.py": "",
        "methods/table.py": "from . import row\nfrom ..build import build\n",
        "methods/row.py": "import spar_hf.methods.table\n",
        "encoders/__init__.py": "from spar_cli.main import main\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    found = imports_of(tmp_path)
    assert upward(found) == [
        "spar_hf.encoders, line 1: spar_cli.main",
        "spar_hf.methods.table, line 2: spar_hf.build",
    ]
    assert circles(found) == [
        "spar_hf.build -> spar_hf.methods.table -> spar_hf.build",
        "spar_hf.methods.table -> spar_hf.methods.row -> spar_hf.methods.table",
    ]
    assert [found.at_top for found in found if found.source == "spar_hf.build"] == [False]


def test_the_library_knows_no_command_line(imports):
    assert [str(found) for found in imports if found.target == "argparse" and found.source.startswith("spar_hf")] == []


def test_extras_are_imported_where_they_are_used(imports):
    """Without any extra, every module of the package can be imported; only an extra's own file needs it at the top."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {"pillow": "PIL"}
    needed = [Requirement(line).name for line in project["dependencies"]]
    allowed = {named.get(name, name.replace("-", "_")) for name in needed} | set(sys.stdlib_module_names)
    top = [found for found in imports if found.at_top and found.source.startswith("spar_")]
    optional = [found for found in top if not found.target.startswith("spar_") and found.target not in allowed]

    def within(module: str, home: str | None) -> bool:
        return home is not None and f"{module}.".startswith(f"{home}.")

    assert [str(found) for found in optional if not within(found.source, HOMES.get(found.target))] == []
    assert set(HOMES) == {found.target for found in optional}
    homes = set(HOMES.values())
    entering = [found for found in top for home in homes if within(found.target, home)]
    assert [str(found) for found in entering if not any(within(found.source, home) for home in homes)] == []


@pytest.mark.parametrize("path", REMOTE_CODE, ids=lambda path: path.name)
def test_remote_code_imports_only_what_the_hub_can_give_it(path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    allowed = {"torch", "numpy", "PIL", "transformers"} | set(sys.stdlib_module_names)
    # The loader of transformers looks for every package that is imported, but for those inside a `try`.
    tried = {child for node in ast.walk(tree) if isinstance(node, ast.Try) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in tried:
            assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node not in tried:
            assert (node.module or "").partition(".")[0] in allowed
        elif isinstance(node, ast.ImportFrom) and node.level:  # `from .name import x`, of a file that ships as well
            assert node.level == 1 and node.module and f"{node.module}.py" in {other.name for other in REMOTE_CODE}
    # It finds imports by pattern, so a line of a docstring that looks like one would count.
    code_lines = {node.lineno for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))}
    looks_like_one = re.compile(r"^\s*(from\s+\S+\s+import\s|import\s+\S+\s*$)")
    lines = [number for number, line in enumerate(source.splitlines(), 1) if looks_like_one.match(line)]
    assert set(lines) <= code_lines
