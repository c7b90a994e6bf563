"""Configurations whose layers resolve wrongly, or that accept what they must refuse."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.errors import ConfigError, ExitCode
from forge_harness.protocols import ResolvedConfig
from forge_harness.subject.reference import ReferenceSubject

PREFIX = "FORGE_HARNESS_"


class Changed:
    """A loaded configuration with some answers changed."""

    def __init__(self, config: ResolvedConfig, changes: Mapping[str, Callable[..., Any]]) -> None:
        self.config, self.changes = config, changes

    def values(self) -> Mapping[str, Any]:
        """See `ResolvedConfig.values`; the change returns the values that are others."""
        values = self.config.values()
        return {**values, **self.changes["values"](values)} if "values" in self.changes else values

    def origin(self, key: str) -> Any:
        """See `ResolvedConfig.origin`."""
        return self.changes.get("origin", self.config.origin)(key)

    def to_toml(self) -> str:
        """See `ResolvedConfig.to_toml`."""
        text = self.config.to_toml()
        return str(self.changes["toml"](text)) if "toml" in self.changes else text

    @property
    def digest(self) -> str:
        """See `ResolvedConfig.digest`; the change gets the configuration as it was loaded."""
        change = self.changes.get("digest")
        return self.config.digest if change is None else str(change(self.config))


class ResolvesAnother(ReferenceSubject):
    """Loads as the reference does, then changes answers: values, origin, toml, digest."""

    def __init__(self, **changes: Callable[..., Any]) -> None:
        self.changes = changes

    def load_config(self, **layers: Any) -> Any:
        """See `Configures.load_config`."""
        return Changed(super().load_config(**layers), self.changes)


class LoadsAnother(ReferenceSubject):
    """Loads by `load(sound, file=..., environ=..., flags=...)`, where `sound` loads as it ought."""

    def __init__(self, load: Callable[..., Any]) -> None:
        self.load = load

    def load_config(
        self,
        *,
        file: Path | None = None,
        environ: Mapping[str, str] | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `Configures.load_config`."""
        return self.load(super().load_config, file=file, environ=environ, flags=flags)


def resolved(subject: Any) -> object:
    """What becomes of loads in each layer, legal and not: values, origins, text, or refusal."""
    seen: list[object] = [repr(subject.config_schema())]
    with tempfile.TemporaryDirectory() as folder:
        for number, (text, environ, flags) in enumerate(_LOADS):
            file = Path(folder) / f"{number}.toml"
            file.write_text(text, encoding="utf-8")
            try:
                loaded = subject.load_config(file=file, environ=environ, flags=flags)
            except ConfigError as error:
                said = str(error).replace(folder, "")
                seen.append([said, int(error.exit_code), error.key])
                continue
            values = loaded.values()
            seen.append({key: [value, loaded.origin(key)] for key, value in values.items()})
            seen += [loaded.to_toml(), loaded.digest]
    return seen


_FILE = "[run]\nseed = 3\n[train]\nsteps = 50\nautocast = true\n"
_LOADS: tuple[tuple[str, dict[str, str], dict[str, Any]], ...] = (
    ("", {}, {}),
    (_FILE, {}, {}),
    (f"# the same\n{_FILE}", {}, {}),
    (_FILE, {f"{PREFIX}RUN_SEED": "4"}, {}),
    (_FILE, {f"{PREFIX}RUN_SEED": "4"}, {"run.seed": 5}),
    ("[train]\nwarmup_steps = 0\n", {}, {}),
    (_FILE, {f"{PREFIX}RUN_SEED": "0", f"{PREFIX}TRAIN_AUTOCAST": "false"}, {}),
    (_FILE, {}, {"run.seed": 0, "train.autocast": False}),
    ("[run]\nsede = 3\n", {}, {}),
    ("", {}, {"run.seed": -1}),
    ("", {}, {"model.width": 64, "model.heads": 4}),
    ("", {}, {"model.width": 64, "model.heads": 3}),
    ("", {}, {}),
)
"""File, variables and flags; the first load again at the end."""


