"""How settings were chosen on drawn defects: what benchmarks/choice.py and fit.py measured.

A setting is an image size and stages for each level, how covariances and positions are shrunk, and how values
become scores. Each was tested twice: on drawn defects, which choose, and on the test set, which only says how
well they chose.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas.io.formats.style import Styler

from hgadbook import behind
from hgadbook.paper import number_text
from hgadlib.config import Config, load_config, project_dir
from hgadlib.figures.tables import styled
from hgadlib.figures.theme import PALETTE, literal, panel_grid
from hgadlib.scoring import normal_statistics

PARTS = {
    "levels": "image sizes and stages",
    "shrinkage": "shrinkage of the covariances (prior.shrinkage)",
    "normalisation": "normalisation (score.normalisation)",
    "kappa": "shrinkage of positions (kappa)",
    "sigma": "blur (score.sigma)",
    "image": "image score (score.image)",
}
"""The parts of a setting, columns of :func:`read_choice`, and what a reader calls them."""
NOT_MEASURED = "not measured yet: run benchmarks/choice.py"
_CHOICES, _FITS = "results/benchmarks/choice-cpu.jsonl", "results/benchmarks/fit-cpu.jsonl"
_PARTS = list(PARTS)
_METRICS = [
    f"{of}_{metric}" for of in ("drawn", "real") for metric in ("image_auroc", "aupro", "pixel_auroc")
]
_STEP_METRICS = ["drawn_image_auroc", "real_image_auroc", "drawn_aupro", "real_aupro"]
# A choice is called near the best where no more points than this are lost.
_NEAR = 1.0
# What stands beside the sets; a set of that name would be lost.
_MEAN = "mean"


def read_choice(file: Path | None = None) -> pd.DataFrame:
    """Read what benchmarks/choice.py printed: a row per data set, draw and setting, in the order of the file.

    Args:
        file: JSON lines; None for results/benchmarks/choice-cpu.jsonl.

    Returns:
        Columns dataset, draw, the parts of the setting (text; see :data:`PARTS`), and image AUROC, AUPRO and
        pixel AUROC on drawn and real defects, in percent, NaN where not measured. No row without the file.
    """
    file = project_dir() / _CHOICES if file is None else file
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.is_file() else ())
    rows = [
        {"dataset": line["dataset"], "draw": line["draw"]} | _setting(line) | _percent(line)
        for line in lines
        if line["what"] == "setting"
    ]
    keys = ["dataset", "draw", *_PARTS]
    found = pd.DataFrame(rows, columns=[*keys, *_METRICS])
    # Of a data set that was measured again, the last counts.
    return found.astype(dict.fromkeys(_METRICS, float)).drop_duplicates(keys, keep="last", ignore_index=True)


def _setting(values: Mapping[str, Any]) -> dict[str, str]:
    """Write the parts of a setting, so that equal ones have equal texts."""
    image, sigma = values["image"], values["sigma"]
    return {
        "levels": ", ".join(values["levels"]),
        "shrinkage": f"{values['shrinkage']:g}",
        "normalisation": values["normalisation"],
        "kappa": f"{values['kappa']:g}",
        "sigma": "half the stride" if sigma is None else f"{sigma:g}",
        # A maximum has no share.
        "image": image if image == "maximum" else f"{image} {100 * values['image_share']:g} %",
    }


def _percent(line: Mapping[str, Any]) -> dict[str, float]:
    values = {name: line[name.split("_")[0]].get(name.split("_", 1)[1]) for name in _METRICS}
    return {name: np.nan if value is None else 100 * value for name, value in values.items()}


def default_setting() -> dict[str, str]:
    """Return the parts of the library's default, as :func:`read_choice` writes them."""
    config = Config()
    # Of the Gaussians per class that stand in for the model here.
    shrinkage = load_config(experiment="baseline_gaussians").prior.shrinkage
    features, score = config.features, config.score
    strides = [str(2 ** (stage + 1)) for stage in features.out_indices]
    kinds = ["+".join(strides)] if features.join else strides
    return _setting(
        {
            "levels": [f"{s}:{k}" for s in features.pyramid or (config.data.image_size,) for k in kinds],
            "shrinkage": shrinkage,
            "normalisation": score.normalisation,
            "kappa": inspect.signature(normal_statistics).parameters["kappa"].default,
            "sigma": score.sigma,
            "image": score.image,
            "image_share": score.image_share,
        }
    )


