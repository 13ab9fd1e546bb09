"""A sparse autoencoder (dictionary) of activations: encode, decode, save, load.

b rows (tokens) · d model width · f features

Both weight matrices are feature-major in memory, so that one feature is one row of each. A saved dictionary takes the model's raw
activations; its folder is the one SAELens reads (`cfg.json` + `sae_weights.safetensors`).
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.files import write_json, write_tensors
from sae.saelens import CFG, WEIGHTS, hook_of_site, read_folder


class SparseAutoencoder(nn.Module):
    """acts = relu((x − b_dec) W_encᵀ + b_enc), x̂ = acts W_dec + b_dec, with W_enc and W_dec both [f, d]."""

    def __init__(self, W_enc_fd: Tensor, b_enc_f: Tensor, W_dec_fd: Tensor, b_dec_d: Tensor, metadata: dict[str, Any] | None = None):
        super().__init__()
        self.W_enc_fd = nn.Parameter(W_enc_fd)
        self.b_enc_f = nn.Parameter(b_enc_f)
        self.W_dec_fd = nn.Parameter(W_dec_fd)
        self.b_dec_d = nn.Parameter(b_dec_d)
        self.metadata = dict(metadata or {})

    @classmethod
    def initial(cls, d_in: int, d_sae: int, *, seed: int, decoder_norm: float = 0.1) -> "SparseAutoencoder":
        """Before training: random decoder rows of one norm, W_enc = W_dec (Anthropic, April 2024 update), zero biases."""
        generator = torch.Generator().manual_seed(seed)
        W_dec_fd = nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1) * decoder_norm
        return cls(W_dec_fd.clone(), torch.zeros(d_sae), W_dec_fd, torch.zeros(d_in))

    @property
    def d_in(self) -> int:
        return self.W_dec_fd.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec_fd.shape[0]

    @property
    def site(self) -> str | None:
        """Where in the model it was trained, for example "resid_post.2"; None when unknown."""
        return self.metadata.get("site")

    def require_site(self, site: str | None = None) -> str:
        """The site to use it at: its own, or `site` where it knows none. Raises `InputError` where they differ, or neither is known."""
        if site is None and self.site is None:
            raise InputError("expected the dictionary's metadata to name its site, such as resid_post.2, found none; give the site")
        if None not in (site, self.site) and site != self.site:
            raise InputError(f"the dictionary was made for {self.site}, so it says nothing about {site}; use it at its own site")
        return str(self.site or site)

    def require_model(self, name: str | None, fingerprint: str | None, *, named: bool) -> None:
        """Raises `InputError` unless it was made with the model of this name and fingerprint.

        Without both fingerprints, differing names prove nothing: when a person `named` the model, a line on stderr says that it is taken
        on trust, otherwise that person is asked.
        """
        made, by = (self.metadata.get(f"model_{key}") for key in ("name", "fingerprint"))
        if by is not None and fingerprint is not None:
            if by != fingerprint:
                raise InputError(
                    f"the dictionary was made with {made} (fingerprint {by}), but {name} has other weights (fingerprint {fingerprint}); "
                    "use the dictionary's own model"
                )
        elif made != name and made is not None and not named:
            raise InputError(
                f"the dictionary was made with {made}, and without the fingerprints of both it cannot be told whether {name} is the same "
                "model; if it is, say so with --model"
            )
        elif made != name:
            print(f"no fingerprint tells that the dictionary was made with {name}: it names {made or 'no model'}", file=sys.stderr)

    def pre_activations(self, x_bd: Tensor) -> Tensor:
        """Before the ReLU, [..., f]; x is cast to the dictionary's dtype."""
        return nn.functional.linear(x_bd.to(self.W_enc_fd.dtype) - self.b_dec_d, self.W_enc_fd, self.b_enc_f)

    def encode(self, x_bd: Tensor) -> Tensor:
        """Feature activations, [..., f]."""
        return self.pre_activations(x_bd).relu_()

    def decode(self, acts_bf: Tensor) -> Tensor:
        """Reconstruction from activations, [..., d]."""
        return acts_bf @ self.W_dec_fd + self.b_dec_d

    def forward(self, x_bd: Tensor) -> Tensor:
        return self.decode(self.encode(x_bd))

    @torch.no_grad()
    def folded(self, scale: float) -> "SparseAutoencoder":
        """The same function for inputs that are not yet multiplied by `scale`, with decoder rows of unit norm.

        An activation is then the length that its feature adds to the stream, in the model's own units. Exact, because ReLU commutes
        with positive factors; rows of zero norm are left as they are.
        """
        norm_f = self.W_dec_fd.norm(dim=-1) / scale
        norm_f = torch.where(norm_f > 0, norm_f, torch.ones_like(norm_f))
        return SparseAutoencoder(
            self.W_enc_fd * (scale * norm_f)[:, None],
            self.b_enc_f * norm_f,
            self.W_dec_fd / (scale * norm_f)[:, None],
            self.b_dec_d / scale,
            self.metadata,
        )

    def save(self, folder: str | Path) -> None:
        """Writes the folder that SAELens' `SAE.load_from_disk` opens; each file is written whole or not at all."""
        folder = Path(folder)
        weights = {"W_enc": self.W_enc_fd.T, "b_enc": self.b_enc_f, "W_dec": self.W_dec_fd, "b_dec": self.b_dec_d}
        write_tensors(folder / WEIGHTS, {k: v.detach().cpu() for k, v in weights.items()})  # host sync
        hook_name = hook_of_site(self.site)
        write_json(
            folder / CFG,
            {
                "architecture": "standard",
                "d_in": self.d_in,
                "d_sae": self.d_sae,
                "dtype": str(self.W_dec_fd.dtype).removeprefix("torch."),
                "device": "cpu",
                "apply_b_dec_to_input": True,
                "normalize_activations": "none",
                "reshape_activations": "hook_z" if (self.site or "").startswith("head_out") else "none",
                # without the version SAELens takes the folder for an older format and drops the metadata
                "metadata": {"sae_lens_version": "6.0.0", "hook_name": hook_name, **self.metadata},
            },
        )

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "SparseAutoencoder":
        """Reads a folder written by `save` or by any version of SAELens, of a plain ReLU dictionary (architecture "standard").

        Raises `InputError` for a missing file or key, wrong shapes, values that are not finite, and for whatever changes the function or
        what it reads: another activation, normalisation that is not folded in, a hook that is none of our sites.
        """
        weights, subtracts_b_dec, metadata = read_folder(Path(folder), device)
        b_enc_f = weights["b_enc"]
        if not subtracts_b_dec:
            b_enc_f = b_enc_f + weights["b_dec"] @ weights["W_enc"]  # the same function in our form
        return cls(weights["W_enc"].T.contiguous(), b_enc_f, weights["W_dec"], weights["b_dec"], metadata).requires_grad_(False)
