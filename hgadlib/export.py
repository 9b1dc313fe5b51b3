"""A detector as one ONNX file: images in, decisions out, with all that lies between.

The file takes ``images``, (B, H, W, 3) uint8 RGB of any B, H and W, and ``class_id``, (B,) int64: the place
of each image's class in the file's list of classes, -1 where the class is to be inferred. It gives what
:meth:`hgadlib.detector.Detector.predict` gives:

* ``score``, ``p_value`` and ``pixel_threshold``, (B,) float32; ``is_anomalous`` and ``unknown``, (B,) bool;
* ``class``, (B,) int64: the one given, or the one inferred;
* ``map``, (B, S, S) float32.

A prior with one Gaussian for several classes infers none: a -1 then makes the runtime refuse the batch, by an
index out of bounds, as it does any class beyond the last.

Images are resized inside the file, as the detector resizes them. Pillow's bilinear filter is a matrix a
side, triangles as wide as a step between output pixels, its numbers rounded to 22 bits and each side's result
to whole grey levels. In double precision all these sums are exact, so the file's pixels are those of the
Pillow that was there at export, bit by bit; a test compares them over sizes up and down. It takes some 60
bytes of memory a pixel of the image. Of decoding the file knows nothing: EXIF rotation, 16 bits and
transparency are the caller's, by the rules of :func:`hgadlib.datasets.images.as_rgb`.

It computes in double precision what the detector does: resizing, maps, verdicts; the rest in single.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import hgadlib
from hgadlib.datasets.images import as_rgb
from hgadlib.datasets.scan import named_images
from hgadlib.errors import InputError
from hgadlib.evaluation.evaluate import score_images
from hgadlib.evaluation.thresholds import UNLIKE
from hgadlib.features.backbone import flatten_maps
from hgadlib.files import replacing, user_path, write_atomically
from hgadlib.flow import AffineCoupling, FeatureFlow
from hgadlib.mixture import (
    HierarchicalGaussianMixture,
    center_entropy,
    class_evidence,
    evidence_positions,
    mixtures,
    softmax_entropy,
    standard_log_prob,
)
from hgadlib.scoring import (
    _LEAST,
    Calibration,
    LevelValues,
    image_scores,
    log_normality,
    missing_normality,
    upsampling_matrix,
)

if TYPE_CHECKING:
    from hgadlib.detector import Detector

FORMAT = 1
"""Goes up when inputs or outputs of an exported file change."""
TOLERANCE = 1e-4
"""Most that a score may differ from PyTorch's, as a share of it where it is above 1."""
OUTPUTS = ("score", "p_value", "is_anomalous", "class", "map", "unknown", "pixel_threshold")
"""What an exported file gives, in order."""
# Bits of Pillow's resampling weights.
_BITS = 22
_BILINEAR = Image.Resampling.BILINEAR
# Logarithm of an anomaly's share, from 0 down, above which its own logarithm has too few digits.
_SMALL = 1e-7


def _columns_first() -> bool:
    """Tell whether this Pillow resizes the columns of tall images before their rows, as later ones do."""
    tall = Image.fromarray((np.arange(64 * 16 * 3) ** 2 % 251).astype(np.uint8).reshape(64, 16, 3))
    one, other = (tall.resize(first, _BILINEAR).resize((11, 11), _BILINEAR) for first in ((16, 11), (11, 64)))
    direct = tall.resize((11, 11), _BILINEAR).tobytes()
    return direct == one.tobytes() != other.tobytes()


