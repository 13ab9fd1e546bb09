"""The Triton kernels: on a CPU in Triton's interpreter, on a CUDA device for real, and compiled for one that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from test_objective import assert_applied_as_by_hand, assert_equals_formula, formula, random_problem

from sae.errors import InputError
from sae.objective import Adam, Weights, Workspace, cuda, objective
from sae.objective.step import TENSORS
from sae.objective.update import AdamState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    cuda.encode.configs = cuda.BLOCKS[-1:]  # the others have their own test; tuning again for every small shape would take minutes


def on_device(x_bd, weights):
    return x_bd.to(DEVICE), Weights(*(w.to(DEVICE) for w in weights))


def triton_step(x_bd, weights, l1, **workspace):
    """A step there; the result here."""
    x_there, weights_there = on_device(x_bd, weights)
    step = objective(x_there, weights_there, l1, "triton", Workspace(**workspace))
    return step._replace(
        **{name: getattr(step, name).cpu() for name in TENSORS},
        gradients=Weights(*(g.cpu() for g in step.gradients)),
    )


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 20),
    d=st.integers(1, 40),
    f=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.02, 0.2, 1.0]),
    capacity=st.sampled_from([1, 4, 64]),
    deterministic=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_equals_float64_autograd_for_any_shape_density_and_capacity(rows, d, f, density, capacity, deterministic, seed):
    """Shapes that no block divides, and lists that overflow."""
    x_bd, weights = random_problem(rows, d, f, density, seed)
    z_bf = (x_bd.double() - weights.b_dec_d) @ weights.W_enc_fd.double().T + weights.b_enc_f
    if z_bf.abs().min() > 1e-5:  # nearer to zero than rounding, an entry may be active in one order of summation only
        step = triton_step(x_bd, weights, 0.7, capacity=capacity, deterministic=deterministic)
        assert_equals_formula(step, x_bd, weights, 0.7, 2e-3 if density == 1 else 1e-4)


@pytest.mark.parametrize(("capacity", "share"), [(64, 1.0), (3, 0.0)])
def test_single_precision_is_exact_to_rounding_through_lists_and_overflow(capacity, share):
    x_bd, weights = random_problem(40, 20, 60, 0.2, 9)
    step = triton_step(x_bd, weights, 3.0, capacity=capacity)
    assert step.sparse_share == share
    assert_equals_formula(step, x_bd, weights, 3.0)


def test_one_feature_firing_for_all_rows():
    x_bd, weights = random_problem(33, 8, 20, 0.0, 0)
    weights.b_enc_f[3] = 7.0
    weights.W_enc_fd[3] = 0.01
    step = triton_step(x_bd, weights, 2.0)
    assert step.fired_f.tolist() == [33 if j == 3 else 0 for j in range(20)]
    assert_equals_formula(step, x_bd, weights, 2.0)


def test_bfloat16_operands_stay_near_the_exact_gradient_under_a_large_mean():
    """Two decimal digits of operands; centring happens before rounding, so a mean fifty times the spread costs nothing."""
    x_bd, weights = random_problem(40, 20, 60, 0.2, 9)
    x_bd, shifted = x_bd + 50, weights._replace(b_dec_d=weights.b_dec_d + 50)
    loss, *_, gradients = formula(x_bd, shifted, 3.0)
    step = triton_step(x_bd, shifted, 3.0, precision="bfloat16")
    assert float(step.loss) == pytest.approx(float(loss.detach()), rel=2e-3)
    for ours, theirs in zip(step.gradients, gradients):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


def test_a_sweep_equals_its_dictionaries_one_by_one():
    problems = [random_problem(30, 8, 40, density, seed) for density, seed in ((0.1, 1), (0.6, 2), (0.0, 3))]
    x_bd, swept = problems[0][0], Weights(*map(torch.stack, zip(*(weights for _, weights in problems))))
    step = triton_step(x_bd, swept, torch.tensor([0.5, 2.0, 7.0], device=DEVICE), capacity=8)
    for k, l1 in enumerate((0.5, 2.0, 7.0)):
        assert_equals_formula(step.of(k), x_bd, swept.of(k), l1)


@pytest.mark.skipif(DEVICE == "cuda", reason="weights of the shared helper are on the CPU")
@pytest.mark.parametrize("largest_norm", [0.0, 0.5])
def test_an_applied_step_is_adam_on_the_exact_gradient(largest_norm):
    """In the kernel without clipping, by torch with it."""
    assert_applied_as_by_hand("triton", largest_norm, Workspace(capacity=16))


def test_a_row_that_is_not_finite_leaves_weights_and_moments_alone_and_is_noted():
    x_bd, weights = random_problem(9, 8, 12, 0.5, 7)
    x_bd, weights = on_device(x_bd, weights)
    adam, workspace = Adam(weights), Workspace()
    objective(x_bd, weights, 1.0, "triton", workspace, adam)
    before = [w.clone() for w in weights] + [tensor.clone() for tensor in (*adam.exp_avg, *adam.exp_avg_sq, *adam.steps)]
    bad = x_bd.clone()
    bad[4, 2] = float("nan")
    # not through `objective`, which asks before the step where that is free: on a CPU
    cuda.triton_step(bad, weights.stacked(), torch.ones(1, device=DEVICE), workspace, AdamState.of(adam, weights).stacked())
    after = [*weights, *adam.exp_avg, *adam.exp_avg_sq, *adam.steps]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert int(workspace.bad_steps) == 1
    assert workspace.bad_rows_b.nonzero().flatten().tolist() == [4]


def test_deterministic_steps_are_equal_bit_for_bit():
    x_bd, weights = random_problem(40, 20, 60, 0.2, 9)
    first, second = (triton_step(x_bd, weights, 3.0, capacity=8) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.gradients, second.gradients))
    assert torch.equal(first.loss, second.loss)


def test_eight_steps_follow_the_dense_path():
    curves = {}
    for path in ("dense", "triton"):
        generator = torch.Generator().manual_seed(0)
        _, weights = random_problem(4, 8, 30, 0.3, 8)
        weights = Weights(*(w.to(DEVICE) for w in weights))
        adam, workspace = Adam(weights, 1e-2), Workspace()
        batches = [torch.randn(24, 8, generator=generator).to(DEVICE) for _ in range(8)]
        curves[path] = [float(objective(x_bd, weights, 1.0, path, workspace, adam).loss) for x_bd in batches]
    assert curves["triton"] == pytest.approx(curves["dense"], rel=1e-4)


def test_without_cuda_or_interpreter_the_backend_is_refused_in_a_sentence():
    if DEVICE == "cuda":
        pytest.skip("there is a CUDA device")
    code = (
        "import torch\nfrom sae.errors import InputError\nfrom sae.objective import Weights, objective\n"
        "w = Weights(torch.ones(4, 3), torch.ones(4), torch.ones(4, 3), torch.ones(3))\n"
        "try:\n    objective(torch.ones(2, 3), w, 1.0, 'triton')\nexcept InputError as error:\n    print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "the triton backend cannot run: it needs a CUDA device, and the batch is on cpu" in done.stdout


def test_the_kernels_compile_for_gpus_that_are_not_there(tmp_path):
    """What the interpreter cannot show: types, layouts and shared memory of the real compiler, for compute capability 8.0 and 9.0."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("cubin") == 2 * 5
    assert "double" not in done.stdout, "a constant too small for float32 makes all that it meets a double"


