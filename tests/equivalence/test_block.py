"""RMSNorm, rotary embedding and gated feed-forward against transformers' own; and what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, LlamaConfig, SeedOssConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.phi3 import modeling_phi3
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

from tunesmith.models.fuse import fuse
from tunesmith.models.fused.linear import LinearParts
from tunesmith.models.fused.mlp import ACTIVATIONS, gated_mlp
from tunesmith.models.fused.norm import rms_norm
from tunesmith.models.fused.rotary import apply_rotary

SIZES = {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fill(module, seed=0):
    """Random parameters around what they begin with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


def outcome(function, inputs, upstream):
    """Output and the gradients of the inputs, in float64."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    return [output.detach().double()] + [
        gradient.double() for gradient in torch.autograd.grad(output, inputs, upstream.to(output.dtype))
    ]


def assert_close(found, expected, tolerance=1e-5):
    """To `tolerance` of the largest. 1e-5: float32 sums of a hundred terms in another order."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def assert_as_near(found, stock, exact):
    """At most 1.5 times the stock's distance in bfloat16 from the truth, plus one rounding (2^-9)."""
    for ours, theirs, truth in zip(found, stock, exact, strict=True):
        our_error, their_error = ((some - truth).norm() / truth.norm() for some in (ours, theirs))
        assert our_error <= 1.5 * their_error + 2**-9


def is_fused(module):
    return "forward" in vars(module)


# --- RMSNorm

NORMS = [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)]


@pytest.mark.parametrize(("kind", "offset"), NORMS)
@pytest.mark.parametrize("size", [0.01, 1.0, 300.0])  # beside eps, and where squares are large
def test_the_norm_is_llamas_and_gemmas(kind, offset, size):
    x, upstream = size * randn(2, 7, 64), randn(2, 7, 64, seed=1)
    norm = fill(kind(64, eps=1e-5))

    def stock(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, x)

    assert_close(
        outcome(lambda x, weight: rms_norm(x, weight, 1e-5, offset), (x, norm.weight), upstream),
        outcome(stock, (x, norm.weight), upstream),
    )


@pytest.mark.parametrize(("kind", "offset"), NORMS)
def test_in_bfloat16_the_norm_is_as_near_to_the_truth_as_the_stock_one(kind, offset, kernels):
    x, upstream = randn(64, 64, dtype=torch.bfloat16), randn(64, 64, seed=1, dtype=torch.bfloat16)
    weight = fill(kind(64)).weight.bfloat16()
    eps = 1e-6

    def stock(x, weight):
        return torch.func.functional_call(kind(64, eps=eps), {"weight": weight}, x)

    def truth(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)

    assert_as_near(
        outcome(lambda x, weight: rms_norm(x, weight, eps, offset), (x, weight), upstream),
        outcome(stock, (x, weight), upstream),
        outcome(truth, (x.double(), weight.double()), upstream),
    )


@pytest.mark.parametrize(("kind", "offset"), NORMS)
def test_fuse_finds_the_norm_and_its_offset(kind, offset):
    model = nn.ModuleList([fill(kind(64)), kind(64)])
    stock = copy.deepcopy(model)
    fuse(model, ["block"])
    x = randn(3, 64)
    for ours, theirs in zip(model, stock, strict=True):
        assert is_fused(ours)
        assert_close([ours(x).double()], [theirs(x).double()])


# --- rotary embedding


