"""The engineer's door: fit on normal images, decide on new ones, carry the model elsewhere.

A detector is a run of this library (:mod:`hgadlib.runs`) with its backbone, and with thresholds chosen on
normal images that took no part in making the scores. Its run directory is the one that ``book/train.ipynb``
writes by the same settings: either continues from, or reads, what the other has trained.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from torch import Tensor

from hgadlib.baselines.one_for_one import model_type
from hgadlib.config import Config, config_from_dict, load_config
from hgadlib.datasets import DATASETS, load_dataset
from hgadlib.datasets.images import as_rgb, normalised, parallel_map, resize_image, save
from hgadlib.datasets.records import GOOD, Dataset, ImageRecord
from hgadlib.datasets.scan import is_image, is_litter, named_images
from hgadlib.datasets.validation import hold_out
from hgadlib.errors import InputError
from hgadlib.evaluation.class_inference import infer_classes
from hgadlib.evaluation.drift import Drift, Sample, find_drift
from hgadlib.evaluation.evaluate import Evaluation, score_images
from hgadlib.evaluation.thresholds import UNLIKE, Normals, Rate, binomial_rate, images_needed
from hgadlib.fast.memory import in_parts
from hgadlib.features.backbone import Backbone, build_backbone, flatten_maps
from hgadlib.features.extract import dataset_features
from hgadlib.features.store import Features, spread_sample
from hgadlib.files import user_path, write_atomically
from hgadlib.method import read_tensors, write_tensors
from hgadlib.model import HGAD
from hgadlib.runs.directory import RunDirectory
from hgadlib.runs.experiment import evaluate_model, finish_run, train_model
from hgadlib.runs.hardware import environment, select_device
from hgadlib.runs.inputs import Inputs, prepare
from hgadlib.training import calibrate

FORMAT = 1
"""Goes up when older versions of this library can no longer read a saved detector."""
# Images that all classes' deviation counts for beside that of a class's own.
_POOLED = 5
# What a description that is not ours makes Python say.
_WRONG_CONTENT = (
    LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, AssertionError,
    MemoryError,
)  # fmt: skip
# Images that a named folder or a sequence is scored by at a time.
_BATCH = 8

Images = Any
"""A file, a Pillow image, an array or tensor as of :func:`hgadlib.datasets.images.as_rgb`; an iterable of
these, which may be endless; or a folder, with all below it."""


@dataclass(frozen=True)
class Prediction:
    """What a detector says of an image.

    Attributes:
        name: The file, or the place in the sequence.
        score: How anomalous it is, in deviations where scores are calibrated.
        threshold: Above it the image is called anomalous.
        p_value: Share of normal images that score as much or more; see
            :func:`hgadlib.evaluation.thresholds.conformal_p_values`.
        percentile: Share of the normal images kept aside that score less, in percent.
        is_anomalous: Whether the score exceeds the threshold.
        class_name: The class it was scored as.
        class_confidence: Share of the image's positions at which no other class is likelier; NaN where the
            class was given.
        is_unknown: Whether it is anomalous all over, as of no known class; see :data:`UNLIKE`. An image below
            the threshold never is, so this costs no false alarm.
        promise: Whose false alarms the threshold bounds: "class", or "all classes" where the class has too
            few images for a threshold of its own. Where the class is inferred it bounds those of images that
            are taken for it, for so were the images kept aside.
        anomaly_map: (S, S) float32.
        pixel_threshold: Above it a pixel is marked; at most the same share of normal images has one.
        image: The image at the map's size, (S, S, 3) uint8.
        seconds: From decoded image to decision, its share of the batch.
        features: Means over positions of its features, of all levels, (C,): see :meth:`Detector.drift`.
    """

    name: str
    score: float
    threshold: float
    p_value: float
    percentile: float
    is_anomalous: bool
    class_name: str
    class_confidence: float
    is_unknown: bool
    promise: str
    anomaly_map: NDArray[np.float32] = field(repr=False)
    pixel_threshold: float
    image: NDArray[np.uint8] = field(repr=False)
    seconds: float
    features: NDArray[np.float32] = field(repr=False)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Pixels above the pixel threshold, (S, S)."""
        return self.anomaly_map > self.pixel_threshold

    def overlay(self) -> NDArray[np.uint8]:
        """Lay the map over the image, brightest from twice the pixel threshold on: (S, S, 3) uint8."""
        from hgadlib.figures.maps import overlay  # so that scoring alone needs no figures

        return overlay(self.image, self.anomaly_map, low=0.0, high=2 * self.pixel_threshold)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the arrays, ready for JSON."""
        arrays = ("anomaly_map", "image", "features")
        values = {name: value for name, value in vars(self).items() if name not in arrays}
        return {name: None if value != value else value for name, value in values.items()}


@dataclass(frozen=True)
class AddedClass:
    """What a class is like that was added without training, and what it costs the others.

    The test images' figures are of images whose class is given, but for "taken" and "missed"; without test
    images they are empty.

    Attributes:
        name: The class.
        images: How many of its images are for what: "train", "held_out", "threshold".
        promise: Whose false alarms its threshold bounds, as of :class:`Prediction`.
        others_before: Mean metrics of the other classes' test images.
        others_after: The same with the class added.
        score_change: Mean size of the change of the other classes' image scores: 0 where scores are made of
            likelihoods alone.
        taken: Share of the other classes' test images that are now taken for the new class.
        missed: Share of the new class's test images that are taken for another.
        own: Metrics of the new class.
        retrained: Its metrics by a detector that was trained on it too.
        retrained_others: That detector's mean metrics of the other classes.
    """

    name: str
    images: dict[str, int]
    promise: str
    others_before: dict[str, float | None] = field(default_factory=dict)
    others_after: dict[str, float | None] = field(default_factory=dict)
    score_change: float | None = None
    taken: Rate | None = None
    missed: Rate | None = None
    own: dict[str, float | None] = field(default_factory=dict)
    retrained: dict[str, float | None] = field(default_factory=dict)
    retrained_others: dict[str, float | None] = field(default_factory=dict)

    def behind(self) -> dict[str, float]:
        """Return by how much each metric of the new class lies below the retrained detector's."""
        pairs = {name: (value, self.own.get(name)) for name, value in self.retrained.items()}
        return {name: a - b for name, (a, b) in pairs.items() if a is not None and b is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        rates = {name: str(value) for name, value in vars(self).items() if isinstance(value, Rate)}
        return {**vars(self), **rates, "behind": self.behind()}


class Detector(BaseEstimator):
    """Finds anomalies in images of several classes after fitting on normal ones.

    Args:
        experiment: Settings to start from: a file of ``params/experiments``, or "hgad" for the default.
        false_alarm_rate: Share of normal images that may be called anomalous, on average.
        threshold_share: Share of each class's images kept aside to choose thresholds on.
        epochs: Passes over the training images; None for the experiment's.
        seed: Of all that is drawn.
        device: "auto", "cpu" or "cuda".
        run_dir: Folder of the run; None for ``runs/DATASET/EXPERIMENT/seedN``.
        overrides: Any other settings by their dotted names, ``{"data.resize": "pad"}``.

    Example:
        >>> from hgadlib import Detector
        >>> detector = Detector(false_alarm_rate=0.1, epochs=4)
        >>> detector.get_params()["false_alarm_rate"]
        0.1
        >>> detector.predict("part.png")
        Traceback (most recent call last):
        sklearn.exceptions.NotFittedError: this detector has learnt nothing yet: call fit, or Detector.load
    """

    def __init__(
        self,
        *,
        experiment: str = "hgad",
        false_alarm_rate: float = 0.05,
        threshold_share: float = 0.2,
        epochs: int | None = None,
        seed: int = 0,
        device: str = "auto",
        run_dir: Path | str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.experiment = experiment
        self.false_alarm_rate = false_alarm_rate
        self.threshold_share = threshold_share
        self.epochs = epochs
        self.seed = seed
        self.device = device
        self.run_dir = run_dir
        self.overrides = overrides

    # What fit sets; scikit-learn's names end on an underscore.
    config_: Config
    classes_: tuple[str, ...]
    model_: HGAD
    backbone_: Backbone
    normals_: dict[str, Normals]
    all_normals_: Normals
    inferred_normals_: dict[str, Normals]
    all_inferred_normals_: Normals
    reference_: dict[str, NDArray[np.float32]]
    typical_: NDArray[np.float64]
    bit_depth_: int
    trained_on_: dict[str, Any]
    metrics_: dict[str, Any]
    remarks_: tuple[str, ...] = ()

    def fit(self, images: Any, y: None = None, *, progress: bool = True) -> Self:
        """Learn from normal images and choose thresholds.

        Args:
            images: A folder in one of the layouts of :mod:`hgadlib.datasets.folder` (its test images, if any,
                are evaluated on), the name of a dataset, ``{class: images}``, or images of one class.
            y: Nothing; there as scikit-learn's pipelines pass it.
            progress: Whether to show bars.
        Raises:
            InputError: The images or settings are wrong, or too few to choose thresholds on.
            FloatingPointError: The loss is no longer finite.
        """
        images_needed(self.false_alarm_rate)  # refuses a wrong one before any work
        with ExitStack() as stack:
            given = self._parameters(images, stack)
            config = load_config(given)
            inputs = prepare(config, progress=progress, tested=False, check=self._check_enough)
            run = RunDirectory.open(config)
            model = train_model(config, inputs, run, progress=progress)
            self.metrics_ = finish_run(config, inputs, model, run).metrics if inputs.dataset.test else {}
        self.config_, self.model_, self.backbone_ = config, cast(HGAD, model.eval()), inputs.backbone
        self.classes_ = inputs.dataset.classes
        self.bit_depth_ = config.data.bit_depth or inputs.dataset.bit_depth
        counts = _count(inputs.dataset)
        self.trained_on_ = {
            "dataset": inputs.dataset.name, "train": len(inputs.dataset.train),
            "held_out": len(inputs.dataset.held_out), "seed": config.seed,
            "threshold": {name: own["threshold"] for name, own in counts.items()}, "images": counts,
            "environment": environment(inputs.device),
        }  # fmt: skip
        self.remarks_ = (*inputs.dataset.skipped, *inputs.dataset.remarks)
        kept = self._look_at_normals(inputs)
        self.reference_ = kept.reference
        self._set_normals(kept.given, kept.inferred)
        self.typical_ = _typical([kept.usual[name] for name in self.classes_])
        return self

    def _check_enough(self, dataset: Dataset) -> None:
        """Refuse a dataset of which too few images are kept aside for the rate that is promised."""
        needed, found = images_needed(self.false_alarm_rate), len(dataset.threshold)
        if found < needed:
            raise InputError(
                f"a false alarm rate of {self.false_alarm_rate:g} takes at least {needed} normal images "
                f"kept aside, found {found} (threshold_share {self.threshold_share:g} of "
                f"{len(dataset.records) - len(dataset.test)}); give more images, a larger "
                "threshold_share, or allow a higher rate"
            )

    def _parameters(self, images: Any, stack: ExitStack) -> dict[str, Any]:
        """Compose the parameters of the run; images in memory go to a folder that the stack removes."""
        given: dict[str, Any] = {"experiment": self.experiment, "seed": self.seed, "device": self.device}
        given |= {} if self.epochs is None else {"epochs": self.epochs}
        given |= {} if self.run_dir is None else {"run_dir": str(self.run_dir)}
        given["overrides"] = {
            "data.threshold": self.threshold_share, "train.evaluate_every": 0, **(self.overrides or {}),
        }  # fmt: skip
        if isinstance(images, str) and images in DATASETS and images != "folder":
            return given | {"dataset": images}
        if isinstance(images, str | os.PathLike):
            return given | {"dataset": "folder", "data_root": str(user_path(Path(images)))}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hgad-")))
        depth = (self.overrides or {}).get("data.bit_depth") or 16
        _write_folder(images if isinstance(images, Mapping) else {"object": images}, folder, depth)
        return given | {"dataset": "folder", "data_root": str(folder)}

    def _set_normals(self, given: dict[str, Normals], inferred: dict[str, Normals]) -> None:
        """Take what the images kept aside score, by the class that was given and by that inferred."""
        self.normals_, self.inferred_normals_ = given, inferred
        self.all_normals_, self.all_inferred_normals_ = (
            Normals.together(list(of.values())) for of in (given, inferred)
        )

    def _look_at_normals(self, inputs: Inputs) -> _Kept:
        """Judge the images kept aside, as members of their classes and of those that are inferred."""
        dataset = inputs.dataset
        found_as: dict[bool, dict[str, list[tuple[float, float]]]] = {True: {}, False: {}}
        pooled: dict[str, list[Tensor]] = {}
        usual: dict[str, list[float]] = {name: [] for name in self.classes_}
        infers = len(self.classes_) > 1 and self.model_.has_entropy
        # The flow has seen neither; of those held out only the scores were calibrated.
        parts = (("threshold", inputs.threshold), ("held_out", inputs.held_out))
        for split, features in parts:
            if features is None:
                continue
            labels = torch.from_numpy(dataset.class_idx(getattr(dataset, split)))
            for index, batch in features.batches(torch.arange(len(labels)).split(_BATCH), inputs.device):
                given = self._judge([level.float() for level in batch], labels[index])
                for i, k in enumerate(given.class_idx.tolist()):
                    usual[self.classes_[k]].append(given.usual[i].item())
                    if split == "threshold":
                        pooled.setdefault(self.classes_[k], []).append(given.pooled[i])
                if split != "threshold":
                    continue
                # Scored as new images without a class are, they bound the false alarms of just those.
                inferred = self._judge([level.float() for level in batch], None) if infers else given
                for as_given, found in ((True, given), (False, inferred)):
                    for i, k in enumerate(found.class_idx.tolist()):
                        pair = found.scores[i].item(), found.maps[i].amax().item()
                        found_as[as_given].setdefault(self.classes_[k], []).append(pair)
        by_given, by_inferred = (
            {name: Normals(*np.array(pairs).T) for name, pairs in sorted(of.items())}
            for of in found_as.values()
        )
        reference = {name: torch.stack(own).numpy() for name, own in pooled.items()}
        return _Kept(by_given, by_inferred, reference, usual)

    @torch.inference_mode()
    def _judge(self, features: Sequence[Tensor], class_idx: Tensor | None) -> _Judged:
        """Score B images by their features, as given classes or as those that the model infers."""
        model, score = self.model_, self.config_.score
        sure = torch.full((len(features[0]),), torch.nan)
        if class_idx is None and len(self.classes_) == 1:
            class_idx, sure = torch.zeros(len(features[0]), dtype=torch.int64), torch.ones(len(features[0]))
        entropy = self.config_.criterion != "likelihood"
        if class_idx is None:
            values, class_idx, sure = model.inferred_values(features, entropy=entropy)
        else:
            values = model.level_values(features, class_idx.to(model.device), entropy=entropy)
        constants = model.constants(class_idx.to(model.device), score.normalisation)
        scores, maps = score_images(values, constants, score, self.config_.criterion)
        # A defect is local; what is of another kind differs almost everywhere, and the median is low.
        usual = values.log_prob[-1].flatten(1).median(1).values
        # Rounded as stored features are: those of the images kept aside, which new ones are compared with.
        dtype = getattr(torch, self.config_.features.dtype)
        pooled = torch.cat([level.to(dtype).float().mean(1) for level in features], dim=1)
        return _Judged(scores.cpu(), maps.cpu(), class_idx.cpu(), sure.cpu(), usual.cpu(), pooled.cpu())

    def predict(
        self, images: Images, *, class_name: str | None = None, batch_size: int | None = None,
        on_error: Callable[[str, InputError], None] | None = None,
    ) -> Iterator[Prediction]:  # fmt: skip
        """Judge images, one after the other as they come; memory does not grow with their number.

        Several threads may call it on one detector.

        Args:
            images: See :data:`Images`.
            class_name: Of all these images; None infers each image's from its latents.
            batch_size: Images that go through the network at a time; None for 1 where their number is not
                known, so that each is judged before the next is asked for, else 8. No result depends on it.
            on_error: Called with the name of an image that cannot be read and the error, and the next image
                follows; None raises.
        Yields:
            A :class:`Prediction` an image, in their order.
        Raises:
            InputError: An image cannot be read, or the class is not one of ``classes_``.
            NotFittedError: Nothing was learnt yet.
        """
        self._check_fitted()
        if class_name is not None and class_name not in self.classes_:
            raise InputError(f"expected one of the classes {', '.join(self.classes_)}, found {class_name!r}")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"expected a batch_size of at least 1, found {batch_size}")
        items, sized = named_images(images)
        size = batch_size or (_BATCH if sized else 1)
        return self._predictions(items, size, class_name, on_error, ahead=2 * size if sized else 1)

    def _predictions(
        self, items: Iterator[tuple[str, Any]], size: int, class_name: str | None,
        on_error: Callable[[str, InputError], None] | None, *, ahead: int,
    ) -> Iterator[Prediction]:  # fmt: skip
        data, backbone = self.config_.data, self.backbone_

        def load(item: tuple[str, Any]) -> _Loaded | tuple[str, InputError]:
            name, image = item
            try:
                pixels = resize_image(as_rgb(image, self.bit_depth_, name), data.image_size, data.resize)
            except InputError as error:
                if on_error is None:
                    raise
                return name, error
            shown = resize_image(pixels, self.config_.score.map_size)
            return _Loaded(name, torch.from_numpy(normalised(pixels, backbone.mean, backbone.std)), shown)

        batch: list[_Loaded] = []
        for loaded in parallel_map(load, items, num_workers=data.num_workers, ahead=ahead):
            if isinstance(loaded, _Loaded):
                batch.append(loaded)
            elif on_error is not None:
                on_error(*loaded)
            if len(batch) == size:
                yield from self._decide(batch, class_name)
                batch = []
        if batch:
            yield from self._decide(batch, class_name)

    def _decide(self, batch: list[_Loaded], class_name: str | None) -> list[Prediction]:
        parts = in_parts(lambda part: self._decide_together(batch[part], class_name), len(batch))
        return [prediction for part in parts for prediction in part]

    def _decide_together(self, batch: list[_Loaded], class_name: str | None) -> list[Prediction]:
        started = time.perf_counter()
        with torch.inference_mode():
            maps = self.backbone_(torch.stack([one.tensor for one in batch]).to(self.model_.device))
            # Not rounded to the stored features' float16: a batch of another size would round otherwise.
            features = flatten_maps(maps)
        own = None if class_name is None else torch.full((len(batch),), self.classes_.index(class_name))
        found = self._judge(features, own)
        seconds = (time.perf_counter() - started) / len(batch)
        return [self._prediction(one, found, i, seconds, own is None) for i, one in enumerate(batch)]

    def _prediction(self, one: _Loaded, found: _Judged, i: int, seconds: float, inferred: bool) -> Prediction:
        k, score = int(found.class_idx[i]), float(found.scores[i])
        name = self.classes_[k]
        normals, promise = self.normals_for(name, inferred=inferred)
        threshold = normals.threshold(self.false_alarm_rate)
        mean, std = self.typical_[k]
        unknown = score > threshold and bool((mean - float(found.usual[i])) / std > UNLIKE)
        return Prediction(
            one.name, score, threshold, normals.p_value(score), normals.percentile(score),
            score > threshold, name, float(found.sure[i]), unknown, promise,
            found.maps[i].numpy().copy(), normals.pixel_threshold(self.false_alarm_rate), one.shown, seconds,
            found.pooled[i].numpy(),
        )  # fmt: skip

    def normals_for(self, class_name: str, *, inferred: bool = False) -> tuple[Normals, str]:
        """Return the normal images that a class's threshold is chosen on, and "class" or "all classes".

        Those of the class where they are enough for the false alarm rate, else those of all classes: then the
        rate is bounded over images of all classes together, and that of one class may lie above it.

        Args:
            class_name: Of the images to judge.
            inferred: Whether that is what the model takes them for: then those of the images kept aside count
                that it takes for this class too, whatever they are, scored as such.
        """
        self._check_fitted()
        of, together = self.normals_, self.all_normals_
        if inferred:
            of, together = self.inferred_normals_, self.all_inferred_normals_
        own = of.get(class_name)
        if own is not None and len(own.scores) >= images_needed(self.false_alarm_rate):
            return own, "class"
        return together, "all classes"

    def evaluate(self, images: Path | str, *, progress: bool = True) -> dict[str, Any]:
        """Test on labelled images: a folder or a dataset with a test set.

        Returns:
            "metrics" (as metrics.json has them: mean, per_class, and by inferred classes), "false_alarms" and
            "found": shares of normal and of anomalous images above the threshold, by class and for "all".
        Raises:
            InputError: There is no test image, or one of a class that the detector does not know.
            NotFittedError: Nothing was learnt yet.
        """
        self._check_fitted()
        inputs = self._test_inputs(images, progress)
        dataset = inputs.dataset
        result = evaluate_model(self.config_, inputs, self.model_, all_protocols=True)
        above = np.array(
            [
                score > self.normals_for(record.class_name)[0].threshold(self.false_alarm_rate)
                for score, record in zip(result.evaluation.scores, dataset.test, strict=True)
            ]
        )
        names = np.array([record.class_name for record in dataset.test])
        rates: dict[str, dict[str, Rate]] = {"false_alarms": {}, "found": {}}
        for name in [*dict.fromkeys(names.tolist()), "all"]:
            of = (names == name) | (name == "all")
            rates["false_alarms"][name] = binomial_rate(
                above[of & inputs.test_labelled & ~inputs.test_labels]
            )
            rates["found"][name] = binomial_rate(above[of & inputs.test_labels])
        return {
            "metrics": {**result.evaluation.to_dict(), "inferred": result.inferred},
            **{key: {name: str(rate) for name, rate in of.items()} for key, of in rates.items()},
        }

    def _test_inputs(self, images: Path | str, progress: bool) -> Inputs:
        if isinstance(images, str) and images in DATASETS and images != "folder":
            dataset = load_dataset(images, bit_depth=self.bit_depth_)
        else:
            dataset = load_dataset("folder", root=user_path(Path(images)), bit_depth=self.bit_depth_)
        dataset = replace(dataset, classes=self.classes_)
        if not dataset.test:
            raise InputError(f"{dataset.root}: expected test images to evaluate on, found none")
        dataset.class_idx(dataset.test)
        test = self._features(dataset.test, progress)
        return Inputs(dataset, self.backbone_, test.take(np.zeros(0, int)), test, self.model_.device)

    def _features(self, records: Sequence[ImageRecord], progress: bool) -> Features:
        data, dtype = self.config_.data, self.config_.features.dtype
        return dataset_features(
            records, self.backbone_, image_size=data.image_size, resize=data.resize, dtype=dtype,
            device=self.model_.device, num_workers=data.num_workers, progress=progress,
        )  # fmt: skip

    def drift(self, predictions: Iterable[Prediction], *, level: float = 0.01) -> Drift:
        """Test whether images just judged are still like the normal ones kept aside.

        Args:
            predictions: Of :meth:`predict`, on new images, most of which are normal.
            level: Share of days without a drift on which one may be called.
        Raises:
            InputError: There are too few images for the level.
            NotFittedError: Nothing was learnt yet.
        """
        self._check_fitted()
        today: dict[str, list[Prediction]] = {}
        for one in predictions:
            today.setdefault(one.class_name, []).append(one)
        return find_drift(
            {name: Sample(own.scores, self.reference_[name]) for name, own in self.normals_.items()},
            {
                name: Sample(np.array([one.score for one in own]), np.stack([one.features for one in own]))
                for name, own in today.items()
            },
            level=level,
        )

    def add_class(
        self, name: str, images: Any, *, test: Path | str | None = None, retrained: Detector | None = None,
        progress: bool = True,
    ) -> tuple[Self, AddedClass]:  # fmt: skip
        """Learn a class more from its normal images without training: minutes, and no other class's images.

        The flow stays as it is. The class gets its own centre and covariance, constants of the scores, and
        thresholds, on images parted as :meth:`fit` parts them; see :meth:`hgadlib.model.HGAD.with_class`. The
        others' likelihoods do not change; their entropies do, and an image may be taken for the new class.

        Args:
            name: Of the new class.
            images: Its normal images: as one class of :meth:`fit`.
            test: A folder or dataset with test images of all classes, or some, to see what it costs.
            retrained: A detector trained on this class as well, to see by the test images how far behind
                this one is.
            progress: Whether to show bars.
        Returns:
            A new detector, this one stays as it is; and the report.
        Raises:
            InputError: The class is known, an image is bad, or the detector is a baseline that cannot grow.
            NotFittedError: Nothing was learnt yet.
        """
        self._check_fitted()
        config = self.config_
        if config.method != "hgad" or config.setting != "unified":
            found = config.method if config.setting == "unified" else "a model for each class"
            raise InputError(f"expected a detector of method hgad, found {found}; fit it anew")
        with tempfile.TemporaryDirectory(prefix="hgad-") as folder:
            _write_folder({name: images}, Path(folder), self.bit_depth_)
            dataset = load_dataset("folder", root=folder, bit_depth=self.bit_depth_)
            dataset = hold_out(hold_out(dataset, config.data.threshold, "threshold"), config.data.held_out)
            parts = [dataset.train, dataset.held_out, dataset.threshold]
            train, held_out, threshold = (self._features(part, progress) if part else None for part in parts)
        name = dataset.classes[0]  # in the form that names of classes have
        assert train is not None  # of no class more than half is kept aside

        def batches() -> Iterator[tuple[list[Tensor], Tensor]]:
            sample = spread_sample(np.zeros(len(train), int), 1, self.model_.images_to_split)
            for index, features in train.batches(sample.split(32), self.model_.device):
                yield features, torch.zeros(len(index), dtype=torch.int64, device=self.model_.device)

        made = copy.copy(self)
        made.model_ = self.model_.with_class(name, batches, seed=config.seed)
        made.classes_ = made.model_.classes
        k = made.classes_.index(name)
        none = train.take(np.zeros(0, int))
        inputs = Inputs(
            replace(dataset, classes=made.classes_), self.backbone_, train, none, self.model_.device,
            held_out, threshold,
        )  # fmt: skip
        calibrate(made.model_, train, inputs.train_classes, inputs.calibration, only=[k])
        kept, before = made._look_at_normals(inputs), self.inferred_normals_
        made.reference_ = self.reference_ | kept.reference
        # The other classes' images are not there to be judged anew: those of them that would now be taken for
        # the new class still count for their own.
        both = {
            own: Normals.together([of[own] for of in (before, kept.inferred) if own in of])
            for own in sorted(before.keys() | kept.inferred)
        }
        made._set_normals(self.normals_ | kept.given, both)
        pooled = float(np.mean(self.typical_[:, 1] ** 2))
        made.typical_ = np.insert(self.typical_, k, _typical([kept.usual[name]], pooled), axis=0)
        counts = {
            split: len(part) for split, part in zip(("train", "held_out", "threshold"), parts, strict=True)
        }
        trained = self.trained_on_
        made.trained_on_ = {
            **trained, "threshold": trained["threshold"] | {name: counts["threshold"]},
            "images": trained["images"] | {name: {**counts, "test": 0}},
            "added": {**trained.get("added", {}), name: counts},
        }  # fmt: skip
        made.metrics_, made.remarks_ = {}, (*self.remarks_, *dataset.remarks)
        report = AddedClass(name, counts, made.normals_for(name)[1])
        return made, report if test is None else self._what_it_costs(made, report, test, retrained, progress)

    def _what_it_costs(
        self, made: Detector, report: AddedClass, test: Path | str, retrained: Detector | None, progress: bool
    ) -> AddedClass:
        """Measure this detector, the one with a class more and a retrained one on test images."""
        name, inputs = report.name, made._test_inputs(test, progress)

        def measured(detector: Detector, part: Inputs | None) -> Evaluation | None:
            if part is None:
                return None
            return evaluate_model(detector.config_, part, detector.model_, all_protocols=False).evaluation

        def inferred(part: Inputs | None, k: int) -> NDArray[np.bool_]:
            known = made.model_.has_entropy and part is not None
            return infer_classes(made.model_, part.test) == k if known and part else np.zeros(0, bool)

        own, others = _tested(inputs, name, alone=True), _tested(inputs, name, alone=False)
        k, before, after = made.classes_.index(name), measured(self, others), measured(made, others)
        alone = measured(made, own)
        report = replace(
            report, own=alone.mean if alone else {}, taken=binomial_rate(inferred(others, k)),
            missed=binomial_rate(~inferred(own, k)),
        )  # fmt: skip
        if before and after:
            change = float(np.abs(after.scores - before.scores).mean())
            report = replace(
                report, others_before=before.mean, others_after=after.mean, score_change=change
            )  # fmt: skip
        if retrained is not None:
            seen = retrained._test_inputs(test, progress)
            alone, rest = (measured(retrained, _tested(seen, name, alone=a)) for a in (True, False))
            report = replace(
                report, retrained=alone.mean if alone else {}, retrained_others=rest.mean if rest else {}
            )  # fmt: skip
        return report

    def save(self, path: Path | str) -> Path:
        """Write all that it takes to predict to one safetensors file, atomically, and a model card beside it.

        Returns:
            The file. It needs no data, no checkout and no cache, and nothing in it is unpickled.
        """
        self._check_fitted()
        path = user_path(Path(path))
        if path.suffix == ".md":
            raise InputError(f"{path}: the model card takes this name; save to {path.stem}.safetensors, say")
        card = self.card()
        tensors = {f"model.{name}": value for name, value in self.model_.state_dict().items()}
        folded = self.backbone_.network.state_dict()
        tensors |= {f"backbone.{name}": value for name, value in folded.items()}
        for kind, of in (("normals", self.normals_), ("inferred", self.inferred_normals_)):
            for name, normals in of.items():
                k = self.classes_.index(name)
                tensors[f"{kind}.{k}.scores"] = torch.from_numpy(normals.scores)
                tensors[f"{kind}.{k}.peaks"] = torch.from_numpy(normals.peaks)
        for name, own in self.reference_.items():
            tensors[f"reference.{self.classes_.index(name)}"] = torch.from_numpy(own)
        tensors["typical"] = torch.from_numpy(self.typical_)
        config = self.config_.to_dict()
        # Paths of this machine say nothing on another.
        config["run_dir"], config["data"]["root"], config["features"]["weights"] = None, None, None
        spec = {
            "format": FORMAT, "params": {**self.get_params(), "run_dir": None}, "config": config,
            "architecture": self.model_.architecture(), "bit_depth": self.bit_depth_,
            "backbone": self.backbone_.identity(), "trained_on": self.trained_on_, "metrics": self.metrics_,
        }  # fmt: skip
        text = json.dumps(spec, default=str)
        write_tensors(path, tensors, {"hgad_detector": text, "digest": _digest(tensors, text)})
        write_atomically(path.with_suffix(".md"), card)
        return path

    def export(self, path: Path | str) -> Path:
        """Write an ONNX file that judges images without this library; see :func:`hgadlib.export.export`."""
        self._check_fitted()
        from hgadlib.export import export  # its packages are an extra

        return export(self, path)

    @classmethod
    def load(cls, path: Path | str, *, device: str = "auto") -> Self:
        """Read a detector that :meth:`save` wrote.

        Raises:
            InputError: The file is missing, damaged, changed, of a newer version, or something else.
        """
        path = user_path(Path(path))
        tensors, metadata = read_tensors(path)
        if "hgad" in metadata:
            raise InputError(
                f"{path}: expected a detector, found a model alone; name a file that Detector.save wrote"
            )
        if "hgad_detector" not in metadata:
            raise InputError(f"{path}: expected a detector of this library, found another safetensors file")
        try:
            spec = json.loads(metadata["hgad_detector"])
            if spec["format"] > FORMAT:
                raise InputError(
                    f"{path}: written by a newer version of hgadlib (format {spec['format']}, this one reads "
                    f"up to {FORMAT}); update hgadlib"
                )
            if metadata.get("digest") != _digest(tensors, metadata["hgad_detector"]):
                raise InputError(f"{path}: the file was changed after it was written; take the original")
            return cls._from(spec, tensors, device)
        except InputError:
            raise
        except _WRONG_CONTENT as error:
            raise InputError(
                f"{path}: expected a detector of this version of the library, found another: "
                f"{' '.join(str(error).split())[:200]}"
            ) from None

    @classmethod
    def _from(cls, spec: dict[str, Any], tensors: dict[str, Tensor], device: str) -> Self:
        def part(name: str) -> dict[str, Tensor]:
            return {
                key.removeprefix(f"{name}."): v for key, v in tensors.items() if key.startswith(f"{name}.")
            }

        detector, target = cls(**{**spec["params"], "device": device}), select_device(device)
        detector.config_ = config = config_from_dict(spec["config"], "the detector's settings")
        features = config.features
        backbone = build_backbone(
            features.backbone, out_indices=features.out_indices, pyramid=features.pyramid, weights="random",
            join=features.join, neighbourhood=features.neighbourhood, image=features.image,
        ).with_folded(part("backbone"), spec["backbone"]["weights"])  # fmt: skip
        detector.backbone_ = backbone.to(target)
        detector.model_ = cast(
            HGAD, model_type(config).restored(spec["architecture"], part("model")).to(target)
        )
        detector.classes_, detector.bit_depth_ = detector.model_.classes, spec["bit_depth"]
        names = detector.classes_

        def normals(stored: dict[str, Tensor]) -> dict[str, Normals]:
            return {
                name: Normals(*(stored[f"{k}.{what}"].numpy() for what in ("scores", "peaks")))
                for k, name in enumerate(names)
                if f"{k}.scores" in stored
            }

        # Files of before have none of inferred classes: then those of the true ones must do, as they did.
        given = normals(part("normals"))
        detector._set_normals(given, normals(part("inferred")) or given)
        detector.reference_ = {names[int(k)]: value.numpy() for k, value in part("reference").items()}
        detector.typical_ = tensors["typical"].numpy()
        detector.trained_on_, detector.metrics_ = spec["trained_on"], spec["metrics"]
        if detector.typical_.shape != (len(names), 2):
            raise ValueError(f"expected two typical values a class, found {detector.typical_.shape}")
        for own, kept in detector.normals_.items():
            if len(detector.reference_[own]) != len(kept.scores):
                raise ValueError(f"class {own!r}: expected as many features as scores")
        detector.card()  # needs all the rest: thresholds of every class, what it was trained on
        return detector

    def card(self) -> str:
        """Write a model card in Markdown: what it is, what it was trained on, what it promises."""
        self._check_fitted()
        trained, rate = dict(self.trained_on_), self.false_alarm_rate
        added = trained.pop("added", {})
        mean = self.metrics_.get("mean", {})
        figures = [f"- {name}: {value:.4f}" for name, value in mean.items() if value is not None]
        rows = []
        for name in self.classes_:
            normals, promise = self.normals_for(name)
            limits = f"{normals.threshold(rate):.4g} | {normals.pixel_threshold(rate):.4g}"
            rows.append(f"| {name} | {trained['threshold'].get(name, 0)} | {limits} | {promise} |")
        return _CARD.format(
            added=f" Added since, without training: {', '.join(added)}." if added else "",
            classes=", ".join(self.classes_), count=len(self.classes_), **trained, rate=100 * rate,
            kept=sum(trained["threshold"].values()), rows="\n".join(rows),
            figures="\n".join(figures) or "None: there were no labelled test images.",
            backbone=self.backbone_.name, weights=self.backbone_.weights_digest[:12],
            commit=trained["environment"].get("commit") or "not known", config=self.config_.digest[:12],
        )  # fmt: skip

    def _check_fitted(self) -> None:
        if not hasattr(self, "model_"):
            raise NotFittedError("this detector has learnt nothing yet: call fit, or Detector.load")


_CARD = """# Model card

Anomaly detector for {count} class(es): {classes}.

## Trained on

Dataset `{dataset}`, normal images only: {train} to train, {held_out} more to calibrate scores, {kept} to
choose thresholds; seed {seed}.{added}

## Decision

An image is called anomalous above its class's threshold: on average at most {rate:g} % of new normal
images, if they come from where the images kept aside came from. A pixel is marked above the pixel
threshold: at most the same share of normal images has one. Both hold where the class is given (the
thresholds below) and where it is inferred: then the images kept aside were judged without their class too.

| class | images kept aside | threshold | pixel threshold | promise over |
|---|---|---|---|---|
{rows}

## Metrics on its test images, last epoch

{figures}

## Provenance

Backbone {backbone}, weights {weights}; their licence is that of their package, or of the model's page at
timm. The images' licence says what may be done with a model of them. hgadlib at commit {commit},
configuration {config}.
"""


@dataclass(frozen=True)
class _Judged:
    scores: Tensor
    maps: Tensor
    class_idx: Tensor
    sure: Tensor
    usual: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class _Kept:
    """What the images kept aside are like, by class: "given" and "inferred" say by which."""

    given: dict[str, Normals]
    inferred: dict[str, Normals]
    reference: dict[str, NDArray[np.float32]]
    usual: dict[str, list[float]]


@dataclass(frozen=True)
class _Loaded:
    name: str
    tensor: Tensor
    shown: NDArray[np.uint8]


def _count(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Count each class's images by what they are for."""
    return {
        name: {
            split: sum(record.class_name == name for record in getattr(dataset, split))
            for split in ("train", "held_out", "threshold", "test")
        }
        for name in dataset.classes
    }


def _typical(usual: Sequence[Sequence[float]], pooled: float | None = None) -> NDArray[np.float64]:
    """Compute mean and deviation by class, (K, 2); of a class without values NaN, which nothing is unlike.

    Of few images a deviation says little, so the variance within all classes, or the one given, counts too.
    """
    sizes = np.array([len(values) for values in usual])
    variances = np.array([np.var(values) if values else 0.0 for values in usual])
    pooled = sizes @ variances / max(sizes.sum(), 1) if pooled is None else pooled
    deviations = np.sqrt((sizes * variances + _POOLED * pooled) / (sizes + _POOLED))
    means = np.array([np.mean(values) if values else np.nan for values in usual])
    return np.stack([means, np.maximum(deviations, 1e-3)], axis=1)


def _tested(inputs: Inputs, name: str, *, alone: bool) -> Inputs | None:
    """Take the test images of one class alone, or of all others; None where there are none."""
    of = np.array([(record.class_name == name) == alone for record in inputs.dataset.test], dtype=bool)
    records = tuple(record for record, taken in zip(inputs.dataset.test, of, strict=True) if taken)
    test = inputs.test.take(np.flatnonzero(of))
    classes = tuple(own for own in inputs.dataset.classes if (own == name) == alone)
    dataset = replace(inputs.dataset, classes=classes, records=records)
    return replace(inputs, dataset=dataset, test=test) if records else None


def _write_folder(classes: Mapping[str, Any], folder: Path, bit_depth: int = 16) -> None:
    """Write images in memory, and link those in files, into one folder a class; bit_depth is of colours."""
    if not classes:
        raise InputError("expected normal images of at least one class, found none")
    for class_name, images in classes.items():
        # In MVTec's layout any name is one of a class: "score" too.
        target = folder / str(class_name) / "train" / GOOD
        try:
            if str(class_name) != Path(str(class_name)).name or is_litter(str(class_name)):
                raise ValueError
            target.mkdir(parents=True)
        except (OSError, ValueError):
            raise InputError(
                f"class {class_name!r}: expected a name that a folder can have; rename it"
            ) from None
        if isinstance(images, str | os.PathLike) and user_path(Path(images)).is_dir():
            # Of a folder with test images, say, only those to learn from.
            dataset = load_dataset("folder", root=user_path(Path(images)))
            if len(dataset.classes) > 1:
                found = ", ".join(dataset.classes)
                raise InputError(f"{images}: expected images of class {class_name!r} alone, found {found}")
            images = [record.path for record in dataset.train]
        for i, (name, image) in enumerate(named_images(images)[0]):
            if isinstance(image, str | os.PathLike):
                source = Path(image).resolve()
                if not (source.is_file() and is_image(source)):
                    raise InputError(f"{source}: expected an image file, found none")
                (target / f"{i:06d}_{source.name[-200:]}").symlink_to(source)
                continue
            stored, name = _deep_grey(image), f"{class_name}, {name}"
            save(as_rgb(image, bit_depth, name) if stored is None else stored, target / f"{i:06d}.png")


def _deep_grey(image: Any) -> NDArray[Any] | None:
    """Return the pixels of a grey image of 16 bits, whose depth is found over all images, else None."""
    if isinstance(image, Image.Image) and not image.mode.startswith("I;16"):
        return None
    pixels = np.asarray(image) if isinstance(image, Image.Image | np.ndarray) else np.zeros(0)
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    deep = pixels.ndim == 2 and pixels.size and pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2
    return pixels.astype(np.uint16) if deep else None


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Hash a file's whole content, whatever the order of its tensors."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
