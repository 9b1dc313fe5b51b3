"""One run, end to end: model, fit, evaluation, record. The steps that chapters call."""

from __future__ import annotations

import sys
import time
import typing
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from hgadlib.baselines import METHODS
from hgadlib.baselines.neighbours import Neighbours
from hgadlib.baselines.one_for_one import OneForOne, model_type
from hgadlib.config import Config
from hgadlib.datasets.images import load_images
from hgadlib.datasets.records import ImageRecord
from hgadlib.distributed import ALONE, Group
from hgadlib.evaluation.class_inference import evaluate_inferred
from hgadlib.evaluation.evaluate import Evaluation, Protocol, evaluate, level_values
from hgadlib.evaluation.likelihoods import compare_likelihoods
from hgadlib.evaluation.predict import predict_batches
from hgadlib.features.store import spread_sample
from hgadlib.method import Method
from hgadlib.model import HGAD
from hgadlib.runs.directory import RunDirectory, read_history, read_metrics
from hgadlib.runs.gallery import gallery, write_maps
from hgadlib.runs.inputs import Inputs, class_masks
from hgadlib.runs.record import Result, history_columns, metrics_record, scores_record
from hgadlib.scoring import Criterion
from hgadlib.training import calibrate, fit

# Images of each class that moments and means are taken from, and images held at a time.
_SAMPLE, _BATCH = 64, 32


def build_model(config: Config, inputs: Inputs) -> Method:
    """Build the model for these inputs: seeded, on their device, initialised from training features."""
    torch.manual_seed(config.seed)
    names, shape = inputs.dataset.classes, (inputs.train.channels, inputs.train.grids)
    per_dimension = config.score.per_dimension
    if config.method == "neighbours":
        of = inputs.train, inputs.train_classes
        return Neighbours.for_features(names, *of, per_dimension=per_dimension).to(inputs.device)
    if config.method != "hgad":
        make: Any = METHODS[config.method]
        own = config.features  # what a student is made of
        more = {"backbone": own.backbone, "stages": own.out_indices} if config.method == "stfpm" else {}
        model: Method = make(names, *shape, baseline=config.baseline, **more)
        return model.to(inputs.device)
    model = HGAD(names, *shape, flow=config.flow, prior=config.prior, per_dimension=per_dimension)
    model.to(inputs.device)
    # As many of each class, so that no class outweighs another.
    sample = spread_sample(inputs.train_classes, len(names), _SAMPLE)
    labels = torch.from_numpy(inputs.train_classes).to(inputs.device)

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
) -> Method:
    """Train, or load what this run has trained already; resumes from the run's checkpoint.

    The calibrated model is saved in the run's directory, with its history. Of processes that train together
    the first alone writes and has a calibrated model. An observer is called as train.evaluate_every says;
    then the history also has a row of the untrained model, epoch 0.

    Raises:
        InputError: The run's directory is of other images, a file in it is damaged, or the inputs were
            prepared for other settings.
        FloatingPointError: The loss is no longer finite.
    """
    inputs.check(config)
    if group.is_main:
        run.start(inputs.identity())
    group.wait()  # from here on what lies in the directory is this run's
    if run.model.is_file():
        return model_type(config).load(run.model, inputs.device)
    if config.setting == "one_for_one":
        return _train_each(config, inputs, run, progress=progress, group=group)
    model = build_model(config, inputs)
    if group.is_main:
        run.write_environment(inputs.device, processes=group.size)
    if not model.learns:  # one pass: no epochs to follow
        if group.is_main:
            run.write_history(
                model.fit(inputs.train, inputs.train_classes, inputs.calibration, seed=config.seed)
            )
            model.save(run.model)
        return model
    every, last = config.train.evaluate_every, config.train.epochs
    if every and group.is_main:
        class_masks(config, inputs)  # a bad one ends the run now and not after some epochs

    def look(epoch: int, current: Method) -> dict[str, float]:
        if not every or (epoch % every and epoch != last):
            return {}
        if observer is not None and epoch and isinstance(current, HGAD):
            observer.measure(epoch, current)
        if epoch == last:
            return {}  # finish_run evaluates the trained model
        calibrate(current, inputs.train, inputs.train_classes, inputs.calibration)
        return history_columns(evaluate_model(config, inputs, current, all_protocols=False))

    def write(history: pd.DataFrame) -> None:
        run.write_history(history)
        if observer is not None and every:
            observer.write(int(history["epoch"].iloc[-1]))

    fit(
        model, inputs.train, inputs.train_classes, inputs.calibration,
        train=config.train, loss=config.loss, seed=config.seed,
        checkpoint=run.checkpoint, on_epoch=look, on_history=write, progress=progress, group=group,
    )  # fmt: skip
    if group.is_main:
        model.save(run.model)
    return model


