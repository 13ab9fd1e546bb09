"""What a run says that it takes: bytes that processes send, counted at the collectives; memory of a wide dictionary; the sentences."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from several_processes import forked, said
from test_train_kinds import alone, config_of, small
from test_training import cache  # noqa: F401 (a fixture)

from sae.dictionaries import rows
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.rows import random_rows
from sae.errors import InputError
from sae.kinds import BatchTopK
from sae.objective import Workspace
from sae.processes import Processes
from sae.training import train
from sae.training.cost import Shape, memory_bytes, saving_bytes, size, wire_bytes
from sae.training.ends import Ends
from sae.training.shard import Split, meshed, split_of_all
from sae.training.sweep import Start, Sweep

ENDS = Ends(("resid_post.0",), ("resid_post.0",), {"resid_post.0": 16})


def counting(config):
    """Three steps in every process; the bytes that a process sends in the third, at torch's own functions."""
    sent: list[int] = []
    exchange, gather = dist.all_to_all_single, dist.all_gather_single

    def counted_exchange(from_n, to_n, group=None):
        world = dist.get_world_size(group)
        sent.append(to_n.numel() * to_n.itemsize // world * (world - 1))
        return exchange(from_n, to_n, group=group)

    def counted_gather(found_n, piece, group=None):
        sent.append(piece.numel() * piece.itemsize * (dist.get_world_size(group) - 1))
        return gather(found_n, piece, group=group)

    def work():
        dist.all_to_all_single, dist.all_gather_single = counted_exchange, counted_gather
        processes = Processes.from_environment()
        with processes.together(), meshed(split_of_all(config, processes), config.device, processes) as mesh:
            start = Dictionary.initial(16, config.d_sae, seed=0, decoder_norm=1.0, features=mesh.features.part(config.d_sae))
            sweep = Sweep([Start(start)] * len(config.kind.values), config.kind, config.recipe(), "auto", Workspace(mesh=mesh))
            sweep.weights.b_enc_f.fill_(-1 if sweep.kind.swept == "k" else -3)  # few are active, but more than k
            sweep._take_over()
            x_bd = torch.randn(config.batch_size, 16, generator=torch.Generator().manual_seed(0))
            for step in range(3):
                sent.clear()
                sweep.step(x_bd, step)
                mesh.every.any(False)
            expected = wire_bytes(Shape.of(config, ENDS), Split.of(config.shard, processes.world))
            if sum(sent) != sum(expected.values()):
                raise InputError(f"{config.kind}: {sum(sent)} bytes in {sent}, where {dict(expected)} were expected")

    return work


@pytest.mark.parametrize("split", ["features=2,rows=1", "features=2,rows=2"])
def test_processes_send_what_the_arithmetic_says(split, cache, tmp_path):  # noqa: F811
    for name in ("relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated"):
        config = config_of(small(name), cache, tmp_path / "d", shard=split, batch_size=510, d_sae=64, lr=1e-6)
        world = Split.of(split, 0).processes
        assert forked(counting(config), world, tmp_path / "log") == [0] * world, "".join(said(tmp_path / "log"))


def test_a_million_features_can_be_planned():
    """The arithmetic of docs/many_processes.md: 1,048,576 features at width 2,304, a batch of 8,192, on 64 GPUs."""
    config = replace(config_of(BatchTopK(k=(64,)), None, None), d_sae=1 << 20, batch_size=8192)
    ends = Ends(("resid_post.12",), ("resid_post.12",), {"resid_post.12": 2304})
    shape = Shape.of(config, ends)
    memory = memory_bytes(shape, Split(64, 1))
    assert memory["weights"] == memory["gradients"] == (1 << 14) * (2 * 2304 + 1) * 4
    assert memory["Adam's moments"] == 2 * memory["weights"]
    assert wire_bytes(shape, Split(64, 1))["partial reconstructions"] == 2 * 63 * (8192 // 64) * 2304 * 4
    assert [size(count) for count in saving_bytes(shape, Split(8, 1))] == ["2.5 GB", "3.7 GB"]
    assert wire_bytes(shape, Split(1, 64))["weights"] == 63 * (1 << 14) * (2 * 2304 + 1) * 4


def test_processes_begin_with_the_rows_of_one(monkeypatch):
    whole = torch.nn.functional.normalize(torch.randn(200, 7, generator=torch.Generator().manual_seed(3)), dim=-1)
    assert torch.equal(random_rows(7, 200, 3), whole)
    monkeypatch.setattr(rows, "DRAWN", 48)
    parts = [random_rows(7, 200, 3, slice(first, first + 50)) for first in range(0, 200, 50)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_dry_run_says_what_each_process_takes(cache, tmp_path, capsys):  # noqa: F811
    config = config_of(alone(small("topk")), cache, tmp_path / "d", dry_run=True)
    train(config)
    assert "one process: " in capsys.readouterr().out
    train(replace(config, shard="features=4,rows=2"))
    out = capsys.readouterr().out
    assert "each of 8 processes (4 by features, 2 by rows): " in out
    assert "saving a dictionary takes 980 bytes more at the end, 1.3 kB in the process that leads" in out
    assert "a step sends" in out
    assert "a step reads 4.1 kB of the cache" in out
    assert "rows/s once the code is sparse: 1.3 times the encoder product" in out
    assert "take several times as long" not in out  # TopK is sparse from the first step
    assert forked(lambda: train(replace(config, shard="features")), 2, tmp_path / "log") == [0, 0]
    assert ["for what is sent, at" in text for text in said(tmp_path / "log")] == [True, False]
    assert not (tmp_path / "d").exists()
