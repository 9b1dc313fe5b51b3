"""Sec. 3.2, its cause controlled: separated classes under one flow, with one Gaussian behind it or a mixture.

A flow is continuous and so is its inverse: it makes no separated clusters of a ball. Under one Gaussian it
must leave bridges of high likelihood between classes. Here points on the bridges are told from normal ones.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor

from hgadbook.method import plane, plane_map
from hgadbook.sliders import picture_of, picture_slider
from hgadlib.config import LossConfig, TrainConfig
from hgadlib.features.store import spread_sample
from hgadlib.figures.histograms import shared_legend
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, PALETTE
from hgadlib.files import write_atomically
from hgadlib.flow import FeatureFlow
from hgadlib.losses import full_mixture_nll, hgad_losses
from hgadlib.mixture import GaussianPrior, HierarchicalGaussianMixture, standard_log_prob
from hgadlib.model import HGAD
from hgadlib.runs.inputs import Inputs

PRIORS = ("single Gaussian", "mixture")
SWEEPS = {"classes K": (2, 4, 8, 16), "blocks": (1, 2, 4, 8), "dimensions D": (2, 8, 16, 64)}
"""What is varied, and over which values; the rest is as in USUAL."""
USUAL = {"classes K": 4, "blocks": 4, "dimensions D": 2}

# Counts what changed in what is computed: files of older versions are not read.
_VERSION = 1
# Distance of a class to the nearest other one over sqrt(D), and how far a class is bent; both in deviations.
_APART, _BEND = 8.0, 0.6
_PER_CLASS, _CENTERS, _PIXELS = 64, 4, 72
_KINDS = {"normal": NORMAL_COLOR, "bridge": ANOMALOUS_COLOR}


@dataclass(frozen=True)
class SeparatedClasses:
    """K bent clusters in D dimensions whose density is known.

    Attributes:
        centers: (K, D); in the plane on a circle.
        rotations: Of each class, (K, D, D).
        near: The nearest other class of each, (K,).
    """

    centers: Tensor
    rotations: Tensor
    near: Tensor

    @classmethod
    def random(cls, n_classes: int, dim: int, seed: int) -> SeparatedClasses:
        """Lay out classes, each 8 sqrt(D) deviations from its nearest or more."""
        generator = torch.Generator().manual_seed(seed)
        angles = 2 * math.pi * torch.arange(n_classes) / n_classes
        circle = torch.stack([angles.cos(), angles.sin()], -1)
        centers = circle if dim == 2 else torch.randn(n_classes, dim, generator=generator)
        distances = torch.cdist(centers, centers).fill_diagonal_(torch.inf)
        rotations = torch.linalg.qr(torch.randn(n_classes, dim, dim, generator=generator))[0]
        scale = _APART * math.sqrt(dim) / distances.min()
        return cls(centers * scale, rotations, distances.argmin(1))

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n points of each class, (K, n, D)."""
        u = torch.randn(len(self.centers), n, self.centers.shape[1], generator=generator)
        u[..., 1::2] += _BEND * (u[..., ::2].square() - 1)
        return self.centers[:, None] + u @ self.rotations

    def bridges(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw points from 35 to 65 % of the way from points of each class to its nearest's, (K, n, D)."""
        start, end = self.draw(n, generator), self.draw(n, generator)[self.near]
        return torch.lerp(start, end, 0.35 + 0.3 * torch.rand(len(start), n, 1, generator=generator))

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute the true log-density of points (..., D), in nats; bending changes no volume."""
        parts = []
        for center, rotation in zip(self.centers, self.rotations, strict=True):
            u = (x - center) @ rotation.T
            u[..., 1::2] -= _BEND * (u[..., ::2].square() - 1)
            parts.append(standard_log_prob(u))
        return torch.stack(parts).logsumexp(0) - math.log(len(parts))


def auroc(normal: Tensor, bridges: Tensor) -> float:
    """Tell bridges from normal points by log-likelihoods: 1 if all bridges lie lower, 1/2 by chance."""
    labels = np.repeat([1, 0], [normal.numel(), bridges.numel()])
    return float(roc_auc_score(labels, torch.cat([normal.flatten(), bridges.flatten()]).numpy()))


def train_on(
    classes: SeparatedClasses, kind: str, layers: int, *, seed: int, steps: int
) -> tuple[list[dict[str, float]], list[Tensor]]:
    """Train a flow and its prior, of PRIORS, on fresh points in each step: nothing can be learnt by heart.

    Args:
        classes: What points are drawn from, 64 of each class a step.
        kind: One of PRIORS.
        layers: Coupling blocks.
        seed: Of the points and of the flow.
        steps: Of Adam; the rate falls along half a cosine.

    Returns:
        A row for each of up to 9 steps: its number and the AUROC of :func:`auroc` of held-out points. In the
        plane also a map of the log-likelihood less the normal points' median, (72, 72), for each.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    (n_classes, dim), class_idx = classes.centers.shape, torch.arange(len(classes.centers))
    x, normal = classes.draw(256, generator), classes.draw(256, generator)
    bridges = classes.bridges(256, generator)
    flow = FeatureFlow(dim, (1, 1), layers=layers, position_dim=0, hidden=32, normalise=True)
    assert flow.normaliser is not None
    # One factor for all directions: a whitening would bring the classes closer to each other.
    spread = x.flatten(0, 1).var(0).mean() * torch.eye(dim)
    flow.normaliser.fit(x.mean((0, 1)), spread, whiten=False)
    prior: GaussianPrior | HierarchicalGaussianMixture = GaussianPrior()
    if kind != PRIORS[0]:
        prior = HierarchicalGaussianMixture(n_classes, _CENTERS, dim, init="class_means")
        prior.set_centers(flow(x)[0].mean(1))

    @torch.no_grad()
    def log_prob(points: Tensor) -> Tensor:
        z, log_det = flow(points)
        if isinstance(prior, GaussianPrior):
            return standard_log_prob(z) + log_det
        weights = prior.log_weights, prior.intra_centers(), prior.log_weights_intra
        return -full_mixture_nll(z, log_det, *weights)  # no class is told

    optimiser = torch.optim.Adam([*flow.parameters(), *prior.parameters()], lr=5e-3, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    rows, maps, first = [], [], round(TrainConfig().first_stage * steps)
    weights = asdict(LossConfig(lambda2=1.0))  # as in params/experiments/tables.yaml
    looks = {round(step) for step in np.geomspace(min(5, steps), steps, 9)}
    for step in range(1, steps + 1):
        z, log_det = flow(classes.draw(_PER_CLASS, generator))
        if isinstance(prior, HierarchicalGaussianMixture) and step == first + 1:
            for k, own in enumerate(z.detach()):
                prior.split(own, k)
        terms = hgad_losses(z, log_det, class_idx, prior, intra=step > first, **weights)
        optimiser.zero_grad()
        terms["total"].backward()
        optimiser.step()
        schedule.step()
        if step in looks:
            found = log_prob(normal)
            rows.append({"step": step, "AUROC": auroc(found, log_prob(bridges))})
            if dim == 2:
                grid = log_prob(plane(_extent(classes), _PIXELS)[None])[0] - found.median()
                maps.append(grid.unflatten(0, (_PIXELS, _PIXELS)))
    return rows, maps


def _extent(classes: SeparatedClasses) -> tuple[float, float, float, float]:
    side = float(classes.centers.abs().max()) + 5
    return -side, side, -side, side


def bridge_runs(folder: Path, *, seeds: int = 3, steps: int = 160) -> tuple[pd.DataFrame, np.ndarray]:
    """Train the flows of all SWEEPS, or read from the folder what an earlier call left there.

    Returns:
        A row per setting, seed (of classes and flow), prior ("true density" among them) and step; and maps of
        the usual classes, seed 0, see :func:`train_on`: (blocks, priors, steps, 72, 72).
    """
    path = folder / f"v{_VERSION}-{seeds}-seeds-{steps}-steps.npz"
    if path.is_file():
        with np.load(path) as stored:
            return pd.read_json(io.StringIO(str(stored["table"])), orient="split"), stored["maps"]
    settings = {tuple((USUAL | {name: v}).values()) for name, values in SWEEPS.items() for v in values}
    jobs = [(*setting, seed, steps) for setting in sorted(settings) for seed in range(seeds)]
    # Their steps are too small to share one out among cores.
    with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        found = list(pool.map(_train_setting, jobs))
    shown = [(*(USUAL | {"blocks": layers}).values(), 0, steps) for layers in SWEEPS["blocks"]]
    kept = np.stack([found[jobs.index(job)][1] for job in shown])
    content, table = io.BytesIO(), pd.DataFrame([row for rows, _ in found for row in rows])
    np.savez_compressed(content, table=np.array(table.to_json(orient="split")), maps=kept)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
    return table, kept


def _train_setting(job: tuple[int, int, int, int, int]) -> tuple[list[dict[str, Any]], np.ndarray]:
    n_classes, layers, dim, seed, steps = job
    classes, generator = SeparatedClasses.random(n_classes, dim, seed), torch.Generator().manual_seed(seed)
    setting = dict(zip(USUAL, job[:3], strict=True)) | {"seed": seed}
    known = [classes.log_prob(draw(512, generator)) for draw in (classes.draw, classes.bridges)]
    rows: list[dict[str, Any]] = [setting | {"prior": "true density", "step": steps, "AUROC": auroc(*known)}]
    maps = []
    for kind in PRIORS:
        found, own = train_on(classes, kind, layers, seed=seed, steps=steps)
        rows += [setting | {"prior": kind} | row for row in found]
        maps.append([grid.clamp(-99, 99).numpy() for grid in own])
    return rows, np.array(maps, dtype=np.float16)


def sweep_table(table: pd.DataFrame) -> pd.DataFrame:
    """Lay out what :func:`bridge_runs` found after the last step, a row per sweep, value, prior and seed."""
    last = table[table["step"] == table["step"].max()]
    parts = []
    for name in SWEEPS:
        rest = [other for other in USUAL if other != name]
        own = last[(last[rest] == pd.Series(USUAL)[rest]).all(axis=1)]
        parts.append(own.assign(sweep=name, value=own[name])[["sweep", "value", "prior", "seed", "AUROC"]])
    return pd.concat(parts, ignore_index=True)


def bridge_sweeps(table: pd.DataFrame) -> Figure:
    """Draw the AUROC of points on bridges over the steps and over each sweep; bands hold all seeds."""
    usual = table[(table[list(USUAL)] == pd.Series(USUAL)).all(axis=1)]
    steps = usual.assign(sweep="steps", value=usual["step"])[usual["prior"] != "true density"]
    whole = pd.concat([sweep_table(table), steps], ignore_index=True)
    colors = dict(zip((*PRIORS, "true density"), (PALETTE[1], PALETTE[0], "0.6"), strict=True))
    figure, axes = plt.subplots(1, len(SWEEPS) + 1, figsize=(9.5, 2.6), sharey=True)
    for ax, (name, own) in zip(axes, whole.groupby("sweep", sort=False), strict=True):
        curve = {"x": "value", "y": "AUROC", "hue": "prior", "errorbar": ("pi", 100), "marker": "o"}
        sns.lineplot(own, **curve, palette=colors, hue_order=list(colors), ax=ax)
        ax.set_xscale("log", base=2)
        ax.set(xlabel=name)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.axhline(0.5, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)))
        ax.get_legend().remove()
    shared_legend(figure, axes[:1], columns=3, below=True)
    return figure


