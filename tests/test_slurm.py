"""The Slurm profile on a real Slurm of one machine: six runs, one of which fails and is run again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
from grids import assert_resumed, crash_once, grid_project, planned, shorten_chapter, snakemake

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo")


def obstacle() -> str | None:
    """Return why no Slurm can be started here, if so."""
    # Debian keeps daemons where only root's path leads.
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here (Debian: slurmctld, slurmd, slurm-client, munge)"
    return None if os.geteuid() == 0 else "its daemons are started as root"


REASON = obstacle()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"Slurm cannot be started: {REASON}"),
]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def configuration(folder: Path, name: str) -> str:
    """Return the slurm.conf of a cluster of one machine, as root, without accounting or control groups."""
    cores, memory = os.cpu_count() or 1, psutil.virtual_memory().total // 2**20
    return f"""
ClusterName=test
SlurmctldHost={name}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=2
NodeName={name} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory}
PartitionName=main Nodes={name} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm() -> Iterator[dict[str, str]]:
    """Start munge and Slurm; what clients need in the environment. Nothing of it stays afterwards."""
    # Not below pytest's own folder: munge wants every folder above its socket open to all users.
    folder = Path(tempfile.mkdtemp(prefix="hgad-slurm-"))
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    file = folder / "slurm.conf"
    file.write_text(configuration(folder, socket.gethostname().split(".")[0]))
    environment = {**os.environ, "SLURM_CONF": str(file)}
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with (folder / f"{command[0]}.out").open("wb") as out:
            daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))

    def wait_for(condition: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + 120
        while not condition():
            if any(daemon.poll() is not None for daemon in daemons) or time.monotonic() > until:
                logs = [*folder.glob("*.out"), *folder.glob("*.log")]
                said = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in logs)
                pytest.fail(f"waited in vain for {what}\n{said}")
            time.sleep(0.2)

    def idle() -> bool:
        command = ["sinfo", "--noheader", "--format=%T"]
        found = subprocess.run(command, env=environment, capture_output=True, text=True)
        return found.stdout.strip() == "idle"

    try:
        subprocess.run(["mungekey", "--create", f"--keyfile={folder}/munge.key"], check=True)
        kept = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        start("munged", "--foreground", f"--socket={folder}/munge.socket", *kept)
        wait_for((folder / "munge.socket").exists, "munge's socket")
        start("slurmctld", "-D", "-i", "-f", str(file))
        start("slurmd", "-D", "-f", str(file))
        wait_for(idle, "an idle node")
        # Snakemake's step within a job drops SLURM_CONF, and would look in /etc.
        wrapper = folder / "bin" / "srun"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={file} exec {shutil.which("srun")} "$@"\n')
        wrapper.chmod(0o755)
        yield {"SLURM_CONF": str(file), "PATH": f"{wrapper.parent}:{os.environ['PATH']}"}
    finally:
        for daemon in reversed(daemons):
            stop(daemon)
        shutil.rmtree(folder)


def stop(daemon: subprocess.Popen[bytes]) -> None:
    """End a daemon and what it has started."""
    try:
        below = psutil.Process(daemon.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
    for process in below:
        if process.is_running():
            process.kill()


def test_six_runs_through_slurm_one_of_them_twice(slurm: dict[str, str], tmp_path: Path) -> None:
    project = grid_project(tmp_path, experiments=["hgad", "tab3a_sgc", "tab3d_1_50"], seeds=[0, 1])
    shorten_chapter(project)
    crashed = crash_once(project, "tab3d_1_50", 1)
    result = snakemake(
        project,
        "--set-threads", "features=1",
        "--default-resources", "mem_mb=500", "runtime=30",
        profile="slurm",
        environment=slurm,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout

    # The features and seven runs went through Slurm: the one that died was submitted again, and resumed.
    assert result.stdout.count("has been submitted with SLURM jobid") == 8
    assert result.stdout.count("Trying to restart job") == 1 and "DeadKernelError" in result.stdout
    run = project / "runs" / "folder" / "tab3d_1_50" / "seed1"
    assert_resumed(run, crashed)

    records = [json.loads(file.read_text()) for file in (project / "results" / "runs").glob("*.json")]
    assert len({(record["experiment"], record["seed"]) for record in records}) == 6 == len(records)
    assert {record["environment"]["threads"] for record in records} == {1}
    table = pd.read_csv(project / "runs" / "tables" / "tiny.csv")
    assert table["seeds"].tolist() == ["0 1"] * 3 and table["image_auroc"].notna().all()
    assert planned(project) == {"table": 1}
