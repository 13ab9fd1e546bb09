"""A dictionary: it reads activations at one site and writes a sparse combination of its rows at the same site or another.

b rows (tokens) · d model width · f features · o width of what is written · k chosen features

    z = (x − b_in) W_encᵀ + b_enc      acts = gate(z)      y = acts W_dec + b_dec (+ x W_skipᵀ)

Every kind is this formula with its own gate (gates.py). A sparse autoencoder writes at its input site and has b_in = b_dec or none; a
transcoder writes elsewhere and may skip. Both weight matrices are feature-major in memory, so that one feature is one row of each.
A saved dictionary takes the model's raw activations; the formats are in sae/dictionaries/formats. Weights in half precision and those
that stay on the disk are used a block of features at a time (rows.py), and results are float32.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sae.dictionaries.formats.saelens.files import save
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import Choice, Chosen, Gate, Threshold, TopK
from sae.dictionaries.parts import Parts, Port
from sae.dictionaries.rows import at_once, computing_dtype, random_rows, ranges, rows_of
from sae.dictionaries.source import read
from sae.disk.mapped import require_room
from sae.encoding import Encoder, Method, fastest
from sae.entries import Buffers, Entries, active_entries, add_weighted_sums, starts_of
from sae.errors import InputError
from sae.objective.choice import top_by


class Dictionary(nn.Module):
    """Use its methods, not its tensors: only the methods are right for every kind."""

    def __init__(
        self,
        W_enc_fd: Tensor,
        b_enc_f: Tensor,
        W_dec_fo: Tensor,
        b_dec_o: Tensor,
        *,
        gate: Gate | None = None,
        b_in_d: Tensor | None = None,
        W_skip_od: Tensor | None = None,
        frame: Frame | None = None,
        metadata: dict[str, Any] | None = None,
    ):
        """`gate`: ReLU by default. `metadata`: facts about its origin, as in its file; "site" is its input site and, for a transcoder,
        "site_out" its output site."""
        super().__init__()
        self.W_enc_fd, self.b_enc_f = nn.Parameter(W_enc_fd), nn.Parameter(b_enc_f)
        self.W_dec_fo, self.b_dec_o = nn.Parameter(W_dec_fo), nn.Parameter(b_dec_o)
        self.b_in_d = None if b_in_d is None else nn.Parameter(b_in_d)
        self.W_skip_od = None if W_skip_od is None else nn.Parameter(W_skip_od)
        self.gate, self.frame = gate or Threshold(), frame
        self.metadata = dict(metadata or {})

    @classmethod
    def autoencoder(
        cls, W_enc_fd: Tensor, b_enc_f: Tensor, W_dec_fd: Tensor, b_dec_d: Tensor, metadata: dict[str, Any] | None = None
    ) -> "Dictionary":
        """acts = relu((x − b_dec) W_encᵀ + b_enc), x̂ = acts W_dec + b_dec: one bias in memory is used at both ends."""
        return cls(W_enc_fd, b_enc_f, W_dec_fd, b_dec_d, b_in_d=b_dec_d, metadata=metadata)

    @classmethod
    def initial(cls, d_in: int, d_sae: int, *, seed: int, decoder_norm: float = 0.1, features: slice = slice(None)) -> "Dictionary":
        """An untrained dictionary: random rows of one norm, W_enc = W_dec (Anthropic, April 2024 update), zero biases; only these
        `features`."""
        W_dec_fd = random_rows(d_in, d_sae, seed, features).mul_(decoder_norm)
        return cls.autoencoder(W_dec_fd.clone(), torch.zeros(len(W_dec_fd)), W_dec_fd, torch.zeros(d_in))

    def parts(self) -> Parts:
        matrices = self.W_enc_fd, self.b_enc_f, self.W_dec_fo, self.b_dec_o
        return Parts(*matrices, self.gate, self.metadata, self.b_in_d, self.W_skip_od, self.frame)

    @property
    def d_in(self) -> int:
        return self.W_enc_fd.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec_fo.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec_fo.shape[0]

    @property
    def site(self) -> str | None:
        """The site that it reads, for example "resid_post.2"; None if unknown."""
        return self.parts().site

    @property
    def site_out(self) -> str | None:
        """The site that it writes: equal to `site` except for transcoders."""
        return self.parts().site_out

    @property
    def reads(self) -> tuple[Port, ...]:
        return self.parts().reads

    @property
    def writes(self) -> tuple[Port, ...]:
        return self.parts().writes

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes at another site than it reads."""
        return self.parts().is_transcoder

    def require_site(self, site: str | None = None) -> str:
        """The site to use it at: its own, or `site` if it names none. Raises `InputError` if they differ, or neither is known."""
        if site is None and self.site is None:
            raise InputError("expected the dictionary's metadata to name its site, such as resid_post.2, found none; give the site")
        if None not in (site, self.site) and site != self.site:
            raise InputError(f"the dictionary was made for {self.site}, so it says nothing about {site}; use it at its own site")
        return str(self.site or site)

    def require_model(self, name: str | None, fingerprint: str | None, *, named: bool, second: str | None = None) -> None:
        """Raises `InputError` unless it was made with the model of this name and fingerprint; `second`: as its second model.

        Without both fingerprints, differing names prove nothing: if the user `named` the model, a line on stderr says that it is trusted,
        otherwise the error asks the user to name it.
        """
        made, by = (self.metadata.get(f"model_{key}") for key in ("name", "fingerprint"))
        if second is not None:
            models = self.metadata.get("models")
            facts = models.get(second) if isinstance(models, dict) else None
            made, by = (facts.get(key) if isinstance(facts, dict) else None for key in ("name", "fingerprint"))
        if by is not None and fingerprint is not None:
            if by != fingerprint:
                raise InputError(
                    f"the dictionary was made with {made} (fingerprint {by}), but {name} has other weights (fingerprint {fingerprint}); "
                    "use the dictionary's own model"
                )
        elif made != name and made is not None and not named:
            raise InputError(
                f"the dictionary was made with {made}, and without the fingerprints of both it is unknown whether {name} is the same "
                "model; if it is, say so with --model"
            )
        elif made != name:
            print(f"no fingerprint tells that the dictionary was made with {name}: it names {made or 'no model'}", file=sys.stderr)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computations: float32 for weights in half precision, else that of the weights."""
        return computing_dtype(self.W_enc_fd)

    @property
    def features_at_once(self) -> int:
        """How many are computed at a time: all, unless weights in half precision or on the disk have to be brought into memory for it."""
        return min(at_once(self.W_enc_fd), at_once(self.W_dec_fo))

    def encoder_input(self, x_bd: Tensor) -> Tensor:
        """The factor of the encoder's rows, [..., d], in the dictionary's dtype."""
        x_bd = x_bd.to(self.dtype)
        x_bd = x_bd if self.frame is None else self.frame.enter(x_bd).x_bd
        return x_bd if self.b_in_d is None else x_bd - self.b_in_d

    def pre_activations(self, x_bd: Tensor) -> Tensor:
        """The gate's input, [..., f]."""
        parts = [z_bf for _, z_bf in self.blocks(x_bd)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def blocks(self, x_bd: Tensor, out: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yields pre-activations [..., features] of one range of features after another; with `out`, those of rows [b, d] in that memory
        [b, f]."""
        input_bd = self.encoder_input(x_bd)
        for part in ranges(self.d_sae, self.features_at_once):
            W_fd, b_f = rows_of(self.W_enc_fd, part), self.b_enc_f[part].to(self.dtype)
            if out is None:
                yield part, nn.functional.linear(input_bd, W_fd, b_f)
            else:
                yield part, torch.addmm(b_f, input_bd, W_fd.T, out=out[:, part])

    def chosen(self, x_bd: Tensor, gate: Choice) -> Chosen:
        """The choice of a gate that needs all features, computed a block of them at a time."""
        return gate.choose(((part.start, z_bf) for part, z_bf in self.blocks(x_bd)), self.d_sae)

    def encode(self, x_bd: Tensor, buffers: Buffers | None = None) -> Tensor:
        """Feature activations, [..., f]. With `buffers`, of rows [b, d], in memory that the next call overwrites."""
        out = None if buffers is None else buffers.take("acts", (len(x_bd), self.d_sae), self.dtype, x_bd.device)
        if self.features_at_once >= self.d_sae:
            return self.gate(next(self.blocks(x_bd, out))[1])
        if out is None:
            out = x_bd.new_empty((*x_bd.shape[:-1], self.d_sae), dtype=self.dtype)
        if isinstance(self.gate, Choice):
            return out.zero_().scatter_(-1, *self.chosen(x_bd, self.gate))
        for part, z_bf in self.blocks(x_bd):
            out[..., part] = self._gate_of(part)(z_bf)
        return out

    def _gate_of(self, features: slice | Tensor) -> Gate:
        gate = self.gate.of(features)
        assert gate is not None
        return gate

    def encoder(self, x_bd: Tensor, method: Method | Literal["auto"] = "auto", rows: int | None = None) -> Encoder | None:
        """A faster way to the entries of rows such as `x_bd` [b, d], of `rows` in total, for `entries`; None: the float32 product.

        It is valid while the weights do not change. "auto" measures (`sae.encoding.fastest`). Any method other than the product is for
        ReLU, JumpReLU and TopK with float32 weights in memory; `InputError` if one is named and cannot be used.
        """
        whole = self.features_at_once >= self.d_sae and self.W_enc_fd.dtype == torch.float32
        if not whole or type(self.gate) not in (Threshold, TopK):
            if method in ("auto", "product"):
                return None
            what = f"the gate {type(self.gate).__name__}" if whole else f"weights in {self.W_enc_fd.dtype} or on the disk"
            raise InputError(f"expected ReLU, JumpReLU or TopK in float32 for the encoder {method}, got {what}; take auto or product")
        theta_f = getattr(self.gate, "theta_f", None)
        above_f = 0.0 if theta_f is None else theta_f.detach()
        input_bd, W_fd, b_f = self.encoder_input(x_bd), self.W_enc_fd.detach(), self.b_enc_f.detach()
        if method == "auto":
            method = fastest(input_bd, W_fd, b_f, above_f, rows, k=self.gate.k if isinstance(self.gate, TopK) else 0)
        return None if method == "product" else Encoder(method, W_fd, b_f, above_f, like_bd=input_bd)

    def entries(self, x_bd: Tensor, buffers: Buffers, encoder: Encoder | None = None) -> Entries:
        """The activations of rows [b, d] that are not 0, row after row; `encoder`: made by the method of that name.

        The only tensor [b, `features_at_once`] is in the buffers, so pass a chunk of rows at a time.
        """
        if encoder is not None:
            input_bd = self.encoder_input(x_bd)
            if isinstance(self.gate, TopK):
                return top_by(encoder, input_bd, self.gate.k, buffers)
            return encoder.entries(input_bd, buffers)
        if self.features_at_once >= self.d_sae:
            return active_entries(self.encode(x_bd, buffers), 0, buffers)
        if isinstance(self.gate, Choice):
            feature_bk, value_bk = self.chosen(x_bd, self.gate)
            row_n, place_n = value_bk.nonzero(as_tuple=True)
            return Entries(row_n.int(), feature_bk[row_n, place_n].int(), value_bk[row_n, place_n])
        found = []
        for part, z_bf in self.blocks(x_bd):
            row_n, feature_n, value_n = active_entries(self._gate_of(part)(z_bf), 0, buffers)
            found.append(Entries(row_n, feature_n + part.start, value_n))
        row_n, feature_n, value_n = (torch.cat(one) for one in zip(*found))
        order_n = row_n.argsort(stable=True)
        return Entries(row_n[order_n], feature_n[order_n], value_n[order_n])

    def activations(self, x_bd: Tensor, features: Sequence[int] | Tensor) -> Tensor:
        """Activations of the chosen features alone, [..., k]: one row of the encoder each, unless the gate needs all features (TopK)."""
        features = torch.as_tensor(features, dtype=torch.int64, device=self.W_enc_fd.device)
        if not isinstance(self.gate, Choice):
            z_bk = nn.functional.linear(self.encoder_input(x_bd), rows_of(self.W_enc_fd, features), self.b_enc_f[features].to(self.dtype))
            return self._gate_of(features)(z_bk)
        if self.features_at_once >= self.d_sae:
            return self.encode(x_bd)[..., features]
        feature_bk, value_bk = self.chosen(x_bd, self.gate)
        return torch.stack([torch.where(feature_bk == j, value_bk, 0).sum(-1) for j in features.tolist()], dim=-1)  # host sync

    def decode(self, acts_bf: Tensor, x_bd: Tensor | None = None) -> Tensor:
        """The output for these activations, [..., o]; `x_bd`, the encoded input, is needed if `decodes_with_input`."""
        y_bo = self.written(acts_bf) + self.b_dec_o
        return y_bo if not self.decodes_with_input else self.completed(y_bo, x_bd)

    def decode_entries(self, entries: Entries, x_bd: Tensor) -> Tensor:
        """The output for the activations of rows `x_bd` [b, d], as `entries` returns them: `decode` without their zeros."""
        if self.features_at_once < self.d_sae:
            acts_bf = x_bd.new_zeros(len(x_bd), self.d_sae, dtype=self.dtype)
            acts_bf[entries.row_n.long(), entries.feature_n.long()] = entries.value_n
            return self.decode(acts_bf, x_bd)
        y_bo = self.b_dec_o.to(self.dtype).repeat(len(x_bd), 1)
        row_n, feature_n, value_n = entries
        add_weighted_sums(y_bo, rows_of(self.W_dec_fo, slice(0, self.d_sae)), feature_n, starts_of(row_n, len(x_bd)), value_n, False)
        return y_bo if not self.decodes_with_input else self.completed(y_bo, x_bd)

    def written(self, acts_bf: Tensor) -> Tensor:
        """acts W_dec, [..., o]. For weights that are used in blocks, only rows of features that are active somewhere are read."""
        if self.features_at_once >= self.d_sae:
            return acts_bf.to(self.dtype) @ rows_of(self.W_dec_fo, slice(0, self.d_sae))
        y_bo = acts_bf.new_zeros((*acts_bf.shape[:-1], self.d_out), dtype=self.dtype)
        active_n = acts_bf.reshape(-1, self.d_sae).any(0).nonzero()[:, 0]  # host sync
        for features in active_n.split(self.features_at_once):
            y_bo += acts_bf[..., features].to(self.dtype) @ rows_of(self.W_dec_fo, features)
        return y_bo

    @property
    def decodes_with_input(self) -> bool:
        return self.W_skip_od is not None or (self.frame is not None and self.frame.restores)

    def completed(self, y_bo: Tensor, x_bd: Tensor | None) -> Tensor:
        """acts W_dec + b_dec, transformed back from the frame, with the skip added."""
        if x_bd is None:
            raise InputError(
                "expected the tokens that were encoded too, because this dictionary's output depends on them; give decode both"
            )
        x_bd = x_bd.to(y_bo.dtype)
        y_bo = y_bo if self.frame is None else self.frame.leave(y_bo, x_bd)
        if self.W_skip_od is None:
            return y_bo
        return y_bo + nn.functional.pad(x_bd @ self.W_skip_od.T.to(x_bd.dtype), (0, self.d_out - len(self.W_skip_od)))

    def baseline(self, x_bd: Tensor) -> Tensor:
        """The output for these tokens if no feature is active, [..., o]; [o] if that is the same for all."""
        b_dec_o = self.b_dec_o.to(self.dtype)
        return self.completed(b_dec_o, x_bd) if self.decodes_with_input else b_dec_o

    def forward(self, x_bd: Tensor) -> Tensor:
        return self.decode(self.encode(x_bd), x_bd)

    def rows(self, features: Sequence[int] | Tensor) -> Tensor:
        """What one unit of each chosen feature adds at the output site, [k, o]; in a frame, times `unit`."""
        return rows_of(self.W_dec_fo, torch.as_tensor(features, dtype=torch.int64, device=self.W_dec_fo.device))

    def encoder_rows(self, features: Sequence[int] | Tensor) -> Tensor:
        """The encoder row of each chosen feature, [k, d]."""
        return rows_of(self.W_enc_fd, torch.as_tensor(features, dtype=torch.int64, device=self.W_enc_fd.device))

    def unit(self, x_bd: Tensor) -> Tensor | float:
        """The size of one unit of the decoder's output for each token, [..., 1]; 1 without a frame."""
        return 1.0 if self.frame is None or not self.frame.restores else self.frame.enter(x_bd.to(self.dtype)).unit_b1

    def joined(self, values: Mapping[str, Tensor]) -> Tensor:
        """Its input, [..., d], from the values at each of its input sites."""
        sites = [str(port.site) for port in self.reads]
        if len(set(sites)) < len(sites):
            raise InputError(f"the dictionary reads {', '.join(sites)} of several models; give it what they have there, side by side")
        return torch.cat([values[site] for site in sites], dim=-1)

    def split(self, y_bo: Tensor) -> dict[str, Tensor]:
        """Its output, [..., o], by site."""
        parts = y_bo.split([port.width for port in self.writes], dim=-1)
        return {str(port.site): part for port, part in zip(self.writes, parts)}

    def norms(self) -> Tensor:
        """Lengths of the decoder's rows, [f]."""
        return self._of_rows(lambda rows_fo: rows_fo.norm(dim=-1))

    def port_norms(self) -> Tensor:
        """Lengths of the decoder rows' parts at each port, [p, f]: for a crosscoder they show where a feature belongs."""
        return self._of_rows(lambda rows_fo: rows_fo.unflatten(-1, (len(self.writes), -1)).norm(dim=-1)).T

    def _of_rows(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of each of the decoder's rows, computed a block of them at a time."""
        return torch.cat([function(rows_of(self.W_dec_fo, part)) for part in ranges(self.d_sae, self.features_at_once)])

    def require_feature(self, feature: int) -> None:
        """Raises `InputError` for a number that is not a feature."""
        if not 0 <= feature < self.d_sae:
            raise InputError(f"feature {feature} does not exist: the dictionary has features 0 to {self.d_sae - 1}")

    @torch.no_grad()
    def folded(self, scale_in: float | Tensor, scale_out: float | Tensor | None = None) -> "Dictionary":
        """The same function for inputs that are not yet multiplied by `scale_in` and outputs divided by `scale_out` (the same by
        default), with decoder rows of length 1 where the gate allows it. A factor is a number, or [d] or [o], one for each dimension.

        An activation is then the length of its feature's vector, in the model's own units. Exact: a gate that allows it commutes with
        positive factors. In a plain TopK rows keep their lengths, because other lengths would choose other features. Rows of zero length
        are left as they are.
        """
        scale_out = scale_in if scale_out is None else scale_out
        if self.features_at_once < self.d_sae:
            require_room(self.W_enc_fd.nbytes + self.W_dec_fo.nbytes, "a folded dictionary")
        if isinstance(scale_out, Tensor):
            norm_f = self._of_rows(lambda rows_fo: (rows_fo / scale_out).norm(dim=-1))
        else:
            norm_f = self.norms() / scale_out
        norm_f = torch.where(norm_f > 0, norm_f, torch.ones_like(norm_f))
        gate = self.gate.scaled(norm_f)
        if gate is None:
            gate, norm_f = self.gate, torch.ones_like(norm_f)
        W_enc_fd, W_dec_fo = torch.empty_like(self.W_enc_fd), torch.empty_like(self.W_dec_fo)
        for part in ranges(self.d_sae, self.features_at_once):
            W_enc_fd[part] = rows_of(self.W_enc_fd, part) * (scale_in * norm_f[part, None])
            W_dec_fo[part] = rows_of(self.W_dec_fo, part) / (scale_out * norm_f[part, None])
        return Dictionary(
            W_enc_fd,
            (self.b_enc_f * norm_f).to(self.b_enc_f.dtype),
            W_dec_fo,
            self.b_dec_o / scale_out,
            gate=gate,
            b_in_d=None if self.b_in_d is None else self.b_in_d / scale_in,
            W_skip_od=None if self.W_skip_od is None else self.W_skip_od * scale_in / torch.as_tensor(scale_out).unsqueeze(-1),
            frame=self.frame,
            metadata=self.metadata,
        ).requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Writes the folder that SAELens' `SAE.load_from_disk` opens; each file is written completely or not at all."""
        save(self.parts(), Path(folder))

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> "Dictionary":
        """Reads a folder or file of any of the formats, or a name on the hub (see source.py).

        Raises `InputError` for anything else, and for a set of dictionaries.
        """
        parts = read(source, device)
        if not isinstance(parts, Parts):
            one = f"{str(source).rstrip('/')}/layer_{next(iter(parts))}"
            raise InputError(f"{source} is a set of {len(parts)} dictionaries, one for each layer; choose one, such as {one}")
        return cls.of(parts)

    @classmethod
    def of(cls, parts: Parts) -> "Dictionary":
        return cls(**parts._asdict()).requires_grad_(False)
