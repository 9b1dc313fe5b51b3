"""What every chapter does first: the figures' theme, one-line errors, quiet logs."""

from __future__ import annotations

import ast
import inspect
import logging
import os
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from hgadbook.figure_data import data_of
from hgadlib.config import project_dir
from hgadlib.errors import InputError
from hgadlib.files import FileError


def setup() -> None:
    """Prepare a chapter: theme of the figures, and wrong input told in one line instead of a traceback."""
    from IPython import get_ipython  # type: ignore[attr-defined, unused-ignore]

    from hgadlib.figures.theme import theme

    theme()
    # A class may be named "$5 bolt": tables hold no formulas.
    pd.set_option("display.html.use_mathjax", False)
    # Torch says on machines without a GPU that it found none; a reader need not know.
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*CUDA initialization.*")
    shell = get_ipython()
    if shell is None:
        return
    # FloatingPointError: training has diverged, and the line says which settings to change.
    shell.set_custom_exc((InputError, FloatingPointError, FileError), _one_line)
    shell.run_line_magic("config", "InlineBackend.figure_formats = ['svg']")
    shell.display_formatter.mimebundle_formatter.for_type(Figure, _data_and_runs)


def verdict(*sentences: str) -> Markdown:
    """Say what a chapter found, as a list; computed, so that a sentence changes with its numbers.

    The build shows the one cell tagged ``verdict`` of a chapter in a box under the chapter's title, wherever
    in the chapter it is computed.

    Raises:
        ValueError: There is no sentence.
    """
    if not sentences:
        raise ValueError("expected at least one sentence for a verdict, found none")
    return Markdown("\n".join(f"- {sentence}" for sentence in sentences))


def behind(figure: Figure, runs: Iterable[str | Mapping[str, Any] | Path]) -> Figure:
    """Note which runs a figure shows; the build links them beside its data.

    Args:
        figure: Before it is displayed.
        runs: Names of committed records or the records themselves; or files below the project's folder, or
            directories of runs made here.
    Returns:
        The figure.
    """
    names = set()
    for run in runs:
        name = str(run["record"] if isinstance(run, Mapping) else run)
        names.add(os.path.relpath(name, project_dir()) if os.path.isabs(name) else name)
    figure.hgad_runs = sorted({*getattr(figure, "hgad_runs", ()), *names})  # type: ignore[attr-defined]
    return figure


def _data_and_runs(figure: Figure) -> tuple[dict[str, str], dict[str, Any]]:
    """Give a displayed figure's data (text/csv) and runs to the notebook, beside its picture."""
    data = data_of(figure)
    # Six digits are more than a figure shows.
    bundle = {} if data.empty else {"text/csv": data.to_csv(index=False, float_format="%.6g")}
    runs = getattr(figure, "hgad_runs", [])
    return bundle, {"hgad_runs": runs} if runs else {}


def _one_line(
    shell: Any,
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
    tb_offset: int | None = None,
) -> list[str]:
    lines = [f"{kind.__name__}: {error}"]
    # The kernel still reports the cell as failed, so papermill stops there and exits with 1.
    shell._showtraceback(kind, error, lines)
    return lines


def show_source(*functions: Callable[..., Any]) -> None:
    """Show the source of functions under the equations that they compute, without their docstrings.

    Args:
        *functions: Functions, methods or classes of the library.
    """
    from IPython.display import display

    for function in functions:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        node = tree.body[0]
        assert isinstance(node, ast.FunctionDef | ast.ClassDef)
        lines = inspect.getsource(function).splitlines()
        if ast.get_docstring(node) is not None:
            del lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
        place = f"`{function.__module__}.{function.__qualname__}`"
        code = textwrap.dedent("\n".join(lines)).rstrip()
        display(Markdown(f"{place}\n\n```python\n{code}\n```"))
