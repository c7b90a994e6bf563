"""What a configuration holds: digest, round trip, secrets, paths, seed, policy."""

import re

import pytest

from forge_harness.errors import several
from forge_harness.probes import secrets
from forge_harness.protocols import Configures, TrainOptions, Trains

from .support import keys_of, same, write_toml

PATH_NAMES = ("path", "paths", "dir", "file", "policy", "waivers", "runs")


@pytest.fixture
def changed(alone, keys):
    """Some keys with a value that is not their default, and loads together."""
    values = {}
    defaults = alone.defaults()
    for key, legal in alone.settable(keys, 1):
        value = next((v for v in (*legal, *key.candidates()) if v != defaults[key.name]), None)
        trial = {**values, key.name: value}
        if value is not None and alone.refusal(flags=trial) is None:
            values = trial
    assert values, "no key could be set to anything but its default"
    return values


@pytest.mark.forge_check("configuration.digest_stable")
def test_digest_stable(alone, evidence, changed, tmp_path):
    """The digest follows values: not order, comments, spelling or layer; every value moves it."""
    first = alone.load(file=write_toml(tmp_path / "a.toml", changed))
    backwards = write_toml(tmp_path / "b.toml", dict(sorted(changed.items(), reverse=True)))
    reordered = tmp_path / "c.toml"
    spaced = backwards.read_text().replace(" = ", "   =  ").replace("\n[", "\n# a comment\n\n[")
    reordered.write_text(f"# a comment\n\n{spaced}")
    evidence.record("digest", first.digest, reason=f"{several(len(changed), 'key')} set")
    evidence.equal(
        "reformatted_digest",
        alone.load(file=reordered).digest,
        expected=first.digest,
        reason="order, comments and spacing are not values",
    )
    evidence.equal(
        "other_layer_digest",
        alone.load(flags=changed).digest,
        expected=first.digest,
        reason="the same values as flags",
    )
    single = [{k: v} for k, v in changed.items() if alone.refusal(flags={k: v}) is None]
    digests = {alone.load(flags=flags).digest for flags in ({}, *single)}
    evidence.equal(
        "distinct_digests",
        len(digests),
        expected=len(single) + 1,
        reason="each changed value alone, and the defaults, all differ",
    )


@pytest.mark.forge_check("configuration.round_trip")
def test_round_trip(alone, evidence, changed, tmp_path):
    """A configuration saved as a file loads back to the same values, defaults and changes alike."""
    for name, flags in (("defaults", {}), ("changed", changed)):
        config = alone.load(flags=flags)
        path = tmp_path / f"{name}.toml"
        path.write_text(config.to_toml(), encoding="utf-8")
        before, after = config.values(), alone.load(file=path).values()
        different = [
            key
            for key in sorted({*before, *after})
            if key not in before or key not in after or not same(before[key], after[key])
        ]
        evidence.equal(
            f"{name}_keys_that_differ",
            len(different),
            expected=0,
            unit="keys",
            reason=", ".join(different[:5]) or f"{several(len(before), 'key')} compared",
        )


@pytest.mark.forge_check("configuration.no_secret_in_config")
def test_no_secret_in_config(subject, evidence):
    """No value in force looks like a credential, by key name, known form or randomness.

    The scan must find its planted values first: one that finds nothing finds no secret either.
    """
    evidence.equal(
        "planted_values_found",
        len(secrets.suspicious(secrets.PLANTED)),
        expected=len(secrets.PLANTED),
        reason="values of six forms that open nothing",
    )
    config = subject.load_config()
    found = secrets.suspicious(config.values())
    evidence.equal(
        "values_like_credentials",
        len(found),
        expected=0,
        unit="keys",
        reason="; ".join(f"{key} {why}" for key, why in found.items())
        or f"{several(len(config.values()), 'value')} read",
    )


@pytest.mark.forge_check("configuration.paths_exist")
def test_paths_exist(subject, evidence):
    """Every path in force exists, or can be made because its parent is there.

    A URL is on no disk of this machine, nor need be what a hub's name stands for
    (`model_name_or_path`): whether they are there is not asked.
    """
    from pathlib import Path

    config = subject.load_config()
    named, missing = [], []
    for key, value in config.values().items():
        last = key.rpartition(".")[2]
        if last not in PATH_NAMES and not last.endswith(tuple(f"_{n}" for n in PATH_NAMES)):
            continue
        for text in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(text, str) or not text or _may_be_elsewhere(last, text):
                continue
            named.append(text)
            path = Path(text.removeprefix("file://")).expanduser()
            if not path.exists() and not path.absolute().parent.is_dir():
                missing.append(f"{key} = {text}")
    evidence.record("paths", len(named), reason=", ".join(named) or "none is set")
    evidence.equal(
        "paths_missing",
        len(missing),
        expected=0,
        unit="paths",
        reason="; ".join(missing) or "each exists or can be made",
    )


def _may_be_elsewhere(key, text):
    on_a_hub = key.endswith("name_or_path") and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text)
    return bool(on_a_hub) or "://" in text.removeprefix("file://")


@pytest.mark.forge_check("configuration.seed_fixed")
def test_seed_fixed(subject, evidence):
    """The seed is a number that does not change between loads, and it reaches training."""
    seeds = [k.name for k in keys_of(subject.config_schema()) if k.last == "seed"]
    if not seeds:
        pytest.skip("the configuration has no key named seed")
    first, second = subject.load_config(), subject.load_config()
    for key in seeds:
        value = first.values()[key]
        evidence.equal(
            f"{key}_is_a_number",
            isinstance(value, int) and not isinstance(value, bool),
            expected=True,
            reason=f"{value!r}: a seed that is not set is drawn anew each time",
        )
        evidence.equal(
            f"{key}_again", second.values()[key], expected=value, reason="two loads, one seed"
        )
    if isinstance(subject, Trains):
        task = subject.tasks()[0] if hasattr(subject, "tasks") else "default"
        losses = [
            subject.session(task, TrainOptions(seed=seed, steps=2)).step().loss
            for seed in (11, 11, 12)
        ]
        evidence.equal("loss_again", losses[1], expected=losses[0], reason="seed 11 twice")
        evidence.equal(
            "seed_has_effect", losses[2] != losses[0], expected=True, reason="seed 12 against 11"
        )


@pytest.mark.forge_check("configuration.policy_separate")
def test_policy_separate(subject, policy, evidence):
    """Thresholds have a digest that moves with them, and no key in the configuration.

    A threshold inside the configuration could be loosened by whoever is measured.
    """
    evidence.record("policy_digest", policy.digest, reason="catalogue, weights and thresholds")
    name = sorted(policy.thresholds)[0]
    moved = policy.model_copy(
        update={"thresholds": {**policy.thresholds, name: policy.thresholds[name] / 2 + 1}}
    )
    evidence.equal(
        "threshold_moves_policy_digest",
        moved.digest != policy.digest,
        expected=True,
        reason=f"{name} changed",
    )
    if not isinstance(subject, Configures):
        return
    shared = [
        key.name
        for key in keys_of(subject.config_schema())
        if key.last in {"thresholds", "threshold", "limits", "weights"}
    ]
    evidence.equal(
        "thresholds_in_configuration",
        len(shared),
        expected=0,
        unit="keys",
        reason=", ".join(shared) or "the configuration has no key for one",
    )
