"""The whole model: its density, what print says, and the names of its weights."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from small import CHANNELS, FLOW, GRIDS, PRIOR, features, model
from torch import Tensor

from hgadlib.config import FlowConfig, PriorConfig, completed
from hgadlib.errors import InputError
from hgadlib.features.store import Features
from hgadlib.method import read_tensors, write_tensors
from hgadlib.mixture import HierarchicalGaussianMixture
from hgadlib.model import HGAD


def one_level(channels: int, grid: tuple[int, int], n_classes: int, n_centers: int, kind: str) -> HGAD:
    """A model of one level in float64, with nothing at its initial value."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        made = HGAD(
            [f"class{k}" for k in range(n_classes)], [channels], [grid],
            flow=FlowConfig(layers=3, position_dim=4),
            prior=PriorConfig(kind=kind, covariance="identity", n_centers=n_centers),  # type: ignore[arg-type]
        )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    normaliser = made.levels[0][0].normaliser
    assert normaliser is not None
    normaliser.fit(torch.ones(channels), 2 * torch.eye(channels) + 0.3, whiten=True)
    return made


PRIORS = [(3, 4, "mixture"), (1, 1, "mixture"), (2, 3, "single")]


@pytest.mark.parametrize(("n_classes", "n_centers", "kind"), PRIORS)
def test_log_prob_is_prior_and_jacobian(n_classes: int, n_centers: int, kind: str) -> None:
    made = one_level(3, (2, 2), n_classes, n_centers, kind)
    flow, prior = made.levels[0]
    x, k = torch.randn(1, 4, 3, dtype=torch.float64), n_classes - 1

    def at_position(value: Tensor) -> Tensor:
        return flow(torch.cat([x[:, :2], value.view(1, 1, 3), x[:, 3:]], 1))[0][0, 2]

    jacobian = torch.autograd.functional.jacobian(at_position, x[0, 2])
    z, centers, weights = at_position(x[0, 2]), torch.zeros(1, 3).double(), torch.ones(1).double()
    if kind == "mixture":
        state = prior.state_dict()
        centers = torch.cat([state["centers"][k][None], state["centers"][k] + state["deltas"][k]])
        weights = state["psi_intra"][k].softmax(0)
    gaussians = (2 * math.pi) ** -1.5 * (-0.5 * (z - centers).square().sum(-1)).exp()
    expected = (weights * gaussians).sum().log() + torch.linalg.det(jacobian).abs().log()
    (found,) = made.log_prob([x], torch.tensor([k]))
    assert found.shape == (1, 4)
    torch.testing.assert_close(found[0, 2], expected, rtol=1e-10, atol=1e-10)


def test_the_density_integrates_to_one() -> None:
    made = one_level(2, (1, 1), 2, 2, "mixture")
    axis = torch.linspace(-25, 25, 1001, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis)[:, None]  # an image a point
    for k in (0, 1):
        with torch.no_grad():
            (log_prob,) = made.log_prob([plane], torch.full((len(plane),), k))
        assert float(log_prob.exp().sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=1e-3)


def test_level_values_are_the_density_per_dimension() -> None:
    made, (data, class_idx) = model(), features(5)
    labels = torch.from_numpy(class_idx)
    values = made.level_values(list(data.levels), labels)
    for level, log_prob in enumerate(made.log_prob(list(data.levels), labels)):
        expected = log_prob.unflatten(1, GRIDS[level]) / CHANNELS[level]
        torch.testing.assert_close(values.log_prob[level], expected)


def test_scores_by_likelihood_cost_no_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    made, (data, class_idx) = model(), features(5)
    labels = torch.from_numpy(class_idx)
    whole, (inferred, taken, sure) = made.level_values(data.levels, labels), made.inferred_values(data.levels)
    assert len(whole.neg_entropy) == len(inferred.neg_entropy) == len(GRIDS)
    monkeypatch.setattr(HierarchicalGaussianMixture, "neg_entropy", None)  # not to be called
    found = made.inferred_values(data.levels, entropy=False)
    assert found[1].equal(taken) and found[2].equal(sure)
    for values, expected in (
        (made.level_values(data.levels, labels, entropy=False), whole),
        (found[0], inferred),
    ):
        assert values.neg_entropy == ()
        assert all(x.equal(y) for x, y in zip(values.log_prob, expected.log_prob, strict=True))


