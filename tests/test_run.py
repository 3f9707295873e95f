"""run.py: the folder of a run survives wrong commands, crashes and resumes."""

import csv
import dataclasses
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import run
import train_hiper
import train_o2o
import train_orl
import train_sft
from run import Run, fail, fast_precision, pick_device, provenance, seed_everything


@dataclass(frozen=True)
class Config:
    lr: float = 0.5
    data: Path = Path("a/b.jsonl")
    seed: int = 3


def rows(folder):
    return list(csv.reader((folder / "metrics.csv").open()))


def test_a_used_folder_is_refused_without_resume(tmp_path):
    Run(tmp_path / "r", Config()).log(1, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"already holds a run: add --resume"):
        Run(tmp_path / "r", Config())
    Run(tmp_path / "r", Config(), resume=True)
    assert len(rows(tmp_path / "r")) == 2, "neither attempt changed the metrics"


def test_a_folder_with_other_files_is_not_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    Run(tmp_path, Config())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_config_json_holds_every_field_and_where_it_came_from(tmp_path):
    Run(tmp_path, Config())
    record = json.loads((tmp_path / "config.json").read_text())
    assert set(record) == {"lr", "data", "seed", "provenance"}
    assert (record["lr"], record["data"], record["seed"]) == (0.5, "a/b.jsonl", 3)
    assert set(record["provenance"]) == {"command", "commit", "versions", "hardware"}


def test_a_resumed_run_keeps_where_it_began_and_lists_where_it_went_on(tmp_path, monkeypatch):
    began = Run(tmp_path, Config()).provenance
    monkeypatch.setattr("sys.argv", ["later.py", "--resume"])
    Run(tmp_path, Config(), resume=True)
    now = Run(tmp_path, Config(), resume=True).provenance
    again = {"command": "python later.py --resume", "commit": began["commit"]}
    assert now == began | {"resumed": [again, again]}
    assert json.loads((tmp_path / "config.json").read_text())["provenance"] == now


def test_metrics_are_one_row_per_number(tmp_path):
    r = Run(tmp_path, Config())
    r.log(1, {"executor/q_loss": 0.25, "train/lr": 1e-4})
    r.log(2, {"executor/q_loss": 1234567.0})
    assert rows(tmp_path) == [
        ["step", "metric", "value"],
        ["1", "executor/q_loss", "0.25"],
        ["1", "train/lr", "0.0001"],
        ["2", "executor/q_loss", "1.23457e+06"],
    ]


def test_another_configuration_is_refused_on_resume(tmp_path):
    Run(tmp_path / "r", Config())
    with pytest.raises(ValueError, match=r"was started with seed=\d+: resume with that"):
        Run(tmp_path / "r", dataclasses.replace(Config(), seed=99), resume=True)


# --- resume -------------------------------------------------------------------------------------------------
def test_rows_after_the_saved_step_are_dropped_on_resume(tmp_path):
    r = Run(tmp_path, Config())
    for step in (1, 2, 3, 4):
        r.log(step, {"loss": step / 10})
        if step == 2:
            r.save_state(2)
    resumed = Run(tmp_path, Config(), resume=True)
    assert resumed.load_state()["step"] == 2
    resumed.log(3, {"loss": 9.0})
    assert rows(tmp_path)[1:] == [["1", "loss", "0.1"], ["2", "loss", "0.2"], ["3", "loss", "9"]]


def test_without_a_saved_state_a_resume_starts_at_the_beginning(tmp_path):
    Run(tmp_path, Config()).log(1, {"loss": 1.0})
    resumed = Run(tmp_path, Config(), resume=True)
    assert resumed.load_state() is None
    assert rows(tmp_path) == [["step", "metric", "value"]], "step 1 will be logged again"


def test_a_row_torn_by_a_crash_is_dropped_on_resume(tmp_path):
    r = Run(tmp_path, Config())
    r.log(10, {"loss": 1.0})
    r.save_state(10)
    with r.metrics.open("a") as file:
        file.write("1")  # of "11,loss,0.9"
    Run(tmp_path, Config(), resume=True).load_state()
    assert rows(tmp_path)[1:] == [["10", "loss", "1"]]


