"""Images as they come, resizing, masks, and loading in parallel."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hgadlib.datasets.images import (
    RESIZE_POLICIES,
    load_images,
    load_masks,
    parallel_map,
    read_header,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
)
from hgadlib.datasets.records import ImageRecord
from hgadlib.errors import InputError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def record(path: Path, is_anomalous: bool, mask_path: Path | None) -> ImageRecord:
    return ImageRecord(path, "part", "test", is_anomalous, "crack" if is_anomalous else "good", mask_path)


def photo(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


# Decoding


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = photo()[..., 0]
    image = read_image(save(Image.fromarray(grey), tmp_path / "a.png"))
    assert image.dtype == np.uint8 and image.shape == (40, 60, 3)
    assert all(np.array_equal(image[..., channel], grey) for channel in range(3))


def test_transparency_is_laid_over_black(tmp_path: Path) -> None:
    rgba = np.dstack([photo(), np.full((40, 60), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    image = read_image(save(Image.fromarray(rgba), tmp_path / "a.png"))
    assert (image[:10] == 0).all() and np.array_equal(image[10:], rgba[10:, :, :3])


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_palette_keeps_its_colours(tmp_path: Path, suffix: str) -> None:
    flat = np.zeros((8, 8, 3), np.uint8)
    flat[:4] = (200, 30, 40)
    image = read_image(save(Image.fromarray(flat).quantize(4), tmp_path / f"a.{suffix}"))
    assert np.abs(image.astype(int) - flat).max() <= 3


def test_transparent_palette(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 255, 255, 10, 20, 30])
    image.putpixel((0, 0), 0)
    assert (
        read_image(save(image, tmp_path / "a.png", transparency=0))[0].tolist()
        == [[0, 0, 0]] + [[10, 20, 30]] * 3
    )


def test_cmyk_jpeg(tmp_path: Path) -> None:
    image = read_image(save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=95))
    assert image[4, 4, 0] > 200 and image[4, 4, 1:].max() < 60


def test_sixteen_bits_are_scaled_by_one_factor_for_all_images(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert read_image(save(Image.fromarray(values), tmp_path / "a.png"))[0, :, 0].tolist() == [0, 1, 128, 255]
    dim = read_image(save(Image.fromarray(values // 16), tmp_path / "b.tif"))
    assert dim.max() == 16, "a dark image must stay dark"


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((30, 20, 3), np.uint8)
    upright[:10] = 255
    lying = Image.fromarray(np.rot90(upright))
    path = save(lying, tmp_path / "a.jpg", exif=exif, quality=100)
    image = read_image(path)
    assert image.shape == (30, 20, 3) and image[:8].min() > 200 and image[12:].max() < 50


@pytest.mark.parametrize("policy", RESIZE_POLICIES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (300, 2), (37, 53)])
def test_odd_sizes_load(tmp_path: Path, policy: str, shape: tuple[int, int]) -> None:
    path = save(Image.new("RGB", shape[::-1], (50, 100, 150)), tmp_path / "a.png")
    _, images = next(load_images([path], size=32, resize=policy, mean=(0, 0, 0), std=(1, 1, 1), batch_size=1))
    assert images.shape == (1, 3, 32, 32)
    assert (images[0].amax((1, 2)) * 255).round().tolist() == [50, 100, 150]


def test_a_very_large_image_loads(tmp_path: Path) -> None:
    path = save(Image.new("L", (8000, 8000), 77), tmp_path / "a.png")
    _, images = next(load_images([path], size=16, mean=(0, 0, 0), std=(1, 1, 1), batch_size=1))
    assert torch.allclose(images, torch.full_like(images, 77 / 255))


# Bad files


def broken_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo(200, 200)).save(file, "PNG")
    return file.getvalue()[:20000]


def broken_jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo(200, 200)).save(file, "JPEG")
    return file.getvalue()[:9000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"these are words, not pixels", r"not an image; the file starts with b'these are words"),
        (broken_png(), "truncated or damaged"),
        (broken_jpeg(), "truncated or damaged"),
        (broken_png()[:30], "truncated or damaged|not an image"),
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "cut header"],
)
def test_bad_file_is_named_with_its_reason(tmp_path: Path, content: bytes, message: str) -> None:
    good = save(Image.fromarray(photo()), tmp_path / "good.png")
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(load_images([good, bad, good], size=8, mean=MEAN, std=STD, batch_size=3))
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_folder_and_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="found a folder"):
        read_image(tmp_path)
    path = save(Image.fromarray(photo()), tmp_path / "a.png")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(InputError, match="permission denied"):
        read_image(path)


def test_floating_point_images_have_no_known_range(tmp_path: Path) -> None:
    path = save(Image.fromarray(photo()[..., 0].astype(np.float32)), tmp_path / "a.tif")
    with pytest.raises(InputError, match="8 or 16 bits"):
        read_image(path)


def test_wrong_parameters(tmp_path: Path) -> None:
    path = save(Image.fromarray(photo()), tmp_path / "a.png")
    with pytest.raises(InputError, match=r"stretch, short_side_center_crop, pad, found 'squash'"):
        next(load_images([path], size=8, resize="squash", mean=MEAN, std=STD, batch_size=1))
    with pytest.raises(InputError, match="num_workers"):
        next(load_images([path], size=8, mean=MEAN, std=STD, batch_size=1, num_workers=-1))
    with pytest.raises(InputError, match="batch_size"):
        next(load_images([path], size=8, mean=MEAN, std=STD, batch_size=0))


# Resizing


def test_downscaling_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = resize_image(stripes, 8)[:, 1:-1]
    assert np.abs(inner.astype(int) - 128).max() <= 2


def test_center_crop_keeps_the_central_square() -> None:
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = 200
    assert (resize_image(image, 20, "short_side_center_crop") == 200).all()
    full = np.asarray(Image.fromarray(photo(50, 90)).resize((18 * 4, 40), Image.Resampling.BILINEAR))
    cut = resize_image(photo(50, 90), 40, "short_side_center_crop")
    assert np.abs(cut.astype(int) - full[:, 16:56]).max() <= 1


def test_pad_keeps_all_and_the_aspect_ratio() -> None:
    image = np.full((20, 60, 3), 200, np.uint8)
    padded = resize_image(image, 30, "pad")
    assert (padded[10:20] == 200).all() and (padded[:10] == 0).all() and (padded[20:] == 0).all()


@pytest.mark.parametrize("policy", RESIZE_POLICIES)
@pytest.mark.parametrize("shape", [(64, 64), (100, 60), (60, 100), (31, 47)])
def test_masks_follow_their_images(policy: str, shape: tuple[int, int]) -> None:
    mask = np.zeros(shape, bool)
    mask[shape[0] // 3 : shape[0] // 2 + 8, shape[1] // 3 : shape[1] // 2 + 8] = True
    image = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
    small = resize_image(image, 32, policy)[..., 0]
    moved = resize_mask(mask, 32, policy)
    assert moved.dtype == bool and moved.any()
    assert moved[small > 250].all() and not moved[small < 5].any()


def test_thin_defects_do_not_vanish() -> None:
    mask = np.zeros((512, 512), bool)
    mask[100, 33:400] = True
    small = resize_mask(mask, 64)
    assert small[12, 4:50].all() and small.sum() == 46


def test_defect_outside_the_crop_is_lost_as_published() -> None:
    mask = np.zeros((20, 60), bool)
    mask[5, 2] = True
    assert not resize_mask(mask, 20, "short_side_center_crop").any()
    assert resize_mask(mask, 20, "stretch").any()


# Masks


@pytest.mark.parametrize("value", [1, 128, 255])
def test_any_non_zero_pixel_counts(tmp_path: Path, value: int) -> None:
    values = np.zeros((6, 7), np.uint8)
    values[2, 3] = value
    assert np.array_equal(read_mask(save(Image.fromarray(values), tmp_path / "m.png")), values > 0)
    deep = values.astype(np.uint16)
    assert np.array_equal(read_mask(save(Image.fromarray(deep), tmp_path / "m16.png")), values > 0)


def test_one_bit_palette_and_transparent_masks(tmp_path: Path) -> None:
    mask = np.zeros((6, 7), bool)
    mask[1:3, 2:5] = True
    assert np.array_equal(read_mask(save(Image.fromarray(mask), tmp_path / "1.png")), mask)
    palette = Image.fromarray(mask.astype(np.uint8) * 255).convert("P")
    assert np.array_equal(read_mask(save(palette, tmp_path / "p.bmp")), mask)
    rgba = np.full((6, 7, 4), 255, np.uint8)
    rgba[..., 3] = mask * 255
    assert np.array_equal(read_mask(save(Image.fromarray(rgba), tmp_path / "a.png")), mask)


def test_jpeg_masks_ignore_compression_noise(tmp_path: Path) -> None:
    mask = np.zeros((64, 64), bool)
    mask[20:40, 17:43] = True
    path = save(Image.fromarray(mask.astype(np.uint8) * 255), tmp_path / "m.jpg", quality=75)
    assert (read_mask(path) != mask).sum() <= 4


def test_load_masks(tmp_path: Path) -> None:
    image = save(Image.fromarray(photo()), tmp_path / "a.png")
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:50] = True
    path = save(Image.fromarray(mask), tmp_path / "a_mask.png")
    records = [record(image, False, None), record(image, True, path), record(image, True, None)]
    masks = load_masks(records, size=20)
    assert masks.shape == (3, 20, 20) and masks.dtype == bool
    assert not masks[0].any() and not masks[2].any() and np.array_equal(masks[1], resize_mask(mask, 20))


def test_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    image = save(Image.fromarray(photo()), tmp_path / "a.png")
    path = save(Image.new("1", (40, 60)), tmp_path / "a_mask.png")
    with pytest.raises(InputError, match=r"mask is 40x60 pixels, but its image a.png is 60x40"):
        load_masks([record(image, True, path)], size=20)


# Loading in parallel


def test_values_are_normalised_and_in_order(tmp_path: Path) -> None:
    paths = [save(Image.fromarray(photo(16, 16, seed)), tmp_path / f"{seed}.png") for seed in range(11)]
    options = {"size": 16, "mean": MEAN, "std": STD, "batch_size": 4}
    batches = list(load_images(paths, num_workers=3, **options))  # type: ignore[arg-type]
    assert [len(indices) for indices, _ in batches] == [4, 4, 3]
    assert torch.cat([indices for indices, _ in batches]).tolist() == list(range(11))
    images = torch.cat([images for _, images in batches])
    expected = np.stack([(photo(16, 16, seed) / 255 - MEAN) / STD for seed in range(11)]).transpose(
        0, 3, 1, 2
    )
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images.numpy(), expected, atol=2e-6)
    alone = torch.cat([images for _, images in load_images(paths, num_workers=1, **options)])  # type: ignore[arg-type]
    assert torch.equal(images, alone)


def test_no_images_no_batches() -> None:
    assert list(load_images([], size=16, mean=MEAN, std=STD, batch_size=4)) == []


def test_reading_ahead_is_bounded_and_stops_with_the_reader() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        return item

    results = parallel_map(work, range(1000), num_workers=2, ahead=8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    results.close()  # type: ignore[attr-defined]
    assert len(started) <= 3 + 8


def test_an_image_of_400_megapixels_is_refused_with_what_to_do(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    path = tmp_path / "scan.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    for read in (read_header, read_image):
        with pytest.raises(
            InputError, match=r"scan\.png: an image of 400 million pixels..* at most 179 million.*tiles"
        ):
            read(path)
