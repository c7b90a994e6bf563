"""MLPerf LoadGen's Server scenario against a server, as an oracle; prints its summary as JSON.

loadgen_client.py URL RATE SECONDS DIRECTORY
"""

import asyncio
import json
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import mlperf_loadgen as loadgen

BODY = json.dumps({"inputs": [[1.0] * 64]}).encode()


async def ask(host, port):
    reader, writer = await asyncio.open_connection(host, port)
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    writer.write(head + BODY)
    answer = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1])
        for line in answer.split(b"\r\n")
        if b"content-length" in line.lower()
    )
    await reader.readexactly(length)
    writer.close()


def main(url, rate, seconds, directory):
    parts = urlsplit(url)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def answer(query_id):
        await ask(parts.hostname, parts.port)
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query_id, 0, 0)])

    # The loop holds tasks weakly: one that nobody else holds may be collected while it waits.
    running = set()

    def issue(samples):
        for sample in samples:
            asked = asyncio.run_coroutine_threadsafe(answer(sample.id), loop)
            running.add(asked)
            asked.add_done_callback(running.discard)

    settings = loadgen.TestSettings()
    settings.scenario = loadgen.TestScenario.Server
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.server_target_qps = rate
    settings.server_target_latency_ns = 10**10
    settings.min_duration_ms = round(1000 * seconds)
    settings.min_query_count = 1
    output = loadgen.LogSettings()
    output.log_output.outdir = str(directory)
    sut = loadgen.ConstructSUT(issue, lambda: None)
    qsl = loadgen.ConstructQSL(16, 16, lambda _: None, lambda _: None)
    loadgen.StartTestWithLogSettings(sut, qsl, settings, output)
    loadgen.DestroyQSL(qsl)
    loadgen.DestroySUT(sut)
    pairs = (
        line.split(":", 1)
        for line in (Path(directory) / "mlperf_log_summary.txt").read_text().splitlines()
        if ":" in line
    )
    print(json.dumps({name.strip(): value.strip() for name, value in pairs}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
