"""What the train chapter says of a run."""

from __future__ import annotations

from typing import Any

from hgadbook.train import train_sentences

METRICS: dict[str, Any] = {
    "mean": {"image_auroc": 0.875, "pixel_auroc": None},
    "per_class": {"a": {"image_auroc": 0.75}, "b": {"image_auroc": 1.0}, "c": {"image_auroc": None}},
    "timing": {"train_s": 61.2, "features_s": 4.4, "predict_images_per_s": 12.34},
}


def test_a_run_in_sentences() -> None:
    said = train_sentences(METRICS, dataset="demo", device="a processor")
    assert said[0].startswith("One model for 3 classes of demo: image AUROC 87.5 %, without masks,")
    assert said[1] == "By class, image AUROC lies between 75.0 % (a) and 100.0 % (b)."
    assert said[2].startswith("Training took 61 s on a processor, the features before it 4 s;")
    assert "judges 12.3 images a second" in said[2]


def test_one_class_has_no_range() -> None:
    one = METRICS | {"per_class": {"a": {"image_auroc": 0.75}}}
    said = train_sentences(one, dataset="demo", device="a processor")
    with_masks = METRICS | {"mean": {"image_auroc": 0.875, "pixel_auroc": 0.9}}
    assert "pixel AUROC 90.0 %" in train_sentences(with_masks, dataset="demo", device="x")[0]
    assert len(said) == 2 and said[0].startswith("One model for 1 class of demo")
