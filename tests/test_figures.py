"""What the figures show: panels, labels with units, outlines, colours. Not their pixels."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.contour import QuadContourSet

from hgadlib.errors import InputError
from hgadlib.figures.histograms import log_likelihood_histogram, log_likelihood_histograms
from hgadlib.figures.maps import anomaly_map_grid, outline_mask
from hgadlib.figures.tables import auroc_table, fact_table, styled
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, class_colors, literal, theme
from hgadlib.figures.training import loss_curves


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    theme()
    yield
    plt.close("all")


@pytest.fixture
def history() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "epoch": [1, 2, 3, 4],
            "stage": [1, 1, 2, 2],
            "total": [5.0, 4.0, 4.5, 4.0],
            "nll": [3.0, 2.5, 2.0, 1.5],
            "intra": [np.nan, np.nan, 2.0, 1.0],
            "log_sigmoid": [np.nan] * 4,
            "lr": [1e-3] * 4,
            "seconds": [1.0] * 4,
            "images_per_s": [9.0] * 4,
            "test_image_auroc": [0.5] * 4,
        }
    )


def test_loss_curves_has_a_panel_per_term_in_nats(history: pd.DataFrame) -> None:
    panels = loss_curves(history).axes
    assert [ax.get_title(loc="left").split(":")[0].split(" ")[0] for ax in panels] == [
        "total",
        "nll",
        "intra",
    ]
    assert panels[0].get_ylabel() == "nats per position"
    assert all(ax.get_xlabel() == "epoch" for ax in panels)
    np.testing.assert_array_equal(panels[1].lines[0].get_ydata(), history["nll"])
    # The second stage is marked between epochs 2 and 3.
    assert [line.get_xdata()[0] for line in (ax.lines[1] for ax in panels)] == [2.5] * 3  # type: ignore[index]


def test_loss_curves_of_one_epoch_shows_points(history: pd.DataFrame) -> None:
    panels = loss_curves(history.iloc[:1]).axes
    assert len(panels) == 2
    assert all(ax.lines[0].get_marker() == "o" for ax in panels)


@pytest.mark.parametrize("columns", [["total"], ["epoch", "lr"], ["epoch", "log_sigmoid"]])
def test_loss_curves_wants_epochs_and_losses(history: pd.DataFrame, columns: list[str]) -> None:
    with pytest.raises(InputError, match="epochs and losses"):
        loss_curves(history[columns])


def test_auroc_table_in_percent_with_dashes() -> None:
    one = {"image_auroc": 0.98765, "aupro": None}
    metrics = {"mean": {"image_auroc": 0.75, "aupro": None}, "per_class": {"visa/pcb1": one, "b": one}}
    table = auroc_table(metrics)
    assert list(table.data.columns) == ["image AUROC (%)", "AUPRO (%)"]  # type: ignore[attr-defined]
    assert list(table.data.index) == ["visa/pcb1", "b", "mean"]  # type: ignore[attr-defined]
    html = table.to_html()
    assert ">98.8<" in html and ">75.0<" in html and html.count(">–<") == 3
    assert html == auroc_table(metrics).to_html()
    assert list(auroc_table(metrics, names=["image_auroc"]).data) == ["image AUROC (%)"]  # type: ignore[attr-defined]


def test_tables_say_what_stands_out() -> None:
    table = pd.DataFrame({"ours": ["98.1", "97.0"]}, index=["HGAD", "plain"])
    html = styled(table, name="tab. 1", caption="In percent", emphasise=["plain"]).to_html()
    assert '<table id="T_tab--1"' in html and "<caption>In percent</caption>" in html
    assert ".row1 {\n  font-weight: bold" in html and ".row0" not in html
    facts = fact_table({"device": "a GPU", "epochs": 3}).to_html()
    places = [facts.index(text) for text in (">device<", ">a GPU<", ">epochs<", ">3<")]
    assert places == sorted(places) and "col_heading level0" not in facts


def test_histogram_of_counts() -> None:
    edges = np.array([-2.0, -1.0, 0.0, 1.0])
    ax = log_likelihood_histogram((edges, [0, 1, 3]), (edges, [2, 2, 0]), title="brick", unit="nats")
    assert ax.get_title(loc="left") == "brick   overlap 25.0 %"
    assert ax.get_xlabel() == "log-likelihood (nats)"
    assert ax.get_ylabel() == "share per bin (%)"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["normal", "anomalous"]  # type: ignore[union-attr]
    outlines = [patch for patch in ax.patches if patch.get_label() in ("normal", "anomalous")]
    assert [patch.get_edgecolor()[:3] for patch in outlines] == [
        to_rgb(NORMAL_COLOR),
        to_rgb(ANOMALOUS_COLOR),
    ]
    np.testing.assert_allclose(outlines[0].get_data().values, [0, 25, 75])  # type: ignore[attr-defined]

    same = log_likelihood_histogram((edges, [0, 1, 3]), (edges, [0, 2, 6]))
    assert same.get_title(loc="left") == "overlap 100.0 %"
    alone = log_likelihood_histogram((edges, [0, 1, 3]), (edges, [0, 0, 0]))
    assert alone.get_title(loc="left") == "overlap –"


def test_histograms_grid_has_a_panel_per_class() -> None:
    edges = np.arange(4.0)
    normal = {name: (edges, np.array([0, 1, 3])) for name in ("d", "a", "b", "c")}
    # The first class has no anomalous position.
    anomalous = {name: (edges, np.array([2, 2, 0]) * (name != "d")) for name in normal}
    figure = log_likelihood_histograms(normal, anomalous, columns=3)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["d   overlap –", *(f"{name}   overlap 25.0 %" for name in "abc")]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["normal", "anomalous"]


def test_wrong_histograms_are_refused() -> None:
    edges = np.array([0.0, 1.0, 2.0])
    with pytest.raises(InputError, match="same bin edges"):
        log_likelihood_histogram((edges, [1, 1]), (edges + 1, [1, 1]))
    with pytest.raises(InputError, match="same classes"):
        log_likelihood_histograms({"a": (edges, [1, 1])}, {"b": (edges, [1, 1])})


def contours(ax: plt.Axes) -> list[QuadContourSet]:
    return [c for c in ax.collections if isinstance(c, QuadContourSet)]


def test_map_grid_outlines_the_true_mask() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 12, 16, 3)).astype(np.uint8)
    maps = rng.random((2, 12, 16)).astype(np.float16)
    masks = np.zeros(maps.shape, bool)
    masks[0, 3:6, 4:9] = True
    figure = anomaly_map_grid(images, maps, masks, ["brick, crack", "brick, good"])
    *panels, bar = figure.axes
    assert len(panels) == 6
    assert [ax.get_title() for ax in panels[:3]] == ["image", "map and true mask", "anomaly map"]
    assert [ax.get_ylabel() for ax in panels[::3]] == ["brick, crack", "brick, good"]
    assert bar.get_ylabel() == "anomaly score (no unit)"
    # The outline is on the middle panel of the anomalous image, black below white, and nowhere else.
    assert [len(contours(ax)) for ax in panels] == [0, 2, 0, 0, 0, 0]
    below, above = contours(panels[1])
    np.testing.assert_array_equal(np.asarray(below.get_edgecolor())[:, :3], [to_rgb("black")])
    np.testing.assert_array_equal(np.asarray(above.get_edgecolor())[:, :3], [to_rgb("white")])
    assert np.ravel(below.get_linewidth())[0] > np.ravel(above.get_linewidth())[0]
    # Half a pixel around the mask.
    box = above.get_paths()[0].get_extents()
    assert (box.x0, box.x1, box.y0, box.y1) == pytest.approx((3.5, 8.5, 2.5, 5.5))
    # One colour scale for all rows.
    scales = [ax.images[0].get_clim() for ax in panels[2::3]]
    assert scales[0] == scales[1] == (maps.min(), maps.max())


def test_map_grid_without_masks() -> None:
    images, maps = np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 4, 4))
    panels = anomaly_map_grid(images, maps, limits=(0, 2)).axes
    assert panels[1].get_title() == "map over image"
    assert not contours(panels[1])
    assert panels[2].images[0].get_clim() == (0, 2)


def test_maps_in_deviations_have_a_scale_that_shows_small_ones_beside_large() -> None:
    images, maps = np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 4, 4))
    maps[0, 0, :2] = 5.0, 5000.0
    figures = [anomaly_map_grid(images, maps, calibrated=calibrated) for calibrated in (False, True)]
    linear, wide = (np.asarray(f.axes[2].images[0].norm(np.array([5.0])))[0] for f in figures)
    assert linear == pytest.approx(1e-3) and wide > 0.2
    assert [f.axes[-1].get_ylabel() for f in figures] == [
        f"anomaly score ({unit})" for unit in ("no unit", "standard deviations")
    ]
    # Marks in the linear part would lie upon each other.
    marks = [label.get_text() for label in figures[1].axes[-1].get_yticklabels()]
    assert marks == ["0", "1", "10", "100", "1000"]


def test_outline_closes_at_the_edge_of_the_image() -> None:
    ax = plt.subplots()[1]
    ax.imshow(np.zeros((5, 5)))
    outline = outline_mask(ax, np.ones((5, 5), bool))[0]
    box = outline.get_paths()[0].get_extents()
    assert (box.x0, box.x1) == pytest.approx((-0.5, 4.5))
    assert outline_mask(ax, np.zeros((5, 5), bool)) == []
    assert ax.get_xlim() == (-0.5, 4.5) and ax.get_ylim() == (4.5, -0.5)


def test_wrong_maps_are_refused() -> None:
    images, maps = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4))
    with pytest.raises(InputError, match="resize them"):
        anomaly_map_grid(images, maps[:, :3])
    with pytest.raises(ValueError, match="shorter"):
        anomaly_map_grid(images, maps, None, ["one"])
    with pytest.raises(InputError, match="finite"):
        anomaly_map_grid(images, maps * np.nan)


def test_class_colors_do_not_depend_on_order() -> None:
    names = [f"class {i}" for i in range(40)]
    colors = class_colors(names)
    assert colors == class_colors(names[::-1])
    assert len(set(colors.values())) == 40


def test_figures_draw_into_given_axes() -> None:
    ax = plt.subplots()[1]
    counts = (np.arange(3.0), [1, 2])
    assert log_likelihood_histogram(counts, counts, ax=ax) is ax


def test_theme_gives_an_opaque_ground() -> None:
    figure = plt.figure()
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert plt.rcParams["savefig.facecolor"] == "white"


# Whatever a file system allows: formulas, commands, tags, other scripts, bytes that are no UTF-8, length.
NAMES = {
    "cost_$5_or_$_6": r"cost_\$5_or_\$_6",
    "$x_{1}$": r"\$x_{1}\$",
    r"\frac$": r"\frac\$",
    "100%_done": "100%_done",
    "_hidden": " _hidden",
    "<b>bold<i>": "<b>bold<i>",
    "Öse é": "Öse é",
    "2024": "2024",
    "\U000e0041": r"\U000e0041",
    "\udcff\t": r"\udcff\t",
    "n" * 100 + "m" * 100: "n" * 20 + "…" + "m" * 19,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("error")
def test_figures_show_names_as_they_are(name: str) -> None:
    assert literal(name) == NAMES[name]
    counts = (np.arange(3.0), [1, 2])
    images, maps = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4))
    for figure, text in (
        (
            log_likelihood_histograms({name: counts}, {name: counts}),
            f"{NAMES[name]}   overlap 100.0 %".strip(),
        ),
        (anomaly_map_grid(images, maps, None, [name, f"{name}, {name}\n0.5"]), NAMES[name]),
    ):
        figure.draw_without_rendering()  # a formula fails here
        assert text in [figure.axes[0].get_title(loc="left"), figure.axes[0].get_ylabel()]
    ax = plt.subplots()[1]
    ax.plot([0, 1], label=literal(name))
    assert len(ax.legend().get_texts()) == 1


def test_only_characters_without_a_glyph_are_escaped() -> None:
    with plt.rc_context({"font.family": ["DejaVu Sans"]}):
        assert literal("\u4e2d\u6587, \u03bc\u00e9\u0416") == r"\u4e2d\u6587, " + "\u03bc\u00e9\u0416"
    assert plt.rcParams["font.family"][0] == "sans-serif"


@pytest.mark.filterwarnings("error")
def test_tables_show_names_as_they_are() -> None:
    name, cell = "<b>$1$&<i>", "<u>%s"
    table = pd.DataFrame({name: [cell], "runs": ["<details>1</details>"]}, index=[name])
    html = styled(table, name="names", markup=["runs"]).to_html()
    assert html.count(">&lt;b&gt;$1$&amp;&lt;i&gt;<") == 2 and ">&lt;u&gt;%s<" in html
    assert "><details>1</details><" in html
    # Neither Jupyter nor the book reads formulas in it.
    assert "mathjax_ignore" in html and "tex2jax_ignore" in html
    assert ">&lt;u&gt;%s<" in fact_table({"class": cell}).to_html()


def test_a_class_called_mean_has_a_row_beside_the_mean() -> None:
    metrics = {
        "mean": {"image_auroc": 0.75},
        "per_class": {"mean": {"image_auroc": 1.0}, "b": {"image_auroc": 0.5}},
    }
    table = auroc_table(metrics)
    assert table.data["image AUROC (%)"].tolist() == [100, 50, 75]  # type: ignore[attr-defined]
    assert list(table.data.index) == ["mean", "b", "mean"]  # type: ignore[attr-defined]
    html = table.to_html()
    assert html.count("font-weight: bold") == 1 and ".row2 {\n  font-weight: bold" in html
