r"""Affine-coupling blocks of a flow over channel-last features, as FrEIA modules.

Each block is a Real-NVP coupling (paper Eq. 4), a global scaling and a fixed rotation. Parameter names and
arithmetic are those of FrEIA's ``AllInOneBlock`` (soft clamping, ``SOFTPLUS`` global affine, soft
permutation), so states are interchangeable; the position of a feature enters as a condition.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from hgadlib.fused_coupling import SUBNET_SCALE, BlockWeights, Position, couple, gain_of

# softplus with beta 0.5 and gain 0.1 maps this pre-activation to a global scale of exactly 1.
_UNIT_GLOBAL_SCALE = 2.0 * math.log(math.exp(5.0) - 1.0)


def random_rotation(dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw a rotation from the Haar measure on SO(dim).

    One QR decomposition of a Gaussian matrix with its signs mended: the distribution of FrEIA's
    soft permutation in milliseconds where that takes minutes.

    Args:
        dim: Size of the matrix.
        generator: Source of randomness; the global one by default.

    Returns:
        Orthogonal matrix of determinant +1, (dim, dim) in the default type.
    """
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal().sign()
    if torch.linalg.slogdet(q).sign < 0:
        q[:, 0] = -q[:, 0]
    return q.to(torch.get_default_dtype())


