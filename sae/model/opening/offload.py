"""Weights that `device_map` left on disk or on the host: between passes they are not in memory (on torch's device "meta")."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def device_of(module: Any) -> torch.device:
    """The device on which the module computes."""
    if module.weight.is_meta:  # accelerate brings it there for each pass
        return torch.device(module._hf_hook.execution_device)
    return module.weight.device


@contextmanager
def on_hand(module: Any) -> Iterator[None]:
    """Inside, the module's own weights are in memory."""
    if not any(weight.is_meta for weight in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module, "cpu"):
        yield
