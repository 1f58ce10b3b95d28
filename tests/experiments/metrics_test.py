import json
import os

import pytest

from experiments import metrics as metrics_lib
from experiments.metrics import (
    MetricWriter,
    Progress,
    read_jsonl,
    write_atomic,
    write_json,
)
from snnk_jax._files import write_new


def test_write_atomic_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "first")
    write_atomic(path, b"second")
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "b.txt"
    write_atomic(path, "first")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_write_json(tmp_path):
    write_json(tmp_path / "x.json", {"b": 0.1, "a": [1]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"b": 0.1, "a": [1]}


def write(folder, steps, start=0):
    writer = MetricWriter(folder, start)
    for step in steps:
        writer.write(step, **{"train/loss": step + start / 10})
    writer.close()


def test_rows_are_on_disk_at_once(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, loss=0.1, accuracy=0.2)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    writer.close()
    assert rows == [{"step": 1, "loss": 0.1, "accuracy": 0.2}]


def test_resuming_drops_later_rows(tmp_path):
    write(tmp_path, range(1, 6))
    write(tmp_path, range(4, 6), start=3)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 2.0},
        {"step": 3, "train/loss": 3.0},
        {"step": 4, "train/loss": 4.3},
        {"step": 5, "train/loss": 5.3},
    ]


def test_a_new_run_starts_an_empty_file(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [])
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_cut_last_line_is_left_out(tmp_path, cut):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[: -1 - cut])
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]
    write(tmp_path, [3], start=2)
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]


def test_a_missing_file_has_no_rows(tmp_path):
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_progress_prints_rate_and_time_left(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(metrics_lib.time, "monotonic", lambda: now)
    monkeypatch.setattr(metrics_lib.sys.stderr, "isatty", lambda: False)
    progress = Progress("train", 10, 110, every_s=30.0)
    progress.note("loss 1.0")
    now = 10.0
    progress.update(20)
    assert capsys.readouterr().out == ""
    now = 40.0
    progress.update(30)  # 20 steps in 40 s, 80 to go
    progress.close()
    line = "train: step 30/110, 0.50 steps/s, 160 s left. loss 1.0\n"
    assert capsys.readouterr().out == line


def test_quiet_progress_prints_nothing(capsys):
    progress = Progress("train", 0, 10, every_s=0.0, quiet=True)
    progress.update(5)
    progress.close()
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("links", [True, False])
def test_write_new_leaves_what_is_there(tmp_path, monkeypatch, links):
    def no_links(*args):
        raise PermissionError("no hard links")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "a" / "file"
    assert write_new(path, "first")
    assert not write_new(path, "second")
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
