"""What the data checks share."""

from __future__ import annotations

from typing import Any


def tasks_of(subject: Any) -> list[str]:
    """Returns the subject's task names, or one placeholder when it names none."""
    return list(subject.tasks()) if hasattr(subject, "tasks") else ["default"]
