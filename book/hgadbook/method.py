"""The method in two dimensions: toys of three classes, fits of prior and flow, their numbers and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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

from hgadbook.sliders import picture_of, picture_slider
from hgadlib.figures.theme import PALETTE, class_colors
from hgadlib.flow import FeatureFlow
from hgadlib.losses import hgad_losses, mutual_information_loss
from hgadlib.mixture import GaussianPrior, HierarchicalGaussianMixture, center_logits
from hgadlib.scoring import (
    LevelValues,
    Normalisation,
    anomaly_maps,
    image_scores,
    inductive,
    published_maps,
    transductive,
)

Extent = tuple[float, float, float, float]
"""A part of the plane: left, right, bottom, top."""


def toy_latents(n: int = 60, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw latents of three classes: two compact ones, and one that looks normal in three ways.

    Returns:
        Latents, (3, n, 2), a class as an image of n positions; class indices (3,).
    """
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.tensor([[[-3.0, -1.5]] * 3, [[-1.0, 2.5]] * 3, [[2.0, -2.5], [4.5, -0.5], [3.0, 2.0]]])
    noise = 0.5 * torch.randn(3, n, 2, generator=generator)
    return blobs[:, torch.arange(n) % 3] + noise, torch.arange(3)


def toy_features(n: int = 400, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw features of three classes on bent, unequal clusters: no Gaussian among them.

    Returns:
        Features, (3, n, 2), a class as an image of n positions; class indices (3,).
    """
    generator = torch.Generator().manual_seed(seed)
    angle = math.pi * torch.rand(3, n, generator=generator)
    radius = 1 + 0.12 * torch.randn(3, n, generator=generator)
    arc = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    lower = torch.stack([1 - arc[1, :, 0], 0.3 - arc[1, :, 1]], -1)
    narrow = torch.stack([2.6 + 0.25 * arc[2, :, 0], 0.9 + 0.8 * arc[2, :, 1]], -1)
    return torch.stack([arc[0], lower, narrow]), torch.arange(3)


def plane(extent: Extent, n: int) -> Tensor:
    """Lay n by n points over a part of the plane: (n * n, 2), row by row from the bottom."""
    left, right, bottom, top = extent
    rows, columns = torch.meshgrid(
        torch.linspace(bottom, top, n), torch.linspace(left, right, n), indexing="ij"
    )
    return torch.stack([columns, rows], -1).flatten(0, 1)


def fit_prior(
    prior: HierarchicalGaussianMixture,
    z: Tensor,
    class_idx: Tensor,
    *,
    steps: int = 300,
    **weights: Any,
) -> Tensor:
    """Move a prior's centres under the losses, latents held fixed: as if the flow did not learn.

    Args:
        prior: Changed in place.
        z: Latents, (B, N, D).
        class_idx: (B,).
        steps: Of Adam.
        **weights: See :func:`hgadlib.losses.hgad_losses`.

    Returns:
        Centres after 0, 1, ... steps, (steps + 1, K, M, D), the main one of a class first.
    """
    optimiser = torch.optim.Adam([p for p in prior.parameters() if p.requires_grad], lr=0.05)
    log_det = torch.zeros(z.shape[:2])
    path = [prior.intra_centers().detach()]
    for _ in range(steps):
        optimiser.zero_grad()
        hgad_losses(z, log_det, class_idx, prior, **weights)["total"].backward()
        optimiser.step()
        path.append(prior.intra_centers().detach())
    return torch.stack(path)


def fit_flow(
    x: Tensor,
    class_idx: Tensor,
    prior: HierarchicalGaussianMixture | GaussianPrior,
    *,
    layers: int = 8,
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
        steps: Of Adam; the rate falls along half a cosine.
        first_stage: Steps without the intra-class terms.
        lr: First rate.
        seed: Of the flow's initial state.
        **weights: See :func:`hgadlib.losses.hgad_losses`.

    Returns:
        The flow, and the terms of each step.
    """
    torch.manual_seed(seed)
    flow = FeatureFlow(x.shape[-1], (1, x.shape[1]), layers=layers, position_dim=0, hidden=32).to(x)
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


def pull(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Compute where a loss moves latents (B, N, D): minus its gradient, in nats per unit of z."""
    z = z.detach().requires_grad_()
    return -torch.autograd.grad(loss(z).sum(), z)[0]


def offset_shares(dims: Sequence[int], delta_stds: Sequence[float]) -> pd.DataFrame:
    """Compute the share of latents around a main centre that its offset centres take before any training.

    Args:
        dims: Numbers of channels D, a row each.
        delta_stds: Standard deviations of the initial offsets, a column each.

    Returns:
        Mean responsibility of nine offset centres for latents from N(main centre, I); 0.9 where all ten
        centres count equally.
    """
    columns = {f"$\\sigma$ = {std:g}": [_offset_share(dim, std) for dim in dims] for std in delta_stds}
    return pd.DataFrame(columns, index=pd.Index(dims, name="channels D"))


@torch.no_grad()
def _offset_share(dim: int, delta_std: float) -> float:
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(1, 10, dim, delta_std=delta_std)
    z = prior.centers + torch.randn(512, dim)
    logits = center_logits(z - prior.centers, prior.intra_centers()[0] - prior.centers)
    return 1 - logits.softmax(-1)[:, 0].mean().item()


def eq8_by_weight(distances: Sequence[float]) -> pd.DataFrame:
    """Evaluate Eq. 8 for two classes, half of the data each, as the prior's weight of the first varies.

    Args:
        distances: Of the two centres, on which the latents lie.

    Returns:
        L_mi in nats: a row a weight, from 5e-13 to 1/2, a column a distance.
    """
    weight = 0.5 * torch.logspace(-12, 0, 60)
    log_weights = torch.stack([weight, 1 - weight], -1).log()
    columns = {}
    for distance in distances:
        centers = torch.tensor([[0.0, 0.0], [distance, 0.0]])
        values = [mutual_information_loss(centers[:, None], torch.arange(2), centers, w) for w in log_weights]
        columns[f"{distance:g}"] = torch.stack(values).mean((1, 2)).numpy()
    return pd.DataFrame(columns, index=pd.Index(weight.numpy(), name="weight of class A, $p(A)$"))


@torch.no_grad()
def toy_values(
    flow: FeatureFlow, prior: HierarchicalGaussianMixture, x: Tensor, class_idx: Tensor, grid: tuple[int, int]
) -> LevelValues:
    """Compute a toy flow's log-likelihoods per dimension and negative entropies, laid out as one level.

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
    """Score one random image in three test sets, a row each, with both normalisations."""
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
            kind: image_scores(published_maps(chosen, constants, size=32, sigma=2))[0].item()
            for kind, constants in found.items()
        }
    return pd.DataFrame(rows).T.rename_axis("score of the same image")


def score_by_distance() -> Figure:
    """Draw both forms of the score of one position over its distance below the normal maximum."""
    below = torch.logspace(-3, 2, 400)
    values = LevelValues((-below[:, None, None],), ())
    constants = Normalisation(torch.zeros(1), torch.zeros(0))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    forms = {"published, $S_l$": published_maps, "used here, $t$": anomaly_maps}
    for ax, (name, form) in zip(axes, forms.items(), strict=True):
        score = form(values, constants, size=1, sigma=0)[:, 0, 0]
        constant = torch.cat([score.diff() == 0, torch.tensor([True])]) & (below > 10)
        for style, part in (("-", ~constant), ("--", constant)):
            ax.plot(below[part], score[part], style, color=PALETTE[0])
        ax.set(xscale="log", xlabel="nats below the maximum")
        ax.set_title(name, loc="left")
    axes[0].set_ylabel("score")
    return figure


def _colors(n: int) -> dict[str, str]:
    return class_colors([f"class {'ABCDEFGHIJ'[k]}" for k in range(n)])


def _dress(ax: Axes, title: str, axis_labels: tuple[str, str] = ("$z_1$", "$z_2$")) -> None:
    ax.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    ax.set_title(title, loc="left")


def _cross(ax: Axes, point: np.ndarray, color: str, *, hollow: bool = False) -> None:
    """Mark a class's main centre."""
    edge, width = (color, 1.6) if hollow else ("black", 1.0)
    face = "white" if hollow else color
    ax.scatter(point[0], point[1], s=120, marker="X", color=face, edgecolors=edge, linewidths=width, zorder=5)


def class_points(
    points: ArrayLike,
    *,
    ax: Axes,
    centers: ArrayLike | None = None,
    axis_labels: tuple[str, str] = ("$z_1$", "$z_2$"),
    title: str = "",
    legend: bool = False,
) -> None:
    """Draw the points of each class in its colour, and its centres: the main one a cross, the others dots.

    Args:
        points: A class a row, (K, N, 2).
        ax: Where to draw.
        centers: (K, M, 2), the main one first.
        axis_labels: Of the two axes; the toy has no units.
        title: Of the panel.
        legend: Name the classes.
    """
    points = np.asarray(points, dtype=float)
    colors = _colors(len(points))
    for (name, color), own in zip(colors.items(), points, strict=True):
        ax.scatter(own[:, 0], own[:, 1], s=7, color=color, alpha=0.5, linewidths=0, label=name)
    if centers is not None:
        for color, (main, *others) in zip(colors.values(), np.asarray(centers, dtype=float), strict=True):
            for other in others:
                ax.scatter(other[0], other[1], s=45, color=color, edgecolors="black", linewidths=1, zorder=3)
            _cross(ax, main, color)
    _dress(ax, title, axis_labels)
    if legend:
        for handle in ax.legend(markerscale=2, handletextpad=0.2, loc="best").legend_handles:
            if handle is not None:
                handle.set_alpha(1)


def plane_map(
    values: ArrayLike,
    extent: Extent,
    *,
    ax: Axes,
    label: str,
    limits: tuple[float, float],
    title: str = "",
    cmap: str = "viridis",
) -> None:
    """Draw a quantity over a part of the plane as colours, with its scale.

    Args:
        values: (n, n), the first row at the bottom.
        extent: Of the plane's part.
        ax: Where to draw.
        label: Of the colour scale, with its unit.
        limits: Values at the ends of the scale.
        title: Of the panel.
        cmap: Colour map.
    """
    image = ax.imshow(
        np.asarray(values, dtype=float),
        extent=extent,
        origin="lower",
        aspect="auto",
        cmap=cmap,
        vmin=limits[0],
        vmax=limits[1],
        interpolation="nearest",  # a level of few positions is not to look smooth
    )
    ax.figure.colorbar(image, ax=ax, label=label, pad=0.02)
    _dress(ax, title, ("$x_1$", "$x_2$"))


def force_field(
    points: ArrayLike, forces: ArrayLike, centers: ArrayLike, *, ax: Axes, title: str, own: int | None = None
) -> None:
    """Draw the direction in which a loss pulls latents, as arrows; the stronger the darker.

    Args:
        points: (N, 2).
        forces: (N, 2), nats per unit.
        centers: Class centres, (K, 2).
        ax: Where to draw.
        title: Of the panel.
        own: The class whose latents these are; the other centres are then drawn hollow.
    """
    points, forces, centers = (np.asarray(a, dtype=float) for a in (points, forces, centers))
    strength = np.linalg.norm(forces, axis=1)
    # Arrows of one length show directions; weak forces fade instead of shrinking to dots.
    direction = forces / np.maximum(strength, 1e-12)[:, None]
    shade = np.sqrt(strength / max(strength.max(), 1e-12))
    ax.quiver(
        *points.T, *direction.T, shade, cmap="Greys", clim=(-0.12, 1), scale=24, width=0.006, headwidth=4
    )
    for k, (color, center) in enumerate(zip(_colors(len(centers)).values(), centers, strict=True)):
        _cross(ax, center, color, hollow=own not in (None, k))
    _dress(ax, title)


def center_paths(points: ArrayLike, paths: ArrayLike, *, ax: Axes, title: str) -> None:
    """Draw where centres went during a fit: a ring at the start, a line, a cross at the end.

    Args:
        points: Latents, a class a row, (K, N, 2).
        paths: Centres over time, (T, K, M, 2).
        ax: Where to draw.
        title: Of the panel.
    """
    class_points(points, title=title, ax=ax)
    halo = [effects.withStroke(linewidth=3, foreground="white")]
    steps = np.asarray(paths, dtype=float)
    for k, color in enumerate(_colors(steps.shape[1]).values()):
        for path in steps[:, k].transpose(1, 0, 2):
            ax.plot(*path.T, color=color, linewidth=1.8, zorder=3, path_effects=halo)
            ax.scatter(
                path[0, 0], path[0, 1], s=35, color="white", edgecolors=color, linewidths=1.5, zorder=4
            )
            _cross(ax, path[-1], color)


WEIGHTS, LOOKS = (0.0, 0.1, 1.0, 10.0, 100.0), (0, 10, 30, 100, 300)
"""Of Eq. 8 in :func:`centre_slider`, and the steps at which it shows the centres."""


def centre_slider(z: Tensor, class_idx: Tensor, start: Tensor) -> str:
    """Write HTML that shows class centres in the plane by the weight of Eq. 8 and the step, with two sliders.

    Args:
        z: Latents, (K, N, 2), held fixed.
        class_idx: (K,).
        start: Centres at the start, (K, 2).
    """
    frames = {}
    for i, weight in enumerate(WEIGHTS):
        prior = HierarchicalGaussianMixture(len(start), 1, 2, learn_weights=False)
        prior.set_centers(start)
        path = fit_prior(prior, z, class_idx, steps=LOOKS[-1], intra=False, lambda2=weight, lambda_e=0)
        for j, step in enumerate(LOOKS):
            figure, ax = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
            said = f"weight of Eq. 8: {weight:g}, step {step}"
            center_paths(z, path[: step + 1], ax=ax, title=said)
            # Far centres must not move the picture.
            ax.set(xlim=(-8, 9), ylim=(-6, 7))
            frames[i, j] = picture_of(figure), said
            plt.close(figure)
    sliders = {"weight of Eq. 8": [f"{w:g}" for w in WEIGHTS], "step": [str(step) for step in LOOKS]}
    return picture_slider(frames, sliders)


def bent_grid(
    lines: ArrayLike,
    log_det: ArrayLike,
    *,
    ax: Axes,
    title: str,
    axis_labels: tuple[str, str] = ("$z_1$", "$z_2$"),
    scale: bool = False,
) -> None:
    """Draw the lines of a grid after a map has bent them, coloured by its log-determinant.

    Args:
        lines: Points along lines, (L, T, 2).
        log_det: Log |det J| at the points, (L, T), nats; colours end at 1.5.
        ax: Where to draw.
        title: Of the panel.
        axis_labels: Of the two axes.
        scale: Show the colour scale beside the panel.
    """
    lines, values = np.asarray(lines, dtype=float), np.asarray(log_det, dtype=float)
    pieces = np.stack([lines[:, :-1], lines[:, 1:]], axis=2).reshape(-1, 2, 2)
    collection = LineCollection(list(pieces), cmap="coolwarm", linewidths=1.1)
    collection.set_array(((values[:, :-1] + values[:, 1:]) / 2).ravel())
    collection.set_clim(-1.5, 1.5)
    ax.add_collection(collection)
    ax.autoscale()
    if scale:
        ax.figure.colorbar(collection, ax=ax, label=r"$\log|\det J|$ (nats)", pad=0.02)
    _dress(ax, title, axis_labels)


def squares(images: Mapping[str, ArrayLike]) -> Figure:
    """Draw square maps (H, W) of values from 0 to 1 side by side, by title, on one scale."""
    figure, axes = plt.subplots(1, len(images), figsize=(2.6 * len(images) + 0.8, 2.6), squeeze=False)
    for ax, (title, image) in zip(axes[0], images.items(), strict=True):
        shown = ax.imshow(np.asarray(image, dtype=float), cmap="inferno", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, loc="left")
    figure.colorbar(shown, ax=axes[0].tolist(), pad=0.02, label="normality, or score")
    return figure


def method_sentences(difference: Tensor, eq8: pd.DataFrame, shares: pd.DataFrame) -> list[str]:
    """Say what the chapter's toy says of the paper's text.

    Args:
        difference: Between Eq. 6 and the same mixture by torch.distributions, in nats.
        eq8: From :func:`eq8_by_weight`.
        shares: From :func:`offset_shares`, the published deviation of offsets first.
    """
    low, bound, published = eq8.to_numpy().min(), -math.log(2), 100 * shares.iloc[:, 0]
    holds = "holds" if low >= bound else "does not hold for learnt class weights"
    few, many = published.iloc[0], published.iloc[-1]
    return [
        "Under each equation stands the function that computes it. Eq. 6 agrees with the same mixture by "
        f"`torch.distributions` to {difference.abs().max().item():.0e} nats.",
        f"Eq. 8 reaches −{-low:.1f} nats on two classes: App. E's bound of −{-bound:.2f} {holds}.",
        f"Offset centres drawn as published have {few:.0f} % of a class's latents in {published.index[0]} "
        f"channels and {many:.2g} % in {published.index[-1]}, before any training.",
    ]
