"""book/build.py: chapters run when stale, failures are clear, pages need no other server."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import nbformat
import pytest
import yaml

pytest.importorskip("papermill", reason="needs the extra: book")
pytest.importorskip("jupyter_book", reason="needs the extra: book")

ROOT = Path(__file__).parents[1]
FIRST_PAGE = """(first)=
# First page

Inline $\\mu_y$, {cite}`yao2024hgad` and {eq}`eq-first`, continued in {doc}`chapter`.

```{math}
:label: eq-first
\\mathcal{L} = \\sum_y w_y
```

```{bibliography}
```
"""


CAPTION = "A *line* of $x$, see {numref}`fig-chapter-line`."
FIGURE = """import matplotlib.pyplot as plt
plt.plot([1, 2])
plt.show()
print('beside the figure')"""
# As hgadbook.setup makes them: SVG, with data and runs.
DRAWN = """from IPython.display import display
svg = '<svg xmlns="http://www.w3.org/2000/svg" width="720pt" height="72pt"></svg>'
display({'image/svg+xml': svg, 'text/csv': 'x,y\\n1,2\\n', 'text/plain': 'a figure'}, raw=True,
        metadata={'hgad_runs': ['one-hgad-seed0', 'runs/here']})"""
VERDICT = """from IPython.display import Markdown
Markdown("- It **holds**, see {ref}`first`.")"""


def load_build() -> ModuleType:
    sys.path.append(str(ROOT / "book"))  # as where it is run as a program
    spec = importlib.util.spec_from_file_location("hgad_book_build", ROOT / "book" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


def write_chapter(
    path: Path, *code: str, captions: dict[int, tuple[str, str]] | None = None, text: str = "Back to"
) -> None:
    cells = [
        nbformat.v4.new_markdown_cell("(chapter)=\n# A chapter\n\n$$a^2 = b$$\n\n" + text + " {ref}`first`.")
    ]
    cells.append(nbformat.v4.new_code_cell("size = 1", metadata={"tags": ["parameters"]}, id="parameters"))
    for number, source in enumerate(code, start=1):
        name, caption = (captions or {}).get(number, ("", ""))
        metadata: dict[str, Any] = {"tags": ["verdict"] if source == VERDICT else []}
        if name:
            metadata["mystnb"] = {"figure": {"name": name, "caption": caption}}
        cells.append(nbformat.v4.new_code_cell(source, metadata=metadata, id=f"code-{number}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


class Scratch:
    """A repository with a book of two pages, built once."""

    def __init__(self, root: Path) -> None:
        self.root, self.book = root, root / "book"
        self.chapter = self.book / "chapter.ipynb"
        self.executed = self.book / "_executed" / "chapter.ipynb"
        self.book.mkdir()
        (root / "hgadlib").mkdir()
        (root / "hgadlib" / "__init__.py").write_text("")
        for name in ("_config.yml", "requirements.lock", "book/references.bib"):
            shutil.copy(ROOT / name, root / name)
        shutil.copytree(ROOT / "book" / "assets", self.book / "assets")
        (self.book / "_toc.yml").write_text("format: jb-book\nroot: first\nchapters:\n  - file: chapter\n")
        (self.book / "first.md").write_text(FIRST_PAGE)
        write_chapter(
            self.chapter,
            "import os, sys\nfrom tqdm.notebook import tqdm\n"
            "for _ in tqdm(range(2)):\n    pass\n"
            "print('size', size, os.path.basename(os.getcwd()))\n"
            "print('-'.join(['from', 'stderr']), file=sys.stderr)",
            FIGURE,
            "import pandas as pd\npd.DataFrame({'nats': [0.5, 12.25], 'what': ['a ' * 90, 'b']})",
            DRAWN,
            VERDICT,
            captions={2: ("fig-chapter-line", CAPTION), 4: ("fig-chapter-drawn", "Drawn.")},
        )
        for run in ("results/runs/one-hgad-seed0.json", "runs/here/metrics.json"):
            (root / run).parent.mkdir(parents=True)
            (root / run).write_text(f'{{"of": "{run}"}}')
        self.page: Path = build.build(root=root)

    def text(self, page: str) -> str:
        return (self.page.parent / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scratch]:
    yield Scratch(tmp_path_factory.mktemp("repository"))


class Loaded(HTMLParser):
    """Collect what a page loads by itself, what it links to, its anchors, and the text of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.scripts: list[str] = []
        self.in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.in_script = tag == "script"
        for name, value in attrs:
            if value and name in ("id", "name"):
                self.anchors.add(value)
            if value and tag == "a" and name == "href":
                self.links.append(value)
            if value and ((tag == "link" and name == "href") or name in ("src", "srcset", "data", "poster")):
                self.addresses.append(value)

    def handle_data(self, data: str) -> None:
        if self.in_script:
            self.scripts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False


