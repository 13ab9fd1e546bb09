"""The structure of a model: its sites, norms, heads and attention, found by running it on a few tokens."""
