r"""Normalizing flows over feature maps, on FrEIA's framework.

A flow is a FrEIA ``SequenceINN`` that acts on channel-last features (B, H*W, C), so that one position is one
sample of the density: a fixed whitening, then coupling blocks. Two subnets are to be had: the paper's
two-layer perceptron with the position code as condition (App. C), and FastFlow's convolution over the grid
(the Sec. 3.2 baseline).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from FrEIA.framework import SequenceINN
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from hgadlib.errors import InputError
from hgadlib.fast.coupling import BlockWeights, couple

# FrEIA scales every subnet output by this factor, so that a fresh flow is close to a rotation.
_SUBNET_SCALE = 0.1
# softplus with beta 0.5 and gain 0.1 maps this pre-activation to a global scale of exactly 1.
_UNIT_GLOBAL_SCALE = 2.0 * math.log(math.exp(5.0) - 1.0)


def positional_encoding_2d(dim: int, height: int, width: int) -> Tensor:
    """Build the sinusoidal code of a grid: half of the channels code the column, half the row.

    Args:
        dim: Channels P, a multiple of 4.
        height: Rows H.
        width: Columns W.
    Returns:
        Code, (P, H, W) float32.
    Raises:
        ValueError: dim is not a positive multiple of 4.
    Source: paper Fig. 3 and App. C (after CFLOW-AD).

    >>> positional_encoding_2d(4, 1, 2)[:, 0, 1].round(decimals=2).tolist()
    [0.8399999737739563, 0.5400000214576721, 0.0, 1.0]
    """
    if dim <= 0 or dim % 4:
        raise ValueError(f"expected a position dimension that is a positive multiple of 4, found {dim}")
    frequency = torch.exp(torch.arange(0, dim // 2, 2) * -(math.log(1e4) / (dim // 2)))

    def axis_code(length: int) -> Tensor:
        phase = torch.arange(length)[:, None] * frequency
        return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(1).T

    columns = axis_code(width)[:, None, :].expand(-1, height, -1)
    rows = axis_code(height)[:, :, None].expand(-1, -1, width)
    return torch.cat([columns, rows]).contiguous()


class Moments:
    """Mean and covariance of rows that arrive batch by batch.

    Args:
        dim: D.

    Example:
        >>> moments = Moments(1)
        >>> for part in ([[1.0], [2.0]], [[6.0]]):
        ...     moments.add(torch.tensor(part))
        >>> moments.mean.tolist(), moments.covariance.tolist()
        ([3.0], [[7.0]])
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.shift: Tensor | None = None
        self.sums = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows, (N, D). Products are taken about the first batch's mean, so none is large."""
        if self.shift is None:
            self.shift = rows.mean(0)
        centred = rows - self.shift
        self.count += len(rows)
        # On the host: some devices have no float64.
        self.sums += centred.sum(0).cpu().double()
        self.products += (centred.T @ centred).cpu().double()

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        if self.shift is None:
            raise ValueError("expected at least one batch of training images, found none")
        return self.shift.cpu().double() + self.sums / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased."""
        mean = self.sums / self.count
        return (self.products - self.count * torch.outer(mean, mean)) / max(self.count - 1, 1)


def kept_channels(channels: int, keep: float) -> int:
    """Return how many of C directions a share of them is: at least 2, which can be coupled."""
    return min(channels, max(2, round(keep * channels)))


class FixedAffine(InvertibleModule):
    r"""A linear map that is set from data once and then kept: z = (x - mean) W^T.

    It standardises or whitens the features before the first coupling, as a data-dependent ActNorm
    would. Identity until :meth:`fit` is called.

    Args:
        dims_in: ``[(C,)]``.
        keep: Share of the directions to keep, those of least variance. Below 1 z has D < C channels, the
            log-determinant is that of the D kept directions, so that densities are of the features'
            projection on them, and there is no way back.
    """

    def __init__(self, dims_in: Sequence[tuple[int, ...]], keep: float = 1.0) -> None:
        super().__init__(dims_in)
        channels = dims_in[0][0]
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("weight", torch.eye(channels)[: kept_channels(channels, keep)].clone())
        if len(self.weight) == channels:
            self.register_buffer("inverse_weight", torch.eye(channels))
        self.register_buffer("log_det", torch.zeros(()))

    def fit(self, mean: Tensor, covariance: Tensor, *, whiten: bool, shrinkage: float = 1e-3) -> None:
        """Set the map from the features' moments.

        Args:
            mean: (C,).
            covariance: (C, C).
            whiten: Decorrelate the channels (symmetric whitening, or on the kept principal axes); otherwise
                only scale each one, and keep all.
            shrinkage: Variance added to every direction, as a share of the mean variance; keeps dead channels
                finite.
        """
        covariance = covariance.double()
        least = shrinkage * covariance.diagonal().mean()
        if whiten:
            variance, axes = torch.linalg.eigh(covariance)
        else:
            variance, axes = covariance.diagonal(), torch.eye(len(covariance)).to(covariance)
        deviation = (variance.clamp_min(0) + least).sqrt()
        self.mean.copy_(mean)
        if (kept := len(self.weight)) < len(variance):  # the first ones: eigh sorts them
            axes, deviation = axes[:, :kept], deviation[:kept]
            self.weight.copy_((axes / deviation).T)
        else:
            self.weight.copy_((axes / deviation) @ axes.T)
            self.inverse_weight.copy_((axes * deviation) @ axes.T)
        self.log_det.copy_(-deviation.log().sum())

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """Map (B, N, C) to (B, N, D); the log-determinant is one constant.

        Raises:
            InputError: The way back from D < C channels is asked for.
        """
        (x,) = x_or_z
        kept, channels = self.weight.shape
        if rev and kept < channels:
            raise InputError(
                f"expected a flow of all {channels} directions to invert, found one that keeps {kept}; set "
                "flow.keep to 1"
            )
        with torch.autocast(x.device.type, enabled=False):
            if rev:
                return (F.linear(x, self.inverse_weight) + self.mean,), -self.log_det
            return (F.linear(x, self.weight, -(self.weight @ self.mean)),), self.log_det

    def output_dims(self, input_dims: list[tuple[int]]) -> list[tuple[int]]:
        """Return the kept directions."""
        return [(len(self.weight),)]

    def extra_repr(self) -> str:
        """Name the channels, and how many are kept where not all are."""
        kept, channels = self.weight.shape
        return f"channels={channels}" + (f", kept={kept}" if kept < channels else "")


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


class AffineCoupling(InvertibleModule):
    r"""Affine coupling, then a global scaling and a fixed rotation; the two subnets are below.

    With halves :math:`x_1, x_2`, the subnet's outputs (u, t), and gain g and offset o of each channel,

    .. math:: s = \alpha\tanh u,\quad y = \bigl(x_1,\; x_2\odot e^{s} + t\bigr),\quad
              z = R\,(g\odot y + o),\quad \log|\det J| = \textstyle\sum s + \sum\log g .

    Parameter names and arithmetic are those of FrEIA's ``AllInOneBlock`` (soft clamping,
    ``SOFTPLUS`` global affine, soft permutation), so states are interchangeable. An additive block's subnet
    gives t alone and s is 0: its log-determinant is the same at all positions.

    Source: paper Eq. 4 (Real-NVP); NICE for the additive one.
    """

    def __init__(self, dims_in: Sequence[tuple[int, ...]], clamp: float, additive: bool = False) -> None:
        super().__init__(dims_in)
        channels = dims_in[0][0]
        if channels < 2:
            raise ValueError(f"expected at least 2 channels to couple, found {channels}")
        self.splits = (channels - channels // 2, channels // 2)
        self.outputs = self.splits[1] * (1 if additive else 2)
        self.clamp = clamp
        self.global_scale = nn.Parameter(torch.full((1, channels), _UNIT_GLOBAL_SCALE))
        self.global_offset = nn.Parameter(torch.zeros(1, channels))
        self.register_buffer("w_perm", random_rotation(channels))
        self.register_load_state_dict_pre_hook(_drop_inverse_rotation)

    @property
    def gain(self) -> Tensor:
        """Global scale g of each channel, (1, C), positive."""
        return 0.1 * F.softplus(self.global_scale, beta=0.5)

    def coefficients(self, x1: Tensor, condition: Tensor | None) -> Tensor:
        """Predict the unscaled (u, t), or t alone, from the passive half (B, N, C - C // 2).

        Returns:
            (B, N, 2 * (C // 2)), or (B, N, C // 2) of an additive block.
        """
        raise NotImplementedError

    def scale_and_shift(self, x1: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the clamped log-scale s and the shift t of Eq. 4, each (B, N, C // 2)."""
        *u, t = (_SUBNET_SCALE * self.coefficients(x1, condition)).split(self.splits[1], dim=-1)
        # Under autocast the subnet may answer in bfloat16; the density is summed in the features' own type.
        t = t.to(x1.dtype)
        return self.clamp * torch.tanh(u[0].to(x1.dtype)) if u else torch.zeros_like(t), t

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
            # (y * gain + offset) R^T as one product: the scaling is folded into the rotation.
            out = F.linear(out, self.w_perm * gain, (self.w_perm @ self.global_offset[0]))
        return (out,), s.sum(-1) + global_log_det

    def output_dims(self, input_dims: list[tuple[int]]) -> list[tuple[int]]:
        """Keep the shape."""
        return input_dims

    def extra_repr(self) -> str:
        """Name the channels and the clamp."""
        return f"channels={sum(self.splits)}, clamp={self.clamp:g}"


def _activation(dropout: float) -> nn.Module:
    """Make what stands between the two layers of a subnet; with dropout, too, one module: names stay."""
    return nn.Sequential(nn.ReLU(), nn.Dropout(dropout)) if dropout else nn.ReLU()


def _drop_inverse_rotation(block: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Leave out what AllInOneBlock stores beside its rotation; the inverse is the transpose."""
    state.pop(prefix + "w_perm_inv", None)


class PositionalCoupling(AffineCoupling):
    """Affine coupling whose subnet is a two-layer perceptron of the features and their position.

    Args:
        dims_in: ``[(C,)]``.
        dims_c: ``[(P,)]`` where positions are given, empty where not.
        clamp: Soft clamp of the log-scale.
        hidden: Width of the hidden layer; None for twice the subnet's inputs, as published.
        additive: Shift only.
        dropout: Share of the hidden values dropped in training.
    Source: paper Eq. 4, App. C.
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, ...]],
        dims_c: Sequence[tuple[int, ...]] = (),
        *,
        clamp: float = 1.9,
        hidden: int | None = None,
        additive: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dims_in, clamp, additive)
        inputs = self.splits[0] + sum(dims[0] for dims in dims_c)
        hidden = hidden or 2 * inputs
        self.subnet = nn.Sequential(
            nn.Linear(inputs, hidden), _activation(dropout), nn.Linear(hidden, self.outputs)
        )

    def coefficients(self, x1: Tensor, condition: Tensor | None) -> Tensor:
        """See the base class; condition is the position code, (N, P), the same for every image."""
        if condition is not None:
            x1 = torch.cat([x1, condition.expand(x1.shape[0], -1, -1)], dim=-1)
        return self.subnet(x1)

    @property
    def weights(self) -> BlockWeights:
        """All that the block computes with."""
        first, _, last = cast("list[nn.Linear]", self.subnet)
        subnet = first.weight, first.bias, last.weight, last.bias
        return BlockWeights(*subnet, self.global_scale, self.global_offset, self.w_perm)


class ConvolutionalCoupling(AffineCoupling):
    """Affine coupling whose subnet is a two-layer convolution over the grid, as in FastFlow.

    Args:
        dims_in: ``[(C,)]``.
        grid: (H, W) of the features.
        kernel_size: Odd size of both kernels.
        clamp: Soft clamp of the log-scale.
        hidden: Channels of the hidden layer; None for the width of the passive half.
        additive: Shift only.
        dropout: Share of the hidden values dropped in training.
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
        additive: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dims_in, clamp, additive)
        self.grid = grid
        hidden = hidden or self.splits[0]
        self.subnet = nn.Sequential(
            nn.Conv2d(self.splits[0], hidden, kernel_size, padding=kernel_size // 2),
            _activation(dropout),
            nn.Conv2d(hidden, self.outputs, kernel_size, padding=kernel_size // 2),
        )

    def coefficients(self, x1: Tensor, condition: Tensor | None) -> Tensor:
        """See the base class; N is H*W of the grid, row-major."""
        maps = x1.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return self.subnet(maps).permute(0, 2, 3, 1).flatten(1, 2)


class FeatureFlow(nn.Module):
    """The flow of one feature level: (B, H*W, C) features to latents and log-determinants.

    Args:
        channels: C.
        grid: (H, W).
        kind: "positional" (CFLOW's and HGAD's flow) or "convolutional" (FastFlow's).
        layers: Coupling blocks; 0 for the fixed map alone, or the identity: nothing is learnt.
        position_dim: Channels P of the position code; 0 for none. Convolutional flows have none.
        hidden: Hidden width of the subnets; None for twice (positional) or once (convolutional) their input.
        clamp: Soft clamp of the log-scale.
        normalise: Put a fixed affine map in front, to be set from the training features.
        keep: Share of the directions that this map keeps; see :class:`FixedAffine`.
        coupling: "affine", or "additive": blocks that shift and do not scale.
        subnet_init: "zero" sets each subnet's last layer to 0: the flow starts as its fixed map, rotated.
        dropout: Share of the subnets' hidden values dropped in training.
    """

    positions: Tensor | None

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        *,
        kind: str = "positional",
        layers: int = 12,
        position_dim: int = 256,
        hidden: int | None = None,
        clamp: float = 1.9,
        normalise: bool = False,
        keep: float = 1.0,
        coupling: str = "affine",
        subnet_init: str = "default",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.kind, self.grid, self.dropout = kind, grid, dropout
        self.inn = SequenceINN(channels)
        if normalise:
            self.inn.append(FixedAffine, keep=keep)
        positions = None
        if kind == "positional" and position_dim:
            positions = positional_encoding_2d(position_dim, *grid).flatten(1).T.contiguous()
        self.register_buffer("positions", positions, persistent=False)
        code = {} if positions is None else {"cond": 0, "cond_shape": (position_dim,)}
        shared = {
            "clamp": clamp, "hidden": hidden, "additive": coupling == "additive", "dropout": dropout,
        }  # fmt: skip
        for layer in range(layers):
            if kind == "convolutional":
                # FastFlow alternates large and small kernels.
                kernel_size = 1 if layer % 2 else 3
                self.inn.append(ConvolutionalCoupling, grid=grid, kernel_size=kernel_size, **shared)
            else:
                self.inn.append(PositionalCoupling, **shared, **code)
            if subnet_init == "zero":
                for parameter in self.inn[-1].subnet[-1].parameters():
                    nn.init.zeros_(parameter)

    @property
    def normaliser(self) -> FixedAffine | None:
        """The fixed affine map in front, where there is one."""
        first = next(iter(self.inn), None)
        return first if isinstance(first, FixedAffine) else None

    def forward(
        self, features: Tensor, *, noise: float = 0.0, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map features to latents.

        Args:
            features: (B, H*W, C), float32 or float64; with rows (B, R*W, C).
            noise: Standard deviation of Gaussian noise behind the fixed map, in units of each channel's own
                over the batch; of torch's global generator.
            rows: Which rows of the grid the features are of, (R,) int64, for positional flows; None for all.
        Returns:
            Latents z, (B, H*W, C), and log |det dz/dx| in nats, (B, H*W). With directions left out z has
            fewer channels, and the determinant is of the kept ones' scales.
        """
        x, log_det = features, features.new_zeros(features.shape[:2])
        if self.normaliser is not None:
            (x,), constant = self.normaliser((features,))
            log_det = log_det + constant
        if noise:
            x = x + noise * x.std((0, 1), correction=0) * torch.randn_like(x)
        positions, grid = self.positions, self.grid
        if rows is not None:
            grid = (len(rows), self.grid[1])
            positions = None if positions is None else positions.unflatten(0, self.grid)[rows].flatten(0, 1)
        blocks = [block for block in self.inn if isinstance(block, AffineCoupling)]
        fusible = [block for block in blocks if isinstance(block, PositionalCoupling)]
        if fusible and not (self.dropout and self.training):
            # What the sequence above defines, its coupling blocks as one fused function.
            weights = [block.weights for block in fusible]
            z, of_blocks = couple(x, positions, grid, weights, fusible[0].clamp)
            return z, of_blocks + log_det
        for block in blocks:
            (x,), of_block = block((x,), [] if positions is None else [positions])
            log_det = of_block + log_det
        return x, log_det

    def noise_covariance(self, at: Tensor, variance: float) -> Tensor:
        r"""Return the latents' covariance that isotropic noise on a feature makes: :math:`v\,J J^\top`.

        The flow's slopes J = dz/dx are differences of the noise's size at the grid's first position: exact
        while the flow is linear, as one that starts as a rotation is.

        Args:
            at: The feature, (C,) on the flow's device; its neighbours are the same.
            variance: v, of every channel.
        Returns:
            (D, D) float64, on the host.
        """
        step = max(variance, 1e-12) ** 0.5
        rows = torch.zeros(1, dtype=torch.int64, device=at.device) if self.kind == "positional" else None
        width = self.grid[1] * (1 if rows is not None else self.grid[0])
        points = torch.cat([at[None], at + step * torch.eye(len(at), device=at.device)])
        z = torch.cat([self(x[:, None].expand(-1, width, -1), rows=rows)[0][:, 0] for x in points.split(16)])
        slopes = (z[1:] - z[0]).double().cpu()
        return slopes.T @ slopes

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latents (B, H*W, C) back to features, with log |det dx/dz|, (B, H*W)."""
        x, log_det = self.inn(z, c=[self.positions], rev=True)
        return x, z.new_zeros(z.shape[:2]) + log_det

    def extra_repr(self) -> str:
        """Name the kind and the grid."""
        return f"kind={self.kind}, grid={self.grid[0]}x{self.grid[1]}"
