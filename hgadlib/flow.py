r"""Normalizing flows over feature maps, on FrEIA's framework.

A flow is a FrEIA ``SequenceINN`` of affine-coupling blocks that act on channel-last features
(B, H*W, C), so that one position is one sample of the density. Two subnets are to be had: the paper's
two-layer perceptron with the position code as condition (App. C), and FastFlow's convolution over the grid
(the Sec. 3.2 baseline).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from FrEIA.framework import SequenceINN
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from hgadlib.coupling import ConvolutionalCoupling, PositionalCoupling, chain


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


class FixedAffine(InvertibleModule):
    r"""A linear map that is set from data once and then kept: z = (x - mean) W^T.

    It standardises or whitens the features before the first coupling, as a data-dependent ActNorm
    would. Identity until :meth:`fit` is called.
    """

    def __init__(self, dims_in: Sequence[tuple[int, ...]]) -> None:
        super().__init__(dims_in)
        channels = dims_in[0][0]
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("weight", torch.eye(channels))
        self.register_buffer("inverse_weight", torch.eye(channels))
        self.register_buffer("log_det", torch.zeros(()))

    def fit(self, mean: Tensor, covariance: Tensor, *, whiten: bool, floor: float = 1e-3) -> None:
        """Set the map from the features' moments.

        Args:
            mean: (C,).
            covariance: (C, C).
            whiten: Decorrelate the channels (symmetric whitening); otherwise only scale each one.
            floor: Least variance, as a share of the mean variance; keeps dead channels finite.
        """
        covariance = covariance.double()
        least = floor * covariance.diagonal().mean()
        if whiten:
            variance, axes = torch.linalg.eigh(covariance)
        else:
            variance, axes = (
                covariance.diagonal(),
                torch.eye(len(mean), dtype=torch.float64, device=mean.device),
            )
        deviation = (variance.clamp_min(0) + least).sqrt()
        self.mean.copy_(mean)
        self.weight.copy_((axes / deviation) @ axes.T)
        self.inverse_weight.copy_((axes * deviation) @ axes.T)
        self.log_det.copy_(-deviation.log().sum())

    def forward(
        self, x_or_z: Iterable[Tensor], c: Iterable[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """Map (B, N, C) to (B, N, C); the log-determinant is one constant."""
        (x,) = x_or_z
        with torch.autocast(x.device.type, enabled=False):
            if rev:
                return (F.linear(x, self.inverse_weight) + self.mean,), -self.log_det
            return (F.linear(x, self.weight, -(self.weight @ self.mean)),), self.log_det

    def output_dims(self, input_dims: list[tuple[int]]) -> list[tuple[int]]:
        """Keep the shape."""
        return input_dims


class FeatureFlow(nn.Module):
    """The flow of one feature level: (B, H*W, C) features to latents and log-determinants.

    Args:
        channels: C.
        grid: (H, W).
        kind: "positional" (CFLOW's and HGAD's flow) or "convolutional" (FastFlow's).
        layers: Coupling blocks.
        position_dim: Channels P of the position code; 0 for none. Convolutional flows have none.
        hidden: Hidden width of the subnets; None for twice (positional) or once (convolutional) their input.
        clamp: Soft clamp of the log-scale.
        normalise: Put a fixed affine map in front, to be set from the training features.
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
    ) -> None:
        super().__init__()
        self.grid = grid
        self.inn = SequenceINN(channels)
        if normalise:
            self.inn.append(FixedAffine)
        positions = None
        if kind == "positional" and position_dim:
            positions = positional_encoding_2d(position_dim, *grid).flatten(1).T.contiguous()
        self.register_buffer("positions", positions, persistent=False)
        for layer in range(layers):
            if kind == "convolutional":
                # FastFlow alternates large and small kernels.
                kernel_size = 1 if layer % 2 else 3
                self.inn.append(
                    ConvolutionalCoupling, grid=grid, kernel_size=kernel_size, clamp=clamp, hidden=hidden
                )
            elif positions is None:
                self.inn.append(PositionalCoupling, clamp=clamp, hidden=hidden)
            else:
                self.inn.append(
                    PositionalCoupling,
                    cond=0,
                    cond_shape=(position_dim,),
                    clamp=clamp,
                    hidden=hidden,
                    grid=grid,
                )

    @property
    def normaliser(self) -> FixedAffine | None:
        """The fixed affine map in front, where there is one."""
        first = self.inn[0]
        return first if isinstance(first, FixedAffine) else None

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map features to latents.

        Args:
            features: (B, H*W, C), float32 or float64.

        Returns:
            Latents z, (B, H*W, C), and log |det dz/dx| in nats, (B, H*W).
        """
        blocks = [block for block in self.inn if isinstance(block, PositionalCoupling)]
        if not blocks:
            z, log_det = self.inn(features, c=[self.positions])
            return z, log_det
        # What FrEIA's sequence would do block by block, in one go.
        if self.normaliser is None:
            return chain(blocks, features, self.positions)
        (x,), constant = self.normaliser((features,))
        z, log_det = chain(blocks, x, self.positions)
        return z, log_det + constant

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latents (B, H*W, C) back to features, with log |det dx/dz|, (B, H*W)."""
        x, log_det = self.inn(z, c=[self.positions], rev=True)
        return x, log_det
