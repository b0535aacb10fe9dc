"""UPerNet on Spatial-Mamba micro, on scenes of scikit-learn's digits.

The embedded experiment of segmentation: 600 scenes to train and 100 to
validate, composed of real handwritten digits on textured ground, with a class
for each digit and one for the ground.

    python train.py --config=configs/digits_segmentation.py \
      --workdir=runs/digits_segmentation
"""

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.tasks.segmentation import SegmentationConfig
from spatial_mamba_jax.training.config import (
  ModelSection,
  OptimizerConfig,
  TrainConfig,
)


def get_config() -> TrainConfig:
  """Returns the experiment."""
  return TrainConfig(
    task=SegmentationConfig(
      num_classes=11,
      head_channels=32,
      auxiliary_channels=16,
      # Scenes keep about their size: digits have one.
      box=(96, 64),
      box_ratio=(1.0, 1.2),
      distortion_probability=0.0,
      max_class_share=1.0,
    ),
    model=ModelSection(name="spatial_mamba_micro", drop_path_rate=0.05),
    data=DataConfig(
      name="digit_scenes",
      image_size=64,
      flip_probability=0.0,  # A mirrored digit may be another one.
    ),
    optimizer=OptimizerConfig(
      learning_rate=1e-2,
      warmup_learning_rate=1e-5,
      min_learning_rate=0.0,
      schedule="linear",
      reference_batch_size=20,
      warmup="1 epoch",
      weight_decay=0.01,
      undecayed="norms",
    ),
    batch_size=20,
    length="20 epochs",
    ema_decay=0.95,
    evaluation_batch_size=20,
    evaluate_every="5 epochs",
    log_every="10 steps",
  )
