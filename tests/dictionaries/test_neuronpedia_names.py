"""Neuronpedia's names of dictionaries and features, against entries of SAELens' list, copied by hand."""

import re

import pytest

from sae.dictionaries.neuronpedia import posted, sources
from sae.errors import InputError


@pytest.mark.parametrize(
    ("name", "model", "dictionary", "feature"),
    [
        (
            "https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/10004",
            "google/gemma-2-2b",
            "google/gemma-scope-2b-pt-res/layer_12/width_16k/canonical",
            10004,
        ),
        (
            "https://neuronpedia.org/gemma-2-2b/5-gemmascope-res-16k__l0-143/1?embed=true#x",
            "google/gemma-2-2b",
            "google/gemma-scope-2b-pt-res/layer_5/width_16k/average_l0_143",
            1,
        ),
        ("gpt2-small/6-res-jb/650", "openai-community/gpt2", "jbloom/GPT2-Small-SAEs-Reformatted/blocks.6.hook_resid_pre", 650),
        ("gpt2-small/12-res-jb", "openai-community/gpt2", "jbloom/GPT2-Small-SAEs-Reformatted/blocks.11.hook_resid_post", None),
        ("pythia-70m-deduped/e-res-sm/3", "EleutherAI/pythia-70m-deduped", "ctigges/pythia-70m-deduped__res-sm_processed/e-res-sm", 3),
        (
            "gemma-2-2b/12-sae_bench-topk-res-4k__trainer_2_step_488/7",
            "google/gemma-2-2b",
            "canrager/saebench_gemma-2-2b_width-2pow12_date-1109/gemma-2-2b_topk_width-2pow12_date-1109/resid_post_layer_12_checkpoints/"
            "trainer_2_step_488",
            7,
        ),
        ("qwen3-4b/17-transcoder-hp/5", "Qwen/Qwen3-4B", "mwhanna/qwen3-4b-transcoders/layer_17.safetensors", 5),
    ],
)
def test_a_posted_feature(name, model, dictionary, feature):
    assert posted(name) == (model, dictionary, feature)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("12", "expected a URL of Neuronpedia"),
        ("gemma-2-2b/12-gemmascope-res-16k/ten", "expected a URL of Neuronpedia"),
        ("https://www.neuronpedia.org/", "expected a URL of Neuronpedia"),
        ("https://example.org/gemma-2-2b/12-gemmascope-res-16k/1", "expected a URL of Neuronpedia"),
        ("gemma-9/12-gemmascope-res-16k/1", "one of Neuronpedia's models"),
        ("gpt2-small/6/123", "neurons of MLP 6"),
        ("gemma-2-2b/12-gemmascope-res-16kk/1", "one of Neuronpedia's sources of gemma-2-2b"),
        ("gemma-2b/3-res-jb/1", "one of Neuronpedia's sources of gemma-2b"),  # its layers are 0, 6, 10 and 12
    ],
)
def test_another_name_is_refused(name, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        posted(name)


def test_every_entry_of_the_list_gives_a_whole_name():
    for model, entry in sources().items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry["model"])
        for kind, name in entry["sets"].items():
            layer = "5" if isinstance(name, str) else next(iter(name))
            found = posted(f"{model}/{layer}-{re.sub(r'{[0-9]+}', '8', kind)}/0").dictionary
            assert re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.+-]+)+", found), found
