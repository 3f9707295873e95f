"""The exercises: their checks refuse the empty functions and usual mistakes, and accept our solutions."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "exercises"


def load(name: str, replaced: tuple[str, str] = ("", "")):
    """A file of exercises/ as a module, with one piece of its text replaced."""
    text = (FOLDER / f"{name}.py").read_text()
    assert replaced[0] in text
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    exec(compile(text.replace(*replaced) if replaced[0] else text, spec.origin, "exec"), module.__dict__)
    return module


@pytest.fixture
def checks(monkeypatch):
    """The checks, of the module that is set as `mine`."""
    monkeypatch.setitem(sys.modules, "tasks", load("tasks"))
    monkeypatch.setitem(sys.modules, "solutions", load("solutions"))
    monkeypatch.delenv("EXERCISES", raising=False)
    return load("test_tasks")


def run(checks, name: str, mine) -> None:
    checks.mine = mine
    check = getattr(checks, name)
    marks = getattr(check, "pytestmark", [])
    for values in [(value,) for value in marks[0].args[1]] if marks else [()]:
        check(*values)


MISTAKES = {
    "test_1_expectile": ("torch.where(diff < 0, 1 - expectile, expectile)", "expectile"),
    "test_2_option": ("gamma ** len(rewards) * next_value", "gamma * next_value"),
    "test_3_awr": (".clamp(max=math.log(max_weight)).exp()", ".exp()"),
    "test_4_logprob_gradient": ("gradient[token] += 1", "gradient[token] = 1"),
    "test_5_mask": ("torch.tensor(prompt_tokens)[:, None] - 1", "torch.tensor(prompt_tokens)[:, None]"),
    "test_6_outcome": ("world_ended or verified or claimed", "world_ended or verified"),
    "test_7_judge": (r"to {1}\b", "to {1}"),
    "test_8_hae": ("next_value = following if t == end - 1", "next_value = v_low[t] if t == end - 1"),
    "test_9_temperature": ("share_at(middle) < share", "share_at(middle) > share"),
    "test_10_hunt": ('1: "R-G11", 2: "R-S2"', '2: "R-G11", 1: "R-S2"'),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_check_refuses_nothing_and_a_mistake_and_accepts_ours(name, checks):
    with pytest.raises((NotImplementedError, AssertionError)):
        run(checks, name, load("tasks"))
    with pytest.raises(AssertionError):
        run(checks, name, load("solutions", MISTAKES[name]))
    run(checks, name, load("solutions"))


def test_every_exercise_has_a_check_a_mistake_and_a_solution(checks):
    named = {name for name in vars(checks) if name.startswith("test_")}
    tasks, ours = load("tasks"), load("solutions")
    own = {name for name, x in vars(tasks).items() if callable(x) and x.__module__ == "tasks"}
    assert named == set(MISTAKES) and len(named) == 10
    assert len(own) == 9 and all(callable(getattr(ours, name)) for name in own)
    assert set(tasks.HUNT) == set(ours.HUNT) and set(ours.HUNT.values()) == set(ours.FAULTS)
    text = (FOLDER / "tasks.py").read_text()
    assert all(f"#   {fault} " in text for fault in ours.FAULTS)


def test_the_hunt_plants_one_fault_trains_on_it_and_shows_both_runs(tmp_path, capfd, checks):
    hunt = load("hunt")
    for number in hunt.HUNT:
        hunt.plant(number, tmp_path / "code")
        file, sound, faulty, _ = hunt.FAULTS[hunt.HUNT[number]]
        changed = [
            p.name
            for p in hunt.ROOT.glob("*.py")
            if p.read_text() != (tmp_path / "code" / p.name).read_text()
        ]
        assert changed == [file] and faulty in (tmp_path / "code" / file).read_text()
    hunt.main(
        hunt.Config(5, games=1, steps=4, max_steps=5, out=tmp_path / "hunt")
    )  # the raw advantage is the weight
    rows = {
        line.split()[0]: line.split()[1:] for line in capfd.readouterr().out.splitlines() if "/" in line[:30]
    }
    sound, other = ([float(x) for x in rows["executor/weight_p05"][i : i + 2]] for i in (0, 2))
    assert min(sound) > 0 > min(other)
    assert rows["executor/weight_mean"][2:] == rows["executor/advantage_mean"][2:], "what gives it away"
