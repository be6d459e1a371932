"""The fused output head against F.cross_entropy on logits made all at once, in float64.

P predictions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.models import head as head_module
from tunesmith.models.fuse import fuse, loss_head
from tunesmith.models.fused.linear import LinearParts
from tunesmith.models.head import LogitChange, prediction_losses

NAMES = ("hidden", "weight", "bias", "lora_a", "lora_b")
SCALE = 0.7


def tensors(num, vocabulary, *, seed, size=16, bias=False, lora=False, large=1.0, dtype=torch.float32):
    """The differentiable inputs by name (None for what there is not), targets and weights, some of them 0."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    leaves = {
        "hidden": randn(num, size) * large,
        "weight": randn(vocabulary, size) / size**0.5,
        "bias": randn(vocabulary) if bias else None,
        "lora_a": randn(4, size) / size**0.5 if lora else None,
        "lora_b": randn(vocabulary, 4) if lora else None,
    }
    leaves = {name: None if leaf is None else leaf.to(dtype) for name, leaf in leaves.items()}
    targets = torch.randint(vocabulary, (num,), generator=generator)
    weights = torch.rand(num, generator=generator) * (torch.rand(num, generator=generator) < 0.8)
    return leaves, targets, weights


def plain_logits(hidden, weight, bias, lora_a, lora_b, change):
    logits = F.linear(hidden, weight, bias)
    if lora_a is not None:
        logits = logits + SCALE * F.linear(F.linear(hidden, lora_a), lora_b)
    logits = logits * change.factor
    return logits if change.softcap is None else change.softcap * torch.tanh(logits / change.softcap)


def plain_losses(leaves, targets, weights, change, smoothing, z_loss=0.0):
    logits = plain_logits(*leaves.values(), change)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nll = F.cross_entropy(wide, targets, reduction="none", label_smoothing=smoothing)
    return (nll + z_loss * wide.logsumexp(-1) ** 2) * weights


def fused_losses(leaves, targets, weights, change, smoothing, z_loss=0.0):
    hidden, *parts = leaves.values()
    return prediction_losses(
        hidden,
        LinearParts(*parts, SCALE),
        targets,
        weights,
        change=change,
        label_smoothing=smoothing,
        z_loss=z_loss,
    )


def with_gradients(losses, leaves, trained, outer, *args, dtype=None):
    """{"losses": [P], and a gradient for each name in `trained`} as float64."""
    leaves = {
        name: None if leaf is None else leaf.to(dtype or leaf.dtype).detach().requires_grad_(name in trained)
        for name, leaf in leaves.items()
    }
    found = losses(leaves, *args)
    gradients = torch.autograd.grad((found * outer).sum(), [leaves[name] for name in trained])
    return {"losses": found.detach().double()} | {
        name: gradient.double() for name, gradient in zip(trained, gradients, strict=True)
    }


@st.composite
def cases(draw):
    leaves, targets, weights = tensors(
        draw(st.integers(0, 40)),
        draw(st.integers(2, 90)),
        seed=draw(st.integers(0, 2**16)),
        bias=draw(st.booleans()),
        lora=draw(st.booleans()),
        large=draw(st.sampled_from([1.0, 40.0])),
    )
    there = [name for name in NAMES if leaves[name] is not None]
    trained = draw(st.lists(st.sampled_from(there), min_size=1, unique=True))
    change = LogitChange(draw(st.sampled_from([1.0, 0.5])), draw(st.sampled_from([None, 5.0])))
    outer = torch.tensor(0.3)
    if draw(st.booleans()):  # unequal: a trained head's gradients are made anew
        outer = torch.rand(len(targets), generator=torch.Generator().manual_seed(1)) + 0.1
    return leaves, targets, weights, trained, change, outer


