"""The paper's table beside what was measured here: paper | ours | difference | runs, out of the ledger.

Values are AUROC in percent, differences percentage points. An interval is the 95 % interval of Student's t
over the seeds of one set of images; it exists from two seeds on. It says how far the mean over other seeds
may fall, not how far another test set may: all seeds have the same images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from hgadbook import paper
from hgadlib.config import Config, load_config, training_key
from hgadlib.errors import InputError
from hgadlib.runs.directory import RunDirectory
from hgadlib.runs.experiment import finish_run, train_model
from hgadlib.runs.grid import Grid, load_grid
from hgadlib.runs.inputs import prepare
from hgadlib.runs.ledger import group_records, image_title, record_of


def choose_rows(
    ablation: Ablation,
    records: Sequence[Mapping[str, Any]],
    *,
    dataset: str,
    seed: int,
    rows: Sequence[str] | str,
) -> list[Config]:
    """Resolve which runs to train.

    Args:
        ablation: The table's rows.
        records: The ledger's.
        dataset: A file of params/.
        seed: Of the runs.
        rows: Experiments; "missing" for those of which the ledger has no run of this dataset and seed.

    Returns:
        The configurations, rows that train the same once. A row that another table shares has the directory
        of the grid's first such experiment, where the grid's run lies.

    Raises:
        InputError: A row that the table does not have.
    """
    if isinstance(rows, str) and rows != "missing":
        raise InputError(f"parameter rows: expected a list of experiments or missing, found {rows!r}")
    names = list(ablation.labels) if rows == "missing" else list(rows)
    if surplus := [name for name in names if name not in ablation.labels]:
        raise InputError(
            f"parameter rows: expected some of {', '.join(ablation.labels)}, found {', '.join(surplus)}"
        )
    groups = group_records(records)
    chosen: dict[str, Config] = {}
    for name in names:
        config = ablation.config(dataset, name, seed)
        there = groups.get(training_key(config, seed=False), ())
        if rows == "missing" and any(record["seed"] == seed for record in there):
            continue
        key = training_key(config)
        shared = (ablation.config(dataset, other, seed) for other in ablation.grid.experiments)
        chosen.setdefault(key, next((other for other in shared if training_key(other) == key), config))
    return list(chosen.values())


def train_rows(configs: Sequence[Config]) -> list[dict[str, Any]]:
    """Train, or load, each run and give its record, as the ledger would hold it.

    Returns:
        Records; each is named by its run directory, since it is not committed.
    """
    found = []
    for config in configs:
        run = RunDirectory.open(config)
        inputs = prepare(config)
        finish_run(config, inputs, train_model(config, inputs, run), run)
        name = f"{run.path.parent.parent.name}/{run.path.parent.name}/{run.path.name}"
        found.append(record_of(run.path) | {"record": f"run here: {name}"})
    return found


METRICS = paper.METRICS


@dataclass(frozen=True)
class Ablation:
    """One table of the paper and the experiments that are its rows.

    Attributes:
        table: Its name in :data:`hgadbook.paper.TABLES`.
        grid: The settings under which the rows are run.
        labels: Row by experiment, in the paper's order where it has them all, else in the grid's.
        reference: The experiment that the others are compared with: the whole method.
    """

    table: str
    grid: Grid
    labels: Mapping[str, str]
    reference: str

    def config(self, dataset: str, experiment: str, seed: int = 0) -> Config:
        """Resolve the configuration of one row."""
        return self.grid.config(dataset, experiment, seed)


def load_ablation(table: str, grid: str = "ablations", *, data_root: str | None = None) -> Ablation:
    """Find the rows of one of the tables 3a to 3e in a grid.

    Args:
        table: Such as "table3a".
        grid: A file of params/grids.
        data_root: Where the images of a folder lie, for rows that are to be trained.

    Raises:
        InputError: No such table or grid, or the grid has no row of it.
    """
    printed = paper.read_table(table)
    found = load_grid(grid, data_root=data_root)
    prefix = table.replace("table", "tab") + "_"
    experiments = [name for name in found.experiments if name.startswith(prefix)]
    if not experiments:
        raise InputError(
            f"grid {grid}: expected experiments named {prefix}*, found {', '.join(found.experiments)}"
        )
    names = dict(zip(printed["experiment"], printed["row"], strict=True)) if "experiment" in printed else {}
    if set(experiments) <= set(names):
        experiments = [name for name in names if name in experiments]
    labels = {name: names.get(name) or _own_label(found, name) for name in experiments}
    whole = training_key(found.config(found.datasets[0], "tab3a_full", 0))
    same = [n for n in experiments if training_key(found.config(found.datasets[0], n, 0)) == whole]
    # All rows of Tab. 3c train the same; the one scored as the paper scores is the reference.
    scored = [n for n in same if found.config(found.datasets[0], n, 0).score.criterion == "both"]
    return Ablation(table, found, labels, (scored or same or experiments)[0])


def measure(
    ablation: Ablation, records: Sequence[Mapping[str, Any]], *, criterion: str = "own"
) -> pd.DataFrame:
    """Collect what the ledger has of a table's rows: a line per run and metric.

    Args:
        ablation: The table's rows.
        records: The ledger's; a run counts for every row that trains the same.
        criterion: Which scores: "own" for the row's (the paper's product, unless the row is about it), or
            likelihood, entropy or both. Normalisation is inductive. A single Gaussian has the likelihood
            alone.

    Returns:
        Columns experiment, row, images, data (digest), seed, metric, value (percent, NaN without masks),
        record.
    """
    groups = group_records(records)
    titles = image_titles(records)
    datasets = dict.fromkeys([*ablation.grid.datasets, *(str(r["dataset"]) for r in records)])
    lines = []
    for dataset in datasets:
        for experiment, label in ablation.labels.items():
            config = ablation.config(dataset, experiment)
            name = config.score.criterion if criterion == "own" else criterion
            protocol = f"inductive/{'likelihood' if config.prior.kind == 'single' else name}"
            for record in groups.get(training_key(config, seed=False), ()):
                mean = record["other_protocols"].get(protocol, {})
                for metric in METRICS:
                    lines.append(
                        {
                            "experiment": experiment,
                            "row": label,
                            "images": titles[record["data"]["digest"]],
                            "data": record["data"]["digest"],
                            "seed": record["seed"],
                            "metric": metric,
                            "value": percent(mean.get(metric)),
                            "record": record["record"],
                        }
                    )
    columns = ["experiment", "row", "images", "data", "seed", "metric", "value", "record"]
    return pd.DataFrame(lines, columns=columns).astype({"value": float})


def compare(ablation: Ablation, runs: pd.DataFrame, images: str) -> pd.DataFrame:
    """Set the paper's rows beside the runs on one set of images.

    Args:
        ablation: The table's rows.
        runs: What :func:`measure` gave.
        images: The set's title.

    Returns:
        A line per row and metric: experiment, row, metric, paper, status, ours, half_width, difference (ours
        minus the paper, on other images and features), seeds, records (names). Rows of the paper that name no
        experiment come last.
    """
    printed = paper.read_table(ablation.table)
    mine = runs[runs["images"] == images]
    rows = dict(ablation.labels)
    others = printed[printed["experiment"] == ""]["row"]
    lines = []
    for experiment, row in [*rows.items(), *(("", row) for row in dict.fromkeys(others))]:
        for metric in METRICS:
            there = printed[(printed["row"] == row) & (printed["metric"] == metric)]
            value = float(there["value"].iloc[0]) if len(there) else np.nan
            status = str(there["status"].iloc[0]) if len(there) else "unreadable"
            own = mine[(mine["experiment"] == experiment) & (mine["metric"] == metric)]
            by_seed = own.groupby("seed")["value"].mean()
            lines.append(
                {
                    "experiment": experiment,
                    "row": row,
                    "metric": metric,
                    "paper": value,
                    "status": status,
                    "ours": by_seed.mean() if len(by_seed) else np.nan,
                    "half_width": half_width(by_seed),
                    "difference": by_seed.mean() - value if len(by_seed) else np.nan,
                    "seeds": len(by_seed),
                    "records": list(own["record"]),
                }
            )
    return pd.DataFrame(lines)


def judge(ablation: Ablation, runs: pd.DataFrame, images: str) -> pd.DataFrame:
    """Hold each ordering that the paper claims in this table against the runs on one set of images.

    The two rows are compared seed by seed, since runs of one seed share the order of the images and the
    initial flow.

    Returns:
        A line per claim and metric: claim, metric, paper (points by which the better row leads there), ours
        (mean over the seeds), half_width, seeds, agree (seeds of the claimed sign), verdict, source.
    """
    claims = paper.read_claims()
    claims = claims[claims["better"].str.startswith(ablation.table + "/")]
    mine = runs[runs["images"] == images]
    if len(mine):
        # Images without masks have nothing to say of pixels.
        claims = claims[claims["metric"].isin(mine.dropna(subset=["value"])["metric"])]
    lines = []
    for claim in claims.to_dict("records"):
        better, worse = (claim[side].split("/")[-1] for side in ("better", "worse"))
        gain = paper.value_of(claim["better"], claim["metric"]) - paper.value_of(
            claim["worse"], claim["metric"]
        )
        stated = claim["stated"] if np.isnan(gain) else gain
        found = paired(runs, images, claim["metric"], better, worse)
        lines.append(
            {
                "claim": f"{ablation.labels.get(better, better)} over {ablation.labels.get(worse, worse)}",
                "metric": claim["metric"],
                "paper": stated,
                "ours": found.mean() if len(found) else np.nan,
                "half_width": half_width(found),
                "seeds": len(found),
                "agree": int((found > 0).sum()),
                "verdict": verdict(found),
                "source": claim["source"],
            }
        )
    return pd.DataFrame(lines)


def paired(runs: pd.DataFrame, images: str, metric: str, one: str, other: str) -> pd.Series:
    """Subtract two rows seed by seed.

    Returns:
        Points by which ``one`` leads, by seed; only seeds that both rows have.
    """
    mine = runs[(runs["images"] == images) & (runs["metric"] == metric)].dropna(subset=["value"])
    by_seed = mine.groupby(["experiment", "seed"])["value"].mean()
    sides = [
        by_seed[name] if name in by_seed.index.get_level_values(0) else pd.Series(dtype=float)
        for name in (one, other)
    ]
    return (sides[0] - sides[1]).dropna()


def verdict(differences: Sequence[float] | pd.Series) -> str:
    """Say whether a claimed lead was seen.

    Returns:
        "seen" or "opposite" if the 95 % interval over two or more seeds leaves out 0; "undecided" if it holds
        0; "same sign, one run", "opposite sign, one run" or "no difference, one run"; "not measured".

    >>> verdict([1.0, 1.2, 1.1]), verdict([1.0, -1.0]), verdict([-0.5]), verdict([])
    ('seen', 'undecided', 'opposite sign, one run', 'not measured')
    """
    values = np.asarray(differences, dtype=float)
    if len(values) == 0:
        return "not measured"
    mean = float(values.mean())
    if len(values) == 1:
        return f"{'same sign' if mean > 0 else 'opposite sign' if mean < 0 else 'no difference'}, one run"
    if abs(mean) <= half_width(values):
        return "undecided"
    return "seen" if mean > 0 else "opposite"


def half_width(values: Sequence[float] | pd.Series | np.ndarray) -> float:
    r"""Give half the 95 % interval of a mean, :math:`t_{0.975, n-1}\, s / \sqrt n`.

    Args:
        values: One a seed; their scatter is taken as normal.

    Returns:
        NaN from fewer than two.

    >>> round(half_width([1.0, 2.0, 3.0]), 4)
    2.4841
    """
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))


def tally(judged: pd.DataFrame, images: str) -> str:
    """Count the verdicts in one sentence."""
    if (judged["verdict"] == "not measured").all():
        return f"{images}: none of the {len(judged)} orderings was measured."
    counts = judged["verdict"].value_counts()
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"{images}: of {len(judged)} orderings that the paper claims: {said}."


def switches(ablation: Ablation) -> dict[str, str]:
    """Tell what each row sets otherwise than the whole method."""
    dataset = ablation.grid.datasets[0]
    whole = _settings(ablation.config(dataset, ablation.reference))
    rows = {}
    for experiment, label in ablation.labels.items():
        mine = _settings(ablation.config(dataset, experiment))
        # One Gaussian for all classes has one loss; its weights play no part.
        parts = [k for k in mine if not (mine["prior.kind"] == "single" and k.startswith("loss."))]
        changed = [f"{key} = {_short(mine[key])}" for key in parts if mine[key] != whole[key]]
        rows[label] = ", ".join(changed) or "the whole method"
    return rows


def beside_paper(ablation: Ablation) -> pd.DataFrame:
    """List the settings in which the grid's runs differ from the paper's text: setting, paper, here."""
    given = _settings(load_config(dataset="mvtec", experiment="paper"))
    mine = {name: _settings(ablation.config(name, ablation.reference)) for name in ablation.grid.datasets}
    lines = []
    for key, value in given.items():
        here = {name: found[key] for name, found in mine.items()}
        if any(found != value for found in here.values()):
            same = len(set(map(str, here.values()))) == 1
            shown = (
                str(next(iter(here.values()))) if same else ", ".join(f"{v} ({n})" for n, v in here.items())
            )
            lines.append({"setting": key, "the paper's text": str(value), "here": shown})
    return pd.DataFrame(lines).set_index("setting")


def image_titles(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Name each set of images, by its digest; two sets of one name get their digests behind it."""
    titles = {record["data"]["digest"]: image_title(record) for record in records}
    names = list(titles.values())
    return {d: f"{t} ({d[:8]})" if names.count(t) > 1 else t for d, t in titles.items()}


