"""`forge-harness serve` with one defect: careless_server.py DEFECT ARGUMENTS..."""

import ssl
import sys
from dataclasses import replace

from forge_harness.cli import app
from forge_harness.model.decoder import CachedDecoder
from forge_harness.security import tokens
from forge_harness.security.access import Access, Principal
from forge_harness.security.tokens import TokenStore
from forge_harness.serving import completer, routes, server, tls
from forge_harness.serving.batcher import BatchScheduler
from forge_harness.serving.guard import Guard


def speaks_tls_1_2():
    make = tls.server_context

    def context(certificate, key):
        made = make(certificate, key)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        return made

    tls.server_context = context
    server.server_context = context


def lets_every_role_do_everything():
    Access.require = lambda self, principal, permission: None


def takes_expired_tokens():
    authenticate = TokenStore.authenticate

    def forgiving(self, secret, *, audience, now=None):
        self._refresh()
        found = self._by_hash.get(tokens._hash(self._keys[0], secret)) if secret else None
        if found is not None and found.revoked_at is None:
            return Principal(found.name, frozenset(found.roles))
        return authenticate(self, secret, audience=audience, now=now)

    TokenStore.authenticate = forgiving


def forgets_every_fifth_record():
    record, count = Guard.record, [0]

    async def forgetful(self, event):
        count[0] += 1
        if count[0] % 5:
            await record(self, event)

    Guard.record = forgetful


def records_nobody():
    record = Guard.record

    async def anonymous(self, event):
        await record(self, replace(event, actor="anonymous"))

    Guard.record = anonymous


def records_no_control_action():
    Guard.control = lambda self, *arguments, **options: None


def reads_its_tokens_once():
    refresh = TokenStore._refresh

    def once(self):
        if self._stamp is None:
            refresh(self)

    TokenStore._refresh = once


def ignores_the_temperature():
    pick = completer.Picker
    completer.Picker = lambda temperature, top_k, seed: pick(0.0, top_k, seed)


def ignores_the_seed():
    pick = completer.Picker
    completer.Picker = lambda temperature, top_k, seed: pick(temperature, top_k, 0)


def stands_still_after_position_40():
    decode = CachedDecoder.decode_together

    def stuck(self, others, tokens):
        real = self.rope_cos, self.rope_sin
        cos, sin = (table.clone() for table in real)
        cos[41:], sin[41:] = cos[40], sin[40]
        self.rope_cos, self.rope_sin = cos, sin
        try:
            return decode(self, others, tokens)
        finally:
            self.rope_cos, self.rope_sin = real

    CachedDecoder.decode_together = stuck


def tells_the_text_backwards():
    text_of = routes.text_of
    routes.text_of = lambda tokens: text_of(tokens[::-1])


def gives_rows_to_the_wrong_job():
    predict = BatchScheduler._predict

    def swapped(self, jobs):
        found = predict(self, jobs)
        # Among jobs of as many rows, or the answers would have the wrong length.
        of_cost = {job.cost: [] for job in jobs}
        for job, delivery in zip(jobs, found, strict=True):
            of_cost[job.cost].append(delivery.result)
        return [
            replace(delivery, result=of_cost[job.cost].pop())
            for job, delivery in zip(jobs, found, strict=True)
        ]

    BatchScheduler._predict = swapped


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    sys.argv[1:] = ["serve", *sys.argv[2:]]
    app()
