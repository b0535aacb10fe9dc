"""A dense head on the backbone: a small feature pyramid, one class a pixel.

    python examples/feature_pyramid.py

The backbone's four maps are projected to the same number of channels, added
from the coarsest to the finest (arXiv 1612.03144), and classified at a quarter
of the image's resolution.
"""

import jax
from flax import nnx

import spatial_mamba_jax as smj


class Segmenter(nnx.Module):
  """Maps images [B, H, W, 3] to logits [B, H / 4, W / 4, classes]."""

  def __init__(
    self,
    backbone: smj.Backbone,
    classes: int,
    *,
    channels: int = 32,
    rngs: nnx.Rngs,
  ):
    self.backbone = backbone
    self.lateral = nnx.List(
      [nnx.Linear(dim, channels, rngs=rngs) for dim in backbone.config.dims]
    )
    self.smooth = nnx.Conv(channels, channels, (3, 3), rngs=rngs)
    self.head = nnx.Linear(channels, classes, rngs=rngs)

  def __call__(
    self, images: jax.Array, *, rngs: nnx.Rngs | None = None
  ) -> jax.Array:
    features = self.backbone(images, rngs=rngs)
    *finer, x = [
      lateral(feature)
      for lateral, feature in zip(self.lateral, features, strict=True)
    ]
    for feature in reversed(finer):
      # To the next map's size, which is not twice as large if it is odd.
      x = feature + jax.image.resize(x, feature.shape, "nearest")
    return self.head(jax.nn.relu(self.smooth(x)))


def main() -> None:
  """Runs the head on images whose sides are no multiples of 32."""
  rngs = nnx.Rngs(0)
  backbone = smj.create_backbone("spatial_mamba_micro", rngs=rngs)
  model = Segmenter(backbone, classes=5, rngs=rngs)
  images = jax.random.normal(jax.random.key(1), (1, 50, 70, 3))
  logits = nnx.jit(lambda model, images: model(images))(model, images)
  print(images.shape, "->", logits.shape)


if __name__ == "__main__":
  main()
