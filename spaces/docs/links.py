"""Links of the pages to files of the repository: on the site each such file is a page or a file of its own.

The pages are written for readers of the repository, so their links are paths in it. What lies in docs/ is a page of
the site anyway; anything else that is linked (source, results, READMEs) comes along under `repository/`, so that the
site needs no address of a server and every link can be checked.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"(^ *(```+|~~~+).*?^ *\2 *$)", re.M | re.S)
LINK = re.compile(r"(\]\()([^)\s]+)")
STATIC = {".json", ".png", ".svg", ".ipynb"}  # shown by the browser as they are
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with `change` applied to everything but fenced code."""
    parts = FENCE.split(text)  # text, fenced block, its fence, text, ...
    return "".join(change(part) if i % 3 == 0 else part if i % 3 == 1 else "" for i, part in enumerate(parts))


def on_site(path: str) -> str:
    """Where the site has a file of the repository: its source path in MkDocs' sense."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".md"):
        return f"repository/{path.lower()}"  # README.md would be the index of its folder
    return f"repository/{path}" if Path(path).suffix in STATIC else f"repository/{path}.md"


def target_of(link: str, page: str) -> str | None:
    """The file of the repository that a link of a page (a path in the repository) leads to; None for other links."""
    path = urlsplit(link).path
    if not path or "://" in link or link.startswith("mailto:"):
        return None
    return os.path.normpath(os.path.join(os.path.dirname(page), path))


def rewritten(text: str, page: str) -> str:
    """A page of the repository with its links as the site needs them."""
    here = os.path.dirname(on_site(page))

    def replace(match: re.Match[str]) -> str:
        target = target_of(match[2], page)
        if target is None:
            return match[0]
        fragment = urlsplit(match[2]).fragment
        return f"{match[1]}{os.path.relpath(on_site(target), here or '.')}{'#' if fragment else ''}{fragment}"

    return outside_code(text, lambda part: LINK.sub(replace, part))


def linked(text: str, page: str) -> set[str]:
    """The files outside docs/ that a page links to, as paths in the repository."""
    found: set[str] = set()

    def collect(part: str) -> str:
        found.update(target for _, link in LINK.findall(part) if (target := target_of(link, page)))
        return part

    outside_code(text, collect)
    return {target for target in found if not target.startswith(("docs/", ".."))}


def page_of(path: str) -> str:
    """The page that shows a file or folder of the repository; Markdown is itself.

    Raises:
        ValueError: there is no such file.
    """
    source = ROOT / path
    if source.is_dir():
        names = sorted(child.name + "/" * child.is_dir() for child in source.iterdir() if child.name != "__pycache__")
        return f"{UNSEARCHED}# `{path}`\n\n" + "\n".join(f"- `{name}`" for name in names) + "\n"
    if not source.is_file():
        raise ValueError(f"{path} is linked and is not in the repository; mend the link.")
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".md":
        return UNSEARCHED + re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)  # a model card has its own front matter
    language = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".toml": "toml"}.get(source.suffix, "text")
    return f"{UNSEARCHED}# `{path}`\n\n~~~~~{language}\n{text.rstrip()}\n~~~~~\n"


def closure(pages: dict[str, str], always: Iterable[str]) -> dict[str, str | None]:
    """All files of the repository that the pages link to, and those that these link to; None for static files."""
    wanted = {target for path, text in pages.items() for target in linked(text, path)} | set(always)
    found: dict[str, str | None] = {}
    while wanted:
        path = wanted.pop()
        if Path(path).suffix in STATIC:
            if not (ROOT / path).is_file():
                raise ValueError(f"{path} is linked and is not in the repository; mend the link.")
            found[path] = None
            continue
        text = page_of(path)
        found[path] = text
        if path.endswith(".md"):
            wanted |= linked(text, path) - found.keys()
    return found