def test_chapter_runs_at_the_root_and_shows_its_output(scratch: Scratch) -> None:
    assert f"size 1 {scratch.root.name}" in scratch.text("chapter.html")


def test_progress_bars_and_stderr_stay_out_of_the_page(scratch: Scratch) -> None:
    assert "jupyter.widget-view" in scratch.executed.read_text()
    page = scratch.text("chapter.html")
    assert "widget" not in page
    assert "from-stderr" not in page


def test_no_page_loads_anything_from_another_server(scratch: Scratch) -> None:
    pages = sorted(scratch.page.parent.glob("*.html"))
    assert {page.name for page in pages} >= {"index.html", "first.html", "chapter.html", "search.html"}
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        outside = [a for a in loaded.addresses if re.match(r"(https?:)?//", a)]
        outside += [a for script in loaded.scripts for a in re.findall(r"https?://[^\s\"']+", script)]
        assert outside == [], f"{page.name} loads {outside}"
        for address in loaded.addresses:
            if not re.match(r"data:|#", address):
                file = page.parent / re.split(r"[?#]", address)[0]
                assert file.is_file(), f"{page.name} loads {address}, which is not there"


def broken_links(html: Path) -> list[str]:
    """List links of built pages to files or anchors that are not there."""
    pages = {}
    for path in sorted(html.rglob("*.html")):
        pages[path] = Loaded()
        pages[path].feed(path.read_text(encoding="utf-8"))
    broken = []
    for path, page in pages.items():
        for link in page.links:
            address, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:|//", address):
                continue
            target = (path.parent / unquote(address.split("?")[0])).resolve() if address else path
            found = target.is_file() and (
                target not in pages or not anchor or anchor in pages[target].anchors
            )
            if not found:
                broken.append(f"{path.relative_to(html)}: {link}")
    return broken


def test_no_link_is_broken(scratch: Scratch) -> None:
    html = scratch.page.parent.resolve()
    pages = [path.read_text(encoding="utf-8") for path in html.glob("*.html")]
    assert sum(page.count("<a ") for page in pages) > 20
    assert broken_links(html) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<p id="here"></p><a href="#here"></a><a href="b.html#there"></a><a href="https://x.org/q"></a>'
        '<a href="#nowhere"></a><a href="b.html#nowhere"></a><a href="c.html"></a>'
    )
    (tmp_path / "b.html").write_text('<p id="there"></p>')
    assert broken_links(tmp_path) == ["a.html: #nowhere", "a.html: b.html#nowhere", "a.html: c.html"]


def test_a_figure_has_its_caption_number_and_alternative_text(scratch: Scratch) -> None:
    page = scratch.text("chapter.html")
    figure = re.search(r'<figure [^>]*id="fig-chapter-line">(.*?)</figure>', page, flags=re.DOTALL)
    assert figure is not None
    assert 'alt="A line of x, see ."' in figure[1]
    assert "Figure 1" in figure[1] and "<em>line</em>" in figure[1]
    assert page.count("<figure ") == 2
    assert "beside the figure" in page.replace(figure[1], "")


@pytest.mark.parametrize(
    ("code", "name", "said"),
    [
        ("print('no figure')", "fig-chapter-none", "cell .* gave: none"),
        (f"{FIGURE}\n{FIGURE}", "fig-chapter-two", "cell .* gave: image/png, image/png"),
        ("1 + 1", "fig-chapter-table", "cell .* gave: text/plain"),
        (FIGURE, "Line", "needs a caption and a name like fig-chapter-what"),
    ],
)
def test_a_caption_without_its_figure_is_refused(code: str, name: str, said: str) -> None:
    kinds = {"image/png": "AAAA", "text/plain": "x"}
    count = code.count("plt.show()")
    shown = ["image/png"] * count if count else ["text/plain"] if code == "1 + 1" else []
    outputs = [nbformat.v4.new_output("display_data", data={kind: kinds[kind]}) for kind in shown]
    metadata = {"mystnb": {"figure": {"name": name, "caption": "A caption."}}}
    cell = nbformat.v4.new_code_cell(code, metadata=metadata, outputs=outputs)
    with pytest.raises(build.BuildError, match=said):
        build.prepare_figure(cell, page="chapter")


