"""What a subject can offer, one narrow protocol a capability.

A subject implements those it has: no base class, no registration. The suites reach the subject
through these protocols only, which is what makes them useful on a foreign model and lets a
drill put a fault in. Shape letters: N output features, K input features, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "CAPABILITIES",
    "Arm",
    "AuditWriter",
    "AuditedRequest",
    "Batch",
    "BuildsModel",
    "Checkpoints",
    "Configures",
    "ContentSealer",
    "DataInfo",
    "ExportsWeights",
    "HoldsCheckpoint",
    "InfersPacked",
    "KeepsAuditLog",
    "KeepsState",
    "LoadsData",
    "MeasuresQuality",
    "ModelSpec",
    "MultipliesTernary",
    "Packs",
    "Precision",
    "QualityRun",
    "QuantizationInfo",
    "Quantizes",
    "QuantizesParts",
    "ReadsCheckpoints",
    "ResolvedConfig",
    "ScheduleSpec",
    "ScheduleStep",
    "SealsContent",
    "ServerSpec",
    "Serves",
    "SignsPackages",
    "StepRecord",
    "StoreSpec",
    "TrainOptions",
    "TrainingSession",
    "Trains",
    "TrainsDistributed",
    "capabilities_of",
    "methods_of",
]

Precision = Literal["ternary", "full"]
Arm = Literal["ternary", "full", "post_training"]


@runtime_checkable
class Quantizes(Protocol):
    """The quantizers and the linear layer made of them (W1.58A8)."""

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Ternary codes of a weight: (codes int8 (N, K), scale fp32 scalar), w ~ scale * codes."""
        ...

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Int8 codes a token: (codes int8 (..., K), scale fp32 (..., 1)), x ~ scale * codes."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The training forward, x (..., K) -> (..., N); differentiable through the STE."""
        ...

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The integer path: (int32 accumulators (..., N), fp32 factor (..., 1)), no gradient.

        accumulators * factor is the output without bias.
        """
        ...


@runtime_checkable
class QuantizesParts(Protocol):
    """Quantization of a weight that fuses several projections, one scale a part."""

    def quantize_weight_parts(self, weight: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Codes int8 (N, K) and scales fp32 (len(parts),); `parts` are row counts, sum N."""
        ...


@runtime_checkable
class Packs(Protocol):
    """Lossless packing of ternary codes, four a byte (Hugging Face row-block order)."""

    def pack(self, codes: Tensor) -> Tensor:
        """Int8 codes (N, K) -> uint8 (ceil(N / 4), K)."""
        ...

    def unpack(self, packed: Tensor, rows: int) -> Tensor:
        """uint8 (ceil(rows / 4), K) -> int8 codes (rows, K)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What the subject declares about one of its models."""

    task: str
    parameters: int
    """Trainable parameters by a closed formula, not by counting."""
    max_parameters: int
    quantized: tuple[str, ...]
    """Names of all modules whose weight is ternary in forward."""
    full_precision: tuple[str, ...]
    """Names of the modules with a 2-D or larger weight that stay in full precision."""
    sub_norms: tuple[str, ...] = ()
    """Names of the normalisation modules in front of quantized projections."""
    causal: bool = False
    """Whether outputs at a position may depend on earlier positions only."""
    tied: tuple[tuple[str, str], ...] = ()
    """Pairs of state-dict keys that share one tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch: integer or float inputs and int64 targets, both with B first."""

    inputs: Tensor
    targets: Tensor


@runtime_checkable
class BuildsModel(Protocol):
    """Builds the model of each reference task."""

    def tasks(self) -> Sequence[str]:
        """Task names; the first is the cheapest to train."""
        ...

    def model_spec(self, task: str) -> ModelSpec:
        """What is declared about the task's model."""
        ...

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """A freshly initialised ternary model in training mode; same seed, same weights."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss: a scalar, the mean over the batch's targets."""
        ...

    def example_batch(self, task: str, *, batch_size: int, seed: int) -> Batch:
        """Valid random inputs and targets of the task (not necessarily from its data)."""
        ...

    def effective_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Quantized module name -> weight values (N, K) the forward uses in the current mode."""
        ...

    def latent_weights(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        """Quantized module name -> the parameter (N, K) the optimizer updates."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DataInfo:
    """What the subject declares about a task's data."""

    kind: Literal["classes", "tokens"]
    cardinality: int
    """Classes, or vocabulary size."""
    train_size: int
    validation_size: int
    digest: str
    """`sha256:<hex>` of the content, as recorded when the data were made."""
    input_dtype: str
    """torch dtype name of the inputs, for example "int64"."""


