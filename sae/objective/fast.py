"""The exact gradient by hand, at little more than the cost of the encoder product once the code is sparse; for every kind with a rule.

b rows (tokens) · d width that is read · o width that is written · f features · n active entries

With z = x W_encᵀ + b_enc (x centred by b_dec in an autoencoder), acts = z where the rule says active, g = 2(ŷ − y)/B and
a_bf = g_b·W_dec_f + (slope/B)‖W_dec_f‖ on active entries, slope being the price's (l1 for ReLU + L1):

    dW_dec_f = Σ_b acts_bf g_b + (Σ_b slope_bf |acts_bf|/B) W_dec_f/‖W_dec_f‖      dW_enc_f = Σ_b a_bf x_b
    db_enc_f = Σ_b a_bf                             db_dec   = Σ_b g_b − Σ_f db_enc_f W_enc_f (an autoencoder's)

Rows are taken a chunk at a time, so that no [b, f] tensor is larger than a chunk, and the chunk's buffers are reused from step to
step (new ones cost page faults). From a chunk whose code is sparse only the active entries are kept, and those of all rows are then
processed together (sparse.py), so that no gradient is visited twice; a dense chunk, as early in training, uses matrix
products. Rules that keep the k largest are always sparse. If the workspace names an encoder of sae/encoding, it finds the entries of a
sparse chunk. Other experiments, with numbers: benchmarks/cpu_experiments.md.

Processes that share the features (sae/mesh.py) add up their parts of ŷ and of the last sum above. All take one path, so that they send
messages at the same points.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sae.encoding import Encoder
from sae.entries import Entries, active_entries, entries_above, joined
from sae.objective.choice import LOWER, SAMPLE, above_in, above_of, first_guess, first_of_rows, top_of_batch, top_of_rows
from sae.objective.gated import add_dense_gated_rows, add_sparse_gated_rows
from sae.objective.rule import Linear, Rule
from sae.objective.sparse import Sums, add_dead_features, add_sparse_rows
from sae.objective.step import Own, Step, Weights
from sae.objective.workspace import Workspace

CHUNK_BYTES = 128 << 20
"""size of one [chunk, f] buffer, of which the dense path holds two; eight times that on CUDA; half of it makes the product slower"""
SPARSE_BELOW = 1 / 8
"""share of active entries below which the sparse path is faster (measured on two CPU cores, d_in 256 to 512)"""
HELD_ENTRIES = 2 << 20
"""number of active entries at which the sparse path stops waiting for more rows; each takes about 70 bytes"""
SCREENED_BELOW = 1 / 32
"""share of active entries below which an encoder of sae/encoding is used: a single value costs about twenty times its share of a product"""
SCREENED_SAMPLE = 256
"""that share is estimated from one row of this many"""
SCREENED_FEATURES = 8
"""and for the k largest of rows from one feature of this many"""


def fast_step(
    x_bd: Tensor,
    y_bo: Tensor | None,
    weights: Weights,
    own: Own,
    rule: Rule,
    path: str,
    workspace: Workspace,
    gradients: Weights,
    own_gradients: Own,
    name: str = "",
) -> Step:
    """`path`: "dense", "sparse", or "auto", which chooses by the share of active entries of each chunk of rows.

    Overwrites `gradients` and `own_gradients`. "dense" has no host sync, and is for rules that keep everything above a threshold. `name` is
    the dictionary's name in the workspace, where guesses for the next step are kept.
    """
    sums = Sums(x_bd, y_bo, weights, own, rule, workspace, gradients, own_gradients)
    if rule.top:
        threshold = add_chosen(sums, name)
        sparse_rows = len(x_bd)
    else:
        threshold, sparse_rows = 0.0, add_all_above(sums, path)
    if rule.aid is not None:
        add_dead_features(sums, rule.aid)
    return sums.step(sparse_rows / len(x_bd), threshold)


def chunks(sums: Sums) -> Iterator[slice]:
    rows, size = len(sums.input_bd), len(sums.weights.b_enc_f) * sums.input_bd.element_size()
    chunk = max(1, CHUNK_BYTES * (8 if sums.input_bd.is_cuda else 1) // size)
    return (slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk))


def pre_activations(sums: Sums, rows: slice) -> Tensor:
    """z of some rows, in memory that the next call overwrites."""
    input_bd, weights = sums.input_bd[rows], sums.weights
    z_bf = sums.workspace.take("acts", (len(input_bd), len(weights.b_enc_f)), input_bd.dtype, input_bd.device)
    return torch.addmm(weights.b_enc_f, input_bd, weights.W_enc_fd.T, out=z_bf)


def encoder_of(sums: Sums, some: slice = slice(None)) -> Encoder:
    """The workspace's encoder for the weights of this step, or for some features."""
    method, weights, rule = sums.workspace.encoder, sums.weights, sums.rule
    like_bd = sums.input_bd if method == "int8" else None  # bfloat16 loses less by huge dimensions than the frame costs at every step
    low = 0.0 if rule.jump is None else sums.low_f
    return Encoder(method, weights.W_enc_fd[some], weights.b_enc_f[some], low, like_bd=like_bd, buffers=sums.workspace)


