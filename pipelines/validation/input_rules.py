"""Rules for what a run reads (data, tokenizer, initial model), its evaluation, its export and its cluster."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import RefusedInput
from data.planning import TOKEN_BYTES
from eval.config import EvaluationConfig
from pipelines.preflight import find_existing_parent
from pipelines.recipe import Recipe
from pipelines.validation.problems import Problem, find_nonpositive
from titan_ext.cards import CARDS, GPUS_PER_NODE
from titan_ext.loader.order import HELD_SHARDS, list_sections

if TYPE_CHECKING:
    from eval.benchmarks.suites import Benchmark


def find_start_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield the broken rules of the start: every stage trains, or the first ones pass on an initial model."""
    passes_on = bool(recipe.initial_model)
    for name, stage in recipe.stages.items():
        passes_on = passes_on and stage.steps == 0 and name != "qat"
        if stage.steps <= 0 and not passes_on:
            rule = "must be above 0; only the first stages, and never qat, may pass on an initial_model with 0 steps"
            yield Problem(f"stages.{name}.steps", stage.steps, rule, "set a positive number, or --initial-model FOLDER")
    if recipe.initial_model:
        yield from _find_initial_model_problems(Path(recipe.initial_model), recipe)


def _find_initial_model_problems(folder: Path, recipe: Recipe) -> Iterator[Problem]:
    """Yield the broken rules of an initial model: it fits the recipe's dimensions and brings its tokenizer.

    Every tensor is read once: the step that imports the weights comes after days of data.
    """
    if not recipe.data.tokenizer.path:
        rule = "a model that is trained already knows the tokens of its own tokenizer"
        yield Problem("data.tokenizer.path", "", rule, f"give the one it was trained with, {folder} if it is there")
    from eval.export.dimensions import dims_from_config
    from eval.export.tensor_files import check_checkpoint

    try:
        found = dataclasses.asdict(dims_from_config(check_checkpoint(folder)))
    except RefusedInput as error:
        yield Problem("initial_model", str(folder), str(error), "give a folder in the released format")
        return
    yield from _find_tokenizer_differences(folder, recipe)
    for name, wanted in dataclasses.asdict(recipe.model).items():
        if found[name] != wanted:
            rule = f"initial_model {folder} has {found[name]!r}"
            yield Problem(f"model.{name}", wanted, rule, "give the recipe the model's own dimensions")