@runtime_checkable
class LoadsData(Protocol):
    """The data of each task. A sample id is its index in its split."""

    def data_info(self, task: str) -> DataInfo:
        """What is declared about the data."""
        ...

    def data_digest(self, task: str) -> str:
        """`sha256:<hex>` recomputed now from the content that is loaded."""
        ...

    def documents(self, task: str, split: Literal["train", "validation"]) -> Sequence[bytes]:
        """The content units that must not be in two splits: images, or whole files."""
        ...

    def sample_contents(
        self, task: str, split: Literal["train", "validation"], ids: Sequence[int]
    ) -> Sequence[bytes]:
        """Content of samples exactly as the loader delivers them, labels left out."""
        ...

    def labels(self, task: str, split: Literal["train", "validation"]) -> Sequence[int]:
        """Class labels, or all token ids that occur, of a split."""
        ...

    def batch(self, task: str, split: Literal["train", "validation"], ids: Sequence[int]) -> Batch:
        """The batch of these samples."""
        ...

    def epoch_order(
        self, task: str, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
    ) -> Sequence[int]:
        """Train sample ids one rank visits in an epoch, in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What a check asks of a training session; None leaves the subject's recipe in force."""

    seed: int = 0
    steps: int = 20
    """Optimizer steps of the whole schedule."""
    precision: Precision = "ternary"
    batch_size: int | None = None
    """Samples of one optimizer step, over all its micro-batches."""
    accumulation: int = 1
    """Micro-batches an optimizer step is split into."""
    learning_rate: float | None = None
    clip_norm: float | None = None
    fixed_batch: tuple[int, ...] | None = None
    """Train on these sample ids at every step (for overfitting one batch)."""
    validation_canaries: tuple[bytes, ...] = ()
    """Documents added to the validation split only, before anything is loaded."""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleStep:
    """Learning rate and weight decay of one optimizer step (of the decayed parameters)."""

    learning_rate: float
    weight_decay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """A declared schedule, in the terms an independent formula needs.

    With t the 0-based optimizer step, S = total_steps, W = warmup_steps, all in float64:

    - both kinds, t < W: rate = peak * (t + 1) / W, weight decay as given.
    - two_stage, t >= W: f = t / S (warmup counts as done). f < boundary: rate =
      peak * (1 - f / 2), weight decay as given. Otherwise rate = peak * (1 - f), weight decay 0
      (BitNet b1.58 training notes: the rate drops and decay ends at the boundary).
    - cosine, t >= W: g = (t - W) / max(1, S - 1 - W), rate = peak * (final_fraction +
      (1 - final_fraction) * (1 + cos(pi * g)) / 2), weight decay constant. The last step,
      t = S - 1, is at final_fraction * peak.
    """

    kind: Literal["two_stage", "cosine"]
    peak: float
    warmup_steps: int
    total_steps: int
    weight_decay: float
    boundary: float = 0.5
    final_fraction: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one optimizer step reports."""

    step: int
    """0-based index of the step just made."""
    loss: float
    learning_rate: float
    weight_decay: float
    grad_norm: float
    """L2 norm over all gradients before clipping."""
    sample_ids: tuple[int, ...]
    """Train samples whose mean loss the step descended, in the order they were used."""
    seconds: float


@runtime_checkable
class TrainingSession(Protocol):
    """A training run that can be stepped, interrupted and looked into."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step_index: int
    """Optimizer steps made so far."""

    def step(self) -> StepRecord:
        """Makes one optimizer step. Raises when the loss or a gradient is not finite."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """`loss` (nats) and `accuracy` (share) of the quantized model on the validation split."""
        ...

    def state_tensors(self) -> Mapping[str, Tensor]:
        """Every tensor the future of the run depends on, by a stable name.

        Weights, buffers, optimizer state, generator states, position in the data.
        """
        ...


@runtime_checkable
class Trains(Protocol):
    """Runs quantization-aware training."""

    def session(self, task: str, options: TrainOptions) -> TrainingSession:
        """A new session at step 0."""
        ...

    def schedule_spec(self, task: str, options: TrainOptions) -> ScheduleSpec:
        """The schedule the session of these options declares."""
        ...

    def planned_schedule(self, task: str, options: TrainOptions) -> Sequence[ScheduleStep]:
        """Learning rate and weight decay of each of the `options.steps` steps."""
        ...


@runtime_checkable
class Checkpoints(Protocol):
    """Interrupts and resumes training bit-identically."""

    def save_session(self, session: TrainingSession, path: Path) -> None:
        """Writes all a resumed run needs; returns once the file is durable."""
        ...

    def resume_session(self, task: str, options: TrainOptions, path: Path) -> TrainingSession:
        """A session that continues where the saved one stopped."""
        ...


@runtime_checkable
class ExportsWeights(Protocol):
    """Writes the trained model as inference weights, and evaluates such a package."""

    def export_package(self, session: TrainingSession, path: Path) -> None:
        """Writes ternary codes, scales and the full-precision rest into directory `path`."""
        ...

    def evaluate_package(self, task: str, path: Path) -> Mapping[str, float]:
        """`loss` and `accuracy` on the validation split, from the files alone."""
        ...


@runtime_checkable
class HoldsCheckpoint(Protocol):
    """Has a checkpoint of its own: what phase 4 handed over."""

    def provide_checkpoint(self, directory: Path) -> Path:
        """Returns a file or directory in any readable format.

        It is there already, or is written below `directory`, which exists and is empty.
        """
        ...


@runtime_checkable
class InfersPacked(Protocol):
    """Runs its models from packed codes, without latent weights."""

    def inference_model(
        self, task: str, form: Literal["packed", "full"], *, seed: int
    ) -> nn.Module:
        """Returns a model in evaluation mode that maps `Batch.inputs` to logits.

        "packed" is the ternary model of `BuildsModel.build_model(task, seed=seed)`, and "full" its
        full-precision twin, both as they would be deployed: what they hold in memory are their
        parameters and buffers.
        """
        ...


@runtime_checkable
class MultipliesTernary(Protocol):
    """Has kernels that multiply int8 activations by ternary codes."""

    def products(self) -> Sequence[str]:
        """Names of the kernels that run on this machine, the one that inference uses first."""
        ...

    def prepare_product(self, name: str, codes: Tensor) -> Callable[[Tensor], Tensor]:
        """Packs codes int8 (N, K) for a kernel.

        Returns:
            A function from activations int8 (M, K) to their exact sums int32 (M, N).
        """
        ...


@runtime_checkable
class TrainsDistributed(Protocol):
    """Trains over several processes."""

    def train_distributed(
        self, task: str, options: TrainOptions, *, ranks: int
    ) -> Mapping[str, Tensor]:
        """State dict after `options.steps` steps over `ranks` gloo processes on this machine.

        Each rank takes 1 / ranks of every batch, as one of `options.accumulation` micro-batches
        in a single process would.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRun:
    """One trained and evaluated model of a quality comparison."""

    task: str
    arm: Arm
    seed: int
    steps: int
    learning_rate: float
    parameters: int
    accuracy: float
    """Share of correct predictions on held-out data."""
    loss: float
    """Mean cross-entropy on held-out data, nats."""
    block_correct: tuple[int, ...]
    """Correct predictions a block of held-out data; the blocks are the same in all arms."""
    block_size: tuple[int, ...]
    """Predictions a block."""
    curve: tuple[tuple[int, float, float], ...]
    """(step, training loss, held-out accuracy or -1 where not evaluated)."""
    finite: bool
    seconds: float
    peak_rss_bytes: int
    data_digest: str
    package_bytes: int = 0
    """Size on disk of the exported ternary package; 0 for other arms."""
    full_precision_bytes: int = 0
    """Size on disk of the same model's fp32 weights."""
    bf16_bytes: int = 0
    """Size on disk of the same model's weights in bf16; 0 where it was not measured."""


