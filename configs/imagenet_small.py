"""Spatial-Mamba Small on ImageNet-1k at 224 (arXiv 2410.15091, table 1).

43.1M parameters, 7.07 GMAC an image, 300 epochs of 1.28M images, which is
20 EFLOP with MESA's teacher. The paper reports 84.6% top-1 with this recipe; it
has not been reproduced here yet, and how long it takes has not been measured.

    python -m spatial_mamba_jax.data.prepare_imagenet \
      --image_folder=DIR --data_dir=DATA
    python train.py --config=configs/imagenet_small.py --workdir=runs/small \
      --config.data.data_dir=DATA
"""

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.training.config import ModelSection, TrainConfig


def get_config() -> TrainConfig:
  """Returns the experiment; the defaults are the authors' recipe."""
  return TrainConfig(
    task=ClassificationConfig(
      num_classes=1000,
    ),
    model=ModelSection(
      name="spatial_mamba_small",
      drop_path_rate=0.3,
      dtype="bfloat16",
    ),
    data=DataConfig(name="imagenet2012", num_workers=16),
    batch_size=1024,
    length="300 epochs",
    mesa_weight=1.5,
  )
