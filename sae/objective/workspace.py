"""State that a training run keeps between steps: buffers, and on CUDA the path of the next steps."""

from typing import Literal

import torch
from torch import Tensor

from sae.encoding import METHODS, Method
from sae.encoding.guess import Line
from sae.entries import Buffers
from sae.mesh import ALONE, Mesh

Precision = Literal["float32", "tf32", "bfloat16"]

DECIDE_EVERY = 32
"""calls between decisions on CUDA; each costs a host sync"""


class Workspace(Buffers):
    """`precision`: of the matrix products' operands on CUDA; sums are always in float32, and a CPU has float32 only.

    `encoder`: how active entries are found where the code is sparse; "product" is torch's float32 product, others are in sae/encoding.
    `deterministic`: on CUDA, sum in one fixed order, so that two runs are equal bit for bit (a CPU does that anyway).
    `mesh`: the processes that share the work; weights are this one's features, and a batch its rows.
    `plan` is [calls, triton?, capacity]: the calls so far and what was decided for CUDA. With the weights it decides the next step.
    """

    def __init__(
        self,
        precision: Precision = "float32",
        deterministic: bool = True,
        capacity: int = 256,
        encoder: Method = "product",
        mesh: Mesh = ALONE,
    ) -> None:
        super().__init__()
        self.mesh = mesh
        self.precision, self.deterministic = precision, deterministic
        self.plan = torch.tensor([0, 0, capacity])
        self.encoder_number = torch.tensor(METHODS.index(encoder))
        """the encoder as a tensor, for a checkpoint: a run continues with its first encoder, since it affects the last digits"""
        self.guesses: dict[str, float] = {}
        """by dictionary: guesses of the threshold that the next batch's largest exceed; they affect its time and not its result"""
        self.lines: dict[str, Line] = {}
        """by dictionary: the same for the k largest of each row"""
        self.l0: Tensor | None = None
        """of the last call, [k]"""
        self.bad_steps: Tensor | None = None
        """on CUDA, how many steps had a row that was not finite and left the weights alone, []"""
        self.bad_rows_b: Tensor | None = None
        """on CUDA, those rows, over all these steps, [b]"""

    @property
    def encoder(self) -> Method:
        return METHODS[int(self.encoder_number)]

    def note_bad_rows(self, bad_b: Tensor) -> None:
        """Records on the device what `first_bad_rows` returns later."""
        if self.bad_steps is None or self.bad_rows_b is None or len(self.bad_rows_b) != len(bad_b):
            self.bad_steps = torch.zeros((), dtype=torch.int64, device=bad_b.device)
            self.bad_rows_b = torch.zeros_like(bad_b)
        self.bad_steps += bad_b.any()
        self.bad_rows_b |= bad_b

    def decide(self, features: int, sparse_below: float) -> None:
        """Chooses the CUDA path for the next calls by the largest L0 of the sweep's dictionaries at the last call."""
        largest = float(self.l0.max()) if self.l0 is not None else features  # host sync
        triton = largest < sparse_below * features
        capacity = 1 << int(4 * largest).bit_length()  # rows differ: four times the mean seldom overflows
        self.plan[1:] = torch.tensor([int(triton), min(max(64, capacity), features)])
