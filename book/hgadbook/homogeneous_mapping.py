"""What a training's course says of "homogeneous mapping": each step of the paper's claim, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hgadlib.errors import InputError

FLOWS = {
    "sec32_single": "single Gaussian",
    "sec32_fastflow": "FastFlow type",
    "sec32_hgad": "HGAD",
    "sec32_single_whiten": "single, whitened",
}
"""The experiments of Sec. 3.2, and how figures and tables call them."""

DROP = 2.0
"""Points of AUROC or overlap from which on a change counts as one: a smaller one is within what seeds do."""


def course_table(histories: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Measure the paper's account of Fig. 2a: losses go on falling, AUROC drops, likelihoods rise.

    Args:
        histories: By the name of the run, a row per epoch, with the columns test_* of evaluated epochs.

    Returns:
        A row per run. Image AUROC (percent) at its best epoch and at the last one, and the drop between them;
        likewise of pixels; least and last overlap (percent); loss at the best epoch of the image AUROC and at
        the last one, and how normal and anomalous test log-likelihoods changed between these two, in the
        history's unit. NaN for what was not measured.

    Raises:
        InputError: A history has no evaluated epoch.
    """
    rows = {}
    for name, history in histories.items():
        if "test_image_auroc" not in history or not history["test_image_auroc"].notna().any():
            raise InputError(f"{name}: expected a history with evaluated epochs, found none; evaluate some")
        tested = history[history["test_image_auroc"].notna()].reset_index(drop=True)
        best, last = int(tested["test_image_auroc"].argmax()), tested.iloc[-1]
        row: dict[str, Any] = {"epochs": int(last["epoch"]), "best epoch": int(tested["epoch"][best])}
        for kind in ("image", "pixel"):
            values = 100 * _column(tested, f"test_{kind}_auroc")
            highest = float(np.nanmax(values)) if np.isfinite(values).any() else np.nan
            row |= {f"best {kind} AUROC": highest, f"last {kind} AUROC": values[-1]}
            row[f"{kind} drop"] = highest - values[-1]
        overlap = 100 * _column(tested, "test_overlap")
        row["least overlap"] = float(np.nanmin(overlap)) if np.isfinite(overlap).any() else np.nan
        row["last overlap"] = overlap[-1]
        row |= {"loss at best epoch": float(tested["nll"][best]), "last loss": float(last["nll"])}
        for kind in ("normal", "anomalous"):
            values = _column(tested, f"test_log_prob_{kind}")
            row[f"change of {kind} log-likelihood"] = values[-1] - values[best]
        rows[name] = row
    return pd.DataFrame(rows).T.rename_axis("run")


def _column(table: pd.DataFrame, name: str) -> np.ndarray:
    return table[name].to_numpy(dtype=float) if name in table else np.full(len(table), np.nan)


def course_sentences(course: pd.DataFrame) -> list[str]:
    """Put each row of :func:`course_table` into a sentence that says whether the issue showed."""
    said = []
    for name, row in course.iterrows():
        drops = [
            f"the {kind} AUROC ended {row[f'{kind} drop']:.1f} points below its best of "
            f"{row[f'best {kind} AUROC']:.1f} %"
            for kind in ("image", "pixel")
            if row[f"{kind} drop"] >= DROP
        ]
        falling = row["last loss"] < row["loss at best epoch"]
        if drops:
            text = f"{name}: the issue shows. In {row['epochs']:.0f} epochs {' and '.join(drops)}"
            text += ", while the loss went on falling." if falling else "; the loss rose, too."
            changes = [row[f"change of {kind} log-likelihood"] for kind in ("normal", "anomalous")]
            if np.isfinite(changes).all():
                text += (
                    f" From the best epoch ({row['best epoch']:.0f}) on, the log-likelihood of normal test "
                    f"positions changed by {changes[0]:+.3f}, that of anomalous ones by {changes[1]:+.3f}."
                )
        else:
            text = (
                f"{name}: the issue does not show in {row['epochs']:.0f} epochs. The image AUROC ended at "
                f"{row['last image AUROC']:.1f} %, {row['image drop']:.1f} below its best (epoch "
                f"{row['best epoch']:.0f}); less than {DROP:g} points count as none."
            )
        said.append(text)
    return said


