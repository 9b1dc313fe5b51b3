"""Chapters in plain Markdown, which any Jupyter shows: MyST's roles and directives written out."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from pybtex.database import Person, parse_file

INSTALL = """# Installs the library from this folder, once.
import importlib.util
from pathlib import Path

if importlib.util.find_spec("hgadbook") is None:
    found = [path for path in [Path.cwd(), *Path.cwd().parents] if (path / "pyproject.toml").is_file()]
    if not found:
        raise FileNotFoundError("no pyproject.toml above: unpack hgad-notebooks.zip and run this there")
    root = found[0]
    %pip install --quiet --editable {root}[book]
    import sys
    sys.path[:0] = [str(root), str(root / "book")]"""


def plain_notebooks(names: Sequence[str], *, book: Path) -> dict[str, str]:
    """Write chapters in plain Markdown, each with a cell that installs the library.

    Args:
        names: Pages of the book; those that are no notebooks are left out.
        book: Their folder.
    Returns:
        Notebooks as text, by page.
    """
    entries = parse_file(str(book / "references.bib")).entries
    works = {key: work_of(entry) for key, entry in entries.items()}
    files = {name: book / f"{name}.ipynb" for name in names}
    notebooks = {name: nbformat.read(file, as_version=4) for name, file in files.items() if file.is_file()}
    places = labels_of({name: [cell.source for cell in nb.cells] for name, nb in notebooks.items()})
    texts = {}
    for name, notebook in notebooks.items():
        notebook.metadata.pop("book", None)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = plain_markdown(cell.source, page=name, places=places, works=works)
            else:
                cell.metadata.pop("mystnb", None)
        notebook.cells.insert(1, nbformat.v4.new_code_cell(INSTALL, id="install"))
        texts[name] = nbformat.writes(notebook)
    return texts


def work_of(entry: Any) -> str:
    """Cite a work of references.bib in a sentence: authors, title, where and when."""
    people: list[Person] = entry.persons.get("author", [])
    family = [" ".join(person.last_names) for person in people]
    who = f"{family[0]} et al." if len(family) > 2 else " and ".join(family)
    return re.sub(r"[{}]", "", f"{who}, {entry.fields.get('title', '')}, {entry.fields.get('year', '')}")


def labels_of(sources: dict[str, list[str]]) -> dict[str, tuple[str, str]]:
    """Find where labels stand, and what they name: label -> (page, title); pages are labels too."""
    places = {}
    for page, cells in sources.items():
        text = "\n\n".join(cells)
        title = re.search(r"^# (.*)$", text, re.M)
        places[page] = (page, title[1] if title else page)
        for label, heading in re.findall(r"^\(([\w-]+)\)=\n+(?:#+ (.*))?", text, re.M):
            places[label] = (page, heading or places[page][1])
        for label in re.findall(r"^:label: ([\w-]+)", text, re.M):
            places[label] = (page, f"equation {label.removeprefix('eq-')}")
    return places


def plain_markdown(text: str, *, page: str, places: dict[str, tuple[str, str]], works: dict[str, str]) -> str:
    """Write MyST as Markdown that JupyterLab and hosted notebooks show.

    Args:
        text: A cell.
        page: Its chapter, from which links lead.
        places: As of :func:`labels_of`.
        works: Cited works by key.
    """

    def link(label: str, said: str | None = None) -> str:
        if label not in places:
            return said or label
        target, title = places[label]
        return f"[{said or title}]({posixpath.relpath(target, posixpath.dirname(page) or '.')}.ipynb)"

    def role(found: re.Match[str]) -> str:
        kind, said = found[1], found[2]
        titled = re.fullmatch(r"(.*?)\s*<([^<>]+)>", said, re.S)
        if kind.startswith("cite"):
            keys = [key.strip() for key in said.split(",")]
            return "(" + "; ".join(works.get(key, key) for key in keys) + ")"
        if kind in ("doc", "ref", "eq", "numref"):
            label = (titled[2] if titled else said).strip().lstrip("/")
            near = posixpath.normpath(posixpath.join(posixpath.dirname(page), label))
            return link(near if near in places else label, titled[1] if titled else None)
        return f"`{titled[1] if titled else said}`"

    def equation(found: re.Match[str]) -> str:
        body = re.sub(r"^:[\w-]+:.*\n", "", found["body"], flags=re.M).strip()
        return f"$$\n{body}\n$$"

    fence = r"^(?P<f>`{3,}|:{3,})\{%s\}[^\n]*\n(?P<body>.*?)^(?P=f)[ \t]*$"
    text = re.sub(fence % "math", equation, text, flags=re.M | re.S)
    # What else is fenced keeps its body under its title.
    outer = re.compile(
        r"^(`{3,}|:{3,})\{([\w-]+)\}[ \t]*([^\n]*)\n((?::[\w-]+:[^\n]*\n)*)(.*?)^\1[ \t]*$", re.M | re.S
    )
    while found := outer.search(text):
        kind, title, body = found[2], found[3].strip(), found[5].strip()
        if kind == "bibliography":
            body = "\n".join(f"- {work}" for work in works.values())
        name = title if kind not in ("div", "figure", "image", "code-block") else ""
        name = name or {"exercise-start": "Exercise", "solution-start": "Solution"}.get(kind, "")
        text = text[: found.start()] + (f"**{name}**\n\n" if name else "") + body + text[found.end() :]
    text = re.sub(r"^\([\w-]+\)=\n+", "", text, flags=re.M)
    return re.sub(r"\{([\w:-]+)\}`([^`]+)`", role, text).strip()
