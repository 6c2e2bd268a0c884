"""This package is MobileMoE for transformers. Importing it registers the model with the Auto classes.

The modules beside this file depend on no other module of this project: the exporter copies them into every
exported folder.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from eval.hf_mobilemoe.modeling_mobilemoe import MobileMoEForCausalLM, MobileMoEModel

AutoConfig.register(MobileMoEConfig.model_type, MobileMoEConfig)
AutoModel.register(MobileMoEConfig, MobileMoEModel)
AutoModelForCausalLM.register(MobileMoEConfig, MobileMoEForCausalLM)
# save_pretrained then copies the code beside the weights.
MobileMoEConfig.register_for_auto_class()
MobileMoEModel.register_for_auto_class("AutoModel")
MobileMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MobileMoEConfig", "MobileMoEForCausalLM", "MobileMoEModel"]
