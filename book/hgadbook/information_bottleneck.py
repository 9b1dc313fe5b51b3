"""App. F, checked numerically: the two informations of the bottleneck, estimated, tabulated and drawn.

All estimates draw the same noise, so that what differs between them is not the draw.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor

from hgadbook.method import fit_flow, toy_features
from hgadlib.errors import InputError
from hgadlib.features.store import Features
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, PALETTE
from hgadlib.losses import inter_class_nll, mutual_information_loss
from hgadlib.mixture import (
    LOG_2PI,
    HierarchicalGaussianMixture,
    Whitening,
    class_log_probs,
    standard_log_prob,
)
from hgadlib.model import HGAD


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@dataclass(frozen=True)
class Density:
    """A flow and an inter-class mixture in float64, with features to try them on.

    Attributes:
        flow: Features (n, d) to latents (n, d) and log |det dz/dx| (n,).
        centers: Main centres, (K, d).
        log_weights: Log class weights, (K,).
        x: Features, (n, d).
        class_idx: Class of each, (n,).
        whitening: Of the classes' covariances, (K, d, d); None for I.
    """

    flow: Callable[[Tensor], tuple[Tensor, Tensor]]
    centers: Tensor
    log_weights: Tensor
    x: Tensor
    class_idx: Tensor
    whitening: Whitening | None = None

    @property
    def dim(self) -> int:
        """Channels d."""
        return self.x.shape[1]

    @property
    def scale(self) -> float:
        """The features' root mean variance: the unit in which noise on them is large or small."""
        return self.x.var(0).mean().sqrt().item()

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of latents under the inter-class mixture (Eq. 13)."""
        no_det = torch.zeros(()).to(z)
        return -inter_class_nll(z, no_det, self.centers, self.log_weights, self.class_log_probs(z))

    def class_log_probs(self, z: Tensor) -> Tensor | None:
        """Log-density of latents under each class, (n, K); None where all covariances are I."""
        if self.whitening is None:
            return None
        centers = self.centers[:, None]
        return class_log_probs(z, centers, torch.zeros_like(centers[..., 0]), self.whitening)


def train_toy(*, steps: int = 200, points: int = 200, **weights: Any) -> Density:
    """Train the toy's flow and its three centres by Eq. 6 and 8.

    Args:
        steps: Of Adam.
        points: Of each of the three classes, even.
        **weights: See :func:`hgadlib.losses.hgad_losses`; lambda2 is alpha.
    """
    features, class_idx = toy_features(points)
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(3, 1, 2, init="normal")
    weights = {"lambda_e": 0.0, "lambda_in": 0.0} | weights
    net, _ = fit_flow(features, class_idx, prior, steps=steps, **weights)
    net, prior = net.double().requires_grad_(False), prior.double().requires_grad_(False)

    def flow(x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = net(x[None])
        return z[0], log_det[0]

    x = features.double().flatten(0, 1)
    return Density(flow, prior.centers, prior.log_weights, x, class_idx.repeat_interleave(points))


def level_density(
    model: HGAD, features: Features, class_idx: np.ndarray, *, level: int = -1, images: int = 24
) -> Density:
    """Take one level of a trained model, with the features of some images spread over the set.

    Args:
        model: With a mixture prior.
        features: Of N images.
        class_idx: (N,).
        level: The level.
        images: How many images, at most.

    Raises:
        InputError: The model has one Gaussian for all classes.
    """
    flow, prior = model.levels[level]
    if not isinstance(prior, HierarchicalGaussianMixture):
        raise InputError("expected a prior with a centre per class, found one Gaussian for all classes")
    chosen = torch.from_numpy(np.linspace(0, len(features) - 1, images).round().astype(np.int64)).unique()
    x = features.batch(chosen, "cpu")[level].double()
    net = copy.deepcopy(flow).cpu().double().requires_grad_(False)
    positions = x.shape[1]

    def map_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = net(rows.unflatten(0, (-1, positions)))
        return z.flatten(0, 1), log_det.flatten()

    labels = torch.from_numpy(class_idx)[chosen].repeat_interleave(positions)
    prior = copy.deepcopy(prior).cpu().double().requires_grad_(False)
    rows, whitening = x.flatten(0, 1), prior.whitening()
    return Density(map_rows, prior.centers, prior.log_weights, rows, labels, whitening)


@dataclass(frozen=True)
class InformationEstimate:
    """A Monte-Carlo estimate of Eq. 24, in nats.

    Attributes:
        sigma: Standard deviation of the noise, in units of the features.
        entropy: A, the cross-entropy of the noisy latents under the prior.
        conditional: B, the expected log-density of the noisy latents given the clean features.
        nll: Expected L_g (Eq. 6) of the clean features.
        dim: d.
    """

    sigma: float
    entropy: float
    conditional: float
    nll: float
    dim: int

    @property
    def information(self) -> float:
        """A + B: the mutual information, if the prior fits the latents; more than it otherwise."""
        return self.entropy + self.conditional

    @property
    def constants(self) -> float:
        r"""Negative entropy of the noise, :math:`-d\log\sigma - \tfrac d2\log 2\pi e` (Eq. 27)."""
        return -self.dim * math.log(self.sigma) - 0.5 * self.dim * (LOG_2PI + 1.0)

    @property
    def gap(self) -> float:
        r"""A + B less its constants and less the expected loss: what vanishes as :math:`\sigma^2`."""
        return self.information - self.constants - self.nll


def antithetic_noise(n: int, dim: int) -> Tensor:
    """Draw standard normal noise in pairs of opposite sign, scaled to a mean square of exactly 1.

    Odd moments and the second one then carry no sampling error, which would hide the small terms.

    Args:
        n: Rows, even.
        dim: d.

    Returns:
        (n, d) float64; row i + n/2 is the opposite of row i.

    Raises:
        ValueError: n is odd.
    """
    if n % 2:
        raise ValueError(f"expected an even number of samples, found {n}; noise comes in pairs")
    half = torch.randn(n // 2, dim, generator=_generator(), dtype=torch.float64)
    half = half / half.square().mean().sqrt()
    return torch.cat([half, -half])


def _conditional(density: Density, x: Tensor, noise: Tensor, sigma: float) -> Tensor:
    r"""Log-density of noisy latents given clean features, exactly: (n, d) to (n,), nats.

    .. math:: \log p(\varphi(x+\epsilon)\mid x)
              = \log\mathcal N(\epsilon; 0, \sigma^2 I) - \log|\det J(x+\epsilon)|
    """
    return _noise_log_prob(noise, sigma) - density.flow(x + noise)[1]


def _linearised_conditional(density: Density, x: Tensor, noise: Tensor, sigma: float) -> Tensor:
    r"""The same by the paper's first-order expansion, taken at the true noisy latents (Eq. 26 and 27).

    .. math:: \log\mathcal N(\varphi(x+\epsilon);\, \varphi(x),\, \sigma^2 JJ^\top)

    The Jacobian J at x is taken by autograd, d passes.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        z = density.flow(x)[0]
        rows = [torch.autograd.grad(z[:, i].sum(), x, retain_graph=True)[0] for i in range(z.shape[1])]
    jacobian = torch.stack(rows, dim=1)
    step = density.flow(x + noise)[0] - z
    return _noise_log_prob(torch.linalg.solve(jacobian, step), sigma) - torch.linalg.slogdet(jacobian)[1]


