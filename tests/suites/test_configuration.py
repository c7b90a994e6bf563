"""Each configuration check goes red for its own reason."""

import re
from dataclasses import replace
from hashlib import sha256

import pytest
import torch

from forge_harness.errors import ConfigError
from forge_harness.formats.manifest import write_manifest
from forge_harness.subject.reference import ReferenceSubject

CHECKS = [
    "schema_valid",
    "unknown_key_refused",
    "explicit_zero_kept",
    "precedence",
    "ranges",
    "shape_divisibility",
    "quantization_consistent",
    "schedule_golden",
    "warmup_within_run",
    "seed_fixed",
    "paths_exist",
    "no_secret_in_config",
    "digest_stable",
    "round_trip",
    "policy_separate",
]


@pytest.mark.parametrize("name", CHECKS)
def test_the_reference_configuration_is_sound(run_check, name):
    run = run_check(f"configuration.{name}")
    assert run.outcome == "pass", run.reason


class Wrapped:
    """A loaded configuration with some answers changed."""

    def __init__(self, config, **changes):
        self.config, self.changes = config, changes

    def values(self):
        values = self.config.values()
        return (
            {**values, **self.changes.get("values", dict)(values)}
            if "values" in self.changes
            else values
        )

    def origin(self, key):
        return self.changes.get("origin", self.config.origin)(key)

    def to_toml(self):
        return self.changes.get("toml", lambda text: text)(self.config.to_toml())

    @property
    def digest(self):
        return self.changes.get("digest", lambda config: config.digest)(self.config)


class Loader(ReferenceSubject):
    """Loads as the reference does, then changes what `changes` says."""

    changes: dict = {}  # noqa: RUF012 - replaced whole by subclasses, never changed

    def load_config(self, **layers):
        return Wrapped(super().load_config(**layers), **self.changes)


class ValueOutsideItsSchema(Loader):
    changes = {"values": lambda values: {"train.steps": -5}}  # noqa: RUF012


class SchemaThatAcceptsAnything(ReferenceSubject):
    def config_schema(self):
        schema = dict(super().config_schema())
        definitions = {**schema["$defs"]}
        run = {**definitions["RunConfig"]}
        run["properties"] = {**run["properties"], "seed": {}}
        definitions["RunConfig"] = run
        return {**schema, "$defs": definitions}


class IgnoresUnknownKeys(ReferenceSubject):
    def load_config(self, *, file=None, environ=None, flags=None):
        try:
            return super().load_config(file=file, environ=environ, flags=flags)
        except ConfigError as error:
            if "nknown" not in str(error):
                raise
            return super().load_config(environ={}, flags={})


class RefusesWithoutAHint(ReferenceSubject):
    def load_config(self, **layers):
        try:
            return super().load_config(**layers)
        except ConfigError:
            raise ConfigError("Bad configuration.") from None


class RefusesWithAnotherCode(ReferenceSubject):
    def load_config(self, **layers):
        try:
            return super().load_config(**layers)
        except ConfigError as error:
            error.exit_code = 1
            raise


class ValueOrDefault(Loader):
    """`value or default`, the defect that loses an explicit zero."""

    def load_config(self, **layers):
        config = super().load_config(**layers)
        defaults = ReferenceSubject.load_config(self, environ={}, flags={}).values()
        config.changes = {
            "values": lambda values: {k: v or defaults[k] or "default" for k, v in values.items()}
        }
        return config


class FalsyFlagsLost(ReferenceSubject):
    def load_config(self, *, file=None, environ=None, flags=None):
        flags = {key: value for key, value in (flags or {}).items() if value}
        return super().load_config(file=file, environ=environ, flags=flags)


class FalsyVariablesLost(ReferenceSubject):
    def load_config(self, *, file=None, environ=None, flags=None):
        if environ is not None:
            environ = {k: v for k, v in environ.items() if v not in ("0", "0.0", "false")}
        return super().load_config(file=file, environ=environ, flags=flags)


class FileOverEnvironment(ReferenceSubject):
    def load_config(self, *, file=None, environ=None, flags=None):
        import tomllib

        if file is not None and environ:
            text = tomllib.loads(file.read_text())
            given = {f"{s}_{k}".upper() for s, table in text.items() for k in table}
            environ = {
                k: v for k, v in environ.items() if k.removeprefix("FORGE_HARNESS_") not in given
            }
        return super().load_config(file=file, environ=environ, flags=flags)


