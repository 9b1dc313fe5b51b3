"""What learns to give features again: UniAD, which rebuilds them, and STFPM's student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import folder_config, image_folder
from torch import Tensor, nn

from hgadlib.baselines import METHODS
from hgadlib.baselines.one_for_one import OneForOne
from hgadlib.baselines.stfpm import STFPM
from hgadlib.baselines.uniad import JITTER, Attention, UniAD, jittered, neighbour_mask
from hgadlib.config import BaselineConfig, LossConfig, TrainConfig, load_config
from hgadlib.errors import InputError
from hgadlib.features.backbone import build_backbone, create_feature_network, flatten_maps
from hgadlib.features.store import Features
from hgadlib.method import Method
from hgadlib.runs.directory import RunDirectory
from hgadlib.runs.experiment import evaluate_model, train_model
from hgadlib.runs.inputs import prepare
from hgadlib.training import fit

NAMES = ["class0", "class1"]
GRIDS, CHANNELS = ((16, 18), (8, 9)), (3, 5)
BASELINE = BaselineConfig(width=16, layers=1)
NETWORK, STAGES, SIDE = "tf_efficientnet_lite0", (1, 2), 64
TRAIN = TrainConfig(epochs=2, batch_size=4, lr=3e-3)


def uniad(names: list[str] = NAMES, *, seed: int = 0, **settings: Any) -> UniAD:
    torch.manual_seed(seed)
    return UniAD(names, CHANNELS, GRIDS, baseline=replace(BASELINE, **settings))


def waves(n: int, *, seed: int = 0) -> tuple[Features, np.ndarray]:
    """Features that are smooth over positions, at a phase of each image and class."""
    generator = torch.Generator().manual_seed(seed)
    class_idx = torch.arange(n) % 2
    phase = 6 * torch.rand(n, 1, 1, generator=generator)
    levels = []
    for (height, width), channels in zip(GRIDS, CHANNELS, strict=True):
        place = torch.cartesian_prod(torch.linspace(0, 3, height), torch.linspace(0, 3, width))
        angle = place.sum(1)[None, :, None] + phase + torch.arange(channels)
        levels.append(torch.sin(angle) + class_idx[:, None, None])
    return Features(tuple(levels), GRIDS, "key", "host", True, 0.0), class_idx.numpy()


def pictures(n: int, *, seed: int = 0) -> Tensor:
    """Images of coloured noise, (n, 3, SIDE, SIDE)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, SIDE // 8, SIDE // 8, generator=generator)
    return nn.functional.interpolate(coarse, SIDE, mode="bilinear")


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return build_backbone(NETWORK, out_indices=STAGES, image=SIDE)


def taught(teacher: nn.Module, images: Tensor) -> tuple[Features, np.ndarray]:
    """The teacher's features of images of two classes."""
    maps = teacher(images)
    grids = tuple(tuple(x.shape[2:]) for x in maps)
    levels = tuple(x.contiguous() for x in flatten_maps(maps))
    return Features(levels, grids, "key", "host", True, 0.0), np.arange(len(images)) % 2


def stfpm(features: Features, names: list[str] = NAMES, *, seed: int = 0) -> STFPM:
    torch.manual_seed(seed)
    shape = names, features.channels, features.grids
    return STFPM(*shape, baseline=BASELINE, backbone=NETWORK, stages=STAGES)


def values(model: Method, features: Features, index: list[int] | None = None) -> Tensor:
    rows = torch.arange(len(features)) if index is None else torch.tensor(index)
    (found,) = model.level_values(features.batch(rows), torch.zeros(len(rows), dtype=torch.int64)).log_prob
    return found


def test_attention_does_not_see_a_position_nor_its_neighbours() -> None:
    torch.manual_seed(0)
    grid, layer = (12, 10), Attention(16).eval()
    mask = neighbour_mask(grid)
    x, position = torch.randn(1, 120, 16), torch.randn(120, 16)
    source = torch.randn(1, 120, 16, requires_grad=True)
    for row, column in ((5, 4), (0, 9), (11, 2)):
        out = layer(x, source, position, mask)[0, row * 10 + column].square().sum()
        (gradient,) = torch.autograd.grad(out, source)
        rows, columns = torch.meshgrid(torch.arange(12), torch.arange(10), indexing="ij")
        hidden = ((rows - row).abs() <= 3) & ((columns - column).abs() <= 3)
        assert torch.equal(gradient[0].abs().sum(1).view(grid) == 0, hidden)


