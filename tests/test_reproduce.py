"""The chapter on reproducing the paper's numbers: commands that are understood, arithmetic as by hand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hgadbook import reproduce
from hgadbook.complexity import Complexity
from hgadlib.__main__ import _parser, read_parameters
from hgadlib.config import Config, load_config, training_key
from hgadlib.datasets.published import PARTS
from hgadlib.errors import InputError
from hgadlib.runs.grid import load_grid

ROOT = Path(__file__).parents[1]
COST = Complexity(
    name="tiny", image_size=8, levels=((4, 2, 3), (6, 1, 1)),
    multiply_adds={"backbone": 100, "flow": 20, "prior": 3, "maps": 2}, step=70, frozen=50, flow=10, prior=5,
    epochs=4, train_batch=2,
)  # fmt: skip


def commands() -> list[str]:
    """List the page's lines of shell, loops unrolled, from its text and from what it computes."""
    cells = json.loads((ROOT / "book" / "reproduce.ipynb").read_text(encoding="utf-8"))["cells"]
    blocks = [
        block
        for cell in cells
        if cell["cell_type"] == "markdown"
        for block in re.findall(r"^```bash\n(.*?)^```$", "".join(cell["source"]), re.S | re.M)
    ]
    blocks.append(reproduce.weights_commands(load_config(dataset="mvtec", experiment="paper")))
    blocks += list(reproduce.comparisons()["command"])
    found = []
    for line in "\n".join(blocks).splitlines():
        loop = re.fullmatch(r"for (\w+) in ([^;]+); do (.+); done", line)
        bodies = [loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()] if loop else [line]
        found += [body for body in bodies if body and not body.startswith("#")]
    return found


def config_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(ROOT)
    return load_config(read_parameters(_parser().parse_args(words)))


@pytest.mark.parametrize("line", dict.fromkeys(commands()))
def test_every_command_of_the_page_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = shlex.split(line)
    if program == "hgad" and words[0] == "-p":
        config = config_of(words, monkeypatch)
        assert config.features.backbone == "tf_efficientnet_b6" and config.dataset in (*PARTS, "union")
    elif program == "hgad":
        options = _parser().parse_args(words)
        if words[0] == "grid":
            load_grid(options.grid, datasets=options.datasets)
    elif program == "papermill":
        chapter, out, *parameters = words
        assert (ROOT / chapter).is_file() and out == "out.ipynb"
        options = _parser().parse_args(parameters)
        if chapter == "book/train.ipynb":
            assert config_of(parameters, monkeypatch).features.backbone == "tf_efficientnet_b6"
        else:
            code = (ROOT / chapter).read_text(encoding="utf-8")
            assert all(f'"{name} = ' in code for name, _ in options.parameter), (
                "no such parameter of the chapter"
            )
    elif program == "snakemake":
        assert (ROOT / words[words.index("--workflow-profile") + 1]).is_dir()
        given = dict(word.split("=") for word in words[words.index("--config") + 1 :])
        settings = re.search(
            r"^SETTINGS = \{(.*?)^\}", (ROOT / "workflow/Snakefile").read_text(), re.S | re.M
        )
        assert settings and all(f'"{name}":' in settings[1] for name in given)
        load_grid(given["grid"], datasets=given["datasets"].strip("[]").split(","))
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
    else:
        assert (program, words[0]) in {("export", "HGAD_DATA=data"), ("hf", "download")}


def test_a_row_s_command_is_the_run_that_the_table_means(monkeypatch: pytest.MonkeyPatch) -> None:
    table = reproduce.comparisons()
    for dataset, experiment, command in table[["dataset", "experiment", "command"]].itertuples(index=False):
        run = config_of(shlex.split(command)[1:], monkeypatch)
        assert run == reproduce.configured(dataset, experiment)
        assert (run.dataset, run.experiment) == (dataset, experiment)
        assert run.flow.layers == 12
    # The rows of a table differ from the paper's settings in what they vary, and in nothing else.
    three, ten = (reproduce.configured("mvtec", f"tab3b_{n}") for n in (3, 10))
    assert (three.prior.n_centers, ten.prior.n_centers) == (3, 10)
    paper = reproduce.configured("mvtec", "paper")
    assert paper.loss.lambda2 == 100 and ten.loss.lambda2 == 10
    assert training_key(paper) == training_key(reproduce.configured("mvtec", "tab3d_1_100"))
    assert reproduce.distinct_trainings(table) < len(table)


