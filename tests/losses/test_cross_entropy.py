"""The loss against torch's own and against arithmetic by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from tunesmith.losses.cross_entropy import weighted_cross_entropy


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    loss = weighted_cross_entropy(torch.zeros(3, 8), torch.tensor([0, 3, 7]), torch.ones(3))
    assert loss.tolist() == pytest.approx([math.log(8)] * 3, rel=1e-6)


def test_weights_multiply_each_term():
    logits, targets = (
        torch.randn(5, 11, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1, 2, 3, 4, 5]),
    )
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 0.25])
    by_hand = [
        (w * F.cross_entropy(row[None], t[None])).item()
        for row, t, w in zip(logits, targets, weights, strict=True)
    ]
    assert weighted_cross_entropy(logits, targets, weights).tolist() == pytest.approx(by_hand, rel=1e-6)


def test_the_softmax_of_bfloat16_logits_is_taken_in_float32():
    logits = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(1)).bfloat16()
    targets = torch.arange(4)
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    losses = weighted_cross_entropy(logits, targets, torch.ones(4))
    assert losses.tolist() == pytest.approx(exact.tolist(), rel=1e-6)


def test_shapes_that_do_not_agree_are_refused():
    with pytest.raises(ValueError, match=r"logits \(3, 8\), targets \(2,\), weights \(2,\)"):
        weighted_cross_entropy(torch.zeros(3, 8), torch.zeros(2, dtype=torch.long), torch.ones(2))


def test_a_z_loss_adds_its_coefficient_times_the_square_of_log_z():
    """Logits that are all 2: Z = 8 e^2."""
    losses = weighted_cross_entropy(
        torch.full((2, 8), 2.0), torch.tensor([0, 7]), torch.tensor([1.0, 0.5]), z_loss=0.01
    )
    whole = math.log(8) + 0.01 * (2 + math.log(8)) ** 2
    assert losses.tolist() == pytest.approx([whole, whole / 2], rel=1e-6)
