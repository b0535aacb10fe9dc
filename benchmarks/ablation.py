"""Trains without each part of the recipe: `python -m benchmarks.ablation`.

Trains `configs/digits_recipe.py` complete and with each part off, and prints a
table. Runs are kept in --workdir; the same command resumes them. One validation
image is 0.34%, so the table shows that every part works, and not what it brings
on ImageNet.
"""

import argparse
import copy
import json
import pathlib
import runpy
from collections.abc import Iterator

from spatial_mamba_jax.training.config import TrainConfig
from spatial_mamba_jax.training.loop import train

# {part: {field: the value that switches the part off}}.
PARTS: dict[str, dict[str, float]] = {
  "nothing": {},
  "RandAugment": {"data.randaugment_operations": 0},
  "random erasing": {"task.erasing_probability": 0.0},
  "mixup": {"task.mixing.cutmix_probability": 1.0},
  "cutmix": {"task.mixing.cutmix_probability": 0.0},
  "mixup and cutmix": {"task.mixing.probability": 0.0},
  "label smoothing": {"task.label_smoothing": 0.0},
  "drop path": {"model.drop_path_rate": 0.0},
  "MESA": {"mesa_weight": 0.0},
}

# {column: (kind of the log record, name of its value)}.
COLUMNS = {
  "top-1": ("evaluation", "top1"),
  "top-1, raw weights": ("evaluation_raw", "top1"),
  "loss": ("evaluation", "loss"),
  "training loss": ("train", "loss"),
}


def main() -> None:
  """Trains the runs that are not complete, and prints the table."""
  arguments = _parse()
  recipe = runpy.run_path(arguments.config)["get_config"]()
  print("| off | " + " | ".join(COLUMNS) + " |")
  print("| --- |" + " --- |" * len(COLUMNS))
  for part, values in PARTS.items():
    logs = []
    for seed in arguments.seeds:
      workdir = arguments.workdir / part.replace(" ", "_") / str(seed)
      train(without(recipe, {**values, "seed": seed}), workdir.absolute())
      logs.append(workdir / "metrics.jsonl")
    print(f"| {part} | " + " | ".join(_row(logs)) + " |", flush=True)


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation")
  parser.add_argument("--config", default="configs/digits_recipe.py")
  parser.add_argument(
    "--workdir", type=pathlib.Path, default=pathlib.Path("runs/ablation")
  )
  parser.add_argument("--seeds", type=int, nargs="+", default=[0])
  return parser.parse_args()


def without(recipe: TrainConfig, values: dict[str, float]) -> TrainConfig:
  """A copy of the recipe with {dotted field: value} set."""
  config = copy.deepcopy(recipe)
  for field, value in values.items():
    *sections, name = field.split(".")
    section = config
    for attribute in sections:
      section = getattr(section, attribute)
    if not hasattr(section, name):
      raise ValueError(f"the recipe has no {field}")
    setattr(section, name, value)
  return config


def _row(logs: list[pathlib.Path]) -> Iterator[str]:
  """The last value of each column, for every seed."""
  for kind, name in COLUMNS.values():
    last = [
      [r[name] for r in _records(log) if r["kind"] == kind][-1] for log in logs
    ]
    show = "{:.2%}" if name == "top1" else "{:.3f}"
    yield ", ".join(map(show.format, last))


def _records(log: pathlib.Path) -> Iterator[dict[str, float]]:
  return map(json.loads, log.read_text().splitlines())


if __name__ == "__main__":
  main()
