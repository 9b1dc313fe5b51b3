r"""The hierarchical Gaussian mixture prior: class centres, centres within a class, and their weights.

Distances are never formed as an (N, M, D) tensor. For unit covariances

.. math:: -\tfrac12\|z-\mu_k\|^2 =
          \underbrace{z^\top\mu_k - \tfrac12\|\mu_k\|^2}_{\text{logit}} - \tfrac12\|z\|^2,

so a matrix product gives all logits, and the term that all centres share drops out of every softmax
exactly, whatever its magnitude.

Covariances of classes (Eq. 5) come in by a whitening factor of each, :math:`\Sigma_y^{-1} = W_y^\top W_y`:

.. math:: \log\mathcal N(z;\mu, \Sigma_y) = \log\mathcal N(W_y z; W_y\mu, I) + \log|\det W_y|.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOG_2PI = math.log(2.0 * math.pi)
# Share of an image's positions that may belong to no class; see class_evidence.
_OUTLIERS = 0.1
_POSITIONS_OF_EVIDENCE = 64
_MANY_CLUSTERS = 64
# Latents for each cluster, at least: no measured run has fewer than 7.5 (demo: 30 images, 16 x 16 positions).
_LEAST_OF_A_CLUSTER = 7
# A learnt covariance stays within this factor of the first one's deviations, but for its low rank.
_LARGEST_LOG_SCALE = 2.0


class Whitening(NamedTuple):
    """Factors W with inverse covariance W'W: ``factor``, (..., D, D), and ``log_det`` of each, (...)."""

    factor: Tensor
    log_det: Tensor

    def of(self, class_idx: Tensor | int) -> Whitening:
        """Take the factors of classes, (...,) int64, along the first axis."""
        return Whitening(self.factor[class_idx], self.log_det[class_idx])


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