def _train_each(
    config: Config, inputs: Inputs, run: RunDirectory, *, progress: bool, group: Group
) -> OneForOne:
    """Train a model for each class, each in a run of its own below the run's directory; resumes likewise.

    The history has the means over the classes, of an epoch, and the sum of their seconds.
    """
    models, histories = [], []
    for k, name in enumerate(inputs.dataset.classes):
        own = replace(
            config, setting="unified", run_dir=str(run.path / "classes" / f"{k:03d}"),
            train=replace(config.train, evaluate_every=0),
        )  # fmt: skip
        if progress and group.is_main:
            tqdm.write(f"class {name}, {k + 1} of {len(inputs.dataset.classes)}", file=sys.stderr)
        part = RunDirectory.open(own)
        models.append(train_model(own, inputs.only(k), part, progress=progress, group=group))
        histories.append(read_history(part.path) if group.is_main else pd.DataFrame())
    model = OneForOne(models).to(inputs.device)
    if group.is_main:
        run.write_environment(inputs.device, processes=group.size)
        history = pd.concat(histories).groupby("epoch", as_index=False).mean()
        history["seconds"] *= len(models)
        history["images_per_s"] = len(inputs.train) / history["seconds"]
        run.write_history(history)
        calibrate(model, inputs.train, inputs.train_classes, inputs.calibration)
        model.save(run.model)
    return model


def evaluate_model(config: Config, inputs: Inputs, model: Method, *, all_protocols: bool = True) -> Result:
    """Evaluate a calibrated model on the test set by every protocol or only the first; writes nothing.

    With all protocols also by inferred classes, where the model can tell some apart.
    """
    started = time.perf_counter()
    # By name: a model may know more classes than are tested, in another order.
    class_idx = model.class_idx(record.class_name for record in inputs.dataset.test).cpu().numpy()
    known = model.class_idx(inputs.dataset.classes).tolist()
    masks = {known[k]: own for k, own in class_masks(config, inputs).items()}
    values = level_values(model, inputs.test, class_idx)
    truth, labelled = (class_idx, inputs.test_labels, masks), inputs.test_labelled

    def under(protocol: Protocol) -> Evaluation:
        return evaluate(model, values, *truth, score=config.score, protocol=protocol, labelled=labelled)

    headline = under(Protocol(config.score.normalisation, config.criterion))
    seconds = time.perf_counter() - started
    criteria = get_args(Criterion) if model.has_entropy else ("likelihood",)
    names: list[Any] = ["inductive", "transductive"] if model.has_constants else []
    names += ["calibrated"] if model.is_calibrated else []  # models of before lack the statistics
    ways = [Protocol(name, criterion) for name in names for criterion in criteria]
    rest = [under(way) for way in ways if all_protocols and way != headline.protocol]
    by_protocol = {found.protocol.name: found for found in (headline, *rest)}
    n_classes = len(model.classes)
    likelihoods = compare_likelihoods(values.log_prob, *truth, labelled=labelled, n_classes=n_classes)
    inferred = {}
    if all_protocols and isinstance(model, HGAD) and model.has_entropy and n_classes > 1:
        inferred = evaluate_inferred(
            model, inputs.test, values, *truth,
            score=config.score, protocol=headline.protocol, labelled=labelled,
        )  # fmt: skip
    return Result(values, headline, likelihoods, by_protocol, seconds, inferred)


def finish_run(config: Config, inputs: Inputs, model: Method, run: RunDirectory) -> Result:
    """Evaluate the trained model and complete the run's record; a whole record is read, not made again."""
    run.start(inputs.identity())
    result = evaluate_model(config, inputs, model, all_protocols=not run.complete)
    if run.complete:
        return replace(result, metrics=read_metrics(run.path))
    history = read_history(run.path)
    if config.train.evaluate_every:  # training looked at the test set before the last epoch
        for name, value in history_columns(result).items():
            history.loc[history.index[-1], name] = value
        run.write_history(history)
    rate = prediction_rate(config, inputs, model)
    run.write_arrays("scores", scores_record(inputs, result))
    write_maps(run.path / "maps", gallery(config, inputs, result))
    metrics = metrics_record(config, inputs, model, result, history, predict_images_per_s=rate)
    return replace(result, metrics=run.finish(metrics))


def predict_files(
    config: Config, inputs: Inputs, model: Method, records: Sequence[ImageRecord]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Score images of known class from their files, by the run's settings: see :func:`predict_batches`."""
    images = load_images(
        [record.path for record in records], size=config.data.image_size, resize=config.data.resize,
        mean=inputs.backbone.mean, std=inputs.backbone.std, batch_size=config.features.batch_size,
        num_workers=config.data.num_workers, bit_depths=[record.bit_depth for record in records],
    )  # fmt: skip
    names, dtype = [record.class_name for record in records], config.features.dtype
    return predict_batches(inputs.backbone, model, images, names, score=config.score, dtype=dtype)


def prediction_rate(config: Config, inputs: Inputs, model: Method, *, images: int = 64) -> float:
    """Measure images per second from file to map, on some test images after a warm-up batch."""
    # Spread over the test set: image files of different classes differ in size.
    records = inputs.dataset.test[:: max(1, len(inputs.dataset.test) // images)][:images]
    for part in (records[: config.features.batch_size], records):
        started = time.perf_counter()
        for _ in predict_files(config, inputs, model, part):
            pass
    return len(records) / (time.perf_counter() - started)
