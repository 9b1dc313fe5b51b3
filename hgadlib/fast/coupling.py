r"""A chain of positional coupling blocks as one function: few matrix products, few passes over memory.

With halves :math:`x_1, x_2`, the subnet's outputs :math:`(u, t)`, scaled by 0.1, and a global scale g and
offset o per channel, a block is

.. math:: s = \alpha\tanh u,\quad y = \bigl(x_1,\; x_2\odot e^{s} + t\bigr),\quad x' = R\,(g\odot y + o),
          \quad \log|\det J| = \textstyle\sum s + \sum\log g .

Against the same arithmetic left to autograd, block by block:

- the position code's share of the subnet is computed once per grid, from H + W codes where it may be;
- the offset enters as :math:`y + o/g`, so it rides on passes that are needed anyhow, and the gain is folded
  into R; biases and the subnet's 0.1 ride likewise on passes and products;
- the gradient of g is a sum over :math:`\nabla_y\odot y`, where autograd would form that of a (C, C) matrix;
- halves are never concatenated nor their gradients padded and added, and what only one block at a time needs
  is in buffers that all share;
- what is small is done for all blocks at once: with narrow subnets and small grids the calls alone would take
  a quarter of the time.

Source: paper Eq. 4; arithmetic of FrEIA's ``AllInOneBlock``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# FrEIA scales every subnet output by this factor, so that a fresh flow is close to a rotation.
SUBNET_SCALE = 0.1
# Numbers of the hidden layer that a processor works on at a time: 2.5 megabytes, which its caches hold.
_CACHED_NUMBERS = 1024 * 640


class BlockWeights(NamedTuple):
    """What a block has learnt, and its rotation."""

    first: Tensor
    """(hidden, C - C // 2 + P): of the features, then of the position code."""
    first_bias: Tensor
    """(hidden,)."""
    last: Tensor
    """(2 * (C // 2), hidden): of u, then of t."""
    last_bias: Tensor
    """(2 * (C // 2),)."""
    global_scale: Tensor
    """(1, C): before its softplus."""
    global_offset: Tensor
    """(1, C)."""
    rotation: Tensor
    """(C, C): takes no gradient."""


class Position:
    """Where features lie: the code of each position, and what it adds to a subnet's hidden layer.

    Args:
        code: (N, P), or None where positions are not told apart. It takes no gradient.
        grid: (H, W) where the first half of the code's channels depends on the column alone and the second
            on the row alone; None for a code of any other form.
    """

    def __init__(self, code: Tensor | None, grid: tuple[int, int] | None) -> None:
        self.code, self.grid = code, grid
        if code is not None and grid is not None:
            places = code.view(*grid, -1)
            self.half = code.shape[-1] // 2
            self.columns, self.rows = places[0, :, : self.half], places[:, 0, self.half :]

    def share(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Give what each position adds, (N, hidden), or (hidden,) where all add the same.

        Args:
            weight: The first layer's weight of the code, (hidden, P).
            bias: The first layer's bias, (hidden,).
        """
        if self.code is None:
            return bias
        if self.grid is None:
            return F.linear(self.code, weight, bias)
        for_columns, for_rows = weight.split(self.half, 1)
        by_row = F.linear(self.rows, for_rows, bias)
        return (by_row[:, None] + F.linear(self.columns, for_columns)).flatten(0, 1)

    def share_gradients(self, grad_share: Tensor, grad_weight: Tensor) -> Tensor:
        """Write the gradient of the code's weight into grad_weight, (hidden, P); give that of the bias."""
        dtype = grad_share.dtype
        if self.code is None:
            return grad_share
        if self.grid is None:
            torch.mm(grad_share.T, self.code.to(dtype), out=grad_weight)
            return grad_share.sum(0)
        places = grad_share.view(*self.grid, -1)
        by_row = places.sum(1)
        for_columns, for_rows = grad_weight.split(self.half, 1)
        torch.mm(places.sum(0).T, self.columns.to(dtype), out=for_columns)
        torch.mm(by_row.T, self.rows.to(dtype), out=for_rows)
        return by_row.sum(0)


def gain_of(global_scale: Tensor) -> Tensor:
    """Give the positive global scale of each channel."""
    return 0.1 * F.softplus(global_scale, beta=0.5)


def couple(
    x: Tensor, position: Position, blocks: Sequence[BlockWeights], clamp: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Map features through blocks of equal size, one after the other.

    Args:
        x: Features, (B, N, C).
        position: Where they lie.
        blocks: At least one.
        clamp: Soft clamp of the log-scale.
        dtype: What the subnets run in; the rest keeps the features' type.

    Returns:
        Outputs (B, N, C), and the log-determinant of each position, (B, N).
    """
    if torch.is_grad_enabled():
        weights = [weight for block in blocks for weight in block]
        out, log_det = _Couple.apply(x, position, clamp, dtype, *weights)
        return out, log_det
    return _forward(x, position, blocks, clamp, dtype, keep=False)[:2]


def _cut(x: Tensor, width: int, dtype: torch.dtype) -> tuple[list[int], int]:
    """Cut the rows of (B * N, C) into parts: their lengths, and how many positions a part has at most.

    On a processor a wide hidden layer of a whole batch is larger than the caches, and each pass over it would
    wait for memory; a narrow one fits as it is, and parts would cost more calls. Other devices take all at
    once, and so do subnets in half precision: their gradients would lose digits where parts are added up.
    """
    images, positions, _ = x.shape
    total = images * positions
    most = max(_CACHED_NUMBERS // width, 1)
    if x.device.type != "cpu" or dtype != x.dtype or total <= most:
        return [total] if total else [], positions
    if positions <= most:  # some whole images
        size = most // positions * positions
        return [min(size, total - start) for start in range(0, total, size)], positions
    # The fewest parts of an image, of equal size but for the last.
    size = math.ceil(positions / math.ceil(positions / most))
    return [min(size, positions - start) for start in range(0, positions, size)] * images, size


def _first_layer(given: Tensor, weight: Tensor, share: Tensor, out: Tensor) -> None:
    """Write weight @ given + share into out, (rows, hidden); share is (positions, hidden) or (hidden,)."""
    if share.dim() == 1:
        torch.addmm(share, given, weight.T, out=out)
    else:
        # The product adds to what it finds: one pass less than to add afterwards.
        out.view(-1, *share.shape).copy_(share)
        out.addmm_(given, weight.T)


def _sum_images(images: Tensor, out: Tensor, *, add: bool) -> None:
    """Write the sum over the first axis into out, or add it to out."""
    if len(images) > 4:
        images = images.sum(0, keepdim=True)
    # A few are added faster one by one: torch.sum would first fill its output with zeros.
    if not add and len(images) > 1:
        torch.add(images[0], images[1], out=out)
    elif not add:
        out.copy_(images[0])
    for image in images[0 if add else 2 :]:
        out.add_(image)


def _in_type(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Cast where there is need; a call that does nothing is not free either."""
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


class _Global(NamedTuple):
    """Of all blocks, from their global scales and offsets and their subnets' last biases."""

    gain: Tensor
    """g, (L, C)."""
    shift: Tensor
    """o / g, (L, C)."""
    bias_u: Tensor
    """Twice the scaled bias of u, (L, C // 2)."""
    bias_t: Tensor
    """The scaled bias of t, and the shift of these channels, (L, C // 2)."""

    @classmethod
    def of(cls, blocks: Sequence[BlockWeights]) -> _Global:
        gain = gain_of(torch.cat([block.global_scale for block in blocks]))
        shift = torch.cat([block.global_offset for block in blocks]).div_(gain)
        bias = torch.stack([block.last_bias for block in blocks]).mul_(SUBNET_SCALE)
        bias_u, bias_t = bias.chunk(2, 1)
        return cls(gain, shift, 2 * bias_u, bias_t + shift[:, -bias_t.shape[1] :])


class _Kept(NamedTuple):
    """What the backward pass of a block needs, rows for (B * N)."""

    x: Tensor
    """(rows, C)."""
    hidden: Tensor
    """(rows, hidden), after the ReLU."""
    gate: Tensor
    """sigmoid(2u), (rows, C // 2)."""
    scale: Tensor
    """exp(s), (rows, C // 2)."""
    y: Tensor
    """y + o / g, (rows, C)."""
    rotation: Tensor
    """R diag(g), (C, C)."""


def _forward(
    x: Tensor,
    position: Position,
    blocks: Sequence[BlockWeights],
    clamp: float,
    dtype: torch.dtype,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, list[_Kept], _Global]:
    """Map x; give also what a backward pass needs, where it is to be kept."""
    channels, active, width = x.shape[-1], len(blocks[0].last) // 2, len(blocks[0].first)
    halves = [channels - active, active]
    flat = x.reshape(-1, channels)
    rows = len(flat)
    lengths, piece = _cut(x, width, dtype)
    every = _Global.of(blocks)
    log_dets = flat.new_empty(len(blocks), rows)
    raw = flat.new_empty(rows, 2 * active, dtype=dtype)
    kept: list[_Kept] = []
    constants = zip(*every, log_dets, strict=True)
    for number, (block, constant) in enumerate(zip(blocks, constants, strict=True)):
        gain, shift, bias_u, bias_t, log_det = constant
        if keep or number == 0:
            hidden = flat.new_empty(rows if keep else max(lengths, default=0), width, dtype=dtype)
            gate, y = flat.new_empty(rows, active), torch.empty_like(flat)
        weight1, for_code = block.first.split([halves[0], block.first.shape[1] - halves[0]], 1)
        share = position.share(for_code, block.first_bias)
        x1, x2 = flat.split(halves, 1)
        inputs, weight1, weight2, share = _in_type(dtype, x1, weight1, block.last, share)
        parts = zip(
            hidden.split(lengths) if keep else [hidden[:length] for length in lengths],
            inputs.split(lengths), raw.split(lengths), cycle(_pieces(share, piece)),
        )  # fmt: skip
        for part, given, result, own in parts:
            _first_layer(given, weight1, own, part)
            part.relu_()
            result.addmm_(part, weight2.T, beta=0, alpha=SUBNET_SCALE)
        raw_u, raw_t = (raw if raw.dtype == x.dtype else raw.to(x.dtype)).split(active, 1)
        # tanh(u) is 2 sigmoid(2u) - 1, which PyTorch computes three times as fast on a processor.
        torch.add(bias_u, raw_u, alpha=2, out=gate).sigmoid_()
        s = torch.rsub(gate, -clamp, alpha=-2 * clamp)
        torch.sum(s, 1, out=log_det)
        scale = s.exp_()
        y1, y2 = y.split(halves, 1)
        torch.add(x1, shift[: halves[0]], out=y1)
        torch.addcmul(raw_t, x2, scale, out=y2).add_(bias_t)
        rotation = block.rotation * gain
        # Without a backward pass the last block's outputs have served once they are in y.
        out = torch.mm(y, rotation.T, out=flat if number and not keep else torch.empty_like(y))
        if keep:
            kept.append(_Kept(flat, hidden, gate, scale, y, rotation))
        flat = out
    log_det = log_dets.sum(0).add_(every.gain.log().sum())
    return flat.view(x.shape), log_det.view(x.shape[:2]), kept, every


def _pieces(share: Tensor, length: int) -> Sequence[Tensor]:
    """Cut what positions add into what the positions of each part add."""
    return [share] if share.dim() == 1 else share.split(length)


class _Couple(torch.autograd.Function):
    """The chain with gradients worked out by hand; see the module's text."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, position: Position, clamp: float, dtype: torch.dtype, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :func:`couple`; weights are those of a block, then those of the next."""
        size = len(BlockWeights._fields)
        blocks = [BlockWeights(*weights[i : i + size]) for i in range(0, len(weights), size)]
        out, log_det, kept, every = _forward(x, position, blocks, clamp, dtype, keep=True)
        ctx.save_for_backward(
            *(tensor for block in kept for tensor in block),
            *(tensor for block in blocks for tensor in (block.first, block.last)),
            torch.cat([block.global_scale for block in blocks]), every.gain, every.shift,
        )  # fmt: skip
        ctx.position, ctx.clamp, ctx.dtype = position, clamp, dtype
        ctx.shape, ctx.n_blocks = x.shape, len(blocks)
        return out, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of x and of the blocks' weights but for their rotations."""
        *saved, global_scale, gain, shift = ctx.saved_tensors
        size, n_blocks, dtype = len(_Kept._fields), ctx.n_blocks, ctx.dtype
        kept = [_Kept(*saved[i : i + size]) for i in range(0, size * n_blocks, size)]
        firsts, lasts = saved[size * n_blocks :: 2], saved[size * n_blocks + 1 :: 2]
        channels, active, width = ctx.shape[-1], len(lasts[0]) // 2, len(firsts[0])
        halves = [channels - active, active]
        of_first = [halves[0], firsts[0].shape[1] - halves[0]]
        lengths, piece = _cut(kept[0].x.view(ctx.shape), width, dtype)

        grad = grad_out.reshape(-1, channels)
        rows = len(grad)
        grad_y, spare = torch.empty_like(kept[0].y), torch.empty_like(kept[0].y)
        grad_raw = grad.new_empty(rows, 2 * active)
        grad_hidden = grad.new_empty(max(lengths, default=0), width, dtype=dtype)
        sums, dots = grad.new_empty(2, n_blocks, channels)
        sums_u = grad.new_empty(n_blocks, active)
        slope = 4 * ctx.clamp  # of the clamped tanh in the sigmoid's form
        steep_log_det = grad_log_det.reshape(-1, 1) * slope
        of_subnets: list[list[Tensor]] = []
        for number in reversed(range(n_blocks)):
            own, first, last = kept[number], firsts[number], lasts[number]
            torch.mm(grad, own.rotation, out=grad_y)
            torch.sum(grad_y, 0, out=sums[number])
            torch.sum(torch.mul(grad_y, own.y, out=spare), 0, out=dots[number])

            # The subnet's outputs u and t; the gradient of x2 takes the place of y2's.
            x1, x2 = own.x.split(halves, 1)
            grad_x1, grad_x2 = grad_y.split(halves, 1)
            grad_u, grad_t = grad_raw.split(active, 1)
            grad_t.copy_(grad_x2)
            grad_x2.mul_(own.scale)
            torch.addcmul(steep_log_det, grad_x2, x2, value=slope, out=grad_u)
            torch.ops.aten.sigmoid_backward.grad_input(grad_u, own.gate, grad_input=grad_u)
            torch.sum(grad_u, 0, out=sums_u[number])

            inputs, weight1, weight2, given = _in_type(dtype, x1, first[:, : halves[0]], last, grad_raw)
            new = grad.new_empty if lengths else grad.new_zeros
            grad_first = new(first.shape, dtype=dtype)
            # Transposed: a product with the longer side first is a sixth faster.
            grad_last = new((width, len(last)), dtype=dtype)
            grad_weight1, grad_code = grad_first.split(of_first, 1)
            grad_share = new((width,) if ctx.position.code is None else (ctx.shape[1], width), dtype=dtype)
            shares = _pieces(grad_share, piece)
            parts = zip(
                own.hidden.split(lengths), given.split(lengths), inputs.split(lengths),
                grad_x1.split(lengths), cycle(shares),
            )  # fmt: skip
            for part, (hidden, given_, inputs_, grad_x1_, share) in enumerate(parts):
                so_far = min(part, 1)
                grad_last.addmm_(hidden.T, given_, beta=so_far, alpha=SUBNET_SCALE)
                grad_part = grad_hidden[: len(hidden)].addmm_(given_, weight2, beta=0, alpha=SUBNET_SCALE)
                torch.ops.aten.threshold_backward.grad_input(grad_part, hidden, 0, grad_input=grad_part)
                grad_weight1.addmm_(grad_part.T, inputs_, beta=so_far)
                if number or ctx.needs_input_grad[0]:
                    if dtype == grad.dtype:
                        grad_x1_.addmm_(grad_part, weight1)
                    else:
                        grad_x1_.add_(grad_part @ weight1)
                _sum_images(grad_part.view(-1, *share.shape), share, add=part >= len(shares))
            grad_first_bias = ctx.position.share_gradients(grad_share, grad_code)
            of_subnets.append(_in_type(grad.dtype, grad_first, grad_first_bias, grad_last.T))
            grad, grad_y, spare = grad_y, spare, grad_y

        grad_gain = dots.addcmul_(shift, sums, value=-1).add_(grad_log_det.sum()).div_(gain)
        grad_global_scale = torch.sigmoid(0.5 * global_scale).mul_(0.1).mul_(grad_gain)
        grad_offset = sums / gain
        grad_last_bias = torch.cat([sums_u, sums[:, halves[0] :]], 1).mul_(SUBNET_SCALE)
        grads: list[Tensor | None] = []
        for number, (grad_first, grad_first_bias, grad_last) in enumerate(reversed(of_subnets)):
            grads += grad_first, grad_first_bias, grad_last, grad_last_bias[number]
            grads += grad_global_scale[number : number + 1], grad_offset[number : number + 1], None
        return grad.view(ctx.shape), None, None, None, *grads
