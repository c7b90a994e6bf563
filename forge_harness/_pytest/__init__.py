"""Parts of the pytest plugin; `forge_harness.plugin` puts them together."""
