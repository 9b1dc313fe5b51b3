"""anomalib's PaDiM, PatchCore and CFLOW on this library's backbones, from lists of image files.

anomalib is an extra: ``pip install -e .[compare,export]``. Its models get the very weights that
:func:`hgadlib.features.backbone.build_backbone` gives, and nothing is downloaded. All other settings are
anomalib's own, but for what it has no default for: PaDiM keeps so many channels as of its resnet18, whose 448
are about as many as those of two stages here, and how long CFLOW trains is the caller's.

There is one model for all images given. anomalib's models know no classes: who wants one a class calls
`fit` once for each. No image is kept aside, so there is no threshold and scores are as the model makes them.
CFLOW's are relative to the likeliest position of the batch: those of two batches cannot be compared.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from anomalib.models import Cflow, Padim, Patchcore
from anomalib.models.components import AnomalibModule, TimmFeatureExtractor
from anomalib.pre_processing import PreProcessor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import Compose, Normalize, Resize

from hgadlib.features.backbone import build_backbone, create_feature_network

METHODS: dict[str, type[AnomalibModule]] = {"padim": Padim, "patchcore": Patchcore, "cflow": Cflow}
TRAINED = ("cflow",)
"""Those that take epochs; the others see each image once."""
# What anomalib's PaDiM keeps of resnet18's 448 channels.
_PADIM_CHANNELS = 100


class _Files(Dataset[ImageItem]):
    """Images at one size, as anomalib's data modules read them."""

    def __init__(self, files: Sequence[Path | str], image_size: int) -> None:
        self.files, self.resize = list(files), Resize((image_size, image_size), antialias=True)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> ImageItem:
        image = self.resize(read_image(self.files[i], as_tensor=True))
        return ImageItem(image=image, image_path=str(self.files[i]), gt_label=torch.tensor(False))


def create(
    method: str, *, backbone: str, layers: Sequence[int], image_size: int, weights: Path | str | None = None
) -> AnomalibModule:
    """Create a model that has learnt nothing yet, its backbone with our weights.

    Args:
        method: One of `METHODS`.
        backbone: timm's name.
        layers: Stages taken, counted from 0.
        image_size: Pixels a side.
        weights: As of :func:`hgadlib.features.backbone.build_backbone`.
    """
    layers = tuple(layers)
    ours = build_backbone(backbone, out_indices=layers, weights=weights)
    size, own = (image_size, image_size), {}
    transform = Compose([Resize(size, antialias=True), Normalize(list(ours.mean), list(ours.std))])
    if method == "padim":
        own = {"n_features": min(_PADIM_CHANNELS, sum(ours.channels))}
    model: Any = METHODS[method](
        backbone=backbone, layers=list(layers), pre_trained=False, evaluator=False, visualizer=False,
        pre_processor=PreProcessor(transform), **own,
    )  # fmt: skip
    state = create_feature_network(backbone, layers, weights).state_dict()
    extractor = next(part for part in model.modules() if isinstance(part, TimmFeatureExtractor))
    extractor.feature_extractor.load_state_dict(state)
    return model


def fit(
    method: str, files: Sequence[Path | str], *, backbone: str, layers: Sequence[int], image_size: int,
    weights: Path | str | None = None, epochs: int = 1, batch_size: int = 32, num_workers: int = 0,
    seed: int = 0,
) -> AnomalibModule:  # fmt: skip
    """Fit a model on the host to normal images, by anomalib's engine without logs, bars and checkpoints.

    Args:
        method: As of `create`, as are all that follow up to the weights.
        files: Normal images.
        backbone: timm's name.
        layers: Stages taken.
        image_size: Pixels a side.
        weights: Those of the backbone.
        epochs: Passes over them, of those in `TRAINED`.
        batch_size: Images at a time.
        num_workers: Processes that read images; 0 for none but this one.
        seed: Of all that is drawn.
    """
    torch.manual_seed(seed)
    if method == "patchcore":
        _map_large_blocks()
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        model = create(
            method, backbone=backbone, layers=layers, image_size=image_size, weights=weights
        )  # fmt: skip
        images: DataLoader[ImageItem] = DataLoader(
            _Files(files, image_size), batch_size=batch_size, shuffle=True, num_workers=num_workers,
            collate_fn=ImageBatch.collate,
        )  # fmt: skip
        engine = Engine(
            accelerator="cpu", devices=1, max_epochs=epochs, barebones=True, default_root_dir=folder
        )
        engine.fit(model=model, train_dataloaders=images)
    return model.eval()


def save(model: AnomalibModule, folder: Path) -> Path:
    """Write the file that anomalib's own PyTorch inferencer reads; it is a pickle."""
    return model.to_torch(folder)


def load(file: Path | str) -> AnomalibModule:
    """Read a file that `save` wrote: unpickling runs what is in it, so only one of your own."""
    model: AnomalibModule = torch.load(file, map_location="cpu", weights_only=False)["model"]
    return model.eval()


def export(model: AnomalibModule, folder: Path) -> Path:
    """Write anomalib's ONNX file, for images of any size in 0..1, (B, 3, H, W) float32."""
    with _quiet():
        return model.to_onnx(folder)


def predict(
    model: AnomalibModule, files: Sequence[Path | str], batch_size: int = 8
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Score images batch by batch: (B,) and maps (B, S, S); one at a time where sizes in a batch differ."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in range(0, len(files), batch_size):
            images = list(pool.map(_read, files[start : start + batch_size]))
            if len({image.shape for image in images}) == 1:
                yield scores_and_maps(model, torch.stack(images))
            else:
                yield from (scores_and_maps(model, image[None]) for image in images)


def scores_and_maps(model: AnomalibModule, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Score images (B, 3, H, W) in 0..1: (B,) and maps (B, S, S). The model resizes them itself."""
    with torch.inference_mode():
        found = model(images)
    # CFLOW's maps have no axis of channels.
    return found.pred_score.flatten().numpy(), found.anomaly_map.flatten(0, -3).numpy()


def _read(file: Path | str) -> Tensor:
    return read_image(file, as_tensor=True)


def _map_large_blocks() -> None:
    """Take blocks from 4 MiB on from the system, and give them back at once, where the C library is glibc.

    Each step of PatchCore's sampling keeps a few bytes inside the hole that its distances of up to 32 MiB
    leave in glibc's heap, so that the next ones do not fit there: 96 images took more than 14 GiB.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 4 * 2**20)  # M_MMAP_THRESHOLD


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what anomalib and Lightning say of their own work; errors still come through."""
    before, output = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(output), contextlib.redirect_stderr(output),
            warnings.catch_warnings(action="ignore"),
        ):  # fmt: skip
            yield
    finally:
        logging.disable(before)
