"""What a reader moves in the built page: everything precomputed, no server, also from file://."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image

Frames = Mapping[Any, tuple[bytes, str]]
"""Pictures (WebP) and what they show, by the place of each slider, a tuple."""


def picture_of(figure: Figure, *, dpi: int = 90) -> bytes:
    """Draw a figure as WebP."""
    content = io.BytesIO()
    figure.savefig(content, format="webp", dpi=dpi)
    return content.getvalue()


def picture_slider(frames: Frames, sliders: Mapping[str, Sequence[str]]) -> str:
    """Write HTML that shows one of many pictures, chosen by sliders.

    Args:
        frames: A picture for every place of all sliders.
        sliders: What each says at its places, by its name; they start at the last one.
    Raises:
        ValueError: A place has no picture.
    """
    last = tuple(len(values) - 1 for values in sliders.values())
    missing = [place for place in np.ndindex(*(n + 1 for n in last)) if place not in frames]
    if missing:
        raise ValueError(f"expected a picture for every place of the sliders, found none for {missing[0]}")
    pictures = [
        f'<img data-at="{"-".join(map(str, at))}" alt="{html.escape(said)}" src="{_source(content)}"'
        f"{'' if at == last else ' hidden'}>"
        for at, (content, said) in frames.items()
    ]
    controls = "".join(_control(name, values) for name, values in sliders.items())
    change = (
        f"{_SAY};const at=inputs.map(i=>i.value).join('-');"
        "this.querySelectorAll('img').forEach(i=>{i.hidden=i.dataset.at!==at})"
    )
    return f'<div class="sliders" oninput="{change}">{controls}{"".join(pictures)}</div>'


# Each slider says where it stands.
_SAY = (
    "const inputs=[...this.querySelectorAll('input[type=range]')];"
    "inputs.forEach(i=>{i.nextElementSibling.value=JSON.parse(i.dataset.said)[i.value]})"
)


def _control(name: str, values: Sequence[str], at: int | None = None) -> str:
    at = len(values) - 1 if at is None else at
    said = html.escape(json.dumps(list(values)))
    return (
        f'<label>{html.escape(name)} <input type="range" min="0" max="{len(values) - 1}" value="{at}" '
        f'data-said="{said}" autocomplete="off"><output>{html.escape(values[at])}</output></label>'
    )


def _source(content: bytes, kind: str = "webp") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def threshold_slider(scores: ArrayLike, labels: ArrayLike, classes: ArrayLike, *, steps: int = 60) -> str:
    """Write HTML that shows, class by class, false alarms and misses at a threshold that a slider sets.

    Args:
        scores: Of N images, higher is more anomalous.
        labels: True where anomalous, (N,).
        classes: Names, (N,).
        steps: Places of the slider, evenly from one score to the next: quantiles of all.
    Raises:
        ValueError: There is no image.
    """
    scores, labels, classes = np.asarray(scores, float), np.asarray(labels, bool), np.asarray(classes, str)
    if not len(scores):
        raise ValueError("expected scores of at least one image, found none")
    places = np.unique(np.quantile(scores, np.linspace(0, 1, steps)).round(3))
    rows, table = [], []
    for name in (*dict.fromkeys(classes.tolist()), "all"):
        own = slice(None) if name == "all" else classes == name
        above = scores[own][:, None] > places
        truth = labels[own]
        alarms, misses = above[~truth].sum(0), (~above[truth]).sum(0)
        table.append([alarms.tolist(), misses.tolist()])
        rows.append(
            f'<tr><th scope="row">{html.escape(name)}</th><td></td><td>{(~truth).sum()}</td>'
            f"<td></td><td>{truth.sum()}</td></tr>"
        )
    # Where false alarms and misses together are fewest a reader would begin to look.
    start = int(np.add(*np.array(table[-1])).argmin())
    change = (
        f"{_SAY};const at=inputs[0].value;const counts=JSON.parse(this.dataset.counts);"
        "this.querySelectorAll('tbody tr').forEach((row,k)=>{row.children[1].textContent=counts[k][0][at];"
        "row.children[3].textContent=counts[k][1][at]})"
    )
    counts = html.escape(json.dumps(table))
    filled = []
    for row, (alarms, misses) in zip(rows, table, strict=True):
        filled.append(
            row.replace("<td></td>", f"<td>{alarms[start]}</td>", 1).replace(
                "<td></td>", f"<td>{misses[start]}</td>", 1
            )
        )
    head = "<th></th><th>false alarms</th><th>of normal</th><th>misses</th><th>of anomalous</th>"
    control = _control("threshold", [f"{place:.2f}" for place in places], start)
    return (
        f'<div class="sliders" data-counts="{counts}" oninput="{change}">{control}'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(filled)}</tbody></table></div>"
    )


def blend_slider(images: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], *, size: int = 224) -> str:
    """Write HTML in which a slider fades from images to their anomaly maps and on to their masks.

    Args:
        images: By name: an image (H, W, 3) and its map drawn in colours (H, W, 3), both uint8, and its mask
            (H, W) bool.
        size: Pixels a side of each.
    """
    figures = []
    for name, (image, drawn, mask) in images.items():
        layers = [image, drawn, np.repeat(255 * mask[..., None].astype(np.uint8), 3, -1)]
        shown = "".join(
            f'<img alt="{html.escape(f"{name}: {what}")}" src="{_source(_webp(layer, size))}" '
            f'style="opacity:{opacity}">'
            for layer, what, opacity in zip(layers, ("image", "map", "mask"), (1, 0, 0), strict=True)
        )
        figures.append(f"<figure><div>{shown}</div><figcaption>{html.escape(name)}</figcaption></figure>")
    values = ["image", *(f"map {share} %" for share in (25, 50, 75)), "map"]
    values += [*(f"mask {share} %" for share in (25, 50, 75)), "mask"]
    change = (
        f"{_SAY};const at=inputs[0].value/4;this.querySelectorAll('figure').forEach(f=>{{"
        "const i=f.querySelectorAll('img');i[1].style.opacity=Math.min(at,1);"
        "i[2].style.opacity=Math.max(at-1,0)})"
    )
    control = _control("show", values, 0)
    return f'<div class="sliders blend" oninput="{change}">{control}<div>{"".join(figures)}</div></div>'


def _webp(pixels: np.ndarray[Any, Any], size: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).resize((size, size)).save(content, "webp", quality=80)
    return content.getvalue()