def test_the_paper_s_numbers_stand_beside_their_runs() -> None:
    table = reproduce.comparisons()
    columns = ["table", "experiment", "dataset", "image_auroc", "pixel_auroc"]
    pairs = {tuple(key): (image, pixel) for *key, image, pixel in table[columns].itertuples(index=False)}
    assert pairs["Tab. 1", "paper", "mvtec"] == (98.4, 97.9)
    assert pairs["Tab. 2", "paper", "union"] == (93.5, 97.5)
    assert pairs["Tab. 3a", "tab3a_sgc", "mvtec"] == (89.0, 94.0)
    assert set(table["dataset"]) == {*PARTS, "union"}


def test_a_record_answers_its_rows_wherever_its_weights_lay() -> None:
    table = reproduce.comparisons()
    given = {"features.weights": "elsewhere.safetensors", "data.root": "/x"}
    run = load_config(dataset="mvtec", experiment="paper", seed=4, overrides=given)
    other = load_config(dataset="mvtec", experiment="paper", epochs=1)
    records = [{"record": name, "config": c.to_dict()} for name, c in (("mine", run), ("short", other))]
    found = reproduce.recorded(table, records)
    rows = table["experiment"][[bool(names) for names in found]]
    assert set(rows) == {"paper", "tab3d_1_100"} and [names for names in found if names] == [
        ["mine"],
        ["mine"],
    ]
    assert not any(reproduce.recorded(table, []))


def test_the_counts_are_those_of_the_paper() -> None:
    assert reproduce.image_counts("mvtec") == {"classes": 15, "train": 3629, "test": 1725}
    assert reproduce.image_counts("visa") == {"classes": 12, "train": 9621, "test": 1200}
    mvtec3d = reproduce.image_counts("mvtec3d")
    assert mvtec3d["train"] + mvtec3d["test"] <= 4147  # with the validation images, which nobody reads
    assert reproduce.image_counts("union")["classes"] == 40
    with pytest.raises(InputError, match="expected one of the paper's datasets"):
        reproduce.image_counts("demo")


def test_work_by_hand() -> None:
    config = load_config(dataset="mvtec", experiment="paper", epochs=4)
    counts = {"train": 10, "test": 6}
    assert reproduce.multiply_adds(config, COST, counts) == {
        "features, once": 16 * 100, "training": 10 * 4 * 70, "scores of the test images": 6 * 25,
        "constants of the scores": 10 * 23,
    }  # fmt: skip
    often = load_config(dataset="mvtec", experiment="released", epochs=4)
    assert reproduce.evaluations(often) == 4
    work = reproduce.multiply_adds(often, COST, counts)
    assert work["scores of the test images"] == 4 * 6 * 25 and "constants of the scores" not in work


def test_memory_by_hand() -> None:
    given: dict[str, Any] = {"flow.layers": 3, "flow.position_dim": 4, "flow.hidden_ratio": 2}
    config = load_config(dataset="mvtec", experiment="paper", batch_size=2, overrides=given)
    found = list(reproduce.memory(config, COST, {"train": 10, "test": 6}).values())
    # Input and output, hidden layer (2 x (passive half + 4)), what the subnet gives, at each position.
    step = 2 * 3 * (6 * (8 + 12 + 4) + 1 * (12 + 14 + 6)) * 4
    assert found == [16 * 30 * 2, 50 * 4, 4 * 15 * 4, step]


def test_a_card_s_rate_needs_sense() -> None:
    assert reproduce.card_rate(cores=100, clock_ghz=2, share=0.1) == pytest.approx(2e10)
    for wrong in ({"cores": 0}, {"clock_ghz": -1.0}, {"share": 1.5}):
        with pytest.raises(InputError, match="expected cores and a clock above 0"):
            reproduce.card_rate(**{"cores": 100, "clock_ghz": 1.0, "share": 0.5, **wrong})  # type: ignore[arg-type]


def test_a_backbone_without_published_weights_is_told() -> None:
    with pytest.raises(InputError, match="no published weights"):
        reproduce.weights_commands(load_config(backbone="resnet8_of_nobody"))
