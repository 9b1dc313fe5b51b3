"""The command ``hgad``, also ``python -m hgadlib``: detectors, data and runs without a notebook.

The verbs that make and use a detector are those of :mod:`hgadlib.commands`; without a verb a run is trained
and evaluated, as by ``book/train.ipynb``.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hgadlib import commands
from hgadlib.config import load_config, params_dir, project_dir, run_dir
from hgadlib.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, from its words or, where None, the command line's; return the exit status.

    0: all is well; 1: something was found (an anomalous image, a drift, problems of `data check`), or a
    training diverged; 2: wrong input; 130: interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        # A class may bear a name that the terminal cannot write.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except BrokenPipeError:  # whoever read the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush complains
        return 141
    except (InputError, FloatingPointError, OSError) as error:  # OSErrors are the machine's
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


_DESCRIPTION = """\
Finds defects in pictures of many kinds of product, trained on pictures of
good products only: one model, many classes."""
_EPILOG = """\
examples:
  hgad data check parts                  look through a folder of images
  hgad fit parts                         learn; writes parts.safetensors
  hgad predict parts.safetensors today/  judge images
  hgad COMMAND --help                    more on each

Without a command one run is trained and evaluated, as by book/train.ipynb, in
papermill's words:
  hgad -p dataset demo -y '{overrides: {loss.lambda2: 10}}'
  torchrun --nproc-per-node 2 -m hgadlib -p dataset visa"""


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="hgad", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=form
    )
    parser.set_defaults(run=train)
    pair = ("NAME", "VALUE")
    parser.add_argument("-p", dest="parameter", nargs=2, action="append", default=[], metavar=pair,
                        help="a parameter of the run")  # fmt: skip
    parser.add_argument("-f", dest="file", type=Path, action="append", default=[], metavar="FILE",
                        help="a parameter file")  # fmt: skip
    parser.add_argument("-y", dest="yaml", action="append", default=[], metavar="YAML",
                        help="parameters as YAML")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    verbs = parser.add_subparsers(metavar="COMMAND", title="commands")
    commands.add_to(verbs)

    # As datasets.DATASETS, whose import would load torch for a line of help.
    names = sorted(path.stem for path in params_dir().glob("*.yaml"))
    data = verbs.add_parser("data", help="check, fetch and hold out images").add_subparsers(required=True)
    checking = data.add_parser("check", help="look through a folder of images and report")
    checking.set_defaults(run=check_data)
    checking.add_argument("path", type=Path)
    checking.add_argument("--layout", choices=names, metavar="NAME",
                          help=f"dataset whose layout it has: {', '.join(names)} (else guessed)")  # fmt: skip
    fetching = data.add_parser("fetch", help="download a dataset, or make the demo")
    fetching.set_defaults(run=fetch_data)
    fetching.add_argument("name", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    fetching.add_argument("--root", type=Path, help="its place (default: $HGAD_DATA/NAME or data/NAME)")
    fetching.add_argument("--from", dest="source", help="URL or archive on disk to use instead")
    fetching.add_argument("--checksum", help="algorithm:digest of that archive, if another")
    holding = data.add_parser("validation", help="hold out training images and draw defects on them")
    holding.set_defaults(run=hold_out)
    holding.add_argument("source", metavar="NAME_OR_PATH", help=f"a folder, or one of {', '.join(names)}")
    holding.add_argument("out", metavar="OUT", type=Path, help="folder to write, in the MVTec layout")
    holding.add_argument("--root", type=Path, help="where NAME lies (default: $HGAD_DATA/NAME or data/NAME)")
    holding.add_argument("--seed", type=int, default=0, help="another seed holds out other images")
    holding.add_argument("--held-out", type=float, default=0.15, help="share to hold out (default: 0.15)")

    runs = verbs.add_parser("runs", help="records of real runs").add_subparsers(required=True)
    adding = runs.add_parser("add", help="write a finished run's record into results/runs")
    adding.set_defaults(run=add_record)
    adding.add_argument("directory", type=Path)
    adding.add_argument("--note", default="", help="which images a folder held, say")
    runs.add_parser("list", help="list the records").set_defaults(run=list_records)

    grids = verbs.add_parser("grid", help="grids of runs").add_subparsers(required=True)
    for name, run, text in (
        ("list", list_grid, "list the distinct runs, with their states"),
        ("table", write_table, "average the seeds of every experiment into runs/tables/NAME.csv"),
    ):
        one = grids.add_parser(name, help=text)
        one.set_defaults(run=run)
        one.add_argument("grid", help="a file of params/grids")
        one.add_argument("--datasets", nargs="+")
        one.add_argument("--experiments", nargs="+")
        one.add_argument("--seeds", nargs="+", type=int)
        one.add_argument("--data-root")
    return parser


def train(options: argparse.Namespace) -> int:
    """Train and evaluate one run."""
    from hgadlib.distributed import process_group
    from hgadlib.runs.directory import RunDirectory
    from hgadlib.runs.experiment import finish_run, train_model
    from hgadlib.runs.inputs import prepare

    # Torch says on machines without a GPU that it found none; a reader need not know.
    logging.getLogger("torch").setLevel(logging.ERROR)
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
        metrics = finish_run(local, inputs, model, run).metrics
    mean = {name: value for name, value in metrics["mean"].items() if value is not None}
    for text in inputs.dataset.skipped:
        print(f"left out: {text}")
    for text in inputs.dataset.remarks:
        print(f"note: {text}")
    print("  ".join(f"{name} {value:.4f}" for name, value in mean.items()) or "no metric has a meaning here")
    print(run.path)
    return 0


def read_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Merge -f, then -y, then -p on top; an InputError if one is not YAML or holds no names with values."""
    given: dict[str, Any] = {}
    sources = [(str(path), _text(path)) for path in options.file] + [("-y", text) for text in options.yaml]
    for source, text in sources:
        values = _parse(text, source)
        if not isinstance(values, dict):
            raise InputError(f"{source}: expected names with values, found {values!r}")
        given |= values
    # papermill's -p takes Python's None, which YAML would read as text.
    for name, value in options.parameter:
        given[name] = None if value == "None" else _parse(value, f"-p {name}")
    return given


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