class EverythingFromTheFile(Loader):
    changes = {"origin": lambda key: "file"}  # noqa: RUF012


class ClampsSilently(ReferenceSubject):
    def load_config(self, *, file=None, environ=None, flags=None):
        try:
            return super().load_config(file=file, environ=environ, flags=flags)
        except ConfigError as error:
            if "nknown" in str(error):
                raise
            return super().load_config(environ={}, flags={})


class NoBoundInTheSentence(ReferenceSubject):
    def load_config(self, **layers):
        try:
            return super().load_config(**layers)
        except ConfigError as error:
            raise ConfigError("A value is out of range.", key=error.key) from None


class AcceptsAnyShape(ReferenceSubject):
    def load_config(self, *, file=None, environ=None, flags=None):
        flags = {k: v for k, v in (flags or {}).items() if not k.startswith("model.")}
        return super().load_config(file=file, environ=environ, flags=flags)


class RefusesEveryShape(ReferenceSubject):
    def load_config(self, *, file=None, environ=None, flags=None):
        if any(key.startswith("model.") for key in flags or {}):
            raise ConfigError("Shapes cannot be set.")
        return super().load_config(file=file, environ=environ, flags=flags)


class NoTasks(ReferenceSubject):
    def tasks(self):
        return ()


class StatesTheOtherConvention(ReferenceSubject):
    def quantization_info(self, task):
        return replace(super().quantization_info(task), scale_convention="divide")


class ExcludesNothing(ReferenceSubject):
    def quantization_info(self, task):
        return replace(super().quantization_info(task), excluded=())


class ExcludesATernaryModule(ReferenceSubject):
    def quantization_info(self, task):
        return replace(super().quantization_info(task), excluded=("stem",))


class PacksInReverse(ReferenceSubject):
    def pack(self, codes):
        return super().pack(codes.flip(0))


def rewritten(path, change, rename=lambda key: key):
    from safetensors.torch import load_file, save_file

    file = next(path.glob("*.safetensors"))
    tensors = load_file(file).items()
    save_file({rename(k): change(k, t).contiguous() for k, t in tensors}, file)
    write_manifest(path)  # The defect is in what was written, not in transit.


class StoresTheReciprocalScale(ReferenceSubject):
    def export_package(self, session, path):
        super().export_package(session, path)
        rewritten(path, lambda k, t: 1 / t if "scale" in k and t.numel() == 1 else t)


class StoresRowsInReverse(ReferenceSubject):
    def export_package(self, session, path):
        super().export_package(session, path)
        rewritten(path, lambda k, t: t.flip(0) if t.dtype is torch.uint8 else t)


class StoresTransposed(ReferenceSubject):
    """Packed codes lie by columns; a reader of its own would turn them back."""

    def export_package(self, session, path):
        super().export_package(session, path)
        rewritten(path, lambda k, t: t.t() if t.dtype is torch.uint8 else t)


class StoresUnderAPrefix(ReferenceSubject):
    """Names as transformers writes them, in front of the module's own: sound."""

    def export_package(self, session, path):
        super().export_package(session, path)
        rewritten(path, lambda k, t: t, rename=lambda k: f"model.{k}")


class GarblesUnderAPrefix(ReferenceSubject):
    def export_package(self, session, path):
        super().export_package(session, path)
        rewritten(
            path,
            lambda k, t: t ^ 0x55 if t.dtype is torch.uint8 else t,
            rename=lambda k: f"model.{k}",
        )


class StoresNoScale(ReferenceSubject):
    def export_package(self, session, path):
        super().export_package(session, path)
        rewritten(path, lambda k, t: t.repeat(3) if "scale" in k else t)


class PacksAnotherWay(ReferenceSubject):
    def quantization_info(self, task):
        return replace(super().quantization_info(task), packing="tl2")


class FiveLevelsARow(ReferenceSubject):
    def quantization_info(self, task):
        return replace(super().quantization_info(task), granularity="row")

    def effective_weights(self, model):
        return {
            name: (4 * weight.detach() / weight.abs().max()).round()
            for name, weight in self.latent_weights(model).items()
        }


class LatentWeightsInForward(ReferenceSubject):
    def effective_weights(self, model):
        return {name: weight.detach() for name, weight in self.latent_weights(model).items()}


