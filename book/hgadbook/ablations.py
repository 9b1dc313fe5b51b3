"""Tab. 3a to 3e beside what was measured here: paper | ours | difference | runs, and the paper's claims.

Values are AUROC in percent, differences percentage points. An interval is the 95 % interval of Student's t
over the seeds of one set of images; it exists from two seeds on. It says how far the mean over other seeds
may fall, not how far another test set may: all seeds have the same images.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas.io.formats.style import Styler
from scipy import stats

from hgadbook import behind
from hgadbook.paper import METRICS, number_text, read_table, records_cell, value_of
from hgadlib.config import Config, load_config, training_key
from hgadlib.errors import InputError
from hgadlib.figures.tables import METRIC_LABELS, fact_table, styled
from hgadlib.figures.theme import PALETTE, literal, panel_grid
from hgadlib.runs.directory import RunDirectory
from hgadlib.runs.experiment import finish_run, train_model
from hgadlib.runs.grid import Grid, load_grid
from hgadlib.runs.inputs import prepare
from hgadlib.runs.ledger import group_records, image_title, read_records, record_of

Criterion = Literal["own", "likelihood"]
"""By what rows are scored: each by its own criterion (the paper's product, unless the row is about it), or
all by the likelihood alone."""
_SCORED = {"own": "scored as in the paper", "likelihood": "all by the likelihood alone"}
_COLORS = {"image_auroc": PALETTE[2], "pixel_auroc": PALETTE[4]}


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


def load_ablation(table: str, grid: str = "ablations", *, data_root: str | None = None) -> Ablation:
    """Find the rows of a table, such as "table3a", in params/grids/GRID.yaml.

    Raises:
        InputError: No such table or grid, or the grid has no row of it.
    """
    printed = read_table(table)
    found = load_grid(grid, data_root=data_root)
    prefix = table.replace("table", "tab") + "_"
    experiments = [name for name in found.experiments if name.startswith(prefix)]
    configs = {name: found.config(found.datasets[0], name, 0) for name in experiments}
    if not experiments:
        raise InputError(
            f"grid {grid}: expected experiments named {prefix}*, found {', '.join(found.experiments)}"
        )
    # A row that the paper's text does not let us read is named by its lambda1 and lambda2.
    own = {name: f"({c.loss.lambda1:g}, {c.loss.lambda2:g})" for name, c in configs.items()}
    names = dict(zip(printed["experiment"], printed["row"], strict=True))
    order = [name for name in names if name in configs] if set(configs) <= set(names) else list(configs)
    whole = training_key(found.config(found.datasets[0], "tab3a_full", 0))
    same = [name for name in order if training_key(configs[name]) == whole]
    # All rows of Tab. 3c train the same; the one scored as the paper scores is the reference.
    scored = [name for name in same if configs[name].score.criterion == "both"]
    return Ablation(table, found, {n: names.get(n, own[n]) for n in order}, (scored or same or order)[0])


def runs_to_train(
    ablation: Ablation,
    records: Iterable[Mapping[str, Any]],
    rows: Sequence[str] | str,
    *,
    dataset: str,
    seed: int,
) -> list[Config]:
    """List the runs of some rows (experiments) on one dataset with one seed, rows that train the same once.

    The rows "missing" are those of which the records have no run of this dataset and seed. A row that
    another table shares has the directory of the grid's first such experiment, where the grid's run lies.

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
    if not names:
        return []
    configs = {name: ablation.grid.config(dataset, name, seed) for name in ablation.grid.experiments}
    first = {training_key(config): config for config in reversed(configs.values())}
    if rows == "missing":
        seeds = {key: [r["seed"] for r in found] for key, found in group_records(records).items()}
        names = [name for name in names if seed not in seeds.get(training_key(configs[name], seed=False), ())]
    return [first[key] for key in dict.fromkeys(training_key(configs[name]) for name in names)]


def train(config: Config) -> dict[str, Any]:
    """Train, or load, a run; return its record as the ledger would hold it, named by the run's directory."""
    run = RunDirectory.open(config)
    inputs = prepare(config)
    finish_run(config, inputs, train_model(config, inputs, run), run)
    return record_of(run.path) | {"record": f"run here: {'/'.join(run.path.parts[-3:])}"}


def collect_records(
    ablation: Ablation, rows: Sequence[str] | str, *, dataset: str, seed: int
) -> list[dict[str, Any]]:
    """Read the ledger, and train what is asked for, see :func:`runs_to_train`."""
    records = read_records()
    return [*records, *map(train, runs_to_train(ablation, records, rows, dataset=dataset, seed=seed))]


@dataclass(frozen=True)
class Comparison:
    """A table of the paper beside the runs of its rows, for each set of images.

    Attributes:
        ablation: The table's rows.
        criterion: By what they are scored.
        runs: A line per run and metric: experiment, images, seed, metric, value (percent, NaN without
            masks), record. A run counts for every row that trains the same.
        tables: By set of images a line per row and metric: experiment, row, metric, paper, status, ours,
            half_width, difference (ours minus the paper, on other images and features), seeds, records
            (names). Rows of the paper that name no experiment come last.
        claims: By set of images a line per ordering that the paper claims: claim, metric, paper (points by
            which the better row leads there), ours (mean over the seeds), half_width, seeds, agree (seeds of
            the claimed sign), verdict, source.
        notes: How each set of images is split.
    """

    ablation: Ablation
    criterion: Criterion
    runs: pd.DataFrame
    tables: Mapping[str, pd.DataFrame]
    claims: Mapping[str, pd.DataFrame]
    notes: Mapping[str, str]


def compare(
    ablation: Ablation, records: Sequence[Mapping[str, Any]], *, criterion: Criterion = "own"
) -> Comparison:
    """Set a table of the paper beside what the ledger has, with inductive normalisation.

    The sets of images are the grid's datasets, run or not, then whatever else was run.
    """
    runs = _runs(ablation, records, criterion)
    found = {title: title.split(" (")[0] for title in dict.fromkeys(runs["images"])}
    datasets = ablation.grid.datasets
    order = [title for title, dataset in found.items() if dataset in datasets]
    order += [dataset for dataset in datasets if dataset not in found.values()]
    order += [title for title in found if title not in order]
    parts = {images: runs[runs["images"] == images] for images in order}
    return Comparison(
        ablation,
        criterion,
        runs,
        {images: _beside_paper(ablation, part) for images, part in parts.items()},
        {images: _claims(ablation, part) for images, part in parts.items()},
        image_notes(records),
    )


def _runs(ablation: Ablation, records: Sequence[Mapping[str, Any]], criterion: Criterion) -> pd.DataFrame:
    groups, titles = group_records(records), image_titles(records)
    datasets = dict.fromkeys([*ablation.grid.datasets, *(str(r["dataset"]) for r in records)])
    lines = []
    for dataset in datasets:
        for experiment in ablation.labels:
            config = ablation.grid.config(dataset, experiment, 0)
            name = config.criterion if criterion == "own" else criterion
            for record in groups.get(training_key(config, seed=False), ()):
                mean = record["other_protocols"].get(f"inductive/{name}", {})
                images, seed = titles[record["data"]["digest"]], record["seed"]
                for metric in METRICS:
                    value = percent(mean.get(metric))
                    lines.append((experiment, images, seed, metric, value, record["record"]))
    columns = ["experiment", "images", "seed", "metric", "value", "record"]
    return pd.DataFrame(lines, columns=columns).astype({"value": float})


def _beside_paper(ablation: Ablation, runs: pd.DataFrame) -> pd.DataFrame:
    printed = read_table(ablation.table)
    cells = {(line["row"], line["metric"]): line for line in printed.to_dict("records")}
    others = printed[printed["experiment"] == ""]["row"]
    lines = []
    for experiment, row in [*ablation.labels.items(), *(("", row) for row in dict.fromkeys(others))]:
        for metric in METRICS:
            cell = cells.get((row, metric), {"value": np.nan, "status": "unreadable"})
            own = runs[(runs["experiment"] == experiment) & (runs["metric"] == metric)]
            by_seed = own.groupby("seed")["value"].mean()
            ours = by_seed.mean() if len(by_seed) else np.nan
            lines.append(
                {
                    "experiment": experiment,
                    "row": row,
                    "metric": metric,
                    "paper": float(cell["value"]),
                    "status": str(cell["status"]),
                    "ours": ours,
                    "half_width": half_width(by_seed),
                    "difference": ours - float(cell["value"]),
                    "seeds": len(by_seed),
                    "records": list(own["record"]),
                }
            )
    return pd.DataFrame(lines)


def _claims(ablation: Ablation, runs: pd.DataFrame) -> pd.DataFrame:
    """Compare the two rows of each claim seed by seed: these share the order of images and initial flow."""
    claims = read_table("claims")
    claims = claims[claims["better"].str.startswith(ablation.table + "/")]
    measured = runs.dropna(subset=["value"])
    if len(runs):
        # Images without masks have nothing to say of pixels.
        claims = claims[claims["metric"].isin(measured["metric"])]
    lines = []
    for claim in claims.to_dict("records"):
        metric, sides = claim["metric"], [claim["better"], claim["worse"]]
        paper = value_of(sides[0], metric) - value_of(sides[1], metric)
        better, worse = (side.split("/")[-1] for side in sides)
        found = measured[measured["metric"] == metric]
        by_seed = found.pivot_table(index="seed", columns="experiment", values="value")
        by_seed = by_seed.reindex(columns=[better, worse])
        leads = (by_seed[better] - by_seed[worse]).dropna()
        lines.append(
            {
                "claim": f"{ablation.labels.get(better, better)} over {ablation.labels.get(worse, worse)}",
                "metric": metric,
                # Where the table cannot be read, what a sentence says.
                "paper": claim["stated"] if np.isnan(paper) else paper,
                "ours": leads.mean() if len(leads) else np.nan,
                "half_width": half_width(leads),
                "seeds": len(leads),
                "agree": int((leads > 0).sum()),
                "verdict": verdict(leads),
                "source": claim["source"],
            }
        )
    return pd.DataFrame(lines)


def verdict(differences: Sequence[float] | pd.Series) -> str:
    """Tell whether a claimed lead was seen.

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
    r"""Compute half the 95 % interval of a mean, :math:`t_{0.975, n-1}\, s / \sqrt n`.

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


def percent(value: float | None) -> float:
    """Turn a share into percent; NaN for None."""
    return float("nan") if value is None else 100 * value


def image_titles(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Name each set of images, by its digest; two sets of one name get their digests behind it."""
    titles = {record["data"]["digest"]: image_title(record) for record in records}
    names = list(titles.values())
    return {d: f"{t} ({d[:8]})" if names.count(t) > 1 else t for d, t in titles.items()}


def image_notes(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Tell of each set of images how it is split, or what its records note, by title."""
    titles, notes = image_titles(records), {}
    for record in records:
        counts, classes = record["counts"], len(record["data"]["classes"])
        text = (
            f"{classes} classes, {counts['train']} training images, tested on {counts['test_normal']} normal "
            f"and {counts['test_anomalous']} anomalous ones"
        )
        if record["dataset"] == "folder":
            text = str(record.get("note", "")).partition(":")[2].strip() or text
        notes[titles[record["data"]["digest"]]] = text
    return notes


def show_switches(ablation: Ablation) -> Styler:
    """Show what each row sets differently from the whole method."""
    dataset = ablation.grid.datasets[0]
    rows = {name: _settings(ablation.grid.config(dataset, name, 0)) for name in ablation.labels}
    whole, facts = rows[ablation.reference], {}
    for name, row in rows.items():
        changed = [
            f"{key} = {f'{value:g}' if isinstance(value, float) else value}"
            for key, value in row.items()
            # One Gaussian for all classes has one loss; its weights play no part.
            if value != whole[key] and not (row["prior.kind"] == "single" and key.startswith("loss."))
        ]
        facts[ablation.labels[name]] = ", ".join(changed) or "the whole method"
    return fact_table(facts)


def show_departures(ablation: Ablation) -> Styler:
    """Show the settings in which the grid's runs differ from the paper's text: setting, paper, here."""
    grid, lines = ablation.grid, {}
    here = {name: _settings(grid.config(name, ablation.reference, 0)) for name in grid.datasets}
    for key, value in _settings(load_config(dataset="mvtec", experiment="paper")).items():
        if any(found[key] != value for found in here.values()):
            texts = {name: str(found[key]) for name, found in here.items()}
            one = len(set(texts.values())) == 1
            text = ", ".join(set(texts.values()) if one else (f"{t} ({n})" for n, t in texts.items()))
            lines[key] = {"the paper's text": str(value), "here": text}
    return styled(pd.DataFrame.from_dict(lines, orient="index").rename_axis("setting"), name="settings")


def _settings(config: Config) -> dict[str, Any]:
    """Flatten what a run computes, without its name, its images and its seed."""
    return {
        f"{section}.{key}": value
        for section, values in config.identity().items()
        if isinstance(values, dict)
        for key, value in values.items()
        if key != "evaluate_every"
    }


def show_tables(comparison: Comparison) -> None:
    """Show the paper's table beside ours for each set of images."""
    from IPython.display import display

    for images in comparison.tables:
        display(comparison_table(comparison, images))


def comparison_table(comparison: Comparison, images: str) -> Styler:
    """Set out paper | ours | difference | runs for one set of images, a row per row of the paper's table."""
    compared = comparison.tables[images]
    cells: dict[tuple[str, str], list[str]] = {}
    for metric, part in compared.groupby("metric", sort=False):
        if part["seeds"].sum() and part["ours"].isna().all():
            continue  # a set without masks
        head, rows = f"{METRIC_LABELS[str(metric)]} (%)", part.to_dict("records")
        cells[head, "paper"] = [
            str(row["status"]) if np.isnan(row["paper"]) else number_text(row["paper"]) for row in rows
        ]
        cells[head, "ours"] = [
            number_text(row["ours"], row["half_width"]) if row["seeds"] else "not measured" for row in rows
        ]
        cells[head, "difference"] = [number_text(row["difference"], sign="+") for row in rows]
    runs = compared.groupby("row", sort=False)["records"].first()
    cells["", "runs"] = [records_cell(records) for records in runs]
    table = pd.DataFrame(dict(enumerate(cells.values())), index=pd.Index(runs.index, name=None))
    table.columns = pd.MultiIndex.from_tuples(list(cells))
    own = comparison.criterion == "own"
    # A page shows the runs by their own criterion first, and there how the images are split.
    note = comparison.notes.get(images, "") if own else ""
    caption = f"<b>{html.escape(images)}</b>" + (f". {html.escape(note)}" if note else "")
    name = f"{'compared' if own else 'plain'}-{images}"
    whole = comparison.ablation.labels[comparison.ablation.reference]
    return styled(table, name=name, caption=caption, emphasise=[whole], markup=[("", "runs")])


def show_points(comparison: Comparison) -> Figure:
    """Draw each run as a point, the mean over seeds with its interval, and the paper's number, row by row.

    Sets of images without runs are left out, unless there is no other.
    """
    tables, runs = comparison.tables, comparison.runs
    shown = [title for title, part in tables.items() if part["seeds"].sum()] or [*tables][:1]
    labels = list(comparison.ablation.labels.values())
    figure, panels = panel_grid(len(shown), 3, 3.3, 1.1 + 0.42 * len(labels), sharey=True)
    for ax, title in zip(panels, shown, strict=True):
        for row in tables[title].sort_values("metric", kind="stable").to_dict("records"):
            if row["row"] not in labels:
                continue
            color = _COLORS[row["metric"]]
            y = labels.index(row["row"]) + (-0.16 if row["metric"] == "image_auroc" else 0.16)
            own = runs[(runs["images"] == title) & (runs["metric"] == row["metric"])]
            points = own[own["experiment"] == row["experiment"]]["value"]
            ax.plot(points, np.full(len(points), y), "o", color=color, markersize=4, alpha=0.6)
            if row["seeds"] > 1 and not np.isnan(row["ours"]):
                ends = [row["ours"] - row["half_width"], row["ours"] + row["half_width"]]
                ax.plot(ends, [y, y], "-", color=color, linewidth=1.2)
                ax.plot(row["ours"], y, "|", color=color, markersize=9)
            ax.plot(row["paper"], y, "D", color=color, markersize=5, fillstyle="none")
        ax.set_title(literal(title), loc="left")
        ax.set_xlabel("AUROC (%)")
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.grid(axis="x", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
    marks = [
        Line2D([], [], color=color, marker="o", linestyle="none", label=METRIC_LABELS[metric])
        for metric, color in _COLORS.items()
    ]
    marks += [
        Line2D([], [], color="0.3", marker="o", markersize=4, linestyle="none", alpha=0.6, label="one run"),
        Line2D([], [], color="0.3", marker="|", markersize=9, linestyle="-", label="mean, 95 % interval"),
        Line2D([], [], color="0.3", marker="D", fillstyle="none", linestyle="none", label="paper, MVTec AD"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=min(5, 2 * len(shown) + 1))
    own = runs.loc[runs["images"].isin(shown), "record"]
    return behind(figure, own[~own.str.startswith("run here")])  # those made here have no file in the ledger


def show_claims(comparison: Comparison) -> None:
    """Show for each set of images the orderings that the paper claims, and what the runs say of them."""
    from IPython.display import display

    for images, claims in comparison.claims.items():
        rows = claims.to_dict("records")
        table = pd.DataFrame(
            {
                "AUROC": [str(row["metric"]).split("_")[0] for row in rows],
                "paper": [number_text(row["paper"], sign="+") for row in rows],
                "ours": [number_text(row["ours"], row["half_width"], sign="+") for row in rows],
                "seeds": [f"{row['agree']} of {row['seeds']}" if row["seeds"] else "–" for row in rows],
                "verdict": [str(row["verdict"]) for row in rows],
            },
            index=pd.Index([str(row["claim"]) for row in rows], name=None),
        )
        name = "claims" if comparison.criterion == "own" else "plain-claims"
        caption = f"<b>{html.escape(images)}</b>, percentage points"
        display(styled(table, name=f"{name}-{images}", caption=caption))


def claim_sentences(*comparisons: Comparison, words: Mapping[str, str] | None = None) -> list[str]:
    """Say which of the paper's orderings were seen here, and count them on each set of images.

    Args:
        *comparisons: By the last one the orderings of image AUROC are named.
        words: What to call parts of a row's name instead.
    """
    last = comparisons[-1]
    whole = pd.concat(list(last.claims.values()), ignore_index=True)
    claims = whole[whole["metric"] == "image_auroc"].groupby("claim", sort=False)["verdict"].agg(set)
    seen, opposite = (claims.map(lambda words, word=word: word in words) for word in ("seen", "opposite"))
    parts = {
        "seen on some set and opposite on none": seen & ~opposite,
        "opposite on some set and seen on none": opposite & ~seen,
        "seen on one set and opposite on another": seen & opposite,
    }
    named = [f"{text}: {', '.join(claims.index[chosen])}" for text, chosen in parts.items() if chosen.any()]
    for part, word in (words or {}).items():
        named = [text.replace(part, word) for text in named]
    rest = "none was measured" if set(whole["verdict"]) == {"not measured"} else "none was seen or opposite"
    said = [
        f"Of the paper's orderings of image AUROC, {_SCORED[last.criterion]}, {'; '.join(named) or rest}."
    ]
    for comparison in comparisons:
        texts = [text for images, of in comparison.claims.items() if (text := _counts(images, of["verdict"]))]
        counted = "; ".join(texts) or "none measured"
        said.append(f"Of image and pixel AUROC, {_SCORED[comparison.criterion]}: {counted}.")
    if not any(title.split(" (")[0] == "mvtec" for title in set(last.runs["images"])):
        said.append("MVTec AD, the images of the paper's table, was not measured here.")
    return said


def _counts(images: str, verdicts: pd.Series) -> str:
    """Count verdicts of one set of images; a single run decides nothing. Empty where none was measured."""
    alone = int(verdicts.str.endswith("one run").sum())
    words = {word: int((verdicts == word).sum()) for word in ("seen", "opposite", "undecided")}
    words["undecided"] += alone
    if not any(words.values()):
        return ""
    text = ", ".join(f"{count} {word}" for word, count in words.items())
    return f"on {images} {text}" + (f" ({alone} by one run)" if alone else "")
