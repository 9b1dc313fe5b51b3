"""Commands: `python -m hgadlib.datasets check PATH` and `python -m hgadlib.datasets fetch NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hgadlib.datasets import NAMES, default_root, demo, elpv, union
from hgadlib.datasets.check import check
from hgadlib.datasets.download import fetch
from hgadlib.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words of the command line; None for the real ones.

    Returns:
        Exit status: 0 if all is well, 1 if `check` found problems, 2 on wrong input.
    """
    parser = argparse.ArgumentParser(prog="python -m hgadlib.datasets", description="Check or fetch.")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="look through a folder of images and report")
    checking.add_argument("path", type=Path)
    checking.add_argument("--layout", choices=NAMES, help="dataset whose layout it has (guessed by default)")
    fetching = commands.add_parser("fetch", help="download a dataset, or make the demo")
    fetching.add_argument("name", choices=NAMES)
    fetching.add_argument("--root", type=Path, help="its place (default: $HGAD_DATA/NAME or data/NAME)")
    fetching.add_argument("--from", dest="source", help="URL or archive on disk to use instead")
    fetching.add_argument("--checksum", help="algorithm:digest of that archive, if another")
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            report = check(options.path, options.layout)
            print(report)
            return 1 if report.problems else 0
        _fetch(options.name, options.root, options.source, options.checksum)
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; the next fetch goes on from here",
            file=sys.stderr,
        )
        return 130


def _fetch(name: str, root: Path | None, source: str | None, checksum: str | None) -> None:
    if name == "folder":
        raise InputError("nothing to fetch for 'folder': it is your own")
    if name == "demo":
        print(f"demo is in {demo.ensure(root or default_root(name))}")
    elif name == "elpv":
        print(f"elpv came with its package: {elpv.package_root()}")
    elif name == "union":
        if source or checksum:
            raise InputError("union is four archives: fetch each part by itself with --from")
        for part in union.PARTS:
            fetch(part, root=(root / part) if root else default_root(part))
    else:
        fetch(name, root=root or default_root(name), source=source, checksum=checksum)


if __name__ == "__main__":
    sys.exit(main())
