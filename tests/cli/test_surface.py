"""The surface users script against: a flag leaves it only with a deprecation."""

from pathlib import Path

import click
import pytest

from forge_harness.cli import app
from forge_harness.cli.app import COMMANDS
from forge_harness.config import default_values

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "cli.md"
SURFACE = {
    "init": "DIR",
    "doctor": "--config --json --subject",
    "list checks": "--config --json --profile --suite",
    "list suites": "--config --json",
    "list waivers": "--config --json",
    "run": "--check --config --deadline --format --keys --policy --profile --quiet --run-dir --seed"
    " --shard --state --subject --suite --suite-path --timeout --waivers --workers",
    "merge": "--format --run-dir DIR...",
    "gate": "--baseline --fail-on --policy-digest DIR",
    "report": "--baseline --history --last --format --out DIR",
    "compare": "--json BASELINE DIR",
    "baseline accept": "--expires --out --owner --reason DIR",
    "baseline show": "--json --run FILE",
    "history show": "--config --json DIR]...",
    "history export": "--config --format --out DIR]...",
    "history rescore": "--config --json --policy DIR]...",
    "explain": "--json --limit --target DIR",
    "verify": "--json --key --signature --threshold DIR",
    "sign": "--keys --openssf --openssf-key --public --signature DIR",
    "audit tail": "--count --json FILE",
    "audit verify": "--heads --json --keys --newest FILE",
    "train": "--accumulation --batch-size --checkpoint-every --compute --config --device"
    " --from-checkpoint --keys --learning-rate --out --parallel --precision --resume --seed --state"
    " --steps --task",
    "bench lm": "--json --layers --prompt --rounds --threads --width",
    "bench train": "--batch --compiled --json --layers --rounds --threads --torchao --width",
    "bench convert": "--blocks --dir --json --rounds --source --to",
    "bench store": "--blob-mib --dir --json --rounds --states",
    "bench kernels": "--ggml --i2s --inductor --json --path --peers --plot --rounds --shape"
    " --threads --tokens",
    "drill storage": "--campaign --json --mutants --opener --quick --quiet --seed --trials",
    "drill suites": "--check --defect --jobs --json --list --matrix --quiet --rows --sample --seed"
    " --seeds --stage --subject --suite --suite-path --variants",
    "load run": "--ca --capacity --concurrency --dry-run --json --out --phases --profile --quiet"
    " --rate --requests --seed --share --slo --timeout --token-env --url",
    "load peak": "--ca --cap --concurrency --json --out --probe --profile --quiet --requests --seed"
    " --slo --start --timeout --token-env --url",
    "load report": "--json DIR",
    "inspect": "--exclude --i2s-layout --json --matrix --quantize --scale-convention PATH",
    "export": "--allow-not-ready --exclude --fleet --format --i2s-layout --json --name --out"
    " --quantize --scale-convention SOURCE]...",
    "convert": "--exclude --gguf-scale --hf-scale --i2s-layout --json --master-dtype --no-compare"
    " --quantize --scale-convention --to DST SRC",
    "serve": "--audit --client-in-flight --client-rate --deadline-ms --drain-s --engine --host"
    " --insecure-http --keys --max-batch --max-queue --no-auth --package --port --replicas"
    " --threads --tls-cert --tls-key --tokens",
    "tokens issue": "--audit --days --keys --name --role FILE",
    "tokens revoke": "--audit --keys FILE ID",
    "tokens list": "--json --keys FILE",
    "keys new": "FILE",
    "keys rotate": "--purpose --sealed FILE",
    "keys destroy": "FILE ID",
    "keys list": "--json SOURCE",
    "state ls": "--json --kind --phase --audit --keys --root",
    "state show": "--generation --json --audit --keys --root NAME PHASE",
    "state save": "--kind --name --phase --audit --keys --root PATH",
    "state get": "--generation --out --audit --keys --root NAME PHASE",
    "state rm": "--audit --keys --root NAME... PHASE",
    "state verify": "--json --audit --keys --root --shallow",
    "state checkpoint": "--audit --keys --root LABEL",
    "state restore": "--audit --keys --root CHECKPOINT|GENERATION",
    "state gc": "--grace --json --retain --audit --keys --root",
    "state migrate": "--new-name --audit --keys --root --schema --to NAME PHASE",
    "power-of-ten": "--at-least --explain --json --waivers PATH]...",
    "scan": "--advisories --json --sbom PATH",
    "config show": "--config --json --origin",
    "config check": "--config",
    "config schema": "",
}


def commands():
    for name in COMMANDS:
        command = app.get_command(click.Context(app), name)
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", value) for inner, value in command.commands.items())
        else:
            yield name, command


def names(command):
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            yield str(parameter.metavar).strip("[]")
        else:
            yield next(opt for opt in parameter.opts if opt.startswith("--"))


def test_commands_and_flags_are_exactly_these():
    found = {name: sorted(names(command)) for name, command in commands()}
    assert found == {name: sorted(flags.split()) for name, flags in SURFACE.items()}


@pytest.mark.parametrize("name", SURFACE)
def test_every_parameter_is_explained(name):
    command = dict(commands())[name]
    for parameter in command.params:
        assert isinstance(parameter, click.Argument) or parameter.help, parameter.name


def test_the_documentation_has_every_command_and_every_flag_of_run():
    text = DOCUMENTATION.read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"| `{name}" in text, name
    for flag in SURFACE["run"].split():
        assert flag == "--config" or f"`{flag}" in text, flag
    assert "@@" not in text


def test_every_key_of_run_has_a_flag():
    flags = {"run_dir": "run-dir", "timeout_s": "timeout", "deadline_s": "deadline"}
    flags |= {"suite_paths": "suite-path"}
    for key in default_values():
        section, _, name = key.partition(".")
        if section == "run":
            assert f"--{flags.get(name, name)} " in SURFACE["run"] + " ", key


FLOATS = [
    (name, parameter)
    for name, command in commands()
    for parameter in command.params
    if isinstance(parameter.type, click.types.FloatParamType)
]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(
    ("name", "parameter"), FLOATS, ids=[f"{name}-{found.name}" for name, found in FLOATS]
)
def test_every_number_is_finite(name, parameter, text):
    context = click.Context(dict(commands())[name])
    with pytest.raises(click.BadParameter, match="is not a finite number"):
        parameter.type.convert(text, parameter, context)


PATHS = [
    (name, parameter)
    for name, command in commands()
    for parameter in command.params
    if isinstance(parameter.type, click.Path)
]


@pytest.mark.parametrize(
    ("name", "parameter"), PATHS, ids=[f"{name}-{found.name}" for name, found in PATHS]
)
def test_no_path_is_empty(name, parameter):
    """A variable that is not set was the current directory: a report landed in it."""
    context = click.Context(dict(commands())[name])
    with pytest.raises(click.BadParameter, match="It is empty; expected a path"):
        parameter.type.convert("", parameter, context)


def test_numbers_that_are_finite_keep_their_range():
    kind = dict(FLOATS)["power-of-ten"].type
    assert kind.convert("0.5", None, None) == 0.5
    with pytest.raises(click.BadParameter, match="not in the range 0<=x<=1"):
        kind.convert("2", None, None)
