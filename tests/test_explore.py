"""The explorer: its numbers are those of the evaluation; its widgets work, in a kernel and in a browser."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from small import folder_config, image_folder

from hgadbook import explore as module
from hgadbook.explore import Explorer, ExplorerApp, State, draw, open_explorer, overview
from hgadlib.config import Config
from hgadlib.errors import InputError
from hgadlib.figures.theme import theme
from hgadlib.mixture import HierarchicalGaussianMixture
from hgadlib.scoring import Criterion

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "book" / "explore.ipynb"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HGAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@dataclass(frozen=True)
class Done:
    """A finished run, and an explorer of it that has loaded it."""

    root: Path
    config: Config
    explorer: Explorer


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    theme()
    folder = tmp_path_factory.mktemp("explore")
    root = image_folder(folder / "images", classes=("disc", "ring", "square"))
    shutil.rmtree(root / "square" / "ground_truth")
    config = folder_config(root, folder / "run")
    open_explorer(config, progress=False)
    return Done(root, config, open_explorer(config, progress=False))


def every_view(explorer: Explorer, criterion: Criterion) -> dict[int, Any]:
    first = explorer.first()
    return {
        index: explorer.view(replace(first, class_name=name, index=index, criterion=criterion))
        for name in explorer.classes
        for _, index in explorer.images(name)
    }


def test_scores_are_those_of_the_record(done: Done) -> None:
    assert done.explorer.source.endswith("found finished")
    with np.load(Path(str(done.config.run_dir)) / "scores.npz") as stored:
        views = every_view(done.explorer, done.config.score.criterion)
        assert sorted(views) == list(range(len(stored["score"])))
        for index, view in views.items():
            assert view.score == pytest.approx(stored["score"][index], rel=1e-5)
            assert view.name == stored["image"][index]
            assert view.truth.startswith("anomalous") == stored["label"][index]


def test_thresholds_have_the_f1_of_the_record(done: Done) -> None:
    metrics = json.loads((Path(str(done.config.run_dir)) / "metrics.json").read_text())
    for criterion in done.explorer.criteria:
        protocol = metrics["other_protocols"][f"{done.config.score.normalisation}/{criterion}"]
        for name in done.explorer.classes:
            called = done.explorer.class_scores(name, criterion) >= done.explorer.threshold(name, criterion)
            truth = np.array(done.explorer.truths(name)) == "anomalous"
            f1 = 2 * (called & truth).sum() / (called.sum() + truth.sum())
            assert f1 == pytest.approx(protocol["per_class"][name]["image_f1max"])


def test_a_view_holds_together(done: Done) -> None:
    state = done.explorer.first()
    view = done.explorer.view(state)
    assert view.score == view.anomaly_map.max() == done.explorer.class_scores("disc", state.criterion).max()
    np.testing.assert_array_equal(view.flagged, view.anomaly_map >= state.threshold)
    assert view.verdict == "anomalous"
    above = done.explorer.view(replace(state, threshold=view.score * 1.001))
    assert above.verdict == "normal"
    assert not above.flagged.any() and not above.flagged_positions.any()
    assert view.flagged_positions.any()
    # At the score itself, an image is anomalous and one pixel of it at least is flagged.
    assert done.explorer.view(replace(state, threshold=view.score)).flagged.any()


@pytest.mark.parametrize("normalisation", ["calibrated", "inductive"])
def test_both_criteria_s_map_is_of_both_maps(done: Done, normalisation: Any) -> None:
    own, config = done.explorer, done.config
    config = replace(config, score=replace(config.score, normalisation=normalisation))
    explorer = Explorer(config, own.inputs, own.model, own.values, source=own.source)
    maps = {c: every_view(explorer, c)[3].anomaly_map for c in explorer.criteria}
    if normalisation == "calibrated":  # deviations, and their mean
        mean = (maps["likelihood"] + maps["entropy"]) / 2
        np.testing.assert_allclose(maps["both"], mean, rtol=1e-4, atol=1e-4)
    else:  # the product of the shares of normality that are missing, which the scores are a function of
        missing = {c: np.exp(-np.exp(-found)) for c, found in maps.items()}
        np.testing.assert_allclose(missing["both"], missing["likelihood"] * missing["entropy"], rtol=1e-4)


def test_a_mask_that_nobody_drew_is_none(done: Done) -> None:
    views = every_view(done.explorer, "both")
    for view in views.values():
        anomalous = view.truth.startswith("anomalous")
        assert (view.mask is None) == (view.name.startswith("square/") and anomalous)
        if view.mask is not None:
            assert view.mask.any() == anomalous


@pytest.mark.parametrize("projection", ["lda", "pca"])
def test_positions_are_projected_latents(done: Done, projection: module.Projection) -> None:
    explorer = done.explorer
    plane, state = explorer.plane(projection), replace(explorer.first(), projection=projection)
    flow, prior = explorer.model.levels[-1]
    with torch.no_grad():
        z = flow(explorer.inputs.test.batch(torch.tensor([state.index]))[-1])[0][0].numpy()
        assert isinstance(prior, HierarchicalGaussianMixture)
        centers = prior.centers.numpy()
    both = plane.project.transform(np.concatenate([z, centers]))
    np.testing.assert_allclose(explorer.view(state).positions, both[: len(z)], rtol=1e-4, atol=1e-4)
    assert plane.centers is not None
    np.testing.assert_allclose(plane.centers, both[len(z) :], rtol=1e-4, atol=1e-4)
    assert plane.points.shape == (len(plane.class_idx), 2)
    assert set(plane.class_idx) == {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class_name": "disk"}, "class: expected one of disc, ring, square, found 'disk'"),
        ({"criterion": "sum"}, "criterion: expected one of likelihood, entropy, both"),
        ({"projection": "tsne"}, "projection: expected one of lda, pca"),
        ({"index": 10**6}, "is no test image of disc"),
    ],
)
def test_a_state_that_is_none_is_one_line(done: Done, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        done.explorer.view(replace(done.explorer.first(), **change))


def test_a_finished_run_of_other_images_is_refused(done: Done, tmp_path: Path) -> None:
    root = Path(shutil.copytree(done.root, tmp_path / "images"))
    (root / "disc" / "test" / "good" / "000.png").unlink()
    other = replace(done.config, data=replace(done.config.data, root=str(root)))
    with pytest.raises(InputError, match=r"holds another run \(its images differ"):
        open_explorer(other, progress=False)


def test_without_a_finished_run_a_small_one_takes_no_run_s_place(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params" / "experiments").mkdir(parents=True)
    (tmp_path / "params" / "demo.yaml").write_text("dataset: demo\n")
    monkeypatch.chdir(tmp_path)
    config = folder_config(done.root, None, epochs=1)
    assert open_explorer(config, progress=False).source.endswith("a small run")
    assert [path.name for path in (tmp_path / "runs" / "folder").iterdir()] == ["explore"]


def test_one_gaussian_has_one_criterion_and_no_centres(done: Done, tmp_path: Path) -> None:
    config = folder_config(done.root, tmp_path / "run", prior={"kind": "single"}, epochs=1)
    explorer = open_explorer(config, progress=False)
    assert explorer.criteria == ("likelihood",)
    assert explorer.first().criterion == "likelihood"
    assert explorer.plane("pca").centers is None
    assert ExplorerApp(explorer).figure.value


@pytest.fixture
def app(done: Done) -> ExplorerApp:
    pytest.importorskip("ipywidgets", reason="needs the extra: book")
    return ExplorerApp(done.explorer)


def test_widgets_start_at_the_first_state(app: ExplorerApp, done: Done) -> None:
    assert app.state == done.explorer.first()
    assert (app.class_name.value, app.image.value) == (app.state.class_name, app.state.index)
    assert app.threshold.value == pytest.approx(app.state.threshold)
    assert bytes(app.figure.value).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["class_name", "image", "criterion", "projection", "threshold"])
def test_each_widget_changes_what_is_shown(app: ExplorerApp, done: Done, name: str) -> None:
    before, figure, verdict = app.state, bytes(app.figure.value), app.verdict.value
    widget = getattr(app, name)
    value = {
        "class_name": "ring",
        "image": done.explorer.images("disc")[-1][1],
        "criterion": "entropy",
        "projection": "pca",
        "threshold": before.threshold * 1.2,
    }[name]
    widget.value = value
    assert app.state != before
    assert bytes(app.figure.value) != figure
    assert (app.verdict.value != verdict) == (name != "projection")
    view = done.explorer.view(app.state)
    assert f"score {view.score:.4g}," in app.verdict.value
    # Back again, the picture is the first one to the bit: nothing is left over from the other state.
    for back in ("class_name", "image", "criterion", "projection", "threshold"):
        field = {"image": "index"}.get(back, back)
        getattr(app, back).value = getattr(before, field)
    assert bytes(app.figure.value) == figure


def test_another_class_starts_with_its_own_images_and_threshold(app: ExplorerApp, done: Done) -> None:
    app.class_name.value = "square"
    assert list(app.image.options) == done.explorer.images("square")
    assert app.state.index == done.explorer.images("square")[0][1]
    assert app.state.threshold == done.explorer.threshold("square", app.state.criterion)
    low, high = done.explorer.limits("square", app.state.criterion)
    slider = app.threshold
    assert slider.min <= low < high <= slider.max
    assert slider.max - slider.min <= high - low + 2 * slider.step
    # A browser moves the value to a step from the minimum: it must be one.
    steps = (app.state.threshold - slider.min) / slider.step
    assert steps == pytest.approx(round(steps), abs=1e-6)


def test_the_overview_counts_images_called_right(done: Done) -> None:
    table = overview(done.explorer)
    assert list(table.index) == ["disc", "ring", "square"]
    assert (table["test images"] == 6).all()
    scores = done.explorer.class_scores("disc", "both") >= done.explorer.threshold("disc", "both")
    truth = np.array(done.explorer.truths("disc")) == "anomalous"
    assert table.loc["disc", "right by both"] == (scores == truth).sum()


def test_the_figure_for_a_page_has_all_panels(done: Done) -> None:
    figure = draw(done.explorer, done.explorer.view(done.explorer.first()))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert [title.partition(" (")[0].partition(":")[0] for title in titles if title] == [
        "image", "anomaly map", "true mask", "at or above the threshold",
        "latents at the deepest level", "scores of the class's test images",
    ]  # fmt: skip


def with_parameters(done: Done, target: Path) -> Path:
    """Copy the notebook with parameters that name the finished run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    given = {"dataset": "folder", "run_dir": str(done.config.run_dir), "data_root": str(done.root)}
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    nbformat.write(notebook, target)
    return target