def test_print_says_what_it_is() -> None:
    text = str(model(n_classes=6))
    for part in (
        "6 classes: class0, class1, class2, class3, ...", "6 x 3 x 4, 4 x 2 x 2", "prior: mixture, 3 centers",
        "clamp=1.9", "grid=3x4", "out_features=7", "FixedAffine(channels=6)", "classes=6, centers=3 each",
    ):  # fmt: skip
        assert part in text, part
    assert "prior: single" in str(model(kind="single"))


BLOCK = ("global_scale", "global_offset", "w_perm", "subnet.0.weight", "subnet.0.bias", "subnet.2.weight")
# Files that earlier versions of the library wrote must load: a name here never changes.
NAMES = ["log_prob_max", "neg_entropy_max"]
for level in (0, 1):
    inn = f"flows.{level}.inn.module_list"
    NAMES += [f"{inn}.0.{name}" for name in ("mean", "weight", "inverse_weight", "log_det")]
    NAMES += [f"{inn}.{block}.{name}" for block in (1, 2) for name in (*BLOCK, "subnet.2.bias")]
    NAMES += [f"priors.{level}.{name}" for name in ("centers", "deltas", "psi", "psi_intra")]
# Files may lack these; then they are zeros.
YOUNGER = [f"normal_{name}_{level}" for name in ("mean", "std") for level in (0, 1)]


def test_a_file_with_today_s_names_loads(tmp_path: Path) -> None:
    other, made = model(seed=1), model()
    own = made.state_dict()
    assert sorted(own) == sorted([*NAMES, *YOUNGER])
    made.save(tmp_path / "model.safetensors")
    _, metadata = read_tensors(tmp_path / "model.safetensors")
    write_tensors(tmp_path / "old.safetensors", {name: other.state_dict()[name] for name in NAMES}, metadata)
    loaded = HGAD.load(tmp_path / "old.safetensors").state_dict()
    assert all(loaded[name].equal(value) for name, value in other.state_dict().items())


def test_features_of_another_shape_are_refused_in_a_line() -> None:
    made, (data, class_idx) = model(), features(2)
    labels, (first, second) = torch.from_numpy(class_idx), data.levels
    for wrong in ([first[..., :4], second], [first[:, :8], second], [first], [second, first]):
        for call in (made.log_prob, made.level_values, partial(made.losses, intra=True)):
            with pytest.raises(
                InputError, match=r"expected features of \[\(12, 6\), \(4, 4\)\].* image size"
            ) as said:
                call(wrong, labels)
            assert "\n" not in str(said.value)


def test_a_model_loads_by_a_text_path(tmp_path: Path) -> None:
    model().save(tmp_path / "model.safetensors")
    assert HGAD.load(str(tmp_path / "model.safetensors")).classes == ("class0", "class1")
    with pytest.raises(InputError, match="expected a safetensors file, found none"):
        HGAD.load(str(tmp_path / "other"))


def test_a_file_without_younger_settings_computes_as_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, prior = completed("flow", {}), completed("prior", {})
    was = {"coupling": "affine", "shrinkage": 1e-3, "keep": 1.0, "subnet_init": "default", "dropout": 0.0}
    assert flow.items() >= was.items()
    assert prior.items() >= {"covariance": "identity", "shrinkage": 0.01, "rank": 8}.items()
    made = model(flow=dataclasses.replace(FLOW, **flow), prior=dataclasses.replace(PRIOR, **prior))
    spec = made.architecture()
    for section, younger in (("flow", flow), ("prior", prior)):
        for name in younger:
            del spec[section][name]
    # whatever the defaults are by then
    monkeypatch.setattr("hgadlib.model.PriorConfig", partial(PriorConfig, covariance="class", rank=3))
    monkeypatch.setattr("hgadlib.model.FlowConfig", partial(FlowConfig, shrinkage=0.5, dropout=0.1))
    write_tensors(tmp_path / "old.safetensors", dict(made.state_dict()), {"hgad": json.dumps(spec)})
    loaded = HGAD.load(tmp_path / "old.safetensors")
    assert (loaded.flow_config, loaded.prior_config) == (made.flow_config, made.prior_config)
    data, class_idx = features(3)
    labels = torch.from_numpy(class_idx)
    for old, new in zip(
        made.log_prob(data.levels, labels), loaded.log_prob(data.levels, labels), strict=True
    ):
        assert old.equal(new)