def angles(total, width, *, dtype=torch.float64):
    """cos and sin [1, T, width] as a model makes them."""
    turns = torch.arange(total)[:, None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
    both = torch.cat((turns, turns), -1)[None].to(dtype)
    return both.cos(), both.sin()


@pytest.mark.parametrize("width", [16, 8, 2])  # of a head's 16
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_rotated_queries_and_keys_and_their_gradients_are_transformers(width, unsqueeze_dim):
    """In float64, exactly but for the last bit: Phi-3's function is Llama's with what lies behind the angles
    passed through."""
    cos, sin = angles(5, width)
    shapes = [(1, heads, 5, 16) if unsqueeze_dim == 1 else (1, 5, heads, 16) for heads in (4, 2)]
    q, k = (randn(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(shapes))
    upstream = torch.cat((q.flatten(), k.flatten())).flip(0)

    def both(function):
        def flat(q, k):
            return torch.cat([x.flatten() for x in function(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)])

        return outcome(flat, (q, k), upstream)

    found = both(apply_rotary)
    assert_close(found, both(modeling_phi3.apply_rotary_pos_emb), 1e-15)
    if width == 16:
        assert_close(found, both(modeling_llama.apply_rotary_pos_emb), 1e-15)


@pytest.mark.parametrize("width", [6, 4])
def test_rotary_gradients_are_those_of_finite_differences(width):
    """Also where the two halves turn by different angles."""
    cos, sin = (randn(1, 3, width, seed=seed, dtype=torch.float64) for seed in (5, 6))
    q, k = (randn(1, heads, 3, 6, dtype=torch.float64).requires_grad_() for heads in (2, 1))
    assert torch.autograd.gradcheck(lambda q, k: apply_rotary(q, k, cos, sin), (q, k))


def test_rotation_keeps_lengths():
    cos, sin = angles(9, 16)
    q = randn(1, 4, 9, 16, dtype=torch.float64)
    rotated, _ = apply_rotary(q, q[:, :2], cos, sin)
    assert torch.allclose(rotated.norm(dim=-1), q.norm(dim=-1), rtol=1e-14)


def llama_attention():
    config = LlamaConfig(**SIZES, attn_implementation="sdpa")
    return fill(LlamaAttention(config, 0))


def test_fuse_gives_an_attention_layer_the_function_and_leaves_its_file_alone():
    before = modeling_llama.apply_rotary_pos_emb
    stock = llama_attention()
    ours = copy.deepcopy(stock)
    fuse(ours, ["block"])
    assert ours.forward.__globals__["apply_rotary_pos_emb"] is apply_rotary
    assert not is_fused(stock)
    assert modeling_llama.apply_rotary_pos_emb is before
    x, cos_sin = randn(1, 9, 64), angles(9, 16, dtype=torch.float32)
    run = [
        outcome(lambda x, m=m: m(x, cos_sin, None)[0], [x], randn(1, 9, 64, seed=1)) for m in (ours, stock)
    ]
    assert_close(*run)


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """GLM's order: each number with its neighbour."""

    def rotate(x):
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos.unsqueeze(unsqueeze_dim) + turned * sin.unsqueeze(unsqueeze_dim)

    return rotate(q), rotate(k)


class Neighbours(nn.Module):
    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)


def test_another_rotary_embedding_is_left_alone():
    model = Neighbours()
    fuse(model, ["block"])
    assert not is_fused(model)


# --- gated feed-forward


def feed_forward(kind):
    if kind == "llama":
        return fill(LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True)))
    activation = {"gemma": "gelu_pytorch_tanh", "gemma-exact": "gelu"}[kind]
    return fill(GemmaMLP(GemmaConfig(**SIZES, hidden_act=activation, hidden_activation=activation)))


MLPS = ["llama", "gemma", "gemma-exact"]