@pytest.mark.parametrize("block", cuda.BLOCKS, ids=str)
def test_every_block_shape_is_right(block, monkeypatch):
    """On a GPU the fastest is taken, so any of them may be."""
    monkeypatch.setattr(cuda.encode, "configs", [block])
    x_bd, weights = random_problem(150, 70, 150, 0.02, 4)
    assert_equals_formula(triton_step(x_bd, weights, 3.0, capacity=16), x_bd, weights, 3.0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_entries_left_by_another_block_shape_count_for_nothing(deterministic, monkeypatch):
    """While shapes are tried out at the first step, rounding may give one of them an entry more than the one that is then taken."""
    kernel = cuda.encode

    class Tried:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                kernel[grid](*args, **kwargs)
                active_kb, column_kbc, value_kbc = args[3:6]
                at = active_kb.long().clamp(max=column_kbc.shape[-1] - 1)[..., None]
                column_kbc.scatter_(-1, at, 2)
                value_kbc.scatter_(-1, at, 5.0)

            return launch

    x_bd, weights = random_problem(40, 20, 60, 0.2, 9)
    monkeypatch.setattr(cuda, "encode", Tried())
    assert_equals_formula(triton_step(x_bd, weights, 3.0, capacity=64, deterministic=deterministic), x_bd, weights, 3.0)


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("deterministic", [False, True])
def test_no_host_sync_inside_a_step(deterministic):
    x_bd, weights = on_device(*random_problem(256, 64, 512, 0.02, 9))
    adam, workspace = Adam(weights), Workspace("tf32", deterministic)
    objective(x_bd, weights, 1.0, "triton", workspace, adam)  # compiles and tunes
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            objective(x_bd, weights, 1.0, "triton", workspace, adam)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_cuda_graph_of_a_step_equals_the_step():
    results = []
    for captured in (False, True):
        x_bd, weights = on_device(*random_problem(256, 64, 512, 0.02, 9))
        lr = torch.tensor(1e-3, device=DEVICE)
        adam, workspace = Adam(weights, lr), Workspace("tf32")
        for _ in range(3):
            objective(x_bd, weights, 1.0, "triton", workspace, adam)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                objective(x_bd, weights, 1.0, "triton", workspace, adam)
            graph.replay()
        else:
            objective(x_bd, weights, 1.0, "triton", workspace, adam)
        torch.cuda.synchronize()
        results.append([w.clone() for w in weights])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_cpu_batch_for_weights_elsewhere_is_refused():
    x_bd, weights = random_problem(4, 8, 12, 0.5, 7)
    elsewhere = Weights(*(w.to("meta") for w in weights))
    with pytest.raises(InputError, match="expected the batch on the weights' device, meta, got one on cpu"):
        objective(x_bd, elsewhere, 1.0)


def test_an_old_gpu_is_told_once_and_in_one_line(monkeypatch, capsys):
    """The device here cannot be an old one, so torch is made to say it is."""
    from sae.objective import why_no_triton

    monkeypatch.setattr(cuda, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    why_no_triton.cache_clear()
    try:
        for _ in range(3):
            assert why_no_triton(torch.device("cuda")) == "it needs compute capability 8.0, and an old one is older"
    finally:
        why_no_triton.cache_clear()
    assert capsys.readouterr().err.count("\n") == 1
