"""The interface between the training loop and a task.

A config file imports a task's `TaskConfig`. The loop and the evaluation call
the `Task` that it creates, and import no task themselves.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from flax import nnx
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.data.config import DataConfig
from spatial_mamba_jax.data.examples import Examples
from spatial_mamba_jax.data.sources import Source
from spatial_mamba_jax.fields import Section
from spatial_mamba_jax.models.config import ModelConfig
from spatial_mamba_jax.models.pure import Arrays

# {name: array} of a batch.
Batch = Mapping[str, Array]


class Loss(NamedTuple):
  """The loss of one part of a batch.

  Attributes:
    value: the mean over the part; it is differentiated.
    sums: {name: sum over the part}, for each name in `Task.sums`.
  """

  value: Float[Array, ""]
  sums: dict[str, Float[Array, ""]]


def _python_scalar(value: Any) -> float | int:
  return value.item() if isinstance(value, np.generic | np.ndarray) else value


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The result of evaluating a model's weights.

  Attributes:
    score: a float that selects the best checkpoint; higher is better.
    values: {name: value}, for the log and for JSON.
    line: the values as one line of text.
  """

  score: Any
  values: dict[str, Any]
  line: str

  def __post_init__(self):
    """Converts NumPy scalars to Python's, which JSON accepts."""
    if taken := self.values.keys() & {"kind", "score", "step"}:
      raise ValueError(f"values must not be called {', '.join(taken)}")
    values = {name: _python_scalar(x) for name, x in self.values.items()}
    object.__setattr__(self, "values", values)
    object.__setattr__(self, "score", float(self.score))

  def __str__(self) -> str:
    return self.line

  def to_json(self) -> dict[str, float | int | None]:
    """Returns the values, with None for NaN and infinity, which JSON lacks."""
    return {
      name: value if np.isfinite(value) else None
      for name, value in self.values.items()
    }


@runtime_checkable
class Meter(Protocol):
  """Accumulates the predictions of an evaluation, on the host."""

  def add(self, columns: dict[str, np.ndarray]) -> None:
    """Adds the predictions for one batch.

    Args:
      columns: the result of `Task.predict`, {name: [B, ...]}, and "index" [B],
        the examples' indices in the source. Padding and unreadable examples are
        already removed.
    """
    ...

  def result(self, unreadable: int) -> Evaluation:
    """Returns the evaluation; `unreadable` counts the unreadable examples."""
    ...

  def write(self, directory: pathlib.Path) -> None:
    """Writes the predictions into an existing directory."""
    ...


@runtime_checkable
class PictureMeter(Meter, Protocol):
  """A meter that can draw a few of its predictions.

  Training keeps the newest picture, and the report shows it.
  """

  def picture(self, title: str) -> bytes:
    """Draws the predictions for a few records of the source.

    Which records depends on the source alone, so that the pictures of two
    evaluations can be compared.

    Args:
      title: states the weights; it is drawn, too.

    Returns:
      A PNG file of at most a few MB, whose metadata have `title` as "Title".
    """
    ...


class Line(NamedTuple):
  """A line of a panel: one logged value over time.

  Attributes:
    kind: kind of the log's records: "train", "evaluation" or "evaluation_raw".
    value: name of the value in these records.
    name: the line's legend; empty for a panel's only line.
  """

  kind: str
  value: str
  name: str


class Panel(NamedTuple):
  """A panel of the figure in a report.

  Attributes:
    title: the title.
    unit: unit of the vertical axis; empty for values without a unit.
    lines: the lines. Each kind has a colour; lines of one kind differ by their
      dashes, of which there are four.
    scale: factor from the logged values to the unit.
  """

  title: str
  unit: str
  lines: Sequence[Line]
  scale: float = 1.0


class Column(NamedTuple):
  """A column of the table of evaluations in a report.

  Attributes:
    value: name of a value in `Evaluation.values`.
    name: the column's heading.
    form: format specification of the value, e.g. ".2%".
  """

  value: str
  name: str
  form: str


@runtime_checkable
class Task(Protocol):
  """A training task. It holds no state.

  Attributes:
    sums: names of the sums in `Loss.sums`.
    score: name of the value in `Evaluation.values` that is the score.
    panels: a report's panels, beside those of loss, learning rate and speed.
    columns: columns of a report's table of evaluations.
  """

  sums: tuple[str, ...]
  score: str
  panels: tuple[Panel, ...]
  columns: tuple[Column, ...]

  def network(self, *, rngs: nnx.Rngs) -> nnx.Module:
    """Creates the network, with fresh weights from the stream `params`."""
    ...

  def source(self, split: str) -> Source:
    """Opens the "train" or "validation" records.

    Raises:
      UserError: the records are missing, or do not fit the task.
    """
    ...

  def examples(self) -> Examples:
    """Returns the functions that turn records into examples."""
    ...

  def prepare(self, batch: Batch, key: Array) -> Arrays:
    """Augments a training batch and computes its targets, on the device.

    Args:
      batch: a batch of results of `Examples.train`.
      key: random key of the augmentation.
    """
    ...

  def loss(
    self, network: Any, batch: Arrays, key: Array, teacher: Arrays | None
  ) -> Loss:
    """Computes the loss of a prepared batch.

    Args:
      network: the network in training mode.
      batch: the result of `prepare`.
      key: random key of the network, for drop path and the like.
      teacher: the result of `teach`; None without self-distillation. It is all
        zeros before self-distillation begins, and must then add 0 to the loss.
    """
    ...

  def teach(self, network: Any, batch: Arrays) -> Arrays:
    """Computes the teacher's predictions for a prepared batch (MESA).

    Args:
      network: the moving average of the network, in eval mode.
      batch: the result of `prepare`.
    """
    ...

  def predict(self, network: Any, batch: Batch) -> dict[str, Array]:
    """Computes predictions for an evaluation.

    Args:
      network: the network in eval mode.
      batch: a batch of results of `Examples.evaluate`.

    Returns:
      {name: [B, ...]}.
    """
    ...

  def meter(self, source: Source) -> Meter:
    """Returns an empty meter for the predictions of a source."""
    ...

  def logged(self, sums: Mapping[str, float]) -> dict[str, float]:
    """Returns further values to log for a window of steps, beside the loss.

    Args:
      sums: {name: sum over the window}, for `self.sums`, "images" and "steps".
    """
    ...


@dataclasses.dataclass
class TaskConfig(Section, abc.ABC):
  """The config of a task.

  Attributes:
    kind: identifies the task in saved experiments.
    is_cropped: whether evaluation crops images as `data.image_size` and
      `data.test_crop_ratio` say.
  """

  kind: ClassVar[str]
  is_cropped: ClassVar[bool] = True

  def check_batch(self, size: int, path: str) -> None:
    """Checks that training batches may have this number of images.

    Args:
      size: images that are trained on at once, on all devices.
      path: of this section, for the message.

    Raises:
      UserError: they may not.
    """

  @abc.abstractmethod
  def create(
    self, model: ModelConfig, data: DataConfig, *, mesa_weight: float
  ) -> Task:
    """Creates the task.

    Args:
      model: the architecture.
      data: the data set and its transforms.
      mesa_weight: weight of the loss against the moving average's predictions.

    Raises:
      UserError: the configs do not fit one another.
    """
