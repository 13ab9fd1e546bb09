"""Names on the hub of published dictionaries, in repositories laid out as theirs: downloaded once, then opened offline."""

import pytest
import test_llama_scope

from sae.dictionaries.dictionary import Dictionary

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
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout(hub, offline, layout):
    place, write, name, expected = LAYOUTS[layout]
    write(hub.root / place)
    (hub.root / place / "README.md").write_text("not needed")
    dictionary = Dictionary.load(name)
    assert (dictionary.site, dictionary.metadata["model_name"]) == expected
    asked = list(hub.asked)
    assert not any("README" in path for path in asked)
    offline()
    assert Dictionary.load(name).site == expected[0]
    assert hub.asked == asked
