"""The methods that see pixels: what they draw and mask, that they learn, find, and keep what they learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from sklearn.metrics import roc_auc_score
from small import folder_config, image_folder
from torch import Tensor

from hgadlib.baselines import METHODS
from hgadlib.baselines.one_for_one import OneForOne
from hgadlib.baselines.pixels import PixelMethod, ssim
from hgadlib.baselines.pmad import PATCH, PMAD
from hgadlib.baselines.synthesis import draw_defects, draw_panel_defects, perlin
from hgadlib.config import BaselineConfig, LossConfig, TrainConfig, load_config
from hgadlib.errors import InputError
from hgadlib.features.backbone import build_backbone
from hgadlib.features.store import Features
from hgadlib.runs.directory import RunDirectory
from hgadlib.runs.experiment import evaluate_model, finish_run, train_model
from hgadlib.runs.inputs import prepare
from hgadlib.training import fit

SIDE = 32
NAMES = ["draem", "omnial", "pmad"]
EPOCHS = {"draem": 20, "omnial": 10, "pmad": 8}


def pictures(n: int, *, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Stripes of two classes, across and along, (n, 3, S, S), and the classes."""
    generator = torch.Generator().manual_seed(seed)
    class_idx = torch.arange(n) % 2
    wave = 0.5 * torch.sin(torch.arange(SIDE) * (2 * torch.pi / 8)).expand(n, 3, SIDE, SIDE)
    own = torch.where(class_idx[:, None, None, None] == 0, wave, wave.mT)
    return own + 0.02 * torch.randn(n, 3, SIDE, SIDE, generator=generator), class_idx.numpy()


def as_features(images: Tensor) -> Features:
    return Features((images.movedim(1, -1).flatten(1, 2),), ((SIDE, SIDE),), "key", "host", True, 0.0)


def make(name: str, *, seed: int = 0, classes: int = 2) -> PixelMethod:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"baseline": BaselineConfig(width=16 if name == "pmad" else 4, layers=2)}
    model = METHODS[name]([f"class{k}" for k in range(classes)], [3], [(SIDE, SIDE)], **settings)
    assert isinstance(model, PixelMethod)
    return model


def fitted(name: str, epochs: int, **more: Any) -> tuple[PixelMethod, Any]:
    model = make(name)
    images, class_idx = pictures(32)
    train = TrainConfig(epochs=epochs, batch_size=8, lr=1e-2, warmup=0.0)
    history = fit(
        model, as_features(images), class_idx, train=train, loss=LossConfig(), progress=False, **more
    )
    return model, history


def maps(model: Any, images: Tensor) -> Tensor:
    labels = torch.zeros(len(images), dtype=torch.int64)
    return -model.level_values(as_features(images).levels, labels).log_prob[0]


def test_perlin_noise_is_smooth_and_of_its_cells() -> None:
    torch.manual_seed(0)
    fine, coarse = perlin(torch.tensor([[8.0, 8.0], [1.0, 1.0]]).repeat_interleave(16, 0), 64).split(16)
    step = [(x.diff(dim=1).square().mean() / x.var()).item() for x in (fine, coarse)]
    assert step[1] < step[0] / 8 and step[0] < 0.5
    assert 0.8 < fine.abs().max() < 1.5 and abs(fine.mean()) < 0.1
    torch.manual_seed(0)
    assert torch.equal(perlin(torch.full((32, 2), 8.0), 64)[:16], fine)
    assert not torch.equal(fine[0], fine[1])


def test_drawn_defects_lie_where_their_mask_says() -> None:
    torch.manual_seed(0)
    images = pictures(64)[0].clone()
    defective, mask = draw_defects(images)
    changed = (defective != images).any(1)
    assert torch.equal(changed, mask) and torch.equal(images, pictures(64)[0])
    share = mask.flatten(1).any(1).double().mean().item()
    assert 0.25 < share < 0.55  # half of the images, less those where the noise stays low
    assert not draw_defects(images, share=0.0)[1].any()


def test_panels_say_where_defects_may_be_and_how_clear() -> None:
    torch.manual_seed(0)
    images = pictures(128)[0]
    defective, mask, levels = draw_panel_defects(images, 4)
    assert torch.equal((defective != images).any(1), mask)
    blocks = levels.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)
    assert torch.equal(blocks.amin(-1), blocks.amax(-1)) and not mask[levels == 0].any()
    assert set(levels.unique().tolist()) == {0, 1, 2, 3}
    change = (defective - images).abs().mean(1)
    clear = [change[mask & (levels == level)].mean().item() for level in (1, 2, 3)]
    assert clear[0] > 1.3 * clear[1] > 1.6 * clear[2]


def test_ssim_is_scikit_images() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 40, 40, generator=generator, dtype=torch.float64)
    y = (x + 0.3 * torch.rand(2, 3, 40, 40, generator=generator, dtype=torch.float64)).clamp(0, 1)
    found = ssim(x, y, span=1.0)[:, :, 8:-8, 8:-8]
    for i in range(2):
        _, expected = structural_similarity(
            x[i].numpy(), y[i].numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, full=True,
        )  # fmt: skip
        np.testing.assert_allclose(found[i], expected[:, 8:-8, 8:-8], rtol=1e-6)


