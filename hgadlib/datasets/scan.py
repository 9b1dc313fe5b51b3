"""Look at folders the same way everywhere: sorted, links followed with care, nothing lost in silence."""

from __future__ import annotations

import errno
import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hgadlib.datasets.images import check_mask_size, parallel_map, read_header, read_image, read_mask
from hgadlib.datasets.records import UNKNOWN_CLASS, ImageRecord
from hgadlib.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
# Left behind by operating systems and archivers; no one means them as data.
_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


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


def list_folder(folder: Path, findings: Findings) -> tuple[list[Path], list[Path]]:
    """List the folders and the files of a folder, sorted by name, hidden entries left out.

    Raises:
        InputError: The folder does not exist, or (under strict) it or a link in it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except PermissionError:
        findings.bad(folder, "permission denied; make the folder readable")
        return [], []
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no such folder") from error
    except NotADirectoryError as error:
        raise InputError(f"{folder}: expected a folder, found a file") from error
    except OSError as error:
        reason = "symbolic link loop" if error.errno == errno.ELOOP else str(error.strerror)
        raise InputError(f"{folder}: {reason}") from error
    folders: list[Path] = []
    files: list[Path] = []
    for entry in found:
        if entry.name.startswith(".") or entry.name.lower() in _LITTER:
            continue
        is_folder, problem = _follow(entry, folder)
        if problem is not None:
            findings.bad(Path(entry.path), problem)
        else:
            (folders if is_folder else files).append(Path(entry.path))
    return folders, files


def is_image(path: Path) -> bool:
    """Check whether the name ends like an image's; the content is looked at later."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def list_images(folder: Path, findings: Findings) -> list[Path]:
    """List the images of a folder that should hold nothing else.

    Other files are noted and folders are bad, for what lies in them would be lost.
    """
    folders, files = list_folder(folder, findings)
    for inner in folders:
        findings.bad(inner, f"unexpected folder: {folder.name} should hold images only; move its images up")
    others = [path.name for path in files if not is_image(path)]
    if others:
        findings.note(f"{folder}: {len(others)} file(s) that are no images were ignored: {some(others)}")
    return [path for path in files if is_image(path)]


def check_unique_names(folders: Sequence[Path], findings: Findings) -> list[Path]:
    """Refuse classes whose names are the same but for case or Unicode form; unless strict, keep the first.

    Some file systems keep them apart and some do not; a run directory must hold both.
    """
    seen: dict[str, Path] = {}
    for folder in folders:
        key = unicodedata.normalize("NFC", folder.name).casefold()
        if key in seen:
            names = f"{folder.name!r} and {seen[key].name!r}"
            findings.bad(folder, f"two classes of the same name: {names}; rename one")
        else:
            seen[key] = folder
    return list(seen.values())


def holds(folder: Path, marker: str, what: str, expected: Mapping[str, object]) -> bool:
    """Check whether a folder holds the very set that its marker file should describe; False if it is empty.

    Raises:
        InputError: It holds something else, or another version of the set.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder, found a file; give another folder")
    if not any(folder.iterdir()):
        return False
    try:
        found = dict(json.loads((folder / marker).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder}: expected {what}, found other files; give another folder") from error
    if differs := sorted(key for key, value in expected.items() if found.get(key) != value):
        raise InputError(
            f"{folder}: holds {what} that differs in {', '.join(differs)}; remove it or give another folder"
        )
    return True


def verify(records: Sequence[ImageRecord], findings: Findings) -> list[ImageRecord]:
    """Look at every image and mask before hours are spent on them.

    Under strict the headers are read: cheap, and enough to find empty files, text named .png and masks of
    another size; what is damaged further in is found on decoding. Otherwise all is decoded here, in parallel,
    so that bad images can be left out.

    Returns:
        The good records, in order.

    Raises:
        InputError: Under strict, for the first bad image or mask.
    """

    def problem(record: ImageRecord) -> InputError | None:
        mask = record.mask_path
        try:
            (read_header if findings.strict else read_image)(record.path)
            if mask is not None:
                shape = read_header(mask)[:2] if findings.strict else read_mask(mask).shape
                check_mask_size(mask, shape, record.path)
        except InputError as error:
            return error
        return None

    good: list[ImageRecord] = []
    for record, error in zip(records, parallel_map(problem, records), strict=True):
        if error is None:
            good.append(record)
        elif findings.strict:
            raise error
        else:
            findings.skipped.append(str(error))
    return good


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
