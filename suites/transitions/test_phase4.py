"""From phase 4 to phase 5: what is handed over is what training starts from."""

import math

import pytest
import torch

from forge_harness.canonical import tree_digest
from forge_harness.evidence import largest
from forge_harness.formats.detect import open_checkpoint
from forge_harness.integration import phase4_connector as connector_module
from forge_harness.protocols import TrainOptions
from forge_harness.training.start import ulps

STEPS = 5


@pytest.mark.forge_check("transitions.phase4_to_phase5")
def test_phase4_to_phase5(subject, evidence, tmp_path):
    """The checkpoint is unchanged, says what training needs, and training starts from its weights.

    Oracles: the digest of its files before and after; codes bit for bit and scales to one ulp
    between what is stored and what the first forward of the session multiplies by; a finite loss
    that moves the weights. A family without a reference task ends after the configuration.
    """
    path = subject.provide_checkpoint(tmp_path)
    connector = connector_module.Phase4Connector()
    before = tree_digest(path)
    loaded = connector.load(path)
    configuration = connector.configure_qat(path)
    evidence.record("digest", before, reason="of the files that were handed over")
    missing = [
        name
        for name, value in (
            ("model family", loaded.model.family),
            ("model configuration", loaded.model.config),
            ("ternary weights", loaded.ternary),
            ("granularity", configuration.granularity),
        )
        if not value or value == "unknown"
    ]
    evidence.equal(
        "missing_fields", len(missing), expected=0, reason="; ".join(missing) or "all are there"
    )
    if configuration.task is not None:
        _starts_there(connector, path, evidence)
    evidence.equal(
        "digest_kept",
        tree_digest(path) == before,
        expected=True,
        reason="loading, configuring and training leave the source as it was",
    )


def _starts_there(connector, path, evidence):
    session = connector.start_session(path, TrainOptions(steps=STEPS))
    differing, furthest = 0, 0.0
    with open_checkpoint(path) as opened, torch.no_grad():
        for name in opened.ternary_names():
            stored = opened.ternary(name)
            values = session.model.get_submodule(name.removesuffix(".weight")).effective_weight()
            differing += int((values.sign().to(torch.int8) != stored.codes()).sum())
            if stored.codes().any():
                found = float(values.abs().max())
                furthest = largest((furthest, ulps(found, float(stored.scales[-1]))))
    evidence.equal(
        "codes_that_differ", differing, expected=0, reason="stored against the first forward's"
    )
    evidence.at_most(
        "scale_distance",
        furthest,
        limit=1.0,
        unit="ulp",
        reason="stored against the first forward's",
    )
    start = {name: p.detach().clone() for name, p in session.model.named_parameters()}
    losses = [session.step().loss for _ in range(STEPS)]
    evidence.equal(
        "finite_losses",
        sum(map(math.isfinite, losses)),
        expected=STEPS,
        unit="steps",
        reason="training goes on from there",
    )
    moved = sum(not torch.equal(p, start[name]) for name, p in session.model.named_parameters())
    evidence.equal(
        "parameters_moved", moved, expected=len(start), unit="tensors", reason="every one trains"
    )
