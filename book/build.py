"""Run every chapter headlessly and build the HTML book: `python book/build.py`, or `make book`.

Executed chapters go to book/_executed, the pages to book/_build/html; git ignores both. A chapter runs again
only when something it depends on has changed: its notebook, the modules it imports, its parameters, the pins.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

ROOT = Path(__file__).resolve().parents[1]
LINE = 79  # terminal columns
WIDE = 600  # CSS pixels; a wider figure scrolls on a telephone, see book.css
RUN_IT = "how-to-run"  # id of the cell at the end of each page
SVG = "image/svg+xml"
WIDGET = "application/vnd.jupyter.widget-view+json"


class BuildError(Exception):
    """The book cannot be built; the message is all that the reader of the terminal needs."""


def pages_of(toc: dict[str, Any]) -> list[str]:
    """List the pages of a table of contents in reading order, the first page first.

    Args:
        toc: What _toc.yml holds.
    Returns:
        Page names: paths relative to book/, without a suffix.
    """
    pages = [toc["root"]] if "root" in toc else [toc["file"]] if "file" in toc else []
    for key in ("parts", "chapters", "sections"):
        for entry in toc.get(key, ()):
            pages.extend(pages_of(entry))
    return pages


def source_of(page: str, *, book: Path) -> Path:
    """Find the file of a page of the table of contents.

    Raises:
        BuildError: Neither a notebook nor a Markdown file has this name.
    """
    for suffix in (".ipynb", ".md"):
        if (path := book / f"{page}{suffix}").is_file():
            return path
    raise BuildError(f"_toc.yml names {page!r}, but neither {page}.ipynb nor {page}.md is in {book.name}/")


def digest(paths: Iterable[Path], *, root: Path, extra: object = None) -> str:
    """Digest the names below root and the contents of files, and anything extra, as hexadecimal sha256."""
    total = hashlib.sha256(repr(extra).encode())
    for path in sorted(path for path in paths if path.is_file() and path.suffix != ".pyc"):
        total.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def code_of(path: Path) -> str:
    """Read a module, or the code cells of a notebook without magics and shell commands."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell.source for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
        text = re.sub(r"^\s*[%!].*$", "", "\n".join(cells), flags=re.MULTILINE)
    return text


@functools.cache
def named_in(code: str) -> tuple[set[str], set[str]]:
    """Collect what code imports, inside functions too (`from a import b` is a.b), and the strings in it."""
    imports: set[str] = set()
    strings: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(code)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes.extend(node.orelse)  # what only a type checker imports changes no output
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imports |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.add(node.value)
    return imports, strings


def dependencies(notebook: Path, *, root: Path) -> set[Path]:
    """List the files of the repository that a chapter's outputs depend on.

    The notebook, the pins, the parameter files, modules of hgadlib and hgadbook that it imports, by itself
    or through others, and the committed results where one of these names that folder. Data are not
    part of it: they may be large, and each run directory records its own.

    Raises:
        BuildError: The notebook or a module is no Python.
    """
    # The face of the library is lazy: its stub says which module has each of its names.
    stub, public = root / "hgadlib" / "__init__.pyi", {}
    if stub.is_file():
        froms = [node for node in ast.parse(code_of(stub)).body if isinstance(node, ast.ImportFrom)]
        public = {f"hgadlib.{a.name}": f"hgadlib.{node.module}" for node in froms for a in node.names}
    found, waiting, folders = {notebook}, [notebook], {"params"}
    while waiting:
        path = waiting.pop()
        try:
            imports, strings = named_in(code_of(path))
        except SyntaxError as error:
            raise BuildError(f"{path.relative_to(root)} is no Python: {error}") from None
        folders |= {"results"} & {text.split("/")[0] for text in strings}
        # A chapter that imports the face as a whole may use all of it.
        names = imports | set(public.values()) if "hgadlib" in imports else imports
        for name in names:
            parts = public.get(name, name).split(".")
            stems = [
                base.joinpath(*parts[:n]) for base in (root, root / "book") for n in range(1, 1 + len(parts))
            ]
            files = {file for stem in stems for file in (stem / "__init__.py", stem.with_suffix(".py"))}
            new = {file for file in files if file.is_file()} - found
            found |= new
            waiting += new
    return {*found, root / "requirements.lock", *(p for name in folders for p in (root / name).rglob("*"))}


