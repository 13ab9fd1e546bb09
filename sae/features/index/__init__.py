"""The feature index: build.py makes it in one pass over a cache, reader.py opens it, search.py finds features in it."""
