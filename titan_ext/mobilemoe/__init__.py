"""MobileMoE (arXiv 2605.27358) as a torchtitan model module.

`model_config` makes a torchtitan config from dimensions, and `model_spec` gives it to a Trainer.
"""

from titan_ext.cpu import adaptations

adaptations.apply()

from titan_ext.mobilemoe.build_config import model_config, model_spec  # noqa: E402
from titan_ext.mobilemoe.model import MobileMoEModel  # noqa: E402
from titan_ext.mobilemoe.state_dict_adapter import MobileMoEStateDictAdapter  # noqa: E402

__all__ = ["MobileMoEModel", "MobileMoEStateDictAdapter", "model_config", "model_spec"]
