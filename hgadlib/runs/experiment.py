"""One run, end to end: model, fit, evaluation, record. The steps that chapters call."""

from __future__ import annotations

import time
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from hgadlib.config import Config
from hgadlib.distributed import ALONE, Group
from hgadlib.evaluation.evaluate import Evaluation, Protocol, evaluate, level_values
from hgadlib.evaluation.predict import prediction_rate
from hgadlib.features.store import spread_sample
from hgadlib.model import HGAD
from hgadlib.runs.directory import RunDirectory, read_history, read_metrics
from hgadlib.runs.gallery import gallery, write_maps
from hgadlib.runs.inputs import Inputs, class_masks
from hgadlib.runs.record import Result, likelihood_columns, metrics_record, scores_record
from hgadlib.scoring import LevelValues
from hgadlib.training import calibrate, fit

# Images of each class that moments and means are taken from, and images held at a time.
_SAMPLE, _BATCH = 64, 32


def build_model(config: Config, inputs: Inputs) -> HGAD:
    """Make the model for these inputs: seeded, on their device, initialised from training features."""
    torch.manual_seed(config.seed)
    model = HGAD(
        inputs.dataset.classes,
        inputs.train.channels,
        inputs.train.grids,
        flow=config.flow,
        prior=config.prior,
        per_dimension=config.score.per_dimension,
    ).to(inputs.device)
    classes = inputs.train_classes
    # As many of each class, so that no class outweighs another.
    sample = spread_sample(classes, len(inputs.dataset.classes), _SAMPLE)
    labels = torch.from_numpy(classes).to(inputs.device)

    def batches() -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        for index, features in inputs.train.batches(sample.split(_BATCH), inputs.device):
            yield features, labels[index.to(inputs.device)]

    model.initialise(batches)
    return model


class Observer(typing.Protocol):
    """Follows a training beside the history, wherever the test set is looked at, the last epoch included."""

    def measure(self, epoch: int, model: HGAD) -> None:
        """Look at the model after an epoch; it must not change."""

    def write(self, last_epoch: int) -> None:
        """Keep what was measured up to an epoch, whose row history.csv now holds."""


def train_model(
    config: Config,
    inputs: Inputs,
    run: RunDirectory,
    *,
    progress: bool = True,
    group: Group = ALONE,
    observer: Observer | None = None,
) -> HGAD:
    """Train, or load what this run has trained already; resumes from the run's checkpoint.

    Args:
        config: Of the run.
        inputs: Of the run.
        run: Its directory.
        progress: Show a bar.
        group: The processes that train it together. The first one alone writes the directory and has a
            calibrated model in the end.
        observer: Called in the evaluated epochs, see train.evaluate_every.

    Returns:
        The calibrated model, also saved in the run's directory with its history.

    Raises:
        InputError: The run's directory is of other images, or a file in it is damaged.
        FloatingPointError: The loss is no longer finite.
    """
    if group.is_main:
        run.start(inputs.identity())
    group.wait()  # from here on what lies in the directory is this run's
    if run.model.is_file():
        return HGAD.load(run.model, inputs.device)
    model = build_model(config, inputs)
    if group.is_main:
        run.write_environment(inputs.device, processes=group.size)
    every = config.train.evaluate_every
    masks = class_masks(config, inputs) if every else {}

    def test(epoch: int, current: HGAD) -> dict[str, float]:
        if not every or (epoch % every and epoch != config.train.epochs):
            return {}
        calibrate(current, inputs.train, inputs.train_classes)
        values = level_values(current, inputs.test, inputs.test_classes)
        mean = evaluate_protocol(config, inputs, current, values, masks, headline(config)).mean
        if observer is not None:
            observer.measure(epoch, current)
        found = {f"test_{name}": mean[name] for name in ("image_auroc", "pixel_auroc")}
        return {name: value for name, value in found.items() if value is not None} | likelihood_columns(
            inputs, values, masks
        )

    def write(history: pd.DataFrame) -> None:
        run.write_history(history)
        if observer is not None:
            observer.write(int(history["epoch"].iloc[-1]))

    fit(
        model,
        inputs.train,
        inputs.train_classes,
        train=config.train,
        loss=config.loss,
        seed=config.seed,
        checkpoint=run.checkpoint,
        on_epoch=test,
        on_history=write,
        progress=progress,
        group=group,
    )
    if group.is_main:
        model.save(run.model)
    return model


def headline(config: Config) -> Protocol:
    """Give the protocol whose figures stand first in the record."""
    # One Gaussian for all classes knows no entropy over them.
    criterion = "likelihood" if config.prior.kind == "single" else config.score.criterion
    return Protocol(config.score.normalisation, criterion)


def evaluate_protocol(
    config: Config,
    inputs: Inputs,
    model: HGAD,
    values: LevelValues,
    masks: dict[int, np.ndarray] | None,
    protocol: Protocol,
) -> Evaluation:
    """Evaluate the run's test set under one protocol."""
    return evaluate(
        model,
        values,
        inputs.test_classes,
        inputs.test_labels,
        masks,
        score=config.score,
        protocol=protocol,
        labelled=inputs.test_labelled,
    )


def finish_run(config: Config, inputs: Inputs, model: HGAD, run: RunDirectory) -> Result:
    """Evaluate the test set under every protocol and complete the run's record.

    A record that is whole is read, not made again; level values and maps are computed for the figures.
    """
    run.start(inputs.identity())
    started = time.perf_counter()
    values = level_values(model, inputs.test, inputs.test_classes)
    masks = class_masks(config, inputs)
    first = headline(config)
    evaluation = evaluate_protocol(config, inputs, model, values, masks, first)
    evaluate_s = time.perf_counter() - started
    if run.complete:
        return Result(read_metrics(run.path), values, evaluation)
    others = {first.name: evaluation}
    for protocol in protocols(model):
        if protocol.name not in others:
            others[protocol.name] = evaluate_protocol(config, inputs, model, values, masks, protocol)
    metrics: dict[str, Any] = metrics_record(
        config,
        inputs,
        evaluation,
        others,
        read_history(run.path),
        evaluate_s=evaluate_s,
        predict_images_per_s=prediction_rate(config, inputs, model),
    )
    result = Result(metrics, values, evaluation)
    run.write_arrays("scores", scores_record(inputs, values, evaluation, masks))
    write_maps(run.path / "maps", gallery(config, inputs, result))
    return Result(run.finish(metrics), values, evaluation)


def protocols(model: HGAD) -> list[Protocol]:
    """List the ways in which this model's values can be scored."""
    if not model.has_entropy:
        return [Protocol("inductive", "likelihood"), Protocol("transductive", "likelihood")]
    return [
        Protocol(normalisation, criterion)
        for normalisation in ("inductive", "transductive")
        for criterion in ("likelihood", "entropy", "both")
    ]
