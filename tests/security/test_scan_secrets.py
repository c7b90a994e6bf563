"""Secrets in files: forms, names, randomness; and what is no secret."""

import base64
import hashlib
import json
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forge_harness.probes import secrets
from forge_harness.security import scan_secrets

# Put together here: a scan of this file must find nothing.
AWS = "AKIA" + "QWERTYUIOPASDFGH"
HF = "hf_" + "aBcDeFgHiJkLmNoP" + "qRsTuVwXyZaBcDeF"
JWT = ".".join(["eyJ" + "hbGciOiJIUzI1NiJ9", "eyJzdWIiOiIxMjM0In0", "c2lnbmF0dXJlLXRlc3Q"])


@pytest.mark.parametrize(
    "line",
    [
        f"key = {AWS}",
        f"export HF={HF}",
        f"Authorization: Bearer {JWT}",
        "-----BEGIN " + "RSA PRIVATE KEY-----",
        "-----BEGIN " + "PGP PRIVATE KEY BLOCK-----",
        "aws_id: ASIA" + "QWERTYUIOPASDFGH",
        "pat: github" + "_pat_11ABCDEFG0aBcDeFgHiJkL" + "_mNoPqRsTuVwXyZ0123456789",
        "token: gl" + "pat-aBcDeFgHiJkLmNoPqRsT",
        "token: xo" + "xb-123456789012-" + "1234567890123-AbCdEfGhIjKl",
        "key: AI" + "zaSyA1234567890abcde" + "fghijklmnopqrstuv",
        "_authToken=np" + "m_aBcDeFgHiJkLmNoPq" + "RsTuVwXyZ0123456789",
        "stripe: sk" + "_live_aBcDeFgHiJkLmNoPqRsTuVwX",
        "token: py" + "pi-AgEIcHlwaS5vcmcCJDAw" + "MDAwMDAwLTAwMDAtMDAwMC0wMDAw" + "LTAwMDAw",
        "key: sk" + "-aBcDeFgHiJkLmNoPqRsTuVwX",
        "url: redis" + "://:s3cr3t@cache:6379/0",
        'wandb.login(key="' + "0123456789abcdef0123" * 2 + '")',
        "$ wandb login " + "0123456789abcdef0123" * 2,
        "curl -H 'Authorization: Bea" + "rer q7Zk2LxW9vTb4RnYc8HsJd3G'",
        "token: fh" + "t_" + "aB3-_" * 8 + "xyz",
        "xa" + "pp-1-A0123456789-1234567890123-" + "0123456789abcdef" * 4,
        "https://hooks.sl" + "ack.com/services/T01234567/B01234567/" + "aBcDeFgHiJkLmNoPqRsTuVwX",
        'os.environ["WANDB_API_' + 'KEY"] = "0123456789abcdef"',
        "os.environ.setdefault('WANDB_API_" + "KEY', '0123456789abcdef')",
        "%env WANDB_API_" + "KEY=0123456789abcdef",
        "pass" + 'word: str = "correct-horse"',
        "pass" + "word: str | None = b'correct-horse'",
        'headers={"X-API-' + 'Key": "0123456789ab"}',
        '{"username": "ada", "k' + 'ey":"' + "0123456789abcdef" * 2 + '"}',
        "url: postgres" + "://forge:s3cr3t@db/runs",
        "db_pass" + 'word = "correct-horse"',
        '"api_' + "key\": '0123456789ab'",
        "refresh_" + 'token = "0123456789abcdef0123"',  # forge-scan: no secret
        'x = "' + "q7Zk2LxW9vTb4RnYc8" + 'HsJd3GmPfUa6Ee"',
    ],
)
def test_a_credential_is_found_and_never_repeated(line, tmp_path):
    (tmp_path / "notes.txt").write_text(f"first\n{line}\n")
    scan = scan_secrets.scan(tmp_path)
    assert [(f.place, f.line) for f in scan.findings] == [("notes.txt", 2)], scan
    value = line.split()[-1].strip("\"'")
    assert value not in repr(scan)


