"""A convolution, its padding and its activation in one call on a processor, and by the modules elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@torch.no_grad()
def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Fold each batch normalisation into the convolution before it, where that leaves the function as it is.

    The activation that timm has a batch normalisation carry goes with it; see
    :class:`hgadlib.fast.convolution.FusedConvolution`.

    Which pairs belong together is seen from one forward pass. The folded network is kept only if it gives the
    same maps to float rounding, so a network with other ties between its layers comes back as it was.

    Args:
        network: In evaluation mode; takes images of 64 x 64 pixels, else it comes back as it was.

    Returns:
        The folded copy, or the network itself.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    folded = copy.deepcopy(network)
    made_by: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def note_conv(conv: nn.Module, _: Any, output: Tensor) -> None:
        if isinstance(conv, nn.Conv2d):
            made_by[id(output)] = conv, output  # kept alive, so that the id stays its own

    def note_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(norm, nn.BatchNorm2d) and id(inputs[0]) in made_by:
            pairs.append((made_by[id(inputs[0])][0], norm))

    hooks = []
    for module in folded.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(note_conv))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(note_norm))
    probe = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    try:
        before = folded(probe)
    except (RuntimeError, AssertionError):
        return network
    finally:
        for hook in hooks:
            hook.remove()
    made_by.clear()
    for conv, norm in pairs:
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        carried = getattr(norm, "act", None)
        activation = carried if isinstance(carried, nn.Module) else nn.Identity()
        _replace(folded, conv, FusedConvolution(conv, activation))
        _replace(folded, norm, nn.Identity())
    after = folded(probe)
    same = all((a - b).abs().max() <= 1e-3 * b.abs().max() for a, b in zip(after, before, strict=True))
    return folded if same else network


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in each place of another."""
    places = [
        (parent, name)
        for parent in network.modules()
        for name, child in parent.named_children()
        if child is old
    ]
    for parent, name in places:
        setattr(parent, name, new)


# oneDNN's words for activations, and their numbers.
_ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}
# Up to this many positions a 1 x 1 convolution is faster as a matrix product: oneDNN would bring its weights
# into another order on every call, which is a fifth of the time where there are few positions to share it.
_FEW_POSITIONS = 32 * 32


class FusedConvolution(nn.Module):
    """A convolution and its activation: the same function in fewer passes over memory.

    On a processor, where nothing takes a gradient, the activation is applied while the convolution's outputs
    are in registers, and padding that is uneven ("same" in TensorFlow's sense) is part of the convolution,
    where timm copies the input into a padded one. Everywhere else it is the two modules that it was made of.

    Args:
        convolution: Has a bias.
        activation: What follows it.
    """

    _same: Tensor | None

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module) -> None:
        super().__init__()
        self.convolution, self.activation = convolution, activation
        self._fused = _ACTIVATIONS.get(type(activation)) if _has_fused_call() else None
        kernel = (convolution.kernel_size[0], convolution.kernel_size[1])
        is_same = type(convolution) is Conv2dSame
        if isinstance(convolution.padding, str) or type(convolution) not in (nn.Conv2d, Conv2dSame):
            self._fused = None
        # A pixel more of padding at the right than at the left is even padding, under a kernel that is wider
        # by a column of zeros at its left.
        self.register_buffer(
            "_same", F.pad(convolution.weight.detach(), (1, 0, 1, 0)) if is_same else None, persistent=False
        )
        self._is_product = kernel == (1, 1) == tuple(convolution.stride) and (
            convolution.groups == 1 and not is_same and not any(convolution.padding)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) as the two modules would, to float rounding."""
        if self._fused is None or not _takes_fused_call(x):
            return self.activation(self.convolution(x))
        convolution = self.convolution
        if self._is_product and x.shape[2] * x.shape[3] <= _FEW_POSITIONS:
            rows = x.permute(0, 2, 3, 1)
            out = F.linear(rows.flatten(0, 2), convolution.weight.flatten(1), convolution.bias)
            return self.activation(out.view(*rows.shape[:3], -1).permute(0, 3, 1, 2))
        weight, padding = convolution.weight, convolution.padding
        if self._same is not None:
            before, after = zip(*map(self._padding, range(2), x.shape[2:]), strict=True)
            if before != after:
                if any(b + d != a for b, d, a in zip(before, convolution.dilation, after, strict=True)):
                    return self.activation(self.convolution(x))
                weight = self._same
            padding = after
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, convolution.bias, padding, convolution.stride, convolution.dilation,
            convolution.groups, *self._fused, "",
        )  # fmt: skip

    def _padding(self, axis: int, length: int) -> tuple[int, int]:
        """Pixels before and after, as timm pads."""
        stride = self.convolution.stride[axis]
        reach = (self.convolution.kernel_size[axis] - 1) * self.convolution.dilation[axis] + 1
        total = max((-(-length // stride) - 1) * stride + reach - length, 0)
        return total // 2, total - total // 2


def _has_fused_call() -> bool:
    """Whether this PyTorch has oneDNN's convolution with an activation; it is not part of its stable API."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _takes_fused_call(x: Tensor) -> bool:
    """Whether nothing needs more than the numbers: no gradient, no other type, no tracing or counting."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )
