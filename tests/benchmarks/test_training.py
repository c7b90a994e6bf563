"""Arms of the training bench differ in their arithmetic, and in nothing else."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from forge_harness.benchmarks import training
from forge_harness.errors import UsageError
from forge_harness.model import BitLinear, ByteLM, ByteLMConfig

SMALL = {"width": 64, "layers": 1, "batch": 2, "threads": (1,), "rounds": 6}
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None,
    reason="torchao is not installed: pip install -c constraints/cpu.txt '.[peers]'",
)


def test_arms_start_from_one_loss_and_keep_the_threads_they_found():
    before = torch.get_num_threads()
    found = training.measure(**SMALL)
    assert torch.get_num_threads() == before
    (steps,) = found.steps
    loss = steps.first_loss
    assert loss["ternary, int8"] == pytest.approx(loss["ternary, exact"], rel=1e-6)
    assert loss["full, bf16 autocast"] == pytest.approx(loss["full"], rel=1e-2)
    assert loss["full"] != pytest.approx(loss["ternary, exact"], rel=1e-3)
    assert found.tokens == 2 * 128
    assert found.parameters == 64 * 257 + 4 * 64**2 + 3 * 64 * 192 + 2 * 64


# torch's own tracer and compiler use what they warn about.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_arm_computes_what_the_eager_one_does():
    config = ByteLMConfig(width=64, layers=1, heads=1, hidden=192)
    eager = training.ARMS[-1]
    assert eager.compiled().name == "ternary, int8, compiled"
    losses = [training._session(arm, config, 2).step().loss for arm in (eager, eager.compiled())]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is here")
def test_a_peer_that_is_not_there_is_named_with_its_remedy():
    with pytest.raises(UsageError, match=r"No module named 'torchao'.*\[peers\]"):
        training.measure(**SMALL, with_torchao=True)


@needs_torchao
def test_torchao_takes_the_same_first_step():
    (steps,) = training.measure(**SMALL, with_torchao=True).steps
    assert steps.first_loss["torchao"] == pytest.approx(
        steps.first_loss["ternary, exact"], rel=1e-4
    )
    assert set(steps.over_torchao) == {"ternary, exact", "ternary, int8"}


@needs_torchao
def test_torchao_replaces_all_projections_and_nothing_else():
    from forge_harness.benchmarks.torchao import converted

    model = ByteLM(ByteLMConfig(width=64, layers=1, heads=1, hidden=192), precision="full")
    projections = [module for module in model.modules() if isinstance(module, BitLinear)]
    converted(model)
    kinds = {name: type(p.data).__name__ for name, p in model.named_parameters()}
    changed = [name for name, kind in kinds.items() if kind == "BitNetTrainingLinearWeight"]
    assert len(changed) == len(projections) == 7
    assert kinds["embedding.weight"] == "Tensor"


@needs_torchao
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_a_layer_has_the_gradients_of_torchao_s(compute):
    """Another implementation of the same estimator; it rounds where its dtype does."""
    from forge_harness.benchmarks.torchao import converted
    from forge_harness.quant import TernaryLinearOp

    torch.manual_seed(0)
    ours = BitLinear(96, 48, linear=TernaryLinearOp(compute=compute))
    full = BitLinear(96, 48, precision="full")
    full.load_state_dict(ours.state_dict())
    theirs = converted(torch.nn.Sequential(full))
    x = torch.randn(40, 96)
    found = []
    for layer in (ours, theirs):
        into = x.clone().requires_grad_()
        out = layer(into)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        (weight,) = layer.parameters()
        found.append((out.detach(), into.grad, weight.grad))
    tolerance = 1e-5 if compute == "exact" else 1e-2
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(
            mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max())
        )