def bridge_sentences(table: pd.DataFrame) -> list[str]:
    """State for each sweep at which of its values the mixture tells more, and whether a gap is left."""
    wide = sweep_table(table).pivot_table("AUROC", ["sweep", "value", "seed"], "prior")
    gap = wide[PRIORS[1]] - wide[PRIORS[0]]
    said = []
    for name, values in SWEEPS.items():
        mean, own = wide.loc[name].groupby("value").mean().to_dict(), gap[name].groupby("value")
        sides = {
            "above the single Gaussian in every seed": own.min() > 0,
            "below it in every seed": own.max() < 0,
            "undecided": (own.min() <= 0) & (own.max() >= 0),
        }
        parts = [f"{text} at {', '.join(map(str, v[v].index))}" for text, v in sides.items() if v.any()]
        ends = [
            f"at {v} "
            + ", ".join(f"the {kind} has {mean[kind][v]:.2f}" for kind in (*PRIORS, "true density"))
            for v in (values[0], values[-1])
        ]
        said.append(f"{name}: the mixture is {'; '.join(parts)} ({'; '.join(ends)}).")
    return said


def bridge_verdict(table: pd.DataFrame) -> str:
    """Say in one sentence how well each prior tells bridges from normal points at the usual setting."""
    own = sweep_table(table)
    own = own[(own["sweep"] == "classes K") & (own["value"] == USUAL["classes K"])]
    mean, gap = own.groupby("prior")["AUROC"].mean(), own.pivot(index="seed", columns="prior", values="AUROC")
    lead = gap[PRIORS[1]] - gap[PRIORS[0]]
    word = "more" if lead.min() > 0 else "less" if lead.max() < 0 else ""
    parts = ", ".join(f"{mean[kind]:.2f} by the {kind}" for kind in (*PRIORS, "true density"))
    return (
        f"Between {USUAL['classes K']} drawn classes, normal points are told from points on bridges with an "
        f"AUROC of {parts}; the mixture {f'tells {word} in every seed' if word else 'is undecided'}."
    )


