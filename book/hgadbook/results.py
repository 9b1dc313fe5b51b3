"""What the ledger has of the main comparison: HGAD beside the single Gaussian, under equal settings."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from hgadbook.ablations import Criterion, compare, half_width, image_titles, load_ablation, percent
from hgadbook.paper import number_text, records_cell
from hgadlib.config import config_from_dict, training_key
from hgadlib.evaluation.compare import interval, paired_bootstrap
from hgadlib.figures.tables import styled
from hgadlib.runs.grid import load_grid
from hgadlib.runs.ledger import group_records

# Experiments that are whole methods; the others are rows of an ablation.
_METHODS = (
    "hgad", "sec32_hgad", "tab3a_full", "tab3a_sgc", "sec32_single", "sec32_single_whiten", "sec32_fastflow",
    "paper", "released",
)  # fmt: skip
# Settings in which methods may differ and still be compared: beside these, the sections prior and loss.
_OWN_SETTINGS = (
    ("flow", "kind"), ("flow", "hidden_ratio"), ("train", "first_stage"), ("train", "evaluate_every"),
    ("train", "entropy_in_first_stage"), ("score", "criterion"), ("score", "normalisation"),
)  # fmt: skip
_COLUMNS = [
    "images", "settings", "method", "seed", "class", "image_auroc", "pixel_auroc", "criterion", "record",
]  # fmt: skip


def method_runs(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """List the runs of whole methods, a line per run and class, the mean as class "mean".

    Runs can be compared where ``images`` and ``settings`` are equal: these name the images, and what both
    methods share (image size, levels, depth of the flow, epochs).

    Returns:
        Columns images, settings, method, seed, class, image_auroc and pixel_auroc (percent, NaN where there
        is none), criterion (of the record's headline), record.
    """
    found = [record for record in records if record["experiment"] in _METHODS]
    titles, settings = image_titles(found), _settings(found)
    lines = [
        {
            "images": titles[record["data"]["digest"]],
            "settings": shared,
            "method": _method(record),
            "seed": record["seed"],
            # A class of that name is none of the means.
            "class": "class mean" if name == "mean" and values is not record["mean"] else name,
            "image_auroc": percent(values["image_auroc"]),
            "pixel_auroc": percent(values["pixel_auroc"]),
            "criterion": record["protocol"]["criterion"],
            "record": record["record"],
        }
        for record, shared in zip(found, settings, strict=True)
        for name, values in [*record["per_class"].items(), ("mean", record["mean"])]
    ]
    return pd.DataFrame(lines, columns=_COLUMNS)


def _method(record: Mapping[str, Any]) -> str:
    """Name a run's method by what it trained."""
    config = config_from_dict(record["config"])
    if config.prior.kind == "single":
        convolutional = config.flow.kind == "convolutional"
        return "single Gaussian, convolutional flow" if convolutional else "single Gaussian"
    return f"HGAD, lambda2 = {config.loss.lambda2:g}"


def _settings(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name what runs share by what a reader asks first; numbered where that is not enough."""
    found: dict[str, dict[str, str]] = {}  # by name, then by all that is shared
    names = []
    for record in records:
        config = config_from_dict(record["config"])
        sizes = config.features.pyramid or (config.data.image_size,)
        name = f"{' + '.join(map(str, sizes))} px, {config.flow.layers} layers, {config.train.epochs} epochs"
        if config.flow.normalise != "whiten":
            name += f", features {config.flow.normalise}"
        values = config.identity()
        for key in ("dataset", "experiment", "seed", "prior", "loss"):
            del values[key]
        for section, key in _OWN_SETTINGS:
            del values[section][key]
        same = found.setdefault(name, {})
        number = f" [{len(same) + 1}]" if same else ""
        names.append(same.setdefault(json.dumps(values, sort_keys=True), name + number))
    return names


def mean_over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """Average lines of :func:`method_runs` over their seeds, in order of appearance.

    Returns:
        A line per images, settings, method and class: texts image_auroc and pixel_auroc (percent, ± half the
        95 % interval over the seeds), criterion, records (names).
    """
    keys = ["images", "settings", "method", "class"]
    lines = []
    for names, part in runs.groupby(keys, sort=False):
        line = dict(zip(keys, names, strict=True))
        for metric in ("image_auroc", "pixel_auroc"):
            by_seed = part.groupby("seed")[metric].mean()
            line[metric] = number_text(by_seed.mean(), half_width(by_seed))
        lines.append(line | {"criterion": part["criterion"].iloc[0], "records": list(part["record"])})
    return pd.DataFrame(lines, columns=[*keys, "image_auroc", "pixel_auroc", "criterion", "records"])


def leads(runs: pd.DataFrame) -> pd.DataFrame:
    """Subtract the single Gaussian's image AUROC from HGAD's seed by seed, for the means over the classes.

    Returns:
        A line per images, settings and HGAD method that has a partner: differences by seed (a list).
    """
    lines = []
    means = runs[runs["class"] == "mean"]
    for (images, settings), part in means.groupby(["images", "settings"], sort=False):
        by = part.pivot_table(index="seed", columns="method", values="image_auroc")
        for method in by.columns:
            if method.startswith("HGAD") and "single Gaussian" in by:
                differences = list((by[method] - by["single Gaussian"]).dropna())
                lines.append((images, settings, method, differences))
    return pd.DataFrame(lines, columns=["images", "settings", "method", "differences"])


def all_claims(records: Sequence[Mapping[str, Any]], *, criterion: Criterion = "own") -> pd.DataFrame:
    """List what the ledger says of every ordering that the paper claims in Tab. 3a to 3e.

    By the likelihood, Tab. 3c is left out, which is about the criterion.

    Returns:
        The lines of :attr:`hgadbook.ablations.Comparison.claims` behind two columns, table and images.
    """
    parts: dict[tuple[str, str], pd.DataFrame] = {}
    for letter in "abcde" if criterion == "own" else "abde":
        compared = compare(load_ablation(f"table3{letter}"), records, criterion=criterion)
        parts |= {(f"3{letter}", images): claims for images, claims in compared.claims.items()}
    return pd.concat(parts, names=["table", "images"]).reset_index(["table", "images"]).reset_index(drop=True)


def claims_table(claims: pd.DataFrame, *, caption: str, name: str) -> Styler:
    """Set out the orderings of image AUROC that the paper claims: its lead, and that on each set."""
    rows: dict[str, dict[str, str]] = {}
    for line in claims[claims["metric"] == "image_auroc"].to_dict("records"):
        paper = {"paper": number_text(line["paper"], sign="+")}
        row = rows.setdefault(f"{line['table']}: {line['claim']}", paper)
        # Of one run, the sign says all that there is to say.
        word = "one run" if line["seeds"] == 1 else line["verdict"]
        value = f"{number_text(line['ours'], line['half_width'], sign='+')}, {word}"
        row[line["images"]] = value if line["seeds"] else "not measured"
    table = pd.DataFrame.from_dict(rows, orient="index").fillna("not measured")
    return styled(table, name=name, caption=caption)


PriorRuns = dict[str, dict[int, dict[str, Any]]]
"""Records of the grid "prior", or "default", on one set of images: by experiment, then seed."""
Lead = tuple[float, np.ndarray]
"""A difference of image AUROC in points, and its bootstrap draws."""

_PRIORS = {"single": "single Gaussian", "identity": "mixture, I", "covariance": "mixture, Sigma_y"}
_FLOWS = {"affine": "affine", "additive": "additive", "none": "no flow"}
PRIOR_ROWS = {
    f"prior_{p}_{f}": f"{prior}; {flow}" for p, prior in _PRIORS.items() for f, flow in _FLOWS.items()
}
PRIOR_ROWS |= {"hgad": "HGAD, the default"}
PRIOR_ROWS |= {"baseline_gaussians": "a Gaussian per class", "baseline_neighbours": "nearest neighbours"}


def prior_runs(records: Iterable[Mapping[str, Any]], name: str = "prior") -> dict[str, PriorRuns]:
    """Find the runs of params/grids/prior.yaml, or default.yaml, under the settings of today, by images."""
    records = list(records)
    grid, groups, titles = load_grid(name), group_records(records), image_titles(records)
    found: dict[str, PriorRuns] = {}
    for dataset in dict.fromkeys([*grid.datasets, *(str(record["dataset"]) for record in records)]):
        for experiment in grid.experiments:
            config = grid.config(dataset, experiment, 0)
            for record in groups.get(training_key(config, seed=False), ()):
                protocol = record["protocol"]
                if config.protocol == f"{protocol.get('normalisation')}/{protocol['criterion']}":
                    own = found.setdefault(titles[record["data"]["digest"]], {}).setdefault(experiment, {})
                    # Records of before have no scores of images.
                    if record["seed"] not in own or record.get("image_scores"):
                        own[record["seed"]] = record
    return found


def prior_lead(runs: PriorRuns, ours: str, theirs: str, *, draw: int = 0) -> Lead | None:
    """Subtract two experiments' image AUROC, in points, with bootstrap draws; None if no seed has both.

    See :func:`hgadlib.evaluation.compare.paired_bootstrap`; draw is the seed of its draws.
    """
    pair = runs.get(ours, {}), runs.get(theirs, {})
    seeds = [s for s in pair[0] if s in pair[1] and all(of[s].get("image_scores") for of in pair)]
    if not seeds:
        return None
    first = pair[0][seeds[0]]["image_scores"]
    states = [first[name]["labels"] for name in first]
    state, class_idx = np.array(list("".join(states))), np.repeat(range(len(states)), [*map(len, states)])
    known = state != "?"
    scores = [
        [" ".join(of[seed]["image_scores"][name]["scores"] for name in first).split() for seed in seeds]
        for of in pair
    ]
    one, other = (np.array(x, float)[:, known] for x in scores)
    found, draws = paired_bootstrap(one, other, state[known] == "1", class_idx[known], seed=draw)
    return 100 * found, 100 * draws


def lead_text(lead: Lead | None) -> str:
    """Write a lead and its 95 % interval, which no line break parts."""
    if lead is None:
        return "not measured"
    text = "{:+.1f} [{:+.1f},\xa0{:+.1f}]".format(lead[0], *interval(lead[1]))
    return text.replace("-", "−")


def prior_table(images: str, runs: PriorRuns, name: str = "prior") -> Styler:
    """Set out a grid's rows, class known or inferred, on one set of images, in percent, with paired leads.

    What no run of the set has, such as pixels without masks or a class to infer of one, is no column.
    """
    lines: dict[str, dict[str, str]] = {}
    experiments = load_grid(name).experiments
    for experiment in experiments:
        of, row = runs.get(experiment, {}), PRIOR_ROWS[experiment]
        line = lines[row] = {}
        for metric in ("image_auroc", "pixel_auroc"):
            for way, of_means in (
                ("", [record["mean"] for record in of.values()]),
                (", inferred", [r["inferred"]["mean"] for r in of.values() if "inferred" in r]),
            ):
                values = [percent(mean.get(metric)) for mean in of_means]
                mean = float(np.mean(values)) if values else np.nan
                line[metric.split("_")[0] + way] = number_text(mean, half_width(values))
        flow = "affine" if experiment == "hgad" else experiment.split("_")[-1]
        for title, other in (("single", f"prior_single_{flow}"), ("neighbours", "baseline_neighbours")):
            compared = other in experiments and other != experiment
            line[f"image, to {title}"] = lead_text(prior_lead(runs, experiment, other)) if compared else "–"
        line["runs"] = records_cell([record["record"] for record in of.values()])
    table = pd.DataFrame.from_dict(lines, orient="index")
    table = table.loc[:, (table != "–").any()]
    return styled(table, name=f"{name}-{images}", caption=f"<b>{html.escape(images)}</b>", markup=["runs"])


def leads_by_set(found: Mapping[str, PriorRuns], ours: str, theirs: str) -> dict[str, Lead]:
    """Compute :func:`prior_lead` on each set of images that has both experiments."""
    # Sets of images are independent, and so are their draws.
    leads = {name: prior_lead(of, ours, theirs, draw=i) for i, (name, of) in enumerate(found.items())}
    return {name: lead for name, lead in leads.items() if lead is not None}


def mean_lead(leads: Mapping[str, Lead]) -> Lead:
    """Average leads, and their draws, over the sets of images."""
    both = [np.mean(list(x), axis=0) for x in zip(*leads.values(), strict=True)]
    return float(both[0]), both[1]


def _word(lead: Lead) -> str:
    low, high = interval(lead[1])
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


_OTHERS = {
    "prior_single_affine": "one Gaussian for all classes",
    "baseline_gaussians": "a Gaussian for each class",
    "baseline_neighbours": "nearest neighbours",
}


def verdict_table(found: Mapping[str, PriorRuns], name: str = "prior") -> Styler:
    """Set out whether each mixture on affine couplings beats what it must, by paired 95 % intervals.

    A row a pair, a column a set of images; the mean over the sets that have both, and its verdict: "better"
    or "worse" where the interval does not hold 0. Such leads are bold.
    """
    lines: dict[str, dict[str, str]] = {}
    told: set[tuple[str, str]] = set()
    for ours in ("hgad", "prior_covariance_affine", "prior_identity_affine"):
        for theirs in _OTHERS:
            if not (known := leads_by_set(found, ours, theirs)):
                continue
            pair = f"{PRIOR_ROWS[ours]}, over {PRIOR_ROWS[theirs]}"
            every = {**known, "mean": mean_lead(known)}
            lines[pair] = {k: lead_text(lead) for k, lead in every.items()} | {
                "verdict": _word(every["mean"])
            }
            told |= {(pair, k) for k, lead in every.items() if _word(lead) != "not told apart"}
    columns = [*(k for k in found if any(k in line for line in lines.values())), "mean", "verdict"]
    table = pd.DataFrame.from_dict(lines, orient="index", columns=columns if lines else None)
    bold = pd.DataFrame(
        [["font-weight: bold" * ((row, k) in told) for k in table.columns] for row in table.index],
        table.index, table.columns,
    )  # fmt: skip
    caption = "Lead in image AUROC, points; bold where the interval does not hold 0"
    shown = styled(table.fillna("not measured"), name=f"{name}-verdicts", caption=caption)
    return shown.apply(lambda _: bold, axis=None)


def lead_sentence(found: Mapping[str, PriorRuns], ours: str, title: str) -> str:
    """Say in one sentence what an experiment detects better and worse than, over all sets of images.

    Args:
        found: From :func:`prior_runs`.
        ours: The experiment.
        title: What the sentence calls it, within the sentence.
    """
    leads = {theirs: own for theirs in _OTHERS if (own := leads_by_set(found, ours, theirs))}
    if not leads:
        return f"Not measured yet: {title}."
    count = max(map(len, leads.values()))
    sides: dict[str, list[str]] = {"better": [], "not told apart": [], "worse": []}
    for theirs, own in leads.items():
        lead = mean_lead(own)
        only = "" if len(own) == count else f", on {', '.join(own)} only"
        text = lead_text(lead).replace(" [", " points [")
        sides[_word(lead)].append(f"{_OTHERS[theirs]} ({text}{only})")
    words = {"not told apart": "not measurably better or worse than"}
    parts = [f"{words.get(side, f'{side} than')} {' and '.join(of)}" for side, of in sides.items() if of]
    sets = f"{count} sets of images" if count > 1 else f"one set of images ({next(iter(own))})"
    return f"By image AUROC on {sets}, {title} detects {'; '.join(parts)}."


_CANDIDATES = {
    "scores normalised over the test set": "transductive",
    "the class inferred, not known": "inferred",
    "the epoch best on the test set": "best",
}


def candidate_gains(found: Mapping[str, PriorRuns]) -> pd.DataFrame:
    """Subtract each method's own headline from what other ways to evaluate give it: points of image AUROC.

    What else could make a lead: a row per candidate and method, a column per set of images, means over the
    seeds that have it; NaN where no record has.
    """
    lines = []
    for title, candidate in _CANDIDATES.items():
        for experiment, method in PRIOR_ROWS.items():
            gains = {
                images: [gain for r in runs.get(experiment, {}).values() if (gain := _gain(r, candidate))]
                for images, runs in found.items()
            }
            if any(gains.values()):
                means = {k: 100 * float(np.mean(v)) if v else np.nan for k, v in gains.items()}
                lines.append({"candidate": title, "method": method, **means})
    return pd.DataFrame(lines, columns=["candidate", "method", *found]).set_index(["candidate", "method"])


def _gain(record: Mapping[str, Any], candidate: str) -> float | None:
    """Return what a way to evaluate adds to a record's image AUROC; None where it was not measured."""
    if candidate == "transductive":
        means = record["other_protocols"].get(f"transductive/{record['protocol']['criterion']}")
    elif candidate == "inferred":
        means = record.get("inferred", {}).get("mean")
    else:
        best = record["best_epoch"].get("image_auroc")
        means = best and {"image_auroc": best["value"]}
    if not means or means.get("image_auroc") is None:
        return None
    return means["image_auroc"] - record["mean"]["image_auroc"]
