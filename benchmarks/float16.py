"""What features in float16 do to the metrics: the same small run on float32 and on float16 features.

Run it as ``python benchmarks/float16.py``; it prints JSON lines. Data, seed, weights and batches are the
same; settings are those of params/grids/ablations.yaml on the base of its rows, with fewer epochs. Nothing is
timed.
"""

from __future__ import annotations

import argparse
from typing import Any

import harness
import yaml
from harness import emit, environment

from hgadlib.config import load_config, project_dir
from hgadlib.runs.experiment import build_model, evaluate_model
from hgadlib.runs.inputs import prepare
from hgadlib.training import fit

NAME = "float16"


def run(args: argparse.Namespace, seed: int, dtype: str) -> dict[str, float | None]:
    """Train and evaluate on features of one number type; give the mean metrics."""
    grid: dict[str, Any] = yaml.safe_load((project_dir() / "params/grids/ablations.yaml").read_text())
    overrides = {**grid["overrides"], "train.epochs": args.epochs, "features.dtype": dtype}
    config = load_config(
        dataset=args.dataset,
        data_root=args.data_root,
        seed=seed,
        device="cpu",
        base="tables",
        overrides=overrides,
    )
    inputs = prepare(config, progress=False)
    model = build_model(config, inputs)
    fit(
        model, inputs.train, inputs.train_classes, train=config.train, loss=config.loss, seed=seed,
        progress=False,
    )  # fmt: skip
    return evaluate_model(config, inputs, model, all_protocols=False).evaluation.mean


def main() -> None:
    """Run each seed on both number types."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--data-root", help="the dataset's folder, where it is not the usual one")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    harness.add_arguments(parser)
    args = parser.parse_args()
    harness.apply_arguments(args)
    emit(NAME, "environment", **environment(clock=args.clock), dataset=args.dataset, epochs=args.epochs)
    for seed in args.seeds:
        found = {dtype: run(args, seed, dtype) for dtype in ("float32", "float16")}
        for dtype, mean in found.items():
            emit(NAME, "metrics", seed=seed, dtype=dtype, **mean)
        half, single = found["float16"], found["float32"]
        pairs = {name: (half[name], single[name]) for name in half}
        differences = {name: a - b for name, (a, b) in pairs.items() if a is not None and b is not None}
        emit(NAME, "float16_minus_float32", seed=seed, **differences)


if __name__ == "__main__":
    main()
