"""Commands take the URL of a cache where they take its folder, and give the same; what takes only a folder says so."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from live_world import SITE, make_world
from remote_world import upload
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sae.activations.harvest.command import HarvestConfig, harvest
from sae.dictionaries.dictionary import Dictionary
from sae.disk.remote import RemotePath
from sae.errors import InputError
from sae.evaluation import EvaluationConfig, evaluate
from sae.kinds import TopK
from sae.training import TrainingConfig, train
from sae.training.checkpoint import Checkpoint
from steering.command_line import main


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"), 60)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:49]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<bos>", *letters])}, []))
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>").save_pretrained(world["model"])
    return harvest(HarvestConfig(out=tmp_path_factory.mktemp("cache") / "cache", **world | {"shard_tokens": 200}))


@pytest.fixture
def url(local, flaky, monkeypatch) -> str:
    monkeypatch.setattr("sae.disk.remote.BLOCK_BYTES", 1000)
    upload(local, "flaky://place/cache")
    return "flaky://place/cache"


def sae(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["sae", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def config_for(cache, out: Path) -> TrainingConfig:
    kind = TopK(k=(4,))
    return TrainingConfig(
        cache=cache, out=out, kind=kind, d_sae=24, steps=60, batch_size=64, device="cpu", checkpoint_every=20, log_every=10
    )


def test_training_is_the_same_and_goes_on_after_a_lost_connection(local, url, flaky, tmp_path, monkeypatch):
    train(config_for(local, tmp_path / "here"))
    stops = iter([30])
    save = Checkpoint.save

    def save_and_unplug(self, *arguments, **options):
        save(self, *arguments, **options)
        if next(stops, None):
            flaky.faults["read"].extend([OSError("unplugged")] * 10_000)

    monkeypatch.setattr(Checkpoint, "save", save_and_unplug)
    monkeypatch.setenv("SAE_BLOCK_CACHE_GB", "0")
    there = config_for(RemotePath(url), tmp_path / "there")
    with pytest.raises(InputError, match=r"the connection to flaky://place/cache/\S+ is lost"):
        train(there)
    flaky.faults["read"].clear()
    train(there)
    here, there = (tmp_path / name for name in ("here", "there"))
    assert (here / "sae_weights.safetensors").read_bytes() == (there / "sae_weights.safetensors").read_bytes()
    assert json.loads((there / "training.json").read_text())["settings"]["cache"] == url


def test_commands_give_what_they_give_for_the_folder(local, url, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    dictionary = tmp_path / "dictionary"
    train(config_for(local, dictionary))
    capsys.readouterr()
    said = {}
    for cache in (str(local), url):
        name = "there" if cache == url else "here"
        assert sae(monkeypatch, "describe", "--cache", cache, "--json") == 0
        said[name] = {key: value for key, value in json.loads(capsys.readouterr().out).items() if key != "folder"}
        out = tmp_path / name
        assert sae(monkeypatch, "evaluate", "--dictionary", dictionary, "--cache", cache, "--device", "cpu", "--out", f"{out}.json") == 0
        assert sae(monkeypatch, "index", "--dictionary", dictionary, "--cache", cache, "--device", "cpu", "--out", out / "index") == 0
        assert sae(monkeypatch, "export-cache", "--cache", cache, "--out", out / "export") == 0
        capsys.readouterr()
    assert said["here"] == said["there"]
    here, there = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("here", "there"))
    assert there.pop("cache") == url
    assert here.pop("cache") == str(local)
    assert here == there
    for path in sorted((tmp_path / "here").rglob("*")):
        if path.is_file() and path.name != "index.json":
            assert path.read_bytes() == (tmp_path / "there" / path.relative_to(tmp_path / "here")).read_bytes(), path


def test_what_takes_no_url_says_so(local, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ("train", "topk", "--cache", local, "--out", "s3://bucket/run"),
        ("index", "--cache", local, "--dictionary", "none", "--out", "s3://bucket/index"),
        ("export-cache", "--cache", local, "--out", "s3://bucket/export"),
        ("merge", "--parts", "s3://bucket/a", "s3://bucket/b", "--out", "here"),
    ):
        assert sae(monkeypatch, *arguments) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(r"error: expected a path on this machine, got the URL s3://\S+; only activation caches have URLs\n", said)
    assert list(tmp_path.iterdir()) == []


def test_a_url_that_others_wrote_into_a_dictionary_is_not_opened(local, url, flaky, tmp_path, capsys):
    """training.json comes with a dictionary from anywhere."""
    folder = tmp_path / "dictionary"
    train(config_for(local, folder))
    record = json.loads((folder / "training.json").read_text())
    record["settings"]["cache"] = "flaky://elsewhere/cache"
    (folder / "training.json").write_text(json.dumps(record))
    flaky.calls.clear()
    evaluate(EvaluationConfig(dictionary=str(folder), cache=local, sequences=0, device="cpu", out=tmp_path / "out.json"))
    assert "flaky://elsewhere/cache, which is not at hand" in capsys.readouterr().err
    assert not flaky.calls
    assert Dictionary.load(str(folder)).site == SITE
