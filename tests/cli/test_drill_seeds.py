"""Seeds of a user's own, in a user's own subject, for a user's own check."""

import json
import textwrap

import pytest

from forge_harness.drill.seeds import load_seeds
from forge_harness.errors import SubjectError, UsageError

SUBJECT = """
class Mine:
    name = "mine"

    def tasks(self):
        return ("tiny",)

    def quantize_weight(self, weight):
        scale = weight.abs().mean().clamp(min=1e-5)
        return (weight / scale).round().clamp(-1, 1).to(weight.dtype), scale

    def quantize_activation(self, x):
        return x, x

    def linear(self, x, weight, bias=None):
        return x

    def integer_linear(self, x, weight):
        return x, x

    def greeting(self):
        return "hello"
"""
SEEDS = """
from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.drill.seeds import subjects_of
from mine import Mine


class Rude(Mine):
    def greeting(self):
        return "what"


class Loud(Mine):
    def greeting(self):
        return "HELLO"


class Mumbling(Mine):
    def greeting(self):
        return "hello "


def greeting(subject):
    return subject.greeting()


def seed(name, subject, alive=greeting):
    return Defect(
        id=name, title=name, stage=Stage.SERVING, check="mine.greets", shows="greeting is",
        subject=subject, alive=alive,
    )


DEFECTS = (seed("rude", Rude), seed("mumbling", Mumbling), seed("dead", Mine))
BENIGN = (Benign(id="loud", title="In capitals", subject=Loud, checks=("mine",)),)
__getattr__ = subjects_of(DEFECTS, BENIGN)
"""
CHECK = """
import pytest


@pytest.mark.forge_check("mine.greets", severity="high", title="It greets")
def test_greets(subject, evidence):
    evidence.equal("greeting", subject.greeting().strip(), expected="hello", reason="as agreed")
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "checks").mkdir()
    for name, text in (
        ("mine.py", SUBJECT),
        ("seeds.py", SEEDS),
        ("checks/test_greets.py", CHECK),
    ):
        (tmp_path / name).write_text(textwrap.dedent(text))
    return tmp_path


def test_a_check_of_one_s_own_is_measured(project, forge):
    """The check kills one seed, misses one it strips, and accuses a sound subject."""
    done = forge(
        "drill",
        "suites",
        *("--seeds", "seeds.py", "--subject", "mine.py:Mine", "--suite-path", "checks"),
        *("--json", "kills.json", "-q"),
        cwd=project,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    document = json.loads((project / "kills.json").read_text())
    statuses = {row["id"]: row["status"] for row in document["defects"]}
    assert statuses == {"rude": "killed", "mumbling": "survived", "dead": "equivalent"}
    accused = {row["id"]: list(row["alarms"]) for row in document["variants"]}
    assert accused == {"reference": [], "loud": ["mine.greets"]}
    assert "false alarm: mine.greets is red for loud (In capitals)" in done.stdout
    command = document["defects"][0]["command"]
    assert f"--subject {project / 'seeds.py'}:rude" in command
    assert f"--suite-path {project / 'checks'}" in command


def test_without_its_directory_the_check_is_not_known(project, forge):
    done = forge("drill", "suites", "--seeds", "seeds.py", cwd=project)
    assert done.returncode == 4
    assert "Seeded defect 'rude': Unknown check 'mine.greets'." in done.stderr
    assert "--suite-path" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("DEFECTS = (", "OTHERS = (", "no seeded defects"),
        ("DEFECTS = (seed(", "DEFECTS = (1, seed(", "no seeded defects"),
        ("BENIGN = (", "BENIGN = (1, ", "BENIGN of"),
        ('seed("rude", Rude)', 'seed("mumbling", Rude)', "Two seeds"),
        ('id="loud"', 'id="rude"', "Two seeds"),
        ('seed("rude"', 'seed("reference"', "called 'reference'"),
        ('id="loud"', 'id="reference"', "called 'reference'"),
        ('checks=("mine",)', 'checks=("mine.greet",)', "'loud' of .* names 'mine.greet'"),
        ('checks=("mine",)', "checks=()", "'loud' of .* names ''"),
        ("__getattr__ = subjects_of(DEFECTS, BENIGN)", "", "'rude' of"),
    ],
)
def test_a_module_of_no_use_is_refused(project, old, new, said):
    text = (project / "seeds.py").read_text().replace(old, new)
    if "OTHERS" in new or "(1, " in new:
        text = text.replace("__getattr__ = subjects_of(DEFECTS, BENIGN)", "")
    (project / "seeds.py").write_text(text)
    with pytest.raises(UsageError, match=said):
        load_seeds(str(project / "seeds.py"))


def test_a_seed_that_any_reason_would_kill_is_refused(project):
    text = (project / "seeds.py").read_text()
    (project / "seeds.py").write_text(text.replace('shows="greeting is"', 'shows=" "'))
    with pytest.raises(SubjectError, match=r"'rude': shows is ' '.*any reason would do\.$"):
        load_seeds(str(project / "seeds.py"))


def test_the_shipped_seeds_are_not_those_of_another_subject(project, forge):
    done = forge("drill", "suites", "--subject", "mine.py:Mine", "--sample", "1", cwd=project)
    assert done.returncode == 4
    assert "'mine.py:Mine' has no seeds" in done.stderr
    assert "--seeds" in done.stderr


def test_a_module_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SubjectError, match="does not exist"):
        load_seeds(str(tmp_path / "seeds.py"))