@pytest.mark.parametrize(
    "line",
    [
        'eos_token = "<|end_of_text|>"',
        'pad_token = "pad-token"',
        'password = "{password}"',
        'url = f"postgres://{user}:{word}@db"',
        "password = os.environ['PASSWORD']",
        'token = ""',
        f'digest = "{hashlib.sha256(b"x").hexdigest()}"',
        'name = "forge_harness_integration_phase4_connector"',
        'name = "TestWhatIsNoCredentialIsLeftAloneInSourceFiles"',
        "script-src 'sha256-9555w/2lomxlmUFr4Gr6TV74d/uG7ICVb2iPhX3vEiM='",
        'model = AutoModel.from_pretrained("meta-llama/Llama-4-Scout-17B-16E-Instruct")',
        '"OFA-Sys/chinese-clip-vit-base-patch16"',
        '"Qwen2_5OmniThinkerForConditionalGeneration",',
        '"Int8DynActInt4WeightQATQuantizerModuleSwap",',
        '"type=triton_BLOCK-M=128_BLOCK-K=32_BLOCK-N=128_numstages=3_numwarps=4"',
        '<label class="sk-toggleable__label-arrow">',
        '    "image/png": "iVBORw0KGgoAAAANSUhEUgAAAjcAAAHHCAYAAABDUnkqAAAAOnRFWHRTb2Z0d2Fy",',
        "export OPENAI_API_" + 'KEY="sk-..."',
        "client = Client(api_" + 'key="your-api-key")',
        "API_" + 'KEY_NAME = "AZURE_OPENAI_API_KEY"',
        "private_" + 'key = "keys/signing.pem"',
        "PASS" + 'WORD_FILE = "/run/secrets/database"',
        "def login(pass" + 'word: str, name: str = "somebody") -> None:',
        "%env CUDA_VISIBLE_DEVICES=0,1,2,3",
        "Authorization: Bearer YOUR_TOKEN_HERE_FROM_THE_SETTINGS_PAGE",
        'headers = {"Authorization": f"Bearer {token}"}',
        "settings['name'] = 'secret-garden'",
    ],
)
def test_what_is_no_credential_is_left_alone(line, tmp_path):
    (tmp_path / "a.py").write_text(line + "\n")
    scan = scan_secrets.scan(tmp_path)
    assert scan.state == "clean", scan.findings


@given(st.integers(min_value=0, max_value=2**32))
@example(2_530_627_203)  # a key without digits
def test_random_keys_of_32_bytes_are_found(seed):
    text = base64.b64encode(random.Random(seed).randbytes(32)).decode()
    assert secrets.in_line(f'key = "{text}"') == "is long and random"


def test_a_marked_line_is_counted(tmp_path):
    (tmp_path / "a.py").write_text(f'x = "{AWS}"  # {scan_secrets.IGNORE}\n')
    scan = scan_secrets.scan(tmp_path)
    assert (scan.state, scan.notes) == ("clean", (f"1 line marked {scan_secrets.IGNORE!r}",))


def test_binary_large_hidden_and_linked_files(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_secrets, "MAX_FILE_BYTES", 100)
    (tmp_path / "plain.txt").write_text("x")
    (tmp_path / "binary").write_bytes(b"\x00" + AWS.encode())
    (tmp_path / "large.txt").write_text(AWS + " " * 100)
    for name in (".git", "node_modules", ".cache", ".venv"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config").write_text(AWS)
    (tmp_path / ".cache" / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55")
    (tmp_path / ".venv" / "pyvenv.cfg").write_text("home = /usr/bin")
    (tmp_path / ".env").write_text(f"KEY={AWS}\n")
    (tmp_path / "link.txt").symlink_to(tmp_path / "large.txt")
    scan = scan_secrets.scan(tmp_path)
    assert [f.place for f in scan.findings] == [".env"]
    assert scan.scanned == 2
    assert scan.notes == (
        "1 file over 100 bytes not read",
        "1 binary file not read",
        "4 directories of version control, caches and others' code not read",
    )


@pytest.mark.parametrize(
    ("place", "encoding"),
    [
        (".github/workflows/ci.yml", "utf-8"),
        (".aws/credentials", "utf-8"),
        ("build/deploy.sh", "utf-8"),
        ("settings.ini", "utf-16"),
        ("settings.ini", "utf-32"),
    ],
)
def test_where_credentials_are_pasted_is_looked_at(place, encoding, tmp_path):
    (tmp_path / "harmless.py").write_text("x = 1\n")
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(f"first\nkey = {AWS}\n", encoding=encoding)
    scan = scan_secrets.scan(tmp_path)
    assert [(f.place, f.line) for f in scan.findings] == [(place, 2)]
    assert scan.notes == ()


@pytest.mark.parametrize(
    "source",
    [
        "api_" + 'key = "hunter2secret"',
        'settings = {"pass' + 'word": "hunter2abc"}',
        'x = "' + "q7Zk2LxW9vTb4RnYc8" + 'HsJd3GmPfUa6Ee"',
        'os.environ["WANDB_API_' + 'KEY"] = "0123456789abcdef"',
        "%env WANDB_API_" + "KEY=0123456789abcdef",
        "!wandb login " + "0123456789abcdef0123" * 2,
    ],
)
def test_the_code_of_a_notebook_is_read(source, tmp_path):
    """A notebook holds it in JSON, where quotes are escaped."""
    cell = {"cell_type": "code", "source": ["import os\n", f"{source}\n"]}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell]}, indent=1))
    assert [f.line for f in scan_secrets.scan(tmp_path).findings] == [7]


