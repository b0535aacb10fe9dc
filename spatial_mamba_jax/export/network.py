"""Networks as export needs them: checked, and without kernels."""

from typing import Any

from flax import nnx

from spatial_mamba_jax.models.backbone import Trunk
from spatial_mamba_jax.models.segmentor import Segmentor

Network = Trunk | Segmentor
ImageSize = int | tuple[int, int] | None


def check_network(model: Network, image_size: ImageSize) -> str:
  """Checks that a model can be exported for images of a size.

  Returns:
    The sizes H and W for `jax.export.symbolic_shape`: "h, w" if the size is
    None.

  Raises:
    ValueError: the model is in training mode, or the size is wrong.
  """
  if not model.deterministic:
    raise ValueError("export is for inference: call model.eval() first")
  if isinstance(model, Segmentor) and image_size is None:
    raise ValueError("a segmentor is exported for images of one size")
  if model.config.mixer.needs_size and image_size is None:
    raise ValueError(
      f"a network with the mixer {model.config.mixer.name} is exported for"
      " images of one size"
    )
  if image_size is None:
    return "h, w"
  pair = image_size if isinstance(image_size, tuple) else (image_size,) * 2
  if len(pair) != 2 or min(pair) < 1:
    raise ValueError(
      f"image_size must be H, (H, W) or None, in pixels: got {image_size!r}"
    )
  return "{}, {}".format(*pair)


def without_kernels(model: nnx.Module) -> Any:
  """Returns a copy of the model with no kernel as its `implementation`."""
  model = nnx.clone(model)
  for _, module in nnx.iter_graph(model):
    if getattr(module, "implementation", None) is not None:
      module.implementation = None
  return model
