"""Widgets over :mod:`hgadbook.explore`: choose class, image, criterion, threshold, projection; look."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.ndimage import binary_dilation
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from hgadlib.config import Config, run_dir
from hgadlib.datasets.images import load_masks, read_image, resize_image
from hgadlib.errors import InputError
from hgadlib.evaluation.evaluate import class_normalisation, level_values, map_batches
from hgadlib.features.store import spread_sample
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, PALETTE, class_colors
from hgadlib.mixture import HierarchicalGaussianMixture
from hgadlib.model import HGAD
from hgadlib.runs.directory import RunDirectory, read_config
from hgadlib.runs.experiment import finish_run, train_model
from hgadlib.runs.inputs import Inputs, image_name, prepare
from hgadlib.scoring import Criterion, LevelValues, Normalisation, anomaly_maps, image_scores

_MARKERS = "o^sDvP*X"


def latent_scatter(
    z2d: ArrayLike,
    class_idx: ArrayLike,
    centers2d: ArrayLike | None = None,
    *,
    classes: Sequence[str] | None = None,
    axis_labels: tuple[str, str] = ("latent direction 1 (no unit)", "latent direction 2 (no unit)"),
    ax: Axes | None = None,
) -> Axes:
    """Draw latent positions in two dimensions, coloured by class, with the class centres as crosses.

    Args:
        z2d: Positions, (N, 2).
        class_idx: Class of each, (N,) int.
        centers2d: Class centres, (K, 2).
        classes: Class names, (K,); "class 0" and so on if not given.
        axis_labels: What the two axes are.
        ax: Where to draw; a new figure if not given.

    Raises:
        InputError: Shapes disagree, or a class has no name.
    """
    z2d, class_idx = np.asarray(z2d, dtype=float), np.asarray(class_idx)
    if z2d.ndim != 2 or z2d.shape[1] != 2 or class_idx.shape != z2d.shape[:1] or not len(z2d):
        raise InputError(
            f"expected positions (N, 2) and classes (N,), found {z2d.shape} and {class_idx.shape}"
        )
    classes = [f"class {k}" for k in range(int(class_idx.max()) + 1)] if classes is None else list(classes)
    if class_idx.min() < 0 or class_idx.max() >= len(classes):
        raise InputError(
            f"expected classes 0 to {len(classes) - 1}, found {class_idx.min()} to {class_idx.max()}"
        )
    # The legend stands beside the square; it grows by columns of 15 names.
    legend_columns = math.ceil(len(classes) / 15)
    width = 4.2 + legend_columns * (0.5 + 0.08 * max(map(len, classes)))
    ax = plt.subplots(figsize=(width, 4.0))[1] if ax is None else ax
    colors = class_colors(classes)
    halo = [effects.withStroke(linewidth=4, foreground="white")]
    for k, name in enumerate(classes):
        mine = z2d[class_idx == k]
        marker = _MARKERS[sorted(classes).index(name) // len(PALETTE) % len(_MARKERS)]
        ax.scatter(
            mine[:, 0],
            mine[:, 1],
            s=14,
            marker=marker,
            color=colors[name],
            alpha=0.55,
            linewidths=0,
            label=name,
        )
    if centers2d is not None:
        centers = np.asarray(centers2d, dtype=float)
        if centers.shape != (len(classes), 2):
            raise InputError(
                f"expected a centre (2,) for each of {len(classes)} classes, found {centers.shape}"
            )
        edge = [colors[name] for name in classes]
        ax.scatter(
            centers[:, 0],
            centers[:, 1],
            s=150 if len(classes) <= 12 else 60,
            marker="X",
            c=edge,
            edgecolors="black",
            linewidths=1.2,
            path_effects=halo,
        )
    ax.set_xlabel(axis_labels[0])
    ax.set_ylabel(axis_labels[1])
    ax.set_aspect("equal", adjustable="datalim")
    ax.locator_params(nbins=6)
    legend = ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=legend_columns, markerscale=1.8)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return ax


KINDS = {"normal": NORMAL_COLOR, "anomalous": ANOMALOUS_COLOR, "unlabelled": "0.5"}
_DASHED: dict[str, Any] = {"color": "0.2", "linestyle": (0, (4, 3)), "linewidth": 1.2}
_PANELS = ("image", "anomaly map (score, no unit)", "true mask", "at or above the threshold")


class ImageView:
    """A figure that is made once and then shows one image after the other, fast enough to follow a slider.

    Above, an image, its map, its true mask and the mask at a threshold; below, latents and scores. What never
    changes is drawn once and kept as pixels; places are fixed, since solving a layout takes longer than all
    the rest.

    Args:
        points: Normal latents in two dimensions, (N, 2).
        class_idx: Their classes, (N,).
        classes: Names, (K,).
        centers: Class centres, (K, 2); None where there are none.
        axis_labels: Of the latents' two directions.
        dpi: Of :meth:`png`.

    Attributes:
        figure: The figure, for a page.
    """

    def __init__(
        self,
        points: ArrayLike,
        class_idx: ArrayLike,
        classes: Sequence[str],
        centers: ArrayLike | None = None,
        *,
        axis_labels: tuple[str, str] = ("latent direction 1 (no unit)", "latent direction 2 (no unit)"),
        dpi: float = 100,
    ) -> None:
        self.classes, self.colors = list(classes), class_colors(classes)
        self.figure = Figure(figsize=(11, 6.1), dpi=dpi)
        self.figure.set_layout_engine("none")
        self.canvas = FigureCanvasAgg(self.figure)
        self._title = self.figure.text(0.055, 0.985, "", ha="left", va="top", fontsize=11)
        blank = np.zeros((2, 2, 3))
        panels = [self.figure.add_axes((0.055 + 0.24 * i, 0.5, 0.2, 0.36)) for i in range(4)]
        for ax, name in zip(panels, _PANELS, strict=True):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_title(name, loc="left")
        self._images = [ax.imshow(blank, extent=(0, 1, 0, 1), vmin=0, vmax=1) for ax in panels]
        self._images[1].set_cmap("inferno")
        self._nothing = panels[2].text(0.5, 0.5, "nobody drew one", ha="center", va="center")
        self._bar = self.figure.add_axes((0.495, 0.5, 0.008, 0.36))
        self._bar.yaxis.set_label_position("right")
        latents = self.figure.add_axes((0.055, 0.085, 0.42, 0.32))
        self._own = [
            latents.scatter([], [], s=24, edgecolors="black", linewidths=0.9, zorder=4) for _ in "ab"
        ]
        self._own[1].set_facecolor(ANOMALOUS_COLOR)
        _draw_latents(latents, points, class_idx, self.classes, centers, self._own[1], axis_labels)
        self._scores = self.figure.add_axes((0.72, 0.085, 0.265, 0.32))
        self._lines = (self._scores.axvline(1, **_DASHED), self._scores.axvline(1, color="black"))
        self._of_class: tuple[Any, ...] = ()
        # Pixels under what changes: with each projection, and with each class and criterion.
        self._fixed: Any = None
        self._ground: Any = None

    def show(
        self,
        image: NDArray[np.uint8],
        anomaly_map: ArrayLike,
        mask: ArrayLike | None,
        flagged: ArrayLike,
        *,
        title: str,
        class_name: str,
        positions: ArrayLike,
        flagged_positions: ArrayLike,
        scores: ArrayLike,
        kinds: Sequence[str],
        score: float,
        threshold: float,
        limits: tuple[float, float],
    ) -> Figure:
        """Show one image.

        Args:
            image: RGB, (S, S, 3) uint8.
            anomaly_map: (S, S); higher is more anomalous.
            mask: True where anomalous, (S, S) bool; None where nobody drew one.
            flagged: Where the map reaches the threshold, (S, S) bool.
            title: Of the whole.
            class_name: The image's class.
            positions: This image's latents in two dimensions, (P, 2).
            flagged_positions: Those under flagged pixels, (P,) bool.
            scores: Of the class's test images, (n,).
            kinds: "normal", "anomalous" or "unlabelled" for each of them.
            score: Of this image.
            threshold: In the scores' scale.
            limits: Positive scores at the two ends of the scores' axis; the upper one ends the map's colours.
        """
        flagged, drawn = (
            np.asarray(flagged, dtype=bool),
            None if mask is None else np.asarray(mask, dtype=bool),
        )
        grey = np.repeat(image.mean(-1, keepdims=True), 3, axis=-1) / 255
        tinted = np.where(flagged[..., None], 0.35 * grey + 0.65 * np.array(to_rgb(ANOMALOUS_COLOR)), grey)
        if drawn is not None:
            # White within black shows on any image.
            inner = binary_dilation(drawn, iterations=2)
            tinted[binary_dilation(inner) & ~inner], tinted[inner & ~drawn] = 0, 1
        self._title.set_text(title)
        blank = np.full((2, 2, 3), 0.93)
        shown = (
            image,
            np.asarray(anomaly_map),
            blank if drawn is None else drawn[..., None] * np.ones(3),
            tinted,
        )
        for artist, pixels in zip(self._images, shown, strict=True):
            artist.set_data(pixels)
        self._images[1].set_clim(0, limits[1])
        self._nothing.set_text("nobody drew one" if drawn is None else "")
        found, where = np.asarray(flagged_positions, dtype=bool), np.asarray(positions, dtype=float)
        for dots, chosen in zip(self._own, (~found, found), strict=True):
            dots.set_offsets(where[chosen])
        self._own[0].set_facecolor(self.colors[class_name])
        of_class = (np.asarray(scores).tobytes(), tuple(kinds), limits)
        if of_class != self._of_class:
            self._of_class, self._ground = of_class, None
            _draw_bar(self._bar, limits[1])
            _draw_scores(self._scores, scores, kinds, limits)
            self._lines = (self._scores.axvline(1, **_DASHED), self._scores.axvline(1, color="black"))
        for line, value in zip(self._lines, (threshold, score), strict=True):
            line.set_xdata([value, value])
        return self.figure

    def png(self) -> bytes:
        """Give what is shown as the bytes of a PNG."""
        changing = [self._title, *self._images, self._nothing, *self._own, *self._lines]
        if self._fixed is None:
            with _hidden(changing), _hidden([self._bar, self._scores]):
                self.canvas.draw()
            self._fixed = self.canvas.copy_from_bbox(self.figure.bbox)
        if self._ground is None:
            self.canvas.restore_region(self._fixed)
            with _hidden(changing):
                for ax in (self._bar, self._scores):
                    self.figure.draw_artist(ax)
            self._ground = self.canvas.copy_from_bbox(self.figure.bbox)
        self.canvas.restore_region(self._ground)
        for artist in changing:
            self.figure.draw_artist(artist)
        buffer = io.BytesIO()
        pixels = np.asarray(self.canvas.buffer_rgba())[..., :3]
        Image.fromarray(pixels).save(buffer, "png", compress_level=1)
        return buffer.getvalue()

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        # A notebook shows it at its size in inches, however many pixels that has.
        return self.png(), {"width": round(100 * self.figure.get_figwidth())}


@contextlib.contextmanager
def _hidden(artists: Sequence[Artist]) -> Iterator[None]:
    for artist in artists:
        artist.set_visible(False)
    try:
        yield
    finally:
        for artist in artists:
            artist.set_visible(True)


def _draw_bar(ax: Axes, top: float) -> None:
    """Draw the scale of the map's colours, from 0."""
    ax.clear()
    ax.imshow(np.linspace(1, 0, 64)[:, None], cmap="inferno", aspect="auto", extent=(0, 1, 0, top))
    ax.set(xticks=[], ylim=(0, top))
    ax.yaxis.tick_right()
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.tick_params(labelsize=7, length=2)
    ax.spines[:].set_visible(False)


