"""Work in several threads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae.features.index.parallel import in_order


@given(st.lists(st.integers()), st.integers(1, 6))
def test_results_come_in_order_and_few_items_are_under_way(items, workers):
    asked = []

    def given_out():
        for item in items:
            asked.append(item)
            yield item

    done = []
    for result in in_order(lambda item: item * item, given_out(), workers):
        done.append(result)
        assert len(asked) - len(done) <= workers
    assert done == [item * item for item in items]


def test_an_error_reaches_the_caller_and_torch_keeps_its_threads():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda item: 1 // item, [2, 1, 0, 3]))
    assert torch.get_num_threads() == before
