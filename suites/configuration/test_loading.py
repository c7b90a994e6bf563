"""Loading a configuration: schema, layers, refusals. Keys come from the subject's own schema."""

import math

import pytest

from .support import MISSING, keys_of, nested, same, variable, write_toml


@pytest.mark.forge_check("configuration.schema_valid")
def test_schema_valid(subject, evidence, alone):
    """Configuration in force and defaults fit the published schema; a wrong type does not.

    Oracle: the jsonschema package, which shares no code with the loader.
    """
    import jsonschema

    schema = subject.config_schema()
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for name, config in (
        ("in_force", subject.load_config()),
        ("defaults", alone.load()),
    ):
        problems = [problem.message for problem in validator.iter_errors(nested(config.values()))]
        evidence.equal(
            f"schema_errors_{name}",
            len(problems),
            expected=0,
            reason="; ".join(problems[:3]) or "by an independent validator",
        )
    accepted = []
    for key in keys_of(schema):
        wrong = 0 if key.kind == "object" else {"not": "a value"}
        values = nested({**alone.defaults(), key.name: wrong})
        if validator.is_valid(values):
            accepted.append(key.name)
    evidence.equal(
        "keys_that_accept_anything",
        len(accepted),
        expected=0,
        unit="keys",
        reason=", ".join(accepted)
        or "a table in place of each value, a number in place of a table: refused by the schema",
    )


@pytest.mark.forge_check("configuration.unknown_key_refused")
def test_unknown_key_refused(alone, evidence, keys, tmp_path):
    """Each key, misspelt in the file and as a flag, is refused with the nearest known name.

    A typo that is ignored trains with the default and nobody knows.
    """
    accepted, unnamed, codes = [], [], set()
    known = {key.name for key in keys}
    for key in keys:
        table = key.name.removesuffix(key.last)
        wrong = next(name for each in _misspelt(key.last) if (name := table + each) not in known)
        file = write_toml(tmp_path / "typo.toml", {wrong: 1})
        for layers in ({"file": file}, {"flags": {wrong: 1}}):
            error = alone.refusal(**layers)
            if error is None:
                accepted.append(wrong)
            elif key.last not in str(error):
                unnamed.append(wrong)
            else:
                codes.add(int(getattr(error, "exit_code", 4)))
    evidence.equal(
        "unknown_keys_accepted",
        len(accepted),
        expected=0,
        unit="keys",
        reason=", ".join(accepted[:5]) or f"{2 * len(keys)} misspellings",
    )
    evidence.equal(
        "refusals_without_the_nearest_name",
        len(unnamed),
        expected=0,
        unit="keys",
        reason=", ".join(unnamed[:5]) or "each sentence names the key that was meant",
    )
    evidence.equal(
        "exit_codes", str(sorted(codes)), expected="[4]", reason="4 is the code of a usage error"
    )


def _misspelt(name):
    """Names one slip away: of `loss`, swapping the last two letters leaves the name it is."""
    if len(name) > 3:
        yield name[:-2] + name[-1] + name[-2]
    while True:
        name += name[-1]
        yield name


@pytest.mark.forge_check("configuration.explicit_zero_kept")
def test_explicit_zero_kept(subject, alone, evidence, keys, tmp_path):
    """0, false, "" and [] given in a file, a variable or a flag are the values in force.

    The defect looked for is `value or default`, which each layer can have for itself.
    """
    lost, tied, tried = [], [], 0
    for key in keys:
        value = key.falsy()
        if value is MISSING:
            continue
        for origin, layers in _zero_layers(subject, key, value, tmp_path / "zero.toml"):
            error = alone.refusal(**layers)
            if error is not None:
                # Legal by the schema, refused by a rule with another key.
                tied.append(f"{key.name} in the {origin}: {error}")
                continue
            tried += 1
            config = alone.load(**layers)
            kept = config.values()[key.name]
            if not same(kept, value) or config.origin(key.name) != origin:
                lost.append(f"{key.name} = {value!r} of the {origin} became {kept!r}")
    evidence.record("refused", len(tied), unit="values", reason="; ".join(tied[:3]) or "none")
    evidence.record("values_tried", tried, unit="values", reason="legal falsy values, a layer each")
    if not tried:
        pytest.skip("no key of the configuration has a legal falsy value")
    evidence.equal(
        "falsy_values_lost",
        len(lost),
        expected=0,
        unit="values",
        reason="; ".join(lost[:5]) or "all are in force as given",
    )


