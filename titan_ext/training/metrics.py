"""Training metrics as TensorBoard scalars (torchtitan's) and as JSON lines that the driver and the report read.

Files in the stage folder, written by one rank: metrics.jsonl, heldout.jsonl, expert_load.jsonl, data.jsonl. After a
resume the lines of steps that are trained again are dropped, so each step stands once.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import Validator
from torchtitan.tools import utils

from titan_ext.mobilemoe import load_metrics
from titan_ext.mobilemoe.tied_embedding_pp import of_last_stage

FILES = ("metrics.jsonl", "expert_load.jsonl", "heldout.jsonl", "data.jsonl")
LAYER_SCALARS = ("max_over_mean", "entropy", "dead", "dropped", "router_entropy")


class StageMetrics(MetricsProcessor):
    """torchtitan's metrics plus loss, expert load and router z a step as JSON lines."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def __init__(self, config: Config, *, parallel_dims, dump_folder: str = "./outputs", **kwargs):
        super().__init__(config, parallel_dims=parallel_dims, dump_folder=dump_folder, **kwargs)
        self.folder = Path(dump_folder)
        self.started = time.perf_counter()
        self.tokens_per_step = 0
        """Tokens of one optimizer step over all ranks; set by the trainer."""
        self.last_step = 0
        """Logged whatever `log_freq` is, so that the files end with the stage; set by the trainer."""
        self.last_logged_step = 0
        self.num_skipped = 0
        self.kl: float | None = None
        """Nats a token by which the student is from its teacher, over all ranks; None without a teacher."""
        self.data_statistics: Callable[[], dict[str, Any]] = dict
        """What the loader has handed out on this rank: padding, repeats, tokens by domain."""

    def should_log(self, step: int) -> bool:
        return super().should_log(step) or step == self.last_step

    def start_after(self, step: int) -> None:
        """Training begins at `step` + 1: drop what was written of later steps, after the checkpoint resumed from."""
        self.last_logged_step = step
        if dist.get_rank() != 0:
            return
        for name in FILES:
            path = self.folder / name
            if not path.exists():
                continue
            # A kill can cut the last line short; such a line is later than the checkpoint as well.
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            beside = path.with_suffix(".partial")
            beside.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
            beside.replace(path)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        steps, self.last_logged_step = step - self.last_logged_step, step
        layers, means = load_metrics.collect(self.model_parts, self.parallel_dims)
        scalars = {
            "moe/router_z": means["router_z"],
            "moe/dropped": means["dropped"],
            "skipped_steps": self.num_skipped,
        }
        distillation = {} if self.kl is None else {"kl": self.kl}
        scalars |= {f"distillation/{key}": value for key, value in distillation.items()}
        for i, layer in enumerate(layers):
            scalars |= {f"moe/layer_{i}/{key}": layer[key] for key in LAYER_SCALARS}
        data = self.data_statistics()
        scalars |= {f"data/{key}": value for key, value in data.items() if not isinstance(value, dict)}
        scalars |= {f"data/epochs/{domain}": epochs for domain, epochs in data.get("epochs", {}).items()}
        seconds = time.perf_counter() - self.time_last_log
        super().log(step, global_avg_loss, global_max_loss, grad_norm, {**(extra_metrics or {}), **scalars})
        learning_rate = next(value for key, value in extra_metrics.items() if key.startswith("lr"))
        self._append(
            "metrics.jsonl",
            {
                "step": step,
                "tokens": int(extra_metrics["n_tokens_seen"]),
                "loss": global_avg_loss,
                "grad_norm": grad_norm,
                "lr": learning_rate,
                "tokens_per_second": steps * self.tokens_per_step / seconds,
                "router_z": means["router_z"],
                "dropped": means["dropped"],
                "skipped_steps": self.num_skipped,
                **distillation,
                "seconds": time.perf_counter() - self.started,
            },
        )
        self._append("expert_load.jsonl", {"step": step, "layers": layers})
        self._append("data.jsonl", {"step": step, **data})

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        here = torch.tensor(loss, dtype=torch.float64, device=utils.device_type)
        loss = float(of_last_stage(here, self.parallel_dims))
        super().log_validation(loss, step, extra_metrics)
        self._append("heldout.jsonl", {"step": step, "loss": loss})

    def _append(self, name: str, record: dict) -> None:
        if dist.get_rank() != 0:
            return
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(record) + "\n")


class HeldoutValidator(Validator):
    """torchtitan's Validator, run every `freq` steps and after the last one."""

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        pass

    last_step = 0
    """Set by the trainer."""

    def should_validate(self, step: int) -> bool:
        return step % self.config.freq == 0 or step == self.last_step