class Mixtures(NamedTuple):
    """Mixtures of Gaussians, (...), as their densities are computed: in coordinates where covariances are I.

    Made by :func:`mixtures`. ``origin``, (..., 1, D), of the coordinates; ``centers``, (..., M, D), in them;
    ``log_weights``, (..., M); ``whitening`` of the covariance that a mixture's centres share, None for I.
    """

    origin: Tensor
    centers: Tensor
    log_weights: Tensor
    whitening: Whitening | None

    def of(self, index: Tensor | int) -> Mixtures:
        """Take some of them, (...) int64, or one along the first axis."""
        whitening = None if self.whitening is None else self.whitening.of(index)
        return Mixtures(self.origin[index], self.centers[index], self.log_weights[index], whitening)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of latents, (..., N, D) to (..., N), in nats."""
        z = z - self.origin
        if self.whitening is not None:
            with torch.autocast(z.device.type, enabled=False):
                z = z @ self.whitening.factor.mT
        logits = center_logits(z, self.centers) + self.log_weights.unsqueeze(-2)
        log_prob = torch.logsumexp(logits, dim=-1) + standard_log_prob(z)
        return log_prob if self.whitening is None else log_prob + self.whitening.log_det.unsqueeze(-1)


def mixtures(centers: Tensor, log_weights: Tensor, whitening: Whitening | None = None) -> Mixtures:
    """Prepare mixtures of Gaussians for their densities.

    Args:
        centers: (..., M, D).
        log_weights: Normalised log weights, (..., M).
        whitening: Of the covariance that the centres of a mixture share, (..., D, D); None for I.
    """
    # Distances do not depend on the origin, but rounding does: seen from among the centres the two large
    # numbers z'mu and |z|^2/2 that cancel are small. (Centres at mu_y = y + r lose 0.2 nats otherwise.)
    origin = centers.detach().mean(-2, keepdim=True)
    centers = centers - origin
    if whitening is not None:
        with torch.autocast(centers.device.type, enabled=False):
            centers = centers @ whitening.factor.mT
    return Mixtures(origin, centers, log_weights, whitening)


def mixture_log_prob(
    z: Tensor, centers: Tensor, log_weights: Tensor, whitening: Whitening | None = None
) -> Tensor:
    r"""Log-density of a mixture of Gaussians of one covariance, in nats.

    .. math:: \log\sum_k w_k\,\mathcal N(z;\mu_k, \Sigma)

    Args:
        z: Latents, (..., N, D).
        centers: (..., M, D).
        log_weights: Normalised log weights, (..., M).
        whitening: Of the covariance that these centres share, (..., D, D); None for I.
    Returns:
        Log-density, (..., N).
    Source: paper Eq. 13.
    """
    return mixtures(centers, log_weights, whitening).log_prob(z)


def own_class_log_prob(z: Tensor, class_idx: Tensor, of_class: Callable[[Tensor], Mixtures]) -> Tensor:
    """Log-density of images under the mixture of their own class, in nats.

    A class at a time: to whiten M centres is as much work as M positions, so a class's images share them.

    Args:
        z: Latents, (B, N, D).
        class_idx: Class of each image, (B,) int64.
        of_class: The mixture of a class, by its index, () int64, or of each of some, (1,).
    Returns:
        (B, N).
    Source: paper Sec. 3.4.
    """
    if len(class_idx) == 1:  # no look at its value, which tensors without numbers do not have
        return of_class(class_idx).of(0).log_prob(z[0])[None]
    images, found = [], []
    for k in class_idx.unique():
        own = (class_idx == k).nonzero()[:, 0]
        images.append(own)
        found.append(of_class(k).log_prob(z[own].flatten(0, 1)).unflatten(0, (len(own), z.shape[1])))
    return torch.cat(found)[torch.cat(images).argsort()]


def class_log_probs(z: Tensor, centers: Tensor, log_weights_intra: Tensor, whitening: Whitening) -> Tensor:
    r"""Log-density under each class's own mixture, each with its own covariance, in nats.

    .. math:: \log p(z|y) = \log\sum_i p_i(y)\,\mathcal N(z;\mu_i^y, \Sigma_y)

    Args:
        z: Latents, (..., N, D).
        centers: (K, M, D).
        log_weights_intra: Normalised log weights within each class, (K, M).
        whitening: Of the classes' covariances, (K, D, D).
    Returns:
        (..., N, K).
    Source: paper Eq. 5 (M = 1) and Sec. 3.4.
    """
    # A class at a time, and once more for its gradients: K tensors of the size of z would not fit.
    classes = [
        checkpoint(
            mixture_log_prob, z, *own, Whitening(*factor), use_reentrant=False, preserve_rng_state=False
        )
        for *own, factor in zip(centers, log_weights_intra, zip(*whitening, strict=True), strict=True)
    ]
    return torch.stack(classes, dim=-1)


def class_evidence(log_probs: Tensor) -> Tensor:
    r"""Evidence for each class from an image's positions, a share of which belongs to no class: in nats.

    .. math:: \sum_n \log\Bigl((1-\epsilon)\operatorname{softmax}_y(\log p(z_n|y)) + \frac{\epsilon}{K}\Bigr),
              \qquad \epsilon = 0.1

    A defect is thousands of nats unlike its own class and less unlike a broader one; the plain sum would let
    a few such positions decide. Here each counts for log(K / epsilon) at most.

    Args:
        log_probs: Log-densities of positions under each class, (B, N, K).
    Returns:
        (B, K) float64.
    """
    share = _OUTLIERS / log_probs.shape[-1]
    return ((1 - _OUTLIERS) * F.softmax(log_probs, dim=-1).double() + share).log().sum(1)


def evidence_positions(grid: tuple[int, int]) -> Tensor:
    """Positions that say which class an image is of: all, or 64 and more spread over a larger grid.

    Neighbouring positions say the same: of sampled test images of demo, elpv and five industrial classes a
    fourth and a sixteenth of the positions named the same class as all of them, but for 1 % of elpv's two
    kinds of solar cells.

    Args:
        grid: (H, W).
    Returns:
        (P,) int64, into the H * W positions row by row.
    """
    height, width = grid
    step = max(1, math.isqrt(height * width // _POSITIONS_OF_EVIDENCE))
    rows, columns = (torch.arange(step // 2, length, step) for length in (height, width))
    return (rows[:, None] * width + columns).flatten()


def softmax_entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax over the last axis, in nats: (..., K) to (...)."""
    log_p = F.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def center_entropy(z: Tensor, centers: Tensor) -> Tensor:
    """Entropy of the softmax over centres (paper Eq. 9), in nats: (..., N, D) and (K, D) to (..., N)."""
    return softmax_entropy(center_logits(z, centers))


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
        covariance: Sigma_y of Eq. 5. "identity" is I, as published. "class" is what :meth:`set_covariance`
            is told, I until then, by a whitening factor L_y. "learnt" goes on from there: its factor is
            M_y L_y, with M_y = diag(exp s_y) + U_y U_y', positive definite whatever s and U are.
        rank: Columns of U_y.
    Source: paper Sec. 3.3 and Alg. 1; Eq. 5 for the covariances.
    """

    factor: Tensor
    factor_log_det: Tensor

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
        covariance: str = "identity",
        rank: int = 8,
    ) -> None:
        super().__init__()
        self.covariance = covariance
        self._prepared: tuple[list[tuple[int, int]], list[Tensor], Mixtures] | None = None
        self.centers = nn.Parameter(_INITIAL_CENTERS[init](n_classes, dim), requires_grad=learn_centers)
        self.deltas = nn.Parameter(delta_std * torch.randn(n_classes, n_centers - 1, dim))
        self.psi = nn.Parameter(torch.zeros(n_classes), requires_grad=learn_weights)
        self.psi_intra = nn.Parameter(torch.zeros(n_classes, n_centers))
        if covariance != "identity":
            self.register_buffer("factor", torch.eye(dim).repeat(n_classes, 1, 1))
            self.register_buffer("factor_log_det", torch.zeros(n_classes))
        if covariance == "learnt":
            self.log_scale = nn.Parameter(torch.zeros(n_classes, dim))
            # Not 0, where the gradient of U U' vanishes.
            self.low_rank = nn.Parameter(1e-2 / math.sqrt(dim) * torch.randn(n_classes, dim, rank))

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

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation, and forget what was prepared for densities."""
        self._prepared = None  # fused optimisers change parameters without telling
        return super().train(mode)

    def mixtures(self) -> Mixtures:
        """Mixtures of all classes, (K,), the main centres detached; prepared once where nothing is learnt."""
        tensors = [*self.parameters(), *self.buffers()]
        if torch.is_grad_enabled() or self.training or any(x.is_inference() for x in tensors):
            return mixtures(self.intra_centers(), self.log_weights_intra, self.whitening())
        # A tensor that was changed in place has another version (but by a fused optimiser, see `train`),
        # another tensor another address: the ones seen last are kept, so that no new one takes theirs.
        seen = [(x.data_ptr(), x._version) for x in tensors]
        if self._prepared is None or self._prepared[0] != seen:
            made = mixtures(self.intra_centers(), self.log_weights_intra, self.whitening())
            self._prepared = seen, [x.detach() for x in tensors], made
        return self._prepared[2]

    def whitening(self) -> Whitening | None:
        r"""Factors of all classes' covariances, (K, D, D); None where all are I.

        .. math:: W_y = M_y L_y,\quad
                  \log|\det M_y| = \textstyle\sum s_y
                  + \log\det(I + U_y^\top \operatorname{diag}(e^{-s_y})\, U_y)
        """
        if self.covariance == "identity":
            return None
        if self.covariance == "class":
            return Whitening(self.factor, self.factor_log_det)
        with torch.autocast(self.factor.device.type, enabled=False):
            s = _LARGEST_LOG_SCALE * torch.tanh(self.log_scale / _LARGEST_LOG_SCALE)
            u, scale = self.low_rank, s.exp()[..., None]
            factor = scale * self.factor + u @ (u.mT @ self.factor)
            root = torch.linalg.cholesky(torch.eye(u.shape[-1]).to(u) + u.mT @ (u / scale))
            log_det = s.sum(-1) + 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return Whitening(factor, log_det + self.factor_log_det)

    @torch.no_grad()
    def set_covariance(self, k: int, covariance: Tensor, floor: float = 1e-6) -> None:
        """Take a class's covariance as that of the prior.

        Args:
            k: The class.
            covariance: (D, D). All 0, as of a single latent, says nothing and leaves I.
            floor: Variance added to every direction, as a share of the mean variance.
        """
        variance, axes = torch.linalg.eigh(covariance.double().cpu())
        deviation = (variance.clamp_min(0) + floor * variance.mean()).sqrt()
        if deviation.min() > 0:
            # Rows are the principal axes: there a learnt diagonal rescales the principal variances.
            self.factor[k] = (axes / deviation).T
            self.factor_log_det[k] = -deviation.log().sum()

    @torch.no_grad()
    def set_centers(self, centers: Tensor) -> None:
        """Put the main centres, (K, D), in place."""
        self.centers.copy_(centers)

    @torch.no_grad()
    def with_class(self, k: int) -> HierarchicalGaussianMixture:
        """Return a copy that has one class more, with index k: those from k on move up by one.

        Until it is told otherwise, all centres of the new class lie in the origin, its covariance is I, and
        its weight is the mean of the others'.
        """
        made = copy.deepcopy(self)
        for name, own in [*made.named_parameters(), *made.named_buffers()]:
            new = torch.zeros_like(own[:1])
            if name == "psi":
                new = own.mean(0, keepdim=True)
            elif name == "factor":
                new = torch.eye(own.shape[1]).to(own)[None]
            own.data = torch.cat([own[:k], new, own[k:]])
        return made

    @torch.no_grad()
    def split(self, z: Tensor, k: int, *, seed: int = 0) -> None:
        """Put a class's offsets on the k-means clusters of its latents; the main centre stays.

        In D dimensions an offset drawn from N(0, I) lies some sqrt(D) away from every latent of its class:
        its share of a latent is about e^(-D/2), so it would never be learnt. Where the class has a
        covariance, the clusters are those of its whitened latents.

        Args:
            z: Latents of the class, (N, D). So few that a cluster for each offset had less than 7 make
                fewer clusters, which share the offsets.
            k: The class.
            seed: Of k-means.
        """
        clusters = min(self.deltas.shape[1], max(len(z) // _LEAST_OF_A_CLUSTER, 1))
        if not self.deltas.shape[1] or not len(z):
            return
        main, whitening = self.centers[k], self.whitening()
        if whitening is not None:
            main, z = torch.zeros_like(main), (z.to(main) - main) @ whitening.factor[k].T
        # Of many clusters, the search for good places to start takes longer than all else and gains nothing;
        # nor do more than ten rounds: drawn defects are found as well (0.898 beside 0.897 on the screw).
        start, rounds = ("k-means++", 30) if clusters < _MANY_CLUSTERS else ("random", 10)
        # Threads add up in the order they finish: one alone gives a resumed run the same bits.
        with threadpool_limits(1):
            k_means = KMeans(clusters, init=start, n_init=1, max_iter=rounds, random_state=seed)
            found = k_means.fit(z.cpu().numpy())
        offsets = torch.from_numpy(found.cluster_centers_).to(self.deltas) - main
        if whitening is not None:
            offsets = torch.linalg.solve(whitening.factor[k].double().cpu(), offsets.double().cpu().T).T
        self.deltas[k] = offsets[torch.arange(self.deltas.shape[1]) % clusters]

    def log_prob(self, z: Tensor, class_idx: Tensor) -> Tensor:
        """Intra-class log-likelihood under each image's own class, in nats.

        Args:
            z: Latents, (B, N, D).
            class_idx: Class of each image, (B,) int64.
        Returns:
            (B, N).
        Source: paper Sec. 3.4.
        """
        return own_class_log_prob(z, class_idx, self.mixtures().of)

    def class_log_probs(self, z: Tensor, *, intra: bool = False) -> Tensor | None:
        r"""Log-density under each class, (..., N, D) to (..., N, K), in nats; None where all Sigma_y are I.

        Of its main centre alone, :math:`\log\mathcal N(z;\mu_1^y, \Sigma_y)` (Eq. 5), or with intra of all
        its centres (Eq. 18).
        """
        whitening = self.whitening()
        if whitening is None:
            return None
        if intra:
            centers, log_weights = self.intra_centers(detach_main=False), self.log_weights_intra
        else:
            centers, log_weights = self.centers[:, None], torch.zeros_like(self.psi)[:, None]
        return class_log_probs(z, centers, log_weights, whitening)

    def log_prob_by_class(self, z: Tensor) -> Tensor:
        """Log-density under all centres of each class, in nats: (B, N, D) to (B, N, K)."""
        found = self.mixtures()
        return torch.stack([found.of(k).log_prob(z) for k in range(self.n_classes)], -1)

    def neg_entropy(self, z: Tensor) -> Tensor:
        """Negative entropy over the main centres (Sec. 3.4), in nats: (..., N, D) to (..., N)."""
        logits = self.class_log_probs(z)
        return -center_entropy(z, self.centers) if logits is None else -softmax_entropy(logits)

    def extra_repr(self) -> str:
        """Name the sizes, and what does not learn."""
        (n_classes, n_centers), dim = self.psi_intra.shape, self.centers.shape[1]
        fixed = [name for name in ("centers", "psi") if not getattr(self, name).requires_grad]
        sizes = f"classes={n_classes}, centers={n_centers} each, dim={dim}"
        if self.covariance != "identity":
            sizes += f", covariance={self.covariance}"
        return sizes + "".join(f", {name} fixed" for name in fixed)
