"""`sae diff-models`: latent scaling against brute force in float64, and two models of which one has a feature that the other lacks."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from sae.activations.harvest.command import HarvestConfig, harvest
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import TopK
from sae.disk.reading import read_json
from sae.errors import InputError
from sae.features.model_diff.command import DiffConfig, diff_models
from sae.features.model_diff.measures import LatentScaling, TopExamples

D, V = 24, 20
SITES = ["resid_post.0", "new/resid_post.0"]
CONTEXT = 6


@pytest.mark.parametrize("gate", [None, TopK(5)])
def test_latent_scaling_is_the_least_squares_fit(gate):
    g = torch.Generator().manual_seed(3)
    f, w, n = 14, 6, 300
    W_enc, W_dec = (torch.randn(f, 2 * w, generator=g) / 2 for _ in range(2))
    W_dec[3, w:] = 0  # of the first model alone
    W_dec[5] = 0
    W_enc[7] = 0  # never fires
    b_enc, b_dec = (torch.randn(k, generator=g) / 4 for k in (f, 2 * w))
    b_enc[7] = -1
    crosscoder = Dictionary(W_enc, b_enc, W_dec, b_dec, gate=gate, metadata={"site": SITES}).requires_grad_(False)
    x = torch.randn(n, 2 * w, generator=g) * 2
    norms = (5.0, 11.0)
    scaling = LatentScaling(crosscoder, norms)
    for part in x.split(37):
        acts = crosscoder.encode(part)
        scaling.add(part, acts, crosscoder.decode(acts, part))
    found = scaling.result()

    acts = crosscoder.encode(x).double().numpy()
    units = [norm**-0.5 for norm in norms]
    y = acts @ W_dec.double().numpy() + b_dec.double().numpy()
    for j in range(f):
        rows = [W_dec[j, k * w : (k + 1) * w].double().numpy() * units[k] for k in range(2)]
        lengths = [np.linalg.norm(row) for row in rows]
        if j in (5, 7):
            assert torch.isnan(found.nu_error_f[j])
            assert torch.isnan(found.nu_reconstruction_f[j])
            continue
        assert float(found.relative_norm_f[j]) == pytest.approx(lengths[1] / sum(lengths), rel=1e-6)
        home = int(lengths[1] > lengths[0])
        betas = []
        for k in range(2):
            here = slice(k * w, (k + 1) * w)
            x_here, y_here = x[:, here].double().numpy() * units[k], y[:, here] * units[k]
            design = np.outer(acts[:, j], rows[home]).reshape(-1, 1)
            for column, target in enumerate((x_here - y_here + np.outer(acts[:, j], rows[k]), y_here)):
                beta = np.linalg.lstsq(design, target.reshape(-1), rcond=None)[0][0]
                measured = (found.beta_error_pf, found.beta_reconstruction_pf)[column][k, j]
                assert float(measured) == pytest.approx(beta, rel=1e-4, abs=1e-6)
                betas.append(beta)
        for column, nu_f in enumerate((found.nu_error_f, found.nu_reconstruction_f)):
            own, other = betas[2 * home + column], betas[2 - 2 * home + column]
            assert torch.isnan(nu_f[j]) if own <= 0 else float(nu_f[j]) == pytest.approx(other / own, rel=1e-3, abs=1e-5)
    assert found.count_f.tolist() == (acts != 0).sum(0).tolist()


def test_top_examples_are_the_largest_of_all_batches():
    g = torch.Generator().manual_seed(0)
    acts = torch.randn(100, 7, generator=g) * (torch.rand(100, 7, generator=g) < 0.3)
    acts[:, 4] = 0
    acts[:97, 5] = 0
    top = TopExamples(7, 4, torch.device("cpu"))
    positions = torch.randperm(100, generator=g)
    for part in torch.arange(100).split(9):
        top.add(acts[part], positions[part])
    for j in range(7):
        fires = [i for i in np.argsort(-np.abs(acts[:, j].numpy()), kind="stable").tolist() if acts[i, j] != 0]
        assert top.of(j) == positions[fires[:4]].tolist()
    assert top.of(4) == []


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two models of one block that adds nothing, so that resid_post.0 is the token's embedding: rows of the identity, scaled.

    The second model has token 7 at dimension 23, where the first has nothing. In the first, token 7 is not there at all.
    """
    home = tmp_path_factory.mktemp("diff")
    for name in ("old", "new"):
        size = dict(vocab_size=V, n_positions=CONTEXT, n_embd=D, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(GPT2Config(**size))
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
            model.transformer.wte.weight[:, :V] = torch.eye(V)
            model.transformer.wte.weight[7, 7] = 0
            if name == "new":
                model.transformer.ln_f.bias.fill_(-1)  # after the site: it tells the models' fingerprints apart
                model.transformer.wte.weight[7, 23] = 1
            model.transformer.wte.weight.mul_(4)
        model.save_pretrained(home / name)
    ids = torch.randint(1, V, (2000,), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    save_file({"ids": ids, "document_starts": torch.arange(0, 2001, 5)}, home / "ids.safetensors")
    two = dict(model=str(home / "old"), second_model=str(home / "new"), sites=tuple(SITES), text=(str(home / "ids.safetensors"),))
    harvest(HarvestConfig(out=home / "cache", device="cpu", dtype="float32", held_out=0.5, max_norm_ratio=None, tokens=5000, **two))
    return home


def crosscoder(home: Path, shrink: int | None = None, decouple: int | None = None) -> Dictionary:
    """Feature j fires on token j and writes its embedding in both models, feature 7 in the second alone, as the models are.

    `shrink`: this feature writes in the second model alone, though the first has its token too. `decouple`: so does this one, and
    feature 0, which fires on the same token, writes in the first alone.
    """
    manifest = read_json(home / "cache" / "manifest.json", "a manifest")
    W_enc, W_dec = torch.zeros(V, 2 * D), torch.zeros(V, 2 * D)
    for j in range(1, V):
        at = 23 if j == 7 else j
        W_enc[j, D + at] = 1
        W_dec[j, D + at] = 1
        if j not in (7, shrink, decouple):
            W_dec[j, at] = 1
    if decouple is not None:
        W_enc[0, decouple], W_dec[0, decouple] = 1, 1
    known = {"model_name": manifest["model"]["name"], "model_fingerprint": manifest["model"]["fingerprint"], "models": manifest["models"]}
    return Dictionary(W_enc, torch.zeros(V), W_dec, torch.zeros(2 * D), metadata={"site": SITES} | known).requires_grad_(False)


def test_a_feature_of_one_model_is_told_from_artefacts(world, tmp_path, capsys):
    crosscoder(world, shrink=3, decouple=5).save(tmp_path / "d")
    content = diff_models(DiffConfig(dictionary=str(tmp_path / "d"), cache=world / "cache", out=tmp_path / "report.json", device="cpu"))
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == json.loads(json.dumps(content).replace("NaN", "null"))
    columns = content["features"]
    assert {j for j in range(V) if columns["relative_norm"][j] == 1} == {3, 5, 7}
    assert columns["relative_norm"][0] == 0
    assert columns["relative_norm"][2] == pytest.approx(0.5, abs=0.02)  # the two models' norms differ a little
    for j, error, reconstruction in ((7, 0, 0), (3, 1, 0), (5, 0, 1)):
        scale = (content["mean_squared_norms"][1] / content["mean_squared_norms"][0]) ** 0.5
        assert columns["nu_error"][j] == pytest.approx(error * scale, abs=1e-4)
        assert columns["nu_reconstruction"][j] == pytest.approx(reconstruction * scale, abs=1e-4)
    assert content["classes"] == {"first": 1, "between": 0, "shared": 16, "second": 3, "silent": 0}
    assert content["verdicts"]["second"] == {"decoupled": 1, "shrunken": 1, "specific": 1}
    assert content["groups"]["second"][0] == 7
    assert all(columns["cosine"][j] == pytest.approx(1) for j in content["groups"]["shared"])
    assert "specific: ν^ε below 0.2 and ν^r below 0.5" in capsys.readouterr().out

    cache = {int(r): x for site in SITES[1:] for path in (world / "cache" / site).iterdir() for r, x in zip(*rows_of(path))}
    for example in content["examples"]["7"]:
        assert example["activation"] == 4 == float(cache[example["position"]][23])
        assert example["reads"] == [0, 4]
        assert example["text"][example["centre"]] == "⟨7⟩"
        fires = [text == "⟨7⟩" for text in example["text"]]
        assert [value == 4 for value in example["activations"]] == fires


def rows_of(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    stored = load_file(path)
    return stored["rows"], stored["activations"]


def test_the_page_loads_nothing_and_shows_every_feature_of_its_groups(world, tmp_path):
    crosscoder(world).save(tmp_path / "d")
    settings = dict(dictionary=str(tmp_path / "d"), cache=world / "cache", device="cpu")
    content = diff_models(DiffConfig(out=tmp_path / "report.json", **settings))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=", page)
    assert page.count("<b>Feature ") == sum(len(group) for group in content["groups"].values())
    assert "None has so small a row in the other model; those that come nearest:" in page  # of the first model alone there is none
    again = diff_models(DiffConfig(out=tmp_path / "more.json", split="train", rows=50, features=1, **settings))
    assert again["rows"] == 50
    assert [len(group) for group in again["groups"].values()] <= [1, 1, 1]


def test_what_cannot_be_compared_is_refused(world, tmp_path):
    made = crosscoder(world)
    settings = dict(cache=world / "cache", out=tmp_path / "report.json", device="cpu")
    for metadata, message in (
        ({"site": "resid_post.0"}, r"expected a crosscoder of two sites, one of each model, got one in .* that reads resid_post.0; train"),
        (
            {"site": SITES, "site_out": SITES[::-1]},
            "that reads resid_post.0 and new/resid_post.0 and writes new/resid_post.0 and resid_post.0",
        ),
        ({"models": {"new": {"name": "other", "fingerprint": "0" * 12}}}, "made with other"),
    ):
        made.metadata = crosscoder(world).metadata | metadata
        made.save(tmp_path / "d")
        with pytest.raises(InputError, match=message):
            diff_models(DiffConfig(dictionary=str(tmp_path / "d"), **settings))
    for changes, message in (
        ({"out": tmp_path / "report.html"}, "a name for the JSON"),
        ({"rows": 0}, "--rows and --features of at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            diff_models(DiffConfig(dictionary=str(tmp_path / "d"), **settings | changes))
    assert not list(tmp_path.glob("report.*"))
