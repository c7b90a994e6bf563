"""The judge's answer for stores whose state is known."""

import pytest

from forge_harness.drill import workload
from forge_harness.drill.children import Session, session_of
from forge_harness.drill.judge import judge
from forge_harness.drill.tally import Result
from forge_harness.drill.target import OWN_STORE, open_store

SHAPE = "mixed"


@pytest.fixture
def root(tmp_path):
    with open_store(OWN_STORE, tmp_path / "store") as store:
        for round_ in range(3):
            store.commit(workload.states(0, round_, SHAPE))
    return tmp_path / "store"


def said(acked, begun):
    return Session(0, list(range(1, begun + 1)), {r: r + 1 for r in range(1, acked + 1)})


@pytest.mark.parametrize(
    ("acked", "begun", "result"),
    [
        (2, 2, Result.OLD),
        (1, 2, Result.NEW),
        (1, 1, Result.TORN),  # It shows a round nobody began.
        (3, 3, Result.LOST),
        (2, 3, Result.OLD),
    ],
)
def test_what_was_promised_decides(root, acked, begun, result):
    assert judge(OWN_STORE, root, said(acked, begun), seed=0, shape=SHAPE).result is result


def test_half_a_commit_is_torn(root):
    with open_store(OWN_STORE, root) as store:
        store.commit(workload.states(0, 3, SHAPE)[:1])
    found = judge(OWN_STORE, root, said(2, 3), seed=0, shape=SHAPE)
    assert found.result is Result.TORN


def test_a_missing_content_is_unrecoverable(root):
    for path in (root / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    found = judge(OWN_STORE, root, said(2, 2), seed=0, shape=SHAPE)
    assert found.result is Result.UNRECOVERABLE
    assert "DamagedStateError" in found.message


def test_only_whole_lines_are_believed():
    session = session_of(b"begin 1\nack 1 2\nbegin 2\nerror 2 StateError: full\nbegin 3\nack 3")
    assert session.acked == {1: 2}
    assert session.begun == [1, 2, 3]
    assert session.allowed() == [3, 2, 1]
    assert session.errors == ["2 StateError: full"]