def add_chosen(sums: Sums, name: str) -> float:
    """A step that keeps the k largest entries of rows or of the batch; returns the smallest one of the batch."""
    rule, workspace = sums.rule, sums.workspace
    mesh, rows = workspace.mesh, len(sums.input_bd)
    share = rule.top / (len(sums.weights.b_enc_f) * mesh.features.size)
    screens = workspace.encoder != "product" and share < SCREENED_BELOW and (rule.over == "batch" or few_candidates(sums))
    encoder = encoder_of(sums) if screens else None
    if rule.over == "batch":
        guesses = workspace.guesses
        if name not in guesses:
            guess = first_guess(pre_activations(sums, slice(None, None, max(1, rows // SAMPLE))), share)
            guesses[name] = sum(mesh.every.numbers(guess)) / mesh.every.size

        def above_all(low: float) -> Entries:
            if encoder is not None:
                return encoder.entries(sums.input_bd, workspace, floor=low)
            return joined([entries_above(pre_activations(sums, part), low, part.start, workspace) for part in chunks(sums)])

        entries, threshold = top_of_batch(above_all, sums.rows * rule.top, guesses[name], rows, mesh)
        guesses[name] = threshold
        add_sparse_rows(sums, slice(0, rows), [entries])
        return threshold
    length_b, lines = sums.input_bd.norm(dim=1), workspace.lines
    if name not in lines:
        some = slice(None, None, max(1, rows // SAMPLE))
        sample_bf = pre_activations(sums, some)
        lines[name] = first_of_rows(sample_bf.abs() if rule.signed else sample_bf, rule.top, length_b[some])
    found: list[Entries] = []
    for part in chunks(sums):
        if encoder is not None:
            above = above_of(encoder, sums.input_bd[part], workspace)
        else:
            size_bf = z_bf = pre_activations(sums, part)
            if rule.signed:
                size_bf = torch.abs(z_bf, out=workspace.take("sizes", tuple(z_bf.shape), z_bf.dtype, z_bf.device))
            above = above_in(size_bf, workspace)
        entries, lines[name] = top_of_rows(above, length_b[part], rule.top, lines[name], mesh.features)
        if rule.signed:
            entries = entries._replace(value_n=z_bf[entries.row_n.long(), entries.feature_n.long()])
        found.append(entries._replace(row_n=entries.row_n + part.start))
    add_sparse_rows(sums, slice(0, rows), found)
    return 0.0


def add_all_above(sums: Sums, path: str) -> int:
    """A step that keeps all entries above a threshold; returns the number of rows that used the sparse path."""
    rule, workspace, axis = sums.rule, sums.workspace, sums.workspace.mesh.features
    rows, jump = len(sums.input_bd), rule.jump
    gated = rule.magnitude is not None
    add_dense, add_sparse = (add_dense_gated_rows, add_sparse_gated_rows) if gated else (add_dense_rows, add_sparse_rows)
    sparse_rows = 0
    entries: list[Entries] = []  # of the rows since `first`, which are still to go through the sparse path
    first = 0
    encoder: Encoder | None = None
    for part in chunks(sums):
        here = part.start - first
        sparse = screened = workspace.encoder != "product" and path != "dense" and few_active(sums, part)
        if screened:
            encoder = encoder or encoder_of(sums)
            entries.append(encoder.entries(sums.input_bd[part], workspace, here))
        else:
            acts = pre_activations(sums, part)
            if jump is None:
                acts.relu_()
            sparse = path == "sparse"
            if path == "auto":
                sample = acts[::64]  # counting every entry would be a pass of its own
                active = torch.count_nonzero(sample if jump is None else sample > sums.low_f)
                sparse = axis.total(int(active)) < SPARSE_BELOW * sample.numel() * axis.size  # host sync
            if sparse:
                listed = active_entries(acts, here, workspace) if jump is None else entries_above(acts, sums.low_f, here, workspace)
                entries.append(listed)
        if sparse:
            sparse_rows += part.stop - part.start
        held = axis.total(sum(len(e[0]) for e in entries)) if sparse else 0
        if entries and (not sparse or part.stop == rows or held >= HELD_ENTRIES * axis.size):
            add_sparse(sums, slice(first, part.stop if sparse else part.start), entries)
            entries = []
        if not sparse:
            add_dense(sums, part, acts)
        if not entries:
            first = part.stop
    return sparse_rows


def few_active(sums: Sums, part: slice) -> bool:
    """Whether the code of these rows is sparse enough for the workspace's encoder, by float32 products of a sample of them."""
    z_bf = pre_activations(sums, slice(part.start, part.stop, SCREENED_SAMPLE))
    low = 0.0 if sums.rule.jump is None else sums.low_f
    axis = sums.workspace.mesh.features
    return axis.total(int(torch.count_nonzero(z_bf > low))) < SCREENED_BELOW * z_bf.numel() * axis.size  # host sync


def few_candidates(sums: Sums) -> bool:
    """Whether bounds leave few enough of this process's entries near the k largest of a row, by a sample of rows and features.

    It depends only on weights and batch, not on guesses from earlier ones, so that a resumed run decides as an uninterrupted one.
    """
    encoder, some_bd = encoder_of(sums, slice(None, None, SCREENED_FEATURES)), sums.input_bd[::SCREENED_SAMPLE]
    z_bf = torch.addmm(encoder.b_f, some_bd, encoder.W_fd.T)
    floor_b = z_bf.topk(min(-(-sums.rule.top // SCREENED_FEATURES), z_bf.shape[1])).values[:, -1].clamp(min=0) * LOWER[1]
    return encoder.candidates(some_bd, sums.workspace, floor_b) < SCREENED_BELOW * z_bf.numel()


def add_dense_rows(sums: Sums, part: slice, acts: Tensor) -> None:
    """Adds a chunk's gradients, firing counts and activity; overwrites `acts` (for kinds with thresholds: pre-activations)."""
    weights, rule, workspace, gradients = sums.weights, sums.rule, sums.workspace, sums.gradients
    rows, beta = sums.rows, 0 if sums.fresh else 1
    axis, input_bd = workspace.mesh.features, sums.input_bd[part]
    near = None
    if rule.jump is not None:
        near = (acts - rule.jump.theta_f).abs_() < rule.jump.window / 2
        acts.masked_fill_(acts <= rule.jump.theta_f, 0)
    error = axis.sum_(torch.addmm(axis.leave_to_first_(sums.base(part)), acts, weights.W_dec_fd))
    g = error * (2 / rows)
    gradients.W_dec_fd.addmm_(acts.T, g, beta=beta)
    sums.add_of_rows(part, g)
    sums.activity_f.add_(acts.sum(0))
    a = workspace.take("a", tuple(acts.shape), acts.dtype, acts.device)
    if rule.price is None or isinstance(rule.price, Linear):
        torch.addmm(sums.norm_f * (sums.l1 / rows), g, weights.W_dec_fd.T, out=a)
    else:
        torch.mm(g, weights.W_dec_fd.T, out=a)
        v_bf = acts * sums.norm_f
        slope_bf = rule.price.slope(v_bf)
        sums.cost += rule.price.cost(v_bf).sum()
        sums.pull_f.add_((slope_bf * acts).sum(0))
        a.addcmul_(slope_bf, sums.norm_f, value=1 / rows)
    if near is not None:
        sums.near_f += near.sum(0)
        sums.near_pull_f += torch.where(near, a, 0).sum(0)
    torch.ops.aten.threshold_backward.grad_input(a, acts, 0, grad_input=a)  # a where acts > 0, in one pass
    sums.fired_f.add_(positive_counts(acts, workspace))
    gradients.W_enc_fd.addmm_(a.T, input_bd, beta=beta)
    gradients.b_enc_f.add_(a.sum(0))
    sums.squared_error += error.square().sum()
    sums.fresh = False


def positive_counts(acts: Tensor, workspace: Workspace) -> Tensor:
    """How many rows of each column are above zero, [f] int64.

    Torch widens every byte before it sums; here eight are summed in one 64-bit word, over too few rows for a byte to overflow.
    """
    rows, f = acts.shape
    wide = -(-f // 8) * 8
    mask = workspace.take("positive", (rows, wide), torch.bool, acts.device)
    mask[:, f:] = False
    torch.gt(acts, 0, out=mask[:, :f])
    words = mask.view(torch.int64)
    bytes_of = torch.stack([part.sum(0) for part in words.split(255)]).view(torch.uint8)
    return bytes_of.sum(0, dtype=torch.int64)[:f]
