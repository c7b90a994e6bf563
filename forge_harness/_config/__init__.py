"""The parts of `forge_harness.config`; import that module instead."""
