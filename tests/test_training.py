"""The fit: schedule, stages, order, resumption, and what happens when it diverges."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import CHANNELS, FLOW, GRIDS, features, model

from hgadlib import training
from hgadlib.config import FlowConfig, LossConfig, PriorConfig, TrainConfig
from hgadlib.errors import InputError
from hgadlib.mixture import HierarchicalGaussianMixture
from hgadlib.model import HGAD
from hgadlib.training import (
    batch_order,
    build_optimiser,
    calibrate,
    first_stage_epochs,
    fit,
    learning_rate,
    load_checkpoint,
    split_centers,
)

LOSS = LossConfig(lambda2=1.0)


def config(**more: object) -> TrainConfig:
    settings: dict[str, object] = {
        "epochs": 6, "batch_size": 5, "first_stage": 0.34, "lr": 1e-2, "schedule": "constant", "warmup": 0.0,
        "rows": 1.0,
    }  # fmt: skip
    return TrainConfig(**{**settings, **more})  # type: ignore[arg-type]


def run(
    train: TrainConfig, *, n: int = 16, into: HGAD | None = None, **more: object
) -> tuple[HGAD, pd.DataFrame]:
    data, class_idx = features(n)
    fitted = into if into is not None else model()
    history = fit(fitted, data, class_idx, train=train, loss=LOSS, progress=False, **more)  # type: ignore[arg-type]
    return fitted, history


def test_the_paper_s_steps_fall_at_epochs_48_57_and_88() -> None:
    train = TrainConfig(epochs=100, lr=2e-4, schedule="step", milestones=(0.48, 0.57, 0.88), warmup=0.0)
    for steps in (1, 7, 454):  # steps in an epoch

        def rate(epoch: int, step: int, steps: int = steps) -> float:
            return learning_rate((epoch * steps + step) / (100 * steps), train)

        for epoch, before, after in ((48, 2e-4, 2e-5), (57, 2e-5, 2e-6), (88, 2e-6, 2e-7)):
            assert rate(epoch - 1, steps - 1) == pytest.approx(before)
            assert rate(epoch, 0) == pytest.approx(after)


def test_cosine_with_warm_up_by_hand() -> None:
    train = TrainConfig(lr=1.0, schedule="cosine", warmup=0.2, warmup_start_ratio=0.1, final_lr_ratio=0.01)
    by_hand = {0.0: 0.1, 0.1: 0.55, 0.2: 1.0, 0.6: 0.505, 1.0: 0.01}
    for progress, rate in by_hand.items():
        assert learning_rate(progress, train) == pytest.approx(rate)
    third = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi / 4))
    assert learning_rate(0.4, train) == pytest.approx(third)


def test_a_constant_rate_is_constant() -> None:
    assert {learning_rate(p, TrainConfig(lr=0.3, schedule="constant", warmup=0.0)) for p in (0, 0.5, 1)} == {
        0.3
    }


@pytest.mark.parametrize(
    ("share", "epochs", "expected"),
    [(0.08, 100, 8), (0.07, 100, 7), (0.0, 10, 0), (0.01, 10, 1), (1.0, 10, 9), (0.5, 1, 0)],
)
def test_first_stage_is_its_share_but_never_all(share: float, epochs: int, expected: int) -> None:
    assert first_stage_epochs(TrainConfig(first_stage=share, epochs=epochs)) == expected


def test_the_first_stage_has_no_intra_terms() -> None:
    # 0.34 of 6 epochs, rounded up, are 3.
    _, history = run(config())
    assert history["stage"].tolist() == [1, 1, 1, 2, 2, 2]
    assert history["intra"].isna().tolist() == [True] * 3 + [False] * 3
    assert history["entropy"].isna().tolist() == [True] * 3 + [False] * 3
    _, history = run(config(entropy_in_first_stage=True))
    assert not history["entropy"].isna().any()


def test_the_first_stage_leaves_the_centres_within_classes_alone() -> None:
    before = model()
    after, _ = run(config(epochs=2, first_stage=0.5, weight_decay=0.0), into=model())
    halfway: dict[str, torch.Tensor] = {}

    def keep(epoch: int, current: HGAD) -> dict[str, float]:
        if epoch == 1:
            halfway.update({k: v.clone() for k, v in current.state_dict().items()})
        return {}

    run(config(epochs=2, first_stage=0.5, weight_decay=0.0), on_epoch=keep)
    for name in ("priors.0.deltas", "priors.0.psi_intra"):
        assert torch.equal(halfway[name], before.state_dict()[name]), name
        assert not torch.equal(after.state_dict()[name], before.state_dict()[name]), name


def test_one_stage_optimises_all_terms_from_the_start() -> None:
    _, history = run(config(first_stage=0.0, epochs=2))
    assert history["stage"].tolist() == [2, 2]
    assert not history[["intra", "entropy"]].isna().any(axis=None)


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own() -> None:
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            batches = batch_order(23, 5, seed, epoch)
            assert [len(b) for b in batches] == [5, 5, 5, 5, 3]
            assert torch.equal(torch.cat(batches).sort().values, torch.arange(23))
            assert all(torch.equal(b, b.sort().values) for b in batches)
            orders[seed, epoch] = torch.cat(batches).tolist()
    assert len({tuple(order) for order in orders.values()}) == 4
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.cat(batch_order(23, 5, 1, 1)).tolist() == orders[1, 1]


@pytest.mark.parametrize("kind", ["mixture", "single"])
def test_the_loss_falls_on_classes_that_lie_apart(kind: str) -> None:
    _, history = run(config(epochs=25, first_stage=0.1), into=model(kind=kind))
    second = history[history["stage"] == 2]["total"]
    assert second.iloc[-1] < second.iloc[0] - 1
    assert history["nll"].iloc[-1] < history["nll"].iloc[0] - 1


def test_history_has_a_row_an_epoch_with_means_over_images() -> None:
    seen: list[int] = []
    _, history = run(
        config(epochs=3), on_history=lambda h: seen.append(len(h)), on_epoch=lambda e, m: {"x": e}
    )
    assert seen == [2, 3, 4]
    assert history["epoch"].tolist() == history["x"].tolist() == [0, 1, 2, 3]
    assert (history[["seconds", "images_per_s"]][1:] > 0).all(axis=None)
    # The row of the untrained model has no losses, and is there only if something is said of it.
    assert history["total"].isna().tolist() == [True, False, False, False]
    _, silent = run(config(epochs=3), on_epoch=lambda e, m: {"x": 1} if e else {})
    assert silent["epoch"].tolist() == [1, 2, 3]
    # With a rate of 0 nothing moves, and the split into batches must not show.
    still = config(epochs=1, lr=0.0, first_stage=0.0)
    one = run(still)[1]["total"][0]
    for size in (1, 7, 16):
        other = run(config(epochs=1, lr=0.0, first_stage=0.0, batch_size=size))[1]["total"][0]
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("level", [0, 1])
def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path: Path, level: int) -> None:
    broken = model()
    with torch.no_grad():
        broken.priors[level].centers.fill_(math.nan)  # type: ignore[union-attr, operator, unused-ignore]
    path = tmp_path / "checkpoint.safetensors"
    said = rf"is nan in epoch 1: level {level + 1}, nll is nan; lower train\.lr or set train\.gradient_clip"
    with pytest.raises(FloatingPointError, match=said):
        run(config(), into=broken, checkpoint=path)
    assert not path.exists()


def test_weights_that_broke_in_the_last_step_of_the_first_stage_do_not_reach_k_means() -> None:
    def spoil(epoch: int, current: HGAD) -> dict[str, float]:
        if epoch == 3:
            next(current.flows[1].parameters()).data.fill_(math.nan)
        return {}

    said = r"start of the second stage, level 2: latents of class 'class0' are not finite; lower train\.lr"
    with pytest.raises(FloatingPointError, match=said):
        run(config(), on_epoch=spoil)


def test_weights_that_broke_in_the_last_step_do_not_pass() -> None:
    def spoil(epoch: int, current: HGAD) -> dict[str, float]:
        if epoch == 2:
            next(current.flows.parameters()).data.fill_(math.nan)
        return {}

    with pytest.raises(FloatingPointError, match="not finite"):
        run(config(epochs=2), on_epoch=spoil)


DROPPING = FlowConfig(layers=2, position_dim=4, coupling="additive", subnet_init="zero", dropout=0.3)
REST: dict[str, object] = {"noise": 0.1, "rows": 0.5, "average": 0.6}


@pytest.mark.parametrize("killed_in", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(("flow", "more"), [(None, {}), (DROPPING, REST)], ids=["plain", "noise"])
def test_a_killed_fit_resumes_to_the_same_bits(
    tmp_path: Path, killed_in: int, flow: FlowConfig | None, more: dict[str, object]
) -> None:
    train = config(schedule="cosine", **more)
    whole, history = run(train, into=model(flow=flow))
    path = tmp_path / "checkpoint.safetensors"

    def kill(epoch: int, current: HGAD) -> dict[str, float]:
        if epoch == killed_in:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(train, into=model(flow=flow), checkpoint=path, checkpoint_s=0.0, on_epoch=kill)
    assert path.exists() == (killed_in > 1)
    # A model of another seed: all that counts comes from the checkpoint.
    start = model(seed=0 if killed_in == 1 else 5, flow=flow)
    resumed, again = run(train, into=start, checkpoint=path, checkpoint_s=0.0)
    timed = ["seconds", "images_per_s"]
    pd.testing.assert_frame_equal(again.drop(columns=timed), history.drop(columns=timed), check_exact=True)
    for (name, expected), found in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("more", [{"noise": 0.1}, {"dropout": 0.3}])
def test_noise_and_dropout_are_of_the_seed_and_of_training_alone(more: dict[str, float]) -> None:
    dropout, noise = more.get("dropout", 0.0), more.get("noise", 0.0)
    flow, train = replace(FLOW, dropout=dropout), config(epochs=2, noise=noise)
    _, plain = run(config(epochs=2))
    _, one = run(train, into=model(flow=flow))
    made = model(flow=flow)
    torch.manual_seed(99)  # the global generator plays no part, and is left as it was
    before = torch.get_rng_state()
    fitted, again = run(train, into=made)
    assert torch.equal(torch.get_rng_state(), before)
    assert one["total"].tolist() == again["total"].tolist() != plain["total"].tolist()
    # Every epoch has noise of its own: with a rate of 0 nothing else differs.
    totals = run(config(epochs=2, first_stage=0.0, lr=0.0, noise=noise), into=model(flow=flow))[1]["total"]
    assert abs(totals[0] - totals[1]) > 1e-5
    data, class_idx = features(4)
    labels = torch.from_numpy(class_idx)
    assert not fitted.training and not model(flow=flow).training
    values = [fitted.level_values(list(data.levels), labels).log_prob for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_a_step_sees_some_rows_of_the_grid_anew_each_time() -> None:
    made, seen = model(), []
    full, height = made.flows[0].forward, GRIDS[0][0]

    def forward(x: torch.Tensor, **more: Any) -> Any:
        seen.append(more.get("rows"))
        return full(x, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.flows[0], "forward", forward)
        run(config(epochs=2, rows=0.5, first_stage=0.0), into=made)
    steps = [rows.tolist() for rows in seen if rows is not None]
    assert {len(rows) for rows in steps} == {round(height / 2)} and len({tuple(r) for r in steps}) > 1
    assert all(rows == sorted(set(rows)) and max(rows) < height for rows in steps)


def test_a_convolutional_flow_sees_all_rows() -> None:
    # Its convolutions need a row's neighbours.
    flow = replace(FLOW, kind="convolutional")
    (few, some), (whole, every) = (run(config(rows=rows), into=model(flow=flow)) for rows in (0.25, 1.0))
    assert some["total"].tolist() == every["total"].tolist()
    assert all(torch.equal(a, b) for a, b in zip(few.parameters(), whole.parameters(), strict=True))
    # A positional flow, which does without, differs.
    assert run(config(rows=0.25))[1]["total"].tolist() != run(config())[1]["total"].tolist()


def test_an_interrupted_epoch_leaves_a_model_that_drops_nothing() -> None:
    fitted = model(flow=DROPPING)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.Adam, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(config(), into=fitted)
    assert not fitted.training


@pytest.mark.parametrize("share", [0.3, 1 / 3, 1.0, 0.01])
def test_the_trained_model_is_the_mean_of_the_last_epochs(share: float) -> None:
    ends: list[dict[str, torch.Tensor]] = []

    def keep(epoch: int, current: HGAD) -> dict[str, float]:
        if epoch:
            ends.append({name: p.detach().clone() for name, p in current.named_parameters()})
        return {}

    raw, history = run(config(), on_epoch=keep)
    averaged, same = run(config(average=share))
    n = {0.3: 2, 1 / 3: 2, 1.0: 6, 0.01: 1}[share]
    for name, parameter in averaged.named_parameters():
        expected = torch.stack([end[name] for end in ends[-n:]]).mean(0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
    # The epochs are those of the weights that learn, and the constants are of the mean ones.
    assert same["total"].tolist() == history["total"].tolist()
    assert torch.equal(averaged.log_prob_max, raw.log_prob_max) == (n == 1)
    data, class_idx = features(16)
    stored = averaged.log_prob_max.clone()
    calibrate(averaged, data, class_idx)
    assert torch.equal(stored, averaged.log_prob_max)


@pytest.mark.parametrize("kind", ["mixture", "single"])
@pytest.mark.parametrize("n_classes", [1, 2])
@pytest.mark.parametrize("normalise", ["none", "whiten"])
def test_a_prior_without_a_flow_is_fitted(tmp_path: Path, kind: str, n_classes: int, normalise: str) -> None:
    flow = FlowConfig(layers=0, normalise=normalise)  # type: ignore[arg-type]
    data, class_idx = features(16, n_classes=n_classes)
    labels = torch.from_numpy(class_idx)

    def start() -> HGAD:
        made = model(kind=kind, n_classes=n_classes, flow=flow)
        made.initialise(lambda: ((x, labels[i]) for i, x in data.batches(torch.arange(16).split(5))))
        return made

    path, fitted = tmp_path / "c.safetensors", start()
    history = fit(
        fitted, data, class_idx, train=config(), loss=LOSS, progress=False, checkpoint=path, checkpoint_s=0.0
    )
    assert history["epoch"].tolist() == [1, 2, 3, 4, 5, 6] and np.isfinite(history["nll"]).all()
    learns = kind == "mixture"
    assert (history["nll"].iloc[0] - history["nll"].iloc[-1] > 1e-4) == learns
    assert any(p.requires_grad for p in fitted.parameters()) == learns
    again = fit(start(), data, class_idx, train=config(), loss=LOSS, progress=False, checkpoint=path)
    pd.testing.assert_frame_equal(again, history, check_exact=True)
    # The density by hand: of the fixed map's output, and its volume.
    z, log_det = fitted.levels[0][0](data.levels[0])
    by_hand = fitted.levels[0][1].log_prob(z, labels) + log_det
    torch.testing.assert_close(fitted.log_prob(list(data.levels), labels)[0], by_hand)
    fitted.save(tmp_path / "m.safetensors")
    loaded = HGAD.load(tmp_path / "m.safetensors").level_values(list(data.levels), labels)
    values = fitted.level_values(list(data.levels), labels)
    assert all(torch.equal(a, b) for a, b in zip(values.log_prob, loaded.log_prob, strict=True))


@pytest.mark.parametrize("kind", ["mixture", "single"])
@pytest.mark.parametrize("n_classes", [1, 2])
def test_a_model_of_the_least_directions_is_fitted_saved_and_loaded(
    tmp_path: Path, kind: str, n_classes: int
) -> None:
    flow = FlowConfig(
        layers=2, position_dim=4, keep=0.5, dropout=0.1, subnet_init="zero", coupling="additive"
    )
    data, class_idx = features(16, n_classes=n_classes)
    labels = torch.from_numpy(class_idx)
    fitted = model(kind=kind, n_classes=n_classes, flow=flow)
    fitted.initialise(lambda: ((x, labels[i]) for i, x in data.batches(torch.arange(16).split(5))))
    history = fit(fitted, data, class_idx, train=config(noise=0.1, average=0.3), loss=LOSS, progress=False)
    assert np.isfinite(history["total"]).all()
    assert [level(x)[0].shape[-1] for (level, _), x in zip(fitted.levels, data.levels, strict=True)] == [3, 2]
    fitted.save(tmp_path / "m.safetensors")
    loaded = HGAD.load(tmp_path / "m.safetensors")
    both = (m.level_values(list(data.levels), labels).log_prob for m in (fitted, loaded))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_adam_s_moments_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    """Without them the first step after a resumption would be another one."""
    path = tmp_path / "checkpoint.safetensors"
    run(config(epochs=2), checkpoint=path)
    fresh = model(seed=3)
    optimiser = build_optimiser(fresh, config())
    assert [row["epoch"] for row in load_checkpoint(path, fresh, optimiser)] == [1, 2]
    states = optimiser.state_dict()["state"].values()
    trained = [p for p in fresh.parameters() if p.requires_grad]
    assert len(states) == len(trained)
    assert all(float(state["step"]) in (4, 8) for state in states)  # 2 epochs of 4, or the second stage alone
    assert all(float(state["exp_avg_sq"].abs().max()) > 0 for state in states)


def test_checkpoints_come_with_time_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    there: list[bool] = []
    _, history = run(
        config(epochs=3), checkpoint=path, checkpoint_s=1e9, on_history=lambda h: there.append(path.exists())
    )
    assert there == [False] * 3
    assert path.exists()
    # A fit that is done is not done again.
    _, again = run(config(epochs=3), checkpoint=path)
    pd.testing.assert_frame_equal(again, history, check_exact=True)


@pytest.mark.parametrize("damage", ["truncated", "empty", "another model"])
def test_a_damaged_checkpoint_says_what_to_delete(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    n_classes = 3 if damage == "another model" else 2
    data, class_idx = features(16, n_classes=n_classes)
    other = model(n_classes=n_classes)
    fit(other, data, class_idx, train=config(epochs=1), loss=LOSS, progress=False, checkpoint=path)
    content = path.read_bytes()
    if damage != "another model":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(
        InputError, match=r"checkpoint\.safetensors.*delete it to train from the start"
    ) as caught:
        run(config(epochs=1), checkpoint=path)
    assert "\n" not in str(caught.value)


def test_calibration_stores_the_largest_value_of_each_class() -> None:
    data, class_idx = features(10)
    fitted = model()
    calibrate(fitted, data, class_idx, batch_size=3)
    values = fitted.level_values(list(data.levels), torch.from_numpy(class_idx))
    for k in (0, 1):
        own = torch.from_numpy(np.flatnonzero(class_idx == k))
        for level in range(2):
            torch.testing.assert_close(fitted.log_prob_max[k, level], values.log_prob[level][own].amax())
            torch.testing.assert_close(
                fitted.neg_entropy_max[k, level], values.neg_entropy[level][own].amax()
            )


def test_data_sets_normalisers_and_centres_batch_by_batch() -> None:
    data, class_idx = features(12, seed=4)
    labels = torch.from_numpy(class_idx)
    torch.manual_seed(0)
    fresh = HGAD(
        ["a", "b", "no image"], CHANNELS, GRIDS,
        flow=replace(FLOW, normalise="whiten"), prior=PriorConfig(init="class_means", n_centers=3),
    )  # fmt: skip
    untouched = fresh.priors[0].state_dict()["centers"][2].clone()
    fresh.initialise(lambda: ((x, labels[i]) for i, x in data.batches(torch.arange(12).split(5))))
    for (flow, prior), x in zip(fresh.levels, data.levels, strict=True):
        assert flow.normaliser is not None
        (white,), _ = flow.normaliser([x])
        flat = white.flatten(0, 1)
        torch.testing.assert_close(flat.mean(0), torch.zeros(x.shape[-1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.cov(flat.T), torch.eye(x.shape[-1]), atol=5e-2, rtol=0)
        with torch.no_grad():
            z = flow(x)[0].mean(1)
        centers = prior.state_dict()["centers"]
        torch.testing.assert_close(centers[0], z[labels == 0].mean(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(centers[1], z[labels == 1].mean(0), atol=1e-4, rtol=1e-4)
    assert torch.equal(fresh.priors[0].state_dict()["centers"][2], untouched)


def test_a_saved_model_is_the_same_model(tmp_path: Path) -> None:
    fitted, _ = run(config(epochs=1))
    fitted.save(tmp_path / "model.safetensors")
    again = HGAD.load(tmp_path / "model.safetensors")
    data, class_idx = features(4)
    one, other = (m.level_values(list(data.levels), torch.from_numpy(class_idx)) for m in (fitted, again))
    for name in ("log_prob", "neg_entropy"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(one, name), getattr(other, name), strict=True))
    for name in ("log_prob_max", "neg_entropy_max"):
        assert torch.equal(getattr(again, name), getattr(fitted, name)) and getattr(again, name).any()
    assert again.architecture() == fitted.architecture()


@pytest.mark.parametrize("damage", ["missing", "truncated", "no description", "another version"])
def test_a_model_file_that_is_none_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.safetensors"
    model().save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "no description":
        save_file(load_file(path), path)
    else:
        save_file(load_file(path), path, {"hgad": '{"flow": {"spline": 1}, "prior": {}}'})
    with pytest.raises(InputError, match=r"model\.safetensors: expected") as caught:
        HGAD.load(path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".*"))


def test_centres_within_a_class_start_on_its_clusters() -> None:
    data, class_idx = features(16)
    # Each class looks normal in two ways.
    for level in data.levels:
        level[::4] += 4.0
        level[1::4] -= 4.0
    started = model()
    main = [prior.state_dict()["centers"].clone() for prior in started.priors]
    split_centers(started, data, torch.from_numpy(class_idx), seed=0)
    for (flow, prior), centers, x in zip(started.levels, main, data.levels, strict=True):
        assert isinstance(prior, HierarchicalGaussianMixture)
        assert torch.equal(prior.centers, centers)
        with torch.no_grad():
            z = flow(x)[0]
            clusters = prior.intra_centers()[:, 1:]
        for k in (0, 1):
            own = z[class_idx == k].flatten(0, 1)
            apart = torch.cdist(own, clusters[k]).min(1).values.square().mean()
            together = (own - own.mean(0)).square().sum(1).mean()
            assert apart < 0.5 * together


def test_clusters_are_found_once_and_a_resumed_run_finds_the_same(tmp_path: Path) -> None:
    split: list[int] = []

    def count(*arguments: object, **more: object) -> None:
        split.append(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "split_centers", count)
        run(config(epochs=4), checkpoint=tmp_path / "c.safetensors")
        assert split == [1]
        run(config(epochs=6), checkpoint=tmp_path / "c.safetensors")  # from the second stage on
        assert split == [1]
