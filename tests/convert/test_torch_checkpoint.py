"""Reads PyTorch checkpoints: real, damaged and hostile ones."""

import copy
import pathlib
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from spatial_mamba_jax.convert import read_torch_checkpoint

# Written by torch.save of PyTorch 2.13: many types, views and containers.
TENSORS = pathlib.Path(__file__).parents[1] / "golden" / "torch_tensors.pth"
PROTO = b"\x80\x02"
SECONDS = 20  # At most; the slowest case takes 3, beside other work 6.


def text(value):
  """Encodes a string as an opcode."""
  data = value.encode()
  return b"X" + len(data).to_bytes(4, "little") + data


def number(value):
  return pickle.dumps(value, 2)[2:-1]


def tensor(*, storage=4, offset=0, size=(4,), stride=(1,), kind="FloatStorage"):
  """The opcodes of {"model": {"x": tensor}}, its storage being record 0."""
  identifier = (
    b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text("0")
    + text("cpu") + number(storage) + b"tQ"
  )  # fmt: skip
  rest = number(offset) + number(size) + number(stride) + b"\x89N"
  return b"".join(
    (
      PROTO,
      b"}" + text("model") + b"}" + text("x"),
      b"ctorch._utils\n_rebuild_tensor_v2\n(" + identifier + rest + b"tR",
      b"ss.",
    )
  )


@pytest.fixture
def read(write_archive, tmp_path):
  """Reads a pickle, with 16 bytes for a storage beside it."""

  def read(data, key="model"):
    write_archive(tmp_path / "x.pth", data, [np.arange(4.0, dtype="f4")])
    return read_torch_checkpoint(tmp_path / "x.pth", key)

  return read


@pytest.mark.parametrize(
  ("key", "weights_seed"), [("model", 0), ("model_ema", 1)]
)
def test_a_checkpoint_of_the_authors_trainer(
  micro_checkpoint, named_weights, key, weights_seed
):
  before = set(sys.modules)
  tensors = read_torch_checkpoint(micro_checkpoint, key)
  expected = named_weights.named_state_dict("micro", weights_seed)
  assert list(tensors) == list(expected)
  for name, x in tensors.items():
    assert x.dtype == expected[name].dtype, name
    np.testing.assert_array_equal(x, expected[name], strict=True)
  assert not {"yacs", "torch"} & (set(sys.modules) - before)


def test_every_type_of_tensor():
  tensors = read_torch_checkpoint(TENSORS, "kinds")
  for name, x in tensors.items():
    dtype = {"bfloat16": ml_dtypes.bfloat16, "bool": bool}.get(name, name)
    values = np.arange(4) - (not name.startswith(("u", "b")) or name[1] == "f")
    np.testing.assert_array_equal(x, values.astype(dtype), strict=True)
  assert len(tensors) == 13


