"""The panels and columns of a report on semantic segmentation."""

from spatial_mamba_jax.tasks.base import Column, Line, Panel

PANELS: tuple[Panel, ...] = (
  Panel(
    "Loss, cross-entropy of each head with its weight",
    "nats",
    (
      Line("train", "decode_loss", "training, decode head"),
      Line("train", "auxiliary_loss", "training, auxiliary head"),
    ),
  ),
  Panel(
    "Mean IoU",
    "%",
    (
      Line("evaluation_raw", "miou", "validation, raw weights"),
      Line("evaluation", "miou", "validation, moving average"),
    ),
    scale=100.0,
  ),
  Panel(
    "Pixel accuracy",
    "%",
    (
      Line("train", "accuracy", "training, as augmented"),
      Line("evaluation_raw", "pixel_accuracy", "validation, raw weights"),
      Line("evaluation", "pixel_accuracy", "validation, moving average"),
    ),
    scale=100.0,
  ),
)
COLUMNS = (
  Column("miou", "mIoU", ".2%"),
  Column("mean_accuracy", "mAcc", ".2%"),
  Column("pixel_accuracy", "aAcc", ".2%"),
  Column("images", "images", ",.0f"),
)
SCORE = "miou"
