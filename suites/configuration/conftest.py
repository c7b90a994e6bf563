"""What the configuration checks share."""

import pytest

from .support import Isolated, keys_of


@pytest.fixture
def alone(subject, tmp_path):
    """The subject's configuration, loaded from the layers a check gives and nothing else."""
    return Isolated(subject, tmp_path / "empty.toml")


@pytest.fixture
def keys(subject):
    """Every key of the subject's configuration schema."""
    found = keys_of(subject.config_schema())
    assert found, "the configuration schema has no keys"
    return found
