"""The Power of Ten, adapted to Python and C++: counted, not certified."""

from pathlib import Path

import pytest

from forge_harness.paths import own_sources
from forge_harness.power_of_ten import assess, documentation


@pytest.mark.forge_check("security.power_of_ten")
def test_power_of_ten(forge_config, policy, evidence):
    """The ten rules hold over the sources: the harness's own, or those `paths.sources` names.

    A rule is 1 - broken / opportunities, a category of the compliance table the mean of its rules.
    A file that cannot be parsed scores zero. Where a tool is not installed, or refuses, nobody
    looked at the code: the check is not measured.
    """
    roots = tuple(Path(text) for text in forge_config.paths.sources) or own_sources()
    found = assess(roots)
    evidence.record("files", found.files, unit="files", reason=", ".join(map(str, roots)))
    lost = {
        m.tool: f"{m.tool} ({m.missing})"
        for rule in found.rules
        for m in rule.measures
        if m.missing
    }
    for rule in found.rules:
        if rule.score is not None:
            evidence.record(
                f"rule_{rule.rule}",
                float(rule.score),
                reason=f"{len(rule.places)} broken of {rule.opportunities} opportunities",
            )
    for category in found.categories:
        if category.score is not None:
            name = category.name.lower().replace(" ", "_")
            evidence.record(
                name, float(category.score), reason=f"lowest rule {float(category.lowest):.3f}"
            )
    documented = documentation(roots)
    evidence.record(
        "documented_share",
        documented.share,
        reason=f"docstrings of {documented.definitions} modules and public definitions",
    )
    if lost:
        absent = any("not installed" in reason for reason in lost.values())
        remedy = "; pip install 'bitnet-forge-harness[checks]'" if absent else ""
        pytest.skip(f"not counted by {', '.join(lost.values())}{remedy}")
    evidence.at_least(
        "power_of_ten",
        float(found.mean or 0),
        limit=policy.threshold("security.power_of_ten.at_least"),
        reason="mean of the categories; places: forge-harness power-of-ten --explain RULE",
    )
    evidence.at_least(
        "lowest_category",
        float(found.lowest or 0),
        limit=policy.threshold("security.power_of_ten_lowest.at_least"),
        reason="no category is bought with another",
    )
