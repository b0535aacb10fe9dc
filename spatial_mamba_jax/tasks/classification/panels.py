"""The panels and columns of a report on classification."""

from spatial_mamba_jax.tasks.base import Column, Line, Panel

PANELS: tuple[Panel, ...] = (
  Panel(
    "Loss",
    "nats",
    (
      Line("train", "loss", "training, with its regularisation"),
      Line("evaluation_raw", "loss", "validation, raw weights"),
      Line("evaluation", "loss", "validation, moving average"),
    ),
  ),
  Panel(
    "Accuracy, top-1",
    "%",
    (
      Line("train", "accuracy", "training, as augmented"),
      Line("evaluation_raw", "top1", "validation, raw weights"),
      Line("evaluation", "top1", "validation, moving average"),
    ),
    scale=100.0,
  ),
)
COLUMNS = (
  Column("top1", "top-1", ".2%"),
  Column("top5", "top-5", ".2%"),
  Column("loss", "loss", ".4f"),
  Column("ece", "ECE", ".2%"),
  Column("images", "images", ",.0f"),
)
SCORE = "top1"
