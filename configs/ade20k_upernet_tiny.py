"""UPerNet on Spatial-Mamba Tiny, on ADE20K at 512 (arXiv 2410.15091).

56.5M parameters, 936 GMAC an image of 512 x 2048. The paper reports
48.6% mIoU, and 49.4% with six views; it has not been reproduced here yet.
DIR is the directory ADEChallengeData2016, and FILE the authors' checkpoint of
ImageNet, or any weights that `docs/weights.md` names. `docs/segmentation.md`
says where to get them.

    python train.py --config=configs/ade20k_upernet_tiny.py \
      --workdir=runs/ade20k_tiny --config.data.data_dir=DIR \
      --config.init_from=FILE
    python eval.py --config=configs/ade20k_upernet_tiny.py \
      --workdir=runs/ade20k_tiny --config.data.data_dir=DIR \
      --config.task.test_ratios="(0.75, 1.0, 1.25)" --config.task.test_flip=True
"""

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.tasks.segmentation import SegmentationConfig
from spatial_mamba_jax.training.config import (
  ModelSection,
  OptimizerConfig,
  TrainConfig,
)


def get_config() -> TrainConfig:
  """Returns the experiment: the authors' recipe."""
  return TrainConfig(
    # Each of the authors' 8 GPUs had two images.
    task=SegmentationConfig(num_classes=150, statistics_group=2),
    model=ModelSection(name="spatial_mamba_tiny", drop_path_rate=0.2),
    data=DataConfig(name="ade20k", image_size=512, num_workers=8),
    optimizer=OptimizerConfig(
      learning_rate=6e-5,
      warmup_learning_rate=6e-11,
      min_learning_rate=0.0,
      schedule="linear",
      reference_batch_size=16,
      warmup="1500 steps",
      weight_decay=0.01,
      undecayed="norms",
      clip_norm=float("inf"),
    ),
    batch_size=16,
    length="160000 steps",
    ema_decay=0.0,
    evaluation_batch_size=8,
    evaluate_every="16000 steps",
  )
