"""The command line. `main` is the entry point of `forge-harness`."""

from __future__ import annotations

from forge_harness.cli.app import app, main

__all__ = ["app", "main"]
