"""Trained dictionaries: one class for every kind, made of weights, a gate and, for some, a frame around each token.

dictionary.py is the class · gates.py says which pre-activations become activations · frames.py normalises tokens on the way in and out ·
bundle.py is a set of them, one for each layer · source.py finds folders, files and names on the hub · formats/ opens them
"""
