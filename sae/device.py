"""Devices by name."""

import torch

from sae.errors import InputError


def device_named(name: str | torch.device) -> torch.device:
    """ "auto" is CUDA if there is one, else the CPU.

    Raises `InputError` for a name that torch does not know, and for a GPU that does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"expected a device such as auto, cpu, cuda or cuda:1, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"expected the device {name} to be there, but {torch.cuda.device_count()} CUDA devices are; use cpu or auto")
    return device
