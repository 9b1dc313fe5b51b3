"""Convolution, padding and activation in one call: the modules' function, and the modules where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from hgadlib.fast import convolution as fused_convolution
from hgadlib.fast.convolution import FusedConvolution
from hgadlib.features.backbone import build_backbone

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN, so no fused call"
)


def pair(
    same: bool, activation: type[nn.Module], **settings: Any
) -> tuple[nn.Conv2d, nn.Module, FusedConvolution]:
    """A convolution, its activation, and the two in one."""
    torch.manual_seed(0)
    make = Conv2dSame if same else nn.Conv2d
    convolution, act = make(**settings).requires_grad_(False), activation()
    fused = FusedConvolution(convolution, act).eval().to(memory_format=torch.channels_last)
    return convolution, act, fused


@pytest.fixture
def of_modules(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often a convolution is called by its module."""
    calls: list[int] = []
    for kind in (nn.Conv2d, Conv2dSame):
        forward = kind.forward

        def counted(self: Any, x: Tensor, forward: Any = forward) -> Tensor:
            calls.append(1)
            return forward(self, x)

        monkeypatch.setattr(kind, "forward", counted)
    return calls


@needs_onednn
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
@pytest.mark.parametrize(
    ("same", "settings", "size"),
    [
        (True, {"kernel_size": 3, "stride": 2, "groups": 8}, (12, 12)),
        (True, {"kernel_size": 5, "stride": 2, "groups": 8}, (12, 20)),
        (True, {"kernel_size": 3, "stride": 2}, (13, 13)),  # even padding
        (False, {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 8}, (12, 12)),
        (False, {"kernel_size": 5, "padding": 2, "groups": 4}, (9, 14)),
        (False, {"kernel_size": 1}, (6, 7)),  # a matrix product
        (False, {"kernel_size": 1}, (40, 40)),
        (False, {"kernel_size": 1, "stride": 2}, (6, 7)),
        (False, {"kernel_size": 1, "groups": 4}, (6, 7)),
        (False, {"kernel_size": 1, "padding": 1}, (6, 7)),
    ],
)
@torch.no_grad()
def test_it_is_the_function_of_its_modules(
    activation: type[nn.Module], same: bool, settings: dict[str, Any], size: tuple[int, int],
    of_modules: list[int],
) -> None:  # fmt: skip
    convolution, act, fused = pair(same, activation, in_channels=8, out_channels=16, **settings)
    for layout in (torch.channels_last, torch.contiguous_format):
        x = (3 * torch.randn(2, 8, *size)).contiguous(memory_format=layout)
        kept = x.clone()
        found = fused(x)
        assert not of_modules
        torch.testing.assert_close(found, act(convolution(x)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x, kept, rtol=0, atol=0)  # in-place activations leave the input alone
        of_modules.clear()


@pytest.mark.parametrize(
    ("size", "dilation"),
    [
        # 12 rows take a pixel more below, 13 columns as much on either side; no one kernel serves both.
        ((12, 13), 1),
        # A column of zeros would move the others by two pixels.
        ((12, 12), 2),
    ],
)
@torch.no_grad()
def test_padding_of_other_forms_is_left_to_the_modules(
    size: tuple[int, int], dilation: int, of_modules: list[int]
) -> None:
    settings = {"kernel_size": 3, "stride": 2, "in_channels": 8, "out_channels": 16, "dilation": dilation}
    convolution, act, fused = pair(True, nn.ReLU6, **settings)
    x = torch.randn(1, 8, *size)
    found = fused(x)
    assert len(of_modules) == 1
    torch.testing.assert_close(found, act(convolution(x)), rtol=0, atol=0)


def test_what_needs_more_than_numbers_goes_by_the_modules(of_modules: list[int]) -> None:
    convolution, act, fused = pair(False, nn.SiLU, in_channels=8, out_channels=16, kernel_size=3)
    x = torch.randn(1, 8, 12, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(fused(x).sum(), x)
    (expected,) = torch.autograd.grad(act(convolution(x)).sum(), x)
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        of_modules.clear()
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(x).dtype == torch.bfloat16
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert fused(mode.from_tensor(x.detach())).shape == (1, 16, 10, 10)
        assert fused.double()(x.double()).dtype == torch.float64
    assert len(of_modules) == 3


@torch.no_grad()
def test_without_onednn_it_is_the_modules(monkeypatch: pytest.MonkeyPatch, of_modules: list[int]) -> None:
    monkeypatch.setattr(fused_convolution, "_has_fused_call", lambda: False)
    _, _, fused = pair(False, nn.ReLU, in_channels=8, out_channels=16, kernel_size=1)
    fused(torch.randn(1, 8, 6, 6))
    assert len(of_modules) == 1


@needs_onednn
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_b0", "resnet18"])
@torch.no_grad()
def test_a_whole_network_takes_the_fused_calls(
    name: str, monkeypatch: pytest.MonkeyPatch, of_modules: list[int]
) -> None:
    weights = None if name == "tf_efficientnet_lite0" else "random"
    backbone = build_backbone(name, weights=weights)
    x = torch.randn(2, 3, 96, 96)
    of_modules.clear()
    fused = backbone(x)
    gates = sum(isinstance(m, nn.Conv2d) for m in backbone.modules()) - sum(
        isinstance(m, FusedConvolution) for m in backbone.modules()
    )
    # What is left is without a normalisation: squeeze and excitation.
    assert (len(of_modules) > 0) is (gates > 0) is (name == "tf_efficientnet_b0")
    monkeypatch.setattr(fused_convolution, "_takes_fused_call", lambda _: False)
    for found, expected in zip(fused, backbone(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
