"""Fewer images at a time where a device's memory does not hold so many."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from hgadlib.errors import InputError

T = TypeVar("T")


def in_parts(call: Callable[[slice], T], count: int, size: int | None = None) -> list[T]:
    """Call for all of some images, in parts that are halved for as long as the device runs out of memory.

    Args:
        call: Takes the part as a slice; what it gives must not depend on the part's size.
        count: Images.
        size: Of the first part; None for all.
    Returns:
        What each call gave, in order.
    Raises:
        InputError: There is not enough for one image.
    """
    size, start, found = size or max(count, 1), 0, []
    while start < count:
        try:
            found.append(call(slice(start, start + size)))
        except torch.OutOfMemoryError as error:
            if size == 1:
                why = " ".join(str(error).split())[:120]
                raise InputError(
                    f"the device's memory does not hold the work on one image ({why}); free some, lower "
                    "data.image_size, or take device cpu"
                ) from None
            size //= 2
        else:
            start += size
            continue
        # After the except clause, whose traceback holds on to the tensors.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found
