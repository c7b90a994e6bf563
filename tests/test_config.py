"""Configuration: layers, origins, refusals in one sentence, digest, round trip, schema."""

import json
import os
import tomllib
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from forge_harness._config.toml import toml_value
from forge_harness.config import (
    HarnessConfig,
    ModelConfig,
    TrainConfig,
    commented_toml,
    config_json_schema,
    configuration_variables,
    default_values,
    expected,
    find_config_file,
    load_config,
    resolve,
)
from forge_harness.errors import ConfigError, ExitCode
from forge_harness.subject.protocols import ResolvedConfig

PUBLISHED_SCHEMA = Path(__file__).parents[1] / "docs" / "forge-toml.schema.json"
OTHER = {bool: True, int: 7, float: 0.25, str: "other", tuple: ["a", "b"]}
"""A value that is no key's default, a type."""
SPECIAL = {
    "run.profile": "full",
    "declared.accelerator": "none",
    "declared.causal_models": "none",
    "train.task": "bytes",
    "train.precision": "full",
    "train.compute": "int8",
    "train.accumulation": 4,
    "model.width": 32,
    "model.heads": 4,
    "model.hidden": 32,
}


def other_value(key):
    default = default_values()[key]
    plain = next(kind for kind in OTHER if isinstance(default, kind))
    return SPECIAL.get(key, OTHER[plain])


def as_text(value):
    return json.dumps(value) if isinstance(value, list | bool) else str(value)


def variable(key):
    return "FORGE_HARNESS_" + key.replace(".", "_").upper()


def load(tmp_path, text="", environ=None, flags=None):
    (tmp_path / "forge.toml").write_text(text, encoding="utf-8")
    return load_config(environ=environ or {}, flags=flags, cwd=tmp_path)


def refused(**layers):
    with pytest.raises(ConfigError) as caught:
        load_config(environ=layers.pop("environ", {}), **layers)
    assert caught.value.exit_code is ExitCode.USAGE
    return caught.value


@pytest.mark.parametrize("key", default_values())
def test_every_key_can_be_set_in_every_layer_and_says_where_it_came_from(tmp_path, key):
    value = other_value(key)
    section, _, name = key.partition(".")
    literal = json.dumps(value)
    loaded = load(tmp_path, f"[{section}]\n{name} = {literal}\n")
    assert (loaded.values()[key], loaded.origin(key)) == (value, "file")
    loaded = load(tmp_path, environ={variable(key): as_text(value)})
    assert (loaded.values()[key], loaded.origin(key)) == (value, "environment")
    loaded = load(tmp_path, flags={key: value})
    assert (loaded.values()[key], loaded.origin(key)) == (value, "flag")
    untouched = load(tmp_path)
    assert untouched.values()[key] != value
    assert untouched.origin(key) == "default"


@pytest.mark.parametrize("given_layers", range(8))
def test_the_highest_given_layer_wins(tmp_path, given_layers):
    flag, environment, file = given_layers & 4, given_layers & 2, given_layers & 1
    loaded = load(
        tmp_path,
        "[run]\nseed = 1\n" if file else "",
        environ={"FORGE_HARNESS_RUN_SEED": "2"} if environment else {},
        flags={"run.seed": 3 if flag else None},
    )
    wanted = (
        (3, "flag")
        if flag
        else (2, "environment")
        if environment
        else (1, "file")
        if file
        else (0, "default")
    )
    assert (loaded.config.run.seed, loaded.origin("run.seed")) == wanted


@pytest.mark.parametrize(
    ("key", "empty", "below"),
    [
        ("run.seed", 0, "7"),
        ("train.clip_norm", 0.0, "2.5"),
        ("train.compile", False, "true"),
        ("run.policy", "", '"p.toml"'),
        ("run.suite_paths", [], '["mine"]'),
    ],
)
def test_explicit_zero_false_and_empty_override_what_is_below(tmp_path, key, empty, below):
    section, _, name = key.partition(".")
    file = f"[{section}]\n{name} = {below}\n"
    assert load(tmp_path, file).values()[key] not in (empty, None)
    by_flag = load(tmp_path, file, flags={key: empty})
    assert (by_flag.values()[key], by_flag.origin(key)) == (empty, "flag")
    text = "" if empty in ("", []) else as_text(empty)
    by_variable = load(tmp_path, file, environ={variable(key): text})
    assert (by_variable.values()[key], by_variable.origin(key)) == (empty, "environment")


