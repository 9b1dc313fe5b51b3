"""A few images of each class, the library's backbone on them, and the settings that are compared."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import harness
import torch

from hgadlib.config import Config, load_config
from hgadlib.datasets import load_dataset
from hgadlib.datasets.records import Dataset, ImageRecord
from hgadlib.features.backbone import Backbone, build_backbone
from hgadlib.features.extract import dataset_features
from hgadlib.features.store import Features

# Both take the published training (params/experiments/released.yaml) and start flows from the bare features.
# "published" has the paper's three stages and the published subnets, "default" the levels and the flow of
# params/experiments/tables.yaml, once the library's default.
SETTINGS: dict[str, dict[str, Any]] = {
    "published": {"features.out_indices": [2, 3, 4], "features.pyramid": None},
    "default": {
        "features.out_indices": [4],
        "flow.layers": 8,
        "flow.position_dim": 64,
        "flow.hidden_ratio": 1.0,
    },
}


def add_arguments(parser: argparse.ArgumentParser, *, per_class: int) -> None:
    """Add what says which images and which settings are compared."""
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--data-root", help="the dataset's folder, where it is not the usual one")
    parser.add_argument("--per-class", type=int, default=per_class, help="images of each class")
    parser.add_argument("--image-size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    harness.add_device(parser)
    parser.add_argument("--layers", type=int, help="coupling blocks; the setting's own unless given")


def configure(args: argparse.Namespace, setting: str, **overrides: Any) -> Config:
    """Make the configuration of a setting."""
    chosen = {"features.pyramid": [args.image_size, args.image_size // 2], **SETTINGS[setting]}
    if args.layers is not None:
        chosen["flow.layers"] = args.layers
    return load_config(
        dataset=args.dataset,
        data_root=args.data_root,
        experiment="released",
        image_size=args.image_size,
        device=args.device,
        overrides={
            "data.resize": "stretch",
            "features.backbone": "tf_efficientnet_lite0",
            "train.evaluate_every": 0,
            **chosen,
            **overrides,
        },
    )


def some_images(config: Config, per_class: int, split: str) -> tuple[Dataset, list[ImageRecord]]:
    """Take the dataset and the first images of each class out of one split."""
    dataset = load_dataset(config.dataset, root=config.data.root)
    records = [
        record
        for name in dataset.classes
        for record in [r for r in dataset.records if r.split == split and r.class_name == name][:per_class]
    ]
    return replace(dataset, records=tuple(records)), records


def make_backbone(config: Config) -> Backbone:
    """Make the library's backbone, on the configuration's device."""
    features = config.features
    backbone = build_backbone(
        features.backbone,
        out_indices=features.out_indices,
        pyramid=features.pyramid,
        join=features.join,
        neighbourhood=features.neighbourhood,
    )
    return backbone.to(config.device)


def compute_features(config: Config, backbone: Backbone, records: list[ImageRecord]) -> Features:
    """Compute features without the cache, so that they are computed."""
    return dataset_features(
        records,
        backbone,
        image_size=config.data.image_size,
        resize=config.data.resize,
        dtype=config.features.dtype,
        storage="host" if config.device == "cpu" else "auto",
        device=config.device,
        keep=False,
        batch_size=config.features.batch_size,
        num_workers=config.data.num_workers or torch.get_num_threads(),
        progress=False,
    )
