"""history: what is kept, in order, with its breaks; as a table; under another policy."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace

import pytest

from forge_harness.canonical import file_sha256
from forge_harness.errors import ExitCode
from forge_harness.policy import load_policy
from forge_harness.record import EvidenceRecord, ItemRecord, SubjectRecord
from forge_harness.rundir import RunDirectory, read_policy, read_record
from forge_harness.scoring import RunContext, Scope, assemble, verify_run
from forge_harness.selection import InlineCheck, with_inline
from forge_harness.types import Outcome, Profile

MACHINE = {"os": "Linux", "machine": "x86_64", "cpu": "Xeon", "cpu_usable": 2}
COMMIT = {"git_commit": "0123456789abcdef0123456789abcdef01234567", "git_dirty": False}
LIMITS = {"gates.accuracy.at_least": 0.85}


def policy_of(make, **changed):
    policy = make.policy((*make.checks, ("gates.accuracy", "high")))
    fields = {"thresholds": LIMITS, "units": {"gates.accuracy": "1"}, **changed}
    return policy.model_copy(update=fields)


def items_of(make, accuracy, **outcomes):
    items = [
        make.item(name, outcomes.get(name.partition(".")[2], "pass")) for name, _ in make.checks
    ]
    evidence = EvidenceRecord(
        item="t.py::gate",
        name="accuracy",
        value=accuracy,
        unit="1",
        limit=0.85,
        direction="at_least",
        reason="share correct",
        samples=None,
    )
    outcome, reason = (
        ("pass", "")
        if accuracy >= 0.85
        else (
            "fail",
            f"accuracy is {accuracy}, under its limit of 0.85 (share correct)",
        )
    )
    gate = ItemRecord(
        nodeid="t.py::gate",
        check="gates.accuracy",
        outcome=Outcome(outcome),
        reason=reason,
        duration_s=0.1,
        evidence=[evidence],
    )
    return [*items, gate]


@pytest.fixture
def keep(make, tmp_path):
    """Makes a sealed run: `keep("first", hour=3, accuracy=0.8, beta="fail", cpu="EPYC")`."""

    def build(name, *, hour=1, accuracy=0.9, policy=None, state="finished", scope=None, **changed):
        fields = {
            key: changed.pop(key) for key in ("subject", "declared", "run_id") if key in changed
        }
        machine = {**MACHINE, **COMMIT}
        machine |= {key: changed.pop(key) for key in ("cpu", "git_dirty") if key in changed}
        spec = fields.pop("subject", "reference")
        context = RunContext(
            run_id=fields.pop("run_id", f"run-{name}"),
            subject=SubjectRecord(spec=spec, name="s", capabilities=[]),
            environment=machine,
            started_at=f"2026-06-15T{hour:02}:00:00Z",
            **fields,
        )
        policy, scope = policy or policy_of(make), scope or Scope()
        given = changed.pop("items", None)
        items = items_of(make, accuracy, **changed) if given is None else given
        if scope.suites:
            items = [item for item in items if item.check.partition(".")[0] in scope.suites]
        stub = assemble(policy, [], scope=scope, context=context, state="running")
        directory = RunDirectory.create(tmp_path / "runs" / name, record=stub, policy=policy)
        for item in items:
            directory.append_item(item)
        if state == "running":
            return directory.path
        context = replace(context, finished_at=f"2026-06-15T{hour:02}:30:00Z")
        directory.write_final(
            assemble(policy, items, scope=scope, context=context, state=state), policy
        )
        directory.seal()
        return directory.path

    return build


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def broken(path):
    (path / "run.json").write_text("{")
    return path


def changed(path):
    (path / "items.jsonl").write_text("")
    return path


class TestShow:
    def test_one_row_a_run_in_order_of_start(self, invoke, keep, runs):
        keep("b", hour=1)
        keep("a", hour=3, accuracy=0.8, git_dirty=True)
        keep("c", hour=2, alpha="not_measured")
        result = invoke("history", "show", runs)
        assert result.exit_code == ExitCode.PASS
        head, *rows = (line.split() for line in result.output.splitlines())
        assert head[:4] == ["started", "run", "commit", "scope"]
        assert head[4:] == ["verdict", "score", "measured", "policy"]
        assert [row[1] for row in rows] == ["run-b", "run-c", "run-a"]
        assert rows[0][:4] == ["2026-06-15T01:00:00Z", "run-b", "01234567", "quick"]
        assert [row[4] for row in rows] == ["PASS", "INCOMPLETE", "FAIL"]
        # By hand: 4 of 12 points of one suite of three, capped at 79 by a critical check that is
        # not measured; two suites of three.
        assert [row[5] for row in rows] == ["100", "77-79", "66"]
        assert rows[2][2] == "01234567+"
        assert "compare" not in result.output

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"cpu": "EPYC"}, "machine class Linux/x86_64/Xeon/2 -> Linux/x86_64/EPYC/2"),
            ({"subject": "mine:s"}, "subject reference -> mine:s"),
            ({"declared": {"accelerator": "none"}}, "declared nothing -> accelerator = none"),
            ({"scope": Scope(profile=Profile.FULL)}, "profile quick -> full"),
            ({"scope": Scope(suites=("data",))}, "selection the whole profile -> data"),
            ({"cpu": None}, "machine class Linux/x86_64/Xeon/2 -> not known"),
        ],
    )
    def test_a_break_says_what_changed(self, invoke, keep, runs, fields, words):
        keep("a", hour=1)
        keep("b", hour=2)
        keep("c", hour=3, **fields)
        lines = invoke("history", "show", runs).output.splitlines()
        assert len(lines) == 5
        assert lines[3] == f"--- {words}: scores above and below do not compare ---"
        assert "run-c" in lines[4]

    def test_a_change_of_policy_is_a_break(self, invoke, keep, runs, make):
        stricter = policy_of(make, thresholds={"gates.accuracy.at_least": 0.9})
        keep("a", hour=1)
        keep("b", hour=2, policy=stricter)
        digests = [policy_of(make).digest, stricter.digest]
        old, new = (digest.removeprefix("sha256:")[:12] for digest in digests)
        assert f"--- policy {old} -> {new}: scores" in invoke("history", "show", runs).output

    def test_machines_that_are_not_known_do_not_compare(self, invoke, keep, runs):
        keep("a", hour=1, cpu=None)
        keep("b", hour=2, cpu=None)
        assert "--- machine class not known: scores" in invoke("history", "show", runs).output

    def test_what_does_not_verify_is_listed_without_a_score(self, invoke, keep, runs):
        keep("good", hour=1)
        keep("killed", hour=2, state="running")
        broken(keep("broken", hour=3))
        changed(keep("changed", hour=4))
        (keep("bare", hour=5) / "run.json").unlink()
        (keep("lines", hour=6) / "policy.json").rename(runs.parent / "policy.json")
        for name in ("run.json", "manifest.json"):
            (runs / "lines" / name).unlink()
        output = invoke("history", "show", runs).output
        table, _, rest = output.partition("Without a score: 5 runs\n")
        assert len(table.strip().splitlines()) == 2
        words = dict(line.strip().split(": ")[:2] for line in rest.splitlines())
        assert {path.rpartition("/")[2]: word for path, word in words.items()} == {
            "bare": "damaged",
            "broken": "damaged",
            "changed": "does not verify",
            "killed": "unfinished",
            "lines": "damaged",
        }
        assert "PASS" not in rest

    def test_an_interrupted_run_is_shown_as_one(self, invoke, keep, runs):
        keep("a", state="interrupted")
        assert "INCOMPLETE (interrupted)" in invoke("history", "show", runs).output

    def test_a_stranger_writes_no_rows(self, invoke, keep, runs):
        keep("a", run_id="x\nrun-fake  PASS\x1b[2J")
        output = invoke("history", "show", runs).output
        assert len(output.splitlines()) == 2
        assert "\x1b" not in output

    def test_json_holds_the_same(self, invoke, keep, runs):
        keep("a", hour=1)
        keep("b", hour=2, cpu="EPYC")
        broken(keep("c"))
        found = json.loads(invoke("history", "show", runs, "--json").output)
        first, second = found["runs"]
        assert (first["run_id"], first["breaks"]) == ("run-a", [])
        assert first["score"] == {"low": 100, "high": 100}
        assert [b["what"] for b in second["breaks"]] == ["machine class"]
        assert [row["state"] for row in found["refused"]] == ["damaged"]

    def test_a_run_named_twice_is_one(self, invoke, keep, runs):
        path = keep("a")
        found = json.loads(invoke("history", "show", path, runs, "--json").output)
        assert len(found["runs"]) == 1

    def test_only_one_level_is_looked_into(self, invoke, keep, runs, tmp_path):
        keep("a")
        result = invoke("history", "show", tmp_path)
        assert result.exit_code == ExitCode.NOTHING_COLLECTED
        assert result.stderr.startswith(f"Error: No run in {tmp_path}; name the directory")

    def test_a_directory_without_runs_beside_one_with_is_said(self, invoke, keep, runs, tmp_path):
        keep("a")
        (tmp_path / "other").mkdir()
        output = invoke("history", "show", runs, tmp_path / "other").output
        assert output.endswith("other: empty: there is no run in it.\n")
        assert "Without a score" not in output

    def test_a_package_is_no_run(self, invoke, tmp_path):
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "manifest.json").write_text('{"schema": "p", "files": []}')
        result = invoke("history", "show", tmp_path)
        assert result.exit_code == ExitCode.NOTHING_COLLECTED

    @pytest.mark.parametrize(("name", "what"), [("gone", "does not exist"), ("file", "is a file")])
    def test_a_wrong_path(self, invoke, tmp_path, name, what):
        (tmp_path / "file").write_text("")
        result = invoke("history", "show", tmp_path / name)
        assert result.exit_code == ExitCode.USAGE
        assert result.stderr.startswith(f"Error: {tmp_path / name} {what}; expected")

    def test_the_default_is_where_runs_are_kept(self, invoke, keep, runs, tmp_path, monkeypatch):
        keep("a")
        monkeypatch.chdir(tmp_path)
        assert invoke("history", "show").exit_code == ExitCode.NOTHING_COLLECTED
        (tmp_path / "forge.toml").write_text('[paths]\nruns = "runs"\n')
        assert "run-a" in invoke("history", "show").output


class TestExport:
    def test_a_row_a_run_and_a_column_a_gate(self, invoke, keep, runs):
        keep("b", hour=2, accuracy=0.8)
        keep("a", hour=1)
        result = invoke("history", "export", runs)
        assert result.exit_code == ExitCode.PASS
        rows = list(csv.DictReader(io.StringIO(result.output, newline="")))
        assert [row["run_id"] for row in rows] == ["run-a", "run-b"]
        assert [row["gate.accuracy [1]"] for row in rows] == ["0.9", "0.8"]
        assert [(row["score_low"], row["verdict"]) for row in rows] == [
            ("100", "PASS"),
            ("66", "FAIL"),
        ]
        assert rows[0]["machine_class"] == "Linux/x86_64/Xeon/2"
        assert rows[0]["dirty"] == "false"

    def test_values_of_two_units_are_two_columns(self, invoke, keep, runs, make):
        keep("a", hour=1)
        percent = policy_of(make, units={"gates.accuracy": "percent"})
        keep("b", hour=2, policy=percent)
        found = json.loads(invoke("history", "export", runs, "--format", "json").output)
        assert found["columns"][-2:] == ["gate.accuracy [1]", "gate.accuracy [percent]"]
        assert [row["gate.accuracy [1]"] for row in found["rows"]] == [0.9, None]

    @pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t=", " =", "\uff1d"])
    def test_no_cell_is_a_formula(self, invoke, keep, runs, begin):
        keep("a", subject=f"{begin}cmd|' /C calc'!A0", run_id=f"{begin}1+1")
        output = invoke("history", "export", runs).output
        (row,) = csv.DictReader(io.StringIO(output, newline=""))
        assert row["run_id"].startswith("'")
        assert row["subject"].startswith("'")
        assert not any(cell.lstrip().startswith(tuple("=+-@\uff1d")) for cell in row.values())

    def test_numbers_are_numbers_and_text_is_quoted(self, invoke, keep, runs):
        keep("a", accuracy=-0.5, run_id='say "a;b, c"')
        content = invoke("history", "export", runs).stdout_bytes
        assert content.count(b"\r\n") == content.count(b"\n") == 2
        head, line = content.decode("utf-8").splitlines()
        assert head.startswith('"run_id","directory",')
        assert line.startswith('"say ""a;b, c""",')
        assert line.endswith(",66,66,1.0,-0.5")

    def test_the_same_runs_give_the_same_bytes(self, invoke, keep, runs):
        for name in "cab":
            keep(name)
        once = invoke("history", "export", runs).stdout_bytes
        assert (
            once == invoke("history", "export", *sorted(runs.iterdir(), reverse=True)).stdout_bytes
        )

    def test_what_does_not_verify_has_no_row_and_is_named(self, invoke, keep, runs):
        keep("a")
        broken(keep("b"))
        result = invoke("history", "export", runs)
        assert len(result.stdout.splitlines()) == 2
        assert result.stderr.startswith(f"Left out: {runs / 'b'}: damaged: ")
        found = json.loads(invoke("history", "export", runs, "--format", "json").stdout)
        assert [row["directory"] for row in found["refused"]] == [str(runs / "b")]
        assert len(found["rows"]) == 1

    def test_an_odd_limit_in_one_run_costs_no_row_of_another(self, invoke, keep, runs, make):
        keep("a")
        odd, units = {"gates.a.b.at_least": 1.0}, {"gates.accuracy": "1", "gates.a": "1"}
        keep("b", policy=policy_of(make, thresholds={**LIMITS, **odd}, units=units))
        result = invoke("history", "export", runs)
        assert len(result.stdout.splitlines()) == 2, result.output
        assert "'gates.a.b.at_least' is no limit of a gate" in result.stderr

    def test_a_gate_without_a_unit_has_no_row_and_is_named(self, invoke, keep, runs, make):
        keep("a")
        keep("b", policy=policy_of(make, units={}))
        result = invoke("history", "export", runs)
        assert len(result.stdout.splitlines()) == 2
        assert "Gate 'accuracy' has no unit" in result.stderr

    def test_a_file(self, invoke, keep, runs, tmp_path):
        keep("a")
        to_pipe = invoke("history", "export", runs).stdout_bytes
        result = invoke("history", "export", runs, "--out", tmp_path / "new" / "runs.csv")
        assert result.stdout == f"{tmp_path / 'new' / 'runs.csv'}\n"
        assert (tmp_path / "new" / "runs.csv").read_bytes() == to_pipe

    def test_a_file_within_a_run_is_refused(self, invoke, keep, runs):
        path = keep("a")
        result = invoke("history", "export", runs, "--out", path / "runs.csv")
        assert result.exit_code == ExitCode.USAGE
        assert "which would no longer verify; choose a file outside of it." in result.stderr
        assert verify_run(path) == []


