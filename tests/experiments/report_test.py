from experiments import report


def result(method, accuracy, seed=0, trained=100):
    return {
        "method": method,
        "title": method.title(),
        "metric": "accuracy",
        "score": accuracy,
        "step_ms": 10.0 + seed,
        "seconds": 2.0,
        "memory_bytes": 6_000_000,
        "together": 2,
        "adapter_bytes": 1234,
        "counts": {"trained": trained, "head": 10, "projections": 7},
        "recipe": {"learning_rate": 1e-3, "seed": seed, "eval_split": "test"},
        "workdir": "nowhere",
    }


def test_seeds_are_taken_together():
    rows = report.rows([result("a", 0.5), result("a", 0.7, seed=1), result("b", 0.9)])
    assert [row["method"] for row in rows] == ["a", "b"]
    assert rows[0]["seeds"] == 2
    assert abs(rows[0]["mean"] - 0.6) < 1e-12
    assert (rows[0]["low"], rows[0]["high"]) == (0.5, 0.7)
    assert rows[0]["step_ms"] == 10.5
    assert rows[0]["seconds"] == 4.0
    assert rows[0]["memory_bytes"] == 3_000_000  # a run's share of the program's


def test_the_table_reads_as_text():
    rows = report.rows([result("a", 0.5), result("a", 0.7, seed=1), result("b", 0.9)])
    lines = report.markdown_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "60.00" in lines[2]
    assert "50.0 to 70.0" in lines[2]
    assert "1 seed" in lines[3]
    assert "1.2" in lines[3]


def test_files_and_plots(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": 2.0}\n{"step": 1, "test/accuracy": 0.5}\n'
    )
    results = [result("a", 0.5, trained=0), result("b", 0.9)]
    for row in results:
        row["workdir"] = str(tmp_path / "run")
    text = report.write(
        tmp_path,
        results,
        title="title",
        command="command",
        environment={"jax": "1"},
        notes=["A note."],
    )
    written = (tmp_path / "report.md").read_text()
    assert text in written
    assert "A note." in written
    for name in ("score.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
