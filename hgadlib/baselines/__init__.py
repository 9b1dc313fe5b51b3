"""HGAD and the methods that it is compared with, behind one face: the same features, the same evaluation."""

from __future__ import annotations

from hgadlib.baselines.draem import DRAEM
from hgadlib.baselines.neighbours import Neighbours
from hgadlib.baselines.omnial import OmniAL
from hgadlib.baselines.padim import PaDiM
from hgadlib.baselines.patchcore import PatchCore
from hgadlib.baselines.pmad import PMAD
from hgadlib.baselines.stfpm import STFPM
from hgadlib.baselines.uniad import UniAD
from hgadlib.method import Method
from hgadlib.model import HGAD

METHODS: dict[str, type[Method]] = {
    "hgad": HGAD,
    "neighbours": Neighbours,
    "padim": PaDiM,
    "patchcore": PatchCore,
    "uniad": UniAD,
    "stfpm": STFPM,
    "draem": DRAEM,
    "omnial": OmniAL,
    "pmad": PMAD,
}
"""The model of each value that the setting ``method`` may have."""
