from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forge_harness.errors import StateError
from forge_harness.integration.state_values import decode, encode


def round_trip(data: object) -> object:
    value = encode(data)
    content = {
        name: held.read_bytes() if isinstance(held, Path) else held
        for name, held in value.files.items()
    }
    return decode(value.encoding, tuple(content), content.__getitem__)


keys = st.one_of(st.text(max_size=5), st.integers(), st.sampled_from(["$tensor", "$pairs"]))
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=9)
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(keys, inner, max_size=4),
    ),
    max_leaves=20,
)


@given(trees)
def test_trees_come_back_as_they_were(tree: object) -> None:
    # The integers are Python's own; text is kept as text, not as a tree.
    assert round_trip({"tree": tree}) == {"tree": tree}


@pytest.mark.parametrize("data", [b"", b"\0\xff", "", "ternär", {}, [], None, 0, False])
def test_plain_values_come_back(data: object) -> None:
    returned = round_trip(data)
    assert returned == data
    assert type(returned) is type(data)


def test_an_optimizer_comes_back_bit_for_bit() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.9, 0.95))
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    returned = round_trip(state)
    assert isinstance(returned, dict)
    assert returned["param_groups"] == state["param_groups"]
    for index, values in state["state"].items():
        for name, value in values.items():
            assert torch.equal(returned["state"][index][name], value)
            assert returned["state"][index][name].dtype == value.dtype
    torch.optim.AdamW(layer.parameters()).load_state_dict(returned)


def test_tied_and_strided_tensors_and_arrays_come_back() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    data = {
        "a": weight,
        "b": weight,
        "t": weight.t(),
        "n": np.arange(6).reshape(2, 3).T,
        "s": np.float32(2),
    }
    returned = round_trip(data)
    assert isinstance(returned, dict)
    for name in ("a", "b", "t"):
        assert torch.equal(returned[name], data[name])
    assert np.array_equal(returned["n"], data["n"])
    assert returned["s"] == 2
    assert returned["s"].dtype == np.float32


def test_floats_json_has_no_word_for_come_back() -> None:
    returned = round_trip([math.inf, -math.inf, math.nan])
    assert isinstance(returned, list)
    assert returned[:2] == [math.inf, -math.inf]
    assert math.isnan(returned[2])


def test_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "a.bin").write_bytes(b"a")
    (tmp_path / "d" / "sub" / "b.bin").write_bytes(b"b")
    assert round_trip(tmp_path / "d" / "a.bin") == b"a"
    assert round_trip(tmp_path / "d") == {"a.bin": b"a", "sub/b.bin": b"b"}


def test_what_cannot_be_held_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"at data\['a'\]\[1\] is a object"):
        encode({"a": [0, object()]})
    with pytest.raises(StateError, match="There is no file or directory"):
        encode(tmp_path / "missing")
    with pytest.raises(StateError, match="holds no file"):
        encode(tmp_path)
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StateError, match="empty' is an empty directory"):
        encode(tmp_path)
    (tmp_path / "empty").rmdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StateError, match="fifo' is no plain file"):
        encode(tmp_path)
    (tmp_path / "fifo").unlink()
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(StateError, match="symbolic link"):
        encode(tmp_path)
    nested: list[object] = []
    for _ in range(100):
        nested = [nested]
    with pytest.raises(StateError, match="64 levels"):
        encode(nested)
    with pytest.raises(StateError, match="does not know"):
        decode("zstd", ("data",), lambda _: b"")
