"""Features: computed once, the same from every storage, never from a cache that is stale or broken."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import small
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from hgadlib.datasets.images import load_images
from hgadlib.datasets.records import ImageRecord
from hgadlib.errors import InputError
from hgadlib.features import cache as feature_cache
from hgadlib.features import extract
from hgadlib.features import store as feature_store
from hgadlib.features.backbone import Backbone, build_backbone, flatten_maps
from hgadlib.features.cache import open_entry, write_entry
from hgadlib.features.extract import dataset_features
from hgadlib.features.store import Features, choose_storage, free_host_bytes, global_features
from hgadlib.runs.inputs import prepare

SIZE = 64
Records = list[ImageRecord]


def picture(path: Path) -> ImageRecord:
    return ImageRecord(path, class_name="noise", split="train", is_anomalous=False, defect_type="good")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build_backbone()


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """Seven images of coarse noise."""
    random = np.random.default_rng(0)
    paths = [tmp_path / "images" / f"{index}.png" for index in range(7)]
    paths[0].parent.mkdir()
    for path in paths:
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((80, 80), Image.Resampling.BICUBIC).save(path)
    return [picture(path) for path in paths]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any further computing of features fail."""

    def forward(*_: Any) -> None:
        raise AssertionError("computed although cached")

    monkeypatch.setattr(Backbone, "forward", forward)


def compute(records: Records, backbone: Backbone, **changes: Any) -> Features:
    parameters: dict[str, Any] = {"image_size": SIZE, "batch_size": 3, "progress": False, "num_workers": 1}
    return dataset_features(records, backbone, **{**parameters, **changes})


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("*") if path.name not in ("locks", "contents.sqlite"))