def shifted(plan):
    return [plan[min(i + 1, len(plan) - 1)] for i in range(len(plan))]


class OneStepAhead(ReferenceSubject):
    def planned_schedule(self, task, options):
        return shifted(super().planned_schedule(task, options))


class DecayNeverEnds(ReferenceSubject):
    def planned_schedule(self, task, options):
        plan = super().planned_schedule(task, options)
        return [replace(step, weight_decay=plan[0].weight_decay) for step in plan]


class OneStepShort(ReferenceSubject):
    def planned_schedule(self, task, options):
        return super().planned_schedule(task, options)[:-1]


class OwnPeak(ReferenceSubject):
    """Takes the recipe's learning rate, whatever was asked for."""

    def schedule_spec(self, task, options):
        return super().schedule_spec(task, replace(options, learning_rate=None))

    def planned_schedule(self, task, options):
        return super().planned_schedule(task, replace(options, learning_rate=None))


class WarmupOfAThousandSteps(ReferenceSubject):
    def schedule_spec(self, task, options):
        return replace(super().schedule_spec(task, options), warmup_steps=1000)


class NeverAtItsPeak(ReferenceSubject):
    def planned_schedule(self, task, options):
        plan = super().planned_schedule(task, options)
        return [replace(step, learning_rate=step.learning_rate / 10) for step in plan]


class SeedDrawnAnew(ReferenceSubject):
    def load_config(self, *, file=None, environ=None, flags=None):
        drawn = {"run.seed": torch.seed() % 2**31, **(flags or {})}
        return super().load_config(file=file, environ=environ, flags=drawn)


class SeedLeftOpen(Loader):
    changes = {"values": lambda values: {"run.seed": "random"}}  # noqa: RUF012


class WeightsDrawnAnew(ReferenceSubject):
    def build_model(self, task, *, seed):
        return super().build_model(task, seed=torch.seed() % 2**31)


class SeedNotUsed(ReferenceSubject):
    def session(self, task, options):
        return super().session(task, replace(options, seed=0))


class PathThatIsNotThere(Loader):
    changes = {"values": lambda values: {"run.policy": "/no/such/place/policy.toml"}}  # noqa: RUF012


class TokenInTheConfiguration(Loader):
    changes = {"values": lambda values: {"run.subject": "hf_" + "aB3" * 12}}  # noqa: RUF012


class DigestOfTheText(ReferenceSubject):
    def load_config(self, *, file=None, environ=None, flags=None):
        config = super().load_config(file=file, environ=environ, flags=flags)
        text = file.read_text() if file is not None else str(flags)
        return Wrapped(config, digest=lambda loaded: f"sha256:{hash(text)}")


def of_values_and_origins(config):
    entries = [(key, value, config.origin(key)) for key, value in config.values().items()]
    return f"sha256:{sha256(repr(entries).encode()).hexdigest()}"


class DigestOfOrigins(Loader):
    changes = {"digest": of_values_and_origins}  # noqa: RUF012


class DigestOfNothing(Loader):
    changes = {"digest": lambda config: "sha256:constant"}  # noqa: RUF012


class ForgetsAKeyWhenSaving(Loader):
    changes = {"toml": lambda text: re.sub(r"(?m)^steps = .*$", "", text)}  # noqa: RUF012


class IntegersBecomeFloats(Loader):
    def load_config(self, *, file=None, **layers):
        config = super().load_config(file=file, **layers)
        if file is not None and "seed" in file.read_text():
            seed = config.values()["run.seed"]
            config.changes = {"values": lambda values: {"run.seed": float(seed)}}
        return config


class ThresholdsInTheConfiguration(ReferenceSubject):
    def config_schema(self):
        schema = dict(super().config_schema())
        definitions = {**schema["$defs"]}
        run = {**definitions["RunConfig"]}
        run["properties"] = {**run["properties"], "thresholds": {"type": "object"}}
        definitions["RunConfig"] = run
        return {**schema, "$defs": definitions}


