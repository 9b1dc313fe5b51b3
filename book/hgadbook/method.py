"""Figures of the two-dimensional toy: fields over the plane, forces, paths of centres, a bent grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor

from hgadlib.errors import InputError
from hgadlib.figures.theme import class_colors
from hgadlib.flow import FeatureFlow
from hgadlib.losses import hgad_losses, mutual_information_loss
from hgadlib.mixture import GaussianPrior, HierarchicalGaussianMixture, center_logits
from hgadlib.scoring import LevelValues, anomaly_maps, image_scores, inductive, transductive


def toy_latents(n: int = 60, *, spread: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw latents of three classes: two compact ones, and one that looks normal in three ways.

    Args:
        n: Points a class.
        spread: Standard deviation of each blob.
        seed: Of the draw.

    Returns:
        Latents, (3, n, 2), a class as an image of n positions; class indices (3,).
    """
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.tensor([[[-3.0, -1.5]] * 3, [[-1.0, 2.5]] * 3, [[2.0, -2.5], [4.5, -0.5], [3.0, 2.0]]])
    noise = spread * torch.randn(3, n, 2, generator=generator)
    return blobs[:, torch.arange(n) % 3] + noise, torch.arange(3)


def toy_features(n: int = 400, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw features of three classes on bent, unequal clusters: no Gaussian among them.

    Args:
        n: Points a class.
        seed: Of the draw.

    Returns:
        Features, (3, n, 2); class indices (3,).
    """
    generator = torch.Generator().manual_seed(seed)
    angle = math.pi * torch.rand(3, n, generator=generator)
    radius = 1 + 0.12 * torch.randn(3, n, generator=generator)
    arc = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    lower = torch.stack([1 - arc[1, :, 0], 0.3 - arc[1, :, 1]], -1)
    narrow = torch.stack([2.6 + 0.25 * arc[2, :, 0], 0.9 + 0.8 * arc[2, :, 1]], -1)
    return torch.stack([arc[0], lower, narrow]), torch.arange(3)


@dataclass(frozen=True)
class Trajectory:
    """What a fit passed through: entry t is the state after t steps.

    Attributes:
        centers: Main centres, (steps + 1, K, D).
        intra_centers: All centres, (steps + 1, K, M, D).
        weights: Class weights p(y), (steps + 1, K).
        losses: The total, (steps,).
    """

    centers: Tensor
    intra_centers: Tensor
    weights: Tensor
    losses: Tensor


def fit_prior(
    prior: HierarchicalGaussianMixture,
    z: Tensor,
    class_idx: Tensor,
    *,
    steps: int = 300,
    lr: float = 0.05,
    **weights: Any,
) -> Trajectory:
    """Move a prior's centres under the losses, latents held fixed: as if the flow did not learn.

    Args:
        prior: Changed in place.
        z: Latents, (B, N, D).
        class_idx: (B,).
        steps: Of Adam.
        lr: Its rate.
        **weights: See :func:`hgadlib.losses.hgad_losses`.
    """
    optimiser = torch.optim.Adam([p for p in prior.parameters() if p.requires_grad], lr=lr)
    log_det = torch.zeros(z.shape[:2])
    centers, intra, class_weights, losses = [], [], [], []
    for step in range(steps + 1):
        with torch.no_grad():
            centers.append(prior.centers.clone())
            intra.append(prior.intra_centers().clone())
            class_weights.append(prior.log_weights.exp())
        if step < steps:
            total = hgad_losses(z, log_det, class_idx, prior, **weights)["total"]
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            losses.append(total.detach())
    states = (torch.stack(part) for part in (centers, intra, class_weights, losses))
    return Trajectory(*states)


def fit_flow(
    x: Tensor,
    class_idx: Tensor,
    prior: HierarchicalGaussianMixture | GaussianPrior,
    *,
    layers: int = 8,
    hidden: int = 32,
    steps: int = 300,
    first_stage: int = 0,
    lr: float = 5e-3,
    seed: int = 0,
    **weights: Any,
) -> tuple[FeatureFlow, list[dict[str, float]]]:
    """Train a small flow without positions, and its prior, on all points at once.

    Args:
        x: Features, (K, N, D), a class as an image.
        class_idx: (K,).
        prior: Changed in place.
        layers: Coupling blocks.
        hidden: Width of the subnets.
        steps: Of Adam; the rate falls along half a cosine.
        first_stage: Steps without the intra-class terms.
        lr: First rate.
        seed: Of the flow's initial state.
        **weights: See :func:`hgadlib.losses.hgad_losses`.

    Returns:
        The flow, and the terms of each step.
    """
    torch.manual_seed(seed)
    flow = FeatureFlow(x.shape[-1], (1, x.shape[1]), layers=layers, position_dim=0, hidden=hidden).to(x)
    parameters = [p for p in (*flow.parameters(), *prior.parameters()) if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    history = []
    for step in range(steps):
        z, log_det = flow(x)
        terms = hgad_losses(z, log_det, class_idx, prior, intra=step >= first_stage, **weights)
        optimiser.zero_grad()
        terms["total"].backward()
        optimiser.step()
        schedule.step()
        history.append({name: value.item() for name, value in terms.items()})
    return flow, history


def plane(extent: tuple[float, float, float, float], n: int) -> Tensor:
    """Lay a grid of points over a part of the plane.

    Args:
        extent: Left, right, bottom, top.
        n: Points along each axis.

    Returns:
        (n * n, 2), row by row from the bottom.
    """
    left, right, bottom, top = extent
    rows, columns = torch.meshgrid(
        torch.linspace(bottom, top, n), torch.linspace(left, right, n), indexing="ij"
    )
    return torch.stack([columns, rows], -1).flatten(0, 1)


def pull(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Give the direction in which a loss moves latents: minus its gradient.

    Args:
        loss: Latents (B, N, D) to losses (B, N).
        z: (B, N, D).

    Returns:
        (B, N, D), in nats per unit of z.
    """
    z = z.detach().requires_grad_()
    return -torch.autograd.grad(loss(z).sum(), z)[0]


def offset_share(dim: int, delta_std: float, *, n_centers: int = 10, n: int = 512, seed: int = 0) -> float:
    """Give the share of latents around a main centre that its offset centres take, before any training.

    Args:
        dim: D.
        delta_std: Standard deviation of the initial offsets.
        n_centers: M, the main centre included.
        n: Latents, drawn from N(main centre, I).
        seed: Of the draw.

    Returns:
        Mean responsibility of all centres but the main one; (M - 1) / M where they count equally.
    """
    torch.manual_seed(seed)
    prior = HierarchicalGaussianMixture(1, n_centers, dim, delta_std=delta_std)
    with torch.no_grad():
        z = prior.centers + torch.randn(n, dim)
        responsibilities = center_logits(z - prior.centers, prior.intra_centers()[0] - prior.centers).softmax(
            -1
        )
    return 1 - responsibilities[:, 0].mean().item()


def offset_shares(dims: Sequence[int], delta_stds: Sequence[float]) -> pd.DataFrame:
    """Tabulate :func:`offset_share` for M = 10: a row a number of channels, a column a length of offsets."""
    columns = {f"$\\sigma$ = {std:g}": [offset_share(dim, std) for dim in dims] for std in delta_stds}
    return pd.DataFrame(columns, index=pd.Index(dims, name="channels D"))


def eq8_by_weight(distances: Sequence[float], *, n: int = 60) -> pd.DataFrame:
    """Evaluate Eq. 8 for two classes, half of the data each, as the prior's weight of the first varies.

    Args:
        distances: Of the two centres, on which the latents lie.
        n: Weights, from 1e-12 to 1/2.

    Returns:
        L_mi in nats: a row a weight, a column a distance.
    """
    weight = 0.5 * torch.logspace(-12, 0, n)
    log_weights = torch.stack([weight, 1 - weight], -1).log()
    columns = {}
    for distance in distances:
        centers = torch.tensor([[0.0, 0.0], [distance, 0.0]])
        values = [mutual_information_loss(centers[:, None], torch.arange(2), centers, w) for w in log_weights]
        columns[f"{distance:g}"] = torch.stack(values).mean((1, 2)).numpy()
    return pd.DataFrame(columns, index=pd.Index(weight.numpy(), name="weight of class A, $p(A)$"))


@torch.no_grad()
def level_values(
    flow: FeatureFlow, prior: HierarchicalGaussianMixture, x: Tensor, class_idx: Tensor, grid: tuple[int, int]
) -> LevelValues:
    """Give a toy flow's log-likelihoods per dimension and negative entropies, laid out as one level.

    Args:
        flow: A toy flow.
        prior: Its prior.
        x: Features, (B, H * W, D).
        class_idx: Class to score each image as, (B,).
        grid: (H, W).
    """
    z, log_det = flow(x)
    log_prob = (prior.log_prob(z, class_idx) + log_det) / x.shape[-1]
    return LevelValues((log_prob.unflatten(1, grid),), (prior.neg_entropy(z).unflatten(1, grid),))


def scores_in_company(*, seed: int = 0) -> pd.DataFrame:
    """Score one random image in three test sets, with both normalisations.

    Args:
        seed: Of the images.

    Returns:
        A row a set; columns "inductive" (constants stored beforehand) and "transductive".
    """
    generator = torch.Generator().manual_seed(seed)
    log_prob, neg_entropy = -torch.rand(2, 5, 8, 8, generator=generator)
    log_prob[4] += 1.5  # one image is far more normal than the others
    images = LevelValues((2 * log_prob,), (neg_entropy,))
    sets = {"alone": [0], "with three others": [0, 1, 2, 3], "beside a very normal one": [0, 4]}
    rows = {}
    for name, members in sets.items():
        chosen = images[torch.tensor(members)]
        found = {"inductive": inductive(images), "transductive": transductive(chosen, 32)}
        rows[name] = {
            kind: image_scores(anomaly_maps(chosen, constants, size=32, sigma=2))[0].item()
            for kind, constants in found.items()
        }
    return pd.DataFrame(rows).T.rename_axis("score of the same image")


_HALO = [effects.withStroke(linewidth=3, foreground="white")]


def _names(n: int) -> list[str]:
    return [f"class {'ABCDEFGHIJ'[k]}" for k in range(n)]


def class_points(
    points: ArrayLike,
    *,
    centers: ArrayLike | None = None,
    axis_labels: tuple[str, str] = ("$z_1$", "$z_2$"),
    title: str = "",
    legend: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw the points of each class in its colour, and its centres as crosses.

    Args:
        points: A class a row, (K, N, 2).
        centers: Main centres (K, 2), or all (K, M, 2): the main one first, the others as smaller dots.
        axis_labels: Of the two axes; the toy has no units.
        title: Of the panel.
        legend: Name the classes.
        ax: Where to draw; a new figure if not given.

    Raises:
        InputError: The points are not two-dimensional, or not a class a row.
    """
    points = np.asarray(points, dtype=float)
    if points.ndim != 3 or points.shape[-1] != 2:
        raise InputError(f"expected points (K, N, 2), a class a row, found {points.shape}")
    ax = plt.subplots(figsize=(3.4, 3.0))[1] if ax is None else ax
    names = _names(len(points))
    colors = class_colors(names)
    for name, mine in zip(names, points, strict=True):
        ax.scatter(mine[:, 0], mine[:, 1], s=7, color=colors[name], alpha=0.5, linewidths=0, label=name)
    if centers is not None:
        groups = np.asarray(centers, dtype=float).reshape(len(points), -1, 2)
        for name, group in zip(names, groups, strict=True):
            ax.scatter(
                group[1:, 0],
                group[1:, 1],
                s=45,
                color=colors[name],
                edgecolors="black",
                linewidths=1,
                zorder=3,
            )
            ax.scatter(
                group[0, 0],
                group[0, 1],
                s=110,
                marker="X",
                color=colors[name],
                edgecolors="black",
                linewidths=1,
                zorder=4,
            )
    ax.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    ax.set_title(title, loc="left")
    if legend:
        for handle in ax.legend(markerscale=2, handletextpad=0.2, loc="best").legend_handles:
            if handle is not None:
                handle.set_alpha(1)
    return ax


def plane_map(
    values: ArrayLike,
    extent: tuple[float, float, float, float],
    *,
    label: str,
    title: str = "",
    limits: tuple[float, float] | None = None,
    cmap: str = "viridis",
    axis_labels: tuple[str, str] = ("$x_1$", "$x_2$"),
    ax: Axes | None = None,
) -> Axes:
    """Draw a quantity over a part of the plane as colours, with its scale.

    Args:
        values: (n, n), the first row at the bottom.
        extent: Left, right, bottom, top.
        label: Of the colour scale, with its unit.
        title: Of the panel.
        limits: Values at the ends of the scale; their range if not given.
        cmap: Colour map.
        axis_labels: Of the two axes.
        ax: Where to draw; a new figure if not given.
    """
    ax = plt.subplots(figsize=(3.6, 3.0))[1] if ax is None else ax
    low, high = limits or (None, None)
    image = ax.imshow(
        np.asarray(values, dtype=float),
        extent=extent,
        origin="lower",
        aspect="auto",
        cmap=cmap,
        vmin=low,
        vmax=high,
        interpolation="nearest",  # a level of few positions is not to look smooth
    )
    ax.figure.colorbar(image, ax=ax, label=label, pad=0.02)
    ax.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    ax.set_title(title, loc="left")
    return ax


def force_field(
    points: ArrayLike,
    forces: ArrayLike,
    centers: ArrayLike,
    *,
    title: str = "",
    own: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the direction in which a loss pulls latents, as arrows; the stronger the darker.

    Args:
        points: (N, 2).
        forces: (N, 2), nats per unit.
        centers: Class centres, (K, 2).
        title: Of the panel.
        own: The class whose latents these are; the other centres are then drawn hollow.
        ax: Where to draw; a new figure if not given.
    """
    points, forces, centers = (np.asarray(a, dtype=float) for a in (points, forces, centers))
    ax = plt.subplots(figsize=(3.4, 3.0))[1] if ax is None else ax
    strength = np.linalg.norm(forces, axis=1)
    # Arrows of one length show directions; weak forces fade instead of shrinking to dots.
    direction = forces / np.maximum(strength, 1e-12)[:, None]
    shade = np.sqrt(strength / max(strength.max(), 1e-12))
    ax.quiver(
        *points.T, *direction.T, shade, cmap="Greys", clim=(-0.12, 1), scale=24, width=0.006, headwidth=4
    )
    names = _names(len(centers))
    colors = class_colors(names)
    for k, (name, center) in enumerate(zip(names, centers, strict=True)):
        hollow = own is not None and k != own
        ax.scatter(
            center[0], center[1], s=130, marker="X", color="white" if hollow else colors[name], zorder=4,
            edgecolors=colors[name] if hollow else "black", linewidths=1.6 if hollow else 1,
        )  # fmt: skip
    ax.set(xlabel="$z_1$", ylabel="$z_2$")
    ax.set_title(title, loc="left")
    return ax


def center_paths(points: ArrayLike, paths: ArrayLike, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw where centres went during a fit: a ring at the start, a line, a cross at the end.

    Args:
        points: Latents, a class a row, (K, N, 2).
        paths: Centres over time, (T, K, 2) or (T, K, M, 2).
        title: Of the panel.
        ax: Where to draw; a new figure if not given.
    """
    ax = class_points(points, title=title, ax=ax)
    steps = np.asarray(paths, dtype=float)
    steps = steps.reshape(len(steps), steps.shape[1], -1, 2)
    names = _names(steps.shape[1])
    colors = class_colors(names)
    for k, name in enumerate(names):
        for path in steps[:, k].transpose(1, 0, 2):
            ax.plot(*path.T, color=colors[name], linewidth=1.8, zorder=3, path_effects=_HALO)
            ax.scatter(
                path[0, 0], path[0, 1], s=35, color="white", edgecolors=colors[name], linewidths=1.5, zorder=4
            )
            ax.scatter(
                path[-1, 0], path[-1, 1], s=110, marker="X", color=colors[name], edgecolors="black", zorder=5
            )
    return ax


def bent_grid(
    lines: ArrayLike,
    values: ArrayLike,
    *,
    title: str = "",
    axis_labels: tuple[str, str] = ("$z_1$", "$z_2$"),
    limits: tuple[float, float] = (-1.5, 1.5),
    scale: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw the lines of a grid after a map has bent them, coloured by its log-determinant.

    Args:
        lines: Points along lines, (L, T, 2).
        values: Log |det J| at the points, (L, T), nats.
        title: Of the panel.
        axis_labels: Of the two axes.
        limits: Values at the ends of the colour scale.
        scale: Show the colour scale beside the panel.
        ax: Where to draw; a new figure if not given.
    """
    lines, values = np.asarray(lines, dtype=float), np.asarray(values, dtype=float)
    ax = plt.subplots(figsize=(3.4, 3.0))[1] if ax is None else ax
    pieces = np.stack([lines[:, :-1], lines[:, 1:]], axis=2).reshape(-1, 2, 2)
    collection = LineCollection(list(pieces), cmap="coolwarm", linewidths=1.1)
    collection.set_array(((values[:, :-1] + values[:, 1:]) / 2).ravel())
    collection.set_clim(*limits)
    ax.add_collection(collection)
    if scale:
        ax.figure.colorbar(collection, ax=ax, label=r"$\log|\det J|$ (nats)", pad=0.02)
    ax.autoscale()
    ax.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    ax.set_title(title, loc="left")
    return ax


def squares(images: Mapping[str, ArrayLike]) -> Figure:
    """Draw small square maps of values from 0 to 1 side by side, on one scale.

    Args:
        images: Maps (H, W) by title.
    """
    figure, axes = plt.subplots(1, len(images), figsize=(2.6 * len(images) + 0.8, 2.6), squeeze=False)
    for ax, (title, image) in zip(axes[0], images.items(), strict=True):
        shown = ax.imshow(np.asarray(image, dtype=float), cmap="inferno", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, loc="left")
    figure.colorbar(shown, ax=axes[0].tolist(), pad=0.02, label="normality, or score")
    return figure


def share_axes(axes: Sequence[Axes]) -> None:
    """Give panels the same limits, so that they compare."""
    xs, ys = ([getattr(ax, f"get_{a}lim")() for ax in axes] for a in "xy")
    for ax in axes:
        ax.set_xlim(min(x[0] for x in xs), max(x[1] for x in xs))
        ax.set_ylim(min(y[0] for y in ys), max(y[1] for y in ys))
