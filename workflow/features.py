"""Compute the features of one dataset into the cache: workflow/features.py '{"dataset": "demo"}' THREADS."""

from __future__ import annotations

import json
import sys

from hgadlib.config import load_config
from hgadlib.errors import InputError
from hgadlib.runs.inputs import prepare


def main(given: str, threads: str) -> int:
    """Prepare what the notebook parameters say; 0 if all is well, 2 on wrong input."""
    try:
        inputs = prepare(load_config(json.loads(given), num_workers=int(threads)), progress=False)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    split = f"{len(inputs.dataset.train)} train, {len(inputs.dataset.test)} test"
    print(f"{inputs.dataset.name}: features of {split} images")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