@pytest.mark.parametrize(
    ("text", "value"),
    [(t, True) for t in ("1", "true", "True", "YES", "on")]
    + [(t, False) for t in ("0", "false", "False", "NO", "off", " off ")],
)
def test_truth_in_the_environment_is_spelt_in_words_not_by_being_non_empty(text, value):
    loaded = load_config(environ={"FORGE_HARNESS_TRAIN_COMPILE": text})
    assert loaded.config.train.compile is value


@pytest.mark.parametrize("text", ["", "maybe", "2", "None"])
def test_other_words_for_truth_are_refused(text):
    error = refused(environ={"FORGE_HARNESS_TRAIN_COMPILE": text})
    assert str(error) == (
        f"train.compile is {text!r} in the environment (FORGE_HARNESS_TRAIN_COMPILE); "
        "expected true or false."
    )


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("train.step", "train.steps"),
        ("train.lerning_rate", "train.learning_rate"),
        ("trian.steps", "train.steps"),
        ("seed", "run.seed"),
        ("run.steps", "train.steps"),
        ("declared.acelerator", "declared.accelerator"),
        ("runs.seed", "run.seed"),
        ("train.zzz", None),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(key, suggestion):
    error = refused(flags={key: 1})
    assert (error.key, error.suggestion) == (key, suggestion)
    assert f"Unknown key {key!r} given by flag." in str(error)
    assert (f"Did you mean {suggestion!r}?" in str(error)) is (suggestion is not None)


def test_an_unknown_key_is_refused_in_the_file_and_in_the_environment(tmp_path):
    (tmp_path / "forge.toml").write_text("[train]\nstep = 3\n")
    assert "Unknown key 'train.step' in forge.toml." in str(refused(cwd=tmp_path))
    (tmp_path / "forge.toml").write_text("[trian]\nsteps = 3\n")
    assert refused(cwd=tmp_path).suggestion == "train.steps"
    error = refused(environ={"FORGE_HARNESS_RUN_SEEED": "1"})
    assert (error.key, error.suggestion) == ("run.seeed", "run.seed")
    assert "FORGE_HARNESS_RUN_SEEED" in str(error)


def test_a_variable_that_is_not_in_capitals_does_not_win_over_the_one_that_is():
    environ = {"FORGE_HARNESS_RUN_SEED": "7", "FORGE_HARNESS_run_seed": "3"}
    error = refused(environ=environ)
    assert error.suggestion == "run.seed"
    assert "(FORGE_HARNESS_run_seed, which is not in capitals)" in str(error)
    for name in ("forge_harness_run_seed", "Forge_Harness_RUN_SEED"):
        assert f"({name}, which is not in capitals)" in str(refused(environ={name: "3"}))
    # Of an open section as well.
    assert "DECLARED_gpu" in str(refused(environ={"FORGE_HARNESS_DECLARED_gpu": "none"}))


def test_variables_that_other_parts_read_are_not_configuration():
    from forge_harness.probes.advisories import FILE_VARIABLE

    environ = {"FORGE_HARNESS_DEBUG": "1", FILE_VARIABLE: "osv.json"}
    assert load_config(environ=environ).given == {}
    assert configuration_variables({**environ, "FORGE_HARNESS_RUN_SEED": "1"}) == [
        "FORGE_HARNESS_RUN_SEED"
    ]


def test_no_variable_a_command_declares_is_taken_for_a_key():
    import click

    from forge_harness.cli import app

    def variables(command):
        for parameter in command.params:
            names = parameter.envvar or ()
            yield from (names,) if isinstance(names, str) else names
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                yield from variables(command.get_command(context, name))

    environ = {name: "x" for name in variables(app)}
    assert {"FORGE_HARNESS_STATE_ROOT", "FORGE_HARNESS_STATE_AUDIT"} <= environ.keys()
    assert load_config(environ=environ).given == {}
    assert configuration_variables(environ) == []


