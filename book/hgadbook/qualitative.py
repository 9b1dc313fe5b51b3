"""Two models on the same images: which images tell most, by rule, and their maps side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hgadbook.paper import number_text
from hgadlib.config import Config
from hgadlib.figures.maps import LINEAR, mark_decades, outline_mask
from hgadlib.figures.tables import METRIC_LABELS
from hgadlib.figures.theme import literal
from hgadlib.runs.gallery import gallery
from hgadlib.runs.inputs import Inputs
from hgadlib.runs.record import Result

EXPERIMENTS = {"single Gaussian": "prior_single_affine", "HGAD": Config.experiment}
"""The experiments compared, and how figures and tables call them: the one looked at stands last."""

Models = Mapping[str, tuple[Config, Result]]
"""By the name of the model, a run's configuration and outcome."""
Limits = Mapping[str, tuple[float, float]]
"""By the name of the model, scores at the two ends of its colour scale."""


def normal_rank(
    scores: np.ndarray, class_idx: np.ndarray, labels: np.ndarray, labelled: np.ndarray
) -> np.ndarray:
    """Rank each test image among the normal ones of its class.

    Args:
        scores: (N,).
        class_idx: (N,).
        labels: True where anomalous, (N,).
        labelled: False where that is unknown, (N,).

    Returns:
        Share of the class's normal images that score less, (N,), 0 to 1, ties counting half; a normal image
        is not compared with itself. NaN where there is none to compare with.
    """
    ranks = np.full(len(scores), np.nan)
    normal = labelled & ~labels
    for i, score in enumerate(scores):
        others = scores[normal & (class_idx == class_idx[i]) & (np.arange(len(scores)) != i)]
        if len(others):
            ranks[i] = ((others < score).sum() + 0.5 * (others == score).sum()) / len(others)
    return ranks


def telling_images(
    scores: Mapping[str, np.ndarray], class_idx: np.ndarray, labels: np.ndarray, labelled: np.ndarray
) -> dict[str, dict[int, int]]:
    """Choose good cases and failures of the last of two models by rule, one of each class where there is one.

    Args:
        scores: By the name of the model, (N,): first the one compared with, last the one looked at.
        class_idx: (N,).
        labels: True where anomalous, (N,).
        labelled: False where that is unknown, (N,).

    Returns:
        By rule, class index to image index. Ranks are those of :func:`normal_rank`; of equal ranks the score
        decides:

        - ``found``: the anomalous image of highest rank;
        - ``missed``: the anomalous image of lowest rank;
        - ``false alarm``: the normal image of highest score;
        - ``gained``, ``lost``: the anomalous image whose rank rose, or fell, most from the first model to the
          last one; left out where none rose, or fell.
    """
    first, *_, last = scores.values()
    before, after = (normal_rank(found, class_idx, labels, labelled) for found in (first, last))
    chosen: dict[str, dict[int, int]] = {
        rule: {} for rule in ("found", "missed", "false alarm", "gained", "lost")
    }
    for k in np.unique(class_idx).tolist():
        anomalous, normal = (
            np.flatnonzero((class_idx == k) & (labels == s) & labelled) for s in (True, False)
        )
        if len(normal):
            chosen["false alarm"][k] = int(normal[np.argmax(last[normal])])
        if not len(normal) or not len(anomalous):
            continue
        order = anomalous[np.lexsort((last[anomalous], after[anomalous]))]
        chosen["missed"][k], chosen["found"][k] = int(order[0]), int(order[-1])
        change = (after - before)[anomalous]
        if change.max() > 0:
            chosen["gained"][k] = int(anomalous[np.argmax(change)])
        if change.min() < 0:
            chosen["lost"][k] = int(anomalous[np.argmin(change)])
    return chosen


