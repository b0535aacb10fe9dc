"""What the training loop knows of a task.

A config file brings a task in, as the `TaskConfig` of its experiment. The loop
and the evaluation call the `Task` that it creates, and import no task.
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

# A batch by the names of its arrays.
Batch = Mapping[str, Array]


class Loss(NamedTuple):
  """What a task makes of one part of a batch in training.

  Attributes:
    value: what is differentiated; the mean over the part.
    sums: {name: sum over the part} for each of `Task.sums`.
  """

  value: Float[Array, ""]
  sums: dict[str, Float[Array, ""]]


def _plain(value: Any) -> float | int:
  return value.item() if isinstance(value, np.generic | np.ndarray) else value


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How good some weights are.

  Attributes:
    score: a float, by which the best checkpoint is kept; higher is better.
    values: {name: number}, for the log and for programs.
    line: the same for a person.
  """

  score: Any
  values: dict[str, Any]
  line: str

  def __post_init__(self):
    """Turns NumPy's numbers into Python's, which JSON has."""
    if taken := self.values.keys() & {"kind", "score", "step"}:
      raise ValueError(f"values must not be called {', '.join(taken)}")
    plain = {name: _plain(value) for name, value in self.values.items()}
    object.__setattr__(self, "values", plain)
    object.__setattr__(self, "score", float(self.score))

  def __str__(self) -> str:
    return self.line

  def to_json(self) -> dict[str, float | int | None]:
    """The values; None for NaN and infinity, which JSON has not."""
    return {
      name: value if np.isfinite(value) else None
      for name, value in self.values.items()
    }


@runtime_checkable
class Meter(Protocol):
  """Takes in the predictions of an evaluation, on the host."""

  def add(self, columns: dict[str, np.ndarray]) -> None:
    """Takes in one batch of what `Task.predict` returned.

    Args:
      columns: {name: [B, ...]} and "index" [B], the examples' indices in the
        source; without padding and without unreadable examples.
    """
    ...

  def result(self, unreadable: int) -> Evaluation:
    """The evaluation; `unreadable` examples were left out."""
    ...

  def write(self, directory: pathlib.Path) -> None:
    """Writes the predictions into a directory, which is there."""
    ...


class Line(NamedTuple):
  """A line of a panel: a value of the log's records of one kind.

  Attributes:
    kind: "train", "evaluation" or "evaluation_raw".
    value: the value's name.
    name: of the line; empty where it is the only one.
  """

  kind: str
  value: str
  name: str


class Panel(NamedTuple):
  """A panel of `report.py`'s picture.

  Attributes:
    title: above it.
    unit: of its vertical axis; empty where the values have none.
    lines: what it shows. The kind gives a line its colour; lines of one kind
      differ by their dashes, of which there are four.
    scale: factor from the logged values to the unit.
  """

  title: str
  unit: str
  lines: Sequence[Line]
  scale: float = 1.0


class Column(NamedTuple):
  """A column of `report.py`'s table of evaluations.

  Attributes:
    value: the name of one of an evaluation's values.
    name: above it.
    form: of `format`, e.g. ".2%".
  """

  value: str
  name: str
  form: str


@runtime_checkable
class Task(Protocol):
  """What a network is trained for. It holds no state.

  Attributes:
    sums: names of what `loss` sums up over a batch.
    score: the name of that of an evaluation's values which is its score.
    panels: what `report.py` draws beside loss, learning rate and speed.
    columns: of the report's table of evaluations.
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
      UserError: they are not there, or are not of this task.
    """
    ...

  def examples(self) -> Examples:
    """What makes examples of records."""
    ...

  def prepare(self, batch: Batch, key: Array) -> Arrays:
    """Prepares a batch for training, on the device: augments, makes targets.

    Args:
      batch: of `Examples.train`.
      key: of all that is random in it.
    """
    ...

  def loss(
    self, network: Any, batch: Arrays, key: Array, teacher: Arrays | None
  ) -> Loss:
    """The loss of a prepared batch.

    Args:
      network: in training mode.
      batch: from `prepare`.
      key: of all that is random in the network.
      teacher: what `teach` returned, for self-distillation; None without. It is
        all zeros before self-distillation begins, and must then add nothing.
    """
    ...

  def teach(self, network: Any, batch: Arrays) -> Arrays:
    """What the moving average predicts of a prepared batch (MESA).

    `network` is in eval mode.
    """
    ...

  def predict(self, network: Any, batch: Batch) -> dict[str, Array]:
    """What a network in eval mode makes of a batch of `Examples.evaluate`.

    Returns:
      {name: [B, ...]}.
    """
    ...

  def meter(self, source: Source) -> Meter:
    """A meter of predictions of a source."""
    ...

  def logged(self, sums: Mapping[str, float]) -> dict[str, float]:
    """What the log has of a window of steps, beside loss and gradient norm.

    Args:
      sums: `self.sums` over the window, and "images" and "steps".
    """
    ...


@dataclasses.dataclass
class TaskConfig(Section, abc.ABC):
  """The settings of a task.

  Attributes:
    kind: names the task in saved experiments.
  """

  kind: ClassVar[str]

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
      UserError: they do not fit one another.
    """
