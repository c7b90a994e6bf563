"""A small real HTTP server with one fault chosen on the command line.

It prints its port on a line. Answers come from one worker that takes `--service-ms` a request, as
an inference thread does. Standard library only, and no part of the harness: what the load tests
find is this server's doing and nobody else's.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import time


def label_of(inputs):
    return int(sum(inputs[0])) % 10


class Service:
    def __init__(self, options):
        self.options = options
        self.codes = {}
        self.waiting = 0
        self.free_at = 0.0
        self.start = None
        self.rng = random.Random(7)
        self.cached = None

    async def turn(self):
        """Waits for this request's turn on the one worker."""
        now = time.monotonic()
        begin = max(now, self.free_at)
        o = self.options
        if o.stall_s and o.stall_at <= begin - self.start < o.stall_at + o.stall_s:
            begin = self.start + o.stall_at + o.stall_s
        self.free_at = begin + o.service_ms / 1000
        await asyncio.sleep(self.free_at - now)

    async def answer(self, path, headers, body):
        o = self.options
        request_id = headers.get("x-request-id", "")
        if path == "/metrics":
            lines = [
                f'forge_requests_total{{route="{r}",code="{c}"}} {n}'
                for (r, c), n in self.codes.items()
            ]
            lines += ["forge_requests_in_flight 0", "process_resident_memory_bytes 50000000"]
            return o.metrics_status, "\n".join(lines).encode(), {} if not o.no_metrics else None
        if o.token and headers.get("authorization") != f"Bearer {o.token}":
            return self.count(path, 401, b"{}", {})
        now = time.monotonic()
        self.start = self.start if self.start is not None else now
        if o.exit_at and now - self.start > o.exit_at:
            os._exit(1)
        if self.waiting >= o.queue or (o.refuse_at and now - self.start > o.refuse_at):
            return self.count(path, 503, b"{}", {} if o.no_retry_after else {"Retry-After": "1"})
        self.waiting += 1
        try:
            await self.turn()
        finally:
            self.waiting -= 1
        if self.rng.random() < o.fail:
            return self.count(path, 500, b"{}", {})
        question = json.loads(body)
        if question.get("stream"):
            return self.count(
                path, 200, self.stream(question), {"Content-Type": "text/event-stream"}
            )
        answer = {"labels": [label_of(question["inputs"])], "request_id": request_id}
        if self.rng.random() < o.stale and self.cached is not None:
            answer = self.cached
        self.cached = answer
        return self.count(path, 200, json.dumps(answer).encode(), {})

    def stream(self, question):
        tokens = [(i * 7) % 256 for i in range(question["max_tokens"])]
        events = [{"text": chr(97 + t % 26), "token": t} for t in tokens]
        if self.rng.random() < self.options.truncate:
            events = events[: len(events) // 2]
            return b"".join(b"data: %s\n\n" % json.dumps(e).encode() for e in events)
        events.append({"finish_reason": "length", "usage": {"completion_tokens": len(tokens)}})
        body = b"".join(b"data: %s\n\n" % json.dumps(e).encode() for e in events)
        return body + b"data: [DONE]\n\n"

    def count(self, path, status, body, headers):
        if self.rng.random() >= self.options.undercount:
            key = (path, status)
            self.codes[key] = self.codes.get(key, 0) + 1
        return status, body, headers

    async def connection(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self.exchange(reader, writer):
                pass
        writer.close()

    async def exchange(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        first, *rest = head.decode().split("\r\n")
        headers = {
            k.lower(): v.strip() for k, _, v in (line.partition(":") for line in rest if line)
        }
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = first.split()[1]
        if path != "/metrics" and self.rng.random() < self.options.drop:
            return False  # Not a word: the connection just ends.
        if self.options.early_hints and path != "/metrics":
            writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n")
        status, content, extra = await self.answer(path, headers, body)
        if extra is None:
            status, content, extra = 404, b"", {}
        if status == 200 and path != "/metrics" and self.rng.random() < self.options.cut:
            writer.write(b"HTTP/1.1 200 X\r\nContent-Length: %d\r\n\r\n" % len(content))
            writer.write(content[: len(content) // 2])
            await writer.drain()
            return False
        if self.options.endless and path != "/metrics":
            writer.write(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                writer.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
                await writer.drain()
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}"]
        if self.options.foreign_id and path != "/metrics":
            lines.append("X-Request-Id: somebody-else")
        lines += [f"{k}: {v}" for k, v in extra.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        await writer.drain()
        return True


async def main(options):
    await asyncio.sleep(options.start_s)
    service = Service(options)
    server = await asyncio.start_server(service.connection, "127.0.0.1", 0, backlog=1024)
    port = server.sockets[0].getsockname()[1]
    line = json.dumps({"ready": True, "url": f"http://127.0.0.1:{port}"})
    print(line if options.ready_line else port, flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--service-ms", type=float, default=1.0)
    parser.add_argument("--start-s", type=float, default=0.0)
    parser.add_argument("--stall-at", type=float, default=0.0)
    parser.add_argument("--stall-s", type=float, default=0.0)
    parser.add_argument("--refuse-at", type=float, default=0.0)
    parser.add_argument("--exit-at", type=float, default=0.0)
    parser.add_argument("--metrics-status", type=int, default=200)
    parser.add_argument("--token", default="")
    parser.add_argument("--queue", type=int, default=10**9)
    for share in ("drop", "stale", "truncate", "cut", "fail", "undercount"):
        parser.add_argument(f"--{share}", type=float, default=0.0)
    flags = ("no-retry-after", "no-metrics", "foreign-id", "ready-line", "early-hints", "endless")
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true")
    asyncio.run(main(parser.parse_args()))
