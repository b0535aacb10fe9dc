"""The authors' whole recipe on scikit-learn's 1,797 real digits, 8 x 8 pixels.

Every part of the ImageNet recipe is on, so that a mistake in any of them shows
on real pixels within minutes: RandAugment, random erasing, mixup and cutmix,
label smoothing, drop path, the moving average and MESA. Expected: at least 98%
top-1, within five minutes on two CPU cores. `python -m benchmarks.ablation`
measures each part by leaving it out.

    python train.py --config=configs/digits_recipe.py --workdir=runs/recipe
"""

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.tasks.classification import ClassificationConfig
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
    ),
    model=ModelSection(name="spatial_mamba_micro", drop_path_rate=0.05),
    data=DataConfig(
      name="digits",
      image_size=32,
      # A mirrored, heavily cropped or strongly distorted digit may be another.
      crop_scale=(0.7, 1.0),
      flip_probability=0.0,
      randaugment_magnitude=4.0,
      test_crop_ratio=1.0,
    ),
    optimizer=OptimizerConfig(
      learning_rate=3e-3,
      warmup_learning_rate=3e-6,
      min_learning_rate=3e-5,
      reference_batch_size=100,
      warmup="3 epochs",
    ),
    batch_size=100,
    length="30 epochs",
    ema_decay=0.98,
    mesa_weight=1.0,
    evaluation_batch_size=100,
    evaluate_every="10 epochs",
    log_every="15 steps",
  )
