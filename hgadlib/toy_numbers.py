"""What the chapters ask of the toy in numbers: dead offsets, Eq. 8 by class weight, scores in company."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from hgadlib.flow import FeatureFlow
from hgadlib.losses import mutual_information_loss
from hgadlib.mixture import HierarchicalGaussianMixture, center_logits
from hgadlib.scoring import LevelValues, anomaly_maps, image_scores, inductive, transductive


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
