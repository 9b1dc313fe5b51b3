"""A run's configuration: every setting, its constraint on the field; parameter files and overrides.

Precedence, weakest first: the defaults of the fields below, the experiment file that an experiment names as
its ``base``, ``params/<dataset>.yaml``, sections injected by ``papermill -f``,
``params/experiments/<experiment>.yaml``, the shortcuts (``-p epochs 24``), and the dotted ``overrides``. An
unknown key or an ill-typed value is one error line that lists what is known.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import numbers
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass

from hgadlib.errors import InputError
from hgadlib.files import user_path


def _whole(value: Any) -> Any:
    # NumPy's whole numbers are welcome; True, in Python one as well, is not.
    return value if isinstance(value, bool) or not isinstance(value, numbers.Integral) else int(value)


def _real(value: Any) -> Any:
    # Text may be a number: YAML 1.1 reads 1e-3 as text, for want of a dot.
    return "true or false" if isinstance(value, bool) else value


def _path(value: Any) -> Any:
    # A folder may be called 2024, which a command line reads as a number.
    return value if isinstance(value, bool) or not isinstance(value, PurePath | int) else str(value)


Whole = Annotated[int, Strict(), BeforeValidator(_whole)]
Real = Annotated[float, BeforeValidator(_real), Field(allow_inf_nan=False)]
Path_ = Annotated[str, Strict(), BeforeValidator(_path)]
Name = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]

Pixels = Annotated[Whole, Field(ge=16, le=8192)]
Count = Annotated[Whole, Field(ge=1, le=10**6)]
Share = Annotated[Real, Field(ge=0, le=1)]
Beta = Annotated[Real, Field(ge=0, lt=1)]
Method = Literal["hgad", "neighbours", "padim", "patchcore", "uniad", "stfpm", "draem", "pmad", "omnial"]
ONE_PASS: tuple[str, ...] = ("neighbours", "padim", "patchcore")
"""Methods that learn in one pass: no setting of epochs or steps changes them."""
Weight = Annotated[Real, Field(ge=0, le=1e9)]


@dataclass(frozen=True)
class DataConfig:
    """Where the images lie and how they are brought to one size."""

    root: Path_ | None = None
    """Folder of the dataset; None for $HGAD_DATA/NAME, else data/NAME."""
    download: Flag = False
    image_size: Pixels = 512
    """Pixels a side after resizing; with a pyramid, those of its largest image."""
    resize: Literal["stretch", "short_side_center_crop", "pad"] = "stretch"
    classes: Literal["folders", "discovered"] = "folders"
    """Where classes come from: the folders' names, or clusters of the images' features (App. A.2)."""
    strict: Flag = True
    """False leaves bad images out and lists them in the run record."""
    bit_depth: Annotated[Whole, Field(ge=8, le=16)] | None = None
    """Bits in use of files that hold 16 a channel; None finds them over the training images."""
    held_out: Annotated[Real, Field(ge=0, le=0.5)] = 0.0
    """Share of each class's training images kept out of training, to calibrate scores on; 0 calibrates on
    those trained on."""
    threshold: Annotated[Real, Field(ge=0, le=0.5)] = 0.0
    """Share of each class's training images kept out of all this first, to choose thresholds on."""
    num_workers: Annotated[Whole, Field(ge=1, le=1024)] | None = None
    """Decoding threads; None for one per core."""


