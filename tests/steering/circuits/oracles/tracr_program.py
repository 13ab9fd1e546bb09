"""The weights that Tracr compiles from a program of ours: after a token, what followed it where it stood before (induction).

In its own environment (`pip install tracr-pypi==1.0.0 safetensors`), from the project's folder:
python tests/steering/circuits/oracles/tracr_program.py
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tracr.compiler import compiling
from tracr.rasp import rasp

DATA = Path(__file__).parents[1] / "data"
VOCABULARY, LONGEST = tuple("abcdefgh"), 8

before = rasp.Select(rasp.indices, rasp.indices, lambda k, q: k == q - 1).named("before")
previous = rasp.Aggregate(before, rasp.tokens).named("previous")
same = rasp.Select(previous, rasp.tokens, rasp.Comparison.EQ).named("same")
program = rasp.Aggregate(same, rasp.tokens).named("induction")

compiled = compiling.compile_rasp_to_model(program, set(VOCABULARY), LONGEST, causal=True, compiler_bos="BOS")
tensors = {f"{module}/{name}": np.asarray(value, np.float32) for module, own in compiled.params.items() for name, value in own.items()}
encoding = compiled.input_encoder.encoding_map
config = compiled.model_config
about = {
    "labels": [str(label) for label in compiled.residual_labels],
    "tokens": {str(token): int(number) for token, number in encoding.items()},
    "outputs": {str(value): int(number) for value, number in compiled.output_encoder.encoding_map.items()},
    "n_heads": config.num_heads,
    "n_layers": config.num_layers,
    "key_size": config.key_size,
    "mlp_hidden_size": config.mlp_hidden_size,
}
save_file(tensors, DATA / "tracr_induction.safetensors", metadata={"about": json.dumps(about)})
print(about)
for name, value in tensors.items():
    print(name, value.shape)
print(compiled.apply(["BOS", "a", "b", "c", "a"]).decoded)
