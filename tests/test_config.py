"""Parameters to a configuration: who wins, and what is said of a wrong one."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hgadlib import config as config_module
from hgadlib.__main__ import read_parameters
from hgadlib.config import (
    PARAMETERS,
    Config,
    config_from_dict,
    config_from_notebook,
    load_config,
    run_dir,
)
from hgadlib.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two datasets and an experiment, all of which set the learning rate."""
    write(
        tmp_path, "demo", {"dataset": "demo", "train": {"lr": 0.0123, "epochs": 10}, "loss": {"lambda2": 7}}
    )
    write(tmp_path, "elpv", {"train": {"lr": 0.0223}})
    write(tmp_path, "experiments/paper", {"train": {"lr": 0.0323}, "loss": {"lambda1": 2}})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(project: Path, name: str, values: Any) -> None:
    path = project / "params" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))


def message(**parameters: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_config(parameters)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_each_source_wins_over_the_one_before(project: Path) -> None:
    assert Config().train.lr not in (0.0123, 0.0223, 0.0323, 0.0423, 0.0523)
    assert load_config(dataset="demo").train.lr == 0.0123
    assert load_config(dataset="demo", train={"lr": 0.0423}).train.lr == 0.0423
    assert load_config(dataset="demo", experiment="paper", train={"lr": 0.0423}).train.lr == 0.0323
    assert load_config(dataset="demo", train={"epochs": 11}, epochs=12).train.epochs == 12
    found = load_config(
        dataset="demo", experiment="paper", epochs=12, overrides={"train.lr": 0.0523, "train.epochs": 13}
    )
    assert (found.train.lr, found.train.epochs) == (0.0523, 13)
    # What a stronger source leaves alone is the weaker one's.
    assert (found.loss.lambda1, found.loss.lambda2, found.flow) == (2, 7, Config().flow)
    assert (found.dataset, found.experiment) == ("demo", "paper")


def test_a_base_is_weaker_than_the_dataset_s_file(project: Path) -> None:
    base = {"train": {"lr": 0.0623, "epochs": 20}, "loss": {"lambda1": 3, "lambda2": 5, "lambda_e": 6}}
    write(project, "experiments/tables", base)
    write(project, "experiments/row", {"base": "tables", "loss": {"lambda1": 2}})
    plain = load_config(dataset="demo")
    assert 6 not in (plain.loss.lambda_e, load_config(dataset="demo", experiment="paper").loss.lambda_e)
    for given in ({"experiment": "row"}, {"base": "tables", "loss": {"lambda1": 2}}):
        found = load_config(given, dataset="demo")
        assert (found.loss.lambda1, found.loss.lambda_e) == (2, 6)  # the row's, the base's
        # The dataset's file.
        assert (found.train.lr, found.train.epochs, found.loss.lambda2) == (0.0123, 10, 7)
        assert load_config(given, dataset="elpv").train.epochs == 20
        # What none of them says is the default.
        assert found.flow == Config().flow
    # A base is no experiment: nothing but its settings shows.
    found = load_config(dataset="demo", base="tables")
    assert (found.experiment, found.loss.lambda1) == ("hgad", 3)
    assert "base" not in found.to_dict()
    # An experiment's own base is the one it is defined on.
    write(project, "experiments/other", {"loss": {"lambda_e": 9}})
    assert load_config(dataset="demo", experiment="row", base="other").loss.lambda_e == 6
    assert load_config(dataset="demo", experiment="paper", base="other").loss.lambda_e == 9
    # A pyramid of a base scales with the image size as a dataset's does.
    write(project, "experiments/tables", {"features": {"pyramid": [400, 100]}})
    assert load_config(dataset="demo", experiment="row", image_size=200).features.pyramid == (200, 50)


def test_an_unknown_base_is_refused_with_the_known_names(project: Path) -> None:
    write(project, "experiments/row", {"base": "papr"})
    for said in (message(base="papr"), message(experiment="row")):
        assert "'papr'" in said and said.endswith("(did you mean paper?); expected one of: paper, row")
    write(project, "experiments/row", {"base": "paper", "train": {"lr": "x"}})
    assert "train.lr in params/experiments/row.yaml" in message(experiment="row")
    write(project, "experiments/paper", {"train": {"lr": "x"}})
    write(project, "experiments/row", {"base": "paper"})
    write(project, "other", {"train": {"epochs": 3}})
    assert "train.lr in params/experiments/paper.yaml" in message(dataset="other", experiment="row")
    # Only an experiment, or a parameter, names one.
    for parameters in ({"overrides": {"base": "paper"}}, {"experiment": "row", "dataset": "elpv"}):
        write(project, "elpv", {"base": "paper"})
        assert "unknown parameter" in message(**parameters)


def test_a_file_by_f_and_a_dataset_by_p_are_the_same_run(project: Path) -> None:
    injected = yaml.safe_load((project / "params" / "demo.yaml").read_text())
    assert load_config(injected) == load_config(dataset="demo")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_parameter_file_loads_by_name_and_by_f(path: Path) -> None:
    assert load_config(yaml.safe_load(path.read_text())) == load_config(dataset=path.stem)
    assert load_config(dataset=path.stem).dataset == path.stem


def test_the_shipped_folder_is_found_from_a_chapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY / "book")
    assert config_module.project_dir() == REPOSITORY


