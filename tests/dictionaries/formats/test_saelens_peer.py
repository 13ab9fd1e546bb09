"""SAELens itself against us, both ways: every architecture that it has, with every normalisation (run `make bench-peers` first).

One process of SAELens writes and reads all folders; saelens_side.py is what it runs.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats.saelens.cfg import ARCHITECTURES, REFUSED
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import AbsTopK, Threshold, TopK
from sae.errors import InputError

HERE = Path(__file__).resolve().parent
PEERS = HERE.parents[2] / ".peers" / "bin" / "python"
D, F, OUT, K = 12, 30, 10, 5
HOOK, HOOK_OUT, HOOK_Z = "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"
AT_RUN_TIME = ("none", "constant_norm_rescale", "layer_norm")

pytestmark = [pytest.mark.peers, pytest.mark.timeout(280)]


def case(architecture, metadata=(), **cfg):
    """What SAELens is asked to make."""
    transcoder = "transcoder" in architecture
    if transcoder:
        cfg |= {"d_out": OUT, "apply_b_dec_to_input": False}
    if architecture in ("topk", "abstopk"):
        cfg.setdefault("k", K)
    hooks = {"hook_name": HOOK} | ({"hook_name_out": HOOK_OUT} if transcoder else {})
    metadata = {"model_name": "gpt2", "context_size": 128, "prepend_bos": True, **hooks, **dict(metadata)}
    return {"architecture": architecture, "metadata": metadata, "cfg": {"d_in": D, "d_sae": F, **cfg}}


def checkpoint(architecture, scaling_factor=None, whitens=False, **cfg):
    normalised = "covariance_whitening" if whitens else "none" if scaling_factor is None else "expected_average_only_in"
    if "topk" in architecture:
        cfg.setdefault("k", K)
    if "matryoshka" in architecture:
        cfg["matryoshka_widths"] = [10, F]
    return case(architecture, **cfg, normalize_activations=normalised) | {"scaling_factor": scaling_factor, "whitens": whitens}


SAVED = [name for name in ARCHITECTURES if "batchtopk" not in name]  # those are jumprelu when they are saved for inference
WRITTEN = {f"{name}, {norm}": case(name, normalize_activations=norm) for name in SAVED for norm in AT_RUN_TIME}
for name in ("standard", "jumprelu", "topk", "abstopk", "gated"):
    WRITTEN[f"{name}, b_dec apart"] = case(name, apply_b_dec_to_input=False)
    WRITTEN[f"{name}, float64"] = case(name, dtype="float64")
    WRITTEN[f"{name}, heads"] = case(name, {"hook_name": HOOK_Z}, reshape_activations="hook_z")
for name in ("topk", "abstopk"):
    for norm in AT_RUN_TIME:
        WRITTEN[f"{name} by decoder norm, {norm}"] = case(name, normalize_activations=norm, rescale_acts_by_decoder_norm=True)

TRAINED = ("standard", "gated", "topk", "abstopk", "jumprelu", "batchtopk", "matryoshka_batchtopk")
CHECKPOINTS = {f"{name}, {norm}": checkpoint(name, factor) for name in TRAINED for norm, factor in (("plain", None), ("scaled", 0.37))}
CHECKPOINTS |= {f"{name}, whitened": checkpoint(name, whitens=True) for name in TRAINED}
for name in ("topk", "batchtopk", "standard", "gated"):
    for subtracts in (True, False):
        more = {"apply_b_dec_to_input": subtracts} | ({"rescale_acts_by_decoder_norm": False} if "topk" in name else {})
        CHECKPOINTS[f"{name}, scaled, {more}"] = checkpoint(name, 0.37, **more)
        CHECKPOINTS[f"{name}, whitened, {more}"] = checkpoint(name, whitens=True, **more)

FACTOR = {"normalize_activations": "expected_average_only_in"}
REFUSALS = {
    "temporal": (case("temporal", tied_weights=True, n_heads=1, bottleneck_factor=3), "temporal.*earlier tokens"),
    "matching_pursuit": (case("matching_pursuit"), "matching_pursuit.*what is left"),
    "unknown factor": (case("standard", **FACTOR), r"expected_average_only_in.*activation_scaler\.json"),
    "unknown factor of a transcoder": (case("transcoder", **FACTOR), "expected_average_only_in.*transcoder's output"),
    "unknown whitening": (case("standard", normalize_activations="covariance_whitening"), "covariance_whitening.*activation_whitening"),
}


def ours():
    """Every kind that we write."""
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=g) / 3

    gates = {"relu": Threshold(), "jumprelu": Threshold(random(F).abs()), "topk": TopK(K), "abstopk": AbsTopK(K)}
    known = {"model_name": "some/model", "context_size": 128, "prepend_bos": True}
    for name, gate in gates.items():
        W_enc_fd, b_enc_f, W_dec_fd, b_dec_d = random(F, D), random(F), random(F, D), random(D)
        for norm in AT_RUN_TIME:
            frame = None if norm == "none" else Frame(norm)
            for how, b_in_d in (("tied", b_dec_d), ("apart", None), ("own bias", random(D))):
                metadata = known | {"site": "resid_post.2"}
                made = Dictionary(W_enc_fd, b_enc_f, W_dec_fd, b_dec_d, gate=gate, b_in_d=b_in_d, frame=frame, metadata=metadata)
                yield f"{name}, {norm}, {how}", made
            if isinstance(gate, TopK):
                continue
            for skip in (None, random(OUT, D)):
                metadata = known | {"site": "resid_pre.2", "site_out": "mlp_out.2"}
                frame = None if norm == "none" else Frame(norm, restores=False)
                weights = (random(F, D), random(F), random(F, OUT), random(OUT))
                made = Dictionary(*weights, gate=gate, W_skip_od=skip, b_in_d=random(D), frame=frame, metadata=metadata)
                yield f"{name} transcoder, {norm}{'' if skip is None else ', skip'}", made
        heads = Dictionary(W_enc_fd, b_enc_f, W_dec_fd, b_dec_d, gate=gate, metadata=known | {"site": "head_out.2"})
        yield f"{name}, heads", heads
        yield f"{name}, float64", Dictionary(W_enc_fd, b_enc_f, W_dec_fd, b_dec_d, gate=gate, metadata=known).double()


OURS = {name: made.requires_grad_(False) for name, made in ours()}
NAMES = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk", "abstopk": "abstopk"}
NAMES |= {"relu transcoder": "transcoder", "jumprelu transcoder": "jumprelu_transcoder"}

FLAT = {
    "d_in": D,
    "d_sae": F,
    "dtype": "torch.float32",
    "device": "cuda",
    "model_name": "gpt2-small",
    "dataset_path": "Skylion007/openwebtext",
    "context_size": 128,
}
VERSION_2 = {**FLAT, "hook_point": HOOK, "hook_point_layer": 1, "hook_point_head_index": None, "l1_coefficient": 8e-5, "seed": 42}
VERSION_3 = {
    **FLAT,
    "architecture": "standard",
    "hook_name": HOOK,
    "hook_layer": 1,
    "hook_head_index": None,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "prepend_bos": True,
    "sae_lens_training_version": "3.20.0",
    "dataset_trust_remote_code": True,
    "normalize_activations": "none",
}
VERSION_5 = VERSION_3 | {"sae_lens_training_version": "5.11.0", "neuronpedia_id": None, "seqpos_slice": [None]}
VERSION_5 |= {"model_from_pretrained_kwargs": {}}
TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
OLDER = {
    "2": VERSION_2,
    "2, heads": VERSION_2 | {"hook_point": HOOK_Z},
    "2, normalisation off": VERSION_2 | {"normalize_activations": False},
    "3": VERSION_3,
    "3, b_dec apart": VERSION_3 | {"apply_b_dec_to_input": False},
    "3, topk": VERSION_3 | TOPK,
    "3, gated": VERSION_3 | {"architecture": "gated"},
    "3, heads": VERSION_3 | {"hook_name": HOOK_Z},
    "4, jumprelu": VERSION_3 | {"architecture": "jumprelu", "sae_lens_training_version": "4.4.0"},
    "4, ones": VERSION_3 | {"sae_lens_training_version": "4.4.0"},
    "5": VERSION_5,
    "5, architecture topk": VERSION_5 | TOPK | {"architecture": "topk", "activation_fn_str": "relu"},
    "5, topk, layer_norm": VERSION_5 | TOPK | {"normalize_activations": "layer_norm", "prepend_bos": False},
    "5, constant_norm_rescale": VERSION_5 | {"normalize_activations": "constant_norm_rescale"},
    "5, float64": VERSION_5 | {"dtype": "float64"},
}


def write_older(folder: Path, cfg: dict, ones: bool) -> None:
    g = torch.Generator().manual_seed(1)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
    gated = cfg.get("architecture") == "gated"
    shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag") if gated else ("b_enc",), (F,))
    shapes |= {"threshold": (F,)} if cfg.get("architecture") == "jumprelu" else {}
    w = {name: torch.randn(shape, generator=g) / 3 for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    save_file(w | ({"scaling_factor": torch.ones(F)} if ones else {}), folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder after SAELens ran."""
    if not PEERS.exists():
        pytest.skip("no environment .peers with SAELens; make bench-peers creates it")
    folder = tmp_path_factory.mktemp("saelens")
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(2)) * 2 + 0.3
    save_file({"x": x}, folder / "x.safetensors")
    for name, made in OURS.items():
        made.save(folder / "ours" / name)
    for name, cfg in OLDER.items():
        write_older(folder / "older" / name, cfg, ones=name.endswith("ones"))
    for kind in ("ours", "older"):
        (folder / "outputs" / kind).mkdir(parents=True)
    read = [f"ours/{name}" for name in OURS] + [f"older/{name}" for name in OLDER]
    (folder / "cases.json").write_text(
        json.dumps({"write": WRITTEN | {name: made for name, (made, _) in REFUSALS.items()}, "train": CHECKPOINTS, "read": read})
    )
    result = subprocess.run([PEERS, HERE / "saelens_side.py", folder], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def check(shared: Path, dictionary: Dictionary, outputs: str) -> None:
    x = load_file(shared / "x.safetensors")["x"]
    theirs = load_file(shared / "outputs" / f"{outputs}.safetensors")
    close = dict(rtol=1e-5, atol=1e-5, check_dtype=False)
    assert 0 < (theirs["acts"] != 0).float().mean() < 1
    torch.testing.assert_close(dictionary.encode(x), theirs["acts"], **close)
    torch.testing.assert_close(dictionary.decode(theirs["acts"].to(dictionary.W_dec_fo.dtype), x), theirs["out"], **close)


def test_there_is_no_architecture_that_nobody_decided_about(shared):
    registry = json.loads((shared / "registry.json").read_text())
    assert set(registry["inference"]) | set(registry["training"]) == set(ARCHITECTURES) | set(REFUSED)


@pytest.mark.parametrize("name", WRITTEN)
def test_we_compute_what_saelens_saved(shared, name):
    check(shared, Dictionary.load(shared / "theirs" / name), name)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_we_compute_what_saelens_makes_of_a_checkpoint(shared, name):
    check(shared, Dictionary.load(shared / "theirs" / name), name)
    check(shared, Dictionary.load(shared / "theirs" / f"{name} inference"), name)


@pytest.mark.parametrize("name", OURS)
def test_saelens_computes_what_we_saved(shared, name):
    dictionary, kind = OURS[name], name.partition(",")[0]
    check(shared, dictionary, f"ours/{name}")
    read = json.loads((shared / "registry.json").read_text())["read"][f"ours/{name}"]
    assert read["architecture"] == NAMES[kind].replace("transcoder", "skip_transcoder" if "skip" in name else "transcoder")
    assert read["model_name"] == "some/model"
    hooks = {"resid_post.2": "blocks.2.hook_resid_post", "resid_pre.2": "blocks.2.hook_resid_pre", "head_out.2": "blocks.2.attn.hook_z"}
    assert read.get("hook_name") == hooks.get(dictionary.site)
    if dictionary.is_transcoder:
        assert read["hook_name_out"] == "blocks.2.hook_mlp_out"


@pytest.mark.parametrize("name", OLDER)
def test_configurations_of_versions_2_to_5_mean_what_saelens_makes_of_them(shared, name):
    dictionary = Dictionary.load(shared / "older" / name)
    check(shared, dictionary, f"older/{name}")
    assert dictionary.site == ("head_out.1" if "heads" in name else "resid_pre.1")
    assert dictionary.metadata["model_name"] == "gpt2-small"


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_meaning_here_is_refused_by_name(shared, name):
    with pytest.raises(InputError, match=REFUSALS[name][1]):
        Dictionary.load(shared / "theirs" / name)
