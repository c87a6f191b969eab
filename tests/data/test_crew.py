from __future__ import annotations

import multiprocessing
import os
from functools import partial

import pytest
from crew_stand_ins import process_of, work

from vidtrain.data import crew
from vidtrain.data.crew import Lost


def test_results_come_in_the_order_of_the_jobs() -> None:
    seen: list[int] = []
    results = list(crew.run(partial(work, plus=1), range(12), 3, progress=seen.append))
    assert results == [2 * number + 1 for number in range(12)]
    assert sorted(seen) == results
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("time_limit", [None, 1.0])
def test_a_lost_job_is_named_and_the_rest_go_on(time_limit: float | None) -> None:
    jobs = [2, "crash", "raise", 1, "exit", "nothing", *(["hang"] if time_limit else []), 4]
    assert list(crew.run(work, jobs, 2, time_limit, culprit="the codec")) == [
        4,
        Lost("crash", "the codec crashed (signal 11)"),
        Lost("raise", "ValueError: not this one"),
        2,
        Lost("exit", "the codec ended the process (exit code 3)"),
        None,
        *([Lost("hang", "took longer than 1 s")] if time_limit else []),
        8,
    ]


def test_processes_serve_many_jobs_and_are_not_this_one() -> None:
    processes = list(crew.run(process_of, range(20), 2))
    assert 1 <= len(set(processes)) <= 2
    assert os.getpid() not in processes


def test_jobs_are_read_as_needed_and_leaving_ends_all() -> None:
    taken = 0

    def jobs():
        nonlocal taken
        while True:
            yield taken
            taken += 1

    results = crew.run(work, jobs(), 2)
    assert [next(results) for _ in range(3)] == [0, 2, 4]
    assert taken < 9
    results.close()
    assert multiprocessing.active_children() == []


def test_no_job() -> None:
    assert list(crew.run(work, [])) == []
