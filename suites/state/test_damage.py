"""Files that are not what was written: every wrong byte is reported or harmless."""

import pytest

from .support import campaign


@pytest.mark.forge_check("state.bit_flips")
def test_bit_flips(subject, evidence, forge_profile, forge_seed):
    """No flipped bit in contents, index or write-ahead log makes a state read back wrong unnoticed.

    What is read after a flip is compared with the bytes that were committed. An earlier generation,
    whole, is counted apart: a damaged end of a log looks like a commit that never ended.
    """
    report = campaign("bit_flips", subject, evidence, profile=forge_profile, seed=forge_seed)
    _shares(report, evidence)


@pytest.mark.forge_check("state.truncation_and_swap")
def test_truncation_and_swap(subject, evidence, forge_profile, forge_seed):
    """Files cut at each class of length, zeroed, lengthened, aged, removed or swapped are found."""
    report = campaign("swaps", subject, evidence, profile=forge_profile, seed=forge_seed)
    _shares(report, evidence)


def _shares(report, evidence):
    for what in ("detected", "harmless", "rolled back"):
        evidence.record(
            what.replace(" ", "_"),
            report.details.get(what, 0),
            unit="trials",
            reason="of the trials; none is wrong",
        )
    evidence.at_least(
        "reported",
        report.details.get("detected", 0),
        limit=1,
        unit="trials",
        reason="damage that is never reported is not looked for",
    )