def _noise_log_prob(noise: Tensor, sigma: float) -> Tensor:
    return standard_log_prob(noise / sigma) - noise.shape[-1] * math.log(sigma)


@torch.no_grad()
def estimate_information(density: Density, sigma: float, *, linearised: bool = False) -> InformationEstimate:
    """Estimate I(X, Z_eps) as the paper defines it, A + B, one draw of noise and its opposite per feature.

    Args:
        density: Flow, prior and features; float64 for small sigma.
        sigma: Standard deviation of the noise, in units of the features, > 0.
        linearised: Take the paper's expansion for B in place of the exact density.

    Returns:
        The estimate, with the expected loss beside it.

    Raises:
        ValueError: sigma is not positive.

    Source: paper Eq. 24.
    """
    if not sigma > 0:
        raise ValueError(f"expected noise of positive standard deviation, found {sigma}")
    z, log_det = density.flow(density.x)
    nll = -(density.log_prob(z) + log_det).mean()
    pairs = torch.cat([density.x, density.x])
    noise = sigma * antithetic_noise(len(pairs), density.dim)
    a = -density.log_prob(density.flow(pairs + noise)[0]).mean()
    b = (_linearised_conditional if linearised else _conditional)(density, pairs, noise, sigma).mean()
    return InformationEstimate(sigma, a.item(), b.item(), nll.item(), density.dim)


