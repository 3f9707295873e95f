"""Two processes train as one does: train_sft.py and train_orl.py under `accelerate launch` (gloo, CPU)."""

import csv
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_model import make_backbone

import train_orl
import train_sft
from data import Decision, Episode, Segment, Turn, write_episodes
from readings import RLConfig
from run import gather, own_share, processes, sum_gradients, sum_over_processes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="accelerate launch is for Linux and macOS")
ROOT = Path(__file__).parent.parent
HERE = {"precision": "fp32", "tokens_per_forward": 250, "threads": 1, "device": "cpu"}
SFT = HERE | {"rank": 4, "epochs": 1.0, "batch_size": 9, "lr": 1e-3, "save_every": 2}  # 5 steps
ORL = HERE | {"steps": 4, "warmup_steps": 1, "batch_size": 7}
NAMES = ["sft", "sft, one part", "separate", "orl", "orl, one part", "policy"]


def configs(root: Path, count: int) -> dict:
    """name -> (script, its config) of the runs of `count` processes, in root/<count>/<name>."""
    sft = {"data": root / "gold.jsonl", "model": str(root / "base")} | SFT
    orl = {"init": root / "1/sft", "expert": root / "gold.jsonl", "rollouts": root / "rollouts.jsonl"} | ORL
    one_part = {"tokens_per_forward": 10**6}  # which leaves nothing to the second process
    sampling = RLConfig(value_answers="policy", conservative=0.5, actor="td3_bc")
    options = {
        "sft": sft,
        "sft, one part": sft | one_part,
        "separate": sft | {"adapters": "separate"},
        "orl": orl,
        "orl, one part": orl | one_part,
        "policy": orl | {"rl": sampling},
    }
    script = {name: train_sft if "data" in given else train_orl for name, given in options.items()}
    return {n: (script[n], script[n].Config(out=root / str(count) / n, **options[n])) for n in NAMES}


# --- what runs in each of two processes: the last lines of this file ----------------------------------------
def in_each_process(root: Path) -> None:
    """Sums and shares, kept for the test; then the runs that are not started from the command line."""
    rank = processes().process_index
    used_by = {"nobody": (), "the first": (0,), "the second": (1,), "both": (0, 1)}
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in used_by}
    for name, ranks in used_by.items():
        if rank in ranks:
            (parameters[name] * torch.tensor([1.0, 10.0 ** (rank + 1)])).sum().backward()
    sum_gradients(list(parameters.values()))
    record = {
        "gradients": {n: None if p.grad is None else p.grad.tolist() for n, p in parameters.items()},
        "shares": [own_share(list(range(n))) for n in (5, 2, 1, 0)],
        "gathered": gather([f"{rank}{i}" for i in range(2 - rank)]),
        "sum": sum_over_processes(10.0**rank),
    }
    (root / f"{rank}.json").write_text(json.dumps(record))
    for name, (script, config) in configs(root, 2).items():
        if name not in ("sft", "orl"):
            script.main(replace(config, resume=name == "separate"))  # it goes on from one process' state


# --- the runs -----------------------------------------------------------------------------------------------
def make_episode(task, variation, lengths, source="expert"):
    """Subtasks of `lengths` actions each, won at the end; observations of very unequal length."""
    turns, segments, decisions = [], [], []
    for k, length in enumerate(lengths):
        start, end = len(turns), len(turns) + length
        segments.append(Segment(f"goal {k}", start, end, "done " * (k + 1)))
        for n in range(start, end):
            room = "with a box " * ((3 * n + variation) % 7)
            obs = f"{task} {variation} said {n}\n\nroom {room}\n\nbag {n}"
            done, over = n == end - 1, n == sum(lengths) - 1
            flags = {"claimed_done": done, "verified_done": done and n % 2 == 0}
            turns.append(Turn(obs, f"act {n}", "", 0.1, over, False, f"goal {k}", f"did {n}", **flags))
            if source != "expert":
                decisions.append(Decision("executor", n, [5 + n, 6 + k, 7, 1], [-2.0, -3.0, -1.5, -4.0]))
    return Episode(
        "scienceworld", task, variation, f"Do {task}.", turns, segments, "over", 100.0, True, source,
        decisions,
    )  # fmt: skip


