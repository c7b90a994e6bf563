"""What one pytest process knows: options, marks, policy, subject. Everything heavy is lazy."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import uuid
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from forge_harness._pytest.marks import CheckMark, resolve
from forge_harness._pytest.options import Options, read_options

if TYPE_CHECKING:
    from forge_harness._pytest.inprocess import Handover
    from forge_harness.config import HarnessConfig, LoadedConfig
    from forge_harness.policy import CatalogueEntry, Policy
    from forge_harness.record import Waiver
    from forge_harness.sharding import Shard
    from forge_harness.subject.loader import LoadedSubject

COLLECTED = "collected.json"
SUBJECT = "subject.json"


class ForgeState:
    """State of the plugin in one pytest process (controller or xdist worker)."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.options: Options = read_options(config)
        self.handover: Handover | None = config.pluginmanager.get_plugin("forge_handover")
        self.shared = _shared_directory(config)
        self.marks: dict[str, CheckMark] = {}
        self._defining: dict[str, CheckMark] = {}
        """Marks of inline checks, also of those not selected: which checks there are, and with
        them the digest of the policy, does not depend on what of them runs."""
        self.problem: str | None = None
        """What a worker found wrong with the user's files; the controller refuses to go on."""
        self.catalogues: tuple[Path, ...] = ()
        self.compares_times = False
        """Whether a test of the session does, which then waits until the other workers pause."""
        self._is_single_threaded = False

    @property
    def is_worker(self) -> bool:
        """Whether this process is an xdist worker."""
        return hasattr(self.config, "workerinput")

    @cached_property
    def _loaded_config(self) -> LoadedConfig:
        from forge_harness.config import load_config

        return load_config(file=self.options.config)

    @property
    def harness_config(self) -> HarnessConfig:
        """The configuration: file, environment, defaults (flags are the `--forge` options)."""
        if self.handover is not None and self.handover.config is not None:
            return self.handover.config
        return self._loaded_config.config

    @cached_property
    def profile(self) -> str:
        """The profile of the run."""
        return self.options.profile or str(self.harness_config.run.profile)

    @property
    def shard(self) -> Shard | None:
        """The part of the profile that is run; None for all of it.

        Raises:
            UsageError: The option is not I/N.
        """
        if self.options.shard is None:
            return None
        from forge_harness.sharding import parse_shard

        return parse_shard(self.options.shard)

    @cached_property
    def shard_checks(self) -> frozenset[str]:
        """The checks of the shard, under the policy after collection.

        Raises:
            UsageError: The option is not I/N, or the shard would be empty.
        """
        from forge_harness.sharding import shard_of
        from forge_harness.types import Profile

        assert self.shard is not None
        entries = self.policy.in_scope(Profile(self.profile))
        return frozenset(entry.id for entry in shard_of(entries, self.shard))

    @cached_property
    def seed(self) -> int:
        """The seed of the run."""
        if self.options.seed is not None:
            return self.options.seed
        return int(self.harness_config.run.seed)

    @cached_property
    def subject_spec(self) -> str:
        """What `load_subject` is given."""
        if self.options.subject:
            return self.options.subject
        handed = self.handover is not None and self.handover.config is not None
        configured = self.harness_config.run.subject if handed else self._loaded_config.subject
        return configured or "reference"

    @cached_property
    def policy_file(self) -> Path | None:
        """The policy laid over the shipped one."""
        return self.options.policy or self._configured_path("run.policy")

    @cached_property
    def waivers(self) -> list[Waiver]:
        """The waivers in force.

        Raises:
            ConfigError: The file cannot be read.
        """
        file = self.options.waivers or self._configured_path("run.waivers")
        if file is None:
            return []
        from forge_harness.waivers import load_waivers

        return load_waivers(file)

    @cached_property
    def check_timeout_s(self) -> float:
        """Longest time one check may take, in seconds; 0 leaves the catalogue's limits."""
        if self.options.timeout_s is not None:
            return self.options.timeout_s
        return float(self.harness_config.run.timeout_s)

    @cached_property
    def declared(self) -> dict[str, str]:
        """Configuration values that not-applicable predicates read."""
        return dict(self.harness_config.declared)

    @cached_property
    def loaded(self) -> LoadedSubject:
        """The subject, loaded on first use.

        Raises:
            SubjectError: It cannot be loaded.
        """
        subject = self.handover.loaded() if self.handover is not None else None
        if subject is None:
            from forge_harness.subject.loader import load_subject

            subject = load_subject(self.subject_spec)
        self.single_thread()
        self._publish_subject(subject)
        return subject

    def single_thread(self) -> None:
        """Makes torch, once it is there, use one thread.

        Sums then do not depend on how many workers share the cores.
        """
        torch = sys.modules.get("torch")
        if torch is not None and not self._is_single_threaded:
            torch.set_num_threads(1)
            self._is_single_threaded = True

    @cached_property
    def policy(self) -> Policy:
        """The policy with the user's catalogues and inline checks; complete after collection."""
        from forge_harness.selection import InlineCheck, build_policy

        inline = [
            InlineCheck(mark.check, str(mark.title), str(mark.severity), mark.component)
            for mark in self._defining.values()
        ]
        return build_policy(self.policy_file, self.catalogues, inline)

    def _configured_path(self, key: str) -> Path | None:
        # A session in this process is told everything; it reads no file of the directory it is in.
        return None if self.handover is not None else self._loaded_config.path(key)

    def entry(self, check: str) -> CatalogueEntry | None:
        """Returns the catalogue entry of a check."""
        return self.policy.by_id.get(check)

    def set_collected(self, marks: dict[str, CheckMark], catalogues: tuple[Path, ...]) -> None:
        """Takes what collection found and checks each mark against the catalogues."""
        from forge_harness.policy import load_policy
        from forge_harness.selection import build_policy

        self.catalogues = catalogues
        entries = build_policy(self.policy_file, catalogues).by_id.values()
        known = {entry.id: (entry.title, entry.severity.value) for entry in entries}
        self.marks = resolve(marks, known, load_policy().by_id)
        self._defining = {
            nodeid: mark
            for nodeid, mark in self.marks.items()
            if mark.is_inline and mark.problem is None
        }
        self._forget_policy()

    def _forget_policy(self) -> None:
        """Collection adds checks to the policy, and thereby to the shards."""
        for name in ("policy", "shard_checks"):
            self.__dict__.pop(name, None)

    def publish_collected(self) -> None:
        """Leaves what was collected where the controller finds it."""
        document = {
            "marks": {nodeid: mark.to_json() for nodeid, mark in self.marks.items()},
            "defining": {nodeid: mark.to_json() for nodeid, mark in self._defining.items()},
            "catalogues": [str(path) for path in self.catalogues],
            "problem": self.problem,
        }
        self._publish(COLLECTED, document)

    def adopt_collected(self) -> None:
        """Takes over what the workers collected; the controller of xdist collects nothing."""
        document = self._published(COLLECTED)
        if document is None or self.marks:
            return
        self.marks = _marks(document["marks"])
        self._defining = _marks(document["defining"])
        self.catalogues = tuple(Path(path) for path in document["catalogues"])
        self.problem = document["problem"]
        self._forget_policy()

    def published_subject(self) -> dict[str, Any] | None:
        """Returns name, spec, capabilities and digest of the subject, if a process loaded it."""
        return self._published(SUBJECT)

    def _publish_subject(self, subject: LoadedSubject) -> None:
        document = {
            "spec": subject.spec,
            "name": subject.name,
            "capabilities": sorted(subject.capabilities),
            "digest": subject.digest,
        }
        self._publish(SUBJECT, document)

    def _publish(self, name: str, document: dict[str, Any]) -> None:
        target = self.shared / name
        if target.exists():
            return
        self.shared.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = target.with_name(f".{name}.{os.getpid()}")
        partial.write_text(json.dumps(document), encoding="utf-8")
        partial.replace(target)

    def _published(self, name: str) -> dict[str, Any] | None:
        try:
            document: dict[str, Any] = json.loads((self.shared / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return document


def _marks(values: dict[str, dict[str, Any]]) -> dict[str, CheckMark]:
    return {nodeid: CheckMark(**mark) for nodeid, mark in values.items()}


STATE = pytest.StashKey[ForgeState]()


def state_of(config: pytest.Config) -> ForgeState:
    """Returns the plugin's state of a pytest session."""
    return config.stash[STATE]


def _shared_directory(config: pytest.Config) -> Path:
    """Returns a directory all processes of the session share; it is made when first written to.

    A pytest run without checks, in any project of the environment, leaves nothing behind.
    """
    given = getattr(config, "workerinput", {}).get("forge_shared")
    if given is not None:
        return Path(given)
    events = config.getoption("forge_events")
    if events is not None:
        # Whoever started the session made this directory, and removes it also after a kill.
        return Path(events).absolute().parent / "shared"
    return Path(tempfile.gettempdir()) / f"forge-harness-{uuid.uuid4().hex}"