@runtime_checkable
class MeasuresQuality(Protocol):
    """Trains its tasks in each arm, so that quantized quality can be set against full precision."""

    def quality_plan(self, profile: str) -> Sequence[tuple[str, Arm, int]]:
        """(task, arm, seed) of every run of the comparison, most expensive first.

        `post_training` rows come with the `full` run of the same seed and are not listed.
        """
        ...

    def quality_run(self, task: str, arm: Arm, seed: int, profile: str) -> Sequence[QualityRun]:
        """Trains and evaluates; the `full` arm also returns its `post_training` row."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpec:
    """How other processes open a state store, and which old ones it must still read."""

    opener: str
    """`module:attribute`, importable in a fresh process: called as `opener(root, **options)` with
    the options of `forge_harness.state.Store.open`, it returns a store with the same methods."""
    old_stores: Path | None = None
    """Directory of stores as earlier releases wrote them; None when there was no earlier one."""


@runtime_checkable
class KeepsState(Protocol):
    """Keeps the states of all phases in a store that other processes can open too."""

    def state_store(self) -> StoreSpec:
        """Returns how the store is opened; crash campaigns kill processes that use it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationInfo:
    """The quantization a configuration states, to be held against the weights."""

    scale_convention: Literal["multiply", "divide"]
    """Whether the stored scale multiplies codes (absmean) or divides them (1 / absmean)."""
    packing: str
    """Name of the byte layout, for example "i2-rowblock"."""
    granularity: Literal["tensor", "part", "row"]
    excluded: tuple[str, ...]
    """Modules left in full precision."""


