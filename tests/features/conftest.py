"""The small world of feature_world.py, harvested and indexed once."""

import json

import numpy as np
import pytest
import torch
from feature_world import TEXTS, VOCABULARY, World, one_hot_model, save_dictionary, train_tokenizer

from sae.features.index.build import IndexConfig, build_index
from sae.features.index.reader import FeatureIndex


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    from sae.activations.harvest.command import HarvestConfig, harvest

    folder = tmp_path_factory.mktemp("features")
    tokenizer = train_tokenizer(folder / "model")
    one_hot_model(folder / "model")
    rng = np.random.default_rng(0)
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for _ in range(90):
            label = rng.choice(list(TEXTS))
            file.write(json.dumps({"text": TEXTS[label] * int(rng.integers(1, 3)), "domain": str(label)}) + "\n")
    config = HarvestConfig(
        text=(str(folder / "text.jsonl"),), label_field="domain", out=folder / "cache", model=str(folder / "model"),
        sites=("resid_pre.0",), tokens=6000, context=32, dtype="float32", held_out=0.1, device="cpu", shard_tokens=1000, pool_tokens=2500,
    )  # fmt: skip
    harvest(config)
    W_enc_fd = torch.from_numpy(rng.integers(-6, 7, (40, VOCABULARY))).float() / 4
    W_enc_fd[3] = -1.0  # a feature that never fires
    W_enc_fd[4] = 2.0  # one that always does
    dictionary = save_dictionary(folder / "dictionary", W_enc_fd, torch.full((40,), -0.5), folder / "cache")
    build_index(IndexConfig(cache=folder / "cache", dictionary=folder / "dictionary", out=folder / "index", device="cpu"))
    return World(folder / "model", folder / "cache", dictionary, folder / "dictionary", FeatureIndex.open(folder / "index"), tokenizer)


@pytest.fixture(scope="session")
def dense(world) -> np.ndarray:
    """Every activation by brute force, from the token ids alone: [tokens, f]; the beginning-of-text tokens, which no cache holds, are 0."""
    ids = np.asarray(world.index.tokens["ids"])
    acts = np.maximum(world.dictionary.W_enc_fd.numpy().T[ids] + world.dictionary.b_enc_f.numpy(), 0)
    acts[ids == 0] = 0
    return acts
