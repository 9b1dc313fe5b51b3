"""The method against arrays computed with the authors' published implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hgadlib.flow import FeatureFlow, positional_encoding_2d
from hgadlib.losses import hgad_losses, intra_class_nll
from hgadlib.mixture import LOG_2PI, HierarchicalGaussianMixture, center_logits
from hgadlib.scoring import Criterion, LevelValues, anomaly_maps, image_scores, published_maps, transductive

Arrays = dict[str, Tensor]
Model = tuple[FeatureFlow, HierarchicalGaussianMixture]
GOLDEN = Path(__file__).parent / "golden"
K, M, D, GRID, P, LAYERS = 5, 4, 24, (4, 6), 16, 3


@pytest.fixture(scope="module")
def golden() -> Arrays:
    with np.load(GOLDEN / "golden_losses.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def model(golden: Arrays) -> Model:
    flow = FeatureFlow(D, GRID, layers=LAYERS, position_dim=P, clamp=1.9)
    flow.inn.load_state_dict({k.removeprefix("flow."): v for k, v in golden.items() if k.startswith("flow.")})
    prior = HierarchicalGaussianMixture(K, M, D)
    with torch.no_grad():
        prior.centers.copy_(golden["mu"])
        prior.deltas.copy_(golden["mu_delta"])
        prior.psi.copy_(golden["psi_inter"])
        prior.psi_intra.copy_(golden["psi_intra"])
    return flow, prior


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def test_position_code(golden: Arrays) -> None:
    close(positional_encoding_2d(P, *GRID), golden["pos_embed_2d"])


def test_flow_output(golden: Arrays, model: Model) -> None:
    z, log_det = model[0](golden["x"].view(3, 24, D))
    close(z.reshape(-1, D), golden["z"])
    close(log_det.flatten(), golden["log_det"])


@pytest.mark.parametrize("stage", ["warmup", "full"])
def test_losses_and_gradients(golden: Arrays, model: Model, stage: str) -> None:
    flow, prior = model
    z, log_det = flow(golden["x"].view(3, 24, D))
    terms = hgad_losses(
        z, log_det, golden["class_idx"], prior, intra=stage == "full", lambda1=1, lambda2=100, lambda_z=1,
        per_dimension=True, label_smoothing=0.02, detach_class_weights=True,
    )  # fmt: skip
    constant = LOG_2PI / 2  # our densities carry it, the published losses do not
    close(terms["nll"] - constant, golden[f"{stage}.L_g"])
    close(terms["mi"], -golden[f"{stage}.L_mi"])
    close(terms["entropy"], golden[f"{stage}.L_e"])
    total = terms["total"] - constant
    if stage == "full":
        close(terms["intra"] - constant, golden["full.L_g_intra"])
        close(terms["log_sigmoid"], golden["full.L_z"])
        total = total - constant
    close(total, golden[f"{stage}.total"])
    terms["total"].backward()
    grads = {
        "mu": prior.centers, "mu_delta": prior.deltas, "psi_inter": prior.psi, "psi_intra": prior.psi_intra,
        "flow.module_list.0.subnet.0.weight": flow.inn[0].subnet[0].weight,
    }  # fmt: skip
    for name, parameter in grads.items():
        expected = golden[f"{stage}.grad.{name}"]
        if stage == "full" and name.startswith("flow."):
            # Both stages were differentiated through one flow when this was recorded: a sum of gradients.
            expected = expected - golden[f"warmup.grad.{name}"]
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        close(actual, expected, rtol=1e-4, atol=1e-4 * max(float(expected.abs().max()), 1e-6))


def test_log_prob_under_every_class(golden: Arrays, model: Model) -> None:
    flow, prior = model
    z, log_det = flow(golden["x"].view(3, 24, D))
    per_class = [
        -intra_class_nll(z, log_det, torch.full((3,), k), prior.intra_centers(), prior.log_weights_intra) / D
        for k in range(K)
    ]
    close(torch.stack(per_class, -1).view(-1, K), golden["test.log_prob_per_class"])


def test_negative_entropy(golden: Arrays, model: Model) -> None:
    flow, prior = model
    z, _ = flow(golden["x"].view(3, 24, D))
    close(prior.neg_entropy(z).flatten(), golden["test.neg_entropy"])
    log_p = torch.log_softmax(center_logits(z, prior.centers), -1)
    close(log_p.exp().sum(-1), torch.ones(3, 24))


def test_transductive_maps() -> None:
    with np.load(GOLDEN / "golden_maps.npz") as arrays:
        maps = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    values = LevelValues(
        tuple(maps[f"log_prob_{level}"] for level in range(3)),
        tuple(maps[f"neg_entropy_{level}"] for level in range(3)),
    )
    size, sigma = int(maps["map_size"]), float(maps["gaussian_sigma"])
    constants = transductive(values, size)
    expected: dict[Criterion, str] = {
        "likelihood": "likelihood_map",
        "entropy": "entropy_map",
        "both": "anomaly_map",
    }
    for criterion, name in expected.items():
        actual = published_maps(values, constants, size=size, sigma=sigma, criterion=criterion)
        close(actual, maps[name])
        ours = anomaly_maps(values, constants, size=size, sigma=sigma, criterion=criterion)
        top = maps[name].max()
        clear = (maps[name] > 1e-3 * top) & (maps[name] < 0.99 * top)  # where float32 still has an order
        ranks = ours[clear].argsort().argsort().double()
        close(ranks, maps[name][clear].argsort().argsort().double(), rtol=0, atol=3)
    close(image_scores(actual), maps["pred_score"])