def _name(setting: Mapping[Any, Any]) -> str:
    """Write a setting in one text."""
    return "; ".join(setting[part] for part in PARTS)


def _whole_draws(found: pd.DataFrame) -> pd.DataFrame:
    """Leave out draws that were cut short: those with fewer settings than another of the same data set."""
    count = found.groupby(["dataset", "draw"])["draw"].transform("size")
    return found[count == count.groupby(found["dataset"]).transform("max")]


def _over_draws(found: pd.DataFrame) -> pd.DataFrame:
    """Average over draws: a row per data set and setting."""
    groups = _whole_draws(found).groupby(["dataset", *_PARTS], sort=False)
    return groups[_METRICS].mean().reset_index()


def _by_set(found: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Give for each data set, and for their mean, image AUROC on drawn and real defects by setting."""
    means = _over_draws(found)
    means["setting"] = [_name(row) for row in means.to_dict("records")]
    means = means.set_index("setting").rename(
        columns={"drawn_image_auroc": "drawn", "real_image_auroc": "real"}
    )
    by_name = means.groupby("dataset", sort=False)[["drawn", "real"]]
    sets = {str(name): part for name, part in by_name}
    every = means.groupby(level=0, sort=False)[["drawn", "real"]]
    return sets | {_MEAN: every.mean()[every.size() == len(sets)]} if sets else {}


def predicted(found: pd.DataFrame) -> pd.DataFrame:
    """Ask of each data set how well its drawn defects rank settings, and what their choice is worth.

    Args:
        found: From :func:`read_choice`.

    Returns:
        A row per data set, and one "mean": settings measured on all sets, by their mean over the sets.
        Columns settings and draws (how many; those cut short left out), rank correlation (Spearman's, of
        image AUROC on drawn and real defects), and image AUROC on the test set in percent: chosen, of the
        setting that the drawn defects choose (of equals the first); best; median; default, of the library's
        (NaN where not measured).
    """
    columns = ["settings", "draws", "rank correlation", "chosen", "best", "median", "default"]
    default, rows = _name(default_setting()), {}
    draws = _whole_draws(found).groupby("dataset")["draw"].nunique()
    for name, of in _by_set(found).items():
        if of.empty:
            continue
        drawn, real = of["drawn"], of["real"]
        # pandas warns where there is nothing to rank.
        rank = drawn.corr(real, method="spearman") if min(drawn.nunique(), real.nunique()) > 1 else np.nan
        chosen, ours = real[str(drawn.idxmax())], real.get(default, np.nan)
        values = [len(of), draws.get(name, np.nan), rank, chosen, real.max(), real.median(), ours]
        rows[name] = dict(zip(columns, values, strict=True))
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("data set")


def predicted_table(found: pd.DataFrame) -> Styler:
    """Set out :func:`predicted`, the mean last."""
    table = predicted(found).rename(columns={c: f"{c} (%)" for c in ("chosen", "best", "median", "default")})
    styler = styled(table, name="choice-predicted", na_rep="–", precision=1, emphasise=[_MEAN])
    return styler.format({"draws": "{:.0f}", "rank correlation": "{:+.2f}"}, na_rep="–", precision=1)


def one_step(found: pd.DataFrame) -> pd.DataFrame:
    """Change one part of the library's default at a time.

    A part that was not varied around the default itself is taken where it was, at the setting that shares
    most parts with the default; the column ``others`` says what differs there.

    Args:
        found: From :func:`read_choice`.

    Returns:
        A row per part (of :data:`PARTS`, by its long name) and value. Columns drawn_image_auroc,
        real_image_auroc, drawn_aupro and real_aupro (of the map of all levels): percent, means over the data
        sets that have all values of the part (NaN where not measured); default: whether the value is the
        default's; others: text, empty where all other parts are the default's; sets: over how many data sets.
    """
    means, default = _over_draws(found), default_setting()
    tables = {}
    for part, title in PARTS.items():
        others = _PARTS.copy()
        others.remove(part)
        candidates = []
        for _, rows in means.groupby(others, sort=False):
            values, around = set(rows[part]), rows[others].iloc[0]
            same = sum(around[name] == default[name] for name in others)
            if len(values) > 1:
                candidates.append(((default[part] in values, same, len(values)), rows))
        if not candidates:
            continue
        own = max(candidates, key=lambda candidate: candidate[0])[1]
        table = pd.DataFrame({name: _mean_over_sets(own, part, name) for name in _STEP_METRICS})
        order = pd.to_numeric(table.index.to_series(), errors="coerce")
        table = table.loc[order.sort_values(kind="stable", na_position="first").index]
        table["default"] = table.index == default[part]
        changed = {name: own[name].iloc[0] for name in others if own[name].iloc[0] != default[name]}
        table["others"] = ", ".join(f"{name} {value}" for name, value in changed.items())
        # A set that lacks a value of the part is in no mean.
        table["sets"] = (own.groupby("dataset").size() == len(table)).sum()
        tables[title] = table
    if not tables:
        empty = pd.MultiIndex.from_tuples([], names=["part", "value"])
        return pd.DataFrame(columns=[*_STEP_METRICS, "default", "others", "sets"], index=empty)
    return pd.concat(tables, names=["part", "value"])


def _mean_over_sets(rows: pd.DataFrame, part: str, metric: str) -> pd.Series:
    """Average a metric by the values of a part, over the sets that have it wherever any set has it."""
    table = rows.pivot(index=part, columns="dataset", values=metric).reindex(rows[part].unique())
    return table.dropna(how="all").dropna(axis=1).mean(axis=1).reindex(table.index)


def one_step_table(found: pd.DataFrame) -> Styler:
    """Set out :func:`one_step`, the default's rows in bold."""
    steps = one_step(found).reset_index()
    steps.loc[steps["default"].astype(bool), "value"] += " (default)"
    table = steps.set_index(["part", "value"])
    titles = {
        name: f"{of} {'AUPRO' if metric == 'aupro' else 'image'} (%)"
        for name in _STEP_METRICS
        for of, metric in [name.split("_", 1)]
    }
    bold = list(table.index[table["default"].astype(bool)])
    table = table.assign(others=table["others"].replace("", "default")).drop(columns="default")
    table = table.rename(columns={**titles, "others": "other parts"})
    return styled(table, name="choice-one-step", precision=1, na_rep="–", emphasise=bold)


def verdicts(found: pd.DataFrame) -> list[str]:
    """Say how well the drawn defects chose, and where the default stands by them; no line without rows."""
    table = predicted(found)
    sets = table.drop(index=_MEAN, errors="ignore")
    if sets.empty:
        return []
    lost, rank = sets["best"] - sets["chosen"], sets["rank correlation"]
    said = [
        f"The drawn defects' choice is within {_NEAR:g} point of the best setting on "
        f"{(lost <= _NEAR).sum()} of {len(sets)} sets, at most {lost.max():.1f} points below it "
        f"({lost.idxmax()}); it is better than the median setting on "
        f"{(sets['chosen'] > sets['median']).sum()} of {len(sets)}.",
        f"Rank correlation from {rank.min():+.2f} ({rank.idxmin()}) to {rank.max():+.2f} ({rank.idxmax()})."
        if rank.notna().any()
        else "Rank correlation: not defined.",
    ]
    if _MEAN in table.index:
        said.append(_default_verdict(_by_set(found)[_MEAN]))
    for title, part in one_step(found).groupby(level="part", sort=False):
        said += [_part_verdict(str(title), part.droplevel("part"))] if part["default"].any() else []
    return said


def _default_verdict(of: pd.DataFrame) -> str:
    """Say which place the default has among all settings, by the means over the sets."""
    default = _name(default_setting())
    if default not in of.index:
        return "The default: not measured on all sets."
    chosen = str(of["drawn"].idxmax())
    places = of.rank(ascending=False, method="min").astype(int)
    said = (
        f"By the mean over the sets the default is number {places['drawn'][default]} of {len(of)} settings "
        f"for the drawn defects and number {places['real'][default]} for the real ones; "
    )
    if chosen == default:
        return f"{said}it is the drawn defects' choice."
    pairs = zip(PARTS, chosen.split("; "), default.split("; "), strict=True)
    changed = ", ".join(f"{part} {value}" for part, value, ours in pairs if value != ours)
    return f"{said}their choice has {changed}. Beside it the default has {_gap(of, default, chosen)}."


def _part_verdict(title: str, part: pd.DataFrame) -> str:
    """Say what the drawn defects choose of one part, and what the default has beside it."""
    of = part.rename(columns={"drawn_image_auroc": "drawn", "real_image_auroc": "real"})
    if of["drawn"].isna().all():
        return f"{title}: not measured on any whole set."
    chosen, default = str(of["drawn"].idxmax()), str(of.index[of["default"]][0])
    if chosen == default:
        best = of["real"].idxmax()
        return f"{title}: the drawn defects choose the default, {default}; best on real ones is {best}."
    gap = _gap(of, default, chosen)
    return f"{title}: the drawn defects choose {chosen}; the default, {default}, has {gap}."


def _gap(of: pd.DataFrame, one: str, other: str) -> str:
    drawn, real = (number_text(of[name][one] - of[name][other], sign="+") for name in ("drawn", "real"))
    return f"{drawn} points on drawn defects and {real} on real ones"


def scatter(found: pd.DataFrame) -> Figure:
    """Draw image AUROC on real against drawn defects, a panel a data set and a point a setting."""
    sets = _by_set(found)
    sets.pop(_MEAN, None)
    figure, panels = panel_grid(max(1, len(sets)), 2, 3.6, 3.1)
    default = _name(default_setting())
    if not sets:
        panels[0].text(0.5, 0.5, NOT_MEASURED.replace(": ", ":\n"), ha="center", va="center")
        panels[0].set_axis_off()
        return figure
    ranks = predicted(found)["rank correlation"]
    marks: dict[str, dict[str, Any]] = {
        "a setting": {"marker": "o", "markersize": 5, "color": "0.6", "markeredgecolor": "white"},
        "the default": {"marker": "D", "markersize": 6, "color": PALETTE[1], "markeredgecolor": "black"},
        "chosen by drawn defects": {
            "marker": "o", "markersize": 12, "color": PALETTE[2], "fillstyle": "none", "markeredgewidth": 2,
        },
    }  # fmt: skip
    for ax, (name, of) in zip(panels, sets.items(), strict=True):
        groups = [of, of[of.index == default], of[of.index == of["drawn"].idxmax()]]
        for part, look in zip(groups, marks.values(), strict=True):
            ax.plot(part["drawn"], part["real"], linestyle="none", **look)
        ax.set_title(f"{literal(name)}: rank correlation {ranks[name]:+.2f}", loc="left")
        ax.set(xlabel="image AUROC on drawn defects (%)", ylabel="on the test set (%)")
        ax.margins(0.08)
    legend = [Line2D([], [], linestyle="none", label=label, **look) for label, look in marks.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend))
    return behind(figure, [_CHOICES])