def _find_tokenizer_differences(folder: Path, recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem if the recipe's tokenizer gives a token of the initial model's another id.

    Tokens that only one of them has are fine: a tokenizer may name reserved rows anew.
    """
    from eval.hf_mobilemoe.folder_mobilemoe import read_token_ids

    path = Path(recipe.data.tokenizer.path)
    chosen, own = (place / "tokenizer.json" if place.is_dir() else place for place in (path, folder))
    if not (recipe.data.tokenizer.path and chosen.is_file() and own.is_file()):
        return
    try:
        ids, own_ids = read_token_ids(chosen), read_token_ids(own)
    except ValueError as error:
        yield Problem("data.tokenizer.path", str(path), str(error), f"give the tokenizer of {folder}")
        return
    for token in own_ids:
        if ids.get(token, own_ids[token]) != own_ids[token]:
            rule = f"it gives {token!r} the id {ids[token]}, the tokenizer of initial_model {own_ids[token]}"
            yield Problem("data.tokenizer.path", str(path), rule, f"give {folder}")
            return


def find_data_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield the broken rules of the data, and of the tokenizer against the model's vocabulary."""
    from data import validate_config

    try:
        validate_config.validate_config(recipe.data)
    except RefusedInput as error:
        yield Problem("data", recipe.name, str(error), "correct the field named")
        return
    yield from _find_domain_problems(recipe)
    if recipe.data.tokenizer.path:
        field, size = "data.tokenizer.path", read_tokenizer_size(Path(recipe.data.tokenizer.path))
        value: Any = recipe.data.tokenizer.path
    else:
        field, size = "data.tokenizer.train_vocab_size", recipe.data.tokenizer.train_vocab_size
        value = size
    if size > recipe.model.vocab_size:
        rule = f"the tokenizer has {size} entries, model.vocab_size = {recipe.model.vocab_size} has no row for them all"
        yield Problem(field, value, rule, f"choose a smaller tokenizer, or set --model.vocab-size {size}")
    if not recipe.data.tokenizer.path and size < recipe.model.vocab_size:
        rule = f"a tokenizer of {size} entries leaves rows of model.vocab_size = {recipe.model.vocab_size} unused"
        yield Problem(field, value, rule, "give --data.tokenizer.path, or give both the same value")


def _find_domain_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem for each domain of a mixture that no corpus of the recipe gives."""
    from data.catalogue.corpora import CATALOGUE

    corpora = [CATALOGUE[name] for name in recipe.data.corpora]
    for name, stage in recipe.stages.items():
        kind = "sft" if stage.shards == "sft" else "text"
        there = sorted({corpus.domain for corpus in corpora if corpus.kind == kind})
        for domain, share in stage.mixture.items():
            if share and domain not in there:
                rule = f"no corpus of data.corpora gives {kind} of this domain (they give {', '.join(there)})"
                yield Problem(f"stages.{name}.mixture.{domain}", share, rule, "add a corpus, or set the share to 0")


def read_tokenizer_size(path: Path) -> int:
    """Return the highest token id + 1 of a tokenizer.json, or of the one in a folder.

    Raises:
        RefusedInput: there is no such file, or it is no tokenizer.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise RefusedInput(
            f"data.tokenizer.path = {str(path)!r}: {file} does not exist; give a folder with tokenizer.json"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        added = [token["id"] for token in content.get("added_tokens", [])]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RefusedInput(f"data.tokenizer.path: {file} is no Hugging Face tokenizer.json ({error!r})") from error
    ids = list(vocab.values()) if isinstance(vocab, dict) else range(len(vocab))
    return max([*ids, *added], default=-1) + 1


def find_evaluation_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield the broken rules of the evaluation."""
    from eval.benchmarks.items import find_given
    from eval.benchmarks.suites import FOUNDATIONAL, SUITES

    config = recipe.evaluation
    if config.suite not in SUITES:
        yield Problem("evaluation.suite", config.suite, "is no suite", f"choose one of {', '.join(sorted(SUITES))}")
    else:
        yield from _find_benchmark_problems(config, SUITES[config.suite])
    for name in config.quick_benchmarks:
        if name not in [benchmark.key for benchmark in FOUNDATIONAL]:
            rule = "is no benchmark of the suite foundational"
            yield Problem("evaluation.quick_benchmarks", name, rule, "choose among those of `mobilemoe eval --help`")
    if config.items_folder:
        try:
            find_given(Path(config.items_folder))
        except RefusedInput as error:
            yield Problem("evaluation.items_folder", config.items_folder, str(error), "correct the folder")
    if config.limit is not None and config.limit <= 0:
        yield Problem("evaluation.limit", config.limit, "must be above 0", "leave it out to take all items")
    yield from find_nonpositive("evaluation", config, ("batch_tokens", "heldout_tokens"))


def _find_benchmark_problems(config: EvaluationConfig, suite: "Sequence[Benchmark]") -> Iterator[Problem]:
    """Yield the benchmarks that the suite lacks, that have no items, or that need a permission."""
    known = {benchmark.key: benchmark for benchmark in suite}
    for name in config.benchmarks:
        if name not in known:
            rule = f"is no benchmark of the suite {config.suite}"
            yield Problem("evaluation.benchmarks", name, rule, f"choose among {', '.join(known)}")
        elif known[name].items.place == "folder" and not config.items_folder:
            way_out = "give evaluation.items_folder, or leave it out"
            yield Problem("evaluation.benchmarks", name, "has no items in a registry", way_out)
    code = [key for key, b in known.items() if b.runs_code and (not config.benchmarks or key in config.benchmarks)]
    if code and not config.run_generated_code:
        rule = f"{', '.join(code)} run code that the model writes"
        yield Problem("evaluation.run_generated_code", False, rule, "set it, or choose other evaluation.benchmarks")


def find_cluster_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield the broken rules of the cluster."""
    cluster = recipe.cluster
    yield from find_nonpositive("cluster", cluster, ("cpus_per_worker", "cpus_per_task", "gpu_memory", "network_gbits"))
    if cluster.gpu not in CARDS:
        yield Problem("cluster.gpu", cluster.gpu, "is no GPU whose speed is known", f"choose one of {', '.join(CARDS)}")
    if cluster.gpus_per_worker not in (0, 1):
        rule = "a rank drives one GPU or none"
        yield Problem("cluster.gpus_per_worker", cluster.gpus_per_worker, rule, "set 0 or 1")
    if cluster.max_failures < 0:
        yield Problem("cluster.max_failures", cluster.max_failures, "must not be negative", "set 0 for no restart")
    yield from find_shard_cache_problems(recipe)


def find_shard_cache_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield the broken rules of the cache for unpacked shards: its folder, and a size that holds the shards in use.

    A folder on the nodes of a cluster is tried when a stage starts there.
    """
    cache = recipe.cluster.shard_cache
    yield from find_nonpositive("cluster.shard_cache", cache, ("size_bytes",))
    field, folder = "cluster.shard_cache.folder", Path(cache.folder)
    if cache.folder and not folder.is_absolute():
        yield Problem(field, cache.folder, "is a folder on every node, so its path must be absolute", "begin with /")
    elif cache.folder and not recipe.cluster.ray_address:
        parent = find_existing_parent(folder)
        if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            yield Problem(field, cache.folder, f"{parent} is no folder that can be written to", "name another folder")
    field, needed = "cluster.shard_cache.size_bytes", estimate_shard_cache(recipe)
    if cache.size_bytes < needed:
        rule = f"the shards that the ranks of a node use and fetch ahead take up to {needed}"
        yield Problem(field, cache.size_bytes, rule, f"set it to at least {needed}, or lower data.shard_bytes")


def estimate_shard_cache(recipe: Recipe) -> int:
    """Return the bytes of unpacked shards that a node needs at a time, the most of all stages.

    All ranks without a GPU are on one node, and GPUS_PER_NODE with one. The shards do not exist yet, so all are taken
    for full; together they are at most as large as the text of the corpora, at one token a byte.
    """
    from data import validate_config
    from data.catalogue.corpora import CATALOGUE

    parallel, size, largest = recipe.parallel, recipe.data.shard_bytes, 0
    ranks = GPUS_PER_NODE if recipe.cluster.gpus_per_worker and recipe.cluster.ray_address else parallel.world_size
    data_ranks, node_ranks = parallel.data_parallel, parallel.count_data_ranks(ranks)
    for _, stage in recipe.stages.items():
        batch = stage.global_batch_size
        if data_ranks > 0 and batch > 0 and batch % data_ranks == 0:  # else another rule is broken
            sections = list_sections(batch, data_ranks, 0, node_ranks)
            largest = max(largest, len(stage.mixture) * len(sections) * HELD_SHARDS * size)
    known = dataclasses.replace(recipe.data, corpora=tuple(name for name in recipe.data.corpora if name in CATALOGUE))
    return min(largest, TOKEN_BYTES * validate_config.estimate_bytes(known))
