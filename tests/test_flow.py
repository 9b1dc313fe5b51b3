"""The flow: against FrEIA's AllInOneBlock, autograd's Jacobian, and its own inverse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from hgadlib.errors import InputError
from hgadlib.flow import (
    FeatureFlow,
    FixedAffine,
    Moments,
    PositionalCoupling,
    positional_encoding_2d,
    random_rotation,
)


def randomise(flow: nn.Module, seed: int = 0) -> None:
    """Move every parameter off its initial value, where mistakes in gains and offsets hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter.dtype))


def double_flow(
    channels: int,
    layers: int,
    kind: str = "positional",
    position_dim: int = 8,
    *,
    hidden: int = 7,
    normalise: bool = False,
    **more: Any,
) -> FeatureFlow:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # so that rotations are orthogonal to its last digit
    try:
        flow = FeatureFlow(
            channels, (2, 3), kind=kind, layers=layers, position_dim=position_dim, hidden=hidden,
            normalise=normalise, **more,
        )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    randomise(flow)
    return flow


def test_matches_all_in_one_block() -> None:
    torch.manual_seed(0)
    channels, position_dim, grid = 9, 8, (3, 4)
    freia = SequenceINN(channels)
    for _ in range(3):
        freia.append(
            AllInOneBlock,
            cond=0,
            cond_shape=(position_dim,),
            subnet_constructor=lambda i, o: nn.Sequential(
                nn.Linear(i, 2 * i), nn.ReLU(), nn.Linear(2 * i, o)
            ),
            affine_clamping=1.9,
            global_affine_type="SOFTPLUS",
            permute_soft=True,
        )
    with torch.no_grad():
        for name, parameter in freia.named_parameters():
            if "w_perm" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    ours = FeatureFlow(channels, grid, layers=3, position_dim=position_dim)
    ours.inn.load_state_dict(freia.state_dict())
    x = torch.randn(2, 12, channels)
    code = positional_encoding_2d(position_dim, *grid).flatten(1).T.repeat(2, 1)
    z_expected, log_det_expected = freia(x.view(-1, channels), c=[code])
    z, log_det = ours(x)
    torch.testing.assert_close(z.view(-1, channels), z_expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det.flatten(), log_det_expected, rtol=1e-5, atol=1e-5)
    # and the other way round: FrEIA reads our state, all but the inverse rotation that we do not store
    missing, unexpected = freia.load_state_dict(ours.inn.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("w_perm_inv") for name in missing)


@pytest.mark.parametrize("channels", [2, 3, 4, 7])
@pytest.mark.parametrize("layers", [1, 2, 5, 12])
def test_log_det_is_the_jacobian_and_the_flow_inverts(channels: int, layers: int) -> None:
    flow = double_flow(channels, layers)
    x = torch.randn(2, 6, channels, dtype=torch.float64)
    z, log_det = flow(x)
    back, inverse_log_det = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-8, atol=1e-8)

    def at_position(value: Tensor) -> Tensor:
        changed = x.clone()
        changed[1, 4] = value
        return flow(changed)[0][1, 4]

    jacobian = torch.autograd.functional.jacobian(at_position, x[1, 4])
    expected = torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(log_det[1, 4], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("channels", [3, 4])
def test_convolutional_flow(channels: int) -> None:
    flow = double_flow(channels, 4, kind="convolutional")
    x = torch.randn(1, 6, channels, dtype=torch.float64)
    z, log_det = flow(x)
    torch.testing.assert_close(flow.inverse(z)[0], x, rtol=1e-8, atol=1e-8)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v.view_as(x))[0].flatten(), x.flatten())
    torch.testing.assert_close(log_det.sum(), torch.linalg.slogdet(jacobian)[1], rtol=1e-8, atol=1e-8)


def outputs_and_gradients(flow: FeatureFlow, x: Tensor, *, fused: bool) -> list[Tensor]:
    """All that a training step takes from a flow, and what it says without gradients."""
    x = x.clone().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        return flow(x) if fused else flow.inn(x, c=[flow.positions])

    z, log_det = run()
    loss = (z.sin() * torch.linspace(-1, 1, z.numel()).view_as(z)).sum() + log_det.square().sum()
    gradients = torch.autograd.grad(loss, [x, *(p for p in flow.parameters() if p.requires_grad)])
    with torch.no_grad():
        return [z, log_det, *gradients, *run()]


