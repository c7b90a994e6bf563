"""The compiled peer: its weights are constants, and each layer is compiled."""

import pytest
import torch
import torch._dynamo.utils

from forge_harness.benchmarks.inductor import frozen_call


def layer_of(weight):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    return layer.eval()


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="Weights are packed for bf16 instructions, which this processor lacks.",
)
def test_the_weight_is_folded_into_the_code():
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    layer = layer_of(torch.randn(128, 256, dtype=torch.bfloat16))
    with torch.no_grad():
        expected = layer(x)
        call = frozen_call(layer, x)
        torch.testing.assert_close(call(), expected)
        layer.weight.data.zero_()
        torch.testing.assert_close(call(), expected)


def test_as_many_layers_as_cold_weights_need_are_all_compiled():
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    weights = [torch.full((32, 64), float(value)).bfloat16() for value in range(12)]
    with torch.inference_mode():
        calls = [frozen_call(layer_of(weight), x) for weight in weights]
        for weight, call in zip(weights, calls, strict=True):
            torch.testing.assert_close(call(), x @ weight.t())
    assert counters["stats"]["unique_graphs"] == 12
    assert not counters["recompile_limit"]
