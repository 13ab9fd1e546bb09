"""The language model's loss with a dictionary spliced in, on a tiny real GPT-2 with random weights."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.evaluation import language_model_loss as module
from sae.evaluation.language_model_loss import language_model_loss, summarise
from sae.model.language_model import LanguageModel

SITE, BOS, D = "resid_post.0", 0, 16


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=24, n_embd=D, n_layer=2, n_head=2, bos_token_id=BOS, eos_token_id=BOS, initializer_range=0.4
    )
    return LanguageModel(GPT2LMHeadModel(config), name="tiny")


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.concatenate([[BOS], rng.integers(1, 50, n)]).astype(np.int32) for n in (23, 5, 11, 1, 17, 8)]


def dictionary_of(W_enc_fd, W_dec_fd, b_dec_d=None) -> Dictionary:
    b_dec_d = torch.zeros(D) if b_dec_d is None else b_dec_d
    return Dictionary.autoencoder(W_enc_fd, torch.zeros(len(W_enc_fd)), W_dec_fd, b_dec_d).requires_grad_(False)


def mean_cross_entropy(lm, sequences) -> float:
    """Nats per token, by torch alone and with whatever hooks are on the model."""
    total, tokens = 0.0, 0
    for ids in sequences:
        if len(ids) > 1:
            ids_p = torch.from_numpy(ids.astype(np.int64))
            with torch.no_grad():
                logits_pv = lm.model(ids_p[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits_pv.double(), ids_p[1:], reduction="sum").item()
            tokens += len(ids) - 1
    return total / tokens


def identity() -> Dictionary:
    """relu(x) − relu(−x) = x, exactly."""
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    return dictionary_of(both, both.clone())


def zero() -> Dictionary:
    return dictionary_of(torch.zeros(4, D), torch.zeros(4, D))


def run(lm, dictionary, sequences, mean_d=None, **settings):
    mean_d = torch.full((D,), 0.3, dtype=torch.float64) if mean_d is None else mean_d
    replaced = [ids != BOS for ids in sequences]
    dictionary.metadata["site"] = SITE
    return language_model_loss(lm, [dictionary], sequences, {SITE: mean_d}, **{"replaced": replaced, **settings})


def test_identity_recovers_everything_exactly(lm, sequences):
    result = run(lm, identity(), sequences)
    assert result.loss_recovered == 1
    assert result.loss_recovered_mean == 1
    assert result.kl["spliced"] == 0
    assert result.kl_recovered == 1
    assert result.loss_recovered_interval == (1, 1)
    assert result.cross_entropy["spliced"] == result.cross_entropy["clean"]
    assert result.kl["zero"] > 0.01


def test_zero_dictionary_is_zero_ablation_and_constant_one_is_mean_ablation(lm, sequences):
    result = run(lm, zero(), sequences)
    assert result.loss_recovered == 0
    assert result.cross_entropy["spliced"] == result.cross_entropy["zero"]
    assert result.kl["spliced"] == result.kl["zero"]
    constant = dictionary_of(torch.zeros(4, D), torch.zeros(4, D), torch.full((D,), 0.3))
    result = run(lm, constant, sequences)
    assert result.loss_recovered_mean == 0
    assert result.kl["spliced"] == result.kl["mean"]


def by_hand(lm, sequences, replace, replaced):
    """Cross-entropy and KL, one unpadded sequence at a time, blocks called one after the other, log-softmax in float64."""
    model = lm.model.transformer
    nll = kl = count = 0
    for ids, own in zip(sequences, replaced):
        ids = torch.as_tensor(ids, dtype=torch.long)[None]
        logits = []
        for edit in (lambda x: x, replace):
            x = model.wte(ids) + model.wpe(torch.arange(ids.shape[1]))
            x = model.h[0](x)
            x = x[0] if isinstance(x, tuple) else x
            x = torch.stack([edit(x)[0, p] if changed else x[0, p] for p, changed in enumerate(own)])[None]
            x = model.h[1](x)
            x = x[0] if isinstance(x, tuple) else x
            logits.append(lm.model.lm_head(model.ln_f(x)).double().log_softmax(-1)[0, :-1])
        clean, edited = logits
        nll -= edited.gather(1, ids[0, 1:, None]).sum().item()
        kl += (clean.exp() * (clean - edited)).sum().item()
        count += len(edited)
    return nll / count, kl / count


@pytest.mark.parametrize("which", ["all but the beginning", "some"])
def test_losses_equal_a_computation_by_hand(lm, sequences, which):
    g = torch.Generator().manual_seed(2)
    dictionary = dictionary_of(torch.randn(40, D, generator=g), torch.randn(40, D, generator=g) / 20)
    rng = np.random.default_rng(1)
    replaced = [ids != BOS if which != "some" else rng.random(len(ids)) < 0.4 for ids in sequences]
    result = run(lm, dictionary, sequences, batch=4, replaced=replaced)
    assert result.tokens == sum(len(s) - 1 for s in sequences)
    assert result.replaced == sum(map(sum, replaced))
    for arm, replace in {"spliced": dictionary, "zero": torch.zeros_like, "mean": lambda x: torch.full_like(x, 0.3)}.items():
        cross_entropy, kl = by_hand(lm, sequences, replace, replaced)
        assert result.cross_entropy[arm] == pytest.approx(cross_entropy, rel=1e-5)
        assert result.kl[arm] == pytest.approx(kl, rel=1e-4)
    clean, _ = by_hand(lm, sequences, lambda x: x, replaced)
    assert result.cross_entropy["clean"] == pytest.approx(clean, rel=1e-5)
    ce = result.cross_entropy
    assert result.loss_recovered == pytest.approx((ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]))
    assert result.loss_recovered_mean == pytest.approx((ce["mean"] - ce["spliced"]) / (ce["mean"] - ce["clean"]))


def test_nothing_changes_where_nothing_is_replaced(lm, sequences):
    result = run(lm, zero(), sequences, replaced=[np.zeros(len(ids), dtype=bool) for ids in sequences])
    assert result.kl == {"spliced": 0, "zero": 0, "mean": 0}
    assert result.replaced == 0


def test_batches_and_chunks_do_not_matter(lm, sequences, monkeypatch):
    whole = run(lm, zero(), sequences, batch=6)
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * 50 * 7)
    single = run(lm, zero(), sequences, batch=1)
    for arm, value in whole.cross_entropy.items():
        assert single.cross_entropy[arm] == pytest.approx(value, rel=1e-6)


def test_a_large_vocabulary_takes_fewer_sequences_at_a_time(lm, sequences, monkeypatch):
    expected, sizes = run(lm, zero(), sequences), []
    monkeypatch.setattr(module, "TABLE_BYTES", 2 * 4 * 50 * 24 + 100)  # two of the longest sequences
    whole = module.batch_sums
    monkeypatch.setattr(module, "batch_sums", lambda *args: sizes.append(len(args[2])) or whole(*args))
    few = run(lm, zero(), sequences)
    assert sizes == [2, 2, 2]
    assert few.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-6)
    monkeypatch.setattr(module, "TABLE_BYTES", 1)
    assert run(lm, zero(), sequences).kl == pytest.approx(expected.kl, rel=1e-5)


def test_bootstrap_interval_has_the_spread_of_a_ratio_over_sequences():
    """Recovered loss of sequence i is u_i with one token each and CE_zero − CE_clean = 1: a mean of u_i, with a known error."""
    u_s = np.random.default_rng(0).normal(0.8, 0.1, 400)
    one, nil = np.ones(400), np.zeros(400)
    sums_sc = np.stack([one, nil, 1 - u_s, one, one, nil, one, one, one], axis=1)
    result = summarise(sums_sc, seed=0)
    low, high = result.loss_recovered_interval
    half = 1.96 * u_s.std() / 20
    assert result.loss_recovered == pytest.approx(u_s.mean())
    assert (low, high) == (pytest.approx(u_s.mean() - half, abs=0.2 * half), pytest.approx(u_s.mean() + half, abs=0.2 * half))
    assert summarise(sums_sc, seed=0).loss_recovered_interval == (low, high)


def test_unusable_input_is_refused(lm, sequences):
    with pytest.raises(InputError, match="at least two tokens"):
        run(lm, zero(), [np.array([BOS])])
    wide = Dictionary.autoencoder(torch.zeros(4, D + 1), torch.zeros(4), torch.zeros(4, D + 1), torch.zeros(D + 1))
    with pytest.raises(InputError, match="16 wide"):
        run(lm, wide, sequences)
    broken = dictionary_of(torch.zeros(4, D), torch.zeros(4, D), torch.full((D,), float("nan")))
    with pytest.raises(InputError, match="finite"):
        run(lm, broken, sequences)


def test_a_transcoder_reads_one_site_and_writes_another(lm, sequences):
    """Against hooks of torch's own on the model: what the first MLP adds is replaced by a function of what entered the block."""
    g = torch.Generator().manual_seed(3)
    W_enc_fd, W_dec_fd, W_skip_od = torch.randn(32, D, generator=g), torch.randn(32, D, generator=g) / 9, torch.randn(D, D, generator=g) / 9
    metadata = {"site": "resid_pre.0", "site_out": "mlp_out.0"}
    dictionary = Dictionary(W_enc_fd, torch.zeros(32), W_dec_fd, torch.ones(D), W_skip_od=W_skip_od, metadata=metadata).requires_grad_(
        False
    )
    replaced = [ids != BOS for ids in sequences]
    mean_d = torch.full((D,), 0.2, dtype=torch.float64)
    result = language_model_loss(lm, [dictionary], sequences, {"mlp_out.0": mean_d}, replaced=replaced)

    block, seen = lm.model.transformer.h[0], {}
    for arm in ("spliced", "mean"):

        def write(_module, _args, y, arm=arm):
            x = seen["x"]
            out = (x @ W_enc_fd.T).relu() @ W_dec_fd + 1 + x @ W_skip_od.T if arm == "spliced" else mean_d.float().expand_as(y)
            return torch.cat([y[:, :1], out[:, 1:]], dim=1)  # beginning of text stays

        handles = [block.register_forward_pre_hook(lambda _m, args, kwargs: seen.update(x=args[0]), with_kwargs=True)]
        handles.append(block.mlp.register_forward_hook(write))
        expected = mean_cross_entropy(lm, sequences)
        for handle in handles:
            handle.remove()
        assert result.cross_entropy[arm] == pytest.approx(expected, rel=1e-5)
    dictionary.metadata = {"site": "mlp_out.0", "site_out": "resid_pre.0"}
    with pytest.raises(InputError, match="before it reads"):
        language_model_loss(lm, [dictionary], sequences, {"resid_pre.0": mean_d}, replaced=replaced)


