"""Work that several checks share is done once, also when it fails."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from forge_harness._pytest.shared import SharedBuildError, build_once


def build_and_count(directory, count_file, all_are_here):
    all_are_here.wait(20)

    def builder():
        time.sleep(0.3)
        with open(count_file, "a", encoding="utf-8") as stream:
            stream.write(f"{os.getpid()}\n")
        return {"numbers": [1, 2.5, None]}

    assert build_once(directory, "work", builder) == {"numbers": [1, 2.5, None]}


def test_several_processes_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "shared", tmp_path / "count", context.Barrier(4))
    processes = [context.Process(target=build_and_count, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert len((tmp_path / "count").read_text(encoding="utf-8").splitlines()) == 1


def test_a_builder_that_raised_is_not_tried_again(tmp_path):
    calls = []

    def builder():
        calls.append(1)
        raise ValueError("the loss is nan")

    for _ in range(2):
        with pytest.raises(SharedBuildError, match="work could not be built: ValueError: the loss"):
            build_once(tmp_path, "work", builder)
    assert calls == [1]


def test_a_result_that_json_does_not_hold_is_an_error(tmp_path):
    with pytest.raises(TypeError):
        build_once(tmp_path, "work", lambda: object())
    # The next process tries again: nothing half written is left.
    assert build_once(tmp_path, "work", lambda: 3) == 3


@pytest.mark.parametrize("name", ["../up", "", "a b", ".hidden"])
def test_names_stay_inside_the_directory(tmp_path, name):
    with pytest.raises(ValueError, match="shared build"):
        build_once(tmp_path, name, lambda: 1)


STUDY = """
@pytest.mark.forge_check("mine.a", title="It", severity="high")
@pytest.mark.parametrize("n", range(4))
def test_shared(evidence, shared_build, n):
    def builder():
        with open("built", "a") as stream: stream.write("x")
        return 5
    evidence.equal("built", shared_build("five", builder), expected=5, reason="r")
"""


def test_the_fixture_builds_once_for_all_workers(told, pytester):
    run = told(STUDY, "-n", "2", subprocess=True)
    assert {item["outcome"] for item in run.items.values()} == {"pass"}
    assert len(run.items) == 4
    assert (pytester.path / "built").read_text(encoding="utf-8") == "x"


GIVEN = """
@pytest.mark.forge_check("mine.a", title="It", severity="high")
def test_study(evidence, quality_study):
    evidence.equal("runs", len(quality_study), expected=0, reason="r")
"""


def test_a_study_given_as_a_file(told, pytester):
    study = pytester.path / "study.json"
    study.write_text("[]", encoding="utf-8")
    assert told(GIVEN, "--forge-study", "study.json").outcome("test_study") == "pass"
    study.write_text('{"error": "run digits ternary 3 raised"}', encoding="utf-8")
    run = told(GIVEN, "--forge-study", "study.json")
    assert run.outcome("test_study") == "error"
    assert "could not be built: run digits ternary 3 raised" in run.reason("test_study")
