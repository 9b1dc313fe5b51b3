"""The losses: against direct formulas in float64, their limits, extreme magnitudes, and memory."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import prior_with_covariances, reference_log_prob, reference_with_covariances
from torch import Tensor

from hgadlib.config import FlowConfig, LossConfig, PriorConfig
from hgadlib.losses import (
    entropy_loss,
    full_mixture_nll,
    gaussian_nll,
    hgad_losses,
    inter_class_nll,
    intra_class_nll,
    log_sigmoid_nll,
    mutual_information_loss,
)
from hgadlib.mixture import GaussianPrior, HierarchicalGaussianMixture
from hgadlib.model import HGAD

K, M, D, B, N = 4, 3, 6, 5, 7


@dataclasses.dataclass(frozen=True)
class Case:
    """Random inputs, and a prior with nothing at its initial value."""

    z: Tensor
    log_det: Tensor
    class_idx: Tensor
    prior: HierarchicalGaussianMixture


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(K, M, D)
    with torch.no_grad():
        prior.psi.normal_()
        prior.psi_intra.normal_()
    z = prior.centers.detach()[torch.randint(K, (B, N))] + torch.randn(B, N, D)
    return Case(z.requires_grad_(), torch.randn(B, N), torch.randint(K, (B,)), prior)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_eq_3(case: Case) -> None:
    direct = D / 2 * math.log(2 * math.pi) + 0.5 * (case.z.double() ** 2).sum(-1) - case.log_det
    close(gaussian_nll(case.z, case.log_det), direct)


def test_eq_6(case: Case) -> None:
    prior = case.prior
    direct = -reference_log_prob(case.z, prior.centers, prior.psi.softmax(0)) - case.log_det
    close(inter_class_nll(case.z, case.log_det, prior.centers, prior.log_weights), direct)


@pytest.mark.parametrize("smoothing", [0.0, 0.02, 1.0])
def test_eq_8_is_eq_7(case: Case, smoothing: float) -> None:
    # Eq. 7: log p(y) p(z|y) / sum p(y') p(z|y') - log p(y), by densities, averaged over smoothed labels.
    prior, z = case.prior, case.z.double()
    weights = prior.psi.double().softmax(0)
    joint = weights * (-0.5 * (z[:, :, None] - prior.centers.double()).square().sum(-1)).exp()
    information = (joint / joint.sum(-1, keepdim=True)).log() - weights.log()
    label = torch.nn.functional.one_hot(case.class_idx, K)[:, None] * (1 - smoothing) + smoothing / K
    loss = mutual_information_loss(
        case.z, case.class_idx, prior.centers, prior.log_weights, label_smoothing=smoothing
    )
    close(loss, -(label * information).sum(-1))


def test_eq_8_is_bounded_only_for_weights_that_fit_the_data(case: Case) -> None:
    # Its -c_y is a cross-entropy: a class that the weights deny but the data hold pays without limit.
    centers = 1e3 * torch.eye(K, D)
    z, class_idx = centers[:, None], torch.arange(K)
    uniform = mutual_information_loss(z, class_idx, centers, torch.full((K,), -math.log(K)))
    close(uniform, torch.full((K, 1), -math.log(K)))
    denied = torch.log_softmax(torch.tensor([0.0, -200.0, -200.0, -200.0]), 0)
    assert mutual_information_loss(z, class_idx, centers, denied).mean() < -100


def test_eq_9(case: Case) -> None:
    squared = (case.z.double()[:, :, None] - case.prior.centers.double()).square().sum(-1)
    p = (-0.5 * squared).softmax(-1)
    close(entropy_loss(case.z, case.prior.centers), -(p * p.log()).sum(-1))


def test_entropy_bounds() -> None:
    centers = 50 * torch.eye(K, D)
    close(entropy_loss(torch.zeros(1, 1, D), centers), torch.full((1, 1), math.log(K)))
    assert entropy_loss(centers[:, None], centers).abs().max() == 0
    loss = entropy_loss(1e4 * torch.randn(B, N, D), torch.randn(K, D))
    assert loss.min() >= 0
    assert loss.max() <= math.log(K)


def test_eq_10(case: Case) -> None:
    prior = case.prior
    loss = intra_class_nll(
        case.z, case.log_det, case.class_idx, prior.intra_centers(), prior.log_weights_intra
    )
    for image, k in enumerate(case.class_idx.tolist()):
        centers = torch.cat([prior.centers[k][None], prior.centers[k] + prior.deltas[k]])
        direct = (
            -reference_log_prob(case.z[image], centers, prior.psi_intra[k].softmax(0)) - case.log_det[image]
        )
        close(loss[image], direct)


def test_eq_10_leaves_the_main_centres_alone(case: Case) -> None:
    prior = case.prior
    arguments = case.z, case.log_det, case.class_idx
    intra_class_nll(*arguments, prior.intra_centers(), prior.log_weights_intra).sum().backward()
    assert prior.centers.grad is None or prior.centers.grad.abs().max() == 0
    present = case.class_idx.unique()
    for parameter in (prior.deltas, prior.psi_intra):
        assert parameter.grad is not None
        assert (parameter.grad[present].flatten(1).abs().amax(1) > 0).all()
        absent = [k for k in range(K) if k not in present]
        assert parameter.grad[absent].abs().sum() == 0
    # the centres' gradient exists as soon as they are not detached
    intra_class_nll(
        *arguments, prior.intra_centers(detach_main=False), prior.log_weights_intra
    ).sum().backward()
    assert prior.centers.grad is not None
    assert prior.centers.grad.abs().max() > 0


def test_eq_18(case: Case) -> None:
    prior = case.prior
    centers = prior.intra_centers(detach_main=False)
    weights = (prior.psi.softmax(0)[:, None] * prior.psi_intra.softmax(1)).flatten()
    direct = -reference_log_prob(case.z, centers.flatten(0, 1), weights) - case.log_det
    loss = full_mixture_nll(case.z, case.log_det, prior.log_weights, centers, prior.log_weights_intra)
    close(loss, direct)


def test_one_class_and_one_centre_is_eq_3(case: Case) -> None:
    prior = HierarchicalGaussianMixture(1, 1, D)
    centred = gaussian_nll(case.z - prior.centers[0], case.log_det)
    zeros = torch.zeros_like(case.class_idx)
    close(inter_class_nll(case.z, case.log_det, prior.centers, prior.log_weights), centred)
    close(
        intra_class_nll(case.z, case.log_det, zeros, prior.intra_centers(), prior.log_weights_intra), centred
    )
    close(
        full_mixture_nll(
            case.z, case.log_det, prior.log_weights, prior.intra_centers(), prior.log_weights_intra
        ),
        centred,
    )
    prior.set_centers(torch.zeros(1, D))
    terms = hgad_losses(case.z, case.log_det, zeros, prior, intra=True)
    close(terms["nll"], gaussian_nll(case.z, case.log_det).mean())
    close(terms["intra"], terms["nll"])
    assert terms["mi"] == terms["entropy"] == 0


def test_no_offsets_is_one_centre(case: Case) -> None:
    prior = case.prior
    with torch.no_grad():
        prior.deltas.zero_()
    loss = intra_class_nll(
        case.z, case.log_det, case.class_idx, prior.intra_centers(), prior.log_weights_intra
    )
    close(loss, gaussian_nll(case.z - prior.centers[case.class_idx][:, None], case.log_det))


def test_log_sigmoid() -> None:
    nll = torch.tensor([-1e5, -3.0, 0.0, 3.0, 1e5])
    expected = [0.0, math.log1p(math.exp(-0.5)), math.log(2), math.log1p(math.exp(0.5)), 1e5 / 6]
    close(log_sigmoid_nll(nll, 6), torch.tensor(expected))


def test_total_is_the_weighted_sum(case: Case) -> None:
    weights = {"lambda1": 2.0, "lambda2": 3.0, "lambda_e": 5.0, "lambda_in": 7.0, "lambda_z": 11.0}
    terms = hgad_losses(case.z, case.log_det, case.class_idx, case.prior, intra=True, **weights)  # type: ignore[arg-type]
    names = ("nll", "mi", "entropy", "intra", "log_sigmoid")
    close(terms["total"], sum(w * terms[n] for w, n in zip(weights.values(), names, strict=True)))  # type: ignore[arg-type]
    prior, arguments = case.prior, (case.z, case.log_det)
    close(terms["nll"], inter_class_nll(*arguments, prior.centers, prior.log_weights).mean())
    per_dimension = hgad_losses(
        *arguments, case.class_idx, prior, intra=True, lambda_z=1.0, per_dimension=True
    )
    for name in ("nll", "intra"):
        close(per_dimension[name] * D, terms[name])
    for name in ("mi", "entropy", "log_sigmoid"):
        close(per_dimension[name], terms[name])


def test_switches(case: Case) -> None:
    def names(prior: HierarchicalGaussianMixture | GaussianPrior, **switches: float | bool) -> set[str]:
        options = {"intra": True, **switches}
        return set(hgad_losses(case.z, case.log_det, case.class_idx, prior, **options)) - {"total"}  # type: ignore[arg-type]

    assert names(case.prior) == {"nll", "mi", "entropy", "intra"}
    assert names(case.prior, intra=False) == {"nll", "mi", "entropy"}
    assert names(case.prior, lambda2=0.0, lambda_e=0.0, lambda_in=0.0) == {"nll"}
    assert names(case.prior, extended=True) == {"nll", "mi", "entropy"}
    assert names(GaussianPrior()) == {"nll"}
    # the first stage has one centre a class, so there Eq. 18 is Eq. 6
    arguments = case.z, case.log_det, case.class_idx, case.prior
    plain = hgad_losses(*arguments, intra=False)
    assert plain["total"] == hgad_losses(*arguments, intra=False, extended=True)["total"]


def test_class_weights_are_detached_from_eq_8_alone(case: Case) -> None:
    def gradient(**switches: float | bool) -> Tensor:
        terms = hgad_losses(case.z, case.log_det, case.class_idx, case.prior, intra=False, **switches)  # type: ignore[arg-type]
        found = torch.autograd.grad(terms["total"], case.prior.psi, allow_unused=True)[0]
        return torch.zeros(K) if found is None else found

    assert gradient(lambda1=0.0, detach_class_weights=True).abs().max() == 0
    assert gradient(lambda1=0.0).abs().max() > 0
    close(gradient(detach_class_weights=True), gradient(lambda2=0.0))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_extreme_features_give_finite_losses_and_gradients(scale: float, precision: torch.dtype) -> None:
    # The last step of the first stage, then the first of the second: where the published code turned to NaN.
    torch.manual_seed(0)
    model = HGAD(
        [f"class{k}" for k in range(40)], [576], [(2, 2)],
        flow=FlowConfig(layers=2, position_dim=16, hidden_ratio=0.1, subnet_init="default"),
        prior=PriorConfig(covariance="identity", n_centers=20),
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-4)
    features = [scale * torch.randn(4, 4, 576).relu()]
    weights = dataclasses.asdict(LossConfig(lambda2=1.0, lambda_z=1.0))
    for intra in (False, True, True):
        (terms,) = model.losses(
            features, torch.tensor([0, 1, 20, 39]), intra=intra, precision=precision, **weights
        )
        assert ("intra" in terms) == intra
        optimiser.zero_grad()
        terms["total"].backward()
        for name, value in terms.items():
            assert value.isfinite(), name
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        optimiser.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("extended", [False, True])
def test_covariances_of_i_give_the_paper_s_losses(case: Case, extended: bool) -> None:
    # Eq. 6, 8, 9 and 10, or 18, and their gradients.
    weights = {"intra": True, "extended": extended, "lambda_z": 1.0, "label_smoothing": 0.02}
    other = HierarchicalGaussianMixture(K, M, D, covariance="class").double()
    plain, arguments = case.prior.double(), (case.log_det.double(), case.class_idx)
    other.load_state_dict(plain.state_dict(), strict=False)
    found = []
    for prior in (plain, other):
        z = case.z.detach().double().requires_grad_()
        terms = hgad_losses(z, *arguments, prior, **weights)  # type: ignore[arg-type]
        terms["total"].backward()
        found.append((terms, [z.grad, *(p.grad for p in prior.parameters())]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("covariance", ["class", "learnt"])
@pytest.mark.parametrize(("n_classes", "n_centers"), [(4, 3), (1, 3), (4, 1), (1, 1)])
def test_losses_with_covariances(n_classes: int, n_centers: int, covariance: str) -> None:
    torch.manual_seed(0)
    prior, sigma = prior_with_covariances(n_classes, n_centers, D, covariance)
    z, log_det = torch.randn(B, N, D).double(), torch.randn(B, N).double()
    class_idx, weights = torch.randint(n_classes, (B,)), prior.psi.softmax(0)
    direct = reference_with_covariances(z, prior.centers, weights, sigma)
    terms = hgad_losses(z, log_det, class_idx, prior, intra=True)
    close(terms["nll"], -(direct + log_det).mean())
    each = [torch.distributions.MultivariateNormal(c, s) for c, s in zip(prior.centers, sigma, strict=True)]
    log_p = torch.stack([own.log_prob(z) for own in each], -1)
    p, own = log_p.softmax(-1), class_idx[:, None, None].expand(-1, N, 1)
    information = log_p - (log_p + weights.log()).logsumexp(-1, keepdim=True)
    close(terms["mi"], -information.gather(-1, own).mean())
    close(terms["entropy"], -torch.special.xlogy(p, p).sum(-1).mean())
    every = prior.intra_centers()
    intra = [
        reference_with_covariances(rows, every[k], prior.psi_intra[k].softmax(0), sigma[k])
        for rows, k in zip(z, class_idx.tolist(), strict=True)
    ]
    close(terms["intra"], -(torch.stack(intra) + log_det).mean())
    of_all = (weights[:, None] * prior.psi_intra.softmax(1)).flatten()
    spread = sigma.repeat_interleave(n_centers, 0)
    direct = reference_with_covariances(z, every.flatten(0, 1), of_all, spread)
    terms = hgad_losses(z, log_det, class_idx, prior, intra=True, extended=True)
    close(terms["nll"], -(direct + log_det).mean())


@pytest.mark.parametrize("covariance", ["class", "learnt"])
def test_eq_10_with_covariances_leaves_the_main_centres_alone(covariance: str) -> None:
    torch.manual_seed(0)
    prior, _ = prior_with_covariances(K, M, D, covariance)
    z, class_idx = torch.randn(B, N, D).double(), torch.randint(K, (B,))
    arguments = z, torch.zeros(B, N), class_idx, prior.intra_centers(), prior.log_weights_intra
    intra_class_nll(*arguments, prior.whitening()).sum().backward()
    assert prior.centers.grad is None or prior.centers.grad.abs().max() == 0
    assert prior.deltas.grad is not None
    assert prior.deltas.grad[class_idx].abs().max() > 0


MEMORY = """
import torch
from hgadlib.losses import intra_class_nll
from hgadlib.mixture import HierarchicalGaussianMixture

prior = HierarchicalGaussianMixture(40, 10, 200)
class_idx = torch.arange(64) % 40
log_det = torch.zeros(64, 1024)

def kilobytes(name):  # resource.getrusage would count the parent's memory too
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

def step(z):
    loss = intra_class_nll(
        z, log_det[:, : z.shape[1]], class_idx, prior.intra_centers(), prior.log_weights_intra
    )
    loss.mean().backward()

step(torch.randn(64, 2, 200, requires_grad=True))  # what libraries allocate once is not the loss's
z = torch.randn(64, 1024, 200, requires_grad=True)
before = kilobytes('VmRSS')
step(z)
print(kilobytes('VmHWM') - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads its memory from /proc (Linux)")
def test_intra_class_loss_is_lean() -> None:
    # 65,536 positions of 200 channels, forwards and backwards. One (N, M, D) tensor alone were 524 MB.
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=root, capture_output=True, text=True, check=True
    )
    added_mb = int(done.stdout) * 1024 / 1e6
    assert 50 < added_mb < 300  # no less than the gradient of z