def nested_information(x: Tensor, sigma: float, class_idx: Tensor | None = None) -> float:
    r"""Estimate I(X + E, Y) from samples alone, without a flow; by bijectivity it is the true I(Z_eps, Y).

    .. math:: \frac1n\sum_i \log\frac{\frac1{n_y}\sum_{j: y_j = y_i} p(x_i+\epsilon_i\mid x_j)}
                                  {\frac1n\sum_j p(x_i+\epsilon_i\mid x_j)}

    Args:
        x: Features, (n, d), n even.
        sigma: Standard deviation of the noise.
        class_idx: Class of each, (n,). None for each a class of its own: then it is I(X, X + E), the true
            I(X, Z_eps), and never above log n, so that small sigma need many samples.

    Returns:
        Nats.
    """
    class_idx = torch.arange(len(x)) if class_idx is None else class_idx
    noisy = x + sigma * antithetic_noise(*x.shape)
    log_kernel = -0.5 * torch.cdist(noisy, x).square() / sigma**2
    same = class_idx[:, None] == class_idx[None, :]
    own = torch.logsumexp(log_kernel.masked_fill(~same, -torch.inf), 1) - same.sum(1).to(x).log()
    return (own - torch.logsumexp(log_kernel, 1) + math.log(len(x))).mean().item()


def class_information_bound(density: Density, z: Tensor) -> tuple[float, float]:
    r"""Evaluate :math:`-\mathcal L_{mi}` (Eq. 8) and what its class weights add to it.

    .. math:: -\mathcal L_{mi} = I(Z,Y)
              - \mathbb E_z\,\mathrm{KL}\bigl(p(y\mid z)\,\|\,q(y\mid z)\bigr)
              + \mathrm{KL}\bigl(p(y)\,\|\,\operatorname{softmax}\psi\bigr)

    with the prior's posterior q. Less the last term it is a lower bound of I(Z, Y), and equal to it where the
    prior's posterior is the true one.

    Args:
        density: Its centres, weights and classes count.
        z: Latents of its features, (n, d), with noise or without.

    Returns:
        Both terms, -L_mi and the last divergence, in nats.

    Source: paper Eq. 19 to 21, App. F.
    """
    z, log_weights = z[:, None], density.log_weights
    of_classes = density.class_log_probs(z)
    loss = mutual_information_loss(z, density.class_idx, density.centers, log_weights, of_classes)
    share = torch.bincount(density.class_idx, minlength=len(density.centers)).to(z) / len(z)
    divergence = torch.special.xlogy(share, share) - share * density.log_weights
    return -loss.mean().item(), divergence.sum().item()


def information_by_noise(
    density: Density, sigmas: Sequence[float], *, linearised: bool = False, per_dimension: bool = False
) -> pd.DataFrame:
    """Estimate Eq. 24 for several strengths of noise, and what it should approach.

    Args:
        density: The trained flow and prior.
        sigmas: Standard deviations of the noise, in units of the features.
        linearised: Also take the paper's expansion for B (needs the Jacobians: small d only).
        per_dimension: Divide all nats by d.

    Returns:
        A row a strength: "sigma", "information" (A + B), "limit" (expected L_g and the constants), "gap"
        (their difference), "linearised gap" where asked for, and "last term": the mean of
        |eps|^2 / 2 sigma^2, the last term of Eq. 27 without its sign.
    """
    unit = density.dim if per_dimension else 1
    rows = []
    for sigma in sigmas:
        found = estimate_information(density, sigma)
        noise = sigma * torch.randn(density.x.shape, generator=_generator(), dtype=torch.float64)
        row = {
            "sigma": sigma,
            "information": found.information / unit,
            "limit": (found.nll + found.constants) / unit,
            "gap": found.gap / unit,
            "last term": (noise.square().sum(1).mean().item() / (2 * sigma**2)) / unit,
        }
        if linearised:
            row["linearised gap"] = estimate_information(density, sigma, linearised=True).gap / unit
        rows.append(row)
    return pd.DataFrame(rows)


