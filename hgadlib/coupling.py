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
from torch.autograd.function import once_differentiable

# FrEIA scales every subnet output by this factor, so that a fresh flow is close to a rotation.
_SUBNET_SCALE = 0.1
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


# Numbers of the hidden layer that a processor works on at a time: a megabyte or so, which stays in its cache.
_CACHED_NUMBERS = 512 * 640


def _parts(x: Tensor, width: int, dtype: torch.dtype) -> list[tuple[slice, slice]]:
    """Cut (B, N, C) into positions of some images, and the rows of (B * N, C) that these are.

    On a processor a wide hidden layer of a whole batch is larger than the caches, and each pass over it would
    wait for memory; a narrow one fits as it is, and parts would cost more calls. Other devices take all at
    once, and so do subnets in half precision: their gradients would lose digits where parts are added up.
    """
    images, positions, _ = x.shape
    if x.device.type != "cpu" or dtype != x.dtype:
        return [(slice(0, positions), slice(0, images * positions))]
    most = max(_CACHED_NUMBERS // width, 1)
    if positions <= most:  # some whole images
        size = most // positions * positions
        ends = [min(start + size, images * positions) for start in range(0, images * positions, size)]
        return [(slice(0, positions), slice(a, b)) for a, b in zip([0, *ends], ends, strict=False)]
    # The fewest parts of an image, of equal size but for the last.
    size = math.ceil(positions / math.ceil(positions / most))
    parts = []
    for image in range(images):
        for start in range(0, positions, size):
            stop = min(start + size, positions)
            parts.append((slice(start, stop), slice(image * positions + start, image * positions + stop)))
    return parts


def _largest(parts: list[tuple[slice, slice]]) -> int:
    return max((rows.stop - rows.start for _, rows in parts), default=0)


def _add_share(hidden: Tensor, share: Tensor, positions: slice) -> Tensor:
    """Add what each position gives, (N, hidden) or (hidden,), to rows of hidden, in place."""
    if share.dim() == 1:
        return hidden.add_(share)
    own = share[positions]
    hidden.view(-1, *own.shape).add_(own)
    return hidden


def _couple(
    x: Tensor,
    position_share: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scaled_rotation: Tensor,
    shift: Tensor,
    clamp: float,
    dtype: torch.dtype,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Map x (B, N, C); give also what a backward pass needs, where it is to be kept."""
    images, positions, channels = x.shape
    split, width = weight1.shape[1], weight1.shape[0]
    flat = x.reshape(-1, channels)
    x1, x2 = flat[:, :split], flat[:, split:]
    a = torch.empty(len(flat), len(weight2), dtype=dtype, device=x.device)
    parts = _parts(x, width, dtype)
    hidden = torch.empty(len(flat) if keep else _largest(parts), width, dtype=dtype, device=x.device)
    for own, rows in parts:
        part = hidden[rows] if keep else hidden[: rows.stop - rows.start]
        torch.mm(x1[rows].to(dtype), weight1.T, out=part)
        _add_share(part, position_share, own).relu_()
        torch.addmm(bias2, part, weight2.T, out=a[rows])
    a = a.to(x.dtype)
    # tanh(x) is 2 sigmoid(2x) - 1, which PyTorch computes three times as fast on a processor.
    tanh = a[:, : channels - split].mul(2 * _SUBNET_SCALE).sigmoid_().mul_(2.0).sub_(1.0)
    scale = tanh.mul(clamp).exp_()
    y2 = a[:, channels - split :].mul_(_SUBNET_SCALE).addcmul_(x2, scale)
    out = torch.addmm(shift, x1, scaled_rotation[:, :split].T)
    out.addmm_(y2, scaled_rotation[:, split:].T)
    log_det = tanh.sum(-1).mul_(clamp)
    return out.view(x.shape), log_det.view(images, positions), (hidden, tanh, scale, y2) if keep else ()


class _FusedCoupling(torch.autograd.Function):
    r"""One block forwards and backwards, in the matrix products that it needs and few passes over memory.

    Against the same arithmetic left to autograd: halves are never concatenated nor their gradients padded
    and added, the gain's gradient is a sum over :math:`g\odot x` where autograd would form the gradient of a
    whole (C, C) matrix, and three arrays a block are kept in place of nine.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        position_share: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        gain: Tensor,
        rotation: Tensor,
        shift: Tensor,
        clamp: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Map x (B, N, C); position_share is (N, hidden) or (hidden,), weights are in the subnet's dtype."""
        scaled_rotation = rotation * gain
        out, log_det, kept = _couple(
            x, position_share, weight1, weight2, bias2, scaled_rotation, shift, clamp, dtype, keep=True
        )
        ctx.save_for_backward(x, *kept, weight1, weight2, gain, scaled_rotation)
        ctx.clamp, ctx.share_shape = clamp, position_share.shape
        return out, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of x, position_share, both weights, bias2, gain and shift."""
        x, hidden, tanh, scale, y2, weight1, weight2, gain, scaled_rotation = ctx.saved_tensors
        channels = x.shape[-1]
        split, width, dtype = weight1.shape[1], weight1.shape[0], hidden.dtype
        flat = x.reshape(-1, channels)
        x1, x2 = flat[:, :split], flat[:, split:]
        grad_flat = grad_out.reshape(-1, channels)
        grad_x = grad_flat @ scaled_rotation
        grad_x1, grad_y2 = grad_x[:, :split], grad_x[:, split:]
        # x * gain enters the rotation, so its gradient times x is the gain's times the gain.
        grad_gain = torch.cat([(grad_x1 * x1).sum(0), (grad_y2 * y2).sum(0)]) / gain
        grad_a = torch.empty(flat.shape[0], 2 * (channels - split), dtype=x.dtype, device=x.device)
        torch.mul(grad_y2, _SUBNET_SCALE, out=grad_a[:, channels - split :])
        grad_y2.mul_(scale)  # from here on the gradient of x2
        grad_s = torch.addcmul(grad_log_det.reshape(-1, 1), grad_y2, x2)
        slope = tanh.square().neg_().add_(1.0).mul_(_SUBNET_SCALE * ctx.clamp)
        torch.mul(grad_s, slope, out=grad_a[:, : channels - split])
        grad_a = grad_a.to(dtype)
        grad_bias2 = grad_a.sum(0)
        grad_weight1, grad_weight2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
        grad_share = torch.zeros(ctx.share_shape, dtype=dtype, device=x.device)
        parts = _parts(x, width, dtype)
        buffer = torch.empty(_largest(parts), width, dtype=dtype, device=x.device)
        for own, rows in parts:
            part, given = hidden[rows], grad_a[rows]
            grad_weight2.addmm_(given.T, part)
            grad_hidden = torch.mm(given, weight2, out=buffer[: len(given)])
            torch.ops.aten.threshold_backward.grad_input(grad_hidden, part, 0, grad_input=grad_hidden)
            grad_weight1.addmm_(grad_hidden.T, x1[rows].to(dtype))
            if ctx.needs_input_grad[0] and dtype == x.dtype:
                grad_x1[rows].addmm_(grad_hidden, weight1)
            elif ctx.needs_input_grad[0]:
                grad_x1[rows].add_(grad_hidden @ weight1)
            if grad_share.dim() == 1:
                grad_share += grad_hidden.sum(0)
            else:
                here = grad_share[own]
                images = grad_hidden.view(-1, *here.shape)
                here += images[0] if len(images) == 1 else images.sum(0)
        return (
            grad_x.view_as(x), grad_share, grad_weight1, grad_weight2, grad_bias2, grad_gain, None,
            grad_flat.sum(0), None, None,
        )  # fmt: skip


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
        return 0.1 * F.softplus(self.global_scale, beta=0.5)

    def coefficients(self, x1: Tensor, condition: Tensor | None) -> Tensor:
        """Predict the unscaled (s, t), (B, N, 2 * (C // 2)), from the passive half (B, N, C - C // 2)."""
        raise NotImplementedError  # the two subnets below

    def scale_and_shift(self, x1: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Give the clamped log-scale s and the shift t of Eq. 4, each (B, N, C // 2)."""
        s, t = (_SUBNET_SCALE * self.coefficients(x1, condition)).chunk(2, dim=-1)
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
        if condition is None:
            return first.bias, first.weight
        features_weight, position_weight = first.weight.split([self.splits[0], condition.shape[-1]], dim=1)
        if self.grid is None:
            return F.linear(condition, position_weight, first.bias), features_weight
        half = condition.shape[-1] // 2
        code = condition.view(*self.grid, -1)
        columns = F.linear(code[0, :, :half], position_weight[:, :half])
        rows = F.linear(code[:, 0, half:], position_weight[:, half:], first.bias)
        return (rows[:, None] + columns).flatten(0, 1), features_weight

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """See the base class; forwards, the block is one fused function."""
        (x,) = x_or_z
        if rev:
            return super().forward((x,), c, rev, jac)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            share, weight1 = self.position_share(next(iter(c), None))
            last = cast(nn.Linear, self.subnet[2])
            gain, shift = self.gain[0], self.w_perm @ self.global_offset[0]
            subnet = share.to(dtype), weight1.to(dtype), last.weight.to(dtype), last.bias.to(dtype)
            if torch.is_grad_enabled():
                out, log_det = _FusedCoupling.apply(x, *subnet, gain, self.w_perm, shift, self.clamp, dtype)
            else:
                rotation = self.w_perm * gain
                out, log_det, _ = _couple(x, *subnet, rotation, shift, self.clamp, dtype, keep=False)
            return (out,), log_det + gain.log().sum()


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
