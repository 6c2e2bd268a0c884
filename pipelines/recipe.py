"""`Recipe`: everything that defines a run, as one frozen dataclass tree.

A recipe is a Python function that returns one (pipelines/recipes/); the command line overrides any leaf by its dotted
path. `pipelines.validation.validate_recipe` refuses impossible combinations before anything starts.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from data.config import DataConfig
from eval.config import EvaluationConfig, ExportConfig
from titan_ext.cards import CardName, Machine, describe_machine
from titan_ext.config import ModelDims, ParallelConfig, ShardCacheConfig, StageConfig
from titan_ext.quantization.config import QuantizationConfig


@dataclass(frozen=True)
class Stages:
    """The four training stages, in the order they run (arXiv 2605.27358)."""

    pretrain: StageConfig
    midtrain: StageConfig
    sft: StageConfig
    qat: StageConfig

    def items(self) -> list[tuple[str, StageConfig]]:
        """Return (name, stage) of each stage, in training order."""
        return [(f.name, self.get(f.name)) for f in dataclasses.fields(self)]

    def get(self, name: str) -> StageConfig:
        """Return the stage of that name."""
        return getattr(self, name)


@dataclass(frozen=True)
class ClusterConfig:
    """The cluster that the steps run on. Nothing here changes a result, so nothing here makes a finished step stale."""

    ray_address: str = ""
    """Empty starts a Ray of its own on this machine; `auto` or host:port joins a running cluster."""
    cpus_per_worker: int = 1
    """CPUs of one training rank, and its OMP_NUM_THREADS."""
    gpus_per_worker: int = 0
    """GPUs of one training rank (0 or 1)."""
    gpu: CardName = "H100"
    """Kind of the GPUs. Layouts are chosen, and tokens a second computed, for it (titan_ext/cards.py)."""
    gpu_memory: int | None = None
    """Memory of one GPU in bytes; None takes what `gpu` has. A layout whose estimate leaves less than a tenth of it to
    the allocator, NCCL and the driver is refused; 0 GPUs a worker check nothing."""
    network_gbits: float = 400.0
    """Gigabits a second that a GPU receives from other nodes: what a node receives, over its GPUs."""
    cpus_per_task: int = 2
    """CPUs of one export or evaluation task."""
    max_failures: int = 3
    """Restarts of a stage's gang of workers, from its last checkpoint, before the stage counts as failed."""
    hang_minutes: float = 30.0
    """Time without a new training step after which a rank counts as hung: it ends, with the stacks of its threads in
    its log, and the gang is started again. It must be longer than the longest step, held-out loss and checkpoint
    included; 0 waits for ever."""
    shard_cache: ShardCacheConfig = field(default_factory=ShardCacheConfig)
    dashboard_port: int = 0
    """Port of the dashboard of a Ray started here; 0 takes a free one."""

    @property
    def machine(self) -> Machine | None:
        """Return the GPUs and the network that layouts are chosen for; None where ranks have no GPU."""
        return describe_machine(self.gpu, self.network_gbits, self.gpu_memory) if self.gpus_per_worker else None


@dataclass(frozen=True)
class Recipe:
    """The configuration of one run: model, data, four stages, evaluation, export, cluster."""

    name: str
    model: ModelDims
    data: DataConfig
    stages: Stages
    parallel: ParallelConfig
    initial_model: str = ""
    """Hugging Face folder in the released format, BF16 or INT4, whose weights training starts from instead of random
    ones. The first stages may then have 0 steps: they pass the weights on to the next stage."""
    seed: int = 0
    """Seed of the data step's splits and generated samples, and of every training stage."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """INT4 groups that the qat stage trains and the INT4 artifacts have."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as JSON-ready nested dicts; tuples become lists."""
    return _plain(dataclasses.asdict(recipe))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
