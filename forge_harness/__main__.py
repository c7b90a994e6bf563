"""`python -m forge_harness` is `forge-harness`."""

from forge_harness.cli import main

if __name__ == "__main__":
    main()
