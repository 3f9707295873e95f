"""Text worlds behind one interface, and the pool that plays many episodes in lockstep.

A world answers with text: `reset(slot, task, variation) -> StepResult`, `step(slot, action) -> StepResult`.
Termination (the world ended) and truncation (our step limit) never share a name. What this file does not do:
know any benchmark; see scienceworld_env.py and
alfworld_env.py.
"""

import multiprocessing as mp
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

PANELS = Path(__file__).parent / "panels"


@dataclass(frozen=True)
class StepResult:
    """What one reset or step returns."""

    obs: str  # feedback, room and inventory, joined by OBS_SEPARATOR
    description: str  # the task, as the world words it
    reward: float  # score difference / 100 (a fatal mistake is -1 and more)
    score: float  # raw score in 0..100, negative after a fatal mistake; the metric is max(0, score)
    terminated: bool  # the world ended: success, or score below 0
    truncated: bool  # our step limit; never set together with terminated
    success: bool  # from the simulator alone: score 100


OBS_SEPARATOR = "\n\n"  # feedback <sep> room <sep> inventory


class TextWorld(Protocol):
    """Several episodes at once in one simulator; `slot` names the episode. Assume no thread safety."""

    def reset(self, slot: int, task: str, variation: int | str) -> StepResult: ...
    def step(self, slot: int, action: str) -> StepResult: ...
    def close(self) -> None: ...


# "alfworld" is the fast engine, "alfworld-reference" the real one; both play the panels of alfworld.
EnvName = Literal["scienceworld", "alfworld", "alfworld-reference"]


def make_world(env: EnvName, max_steps: int) -> TextWorld:
    """The world named `env`, loaded on demand so that its packages are needed only when it is played."""
    if env == "scienceworld":
        from scienceworld_env import ScienceWorld

        return ScienceWorld(max_steps=max_steps)
    if env in ("alfworld", "alfworld-reference"):
        from alfworld_env import AlfWorld

        return AlfWorld(max_steps, "reference" if env == "alfworld-reference" else "fast")
    raise ValueError(f"unknown env {env!r}: expected one of {get_args(EnvName)}")


def read_panel(env: EnvName, panel: str, split: str, limit: int = 0) -> list[tuple[str, int | str]]:
    """The fixed episode list panels/<env>_<panel>_<split>.txt as [(task, variation)], in file order.

    A variation is a number in ScienceWorld, the id of a game in ALFWorld.
    limit: keep the first so many of each task; 0 is all.

    Raises ValueError when the panel does not exist or a line is not `task variation`.
    """
    path = PANELS / f"{env.removesuffix('-reference')}_{panel}_{split}.txt"
    if not path.exists():
        known = sorted(p.stem for p in PANELS.glob("*.txt"))
        raise ValueError(f"no panel {path.stem!r}: expected one of {known}")
    episodes, kept = [], Counter()
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        parts = line.split()
        if len(parts) != 2 or not (parts[1].isdigit() or env.startswith("alfworld")):
            raise ValueError(f"{path.name}:{number}: {line!r} is not 'task variation', e.g. 'boil 14'")
        kept[parts[0]] += 1
        if not limit or kept[parts[0]] <= limit:
            episodes.append((parts[0], int(parts[1]) if parts[1].isdigit() else parts[1]))
    return episodes


def _attempt(call, *args):
    """call(*args), or its error as a value for the parent to raise; an unusual one goes as text."""
    try:
        return call(*args)
    except (ValueError, OSError, ImportError) as error:
        return error
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _serve(connection, env: str, max_steps: int) -> None:
    """A worker process: one world, requests answered in order, each by one answer, which may be an error."""
    world = _attempt(make_world, env, max_steps)

    def play(requests: list[tuple]) -> list:
        if isinstance(world, Exception):
            raise world
        return [getattr(world, name)(*args) for name, *args in requests]

    try:
        while (requests := connection.recv()) is not None:
            connection.send(_attempt(play, requests))
    except (EOFError, KeyboardInterrupt):
        return
    finally:
        if not isinstance(world, Exception):
            world.close()


class EnvPool:
    """Plays up to `size` episodes at once in `workers` processes, one simulator each (0: in this process).

    `call({slot: ("reset", task, variation) | ("step", action)}) -> {slot: StepResult}` answers all requests
    together. Slot s lives in worker s % workers.
    """

    def __init__(self, env: str, size: int, workers: int = 1, max_steps: int = 50):
        self.size, self.workers, self.max_steps = size, min(workers, size), max_steps
        self.world = make_world(env, max_steps) if workers == 0 else None
        self.pipes, self.processes = [], []
        context = mp.get_context("spawn")
        for _ in range(self.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, env, max_steps), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, requests: dict[int, tuple]) -> dict[int, object]:
        if self.world is not None:
            return {s: getattr(self.world, name)(s, *args) for s, (name, *args) in sorted(requests.items())}
        results, errors = {}, []
        shares = [[s for s in sorted(requests) if s % self.workers == w] for w in range(self.workers)]
        for pipe, slots in zip(self.pipes, shares, strict=True):
            if slots:
                with suppress(OSError):  # a dead process; its missing answer is noticed below
                    pipe.send([(requests[s][0], s, *requests[s][1:]) for s in slots])
        for pipe, slots in zip(self.pipes, shares, strict=True):
            if slots:  # all answers are read before an error is raised: the next call must not get them
                try:
                    answer = pipe.recv()
                except (EOFError, OSError):
                    answer = RuntimeError(
                        "a world process died, perhaps for lack of memory: start again with fewer workers"
                    )
                if isinstance(answer, Exception):
                    errors.append(answer)
                else:
                    results |= dict(zip(slots, answer, strict=True))
        if errors:
            raise errors[0]
        return results

    def close(self) -> None:
        if self.world is not None:
            self.world.close()
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except (BrokenPipeError, OSError):
                continue  # the worker is already gone
        for process in self.processes:
            process.join(timeout=10)
            process.terminate()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