FIT_NOT_MEASURED = "not measured yet: run benchmarks/fit.py"
_FIT_METRICS = {
    "trained_log_prob": "log-likelihood, trained on",
    "held_out_log_prob": "log-likelihood, held out",
    "drawn_auroc": "drawn image (%)",
    "real_auroc": "real image (%)",
}


_PRIOR_METRICS = {
    f"{on}_{metric}": f"{on}, {title} (%)"
    for on in ("drawn", "real")
    for metric, title in (("image_auroc", "image"), ("pixel_auroc", "pixel"), ("aupro", "AUPRO"))
}


def read_fit(what: str, file: Path | None = None) -> pd.DataFrame:
    """Read what benchmarks/fit.py printed: its lines of one kind, "epoch", "classes" or "prior".

    Args:
        what: The kind.
        file: JSON lines; None for results/benchmarks/fit-cpu.jsonl.

    Returns:
        A row per line, AUROC in percent: dataset, change and, of "epoch", epoch and both log-likelihoods
        (nats per dimension); of "classes", together (classes a model); of "prior" the other metrics, too. No
        row without the file.
    """
    file = project_dir() / _FITS if file is None else file
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.is_file() else ())
    keys = ["dataset", "change", *{"epoch": ["epoch"], "classes": ["together"]}.get(what, [])]
    metrics = {"epoch": list(_FIT_METRICS), "classes": ["real_auroc"], "prior": list(_PRIOR_METRICS)}[what]
    found = pd.DataFrame([line for line in lines if line["what"] == what], columns=[*keys, *metrics])
    shares = [name for name in metrics if not name.endswith("log_prob")]
    found[shares] = 100 * found[shares].astype(float)
    return found.drop_duplicates(keys, keep="last", ignore_index=True)


