"""`forge-harness serve` with one defect: careless_server.py DEFECT ARGUMENTS..."""

import ssl
import sys

from forge_harness.cli import app
from forge_harness.security.access import Access, Principal
from forge_harness.security.tokens import TokenStore
from forge_harness.serving import server, tls
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
        found = self._by_hash.get(self._hash(secret)) if secret else None
        if found is not None:
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


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    sys.argv[1:] = ["serve", *sys.argv[2:]]
    app()
