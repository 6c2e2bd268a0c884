"""Files written tensor by tensor are, byte for byte, those that safetensors writes of all tensors at once."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from core.errors import RefusedInput
from eval.export.shards import SafetensorsFile, write_shards
from eval.export.tensor_layout import TensorSpec

DTYPES = (
    torch.uint8, torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32, torch.int64,
)  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
SPECS = st.builds(
    TensorSpec, st.sampled_from(DTYPES), st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
)  # fmt: skip


def fill(spec: TensorSpec, seed: int = 0) -> torch.Tensor:
    """Return random bytes as a tensor."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 64, (spec.nbytes,), dtype=torch.uint8, generator=generator)
    return values.view(spec.dtype).reshape(spec.shape)


def describe(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@settings(max_examples=100, deadline=None)
@given(specs=st.dictionaries(NAMES, SPECS, min_size=1, max_size=8), data=st.data())
def test_a_file_has_the_bytes_of_save_file(specs, data, tmp_path_factory):
    tensors = {name: fill(spec, seed) for seed, (name, spec) in enumerate(specs.items())}
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    file = SafetensorsFile(path, specs, {"format": "pt"})
    for name in data.draw(st.permutations(list(tensors))):
        file.write(name, tensors[name])
    assert path.read_bytes() == save(tensors, metadata={"format": "pt"})


def test_a_transposed_tensor_is_written_by_its_values(tmp_path):
    tensor = torch.arange(12.0).view(3, 4).T
    SafetensorsFile(tmp_path / "file", {"a": TensorSpec(torch.float32, (4, 3))}, {}).write("a", tensor)
    assert torch.equal(load_file(tmp_path / "file")["a"], tensor)


def save_at_once(tensors: dict[str, torch.Tensor], folder: Path, max_shard_bytes: int) -> None:
    """Write a folder with safetensors' own function, each shard from memory, as an independent reference."""
    folder.mkdir()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    n, weight_map = len(shards), {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{n:05d}.safetensors" if n > 1 else "model.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if n > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@settings(max_examples=50, deadline=None)
@given(specs=st.dictionaries(NAMES, SPECS, min_size=1, max_size=8), limit=st.integers(1, 400), data=st.data())
def test_a_folder_of_shards_is_that_of_save_file(specs, limit, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    tensors = {name: fill(spec, seed) for seed, (name, spec) in enumerate(specs.items())}
    save_at_once(tensors, root / "expected", limit)
    (root / "found").mkdir()
    order = data.draw(st.permutations(list(tensors)))
    write_shards(((name, tensors[name]) for name in order), specs, root / "found", limit)
    names = sorted(path.name for path in (root / "expected").iterdir())
    assert sorted(path.name for path in (root / "found").iterdir()) == names
    for name in names:
        expected, found = ((root / folder / name).read_bytes() for folder in ("expected", "found"))
        assert json.loads(found) == json.loads(expected) if name.endswith("json") else found == expected, name


def test_at_most_one_tensor_is_alive(tmp_path):
    """A tensor that a generator has given is dropped before the generator makes the next one."""
    alive, most = set(), 0

    class Watched(torch.Tensor):
        def __del__(self):
            alive.discard(id(self))

    def make():
        nonlocal most
        for name in layout:
            tensor = torch.ones(4).as_subclass(Watched)
            alive.add(id(tensor))
            most = max(most, len(alive))
            yield name, tensor
            del tensor

    layout = {name: TensorSpec(torch.float32, (4,)) for name in "abcd"}
    write_shards(make(), layout, tmp_path, 32)
    assert most == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b": None}, r"b \[3\] is missing"),
        ({"c": torch.ones(2)}, r"c \[2\]: is not a tensor of this model"),
        ({"b": torch.ones(4)}, r"b \[4\]: expected \[3\]"),
        ({"b": torch.tensor([1.0, float("nan"), 1.0])}, "b holds NaN or infinite values"),
    ],
)
def test_other_tensors_than_the_planned_ones_are_refused(tmp_path, change, words):
    tensors = {"a": torch.ones(2), "b": torch.ones(3)}
    layout = describe(tensors)
    changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    with pytest.raises(RefusedInput, match=words):
        write_shards(changed.items(), layout, tmp_path, 1000)