@pytest.mark.parametrize(
    ("name", "subject", "reason"),
    [
        ("schema_valid", ValueOutsideItsSchema, "schema_errors_in_force is 1"),
        ("schema_valid", SchemaThatAcceptsAnything, "keys_that_accept_anything is 1 .*run.seed"),
        ("unknown_key_refused", IgnoresUnknownKeys, "unknown_keys_accepted is"),
        ("unknown_key_refused", RefusesWithoutAHint, "refusals_without_the_nearest_name is"),
        ("unknown_key_refused", RefusesWithAnotherCode, r"exit_codes is \[1\]"),
        ("explicit_zero_kept", ValueOrDefault, "falsy_values_lost is"),
        ("explicit_zero_kept", FalsyFlagsLost, "falsy_values_lost is .* of the flag became"),
        ("explicit_zero_kept", FalsyVariablesLost, "falsy_values_lost is .*of the environment"),
        ("precedence", FileOverEnvironment, "wrong_winners is .*'file'"),
        ("precedence", EverythingFromTheFile, "wrong_winners is"),
        ("ranges", ClampsSilently, "values_out_of_range_accepted is"),
        ("ranges", NoBoundInTheSentence, "refusals_without_the_bound is"),
        ("shape_divisibility", RefusesEveryShape, "sound_shape is Shapes cannot be set"),
        ("shape_divisibility", AcceptsAnyShape, "heads_that_do_not_divide_refused is False"),
        (
            "quantization_consistent",
            StatesTheOtherConvention,
            "digits_stored_scales_that_differ is 6 modules",
        ),
        ("quantization_consistent", StoresTheReciprocalScale, "stored_scales_that_differ is 6"),
        ("quantization_consistent", StoresRowsInReverse, "stored_codes_that_differ is 6 modules"),
        ("quantization_consistent", StoresTransposed, "digits_stored_codes is 0 modules, expected"),
        ("quantization_consistent", GarblesUnderAPrefix, "stored_codes_that_differ is 6 modules"),
        ("quantization_consistent", StoresNoScale, "digits_stored_scales is 0 modules, expected 6"),
        (
            "quantization_consistent",
            FiveLevelsARow,
            "stated_but_not_ternary is .*granularity 'row'",
        ),
        ("quantization_consistent", ExcludesNothing, "bytes_unaccounted is embedding"),
        ("quantization_consistent", ExcludesATernaryModule, "excluded_but_ternary is stem"),
        ("quantization_consistent", PacksInReverse, "packed_bytes is"),
        ("quantization_consistent", LatentWeightsInForward, "stated_but_not_ternary is"),
        ("schedule_golden", OneStepAhead, "relative_error is"),
        ("schedule_golden", DecayNeverEnds, "relative_error is"),
        ("schedule_golden", OneStepShort, "plans_of_wrong_length is"),
        ("schedule_golden", NoTasks, "steps_compared is 0 steps, under its limit"),
        ("schedule_golden", OwnPeak, "peaks_not_as_asked is 2"),
        ("warmup_within_run", WarmupOfAThousandSteps, "warmups_too_long is"),
        ("warmup_within_run", NeverAtItsPeak, "peaks_never_reached is"),
        ("seed_fixed", SeedDrawnAnew, "run.seed_again is"),
        ("seed_fixed", SeedLeftOpen, "run.seed_is_a_number is False"),
        ("seed_fixed", WeightsDrawnAnew, "loss_again is"),
        ("seed_fixed", SeedNotUsed, "seed_has_effect is False"),
        ("paths_exist", PathThatIsNotThere, "paths_missing is 1 .*no/such/place"),
        ("no_secret_in_config", TokenInTheConfiguration, "values_like_credentials is 1"),
        ("digest_stable", DigestOfTheText, "reformatted_digest is"),
        ("digest_stable", DigestOfOrigins, "other_layer_digest is"),
        ("digest_stable", DigestOfNothing, "distinct_digests is 1"),
        ("round_trip", ForgetsAKeyWhenSaving, "keys_that_differ is .*train.steps"),
        ("round_trip", IntegersBecomeFloats, "keys_that_differ is 1 keys, .*run.seed"),
        ("policy_separate", ThresholdsInTheConfiguration, "thresholds_in_configuration is 1"),
    ],
)
def test_a_defect_turns_its_check_red(run_check, name, subject, reason):
    run = run_check(f"configuration.{name}", subject())
    assert run.outcome == "fail", run.reason
    assert re.search(reason, run.reason, re.DOTALL), run.reason


