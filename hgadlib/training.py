"""The two-stage fit of flows and priors on stored features: readable top to bottom."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hgadlib.config import LossConfig, TrainConfig
from hgadlib.features import Features
from hgadlib.model import HGAD, read_tensors, write_tensors
from hgadlib.progress import progress_bar


def learning_rate(progress: float, config: TrainConfig) -> float:
    """Give the learning rate at a share of the training.

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


def build_optimiser(model: HGAD, config: TrainConfig) -> torch.optim.Optimizer:
    """Make one Adam over all flows and priors; fused where the device has it."""
    prior = [p for p in model.priors.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": list(model.flows.parameters()), "weight_decay": config.weight_decay}
    ]
    if prior:
        groups.append({"params": prior, "weight_decay": config.weight_decay if config.decay_prior else 0.0})
    return torch.optim.Adam(groups, lr=config.lr, betas=config.betas, fused=True)


def first_stage_epochs(config: TrainConfig) -> int:
    """Number of epochs without intra-class terms: the configured share, rounded up, but never all."""
    return min(math.ceil(config.first_stage * config.epochs), config.epochs - 1)


def batch_order(n: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Shuffle an epoch's images into batches; a function of seed and epoch, so a resumed run repeats it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    # Sorted within the batch: the gather from host memory or file then reads forwards.
    return [b.sort().values for b in torch.randperm(n, generator=generator).split(batch_size)]


def fit(
    model: HGAD,
    features: Features,
    class_idx: np.ndarray,
    *,
    train: TrainConfig,
    loss: LossConfig,
    seed: int = 0,
    checkpoint: Path | None = None,
    on_epoch: Callable[[int, HGAD], dict[str, float]] | None = None,
    on_history: Callable[[pd.DataFrame], None] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train all levels together and calibrate the scores.

    First stage: Eq. 6 and 8 (and 9 where configured). Second stage: the whole of Eq. 11.

    Args:
        model: Initialised model, on the device to train on.
        features: Of the training images.
        class_idx: Class of each training image, (N,).
        train: Epochs, optimiser, schedule.
        loss: Weights of the terms.
        seed: Of the batches' order.
        checkpoint: File to save to after every epoch, and to resume from if it exists.
        on_epoch: Called after each epoch; what it returns becomes columns of the history.
        on_history: Called with the history so far after each epoch, before the checkpoint is written.
        progress: Show a bar.

    Returns:
        History, a row an epoch: mean of every loss term, learning rate, seconds, images/s.

    Raises:
        FloatingPointError: The loss is no longer finite.

    Source: paper Alg. 1, Sec. 4.2 and App. C.
    """
    device = model.log_prob_max.device
    labels = torch.as_tensor(class_idx, dtype=torch.int64, device=device)
    optimiser = build_optimiser(model, train)
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    n_images, n_levels = len(labels), len(model.flows)
    rows: list[dict[str, Any]] = []
    if checkpoint is not None and checkpoint.is_file():
        rows = load_checkpoint(checkpoint, model, optimiser)
    steps_per_epoch = math.ceil(n_images / train.batch_size)
    stage_two = first_stage_epochs(train)
    precision = torch.bfloat16 if train.precision == "bfloat16" else torch.float32
    weights = asdict(loss)
    bar = progress_bar(train.epochs * n_images, "train", show=progress)
    bar.update(len(rows) * n_images)
    for epoch in range(len(rows), train.epochs):
        started = time.perf_counter()
        intra = epoch >= stage_two
        if not intra and not train.entropy_in_first_stage:
            weights["lambda_e"] = 0.0
        else:
            weights["lambda_e"] = loss.lambda_e
        sums: dict[str, Tensor] = {}
        for step, indices in enumerate(batch_order(n_images, train.batch_size, seed, epoch)):
            lr = learning_rate((epoch * steps_per_epoch + step) / (train.epochs * steps_per_epoch), train)
            for group in optimiser.param_groups:
                group["lr"] = lr
            batch = features.batch(indices, device)
            terms = model.losses(
                batch, labels[indices.to(device)], intra=intra, precision=precision, **weights
            )
            optimiser.zero_grad(set_to_none=True)
            # The levels share no parameter, so one backward pass serves all of them.
            scale = 1.0 if train.step_per_level else 1.0 / n_levels  # Alg. 1 averages over levels
            torch.stack([t["total"] for t in terms]).sum().mul(scale).backward()
            if train.gradient_clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, train.gradient_clip)
            optimiser.step()
            for t in terms:
                for name, value in t.items():
                    share = value.detach() * (len(indices) / (n_images * n_levels))
                    sums[name] = sums[name] + share if name in sums else share
            bar.update(len(indices))
        means = {name: float(value) for name, value in sums.items()}  # the epoch's one wait for the device
        if not math.isfinite(means["total"]):
            raise FloatingPointError(
                f"the loss is {means['total']} in epoch {epoch + 1}; lower train.lr or set train.gradient_clip"
            )
        seconds = time.perf_counter() - started
        row = {"epoch": epoch + 1, "stage": 2 if intra else 1, **means, "lr": lr, "seconds": seconds}
        row["images_per_s"] = n_images / seconds
        bar.set_postfix_str(f"epoch {epoch + 1}/{train.epochs}, loss {means['total']:.3f}")
        if on_epoch is not None:
            row |= on_epoch(epoch + 1, model)
        rows.append(row)
        if on_history is not None:
            on_history(pd.DataFrame(rows))
        if checkpoint is not None:
            save_checkpoint(checkpoint, model, optimiser, rows)
    bar.close()
    calibrate(model, features, class_idx)
    return pd.DataFrame(rows)


def calibrate(model: HGAD, features: Features, class_idx: np.ndarray, *, batch_size: int = 32) -> None:
    """Take the inductive constants of the scores from the training features."""
    device = model.log_prob_max.device
    labels = torch.as_tensor(class_idx, dtype=torch.int64, device=device)
    batches = torch.arange(len(labels)).split(batch_size)
    classes = (labels[b.to(device)] for b in batches)
    model.calibrate(
        (model.level_values(features.batch(b, device), c), c) for b, c in zip(batches, classes, strict=True)
    )


def save_checkpoint(
    path: Path, model: HGAD, optimiser: torch.optim.Optimizer, rows: list[dict[str, Any]]
) -> None:
    """Write weights, Adam's moments and the history to one file, atomically."""
    tensors = {
        f"model.{name}": value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    for index, state in optimiser.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimiser.{index}.{name}"] = torch.as_tensor(value).cpu().contiguous()
    write_tensors(path, tensors, {"history": json.dumps(rows)})


def load_checkpoint(path: Path, model: HGAD, optimiser: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Put a checkpoint's state in place and return its history's rows."""
    tensors, metadata = read_tensors(path)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return json.loads(metadata["history"])
