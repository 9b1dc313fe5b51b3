"""The parameter files of the paper's tables: they load, say what they are, and switch what they name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hgadlib.config import Config, load_config
from hgadlib.mixture import HierarchicalGaussianMixture
from hgadlib.model import HGAD

FOLDER = Path(__file__).resolve().parents[1] / "params" / "experiments"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def config(name: str) -> Config:
    return load_config(dataset="demo", experiment=name)


def terms(name: str, *, intra: bool) -> set[str]:
    """Which losses one step of an experiment has."""
    found = config(name)
    flow = dataclasses.replace(found.flow, layers=2, position_dim=4)
    model = HGAD(["a", "b"], [6], [(2, 2)], flow=flow, prior=found.prior)
    features = [torch.randn(3, 4, 6)]
    (losses,) = model.losses(features, torch.tensor([0, 1, 1]), intra=intra, **dataclasses.asdict(found.loss))
    losses["total"].backward()
    weights = {"nll": found.loss.lambda1}
    return {term for term in losses if weights.get(term, 1.0) and term != "total"}


def test_every_row_is_there() -> None:
    tables = {
        table: sum(name.startswith(table) for name in NAMES) for table in ("tab3a", "tab3b", "tab3c", "tab3e")
    }
    assert tables == {"tab3a": 6, "tab3b": 5, "tab3c": 3, "tab3e": 2}
    assert {"paper", "released", "tab3d_1_10", "tab3d_1_100"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_file_says_what_it_is(name: str) -> None:
    comment = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = " ".join(line.removeprefix("#").strip() for line in comment)
    for wanted in ("Expected", "ardware", "uration", f"-p experiment {name}", "Command: papermill"):
        assert wanted in text
    assert config(name).experiment == name


def test_all_but_the_ablated_setting_is_equal() -> None:
    full = config("tab3a_full").identity()
    for name in ("tab3b_10", "tab3c_both", "tab3d_1_10", "tab3e_two_stage"):
        assert {**config(name).identity(), "experiment": "tab3a_full"} == full
    assert (full["loss"]["lambda1"], full["loss"]["lambda2"]) == (1, 10)
    for count in (3, 5, 15, 20):
        other = config(f"tab3b_{count}").identity()
        assert other.pop("prior") == {**full["prior"], "n_centers": count}
        assert {**other, "experiment": "tab3a_full"} == {k: v for k, v in full.items() if k != "prior"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tab3a_sgc", {"nll"}),
        ("tab3a_fmc", {"intra"}),
        ("tab3a_icg", {"nll"}),
        ("tab3a_icg_mim", {"nll", "mi", "entropy"}),
        ("tab3a_fmc_intra", {"intra"}),
        ("tab3a_full", {"nll", "mi", "entropy", "intra"}),
        ("appe_eq18", {"nll", "mi", "entropy"}),
        ("paper", {"nll", "mi", "entropy", "intra"}),
        ("released", {"nll", "mi", "entropy", "intra", "log_sigmoid"}),
    ],
)
def test_terms_of_the_second_stage(name: str, expected: set[str]) -> None:
    assert terms(name, intra=True) == expected


def test_fixed_centres_stay() -> None:
    for name, centers in (("tab3a_fmc", 1), ("tab3a_fmc_intra", 10)):
        prior = HGAD(["a"], [6], [(2, 2)], flow=config(name).flow, prior=config(name).prior).priors[0]
        assert isinstance(prior, HierarchicalGaussianMixture)
        assert not prior.centers.requires_grad
        assert prior.intra_centers().shape[1] == centers


def test_a_preset_can_stand_under_an_ablation() -> None:
    import yaml

    preset = yaml.safe_load((FOLDER / "paper.yaml").read_text())
    joined = load_config(dataset="demo", experiment="tab3a_icg", **preset)
    assert joined.features.backbone == "tf_efficientnet_b6"
    assert (joined.prior.n_centers, joined.loss.lambda2) == (1, 0)