SETTINGS: list[dict[str, Any]] = [
    {}, {"coupling": "additive"}, {"keep": 0.6}, {"subnet_init": "zero"}, {"dropout": 0.5},
    {"coupling": "additive", "keep": 0.4, "subnet_init": "zero", "dropout": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("position_dim", [0, 8])
@pytest.mark.parametrize("more", SETTINGS, ids=str)
def test_the_fused_chain_is_the_plain_one(position_dim: int, normalise: bool, more: dict[str, Any]) -> None:
    flow = double_flow(5, 2, position_dim=position_dim, normalise=normalise, **more).eval()
    if flow.normaliser is not None:
        flow.normaliser.fit(torch.arange(5.0), torch.eye(5) + 0.3, whiten=True)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    both = (outputs_and_gradients(flow, x, fused=fused) for fused in (True, False))
    for ours, expected in zip(*both, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


# A processor takes some 640 thousand numbers of the hidden layer at a time: here 16 images, 1 image, all 40.
@pytest.mark.parametrize("hidden", [6600, 200_000, 7])
@pytest.mark.parametrize("position_dim", [8, 0])
@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_parts_of_a_batch_change_nothing(hidden: int, position_dim: int, coupling: str) -> None:
    flow = double_flow(4, 1, position_dim=position_dim, hidden=hidden, coupling=coupling)
    x = torch.randn(2 if hidden > 100_000 else 40, 6, 4, dtype=torch.float64)
    both = (outputs_and_gradients(flow, x, fused=fused) for fused in (True, False))
    for ours, expected in zip(*both, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["positional", "convolutional"])
@pytest.mark.parametrize("channels", [2, 5])
def test_additive_couplings_move_and_do_not_scale(kind: str, channels: int) -> None:
    flow = double_flow(channels, 3, kind=kind, coupling="additive")
    x = 5 * torch.randn(2, 6, channels, dtype=torch.float64)
    z, log_det = flow(x)
    gains = torch.stack([block.gain.log().sum() for block in flow.inn]).sum()
    torch.testing.assert_close(log_det, gains.expand(2, 6))
    assert gains != 0
    back, inverse_log_det = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, -log_det)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v.view_as(x))[0].flatten(), x.flatten())
    torch.testing.assert_close(log_det.sum(), torch.linalg.slogdet(jacobian)[1])
    # It is a flow, not an affine map.
    assert not torch.allclose(flow(2 * x)[0] - z, z - flow(0 * x)[0], rtol=1e-3, atol=1e-3)


