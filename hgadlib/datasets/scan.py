"""Look at folders the same way everywhere: sorted, links followed with care, nothing lost in silence."""

from __future__ import annotations

import errno
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hgadlib.datasets import images
from hgadlib.datasets.records import UNKNOWN_CLASS, ImageRecord
from hgadlib.errors import InputError
from hgadlib.files import user_path

# Still images that Pillow decodes itself, without calling another program.
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".avif",
    ".jp2", ".j2k", ".pbm", ".pgm", ".ppm", ".pnm", ".tga",
)  # fmt: skip
# Left behind by operating systems, network drives and archivers; no one means them as data.
_LITTER = frozenset({
    "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "@recycle", "#recycle", "@sharebin",
    "#snapshot", "$recycle.bin", "system volume information", "lost+found", "icon\r",
})  # fmt: skip
_BIT_DEPTHS = (8, 10, 12, 14, 16)
_REASONS = {
    errno.ENOENT: "no such folder", errno.ENOTDIR: "expected a folder, found a file",
    errno.ELOOP: "symbolic link loop",
}  # fmt: skip


@dataclass
class Findings:
    """What a loader came across. Under `strict` the first bad thing is raised, else all are collected."""

    strict: bool = True
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def bad(self, path: Path, reason: str) -> None:
        """Raise one bad thing as InputError under `strict`, else collect it."""
        message = f"{path}: {reason}"
        if self.strict:
            raise InputError(message)
        self.skipped.append(message)

    def note(self, text: str) -> None:
        """Keep one sentence for the reader."""
        self.notes.append(text)


def _follow(entry: os.DirEntry[str], folder: Path) -> tuple[bool, str | None]:
    """Return whether an entry is a folder, and what is wrong with it, if anything."""
    try:
        entry.stat()
        is_folder = entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False, "symbolic link loop; remove the link"
        if error.errno == errno.ENOENT and entry.is_symlink():
            return False, "link to a file that does not exist; remove or mend the link"
        return False, f"cannot be read: {error.strerror}"
    if is_folder and entry.is_symlink() and folder.resolve().is_relative_to(Path(entry.path).resolve()):
        return False, f"symbolic link loop: it leads back to {Path(entry.path).resolve()}; remove the link"
    return is_folder, None


def list_folder(folder: Path, findings: Findings | None = None) -> tuple[list[Path], list[Path]]:
    """List the folders and the files of a folder, sorted by name, hidden entries and litter left out.

    Raises:
        InputError: The folder does not exist, or (under strict) it or a link in it cannot be read.
    """
    # Where it is only asked what probably lies there, nothing takes up the findings.
    findings = findings or Findings(strict=False)
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except PermissionError:
        findings.bad(folder, "permission denied; make the folder readable")
        return [], []
    except OSError as error:
        raise InputError(f"{folder}: {_REASONS.get(error.errno or 0, error.strerror)}") from error
    folders: list[Path] = []
    files: list[Path] = []
    for entry in found:
        if is_litter(entry.name):
            continue
        is_folder, problem = _follow(entry, folder)
        if problem is not None:
            findings.bad(Path(entry.path), problem)
        else:
            (folders if is_folder else files).append(Path(entry.path))
    return folders, files


def is_litter(name: str) -> bool:
    """Check whether a file or folder is hidden, or one that a system leaves behind."""
    return name.startswith(".") or name.lower() in _LITTER


def is_image(path: Path) -> bool:
    """Check whether the name ends like an image's; the content is looked at later."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def list_images(folder: Path, findings: Findings) -> list[Path]:
    """List the images of a folder; note other files, refuse folders, for what lies in them would be lost."""
    folders, files = list_folder(folder, findings)
    for inner in folders:
        findings.bad(inner, f"unexpected folder: {folder.name} should hold images only; move its images up")
    if others := [path.name for path in files if not is_image(path)]:
        findings.note(f"{folder}: {len(others)} file(s) that are no images were ignored: {some(others)}")
    return [path for path in files if is_image(path)]


def suffixes_found(folder: Path) -> str:
    """Say which suffixes the files of a folder have, to follow on "no images"; empty if there are none."""
    files = list_folder(folder)[1] if folder.is_dir() else []
    found = Counter(path.suffix.lower() or "none" for path in files if not is_image(path))
    counts = some([f"{suffix} ({count})" for suffix, count in found.most_common()])
    return f"; found files with suffix {counts}, read are {', '.join(IMAGE_SUFFIXES)}" if found else ""


def distinct(folders: Sequence[Path], findings: Findings) -> list[Path]:
    """Refuse classes whose names are the same but for case or Unicode form; unless strict, keep the first.

    Some file systems keep them apart and some do not; a run directory must hold both.
    """
    seen: dict[str, Path] = {}
    for folder in folders:
        first = seen.setdefault(unicodedata.normalize("NFC", folder.name).casefold(), folder)
        if first is not folder:
            names = f"{folder.name!r} and {first.name!r}"
            findings.bad(folder, f"two classes of the same name: {names}; rename one")
    return list(seen.values())


def holds(folder: Path, marker: str, what: str, expected: Mapping[str, object]) -> bool:
    """Check whether a folder holds the very set that its marker file should describe; False if it is empty.

    Raises:
        InputError: It holds something else, or another version of the set.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: expected a folder, found a file; give another folder")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        found = dict(json.loads((folder / marker).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder}: expected {what}, found other files; give another folder") from error
    if keys := ", ".join(sorted(key for key, value in expected.items() if found.get(key) != value)):
        raise InputError(f"{folder}: holds {what} that differs in {keys}; remove it or give another folder")
    return True


class _Seen(NamedTuple):
    record: ImageRecord
    mode: str
    largest: int | None
    """Its largest value, of a 16-bit image alone."""