@pytest.mark.parametrize(
    "line",
    ["a" * 1_000_000, "a+" * 500_000, "eyJ-" * 250_000, "http://" * 100_000, 'a="' * 300_000],
    ids=["word", "scheme", "token", "urls", "quotes"],
)
def test_a_line_of_a_megabyte_is_read_to_its_end(line):
    # Tried from each letter to the end, the first of these takes hours.
    key = "AK" + "IAQWERTYUIOPASDFGH"
    assert secrets.in_line(f"{line} {key}") == "has the form of a AWS access key"
    assert secrets.in_line(f"{line} {key}x") != "has the form of a AWS access key"


def test_names_of_credentials_are_found_wherever_they_begin():
    for before in ("", "x ", "(", '"', "self.", "a" * 150 + "."):
        line = before + "pass" + 'word = "correct-horse"'
        assert secrets.in_line(line) == "is assigned to a name of a credential", before


@pytest.mark.parametrize("form", [*secrets.FORM_NAMES[:2], "entropy"])
def test_a_scanner_that_lost_a_form_is_no_scan(form, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    if form == "entropy":
        monkeypatch.setattr(secrets, "_ENTROPY_BITS", 99.0)
    else:
        left = {k: v for k, v in secrets.FORMS.items() if k != form}
        monkeypatch.setattr(secrets, "FORMS", left)
    scan = scan_secrets.scan(tmp_path)
    assert scan.state == "not scanned"
    assert "did not find its canary" in scan.why_not


def test_an_empty_tree_is_no_scan(tmp_path):
    assert scan_secrets.scan(tmp_path).state == "not scanned"


def test_a_place_is_the_line_an_editor_shows(tmp_path):
    (tmp_path / "a.txt").write_bytes(f"one\f\v\r\ntwo\u2028\nkey = {AWS}\n".encode())
    assert [f.line for f in scan_secrets.scan(tmp_path).findings] == [3]


@pytest.mark.parametrize("secret", [False, True])
def test_a_file_that_cannot_be_read_is_never_clean(tmp_path, monkeypatch, secret):
    (tmp_path / "a.txt").write_text("closed")
    (tmp_path / "b.txt").write_text(f"key = {AWS}\n" if secret else "open")
    (tmp_path / "gone.txt").write_text("removed while it is scanned")
    read = scan_secrets.read_text

    def refused(path):
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        if path.name == "gone.txt":
            raise FileNotFoundError(2, "No such file or directory")
        return read(path)

    monkeypatch.setattr(scan_secrets, "read_text", refused)
    scan = scan_secrets.scan(tmp_path)
    said = "1 file or directory cannot be read, the first is a.txt: Permission denied"
    if secret:
        assert (scan.state, scan.notes) == ("found", (said,))
    else:
        assert (scan.state, scan.why_not) == ("not scanned", said)


@pytest.mark.parametrize("name", [".env", ".env.local", "prod.env"])
@pytest.mark.parametrize(
    "line",
    [
        "DB_PASS" + "WORD=correct-horse",
        "export API_" + "KEY = 0123456789ab  # of the service",
        "AWS_SECRET" + "_ACCESS_KEY=wJalrXUt" + "nFEMI/K7MDENG/bPxRfiCY",
        "SALT=" + "q7Zk2LxW9vTb4RnYc8" + "HsJd3GmPfUa6Ee",
        "DB_PASS" + "WORD=p@ss&w0rd;(7)",
        "DB_PASS" + "WORD=$7kd#9q!  # of the service",
    ],
)
def test_variables_of_the_environment_need_no_quotes(tmp_path, name, line):
    (tmp_path / name).write_text(f"DEBUG=1\n{line}\n")
    assert [f.line for f in scan_secrets.scan(tmp_path).findings] == [2]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("train.sh", "export WANDB_API_" + "KEY=" + "0123456789abcdef" * 2),
        ("train.sh", "HF_" + "TOKEN=0123456789abcdefgh && python train.py"),
        ("job.sbatch", "HF_" + "TOKEN=0123456789abcdefgh python train.py"),
        ("Dockerfile", "ENV API_" + "KEY=0123456789ab \\"),
        ("Dockerfile.gpu", "ARG API_" + "KEY=0123456789ab"),
        ("gpu.Dockerfile", "ENV API_" + "KEY 0123456789ab"),
        ("Dockerfile", "ENV DEBUG=1 API_" + "KEY=0123456789ab"),
        ("run.sh", "docker run -e API_" + "KEY=0123456789ab image"),
        ("run.sh", "python train.py --api-" + "key=0123456789ab"),
        ("alembic.ini", "pass" + "word = correct-horse"),
        (".aws/credentials", "aws_secret_" + "access_key = wJalrXUt" + "nFEMI/K7MDENG/bPxRfiCY"),
        (".pypirc", "pass" + "word = correct-horse"),
        ("settings.yaml", "  pass" + "word: correct-horse"),
        ("settings.yaml", "api_" + "key: 0123456789abcdef  # of the service"),
        ("compose.yml", "      - DB_PASS" + "WORD=correct-horse"),
        ("compose.yml", "      DB_PASS" + "WORD: correct-horse"),
        ("secret.yml", "  client-secret" + ": q7Zk2LxW9vTb4RnYc8HsJd3G"),
    ],
)
def test_so_do_those_of_scripts_containers_and_settings(tmp_path, name, line):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
    assert [f.line for f in scan_secrets.scan(tmp_path).findings] == [2]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (".env", "API_" + "KEY=$FROM_ELSEWHERE"),
        (".env", "API_" + "KEY="),
        (".env", "API_" + "KEY=$(cat key)"),
        (".env", "API_" + "KEY=prefix-${FROM_ELSEWHERE}"),
        (".env", "HOMEPAGE=https://example.org/a-page-with-a-long-name"),
        ("notes.py", "pass" + "word = get_password()"),
        ("train.sh", "export API_" + "KEY=$(cat key)"),
        ("train.sh", "PASS" + "WORD=`cat key`"),
        ("train.sh", "MODEL=meta-llama/Llama-4-Scout-17B-16E-Instruct"),
        ("train.sh", 'if [ "$PASS' + 'WORD" == secret-word ]; then'),
        ("train.sh", "train --private-" + "key=/etc/ssl/private/key.pem"),
        (".env", "PASS" + "WORD_FILE=/run/secrets/database"),
        ("ci.yml", "    secrets: inherit"),
        ("ci.yml", "  pass" + "word: ${{ secrets.PYPI }}"),
        ("api.yaml", "  pass" + "word: string"),
        ("pod.yaml", "  secretName: database-secret-1"),
        ("pod.yaml", "  existingSecret: database-secret-1"),
        ("pod.yaml", "  pass" + "word: !vault |"),
        ("train.yaml", "  eos_token: end-of-text-0001"),
        ("train.yaml", "  secret: of-the-house"),
    ],
)
def test_what_stands_for_a_value_is_none(tmp_path, name, line):
    (tmp_path / name).write_text(f"{line}\n")
    assert scan_secrets.scan(tmp_path).state == "clean"
