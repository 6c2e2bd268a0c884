"""Benchmarks through lm-eval, and held-out loss.

How to add a benchmark (two files; items, harness, decontamination and report derive the rest):

1. Add a `Benchmark` to a suite in `SUITES` of `suites.py`. `foundational` is the paper's table of 14 and stays as it
   is; `advanced` is for instruction-tuned models. A suite of your own is
   `{"extended": (*FOUNDATIONAL, Benchmark(...))}`; choose it by `evaluation.suite` or
   `mobilemoe eval --suite`. The entry states title, shots, metric, random-guess level, and an `ItemSource`: a function
   that reads the items out of the items package, or out of a folder of the user's, and the fields whose text training
   data must not contain. `item_readers.py` has readers for arrow tables, rendered requests and JSON lines; items in
   another form need one more function there.
2. Add `tasks/<key>.yaml`. It names lm-eval's stock task file (`stock:`, below lm_eval/tasks) and the data files by
   split. Other keys override the stock task's; the docstring of `tasks` describes them.
3. Give the tests a few made-up items: a table or request file in `tests/eval/miniature_items.py`, the first item's
   prompt in `PROMPTS` of `tests/eval/test_harness.py`, and for multiple choice the number of choices in `CHOICES` of
   `tests/eval/test_suites.py`. The tests then compare prompts, targets and choices with the stock task's.
4. Run `pytest tests/eval/test_suites.py tests/eval/test_items.py tests/eval/test_harness.py`.

The other modules: `items.py` writes the items as files, `harness.py` scores a model on them, `heldout.py` measures the
loss on held-out shards.
"""
