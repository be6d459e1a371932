"""The flat pack of two short documents, number by number."""

import numpy as np

from tunesmith.data.prepare import PreparedRow
from tunesmith.data.records import Example
from tunesmith.packing.collate import collate_flat, pack_flat


def example(ids, spans, weights):
    return Example(
        np.asarray(ids, np.int32), np.asarray(spans, np.int32).reshape(-1, 2), np.asarray(weights, np.float32)
    )


def test_two_documents_lie_end_to_end_with_positions_that_restart():
    pack = pack_flat([example([10, 11, 12], [[1, 3]], [1.0]), example([20, 21], [[1, 2]], [0.5])])
    assert pack["input_ids"].tolist() == [[10, 11, 12, 20, 21]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    # Each target is predicted from the position before it.
    assert pack["positions"].tolist() == [0, 1, 3]
    assert pack["targets"].tolist() == [11, 12, 21]
    assert pack["weights"].tolist() == [1.0, 1.0, 0.5]


def test_labels_of_a_packed_document_never_predict_the_next_documents_first_token():
    # Both documents are targets from their first token on; a first token has nothing before it in its
    # document.
    pack = pack_flat([example([10, 11], [[0, 2]], [1.0]), example([20, 21], [[0, 2]], [1.0])])
    assert pack["targets"].tolist() == [11, 21]
    assert pack["positions"].tolist() == [0, 2]


def test_an_empty_pack_is_one_token_and_predicts_nothing():
    pack = collate_flat([])
    assert pack["input_ids"].shape == (1, 1)
    assert len(pack["targets"]) == 0
    assert pack["rows"] == []


def test_a_row_that_gave_no_example_is_still_reported():
    row = PreparedRow("a.jsonl:3")
    assert collate_flat([row])["rows"] == [row]
