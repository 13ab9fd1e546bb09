"""A model from the hub, a folder or a file: weights, where they lie, and their fingerprint."""