def test_the_notebook_runs_headlessly_and_shows_the_first_state(done: Done, tmp_path: Path) -> None:
    papermill = pytest.importorskip("papermill", reason="needs the extra: book")
    out = tmp_path / "out.ipynb"
    given = {"dataset": "folder", "run_dir": str(done.config.run_dir), "data_root": str(done.root)}
    papermill.execute_notebook(NOTEBOOK, out, parameters=given, cwd=ROOT, progress_bar=False)
    cells = nbformat.read(out, as_version=4).cells
    (figure,) = [c for c in cells if "figure" in c.metadata.get("mystnb", {})]
    (output,) = figure.outputs
    assert "image/svg+xml" in output.data
    kinds = [kind for c in cells for output in c.get("outputs", []) for kind in output.get("data", {})]
    assert "application/vnd.jupyter.widget-view+json" in kinds


class Deadline:
    """A time by which all waiting has ended."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.1)


@contextlib.contextmanager
def jupyter_lab(folder: Path, home: Path, deadline: Deadline) -> Iterator[str]:
    """Start JupyterLab as `make lab` does, on a free port of this machine; give the notebook's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    settings = home / "settings"
    settings.mkdir()
    (settings / "overrides.json").write_text(makefile_value("LAB_OVERRIDES"), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        *makefile_value("LAB_OPTIONS").split(),
        f"--LabApp.app_settings_dir={settings}",
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
    ]
    command += [f"--ServerApp.root_dir={folder}", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **{name: str(home / name.lower()) for name in names}, "PYTHONPATH": paths}
    environment.pop("MPLBACKEND", None)
    log = (home / "lab.log").open("w")
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    base = f"http://127.0.0.1:{port}"

    def ask(path: str, data: bytes | None = None) -> bytes:
        request = urllib.request.Request(base + path, data, {"Authorization": f"token {token}"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            found: bytes = answer.read()
            return found

    try:
        while True:
            try:
                ask("/api/status")
                break
            except OSError:
                if server.poll() is not None or deadline.left <= 0.1:
                    pytest.fail(f"JupyterLab did not start:\n{(home / 'lab.log').read_text()[-2000:]}")
                time.sleep(0.3)
        yield f"{base}/lab/tree/explore.ipynb?token={token}"
    finally:
        # Asked in this way it ends its kernels as well.
        with contextlib.suppress(OSError):
            ask("/api/shutdown", b"")
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


def makefile_value(name: str) -> str:
    """Read from the Makefile with what `make lab` starts JupyterLab."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} :=")]
    return line.partition(":=")[2].strip()


def test_make_lab_asks_no_other_machine() -> None:
    pytest.importorskip("jupyterlab", reason="needs the extra: book")
    from jupyterlab.labapp import LabApp

    found = dict(option.removeprefix("--").split("=") for option in makefile_value("LAB_OPTIONS").split())
    assert found == {
        "LabApp.news_url": "None",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        "LabApp.extension_manager": "readonly",
    }
    for name in found:
        assert name.removeprefix("LabApp.") in LabApp.class_trait_names(), name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "$(LAB_OPTIONS) book/explore.ipynb" in makefile


def test_make_lab_sets_what_jupyterlab_knows() -> None:
    jupyterlab = pytest.importorskip("jupyterlab", reason="needs the extra: book")
    from jupyterlab.commands import get_app_dir

    schemas = Path(get_app_dir()) / "schemas"
    assert schemas.is_dir(), jupyterlab.__version__
    for plugin, given in json.loads(makefile_value("LAB_OVERRIDES")).items():
        extension, _, name = plugin.partition(":")
        known = json.loads((schemas / extension / f"{name}.json").read_text(encoding="utf-8"))["properties"]
        for key, value in given.items():
            allowed = [choice["const"] for choice in known[key].get("oneOf", [])] or known[key].get("enum")
            assert allowed is None or value in allowed, f"{plugin}: {key}"


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """Start headless Chromium with a profile of its own."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra: test")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync disable-dev-shm-usage window-size=1400,2600"
    for flag in (*flags.split(), f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


RUN_ALL = """
const done = arguments[arguments.length - 1];
const app = window.jupyterapp;
app.restored.then(async () => {
  // A browser without a window gives nothing the focus, so no widget is the current one by itself.
  const notebook = () => [...app.shell.widgets("main")].find(widget => widget.sessionContext);
  while (!notebook()) await new Promise(r => setTimeout(r, 200));
  await notebook().sessionContext.ready;
  app.shell.activateById(notebook().id);
  app.commands.execute("notebook:run-all-cells");
  done();
});
"""


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium: programs chromium and chromedriver")
def test_in_a_browser_widgets_change_the_figure(done: Done, tmp_path: Path) -> None:
    pytest.importorskip("jupyterlab", reason="needs the extra: book")
    pytest.importorskip("selenium", reason="needs the extra: test")
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    deadline = Deadline(240)
    lab, home = tmp_path / "lab", tmp_path / "home"
    lab.mkdir()
    home.mkdir()
    with_parameters(done, lab / "explore.ipynb")
    first = done.explorer.first()
    of_ring = replace(
        first,
        class_name="ring",
        index=done.explorer.images("ring")[0][1],
        threshold=done.explorer.threshold("ring", first.criterion),
    )
    with jupyter_lab(lab, home, deadline) as address, browser(tmp_path / "profile") as driver:

        def until(condition: Any) -> Any:
            return WebDriverWait(driver, deadline.left, 0.2).until(condition)

        def all_of(selector: str) -> list[Any]:
            found: list[Any] = driver.find_elements(By.CSS_SELECTOR, selector)
            return found

        def shows(state: State, other_than: Any = None) -> Any:
            """Wait for the line of a state and for another figure; give the figure's address."""
            line = str(done.explorer.view(state))
            try:
                until(lambda _: line in all_of(".hgad-verdict")[0].text)
            except TimeoutException:
                lists = all_of(".hgad-explorer select")
                chosen = [Select(found).first_selected_option.text for found in lists]
                seen, log = all_of(".hgad-verdict")[0].text, (home / "lab.log").read_text()[-2000:]
                pytest.fail(f"expected: {line}\nfound: {seen}, of {chosen}\n{log}")
            figure = ".hgad-explorer img"
            return until(lambda _: (src := all_of(figure)[0].get_attribute("src")) != other_than and src)

        driver.get(address)
        until(lambda _: all_of(".jp-Notebook .jp-CodeCell"))
        # By command, not by menu: while JupyterLab restores its panels, a click on a menu can be lost.
        driver.set_script_timeout(max(deadline.left, 1))
        driver.execute_async_script(RUN_ALL)
        until(lambda _: all_of(".hgad-explorer img") and all_of(".hgad-verdict"))
        figure_of_first = shows(first)

        class_name, image, *_ = all_of(".hgad-explorer select")
        Select(class_name).select_by_visible_text("ring")
        figure_of_ring = shows(of_ring, other_than=figure_of_first)
        expected = [name for name, _ in done.explorer.images("ring")]
        assert [option.text for option in Select(image).options] == expected

        # Up to its end the threshold passes the score: another verdict, the same score.
        handle = all_of(".hgad-explorer .noUi-handle")[0]
        handle.send_keys(Keys.END)
        app = ExplorerApp(done.explorer)
        app.class_name.value = "ring"
        above = replace(of_ring, threshold=app.threshold.max)
        assert done.explorer.view(above).verdict == "normal" != done.explorer.view(of_ring).verdict
        shows(above, other_than=figure_of_ring)
        driver.save_screenshot(str(tmp_path / "explore.png"))