def fit_table(found: pd.DataFrame) -> Styler:
    """Set out the last epoch by what was changed of the fit, and the untrained default: means over the sets.

    Of the sets whose changes were all tried, or else of those with most; the changes are from "start".

    Args:
        found: From :func:`read_fit`, "epoch", not empty.
    """
    last = found[found["epoch"] == found.groupby(["dataset", "change"])["epoch"].transform("max")]
    untrained = found[(found["epoch"] == 0) & (found["change"] == "start")].assign(change="untrained")
    rows = pd.concat([untrained, last])
    whole = rows.groupby("dataset")["change"].nunique()
    rows = rows[rows["dataset"].isin(whole.index[whole == whole.max()])]
    table = rows.groupby("change", sort=False)[list(_FIT_METRICS)].mean().rename(columns=_FIT_METRICS)
    styler = styled(table, name="fit", emphasise=["start"])
    return styler.format({c: "{:.1f}" if c.endswith("(%)") else "{:.3f}" for c in table.columns})


def priors_table(found: pd.DataFrame) -> Styler:
    """Set out what a part of the prior is worth: means over the sets for which every part was changed.

    Args:
        found: From :func:`read_fit`, "prior", not empty.
    """
    table, names = _priors(found)
    caption = f"Means over {', '.join(names)}"
    table = table.rename(columns=_PRIOR_METRICS)
    return styled(table, name="priors", emphasise=["default"], precision=1, na_rep="–", caption=caption)


