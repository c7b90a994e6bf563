"""Plans: the same in every process, and refused when they cannot be run."""

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.errors import LoadError
from forge_harness.load.plan import (
    SHAPES,
    bearer_token,
    check_plan,
    parse_shape,
    phases_at,
    read_plan,
)

from . import support

multiples = st.integers(1, 99)


def test_a_plan_survives_its_file(tmp_path):
    plan = support.plan_of(token_env="T", ca="/ca.pem", capacity=200.0)
    again = read_plan(plan.write(tmp_path))
    assert again == plan
    assert again.digest == plan.digest


def test_a_plan_takes_its_requests_with_it(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("{}\n")
    plan = support.plan_of(requests=str(file))
    written = read_plan(plan.write(tmp_path / "run"))
    assert (tmp_path / "run" / "requests.jsonl").read_text() == "{}\n"
    digest = hashlib.sha256(b"{}\n").hexdigest()
    assert written == replace(plan, requests="requests.jsonl", requests_sha256=digest)
    file.write_text("[]\n")
    assert read_plan(plan.write(tmp_path / "other")).digest != written.digest
    # Written again, it is the plan that it was.
    assert read_plan(written.write(tmp_path / "run")) == written


def test_requests_that_cannot_be_read_are_said(tmp_path):
    with pytest.raises(LoadError, match=r"request file .*none\.jsonl cannot be read"):
        support.plan_of(requests=str(tmp_path / "none.jsonl")).write(tmp_path)


def test_a_plan_without_requests_has_the_digest_it_had_in_earlier_releases():
    assert "requests_sha256" not in support.plan_of().document()


def test_the_digest_tells_plans_apart():
    plan = support.plan_of()
    others = [
        replace(plan, seed=2),
        replace(plan, slo_s=0.4),
        replace(plan, phases=plan.phases[:1]),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 4


def test_the_token_is_not_in_the_plan(monkeypatch, tmp_path):
    monkeypatch.setenv("FORGE_TEST_TOKEN", "s3cret")
    path = support.plan_of(token_env="FORGE_TEST_TOKEN").write(tmp_path)
    assert b"s3cret" not in path.read_bytes()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": "forge-load-plan/2"}'])
def test_other_files_are_no_plans(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(LoadError, match="is no load plan"):
        read_plan(path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"url": None}, "url is None"),
        ({"timeout_s": "5"}, "timeout_s is '5'"),
        ({"timeout_s": 0}, "timeout_s is 0; expected more than 0"),
        ({"concurrency": 1.5}, "concurrency is 1.5"),
        ({"slo_s": True}, "slo_s is True"),
        ({"phases": [{"name": "1x", "multiple": 1, "rate": "40", "seconds": 1}]}, "rate is '40'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_of_another_type_in_a_plan_edited_by_hand_is_said(tmp_path, changed, said):
    path = support.plan_of().write(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changed}))
    with pytest.raises(LoadError, match=said):
        read_plan(path)


def test_a_plan_of_a_later_release_with_another_field_is_still_read(tmp_path):
    path = support.plan_of().write(tmp_path)
    content = {**json.loads(path.read_bytes()), "colour": "blue"}
    path.write_text(json.dumps(content))
    assert read_plan(path) == support.plan_of()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://localhost",
        "http://",
        "http://h:port",
        "http://h:0",
        "http://[x",
        "http://h:80/a b",
        "http://h\nx:80",
        "http://h:80/\u00e9",
        "http://h:99999",
        "http://a..b:80",
        f"http://{'a' * 64}:80",
    ],
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(LoadError, match="is no address"):
        check_plan(support.plan_of(url=url))


@pytest.mark.parametrize("url", ["http://h:80?a=1", "http://h:80/#x", "http://h:80/b?"])
def test_an_address_with_what_would_not_be_sent_is_refused(url):
    with pytest.raises(LoadError, match="a query or a fragment"):
        check_plan(support.plan_of(url=url))


@pytest.mark.parametrize(
    "url", ["http://ada:s3cret@h:80", "http://s3cret@h", "http://s3cret@h:port"]
)
def test_an_address_with_a_password_is_refused_without_it(url):
    with pytest.raises(LoadError, match="a token by --token-env") as caught:
        check_plan(support.plan_of(url=url))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_line_break_after_a_token_is_none_of_it(monkeypatch, end):
    monkeypatch.setenv("FORGE_TEST_TOKEN", f"fht_abc{end}")
    assert bearer_token(support.plan_of(token_env="FORGE_TEST_TOKEN")) == "fht_abc"
    assert bearer_token(support.plan_of()) == ""


@pytest.mark.parametrize(
    "token", ["fht_\u20ac", "fht_s3cret\nX: y", "Bearer fht_s3cret", " fht_s3cret", "fht_\x7f"]
)
def test_what_no_header_can_carry_is_refused_without_it(monkeypatch, token):
    monkeypatch.setenv("FORGE_TEST_TOKEN", token)
    with pytest.raises(LoadError, match="the variable holds no token") as caught:
        bearer_token(support.plan_of(token_env="FORGE_TEST_TOKEN"))
    assert not any(part in str(caught.value) for part in ("fht_", "s3cret", "\u20ac"))


@pytest.mark.parametrize(
    ("shape", "base", "said"),
    [
        ((), 1.0, "without phases"),
        (((1, 0),), 1.0, "for 0 s"),
        (((1, 1),), 0.0, "0 requests/s"),
        (((1, 1),), float("nan"), "nan requests/s"),
        (((50, 3600),), 1000.0, "over 2000000"),
    ],
)
def test_phases_that_cannot_be_run_are_refused(shape, base, said):
    with pytest.raises(LoadError, match=said):
        check_plan(support.plan_of(shape=shape, base=base))


@given(st.lists(st.tuples(multiples, st.integers(1, 600)), min_size=1, max_size=6))
def test_phases_are_read_as_they_are_written(shape):
    text = ",".join(f"{m}x:{s}" for m, s in shape)
    assert parse_shape(text) == tuple(shape)


@pytest.mark.parametrize(
    "text", ["", "1x", "1x:", "x:3", "1x:3,", "1x:0", "-1x:3", "1x:nan", "1:inf"]
)
def test_phases_that_are_none_are_refused(text):
    with pytest.raises(LoadError, match="expected MULTIPLEx:SECONDS"):
        parse_shape(text)


@pytest.mark.parametrize("profile", SHAPES)
def test_every_profile_starts_and_ends_at_the_base_load_and_goes_to_fifty_times_it(profile):
    phases = phases_at(2.0, SHAPES[profile])
    assert [phase.multiple for phase in phases] == [1, 5, 10, 23, 50, 1]
    assert [phase.rate for phase in phases] == [2, 10, 20, 46, 100, 2]
