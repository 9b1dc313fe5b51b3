"""The progress bar in a log file, and in a notebook that nobody watches."""

from __future__ import annotations

import io
import sys

import pytest

from hgadlib import progress
from hgadlib.progress import progress_bar


def test_a_log_gets_whole_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_LOG", 0.0)
    with progress_bar(6, "train") as bar:
        for step in range(3):
            bar.set_postfix_str(f"epoch {step}")
            bar.update(2)
    text = capsys.readouterr().err
    assert "\r" not in text
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if line]
    assert len(lines) >= 3
    assert all(line.startswith("train:") for line in lines)
    assert "100% 6/6" in lines[-1]
    assert "image/s" in lines[-1]


def test_a_log_is_not_filled_with_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(10_000, "features") as bar:
        for _ in range(10_000):
            bar.update()
    assert len(capsys.readouterr().err.splitlines()) <= 4


def test_what_was_done_before_counts_but_not_as_speed(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress_bar(10, "train", initial=8)
    assert bar.n == 8
    assert bar.format_dict["initial"] == 8
    bar.close()


def test_no_bar_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(3, "train", show=False) as bar:
        bar.update(3)
        bar.set_postfix_str("done")
    assert capsys.readouterr().err == ""


def test_a_terminal_redraws_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(3, "train") as bar:
        bar.update(3)
    assert "\r" in terminal.getvalue()
