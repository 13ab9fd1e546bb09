"""One dictionary in several processes: what one process learns to rounding, itself to the bit; killed, resumed, refused."""

import json
import os
import random
import resource
import signal
import socket
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from meshes import together
from safetensors.torch import load_file
from several_processes import fork, forked, said, torchrun, worker
from test_train_kinds import alone, config_of, small
from test_training import WEIGHTS, cache, contents  # noqa: F401 (a fixture)

from sae import processes as job
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats import tensors
from sae.errors import InputError
from sae.kinds import ReLU
from sae.objective import Workspace
from sae.training import TrainingConfig, train
from sae.training.checkpoint import Checkpoint
from sae.training.config import RunConfig
from sae.training.sweep import Start, Sweep

SPLITS = {"features": 2, "features=2,rows=2": 4}


def run(config: TrainingConfig, processes: int, log) -> list[int]:
    """Exit codes."""
    return forked(lambda: train(config), processes, log)


def close(one, other, tolerance: float = 1e-3) -> None:
    """Weights and metrics, but for what rounding may change."""
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= tolerance * theirs[name].norm(), name
    for mine, yours in zip(contents(one)[1], contents(other)[1], strict=True):
        assert mine.keys() == yours.keys()
        for name in mine.keys() - {"path", "sparse_path_share"}:  # by a sample of rows, which are other ones
            assert mine[name] == pytest.approx(yours[name], rel=tolerance, abs=0.02), name


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["relu", "batchtopk", "jumprelu", "abstopk"])
def test_several_processes_learn_what_one_learns(name, split, cache, tmp_path):  # noqa: F811
    config = config_of(small(name), cache, tmp_path / "alone", steps=40)
    whole = train(config)
    for out in ("first", "second"):
        several = replace(config, out=tmp_path / out, shard=split)
        assert run(several, SPLITS[split], tmp_path / out) == [0] * SPLITS[split], said(tmp_path / out)
    first, second = (replace(config, out=tmp_path / out).folders() for out in ("first", "second"))
    for one, same, again in zip(whole, first, second):
        assert contents(same) == contents(again)
        close(same, one)
    assert [text != "" for text in said(tmp_path / "first")] == [True] + [False] * (SPLITS[split] - 1)


def dying(config: RunConfig, rank: int, step: int, train=train):
    """Trains; this rank kills itself before a step."""
    own = Sweep.step

    def mortal(self, x_bd, number, y_bo=None):
        if os.environ["RANK"] == str(rank) and number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(self, x_bd, number, y_bo)

    def work():
        Sweep.step = mortal
        train(config)

    return work


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_process_ends_all_and_any_number_goes_on(dead, cache, tmp_path):  # noqa: F811
    config = config_of(small("topk"), cache, tmp_path / "whole", steps=40, checkpoint_every=10, shard="features")
    assert run(config, 2, tmp_path / "log") == [0, 0]
    for processes, shard in ((2, "features"), (4, "features=2,rows=2"), (1, None)):
        cut = replace(config, out=tmp_path / f"cut{processes}")
        assert forked(dying(cut, dead, 27), 2, tmp_path / "killed") == ([-9, 2] if dead == 0 else [2, -9])
        assert "".join(said(tmp_path / "killed")).count("error: ") == 1
        assert "has ended" in said(tmp_path / "killed")[1 - dead]
        on = replace(cut, shard=shard)
        assert (run(on, processes, tmp_path / "on") if shard else [0] * bool(train(on))) == [0] * processes
        for one, other in zip(config.folders(), on.folders()):
            if processes == 2:
                assert contents(one) == contents(other)
            close(one, other)
    assert "features=2,rows=1 and continues with features=2,rows=2" in said(tmp_path / "on")[0]


