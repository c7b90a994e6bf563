"""Child program: opens a store, which migrates and recovers it, and prints what it shows as JSON.

python -m forge_harness.drill.storage_opener ROOT OPENER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from forge_harness.drill import workload
from forge_harness.drill.target import open_store


def main() -> int:
    """Prints `{"view": ..., "problems": [...]}`; returns the exit status."""
    root, opener = Path(sys.argv[1]), sys.argv[2]
    try:
        with open_store(opener, root, create=False) as store:
            shown = workload.seen(store)
            problems = [f"{p.where}: {p.what}" for p in store.verify(deep=True).problems]
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)  # noqa: T201
        return 1
    print(json.dumps({"view": shown, "problems": problems}), flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    os._exit(main())