def coupling_claims(tables: Mapping[str, pd.DataFrame], clamp: float = 1.9) -> pd.DataFrame:
    """Set what Sec. 3.2 says of s and t beside what they were at the last recorded epoch.

    Args:
        tables: By the name of the run, rows of coupling.csv or of a record's coupling.
        clamp: The largest size of s.

    Returns:
        A row per run, over all blocks and levels. Of training positions: the mean of s and the lowest mean of
        a block, both in percent of the clamp (claimed: -100), the share of s at the clamp's limit, the shares
        of the input in the variance of s and t (claimed: 0), and the size of t over that of what the block
        gives out (claimed: 0). Then by how much s is higher on anomalous than on normal positions, in nats.
    """
    rows = {}
    for name, whole in tables.items():
        last = whole[whole["epoch"] == whole["epoch"].max()]
        train = last[last["group"] == "train"]
        t_rms = np.sqrt(train["t_mean"] ** 2 + train["t_std"] ** 2)
        means = last.groupby("group")["s_mean"].mean()
        rows[name] = {
            "epoch": int(train["epoch"].iloc[0]),
            "mean s / clamp (%)": 100 * train["s_mean"].mean() / clamp,
            "lowest block (%)": 100 * train["s_mean"].min() / clamp,
            "s at the limit (%)": 100 * train["s_limit"].mean(),
            "input in var s (%)": 100 * train["s_input"].mean(),
            "input in var t (%)": 100 * train["t_input"].mean(),
            "class in var s (%)": 100 * train["s_class"].mean(),
            "t / output (%)": 100 * float((t_rms / train["out_rms"]).mean()),
            "s, anomalous - normal (nats)": means.get("anomalous", np.nan) - means.get("normal", np.nan),
        }
    return pd.DataFrame(rows).T.rename_axis("run")


def coupling_sentences(tables: Mapping[str, pd.DataFrame], clamp: float = 1.9) -> list[str]:
    """Put each row of :func:`coupling_claims` into a sentence that says whether the claim holds.

    It is taken to hold if the mean of s is within a tenth of its limit in some block and the input makes less
    than a tenth of the variance of s and of t.
    """
    said = []
    for name, row in coupling_claims(tables, clamp).iterrows():
        small, s_share, t_share = (
            row[key] for key in ("lowest block (%)", "input in var s (%)", "input in var t (%)")
        )
        low, constant = small <= -90, s_share < 10 and t_share < 10
        verdict = {
            (True, True): "as claimed, s is very small and both are constants",
            (True, False): "s is very small somewhere, but s and t depend on the input",
            (False, True): "s and t hardly depend on the input, but s is not very small",
            (False, False): "s is not very small, and s and t depend on the input",
        }[bool(low), bool(constant)]
        said.append(
            f"{name}: {verdict} (lowest block {small:.0f} % of the clamp; the input makes {s_share:.0f} % of "
            f"the variance of s and {t_share:.0f} % of that of t)."
        )
    return said


def course_title(record: Mapping[str, Any]) -> str:
    """Say what a record's run was trained on, for how long, and by which seed."""
    # A folder's name is no name of images.
    images = f" {record['data']['digest'][:8]}" if record["dataset"] == "folder" else ""
    size, epochs, seed = record["config"]["data"]["image_size"], record["epochs"], record["seed"]
    return f"{record['dataset']}{images} at {size} pixels, {epochs} epochs, seed {seed}"


def course_records(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Find the records of Sec. 3.2's flows that hold an evaluated course.

    Args:
        records: What :func:`hgadlib.runs.ledger.read_records` gave.

    Returns:
        By what they ran on, as :func:`course_title` says it: the record by the flow's name.
    """
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        tested = record.get("curves", {}).get("test_image_auroc", [])
        if record["experiment"] not in FLOWS or all(value is None for value in tested):
            continue
        key = course_title(record)
        found.setdefault(key, {})[FLOWS[record["experiment"]]] = record
    order = list(FLOWS.values())
    return {
        key: dict(sorted(own.items(), key=lambda item: order.index(item[0]))) for key, own in found.items()
    }
