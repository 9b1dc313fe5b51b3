"""The built book in a real browser, from file://: every page, light, dark and on a telephone.

Needs the pages, by `make book`, and Chromium; else it skips, with the reason. HGAD_PAGES names another
folder, HGAD_SCREENSHOTS one that keeps a picture of each page and look.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_book_build import ROOT, broken_links, toc_pages
from test_explore import CHROMIUM, DRIVER, browser

PAGES = Path(os.environ.get("HGAD_PAGES", ROOT / "book" / "_build" / "book" / "html")).resolve()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PAGES / "index.html").is_file(), reason="needs the pages: make book"),
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs Chromium: programs chromium and chromedriver"
    ),
]
LOOKS = {"light": (1300, "light"), "dark": (1300, "dark"), "telephone": (390, "light")}

PROBLEMS = (ROOT / "tests" / "pages.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def sized(driver: Any, width: int, height: int) -> None:
    size = {"width": width, "height": min(height, 16000), "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def opened(driver: Any, page: str, look: str) -> None:
    """Open a page at a size and in a theme."""
    width, theme = LOOKS[look]
    sized(driver, width, 900)
    driver.get((PAGES / page).as_uri())
    driver.execute_script("localStorage.setItem('mode', arguments[0]);", theme)
    driver.execute_script("document.documentElement.dataset.theme = arguments[0];", theme)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("page", toc_pages())
def test_a_page_is_whole(driver: Any, page: str, look: str) -> None:
    driver.get_log("browser")
    opened(driver, f"{page}.html", look)
    if kept := os.environ.get("HGAD_SCREENSHOTS"):
        height = driver.execute_script("return document.documentElement.scrollHeight")
        size = {
            "width": LOOKS[look][0],
            "height": min(height, 16000),
            "deviceScaleFactor": 1,
            "mobile": False,
        }
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.save_screenshot(str(Path(kept) / f"{page.replace('/', '-')}-{look}.png"))
    assert driver.execute_script(PROBLEMS) == []
    assert [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_no_link_between_pages_is_broken() -> None:
    assert broken_links(PAGES) == []


def test_search_finds(driver: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get((PAGES / "search.html").as_uri() + "?q=likelihood")
    found = "return document.querySelectorAll('#search-results li a').length"
    WebDriverWait(driver, 30, 0.2).until(lambda _: driver.execute_script(found) > 3)


def test_a_preview_stands_beside_a_link(driver: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    opened(driver, "method.html", "light")
    link = "document.querySelector('article a.reference.internal[href*=\"#\"]:not(.headerlink)')"
    WebDriverWait(driver, 30, 0.2).until(
        lambda _: driver.execute_script(
            f"{link}.dispatchEvent(new Event('focus')); return document.querySelector('.preview') !== null"
        )
    )
    assert len(driver.execute_script("return document.querySelector('.preview').textContent.trim()")) > 3
    driver.execute_script(f"{link}.dispatchEvent(new Event('blur'))")
    assert driver.execute_script("return document.querySelector('.preview')") is None


MOVE = """
const input = document.querySelectorAll('.sliders input')[arguments[0]];
input.value = arguments[1];
input.dispatchEvent(new Event('input', {bubbles: true}));
"""


@pytest.mark.parametrize("look", ["light", "telephone"])
def test_sliders_change_what_is_shown(driver: Any, look: str) -> None:
    all_of = "return [...document.querySelectorAll('.sliders {}')]"
    shown = all_of.format("img") + ".filter(i => !i.hidden).map(i => i.dataset.at)"
    for page in ("homogeneous_mapping", "method"):
        opened(driver, f"{page}.html", look)
        before = driver.execute_script(shown)
        driver.execute_script(MOVE, 0, 0)
        after = driver.execute_script(shown)
        assert len(before) == len(after) == 1 and after[0].startswith("0-") and before != after
    opened(driver, "predict.html", look)
    cells = all_of.format("tbody tr:last-child td") + ".map(cell => Number(cell.textContent))"
    driver.execute_script(MOVE, 0, 0)
    alarms, normal, misses, _ = driver.execute_script(cells)
    assert misses == 0 and 0 < alarms <= normal
    driver.execute_script(MOVE, 0, 1000)
    assert driver.execute_script(cells)[0] == 0
    opened(driver, "qualitative.html", look)
    driver.execute_script(MOVE, 0, 8)
    opacities = all_of.format("figure img") + ".slice(0, 3).map(i => i.style.opacity)"
    assert driver.execute_script(opacities) == ["1", "1", "1"]
