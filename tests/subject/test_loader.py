"""Loading subjects: every spelling, and every way it can go wrong in one sentence."""

from pathlib import Path

import pytest

from forge_harness.errors import CheckpointError, ExitCode, SubjectError
from forge_harness.paths import fixtures_dir
from forge_harness.protocols import CAPABILITIES, capabilities_of, methods_of
from forge_harness.subject import load_subject

FOREIGN = Path(__file__).with_name("foreign_subject.py")


def test_nothing_named_is_the_reference_with_every_capability():
    loaded = load_subject(None)
    assert loaded.spec == "reference"
    assert loaded.capabilities == frozenset(CAPABILITIES)
    assert loaded.digest is not None


def test_a_class_in_a_file_is_called():
    loaded = load_subject(f"{FOREIGN}:Blobs")
    assert loaded.name == "blobs"
    assert loaded.capabilities == {"Quantizes", "BuildsModel", "Trains"}


def test_a_file_loaded_twice_is_one_module():
    first = load_subject(f"{FOREIGN}:Blobs").subject
    second = load_subject(f"{FOREIGN}:Blobs").subject
    assert type(first) is type(second)


def test_an_object_in_a_module_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_forge_subject.py").write_text(
        "class Packer:\n"
        "    def pack(self, codes): ...\n"
        "    def unpack(self, packed, rows): ...\n"
        "subject = Packer()\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_subject("my_forge_subject:subject").capabilities == {"Packs"}


def subject_file(tmp_path, text):
    path = tmp_path / "subject.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "attribute", "sentence"),
    [
        ("class Subject: pass", "Subject", "offers no capability"),
        ("class Subject: pass", "Subjekt", r"no 'Subjekt'\. Did you mean 'Subject'"),
        ("import not_a_module", "x", "raised ModuleNotFoundError: No module named"),
        ("1 / 0", "x", "raised ZeroDivisionError"),
        ("def make():\n    raise RuntimeError('no weights')", "make", "when called: no weights"),
        ("def :", "x", "raised SyntaxError"),
    ],
)
def test_a_bad_file_is_one_sentence_and_a_usage_error(tmp_path, text, attribute, sentence):
    path = subject_file(tmp_path, text)
    with pytest.raises(SubjectError, match=sentence) as error:
        load_subject(f"{path}:{attribute}")
    assert error.value.exit_code is ExitCode.USAGE
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("missing/file.py:subject", "does not exist"),
        ("no_such_module_here:subject", "not importable"),
        ("referense", r"Did you mean 'reference'"),
    ],
)
def test_a_subject_that_is_not_there(spec, sentence):
    with pytest.raises(SubjectError, match=sentence):
        load_subject(spec)


def test_a_broken_file_can_be_mended_and_loaded_again(tmp_path):
    path = subject_file(tmp_path, "1 / 0")
    with pytest.raises(SubjectError):
        load_subject(f"{path}:Packer")
    path.write_text(
        "class Packer:\n    def pack(self, codes): ...\n    def unpack(self, packed, rows): ...\n"
    )
    assert load_subject(f"{path}:Packer").capabilities == {"Packs"}


def test_half_a_capability_is_none():
    class Half:
        def pack(self, codes): ...

    assert capabilities_of(Half()) == frozenset()
    assert methods_of("Packs") == ("pack", "unpack")


def test_the_digest_follows_the_file(tmp_path):
    text = "class P:\n    def pack(self, c): ...\n    def unpack(self, p, r): ...\n"
    path = subject_file(tmp_path, text)
    other = tmp_path / "other.py"
    other.write_text(text + "# changed\n")
    assert load_subject(f"{path}:P").digest != load_subject(f"{other}:P").digest


@pytest.mark.parametrize("name", ["", " ", "two\nlines", "\x1b[31m", "\ud800"])
def test_a_name_that_no_report_can_show_is_refused(tmp_path, name):
    (tmp_path / "named.py").write_text(
        f"class Packer:\n    name = {name!r}\n"
        "    def pack(self, codes): ...\n"
        "    def unpack(self, packed, rows): ...\n"
    )
    with pytest.raises(SubjectError, match="expected text of one line"):
        load_subject(f"{tmp_path / 'named.py'}:Packer")


def test_a_checkpoint_that_leaves_a_question_open_is_to_be_converted_first():
    checkpoint = fixtures_dir() / "checkpoints" / "gguf-i2_s-arm"
    with pytest.raises(CheckpointError, match=r"--i2s-layout .* `forge-harness convert` and that"):
        load_subject(str(checkpoint))
