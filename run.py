"""A run: its folder, seed, device, config.json with provenance, metrics.csv, atomic state for --resume.

out/<name>/ holds config.json, metrics.csv (step,metric,value), state.pt (all that --resume needs) and what
the script exports (adapter/, policy.json, critic.safetensors). What this file does not do: know any
algorithm.
"""

import csv
import dataclasses
import json
import os
import platform
import random
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce

Precision = Literal["bf16", "fp32"]
PACKAGES = ("torch", "transformers", "peft", "numpy", "scienceworld", "tokenizers")


def provenance() -> dict:
    """Command, commit, versions and hardware: saved with every run and every result."""
    commit = _git("rev-parse", "--short=12", "HEAD") or "none"
    if _git("status", "--porcelain", "-uno", "--", ".", ":!results"):  # a new result changes no code
        commit += "+changes"
    here, script = Path(__file__).parent.resolve(), Path(sys.argv[0] or "python").resolve()
    script = script.relative_to(here).as_posix() if here in script.parents else script.name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "command": " ".join(["python", script, *sys.argv[1:]]),
        "commit": commit,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "hardware": gpu or f"{os.cpu_count()} x {_cpu_name()}, {torch.get_num_threads()} threads",
    }


def _git(*args: str) -> str:
    """What git says about this folder; "" outside a repository and on a machine without git."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- one process or several: each takes its share of every batch, sums go over all -------------------------
def processes() -> PartialState:
    """This process among those that `accelerate launch` started; alone without it."""
    return PartialState(cpu=not torch.cuda.is_available())


def pick_device(device: str = "auto") -> str:
    """ "auto" is CUDA when there is one; one of several processes gets its own."""
    if processes().num_processes > 1:
        return str(processes().device)
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_precision() -> Precision:
    """bf16 on a GPU and a CPU with units for it; elsewhere fp32, many times as fast there (docs/log.md)."""
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if torch.cuda.is_available() or has_units else "fp32"


def forward_tokens() -> int:
    """Padded tokens of a micro-batch that suit a GPU, or the caches of a CPU (docs/log.md)."""
    return 4096 if torch.cuda.is_available() else 1024


def own_share(parts: list) -> list:
    """Every n-th of the parts of a batch, which all n processes drew alike."""
    return parts[processes().process_index :: processes().num_processes]


def gather(items: list) -> list:
    """The items of all processes, in their order."""
    return gather_object(items)


def sum_over_processes(value: float) -> float:
    """The sum of a number over all processes."""
    return reduce(torch.tensor(value, dtype=torch.float64, device=processes().device), "sum").item()


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sums gradients over processes, in place; a parameter that none of them used keeps None, so no step.

    Losses are sums / the global count, so that n processes compute what one does.
    """
    if processes().num_processes == 1:
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=processes().device)
    for parameter, count in zip(parameters, reduce(used, "sum").tolist(), strict=True):
        if count:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduce(own, "sum")


# --- the folder -------------------------------------------------------------------------------------------
def seed_everything(seed: int) -> None:
    """Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Run:
    """The folder of one training run; without `resume`, a folder that already holds a run is refused.

    Of several processes the first one writes; all read its state.
    """

    def __init__(self, folder: Path, config, resume: bool = False):
        self.folder, self.config, self.writes = Path(folder), config, processes().is_main_process
        self.metrics = self.folder / "metrics.csv"
        if self.writes:
            self._open(resume)
        processes().wait_for_everyone()
        seed_everything(config.seed)

    def _open(self, resume: bool) -> None:
        if (self.folder / "config.json").exists() and not resume:
            raise ValueError(
                f"{self.folder} already holds a run: add --resume to go on with it, or choose another --out"
            )
        self.provenance = provenance()
        if (self.folder / "config.json").exists():
            saved = json.loads((self.folder / "config.json").read_text())
            self._same_config(saved)
            first, again = saved["provenance"], {k: self.provenance[k] for k in ("command", "commit")}
            self.provenance = first | {"resumed": [*first.get("resumed", []), again]}
        self.folder.mkdir(parents=True, exist_ok=True)
        record = dataclasses.asdict(self.config) | {"provenance": self.provenance}
        text = json.dumps(record, indent=2, default=str)
        (self.folder / "config.json").write_text(text + "\n")
        if not self.metrics.exists():
            self.metrics.write_text("step,metric,value\n")

    def _same_config(self, saved: dict) -> None:
        """Going on with other settings would mix two runs."""
        ours = json.loads(json.dumps(dataclasses.asdict(self.config), default=str))
        free = {"resume", "threads", "device", "compile"}
        if changed := [k for k in ours if k not in free and saved.get(k) != ours[k]]:
            was = ", ".join(f"{k}={saved.get(k)!r}" for k in changed)
            raise ValueError(
                f"{self.folder} was started with {was}: resume with that, or choose another --out"
            )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a step's metrics to metrics.csv."""
        if not self.writes:
            return
        with self.metrics.open("a", newline="") as file:
            csv.writer(file).writerows((step, name, f"{value:.6g}") for name, value in metrics.items())

    def save_state(self, step: int, **state) -> None:
        """Writes state.pt in one move, so that a crash leaves the last whole state."""
        if not self.writes:
            return
        state |= {"step": step, "torch_rng": torch.get_rng_state()}
        part = self.folder / "state.part"
        torch.save(state, part)
        part.replace(self.folder / "state.pt")

    def load_state(self) -> dict | None:
        """The last saved state (tensors and plain values: nothing is unpickled), or None at a fresh start.

        Metrics logged after that state are dropped: the steps that made them are done again.
        """
        path, state = self.folder / "state.pt", None
        if path.exists():
            state = torch.load(path, weights_only=True, map_location="cpu")
            torch.set_rng_state(state["torch_rng"])
        processes().wait_for_everyone()
        if not self.writes:
            return state
        with self.metrics.open(newline="") as file:
            header, *rows = csv.reader(file)
        step = state["step"] if state else 0
        kept = [
            row for row in rows if len(row) == len(header) and int(row[0]) <= step
        ]  # not a torn last line
        with self.metrics.open("w", newline="") as file:
            csv.writer(file).writerows([header, *kept])
        return state


def fail(error: Exception) -> None:
    """Ends a script with a one-line message: what was wrong and what to do."""
    raise SystemExit(f"error: {error}") from None
