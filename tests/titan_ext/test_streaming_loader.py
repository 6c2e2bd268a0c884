"""StreamingLoader over real MDS folders: order on any number of ranks, mixture, resume, refused input."""

import json
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import MDSWriter, Stream

from core.errors import RefusedInput
from tests.titan_ext.stage_of_shards import (
    DOCUMENTS,
    MIXTURE,
    PAD,
    G,
    L,
    build,
    load_stock_readers,
    rows,
    sequences,
    write_domain,
)
from titan_ext.loader.packing import IGNORE_INDEX


def merge_states(loaders):
    """Merge the states of the ranks as torch.distributed.checkpoint does."""
    return {key: value for loader in loaders for key, value in loader.state_dict().items()}


def test_batches_have_the_shape_torchtitan_wants(stage, cache):
    inputs, labels = next(iter(build(stage, cache, batch=4)))
    assert set(inputs) == {"input", "positions"}
    for tensor in (*inputs.values(), labels):
        assert tensor.shape == (4, L) and tensor.dtype == torch.int64
    assert (labels == inputs["input"] + 1).all()  # every token of the stage is the one before plus 1
    assert ((inputs["positions"] == 0).sum(1) > 1).any()  # several documents in a sequence


@pytest.mark.parametrize(("world", "batch"), [(2, 1), (4, 1), (8, 1), (1, 4), (2, 2), (2, 4)])
def test_global_batches_are_the_same_on_any_number_of_ranks(stage, cache, world, batch):
    one = sequences([build(stage, cache)], 3 * G)
    many = sequences([build(stage, cache, r, world, batch=batch) for r in range(world)], 3 * G // (world * batch))
    np.testing.assert_array_equal(one, many)


def test_resume_is_exact_after_every_micro_batch(stage, cache):
    expected = sequences([build(stage, cache)], 2 * G + 4)
    loader = build(stage, cache)
    iterator = iter(loader)
    for taken in range(2 * G):
        resumed = build(stage, cache)
        resumed.load_state_dict(loader.state_dict())
        np.testing.assert_array_equal(sequences([resumed], 4), expected[taken : taken + 4])
        next(iterator)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_resume_on_another_number_of_ranks(stage, cache, before, after):
    expected = sequences([build(stage, cache)], 5 * G)
    for steps in (1, 2, 3):
        old = [build(stage, cache, r, before) for r in range(before)]
        sequences(old, steps * G // before)
        new = [build(stage, cache, r, after) for r in range(after)]
        for loader in new:
            loader.load_state_dict(merge_states(old))
        np.testing.assert_array_equal(sequences(new, 2 * G // after), expected[steps * G : (steps + 2) * G])


@settings(max_examples=8, deadline=None)
@given(
    rows_by_12=st.integers(1, 12), before=st.sampled_from([1, 2, 3, 4]), after=st.sampled_from([1, 2, 4]),
    cut=st.integers(0, 2),
)  # fmt: skip
def test_any_global_batch_is_the_same_on_all_numbers_of_ranks_also_where_they_share_sections(
    stage, cache, rows_by_12, before, after, cut
):
    """A batch of 36, say, has 18 sections of 2 lanes, and rank 0 of 4 has the first lane of the fifth one."""
    batch = 12 * rows_by_12
    expected = sequences([build(stage, cache, global_batch_size=batch)], 3 * batch)
    old = [build(stage, cache, r, before, global_batch_size=batch) for r in range(before)]
    found = sequences(old, cut * batch // before) if cut else expected[:0]
    new = [build(stage, cache, r, after, global_batch_size=batch) for r in range(after)]
    for loader in new:
        loader.load_state_dict(merge_states(old))
    found = np.concatenate([found, sequences(new, (3 - cut) * batch // after)])
    np.testing.assert_array_equal(found, expected)


def test_the_hash_of_all_sequences_is_the_same_on_any_number_of_ranks_and_after_a_resume(stage, cache):
    """It changes with the seed and from step to step."""

    def hash_after(steps, world, state=None, **changes):
        loaders = [build(stage, cache, r, world, **changes) for r in range(world)]
        for loader in loaders:
            loader.load_state_dict(state or {})
        sequences(loaders, steps * G // world)
        return sum(loader.hash_sequences() for loader in loaders) % 2**64, merge_states(loaders)

    whole = {steps: hash_after(steps, 1)[0] for steps in (1, 2, 3)}
    assert len(set(whole.values())) == 3
    for before, after in ((2, 4), (8, 1), (4, 2)):
        found, state = hash_after(1, before)
        assert found == whole[1] and hash_after(2, after, state)[0] == whole[3]
    assert hash_after(1, 2, seed=1)[0] != whole[1]


def test_state_within_a_step_resumes_on_ranks_that_fit_it_only(stage, cache):
    expected = sequences([build(stage, cache)], G)
    pair = [build(stage, cache, r, 2) for r in range(2)]
    for loader in pair:
        list(islice(loader, 2))
    state = merge_states(pair)
    for r in range(2):
        resumed = build(stage, cache, r, 2)
        resumed.load_state_dict(state)
        np.testing.assert_array_equal(sequences([resumed], 2), expected[4 * r + 2 : 4 * r + 4])
        build(stage, cache, r, 2, batch=2).load_state_dict(state)
    for other in (build(stage, cache), build(stage, cache, 0, 4), build(stage, cache, 0, 2, batch=4)):
        with pytest.raises(RefusedInput, match=r"after 4 sequences on 2 ranks.*between two steps"):
            other.load_state_dict(state)


def test_no_document_comes_twice_in_an_epoch(stage, cache):
    loader = build(stage, cache, mixture={"web": 1.0})
    taken = sequences([loader], 2 * G)
    epochs = loader.statistics()["epochs"]["web"]
    assert 0.1 < epochs < 1
    tokens = taken[:, 0].ravel()
    assert len(set(tokens)) == len(tokens)


def test_mixture_holds_for_the_tokens(stage, cache):
    loader = build(stage, cache)
    taken = sequences([loader], 40 * G)
    tokens = {name: ((taken[:, 0] // 1_000_000) == d + 1).sum() for d, name in enumerate(DOCUMENTS)}
    statistics = loader.statistics()
    assert statistics["tokens"] == tokens
    total = sum(tokens.values())
    for name, share in MIXTURE.items():
        assert abs(tokens[name] - share * total) <= 2 * 40 * G  # two documents a lane
    assert statistics["padding"] == 0 and statistics["sequences"] == 40 * G
    assert statistics["epochs"]["code"] > 1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_finite_pass_has_every_document_once_and_ends_on_all_ranks_together(stage, cache, world):
    loaders = [build(stage, cache, r, world, infinite=False, mixture={}, batch=2) for r in range(world)]
    batches = [[rows(batch) for batch in loader] for loader in loaders]
    assert len({len(b) for b in batches}) == 1
    taken = np.concatenate([rank[i] for i in range(len(batches[0])) for rank in batches])
    tokens = taken[:, 0][taken[:, 2] != IGNORE_INDEX]
    assert len(set(tokens)) == len(tokens) == sum(loaders[0].statistics()["tokens"].values())
    documents = {name: read_documents(stage / name) for name in DOCUMENTS}
    assert set(tokens) == {t for domain in documents.values() for document in domain for t in document[:-1]}
    # The same sequences, in the same order, as one rank has; only the last batch's padding differs.
    one = sequences([build(stage, cache, infinite=False, mixture={})], len(taken) - 2 * world)
    np.testing.assert_array_equal(taken[: len(one)], one)
    again = [rows(batch) for batch in loaders[0]]
    np.testing.assert_array_equal(again, batches[0])


def read_documents(folder):
    """Return the documents of a folder through streaming's own reader."""
    copy = folder.parent.parent / f"copy-{folder.name}"
    stream = Stream(remote=str(folder), local=str(copy), validate_hash="xxh64", keep_zip=False, download_retry=1,
                    download_timeout=10)  # fmt: skip
    documents = []
    for reader in load_stock_readers(stream):
        stream.prepare_shard(reader)
        documents += [reader.get_item(i)["tokens"].tolist() for i in range(len(reader))]
    return documents


def test_a_finite_pass_resumes_and_a_finished_one_stays_finished(stage, cache):
    finite = dict(infinite=False, mixture={})
    whole = [rows(batch) for batch in build(stage, cache, **finite)]
    loader, resumed, done = (build(stage, cache, **finite) for _ in range(3))
    sequences([loader], 5)
    resumed.load_state_dict(loader.state_dict())
    np.testing.assert_array_equal([rows(batch) for batch in resumed], whole[5:])
    done.load_state_dict(resumed.state_dict())
    assert list(done) == []


def test_conversations_are_whole_and_only_their_answers_are_targets(tmp_path):
    rng = np.random.default_rng(1)
    lengths = np.array([2, 40, *rng.integers(2, 20, 60)])
    starts = np.cumsum(lengths + 5) - lengths + 1000
    masks = [(np.arange(n) >= n // 2).astype(np.uint8) for n in lengths]
    masks[5][:] = 0
    write_domain(tmp_path / "sft/chat", [np.arange(n) + s for n, s in zip(lengths, starts, strict=True)], masks)
    loader = build(tmp_path / "sft", tmp_path / "cache", mixture={}, infinite=False)
    targets = []
    for batch in loader:
        ((tokens, positions, labels),) = rows(batch)
        filled = tokens != PAD
        assert (np.diff(positions)[filled[1:] & (positions[1:] > 0)] == 1).all()
        assert (np.diff(tokens)[filled[1:] & (positions[1:] > 0)] == 1).all()
        assert set(tokens[filled & (positions == 0)]) <= set(starts)  # no conversation goes on from another sequence
        assert (labels[~filled] == IGNORE_INDEX).all()
        targets += labels[labels != IGNORE_INDEX].tolist()
    expected = [
        t
        for n, s, m in zip(lengths, starts, masks, strict=True)
        for t in (np.arange(n) + s)[1 : L + 1][m[1 : L + 1] == 1]
    ]
    assert sorted(targets) == sorted(expected)
    statistics = loader.statistics()
    assert statistics["truncated"] == 1 and statistics["skipped"] == 1 and 0 < statistics["padding"] < 1


# --- refused input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixture": {"web": 0.5, "math": 0.4}}, "sums to 0.9"),
        ({"mixture": {"web": 1.5, "math": -0.5}}, "not positive.*math"),
        ({"mixture": {"web": float("nan"), "math": 0.5}}, "not positive.*web"),
        ({"mixture": {"web": 0.5, "law": 0.5}}, r"law.*present: \['code', 'math', 'web'\]"),
        ({"global_batch_size": 6, "world": 2, "batch": 2}, "global_batch_size is 6.*multiple of .*= 4"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"seq_len": 1}, "seq_len is 1"),
        ({"cache_bytes": 0}, "cache_bytes is 0"),
    ],
)
def test_bad_configuration_is_refused(stage, cache, change, message):
    with pytest.raises(RefusedInput, match=message):
        build(stage, cache, **change)


def test_a_rank_outside_of_its_world_is_an_error_of_the_program(stage, cache):
    with pytest.raises(AssertionError, match="2"):
        build(stage, cache, rank=2, world=2)


def test_bad_folders_are_refused(stage, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(RefusedInput, match=r"no folder with an index.json"):
        build(tmp_path / "nothing", cache, mixture={})
    with pytest.raises(RefusedInput, match="never written to"):
        build(stage, stage / "cache")
    write_domain(tmp_path / "s/empty", [])
    with pytest.raises(RefusedInput, match=r"'empty'.*no documents"):
        build(tmp_path / "s", cache, mixture={"empty": 1.0})
    write_domain(tmp_path / "t/web", [[1, 2, 3]], hashes=["sha1"])
    with pytest.raises(RefusedInput, match="no xxh64"):
        build(tmp_path / "t", cache, mixture={"web": 1.0})
    with MDSWriter(out=str(tmp_path / "u/web"), columns={"text": "str"}, hashes=["xxh64"]) as writer:
        writer.write({"text": "a"})
    with pytest.raises(RefusedInput, match="columns"):
        build(tmp_path / "u", cache, mixture={"web": 1.0})
    shutil.copytree(stage, tmp_path / "v")
    (tmp_path / "v/math/index.json").unlink()
    with pytest.raises(RefusedInput, match=r"math.*present: \['code', 'web'\]"):
        build(tmp_path / "v", cache)
    (tmp_path / "v/math/index.json").write_text('{"version": 2, "sha')
    with pytest.raises(RefusedInput, match=r"index.json is damaged"):
        build(tmp_path / "v", cache)


def test_domains_with_nothing_to_train_on_are_refused_by_name(tmp_path):
    write_domain(tmp_path / "s/good", [np.arange(20)] * 3)
    write_domain(tmp_path / "s/short", [[1]] * 40)
    write_domain(tmp_path / "t/unmasked", [[1, 2, 3]] * 4, masks=[[1, 0, 0]] * 4)
    with pytest.raises(RefusedInput, match=r"'short'.*none of its 40 documents.*longest has 1 tokens"):
        list(islice(build(tmp_path / "s", tmp_path / "c", mixture={"good": 0.5, "short": 0.5}), 4))
    for name, shards, skipped in (("short", "s", 40), ("unmasked", "t", 4)):
        for infinite, message in ((True, rf"'{name}'.*none of its"), (False, rf"the {skipped} documents .*{name}")):
            with pytest.raises(RefusedInput, match=message):
                next(iter(build(tmp_path / shards, tmp_path / "c", mixture={name: 1.0}, infinite=infinite)))


def test_documents_too_short_to_train_on_are_skipped_among_others(tmp_path):
    write_domain(tmp_path / "s/web", [[1], [2, 3, 4], [5]])
    loader = build(tmp_path / "s", tmp_path / "c", mixture={"web": 1.0}, infinite=False)
    (batch,) = loader
    assert rows(batch)[0, 0, :2].tolist() == [2, 3] and loader.statistics()["skipped"] == 2


def test_fewer_documents_than_lanes_and_ranks_repeat(tmp_path):
    write_domain(tmp_path / "s/web", [[1, 2, 3], [4, 5, 6]])
    loaders = [build(tmp_path / "s", tmp_path / "c", r, 4, mixture={"web": 1.0}) for r in range(4)]
    taken = sequences(loaders, 2)
    assert len(taken) == G and set(taken[:, 0].ravel()) == {1, 2, 4, 5}


@pytest.mark.parametrize("damage", [{"samples": -1}, {"raw_data": {"bytes": 0}}])
def test_an_index_of_impossible_sizes_is_refused(tmp_path, damage):
    write_domain(tmp_path / "s/web", [[1, 2, 3]])
    path = tmp_path / "s/web/index.json"
    index = json.loads(path.read_text())
    for key, value in damage.items():
        index["shards"][0][key] = index["shards"][0][key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(index))
    with pytest.raises(RefusedInput, match=r"s/web/index.json is damaged"):
        build(tmp_path / "s", tmp_path / "c", mixture={"web": 1.0})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mixture": {"code": 0.3, "math": 0.2, "web": 0.5}}, "mixture"),
        ({"seed": 4}, "seed: 3 in the checkpoint, 4 now"),
        ({"seq_len": 64}, "seq_len: 32"),
        ({"global_batch_size": 4}, "global_batch_size: 8"),
        ({"infinite": False}, "infinite"),
    ],
)
def test_a_state_of_another_run_is_refused(stage, cache, change, named):
    loader = build(stage, cache)
    sequences([loader], 1)
    with pytest.raises(RefusedInput, match=named):
        build(stage, cache, **change).load_state_dict(loader.state_dict())


def test_a_state_of_other_data_is_refused(stage, cache, tmp_path):
    state = build(stage, cache).state_dict()
    shutil.copytree(stage, tmp_path / "new")
    shutil.rmtree(tmp_path / "new/math")
    write_domain(tmp_path / "new/math", [[1, 2, 3]] * 5)
    with pytest.raises(RefusedInput, match=r"shards: .*math"):
        build(tmp_path / "new", cache).load_state_dict(state)


@pytest.mark.parametrize("world", [1, 2])
def test_another_mixture_goes_on_where_each_domain_was(stage, cache, world):
    """No document of the first epoch comes twice, and the new shares hold from the change on, on any ranks."""
    steps = 3
    before = [build(stage, cache, r, world) for r in range(world)]
    seen = sequences(before, steps * G // world)
    mixture = {"math": 0.2, "web": 0.8}
    after = [build(stage, cache, r, world, mixture=mixture, realign_after=steps * G) for r in range(world)]
    for loader in after:
        loader.load_state_dict(merge_states(before))
    taken = sequences(after, 2 * G // world)
    first = [row for row in (*seen[:, 0].ravel(), *taken[:, 0].ravel()) if row >= 2_000_000]  # math and web
    assert len(set(first)) == len(first), "each domain has more documents than were drawn"
    web = (taken[:, 0] >= 3_000_000).sum()
    assert abs(web - 0.8 * taken[:, 0].size) <= 2 * 40 * G  # two documents a lane
    resumed = [build(stage, cache, r, world, mixture=mixture) for r in range(world)]
    for loader in resumed:
        loader.load_state_dict(merge_states(after))
    again = sequences(resumed, G // world)
    assert not set(again[:, 0].ravel()) & set(taken[:, 0].ravel())


def test_new_shards_of_a_domain_begin_with_their_first_document(stage, cache, tmp_path):
    before = build(stage, cache)
    seen = sequences([before], 2 * G)
    shutil.copytree(stage, tmp_path / "new")
    shutil.rmtree(tmp_path / "new/math")
    write_domain(tmp_path / "new/math", [np.arange(30) + 4_000_000 + 100 * i for i in range(90)])
    after = build(tmp_path / "new", cache, realign_after=2 * G)
    after.load_state_dict(before.state_dict())
    taken = sequences([after], 2 * G)
    fresh = build(tmp_path / "new", cache, mixture={"math": 1.0})
    first = set(sequences([fresh], 3 * G)[:, 0].ravel())
    math = [token for token in taken[:, 0].ravel() if token >= 4_000_000]
    assert math and set(math) <= first, "each lane draws its first documents of the new shards"
    kept = [token for token in taken[:, 0].ravel() if token < 4_000_000]
    assert not set(kept) & {token for token in seen[:, 0].ravel() if token >= 3_000_000}, "web goes on"
    assert not [token for token in kept if 2_000_000 <= token < 3_000_000], "an open document of old shards is dropped"
    assert after.statistics()["sequences"] == 4 * G


@pytest.mark.parametrize("change", [{"seed": 4}, {"seq_len": 64}, {"realign_after": 3 * G}, {"realign_after": None}])
def test_a_state_is_realigned_at_the_stated_place_and_in_its_data_only(change, stage, cache):
    loader = build(stage, cache)
    sequences([loader], 2 * G)
    other = build(stage, cache, **{"mixture": {"web": 1.0}, "realign_after": 2 * G} | change)
    with pytest.raises(RefusedInput, match="belongs to another order of data"):
        other.load_state_dict(loader.state_dict())


def test_a_state_that_lacks_lanes_is_refused(stage, cache):
    loaders = [build(stage, cache, r, 2) for r in range(2)]
    sequences(loaders, G // 2)
    with pytest.raises(RefusedInput, match="order_2_section_04_of_08"):
        build(stage, cache).load_state_dict(loaders[0].state_dict())


def test_an_iterator_is_over_when_there_is_a_newer_one(stage, cache):
    loader = build(stage, cache)
    old = iter(loader)
    first = rows(next(old))
    state = loader.state_dict()
    second = rows(next(iter(loader)))
    with pytest.raises(RuntimeError, match="newer"):
        next(old)
    np.testing.assert_array_equal(np.stack([first, second]), np.stack(list(islice(map(rows, build(stage, cache)), 2))))
    loader.load_state_dict(state)
    np.testing.assert_array_equal(rows(next(iter(loader))), second)
