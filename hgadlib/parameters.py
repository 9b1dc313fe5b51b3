"""The names that a run's parameters may have, and the check of one value: name, type and range."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hgadlib.errors import InputError
from hgadlib.settings import RANGES, Config

_HINTS = typing.get_type_hints(Config)

SECTIONS: tuple[str, ...] = tuple(name for name, hint in _HINTS.items() if dataclasses.is_dataclass(hint))

SHORTCUTS: dict[str, str] = {
    "data_root": "data.root",
    "download": "data.download",
    "classes": "data.classes",
    "image_size": "data.image_size",
    "num_workers": "data.num_workers",
    "backbone": "features.backbone",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
}
"""Notebook parameters that stand for one key of a section."""

PLAIN: tuple[str, ...] = tuple(name for name in _HINTS if name not in SECTIONS)
PARAMETERS: tuple[str, ...] = (*PLAIN, *SHORTCUTS, *SECTIONS, "overrides")
"""Every name that ``papermill -p``, ``-y`` or ``-f`` may set."""

_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def unknown(name: str, known: Sequence[str], what: str) -> InputError:
    """Say that a name is not known, which is closest, and list all.

    Example:
        >>> print(unknown("elvp", ["demo", "elpv"], "dataset"))
        unknown dataset 'elvp' (did you mean elpv?); expected one of: demo, elpv
    """
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return InputError(f"unknown {what} {name!r}{hint}; expected one of: {', '.join(known)}")


def check_value(key: str, value: Any, source: str) -> Any:
    """Check a parameter's name, type and range.

    Args:
        key: Dotted name, such as "train.epochs", or a plain one, such as "seed".
        value: As YAML, JSON or a notebook gives it.
        source: Where it was found, for the error.

    Returns:
        The value in its declared type: lists become tuples, whole numbers floats where those are expected.

    Raises:
        InputError: The name is unknown, or the value is ill-typed or out of range.
    """
    section, _, name = key.rpartition(".")
    if section not in ("", *SECTIONS):
        raise unknown(section, SECTIONS, f"section in {source}")
    hints = typing.get_type_hints(_HINTS[section]) if section else {name: _HINTS[name] for name in PLAIN}
    if name not in hints:
        known = [f"{section}.{n}" if section else n for n in hints]
        raise unknown(key, known, f"parameter in {source}")
    try:
        typed = _typed(value, hints[name])
    except TypeError:
        raise InputError(
            f"ill-typed parameter {key} in {source}: expected {_type_text(hints[name])}, found {value!r}"
        ) from None
    low, high = RANGES.get(key, (-math.inf, math.inf))
    numbers = typed if isinstance(typed, tuple) else (typed,)
    if any(isinstance(number, (int, float)) and not low <= number <= high for number in numbers):
        raise InputError(
            f"parameter {key} in {source}: expected a value from {low:g} to {high:g}, found {value!r}"
        )
    return typed


def _type_text(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(option) for option in args)
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"a list of {count}{_type_text(args[0]).removeprefix('a ')}s"
    return _TYPE_NAMES[annotation]


def _typed(value: Any, annotation: Any) -> Any:
    """Give value in the annotated type, or raise TypeError."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _typed(value, option)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        raise TypeError
    if origin is tuple:
        fits = isinstance(value, (list, tuple)) and (len(value) == len(args) or args[-1] is Ellipsis)
        if not fits:
            raise TypeError
        return tuple(_typed(item, args[0]) for item in value)
    if annotation is float:
        return _number(value)
    if annotation is str and isinstance(value, Path):
        return str(value)
    # In Python True is also an int; here it is not.
    if isinstance(value, annotation) and not (annotation is int and isinstance(value, bool)):
        return value
    raise TypeError


def _number(value: Any) -> float:
    # YAML 1.1 reads 1e-3 as text, for want of a dot.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    try:
        number = float(value)
    except ValueError:
        raise TypeError from None
    if not math.isfinite(number):
        raise TypeError
    return number