def test_every_attention_of_uniad_is_masked_and_a_decoder_asks_by_its_own_queries() -> None:
    model, masks, queries = uniad(layers=2), [], []

    def look(_: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        masks.append(named["attn_mask"])
        queries.append(given[0])

    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(look, with_kwargs=True)
    values(model, waves(2)[0])
    assert len(masks) == 2 + 2 * 2 and all(torch.equal(x, neighbour_mask(GRIDS[-1])) for x in masks)
    first, second = queries[2], queries[4]
    assert torch.equal(first[0], first[1]) and torch.equal(second[0], second[1])  # not of the image
    assert not torch.equal(first, second)


def test_jitter_is_in_proportion_to_the_norm_and_of_training_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 500, 8) * torch.tensor([1.0, 10.0])[:, None, None]
    noise = (jittered(x) - x) / x.norm(dim=2, keepdim=True)
    assert noise.std((1, 2)).tolist() == pytest.approx([JITTER / 8] * 2, rel=0.05)
    model = uniad()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    joined = model.joined(waves(2)[0].batch(torch.arange(2)))
    assert torch.equal(model.rebuilt(joined), model.rebuilt(joined))
    model.train()
    assert not torch.equal(model.rebuilt(joined), model.rebuilt(joined))


def test_uniads_map_is_the_distance_and_its_loss_the_mean_square() -> None:
    model, (data, class_idx) = uniad(), waves(3)
    batch = data.batch(torch.arange(3))
    joined = model.joined(batch)
    assert torch.equal(joined[:, :, 3:], batch[1])  # the last level as it is
    apart = model.rebuilt(joined) - joined
    expected = -apart.square().sum(2).sqrt().view(3, *GRIDS[-1])
    torch.testing.assert_close(values(model, data), expected)
    (terms,) = model.losses(batch, torch.from_numpy(class_idx), intra=True)
    torch.testing.assert_close(terms["total"], apart.square().mean())


def test_uniad_learns_and_finds_what_is_elsewhere_otherwise() -> None:
    model, (data, class_idx) = uniad(width=32), waves(32)
    train = replace(TRAIN, epochs=12, batch_size=8, lr=1e-2)
    history = fit(model, data, class_idx, train=train, loss=LossConfig(), progress=False)
    assert history["total"].iloc[-1] < 0.5 * history["total"].iloc[0]
    test, _ = waves(4, seed=1)
    changed = [x.clone().view(4, *grid, -1) for x, grid in zip(test.levels, GRIDS, strict=True)]
    changed[0][:2, 8:12, 10:14] += 2.0
    changed[1][:2, 4:6, 5:7] += 2.0
    odd = replace(test, levels=tuple(x.flatten(1, 2) for x in changed))
    found = -values(model, odd)
    for own in found[:2]:
        row, column = divmod(int(own.argmax()), GRIDS[-1][1])
        assert 3 <= row <= 6 and 4 <= column <= 7
    assert found[:2].amax((1, 2)).min() > found[2:].amax((1, 2)).max()


