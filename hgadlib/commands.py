"""The engineer's verbs of the command ``hgad``: from a folder of good products to decisions on new ones.

Each returns an exit status: 0 all is well, 1 something was found (an anomalous image, a drift, a difference),
2 wrong input, an image that cannot be read included. Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tqdm import tqdm

from hgadlib.errors import InputError
from hgadlib.files import cache_dir, user_path
from hgadlib.progress import progress_bar

if TYPE_CHECKING:
    from hgadlib.detector import AddedClass, Detector, Prediction

_JUDGED = """\
Exit status: 0 all images are normal, 1 some are anomalous, 2 wrong input or
an image that cannot be read (the others are judged all the same)."""


def add_to(commands: Any) -> None:
    """Add the verbs to argparse's subcommands."""
    one = _verb(
        commands, "fit", fit, "learn from a folder of good products, save a detector",
        "Learn from images of good products, choose thresholds, and write a detector:\n"
        "one file that needs nothing else, with a model card (.md) beside it. The same\n"
        "command goes on where it was interrupted.",
        "hgad data check parts                      look through the images first",
        "hgad fit parts --false-alarm-rate 0.02     parts.safetensors, parts.md",
        "hgad fit parts --set data.resize pad       any setting of params/*.yaml",
    )  # fmt: skip
    one.add_argument(
        "folder", metavar="FOLDER", help="CLASS/*.png, MVTec AD's layout, or a dataset's name: demo"
    )
    one.add_argument(
        "--out", type=Path, metavar="FILE", help="detector to write (default: FOLDER.safetensors)"
    )
    one.add_argument("--false-alarm-rate", type=float, default=0.05, metavar="R",
                     help="share of good products that may be called anomalous (default: 0.05)")  # fmt: skip
    one.add_argument("--threshold-share", type=float, default=0.2, metavar="S",
                     help="share of each class's images that is kept aside to choose thresholds on "
                          "(default: 0.2)")  # fmt: skip
    one.add_argument(
        "--epochs", type=int, metavar="N", help="passes over the images (default: as configured)"
    )
    one.add_argument("--experiment", default="hgad", metavar="NAME",
                     help="settings: a file of params/experiments (default: hgad)")  # fmt: skip
    one.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of all that is drawn (default: 0)"
    )
    one.add_argument("--run-dir", type=Path, metavar="DIR", help="run directory (default: runs/...)")
    one.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"),
                     help="any setting by its dotted name")  # fmt: skip
    _device(one)

    one = _verb(
        commands, "predict", predict, "judge images: table, JSON lines or CSV",
        f"Judge images one after the other, each printed as it is judged.\n\n{_JUDGED}",
        "hgad predict parts.safetensors today/ --overlays maps",
        "hgad predict parts.safetensors a.png b.png --class bolt --format table",
        "find today -name '*.png' | hgad predict parts.safetensors - > out.jsonl",
    )  # fmt: skip
    _model(one)
    one.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, or - for names on stdin")
    _judging(one)
    _batch_size(one)

    one = _verb(
        commands, "watch", watch, "judge files as they arrive in a folder",
        "Judge the images of a folder, then each that arrives, until Ctrl-C. A file\n"
        "is read once its size and time of change stay the same for an interval, and\n"
        "read again after they change: a camera may write one name over and over. One\n"
        "that is half written is tried again when it changes.\n\n" + _JUDGED,
        "hgad watch parts.safetensors inbox/ --new-only --overlays maps",
        "hgad watch parts.safetensors inbox/ --format jsonl | ./reject.sh",
    )  # fmt: skip
    _model(one)
    one.add_argument("folder", type=Path, metavar="FOLDER", help="to watch, with all folders in it")
    one.add_argument("--interval", type=float, default=1.0, metavar="SECONDS",
                     help="between two looks at the folder (default: 1)")  # fmt: skip
    one.add_argument("--new-only", action="store_true", help="leave out the images that are there already")
    one.add_argument("--once", action="store_true", help="stop when no new image is left")
    _judging(one)

    one = _verb(
        commands, "evaluate", evaluate, "test a detector on labelled images",
        "Test a detector on labelled images: AUROC and AUPRO; false alarms and defects\n"
        "found at its thresholds, with 95 % intervals.",
        "hgad evaluate parts.safetensors parts",
        "hgad evaluate parts.safetensors parts --json > metrics.json",
    )  # fmt: skip
    _model(one)
    one.add_argument(
        "folder", metavar="FOLDER", help="MVTec AD's layout, with a test set; or a dataset's name"
    )
    one.add_argument("--json", action="store_true", help="all of it as JSON")
    _device(one)

    one = _verb(
        commands, "add-class", add_class, "learn one class more, without training",
        "Learn one more class from its good products without training, in minutes and\n"
        "without the other classes' images, and write a detector. The others' images\n"
        "may be taken for the new class: --test says what it costs them.",
        "hgad add-class parts.safetensors nuts nut --out more.safetensors",
        "hgad add-class parts.safetensors nuts nut --out more.safetensors --test all",
    )  # fmt: skip
    _model(one)
    one.add_argument("folder", metavar="FOLDER", help="good products of this class alone")
    one.add_argument("name", metavar="NAME", help="of the new class")
    one.add_argument("--out", type=Path, required=True, metavar="FILE",
                     help="detector to write; MODEL stays unless it is named here")  # fmt: skip
    one.add_argument("--test", metavar="FOLDER",
                     help="labelled images, as of hgad evaluate, before and after")  # fmt: skip
    one.add_argument("--json", action="store_true", help="the report as JSON")
    _device(one)

    one = _verb(
        commands, "export", export, "write a detector as one ONNX file",
        "Write a detector as one ONNX file: uint8 images in, decisions and maps out.\n"
        "Needs: pip install onnx onnxscript onnxruntime",
        "hgad export parts.safetensors",
        "hgad validate parts.safetensors parts.onnx today/",
    )  # fmt: skip
    _model(one)
    one.add_argument("out", type=Path, nargs="?", metavar="ONNX",
                     help="file to write (default: MODEL, ending on .onnx)")  # fmt: skip

    one = _verb(
        commands, "validate", validate, "compare an ONNX file with its detector",
        "Run a detector and its ONNX file on the same images: how far are scores and\n"
        "maps apart, and does a decision change?\n\n"
        "Exit status: 0 they agree, 1 they do not, 2 wrong input.",
        "hgad validate parts.safetensors parts.onnx today/",
    )  # fmt: skip
    _model(one)
    one.add_argument("onnx", type=Path, metavar="ONNX", help="a file that hgad export wrote")
    one.add_argument("images", nargs="+", metavar="IMAGES", help="files or folders")
    _device(one)

    one = _verb(
        commands, "drift", drift, "are today's images still like the normal ones?",
        "Test whether new images are like the normal ones that the fit kept aside, by\n"
        "their scores and their features; a p-value by permutation. It finds any\n"
        "difference: light, camera, supplier, and very many defects; a few anomalous\n"
        "images pass. Take new images: those of the fit tell nothing.\n\n"
        "Exit status: 0 no drift found, 1 drift, 2 wrong input or an image that\n"
        "cannot be read.",
        "hgad drift parts.safetensors today/",
        "hgad drift parts.safetensors today/ --level 0.001",
    )  # fmt: skip
    _model(one)
    one.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, or - for names on stdin")
    one.add_argument("--level", type=float, default=0.01, metavar="P",
                     help="share of days without a drift that may be called one (default: 0.01)")  # fmt: skip
    one.add_argument("--json", action="store_true", help="the result as JSON")
    _class(one)
    _device(one)
    _batch_size(one)

    _verb(
        commands, "doctor", doctor, "look at this machine: what is there, what is missing",
        "Look at Python, packages, device, memory, disk, caches and weights; for what\n"
        "is missing, say the command that mends it.\n\n"
        "Exit status: 0 all that is needed is there, 1 something is missing.",
        "hgad doctor",
    )  # fmt: skip


