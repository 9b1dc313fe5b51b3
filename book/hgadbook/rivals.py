"""Every method of the paper's Tab. 1 on the images that could be had: accuracy, cost, ranks, its ordering."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from pandas.io.formats.style import Styler
from scipy import stats

from hgadbook.ablations import half_width, percent
from hgadbook.paper import number_text, read_table, records_cell, value_of
from hgadbook.results import PriorRuns, lead_text, leads_by_set, mean_lead, prior_lead, prior_runs
from hgadlib.evaluation.compare import interval, mean_ranks
from hgadlib.figures.tables import styled
from hgadlib.figures.theme import PALETTE

TITLES = {
    "hgad": "HGAD", "fast": "HGAD at 256 pixels", "baseline_cflow": "CFLOW", "baseline_fastflow": "FastFlow",
    "baseline_padim": "PaDiM", "baseline_patchcore": "PatchCore",
    "baseline_bank_all": "neighbours, one bank", "baseline_neighbours": "neighbours, a bank per class",
    "baseline_gaussians": "a Gaussian per class", "baseline_uniad": "UniAD", "baseline_stfpm": "STFPM",
    "baseline_draem": "DRAEM", "baseline_pmad": "PMAD", "baseline_omnial": "OmniAL",
}  # fmt: skip
"""Methods by experiment, as the tables name them."""
ON_DEFAULT_FEATURES = ("baseline_neighbours", "baseline_gaussians")
"""Experiments that take whatever features the default's settings give."""
_PAPER = {name: {"STFPM": "MKD"}.get(title, title) for name, title in TITLES.items()}
# What a method must be told beside the images, by experiment; others take normal images of no named class.
_NEEDS = {
    "hgad": "classes", "fast": "classes", "baseline_neighbours": "classes", "baseline_gaussians": "classes",
    "baseline_draem": "drawn defects", "baseline_omnial": "drawn defects",
}  # fmt: skip

Rivals = dict[str, PriorRuns]
"""Records of a grid of methods, by images."""


def rival_runs(records: Iterable[Mapping[str, Any]], setting: str = "unified") -> Rivals:
    """Find the runs of params/grids/baselines.yaml: of one model for all classes, or "one_for_one"."""
    return prior_runs(records, "baselines" if setting == "unified" else f"baselines_{setting}")


def best_rivals(records: Iterable[Mapping[str, Any]], images: str, count: int) -> list[str]:
    """Name the experiments of others than HGAD with the highest mean image AUROC on a set of images."""
    found = rival_runs(records).get(images, {})
    scores = {name: float(np.mean(_values(of, "image_auroc"))) for name, of in found.items()}
    others = [name for name in scores if name not in ("hgad", "fast")]
    return sorted(others, key=lambda name: -scores[name])[:count]


def _values(of: Mapping[int, Mapping[str, Any]], metric: str) -> list[float]:
    return [percent(record["mean"].get(metric)) for record in of.values()]


def accuracy_table(images: str, unified: PriorRuns, alone: PriorRuns) -> Styler:
    """Set out every method on one set of images, in percent, best first, and name those that lack runs.

    "apart" is the image AUROC with a model for each class, and "gain apart" what that adds, seed by seed.
    """
    lines: dict[str, dict[str, str]] = {}
    order = sorted(unified, key=lambda name: -float(np.mean(_values(unified[name], "image_auroc"))))
    for name in order:
        of, line = unified[name], {}
        for metric, title in (("image_auroc", "image"), ("pixel_auroc", "pixel"), ("aupro", "AUPRO")):
            values = _values(of, metric)
            line[title] = number_text(float(np.mean(values)), half_width(values))
        lead = None if name == "hgad" else prior_lead(unified, "hgad", name)
        line["HGAD's lead, image"] = "–" if name == "hgad" else lead_text(lead)
        apart = alone.get(name, {})
        values = _values(apart, "image_auroc")
        line["apart"] = number_text(float(np.mean(values)) if values else np.nan, half_width(values))
        both = [s for s in of if s in apart]
        gains = [100 * (apart[s]["mean"]["image_auroc"] - of[s]["mean"]["image_auroc"]) for s in both]
        line["gain apart"] = number_text(float(np.mean(gains)) if gains else np.nan, sign="+")
        line["runs"] = records_cell([r["record"] for r in (*of.values(), *apart.values())])
        lines[TITLES[name]] = line
    table = pd.DataFrame.from_dict(lines, orient="index")
    table = table.loc[:, (table != "–").any()]
    missing = [title for name, title in TITLES.items() if name not in unified]
    caption = f"<b>{html.escape(images)}</b>" + f"; not measured: {', '.join(missing)}" * bool(missing)
    return styled(table, name=f"rivals-{images}", caption=caption, markup=["runs"])


