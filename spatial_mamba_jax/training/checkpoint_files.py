"""The directories of checkpoints: which there are, and which are damaged."""

import contextlib
import json
import math
import pathlib
import shutil
from collections.abc import Collection, Sequence
from typing import Any

from spatial_mamba_jax.errors import say
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.digests import (
  DIGESTS,
  add_digest,
  find_damage,
  regular,
  write_whole,
)

# Part of the name of a checkpoint that orbax has not finished.
_PARTIAL = ".orbax-checkpoint-tmp"
_METRICS = "metrics/metrics"
_REMOVED = ".removed"
_DAMAGED = ".damaged"


class CheckpointFiles:
  """A directory of checkpoints, each a directory named by its step.

  Attributes:
    root: the directory.
  """

  def __init__(self, root: pathlib.Path):
    """Does not read the directory, which need not exist."""
    self.root = root

  def path(self, step: int, name: str = "") -> pathlib.Path:
    """Returns the path of a checkpoint, or of a file in it."""
    return self.root / str(step) / name

  def steps(self) -> list[int]:
    """Returns the steps of all checkpoints in ascending order."""
    if not self.root.is_dir():
      return []
    names = (x.name for x in self.root.iterdir() if x.is_dir())
    return sorted(int(name) for name in names if is_step(name))

  def steps_with_digests(self) -> list[int]:
    """Returns the steps of the undamaged checkpoints that have digests."""
    return [
      step
      for step in self.steps()
      if self.path(step, DIGESTS).is_file() and not self._damage(step)
    ]

  def score(self, step: int) -> float | None:
    """Returns the score of a checkpoint; None where it was not evaluated.

    NaN becomes -inf, the worst score.
    """
    try:
      metrics = self.metrics(step) or {}
      # Version 1 has "top1" but no "score".
      value: Any = metrics.get("score", metrics.get("top1"))
      score = float(value)
      return -math.inf if math.isnan(score) else score
    except (TypeError, ValueError):
      return None

  def metrics(self, step: int) -> dict[str, Any] | None:
    """Returns the results of an evaluation; None where there are none."""
    try:
      path = regular(self.path(step, _METRICS))
      metrics = json.loads(path.read_text())
    except (OSError, RecursionError, ValueError):
      return None
    return metrics if isinstance(metrics, dict) else None

  def by_score(self) -> list[int]:
    """Returns the steps, the highest score first.

    Of equal scores the newest is first. Checkpoints without a score come last.
    """
    scores = {step: self.score(step) for step in self.steps()}
    return sorted(
      scores,
      key=lambda step: (scores[step] is not None, scores[step] or 0.0, step),
      reverse=True,
    )

  def add_metrics(self, step: int, metrics: dict[str, float | None]) -> None:
    """Adds the results of an evaluation, with "score", to a checkpoint."""
    path = self.path(step, _METRICS)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(metrics))
    add_digest(self.path(step), _METRICS)

  def first_whole(
    self, steps: Sequence[int], *, otherwise: int | None = None
  ) -> int | None:
    """Returns the first of the steps whose checkpoint is undamaged.

    One line on standard error names the damaged checkpoints before it.

    Args:
      steps: the steps in the order of preference.
      otherwise: a step that is used if none of these is; it is not checked.

    Returns:
      The step; None where there are no checkpoints.

    Raises:
      TrainingError: all of them are damaged.
    """
    damaged: list[str] = []
    for step in steps:
      damage = self._damage(step)
      if not self.path(step).is_dir():
        continue  # Removed by its run since `steps` was read.
      if damage is None:
        self._say_skipped(damaged, step)
        return step
      damaged.append(f"step {step}, which {damage}")
    if otherwise is not None:
      self._say_skipped(damaged, otherwise)
      return otherwise
    if damaged:
      others = [step for step in self.steps() if step not in steps]
      remedy = (
        f"{self.root} also has the steps {', '.join(map(str, others))}"
        if others
        else f"remove {self.root} to start from step 0"
      )
      raise TrainingError(
        f"no checkpoint in {self.root} can be used: {'; '.join(damaged)};"
        f" {remedy}"
      )
    return None

  def _say_skipped(self, damaged, used):
    if damaged:
      say(f"{self.root}: skipping {'; '.join(damaged)}: using step {used}")

  def set_aside_after(self, step: int) -> None:
    """Renames newer checkpoints, so that their steps can be saved again."""
    for newer in self.steps():
      if newer > step:
        self._set_aside(newer)

  def set_aside_if_damaged(self, step: int) -> None:
    """Renames a checkpoint that is damaged, and says so."""
    if step in self.steps() and (damage := self._damage(step)):
      path = self._set_aside(step)
      say(f"{self.root}: step {step} {damage}; it is now {path.name}")

  def _set_aside(self, step):
    path = self.path(step)
    return path.rename(_unused(path.with_name(path.name + _DAMAGED)))

  def clear_partial(self, step: int | None = None) -> None:
    """Removes partly written and partly removed checkpoints.

    Args:
      step: the step of these checkpoints; None for all steps.
    """
    for path in self.root.glob(f"{'*' if step is None else step}.*"):
      if _PARTIAL in path.name or _REMOVED in path.name:
        shutil.rmtree(path, ignore_errors=True)

  def prune(self, keep_last: int) -> None:
    """Removes all checkpoints but the newest `keep_last` and the best."""
    steps = self.steps()
    best = [step for step in self.by_score() if self.score(step) is not None]
    self.remove(set(steps) - {*steps[-keep_last:], *best[:1]})

  def remove(self, steps: Collection[int]) -> None:
    """Removes checkpoints."""
    for step in steps:
      # Renamed first: a partly removed one must not look like a checkpoint.
      path = self.path(step)
      with contextlib.suppress(OSError):  # `clear_partial` removes the rest.
        path = path.rename(_unused(path.with_name(path.name + _REMOVED)))
        shutil.rmtree(path)

  def _damage(self, step: int) -> str | None:
    """Says what is wrong with a checkpoint; None if nothing is."""
    damage = find_damage(self.path(step))
    if damage:
      return f"is damaged ({damage})"
    if not self.path(step, "ema/_METADATA").is_file():
      return "is not a checkpoint of this project"
    return None


def is_step(name: str) -> bool:
  """Whether a name is the name of a checkpoint: its step in decimal digits."""
  return name.isascii() and name.isdecimal() and name == str(int(name))


def _unused(path: pathlib.Path) -> pathlib.Path:
  """Returns the path, with a number appended if it exists."""
  unused, count = path, 1
  while unused.exists():
    count += 1
    unused = path.with_name(f"{path.name}.{count}")
  return unused