def chapter_digest(notebook: Path, *, root: Path, parameters: dict[str, Any]) -> str:
    """Digest everything that a chapter's outputs depend on, see `dependencies`."""
    extra = (sorted(parameters.items()), sys.version_info[:2])
    return digest(dependencies(notebook, root=root), root=root, extra=extra)


def executed_digest(executed: Path) -> str | None:
    """Read the digest that an executed chapter was made from, None where there is no such chapter."""
    if not executed.is_file():
        return None
    found: str | None = nbformat.read(executed, as_version=4).metadata.get("hgad_digest")
    return found


def describe_failure(error: PapermillExecutionError, *, page: str, kept: str) -> str:
    """Tell in a few lines which cell of a chapter failed, and why."""
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    failing = re.findall(r"^-+> *\d* (.*)$", trace, flags=re.MULTILINE)
    reason = textwrap.shorten(f"{error.ename}: {error.evalue}", 6 * LINE, placeholder=" ...")
    lines = [f"chapter {page} failed in code cell [{error.exec_count}]:"]
    lines += ["    " + failing[0].strip()[: LINE - 4]] if failing else []
    lines += textwrap.wrap(reason, LINE, initial_indent="  ", subsequent_indent="    ")
    return "\n".join([*lines, f"  executed so far, with the full traceback: {kept}"])