class TestReport:
    """`report --history`: the kept runs in the pages of one of them."""

    def report(self, invoke, run, *options):
        return invoke("report", run, "--format", "html,json,md", *options)

    def trend(self, run):
        return json.loads((run / "report.json").read_bytes())["trend"]

    def test_the_runs_that_lead_up_to_it_are_shown_and_verify(self, invoke, keep, runs):
        for hour in (1, 2, 4):
            keep(f"r{hour}", hour=hour, cpu="EPYC" if hour == 1 else "Xeon")
        run = keep("now", hour=3, accuracy=0.8)
        result = self.report(invoke, run, "--history", runs)
        assert result.exit_code == ExitCode.PASS
        trend = self.trend(run)
        assert [point["run_id"] for point in trend["points"]] == ["run-r1", "run-r2", "run-now"]
        assert [len(point["breaks"]) for point in trend["points"]] == [0, 1, 0]
        assert trend["left_out"] == ["1 run began later"]
        assert trend["points"][1]["digest"] == f"sha256:{file_sha256(runs / 'r2' / 'run.json')}"
        (figure,) = trend["figures"]
        assert (figure["name"], figure["values"]) == ("accuracy", [0.9, 0.9, 0.8])
        assert verify_run(run) == []
        told = invoke("verify", run).output
        pages = "report.html, report.json, report.md"
        assert f"  {pages}: rendered again, byte for byte\n" in told
        assert f"  with 2 kept runs as reports.json has them: {pages}\n" in told

    def test_with_a_baseline_too(self, invoke, keep, runs, make):
        room = {"baseline.score_drop.at_most": 2.0, "baseline.gate_worsening.at_most": 0.02}
        policy = policy_of(make, thresholds={**LIMITS, **room})
        before = keep("before", hour=1, policy=policy)
        run = keep("now", hour=2, policy=policy, beta="fail")
        self.report(invoke, run, "--history", runs, "--baseline", before)
        assert "### Changes against" in (run / "report.md").read_text()
        given = json.loads(invoke("verify", run, "--json").output)["given"]
        digest = f"run.json sha256:{file_sha256(before / 'run.json')}"
        assert set(given.values()) == {f"baseline run-before ({digest}) and 1 kept run"}

    def test_a_page_of_another_history_does_not_verify(self, invoke, keep, runs):
        keep("a", hour=1)
        run = keep("b", hour=2)
        self.report(invoke, run, "--history", runs)
        page = run / "report.md"
        page.write_text(page.read_text().replace("run\\-a", "run\\-x"))
        RunDirectory.open_existing(run).seal()
        result = invoke("verify", run)
        assert result.exit_code == ExitCode.VERIFICATION_FAILED
        assert "report.md: is not the report of this run" in result.stderr

    def test_the_same_runs_give_the_same_bytes_in_any_order(self, invoke, keep, runs):
        first, second, run = keep("a", hour=1), keep("b", hour=2), keep("c", hour=3)
        pages = []
        for order in ((first, second), (second, first), (runs,), (runs, second)):
            places = [word for place in order for word in ("--history", place)]
            self.report(invoke, run, *places)
            pages.append(digests(run))
        assert all(page == pages[0] for page in pages)
        assert len(self.trend(run)["points"]) == 3

    def test_what_does_not_verify_is_named_and_counted(self, invoke, keep, runs):
        changed(keep("bad", hour=1))
        keep("killed", hour=2, state="running")
        run = keep("now", hour=3)
        result = self.report(invoke, run, "--history", runs)
        assert result.exit_code == ExitCode.PASS
        assert f"Left out: {runs / 'bad'}: does not verify: items.jsonl" in result.stderr
        assert f"Left out: {runs / 'killed'}: unfinished" in result.stderr
        trend = self.trend(run)
        assert len(trend["points"]) == 1
        assert trend["left_out"][0].startswith("2 runs without a score")

    def test_a_directory_without_runs_is_no_run_that_is_not_shown(
        self, invoke, keep, runs, tmp_path
    ):
        (tmp_path / "other").mkdir()
        keep("a", hour=1)
        run = keep("now", hour=3)
        result = self.report(invoke, run, "--history", runs, "--history", tmp_path / "other")
        assert "other: empty: there is no run in it." in result.stderr
        assert self.trend(run)["left_out"] == []

    def test_a_history_begins_empty(self, invoke, keep, tmp_path):
        (tmp_path / "kept").mkdir()
        run = keep("first")
        result = self.report(invoke, run, "--history", tmp_path / "kept")
        assert result.exit_code == ExitCode.PASS, result.output
        assert f"Left out: {tmp_path / 'kept'}: empty: there is no run in it." in result.stderr
        assert [point["run_id"] for point in self.trend(run)["points"]] == ["run-first"]
        assert verify_run(run) == []

    def test_a_copy_of_a_run_is_no_second_measurement(self, invoke, keep, runs):
        """It was a point of its own, and counted twice in the rates of CTRF."""
        shutil.copytree(keep("a", hour=1), runs / "copy")
        keep("b", hour=2)
        run = keep("now", hour=3)
        self.report(invoke, run, "--history", runs)
        trend = self.trend(run)
        assert [point["run_id"] for point in trend["points"]] == ["run-a", "run-b", "run-now"]
        assert trend["left_out"] == ["1 run kept more than once"]

    def test_the_last_n(self, invoke, keep, runs):
        for hour in range(1, 5):
            keep(f"r{hour}", hour=hour)
        run = keep("now", hour=9)
        self.report(invoke, run, "--history", runs, "--last", 2)
        shown = [point["run_id"] for point in self.trend(run)["points"]]
        assert shown == ["run-r3", "run-r4", "run-now"]

    @pytest.mark.parametrize(
        ("options", "code", "words"),
        [
            (["--last", 3], ExitCode.USAGE, "--last goes with --history DIR"),
            (["--history", "gone"], ExitCode.USAGE, "gone does not exist"),
        ],
    )
    def test_a_history_that_is_none(self, invoke, keep, options, code, words):
        run = keep("now")
        before = digests(run)
        result = self.report(invoke, run, *options)
        assert (result.exit_code, words in result.stderr) == (code, True)
        assert digests(run) == before

    def test_elsewhere_it_leaves_all_runs_alone(self, invoke, keep, runs, tmp_path):
        keep("a", hour=1)
        run, before = keep("b", hour=2), digests(runs)
        result = self.report(invoke, run, "--history", runs, "--out", tmp_path / "public")
        assert result.exit_code == ExitCode.PASS
        assert "run\\-a" in (tmp_path / "public" / "report.md").read_text()
        assert digests(runs) == before


