"""Which of the checks in scope one of several jobs runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.errors import UsageError, several
from forge_harness.policy import CatalogueEntry, load_policy
from forge_harness.sharding import STUDY_CAPABILITY, Shard, parse_shard, shard_of
from forge_harness.types import Profile, Severity


def entry(suite: str, number: int, timeout_s: float = 120.0, *, study: bool = False):
    return CatalogueEntry(
        id=f"{suite}.c{number}",
        title="holds",
        suite=suite,
        severity=Severity.HIGH,
        component="c",
        timeout_s=timeout_s,
        requires=(STUDY_CAPABILITY,) if study else (),
    )


@st.composite
def catalogues(draw):
    drawn = draw(
        st.lists(
            st.tuples(st.sampled_from("abcdef"), st.sampled_from([60.0, 120.0, 900.0])),
            min_size=1,
            max_size=30,
        )
    )
    studies = draw(st.sets(st.integers(0, len(drawn) - 1)))
    return [entry(s, n, t, study=n in studies) for n, (s, t) in enumerate(drawn)]


@given(catalogues(), st.integers(1, 8))
def test_every_check_is_in_exactly_one_shard(entries, count):
    units = {STUDY_CAPABILITY if e.requires else e.suite for e in entries}
    if count > len(units):
        with pytest.raises(UsageError, match=f"choose at most {several(len(units), 'shard')}\\."):
            shard_of(entries, Shard(1, count))
        return
    shards = [shard_of(entries, Shard(i + 1, count)) for i in range(count)]
    assert all(shards)
    assert sorted(e.id for shard in shards for e in shard) == sorted(e.id for e in entries)
    for shard in shards:
        assert list(shard) == [e for e in entries if e in shard]


@given(catalogues(), st.integers(1, 3))
def test_what_shares_a_costly_set_up_stays_together(entries, count):
    try:
        shards = [shard_of(entries, Shard(i + 1, count)) for i in range(count)]
    except UsageError:
        return
    for key in (lambda e: bool(e.requires), lambda e: e.suite if not e.requires else None):
        for value in {key(e) for e in entries} - {None, False}:
            assert sum(any(key(e) == value for e in shard) for shard in shards) == 1


def test_the_longest_goes_first_to_who_has_least_to_do():
    entries = [entry("a", 1, 100), entry("b", 2, 90), entry("c", 3, 80), entry("d", 4, 70)]
    shards = [[e.suite for e in shard_of(entries, Shard(i, 2))] for i in (1, 2)]
    assert shards == [["a", "d"], ["b", "c"]]


def test_no_shard_of_the_shipped_suites_holds_half_of_them():
    entries = load_policy().in_scope(Profile.QUICK)
    for index in (1, 2, 3):
        limits = sum(e.timeout_s for e in shard_of(entries, Shard(index, 3)))
        assert 0.25 < limits / sum(e.timeout_s for e in entries) < 0.45


@pytest.mark.parametrize(
    "text", ["", "2", "0/3", "4/3", "1/0", "1/2/3", "a/b", "1 /2", "-1/2", "01/2"]
)
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(UsageError, match="expected 1/N to N/N, for example 2/3"):
        parse_shard(text)


def test_a_shard_reads_and_writes_itself():
    assert (parse_shard("2/3"), str(Shard(2, 3))) == (Shard(2, 3), "2/3")
    assert [Shard(i, 2).is_first for i in (1, 2)] == [True, False]
