"""Activations on disk: harvested from text, read back in shuffled batches, each led back to its token.

text/ makes tokens · files/ are the files of a cache · harvest/ writes them with a model, imports/ from other programs' files ·
cache.py opens it, or one of its sites · source.py is what training reads: cached.py reads it from a cache, live.py computes it ·
describe.py and export.py tell others what is in a cache · shuffle.py measures how well it is shuffled.
"""