def refusal(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def assert_same(one: Features, other: Features) -> None:
    assert one.key == other.key and one.grids == other.grids
    for a, b in zip(one.levels, other.levels, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0)


@torch.no_grad()
def test_features_are_the_backbones_in_the_records_order(records: Records, backbone: Backbone) -> None:
    # Not in the order of names, so that sorting would show.
    records = records[::-1]
    found = compute(records, backbone, dtype="float32")
    paths = [record.path for record in records]
    ((_, images),) = load_images(paths, size=SIZE, mean=backbone.mean, std=backbone.std, batch_size=7)
    assert len(found) == 7 and found.channels == [40, 112] and found.grids == ((8, 8), (4, 4))
    assert found.nbytes == 7 * (64 * 40 + 16 * 112) * 4
    for level, expected in zip(found.levels, flatten_maps(backbone(images)), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)
    half = compute(records, backbone)
    assert half.nbytes * 2 == found.nbytes
    for level, exact in zip(half.levels, found.levels, strict=True):
        assert level.dtype == torch.float16
        torch.testing.assert_close(level.float(), exact, rtol=2**-11, atol=1e-6)


def test_batches_are_the_rows_asked_for(records: Records, backbone: Backbone) -> None:
    for storage in ("host", "file"):
        found = compute(records, backbone, storage=storage)
        order = [
            torch.tensor([5, 0]),
            torch.tensor([3]),
            torch.tensor([6, 6, 1]),
            torch.tensor([2]),
            torch.tensor([4]),
        ]
        batches = list(found.batches(order))
        assert [indices.tolist() for indices, _ in batches] == [indices.tolist() for indices in order]
        for indices, levels in batches:
            for level, whole in zip(levels, found.levels, strict=True):
                assert level.dtype == torch.float32 and level.is_contiguous()
                torch.testing.assert_close(level, whole[indices].float(), rtol=0, atol=0)
    with pytest.raises(IndexError):
        found.batch(torch.tensor([7]))


def test_stopping_early_and_failing_leave_no_thread(records: Records, backbone: Backbone) -> None:
    found = compute(records, backbone, storage="file")
    before = threading.active_count()
    batches = found.batches([torch.tensor([0])] * 9)
    next(batches)
    assert threading.active_count() > before
    batches.close()  # type: ignore[attr-defined]
    with pytest.raises(IndexError):
        list(found.batches([torch.tensor([9])]))
    assert threading.active_count() == before


def test_every_storage_holds_the_same(records: Records, backbone: Backbone, cache: Path) -> None:
    kept = [compute(records, backbone, storage=storage) for storage in ("file", "host", "device", "auto")]
    assert [found.storage for found in kept] == ["file", "host", "host", "host"]
    assert [found.cached for found in kept] == [False, True, True, True]
    assert len(entries(cache)) == 1
    shutil.rmtree(cache)
    unkept = compute(records, backbone, keep=False)
    assert not entries(cache) and unkept.storage == "host"
    for found in kept[1:]:
        assert_same(found, unkept)


@pytest.mark.usefixtures("cache")
def test_a_second_call_computes_nothing(
    records: Records, backbone: Backbone, request: pytest.FixtureRequest
) -> None:
    first = compute(records, backbone)
    request.getfixturevalue("forbidden")
    # What does not shape a feature does not matter.
    second = compute(records, backbone, batch_size=2, num_workers=2, storage="file")
    assert second.cached and not first.cached
    assert_same(first, second)


def ingredient_changes() -> dict[str, Any]:
    def shifted(backbone: Backbone) -> Backbone:
        other = build_backbone()
        other.mean = (0.4, 0.5, 0.5)
        return other

    def rewritten(records: Records) -> Records:
        """Change one byte; size and time stay, as when a copy preserves them."""
        path = records[3].path
        stat, content = path.stat(), bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return records

    return {
        "image size": lambda r, b: (r, b, {"image_size": 96}),
        "resize policy": lambda r, b: (r, b, {"resize": "pad"}),
        "number type": lambda r, b: (r, b, {"dtype": "float32"}),
        "stages": lambda r, b: (r, build_backbone(out_indices=(1, 2)), {}),
        "pyramid": lambda r, b: (r, build_backbone(out_indices=(3,), pyramid=(64, 32)), {}),
        "joined stages": lambda r, b: (r, build_backbone(join=True), {}),
        "neighbourhood": lambda r, b: (r, build_backbone(neighbourhood=3), {}),
        "network": lambda r, b: (r, build_backbone("mobilenetv3_small_050", weights="random"), {}),
        "weights": lambda r, b: (r, build_backbone(weights="random"), {}),
        "normalisation": lambda r, b: (r, shifted(b), {}),
        "content of a file": lambda r, b: (rewritten(r), b, {}),
        "order": lambda r, b: (r[::-1], b, {}),
        "fewer files": lambda r, b: (r[:-1], b, {}),
    }


@pytest.mark.parametrize("ingredient", ingredient_changes())
def test_the_key_changes_with(ingredient: str, records: Records, backbone: Backbone) -> None:
    first = compute(records, backbone)
    changed_records, changed_backbone, changes = ingredient_changes()[ingredient](records, backbone)
    second = compute(changed_records, changed_backbone, **changes)
    assert not second.cached and second.key != first.key


def test_a_run_prepares_the_joined_level_of_its_configuration(tmp_path: Path) -> None:
    settings = {"out_indices": [2, 3], "pyramid": [64, 32], "join": True, "neighbourhood": 3}
    config = small.folder_config(small.image_folder(tmp_path / "data"), None, features=settings)
    inputs = prepare(config, progress=False)
    assert (inputs.backbone.join, inputs.backbone.neighbourhood) == (True, 3)
    assert inputs.train.channels == inputs.test.channels == [152, 152]
    assert inputs.train.grids == ((8, 8), (4, 4))


def test_a_file_is_known_by_its_content(records: Records, backbone: Backbone) -> None:
    first = compute(records, backbone)
    os.utime(records[0].path, ns=(0, 10**9))
    moved = records[3].path.rename(records[3].path.with_name("moved.png"))
    second = compute([*records[:3], picture(moved), *records[4:]], backbone)
    assert second.cached and second.key == first.key


def test_the_key_changes_with_the_version_of_the_code(
    records: Records, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compute(records, backbone)
    monkeypatch.setattr(extract, "FEATURES_VERSION", extract.FEATURES_VERSION + 1)
    second = compute(records, backbone)
    assert not second.cached and second.key != first.key


@pytest.mark.parametrize(
    "damage", ["cut level", "long level", "no level", "no manifest", "cut manifest", "other key"]
)
def test_a_damaged_entry_is_computed_again(
    damage: str, records: Records, backbone: Backbone, cache: Path
) -> None:
    first = compute(records, backbone)
    (entry,) = entries(cache)
    level, manifest = entry / "level1.npy", entry / "manifest.json"
    if damage == "cut level":
        level.write_bytes(level.read_bytes()[:-1])
    elif damage == "long level":
        level.write_bytes(level.read_bytes() + b"\0")
    elif damage == "no level":
        level.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "cut manifest":
        manifest.write_text(manifest.read_text()[:100])
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "key": "0"}))
    again = compute(records, backbone)
    assert not again.cached
    assert_same(first, again)
    assert compute(records, backbone).cached and entries(cache) == [entry]


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from hgadlib.features import extract
from hgadlib.features.backbone import build_backbone