def rate(sigmas: Sequence[float], gaps: Sequence[float]) -> float:
    """Fit the power with which a gap vanishes: the slope of log |gap| against log sigma.

    >>> round(rate([0.1, 0.01], [0.02, 0.0002]), 6)
    2.0
    """
    return float(np.polyfit(np.log(sigmas), np.log(np.abs(np.asarray(gaps))), 1)[0])


@torch.no_grad()
def point_in_plane(density: Density, sigma: float) -> dict[str, float]:
    """Compute what the losses say of the two informations, and what is true.

    Args:
        density: Of few dimensions, where the truth can be estimated from samples.
        sigma: Standard deviation of the noise.

    Returns:
        In nats: "A + B" and "true I(X, Z)"; "-L_mi" of the noisy latents, "weights" (what the class weights
        add to it) and "true I(Z, Y)".
    """
    noisy = density.flow(density.x + sigma * antithetic_noise(*density.x.shape))[0]
    gain, weights = class_information_bound(density, noisy)
    return {
        "A + B": estimate_information(density, sigma).information,
        "true I(X, Z)": nested_information(density.x, sigma),
        "-L_mi": gain,
        "weights": weights,
        "true I(Z, Y)": nested_information(density.x, sigma, density.class_idx),
    }


def over_training(steps: Sequence[int], sigma: float, **weights: Any) -> pd.DataFrame:
    """Compute :func:`point_in_plane` of toys trained for longer and longer: a row a number of steps."""
    rows = [point_in_plane(train_toy(steps=n, **weights), sigma) for n in steps]
    return pd.DataFrame(rows, index=pd.Index(list(steps), name="steps of training"))


def over_alpha(alphas: Sequence[float], sigma: float, **weights: Any) -> pd.DataFrame:
    """Compute :func:`point_in_plane` of toys trained with several trade-offs alpha = lambda2: a row each."""
    rows = [point_in_plane(train_toy(lambda2=alpha, **weights), sigma) for alpha in alphas]
    return pd.DataFrame(rows, index=pd.Index(list(alphas), name="alpha"))


@torch.no_grad()
def class_information(density: Density) -> dict[str, float]:
    """Compute, in nats, -L_mi of a level's latents, what its class weights add, and the most there can be."""
    gain, weights = class_information_bound(density, density.flow(density.x)[0])
    share = torch.bincount(density.class_idx).double() / len(density.class_idx)
    entropy = torch.special.entr(share).sum().abs().item()  # of one class it is 0, not -0
    return {"-L_mi": gain, "weights": weights, "entropy of the classes": entropy}


def information_limit(table: pd.DataFrame) -> Axes:
    """Draw A + B of Eq. 24 by noise, and what it approaches, out of :func:`information_by_noise`."""
    ax = plt.subplots(figsize=(4.4, 3.0))[1]
    ax.plot(table["sigma"], table["limit"], color="0.35", label="loss and constants")
    ax.plot(
        table["sigma"], table["information"], color=PALETTE[0], marker="o", linestyle="none", label="$A + B$"
    )
    ax.set(xscale="log", xlabel=r"noise $\sigma$ (units of the features)", ylabel="information (nats)")
    ax.legend()
    return ax


def gap_rates(
    gaps: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    unit: str = "nats",
    noise_unit: str = "units of the features",
) -> Axes:
    """Draw how fast gaps, (sigmas, gaps) by name, vanish with the noise, and a line of slope 2."""
    ax = plt.subplots(figsize=(4.4, 3.0))[1]
    for (name, (sigmas, values)), color, marker in zip(gaps.items(), PALETTE, "osD^v", strict=False):
        ax.plot(sigmas, np.abs(np.asarray(values)), marker=marker, color=color, label=name)
    sigmas, values = (np.asarray(a, dtype=float) for a in next(iter(gaps.values())))
    i = int(np.argsort(sigmas)[len(sigmas) // 2])
    ax.plot(
        sigmas, np.abs(values[i]) * (sigmas / sigmas[i]) ** 2, color="0.5", linestyle=(0, (4, 3)),
        linewidth=1.2, label="slope 2", zorder=1,
    )  # fmt: skip
    ax.set(xscale="log", yscale="log")
    ax.set(xlabel=rf"noise $\sigma$ ({noise_unit})", ylabel=f"|gap| ({unit})")
    ax.legend()
    return ax


def bounds_over_training(table: pd.DataFrame) -> Figure:
    """Draw both informations as the losses have them and as they are, out of :func:`over_training`."""
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 3.0))
    pairs = (
        ("A + B", "true I(X, Z)", r"$I(X, Z_\mathcal{E})$ (nats)", "$A + B$"),
        ("-L_mi", "true I(Z, Y)", r"$I(Z_\mathcal{E}, Y)$ (nats)", r"$-\mathcal{L}_{mi}$"),
    )
    for ax, (bound, true, label, name) in zip(axes, pairs, strict=True):
        ax.plot(table.index, table[bound], color=PALETTE[0], marker="o", label=name)
        ax.plot(table.index, table[true], color=ANOMALOUS_COLOR, linestyle=(0, (4, 2)), label="true value")
        ax.set_xscale("log")
        ax.set(xlabel="steps of training", ylabel=label)
        ax.legend()
    return figure


