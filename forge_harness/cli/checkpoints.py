"""Options of the commands that read checkpoints: what the files cannot say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from forge_harness.errors import UsageError

if TYPE_CHECKING:
    from forge_harness.formats import ReadOptions

_Command = TypeVar("_Command", bound=Callable[..., Any])


READING = ("scale_convention", "i2s_layout", "quantize", "exclude")
"""What `reading_options` adds."""


def reading_options(command: _Command) -> _Command:
    """Adds --scale-convention, --i2s-layout, --quantize and --exclude."""
    for option in (
        click.option(
            "--exclude",
            multiple=True,
            metavar="PATTERN",
            help="Full-precision import: leave these weights as they are; wins over --quantize.",
        ),
        click.option(
            "--quantize",
            multiple=True,
            metavar="PATTERN",
            help="Full-precision import: ternarize these 2-D weights (shell pattern, repeatable).",
        ),
        click.option(
            "--i2s-layout",
            type=click.Choice(["x86-act", "arm", "x86-rows"]),
            help="GGUF I2_S: which of its three byte layouts; the file does not say.",
        ),
        click.option(
            "--scale-convention",
            type=click.Choice(["multiply", "divide"]),
            help="Packed without config.json: whether weight_scale multiplies or divides codes.",
        ),
    ):
        command = option(command)
    return command


def read_options(given: Mapping[str, Any]) -> ReadOptions:
    """Returns the options of `reading_options` as the readers take them."""
    from forge_harness.formats import ReadOptions

    return ReadOptions(
        scale_convention=given["scale_convention"],
        i2s_layout=given["i2s_layout"],
        quantize=given["quantize"] or None,
        exclude=given["exclude"],
    )


def refuse_idle(names: Iterable[str], beside: str) -> None:
    """Refuses options of the running command that were given and change nothing beside another.

    Raises:
        UsageError: Naming the first.
    """
    context = click.get_current_context()
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"{options[name]} changes nothing with {beside}; leave it out.")
