"""The sections of forge.toml, their defaults and the rules that tie values together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    StrictStr,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from forge_harness.types import Profile

MAX_SEED = 2**32 - 1
"""NumPy refuses larger seeds."""
PACK_BLOCK = 4
"""Ternary codes a byte in the `i2` layout: widths must fill whole bytes."""
_WHOLE_BYTES = f"a multiple of {PACK_BLOCK}, because {PACK_BLOCK} ternary codes fill a byte"

DECLARED_DEFAULTS: dict[str, str] = {"accelerator": "auto", "causal_models": "auto"}
DECLARED_CHOICES: dict[str, tuple[str, ...]] = {
    "accelerator": ("auto", "cuda", "none", "rocm"),
    "causal_models": ("auto", "none"),
}
"""What the checks and predicates that ship know; "None" or "gpu" would mean something to nobody."""
DECLARED_DOCS = {
    "accelerator": "auto: what is looked for and not found is not measured. none: this machine "
    "has none, and checks of it do not apply. cuda, rocm: one must be here.",
    "causal_models": "auto, or none: no model of the subject is causal, and checks of the mask do "
    "not apply.",
}
"""What the known declared keys mean."""

PATH_KEYS = ("run.run_dir", "run.policy", "run.waivers", "paths.runs", "paths.state")
"""Keys that hold one path."""
PATH_LIST_KEYS = ("run.suite_paths", "paths.sources")
"""Keys that hold several."""

_SECTION = ConfigDict(
    extra="forbid",
    frozen=True,
    strict=True,
    allow_inf_nan=False,
    use_attribute_docstrings=True,
)
_Names = Annotated[tuple[StrictStr, ...], Strict(False)]
"""A TOML array of strings; strict mode would refuse a list where a tuple is declared."""


class RunConfig(BaseModel):
    """What `forge-harness run` validates, and how."""

    model_config = _SECTION

    profile: Annotated[Profile, Strict(False)] = Profile.QUICK
    """Scope and size of the measurements: quick takes minutes, full everything this machine
    can measure, nightly adds soak and power-loss checks."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of every random choice of the run."""
    subject: str = ""
    """What is validated: package.module:object, path/to/file.py:object, an entry point name
    or the path of a checkpoint. Empty: the reference pipeline."""
    run_dir: str = ""
    """Directory of the run; it must not exist or be empty. Empty: a new one named by the UTC
    time under paths.runs."""
    workers: int = Field(default=0, ge=0, le=256)
    """Processes that run checks side by side; 0: one for each CPU this process may use, at most
    4. Outcomes do not depend on it."""
    timeout_s: float = Field(default=0.0, ge=0, le=86_400)
    """Longest time one check may take, in seconds; 0 leaves each check the limit its catalogue
    entry gives."""
    deadline_s: float = Field(default=0.0, ge=0, le=604_800)
    """Longest time the whole run may take, in seconds; what has not ended by then is not
    measured. 0: no limit."""
    suite_paths: _Names = ()
    """Directories of your own checks, run beside the ones that ship with the harness. A
    catalogue.toml in one of them is added to the catalogue."""
    policy: str = ""
    """Policy file laid over the shipped thresholds and weights. Empty: the shipped policy."""
    waivers: str = ""
    """Waiver file: known failures with owner, reason, issue and expiry date. Empty: none."""


