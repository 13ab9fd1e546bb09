"""A model as a graph: which part reads which, passes in which readers read something else, gradients at every reader."""
