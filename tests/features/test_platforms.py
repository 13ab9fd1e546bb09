"""Without what only Linux has, the commands give the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

from kills import contents

from sae.disk import writing as files
from sae.features.exports.circuit_tracer import write_circuit_tracer
from sae.features.exports.saedashboard import names_of

ROOT = Path(__file__).parents[2]
BARE = """
import mmap, os, signal, sys
import torch, datasets
from transformers import GPT2LMHeadModel  # they look after themselves
for module in ("fcntl", "resource"):
    sys.modules[module] = None
for module, names in (
    (os, ("posix_fallocate", "posix_fadvise", "sched_getaffinity", "fork")),
    (mmap, [name for name in vars(mmap) if name.startswith("MADV_")]),
    (signal, ("SIGHUP", "SIGKILL")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
from pathlib import Path
from sae.features.explanations.explain import ExplainConfig, explain
from sae.features.index.build import IndexConfig, build_index
from sae.features.exports.command import ExportConfig, export_features
from sae.features.index.reader import FeatureIndex
from sae.training import TrainingConfig, train
cache, dictionary, out = map(Path, sys.argv[1:])
index = build_index(IndexConfig(cache=cache, dictionary=dictionary, out=out / "index", device="cpu"))
export_features(ExportConfig(index=index, out=out / "circuit", format="circuit-tracer"))
assert FeatureIndex.open(index).search("zebrafly")
train(TrainingConfig(cache=cache, out=out / "trained", d_sae=8, steps=4, batch_size=32, device="cpu"))
explain(ExplainConfig(index=index, features=(1,)))
"""


def test_the_same_bytes_without_what_only_linux_has(world, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BARE, *map(str, (world.cache, world.dictionary_folder, tmp_path))], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be locked") >= 3  # said, and gone on
    bare, usual = contents(tmp_path / "index"), contents(world.index.folder)
    assert bare.pop("explanations.jsonl")
    assert bare == {name: data for name, data in usual.items() if name != "explanations.jsonl"}
    write_circuit_tracer(world.index, tmp_path / "usual", names_of(world.index))
    assert contents(tmp_path / "circuit") == contents(tmp_path / "usual")
    assert (tmp_path / "trained" / "training.json").exists()


def test_whether_a_process_runs(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert files.running(child.pid)
    child.communicate(b"\n")
    assert not files.running(child.pid)
    assert not files.running(os.getpid())  # what has our number is a leftover
    monkeypatch.setattr(files.os, "name", "nt")
    monkeypatch.setattr(files.os, "kill", None)  # which would end the process there
    assert files.running(1)
