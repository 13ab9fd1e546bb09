"""Random processes are killed with SIGKILL at random moments, fifty times: plans and live runs end with the bits of one left alone."""

import os
import random
import shutil
import signal
import time
from functools import partial

import pytest
from several_processes import fork
from test_plan import plan_of
from test_train_kinds import sites  # noqa: F401 (a fixture)
from test_training import cache  # noqa: F401 (a fixture)

from sae.activations.harvest.settings import RecordingConfig
from sae.kinds import BatchTopK
from sae.training.live import LiveTrainingConfig, train_live
from sae.training.plan import train_plan

RUNS = [
    {"name": f"{kind}_{seed}", "kind": kind, "reads": [site], "seed": seed}
    for kind, site in (("relu", "resid_post.0"), ("topk", "mlp_in.1"), ("batchtopk", "mlp_out.1"))
    for seed in (0, 1)
]
KILLS = 50


def plan_job(sites, tmp_path, name):  # noqa: F811
    return partial(train_plan, plan_of(sites, tmp_path, RUNS, name, steps=300, checkpoint_every=25))


def live_job(sites, tmp_path, name):  # noqa: F811
    text, model = (str(sites.parent / "text.jsonl"),), str(sites.parent / "lm")
    recording = RecordingConfig(
        text=text, model=model, sites=("resid_post.0",), context=32, tokens=8000, pool_tokens=600, held_out=0.2, device="cpu"
    )
    shared = dict(d_sae=40, steps=300, batch_size=64, lr=3e-3, log_every=10, checkpoint_every=25, device="cpu")
    return partial(train_live, LiveTrainingConfig(kind=BatchTopK(k=(4,)), out=tmp_path / name, live=recording, **shared))


def trained(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("sae_weights.safetensors")}


@pytest.mark.soak
@pytest.mark.parametrize("job_of", [plan_job, live_job])
def test_fifty_kills_lose_nothing(sites, cache, tmp_path, job_of):  # noqa: F811
    """A rank is killed, and after it the others, as a launcher does; the next life has another number of processes."""
    if not (sites.parent / "lm").exists():
        shutil.copytree(cache.parent / "lm", sites.parent / "lm")
        shutil.copy(cache.parent / "text.jsonl", sites.parent)
    job_of(sites, tmp_path, "whole")()
    whole, chance, kills, finished = trained(tmp_path / "whole"), random.Random(3), 0, 0
    while kills < KILLS or not finished:
        children = fork(job_of(sites, tmp_path, f"out{finished}"), chance.choice([1, 2, 3, 4]), tmp_path / "log")
        until, codes = time.monotonic() + chance.uniform(0.3, 8), {}
        while time.monotonic() < until and len(codes) < len(children):
            codes |= ended(children, codes)
            time.sleep(0.01)
        if len(codes) == len(children) and not any(codes.values()):
            assert trained(tmp_path / f"out{finished}") == whole
            finished += 1
            continue
        left = [child for child in children if child not in codes]
        assert left, codes
        os.kill(chance.choice(left), signal.SIGKILL)
        kills += 1
        time.sleep(chance.choice([0, 0.2]))
        for child in left:
            os.kill(child, signal.SIGTERM)  # of one that was killed it is a zombie still
        time.sleep(2)
        for child in left:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def ended(children, codes):
    """Exit codes of those that have ended since."""
    found = {}
    for child in children:
        if child not in codes and (done := os.waitpid(child, os.WNOHANG))[0]:
            found[child] = os.waitstatus_to_exitcode(done[1])
    return found
