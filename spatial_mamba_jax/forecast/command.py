r"""Forecasts what a training run takes on machines that are not here.

    python -m spatial_mamba_jax.forecast --config=configs/imagenet_base.py \
      --topology=v5e:16x16 --price=1.2

It compiles the train step for the machine ahead of time, and counts memory,
arithmetic and traffic. --config.FIELD=VALUE overrides fields as for train.py.
The exit status is 1 where the run does not fit, or its input cannot keep up.
"""

import io
import json
import os
import pathlib
from collections.abc import Sequence

from absl import flags

from spatial_mamba_jax.data.config import IMAGENET_IMAGES
from spatial_mamba_jax.errors import UserError, say, tell
from spatial_mamba_jax.forecast import output
from spatial_mamba_jax.forecast.compilation import count_step
from spatial_mamba_jax.forecast.figure import draw
from spatial_mamba_jax.forecast.measured import ratios
from spatial_mamba_jax.forecast.recipe import (
  IMAGES_PER_CORE,
  Forecast,
  forecast,
)
from spatial_mamba_jax.forecast.topology import use_compilers
from spatial_mamba_jax.paths import local_path
from spatial_mamba_jax.training import command_line
from spatial_mamba_jax.training.compiled_step import save_step
from spatial_mamba_jax.training.config import TrainConfig
from spatial_mamba_jax.training.digests import write_whole

_TOPOLOGY = flags.DEFINE_list(
  "topology",
  [],
  "Machines: v5e:16x16, 2xv5e:16x16 (slices), h200:8; several with commas.",
  module_name="forecast",
)
_PRICE = flags.DEFINE_float(
  "price",
  None,
  "Price of a chip-hour.",
  lower_bound=0.0,
  module_name="forecast",
)
_IMAGES_PER_CORE = flags.DEFINE_float(
  "images_per_core",
  IMAGES_PER_CORE,
  "Images a second that a core of the host prepares.",
  lower_bound=1e-3,
  module_name="forecast",
)
_TRAIN_EXAMPLES = flags.DEFINE_integer(
  "train_examples",
  None,
  "Size of the training split; by default ImageNet's, or that of the data.",
  lower_bound=1,
  module_name="forecast",
)
_JSON = flags.DEFINE_bool(
  "json", False, "Print one line of JSON.", module_name="forecast"
)
_PLOT = flags.DEFINE_string(
  "plot",
  "forecast.png",
  "Where to draw several machines.",
  module_name="forecast",
)
_SAVE = flags.DEFINE_string(
  "save",
  None,
  "Where to keep the compiled program, for train.py --compiled.",
  module_name="forecast",
)


class CannotRunError(UserError):
  """A machine on which the run does not fit, or waits for its input."""

  status = 1  # The exit status of the command.


def main() -> int:
  """Forecasts as the flags say; returns the exit status."""
  use_compilers()  # Before anything asks for JAX's devices.
  return command_line.run(_main, __doc__)


def _main() -> None:
  config = command_line.config()
  targets = [name.strip() for name in _TOPOLOGY.value]
  if not targets:
    raise UserError("--topology=NAME is needed, such as v5e:16x16 or h200:8")
  if _SAVE.value and len(targets) > 1:
    raise UserError("--save keeps one program: give one --topology")
  saved = _output_file("--save", _SAVE.value) if _SAVE.value else None
  is_table = len(targets) > 1 and not _JSON.value
  plot = _output_file("--plot", _PLOT.value) if is_table else None
  examples = _TRAIN_EXAMPLES.value or train_examples(config)
  forecasts, failures = forecast_all(config, targets, examples)
  if _JSON.value:
    tell(json.dumps([output.to_json(each) for each in forecasts]))
  elif len(targets) == 1 and forecasts:
    measured = ratios(forecasts[0])
    tell("\n\n".join([output.text(forecasts[0]), *measured]))
  elif plot and forecasts:
    _tell_table(forecasts, plot)
  if saved and forecasts:
    step = forecasts[0].step
    save_step(saved, step.program, step.compiled)
    say(f"the compiled program is in {saved}")
  failures += [
    f"{each.step.target}: {problem}"
    for each in forecasts
    for problem in each.problems
  ]
  if failures:
    raise CannotRunError("; ".join(failures))


def forecast_all(
  config: TrainConfig, targets: Sequence[str], examples: int
) -> tuple[list[Forecast], list[str]]:
  """Forecasts machines one after the other.

  Args:
    config: the experiment.
    targets: the machines; see `topology`.
    examples: the number of records in the training split.

  Returns:
    The forecasts, and the reasons of the machines that have none.

  Raises:
    UserError: there is one machine only, and it has no forecast.
  """
  found, failures = [], []
  for target in targets:
    try:
      step = count_step(config, target, train_examples=examples)
    except UserError as error:
      if len(targets) == 1:
        raise
      failures.append(f"{target}: {error}")
      continue
    found.append(
      forecast(step, price=_PRICE.value, images_per_core=_IMAGES_PER_CORE.value)
    )
  return found, failures


def train_examples(config: TrainConfig) -> int:
  """The number of training records: ImageNet's, or that of other data."""
  if config.data.name == "imagenet2012":
    return IMAGENET_IMAGES
  return len(config.create_task().source("train"))


def _output_file(flag: str, value: str) -> pathlib.Path:
  """Returns a flag's path; refuses one that cannot be written.

  Compiling takes minutes, so this comes first.
  """
  path = local_path(value, flag)
  if path.is_dir() or not os.access(path.parent, os.W_OK):
    raise UserError(
      f"{flag}={value} cannot be written: give a file in a"
      " directory that exists"
    )
  return path


def _tell_table(forecasts: Sequence[Forecast], plot: pathlib.Path) -> None:
  lines = dict.fromkeys(
    line for each in forecasts for line in output.assumptions(each)
  )
  text = [output.table(forecasts), "", "assumptions"]
  tell("\n".join([*text, *(f"  - {line}" for line in lines)]))
  picture = io.BytesIO()
  draw(forecasts).savefig(picture, format="png", dpi=120)
  write_whole(plot, picture.getvalue())
  say(f"the plot is in {plot}")
