"""Script: alfworld_fast.py against the real engine, step for step -> results/alfworld_difftest.json.

Needs the package (lean, it compiles a planner): python -m venv /tmp/alfvenv, then with its pip
    install --no-deps alfworld==0.4.2 textworld==1.7.0 fast-downward-textworld==20.6.4 jericho==3.3.1
    install numpy tqdm networkx more_itertools tatsu==5.8.3 hashids mementos termcolor prompt_toolkit tyro
and runs in about 10 minutes on one core:
    export ALFWORLD_DATA=...
    /tmp/alfvenv/bin/python recipes/alfworld_difftest.py --out results/alfworld_difftest.json
Compared after every command: the observation, the whole sorted list of admissible commands, and `won`. Both
engines play each step in turn. Every 20th game runs the real engine as shipped, for the speed table; in the
others it keeps what it parsed (a pure function of its text), and reset() takes the translation of load().
"""

import copy
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import textworld
import textworld.envs.pddl.logic as logic
import textworld.envs.pddl.textgen as textgen
import tyro
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
from textworld.envs import PddlEnv
from textworld.logic import Rule

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from alfworld_experts import oracle  # noqa: E402
from alfworld_fast import Engine, parse_game  # noqa: E402
from alfworld_games import TASK_TYPES, GameFile, generate, read_games  # noqa: E402


@dataclass(frozen=True)
class Plan:
    official: int = (
        152  # games from $ALFWORLD_DATA, a quarter from train, the rest of it from both valid splits
    )
    generated: int = 72  # generated games, train rooms and unseen rooms
    steps: int = 50  # commands a game: half random, then the oracle until it wins, then random again
    stock_every: int = 20  # every n-th game runs the real engine unpatched; 0 is never
    seed: int = 0
    out: str = ""  # file for the report, e.g. results/alfworld_difftest.json; "" prints it only


# --- the real engine ----------------------------------------------------------------------------------------
def game_data(game: GameFile, grammar: str) -> dict:
    """The content of game.tw-pddl; for "put" the domain and texts of alfworld 0.3.5, as in games 2.1.1."""
    domain, texts = Path(ALFRED_PDDL_PATH).read_text(), Path(ALFRED_TWL2_PATH).read_text()
    if grammar == "put":
        domain, texts = domain.replace(_block(domain, "(:action help", "\n)\n"), ""), old_texts(texts)
    return {
        "pddl_domain": domain,
        "grammar": texts.replace("UNKNOWN GOAL", game.task),
        "pddl_problem": game.problem,
    }


def old_texts(texts: str) -> str:
    for new, old in (
        ("You arrive at {r.name}.", "You arrive at {lend.name}."),
        ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
        ('"move {o} to {r}"', '"put {o} in/on {r}"'),
    ):
        assert new in texts, f"alfworld changed its grammar: {new!r} is not in it"
        texts = texts.replace(new, old)
    return texts.replace(_block(texts, "action help {", '""";\n}'), "")


def _block(text: str, start: str, end: str) -> str:
    begin = text.index(start)
    return text[begin : text.index(end, begin) + len(end)]


class Reference:
    """The real engine, one object for all games: a new one loads a 34 MB library that is never freed."""

    def __init__(self):
        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        self.env = AlfredDemangler(PddlEnv(infos))
        self.shipped = (textgen._parse_and_convert, Rule.parse_conjunctive_query, logic.PddlState)
        self.parsed, self.queries, self.fresh = {}, {}, None

    def patch(self, on: bool) -> None:
        """Parses of the same text are kept, and reset() takes the state that load() just translated."""
        parse, query, state = self.shipped

        def kept_parse(text, rule_name=None, **kwargs):
            key = text, rule_name
            if key not in self.parsed:
                self.parsed[key] = parse(text, rule_name=rule_name, **kwargs)
            return copy.deepcopy(self.parsed[key])

        def kept_query(expression):
            if expression not in self.queries:
                self.queries[expression] = query(expression)
            return self.queries[expression]

        def kept_state(library, problem, game_logic):
            key, (old_key, old) = (problem, game_logic), self.fresh or (None, None)
            self.fresh = None if old_key == key else (key, state(library, problem, game_logic))
            return old if old_key == key else self.fresh[1]

        textgen._parse_and_convert = kept_parse if on else parse
        Rule.parse_conjunctive_query = kept_query if on else query
        logic.PddlState = kept_state if on else state

    def start(self, game: GameFile, grammar: str):
        arguments, self.fresh = sys.argv, None
        self.env.load(game_data(game, grammar))  # overwrites sys.argv
        sys.argv = arguments
        return self.env.reset()

    def step(self, command: str):
        return self.env.step(command)[0]


