"""Differences of two models by a crosscoder: features of one model alone, shared ones, artefacts; `sae diff-models`."""
