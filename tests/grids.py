"""A small project of its own with a tiny grid, to run the real Snakefile in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import yaml
from small import image_folder

ROOT = Path(__file__).parents[1]
# All rows have the same features, whatever the defaults and their bases say.
TINY = {
    "data.image_size": 64,
    "data.held_out": 0.0,
    "features.backbone": "tf_efficientnet_lite0",
    "features.pyramid": None,
    "features.out_indices": [3],
    "features.join": False,
    "flow.layers": 2,
    "flow.position_dim": 8,
    "prior.n_centers": 2,
    "train.epochs": 2,
    "train.batch_size": 4,
    "score.map_size": 32,
}
# The train chapter's calls without its figures.
CALLS = [
    "from hgadlib.config import config_from_notebook\n"
    "from hgadlib.runs.experiment import finish_run, train_model\n"
    "from hgadlib.runs.inputs import prepare\n"
    "from hgadlib.runs.directory import RunDirectory",
    "config = config_from_notebook(globals())\nrun = RunDirectory.open(config)\ninputs = prepare(config)",
    "model = train_model(config, inputs, run)",
    "finish_run(config, inputs, model, run)",
]


def grid_project(path: Path, *, experiments: list[str], seeds: list[int]) -> Path:
    """Make a folder with params, workflow, train chapter, images of two classes, and the grid "tiny"."""
    for name in ("params", "workflow"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    image_folder(path / "images")
    (path / "book").mkdir()
    shutil.copy(ROOT / "book" / "train.ipynb", path / "book")
    grid: dict[str, Any] = {"datasets": ["folder"], "experiments": experiments, "seeds": seeds}
    (path / "params" / "grids" / "tiny.yaml").write_text(yaml.safe_dump({**grid, "overrides": TINY}))
    return path


def shorten_chapter(project: Path) -> None:
    """Leave the chapter's parameters and calls, which is faster."""
    file = project / "book" / "train.ipynb"
    notebook = nbformat.read(file, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in CALLS]
    nbformat.write(notebook, file)


def crash_once(project: Path, experiment: str, seed: int) -> Path:
    """Have the kernel of one run die after its training, the first time; the file given says it has."""
    file = project / "book" / "train.ipynb"
    notebook = nbformat.read(file, as_version=4)
    code = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    training = next(i for i in code if "model = train_model(" in notebook.cells[i].source)
    crash = (
        "import os, pathlib\n"
        "marker = pathlib.Path('crashed')\n"
        f"if (experiment, seed) == ({experiment!r}, {seed}) and not marker.exists():\n"
        "    marker.write_text((run.path / 'history.csv').read_text())\n"
        "    os._exit(9)"
    )
    notebook.cells.insert(training + 1, nbformat.v4.new_code_cell(crash))
    nbformat.write(notebook, file)
    return project / "crashed"


def assert_resumed(run: Path, crashed: Path) -> None:
    """Check that a run kept the epochs that it had when it crashed; seconds are no two times the same."""
    before, after = pd.read_csv(crashed), pd.read_csv(run / "history.csv")
    # Only the end of a run says what its last epoch reached.
    after.loc[after.index[-1], before.filter(like="test_").columns] = float("nan")
    pd.testing.assert_frame_equal(after[before.columns], before, check_exact=True)


def snakemake(
    project: Path,
    *arguments: str,
    settings: tuple[str, ...] = (),
    profile: str = "local",
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the grid "tiny" on the project's images, with further --config settings; its output is one text."""
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", f"workflow/profiles/{profile}"]
    return subprocess.run(
        [*command, *arguments, "--config", "grid=tiny", "data_root=images", *settings],
        cwd=project,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HGAD_CACHE": str(project / "cache"),
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )


def planned(project: Path, *settings: str) -> Counter[str]:
    """Count the jobs that a dry run lists, by rule; the runs to train also by their path."""
    result = snakemake(project, "--dry-run", settings=settings)
    assert result.returncode == 0, result.stdout
    listed: Counter[str] = Counter()
    for line in result.stdout.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word in ("rule", "localrule"):
            rule = rest.rstrip(":")
            listed[rule] += 1
        elif word == "output:" and rule == "train":
            listed[str(Path(rest).parent)] += 1
    return listed
