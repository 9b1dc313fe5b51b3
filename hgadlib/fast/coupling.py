r"""A chain of positional coupling blocks as one function: few matrix products, few passes over memory.

With halves :math:`x_1, x_2`, the subnet's outputs :math:`(u, t)`, scaled by 0.1, and a global scale g and
offset o per channel, a block is

.. math:: s = \alpha\tanh u,\quad y = \bigl(x_1,\; x_2\odot e^{s} + t\bigr),\quad x' = R\,(g\odot y + o),
          \quad \log|\det J| = \textstyle\sum s + \sum\log g .

An additive block has no u, and s is 0. Against the same arithmetic left to autograd, block by block:

- the position code's share of the subnet is computed once per grid, from H + W codes in place of H * W;
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

from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_SUBNET_SCALE = 0.1
# Numbers of the hidden layer that a processor works on at a time: 2.5 megabytes, which its caches hold.
_CACHED_NUMBERS = 1024 * 640


class BlockWeights(NamedTuple):
    """What a block has learnt, and its rotation, which takes no gradient."""

    first: Tensor  # (hidden, C - C // 2 + P): of the features, then of the position code
    first_bias: Tensor  # (hidden,)
    last: Tensor  # (2 * (C // 2), hidden): of u, then of t; (C // 2, hidden) of t alone: additive
    last_bias: Tensor  # (2 * (C // 2),), or (C // 2,)
    global_scale: Tensor  # (1, C): before its softplus
    global_offset: Tensor  # (1, C)
    rotation: Tensor  # (C, C)


def couple(
    x: Tensor, code: Tensor | None, grid: tuple[int, int], blocks: Sequence[BlockWeights], clamp: float
) -> tuple[Tensor, Tensor]:
    """Map features through blocks of equal size, one after the other.

    Args:
        x: Features, (B, N, C).
        code: Code of each position, (N, P): one half of the channels depends on the column alone, the other
            on the row alone. None where positions are not told apart. It takes no gradient.
        grid: (H, W) of the N positions; of no account without a code.
        blocks: At least one.
        clamp: Soft clamp of the log-scale.
    Returns:
        Outputs (B, N, C), and the log-determinant of each position, (B, N).
    """
    kind = x.device.type
    # Under autocast the subnets run in its type; all else keeps the features' own.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    position = _Position(code, grid)
    with torch.autocast(kind, enabled=False):
        if not torch.is_grad_enabled():
            return _forward(x, position, blocks, clamp, dtype, keep=False)[:2]
        weights = [weight for block in blocks for weight in block]
        out, log_det = _Couple.apply(x, position, clamp, dtype, *weights)
        return out, log_det


class _Position:
    """What the code of each position adds to a subnet's hidden layer; see :func:`couple`."""

    def __init__(self, code: Tensor | None, grid: tuple[int, int]) -> None:
        self.code, self.grid = code, grid
        if code is not None:
            places, self.half = code.view(*grid, -1), code.shape[-1] // 2
            self.columns, self.rows = places[0, :, : self.half], places[:, 0, self.half :]

    def share(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Compute it from the code's weight, (hidden, P): (N, hidden); without a code the bias alone."""
        if self.code is None:
            return bias
        for_columns, for_rows = weight.split(self.half, 1)
        by_row = F.linear(self.rows, for_rows, bias)
        return (by_row[:, None] + F.linear(self.columns, for_columns)).flatten(0, 1)

    def share_gradients(self, grad_share: Tensor, grad_weight: Tensor) -> Tensor:
        """Write the gradient of the code's weight into grad_weight, (hidden, P); return that of the bias."""
        if self.code is None:
            return grad_share
        places = grad_share.view(*self.grid, -1)
        by_row = places.sum(1)
        for_columns, for_rows = grad_weight.split(self.half, 1)
        torch.mm(places.sum(0).T, self.columns.to(places.dtype), out=for_columns)
        torch.mm(by_row.T, self.rows.to(places.dtype), out=for_rows)
        return by_row.sum(0)


def _part_size(x: Tensor, width: int, dtype: torch.dtype) -> int:
    """Return how many rows of (B * N, C) to take at a time: those of some images, whole ones.

    On a processor a wide hidden layer of a whole batch is larger than the caches, and each pass over it would
    wait for memory. Other devices take all at once, and so do subnets in half precision: their gradients
    would lose digits where parts are added up.
    """
    images, positions, _ = x.shape
    if x.device.type == "cpu" and dtype == x.dtype:
        images = min(images, _CACHED_NUMBERS // (width * positions))
    return max(images, 1) * positions


def _in_type(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Cast where there is need; a call that does nothing is not free either."""
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


class _Global(NamedTuple):
    """Of all L blocks, from their global scales and offsets and their subnets' last biases."""

    gain: Tensor  # g, (L, C)
    shift: Tensor  # o / g, (L, C)
    bias_u: Tensor  # twice the scaled bias of u, (L, C // 2), or (L, 0): additive
    bias_t: Tensor  # the scaled bias of t, and the shift of these channels, (L, C // 2)

    @classmethod
    def of(cls, blocks: Sequence[BlockWeights]) -> _Global:
        gain = 0.1 * F.softplus(torch.cat([block.global_scale for block in blocks]), beta=0.5)
        shift = torch.cat([block.global_offset for block in blocks]).div_(gain)
        bias = torch.stack([block.last_bias for block in blocks]).mul_(_SUBNET_SCALE)
        active = gain.shape[1] // 2
        bias_u, bias_t = bias.split([bias.shape[1] - active, active], 1)
        return cls(gain, shift, 2 * bias_u, bias_t + shift[:, -active:])


class _Kept(NamedTuple):
    """What the backward pass of a block needs, rows for (B * N)."""

    x: Tensor  # (rows, C)
    hidden: Tensor  # (rows, hidden), after the ReLU
    gate: Tensor  # sigmoid(2u), (rows, C // 2), or (rows, 0): additive
    scale: Tensor  # exp(s), likewise
    y: Tensor  # y + o / g, (rows, C)
    rotation: Tensor  # R diag(g), (C, C)


def _forward(
    x: Tensor,
    position: _Position,
    blocks: Sequence[BlockWeights],
    clamp: float,
    dtype: torch.dtype,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, list[_Kept], _Global]:
    """Map x; return also what a backward pass needs, where it is to be kept."""
    channels, active, width = x.shape[-1], x.shape[-1] // 2, len(blocks[0].first)
    halves, of_u = [channels - active, active], len(blocks[0].last) - active
    flat = x.reshape(-1, channels)
    rows, size = len(flat), _part_size(x, width, dtype)
    every = _Global.of(blocks)
    log_dets = flat.new_empty(len(blocks), rows)
    raw = flat.new_empty(rows, of_u + active, dtype=dtype)
    kept: list[_Kept] = []
    constants = zip(*every, log_dets, strict=True)
    for number, (block, constant) in enumerate(zip(blocks, constants, strict=True)):
        gain, shift, bias_u, bias_t, log_det = constant
        if keep or number == 0:
            hidden = flat.new_empty(rows if keep else min(size, rows), width, dtype=dtype)
            gate, y = flat.new_empty(rows, of_u), torch.empty_like(flat)
        weight1, for_code = block.first.split([halves[0], block.first.shape[1] - halves[0]], 1)
        share = position.share(for_code, block.first_bias)
        x1, x2 = flat.split(halves, 1)
        inputs, weight1, weight2, share = _in_type(dtype, x1, weight1, block.last, share)
        places = hidden.split(size) if keep else repeat(hidden)
        for given, result, place in zip(inputs.split(size), raw.split(size), places, strict=False):
            part = place[: len(given)]
            # The product adds to what it finds: one pass less than to add afterwards.
            part.view(-1, *share.shape).copy_(share)
            part.addmm_(given, weight1.T).relu_()
            result.addmm_(part, weight2.T, beta=0, alpha=_SUBNET_SCALE)
        raw_u, raw_t = (raw if raw.dtype == x.dtype else raw.to(x.dtype)).split([of_u, active], 1)
        # tanh(u) is 2 sigmoid(2u) - 1, which PyTorch computes three times as fast on a processor.
        torch.add(bias_u, raw_u, alpha=2, out=gate).sigmoid_()
        s = torch.rsub(gate, -clamp, alpha=-2 * clamp)
        torch.sum(s, 1, out=log_det)
        scale = s.exp_()
        y1, y2 = y.split(halves, 1)
        torch.add(x1, shift[: halves[0]], out=y1)
        moved = torch.addcmul(raw_t, x2, scale, out=y2) if of_u else torch.add(raw_t, x2, out=y2)
        moved.add_(bias_t)
        rotation = block.rotation * gain
        # Without a backward pass the last block's outputs have served once they are in y.
        out = torch.mm(y, rotation.T, out=flat if number and not keep else torch.empty_like(y))
        if keep:
            kept.append(_Kept(flat, hidden, gate, scale, y, rotation))
        flat = out
    log_det = log_dets.sum(0).add_(every.gain.log().sum())
    return flat.view(x.shape), log_det.view(x.shape[:2]), kept, every


class _Couple(torch.autograd.Function):
    """The chain with gradients worked out by hand; see the module's text."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, position: _Position, clamp: float, dtype: torch.dtype, *weights: Tensor
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
        """Compute the gradients of x and of the blocks' weights but for their rotations."""
        *saved, global_scale, gain, shift = ctx.saved_tensors
        n_kept, n_blocks, dtype = len(_Kept._fields), ctx.n_blocks, ctx.dtype
        kept = [_Kept(*saved[i : i + n_kept]) for i in range(0, n_kept * n_blocks, n_kept)]
        firsts, lasts = saved[n_kept * n_blocks :: 2], saved[n_kept * n_blocks + 1 :: 2]
        channels, active, width = ctx.shape[-1], ctx.shape[-1] // 2, len(firsts[0])
        halves, of_u = [channels - active, active], len(lasts[0]) - active
        of_first = [halves[0], firsts[0].shape[1] - halves[0]]

        grad = grad_out.reshape(-1, channels)
        rows, size = len(grad), _part_size(kept[0].x.view(ctx.shape), width, dtype)
        grad_y, spare = torch.empty_like(kept[0].y), torch.empty_like(kept[0].y)
        grad_raw = grad.new_empty(rows, of_u + active)
        grad_hidden, is_open = grad.new_empty(2, min(size, rows), width, dtype=dtype)
        sums, dots = grad.new_empty(2, n_blocks, channels)
        sums_u = grad.new_empty(n_blocks, of_u)
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
            grad_u, grad_t = grad_raw.split([of_u, active], 1)
            grad_t.copy_(grad_x2)
            if of_u:
                grad_x2.mul_(own.scale)
                torch.addcmul(steep_log_det, grad_x2, x2, value=slope, out=grad_u)
                grad_u.mul_(1 - own.gate).mul_(own.gate)
                torch.sum(grad_u, 0, out=sums_u[number])

            inputs, weight1, weight2, given = _in_type(dtype, x1, first[:, : halves[0]], last, grad_raw)
            grad_first = grad.new_empty(first.shape, dtype=dtype)
            # Transposed: a product with the longer side first is a sixth faster.
            grad_last = grad.new_empty((width, len(last)), dtype=dtype)
            grad_weight1, grad_code = grad_first.split(of_first, 1)
            share = (width,) if ctx.position.code is None else (ctx.shape[1], width)
            grad_share = grad.new_zeros(share, dtype=dtype)
            parts = (each.split(size) for each in (own.hidden, given, inputs, grad_x1))
            for part, (hidden, given_, inputs_, grad_x1_) in enumerate(zip(*parts, strict=True)):
                so_far = min(part, 1)
                grad_last.addmm_(hidden.T, given_, beta=so_far, alpha=_SUBNET_SCALE)
                grad_part = grad_hidden[: len(hidden)].addmm_(given_, weight2, beta=0, alpha=_SUBNET_SCALE)
                grad_part.mul_(torch.sign(hidden, out=is_open[: len(hidden)]))
                grad_weight1.addmm_(grad_part.T, inputs_, beta=so_far)
                if number or ctx.needs_input_grad[0]:
                    if dtype == grad.dtype:
                        grad_x1_.addmm_(grad_part, weight1)
                    else:
                        grad_x1_.add_(grad_part @ weight1)
                images = grad_part.view(-1, *share)
                # A few are added faster one by one.
                for image in images.sum(0, keepdim=True) if len(images) > 4 else images:
                    grad_share.add_(image)
            grad_first_bias = ctx.position.share_gradients(grad_share, grad_code)
            of_subnets.append(_in_type(grad.dtype, grad_first, grad_first_bias, grad_last.T))
            grad, grad_y, spare = grad_y, spare, grad_y

        grad_gain = dots.addcmul_(shift, sums, value=-1).add_(grad_log_det.sum()).div_(gain)
        grad_global_scale = torch.sigmoid(0.5 * global_scale).mul_(0.1).mul_(grad_gain)
        grad_offset = sums / gain
        grad_last_bias = torch.cat([sums_u, sums[:, halves[0] :]], 1).mul_(_SUBNET_SCALE)
        grads: list[Tensor | None] = []
        for number, (grad_first, grad_first_bias, grad_last) in enumerate(reversed(of_subnets)):
            grads += grad_first, grad_first_bias, grad_last, grad_last_bias[number]
            grads += grad_global_scale[number : number + 1], grad_offset[number : number + 1], None
        return grad.view(ctx.shape), None, None, None, *grads
