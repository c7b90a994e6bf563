"""Fixtures of the plugin."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import pytest

from forge_harness._pytest.outcomes import EVIDENCE_KEY
from forge_harness._pytest.shared import SharedBuildError, build_once
from forge_harness._pytest.state import ForgeState, state_of

if TYPE_CHECKING:
    from forge_harness.config import HarnessConfig
    from forge_harness.evidence import Recorder
    from forge_harness.policy import Policy
    from forge_harness.subject.protocols import QualityRun

STUDY = "quality_study"


@pytest.fixture
def evidence(request: pytest.FixtureRequest) -> Recorder:
    """Recorder of the item's evidence: at_most, at_least, equal, within, record, artifact."""
    from forge_harness.evidence import Recorder

    run_dir = state_of(request.config).options.run_dir
    properties = request.node.user_properties
    # A retry (pytest-rerunfailures) runs the same item again; what counts is the last attempt.
    properties[:] = [pair for pair in properties if pair[0] != EVIDENCE_KEY]
    return Recorder(properties, None if run_dir is None else run_dir / "evidence")


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> object:
    """The object that is validated (`--forge-subject`)."""
    return state_of(request.config).loaded.subject


@pytest.fixture(scope="session")
def policy(request: pytest.FixtureRequest) -> Policy:
    """Catalogue, thresholds and weights of the run."""
    return state_of(request.config).policy


@pytest.fixture(scope="session")
def forge_profile(request: pytest.FixtureRequest) -> str:
    """The profile: quick, full or nightly."""
    return state_of(request.config).profile


@pytest.fixture(scope="session")
def forge_seed(request: pytest.FixtureRequest) -> int:
    """The seed of the run."""
    return state_of(request.config).seed


@pytest.fixture(scope="session")
def forge_config(request: pytest.FixtureRequest) -> HarnessConfig:
    """The configuration of the run."""
    return state_of(request.config).harness_config


@pytest.fixture(scope="session")
def shared_build(request: pytest.FixtureRequest) -> Callable[[str, Callable[[], Any]], Any]:
    """`shared_build(name, builder)`: the builder's JSON result, built once for all workers."""
    shared = state_of(request.config).shared

    def build(name: str, builder: Callable[[], Any]) -> Any:  # noqa: ANN401 - any JSON value
        return build_once(shared, name, builder)

    return build


@pytest.fixture(scope="session")
def served_load(
    subject: Any,  # noqa: ANN401 - whatever offers Serves
    shared_build: Callable[[str, Callable[[], Any]], Any],
    forge_profile: str,
    forge_seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """The report of one load campaign on the subject's server, run once for all workers."""
    from forge_harness.load.campaign import load_campaign

    def run() -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("load")
        (folder / "server").mkdir()
        spec = subject.server(folder / "server")
        return load_campaign(spec, folder / "run", profile=forge_profile, seed=forge_seed)

    report: dict[str, Any] = shared_build("load", run)
    return report


@pytest.fixture(scope="session")
def quality_study(request: pytest.FixtureRequest) -> list[QualityRun]:
    """The trained arms of the quality comparison, trained once for all workers."""
    state = state_of(request.config)
    if state.handover is not None:
        return state.handover.quality_study(state.profile)
    if state.options.study is not None:
        return _given_study(state)
    return _built_study(state)


def _given_study(state: ForgeState) -> list[QualityRun]:
    from forge_harness.integration.quality_study import read_study

    file = state.options.study
    assert file is not None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SharedBuildError(f"{STUDY}: cannot read {file}: {error}") from error
    if isinstance(document, dict):
        # `forge-harness run` leaves the reason here when the study failed.
        raise SharedBuildError(f"{STUDY} could not be built: {document.get('error')}")
    return read_study(file)


def _built_study(state: ForgeState) -> list[QualityRun]:
    from forge_harness.integration.quality_study import obtain_study, read_study

    file = state.shared / "study.json"

    def build() -> str:
        # A configured worker count is for checks; the study has the cores to itself, because
        # the other workers wait for it here.
        obtain_study(state.subject_spec, state.profile, file)
        return file.name

    return read_study(state.shared / cast("str", build_once(state.shared, STUDY, build)))