def information_plane(series: Mapping[str, pd.DataFrame]) -> Axes:
    """Draw what alpha makes of the two bounds, and the truth: two tables of :func:`over_alpha`, by name."""
    ax = plt.subplots(figsize=(5.4, 3.8))[1]
    looks = ((NORMAL_COLOR, 9.0, "none"), (PALETTE[2], 4.0, PALETTE[2]))
    for i, ((name, table), (color, size, face)) in enumerate(zip(series.items(), looks, strict=False)):
        # Curves may lie on each other: a ring around a dot shows both.
        ax.plot(
            table["A + B"], table["-L_mi"], color=color, marker="o", markersize=size, markerfacecolor=face,
            linewidth=2.4 - 1.2 * i, label=name,
        )  # fmt: skip
    for alpha, x, y in zip(table.index, table["A + B"], table["-L_mi"], strict=True):
        ax.annotate(rf"$\alpha$={alpha:g}", (x, y), textcoords="offset points", xytext=(6, -13), fontsize=8)
    ax.scatter(
        table["true I(X, Z)"].iloc[0], table["true I(Z, Y)"].iloc[0], s=150, marker="*",
        color=ANOMALOUS_COLOR, zorder=4, edgecolors="black", label="true values, for every flow",
    )  # fmt: skip
    ax.margins(0.12)
    ax.set(xlabel="$A + B$: bound of $I(X, Z_\\mathcal{E})$ from above (nats)")
    ax.set(ylabel=r"$-\mathcal{L}_{mi}$: estimate of $I(Z_\mathcal{E}, Y)$ (nats)")
    ax.legend()
    return ax


def bottleneck_sentences(
    by_noise: pd.DataFrame, trained: pd.DataFrame, learnt: pd.DataFrame, *, dim: int
) -> list[str]:
    """Say what the numbers say of App. F.

    Args:
        by_noise: From :func:`information_by_noise`, on the toy.
        trained: From :func:`over_training`.
        learnt: From :func:`over_alpha`, class weights learnt by Eq. 8 as printed.
        dim: Dimensions of the toy.
    """
    middle = by_noise[(by_noise["sigma"] <= 0.1) & (by_noise["sigma"] >= 0.003)]
    power, last = rate(list(middle["sigma"]), list(middle["gap"])), by_noise["last term"]
    bound, true = trained["A + B"], trained["true I(X, Z)"]
    excess = learnt["-L_mi"] - learnt["true I(Z, Y)"]
    over = ", ".join(f"{alpha:g}" for alpha in excess.index[excess > 0])
    return [
        f"The first term meets the loss as the noise vanishes: the gap falls with the power {power:.1f} of "
        f"the noise (the paper: 2), to {abs(by_noise['gap'].iloc[-1]):.0e} nats.",
        f"The last term of Eq. 27, said to vanish, is {last.min():.2f} to {last.max():.2f} nats at every "
        f"noise; $d/2$ is {dim / 2:g}.",
        f"Training moves the loss's value of $I(X, Z)$ from {bound.iloc[0]:.1f} to {bound.iloc[-1]:.1f} "
        f"nats, and the true value from {true.iloc[0]:.1f} to {true.iloc[-1]:.1f}.",
        r"With class weights learnt as printed, $-\mathcal{L}_{mi}$ "
        + (
            rf"exceeds the true $I(Z, Y)$ at $\alpha$ = {over}, by up to {excess.max():.1f} nats."
            if over
            else r"stays below the true $I(Z, Y)$ at every $\alpha$ tried."
        ),
    ]
