"""Writes the training metrics as TensorBoard scalars (by torchtitan) and as JSON lines for the driver and the report.

Rank 0 writes these files in the stage folder: metrics.jsonl, heldout.jsonl, expert_load.jsonl, data.jsonl. After a
resume the lines of steps that are trained again are removed, so every step has one line.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import Validator
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import utils

from core.inside import refuse_links
from core.json_lines import cut_last_lines, read_json_lines
from titan_ext.mobilemoe import load_metrics
from titan_ext.mobilemoe.tied_embedding_pp import broadcast_from_last_stage
from titan_ext.training.callbacks import Callback

FILES = ("metrics.jsonl", "expert_load.jsonl", "heldout.jsonl", "data.jsonl")
LOAD_LOGS = 20
"""One of so many records of expert_load.jsonl, the first and the last have every expert's load: most of its bytes."""
LAYER_SCALARS = ("max_over_mean", "entropy", "dead", "dropped", "router_entropy")


def sum_over_ranks(part: torch.Tensor, parallel_dims: ParallelDims) -> torch.Tensor:
    """Return the sum of a one-element tensor over the ranks that train on different tokens, no DTensor.

    This is a collective: every rank must call it.
    """
    if isinstance(part, DTensor):  # under tensor parallelism
        part = part.full_tensor()
    loss_mesh = parallel_dims.get_optional_mesh("loss")
    return part if loss_mesh is None else dist_utils.dist_sum_tensor(part, loss_mesh)


