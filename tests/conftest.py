"""How the tests share a machine: several workers, the slow files first, one thread each."""

from __future__ import annotations

import os
import signal

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several workers on the same cores wait for each other; read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has its background commands ignore Ctrl-C, and what they start inherits that: the commands
    # that are interrupted here as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move files with a slow test forward, so that no worker starts its longest file last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
