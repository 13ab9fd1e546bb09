"""Steering vectors: arithmetic against that of tensors, and files against the programs that read them.

d width of the site · p positions
"""

import importlib.util

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.vector import SteeringVector


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vector(site: str, seed: int = 0, width: int = 32) -> SteeringVector:
    return SteeringVector.at(site, random(width, seed=seed), {"seed": seed})


def test_vector_arithmetic_is_that_of_its_direction():
    one, two = vector("mlp_out.1", 0), vector("mlp_out.1", 1)
    total = 3 * one + two * 0.5
    torch.testing.assert_close(total.direction_d, one.direction_d * 3 + two.direction_d / 2)
    assert total.provenance == {"sum": [{"factor": 3, "of": {"seed": 0}}, {"factor": 0.5, "of": {"seed": 1}}]}
    assert total.norm == pytest.approx(total.direction_d.double().square().sum().sqrt().item(), rel=1e-6)
    less = one - 2 * two
    torch.testing.assert_close(less.direction_d, one.direction_d - 2 * two.direction_d)
    assert torch.equal((-one).direction_d, -one.direction_d)
    assert total.unit().norm == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(total.unit().direction_d * total.norm, total.direction_d)


def test_sites_are_united_and_share_one_norm():
    one, other = vector("resid_post.1", 0), SteeringVector({"resid_post.1": random(32, seed=1), "head_out.0": random(3, 24, seed=2)})
    total = one - other
    assert list(total.directions) == ["resid_post.1", "head_out.0"]
    torch.testing.assert_close(total.directions["resid_post.1"], random(32) - random(32, seed=1))
    assert torch.equal(total.directions["head_out.0"], -random(3, 24, seed=2))
    everything = torch.cat([d.flatten() for d in total.directions.values()])
    assert total.norm == pytest.approx(everything.norm().item(), rel=1e-6)
    assert total.unit().norm == pytest.approx(1, abs=1e-6)
    with pytest.raises(InputError, match=r"one at resid_post\.1, head_out\.0"):
        total.site  # noqa: B018
    with pytest.raises(InputError, match="for each of 2"):
        SteeringVector.at("resid_pre.0", random(2, 8)).direction_d  # noqa: B018


def test_projecting_out_leaves_what_is_orthogonal():
    one, two = vector("mlp_out.1", 0), vector("mlp_out.1", 1)
    rest = one.project_out(5 * two)
    assert rest.direction_d @ two.direction_d == pytest.approx(0, abs=1e-5)
    expected = one.direction_d.double().numpy()
    u = two.direction_d.double().numpy() / np.linalg.norm(two.direction_d.double().numpy())
    np.testing.assert_allclose(rest.direction_d.numpy(), expected - u * (expected @ u), atol=1e-6)
    positional = SteeringVector.at("mlp_out.1", random(3, 32, seed=5))
    assert (positional.project_out(two).directions["mlp_out.1"] @ two.direction_d).abs().max() < 1e-5
    for other, sentence in [
        (vector("mlp_out.0"), "got none"),
        (positional, r"\(3, 32\)"),
        (0 * two, "a zero one"),
    ]:
        with pytest.raises(InputError, match=sentence):
            one.project_out(other)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: vector("mlp_out.1") + vector("mlp_out.1", width=16), r"one shape at mlp_out.1 .* \(32,\) and \(16,\)"),
        (lambda: vector("mlp_out.1") - SteeringVector.at("mlp_out.1", random(2, 32)), "one shape"),
        (lambda: float("nan") * vector("mlp_out.1"), "finite factor"),
        (lambda: (0 * vector("mlp_out.1")).unit(), "not zero"),
        (lambda: SteeringVector.at("mlp_out.1", torch.tensor([1.0, float("inf")])), "finite numbers"),
        (lambda: SteeringVector.at("mlp_out.1", torch.ones(1, 2, 3)), r"shape \(1, 2, 3\)"),
        (lambda: SteeringVector.at("mlp_out.1", torch.ones(0, 3)), "finite numbers"),
        (lambda: SteeringVector.at("blocks.1", torch.ones(3)), "a site of the model"),
        (lambda: SteeringVector({}), "got none"),
    ],
)
def test_unusable_vectors(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()


def test_vector_survives_its_file(tmp_path):
    saved = SteeringVector({"resid_post.1": random(32), "head_out.0": random(3, 24, seed=2)}, {"method": "made", "layers": [1, 0]})
    saved.save(tmp_path / "some" / "vector.safetensors")
    loaded = SteeringVector.load(tmp_path / "some" / "vector.safetensors")
    assert loaded.directions.keys() == saved.directions.keys()
    assert all(torch.equal(loaded.directions[site], direction) for site, direction in saved.directions.items())
    assert loaded.provenance == saved.provenance


def test_files_of_the_first_format_are_read(tmp_path):
    metadata = {"format": "steering-vector-1", "site": "attn_out.3", "provenance": '{"seed": 4}'}
    save_file({"direction": random(8)}, tmp_path / "old", metadata)
    loaded = SteeringVector.load(tmp_path / "old")
    assert torch.equal(loaded.direction_d, random(8))
    assert (loaded.site, loaded.provenance) == ("attn_out.3", {"seed": 4})


def test_unusable_vector_files(tmp_path):
    vector("resid_post.1").save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-20])
    save_file({"weights": torch.ones(2)}, tmp_path / "other")
    for name, sentence in {"absent": "does not exist", "cut": "no safetensors file", "other": "got a file with weights"}.items():
        with pytest.raises(InputError, match=sentence):
            SteeringVector.load(tmp_path / name)


