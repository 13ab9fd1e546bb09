"""Train dictionaries on an activation cache."""

from sae.training.config import TrainingConfig
from sae.training.trainer import train

__all__ = ["TrainingConfig", "train"]
