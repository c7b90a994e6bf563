"""The directory of a training run: its files, its checkpoints, and what it says the run is.

DIR/training.json       task, options and model, written first
DIR/metrics.jsonl       one line a step
DIR/checkpoints/        the newest two: files step-N.safetensors, or directories step-N where the
                        weights are sharded; with a store, they are states in it
DIR/package/            inference weights of a ternary model
DIR/metrics.json        held-out quality, written last: the run is complete
"""

from __future__ import annotations

import json
import math
import operator
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from forge_harness.durable import read_plain
from forge_harness.errors import UsageError
from forge_harness.paths import resolved_path
from forge_harness.protocols import TrainOptions
from forge_harness.state import Sealer
from forge_harness.training.checkpoint import (
    has_session_header,
)
from forge_harness.training.ingredients import BuildModel
from forge_harness.training.keeping import (
    DirectoryCheckpoints,
    KeepsCheckpoints,
    StateCheckpoints,
)
from forge_harness.training.model_record import checked_record, recorded_builder

OPTIONS = "training.json"
STEPS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
PACKAGE = "package"
RESULT = "metrics.json"
DATA = "data_digest"
"""Key, in the first and the last file, of what the run was trained on."""
_SCRATCH = ".checkpoint"
_NEVER = "inf"

OnNote = Callable[[str], object]
_KINDS: dict[str, tuple[type, ...]] = {
    "seed": (int,),
    "steps": (int,),
    "precision": (str,),
    "batch_size": (int, NoneType),
    "accumulation": (int,),
    "learning_rate": (int, float, NoneType),
    "clip_norm": (int, float, NoneType),
    "fixed_batch": (list, NoneType),
    "extra": (dict,),
}
"""Option -> what JSON makes of it."""


@dataclass(frozen=True, slots=True)
class TrainingDirectory:
    """Names and checkpoints of a run's directory."""

    path: Path

    def saved(self) -> Any:  # noqa: ANN401 - any JSON value
        """Returns what the run's first file holds.

        Raises:
            OSError: It cannot be read, or is no plain file.
            ValueError: It is no JSON.
        """
        try:
            return json.loads(read_plain(self.path / OPTIONS))
        except RecursionError as error:
            raise ValueError("its values are nested too deep") from error

    def keeper(
        self,
        state: Path | None = None,
        scratch: Path | None = None,
        sealer: Sealer | None = None,
    ) -> KeepsCheckpoints:
        """Returns where the run's checkpoints are kept.

        Args:
            state: Root of a store; None: the one the run was started with, if any.
            scratch: Directory for copies out of a store; None: one in the run's, for whoever
                trains there.
            sealer: Encrypts what a store keeps, and opens it.
        """
        saved: dict[str, Any] = {}
        with suppress(OSError, TypeError, ValueError):
            saved = dict(self.saved())
        if state is None:
            with suppress(KeyError, TypeError):
                state = Path(saved["state"])
        if state is None:
            return DirectoryCheckpoints(self.path / CHECKPOINTS)
        owner = str(saved.get("run", "")) if saved else secrets.token_hex(8)
        # The directory may have another name since then.
        run = str(saved.get("kept_as") or resolved_path(self.path).name)
        return StateCheckpoints(state, run, scratch or self.path / _SCRATCH, owner, sealer)

    def options(self) -> tuple[str, TrainOptions]:
        """Returns task and options of the run.

        Raises:
            UsageError: The directory holds no run.
        """
        try:
            saved = self.saved()
            return str(saved["task"]), _options_of(saved["options"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{str(self.path)!r} holds no training run to resume ({error}); start one without "
                "--resume."
            ) from error

    def checkpoint_every(self) -> int:
        """Returns the steps between checkpoints the run was last given; 0 of earlier builds.

        Raises:
            UsageError: The directory holds no run, or what is there is no number of steps.
        """
        try:
            every = self.saved().get("checkpoint_every", 0)
            if type(every) is not int or every < 0:
                raise ValueError(f"it is {every!r:.80}")
        except (OSError, AttributeError, ValueError) as error:
            raise UsageError(
                f"{OPTIONS} in {str(self.path)!r} does not say how many steps are between "
                f"checkpoints ({error}); give --checkpoint-every."
            ) from error
        return every

    def model(self) -> dict[str, Any] | None:
        """Returns the run's `model_record`; None when there is none of its model.

        Raises:
            UsageError: What is there is no record.
        """
        try:
            saved = self.saved().get("model")
            return None if saved is None else checked_record(saved)
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{OPTIONS} in {str(self.path)!r} does not say what model the run trains "
                f"({error}); start a new run."
            ) from error

    def build_model(self) -> BuildModel | None:
        """Returns what builds the run's model; None when there is no record of it."""
        record = self.model()
        return None if record is None else recorded_builder(record)


def newest_checkpoint(path: Path) -> Path:
    """Returns the checkpoint itself, or the newest one of a run's directory.

    Raises:
        CheckpointError: The directory has none.
    """
    if not path.is_dir() or has_session_header(path):
        return path
    return TrainingDirectory(path).keeper().newest()


def json_options(options: TrainOptions) -> dict[str, Any]:
    """Returns the options as JSON values, which `TrainingDirectory.options` makes options of.

    Raises:
        UsageError: They hold what is for checks only.
    """
    if options.validation_canaries:
        raise UsageError("validation_canaries belong to checks, not to a run in a directory.")
    saved = asdict(options)
    if saved["clip_norm"] == math.inf:  # No clipping, and no JSON number.
        saved["clip_norm"] = _NEVER
    return saved


def _options_of(saved: Any) -> TrainOptions:  # noqa: ANN401 - any JSON value
    """Returns the options in a file; raises KeyError, TypeError or ValueError."""
    options = {**saved, "validation_canaries": ()}
    if options["clip_norm"] == _NEVER:
        options["clip_norm"] = math.inf
    for key, kinds in _KINDS.items():
        if type(options[key]) not in kinds:
            raise ValueError(f"option {key} is {options[key]!r:.80}")
    if options["fixed_batch"] is not None:
        options["fixed_batch"] = tuple(operator.index(index) for index in options["fixed_batch"])
    return TrainOptions(**options)
