r"""Which class is this? Infer what an image shows, where nobody says so, and score it as that.

The paper's score needs the class of the image (Sec. 3.4). Two ways to do without:

* the model's own: the class whose mixture makes the image most likely, positions taken as independent,

  .. math:: \hat y = \arg\max_y \sum_{\text{levels}}\sum_{\text{positions}}
            \log\sum_i p_i(y)\,\mathcal N(z;\mu_i^y, I)

  (the log-determinant is the same for all classes and drops out);
* the nearest training image in global features (App. A.2): see
  :func:`hgadlib.features.discovery.assign_nearest`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hgadlib.config import ScoreConfig
from hgadlib.errors import InputError
from hgadlib.evaluation.evaluate import level_values
from hgadlib.evaluation.metrics import image_metrics
from hgadlib.features.store import Features
from hgadlib.mixture import HierarchicalGaussianMixture
from hgadlib.model import HGAD
from hgadlib.scoring import Normalisation, anomaly_maps, image_scores

_BATCH = 32


@torch.inference_mode()
def class_log_probs(model: HGAD, features: Sequence[Tensor]) -> Tensor:
    """Compute the log-density of images' latents under every class's mixture.

    Args:
        model: With a mixture prior.
        features: One (B, H*W, C) a level, on the model's device.

    Returns:
        Sums over levels and positions in nats, (B, K).

    Raises:
        InputError: The model has one Gaussian for all classes, so no class is likelier than another.

    Source: paper Sec. 3.4, for every class in turn.
    """
    total = torch.zeros(len(features[0]), len(model.classes), dtype=torch.float64, device=model.device)
    for (flow, prior), x in zip(model.levels, features, strict=True):
        if not isinstance(prior, HierarchicalGaussianMixture):
            raise InputError(
                "class inference: expected a prior with a mixture per class, found one Gaussian for all; use "
                "the nearest training image instead"
            )
        z = flow(x)[0]
        for k in range(len(model.classes)):
            own = torch.full((len(z),), k, device=z.device)
            total[:, k] += prior.log_prob(z, own).double().sum(1)
    return total


def image_log_probs(model: HGAD, features: Features) -> NDArray[np.float64]:
    """Compute :func:`class_log_probs` of N images: (N, K)."""
    order = torch.arange(len(features)).split(_BATCH)
    parts = [class_log_probs(model, batch).cpu() for _, batch in features.batches(order, model.device)]
    return torch.cat(parts).numpy()


def infer_classes(model: HGAD, features: Features) -> NDArray[np.int64]:
    """Give each image the class that makes it most likely.

    Returns:
        Class ids, (N,) int64.

    Raises:
        InputError: As :func:`class_log_probs`.
    """
    return image_log_probs(model, features).argmax(1).astype(np.int64)


def score_as(
    model: HGAD, features: Features, class_idx: NDArray[np.int64], score: ScoreConfig
) -> NDArray[np.float32]:
    """Score images as members of given classes, under the constants that training stored for these.

    Args:
        model: Trained and calibrated.
        features: Of N images.
        class_idx: The class to score each one as, true or inferred, (N,).
        score: Map size, blur and criterion.

    Returns:
        Image scores, (N,); higher is more anomalous.
    """
    values = level_values(model, features, class_idx)
    labels = torch.from_numpy(np.asarray(class_idx, dtype=np.int64))
    log_prob_max, neg_entropy_max, zero = (
        model.log_prob_max.cpu(),
        model.neg_entropy_max.cpu(),
        torch.zeros(()),
    )
    parts = []
    for index in torch.arange(len(labels)).split(_BATCH):
        own = labels[index]
        constants = Normalisation(log_prob_max[own], neg_entropy_max[own], zero, zero)
        maps = anomaly_maps(
            values[index], constants, size=score.map_size, sigma=score.sigma, criterion=score.criterion
        )
        parts.append(image_scores(maps))
    return torch.cat(parts).numpy()


def auroc_by_class(
    scores: NDArray[np.float32], labels: NDArray[np.bool_], class_idx: NDArray[np.int64], names: Sequence[str]
) -> dict[str, float | None]:
    """Compute the image AUROC within each true class, whatever classes the scores took the images for.

    Args:
        scores: (N,).
        labels: True where anomalous, (N,).
        class_idx: True classes, (N,).
        names: Class names.

    Returns:
        AUROC by name, None where a class has images of one kind only; classes without images are left out.
    """
    found = {}
    for k, name in enumerate(names):
        mine = class_idx == k
        if mine.any():
            found[name] = image_metrics(scores[mine], labels[mine])["image_auroc"]
    return found
