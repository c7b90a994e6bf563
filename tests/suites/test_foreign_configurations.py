"""Configurations that are not the reference's: keys of no table, or deeper, or null."""

import difflib
import hashlib
import json
import tomllib
from types import MappingProxyType

import pytest

from forge_harness.errors import ConfigError
from forge_harness.types import Outcome

NUMBER = {"type": "number", "minimum": 0}
COUNT = {"type": "integer", "minimum": 1}
NULL = {"type": "null"}


class Loaded:
    def __init__(self, values, origins):
        self._values, self._origins = values, origins

    def values(self):
        return dict(self._values)

    def origin(self, key):
        return self._origins[key]

    @property
    def digest(self):
        return f"sha256:{hashlib.sha256(json.dumps(self._values).encode()).hexdigest()}"

    def to_toml(self):
        return "".join(
            f"{key} = {json.dumps(value)}\n"
            for key, value in self._values.items()
            if value is not None
        )


class Configuration:
    """Offers Configures: an optimizer in a table of its own, a seed in none, no clipping by 0."""

    name = "configuration"
    environment_prefix = "MINE_"
    clip_norm = MappingProxyType({"anyOf": [NUMBER, NULL]})
    defaults = MappingProxyType(
        {
            "seed": 0,
            "model.width": 64,
            "model.heads": 4,
            "train.clip_norm": 1.0,
            "train.optim.lr": 0.003,
            "train.optim.steps": None,
        }
    )

    def kinds(self):
        return {
            "seed": {"type": "integer", "minimum": 0},
            "model.width": COUNT,
            "model.heads": COUNT,
            "train.clip_norm": dict(self.clip_norm),
            "train.optim.lr": {**NUMBER, "maximum": 1},
            "train.optim.steps": {"type": ["integer", "null"], "minimum": 1},
        }

    def config_schema(self):
        schema = {"properties": {}, "additionalProperties": False}
        for name, kind in self.kinds().items():
            *path, key = name.split(".")
            table = schema
            for part in path:
                fresh = {"type": "object", "properties": {}, "additionalProperties": False}
                table = table["properties"].setdefault(part, fresh)
            table["properties"][key] = kind
        schema["properties"]["labels"] = {"type": "object", "additionalProperties": True}
        return schema

    def quantization_info(self, task):
        raise NotImplementedError

    def load_config(self, *, file=None, environ=None, flags=None):
        values, origins = dict(self.defaults), dict.fromkeys(self.defaults, "default")
        given = {"file": dict(_flat(tomllib.loads(file.read_text()) if file else {}))}
        given["environment"] = {
            key: json.loads(environ[variable])
            for key in values
            if (variable := f"MINE_{key}".replace(".", "_").upper()) in (environ or {})
        }
        given["flag"] = flags or {}
        for origin, layer in given.items():
            for key, value in layer.items():
                values[key], origins[key] = self.checked(key, value), origin
        if values["model.width"] % values["model.heads"] or values["model.width"] % 4:
            raise ConfigError("The heads do not divide the width.")
        return Loaded(values, origins)

    def checked(self, key, value):
        if key not in self.defaults:
            (nearest,) = difflib.get_close_matches(key, [*self.defaults, "labels"], 1, 0)
            raise ConfigError(f"Unknown key {key}; the nearest is {nearest}.")
        if key != "seed" and "steps" not in key and "model" not in key:
            low, high = 0, 1 if key.endswith("lr") else float("inf")
        else:
            low, high = int(key != "seed"), float("inf")
        if not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"{key} is {value}; expected {low} to {high}.")
        return value


def _flat(table, prefix=""):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


class NullByType(Configuration):
    clip_norm = MappingProxyType({**NUMBER, "type": ["number", "null"]})


class Chained(Configuration):
    """A table may hold another of its kind, so that the schema refers to itself."""

    defaults = MappingProxyType({**Configuration.defaults, "part.weight": 1.0, "part.then": None})

    def config_schema(self):
        then = {"anyOf": [{"$ref": "#/$defs/Part"}, NULL]}
        part = {"properties": {"weight": NUMBER, "then": then}, "additionalProperties": False}
        schema = super().config_schema()
        schema["properties"]["part"] = {"$ref": "#/$defs/Part"}
        return {**schema, "$defs": {"Part": {"type": "object", **part}}}


