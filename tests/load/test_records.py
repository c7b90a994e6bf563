"""Records: nothing is lost on the way through a file, and the books notice what is."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness.errors import LoadError
from forge_harness.load.records import Fate, Record, account, parse_line, read_records

from . import support

moments = st.none() | st.floats(0, 1e4).map(lambda t: round(t, 6))
made = st.builds(
    Record,
    index=st.integers(0, 10**6),
    intended=st.floats(0, 1e4).map(lambda t: round(t, 6)),
    kind=st.integers(0, 100),
    sent=moments,
    first=moments,
    done=moments,
    status=st.none() | st.integers(100, 599),
    fate=st.sampled_from(Fate),
    request_id=st.text(max_size=40),
    size=st.integers(0, 10**9),
    detail=st.text(max_size=40),
)


@given(made)
def test_a_record_survives_its_line(record):
    line = record.line()
    assert "\n" not in line
    assert parse_line(line) == record


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", '"ok"', "null", '{"index": 1}'])
def test_other_lines_are_no_records(line):
    with pytest.raises(ValueError, match=r"no record|Expecting"):
        parse_line(line)


def test_an_unknown_class_is_no_record():
    line = support.served(support.plan_of())[0].line().replace('"ok"', '"fine"')
    with pytest.raises(ValueError, match="fine"):
        parse_line(line)


@settings(max_examples=50)
@given(st.data())
def test_the_account_has_each_request_once_whatever_was_written(data):
    due = [0.1 * i for i in range(20)]
    whole = [Record(i, t, 0, fate=Fate.OK) for i, t in enumerate(due)]
    written = data.draw(st.lists(st.sampled_from(whole)))
    foreign = [replace(whole[3], intended=7.0), Record(20, 2.0, 0), Record(-1, 0.1, 0)]
    strange = data.draw(st.lists(st.sampled_from(foreign)))
    books = account(data.draw(st.permutations(written + strange)), due, [0] * 20)
    assert [r.index for r in books.records] == list(range(20))
    indices = {r.index for r in written}
    assert books.missing == 20 - len(indices)
    assert books.duplicated == len(written) - len(indices)
    assert books.foreign == len(strange)
    assert books.count(Fate.CENSORED) == books.missing
    assert books.balanced == (len(written) == 20 and books.missing == 0 and not strange)


def test_a_line_cut_off_by_a_kill_is_left_out_and_found_missing(tmp_path):
    records = support.served(support.plan_of())
    directory = support.write_run(tmp_path, support.plan_of(), records)
    file = directory / "records-0.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert len(read_records(directory)) == len(records) - 1


def test_a_damaged_line_in_the_middle_is_said_with_its_number(tmp_path):
    directory = support.write_run(tmp_path, support.plan_of(), support.served(support.plan_of()))
    file = directory / "records-0.jsonl"
    lines = file.read_text().split("\n")
    lines[4] = lines[4][:30]
    file.write_text("\n".join(lines))
    with pytest.raises(LoadError, match="line 5"):
        read_records(directory)


def test_a_directory_without_records_is_refused(tmp_path):
    with pytest.raises(LoadError, match=r"holds no records-\*\.jsonl"):
        read_records(tmp_path)


def test_times_without_an_answer_are_infinite():
    record = Record(0, 1.0, 0, sent=1.5, done=4.0, status=None)
    assert math.isinf(record.response_s)
    assert math.isinf(record.service_s)
    record.status = 200
    assert (record.response_s, record.service_s, record.lateness_s) == (3.0, 2.5, 0.5)
    assert Record(0, 1.0, 0).lateness_s is None


@pytest.mark.parametrize("line", ["[]", "3", "null", '"x"', "[" * 100_000])
def test_a_line_that_is_json_and_no_record_is_refused(line):
    with pytest.raises(ValueError, match="no record"):
        parse_line(line)


@pytest.mark.parametrize(
    ("key", "value"),
    [("index", "x"), ("kind", None), ("intended", None), ("done", "1"), ("status", [200]),
     ("sent", math.nan), ("bytes", 1.5)],
)  # fmt: skip
def test_a_value_of_another_type_is_no_record(key, value):
    content = json.loads(Record(1, 0.5, 0, sent=0.5, done=0.75, status=200).line())
    parse_line(json.dumps(content))
    with pytest.raises(ValueError, match="no record"):
        parse_line(json.dumps({**content, key: value}))


def test_records_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "records-0.jsonl").write_bytes(b"\xff\xfe\n" * 3)
    with pytest.raises(LoadError, match=r"records-0\.jsonl is no text"):
        read_records(tmp_path)
