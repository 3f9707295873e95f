"""The real ALFWorld engine (TextWorld), which alfworld_fast.py must equal: one game at a time in a process.

It parses the same grammar at every step; `Reference` keeps what it parsed, a pure function of the text, and
is four times as fast with the same answers. It is not thread-safe, and each environment loads a library of
34 MB that is never freed: one object serves all games of a process. Needs `make alfworld` (it compiles C++).
"""

import copy
import sys
from pathlib import Path

from alfworld_games import GameFile

try:
    import textworld
    import textworld.envs.pddl.logic as logic
    import textworld.envs.pddl.textgen as textgen
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
    from textworld.envs import PddlEnv
    from textworld.logic import Rule
except ImportError as error:
    raise ImportError(
        f"the real ALFWorld engine needs {error.name!r}: run `make alfworld` (it needs a C++ compiler), "
        "or play --env alfworld, the fast engine with the same texts"
    ) from error

# The texts that differ in the games 2.1.1, new and old; they have no `help` either.
OLD_TEXTS = (
    ("You arrive at {r.name}.", "You arrive at {lend.name}."),
    ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
    ('"move {o} to {r}"', '"put {o} in/on {r}"'),
)


def game_data(game: GameFile, grammar: str = "move") -> dict[str, str]:
    """The content of game.tw-pddl; for "put" the domain and texts of the games 2.1.1."""
    domain, texts = Path(ALFRED_PDDL_PATH).read_text(), Path(ALFRED_TWL2_PATH).read_text()
    if grammar == "put":
        domain = domain.replace(_block(domain, "(:action help", "\n)\n"), "")
        texts = texts.replace(_block(texts, "action help {", '""";\n}'), "")
        for new, old in OLD_TEXTS:
            if new not in texts:
                raise ValueError(
                    f"alfworld changed its grammar, {new!r} is not in it: install alfworld==0.4.2"
                )
            texts = texts.replace(new, old)
    return {
        "pddl_domain": domain,
        "grammar": texts.replace("UNKNOWN GOAL", game.task),
        "pddl_problem": game.problem,
    }


def _block(text: str, start: str, end: str) -> str:
    begin = text.index(start)
    return text[begin : text.index(end, begin) + len(end)]


class Reference:
    """The real engine with the interface of alfworld_fast.Engine; `reset` takes the game."""

    def __init__(self, grammar: str = "move"):
        self.grammar, self.state = grammar, None
        self.env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))
        self.shipped = (textgen._parse_and_convert, Rule.parse_conjunctive_query, logic.PddlState)
        self.parsed, self.queries, self.fresh = {}, {}, None
        self.patch(True)

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

    def reset(self, game: GameFile) -> str:
        """Loads the game; -> the first observation."""
        arguments, self.fresh = sys.argv, None
        try:
            self.env.load(game_data(game, self.grammar))
            self.state = self.env.reset()
        finally:
            sys.argv = arguments  # the translator, which either of them runs, overwrites it
        return self.state["feedback"]

    def step(self, command: str) -> tuple[str, bool]:
        self.state = self.env.step(command)[0]
        return self.state["feedback"], self.won

    @property
    def won(self) -> bool:
        return bool(self.state["won"])

    def admissible(self) -> list[str]:
        return list(self.state["admissible_commands"])
