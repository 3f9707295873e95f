"""Every command that README, docs/ and base/README.md print is run, shortened."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from test_docs import printed_commands

import annotate
import envs
import scripted
from data import transitions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PANEL = ["lifespan-longest-lived 0", "find-non-living-thing 0"]
CPU, PLAY = "--threads 1 --device cpu", "--workers 0"
TRAIN = f"{CPU} --batch-size 8"
# What a command begins with -> flags that are added to it: a later flag wins. In the order in which a reader
# would type them: what a command reads is written by one before it.
SHORT = {
    "collect.py": f"--threads 1 {PLAY}",
    "base/pretrain.py": "--tokens 5000 --hidden 32 --heads 2 --layers 1 --vocab 500 --words words.txt",
    "train_sft.py": f"{TRAIN} --epochs 0.05 --rank 4",
    "collect.py --source policy": f"--threads 1 {PLAY} --max-steps 4",
    "train_orl.py": f"{TRAIN} --steps 2 --warmup-steps 1",
    "train_o2o.py": f"{TRAIN} {PLAY} --env-steps 8 --max-steps 4 --dev-limit 1 --slots 2",
    "train_hiper.py": f"{CPU} --episodes 4 --per-iteration 2 --group 2 --warmup 1 --max-steps 3 --dev ''",
    "eval.py": f"{CPU} {PLAY} --max-steps 4",
    "eval.py --agent gold": f"{CPU} {PLAY}",  # whole: exact.py reads what is solved
    "eval.py --check": "",
    "": "",
}  # fmt: skip
ELSEWHERE = ("tour.py", "hunt.py")  # run, shortened too, by test_tour.py and test_exercises.py
COMMANDS = [
    command
    for command, page in printed_commands().items()
    if page.endswith(".md") and Path(shlex.split(command)[1]).name not in ELSEWHERE
]


def kind(command: str) -> str:
    """The longest key of SHORT that a command begins with."""
    return max((key for key in SHORT if command.removeprefix("python ").startswith(key)), key=len)


@pytest.fixture(scope="module")
def folder(one_simulator, tmp_path_factory):
    """A copy of the repository, panels of two episodes, no results: a command may write where it likes."""
    root = tmp_path_factory.mktemp("repository")
    for path in ROOT.iterdir():
        if path.name not in ("out", "results", "panels") and path.name[0] != ".":
            (shutil.copytree if path.is_dir() else shutil.copy)(path, root / path.name)
    for name in ("results", "panels"):
        (root / name).mkdir()
    for path in (ROOT / "panels").glob("*.txt"):
        lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
        lines = PANEL if path.name.startswith("scienceworld") else lines[:2]
        (root / "panels" / path.name).write_text("\n".join(lines))
    (root / "out" / "mine").mkdir(parents=True)
    (root / "out" / "demo").symlink_to("mine")  # README reads what make demo left there
    (root / "words.txt").write_text("apple\nriver\nstone\ncloud\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs, "PANELS", root / "panels")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("ALFWORLD_DATA", raising=False)
        patch.chdir(root)
        yield root


def test_the_readme_shows_real_decisions(one_simulator):
    with envs.EnvPool("scienceworld", 1, 0, 10**6) as pool:
        (episode,) = scripted.play_gold(pool, [("power-component", 0)], "scienceworld")
    decisions = [t.prompt + t.completion for t in transitions(annotate.annotate(episode))]
    shown = re.findall(r"\n(Plan the next.+?)\n\n(Act on.+?)\n\n(Update the.+?)\n```", README, re.DOTALL)
    assert len(shown) == 1 and set(shown[0]) <= set(decisions)


@pytest.mark.parametrize("command", sorted(COMMANDS, key=lambda c: list(SHORT).index(kind(c))))
def test_a_printed_command_runs(command, folder, monkeypatch, capsys):
    _, script, *flags = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, *flags, *shlex.split(SHORT[kind(command)])])
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stopped:
        assert not stopped.code, capsys.readouterr().err[-1000:]
    if "--out" in flags:
        assert (folder / flags[flags.index("--out") + 1]).exists()