class TrainConfig(BaseModel):
    """The training run of `forge-harness train`."""

    model_config = _SECTION

    task: Literal["digits", "bytes"] = "digits"
    """digits: image classifier on scikit-learn's digits. bytes: byte-level language model on
    the Python standard library's sources."""
    steps: int = Field(default=308, ge=1, le=10_000_000)
    """Optimizer steps. Default: 308 for digits, 300 for bytes."""
    batch_size: int = Field(default=64, ge=1, le=65_536)
    """Samples of one optimizer step, over all its micro-batches. Default: 64 for digits, 4 for
    bytes."""
    accumulation: int = Field(default=1, ge=1, le=65_536)
    """Micro-batches an optimizer step is split into, at most batch_size."""
    learning_rate: float = Field(default=3e-3, gt=0, le=10)
    """Peak learning rate. Default: 0.003 for digits; 0.002 for bytes, 0.001 in full precision."""
    warmup_steps: int = Field(default=15, ge=0)
    """Steps of linear warmup; fewer than steps. Default: 5 % of the steps for digits, 10 % for
    bytes."""
    weight_decay: float = Field(default=0.05, ge=0, le=10)
    """Decoupled weight decay of matrices. Default: 0.05 for digits, 0.1 for bytes."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest gradient L2 norm; 0 does not clip."""
    precision: Literal["ternary", "full"] = "ternary"
    """ternary: quantization-aware training (W1.58A8). full: the full-precision control."""
    compute: Literal["exact", "int8", "fake"] = "exact"
    """How the quantized product is computed: exact integers in fp32, an int8 matrix product, or
    dequantised values."""
    compile: bool = False
    """Compile the model with torch.compile."""
    autocast: bool = False
    """Run full-precision parts in bf16 autocast."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 writes one at the end only."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, data: Any) -> Any:  # noqa: ANN401 - raw input
        return _train_defaults(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _rules(self) -> TrainConfig:
        if self.warmup_steps >= self.steps:
            raise _rule("warmup_steps", self.warmup_steps, f"fewer than train.steps = {self.steps}")
        if self.accumulation > self.batch_size:
            wanted = f"at most train.batch_size = {self.batch_size}"
            raise _rule("accumulation", self.accumulation, wanted)
        return self


class ModelConfig(BaseModel):
    """The model `forge-harness train` builds."""

    model_config = _SECTION

    width: int = Field(default=64, ge=4, le=8192)
    """Features of the residual stream, a multiple of 4 (four ternary codes a byte). Default: 64
    for digits, 256 for bytes."""
    heads: int = Field(default=1, ge=1, le=256)
    """Attention heads (bytes only; 1 for digits); must divide width into even head widths.
    Default: 4 for bytes."""
    layers: int = Field(default=2, ge=1, le=128)
    """Residual blocks."""
    hidden: int = Field(default=128, ge=4, le=32_768)
    """Features inside the feed-forward part, a multiple of 4. Default: 128 for digits, 768 for
    bytes."""
    context: int = Field(default=1, ge=1, le=65_536)
    """Tokens a sequence (bytes only; 1 for digits). Default: 128 for bytes."""

    @model_validator(mode="after")
    def _rules(self) -> ModelConfig:
        for name in ("width", "hidden"):
            if getattr(self, name) % PACK_BLOCK:
                raise _rule(name, getattr(self, name), _WHOLE_BYTES)
        if self.width % self.heads:
            raise _rule("heads", self.heads, f"a divisor of model.width = {self.width}")
        if (self.width // self.heads) % 2:
            # Rotary embedding turns features in pairs.
            wanted = f"a number that divides model.width = {self.width} into even head widths"
            raise _rule("heads", self.heads, wanted)
        return self


class PathsConfig(BaseModel):
    """Where the harness keeps its files."""

    model_config = _SECTION

    runs: str = Field(default="forge-runs", min_length=1)
    """Directory under which runs without an explicit run_dir are made."""
    state: str = ""
    """Directory of the state store that keeps finished runs. Empty: none is kept."""
    sources: _Names = ()
    """Directories or files of code the Power of Ten is counted over. Empty: the harness's own."""