def test_a_declared_key_of_the_users_own_is_kept(tmp_path):
    loaded = load(tmp_path, '[declared]\ngpu_count = "0"\n')
    assert loaded.config.declared["gpu_count"] == "0"
    assert loaded.config.declared["accelerator"] == "auto"


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("train.steps", "many", "an integer from 1 to 10000000"),
        ("train.steps", 3.0, "an integer from 1 to 10000000"),
        ("train.steps", True, "an integer from 1 to 10000000"),
        ("train.steps", 0, "an integer from 1 to 10000000"),
        ("train.steps", -1, "an integer from 1 to 10000000"),
        ("run.seed", 2**32, "an integer from 0 to 4294967295"),
        ("run.seed", -1, "an integer from 0 to 4294967295"),
        ("train.learning_rate", 0, "a finite number above 0 and at most 10"),
        ("train.learning_rate", float("nan"), "a finite number above 0 and at most 10"),
        ("train.learning_rate", float("inf"), "a finite number above 0 and at most 10"),
        ("train.learning_rate", "fast", "a finite number above 0 and at most 10"),
        ("train.weight_decay", -0.1, "a finite number from 0 to 10"),
        ("train.clip_norm", -1.0, "a finite number of at least 0"),
        ("train.clip_norm", float("inf"), "a finite number of at least 0"),
        ("train.warmup_steps", -1, "an integer of at least 0"),
        ("run.timeout_s", -0.5, "a finite number from 0 to 86400"),
        ("run.suite_paths", 3, "a list of text"),
        ("run.suite_paths", [3], "a list of text"),
        ("run.policy", 3, "text"),
        ("paths.runs", "", "text that is not empty"),
        ("declared.accelerator", 1, "one of 'auto', 'cuda', 'none', 'rocm'"),
        (
            "declared.accelerator",
            "None",
            "one of 'auto', 'cuda', 'none', 'rocm'. Did you mean 'none'?",
        ),
        ("declared.causal_models", "few", "one of 'auto', 'none'"),
        ("declared.gpu_count", 2, "text"),
        ("train.task", "digit", "one of 'bytes', 'digits'. Did you mean 'digits'?"),
        ("run.profile", "quik", "one of 'full', 'nightly', 'quick'. Did you mean 'quick'?"),
        ("train.compute", [], "one of 'exact', 'fake', 'int8'"),
    ],
)
def test_a_bad_value_is_refused_with_value_source_and_what_was_expected(key, value, wanted):
    error = refused(flags={key: value})
    assert error.key == key
    full_stop = "" if wanted.endswith("?") else "."
    assert str(error) == f"{key} is {value!r} given by flag; expected {wanted}{full_stop}"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"train.steps": 10, "train.warmup_steps": 10},
            "train.warmup_steps is 10 given by flag; expected fewer than train.steps = 10.",
        ),
        (
            {"train.accumulation": 65},
            "train.accumulation is 65 given by flag; expected at most train.batch_size = 64.",
        ),
        (
            {"model.width": 66},
            "model.width is 66 given by flag; expected a multiple of 4, because 4 ternary codes "
            "fill a byte.",
        ),
        (
            {"model.hidden": 130},
            "model.hidden is 130 given by flag; expected a multiple of 4, because 4 ternary codes "
            "fill a byte.",
        ),
        (
            {"model.heads": 5},
            "model.heads is 5 given by flag; expected a divisor of model.width = 64.",
        ),
        (
            {"model.heads": 64},
            "model.heads is 64 given by flag; expected a number that divides model.width = 64 "
            "into even head widths.",
        ),
        (
            {"train.task": "bytes", "model.width": 20},
            "model.heads is 4 by default; expected a number that divides model.width = 20 "
            "into even head widths.",
        ),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(flags, sentence):
    assert str(refused(flags=flags)) == sentence


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 19, 20, 300])
@pytest.mark.parametrize("task", ["digits", "bytes"])
def test_a_short_run_needs_one_key_because_warmup_follows_the_steps(task, steps):
    train = load_config(environ={}, flags={"train.task": task, "train.steps": steps}).config.train
    share = {"digits": 0.05, "bytes": 0.1}[task]
    assert train.warmup_steps == min(round(share * steps), steps - 1)