def with_covariances(
    covariance: str,
    *,
    init: str = "class_means",
    layers: int = 0,
    n_centers: int = 1,
    added: float = 0.02,
    **flow: Any,
) -> HGAD:
    """A model of a fixed map and a prior, initialised from features of classes of unlike shapes."""
    torch.manual_seed(0)
    made = HGAD(
        ["a", "b", "absent"], CHANNELS, GRIDS, flow=FlowConfig(layers=layers, position_dim=4, **flow),
        prior=PriorConfig(covariance=covariance, init=init, n_centers=n_centers, shrinkage=added),  # type: ignore[arg-type]
    )  # fmt: skip
    data, class_idx = shaped_features()
    labels = torch.from_numpy(class_idx)
    made.initialise(lambda: ((x, labels[i]) for i, x in data.batches(torch.arange(40).split(7), "cpu")))
    return made


def shaped_features() -> tuple[Features, np.ndarray]:
    data, class_idx = features(40)
    torch.manual_seed(1)
    mixing = [torch.randn(2, c, c) for c in CHANNELS]
    levels = tuple(x @ m[torch.from_numpy(class_idx)] for x, m in zip(data.levels, mixing, strict=True))
    return dataclasses.replace(data, levels=levels), class_idx


@pytest.mark.parametrize(
    ("covariance", "flow"),
    [
        ("class", {}),
        ("learnt", {}),
        # Whatever invertible map stands in front, if the flow starts as a rotation of it.
        ("class", {"normalise": "none"}),
        ("class", {"normalise": "standardise", "shrinkage": 0.5}),
        ("class", {"layers": 2, "subnet_init": "zero"}),
        ("class", {"layers": 2, "subnet_init": "zero", "kind": "convolutional"}),
    ],
)
def test_without_training_the_model_is_a_gaussian_per_class(covariance: str, flow: dict[str, Any]) -> None:
    made, (data, class_idx) = with_covariances(covariance, **flow), shaped_features()
    if covariance == "learnt":  # it starts there, but for its small random part
        for _, prior in made.levels:
            torch.nn.init.zeros_(prior.low_rank)  # type: ignore[arg-type]
    found = made.log_prob(data.levels, torch.from_numpy(class_idx))
    for level, x in enumerate(data.levels):
        for k in (0, 1):
            own = x[class_idx == k].flatten(0, 1).double().numpy()
            sigma = np.cov(own.T) + 0.02 * own.var(0).mean() * np.eye(own.shape[1])
            expected = multivariate_normal(own.mean(0), sigma).logpdf(own)
            np.testing.assert_allclose(found[level][class_idx == k].detach().flatten(), expected, atol=2e-3)
        state = made.levels[level][1].state_dict()
        assert state["factor"][2].equal(torch.eye(CHANNELS[level]))  # no image told of this class


@pytest.mark.parametrize("kind", ["mixture", "single"])
def test_smoothing_adds_what_shrinkage_adds_to_a_class(kind: str) -> None:
    data, class_idx = shaped_features()
    labels, seen = torch.from_numpy(class_idx), []
    torch.manual_seed(0)
    prior = PriorConfig(kind=kind, covariance="class", n_centers=1, shrinkage=0.5)  # type: ignore[arg-type]
    made = HGAD(["a", "b"], CHANNELS, GRIDS, flow=FlowConfig(layers=1, position_dim=4), prior=prior)
    made.initialise(lambda: iter([(list(data.levels), labels)]))
    forward = made.flows[0].forward

    def look(x: Tensor, **more: Any) -> Any:
        seen.append(x)
        return forward(x, **more)

    made.flows[0].forward = look
    for smooth in (False, True, True):
        made.losses(data.levels, labels, smooth=smooth)
    assert seen[0].equal(data.levels[0])  # as they are
    noise = torch.stack([x - data.levels[0] for x in seen[1:]])
    assert not noise[0].equal(noise[1])
    for k in (0, 1):
        expected = 0.5 * data.levels[0][labels == k].flatten(0, 1).var(0, correction=0).mean()
        torch.testing.assert_close(noise[:, labels == k].square().mean(), expected, rtol=0.1, atol=0)
        # As much in every channel, however wide it is.
        own = noise[:, labels == k].flatten(0, 2).square().mean(0)
        assert own.max() < 1.3 * own.min()