def _verb(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, description: str,
    *examples: str,
) -> argparse.ArgumentParser:  # fmt: skip
    one: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
    )  # fmt: skip
    one.set_defaults(run=run)
    # Also before the verb; a default here would undo that.
    one.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="no bars, no summary")
    return one


def _model(one: argparse.ArgumentParser) -> None:
    one.add_argument("model", type=Path, metavar="MODEL", help="detector that hgad fit wrote")


def _device(one: argparse.ArgumentParser) -> None:
    one.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")


def _batch_size(one: argparse.ArgumentParser) -> None:
    one.add_argument("--batch-size", type=int, metavar="N", help="images at a time; changes no result")


def _judging(one: argparse.ArgumentParser) -> None:
    one.add_argument("--format", choices=("table", "jsonl", "csv"),
                     help="of the lines (default: table on a terminal, else jsonl)")  # fmt: skip
    one.add_argument("--overlays", type=Path, metavar="DIR", help="write each image under its map there")
    _class(one)
    _device(one)


def _class(one: argparse.ArgumentParser) -> None:
    one.add_argument("--class", dest="class_name", metavar="NAME",
                     help="class of all images (default: inferred for each)")  # fmt: skip


def fit(options: argparse.Namespace) -> int:
    """Learn from a folder of good products and save a detector."""
    out = _writable(options.out or Path(f"{Path(options.folder).resolve().name}.safetensors"))
    overrides = {}
    for key, text in options.set:
        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--set {key}: expected YAML, found: {' '.join(str(error).split())}") from None
    _hush()
    from hgadlib.detector import Detector

    detector = Detector(
        experiment=options.experiment, false_alarm_rate=options.false_alarm_rate,
        threshold_share=options.threshold_share, epochs=options.epochs, seed=options.seed,
        device=options.device, run_dir=options.run_dir, overrides=overrides,
    ).fit(options.folder, progress=not options.quiet)  # fmt: skip
    detector.save(out)
    rows = [("class", "train", "calibrate", "threshold", "test", "rate promised over")]
    for name, counts in detector.trained_on_["images"].items():
        rows.append((name, *map(str, counts.values()), detector.normals_for(name)[1]))
    _print_table(rows)
    for text in detector.remarks_:
        print(f"note: {text}")
    mean = {key: value for key, value in detector.metrics_.get("mean", {}).items() if value is not None}
    if mean:
        print("  ".join(f"{name} {value:.4f}" for name, value in mean.items()))
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB), card {out.with_suffix('.md')}")
    model = shlex.quote(str(out))
    following = [f"hgad predict {model} IMAGES --overlays maps", f"hgad export {model}"]
    if detector.trained_on_["images"] and mean:
        following.insert(0, f"hgad evaluate {model} {shlex.quote(options.folder)}")
    _say(options, "next:", *(f"  {command}" for command in following))
    return 0