def launch(*command) -> str:
    """The documented command with two processes; what it prints. No GPU is seen, so it is gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    starts = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    starts += ["--main_process_port", str(port), *map(str, command)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    text = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(starts, cwd=ROOT, env=env, **text) as process:
        try:
            stdout, stderr = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:  # one process waits for the other
            process.terminate()  # not a kill, so that the launcher ends both
            stdout, stderr = process.communicate()
    assert process.returncode == 0, stdout + stderr
    return stdout


def flags(options):
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]


def alone(script, config, stop=0):
    """Runs it in this process; micro-batches of every step. stop: Ctrl-C at that step."""
    counts, original = [], script.micro_batches

    def spy(*args):
        counts.append(len(original(*args)))
        if len(counts) == stop:
            raise KeyboardInterrupt
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "micro_batches", spy)
        script.main(config)
    return counts


@pytest.fixture(scope="module")
def w(tmp_path_factory):
    """Every run in this process, and in two: from the command line, then the others in one launch."""
    root = tmp_path_factory.mktemp("processes")
    make_backbone(root / "base")
    tasks = ["boil", "melt", "find"]
    write_episodes(root / "gold.jsonl", [make_episode(t, i, [1, 3, 2]) for i, t in enumerate(tasks)])
    rollouts = [make_episode(t, i, [2, 4], "policy-1") for i, t in enumerate(tasks, start=5)]
    write_episodes(root / "rollouts.jsonl", rollouts)
    parts = {name: alone(*each) for name, each in configs(root, 1).items()}
    with pytest.raises(SystemExit, match="stopped at step 3; go on with --resume"):
        alone(*configs(root, 2)["separate"], stop=4)  # after the state of step 2 was written

    data = {"data": root / "gold.jsonl", "model": root / "base", "out": root / "2/sft"}
    printed = {"sft": launch("train_sft.py", *flags(data | SFT))}
    data = {"init": root / "1/sft", "expert": root / "gold.jsonl", "rollouts": root / "rollouts.jsonl"}
    printed["orl"] = launch("train_orl.py", *flags(data | ORL | {"out": root / "2/orl"}))
    printed["others"] = launch(__file__, root)
    return SimpleNamespace(root=root, parts=parts, printed=printed)


def weights(folder):
    """{file/name: tensor} of everything exported."""
    return {
        f"{path.relative_to(folder)}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def metrics(folder):
    """{(step, metric): value}; each is logged once."""
    rows = list(csv.reader((folder / "metrics.csv").open()))[1:]
    values = {(int(step), metric): float(value) for step, metric, value in rows}
    assert len(values) == len(rows)
    return values


# --- what they compute --------------------------------------------------------------------------------------
def test_the_processes_share_a_step_unequally(w):
    assert set(w.parts) == set(NAMES)
    for name, counts in w.parts.items():
        assert counts == [1] * len(counts) if "one part" in name else any(n in (3, 5, 7) for n in counts)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_the_parameters_of_one(w, name):
    one, two = (weights(w.root / count / name) for count in "12")
    assert one.keys() == two.keys() and any("lora_A" in n for n in one)
    for n in one:
        torch.testing.assert_close(one[n], two[n], atol=1e-5, rtol=0)
    orl = configs(w.root, 1)[name][0] is train_orl
    assert ("critic.safetensors/online.v.planner.0.bias" in one) == orl
    start = weights(w.root / "1/sft") if orl else {}  # a fresh adapter's B is 0
    moved = [(one[n] - start.get(n, 0)).abs().max() for n in one if "lora_B" in n]
    assert min(moved) > 1e-4, "a step that is missing would show"


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_log_the_metrics_of_one_once(w, name):
    one, two = (metrics(w.root / count / name) for count in "12")
    assert list(one) == list(two)
    assert one == pytest.approx(two, rel=1e-4, abs=1e-5, nan_ok=True)
    sft = configs(w.root, 1)[name][0] is train_sft
    assert {step for step, _ in one} == ({1, 5} if sft else {1, 2, 3, 4})


def test_one_process_writes_and_speaks(w):
    said = {name: text.count("saved ") for name, text in w.printed.items()}
    assert said == {"sft": 1, "orl": 1, "others": 4}
    for name in NAMES:
        folders = [w.root / count / name for count in "12"]
        one, two = (sorted(p.relative_to(folder) for p in folder.rglob("*")) for folder in folders)
        assert one == two
        one, two = (json.loads((folder / "policy.json").read_text()) for folder in folders)
        assert one == two


def test_shares_and_sums_by_hand(w):
    first, second = (json.loads((w.root / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["gradients"] == second["gradients"] == {
        "nobody": None,  # so that the optimizer leaves it, its weight decay included
        "the first": [1.0, 10.0],
        "the second": [1.0, 100.0],
        "both": [2.0, 110.0],
    }  # fmt: skip
    assert first["shares"] == [[0, 2, 4], [0], [0], []] and second["shares"] == [[1, 3], [1], [], []]
    assert first["gathered"] == second["gathered"] == ["00", "01", "10"]
    assert first["sum"] == second["sum"] == 11.0


def test_one_process_sums_nothing_and_shares_with_nobody():
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    used.grad = torch.tensor([1.0, -2.0])
    sum_gradients([used, unused])
    assert used.grad.tolist() == [1.0, -2.0] and unused.grad is None
    assert (own_share([1, 2, 3]), gather([1, 2]), sum_over_processes(3)) == ([1, 2, 3], [1, 2], 3.0)


if __name__ == "__main__":
    in_each_process(Path(sys.argv[1]))