def test_a_flow_that_is_smoothed_leaves_the_shrinkage_in_force() -> None:
    # Without noise, likelihood rises as narrow directions are widened to what the prior's covariance says.
    found = {}
    for smooth in (False, True):
        made, (data, class_idx) = with_covariances("class", layers=2, added=0.5), shaped_features()
        labels, slopes = torch.from_numpy(class_idx), []
        optimiser = torch.optim.Adam(made.flows.parameters(), lr=3e-3)
        for step in range(61):
            if step % 60 == 0:
                at = data.levels[0][labels == 0].flatten(0, 1).mean(0)
                slopes.append(made.levels[0][0].noise_covariance(at, 1e-4).detach().logdet().item())
            terms = made.losses(data.levels, labels, intra=False, lambda2=0, lambda_e=0, smooth=smooth)
            optimiser.zero_grad()
            torch.stack([t["total"] for t in terms]).sum().backward()
            optimiser.step()
        found[smooth] = slopes[1] - slopes[0]
    assert found[False] > 0.1 + found[True]


@pytest.mark.parametrize("init", ["index", "normal", "tiled_identity"])
def test_a_covariance_is_about_the_class_s_own_mean_wherever_centres_start(init: str) -> None:
    made, other = with_covariances("class", init=init), with_covariances("class")
    for (_, prior), (_, same) in zip(made.levels, other.levels, strict=True):
        assert prior.state_dict()["factor"].equal(same.state_dict()["factor"])
        assert not prior.state_dict()["centers"].equal(same.state_dict()["centers"])


def test_clusters_are_of_as_many_images_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hgadlib.model._POSITIONS", 1)
    monkeypatch.setattr("hgadlib.model._PER_CENTER", 2)
    made, seen = with_covariances("class", n_centers=3), []
    assert made.images_to_split == 64
    data = features(20)[0]
    labels = torch.tensor([0] * 18 + [1] * 2)
    monkeypatch.setattr(
        HierarchicalGaussianMixture, "split", lambda self, z, k, *, seed: seen.append((k, len(z)))
    )
    made.split_centers([(list(data.levels), labels)], torch.bincount(labels, minlength=3))
    # Six latents a class and level: one position of each of 18 images, three of each of two.
    assert sorted(seen) == [(0, 18), (0, 18), (1, 6), (1, 6), (2, 0), (2, 0)]


@pytest.mark.parametrize("covariance", ["class", "learnt"])
def test_a_model_with_covariances_trains_and_is_saved(covariance: str, tmp_path: Path) -> None:
    made, (data, class_idx) = with_covariances(covariance, layers=2, n_centers=3), shaped_features()
    labels = torch.from_numpy(class_idx)
    made.split_centers([(list(data.levels), labels)], torch.bincount(labels, minlength=3))
    optimiser = torch.optim.Adam(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        terms = made.losses(data.levels, labels, intra=True, per_dimension=True)
        losses.append(sum(t["total"].item() for t in terms))
        optimiser.zero_grad()
        sum(t["total"] for t in terms).backward()  # type: ignore[union-attr]
        optimiser.step()
    assert losses[-1] < losses[0]
    made.save(tmp_path / "model.safetensors")
    loaded = HGAD.load(tmp_path / "model.safetensors")
    assert loaded.prior_config.covariance == covariance
    values, again = made.level_values(data.levels, labels), loaded.level_values(data.levels, labels)
    for one, two in zip(
        (*values.log_prob, *values.neg_entropy), (*again.log_prob, *again.neg_entropy), strict=True
    ):
        assert one.equal(two)
    alone = loaded.level_values([x[:1] for x in data.levels], labels[:1])
    torch.testing.assert_close(alone.log_prob[0][0], again.log_prob[0][0], rtol=1e-5, atol=1e-5)
