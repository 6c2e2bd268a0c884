"""`PrefixLM`: lm-eval's Hugging Face model, which computes what requests have in common once, in the KV cache.

The requests of a benchmark share long prefixes: a subject's solved examples with all of its questions, a question with
its answers. Here a prefix is computed once, the rests of the contexts that follow it in batches over its cache, and the
continuations of each context over that. A context without such a prefix passes in one row with its continuations.
Scores are those of `HFLM` but for float rounding.

In lm-eval, after `import eval.benchmarks.prefix_lm`: `simple_evaluate(model="hf-prefix", model_args=...)`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm  # type: ignore[import-untyped]

from eval.benchmarks.cached_rows import CachedModel, Rows, batch, can_continue
from eval.benchmarks.packed_rows import PackedRow, can_pack, score_packed
from eval.benchmarks.shared_prefixes import Ids, group_by_prefix
from eval.benchmarks.text_lm import TextLM

BATCH_TOKENS = 4096
"""Default number of tokens of a forward pass."""
CPU_BATCH_TOKENS = 2048
"""Number of tokens beyond which a larger batch is slower on a CPU: its activations leave the caches."""
MAX_LOGITS = 1 << 28
"""Number of logits of a forward pass: 1 GiB in float32."""
MAX_ROW = 2048
"""Largest number of tokens of a context and its answers in one row."""
GREEDY = {"do_sample": False, "temperature": 0.0}
"""Generation options of greedy decoding, in which lm-eval's tasks generate; other options go to transformers."""

Request = tuple[tuple[str, str], list[int], list[int]]


@dataclass
class Context:
    """One distinct context, and the continuations that are scored after it."""

    ids: Ids
    continuations: dict[Ids, list[int]] = field(default_factory=dict)
    """Tokens -> numbers of the requests that ask for them."""


@dataclass
class Generation:
    """One distinct prompt, the requests that ask for its greedy continuation, and the tokens so far."""

    ids: Ids
    requests: list[int]
    tokens: list[int] = field(default_factory=list)


