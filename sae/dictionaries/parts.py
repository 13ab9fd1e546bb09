"""What a dictionary is made of: what formats read and write, and what `Dictionary` computes with.

d width that is read · f features · o width that is written
"""

from typing import Any, NamedTuple

from torch import Tensor

from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import Gate


class Parts(NamedTuple):
    W_enc_fd: Tensor
    b_enc_f: Tensor
    W_dec_fo: Tensor
    b_dec_o: Tensor
    gate: Gate
    b_in_d: Tensor | None
    """taken off the input"""
    W_skip_od: Tensor | None
    frame: Frame | None
    metadata: dict[str, Any]
    """facts about where it comes from, as they stand in its file"""

    @property
    def site(self) -> str | None:
        """Where in the model it reads, for example "resid_post.2"; None when unknown."""
        return self.metadata.get("site")

    @property
    def site_out(self) -> str | None:
        """Where it writes: for all but transcoders where it reads."""
        return self.metadata.get("site_out", self.site)

    @property
    def is_transcoder(self) -> bool:
        """It writes elsewhere than it reads."""
        return self.site_out != self.site or self.W_enc_fd.shape[1] != self.W_dec_fo.shape[1]
