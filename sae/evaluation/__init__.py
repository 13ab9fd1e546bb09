"""Measure a dictionary: reconstruction.py (how well, with how many features) · language_model_loss.py (what it costs the model) ·
toy.py (data whose true features are known) · evaluate.py (both measurements on a cache's held-out tokens)."""

from sae.evaluation.evaluate import EvaluationConfig, evaluate

__all__ = ["EvaluationConfig", "evaluate"]
