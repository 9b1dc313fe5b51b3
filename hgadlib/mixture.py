r"""The hierarchical Gaussian mixture prior: class centres, centres within a class, and their weights.

Distances are never formed as an (N, M, D) tensor. For unit covariances

.. math:: -\tfrac12\|z-\mu_k\|^2 =
          \underbrace{z^\top\mu_k - \tfrac12\|\mu_k\|^2}_{\text{logit}} - \tfrac12\|z\|^2,

so a matrix product gives all logits, and the term that all centres share drops out of every softmax
exactly, whatever its magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

LOG_2PI = math.log(2.0 * math.pi)


def center_logits(z: Tensor, centers: Tensor) -> Tensor:
    r"""Compute :math:`z^\top\mu_k - \|\mu_k\|^2/2`: the log-density up to what all centres share.

    Args:
        z: Latents, (..., N, D).
        centers: Centres, (..., K, D), with the same or broadcastable leading axes.
    Returns:
        Logits, (..., N, K).
    Raises:
        ValueError: The last axes of z and centers differ.
    """
    if z.shape[-1] != centers.shape[-1]:
        raise ValueError(f"expected centres of {z.shape[-1]} channels, found {centers.shape[-1]}")
    # A density needs full precision: autocast would run the product in bfloat16.
    with torch.autocast(z.device.type, enabled=False):
        half_norm = 0.5 * centers.square().sum(-1)
        return z @ centers.mT - half_norm.unsqueeze(-2)


def standard_log_prob(z: Tensor) -> Tensor:
    r"""Log-density of :math:`\mathcal N(0, I)`, in nats: (..., D) to (...). Source: paper Eq. 3."""
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * LOG_2PI)


def mixture_log_prob(z: Tensor, centers: Tensor, log_weights: Tensor) -> Tensor:
    r"""Log-density of a mixture of unit Gaussians, in nats.

    .. math:: \log\sum_k w_k\,\mathcal N(z;\mu_k, I)

    Args:
        z: Latents, (..., N, D).
        centers: (..., K, D).
        log_weights: Normalised log weights, (..., K).
    Returns:
        Log-density, (..., N).
    Source: paper Eq. 13.
    """
    # Distances do not depend on the origin, but rounding does: seen from among the centres the two large
    # numbers z'mu and |z|^2/2 that cancel are small. (Centres at mu_y = y + r lose 0.2 nats otherwise.)
    origin = centers.detach().mean(-2, keepdim=True)
    z, centers = z - origin, centers - origin
    logits = center_logits(z, centers) + log_weights.unsqueeze(-2)
    return torch.logsumexp(logits, dim=-1) + standard_log_prob(z)


def center_entropy(z: Tensor, centers: Tensor) -> Tensor:
    """Entropy of the softmax over centres (paper Eq. 9), in nats: (..., N, D) and (K, D) to (..., N)."""
    log_p = F.log_softmax(center_logits(z, centers), dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


class GaussianPrior(nn.Module):
    """One standard Gaussian for everything: the many-to-one prior of CFLOW and FastFlow (Eq. 3)."""

    def log_prob(self, z: Tensor, class_idx: Tensor) -> Tensor:
        """Log-density per position, (B, N, D) to (B, N); the class plays no part."""
        return standard_log_prob(z)


def _index_centers(n_classes: int, dim: int) -> Tensor:
    return torch.randn(n_classes, dim) + torch.arange(1, n_classes + 1)[:, None]


def _tiled_identity(n_classes: int, dim: int) -> Tensor:
    rows = torch.arange(dim)[None, :] % n_classes == torch.arange(n_classes)[:, None]
    return rows.float() * (5.0 / math.sqrt(2.0 * max(dim // n_classes, 1)))


_INITIAL_CENTERS: dict[str, Callable[[int, int], Tensor]] = {
    "index": _index_centers,
    "normal": torch.randn,
    "tiled_identity": _tiled_identity,
    "class_means": torch.randn,
}


class HierarchicalGaussianMixture(nn.Module):
    r"""Main centre :math:`\mu_1^y` and weight per class, offsets and weights of M centres within it.

    Args:
        n_classes: K.
        n_centers: M, centres per class (the first is the main one).
        dim: D.
        init: How the main centres start.
            "index": mu_y = y + r, r ~ N(0, I), the text of Alg. 1;
            "normal": r ~ N(0, I) alone;
            "tiled_identity": the released code's rows of a tiled identity, scaled by 5 / sqrt(2 (D // K));
            "class_means": r ~ N(0, I) until :meth:`set_centers` puts them on the classes' mean latents.
        delta_std: Standard deviation of the initial offsets.
        learn_centers: Train the main centres; False for the fixed centres of Tab. 3a (FMC).
        learn_weights: Train the class weights psi.
    Source: paper Sec. 3.3 and Alg. 1.
    """

    def __init__(
        self,
        n_classes: int,
        n_centers: int,
        dim: int,
        *,
        init: str = "index",
        delta_std: float = 1.0,
        learn_centers: bool = True,
        learn_weights: bool = True,
    ) -> None:
        super().__init__()
        self.centers = nn.Parameter(_INITIAL_CENTERS[init](n_classes, dim), requires_grad=learn_centers)
        self.deltas = nn.Parameter(delta_std * torch.randn(n_classes, n_centers - 1, dim))
        self.psi = nn.Parameter(torch.zeros(n_classes), requires_grad=learn_weights)
        self.psi_intra = nn.Parameter(torch.zeros(n_classes, n_centers))

    @property
    def n_classes(self) -> int:
        """K."""
        return self.centers.shape[0]

    @property
    def log_weights(self) -> Tensor:
        """Log class weights c_y, (K,)."""
        return F.log_softmax(self.psi, dim=-1)

    @property
    def log_weights_intra(self) -> Tensor:
        """Log weights of the centres within each class c_i^y, (K, M)."""
        return F.log_softmax(self.psi_intra, dim=-1)

    def intra_centers(self, *, detach_main: bool = True) -> Tensor:
        r"""All centres :math:`SG[\mu_1^y] + \Delta\mu_i^y`, (K, M, D), the main one first (Eq. 10)."""
        main = self.centers.detach() if detach_main else self.centers
        offsets = F.pad(self.deltas, (0, 0, 1, 0))
        return main[:, None] + offsets

    @torch.no_grad()
    def set_centers(self, centers: Tensor) -> None:
        """Put the main centres, (K, D), in place."""
        self.centers.copy_(centers)

    @torch.no_grad()
    def split(self, z: Tensor, k: int, *, seed: int = 0) -> None:
        """Put a class's offsets on the k-means clusters of its latents; the main centre stays.

        In D dimensions an offset drawn from N(0, I) lies some sqrt(D) away from every latent of its class:
        its share of a latent is about e^(-D/2), so it would never be learnt.

        Args:
            z: Latents of the class, (N, D); fewer than there are offsets leave all as it was.
            k: The class.
            seed: Of k-means.
        """
        clusters = self.deltas.shape[1]
        if not clusters or len(z) < clusters:
            return
        # Threads add up in the order they finish: one alone gives a resumed run the same bits.
        with threadpool_limits(1):
            found = KMeans(clusters, n_init=1, max_iter=30, random_state=seed).fit(z.cpu().numpy())
        self.deltas[k] = torch.from_numpy(found.cluster_centers_).to(self.deltas) - self.centers[k]

    def log_prob(self, z: Tensor, class_idx: Tensor) -> Tensor:
        """Intra-class log-likelihood under each image's own class, in nats.

        Args:
            z: Latents, (B, N, D).
            class_idx: Class of each image, (B,) int64.
        Returns:
            (B, N).
        Source: paper Sec. 3.4.
        """
        return mixture_log_prob(z, self.intra_centers()[class_idx], self.log_weights_intra[class_idx])

    def neg_entropy(self, z: Tensor) -> Tensor:
        """Negative entropy over the main centres (Sec. 3.4), in nats: (..., N, D) to (..., N)."""
        return -center_entropy(z, self.centers)

    def extra_repr(self) -> str:
        """Name the sizes, and what does not learn."""
        (n_classes, n_centers), dim = self.psi_intra.shape, self.centers.shape[1]
        fixed = [name for name in ("centers", "psi") if not getattr(self, name).requires_grad]
        sizes = f"classes={n_classes}, centers={n_centers} each, dim={dim}"
        return sizes + "".join(f", {name} fixed" for name in fixed)
