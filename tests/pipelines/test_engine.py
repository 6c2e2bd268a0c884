"""The step engine on a small graph of steps that write real files: what runs, what is skipped, and why."""

import json
import threading
from dataclasses import replace

import pytest

from core.atomic import atomic_write, partial_path
from pipelines.engine.fingerprints import find_stale_steps, fingerprint, input_identities
from pipelines.engine.manifest import Manifest
from pipelines.engine.runner import archive_path, group_independent, run_steps
from pipelines.engine.step import Step, StepFailed, is_up_to_date, list_pending


class Graph:
    """text -> upper -> count, each a file; counts its calls, fails or stops on demand."""

    def __init__(self, run):
        self.run, self.calls, self.said, self.fail = run, [], [], None
        self.text, self.version = "abc", 1

    def steps(self):
        return [
            Step("text", 1, (), {"data": {"text": self.text}}, ("text",), self._work("text", lambda: self.text)),
            Step(
                "upper", self.version, ("text",), {}, ("upper",), self._work("upper", lambda: self.read("text").upper())
            ),
            Step("count", 1, ("upper",), {}, ("count",), self._work("count", lambda: str(len(self.read("upper"))))),
        ]

    def read(self, name):
        return (self.run / name).read_text()

    def _work(self, name, make):
        def work():
            self.calls.append(name)
            with atomic_write(self.run / name) as partial:
                partial.write_text(make())
                if self.fail == name:
                    raise OSError(f"no more {name}")

        return work

    def go(self, until=None, restart_from=None, stop=None):
        self.calls.clear()
        self.said.clear()
        run_steps(
            self.steps(), self.run, Manifest(self.run), until=until, restart_from=restart_from,
            log_line=self.said.append,
            stop=stop or threading.Event(),
        )  # fmt: skip
        return list(self.calls)

    def state(self, name):
        return Manifest(self.run).step(name)["state"]


@pytest.fixture
def graph(tmp_path):
    return Graph(tmp_path)


def test_first_run_makes_everything_second_nothing(graph):
    assert graph.go() == ["text", "upper", "count"]
    assert graph.read("count") == "3"
    assert graph.go() == []
    assert graph.said[0] == "step 1 of 3  text: skip (up to date)"


def test_a_run_knows_without_a_step_that_there_is_nothing_to_do(graph):
    def known(until=None):
        return is_up_to_date(graph.steps(), graph.run, Manifest(graph.run), until)

    assert not known("text")
    graph.go(until="upper")
    assert known("upper") and not known()
    graph.go()
    assert known()
    (graph.run / "count").unlink()
    assert not known()
    graph.text = "x"
    assert not known("text")


def test_what_a_run_will_do_is_known_before_it_does(graph):
    def check(until=None, restart_from=None):
        pending = list_pending(graph.steps(), graph.run, Manifest(graph.run), until, restart_from)
        assert pending == set(graph.go(until, restart_from))
        return pending

    assert check("upper") == {"text", "upper"}
    assert check() == {"count"}
    assert check() == set()
    assert check("upper", restart_from="upper") == {"upper"}
    (graph.run / "upper").unlink()
    assert check() == {"upper", "count"}
    graph.fail = "count"
    with pytest.raises(StepFailed):
        graph.go(restart_from="upper")
    graph.fail = None
    assert check(restart_from="upper") == {"count"}, "what the same request has done already is not done again"


def test_changed_config_remakes_it_and_what_depends_on_it(graph):
    graph.go()
    graph.text = "abcde"
    assert graph.go() == ["text", "upper", "count"]
    assert graph.read("count") == "5"
    assert "data.text: 'abc' -> 'abcde'" in graph.said[0]
    assert any("upper: redo (input text changed)" in line for line in graph.said)
    assert (graph.run / "stale" / "text").read_text() == "abc"


def test_what_a_change_puts_aside_is_never_replaced_and_partial_work_is_put_aside_too(graph):
    graph.go()
    for text in ("abcde", "fgh"):
        (graph.run / "text.partial").mkdir()
        (graph.run / "text.partial" / "days of work").write_text(text)
        graph.text = text
        graph.go()
    stale = graph.run / "stale"
    assert [(stale / name).read_text() for name in ("text", "text-2")] == ["abc", "abcde"]
    assert [(stale / name / "days of work").read_text() for name in ("text.partial", "text.partial-2")] == [
        "abcde",
        "fgh",
    ]
    assert any("former text.partial moved to stale/text.partial-2; delete it" in line for line in graph.said)


def test_a_step_that_replaces_its_outputs_finds_the_former_ones_unless_it_is_asked_for_anew(tmp_path):
    found = []

    def go(config, restart_from=None):
        step = Step("text", 1, (), {"of": config}, ("text",), work, replaces_outputs=True)
        run_steps(
            [step], tmp_path, Manifest(tmp_path), until=None, restart_from=restart_from, log_line=print,
            stop=threading.Event(),
        )  # fmt: skip

    def work():
        found.append((tmp_path / "text").read_text() if (tmp_path / "text").exists() else None)
        archive_path(tmp_path / "text", tmp_path, print)
        (tmp_path / "text").write_text(f"text {len(found)}")

    for config, restart_from in (("a", None), ("b", None), ("b", None), ("b", "text")):
        go(config, restart_from)
    assert found == [None, "text 1", None]
    assert sorted(path.read_text() for path in (tmp_path / "stale").iterdir()) == ["text 1", "text 2"]


