"""The run directory: who may write in it, what is in it at each moment, and what a kill leaves."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from small import image_folder

from hgadlib.config import Config, load_config
from hgadlib.datasets import load_dataset
from hgadlib.errors import InputError
from hgadlib.files import FileError, replacing, write_atomically
from hgadlib.method import read_tensors, write_tensors
from hgadlib.runs.directory import RunDirectory, read_config, read_history, read_metrics
from hgadlib.runs.gallery import Gallery, write_maps
from hgadlib.runs.hardware import matmul_rate
from hgadlib.runs.inputs import identify

DATA = {"digest": "images", "train": 3, "test": 2}
OTHER_DATA = {"digest": "other images", "train": 4, "test": 2}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params" / "experiments").mkdir(parents=True)
    (tmp_path / "params" / "demo.yaml").write_text("dataset: demo\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**more: Any) -> Config:
    return load_config(dataset="demo", **more)


def default() -> Path:
    return Path("runs/demo/hgad/seed0").resolve()


def whole(found: Config, data: dict[str, Any] = DATA) -> Path:
    """Write a complete run."""
    run = RunDirectory.open(found)
    run.start(data)
    run.finish({"mean": {}})
    return run.path


def refused(found: Config, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        RunDirectory.open(found).start(DATA)
    assert "\n" not in str(caught.value)


def test_a_default_directory_is_named_after_the_run() -> None:
    assert RunDirectory.open(config(seed=4)).path == Path("runs/demo/hgad/seed4").resolve()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/run", "/dev/null/run"])
def test_an_unwritable_run_dir_is_one_line(project: Path, place: str) -> None:
    (project / "file").write_text("in the way")
    refused(config(run_dir=place), "expected a folder that can be written, found: ")
    assert (project / "file").read_text() == "in the way"


def test_opening_writes_no_run() -> None:
    run = RunDirectory.open(config())
    assert [path.name for path in run.path.iterdir()] == [".lock"]


def test_the_configuration_comes_first_and_metrics_last() -> None:
    run = RunDirectory.open(config())
    run.start(DATA)
    assert read_config(run.path) == config()
    assert json.loads((run.path / "data.json").read_text()) == DATA
    assert not run.complete
    with pytest.raises(InputError, match=r"expected a run with metrics\.json, found none; run it to its end"):
        read_metrics(run.path)
    with pytest.raises(InputError, match=r"expected a run with history\.csv"):
        read_history(run.path)
    run.write_history(pd.DataFrame({"epoch": [1], "total": [0.5]}))
    run.checkpoint.write_bytes(b"state")
    run.write_arrays("scores", {"score": np.zeros(3)})
    run.write_environment(torch.device("cpu"))
    assert not run.complete
    run.finish({"mean": {"image_auroc": 0.5, "aupro": None}})
    assert RunDirectory.open(config()).complete
    found = read_metrics(run.path)
    assert found["schema"] == 1
    assert (found["dataset"], found["experiment"], found["seed"]) == ("demo", "hgad", 0)
    assert found["mean"] == {"image_auroc": 0.5, "aupro": None}
    assert read_history(run.path)["total"].tolist() == [0.5]
    names = sorted(path.name for path in run.path.iterdir())
    assert names == [
        "config.yaml",
        "data.json",
        "environment.json",
        "history.csv",
        "metrics.json",
        "scores.npz",
    ]


def test_the_environment_says_hardware_versions_and_time() -> None:
    run = RunDirectory.open(config())
    run.start(DATA)
    run.write_environment(torch.device("cpu"))
    found = json.loads((run.path / "environment.json").read_text())
    assert torch.__version__.startswith(found["packages"]["torch"])
    assert "threads" in found["device"]
    assert set(found) >= {"python", "platform", "cpu", "cores", "threads", "commit", "started"}


def test_rate_of_matrix_products_counts_two_operations_a_multiply_add() -> None:
    seconds = itertools.count()  # a clock by which every product takes one second
    assert matmul_rate(torch.device("cpu"), size=4, clock=lambda: float(next(seconds))) == 2 * 4**3


def test_no_number_that_is_none_reaches_a_record() -> None:
    run = RunDirectory.open(config())
    run.start(DATA)
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.finish({"mean": {"image_auroc": float("nan")}})
    assert not run.complete
    assert not list(run.path.glob(".*.tmp"))


def test_the_same_configuration_takes_up_its_run() -> None:
    path = whole(config())
    run = RunDirectory.open(config(device="cpu", num_workers=2))
    assert run.complete
    run.start(DATA)
    assert (run.path, run.complete) == (path, True)


def test_another_run_in_a_named_directory_is_refused(project: Path) -> None:
    path = whole(config(run_dir="mine"))
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    refused(
        config(run_dir="mine", epochs=77), r"another run .*train\.epochs: \d+, now 77\); name another run_dir"
    )
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert RunDirectory.open(config(run_dir="mine")).complete


def test_other_images_in_a_named_directory_are_refused() -> None:
    whole(config(run_dir="mine"), OTHER_DATA)
    refused(config(run_dir="mine"), "another run .its images differ, now 3 train, 2 test")


def test_images_are_told_apart_by_what_is_in_the_files(tmp_path: Path) -> None:
    """Same names, same sizes, as when new pictures are copied over old ones."""
    root = image_folder(tmp_path / "images")
    before = identify(load_dataset("folder", root=root))
    whole(config(run_dir="mine"), before)
    assert RunDirectory.open(config(run_dir="mine")).another(before) == ""
    changed = root / "disc" / "test" / "spot" / "000.png"
    content = bytearray(changed.read_bytes())
    content[content.index(b"IEND") - 5] ^= 1  # a checksum: enough to be another file
    changed.write_bytes(content)
    after = identify(load_dataset("folder", root=root))
    assert after["digest"] == before["digest"] and after["content"] != before["content"]
    run = RunDirectory.open(config(run_dir="mine"))
    with pytest.raises(InputError, match="its images differ"):
        run.start(after)
    # A run of before the content was noted goes by names and sizes.
    old = {key: value for key, value in before.items() if key != "content"}
    whole(config(run_dir="older"), old)
    assert RunDirectory.open(config(run_dir="older")).another(after) == ""


@pytest.mark.parametrize("what", ["configuration", "images", "version"])
def test_another_run_in_the_default_place_is_moved_aside(
    what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = config(epochs=77) if what == "configuration" else config()
    whole(first, OTHER_DATA if what == "images" else DATA)
    if what == "version":
        (default() / "config.yaml").write_text("dataset: demo\nunheard_of: 1\n")
    run = RunDirectory.open(config())
    # Nothing has happened yet: wrong input may still end this run before it starts.
    assert (default() / "metrics.json").is_file()
    run.start(DATA)
    assert not run.complete
    assert sorted(p.name for p in run.path.iterdir() if p.name[0] != ".") == ["config.yaml", "data.json"]
    (aside,) = (path for path in default().parent.iterdir() if path != default())
    assert (aside / "metrics.json").is_file()
    assert sorted(p.name for p in aside.iterdir()) == ["config.yaml", "data.json", "metrics.json"]
    printed = capsys.readouterr().out
    assert printed.startswith(f"moved the earlier run to {aside.name}")
    assert {"configuration": "train.epochs: 77", "images": "images", "version": "unheard_of"}[what] in printed


def test_going_back_takes_up_the_run_that_was_moved_aside() -> None:
    one, other = config(), config(epochs=77)
    whole(one)
    whole(other)
    for found in (one, other, one):
        run = RunDirectory.open(found)
        run.start(DATA)
        assert run.complete
        assert read_config(run.path) == found
    assert len(list(default().parent.iterdir())) == 2


@pytest.mark.parametrize("where", ["named", None])
def test_a_folder_of_other_files_is_refused(where: str | None) -> None:
    found = config(run_dir=where)
    path = Path(where or default())
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("years of work")
    refused(found, "expected an empty folder or a run, found other files")
    assert [p.name for p in path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "files", [[], ["config.yaml"], ["config.yaml", "data.json"], ["config.yaml", "data.json", "history.csv"]]
)
def test_a_kill_between_any_two_files_leaves_a_run_that_goes_on(files: list[str]) -> None:
    path = default()
    path.mkdir(parents=True)
    # What a kill in the middle of a write leaves, and a lock whose process is gone.
    (path / ".metrics.json.tmp").write_text("{")
    (path / ".lock").write_text("")
    content = {"config.yaml": yaml.safe_dump(config().to_dict()), "data.json": json.dumps(DATA)}
    for name in files:
        (path / name).write_text(content.get(name, "epoch\n"))
    run = RunDirectory.open(config())
    run.start(DATA)
    assert not run.complete
    assert read_config(path) == config()
    assert not list(path.glob(".*.tmp"))
    assert not list(path.parent.glob("seed0.*"))


def test_the_same_process_may_open_its_run_again() -> None:
    first = RunDirectory.open(config())
    first.start(DATA)
    second = RunDirectory.open(config())
    del first
    second.start(DATA)
    with pytest.raises(InputError, match="in use by another process"):
        locked_elsewhere(second.path)


def locked_elsewhere(path: Path) -> None:
    """Open a run in another process; raise what it says."""
    code = (
        "import sys; from hgadlib.config import load_config\n"
        "from hgadlib.runs.directory import RunDirectory\n"
        "from hgadlib.errors import InputError\n"
        "try: RunDirectory.open(load_config(dataset='demo'))\n"
        "except InputError as error: print(error)\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=True,
    )
    if done.stdout:
        raise InputError(done.stdout.strip())


def test_a_run_that_nobody_holds_any_more_is_free() -> None:
    run = RunDirectory.open(config())
    run.start(DATA)
    del run
    locked_elsewhere(default())


def test_a_run_that_another_process_works_on_is_refused() -> None:
    run = RunDirectory.open(config())
    run.start(DATA)
    with pytest.raises(InputError, match=r"in use by another process; .*name another run_dir") as caught:
        locked_elsewhere(run.path)
    assert "\n" not in str(caught.value)
    run.finish({})
    locked_elsewhere(run.path)  # what is finished may be read by all


def test_the_lock_of_a_killed_process_holds_nobody_up() -> None:
    code = (
        "import os, signal; from hgadlib.config import load_config\n"
        "from hgadlib.runs.directory import RunDirectory\n"
        "run = RunDirectory.open(load_config(dataset='demo')); run.start({'digest': 'images'})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == -9
    assert (default() / ".lock").is_file()
    RunDirectory.open(config()).start(DATA)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_tensors_come_back_and_others_may_read_them(tmp_path: Path) -> None:
    path, plain = tmp_path / "a.safetensors", tmp_path / "plain"
    plain.write_bytes(b"")
    write_tensors(path, {"a": torch.arange(6.0).view(2, 3).T}, {"key": "value"})
    tensors, metadata = read_tensors(path)
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3).T)
    assert metadata == {"key": "value"}
    assert path.stat().st_mode == plain.stat().st_mode
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"a\.safetensors: expected a whole safetensors file"):
        read_tensors(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("name", ["history.csv", "scores.npz", "metrics.json"])
def test_a_full_disk_is_told_in_a_line_and_the_run_goes_on(name: str) -> None:
    run = RunDirectory.open(config())
    run.start(DATA)
    writes: dict[str, Any] = {
        "history.csv": lambda: run.write_history(pd.DataFrame({"epoch": [1]})),
        "scores.npz": lambda: run.write_arrays("scores", {"score": np.zeros(3)}),
        "metrics.json": lambda: run.finish({"mean": {}}),
    }
    (run.path / f".{name}.tmp").symlink_to("/dev/full")
    with pytest.raises(FileError, match=rf"{name}: cannot be written: .*No space left.*; make room") as said:
        writes[name]()
    assert "\n" not in str(said.value)
    assert not (run.path / name).exists() and not list(run.path.glob(".*.tmp"))
    writes[name]()
    assert (run.path / name).stat().st_size > 0


def test_weights_that_do_not_fit_on_the_disk_are_told_in_a_line(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before, file = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "model.safetensors"
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(FileError, match=r"model\.safetensors: cannot be written: .*large.*; make room"):
            write_tensors(file, {"a": torch.zeros(1000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["params"]


@pytest.mark.parametrize("text", ["", '{"mean": ', "[]", "null", b"\xff\xfe\x00"])
def test_a_damaged_record_is_named_with_what_to_do(text: str | bytes) -> None:
    path = whole(config())
    for name, said in (
        ("metrics.json", "delete it, and the same call evaluates"),
        ("data.json", "delete it if"),
    ):
        before = (path / name).read_bytes()
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InputError, match=rf"{name}: expected a whole JSON record.*; {said}") as caught:
            read_metrics(path) if name == "metrics.json" else RunDirectory.open(config()).start(DATA)
        assert "\n" not in str(caught.value)
        (path / name).write_bytes(before)
    # What the line says to do mends it.
    (path / "data.json").unlink()
    RunDirectory.open(config()).start(DATA)
    assert json.loads((path / "data.json").read_text()) == DATA


def test_a_damaged_history_is_named() -> None:
    path = whole(config())
    for text in (b"", b'epoch,total\n1,"2', b"\xff\xfe\x00\xd8"):
        (path / "history.csv").write_bytes(text)
        with pytest.raises(
            InputError, match=r"history\.csv: expected a table, found a damaged file"
        ) as caught:
            read_history(path)
        assert "\n" not in str(caught.value)


# Whatever a file system allows as the name of a class or of a defect.
NAMES = [
    "cost_$5_or_$_6",
    "<b>bold<i>",
    'a:b*c?"d|e\\f',
    "100%_done",
    "螺丝 ø",
    "\udcff",
    "new\nline",
    "n" * 250,
]


@pytest.mark.filterwarnings("error")
def test_maps_of_any_name_are_written(tmp_path: Path) -> None:
    images = np.zeros((len(NAMES), 4, 4, 3), np.uint8)
    titles = [f"{name}, {name}\n0.5" for name in NAMES]
    maps = np.zeros((len(NAMES), 4, 4))
    shown: Gallery = {"images": images, "maps": maps, "masks": None, "titles": titles, "calibrated": False}
    write_maps(tmp_path / "maps", shown)
    names = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert [name[:3] for name in names] == [f"{i:02d}_" for i in range(len(NAMES))]
    assert all(len(name.encode()) < 120 and not set(name) & set('<>:"|?*\\$%\n') for name in names)
    assert names[0] == "00_cost__5_or___6_cost__5_or___6.png" and "螺丝_ø" in names[4]