@dataclass(frozen=True)
class FeaturesConfig:
    """The frozen backbone and which of its maps become levels."""

    backbone: Path_ = "tf_efficientnet_lite2"
    weights: Path_ | None = None
    """A weights file; None for the bundled ones, or timm's own."""
    out_indices: tuple[Annotated[Whole, Field(ge=0, le=64)], ...] = (3, 4)
    pyramid: tuple[Pixels, ...] | None = (512, 256)
    """Image sizes of a pyramid: then one stage, or all joined, at each size, is a level."""
    join: Flag = True
    """Join the stages into one level, each resized to the finest one's grid."""
    image: Pixels | None = None
    """Side at which the image itself is one more level, the last: for methods that see pixels."""
    neighbourhood: Annotated[Whole, Field(ge=1, le=31)] = 1
    """Positions a side over which each stage is averaged (odd); 1 for none."""
    dtype: Literal["float16", "float32"] = "float16"
    storage: Literal["auto", "device", "host", "file"] = "auto"
    batch_size: Annotated[Whole, Field(ge=1, le=65536)] = 16


@dataclass(frozen=True)
class FlowConfig:
    """The flow of each level (paper App. C)."""

    kind: Literal["positional", "convolutional"] = "positional"
    coupling: Literal["affine", "additive"] = "affine"
    """Additive couplings shift and do not scale: the volume that a block gives to a latent is constant."""
    layers: Annotated[Whole, Field(ge=0, le=1024)] = 4
    """Coupling blocks; 0 leaves the fixed map in front alone: the prior stands on the features."""
    position_dim: Annotated[Whole, Field(ge=0, le=65536)] = 64
    hidden_ratio: Annotated[Real, Field(ge=1e-3, le=1e3)] = 0.5
    """Hidden width of a subnet over its number of inputs (positions included)."""
    clamp: Annotated[Real, Field(ge=1e-6, le=1e3)] = 1.9
    normalise: Literal["none", "standardise", "whiten"] = "whiten"
    """A fixed affine map in front of the flow, set from the training features."""
    shrinkage: Annotated[Real, Field(gt=0, le=1)] = 0.01
    """Variance added to every direction before normalise's map, as a share of their mean variance."""
    keep: Annotated[Real, Field(gt=0, le=1)] = 1.0
    """Share of the channels' directions kept in front of the flow, those of least variance; needs whiten."""
    subnet_init: Literal["default", "zero"] = "zero"
    """zero starts every coupling as a rotation: the flow begins as the fixed map in front of it."""
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    """Share of the subnets' hidden values dropped in training."""


@dataclass(frozen=True)
class PriorConfig:
    """The prior of the latents (paper Sec. 3.3)."""

    kind: Literal["mixture", "single"] = "mixture"
    covariance: Literal["identity", "class", "learnt"] = "class"
    """Sigma_y of Eq. 5: I (as published), each class's own of the first latents, or learnt from that."""
    shrinkage: Annotated[Real, Field(gt=0, le=1)] = 0.3
    """Isotropic variance of the features added to a class's covariance, as a share of the features' own: it
    keeps directions that hardly vary from ruling the density."""
    rank: Annotated[Whole, Field(ge=0, le=65536)] = 8
    """Rank of what a learnt covariance adds to its diagonal."""
    n_centers: Annotated[Whole, Field(ge=1, le=65536)] = 1024
    init: Literal["index", "normal", "tiled_identity", "class_means"] = "class_means"
    delta_init: Literal["normal", "kmeans"] = "kmeans"
    """How a class's other centres start in the second stage: N(0, delta_std^2) about the main one, or on the
    clusters of its latents."""
    delta_std: Annotated[Real, Field(ge=0, le=1e6)] = 1.0
    learn_centers: Flag = True
    learn_weights: Flag = True


@dataclass(frozen=True)
class LossConfig:
    """Weights and switches of the training loss (paper Eq. 11)."""

    lambda1: Weight = 1.0
    lambda2: Weight = 0.1
    lambda_e: Weight = 1.0
    lambda_in: Weight = 1.0
    lambda_z: Weight = 0.0
    per_dimension: Flag = True
    label_smoothing: Share = 0.0
    detach_class_weights: Flag = True
    extended: Flag = False


