"""ALFWorld (arXiv:2010.03768) behind envs.TextWorld, on the fast engine or on the real one (TextWorld).

An episode is (task type, game id); the id says by itself whether the game is official or generated. Both
engines answer a command with one text. The observation adds what an agent that kept a note would know: the
receptacles listed at the start and what it carries, both taken from texts, neither from hidden state.
What this file does not do: the real engine's own work (alfworld_textworld.py).
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from alfworld_experts import oracle, searcher
from alfworld_fast import Engine, parse_game
from alfworld_games import GameFile, find_game, recorded_actions
from envs import OBS_SEPARATOR, StepResult

EMPTY_HANDED = "You are not carrying anything."


@dataclass
class _Slot:
    """One running episode, as texts tell it."""

    engine: object  # alfworld_fast.Engine, or alfworld_textworld.Reference
    description: str
    room: str  # the sentence that lists the receptacles
    carrying: str = EMPTY_HANDED
    won: bool = False
    actions: list[str] = field(default_factory=list)


class AlfWorld:
    """Implements envs.TextWorld; `task` is the task type and `variation` the game's id.

    The score is 100 when the goal holds and 0 before; the goal ends the episode. The real engine plays one
    game at a time in a process, so it serves one slot.
    """

    def __init__(
        self,
        max_steps: int = 50,
        engine: Literal["fast", "reference"] = "fast",
        grammar: Literal["move", "put"] = "move",
    ):
        self.max_steps, self.grammar, self.slots, self.reference = max_steps, grammar, {}, None
        if engine == "reference":
            from alfworld_textworld import Reference

            self.reference = Reference(grammar)

    def close(self) -> None:
        self.slots.clear()

    # --- episodes -------------------------------------------------------------------------------------------
    def _game(self, task: str, variation: str) -> GameFile:
        game = find_game(variation)
        if game.task_type != task:
            raise ValueError(f"game {variation} is of type {game.task_type}, not {task}: correct the panel")
        return game

    def _engine(self, game: GameFile) -> Engine:
        return Engine(parse_game(game.problem, game.task), self.grammar)

    def _start(self, slot: int, game: GameFile) -> tuple[object, str]:
        if self.reference is None:
            engine = self._engine(game)
            return engine, engine.reset()
        if busy := [s for s in self.slots if s != slot]:
            raise ValueError(
                f"the real engine plays one game in a process, and slot {busy[0]} has it: play with as many "
                "workers as slots, e.g. --slots 2 --workers 2"
            )
        return self.reference, self.reference.reset(game)

    def reset(self, slot: int, task: str, variation: str) -> StepResult:
        engine, first = self._start(slot, self._game(task, variation))
        room, _, sentence = first.partition("\n\nYour task is to: ")
        room = room.split("\n\n")[-1].strip()
        self.slots[slot] = state = _Slot(engine, f"Your task is to: {sentence.strip()}", room)
        return self._result(state, room, 0.0)

    def step(self, slot: int, action: str) -> StepResult:
        state = self.slots[slot]
        feedback, won = state.engine.step(action)
        state.actions.append(action)
        if held := re.match(r"You pick up the ([\w ]+) from the ", feedback):
            state.carrying = f"You are carrying: a {held[1]}."
        elif feedback.startswith(("You move the ", "You put the ")):
            state.carrying = EMPTY_HANDED
        before, state.won = state.won, won
        return self._result(state, feedback.strip(), float(won) - float(before))

    def _result(self, state: _Slot, feedback: str, reward: float) -> StepResult:
        obs = OBS_SEPARATOR.join((re.sub(r"\n\n+", "\n", feedback), state.room, state.carrying))
        truncated = not state.won and len(state.actions) >= self.max_steps
        return StepResult(obs, state.description, reward, 100.0 * state.won, state.won, truncated, state.won)

    # --- for collection and baselines -----------------------------------------------------------------------
    def gold_path(self, slot: int, task: str, variation: str) -> list[str]:
        """What the searching expert does, from texts alone; some of its paths are longer than an episode."""
        engine = self._engine(self._game(task, variation))
        expert, path = searcher(engine.reset(), self.grammar), []
        command = next(expert, None)
        while command is not None and not engine.won and len(path) < 200:
            path.append(command)
            obs, _ = engine.step(command)
            try:
                command = expert.send(obs)
            except StopIteration:
                command = None
        return path

    def oracle_path(self, slot: int, task: str, variation: str) -> list[str]:
        """What somebody does who knows where everything is."""
        engine, path = self._engine(self._game(task, variation)), []
        for command in oracle(engine):
            path.append(command)
            engine.step(command)
        return path

    def recorded_path(self, slot: int, task: str, variation: str) -> list[str]:
        """The actions recorded with an official train game, in grammar "move"."""
        return recorded_actions(variation)

    def valid_actions(self, slot: int) -> list[str]:
        """Every admissible command now, sorted; the random baseline draws from it."""
        return self.slots[slot].engine.admissible()