def _zero_layers(subject, key, value, path):
    yield "file", {"file": write_toml(path, {key.name: value})}
    yield "flag", {"flags": {key.name: value}}
    # An empty variable counts as unset in many programs, so text and lists are left out.
    if key.kind in ("integer", "number", "boolean"):
        yield "environment", {"environ": {variable(subject, key): str(value).lower()}}


@pytest.mark.forge_check("configuration.precedence")
def test_precedence(subject, alone, evidence, keys, tmp_path):
    """Flag over environment over file over default, with its origin, for every settable key."""
    wrong, tried = [], 0
    for key, (in_file, in_environment, in_flag) in alone.settable(keys, 3):
        if key.kind not in ("integer", "number", "string") or key.choices:
            continue
        tried += 1
        file = write_toml(tmp_path / "file.toml", {key.name: in_file})
        environ = {variable(subject, key): str(in_environment)}
        flags = {key.name: in_flag}
        default = alone.defaults()[key.name]
        for layers, expected in (
            ({}, (default, "default")),
            ({"file": file}, (in_file, "file")),
            ({"file": file, "environ": environ}, (in_environment, "environment")),
            ({"file": file, "environ": environ, "flags": flags}, (in_flag, "flag")),
        ):
            config = alone.load(**layers)
            found = (config.values()[key.name], config.origin(key.name))
            if found != expected:
                wrong.append(f"{key.name}: {found} instead of {expected}")
    evidence.record("keys_tried", tried, unit="keys", reason="with three legal values")
    if not tried:
        pytest.skip("no key of the configuration takes three values on its own")
    evidence.equal(
        "wrong_winners",
        len(wrong),
        expected=0,
        reason="; ".join(wrong[:3]) or "four stacks of layers for each key",
    )


@pytest.mark.forge_check("configuration.ranges")
def test_ranges(alone, evidence, keys, tmp_path):
    """A value just outside each bound of the schema is refused, and the sentence says the bound."""
    accepted, silent, tried = [], [], 0
    for key in keys:
        for bound, value in _outside(key):
            tried += 1
            error = alone.refusal(file=write_toml(tmp_path / "range.toml", {key.name: value}))
            if error is None:
                accepted.append(f"{key.name} = {value}")
            elif not _says(str(error), bound):
                silent.append(f"{key.name} = {value}: {error}")
    evidence.record("bounds_tried", tried, unit="bounds", reason="of the schema")
    if not tried:
        pytest.skip("the schema of the configuration states no bound")
    evidence.equal(
        "values_out_of_range_accepted",
        len(accepted),
        expected=0,
        reason="; ".join(accepted[:5]) or "one step beyond each bound",
    )
    evidence.equal(
        "refusals_without_the_bound",
        len(silent),
        expected=0,
        reason="; ".join(silent[:3]) or "each sentence gives the bound",
    )


def _outside(key):
    if key.low is not None:
        # 1e-9 less than 1e8 is 1e8.
        below = min(key.low - 1e-9, math.nextafter(key.low, -math.inf))
        below = key.low - 1 if key.kind == "integer" else below
        yield key.low, below if key.low_is_allowed else key.low
    if key.high is not None:
        yield key.high, key.high + 1 if key.high_is_allowed else key.high


def _says(sentence, bound):
    plain = sentence.replace(",", "").replace("_", "")
    whole = {str(int(bound))} if bound == int(bound) else set()
    return any(text in plain for text in {str(bound), f"{bound:g}", *whole})


@pytest.mark.forge_check("configuration.shape_divisibility")
def test_shape_divisibility(alone, evidence, keys):
    """A width the heads do not divide, and one that does not fill packed bytes, are refused.

    Four ternary codes share a byte in every 2-bit layout; rotary embedding needs whole heads.
    """
    width = _named(keys, ("width", "hidden_size", "d_model", "embed_dim"))
    heads = _named(keys, ("heads", "num_heads", "n_heads", "num_attention_heads"))
    if width is None or heads is None:
        pytest.skip("the configuration has no width and heads to hold against each other")
    sound = alone.refusal(flags={width.name: 64, heads.name: 4})
    evidence.equal(
        "sound_shape", str(sound), expected="None", reason="width 64 in 4 heads is legal"
    )
    for name, shape in (
        ("heads_that_do_not_divide", {width.name: 64, heads.name: 3}),
        ("width_that_fills_no_bytes", {width.name: 66, heads.name: 1}),
    ):
        error = alone.refusal(flags=shape)
        evidence.equal(
            f"{name}_refused",
            error is not None,
            expected=True,
            reason=str(error or f"{shape} was accepted"),
        )


def _named(keys, names):
    return next((key for key in keys if key.last in names), None)
