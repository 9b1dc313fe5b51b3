"""The ledger of runs: one small committed record per real run, `python -m hgadlib.ledger add RUN_DIR`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hgadlib.config import project_dir
from hgadlib.errors import InputError
from hgadlib.files import write_atomically
from hgadlib.run_files import read_config, read_history, read_metrics

_KEPT = ("schema", "dataset", "experiment", "seed", "protocol", "mean", "per_class", "best_epoch", "timing")


def record_of(run: Path, note: str = "") -> dict[str, Any]:
    """Put together the record of a whole run: figures, configuration, images, hardware; no path of a machine.

    Args:
        run: The run's directory.
        note: What a reader must know beside it, such as which images a folder held.

    Raises:
        InputError: The run is not whole.
    """
    metrics, config = read_metrics(run), read_config(run)
    data = json.loads((run / "data.json").read_text(encoding="utf-8"))
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return {
        **{key: metrics[key] for key in _KEPT},
        "note": note,
        "other_protocols": {name: found["mean"] for name, found in metrics["other_protocols"].items()},
        "memory": metrics["memory"],
        "counts": metrics["counts"],
        "epochs": len(read_history(run)),
        "config_digest": config.digest,
        "config": config.identity(),
        "data": data,
        "environment": environment,
    }


def add(run: Path, folder: Path, note: str = "") -> Path:
    """Write a run's record into the ledger.

    Args:
        run: The run's directory.
        folder: The ledger, results/runs.
        note: See :func:`record_of`.

    Returns:
        The record's file; the same run, added again, gives the same file.

    Raises:
        InputError: The run is not whole.
    """
    record = record_of(run, note)
    name = f"{record['dataset']}-{record['experiment']}-seed{record['seed']}"
    digests = f"{record['config_digest'][:8]}-{record['data']['digest'][:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{digests}.json"
    write_atomically(file, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return file


def read_ledger(folder: Path) -> pd.DataFrame:
    """List the ledger: a row per run, with its mean metrics, sorted by name."""
    rows = []
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        row = {key: record[key] for key in ("dataset", "experiment", "seed", "epochs")}
        row |= record["mean"] | {
            "train_s": record["timing"]["train_s"],
            "device": record["environment"]["device"],
        }
        rows.append(row | {"commit": record["environment"]["commit"], "record": file.name})
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all is well, 2 on wrong input."""
    parser = argparse.ArgumentParser(prog="python -m hgadlib.ledger", description="Records of real runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="write a finished run's record into results/runs")
    adding.add_argument("run", type=Path)
    adding.add_argument("--note", default="", help="which images a folder held, say")
    commands.add_parser("list", help="list the records")
    options = parser.parse_args(arguments)
    try:
        folder = project_dir() / "results" / "runs"
        if options.command == "add":
            print(add(options.run, folder, options.note).relative_to(folder.parents[1]))
        else:
            print(read_ledger(folder).to_string(index=False))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
