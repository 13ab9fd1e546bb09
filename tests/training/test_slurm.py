"""The scripts for SLURM in docs/many_processes.md, run by a scheduler that sets what the real one does, on one machine."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from several_processes import flags
from test_dealt import RUNS, assert_same
from test_plan import plan_of
from test_train_kinds import sites  # noqa: F401 (a fixture)
from test_training import cache  # noqa: F401 (a fixture)

from sae.training.plan import train_plan

PAGE = Path(__file__).parents[2] / "docs" / "many_processes.md"

SBATCH = """#!/bin/bash
number() { sed -n "s/^#SBATCH.*--$1=\\\\([0-9]*\\\\).*/\\\\1/p" "$script"; }
script=$1
export SLURM_JOB_ID=7 SLURM_NNODES=$(number nodes) SLURM_NTASKS_PER_NODE=$(number ntasks-per-node)
export SLURM_NTASKS=$((SLURM_NNODES * SLURM_NTASKS_PER_NODE)) SLURM_JOB_NODELIST="node[1-$SLURM_NNODES]"
exec bash "$script"
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) SLURM_NODEID=$((task / SLURM_NTASKS_PER_NODE)) "$@" &
done
worst=0
for task in $(seq $SLURM_NTASKS); do wait -n || { worst=$?; kill $(jobs -p); }; done
exit $worst
"""
SCONTROL = """#!/bin/bash
[[ "$1 $2 $3" == "show hostnames node[1-$SLURM_NNODES]" ]] || exit 1
for node in $(seq $SLURM_NNODES); do echo 127.0.0.1; done
"""


@pytest.fixture
def scheduler(tmp_path):
    """An environment in which sbatch, srun and scontrol are found."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def script_with(command: str) -> str:
    """The page's script that calls a command."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE.read_text(encoding="utf-8"), re.M)
    (found,) = [block for block in blocks if "#SBATCH" in block and f"-m sae {command} " in block]
    return re.sub("^    ", "", found, flags=re.M)


def submit(script: str, changes: dict[str, str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        changes |= {"29500": str(free.getsockname()[1])}
    for old, new in changes.items():
        assert old in script, old
        script = script.replace(old, new)
    (folder / "job.sh").write_text(script)
    return subprocess.run(["sbatch", "job.sh"], cwd=folder, env=environment, capture_output=True, text=True, timeout=250)


def test_a_plan_with_a_task_for_each_process(sites, tmp_path, scheduler):  # noqa: F811
    whole = train_plan(plan_of(sites, tmp_path, RUNS, "whole"))
    config = plan_of(sites, tmp_path, RUNS, "RUNS")
    given = "--cache /shared/CACHE --plan plan.json --steps 20000 --out /shared/RUNS"
    done = submit(
        script_with("train-plan"), {given: " ".join(flags(config)), "--ntasks-per-node=8": "--ntasks-per-node=1"}, tmp_path, scheduler
    )
    assert done.returncode == 0, done.stderr
    assert_same(whole, config.out)


def test_a_harvest_with_a_torchrun_for_each_node(sites, cache, tmp_path, scheduler):  # noqa: F811
    model, text, out = cache.parent / "lm", cache.parent / "text.jsonl", tmp_path / "CACHE"
    given = "--model MODEL --text TEXT --sites resid_post.12 --tokens 2_000_000_000 --out /shared/CACHE"
    ours = f"--model {model} --text {text} --sites mlp_in.1 mlp_out.1 resid_post.0 --context 32 --tokens 8000 --out {out}"
    done = submit(script_with("cache"), {given: ours, "--nproc-per-node 8": "--nproc-per-node 1"}, tmp_path, scheduler)
    assert done.returncode == 0, done.stderr
    files = [path.relative_to(sites) for path in sites.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert all((out / path).read_bytes() == (sites / path).read_bytes() for path in files)