def test_none_counts_as_not_given(project: Path) -> None:
    assert load_config(dataset="demo", epochs=None, seed=None, experiment=None) == load_config(dataset="demo")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"epocs": 3}, "did you mean epochs?"),
        ({"dataset": "elvp"}, "did you mean elpv?"),
        ({"experiment": "papr"}, "did you mean paper?"),
        ({"overrides": {"loss.lamda2": 1}}, "did you mean loss.lambda2?"),
        ({"overrides": {"los.lambda2": 1}}, "did you mean loss?"),
        ({"overrides": {"sed": 1}}, "did you mean seed?"),
        ({"loss": {"lamda2": 1}}, "did you mean loss.lambda2?"),
    ],
)
def test_a_misspelt_name_is_one_line_with_the_right_one(
    project: Path, parameters: dict[str, Any], said: str
) -> None:
    assert said in message(**parameters)


def test_an_unknown_name_lists_the_valid_ones(project: Path) -> None:
    assert all(name in message(zzz=1) for name in PARAMETERS)
    assert message(dataset="zzz").endswith("expected one of: demo, elpv")
    assert message(dataset="demo", experiment="zzz").endswith("expected one of: paper")


def test_a_dataset_is_a_name_and_no_path(project: Path) -> None:
    assert "unknown dataset" in message(dataset="experiments/paper")
    assert "unknown dataset" in message(dataset="../params/demo")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"epochs": "many"}, "train.epochs in the parameters: expected a whole number, found 'many'"),
        ({"epochs": 2.5}, "expected a whole number, found 2.5"),
        ({"epochs": True}, "expected a whole number, found True"),
        ({"seed": "0"}, "expected a whole number, found '0'"),
        ({"dataset": 3}, "dataset in the parameters: expected text, found 3"),
        ({"download": "yes"}, "expected true or false, found 'yes'"),
        ({"overrides": {"train.lr": "fast"}}, "expected a number, found 'fast'"),
        ({"overrides": {"train.lr": "nan"}}, "expected a number, found 'nan'"),
        ({"overrides": {"train.lr": math.inf}}, "expected a number, found inf"),
        ({"overrides": {"train.betas": [0.9]}}, "expected a list of 2 numbers, found [0.9]"),
        ({"overrides": {"features.out_indices": 2}}, "expected a list of whole numbers, found 2"),
        ({"overrides": {"flow.kind": "spline"}}, "expected one of positional, convolutional, found 'spline'"),
        (
            {"overrides": "lambda2"},
            "ill-typed overrides in the parameters: expected keys with values, found 'lambda2'",
        ),
        ({"overrides": {"dataset": "elpv"}}, "give it as a parameter"),
        ({"loss": 3}, "ill-typed loss in the parameter file: expected keys with values, found 3"),
    ],
)
def test_an_ill_typed_value_says_what_was_expected_and_found(
    project: Path, parameters: dict[str, Any], said: str
) -> None:
    assert said in message(**parameters)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seed", -1, "at least 0"), ("seed", 2**32, "at most 4294967295"),
        ("data.image_size", 8, "at least 16"),
        ("data.num_workers", 0, "at least 1"), ("features.out_indices", [4, 65], "at most 64"),
        ("features.pyramid", [256, 8], "at least 16"), ("features.batch_size", 0, "at least 1"),
        ("flow.layers", -1, "at least 0"),
        ("flow.clamp", 0, "at least 1e-06"), ("prior.n_centers", 0, "at least 1"),
        ("prior.delta_std", -1, "at least 0"), ("loss.lambda2", -0.5, "at least 0"),
        ("loss.label_smoothing", 1.5, "at most 1"), ("train.epochs", 0, "at least 1"),
        ("train.first_stage", 2, "at most 1"), ("train.lr", -1e-3, "at least 0"),
        ("train.milestones", [0.5, 1.5], "at most 1"), ("train.betas", [0.9, 1], "less than 1"),
        ("train.gradient_clip", 0, "at least 1e-12"), ("train.evaluate_every", -1, "at least 0"),
        ("score.map_size", 0, "at least 1"), ("score.sigma", -1, "at least 0"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_says_the_range(project: Path, key: str, value: Any, said: str) -> None:
    assert f"parameter {key} in the parameters: expected {said}, found {value!r}" in message(
        overrides={key: value}
    )


def test_positions_come_in_fours(project: Path) -> None:
    assert "multiple of 4" in message(overrides={"flow.position_dim": 6})
    load_config(overrides={"flow.position_dim": 6, "flow.kind": "convolutional"})


def test_a_pyramid_scales_with_the_image_size(project: Path) -> None:
    write(project, "demo", {"data": {"image_size": 512}, "features": {"pyramid": [512, 256]}})
    assert load_config(dataset="demo", image_size=128).features.pyramid == (128, 64)
    assert load_config(overrides={"data.image_size": 300}).features.pyramid == (300, 150)
    both = load_config(overrides={"data.image_size": 128, "features.pyramid": [128, 96]})
    assert both.features.pyramid == (128, 96)
    assert load_config(overrides={"image_size": 128, "features.pyramid": None}).features.pyramid is None
    write(project, "elpv", {"features": {"pyramid": None}})
    assert load_config(dataset="elpv", image_size=128).features.pyramid is None
    # A record of a run says both; neither follows the other.
    record = {"data": {"image_size": 128}, "features": {"pyramid": [512, 256]}}
    assert config_from_dict(record).features.pyramid == (512, 256)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_image_size_alone_works_on_every_dataset(path: Path) -> None:
    found = load_config(dataset=path.stem, image_size=128)
    assert found.features.pyramid is None or found.features.pyramid[0] == found.data.image_size == 128


def test_folders_may_have_numbers_for_names_and_numpy_numbers_count(project: Path) -> None:
    found = load_config(dataset="demo", data_root=2024, run_dir=7, epochs=np.int64(3), seed=np.int32(1))
    assert (found.data.root, found.run_dir, found.train.epochs, found.seed) == ("2024", "7", 3, 1)
    json.dumps(found.to_dict())


def test_a_command_line_takes_what_papermill_takes() -> None:
    options = Namespace(
        file=[], yaml=["epochs: 2", "{seed: 3, epochs: 4}"], parameter=[["epochs", "5"], ["seed", "None"]]
    )
    assert read_parameters(options) == {"epochs": 5, "seed": None}
    options.parameter = [["data_root", "2024"], ["download", "true"], ["experiment", "null"]]
    assert read_parameters(options) == {
        "seed": 3, "epochs": 4, "data_root": 2024, "download": True, "experiment": None,
    }  # fmt: skip
    with pytest.raises(InputError, match="expected names with values"):
        read_parameters(Namespace(file=[], yaml=["3"], parameter=[]))


def test_somebody_else_s_params_folder_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "theirs.yaml").write_text("a: 1\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(dataset="demo").dataset == "demo"


def test_yaml_reads_1e_3_as_text_and_it_is_still_a_number(project: Path) -> None:
    write(project, "demo", "train:\n  lr: 1e-3\n  milestones: [5e-1]\n")
    found = load_config(dataset="demo").train
    assert (found.lr, found.milestones) == (0.001, (0.5,))


@pytest.mark.parametrize(
    ("text", "said"), [("train: [", "syntax error"), ("3", "expected keys with values, found int")]
)
def test_a_broken_file_is_one_line(project: Path, text: str, said: str) -> None:
    write(project, "demo", text)
    assert said in message(dataset="demo")
    assert "demo.yaml" in message(dataset="demo")


def test_an_error_names_the_file_it_is_in(project: Path) -> None:
    write(project, "experiments/paper", {"train": {"lr": "x"}})
    assert "params/experiments/paper.yaml" in message(experiment="paper")


def test_the_digest_is_of_what_is_computed(project: Path) -> None:
    plain = load_config(dataset="demo").digest
    elsewhere: dict[str, Any] = {
        "run_dir": "somewhere", "device": "cpu", "data_root": "elsewhere", "num_workers": 3, "download": True,
        "overrides": {"features.storage": "file", "features.batch_size": 2},
    }  # fmt: skip
    for name, value in elsewhere.items():
        assert load_config({"dataset": "demo", name: value}).digest == plain, name
    for parameters in ({"seed": 1}, {"epochs": 11}, {"image_size": 64}, {"overrides": {"score.sigma": 1}}):
        assert load_config(parameters, dataset="demo").digest != plain, parameters


def test_a_configuration_survives_yaml(project: Path) -> None:
    config = load_config(dataset="demo", overrides={"features.pyramid": [64, 32], "train.gradient_clip": 1})
    assert config.features.pyramid == (64, 32)
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_a_notebook_gives_its_parameters_and_nothing_else(project: Path) -> None:
    namespace: dict[str, Any] = {
        "__name__": "__main__", "_oh": {}, "_i1": "x = 1", "In": ["", "x"], "Out": {1: 2}, "math": math,
        "helper": lambda: 3, "Config": Config, "_private": 3,
        "dataset": "demo", "epochs": 4, "experiment": None, "overrides": {"loss.lambda2": 3},
    }  # fmt: skip
    assert config_from_notebook(namespace) == load_config(
        dataset="demo", epochs=4, overrides={"loss.lambda2": 3}
    )
    assert config_from_notebook({"dataset": "elpv"}, epochs=5).train.epochs == 5
    assert config_from_notebook({"epochs": 6}, epochs=5).train.epochs == 6
    # A chapter's own parameters are none of the configuration's; others still are refused.
    assert config_from_notebook({"epochs": 6, "rate": 0.1}, own=("rate",)).train.epochs == 6
    with pytest.raises(InputError, match="rates"):
        config_from_notebook({"rates": 0.1}, own=("rate",))


def test_a_parameter_that_papermill_only_warns_of_is_an_error(project: Path) -> None:
    with pytest.raises(InputError, match="did you mean epochs"):
        config_from_notebook({"dataset": "demo", "epoch": 4})
    with pytest.raises(InputError, match="unknown parameter 'colour'"):
        config_from_notebook({"dataset": "demo", "colour": "red"})


def test_a_cell_run_again_minds_no_variables_of_later_cells(project: Path) -> None:
    namespace: dict[str, Any] = {"dataset": "demo", "epochs": 4}
    config_from_notebook(namespace)
    namespace |= {"metrics": {"a": 1}, "i": 3, "epochs": 5}
    assert config_from_notebook(namespace).train.epochs == 5
    with pytest.raises(InputError, match="did you mean image_size"):
        config_from_notebook(namespace | {"imagesize": 64})


def test_the_run_directory_says_dataset_experiment_and_seed(project: Path) -> None:
    config = load_config(dataset="demo", experiment="paper", seed=3)
    assert run_dir(config) == project / "runs" / "demo" / "paper" / "seed3"
    assert run_dir(load_config(run_dir="~/x")) == Path.home() / "x"
