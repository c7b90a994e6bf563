"""A server in a process of its own, on a free port of loopback, and packages for it."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import httpx
import torch

from forge_harness.formats import WriteOptions, native
from forge_harness.model import ByteLM, ByteLMConfig
from forge_harness.security.audit_file import AuditFile

from ..hf_checkpoints import MemoryCheckpoint

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "fixtures" / "models" / "v1.0"
FAULTY = Path(__file__).with_name("faulty_server.py")
SMALL_LM = ByteLMConfig(width=32, heads=2, hidden=48, context=96, sub_norm=True)
ROW = [0.25] * 64
PATIENCE_S = 60


def write_byte_lm(path):
    """Writes a package of a small language model that was never trained."""
    torch.manual_seed(3)
    model = ByteLM(SMALL_LM).eval()
    names = {f"{name}.weight" for name in model.quantized_names()}
    tensors = {k: v for k, v in model.state_dict().items() if k != "head.weight"}
    checkpoint = MemoryCheckpoint(
        "byte-lm",
        asdict(SMALL_LM),
        tensors,
        ternary=names.__contains__,
        tied={"head.weight": "embedding.weight"},
        quantization={"compute": "exact"},
    )
    path.mkdir()
    native.write_native(checkpoint, path, WriteOptions())
    return path


class Running:
    """A server that has said that it is ready."""

    def __init__(self, process, line, **client):
        self.process, self.url, self.pid = process, line["url"], line["pid"]
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S, **client)

    @property
    def port(self):
        return int(self.url.rsplit(":", 1)[1])

    def predict(self, rows=None, **given):
        return self.client.post("/v1/predict", json={"inputs": rows or [ROW]}, **given)

    def count(self, name, **labels):
        """Sums the samples of a metric that have these labels."""
        text = self.client.get("/metrics").text
        total = 0.0
        for line in text.splitlines():
            found = re.fullmatch(rf"{name}(\{{.*\}})? (\S+)", line)
            if found and all(f'{k}="{v}"' in (found[1] or "") for k, v in labels.items()):
                total += float(found[2])
        return total

    def state(self):
        return self.client.get("/readyz").json()["state"]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=PATIENCE_S)


@contextlib.contextmanager
def running(*arguments, package=DIGITS, script=None, port=0, **client):
    """Runs `forge-harness serve`, or a script that does more than it."""
    command = ["-m", "forge_harness", "serve"] if script is None else [str(script)]
    command += ["--package", str(package), "--port", str(port), *map(str, arguments)]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    server = None
    try:
        line = process.stdout.readline()
        if not line:
            raise AssertionError(process.stderr.read())
        server = Running(process, json.loads(line), **client)
        yield server
    finally:
        if server is not None:
            server.client.close()
        process.kill()
        process.communicate()


def run(*arguments, expected=0):
    """Runs a command of `forge-harness`; returns what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "forge_harness", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == expected, done.stderr
    return done.stdout.strip() if not expected else done.stderr


def raw(server, data, timeout=PATIENCE_S):
    """Sends bytes and returns all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout) as connection:
        connection.sendall(data)
        pieces = []
        while piece := connection.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def wait_for(condition, within_s):
    """Returns whether a condition came true in time."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def recorded(path):
    """Returns the events of an audit log."""
    with contextlib.closing(AuditFile(path, read_only=True)) as file:
        return [record.event for record in file.records()]
