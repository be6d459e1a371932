from __future__ import annotations

import pytest

from tunesmith.models.native import attention, build, elementwise


@pytest.fixture(params=["native", "torch"])
def kernels(request, monkeypatch):
    """The native code of this machine, and PyTorch's operations in its place."""
    if request.param == "native" and (lack := build.missing()):
        pytest.skip(f"native code: {lack}")
    if request.param == "torch":
        for module in (attention, elementwise):
            monkeypatch.setattr(module, "library", lambda name: None)
    return request.param
