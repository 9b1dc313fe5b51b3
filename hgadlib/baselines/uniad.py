"""UniAD: a transformer that rebuilds features from those farther off (You et al., NeurIPS 2022).

As published: stages brought to the coarsest one's grid, features jittered in training, an encoder and a
decoder whose attentions all mask a neighbourhood, a query for each position in each layer of the decoder,
learnt positions, the squared error as loss, its root as map. Not as published: the backbone is this library's
(EfficientNet-B4 there), the optimiser Adam (AdamW there), the map blurred before the maximum is an image's
score (mean over 16 x 16 pixels there). Smaller than published, by its experiment: 2 layers of 128 channels
(4 of 256), fewer steps, no dropout of the attentions' weights, which is slow on a processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hgadlib.baselines.baseline import Baseline
from hgadlib.config import BaselineConfig
from hgadlib.errors import InputError
from hgadlib.scoring import LevelValues

WINDOW = 7
"""Positions a side of the neighbourhood that an attention does not see."""
JITTER = 20.0
"""Deviation of the noise on a feature in training, times its norm over its number of channels."""
HEADS = 8
"""Heads of an attention."""
_DROPOUT = 0.1
_WIDENING = 4  # hidden width of a feed-forward layer over its width


class UniAD(Baseline):
    r"""Features rebuilt from features elsewhere; anomalous ones are rebuilt as normal ones.

    .. math:: s = \lVert \hat f(f_{\text{elsewhere}}) - f \rVert_2

    The values are -s, on the grid of the last level, to which the others are brought.

    Args:
        classes: Names of the K classes; it does not use them.
        channels: C of each level of features.
        grids: (H, W) of each level.
        baseline: Of it the width and the number of layers, of encoder and decoder each.
    Raises:
        InputError: The heads do not divide the width, or a neighbourhood covers the grid.
    Source: UniAD (You et al., 2022), Sec. 3.
    """

    def __init__(
        self,
        classes: Sequence[str],
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        *,
        baseline: BaselineConfig,
    ) -> None:
        super().__init__(classes, channels, grids, baseline=baseline, value_grids=[grids[-1]])
        width = baseline.width
        if width % HEADS:
            raise InputError(f"baseline.width: expected a multiple of {HEADS}, found {width}")
        (height, breadth), dim = self.value_grids[0], sum(self.channels)
        mask = neighbour_mask((height, breadth))
        if mask.all(1).any():
            raise InputError(
                f"uniad: expected a last level of more than {WINDOW} positions a side, found "
                f"{height} x {breadth}; take larger images (data.image_size) or finer stages "
                "(features.out_indices)"
            )
        self.mask: Tensor
        self.register_buffer("mask", mask, persistent=False)
        self.rows = nn.Parameter(torch.rand(height, width // 2))
        self.columns = nn.Parameter(torch.rand(breadth, width // 2))
        self.queries = nn.Parameter(torch.randn(baseline.layers, len(mask), width))
        self.inward, self.outward = nn.Linear(dim, width), nn.Linear(width, dim)
        self.encoder, self.decoder = (
            nn.ModuleList(
                nn.ModuleList([*(Attention(width) for _ in range(attentions)), FeedForward(width)])
                for _ in range(baseline.layers)
            )
            for attentions in (1, 2)
        )
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.eval()

    def joined(self, features: Sequence[Tensor]) -> Tensor:
        """Bring all levels to the last one's grid and join their channels: (B, h*w, C)."""
        maps = [
            F.interpolate(
                x.mT.unflatten(2, grid), self.value_grids[0], mode="bilinear", align_corners=True
            )
            for x, grid in zip(self.checked(features), self.grids, strict=True)
        ]  # fmt: skip
        return torch.cat(maps, 1).flatten(2).mT

    def rebuilt(self, x: Tensor) -> Tensor:
        """Rebuild joined features, (B, h*w, C), jittered first while it trains."""
        tokens = self.inward(jittered(x) if self.training else x)
        height, breadth = self.value_grids[0]
        rows, columns = self.rows[:, None].expand(-1, breadth, -1), self.columns.expand(height, -1, -1)
        position = torch.cat([columns, rows], 2).flatten(0, 1)
        for layer in self.encoder:
            attend, feed = cast(nn.ModuleList, layer)
            tokens = feed(attend(tokens, tokens, position, self.mask))
        out = tokens
        for layer, queries in zip(self.decoder, self.queries, strict=True):
            first, second, feed = cast(nn.ModuleList, layer)
            found = first(queries.expand_as(tokens), tokens, position, self.mask)
            out = feed(second(found, out, position, self.mask))
        return self.outward(self.norm(out))

    @torch.inference_mode()
    def level_values(
        self, features: Sequence[Tensor], class_idx: Tensor, *, entropy: bool = True
    ) -> LevelValues:
        """Compute minus the distance of features from rebuilt ones, as of :meth:`Method.level_values`."""
        x = self.joined(features)
        distance = (self.rebuilt(x) - x).norm(dim=2)
        return LevelValues((-distance.unflatten(1, self.value_grids[0]),), ())

    def losses(
        self,
        features: Sequence[Tensor],
        class_idx: Tensor,
        *,
        precision: torch.dtype = torch.float32,
        **settings: Any,
    ) -> list[dict[str, Tensor]]:
        """Compute the mean squared error of rebuilt features.

        Args:
            features: One (B, H*W, C) a level.
            class_idx: (B,), not used.
            precision: bfloat16 runs the layers under autocast.
            **settings: Of other methods.
        """
        x = self.joined(features)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            rebuilt = self.rebuilt(x)
        return [{"total": F.mse_loss(rebuilt.float(), x)}]


class Attention(nn.Module):
    """Attention over positions, with what it starts from added and normalised.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.dropout, self.norm = nn.Dropout(_DROPOUT), nn.LayerNorm(width)

    def forward(self, x: Tensor, source: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """Add to x (B, N, C) what it finds in a source (B, N, C); True in mask (N, N) hides from a row."""
        query, key = x + position, source + position
        found, _ = self.attention(query, key, source, attn_mask=mask, need_weights=False)
        return self.norm(x + self.dropout(found))


class FeedForward(nn.Module):
    """Two linear layers on each position, with what they start from added and normalised.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = _WIDENING * width
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(_DROPOUT), nn.Linear(hidden, width),
            nn.Dropout(_DROPOUT),
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, N, C)."""
        return self.norm(x + self.layers(x))


def neighbour_mask(grid: tuple[int, int], window: int = WINDOW) -> Tensor:
    """Mark the positions in the window about each position, itself among them.

    Args:
        grid: (h, w).
        window: Positions a side, odd.
    Returns:
        (h*w, h*w) bool, a row for each position.

    Example:
        >>> neighbour_mask((1, 4), window=3).int().tolist()
        [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    """
    place = torch.cartesian_prod(*(torch.arange(side) for side in grid))
    return (place[:, None] - place).abs().amax(2) <= window // 2


def jittered(x: Tensor) -> Tensor:
    """Add noise to features, (B, N, C), in proportion to the norm of each, by torch's global generator."""
    return x + torch.randn_like(x) * (x.norm(dim=2, keepdim=True) * (JITTER / x.shape[2]))
