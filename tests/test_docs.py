"""README.md and docs/: what they name exists, what exists is named."""

import ast
import importlib
import re
import shlex
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import tyro
from test_mutations import CASES

from data import LEVELS, Credit
from diagnostics import ALARMS, PLAY_ALARMS, level_quantities
from hiper import HiperConfig
from learner import Decisions, losses
from readings import PRESETS, RLConfig
from train_sft import said

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
MAP = PAGES["paper_map.md"]
METRICS = "\n".join(PAGES[f"train_{name}.md"] for name in ("sft", "orl", "o2o", "hiper"))
GROUPS = {"rl": RLConfig, "credit": Credit}
FIELDS = [(cls, f.name) for cls in GROUPS.values() for f in fields(cls)]


def defined(path: Path) -> set[str]:
    """`name` and `Class.member` of everything that a file defines."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        names |= bound(node)
        if isinstance(node, ast.ClassDef):
            inside = node.body + [n for n in ast.walk(node) if isinstance(n, ast.Assign)]
            names |= {f"{node.name}.{member}" for n in inside for member in bound(n)}
    return names


def bound(node: ast.AST) -> set[str]:
    """What one statement binds: `def x`, `class x`, `x = 1`, `x: int`, `self.x, y = 1, 2`."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    targets = [t for target in targets for t in getattr(target, "elts", [target])]
    return {getattr(t, "attr", getattr(t, "id", None)) for t in targets} - {None}


