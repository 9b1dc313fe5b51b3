"""The peer of the benchmarks: HGAD the published way, written plainly from the description of that code.

The backbone runs on every image in every pass, unfolded, in PyTorch's usual layout; the position code is
concatenated to every feature vector and goes through FrEIA's AllInOneBlock; the centres within a class meet
the latents in an (N, M, D) tensor; each level has its own optimiser and steps by itself; maps are upsampled
level by level and blurred an image at a time on the host. Reading and resizing images is the library's for
both sides, and so are the formulas: the peer takes our model's weights and must come to the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from hgadlib.config import Config, LossConfig
from hgadlib.datasets.images import load_images
from hgadlib.features.backbone import Backbone, create_feature_network
from hgadlib.flow import FeatureFlow, PositionalCoupling, positional_encoding_2d
from hgadlib.mixture import LOG_2PI, HierarchicalGaussianMixture
from hgadlib.model import HGAD
from hgadlib.training import learning_rate


class PublishedFlow(nn.Module):
    """A flow of AllInOneBlocks with the weights of one of ours.

    Args:
        flow: Ours, positional and without a normaliser.
    """

    def __init__(self, flow: FeatureFlow) -> None:
        super().__init__()
        blocks = [block for block in flow.inn if isinstance(block, PositionalCoupling)]
        if len(blocks) != len(flow.inn) or flow.positions is None:
            raise ValueError("expected a flow of positional couplings alone, found other blocks")
        self.grid, self.position_dim = flow.grid, flow.positions.shape[1]
        channels, width = sum(blocks[0].splits), blocks[0].subnet[0].out_features

        def subnet(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))

        self.inn = SequenceINN(channels)
        for block in blocks:
            self.inn.append(
                AllInOneBlock,
                cond=0,
                cond_shape=(self.position_dim,),
                subnet_constructor=subnet,
                affine_clamping=block.clamp,
                global_affine_type="SOFTPLUS",
                permute_soft=False,  # its place is taken by our rotation, so none need be drawn
            )
        state = flow.inn.state_dict()
        state |= {f"{k}_inv": v.T.contiguous() for k, v in state.items() if k.endswith("w_perm")}
        self.inn.load_state_dict(state)
        self.to(flow.positions)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to latents (B*H*W, C) and log-determinants (B*H*W,)."""
        code = positional_encoding_2d(self.position_dim, *self.grid).to(maps)
        codes = code.unsqueeze(0).repeat(len(maps), 1, 1, 1)
        rows = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
        return self.inn(rows, c=[codes.permute(0, 2, 3, 1).reshape(-1, self.position_dim)])


class PublishedModel:
    """Flows, priors and optimisers of all levels, with the weights that ours has now.

    Args:
        model: Ours, with mixture priors.
        config: Training settings and loss weights; one stage of all terms or two, but no k-means, no whole
            mixture (Eq. 18) and no clipping of gradients over all levels.
    """

    def __init__(self, model: HGAD, config: Config) -> None:
        self.flows = [PublishedFlow(flow) for flow, _ in model.levels]
        self.priors: list[HierarchicalGaussianMixture] = []
        for _, prior in model.levels:
            assert isinstance(prior, HierarchicalGaussianMixture)
            n_classes, n_centers, dim = prior.intra_centers().shape
            copy = HierarchicalGaussianMixture(n_classes, n_centers, dim)
            copy.load_state_dict(prior.state_dict())
            self.priors.append(copy.to(prior.centers.device))
        train, self.config = config.train, config
        self.optimisers = [
            torch.optim.Adam(
                [
                    {"params": flow.inn.parameters(), "weight_decay": train.weight_decay},
                    {"params": prior.parameters(), "weight_decay": 0.0},
                ],
                lr=train.lr,
                betas=train.betas,
            )
            for flow, prior in zip(self.flows, self.priors, strict=True)
        ]

    def step(self, maps: Sequence[Tensor], class_idx: Tensor, *, intra: bool, progress: float) -> float:
        """Take one step per level; give the loss averaged over levels, as ours is.

        Args:
            maps: One (B, C, H, W) a level.
            class_idx: (B,).
            intra: Second stage.
            progress: Share of the training that is done.
        """
        total = 0.0
        for level, optimiser in enumerate(self.optimisers):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(progress, self.config.train)
            flow, prior = self.flows[level], self.priors[level]
            z, log_det = flow(maps[level])
            own = class_idx.repeat_interleave(maps[level][0, 0].numel())
            loss = self._loss(z, log_det, own, prior, intra)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() / len(self.flows)
        return total

    def _loss(
        self, z: Tensor, log_det: Tensor, own: Tensor, prior: HierarchicalGaussianMixture, intra: bool
    ) -> Tensor:
        settings: LossConfig = self.config.loss
        weights, dim = asdict(settings), z.shape[-1]
        scale = 1.0 / dim if settings.per_dimension else 1.0
        constant = 0.5 * dim * LOG_2PI
        log_weights = prior.log_weights
        logits = -0.5 * squared_distances(z, prior.centers)
        nll = constant - torch.logsumexp(logits + log_weights, -1) - log_det
        loss = weights["lambda1"] * (scale * nll).mean()
        class_weights = log_weights.detach() if settings.detach_class_weights else log_weights
        gain = F.log_softmax(logits + class_weights, -1) - class_weights
        smooth = settings.label_smoothing
        mi = (1 - smooth) * gain.gather(-1, own[:, None])[:, 0] + smooth * gain.mean(-1)
        loss = loss - weights["lambda2"] * mi.mean()
        if intra or self.config.train.entropy_in_first_stage:
            log_p = F.log_softmax(logits, -1)
            loss = loss - weights["lambda_e"] * (log_p.exp() * log_p).sum(-1).mean()
        if intra:
            intra_nll = -intra_log_likelihood(z, own, prior) - log_det
            loss = loss + weights["lambda_in"] * (scale * intra_nll).mean()
            if weights["lambda_z"]:
                loss = loss - weights["lambda_z"] * F.logsigmoid(-intra_nll / dim).mean()
        return loss


