"""Harvesting: what is stored is what the model computes, a kill costs nothing, and unusable input leaves nothing half-written."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae.activations.cache import ActivationCache
from sae.activations.cached import CachedSource
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.activations.live import LiveSource
from sae.activations.text.tokens import Tokens
from sae.disk.reading import read_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # children are forked below

SITES = ("resid_post.0", "mlp_out.1")
N_DOCUMENTS = 60


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A tiny GPT-2 whose tokens are bytes, with a beginning-of-text token."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = {symbol: i + 1 for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({"<bos>": 0, **alphabet}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>").save_pretrained(folder)
    torch.manual_seed(0)
    size = dict(vocab_size=257, n_positions=32, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = random.Random(0)
    rows = [
        {"text": " ".join(words.choices(["moon", "sea", "a", "größe"], k=words.randint(1, 20))), "domain": "xy"[i % 2]}
        for i in range(N_DOCUMENTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own_beginnings(kind: str, texts: list[str], folder: Path) -> dict:
    """`texts` as a source of that kind, as options of the harvest."""
    folder.mkdir()
    path = folder / f"train.{kind.removesuffix(' dataset')}"
    if kind == "safetensors":
        ids = [[0] * t.startswith("<bos>") + [1] * len(t.removeprefix("<bos>")) for t in texts]
        starts = torch.tensor([0, *np.cumsum([len(own) for own in ids])])
        save_file({"ids": torch.tensor([i for own in ids for i in own], dtype=torch.int32), "document_starts": starts}, path)
    elif kind == "txt":
        path.write_text(texts[0])
    elif kind.startswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"dataset": str(folder), "text": ()} if kind.endswith("dataset") else {"text": (str(path),)}


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "safetensors", "jsonl dataset", "parquet dataset"])
@pytest.mark.parametrize("live", [False, True])
def test_a_document_with_its_own_beginning_is_recorded_like_one_without(config, tmp_path, capsys, kind, live):
    texts = ["moon sea " * 9, "sea", "a moon " * 5]

    def tokens(texts: list[str], name: str) -> Tokens:
        ways = own_beginnings(kind, texts, tmp_path / name)
        asked = change(config, label_field=None, out=tmp_path / f"{name}-cache", sites=SITES[:1], held_out=0.0, **ways)
        return LiveSource(asked).recorder.tokens if live else ActivationCache.open(harvest(asked)).tokens

    plain = tokens(texts, "plain")
    assert "of their own" not in capsys.readouterr().err
    rendered = tokens([f"<bos>{texts[0]}", texts[1], f"<bos>{texts[2]}"], "rendered")
    assert f"{'1 document' if kind == 'txt' else '2 documents'} already began with a beginning-of-text token" in capsys.readouterr().err
    assert rendered.ids.tolist() == plain.ids.tolist()
    assert rendered.sequence_starts.tolist() == plain.sequence_starts.tolist()
    assert (rendered.ids == 0).sum() == len(rendered.sequence_starts) - 1  # one each


@pytest.fixture
def config(model_folder, text, tmp_path) -> HarvestConfig:
    return HarvestConfig(
        out=tmp_path / "cache",
        model=str(model_folder),
        text=(str(text),),
        label_field="domain",
        sites=SITES,
        tokens=2500,
        held_out=0.2,
        pool_tokens=600,
        shard_tokens=250,
        batch_tokens=200,
        device="cpu",
    )


def change(config: HarvestConfig, **changes) -> HarvestConfig:
    return HarvestConfig(**{**vars(config), **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def different(one: Path, other: Path) -> list[str]:
    """Names of the files that are not the same in both folders."""
    a, b = contents(one), contents(other)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def in_child(config: HarvestConfig, *, kill_at_file: int | None = None, kill_at_sync: int | None = None) -> int:
    """Harvests in a child process, killed with SIGKILL soon after its n-th file or at its n-th fsync; returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            if kill_at_sync is not None:
                counted, fsync = iter(range(kill_at_sync)), os.fsync

                def fsync_or_die(handle: int) -> None:
                    if next(counted, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    fsync(handle)

                os.fsync = fsync_or_die
            harvest(config)
            os._exit(0)
        except BaseException:
            os._exit(1)
    while kill_at_file is not None and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        # os.walk passes by a temporary folder that goes while it looks; rglob raises
        if sum(name.endswith(".safetensors") for _, _, names in os.walk(config.out) for name in names) >= kill_at_file:
            time.sleep(random.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
            break
    return os.waitpid(child, 0)[1]


def test_stored_activations_are_what_the_model_computes(config):
    """Against Hugging Face's own hidden states, one sequence at a time, without padding."""
    cache = ActivationCache.open(harvest(config), "resid_post.0")
    lm = LanguageModel.load(config.model, device="cpu")
    tokens = cache.tokens
    expected = []
    for start, stop in zip(tokens.sequence_starts, tokens.sequence_starts[1:]):
        ids = torch.from_numpy(np.array(tokens.ids[start:stop], dtype=np.int64))[None]
        expected.append(lm.model(ids, output_hidden_states=True).hidden_states[1][0])
    expected = torch.cat(expected)
    seen, squares = [], []
    for split in ("train", "held_out"):
        for shard in cache.shards(split):
            activations, rows = cache.read(shard)
            assert activations.dtype == torch.float16
            torch.testing.assert_close(activations.float(), expected[rows], rtol=1e-3, atol=1e-4)
            assert {split} == {("train", "held_out")[tokens.sequence_split[s]] for s in tokens.sequence_of(rows.numpy())}
            seen += rows.tolist()
            squares += activations.double().square().sum(-1).tolist() if split == "train" else []
    beginnings = tokens.sequence_starts[:-1].tolist()
    assert sorted(seen + beginnings) == list(range(len(tokens.ids)))  # every token once, but for the beginnings
    assert cache.mean_squared_norm == pytest.approx(np.mean(squares), rel=1e-12)
    assert cache.manifest["counts"]["left_out"]["beginning_of_text"] == len(beginnings)
    assert cache.rows("held_out") > 0


def test_tokens_lead_back_to_text_and_label(config, text):
    cache = ActivationCache.open(harvest(change(config, tokens=10**6)), "mlp_out.1")
    tokenizer = LanguageModel.load(config.model, device="cpu").tokenizer
    tokens = cache.tokens
    rows = [json.loads(line) for line in text.read_text().splitlines()]
    found = [""] * len(rows)
    for sequence, document in enumerate(tokens.sequence_document):
        ids = tokens.ids[tokens.sequence_starts[sequence] : tokens.sequence_starts[sequence + 1]]
        found[document] += tokenizer.decode(ids[1:]) if "ö" not in rows[document]["text"] else ""
    assert [f for f in found if f] == [row["text"] for row in rows if "ö" not in row["text"]]
    assert [tokens.label_names[label] for label in tokens.document_label] == [row["domain"] for row in rows]


def test_rows_are_shuffled_within_a_pool(config):
    cache = ActivationCache.open(harvest(config), "resid_post.0")
    for shard in cache.shards("train"):
        sequences = cache.tokens.sequence_of(cache.read(shard)[1].numpy())
        assert (np.diff(sequences) == 0).mean() < 0.3  # in order it would be above 0.9
    assert next(CachedSource(cache).batches(64))[cache.site].isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_number_format_and_the_kept_beginning(config, dtype):
    cache = ActivationCache.open(harvest(change(config, dtype=dtype, keep_bos=True, sites=SITES[:1])))
    assert cache.rows("train") + cache.rows("held_out") == len(cache.tokens.ids)
    assert cache.read(cache.shards("train")[0])[0].dtype == getattr(torch, dtype)


def test_killed_at_random_moments_it_ends_with_the_same_bytes(config, tmp_path):
    whole = change(config, out=tmp_path / "whole")
    assert in_child(whole) == 0
    n_files = len(list(whole.out.rglob("*.safetensors")))
    moments = sorted(random.Random().sample(range(n_files), 5))
    killed = [os.WIFSIGNALED(in_child(config, kill_at_file=moment)) for moment in moments]
    assert in_child(config) == 0
    assert different(config.out, whole.out) == [], moments
    assert any(killed)


def test_killed_at_chosen_points_of_writing_it_ends_with_the_same_bytes(config, tmp_path):
    whole = change(config, out=tmp_path / "whole")
    assert in_child(whole) == 0
    for point in (0, 1, 2, 4, 7, 12, 25, 26, 27, 28):
        cut = change(config, out=tmp_path / f"killed{point}")
        assert os.WIFSIGNALED(in_child(cut, kill_at_sync=point))
        with pytest.raises(InputError, match=r"not finished|does not exist"):
            ActivationCache.open(cut.out, SITES[0])
        assert in_child(cut) == 0
        assert different(cut.out, whole.out) == [], point


def test_finished_pools_are_not_computed_again(config, tmp_path):
    assert os.WIFSIGNALED(in_child(config, kill_at_sync=40))
    done = {path: path.stat().st_mtime_ns for path in config.out.glob("*/*.safetensors")}
    lines = (config.out / "progress.jsonl").read_text().splitlines()
    finished = [shard["name"] for line in lines for shard in json.loads(line).get("shards", [])]
    assert finished
    harvest(config)
    assert all(path.stat().st_mtime_ns == t for path, t in done.items() if path.stem in finished or path.parent.name == "tokens")


def test_torn_progress_a_lost_shard_and_leftovers_are_made_good(config, tmp_path):
    whole = change(config, out=tmp_path / "whole")
    harvest(whole)
    in_child(config, kill_at_sync=40)
    progress = config.out / "progress.jsonl"
    progress.write_bytes(progress.read_bytes() + b'{"kind": "pool", "spl')
    (config.out / SITES[0] / "00000.safetensors").unlink()
    (config.out / SITES[0] / ".00001.safetensors.123.tmp").touch()
    (config.out / "tokens" / ".00000.safetensors.123.box").mkdir()
    (config.out / "tokens" / ".00000.safetensors.123.box" / ".tmpAb3dEf").touch()  # as safetensors leaves it when killed
    harvest(config)
    assert different(config.out, whole.out) == []


def test_a_finished_harvest_says_so_and_other_settings_are_refused(config, text, tmp_path, capsys):
    harvest(config)
    before = contents(config.out)
    harvest(config)
    assert "already complete" in capsys.readouterr().err
    for changes in ({"tokens": 900}, {"sites": SITES[:1]}, {"dtype": "float32"}, {"seed": 1}):
        with pytest.raises(InputError, match=f"settings {next(iter(changes))} ="):
            harvest(change(config, **changes))
    other = tmp_path / "other"
    torch.manual_seed(1)
    lm = LanguageModel.load(config.model, device="cpu")
    lm.tokenizer.save_pretrained(other)
    GPT2LMHeadModel(lm.model.config).save_pretrained(other)
    with pytest.raises(InputError, match="settings model ="):
        harvest(change(config, model=str(other)))
    assert contents(config.out) == before
    with pytest.raises(InputError, match="fingerprint"):
        ActivationCache.open(config.out, SITES[0]).require_model(LanguageModel.load(str(other), device="cpu"))
    ActivationCache.open(config.out, SITES[0]).require_model(lm)


def test_a_model_changed_in_place_is_refused_on_resume(config, tmp_path):
    place = tmp_path / "model"
    lm = LanguageModel.load(config.model, device="cpu")
    lm.tokenizer.save_pretrained(place)
    lm.model.save_pretrained(place)
    config = change(config, model=str(place))
    assert os.WIFSIGNALED(in_child(config, kill_at_sync=40))
    torch.manual_seed(1)
    GPT2LMHeadModel(lm.model.config).save_pretrained(place)
    with pytest.raises(InputError, match="model fingerprint ="):
        harvest(config)


def test_activations_that_are_not_finite_are_named(config, tmp_path):
    place = tmp_path / "model"
    lm = LanguageModel.load(config.model, device="cpu")
    lm.tokenizer.save_pretrained(place)
    weights = lm.model.state_dict()
    moon = lm.tokenizer("m", add_special_tokens=False)["input_ids"][0]
    embedding = weights["transformer.wte.weight"]
    with torch.no_grad():
        embedding[moon, 0] = 1e5  # too large for float16, well inside bfloat16 and float32
    lm.model.save_pretrained(place)
    large = change(config, model=str(place), sites=("resid_post.0",), max_norm_ratio=None)
    with pytest.raises(InputError, match=r"resid_post\.0, document \d+.*1e\+05.*bfloat16"):
        harvest(large)
    assert not list(large.out.glob("resid_post.0/*"))
    harvest(change(large, out=tmp_path / "wide", dtype="bfloat16"))
    with torch.no_grad():
        embedding[moon, 0] = float("nan")
    lm.model.save_pretrained(place)
    with pytest.raises(InputError, match=r"NaN or infinity at resid_post\.0, document \d+.*leave that document out"):
        harvest(change(large, out=tmp_path / "nan", dtype="bfloat16"))


def test_a_full_disk_stops_the_harvest_and_it_goes_on_later(config, tmp_path, monkeypatch):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        cut = change(config, out=place / "cache")
        in_child(cut, kill_at_sync=40)  # with some pools done
        finished = len((cut.out / "progress.jsonl").read_text().splitlines())
        ballast = place / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(place).free - 8192))
        with pytest.raises(InputError, match=r"needs about .* free"):  # refused before starting
            harvest(cut)
        elsewhere = shutil.disk_usage("/")
        with monkeypatch.context() as patch:  # as if filled meanwhile
            patch.setattr(shutil, "disk_usage", lambda _: elsewhere)
            with pytest.raises(InputError, match="disk ran full"):
                harvest(cut)
        assert len((cut.out / "progress.jsonl").read_text().splitlines()) >= finished > 2
        ballast.unlink()
        harvest(cut)
        harvest(change(config, out=tmp_path / "whole"))
        assert different(cut.out, tmp_path / "whole") == []
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ("resid_post.3",)}, r"resid_post\.2"),
        ({"sites": ()}, "--sites"),
        ({"sites": SITES[:1] * 2}, "once"),
        ({"tokens": 1}, "--tokens"),
        ({"context": 33}, "32"),
        ({"context": 1}, "32"),
        ({"held_out": 1.0}, "--held-out"),
    ],
)
def test_unusable_options_are_refused_before_anything_is_written(config, changes, message):
    with pytest.raises(InputError, match=message):
        harvest(change(config, **changes))
    assert not (config.out / "tokens").exists()