@dataclass(frozen=True)
class BaselineConfig:
    """What the methods that HGAD is compared with take; each reads its own. See hgadlib.baselines."""

    bank: Literal["all", "class"] = "all"
    """Whose training features an image is compared with: all classes', or its own's (which must be known)."""
    channels: Annotated[Whole, Field(ge=1, le=65536)] = 100
    """Channels drawn of all (PaDiM)."""
    coreset: Annotated[Real, Field(gt=0, le=1)] = 0.1
    """Share of the candidates kept (PatchCore)."""
    candidates: Annotated[Whole, Field(ge=1, le=10**8)] = 100_000
    """Training features that a bank is chosen of at most, drawn at random (PatchCore)."""
    width: Annotated[Whole, Field(ge=1, le=4096)] = 128
    """Channels of the layers of what is trained."""
    layers: Annotated[Whole, Field(ge=1, le=64)] = 4
    """Layers, of each part that has several."""


@dataclass(frozen=True)
class TrainConfig:
    """The two-stage fit."""

    epochs: Count = 24
    batch_size: Count = 16
    first_stage: Share = 0.08
    """Share of the epochs without intra-class terms; 0 for one-stage optimisation."""
    entropy_in_first_stage: Flag = False
    lr: Annotated[Real, Field(ge=0, le=1e3)] = 1e-3
    schedule: Literal["step", "cosine", "constant"] = "cosine"
    milestones: tuple[Share, ...] = (0.48, 0.57, 0.88)
    """Shares of the epochs at which a step schedule drops the rate tenfold."""
    final_lr_ratio: Share = 1e-3
    warmup: Share = 0.05
    """Share of the epochs in which the rate rises linearly to lr."""
    warmup_start_ratio: Share = 0.1
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: Annotated[Real, Field(ge=0, le=1e3)] = 1e-4
    decay_prior: Flag = False
    step_per_level: Flag = False
    """One optimiser step per level, as the released code does; otherwise one for all."""
    gradient_clip: Annotated[Real, Field(ge=1e-12, le=1e12)] | None = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the subnets under autocast; densities stay in float32."""
    noise: Annotated[Real, Field(ge=0, le=1e3)] = 0.0
    """Standard deviation of Gaussian noise on training features behind flow.normalise's map, in units of each
    channel's own deviation there."""
    smooth: Flag = True
    """Noise on training features of the variance that prior.shrinkage adds to their class's covariance.
    Without it a flow learns to widen the directions that hardly vary until the shrinkage is undone."""
    rows: Annotated[Real, Field(gt=0, le=1)] = 0.25
    """Share of a grid's rows that a step sees, drawn anew for each; a convolutional flow sees all."""
    average: Share = 0.0
    """Share of the epochs, the last ones, whose weights the trained model averages."""
    evaluate_every: Annotated[Whole, Field(ge=0, le=10**6)] = 8
    """Epochs between evaluations on the test set; they never steer the training. 0 for the end only."""


@dataclass(frozen=True)
class ScoreConfig:
    """From log-likelihood and entropy to maps and scores (paper Sec. 3.4)."""

    criterion: Literal["likelihood", "entropy", "both"] = "likelihood"
    normalisation: Literal["calibrated", "inductive", "transductive", "raw"] = "calibrated"
    """calibrated standardises by normal images held out of training (data.held_out) or by the training
    images; two are scoring.inductive and scoring.transductive; raw takes values as they are."""
    image: Literal["maximum", "top", "quantile"] = "maximum"
    """An image's score, of all levels' map: maximum, mean of the highest share, or what that exceeds."""
    image_share: Annotated[Real, Field(gt=0, le=1)] = 0.01
    per_dimension: Flag = True
    """Divide log-likelihoods by D before the exponential, as the released code does."""
    map_size: Annotated[Whole, Field(ge=1, le=8192)] = 256
    sigma: Annotated[Real, Field(ge=0, le=1e3)] | None = None
    """Standard deviation of the Gaussian blur, in pixels of the map; None for half of each level's stride."""
    map_levels: Literal["all", "finest"] = "finest"
    """Levels whose mean is a calibrated map: all, or those of the finest grid, which show where. Image scores
    are of all levels, which tell whether; so are maps that are not calibrated."""