def execute(notebook: Path, executed: Path, *, root: Path, parameters: dict[str, Any]) -> None:
    """Run one chapter by papermill from the root of the repository; the result appears whole or not at all.

    Args:
        notebook: The chapter as stored, without outputs.
        executed: Where its executed copy goes.
        root: Working directory of the chapter.
        parameters: Values for its cell tagged `parameters`.
    Raises:
        BuildError: A cell raised, or the kernel died. The copy so far is kept as NAME.failed.ipynb.
    """
    executed.parent.mkdir(parents=True, exist_ok=True)
    partial = executed.with_name(f".{executed.stem}.{os.getpid()}.ipynb")
    failed = executed.with_name(f"{executed.stem}.failed.ipynb")
    made_from = chapter_digest(notebook, root=root, parameters=parameters)
    bar = {"ncols": LINE, "leave": False} if sys.stderr.isatty() else False
    try:
        papermill.execute_notebook(
            notebook,
            partial,
            parameters=parameters,
            kernel_name="python3",
            cwd=root,
            progress_bar=bar,
            # Otherwise every kernel warns that it talks to this process over TCP.
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        done = nbformat.read(partial, as_version=4)
        done.metadata["hgad_digest"] = made_from
        nbformat.write(done, partial)
        os.replace(partial, executed)
        failed.unlink(missing_ok=True)
    except PapermillExecutionError as error:
        os.replace(partial, failed)
        kept = os.path.relpath(failed, root)
        raise BuildError(describe_failure(error, page=executed.stem, kept=kept)) from None
    except DeadKernelError:
        raise BuildError(f"chapter {executed.stem} failed: its kernel died (out of memory?)") from None
    finally:
        partial.unlink(missing_ok=True)


def pictures_of(cell: Any) -> list[Any]:
    """List the outputs of a code cell that myst-nb would show under its caption."""
    return [out for out in cell.outputs if out.output_type in ("display_data", "execute_result")]


def size_of(output: Any) -> tuple[float, float]:
    """Read width and height of a picture in CSS pixels out of its SVG; zeros where it is none."""
    sides = re.search(r'<svg [^>]*?width="([\d.]+)pt" height="([\d.]+)pt"', output.get("data", {}).get(SVG, ""))
    if sides is None:
        return 0.0, 0.0
    return float(sides[1]) * 96 / 72, float(sides[2]) * 96 / 72


def prepare_figure(cell: Any, *, page: str) -> None:
    """Give a captioned figure its text for those who do not see it, and refuse a caption without one figure.

    Args:
        cell: An executed code cell; its metadata may hold `mystnb: {figure: {name, caption}}`.
        page: Of the book, for messages.
    Raises:
        BuildError: The cell did not give exactly one figure, or its name is not one that text can refer to.
    """
    options = cell.metadata.get("mystnb", {})
    if "figure" not in options:
        return
    name, caption = (str(options["figure"].get(key, "")) for key in ("name", "caption"))
    shown = pictures_of(cell)
    if len(shown) != 1 or not {SVG, "image/png"} & set(shown[0].data):
        kinds = ", ".join(next(iter(out.data)) for out in shown) or "none"
        raise BuildError(
            f"chapter {page}: a caption belongs to a cell that gives one figure, cell {cell.id} gave: {kinds}"
        )
    if not re.fullmatch(r"fig(-[a-z0-9]+)+", name) or not caption:
        raise BuildError(f"chapter {page}: cell {cell.id} needs a caption and a name like fig-{page}-what")
    plain = re.sub(r"\{[\w:]+\}`[^`]*`|[*_`$\\{}]", "", caption)
    options.setdefault("image", {}).setdefault("alt", " ".join(plain.split()))


def run_it(page: str, parameters: dict[str, Any]) -> str:
    """Write the lines at the end of a chapter that tell how to make it again."""
    # Read from a notebook they are of its own kind of dictionary.
    given = yaml.safe_dump(json.loads(json.dumps(parameters)), default_flow_style=True, width=10_000).strip()
    values = f" -y '{given}'" if parameters else ""
    return (
        ":::{div} run-it\n"
        "In a clone of the repository this page is made by\n\n"
        f"```bash\npapermill book/{page}.ipynb out.ipynb{values}\n```\n\n"
        "and opened for changes by `make lab`. The download button has the notebook as it ran here.\n"
        ":::"
    )


def stage_notebook(executed: Path, target: Path, *, page: str) -> None:
    """Copy an executed chapter for the page, without what only a live kernel or this machine can use.

    Raises:
        BuildError: A caption has no figure, or more than one.
    """
    notebook = nbformat.read(executed, as_version=4)
    parameters = notebook.metadata.get("papermill", {}).get("parameters", {})
    for key in ("widgets", "papermill", "hgad_digest"):
        notebook.metadata.pop(key, None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata["tags"].append("hide-input")
        if cell.cell_type == "code":
            # Progress bars are widgets: a page without a kernel cannot show them.
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
            for output in cell.outputs:
                width, height = size_of(output)
                if width > max(WIDE, 1.3 * height):
                    options = cell.metadata.setdefault("mystnb", {}).setdefault("image", {})
                    options["classes"] = "wide-figure"
            prepare_figure(cell, page=page)
    notebook.cells.append(nbformat.v4.new_markdown_cell(run_it(page, parameters), id=RUN_IT))
    nbformat.write(notebook, target)


def stage(pages: Sequence[str], *, toc: dict[str, Any], root: Path, book: Path, target: Path) -> None:
    """Lay out all that the pages are built from in one fresh folder: settings, text, executed chapters."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copy(root / "_config.yml", target)
    (target / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False), encoding="utf-8")
    shutil.copy(book / "references.bib", target)
    for folder in ("figures", "assets"):
        if (book / folder).is_dir():
            shutil.copytree(book / folder, target / folder)
    for page in pages:
        source = source_of(page, book=book)
        copy = target / source.relative_to(book)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".ipynb":
            stage_notebook(book / "_executed" / source.relative_to(book), copy, page=page)
        else:
            shutil.copy(source, copy)


def render(staged: Path, html: Path, *, strict: bool = True) -> None:
    """Build the pages by Jupyter Book, warnings as errors; the old pages stay until the new ones are whole.

    Args:
        staged: Folder laid out by `stage`.
        html: Folder of the pages.
        strict: Warnings and missing references are errors. Off for a part of the book, whose references to
            the other chapters cannot be resolved.
    Raises:
        BuildError: Jupyter Book failed or warned; the message holds what it said.
    """
    made_from = digest(staged.rglob("*"), root=staged, extra=strict)
    record = html / ".digest"
    if record.is_file() and record.read_text() == made_from:
        print("pages: up to date", flush=True)
        return
    print("pages: building ...", flush=True)
    work = staged.with_name("work")
    shutil.rmtree(work, ignore_errors=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(staged)]
    command += ["--path-output", str(work), "--quiet"] + (["-W", "-n", "--keep-going"] if strict else [])
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    built = work / "_build" / "html"
    if done.returncode != 0 or not (built / "index.html").is_file():
        said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).replace(f"{staged}{os.sep}", "")
        warnings = [line for line in said.splitlines() if re.search(r"WARNING|ERROR|Error", line)]
        raise BuildError("\n".join(["the pages cannot be built:", *(warnings or said.splitlines()[-20:])]))
    (built / ".digest").write_text(made_from)
    shutil.rmtree(html, ignore_errors=True)
    html.parent.mkdir(parents=True, exist_ok=True)
    os.replace(built, html)
    shutil.rmtree(work)


def chapter_parameters(page: str, folder: Path | None) -> dict[str, Any]:
    """Read FOLDER/PAGE.yaml, the parameters of one chapter; none where there is no such file."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise BuildError(f"--params expects a folder of CHAPTER.yaml files, found no folder {folder}")
    path = folder / f"{page}.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def build(
    *,
    root: Path = ROOT,
    book: Path | None = None,
    only: Sequence[str] = (),
    fresh: bool = False,
    params: Path | None = None,
) -> Path:
    """Execute what is stale, build the pages, and return the path of the first page.

    Args:
        root: Root of the repository, the working directory of every chapter.
        book: Folder of the chapters; `root/book` unless said.
        only: Chapters to run and show; all of them unless said. A part of the book has pages of its own.
        fresh: Run chapters even when nothing they depend on has changed.
        params: Folder of CHAPTER.yaml files with parameters for the chapters, for a smaller or larger book.
    Raises:
        BuildError: A chapter or a page failed, or a name is unknown.
    """
    book = book or root / "book"
    toc = yaml.safe_load((book / "_toc.yml").read_text(encoding="utf-8"))
    pages = pages_of(toc)
    if unknown := [page for page in only if page not in pages]:
        raise BuildError(f"no chapter {', '.join(unknown)} in _toc.yml; it has {', '.join(pages)}")
    if only:
        pages = [pages[0], *(page for page in pages[1:] if page in only)]
        toc = {"format": toc["format"], "root": pages[0], "chapters": [{"file": page} for page in pages[1:]]}
    notebooks = {page: source_of(page, book=book) for page in pages}
    notebooks = {page: path for page, path in notebooks.items() if path.suffix == ".ipynb"}
    for number, (page, notebook) in enumerate(notebooks.items(), start=1):
        parameters = chapter_parameters(page, params)
        executed = book / "_executed" / f"{page}.ipynb"
        label = f"chapter {page} ({number} of {len(notebooks)})"
        if not fresh and executed_digest(executed) == chapter_digest(
            notebook, root=root, parameters=parameters
        ):
            print(f"{label}: up to date", flush=True)
            continue
        print(f"{label}: running ...", flush=True)
        start = time.monotonic()
        execute(notebook, executed, root=root, parameters=parameters)
        print(f"{label}: done in {time.monotonic() - start:.0f} s", flush=True)
    built = book / "_build" / ("part" if only else "book")
    stage(pages, toc=toc, root=root, book=book, target=built / "source")
    render(built / "source", built / "html", strict=not only)
    return built / "html" / "index.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and build; 0 when the book is whole, 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(description="Run the chapters and build the HTML book.")
    parser.add_argument("--only", action="append", default=[], metavar="CHAPTER", help="this chapter alone")
    parser.add_argument("--fresh", action="store_true", help="run chapters that are up to date as well")
    parser.add_argument("--params", type=Path, metavar="FOLDER", help="FOLDER/CHAPTER.yaml: its parameters")
    options = parser.parse_args(arguments)
    # A backend or a Jupyter setting of the user's shell must not change what the chapters show.
    os.environ.pop("MPLBACKEND", None)
    os.environ.update(JUPYTER_PLATFORM_DIRS="1", PYDEVD_DISABLE_FILE_VALIDATION="1")
    try:
        first = build(only=options.only, fresh=options.fresh, params=options.params)
    except BuildError as error:
        print(f"book: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("book: stopped; finished chapters are kept", file=sys.stderr)
        return 130
    print(f"the book's first page:\n{first}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
