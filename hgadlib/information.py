r"""The information-theoretic view of the losses (paper App. F), as estimators that one can run.

With noise :math:`\mathcal E\sim\mathcal N(0,\sigma^2 I)` on the features and
:math:`Z_{\mathcal E}=\varphi(X+\mathcal E)` the paper sets :math:`I(X,Z_{\mathcal E}) = A + B` (Eq. 24):

.. math:: A = \mathbb E[-\log p_Z(z_\epsilon)],\qquad B = \mathbb E[\log p(z_\epsilon\mid x)] .

The flow is a bijection, so the second density needs no expansion:
:math:`p(z_\epsilon\mid x) = \mathcal N(\epsilon; 0,\sigma^2 I)\,/\,|\det J(x+\epsilon)|`, and since
:math:`\mathbb E\|\epsilon\|^2/2\sigma^2 = d/2`,

.. math:: A + B = \mathbb E[\mathcal L_g(x+\epsilon)] - d\log\sigma - \tfrac d2\log 2\pi e
                = \mathbb E[\mathcal L_g(x)] - d\log\sigma - \tfrac d2\log 2\pi e + O(\sigma^2).

Two remarks on the text. Its last term of Eq. 27, :math:`O(\sigma^2)/2\sigma^2`, is the constant d/2 and does
not vanish. And A is the entropy of :math:`Z_{\mathcal E}` only if the prior fits the latents; otherwise it is
a cross-entropy, and A + B exceeds the mutual information by a Kullback-Leibler divergence. As
:math:`I(X,Z_{\mathcal E}) = I(X,X+\mathcal E)` for every bijection, that divergence is all that training can
change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hgadlib.losses import mutual_information_loss
from hgadlib.mixture import LOG_2PI

Flow = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Features (n, d) to latents (n, d) and log |det dz/dx| (n,)."""
LogProb = Callable[[Tensor], Tensor]
"""Latents (n, d) to the log-density of the prior, (n,)."""


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
        r"""What separates A + B from the expected loss: :math:`-d\log\sigma - \tfrac d2\log 2\pi e`."""
        return information_constants(self.dim, self.sigma)

    @property
    def gap(self) -> float:
        r"""A + B less its constants and less the expected loss: what vanishes as :math:`\sigma^2`."""
        return self.information - self.constants - self.nll


def information_constants(dim: int, sigma: float) -> float:
    r"""Negative entropy of the noise, :math:`-d\log\sigma - \tfrac d2\log 2\pi e`, in nats.

    Args:
        dim: d.
        sigma: Standard deviation of the noise.

    Source: paper Eq. 27, with its last term worked out.
    """
    return -dim * math.log(sigma) - 0.5 * dim * (LOG_2PI + 1.0)


