"""One test image under one criterion and threshold: image, map, masks, latents, its class's scores."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.ndimage import binary_dilation

from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, class_colors

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