def predict(options: argparse.Namespace) -> int:
    """Judge images one after the other."""
    files = _images(options.images, options.overlays)
    detector, output = _load(options), _Judgements(options)
    interrupted = False
    try:
        with _bar(files, options) as bar:
            for one in detector.predict(
                files, class_name=options.class_name, batch_size=options.batch_size, on_error=output.refuse
            ):
                output.show(one)
                bar.update()
    except KeyboardInterrupt:
        interrupted = True
    output.summarise(detector)
    return 130 if interrupted else output.status


def watch(options: argparse.Namespace) -> int:
    """Judge the files of a folder as they arrive."""
    folder: Path = user_path(options.folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make it first")
    if not options.interval > 0:
        raise InputError(f"--interval: expected more than 0 seconds, found {options.interval:g}")
    _apart(options.overlays, folder)
    # What was judged, with its size and time of change: a name may come again.
    done = _present(folder) if options.new_only else {}
    detector, output = _load(options), _Judgements(options)
    now: dict[Path, tuple[int, int]] = {}
    refused: dict[Path, tuple[int, int]] = {}

    def refuse(name: str, error: InputError) -> None:
        refused[Path(name)] = now[Path(name)]
        tqdm.write(f"not yet: {error}", file=sys.stderr)

    _say(options, f"watching {folder}; Ctrl-C ends")
    try:
        while True:
            before, found = now, _present(folder)
            now = {path: facts for path, facts in found.items() if done.get(path) != facts}
            for path in [path for path in refused if path not in now]:  # gone, or as it was judged
                del refused[path]
            ready = [path for path, facts in now.items() if before.get(path) == facts != refused.get(path)]
            for one in detector.predict(ready, class_name=options.class_name, on_error=refuse):
                path = Path(one.name)
                done[path] = now[path]
                refused.pop(path, None)
                output.show(one)
            if options.once and all(facts in (done.get(p), refused.get(p)) for p, facts in now.items()):
                break
            time.sleep(options.interval)
    except KeyboardInterrupt:
        pass
    output.unreadable = len(refused)
    output.summarise(detector)
    return output.status


def _present(folder: Path) -> dict[Path, tuple[int, int]]:
    """List the images that lie in a folder now, oldest first, with size and time of change."""
    from hgadlib.datasets.scan import is_image, is_litter

    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_litter(name)]
        for name in files:
            path = Path(where, name)
            if is_litter(name) or not is_image(path):  # copying programs hide what is unfinished
                continue
            try:
                stat = path.stat()
            except OSError:  # gone meanwhile
                continue
            found.append((stat.st_mtime_ns, path, stat.st_size))
    return {path: (size, changed) for changed, path, size in sorted(found)}


