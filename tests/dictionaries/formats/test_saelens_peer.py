"""A saved dictionary opens in SAELens itself and computes the same there (run `make bench-peers` first)."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.dictionaries.dictionary import Dictionary

PEERS = Path(__file__).resolve().parents[3] / ".peers" / "bin" / "python"

READ = """
import sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1], device="cpu")
x = load_file(sys.argv[2])["x"]
acts = sae.encode(x)
save_file({"acts": acts.contiguous(), "x_hat": sae.decode(acts).contiguous()}, sys.argv[3])
print(sae.cfg.architecture(), sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name)
"""

WRITE = """
import sys
import torch
from safetensors.torch import save_file
from sae_lens import StandardSAE, StandardSAEConfig
torch.manual_seed(0)
cfg = StandardSAEConfig(d_in=12, d_sae=30, apply_b_dec_to_input=sys.argv[3] == "True")
sae = StandardSAE(cfg)
for p in sae.parameters():
    p.data = torch.randn_like(p) / 3
sae.save_model(sys.argv[1])
x = torch.randn(50, 12)
acts = sae.encode(x)
save_file({"x": x, "acts": acts.detach(), "x_hat": sae.decode(acts).detach()}, sys.argv[2])
"""

pytestmark = [pytest.mark.peers, pytest.mark.timeout(240)]


def peers_run(code: str, *arguments: object) -> str:
    if not PEERS.exists():
        pytest.skip("no environment .peers with SAELens; make bench-peers creates it")
    result = subprocess.run([PEERS, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_saelens_opens_and_computes_what_we_saved(tmp_path):
    g = torch.Generator().manual_seed(0)
    W_enc_fd, W_dec_fd = torch.randn(2, 64, 24, generator=g)
    b_enc_f, b_dec_d = torch.randn(64, generator=g), torch.randn(24, generator=g)
    metadata = {"model_name": "some/model", "site": "resid_post.2", "context_size": 128, "prepend_bos": True}
    ours = Dictionary.autoencoder(W_enc_fd, b_enc_f, W_dec_fd, b_dec_d, metadata).requires_grad_(False)
    ours.save(tmp_path / "sae")
    x = torch.randn(200, 24, generator=g) * 3
    save_file({"x": x}, tmp_path / "x.safetensors")
    said = peers_run(READ, tmp_path / "sae", tmp_path / "x.safetensors", tmp_path / "out.safetensors")
    theirs = load_file(tmp_path / "out.safetensors")
    acts = ours.encode(x)
    torch.testing.assert_close(theirs["acts"], acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["x_hat"], ours.decode(acts), rtol=1e-5, atol=1e-4)  # sums of about 30 terms of size 10
    assert said.split()[-3:] == ["standard", "blocks.2.hook_resid_post", "some/model"]


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_we_open_and_compute_what_saelens_saved(tmp_path, apply_b_dec_to_input):
    peers_run(WRITE, tmp_path / "sae", tmp_path / "values.safetensors", apply_b_dec_to_input)
    ours = Dictionary.load(tmp_path / "sae")
    values = load_file(tmp_path / "values.safetensors")
    torch.testing.assert_close(ours.encode(values["x"]), values["acts"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(values["acts"]), values["x_hat"], rtol=1e-5, atol=1e-5)