def _falls_back(sound: Callable[..., Any], when: Callable[[str], bool], **layers: Any) -> Any:
    """Loads, and takes the defaults where a refusal says what `when` looks for."""
    try:
        return sound(**layers)
    except ConfigError as error:
        if not when(str(error)):
            raise
        return sound(environ={}, flags={})


def _ignores_unknown_keys(sound: Callable[..., Any], **layers: Any) -> Any:
    return _falls_back(sound, lambda said: "nknown" in said, **layers)


def _clamps(sound: Callable[..., Any], **layers: Any) -> Any:
    return _falls_back(sound, lambda said: "nknown" not in said, **layers)


def _refuses_without_a_hint(sound: Callable[..., Any], **layers: Any) -> Any:
    try:
        return sound(**layers)
    except ConfigError:
        raise ConfigError("Bad configuration.") from None


def _refuses_without_the_bound(sound: Callable[..., Any], **layers: Any) -> Any:
    try:
        return sound(**layers)
    except ConfigError as error:
        raise ConfigError("A value is out of range.", key=error.key) from None


def _refuses_with_another_code(sound: Callable[..., Any], **layers: Any) -> Any:
    try:
        return sound(**layers)
    except ConfigError as error:
        error.exit_code = ExitCode.GATE_FAILED
        raise


def _value_or_default(sound: Callable[..., Any], **layers: Any) -> Any:
    defaults = sound(environ={}, flags={}).values()
    return Changed(
        sound(**layers),
        {"values": lambda values: {k: v or defaults[k] or "default" for k, v in values.items()}},
    )


def _falsy_flags_lost(sound: Callable[..., Any], *, flags: Any, **layers: Any) -> Any:
    return sound(flags={key: value for key, value in (flags or {}).items() if value}, **layers)


def _falsy_variables_lost(sound: Callable[..., Any], *, environ: Any, **layers: Any) -> Any:
    if environ is not None:
        environ = {k: v for k, v in environ.items() if v not in ("0", "0.0", "false")}
    return sound(environ=environ, **layers)


def _false_is_true(sound: Callable[..., Any], *, environ: Any, **layers: Any) -> Any:
    """bool("false") is True."""
    if environ is not None:
        environ = {k: "true" if v == "false" else v for k, v in environ.items()}
    return sound(environ=environ, **layers)


def _file_over_environment(
    sound: Callable[..., Any], *, file: Path | None, environ: Any, flags: Any
) -> Any:
    if file is not None and environ:
        text = tomllib.loads(file.read_text(encoding="utf-8"))
        given = {f"{PREFIX}{s}_{k}".upper() for s, table in text.items() for k in table}
        environ = {k: v for k, v in environ.items() if k not in given}
    return sound(file=file, environ=environ, flags=flags)


def _environment_over_flags(
    sound: Callable[..., Any], *, environ: Any, flags: Any, **layers: Any
) -> Any:
    set_there = {k: v for k, v in (flags or {}).items() if _variable(k) not in (environ or {})}
    return sound(environ=environ, flags=set_there, **layers)


def _variable(key: str) -> str:
    return PREFIX + key.replace(".", "_").upper()


def _accepts_any_shape(sound: Callable[..., Any], *, flags: Any, **layers: Any) -> Any:
    kept = {k: v for k, v in (flags or {}).items() if not k.startswith("model.")}
    return sound(flags=kept, **layers)


def _refuses_every_shape(sound: Callable[..., Any], *, flags: Any, **layers: Any) -> Any:
    if any(key.startswith("model.") for key in flags or {}):
        raise ConfigError("Shapes cannot be set.")
    return sound(flags=flags, **layers)


_loads = partial(Defect, stage=Stage.CONFIGURATION, alive=resolved)

