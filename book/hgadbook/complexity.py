r"""What a configuration costs (paper Tab. 5): products by PyTorch's counter, parameters, images per second.

One multiply-add is a multiplication and an addition, two FLOPs. Counted are the matrix products and
convolutions; element-wise work (activations, exponentials, normalisation) is not, as in every count of this
kind. Tensors are fake: shapes pass through the network and no number is computed, so that a large network
is counted in seconds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter
from torch import Tensor, nn

from hgadbook.paper import read_table
from hgadlib.config import Config, project_dir
from hgadlib.datasets import load_dataset
from hgadlib.errors import InputError
from hgadlib.features.backbone import Backbone, build_backbone
from hgadlib.features.extract import dataset_features
from hgadlib.figures.theme import ANOMALOUS_COLOR, PALETTE
from hgadlib.mixture import HierarchicalGaussianMixture
from hgadlib.model import HGAD
from hgadlib.runs.cost import count_multiply_adds
from hgadlib.runs.experiment import build_model, prediction_rate
from hgadlib.runs.hardware import select_device
from hgadlib.runs.inputs import Inputs
from hgadlib.scoring import LevelValues, published_maps, upsampling_matrix
from hgadlib.training import fit

PARTS = ("backbone", "flow", "prior", "maps")


@dataclass(frozen=True)
class Complexity:
    """The cost of one configuration.

    Attributes:
        name: Of the configuration.
        image_size: Pixels a side, of the largest image where there is a pyramid.
        levels: (C, H, W) of each level.
        multiply_adds: Of one image from pixels to map, by part: "backbone", "flow", "prior", "maps".
        step: Multiply-adds per image of a training step from stored features, forward and backward.
        frozen: Parameters of the backbone (batch norms folded into the convolutions).
        flow: Learnable parameters of the flows.
        prior: Learnable parameters of the priors.
        epochs: Passes over the training images.
        train_batch: Images of a training step.
    """

    name: str
    image_size: int
    levels: tuple[tuple[int, int, int], ...]
    multiply_adds: dict[str, int]
    step: int
    frozen: int
    flow: int
    prior: int
    epochs: int
    train_batch: int

    @property
    def total(self) -> int:
        """Multiply-adds of one image from pixels to map."""
        return sum(self.multiply_adds.values())

    def training(self, images: int) -> dict[str, int]:
        """Count the multiply-adds of a whole training: features once or in every epoch, and all steps."""
        once = images * self.multiply_adds["backbone"]
        return {
            "features, once": once,
            "features, every epoch": once * self.epochs,
            "flow and prior": images * self.epochs * self.step,
        }


def learnable(modules: Iterable[nn.Module]) -> int:
    """Count the parameters that take a gradient."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def _shapes_only() -> contextlib.AbstractContextManager[Any]:
    """Let tensors made inside be shapes without numbers.

    PyTorch keeps this mode private, and its public relative, the device "meta", knows no autocast. Without it
    the numbers are computed: the counts are the same, after minutes.
    """
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode

        return FakeTensorMode(allow_non_fake_inputs=True)
    except Exception:
        return contextlib.nullcontext()


def measure_backbone(config: Config) -> tuple[Backbone, int, tuple[tuple[int, int, int], ...]]:
    """Build a backbone; count the multiply-adds of one image, and (C, H, W) of each level."""
    features, size = config.features, config.data.image_size
    backbone = build_backbone(
        features.backbone,
        out_indices=features.out_indices,
        pyramid=features.pyramid,
        weights="random",
        join=features.join,
        neighbourhood=features.neighbourhood,
    )
    maps: list[Tensor] = []
    with _shapes_only(), torch.no_grad():
        cost = count_multiply_adds(lambda: maps.extend(backbone(torch.zeros(1, 3, size, size))))
    return backbone, cost, tuple((m.shape[1], m.shape[2], m.shape[3]) for m in maps)