class HarnessConfig(BaseModel):
    """Everything forge.toml can say. Thresholds are not here: they are the policy's."""

    model_config = _SECTION

    run: RunConfig = Field(default_factory=RunConfig)
    declared: dict[str, str] = Field(
        default_factory=lambda: dict(DECLARED_DEFAULTS),
        json_schema_extra={
            "properties": {
                name: {"type": "string", "enum": list(choices), "description": DECLARED_DOCS[name]}
                for name, choices in DECLARED_CHOICES.items()
            }
        },
    )
    """Facts about this machine and subject that not-applicable predicates of the catalogue
    read, for example accelerator = "none" or causal_models = "none"."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    paths: PathsConfig = Field(default_factory=PathsConfig)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, data: Any) -> Any:  # noqa: ANN401 - raw input
        return _with_defaults(data) if isinstance(data, dict) else data

    @field_validator("declared")
    @classmethod
    def _are_known(cls, declared: dict[str, str]) -> dict[str, str]:
        for name, choices in DECLARED_CHOICES.items():
            value = declared.get(name)
            if value is not None and value not in choices:
                raise _rule(name, value, f"one of {', '.join(map(repr, choices))}")
        return declared


_BYTES_TRAIN = {"steps": 300, "batch_size": 4, "learning_rate": 2e-3, "weight_decay": 0.1}
TRAIN_DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("digits", "ternary"): {},
    ("digits", "full"): {},
    ("bytes", "ternary"): _BYTES_TRAIN,
    ("bytes", "full"): {**_BYTES_TRAIN, "learning_rate": 1e-3},
}
"""(task, precision) -> the defaults that differ from the fields' own: the tuned quick recipes of
`forge_harness.training.recipe_for`."""
MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {},
    "bytes": {"width": 256, "heads": 4, "hidden": 768, "context": 128},
}
"""Task -> the defaults that differ from the fields' own."""
WARMUP_SHARE = {"digits": 0.05, "bytes": 0.1}
"""Warmup as a share of the steps where warmup_steps is not given, so that a shorter run needs
one key, not two."""


def _train_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """Returns a raw [train] with the defaults of its task and precision under what was given."""
    arm = data.get("task", "digits"), data.get("precision", "ternary")
    # Other values of the two, of whatever type, are refused by the schema.
    defaults = next((d for known, d in TRAIN_DEFAULTS.items() if known == arm), None)
    if defaults is None:
        return data
    train = {**defaults, **data}
    steps = train.get("steps", TrainConfig.model_fields["steps"].default)
    if isinstance(steps, int) and steps > 0:
        warmup = min(round(WARMUP_SHARE[str(arm[0])] * steps), steps - 1)
        train.setdefault("warmup_steps", warmup)
    return train


def _with_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """Returns raw sections with defaults that depend on other sections under what was given."""
    filled = dict(data)
    train, model = data.get("train", {}), data.get("model", {})
    task = train.task if isinstance(train, TrainConfig) else _get(train, "task", "digits")
    if isinstance(model, dict) and isinstance(task, str) and task in MODEL_DEFAULTS:
        filled["model"] = {**MODEL_DEFAULTS[task], **model}
    if isinstance(data.get("declared"), dict):
        filled["declared"] = {**DECLARED_DEFAULTS, **data["declared"]}
    return filled


def _get(section: object, key: str, default: object) -> object:
    return section.get(key, default) if isinstance(section, dict) else default


def _rule(key: str, value: object, expected: str) -> PydanticCustomError:
    context = {"key": key, "value": value, "expected": expected}
    return PydanticCustomError("rule", "{key} is {value}; expected {expected}", context)


def default_values() -> dict[str, Any]:
    """Returns dotted key -> default as Python values, in schema order (the digits task's)."""
    return _dotted(HarnessConfig().model_dump())


def dotted_values(config: HarnessConfig) -> dict[str, Any]:
    """Returns dotted key -> JSON value, all keys."""
    return _dotted(config.model_dump(mode="json"))


def _dotted(sections: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, content in sections.items()
        for key, value in content.items()
    }


def config_json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of forge.toml, with the docstring of each field."""
    schema = HarnessConfig.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "forge.toml",
        "description": "Configuration of Forge Harness: forge.toml, or [tool.forge-harness] in "
        "pyproject.toml.",
    }