def test_a_process_that_is_killed_while_the_dictionary_is_saved(cache, tmp_path):  # noqa: F811
    config = config_of(alone(small("batchtopk")), cache, tmp_path / "whole", steps=40, checkpoint_every=20, shard="features")
    assert run(config, 2, tmp_path / "log") == [0, 0]
    for number, there in ((2, set()), (4, {WEIGHTS}), (6, {WEIGHTS, "cfg.json"})):  # two are the checkpoint's
        cut = replace(config, out=tmp_path / f"cut{number}")
        assert forked(lambda cut=cut: train(cut), 2, tmp_path / "killed", kill=(0, number)) == [-9, 2], said(tmp_path / "killed")
        assert {path.name for path in cut.out.glob("[!.]*")} == there | {"checkpoint.safetensors", "metrics.jsonl"}
        assert run(cut, 2, tmp_path / "on") == [0, 0]
        assert contents(cut.out) == contents(config.out)
        assert (cut.out / "training.json").read_bytes() == (config.out / "training.json").read_bytes()


@pytest.mark.parametrize("name", ["relu", "topk"])
def test_several_processes_measure_what_one_measures_since_the_start(name, cache, tmp_path, monkeypatch):  # noqa: F811
    config = config_of(alone(small(name)), cache, tmp_path / "init")
    first = train(config)[0]
    on = replace(config, init=first, out=tmp_path / "alone", steps=20, lr=1e-4)
    train(on)
    one = json.loads((on.out / "training.json").read_text())["since_init"]
    assert one["before"]["fvu"] == pytest.approx(contents(first)[1][-1]["fvu"], rel=0.5)
    for where in ("memory", "disk"):
        if where == "disk":
            monkeypatch.setattr(tensors, "WIDE", 1)
        several = replace(on, out=tmp_path / where, shard="features=2,rows=2")
        assert run(several, 4, tmp_path / "log") == [0] * 4, said(tmp_path / "log")
        assert "FVU" in said(tmp_path / "log")[0]
        found = json.loads((several.out / "training.json").read_text())["since_init"]
        for when in ("before", "after"):
            assert found[when] == pytest.approx(one[when], rel=1e-3)
        assert found["decoder_cosines"] == pytest.approx(one["decoder_cosines"], abs=1e-3)


def test_a_signal_to_one_process_makes_all_write_a_checkpoint(cache, tmp_path):  # noqa: F811
    config = config_of(alone(small("topk")), cache, tmp_path / "whole", steps=400, checkpoint_every=1000, shard="features")
    assert run(config, 2, tmp_path / "log") == [0, 0]
    cut = replace(config, out=tmp_path / "cut")
    children, lines = fork(lambda: train(cut), 2, tmp_path / "log"), cut.out / "metrics.jsonl"
    while not lines.exists() or not lines.read_text():
        time.sleep(0.002)
    os.kill(children[1], signal.SIGTERM)
    assert all(os.waitpid(child, 0)[1] for child in children)
    assert (cut.out / "checkpoint.safetensors").exists()
    assert run(cut, 2, tmp_path / "log") == [0, 0]
    assert contents(cut.out) == contents(config.out)


def test_torchrun_starts_a_run_again_from_its_checkpoint(cache, tmp_path):  # noqa: F811
    config = config_of(alone(small("batchtopk")), cache, tmp_path / "whole", steps=300, checkpoint_every=20, shard="features")
    assert run(config, 2, tmp_path / "log") == [0, 0]
    given = "--d-sae 40 --steps 300 --batch-size 128 --lr 3e-3 --log-every 10 --checkpoint-every 20 --dead-steps 5 --device cpu --k 4"
    where = f"--cache {cache} --out {tmp_path / 'again'} --shard features --restart"
    started = torchrun("train", "batchtopk", *given.split(), *where.split(), processes=2, launcher=("--max-restarts=1",))
    while started.poll() is None and not (tmp_path / "again" / "checkpoint.safetensors").exists():
        time.sleep(0.01)
    os.kill(worker(started, 1), signal.SIGKILL)
    out, err = started.communicate(timeout=200)
    assert started.returncode == 0, err
    assert "resuming after step" in out
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def on_second(config: TrainingConfig, **changes):
    """Trains; the second process has other settings."""
    return lambda: train(replace(config, **changes) if os.environ["RANK"] == "1" else config)


def elsewhere(config: TrainingConfig, owner: Any, name: str, value: Any):
    """Trains; in the second process something has another value."""

    def work():
        if os.environ["RANK"] == "1":
            setattr(owner, name, value)
        train(config)

    return work