def verify(
    records: Sequence[ImageRecord], findings: Findings, bit_depth: int | None = None
) -> list[ImageRecord]:
    """Look at every image and mask before hours are spent on them.

    Under strict the headers are read, and 16-bit images decoded: cheap, and enough to find empty files, text
    named .png, masks of another size and the values in use; what is damaged further in is found on decoding.
    Otherwise all is decoded here, in parallel, so that bad images can be left out. The good records return,
    in order, with their bit depth: bits in use of 16-bit files, as given or, for None, the least of 8, 10,
    12, 14 and 16 that hold the training images' largest value.

    Raises:
        InputError: Under strict, for the first bad image or mask.
    """

    def look(record: ImageRecord) -> _Seen | InputError:
        mask = record.mask_path
        try:
            header = images.read_header(record.path)
            if not findings.strict:
                images.read_image(record.path)
            if mask is not None:
                shape = images.read_header(mask)[:2] if findings.strict else images.read_mask(mask).shape
                images.check_mask_size(mask, shape, record.path)
            return _Seen(record, header.mode, images.largest_value(record.path) if header.is_deep else None)
        except InputError as error:
            return error

    good: list[_Seen] = []
    for seen in images.parallel_map(look, records):
        if isinstance(seen, _Seen):
            good.append(seen)
        elif findings.strict:
            raise seen
        else:
            findings.skipped.append(str(seen))
    depth = _settle_bit_depth(good, bit_depth, findings)
    return [seen.record if seen.largest is None else replace(seen.record, bit_depth=depth) for seen in good]


def _settle_bit_depth(good: Sequence[_Seen], bit_depth: int | None, findings: Findings) -> int:
    """Find how many of 16 bits are in use, and note what does not go together."""
    deep = [(record, value) for record, _, value in good if value is not None]
    if not deep:
        return 16
    largest = max((value for record, value in deep if record.split == "train"), default=0)
    # Where no training image has 16 bits, or all are black, there is nothing to learn it from.
    depth = bit_depth or next((bits for bits in _BIT_DEPTHS if 0 < largest < 2**bits), 16)
    colours = [record.path for record, mode, value in good if value is not None and mode[0] != "I"]
    if colours and depth < 16:
        reason = f"16-bit colours of which {depth} bits are in use, while Pillow reads the upper 8"
        findings.bad(colours[0], f"{reason}; save the images with 8 bits a channel")
        return 16
    top = 2**depth - 1
    reason = "as data.bit_depth says" if bit_depth else "data.bit_depth sets another range"
    held = f"{len(deep)} image(s) hold 16 bits a channel, the largest value in training is {largest}"
    findings.note(f"{held}: read as {depth} bits, 0 to {top} ({reason})")
    for name in sorted({record.class_name for record, _ in deep}):
        own = [(record.path, value) for record, value in deep if record.class_name == name]
        if shallow := sum(seen.record.class_name == name for seen in good) - len(own):
            findings.note(f"class {name!r} mixes bit depths: {len(own)} file(s) of 16 bits, {shallow} of 8")
        # Between neighbouring depths lies a factor of four; brightness alone seldom makes as much.
        if dark := [str(path) for path, value in own if 3 * value < largest]:
            low = f"use less than a third of the values up to {largest}, so bit depths may be mixed"
            findings.note(f"class {name!r}: {len(dark)} of {len(own)} 16-bit image(s) {low}: {some(dark, 1)}")
    if beyond := [str(record.path) for record, value in deep if value > top]:
        findings.note(f"{len(beyond)} image(s) have values above {top}, read as white: {some(beyond, 1)}")
    return depth


def keep_trainable(records: Sequence[ImageRecord], root: Path, findings: Findings) -> list[ImageRecord]:
    """Refuse classes that have test images but no training image.

    Raises:
        InputError: Under strict, there is such a class; always, no class is left.
    """
    trained = {record.class_name for record in records if record.split == "train"}
    if not trained:
        bad = findings.skipped
        hint = f"; left out {len(bad)} bad thing(s), the first: {bad[0]}" if bad else ""
        raise InputError(f"{root}: no class has a training image{hint}")
    orphans = sorted({record.class_name for record in records} - trained - {UNKNOWN_CLASS})
    for name in orphans:
        findings.bad(root, f"class {name!r} has test images but no training image; add normal images")
    return [record for record in records if record.class_name not in orphans]


def some(names: Sequence[str], limit: int = 5) -> str:
    """Join a few names, and say how many more there are.

    >>> some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def named_images(given: Any) -> tuple[Iterator[tuple[str, Any]], bool]:
    """Name images one by one, and say whether their number is known."""
    if isinstance(given, str | os.PathLike):
        path = user_path(Path(given))
        files = images_below(path) if path.is_dir() else [path]
        return ((str(file), file) for file in files), True
    single = isinstance(given, Image.Image | np.ndarray) or hasattr(given, "detach")
    if single and not (hasattr(given, "ndim") and given.ndim == 4):
        return iter([("image 0", given)]), True
    if not isinstance(given, Iterable):
        raise InputError(f"expected images, a path or an iterable of them, found {type(given).__name__}")
    pairs = (
        (str(image) if isinstance(image, str | os.PathLike) else f"image {i}", image)
        for i, image in enumerate(given)
    )
    return pairs, isinstance(given, Sized)


def images_below(folder: Path) -> list[Path]:
    """List the image files of a folder and of those in it, by name; links to folders are followed once."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}")

    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not is_litter(name)]
        files += [Path(place, name) for name in names if is_image(Path(name)) and not is_litter(name)]
    files.sort()
    if not files:
        list_images(folder, Findings(strict=True))
        raise InputError(f"{folder}: expected images, found none")
    return files
