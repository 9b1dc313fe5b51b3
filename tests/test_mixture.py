"""The mixture prior: against torch.distributions in float64, its limits, its rounding, its initial states."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from small import covariances, prior_with_covariances, reference_log_prob, reference_with_covariances
from torch import Tensor
from torch.distributions import Independent, Normal

from hgadlib.mixture import (
    GaussianPrior,
    HierarchicalGaussianMixture,
    center_logits,
    evidence_positions,
    mixture_log_prob,
    standard_log_prob,
)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 10.0])
def test_mixture_is_the_distribution(scale: float) -> None:
    torch.manual_seed(0)
    z, centers = scale * torch.randn(50, 7), scale * torch.randn(5, 7)
    weights = torch.softmax(torch.randn(5), 0)
    torch.testing.assert_close(
        mixture_log_prob(z, centers, weights.log()).double(),
        reference_log_prob(z, centers, weights),
        rtol=1e-5,
        atol=1e-4,
    )


def test_standard_gaussian_is_the_distribution() -> None:
    torch.manual_seed(0)
    z = torch.randn(20, 9)
    expected = Independent(Normal(torch.zeros(9), torch.ones(9)), 1).log_prob(z)
    torch.testing.assert_close(standard_log_prob(z), expected)
    torch.testing.assert_close(
        GaussianPrior().log_prob(z[None], torch.zeros(1, dtype=torch.int64)), expected[None]
    )


@pytest.mark.parametrize("init", ["index", "tiled_identity"])
def test_far_centres_keep_their_digits(init: str) -> None:
    # Forty classes at mu_y = y + r lie 1000 away from the origin; float32 alone would lose 0.2 nats.
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(40, 10, 576, init=init)
    class_idx = torch.tensor([0, 19, 39])
    z = prior.centers.detach()[class_idx, None] + torch.randn(3, 50, 576)
    single = prior.log_prob(z, class_idx)
    double = prior.double().log_prob(z.double(), class_idx)
    assert (single - double).abs().max() < 1e-3


def test_one_centre_is_one_gaussian() -> None:
    torch.manual_seed(0)
    z, center = torch.randn(4, 30, 6), torch.randn(1, 6)
    torch.testing.assert_close(mixture_log_prob(z, center, torch.zeros(1)), standard_log_prob(z - center))


@pytest.mark.parametrize("n_classes", [1, 2, 40])
def test_weights_sum_to_one(n_classes: int) -> None:
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(n_classes, 6, 5)
    torch.testing.assert_close(prior.log_weights.exp(), torch.full((n_classes,), 1 / n_classes))
    torch.testing.assert_close(prior.log_weights_intra.exp(), torch.full((n_classes, 6), 1 / 6))
    with torch.no_grad():
        prior.psi.copy_(50 * torch.randn(n_classes))
        prior.psi_intra.copy_(50 * torch.randn(n_classes, 6))
    torch.testing.assert_close(prior.log_weights.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(prior.log_weights_intra.exp().sum(-1), torch.ones(n_classes))


@pytest.mark.parametrize("n_classes", [1, 3, 40])
def test_entropy_lies_between_0_and_log_k(n_classes: int) -> None:
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(n_classes, 2, 8, init="normal")
    for scale in (0.0, 1e-3, 1.0, 1e4):
        entropy = -prior.neg_entropy(scale * torch.randn(2, 50, 8))
        assert entropy.min() >= 0
        assert entropy.max() <= math.log(n_classes) + 1e-6
    # both ends are reached: at a point as far from all centres, and at a lone centre
    with torch.no_grad():
        prior.centers.copy_(
            100 * torch.eye(8).repeat(5, 1)[:n_classes] if n_classes <= 8 else prior.centers * 0
        )
    torch.testing.assert_close(-prior.neg_entropy(torch.zeros(1, 1, 8)).item(), math.log(n_classes))
    if n_classes == 3:
        assert -prior.neg_entropy(prior.centers.detach()[None]).max() == 0


def test_main_centres_start_as_named() -> None:
    torch.manual_seed(0)
    text = HierarchicalGaussianMixture(4, 3, 20_000).centers  # mu_y = y + r, y from 1 (Alg. 1)
    torch.testing.assert_close(text.mean(-1), torch.arange(1.0, 5.0), rtol=0, atol=0.05)
    torch.testing.assert_close(text.std(-1), torch.ones(4), rtol=0, atol=0.05)
    for init in ("normal", "class_means"):
        normal = HierarchicalGaussianMixture(4, 3, 20_000, init=init).centers
        torch.testing.assert_close(normal.mean(-1), torch.zeros(4), rtol=0, atol=0.05)
    tiled = HierarchicalGaussianMixture(3, 1, 8, init="tiled_identity").centers
    # rows of the identity, repeated along the channels; every pair of centres is about 5 apart
    assert (tiled != 0).sum(0).tolist() == [1] * 8
    assert torch.cdist(tiled, tiled)[0, 1].item() == pytest.approx(5 * math.sqrt(6 / 4))


def test_offsets_start_about_the_main_centre() -> None:
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(4, 3, 20_000)
    torch.testing.assert_close(prior.deltas.std(), torch.tensor(1.0), rtol=0, atol=0.05)
    assert prior.deltas.shape == (4, 2, 20_000)  # the main centre's own offset is fixed at 0
    assert prior.intra_centers()[:, 0].equal(prior.centers)
    assert HierarchicalGaussianMixture(4, 3, 9, delta_std=0.0).deltas.abs().max() == 0
    assert prior.psi.abs().max() == prior.psi_intra.abs().max() == 0  # all weights equal


def test_a_split_puts_the_offsets_on_clusters() -> None:
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(2, 3, 5)
    main, other = prior.centers.detach().clone(), prior.deltas.detach()[0].clone()
    clusters = torch.tensor([[4.0], [-6.0]]).expand(2, 5)
    z = clusters.repeat(50, 1) + 0.1 * torch.randn(100, 5)
    prior.split(z, 1)
    found = prior.intra_centers().detach()[1, 1:]
    found = found[found[:, 0].argsort(descending=True)]
    torch.testing.assert_close(found, clusters, rtol=0, atol=0.1)
    assert prior.centers.equal(main)
    assert prior.deltas[0].equal(other)
    before = prior.deltas.detach().clone()
    prior.split(z[:0], 1)  # no latent
    HierarchicalGaussianMixture(2, 1, 5).split(z, 0)  # no offset
    assert prior.deltas.equal(before)


@pytest.mark.parametrize(("latents", "clusters"), [(1, 1), (13, 1), (21, 3), (400, 5)])
def test_few_latents_make_fewer_clusters(latents: int, clusters: int) -> None:
    # Where the offsets stayed as drawn, a class of few images had its latents far from nearly all centres.
    torch.manual_seed(0)
    prior, z = HierarchicalGaussianMixture(1, 6, 4), 9 + torch.randn(latents, 4)
    prior.split(z, 0)
    found = prior.intra_centers().detach()[0, 1:]
    distinct, counts = found.unique(dim=0, return_counts=True)
    assert len(distinct) == clusters and counts.max() - counts.min() <= 1
    assert (found - z.mean(0)).norm(dim=1).max() <= (z - z.mean(0)).norm(dim=1).max() + 1e-4


def test_prepared_mixtures_follow_every_change() -> None:
    torch.manual_seed(0)
    prior, other = (HierarchicalGaussianMixture(3, 4, 5, covariance="class").eval() for _ in range(2))
    z, class_idx = torch.randn(4, 6, 5), torch.tensor([2, 0, 2, 1])

    def assert_fresh(prior: HierarchicalGaussianMixture) -> Tensor:
        with torch.enable_grad():
            expected = prior.log_prob(z, class_idx).detach()
        assert prior.log_prob(z, class_idx).equal(expected)
        assert prior.mixtures() is prior.mixtures()
        return expected

    def step() -> None:
        prior.centers.grad = torch.ones_like(prior.centers)
        torch.optim.SGD([prior.centers], lr=0.1).step()

    def fused_step() -> None:  # it leaves no trace in the parameters' versions
        prior.train()
        prior.deltas.grad = torch.ones_like(prior.deltas)
        torch.optim.Adam([prior.deltas], lr=0.1, fused=True).step()
        prior.eval()

    changes: list[Callable[[], Any]] = [
        lambda: prior.deltas.add_(1), lambda: prior.set_covariance(2, 4 * torch.eye(5)), step, fused_step,
        lambda: prior.psi_intra.normal_(), lambda: prior.set_centers(torch.zeros(3, 5)),
        lambda: prior.split(torch.randn(90, 5), 0), lambda: prior.load_state_dict(other.state_dict()),
    ]  # fmt: skip
    with torch.no_grad():
        found = [assert_fresh(prior)]
        for change in changes:
            change()
            found.append(assert_fresh(prior))
        assert all(not x.equal(y) for x, y in pairwise(found))
        copied = copy.deepcopy(prior)
        copied.deltas.add_(1)
        assert not assert_fresh(copied).equal(assert_fresh(prior))
        assert assert_fresh(prior.with_class(0)).shape == (4, 6)
    with torch.inference_mode():
        assert prior.log_prob(z, class_idx).equal(found[-1])


@pytest.mark.parametrize(
    ("grid", "count"),
    [((1, 1), 1), ((7, 7), 49), ((8, 8), 64), ((16, 16), 64), ((32, 32), 64), ((9, 70), 69)],
)
def test_evidence_is_spread_over_the_grid(grid: tuple[int, int], count: int) -> None:
    found = evidence_positions(grid)
    assert len(found) == len(found.unique()) == count
    height, width = grid
    assert found.min() >= 0 and found.max() < height * width
    for axis, length in ((found // width, height), (found % width, width)):  # as far from either end
        assert abs(int(axis.min()) - (length - 1 - int(axis.max()))) <= 1


def test_fixed_centres_and_weights_do_not_learn() -> None:
    prior = HierarchicalGaussianMixture(3, 2, 4, learn_centers=False, learn_weights=False)
    learnt = {name for name, parameter in prior.named_parameters() if parameter.requires_grad}
    assert learnt == {"deltas", "psi_intra"}
    prior.set_centers(torch.ones(3, 4))
    assert prior.centers.equal(torch.ones(3, 4))


def test_autocast_leaves_densities_alone() -> None:
    torch.manual_seed(0)
    z, centers, log_weights = torch.randn(20, 64), torch.randn(5, 64), torch.zeros(5) - math.log(5)
    expected = mixture_log_prob(z, centers, log_weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixture_log_prob(z, centers, log_weights).equal(expected)


def test_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="expected centres of 4 channels, found 5"):
        center_logits(torch.zeros(1, 4), torch.zeros(2, 5))


SIZES = [(3, 4, 5), (1, 3, 4), (3, 1, 2), (1, 1, 3)]


@pytest.mark.parametrize("covariance", ["class", "learnt"])
@pytest.mark.parametrize(("n_classes", "n_centers", "dim"), SIZES)
def test_covariances_are_those_of_the_distribution(
    n_classes: int, n_centers: int, dim: int, covariance: str
) -> None:
    torch.manual_seed(0)
    prior, sigma = prior_with_covariances(n_classes, n_centers, dim, covariance)
    z, class_idx = 2 * torch.randn(4, 6, dim, dtype=torch.float64), torch.randint(n_classes, (4,))
    main, every = prior.class_log_probs(z), prior.class_log_probs(z, intra=True)
    assert main is not None
    assert every is not None
    for k in range(n_classes):
        arguments = prior.intra_centers()[k], prior.psi_intra[k].softmax(0)
        torch.testing.assert_close(every[..., k], reference_with_covariances(z, *arguments, sigma[k]))
        one = prior.centers[k, None], torch.ones(1).double()
        torch.testing.assert_close(main[..., k], reference_with_covariances(z, *one, sigma[k]))
    found = prior.log_prob(z, class_idx)
    own = class_idx[:, None, None].expand(-1, 6, 1)
    torch.testing.assert_close(found, every.gather(-1, own)[..., 0])
    posterior = main.softmax(-1)
    torch.testing.assert_close(prior.neg_entropy(z), torch.special.xlogy(posterior, posterior).sum(-1))
    # alone = in a batch
    for image, k in enumerate(class_idx):
        assert prior.log_prob(z[image, None], k[None])[0].equal(found[image])
        torch.testing.assert_close(prior.neg_entropy(z[image]), prior.neg_entropy(z)[image])


def test_a_covariance_is_floored_and_kept_by_its_factor() -> None:
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(3, 1, 4, covariance="class").double()
    low_rank = torch.zeros(4, 4).double()
    low_rank[:2, :2] = covariances(1, 2)[0]
    prior.set_covariance(1, low_rank, floor=0.1)
    prior.set_covariance(2, torch.zeros(4, 4), floor=0.1)  # of one latent
    assert prior.factor[0].equal(torch.eye(4).double())
    assert prior.factor[2].equal(torch.eye(4).double())
    sigma = torch.linalg.inv(prior.factor[1].T @ prior.factor[1])
    floor = 0.1 * low_rank.diagonal().mean() * torch.eye(4)
    torch.testing.assert_close(sigma, low_rank + floor)
    torch.testing.assert_close(prior.factor_log_det, torch.linalg.slogdet(prior.factor).logabsdet)
    assert "covariance=class" in str(prior)


@pytest.mark.parametrize("rank", [0, 1, 3, 9])
def test_a_learnt_covariance_starts_at_the_given_one_and_stays_definite(rank: int) -> None:
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(2, 1, 6, covariance="learnt", rank=rank).double()
    given = covariances(2, 6)
    for k in (0, 1):
        prior.set_covariance(k, given[k], floor=1e-6)
    for scale in (0.0, 1.0, 50.0):
        with torch.no_grad():
            prior.log_scale.copy_(scale * torch.randn(2, 6))
            prior.low_rank.copy_(prior.low_rank if scale == 0 else min(scale, 10) * torch.randn(2, 6, rank))
        whitening = prior.whitening()
        assert whitening is not None
        modulation = whitening.factor @ torch.linalg.inv(prior.factor)
        torch.testing.assert_close(modulation, modulation.mT)
        assert torch.linalg.eigvalsh(modulation).min() > math.exp(-2.01)
        torch.testing.assert_close(whitening.log_det, torch.linalg.slogdet(whitening.factor).logabsdet)
        if scale == 0:
            sigma = torch.linalg.inv(whitening.factor.mT @ whitening.factor)
            torch.testing.assert_close(sigma, given, rtol=2e-3, atol=2e-3)


class _Values(torch.nn.Module):
    """What a prior computes, as a module's forward, so that gradcheck can replace its parameters."""

    def __init__(self, prior: HierarchicalGaussianMixture) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, z: torch.Tensor, *, own: bool) -> torch.Tensor:
        if own:
            return self.prior.log_prob(z, torch.tensor([1, 0]))
        main, every = self.prior.class_log_probs(z), self.prior.class_log_probs(z, intra=True)
        assert main is not None
        assert every is not None
        return torch.stack([main, every])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("covariance", ["class", "learnt"])
