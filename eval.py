"""Evaluates: `python eval.py --config=configs/digits.py --workdir=runs/digits`.

Prints top-1, top-5, loss and calibration error on the validation images, of the
weights' moving average ("ema") and of the weights ("raw") in the checkpoint of
a working directory whose moving average is best, or of the weights in what
`--checkpoint` names: one checkpoint (`runs/digits/checkpoints/300`), PyTorch's
`.pth`, a `.safetensors`, or a directory of `smj.save_pretrained`.
"""

import json
import pathlib
import sys

import jax
from absl import flags

from spatial_mamba_jax.training import command_line
from spatial_mamba_jax.training.loop import evaluate_checkpoint

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Weights of any kind, instead of --workdir's best."
)
_RESOLUTION = flags.DEFINE_integer(
  "resolution", None, "Height and width of the images.", lower_bound=1
)
_CROP_RATIO = flags.DEFINE_float(
  "crop_ratio", None, "Share of the shorter side that the central crop takes."
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", None, "Where to write predictions, classes and confusions."
)
_JSON = flags.DEFINE_bool("json", False, "Print one line of JSON.")


def main() -> None:
  """Evaluates as the flags say."""
  if _CHECKPOINT.value:
    path = pathlib.Path(_CHECKPOINT.value).absolute()
  else:
    path = command_line.workdir() / "checkpoints"
  config = command_line.config()
  if _RESOLUTION.value is not None:
    config.data.image_size = _RESOLUTION.value
  if _CROP_RATIO.value is not None:
    config.data.test_crop_ratio = _CROP_RATIO.value
  output_dir = _OUTPUT_DIR.value and pathlib.Path(_OUTPUT_DIR.value)
  evaluations = evaluate_checkpoint(config, path, output_dir or None)
  if jax.process_index():
    return
  if _JSON.value:
    print(json.dumps({k: v.to_json() for k, v in evaluations.items()}))
  else:
    for name, evaluation in evaluations.items():
      print(f"{name}  {evaluation}")


if __name__ == "__main__":
  sys.exit(command_line.run(main))
