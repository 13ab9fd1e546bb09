"""The trainer on real caches: exact resume, the sweep, the guards, the log."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from sae.activations.harvest.command import HarvestConfig, harvest
from sae.dictionaries.dictionary import Dictionary
from sae.disk.writing import only_writer
from sae.errors import InputError
from sae.kinds import AbsTopK, Now, ReLU, TopK
from sae.objective import Workspace
from sae.training import TrainingConfig, train
from sae.training.sweep import Start, Sweep

WEIGHTS = "sae_weights.safetensors"


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Activations of a small random GPT-2 on random bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("training")
    vocab = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end).save_pretrained(folder / "lm")
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(vocab), n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(folder / "lm")
    letters = torch.randint(97, 123, (100, 90), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": bytes(row).decode()}) + "\n" for row in letters))
    out = folder / "cache"
    harvest(
        HarvestConfig(
            text=(str(folder / "text.jsonl"),), model=str(folder / "lm"), out=out, sites=("resid_post.0",), context=32, tokens=8000
        )
    )
    return out


def config_for(cache, out, **changes):
    own = {field.name for field in fields(ReLU)}
    kind = ReLU(**(dict(l1=(1.0,), resample_every=15) | {name: changes[name] for name in changes.keys() & own}))
    settings = dict(cache=cache, out=out, d_sae=40, steps=60, batch_size=128, lr=3e-3, log_every=10, checkpoint_every=20, dead_steps=5)
    return TrainingConfig(**(dict(kind=kind, device="cpu") | settings | {name: changes[name] for name in changes.keys() - own}))


def contents(folder):
    """Weights, and the log without its clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (folder / WEIGHTS).read_bytes(), [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize("known", [True, False])
def test_rows_with_massive_norms_are_named_before_training(cache, tmp_path, capsys, known):
    """From the manifest, and from the rows of a cache that says nothing of them, like an imported one."""
    model = GPT2LMHeadModel.from_pretrained(cache.parent / "lm")
    with torch.no_grad():
        model.transformer.wte.weight[75] *= 100  # the letter j
    model.save_pretrained(tmp_path / "lm")
    shutil.copy(cache.parent / "lm" / "tokenizer.json", tmp_path / "lm")
    shutil.copy(cache.parent / "lm" / "tokenizer_config.json", tmp_path / "lm")
    text, sites = (str(cache.parent / "text.jsonl"),), ("resid_post.0",)
    harvest(
        HarvestConfig(text=text, model=str(tmp_path / "lm"), out=tmp_path / "c", sites=sites, context=32, tokens=8000, max_norm_ratio=None)
    )
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    rows = sum(manifest["massive"]["rows"].values())
    assert rows > 50
    if not known:
        del manifest["massive"]
        (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    train(config_for(tmp_path / "c", tmp_path / "d", steps=3))
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "norms above 10 times the median" in line]
    assert f"{rows} rows" in said if known else "sampled rows" in said
    assert ("--max-norm-ratio 10" in said) == known


def test_training_lowers_the_loss_and_saves_a_dictionary_for_raw_activations(cache, tmp_path):
    from sae.activations.cache import ActivationCache

    (folder,) = train(config_for(cache, tmp_path / "d", steps=400, l1=(0.1,), lr=1e-2))
    _, lines = contents(folder)
    assert lines[-1]["step"] == 400
    assert lines[-1]["fvu"] < 0.5 * lines[0]["fvu"]
    opened = ActivationCache.open(cache)
    x_bd = opened.read(opened.shards("held_out")[0])[0].float()
    fvu = (Dictionary.load(folder)(x_bd) - x_bd).square().sum() / (x_bd - x_bd.mean(0)).square().sum()
    assert fvu == pytest.approx(lines[-1]["fvu"], rel=0.5)  # raw activations, other tokens, no scaling by the caller
    assert Dictionary.load(folder).site == "resid_post.0"


def test_the_log_says_which_path_ran_and_the_terminal_when_it_changed(cache, tmp_path, capsys):
    (folder,) = train(config_for(cache, tmp_path / "d", l1=(20.0,), d_sae=400, lr=1e-2, steps=120))
    _, lines = contents(folder)
    paths = [line["path"] for line in lines]
    assert "dense" in paths[0]
    assert paths[-1] == "sparse"
    assert all((line["sparse_path_share"] == 1) == (line["path"] == "sparse") for line in lines)
    changes = [line for line in capsys.readouterr().out.splitlines() if "the objective went from" in line]
    assert len(changes) == sum(a != b for a, b in pairwise(paths))
    assert f"from the {paths[0]} path to" in changes[0]


def test_a_stopped_run_continues_bit_for_bit(cache, tmp_path, monkeypatch):
    # features die, and some are resampled between the last line of metrics and the stop
    changes = dict(l1=(15.0,), resample_every=16, decoder_norm=0.1, b_dec="mean")
    train(config_for(cache, tmp_path / "whole", **changes))
    assert [line["resampled"] > 0 for line in contents(tmp_path / "whole")[1]][3]
    calls = 0
    step = Sweep.step

    def interrupted(self, *args):
        nonlocal calls
        calls += 1
        if calls == 33:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(Sweep, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config_for(cache, tmp_path / "parts", **changes))
    assert not (tmp_path / "parts" / WEIGHTS).exists()
    train(config_for(cache, tmp_path / "parts", **changes))
    assert calls == 60
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("encoder", ["bfloat16", "onednn"])
def test_a_run_goes_on_with_the_encoder_that_it_began_with(cache, tmp_path, monkeypatch, capsys, encoder):
    """Measured once, at the start; named, it gives the same bits, and other settings only where its values are others."""

    class Stop(Exception): ...

    def stop(*_):
        raise Stop

    def changes(out, **more):
        return config_for(cache, tmp_path / out, kind=TopK(k=(1,)), steps=30, checkpoint_every=10, **more)

    monkeypatch.setattr("sae.training.part.fastest", lambda *_, **__: encoder)
    with monkeypatch.context() as patch:
        patch.setattr("sae.training.part.Part.finish", stop)
        with pytest.raises(Stop):
            train(changes("parts"))
    assert f"active entries are found by {encoder}, measured to be the fastest here" in capsys.readouterr().out
    monkeypatch.setattr("sae.training.part.fastest", lambda *_, **__: "product")
    train(changes("parts"))
    monkeypatch.undo()
    train(changes("named", encoder=encoder))
    train(changes("product"))
    found = {name: contents(tmp_path / name) for name in ("parts", "named", "product")}
    assert found["parts"] == found["named"]
    records = {name: json.loads((tmp_path / name / "training.json").read_text()) for name in found}
    assert [records[name]["encoder"] for name in found] == [encoder, encoder, "product"]
    losses = [[line["loss"] for line in lines] for _, lines in found.values()]
    assert losses[1] == pytest.approx(losses[2], rel=1e-3)


def test_an_encoder_that_a_kind_does_not_use_is_refused_before_the_first_step(cache, tmp_path):
    with pytest.raises(InputError, match=r"^expected a kind that keeps what is large with its sign for the encoder bfloat16, got one that"):
        train(config_for(cache, tmp_path / "d", kind=AbsTopK(k=(3,)), encoder="bfloat16"))


def test_a_checkpoint_with_a_flipped_bit_or_without_a_checksum_is_refused(cache, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("sae.training.part.Part.finish", stop)
        with pytest.raises(Stop):
            train(config_for(cache, tmp_path / "d"))
    path = tmp_path / "d" / "checkpoint.safetensors"
    content = path.read_bytes()
    header = content.index(b"\0", 8)
    places = [content.index(b'"step":"') + 8, content.index(b"settings") + 30, header + 100, len(content) // 2, len(content) - 1]
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match=r"checksum is wrong, so it is damaged; start over with --restart"):
            train(config_for(cache, tmp_path / "d"))
    path.write_bytes((2**63).to_bytes(8, "little") + content[8:])
    with pytest.raises(InputError, match=r"damaged or no safetensors file \(its header is cut off\); start over with --restart"):
        train(config_for(cache, tmp_path / "d"))
    path.write_bytes(content)
    save_file(load_file(path), path)
    with pytest.raises(InputError, match="an earlier version wrote this one; start over with --restart"):
        train(config_for(cache, tmp_path / "d"))
    path.write_bytes(content)
    train(config_for(cache, tmp_path / "d"))
    train(config_for(cache, tmp_path / "whole"))
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_kill_minus_nine_at_random_moments_then_resume(cache, tmp_path):
    """A killed process leaves a folder from which the same command finishes as if it had never been killed."""
    command = [sys.executable, "-c", "from steering.command_line import main; main('train')"]
    flags = "relu --d-sae 40 --l1 1 --steps 1500 --batch-size 128 --log-every 100 --checkpoint-every 75 --device cpu".split()  # noqa: SIM905

    def start(out):
        return subprocess.Popen([*command, *flags, "--cache", cache, "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    for delay in (0.3, 0.9, 0.1):
        process = start(tmp_path / "parts")
        deadline = time.monotonic() + 60
        while not (tmp_path / "parts" / "checkpoint.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait()
    assert start(tmp_path / "parts").wait() == 0
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_sweep_equals_its_runs_one_by_one(cache, tmp_path):
    folders = train(config_for(cache, tmp_path / "sweep", l1=(0.5, 2.0)))
    for l1, folder in zip((0.5, 2.0), folders):
        (alone,) = train(config_for(cache, tmp_path / f"alone_{l1}", l1=(l1,)))
        assert contents(folder) == contents(alone)
    sparsities = [contents(folder)[1][-1]["l0"] for folder in folders]
    assert sparsities[0] > sparsities[1]


def test_other_settings_in_the_same_folder_are_refused(cache, tmp_path):
    train(config_for(cache, tmp_path / "d"))
    before = contents(tmp_path / "d")
    train(config_for(cache, tmp_path / "d"))  # complete: nothing happens
    assert contents(tmp_path / "d") == before
    with pytest.raises(InputError, match=r"lr 0\.003 there, 0.001 now"):
        train(config_for(cache, tmp_path / "d", lr=1e-3))
    train(config_for(cache, tmp_path / "d", lr=1e-3, restart=True))
    assert contents(tmp_path / "d")[0] != before[0]
    assert len(contents(tmp_path / "d")[1]) == 6


def test_a_second_run_into_the_same_folder_is_refused(cache, tmp_path):
    with only_writer(tmp_path / "d"), pytest.raises(InputError, match="another run is writing"):
        train(config_for(cache, tmp_path / "d"))
    train(config_for(cache, tmp_path / "d"))


def test_a_diverging_run_stops_and_keeps_its_checkpoint(cache, tmp_path):
    config = config_for(cache, tmp_path / "d", lr=1e6, lr_warmup=0.0, checkpoint_every=1, steps=50)
    with pytest.raises(InputError, match=r"training diverged at step .* is untouched"):
        train(config)
    state = load_file(tmp_path / "d" / "checkpoint.safetensors")
    assert all(t.isfinite().all() for t in state.values())


def test_non_finite_activations_stop_the_run(cache, tmp_path, monkeypatch):
    from sae.activations.source import Batches

    following = Batches.__next__

    def with_a_nan(self):
        batch = following(self)
        if self.position == 30:
            batch["resid_post.0"][7, 3] = float("nan")
        return batch

    monkeypatch.setattr(Batches, "__next__", with_a_nan)
    with pytest.raises(InputError, match=r"step 30: 1 of 128 rows of the batch are not finite \(rows \d+\)"):
        train(config_for(cache, tmp_path / "d"))
    assert (tmp_path / "d" / "checkpoint.safetensors").exists()


def test_dead_features_are_resampled_and_live_again(cache, tmp_path):
    """A feature killed by hand is found dead and points at a badly reconstructed row; living ones are not touched."""
    config = config_for(cache, tmp_path)
    torch.manual_seed(0)
    dictionary = Dictionary.initial(16, 40, seed=0)
    sweep, x_bd = Sweep([Start(dictionary)], config.kind, config.recipe(), "auto", Workspace()), torch.randn(64, 16)
    sweep.silent_steps_kf[0, [3, 11]] = 5
    before = {name: t.clone() for name, t in sweep.states()[0].items()}
    residual_bd = torch.nn.functional.normalize(x_bd - dictionary(x_bd), dim=-1)
    assert sweep.resample(x_bd, step=1, k=0) == 2
    after = sweep.states()[0]
    living = [j for j in range(40) if j not in (3, 11)]
    for name in ("W_enc_fd", "W_dec_fd", "b_enc_f"):
        assert torch.equal(before[name][0, living], after[name][0, living])
    for j in (3, 11):
        cosine = (residual_bd @ after["W_dec_fd"][0, j]).max() / after["W_dec_fd"][0, j].norm()
        assert cosine > 0.9999
        assert (sweep.dictionary(0).encode(x_bd)[:, j] > 0).any()
    assert not sweep.dead_kf().any()


def test_schedules(tmp_path):
    steps = dict(steps=1000, lr=2.0, lr_warmup=0.1, lr_decay=0.2)
    recipe = config_for(tmp_path, tmp_path, **steps).recipe()
    assert recipe.learning_rate(0) == pytest.approx(0.02)
    assert recipe.learning_rate(99) == recipe.learning_rate(800) == 2.0
    assert recipe.learning_rate(900) == pytest.approx(1.0)
    assert recipe.learning_rate(999) == pytest.approx(0.01)
    now = Now(24, 1000, 16, torch.zeros(3, dtype=torch.bool), {})
    assert now.share(0.05) == pytest.approx(0.5)
    assert now._replace(step=49).share(0.05) == now._replace(step=999).share(0.05) == 1.0
    assert [step for step in range(1000) if recipe.resamples_after(step, 50)] == list(range(49, 800, 50))
    assert not any(recipe.resamples_after(step, 0) for step in range(1000))


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"l1": ()}, {"l1": (1.0, 1.0)}, {"l1": (-1.0,)}, {"lr_decay": 1.5}, {"clip": -1.0}, {"lr": float("nan")}]
)
def test_settings_that_cannot_be_meant_are_refused(cache, tmp_path, change):
    with pytest.raises(InputError, match="--"):
        train(config_for(cache, tmp_path / "d", **change))
    assert not (tmp_path / "d").exists()


def test_training_imports_with_torch_numpy_safetensors_and_pydantic_alone():
    code = """
import sys
heavy = {'transformers', 'datasets', 'wandb', 'tyro', 'rich', 'sklearn', 'matplotlib', 'pandas', 'scipy', 'tokenizers'}
class Refuse:
    def find_spec(self, name, *rest):
        if name.split('.')[0] in heavy:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import sae.dictionaries.dictionary, sae.objective, sae.training
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wandb_offline_holds_metrics_and_histograms(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(config_for(cache, tmp_path / "d", wandb="offline", steps=20))
    files = list((tmp_path / "d").glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    assert b"log10_density" in files[0].read_bytes()