@dataclass(frozen=True)
class Config:
    """Everything that shapes a run."""

    dataset: Name = "demo"
    experiment: Name = "hgad"
    method: Method = "hgad"
    """The model: this paper's, or one that it is compared with; see hgadlib.baselines."""
    setting: Literal["unified", "one_for_one"] = "unified"
    """One model for all classes, or a model for each class (paper Tab. 6)."""
    seed: Annotated[Whole, Field(ge=0, le=2**32 - 1)] = 0
    device: Name = "auto"
    run_dir: Path_ | None = None
    """None for runs/<dataset>/<experiment>/seed<k> in the project's folder."""
    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested values, as YAML and JSON hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def identity(self) -> dict[str, Any]:
        """Return what the run computes: all values but where it reads, writes and executes."""
        values = self.to_dict()
        data, features = values["data"], values["features"]
        del values["run_dir"], values["device"], data["root"], data["download"], data["num_workers"]
        del features["storage"], features["batch_size"]
        for key, before in _ADDED.items():
            section, _, name = key.rpartition(".")
            part = values[section] if section else values
            if part[name] == before:
                del part[name]
        if not values["baseline"]:  # younger than some stored configurations as a whole
            del values["baseline"]
        return values

    @property
    def criterion(self) -> Literal["likelihood", "entropy", "both"]:
        """The criterion whose figures stand first: one Gaussian for all classes has no entropy over them."""
        has_entropy = self.prior.kind == "mixture" and self.method == "hgad"
        return self.score.criterion if has_entropy and self.setting == "unified" else "likelihood"

    @property
    def protocol(self) -> str:
        """Name of the protocol whose figures stand first, ``normalisation/criterion``."""
        return f"{self.score.normalisation}/{self.criterion}"

    @property
    def digest(self) -> str:
        """Hash of :meth:`identity`: the same for two runs that compute the same."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


_ADDED: dict[str, Any] = {
    "method": "hgad", "setting": "unified",
    **{f"baseline.{each.name}": each.default for each in dataclasses.fields(BaselineConfig)},
    "data.bit_depth": None, "data.held_out": 0.0, "data.threshold": 0.0,
    "features.join": False, "features.neighbourhood": 1, "features.image": None,
    "flow.coupling": "affine", "flow.shrinkage": 1e-3, "flow.keep": 1.0, "flow.subnet_init": "default",
    "flow.dropout": 0.0,
    "prior.covariance": "identity", "prior.shrinkage": 0.01, "prior.rank": 8,
    "train.noise": 0.0, "train.smooth": False, "train.rows": 1.0, "train.average": 0.0,
    "score.image": "maximum", "score.image_share": 0.01, "score.map_levels": "all",
}  # fmt: skip
"""Settings younger than some stored configuration, which does not name them, with what it computed by."""

_HINTS = typing.get_type_hints(Config, include_extras=True)

SECTIONS: tuple[str, ...] = tuple(name for name, hint in _HINTS.items() if dataclasses.is_dataclass(hint))

SHORTCUTS: dict[str, str] = {
    "data_root": "data.root", "download": "data.download", "classes": "data.classes",
    "image_size": "data.image_size", "num_workers": "data.num_workers", "backbone": "features.backbone",
    "epochs": "train.epochs", "batch_size": "train.batch_size",
}  # fmt: skip
"""Notebook parameters that stand for one key of a section."""

PLAIN: tuple[str, ...] = tuple(name for name in _HINTS if name not in SECTIONS)
PARAMETERS: tuple[str, ...] = (*PLAIN, *SHORTCUTS, *SECTIONS, "overrides", "base")
"""Every name that ``papermill -p``, ``-y`` or ``-f`` may set."""

_KEYS: dict[str, Any] = {name: _HINTS[name] for name in PLAIN} | {
    f"{section}.{name}": hint
    for section in SECTIONS
    for name, hint in typing.get_type_hints(_HINTS[section], include_extras=True).items()
}


def unknown(name: str, known: Sequence[str], what: str) -> InputError:
    """Return the error for a name that is not known: which is closest, and all there are.

    Example:
        >>> print(unknown("elvp", ["demo", "elpv"], "dataset"))
        unknown dataset 'elvp' (did you mean elpv?); expected one of: demo, elpv
    """
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return InputError(f"unknown {what} {name!r}{hint}; expected one of: {', '.join(known)}")


class _Tree:
    """Settings merged from several sources, weakest first; each remembers where its value came from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}

    def set(self, key: str, value: Any, source: str) -> None:
        """Set one dotted key, if there is such a setting."""
        if key not in _KEYS:
            section = key.rpartition(".")[0]
            if section not in ("", *SECTIONS):
                raise unknown(section, SECTIONS, f"section in {source}")
            known = [other for other in _KEYS if other.rpartition(".")[0] == section]
            raise unknown(key, known, f"parameter in {source}")
        self.values[key], self.sources[key] = value, source

    def merge(self, values: Any, source: str, part: str = "") -> None:
        """Merge a parameter file's contents; part names the section, or "overrides", they stand in."""
        if not isinstance(values, Mapping):
            raise InputError(f"ill-typed {part} in {source}: expected keys with values, found {values!r}")
        for name, value in values.items():
            if part in SECTIONS:
                self.set(f"{part}.{name}", value, source)
            elif part and name in ("dataset", "experiment"):
                raise InputError(
                    f"{name} in overrides of {source}: it names a parameter file; give it as a parameter"
                )
            elif name in SECTIONS or name == "overrides":
                self.merge(value, source, name)
            elif part or name in PARAMETERS:
                self.set(SHORTCUTS.get(name, str(name)), value, source)
            else:
                raise unknown(str(name), PARAMETERS, f"parameter in {source}")

    def update(self, other: _Tree) -> None:
        """Merge settings that are stronger."""
        self.values |= other.values
        self.sources |= other.sources

    def scale_pyramid(self, pyramid: Sequence[int] | None) -> None:
        """Scale the sides of a pyramid along with the image size: all its levels are of the same image."""
        size = self.values["data.image_size"]
        if pyramid and isinstance(size, int):
            scaled = [round(side * size / pyramid[0]) for side in pyramid]
            self.set("features.pyramid", scaled, self.sources["data.image_size"])

    def config(self) -> Config:
        """Check every value against its field and build the configuration."""
        nested: dict[str, Any] = {section: {} for section in SECTIONS}
        for key, value in self.values.items():
            section, _, name = key.rpartition(".")
            (nested[section] if section else nested)[name] = value
        try:
            config = Config(**nested)
        except ValidationError as error:
            raise self._refusal(error.errors()[0]) from None
        flow, positional = config.flow, config.flow.kind == "positional"
        size, area, norm = flow.position_dim, config.features.neighbourhood, flow.normalise
        code = "a multiple of 4 (sine and cosine of row and column)"
        for wrong, key, expected, found in (
            (positional and size % 4, "flow.position_dim", code, size),
            (area % 2 == 0, "features.neighbourhood", "an odd number", area),
            (flow.keep < 1 and norm != "whiten", "flow.keep", "normalise: whiten beside it", norm),
            (
                config.method not in ("hgad", "neighbours") and config.score.normalisation != "raw",
                "score.normalisation",
                f"raw beside method {config.method}",
                config.score.normalisation,
            ),
        ):
            if wrong:
                where = f"parameter {key} in {self._source(key)}"
                raise InputError(f"{where}: expected {expected}, found {found}")
        return config

    def _source(self, key: str) -> str:
        return self.sources.get(key, "the defaults")

    def _refusal(self, error: Any) -> InputError:
        where = error["loc"]
        key = ".".join(where[:2]) if where[0] in SECTIONS else where[0]
        name, found = f"parameter {key} in {self._source(key)}", self.values.get(key)
        limits = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
        for bound, limit in error.get("ctx", {}).items():
            if bound in limits:
                return InputError(f"{name}: expected {limits[bound]} {limit:.10g}, found {found!r}")
        return InputError(f"ill-typed {name}: expected {_described(_KEYS[key])}, found {found!r}")


