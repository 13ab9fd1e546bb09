"""A circuit as a page of its own, which opens without a network."""