def test_one_step_more_than_the_warmup_is_enough():
    config = load_config(environ={}, flags={"train.steps": 11, "train.warmup_steps": 10}).config
    assert (config.train.steps, config.train.warmup_steps) == (11, 10)


def test_defaults_follow_the_task_however_the_config_is_made():
    loaded = load_config(environ={}, flags={"train.task": "bytes"})
    assert loaded.config.model.width == 256
    assert loaded.origin("model.width") == "default"
    direct = HarnessConfig(train=TrainConfig(task="bytes"))
    assert direct == loaded.config
    assert TrainConfig(task="bytes") == loaded.config.train
    explicit = load_config(environ={}, flags={"train.task": "bytes", "model.width": 64})
    assert explicit.config.model.width == 64


@pytest.mark.parametrize("task", ["digits", "bytes"])
@pytest.mark.parametrize("precision", ["ternary", "full"])
def test_the_defaults_are_the_tuned_recipes_of_the_trainer(task, precision):
    from forge_harness.training import recipe_for

    config = load_config(environ={}, flags={"train.task": task, "train.precision": precision})
    recipe = recipe_for(task, precision)
    for name in ("batch_size", "learning_rate", "weight_decay", "clip_norm", "autocast", "compile"):
        assert getattr(config.config.train, name) == getattr(recipe, name), name
    steps = config.config.train.steps
    assert config.config.train.warmup_steps == recipe.schedule_spec(steps).warmup_steps


def test_sections_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig().width = 8


def test_all_problems_are_found_and_the_sentence_counts_the_others(tmp_path):
    (tmp_path / "forge.toml").write_text("[train]\nsteps = 0\nstep = 1\nlearning_rate = 0\n")
    loaded, problems = resolve(environ={}, cwd=tmp_path)
    assert loaded is None
    assert sorted(problem.key for problem in problems) == [
        "train.learning_rate",
        "train.step",
        "train.steps",
    ]
    assert "(2 more: `forge-harness config check` lists all.)" in str(refused(cwd=tmp_path))


def test_the_file_is_found_upwards_and_the_nearest_wins(tmp_path):
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.forge-harness.run]\nseed = 4\n")
    (tmp_path / "a" / "pyproject.toml").write_text("[project]\nname = 'not ours'\n")
    assert load_config(environ={}, cwd=deep).config.run.seed == 4
    (tmp_path / "a" / "forge.toml").write_text("[run]\nseed = 5\n")
    loaded = load_config(environ={}, cwd=deep)
    assert (loaded.config.run.seed, loaded.file) == (5, tmp_path / "a" / "forge.toml")


def test_two_files_in_one_directory_are_refused(tmp_path):
    (tmp_path / "forge.toml").write_text("")
    (tmp_path / "pyproject.toml").write_text("[tool.forge-harness]\n")
    with pytest.raises(ConfigError, match="keep one of them"):
        find_config_file(tmp_path)