def test_code_version_counts(graph):
    graph.go()
    graph.version = 2
    assert graph.go() == ["upper", "count"]
    assert "upper: redo (code version 1 -> 2)" in graph.said[1]


def test_until_stops_and_the_rest_shows_as_stale(graph):
    graph.go()
    graph.text = "x"
    assert graph.go(until="text") == ["text"]
    assert find_stale_steps(Manifest(graph.run)) == {"upper", "count"}
    assert graph.go() == ["upper", "count"]
    assert find_stale_steps(Manifest(graph.run)) == set()


def test_output_that_is_gone_is_made_again(graph):
    graph.go()
    (graph.run / "upper").unlink()
    assert graph.go() == ["upper"]
    assert "upper is gone" in graph.said[1]


def test_failure_is_recorded_and_resumed(graph):
    graph.fail = "upper"
    with pytest.raises(StepFailed, match="no more upper") as failure:
        graph.go()
    assert failure.value.step == "upper"
    assert graph.state("upper") == "failed"
    assert "OSError: no more upper" in Manifest(graph.run).step("upper")["error"]
    assert not (graph.run / "upper").exists()
    graph.fail = None
    assert graph.go() == ["upper", "count"]
    assert "upper: resume (it was failed)" in graph.said[1]
    assert "error" not in Manifest(graph.run).step("upper")


def test_interrupt_is_not_a_failure(graph):
    graph.fail, stop = "text", threading.Event()
    stop.set()
    with pytest.raises(StepFailed):
        graph.go(stop=stop)
    assert graph.state("text") == "interrupted"


def test_killed_driver_leaves_running_and_is_resumed(graph):
    graph.go()
    manifest = Manifest(graph.run)
    manifest.content["steps"]["count"]["state"] = "running"
    manifest.save()
    assert graph.go() == ["count"]
    assert "resume (it was running)" in graph.said[2]


def test_what_a_killed_writer_left_is_removed_before_the_steps_go_on(graph):
    leftovers = [graph.run / ".manifest.json.12.34.partial", graph.run / "text.partial" / ".siqa.json.12.34.partial"]
    leftovers[1].parent.mkdir(parents=True)
    for path in leftovers:
        path.touch()
    seen = []
    steps = [Step("text", 1, (), {}, ("text",), lambda: seen.extend(path.exists() for path in leftovers))]
    manifest = Manifest(graph.run)
    manifest.start("text", {"fingerprint": fingerprint(steps[0], {}), "version": 1})
    run_steps(steps, graph.run, manifest, until=None, restart_from=None, log_line=print, stop=threading.Event())
    assert seen == [False, False] and leftovers[1].parent.exists()


def test_what_a_worker_left_that_died_while_its_step_went_on_is_removed_at_the_end(graph):
    left = graph.run / "progress" / ".text.json.12.34.partial"
    left.parent.mkdir()
    work = [Step("text", 1, (), {}, ("text",), left.touch)]
    run_steps(
        work, graph.run, Manifest(graph.run), until=None, restart_from=None, log_line=print, stop=threading.Event()
    )
    assert list(left.parent.iterdir()) == []


def test_from_restarts_once_then_continues(graph):
    graph.go()
    graph.fail = "count"
    with pytest.raises(StepFailed):
        graph.go(restart_from="upper")
    assert graph.calls == ["upper", "count"]
    graph.fail = None
    assert graph.go(restart_from="upper") == ["count"]
    assert graph.go(restart_from="upper") == ["upper", "count"]


def test_partial_of_another_fingerprint_is_dropped(graph):
    graph.fail = "text"
    with pytest.raises(StepFailed):
        graph.go()
    assert partial_path(graph.run / "text").read_text() == "abc"
    graph.text, seen = "abcd", []
    steps = graph.steps()
    steps[0] = Step(
        "text", 1, (), steps[0].config, ("text",), lambda: seen.append(partial_path(graph.run / "text").exists())
    )
    run_steps(
        steps[:1], graph.run, Manifest(graph.run), until=None, restart_from=None, log_line=print, stop=threading.Event()
    )
    assert seen == [False]


def make_pair(run, left, right):
    """start -> left, right -> end; the functions are the work of `left` and `right`."""

    def write(name, work=lambda: None):
        def make():
            work()
            (run / name).touch()

        return make

    return [
        Step("start", 1, (), {}, ("start",), write("start")),
        Step("left", 1, ("start",), {}, ("left",), write("left", left)),
        Step("right", 1, ("start",), {}, ("right",), write("right", right)),
        Step("end", 1, ("left", "right"), {}, ("end",), write("end")),
    ]


def run_all(steps, run):
    manifest = Manifest(run)
    run_steps(steps, run, manifest, until=None, restart_from=None, log_line=print, stop=threading.Event())
    return {name: entry["state"] for name, entry in Manifest(run).content["steps"].items()}