# --- the walk -----------------------------------------------------------------------------------------------
def walk(engine: Engine, steps: int, rng: random.Random):
    """Yields commands: random ones, from half the steps the oracle's until it wins, then random ones again.

    One in ten was admissible at some time of this game, which it seldom still is, or is a slip of the pen.
    """
    stale, plan = set(), None
    for i in range(steps):
        commands = engine.admissible()
        stale.update(commands)
        if i == steps // 2:
            plan = oracle(engine)
        command = next(plan, None) if plan else None
        if command is None:
            near = [
                c for c in commands if not c.startswith("go to") and c not in ("look", "inventory", "help")
            ]
            command = rng.choice(near if near and rng.random() < 0.6 else commands)
            if rng.random() < 0.1:
                command = rng.choice([rng.choice(sorted(stale)), slip(rng.choice(sorted(stale)), rng)])
        yield command


def slip(command: str, rng: random.Random) -> str:
    slips = (
        command + " ", command.upper(), command.replace(" ", "  ", 1), command[:-1], command + "1", "",
        "help", "take nothing from nowhere 1", command.replace("move", "put").replace(" to ", " in/on "),
        command.replace("put", "move").replace(" in/on ", " to "),
    )  # fmt: skip
    return rng.choice(slips)


def compare(game: GameFile, grammar: str, reference: Reference, steps: int, rng: random.Random) -> dict:
    """Plays one game in both engines; -> counts, CPU seconds, and what differed first."""
    spent = Counter()

    def timed(name: str, call, *arguments):
        start = time.process_time()
        result = call(*arguments)
        spent[name] += time.process_time() - start
        return result

    state = timed("real start", reference.start, game, grammar)
    engine = timed("fast start", lambda: Engine(parse_game(game.problem, game.task), grammar))
    obs, won, done, mismatches, example, wins = engine.reset(), engine.won, 0, 0, None, 0
    commands = walk(engine, steps, rng)
    command = "(reset)"
    while True:
        admissible = timed("fast admissible", engine.admissible)
        theirs = [state["feedback"], state["admissible_commands"], bool(state["won"])]
        if theirs != [obs, admissible, won]:
            mismatches += 1
            odd = sorted(set(theirs[1]) ^ set(admissible))
            example = example or [game.id, grammar, done, command, theirs[0], obs, odd, theirs[2], won]
        wins += won
        if (command := next(commands, None)) is None:
            break
        state = timed("real step", reference.step, command)
        obs, won = timed("fast step", engine.step, command)
        done += 1
    return {"steps": done, "mismatches": mismatches, "won": int(wins > 0), "example": example, "spent": spent}


