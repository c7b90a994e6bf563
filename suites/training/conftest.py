"""What the training checks share."""

import pytest

from forge_harness._pytest.state import state_of

from . import elsewhere


@pytest.fixture
def another_process(request, subject):
    """How the subject reaches another process; asked for before a check does anything with it."""
    state = state_of(request.config)
    if state.handover is not None and state.handover.subject is not None:
        return elsewhere.by_pickle(subject)
    return elsewhere.by_name(state.loaded.spec)