def test_views_and_shared_storages():
  views = read_torch_checkpoint(TENSORS, "views")
  a = np.arange(24, dtype=np.float32)
  grid = a.reshape(4, 6)
  expected = {
    "grid": grid,
    "transposed": grid.T,
    "column": grid[:, 2],
    "window": grid[1:3, 2:5],
    "every_other": a[1::2],
    "expanded": np.full((2, 3), 7, np.float32),
    "scalar": np.asarray(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "channels_last": a.reshape(1, 2, 3, 4),
  }
  assert views.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(views[name], x, strict=True)
  assert np.shares_memory(views["grid"], views["window"])
  assert not views["grid"].flags.writeable


def test_modules_parameters_and_numbers():
  module = read_torch_checkpoint(TENSORS, "module")
  weight = np.arange(6, dtype=np.float32).reshape(3, 2)
  assert list(module) == ["weight", "bias"]
  np.testing.assert_array_equal(module["weight"], weight, strict=True)
  parameters = read_torch_checkpoint(TENSORS, "parameters")
  np.testing.assert_array_equal(parameters["w"], weight, strict=True)
  np.testing.assert_array_equal(parameters["tagged"], [0, 1])
  numbers = read_torch_checkpoint(TENSORS, "numbers")
  assert {k: (x.item(), x.shape) for k, x in numbers.items()} == {
    "a": (3, ()),
    "b": (0.5, ()),
    "c": (True, ()),
    "d": (-(2**40), ()),
  }


def test_a_file_of_tensors_alone(write_checkpoint, tmp_path):
  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  path = write_checkpoint(tmp_path / "x.pth", {"x": x, "steps": 3})
  tensors = read_torch_checkpoint(path)
  np.testing.assert_array_equal(tensors["x"], x, strict=True)
  assert tensors["steps"] == 3


@pytest.mark.parametrize(
  ("key", "message"),
  [
    (
      "modle",
      r"no dictionary 'modle'; its keys are 'kinds', 'views', 'module'",
    ),
    ("epoch", r"no dictionary 'epoch'; its keys are"),
    ("counts", r"no dictionary 'counts'; its keys are"),
    ("other", r"'device' is 'torch.device', not a plain tensor"),
    ("negated", r"'x' is 'a conjugated or negated view', not a plain tensor"),
  ],
)
def test_a_missing_key_or_another_type_is_named(key, message):
  with pytest.raises(ValueError, match=f"torch_tensors.pth: .*{message}"):
    read_torch_checkpoint(TENSORS, key)


def test_the_pickle_calls_nothing(read, tmp_path):
  made = tmp_path / "made"
  command = text(f"touch {made}")
  calls = {
    "REDUCE": b"cos\nsystem\n" + command + b"\x85R",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93" + command + b"\x85R",
    "NEWOBJ": b"csubprocess\nPopen\n" + command + b"\x85\x81",
    "NEWOBJ_EX": b"csubprocess\nPopen\n" + command + b"\x85}\x92",
    "BUILD": b"cos\nsystem\n)R}" + text("__setstate__") + b"cos\nsystem\nsb",
    "inside": (
      b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN"
      + command + b"\x85NtR"
    ),
  }  # fmt: skip
  for name, call in calls.items():
    data = PROTO + b"}" + text("model") + b"}" + text("x") + call + b"ss."
    with pytest.raises(ValueError, match=r"'x' is '.*', not a plain tensor"):
      read(data)
    assert not made.exists(), name
  for opcode, call in {
    "INST": b"(" + command + b"ios\nsystem\n",
    "OBJ": b"(cos\nsystem\n" + command + b"o",
    "EXT1": b"\x82\x01",
    "PERSID": b"Pstorage\n",
  }.items():
    with pytest.raises(ValueError, match=f"a pickle with {opcode}, which"):
      read(PROTO + call + b".")
    assert not made.exists()


def test_a_tensor_is_read(read):
  # The next test varies this one.
  np.testing.assert_array_equal(read(tensor())["x"], [0, 1, 2, 3])
  odd = tensor(offset=1, size=(1, 3), stride=(2**62, 1))
  np.testing.assert_array_equal(read(odd)["x"], [[1, 2, 3]])


@pytest.mark.parametrize(
  ("message", "changes"),
  [
    ("reaches beyond its storage", {"offset": 1}),
    ("reaches beyond its storage", {"offset": 2**62}),
    ("reaches beyond its storage", {"size": (5,)}),
    ("reaches beyond its storage", {"stride": (2,)}),
    (
      "reaches beyond its storage",
      {"size": (2**62, 2**62), "stride": (0, 2**62)},
    ),
    ("malformed size, stride or offset", {"offset": -1}),
    ("malformed size, stride or offset", {"offset": 0.5}),
    ("malformed size, stride or offset", {"size": (-4,)}),
    ("malformed size, stride or offset", {"size": (2**70,)}),
    ("malformed size, stride or offset", {"size": ((4,),)}),
    ("malformed size, stride or offset", {"stride": (-1,)}),
    ("malformed size or stride", {"size": (2, 2), "stride": (1,)}),
    ("malformed size or stride", {"size": [4]}),
    ("malformed size or stride", {"size": (1,) * 65, "stride": (1,) * 65}),
    ("is damaged", {"size": (2**61,), "stride": (0,)}),
    ("is damaged", {"size": (0, 2**62), "stride": (1, 1)}),
    ("16 bytes, which do not match 5 elements", {"storage": 5}),
    ("16 bytes, which do not match -4 elements", {"storage": -4}),
    ("16 bytes, which do not match a huge number elements", {"storage": 2**70}),
    ("16 bytes, which do not match 4 elements", {"kind": "DoubleStorage"}),
    ("'torch.ComplexFloatStorage'", {"kind": "ComplexFloatStorage"}),
    (
      "'x' is of type 'torch.ComplexFloatStorage'",
      {"kind": "ComplexFloatStorage"},
    ),
    ("'x' is of type 'torch.float8_e5m2'", {"kind": "float8_e5m2"}),
    ("'torch.load', which is not supported", {"kind": "load"}),
  ],
)
def test_invalid_tensors_are_named(read, message, changes):
  with pytest.raises(ValueError, match=rf"x\.pth.*{message}"):
    read(tensor(**changes))


HOSTILE = {
  "nothing": b"",
  "no end": PROTO + b"}",
  "only an end": b".",
  "pops too much": PROTO + b"a.",
  "no mark": PROTO + b"}u.",
  "odd items": PROTO + b"}(NNNu.",
  "sets items of None": PROTO + b"NNNs.",
  "appends to None": PROTO + b"NNa.",
  "lacks a memo": PROTO + b"h\x07.",
  "unhashable key": PROTO + b"}]Ns.",
  "cycle": PROTO + b"]q\0h\0a.",
  "cyclic dictionary": PROTO + b"}q\0" + text("model") + b"h\0s.",
  "cyclic tuple": PROTO + b"]q\0h\0\x85a.",
  "wrong persistent id": PROTO + b"(" + text("storage") + b"NNNNtQ.",
  "persistent id of no tuple": PROTO + b"NQ.",
  "class of a wrong name": PROTO + b"NN\x93.",
  "huge string": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
  "huge bytes": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
  "huge bytearray": b"\x80\x05\x96" + b"\xff" * 6 + b"\0\0.",
  "huge number": PROTO + b"\x8b\xff\xff\xff\x7f.",
  "negative number": PROTO + b"\x8b\xff\xff\xff\xff.",
  "huge memo": PROTO + b"Nr\xff\xff\xff\x7f.",
  "number of many digits": PROTO + b"L" + b"9" * 100_000 + b"L\n.",
  "deep list": PROTO + b"]" * 200_000 + b"a" * 199_999 + b".",
  "deep key": PROTO + b"})" + b"\x85" * 400_000 + b"Ns.",
  "deep dictionary": PROTO + b"}K\0" * 150_000 + b"N" + b"s" * 150_000 + b".",
  "deep marks": PROTO + b"(" * 300_000 + b".",
  "many dictionaries": PROTO + b"}" * 1_100_000 + b".",
  "many lists of lists": (
    PROTO + b"]q\0" + b"(h\0h\0h\0h\0h\0h\0h\0h\0lq\0" * 40_000 + b"."
  ),
  "laughs": (
    PROTO + b")" + b"q\0h\0\x86" * 300 + b"q\1"
    + b"ctorch._utils\n_rebuild_tensor_v2\n(NK\0h\1h\1\x89NtR."
  ),
  "long arguments": (
    PROTO + b"(" + b"N" * 300_000 + b"tq\0"
    + b"ctorch._utils\n_rebuild_parameter\nh\0R" * 100_000 + b"."
  ),
  "long persistent ids": (
    PROTO + b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0")
    + b"NK\1" + b"N" * 300_000 + b"tq\0" + b"h\0Q" * 100_000 + b"."
  ),
  "long sizes": (
    PROTO + b"(" + b"K\1" * 100_000 + b"tq\0"
    + b"ctorch._utils\n_rebuild_tensor_v2\n(NK\0h\0h\0\x89NtR." * 20_000 + b"."
  ),
  "long names": (
    PROTO + text("x" * 1_000_000) + b"q\0"
    + b"h\0h\0\x93" * 100_000 + b"."
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_in_an_error_soon(read, name):
  since = time.perf_counter()
  with pytest.raises(ValueError, match=r"x\.pth") as error:
    read(HOSTILE[name])
  assert time.perf_counter() - since < SECONDS
  assert "\n" not in str(error.value)
  assert len(str(error.value)) < 600


def test_memory_is_bounded_by_the_file(read):
  tracemalloc.start()
  try:
    for name in ("huge memo", "huge bytearray", "long names", "laughs"):
      with pytest.raises(ValueError, match=r"x\.pth"):
        read(HOSTILE[name])
    assert tracemalloc.get_traced_memory()[1] < 100e6
  finally:
    tracemalloc.stop()


def archive(path, names=(), compression=zipfile.ZIP_STORED):
  data = PROTO + b"}" + text("model") + b"}s."
  with zipfile.ZipFile(path, "w", compression) as file:
    file.writestr("x/data.pkl", data)
    for name, content in names:
      file.writestr(name, content)
  return path


@pytest.mark.parametrize(
  ("names", "message"),
  [
    ([("x/byteorder", "big")], "byte order b'big'"),
    ([("y/data.pkl", "")], "2 records data.pkl"),
    ([("x/constants.pkl", "")], "TorchScript"),
  ],
)
def test_other_archives(tmp_path, names, message):
  assert read_torch_checkpoint(archive(tmp_path / "x.pth")) == {}
  with pytest.raises(ValueError, match=message):
    read_torch_checkpoint(archive(tmp_path / "x.pth", names))


def test_errors_are_short(write_archive, tmp_path):
  path = tmp_path / "x.pth"
  write_archive(path, PROTO + text("an unlikely word") + b".", (), "y" * 60_000)
  data = path.read_bytes().replace(b"an unlikely word", b"an unlikely name")
  path.write_bytes(data.replace(b"ydata.pkl", b"/data.pkl"))
  with pytest.raises(ValueError, match="Bad CRC-32") as error:
    read_torch_checkpoint(path)
  assert len(str(error.value)) < 600


def test_a_zip_bomb_is_refused(tmp_path):
  bomb = [("x/data/0", bytes(10_000_000))]
  path = archive(tmp_path / "x.pth", bomb, zipfile.ZIP_DEFLATED)
  with pytest.raises(ValueError, match="is compressed"):
    read_torch_checkpoint(path)


def test_holes_are_not_read(tmp_path):
  """A record, a pickle and a directory of 64 GiB that take no disk."""
  path, hole = tmp_path / "x.pth", 2**36
  for name in ("x/data/0", "x/data.pkl"):
    with zipfile.ZipFile(path, "w") as file:
      if name == "x/data/0":
        file.writestr("x/data.pkl", tensor(storage=hole // 4))
      file.writestr(name, b"")
      info = file.filelist[-1]
      info.file_size = info.compress_size = hole
      file.start_dir = file.fp.tell() + hole
      file._didModify = True
    assert path.stat().st_size > hole
    with pytest.raises(ValueError, match="has larger records than are"):
      read_torch_checkpoint(path)
  end = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, hole, 0)
  end += struct.pack("<4sLQL", b"PK\6\7", 0, hole, 1)
  end += struct.pack(
    "<4s4H2LH", b"PK\5\6", *[2**16 - 1] * 4, *[2**32 - 1] * 2, 0
  )
  with path.open("wb") as file:
    file.truncate(hole)
    file.seek(hole)
    file.write(end)
  with pytest.raises(ValueError, match="asks for 68,719,476,736 bytes at once"):
    read_torch_checkpoint(path)


def test_records_that_overlap(tmp_path):
  path = archive(tmp_path / "x.pth", [("x/data/0", bytes(5_000))])
  with zipfile.ZipFile(path, "a") as file:
    for i in range(1, 4):
      info = copy.copy(file.getinfo("x/data/0"))
      info.filename = f"x/data/{i}"
      file.filelist.append(info)
    file._didModify = True
  with pytest.raises(ValueError, match="records that overlap"):
    read_torch_checkpoint(path)


def test_two_records_of_one_name(tmp_path):
  with pytest.warns(UserWarning, match="Duplicate name"):
    path = archive(tmp_path / "x.pth", [("x/data/0", "a"), ("x/data/0", "b")])
  with pytest.raises(ValueError, match="two records of one name"):
    read_torch_checkpoint(path)


def test_other_formats(tmp_path):
  legacy = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
  for content, message in (
    (legacy, "PyTorch before 1.6.*torch.load.*torch.save"),
    (b"", "is not a zip archive"),
    (pickle.dumps({"model": {}}), "is not a zip archive"),
  ):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.pth: .*{message}"):
      read_torch_checkpoint(tmp_path / "x.pth")
  with pytest.raises(FileNotFoundError):
    read_torch_checkpoint(tmp_path / "none.pth")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
  """Reads changed bytes; returns the tensors, or an error with the file."""
  path = tmp_path_factory.mktemp("fuzz") / "damaged.pth"
  expected = read_torch_checkpoint(TENSORS, "views")

  def read(data, *, may_differ=False):
    path.write_bytes(data)
    message = ""
    try:
      tensors = read_torch_checkpoint(path, "views")
    except ValueError as error:
      message = str(error)
      tensors = {}
    if message:
      assert "damaged.pth" in message
      assert "\n" not in message
    else:
      assert may_differ or tensors.keys() == expected.keys()
    for name, x in tensors.items():
      x.copy()  # Reads only its own memory.
      assert may_differ or np.array_equal(x, expected[name]), name

  return read


@seed(0)
@settings(max_examples=150, deadline=None, database=None)
@given(share=st.floats(0, 1))
def test_truncated_files(damaged, share):
  data = TENSORS.read_bytes()
  damaged(data[: int(share * (len(data) - 1))])


@seed(0)
@settings(max_examples=400, deadline=None, database=None)
@given(bits=st.lists(st.integers(0, 8 * 8716 - 1), min_size=1, max_size=4))
def test_flipped_bits(damaged, bits):
  data = bytearray(TENSORS.read_bytes())
  for bit in bits:
    data[bit // 8] ^= 1 << bit % 8
  damaged(bytes(data))


@seed(0)
@settings(max_examples=400, deadline=None, database=None)
@given(
  changes=st.lists(
    st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4
  )
)
def test_changed_pickles_with_right_checksums(
  damaged, tmp_path_factory, changes
):
  path = tmp_path_factory.getbasetemp() / "changed.pth"
  with zipfile.ZipFile(TENSORS) as old, zipfile.ZipFile(path, "w") as new:
    for name in old.namelist():
      data = bytearray(old.read(name))
      if name.endswith("data.pkl"):
        for place, byte in changes:
          data[int(place * len(data))] = byte
      new.writestr(name, bytes(data))
  damaged(path.read_bytes(), may_differ=True)
