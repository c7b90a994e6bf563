"""The task whose model speed and memory are measured on."""

from __future__ import annotations

from typing import Any

import pytest


def largest_task(subject: Any) -> str:
    """Returns the task with the largest model; not measured where the subject names none."""
    tasks = subject.tasks() if callable(getattr(subject, "tasks", None)) else ()
    if not tasks:
        pytest.skip("the subject does not name its tasks (BuildsModel.tasks)")
    return max(tasks, key=lambda task: subject.model_spec(task).parameters)