@given(
    case=cases(),
    smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.1]),
    chunk_rows=st.integers(1, 50),
)
@settings(max_examples=350, deadline=None)
def test_losses_and_gradients_are_those_of_cross_entropy_on_logits(case, smoothing, z_loss, chunk_rows):
    """To 1e-5: float32 sums of up to 90 terms, some of them of differences. A logit z is rounded to
    |z| 2^-24, and with it the exponent of its probability, which the tolerance has to add. What is small
    because a prediction is sure or a logit at its cap is a difference of larger numbers: it is measured by
    what it would be with another target and without a cap."""
    leaves, targets, weights, trained, change, outer = case
    vocabulary = len(leaves["weight"])
    with patch.object(head_module, "CHUNK_BYTES", 4 * vocabulary * chunk_rows):
        found = with_gradients(
            fused_losses, leaves, trained, outer, targets, weights, change, smoothing, z_loss
        )
    expected, sure, unsure = (
        with_gradients(
            plain_losses,
            leaves,
            trained,
            outer.double(),
            t,
            weights,
            f,
            smoothing,
            z_loss,
            dtype=torch.float64,
        )
        for t, f in (
            (targets, change),
            (targets, LogitChange(change.factor)),
            ((targets + 1) % vocabulary, LogitChange(change.factor)),
        )
    )
    largest = plain_logits(*leaves.values(), LogitChange()).abs().amax().item() if len(targets) else 0.0
    for name, ours in found.items():
        assert ours.shape == expected[name].shape
        if ours.numel():
            size = max(some[name].abs().max() for some in (expected, sure, unsure))
            assert (ours - expected[name]).abs().max() <= (1e-5 + largest * 2**-22) * size, name


@pytest.mark.parametrize("large", [1.0, 40.0])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_in_bfloat16_the_head_is_as_near_to_the_truth_as_torch_is(large, lora, softcap, z_loss, kernels):
    """At most 1.5 times torch's own distance in bfloat16 from float64, plus one rounding (2^-9): the same
    numbers of eight bits, summed in another order."""
    leaves, targets, weights = tensors(
        96, 700, seed=3, size=64, bias=True, lora=lora, large=large, dtype=torch.bfloat16
    )
    trained = [name for name in NAMES if leaves[name] is not None]
    rest = (torch.tensor(0.5), targets, weights, LogitChange(1.0, softcap), 0.0, z_loss)
    with patch.object(head_module, "CHUNK_BYTES", 2 * 700 * 20):
        ours = with_gradients(fused_losses, leaves, trained, *rest)
    stock = with_gradients(plain_losses, leaves, trained, *rest)
    exact = with_gradients(plain_losses, leaves, trained, *rest, dtype=torch.float64)
    for name, expected in exact.items():
        our_error, stock_error = (
            float((some[name] - expected).norm() / expected.norm()) for some in (ours, stock)
        )
        assert our_error <= 1.5 * stock_error + 2**-9, name


def test_a_z_loss_adds_its_coefficient_times_the_square_of_log_z():
    """Logits that are all equal to a: log Z = a + log V. A row of the gradient is softmax - target, and 2 c
    log Z / V more for every token of the vocabulary."""
    hidden = torch.tensor([[3.0], [-2.0]], requires_grad=True)
    weight = torch.ones(8, 1, requires_grad=True)
    targets, weights, c = torch.tensor([1, 6]), torch.tensor([1.0, 0.5]), 0.01
    losses = prediction_losses(hidden, LinearParts(weight), targets, weights, z_loss=c)
    log_z = [3 + math.log(8), -2 + math.log(8)]
    by_hand = [w * (math.log(8) + c * z**2) for w, z in zip([1.0, 0.5], log_z, strict=True)]
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-6)
    losses.sum().backward()
    # dlog Z / dhidden is 1 where every weight is 1, and the likelihood does not depend on hidden
    assert hidden.grad[:, 0].tolist() == pytest.approx(
        [2 * c * log_z[0], 0.5 * 2 * c * log_z[1]], rel=1e-5, abs=1e-7
    )
    of_other = 3 * (1 / 8 + 2 * c * log_z[0] / 8) - 2 * 0.5 * (1 / 8 + 2 * c * log_z[1] / 8)
    of_target = of_other - 3
    assert weight.grad[[0, 1], 0].tolist() == pytest.approx([of_other, of_target], rel=1e-5)


def test_the_gradient_is_exact_where_the_slope_of_the_z_loss_is_zero():
    """1 + 2 c log Z = 0: there the probabilities drop out of the gradient, which has no such factor to divide
    by."""
    weight = torch.zeros(4, 1)
    weight[:, 0] = torch.tensor([-2.0 - math.log(4)] * 4)
    leaves = {"hidden": torch.ones(1, 1), "weight": weight, "bias": None, "lora_a": None, "lora_b": None}
    rest = (torch.tensor(1.0), torch.tensor([2]), torch.ones(1), LogitChange(), 0.0, 0.25)
    found = with_gradients(fused_losses, leaves, ["weight"], *rest)
    exact = with_gradients(plain_losses, leaves, ["weight"], *rest, dtype=torch.float64)
    assert exact["weight"][:, 0].tolist() == pytest.approx([0, 0, -1, 0], abs=1e-6)
    assert torch.allclose(found["weight"], exact["weight"], atol=2e-6)