class Resize(nn.Module):
    """Pillow's antialiased bilinear resizing, of images whose size is known when they come.

    Args:
        size: Pixels a side of the result.
        policy: As of :func:`hgadlib.datasets.images.resize_image`.
    """

    def __init__(self, size: int, policy: str = "stretch") -> None:
        super().__init__()
        self.size, self.policy, self.columns_first = size, policy, _columns_first()

    def forward(self, images: Tensor) -> Tensor:
        """Resize (B, H, W, 3) uint8 to (B, size, size, 3), whole numbers in float32."""
        if not self.columns_first:
            return self._rows_first(images)
        height, width = (_as_tensor(n) for n in images.shape[1:3])
        rows, columns = self._placement(height, width)[3], self._placement(width, height)[3]
        # Which side comes first matters: each is rounded. This is Pillow's choice, seen from its results.
        tall = (height > rows) & (height - rows > 2 * (width - columns))
        return torch.cond(tall, self._tall, self._rows_first, (images,))

    def _rows_first(self, images: Tensor) -> Tensor:
        height, width = images.shape[1:3]
        x = images.permute(0, 2, 1, 3).flatten(2)
        x = self._along(x, *self._weights(width, height)).unflatten(2, (height, 3))
        x = self._along(x.permute(0, 2, 1, 3).flatten(2), *self._weights(height, width))
        return x.unflatten(2, (self.size, 3)).float().contiguous()

    def _tall(self, images: Tensor) -> Tensor:
        return self._rows_first(images.permute(0, 2, 1, 3)).permute(0, 2, 1, 3).contiguous()

    def _along(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Resize the second axis: (B, L, N) to (B, size, N), rounded."""
        taps = x[:, index.flatten()].unflatten(1, (self.size, -1)).double()
        return (weights[:, None] @ taps)[:, :, 0].add(0.5).floor().clamp(0, 255)

    def _weights(self, length: int, other: int) -> tuple[Tensor, Tensor]:
        """Compute which pixels of an axis each output pixel is made of, and their shares: (size, taps)."""
        own, across = _as_tensor(length), _as_tensor(other)
        start, end, first, count = self._placement(own, across)
        # As in Pillow: the part of the image in single precision, all else in double.
        scale = (end.float() - start.float()).double() / count
        support = scale.clamp_min(1)
        position = torch.arange(self.size, dtype=torch.float64) - first
        centre = (start.float().double() + (position + 0.5) * scale)[:, None]
        # A pad's shorter side may be rounded down by as much as a third.
        longest = (3 * torch.sym_max(length, other) + 1) // 2 if self.policy == "pad" else length
        taps = torch.arange(2 * ((longest + self.size - 1) // self.size) + 1)
        index = (centre - support + 0.5).floor().clamp_min(0) + taps
        weights = (1 - (index + 0.5 - centre).abs() / support).clamp_min(0) * (index < own)
        weights = weights / weights.sum(1, keepdim=True)
        weights = (weights * 2**_BITS + 0.5).floor() / 2**_BITS
        inside = (position >= 0) & (position < count)
        index = torch.minimum(index, own - 1).to(torch.int64)
        return index, torch.where(inside[:, None], weights, 0.0)

    def _placement(self, own: Tensor, across: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the part of an axis that is taken, start and end, and its place, first pixel and count."""
        size, nothing = torch.full_like(own, self.size), torch.zeros_like(own)
        if self.policy == "stretch":
            return nothing, own, nothing, size
        if self.policy == "pad":
            count = (size * own / torch.maximum(own, across)).round().clamp_min(1)
            return nothing, own, ((size - count) / 2).floor(), count
        full = (size * own / torch.minimum(own, across)).floor()
        left, scale = ((full - size) / 2).round(), own / full
        return left * scale, torch.minimum((left + size) * scale, own), nothing, size


def _as_tensor(length: int) -> Tensor:
    """Turn the length of an axis, which export knows by a symbol, into a number to compute with."""
    return torch.arange(length, dtype=torch.float64)[-1] + 1


class Decision(nn.Module):
    """All that a fitted detector does with pixels, as one function of tensors.

    Args:
        detector: A fitted one; it keeps its own weights.
    """

    @torch.no_grad()
    def __init__(self, detector: Detector) -> None:
        super().__init__()
        config, self.rate = detector.config_, detector.false_alarm_rate
        self.score, self.criterion = config.score, config.criterion
        backbone = copy.deepcopy(detector.backbone_).cpu()
        self.backbone, self.model = backbone, copy.deepcopy(detector.model_).cpu().requires_grad_(False)
        # Prepared here, they are constants of the graph.
        self.mixtures = [
            prior.mixtures() if isinstance(prior, HierarchicalGaussianMixture) else None
            for prior in self.model.priors
        ]
        self.resize = Resize(config.data.image_size, config.data.resize)
        mean, std = np.array(backbone.mean), np.array(backbone.std)
        self.register_buffer("scale", torch.from_numpy((1 / (255 * std)).astype(np.float32)))
        self.register_buffer("offset", torch.from_numpy((-mean / std).astype(np.float32)))
        for size in backbone.pyramid or ():
            eye = torch.eye(config.data.image_size)[None, None]
            shrunk = F.interpolate(eye, (size, len(eye[0, 0])), mode="bilinear", antialias=True)
            self.register_buffer(f"shrink_{size}", shrunk[0, 0])
        # First of the classes as they are given, then as they are inferred.
        own = [detector.normals_for(n, inferred=i)[0] for i in (False, True) for n in detector.classes_]
        kept = max(len(normals.scores) for normals in own)
        # What is missing counts as less than any score.
        scores = np.full((len(own), kept), -np.inf)
        for row, normals in zip(scores, own, strict=True):
            row[: len(normals.scores)] = normals.scores
        for name, values in {
            "normal_scores": scores,
            "kept": np.array([float(len(normals.scores)) for normals in own]),
            "thresholds": np.array([normals.threshold(self.rate) for normals in own]),
            "pixel_thresholds": np.array([normals.pixel_threshold(self.rate) for normals in own]),
            "least": np.float64(_LEAST),  # as a number it would be exported in single precision: 0
            "typical": np.asarray(detector.typical_, dtype=np.float64),
        }.items():
            self.register_buffer(name, torch.as_tensor(values))

    def forward(self, images: Tensor, class_id: Tensor) -> tuple[Tensor, ...]:
        """Judge B images; see the module's text for inputs and outputs."""
        pixels = (self.resize(images) * self._own("scale") + self._own("offset")).permute(0, 3, 1, 2)
        values, class_idx = self._values(self._features(pixels), class_id)
        row = torch.where(class_id < 0, class_idx + len(self.model.classes), class_idx)
        scores, maps = self._scores(values, class_idx)
        last = values.log_prob[-1].flatten(1)
        # The median, of an even number the lower one.
        usual = last.topk((last.shape[1] + 1) // 2, largest=False).values[:, -1]
        mean, std = self._own("typical")[class_idx].unbind(1)
        exact = scores.double()
        anomalous = exact > self._own("thresholds")[row]
        unknown = anomalous & ((mean - usual.double()) / std > UNLIKE)
        as_much = (self._own("normal_scores")[row] >= exact[:, None]).double().sum(1)
        p_value = (1 + as_much) / (self._own("kept")[row] + 1)
        pixel = self._own("pixel_thresholds")[row].float()
        return scores, p_value.float(), anomalous, class_idx, maps, unknown, pixel

    def _own(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Compute the levels' features, (B, N, C) each."""
        backbone, maps = self.backbone, []
        for size in backbone.pyramid or (images.shape[-1],):
            x = images
            if size != images.shape[-1]:
                matrix = self._own(f"shrink_{size}")
                x = matrix @ (x @ matrix.T)
            maps += backbone._stages(x)
        return flatten_maps(maps)

    def _values(self, features: Sequence[Tensor], class_id: Tensor) -> tuple[LevelValues, Tensor]:
        """Compute level values under the given classes, or the likeliest where none is given."""
        model, n_classes = self.model, len(self.model.classes)
        latents, log_dets, evidence = [], [], []
        for (flow, _), classes, x, grid in zip(
            model.levels, self.mixtures, features, model.grids, strict=True
        ):
            z, log_det = latents_of(flow, x)
            latents.append(z)
            log_dets.append(log_det)
            if classes is not None and n_classes > 1:
                some = z[:, evidence_positions(grid)]  # (B, P, D), each under K mixtures
                evidence.append(class_evidence(classes.log_prob(some[:, None]).mT))
        if n_classes == 1:
            class_idx = class_id.clamp_min(0)
        elif model.has_entropy:
            class_idx = torch.where(class_id < 0, torch.stack(evidence).sum(0).argmax(1), class_id)
        else:
            class_idx = torch.where(class_id < 0, n_classes, class_id)
        log_probs, neg_entropies = [], []
        for prior, classes, grid, z, log_det in zip(
            model.priors, self.mixtures, model.grids, latents, log_dets, strict=True
        ):
            log_prob = standard_log_prob(z) if classes is None else classes.of(class_idx).log_prob(z)
            dim = z.shape[-1] if model.per_dimension else 1
            log_probs.append(((log_prob + log_det) / dim).unflatten(1, grid))
            if self.criterion != "likelihood":
                neg_entropies.append(
                    _neg_entropy(cast(HierarchicalGaussianMixture, prior), z).unflatten(1, grid)
                )
        return LevelValues(tuple(log_probs), tuple(neg_entropies)), class_idx

    def _scores(self, values: LevelValues, class_idx: Tensor) -> tuple[Tensor, Tensor]:
        """Score images and draw their maps: as :func:`hgadlib.evaluation.evaluate.score_images`."""
        model, score = self.model, self.score

        def stored(name: str) -> LevelValues:
            levels = [model.get_buffer(f"{name}_{level}")[class_idx] for level in range(len(model.grids))]
            entropies = tuple(x[:, 1] for x in levels) if values.neg_entropy else ()
            return LevelValues(tuple(x[:, 0] for x in levels), entropies)

        if score.normalisation == "calibrated":
            constants = Calibration(stored("normal_mean"), stored("normal_std"))
            return score_images(values, constants, score, self.criterion)
        logs, shares, where = [], [], (score.map_size, score.sigma)
        for criterion in ("likelihood", "entropy") if self.criterion == "both" else (self.criterion,):
            likelihood = criterion == "likelihood"
            levels = [v.double() for v in (values.log_prob if likelihood else values.neg_entropy)]
            maxima = (model.log_prob_max if likelihood else model.neg_entropy_max)[class_idx]
            present = log_normality(levels, maxima, *where) - math.log(len(levels))
            missing = missing_normality(levels, maxima, *where) / len(levels)
            missing = torch.maximum(missing, self._own("least")).log()
            logs.append(present)
            shares.append(torch.where(present < -math.log(2), (1 - present.exp()).log(), missing))
        total = torch.stack(shares).sum(0)
        # A graph has no branch for some pixels and no log1p, so what is hardly missing anything of an anomaly
        # comes from the logs of the normality alone; there both forms agree to half of _SMALL.
        maps = torch.where(total > -_SMALL, -torch.stack(logs).logsumexp(0), -(-total).log()).float()
        return image_scores(maps, score.image, score.image_share), maps


def latents_of(flow: FeatureFlow, features: Tensor) -> tuple[Tensor, Tensor]:
    """Map features by the flow's plain form, block by block: as :meth:`hgadlib.flow.FeatureFlow.forward`."""
    x, log_det = features, torch.zeros_like(features[..., 0])
    if flow.normaliser is not None:
        (x,), constant = flow.normaliser((features,))
        log_det = log_det + constant
    for block in flow.inn:
        if isinstance(block, AffineCoupling):
            (x,), of_block = block((x,), [] if flow.positions is None else [flow.positions])
            log_det = log_det + of_block
    return x, log_det


def _neg_entropy(prior: HierarchicalGaussianMixture, z: Tensor) -> Tensor:
    """As :meth:`hgadlib.mixture.HierarchicalGaussianMixture.neg_entropy`."""
    whitening = prior.whitening()
    if whitening is None:
        return -center_entropy(z, prior.centers)
    main = mixtures(prior.centers[:, None], torch.zeros_like(prior.psi)[:, None], whitening)
    return -softmax_entropy(main.log_prob(z[:, None]).mT)


def export(detector: Detector, path: Path | str) -> Path:
    """Write a detector as one ONNX file, atomically, and its model card beside it.

    Args:
        detector: A fitted one.
        path: The file; the card takes its name with ``.md``.
    Returns:
        The file. Its metadata hold ``classes`` (a JSON list, whose order is the class id),
        ``false_alarm_rate``, ``version`` of this library and ``format``, see :data:`FORMAT`.
    Raises:
        InputError: Packages are missing (``pip install hgadlib[export]``), or it is a baseline.
        NotFittedError: Nothing was learnt yet.
    """
    card, path = detector.card(), user_path(Path(path))
    _need("onnx", "onnxscript")
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    if path.suffix == ".md":
        raise InputError(f"{path}: the model card takes this name; export to {path.stem}.onnx, say")
    config = detector.config_
    if config.method != "hgad" or config.setting != "unified":
        found = f"{config.method}, {config.setting}"
        raise InputError(f"export: expected method hgad, unified, found {found}; save it instead")
    height, width = (detector.config_.data.image_size + extra for extra in (24, 37))
    example = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8), torch.tensor([-1, 0])
    batch, *sides = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    decision = Decision(detector).eval()
    for length in {length for grid in detector.model_.grids for length in grid}:
        # Constants of the graph: made here, outside of it, they are remembered.
        upsampling_matrix(length, decision.score.map_size, decision.score.sigma)
    with torch.no_grad(), _quiet():
        program: Any = torch.onnx.export(
            decision, example, None, dynamo=True, verbose=False, external_data=False,
            input_names=["images", "class_id"], output_names=list(OUTPUTS),
            dynamic_shapes=(dict(enumerate((batch, *sides))), {0: batch}),
        )  # fmt: skip
        RemoveUnusedNodesPass()(program.model)  # the runtime would complain of what no node takes
    program.model.metadata_props.update(
        classes=json.dumps(list(detector.classes_)), false_alarm_rate=str(detector.false_alarm_rate),
        version=hgadlib.__version__, format=str(FORMAT),
    )  # fmt: skip
    with replacing(path) as temporary:
        program.save(temporary, external_data=False)
    write_atomically(path.with_suffix(".md"), card)
    return path


@dataclass(frozen=True)
class Validation:
    """How far an exported file is from the detector, over some images.

    Attributes:
        images: Their number.
        score: Largest difference of a score, as a share of it where it is above 1.
        p_value: Largest difference of a p-value.
        map: Largest difference of a map's pixel, as a share of it where it is above 1.
        changed: Images whose verdict, class or being unknown differs.
    """

    images: int
    score: float
    p_value: float
    map: float
    changed: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether no score differs by more than :data:`TOLERANCE`, and no decision at all."""
        return self.score <= TOLERANCE and not self.changed

    def __str__(self) -> str:
        """Write it in lines of at most 80 columns, but for the names of images.

        >>> print(Validation(3, 2e-6, 0.0, 5e-6, ()))
        ONNX beside PyTorch, 3 images: the same
          largest difference of a score    2.0e-06  (0.0001 is allowed)
          largest difference of a p-value  0.0e+00
          largest difference in a map      5.0e-06
          decisions changed                0
        """
        more = f": {', '.join(self.changed[:5])}{', ...' if len(self.changed) > 5 else ''}"
        return "\n".join(
            [
                f"ONNX beside PyTorch, {self.images} images: {'the same' if self.ok else 'NOT the same'}",
                f"  largest difference of a score    {self.score:.1e}  ({TOLERANCE:g} is allowed)",
                f"  largest difference of a p-value  {self.p_value:.1e}",
                f"  largest difference in a map      {self.map:.1e}",
                f"  decisions changed                {len(self.changed)}{more if self.changed else ''}",
            ]
        )


def validate(detector: Detector, path: Path | str, images: Any) -> Validation:
    """Compare an exported file with the detector it was made of, image by image.

    Classes are inferred; where the prior cannot, the images are given the classes in turn.

    Args:
        detector: A fitted one.
        path: What :func:`export` wrote.
        images: As of :meth:`hgadlib.detector.Detector.predict`; real ones, normal and anomalous.
    Raises:
        InputError: The file is no exported detector, an image cannot be read, there is none, or onnxruntime
            is missing.
    """
    _need("onnxruntime")
    session = _session(user_path(Path(path)), detector.classes_)
    classes, infers = detector.classes_, detector.model_.has_entropy or len(detector.classes_) == 1
    score, p_value, of_map, changed, count = 0.0, 0.0, 0.0, [], 0
    for count, (name, image) in enumerate(named_images(images)[0], 1):
        pixels = as_rgb(image, detector.bit_depth_, name)
        given = -1 if infers else (count - 1) % len(classes)
        one = next(detector.predict([pixels], class_name=None if infers else classes[given]))
        inputs = {"images": pixels[None], "class_id": np.array([given])}
        try:
            found = dict(zip(OUTPUTS, (x[0] for x in session.run(list(OUTPUTS), inputs)), strict=True))
        except Exception as error:  # the runtime's own, of other inputs or outputs
            raise _no_detector(path, error) from None
        score = max(score, _difference(found["score"], one.score))
        p_value = max(p_value, abs(float(found["p_value"]) - one.p_value))
        of_map = max(of_map, _difference(found["map"], one.anomaly_map))
        verdict = one.is_anomalous, one.is_unknown, classes.index(one.class_name)
        if verdict != (bool(found["is_anomalous"]), bool(found["unknown"]), int(found["class"])):
            changed.append(name)
    if not count:
        raise InputError("validate: expected at least one image, found none")
    return Validation(count, score, p_value, of_map, tuple(changed))


def _session(path: Path, classes: Sequence[str]) -> Any:
    runtime: Any = importlib.import_module("onnxruntime")
    if not path.is_file():
        raise InputError(f"{path}: expected an exported detector (.onnx), found no file")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions
        raise _no_detector(path, error) from None
    found = session.get_modelmeta().custom_metadata_map.get("classes")
    if found is None:
        raise InputError(f"{path}: expected an exported detector, found another ONNX file")
    if json.loads(found) != list(classes):
        raise InputError(f"{path}: expected a detector of the classes {', '.join(classes)}, found {found}")
    return session


def _no_detector(path: Path | str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:160]
    return InputError(f"{path}: expected the exported file of this detector, found another: {reason}")


def _difference(found: Any, expected: Any) -> float:
    """Compute the largest difference, as a share of the expected value where that is above 1."""
    found, expected = (np.asarray(x, dtype=np.float64) for x in (found, expected))
    if found.shape != expected.shape:
        return math.inf
    worst = float((np.abs(found - expected) / np.maximum(1, np.abs(expected))).max())
    return math.inf if math.isnan(worst) else worst


def _need(*packages: str) -> None:
    """Raise an InputError where a package of the extra is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"export: expected the package(s) {' and '.join(missing)}, found none; "
            "pip install hgadlib[export]"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's talk of its own steps off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
