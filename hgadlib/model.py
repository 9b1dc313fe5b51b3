"""The HGAD model: one flow and one prior per feature level, and the constants of its scores."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, cast

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from hgadlib.config import FlowConfig, PriorConfig, completed
from hgadlib.errors import InputError
from hgadlib.flow import FeatureFlow, FixedAffine, Moments, kept_channels
from hgadlib.losses import hgad_losses
from hgadlib.method import Method
from hgadlib.mixture import GaussianPrior, HierarchicalGaussianMixture, class_evidence, evidence_positions
from hgadlib.scoring import LevelValues

Prior = HierarchicalGaussianMixture | GaussianPrior
# Images of each class that k-means sees at least, positions of each likewise, and latents for each centre.
_IMAGES, _POSITIONS, _PER_CENTER = 64, 64, 64


class _Size:
    """Mean of rows that arrive batch by batch, and their mean variance over the channels."""

    def __init__(self) -> None:
        self.count, self.squares, self.shift, self.sums = 0, 0.0, torch.zeros(0), torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Add rows, (N, C). Squares are taken about the first batch's mean, so none is large."""
        if not self.count:
            self.shift, self.sums = rows.mean(0), torch.zeros(rows.shape[1], dtype=torch.float64)
        centred = rows - self.shift
        self.count += len(rows)
        self.sums += centred.sum(0).cpu().double()
        self.squares += centred.square().sum().item()

    @property
    def mean(self) -> Tensor:
        """(C,) float64, on the host."""
        return self.shift.cpu().double() + self.sums / self.count

    @property
    def variance(self) -> float:
        """Mean of the channels' variances; 0 without rows."""
        if not self.count:
            return 0.0
        squares = self.squares / self.count - float((self.sums / self.count).square().sum())
        return max(squares, 0.0) / len(self.sums)