def test_gradients_with_covariances(covariance: str, own: bool) -> None:
    torch.manual_seed(0)
    prior, _ = prior_with_covariances(2, 2, 3, covariance)
    if own:
        prior.centers.requires_grad_(False)  # Eq. 10 stops their gradient
    z = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    module = _Values(prior)
    names, parameters = zip(*module.named_parameters(), strict=True)
    assert ("prior.low_rank" in names) == ("prior.log_scale" in names) == (covariance == "learnt")

    def values(z: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, state, (z,), {"own": own})

    assert torch.autograd.gradcheck(values, (z, *parameters))


def test_no_class_keeps_a_copy_of_the_latents_for_its_gradients() -> None:
    prior, z = HierarchicalGaussianMixture(20, 2, 8, covariance="class"), torch.randn(4, 256, 8)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = prior.class_log_probs(z.requires_grad_(), intra=True)
    assert found is not None
    assert found.shape == (4, 256, 20)
    assert sum(kept.values()) < 3 * z.untyped_storage().nbytes()
    found.sum().backward()
    assert z.grad is not None


def test_the_low_rank_part_learns_from_the_start() -> None:
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(2, 3, 6, covariance="learnt")
    prior.log_prob(torch.randn(2, 20, 6), torch.tensor([0, 1])).sum().backward()
    for parameter in (prior.log_scale, prior.low_rank):
        assert parameter.grad is not None
        assert (parameter.grad.abs().amax((1, *range(2, parameter.ndim))) > 0).all()


