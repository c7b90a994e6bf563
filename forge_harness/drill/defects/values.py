"""Configurations that hold, save, publish or identify their values wrongly."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from forge_harness.drill.defect import Defect, Stage
from forge_harness.errors import ConfigError
from forge_harness.protocols import ResolvedConfig
from forge_harness.subject.reference import ReferenceSubject

from .configuration import Changed, LoadsAnother, ResolvesAnother, resolved


class PublishesAnotherSchema(ReferenceSubject):
    """Publishes a schema in which the table `run` has other keys."""

    def __init__(self, **keys: Mapping[str, Any]) -> None:
        self.keys = keys

    def config_schema(self) -> Mapping[str, Any]:
        """See `Configures.config_schema`."""
        schema = dict(super().config_schema())
        run = dict(schema["$defs"]["RunConfig"])
        run["properties"] = {**run["properties"], **self.keys}
        return {**schema, "$defs": {**schema["$defs"], "RunConfig": run}}


class KeepsWhatWasSet(ReferenceSubject):
    """Flags of one load are written into the defaults of the next."""

    def __init__(self) -> None:
        self.flags: dict[str, Any] = {}

    def load_config(self, *, flags: Mapping[str, Any] | None = None, **layers: Any) -> Any:
        """See `Configures.load_config`."""
        together = {**self.flags, **(flags or {})}
        try:
            loaded = super().load_config(flags=together, **layers)
        except ConfigError:
            return super().load_config(flags=flags, **layers)
        self.flags = together
        return loaded


def _digest_of_the_text(sound: Callable[..., Any], *, file: Path | None, **layers: Any) -> Any:
    text = file.read_text(encoding="utf-8") if file is not None else ""
    seen = f"{text}{layers['flags']}"
    return Changed(sound(file=file, **layers), {"digest": lambda config: _digest(seen)})


def _digest(value: object) -> str:
    return f"sha256:{sha256(repr(value).encode()).hexdigest()}"


def _of_values_and_origins(config: ResolvedConfig) -> str:
    return _digest([(key, value, config.origin(key)) for key, value in config.values().items()])


def _of_all_but_training(config: ResolvedConfig) -> str:
    return _digest([kv for kv in config.values().items() if not kv[0].startswith("train.")])


def _short_floats(text: str) -> str:
    """Floats with three digits."""
    return re.sub(r"(?m)(?<== )\d+\.\d{4,}$", lambda found: f"{float(found[0]):.3f}", text)


def _integers_become_floats(sound: Callable[..., Any], *, file: Path | None, **layers: Any) -> Any:
    loaded = sound(file=file, **layers)
    if file is None or "seed" not in file.read_text(encoding="utf-8"):
        return loaded
    return Changed(loaded, {"values": lambda values: {"run.seed": float(values["run.seed"])}})


def _one_value(key: str, value: object) -> Callable[[], ResolvesAnother]:
    return lambda: ResolvesAnother(values=lambda values: {key: value})


def _saved_floats(subject: Any) -> object:
    """The text of a configuration with a float of many digits."""
    return subject.load_config(environ={}, flags={"train.learning_rate": 0.001234567}).to_toml()


_holds = partial(Defect, stage=Stage.CONFIGURATION, alive=resolved)

DEFECTS = (
    _holds(
        id="value_outside_its_schema",
        title="A value in force is one the published schema refuses",
        check="configuration.schema_valid",
        shows="schema_errors_in_force is 1",
        subject=_one_value("train.steps", -5),
        subtlety=3,
    ),
    _holds(
        id="schema_accepts_anything",
        title="The schema does not say what the seed may be",
        check="configuration.schema_valid",
        shows="keys_that_accept_anything is 1 keys, expected 0 keys (run.seed)",
        subject=lambda: PublishesAnotherSchema(seed={}),
        subtlety=4,
    ),
    _holds(
        id="digest_of_the_text",
        title="The digest follows comments and spelling of the file",
        check="configuration.digest_stable",
        shows="reformatted_digest is",
        subject=lambda: LoadsAnother(_digest_of_the_text),
        subtlety=3,
    ),
    _holds(
        id="digest_of_origins",
        title="The digest follows the layer a value came from",
        check="configuration.digest_stable",
        shows="other_layer_digest is",
        subject=lambda: ResolvesAnother(digest=_of_values_and_origins),
        subtlety=4,
    ),
    _holds(
        id="digest_of_nothing",
        title="The digest is the same for every configuration",
        check="configuration.digest_stable",
        shows="distinct_digests is 1,",
        subject=lambda: ResolvesAnother(digest=lambda config: "sha256:constant"),
        subtlety=3,
    ),
    _holds(
        id="R08_digest_leaves_training_out",
        title="The digest does not move with what training is set to: caches answer for another",
        check="configuration.digest_stable",
        shows="distinct_digests is",
        subject=lambda: ResolvesAnother(digest=_of_all_but_training),
        source="EleutherAI/lm-evaluation-harness#3881",
        subtlety=4,
    ),
    _holds(
        id="V06_defaults_keep_what_was_set",
        title="Flags of one load stay in force in the next of the same process",
        check="configuration.digest_stable",
        shows="distinct_digests is",
        subject=KeepsWhatWasSet,
        source="huggingface/transformers replace_with_bitnet_linear",
        subtlety=4,
    ),
    _holds(
        id="forgets_a_key_when_saving",
        title="The saved configuration lacks the number of steps",
        check="configuration.round_trip",
        shows="changed_keys_that_differ is 1 keys, expected 0 keys (train.steps)",
        subject=lambda: ResolvesAnother(
            toml=lambda text: re.sub(r"(?m)^steps = .*$", "", text),
        ),
        subtlety=3,
    ),
    _holds(
        id="floats_rounded_when_saved",
        title="Floats are saved with three digits",
        check="configuration.round_trip",
        shows="changed_keys_that_differ is",
        subject=lambda: ResolvesAnother(toml=_short_floats),
        alive=_saved_floats,
        subtlety=4,
    ),
    _holds(
        id="integers_become_floats",
        title="A whole number read from a file becomes a float",
        check="configuration.round_trip",
        shows="keys_that_differ is 1 keys, expected 0 keys (run.seed)",
        subject=lambda: LoadsAnother(_integers_become_floats),
        subtlety=4,
    ),
    _holds(
        id="path_that_is_not_there",
        title="The policy in force is in a directory that does not exist",
        check="configuration.paths_exist",
        shows="paths_missing is 1 paths, expected 0 paths (run.policy = /no/such/place",
        subject=_one_value("run.policy", "/no/such/place/policy.toml"),
        subtlety=2,
    ),
    _holds(
        id="token_in_the_configuration",
        title="A value in force is an access token",
        check="configuration.no_secret_in_config",
        shows="values_like_credentials is 1",
        # Put together here: scanners of secrets read this file as well.
        subject=_one_value("run.subject", "hf_" + "aB3" * 12),
        subtlety=3,
    ),
    _holds(
        id="thresholds_in_the_configuration",
        title="Whoever is measured can set the thresholds",
        check="configuration.policy_separate",
        shows="thresholds_in_configuration is 1",
        subject=lambda: PublishesAnotherSchema(thresholds={"type": "object"}),
        subtlety=3,
    ),
)
