"""Safetensors headers: right ones read as the reference reads them, wrong ones refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from runtime.files.tensors import MAX_HEADER, SafeTensors, narrow, read_header, widen

BOUNDED = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header (bytes are taken as they are)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list | None = None, dtype: str = "U8") -> dict:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_arrays_are_the_references(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a.weight": rng.standard_normal((3, 5), np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
        "ids": rng.integers(-9, 9, (2, 2)),
        "scalar": np.array(2.5, np.float32),
        "none": np.empty((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    opened = SafeTensors(tmp_path / "x.safetensors")
    assert set(opened.tensors) == set(arrays)
    for name, array in arrays.items():
        found = opened.array(name)
        assert found.dtype == array.dtype and found.shape == array.shape
        np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(opened.array("half", "float32"), arrays["half"].astype("f4"))
    with pytest.raises(ValueError, match="no tensor 'missing'"):
        opened.array("missing")


def test_no_copy_where_none_is_needed(tmp_path: Path) -> None:
    save_file({"w": np.ones((64, 64), np.float32)}, tmp_path / "x.safetensors")
    opened = SafeTensors(tmp_path / "x.safetensors")
    assert np.shares_memory(opened.array("w", "float32"), opened.raw("w"))
    assert not opened.array("w").flags.writeable


def test_bfloat16_is_torchs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    values = torch.randn(999, generator=torch.Generator().manual_seed(0)) * 10
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, 3.3895e38, 1.00390625])
    values = torch.cat([values, special])
    save_torch({"w": values.to(torch.bfloat16)}, tmp_path / "x.safetensors")
    opened = SafeTensors(tmp_path / "x.safetensors")
    expected = values.to(torch.bfloat16)
    np.testing.assert_array_equal(opened.array("w"), expected.float().numpy())
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(opened.array("w", "float16"), expected.half().numpy())
    bits = expected.view(torch.uint16).numpy()
    np.testing.assert_array_equal(opened.array("w", "bfloat16"), bits)
    np.testing.assert_array_equal(narrow(values.numpy()), bits)
    assert np.isnan(widen(narrow(np.array([np.nan], np.float32)))).all()


def test_it_opens_what_torch_wrote_in_any_order(tmp_path: Path) -> None:
    header = {"second": entry(4, 6), "first": entry(0, 4)}
    opened = SafeTensors(write(tmp_path / "x", header, bytes(range(6))))
    assert opened.array("second").tolist() == [4, 5]


def test_offsets_that_are_not_aligned(tmp_path: Path) -> None:
    header = {"a": entry(0, 1), "b": entry(1, 9, [2], "F32")}
    data = b"\0" + np.array([1.5, -2], "<f4").tobytes()
    opened = SafeTensors(write(tmp_path / "x", header, data))
    assert opened.array("b").tolist() == [1.5, -2]


GOOD = entry(0, 4)
HOSTILE = {
    "hole": ({"a": entry(1, 5)}, 5),
    "overlap": ({"a": GOOD, "b": entry(2, 6)}, 6),
    "alias": ({"a": GOOD, "b": GOOD}, 4),
    "short data": ({"a": GOOD}, 3),
    "trailing data": ({"a": GOOD}, 5),
    "shape": ({"a": entry(0, 4, [5])}, 4),
    "huge shape": ({"a": entry(0, 4, [2**62, 2**62])}, 4),
    "negative": ({"a": entry(0, 4, [-4])}, 4),
    "boolean": ({"a": entry(0, 1, [True])}, 1),
    "float": ({"a": entry(0, 4, [4.0])}, 4),
    "rank": ({"a": entry(0, 4, [1] * 99 + [4])}, 4),
    "backwards": ({"a": entry(4, 0, [4])}, 4),
    "dtype": ({"a": entry(0, 4, dtype="F4")}, 4),
    "dtype type": ({"a": entry(0, 4, dtype=["F32"])}, 4),  # type: ignore[arg-type]
    "no offsets": ({"a": {"dtype": "U8", "shape": [4]}}, 4),
    "more fields": ({"a": {**GOOD, "file": "/etc/passwd"}}, 4),
    "entry": ({"a": 3}, 4),
    "list": ([1, 2], 4),
    "metadata": ({"__metadata__": {"a": 1}, "a": GOOD}, 4),
    "not json": (b"{'a': 1}", 4),
    "not utf-8": (b'{"\xff": 1}', 4),
    "nested": (b"[" * 100_000 + b"]" * 100_000, 0),
    "digits": (b'{"a": ' + b"9" * 10_000 + b"}", 0),
    "twice": (b'{"a":%b,"a":%b}' % ((json.dumps(GOOD).encode(),) * 2), 4),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_does_not_add_up_is_refused(tmp_path: Path, name: str) -> None:
    header, size = HOSTILE[name]
    path = write(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match="x.safetensors is not valid safetensors: .*again") as info:
        read_header(path)
    assert len(str(info.value)) < 500 and "\n" not in str(info.value)


@pytest.mark.parametrize("length", [0, 1, 7, 2**40, 2**63, 2**64 - 1, MAX_HEADER + 1])
def test_a_header_length_that_the_file_does_not_justify(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x", {"a": GOOD}, bytes(4), length=length)
    with pytest.raises(ValueError, match="not valid safetensors"):
        read_header(path)


def test_no_file_and_no_header(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is missing, expected weights"):
        read_header(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"1234567")
    with pytest.raises(ValueError, match="header length is -1 bytes in a file of 7"):
        read_header(tmp_path / "x")


numbers = st.integers(-1, 20) | st.integers(2**31 - 2, 2**64) | st.booleans() | st.floats()
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "BF16", "F32", "I64", "F4", ""]) | st.none(),
        "shape": st.lists(numbers, max_size=4) | st.none(),
        "data_offsets": st.lists(numbers, min_size=1, max_size=3),
    },
    optional={"extra": st.none()},
)
headers = st.dictionaries(st.text(max_size=5), entries | numbers | st.text(max_size=3), max_size=4)


@BOUNDED
@given(header=headers, size=st.integers(0, 64))
def test_any_header_is_read_right_or_refused(tmp_path: Path, header: dict, size: int) -> None:
    """What is accepted covers the data exactly, and every array can be read."""
    path = write(tmp_path / "x", header, bytes(size))
    try:
        opened = SafeTensors(path)
    except ValueError:
        return
    assert sum(opened.array(name).size >= 0 for name in opened.tensors) == len(opened.tensors)
    stored = [tensor.end - tensor.start for tensor in opened.tensors.values()]
    assert sum(stored) == size


@BOUNDED
@given(data=st.data())
def test_any_change_of_bytes_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(5)}, tmp_path / "good")
    content = bytearray((tmp_path / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    (tmp_path / "x").write_bytes(content)
    try:
        opened = SafeTensors(tmp_path / "x")
    except ValueError:
        return
    for name in opened.tensors:
        opened.array(name, "float32")
