"""Fine-tunes Spatial-Mamba Tiny on your own ImageFolder, at 224.

DIR holds `train/<class>/*` and `val/<class>/*`, K classes in all. FILE is the
authors' checkpoint, or any weights that `docs/weights.md` names. If FILE has
another number of classes, the head is initialised at random. Learning rates
decrease from the head to the stem, so that the earliest layers change least.

    python train.py --config=configs/finetune.py --workdir=runs/mine \
      --config.init_from=FILE --config.data.data_dir=DIR \
      --config.task.num_classes=K

`--config.linear_probe=True` trains only the head.
`--config.data.image_size=384` fine-tunes at another resolution.
"""

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.training.config import (
  ModelSection,
  OptimizerConfig,
  TrainConfig,
)


def get_config() -> TrainConfig:
  """Returns the experiment; the augmentation is the authors', by default."""
  return TrainConfig(
    task=ClassificationConfig(
      num_classes=1000,
    ),
    model=ModelSection(
      name="spatial_mamba_tiny",
      drop_path_rate=0.2,
      dtype="bfloat16",
    ),
    data=DataConfig(name="image_folder", num_workers=4),
    optimizer=OptimizerConfig(
      learning_rate=1e-4,
      warmup_learning_rate=1e-7,
      min_learning_rate=1e-6,
      reference_batch_size=512,
      warmup="2 epochs",
      layer_decay=0.8,
    ),
    batch_size=64,
    length="30 epochs",
    ema_decay=0.999,
    evaluation_batch_size=64,
    log_every="10 steps",
  )
