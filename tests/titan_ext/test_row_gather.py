"""Gathers to and from the experts' rows against loops over tokens, rows and choices, with float64 gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from titan_ext.mobilemoe.capacity_dispatch import CapacityTokenDispatcher, keep_highest_weights
from titan_ext.mobilemoe.row_gather import gather_rows, sum_rows
from titan_ext.mobilemoe.token_dispatch import Routing, TokenDispatcher, find_places

E, K, D = 5, 2, 6
SCATTERS = ("scatter_add", "scatter_reduce", "index_add", "index_put", "embedding_dense_backward", "accumulate")


def choose_experts(num_tokens: int, favourite: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts of every token. Expert 0 gets most of the tokens, and expert 4 gets none."""
    torch.manual_seed(0)
    popularity_E = torch.tensor([3.0, 0, 0, 0, -100]) if favourite else torch.zeros(E)
    expert_ids_TK = (torch.randn(num_tokens, E) + popularity_E).topk(K).indices
    return torch.rand(num_tokens, K) + 0.1, expert_ids_TK


def route(kind: str, scores_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> Routing:
    if kind == "capacity":
        capacity = CapacityTokenDispatcher.Config(num_experts=E, top_k=K, capacity_factor=1.0).build()
        return keep_highest_weights(scores_TK, expert_ids_TK, E, capacity.capacity(len(scores_TK)))
    dispatcher = TokenDispatcher.Config(num_experts=E, top_k=K).build()
    x_TD = torch.zeros(len(scores_TK), D)
    counts_E = torch.bincount(expert_ids_TK.flatten(), minlength=E)
    return dispatcher.dispatch(x_TD, scores_TK, expert_ids_TK, counts_E)[2].routing


def list_rows(kind: str, scores_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> list[list[tuple[int, int]]]:
    """The kept choices (token, choice) of every expert, found in a loop."""
    T = len(scores_TK)
    takers = [[(t, k) for t in range(T) for k in range(K) if expert_ids_TK[t, k] == e] for e in range(E)]
    if kind == "dropless":
        return takers
    C = min(T, -(-T * K // E))
    return [sorted(choices, key=lambda choice: -float(scores_TK[choice]))[:C] for choices in takers]


@pytest.mark.parametrize("num_tokens", [0, 1, 23])
@pytest.mark.parametrize("kind", ["dropless", "capacity"])
def test_every_kept_choice_has_the_row_of_its_expert(kind, num_tokens):
    scores_TK, expert_ids_TK = choose_experts(num_tokens)
    routing = route(kind, scores_TK, expert_ids_TK)
    rows = list_rows(kind, scores_TK, expert_ids_TK)
    C = len(routing.token_R) // E
    begins = [e * C if kind == "capacity" else sum(map(len, rows[:e])) for e in range(E)]
    kept = {choice: e for e, choices in enumerate(rows) for choice in choices}
    assert num_tokens < 2 or kind == "dropless" or len(kept) < num_tokens * K, "this routing drops"
    weight_R = torch.zeros(len(routing.token_R))
    for (t, k), e in kept.items():
        row = int(routing.row_TK[t, k])
        assert begins[e] <= row < [*begins, len(weight_R)][e + 1] and routing.token_R[row] == t
        assert routing.weight_R[row] == routing.weight_TK[t, k] == scores_TK[t, k]
        weight_R[row] = scores_TK[t, k]
    assert torch.equal(routing.weight_R, weight_R), "padding weighs nothing"
    dropped = [(t, k) for t in range(num_tokens) for k in range(K) if (t, k) not in kept]
    assert not any(routing.kept_TK[choice] for choice in dropped)
    assert routing.kept_TK is None or routing.kept_TK.sum() == len(kept)


def make_tensors(kind: str, dtype: torch.dtype, num_tokens: int = 11) -> tuple[Routing, torch.Tensor, torch.Tensor]:
    scores_TK, expert_ids_TK = choose_experts(num_tokens)
    routing = route(kind, scores_TK.to(dtype), expert_ids_TK)
    return routing, torch.randn(num_tokens, D).to(dtype), torch.randn(len(routing.token_R), D).to(dtype)


def apply_sum(routing: Routing, rows_RD: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    return sum_rows(rows_RD, weight_TK, routing.row_TK, routing.token_R, routing.weight_R, routing.kept_TK)


def apply_gather(routing: Routing, x_TD: torch.Tensor) -> torch.Tensor:
    return gather_rows(x_TD, routing.token_R, routing.row_TK, routing.kept_TK)


@pytest.mark.parametrize("kind", ["dropless", "capacity"])
def test_values_are_those_of_a_loop(kind):
    routing, x_TD, rows_RD = make_tensors(kind, torch.float64)
    assert torch.equal(apply_gather(routing, x_TD), torch.stack([x_TD[t] for t in routing.token_R]))
    expected = torch.zeros_like(x_TD)
    for t in range(len(x_TD)):
        for k in range(K):
            if routing.kept_TK is None or routing.kept_TK[t, k]:
                expected[t] += routing.weight_TK[t, k] * rows_RD[routing.row_TK[t, k]]
    torch.testing.assert_close(apply_sum(routing, rows_RD, routing.weight_TK), expected)


@pytest.mark.parametrize("kind", ["dropless", "capacity"])
def test_gradients_are_those_of_autograd(kind):
    """The gradient of a gather counts the rows of choices only: what lies in a padding row weighs nothing."""
    routing, x_TD, rows_RD = make_tensors(kind, torch.float64)
    weight_TK = routing.weight_TK.clone().requires_grad_()
    rows_RD.requires_grad_()
    upstream_TD = torch.randn_like(x_TD)
    ours = torch.autograd.grad(apply_sum(routing, rows_RD, weight_TK), (rows_RD, weight_TK), upstream_TD)
    kept_TK = torch.ones_like(weight_TK) if routing.kept_TK is None else routing.kept_TK
    plain_TD = (rows_RD[routing.row_TK] * (weight_TK * kept_TK)[..., None]).sum(1)
    theirs = torch.autograd.grad(plain_TD, (rows_RD, weight_TK), upstream_TD)
    torch.testing.assert_close(ours, theirs)
    x_TD.requires_grad_()
    kept_R = (routing.weight_R > 0).double()
    upstream_RD = torch.randn(len(kept_R), D, dtype=torch.float64)
    (ours_TD,) = torch.autograd.grad(apply_gather(routing, x_TD), x_TD, upstream_RD)
    (theirs_TD,) = torch.autograd.grad(x_TD[routing.token_R] * kept_R[:, None], x_TD, upstream_RD)
    torch.testing.assert_close(ours_TD, theirs_TD)


@pytest.mark.parametrize("kind", ["dropless", "capacity"])
def test_gradients_are_differences(kind):
    _, x_TD, rows_RD = make_tensors(kind, torch.float64, num_tokens=4)
    scores_TK, expert_ids_TK = choose_experts(4)

    def go(x_TD: torch.Tensor, rows_RD: torch.Tensor, scores_TK: torch.Tensor) -> torch.Tensor:
        routing = route(kind, scores_TK, expert_ids_TK)
        return apply_sum(routing, apply_gather(routing, x_TD) * rows_RD, routing.weight_TK)

    assert torch.autograd.gradcheck(go, [x.double().requires_grad_() for x in (x_TD, rows_RD, scores_TK)])


def test_sums_of_bfloat16_are_made_in_float32():
    """Added one by one in bfloat16, 256 + 1 stays 256; the gradient of a gather is a sum too."""
    rows_RD = torch.tensor([[256.0], [1], [1], [1]]).bfloat16()
    row_TK, token_R = torch.arange(4)[None], torch.zeros(4, dtype=torch.int64)
    assert sum_rows(rows_RD, torch.ones(1, 4), row_TK, token_R, torch.ones(4)) == torch.tensor(259.0).bfloat16() != 256
    x_TD = torch.ones(1, 1).bfloat16().requires_grad_()
    gather_rows(x_TD, token_R, row_TK).backward(rows_RD)
    assert x_TD.grad == torch.tensor(259.0).bfloat16()


class WatchOperations(TorchDispatchMode):
    """Notes the names of all operations, with those that autograd calls in a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def go_both_ways(kind: str, scores_TK: torch.Tensor, expert_ids_TK: torch.Tensor, x_TD: torch.Tensor) -> list:
    """A dispatcher's two directions around an elementwise expert; output and gradients of tokens and weights."""
    scores_TK, x_TD = scores_TK.requires_grad_(), x_TD.requires_grad_()
    routing = route(kind, scores_TK, expert_ids_TK)
    out_TD = apply_sum(routing, apply_gather(routing, x_TD).square(), routing.weight_TK)
    return [out_TD.detach(), *torch.autograd.grad(out_TD.float().square().sum(), (x_TD, scores_TK))]


@pytest.mark.parametrize("kind", ["dropless", "capacity"])
def test_no_direction_adds_by_scatters_and_all_repeat_bit_for_bit(kind):
    scores_TK, expert_ids_TK = choose_experts(64, favourite=False)
    x_TD = torch.randn(64, D).bfloat16()
    with WatchOperations() as watch:
        first = go_both_ways(kind, scores_TK.clone(), expert_ids_TK, x_TD.clone())
    assert any("embedding_bag" in name for name in watch.names), "nothing was watched"
    assert not [name for name in watch.names if any(scatter in name for scatter in SCATTERS)]
    second = go_both_ways(kind, scores_TK.clone(), expert_ids_TK, x_TD.clone())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["dropless", "capacity"])
def test_a_compiled_graph_has_the_same_numbers_and_no_scatters(kind):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    scores_TK, expert_ids_TK = choose_experts(16)
    routing = route(kind, scores_TK, expert_ids_TK)
    names: list[str] = []

    def note(graph: torch.fx.GraphModule, inputs: list) -> object:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    def go(x_TD: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        return apply_sum(routing, apply_gather(routing, x_TD).square(), weight_TK)

    results = []
    for function in (go, torch.compile(go, backend=aot_autograd(fw_compiler=note), fullgraph=True)):
        x_TD, weight_TK = torch.linspace(-1, 1, 16 * D).view(16, D).requires_grad_(), routing.weight_TK.clone()
        out_TD = function(x_TD, weight_TK.requires_grad_())
        out_TD.square().sum().backward()
        results.append([out_TD, x_TD.grad, weight_TK.grad])
    torch.testing.assert_close(*results)
    assert any("index_select" in name or "index.Tensor" in name for name in names)
    assert not [name for name in names if any(scatter in name for scatter in SCATTERS)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4))
def test_places_after_an_exchange_are_those_of_a_sort(counts):
    """Rows arrive sorted by rank, then by expert."""
    labels = [(expert, rank) for rank, row in enumerate(counts) for expert, n in enumerate(row) for _ in range(n)]
    arrival_R, sorted_R = find_places(torch.tensor(counts), len(labels))
    assert [labels[i] for i in arrival_R] == sorted(labels)
    assert torch.equal(arrival_R[sorted_R], torch.arange(len(labels)))
