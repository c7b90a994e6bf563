"""Sessions with several optimizers are measured as those with one: Muon, AdamW, SparseAdam."""

import importlib.util
from pathlib import Path

import pytest
import torch

from forge_harness.subject.optimizers import Together
from forge_harness.types import Outcome

PATH = Path(__file__).parents[1] / "subject" / "foreign_language_model.py"
SPEC = importlib.util.spec_from_file_location("foreign_language_model", PATH)
foreign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(foreign)

# Muon came with torch 2.9.
OF_MATRICES = getattr(torch.optim, "Muon", torch.optim.SGD)
CHECKS = (
    "training.clip_effective",
    "training.decay_groups",
    "training.every_state_saved",
    "training.non_finite_stops",
    "training.optimizer_state_exact",
    "training.parameters_move",
    "training.schedule_trace",
)


class Mixed(foreign.Words):
    together = Together

    def optimizer(self, model):
        decays, rest = self.groups(model)
        latent = list(self.latent_weights(model).values())
        decays["params"] = [p for p in decays["params"] if not any(p is w for w in latent)]
        return self.together(
            OF_MATRICES([{"params": latent}], lr=1e-3, weight_decay=0.1, momentum=0.9),
            torch.optim.AdamW([decays, rest], lr=1e-3, betas=(0.9, 0.95)),
        )

    def save_session(self, session, path):
        place = (session.step_index, session.place, list(session.order))
        torch.save((session.model.state_dict(), session.optimizer.state_dict(), place), path)

    def resume_session(self, task, options, path):
        session = self.session(task, options)
        model, optimizer, place = torch.load(path, weights_only=True)
        session.model.load_state_dict(model)
        session.optimizer.load_state_dict(optimizer)
        session.step_index, session.place, session.order = place
        return session

    class loop(foreign.Loop):
        def evaluate(self):
            return {"loss": 0.0}

        def state_tensors(self):
            kept = self.optimizer.state_dict()["state"]
            named = {f"{i}.{name}": v for i, of in kept.items() for name, v in of.items()}
            # SparseAdam counts its steps in a number.
            return dict(self.model.state_dict()) | {
                name: torch.as_tensor(value) for name, value in named.items()
            }


@pytest.mark.parametrize("check", CHECKS)
def test_several_optimizers_are_no_false_alarm(run_check, check):
    run = run_check(check, Mixed())
    assert run.outcome is Outcome.PASS, run.reason


class DecaysAll(Mixed):
    def groups(self, model):
        return [{"params": list(model.parameters())}, {"params": []}]


class LeavesOneOut(Mixed):
    """Neither has the last of the latent weights."""

    def optimizer(self, model):
        both = super().optimizer(model)
        both.optimizers[0].param_groups[0]["params"].pop()
        return both


class Forgets(Mixed):
    """The state of the second is not restored."""

    class together(Together):
        def load_state_dict(self, state):
            self.optimizers[0].load_state_dict(torch.optim.Optimizer.state_dict(self.optimizers[0]))


class SavesTheirsAlone(Mixed):
    """A state dict of another form than torch's, whose tensors the session's state leaves out."""

    class together(Together):
        def state_dict(self):
            return {"parts": [each.state_dict() for each in self.optimizers]}

    class loop(foreign.Loop):
        pass


@pytest.mark.parametrize(
    ("subject", "check", "shown"),
    [
        (DecaysAll, "training.decay_groups", "exempt_decayed"),
        (LeavesOneOut, "training.decay_groups", "no group of the optimizer has: blocks.1.down"),
        (Forgets, "training.optimizer_state_exact", "different_entries"),
        (SavesTheirsAlone, "training.every_state_saved", "optimizer.parts.0.state.0."),
    ],
)
def test_what_is_wrong_with_one_of_them_is_found(run_check, subject, check, shown):
    run = run_check(check, subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert shown in run.reason


class SparseTable(Mixed):
    """Gradients of the embedding, its largest matrix, are sparse, as those of a recommender."""

    class net(foreign.Net):
        def __init__(self, seed):
            super().__init__(seed)
            self.embed.sparse = True

    class loop(Mixed.loop):
        def clip(self, parameters):
            """`clip_grad_norm_` takes no sparse gradients."""
            for p in parameters:
                p.grad = p.grad.coalesce() if p.grad.is_sparse else p.grad
            values = [p.grad.values() if p.grad.is_sparse else p.grad for p in parameters]
            norm = torch.stack([part.norm() for part in values]).norm()
            if not norm.isfinite():
                raise FloatingPointError(f"gradient norm is {norm.item()}")
            for part in values[self.unclipped :]:
                part.mul_(((self.options.clip_norm or 1.0) / (norm + 1e-6)).clamp(max=1.0))
            return norm

        unclipped = 0

    def optimizer(self, model):
        table = model.embed.weight
        decays, rest = self.groups(model)
        rest["params"] = [p for p in rest["params"] if p is not table]
        return self.together(
            torch.optim.SparseAdam([{"params": [table], "decays": 0.0}], lr=1e-3),
            torch.optim.AdamW([decays, rest], lr=1e-3, betas=(0.9, 0.95)),
        )


class TableIsNotClipped(SparseTable):
    class loop(SparseTable.loop):
        unclipped = 1


class StepsOnNan(SparseTable):
    class loop(SparseTable.loop):
        def clip(self, parameters):
            for p in parameters:
                p.grad = p.grad.coalesce() if p.grad.is_sparse else p.grad
            return torch.zeros(())


SPARSE = (*CHECKS, "training.gradient_reaches_all", "training.accumulation_equivalence")


@pytest.mark.parametrize("check", SPARSE)
def test_sparse_gradients_are_measured_as_dense_ones(run_check, check):
    """They were errors of the checks: torch has no `any`, `median` or `index_fill` of them."""
    run = run_check(check, SparseTable())
    assert run.outcome is Outcome.PASS, run.reason


@pytest.mark.parametrize(
    ("subject", "check", "shown"),
    [
        (TableIsNotClipped, "training.clip_effective", "norm_at_optimizer"),
        (StepsOnNan, "training.non_finite_stops", "nan_in_one_gradient.changed"),
    ],
)
def test_what_is_wrong_with_a_sparse_gradient_is_found(run_check, subject, check, shown):
    run = run_check(check, subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert shown in run.reason


class Apart(Mixed):
    class together:
        def __init__(self, *optimizers):
            self.optimizers = optimizers

        @property
        def param_groups(self):
            return [group for each in self.optimizers for group in each.param_groups]


def test_optimizers_that_torch_does_not_know_are_named_with_what_helps(run_check):
    run = run_check("training.schedule_trace", Apart())
    assert run.outcome is Outcome.ERROR
    assert "optimizer is a together; expected a torch.optim.Optimizer" in run.reason
    assert "forge_harness.subject.optimizers.Together" in run.reason
