"""Cutting documents into sequences, and the plan of pools and batches, against brute force."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.activations.harvest.plan import Masks, padding, plan_batches, plan_pools
from sae.activations.text.documents import Document
from sae.activations.text.tokens import Cutter, Tokens, is_held_out, tokenise
from sae.errors import InputError

BOS = 99
DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=12)


def cut(contents, bos_id=BOS, context=7, budget=10**9, part_tokens=20, held_out=0.3) -> tuple[Cutter, Tokens | None]:
    cutter = Cutter(context, budget, bos_id, seed=0, held_out=held_out, part_tokens=part_tokens)
    parts = list(cutter.parts((np.asarray(ids, dtype=np.int32), str(len(ids) % 3)) for ids in contents))
    return cutter, Tokens.join(parts, cutter.label_names) if parts else None


@settings(max_examples=100, deadline=None)
@given(DOCUMENTS, st.sampled_from([BOS, None]), st.integers(2, 9), st.integers(2, 200), st.integers(1, 50))
def test_sequences_hold_the_documents_up_to_the_budget(contents, bos_id, context, budget, part_tokens):
    cutter, tokens = cut(contents, bos_id, context, budget, part_tokens)
    used = [ids for ids in contents if ids]
    if tokens is None:
        assert not used or budget < 2
        return
    starts = tokens.sequence_starts
    sequences = [tokens.ids[a:b].tolist() for a, b in pairwise(starts)]
    assert all(1 + (bos_id is not None) <= len(s) <= context for s in sequences)
    assert all(s[0] == BOS for s in sequences) or bos_id is None
    lead = bos_id is not None
    rebuilt = [[] for _ in range(cutter.documents)]
    for sequence, document in zip(sequences, tokens.sequence_document):
        rebuilt[document] += sequence[lead:]
    assert rebuilt[:-1] == used[: len(rebuilt) - 1]  # all but the last are whole
    assert rebuilt[-1] == used[len(rebuilt) - 1][: len(rebuilt[-1])]
    assert len(tokens.ids) == cutter.tokens <= budget
    if rebuilt != used:  # text was left over, so the budget is used up but for a lone beginning
        assert cutter.tokens >= budget - 1
    assert [tokens.label_names[i] for i in tokens.document_label] == [str(len(ids) % 3) for ids in used[: cutter.documents]]
    assert tokens.sequence_split.tolist() == [is_held_out(int(d), 0, 0.3) for d in tokens.sequence_document]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from([BOS, BOS, 1, 2]), max_size=20), max_size=6), st.integers(2, 7))
def test_documents_that_bring_their_own_beginning_get_no_second_one(contents, context):
    stripped = [ids[next((i for i, x in enumerate(ids) if x != BOS), len(ids)) :] for ids in contents]
    found = list(tokenise((Document(np.array(ids, np.int32), None) for ids in contents), None, 100, BOS))
    assert [ids.tolist() for ids, _ in found] == stripped
    cutter = Cutter(context, 10**9, BOS, seed=0, held_out=0)
    parts = list(cutter.parts(found))
    if not parts:
        assert not any(stripped)
        return
    starts, ids = parts[0].sequence_starts, parts[0].ids
    for document, own in enumerate(ids for ids in stripped if ids):
        at = 0
        for s in np.flatnonzero(parts[0].sequence_document == document):
            sequence = ids[starts[s] : starts[s + 1]].tolist()
            brought = own[at] == BOS  # further on in the document, where a piece happens to begin
            assert sequence == [BOS] * (not brought) + own[at : at + context - 1]
            at += context - 1
        assert at >= len(own)


def test_the_documents_that_brought_their_beginning_are_counted(capsys):
    contents = [[BOS, 1], [2], [BOS, BOS, 3]]
    list(tokenise((Document(np.array(ids, np.int32), None) for ids in contents), None, 100, BOS))
    assert capsys.readouterr().err.startswith("2 documents already began with a beginning-of-text token")
    list(tokenise((Document(np.array(ids, np.int32), None) for ids in contents), None, 100, None))
    assert capsys.readouterr().err == ""


def test_labels_cost_the_same_however_many_there_are():
    class Label(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other):
            Label.compared += 1
            return str.__eq__(self, other)

    n = 3000
    cutter = Cutter(4, 10**9, None, seed=0, held_out=0)
    (part,) = cutter.parts((np.array([1], np.int32), Label(i % n)) for i in range(2 * n))
    assert cutter.label_names == [str(i) for i in range(n)]
    assert part.document_label.tolist() == [*range(n)] * 2
    assert Label.compared < 10 * n  # a search through the names would take n * n


def test_about_the_share_asked_for_is_held_out_and_never_the_first():
    chosen = [is_held_out(n, seed=3, fraction=0.05) for n in range(20_000)]
    assert 0.04 < np.mean(chosen) < 0.06
    assert not any(is_held_out(0, seed, 0.999) for seed in range(20))


def test_windows_never_leave_their_sequence():
    _, tokens = cut([list(range(10)), [5, 5, 5]], context=6)
    assert tokens.ids.tolist() == [99, 0, 1, 2, 3, 4, 99, 5, 6, 7, 8, 9, 99, 5, 5, 5]
    for position in range(len(tokens.ids)):
        ids, offset = tokens.window(position, 2, 1)
        sequence = next(range(a, b) for a, b in pairwise(tokens.sequence_starts) if a <= position < b)
        expected = [p for p in range(position - 2, position + 2) if p in sequence]
        assert ids.tolist() == tokens.ids[expected].tolist()
        assert expected[offset] == position
    assert tokens.sequence_of(np.array([[0, 5], [6, 15]])).tolist() == [[0, 0], [1, 2]]
    with pytest.raises(InputError, match="below 16"):
        tokens.window(16, 1, 1)


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS.filter(any), st.integers(1, 60), st.integers(1, 25), st.sampled_from([BOS, None]), st.integers(1, 40))
def test_the_plan_visits_every_sequence_once(contents, pool_tokens, shard_tokens, left_out, batch_tokens):
    _, tokens = cut(contents)
    pools = plan_pools(tokens, seed=1, pool_tokens=pool_tokens, shard_tokens=shard_tokens, masks=Masks(left_out))
    lengths = np.diff(tokens.sequence_starts)
    visited = np.concatenate([pool.sequences for pool in pools])
    assert sorted(visited) == list(range(len(lengths)))
    for pool in pools:
        assert {("train", "held_out")[i] for i in tokens.sequence_split[pool.sequences]} == {pool.split}
        assert lengths[pool.sequences].sum() < pool_tokens + lengths.max()
        ids = np.concatenate([tokens.ids[tokens.sequence_starts[s] : tokens.sequence_starts[s + 1]] for s in pool.sequences])
        assert pool.rows == sum(left_out is None or i != left_out for i in ids)
        for rows in {pool.rows, pool.rows // 2}:  # all of them, or some left out as outliers
            shards = pool.shards(rows)
            assert [shard.start for shard in shards] == [0, *[shard.stop for shard in shards]][: len(shards)]
            assert all(0 < shard.stop - shard.start <= shard_tokens for shard in shards)
            assert (shards[-1].stop if shards else 0) == rows
        batches = list(plan_batches(pool.sequences, lengths[pool.sequences], batch_tokens))
        assert np.concatenate(batches).tolist() == pool.sequences.tolist()
        assert all(len(b) == 1 or len(b) * lengths[b].max() <= batch_tokens for b in batches)
    names = [shard.name for pool in pools for shard in pool.shards(pool.rows)]
    assert names == [f"{i:05d}" for i in range(len(names))]
    assert padding(pools, tokens, 1) == 0  # one sequence at a time


def test_the_plan_depends_on_the_seed():
    _, tokens = cut([[1, 2, 3]] * 50)
    plans = [plan_pools(tokens, seed=s, pool_tokens=40, shard_tokens=9, masks=Masks(BOS)) for s in (0, 0, 1)]
    orders = [[pool.sequences.tolist() for pool in plan] for plan in plans]
    assert orders[0] == orders[1] != orders[2]
    shuffles = [pool.permutation(0, pool.rows).tolist() for pool in plans[0] if pool.rows == plans[0][0].rows]
    assert len(set(map(tuple, shuffles))) == len(shuffles) > 1  # each pool has its own