def test_a_cross_layer_transcoder_writes_what_its_layers_add_up_to(lm, sequences):
    """Against hooks of torch's own: what each MLP adds is what the layers up to it write, and the second reads what the first left."""
    g = torch.Generator().manual_seed(4)
    enc = [torch.randn(32, D, generator=g) for _ in range(2)]
    dec = [torch.randn(32, (2 - i) * D, generator=g) / 9 for i in range(2)]
    sites = [{"site": f"resid_pre.{i}", "site_out": [f"mlp_out.{layer}" for layer in range(i, 2)]} for i in range(2)]
    dictionaries = [
        Dictionary(enc[i], torch.zeros(32), dec[i], torch.zeros((2 - i) * D), metadata=sites[i]).requires_grad_(False) for i in range(2)
    ]
    replaced = [ids != BOS for ids in sequences]
    means = {f"mlp_out.{i}": torch.full((D,), 0.1 * i, dtype=torch.float64) for i in range(2)}
    result = language_model_loss(lm, dictionaries, sequences, means, replaced=replaced)

    seen, handles = {}, []
    for i in range(2):
        block = lm.model.transformer.h[i]
        handles.append(block.register_forward_pre_hook(lambda _m, args, kwargs, i=i: seen.update({i: args[0]}), with_kwargs=True))

        def write(_module, _args, y, i=i):
            out = sum((seen[k] @ enc[k].T).relu() @ dec[k][:, (i - k) * D : (i - k + 1) * D] for k in range(i + 1))
            return torch.cat([y[:, :1], out[:, 1:]], dim=1)

        handles.append(block.mlp.register_forward_hook(write))
    expected = mean_cross_entropy(lm, sequences)
    for handle in handles:
        handle.remove()
    assert result.cross_entropy["spliced"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match=r"writes at mlp_out.1 before it reads"):
        language_model_loss(lm, [dictionaries[0], late(dictionaries[1])], sequences, means, replaced=replaced)


def late(dictionary):
    """The same, but it reads behind where it writes."""
    parts = dictionary.parts()
    return Dictionary.of(parts._replace(metadata=parts.metadata | {"site": "resid_post.1"}))
