"""Evaluates: `python eval.py --config=configs/digits.py --workdir=runs/digits`.

Prints the measures of the task on the validation images: top-1, top-5, loss and
calibration error of a classifier; mean IoU and accuracies of a segmentor. It
evaluates the weights ("raw") and their moving average ("ema"), if there is one,
and names the step of their checkpoint. They come from the best checkpoint of a
working directory, or from `--checkpoint`: a checkpoint
(`runs/digits/checkpoints/300`), a `.pth`, a `.safetensors`, or a directory of
`smj.save_pretrained`.
"""

import signal
import sys


def main() -> int:
  """Evaluates as the flags say; returns the exit status."""
  from absl import flags

  from spatial_mamba_jax.training import command_line
  from spatial_mamba_jax.training.evaluation import evaluate_checkpoint

  string = flags.DEFINE_string
  checkpoint = string("checkpoint", None, "Weights, instead of --workdir's.")
  output = string("output_dir", None, "Directory to write predictions to.")
  resolution = flags.DEFINE_integer(
    "resolution",
    None,
    "Height and width of the images of a classifier.",
    lower_bound=1,
  )
  crop_ratio = flags.DEFINE_float(
    "crop_ratio",
    None,
    "Share of the shorter side in the central crop of a classifier.",
  )
  as_json = flags.DEFINE_bool("json", False, "Print one line of JSON.")

  def evaluate() -> None:
    path = command_line.path(checkpoint)
    path = path or command_line.workdir() / "checkpoints"
    config = command_line.config()
    for flag, field in (
      (resolution, "image_size"),
      (crop_ratio, "test_crop_ratio"),
    ):
      if flag.value is not None:
        config.set_for_evaluation(field, flag.value)
    found = evaluate_checkpoint(config, path, command_line.path(output))
    command_line.tell_evaluations(found, as_json=as_json.value)

  command_line.own_process()
  return command_line.run(evaluate, __doc__)


if __name__ == "__main__":
  # While packages are imported, Ctrl-C ends the process without a traceback.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  # Not at the top: workers import this file, and packages may be missing.
  try:
    from spatial_mamba_jax.errors import run_command
  except ModuleNotFoundError as error:
    sys.stderr.write(
      f'eval.py: {error.name} is missing: pip install ".[train]"\n'
    )
    sys.exit(2)
  sys.exit(run_command("eval.py", main))