def evaluate(options: argparse.Namespace) -> int:
    """Print metrics on labelled images."""
    detector = _load(options)
    result = detector.evaluate(options.folder, progress=not options.quiet)
    if options.json:
        print(json.dumps(result, indent=1))
        return 0
    metrics, inferred = result["metrics"], result["metrics"]["inferred"]
    columns = ("image_auroc", "pixel_auroc", "aupro")
    head = ["class", "image AUROC", "pixel AUROC", "AUPRO"]
    rows = [tuple(head + (["image AUROC, class inferred"] if inferred else []))]
    for name in [*metrics["per_class"], "mean"]:
        own = metrics["mean"] if name == "mean" else metrics["per_class"][name]
        cells = [_number(own[column]) for column in columns]
        if inferred:
            other = inferred["mean"] if name == "mean" else inferred["per_class"][name]
            cells.append(_number(other["image_auroc"]))
        rows.append((name, *cells))
    _print_table(rows)
    print()
    rates = [("class", "false alarms, %", "found, %")]
    rates += [(name, result["false_alarms"][name], result["found"][name]) for name in result["found"]]
    _print_table(rates)
    if inferred:
        print(f"\nclass inferred rightly: {100 * inferred['accuracy']:.1f} % of the images")
    promise = f"at most {100 * detector.false_alarm_rate:g} % false alarms are promised on average"
    model = shlex.quote(str(options.model))
    _say(options, f"{promise}; brackets hold 95 % intervals", "next:",
         f"  hgad predict {model} IMAGES --overlays maps")  # fmt: skip
    return 0


def add_class(options: argparse.Namespace) -> int:
    """Learn a class more without training, and save the detector that knows it."""
    out = _writable(options.out)
    test = None if options.test is None else user_path(Path(options.test))
    if test is not None and not test.is_dir():  # known before the work, not after
        raise InputError(f"--test {test}: no such folder")
    if not user_path(Path(options.folder)).is_dir():
        raise InputError(f"{options.folder}: no such folder")
    detector = _load(options)
    made, report = detector.add_class(options.name, options.folder, test=test, progress=not options.quiet)
    made.save(out)
    if options.json:
        print(json.dumps(report.to_dict()))
    else:
        _print_added(report)
    for text in made.remarks_:
        _say(options, f"note: {text}")
    _say(options, f"{out} ({out.stat().st_size / 1e6:.1f} MB), card {out.with_suffix('.md')}",
         "next:", f"  hgad predict {shlex.quote(str(out))} IMAGES --overlays maps")  # fmt: skip
    return 0


def _print_added(report: AddedClass) -> None:
    """Print what a class was learnt from and what it costs, where that was measured."""
    name = _shown(report.name)
    head = ("class", "train", "calibrate", "threshold", "rate promised over")
    _print_table([head, (name, *map(str, report.images.values()), report.promise)])
    if report.taken is None or report.missed is None:
        return
    print()
    rows: list[tuple[str, ...]] = [("mean of", "image AUROC", "pixel AUROC", "AUPRO")]
    before, after = report.others_before, report.others_after
    for text, own in (("others, before", before), ("others, after", after), (name, report.own)):
        if own:
            rows.append((text, *(_number(own[column]) for column in ("image_auroc", "pixel_auroc", "aupro"))))
    _print_table(rows)
    print(f"\nothers taken for {name}, %: {report.taken}")
    print(f"{name} taken for another, %: {report.missed}")