@runtime_checkable
class ResolvedConfig(Protocol):
    """A loaded configuration."""

    @property
    def digest(self) -> str:
        """`sha256:<hex>` over values only: formatting, order and origin do not move it."""
        ...

    def values(self) -> Mapping[str, Any]:
        """Dotted key -> JSON value, all keys, defaults included."""
        ...

    def origin(self, key: str) -> Literal["flag", "environment", "file", "default"]:
        """Which layer the value of a dotted key came from."""
        ...

    def to_toml(self) -> str:
        """The configuration as a file that loads back to the same values."""
        ...


@runtime_checkable
class Configures(Protocol):
    """Loads its configuration in layers: flag > environment > file > default."""

    def load_config(
        self,
        *,
        file: Path | None = None,
        environ: Mapping[str, str] | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> ResolvedConfig:
        """Raises `forge_harness.errors.ConfigError` (or ValueError) for bad input."""
        ...

    def config_schema(self) -> Mapping[str, Any]:
        """JSON Schema of the configuration file."""
        ...

    def quantization_info(self, task: str) -> QuantizationInfo:
        """The quantization the configuration of a task states."""
        ...


class ContentSealer(Protocol):
    """Encrypts contents with authentication, each bound to a context."""

    @property
    def head_bytes(self) -> int:
        """Bytes at the start of a sealed content that a change of key rewrites."""
        ...

    def seal(self, source: BinaryIO, target: BinaryIO, *, context: bytes = b"") -> None:
        """Reads `source` to its end and writes the sealed form to `target`."""
        ...

    def unseal(self, source: BinaryIO, target: BinaryIO, *, context: bytes = b"") -> None:
        """Writes the plaintext; raises when the sealed form is not what `seal` wrote."""
        ...

    def seal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """The sealed form of a short content."""
        ...

    def unseal_bytes(self, data: bytes, *, context: bytes = b"") -> bytes:
        """The content; raises as `unseal` does."""
        ...

    def segment_starts(self, length: int) -> Sequence[int]:
        """Offsets at which the segments of a sealed form of `length` bytes start."""
        ...

    def is_sealed(self, path: Path) -> bool:
        """Whether a file has the form of a sealed content."""
        ...

    def rewrap_file(self, path: Path) -> bool:
        """Puts a sealed file under the newest key in place; whether anything had to change."""
        ...


@runtime_checkable
class SealsContent(Protocol):
    """Encrypts what is kept, under keys that rotate."""

    def content_sealer(self) -> ContentSealer:
        """The sealer; a rotation reaches it without a new one."""
        ...

    def rotate_seal_key(self) -> None:
        """New contents are sealed under a new key; what is sealed already stays readable."""
        ...

    def destroy_old_seal_keys(self) -> None:
        """Forgets every key but the newest; what is still under them can never be read again."""
        ...


@runtime_checkable
class ReadsCheckpoints(Protocol):
    """Reads checkpoints that come from outside."""

    def read_checkpoint(self, path: Path) -> None:
        """Opens a file or directory and reads every tensor; raises ForgeError to refuse it."""
        ...


class AuditWriter(Protocol):
    """An open audit log."""

    def add(self, actor: str, action: str, resource: str) -> None:
        """Records an action; returns once it is on disk, raises when it cannot be."""
        ...

    def close(self) -> None:
        """Closes the log."""
        ...


@runtime_checkable
class KeepsAuditLog(Protocol):
    """Keeps a log of actions that shows when it was tampered with."""

    def audit_log(self, path: Path) -> AuditWriter:
        """Opens, or makes, the SQLite log at `path`; further files go beside it."""
        ...

    def audit_problems(self, path: Path) -> Sequence[str]:
        """What a verification of the log finds; raises when it cannot be read at all."""
        ...

    def audited(self, path: Path, action: Callable[[], None]) -> None:
        """Does `action` and records it in the log; without a record the action is not done."""
        ...


@runtime_checkable
class SignsPackages(Protocol):
    """Signs export packages, and holds packages against signatures with pinned keys."""

    def sign_package(self, directory: Path) -> Path:
        """Signs every file of a directory; returns the signature, which lies outside of it."""
        ...

    def check_package(self, directory: Path, signature: Path) -> None:
        """Raises unless the directory is exactly what a pinned key signed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedRequest:
    """What an audit log says of one request."""

    request_id: str
    actor: str
    status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """How a server is started on a model, and what it should answer."""

    command: tuple[str, ...]
    """Starts it in the foreground; it listens on a free port and prints one line of JSON with
    `url` on its standard output when it is ready. SIGTERM ends it."""
    requests: Path
    """Requests with the trained model's answers: JSON lines, see `forge_harness.load.traffic`."""
    ca: Path | None = None
    """Certificate authority of its certificate, PEM, where it speaks TLS."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Name of a holder -> bearer token; of holders that must be refused too."""
    access: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Name of a holder -> the `METHOD /path` it may ask for; empty: its token must be refused."""
    routes: tuple[str, ...] = ()
    """Every `METHOD /path` that needs a token, those that end the server last."""
    audited: Callable[[], Sequence[AuditedRequest]] | None = None
    """Reads the requests in the audit log, oldest first."""


@runtime_checkable
class Serves(Protocol):
    """Serves its trained model over HTTP."""

    def server(self, directory: Path, *, secured: bool = False) -> ServerSpec:
        """Prepares a model and a server for it.

        Args:
            directory: Empty; what the server needs goes there.
            secured: Whether it speaks TLS, asks for tokens and keeps an audit log.
        """
        ...


CAPABILITIES: dict[str, type] = {
    protocol.__name__: protocol
    for protocol in (
        Quantizes,
        QuantizesParts,
        Packs,
        BuildsModel,
        LoadsData,
        Trains,
        Checkpoints,
        ExportsWeights,
        HoldsCheckpoint,
        InfersPacked,
        MultipliesTernary,
        TrainsDistributed,
        MeasuresQuality,
        KeepsState,
        Configures,
        ReadsCheckpoints,
        SealsContent,
        KeepsAuditLog,
        SignsPackages,
        Serves,
    )
}
"""Capability name -> protocol, in the order `doctor` prints them."""


def methods_of(capability: str) -> tuple[str, ...]:
    """Returns the method names a capability asks for."""
    protocol = CAPABILITIES[capability]
    return tuple(sorted(name for name in vars(protocol) if not name.startswith("_")))


def capabilities_of(subject: object) -> frozenset[str]:
    """Returns the names of the capabilities a subject offers."""
    return frozenset(
        name
        for name in CAPABILITIES
        if all(callable(getattr(subject, method, None)) for method in methods_of(name))
    )
