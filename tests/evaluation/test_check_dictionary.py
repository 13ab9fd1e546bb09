"""The command: what it measures, what the source promises, the report, the exit code, and the dictionary that it writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from check_world import ROOT, changed, declared, llama, recorder_of, searched, trained
from safetensors.torch import save_file

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import TopK
from sae.errors import InputError
from sae.evaluation.check.alternatives import Change
from sae.evaluation.check.check import CheckConfig, check, command
from sae.evaluation.check.corrected import corrected
from sae.evaluation.check.fit import fit, random_fvu
from sae.evaluation.check.promises import Promise, Promises, promises
from sae.evaluation.check.verdict import broken
from sae.model.language_model import LanguageModel

LM, SAE = (ROOT / "checkpoints" / name for name in ("demo-lm", "demo-sae"))


def config(**settings) -> CheckConfig:
    return CheckConfig(**{"dictionary": str(SAE), "model": str(LM), "tokens": 300, "device": "cpu"} | settings)


# ---- measures


def test_measures_of_each_sequence_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    x_nd = 3 + torch.randn(30, 8, generator=generator)
    W_fd, b_d = torch.randn(20, 8, generator=generator), torch.randn(8, generator=generator)
    dictionary = Dictionary.autoencoder(W_fd, torch.randn(20, generator=generator), W_fd * 0.1, b_d)
    sequence_n = torch.tensor([0] * 7 + [1] * 11 + [2] * 12)
    found = fit(dictionary, x_nd, x_nd, sequence_n, 3)
    x, W, b = x_nd.double().numpy(), W_fd.double().numpy(), b_d.double().numpy()
    acts = np.maximum((x - b) @ W.T + dictionary.b_enc_f.detach().double().numpy(), 0)
    y = acts @ (W * np.float32(0.1)) + b
    for weights in ([1, 1, 1], [2, 0, 1], [0, 3, 0]):
        rows = np.concatenate([np.flatnonzero(sequence_n.numpy() == s) for s, times in enumerate(weights) for _ in range(times)])
        own, out, weight_rs = x[rows], y[rows], np.array([weights], dtype=float)
        fvu = ((own - out) ** 2).sum() / ((own - own.mean(0)) ** 2).sum()
        norms = [np.linalg.norm(t, axis=1) for t in (own, out)]
        assert found.fvu(weight_rs) == pytest.approx(fvu, rel=1e-5)
        assert found.l0(weight_rs) == pytest.approx((acts[rows] > 0).sum(1).mean())
        assert found.norm_ratio(weight_rs) == pytest.approx(norms[1].mean() / norms[0].mean(), rel=1e-5)
        assert found.cosine(weight_rs) == pytest.approx(((own * out).sum(1) / norms[0] / norms[1]).mean(), rel=1e-5)
    assert found.silent == (acts.max(0) <= 0).sum()


def test_random_directions_explain_what_their_number_allows():
    x_nd = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 16)
    fvus = [random_fvu(x_nd, 64, l0) for l0 in (0, 1, 4, 16)]
    assert fvus == sorted(fvus, reverse=True)
    assert fvus[0] == fvus[1] < 1  # one at least
    assert random_fvu(torch.ones(5, 3), 8, 2) == 1  # nothing varies


# ---- promises


def sae(**settings) -> Dictionary:
    return Dictionary(torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4), **settings)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("layer_12/width_16k/average_l0_71", 71, 71),
        ("average_l0_105/params.npz", 105, 105),
        ("saes-w-32k-l0-40", 40, 40),
        ("SAE-Res-Qwen3-8B-Base-W64K-L0_50", 50, 50),
        ("layer_7_width_16k_l0_medium", 30, 60),
        ("layer_7_width_262k_l0_big_affine", 90, 150),
    ],
)
def test_an_l0_in_a_name_is_a_promise(name, low, high, tmp_path):
    found = promises(tmp_path / name, sae(), 100).of("l0")
    assert (found.low, found.high) == (low, high)


@pytest.mark.parametrize("name", ["layer_12", "l1_3", "col0_7", "l0", "l0_x", "width_16k"])
def test_other_names_promise_nothing(name, tmp_path):
    assert promises(tmp_path / name, sae(), 100).of("l0") is None


def test_files_beside_the_weights_promise_what_they_say(tmp_path):
    said = {"reconstruction": {"l0": 31.5, "fvu": 0.2, "cosine": 0.9, "norm_ratio": 0.95}, "language_model": None}
    (tmp_path / "evaluation.json").write_text(json.dumps(said))
    save_file({"sparsity": torch.log10(torch.tensor([0.5, 0.25, 0.01, 0.0]))}, tmp_path / "sparsity.safetensors")
    metadata = {"promised": {"l0": 30, "loss_recovered": 0.97}}
    found = promises(tmp_path, sae(gate=TopK(3), metadata=metadata), 10)
    assert [one.low for one in found if one.measure == "l0"] == [30, 31.5, pytest.approx(0.76), 0]
    assert [found.of(name).low for name in ("fvu", "cosine", "norm_ratio", "loss_recovered")] == [0.2, 0.9, 0.95, 0.97]
    assert found.of("silent_share").low == pytest.approx((0.5**10 + 0.75**10 + 0.99**10 + 1) / 4)
    assert promises(SAE, sae(), 10).of("fvu").low == pytest.approx(0.1659, abs=1e-4)


def test_a_damaged_file_beside_the_weights_is_refused(tmp_path):
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match=r"evaluation\.json.*not valid JSON"):
        promises(tmp_path, sae(), 10)
    (tmp_path / "evaluation.json").unlink()
    save_file({"sparsity": torch.zeros(3)}, tmp_path / "sparsity.safetensors")
    with pytest.raises(InputError, match="sparsity"):
        promises(tmp_path, sae(), 10)


def around(value: float) -> dict[str, float]:
    return {"value": value, "low": value * 0.95, "high": value * 1.05}


@pytest.mark.parametrize(
    ("name", "value", "reasons"),
    [
        ("l0", 60, 0),
        ("l0", 20, 1),
        ("l0", 90, 1),
        ("fvu", 0.3, 0),
        ("fvu", 0.5, 1),
        ("norm_ratio", 0.3, 1),
        ("norm_ratio", 2.0, 1),
        ("loss_recovered", 0.3, 1),
    ],
)
def test_what_counts_as_broken(name, value, reasons):
    measures = {"l0": around(50), "fvu": around(0.2), "norm_ratio": around(0.9), "loss_recovered": around(0.95)} | {name: around(value)}
    promised = Promises([Promise("l0", 50, 50, "a name"), Promise("fvu", 0.2, 0.2, "a file")])
    assert len(broken(promised, measures)) == reasons
    assert broken(promised, measures | {"loss_recovered": None, "l0": around(50), "fvu": around(0.2), "norm_ratio": around(0.9)}) == []


# ---- the command


def test_a_good_dictionary_passes(tmp_path, capsys):
    command(config(out=tmp_path / "report.json", write=tmp_path / "as-it-is"))  # exit code 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert "Verdict: good" in printed
    assert (report["verdict"], report["reasons"], report["found"]) == ("good", [], None)
    measures = report["declared"]
    assert measures["fvu"]["low"] < measures["fvu"]["value"] < measures["fvu"]["high"] < 0.35
    assert measures["l0"]["value"] == pytest.approx(13.8, rel=0.2)
    assert 0.9 < measures["loss_recovered"]["value"] <= 1
    assert report["rows"] == 300
    assert {"bias", "frame", "bos", "positions", "site", "scale"} <= {
        change["kind"] for one in report["alternatives"] for change in one["changes"]
    }
    same, first = Dictionary.load(tmp_path / "as-it-is"), Dictionary.load(SAE)
    assert (same.site, same.metadata["model_fingerprint"]) == (first.site, first.metadata["model_fingerprint"])
    x_bd = 10 * torch.randn(5, 256)
    assert torch.equal(same(x_bd), first(x_bd))


def test_a_mistake_ends_with_exit_code_1_and_is_mended(tmp_path, capsys):
    good = Dictionary.load(SAE)
    declared(changed(good, b_in_d=None), site="resid_post.1").save(tmp_path / "mistaken")
    settings = config(dictionary=str(tmp_path / "mistaken"), json=True, write=tmp_path / "corrected")
    with pytest.raises(SystemExit) as left:
        command(settings)
    assert left.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "wrong"
    assert sorted(change["kind"] for change in report["found"]["changes"]) == ["bias", "site"]
    assert report["found"]["loss_recovered"]["value"] > 0.9 > report["declared"]["loss_recovered"]["value"]
    assert report["written"]["folder"] == str(tmp_path / "corrected")
    again = check(config(dictionary=str(tmp_path / "corrected")))
    assert again["verdict"] == "good"
    assert again["declared"]["fvu"] == report["found"]["fvu"]
    x_bd = 10 * torch.randn(5, 256)
    assert torch.equal(Dictionary.load(tmp_path / "corrected")(x_bd), good(x_bd))


def test_nothing_is_written_where_nothing_fits(tmp_path, capsys):
    W_fd = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    Dictionary.autoencoder(W_fd, torch.zeros(512), W_fd.clone(), torch.zeros(256), {"site": "resid_post.2"}).save(tmp_path / "random")
    report = check(config(dictionary=str(tmp_path / "random"), write=tmp_path / "corrected"))
    assert report["verdict"] == "wrong"
    assert any("made for another model" in reason for reason in report["reasons"])
    assert "Nothing was written: nothing that fits was found" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["random"]


@pytest.mark.parametrize("kind", [None, "constant_norm_rescale", "layer_norm", "centred"])
def test_a_written_frame_reads_back_as_the_same_function(kind, tmp_path, byte_lm):
    recorder = recorder_of(llama(byte_lm.tokenizer))
    good = trained(recorder, "resid_post.1", frame=kind)
    mistaken = changed(good, frame=None if kind else Frame("layer_norm"))
    steps = searched(recorder, declared(mistaken, hook_name="blocks.1.hook_resid_post"))
    corrected(steps[-1].use, recorder).save(tmp_path)
    again, x_bd = Dictionary.load(tmp_path), 20 * torch.randn(6, 32) + 3
    assert torch.allclose(again(x_bd), good(x_bd), atol=1e-5)
    assert again.metadata["model_name"] == "tiny llama"


def test_other_text_is_read(tmp_path):
    (tmp_path / "own.txt").write_text("The cat sat on the mat and looked at the moon. " * 60)
    assert check(config(text=(str(tmp_path / "own.txt"),), tokens=200))["text"] == [str(tmp_path / "own.txt")]


def test_the_instruct_model_of_a_base_model_is_named(tmp_path):
    """Here the base model is the instruct model with its second half untrained."""
    lm = LanguageModel.load(str(LM), device="cpu")
    shutil.copytree(LM, tmp_path / "base")
    for weight in lm.model.transformer.h[1].parameters():
        weight.data.mul_(0.2)
    lm.model.save_pretrained(tmp_path / "base")
    report = check(config(model=str(tmp_path / "base"), other_model=str(LM)))
    assert [change["kind"] for change in report["found"]["changes"]] == ["model"]


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tokens": 10}, "--tokens must be at least 100"),
        ({"dictionary": "nowhere"}, "does not exist"),
        ({"site": "resid_post.1"}, "made for resid_post.2"),
        ({"write": SAE / "inside"}, "outside the dictionary's own"),
        ({"write": ROOT / "docs"}, "holds something else"),
        ({"out": ROOT / "docs"}, "it is a folder"),
        ({"text": ("nowhere.txt",)}, "nowhere.txt"),
    ],
)
def test_bad_input_is_one_sentence(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        check(config(**settings))


def test_a_dictionary_of_another_width_or_a_site_that_is_not_there_is_refused(tmp_path):
    sae(metadata={"site": "resid_post.2"}).save(tmp_path / "narrow")
    with pytest.raises(InputError, match="256 wide for resid_post"):
        check(config(dictionary=str(tmp_path / "narrow")))
    sae(metadata={"site": "resid_post.9"}).save(tmp_path / "deep")
    with pytest.raises(InputError, match=r"resid_post\.9"):
        check(config(dictionary=str(tmp_path / "deep")))
    sae().save(tmp_path / "anywhere")
    with pytest.raises(InputError, match="give the site"):
        check(config(dictionary=str(tmp_path / "anywhere")))


def test_a_change_that_a_folder_cannot_say_is_not_written(byte_lm):
    from sae.evaluation.check.check import write

    recorder = recorder_of(llama(byte_lm.tokenizer))
    step = searched(recorder, trained(recorder, "resid_post.1"))[0]
    step.use = step.use._replace(changes=(Change("positions", "without the first 4 positions"),))
    assert write(Path("never"), step) == {"folder": None, "why": "a dictionary's folder cannot record positions that are left out"}