def _writable(out: Path) -> Path:
    """Check where a detector is to be written: known before the work, not after."""
    out = user_path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out}: expected a name that ends on .safetensors")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: no such folder; make {out.parent} first")
    return out


def export(options: argparse.Namespace) -> int:
    """Write a detector as one ONNX file."""
    options.device = "cpu"
    out = user_path(options.out or options.model.with_suffix(".onnx"))
    _load(options).export(out)
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
    _say(options, "next:", f"  hgad validate {shlex.join([str(options.model), str(out)])} IMAGES")
    return 0


def validate(options: argparse.Namespace) -> int:
    """Compare an ONNX file with its detector."""
    files = _images(options.images, None)
    detector = _load(options)
    from hgadlib.export import validate as compare

    report = compare(detector, user_path(options.onnx), files)
    print(report)
    if not report.ok:
        _say(options, "next: write the file again",
             f"  hgad export {shlex.join([str(options.model), str(options.onnx)])}")  # fmt: skip
    return 0 if report.ok else 1


def drift(options: argparse.Namespace) -> int:
    """Test whether new images are like the normal ones."""
    files = _images(options.images, None)
    detector, refused = _load(options), []

    def refuse(name: str, error: InputError) -> None:
        refused.append(name)
        tqdm.write(f"error: {error}", file=sys.stderr)

    def judged(bar: Any) -> Iterator[Prediction]:
        for one in detector.predict(
            files, class_name=options.class_name, batch_size=options.batch_size, on_error=refuse
        ):
            yield one
            bar.update()

    with _bar(files, options, lines=False) as bar:
        found = detector.drift(judged(bar), level=options.level)
    print(json.dumps({"drifted": found.drifted, **dataclasses.asdict(found)}) if options.json else found)
    if found.drifted:
        model = shlex.quote(str(options.model))
        _say(options, "next: look at some of these images; if they are good products, fit again with them",
             f"  hgad predict {model} {shlex.join(options.images)} --overlays maps")  # fmt: skip
    return 2 if refused else int(found.drifted)


def doctor(options: argparse.Namespace) -> int:
    """Show what is there on this machine and what is missing, with the command that mends it."""
    lines = [*_python(), *_torch(), *_places()]
    for mark, name, text, mend in lines:
        print(f"{mark:<8}{name:<10}{text}")
        if mend:
            print(f"{'':8}{'':10}mend: {mend}")
    missing = sum(mark == _MISSING for mark, *_ in lines)
    _say(options, f"{missing} thing(s) missing, see above" if missing else "all that is needed is there",
         *([] if missing else ["next: hgad fit FOLDER, or, to see it work, hgad fit demo"]))  # fmt: skip
    return 1 if missing else 0


_OK, _LACK, _MISSING = "ok", "--", "MISSING"
_Line = tuple[str, str, str, str]
_EXTRA = ("onnx", "onnxscript", "onnxruntime")


def _python() -> list[_Line]:
    from hgadlib import __version__

    version = platform.python_version()
    lines = [(_OK, "python", f"{version}, {sys.executable}", ""), (_OK, "hgadlib", __version__, "")]
    try:
        wanted = [text for text in importlib.metadata.requires("hgadlib") or [] if "extra ==" not in text]
    except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
        return [*lines, (_MISSING, "packages", "hgadlib is not installed", "pip install -e .")]
    lacking = [text for text in wanted if not _installed(text)]
    mend = f"pip install {shlex.join(lacking)}"
    text = f"{len(wanted) - len(lacking)} of {len(wanted)} are there"
    lines.append((_MISSING, "packages", text, mend) if lacking else (_OK, "packages", text, ""))
    lacking = [name for name in _EXTRA if not _installed(name)]
    text, mend = "not there; hgad export needs it", f"pip install {' '.join(lacking)}"
    lines.append((_LACK, "onnx", text, mend) if lacking else (_OK, "onnx", "there, for hgad export", ""))
    return lines