def bridge_maps(table: pd.DataFrame, maps: np.ndarray, *, layers: int, look: int = -1) -> Figure:
    """Draw log-likelihoods over the plane under both priors, with points of the classes and of bridges.

    Args:
        table: See :func:`bridge_runs`.
        maps: Likewise.
        layers: Blocks of the flow.
        look: Which of the maps' steps.
    """
    classes, generator = SeparatedClasses.random(USUAL["classes K"], 2, 0), torch.Generator().manual_seed(1)
    points = classes.draw(24, generator).flatten(0, 1), classes.bridges(8, generator).flatten(0, 1)
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), sharey=True)
    for ax in axes:
        label, blank = "nats over the normal median", np.zeros(maps.shape[-2:])
        plane_map(blank, _extent(classes), ax=ax, label=label, limits=(-8, 4), cmap="gray")
        for own, (name, color) in zip(points, _KINDS.items(), strict=True):
            ax.scatter(*own.T, s=6, color=color, linewidths=0, label=name)
    axes[1].set_ylabel("")
    shared_legend(figure, axes[:1], columns=2, below=True)
    _show(figure, table, maps, layers, look)
    return figure


def _show(figure: Figure, table: pd.DataFrame, maps: np.ndarray, layers: int, look: int) -> int:
    setting = USUAL | {"blocks": layers, "seed": 0}
    own = table[(table[list(setting)] == pd.Series(setting)).all(axis=1)]
    for ax, kind, values in zip(figure.axes, PRIORS, maps[SWEEPS["blocks"].index(layers)], strict=False):
        row = own[own["prior"] == kind].iloc[look]
        ax.images[0].set_data(values[look].astype(float))
        ax.set_title(f"{kind}: AUROC {row['AUROC']:.2f}", loc="left")
    figure.suptitle(f"blocks: {layers}, step {row['step']}", x=0.01, ha="left")
    return int(row["step"])