def test_text_without_tokens_is_refused_and_a_short_one_is_fine(config, tmp_path, capsys):
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.touch()
    short.write_text("moon")
    base = change(config, label_field=None, sites=SITES[:1])
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n\t \n")
    for text in (empty, blank):
        with pytest.raises(InputError, match="no usable text"):
            harvest(change(base, text=(str(text),), out=tmp_path / "e"))
    cache = ActivationCache.open(harvest(change(base, text=(str(short),), out=tmp_path / "s")))
    assert (cache.rows("train"), cache.rows("held_out")) == (4, 0)
    said = capsys.readouterr().err
    assert "ended at 5 of the 2,500" in said
    assert "training rows only" in said


def test_the_default_model_is_missed_where_there_is_no_checkout(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("moon")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"expected --model: checkpoints/demo-lm, the default, is only there in a checkout"):
        harvest(HarvestConfig(text=("text.txt",), sites=("resid_post.2",), out=tmp_path / "out"))


def test_token_files_give_what_their_text_gives(config, text, tmp_path):
    from_text = harvest(change(config, out=tmp_path / "text"))
    tokens = ActivationCache.open(from_text, SITES[0]).tokens
    contents_ = [
        tokens.ids[a + 1 : b] for a, b in zip(tokens.sequence_starts, tokens.sequence_starts[1:])
    ]  # the text again, document by document, each after one beginning of text
    per_document = [
        np.concatenate([[0], *(c for c, d in zip(contents_, tokens.sequence_document) if d == n)])
        for n in range(len(tokens.document_label))
    ]
    save_file(
        {
            "ids": torch.from_numpy(np.concatenate(per_document).astype(np.int32)),
            "document_starts": torch.from_numpy(np.cumsum([0, *map(len, per_document)])),
            "document_label": torch.from_numpy(np.array(tokens.document_label)).to(torch.uint8),
        },
        tmp_path / "tokens.safetensors",
        {"label_names": json.dumps(tokens.label_names), "tokenizer": "bytes"},
    )
    again = harvest(change(config, text=(str(tmp_path / "tokens.safetensors"),), label_field=None, out=tmp_path / "ids"))
    one, two = contents(from_text), contents(again)
    assert {k: v for k, v in one.items() if k.endswith(".safetensors")} == {k: v for k, v in two.items() if k.endswith(".safetensors")}
    foreign = {"ids": torch.tensor([0, 400], dtype=torch.int32), "document_starts": torch.tensor([0, 2])}
    save_file(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(InputError, match="another tokenizer"):
        harvest(change(config, text=(str(tmp_path / "foreign.safetensors"),), label_field=None, out=tmp_path / "f"))


def test_dry_run_says_what_comes_and_writes_nothing(config, capsys):
    harvest(change(config, dry_run=True))
    said = capsys.readouterr().out
    assert not config.out.exists()
    manifest = read_json(harvest(config) / "manifest.json", "")
    counts = manifest["counts"]
    for number in (counts["tokens"], counts["rows"]["train"], counts["rows"]["held_out"], 2 * len(manifest["shards"])):
        assert f"{number:,}" in said


def test_the_command_reports_in_one_sentence(config):
    script = Path(__file__).resolve().parents[3] / "scripts" / "cache_activations.py"
    harvest(config)
    harvest(HarvestConfig(out=config.out, verify=True))  # nothing to say
    shard = config.out / SITES[1] / "00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    bad = subprocess.run([sys.executable, script, "--out", config.out, "--verify"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert f"{SITES[1]}/00001.safetensors" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_real_model_on_real_text(shared, tmp_path):
    """stories260k, which has another architecture and tokenizer, on film dialogue."""
    source = shared / "corpora" / "film_dialogue.validation.jsonl.gz"
    model = shared / "models" / "stories260k"
    config = HarvestConfig(
        out=tmp_path / "c", model=str(model), text=(str(source),), label_field="domain", sites=("resid_post.2",), tokens=2000, device="cpu"
    )
    cache = ActivationCache.open(harvest(config))
    assert cache.manifest["labels"] == ["film_dialogue"]
    assert cache.manifest["counts"]["tokens"] == 2000
    assert next(CachedSource(cache).batches(128))[cache.site].shape == (128, 64)


def test_a_text_that_cannot_be_used_leaves_its_place_free(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good enough to begin with"}\n{"text": 5}\n')
    (tmp_path / "good.txt").write_text("A text of some words. " * 50)
    flags = dict(model=str(Path(__file__).parents[3] / "checkpoints/demo-lm"), sites=("resid_post.0",), tokens=200, device="cpu")
    for name in ("bad.jsonl", "missing.txt"):
        with pytest.raises(InputError, match=name):
            harvest(HarvestConfig(text=(str(tmp_path / name),), out=tmp_path / "cache", **flags))
        assert not (tmp_path / "cache").exists()
    harvest(HarvestConfig(text=(str(tmp_path / "good.txt"),), out=tmp_path / "cache", **flags))
    assert ActivationCache.open(tmp_path / "cache").rows("train") > 0