what, folder = sys.argv[1], Path(sys.argv[2])
records = [SimpleNamespace(path=path, bit_depth=16) for path in sorted((folder / "images").iterdir())]
backbone = build_backbone()
load_images = extract.load_images
(folder / f"{what}.ready").touch()
while not all((folder / f"{other}.ready").exists() for other in sys.argv[3:]):
    time.sleep(0.05)

def slow(*arguments, **keywords):
    for number, batch in enumerate(load_images(*arguments, **keywords)):
        if what == "killed" and number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        yield batch

extract.load_images = slow
found = extract.dataset_features(records, backbone, image_size=64, batch_size=3, num_workers=1)
print(found.cached)
np.save(folder / f"{what}.npy", found.levels[1].numpy())
"""


def start(what: str, folder: Path, *others: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, what, str(folder), *others],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_two_processes_fill_one_cache(
    records: Records, backbone: Backbone, tmp_path: Path, cache: Path
) -> None:
    processes = [start("one", tmp_path, "two"), start("two", tmp_path, "one")]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    # One computed; the other waited and found the result.
    assert sorted(out.strip() for out, _ in answers) == ["False", "True"]
    assert sum("another process computes them; waiting" in err for _, err in answers) == 1
    (entry,) = entries(cache)
    here = compute(records, backbone)
    assert here.cached and here.key == entry.name
    for name in ("one", "two"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), here.levels[1].numpy())


def test_without_locks_the_first_writer_wins(tmp_path: Path) -> None:
    entry, grids = tmp_path / "key", ((1, 1),)

    def rows(value: int) -> list[np.ndarray]:
        return [np.full((2, 1, 3), value, dtype=np.float32)]

    def overtaken() -> Iterator[list[np.ndarray]]:
        yield rows(1)
        write_entry(entry, [(2, 1, 3)], "float32", [rows(0)], grids=grids)

    write_entry(entry, [(2, 1, 3)], "float32", overtaken(), grids=grids)
    found = open_entry(entry)
    assert found is not None and found[0] == grids and not found[1][0].any()
    assert entries(tmp_path) == [entry]


def test_a_killed_writer_leaves_nothing_that_is_trusted(
    records: Records, backbone: Backbone, tmp_path: Path, cache: Path
) -> None:
    process = start("killed", tmp_path)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    (part,) = entries(cache)
    assert "-unfinished-" in part.name and (part / "level0.npy").stat().st_size > 0
    expected = compute(records, backbone, keep=False)
    # Another entry's writer clears it away, though not under the eyes of a writer that lives.
    key = part.name[1:].partition("-")[0]
    with FileLock(cache / "locks" / f"{key}.lock"):
        compute(records[:2], backbone)
        assert part.exists()
    compute(records[:3], backbone)
    assert not part.exists()
    found = compute(records, backbone)
    assert not found.cached
    assert_same(found, expected)


def test_the_same_entrys_next_writer_clears_away_too(
    records: Records, backbone: Backbone, cache: Path
) -> None:
    found = compute(records, backbone)
    (entry,) = entries(cache)
    entry.rename(cache / f".{found.key}-unfinished-0123")
    assert not compute(records, backbone).cached
    assert entries(cache) == [entry]


def test_a_disk_without_room_is_refused(
    records: Records, backbone: Backbone, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=10**12, used=0, free=2**28 + 1000)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        InputError, match=r"features of 7 images need 0.00 GB in .*; free some space"
    ) as error:
        compute(records, backbone)
    assert str(cache) in refusal(error)
    assert not entries(cache)
    usage.free += 7 * (64 * 40 + 16 * 112) * 2
    compute(records, backbone)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let no file grow beyond 20 kB, as on a disk that fills up meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_fills_up_leaves_nothing(records: Records, backbone: Backbone, cache: Path) -> None:
    with pytest.raises(InputError, match="cannot write in") as error:
        compute(records, backbone)
    refusal(error)
    assert not entries(cache)


def test_a_cache_that_cannot_be_written_is_refused(
    records: Records, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="name a writable folder by HGAD_CACHE") as error:
        compute(records, backbone)
    refusal(error)


def test_a_read_only_cache_that_holds_the_features_is_used(
    records: Records, backbone: Backbone, cache: Path
) -> None:
    first = compute(records, backbone)
    shutil.rmtree(cache / "locks")
    # Root may write whatever the mode says: a file in the locks' place stops everybody.
    (cache / "locks").touch()
    second = compute(records, backbone)
    assert second.cached
    assert_same(first, second)
    with pytest.raises(InputError, match="name a writable folder by HGAD_CACHE"):
        compute(records[:2], backbone)


@pytest.mark.parametrize("storage", ["host", "file"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_were_changed_to_nan_are_named(
    storage: str, value: float, records: Records, backbone: Backbone, cache: Path
) -> None:
    compute(records, backbone)
    (entry,) = entries(cache)
    stored = np.load(entry / "level1.npy", mmap_mode="r+")
    stored[-1, 0, 0] = value
    stored.flush()
    with pytest.raises(InputError) as error:
        compute(records, backbone, storage=storage)
    said = refusal(error)
    assert str(entry / "level1.npy") in said and "NaN" in said
    assert f"delete the folder {entry}, and the same call" in said
    shutil.rmtree(entry)
    assert not compute(records, backbone, storage=storage).cached


def scaled(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    forward = Backbone.forward

    def larger(self: Backbone, images: Tensor) -> list[Tensor]:
        maps = forward(self, images)
        if len(images) > 1:
            maps[0][1, 0, 0, 0] = factor
        return maps

    monkeypatch.setattr(Backbone, "forward", larger)


def test_features_too_large_for_float16_are_refused(
    records: Records, backbone: Backbone, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(backbone, monkeypatch, 1e5)
    for keep in (True, False):
        with pytest.raises(InputError, match=r"size 1e\+05 is more than float16 holds .* float32") as error:
            compute(records, backbone, keep=keep)
        assert str(records[1].path) in refusal(error)
    assert not entries(cache)
    assert compute(records, backbone, dtype="float32").levels[0].max() == 1e5


def test_features_that_are_not_finite_are_refused(
    records: Records, backbone: Backbone, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(backbone, monkeypatch, float("nan"))
    with pytest.raises(InputError, match="not finite") as error:
        compute(records, backbone, dtype="float32")
    assert str(records[1].path) in refusal(error)
    assert not entries(cache)


def test_a_file_that_changes_meanwhile_is_noticed(
    records: Records, backbone: Backbone, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Backbone.forward

    def disturbed(self: Backbone, images: Tensor) -> list[Tensor]:
        os.utime(records[2].path)
        return forward(self, images)

    monkeypatch.setattr(Backbone, "forward", disturbed)
    with pytest.raises(InputError, match="changed while its features were computed") as error:
        compute(records, backbone)
    refusal(error)
    assert not entries(cache)


def test_a_bad_image_leaves_nothing(records: Records, backbone: Backbone, cache: Path) -> None:
    records[4].path.write_bytes(records[4].path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"4\.png") as error:
        compute(records, backbone)
    refusal(error)
    assert not entries(cache)
    records[4].path.unlink()
    with pytest.raises(InputError, match=r"4\.png: expected an image file, found none"):
        compute(records, backbone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "file", "keep": False}, "which memory has no room for; keep them on disk"),
        ({"resize": "crop"}, "resize: expected one of stretch"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_parameters_are_refused(
    changes: dict[str, Any], message: str, records: Records, backbone: Backbone, cache: Path
) -> None:
    with pytest.raises(InputError, match=message) as error:
        compute(records, backbone, **changes)
    refusal(error)
    assert not entries(cache)


def test_no_images_and_a_wrong_pyramid_are_refused(records: Records, backbone: Backbone) -> None:
    with pytest.raises(InputError, match="at least one image, found none"):
        compute([], backbone)
    pyramid = build_backbone(out_indices=(3,), pyramid=(64, 32))
    with pytest.raises(InputError, match="starts from images of 64 pixels, found 128 x 128"):
        compute(records, pyramid, image_size=128)


def test_storage_goes_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(feature_store, "free_host_bytes", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 200))
    assert choose_storage(50, "auto", cuda) == "device"
    assert choose_storage(51, "auto", cuda) == choose_storage(500, "auto", cuda) == "host"
    assert choose_storage(501, "auto", cuda) == choose_storage(501, "auto", cpu) == "file"
    assert choose_storage(50, "device", cpu) == "host"
    assert choose_storage(10**6, "file", cpu) == "file"
    full: list[tuple[Literal["device", "host"], int, torch.device]]
    full = [("device", 101, cuda), ("host", 1001, cuda), ("device", 1001, cpu)]
    for storage, size, device in full:
        with pytest.raises(InputError, match="set it to auto or file") as error:
            choose_storage(size, storage, device)
        refusal(error)


def test_without_room_in_memory_features_go_to_a_file(
    records: Records, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "free_host_bytes", lambda: 1000)
    found = compute(records, backbone)
    assert found.storage == "file"
    with pytest.raises(InputError, match="which memory has no room for") as error:
        compute(records, backbone, keep=False)
    refusal(error)


def test_free_memory_is_at_most_the_machines() -> None:
    import psutil

    assert 0 < free_host_bytes() <= psutil.virtual_memory().total


def test_global_features_are_averages_of_length_one(records: Records, backbone: Backbone) -> None:
    found = compute(records, backbone)
    pooled = global_features(found)
    assert pooled.shape == (7, 112) and pooled.dtype == np.float32
    expected = found.levels[1][3].float().mean(0)
    np.testing.assert_allclose(pooled[3], expected / expected.norm(), rtol=1e-5)
    assert global_features(found, level=0).shape == (7, 40)


def test_it_says_where_features_go(
    records: Records, backbone: Backbone, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compute(records, backbone, progress=True)
    text = capsys.readouterr().err
    assert f"features of 7 images: 0.00 GB in {cache}" in text
    assert "7/7" in text and "image/s" in text
    compute(records, backbone, progress=False)
    assert not capsys.readouterr().err
