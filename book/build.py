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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from plain import plain_notebooks

ROOT = Path(__file__).resolve().parents[1]
LINE = 79  # terminal columns
WIDE = 600  # CSS pixels; a wider figure scrolls on a telephone, see book.css
RUN_IT = "how-to-run"  # id of the cell at the end of each page
SVG = "image/svg+xml"
CSV = "text/csv"
SHOWN_RUNS = 3  # behind a figure, one by one; more are folded
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
    """Digest everything that a chapter's outputs depend on, see `dependencies`: its code, not its text."""
    cells = nbformat.read(notebook, as_version=4).cells
    code = [(cell.id, cell.source, tags_of(cell)) for cell in cells if cell.cell_type == "code"]
    extra = (code, sorted(parameters.items()), sys.version_info[:2])
    return digest(dependencies(notebook, root=root) - {notebook}, root=root, extra=extra)


def tags_of(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def made_from(executed: Path) -> tuple[str | None, float | None]:
    """Read what an executed chapter was made from, as a digest, and the seconds it took; None if unknown."""
    if not executed.is_file():
        return None, None
    metadata = nbformat.read(executed, as_version=4).metadata
    return metadata.get("hgad_digest"), metadata.get("hgad_seconds")


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
    start, code = time.monotonic(), chapter_digest(notebook, root=root, parameters=parameters)
    bar = {"ncols": LINE, "leave": False} if sys.stderr.isatty() else False
    try:
        papermill.execute_notebook(
            notebook,
            partial,
            parameters=parameters,
            kernel_name="python3",
            cwd=root,
            progress_bar=bar,
            # Otherwise every kernel says that it talks over TCP, and some that they end.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
        done = nbformat.read(partial, as_version=4)
        done.metadata |= {"hgad_digest": code, "hgad_seconds": round(time.monotonic() - start, 1)}
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
    sides = re.search(
        r'<svg [^>]*?width="([\d.]+)pt" height="([\d.]+)pt"', output.get("data", {}).get(SVG, "")
    )
    if sides is None:
        return 0.0, 0.0
    return float(sides[1]) * 96 / 72, float(sides[2]) * 96 / 72


def prepare_figure(cell: Any, *, page: str) -> None:
    """Give a captioned figure its text for those who do not see it, and refuse what they could not read.

    Args:
        cell: An executed code cell; its metadata may hold `mystnb: {figure: {name, caption}}`, or where the
            cell gives several figures, `mystnb: {image: {alt}}`.
        page: Of the book, for messages.
    Raises:
        BuildError: A captioned cell did not give exactly one figure, its name is not one that text can refer
            to, or a cell gave a figure without a caption or an alternative text.
    """
    options = cell.metadata.get("mystnb", {})
    shown = pictures_of(cell)
    if "figure" not in options:
        if any(SVG in out.data for out in shown) and not options.get("image", {}).get("alt"):
            raise BuildError(
                f"chapter {page}: cell {cell.id} gives a figure without a caption; add one, or a text "
                "for those who do not see it as mystnb: {image: {alt: ...}}"
            )
        return
    name, caption = (str(options["figure"].get(key, "")) for key in ("name", "caption"))
    if len(shown) != 1 or not {SVG, "image/png"} & set(shown[0].data):
        kinds = ", ".join(next(iter(out.data)) for out in shown) or "none"
        raise BuildError(
            f"chapter {page}: a caption belongs to a cell that gives one figure, cell {cell.id} gave: {kinds}"
        )
    if not re.fullmatch(r"fig(-[a-z0-9]+)+", name) or not caption:
        raise BuildError(f"chapter {page}: cell {cell.id} needs a caption and a name like fig-{page}-what")
    plain = re.sub(r"\{[\w:]+\}`[^`]*`|[*_`$\\{}]", "", caption)
    options.setdefault("image", {}).setdefault("alt", " ".join(plain.split()))


def data_and_runs(cell: Any, *, page: str, root: Path, target: Path) -> str:
    """Lay a cell's figures' data and runs beside the pages, and write the line that links them.

    Args:
        cell: An executed code cell; its figures carry their data as text/csv, and the names of committed
            records, or the paths of files and run directories below root, as `hgad_runs` in their metadata.
        page: Of the book.
        root: Of the repository.
        target: Root of the pages' sources.
    Returns:
        MyST, empty where a cell has neither.
    Raises:
        BuildError: A run is not there.
    """
    figure = cell.metadata.get("mystnb", {}).get("figure", {})
    tables, runs = list[str](), dict[str, Path]()
    for number, output in enumerate((out for out in pictures_of(cell) if SVG in out.data), start=1):
        if table := output.data.get(CSV):
            name = figure.get("name") or f"{page.replace('/', '-')}-{cell.id}-{number}"
            (target / "figure_data").mkdir(exist_ok=True)
            (target / "figure_data" / f"{name}.csv").write_text(table, encoding="utf-8")
            tables.append(
                f"{{download}}`data {f'{number} ' if tables else ''}(CSV) </figure_data/{name}.csv>`"
            )
        for name in output.metadata.get("hgad_runs", ()):
            places = (root / "results" / "runs" / f"{name}.json", root / name / "metrics.json", root / name)
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                raise BuildError(f"chapter {page}: cell {cell.id} names the run {name}, which is not there")
            runs[name] = found
    links = []
    for name, file in runs.items():
        kept = f"{Path(name).as_posix().replace('/', '-')}{'' if name.endswith(file.suffix) else file.suffix}"
        (target / "figure_runs").mkdir(exist_ok=True)
        shutil.copy(file, target / "figure_runs" / kept)
        links.append(f"{{download}}`{name.removesuffix(file.suffix)} </figure_runs/{kept}>`")
    if not tables and not links:
        return ""
    lines = [", ".join(tables + (links if len(links) <= SHOWN_RUNS else []))]
    if len(links) > SHOWN_RUNS:
        lines += [f"<details><summary>{len(links)} runs</summary>", ", ".join(links), "</details>"]
    return "\n\n".join([":::{div} figure-data", *filter(None, lines), ":::"])


def put_under_title(cells: list[Any], text: str) -> None:
    """Put a text between a chapter's title and what follows it."""
    title = next(
        cell for cell in cells if cell.cell_type == "markdown" and re.search(r"^# ", cell.source, re.M)
    )
    title.source = re.sub(r"^# .*$", lambda line: f"{line[0]}\n\n{text}", title.source, count=1, flags=re.M)


def lift_verdict(cells: list[Any], *, page: str) -> None:
    """Show the output of the cell tagged `verdict` in a box under the chapter's title, not at its own place.

    Raises:
        BuildError: There are several, or one gave something else than one Markdown text.
    """
    found = [cell for cell in cells if "verdict" in tags_of(cell)]
    if not found:
        return
    texts = [
        text for cell in found for out in cell.outputs if (text := out.get("data", {}).get("text/markdown"))
    ]
    if len(found) != 1 or len(texts) != 1 or len(found[0].outputs) != 1:
        raise BuildError(f"chapter {page}: expected one cell tagged verdict that gives one Markdown text")
    box = f":::{{admonition}} In short\n:class: verdict\n{texts[0]}\n:::"
    cells.remove(found[0])
    put_under_title(cells, box)


def with_outputs(source: Path, executed: Any) -> list[Any]:
    """Give the cells of a chapter as its file has them now, its code with the outputs of the execution.

    Only text may have changed since, see `chapter_digest`.
    """
    done = {cell.id: cell for cell in executed.cells}
    injected = [cell for cell in executed.cells if "injected-parameters" in tags_of(cell)]
    cells = []
    for cell in nbformat.read(source, as_version=4).cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = done[cell.id].outputs, done[cell.id].execution_count
        cells.append(cell)
        if "parameters" in tags_of(cell):
            cells += injected
    return cells


def in_one_line(parameters: dict[str, Any]) -> str:
    """Write parameters as YAML in one line."""
    # Read from a notebook they are of its own kind of dictionary.
    plain = json.loads(json.dumps(parameters))
    return str(yaml.safe_dump(plain, default_flow_style=True, width=10_000)).strip()


def run_it(page: str, parameters: dict[str, Any]) -> str:
    """Write the lines at the end of a chapter that tell how to make it again."""
    values = f" -y '{in_one_line(parameters)}'" if parameters else ""
    return (
        ":::{div} run-it\n"
        "In a clone of the repository this page is made by\n\n"
        f"```bash\npapermill book/{page}.ipynb out.ipynb{values}\n```\n\n"
        "and opened for changes by `make lab`. The download button has the notebook as it ran here;\n"
        f"{{download}}`in plain Markdown </plain/{page}.ipynb>` it opens in any Jupyter.\n"
        ":::"
    )


def note_parameters(cells: list[Any], parameters: dict[str, Any]) -> None:
    """Say under a chapter's title with which parameters it ran, where these are not its own."""
    note = f":::{{div}} built-with\nRun with `{in_one_line(parameters)}`; without that it takes longer.\n:::"
    put_under_title(cells, note)


def stage_notebook(source: Path, executed: Path, target: Path, *, page: str, root: Path, pages: Path) -> None:
    """Write an executed chapter for the page, without what only a live kernel or this machine can use.

    Args:
        source: The chapter as stored, whose text counts.
        executed: Its executed copy, whose outputs count.
        target: The file to write.
        page: Its name.
        root: Of the repository.
        pages: Root of the pages' sources.
    Raises:
        BuildError: A caption has no figure, or more than one; a verdict is none; a run is not there.
    """
    notebook = nbformat.read(executed, as_version=4)
    parameters = notebook.metadata.get("papermill", {}).get("parameters", {})
    for key in ("widgets", "papermill", "hgad_digest", "hgad_seconds"):
        notebook.metadata.pop(key, None)
    cells = with_outputs(source, notebook)
    if parameters:
        note_parameters(cells, parameters)
    lift_verdict(cells, page=page)
    notebook.cells = []
    for cell in cells:
        notebook.cells.append(cell)
        cell.metadata.pop("papermill", None)
        if "injected-parameters" in tags_of(cell):
            cell.metadata["tags"].append("hide-input")
        if cell.cell_type != "code":
            continue
        # Progress bars are widgets: a page without a kernel cannot show them.
        cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
        sizes = map(size_of, cell.outputs)
        if any(width > max(WIDE, 1.3 * height) for width, height in sizes):
            options = cell.metadata.setdefault("mystnb", {}).setdefault("image", {})
            options["classes"] = "wide-figure"
        prepare_figure(cell, page=page)
        if links := data_and_runs(cell, page=page, root=root, target=pages):
            notebook.cells.append(nbformat.v4.new_markdown_cell(links, id=f"{cell.id[:50]}-data"))
        for output in pictures_of(cell):
            output.data.pop(CSV, None)
    notebook.cells.append(nbformat.v4.new_markdown_cell(run_it(page, parameters), id=RUN_IT))
    nbformat.write(notebook, target)


def stage(pages: Sequence[str], *, toc: dict[str, Any], root: Path, book: Path, target: Path) -> None:
    """Lay out all that the pages are built from in one folder: settings, text, executed chapters.

    A file that has not changed keeps its time, so that its page is not built again.
    """
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    shutil.copy(root / "_config.yml", fresh)
    (fresh / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False), encoding="utf-8")
    shutil.copy(book / "references.bib", fresh)
    shutil.copytree(book / "assets", fresh / "assets")
    for page, text in plain_notebooks(pages, book=book).items():
        plain = fresh / "plain" / f"{page}.ipynb"
        plain.parent.mkdir(parents=True, exist_ok=True)
        plain.write_text(text, encoding="utf-8")
    for page in pages:
        source = source_of(page, book=book)
        copy = fresh / source.relative_to(book)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".ipynb":
            executed = book / "_executed" / source.relative_to(book)
            stage_notebook(source, executed, copy, page=page, root=root, pages=fresh)
        else:
            shutil.copy(source, copy)
    for path in fresh.rglob("*"):
        before = target / path.relative_to(fresh)
        if path.is_file() and before.is_file() and path.read_bytes() == before.read_bytes():
            os.utime(path, ns=(before.stat().st_atime_ns, before.stat().st_mtime_ns))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)


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
    sources = digest(staged.rglob("*"), root=staged, extra=strict)
    record = html / ".digest"
    if record.is_file() and record.read_text() == sources:
        print("pages: up to date", flush=True)
        return
    print("pages: building ...", flush=True)
    # Kept from build to build: it holds what Sphinx has read of the pages that have not changed.
    work = staged.with_name("work")
    # Of pages alone: Sphinx looks for other changes, such as of a style sheet, only beside a changed page.
    others = digest([path for path in staged.rglob("*") if path.suffix not in (".ipynb", ".md")], root=staged)
    kept_of = work / ".digest"
    if not kept_of.is_file() or kept_of.read_text() != others:
        shutil.rmtree(work, ignore_errors=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(staged)]
    command += ["--path-output", str(work), "--quiet"] + (["-W", "-n", "--keep-going"] if strict else [])
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    built = work / "_build" / "html"
    if done.returncode != 0 or not (built / "index.html").is_file():
        # A page that was read with a warning would not warn again.
        shutil.rmtree(work, ignore_errors=True)
        said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).replace(f"{staged}{os.sep}", "")
        warnings = [line for line in said.splitlines() if re.search(r"WARNING|ERROR|Error", line)]
        raise BuildError("\n".join(["the pages cannot be built:", *(warnings or said.splitlines()[-20:])]))
    kept_of.write_text(others)
    new = html.with_name(f".{html.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(built, new)
    for page in new.rglob("*.html"):
        # From file:// no font can be fetched ahead of its style sheet, which has it all the same.
        text = page.read_text(encoding="utf-8")
        page.write_text(re.sub(r'<link rel="preload" as="font"[^>]*>\n?', "", text), encoding="utf-8")
    (new / ".digest").write_text(sources)
    shutil.rmtree(html, ignore_errors=True)
    os.replace(new, html)


def duration(seconds: float) -> str:
    """Write a duration as people say it.

    >>> duration(8.2), duration(59.6), duration(150)
    ('8 s', '60 s', '2.5 min')
    """
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def chapter_parameters(page: str, folder: Path | None) -> dict[str, Any]:
    """Read FOLDER/PAGE.yaml, the parameters of one chapter; none where there is no such file."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise BuildError(f"--params expects a folder of CHAPTER.yaml files, found no folder {folder}")
    path = folder / f"{page}.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def run_chapters(
    pages: Sequence[str],
    rules: Mapping[str, Mapping[str, Any]],
    expected: Mapping[str, float],
    work: Callable[[str], None],
    *,
    jobs: int,
) -> None:
    """Run chapters, several at a time where their rules allow it, and say how far it is.

    Args:
        pages: In reading order.
        rules: What a notebook's metadata has under "book": "after" names chapters whose runs it takes up,
            "alone" says that it shows durations, which others must not lengthen.
        expected: Seconds of each, 0 where not known.
        work: Runs one; called in threads.
        jobs: Chapters at a time.
    Raises:
        BuildError: A chapter failed. Those that ran beside it have come to their end.
    """
    waiting, running, start = list(pages), dict[Future[None], str](), dict[str, float]()
    # Those that run alone first: nothing runs yet, and then nothing has to wait for them.
    waiting.sort(key=lambda page: not rules[page].get("alone"))
    cores, threads = os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS")

    def startable(page: str) -> bool:
        before = set(rules[page].get("after", ()))
        others = set(running.values())
        alone = any(rules[one].get("alone") for one in ({page} | others if others else ()))
        return not (alone or before & {*waiting, *others}) and len(others) < jobs

    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for page in [*waiting]:
                if startable(page):
                    if threads is None:
                        share = cores if rules[page].get("alone") else max(1, cores // jobs)
                        os.environ["OMP_NUM_THREADS"] = str(share)
                    about = f", about {duration(expected[page])}" if expected[page] else ""
                    print(f"chapter {page}: running{about} ...", flush=True)
                    waiting.remove(page)
                    start[page] = time.monotonic()
                    running[pool.submit(work, page)] = page
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                page = running.pop(done)
                try:
                    done.result()
                except BuildError:
                    if running:
                        print(
                            f"chapter {page}: failed; {', '.join(running.values())} still running", flush=True
                        )
                    raise
                seconds = duration(time.monotonic() - start[page])
                count = f"{len(pages) - len(waiting) - len(running)} of {len(pages)}"
                left = sum(expected[one] for one in waiting) / jobs
                rest = f", about {duration(left)} left" if left else ""
                print(f"chapter {page}: done in {seconds} ({count}{rest})", flush=True)
    if threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)


def build(
    *,
    root: Path = ROOT,
    book: Path | None = None,
    only: Sequence[str] = (),
    fresh: bool = False,
    params: Path | None = None,
    jobs: int = 1,
) -> Path:
    """Execute what is stale, build the pages, and return the path of the first page.

    Args:
        root: Root of the repository, the working directory of every chapter.
        book: Folder of the chapters; `root/book` unless said.
        only: Chapters to run and show; all of them unless said. A part of the book has pages of its own.
        fresh: Run chapters even when nothing they depend on has changed.
        params: Folder of CHAPTER.yaml files with parameters for the chapters, for a smaller or larger book.
        jobs: Chapters that run at a time.
    Raises:
        BuildError: A chapter or a page failed, or a name is unknown.
    """
    book = book or root / "book"
    toc = yaml.safe_load((book / "_toc.yml").read_text(encoding="utf-8"))
    pages = pages_of(toc)
    if unknown := [page for page in only if page not in pages]:
        raise BuildError(f"no chapter {', '.join(unknown)} in _toc.yml; it has {', '.join(pages)}")
    if only:
        pages = [page for page in pages if page in only]
        rest = {"chapters": [{"file": page} for page in pages[1:]]} if pages[1:] else {}
        toc = {"format": toc["format"], "root": pages[0], **rest}
    notebooks = {page: source_of(page, book=book) for page in pages}
    notebooks = {page: path for page, path in notebooks.items() if path.suffix == ".ipynb"}
    given = {page: chapter_parameters(page, params) for page in notebooks}
    copies = {page: book / "_executed" / f"{page}.ipynb" for page in notebooks}
    known = {page: made_from(copy) for page, copy in copies.items()}
    stale = [
        page for page, notebook in notebooks.items()
        if fresh or known[page][0] != chapter_digest(notebook, root=root, parameters=given[page])
    ]  # fmt: skip
    # What a chapter took before on this machine; else what it took on two cores, by its usual parameters.
    usual = json.loads((book / "seconds.json").read_text()) if (book / "seconds.json").is_file() else {}
    expected = {page: known[page][1] or float(usual.get(page, 0)) for page in notebooks}
    for page in notebooks:
        if page not in stale:
            print(f"chapter {page}: up to date", flush=True)

    def work(page: str) -> None:
        execute(notebooks[page], copies[page], root=root, parameters=given[page])

    rules = {page: nbformat.read(notebooks[page], as_version=4).metadata.get("book", {}) for page in stale}
    run_chapters(stale, rules, expected, work, jobs=jobs)
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
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="chapters at a time"
    )
    options = parser.parse_args(arguments)
    # A backend or a Jupyter setting of the user's shell must not change what the chapters show.
    os.environ.pop("MPLBACKEND", None)
    os.environ.update(JUPYTER_PLATFORM_DIRS="1", PYDEVD_DISABLE_FILE_VALIDATION="1")
    try:
        first = build(only=options.only, fresh=options.fresh, params=options.params, jobs=options.jobs)
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
