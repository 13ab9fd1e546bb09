"""Which encoders a test can use here: on processors without VNNI, int8 products lose digits and are refused."""

import pytest
import torch

from sae.encoding import METHODS
from sae.encoding.encoder import adds_exactly

HERE = tuple(method for method in METHODS if method in ("product", "onednn") or adds_exactly(method, torch.device("cpu")))


def each(*methods):
    """For `parametrize`: these methods, of which those that this processor does not have are skipped."""
    reason = "the products of this processor are not exact"
    return [pytest.param(method, marks=pytest.mark.skipif(method not in HERE, reason=reason)) for method in methods]
