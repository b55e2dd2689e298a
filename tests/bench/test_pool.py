"""Worker processes: warm, replaced when they die or hang, never more threads than cores."""

from __future__ import annotations

import os
import signal

import pytest

from steadytune.bench.pool import Here, Outcome, Pool, slots

HERE = "pool_work:"


def pool(work, workers=1, **options):
    return Pool(HERE + work, slots(workers, cores=4), **options)


def test_every_task_has_one_outcome_and_workers_stay_warm():
    found = list(pool("double", 2).map(range(7)))
    assert sorted(o.value[0] for o in found) == [2 * i for i in range(7)]
    assert {o.task: o.value[0] for o in found} == {i: 2 * i for i in range(7)}
    assert len({o.value[1] for o in found}) <= 2
    assert {o.value[2] for o in found} == {"2"}, "four cores over two workers"


def test_workers_stay_from_one_call_to_the_next_until_they_are_closed():
    """Naive: new processes for each stage of a search, each of which imports the libraries again."""
    found = pool("double", 2)
    first, second = ({o.value[1] for o in found.map(range(4))} for _ in range(2))
    assert first == second
    processes = [w.process for w in found._workers]
    found.close()
    assert not any(process.is_alive() for process in processes)


def test_a_worker_that_dies_between_two_calls_is_replaced():
    found = pool("double")
    (before,) = found.map([1])
    os.kill(before.value[1], signal.SIGKILL)
    (after,) = found.map([2])
    assert (after.value[0], after.attempts) == (4, 2)
    found.close()


def test_no_tasks_no_workers():
    assert list(pool("double", 2).map([])) == []


def test_a_worker_that_is_killed_is_replaced_and_its_task_done_again(tmp_path):
    tasks = [str(tmp_path / name) for name in "ab"]
    assert list(pool("die_once").map(tasks)) == [Outcome(task, "alive", attempts=2) for task in tasks]


def test_a_task_that_always_kills_is_given_up_and_the_others_go_on():
    begun = []
    (found,) = pool("die", retries=2).map(["x"], begun.append)
    assert begun == ["x"] * 3
    assert (found.attempts, found.value) == (3, None)
    assert found.error == "the worker process died (signal 9; out of memory?)"


def test_a_task_that_takes_too_long_is_stopped_and_the_next_one_is_done():
    found = list(pool("sleep", timeout=1.0).map([600.0, 0.0]))
    assert [(o.value, o.error) for o in found] == [(None, "stopped after 1 seconds"), (0.0, None)]


def test_an_error_of_the_work_is_raised_where_the_pool_is():
    with pytest.raises(ZeroDivisionError, match="task 3"):
        list(pool("fail").map([3]))


def test_one_that_stops_listening_leaves_no_worker_behind():
    found = pool("sleep", 2)
    outcomes = found.map([0.0, 60.0, 60.0])
    next(outcomes)
    processes = [w.process for w in found._workers]
    outcomes.close()
    assert not any(process.is_alive() for process in processes)


def test_here_does_the_same_without_processes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [o.value[0] for o in Here(HERE + "double").map([1, 2])] == [2, 4]


@pytest.mark.parametrize(("workers", "cores", "threads"), [(1, 8, "8"), (3, 8, "2"), (8, 2, "1")])
def test_threads_never_outnumber_cores(workers, cores, threads):
    assert [s["OMP_NUM_THREADS"] for s in slots(workers, cores)] == [threads] * workers


def test_workers_take_turns_on_the_gpus():
    assert [s["CUDA_VISIBLE_DEVICES"] for s in slots(3, 4, ["0", "3"])] == ["0", "3", "0"]
    assert "CUDA_VISIBLE_DEVICES" not in slots(1, 4)[0]
