"""Make the files that a reader takes away from a built book: `python book/deliver.py`, or `make files`.

- hgad-book.zip: the pages, which open from their folder without a server.
- hgad-book.pdf: all of them as one document, printed by headless Chromium.
- hgad-notebooks.zip: the chapters in plain Markdown, which any Jupyter shows, with what they need to run.

They go to book/_build/files. The pages must have been built before, by `make book`.
"""

from __future__ import annotations

import argparse
import html
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from bs4 import BeautifulSoup, Tag

from build import ROOT, BuildError, pages_of
from plain import plain_notebooks

NAMES = {"html": "hgad-book.zip", "pdf": "hgad-book.pdf", "notebooks": "hgad-notebooks.zip"}
# What chapters need beside themselves.
PROJECT = ("hgadlib", "book/hgadbook", "params", "results", "pyproject.toml", "README.md", "LICENSE")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-sync", "--disable-component-update", "--disable-dev-shm-usage", "--no-pdf-header-footer",
    "--generate-pdf-document-outline",
]  # fmt: skip
# Chromium goes on as soon as all formulas are set; this is what it waits for at most, in its own time.
PATIENCE_MS = 120_000
PRINT = """
@page { size: A4; margin: 18mm 16mm 20mm; @bottom-center { content: counter(page); font: 8pt sans-serif; } }
html { font-size: 11px; }
body { background: #fff; display: block; }
section.page { break-before: page; }
h1, h2, h3, h4 { break-after: avoid; }
figure, img, table tr, .admonition, div.math { break-inside: avoid; }
.bd-content { display: block; }
img, svg { height: auto !important; max-height: 225mm; max-width: 100% !important; width: auto; }
.figure-data { display: none; }
.bd-content .cell_output table { font-size: 0.75em; }
.bd-content .cell_output table td, .bd-content .cell_output table th {
  overflow-wrap: anywhere; padding: 0.15em 0.35em; position: static; white-space: normal;
}
.bd-content .cell_output .text_html, .bd-content .cell_output .text_plain, .pst-scrollable-table-container {
  overflow: visible;
}
pre { font-size: 0.85em; white-space: pre-wrap; }
a { text-decoration: none; }
.headerlink, button, input[type=range], summary.toggle-details__summary { display: none !important; }
.contents li { list-style: none; margin: 0.15rem 0; }
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and make the files; 1 with the reason on standard error where one cannot be."""
    parser = argparse.ArgumentParser(description="Make files to take away from the built book.")
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"out of {', '.join(NAMES)}; all unless given"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "book" / "_build" / "files", help="their folder")
    options = parser.parse_args(arguments)
    pages = ROOT / "book" / "_build" / "book"
    makers: dict[str, Callable[[Path], None]] = {
        "html": lambda path: pack(path, {file: file.relative_to(pages) for file in files_of(pages / "html")}),
        "pdf": lambda path: print_book(pages / "html", chapters(), path),
        "notebooks": lambda path: pack_notebooks(chapters(), path),
    }
    try:
        if unknown := [kind for kind in options.kinds if kind not in makers]:
            raise BuildError(f"expected {', '.join(NAMES)}, found {', '.join(unknown)}")
        if not (pages / "html" / "index.html").is_file():
            raise BuildError("there are no pages yet; run make book first")
        options.out.mkdir(parents=True, exist_ok=True)
        for kind in options.kinds or NAMES:
            path = options.out / NAMES[kind]
            # A file appears whole or not at all.
            partial = path.with_name(f".{os.getpid()}-{path.name}")
            try:
                makers[kind](partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", flush=True)
    except BuildError as error:
        print(f"files: {error}", file=sys.stderr)
        return 1
    return 0


def chapters() -> list[str]:
    """List the pages of the book in reading order."""
    return pages_of(yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8")))


def files_of(folder: Path) -> list[Path]:
    """List a folder's files, without what Python and editors leave behind."""
    return sorted(
        p for p in folder.rglob("*") if p.is_file() and not re.search(r"/(__pycache__|\.)", f"/{p}"[1:])
    )


def pack(path: Path, members: dict[Path, Path], texts: dict[str, str] | None = None) -> None:
    """Write a ZIP file of files, and of texts, by their names in it; the same members give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(
            [(name.as_posix(), file.read_bytes()) for file, name in members.items()]
            + [(name, text.encode()) for name, text in (texts or {}).items()]
        ):
            info = zipfile.ZipInfo(name)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, data)


def print_book(pages: Path, names: Sequence[str], path: Path) -> None:
    """Print all pages as one PDF with numbered pages, an outline, and links from chapter to chapter.

    Raises:
        BuildError: There is no Chromium, or it made no PDF.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise BuildError("the PDF is printed by Chromium; install the program chromium")
    single = pages / "_book.html"
    single.write_text(joined(pages, names), encoding="utf-8")
    try:
        with tempfile.TemporaryDirectory() as profile:
            command = [chromium, *FLAGS, f"--user-data-dir={profile}", f"--virtual-time-budget={PATIENCE_MS}"]
            subprocess.run(
                [*command, f"--print-to-pdf={path.resolve()}", single.resolve().as_uri()],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False, timeout=900,
            )  # fmt: skip
    finally:
        single.unlink()
    if not path.is_file() or not path.read_bytes().startswith(b"%PDF"):
        raise BuildError(f"{chromium} made no PDF of {pages}")


def joined(pages: Path, names: Sequence[str]) -> str:
    """Join pages to one, whose links stay inside it.

    Args:
        pages: Folder of the built pages.
        names: Of the pages, in order, without a suffix.
    """
    own = {f"{name}.html": key_of(name) for name in names}
    parts, contents, head = [], [], ""
    for name in names:
        soup = BeautifulSoup((pages / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
        article = soup.select_one("article")
        if article is None:
            raise BuildError(f"{name}.html has no article")
        if not head:
            head = (
                "".join(str(tag) for tag in soup.head.find_all("link", rel="stylesheet")) if soup.head else ""
            )
            head += "".join(
                map(str, (tag for tag in soup.find_all("script") if "athjax" in str(tag).lower()))
            )
        for tag in article.select("script, .headerlink, .prev-next-footer, details.hide:has(.cell_input)"):
            # A folded input leaves a line that says so, which paper cannot open.
            tag.decompose()
        for details in article.select("details.sd-dropdown, details.toggle-details"):
            details["open"] = ""
        relink(article, name, own)
        title = article.find("h1")
        text = " ".join(title.get_text().split()) if title else name
        contents.append(f'<li><a href="#{key_of(name)}">{html.escape(text)}</a></li>')
        parts.append(f'<section class="page" id="{key_of(name)}">{article.decode_contents()}</section>')
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    title_page = f"<h1>{html.escape(config['title'])}</h1><p>{html.escape(config['author'])}</p>"
    return (
        f'<!DOCTYPE html><html lang="en" data-theme="light"><head><meta charset="utf-8">{head}'
        f"<title>{html.escape(config['title'])}</title><style>{PRINT}</style></head>"
        f'<body><main class="bd-content">{title_page}<ul class="contents">{"".join(contents)}</ul>'
        f"{''.join(parts)}</main></body></html>"
    )


def key_of(name: str) -> str:
    """Name a page's place in the joined one."""
    return f"page-{name.replace('/', '-')}"


def relink(article: Tag, name: str, own: dict[str, str]) -> None:
    """Give a page's anchors names of its own, and lead its links and pictures to where these are now."""
    folder = posixpath.dirname(name)
    for tag in article.find_all(id=True):
        tag["id"] = f"{key_of(name)}--{tag['id']}"
    for tag in article.find_all("a", href=True):
        address, _, anchor = str(tag["href"]).partition("#")
        if re.match(r"[a-z]+:", address):
            continue
        target = posixpath.normpath(posixpath.join(folder, address)) if address else f"{name}.html"
        if target in own:
            tag["href"] = f"#{own[target]}--{anchor}" if anchor else f"#{own[target]}"
        else:
            # A file beside the pages, which the PDF does not have.
            tag.unwrap()
    for tag in article.find_all(src=True):
        if not re.match(r"[a-z]+:", str(tag["src"])):
            tag["src"] = posixpath.normpath(posixpath.join(folder, str(tag["src"])))


def pack_notebooks(names: Sequence[str], path: Path) -> None:
    """Pack the chapters in plain Markdown, each with a cell that installs the library, and what they need."""
    members = {}
    for part in PROJECT:
        source = ROOT / part
        for file in files_of(source) if source.is_dir() else [source]:
            members[file] = Path("hgad") / file.relative_to(ROOT)
    plain = plain_notebooks(names, book=ROOT / "book")
    texts = {f"hgad/book/{name}.ipynb": text for name, text in plain.items()}
    pack(path, members, texts)


if __name__ == "__main__":
    sys.exit(main())