def _draw_latents(
    ax: Axes,
    points: ArrayLike,
    class_idx: ArrayLike,
    classes: Sequence[str],
    centers: ArrayLike | None,
    flagged: Artist,
    axis_labels: tuple[str, str],
) -> None:
    """Draw the normal latents of all classes and the class centres."""
    points, class_idx, colors = np.asarray(points), np.asarray(class_idx), class_colors(classes)
    handles: list[Artist] = [
        ax.scatter(
            points[class_idx == k, 0],
            points[class_idx == k, 1],
            s=6,
            color=colors[name],
            alpha=0.45,
            linewidths=0,
            label=name,
        )
        for k, name in enumerate(classes)
    ]
    if centers is not None:
        x, y = np.asarray(centers).T
        ax.scatter(
            x, y, s=90, marker="X", c=[colors[name] for name in classes],
            edgecolors="black", linewidths=1.0, zorder=3,
        )  # fmt: skip
    # Anomalous latents may lie far out: they must not squeeze the classes into a corner.
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    margin = 0.4 * (high - low)
    ax.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    ax.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    ax.set_title(
        "latents at the deepest level: training positions, centres (crosses), this image (rings)", loc="left"
    )
    legend = ax.legend(
        [*handles, flagged],
        [*classes, "this image, flagged"],
        loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, markerscale=1.6,
        ncols=1 + len(classes) // 12,
    )  # fmt: skip
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _draw_scores(
    ax: Axes,
    scores: ArrayLike,
    kinds: Sequence[str],
    limits: tuple[float, float],
) -> None:
    """Draw the class's scores as dots, a row for each thing that the images are."""
    ax.clear()
    scores, present = np.asarray(scores), [kind for kind in KINDS if kind in kinds]
    spread = np.random.default_rng(0).uniform(-0.22, 0.22, len(scores))
    for row, kind in enumerate(present):
        mine = np.array([found == kind for found in kinds])
        ax.scatter(scores[mine], row + spread[mine], s=16, color=KINDS[kind], alpha=0.6, linewidths=0)
    ax.set(xscale="log", xlim=limits, ylim=(-0.6, len(present) - 0.4), yticks=range(len(present)))
    ax.set_yticklabels(present)
    # Few ticks: a logarithmic axis of less than a decade would label every step.
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if limits[1] < 50 * limits[0] else (1.0,)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("image score; dashed: threshold, line: this image")
    ax.set_title("scores of the class's test images", loc="left")


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
        order = np.argsort(-self.class_scores(class_name, self.config.criterion), kind="stable")
        test = self.inputs.dataset.test
        return [(f"{test[i].defect_type}/{test[i].path.name}", int(i)) for i in members[order]]

    def truths(self, class_name: str) -> list[str]:
        """Say of each of a class's test images "normal", "anomalous" or "unlabelled"."""
        return [self._truths[i] for i in self._members(class_name)]

    def first(self) -> State:
        """Give the state to begin with: the run's criterion, the first class's most anomalous image."""
        name, criterion = self.classes[0], self.config.criterion
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
    result = finish_run(config, inputs, model, run)
    return Explorer(config, inputs, model, result.values, source=f"{_short(run.path)}, a small run")


