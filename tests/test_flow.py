"""The flow: against FrEIA's AllInOneBlock, autograd's Jacobian, and its own inverse."""

from __future__ import annotations

import time

import pytest
import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from torch import Tensor, nn

from hgadlib.fast import coupling as fused_coupling
from hgadlib.flow import (
    FeatureFlow,
    FixedAffine,
    PositionalCoupling,
    _AffineCoupling,
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


def double_flow(channels: int, layers: int, kind: str = "positional", position_dim: int = 8) -> FeatureFlow:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # so that rotations are orthogonal to its last digit
    try:
        flow = FeatureFlow(channels, (2, 3), kind=kind, layers=layers, position_dim=position_dim, hidden=7)
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


@pytest.mark.parametrize("position_dim", [0, 8])
def test_fused_gradients_are_autograd_s(position_dim: int) -> None:
    flow = double_flow(5, 2, position_dim=position_dim)
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    condition = [] if flow.positions is None else [flow.positions]

    def gradients(fused: bool) -> list[Tensor]:
        y, log_det = x, torch.zeros(())
        for block in flow.inn:
            forward = block.forward if fused else super(PositionalCoupling, block).forward
            (y,), part = forward((y,), condition)
            log_det = log_det + part
        loss = (y.sin() * torch.arange(y.numel()).view_as(y)).sum() + (log_det**2).sum()
        return list(torch.autograd.grad(loss, [x, *flow.parameters()]))

    for ours, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


# Of 7 hidden numbers a row: parts of 1 and of 4 positions (the last is shorter), of two images, of all.
@pytest.mark.parametrize("rows", [1, 4, 13, 100])
@pytest.mark.parametrize("position_dim", [8, 0])
def test_parts_of_a_batch_change_nothing(
    rows: int, position_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = double_flow(6, 2, position_dim=position_dim)
    x = torch.randn(5, 6, 6, dtype=torch.float64)

    def run(numbers: int) -> list[Tensor]:
        monkeypatch.setattr(fused_coupling, "_CACHED_NUMBERS", numbers)
        own = x.clone().requires_grad_()
        z, log_det = flow(own)
        loss = (z.square().sum(-1) - log_det).sin().sum()
        gradients = torch.autograd.grad(loss, [own, *(p for p in flow.parameters() if p.requires_grad)])
        with torch.no_grad():
            return [z, log_det, *gradients, *flow(x)]

    parts, _ = fused_coupling._cut(x, 7, x.dtype)
    assert len(parts) == 1, "the reference is in one part"
    expected = run(10**9)
    found = run(7 * rows)
    assert len(fused_coupling._cut(x, 7, x.dtype)[0]) == {1: 30, 4: 10, 13: 3, 100: 1}[rows]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


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


def test_rotation_is_special_orthogonal_and_quick() -> None:
    started = time.perf_counter()
    rotation = random_rotation(576, torch.Generator().manual_seed(1)).double()
    seconds = time.perf_counter() - started
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(576).double(), rtol=0, atol=1e-5)
    assert torch.linalg.slogdet(rotation).sign == 1
    assert torch.equal(random_rotation(8, torch.Generator().manual_seed(1)), random_rotation(8, torch.Generator().manual_seed(1)))  # fmt: skip # noqa: E501
    assert seconds < 60  # FrEIA's takes minutes; the margin is for a busy machine


def test_whitening_normaliser() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    affine = FixedAffine([(6,)]).double()
    affine.fit(x.mean(0), torch.cov(x.T), whiten=True, floor=0.0)
    (z,), log_det = affine((x[None],))
    torch.testing.assert_close(torch.cov(z[0].T), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(affine.weight)[1])
    torch.testing.assert_close(affine((z,), rev=True)[0][0][0], x)


@pytest.mark.parametrize("dim", [0, 6, -4])
def test_position_dim_must_be_a_multiple_of_four(dim: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        positional_encoding_2d(dim, 2, 2)


def test_one_channel_cannot_be_coupled() -> None:
    with pytest.raises(ValueError, match="at least 2 channels"):
        _AffineCoupling([(1,)], 1.9)