def _installed(requirement: str) -> bool:
    try:
        version = importlib.metadata.version(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    try:
        from packaging.requirements import Requirement  # matplotlib brings it along
    except ImportError:
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def _torch() -> list[_Line]:
    """Look at what needs torch: the device and the weights."""
    _hush()
    try:
        import torch

        from hgadlib.features.weights import BUNDLED, bundled_weights_path
        from hgadlib.runs.hardware import device_name, select_device
    except Exception as error:  # a torch that does not fit the machine raises whatever it likes
        reason = " ".join(str(error).split())[:60]
        return [(_MISSING, "torch", f"cannot be imported: {reason}", "pip install --force-reinstall torch")]
    device = select_device()
    lines = [
        (_OK, "torch", torch.__version__, ""),
        (_OK, "device", f"{device.type}: {device_name(device)}", ""),
    ]
    if device.type == "cpu" and Path("/dev/nvidia0").exists():
        mend = "install a torch with CUDA, see https://pytorch.org/get-started"
        lines.append((_LACK, "gpu", "there is one that torch cannot use", mend))
    lines.append((_OK, "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores", ""))
    for name in BUNDLED:
        try:
            size = bundled_weights_path(name).stat().st_size / 1e6
            lines.append((_OK, "weights", f"{name}, {size:.0f} MB", ""))
        except InputError as error:
            mend = str(error).rpartition("run: ")[2]
            lines.append((_MISSING, "weights", f"{name}: not there or damaged", mend))
    return lines


def _places() -> list[_Line]:
    """Look at memory, disk, caches and data."""
    from hgadlib.config import params_dir, project_dir

    lines: list[_Line] = []
    try:
        import psutil

        memory = psutil.virtual_memory()
        text = f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB"
        enough = memory.available > 2e9
        lines.append((_OK if enough else _LACK, "memory", text, "" if enough else "end other programs"))
    except ImportError:
        pass  # counted among the packages
    cache, runs = cache_dir(), project_dir() / "runs"
    for name, folder, mend in (
        ("cache", cache, "export HGAD_CACHE=FOLDER, on a disk with room"),
        ("runs", runs, "make room, or work in another folder"),
    ):
        home = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free, good = shutil.disk_usage(home).free, os.access(home, os.W_OK)
        text = f"{folder}: {_size(folder) / 1e9:.2f} GB, {free / 1e9:.1f} GB free"
        good, text = good and free > 1e9, text if good else f"{folder}: cannot be written"
        lines.append((_OK if good else _MISSING, name, text, "" if good else mend))
    entries = sum(path.is_file() for path in cache.glob("*/manifest.json"))
    text = f"features of {entries} sets of images"
    lines.append((_OK, "", f"{text}; rm -r {shlex.quote(str(cache))} frees them" if entries else text, ""))
    known = sorted(path.stem for path in params_dir().glob("*.yaml") if path.stem != "folder")
    root = Path(os.environ.get("HGAD_DATA") or "data")
    there = [name for name in known if name == "elpv" or (root / name).is_dir()]
    lacking = [name for name in known if name not in there and name != "union"]
    lines.append((_OK, "data", f"{', '.join(there)} in {root}", ""))
    if lacking:
        lines.append((_LACK, "", f"not fetched: {', '.join(lacking)}", "hgad data fetch NAME"))
    return lines


def _size(folder: Path) -> int:
    """Add up what the files of a folder take, bytes."""
    total = 0
    for where, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total


class _Judgements:
    """Prints predictions as they come, counts them, and sums up."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.format = options.format or ("table" if sys.stdout.isatty() else "jsonl")
        self.overlays = None if options.overlays is None else user_path(options.overlays)
        self.images = self.anomalous = self.unknown = self.unreadable = 0
        self.seconds, self._taken = 0.0, set[str]()
        self._writer = csv.writer(sys.stdout, lineterminator="\n")

    def show(self, one: Prediction) -> None:
        """Print one image's line, and write its overlay."""
        self.images += 1
        self.anomalous += one.is_anomalous
        self.unknown += one.is_unknown
        self.seconds += one.seconds
        values = one.to_dict()
        if self.overlays is not None:
            from hgadlib.datasets.images import save

            values["overlay"] = str(path := self._free_name(Path(one.name)))
            save(one.overlay(), path)
        if self.format == "jsonl":
            print(json.dumps(values))
        elif self.format == "csv":
            if self.images == 1:
                self._writer.writerow(values)
            self._writer.writerow("" if value is None else value for value in values.values())
        else:
            if self.images == 1:
                print(_line("verdict", "score", "p-value", "class", "file"))
            verdict = "UNKNOWN" if one.is_unknown else "ANOMALOUS" if one.is_anomalous else "normal"
            print(_line(verdict, f"{one.score:.4g}", f"{one.p_value:.4f}", one.class_name, one.name))
        sys.stdout.flush()  # whoever reads the pipe waits for it

    def refuse(self, name: str, error: InputError) -> None:
        """Report an image that cannot be read."""
        self.unreadable += 1
        tqdm.write(f"error: {error}", file=sys.stderr)

    def _free_name(self, file: Path) -> Path:
        """Name an overlay after its image; namesakes of other folders get a number."""
        assert self.overlays is not None
        name, number = f"{file.stem}.png", 2
        while name.casefold() in self._taken:
            name, number = f"{file.stem}-{number}.png", number + 1
        self._taken.add(name.casefold())
        return self.overlays / name

    @property
    def status(self) -> int:
        """What the command returns."""
        return 2 if self.unreadable else int(self.anomalous > 0)

    def summarise(self, detector: Detector) -> None:
        """Say how many there were of what, and what to do next."""
        rate = f"{self.images / self.seconds:.1f} images/s" if self.seconds else "no image"
        model, next_ = shlex.quote(str(self.options.model)), []
        if self.anomalous and self.overlays is None:
            next_.append(f"see where: hgad predict {model} IMAGES --overlays maps")
        elif self.anomalous:
            next_.append(f"see where: the maps in {self.overlays}")
        if self.unknown:
            known = ", ".join(detector.classes_)
            next_.append(f"unknown ones look like no image of: {known}; fit again with their class, if good")
        if self.unreadable:
            next_.append("copy the files that cannot be read again, or leave them out")
        if self.images and not next_:
            next_.append(f"are images still like the normal ones: hgad drift {model} IMAGES")
        _say(
            self.options,
            f"{self.images} image(s): {self.anomalous} anomalous, {self.unknown} of these unknown; "
            f"{self.unreadable} unreadable; {rate}",
            *(f"next: {text}" for text in next_),
        )


def _line(verdict: str, score: str, p_value: str, class_name: str, name: str) -> str:
    """Lay out a line of the table; a long file name loses its left end."""
    left = f"{verdict:<9}  {score:>9}  {p_value:>7}  {_shown(class_name)[:14]:<14}  "
    room = max(80, shutil.get_terminal_size().columns) - len(left)
    name = _shown(name)
    return left + (name if len(name) <= room else f"...{name[3 - room :]}")


def _shown(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _say(options: argparse.Namespace, *lines: str) -> None:
    if not options.quiet:
        sys.stdout.flush()
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def _bar(files: Any, options: argparse.Namespace, *, lines: bool = True) -> Any:
    """Open a bar for a person at a terminal, where no lines appear there."""
    total = len(files) if isinstance(files, list) else 0
    show = not options.quiet and sys.stderr.isatty() and not (lines and sys.stdout.isatty())
    return progress_bar(total, "judged", show=show and total > 0)


def _hush() -> None:
    # Torch says on machines without a GPU that it found none; a user need not know.
    logging.getLogger("torch").setLevel(logging.ERROR)


def _load(options: argparse.Namespace) -> Detector:
    _hush()
    from hgadlib.detector import Detector

    return Detector.load(user_path(options.model), device=options.device)


def _images(words: Sequence[str], overlays: Path | None) -> list[Path] | Iterator[str]:
    """Collect files, and those below folders; or, of "-" alone, the names on stdin as they come."""
    if "-" in words:
        if len(words) > 1:
            raise InputError("expected either - or files and folders, found both; leave one out")
        return (name for line in sys.stdin if (name := line.rstrip("\r\n")))
    from hgadlib.datasets.scan import images_below

    files: list[Path] = []
    for path in map(user_path, words):
        if path.is_dir():
            _apart(overlays, path)
        files += images_below(path) if path.is_dir() else [path]
    return files


def _apart(overlays: Path | None, folder: Path) -> None:
    if overlays is not None and user_path(overlays).resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"--overlays {overlays}: lies in {folder}, whose images are judged; name another place"
        )
