"""Forge Harness."""
