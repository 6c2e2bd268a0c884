"""MobileMoE (arXiv 2605.27358) as a torchtitan model module.

`model_config` makes a torchtitan config from dimensions, and `model_spec` gives it to a Trainer.
"""

from titan_ext.cpu.device import use_cpu
from titan_ext.mobilemoe.build_config import model_config, model_spec
from titan_ext.mobilemoe.model import MobileMoEModel
from titan_ext.mobilemoe.state_dict_adapter import MobileMoEStateDictAdapter

use_cpu()  # everything that builds a model imports this package

__all__ = ["MobileMoEModel", "MobileMoEStateDictAdapter", "model_config", "model_spec"]
