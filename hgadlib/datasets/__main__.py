"""Commands: `python -m hgadlib.datasets check PATH`, `fetch NAME` and `validation NAME_OR_PATH OUT`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hgadlib.datasets import NAMES, default_root, demo, elpv, load_dataset, union
from hgadlib.datasets.check import check, guess_layout
from hgadlib.datasets.download import fetch
from hgadlib.datasets.validation import make_validation
from hgadlib.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words of the command line; None for the real ones.

    Returns:
        Exit status: 0 if all is well, 1 if `check` found problems, 2 on wrong input.
    """
    parser = argparse.ArgumentParser(prog="python -m hgadlib.datasets", description="Check, fetch, hold out.")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="look through a folder of images and report")
    checking.add_argument("path", type=Path)
    checking.add_argument("--layout", choices=NAMES, help="dataset whose layout it has (guessed by default)")
    fetching = commands.add_parser("fetch", help="download a dataset, or make the demo")
    fetching.add_argument("name", choices=NAMES)
    fetching.add_argument("--root", type=Path, help="its place (default: $HGAD_DATA/NAME or data/NAME)")
    fetching.add_argument("--from", dest="source", help="URL or archive on disk to use instead")
    fetching.add_argument("--checksum", help="algorithm:digest of that archive, if another")
    holding = commands.add_parser("validation", help="hold out training images and draw defects on them")
    holding.add_argument("source", metavar="NAME_OR_PATH", help=f"a folder, or one of {', '.join(NAMES)}")
    holding.add_argument("out", metavar="OUT", type=Path, help="folder to write, in the MVTec layout")
    holding.add_argument("--root", type=Path, help="where NAME lies (default: $HGAD_DATA/NAME or data/NAME)")
    holding.add_argument("--seed", type=int, default=0, help="another seed holds out other images")
    holding.add_argument("--held-out", type=float, default=0.15, help="share to hold out (default: 0.15)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            report = check(options.path, options.layout)
            print(report)
            return 1 if report.problems else 0
        if options.command == "validation":
            _hold_out(options.source, options.out, options.root, options.seed, options.held_out)
            return 0
        _fetch(options.name, options.root, options.source, options.checksum)
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "; the next fetch goes on from here" if options.command == "fetch" else ""
        print(f"interrupted{goes_on}", file=sys.stderr)
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


def _hold_out(source: str, out: Path, root: Path | None, seed: int, held_out: float) -> None:
    if source in NAMES:
        dataset = load_dataset(source, root=root)
    elif root is not None:
        raise InputError(f"--root goes with a dataset's name, found {source!r}; leave one of them out")
    elif not Path(source).is_dir():
        raise InputError(f"{source}: expected a folder or one of {', '.join(NAMES)}")
    else:
        dataset = load_dataset(guess_layout(Path(source)), root=source)
    made = make_validation(dataset, out, held_out=held_out, seed=seed)
    print(f"the validation set of {len(dataset.classes)} class(es) is in {made}; train on it with")
    print(f"  papermill book/train.ipynb out.ipynb -p dataset folder -p data_root {shlex.quote(str(made))}")


if __name__ == "__main__":
    sys.exit(main())
