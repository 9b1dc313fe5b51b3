r"""The paper's losses: one pure function per equation, unreduced, in nats; then their weighted sum.

Shapes: latents z (B, N, D), log-determinants (B, N), one class per image (B,). Every density carries
its :math:`\tfrac d2\log 2\pi`; the paper prints Eq. 10 without, which changes no gradient.

The paper's equations have I for all covariances. With those of Eq. 5, :math:`-\tfrac12\|z-\mu_y\|^2` reads
:math:`\log\mathcal N(z;\mu_y, \Sigma_y)` everywhere, which functions take as ``class_log_probs``: it costs a
product of z with a matrix for each class, once for all losses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hgadlib.mixture import (
    GaussianPrior,
    HierarchicalGaussianMixture,
    Mixtures,
    Whitening,
    center_entropy,
    center_logits,
    mixture_log_prob,
    mixtures,
    own_class_log_prob,
    softmax_entropy,
    standard_log_prob,
)


def gaussian_nll(z: Tensor, log_det: Tensor) -> Tensor:
    r"""Negative log-likelihood under the single Gaussian prior.

    .. math:: \tfrac d2\log 2\pi + \tfrac12\|z\|^2 - \log|\det J|

    Args:
        z: Latents, (..., D).
        log_det: Log |det dz/dx|, (...).
    Returns:
        Loss per position, (...).
    Source: paper Eq. 3.
    """
    return -(standard_log_prob(z) + log_det)


def inter_class_nll(
    z: Tensor, log_det: Tensor, centers: Tensor, log_weights: Tensor, class_log_probs: Tensor | None = None
) -> Tensor:
    r"""Negative log-likelihood under the inter-class Gaussian mixture.

    .. math:: -\log\sum_y \exp(-\tfrac12\|z-\mu_y\|^2 + c_y) - \log|\det J| + \tfrac d2\log 2\pi

    Args:
        z: Latents, (..., N, D).
        log_det: Log |det dz/dx|, (..., N).
        centers: Main class centres, (K, D).
        log_weights: Normalised log class weights c_y, (K,).
        class_log_probs: Log-density under each class where covariances are not I, (..., N, K).
    Returns:
        Loss per position, (..., N).
    Source: paper Eq. 6.
    """
    if class_log_probs is not None:
        return -(torch.logsumexp(class_log_probs + log_weights, dim=-1) + log_det)
    return -(mixture_log_prob(z, centers, log_weights) + log_det)


def mutual_information_loss(
    z: Tensor,
    class_idx: Tensor,
    centers: Tensor,
    log_weights: Tensor,
    class_log_probs: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Negative mutual information between class and latent; its minimum pushes the classes apart.

    .. math:: -\bigl[\operatorname{logsoftmax}_y(-\tfrac12\|z-\mu_{y'}\|^2 + c_{y'}) - c_y\bigr]

    Args:
        z: Latents, (B, N, D).
        class_idx: Class of each image, (B,) int64.
        centers: Main class centres, (K, D).
        log_weights: Normalised log class weights, (K,).
        class_log_probs: Log-density under each class where covariances are not I, (B, N, K).
        label_smoothing: Share of the label spread evenly over all classes (0 in the paper, 0.02 released).
    Returns:
        Loss per position, (B, N).
    Source: paper Eq. 8.
    """
    logits = center_logits(z, centers) if class_log_probs is None else class_log_probs
    log_posterior = F.log_softmax(logits + log_weights, dim=-1)
    gain = log_posterior - log_weights
    own = gain.gather(-1, class_idx[:, None, None].expand(-1, z.shape[1], 1)).squeeze(-1)
    return -((1 - label_smoothing) * own + label_smoothing * gain.mean(-1))


def entropy_loss(z: Tensor, centers: Tensor, class_log_probs: Tensor | None = None) -> Tensor:
    r"""Entropy of the softmax over the main centres.

    .. math:: -\sum_y p_y\log p_y,\quad p = \operatorname{softmax}(-\tfrac12\|z-\mu_{y'}\|^2)

    Args:
        z: Latents, (..., N, D).
        centers: Main class centres, (K, D).
        class_log_probs: Log-density under each class where covariances are not I, (..., N, K).
    Returns:
        Loss per position, (..., N), between 0 and log K.
    Source: paper Eq. 9.
    """
    return center_entropy(z, centers) if class_log_probs is None else softmax_entropy(class_log_probs)


def intra_class_nll(
    z: Tensor,
    log_det: Tensor,
    class_idx: Tensor,
    intra_centers: Tensor,
    log_weights_intra: Tensor,
    whitening: Whitening | None = None,
) -> Tensor:
    r"""Negative log-likelihood under the mixture within each image's own class.

    .. math:: -\log\sum_i \exp(-\tfrac12\|z-(SG[\mu_1^y]+\Delta\mu_i^y)\|^2 + c_i^y) - \log|\det J|
              + \tfrac d2\log 2\pi

    Only the centres of the known class are met: the largest tensor beside z is (B, N, M).

    Args:
        z: Latents, (B, N, D).
        log_det: Log |det dz/dx|, (B, N).
        class_idx: Class of each image, (B,) int64.
        intra_centers: Centres with the main one detached, (K, M, D).
        log_weights_intra: Normalised log weights within each class, (K, M).
        whitening: Of the classes' covariances, (K, D, D); None for I.
    Returns:
        Loss per position, (B, N).
    Source: paper Eq. 10 (the constant added, see the module's text).
    """

    def of_class(k: Tensor) -> Mixtures:
        own = None if whitening is None else whitening.of(k)
        return mixtures(intra_centers[k], log_weights_intra[k], own)

    return -(own_class_log_prob(z, class_idx, of_class) + log_det)


