"""Reads safetensors files: real, damaged and hostile ones."""

import json
import re
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.convert.__main__ import convert, main
from spatial_mamba_jax.convert.safetensors_file import read_safetensors

# Every case takes milliseconds, except the one with blocks: 2 s.
SECONDS = 120


def write(path, header, size=0, *, length=None):
  """Writes a file with a header (JSON or bytes) and a hole of `size` bytes."""
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  with path.open("wb") as file:
    file.write(
      (len(header) if length is None else length).to_bytes(8, "little")
    )
    file.write(header)
    file.truncate(8 + len(header) + size)
  return path


def entry(shape=(1,), begin=0, end=4, dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def of_shapes(path, shapes):
  """Writes a file of float32 zeros, {name: shape}."""
  header, at = {}, 0
  for name, shape in shapes.items():
    end = at + 4 * int(np.prod(shape))
    header[name] = entry(shape, at, end)
    at = end
  return write(path, header, at)


def test_files_of_the_package_are_read(tmp_path):
  expected = {
    "x": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.arange(3).astype(np.float16),
    "brain": np.arange(3).astype(ml_dtypes.bfloat16),
    "count": np.array(7, np.int64),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
  }
  for names in (expected, ["empty"], []):
    tensors = {name: expected[name] for name in names}
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    found = read_safetensors(path)
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
      np.testing.assert_array_equal(found[name], x, strict=True)


HUGE = 2**36
# {case: (header, bytes after it, length it claims, message)}.
HEADERS = {
  "nothing": (b"{}", 0, None, "is missing among 0 tensors (none)"),
  "longer than the file": (b"{}", 0, 2**64 - 1, "a huge number bytes"),
  "longer than allowed": (b" " * 9_000_000, 0, None, "9,000,000 bytes"),
  "no JSON": (b"{", 0, None, "is damaged"),
  "no dictionary": (b"[]", 0, None, "is not a dictionary"),
  "deep": (b"[" * 4_000_000, 0, None, "nested too deeply"),
  "deep dictionaries": (b'{"a":' * 10**6, 0, None, "nested too deeply"),
  "many digits": (b'{"x":' + b"9" * 10**6 + b"}", 0, None, "4300 digits"),
  "two of one name": (b'{"x":1,"x":2}', 0, None, "two values for x"),
  "another encoding": (b'{"caf\xe9":1}', 0, None, "can't decode"),
  "no number": (b'{"x":NaN}', 0, None, "NaN is not a number"),
  "no entry": ({"x": 1}, 0, None, "x has no type, shape and offsets"),
  "no shape": ({"x": {"dtype": "F32"}}, 0, None, "x has no type"),
  "negative": ({"x": entry([-1, -1])}, 4, None, "wrong shape: [-1, -1]"),
  "a bool": ({"x": entry([True])}, 4, None, "has a wrong shape"),
  "a float": ({"x": entry([1.0])}, 4, None, "has a wrong shape"),
  "many axes": ({"x": entry([1] * 10**6)}, 4, None, "has a wrong shape"),
  "zero and huge": ({"x": entry([0, HUGE], end=0)}, 0, None, "are allowed"),
  "too few bytes": ({"x": entry([2])}, 4, None, "do not match its shape [2]"),
  "beyond the file": ({"x": entry()}, 0, None, "4 bytes, and the file has 0"),
  "more in the file": ({"x": entry()}, 5, None, "the file has 5"),
  "overlap": ({"x": entry(), "y": entry()}, 4, None, "y begins at byte 0"),
  "a gap": (
    {"x": entry(), "y": entry((1,), 8, 12)}, 12, None, "y begins at byte 8"
  ),
  "a hole of 64 GiB": (
    {"x": entry([HUGE // 4], end=HUGE)}, HUGE, None,
    "has 17,179,869,184 elements; at most 1,073,741,824 are allowed",
  ),
  "float8": (
    {"x": entry(end=1, dtype="F8_E4M3")}, 1, None, "x is of type F8_E4M3"
  ),
  "float4": ({"x": entry([2], 0, 1, "F4")}, 1, None, "x is of type F4"),
  "complex": ({"x": entry(end=8, dtype="C64")}, 8, None, "x is of type C64"),
  "a type for terminals": (
    {"\x1b[2Jx": entry(dtype="\x1b[31m")}, 4, None,
    r"\x1b[2Jx is of type \x1b[31m,",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_end_in_one_line(tmp_path, capsys, name):
  header, size, length, message = HEADERS[name]
  path = write(tmp_path / "x.safetensors", header, size, length=length)
  since = time.perf_counter()
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    convert(path, tmp_path / "out")
  assert time.perf_counter() - since < SECONDS
  assert str(error.value).isprintable()
  assert len(str(error.value)) < 600
  assert main([str(path), str(tmp_path / "out")]) == 2
  assert len(capsys.readouterr().err.splitlines()) == 1
  assert [x.name for x in tmp_path.iterdir()] == ["x.safetensors"]


def skeleton(dim, blocks, width):
  """Returns shapes that define an architecture of `width` channels."""
  shapes = {
    "head.weight": [3, width],
    "patch_embed.conv1.conv.weight": [min(dim // 2, 1000), 3, 3, 3],
  }
  for i in range(blocks):
    block = f"layers.0.blocks.{i}."
    shapes |= {
      f"{block}ln_1.weight": [dim],
      f"{block}self_attention.A_logs": [2 * dim, 1],
      f"{block}self_attention.out_norm.weight": [2 * dim],
      f"{block}self_attention.in_proj.weight": [4 * width, width],
      f"{block}mlp.fc1.weight": [1, width],
    }
  return shapes


@pytest.mark.parametrize(
  ("shapes", "message"),
  [
    (skeleton(4, 1001, 4), "1,001 blocks is too deep: at most 1,000 are"),
    (skeleton(4, 500, 4), "11026 missing"),
    (skeleton(10**6, 1, 1), r"is [1, 1] instead of [..., 1000000]"),
    (skeleton(2000, 1, 2000), "48 missing"),
    (
      {k: x for k, x in skeleton(4, 1, 4).items() if "patch_embed" not in k},
      "safetensors: not the weights of a Spatial-Mamba:"
      " patch_embed.conv1.conv.weight is missing among 6 tensors",
    ),
    ({"x" * 5_000_000: [1]}, "is missing among 1 tensors (xxx"),
    ({f"{i}.layers.0.blocks.0.self_attention.x": [1] for i in range(20_000)},
     "20,000 models"),
  ],
)  # fmt: skip
def test_models_larger_than_their_file_are_refused(tmp_path, shapes, message):
  path = of_shapes(tmp_path / "x.safetensors", shapes)
  since = time.perf_counter()
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    convert(path, tmp_path / "out")
  assert time.perf_counter() - since < SECONDS
  assert len(str(error.value)) < 600


def test_names_of_a_file_are_escaped(small, tmp_path, capsys):
  evil = "\x1b]0;title\x07\u202e\n" * 1000
  tensors = smj.convert.to_torch(small)
  path = tmp_path / "x.safetensors"
  x = np.zeros(1, np.float32)
  for names in (
    {evil: x},
    tensors | {evil: x},
    {f"{evil}{i}": x for i in "ab"},
  ):
    safetensors.numpy.save_file(names, path)
    with pytest.raises(ValueError, match=r"x1b\]0;title.x07 ?.u202e") as error:
      convert(path, tmp_path / "out")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000
  body = {f"backbone.{name}": x for name, x in tensors.items()}
  safetensors.numpy.save_file(body | {evil: x}, path)
  assert main([str(path), str(tmp_path / "out")]) == 0
  said = capsys.readouterr().out
  assert said.removesuffix("\n").isprintable()
  assert "left out 1 tensors" in said


def test_weights_are_copied_from_the_file(small, tmp_path):
  tensors = smj.convert.to_torch(small)
  expected = {name: x.copy() for name, x in tensors.items()}
  model = smj.SpatialMamba(small.config, rngs=nnx.Rngs(1))
  smj.convert.from_torch(model, tensors)
  for x in tensors.values():
    x[...] = 0
  for name, x in smj.convert.to_torch(model).items():
    np.testing.assert_array_equal(x, expected[name])
  with pytest.raises(ValueError, match=r"misshapen \(norm.bias is complex64\)"):
    smj.convert.from_torch(
      model, expected | {"norm.bias": np.zeros(4, np.complex64)}
    )