def test_a_figure_without_words_is_refused() -> None:
    output = nbformat.v4.new_output("display_data", data={"image/svg+xml": "<svg></svg>"})
    cell = nbformat.v4.new_code_cell("draw()", outputs=[output])
    with pytest.raises(build.BuildError, match="gives a figure without a caption"):
        build.prepare_figure(cell, page="chapter")
    cell.metadata["mystnb"] = {"image": {"alt": "A line."}}
    build.prepare_figure(cell, page="chapter")


def test_a_figure_links_its_data_and_its_runs(scratch: Scratch) -> None:
    page = scratch.text("chapter.html")
    links = re.findall(r'<a class="reference download internal"[^>]*href="([^"]+)"', page)
    found = {Path(link).name: (scratch.page.parent / link).read_text() for link in links}
    assert found["fig-chapter-drawn.csv"] == "x,y\n1,2\n"
    assert found["one-hgad-seed0.json"] == '{"of": "results/runs/one-hgad-seed0.json"}'
    assert found["runs-here.json"] == '{"of": "runs/here/metrics.json"}'


def test_many_runs_are_folded_and_one_that_is_not_there_is_refused(tmp_path: Path) -> None:
    names = [f"run-{k}" for k in range(5)]
    output = nbformat.v4.new_output(
        "display_data", data={"image/svg+xml": "<svg></svg>"}, metadata={"hgad_runs": names}
    )
    cell = nbformat.v4.new_code_cell("draw()", outputs=[output])
    (tmp_path / "results" / "runs").mkdir(parents=True)
    for name in names[:4]:
        (tmp_path / "results" / "runs" / f"{name}.json").write_text("{}")
    with pytest.raises(build.BuildError, match=r"names the run run-4, which is not there"):
        build.data_and_runs(cell, page="a", root=tmp_path, target=tmp_path)
    output.metadata["hgad_runs"] = names[:4]
    assert "<summary>4 runs</summary>" in build.data_and_runs(cell, page="a", root=tmp_path, target=tmp_path)
    output.metadata["hgad_runs"] = names[:3]
    assert "<summary>" not in build.data_and_runs(cell, page="a", root=tmp_path, target=tmp_path)


def test_the_verdict_stands_under_the_title(scratch: Scratch) -> None:
    page = scratch.text("chapter.html").partition("</head>")[2]
    title, verdict, text = (
        page.index(mark) for mark in ("<h1>A chapter", "<strong>holds</strong>", "a^2 = b")
    )
    assert title < verdict < text
    assert page.count("<strong>holds</strong>") == 1 and "Markdown(" not in re.sub(r"<[^>]*>", "", page)
    cell = nbformat.v4.new_code_cell("1", metadata={"tags": ["verdict"]})
    with pytest.raises(build.BuildError, match="one cell tagged verdict that gives one Markdown text"):
        build.lift_verdict([cell], page="chapter")


def test_a_change_of_text_runs_no_chapter_again(scratch: Scratch, capsys: pytest.CaptureFixture[str]) -> None:
    stored, executed = scratch.chapter.read_bytes(), scratch.executed.read_bytes()
    other = scratch.book / "_build" / "book" / "work" / "_build" / ".doctrees" / "first.doctree"
    before = other.stat().st_mtime_ns
    scratch.chapter.write_bytes(stored.replace(b"Back to", b"Again back to"))
    try:
        build.build(root=scratch.root)
        assert "Again back to" in scratch.text("chapter.html") and "size 1" in scratch.text("chapter.html")
        said = capsys.readouterr().out
        assert "chapter chapter: up to date" in said and "pages: building" in said
        assert scratch.executed.read_bytes() == executed
        assert other.stat().st_mtime_ns == before
    finally:
        scratch.chapter.write_bytes(stored)
        build.build(root=scratch.root)