# --- all of it ----------------------------------------------------------------------------------------------
def choose_games(plan: Plan) -> list[tuple[str, str, GameFile]]:
    """(source, grammar, game), the six types in turn within each source, both grammars in turn."""
    sources = {"generated train": plan.generated // 2, "generated valid_unseen": plan.generated // 2}
    if plan.official:
        sources |= {"official train": plan.official // 4, "official valid_seen": plan.official * 3 // 8}
        sources["official valid_unseen"] = plan.official - sum(list(sources.values())[2:])
    chosen = []
    for source, count in sources.items():
        kind, split = source.split()
        games = generate(split, count, plan.seed) if kind == "generated" else read_games(split, "official")
        random.Random(plan.seed).shuffle(games)
        by_type = {t: [game for game in games if game.task_type == t] for t in TASK_TYPES}
        rounds = [by_type[t][i] for i in range(count) for t in TASK_TYPES if i < len(by_type[t])][:count]
        chosen += [(source, ("move", "put")[i // 6 % 2], game) for i, game in enumerate(rounds)]
    random.Random(plan.seed).shuffle(chosen)
    return chosen


def run(plan: Plan) -> dict:
    reference, rng = Reference(), random.Random(plan.seed)
    counts, types = defaultdict(Counter), Counter()
    spent, steps, examples = {True: Counter(), False: Counter()}, Counter(), []
    for i, (source, grammar, game) in enumerate(choose_games(plan)):
        stock = bool(plan.stock_every) and i % plan.stock_every == 0
        reference.patch(not stock)
        result = compare(game, grammar, reference, plan.steps, rng)
        types[game.task_type] += 1
        for key in (f"{source}, {grammar}", "all"):
            counts[key].update(games=1, **{k: result[k] for k in ("steps", "mismatches", "won")})
        spent[stock].update(result["spent"])
        steps[stock] += result["steps"]
        examples += [result["example"]] * (result["example"] is not None)
        print(f"{i + 1} {source}, {grammar}: {dict(counts['all'])}", flush=True)
    reference.patch(False)
    return {
        **counts["all"],
        "by_source": {key: dict(count) for key, count in sorted(counts.items()) if key != "all"},
        "by_type": dict(types),
        "examples": examples[:5],
        "speed": speed(spent, steps),
        "plan": asdict(plan),
    }


def speed(spent: dict[bool, Counter], steps: Counter) -> dict:
    """CPU time of both engines on the same steps; a stock step includes its list of admissible commands."""
    both = spent[True] + spent[False]
    fast = both["fast step"] / steps.total()
    listed = fast + both["fast admissible"] / steps.total()
    table = {
        "fast_steps_per_s": round(1 / fast),
        "fast_steps_per_s_with_admissible": round(1 / listed),
        "patched_ms_per_step": round(1000 * spent[False]["real step"] / max(1, steps[False]), 1),
    }
    if steps[True]:
        own = (spent[True]["fast step"] + spent[True]["fast admissible"]) / steps[True]
        stock = spent[True]["real step"] / steps[True]
        table |= {
            "stock_ms_per_step": round(1000 * stock, 1),
            "stock_steps": steps[True],
            "stock_over_fast_with_admissible": round(stock / own),
        }
    return table


def origin() -> dict:
    """Provenance as of every result; where torch is not installed, what can be said without it."""
    try:
        from run import provenance

        common = provenance()
    except ImportError:
        changed = "+changes" if _read("git", "status", "--porcelain", "-uno") else ""
        cpu = [line.partition(": ")[2] for line in _read("lscpu").splitlines() if "Model name" in line]
        common = {
            "command": " ".join(["python", "recipes/alfworld_difftest.py", *sys.argv[1:]]),
            "commit": _read("git", "rev-parse", "--short=12", "HEAD") + changed,
            "versions": {"python": platform.python_version()},
            "hardware": f"{os.cpu_count()} x {''.join(cpu).strip() or platform.machine()}, one process",
        }
    packages = ("alfworld", "textworld", "fast-downward-textworld")
    return common | {"versions": common["versions"] | {name: version(name) for name in packages}}


def _read(*command: str) -> str:
    """What a command says about this machine or folder; "" where there is no such command."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def main(plan: Plan) -> None:
    started = origin()  # before the package overwrites sys.argv
    start = time.time()
    report = run(plan) | {"minutes": round((time.time() - start) / 60, 1), **started}
    print(json.dumps(report, indent=1))
    if plan.out:
        Path(plan.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Plan))