def full_mixture_nll(
    z: Tensor, log_det: Tensor, log_weights: Tensor, intra_centers: Tensor, log_weights_intra: Tensor
) -> Tensor:
    r"""Negative log-likelihood under all centres of all classes at once.

    .. math:: -\log\sum_y p(y)\sum_i \exp(-\tfrac12\|z-\mu_i^y\|^2 + c_i^y - \tfrac d2\log 2\pi)
              - \log|\det J|

    Args:
        z: Latents, (..., N, D).
        log_det: Log |det dz/dx|, (..., N).
        log_weights: Log class weights, (K,).
        intra_centers: (K, M, D), the main centres not detached.
        log_weights_intra: (K, M).
    Returns:
        Loss per position, (..., N).
    Source: paper Eq. 18.
    """
    weights = log_weights[:, None] + log_weights_intra
    return -(mixture_log_prob(z, intra_centers.flatten(0, 1), weights.flatten()) + log_det)


def log_sigmoid_nll(nll: Tensor, dim: int) -> Tensor:
    r"""The released code's L_z: :math:`-\log\sigma(\log p / D)`; it saturates for likely positions.

    Args:
        nll: A negative log-likelihood, any shape.
        dim: D.
    Source: published code; not in the paper's text.
    """
    return -F.logsigmoid(-nll / dim)


def hgad_losses(
    z: Tensor,
    log_det: Tensor,
    class_idx: Tensor,
    prior: HierarchicalGaussianMixture | GaussianPrior,
    *,
    intra: bool,
    lambda1: float = 1.0,
    lambda2: float = 100.0,
    lambda_e: float = 1.0,
    lambda_in: float = 1.0,
    lambda_z: float = 0.0,
    per_dimension: bool = False,
    label_smoothing: float = 0.0,
    detach_class_weights: bool = False,
    extended: bool = False,
) -> dict[str, Tensor]:
    r"""Mean of every term over positions, and their weighted sum.

    .. math:: \mathcal L = \lambda_1\mathcal L_g + \lambda_2\mathcal L_{mi} + \lambda_e\mathcal L_e
              + \lambda_{in}\mathcal L_{in} + \lambda_z\mathcal L_z

    Args:
        z: Latents, (B, N, D).
        log_det: Log |det dz/dx|, (B, N).
        class_idx: Class of each image, (B,) int64.
        prior: The mixture, or the single Gaussian (then only L_m of Eq. 3 is there).
        intra: Second stage: add the intra-class terms.
        lambda1: Weight of Eq. 6.
        lambda2: Weight of Eq. 8.
        lambda_e: Weight of Eq. 9 (0 leaves it out).
        lambda_in: Weight of Eq. 10.
        lambda_z: Weight of the released code's L_z.
        per_dimension: Divide the likelihood terms by D in the sum, as the released code does.
        label_smoothing: See :func:`mutual_information_loss`.
        detach_class_weights: Keep L_mi from moving the class weights, as the released code does.
        extended: Optimise Eq. 18 in place of Eq. 6 and 10 (what the paper warns of).
    Returns:
        "total" and one scalar per term: "nll" (the likelihood term that is trained), "mi", "entropy",
        "intra", "log_sigmoid"; terms are in nats per position, likelihoods per dimension where asked for.
    Source: paper Eq. 11.
    """
    scale = 1.0 / z.shape[-1] if per_dimension else 1.0
    if isinstance(prior, GaussianPrior):
        nll = scale * gaussian_nll(z, log_det).mean()
        return {"total": nll, "nll": nll}
    log_weights, log_weights_intra = prior.log_weights, prior.log_weights_intra
    terms: dict[str, tuple[float, Tensor]] = {}
    of_classes = prior.class_log_probs(z)
    if extended and intra and of_classes is not None:
        # Eq. 18 is Eq. 6 of classes that are mixtures themselves.
        every = prior.class_log_probs(z, intra=True)
        nll = inter_class_nll(z, log_det, prior.centers, log_weights, every)
    elif extended and intra:
        centers = prior.intra_centers(detach_main=False)
        nll = full_mixture_nll(z, log_det, log_weights, centers, log_weights_intra)
    else:
        nll = inter_class_nll(z, log_det, prior.centers, log_weights, of_classes)
    terms["nll"] = lambda1, scale * nll
    if lambda2:
        mi_weights = log_weights.detach() if detach_class_weights else log_weights
        mi = mutual_information_loss(
            z, class_idx, prior.centers, mi_weights, of_classes, label_smoothing=label_smoothing
        )
        terms["mi"] = lambda2, mi
    if lambda_e:
        terms["entropy"] = lambda_e, entropy_loss(z, prior.centers, of_classes)
    if intra and not extended and (lambda_in or lambda_z):
        intra_centers, whitening = prior.intra_centers(), prior.whitening()
        nll = intra_class_nll(z, log_det, class_idx, intra_centers, log_weights_intra, whitening)
        if lambda_in:
            terms["intra"] = lambda_in, scale * nll
        if lambda_z:
            terms["log_sigmoid"] = lambda_z, log_sigmoid_nll(nll, z.shape[-1])
    means = {name: value.mean() for name, (_, value) in terms.items()}
    total = torch.stack([weight * means[name] for name, (weight, _) in terms.items()]).sum()
    return {"total": total, **means}