def test_gradients_of_an_additive_flow_are_the_numerical_ones() -> None:
    flow = double_flow(5, 2, coupling="additive", position_dim=4, hidden=3)
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*flow.named_parameters(), strict=True)

    def output(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = torch.func.functional_call(flow, dict(zip(names, values)), x)  # noqa: B905
        return found

    assert torch.autograd.gradcheck(output, (x, *parameters))


@pytest.mark.parametrize("kind", ["positional", "convolutional"])
def test_a_flow_without_blocks_is_its_fixed_map(kind: str) -> None:
    x = torch.randn(2, 6, 5)
    flow = FeatureFlow(5, (2, 3), kind=kind, layers=0, position_dim=4)
    z, log_det = flow(x)
    assert z.equal(x) and log_det.equal(torch.zeros(2, 6)) and not list(flow.parameters())
    assert [each.shape for each in flow.inverse(z)] == [x.shape, (2, 6)]
    flow = FeatureFlow(5, (2, 3), kind=kind, layers=0, position_dim=4, normalise=True)
    assert flow.normaliser is not None
    flow.normaliser.fit(torch.arange(5.0), torch.diag(torch.arange(1.0, 6)), whiten=False)
    (expected,), constant = flow.normaliser((x,))
    z, log_det = flow(x)
    assert z.equal(expected) and log_det.equal(constant.expand(2, 6)) and constant < 0


@pytest.mark.parametrize("kind", ["positional", "convolutional"])
@pytest.mark.parametrize("coupling", ["affine", "additive"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_subnets_that_start_at_zero_start_as_a_rotation(kind: str, coupling: str, keep: float) -> None:
    torch.manual_seed(0)
    flow = FeatureFlow(
        8, (2, 3), kind=kind, layers=3, position_dim=4, normalise=True, subnet_init="zero", coupling=coupling,
        keep=keep,
    )  # fmt: skip
    assert flow.normaliser is not None
    root = torch.randn(8, 8)
    flow.normaliser.fit(torch.arange(8.0), root @ root.T, whiten=True)
    x = 10 * torch.randn(2, 6, 8)
    (white,), constant = flow.normaliser((x,))
    z, log_det = flow(x)
    first, second, third = (block.w_perm for block in flow.inn[1:])
    rotation = third @ second @ first
    torch.testing.assert_close(z, white @ rotation.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_det, constant.expand(2, 6), rtol=1e-5, atol=1e-5)
    # The first step already moves the last layers.
    z.pow(4).sum().backward()  # type: ignore[no-untyped-call, unused-ignore]
    last = flow.inn[1].subnet[-1].weight
    assert last.grad is not None and last.grad.abs().max() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("position_dim", [0, 8])
def test_rows_of_a_grid_are_mapped_as_in_the_whole(position_dim: int, dropout: float) -> None:
    flow = FeatureFlow(6, (5, 3), layers=3, position_dim=position_dim, dropout=dropout, normalise=True)
    flow.double().eval()
    x, rows = torch.randn(2, 15, 6, dtype=torch.float64), torch.tensor([0, 3, 4])
    if dropout:  # the plain path, without dropping
        flow.train()
        for layer in flow.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
    z, log_det = flow(x)
    of_rows, log_det_of_rows = flow(x.unflatten(1, (5, 3))[:, rows].flatten(1, 2), rows=rows)
    torch.testing.assert_close(of_rows, z.unflatten(1, (5, 3))[:, rows].flatten(1, 2))
    torch.testing.assert_close(log_det_of_rows, log_det.unflatten(1, (5, 3))[:, rows].flatten(1, 2))


def test_dropout_is_of_training_alone() -> None:
    for kind in ("positional", "convolutional"):
        flow, x = double_flow(6, 2, kind=kind, dropout=0.5), torch.randn(2, 6, 6, dtype=torch.float64)
        plain = double_flow(6, 2, kind=kind)
        assert list(plain.state_dict()) == list(flow.state_dict())
        plain.load_state_dict(flow.state_dict())
        expected = plain.train()(x)[0]
        assert flow.eval()(x)[0].equal(expected)
        one, other = flow.train()(x)[0], flow(x)[0]
        assert not one.equal(other) and not one.equal(expected)
        # The jacobian is that of the map with these values dropped.
        torch.manual_seed(3)
        z, log_det = flow(x)
        torch.manual_seed(3)
        again, of_plain = flow.inn(x, c=[flow.positions])
        assert z.equal(again) and log_det.equal(of_plain)


@pytest.mark.parametrize("normalise", [False, True])
def test_noise_is_in_units_of_each_channel_behind_the_fixed_map(normalise: bool) -> None:
    torch.manual_seed(0)
    flow = FeatureFlow(2, (50, 50), layers=0, normalise=normalise)
    root = torch.tensor([[1.0, 0.0], [90.0, 10.0]])
    x = torch.randn(4, 2500, 2) @ root.T
    if flow.normaliser is not None:
        flow.normaliser.fit(torch.zeros(2), root @ root.T, whiten=True, shrinkage=0.0)
    z, log_det = flow(x)
    noisy, same = flow(x, noise=0.2)
    noise = (noisy - z).flatten(0, 1)
    torch.testing.assert_close(noise.std(0), 0.2 * z.std((0, 1)), rtol=0.03, atol=0)
    assert abs(torch.corrcoef(noise.T)[0, 1]) < 0.03 and same.equal(log_det)
    assert flow(x)[0].equal(z)


@pytest.mark.parametrize("kind", ["positional", "convolutional"])
@pytest.mark.parametrize(("coupling", "keep"), [("affine", 1.0), ("additive", 0.5)])
@pytest.mark.parametrize("variance", [0.3, 1e-4])
def test_noise_on_a_feature_makes_the_latents_covariance_of_the_jacobian(
    kind: str, coupling: str, keep: float, variance: float
) -> None:
    torch.manual_seed(0)
    flow = FeatureFlow(
        20, (2, 3), kind=kind, layers=3, position_dim=8, normalise=True, keep=keep, coupling=coupling,
        subnet_init="zero",
    ).double()  # fmt: skip
    assert flow.normaliser is not None
    root = torch.randn(20, 20, dtype=torch.float64)
    flow.normaliser.fit(root[0], root @ root.T, whiten=True, shrinkage=0.1)
    for block in flow.inn[1:]:  # linear whatever these are
        with torch.no_grad():
            block.global_scale.add_(torch.randn_like(block.global_scale))
            block.global_offset.add_(torch.randn_like(block.global_offset))
    at = torch.randn(20, dtype=torch.float64)

    def latent(x: Tensor) -> Tensor:
        return flow(torch.cat([x[None], at.expand(5, -1)])[None])[0][0, 0]

    jacobian = torch.autograd.functional.jacobian(latent, at)  # (D, 20)
    found = flow.noise_covariance(at, variance)
    assert found.shape == (round(keep * 20),) * 2 and found.dtype == torch.float64
    torch.testing.assert_close(found, variance * jacobian @ jacobian.T, rtol=1e-6, atol=1e-6 * variance)


@pytest.mark.parametrize("kind", ["positional", "convolutional"])
@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_every_parameter_has_a_gradient(kind: str, coupling: str) -> None:
    flow = double_flow(6, 3, kind=kind, coupling=coupling)
    z, log_det = flow(torch.randn(2, 6, 6, dtype=torch.float64))
    (z.square().sum() - log_det.sum()).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_bfloat16_subnets_stay_close() -> None:
    torch.manual_seed(0)
    flow = FeatureFlow(32, (4, 4), layers=4, position_dim=16)
    randomise(flow)
    x = torch.randn(2, 16, 32)
    z, log_det = flow(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_half, log_det_half = flow(x)
    assert z_half.dtype == log_det_half.dtype == torch.float32
    assert (z_half - z).abs().max() < 0.05 * z.abs().max()
    assert (log_det_half - log_det).abs().max() < 0.05 * log_det.abs().max()
    assert not torch.equal(z_half, z)  # the subnets did run in the lower precision


def test_rotation_is_special_orthogonal_and_its_generator_s() -> None:
    first, again = (random_rotation(64, torch.Generator().manual_seed(1)).double() for _ in range(2))
    torch.testing.assert_close(first @ first.T, torch.eye(64).double(), rtol=0, atol=1e-5)
    assert all(torch.linalg.slogdet(random_rotation(dim).double()).sign == 1 for dim in range(2, 12))
    assert first.equal(again)


def test_whitening_normaliser() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    affine = FixedAffine([(6,)]).double()
    affine.fit(x.mean(0), torch.cov(x.T), whiten=True, shrinkage=0.0)
    (z,), log_det = affine((x[None],))
    torch.testing.assert_close(torch.cov(z[0].T), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(affine.weight)[1])
    torch.testing.assert_close(affine((z,), rev=True)[0][0][0], x)


def test_kept_directions_are_the_last_principal_axes() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 7)) @ rng.normal(size=(7, 7)) + 3
    mean, covariance = x.mean(0), np.cov(x.T)
    flow = FeatureFlow(7, (20, 20), layers=0, normalise=True, keep=0.45).double()
    normaliser = flow.normaliser
    assert normaliser is not None
    normaliser.fit(torch.from_numpy(mean), torch.from_numpy(covariance), whiten=True, shrinkage=0.0)
    z, log_det = flow(torch.from_numpy(x)[None])
    # By the singular values: the last three of seven directions, each to a variance of 1.
    _, singular, axes = np.linalg.svd(x - mean)
    expected = (x - mean) @ axes[-3:].T / (singular[-3:] / np.sqrt(399))
    signs = np.sign((expected[:, ::-1] * z[0].numpy()).sum(0))
    np.testing.assert_allclose(z[0].numpy() * signs, expected[:, ::-1], rtol=1e-5, atol=1e-5)
    # With a standard normal prior the density is that of the projection.
    standard = -0.5 * (z.square().sum(-1) + 3 * np.log(2 * np.pi)) + log_det
    projected = multivariate_normal(axes[-3:] @ mean, axes[-3:] @ covariance @ axes[-3:].T)
    np.testing.assert_allclose(standard[0].numpy(), projected.logpdf(x @ axes[-3:].T), rtol=1e-5)
    with pytest.raises(
        InputError, match=r"all 7 directions to invert, found one that keeps 3; set flow\.keep"
    ):
        flow.inverse(z)


@pytest.mark.parametrize(("keep", "dim"), [(1.0, 9), (0.5, 4), (0.01, 2), (0.99, 9)])
def test_how_many_directions_are_kept(keep: float, dim: int) -> None:
    flow = FeatureFlow(9, (1, 3), layers=2, position_dim=4, normalise=True, keep=keep)
    z, log_det = flow(torch.randn(4, 3, 9))
    assert z.shape == (4, 3, dim) and log_det.shape == (4, 3)
    whole = FeatureFlow(9, (1, 3), layers=2, position_dim=4, normalise=True)
    inverse = {"inn.module_list.0.inverse_weight"}
    assert whole.state_dict().keys() - flow.state_dict().keys() == (inverse if dim < 9 else set())


def test_moments_come_batch_by_batch() -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, 3) @ torch.randn(3, 3) + 1000  # far from the origin, where squares lose digits
    moments = Moments(3)
    for part in rows.split(7):
        moments.add(part)
    torch.testing.assert_close(moments.mean, rows.double().mean(0))
    torch.testing.assert_close(moments.covariance, torch.cov(rows.double().T), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected at least one batch"):
        _ = Moments(3).mean


@pytest.mark.parametrize("dim", [0, 6, -4])
def test_position_dim_must_be_a_multiple_of_four(dim: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        positional_encoding_2d(dim, 2, 2)


def test_one_channel_cannot_be_coupled() -> None:
    with pytest.raises(ValueError, match="at least 2 channels"):
        PositionalCoupling([(1,)])