class _AffineCoupling(InvertibleModule):
    """Real-NVP affine coupling, then a global scaling and a fixed rotation as one matrix product.

    Parameter names and arithmetic are those of FrEIA's ``AllInOneBlock`` (soft clamping,
    ``SOFTPLUS`` global affine, soft permutation), so states are interchangeable.
    """

    def __init__(self, dims_in: Sequence[tuple[int, ...]], clamp: float) -> None:
        super().__init__(dims_in)
        channels = dims_in[0][0]
        if channels < 2:
            raise ValueError(f"expected at least 2 channels to couple, found {channels}")
        self.splits = (channels - channels // 2, channels // 2)
        self.clamp = clamp
        self.global_scale = nn.Parameter(torch.full((1, channels), _UNIT_GLOBAL_SCALE))
        self.global_offset = nn.Parameter(torch.zeros(1, channels))
        self.register_buffer("w_perm", random_rotation(channels))

    @property
    def gain(self) -> Tensor:
        """Global scale of each channel, (1, C), positive."""
        return gain_of(self.global_scale)

    def coefficients(self, x1: Tensor, condition: Tensor | None) -> Tensor:
        """Predict the unscaled (s, t), (B, N, 2 * (C // 2)), from the passive half (B, N, C - C // 2)."""
        raise NotImplementedError  # the two subnets below

    def scale_and_shift(self, x1: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Give the clamped log-scale s and the shift t of Eq. 4, each (B, N, C // 2)."""
        s, t = (SUBNET_SCALE * self.coefficients(x1, condition)).chunk(2, dim=-1)
        # Under autocast the subnet may answer in bfloat16; the density is summed in the features' own type.
        return self.clamp * torch.tanh(s.to(x1.dtype)), t.to(x1.dtype)

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """Map (B, N, C) to (B, N, C); the log-determinant is per position, (B, N)."""
        (x,) = x_or_z
        condition = next(iter(c), None)
        gain = self.gain
        global_log_det = gain.log().sum()
        # A density needs full precision: under autocast only the subnets are cast.
        with torch.autocast(x.device.type, enabled=False):
            if rev:
                x = (F.linear(x, self.w_perm.T) - self.global_offset) / gain
        x1, x2 = x.split(self.splits, dim=-1)
        s, t = self.scale_and_shift(x1, condition)
        if rev:
            out = torch.cat([x1, (x2 - t) * torch.exp(-s)], dim=-1)
            return (out,), -(s.sum(-1) + global_log_det)
        out = torch.cat([x1, torch.addcmul(t, x2, s.exp())], dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            # (x * gain + offset) W^T as one product: the scaling is folded into the rotation.
            out = F.linear(out, self.w_perm * gain, (self.w_perm @ self.global_offset[0]))
        return (out,), s.sum(-1) + global_log_det

    def output_dims(self, input_dims: list[tuple[int]]) -> list[tuple[int]]:
        """Keep the shape."""
        return input_dims

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # AllInOneBlock stores the inverse rotation too; here it is the transpose.
        state_dict.pop(prefix + "w_perm_inv", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class PositionalCoupling(_AffineCoupling):
    """Affine coupling whose subnet is a two-layer perceptron of the features and their position.

    The position's share of the first layer is the same for every image, so it is computed once per
    grid, (H*W, hidden), and added to the features' share: the position code is never concatenated.

    Args:
        dims_in: ``[(C,)]``.
        dims_c: ``[(P,)]`` where positions are given, empty where not.
        clamp: Soft clamp of the log-scale.
        hidden: Width of the hidden layer; None for twice the subnet's inputs, as published.
        grid: (H, W) where the first half of the code's channels depends on the column alone and the second
            on the row alone; then its share is the sum of one for columns and one for rows, made from
            H + W codes in place of H * W. None for a code of any other form.

    Source: paper Eq. 4, App. C.
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, ...]],
        dims_c: Sequence[tuple[int, ...]] = (),
        *,
        clamp: float = 1.9,
        hidden: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(dims_in, clamp)
        self.grid = grid
        inputs = self.splits[0] + sum(dims[0] for dims in dims_c)
        hidden = hidden or 2 * inputs
        self.subnet = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 2 * self.splits[1])
        )

    def coefficients(self, x1: Tensor, condition: Tensor | None) -> Tensor:
        """See the base class; condition is the position code, (N, P)."""
        share, features_weight = self.position_share(condition)
        return self.subnet[2]((F.linear(x1, features_weight) + share).relu_())

    def position_share(self, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Give the first layer's share of each position, (N, hidden) or (hidden,), and its other weights."""
        first = cast(nn.Linear, self.subnet[0])
        weight, of_code = first.weight.split([self.splits[0], first.in_features - self.splits[0]], dim=1)
        return Position(condition, self.grid).share(of_code, first.bias), weight

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """See the base class; forwards, the block is one fused function."""
        (x,) = x_or_z
        if rev:
            return super().forward((x,), c, rev, jac)
        out, log_det = chain([self], x, next(iter(c), None))
        return (out,), log_det

    @property
    def weights(self) -> BlockWeights:
        """All that the block computes with."""
        first, _, last = cast("list[nn.Linear]", self.subnet)
        return BlockWeights(
            first.weight,
            first.bias,
            last.weight,
            last.bias,
            self.global_scale,
            self.global_offset,
            self.w_perm,
        )


def chain(blocks: Sequence[PositionalCoupling], x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
    """Map features through blocks of equal size, one after the other, as one fused function.

    Args:
        blocks: At least one.
        x: Features, (B, N, C).
        condition: The position code, (N, P), which takes no gradient; None where the blocks have none.

    Returns:
        Outputs (B, N, C), and the log-determinant of each position, (B, N).
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        position = Position(condition, blocks[0].grid)
        return couple(x, position, [block.weights for block in blocks], blocks[0].clamp, dtype)


class ConvolutionalCoupling(_AffineCoupling):
    """Affine coupling whose subnet is a two-layer convolution over the grid, as in FastFlow.

    Args:
        dims_in: ``[(C,)]``.
        grid: (H, W) of the features.
        kernel_size: Odd size of both kernels.
        clamp: Soft clamp of the log-scale.
        hidden: Channels of the hidden layer; None for the width of the passive half.

    Source: paper Sec. 3.2 (the reproduced FastFlow).
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, ...]],
        *,
        grid: tuple[int, int],
        kernel_size: int,
        clamp: float = 1.9,
        hidden: int | None = None,
    ) -> None:
        super().__init__(dims_in, clamp)
        self.grid = grid
        hidden = hidden or self.splits[0]
        self.subnet = nn.Sequential(
            nn.Conv2d(self.splits[0], hidden, kernel_size, padding=kernel_size // 2),
            nn.ReLU(),
            nn.Conv2d(hidden, 2 * self.splits[1], kernel_size, padding=kernel_size // 2),
        )

    def coefficients(self, x1: Tensor, condition: Tensor | None) -> Tensor:
        """See the base class; N is H*W of the grid, row-major."""
        maps = x1.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return self.subnet(maps).permute(0, 2, 3, 1).flatten(1, 2)