def _priors(found: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Average over the sets for which every part was changed, and name these sets."""
    sizes = found.groupby("dataset")["change"].nunique()
    rows = found[found["dataset"].isin(sizes.index[sizes == sizes.max()])]
    means = rows.groupby("change", sort=False)[list(_PRIOR_METRICS)].mean()
    return means, list(dict.fromkeys(rows["dataset"]))


def priors_verdict(found: pd.DataFrame) -> str:
    """Say which prior drawn defects choose, whether the test set ranks them alike, and what the flow adds.

    Args:
        found: As of :func:`priors_table`, with the changes "default" and "no flow".
    """
    means, _ = _priors(found)
    drawn, real = means["drawn_image_auroc"], means["real_image_auroc"]
    alike = drawn.corr(real, method="spearman")
    flow = [of["default"] - of["no flow"] for of in (drawn, real)]
    return (
        f"Drawn defects choose: {drawn.idxmax()}. The test set ranks the {len(means)} priors with a Spearman "
        f"correlation of {alike:.2f} to them. The flow adds {flow[0]:+.1f} points of image AUROC on drawn "
        f"defects and {flow[1]:+.1f} on the test set to the same prior on the features as they are."
    )


def fit_curves(found: pd.DataFrame) -> Figure:
    """Draw log-likelihood by epoch of the start of the changes: images trained on and held out, a panel each.

    Args:
        found: From :func:`read_fit`, "epoch".
    """
    of = found[found["change"] == "start"]
    figure, panels = panel_grid(max(1, of["dataset"].nunique()), 4, 2.6, 2.4)
    for ax, (name, part) in zip(panels, of.groupby("dataset", sort=False), strict=False):
        for column, color in zip(list(_FIT_METRICS)[:2], PALETTE[1:], strict=False):
            ax.plot(part["epoch"], part[column], "o-", color=color, label=_FIT_METRICS[column])
        ax.set_title(literal(str(name)), loc="left")
        ax.set(xlabel="epoch", ylabel="nats per dimension")
    if of.empty:
        panels[0].text(0.5, 0.5, FIT_NOT_MEASURED.replace(": ", ":\n"), ha="center", va="center")
        panels[0].set_axis_off()
    else:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return behind(figure, [_FITS])


def classes_table(found: pd.DataFrame) -> Styler:
    """Set out image AUROC by how many classes share a model, and by prior.

    Args:
        found: From :func:`read_fit`, "classes", not empty.
    """
    table = found.pivot(index=["dataset", "change"], columns="together", values="real_auroc")
    table.columns = [f"{count} together (%)" for count in table.columns]
    return styled(table, name="classes", precision=1, na_rep="–")
