"""The first page: a model's decisions in one picture, the headline, and the paper's claims with a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from hgadbook.ablations import half_width, percent, verdict
from hgadbook.homogeneous_mapping import DROP, FLOWS, course_records, course_table
from hgadbook.paper import number_text, records_cell, value_of
from hgadbook.results import (
    Lead,
    PriorRuns,
    all_claims,
    lead_text,
    leads_by_set,
    mean_lead,
    prior_runs,
)
from hgadbook.rivals import rival_runs
from hgadlib.config import project_dir
from hgadlib.datasets.records import Dataset
from hgadlib.detector import Detector, Prediction
from hgadlib.evaluation.compare import interval
from hgadlib.figures.maps import outline_mask
from hgadlib.figures.tables import styled
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR


def fitted(images: str, experiment: str) -> Detector:
    """Load the detector of a dataset that an earlier chapter kept, or fit one, of one false alarm in ten.

    Args:
        images: A file of params/.
        experiment: A file of params/experiments/.
    """
    kept = project_dir() / "runs" / f"{images}-{experiment}.safetensors"
    if kept.is_file():
        return Detector.load(kept)
    detector = Detector(experiment=experiment, false_alarm_rate=0.1).fit(images, progress=False)
    kept.parent.mkdir(parents=True, exist_ok=True)
    detector.save(kept)
    return detector


def median_images(dataset: Dataset, detector: Detector) -> dict[str, tuple[Prediction, Prediction]]:
    """Judge all test images, none of whose classes is told; of each class take those of median score.

    Returns:
        By class, the normal and the anomalous image whose score is the median of its kind.
    """
    kinds: dict[tuple[str, bool], list[Prediction]] = {}
    for record, found in zip(dataset.test, detector.predict([r.path for r in dataset.test]), strict=True):
        kinds.setdefault((record.class_name, record.is_anomalous), []).append(found)
    chosen = {key: sorted(of, key=lambda one: one.score)[len(of) // 2] for key, of in kinds.items()}
    both = [name for name in dataset.classes if (name, True) in chosen and (name, False) in chosen]
    return {name: (chosen[name, False], chosen[name, True]) for name in both}


def decisions(chosen: Mapping[str, Sequence[Prediction]]) -> Figure:
    """Draw images over their maps, a column a class, with what the model decided above each.

    Args:
        chosen: As of :func:`median_images`.
    """
    figure, axes = plt.subplots(4, len(chosen), figsize=(1.45 * len(chosen), 6.4), layout="constrained")
    for column, pair in zip(axes.T, chosen.values(), strict=True):
        for (image, drawn), found in zip((column[:2], column[2:]), pair, strict=True):
            image.imshow(found.image)
            drawn.imshow(found.overlay())
            outline_mask(drawn, found.mask)
            said = "unknown" if found.is_unknown else "anomalous" if found.is_anomalous else "normal"
            color = NORMAL_COLOR if said == "normal" else ANOMALOUS_COLOR
            image.set_title(f"{found.class_name}: {said}", fontsize=8, color=color, fontweight="bold")
        for ax in column:
            ax.set_axis_off()
    return figure


def headline_table(own: Mapping[str, PriorRuns]) -> Styler:
    """Set out the default on each set of images, in percent, with its leads over what it must beat."""
    lines: dict[str, dict[str, str]] = {}
    others = {
        "to nearest neighbours": "baseline_neighbours",
        "to a Gaussian per class": "baseline_gaussians",
        "to one Gaussian": "prior_single_affine",
    }
    leads = {title: leads_by_set(own, "hgad", other) for title, other in others.items()}
    for images, runs in own.items():
        if "hgad" not in runs:
            continue
        values = {
            title: [percent(record["mean"].get(metric)) for record in runs["hgad"].values()]
            for title, metric in (("image", "image_auroc"), ("pixel", "pixel_auroc"), ("AUPRO", "aupro"))
        }
        text = {title: number_text(float(np.mean(of)), half_width(of)) for title, of in values.items()}
        # What matters stands first: a telephone shows three columns.
        ahead = {title: lead_text(of.get(images)) for title, of in leads.items()}
        names = [r["record"] for of in runs.values() for r in of.values()]
        lines[images] = {"image": text.pop("image"), **ahead, **text, "runs": records_cell(names)}
    mean = {title: lead_text(mean_lead(of)) if of else "not measured" for title, of in leads.items()}
    table = pd.DataFrame.from_dict(lines | {"mean of the sets measured": mean}, orient="index").fillna("–")
    return styled(table, name="headline", markup=["runs"])


class Claim(NamedTuple):
    """A claim of the paper: what was seen here, in a word and a sentence, where to read on, and its runs."""

    claim: str
    verdict: str
    found: str
    chapter: str
    runs: int


def claims(records: Iterable[Mapping[str, Any]]) -> list[Claim]:
    """Hold the paper's claims against the ledger: seen, opposite, undecided or not measured."""
    records = list(records)
    own, deciding = prior_runs(records, "default"), prior_runs(records, "prior")
    said = value_of("table1/Mean/HGAD", "image_auroc") - value_of("table1/Mean/CFLOW", "image_auroc")
    return [
        _collapse(records),
        _lead(
            f"One model with HGAD's prior detects better than with one Gaussian (Tab. 1: {said:+.1f} points)",
            own, "hgad", "prior_single_affine", "results",
        ),
        _lead(
            "So does the mixture with covariance I, all else equal",
            deciding, "prior_identity_affine", "prior_single_affine", "results",
        ),
        _lead(
            "A covariance for each class may be left out (Eq. 5 to 6)",
            deciding, "prior_identity_affine", "prior_covariance_affine", "results", no_worse=True,
        ),
        *_tables(records),
        _apart(rival_runs(records), rival_runs(records, "one_for_one")),
    ]  # fmt: skip


