"""How a model is put together: where its sites are, its norms, heads and attention, found by running it on a few tokens."""
