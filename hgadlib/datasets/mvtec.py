"""MVTec AD: 15 classes, CLASS/{train/good, test/TYPE, ground_truth/TYPE/NNN_mask.png}.

Source: Bergmann et al., "MVTec AD: a comprehensive real-world dataset for unsupervised anomaly detection",
    CVPR 2019.
"""

from __future__ import annotations

from pathlib import Path

from hgadlib.datasets.folder import read_class
from hgadlib.datasets.published import MVTEC, compare
from hgadlib.datasets.records import ImageRecord
from hgadlib.datasets.scan import Findings, class_folders


def load(root: Path, findings: Findings) -> list[ImageRecord]:
    """Read the set, whole or in part.

    Args:
        root: Folder that holds the class folders.
        findings: Takes up what is bad, and whether the set is complete.

    Returns:
        Records.

    Raises:
        InputError: Nothing like it lies there, or (under strict) something is bad.
    """
    home, folders = class_folders(root, "train", findings)
    records = [record for folder in folders for record in read_class(folder, folder.name, findings)]
    compare("mvtec", home, records, MVTEC, ("train", "test normal", "test anomalous"), findings)
    return records
