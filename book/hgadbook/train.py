"""What one training has given, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hgadbook.ablations import percent
from hgadbook.paper import number_text


def train_sentences(metrics: Mapping[str, Any], *, dataset: str, device: str) -> list[str]:
    """Say how well a run detects and what it cost.

    Args:
        metrics: The content of metrics.json.
        dataset: Its name.
        device: That it ran on.
    """
    mean, timing = metrics["mean"], metrics["timing"]
    image, pixel = (number_text(percent(mean[name])) for name in ("image_auroc", "pixel_auroc"))
    masks = "without masks" if mean["pixel_auroc"] is None else f"pixel AUROC {pixel} %"
    of = {name: values["image_auroc"] for name, values in metrics["per_class"].items()}
    known = {name: value for name, value in of.items() if value is not None}
    said = [
        f"One model for {len(of)} class{'es' * (len(of) != 1)} of {dataset}: image AUROC {image} %, {masks}, "
        "means over the classes at the last epoch."
    ]
    if len(known) > 1:
        low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        said.append(
            f"By class, image AUROC lies between {percent(known[low]):.1f} % ({low}) and "
            f"{percent(known[high]):.1f} % ({high})."
        )
    said.append(
        f"Training took {timing['train_s']:.0f} s on {device}, the features before it "
        f"{timing['features_s']:.0f} s; the model judges {timing['predict_images_per_s']:.1f} images a "
        "second, from file to map."
    )
    return said