def full_disk(config: TrainingConfig):
    def work():
        if os.environ["RANK"] == "0":
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        train(config)

    return work


def test_what_processes_cannot_share_is_said_once(cache, tmp_path):  # noqa: F811
    config = config_of(ReLU(), cache, tmp_path / "d", shard="features")
    bad = {
        "expected --d-sae that divides by 2 processes, got 41": lambda: train(replace(config, d_sae=41)),
        "expected --batch-size that divides by 2 processes, got 127": lambda: train(replace(config, batch_size=127, shard="rows")),
        "expected one process, or --shard features or rows, got 2": lambda: train(replace(config, shard=None)),
        "expected 6 processes for --shard features=3,rows=2, got 2": lambda: train(replace(config, shard="features=3,rows=2")),
        "expected --shard features, rows, or both": lambda: train(replace(config, shard="columns")),
        "backend auto, dense or sparse": lambda: train(replace(config, backend="reference")),
        "expected the same lr in every process, but process 1 has 0.5": on_second(config, lr=0.5),
        "nowhere": on_second(config, cache=tmp_path / "nowhere"),
        "expected the same code in every process, but process 1 has abcd": elsewhere(config, job, "code_crc32", lambda: "abcd"),
        "expected the same torch in every process, but process 1 has 1.0": elsewhere(config, torch, "__version__", "1.0"),
        "expected the same processor in every process, but process 1 has AVX": elsewhere(
            config, torch.backends.cpu, "get_cpu_capability", lambda: "AVX"
        ),
        "expected the same threads in every process, but process 1 has 2": elsewhere(config, torch, "get_num_threads", lambda: 2),
        "ulimit -f": full_disk(config),
    }
    for sentence, work in bad.items():
        assert forked(work, 2, tmp_path / "log") == [2, 2], sentence
        spoken = "".join(said(tmp_path / "log"))
        assert spoken.count("error: ") == 1, spoken
        assert sentence in spoken


def test_a_port_that_is_taken_is_named(cache, tmp_path, monkeypatch):  # noqa: F811
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1]}.items():
            monkeypatch.setenv(name, str(value))
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"another program uses port {port}, .* set another MASTER_PORT in all of them"):
            train(config_of(ReLU(), cache, tmp_path / "d", shard="features"))


def test_a_checkpoint_that_only_some_see_is_refused(tmp_path):
    def seen(mesh):
        folder = tmp_path / str(mesh.every.rank)
        folder.mkdir()
        if mesh.leads:
            (folder / "checkpoint.safetensors").touch()
        sweep = Sweep(
            [Start(Dictionary.initial(4, 8, seed=0, features=mesh.features.part(8)))], ReLU(), config.recipe(), "auto", Workspace(mesh=mesh)
        )
        with pytest.raises(InputError, match="process 1 does not see it"):
            Checkpoint(folder, {}).restore([sweep])

    config = TrainingConfig(cache=tmp_path, out=tmp_path)
    together(2, 1, seen)


@pytest.mark.soak
@pytest.mark.parametrize("split", ["features", "rows"])
def test_killed_again_and_again_it_ends_with_the_same_bits(split, cache, tmp_path):  # noqa: F811
    """Fifty kills of random processes at random moments: the bits of a run that was left alone."""
    moments, kills = random.Random(0), 50
    config = config_of(small("relu"), cache, tmp_path / "whole", steps=40 * kills, checkpoint_every=10, shard=split)
    assert run(config, 2, tmp_path / "log") == [0, 0]
    cut = replace(config, out=tmp_path / "cut")
    done, checkpoint = 0, cut.out / "checkpoint.safetensors"
    while done < kills:
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        children = fork(lambda: train(cut), 2, tmp_path / "killed")
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.2))
        os.kill(moments.choice(children), signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(codes) == [-9, 2], said(tmp_path / "killed")
        done += 1
    assert run(cut, 2, tmp_path / "log") == [0, 0]
    for one, other in zip(config.folders(), cut.folders()):
        assert contents(one) == contents(other)