def _described(hint: Any) -> str:
    """Describe a field's type as a user knows it."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _described(options[0])
    if origin is Literal:
        return "one of " + ", ".join(options)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(option) for option in options)
    if origin is tuple:
        count = "" if options[-1] is Ellipsis else f"{len(options)} "
        return f"a list of {count}{_described(options[0]).removeprefix('a ')}s"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, "null")


def load_config(parameters: Mapping[str, Any] | None = None, **more: Any) -> Config:
    """Resolve parameters, or keywords, of :data:`PARAMETERS` to a configuration; None counts as not given.

    Raises:
        InputError: An unknown name, an ill-typed or meaningless value, an unknown dataset or experiment.

    Example:
        >>> load_config(dataset="demo", epochs=3).train.epochs
        3
    """
    given = {k: v for k, v in {**(parameters or {}), **more}.items() if v is not None}
    for name in given:
        if name not in PARAMETERS:
            raise unknown(name, PARAMETERS, "parameter")
    folder, here = params_dir(), "the parameters"
    dataset = given.get("dataset", Config.dataset)
    own = _Tree()
    own.merge({"dataset": dataset}, here)
    own.merge(read_params(dataset, folder), f"params/{dataset}.yaml")
    own.merge({k: v for k, v in given.items() if k in SECTIONS}, "the parameter file")
    experiment = given.get("experiment", own.values.get("experiment", Config.experiment))
    # The default experiment is the one whose settings are the dataset's own.
    default, tree = experiment == Config.experiment, _Tree()
    values = {} if default else read_params(experiment, folder / "experiments")
    if (base := values.pop("base", given.get("base"))) is not None:
        tree.merge(read_params(base, folder / "experiments"), f"params/experiments/{base}.yaml")
    tree.update(own)
    tree.merge(values, f"params/experiments/{experiment}.yaml")
    direct = _Tree()
    direct.merge({k: v for k, v in given.items() if k in PLAIN or k in SHORTCUTS}, here)
    direct.merge(given.get("overrides", {}), here, "overrides")
    if "data.image_size" in direct.values and "features.pyramid" not in direct.values:
        direct.scale_pyramid(tree.values.get("features.pyramid", FeaturesConfig.pyramid))
    tree.update(direct)
    return tree.config()


def completed(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a section's stored values by the settings that are younger: what it computed without them."""
    added = {key: before for key, before in _ADDED.items() if key.startswith(f"{section}.")}
    return {key.rpartition(".")[2]: before for key, before in added.items()} | dict(values)


