"""One clear error for each thing that can be wrong with the data; `strict=False` goes on without it."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import trees
from PIL import Image

from hgadlib.datasets import load_dataset
from hgadlib.errors import InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return trees.mvtec(tmp_path / "data")


def truncated(root: Path) -> Path:
    """Cut inside the pixels: the header is whole."""
    path = root / "bottle" / "train" / "good" / "001.png"
    path.write_bytes(path.read_bytes()[:300])
    return path


def empty_file(root: Path) -> Path:
    path = root / "bottle" / "train" / "good" / "001.png"
    path.write_bytes(b"")
    return path


def text_as_png(root: Path) -> Path:
    path = root / "bottle" / "test" / "crack" / "000.png"
    path.write_text("no image")
    return path


def mask_of_another_size(root: Path) -> Path:
    return trees.mask(root / "bottle" / "ground_truth" / "crack" / "000_mask.png", size=(13, 16))


def unreadable_mask(root: Path) -> Path:
    path = root / "bottle" / "ground_truth" / "crack" / "000_mask.png"
    path.write_bytes(b"")
    return path


def mask_for_a_normal_image(root: Path) -> Path:
    return trees.mask(root / "bottle" / "ground_truth" / "good" / "000_mask.png")


def two_masks(root: Path) -> Path:
    trees.mask(root / "bottle" / "ground_truth" / "crack" / "000.bmp")
    return root / "bottle" / "test" / "crack" / "000.png"


def empty_class(root: Path) -> Path:
    folder = root / "bottle" / "train" / "good"
    shutil.rmtree(folder)
    folder.mkdir()
    return folder.parent


def loose_training_images(root: Path) -> Path:
    folder = root / "bottle" / "train"
    (folder / "good").rename(root / "moved")
    for path in (root / "moved").iterdir():
        path.rename(folder / path.name)
    (root / "moved").rmdir()
    return folder


def only_in_test(root: Path) -> Path:
    shutil.rmtree(root / "bottle" / "train")
    return root / "bottle"


def no_class(root: Path) -> Path:
    trees.picture(root / "leaflets" / "scan.png")
    return root / "leaflets"


def two_classes_of_one_name(root: Path) -> Path:
    return trees.mvtec_class(root / "Bottle").with_name("bottle")


def anomalous_training_images(root: Path) -> Path:
    trees.picture(root / "bottle" / "train" / "crack" / "0.png")
    return root / "bottle" / "train" / "crack"


def folder_among_images(root: Path) -> Path:
    trees.picture(root / "bottle" / "train" / "good" / "more" / "0.png")
    return root / "bottle" / "train" / "good" / "more"


def link_to_itself(root: Path) -> Path:
    path = root / "bottle" / "train" / "good" / "loop.png"
    path.symlink_to(path)
    return path


def link_to_the_parent(root: Path) -> Path:
    path = root / "again"
    path.symlink_to(root, target_is_directory=True)
    return path


def link_to_nothing(root: Path) -> Path:
    path = root / "bottle" / "train" / "good" / "x.png"
    path.symlink_to(root / "gone.png")
    return path


BAD: list[tuple[Callable[[Path], Path], str]] = [
    (empty_file, r"the file is empty \(0 bytes\)"),
    (text_as_png, r"not an image; the file starts with b'no image'"),
    (mask_of_another_size, r"mask is 16x13 pixels, but its image 000.png is 16x12"),
    (unreadable_mask, r"the file is empty \(0 bytes\)"),
    (mask_for_a_normal_image, r"a mask for a normal image marks a defect"),
    (two_masks, r"two masks for one image: 000_mask.png and 000.bmp"),
    (empty_class, r"class 'bottle' is empty: expected images in train/good"),
    (loose_training_images, r"3 image\(s\) lie in train itself, move them to train/good"),
    (only_in_test, r"class 'bottle' has a test folder but no train/good"),
    (no_class, r"not a class: expected CLASS/train/good"),
    (two_classes_of_one_name, r"two classes of the same name: 'bottle' and 'Bottle'"),
    (anomalous_training_images, r"training images must be normal"),
    (folder_among_images, r"unexpected folder: good should hold images only"),
    (link_to_itself, r"symbolic link loop"),
    (link_to_the_parent, r"symbolic link loop: it leads back to"),
    (link_to_nothing, r"link to a file that does not exist"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_one_line_names_file_and_reason(root: Path, spoil: Callable[[Path], Path], message: str) -> None:
    if spoil is two_classes_of_one_name and (root / "BOTTLE").exists():
        pytest.skip("this file system does not tell upper from lower case")
    path = spoil(root)
    with pytest.raises(InputError, match=message) as caught:
        load_dataset("folder", root=root)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_not_strict_goes_on_and_lists_it(root: Path, spoil: Callable[[Path], Path], message: str) -> None:
    if spoil is two_classes_of_one_name and (root / "BOTTLE").exists():
        pytest.skip("this file system does not tell upper from lower case")
    path = spoil(root)
    dataset = load_dataset("folder", root=root, strict=False)
    assert "cable" in dataset.classes and len(dataset.skipped) == 1
    assert dataset.skipped[0].startswith(f"{path}: ")
    assert path not in [record.path for record in dataset.records]


def test_truncated_pixels_are_found_when_not_strict(root: Path) -> None:
    path = truncated(root)
    dataset = load_dataset("folder", root=root, strict=False)
    assert len(dataset.skipped) == 1 and dataset.skipped[0].startswith(f"{path}: truncated or damaged")
    assert len(dataset.train) == 5


def test_all_zero_mask_of_a_normal_image_is_harmless(root: Path) -> None:
    before = load_dataset("folder", root=root)
    trees.mask(root / "bottle" / "ground_truth" / "good" / "000_mask.png", value=0)
    after = load_dataset("folder", root=root)
    assert after.records == before.records and after.notes == before.notes


def test_anomalous_image_without_mask_is_allowed(root: Path) -> None:
    (root / "bottle" / "ground_truth" / "crack" / "000_mask.png").unlink()
    dataset = load_dataset("folder", root=root)
    assert next(r.mask_path for r in dataset.test if r.is_anomalous) is None
    assert any("1 of 2 anomalous images have no mask" in note for note in dataset.notes)


def test_unreadable_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "bottle" / "train" / "good" / "001.png"
    if os.geteuid() == 0:  # root reads everything, so let the system call say no
        real = Image.open

        def open_(file: str | Path, *args: object) -> Image.Image:
            if Path(file) == path:
                raise PermissionError(13, "Permission denied")
            return real(file, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(Image, "open", open_)
    else:
        path.chmod(0)
    with pytest.raises(InputError, match=r"001.png: permission denied; make the file readable"):
        load_dataset("folder", root=root)
    assert len(load_dataset("folder", root=root, strict=False).skipped) == 1


def test_unreadable_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "bottle" / "train" / "good"
    if os.geteuid() == 0:
        real = os.scandir

        def scandir(path: str | Path) -> object:
            if Path(path) == folder:
                raise PermissionError(13, "Permission denied")
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
    else:
        folder.chmod(0)
    with pytest.raises(InputError, match="good: permission denied; make the folder readable"):
        load_dataset("folder", root=root)
    if os.geteuid() != 0:
        folder.chmod(stat.S_IRWXU)


def test_no_class_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no images found; expected CLASS/train/good"):
        load_dataset("folder", root=tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="expected a folder, found a file"):
        load_dataset("folder", root=tmp_path / "file")
    for name in ("mvtec", "btad", "mvtec3d", "visa"):
        with pytest.raises(InputError, match="expected folders CLASS/train, found none"):
            load_dataset(name, root=tmp_path)


def test_nothing_trainable_is_left(tmp_path: Path) -> None:
    trees.mvtec(tmp_path, ("bottle",))
    for path in (tmp_path / "bottle" / "train" / "good").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no class has a training image; left out 3 bad thing"):
        load_dataset("folder", root=tmp_path, strict=False)


def test_flat_layout_with_images_beside_folders(tmp_path: Path) -> None:
    trees.picture(tmp_path / "left" / "0.png")
    trees.picture(tmp_path / "0.png")
    with pytest.raises(InputError, match="images beside class folders"):
        load_dataset("folder", root=tmp_path)
    (tmp_path / "0.png").unlink()
    trees.picture(tmp_path / "score" / "right" / "0.png")
    with pytest.raises(InputError, match="class 'right' has test images but no training image"):
        load_dataset("folder", root=tmp_path)


def test_two_images_share_a_mask(root: Path) -> None:
    trees.picture(root / "bottle" / "test" / "crack" / "000.jpg")
    with pytest.raises(InputError, match=r"two images named 000 share the mask 000_mask.png"):
        load_dataset("folder", root=root)


# VisA's table


@pytest.fixture
def visa_root(tmp_path: Path) -> Path:
    return trees.visa(tmp_path)


def test_visa_missing_column(visa_root: Path) -> None:
    trees.visa_table(visa_root, [("object", "split", "image", "mask"), ("pcb1", "train", "a.JPG", "")])
    with pytest.raises(
        InputError, match=r"1cls.csv: column 'label' is missing; expected object, split, label"
    ):
        load_dataset("visa", root=visa_root)


@pytest.mark.parametrize(
    "name", ["Images/Normal/0001.JPG", "Images/Anomaly/000.JPG", "Masks/Anomaly/000.png"]
)
@pytest.mark.filterwarnings("ignore:.* is not the published set:UserWarning")
def test_visa_missing_file(visa_root: Path, name: str) -> None:
    path = visa_root / "capsules" / "Data" / name
    path.unlink()
    with pytest.raises(
        InputError, match=r"no such file, but split_csv/1cls.csv, line \d+ names it as"
    ) as caught:
        load_dataset("visa", root=visa_root)
    assert str(caught.value).startswith(f"{path}: ")
    dataset = load_dataset("visa", root=visa_root, strict=False)
    assert len(dataset.skipped) == 1 and len(dataset.records) == 9


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("pcb1", "val", "normal", "a.JPG", ""), "line 2: expected a class, train or test"),
        (("pcb1", "train", "anomaly", "a.JPG", ""), "line 2: training images must be normal"),
        (("pcb1", "train", "normal", "../../a.JPG", ""), "line 2: expected the path of an image below"),
        (("pcb1", "train"), "line 2: expected a class, train or test"),
    ],
)
def test_visa_bad_row(visa_root: Path, row: tuple[str, ...], message: str) -> None:
    trees.visa_table(visa_root, [trees.VISA_COLUMNS, row])
    with pytest.raises(InputError, match=message):
        load_dataset("visa", root=visa_root)


def test_class_of_a_published_set_in_test_only(tmp_path: Path) -> None:
    trees.mvtec(tmp_path)
    shutil.rmtree(tmp_path / "cable" / "train")
    with pytest.raises(InputError, match="class 'cable' is in test but not in train"):
        load_dataset("mvtec", root=tmp_path)


def test_mask_for_a_normal_image_of_mvtec3d(tmp_path: Path) -> None:
    trees.mask(trees.mvtec3d(tmp_path) / "tire" / "test" / "good" / "gt" / "000.png")
    with pytest.raises(InputError, match=r"gt/000.png: a mask for a normal image marks a defect"):
        load_dataset("mvtec3d", root=tmp_path)


def test_empty_class_of_mvtec3d(tmp_path: Path) -> None:
    trees.mvtec3d(tmp_path)
    shutil.rmtree(tmp_path / "tire" / "train" / "good" / "rgb")
    with pytest.raises(InputError, match="class 'tire' is empty: expected images in train/good/rgb"):
        load_dataset("mvtec3d", root=tmp_path)