def test_a_state_comes_back_as_it_was_saved(tmp_path):
    r = Run(tmp_path, Config())
    saved = {"policy": {"w": torch.arange(3.0)}, "sampler": {"used": {"expert": 7}}}
    r.save_state(5, **saved)
    state = r.load_state()
    assert torch.equal(state["policy"]["w"], saved["policy"]["w"])
    assert state["sampler"] == saved["sampler"] and state["step"] == 5


def test_a_crash_while_writing_leaves_the_last_state(tmp_path, monkeypatch):
    r = Run(tmp_path, Config())
    r.save_state(1, w=torch.ones(2))

    def half_written(state, path):
        Path(path).write_bytes(b"PK half")
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(torch, "save", half_written)
        r.save_state(2, w=torch.zeros(2))
    state = r.load_state()
    assert state["step"] == 1 and torch.equal(state["w"], torch.ones(2))


def test_nothing_in_a_state_is_unpickled(tmp_path):
    r = Run(tmp_path, Config())
    torch.save({"step": 1, "torch_rng": torch.get_rng_state(), "w": Config()}, tmp_path / "state.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        r.load_state()


def test_random_numbers_go_on_where_the_state_was_saved(tmp_path):
    r = Run(tmp_path, Config())
    torch.rand(7)
    r.save_state(1)
    expected = torch.rand(4)
    resumed = Run(tmp_path, Config(), resume=True)
    assert not torch.equal(torch.rand(4), expected), "a new run starts from the seed"
    resumed.load_state()
    assert torch.equal(torch.rand(4), expected)


def test_a_run_starts_from_its_seed(tmp_path):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    Run(tmp_path / "a", Config())
    first = draws()
    Run(tmp_path / "b", Config())
    assert draws() == first
    Run(tmp_path / "c", Config(seed=4))
    assert all(x != y for x, y in zip(draws(), first, strict=True))
    seed_everything(3)
    assert draws() == first


# --- provenance ---------------------------------------------------------------------------------------------
def test_provenance_names_a_script_of_a_subfolder_by_its_path(monkeypatch):
    script = Path(__file__).parent.parent / "recipes" / "compare.py"
    monkeypatch.setattr("sys.argv", [str(script), "--a", "b"])
    assert provenance()["command"] == "python recipes/compare.py --a b"


def test_provenance_names_command_commit_versions_and_hardware(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/train_sft.py", "--lr", "1e-3"])
    record = provenance()
    assert record["command"] == "python train_sft.py --lr 1e-3"
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["versions"]) == {*run.PACKAGES, "python"}
    assert "threads" in record["hardware"] or torch.cuda.is_available()
    json.dumps(record)  # travels into results


def fake_git(monkeypatch, answers):
    def execute(command, **_):
        return type("Done", (), {"stdout": answers[command[3]] + "\n"})

    monkeypatch.setattr(run.subprocess, "run", execute)


@pytest.mark.parametrize(
    ("status", "commit"), [("", "f557a05abcde"), (" M model.py", "f557a05abcde+changes")]
)
def test_uncommitted_changes_show_in_the_commit(monkeypatch, status, commit):
    fake_git(monkeypatch, {"rev-parse": "f557a05abcde", "status": status})
    assert provenance()["commit"] == commit


def test_a_machine_without_git_or_repository_has_commit_none(monkeypatch):
    fake_git(monkeypatch, {"rev-parse": "", "status": ""})
    assert provenance()["commit"] == "none"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] == "none"


# --- small things -------------------------------------------------------------------------------------------
def test_auto_is_cuda_when_there_is_one(monkeypatch):
    for available, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert pick_device() == device
        assert pick_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize(
    "gpu,avx512_bf16,amx,precision,tokens",
    [(0, 0, 0, "fp32", 1024), (1, 0, 0, "bf16", 4096), (0, 1, 0, "bf16", 1024), (0, 0, 1, "bf16", 1024)],
)
def test_training_multiplies_in_what_and_as_much_as_suits_the_machine(
    gpu, avx512_bf16, amx, precision, tokens, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512_bf16))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    assert fast_precision() == precision
    for script in (train_sft, train_orl, train_o2o, train_hiper):
        defaults = {f.name: f.default_factory for f in dataclasses.fields(script.Config)}
        assert defaults["precision"]() == precision and defaults["tokens_per_forward"]() == tokens


def test_a_mistake_ends_a_script_with_one_line():
    with pytest.raises(SystemExit) as stop:
        fail(ValueError("no panel 'x': expected one of [...]"))
    assert stop.value.code == "error: no panel 'x': expected one of [...]"
