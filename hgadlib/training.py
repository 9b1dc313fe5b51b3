"""The two-stage fit of flows and priors on stored features: readable top to bottom."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from hgadlib.config import LossConfig, TrainConfig
from hgadlib.distributed import ALONE, Group
from hgadlib.errors import InputError
from hgadlib.features.store import Features, spread_sample
from hgadlib.method import Method, read_tensors, write_tensors
from hgadlib.model import HGAD
from hgadlib.progress import progress_bar
from hgadlib.scoring import LevelValues

Labelled = tuple[Features, np.ndarray]
"""Features of N images and their classes, (N,)."""

_ADVICE = "lower train.lr or set train.gradient_clip"


def learning_rate(progress: float, config: TrainConfig) -> float:
    """Return the learning rate at a share of the training.

    Args:
        progress: Share of all steps done, 0 to 1.
        config: "step" drops the rate tenfold at each milestone, "cosine" lets it fall to
            ``lr * final_lr_ratio``; a warm-up rises linearly from ``lr * warmup_start_ratio``.
    Source: paper Sec. 4.2 (step); the released code (cosine with warm-up).
    """
    if progress < config.warmup:
        start = config.warmup_start_ratio
        return config.lr * (start + (1 - start) * progress / config.warmup)
    if config.schedule == "step":
        return config.lr * 0.1 ** sum(progress >= milestone for milestone in config.milestones)
    if config.schedule == "cosine":
        done = (progress - config.warmup) / max(1 - config.warmup, 1e-12)
        low = config.final_lr_ratio
        return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
    return config.lr


def build_optimiser(model: Method, config: TrainConfig) -> torch.optim.Optimizer:
    """Make one Adam over all flows and priors; fused where the device has it."""
    prior = [p for p in model.undecayed() if p.requires_grad]
    apart = set(map(id, model.undecayed()))
    rest = [p for p in model.parameters() if id(p) not in apart]
    groups: list[dict[str, Any]] = [{"params": rest, "weight_decay": config.weight_decay}]
    if prior:
        groups.append({"params": prior, "weight_decay": config.weight_decay if config.decay_prior else 0.0})
    return torch.optim.Adam(groups, lr=config.lr, betas=config.betas, fused=True)


def first_stage_epochs(config: TrainConfig) -> int:
    """Return how many epochs have no intra-class terms: the configured share, rounded up, but never all."""
    return min(_epochs(config.first_stage, config), config.epochs - 1)


def _epochs(share: float, config: TrainConfig) -> int:
    """Round a share of the epochs up; 0.07 * 100 is a little more than 7 in binary, and no eighth epoch."""
    return math.ceil(round(share * config.epochs, 6))


def batch_order(n: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Shuffle an epoch's images into batches; a function of seed and epoch, so a resumed run repeats it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    # Sorted within the batch: the gather from host memory or file then reads forwards.
    return [b.sort().values for b in torch.randperm(n, generator=generator).split(batch_size)]


def fit(
    model: Method,
    features: Features,
    class_idx: np.ndarray,
    held_out: Labelled | None = None,
    *,
    train: TrainConfig,
    loss: LossConfig,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_s: float = 15.0,
    on_epoch: Callable[[int, Method], dict[str, float]] | None = None,
    on_history: Callable[[pd.DataFrame], None] | None = None,
    progress: bool = True,
    group: Group = ALONE,
) -> pd.DataFrame:
    """Train all levels together and calibrate the scores.

    First stage: Eq. 6 and 8 (and 9 where configured). Second stage: the whole of Eq. 11. The trained model
    has the last epoch's weights, or with ``train.average`` their mean over the ends of the last epochs.

    Args:
        model: Initialised model, on the device to train on.
        features: Of the training images.
        class_idx: Class of each training image, (N,).
        held_out: Features and classes of normal images that are not trained on, to calibrate the scores.
        train: Epochs, optimiser, schedule.
        loss: Weights of the terms.
        seed: Of the batches' order, of noise and dropout.
        checkpoint: File to save to between epochs, and to resume from if it exists.
        checkpoint_s: Seconds that pass at least from one save to the next; the last epoch is always saved.
            A resumed run repeats the epochs since, to the same result.
        on_epoch: Called with 0 before the first epoch, and after each one with its number and the model of
            that moment; what it returns becomes columns of the history.
        on_history: Called with the history so far after each epoch, before a checkpoint is written.
        progress: Show a bar.
        group: The processes that share the batches; the first one alone evaluates and writes.
    Returns:
        History, a row an epoch: mean of every loss term, learning rate, seconds, images/s. Before them one
        of epoch 0, without losses, where on_epoch says something of the untrained model.
    Raises:
        FloatingPointError: The loss is no longer finite.
        InputError: The checkpoint is damaged.
    Source: paper Alg. 1, Sec. 4.2 and App. C.
    """
    labels = torch.as_tensor(class_idx, dtype=torch.int64, device=model.device)
    n_images, stage_two = len(labels), first_stage_epochs(train)
    group.align(model)
    optimiser = build_optimiser(model, train)
    averaged_epochs = _epochs(train.average, train)
    average = AveragedModel(model) if averaged_epochs else None
    rows: list[dict[str, Any]] = []
    if checkpoint is not None and checkpoint.is_file():
        rows = load_checkpoint(checkpoint, model, optimiser, average)
    elif group.is_main and on_epoch is not None and (untrained := on_epoch(0, model)):
        rows = [{"epoch": 0, "stage": 1 if stage_two else 2, **untrained}]
    done, saved_at, show = rows[-1]["epoch"] if rows else 0, time.monotonic(), progress and group.is_main
    with progress_bar(train.epochs * n_images, "train", initial=done * n_images, show=show) as bar:
        for epoch in range(done, train.epochs):
            started = time.perf_counter()
            if epoch == stage_two and isinstance(model, HGAD) and model.splits_centers:
                split_centers(model, features, labels, seed=seed)
                group.align(model)
            with _training_mode(model, seed, epoch):
                means = fit_epoch(
                    model, optimiser, features, labels, epoch,
                    train=train, loss=loss, seed=seed, group=group, advance=bar.update,
                )  # fmt: skip
            if average is not None and epoch >= train.epochs - averaged_epochs:
                average.update_parameters(model)
            seconds = time.perf_counter() - started
            rows.append({"epoch": epoch + 1, "stage": 1 if epoch < stage_two else 2, **means})
            rows[-1] |= {"seconds": seconds, "images_per_s": n_images / seconds}
            bar.set_postfix_str(f"epoch {epoch + 1}/{train.epochs}, loss {means['total']:.3f}")
            if not group.is_main:
                continue
            if on_epoch is not None:
                rows[-1] |= on_epoch(epoch + 1, model)
            if on_history is not None:
                on_history(pd.DataFrame(rows))
            due = time.monotonic() - saved_at >= checkpoint_s or epoch + 1 == train.epochs
            if checkpoint is not None and due:
                save_checkpoint(checkpoint, model, optimiser, rows, average)
                saved_at = time.monotonic()
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    if group.is_main:
        calibrate(model, features, class_idx, held_out)
    return pd.DataFrame(rows)


@contextmanager
def _training_mode(model: Method, seed: int, epoch: int) -> Iterator[None]:
    """Turn dropout on; noise and dropout are a function of seed and epoch, so a resumed run repeats them."""
    model.train()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed * 1_000_003 + epoch)
            yield
    finally:
        model.eval()


def fit_epoch(
    model: Method,
    optimiser: torch.optim.Optimizer,
    features: Features,
    labels: Tensor,
    epoch: int,
    *,
    train: TrainConfig,
    loss: LossConfig,
    seed: int,
    group: Group,
    advance: Callable[[int], object],
) -> dict[str, float]:
    """Take a step of Adam for each batch of an epoch, counted from 0, as :func:`fit` was told.

    Returns the mean of every term over images and levels, and the last learning rate, "lr".
    """
    n_images, device = len(labels), model.device
    parameters = [p for settings in optimiser.param_groups for p in settings["params"]]
    precision = torch.bfloat16 if train.precision == "bfloat16" else torch.float32
    intra = epoch >= first_stage_epochs(train)
    weights = asdict(loss)
    if not intra and not train.entropy_in_first_stage:
        weights["lambda_e"] = 0.0
    order = batch_order(n_images, train.batch_size, seed, epoch)
    parts, shares = zip(*map(group.share, order), strict=True)
    # Moved once an epoch: a copy per step would have the host wait for the device each time.
    own_labels = labels[torch.cat(parts).to(device)].split([len(part) for part in parts])
    places = torch.cat(parts).to(features.levels[0].device).split([len(part) for part in parts])
    found: list[list[dict[str, Tensor]]] = []
    for step, (_, batch) in enumerate(features.batches(places, device)):
        lr = learning_rate((epoch * len(order) + step) / (train.epochs * len(order)), train)
        for settings in optimiser.param_groups:
            settings["lr"] = lr
        terms = model.losses(
            batch, own_labels[step], intra=intra, precision=precision,
            noise=train.noise, smooth=train.smooth, rows=train.rows, **weights,
        )  # fmt: skip
        # The levels share no parameter, so one backward pass over their sum serves all of them, and one step
        # of Adam is a step per level. Alg. 1 averages over levels, which scales gradients (not Adam's steps).
        scale = shares[step] if train.step_per_level else shares[step] / len(terms)
        total = torch.stack([t["total"] for t in terms]).sum().mul(scale)
        if total.requires_grad:  # no flow and a single Gaussian: nothing is learnt
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            group.sum_gradients(parameters)
            if train.gradient_clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, train.gradient_clip)
            optimiser.step()
        found.append([{name: value.detach() for name, value in t.items()} for t in terms])
        advance(len(order[step]))
    n_values = n_images * len(found[0])
    counts = [share * len(batch) / n_values for share, batch in zip(shares, order, strict=True)]
    return _mean_terms(found, counts, epoch, group) | {"lr": lr}


def _mean_terms(
    found: list[list[dict[str, Tensor]]], counts: list[float], epoch: int, group: Group
) -> dict[str, float]:
    """Sum each term over steps and levels, a step's terms times its count; refuse what is not finite."""
    sums: dict[str, Tensor] = {}
    for levels, count in zip(found, counts, strict=True):
        for terms in levels:
            for name, value in terms.items():
                sums[name] = sums[name] + value * count if name in sums else value * count
    totals = group.sum_(torch.stack(list(sums.values()))).tolist()  # the one wait for the device
    means = dict(zip(sums, totals, strict=True))
    if not math.isfinite(means["total"]):
        broken = [
            f": level {level + 1}, {name} is {value.item()}"
            for levels in found
            for level, terms in enumerate(levels)
            for name, value in terms.items()
            if name != "total" and not value.isfinite()
        ]
        raise FloatingPointError(
            f"the loss is {means['total']} in epoch {epoch + 1}{''.join(broken[:1])}; {_ADVICE}"
        )
    return means