def squared_distances(z: Tensor, centers: Tensor) -> Tensor:
    """Squared distances of latents (N, D) to main centres (K, D), as (N, K)."""
    return ((z[:, None] - centers) ** 2).sum(-1)


def intra_log_likelihood(z: Tensor, own: Tensor, prior: HierarchicalGaussianMixture) -> Tensor:
    """Log-density of (N, D) latents under the mixtures of their own classes (N,): an (N, M, D) tensor."""
    centers = prior.intra_centers()[own]
    log_kernel = -0.5 * ((z[:, None] - centers) ** 2).sum(-1)
    constant = 0.5 * z.shape[-1] * LOG_2PI
    return torch.logsumexp(log_kernel + prior.log_weights_intra[own], -1) - constant


class PublishedBackbone(nn.Module):
    """The network of one of our backbones as timm makes it: unfolded, in PyTorch's usual layout."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.network = create_feature_network(backbone.name, backbone.out_indices, None)
        self.network.eval().requires_grad_(False)
        self.pyramid = backbone.pyramid
        self.to(next(backbone.parameters()).device)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Give the maps of images (B, 3, H, W), one a level."""
        if self.pyramid is None:
            return list(self.network(images))
        maps = []
        for size in self.pyramid:
            scaled = images
            if size != images.shape[-1]:
                scaled = F.interpolate(
                    images, size=(size, size), mode="bilinear", align_corners=False, antialias=True
                )
            maps += self.network(scaled)
        return maps


def image_batches(
    paths: Sequence[Path], order: Sequence[Tensor], config: Config, backbone: Backbone
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read images batch by batch, each pass anew: indices (B,) and images (B, 3, S, S)."""
    flat = torch.cat(list(order))
    sizes = {len(batch) for batch in order[:-1]} or {len(flat)}
    loaded = load_images(
        [paths[i] for i in flat.tolist()],
        size=config.data.image_size,
        resize=config.data.resize,
        mean=backbone.mean,
        std=backbone.std,
        batch_size=sizes.pop(),
        num_workers=config.data.num_workers,
    )
    for rows, images in loaded:
        yield flat[rows], images


def predict(
    config: Config,
    backbone: PublishedBackbone,
    flows: Sequence[PublishedFlow],
    model: HGAD,
    images: Tensor,
    class_idx: Tensor,
) -> tuple[np.ndarray, np.ndarray]:
    """Score images (B, 3, S, S) of known class: image scores (B,) and maps (B, size, size).

    The constants of the scores are those that our model stores, so that the scores are comparable.
    """
    size, sigma = config.score.map_size, config.score.sigma
    shape = (len(images), size, size)
    likelihood, entropy = torch.zeros(shape), torch.zeros(shape)
    with torch.no_grad():
        for level, (maps, flow) in enumerate(zip(backbone(images), flows, strict=True)):
            prior = model.levels[level][1]
            assert isinstance(prior, HierarchicalGaussianMixture)
            z, log_det = flow(maps)
            height, width = maps.shape[2:]
            own = class_idx.repeat_interleave(height * width)
            log_prob = intra_log_likelihood(z, own, prior) + log_det
            if config.score.per_dimension:
                log_prob = log_prob / z.shape[-1]
            log_p = F.log_softmax(-0.5 * squared_distances(z, prior.centers), -1)
            neg_entropy = (log_p.exp() * log_p).sum(-1)
            for total, values, maxima in (
                (likelihood, log_prob, model.log_prob_max),
                (entropy, neg_entropy, model.neg_entropy_max),
            ):
                values = values.view(len(images), 1, height, width)
                maximum = maxima[class_idx, level].view(-1, 1, 1, 1)
                missing = -torch.expm1((values - maximum).clamp_max(0))
                up = F.interpolate(missing, size=(size, size), mode="bilinear", align_corners=True)
                total += up[:, 0].cpu()
    blurred = [
        np.stack([gaussian_filter(one, sigma) for one in part.numpy()]) for part in (likelihood, entropy)
    ]
    criterion = config.score.criterion
    maps_ = {"likelihood": blurred[0], "entropy": blurred[1], "both": blurred[0] * blurred[1]}[criterion]
    return maps_.reshape(len(maps_), -1).max(1), maps_


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Count the batches of an epoch."""
    return math.ceil(images / batch_size)
