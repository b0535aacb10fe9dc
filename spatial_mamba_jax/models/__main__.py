"""Lists the named models: `python -m spatial_mamba_jax.models`."""

import argparse
import sys

from flax import nnx

from spatial_mamba_jax.convert.families import named
from spatial_mamba_jax.errors import UserError, run_command, tell
from spatial_mamba_jax.models.presets import get_model_config, list_models
from spatial_mamba_jax.models.summary import summary

# {name: top-1 on ImageNet-1k in percent, from the authors' papers} of the
# models whose authors have released weights.
RELEASED = {
  "spatial_mamba_tiny": 83.5,
  "spatial_mamba_small": 84.6,
  "spatial_mamba_base": 85.3,
  "vmamba_tiny": 82.6,
  "vmamba_small": 83.3,
  "vmamba_base": 83.8,
}


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m spatial_mamba_jax.models",
    description="Lists the named models: their parameters, their multiply-adds"
    " for an image of 224 x 224 pixels, and the top-1 on ImageNet-1k of the"
    " weights that the authors have released.",
  )
  parser.add_argument("filter", nargs="?", default="*", help='e.g. "*tiny*"')
  options = parser.parse_args(arguments)
  return run_command("models", lambda: _list(options.filter))


def _list(pattern: str) -> None:
  names = list_models(pattern)
  if not names:
    raise UserError(
      f"no model has a name like {pattern}: there are"
      f" {', '.join(list_models())}"
    )
  tell(f"{'name':<20} {'parameters':>11} {'GMAC':>6}  released weights")
  for name in names:
    config = get_model_config(name)
    model = nnx.eval_shape(
      lambda config=config: config.family.classifier(config, rngs=nnx.Rngs(0))
    )
    total = summary(model, 224).total
    weights = "-"
    if name in RELEASED:
      weights = f"top-1 {RELEASED[name]}%, {named(config.family).repository}"
    tell(
      f"{name:<20} {total.parameters:>11,} {total.macs / 1e9:>6.2f}  {weights}"
    )


if __name__ == "__main__":
  sys.exit(main())
