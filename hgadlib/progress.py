"""One progress bar for all long loops: rate and time left, in a terminal, a notebook or a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm as text_bar
from tqdm.auto import tqdm as notebook_bar

# A terminal redraws one line; in a log file each redraw is a line to scroll over.
_SECONDS_LOG = 15.0
_LOG_FORMAT = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _LineBar(text_bar):
    """A bar that prints a new line at each refresh: carriage returns make of a log one endless line."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Return the function that shows a state of the bar."""

        def print_status(text: str) -> None:
            if text.strip():
                file.write(text.rstrip() + "\n")
                file.flush()

        return print_status


def progress_bar(
    total: int, description: str, *, unit: str = "image", initial: int = 0, show: bool = True
) -> Any:
    """Open a progress bar.

    Args:
        total: Units of work.
        description: What is being done.
        unit: What is counted.
        initial: Units done before, by the run that is resumed; they leave the rate alone.
        show: Whether to show it at all.
    Returns:
        A tqdm bar to `update`, also a context manager.
    """
    options: dict[str, Any] = {
        "total": total,
        "desc": description,
        "unit": unit,
        "initial": initial,
        "disable": not show,
    }
    # JupyterLab names its notebook; in a headless kernel, without one, nobody sees widgets move.
    if "JPY_SESSION_NAME" in os.environ:
        return notebook_bar(**options)
    if sys.stderr.isatty():
        return text_bar(**options, mininterval=0.5, dynamic_ncols=True, smoothing=0.1)
    # Without a bound tqdm's monitor would print every 10 s whatever mininterval says.
    options |= {"mininterval": _SECONDS_LOG, "maxinterval": _SECONDS_LOG, "bar_format": _LOG_FORMAT}
    return _LineBar(**options, smoothing=0.1)