def test_every_patch_is_masked_once_and_predicted_without_itself() -> None:
    model = make("pmad")
    assert isinstance(model, PMAD)
    masks = model.chequer()
    assert masks.shape == (2, (SIDE // PATCH) ** 2) and (masks.sum(0) == 1).all()
    assert 0.3 < model.drawn_masks(200).double().mean() < 0.7
    patches = model.patches(pictures(1)[0])
    other = patches.clone()
    hidden, shown = masks[0].nonzero()[0, 0], (~masks[0]).nonzero()[0, 0]
    with torch.no_grad():
        mean, log_variance = model.predict(patches, masks[:1])
        other[0, hidden] += 1
        again = model.predict(other, masks[:1])
        assert torch.equal(again[0], mean) and torch.equal(again[1], log_variance)
        other[0, shown] += 1
        assert not torch.equal(model.predict(other, masks[:1])[0][0, hidden], mean[0, hidden])


def test_maps_have_a_patchs_surprise_where_the_patch_is() -> None:
    model = make("pmad")
    images = pictures(2)[0]
    before = maps(model, images)
    images[1, :, 8:16, 16:24] += 4
    changed = (maps(model, images) - before).unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4))
    assert changed[1].argmax() == 1 * 4 + 2 and changed[1, 1, 2] > 10 * changed[1].flatten().sort()[0][-2]
    assert torch.equal(changed[0], torch.zeros(4, 4))


@pytest.mark.parametrize("name", NAMES)
def test_a_short_fit_finds_what_is_wrong_and_is_kept(name: str, tmp_path: Path) -> None:
    model, history = fitted(name, EPOCHS[name])
    first, last = history.iloc[0], history.iloc[-1]
    for term in {"draem": ["l2", "ssim"], "omnial": ["l2", "ssim"], "pmad": ["nll"]}[name]:
        assert last[term] < first[term]
    images = pictures(16, seed=1)[0]
    truth = torch.zeros(16, SIDE, SIDE, dtype=torch.bool)
    for i in range(8):  # of both classes
        truth[i, 10 + i : 16 + i, 6 + 2 * i : 12 + 2 * i] = True
    images = torch.where(truth[:, None], torch.tensor([0.9, -0.9, 0.2])[:, None, None], images)
    found = maps(model, images)
    assert found.shape == truth.shape and found.isfinite().all()
    assert roc_auc_score(truth.flatten(), found.flatten()) > 0.85
    assert roc_auc_score(truth.flatten(1).any(1), found.flatten(1).amax(1)) > 0.85
    # Alone as in a batch, in any order.
    alone = torch.cat([maps(model, image[None]) for image in images])
    torch.testing.assert_close(alone, found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps(model, images.flip(0)).flip(0), found, rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "model.safetensors")
    loaded = METHODS[name].load(tmp_path / "model.safetensors")
    assert type(loaded) is type(model) and loaded.architecture() == model.architecture()
    assert torch.equal(maps(loaded, images), found)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_fit_is_the_unbroken_one(name: str, tmp_path: Path) -> None:
    whole, _ = fitted(name, 2)

    def stop(epoch: int, model: Any) -> dict[str, float]:
        if epoch == 2:
            raise KeyboardInterrupt
        return {}

    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fitted(name, 2, checkpoint=file, checkpoint_s=0.0, on_epoch=stop)
    assert file.is_file()  # of the first epoch
    resumed, history = fitted(name, 2, checkpoint=file)
    assert len(history) == 2
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_one_class_alone_is_the_unified_model(name: str) -> None:
    model, images = make(name, classes=1), pictures(3)[0]
    assert torch.equal(maps(OneForOne([model]), images), maps(model, images))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_inputs_are_refused(name: str) -> None:
    make_it: Any = METHODS[name]
    with pytest.raises(InputError, match="without the image"):
        make_it(["a"], [8, 4], [(4, 4), (2, 2)], baseline=BaselineConfig())
    with pytest.raises(InputError, match="expected features of"):
        maps(make(name), torch.zeros(1, 3, SIDE, SIDE // 2))
    side, layers = (30, 2) if name == "pmad" else (SIDE, 6)
    with pytest.raises(InputError, match=r"features\.image: expected"):
        make_it(["a"], [3], [(side, side)], baseline=BaselineConfig(layers=layers))


def test_width_is_a_multiple_of_the_heads() -> None:
    with pytest.raises(InputError, match=r"baseline\.width: expected a multiple of 4, found 10"):
        PMAD(["a"], [3], [(SIDE, SIDE)], baseline=BaselineConfig(width=10))


@pytest.mark.parametrize("name", NAMES)
def test_the_image_alone_runs_end_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = load_config(dataset="demo", experiment=f"baseline_{name}")
    assert (given.method, given.features.out_indices, given.score.normalisation) == (name, (), "raw")
    monkeypatch.setenv("HGAD_CACHE", str(tmp_path / "cache"))
    config = folder_config(
        image_folder(tmp_path / "images"), tmp_path / "run", method=name,
        data={"image_size": 32}, features={"out_indices": [], "image": 32},
        baseline={"width": 8, "layers": 2}, score={"normalisation": "raw", "sigma": 0},
    )  # fmt: skip
    run, inputs = RunDirectory.open(config), prepare(config, progress=False)
    assert inputs.train.channels == [3] and inputs.train.grids == ((32, 32),)
    result = finish_run(config, inputs, train_model(config, inputs, run, progress=False), run)
    assert result.metrics["protocol"]["normalisation"] == "raw"
    again = train_model(config, inputs, run, progress=False)
    np.testing.assert_array_equal(
        evaluate_model(config, inputs, again).evaluation.scores, result.evaluation.scores
    )


def test_a_backbone_without_stages_gives_the_image() -> None:
    backbone, images = build_backbone(out_indices=(), image=16), torch.rand(2, 3, 16, 16)
    (level,) = backbone(images)
    assert torch.equal(level, images) and backbone.channels == [3] and backbone.grids(32) == [(16, 16)]