@pytest.mark.parametrize("name", CHECKS)
def test_the_project_s_own_file_takes_no_part(run_check, monkeypatch, tmp_path, name):
    # Three heads rule out the default width, 50 steps the default warmup of longer runs.
    (tmp_path / "forge.toml").write_text(
        "[run]\nseed = 3\n[model]\nwidth = 96\nheads = 3\n[train]\nsteps = 50\nwarmup_steps = 10\n"
    )
    monkeypatch.chdir(tmp_path)
    run = run_check(f"configuration.{name}")
    assert run.outcome == "pass", run.reason


@pytest.mark.parametrize("name", CHECKS)
def test_a_subject_without_a_configuration_is_no_error(run_check, name):
    class Nothing:
        name = "nothing"

    run = run_check(f"configuration.{name}", Nothing())
    assert run.outcome in {"pass", "not_applicable", "not_measured"}, run.reason


def test_a_blind_secret_scan_fails(run_check, monkeypatch):
    from forge_harness.probes import secrets

    monkeypatch.setattr(secrets, "suspicious", lambda values: {})
    run = run_check("configuration.no_secret_in_config")
    assert run.outcome == "fail"
    assert "planted_values_found is 0" in run.reason


def test_a_stale_policy_digest_fails(run_check, monkeypatch):
    from forge_harness.policy import Policy

    monkeypatch.setattr(Policy, "digest", "sha256:stale")
    run = run_check("configuration.policy_separate")
    assert run.outcome == "fail"
    assert "threshold_moves_policy_digest is False" in run.reason


def test_a_configuration_without_shapes_is_not_measured(run_check):
    class NoShapes(ReferenceSubject):
        def config_schema(self):
            schema = dict(super().config_schema())
            properties = {k: v for k, v in schema["properties"].items() if k != "model"}
            return {**schema, "properties": properties}

    run = run_check("configuration.shape_divisibility", NoShapes())
    assert run.outcome == "not_measured"
    assert "no width and heads" in run.reason


class NoSeed(ReferenceSubject):
    def config_schema(self):
        schema = super().config_schema()
        run = dict(schema["$defs"]["RunConfig"])
        run["properties"] = {k: v for k, v in run["properties"].items() if k != "seed"}
        return {**schema, "$defs": {**schema["$defs"], "RunConfig": run}}


def test_a_configuration_without_a_seed_is_not_measured(run_check):
    run = run_check("configuration.seed_fixed", NoSeed())
    assert run.outcome == "not_measured"
    assert "no key named seed" in run.reason


class OneChoice(ReferenceSubject):
    """A configuration of one key, which takes one of two words."""

    def config_schema(self):
        mode = {"type": "string", "enum": ["a", "b"]}
        return {"properties": {"run": {"type": "object", "properties": {"mode": mode}}}}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("explicit_zero_kept", "no key of the configuration has a legal falsy value"),
        ("precedence", "no key of the configuration takes three values on its own"),
        ("ranges", "the schema of the configuration states no bound"),
    ],
)
def test_a_configuration_without_such_a_key_is_not_measured(run_check, name, reason):
    run = run_check(f"configuration.{name}", OneChoice())
    assert run.outcome == "not_measured"
    assert reason in run.reason


class ConfiguresOnly:
    """Loads a configuration, and trains and quantizes nothing."""

    name = "configures only"
    load_config = ReferenceSubject.load_config
    config_schema = ReferenceSubject.config_schema
    quantization_info = ReferenceSubject.quantization_info


@pytest.mark.parametrize("name", CHECKS)
def test_a_subject_that_only_configures_is_measured_as_far_as_it_goes(run_check, name):
    run = run_check(f"configuration.{name}", ConfiguresOnly())
    assert run.outcome in {"pass", "not_measured"}, run.reason


def test_stored_weights_are_found_in_the_export(run_check):
    run = run_check("configuration.quantization_consistent")
    assert run.evidence("digits_stored_codes") == 6
    assert run.evidence("digits_stored_scales") == 6


def test_a_prefix_of_the_writer_hides_nothing_and_is_no_error(run_check):
    run = run_check("configuration.quantization_consistent", StoresUnderAPrefix())
    assert run.outcome == "pass", run.reason
    assert run.evidence("bytes_stored_codes") == 14


def test_a_layout_without_an_oracle_is_not_measured(run_check):
    run = run_check("configuration.quantization_consistent", PacksAnotherWay())
    assert run.outcome == "not_measured"
    assert "packing tl2; only i2-rowblock can be read here" in run.reason
