"""Several dictionaries of one model, one for each of its layers, whose outputs at one site add up.

A set of transcoders has one that reads and writes at each layer. In a cross-layer transcoder, layer i writes at all later
layers too, so that ŷ at layer l is the sum over i ≤ l. A weakly causal crosscoder is the same in the residual stream.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.parts import Parts
from sae.dictionaries.source import read


class Bundle(Mapping[int, Dictionary]):
    """A mapping from layer to the dictionary that reads there, which is opened at first use and then kept.

    On a CPU the weights stay on the disk until they are used, if the format allows that, so that a set may be larger than memory.
    """

    def __init__(self, layers: Mapping[int, Callable[[], Dictionary]]):
        self._open, self._opened = dict(layers), dict[int, Dictionary]()

    def __getitem__(self, layer: int) -> Dictionary:
        if layer not in self._opened:
            self._opened[layer] = self._open[layer]()
        return self._opened[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._open)

    def __len__(self) -> int:
        return len(self._open)

    def encode(self, values: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Activations [..., f] by layer; `values` has the value at each input site, [..., d]."""
        return {layer: dictionary.encode(dictionary.joined(values)) for layer, dictionary in self.items()}

    def decode(self, acts: Mapping[int, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of what all layers write, [..., o] by site. `values` are those that were encoded."""
        outputs: dict[str, Tensor] = {}
        for layer, dictionary in self.items():
            for site, y_bo in dictionary.split(dictionary.decode(acts[layer], dictionary.joined(values))).items():
                outputs[site] = outputs[site] + y_bo if site in outputs else y_bo
        return outputs


def load(source: str | Path, device: str | torch.device = "cpu") -> Dictionary | Bundle:
    """The dictionary, or the set of them, in a folder or file of any of the formats, or under a name on the hub (see source.py)."""
    parts = read(source, device)
    if isinstance(parts, Parts):
        return Dictionary.of(parts)
    return Bundle({layer: partial(_opened, one) for layer, one in parts.items()})


def _opened(parts: Callable[[], Parts]) -> Dictionary:
    return Dictionary.of(parts())