class StageMetrics(MetricsProcessor):
    """Logs torchtitan's metrics, and also writes loss, expert load and router z of a step as JSON lines."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def __init__(self, config: Config, *, parallel_dims: ParallelDims, dump_folder: str = "./outputs", **kwargs: Any):
        super().__init__(config, parallel_dims=parallel_dims, dump_folder=dump_folder, **kwargs)
        self._folder = Path(dump_folder)
        self._start_time = time.perf_counter()
        self._tokens_per_step = 0
        self._last_step = 0
        self._last_logged_step = 0
        self._callbacks: Sequence[Callback] = ()
        self._read_data_statistics: Callable[[], dict[str, Any]] = dict
        self._hash_sequences: Callable[[], int] = int

    def start_stage(
        self,
        *,
        first_step: int,
        last_step: int,
        tokens_per_step: int,
        callbacks: Sequence[Callback],
        read_data_statistics: Callable[[], dict[str, Any]],
        hash_sequences: Callable[[], int],
    ) -> None:
        """Prepare to log from `first_step` on, and remove the lines of this and later steps from the files.

        Such lines are later than the checkpoint that the stage resumes from.

        Args:
            last_step: last step of the stage. It is logged whatever `log_freq` is, so that the files are complete.
            tokens_per_step: number of tokens of an optimizer step over all ranks.
            callbacks: objects whose `metrics()` are logged.
            read_data_statistics: returns padding, repeats and tokens by domain of the batches this rank has taken.
            hash_sequences: returns this rank's part of the hash of all sequences of the stage
                (`StreamingLoader.hash_sequences`).
        """
        self._last_logged_step = first_step - 1
        self._last_step = last_step
        self._tokens_per_step = tokens_per_step
        self._callbacks = callbacks
        self._read_data_statistics = read_data_statistics
        self._hash_sequences = hash_sequences
        if dist.get_rank() == 0:
            for name in FILES:
                _keep_steps_before(first_step, self._folder / name)

    def is_last_step(self, step: int) -> bool:
        """Return whether the stage ends with this step."""
        return step == self._last_step

    def should_log(self, step: int) -> bool:
        """Return whether to log: every `log_freq` steps (torchtitan), and the last step."""
        return super().should_log(step) or self.is_last_step(step)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log a step. This is a collective: every rank must call it."""
        extra_metrics = extra_metrics or {}
        steps, self._last_logged_step = step - self._last_logged_step, step
        layers, means = load_metrics.collect(self.model_parts, self.parallel_dims)
        reported = {tag: value for callback in self._callbacks for tag, value in callback.metrics().items()}
        data = self._read_data_statistics()
        seconds = time.perf_counter() - self.time_last_log
        scalars = {"moe/router_z": means["router_z"], "moe/dropped": means["dropped"], **reported}
        scalars |= _name_layer_scalars(layers) | _name_data_scalars(data)
        super().log(step, global_avg_loss, global_max_loss, grad_norm, {**extra_metrics, **scalars})
        self._append(
            "metrics.jsonl",
            {
                "step": step,
                "tokens": int(extra_metrics["n_tokens_seen"]),
                "loss": global_avg_loss,
                "grad_norm": grad_norm,
                "lr": next(value for key, value in extra_metrics.items() if key.startswith("lr")),
                "tokens_per_second": steps * self._tokens_per_step / seconds,
                "router_z": means["router_z"],
                "dropped": means["dropped"],
                **{tag.rpartition("/")[2]: value for tag, value in reported.items()},
                "data_hash": self._hash_data(),
                "seconds": time.perf_counter() - self._start_time,
            },
        )
        is_whole = step == 1 or step % (self.config.log_freq * LOAD_LOGS) == 0 or self.is_last_step(step)
        self._append("expert_load.jsonl", {"step": step, "layers": layers if is_whole else _drop_loads(layers)})
        self._append("data.jsonl", {"step": step, **data})

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        """Log the held-out loss in nats a token.

        This is a collective, because only the last stage of a pipeline knows the loss: every rank must call it.
        """
        own_loss = torch.tensor(loss, dtype=torch.float64, device=utils.device_type)
        loss = float(broadcast_from_last_stage(own_loss, self.parallel_dims))
        super().log_validation(loss, step, extra_metrics)
        self._append("heldout.jsonl", {"step": step, "loss": loss})

    def has_heldout_loss(self, step: int) -> bool:
        """Return whether heldout.jsonl has the loss after this step."""
        return any(record["step"] == step for record in read_json_lines(self._folder / "heldout.jsonl"))

    def _hash_data(self) -> str:
        """Return 16 hex digits that change with any token that the stage has trained on so far, on any rank.

        This is a collective: every rank must call it.
        """
        part = self._hash_sequences()
        signed = part - 2**64 if part >= 2**63 else part  # the sum of integers wraps, as modulo 2**64 wants
        total = torch.tensor(signed, dtype=torch.int64, device=utils.device_type)
        # Ranks of one place in this mesh read the same sequences.
        if (mesh := self.parallel_dims.get_optional_mesh("batch")) is not None:
            dist.all_reduce(total, group=mesh.get_group())
        return f"{int(total) % 2**64:016x}"

    def _append(self, name: str, record: dict) -> None:
        if dist.get_rank() != 0:
            return
        with open(self._folder / name, "a", opener=refuse_links) as file:
            file.write(json.dumps(record) + "\n")


def _keep_steps_before(first_step: int, path: Path) -> None:
    """Remove the lines of `first_step` and later steps from the end of a file of JSON lines, if it exists."""
    if path.exists():
        cut_last_lines(path, lambda record: record["step"] >= first_step)


def _drop_loads(layers: list[dict]) -> list[dict]:
    return [{key: value for key, value in layer.items() if key != "load"} for layer in layers]


def _name_layer_scalars(layers: list[dict]) -> dict[str, float]:
    return {f"moe/layer_{i}/{key}": layer[key] for i, layer in enumerate(layers) for key in LAYER_SCALARS}


def _name_data_scalars(data: dict[str, Any]) -> dict[str, float]:
    scalars = {f"data/{key}": value for key, value in data.items() if not isinstance(value, dict)}
    return scalars | {f"data/epochs/{domain}": epochs for domain, epochs in data.get("epochs", {}).items()}


class HeldoutValidator(Validator):
    """torchtitan's Validator, run every `freq` steps and after the last one."""

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        pass

    def should_validate(self, step: int) -> bool:
        """Return whether the held-out loss is measured after this step."""
        assert isinstance(self.metrics_processor, StageMetrics)
        return step % self.config.freq == 0 or self.metrics_processor.is_last_step(step)
