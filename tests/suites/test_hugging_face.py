"""transformers' BitNet layers and model are no false alarm, and packages of theirs are held."""

import importlib
from pathlib import Path

import pytest
import torch

from forge_harness.types import Outcome

BESIDE = Path(__file__).parents[1] / "subject"
CHECKS = (
    "architecture.activation_scale",
    "architecture.causal_mask",
    "architecture.fake_quant_agrees",
    "architecture.quantized_modules",
    "architecture.state_dict_round_trip",
    "architecture.sub_norm_present",
    "architecture.ternary_alphabet",
    "architecture.weight_rounding",
    "architecture.weight_scale",
    "architecture.zero_and_tiny_rows",
    "integration.compat_v1_0",
    "integration.third_party_readers",
    "training.eval_is_quantized",
    "training.every_state_saved",
    "training.gradient_reaches_all",
    "training.optimizer_state_exact",
    "training.resume_bit_identical",
    "training.ste_input_gradient",
    "training.ste_weight_gradient",
)


@pytest.fixture
def module(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BESIDE))
    yield importlib.import_module("hugging_face_subject")
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("check", CHECKS)
def test_layers_of_transformers_are_no_false_alarm(run_check, module, check):
    torch.compiler.set_stance("force_eager")
    run = run_check(check, module.HuggingFace())
    assert run.outcome is Outcome.PASS, run.reason


def test_a_package_of_other_weights_is_held(run_check, module):
    class Flips(module.HuggingFace):
        def export_package(self, session, path):
            layer = session.model.get_submodule(module.NAMES[3])
            with torch.no_grad():
                layer.weight[0].neg_()
            super().export_package(session, path)
            with torch.no_grad():
                layer.weight[0].neg_()

    run = run_check("integration.compat_v1_0", Flips())
    assert run.outcome is Outcome.FAIL
    assert "own_export_misread is 1 modules" in run.reason
    assert module.NAMES[3] in run.reason


def test_a_layer_that_is_not_quantized_is_held(run_check, module):
    class Forgets(module.HuggingFace):
        def build_model(self, task, *, seed):
            model = super().build_model(task, seed=seed)
            model.get_submodule(module.NAMES[3]).__class__ = torch.nn.Linear
            return model

    run = run_check("architecture.quantized_modules", Forgets())
    assert run.outcome is Outcome.FAIL, run.reason
    assert module.NAMES[3] in run.reason
