"""What MkDocs builds beside the pages in docs/: a page a method, the commands' help, files that pages link to.

mkdocs.yml names this file; `make docs` builds the site.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import formulas
import links
import method_pages
from command_pages import commands_page
from mkdocs.structure.files import File

ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")  # the section Project
_pages: dict[str, str] = {}  # source path of a page on the site -> its path in the repository


def on_config(config: Any) -> Any:
    """Puts the pages of the methods into the navigation, where mkdocs.yml says METHODS."""
    for section in config.nav:
        for entries in section.values() if isinstance(section, dict) else ():
            if isinstance(entries, list) and "METHODS" in entries:
                place = entries.index("METHODS")
                entries[place : place + 1] = [
                    {title: [{row.title: f"methods/{row.name}.md"} for row in rows]}
                    for title, rows in method_pages.groups()
                ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages, and every file of the repository that a page links to."""
    docs = Path(config.docs_dir)
    texts = {f"docs/{path.relative_to(docs).as_posix()}": path.read_text("utf-8") for path in docs.rglob("*.md")}
    generated: dict[str, str | None] = {f"docs/methods/{name}.md": text for name, text in method_pages.pages().items()}
    generated["docs/reference/commands.md"] = commands_page()
    texts |= {path: text for path, text in generated.items() if text is not None}
    texts["docs/methods.md"] += method_pages.gallery()
    generated |= links.closure(texts, ALWAYS)
    _pages.clear()
    _pages.update({links.on_site(path): path for path in (*texts, *generated)})
    for path, text in generated.items():
        content: Any = (links.ROOT / path).read_bytes() if text is None else text
        files.append(File.generated(config, links.on_site(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site needs them, formulas as MathML; on the table of methods the pictures of them all."""
    path = _pages.get(page.file.src_uri)
    if path is None:
        return markdown
    if path == "docs/methods.md":
        markdown += method_pages.gallery()
    return links.outside_code(links.rewritten(markdown, path), formulas.as_mathml)
