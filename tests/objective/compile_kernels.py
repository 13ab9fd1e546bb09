"""Compiles every kernel ahead of time for two compute capabilities; run by test_cuda.py in a process without the interpreter."""

import inspect

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from sae.objective import cuda

COUNTS = ("B", "F", "D", "CAPACITY")
INTEGERS = ("active", "column", "count", "place", "overflow", "overflows", "start", "entry_row", "fired", "bad")
OPERANDS = {"encode": ("x", "W_enc"), "decode": ("xc", "W_enc"), "learn": ("xc",), "scatter": ()}


def kind(kernel: str, name: str, operand: str) -> str:
    if name in COUNTS:
        return "i32"
    if not name.endswith("_ptr"):
        return "fp32"
    name = name.removesuffix("_ptr")
    return "*i32" if name in INTEGERS else f"*{operand}" if name in OPERANDS[kernel] else "*fp32"


def compiled(function, constants: dict, operand: str, capability: int, **options) -> None:
    names = list(inspect.signature(function.fn).parameters)
    signature = {n: "constexpr" if n in constants else kind(function.fn.__name__, n, operand) for n in names}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()})
    kernel = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    double = "in double precision" if ".f64" in kernel.asm["ptx"] else ""
    print(function.fn.__name__, constants, capability, "cubin" if kernel.asm["cubin"] else "", double)


for capability, operand, precision, width in ((80, "bf16", "ieee", 64), (90, "fp32", "tf32", 4096)):
    blocks = {"BLOCK_B": 64, "BLOCK_F": 64, "BLOCK_D": 32}
    compiled(cuda.encode.fn, {"PRECISION": precision, **blocks}, operand, capability, num_warps=4, num_stages=3)
    sizes = {"BLOCK_N": 2, "BLOCK_D": width}
    compiled(cuda.decode, sizes, operand, capability, num_warps=4)
    for adam in (False, True):
        compiled(cuda.learn, {"ADAM": adam, "GROUP": 8, **sizes}, operand, capability, num_warps=4)
    compiled(cuda.scatter, {"BLOCK_N": 64}, "fp32", capability, num_warps=4)
