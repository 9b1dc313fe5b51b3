"""Maps and scores: the upsampling matrix against torch and scipy, batch independence, both normalisations."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from hgadlib.config import FlowConfig, PriorConfig
from hgadlib.model import HGAD
from hgadlib.scoring import (
    Calibration,
    Criterion,
    ImageScore,
    LevelValues,
    Normalisation,
    anomaly_maps,
    image_scores,
    inductive,
    level_maxima,
    missing_normality,
    normal_statistics,
    published_maps,
    transductive,
    upsampling_matrix,
)

GRIDS = [(8, 6), (4, 3), (1, 2)]
SIZE = 32


def random_values(n: int, seed: int = 0) -> LevelValues:
    generator = torch.Generator().manual_seed(seed)
    levels = [tuple(-2 * torch.rand(n, *grid, generator=generator) for grid in GRIDS) for _ in range(2)]
    return LevelValues(*levels)


@pytest.mark.parametrize("length", [1, 2, 7, 32, 50])
@pytest.mark.parametrize("sigma", [0.0, 0.7, 4.0, 20.0])
def test_rows_sum_to_one(length: int, sigma: float) -> None:
    matrix = upsampling_matrix(length, SIZE, sigma)
    assert matrix.shape == (SIZE, length)
    assert matrix.min() >= 0
    torch.testing.assert_close(matrix.sum(1), torch.ones(SIZE, dtype=torch.float64))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sigma", [0.0, 1.5, 4.0])
def test_matrices_are_torch_s_upsampling_and_scipy_s_blur(grid: tuple[int, int], sigma: float) -> None:
    torch.manual_seed(0)
    value = torch.randn(*grid, dtype=torch.float64)
    rows, columns = (upsampling_matrix(length, SIZE, sigma) for length in grid)
    up = F.interpolate(value[None, None], size=(SIZE, SIZE), mode="bilinear", align_corners=True)[0, 0]
    expected = torch.from_numpy(gaussian_filter(up.numpy(), sigma)) if sigma else up
    torch.testing.assert_close(rows @ value @ columns.T, expected, rtol=1e-12, atol=1e-12)


def test_maps_step_by_step() -> None:
    """Sec. 3.4 written out: subtract, exponentiate, upsample, sum, take from the number of levels, blur."""
    values = random_values(3)
    constants = inductive(values)

    def direct(levels: tuple[Tensor, ...], maxima: Tensor) -> Tensor:
        normality = sum(
            F.interpolate((v - m).exp()[:, None], size=(SIZE, SIZE), mode="bilinear", align_corners=True)[
                :, 0
            ]
            for v, m in zip(levels, maxima, strict=True)
        )
        missing = len(levels) - torch.as_tensor(normality).double()
        return torch.stack([torch.from_numpy(gaussian_filter(image.numpy(), 2.0)) for image in missing])

    likelihood = direct(values.log_prob, constants.log_prob_max)
    entropy = direct(values.neg_entropy, constants.neg_entropy_max)
    expected: dict[Criterion, Tensor] = {
        "likelihood": likelihood,
        "entropy": entropy,
        "both": likelihood * entropy,
    }
    for criterion, wanted in expected.items():
        maps = published_maps(values, constants, size=SIZE, sigma=2.0, criterion=criterion)
        torch.testing.assert_close(maps.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        image_scores(maps).double(), expected["both"].amax((1, 2)), rtol=1e-5, atol=1e-5
    )


def test_small_deviations_keep_their_digits() -> None:
    values = [torch.tensor([[[-1e-7, -2e-7]]])]
    missing = missing_normality(values, torch.zeros(1), 2, 0.0)
    torch.testing.assert_close(missing[0, 0], torch.tensor([1e-7, 2e-7]), rtol=1e-4, atol=0)


def test_inductive_maps_are_never_negative() -> None:
    constants = inductive(random_values(4))
    better = LevelValues(
        tuple(v + 5 for v in random_values(4, 1).log_prob),
        tuple(v + 5 for v in random_values(4, 1).neg_entropy),
    )
    for values in (random_values(4), random_values(4, 1), better):
        for criterion in ("likelihood", "entropy", "both"):
            maps = published_maps(values, constants, size=SIZE, sigma=4.0, criterion=criterion)
            assert maps.min() >= 0
            lowest = anomaly_maps(better, constants, size=SIZE, sigma=4.0, criterion=criterion)
            assert (
                lowest.amax()
                <= anomaly_maps(values, constants, size=SIZE, sigma=4.0, criterion=criterion).amin()
            )
    # above the best training feature nothing is missing
    assert published_maps(better, constants, size=SIZE, sigma=4.0).abs().max() == 0


def test_maps_are_what_exact_arithmetic_says() -> None:
    """One position, one pixel: the formula of the docstring in 400 digits."""
    mp.mp.dps = 400
    below = [0.0, 1e-6, 1e-3, 0.3, 0.7, 3.0, 16.0, 40.0, 600.0, 900.0]
    for first, second, entropy in itertools.product(below, below, [1e-4, 2.0, 50.0, 800.0]):
        values = LevelValues(
            tuple(torch.full((1, 1, 1), -v, dtype=torch.float64) for v in (first, second)),
            tuple(torch.full((1, 1, 1), -v, dtype=torch.float64) for v in (entropy, entropy)),
        )
        constants = Normalisation(torch.zeros(2), torch.zeros(2), 0.0, 1e-5)
        share = {
            "likelihood": (2 - mp.exp(-first) - mp.exp(-second)) / 2,
            "entropy": (2 - 2 * mp.exp(-mp.mpf(entropy)) - mp.mpf(1e-5)) / (2 - mp.mpf(1e-5)),
        }
        share = {name: max(of, mp.mpf(10) ** -290) for name, of in share.items()}
        share["both"] = share["likelihood"] * share["entropy"]
        criteria: tuple[Criterion, ...] = ("likelihood", "entropy", "both")
        for criterion in criteria:
            found = anomaly_maps(values, constants, size=1, sigma=0, criterion=criterion).item()
            assert found == pytest.approx(float(-mp.log(-mp.log(share[criterion]))), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("criterion", ["likelihood", "entropy", "both"])
def test_scores_never_saturate(criterion: Criterion) -> None:
    far = torch.tensor([1.0, 10, 18, 30, 80, 200, 800, 3000, 1e5])
    generator = torch.Generator().manual_seed(0)
    one = [torch.rand(1, *grid, generator=generator) for grid in GRIDS]
    values = LevelValues(*[tuple(-far[:, None, None] * (1 + level / 10) for level in one) for _ in range(2)])
    constants = inductive(random_values(3))
    scores = image_scores(anomaly_maps(values, constants, size=SIZE, sigma=4.0, criterion=criterion))
    assert scores.isfinite().all() and (scores.diff() > 0.1).all()
    # What is lost in the published form: all but the first look the same in float32.
    published = image_scores(published_maps(values, constants, size=SIZE, sigma=4.0, criterion=criterion))
    assert (published[3:] == published[-1]).all()
    # The far end is in nats: twice as far is twice the score.
    assert scores[-1] > 30 * scores[-2]


def test_transductive_minimum_is_zero_before_the_blur() -> None:
    values = random_values(5)
    constants = transductive(values, SIZE)
    assert constants.likelihood_offset > 0  # no pixel is best at every level at once
    for criterion in ("likelihood", "entropy"):
        maps = published_maps(values, constants, size=SIZE, sigma=0.0, criterion=criterion)
        assert maps.amin().abs() < 1e-6
        assert anomaly_maps(values, constants, size=SIZE, sigma=0.0, criterion=criterion).isfinite().all()


def test_only_transductive_scores_depend_on_the_other_images() -> None:
    values, trained = random_values(6), inductive(random_values(9, 1))
    alone = values[:1]
    options = {"size": SIZE, "sigma": 4.0}
    inductive_maps = anomaly_maps(values, trained, **options)[:1]  # type: ignore[arg-type]
    torch.testing.assert_close(anomaly_maps(alone, trained, **options), inductive_maps)  # type: ignore[arg-type]
    published = anomaly_maps(values, transductive(values, SIZE), **options)[:1]  # type: ignore[arg-type]
    published_alone = anomaly_maps(alone, transductive(alone, SIZE), **options)  # type: ignore[arg-type]
    assert (published - published_alone).abs().max() > 0.01


def test_constants_per_image_are_those_of_its_class() -> None:
    values = random_values(2)
    constants = [inductive(random_values(3, seed)) for seed in (1, 2)]
    joint = type(constants[0])(
        torch.stack([c.log_prob_max for c in constants]),
        torch.stack([c.neg_entropy_max for c in constants]),
    ).to("cpu")
    maps = anomaly_maps(values, joint, size=SIZE, sigma=4.0)
    for image, own in enumerate(constants):
        expected = anomaly_maps(values[image : image + 1], own, size=SIZE, sigma=4.0)
        torch.testing.assert_close(maps[image : image + 1], expected)
        alone = anomaly_maps(values[image : image + 1], joint[image], size=SIZE, sigma=4.0)
        torch.testing.assert_close(alone, expected)


def test_without_classes_the_likelihood_decides() -> None:
    values = LevelValues(random_values(2).log_prob, ())
    constants = inductive(values)
    expected = anomaly_maps(values, constants, size=SIZE, sigma=4.0, criterion="likelihood")
    for criterion in ("entropy", "both"):
        assert anomaly_maps(values, constants, size=SIZE, sigma=4.0, criterion=criterion).equal(expected)
    assert level_maxima(()).shape == (0,)
    assert transductive(values, SIZE).entropy_offset == 0
    with pytest.raises(ValueError, match="at least one level"):
        missing_normality((), torch.zeros(0), SIZE, 0.0)


@pytest.mark.parametrize("kind", ["positional", "convolutional"])
@pytest.mark.parametrize("prior", ["mixture", "single"])
def test_an_image_alone_in_a_batch_and_in_another_order(kind: str, prior: str) -> None:
    torch.manual_seed(0)
    grids = [(8, 8), (4, 4)]
    model = HGAD(
        ["a", "b", "c"], [10, 13], grids,
        flow=FlowConfig(kind=kind, layers=3, position_dim=8), prior=PriorConfig(kind=prior, n_centers=3),  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    features = [torch.randn(9, h * w, c) for (h, w), c in zip(grids, model.channels, strict=True)]
    class_idx = torch.arange(9) % 3
    model.calibrate([(model.level_values([x - 0.1 for x in features], class_idx), class_idx)])

    def maps(images: Tensor) -> Tensor:
        values = model.level_values([x[images] for x in features], class_idx[images])
        constants = model.normalisation(class_idx[images])
        return anomaly_maps(values, constants, size=SIZE, sigma=4.0)

    together = maps(torch.arange(9))
    order = torch.tensor([4, 2, 8, 0, 7, 1, 3, 6, 5])
    alone = torch.cat([maps(torch.tensor([i])) for i in range(9)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps(order), together[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(image_scores(alone), image_scores(together), rtol=1e-4, atol=1e-5)
    assert together.std() > 0.01


def test_joining_batches() -> None:
    values = random_values(5)
    joined = LevelValues.cat([values[:2], values[2:]])
    assert len(joined) == 5
    for level in range(len(GRIDS)):
        assert joined.log_prob[level].equal(values.log_prob[level])
        assert joined.neg_entropy[level].equal(values.neg_entropy[level])


def calibration(seed: int = 0, std: float = 0.5) -> Calibration:
    """Constants of one class, (h, w) a level."""
    mean = random_values(1, seed)
    own = LevelValues(tuple(v[0] for v in mean.log_prob), tuple(v[0] for v in mean.neg_entropy))
    spread = LevelValues(
        *(tuple(torch.full_like(v, std) for v in of) for of in (own.log_prob, own.neg_entropy))
    )
    return Calibration(own, spread)


@pytest.mark.parametrize("sigma", [None, 3.0])
def test_calibrated_maps_step_by_step(sigma: float | None) -> None:
    values, constants = random_values(3, 1), calibration(2)

    def direct(levels: tuple[Tensor, ...], means: tuple[Tensor, ...]) -> Tensor:
        maps = []
        for v, m in zip(levels, means, strict=True):
            blur = [0.5 * SIZE / length for length in v.shape[1:]] if sigma is None else sigma
            up = F.interpolate(
                ((m - v) / 0.5).double()[:, None], size=(SIZE, SIZE), mode="bilinear", align_corners=True
            )
            maps.append(torch.stack([torch.from_numpy(gaussian_filter(x.numpy(), blur)) for x in up[:, 0]]))
        return torch.stack(maps).mean(0)

    expected = [direct(values.log_prob, constants.mean.log_prob)]
    expected += [direct(values.neg_entropy, constants.mean.neg_entropy)]
    criteria: dict[Criterion, Tensor] = {"likelihood": expected[0], "entropy": expected[1]}
    criteria["both"] = (expected[0] + expected[1]) / 2
    for criterion, wanted in criteria.items():
        maps = anomaly_maps(values, constants, size=SIZE, sigma=sigma, criterion=criterion)
        torch.testing.assert_close(maps.double(), wanted, rtol=1e-5, atol=1e-5)
        single = (
            LevelValues(values.log_prob, ()),
            Calibration(LevelValues(constants.mean.log_prob, ()), LevelValues(constants.std.log_prob, ())),
        )
        alone = anomaly_maps(*single, size=SIZE, sigma=sigma, criterion=criterion)
        torch.testing.assert_close(alone.double(), criteria["likelihood"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("criterion", ["likelihood", "entropy", "both"])
def test_calibrated_scores_have_no_end(criterion: Criterion) -> None:
    far = torch.tensor([0.0, 1.0, 10, 100, 1e3, 1e4, 1e5])[:, None, None]
    values = LevelValues(*[tuple(-far.expand(-1, *grid) for grid in GRIDS) for _ in range(2)])
    scores = image_scores(anomaly_maps(values, calibration(), size=SIZE, sigma=None, criterion=criterion))
    # Two deviations a nat, at any distance.
    torch.testing.assert_close(scores - scores[0], 2 * far.flatten(), rtol=1e-5, atol=1e-4)


def test_the_blur_follows_the_stride() -> None:
    for length in (1, 4, 16):
        assert upsampling_matrix(length, SIZE, None).equal(
            upsampling_matrix(length, SIZE, 0.5 * SIZE / length)
        )


def test_normal_statistics_by_hand() -> None:
    torch.manual_seed(0)
    few, many = 3, 200_000
    one = torch.tensor([[[-1.0, -2.0]], [[-0.1, -0.3]]], dtype=torch.float64)  # (criteria, h, w)
    x = torch.randn(few, 2, 1, 2, dtype=torch.float64) * 0.5 + one
    count = torch.tensor([few, many], dtype=torch.float64)
    total = torch.stack([x.sum(0), many * one])
    squares = torch.stack(
        [x.square().sum(0), many * (one.square() + torch.tensor([4.0, 1e-12]).view(2, 1, 1))]
    )
    mean, std = normal_statistics(count, total, squares, kappa=7)
    for c in range(2):
        flat = x[:, c].reshape(few, 2)
        expected = (few * flat.mean(0) + 7 * flat.mean()) / (few + 7)
        variance = (few * flat.var(0, correction=0) + 7 * flat.var(correction=0)) / (few + 7)
        torch.testing.assert_close(mean[0, c, 0], expected)
        torch.testing.assert_close(std[0, c, 0], variance.sqrt())
    # Of many images a position speaks for itself.
    torch.testing.assert_close(mean[1], one, rtol=1e-3, atol=0)
    torch.testing.assert_close(std[1, 0], torch.full((1, 2), 2.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_where_normal_features_agree_a_deviation_has_a_floor() -> None:
    count, sure = torch.ones(4, dtype=torch.float64), torch.zeros(4, 2, 2, 2, dtype=torch.float64)
    _, std = normal_statistics(count, sure, sure)
    torch.testing.assert_close(std[:, 0], torch.full_like(std[:, 0], 1e-3))
    torch.testing.assert_close(std[:, 1], torch.full_like(std[:, 1], 0.02 * math.log(4)))
    _, single = normal_statistics(count[:1], sure[:1], sure[:1])
    torch.testing.assert_close(single, torch.full_like(single, 1e-3))  # log 1 = 0


def test_image_scores() -> None:
    torch.manual_seed(0)
    maps = torch.randn(3, 10, 20)
    ranked = maps.flatten(1).sort(descending=True).values
    expected: list[tuple[ImageScore, float, Tensor]] = [
        ("maximum", 0.05, ranked[:, 0]), ("top", 0.05, ranked[:, :10].mean(1)), ("top", 1e-9, ranked[:, 0]),
        ("top", 1.0, maps.mean((1, 2))), ("quantile", 0.05, ranked[:, 10]), ("quantile", 1e-9, ranked[:, 0]),
        ("quantile", 1.0, ranked[:, -1]),
    ]  # fmt: skip
    for how, share, wanted in expected:
        torch.testing.assert_close(image_scores(maps, how, share), wanted)
        torch.testing.assert_close(image_scores(maps[1:2], how, share), wanted[1:2])
