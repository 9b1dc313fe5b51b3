"""The first page: the paper's claims beside what the ledger has, and the headline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

pytest.importorskip("IPython", reason="needs the extra: book")

from hgadbook import intro
from hgadbook.intro import Claim, claims, claims_text
from hgadlib.runs.ledger import read_records


def record(name: str, scores: str, *, auroc: float = 0.9, pixel: float | None = None) -> dict[str, Any]:
    return {
        "record": f"{name}.json",
        "mean": {"image_auroc": auroc, "pixel_auroc": pixel, "aupro": None},
        "image_scores": {"ring": {"labels": "0" * 20 + "1" * 20, "scores": scores}},
    }


def runs(separation: Mapping[str, float]) -> dict[str, dict[int, dict[str, Any]]]:
    """Make two seeds of experiments, whose anomalous images lie so far above the normal ones."""
    noise = np.random.default_rng(0).normal(size=(2, 40))
    out: dict[str, dict[int, dict[str, Any]]] = {}
    for name, apart in separation.items():
        for seed in range(2):
            scores = noise[seed] + apart * (np.arange(40) >= 20)
            out.setdefault(name, {})[seed] = record(f"{name}-{seed}", " ".join(f"{s:.3f}" for s in scores))
    return out


@pytest.mark.parametrize(
    ("ours", "theirs", "word"), [(5.0, 0.2, "seen"), (0.2, 5.0, "opposite"), (1.0, 1.0, "undecided")]
)
def test_a_claimed_lead_is_judged_by_its_interval(ours: float, theirs: float, word: str) -> None:
    found = {"rings": runs({"hgad": ours, "other": theirs})}
    claim = intro._lead("a claim", found, "hgad", "other", "results")
    assert (claim.verdict, claim.runs, claim.chapter) == (word, 4, "results")
    assert "1 set of images" in claim.found
    missing = intro._lead("a claim", found, "hgad", "nobody", "results")
    assert missing == Claim("a claim", "not measured", "", "results", 0)
    # That something may be left out is seen where nothing is lost.
    if word == "undecided":
        assert intro._lead("a claim", found, "hgad", "other", "results", no_worse=True).verdict == "seen"


def test_gains_of_a_model_for_each_class_are_compared_seed_by_seed() -> None:
    def with_auroc(values: dict[str, tuple[float, float]]) -> dict[str, dict[int, dict[str, Any]]]:
        return {
            name: {seed: record(name, "", auroc=auroc) for seed, auroc in enumerate(both)}
            for name, both in values.items()
        }

    together = {"rings": with_auroc({"hgad": (0.90, 0.91), "baseline_cflow": (0.80, 0.81)})}
    apart = {"rings": with_auroc({"hgad": (0.91, 0.92), "baseline_cflow": (0.90, 0.912)})}
    claim = intro._apart(together, apart)
    assert (claim.verdict, claim.runs) == ("seen", 8)
    assert "HGAD +1.0 points, CFLOW +10.1" in claim.found
    assert intro._apart(together, {}).verdict == "not measured"


def test_claims_are_written_with_their_chapters() -> None:
    text = claims_text(
        [Claim("It holds", "seen", "by 2 points", "results", 1), Claim("So", "not measured", "", "a/b", 0)]
    )
    assert text.splitlines() == [
        "- **seen**. It holds: by 2 points ({doc}`results`, {ref}`1 run <reproducibility>`).",
        "- **not measured**. So ({doc}`a/b`).",
    ]


def test_every_claim_of_the_first_page_has_a_verdict_from_the_ledger() -> None:
    words = {"seen", "opposite", "undecided", "not measured"}
    found = claims(read_records())
    assert {claim.verdict for claim in found} <= words | {"same sign, one run", "opposite sign, one run"}
    assert [claim.verdict for claim in claims([])] == ["not measured"] * len(found)
    assert sum(claim.runs > 0 for claim in found) >= 8