@register_model("hf-prefix")
class PrefixLM(TextLM):
    """A causal model that computes shared prefixes once.

    Models whose cache is not plain attention over all tokens (sliding windows, states) are computed as `HFLM` does.
    """

    def __init__(self, *args: Any, batch_tokens: int = BATCH_TOKENS, **kwargs: Any):
        """Load a model as `HFLM`.

        Args:
            batch_tokens: number of tokens of a forward pass, padding included; a longer sequence passes alone. On a CPU
                at most CPU_BATCH_TOKENS.
        """
        super().__init__(*args, **kwargs)
        is_cpu = self.model.device.type == "cpu"
        self.batch_tokens = min(int(batch_tokens), CPU_BATCH_TOKENS) if is_cpu else int(batch_tokens)

    @cached_property
    def _cached(self) -> CachedModel | None:
        return CachedModel(self.model, self.mixed_precision_dtype) if can_continue(self.model) else None

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._cached is None:
            self._bound_batch(len(context) + len(continuation) for _, context, continuation in requests)
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        contexts = self._group_requests(requests)
        results: dict[int, tuple[float, bool]] = {}
        with self._show(len(requests), "Running loglikelihood requests", disable_tqdm) as bar:
            for number, result in self._score_all(contexts):
                results[number] = result
                self.cache_hook.add_partial("loglikelihood", requests[number][0], result)
                bar.update(1)
        return [results[number] for number in range(len(requests))]

    def _group_requests(self, requests: list[Request]) -> dict[Ids, Context]:
        """Return the distinct contexts of requests, each with its distinct continuations."""
        contexts: dict[Ids, Context] = {}
        for number, (_, context_ids, continuation_ids) in enumerate(requests):
            # The last token is a target only; what is beyond the model's context is cut off on the left, as in HFLM.
            ids = tuple((context_ids + continuation_ids)[-(self.max_length + 1) :])
            start = len(ids) - len(continuation_ids)
            assert start > 0, "a continuation leaves no room for its context"
            context = contexts.setdefault(ids[:start], Context(ids[:start]))
            context.continuations.setdefault(ids[start:], []).append(number)
        return contexts

    def _score_all(self, contexts: dict[Ids, Context]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield request number and (log-likelihood, whether greedy decoding gives it) of all contexts.

        Contexts that share a prefix are computed over its cache. Of the others, each passes with its answers in a row.
        """
        alone: list[Context] = []
        for prefix, group in group_by_prefix(list(contexts)):
            packed = {ids for ids in group if not prefix and self._fits_in_a_row(contexts[ids])}
            alone += [contexts[ids] for ids in packed]
            for before, part, shared in self._batch_group(prefix, [ids for ids in group if ids not in packed]):
                yield from self._score([contexts[ids] for ids in part], before, shared)
        yield from self._score_alone(alone)

    def _fits_in_a_row(self, context: Context) -> bool:
        """Return whether a context passes in one row with its answers; attention over a long row costs too much."""
        tokens = len(context.ids) + sum(len(ids) - 1 for ids in context.continuations)
        return tokens <= MAX_ROW and can_pack(self.model)

    def _score_alone(self, contexts: list[Context]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield what `_score_all` does, of contexts that pass with their answers in a row each, the longest first."""
        pairs = [(context, PackedRow(context.ids, tuple(context.continuations))) for context in contexts]
        pairs.sort(key=lambda pair: len(pair[1]), reverse=True)
        for numbers in batch([len(row) for _, row in pairs], self.batch_tokens):
            rows = [pairs[i][1] for i in numbers]
            most = max(1, MAX_LOGITS // (max(row.targets for row in rows) * self.model.config.vocab_size))
            found = [
                scores
                for start in range(0, len(rows), most)
                for scores in score_packed(self.model, rows[start : start + most], self.mixed_precision_dtype)
            ]
            for i, scores in zip(numbers, found, strict=True):
                for wanted, score in zip(pairs[i][0].continuations.values(), scores, strict=True):
                    for number in wanted:
                        yield number, score

    def _batch_by_prefix(self, contexts: dict[Ids, Any]) -> Iterator[tuple[Rows | None, list[Ids], int]]:
        """Yield contexts that pass together, with the cached row that they follow and its number of tokens.

        The longest of a group come first: a batch that does not fit into memory fails at once.
        """
        for prefix, group in group_by_prefix(list(contexts)):
            yield from self._batch_group(prefix, group)

    def _batch_group(self, prefix: Ids, group: list[Ids]) -> Iterator[tuple[Rows | None, list[Ids], int]]:
        """Yield the contexts of one prefix as `_batch_by_prefix` does."""
        assert self._cached is not None
        before = self._cached.extend(None, [prefix])[0] if prefix and group else None
        ordered = sorted(group, key=len, reverse=True)
        for numbers in batch([len(ids) - len(prefix) for ids in ordered], self.batch_tokens):
            yield before, [ordered[i] for i in numbers], len(prefix)

    def _score(
        self, contexts: Sequence[Context], before: Rows | None, shared: int
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield request number and (log-likelihood, whether greedy decoding gives it) of contexts after one prefix."""
        assert self._cached is not None
        rows, logits_BV = self._cached.extend(before, [context.ids[shared:] for context in contexts])
        scores_BV = logits_BV.float().log_softmax(-1)
        best_B = scores_BV.argmax(-1).tolist()
        jobs = [(b, ids) for b, context in enumerate(contexts) for ids in context.continuations]
        sums = [float(scores_BV[b, ids[0]]) for b, ids in jobs]
        greedy = [best_B[b] == ids[0] for b, ids in jobs]
        longer = sorted((j for j, (_, ids) in enumerate(jobs) if len(ids) > 1), key=lambda j: -len(jobs[j][1]))
        limit = min(self.batch_tokens, MAX_LOGITS // logits_BV.shape[-1])
        for numbers in batch([len(jobs[j][1]) - 1 for j in longer], limit):
            part = [longer[i] for i in numbers]
            logits_BLV = self._cached.score(rows.select([jobs[j][0] for j in part]), [jobs[j][1][:-1] for j in part])
            for j, logits_LV in zip(part, logits_BLV, strict=True):
                targets_L = torch.tensor(jobs[j][1][1:], device=logits_LV.device)
                scores_LV = logits_LV[: len(targets_L)].float().log_softmax(-1)
                sums[j] += float(scores_LV.gather(-1, targets_L[:, None]).sum())
                greedy[j] &= bool((scores_LV.argmax(-1) == targets_L).all())
        for (b, ids), log_likelihood, is_greedy in zip(jobs, sums, greedy, strict=True):
            for number in contexts[b].continuations[ids]:
                yield number, (log_likelihood, is_greedy)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy continuation of every request's prompt, up to its stops.

        Requests that are not greedy, and models that change logits in `generate`, are computed as `HFLM` does.
        """
        if self._cached is None or self.think_end_token is not None or not self._is_greedy(requests):
            prompts = (self.tok_encode(request.args[0]) for request in requests)
            self._bound_batch(len(ids) + self.max_gen_toks for ids in prompts)
            return super().generate_until(requests, disable_tqdm)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        kinds: dict[tuple[tuple[str, ...], int], dict[Ids, Generation]] = {}
        for number, request in enumerate(requests):
            prompt, options = request.args
            options = normalize_gen_kwargs(options, self.max_gen_toks)
            longest = options["max_gen_toks"]
            assert longest < self.max_length, "the tokens to generate leave no room for a prompt"
            kind = (tuple(handle_stop_sequences(options.get("until"), eos=eos)), longest)
            ids = tuple(self.tok_encode(prompt, left_truncate_len=self.max_length - longest))
            kinds.setdefault(kind, {}).setdefault(ids, Generation(ids, [])).requests.append(number)
        texts: dict[int, str] = {}
        with self._show(len(requests), "Running generate_until requests", disable_tqdm) as bar:
            for (stops, longest), generations in kinds.items():
                for before, part, shared in self._batch_by_prefix(generations):
                    for done in self._generate([generations[ids] for ids in part], before, shared, stops, longest):
                        text = postprocess_generated_text(self.tok_decode(done.tokens), list(stops), None)
                        for number in done.requests:
                            texts[number] = text
                            self.cache_hook.add_partial("generate_until", requests[number].args, text)
                        bar.update(len(done.requests))
        return [texts[number] for number in range(len(requests))]

    def _is_greedy(self, requests: list[Instance]) -> bool:
        """Return whether all requests want the likeliest token of the model's own logits, one after the other."""
        changed = self.model.generation_config.to_diff_dict()
        changes = ("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "bad_words_ids", "min_new_tokens")
        if any(changed.get(name) for name in changes):
            return False
        for request in requests:
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            rest = {key: value for key, value in options.items() if key not in ("until", "max_gen_toks")}
            if not rest.items() <= GREEDY.items():
                return False
        return True

    def _generate(
        self, generations: list[Generation], before: Rows | None, shared: int, stops: Sequence[str], longest: int
    ) -> list[Generation]:
        """Decode greedily after one prefix until each has a stop in its text, an end of text, or `longest` tokens."""
        assert self._cached is not None
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        rows, logits_BV = self._cached.extend(before, [generation.ids[shared:] for generation in generations])
        active = list(generations)
        while True:
            going = []
            for b, token in enumerate(logits_BV.argmax(-1).tolist()):
                tokens = active[b].tokens
                tokens.append(token)
                if len(tokens) < longest and token not in ends and not self._has_stop(tokens, stops):
                    going.append(b)
            if not going:
                return generations
            if len(going) < len(active):  # those that have ended leave the cache
                rows, active = rows.select(going), [active[b] for b in going]
            next_B = torch.tensor([generation.tokens[-1] for generation in active], device=self.device)
            logits_BV = self._cached.step(rows, next_B)

    def _has_stop(self, tokens: list[int], stops: Sequence[str]) -> bool:
        """Return whether a stop is in the text, or, if it spells a special token, in the text with those."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        spelled = [stop for stop in stops if any(token in stop for token in special)]
        text, whole = self.tok_decode(tokens), self.tok_decode(tokens, skip_special_tokens=False)
        return any(stop in text for stop in stops if stop) or any(stop in whole for stop in spelled)

    def _bound_batch(self, lengths: Iterable[int]) -> None:
        """Let HFLM take as many sequences at once as `batch_tokens` allows for the longest."""
        longest = min(max(lengths, default=1), self.max_length)
        self.batch_size_per_gpu = max(1, self.batch_tokens // longest)

    def _show(self, total: int, what: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=what, disable=disable or self.rank != 0)