def check_data(options: argparse.Namespace) -> int:
    """Print a report on a folder of images."""
    from hgadlib.datasets.check import check

    report = check(options.path, options.layout)
    print(report)
    return 1 if report.problems else 0


def fetch_data(options: argparse.Namespace) -> int:
    """Download a dataset, or make the demo."""
    from hgadlib.datasets import default_root, demo, elpv
    from hgadlib.datasets.download import fetch
    from hgadlib.datasets.published import PARTS

    name, root = options.name, options.root
    if name == "folder":
        raise InputError("nothing to fetch for 'folder': it is your own")
    if name == "demo":
        print(f"demo is in {demo.ensure(root or default_root(name))}")
    elif name == "elpv":
        print(f"elpv came with its package: {elpv.package_root()}")
    elif name == "union":
        if options.source or options.checksum:
            raise InputError("union is four archives: fetch each part by itself with --from")
        for part in PARTS:
            fetch(part, root=(root / part) if root else default_root(part))
    else:
        fetch(name, root=root or default_root(name), source=options.source, checksum=options.checksum)
    return 0


def hold_out(options: argparse.Namespace) -> int:
    """Write a validation set: training images held out, with synthetic defects."""
    from hgadlib.datasets import DATASETS, load_dataset
    from hgadlib.datasets.check import guess_layout
    from hgadlib.datasets.validation import make_validation

    source, root = options.source, options.root
    if source in DATASETS:
        dataset = load_dataset(source, root=root)
    elif root is not None:
        raise InputError(f"--root goes with a dataset's name, found {source!r}; leave one of them out")
    elif not Path(source).is_dir():
        raise InputError(f"{source}: expected a folder or one of {', '.join(DATASETS)}")
    else:
        dataset = load_dataset(guess_layout(Path(source)), root=source)
    made = make_validation(dataset, options.out, held_out=options.held_out, seed=options.seed)
    print(f"the validation set of {len(dataset.classes)} class(es) is in {made}; train on it with")
    print(f"  papermill book/train.ipynb out.ipynb -p dataset folder -p data_root {shlex.quote(str(made))}")
    return 0


def add_record(options: argparse.Namespace) -> int:
    """Write a finished run's record into results/runs."""
    from hgadlib.runs.ledger import add

    folder = project_dir() / "results" / "runs"
    print(add(options.directory, folder, options.note).relative_to(folder.parents[1]))
    return 0


def list_records(options: argparse.Namespace) -> int:
    """List the records of results/runs."""
    from hgadlib.runs.ledger import read_ledger

    print(read_ledger(project_dir() / "results" / "runs").to_string(index=False))
    return 0


def list_grid(options: argparse.Namespace) -> int:
    """List the distinct runs of a grid with their states."""
    import pandas as pd

    from hgadlib.runs.grid import run_states
    from hgadlib.runs.ledger import read_records

    states = run_states(_grid(options), read_records())
    rows = [(config.dataset, config.experiment, config.seed, state) for config, state in states]
    print(pd.DataFrame(rows, columns=["dataset", "experiment", "seed", "state"]).to_string(index=False))
    return 0


def write_table(options: argparse.Namespace) -> int:
    """Average the seeds of a grid's experiments into a table."""
    from hgadlib.runs.grid import summary, write_summary
    from hgadlib.runs.ledger import read_records

    grid = _grid(options)
    print(write_summary(grid, summary(grid, read_records())))
    return 0


def _grid(options: argparse.Namespace) -> Any:
    from hgadlib.runs.grid import load_grid

    changes = {name: getattr(options, name) for name in ("datasets", "experiments", "seeds", "data_root")}
    return load_grid(options.grid, **changes)


if __name__ == "__main__":
    sys.exit(main())