def policy_file(path, policy):
    path.write_text(json.dumps(policy.to_json()))
    return path


def digests(folder):
    return {path: file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


class TestRescore:
    def test_before_and_after(self, invoke, keep, runs, make, tmp_path):
        keep("a", hour=1, accuracy=0.9)
        keep("b", hour=2, accuracy=0.8)
        mild = policy_of(
            make, thresholds={"gates.accuracy.at_least": 0.7, "data.other.at_most": 1.0}
        )
        before = digests(runs)
        result = invoke(
            "history", "rescore", runs, "--policy", policy_file(tmp_path / "p.json", mild)
        )
        assert result.exit_code == ExitCode.PASS
        head, first, second, *notes = result.output.splitlines()
        assert head.split() == ["run", "verdict", "score"]
        assert first.split() == ["run-a", "PASS", "->", "PASS", "100", "->", "100"]
        assert second.split() == ["run-b", "FAIL", "->", "PASS", "66", "->", "100"]
        assert "  - gates.accuracy.at_least 0.85 -> 0.7: judged again, fail -> pass." in notes
        assert sum("Judged by the limits of the run: data.other" in note for note in notes) == 2
        assert f"Policy: {mild.digest}" in notes
        assert digests(runs) == before

    def test_a_failing_run_gates_nothing(self, invoke, keep, runs, make, tmp_path):
        keep("a")
        strict = policy_of(make, thresholds={"gates.accuracy.at_least": 0.95})
        result = invoke(
            "history", "rescore", runs, "--policy", policy_file(tmp_path / "p.json", strict)
        )
        assert result.exit_code == ExitCode.PASS
        assert "PASS -> FAIL" in result.output

    def test_the_policy_of_the_run_changes_nothing(self, invoke, keep, tmp_path):
        path = keep("a", beta="fail")
        result = invoke("history", "rescore", path, "--policy", path / "policy.json", "--json")
        (row,) = json.loads(result.output)["runs"]
        assert row["before"] == row["after"]
        assert row["notes"] == []

    def test_toml_is_laid_over_the_shipped_policy(self, invoke, keep, runs, tmp_path):
        keep("a")
        (tmp_path / "p.toml").write_text("[thresholds.gates]\naccuracy.at_least = 0.95\n")
        found = json.loads(
            invoke("history", "rescore", runs, "--policy", tmp_path / "p.toml", "--json").output
        )
        shipped = load_policy(tmp_path / "p.toml")
        (row,) = found["runs"]
        assert found["policy_digest"] == row["after"]["policy_digest"] == shipped.digest
        assert any("data.alpha" in note for note in row["notes"] if note.startswith("Left out"))

    def test_checks_of_the_own_suites_stay(self, invoke, keep, runs, tmp_path, monkeypatch):
        """Those that a catalogue.toml of the configuration's suite paths names."""
        keep("a")
        (tmp_path / "mine").mkdir()
        rows = [
            f'[[check]]\nid = "data.{name}"\ntitle = "t"\nsuite = "data"\nseverity = "low"\n'
            'component = "c"\n'
            for name in ("alpha", "beta")
        ]
        (tmp_path / "mine" / "catalogue.toml").write_text("\n".join(rows))
        (tmp_path / "forge.toml").write_text('[run]\nsuite_paths = ["mine"]\n')
        (tmp_path / "p.toml").write_text("")
        monkeypatch.chdir(tmp_path)
        result = invoke("history", "rescore", runs, "--policy", "p.toml")
        (left_out,) = (line for line in result.output.splitlines() if "Left out" in line)
        assert left_out.endswith(": training.gamma, training.delta.")

    def test_checks_that_markers_defined_stay(self, invoke, keep, runs, make, tmp_path):
        """They are in no file that a TOML policy is laid over, and had a place in the run."""
        marked = [InlineCheck("mine.red", "t", "high"), InlineCheck("mine.green", "t", "low")]
        shipped = load_policy()
        ran = with_inline(shipped, marked)
        items = [make.item("mine.red", "fail"), make.item("mine.green", "pass")]
        path = keep("a", policy=ran, items=items, scope=Scope(suites=("mine",)))
        (tmp_path / "p.toml").write_text("[thresholds.gates]\naccuracy.at_least = 0.95\n")
        found = json.loads(
            invoke("history", "rescore", runs, "--policy", tmp_path / "p.toml", "--json").output
        )
        (row,) = found["runs"]
        strict = load_policy(tmp_path / "p.toml")
        assert found["policy_digest"] == strict.digest
        assert row["after"]["policy_digest"] == with_inline(strict, marked).digest
        assert row["after"] == {**row["before"], "policy_digest": row["after"]["policy_digest"]}
        assert row["before"]["verdict"] == "FAIL"
        assert row["notes"][0].startswith(
            "Kept as their markers defined them when it ran, they are in no file: "
            "mine.green, mine.red; with them the policy is sha256:"
        )
        whole = policy_file(tmp_path / "p.json", strict)
        (row,) = json.loads(invoke("history", "rescore", path, "--policy", whole, "--json").output)[
            "runs"
        ]
        assert "mine.red" in row["notes"][0]
        assert row["notes"][0].startswith("Left out")

    def test_what_does_not_verify_is_not_scored(self, invoke, keep, runs):
        policy = keep("a") / "policy.json"
        changed(keep("b"))
        result = invoke("history", "rescore", runs, "--policy", policy)
        assert "run-b" not in result.output
        assert f"{runs / 'b'}: does not verify: items.jsonl" in result.output

    def test_when_no_run_verifies(self, invoke, keep, runs):
        policy = broken(keep("a")) / "policy.json"
        result = invoke("history", "rescore", runs, "--policy", policy)
        assert result.exit_code == ExitCode.PASS
        assert result.output.startswith("No run verifies.\n")

    @pytest.mark.parametrize(
        ("content", "words"),
        [(None, "Cannot read"), ("[thresholds.gates]\nacuracy.at_least = 1.0\n", "'acuracy")],
    )
    def test_a_policy_that_is_none(self, invoke, keep, runs, tmp_path, content, words):
        keep("a")
        file = tmp_path / "p.toml"
        if content is not None:
            file.write_text(content)
        result = invoke("history", "rescore", runs, "--policy", file)
        assert result.exit_code == ExitCode.USAGE
        assert words in result.stderr.replace("gates.", "")


def test_a_copied_run_is_two(invoke, keep, runs):
    path = keep("a")
    shutil.copytree(path, runs / "copy")
    found = json.loads(invoke("history", "show", runs, "--json").output)
    assert [row["directory"] for row in found["runs"]] == [str(path), str(runs / "copy")]
    assert read_record(path) == read_record(runs / "copy")
    assert read_policy(path).digest == found["runs"][0]["policy_digest"]


@pytest.mark.parametrize("name", ["show", "export", "rescore"])
def test_help_has_an_example(invoke, name):
    result = invoke("history", name, "--help")
    assert result.exit_code == ExitCode.PASS
    assert f"forge-harness history {name}" in result.output.partition("Example:")[2]
