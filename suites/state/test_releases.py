"""Stores of other releases: old ones migrate, newer ones are left alone."""

import pytest

from .support import campaign


@pytest.mark.forge_check("state.migration_golden")
def test_migration_golden(subject, evidence, forge_profile, forge_seed):
    """Each old store migrates and shows what it held; killed at any call, it does so afterwards.

    Oracle: digests written down when the old store was made.
    """
    campaign("migration", subject, evidence, profile=forge_profile, seed=forge_seed)


@pytest.mark.forge_check("state.newer_schema_refused")
def test_newer_schema_refused(subject, evidence, forge_profile, forge_seed):
    """A store of a later schema is refused by name, and every file of it stays as it was."""
    campaign("newer_schema", subject, evidence, profile=forge_profile, seed=forge_seed)
