"""UPerNet on Spatial-Mamba Small, on ADE20K at 512 (arXiv 2410.15091).

72.9M parameters, 992 GMAC an image of 512 x 2048. The paper reports
50.6% mIoU, and 51.4% with six views; it has not been reproduced here yet.
DIR is the directory ADEChallengeData2016, and FILE the authors' checkpoint of
ImageNet, or any weights that `docs/weights.md` names. `docs/segmentation.md`
says where to get them.

    python train.py --config=configs/ade20k_upernet_small.py \
      --workdir=runs/ade20k_small --config.data.data_dir=DIR \
      --config.init_from=FILE
    python eval.py --config=configs/ade20k_upernet_small.py \
      --workdir=runs/ade20k_small --config.data.data_dir=DIR \
      --config.task.test_ratios="(0.75, 1.0, 1.25)" --config.task.test_flip=True
"""

import configs.ade20k_upernet_tiny
from spatial_mamba_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
  """Returns the experiment: the authors' recipe."""
  config = configs.ade20k_upernet_tiny.get_config()
  config.model.name = "spatial_mamba_small"
  config.model.drop_path_rate = 0.3
  return config