def measure_complexity(config: Config, n_classes: int, *, name: str | None = None) -> Complexity:
    """Count what a configuration costs with K classes; nothing is computed, and random weights will do.

    Raises:
        InputError: The backbone does not exist, or does not take images of that size.

    Source: paper App. A.6, Tab. 5.
    """
    backbone, backbone_cost, levels = measure_backbone(config)
    shapes = [(height * width, channels) for channels, height, width in levels]
    channels, grids = [level[0] for level in levels], [level[1:] for level in levels]
    classes = [f"class {k}" for k in range(n_classes)]
    model = HGAD(classes, channels, grids, flow=config.flow, prior=config.prior)
    costs = {"backbone": backbone_cost, **_scoring_costs(model, shapes, config)}
    return Complexity(
        name=name or config.experiment,
        image_size=config.data.image_size,
        levels=levels,
        multiply_adds=costs,
        step=_step_cost(model, shapes, config),
        frozen=sum(p.numel() for p in backbone.parameters()),
        flow=learnable(model.flows),
        prior=learnable(model.priors),
        epochs=config.train.epochs,
        train_batch=config.train.batch_size,
    )


def _scoring_costs(model: HGAD, shapes: Sequence[Sequence[int]], config: Config) -> dict[str, int]:
    """Count flow, prior and maps for one image."""
    size, sigma = config.score.map_size, config.score.sigma
    for grid in model.grids:  # kept by its cache, where a fake one must never lie
        for length in grid:
            upsampling_matrix(length, size, sigma)
    costs = dict.fromkeys(PARTS[1:], 0)
    log_probs, neg_entropies = [], []
    with _shapes_only(), torch.no_grad():
        own = torch.zeros(1, dtype=torch.int64)
        for (flow, prior), grid, shape in zip(model.levels, model.grids, shapes, strict=True):
            x = torch.zeros(1, *shape)
            costs["flow"] += count_multiply_adds(partial(flow, x))
            z = flow(x)[0]
            prior.log_prob(z, own)  # what is prepared once is no image's
            costs["prior"] += count_multiply_adds(partial(prior.log_prob, z, own))
            log_probs.append(torch.zeros(1, *grid))
            if isinstance(prior, HierarchicalGaussianMixture):
                costs["prior"] += count_multiply_adds(partial(prior.neg_entropy, z))
                neg_entropies.append(torch.zeros(1, *grid))
        values, constants = LevelValues(tuple(log_probs), tuple(neg_entropies)), model.normalisation(own)
        costs["maps"] = count_multiply_adds(
            lambda: published_maps(
                values, constants, size=size, sigma=sigma, criterion=config.score.criterion
            )
        )
    return costs


def _step_cost(model: HGAD, shapes: Sequence[Sequence[int]], config: Config) -> int:
    """Count a second-stage training step on one image, forward and backward.

    Images of a class share the whitening of its centres: a step on many costs less for each.
    """
    names = ("lambda1", "lambda2", "lambda_e", "lambda_in", "lambda_z")
    weights = {name: getattr(config.loss, name) for name in names}

    def step() -> None:
        terms = model.losses(features, own, intra=True, extended=config.loss.extended, **weights)
        torch.stack([t["total"] for t in terms]).sum().backward()

    with _shapes_only():
        features = [torch.zeros(1, *shape) for shape in shapes]
        own = torch.zeros(1, dtype=torch.int64)
        cost = count_multiply_adds(step)
    model.zero_grad(set_to_none=True)
    return cost


