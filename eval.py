"""Evaluates: `python eval.py --config=configs/digits.py --workdir=runs/digits`.

Prints top-1, top-5 and loss on the validation images, of the moving average of
the weights in the best checkpoint of a working directory, or of the weights in
what `--checkpoint` names: one checkpoint (`runs/digits/checkpoints/300`),
PyTorch's `.pth`, a `.safetensors`, or a directory of `smj.save_pretrained`.
"""

import dataclasses
import json
import pathlib
import sys

from absl import flags

from spatial_mamba_jax.training import command_line
from spatial_mamba_jax.training.loop import evaluate_checkpoint

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Weights of any kind, instead of --workdir's best."
)
_JSON = flags.DEFINE_bool("json", False, "Print one line of JSON.")


def main() -> None:
  """Evaluates as the flags say."""
  if _CHECKPOINT.value:
    path = pathlib.Path(_CHECKPOINT.value).absolute()
  else:
    path = command_line.workdir() / "checkpoints"
  evaluation = evaluate_checkpoint(command_line.config(), path)
  if _JSON.value:
    print(json.dumps(dataclasses.asdict(evaluation)))
  else:
    print(evaluation)


if __name__ == "__main__":
  sys.exit(command_line.run(main))