def _short(path: Path) -> str:
    return "/".join(path.parts[-4:])


def _truth(record: Any) -> str:
    return "unlabelled" if not record.is_labelled else "anomalous" if record.is_anomalous else "normal"


CRITERIA = {"likelihood": "likelihood", "entropy": "entropy", "both": "both: their product"}
PROJECTIONS = {"lda": "LDA: classes apart", "pca": "PCA: most variance"}


def describe(view: View) -> str:
    """Say in a line what the model says of an image, and what it is."""
    relation = "at or above" if view.verdict == "anomalous" else "below"
    return (
        f"score {view.score:.4g}, {relation} the threshold {view.state.threshold:.4g}: "
        f"called {view.verdict}; it is {view.truth}"
    )


class Painter:
    """Draws the views of an explorer, one figure for each projection of the latents."""

    def __init__(self, explorer: Explorer, *, dpi: int = 100) -> None:
        self.explorer, self.dpi = explorer, dpi
        self._figures: dict[Projection, ImageView] = {}

    def draw(self, view: View) -> ImageView:
        """Bring a view into the figure of its projection."""
        state = view.state
        if state.projection not in self._figures:
            plane = self.explorer.plane(state.projection)
            name = state.projection.upper()
            self._figures[state.projection] = ImageView(
                plane.points,
                plane.class_idx,
                self.explorer.model.classes,
                plane.centers,
                axis_labels=(f"{name} direction 1 (no unit)", f"{name} direction 2 (no unit)"),
                dpi=self.dpi,
            )
        figure = self._figures[state.projection]
        figure.show(
            view.image,
            view.anomaly_map,
            view.mask,
            view.flagged,
            title=f"{view.name}, {CRITERIA[state.criterion]}\n{describe(view)}",
            class_name=state.class_name,
            positions=view.positions,
            flagged_positions=view.flagged_positions,
            scores=view.scores,
            kinds=view.truths,
            score=view.score,
            threshold=state.threshold,
            limits=self.explorer.limits(state.class_name, state.criterion),
        )
        return figure


