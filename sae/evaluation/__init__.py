"""Measure a dictionary: reconstruction.py (how well, with how many features) · language_model_loss.py (what it costs the model) ·
toy.py (data with known true features) · evaluate.py (both measurements on a cache's held-out tokens) · splice.py (dictionaries in the
running model) · bundle.py (the measurements of a set of them)."""

from sae.evaluation.evaluate import evaluate
from sae.evaluation.settings import EvaluationConfig

__all__ = ["EvaluationConfig", "evaluate"]