def test_gguf_file_is_the_one_that_llama_cpp_reads(tmp_path):
    """Its loader wants 1-D float32 tensors named direction.L and no others; repeng's wants the architecture and a model hint besides."""
    gguf = pytest.importorskip("gguf")
    saved = vector("resid_post.10", 0) + vector("resid_post.2", 1)
    saved.to_gguf(tmp_path / "vector.gguf", "llama")
    reader = gguf.GGUFReader(tmp_path / "vector.gguf")
    assert [t.name for t in reader.tensors] == ["direction.2", "direction.10"]
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 and len(t.shape) == 1 for t in reader.tensors)
    fields = {key: reader.get_field(key).contents() for key in ("general.architecture", "controlvector.model_hint")}
    assert fields == {"general.architecture": "controlvector", "controlvector.model_hint": "llama"}
    assert [reader.get_field(f"controlvector.{key}").contents() for key in ("layer_count", "layer_base")] == [2, 0]
    np.testing.assert_array_equal(reader.tensors[0].data, random(32, seed=1).numpy())
    loaded = SteeringVector.from_gguf(tmp_path / "vector.gguf")
    assert {site: d.tolist() for site, d in loaded.directions.items()} == {site: d.tolist() for site, d in saved.directions.items()}
    assert loaded.provenance == saved.provenance