def draw(explorer: Explorer, state: State) -> ImageView:
    """Draw one state, for a page."""
    return Painter(explorer, dpi=200).draw(explorer.view(state))


class ExplorerApp:
    """Widgets that show one state of an explorer and change it.

    Attributes:
        box: To be displayed.
        state: What is shown.
    """

    def __init__(self, explorer: Explorer) -> None:
        # Here, so that the library needs no widgets.
        import ipywidgets

        self.explorer, self.state = explorer, explorer.first()
        wide = {"style": {"description_width": "5.5em"}, "layout": ipywidgets.Layout(width="24em")}
        self.class_name = ipywidgets.Dropdown(options=explorer.classes, description="class", **wide)
        self.image = ipywidgets.Dropdown(description="image", **wide)
        self.criterion = ipywidgets.Dropdown(
            options=[(CRITERIA[c], c) for c in explorer.criteria], description="criterion", **wide
        )
        self.projection = ipywidgets.Dropdown(
            options=[(PROJECTIONS[p], p) for p in explorer.projections], description="latents", **wide
        )
        self.threshold = ipywidgets.FloatLogSlider(
            description="threshold", readout_format=".4g", style=wide["style"], layout={"width": "48em"}
        )
        self.verdict = ipywidgets.HTML()
        self.figure = ipywidgets.Image(format="png", layout={"max_width": "100%"})
        rows = [[self.class_name, self.image], [self.criterion, self.projection], [self.threshold]]
        boxes = [ipywidgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in rows]
        self.box = ipywidgets.VBox([*boxes, self.verdict, self.figure])
        self.box.add_class("hgad-explorer")
        self.verdict.add_class("hgad-verdict")
        self._quiet, self._painter = False, Painter(explorer)
        self._put(self.state, images=True)
        self.class_name.observe(self._on_class, "value")
        self.criterion.observe(self._on_criterion, "value")
        for widget in (self.image, self.projection, self.threshold):
            widget.observe(self._on_other, "value")

    def _put(self, state: State, *, images: bool = False) -> None:
        """Bring all widgets to a state, and show it."""
        self._quiet = True
        try:
            if images:
                self.class_name.value = state.class_name
                self.image.options = self.explorer.images(state.class_name)
            self.image.value = state.index
            self.criterion.value, self.projection.value = state.criterion, state.projection
            self._put_threshold(state)
        finally:
            self._quiet = False
        self._show(state)

    def _put_threshold(self, state: State) -> None:
        low, high = (math.log10(v) for v in self.explorer.limits(state.class_name, state.criterion))
        # A browser's slider moves a value to the nearest step from its minimum, and sends it back. So the
        # steps are laid through the threshold: what was chosen for the class is what is shown.
        at, step = math.log10(state.threshold), (high - low) / 400
        below, above = (max(math.ceil(part / step), 0) for part in (at - low, high - at))
        low, high = at - below * step, at + above * step
        slider = self.threshold
        # In one message: between two of them a browser would fit the value to limits that do not last.
        with slider.hold_sync():
            # Widened first: a slider takes no minimum above its maximum, nor a value outside.
            slider.min, slider.max = min(low, slider.min), max(high, slider.max)
            slider.value = state.threshold
            slider.min, slider.max, slider.step = low, high, step

    def _on_class(self, change: dict[str, Any]) -> None:
        if not self._quiet:
            name, criterion = change["new"], self.state.criterion
            index = self.explorer.images(name)[0][1]
            threshold = self.explorer.threshold(name, criterion)
            self._put(State(name, index, criterion, threshold, self.state.projection), images=True)

    def _on_criterion(self, change: dict[str, Any]) -> None:
        # Each criterion has a scale of its own, so the threshold starts anew.
        if not self._quiet:
            now, criterion = self.state, change["new"]
            threshold = self.explorer.threshold(now.class_name, criterion)
            self._put(State(now.class_name, now.index, criterion, threshold, now.projection))

    def _on_other(self, change: dict[str, Any]) -> None:
        if not self._quiet:
            now = self.state
            self._show(
                State(
                    now.class_name,
                    self.image.value,
                    now.criterion,
                    self.threshold.value,
                    self.projection.value,
                )
            )

    def _show(self, state: State) -> None:
        self.state, view = state, self.explorer.view(state)
        self.verdict.value = f"<b>{describe(view)}</b>"
        self.figure.value = self._painter.draw(view).png()


def overview(explorer: Explorer) -> pd.DataFrame:
    """Count, for each class and criterion, the labelled test images called right at the first threshold."""
    rows = {}
    for name in explorer.classes:
        truths = np.array(explorer.truths(name))
        known = truths != "unlabelled"
        row: dict[str, object] = {"test images": int(known.sum())}
        for criterion in explorer.criteria:
            called = explorer.class_scores(name, criterion) >= explorer.threshold(name, criterion)
            row[f"right by {criterion}"] = int((called == (truths == "anomalous"))[known].sum())
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")
