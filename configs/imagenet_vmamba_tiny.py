"""VMamba Tiny on ImageNet-1k at 224 (arXiv 2401.10166), as vmambav2v_tiny.

30.2M parameters, 300 epochs. The authors report 82.6% top-1; it has not been
reproduced here yet, and how long it takes has not been measured.

    python -m spatial_mamba_jax.data.prepare_imagenet \
      --image_folder=DIR --data_dir=DATA
    python train.py --config=configs/imagenet_vmamba_tiny.py \
      --workdir=runs/vmamba --config.data.data_dir=DATA
"""

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.models.mixers import SS2DConfig
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.training.config import ModelSection, TrainConfig


def get_config() -> TrainConfig:
  """Returns the experiment; the recipe is Spatial-Mamba's without MESA."""
  return TrainConfig(
    task=ClassificationConfig(num_classes=1000),
    model=ModelSection(
      name="vmamba_tiny",
      mixer=SS2DConfig(),
      drop_path_rate=0.2,
      dtype="bfloat16",
    ),
    data=DataConfig(name="imagenet2012", num_workers=16),
    batch_size=1024,
    length="300 epochs",
  )
