"""What happens before a check runs: marker problems, predicates, missing capabilities."""

from __future__ import annotations

import pytest

from forge_harness._pytest.state import ForgeState
from forge_harness.errors import ForgeError

NOT_APPLICABLE = pytest.StashKey[bool]()


def admit(state: ForgeState, item: pytest.Item) -> None:
    """Lets an item run, or ends it as error, not applicable or not measured."""
    mark = state.marks.get(item.nodeid)
    if mark is None:
        return
    state.single_thread()
    if mark.problem is not None:
        pytest.fail(mark.problem, pytrace=False)
    entry = state.entry(mark.check)
    if entry is None or (entry.not_applicable is None and not entry.requires):
        return
    try:
        predicate = entry.not_applicable or ""
        declared = state.declared if predicate.startswith("declared:") else {}
        needs_subject = bool(entry.requires) or predicate.startswith("capability:")
        capabilities = state.loaded.capabilities if needs_subject else frozenset()
        ruled_out = entry.rules_out(capabilities, declared)
    except ForgeError as error:
        pytest.fail(str(error), pytrace=False)
    if ruled_out is not None:
        item.stash[NOT_APPLICABLE] = True
        pytest.skip(ruled_out)
    for capability in entry.requires:
        if capability not in capabilities:
            pytest.skip(missing_capability(state.loaded.name, capability))


def missing_capability(subject: str, capability: str) -> str:
    """Returns the sentence for a capability that a subject does not have."""
    from forge_harness.subject.protocols import CAPABILITIES, methods_of

    methods = ", ".join(methods_of(capability)) if capability in CAPABILITIES else "unknown"
    return f"subject {subject!r} does not offer {capability} (methods: {methods})"
