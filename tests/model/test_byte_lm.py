"""The byte language model: size, causality, rotary embedding, tied full-precision ends."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from forge_harness.model import MAX_PARAMETERS, ByteLM, ByteLMConfig
from forge_harness.model.byte_lm import _rope_tables, _rotate
from forge_harness.quant import TernaryLinearOp

SMALL = {"width": 32, "heads": 2, "hidden": 48, "context": 24}


def small(seed: int = 0, **options: object) -> ByteLM:
    torch.manual_seed(seed)
    return ByteLM(ByteLMConfig(**{**SMALL, **options}))


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (batch, length), generator=generator)


def test_the_reference_size():
    model = ByteLM()
    assert model.parameter_formula() == 1_770_752 <= MAX_PARAMETERS
    ternary = sum(model.get_submodule(n).weight.numel() for n in model.quantized_names())
    assert ternary == 1_703_936


@pytest.mark.parametrize("options", [{}, {"sub_norm": True}, {"fused_qkv": True}, {"layers": 3}])
def test_the_formula_counts_the_parameters(options):
    model = small(**options)
    assert model.parameter_formula() == sum(p.numel() for p in model.parameters())


def test_the_parts_are_what_is_declared():
    model = small(sub_norm=True)
    block = [f"attention.{p}" for p in "qkvo"] + [f"ffn.{p}" for p in ("gate", "up", "down")]
    expected = [f"blocks.{i}.{name}" for i in range(2) for name in block]
    assert sorted(model.quantized_names()) == sorted(expected)
    assert model.full_precision_names() == ("embedding", "head")
    norms = [f"blocks.{i}.{name}.norm" for i in range(2) for name in ("attention.o", "ffn.down")]
    assert list(model.sub_norm_names()) == norms
    assert small().sub_norm_names() == ()


def test_embedding_and_head_are_one_tensor_also_after_copy_and_load():
    model = small()
    ((first, second),) = model.tied()
    for other in (model, copy.deepcopy(model)):
        state = other.state_dict()
        assert state[first].data_ptr() == state[second].data_ptr()
        assert other.head.weight is other.embedding.weight
    fresh = small(seed=1)
    fresh.load_state_dict(model.state_dict())
    assert fresh.head.weight is fresh.embedding.weight
    assert torch.equal(fresh(tokens()), model(tokens()))
    assert not [key for key in model.state_dict() if "rope" in key]


@pytest.mark.parametrize("options", [{}, {"sub_norm": True}, {"fused_qkv": True}])
def test_a_later_token_never_moves_an_earlier_output(options):
    model = small(**options)
    before = tokens()
    for position in (1, 11, 23):
        after = before.clone()
        after[:, position] = (after[:, position] + 1) % 256
        difference = (model(before) - model(after)).abs().amax((0, 2))
        assert difference[:position].eq(0).all()
        assert difference[position:].gt(0).any()


@pytest.mark.parametrize("options", [{}, {"fused_qkv": True}])
def test_no_sequences_and_no_tokens_have_no_logits(options):
    model = small(**options)
    for size in ((0, 5), (2, 0)):
        y = model(torch.zeros(size, dtype=torch.int64))
        assert y.shape == (*size, 256)
        y.sum().backward()


def test_a_sequence_alone_is_refused():
    with pytest.raises(ValueError, match=r"tokens have shape \(24,\); expected \(B, T\)"):
        small()(tokens()[0])


def test_a_prefix_alone_gives_the_same_logits():
    model = small()
    ids = tokens()
    torch.testing.assert_close(model(ids)[:, :9], model(ids[:, :9]), rtol=1e-4, atol=1e-4)


def test_rotary_scores_depend_on_the_distance_only():
    cos, sin = _rope_tables(ByteLMConfig(**SMALL))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(16, generator=generator).expand(1, 1, 24, 16) for _ in range(2))
    scores = (_rotate(q, (cos, sin)) @ _rotate(k, (cos, sin)).transpose(-1, -2))[0, 0]
    for distance in (0, 1, 5):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert abs(scores[5, 0] - scores[0, 0]) > 1e-3
    torch.testing.assert_close(_rotate(q, (cos, sin)).norm(dim=-1), q.norm(dim=-1))


def test_fused_projections_equal_separate_ones():
    separate, fused = small(), small(fused_qkv=True)
    state = separate.state_dict()
    for i in range(2):
        prefix = f"blocks.{i}.attention."
        state[f"{prefix}qkv.weight"] = torch.cat([state.pop(f"{prefix}{p}.weight") for p in "qkv"])
    fused.load_state_dict(state)
    assert torch.equal(fused(tokens()), separate(tokens()))


def oracle_logits(state: dict[str, torch.Tensor], ids: torch.Tensor, heads: int) -> torch.Tensor:
    """The forward in float64 from the state dict, with complex numbers for the rotations."""
    weights = {name: value.double() for name, value in state.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        gain = weights.get(f"{name}.weight")
        return x if gain is None else gain * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def turned(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[-2]).double()[:, None] * 1e4 ** (-torch.arange(half) / half)
        rotated = torch.complex(x[..., :half], x[..., half:]) * torch.polar(angles * 0 + 1, angles)
        return torch.cat([rotated.real, rotated.imag], dim=-1)

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            (x @ weights[f"{name}.{p}.weight"].T).view(batch, length, heads, -1).transpose(1, 2)
            for p in "qkv"
        )
        scores = turned(q) @ turned(k).mT / (width / heads) ** 0.5
        future = torch.ones(length, length).triu(1).bool()
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        joined = mixed.transpose(1, 2).reshape(batch, length, width)
        return norm(joined, f"{name}.o.norm") @ weights[f"{name}.o.weight"].T

    def feed_forward(x: torch.Tensor, name: str) -> torch.Tensor:
        gate = (x @ weights[f"{name}.gate.weight"].T).clamp(min=0) ** 2
        hidden = gate * (x @ weights[f"{name}.up.weight"].T)
        return norm(hidden, f"{name}.down.norm") @ weights[f"{name}.down.weight"].T

    x = weights["embedding.weight"][ids]
    for i in range(2):
        x = x + attention(norm(x, f"blocks.{i}.attention_norm"), f"blocks.{i}.attention")
        x = x + feed_forward(norm(x, f"blocks.{i}.ffn_norm"), f"blocks.{i}.ffn")
    return norm(x, "norm") @ weights["head.weight"].T


@pytest.mark.parametrize("sub_norm", [False, True])
def test_the_forward_is_that_of_an_independent_one(sub_norm):
    torch.manual_seed(0)
    model = ByteLM(ByteLMConfig(**SMALL, sub_norm=sub_norm), precision="full")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    expected = oracle_logits(model.state_dict(), tokens(), heads=2)
    torch.testing.assert_close(model(tokens()).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_feed_forward_is_gated_by_squared_relu():
    ffn = small().blocks[0].ffn
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    expected = ffn.down(F.relu(ffn.gate(x)) ** 2 * ffn.up(x))
    assert torch.equal(ffn(x), expected)


@pytest.mark.parametrize("compute", ["exact", "int8", "fake"])
def test_every_parameter_gets_a_gradient(compute):
    torch.manual_seed(0)
    model = ByteLM(ByteLMConfig(**SMALL, sub_norm=True), linear=TernaryLinearOp(compute=compute))
    logits = model(tokens())
    assert logits.shape == (2, 24, 256)
    F.cross_entropy(logits.flatten(0, 1), tokens().flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert parameter.grad.isfinite().all(), name


def test_initial_logits_are_near_uniform_and_the_residual_multiplier_acts():
    model = small()
    # Not the inputs as targets: a tied head favours them from the start.
    loss = F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten().flip(0))
    assert 5.0 < loss.item() < 7.0
    attention = model.blocks[0].attention
    ratio = attention.o.weight.detach().std() / attention.q.weight.detach().std()
    assert float(ratio) == pytest.approx(0.5, rel=0.15)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"25 tokens.*context of 24"):
        small()(tokens(length=25))
    with pytest.raises(ValueError, match="width 30 with 4 heads"):
        ByteLMConfig(width=30)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"layers": 0}, ValueError, "layers 0; expected 1 to"),
        ({"heads": 0}, ValueError, "heads 0; expected 1 to"),
        ({"context": 1.5}, TypeError, r"context 1\.5; expected an integer"),
        ({"context": 1 << 40}, ValueError, "context 1099511627776; expected 1 to 1048576"),
        ({"vocabulary": "256"}, TypeError, "vocabulary '256'; expected an integer"),
        ({"rope_theta": 0.0}, ValueError, r"rope_theta 0\.0; expected a positive finite number"),
        ({"rope_theta": math.nan}, ValueError, "rope_theta nan; expected a positive finite"),
    ],
)
def test_sizes_that_no_model_has_are_refused(options, error, said):
    with pytest.raises(error, match=said):
        ByteLMConfig(**options)