@pytest.mark.parametrize(
    ("width", "grids", "match"),
    [(12, GRIDS, "multiple of 8"), (16, ((16, 18), (7, 5)), "more than 7 positions a side")],
)
def test_uniad_refuses(width: int, grids: tuple[tuple[int, int], ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        UniAD(NAMES, CHANNELS, grids, baseline=replace(BASELINE, width=width))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher: nn.Module) -> None:
    data, class_idx = taught(teacher, pictures(4))
    model, batch = stfpm(data), data.batch(torch.arange(4))
    labels = torch.from_numpy(class_idx)
    assert model.losses(batch, labels)[0]["total"].item() > 0.5
    trained = create_feature_network(NETWORK, STAGES, None).state_dict()
    model.student.load_state_dict({name: trained[name] for name in model.student.state_dict()})
    assert model.losses(batch, labels)[0]["total"].item() < 1e-6
    assert all(x.max().item() < 1e-4 for x in model.distances(batch))
    # Only the direction counts: a teacher of longer features is the same teacher.
    longer = replace(data, levels=(*(3 * x for x in data.levels[:-1]), data.levels[-1]))
    torch.testing.assert_close(values(model, longer), values(model, data), atol=1e-6, rtol=1e-3)


def test_stfpms_map_is_the_product_of_half_the_squared_distances(teacher: nn.Module) -> None:
    data, _ = taught(teacher, pictures(2))
    model, (*stages, image) = stfpm(data), data.batch(torch.arange(2))
    whole = torch.ones(2, 1, *data.grids[0])
    own = model.student(image.mT.reshape(2, 3, SIDE, SIDE))
    for student, maps, grid in zip(own, stages, data.grids, strict=False):
        likeness = nn.functional.cosine_similarity(student, maps.mT.reshape(2, -1, *grid))
        whole *= nn.functional.interpolate(1 - likeness[:, None], data.grids[0], mode="bilinear")
    torch.testing.assert_close(values(model, data), -whole[:, 0], atol=1e-5, rtol=1e-4)


def test_stfpm_learns_and_its_map_rises_where_the_image_changes(teacher: nn.Module) -> None:
    data, class_idx = taught(teacher, pictures(16))
    model = stfpm(data)
    train = replace(TRAIN, epochs=8, lr=1e-2)
    history = fit(model, data, class_idx, train=train, loss=LossConfig(), progress=False)
    assert history["total"].iloc[-1] < 0.7 * history["total"].iloc[0]
    images = pictures(2, seed=1)
    changed = images.clone()
    changed[:, :, 8:24, 40:56] = torch.tensor([3.0, -3.0]).repeat(8)
    before, after = (-values(model, taught(teacher, x)[0]) for x in (images, changed))
    for own in after - before:
        row, column = divmod(int(own.argmax()), data.grids[0][1])
        assert 1 <= row <= 6 and 9 <= column <= 14  # of 16 x 16
    assert (after.amax((1, 2)) > before.amax((1, 2))).all()


def test_stfpm_refuses_other_levels(teacher: nn.Module) -> None:
    data, _ = taught(teacher, pictures(1))
    shape = data.channels, data.grids
    for channels, grids in (
        (shape[0][:2], shape[1][:2]),
        ([40, 24, 3], shape[1]),
        (shape[0], (*shape[1][:2], (32, 32))),
        ([3], [(SIDE, SIDE)]),
    ):
        with pytest.raises(InputError, match=r"features\.image to data\.image_size"):
            STFPM(NAMES, channels, grids, baseline=BASELINE, backbone=NETWORK, stages=STAGES)


@pytest.fixture(scope="module", params=["uniad", "stfpm"])
def case(request: pytest.FixtureRequest, teacher: nn.Module) -> tuple[Any, Features, np.ndarray]:
    """How a model is made, and what it learns from."""
    if request.param == "uniad":
        return uniad, *waves(8)
    data, class_idx = taught(teacher, pictures(8))
    return lambda names=NAMES: stfpm(data, names), data, class_idx


def test_saved_resumed_and_alone(case: Any, tmp_path: Path) -> None:
    make, data, class_idx = case
    whole, broken, again = make(), make(), make()
    options: dict[str, Any] = {"train": TRAIN, "loss": LossConfig(), "progress": False}
    fit(whole, data, class_idx, **options)

    def stop(epoch: int, _: Method) -> dict[str, float]:
        if epoch == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        fit(
            broken, data, class_idx, **options, on_epoch=stop,
            checkpoint=tmp_path / "checkpoint", checkpoint_s=0.0,
        )  # fmt: skip
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()  # all of it comes from the checkpoint
    fit(again, data, class_idx, **options, checkpoint=tmp_path / "checkpoint")
    expected = values(whole, data)
    assert expected.isfinite().all() and expected.std() > 0
    assert torch.equal(values(again, data), expected)
    whole.save(tmp_path / "model.safetensors")
    loaded = type(whole).load(tmp_path / "model.safetensors")
    assert torch.equal(values(loaded, data), expected) and loaded.architecture() == whole.architecture()
    assert not any(module.training for module in (*loaded.modules(), *whole.modules()))
    torch.testing.assert_close(values(whole, data, [5])[0], expected[5], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="take the backbone"):
        whole.level_values(data.batch(torch.tensor([0]))[:1], torch.tensor([0]))


def test_one_model_for_a_class_is_the_unified_one_of_that_class(case: Any, tmp_path: Path) -> None:
    make, data, _ = case
    own, other = make(["class0"]), make(["class1"])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    OneForOne([own, other]).save(tmp_path / "model.safetensors")
    both = OneForOne.load(tmp_path / "model.safetensors")
    (found,) = both.level_values(data.batch(torch.arange(4)), torch.tensor([0, 1, 0, 1])).log_prob
    torch.testing.assert_close(found[::2], values(own, data, [0, 2]))
    torch.testing.assert_close(found[1::2], values(other, data, [1, 3]))


@pytest.mark.parametrize("name", ["uniad", "stfpm"])
def test_a_run_end_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    given = load_config(dataset="demo", experiment=f"baseline_{name}")
    assert given.method == name and given.protocol == "raw/likelihood" and given.data.held_out == 0
    more = {
        "method": name, "score": {"normalisation": "raw", "map_levels": "all"},
        "baseline": {"width": 16, "layers": 1}, "train": {"evaluate_every": 0},
        "data": {"image_size": 128 if name == "uniad" else SIDE, "held_out": 0},
        "features": {
            "out_indices": [1, 2, 3], "join": False, "image": SIDE if name == "stfpm" else None,
        },
    }  # fmt: skip
    config = folder_config(image_folder(tmp_path / "images"), tmp_path / "run", **more)
    run, inputs = RunDirectory.open(config), prepare(config, progress=False)
    model = train_model(config, inputs, run, progress=False)
    assert type(model) is METHODS[name]
    again = train_model(config, inputs, run, progress=False)
    first, second = (evaluate_model(config, inputs, x).evaluation.scores for x in (model, again))
    np.testing.assert_array_equal(first, second)
    assert np.isfinite(first).all() and len(first) == 12
