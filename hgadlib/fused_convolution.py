"""A convolution, its padding and its activation in one call on a processor, and by the modules elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

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