def rank_table(inputs: Inputs, ranks: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Sum up the ranks of the anomalous images: a row per class and for all, columns by model, in percent.

    Args:
        inputs: Of the runs.
        ranks: By model, what :func:`normal_rank` returned.

    Returns:
        Their median, the share of ranks of 1 and that of ranks below a half.
    """
    anomalous = inputs.test_labels & inputs.test_labelled
    names, rows = [*inputs.dataset.classes, "all"], {}
    for k in range(len(names)):
        members = anomalous & (inputs.test_classes == k) if k + 1 < len(names) else anomalous
        rows[k] = {
            (model, what): 100 * float(value)
            for model, found in ranks.items()
            for what, value in (
                ("median", np.median(found[members])),
                ("above all", (found[members] == 1).mean()),
                ("below half", (found[members] < 0.5).mean()),
            )
            if members.any()
        }
    # By place until here: a class may be called "all".
    return pd.DataFrame(rows).T.set_axis(names).rename_axis("class")


def rank_sentences(inputs: Inputs, ranks: Mapping[str, np.ndarray]) -> list[str]:
    """Say how high anomalous images rank under both models, and how many of them rank higher under the last.

    The arguments are those of :func:`rank_table`.
    """
    table = rank_table(inputs, ranks).iloc[-1]
    parts = [
        f"{model} ranks {table[model, 'above all']:.0f} % above all normal images of their class and "
        f"{table[model, 'below half']:.0f} % below the median one"
        for model in ranks
    ]
    anomalous = inputs.test_labels & inputs.test_labelled
    first, *_, last = ranks
    change = ranks[last][anomalous] - ranks[first][anomalous]
    mean = number_text(100 * float(change.mean()), sign="+")
    return [
        f"Of {len(change)} anomalous images, {'; '.join(parts)}.",
        f"Under {last} {(change > 0).sum()} of them rank higher than under {first}, {(change < 0).sum()} "
        f"lower and {(change == 0).sum()} the same; the mean change is {mean} points.",
    ]


def run_table(models: Models) -> pd.DataFrame:
    """Say of each model what it was trained as, for how long, and how well it does (AUROC in percent)."""
    rows = {}
    for name, (config, result) in models.items():
        found = {metric: result.evaluation.mean[metric] for metric in ("image_auroc", "pixel_auroc")}
        rows[name] = {
            "prior": config.prior.kind,
            "scores": result.evaluation.protocol.name,
            "epochs": config.train.epochs,
            "training (s)": result.metrics["timing"]["train_s"],
            **{METRIC_LABELS[k]: np.nan if value is None else 100 * value for k, value in found.items()},
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def changed_settings(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """List the settings in which two runs differ, by dotted key, but for their experiments' names."""
    before, after = (
        {
            f"{section}.{key}" if key else section: value
            for section, part in config.to_dict().items()
            for key, value in (part.items() if isinstance(part, dict) else [("", part)])
        }
        for config in (one, other)
    )
    return {
        key: (value, after[key])
        for key, value in before.items()
        if value != after[key] and key != "experiment"
    }


def resolution_sentence(config: Config, grids: Sequence[tuple[int, int]], paper_size: int) -> str:
    """State how fine the maps are: what each level sees and what one position stands for.

    Args:
        config: Of the runs.
        grids: Positions of each level, (h, w), as in the features.
        paper_size: Pixels a side of the paper's images.
    """
    sizes = config.features.pyramid or (config.data.image_size,) * len(grids)
    side = config.score.map_size
    levels = [
        f"A level of {h} × {w} positions sees images of {size} pixels a side; on a map of {side} pixels a "
        f"side one of its positions stands for {side / h:.3g} × {side / w:.3g}."
        for size, (h, w) in zip(sizes, grids, strict=True)
    ]
    return (
        f"{' '.join(levels)} Maps are smooth only because levels are interpolated and blurred. The paper's "
        f"images have {paper_size} pixels a side (Tab. 5)."
    )


def one_scale(models: Models) -> bool:
    """Whether all models' maps have one unit, standard deviations of normal images' values: calibrated."""
    return all(result.evaluation.protocol.normalisation == "calibrated" for _, result in models.values())


def map_limits(inputs: Inputs, models: Models, chosen: Sequence[int]) -> Limits:
    """Find the least and the largest value of the models' maps of some test images.

    Of all models together where their maps have one unit (:func:`one_scale`), otherwise of each by itself.
    """
    limits = {}
    for name, (config, result) in models.items():
        maps = gallery(config, inputs, result, chosen)["maps"]
        limits[name] = (float(maps.min()), float(maps.max()))
    if not one_scale(models):
        return limits
    ends = list(zip(*limits.values(), strict=True))
    return dict.fromkeys(limits, (min(ends[0]), max(ends[1])))


def compare_maps(
    inputs: Inputs,
    models: Models,
    chosen: Sequence[int],
    ranks: Mapping[str, np.ndarray],
    *,
    normal: Sequence[int],
    limits: Limits,
) -> Figure:
    """Draw several models' maps of the same test images.

    Args:
        inputs: Of the runs.
        models: Run by run.
        chosen: Indices of the test images, a row each.
        ranks: By model, what :func:`normal_rank` returned; each becomes a caption.
        normal: The normal image to set beside each.
        limits: Of each model's colour scale, see :func:`map_limits`.
    """
    drawn = {name: gallery(config, inputs, result, chosen) for name, (config, result) in models.items()}
    config, result = next(iter(models.values()))
    own = next(iter(drawn.values()))
    masks = own["masks"]
    return map_comparison(
        own["images"],
        np.zeros(own["maps"].shape, bool) if masks is None else masks,
        {name: found["maps"] for name, found in drawn.items()},
        # The score in a title is one model's.
        [title.partition("\n")[0].replace(", ", "\n") for title in own["titles"]],
        normal=gallery(config, inputs, result, normal)["images"],
        limits=limits,
        captions={name: [f"rank {100 * ranks[name][i]:.0f} %" for i in chosen] for name in models},
        bar="anomaly score (standard deviations)" if one_scale(models) else None,
    )


def blended(
    inputs: Inputs, model: tuple[Config, Any], chosen: Sequence[int], limits: tuple[float, float]
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Give test images, a model's maps of them in the colours of :func:`map_comparison`, and their masks.

    Returns:
        By the image's title, what :func:`hgadbook.sliders.blend_slider` takes.
    """
    config, result = model
    drawn = gallery(config, inputs, result, chosen)
    masks = np.zeros(drawn["maps"].shape, bool) if drawn["masks"] is None else drawn["masks"]
    values = AsinhNorm(LINEAR, *limits, clip=True)(drawn["maps"].ravel())
    colors = plt.get_cmap("inferno")(np.reshape(values, drawn["maps"].shape))
    layers = zip(drawn["titles"], drawn["images"], colors, masks, strict=True)
    return {
        title.partition("\n")[0]: (image, (255 * color[..., :3]).astype(np.uint8), mask)
        for title, image, color, mask in layers
    }


def map_comparison(
    images: NDArray[np.uint8],
    masks: NDArray[np.bool_],
    maps: Mapping[str, np.ndarray],
    titles: Sequence[str],
    *,
    normal: NDArray[np.uint8],
    limits: Limits,
    captions: Mapping[str, Sequence[str]],
    bar: str | None = None,
) -> Figure:
    """Draw a row per image: a normal one beside it, the image, its mask, and every model's map.

    Args:
        images: RGB, (N, H, W, 3) uint8.
        masks: True where anomalous, (N, H, W) bool.
        maps: By the name of the model, anomaly maps (N, H, W); higher is more anomalous.
        titles: A name per row.
        normal: Normal images of the same classes, (N, H, W, 3) uint8.
        limits: Of the colour scales: a model has one for all rows.
        captions: By model, a line under each map.
        bar: What the colour bar measures, where all models have one scale; it is linear near 0 and
            logarithmic beyond, see :data:`hgadlib.figures.maps.LINEAR`. None for linear scales and no bar.

    Source: paper Fig. 4 and 6.
    """
    shape = (len(images), 3 + len(maps))
    size = (1.45 * shape[1] + 0.5 + (bar is not None), 1.57 * shape[0] + 0.3)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False)
    for row, (beside, image, mask, *panels) in enumerate(axes):
        for ax in axes[row]:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        beside.set_ylabel(literal(titles[row]), fontsize=8)
        beside.imshow(normal[row])
        image.imshow(images[row])
        mask.imshow(masks[row], cmap="gray", vmin=0, vmax=1)
        for ax, (name, found) in zip(panels, maps.items(), strict=True):
            low, high = limits[name]
            norm = Normalize(low, high, clip=True) if bar is None else AsinhNorm(LINEAR, low, high, clip=True)
            ax.imshow(found[row], cmap="inferno", norm=norm)
            outline_mask(ax, masks[row])
            ax.set_xlabel(captions[name][row], fontsize=8, labelpad=2)
    for ax, name in zip(axes[0], ("normal", "image", "mask", *maps), strict=True):
        ax.set_title("\n".join(textwrap.wrap(name, 16)), fontsize=9)
    if bar is not None:
        drawn = figure.colorbar(
            axes[0, -1].images[0], ax=axes, shrink=min(0.92, 3 / len(images)), anchor=(0, 1), pad=0.01
        )
        drawn.set_label(bar, fontsize=8)
        drawn.ax.tick_params(labelsize=8)
        mark_decades(drawn)
        drawn.ax.spines[:].set_visible(False)
    return figure
