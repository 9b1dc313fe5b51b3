"""BTAD: three products, {01,02,03}/{train/ok, test/{ok,ko}, ground_truth/ko}.

Source: Mishra et al., "VT-ADL: a vision transformer network for image anomaly detection and localization",
    2021.
"""

from __future__ import annotations

from pathlib import Path

from hgadlib.datasets.folder import read_class
from hgadlib.datasets.published import BTAD, compare
from hgadlib.datasets.records import ImageRecord
from hgadlib.datasets.scan import Findings, class_folders


def load(root: Path, findings: Findings) -> list[ImageRecord]:
    """Read the set; the archive's own folder BTech_Dataset_transformed may lie between.

    Args:
        root: Folder that holds 01, 02 and 03.
        findings: Takes up what is bad, and whether the set is complete.

    Returns:
        Records; the defect type of all anomalous images is "ko".

    Raises:
        InputError: Nothing like it lies there, or (under strict) something is bad.
    """
    home, folders = class_folders(root, "train", findings)
    records = [
        record for folder in folders for record in read_class(folder, folder.name, findings, good=("ok",))
    ]
    compare("btad", home, records, BTAD, ("train", "test normal", "test anomalous"), findings)
    return records
