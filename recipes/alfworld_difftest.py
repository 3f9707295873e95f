"""Script: alfworld_fast.py against the real engine, step for step -> results/alfworld_difftest.json.

Needs `make alfworld` and runs in about 10 minutes on one core:
    export ALFWORLD_DATA=...
    python recipes/alfworld_difftest.py --out results/alfworld_difftest.json
Compared after every command: the observation, the whole sorted list of admissible commands, and `won`. Both
engines play each step in turn. Every 20th game runs the real engine as shipped, for the speed table; in the
others it keeps what it parsed (a pure function of its text), and reset() takes the translation of load().
"""

import json
import random
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from alfworld_experts import oracle  # noqa: E402
from alfworld_fast import Engine, parse_game  # noqa: E402
from alfworld_games import TASK_TYPES, GameFile, generate, read_games  # noqa: E402
from alfworld_textworld import Reference  # noqa: E402
from run import provenance  # noqa: E402


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

    reference.grammar = grammar
    timed("real start", reference.reset, game)
    engine = timed("fast start", lambda: Engine(parse_game(game.problem, game.task), grammar))
    obs, won, done, mismatches, example, wins = engine.reset(), engine.won, 0, 0, None, 0
    commands = walk(engine, steps, rng)
    command = "(reset)"
    while True:
        admissible = timed("fast admissible", engine.admissible)
        theirs = [reference.state["feedback"], reference.admissible(), reference.won]
        if theirs != [obs, admissible, won]:
            mismatches += 1
            odd = sorted(set(theirs[1]) ^ set(admissible))
            example = example or [game.id, grammar, done, command, theirs[0], obs, odd, theirs[2], won]
        wins += won
        if (command := next(commands, None)) is None:
            break
        timed("real step", reference.step, command)
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


def main(plan: Plan) -> None:
    start = time.time()
    report = run(plan) | {"minutes": round((time.time() - start) / 60, 1), **provenance()}
    packages = ("alfworld", "textworld", "fast-downward-textworld")
    report["versions"] |= {name: version(name) for name in packages}
    print(json.dumps(report, indent=1))
    if plan.out:
        Path(plan.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Plan))
