"""UPerNet on Spatial-Mamba Base, on ADE20K at 512 (arXiv 2410.15091).

127.4M parameters, 1176 GMAC an image of 512 x 2048. The paper reports
51.8% mIoU, and 52.6% with six views; it has not been reproduced here yet.
DIR is the directory ADEChallengeData2016, and FILE the authors' checkpoint of
ImageNet, or any weights that `docs/weights.md` names. `docs/segmentation.md`
says where to get them.

    python train.py --config=configs/ade20k_upernet_base.py \
      --workdir=runs/ade20k_base --config.data.data_dir=DIR \
      --config.init_from=FILE
    python eval.py --config=configs/ade20k_upernet_base.py \
      --workdir=runs/ade20k_base --config.data.data_dir=DIR \
      --config.task.test_ratios="(0.75, 1.0, 1.25)" --config.task.test_flip=True
"""

import configs.ade20k_upernet_tiny
from spatial_mamba_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
  """Returns the experiment: the authors' recipe."""
  config = configs.ade20k_upernet_tiny.get_config()
  config.model.name = "spatial_mamba_base"
  config.model.drop_path_rate = 0.5
  return config
