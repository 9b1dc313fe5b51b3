"""The flow: against FrEIA's AllInOneBlock, autograd's Jacobian, and its own inverse."""

from __future__ import annotations

import pytest
import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from torch import Tensor, nn

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
) -> FeatureFlow:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # so that rotations are orthogonal to its last digit
    try:
        flow = FeatureFlow(
            channels, (2, 3), kind=kind, layers=layers, position_dim=position_dim, hidden=hidden,
            normalise=normalise,
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


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("position_dim", [0, 8])
def test_the_fused_chain_is_the_plain_one(position_dim: int, normalise: bool) -> None:
    flow = double_flow(5, 2, position_dim=position_dim, normalise=normalise)
    if flow.normaliser is not None:
        flow.normaliser.fit(torch.arange(5.0), torch.eye(5) + 0.3, whiten=True)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    both = (outputs_and_gradients(flow, x, fused=fused) for fused in (True, False))
    for ours, expected in zip(*both, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


# A processor takes some 640 thousand numbers of the hidden layer at a time: here 16 images, 1 image, all 40.
@pytest.mark.parametrize("hidden", [6600, 200_000, 7])
@pytest.mark.parametrize("position_dim", [8, 0])
def test_parts_of_a_batch_change_nothing(hidden: int, position_dim: int) -> None:
    flow = double_flow(4, 1, position_dim=position_dim, hidden=hidden)
    x = torch.randn(2 if hidden > 100_000 else 40, 6, 4, dtype=torch.float64)
    both = (outputs_and_gradients(flow, x, fused=fused) for fused in (True, False))
    for ours, expected in zip(*both, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["positional", "convolutional"])
def test_every_parameter_has_a_gradient(kind: str) -> None:
    flow = double_flow(6, 3, kind=kind)
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
    affine.fit(x.mean(0), torch.cov(x.T), whiten=True, floor=0.0)
    (z,), log_det = affine((x[None],))
    torch.testing.assert_close(torch.cov(z[0].T), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(affine.weight)[1])
    torch.testing.assert_close(affine((z,), rev=True)[0][0][0], x)


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
