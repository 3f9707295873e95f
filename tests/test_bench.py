"""bench.py at tiny sizes: every variant computes the same, tables and files are whole; no speed."""

import json

import pytest

import bench
import bench_rollout


def run(tmp_path, capsys, name, **options):
    out = tmp_path / f"{name}.json"
    bench.main(bench.Config(name, rounds=1, device="cpu", out=out, **options))
    record = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert {"config", "results", "targets", "provenance"} <= set(record)
    assert record["provenance"]["commit"] and record["provenance"]["hardware"]
    for row in record["results"]:
        assert row["variant"] in printed and row["min"] <= row["seconds"] <= row["max"] and row["ratio"] > 0
    return record["results"]


def by_variant(rows, case):
    return {row["variant"]: row for row in rows if row["case"] == case}


def test_logprob(tmp_path, capsys):
    rows = run(tmp_path, capsys, "logprob", shapes=("16x64x12x40",))
    exact, rounded = (by_variant(rows, f"logprob cpu 16x64x12x40 {kind}") for kind in ("fp32", "bf16"))
    assert {"naive, all tokens", "naive, response rows", "checkpoint, 256 rows", "ours"} <= set(exact)
    assert all(row["value_error"] < 1e-5 and row["gradient_error"] < 1e-5 for row in exact.values())
    assert rounded["ours"]["gradient_error"] < 1e-2


def test_update_is_the_same_on_the_rungs_that_only_save_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("model.compiled", lambda trunk: trunk)  # a minute
    rows = run(tmp_path, capsys, "update", vocab=97, hidden=16, layers=1, batch_size=12)
    ladder = by_variant(rows, "update cpu vocab 97")
    assert list(ladder) == bench.RUNGS
    assert all(ladder[name]["gradient_error"] < 1e-3 for name in bench.RUNGS[:5])
    assert ladder[bench.RUNGS[3]]["samples_per_s"] == pytest.approx(12 / ladder[bench.RUNGS[3]]["seconds"])


def test_a_rung_that_computes_something_else_stops_the_bench(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        bench, "all_positions", lambda *_, **__: (0 * p for p in bench.sequence_logprobs(*_, **__))
    )
    monkeypatch.setattr("model.compiled", lambda trunk: trunk)
    with pytest.raises(ValueError, match="computes something else"):
        run(tmp_path, capsys, "update", vocab=97, hidden=16, layers=1, batch_size=6)


def test_prefix(tmp_path, capsys):
    rows = run(tmp_path, capsys, "prefix", shapes=("16x3x4",), hidden=16, layers=1)
    for case in ("prefix cpu 16x3x4 train", "prefix cpu 16x3x4 score"):
        ways = by_variant(rows, case)
        assert list(ways) == ["padded rows", "cached prompt", "packed row"]
        assert all(row["value_error"] < 1e-4 for row in ways.values())


def test_targets_by_hand():
    rows = [
        {"variant": "ours", "seconds": 1.0, "memory_mb": 50.0},
        {"variant": "naive, response rows", "seconds": 2.0, "memory_mb": 900.0},
        {"variant": "naive, all tokens", "seconds": 4.0, "memory_mb": None},
    ]
    checked = bench.check_targets("logprob cpu 256x32000x2048x8192 fp32", rows)
    assert {(t["rival"], t["value"], t["met"]) for t in checked} == {
        ("naive, response", 2.0, True), ("naive, all", 4.0, False), ("MB", 50.0, False),
    }  # fmt: skip


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match="expected DxVxNxT"):
        bench.sizes("16x64", "DxVxNxT")


def test_rollout_plays_the_same_actions_on_every_rung_but_bf16():
    policy = bench.random_policy(bench.Config("rollout", hidden=16, layers=1), "cpu", 2048).eval()
    tokenizer = bench_rollout.load_backbone("base")[1]
    rows = bench_rollout.compare(policy, tokenizer, rounds=1, many=4, few=2)
    assert [row["variant"] for row in rows] == bench_rollout.LADDER and rows[0]["ratio"] == 1
    assert all(row["episodes_per_minute"] == pytest.approx(60 / row["seconds"]) for row in rows)
