"""Devices by name."""

import pytest
import torch

from sae.device import device_named
from sae.errors import InputError


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_named("auto").type == "cuda"


@pytest.mark.parametrize(("name", "expected"), [("gpu7", "expected a device such as"), ("cuda:99", "CUDA devices are"), ("", "such as")])
def test_what_is_not_there_is_refused(name, expected):
    with pytest.raises(InputError, match=expected):
        device_named(name)
