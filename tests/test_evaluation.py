"""Scores and metrics of a test set: each image on its own, ranks kept, nothing made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references import pixel_references, sklearn_metrics
from small import features, model

from hgadlib.config import ScoreConfig
from hgadlib.errors import InputError
from hgadlib.evaluation.class_inference import evaluate_inferred
from hgadlib.evaluation.evaluate import (
    Evaluation,
    Protocol,
    class_normalisation,
    evaluate,
    level_values,
    score_batches,
    score_images,
)
from hgadlib.evaluation.likelihoods import (
    anomalous_positions,
    class_overlaps,
    compare_likelihoods,
)
from hgadlib.evaluation.metrics import IMAGE_METRICS, PIXEL_METRICS
from hgadlib.method import read_tensors, write_tensors
from hgadlib.model import HGAD
from hgadlib.scoring import (
    Calibration,
    Criterion,
    LevelValues,
    Normalisation,
    anomaly_maps,
    finest_levels,
    image_scores,
    published_maps,
)
from hgadlib.training import calibrate

SCORE = ScoreConfig(map_size=16, sigma=1.0)
INDUCTIVE, TRANSDUCTIVE = Protocol("inductive", "both"), Protocol("transductive", "both")


@pytest.fixture(scope="module")
def fitted() -> HGAD:
    made = model()
    data, class_idx = features(20, seed=1)
    calibrate(made, data, class_idx)
    return made


def some_test(n: int = 12) -> tuple[object, np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """Features, classes, labels and masks of n test images, the second half of them anomalous."""
    data, class_idx = features(n, seed=2)
    labels = np.arange(n) >= n // 2
    masks = {}
    for level, (height, width) in zip(data.levels, data.grids, strict=True):
        grid = level.view(n, height, width, -1)
        grid[n // 2 :, : height // 2 + 1, : width // 2] += 2.0
    for k in (0, 1):
        own = labels[class_idx == k]
        masks[k] = np.zeros((len(own), 16, 16), bool)
        masks[k][own, :8, :8] = True
    return data, class_idx, labels, masks


def evaluated(fitted: HGAD, protocol: Protocol = INDUCTIVE, order: np.ndarray | None = None) -> Evaluation:
    data, class_idx, labels, _ = some_test()
    values = level_values(fitted, data, class_idx)  # type: ignore[arg-type]
    order = np.arange(len(labels)) if order is None else order
    return evaluate(
        fitted, values[torch.from_numpy(order)], class_idx[order], labels[order], None,
        score=SCORE, protocol=protocol,
    )  # fmt: skip


@pytest.mark.parametrize("criterion", ["likelihood", "entropy", "both"])
def test_an_image_gets_the_same_map_and_score_alone_in_a_batch_and_in_any_order(
    fitted: HGAD, criterion: Criterion
) -> None:
    data, class_idx, _, _ = some_test()
    labels = torch.from_numpy(class_idx)
    levels = list(data.levels)  # type: ignore[attr-defined]
    constants = fitted.normalisation(labels)

    def maps(order: list[int]) -> torch.Tensor:
        index = torch.tensor(order)
        values = fitted.level_values([x[index] for x in levels], labels[index])
        constants = fitted.normalisation(labels[index])
        return anomaly_maps(values, constants, size=16, sigma=1.0, criterion=criterion)

    assert constants.log_prob_max.shape == (12, 2)
    together = maps(list(range(12)))
    assert together.std() > 0
    backwards = maps(list(range(11, -1, -1))).flip(0)
    torch.testing.assert_close(backwards, together, rtol=1e-4, atol=1e-6)
    for i in range(12):
        torch.testing.assert_close(maps([i])[0], together[i], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            image_scores(maps([i]))[0], image_scores(together)[i], rtol=1e-4, atol=1e-6
        )


def test_inductive_scores_of_an_image_do_not_depend_on_the_test_set(fitted: HGAD) -> None:
    whole = evaluated(fitted).scores
    half = evaluated(fitted, order=np.arange(5, -1, -1)).scores[::-1]
    np.testing.assert_allclose(half, whole[:6], rtol=1e-4)


def test_transductive_scores_do_and_touch_zero_before_the_blur(fitted: HGAD) -> None:
    whole = evaluated(fitted, TRANSDUCTIVE)
    half = evaluated(fitted, TRANSDUCTIVE, order=np.arange(6))
    assert not np.allclose(half.scores, whole.scores[:6], rtol=1e-3)
    data, class_idx, _, _ = some_test()
    values = level_values(fitted, data, class_idx)[torch.from_numpy(class_idx == 0)]  # type: ignore[arg-type]
    criteria: tuple[Criterion, ...] = ("likelihood", "entropy")
    for criterion in criteria:
        constants = class_normalisation(fitted, values, 0, "transductive", 16)
        assert isinstance(constants, Normalisation)
        maps = published_maps(values, constants, size=16, sigma=0.0, criterion=criterion)
        assert float(maps.min()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("protocol", [INDUCTIVE, TRANSDUCTIVE, Protocol("inductive", "likelihood")])
def test_float16_keeps_the_ranks_of_float32(fitted: HGAD, protocol: Protocol) -> None:
    data, class_idx, labels, masks = some_test()
    values = level_values(fitted, data, class_idx)  # type: ignore[arg-type]
    found = evaluate(fitted, values, class_idx, labels, masks, score=SCORE, protocol=protocol)
    for k, name in enumerate(fitted.classes):
        mine = values[torch.from_numpy(class_idx == k)]
        batches = score_batches(mine, found.constants[name], SCORE, protocol.criterion)
        maps = torch.cat([batch for *_, batch in batches]).numpy()
        assert maps.dtype == np.float32
        for metric, value in zip(PIXEL_METRICS, pixel_references(maps, masks[k]), strict=True):
            assert found.per_class[name][metric] == pytest.approx(
                value, abs=1e-3 if metric == "pixel_auroc" else 5e-3
            ), metric
        assert 0 < float(found.per_class[name]["pixel_auroc"] or 0) < 1  # something to rank


def test_float16_tells_the_least_scores_apart(fitted: HGAD) -> None:
    """As published they lie below 6e-8, and float16 would make one value of them all."""
    labels = np.array([False, True])
    rows = torch.linspace(1, 2, 12).view(1, 3, 4), torch.linspace(1, 2, 4).view(1, 2, 2)
    factors = torch.tensor([1.0, 1.5])[:, None, None]

    def near(maxima: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(m - 2e-5 * factors * row for m, row in zip(maxima, rows, strict=True))

    values = LevelValues(near(fitted.log_prob_max[0]), near(fitted.neg_entropy_max[0]))
    masks = {0: np.zeros((2, 16, 16), bool)}
    masks[0][1] = True
    found = evaluate(
        fitted, values, np.zeros(2, int), labels, masks, score=SCORE, protocol=INDUCTIVE
    ).per_class["class0"]
    maps = published_maps(values, inductive_of(fitted), size=16, sigma=1.0)
    assert 0 < float(maps.max()) < 6e-8
    expected, _, _ = sklearn_metrics(maps.numpy().ravel(), masks[0].ravel())
    assert found["pixel_auroc"] == pytest.approx(expected, abs=1e-3)
    assert 0.6 < expected < 1


def test_scores_beyond_float16_are_ranked(fitted: HGAD) -> None:
    labels, masks = np.array([False, True]), {0: np.zeros((2, 16, 16), bool)}
    masks[0][1] = True
    far = torch.tensor([1e5, 1e6])[:, None, None]
    values = LevelValues(
        tuple(-far.expand(2, *grid) for grid in fitted.grids),
        tuple(-torch.ones(2, *grid) for grid in fitted.grids),
    )
    likelihood = Protocol("inductive", "likelihood")
    found = evaluate(fitted, values, np.zeros(2, int), labels, masks, score=SCORE, protocol=likelihood)
    assert found.per_class["class0"] == dict.fromkeys([*IMAGE_METRICS, *PIXEL_METRICS], 1.0)


def inductive_of(fitted: HGAD) -> Normalisation:
    return fitted.normalisation(torch.zeros(2, dtype=torch.int64))


def test_a_class_without_masks_has_no_pixel_metrics(fitted: HGAD) -> None:
    data, class_idx, labels, masks = some_test()
    values = level_values(fitted, data, class_idx)  # type: ignore[arg-type]
    del masks[0]
    found = evaluate(fitted, values, class_idx, labels, masks, score=SCORE, protocol=INDUCTIVE)
    assert all(found.per_class["class0"][name] is None for name in PIXEL_METRICS)
    assert all(found.per_class["class0"][name] is not None for name in IMAGE_METRICS)
    # The mean is over the classes that have one.
    assert found.mean["pixel_auroc"] == found.per_class["class1"]["pixel_auroc"]
    found = evaluate(fitted, values, class_idx, labels, None, score=SCORE, protocol=INDUCTIVE)
    assert all(found.mean[name] is None for name in PIXEL_METRICS)


def test_a_class_of_normal_images_alone_has_no_image_metrics(fitted: HGAD) -> None:
    found = evaluated(fitted, order=np.array([0, 2, 1, 7, 9]))  # of class 0 only normal ones
    assert all(found.per_class["class0"][name] is None for name in IMAGE_METRICS)
    assert found.mean["image_auroc"] == found.per_class["class1"]["image_auroc"] is not None


def test_images_nobody_labelled_are_scored_and_not_counted(fitted: HGAD) -> None:
    data, class_idx, labels, _ = some_test()
    values = level_values(fitted, data, class_idx)  # type: ignore[arg-type]
    known = np.arange(12) != 11
    found = evaluate(fitted, values, class_idx, labels, None, score=SCORE, protocol=INDUCTIVE, labelled=known)
    np.testing.assert_array_equal(found.scores, evaluated(fitted).scores)
    alone = evaluated(fitted, order=np.arange(11))
    assert found.per_class == alone.per_class
    found = evaluate(
        fitted, values, class_idx, labels, None, score=SCORE, protocol=INDUCTIVE, labelled=np.zeros(12, bool)
    )
    assert all(value is None for value in found.mean.values())


def test_one_gaussian_scores_by_likelihood_alone() -> None:
    single = model(kind="single")
    data, class_idx = features(20, seed=1)
    calibrate(single, data, class_idx)
    both, likelihood = (evaluated(single, Protocol("inductive", c)) for c in ("both", "likelihood"))
    np.testing.assert_array_equal(both.scores, likelihood.scores)
    assert both.scores.std() > 0


def test_scores_that_are_not_numbers_never_become_a_metric(fitted: HGAD) -> None:
    data, class_idx, labels, _ = some_test()
    values = level_values(fitted, data, class_idx)  # type: ignore[arg-type]
    values.log_prob[0][3, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        evaluate(fitted, values, class_idx, labels, None, score=SCORE, protocol=INDUCTIVE)


def test_anomalous_positions_are_where_the_mask_touches() -> None:
    class_idx, labels = np.array([0, 1, 0, 1]), np.array([False, True, True, True])
    masks = {0: np.zeros((2, 8, 8), bool)}
    masks[0][1, 3, 4] = True
    found = anomalous_positions(class_idx, labels, masks, (2, 4)).numpy()
    assert found[[0, 2]].nonzero()[0].tolist() == [1] and found[2, 0, 2]
    assert found[[1, 3]].all()  # without masks, all of the image


def test_log_likelihoods_by_hand() -> None:
    log_prob = [torch.tensor([[[0.0, 1.0]], [[2.0, 3.0]], [[9.0, 9.0]], [[5.0, 5.0]]])]
    class_idx, labels = np.array([0, 0, 0, 1]), np.array([False, True, True, False])
    labelled = np.array([True, True, False, True])
    edges, counts, columns = compare_likelihoods(
        log_prob, class_idx, labels, {}, labelled=labelled, n_classes=2
    )
    # Nobody said what the third image is.
    assert counts.sum(-1).tolist() == [[[2, 2]], [[2, 0]]]
    assert edges[0, -1] == 9.0
    assert columns == {"test_overlap": 0.0, "test_log_prob_normal": 0.5, "test_log_prob_anomalous": 2.5}
    scores = {"log_likelihood_counts": counts, "classes": np.array(["a", "b"])}
    assert class_overlaps(scores) == {"a": [0.0], "b": [None]}
    nothing = compare_likelihoods(log_prob, class_idx, labels, {}, labelled=np.zeros(4, bool), n_classes=2)
    assert nothing.columns == {} and not nothing.counts.any()


def test_held_out_images_have_mean_zero_and_deviation_one() -> None:
    made = model()
    train, class_idx = features(8, seed=1)
    held, held_idx = features(2000, seed=2)
    calibrate(made, train, class_idx, (held, held_idx))
    values = level_values(made, held, held_idx)
    constants = made.constants(torch.from_numpy(held_idx), "calibrated")
    assert isinstance(constants, Calibration)
    for v, m, s in zip(values.log_prob, constants.mean.log_prob, constants.std.log_prob, strict=True):
        for k in (0, 1):
            u = ((m - v) / s)[held_idx == k].double()
            # 20 in 1020 counts for the class as a whole.
            torch.testing.assert_close(u.mean(0), torch.zeros_like(u[0]), rtol=0, atol=0.05)
            torch.testing.assert_close(u.std(0), torch.ones_like(u[0]), rtol=0, atol=0.05)


def test_calibration_is_of_held_out_images_else_of_training_images() -> None:
    made, (train, class_idx), (held, held_idx) = (
        model(),
        features(20, seed=1),
        features(10, seed=2, shift=0.5),
    )
    stored = {}
    for name, some in {"none": None, "all": (held, held_idx), "one class": (held, np.ones(10, int))}.items():
        calibrate(made, train, class_idx, some)
        stored[name] = {key: value.clone() for key, value in made.state_dict().items()}
    for level in range(2):
        none, whole, part = (stored[name][f"normal_mean_{level}"] for name in stored)
        assert not none.isclose(whole).all((1, 2, 3)).any()
        # Class 0 has no image held out.
        assert part[0].equal(none[0]) and not part[1].isclose(none[1]).all()
    assert all(stored["all"][key].equal(stored["none"][key]) for key in ("log_prob_max", "neg_entropy_max"))


@pytest.mark.parametrize("criterion", ["likelihood", "entropy", "both"])
def test_a_calibrated_score_is_of_the_image_alone(fitted: HGAD, criterion: Criterion) -> None:
    protocol = Protocol("calibrated", criterion)
    whole = evaluated(fitted, protocol).scores
    half = evaluated(fitted, protocol, order=np.arange(5, -1, -1)).scores[::-1]
    np.testing.assert_allclose(half, whole[:6], rtol=1e-4, atol=1e-4)


def test_calibrated_constants_are_saved_and_files_without_them_refuse(fitted: HGAD, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model.safetensors")
    loaded = HGAD.load(tmp_path / "model.safetensors")
    own = torch.tensor([1, 0])
    pairs = [made.constants(own, "calibrated") for made in (fitted, loaded)]
    for a, b in zip(*(p.std.log_prob + p.mean.neg_entropy for p in pairs), strict=True):  # type: ignore[union-attr, unused-ignore]
        assert a.equal(b) and a.shape[0] == 2
    tensors, metadata = read_tensors(tmp_path / "model.safetensors")
    old = {name: value for name, value in tensors.items() if not name.startswith("normal_")}
    write_tensors(tmp_path / "old.safetensors", old, metadata)
    before = HGAD.load(tmp_path / "old.safetensors")
    assert before.is_calibrated is False and before.log_prob_max.equal(fitted.log_prob_max)
    with pytest.raises(InputError, match="expected a model with statistics of normal features"):
        before.constants(own, "calibrated")
    with pytest.raises(InputError, match="statistics"):
        evaluated(before, Protocol("calibrated", "both"))
    data, class_idx = features(20, seed=1)
    calibrate(before, data, class_idx)
    assert evaluated(before, Protocol("calibrated", "both")).mean["image_auroc"] is not None


def test_a_single_gaussian_is_calibrated_by_likelihood() -> None:
    single = model(kind="single")
    data, class_idx = features(20, seed=1)
    calibrate(single, data, class_idx)
    both, likelihood = (evaluated(single, Protocol("calibrated", c)) for c in ("both", "likelihood"))
    np.testing.assert_array_equal(both.scores, likelihood.scores)
    assert single.state_dict()["normal_std_0"].shape == (2, 1, 3, 4)


def separated(fitted: HGAD) -> HGAD:
    """A copy whose class centres are the classes' mean latents: every image's class is clear."""
    made = model()
    made.load_state_dict(fitted.state_dict())
    data, class_idx = features(40, seed=3)
    made.prior_config = replace(made.prior_config, init="class_means")
    made.initialise(lambda: [(list(data.levels), torch.from_numpy(class_idx))])
    with torch.no_grad():
        for _, prior in made.levels:
            prior.deltas.mul_(0.1)  # type: ignore[union-attr, operator, unused-ignore]
    calibrate(made, data, class_idx)
    return made


@pytest.mark.parametrize("normalisation", ["inductive", "calibrated", "transductive"])
def test_inferred_is_known_where_classes_are_clear(fitted: HGAD, normalisation: Any) -> None:
    made = separated(fitted)
    data, class_idx, labels, masks = some_test()
    values = level_values(made, data, class_idx)  # type: ignore[arg-type]
    how: Any = {"score": SCORE, "protocol": Protocol(normalisation, "both")}
    found = evaluate_inferred(made, data, values, class_idx, labels, masks, **how)  # type: ignore[arg-type]
    known = evaluate(made, values, class_idx, labels, masks, **how)
    assert found == {"accuracy": 1.0, **known.to_dict()}


def test_an_image_taken_for_another_class_is_scored_as_that(fitted: HGAD) -> None:
    """With the true classes exchanged every image is taken for the other class."""
    made = separated(fitted)
    data, class_idx, labels, masks = some_test()
    other = 1 - class_idx
    values = level_values(made, data, other)  # type: ignore[arg-type]
    before = [v.clone() for v in values.log_prob]
    how: Any = {"score": SCORE, "protocol": Protocol("calibrated", "likelihood")}
    flipped = {k: masks[1 - k] for k in masks}
    found = evaluate_inferred(made, data, values, other, labels, flipped, **how)  # type: ignore[arg-type]
    own = evaluate(made, level_values(made, data, class_idx), class_idx, labels, masks, **how)  # type: ignore[arg-type]
    assert found["accuracy"] == 0
    assert found["per_class"] == {"class0": own.per_class["class1"], "class1": own.per_class["class0"]}
    assert all(a.equal(b) for a, b in zip(before, values.log_prob, strict=True))


@pytest.mark.parametrize(("how", "share"), [("top", 0.1), ("quantile", 0.1)])
def test_the_image_score_follows_the_configuration(fitted: HGAD, how: Any, share: float) -> None:
    data, class_idx, labels, _ = some_test()
    values = level_values(fitted, data, class_idx)  # type: ignore[arg-type]
    score = replace(SCORE, image=how, image_share=share)
    found = evaluate(fitted, values, class_idx, labels, None, score=score, protocol=INDUCTIVE)
    mine = values[torch.from_numpy(class_idx == 1)]
    [(_, _, maps)] = score_batches(mine, found.constants["class1"], score, "both")
    np.testing.assert_array_equal(found.scores[class_idx == 1], image_scores(maps, how, share).numpy())
    assert (found.scores < evaluated(fitted).scores).all()


@pytest.mark.parametrize("criterion", ["likelihood", "both"])
def test_maps_are_of_the_finest_level_and_image_scores_of_all(fitted: HGAD, criterion: Criterion) -> None:
    data, class_idx, labels, masks = some_test()
    values = level_values(fitted, data, class_idx)  # type: ignore[arg-type]
    protocol = Protocol("calibrated", criterion)
    every, finest = (
        evaluate(fitted, values, class_idx, labels, masks, score=score, protocol=protocol)
        for score in (replace(SCORE, map_levels="all"), replace(SCORE, map_levels="finest"))
    )
    np.testing.assert_array_equal(every.scores, finest.scores)
    assert every.mean["image_auroc"] == finest.mean["image_auroc"]
    assert every.mean["pixel_ap"] != finest.mean["pixel_ap"]
    mine, constants = values[torch.from_numpy(class_idx == 1)], finest.constants["class1"]
    assert isinstance(constants, Calibration)
    assert fitted.grids == ((3, 4), (2, 2))
    (alone, own), fine = finest_levels(mine, constants), mine.levels([0])
    assert all(a.equal(b) for a, b in zip(alone.log_prob, fine.log_prob, strict=True)), len(alone.log_prob)
    expected = anomaly_maps(alone, own, size=16, sigma=1.0, criterion=criterion)
    scores, maps = score_images(mine, constants, replace(SCORE, map_levels="finest"), criterion)
    torch.testing.assert_close(maps, expected, rtol=0, atol=0)
    whole = anomaly_maps(mine, constants, size=16, sigma=1.0, criterion=criterion)
    assert not maps.equal(whole)
    assert scores.equal(image_scores(whole))


def test_maps_that_are_not_calibrated_are_of_all_levels(fitted: HGAD) -> None:
    data, class_idx, labels, masks = some_test()
    values = level_values(fitted, data, class_idx)  # type: ignore[arg-type]
    for protocol in (INDUCTIVE, TRANSDUCTIVE):
        every, finest = (
            evaluate(fitted, values, class_idx, labels, masks, score=score, protocol=protocol).mean
            for score in (replace(SCORE, map_levels="all"), replace(SCORE, map_levels="finest"))
        )
        assert every == finest


def test_all_levels_of_the_finest_grid_count() -> None:
    levels = tuple(torch.rand(2, size, size) for size in (4, 2, 4))
    values = LevelValues(levels, levels)
    kept, calibration = finest_levels(values, Calibration(values, values))
    for found in (kept, calibration.mean, calibration.std):
        assert [v is levels[i] for v, i in zip(found.log_prob, (0, 2), strict=True)] == [True, True]
        assert len(found.neg_entropy) == 2
