"""The waiver file."""

from __future__ import annotations

import pytest

from forge_harness.errors import ConfigError
from forge_harness.waivers import load_waivers

GOOD = """
[[waiver]]
check = "a.x"
owner = "kim"
reason = "upstream bug"
issue = "#7"
expires = 2026-12-31
"""


def test_dates_may_be_toml_dates_or_text(tmp_path):
    file = tmp_path / "waivers.toml"
    file.write_text(GOOD + GOOD.replace("2026-12-31", '"2027-01-01"'), encoding="utf-8")
    assert [waiver.expires for waiver in load_waivers(file)] == ["2026-12-31", "2027-01-01"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('owner = "kim"\n', ""), "waiver 1: owner: Field required"),
        *(
            (("2026-12-31", text), f"waiver 1: expires is {value}; expected a day such as 2026-")
            for text, value in (
                ('"soon"', "'soon'"),
                ('"2026-13-01"', "'2026-13-01'"),
                ('"20261231"', "'20261231'"),
                ("2026-12-31T10:00:00Z", "'2026-12-31T10:00:00.00:00'"),
                ("20261231", "20261231"),
            )
        ),
        (("[[waiver]]", "[[waivers]]"), "Unknown table 'waivers'. Did you mean 'waiver'"),
        (("[[waiver]]", "[[waiver"), "is not valid TOML"),
        (
            ("[[waiver]]", "[waiver]"),
            r"waiver is a table; expected a list of tables \[\[waiver\]\]",
        ),
        ((GOOD, "waiver = 3\n"), "waiver is 3; expected a list of tables"),
        ((GOOD, "waiver = ['a']\n"), "waiver 1 is 'a'; expected a table"),
        (('"kim"', '""'), "waiver 1: owner is empty; expected text"),
        (('"kim"', '" "'), "waiver 1: owner is empty; expected text"),
        (('"upstream bug"', '""'), "waiver 1: reason is empty; expected text"),
        (('"a.x"', '""'), "waiver 1: check is empty; expected text"),
        (("owner =", "ownr ="), "waiver 1: Unknown key 'ownr'. Did you mean 'owner'"),
    ],
)
def test_a_bad_waiver_is_one_sentence(tmp_path, change, message):
    file = tmp_path / "waivers.toml"
    file.write_text(GOOD.replace(*change), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_waivers(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read .*gone\.toml"):
        load_waivers(tmp_path / "gone.toml")