DEFECTS = (
    _loads(
        id="V02_unknown_keys_ignored",
        title="A misspelt key is swallowed, and the default stays in force",
        check="configuration.unknown_key_refused",
        shows="unknown_keys_accepted is",
        subject=lambda: LoadsAnother(_ignores_unknown_keys),
        source="EleutherAI/lm-evaluation-harness#3937",
        subtlety=4,
    ),
    _loads(
        id="refuses_without_a_hint",
        title="A misspelt key is refused without the name that was meant",
        check="configuration.unknown_key_refused",
        shows="refusals_without_the_nearest_name is",
        subject=lambda: LoadsAnother(_refuses_without_a_hint),
        subtlety=2,
    ),
    _loads(
        id="refuses_with_another_code",
        title="A bad configuration ends with the exit code of a failed gate",
        check="configuration.unknown_key_refused",
        shows="exit_codes is [1]",
        subject=lambda: LoadsAnother(_refuses_with_another_code),
        subtlety=3,
    ),
    _loads(
        id="value_or_default",
        title="`value or default`: an explicit zero is replaced by the default",
        check="configuration.explicit_zero_kept",
        shows="of the file became",
        subject=lambda: LoadsAnother(_value_or_default),
        subtlety=4,
    ),
    _loads(
        id="falsy_flags_lost",
        title="Flags that are 0, false or empty count as not given",
        check="configuration.explicit_zero_kept",
        shows="of the flag became",
        subject=lambda: LoadsAnother(_falsy_flags_lost),
        subtlety=4,
    ),
    _loads(
        id="falsy_variables_lost",
        title="Variables that are 0 or false count as not set",
        check="configuration.explicit_zero_kept",
        shows="of the environment became",
        subject=lambda: LoadsAnother(_falsy_variables_lost),
        subtlety=4,
    ),
    _loads(
        id="V08_false_is_true",
        title="The text `false` of a variable is read as true",
        check="configuration.explicit_zero_kept",
        shows="= False of the environment became True",
        subject=lambda: LoadsAnother(_false_is_true),
        source="EleutherAI/lm-evaluation-harness#4003",
        subtlety=3,
    ),
    _loads(
        id="V02_file_over_environment",
        title="The file wins over the environment",
        check="configuration.precedence",
        shows="(1, 'file') instead of (2, 'environment')",
        subject=lambda: LoadsAnother(_file_over_environment),
        source="EleutherAI/lm-evaluation-harness#3937",
        subtlety=4,
    ),
    _loads(
        id="V02_environment_over_flags",
        title="The environment wins over a flag",
        check="configuration.precedence",
        shows="(2, 'environment') instead of (3, 'flag')",
        subject=lambda: LoadsAnother(_environment_over_flags),
        source="EleutherAI/lm-evaluation-harness#3937",
        subtlety=4,
    ),
    _loads(
        id="everything_from_the_file",
        title="Every value is said to come from the file",
        check="configuration.precedence",
        shows="(0, 'file') instead of (0, 'default')",
        subject=lambda: ResolvesAnother(origin=lambda key: "file"),
        subtlety=3,
    ),
    _loads(
        id="clamps_silently",
        title="A value out of range is replaced without a word",
        check="configuration.ranges",
        shows="values_out_of_range_accepted is",
        subject=lambda: LoadsAnother(_clamps),
        subtlety=4,
    ),
    _loads(
        id="no_bound_in_the_sentence",
        title="A value out of range is refused without the range",
        check="configuration.ranges",
        shows="refusals_without_the_bound is",
        subject=lambda: LoadsAnother(_refuses_without_the_bound),
        subtlety=2,
    ),
    _loads(
        id="accepts_any_shape",
        title="A width that the heads do not divide is accepted",
        check="configuration.shape_divisibility",
        shows="heads_that_do_not_divide_refused is False",
        subject=lambda: LoadsAnother(_accepts_any_shape),
        subtlety=3,
    ),
    _loads(
        id="refuses_every_shape",
        title="A legal width and number of heads are refused",
        check="configuration.shape_divisibility",
        shows="sound_shape is Shapes cannot be set",
        subject=lambda: LoadsAnother(_refuses_every_shape),
        subtlety=2,
    ),
)


class ConfiguresOnly:
    """Loads a configuration, and trains and quantizes nothing."""

    name = "configures only"
    load_config = ReferenceSubject.load_config
    config_schema = ReferenceSubject.config_schema
    quantization_info = ReferenceSubject.quantization_info


BENIGN = (
    Benign(
        id="configures_only",
        title="Loads a configuration, and trains and quantizes nothing",
        subject=ConfiguresOnly,
        checks=("configuration",),
        but=(
            "configuration.quantization_consistent",
            "configuration.schedule_golden",
            "configuration.warmup_within_run",
        ),
    ),
)
