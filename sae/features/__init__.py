"""Look into a dictionary's features: one pass over a cache, then every feature at once, offline.

index.py makes the index (lens.py, csc.py, storage.py) · records.py reads it · search.py finds features · page.py draws one ·
browse.py is the command · text.py turns tokens into text.
"""
