"""The code base: a module imports from lower layers only, nothing imports a script, files stay short."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    "envs prompts model logprob critic readings run scores",
    "scienceworld_env alfworld_fast logprob_triton progress "  # worlds use the interface in envs
    "scienceworld_rules alfworld_rules",
    "acting data diagnostics alfworld_experts",  # diagnostics reads the critic
    "candidates annotate hierarchy alfworld_games",
    "alfworld_textworld batches",
    "labels scripted learner completion plan_execute "  # scripted: players without a model
    "alfworld_env",
    "teacher viewer hiper bench_rollout renaming watch show check",
    "collect train_sft train_orl train_o2o train_hiper eval plot bench demo "
    "panels/make panels/make_rooms base/pretrain recipes/compare recipes/sweep recipes/alfworld_difftest "
    "recipes/alfworld_replay recipes/curves recipes/exact recipes/ship",
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
SCRIPTS = set(LAYERS[-1].split())
ON_DEMAND = {  # make_world loads a world only when it is played; CUDA its kernel only where Triton is
    ("envs", "scienceworld_env"),
    ("envs", "alfworld_env"),
    ("logprob", "logprob_triton"),
    ("data", "show"),  # python data.py --show
}
MODULES = [name for name in LAYER if (ROOT / f"{name}.py").exists()]
OWN = {path.stem for path in ROOT.glob("*.py")}
FILES = [
    p for p in sorted(ROOT.rglob("*.py")) if not {".venv", "tests", "out"} & set(p.relative_to(ROOT).parts)
]


def imported(path: Path) -> set[str]:
    """Names of our own modules that the file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path.name}: a flat layout has no relative imports"
            names.add(node.module.split(".")[0])
    return names & OWN


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_lower_layers_only(name):
    for other in imported(ROOT / f"{name}.py") & set(LAYER):
        assert LAYER[other] < LAYER[name] or (name, other) in ON_DEMAND, f"{name} imports {other}"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("diagnostics", {"critic"}), ("completion", {"data", "hierarchy"}), ("critic", set())],
)
def test_a_module_that_others_stand_on_imports_no_more_than_this(name, allowed):
    assert imported(ROOT / f"{name}.py") <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_imports_a_script(path):
    assert imported(path) & SCRIPTS == set()


def test_every_module_at_the_top_has_a_layer_and_hides_no_package():
    assert OWN - set(LAYER) == set(), "give it a layer in LAYERS above"
    assert OWN & set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_stays_under_350_lines(path):
    assert len(path.read_text().splitlines()) <= 350
