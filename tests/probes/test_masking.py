"""Credentials are masked however they are spelled; what is none is left alone."""

import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.probes.masking import Masker, settled
from forge_harness.probes.secrets import PLANTED

SECRET = 'p@ss/w"ord\\2'
KEY = b"-----BEGIN " + b"PRIVATE KEY-----\nabc\ndef\n-----END " + b"PRIVATE KEY-----\n"


def test_a_private_key_of_pgp_is_masked_to_its_end():
    block = KEY.decode().replace("KEY-----", "KEY BLOCK-----")
    assert Masker({}).text(f"before\n{block}after") == "before\n***private key***\nafter"


@pytest.mark.parametrize(
    "name",
    ["DB_PASSWORD", "API_KEY", "HF_TOKEN", "FORGE_KEYRING", "AWS_SECRET_ACCESS_KEY", "MYSQL_PWD"],
)
def test_what_the_environment_names_as_a_credential_is_masked(name):
    assert Masker({name: SECRET}).text(f"({SECRET})") == f"(***{name}***)"


@pytest.mark.parametrize(
    "spelled",
    [
        quote(SECRET, safe=""),
        json.dumps(SECRET),
        repr(SECRET),
        base64.b64encode(SECRET.encode()).decode(),
        base64.urlsafe_b64encode(SECRET.encode()).decode(),
    ],
)
def test_other_spellings_are_masked(spelled):
    masked = Masker({"TOKEN": SECRET}).text(f"x {spelled} y")
    assert "***TOKEN***" in masked
    assert spelled.strip("\"'=") not in masked


@pytest.mark.parametrize(
    ("name", "value"),
    [("HOME", "/home/ada/secret"), ("PWD", "/some/where"), ("API_KEY", "12345"), ("TOKEN", "")],
)
def test_other_values_are_left_alone(name, value):
    text = f"{name} is {value}"
    assert Masker({name: value}).text(text) == text


def test_a_file_that_holds_a_secret_may_be_named(tmp_path):
    file = tmp_path / "ring.json"
    environ = {"FORGE_KEYS": str(file)}
    assert "***" in Masker(environ).text(f"{file} is not there")
    file.write_text("{}")
    assert Masker(environ).text(f"{file} is damaged") == f"{file} is damaged"


def test_the_longest_value_wins():
    masker = Masker({"A_TOKEN": "secret-1", "B_TOKEN": "secret-12345"})
    assert masker.text("secret-12345 secret-1") == "***B_TOKEN*** ***A_TOKEN***"


@pytest.mark.parametrize("name", ["b.note", "c.note", "d.note"])
def test_known_forms_are_masked_without_a_variable(name):
    masked = Masker({}).text(f"got {PLANTED[name]} there")
    assert masked.startswith("got ***")
    assert PLANTED[name][:12] not in masked


def test_a_token_of_ours_is_masked_without_a_variable():
    token = "fht_" + "aB3-_" * 8 + "xyz"
    assert Masker({}).text(f"b'Bearer {token}\\n'") == "b'Bearer ***Forge token***\\n'"
    assert Masker({}).text("fht_... is how one begins") == "fht_... is how one begins"


def test_a_private_key_is_masked_to_its_end():
    assert Masker({}).data(b"a\n" + KEY + b"b\n") == b"a\n***private key***\nb\n"


@given(before=st.binary(max_size=30), cut=st.integers(0, len(KEY)))
def test_output_in_two_parts_is_masked_like_output_in_one(before, cut):
    masker = Masker({})
    before = before.replace(b"-", b"") + b"\n"
    whole = before + KEY + b"after\n"
    first = whole[: len(before) + cut]
    ready = settled(first)
    assert masker.data(first[:ready]) + masker.data(whole[ready:]) == masker.data(whole)


def test_bytes_that_are_no_text_stay():
    assert Masker({"TOKEN": "abcdefgh"}).data(b"\xff\xfe abcdefgh") == b"\xff\xfe ***TOKEN***"