def cost_table(found: Rivals) -> Styler:
    """Set out what the methods need and cost, by the same runs (paper Tab. 4, 5).

    How long a method trains is of each set of images, all else of the first one that the method was run on.
    """
    lines: dict[str, dict[str, str]] = {}
    devices, busy = set(), False
    for name in (name for name in TITLES if any(name in of for of in found.values())):
        first, *_ = runs = {images: of[name][min(of[name])] for images, of in found.items() if name in of}
        record = runs[first]
        cost = record.get("cost")
        line = {"needs": _NEEDS.get(name, "–"), "epochs": str(record["epochs"])}
        adds = cost and cost["multiply_adds"]
        line["G multiply-adds"] = (
            f"{adds['backbone'] / 1e9:.1f}\xa0+\xa0{adds['method'] / 1e9:.2f}" if adds else "–"
        )
        line["learnt (M)"] = f"{cost['numbers']['learnt'] / 1e6:.1f}" if cost else "–"
        line["stored (M)"] = f"{cost['numbers']['stored'] / 1e6:.1f}" if cost else "–"
        for images, run in runs.items():
            mark = "*" * _busy(run)
            line[f"fit, {images} (min)"] = f"{run['timing']['train_s'] / 60:.1f}{mark}"
        line["images/s"] = f"{record['timing']['predict_images_per_s']:.1f}{'*' * _busy(record)}"
        devices |= {run["environment"]["device"] for run in runs.values()}
        busy |= any(map(_busy, runs.values()))
        lines[TITLES[name]] = line
    columns = dict.fromkeys(column for line in lines.values() for column in line if column != "images/s")
    table = pd.DataFrame.from_dict(lines, orient="index", columns=[*columns, "images/s"] if lines else None)
    caption = f"On {html.escape('; '.join(sorted(devices)))}" if devices else ""
    caption += "; * beside other work: no measure" * busy
    return styled(table.fillna("–"), name="rivals-cost", caption=caption)


def _busy(record: Mapping[str, Any]) -> bool:
    """Tell whether a run's note denies its times."""
    return "no measure" in str(record.get("note"))


def class_ranks(found: Rivals) -> pd.DataFrame:
    """Average each method's image AUROC over its seeds, for the classes of all sets: a column a class.

    Methods that lack a set are left out, so that ranks are of the same classes.
    """
    common = [name for name in TITLES if found and all(name in runs for runs in found.values())]
    columns = {
        (images, k): {
            TITLES[name]: float(np.mean([r["per_class"][k]["image_auroc"] for r in runs[name].values()]))
            for name in common
        }
        for images, runs in (found.items() if common else ())
        for k, values in next(iter(runs[common[0]].values()))["per_class"].items()
        if values["image_auroc"] is not None
    }
    return pd.DataFrame(columns)


def critical_difference(count: int, classes: int, level: float = 0.05) -> float:
    """Return by how much mean ranks of methods over classes must differ to be told apart (Nemenyi's test).

    >>> round(critical_difference(4, 14), 2)
    1.25
    """
    q = float(stats.studentized_range.ppf(1 - level, count, np.inf)) / np.sqrt(2)
    return float(q * np.sqrt(count * (count + 1) / (6 * classes)))


