"""The reference subject's quality runs show the package they were measured as."""

import base64

import pytest

from forge_harness.subject.reference import ReferenceSubject
from forge_harness.training import quality


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setitem(quality.STUDIES, ("digits", "quick"), quality.Study(seeds=1, steps=10))


def written(run, folder):
    for name, content in run.package.items():
        (folder / name).write_bytes(base64.b64decode(content))
    return folder


def test_a_ternary_run_shows_its_package(tmp_path):
    subject = ReferenceSubject()
    (run,) = subject.quality_run("digits", "ternary", 6, "quick")
    package = written(run, tmp_path)
    assert run.package_task == "digits#1"
    assert sum(path.stat().st_size for path in package.iterdir()) == run.package_bytes
    found = subject.evaluate_package(run.package_task, package)
    assert (found["loss"], found["accuracy"]) == (run.loss, run.accuracy)


def test_showing_it_changes_nothing_of_the_run():
    from dataclasses import replace

    (shown,) = ReferenceSubject().quality_run("digits", "ternary", 0, "quick")
    (plain,) = quality.quality_run("digits", "ternary", 0, "quick")
    measured = {"package": {}, "package_task": "", "seconds": 0.0, "peak_rss_bytes": 0}
    assert replace(shown, **measured) == replace(plain, **measured)


def test_an_overridden_export_is_what_is_shown():
    class Exports(ReferenceSubject):
        def export_package(self, session, path):
            super().export_package(session, path)
            (path / "extra.txt").write_text("more")

    (run,) = Exports().quality_run("digits", "ternary", 0, "quick")
    assert base64.b64decode(run.package["extra.txt"]) == b"more"


@pytest.mark.parametrize(("seed", "shown"), [(0, True), (1, False)])
def test_the_other_arms_show_no_package_and_full_precision_its_first_weights(seed, shown):
    runs = ReferenceSubject().quality_run("digits", "full", seed, "quick")
    assert [(run.arm, dict(run.package)) for run in runs] == [("full", {}), ("post_training", {})]
    assert [bool(run.weights) for run in runs] == [shown, False]
