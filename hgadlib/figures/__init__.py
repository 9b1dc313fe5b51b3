"""Figures and tables of a run: one function each, data in, Axes (or a Figure for grids) out; one theme."""

from __future__ import annotations

from hgadlib.figures.histograms import log_likelihood_histogram, log_likelihood_histograms
from hgadlib.figures.maps import anomaly_map_grid, outline_mask
from hgadlib.figures.tables import METRIC_LABELS, auroc_table, fact_table, protocol_table, styled
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, PALETTE, class_colors, panel_grid, theme
from hgadlib.figures.training import LOSS_LABELS, loss_curves

__all__ = [
    "ANOMALOUS_COLOR", "LOSS_LABELS", "METRIC_LABELS", "NORMAL_COLOR", "PALETTE", "anomaly_map_grid",
    "auroc_table", "class_colors", "fact_table", "log_likelihood_histogram", "log_likelihood_histograms",
    "loss_curves", "outline_mask", "panel_grid", "protocol_table", "styled", "theme",
]  # fmt: skip
