"""book/deliver.py: the pages joined for print, notebooks in plain Markdown, files that appear whole."""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("jupyter_book", reason="needs the extra: book")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "book"))
import deliver  # noqa: E402
import plain  # noqa: E402

PLACES = {
    "a": ("a", "First"),
    "deep/b": ("deep/b", "Second"),
    "part": ("a", "A part"),
    "eq-one": ("a", "equation one"),
}
WORKS = {"yao2024hgad": "Yao et al., Hierarchical, 2024"}


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("a", "(part)=\n## A part\n\nText.", "## A part\n\nText."),
        ("a", "See {doc}`deep/b`.", "See [Second](deep/b.ipynb)."),
        ("deep/b", "See {doc}`../a` and {ref}`so <part>`.", "See [First](../a.ipynb) and [so](../a.ipynb)."),
        ("a", "By {eq}`eq-one`, {numref}`fig-x`.", "By [equation one](a.ipynb), fig-x."),
        ("a", "HGAD {cite:p}`yao2024hgad`.", "HGAD (Yao et al., Hierarchical, 2024)."),
        ("a", "Math $x_1$ and `code`.", "Math $x_1$ and `code`."),
        ("a", "```{math}\n:label: eq-one\nx = 1\n```\nThen", "$$\nx = 1\n$$\nThen"),
        ("a", ":::{admonition} Mind\n:class: tip\nThis.\n:::", "**Mind**\n\nThis."),
        ("a", "::::{a} X\n\n:::{b} Y\nInner\n:::\n::::", "**X**\n\n**Y**\n\nInner"),
        ("a", "```bash\nmake book\n```", "```bash\nmake book\n```"),
    ],
)
def test_myst_becomes_plain_markdown(page: str, text: str, expected: str) -> None:
    assert plain.plain_markdown(text, page=page, places=PLACES, works=WORKS) == expected


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks")
    deliver.pack_notebooks(deliver.chapters(), folder / "n.zip")
    with zipfile.ZipFile(folder / "n.zip") as archive:
        archive.extractall(folder)
    return folder / "hgad"


def test_packed_notebooks_hold_no_myst_and_what_they_need(unpacked: Path) -> None:
    notebooks = sorted((unpacked / "book").rglob("*.ipynb"))
    assert len(notebooks) > 15
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert notebook.cells[1].id == "install"
        texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
        left = re.findall(r"\{[\w:-]+\}`[^`]*`|^:{3,}.*|^`{3,}\{.*|^\([\w-]+\)=", "\n".join(texts), re.M)
        assert left == [], path.name
        for target in re.findall(r"\]\(([^)#]+\.ipynb)\)", "\n".join(texts)):
            assert (path.parent / target).is_file(), f"{path.name}: {target}"
    for name in (
        "pyproject.toml",
        "params/demo.yaml",
        "results/paper/table1.csv",
        "book/hgadbook/__init__.py",
    ):
        assert (unpacked / name).is_file(), name
    assert not list(unpacked.rglob("__pycache__"))


@pytest.mark.slow
def test_a_packed_notebook_runs(unpacked: Path, tmp_path: Path) -> None:
    papermill = pytest.importorskip("papermill", reason="needs the extra: book")
    chapter = unpacked / "book" / "ablations" / "criterion.ipynb"
    papermill.execute_notebook(chapter, tmp_path / "out.ipynb", cwd=chapter.parent, progress_bar=False)


def test_joined_pages_lead_to_each_other(tmp_path: Path) -> None:
    head = '<head><link rel="stylesheet" href="s.css"></head>'
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.html").write_text(
        f'<html>{head}<body><article><h1>First<a class="headerlink" href="#x">#</a></h1><p id="x">'
        '<a href="deep/b.html#y">there</a> <a href="#x">here</a> <a href="data.csv">file</a>'
        '<a href="https://x.org/#q">out</a></p></article></body></html>'
    )
    (tmp_path / "deep" / "b.html").write_text(
        f'<html>{head}<body><article><h1>Second</h1><p id="y"><img src="../_images/i.svg">'
        '<a href="../a.html">back</a></p></article></body></html>'
    )
    page = deliver.joined(tmp_path, ["a", "deep/b"])
    anchors = set(re.findall(r'id="([^"]+)"', page))
    links = re.findall(r'href="#([^"]+)"', page)
    assert len(links) == 5 and set(links) <= anchors
    assert "data.csv" not in page and 'href="https://x.org/#q"' in page and 'src="_images/i.svg"' in page
    assert page.index("First") < page.index("Second") and "headerlink" not in page.partition("</style>")[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium: the program chromium")
def test_the_pdf_has_pages_an_outline_and_links(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.html").write_text(
            f"<html><head></head><body><article><h1>{name}</h1>"
            f'<a href="{other}.html">{other}</a></article></body></html>'
        )
    deliver.print_book(tmp_path, ["a", "b"], tmp_path / "book.pdf")
    data = (tmp_path / "book.pdf").read_bytes()
    assert len(re.findall(rb"/Type /Page\b", data)) == 3
    assert b"/Outlines" in data and data.count(b"/Subtype /Link") == 4
    assert not (tmp_path / "_book.html").exists()


def test_without_pages_or_by_another_name_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deliver, "ROOT", tmp_path)
    assert deliver.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "files: there are no pages yet; run make book first\n"
    assert deliver.main(["epub", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "files: expected html, pdf, notebooks, found epub\n"


def test_a_file_that_cannot_be_made_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = tmp_path / "book" / "_build" / "book" / "html"
    pages.mkdir(parents=True)
    (pages / "index.html").write_text("page")
    monkeypatch.setattr(deliver, "ROOT", tmp_path)
    monkeypatch.setattr(deliver, "chapters", lambda: ["a"])
    monkeypatch.setattr(deliver.shutil, "which", lambda _: None)
    assert deliver.main(["html", "--out", str(tmp_path)]) == 0
    with zipfile.ZipFile(tmp_path / "hgad-book.zip") as archive:
        assert archive.namelist() == ["html/index.html"]
    (tmp_path / "hgad-book.pdf").write_text("old")
    assert deliver.main(["pdf", "--out", str(tmp_path)]) == 1
    assert "install the program chromium" in capsys.readouterr().err
    assert (tmp_path / "hgad-book.pdf").read_text() == "old"
    assert not list(tmp_path.glob(".*"))
