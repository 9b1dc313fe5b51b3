"""Sec. 3.2, measured: what a training does to losses, AUROC and likelihoods, and to every coupling block.

The paper argues that one Gaussian for all classes lets a flow predict constants (Eq. 4): every s very
negative, every t close to zero, whatever the input. Here both are measured on fixed features as a run trains.
No random number is drawn and no gradient kept, so a run trains the same with the record and without.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hgadlib.config import Config
from hgadlib.errors import InputError
from hgadlib.evaluation.likelihoods import anomalous_positions
from hgadlib.features.store import Features, spread_sample
from hgadlib.figures.histograms import shared_legend
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, PALETTE
from hgadlib.files import write_atomically
from hgadlib.flow import AffineCoupling, FeatureFlow
from hgadlib.model import HGAD
from hgadlib.runs.directory import RunDirectory
from hgadlib.runs.experiment import train_model
from hgadlib.runs.inputs import Inputs, class_masks

FLOWS = {
    "sec32_single": "single Gaussian",
    "sec32_fastflow": "FastFlow type",
    "sec32_hgad": "HGAD",
    "sec32_single_whiten": "single, whitened",
}
"""The experiments of Sec. 3.2, and how figures and tables call them."""

DROP = 2.0
"""Points of AUROC or overlap from which on a change counts as one: a smaller one is within what seeds do."""
FALL = 0.01
"""Nats per dimension from which on a log-likelihood counts as fallen."""

# Images of each class that a sample holds, and images that pass a flow at a time.
_PER_CLASS, _BATCH = 8, 32
# The largest size of s in these experiments, and the share of it from which on a scale is at its limit.
_CLAMP, _LIMIT = 1.9, 0.95


def train_flow(config: Config, inputs: Inputs, run: RunDirectory, *, progress: bool = True) -> HGAD:
    """Train a run, or load it, recording its coupling blocks (coupling.csv) in evaluated epochs.

    The chapters on Sec. 3.2 share their runs, so that all of them train by this function.
    """
    run.start(inputs.identity())  # what another run left there is out of the way before anybody looks
    record = None
    if not run.model.is_file() and config.train.evaluate_every:
        record = CouplingRecord(run.path / "coupling.csv", inputs, class_masks(config, inputs))
    return cast(HGAD, train_model(config, inputs, run, progress=progress, observer=record))


@dataclass(frozen=True)
class BlockOutput:
    """One coupling block on some features.

    Attributes:
        s: Log-scale after the clamp, (B, N, C // 2), nats.
        t: Shift, (B, N, C // 2), in units of the features that enter the block.
        out: What leaves the block, (B, N, C).
        clamp: The largest size that s can have.
        log_gain: Mean log of the block's global scaling, which no input changes; nats per channel.
    """

    s: Tensor
    t: Tensor
    out: Tensor
    clamp: float
    log_gain: float


def block_outputs(flow: FeatureFlow, features: Tensor) -> Iterator[BlockOutput]:
    """Send features (B, N, C) of the flow's level through it, yielding what each coupling block does."""
    x, positions = features, flow.positions
    conditions = [] if positions is None else [positions]
    for block in flow.inn:
        if isinstance(block, AffineCoupling):
            s, t = block.scale_and_shift(x[..., : block.splits[0]], positions)
            ((x,), _) = block((x,), conditions)
            yield BlockOutput(s, t, x, block.clamp, float(block.gain.detach().log().mean()))
        else:
            ((x,), _) = block((x,))


@torch.inference_mode()
def coupling_table(
    model: HGAD,
    features: Features,
    images: Tensor,
    class_idx: np.ndarray,
    groups: Mapping[str, Sequence[Tensor]],
) -> list[dict[str, Any]]:
    """Measure s and t of every block on some images.

    Args:
        model: Its flows are looked at; nothing in it changes.
        features: Of a split.
        images: Which of them, (n,) sorted.
        class_idx: Class of each image of the split, (N,).
        groups: By name, the positions that belong to it: for each level, of these images, (n, h, w) bool.

    Returns:
        A row per level, block (counted from 1, from the features' side) and group: mean, standard deviation
        and shares of s and t, the share of s at the clamp's limit, the block's mean log gain and the root
        mean square of what leaves it. A group with no position in it gives no row.
    """
    labels = torch.as_tensor(class_idx)[images]
    batches = [batch for _, batch in features.batches(images.split(_BATCH), model.device)]
    rows = []
    for level, ((flow, _), *parts) in enumerate(zip(model.levels, *batches, strict=True)):
        # The batches go through the flow side by side, a block at a time.
        for layer, outputs in enumerate(zip(*(block_outputs(flow, x) for x in parts), strict=True), start=1):
            s, t, out = (torch.cat([getattr(o, name).cpu() for o in outputs]) for name in ("s", "t", "out"))
            for name, positions in groups.items():
                chosen = positions[level].flatten(1)
                own = labels[:, None].expand_as(chosen)[chosen]
                if len(own):
                    row: dict[str, Any] = {"level": level + 1, "layer": layer, "group": name}
                    row |= _moments("s", s[chosen].double(), own)
                    row["s_limit"] = (s[chosen].abs() > _LIMIT * outputs[0].clamp).double().mean().item()
                    row |= _moments("t", t[chosen].double(), own)
                    row["log_gain"] = outputs[0].log_gain
                    row["out_rms"] = out[chosen].double().square().mean().sqrt().item()
                    rows.append(row)
    return rows


def _moments(name: str, values: Tensor, class_idx: Tensor) -> dict[str, float]:
    """Compute mean and deviation of values (n, C), and what input and class explain of the variance.

    The variance is taken over positions and channels. A network that predicts constants has one value per
    channel: then all variance lies between channels, and the share of the input is 0.
    """
    mean = values.mean(0)
    total = values.var(correction=0).item()
    of_input = (values - mean).square().mean().item()
    counts = torch.bincount(class_idx)[:, None]
    by_class = torch.zeros(len(counts), values.shape[1], dtype=values.dtype).index_add_(0, class_idx, values)
    of_class = (counts * (by_class / counts.clamp_min(1) - mean).square()).sum(0).mean().item() / len(values)
    # A difference of nearly equal numbers says nothing below their rounding.
    varies = total > 1e-12 * values.square().mean().item()
    return {
        f"{name}_mean": mean.mean().item(),
        f"{name}_std": total**0.5,
        f"{name}_input": of_input / total if varies else float("nan"),
        f"{name}_class": of_class / total if varies else float("nan"),
    }


class CouplingRecord:
    """Follows s and t through a run's training, in its coupling.csv.

    The file never holds an epoch that history.csv does not: rows wait until the history has theirs, and what
    an interrupted run had measured beyond its checkpoint is dropped as those epochs come again.

    Args:
        path: The file; an earlier part of the same run is taken up.
        inputs: Of the run.
        masks: By class index, as :func:`hgadlib.runs.inputs.class_masks` gives them.
    """

    def __init__(self, path: Path, inputs: Inputs, masks: Mapping[int, np.ndarray]) -> None:
        self.path, self.inputs = path, inputs
        self.rows: list[dict[Any, Any]] = pd.read_csv(path).to_dict("records") if path.is_file() else []
        classes, labels, labelled = inputs.test_classes, inputs.test_labels, inputs.test_labelled
        n_classes, grids = len(inputs.dataset.classes), inputs.train.grids
        self.train = spread_sample(inputs.train_classes, n_classes, _PER_CLASS)
        self.train_groups = {
            "train": [torch.ones(len(self.train), *grid, dtype=torch.bool) for grid in grids]
        }
        # As many normal as anomalous images of each class, where there are as many.
        self.test = spread_sample(np.where(labelled, 2 * classes + labels, -1), 2 * n_classes, _PER_CLASS)
        touched = [anomalous_positions(classes, labels & labelled, masks, grid)[self.test] for grid in grids]
        self.test_groups = {"normal": [~positions for positions in touched], "anomalous": touched}

    def measure(self, epoch: int, model: HGAD) -> None:
        """Note what the model's blocks do after an epoch."""
        inputs = self.inputs
        rows = coupling_table(model, inputs.train, self.train, inputs.train_classes, self.train_groups)
        if len(self.test):
            rows += coupling_table(model, inputs.test, self.test, inputs.test_classes, self.test_groups)
        self.rows = [row for row in self.rows if row["epoch"] < epoch]
        self.rows += [{"epoch": epoch, **row} for row in rows]

    def write(self, last_epoch: int) -> None:
        """Write the rows up to an epoch that history.csv holds."""
        self.rows = [row for row in self.rows if row["epoch"] <= last_epoch]
        if self.rows:
            content = io.StringIO()
            pd.DataFrame(self.rows).to_csv(content, index=False, float_format="%.7g")
            write_atomically(self.path, content.getvalue())


def _tested(name: str, history: pd.DataFrame) -> pd.DataFrame:
    """Take the rows of evaluated epochs; the untrained model's, epoch 0, has no loss to stand beside."""
    history = history[history["epoch"] > 0]
    if "test_image_auroc" not in history or not history["test_image_auroc"].notna().any():
        raise InputError(
            f"{name}: expected a history with evaluated epochs, found none; train with train.evaluate_every "
            "above 0"
        )
    return history[history["test_image_auroc"].notna()].reset_index(drop=True)


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
        tested = _tested(name, history)
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
    """State for each row of :func:`course_table` in a sentence whether detection declined."""
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
            text = f"{name}: detection declines. In {row['epochs']:.0f} epochs {' and '.join(drops)}"
            text += ", while the loss went on falling." if falling else "; the loss rose, too."
            changes = [row[f"change of {kind} log-likelihood"] for kind in ("normal", "anomalous")]
            if np.isfinite(changes).all():
                text += (
                    f" From the best epoch ({row['best epoch']:.0f}) on, the log-likelihood of normal test "
                    f"positions changed by {changes[0]:+.3f}, that of anomalous ones by {changes[1]:+.3f}."
                )
        else:
            text = (
                f"{name}: detection does not decline in {row['epochs']:.0f} epochs. The image AUROC ended at "
                f"{row['last image AUROC']:.1f} %, {row['image drop']:.1f} below its best (epoch "
                f"{row['best epoch']:.0f}); less than {DROP:g} points count as none."
            )
        said.append(text)
    return said


def overfit_sentences(histories: Mapping[str, pd.DataFrame]) -> list[str]:
    """State for each run whether it fits its training images at the cost of other normal ones.

    It does where the log-likelihood of normal test images ends :data:`FALL` or more below its highest while
    the loss is lower than it was there. Of the untrained model, epoch 0, there is no loss: then the first
    trained epoch's stands for it.

    Args:
        histories: As of :func:`course_table`.
    """
    said = []
    for name, history in histories.items():
        looked = history[np.isfinite(_column(history, "test_log_prob_normal"))]
        if len(looked) < 2:
            said.append(f"{name}: not measured.")
            continue
        normal, epochs = looked["test_log_prob_normal"].to_numpy(), looked["epoch"].to_numpy()
        best, loss = int(normal.argmax()), history.dropna(subset=["nll"]).set_index("epoch")["nll"]
        then, last = float(loss[loss.index >= epochs[best]].iloc[0]), float(loss.iloc[-1])
        fallen = float(normal[best] - normal[-1])
        where = f"its highest of {normal[best]:.3f} (epoch {epochs[best]:.0f})"
        if fallen < FALL:
            text = f"does not overfit. The log-likelihood of normal test images ends at {normal[-1]:.3f}"
            text += f"; {where}" if fallen else ", its highest"
        else:
            words = ("overfits", "falls") if last < then else ("does not overfit, and yet loses", "goes")
            text = (
                f"{words[0]}. The log-likelihood of normal test images ends {fallen:.3f} nats per dimension "
                f"below {where}, while the loss {words[1]} from {then:.3f} to {last:.3f}"
            )
        said.append(f"{name}: {text}.")
    return said


def drop_sentence(courses: Sequence[pd.DataFrame], where: str) -> str:
    """Name the runs of some :func:`course_table`, trained at one place, whose AUROC drops.

    >>> drop_sentence([], "in the ledger")
    'Measured in the ledger: no run.'
    """
    if not courses:
        return f"Measured {where}: no run."
    table = pd.concat(courses)
    dropped = table[(table["image drop"] >= DROP) | (table["pixel drop"] >= DROP)]
    ends = dict.fromkeys(f"{end:.0f}" for end in (table["epochs"].min(), table["epochs"].max()))
    names = ", ".join(map(str, dict.fromkeys(dropped.index)))
    return (
        f"Of {len(table)} runs {where} ({' to '.join(ends)} epochs), image or pixel AUROC ends {DROP:g} "
        f"points or more below its best in {f'{len(dropped)}: {names}' if names else 'none'}."
    )


def coupling_claims(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Compute what Sec. 3.2 makes claims about, s and t, at the last recorded epoch.

    Args:
        tables: By the name of the run, rows of coupling.csv or of a record's coupling.

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
            "mean s / clamp (%)": 100 * train["s_mean"].mean() / _CLAMP,
            "lowest block (%)": 100 * train["s_mean"].min() / _CLAMP,
            "s at the limit (%)": 100 * train["s_limit"].mean(),
            "input in var s (%)": 100 * train["s_input"].mean(),
            "input in var t (%)": 100 * train["t_input"].mean(),
            "class in var s (%)": 100 * train["s_class"].mean(),
            "t / output (%)": 100 * float((t_rms / train["out_rms"]).mean()),
            "s, anomalous - normal (nats)": means.get("anomalous", np.nan) - means.get("normal", np.nan),
        }
    return pd.DataFrame(rows).T.rename_axis("run")


def coupling_sentences(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """State for each row of :func:`coupling_claims` in a sentence whether the claim holds.

    It is taken to hold if the mean of s is within a tenth of its limit in some block and the input makes less
    than a tenth of the variance of s and of t.
    """
    said = []
    for name, row in coupling_claims(tables).iterrows():
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


def claim_sentence(tables: Mapping[str, pd.DataFrame]) -> str:
    """Say in how many runs s and t are what Sec. 3.2 claims, see :func:`coupling_sentences`."""
    said = coupling_sentences(tables)
    holds = sum(": as claimed, " in text for text in said)
    small = -coupling_claims(tables)["lowest block (%)"].min()
    return (
        f"The cause that the paper names, scales near their lower limit and an s and t that ignore the "
        f"input, is seen in {holds} of {len(said)} flows; the block that comes nearest has a mean scale of "
        f"{small:.0f} % of the limit."
    )


def course_title(record: Mapping[str, Any]) -> str:
    """Name what a record's run was trained on, for how long, and by which seed."""
    # A folder's name is no name of images.
    images = f" {record['data']['digest'][:8]}" if record["dataset"] == "folder" else ""
    size, epochs, seed = record["config"]["data"]["image_size"], record["epochs"], record["seed"]
    return f"{record['dataset']}{images} at {size} pixels, {epochs} epochs, seed {seed}"


def course_records(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Find the ledger's records of Sec. 3.2's flows that hold an evaluated course: by title and flow."""
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


# Rows of the course of a training: column of a history, label, colour.
_METRICS = (
    ("test_image_auroc", "image AUROC", "0.2"),
    ("test_pixel_auroc", "pixel AUROC", PALETTE[4]),
    ("test_overlap", "overlap", PALETTE[1]),
)
_LIKELIHOODS = (
    ("test_log_prob_normal", "normal", NORMAL_COLOR),
    ("test_log_prob_anomalous", "anomalous", ANOMALOUS_COLOR),
)
_COUPLING_LABELS = {
    "s_mean": "mean\nof $s$ (nats)",
    "s_input": "share of the input\nin var $s$ (%)",
    "t_std": "standard deviation\nof $t$",
    "t_input": "share of the input\nin var $t$ (%)",
    "log_gain": "mean log of the global scaling (nats)",
    "out_rms": "root mean square of the output",
}


def _panels(names: Sequence[str], rows: int, height: float) -> tuple[Figure, np.ndarray]:
    """Make a column of panels per run; each row has one scale, so that runs compare."""
    size = (2.1 * len(names) + 0.8, rows * height + 0.6)
    figure, axes = plt.subplots(rows, len(names), figsize=size, squeeze=False, sharex="col", sharey="row")
    for name, top, bottom in zip(names, axes[0], axes[-1], strict=True):
        top.set_title(name, loc="left")
        bottom.set_xlabel("epoch")
        bottom.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    return figure, axes


def _curve(ax: Axes, table: pd.DataFrame, column: str, scale: float = 1.0, **style: Any) -> None:
    """Draw what is there of a column: some have a value in evaluated epochs only, and some are missing."""
    if column in table:
        values = scale * table[column].to_numpy(dtype=float)
        seen = np.isfinite(values)
        sparse = seen.sum() < max(40, 2 * len(seen) // 3)
        ax.plot(table["epoch"].to_numpy()[seen], values[seen], marker="." if sparse else None, **style)


def training_course(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw loss, AUROC with overlap, and log-likelihoods of the test positions; a column per run.

    Args:
        histories: By the name of the run: a row per epoch, as history.csv or a record's curves hold them;
            the columns named test_* have a value in evaluated epochs.

    Raises:
        InputError: A history has no evaluated epoch.

    Source: paper Fig. 2a and 2c.
    """
    figure, axes = _panels(list(histories), 3, 1.9)
    for (name, history), (top, middle, bottom) in zip(histories.items(), axes.T, strict=True):
        _tested(name, history)
        _curve(top, history, "nll", color=PALETTE[0])
        for key, label, color in _METRICS:
            _curve(middle, history, key, 100, color=color, label=label)
        for key, label, color in _LIKELIHOODS:
            _curve(bottom, history, key, color=color, label=label)
    axes[0, 0].set_ylabel("training loss\n(nats per dimension)")
    axes[1, 0].set_ylabel("test (%)")
    axes[2, 0].set_ylabel("log-likelihood\n(nats per dimension)")
    shared_legend(figure, axes[1:].ravel(), columns=5, below=True)
    figure.align_ylabels(axes[:, 0])
    return figure


def coupling_course(
    tables: Mapping[str, pd.DataFrame],
    *,
    quantities: Sequence[str] = ("s_mean", "t_std", "s_input", "t_input"),
) -> Figure:
    """Draw what the deepest level's coupling blocks predict over a training, on training positions.

    Args:
        tables: By the name of the run: rows of coupling.csv or of a record's coupling. Each run is a column
            of panels, each block a line.
        quantities: A row of panels each; columns of the tables.

    Source: paper Eq. 4 and Sec. 3.2.
    """
    figure, axes = _panels(list(tables), len(quantities), 1.75)
    for column, whole in zip(axes.T, tables.values(), strict=True):
        table = whole[(whole["group"] == "train") & (whole["level"] == whole["level"].max())]
        layers = sorted(table["layer"].unique())
        for ax, quantity in zip(column, quantities, strict=True):
            share = "%" in _COUPLING_LABELS[quantity]
            for layer, color in zip(layers, sns.color_palette("viridis", len(layers) + 1), strict=False):
                own = table[table["layer"] == layer]
                _curve(ax, own, quantity, 100 if share else 1, color=color, label=f"block {layer}")
            if not share:
                ax.axhline(0, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)))
    for ax, quantity in zip(axes[:, 0], quantities, strict=True):
        ax.set_ylabel(_COUPLING_LABELS[quantity])
        if "%" in _COUPLING_LABELS[quantity]:
            ax.set_ylim(0, 103)
    if len(axes[0, 0].get_legend_handles_labels()[1]) <= 12:
        shared_legend(figure, axes[0, :1], columns=6, below=True)
    figure.align_ylabels(axes[:, 0])
    return figure
