"""`forge-harness serve` with one behaviour changed.

    python -m forge_harness.drill.careless_server DEFECT ARGUMENTS...

What follows DEFECT is what follows `forge-harness serve`. The defect is put in by replacing what
the server is made of, before its command is imported: a server is a process of its own, and only
its command line reaches it.
"""

from __future__ import annotations

import runpy
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from torch import Tensor

from forge_harness.imports import python_program
from forge_harness.model.decoder import CachedDecoder
from forge_harness.model.generate import Picker
from forge_harness.security import tokens
from forge_harness.security.access import Access, Permission, Principal
from forge_harness.security.audit_events import AuditEvent, Decision
from forge_harness.security.tokens import TokenStore
from forge_harness.serving import completer, routes, server, tls
from forge_harness.serving.batcher import BatchScheduler
from forge_harness.serving.guard import Guard
from forge_harness.serving.jobs import Delivery, Job
from forge_harness.serving.streaming import text_of


def speaks_tls_1_2() -> None:
    """The lowest version is the one before TLS 1.3, for older clients."""
    make = tls.server_context

    def context(certificate: Path, key: Path) -> ssl.SSLContext:
        made = make(certificate, key)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        return made

    _put(tls, "server_context", context)
    _put(server, "server_context", context)


def lets_every_role_do_everything() -> None:
    """Whoever is known may do what is asked for."""
    _put(Access, "require", lambda self, principal, permission: None)


def leaves_metrics_out_of_the_table() -> None:
    """A route that was added later, which nobody gave a permission, is open."""
    principal, require = Guard.principal, Guard.require
    metrics = Permission("metrics", "read")

    def anybody(self: Guard, authorization: str | None, permission: Permission) -> Principal:
        try:
            return principal(self, authorization, permission)
        except Exception:  # the defect: whatever refuses a caller is passed over
            if permission != metrics:
                raise
            return Principal("somebody", frozenset())

    def anything(self: Guard, who: Principal, permission: Permission) -> None:
        if permission != metrics:
            require(self, who, permission)

    _put(Guard, "principal", anybody)
    _put(Guard, "require", anything)


def takes_expired_tokens() -> None:
    """The end of a token is written down and not looked at."""
    authenticate = TokenStore.authenticate

    def forgiving(
        self: TokenStore, secret: str, *, audience: str, now: datetime | None = None
    ) -> Principal:
        self._refresh()
        found = self._by_hash.get(tokens._hash(self._keys[0], secret)) if secret else None
        if found is not None and found.revoked_at is None and found.audience == audience:
            return Principal(found.name, frozenset(found.roles))
        return authenticate(self, secret, audience=audience, now=now)

    _put(TokenStore, "authenticate", forgiving)


def takes_tokens_of_other_services() -> None:
    """Whom a token is for is not looked at, as where `aud` is not verified."""
    authenticate = TokenStore.authenticate

    def forgiving(
        self: TokenStore, secret: str, *, audience: str, now: datetime | None = None
    ) -> Principal:
        self._refresh()
        found = self._by_hash.get(tokens._hash(self._keys[0], secret)) if secret else None
        own = audience if found is None else found.audience
        return authenticate(self, secret, audience=own, now=now)

    _put(TokenStore, "authenticate", forgiving)


def reads_its_tokens_once() -> None:
    """What was revoked meanwhile opens until the server is started again."""
    refresh = TokenStore._refresh

    def once(self: TokenStore) -> None:
        if self._stamp is None:
            refresh(self)

    _put(TokenStore, "_refresh", once)


def forgets_every_fifth_record() -> None:
    """Records are sampled."""
    record, count = Guard.record, [0]

    async def forgetful(self: Guard, event: AuditEvent) -> None:
        count[0] += 1
        if count[0] % 5:
            await record(self, event)

    _put(Guard, "record", forgetful)


def records_what_it_allowed() -> None:
    """The record is written after the permission check, which refused ones never pass."""
    record = Guard.record

    async def allowed(self: Guard, event: AuditEvent) -> None:
        if event.decision is Decision.ALLOW:
            await record(self, event)

    _put(Guard, "record", allowed)


def records_nobody() -> None:
    """Who asked is not in the record."""
    record = Guard.record

    async def anonymous(self: Guard, event: AuditEvent) -> None:
        await record(self, replace(event, actor="anonymous"))

    _put(Guard, "record", anonymous)


def records_no_control_action() -> None:
    """Requests are recorded, and what was done to the server is not."""
    _put(Guard, "control", lambda self, *arguments, **options: None)


def ignores_the_temperature() -> None:
    """Every completion is the greedy one."""
    _put(completer, "Picker", lambda temperature, top_k, seed: Picker(0.0, top_k, seed))


def ignores_the_seed() -> None:
    """Every completion is drawn with the same seed."""
    _put(completer, "Picker", lambda temperature, top_k, seed: Picker(temperature, top_k, 0))


def stands_still_after_position_40() -> None:
    """Positions end where a table of rotations does that is too short."""
    decode = CachedDecoder.decode_together

    def stuck(self: CachedDecoder, others: Sequence[CachedDecoder], added: Tensor) -> Tensor:
        real = self.rope_cos, self.rope_sin
        cos, sin = (table.clone() for table in real)
        cos[41:], sin[41:] = cos[40], sin[40]
        self.rope_cos, self.rope_sin = cos, sin
        try:
            return decode(self, others, added)
        finally:
            self.rope_cos, self.rope_sin = real

    _put(CachedDecoder, "decode_together", stuck)


def tells_the_text_backwards() -> None:
    """The text of a completion is not that of its tokens."""
    _put(routes, "text_of", lambda added: text_of(added[::-1]))


def gives_rows_to_the_wrong_job() -> None:
    """Requests that shared a batch get each other's answers."""
    predict = BatchScheduler._predict

    def swapped(self: BatchScheduler, jobs: Sequence[Job]) -> list[Delivery]:
        found = predict(self, jobs)
        # Among jobs of as many rows, or the answers would have the wrong length.
        of_cost: dict[int, list[object]] = {job.cost: [] for job in jobs}
        for job, delivery in zip(jobs, found, strict=True):
            of_cost[job.cost].append(delivery.result)
        return [
            replace(delivery, result=of_cost[job.cost].pop())
            for job, delivery in zip(jobs, found, strict=True)
        ]

    _put(BatchScheduler, "_predict", swapped)


DEFECTS: tuple[Callable[[], None], ...] = (
    speaks_tls_1_2,
    lets_every_role_do_everything,
    leaves_metrics_out_of_the_table,
    takes_expired_tokens,
    takes_tokens_of_other_services,
    reads_its_tokens_once,
    forgets_every_fifth_record,
    records_what_it_allowed,
    records_nobody,
    records_no_control_action,
    ignores_the_temperature,
    ignores_the_seed,
    stands_still_after_position_40,
    tells_the_text_backwards,
    gives_rows_to_the_wrong_job,
)


def careless_command(command: Sequence[str], defect: str) -> tuple[str, ...]:
    """Returns the command of a server, changed so that the server has the defect.

    Args:
        command: Has `serve` among its arguments.
        defect: Name of one of `DEFECTS`.
    """
    after = list(command).index("serve") + 1
    return (*python_program(__name__), defect, *command[after:])


def _put(owner: object, name: str, value: object) -> None:
    setattr(owner, name, value)


if __name__ == "__main__":
    {defect.__name__: defect for defect in DEFECTS}[sys.argv[1]]()
    sys.argv[1:] = ["serve", *sys.argv[2:]]
    # By its name: the commands are a layer above this one.
    runpy.run_module("forge_harness", run_name="__main__")