def test_a_split_clusters_whitened_latents() -> None:
    # The first channel is as wide as a thousand: only among whitened latents do the other's clusters show.
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(1, 3, 2, covariance="class")
    z = torch.randn(400, 2) * torch.tensor([1000.0, 0.05]) + torch.tensor([0.0, 1.0])
    z[::2, 1] -= 2.0
    prior.set_centers(torch.full((1, 2), 7.0))
    prior.split(z, 0)
    assert prior.intra_centers()[0, 1:, 1].abs().max() < 0.9  # mixed: I sees the wide channel alone
    prior.set_covariance(0, z.T.cov(), floor=1e-12)
    prior.split(z, 0)
    found = prior.intra_centers().detach()[0, 1:]
    torch.testing.assert_close(found[:, 1].sort().values, torch.tensor([-1.0, 1.0]), rtol=0, atol=0.05)
    own = torch.stack([z[::2].mean(0), z[1::2].mean(0)])
    torch.testing.assert_close(found[found[:, 1].argsort()], own, rtol=0.05, atol=5.0)


def test_autocast_leaves_covariances_alone() -> None:
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(3, 2, 16, covariance="learnt")
    z, class_idx = torch.randn(2, 20, 16), torch.tensor([0, 2])
    expected = prior.log_prob(z, class_idx), prior.neg_entropy(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prior.log_prob(z, class_idx).equal(expected[0])
        assert prior.neg_entropy(z).equal(expected[1])
