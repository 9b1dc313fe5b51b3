"""A network with folded normalisations is the function that it was."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from hgadlib.fast.convolution import fold_batch_norms


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