class HGAD(Method):
    """Flows and priors of all levels, trained and scored together.

    Args:
        classes: Names of the K classes; their order is the class index.
        channels: C of each level.
        grids: (H, W) of each level.
        flow: The flows' settings.
        prior: The priors' settings.
        per_dimension: Divide log-likelihoods by D in the scores.
    """

    has_constants = True

    def __init__(
        self,
        classes: Sequence[str],
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        *,
        flow: FlowConfig,
        prior: PriorConfig,
        per_dimension: bool = True,
    ) -> None:
        super().__init__(classes, channels, grids, entropy=prior.kind == "mixture")
        self.flow_config, self.prior_config, self.per_dimension = flow, prior, per_dimension
        self.flows = nn.ModuleList()
        self.priors = nn.ModuleList()
        for channels_, grid in zip(self.channels, self.grids, strict=True):
            dim = kept_channels(channels_, flow.keep)
            inputs = dim - dim // 2 + (flow.position_dim if flow.kind == "positional" else 0)
            self.flows.append(
                FeatureFlow(
                    channels_, grid, kind=flow.kind, layers=flow.layers, position_dim=flow.position_dim,
                    hidden=max(1, round(flow.hidden_ratio * inputs)), clamp=flow.clamp,
                    normalise=flow.normalise != "none", keep=flow.keep, coupling=flow.coupling,
                    subnet_init=flow.subnet_init, dropout=flow.dropout,
                )
            )  # fmt: skip
            self.priors.append(
                GaussianPrior() if prior.kind == "single" else HierarchicalGaussianMixture(
                    len(self.classes), prior.n_centers, dim, init=prior.init, delta_std=prior.delta_std,
                    learn_centers=prior.learn_centers, learn_weights=prior.learn_weights,
                    covariance=prior.covariance, rank=prior.rank,
                )
            )  # fmt: skip
        # What shrinkage adds to the features' variance, by class: known to a model that was initialised.
        for level in range(len(self.channels)):
            self.register_buffer(f"added_{level}", torch.zeros(len(self.classes)), persistent=False)
        self.eval()  # only the epochs of a fit are training, where flows may drop values

    @property
    def levels(self) -> list[tuple[FeatureFlow, Prior]]:
        """Flow and prior of each level."""
        return [
            (cast(FeatureFlow, flow), cast(Prior, prior))
            for flow, prior in zip(self.flows, self.priors, strict=True)
        ]

    @property
    def splits_centers(self) -> bool:
        """Whether the second stage starts with the centres within each class on clusters of its latents."""
        return self.has_entropy and self.prior_config.delta_init == "kmeans"

    @torch.no_grad()
    def initialise(self, batches: Callable[[], Iterable[tuple[Sequence[Tensor], Tensor]]]) -> None:
        """Set from data what is not learnt: the flows' normalisers, then class means and covariances.

        Args:
            batches: Returns, at each call, the same training images a batch at a time: features, one
                (B, H*W, C) a level, and class indices, (B,). Not called where nothing comes from data.
        """
        if self.flow_config.normalise != "none":
            moments = [Moments(dim) for dim in self.channels]
            for features, _ in batches():
                for moment, x in zip(moments, features, strict=True):
                    moment.add(x.flatten(0, 1))
            for (flow, _), moment in zip(self.levels, moments, strict=True):
                normaliser = cast(FixedAffine, flow.normaliser)
                whiten, shrinkage = self.flow_config.normalise == "whiten", self.flow_config.shrinkage
                normaliser.fit(moment.mean, moment.covariance, whiten=whiten, shrinkage=shrinkage)
        self._place_classes(batches, means=self.prior_config.init == "class_means")
        if not self.has_entropy:  # one Gaussian for all takes no covariance, but training features may
            for level, sizes in enumerate(self._sizes(batches)):
                for k, size in enumerate(sizes):
                    self.get_buffer(f"added_{level}")[k] = self.prior_config.shrinkage * size.variance

    def _sizes(self, batches: Callable[[], Iterable[tuple[Sequence[Tensor], Tensor]]]) -> list[list[_Size]]:
        """Measure the features of each level and class."""
        sizes = [[_Size() for _ in self.classes] for _ in self.levels]
        for features, class_idx in batches():
            for size, x in zip(sizes, features, strict=True):
                for k in class_idx.unique().tolist():
                    size[k].add(x[class_idx == k].flatten(0, 1))
        return sizes

    def _place_classes(
        self, batches: Callable[[], Iterable[tuple[Sequence[Tensor], Tensor]]], *, means: bool
    ) -> None:
        """Take the main centres, if means, and the covariances of the classes in the batches from latents."""
        start, covariances = self.prior_config, self.prior_config.covariance != "identity"
        mixtures = [prior for prior in self.priors if isinstance(prior, HierarchicalGaussianMixture)]
        if mixtures and (means or covariances):
            sums = [torch.zeros_like(mixture.centers) for mixture in mixtures]
            counts = torch.zeros(len(self.classes), device=self.device)
            classes = self.classes if covariances else ()
            spreads = [[Moments(mixture.centers.shape[1]) for _ in classes] for mixture in mixtures]
            sizes = self._sizes(batches) if covariances else []
            for features, class_idx in batches():
                counts += torch.bincount(class_idx, minlength=len(self.classes))
                for level, ((flow, _), x) in enumerate(zip(self.levels, features, strict=True)):
                    z = flow(x)[0]
                    sums[level].index_add_(0, class_idx, z.mean(1))
                    for k in class_idx.unique().tolist() if covariances else ():
                        spreads[level][k].add(z[class_idx == k].flatten(0, 1))
            found = counts > 0
            for level, ((flow, _), mixture, total, spread) in enumerate(
                zip(self.levels, mixtures, sums, spreads, strict=True)
            ):
                mean = total / counts.clamp_min(1)[:, None]
                if means:
                    mixture.set_centers(torch.where(found[:, None], mean, mixture.centers))
                for k, own in enumerate(spread):
                    if own.count:
                        size = sizes[level][k]
                        added = start.shrinkage * size.variance
                        noise = flow.noise_covariance(size.mean.to(mixture.centers), added)
                        mixture.set_covariance(k, own.covariance + noise)
                        self.get_buffer(f"added_{level}")[k] = added

    @torch.no_grad()
    def with_class(
        self, name: str, batches: Callable[[], Iterable[tuple[Sequence[Tensor], Tensor]]], *, seed: int = 0
    ) -> Self:
        """Return a copy that has one class more, at the sorted place of its name; nothing is trained.

        The flows, and all that the other classes have, stay as they are: so do their log-likelihoods, bit for
        bit. The new class is a Gaussian about its mean latent, of its own covariance where classes have one;
        or a mixture of such, on the clusters of its latents, where those of the others started there. Its
        scores are to be calibrated, see :meth:`calibrate`.

        Args:
            name: Of the new class.
            batches: Returns, at each call, its normal images a batch at a time, as of :meth:`initialise`; the
                class indices are not looked at.
            seed: Of the clusters.
        Raises:
            InputError: There is a class of this name.
        """
        if name in self.classes:
            raise InputError(f"expected a class that the model does not know, found {name!r}; rename it")
        made = copy.deepcopy(self)
        made.classes = tuple(sorted([*self.classes, name]))
        k = made.classes.index(name)
        for buffer in made.buffers(recurse=False):
            buffer.data = torch.cat([buffer[:k], torch.zeros_like(buffer[:1]), buffer[k:]])

        def own() -> Iterator[tuple[Sequence[Tensor], Tensor]]:
            return ((features, torch.full_like(class_idx, k)) for features, class_idx in batches())

        if made.has_entropy:
            made.priors = nn.ModuleList(
                cast(HierarchicalGaussianMixture, prior).with_class(k) for prior in made.priors
            )
            made._place_classes(own, means=True)
            if made.splits_centers:
                counts = torch.zeros(len(made.classes), dtype=torch.int64)
                counts[k] = sum(len(class_idx) for _, class_idx in own())
                made.split_centers(own(), counts, seed=seed)
        return made

    @property
    def images_to_split(self) -> int:
        """Images of each class that :meth:`split_centers` is best given, or all where there are fewer.

        A position each way of an image is like the next, so clusters are better of few positions of many
        images than the other way round.
        """
        return max(_IMAGES, _PER_CENTER * self.prior_config.n_centers // _POSITIONS)

    @torch.no_grad()
    def split_centers(
        self, batches: Iterable[tuple[Sequence[Tensor], Tensor]], counts: Tensor, *, seed: int = 0
    ) -> None:
        """Put the offsets within each class on the clusters of its latents; see the mixture's ``split``.

        Args:
            batches: Training images: features, one (B, H*W, C) a level, and class indices, (B,).
            counts: How many of them are of each class, (K,): of fewer images more positions are taken.
            seed: Of the positions taken and of k-means.
        Raises:
            FloatingPointError: A latent is not finite.
        """
        generator = torch.Generator().manual_seed(seed)
        wanted = _PER_CENTER * self.prior_config.n_centers
        positions = [max(_POSITIONS, math.ceil(wanted / max(n, 1))) for n in counts.tolist()]
        # Their place is made beforehand: parts to be joined are a training's peak of memory.
        latents = [
            [
                torch.empty(n, min(p, h * w), cast(HierarchicalGaussianMixture, prior).centers.shape[1])
                for n, p in zip(counts.tolist(), positions, strict=True)
            ]
            for prior, (h, w) in zip(self.priors, self.grids, strict=True)
        ]
        filled = [0] * len(positions)
        for features, class_idx in batches:
            images = {k: (class_idx == k).nonzero()[:, 0].cpu() for k in class_idx.unique().tolist()}
            for (flow, _), x, own in zip(self.levels, features, latents, strict=True):
                order, z = torch.randperm(x.shape[1], generator=generator), flow(x)[0].cpu()
                for k, mine in images.items():
                    own[k][filled[k] : filled[k] + len(mine)] = z[mine][:, order[: positions[k]]]
            for k, mine in images.items():
                filled[k] += len(mine)
        tasks = []
        for level, ((_, prior), own) in enumerate(zip(self.levels, latents, strict=True)):
            for k, held in enumerate(own):
                z = held[: filled[k]].flatten(0, 1)
                if not z.isfinite().all():
                    raise FloatingPointError(
                        f"level {level + 1}: latents of class {self.classes[k]!r} are not finite"
                    )
                tasks.append((cast(HierarchicalGaussianMixture, prior), z, k))
        # Each on a thread of its own and on no more, so that the bits do not depend on how many there are.
        threads = torch.get_num_threads()
        with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(lambda task: task[0].split(*task[1:], seed=seed), tasks):
                pass

    def losses(
        self,
        features: Sequence[Tensor],
        class_idx: Tensor,
        *,
        intra: bool = True,
        precision: torch.dtype = torch.float32,
        noise: float = 0.0,
        smooth: bool = False,
        rows: float = 1.0,
        **weights: Any,
    ) -> list[dict[str, Tensor]]:
        """Compute each level's loss terms (paper Eq. 11).

        Args:
            features: One (B, H*W, C) a level.
            class_idx: (B,).
            intra: Second stage: with the intra-class terms.
            precision: bfloat16 runs the subnets under autocast.
            noise: On the features; see :meth:`FeatureFlow.forward`.
            smooth: Noise on the features of the variance that the prior's shrinkage adds to them.
            rows: Share of each grid's rows that a positional flow takes, drawn by torch's global generator.
            **weights: See :func:`hgadlib.losses.hgad_losses`.
        Returns:
            One dictionary of scalars a level, "total" among them.
        """
        terms = []
        for level, (flow, prior, x) in enumerate(self._fitted(features)):
            some = None
            if rows < 1 and flow.kind == "positional":
                height = flow.grid[0]
                some = torch.randperm(height)[: max(1, round(rows * height))].sort().values.to(x.device)
                x = x.unflatten(1, flow.grid)[:, some].flatten(1, 2)
            if smooth:
                deviation = self.get_buffer(f"added_{level}")[class_idx].sqrt()
                x = x + deviation[:, None, None] * torch.randn_like(x)
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
                z, log_det = flow(x, noise=noise, rows=some)
            terms.append(hgad_losses(z, log_det, class_idx, prior, intra=intra, **weights))
        return terms

    def log_prob(self, features: Sequence[Tensor], class_idx: Tensor) -> list[Tensor]:
        r"""Compute the log-density of features under the mixture of their image's class, in nats.

        .. math:: \log p(x|y) = \log\sum_i p_i(y)\,\mathcal N(\varphi(x);\mu_i^y, \Sigma_y) + \log|\det J|

        Args:
            features: One (B, H*W, C) a level.
            class_idx: Class of each image, (B,) int64; without meaning where the prior is a single Gaussian.
        Returns:
            One (B, H*W) a level.
        Source: paper Eq. 1 and Sec. 3.4.
        """
        return [log_prob for _, log_prob in self._densities(features, class_idx)]

    def _densities(self, features: Sequence[Tensor], class_idx: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each level's latents, (B, H*W, C), and log-densities, (B, H*W)."""
        for flow, prior, x in self._fitted(features):
            z, log_det = flow(x)
            yield z, prior.log_prob(z, class_idx) + log_det

    def _fitted(self, features: Sequence[Tensor]) -> Iterator[tuple[FeatureFlow, Prior, Tensor]]:
        """Pair each level with its features; refuse those of another shape than the model's."""
        for (flow, prior), x in zip(self.levels, self.checked(features), strict=True):
            yield flow, prior, x

    @torch.inference_mode()
    def level_values(
        self, features: Sequence[Tensor], class_idx: Tensor, *, entropy: bool = True
    ) -> LevelValues:
        """Compute what scores are made of.

        Args:
            features: One (B, H*W, C) a level.
            class_idx: Class of each image, (B,).
            entropy: Compute entropies, too. They take a product by every class's covariance; for scores by
                likelihood they are not needed.
        Returns:
            Log-likelihoods (per dimension where so configured) and negative entropies, one (B, H, W) a level.
        """
        log_probs, neg_entropies = [], []
        densities = self._densities(features, class_idx)
        for (z, log_prob), prior, grid in zip(densities, self.priors, self.grids, strict=True):
            scale = z.shape[-1] if self.per_dimension else 1
            log_probs.append((log_prob / scale).unflatten(1, grid))
            if entropy and isinstance(prior, HierarchicalGaussianMixture):
                neg_entropies.append(prior.neg_entropy(z).unflatten(1, grid))
        return LevelValues(tuple(log_probs), tuple(neg_entropies))

    def by_class(self, features: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each level's latents, (B, H*W, C), log-determinants and evidence log p(z|y), (B, P, K).

        That is of the positions that :func:`hgadlib.mixture.evidence_positions` takes.

        Raises:
            InputError: The model has one Gaussian for all classes, so no class is likelier than another.
        """
        if not self.has_entropy:
            raise InputError(
                "class inference: expected a prior with a mixture per class, found one Gaussian for all; say "
                "which class each image is of, or take that of the nearest training image"
            )
        for (flow, prior, x), grid in zip(self._fitted(features), self.grids, strict=True):
            z, log_det = flow(x)
            some = z[:, evidence_positions(grid).to(z.device)]
            yield z, log_det, cast(HierarchicalGaussianMixture, prior).log_prob_by_class(some)

    @torch.inference_mode()
    def inferred_values(
        self, features: Sequence[Tensor], *, entropy: bool = True
    ) -> tuple[LevelValues, Tensor, Tensor]:
        r"""Infer each image's class and compute its values under it, in one pass of the flows.

        It is the class of most evidence over levels, :func:`hgadlib.mixture.class_evidence`.

        Args:
            features: One (B, H*W, C) a level.
            entropy: As of :meth:`level_values`.
        Returns:
            Level values as of :meth:`level_values`, the classes (B,) int64, and how sure they are: the share
            of the positions asked at which the class is the likeliest, (B,).
        Raises:
            InputError: As of :meth:`by_class`.
        Source: paper Sec. 3.4, for every class in turn.
        """
        latents, log_dets, evidence = zip(*self.by_class(features), strict=True)
        class_idx = torch.stack([class_evidence(by_class) for by_class in evidence]).sum(0).argmax(1)
        agree = torch.cat([by_class.argmax(-1) == class_idx[:, None] for by_class in evidence], 1)
        log_probs, neg_entropies = [], []
        for z, log_det, prior, grid in zip(latents, log_dets, self.priors, self.grids, strict=True):
            prior = cast(HierarchicalGaussianMixture, prior)
            scale = z.shape[-1] if self.per_dimension else 1
            log_probs.append(((prior.log_prob(z, class_idx) + log_det) / scale).unflatten(1, grid))
            if entropy:
                neg_entropies.append(prior.neg_entropy(z).unflatten(1, grid))
        return LevelValues(tuple(log_probs), tuple(neg_entropies)), class_idx, agree.float().mean(1)

    def extra_repr(self) -> str:
        """Name the classes, the levels and the settings that shape the model."""
        names = ", ".join(self.classes[:4]) + (", ..." if len(self.classes) > 4 else "")
        levels = ", ".join(f"{c} x {h} x {w}" for c, (h, w) in zip(self.channels, self.grids, strict=True))
        flow, prior = self.flow_config, self.prior_config
        centers = f", {prior.n_centers} centers per class" if self.has_entropy else ""
        return (
            f"{len(self.classes)} classes: {names}\nlevels (C x H x W): {levels}\n"
            f"flow: {flow.kind}, {flow.layers} blocks, clamp {flow.clamp:g}, "
            f"hidden ratio {flow.hidden_ratio:g}, normalise {flow.normalise}\nprior: {prior.kind}{centers}"
        )

    def architecture(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""
        return super().architecture() | {
            "flow": dataclasses.asdict(self.flow_config),
            "prior": dataclasses.asdict(self.prior_config),
            "per_dimension": self.per_dimension,
        }

    def undecayed(self) -> list[nn.Parameter]:
        """List the priors' parameters."""
        return list(self.priors.parameters())

    @classmethod
    def restored(cls, architecture: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Build the model that :meth:`architecture` describes, with these weights."""
        spec = dict(architecture)
        spec["flow"] = FlowConfig(**completed("flow", spec["flow"]))
        spec["prior"] = PriorConfig(**completed("prior", spec["prior"]))
        model = cls(**spec)
        model.load_state_dict(tensors)
        return model
