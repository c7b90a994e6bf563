"""torch.compile goes through the training op: same outputs, same gradients."""

from __future__ import annotations

import pytest
import torch

from forge_harness.quant import TernaryLinearOp


# torch's own tracer and compiler use what they warn about.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_a_compiled_layer_trains_as_the_eager_one(compute):
    op = TernaryLinearOp(compute=compute)
    generator = torch.Generator().manual_seed(0)
    found = []
    for function in (op, torch.compile(op, fullgraph=True)):
        generator.manual_seed(0)
        x = torch.randn(6, 48, generator=generator, requires_grad=True)
        w = torch.randn(32, 48, generator=generator, requires_grad=True)
        bias = torch.randn(32, generator=generator, requires_grad=True)
        y = function(x, w, bias)
        (y * torch.linspace(-1, 1, 32)).sum().backward()
        found.append((y.detach(), x.grad, w.grad, bias.grad))
    # The compiler may sum the scale of the weight in another order: an ulp, and no code differs.
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
