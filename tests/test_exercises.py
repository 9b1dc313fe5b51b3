"""The exercises: each has a solution that runs and compares, and its page is built."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# What the chapter has computed where its exercises stand, here smaller.
BEFORE = {
    "method": """
import math, torch
from hgadbook import method as toy
from hgadlib import flow, losses, mixture
from hgadlib.mixture import GaussianPrior, HierarchicalGaussianMixture
seed, (x, class_idx) = 0, toy.toy_features(seed=0)
single, _ = toy.fit_flow(x, class_idx, GaussianPrior(), steps=20, seed=seed)
points, class_a = toy.plane((-6, 7, -5, 5), 17)[None], torch.tensor([0])
""",
    "homogeneous_mapping": "import numpy as np, pandas as pd",
    "information_bottleneck": "import math",
}


def cells_of(chapter: str) -> list[dict[str, Any]]:
    notebook = json.loads((ROOT / "book" / f"{chapter}.ipynb").read_text(encoding="utf-8"))
    return [{**cell, "source": "".join(cell["source"])} for cell in notebook["cells"]]


def solutions(chapter: str) -> dict[str, list[str]]:
    """Find the code of each solution by its exercise's label; a gate that is not closed is an error."""
    found: dict[str, list[str]] = {}
    label = None
    for cell in cells_of(chapter):
        if cell["cell_type"] == "code":
            if label is not None:
                found[label].append(cell["source"])
        elif opened := re.search(r"^```\{solution-start\} (\S+)\n(.*?)^```$", cell["source"], re.S | re.M):
            assert label is None, f"{label} is not closed before the next"
            assert ":class: dropdown" in opened[2]
            label = opened[1]
            found[label] = []
        elif "```{solution-end}" in cell["source"]:
            label = None
    assert label is None, f"{label} is not closed"
    return found


@pytest.mark.parametrize("chapter", BEFORE)
def test_every_exercise_has_a_solution_that_ends_with_a_comparison(chapter: str) -> None:
    text = "\n".join(cell["source"] for cell in cells_of(chapter) if cell["cell_type"] == "markdown")
    asked = re.findall(r"^```\{exercise-start\} .+\n:label: (\S+)\n```$", text, re.M)
    assert asked and text.count("```{exercise-end}") == len(asked) == len(set(asked))
    answers = solutions(chapter)
    assert list(answers) == asked
    for label, (code,) in answers.items():
        assert re.search(r"^ *assert |assert_close\(", code, re.M), f"{label} compares nothing"


def test_there_is_enough_to_do_and_not_too_much() -> None:
    assert 5 <= sum(len(solutions(chapter)) for chapter in BEFORE) <= 8


@pytest.mark.parametrize("chapter", BEFORE)
def test_the_solutions_hold(chapter: str) -> None:
    scope: dict[str, Any] = {"display": lambda *_: None}
    exec(BEFORE[chapter], scope)
    for label, (code,) in solutions(chapter).items():
        exec(compile(code, label, "exec"), scope)


@pytest.mark.slow
def test_an_exercise_is_numbered_its_solution_folded_and_nothing_is_loaded(tmp_path: Path) -> None:
    gates = ("exercise-start", "exercise-end", "solution-start", "solution-end")
    cells = [cell["source"] for cell in cells_of("homogeneous_mapping") if cell["cell_type"] == "markdown"]
    page = "\n\n".join(cell for cell in cells if any(f"{{{gate}}}" in cell for gate in gates))
    book = tmp_path / "book"
    book.mkdir()
    shutil.copy(ROOT / "_config.yml", tmp_path)
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    shutil.copy(ROOT / "book" / "references.bib", book)
    shutil.copytree(ROOT / "book" / "assets", book / "assets")
    (book / "_toc.yml").write_text("format: jb-book\nroot: first\n")
    (book / "first.md").write_text(
        "(first)=\n# A page\n\n{cite}`yao2024hgad`, {ref}`homogeneous-mapping-exercise-1`\n\n"
        f"{page}\n\n```{{bibliography}}\n```\n"
    )
    # In a process of its own, as `make book` builds: warnings are errors.
    code = (
        "import runpy, pathlib; build = runpy.run_path(r'" + str(ROOT / "book" / "build.py") + "');"
        f"build['build'](root=pathlib.Path(r'{tmp_path}'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (html,) = (tmp_path / "book" / "_build" / "book" / "html").glob("first.html")
    text = html.read_text(encoding="utf-8")
    plain = " ".join(unescape(re.sub(r"<[^>]+>", "", text)).split())
    assert "Exercise 1 (Does shrinking pay?)" in plain and "Solution to Exercise 1" in plain
    assert re.search(r'class="solution dropdown admonition"', text)
    assert (html.parent / "_static" / "exercise.css").is_file()
    assert "http" not in (html.parent / "_static" / "exercise.css").read_text()
    loaded = re.findall(r"<(?:link|script|img)[^>]+(?:href|src)=\"([^\"]+)\"", text)
    assert any("exercise.css" in address for address in loaded)
    assert not [address for address in loaded if address.startswith(("http", "//"))]
