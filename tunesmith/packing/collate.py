"""Examples to a flat pack: laid end to end in one forward pass, never padded.

    examples      [a b c]  [d e]           c and e are targets
    input_ids     [a b c d e]              [1, T]
    position_ids  [0 1 2 0 1]              [1, T]  restarts tell attention where a document begins
    positions     [1 3]                    [P]     where a prediction is made: one before its target
    targets       [c e]                    [P]
    weights       [1 1]                    [P]     loss weight of each prediction

A pack with no example (a step with fewer examples than passes) is one token and no prediction: loss and
gradient 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tunesmith.data.prepare import PreparedRow
from tunesmith.data.records import Example


def collate_flat(rows: Sequence[PreparedRow]) -> dict[str, Any]:
    """One pack of the rows' examples: the tensors above, and `rows`, what became of each row (examples left
    out where they lie in the pack), for reports."""
    examples = [example for row in rows for example in row.examples]
    return pack_flat(examples) | {"rows": list(rows)}


def pack_flat(examples: Sequence[Example]) -> dict[str, Any]:
    """The tensors of one flat pack: input_ids, position_ids [1, T] int64; positions, targets [P] int64;
    weights [P] float32."""
    if not examples:
        examples = [Example(np.zeros(1, np.int32), np.zeros((0, 2), np.int32), np.zeros(0, np.float32))]
    input_ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    position_ids = np.concatenate([np.arange(len(example.input_ids)) for example in examples])
    weights = np.concatenate([example.token_weights() for example in examples])
    (target_at,) = np.nonzero(weights)
    return {
        "input_ids": torch.from_numpy(input_ids)[None],
        "position_ids": torch.from_numpy(position_ids)[None],
        "positions": torch.from_numpy(target_at - 1),
        "targets": torch.from_numpy(input_ids[target_at]),
        "weights": torch.from_numpy(weights[target_at]),
    }