@pytest.mark.parametrize("trained", [["weight"], ["hidden", "weight", "bias", "lora_a", "lora_b"]])
def test_without_predictions_gradients_are_zeros(trained):
    leaves, targets, weights = tensors(0, 30, seed=0, bias=True, lora=True)
    found = with_gradients(
        fused_losses, leaves, trained, torch.tensor(1.0), targets, weights, LogitChange(), 0.1
    )
    for name in trained:
        assert torch.equal(found[name], torch.zeros(leaves[name].shape, dtype=torch.float64))


def test_a_prediction_of_weight_0_has_loss_0_and_takes_no_part_in_any_gradient():
    leaves, targets, _ = tensors(9, 30, seed=0)
    weights = torch.ones(9).index_fill_(0, torch.tensor([2, 5]), 0.0)
    trained = ["hidden", "weight"]
    rest = (LogitChange(), 0.0)
    found = with_gradients(fused_losses, leaves, trained, torch.tensor(1.0), targets, weights, *rest)
    assert found["losses"][[2, 5]].tolist() == [0.0, 0.0]
    assert not found["hidden"][[2, 5]].any()
    kept = weights.bool()
    without = {**leaves, "hidden": leaves["hidden"][kept]}
    alone = with_gradients(
        fused_losses, without, trained, torch.tensor(1.0), targets[kept], weights[kept], *rest
    )
    # float32 sums of 9 terms and of 7
    assert torch.allclose(found["weight"], alone["weight"], rtol=1e-5, atol=1e-6)


def test_a_uniform_head_costs_the_log_of_the_vocabulary():
    losses = prediction_losses(
        torch.randn(5, 8), LinearParts(torch.zeros(64, 8)), torch.arange(5), torch.full((5,), 0.5)
    )
    assert losses.tolist() == pytest.approx([0.5 * 6 * 0.6931471805599453] * 5, rel=1e-6)


class _Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gave."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_more_logits_exist_than_those_of_a_chunk_and_none_are_kept(equal, softcap):
    num, vocabulary, rows = 512, 1000, 32
    leaves, targets, weights = tensors(num, vocabulary, seed=0, bias=True, lora=True)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    outer = torch.full((num,), 0.5) if equal else torch.rand(num)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with (
        patch.object(head_module, "CHUNK_BYTES", 4 * vocabulary * rows),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        _Sizes() as made,
    ):
        losses = fused_losses(leaves, targets, weights, LogitChange(1.0, softcap), 0.1)
        torch.autograd.grad(losses, list(leaves.values()), outer)
    assert made.largest == rows * vocabulary
    given_in = {tensor.data_ptr() for tensor in (*leaves.values(), targets, weights, outer)}
    assert kept
    assert all(tensor.data_ptr() in given_in for tensor in kept)


def with_lora_on_the_head(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["lm_head"], init_lora_weights=False, **options
    )
    model = get_peft_model(LlamaForCausalLM(config), lora)
    fuse(model, ["head"])
    return model.train(), lora


def losses_and_reference(model):
    """Of the fused head, and of the model's own logits; both draw what they drop from the same seed."""
    ids = torch.arange(2, 22)[None]
    targets, weights, positions = ids[0, 1:], torch.full((19,), 0.5), torch.arange(19)
    head = loss_head(model)
    assert head is not None
    torch.manual_seed(1)
    found = head(
        model, targets, weights, z_loss=0.1, input_ids=ids, use_cache=False, logits_to_keep=positions
    )
    torch.manual_seed(1)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits[0]
    nll = F.cross_entropy(logits, targets, reduction="none")
    return found, (nll + 0.1 * logits.exp().sum(-1).log() ** 2) * weights


def test_a_head_with_dropout_in_its_lora_drops():
    found, expected = losses_and_reference(with_lora_on_the_head(lora_dropout=0.5)[0])
    assert torch.allclose(found, expected, rtol=1e-5)


def test_a_head_with_several_adapters_gives_the_loss_of_all_of_them():
    model, lora = with_lora_on_the_head()
    model.add_adapter("second", lora)
    model.base_model.set_adapter(["default", "second"])
    found, expected = losses_and_reference(model)
    assert torch.allclose(found, expected, rtol=1e-5)