def test_neighbours_that_need_nothing_of_each_other_run_at_once(tmp_path):
    meeting = threading.Barrier(2, timeout=30)  # each waits for the other
    steps = make_pair(tmp_path, meeting.wait, meeting.wait)
    assert [[step.name for step in group] for group in group_independent(steps)] == [
        ["start"], ["left", "right"], ["end"],
    ]  # fmt: skip
    assert run_all(steps, tmp_path) == dict.fromkeys(("start", "left", "right", "end"), "done")


@pytest.mark.parametrize("failing", ["left", "right"])
def test_one_that_fails_lets_its_neighbour_end(tmp_path, failing):
    failed = threading.Event()

    def fail():
        failed.set()
        raise OSError("no more disk")

    def succeed():
        assert failed.wait(30)

    works = {"left": succeed, "right": succeed, failing: fail}
    with pytest.raises(StepFailed, match="no more disk") as raised:
        run_all(make_pair(tmp_path, **works), tmp_path)
    assert raised.value.step == failing
    states = {name: entry["state"] for name, entry in Manifest(tmp_path).content["steps"].items()}
    assert states == {"start": "done", "left": "done", "right": "done"} | {failing: "failed"}


def test_result_identity_replaces_the_fingerprint(graph):
    came = {"packages": 1}

    def steps():
        fetch = Step("fetch", 1, (), {}, (), lambda: {"identity": str(came["packages"]), "packages": came["packages"]})
        return [fetch, Step("use", 1, ("fetch",), {}, (), lambda: graph.calls.append("use"))]

    def go(restart_from=None):
        run_steps(
            steps(), graph.run, Manifest(graph.run), until=None, restart_from=restart_from, log_line=graph.said.append,
            stop=threading.Event(),
        )  # fmt: skip

    go()
    assert Manifest(graph.run).step("fetch")["result"] == {"packages": 1}
    came["packages"] = 2
    go()
    assert graph.calls == ["use"]
    go(restart_from="fetch")
    assert graph.calls == ["use", "use"]


def test_whole_folder_appears_at_once_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), atomic_write(tmp_path / "out") as partial:
        partial.mkdir()
        (partial / "half").touch()
        raise KeyError
    assert not (tmp_path / "out").exists()
    with atomic_write(tmp_path / "out", keep_partial=True) as partial:
        assert (partial / "half").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["half"]


def test_manifest_is_valid_json_after_every_change(graph):
    graph.go()
    content = json.loads((graph.run / "manifest.json").read_text())
    assert {name: entry["state"] for name, entry in content["steps"].items()} == dict.fromkeys(
        ("text", "upper", "count"), "done"
    )
    assert all(entry["seconds"] >= 0 and entry["fingerprint"] for entry in content["steps"].values())


def test_a_step_that_reads_a_part_is_out_of_date_when_that_part_is(tmp_path):
    """Two parts of one output, each with a reader; a third step reads the whole."""
    parts, calls = {"left": "1", "right": "1"}, []

    def steps():
        def write(name):
            def work():
                calls.append(name)
                (tmp_path / name).write_text(name)

            return work

        def make():
            write("both")()
            return {"parts": dict(parts)}

        return [
            Step("both", 1, (), dict(parts), ("both",), make),
            Step("left", 1, ("both",), {}, ("left",), write("left"), {"both": "left"}),
            Step("right", 1, ("both",), {}, ("right",), write("right"), {"both": "right"}),
            Step("whole", 1, ("both",), {}, ("whole",), write("whole")),
        ]

    def go(until=None):
        calls.clear()
        run_steps(
            steps(), tmp_path, Manifest(tmp_path), until=until, restart_from=None, log_line=print,
            stop=threading.Event(),
        )  # fmt: skip
        return set(calls)

    assert go() == {"both", "left", "right", "whole"}
    parts["right"] = "2"
    assert go(until="both") == {"both"}
    assert find_stale_steps(Manifest(tmp_path)) == {"right", "whole"}
    assert go() == {"right", "whole"}
    assert find_stale_steps(Manifest(tmp_path)) == set()


def test_a_step_of_an_earlier_version_states_no_parts_and_is_read_as_a_whole(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.content["steps"] = {"data": {"state": "done", "identity": "abc"}}
    step = Step("pretrain", 1, ("data",), {}, (), dict, {"data": "pretrain"})
    assert input_identities(manifest, step) == {"data": "abc"}


def test_nothing_is_started_after_an_interrupt(graph):
    """The step that was at work may finish all the same: a stage that was asked to stop after its last step."""
    stop = threading.Event()
    made = graph.steps()

    def finish_and_stop():
        made[0].work()
        stop.set()

    steps = [replace(made[0], work=finish_and_stop), *made[1:]]
    run_steps(
        steps, graph.run, Manifest(graph.run), until=None, restart_from=None, log_line=graph.said.append, stop=stop
    )
    assert graph.calls == ["text"] and graph.state("text") == "done"
    assert graph.go() == ["upper", "count"]
