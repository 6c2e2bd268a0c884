"""A change of a recipe touches the steps that depend on it; and the check between data and training."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.engine.fingerprints import fingerprint
from pipelines.steps import STEPS
from pipelines.steps.build_steps import build_steps
from pipelines.steps.context import Context
from pipelines.steps.data import check_domains
from pipelines.steps.train import drop_empty_domains
from tests.pipelines.test_recipes import change


def touched(recipe, path, value):
    """Steps whose fingerprint changes with a field, through their inputs too."""

    def fingerprints(recipe):
        made = {}
        for step in build_steps(Context(recipe, Path("run"), None, print), "items==1"):
            made[step.name] = fingerprint(step, {name: made[name] for name in step.needs})
        return made

    before, after = fingerprints(recipe), fingerprints(change(recipe, path, value))
    assert tuple(before) == STEPS
    return [name for name in STEPS if before[name] != after[name]]


@pytest.mark.parametrize(
    ("path", "value", "steps"),
    [
        ("parallel.world_size", 4, []),
        ("parallel.expert_parallel", 1, []),
        ("stages.pretrain.local_batch_size", 4, []),
        ("stages.pretrain.checkpoint_interval", 7, []),
        ("stages.pretrain.checkpoint_minutes", 7.0, []),
        ("stages.pretrain.checkpoint_permanent_tokens", 7e9, []),
        ("cluster.cpus_per_worker", 9, []),
        ("data.workers", 9, []),
        ("evaluation.batch_tokens", 9, []),
        ("evaluation.limit", 9, ["eval", "profile", "report"]),
        ("export.max_shard_bytes", 9, ["export", "eval", "package", "profile", "report"]),
        ("export.formats", ("gguf",), ["package", "profile", "report"]),
        ("export.profile_contexts", (64,), ["profile", "report"]),
        ("quantization.expert_group_size", 64, ["qat", *STEPS[7:]]),
        ("stages.sft.learning_rate", 1.0, ["sft", "qat", *STEPS[7:]]),
        ("stages.pretrain.steps", 9, [*STEPS[3:]]),
        ("data.heldout_fraction", 0.1, [*STEPS[2:]]),
        ("data.tokenizer.template_date", "2024-07-26", [*STEPS[2:]]),
        ("seed", 1, [*STEPS[2:]]),
        ("data.corpora", ("c4-sample",), [*STEPS]),
    ],
)
def test_a_change_touches_what_depends_on_it(smoke, path, value, steps):
    assert touched(smoke, path, value) == steps


def test_another_tokenizer_at_the_same_path_is_another_run(smoke, tmp_path):
    recipe = change(smoke, "data.tokenizer.path", str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")

    def identify() -> str:
        steps = {step.name: step for step in build_steps(Context(recipe, Path("run"), None, print), "items==1")}
        return fingerprint(steps["data"], {})

    found = [identify()]
    for name, text in (("tokenizer.json", "{ }"), ("chat_template.jinja", "a"), ("tokenizer_config.json", "{}")):
        (tmp_path / name).write_text(text)
        found.append(identify())
    assert len(set(found)) == 4
    (tmp_path / "README.md").write_text("other files decide no token")
    assert identify() == found[-1]


def test_domain_without_shards_is_refused_before_training(smoke, tmp_path):
    for folder in ("shards/pretrain", "shards/midtrain", "shards/sft", "heldout/pretrain", "heldout/sft"):
        kind = smoke.stages.sft if folder.endswith("sft") else smoke.stages.pretrain
        for domain in kind.mixture:
            (tmp_path / folder / domain).mkdir(parents=True)
            (tmp_path / folder / domain / "index.json").touch()
    check_domains(smoke, tmp_path)
    (tmp_path / "shards/sft/tool_use/index.json").unlink()
    with pytest.raises(ValueError, match=r"stages\.sft\.mixture: shards/sft has no tool_use, only chat.*--from fetch"):
        check_domains(smoke, tmp_path)
    sft = replace(smoke.stages.sft, mixture=smoke.stages.sft.mixture | {"tool_use": 0.0})
    assert "tool_use" not in drop_empty_domains(sft).mixture
    check_domains(replace(smoke, stages=replace(smoke.stages, sft=sft, qat=replace(sft, quantize=True))), tmp_path)