def image_notes(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Tell of each set of images how it is split, and what its records note, by title."""
    found = list(records)
    titles = image_titles(found)
    notes = {}
    for record in found:
        counts, classes = record["counts"], len(record["data"]["classes"])
        text = (
            f"{classes} classes, {counts['train']} training images, tested on {counts['test_normal']} normal "
        )
        text += f"and {counts['test_anomalous']} anomalous ones"
        if record["dataset"] == "folder":
            text = str(record.get("note", "")).partition(":")[2].strip() or text
        notes[titles[record["data"]["digest"]]] = text
    return notes


def sets_of_images(ablation: Ablation, runs: pd.DataFrame) -> list[str]:
    """List the titles to show: the grid's datasets, run or not, then whatever else was run."""
    found = list(dict.fromkeys(runs["images"]))
    missing = [name for name in ablation.grid.datasets if not any(t.split(" (")[0] == name for t in found)]
    first = [t for t in found if t.split(" (")[0] in ablation.grid.datasets]
    return [*first, *missing, *(t for t in found if t not in first)]


def percent(value: float | None) -> float:
    """Turn a share into percent; NaN for None."""
    return float("nan") if value is None else 100 * value


def _settings(config: Config) -> dict[str, Any]:
    """Flatten what a run computes, without its name, its images and its seed."""
    return {
        f"{section}.{key}": value
        for section, values in config.identity().items()
        if isinstance(values, dict)
        for key, value in values.items()
        if key != "evaluate_every"
    }


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _own_label(grid: Grid, experiment: str) -> str:
    """Name a row that the paper's text does not let us read: by its lambda1 and lambda2."""
    loss = grid.config(grid.datasets[0], experiment, 0).loss
    return f"({loss.lambda1:g}, {loss.lambda2:g})"
