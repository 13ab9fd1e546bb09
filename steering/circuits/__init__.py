"""Circuits: which parts of a model read which, how much each edge matters, and passes in which edges are cut."""
