"""One test image at a time: its map, mask, score and latents under a chosen criterion and threshold.

A plain core without widgets: a state goes in, arrays come out. Level values of the whole test set stay in
memory, so that a change costs the maps of one image, and once those of its class for the range of scores.
:mod:`hgadlib.explorer_app` puts widgets on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from hgadlib.config import Config, run_dir
from hgadlib.errors import InputError
from hgadlib.evaluation import class_normalisation, level_values, map_batches
from hgadlib.experiment import evaluate_model, headline, train_model
from hgadlib.images import load_masks, read_image, resize_image
from hgadlib.inputs import Inputs, image_name, prepare
from hgadlib.mixture import HierarchicalGaussianMixture
from hgadlib.model import HGAD
from hgadlib.run_files import read_config
from hgadlib.runs import RunDirectory
from hgadlib.scoring import Criterion, LevelValues, Normalisation, anomaly_maps, image_scores
from hgadlib.training import spread_sample

Projection = Literal["lda", "pca"]

# Training images of each class, and positions of each, that the picture of the latents is made of.
_IMAGES, _POSITIONS = 8, 24


@dataclass(frozen=True)
class State:
    """What is looked at.

    Attributes:
        class_name: One of :attr:`Explorer.classes`.
        index: Of the image in the test set; one of that class.
        criterion: "likelihood", "entropy" or "both".
        threshold: A map's pixel, and an image, is called anomalous from this score on.
        projection: How latents are brought to two dimensions.
    """

    class_name: str
    index: int
    criterion: Criterion
    threshold: float
    projection: Projection = "lda"


@dataclass(frozen=True)
class View:
    """What there is to see in one state; S is the side of the maps.

    Attributes:
        state: What was asked for.
        name: The image's path below the dataset's root.
        image: (S, S, 3) uint8.
        anomaly_map: (S, S) float32; higher is more anomalous.
        mask: True where anomalous, (S, S) bool; None where nobody drew one.
        flagged: Where the map reaches the threshold, (S, S) bool.
        score: Of the image.
        verdict: "anomalous" where the score reaches the threshold, else "normal".
        truth: "anomalous", "normal" or "unlabelled", and the kind of defect.
        scores: Of all test images of the class under this criterion, (n,).
        truths: "anomalous", "normal" or "unlabelled" for each of them.
        positions: The image's positions at the deepest level in two dimensions, (h * w, 2).
        flagged_positions: Those under flagged pixels, (h * w,) bool.
    """

    state: State
    name: str
    image: np.ndarray
    anomaly_map: np.ndarray
    mask: np.ndarray | None
    flagged: np.ndarray
    score: float
    verdict: str
    truth: str
    scores: np.ndarray
    truths: list[str]
    positions: np.ndarray
    flagged_positions: np.ndarray


@dataclass(frozen=True)
class LatentPlane:
    """Latents of normal training positions at the deepest level, in two dimensions.

    Attributes:
        points: (N, 2).
        class_idx: (N,).
        centers: Main class centres, (K, 2); None for a prior without classes.
        project: The fitted map from (n, D) to (n, 2).
    """

    points: np.ndarray
    class_idx: np.ndarray
    centers: np.ndarray | None
    project: Any


class Explorer:
    """A run's test set, ready to be looked at.

    Args:
        config: Of the run.
        inputs: Of the run.
        model: Trained on them.
        values: Level values of the test images.
        source: Where the model comes from, for a reader.
    """

    def __init__(
        self, config: Config, inputs: Inputs, model: HGAD, values: LevelValues, *, source: str = ""
    ) -> None:
        self.config, self.inputs, self.model, self.values, self.source = config, inputs, model, values, source
        self.classes = tuple(inputs.dataset.classes[k] for k in np.unique(inputs.test_classes))
        self.criteria: tuple[Criterion, ...] = (
            ("likelihood", "entropy", "both") if model.has_entropy else ("likelihood",)
        )
        # A linear discriminant of K classes has K - 1 directions.
        self.projections: tuple[Projection, ...] = ("lda", "pca") if len(model.classes) > 2 else ("pca",)
        self._classes, self._truths = inputs.test_classes, [_truth(r) for r in inputs.dataset.test]
        # Bound to this object: what is kept goes with it.
        self.constants = lru_cache(maxsize=None)(self._constants)
        self.class_scores = lru_cache(maxsize=None)(self._class_scores)
        self.plane = lru_cache(maxsize=None)(self._plane)
        self._picture = lru_cache(maxsize=256)(self._load)
        self._positions = lru_cache(maxsize=256)(self._project)

    def images(self, class_name: str) -> list[tuple[str, int]]:
        """List a class's test images: name and index, the highest score under the run's criterion first."""
        members = self._members(class_name)
        order = np.argsort(-self.class_scores(class_name, headline(self.config).criterion), kind="stable")
        test = self.inputs.dataset.test
        return [(f"{test[i].defect_type}/{test[i].path.name}", int(i)) for i in members[order]]

    def truths(self, class_name: str) -> list[str]:
        """Say of each of a class's test images "normal", "anomalous" or "unlabelled"."""
        return [self._truths[i] for i in self._members(class_name)]

    def first(self) -> State:
        """Give the state to begin with: the run's criterion, the first class's most anomalous image."""
        name, criterion = self.classes[0], headline(self.config).criterion
        index = self.images(name)[0][1]
        return State(name, index, criterion, self.threshold(name, criterion), self.projections[0])

    def threshold(self, class_name: str, criterion: Criterion) -> float:
        """Give a threshold to begin with: of largest F1 on the class's test images.

        It is chosen with the labels of the images it is tried on: good to look at, no estimate. Without
        anomalous and normal images it is the score that one image in twenty exceeds.
        """
        scores = self.class_scores(class_name, criterion)
        truths = np.array(self.truths(class_name))
        anomalous, normal = scores[truths == "anomalous"], scores[truths == "normal"]
        if not len(anomalous) or not len(normal):
            return float(np.quantile(scores, 0.95))
        steps = np.unique(np.concatenate([anomalous, normal]))
        hits, alarms = ((group[None] >= steps[:, None]).sum(1) for group in (anomalous, normal))
        best = int(np.argmax(2 * hits / (hits + alarms + len(anomalous))))
        # Between two scores, so that neither lies on it.
        return float((steps[best] + steps[max(best - 1, 0)]) / 2)

    def limits(self, class_name: str, criterion: Criterion) -> tuple[float, float]:
        """Give the smallest and the largest threshold of use: positive, around all scores of the class."""
        scores = self.class_scores(class_name, criterion)
        high = max(float(scores.max()) * 1.1, 1e-9)
        return float(np.clip(scores.min() / 4, high / 1e4, high / 2)), high

    def view(self, state: State) -> View:
        """Compute all that one state shows.

        Raises:
            InputError: No such class, image, criterion or projection in this run.
        """
        self._check(state)
        size, k = self.config.score.map_size, self.inputs.dataset.classes.index(state.class_name)
        anomaly_map = anomaly_maps(
            self.values[slice(state.index, state.index + 1)],
            self.constants(k),
            size=size,
            sigma=self.config.score.sigma,
            criterion=state.criterion,
        )
        score = float(image_scores(anomaly_map)[0])
        flagged = anomaly_map >= state.threshold
        grid = self.model.grids[-1]
        image, mask = self._picture(state.index)
        record = self.inputs.dataset.test[state.index]
        return View(
            state,
            image_name(self.inputs.dataset, record),
            image,
            anomaly_map[0].numpy(),
            mask,
            flagged[0].numpy(),
            score,
            "anomalous" if score >= state.threshold else "normal",
            f"{self._truths[state.index]}, {record.defect_type}"
            if record.is_anomalous
            else self._truths[state.index],
            self.class_scores(state.class_name, state.criterion),
            self.truths(state.class_name),
            self._positions(state.index, state.projection),
            F.adaptive_max_pool2d(flagged[None].float(), grid)[0, 0].bool().flatten().numpy(),
        )

    def _check(self, state: State) -> None:
        for what, found, known in (
            ("class", state.class_name, self.classes),
            ("criterion", state.criterion, self.criteria),
            ("projection", state.projection, self.projections),
        ):
            if found not in known:
                raise InputError(f"{what}: expected one of {', '.join(known)}, found {found!r}")
        if state.index not in self._members(state.class_name):
            raise InputError(f"image {state.index} is no test image of {state.class_name}; see images()")

    def _members(self, class_name: str) -> np.ndarray:
        return np.flatnonzero(self._classes == self.inputs.dataset.classes.index(class_name))

    def _constants(self, k: int) -> Normalisation:
        mine = self.values[torch.from_numpy(np.flatnonzero(self._classes == k))]
        score = self.config.score
        return class_normalisation(self.model, mine, k, score.normalisation, score.map_size)

    def _class_scores(self, class_name: str, criterion: Criterion) -> np.ndarray:
        mine = self.values[torch.from_numpy(self._members(class_name))]
        constants = self.constants(self.inputs.dataset.classes.index(class_name))
        batches = map_batches(mine, constants, self.config.score, criterion)
        return torch.cat([image_scores(maps) for _, maps in batches]).numpy()

    def _load(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        record, size, resize = (
            self.inputs.dataset.test[index],
            self.config.score.map_size,
            self.config.data.resize,
        )
        image = resize_image(read_image(record.path), size, resize)
        drawn = record.mask_path is not None or (record.is_labelled and not record.is_anomalous)
        return image, load_masks([record], size=size, resize=resize)[0] if drawn else None

    @torch.inference_mode()
    def _latents(self, features: Any, index: torch.Tensor) -> np.ndarray:
        """Deepest level's latents of some images: (B, h * w, D)."""
        # Only the level that is drawn is fetched.
        level = features.levels[-1][index.to(features.levels[-1].device)].to(self.model.device).float()
        z: np.ndarray = self.model.levels[-1][0](level)[0].cpu().numpy()
        return z

    def _plane(self, projection: Projection) -> LatentPlane:
        labels = self.inputs.train_classes
        sample = spread_sample(labels, len(self.model.classes), _IMAGES)
        z = self._latents(self.inputs.train, sample)
        chosen = np.random.default_rng(0).permuted(np.tile(np.arange(z.shape[1]), (len(z), 1)), axis=1)[
            :, :_POSITIONS
        ]
        z = np.take_along_axis(z, chosen[..., None], axis=1)
        class_idx = np.repeat(labels[sample.numpy()], z.shape[1])
        flat = z.reshape(len(class_idx), -1)
        # Shrinkage: the deepest level has hundreds of channels.
        project = (
            LinearDiscriminantAnalysis(n_components=2, solver="eigen", shrinkage="auto").fit(flat, class_idx)
            if projection == "lda"
            else PCA(2, svd_solver="covariance_eigh").fit(flat)
        )
        prior = self.model.levels[-1][1]
        centers = None
        if isinstance(prior, HierarchicalGaussianMixture):
            centers = project.transform(prior.centers.detach().cpu().numpy())
        return LatentPlane(project.transform(flat), class_idx, centers, project)

    def _project(self, index: int, projection: Projection) -> np.ndarray:
        z = self._latents(self.inputs.test, torch.tensor([index]))[0]
        positions: np.ndarray = self.plane(projection).project.transform(z)
        return positions


def open_explorer(config: Config, *, progress: bool = True) -> Explorer:
    """Load the finished run of this dataset, experiment and seed, or train the configuration given.

    A finished run keeps its own settings, whatever else is asked for here. Where there is none, the
    configuration is trained in a folder of its own, runs/DATASET/explore, so that it takes no run's place.

    Raises:
        InputError: The run is of other images than those found now.
    """
    stored = run_dir(config)
    if (stored / "metrics.json").is_file() and (stored / "model.safetensors").is_file():
        here = config
        config = read_config(stored)
        config = replace(
            config, device=here.device, data=replace(config.data, root=here.data.root or config.data.root)
        )
        inputs = prepare(config, progress=progress)
        seen = json.loads((stored / "data.json").read_text(encoding="utf-8"))["digest"]
        if seen != inputs.identity()["digest"]:
            raise InputError(
                f"{stored}: expected the images that it was trained on, found others; name its data_root"
            )
        model = HGAD.load(stored / "model.safetensors", inputs.device)
        values = level_values(model, inputs.test, inputs.test_classes)
        return Explorer(config, inputs, model, values, source=f"{_short(stored)}, found finished")
    if config.run_dir is None:
        own = f"{stored.name}-{config.digest[:8]}"
        config = replace(config, run_dir=str(stored.parents[1] / "explore" / own))
    run = RunDirectory.open(config)
    inputs = prepare(config, progress=progress)
    model = train_model(config, inputs, run, progress=progress)
    result = evaluate_model(config, inputs, model, run)
    return Explorer(config, inputs, model, result.values, source=f"{_short(run.path)}, a small run")


def _short(path: Path) -> str:
    return "/".join(path.parts[-4:])


def _truth(record: Any) -> str:
    return "unlabelled" if not record.is_labelled else "anomalous" if record.is_anomalous else "normal"
