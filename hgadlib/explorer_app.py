"""Widgets over :mod:`hgadlib.explorer`: choose class, image, criterion, threshold, projection; look."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from hgadlib.explorer import Explorer, Projection, State, View
from hgadlib.figures.views import ImageView

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
