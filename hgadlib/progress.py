"""One progress bar for all long loops: images/s and time left, in a terminal, a notebook or a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

# A terminal redraws one line; in a log file each redraw is a line to scroll over.
_SECONDS_LIVE, _SECONDS_LOG = 0.5, 15.0


def progress_bar(total: int, description: str, *, unit: str = "image", show: bool = True) -> tqdm[Any]:
    """Open a progress bar.

    Args:
        total: Units of work.
        description: What is being done.
        unit: What is counted.
        show: Whether to show it at all.

    Returns:
        A bar to `update`, also a context manager.
    """
    live = issubclass(tqdm, tqdm_notebook) or sys.stderr.isatty()
    seconds = _SECONDS_LIVE if live else _SECONDS_LOG
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=not show,
        dynamic_ncols=True,
        mininterval=seconds,
        # Without a bound tqdm's monitor would redraw every 10 s whatever mininterval says.
        maxinterval=max(10.0, seconds),
        smoothing=0.1,
    )
