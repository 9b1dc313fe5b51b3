"""A run's settings: frozen dataclasses, one per section of a parameter file, with defaults and ranges."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class DataConfig:
    """Where the images lie and how they are brought to one size."""

    root: str | None = None
    """Folder of the dataset; None for $HGAD_DATA/NAME, else data/NAME."""
    download: bool = False
    image_size: int = 512
    """Pixels a side after resizing; with a pyramid, those of its largest image."""
    resize: Literal["stretch", "short_side_center_crop", "pad"] = "stretch"
    classes: Literal["folders", "discovered"] = "folders"
    """Where classes come from: the folders' names, or clusters of the images' features (App. A.2)."""
    strict: bool = True
    """False leaves bad images out and lists them in the run record."""
    num_workers: int | None = None
    """Decoding threads; None for one per core."""


@dataclass(frozen=True)
class FeaturesConfig:
    """The frozen backbone and which of its maps become levels."""

    backbone: str = "tf_efficientnet_lite0"
    weights: str | None = None
    """A weights file; None for the bundled ones, or timm's own."""
    out_indices: tuple[int, ...] = (4,)
    pyramid: tuple[int, ...] | None = (512, 256)
    """Image sizes of a pyramid: then one stage, at each size, is a level."""
    dtype: Literal["float16", "float32"] = "float16"
    storage: Literal["auto", "device", "host", "file"] = "auto"
    batch_size: int = 16


@dataclass(frozen=True)
class FlowConfig:
    """The flow of each level (paper App. C)."""

    kind: Literal["positional", "convolutional"] = "positional"
    layers: int = 8
    position_dim: int = 64
    hidden_ratio: float = 1.0
    """Hidden width of a subnet over its number of inputs (positions included)."""
    clamp: float = 1.9
    normalise: Literal["none", "standardise", "whiten"] = "whiten"
    """A fixed affine map in front of the flow, set from the training features."""


@dataclass(frozen=True)
class PriorConfig:
    """The prior of the latents (paper Sec. 3.3)."""

    kind: Literal["mixture", "single"] = "mixture"
    n_centers: int = 10
    init: Literal["index", "normal", "tiled_identity", "class_means"] = "class_means"
    delta_init: Literal["normal", "kmeans"] = "kmeans"
    """How a class's other centres start in the second stage: N(0, delta_std^2) about the main one, or on the
    clusters of its latents."""
    delta_std: float = 1.0
    learn_centers: bool = True
    learn_weights: bool = True


@dataclass(frozen=True)
class LossConfig:
    """Weights and switches of the training loss (paper Eq. 11)."""

    lambda1: float = 1.0
    lambda2: float = 1.0
    lambda_e: float = 1.0
    lambda_in: float = 1.0
    lambda_z: float = 0.0
    per_dimension: bool = True
    label_smoothing: float = 0.0
    detach_class_weights: bool = True
    extended: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """The two-stage fit."""

    epochs: int = 24
    batch_size: int = 16
    first_stage: float = 0.08
    """Share of the epochs without intra-class terms; 0 for one-stage optimisation."""
    entropy_in_first_stage: bool = False
    lr: float = 1e-3
    schedule: Literal["step", "cosine", "constant"] = "cosine"
    milestones: tuple[float, ...] = (0.48, 0.57, 0.88)
    """Shares of the epochs at which a step schedule drops the rate tenfold."""
    final_lr_ratio: float = 1e-3
    warmup: float = 0.05
    """Share of the epochs in which the rate rises linearly to lr."""
    warmup_start_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    decay_prior: bool = False
    step_per_level: bool = False
    """One optimiser step per level, as the released code does; otherwise one for all."""
    gradient_clip: float | None = 100.0
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the subnets under autocast; densities stay in float32."""
    evaluate_every: int = 8
    """Epochs between evaluations on the test set; they never steer the training. 0 for the end only."""


@dataclass(frozen=True)
class ScoreConfig:
    """From log-likelihood and entropy to maps and scores (paper Sec. 3.4)."""

    criterion: Literal["likelihood", "entropy", "both"] = "likelihood"
    normalisation: Literal["inductive", "transductive"] = "inductive"
    per_dimension: bool = True
    """Divide log-likelihoods by D before the exponential, as the released code does."""
    map_size: int = 256
    sigma: float = 4.0
    """Standard deviation of the Gaussian blur, in pixels of the map."""


@dataclass(frozen=True)
class Config:
    """Everything that shapes a run."""

    dataset: str = "demo"
    experiment: str = "hgad"
    seed: int = 0
    device: str = "auto"
    run_dir: str | None = None
    """None for runs/<dataset>/<experiment>/seed<k> in the project's folder."""
    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)

    def to_dict(self) -> dict[str, Any]:
        """Give plain nested values, as YAML and JSON hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def identity(self) -> dict[str, Any]:
        """Give what the run computes: all values but where it reads, writes and executes."""
        values = self.to_dict()
        for key in ("run_dir", "device"):
            del values[key]
        for key in ("root", "download", "num_workers"):
            del values["data"][key]
        for key in ("storage", "batch_size"):
            del values["features"][key]
        return values

    @property
    def digest(self) -> str:
        """Hash of :meth:`identity`: the same for two runs that compute the same."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "data.image_size": (16, 8192),
    "data.num_workers": (1, 1024),
    "features.out_indices": (0, 64),
    "features.pyramid": (16, 8192),
    "features.batch_size": (1, 65536),
    "flow.layers": (1, 1024),
    "flow.position_dim": (0, 65536),
    "flow.hidden_ratio": (1e-3, 1e3),
    "flow.clamp": (1e-6, 1e3),
    "prior.n_centers": (1, 65536),
    "prior.delta_std": (0, 1e6),
    "loss.lambda1": (0, 1e9),
    "loss.lambda2": (0, 1e9),
    "loss.lambda_e": (0, 1e9),
    "loss.lambda_in": (0, 1e9),
    "loss.lambda_z": (0, 1e9),
    "loss.label_smoothing": (0, 1),
    "train.epochs": (1, 10**6),
    "train.batch_size": (1, 10**6),
    "train.first_stage": (0, 1),
    "train.lr": (0, 1e3),
    "train.milestones": (0, 1),
    "train.final_lr_ratio": (0, 1),
    "train.warmup": (0, 1),
    "train.warmup_start_ratio": (0, 1),
    "train.betas": (0, 1 - 1e-9),
    "train.weight_decay": (0, 1e3),
    "train.gradient_clip": (1e-12, 1e12),
    "train.evaluate_every": (0, 10**6),
    "score.map_size": (1, 8192),
    "score.sigma": (0, 1e3),
}
"""Least and most of each setting, both allowed; outside they have no meaning. Of lists, every item."""
