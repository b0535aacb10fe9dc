"""Evaluation in groups of records whose examples have equal shapes."""

import dataclasses
import math

import numpy as np
import pytest

from spatial_mamba_jax.data import DataConfig, evaluation_batches
from spatial_mamba_jax.data.examples import Group, GroupedExamples
from spatial_mamba_jax.data.reading import EvaluationSlots

# The widths of the records: groups of 7, 1 and 5.
WIDTHS = (3, 5, 3, 3, 8, 3, 5, 5, 3, 3, 5, 3, 5)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows of different widths, filled with their index."""

  broken: tuple[int, ...] = ()

  def __len__(self):
    return len(WIDTHS)

  def __getitem__(self, index):
    if index in self.broken:
      raise OSError("torn")
    return {"row": np.full(WIDTHS[index], index)}

  def name(self, index):
    return f"row {index}"


@dataclasses.dataclass(frozen=True)
class RowExamples:
  width: int = 1

  def read(self, record):
    return record

  def train(self, decoded, rng):
    raise NotImplementedError

  def evaluate(self, decoded):
    return decoded

  def blank(self, *, train):
    return {"row": np.full(self.width, -1)}

  def groups(self, source):
    return [
      Group(RowExamples(width), np.flatnonzero(np.array(WIDTHS) == width))
      for width in (5, 3, 8)
    ]


def read(batch_size, rows=None, source=Rows(), **settings):
  config = DataConfig(max_unreadable_share=0.5, **settings)
  with evaluation_batches(
    source, config, batch_size=batch_size, rows=rows, examples=RowExamples()
  ) as batches:
    return list(batches)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 20])
def test_every_record_once_in_batches_of_one_group(batch_size):
  batches = read(batch_size)
  assert len(batches) == sum(math.ceil(x / batch_size) for x in (5, 7, 1))
  widths = [batch["row"].shape[1] for batch in batches]
  assert widths == sorted(widths, key=(5, 3, 8).index)
  seen, padding = [], []
  for batch in batches:
    assert batch.keys() == {"row", "index", "mask"}
    assert len(batch["row"]) == batch_size
    for row, index, mask in zip(
      batch["row"], batch["index"], batch["mask"], strict=True
    ):
      assert (row == (index if mask else -1)).all()
      (seen if mask else padding).append(int(index))
  assert sorted(seen) == list(range(13))
  # Padding is told from records by its index, and has each index once.
  assert padding == list(range(13, batch_size * len(batches)))


def test_processes_read_rows_of_the_same_batches():
  expected = read(4)
  for rows, num_workers in (([0, 3], 0), ([1], 0), ([2], 0), ([0, 3], 2)):
    part = read(4, rows, num_workers=num_workers)
    assert len(part) == len(expected)
    for one, whole in zip(part, expected, strict=True):
      for name, array in one.items():
        np.testing.assert_array_equal(array, whole[name][rows])


def test_an_unreadable_record_has_the_blank_of_its_group():
  (first, *_, last) = read(3, source=Rows(broken=(1, 4)))
  assert first["index"].tolist() == [1, 6, 7]
  assert first["mask"].tolist() == [False, True, True]
  assert first["row"].shape == (3, 5)
  assert (first["row"][0] == -1).all()
  assert last["index"].tolist() == [4, 16, 17]
  assert not last["mask"].any()
  assert last["row"].shape == (3, 8)


def test_groups_must_have_all_records():
  group = Group(RowExamples(), np.arange(4))
  with pytest.raises(ValueError, match="4 of 5 records have a group"):
    EvaluationSlots([group], num_records=5, batch_size=2)


def test_an_empty_group_has_no_batch():
  groups = [Group(RowExamples(), np.arange(n, m)) for n, m in ((0, 0), (0, 3))]
  slots = EvaluationSlots(groups, num_records=3, batch_size=2)
  assert slots.num_batches == 2
  assert [slots[i] for i in range(5)] == [(1, x) for x in range(5)]


def test_is_an_interface():
  assert isinstance(RowExamples(), GroupedExamples)