def coupling_multiply_adds(channels: int, grid: tuple[int, int], *, position_dim: int, hidden: int) -> int:
    """Work out by hand what one positional coupling block costs for one image, to check the counter.

    Per position: the subnet's two layers and the rotation. Once per grid: the position's share of the first
    layer, the same for every image: a sum of one code per row and one per column, half of the channels each.

    Args:
        channels: C.
        grid: (H, W).
        position_dim: P.
        hidden: Width of the subnet.

    >>> coupling_multiply_adds(2, (1, 1), position_dim=4, hidden=3)
    25
    """
    kept, moved = channels - channels // 2, channels // 2
    each = kept * hidden + hidden * 2 * moved + channels**2
    return grid[0] * grid[1] * each + sum(grid) * (position_dim // 2) * hidden


def stage_choices(
    levels: Sequence[tuple[int, int, int]],
    *,
    backbone: int,
    layers: int,
    position_dim: int,
    hidden_ratio: float,
    counts: Sequence[int] = (2, 3, 4),
) -> pd.DataFrame:
    """Work out what the flow would cost on every choice of a network's stages, where a text leaves it open.

    Args:
        levels: (C, H, W) of each stage of the network.
        backbone: Its multiply-adds.
        layers: Coupling blocks of each flow.
        position_dim: P.
        hidden_ratio: Width of the subnets over their inputs.
        counts: How many stages to choose.

    Returns:
        A row a choice: its stages, multiply-adds and FLOPs in 1e9, learnable parameters in 1e6, and
        those with the fixed rotations and their inverses, which FrEIA keeps as parameters without gradient.
    """
    rows = []
    for count in counts:
        for stages in combinations(range(len(levels)), count):
            cost, parameters, rotations = backbone, 0, 0
            for channels, height, width in (levels[stage] for stage in stages):
                kept, moved = channels - channels // 2, channels // 2
                hidden = max(1, round(hidden_ratio * (kept + position_dim)))
                cost += layers * coupling_multiply_adds(
                    channels, (height, width), position_dim=position_dim, hidden=hidden
                )
                subnet = (kept + position_dim + 1) * hidden + (hidden + 1) * 2 * moved
                parameters += layers * (subnet + 2 * channels)
                rotations += layers * 2 * channels**2
            rows.append(
                {
                    "stages": ", ".join(map(str, stages)),
                    "G multiply-adds": cost / 1e9,
                    "GFLOP": 2 * cost / 1e9,
                    "learnable parameters (M)": parameters / 1e6,
                    "with rotations (M)": (parameters + rotations) / 1e6,
                }
            )
    return pd.DataFrame(rows).set_index("stages")


def nearest_choices(choices: pd.DataFrame, paper: Mapping[str, float]) -> dict[str, str]:
    """Name the choice of stages that comes nearest to the paper's row in each column, and how near."""
    found = {}
    for name in choices:
        column = str(name)
        wanted = paper["learnable_parameters" if "(M)" in column else "flops"]
        stages = str((choices[column] - wanted).abs().idxmin())
        found[column] = f"{stages}: {choices[column][stages]:.1f}, paper {wanted:g}"
    return found


def cost_table(costs: Sequence[Complexity]) -> pd.DataFrame:
    """Set configurations side by side: what each part costs, and what is learnt.

    Returns:
        A column a configuration; multiply-adds in 1e9 and parameters in 1e6, and GFLOP as twice the former.
    """
    columns = {}
    for cost in costs:
        parts = {f"{part} (G multiply-adds)": cost.multiply_adds[part] / 1e9 for part in PARTS}
        columns[cost.name] = {
            **parts,
            "all, pixels to map (G multiply-adds)": cost.total / 1e9,
            "all, pixels to map (GFLOP)": 2 * cost.total / 1e9,
            "training step per image, from features (G multiply-adds)": cost.step / 1e9,
            "frozen parameters (M)": cost.frozen / 1e6,
            "learnable parameters, flow (M)": cost.flow / 1e6,
            "learnable parameters, prior (M)": cost.prior / 1e6,
            "learnable parameters (M)": (cost.flow + cost.prior) / 1e6,
            "training epochs": float(cost.epochs),
        }
    return pd.DataFrame(columns)


def paper_row(method: str) -> dict[str, float]:
    """Read what the paper's Tab. 5 says of a method, such as "HGAD" or "CFLOW": number by metric.

    "flops" are in 1e9, "learnable_parameters" in 1e6, "inference_speed" in images/s; "training_epochs".
    """
    table = read_table("table5").query("method == @method").dropna(subset="value")
    return dict(zip(table["metric"], table["value"].astype(float), strict=True))


def beside_paper(cost: Complexity, methods: Sequence[str]) -> pd.DataFrame:
    """Set rows of the paper's Tab. 5 beside what was counted here for the configuration of its text.

    Returns:
        Text: a row a method, the last two ours, by multiply-adds and by FLOPs; what is missing is called so.
    """
    heads = {"flops": "FLOPs (G)", "learnable_parameters": "learnable parameters (M)"}
    heads |= {"inference_speed": "images/s", "training_epochs": "epochs"}
    rows: dict[str, dict[str, str]] = {}
    for method in methods:
        found = paper_row(method)
        rows[f"paper: {method}"] = {
            head: f"{found[key]:g}" if key in found else "not available" for key, head in heads.items()
        }
    ours = [f"{(cost.flow + cost.prior) / 1e6:.1f}", "not measured", str(cost.epochs)]
    for name, unit in (("multiply-adds", 1), ("FLOPs", 2)):
        values = [f"{unit * cost.total / 1e9:.1f}", *ours]
        rows[f"counted here, {name}"] = dict(zip(heads.values(), values, strict=True))
    return pd.DataFrame(rows).T


def cost_bars(
    costs: Mapping[str, Mapping[str, float]], *, label: str = "multiply-adds per image, from pixels to map"
) -> Axes:
    """Draw what each part of each configuration costs, a group of bars a configuration, on a log scale.

    Args:
        costs: Name of the configuration to multiply-adds by part.
        label: Of the axis.

    Raises:
        InputError: There is no configuration, or they differ in their parts.
    """
    table = pd.DataFrame(costs).T
    if table.empty or table.isna().to_numpy().any():
        raise InputError("expected the same parts of at least one configuration; found others")
    ax = plt.subplots(figsize=(6.4, 0.5 + 0.32 * table.size))[1]
    table.plot.barh(ax=ax, logx=True, width=0.8, color=list(PALETTE), edgecolor="white")
    for bars in ax.containers:
        ax.bar_label(bars, fmt=EngFormatter(places=1), padding=3, fontsize=8)  # type: ignore[arg-type]
    ax.margins(x=0.12)
    ax.invert_yaxis()
    ax.set_xlabel(label)
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def stage_map(choices: pd.DataFrame, paper: Mapping[str, float]) -> Axes:
    """Draw the cost of each choice of stages against its parameters, and where the paper's row lies."""
    ax = plt.subplots(figsize=(5.6, 3.8))[1]
    x, y = choices["learnable parameters (M)"], choices["GFLOP"]
    rotated = choices["with rotations (M)"]
    for name, a, b, c in zip(choices.index, x, rotated, y, strict=True):
        ax.plot([a, b], [c, c], color="0.75", linewidth=1, zorder=1)
        ax.annotate(f" {name}", (b, c), fontsize=7, color="0.35", va="center")
    ax.scatter(x, y, s=22, color=PALETTE[0], label="learnable parameters", zorder=2)
    ax.scatter(
        rotated, y, s=22, facecolor="white", edgecolor=PALETTE[0], label="with the fixed rotations", zorder=2
    )
    ax.scatter(
        paper["learnable_parameters"], paper["flops"], s=110, marker="X", color=ANOMALOUS_COLOR,
        edgecolors="black", label="paper, Tab. 5", zorder=3,
    )  # fmt: skip
    ax.margins(x=0.12)
    ax.set(xlabel="parameters (M)", ylabel="GFLOP per image, pixels to latent")
    ax.legend(loc="best")
    return ax


def measure_throughput(config: Config, *, images: int = 48, epochs: int = 4) -> dict[str, float]:
    """Time a short run on some images of a dataset, spread over its classes; nothing of it is kept.

    Args:
        config: Dataset, features, flow, prior, training and scores.
        images: Training images, and test images, to time with.
        epochs: Of the training; half without and half with the intra-class terms.

    Returns:
        Images/s: "features" (file to features), "training" (from stored features, the median epoch of the
        second stage), "prediction" (file to map).
    """
    device = select_device(config.device)
    dataset = load_dataset(config.dataset, root=config.data.root, download=config.data.download, seed=0)
    some = [records[:: max(1, len(records) // images)][:images] for records in (dataset.train, dataset.test)]
    dataset = replace(dataset, records=(*some[0], *some[1]))
    backbone = build_backbone(
        config.features.backbone,
        out_indices=config.features.out_indices,
        pyramid=config.features.pyramid,
        weights=config.features.weights,
        join=config.features.join,
        neighbourhood=config.features.neighbourhood,
    ).to(device)
    backbone.grids(config.data.image_size)  # the first pass is slow
    features = dataset_features(
        dataset.train,
        backbone,
        image_size=config.data.image_size,
        resize=config.data.resize,
        dtype=config.features.dtype,
        device=device,
        keep=False,
        batch_size=config.features.batch_size,
        num_workers=config.data.num_workers,
        progress=False,
    )
    inputs = Inputs(dataset, backbone, features, features, device)
    model = build_model(config, inputs)
    train = replace(config.train, epochs=epochs, first_stage=0.5)
    history = fit(model, features, inputs.train_classes, train=train, loss=config.loss, progress=False)
    second = history[history["stage"] == 2]["images_per_s"]
    return {
        "features": len(dataset.train) / features.seconds,
        "training": float(second.median()),
        "prediction": prediction_rate(config, inputs, model, images=images),
    }


_RECORDED = {
    "config.features.backbone": "backbone",
    "config.data.image_size": "pixels",
    "config.features.pyramid": "pyramid",
    "config.flow.layers": "flow layers",
    "environment.device": "device",
    "timing.train_images_per_s": "training (images/s)",
    "timing.predict_images_per_s": "prediction (images/s)",
    "record": "records",
}


def recorded_rates(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Gather the rates that the ledger's runs recorded: a row for equal settings on equal hardware.

    Returns:
        Columns of the settings, device, the medians of both rates, and records, a list of names.
    """
    table = pd.json_normalize([dict(record) for record in records])
    table = table.reindex(columns=list(_RECORDED)).rename(columns=_RECORDED)
    table["pyramid"] = [", ".join(map(str, sizes or [])) or "none" for sizes in table["pyramid"]]
    *settings, training, prediction, names = _RECORDED.values()
    groups = table.groupby(settings, as_index=False, sort=False)
    return groups.agg({training: "median", prediction: "median", names: list})


def benchmark_ratios(folder: Path | None = None) -> pd.DataFrame:
    """Collect the speed-ups that benchmarks committed as JSON lines: a row a line that has one.

    Args:
        folder: Where the files lie; None for results/benchmarks.

    Returns:
        Columns benchmark, case (what was compared), times as fast (the median), from, to (NaN where a
        ratio is of one measurement), device, threads and file; no row where nothing is committed.
    """
    rows = []
    for file in sorted((folder or project_dir() / "results" / "benchmarks").glob("*.jsonl")):
        machine: dict[str, Any] = {"device": "not recorded", "threads": 0, "file": file.name}
        for entry in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if entry["what"] == "environment":
                device = entry["machine"] if entry.get("device", "cpu") == "cpu" else entry["device"]
                machine |= {"device": device, "threads": entry.get("threads", 0)}
            elif entry["what"] == "speedup":
                times = entry["median"] if "median" in entry else entry["ratio"]
                row = {"benchmark": entry["benchmark"], "case": _case(entry), "times as fast": times}
                rows.append(row | {"from": entry.get("min"), "to": entry.get("max")} | machine)
    columns = ["benchmark", "case", "times as fast", "from", "to", "device", "threads", "file"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[2:5], float))


def _case(entry: Mapping[str, Any]) -> str:
    """Put in words what a benchmark's line compares."""
    words = []
    if "channels" in entry:
        words.append(f"{entry['channels']} channels on {entry['grid'][0]} x {entry['grid'][1]}")
    if "setting" in entry:
        words.append(f"{entry['setting']} setting")
    if "at_a_time" in entry:
        words.append(f"{entry['at_a_time']} at a time")
    words += [str(entry[key]).replace("_", " ") for key in ("task", "of") if key in entry]
    if "over" in entry and entry["benchmark"] == "metrics":
        words.append(f"over {entry['over']}".replace("_", " "))
    return ", ".join(words)


def cost_sentences(
    cost: Complexity, nearest: Mapping[str, str], rates: Mapping[str, float], device: str, images: int
) -> list[str]:
    """Sum the chapter up: what an image costs, the paper's row, what was measured, features once.

    Args:
        cost: Of this book's own configuration.
        nearest: From :func:`nearest_choices`.
        rates: From :func:`measure_throughput`.
        device: On which they were measured.
        images: Of a whole training.
    """
    shares = {part: 100 * count / cost.total for part, count in cost.multiply_adds.items()}
    stages = {column: text.split(":")[0] for column, text in nearest.items()}
    if len(set(stages.values())) == 1:
        row = (
            f"Stages {next(iter(stages.values()))} come nearest to the paper's row of Tab. 5 in every column."
        )
    else:
        named = "; ".join(f"{choice} in {column}" for column, choice in stages.items())
        row = f"No one choice of stages comes nearest to the paper's row of Tab. 5 in every column: {named}."
    work = cost.training(images)
    saved = (work["features, every epoch"] + work["flow and prior"]) / (
        work["features, once"] + work["flow and prior"]
    )
    return [
        f"One image costs {cost.total / 1e9:.1f} G multiply-adds in the {cost.name} configuration: "
        + ", ".join(f"{share:.2g} % {part}" for part, share in shares.items())
        + ".",
        row,
        f"Measured here on {device}: {rates['prediction']:.1f} images/s from file to map, "
        f"{rates['training']:.0f} in training from stored features.",
        f"Features computed once make a training of {images} images {saved:.1f} times less work.",
    ]