@pytest.fixture
def repeng_vector():
    """repeng's own class; its package asks for numpy 1, but this file of it runs with any where `np.float_` is known."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("repeng") is None:
        pytest.skip("needs the package repeng")
    if not hasattr(np, "float_"):
        np.float_ = np.float64
    return pytest.importorskip("repeng.extract").ControlVector


def test_repeng_reads_ours_and_we_read_its(tmp_path, repeng_vector):
    saved = vector("resid_post.0", 0) + vector("resid_post.3", 1)
    saved.to_gguf(tmp_path / "ours.gguf", "gpt2")
    theirs = repeng_vector.import_gguf(tmp_path / "ours.gguf")
    assert theirs.model_type == "gpt2"
    assert theirs.directions.keys() == {0, 3}
    for layer, direction in theirs.directions.items():
        np.testing.assert_array_equal(direction, saved.directions[f"resid_post.{layer}"].numpy())
    theirs.export_gguf(tmp_path / "theirs.gguf")
    loaded = SteeringVector.from_gguf(tmp_path / "theirs.gguf")
    assert all(torch.equal(loaded.directions[site], direction) for site, direction in saved.directions.items())
    assert loaded.provenance == {"method": "gguf", "model_type": "gpt2"}


def write_gguf(gguf, path, architecture: str = "controlvector", **tensors: np.ndarray):
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_layer_base_of_a_gguf_file_can_be_said(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = write_gguf(gguf, tmp_path / "from-one", **{"direction.1": np.ones(4, np.float32), "direction.2": np.ones(4, np.float16)})
    assert list(SteeringVector.from_gguf(path).directions) == ["resid_post.1", "resid_post.2"]
    assert list(SteeringVector.from_gguf(path, layer_base=1).directions) == ["resid_post.0", "resid_post.1"]
    with pytest.raises(InputError, match=r"direction\.2 and higher"):
        SteeringVector.from_gguf(path, layer_base=2)


def test_unusable_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    for made in (vector("attn_out.1"), SteeringVector.at("resid_post.1", random(2, 8))):
        with pytest.raises(InputError, match="all positions at resid_post"):
            made.to_gguf(tmp_path / "never.gguf", "llama")
    assert not list(tmp_path.iterdir())
    (tmp_path / "text").write_text("no gguf, but some text that is long enough to be read")
    write_gguf(gguf, tmp_path / "model", "llama", weight=np.ones(4, np.float32))
    write_gguf(gguf, tmp_path / "integers", **{"direction.1": np.ones(4, np.int32)})
    for name, sentence in {
        "absent": "does not exist",
        "text": "cannot be read",
        "model": "got one with weight",
        "integers": "float",
    }.items():
        with pytest.raises(InputError, match=sentence):
            SteeringVector.from_gguf(tmp_path / name)


COMMON = dict(vocab_size=50, bos_token_id=0, eos_token_id=None, pad_token_id=None)
CONFIGS = {
    "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **COMMON),
    "llama": lambda: hf.LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, **COMMON
    ),
    "opt": lambda: hf.OPTConfig(
        hidden_size=32,
        ffn_dim=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        vocab_size=50,
    ),
}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_lm_eval_file_steers_as_we_do_when_read_as_that_tool_reads_it(family, tmp_path):
    """Modules by name below `base_model`, output plus coefficient times vector: `lm_eval/models/hf_steered.py`."""
    from steering.intervention import steered

    torch.manual_seed(0)
    lm = LanguageModel(hf.AutoModelForCausalLM.from_config(CONFIGS[family]()))
    ids_sp = torch.arange(2, 12).reshape(2, 5)
    made = vector("resid_post.1", 0) + vector("attn_out.2", 1) + vector("resid_pre.1", 2) + vector("mlp_out.0", 3)
    made.to_lm_eval(tmp_path / "steer.pt", lm, coefficient=1.5)
    config = torch.load(tmp_path / "steer.pt", weights_only=True)
    hooks = []
    for name, module in lm.model.base_model.named_modules():
        if name in config:
            added = config[name]["steering_vector"] * config[name]["steering_coefficient"]
            hooks.append(
                module.register_forward_hook(lambda _m, _a, out, v=added: (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v)
            )
    assert len(hooks) == len(config) == 4
    theirs = lm.logits(ids_sp)
    for hook in hooks:
        hook.remove()
    with steered(lm, [(made, 1.5)]):
        torch.testing.assert_close(lm.logits(ids_sp), theirs)
    assert all(entry["action"] == "add" and entry["bias"] is None and entry["head_index"] is None for entry in config.values())


def test_what_lm_eval_cannot_say(tmp_path):
    lm = LanguageModel(hf.AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()))
    for made, name, sentence in [
        (vector("resid_pre.0"), "a.pt", "output of modules"),
        (vector("head_out.1"), "a.pt", "output of modules"),
        (vector("resid_pre.1") + vector("resid_post.0"), "a.pt", "once at each"),
        (SteeringVector.at("resid_post.1", random(2, 32)), "a.pt", "one direction"),
        (vector("resid_post.1", width=8), "a.pt", "width 32"),
        (vector("resid_post.1"), "a.safetensors", r"ending \.pt"),
    ]:
        with pytest.raises(InputError, match=sentence):
            made.to_lm_eval(tmp_path / name, lm)
    assert not list(tmp_path.iterdir())


def test_a_vector_keeps_what_it_was_given(tmp_path):
    row_d, provenance = torch.arange(4.0), {"data": [1]}
    vector = SteeringVector({f"resid_post.{layer}": row_d for layer in range(4)}, provenance)
    views = SteeringVector({f"resid_post.{i}": row for i, row in enumerate([row_d[1:], row_d.expand(2, 4), row_d.flip(0)[:3]])})
    vector.save(tmp_path / "v.safetensors")
    views.save(tmp_path / "views.safetensors")
    row_d += 1
    provenance["data"].append(2)
    for kept in (vector, SteeringVector.load(tmp_path / "v.safetensors")):
        assert all(direction.tolist() == [0, 1, 2, 3] for direction in kept.directions.values())
        assert kept.provenance == {"data": [1]}
    assert SteeringVector.load(tmp_path / "views.safetensors").directions["resid_post.0"].tolist() == [1, 2, 3]


def test_directions_are_named_by_site_and_finite_in_float32():
    with pytest.raises(InputError, match=r'directions such as \{"resid_post.2": tensor\}, got list'):
        SteeringVector([torch.ones(3)])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="finite numbers"):
        SteeringVector.at("resid_post.0", torch.full((3,), 1e300, dtype=torch.float64))


@pytest.mark.parametrize("direction", [[1.0, 2.0], None, torch.zeros(3, dtype=torch.complex64)])
def test_a_direction_that_is_no_real_tensor_is_refused(direction):
    with pytest.raises(InputError, match=r"expected a steering direction at resid_post\.0 as a real tensor"):
        SteeringVector.at("resid_post.0", direction)
