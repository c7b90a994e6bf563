"""JSON is read so that no two readers can take it differently."""

from __future__ import annotations

import pytest

from forge_harness.canonical import canonical_json, json_fault, read_canonical


@pytest.mark.parametrize(
    "value", [{"a": [1, 1.5, 1e16, 2**53 - 1, None, True]}, {}, [], "é", 1e300]
)
def test_what_was_written_is_read(value):
    assert read_canonical(canonical_json(value)) == value
    assert canonical_json(read_canonical(canonical_json(value))) == canonical_json(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' is there twice"),
        (b'[{"x": {"deep": 1, "deep": 1}}]', "key 'deep' is there twice"),
        (b'{"a": 1, "\\u0061": 2}', "key 'a' is there twice"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b"[1e999]", "number 1e999 is beyond float64"),
        (b"[1" + b"0" * 400 + b"]", "is beyond float64"),
        (b"{", "Expecting property name"),
        ('{"a": 1}'.encode("utf-16"), "can't decode"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": "\xff"}', "can't decode"),
    ],
)
def test_what_two_readers_could_take_differently_is_refused(text, words):
    with pytest.raises(ValueError, match=r".") as error:
        read_canonical(text)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b" \n", "it is empty"),
        (b'{"a":\n x}', "from line 2, column 2 on it cannot be read as JSON"),
        (b'{"a": "\xff"}', "it is not text in UTF-8"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"a": 1, "a": 2}', "key 'a' is there twice"),
    ],
)
def test_what_is_wrong_with_a_text_is_said_in_words(text, words):
    with pytest.raises((ValueError, RecursionError)) as error:
        read_canonical(text)
    assert json_fault(error.value) == words
