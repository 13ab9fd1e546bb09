"""A sparse autoencoder (dictionary) of activations: encode, decode, save, load.

b rows (tokens) · d model width · f features

Both weight matrices are feature-major in memory, so that one feature is one row of each. A saved dictionary takes the model's raw
activations; its folder is the one SAELens reads (`cfg.json` + `sae_weights.safetensors`).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.files import read_json, write_json, write_tensors

WEIGHTS = "sae_weights.safetensors"
CFG = "cfg.json"

# TransformerLens' names of our sites, which SAELens and its readers expect in cfg.json
HOOK_NAMES = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "head_out": "blocks.{}.attn.hook_z",
}


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
        kind, _, layer = (self.site or "").partition(".")
        hook_name = HOOK_NAMES[kind].format(layer) if kind in HOOK_NAMES else None
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
                "reshape_activations": "hook_z" if kind == "head_out" else "none",
                # without the version SAELens takes the folder for an older format and drops the metadata
                "metadata": {"sae_lens_version": "6.0.0", "hook_name": hook_name, **self.metadata},
            },
        )

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "SparseAutoencoder":
        """Reads a folder written by `save` or by SAELens (architecture "standard").

        Raises `InputError` for a missing file or key, wrong shapes, another architecture, or normalisation that is not folded in.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        cfg = read_json(folder / CFG, "a dictionary's cfg.json")
        path = folder / WEIGHTS
        try:
            weights = load_file(path, str(device))
        except FileNotFoundError:
            raise InputError(f"expected the dictionary's weights at {path}, which does not exist; the folder is incomplete") from None
        except SafetensorError as error:
            raise InputError(f"{path} is not a whole safetensors file ({error}); copy or train the dictionary again") from None
        refuse_unknown(folder, cfg, weights)
        metadata = cfg.get("metadata") or {}
        b_enc_f = weights["b_enc"]
        if not cfg.get("apply_b_dec_to_input", True):
            b_enc_f = b_enc_f + weights["b_dec"] @ weights["W_enc"]  # the same function in our form
        return cls(weights["W_enc"].T.contiguous(), b_enc_f, weights["W_dec"], weights["b_dec"], metadata).requires_grad_(False)


def refuse_unknown(folder: Path, cfg: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raises `InputError` unless the folder's content is a dictionary this class computes exactly."""
    missing = [k for k in ("architecture", "d_in", "d_sae") if k not in cfg]
    missing += [k for k in ("W_enc", "b_enc", "W_dec", "b_dec") if k not in weights]
    if missing:
        raise InputError(
            f"the dictionary in {folder} lacks {', '.join(missing)}; a whole one has cfg.json and {WEIGHTS} as written on save"
        )
    if cfg["architecture"] != "standard":
        raise InputError(f"the dictionary in {folder} has architecture {cfg['architecture']!r}; only 'standard' (ReLU) can be read")
    if cfg.get("normalize_activations", "none") not in ("none", None):
        raise InputError(
            f"the dictionary in {folder} normalises activations ({cfg['normalize_activations']!r}); fold that into the weights first"
        )
    d, f = cfg["d_in"], cfg["d_sae"]
    for key, shape in {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}.items():
        if tuple(weights[key].shape) != shape:
            raise InputError(f"{key} in {folder} has shape {tuple(weights[key].shape)} where cfg.json asks for {shape}")
