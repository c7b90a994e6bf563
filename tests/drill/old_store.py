"""Makes a store of schema 2, the way the release before wrote it: no contents in the index."""

import contextlib
import json
import sqlite3

from forge_harness.canonical import sha256_hex
from forge_harness.drill import workload
from forge_harness.drill.target import OWN_STORE, open_store
from forge_harness.state import migrations
from forge_harness.state.schema import APPLICATION_ID


def write_schema_2(directory, name="schema-2"):
    """Writes `directory/name` and, beside it, what it shows."""
    root = directory / name
    with open_store(OWN_STORE, directory / "now") as store:
        for round_ in range(2):
            store.commit(workload.states(0, round_, "mixed"), note=f"round {round_}")
        contents = [
            store.read(state, file)
            for generation in (1, 2)
            for state in store.list(generation=generation)
            for file in state.files
        ]
        view = workload.seen(store)
        rows = list(
            store._opened().connection.execute("SELECT number, digest, manifest FROM generation")
        )
    for content in contents:
        digest = sha256_hex(content)
        path = root / "objects" / digest[:2] / digest
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "tmp").mkdir()
    with contextlib.closing(sqlite3.connect(root / "index.db")) as connection:
        connection.executescript(migrations._LAYOUT_2)
        connection.executemany("INSERT INTO generation VALUES (?, ?, ?)", rows)
        objects = {sha256_hex(content): len(content) for content in contents}
        connection.executemany("INSERT INTO object VALUES (?, ?, x'')", objects.items())
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 2")
        connection.commit()
    (directory / f"{name}.json").write_text(json.dumps(view))
    return root