SUFFIXES = {"py", "md", "html", "json", "jsonl", "csv", "safetensors"}  # `plot.html` is a file
MODULES = {path.stem: defined(path) for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_exists(page):
    file = None
    for name, test in re.findall(r"`(?:tests/)?(test_\w+\.py)?::(\w+)(?:\[[^`]*\])?`", PAGES[page]):
        file = name or file  # `::test_x` goes on with the file named before it
        assert test in defined(ROOT / "tests" / file), f"{file}::{test}"
    for name in re.findall(r"\btest_\w+\.py\b", PAGES[page]):
        assert (ROOT / "tests" / name).exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_every_function_class_and_attribute_that_a_page_names_exists(page):
    for module, rest in re.findall(r"`([a-z_]\w*)\.(\w+(?:\.\w+)?)[`(]", PAGES[page]):
        if module in MODULES and rest not in SUFFIXES:
            assert rest in MODULES[module], f"{module}.{rest}"
    everything = set.union(*MODULES.values())
    for name in re.findall(r"`([A-Z]\w*\.[a-z_]\w*)`", PAGES[page]):
        assert name in everything, name


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_the_paper_map_names_every_field_and_every_value_of_a_reading(cls, name):
    assert f"`{name}`" in MAP or f"`{name} " in MAP
    hint = get_type_hints(cls)[name]
    for value in get_args(hint) if get_origin(hint) is Literal else ():
        assert f"| `{value}` |" in MAP, f"{name} {value}"


def test_the_paper_map_has_a_row_for_every_preset_with_all_that_it_sets():
    for preset, groups in PRESETS.items():
        (row,) = [line.replace("`", "") for line in MAP.splitlines() if line.startswith(f"| `{preset}` |")]
        for name, value in [item for group in groups.values() for item in group.items()]:
            text = f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            assert text in row, f"{preset}: {text}"


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_of_a_group_is_a_field_of_it(page):
    for group, flag in re.findall(r"--(rl|credit)\.([\w-]+)", PAGES[page]):
        known = {f.name for f in (*fields(GROUPS[group]), *(fields(HiperConfig) if group == "rl" else ()))}
        assert flag.replace("-", "_") in known, f"--{group}.{flag}"


def test_departures_are_numbered_without_gaps_and_the_readme_counts_them():
    numbers = re.findall(r"^- \*\*(P-G|R-G|P-S|R-S|P-H|R-H|O)(\d+)\. ", MAP, re.MULTILINE)
    for series in ("P-G", "R-G", "P-S", "R-S", "P-H", "R-H", "O"):
        found = [int(number) for name, number in numbers if name == series]
        assert found and found == list(range(1, len(found) + 1)), series
    assert set(re.findall(r"\b(?:P-G|R-G|P-S|R-S|P-H|R-H|O)\d+\b", MAP)) == {name + n for name, n in numbers}
    (total,) = re.findall(r"has all (\d+)", PAGES["README.md"])
    assert int(total) == len(numbers)


def test_the_paper_map_names_every_fault_of_a_release_that_is_put_back():
    cases = {case.fault for case in CASES}
    named = set(re.findall(r"\*([^*]+)\*", " ".join(re.findall(r"Put back: (.*)", MAP))))
    assert named - cases == set()
    faults = {case.fault for case in CASES if case.reference.startswith("R-")}
    assert faults - named == set()
    for case in CASES:
        for number in re.findall(r"R-\w+", case.reference):
            (line,) = re.findall(rf"- \*\*{number}\. .*", MAP)
            assert f"*{case.fault}*" in line, f"{number} does not name {case.fault!r}"


def test_pages_name_exactly_the_quantities_that_a_step_can_log():
    rows = {"level": torch.tensor([0, 0, 0, 0]), "expert": torch.tensor([True, True, False, False])}
    numbers = torch.tensor([-1.0, -2.0, -3.0, -5.0])
    d = Decisions(**{name: rows.get(name, numbers) for name in Decisions._fields})
    made = set(losses(d, RLConfig(conservative=1.0, actor="td3_bc"), 4)) | set(level_quantities(d, "sum"))
    made |= {name.partition("/")[2] for name in said([("planner", -1.0)])}
    found = re.findall(r"`(level|actor|critic|" + "|".join(LEVELS) + r")/([\w*]+)`", METRICS)
    named = {quantity for level, quantity in found if level not in ("actor", "critic")} - {"logp_held"}
    assert {name for name in made if not any(fnmatch(name, pattern) for pattern in named)} == set()
    assert {pattern for pattern in named if not any(fnmatch(name, pattern) for name in made)} == set()
    assert {name for name in found if name[0] in ("actor", "critic")} == {
        ("actor", "grad_norm"), ("critic", "grad_norm")
    }  # fmt: skip
    of_play = set(re.findall(r"`play/(\w+)`", METRICS))
    assert set(ALARMS) <= made and set(PLAY_ALARMS) <= of_play


def printed_commands() -> dict[str, str]:
    """Every `python <script> ...` that a page or the head of a script says to type -> where it stands."""
    texts = PAGES | {"base/README.md": (ROOT / "base" / "README.md").read_text()}
    scripts = [
        path for folder in (".", "recipes", "base", "exercises") for path in (ROOT / folder).glob("*.py")
    ]
    texts |= {path.name: ast.get_docstring(ast.parse(path.read_text())) or "" for path in scripts}
    found = {}
    for name, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines() + re.findall("`([^`\n]+)`", text):
            if (
                line.lstrip().startswith("python ")
                and ".py" in line
                and not re.search(r"python -m|\.\.\. |FILE|NAME|FOLDER", line)
            ):
                found.setdefault(shlex.join(shlex.split(line, comments=True)), name)
    return found


@pytest.mark.parametrize(("command", "page"), printed_commands().items())
def test_every_printed_command_is_one_that_its_script_understands(command, page, monkeypatch):
    _, script, *flags = shlex.split(command)
    assert (ROOT / script).exists(), page
    script = "show.py" if script == "data.py" else script  # data.py hands over to it
    if "class Config" in (ROOT / script).read_text():
        monkeypatch.syspath_prepend((ROOT / script).parent)
        module = importlib.import_module(Path(script).stem)
        tyro.cli(module.Config, args=flags)  # a flag that does not exist ends the test


@pytest.mark.parametrize("page", [*PAGES, "base/README.md"])
def test_every_file_that_a_page_links_to_exists(page):
    path = ROOT / page if "/" in page or page == "README.md" else ROOT / "docs" / page
    for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", path.read_text()):
        assert (path.parent / link).exists(), link
    for file in re.findall(
        r"`((?:results|recipes|docs|panels|exercises|notebooks)/[\w./-]+\.\w+)`", path.read_text()
    ):
        assert (ROOT / file).exists(), file
