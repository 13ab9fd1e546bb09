"""A circuit as its own page, which opens without a network."""