def parameter_outcome(mlp, x, upstream):
    mlp.zero_grad()
    found = outcome(mlp, [x], upstream)
    mlp(x).backward(upstream.to(x.dtype))
    return found + [parameter.grad.double() for parameter in mlp.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", MLPS)
@pytest.mark.parametrize(
    "trained", ["all", "down_proj.weight", "up_proj.weight", "gate_proj.weight", "nothing"]
)
def test_the_feed_forward_is_transformers_whatever_of_it_is_trained(kind, trained):
    stock = feed_forward(kind)
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(trained in ("all", name))
    ours = copy.deepcopy(stock)
    fuse(ours, ["block"])
    assert is_fused(ours)
    x, upstream = randn(2, 9, 64), randn(2, 9, 64, seed=1)
    if trained == "nothing":
        assert_close(outcome(ours, [x], upstream), outcome(stock, [x], upstream))
    else:
        assert_close(parameter_outcome(ours, x, upstream), parameter_outcome(stock, x, upstream))


@pytest.mark.parametrize("kind", MLPS)
def test_in_bfloat16_the_feed_forward_is_as_near_to_the_truth_as_the_stock_one(kind, kernels):
    stock = feed_forward(kind).bfloat16()
    exact, ours = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    fuse(ours, ["block"])
    assert is_fused(ours)
    x, upstream = randn(32, 64, dtype=torch.bfloat16), randn(32, 64, seed=1, dtype=torch.bfloat16)
    runs = [parameter_outcome(mlp, x.to(p.dtype), upstream) for mlp in (ours, stock, exact)
            for p in [next(mlp.parameters())]]  # fmt: skip
    assert_as_near(*runs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_feed_forward_gradients_are_those_of_finite_differences(activation, dropout):
    """With LoRA on all three layers, in float64. One seed for every evaluation: the backward pass must draw
    the masks of the forward pass."""
    shapes = [(7, 5), (7, 5), (5, 7)]
    tensors = [randn(3, 5, dtype=torch.float64).requires_grad_()]
    for i, (out, width) in enumerate(shapes):
        sizes = [(out, width), (2, width), (out, 2)]
        tensors += [
            randn(*size, seed=10 * i + j, dtype=torch.float64).requires_grad_()
            for j, size in enumerate(sizes)
        ]

    def run(x, *rest):
        torch.manual_seed(0)
        layers = [
            LinearParts(rest[i], None, rest[i + 1], rest[i + 2], 0.7, dropout) for i in range(0, len(rest), 3)
        ]
        return gated_mlp(x, layers, activation)

    assert torch.autograd.gradcheck(run, tensors)


def test_the_feed_forward_keeps_two_wide_tensors():
    """gate(x) and up(x), beside x: transformers keeps act(gate(x)) and the product too."""
    mlp = feed_forward("llama")
    fuse(mlp, ["block"])
    kept = []
    x = randn(11, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp(x)
    parameters = {parameter.data_ptr() for parameter in mlp.parameters()}
    shapes = sorted(tuple(t.shape) for t in kept if t.data_ptr() not in parameters)
    assert shapes == [(11, 64), (11, 80), (11, 80)]


# --- what is not what it looks like


class SumMLP(LlamaMLP):
    """The same attributes, another formula."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class CentredRMSNorm(LlamaRMSNorm):
    """A norm that takes the mean away, whatever it is called."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: fill(SumMLP(LlamaConfig(**SIZES))),
        lambda: fill(LlamaMLP(LlamaConfig(**SIZES, hidden_act="relu"))),
        lambda: fill(CentredRMSNorm(64)),
    ],
    ids=["another formula", "another activation", "another norm"],
)
def test_what_computes_something_else_keeps_its_own_forward(make):
    module = make()
    fuse(nn.ModuleList([module]), ["block"])
    assert not is_fused(module)


def test_a_feed_forward_that_drops_in_training_keeps_doing_so():
    """Models are fused before they are put in training mode, and dropout shows in no other."""
    mlp = fill(SeedOssMLP(SeedOssConfig(**SIZES, residual_dropout=0.5))).eval()
    fuse(nn.ModuleList([mlp]), ["block"])
    mlp.train()
    torch.manual_seed(0)
    x = randn(20, 64)
    zeros = (mlp(x) == 0).float().mean()
    assert 0.4 < zeros < 0.6  # of 1,280: 0.5 by more than six standard deviations


def test_a_fused_model_keeps_its_parameters_and_their_names():
    stock = feed_forward("llama")
    ours = copy.deepcopy(stock)
    fuse(ours, ["block"])
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in stock.named_modules()]
