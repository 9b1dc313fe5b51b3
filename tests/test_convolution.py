"""A network with folded normalisations: the function that it was, and products only where they serve."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from hgadlib.fast.convolution import ProductConvolution, fold_batch_norms


@pytest.fixture
def of_modules(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often a convolution is called by its module."""
    calls: list[int] = []
    forward = nn.Conv2d.forward

    def counted(self: Any, x: Tensor) -> Tensor:
        calls.append(1)
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    return calls


def test_few_positions_are_a_matrix_product(of_modules: list[int]) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 16, 1)
    product = ProductConvolution(convolution)
    for layout in (torch.channels_last, torch.contiguous_format):
        x = torch.randn(2, 8, 6, 7).contiguous(memory_format=layout)
        with torch.no_grad():
            found = product(x)
        assert not of_modules
        torch.testing.assert_close(found, convolution(x), rtol=1e-5, atol=1e-5)
        of_modules.clear()


def test_all_else_goes_by_the_module(of_modules: list[int]) -> None:
    convolution = nn.Conv2d(8, 16, 1)
    product = ProductConvolution(convolution)
    x = torch.randn(1, 8, 12, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(product(x).sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(convolution(x).sum(), x)[0])
    of_modules.clear()
    with torch.no_grad():
        assert product(torch.randn(1, 8, 40, 40)).shape == (1, 16, 40, 40)  # many positions
        with torch.autocast("cpu", torch.bfloat16):
            assert product(x).dtype == torch.bfloat16
        assert len(of_modules) == 2
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # operations are counted so
            assert product(mode.from_tensor(x.detach())).shape == (1, 16, 12, 12)
        assert product.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "tf_efficientnet_b0", "resnet18", "mobilenetv3_small_100"]
)
@torch.no_grad()
def test_a_folded_network_is_the_same_function(name: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, features_only=True).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # moments of a network that has learnt
            nn.init.normal_(module.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
    folded = fold_batch_norms(network)
    assert folded is not network
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    x = torch.randn(2, 3, 96, 96)
    for found, expected in zip(folded(x), network(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
