from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module

import pytest

from forge_harness.paths import suites_dir

# A session in this process forgets what it imported; these cost it about 1 s each time.
for module in (
    *("config", "scoring", "integration.recording", "subject.loader"),
    *("selection", "sharding", "_pytest.keeper", "_pytest.summary"),
):
    import_module(f"forge_harness.{module}")
# These cannot be imported twice: what a session forgot would be lost for all tests after it.
import_module("torch")
import_module("numpy")

# Others of the environment cost time only: Hypothesis takes 1 s to import, in each session.
PLUGINS = ("--disable-plugin-autoload", "-p", "forge_harness", "-p", "xdist", "-p", "timeout")

TOY = '''
class Toy:
    """Offers Packs and nothing else."""

    name = "toy"
    scale = 1.0

    def pack(self, codes): ...
    def unpack(self, packed, rows): ...
'''


@dataclass
class Told:
    """What a session told through its events file."""

    status: int
    items: dict[str, dict]
    """Test name -> item record."""
    collected: dict[str, dict]
    finished: dict | None
    output: str

    def outcome(self, name):
        return self.items[name]["outcome"]

    def reason(self, name):
        return self.items[name]["reason"]


def read_events(path):
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


@pytest.fixture
def session(pytester):
    """Runs pytest with the settings of the suites on one test file."""
    pytester.makepyfile(toy=TOY)

    def run(source=None, *options, subprocess=False, keep_files=False):
        if not keep_files:
            pytester.makepyfile(test_it=f"import pytest\n{source}")
        ini = ("-c", str(suites_dir() / "pytest.ini"), "--rootdir", str(pytester.path))
        subject = ("--forge-subject", "toy.py:Toy", *PLUGINS)
        runner = pytester.runpytest_subprocess if subprocess else pytester.runpytest_inprocess
        files = [] if any(str(option).endswith(".py") for option in options) else ["test_it.py"]
        return runner(*ini, *subject, *options, *files)

    return run


@pytest.fixture
def told(session, pytester):
    """Runs a session and returns what it told."""

    def run(source=None, *options, **settings):
        path = pytester.path / "events.jsonl"
        path.unlink(missing_ok=True)
        result = session(source, "--forge-events", str(path), *options, **settings)
        events = read_events(path)
        items = [event["record"] for event in events if event["event"] == "item"]
        names = [item["nodeid"].rpartition("::")[2] for item in items]
        assert len(set(names)) == len(names), "an item was told twice"
        marks = [event["marks"] for event in events if event["event"] == "collected"]
        finished = [event for event in events if event["event"] == "finished"]
        return Told(
            int(result.ret),
            dict(zip(names, items, strict=True)),
            marks[-1] if marks else {},
            finished[-1] if finished else None,
            result.stdout.str() + result.stderr.str(),
        )

    return run


CHECK = '@pytest.mark.forge_check("mine.{name}", title="It", severity="{severity}")'


def check(name, severity="high"):
    """Returns the decorator of an inline check."""
    return CHECK.format(name=name, severity=severity)
