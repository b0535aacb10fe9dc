"""Spatial-Mamba micro on scikit-learn's 1,797 real digits, 8 x 8 pixels.

The embedded experiment: 1,500 images to train and 297 to validate. Top-1 after
the last epoch was 97.6% to 99.3%, with seeds 0 to 2 on two machines. It takes
under four minutes on two CPU cores.

    python train.py --config=configs/digits.py --workdir=runs/digits
"""

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.tasks.classification import (
  ClassificationConfig,
  MixingConfig,
)
from spatial_mamba_jax.training.config import (
  ModelSection,
  OptimizerConfig,
  TrainConfig,
)


def get_config() -> TrainConfig:
  """Returns the experiment."""
  return TrainConfig(
    task=ClassificationConfig(
      num_classes=10,
      mixing=MixingConfig(probability=0.0),
      erasing_probability=0.0,
    ),
    model=ModelSection(name="spatial_mamba_micro", drop_path_rate=0.05),
    data=DataConfig(
      name="digits",
      image_size=32,
      # A mirrored or heavily cropped digit may be another one.
      crop_scale=(0.7, 1.0),
      flip_probability=0.0,
      randaugment_operations=0,
      test_crop_ratio=1.0,
    ),
    optimizer=OptimizerConfig(
      learning_rate=3e-3,
      warmup_learning_rate=3e-6,
      min_learning_rate=3e-5,
      reference_batch_size=100,
      warmup="2 epochs",
    ),
    batch_size=100,
    length="40 epochs",
    ema_decay=0.95,
    evaluation_batch_size=100,
    evaluate_every="5 epochs",
    log_every="15 steps",
  )
