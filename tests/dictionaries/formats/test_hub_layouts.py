"""Names on the hub of published dictionaries, in repositories laid out as theirs: downloaded once, then opened offline."""

import huggingface_hub
import pytest
import test_goodfire
import test_kissane_attention
import test_learned_dicts
import test_llama_scope
import test_qwen_scope

from sae.dictionaries.dictionary import Dictionary

QWEN = f"Qwen/{test_qwen_scope.NAME}"

# what is in the repository and who writes it, the name to open, and what it must be
LAYOUTS = {
    "Llama Scope": (
        "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L3R-8x",
        test_llama_scope.version_1,
        "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L3R-8x",
        ("resid_post.3", "meta-llama/Llama-3.1-8B"),
    ),
    "R1-Distill": (
        "OpenMOSS/Llama-Scope-R1-Distill/400M-Slimpajama-400M-OpenR1-Math-220k/L3R",
        lambda path: test_llama_scope.version_2(path, early=True),
        "OpenMOSS/Llama-Scope-R1-Distill/400M-Slimpajama-400M-OpenR1-Math-220k/L3R",
        ("resid_post.3", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    ),
    "Qwen-Scope, a file": (
        QWEN,
        lambda path: test_qwen_scope.write(path, range(6)),
        f"{QWEN}/layer3.sae.pt",
        ("resid_post.3", "Qwen/Qwen3.5-2B-Base"),
    ),
    "Qwen-Scope, a layer of the set": (
        QWEN,
        lambda path: test_qwen_scope.write(path, range(6)),
        f"{QWEN}/layer_3",
        ("resid_post.3", "Qwen/Qwen3.5-2B-Base"),
    ),
    "Goodfire": (
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        lambda path: test_goodfire.write(path / "Llama-3.1-8B-Instruct-SAE-l19.pth", test_goodfire.linear("_linear")),
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        ("resid_post.19", "meta-llama/Llama-3.1-8B-Instruct"),
    ),
    "Goodfire's R1": (
        "Goodfire/DeepSeek-R1-SAE-l37",
        lambda path: test_goodfire.write(path / "math" / "DeepSeek-R1-SAE-l37.pt", test_goodfire.tied(128)),
        "Goodfire/DeepSeek-R1-SAE-l37/math",
        ("resid_post.37", "deepseek-ai/DeepSeek-R1"),
    ),
    "attention of Kissane": (
        "ckkissane/attn-saes-gpt2-small-all-layers",
        lambda path: test_kissane_attention.write(path / test_kissane_attention.NAME),
        f"ckkissane/attn-saes-gpt2-small-all-layers/{test_kissane_attention.NAME}",
        ("head_out.5", "gpt2"),
    ),
    "learned_dicts": (
        "Elriggs/sparse_coding",
        lambda path: test_learned_dicts.save(
            path / "tied_residual_l2_r4" / "learned_dicts.pt",
            [("TiedSAE", test_learned_dicts.attributes("TiedSAE", seed)) for seed in (0, 3)],
        ),
        "Elriggs/sparse_coding/tied_residual_l2_r4/learned_dicts.pt/1",
        ("resid_post.2", None),
    ),
    "qresearch": (
        "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
        lambda path: test_goodfire.write(path / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", test_goodfire.linear()),
        "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
        ("resid_post.19", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    ),
}


def test_a_download_that_was_interrupted_goes_on(hub, monkeypatch):
    place, write, name, (site, _) = LAYOUTS["R1-Distill"]
    write(hub.root / place)
    download = huggingface_hub.hf_hub_download

    def interrupted(repo, file, **rest):
        if file.endswith(".safetensors"):
            raise KeyboardInterrupt
        return download(repo, file, **rest)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Dictionary.load(name)
    assert [path.rpartition("/")[2] for path in hub.asked] == ["config.json"]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert Dictionary.load(name).site == site


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout(hub, offline, layout):
    place, write, name, expected = LAYOUTS[layout]
    write(hub.root / place)
    (hub.root / place / "README.md").write_text("not needed")
    dictionary = Dictionary.load(name)
    assert (dictionary.site, dictionary.metadata.get("model_name")) == expected
    asked = list(hub.asked)
    assert not any("README" in path for path in asked)
    assert len(asked) <= 2  # weights and settings
    offline()
    assert Dictionary.load(name).site == expected[0]
    assert hub.asked == asked
