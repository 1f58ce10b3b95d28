"""Jobs are done once, whatever stops the run between them."""

import jax
import pytest

from experiments import jobs as jobs_lib
from experiments.jobs import run_jobs


def counted(calls, name):
    def measure():
        calls.append(name)
        return {"value": len(calls)}

    return name, measure


def test_a_job_is_done_once_and_a_cut_line_again(tmp_path):
    calls = []
    jobs = [counted(calls, name) for name in "abc"]
    rows = run_jobs(tmp_path, jobs, "test")
    assert [row["name"] for row in rows] == list("abc")
    file = tmp_path / "rows.jsonl"
    file.write_text(file.read_text()[:-4])  # killed while it wrote the last line
    again = run_jobs(tmp_path, [*jobs, counted(calls, "d")], "test")
    assert calls == ["a", "b", "c", "c", "d"]
    assert [row["value"] for row in again] == [1, 2, 4, 5]
    assert run_jobs(tmp_path, jobs, "test") == again[:3]


def test_programs_of_earlier_jobs_are_let_go(tmp_path, monkeypatch):
    """Linux maps a limited number of areas for a process."""
    calls, cleared = [], []
    monkeypatch.setattr(jobs_lib, "_JOBS_OF_A_CACHE", 2)
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(len(calls)))
    run_jobs(tmp_path, [counted(calls, name) for name in "abcde"], "test")
    assert cleared == [2, 4]
    run_jobs(tmp_path, [counted(calls, name) for name in "abcdef"], "test")
    assert cleared == [2, 4]  # what is read from the file compiles nothing


def test_a_failed_job_keeps_those_before_it(tmp_path):
    def fail():
        raise FloatingPointError("no")

    calls = []
    with pytest.raises(FloatingPointError):
        run_jobs(tmp_path, [counted(calls, "a"), ("b", fail)], "test")
    run_jobs(tmp_path, [counted(calls, "a")], "test")
    assert calls == ["a"]


def test_names_must_differ(tmp_path):
    with pytest.raises(ValueError, match=r"names of their own. Got \['a'\] twice"):
        run_jobs(tmp_path, [counted([], "a"), counted([], "a")], "test")


def test_a_second_process_is_refused(tmp_path):
    """Both would write the file anew, and one lose what it measured."""

    def meanwhile():
        with pytest.raises(ValueError, match="one process at a time"):
            run_jobs(tmp_path, [counted([], "b")], "test")
        return {}

    assert run_jobs(tmp_path, [("a", meanwhile)], "test") == [{"name": "a"}]
    run_jobs(tmp_path, [counted([], "b")], "test")
