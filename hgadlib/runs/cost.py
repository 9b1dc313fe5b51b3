"""What one image costs: multiply-adds by PyTorch's counter, and parameters (paper Tab. 5).

One multiply-add is a multiplication and an addition, two FLOPs. Counted are the matrix products and
convolutions; element-wise work (activations, exponentials, normalisation) is not, as in every count of this
kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hgadlib.features.backbone import Backbone, flatten_maps
from hgadlib.method import Method


def _addmm(total: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _mv(matrix: Sequence[int], vector: Sequence[int], **_: Any) -> int:
    return 2 * matrix[0] * matrix[1]


# The counter sees into our autograd functions, but knows neither products that add in place nor products
# with a vector: without the first, most of the subnets would be missing.
_UNKNOWN_TO_TORCH = {torch.ops.aten.addmm_: _addmm, torch.ops.aten.mv: _mv}


def count_multiply_adds(call: Callable[[], object]) -> int:
    """Count the multiply-adds of the products and convolutions in a call, its backward passes included.

    >>> a, b = torch.zeros(2, 3), torch.zeros(3, 5)
    >>> count_multiply_adds(lambda: torch.zeros(2, 5).addmm_(a, b))
    30
    """
    with FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as counter:
        call()
    # The counter doubles every multiply-add.
    return counter.get_total_flops() // 2


@torch.no_grad()
def cost(backbone: Backbone, model: Method, image_size: int) -> dict[str, dict[str, int]]:
    """Count what one image costs from pixels to values, and what is learnt and kept.

    Returns:
        "multiply_adds" of "backbone" and "method", and "numbers": parameters of the "backbone", parameters
        "learnt" by the method, and what it has "stored" beside them, such as a bank of features.
    """
    images = torch.zeros(1, 3, image_size, image_size, device=model.device)
    maps: list[torch.Tensor] = []
    frozen = count_multiply_adds(lambda: maps.extend(backbone(images)))
    features, own = flatten_maps(maps), torch.zeros(1, dtype=torch.int64, device=model.device)
    model.level_values(features, own)  # what is prepared once is no image's
    scored = count_multiply_adds(lambda: model.level_values(features, own))
    return {
        "multiply_adds": {"backbone": frozen, "method": scored},
        "numbers": {
            "backbone": sum(p.numel() for p in backbone.parameters()),
            "learnt": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "stored": sum(b.numel() for b in model.buffers()),
        },
    }
