"""Train and evaluate one run without a notebook: ``python -m hgadlib -p dataset demo``.

On several devices: ``torchrun --nproc-per-node N -m hgadlib -p dataset visa``. Parameters are those of
the train chapter, in papermill's words: -p NAME VALUE, -f FILE, -y YAML.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hgadlib.config import load_config, run_dir
from hgadlib.distributed import process_group
from hgadlib.errors import InputError
from hgadlib.experiment import evaluate_model, prepare, train_model
from hgadlib.runs import RunDirectory


def read_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Put the parameters of a command line together; later kinds win: -f, then -y, then -p.

    Raises:
        InputError: Something is not YAML, or holds no names with values.
    """
    given: dict[str, Any] = {}
    sources = [(str(path), _text(path)) for path in options.file] + [("-y", text) for text in options.yaml]
    for source, text in sources:
        values = _parse(text, source)
        if not isinstance(values, dict):
            raise InputError(f"{source}: expected names with values, found {values!r}")
        given |= values
    return given | {name: _parse(value, f"-p {name}") for name, value in options.parameter}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"-f {path}: expected a parameter file, found none that can be read ({error})"
        ) from None


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: expected YAML, found: {' '.join(str(error).split())}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and evaluate; 0 if all is well, 2 on wrong input, 1 if training diverged."""
    parser = argparse.ArgumentParser(
        prog="python -m hgadlib",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-p", dest="parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    parser.add_argument("-f", dest="file", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("-y", dest="yaml", action="append", default=[], metavar="YAML")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    # Torch says on machines without a GPU that it found none; a reader need not know.
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        config = load_config(read_parameters(options))
        with process_group(config.device) as (group, device):
            local = dataclasses.replace(config, device=device)
            progress = group.is_main and not options.quiet
            run = RunDirectory.open(local) if group.is_main else RunDirectory(run_dir(local), local)
            group.wait()
            inputs = prepare(local, progress=progress)
            model = train_model(local, inputs, run, progress=progress, group=group)
            if not group.is_main:
                return 0
            metrics = evaluate_model(local, inputs, model, run).metrics
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    mean = {name: value for name, value in metrics["mean"].items() if value is not None}
    print("  ".join(f"{name} {value:.4f}" for name, value in mean.items()))
    print(run.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
