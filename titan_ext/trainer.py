"""torchtitan's Trainer with this project's stage metrics."""

from dataclasses import dataclass

from torchtitan.trainer import Trainer

from titan_ext.metrics import StageMetrics


class StageTrainer(Trainer):
    """Trains one stage; resumes from the newest checkpoint in its folder, as torchtitan does."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def __init__(self, config: Config):
        super().__init__(config)
        self.started = False

    def train_step(self, data_iterator) -> None:
        if not self.started:
            # Only here is it known at which step the loaded checkpoint left off.
            assert isinstance(self.metrics_processor, StageMetrics)
            self.metrics_processor.start_after(self.step - 1)
            self.started = True
        super().train_step(data_iterator)
