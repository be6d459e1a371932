"""Native code against the same formulas in float64, for every shape; and what is done without it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.equivalence.test_attention import TREE, outcome, plain, random_inputs, tiled, trees, whole_mask
from tunesmith.models.fused.rotary import apply_rotary
from tunesmith.models.layout import PackLayout
from tunesmith.models.native import attention, build, elementwise

needs_native = pytest.mark.skipif(bool(build.missing()), reason=f"native code: {build.missing()}")


def assert_near(found, truth, roundings):
    """Within so many roundings to bfloat16 (2^-8 of a number at most), over the whole tensor."""
    for ours, exact in zip(found, truth, strict=True):
        assert ours.shape == exact.shape
        assert (ours - exact).norm() <= roundings * 2**-8 * exact.norm()


@needs_native
@given(
    layout=trees(),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (3, 1)]),
    size=st.sampled_from([32, 64, 96, 128, 256]),
    window=st.none() | st.integers(1, 200),
    large=st.sampled_from([1.0, 8.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_attention_over_any_tree_is_as_near_to_the_truth_as_the_plain_softmax(
    layout, heads, size, window, large, seed
):
    """At most as far from float64 as products in bfloat16 with the softmax in float32 between them, and two
    roundings. (A gradient that is a difference of nearly equal sums is far from the truth in both.)"""
    inputs, upstream = random_inputs(layout.num_tokens, heads, size, large, seed, torch.bfloat16)
    assert attention.serves(*(x.transpose(0, 1) for x in inputs))
    mask, scale = whole_mask(layout, window), size**-0.5
    found = outcome(tiled, inputs, upstream, layout, scale, None, window)
    stock = outcome(plain, inputs, upstream, mask, scale, None)
    exact = outcome(plain, inputs, upstream, mask, scale, None, dtype=torch.float64)
    for ours, theirs, truth in zip(found, stock, exact, strict=True):
        # Where every query sees one key, dq and dk are 0 but for rounding.
        noise = 2**-7 * float(upstream.double().norm())
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm() + 2**-8 * truth.norm() + noise * (
            float(truth.norm()) < noise
        )


@needs_native
def test_attention_does_not_depend_on_the_number_of_threads_nor_on_strides():
    inputs, upstream = random_inputs(TREE.num_tokens, (6, 2), 64, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(outcome(tiled, inputs, upstream, TREE, 0.125, None, None))
    finally:
        torch.set_num_threads(before)
    # As projections write them: [T, heads, D] in memory, all three in one tensor.
    joined = torch.cat([x.transpose(0, 1) for x in inputs], 1)
    views = [part.transpose(0, 1) for part in joined.split([6, 2, 2], 1)]
    query, key, value = (view.detach().requires_grad_() for view in views)
    output = tiled(query, key, value, TREE, 0.125, None, None)
    runs.append([output, *torch.autograd.grad(output, (query, key, value), upstream)])
    for run in runs[1:]:
        for first, other in zip(runs[0], run, strict=True):
            assert torch.equal(first, other.double())


@needs_native
def test_documents_of_a_pack_do_not_see_each_other():
    layout = PackLayout.of_lengths([70, 50, 90])
    inputs, _ = random_inputs(210, (4, 2), 32, dtype=torch.bfloat16)
    before = tiled(*inputs, layout, 0.2, None, None)
    for x in inputs:
        x[:, 70:120] = 3.0
    after = tiled(*inputs, layout, 0.2, None, None)
    assert torch.equal(before[:70], after[:70])
    assert torch.equal(before[120:], after[120:])
    assert not torch.equal(before[70:120], after[70:120])


@needs_native
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_is_not_hidden(which, number):
    inputs, _ = random_inputs(100, (2, 2), 32, dtype=torch.bfloat16)
    inputs[which][0, 40, 3] = number
    output = tiled(*inputs, PackLayout.of_lengths([100]), 0.2, None, None)
    assert not torch.isfinite(output[40:, 0]).all()


@needs_native
@pytest.mark.parametrize("shape", [(3, 5), (17, 576), (2, 3, 80), (1, 1)])
def test_gated_silu_and_its_gradients(shape):
    gate, up, upstream = (
        3 * torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in range(3)
    )
    gate, up, upstream = (x.to(torch.bfloat16) for x in (gate, up, upstream))
    exact = [x.double().requires_grad_() for x in (gate, up)]
    product = F.silu(exact[0]) * exact[1]
    gradients = torch.autograd.grad(product, exact, upstream.double())
    found = [elementwise.silu_mul(gate, up), *elementwise.silu_mul_backward_(upstream, gate, up)]
    assert_near([x.double() for x in found], [product.detach(), *gradients], 1)


@needs_native
@pytest.mark.parametrize("gate", [-300.0, -90.0, 0.0, 90.0, 300.0])
def test_gated_silu_far_out(gate):
    one = torch.ones(16, dtype=torch.bfloat16)
    product = elementwise.silu_mul(one * gate, one)
    assert torch.allclose(product.double(), F.silu(torch.tensor(gate, dtype=torch.float64)), rtol=2**-8)
    exact = [(one * gate).double().requires_grad_(), one.double().requires_grad_()]
    expected = torch.autograd.grad((F.silu(exact[0]) * exact[1]).sum(), exact)
    for ours, theirs in zip(
        elementwise.silu_mul_backward_(one.clone(), one * gate, one), expected, strict=True
    ):
        assert torch.allclose(ours.double(), theirs, rtol=2**-8, atol=1e-30)


@needs_native
@pytest.mark.parametrize("shape", [(4, 576), (2, 3, 50), (1, 7)])
def test_rms_norm_and_its_gradient(shape):
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator)
    wide = x.double().requires_grad_()
    normed = F.rms_norm(wide, shape[-1:], weight.double(), 1e-5)
    (gradient,) = torch.autograd.grad(normed, wide, upstream.double())
    output, inverse = elementwise.rms_norm(x, weight, 1e-5)
    found = [output, elementwise.rms_norm_backward(upstream, x, weight, inverse)]
    assert_near([x.double() for x in found], [normed.detach(), gradient], 1)


@needs_native
@pytest.mark.parametrize(("heads", "size"), [(9, 64), (2, 128), (1, 32)])
@pytest.mark.parametrize("dense", [True, False])
def test_rotation_and_its_gradient(heads, size, dense):
    generator = torch.Generator().manual_seed(0)
    # As projections write it, [T, H, D], or a part of something wider.
    wide = torch.randn(1, 21, heads + (not dense), size, generator=generator).to(torch.bfloat16)
    x = wide[:, :, :heads].transpose(1, 2)
    cos, sin = (torch.randn(1, 1, 21, size, generator=generator).to(torch.bfloat16) for _ in range(2))
    upstream = torch.randn(x.shape, generator=generator).to(torch.bfloat16)
    assert elementwise.serves_rotation(x, cos, sin)

    def turned(x, cos, sin):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    exact = x.double().requires_grad_()
    expected = turned(exact, cos.double(), sin.double())
    (gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    ours = x.detach().requires_grad_()
    output, _ = apply_rotary(ours, ours, cos[:, 0], sin[:, 0])
    found = [output.detach(), *torch.autograd.grad(output, ours, upstream)]
    assert_near([x.double() for x in found], [expected.detach(), gradient], 1)


@needs_native
@pytest.mark.parametrize("size", [1, 16, 33, 49152])
@pytest.mark.parametrize("shift", [0.0, 500.0])
def test_exponentials_of_rows(size, shift):
    logits = (4 * torch.randn(5, size, generator=torch.Generator().manual_seed(0)) + shift).to(torch.bfloat16)
    exact = (logits.double() - logits.double().amax(-1, keepdim=True)).exp()
    expected = logits.float().amax(-1, keepdim=True)
    largest, sums = elementwise.exponentials_(logits)
    assert torch.equal(largest, expected)
    assert torch.allclose(sums.double(), exact.sum(-1, keepdim=True), rtol=1e-5)  # float32 sums
    assert_near([logits.double()], [exact], 1)


def test_what_native_code_does_not_serve_is_left_to_torch():
    inputs, _ = random_inputs(20, (2, 1), 32)
    assert not attention.serves(*inputs)  # float32
    narrow, _ = random_inputs(20, (2, 1), 16, dtype=torch.bfloat16)
    assert not attention.serves(*narrow)
    assert not elementwise.serves(torch.ones(4, 4, dtype=torch.bfloat16).t()[:2])  # not dense


def test_without_a_compiler_the_same_is_computed_and_the_lack_is_named(monkeypatch):
    inputs, upstream = random_inputs(TREE.num_tokens, (6, 2), 32, dtype=torch.bfloat16)
    usual = outcome(tiled, inputs, upstream, TREE, 0.2, None, None)
    for module in (attention, elementwise):
        monkeypatch.setattr(module, "library", lambda name: None)
    in_torch = outcome(tiled, inputs, upstream, TREE, 0.2, None, None)
    if not build.missing():
        assert not torch.equal(in_torch[0], usual[0])  # rounded elsewhere: it was another code
    for ours, theirs in zip(in_torch, usual, strict=True):
        assert (ours - theirs).norm() <= 4 * 2**-8 * theirs.norm()
    asked = subprocess.run(
        [sys.executable, "-c", "from tunesmith.models.native.build import missing; print(missing())"],
        env={"PATH": "/nowhere", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert asked.stdout.strip() in (
        "no C++ compiler was found",
        "made for processors with AVX512-BF16",
        "made for Linux",
    )


@needs_native
def test_code_that_does_not_compile_is_named_and_passed_over(tmp_path, monkeypatch):
    compiler = tmp_path / "broken"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = -dumpfullversion ] && exit 0\necho 'x.cpp:1: error: no' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.missing.cache_clear()
    build.library.cache_clear()
    try:
        assert build.missing() == "it could not be compiled (x.cpp:1: error: no)"
        assert build.library("attention") is None
        assert not [file for file in tmp_path.rglob("*") if file.is_file() and file != compiler]
    finally:
        monkeypatch.undo()
        build.missing.cache_clear()
        build.library.cache_clear()