def bridge_slider(table: pd.DataFrame, maps: np.ndarray) -> str:
    """Write HTML that shows :func:`bridge_maps` at any blocks and step by two sliders, with no server."""
    frames = {}
    looks = maps.shape[2]
    figure = bridge_maps(table, maps, layers=USUAL["blocks"])
    figure.canvas.draw()
    figure.set_layout_engine("none")  # once is enough
    blocks = SWEEPS["blocks"][: len(maps)]
    for (i, layers), look in product(enumerate(blocks), range(looks)):
        step = _show(figure, table, maps, layers, look)
        frames[i, look] = picture_of(figure), f"blocks: {layers}, step {step}"
    plt.close(figure)
    steps = [frames[0, look][1].rpartition(" ")[2] for look in range(looks)]
    return picture_slider(frames, {"blocks": [str(layers) for layers in blocks], "step": steps})


@torch.inference_mode()
def feature_bridges(models: Mapping[str, HGAD], inputs: Inputs, *, per_class: int = 4) -> pd.DataFrame:
    """Follow the log-likelihood from normal test features to others at the same positions.

    Args:
        models: By the name of the run.
        inputs: Of all of them.
        per_class: Images of each class.

    Returns:
        A row per run, pair of classes (of images of one class, too: what interpolation itself does) and t
        from 0 to 1: the median "log-likelihood" per dimension, under the likelier of the two classes; the
        share "as likely" as all but 5 % of the features at both ends; and the "AUROC" against the ends.
    """
    normal = inputs.test_labelled & ~inputs.test_labels
    sample = spread_sample(np.where(normal, inputs.test_classes, -1), len(inputs.dataset.classes), per_class)
    of = {k: sample[torch.as_tensor(inputs.test_classes)[sample] == k] for k in inputs.test_classes[sample]}
    way, rows = torch.linspace(0, 1, 7), []
    for (name, model), (a, b) in product(models.items(), combinations_with_replacement(sorted(of), 2)):
        n = min(len(of[a]), len(of[b]))
        start, end = inputs.test.batch(of[a][:n], model.device), inputs.test.batch(of[b][:n], model.device)
        if a == b:
            end = [x.roll(1, 0) for x in end]
        # All shares of the way in one batch.
        x = [torch.cat([torch.lerp(*pair, float(t)) for t in way]) for pair in zip(start, end, strict=True)]
        both = [model.log_prob(x, torch.full((len(way) * n,), int(k), device=model.device)) for k in {a, b}]
        likelier = [torch.stack(own).amax(0).cpu() for own in zip(*both, strict=True)]
        values = torch.cat([v / dim for v, dim in zip(likelier, model.channels, strict=True)], 1)
        found = values.split(n)
        ends = torch.cat([found[0], found[-1]])
        least = ends.quantile(0.05)
        for t, values in zip(way.tolist(), found, strict=True):
            row = {"run": name, "ends": "one class" if a == b else "two classes", "pair": f"{a}-{b}", "t": t}
            row |= {"log-likelihood": values.median().item(), "AUROC": auroc(ends, values)}
            rows.append(row | {"as likely": (values >= least).double().mean().item()})
    return pd.DataFrame(rows)