def test_a_chapter_says_how_to_make_it_again(scratch: Scratch) -> None:
    words = re.sub(r"<[^>]*>", "", scratch.text("chapter.html"))
    assert "papermill book/chapter.ipynb out.ipynb" in words
    assert "papermill" not in scratch.text("first.html")
    given = build.run_it("train", {"dataset": "demo", "overrides": {"loss.lambda2": 10}})
    assert "book/train.ipynb out.ipynb -y '{dataset: demo, overrides: {loss.lambda2: 10}}'" in given


def test_the_style_sheet_of_the_book_is_loaded(scratch: Scratch) -> None:
    for page in ("first.html", "chapter.html"):
        assert re.search(r'href="_static/book\.css\?v=', scratch.text(page))


def test_no_style_sheet_loads_anything_from_another_server(scratch: Scratch) -> None:
    sheets = sorted(scratch.page.parent.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(url\(\s*['\"]?|@import\s+['\"])(https?:)?//", text), sheet.name


def test_mathjax_and_its_fonts_lie_beside_the_pages(scratch: Scratch) -> None:
    for page in ("first.html", "chapter.html"):
        scripts = re.findall(r'<script[^>]*src="([^"?]*mathjax[^"?]*\.js)', scratch.text(page))
        assert len(scripts) == 1, f"{page} loads {scripts}"
        mathjax = scratch.page.parent / scripts[0]
        assert mathjax.stat().st_size > 100_000
        assert len(list(mathjax.parent.rglob("*.woff"))) >= 10
    assert "\\mathcal{L}" in scratch.text("first.html")


def test_citation_and_equation_are_resolved(scratch: Scratch) -> None:
    page = scratch.text("first.html")
    assert "Xincheng Yao" in page
    assert 'href="#equation-eq-first"' in page


def test_second_call_repeats_nothing(scratch: Scratch, capsys: pytest.CaptureFixture[str]) -> None:
    files = [scratch.executed, scratch.page]
    before = [path.stat().st_mtime_ns for path in files]
    assert build.build(root=scratch.root) == scratch.page
    assert [path.stat().st_mtime_ns for path in files] == before
    assert "up to date" in capsys.readouterr().out


class Changes:
    """A repository of a chapter and some modules; says whether the chapter has to run again."""

    def __init__(self, root: Path, chapter: str) -> None:
        self.root, self.seen = root, set[str]()
        self.write("hgadlib/__init__.py", "")
        self.write("requirements.lock", "1")
        (root / "book").mkdir()
        write_chapter(root / "book" / "a.ipynb", chapter)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def stale(self, **parameters: Any) -> bool:
        notebook = self.root / "book" / "a.ipynb"
        digest = build.chapter_digest(notebook, root=self.root, parameters=parameters)
        new = digest not in self.seen
        self.seen.add(digest)
        return new


def test_a_chapter_runs_again_when_notebook_pins_or_parameters_change(tmp_path: Path) -> None:
    changes = Changes(tmp_path, "1 + 1")
    assert changes.stale() and not changes.stale()
    write_chapter(tmp_path / "book" / "a.ipynb", "1 + 2")
    assert changes.stale()
    write_chapter(tmp_path / "book" / "a.ipynb", "1 + 2", text="Forth to")
    assert not changes.stale()
    for name in ("requirements.lock", "params/demo.yaml"):
        changes.write(name, "changed")
        assert changes.stale(), name
    assert changes.stale(epochs=2)


@pytest.mark.parametrize(
    ("module", "again"),
    [
        ("hgadlib/runs/__init__.py", True),  # runs when a module of its package does
        ("hgadlib/runs/record.py", True),
        ("hgadlib/flow.py", True),  # two steps away, imported inside a function
        ("book/hgadbook/a.py", True),
        ("hgadlib/model.py", True),  # through the lazy face
        ("hgadlib/runs/grid.py", False),
        ("hgadlib/detector.py", False),  # in the face, not asked for
        ("hgadlib/types.py", False),  # for the type checker
        ("book/hgadbook/b.py", False),
        ("hgadlib/runs/record.pyc", False),
    ],
)
def test_a_chapter_runs_again_when_a_module_that_it_imports_changes(
    tmp_path: Path, module: str, again: bool
) -> None:
    changes = Changes(tmp_path, "%matplotlib inline\nfrom hgadbook import a\nfrom hgadlib import HGAD, runs")
    changes.write("hgadlib/__init__.pyi", "from .model import HGAD as HGAD\nfrom .detector import Detector")
    changes.write("hgadlib/runs/record.py", "def late():\n    import numpy, hgadlib.flow")
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hgadlib import types"
    changes.write("book/hgadbook/a.py", f"{types}\nfrom hgadlib.runs.record import late")
    for name in ("model", "detector", "runs/__init__", "runs/grid", "flow", "types"):
        changes.write(f"hgadlib/{name}.py", "")
    assert changes.stale()
    changes.write(module, "changed = 1")
    assert changes.stale() is again


@pytest.mark.parametrize(("code", "again"), [("folder = 'results/runs'", True), ("result = 1", False)])
def test_results_count_where_they_are_read(tmp_path: Path, code: str, again: bool) -> None:
    changes = Changes(tmp_path, "import hgadlib.runs")
    changes.write("hgadlib/runs.py", code)
    assert changes.stale()
    changes.write("results/runs/one.json", "{}")
    assert changes.stale() is again


def test_a_chapter_that_is_no_python_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match=r"^book/a\.ipynb is no Python: .*line"):
        Changes(tmp_path, "for x in").stale()


def test_failing_chapter_is_told_in_a_few_lines_and_the_good_copy_stays(scratch: Scratch) -> None:
    good, stored = scratch.executed.read_bytes(), scratch.chapter.read_bytes()
    write_chapter(scratch.chapter, "fine = 1", "raise ValueError('no dataset foo; choose demo or elpv')")
    try:
        with pytest.raises(build.BuildError) as caught:
            build.build(root=scratch.root)
    finally:
        scratch.chapter.write_bytes(stored)
    lines = str(caught.value).splitlines()
    assert lines[0] == "chapter chapter failed in code cell [3]:"
    assert lines[1].strip().startswith("raise ValueError(")
    assert lines[2].strip() == "ValueError: no dataset foo; choose demo or elpv"
    assert len(lines) == 4 and max(map(len, lines)) < 80
    assert scratch.executed.read_bytes() == good
    left = {path.name for path in scratch.executed.parent.iterdir()}
    assert left == {"chapter.ipynb", "chapter.failed.ipynb"}


def test_warning_stops_the_build_and_the_old_pages_stay(scratch: Scratch) -> None:
    page = scratch.book / "first.md"
    before = scratch.text("first.html")
    page.write_text(FIRST_PAGE + "\n{ref}`nowhere`\n")
    try:
        with pytest.raises(build.BuildError, match=r"first\.md:\d+: WARNING: .*nowhere"):
            build.build(root=scratch.root)
    finally:
        page.write_text(FIRST_PAGE)
    assert scratch.text("first.html") == before


def test_parameters_of_a_chapter_come_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("epochs: 2\n")
    assert build.chapter_parameters("train", tmp_path) == {"epochs": 2}
    assert build.chapter_parameters("other", tmp_path) == {}
    assert build.chapter_parameters("train", None) == {}
    with pytest.raises(build.BuildError, match="expects a folder"):
        build.chapter_parameters("train", tmp_path / "missing")


def test_pages_are_listed_in_reading_order() -> None:
    toc = {
        "root": "intro",
        "parts": [
            {"caption": "A", "chapters": [{"file": "a", "sections": [{"file": "a/x"}, {"file": "a/y"}]}]},
            {"caption": "B", "chapters": [{"file": "b"}]},
        ],
    }
    assert build.pages_of(toc) == ["intro", "a", "a/x", "a/y", "b"]


def test_unknown_chapter_is_one_line(scratch: Scratch) -> None:
    with pytest.raises(build.BuildError, match=r"^no chapter trian in _toc.yml; it has first, chapter$"):
        build.build(root=scratch.root, only=["trian"])
    with pytest.raises(build.BuildError, match=r"neither missing\.ipynb nor missing\.md"):
        build.source_of("missing", book=scratch.book)


def toc_pages() -> list[str]:
    pages: list[str] = build.pages_of(yaml.safe_load((ROOT / "book" / "_toc.yml").read_text()))
    return pages


@pytest.mark.parametrize("page", toc_pages())
def test_every_page_of_the_book_has_a_target_and_one_title(page: str) -> None:
    source = build.source_of(page, book=ROOT / "book")
    if source.suffix == ".md":
        cells = [source.read_text(encoding="utf-8")]
    else:
        notebook = nbformat.read(source, as_version=4)
        cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
        tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
        assert tags.count("parameters") == 1
        assert notebook.metadata.kernelspec.name == "python3"
    text = re.sub(r"^(`{3,}|:{3,}).*?^\1", "", "\n\n".join(cells), flags=re.MULTILINE | re.DOTALL)
    assert re.search(r"^\([\w-]+\)=\n+# ", text, flags=re.MULTILINE), "no target above the title"
    assert len(re.findall(r"^# ", text, flags=re.MULTILINE)) == 1


def test_every_notebook_is_in_the_table_of_contents() -> None:
    book = ROOT / "book"
    found = {path.relative_to(book).with_suffix("").as_posix() for path in book.rglob("*.ipynb")}
    found = {name for name in found if not re.search(r"(^|/)[_.]", name)}
    # explore is for JupyterLab: its widgets need a live kernel.
    assert found - {"explore"} <= set(toc_pages())


def test_the_first_page_lists_every_chapter() -> None:
    root, *chapters = toc_pages()
    cells = nbformat.read(ROOT / "book" / f"{root}.ipynb", as_version=4).cells
    text = "\n\n".join(cell.source for cell in cells)
    listed = re.findall(r"^\| \{doc\}`([\w/]+)` \|", text, flags=re.MULTILINE)
    assert set(chapters) <= set(listed)
    # Chapters that are read in the book's order are found in it.
    assert [page for page in listed if page in chapters] == chapters


def test_source_has_no_folder_named_static() -> None:
    assert not [path for path in (ROOT / "book").rglob("_static") if "_build" not in path.parts]


def test_chapters_run_side_by_side_as_their_rules_allow(capsys: pytest.CaptureFixture[str]) -> None:
    rules = {
        "a": {},
        "b": {"after": ["a"]},
        "c": {},
        "d": {"alone": True},
        "e": {"alone": True, "after": ["d"]},
    }
    rules["first"] = {"after": ["a", "b", "c", "d", "e"]}
    running, seen, order = set[str](), dict[str, set[str]](), list[str]()

    def work(page: str) -> None:
        running.add(page)
        order.append(page)
        time.sleep(0.05)
        for one in running:
            seen.setdefault(one, set()).update(running)
        running.discard(page)

    build.run_chapters(list(rules), rules, dict.fromkeys(rules, 60.0), work, jobs=2)
    assert sorted(order) == sorted(rules) and order[-1] == "first"
    assert seen["d"] == {"d"} and seen["e"] == {"e"} and seen["first"] == {"first"}
    assert order.index("d") < order.index("e") and order.index("a") < order.index("b")
    assert seen["a"] == {"a", "c"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "chapter d: running, about 60 s ..."
    assert re.fullmatch(r"chapter d: done in 0 s \(1 of 6, about 2\.5 min left\)", lines[1])
    assert lines[-1] == "chapter first: done in 0 s (6 of 6)" and max(map(len, lines)) < 80


def test_a_failing_chapter_lets_the_one_beside_it_end() -> None:
    ended = []

    def work(page: str) -> None:
        if page == "a":
            raise build.BuildError("a failed")
        time.sleep(0.1)
        ended.append(page)

    with pytest.raises(build.BuildError, match="a failed"):
        build.run_chapters(
            ["a", "b", "c"], {"a": {}, "b": {}, "c": {}}, dict.fromkeys("abc", 0.0), work, jobs=2
        )
    assert ended == ["b"]


def test_rules_of_chapters_name_chapters() -> None:
    for page in toc_pages():
        source = build.source_of(page, book=ROOT / "book")
        if source.suffix == ".ipynb":
            rules = nbformat.read(source, as_version=4).metadata.get("book", {})
            assert set(rules) <= {"after", "alone"} and set(rules.get("after", ())) <= set(toc_pages())
