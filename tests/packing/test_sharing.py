"""What is known of common prefixes: never more than there is, and all of it between neighbours."""

from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets
from families import as_chunks, families, trie_size, true_lcp
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.rows import CachedRows
from tunesmith.packing.sharing import Sharing


@given(families(), st.lists(st.integers(0, 12), max_size=4))
@settings(max_examples=300, deadline=None)
def test_neighbours_share_what_they_share_and_no_pair_is_said_to_share_more(examples, sizes):
    sharing = Sharing.of_tokens(as_chunks(examples, sizes))
    assert sorted(sharing.rank) == list(range(len(examples)))
    order = np.argsort(sharing.rank)
    for a, b in pairwise(order):
        exact = true_lcp(examples[a], examples[b])
        assert sharing.lcp(np.array([a]), np.array([b]))[0] == (exact if exact >= 16 else 0)
    pairs = np.indices((len(examples), len(examples))).reshape(2, -1)
    for a, b, found in zip(*pairs, sharing.lcp(*pairs), strict=True):
        exact = true_lcp(examples[a], examples[b])
        # Where three part within one window of 16 tokens, the order may not be depth-first: up to 15 lost.
        assert found == exact if a == b else found <= exact
        assert a == b or found > exact - 16 or exact < 32


@given(families())
@settings(max_examples=100, deadline=None)
def test_lengths_less_common_prefixes_are_never_less_than_the_trie(examples):
    sharing = Sharing.of_tokens(as_chunks(examples))
    some = np.arange(0, len(examples), 2)
    ordered, common = sharing.in_order(np.concatenate([some, some[:1]]))  # one of them twice
    cost = sum(len(examples[e]) for e in ordered) - common.sum()
    assert cost >= trie_size([examples[e] for e in some])


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 31, 32, 33, 300])
def test_the_least_of_any_range_of_ranks(size):
    common = np.random.default_rng(size).integers(0, 1000, size).astype(np.int32)
    sharing = Sharing(np.arange(size, dtype=np.int32), common, np.full(size, 1000, np.int32))
    low, high = np.triu_indices(size)
    found = sharing.between(low, high)
    for start, end, least in zip(low, high, found, strict=True):
        assert least == min(common[start + 1 : end + 1].tolist(), default=2**31 - 1)


def test_a_shared_prompt_is_found_to_the_token_and_short_openings_are_not_counted():
    prompt = list(range(100, 137))
    examples = [[1, 2, 3], [*prompt, 5, 6], [7] * 40, [*prompt, 8, 9], [7] * 15, [*prompt, 5, 6], [1, 2, 3]]
    sharing = Sharing.of_tokens(as_chunks(examples, [2, 3]))
    a, b = np.array([1, 1, 2, 0]), np.array([3, 5, 4, 6])
    assert sharing.lcp(a, b).tolist() == [37, 39, 0, 0]


def test_cached_rows_hand_out_their_tokens_whole_sliced_and_selected():
    examples = [[1] * 20, [2] * 20, [1] * 18 + [3], [2] * 17, [4] * 19]
    features = Features({"input_ids": List(Value("int32"))})
    parts = [Dataset.from_dict({"input_ids": part}, features) for part in (examples[:2], examples[2:])]
    rows = CachedRows(concatenate_datasets(parts))
    for chosen in ([0, 1, 2, 3, 4], [1, 2, 3], [4, 3, 1, 0]):  # the second is a slice, the third has indices
        sharing = Sharing.of_tokens(*rows.select(np.array(chosen)).token_chunks())
        for i, a in enumerate(chosen):
            found = sharing.lcp(np.full(len(chosen), i), np.arange(len(chosen)))
            assert found.tolist() == [true_lcp(examples[a], examples[b]) for b in chosen]


def test_rows_of_a_selection_are_looked_up_in_the_table():
    examples = [[1] * 20, [2] * 20, [1] * 18 + [3], [2] * 17]
    sharing = Sharing.of_tokens(as_chunks(examples, [3]), np.array([3, 1, 0]))
    assert sharing.lcp(np.array([0, 0]), np.array([1, 2])).tolist() == [17, 0]


def test_examples_that_end_with_a_window_or_are_prefixes_of_others():
    examples = [[1] * 32, [1] * 48, [1] * 16, [1] * 32, [1] * 49]
    sharing = Sharing.of_tokens(as_chunks(examples))
    assert sharing.lcp(np.zeros(5, np.int64), np.arange(5)).tolist() == [32, 32, 16, 32, 32]


def test_no_examples():
    assert len(Sharing.of_tokens([])) == 0