def bridge_pairs(bridges: pd.DataFrame) -> pd.DataFrame:
    """Count for each run the pairs of classes whose bridge is as likely in its middle as normal features.

    Args:
        bridges: See :func:`feature_bridges`. A pair counts if half of its middle features or more do.
    """
    middle = bridges[np.isclose(bridges["t"], 0.5)].assign(counts=lambda own: own["as likely"] >= 0.5)
    groups = middle.groupby(["run", "ends"], sort=False)
    columns = {"pairs": groups.size(), "as likely (% of pairs)": 100 * groups["counts"].mean()}
    columns["as likely (% of features)"] = 100 * groups["as likely"].mean()
    return pd.DataFrame(columns | {"AUROC, ends over middle": groups["AUROC"].mean()})


def bridge_profiles(bridges: pd.DataFrame) -> Figure:
    """Draw the log-likelihood along the way, a panel a run: mean of pairs, and a band of all."""
    runs = bridges["run"].unique()
    figure, axes = plt.subplots(1, len(runs), figsize=(2.4 * len(runs), 2.6), squeeze=False)
    colors = {"two classes": ANOMALOUS_COLOR, "one class": NORMAL_COLOR}
    for ax, run in zip(axes[0], runs, strict=True):
        own = bridges[bridges["run"] == run]
        curve = {"x": "t", "y": "log-likelihood", "hue": "ends", "errorbar": ("pi", 100)}
        sns.lineplot(own, **curve, palette=colors, ax=ax)
        ax.get_legend().remove()
        ax.set(xlabel="share $t$ of the way", ylabel="")
        ax.set_title(run, loc="left")
    axes[0, 0].set_ylabel("log-likelihood\n(nats per dimension)")
    shared_legend(figure, axes[0, :1], columns=2, below=True)
    return figure