def split_centers(model: HGAD, features: Features, labels: Tensor, *, seed: int) -> None:
    """Start the second stage with the centres within each class on clusters of its latents.

    Raises:
        FloatingPointError: The last step of the first stage has left weights that are not finite.
    """
    own, classes = labels.cpu(), len(model.classes)
    sample = spread_sample(own.numpy(), classes, model.images_to_split)
    counts = torch.bincount(own[sample], minlength=classes)
    batches = features.batches(sample.split(32), model.device)
    try:
        model.split_centers(((x, labels[index.to(model.device)]) for index, x in batches), counts, seed=seed)
    except FloatingPointError as error:
        raise FloatingPointError(f"at the start of the second stage, {error}; {_ADVICE}") from None


def calibrate(
    model: Method, features: Features, class_idx: np.ndarray, held_out: Labelled | None = None, *,
    batch_size: int = 32, only: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Take the constants of the scores from the training features, and from those held out of training.

    Of all classes, or only of some, by index. Nothing, where the method's scores are raw.
    """
    if not model.has_constants:
        return

    def values(features: Features, class_idx: np.ndarray) -> Iterator[tuple[LevelValues, Tensor]]:
        labels = torch.as_tensor(class_idx, dtype=torch.int64, device=model.device)
        for indices, batch in features.batches(torch.arange(len(labels)).split(batch_size), model.device):
            own = labels[indices.to(model.device)]
            yield model.level_values(batch, own), own

    model.calibrate(values(features, class_idx), values(*held_out) if held_out else (), only=only)


def save_checkpoint(
    path: Path,
    model: Method,
    optimiser: torch.optim.Optimizer,
    rows: list[dict[str, Any]],
    average: AveragedModel | None = None,
) -> None:
    """Write weights, their running mean, Adam's moments and the history to one file, atomically."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimiser.{index}.{name}"] = torch.as_tensor(value)
    write_tensors(path, tensors, {"history": json.dumps(rows, allow_nan=False)})


def load_checkpoint(
    path: Path, model: Method, optimiser: torch.optim.Optimizer, average: AveragedModel | None = None
) -> list[dict[str, Any]]:
    """Load a checkpoint's state into model, optimiser and running mean, and return its history's rows.

    Raises:
        InputError: It is damaged, or of another model; the line says what to delete.
    """
    try:
        tensors, metadata = read_tensors(path)
        rows = json.loads(metadata["history"])
        for prefix, module in (("model.", model), ("average.", average)):
            if module is not None:
                own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                module.load_state_dict(own)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: expected a whole checkpoint of this run, found a damaged one; delete it to train from "
            f"the start ({' '.join(str(error).split())[:120]})"
        ) from None
    return rows
