"""A two-dimensional toy in which one can see the losses at work: data, and two short fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hgadlib.flow import FeatureFlow
from hgadlib.losses import hgad_losses
from hgadlib.mixture import GaussianPrior, HierarchicalGaussianMixture


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