@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
def test_what_is_called_forge_toml_is_not_passed_over(tmp_path, kind):
    """The defaults name another subject."""
    file = tmp_path / "forge.toml"
    if kind == "link":
        file.symlink_to("of-another-machine.toml")
    else:
        os.mkfifo(file) if kind == "pipe" else file.mkdir()
    said = "is a link to nothing" if kind == "link" else "is no file"
    (tmp_path / "below").mkdir()
    assert f"{file} {said}" in str(refused(cwd=tmp_path / "below"))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("forge.toml", None, "Cannot read configuration file"),
        ("forge.toml", b"[run\n", "is not valid TOML"),
        ("forge.toml", b"a = " + b"[" * 100_000, "nested too deeply"),
        ("forge.toml", b"[run]\nsubject = '\xff'\n", "is not valid TOML"),
        ("pyproject.toml", b"[project]\n", "has no [tool.forge-harness] table"),
        ("pyproject.toml", b"tool.forge-harness = 3\n", "tool.forge-harness is 3 in"),
        ("pyproject.toml", b"[[tool.forge-harness]]\n", "expected a table [tool.forge-harness]"),
        ("forge.toml", b"run = 3\n", "run is 3 in"),
        ("forge.toml", b'[run]\nrun_dir = "a\\u0000b"\n', "run.run_dir is 'a\\x00b' in"),
        ("forge.toml", b'[run]\nsuite_paths = ["a\\u0000b"]\n', "expected text without NUL"),
        ("forge.toml", b"[run]\nseed = 2020-01-01\n", "expected an integer from 0"),
        ("forge.toml", b"[run.deeper]\nseed = 1\n", "Unknown key 'run.deeper'"),
    ],
)
def test_an_unusable_file_is_refused(tmp_path, name, content, sentence):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert sentence in str(refused(file=path))


def test_a_table_of_ours_that_is_none_is_not_passed_over(tmp_path):
    (tmp_path / "pyproject.toml").write_text("tool.forge-harness = 3\n")
    assert "tool.forge-harness is 3" in str(refused(cwd=tmp_path))


@pytest.mark.parametrize(
    "name", ["forge_harness", "forgeharness", "Forge-Harness", "bitnet-forge-harness"]
)
def test_a_table_of_another_spelling_is_not_passed_over(tmp_path, name):
    (tmp_path / "pyproject.toml").write_text(f"[tool.{name}.run]\nseed = 4\n")
    error = refused(cwd=tmp_path)
    assert f"[tool.{name}] in {tmp_path / 'pyproject.toml'} is not read" in str(error)
    assert "name it [tool.forge-harness]." in str(error)


def test_text_that_is_not_unicode_is_refused():
    error = refused(environ={"FORGE_HARNESS_RUN_SUBJECT": "caf\udce9"})
    assert error.key == "run.subject"


def test_paths_in_the_file_are_beside_the_file_and_others_in_the_current_directory(
    tmp_path, monkeypatch
):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    file = '[run]\npolicy = "p.toml"\nsuite_paths = ["mine"]\n'
    loaded = load(tmp_path, file, flags={"run.waivers": "w.toml"})
    assert loaded.path("run.policy") == tmp_path / "p.toml"
    assert loaded.suite_paths() == (tmp_path / "mine",)
    assert loaded.path("run.waivers") == here / "w.toml"
    assert loaded.path("run.run_dir") is None


@pytest.mark.parametrize(
    ("spec", "seen"),
    [
        ("own.py:Subject", "../own.py:Subject"),
        ("package", "../package"),
        ("{root}/own.py:Subject", "{root}/own.py:Subject"),
        ("own_module:subject", "own_module:subject"),
        ("acme-tiny", "acme-tiny"),
        ("", ""),
    ],
)
def test_a_subject_of_the_file_is_beside_the_file(tmp_path, monkeypatch, spec, seen):
    (tmp_path / "own.py").touch()
    for name in ("package", "below"):
        (tmp_path / name).mkdir()
    spec, seen = spec.format(root=tmp_path), seen.format(root=tmp_path)
    (tmp_path / "forge.toml").write_text(f"[run]\nsubject = {spec!r}\n")
    monkeypatch.chdir(tmp_path)
    assert load_config().subject == spec
    monkeypatch.chdir(tmp_path / "below")
    assert load_config().subject == seen
    assert load_config(flags={"run.subject": "own.py:Subject"}).subject == "own.py:Subject"