def _collapse(records: Sequence[Mapping[str, Any]]) -> Claim:
    """Sec. 3.2: a flow with one Gaussian for all classes loses its AUROC while its loss goes on falling."""
    claim = "With one Gaussian the AUROC drops severely while the loss goes on falling (Sec. 3.2)"
    mixture = FLOWS[next(name for name in FLOWS if "hgad" in name)]
    drops = []
    for found in course_records(records).values():
        curves = {name: pd.DataFrame(record["curves"]) for name, record in found.items() if name != mixture}
        if curves:
            course = course_table(curves)
            falling = course["last loss"] < course["loss at best epoch"]
            drops += list(course["image drop"].where(falling, 0.0).astype(float))
    if not drops:
        return Claim(claim, "not measured", "", "homogeneous_mapping", 0)
    severe = sum(drop >= DROP for drop in drops)
    word = "seen" if severe == len(drops) else "opposite" if not severe else "undecided"
    found_text = (
        f"by {DROP:g} points of image AUROC or more in {severe} of {len(drops)} trainings; "
        f"the largest drop is {max(drops):.1f} points"
    )
    return Claim(claim, word, found_text, "homogeneous_mapping", len(drops))


def _lead(
    claim: str,
    found: Mapping[str, PriorRuns],
    ours: str,
    theirs: str,
    chapter: str,
    *,
    no_worse: bool = False,
) -> Claim:
    """Judge a lead in image AUROC by the paired interval of its mean over the sets of images."""
    leads = leads_by_set(found, ours, theirs)
    if not leads:
        return Claim(claim, "not measured", "", chapter, 0)
    mean: Lead = mean_lead(leads)
    low, high = interval(mean[1])
    word = "seen" if low > 0 else "opposite" if high < 0 else "seen" if no_worse else "undecided"
    runs = sum(len(found[images][name]) for images in leads for name in (ours, theirs))
    sets = f"{len(leads)} set{'s' * (len(leads) != 1)} of images"
    return Claim(claim, word, f"{lead_text(mean)} points of image AUROC, {sets}", chapter, runs)


_PARTS = {
    "3a": ("Each part of the hierarchical prior adds (Tab. 3a)", "ablations/hierarchy"),
    "3b": ("Ten centres within a class are best (Tab. 3b)", "ablations/intra_centers"),
    "3c": ("Likelihood and entropy together score best (Tab. 3c)", "ablations/criterion"),
    "3d": ("Mutual information deserves a large weight (Tab. 3d)", "ablations/lambdas"),
    "3e": ("Two stages train better than one (Tab. 3e)", "ablations/optimization"),
}


def _tables(records: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Tab. 3: the word of most of a table's orderings of image AUROC, over all sets of images."""
    every = all_claims(records)
    every = every[(every["metric"] == "image_auroc") & (every["seeds"] > 1)]
    out = []
    for table, (claim, chapter) in _PARTS.items():
        words = every.loc[every["table"] == table, "verdict"].value_counts()
        if words.empty:
            out.append(Claim(claim, "not measured", "", chapter, 0))
            continue
        most = words[words == words.max()]
        counts = ", ".join(f"{words.get(word, 0)} {word}" for word in ("seen", "opposite", "undecided"))
        word = str(most.index[0]) if len(most) == 1 else "undecided"
        own = int(every.loc[every["table"] == table, "seeds"].sum())
        out.append(Claim(claim, word, f"of its orderings, set by set: {counts}", chapter, own))
    return out


def _apart(together: Mapping[str, PriorRuns], apart: Mapping[str, PriorRuns]) -> Claim:
    """Tab. 1 beside Tab. 6: how much less HGAD loses than CFLOW by one model for all classes."""
    claim = "HGAD loses less than CFLOW when one model serves all classes (Tab. 6)"
    gains: dict[str, list[float]] = {}
    runs = 0
    for images, alone in apart.items():
        for name in ("hgad", "baseline_cflow"):
            for seed in alone.get(name, {}).keys() & together.get(images, {}).get(name, {}).keys():
                pair = alone[name][seed], together[images][name][seed]
                ours, theirs = (record["mean"]["image_auroc"] for record in pair)
                gains.setdefault(name, []).append(100 * (ours - theirs))
                runs += 2
    one, other = gains.get("hgad", []), gains.get("baseline_cflow", [])
    if len(one) != len(other) or not one:
        return Claim(claim, "not measured", "", "results", 0)
    found = f"a model for each class gives HGAD {np.mean(one):+.1f} points, CFLOW {np.mean(other):+.1f}"
    return Claim(claim, verdict([b - a for a, b in zip(one, other, strict=True)]), found, "results", runs)


def claims_text(found: Iterable[Claim]) -> str:
    """Write claims as a list in MyST, each with its verdict, its chapter and the number of its runs."""
    lines = []
    for one in found:
        runs = f", {{ref}}`{one.runs} run{'s' * (one.runs != 1)} <reproducibility>`" if one.runs else ""
        what = f": {one.found}" if one.found else ""
        lines.append(f"- **{one.verdict}**. {one.claim}{what} ({{doc}}`{one.chapter}`{runs}).")
    return "\n".join(lines)
