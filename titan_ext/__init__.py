"""Trains MobileMoE with torchtitan: the model, its data loader, its quantization and the four stages.

mobilemoe/ is the model, loader/ reads shards, quantization/ is QAT, training/ runs a stage, cpu/ adapts torchtitan to
the CPU. compat.py has the private interfaces of dependencies. config_registry.py is for torchtitan's own command line.
"""
