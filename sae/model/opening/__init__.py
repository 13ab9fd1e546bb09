"""A model from the hub, a folder or a file: its weights, their place, and their fingerprint."""
