"""Look at a trained model: an image, a criterion, a threshold and a projection in, one figure out."""

from __future__ import annotations

import html
import io
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from hgadlib.config import Config, run_dir
from hgadlib.datasets.images import load_masks, read_image, resize_image
from hgadlib.errors import InputError
from hgadlib.evaluation.evaluate import class_normalisation, level_values, score_batches
from hgadlib.features.store import spread_sample
from hgadlib.figures.maps import outline_mask
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, class_colors, literal
from hgadlib.mixture import HierarchicalGaussianMixture
from hgadlib.model import HGAD
from hgadlib.runs.directory import RunDirectory, read_config
from hgadlib.runs.experiment import finish_run, train_model
from hgadlib.runs.inputs import Inputs, image_name, prepare
from hgadlib.scoring import Constants, Criterion, LevelValues, anomaly_maps, image_scores

Projection = Literal["lda", "pca"]
CRITERIA = {"likelihood": "likelihood", "entropy": "entropy", "both": "both: their product"}
PROJECTIONS = {"lda": "LDA: classes apart", "pca": "PCA: most variance"}
KINDS = {"normal": NORMAL_COLOR, "anomalous": ANOMALOUS_COLOR, "unlabelled": "0.5"}

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
    positions: np.ndarray
    flagged_positions: np.ndarray

    def __str__(self) -> str:
        """Return in a line what the model says of the image, and what it is."""
        relation = "at or above" if self.verdict == "anomalous" else "below"
        return (
            f"score {self.score:.4g}, {relation} the threshold {self.state.threshold:.4g}: "
            f"called {self.verdict}; it is {self.truth}"
        )


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
        self._truths = np.array([_truth(record) for record in inputs.dataset.test])
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

    def truths(self, class_name: str) -> np.ndarray:
        """Return "normal", "anomalous" or "unlabelled" for each of a class's test images."""
        truths: np.ndarray = self._truths[self._members(class_name)]
        return truths

    def first(self) -> State:
        """Return the state to begin with: the run's criterion, the first class's most anomalous image."""
        name, criterion = self.classes[0], self.config.criterion
        index = self.images(name)[0][1]
        return State(name, index, criterion, self.threshold(name, criterion), self.projections[0])

    def threshold(self, class_name: str, criterion: Criterion) -> float:
        """Choose a threshold to begin with: of largest F1 on the class's test images.

        It is chosen with the labels of the images it is tried on: good to look at, no estimate. Without
        anomalous and normal images it is the score that one image in twenty exceeds.
        """
        scores, truths = self.class_scores(class_name, criterion), self.truths(class_name)
        anomalous, normal = scores[truths == "anomalous"], scores[truths == "normal"]
        if not len(anomalous) or not len(normal):
            return float(np.quantile(scores, 0.95))
        steps = np.unique(np.concatenate([anomalous, normal]))
        hits, alarms = ((group[None] >= steps[:, None]).sum(1) for group in (anomalous, normal))
        best = int(np.argmax(2 * hits / (hits + alarms + len(anomalous))))
        # Between two scores, so that neither lies on it.
        return float((steps[best] + steps[max(best - 1, 0)]) / 2)

    def limits(self, class_name: str, criterion: Criterion) -> tuple[float, float]:
        """Return the smallest and the largest threshold of use, around all scores of the class."""
        scores = self.class_scores(class_name, criterion)
        low, high = float(scores.min()), float(scores.max())
        margin = max(0.1 * (high - low), 1e-3)
        return low - margin, high + margin

    def view(self, state: State) -> View:
        """Compute all that one state shows; the map is of all levels, as the image's score is.

        Raises:
            InputError: No such class, image, criterion or projection in this run.
        """
        self._check(state)
        score = self.config.score
        anomaly_map = anomaly_maps(
            self.values[slice(state.index, state.index + 1)],
            self.constants(state.class_name),
            size=score.map_size,
            sigma=score.sigma,
            criterion=state.criterion,
        )
        image_score = float(image_scores(anomaly_map, score.image, score.image_share)[0])
        flagged = anomaly_map >= state.threshold
        image, mask = self._picture(state.index)
        record, truth = self.inputs.dataset.test[state.index], str(self._truths[state.index])
        return View(
            state,
            image_name(self.inputs.dataset, record),
            image,
            anomaly_map[0].numpy(),
            mask,
            flagged[0].numpy(),
            image_score,
            "anomalous" if image_score >= state.threshold else "normal",
            f"{truth}, {record.defect_type}" if record.is_anomalous else truth,
            self._positions(state.index, state.projection),
            F.adaptive_max_pool2d(flagged[None].float(), self.model.grids[-1])[0, 0].bool().flatten().numpy(),
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
        return np.flatnonzero(self.inputs.test_classes == self.inputs.dataset.classes.index(class_name))

    def _values_of(self, class_name: str) -> LevelValues:
        return self.values[torch.from_numpy(self._members(class_name))]

    def _constants(self, class_name: str) -> Constants:
        k, score = self.inputs.dataset.classes.index(class_name), self.config.score
        mine = self._values_of(class_name)
        return class_normalisation(self.model, mine, k, score.normalisation, score.map_size)

    def _class_scores(self, class_name: str, criterion: Criterion) -> np.ndarray:
        mine, constants = self._values_of(class_name), self.constants(class_name)
        batches = score_batches(mine, constants, self.config.score, criterion)
        return torch.cat([scores for _, scores, _ in batches]).numpy()

    def _load(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        record, resize = self.inputs.dataset.test[index], self.config.data.resize
        size = self.config.score.map_size
        image = resize_image(read_image(record.path, record.bit_depth), size, resize)
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
        places = np.tile(np.arange(z.shape[1]), (len(z), 1))
        chosen = np.random.default_rng(0).permuted(places, axis=1)[:, :_POSITIONS]
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


def _truth(record: Any) -> str:
    return "unlabelled" if not record.is_labelled else "anomalous" if record.is_anomalous else "normal"


def open_explorer(config: Config, *, progress: bool = True) -> Explorer:
    """Load the finished run of this dataset, experiment and seed, or train the configuration given.

    A finished run keeps its own settings, whatever else is asked for here. Where there is none, the
    configuration is trained in a folder of its own, runs/DATASET/explore, so that it takes no run's place.

    Raises:
        InputError: The run is of other images than those found now.
    """
    stored = run_dir(config)
    finished = (stored / "metrics.json").is_file() and (stored / "model.safetensors").is_file()
    if finished:
        own = read_config(stored)
        data = replace(own.data, root=config.data.root or own.data.root)
        config = replace(own, device=config.device, run_dir=str(stored), data=data)
    elif config.run_dir is None:
        place = stored.parents[1] / "explore" / f"{stored.name}-{config.digest[:8]}"
        config = replace(config, run_dir=str(place))
    run, inputs = RunDirectory.open(config), prepare(config, progress=progress)
    model = train_model(config, inputs, run, progress=progress)
    values = (
        level_values(model, inputs.test, inputs.test_classes)
        if run.complete
        else finish_run(config, inputs, model, run).values
    )
    source = f"{'/'.join(run.path.parts[-4:])}, {'found finished' if finished else 'a small run'}"
    return Explorer(config, inputs, cast(HGAD, model), values, source=source)


def overview(explorer: Explorer) -> pd.DataFrame:
    """Count, for each class and criterion, the labelled test images called right at the first threshold."""
    rows = {}
    for name in explorer.classes:
        truths = explorer.truths(name)
        known = truths != "unlabelled"
        row: dict[str, object] = {"test images": int(known.sum())}
        for criterion in explorer.criteria:
            called = explorer.class_scores(name, criterion) >= explorer.threshold(name, criterion)
            row[f"right by {criterion}"] = int((called == (truths == "anomalous"))[known].sum())
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def draw(explorer: Explorer, view: View, figure: Figure | None = None) -> Figure:
    """Draw an image, its map, its true mask and the mask at the threshold; below, latents and scores.

    Args:
        explorer: Has the latents and the class's scores.
        view: What to draw.
        figure: Empty, to draw it on; None for one of pyplot's, which a notebook knows how to show.
    """
    state, limits = view.state, explorer.limits(view.state.class_name, view.state.criterion)
    if figure is None:
        figure = plt.figure()
        plt.close(figure)  # a notebook shows it where it is asked for, not at the end of the cell
    figure.set(size_inches=(11, 6.1), dpi=100)
    # Places are fixed, since solving a layout takes longer than all the rest.
    figure.set_layout_engine("none")
    text = f"{literal(view.name, 80)}, {CRITERIA[state.criterion]}\n{literal(str(view), 160)}"
    figure.text(0.055, 0.985, text, va="top", fontsize=11)
    grid = {"left": 0.055, "right": 0.975, "bottom": 0.5, "top": 0.86, "wspace": 0.2}
    panels = figure.subplots(1, 4, gridspec_kw=grid)
    _draw_images(panels, view, figure.add_axes((0.495, 0.5, 0.008, 0.36)), limits[1])
    _draw_latents(figure.add_axes((0.055, 0.085, 0.42, 0.32)), explorer, view)
    _draw_scores(figure.add_axes((0.72, 0.085, 0.265, 0.32)), explorer, view, limits)
    return figure


def _draw_images(panels: np.ndarray, view: View, bar: Axes, top: float) -> None:
    """Draw the image, its map up to the score `top`, the true mask, and the flagged pixels in it."""
    grey = np.repeat(view.image.mean(-1, keepdims=True), 3, axis=-1) / 255
    tinted = np.where(view.flagged[..., None], 0.35 * grey + 0.65 * np.array(to_rgb(ANOMALOUS_COLOR)), grey)
    blank = np.full((*view.flagged.shape, 3), 0.93)
    mask = blank if view.mask is None else np.repeat(view.mask[..., None], 3, axis=-1).astype(float)
    titles = ("image", "anomaly map (score, no unit)", "true mask", "at or above the threshold")
    for ax, pixels, title in zip(panels, (view.image, view.anomaly_map, mask, tinted), titles, strict=True):
        shown = ax.imshow(pixels, cmap="inferno", vmin=0, vmax=top)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_title(title, loc="left")
        if pixels is view.anomaly_map:
            panels[0].figure.colorbar(shown, cax=bar, ticks=MaxNLocator(4))
    bar.tick_params(labelsize=7, length=2)
    bar.spines[:].set_visible(False)
    if view.mask is None:
        panels[2].text(0.5, 0.5, "not drawn", transform=panels[2].transAxes, ha="center", va="center")
    else:
        outline_mask(panels[3], view.mask)


def _draw_latents(ax: Axes, explorer: Explorer, view: View) -> None:
    """Draw the normal latents of all classes, the class centres, and the image's positions."""
    plane, classes = explorer.plane(view.state.projection), explorer.model.classes
    colors = class_colors(classes)
    for k, name in enumerate(classes):
        x, y = plane.points[plane.class_idx == k].T
        ax.scatter(x, y, s=6, color=colors[name], alpha=0.45, linewidths=0, label=literal(name, 24))
    if plane.centers is not None:
        x, y = plane.centers.T
        own = [colors[name] for name in classes]
        ax.scatter(x, y, s=90, marker="X", c=own, edgecolors="black", linewidths=1.0, zorder=3)
    rings: dict[str, Any] = {"s": 24, "edgecolors": "black", "linewidths": 0.9, "zorder": 4}
    found = view.flagged_positions
    ax.scatter(*view.positions[~found].T, color=colors[view.state.class_name], **rings)
    ax.scatter(*view.positions[found].T, color=ANOMALOUS_COLOR, label="this image, flagged", **rings)
    # Anomalous latents may lie far out: they must not squeeze the classes into a corner.
    low, high = np.quantile(plane.points, [0.005, 0.995], axis=0)
    margin = 0.4 * (high - low)
    ax.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    name = view.state.projection.upper()
    ax.set(xlabel=f"{name} direction 1 (no unit)", ylabel=f"{name} direction 2 (no unit)")
    ax.set_title(
        "latents at the deepest level: training positions, centres (crosses), this image (rings)", loc="left"
    )
    columns = 1 + len(classes) // 12
    legend = ax.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, markerscale=1.6, ncols=columns
    )
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _draw_scores(ax: Axes, explorer: Explorer, view: View, limits: tuple[float, float]) -> None:
    """Draw the class's scores as dots, a row for each thing that the images are."""
    state = view.state
    scores = explorer.class_scores(state.class_name, state.criterion)
    kinds = explorer.truths(state.class_name)
    present = [kind for kind in KINDS if kind in kinds]
    spread = np.random.default_rng(0).uniform(-0.22, 0.22, len(scores))
    for row, kind in enumerate(present):
        mine = kinds == kind
        ax.scatter(scores[mine], row + spread[mine], s=16, color=KINDS[kind], alpha=0.6, linewidths=0)
    ax.axvline(state.threshold, color="0.2", linestyle=(0, (4, 3)), linewidth=1.2)
    ax.axvline(view.score, color="black")
    ax.set(xlim=limits, ylim=(-0.6, len(present) - 0.4))
    ax.set_yticks(range(len(present)), present)
    ax.set_xlabel("image score; dashed: threshold, line: this image")
    ax.set_title("scores of the class's test images", loc="left")


class ExplorerApp:
    """Widgets that show one state of an explorer and change it.

    Attributes:
        box: To be displayed.
        state: What is shown.
    """

    def __init__(self, explorer: Explorer) -> None:
        # Here, so that the rest needs no widgets.
        import ipywidgets

        self.explorer, self.state = explorer, explorer.first()
        wide = {"style": {"description_width": "5.5em"}, "layout": ipywidgets.Layout(width="24em")}

        def choice(name: str, words: dict[str, str], known: tuple[str, ...]) -> Any:
            options = [(words.get(value, value), value) for value in known]
            return ipywidgets.Dropdown(options=options, description=name, **wide)

        self.class_name = choice("class", {}, explorer.classes)
        self.image = choice("image", {}, ())
        self.criterion = choice("criterion", CRITERIA, explorer.criteria)
        self.projection = choice("latents", PROJECTIONS, explorer.projections)
        self.threshold = ipywidgets.FloatSlider(
            description="threshold", readout_format=".4g", style=wide["style"], layout={"width": "48em"}
        )
        self.verdict = ipywidgets.HTML()
        self.figure = ipywidgets.Image(format="png", layout={"max_width": "100%"})
        rows = [[self.class_name, self.image], [self.criterion, self.projection], [self.threshold]]
        boxes = [ipywidgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in rows]
        self.box = ipywidgets.VBox([*boxes, self.verdict, self.figure])
        self.box.add_class("hgad-explorer")
        self.verdict.add_class("hgad-verdict")
        self._quiet = False
        self._put(self.state)
        self._show(self.state)
        for widget in (self.class_name, self.image, self.criterion, self.projection, self.threshold):
            widget.observe(self._changed, "value")

    def _changed(self, change: dict[str, Any]) -> None:
        if self._quiet:
            return
        widgets = (self.class_name, self.image, self.criterion, self.threshold, self.projection)
        now = State(*(widget.value for widget in widgets))
        # Each class and each criterion has a scale of its own, so the threshold starts anew.
        if (now.class_name, now.criterion) != (self.state.class_name, self.state.criterion):
            if now.class_name != self.state.class_name:
                now = replace(now, index=self.explorer.images(now.class_name)[0][1])
            now = replace(now, threshold=self.explorer.threshold(now.class_name, now.criterion))
            self._put(now)
        self._show(now)

    def _show(self, state: State) -> None:
        self.state, view, png = state, self.explorer.view(state), io.BytesIO()
        self.verdict.value = f"<b>{html.escape(str(view))}</b>"
        # Not pyplot, whose state is not made for the threads in which JupyterLab may run what widgets call;
        # nor savefig, which the theme has draw twice, at the resolution of paper.
        canvas = FigureCanvasAgg(draw(self.explorer, view, Figure()))
        canvas.print_png(png, pil_kwargs={"compress_level": 1})
        self.figure.value = png.getvalue()

    def _put(self, state: State) -> None:
        """Bring the widgets that a class and a criterion decide on to a state."""
        self._quiet = True
        try:
            self.image.options = self.explorer.images(state.class_name)
            self.image.value = state.index
            self.criterion.value = state.criterion
            self._put_threshold(state)
        finally:
            self._quiet = False

    def _put_threshold(self, state: State) -> None:
        low, high = self.explorer.limits(state.class_name, state.criterion)
        # A browser's slider moves a value to the nearest step from its minimum, and sends it back. So the
        # steps are laid through the threshold: what was chosen for the class is what is shown.
        at, step = state.threshold, (high - low) / 400
        below, above = (max(math.ceil(part / step), 0) for part in (at - low, high - at))
        low, high = at - below * step, at + above * step
        slider = self.threshold
        # In one message: between two of them a browser would fit the value to limits that do not last.
        with slider.hold_sync():
            # Widened first: a slider takes no minimum above its maximum, nor a value outside.
            slider.min, slider.max = min(low, slider.min), max(high, slider.max)
            slider.value = at
            slider.min, slider.max, slider.step = low, high, step
