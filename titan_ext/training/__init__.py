"""Runs a training stage: `train.run_stage` on every rank.

schedules.py has the values of every stage, and trainer_config.py turns them into torchtitan's configuration
(learning-rate schedule, optimizer, loss). trainer.py is the trainer. It calls the callbacks of callbacks.py,
spike_guard.py and distillation.py at every step. metrics.py writes the metrics files. launch.py starts ranks on this
machine.
"""
