"""Other programs' activations to a cache: foreign.py reads them, command.py writes the cache."""
