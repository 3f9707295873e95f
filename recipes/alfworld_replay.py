"""Script: episodes of the fast engine played again in the real one -> results/<name>.json.

    export ALFWORLD_DATA=...
    python recipes/alfworld_replay.py --episodes FILE.jsonl ... --out results/alfworld_replay.json

Needs `make alfworld`. Every observation, reward and end must be the recorded one; 3 seconds an episode.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import Episode, read_episodes  # noqa: E402
from envs import EnvPool  # noqa: E402
from run import provenance  # noqa: E402


@dataclass(frozen=True)
class Config:
    episodes: tuple[Path, ...]  # JSONL files of eval.py or collect.py
    out: Path  # file for the report
    max_steps: int = 50  # environment steps per episode, as they were played
    workers: int = 2  # real engines, one a process


def replay(pool: EnvPool, episodes: list[Episode], bar: tqdm) -> list[str]:
    """Where the real engine differs from the record: one line an episode; worker w plays every w-th."""
    problems, running, waiting = [], {}, list(reversed(episodes))
    while waiting or running:
        free = [slot for slot in range(pool.size) if slot not in running][: len(waiting)]
        starts = {slot: waiting.pop() for slot in free}
        requests = {slot: ("reset", e.task, e.variation) for slot, e in starts.items()}
        requests |= {slot: ("step", e.turns[t].action) for slot, (e, t) in running.items()}
        for slot, now in pool.call(requests).items():
            episode, t = running.get(slot, (starts.get(slot), -1))
            played = (now.obs, now.reward, now.terminated, now.truncated)
            turn = episode.turns[t]
            outcome = (turn.reward, turn.terminated, turn.truncated) if t >= 0 else (0.0, False, False)
            over = t + 1 == len(episode.turns)
            if played != (episode.obs_after(t), *outcome) or over and now.success != episode.success:
                problems.append(f"{episode.id} after action {t}: {played}, recorded {outcome}")
                over = True
            if over:
                running.pop(slot, None)
                bar.update()
            else:
                running[slot] = (episode, t + 1)
    return problems


def main(config: Config) -> None:
    began, rows = time.time(), []
    with EnvPool("alfworld-reference", config.workers, config.workers, config.max_steps) as pool:
        for path in config.episodes:
            episodes = read_episodes(path)
            problems = replay(pool, episodes, tqdm(total=len(episodes), desc=path.stem))
            row = {
                "episodes": len(episodes),
                "steps": sum(len(e.turns) for e in episodes),
                "won": sum(e.success for e in episodes),
                "mismatches": len(problems),
            }
            rows.append({"name": path.stem, **row, "examples": problems[:3]})
            print(rows[-1])
    report = {"files": rows, "minutes": round((time.time() - began) / 60, 1), **provenance()}
    config.out.write_text(json.dumps(report, indent=1) + "\n")
    if sum(row["mismatches"] for row in rows):
        raise SystemExit("the engines differ: see the report")


if __name__ == "__main__":
    main(tyro.cli(Config))
