"""Examples that share prefixes, and what is true of them by brute force."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st


@st.composite
def families(draw, max_size=40):
    """Examples that continue a few stems, which continue one another; tokens of a tiny alphabet."""

    def tokens(least, most):
        return st.lists(st.integers(0, 1), min_size=least, max_size=most)

    stems = [[]]
    for _ in range(draw(st.integers(1, 5))):
        stems.append(draw(st.sampled_from(stems)) + draw(tokens(1, 40)))
    return draw(
        st.lists(
            st.builds(lambda stem, rest: [*stem, 2, *rest], st.sampled_from(stems), tokens(0, 20)),
            max_size=max_size,
        )
    )


def as_chunks(examples, sizes=()):
    """The examples as (values, offsets) of Arrow chunks of these sizes, the last with what is left."""
    chunks, start = [], 0
    for size in [*sizes, len(examples)]:
        part = examples[start : start + size]
        start += size
        flat = np.asarray([token for example in part for token in example], dtype=np.int32)
        chunks.append((flat, np.cumsum([0, *map(len, part)]).astype(np.int32)))
    return chunks


def true_lcp(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def trie_size(examples):
    """Nodes of the trie of the examples' tokens, the root not counted."""
    return len({tuple(example[: n + 1]) for example in examples for n in range(len(example))})
