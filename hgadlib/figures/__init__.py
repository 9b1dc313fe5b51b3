"""The book's figures and tables: one function each, data in, Axes (or a Figure for grids) out; one theme."""

from __future__ import annotations

from hgadlib.figures.comparison import map_comparison
from hgadlib.figures.course import COUPLING_LABELS, coupling_course, training_course
from hgadlib.figures.histograms import (
    histogram_pairs,
    log_likelihood_histogram,
    log_likelihood_histograms,
    overlap_change,
)
from hgadlib.figures.latents import latent_scatter
from hgadlib.figures.losses import LOSS_LABELS, loss_curves
from hgadlib.figures.maps import anomaly_map_grid, outline_mask
from hgadlib.figures.paper import (
    claims_table,
    comparison_points,
    comparison_table,
    findings_table,
    records_cell,
    text_table,
)
from hgadlib.figures.tables import METRIC_LABELS, auroc_table, fact_table, protocol_table
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, PALETTE, class_colors, panel_grid, theme

__all__ = [
    "ANOMALOUS_COLOR",
    "COUPLING_LABELS",
    "LOSS_LABELS",
    "METRIC_LABELS",
    "NORMAL_COLOR",
    "PALETTE",
    "anomaly_map_grid",
    "auroc_table",
    "claims_table",
    "class_colors",
    "comparison_points",
    "comparison_table",
    "coupling_course",
    "fact_table",
    "findings_table",
    "histogram_pairs",
    "latent_scatter",
    "log_likelihood_histogram",
    "log_likelihood_histograms",
    "loss_curves",
    "map_comparison",
    "outline_mask",
    "overlap_change",
    "panel_grid",
    "protocol_table",
    "records_cell",
    "text_table",
    "theme",
    "training_course",
]
