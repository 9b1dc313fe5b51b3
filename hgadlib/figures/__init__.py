"""Figures and tables of a run: one function each, data in, Axes (or a Figure for grids) out; one theme."""

from __future__ import annotations

from hgadlib.figures.histograms import (
    histogram_pairs,
    log_likelihood_histogram,
    log_likelihood_histograms,
    overlap_change,
)
from hgadlib.figures.maps import anomaly_map_grid, outline_mask
from hgadlib.figures.tables import METRIC_LABELS, auroc_table, fact_table, protocol_table, styled
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, PALETTE, class_colors, panel_grid, theme
from hgadlib.figures.training import (
    COUPLING_LABELS,
    LOSS_LABELS,
    coupling_course,
    loss_curves,
    training_course,
)

__all__ = [
    "ANOMALOUS_COLOR", "COUPLING_LABELS", "LOSS_LABELS", "METRIC_LABELS", "NORMAL_COLOR", "PALETTE",
    "anomaly_map_grid", "auroc_table", "class_colors", "coupling_course", "fact_table", "histogram_pairs",
    "log_likelihood_histogram", "log_likelihood_histograms", "loss_curves", "outline_mask", "overlap_change",
    "panel_grid", "protocol_table", "styled", "theme", "training_course",
]  # fmt: skip