def rank_diagram(values: pd.DataFrame) -> Axes:
    """Draw mean ranks over classes, 1 the best, with bars over methods that are not told apart.

    Args:
        values: As of :func:`class_ranks`.
    """
    ranks = pd.Series(mean_ranks(values.to_numpy()), index=values.index).sort_values()
    apart = critical_difference(*values.shape)
    _, ax = plt.subplots(figsize=(7, 0.28 * len(ranks) + 1.2), layout="constrained")
    rows = np.arange(len(ranks))
    ax.hlines(rows, 1, ranks, color="0.85", linewidth=1)
    colours = [PALETTE[3] if name == TITLES["hgad"] else PALETTE[0] for name in ranks.index]
    ax.scatter(ranks, rows, c=colours, s=36, zorder=3)
    ax.set_yticks(rows, list(ranks.index))
    ax.invert_yaxis()
    reached = -1
    for first, rank in enumerate(ranks):
        last = int(np.flatnonzero(ranks.to_numpy() <= rank + apart)[-1])
        if last > max(reached, first):
            ax.plot([ranks.iloc[last] + 0.12] * 2, [first, last], color="0.4", linewidth=2)
            reached = last
    ax.set_xlim(0.8, len(ranks) + 0.5)
    ax.set_xlabel(f"mean rank over {values.shape[1]} classes (critical difference {apart:.1f})")
    ax.spines[["top", "right", "left"]].set_visible(False)
    return ax


def ordering_table(found: Rivals) -> Styler:
    """Set the paper's leads of HGAD over each method in Tab. 1 beside those here, in points, with verdicts.

    *Seen* means that the 95 % interval over images and seeds of the mean over the sets has the paper's sign,
    *opposite* the other, *undecided* that it holds 0.
    """
    lines = {}
    known = set(read_table("table1")["method"])
    for name, title in TITLES.items():
        paper = np.nan
        if _PAPER[name] in known and name != "hgad":
            paper = value_of("table1/Mean/HGAD", "image_auroc") - value_of(
                f"table1/Mean/{_PAPER[name]}", "image_auroc"
            )
        found_leads = {} if name == "hgad" else leads_by_set(found, "hgad", name)
        if not found_leads:
            continue
        line = {"paper": number_text(paper, sign="+")}
        line |= {images: number_text(lead[0], sign="+") for images, lead in found_leads.items()}
        mean = mean_lead(found_leads)
        low, high = interval(mean[1])
        line["mean"] = lead_text(mean)
        sign = paper if paper == paper else 1.0
        word = "undecided" if low <= 0 <= high else "seen" if (low > 0) == (sign > 0) else "opposite"
        line["verdict"] = word if paper == paper else {"seen": "HGAD ahead", "opposite": "HGAD behind"}.get(
            word, word
        )  # fmt: skip
        same = "" if _PAPER[name] == title else f" (in the paper {_PAPER[name]})"
        lines[title + same] = line
    # A method that lacks the first sets must not put them last.
    columns = ["paper", *found, "mean", "verdict"] if lines else None
    table = pd.DataFrame.from_dict(lines, orient="index").reindex(columns=columns).fillna("not measured")
    return styled(table, name="rivals-ordering")


def ordering_sentence(found: Rivals) -> str:
    """Say which methods HGAD is ahead of, behind, or not told apart from, by the mean over their sets."""
    sides: dict[str, list[str]] = {"ahead of": [], "behind": [], "not told apart from": []}
    for name in (name for name in TITLES if name != "hgad"):
        if leads := leads_by_set(found, "hgad", name):
            low, high = interval(mean_lead(leads)[1])
            side = "ahead of" if low > 0 else "behind" if high < 0 else "not told apart from"
            fewer = "" if len(leads) == len(found) else f" ({', '.join(leads)})"
            sides[side].append(TITLES[name] + fewer)
    count = sum(map(len, sides.values()))
    if not count:
        return "Other methods: not measured yet."
    said = "; ".join(f"{side} {len(of)}: {', '.join(of)}" for side, of in sides.items() if of)
    return f"Of {count} other way{'s' * (count != 1)} to detect, HGAD's default is {said}."