def test_the_digest_follows_values_only(tmp_path):
    first = load(tmp_path, "[run]\nseed = 1\nworkers = 2\n[train]\nsteps = 400\n")
    second = load(tmp_path, "[train]\nsteps=400 # comment\n\n[run]\nworkers = 2\nseed = 1\n")
    by_flag = load(tmp_path, flags={"run.seed": 1, "run.workers": 2, "train.steps": 400})
    assert first.digest == second.digest == by_flag.digest
    spelt_out = load(tmp_path, flags={"run.seed": 0})
    assert spelt_out.digest == load(tmp_path).digest
    assert load(tmp_path, "[run]\nseed = 2\n").digest != load(tmp_path).digest


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_PATH = _TEXT.map(lambda text: text.replace("\0", ""))
_FLAGS = st.fixed_dictionaries(
    {},
    optional={
        "run.seed": st.integers(0, 2**32 - 1),
        "run.subject": _PATH,
        "run.suite_paths": st.lists(_PATH, max_size=3),
        "run.timeout_s": st.floats(0, 86_400),
        "train.task": st.sampled_from(["digits", "bytes"]),
        "train.compile": st.booleans(),
        "train.learning_rate": st.floats(1e-12, 10),
        "train.steps": st.integers(1, 10**7),
        "model.hidden": st.integers(1, 100).map(lambda n: 4 * n),
        "declared": st.dictionaries(st.text("xyz _-é\x7f\n\"'", min_size=1, max_size=9), _TEXT),
    },
)


@settings(max_examples=60)
@given(flags=_FLAGS)
def test_a_saved_configuration_loads_back_to_the_same_values(tmp_path_factory, flags):
    # Text that reads as a list is one when given by flag; the file has no such ambiguity.
    loaded = load_config(environ={}, flags=flags, file=_empty(tmp_path_factory))
    saved = tmp_path_factory.mktemp("round") / "forge.toml"
    saved.write_text(loaded.to_toml(), encoding="utf-8", newline="")
    again = load_config(file=saved, environ={})
    assert again.values() == loaded.values()
    assert again.digest == loaded.digest


def _empty(factory):
    path = factory.mktemp("empty") / "forge.toml"
    path.touch()
    return path


def test_the_commented_file_changes_nothing_and_shows_every_key(tmp_path):
    text = commented_toml()
    assert load(tmp_path, text).given == {}
    uncommented = "\n".join(
        line.removeprefix("# ") if line.startswith("# ") and " = " in line else line
        for line in text.splitlines()
        if not line.startswith("# ") or line.removeprefix("# ").split(" = ")[0].isidentifier()
    )
    assert {
        f"{section}.{key}"
        for section, content in tomllib.loads(uncommented).items()
        for key in content
    } == set(default_values())


def test_the_published_schema_is_current():
    assert json.loads(PUBLISHED_SCHEMA.read_text(encoding="utf-8")) == config_json_schema(), (
        "run: forge-harness config schema > docs/forge-toml.schema.json"
    )


def test_the_schema_takes_what_the_loader_takes_and_refuses_what_it_refuses(tmp_path):
    validator = jsonschema.Draft202012Validator(config_json_schema())
    validator.check_schema(config_json_schema())
    assert validator.is_valid(tomllib.loads(load(tmp_path).to_toml()))
    assert validator.is_valid({})
    assert not validator.is_valid({"train": {"step": 1}})
    assert not validator.is_valid({"train": {"steps": 0}})
    assert not validator.is_valid({"trian": {}})


def test_every_key_is_documented_and_says_what_it_takes():
    schema = config_json_schema()
    for name, section in schema["$defs"].items():
        for key, field in section.get("properties", {}).items():
            assert field.get("description"), f"{name}.{key}"
    for key in default_values():
        assert expected(key) not in ("", "a finite number"), key


def test_the_documentation_has_every_key_with_its_default_and_what_it_takes():
    text = (PUBLISHED_SCHEMA.parent / "configuration.md").read_text(encoding="utf-8")
    for key, default in default_values().items():
        section, _, name = key.partition(".")
        part = text.partition(f"### `[{section}]`")[2].partition("\n### ")[0]
        value = toml_value(getattr(default, "value", default))
        assert f"| `{name}` | `{value}` | {expected(key)} |" in part, key


def test_the_loaded_config_is_what_the_suites_expect_of_one(tmp_path):
    loaded: ResolvedConfig = load(tmp_path)
    assert isinstance(loaded, ResolvedConfig)
    with pytest.raises(ConfigError, match=r"Did you mean 'run\.seed'"):
        loaded.origin("run.sed")