def antithetic_noise(n: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard normal noise in pairs of opposite sign, scaled to a mean square of exactly 1.

    Odd moments and the second one then carry no sampling error, which would hide the small terms.

    Args:
        n: Rows, even.
        dim: d.
        generator: Source of randomness.

    Returns:
        (n, d) float64; row i + n/2 is the opposite of row i.

    Raises:
        ValueError: n is odd or not positive.
    """
    if n <= 0 or n % 2:
        raise ValueError(f"expected an even number of samples, found {n}; noise comes in pairs")
    half = torch.randn(n // 2, dim, generator=generator, dtype=torch.float64)
    half = half / half.square().mean().sqrt()
    return torch.cat([half, -half])


def conditional_log_prob(flow: Flow, x: Tensor, noise: Tensor, sigma: float) -> Tensor:
    r"""Log-density of noisy latents given clean features, exactly.

    .. math:: \log p(\varphi(x+\epsilon)\mid x)
              = \log\mathcal N(\epsilon; 0, \sigma^2 I) - \log|\det J(x+\epsilon)|

    Args:
        flow: The flow.
        x: Clean features, (n, d).
        noise: Of standard deviation sigma, (n, d).
        sigma: In units of the features.

    Returns:
        Nats, (n,).
    """
    return _noise_log_prob(noise, sigma) - flow(x + noise)[1]


def linearised_conditional_log_prob(flow: Flow, x: Tensor, noise: Tensor, sigma: float) -> Tensor:
    r"""The same by the paper's first-order expansion.

    .. math:: \log\mathcal N(\varphi(x+\epsilon);\, \varphi(x),\, \sigma^2 JJ^\top)

    Args:
        flow: The flow; its Jacobian J at x is taken by autograd, d passes.
        x: Clean features, (n, d).
        noise: Of standard deviation sigma, (n, d).
        sigma: In units of the features.

    Returns:
        The Gaussian's log-density at the true noisy latents, in nats, (n,).

    Source: paper Eq. 26 and 27.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        z = flow(x)[0]
        rows = [torch.autograd.grad(z[:, i].sum(), x, retain_graph=True)[0] for i in range(z.shape[1])]
    jacobian = torch.stack(rows, dim=1)
    with torch.no_grad():
        step = flow(x + noise)[0] - z
        return _noise_log_prob(torch.linalg.solve(jacobian, step), sigma) - torch.linalg.slogdet(jacobian)[1]


def _noise_log_prob(noise: Tensor, sigma: float) -> Tensor:
    dim = noise.shape[-1]
    return -0.5 * ((noise / sigma).square().sum(-1) + dim * LOG_2PI) - dim * math.log(sigma)


@torch.no_grad()
def estimate_information(
    flow: Flow,
    log_prob: LogProb,
    x: Tensor,
    sigma: float,
    *,
    linearised: bool = False,
    generator: torch.Generator | None = None,
) -> InformationEstimate:
    """Estimate I(X, Z_eps) as the paper defines it, A + B, one draw of noise and its opposite per feature.

    Args:
        flow: The flow.
        log_prob: The prior's log-density of latents.
        x: Features, (n, d), float64 for small sigma.
        sigma: Standard deviation of the noise, in units of the features, > 0.
        linearised: Take the paper's expansion for B in place of the exact density.
        generator: Source of randomness.

    Returns:
        The estimate, with the expected loss beside it.

    Raises:
        ValueError: sigma is not positive.

    Source: paper Eq. 24.
    """
    if not sigma > 0:
        raise ValueError(f"expected noise of positive standard deviation, found {sigma}")
    z, log_det = flow(x)
    nll = -(log_prob(z) + log_det).mean()
    pairs = torch.cat([x, x])
    noise = sigma * antithetic_noise(len(pairs), x.shape[1], generator).to(x)
    conditional = linearised_conditional_log_prob if linearised else conditional_log_prob
    a = -log_prob(flow(pairs + noise)[0]).mean()
    b = conditional(flow, pairs, noise, sigma).mean()
    return InformationEstimate(sigma, a.item(), b.item(), nll.item(), x.shape[1])


def nested_information(x: Tensor, sigma: float, *, generator: torch.Generator | None = None) -> float:
    r"""Estimate I(X, X + E) from samples alone, without a flow; by bijectivity it is the true I(X, Z_eps).

    .. math:: \frac1n\sum_i \log\frac{p(x_i+\epsilon_i\mid x_i)}{\frac1n\sum_j p(x_i+\epsilon_i\mid x_j)}

    Args:
        x: Features, (n, d), n even.
        sigma: Standard deviation of the noise.
        generator: Source of randomness.

    Returns:
        Nats; never above log n, so small sigma need many samples.
    """
    noisy = x + sigma * antithetic_noise(len(x), x.shape[1], generator).to(x)
    log_kernel = -0.5 * torch.cdist(noisy, x).square() / sigma**2
    log_mean = torch.logsumexp(log_kernel, dim=1) - math.log(len(x))
    return (log_kernel.diagonal() - log_mean).mean().item()


def nested_class_information(
    x: Tensor, class_idx: Tensor, sigma: float, *, generator: torch.Generator | None = None
) -> float:
    r"""Estimate I(X + E, Y) from samples alone, without a flow; by bijectivity it is the true I(Z_eps, Y).

    .. math:: \frac1n\sum_i \log\frac{\frac1{n_y}\sum_{j: y_j = y_i} p(x_i+\epsilon_i\mid x_j)}
                                  {\frac1n\sum_j p(x_i+\epsilon_i\mid x_j)}

    Args:
        x: Features, (n, d), n even.
        class_idx: Class of each, (n,).
        sigma: Standard deviation of the noise.
        generator: Source of randomness; the same seed gives the noise of :func:`nested_information`.

    Returns:
        Nats, at most the entropy of the classes up to sampling.
    """
    noisy = x + sigma * antithetic_noise(len(x), x.shape[1], generator).to(x)
    log_kernel = -0.5 * torch.cdist(noisy, x).square() / sigma**2
    same = class_idx[:, None] == class_idx[None, :]
    own = torch.logsumexp(log_kernel.masked_fill(~same, -torch.inf), 1) - same.sum(1).to(x).log()
    return (own - torch.logsumexp(log_kernel, 1) + math.log(len(x))).mean().item()


def class_information_bound(
    z: Tensor, class_idx: Tensor, centers: Tensor, log_weights: Tensor
) -> tuple[float, float]:
    r"""Evaluate :math:`-\mathcal L_{mi}` (Eq. 8) and what its class weights add to it.

    .. math:: -\mathcal L_{mi} = I(Z,Y)
              - \mathbb E_z\,\mathrm{KL}\bigl(p(y\mid z)\,\|\,q(y\mid z)\bigr)
              + \mathrm{KL}\bigl(p(y)\,\|\,\operatorname{softmax}\psi\bigr)

    with the prior's posterior q. Less the last term it is a lower bound of I(Z, Y), and equal to it where the
    prior's posterior is the true one.

    Args:
        z: Latents, (n, d).
        class_idx: (n,).
        centers: Main centres, (K, d).
        log_weights: Log class weights, (K,).

    Returns:
        Both terms, -L_mi and the last divergence, in nats.

    Source: paper Eq. 19 to 21, App. F.
    """
    gain = -mutual_information_loss(z[:, None], class_idx, centers, log_weights).mean().item()
    share = torch.bincount(class_idx, minlength=len(centers)).to(z) / len(class_idx)
    found = share > 0
    divergence = (share[found] * (share[found].log() - log_weights[found])).sum().item()
    return gain, divergence