def config_from_dict(values: Mapping[str, Any], source: str = "the parameters") -> Config:
    """Build a configuration from stored nested values, complete but for settings younger than they are.

    An InputError as of :func:`load_config`.
    """
    tree = _Tree()
    for key, before in _ADDED.items():
        tree.set(key, before, source)
    tree.merge(values, source)
    return tree.config()


def config_from_notebook(
    namespace: Mapping[str, Any], *, own: Collection[str] = (), **defaults: Any
) -> Config:
    """Resolve a notebook's variables, as papermill has set them, to a configuration.

    Papermill only warns of an unknown parameter; here it is an InputError, see :func:`load_config`. Names
    that start with an underscore, modules, functions and IPython's own are none. When the cell is run again,
    what later cells have made is none either, unless so close to a parameter's name that it must be a slip.

    Args:
        namespace: ``globals()`` of the notebook, right after the parameters cell; the first call marks it.
        own: Names of parameters that are the chapter's own and none of the configuration's.
        **defaults: Parameters to use where the notebook sets none.
    """
    plain = (str, int, float, bool, list, tuple, dict, Path)
    names = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and name not in ("In", "Out", *own) and isinstance(value, plain)
    }
    if namespace.get("_parameters_seen"):
        names = {name: value for name, value in names.items() if _is_parameter(name)}
    config = load_config({**defaults, **names})
    if isinstance(namespace, dict):
        namespace["_parameters_seen"] = True
    return config


