"""Settings for all tests: no network, one thread (two cores may be shared)."""

import os
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="module")
def one_simulator():
    """One Java process for all that a file of tests plays in its own process: starting one takes seconds."""
    import envs

    simulator, make_world = envs.make_world("scienceworld", 50), envs.make_world

    class Shared:
        """The simulator for one pool, which may not close it and brings its own step limit."""

        def __init__(self, max_steps):
            self.limit = max_steps

        def __getattr__(self, name):
            simulator.max_steps = self.limit
            return getattr(simulator, name)

        def close(self):
            pass

    def make(env, max_steps):
        return Shared(max_steps) if env == "scienceworld" else make_world(env, max_steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs, "make_world", make)
        yield simulator
    simulator.close()