class ClipOrDefault(Configuration):
    """`config.clip_norm or 1.0`: clipping cannot be turned off."""

    def checked(self, key, value):
        return super().checked(key, value) or self.defaults[key] or value


class ClipOrDefaultByType(ClipOrDefault, NullByType):
    pass


class AnyRate(Configuration):
    """The learning rate, two tables deep, is not held to its range."""

    def checked(self, key, value):
        return value if key == "train.optim.lr" else super().checked(key, value)


class Budget(Configuration):
    """A key that ends with a letter twice, and a bound of which 1e-9 is no part."""

    defaults = MappingProxyType(
        {**Configuration.defaults, "train.loss": 1.0, "train.losss": 1.0, "train.budget": 2e8}
    )

    def kinds(self):
        budget = {**NUMBER, "minimum": 1e8}
        return {
            **super().kinds(),
            **dict.fromkeys(("train.loss", "train.losss"), NUMBER),
            "train.budget": budget,
        }

    def checked(self, key, value):
        if key == "train.budget" and not (isinstance(value, int | float) and value >= 1e8):
            raise ConfigError(f"{key} is {value}; expected at least 100,000,000.")
        return super().checked(key, value)


class Vague(Configuration):
    """A bound of one half that its sentence does not say."""

    def kinds(self):
        return {**super().kinds(), "train.optim.lr": {**NUMBER, "maximum": 0.5}}

    def checked(self, key, value):
        if key == "train.optim.lr" and value > 0.5:
            raise ConfigError(f"{key} is {value}; rule 10 is broken.")
        return super().checked(key, value)


class Elsewhere(Configuration):
    """Weights of a hub, data in a bucket, and a file that is named by its URL."""

    file = "/"

    @property
    def defaults(self):
        return {
            **Configuration.defaults,
            "model.name_or_path": "acme/tiny-1.58",
            "train.data_path": "s3://bucket/of/data",
            "train.vocabulary_file": f"file://{self.file}",
        }


class Nowhere(Elsewhere):
    file = "/no/such/vocabulary"


CHECKS = (
    *("schema_valid", "unknown_key_refused", "explicit_zero_kept", "precedence", "ranges"),
    *("shape_divisibility", "seed_fixed", "digest_stable", "round_trip", "policy_separate"),
)


@pytest.mark.parametrize("subject", [Configuration, NullByType, Chained, Budget])
@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_configuration_is_no_false_alarm(run_check, subject, check):
    run = run_check(f"configuration.{check}", subject())
    assert run.outcome is Outcome.PASS, run.reason


@pytest.mark.parametrize(
    ("subject", "check", "shows"),
    [
        (ClipOrDefault, "explicit_zero_kept", "train.clip_norm = 0.0 of the file became 1.0"),
        (ClipOrDefaultByType, "explicit_zero_kept", "train.clip_norm = 0.0 of the file became"),
        (AnyRate, "ranges", "train.optim.lr = "),
        (Vague, "ranges", "refusals_without_the_bound is 1, expected 0 (train.optim.lr = 1.5"),
    ],
)
def test_what_befalls_a_key_that_may_be_null_or_lies_deeper_shows(run_check, subject, check, shows):
    run = run_check(f"configuration.{check}", subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert shows in run.reason


def test_what_is_on_no_disk_of_this_machine_is_no_missing_path(run_check):
    run = run_check("configuration.paths_exist", Elsewhere())
    assert (run.outcome, run.evidence("paths")) == (Outcome.PASS, 1), run.reason
    run = run_check("configuration.paths_exist", Nowhere())
    assert run.outcome is Outcome.FAIL
    assert "train.vocabulary_file = file:///no/such/vocabulary" in run.reason


def test_every_key_is_looked_at(run_check):
    run = run_check("configuration.precedence", Configuration())
    # Width and heads are tied to each other, and take no three values alone.
    assert run.evidence("keys_tried") == len(Configuration.defaults) - 2
    run = run_check("configuration.ranges", Configuration())
    assert run.evidence("bounds_tried") == len(Configuration.defaults) + 1