def _is_parameter(name: str) -> bool:
    # A slip adds, drops or swaps a letter or two; "epoch" and "dataset_" are slips, "metrics" is not.
    return name in PARAMETERS or bool(difflib.get_close_matches(name, PARAMETERS, n=1, cutoff=0.85))


def project_dir() -> Path:
    """Find the folder of the project: runs/ and results/ lie in it.

    It is the current folder, or one up to two above it, that has the project's params/; else the checkout
    that this package lies in; else, where the package is installed by itself, the current folder.
    """
    here = Path.cwd()
    checkout = Path(__file__).resolve().parents[1]
    found = (folder for folder in (here, *here.parents[:2], checkout) if _has_params(folder))
    return next(found, here)


def params_dir() -> Path:
    """Find the parameter files: the project's own, else those shipped inside the package."""
    project = project_dir()
    return project / "params" if _has_params(project) else Path(__file__).resolve().parent / "params"


def _has_params(folder: Path) -> bool:
    # Another project's params/ may lie about: ours has these two.
    return (folder / "params" / "demo.yaml").is_file() and (folder / "params" / "experiments").is_dir()


def read_params(name: Any, folder: Path) -> dict[str, Any]:
    """Read params/NAME.yaml; an InputError if there is none (it lists the known names) or it is not YAML."""
    if not isinstance(name, str):
        kind = "experiment" if folder.name == "experiments" else "dataset"
        raise InputError(f"ill-typed parameter {kind} in the parameters: expected text, found {name!r}")
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        kinds = {"experiments": "experiment", "grids": "grid"}
        raise unknown(name, known, kinds.get(folder.name, "dataset"))
    path = folder / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise InputError(f"{path.name}: expected YAML, found a syntax error: {where}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path.name}: expected keys with values, found {type(values).__name__}")
    return values


def run_dir(config: Config) -> Path:
    """Return the run's directory: as configured, else runs/ and its name, in the project."""
    if config.run_dir is not None:
        return user_path(config.run_dir)
    return project_dir() / "runs" / run_name(config)


def run_name(config: Config) -> str:
    """Name a run: <dataset>/<experiment>/seed<k>; the experiment's part says where each class has a model."""
    setting = "" if config.setting == "unified" else f"-{config.setting}"
    return f"{config.dataset}/{config.experiment}{setting}/seed{config.seed}"


def training_key(config: Config, *, seed: bool = True) -> str:
    """Return a text that is equal for two runs exactly if they train the same model on the same settings.

    The experiment's name is not part of it, nor is how scores are made of the model's values: every record
    holds all protocols. So the rows "10 centres", "lambda2 = 10" and "both criteria" share one run.
    With seed False all seeds of one experiment share a key.
    """
    identity = config.identity()
    del identity["experiment"], identity["score"]["criterion"], identity["score"]["normalisation"]
    del identity["train"]["evaluate_every"]  # looks at the test set do not steer the training
    if config.method != "hgad":  # what it does not read
        del identity["flow"], identity["prior"], identity["loss"]
        if config.method in ONE_PASS:
            del identity["train"]
        else:
            identity["train"].pop("smooth", None)
    elif config.prior.kind == "single":
        identity["prior"] = {"kind": "single", "shrinkage": config.prior.shrinkage}
    if not seed:
        del identity["seed"]
    return json.dumps(identity, sort_keys=True)
