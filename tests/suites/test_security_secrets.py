"""Security, secrets_not_logged: red for each place in which nothing is masked."""

from __future__ import annotations

import pytest

from forge_harness.types import Outcome

SABOTAGE = {
    "records": "forge_harness._pytest.collector._without_credentials = lambda r, m: r",
    "logs": "forge_harness.integration.child.Masker.data = lambda self, data: data",
    "forms": "forge_harness.probes.masking.FORMS.clear()",
    "keys": "forge_harness.security.key_sources.write_keyring = leak",
}
PATCHES = """
import forge_harness._pytest.collector, forge_harness.integration.child
import forge_harness.probes.masking, forge_harness.security.key_sources
write = forge_harness.security.key_sources.write_keyring
def leak(path, keyring, *more, **named):
    write(path, keyring, *more, **named)
    print(path.read_text())
"""


def test_the_harness_passes(run_check):
    run = run_check("security.secrets_not_logged")
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


@pytest.mark.parametrize("what", SABOTAGE)
def test_what_is_not_masked_is_found(run_check, monkeypatch, tmp_path, what):
    # Started like a module of the harness, after a patch in the same process: a child of the check
    # is a fresh interpreter, and only its environment reaches it.
    (tmp_path / "sitecustomize.py").write_text(PATCHES + SABOTAGE[what] + "\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = run_check("security.secrets_not_logged")
    assert run.outcome is Outcome.FAIL
    assert "places is" in run.reason
