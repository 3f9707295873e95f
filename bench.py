"""Script: seconds and memory of the log-prob, of an update and of shared prompts, beside the usual ways.

    python bench.py logprob  # or: update, prefix, rollout; alone on the machine

The variants of a case run in turn, round by round in one process, so that a busy machine slows all of them
alike; their results are compared first. What this file does not do: train, or score a policy (eval.py).
Shapes: T tokens, N of them response, V vocabulary, D hidden; K answers of at most A tokens to a prompt of P.
"""

import ctypes
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from typing import Literal
from unittest import mock

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from batches import collate, micro_batches
from bench_rollout import random_policy, rollouts
from candidates import pack, score_candidates
from critic import Critics
from data import LEVELS, Transition
from learner import Learner
from logprob import sequence_logprobs, token_logprobs
from model import hidden_states, lm_of
from readings import RLConfig
from run import fail, pick_device, provenance, seed_everything


@dataclass(frozen=True)
class Config:
    bench: tyro.conf.Positional[Literal["logprob", "update", "prefix", "rollout"]]  # what to measure
    shapes: tuple[str, ...] = ()  # of logprob: DxVxNxT, of prefix: PxKxA; default: SHAPES
    vocab: int = 32_000  # V of update; prefix has 2048
    hidden: int = 256  # D of update and prefix
    layers: int = 4  # of update and prefix
    model: str = "base"  # of rollout; "" is a random one of --hidden and --layers
    batch_size: int = 64  # decisions of an update
    rounds: int = 5  # timed rounds, after one that warms up and is checked
    patience: float = 12.0  # seconds for the rounds of a variant of logprob; slower: it counts as it warms up
    device: str = "auto"
    out: Path | None = None  # default: results/bench_<bench>.json


SHAPES = {
    "logprob cpu": ("256x32000x2048x8192", "1024x128256x512x2048", "4096x128256x256x1024"),
    "logprob cuda": ("256x32000x2048x8192", "1024x128256x2048x8192", "4096x128256x8192x8192"),
    "prefix": ("64x8x8", "256x8x16", "512x16x16", "1024x8x32"),
}
TARGETS = [  # case, variant: how often as fast as the fastest that begins so ("MB of": as small); most MB
    ("logprob cpu 256x32000x2048x8192 fp32", "ours",
     {"naive, response": 1.3, "naive, all": 5, "torch": 1.5, "MB": 40}),
    ("logprob cpu 256x32000x2048x8192 bf16", "ours",
     {"naive, response": 2.5, "naive, all": 10, "torch, fp32 sums": 4, "torch": 4, "MB": 40}),
    ("update", "3 fused log-prob", {"0": 1.5}),
    ("update", "6 frozen features", {"0": 4}),
    ("update cpu vocab 32000", "3 fused log-prob", {"MB of 0": 3}),
    ("update cpu vocab 32000", "6 frozen features", {"MB of 0": 3}),
    ("prefix cpu 256x8x16 train", "packed row", {"padded rows": 4}),
    ("rollout cpu", "4 bf16", {"0": 8}),
]  # fmt: skip


def compare(config: Config, device: str, case: tuple[str, ...]) -> list[dict]:
    """A row per variant: times as fast as the first one, median seconds, errors, peak memory."""

    def call(name: str) -> tuple:
        began, result = time.perf_counter(), steps[name]()
        if "cuda" in device:
            torch.cuda.synchronize()
        return result, time.perf_counter() - began

    steps, truth = STEPS[config.bench](config, device, *case)
    warm, rows = {name: call(name) for name in steps}, []
    true = truth() if truth else next(iter(warm.values()))[0]
    off = {name: errors(result, true) for name, (result, _) in warm.items()}
    for name in steps:
        if max(off[name].values()) > 1e-3 and not ("bf16" in f"{case}{name}" or "frozen" in name):
            raise ValueError(f"{name} computes something else: {off[name]}, expected rounding errors")
    patience = config.patience if config.bench == "logprob" else 1e9
    turns = {name: int(min(config.rounds, patience / took)) for name, (_, took) in warm.items()}
    seconds = {name: [] if turns[name] else [took] for name, (_, took) in warm.items()}
    for turn, name in product(range(config.rounds), steps):
        if turn < turns[name]:
            seconds[name].append(call(name)[1])
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["bench"])  # imports once and forks: a process is there at once
    for name, took in seconds.items():
        row = {"variant": name, "ratio": median(seconds[next(iter(steps))]) / median(took)}
        row |= {"seconds": median(took), "min": min(took), "max": max(took), "rounds": len(took)}
        row |= {"samples_per_s": config.batch_size / median(took)} if config.bench == "update" else {}
        rows.append(row | off[name] | {"memory_mb": None})
        if turns[name] and Path("/proc/self/clear_refs").exists():
            with ProcessPoolExecutor(1, mp_context=forks) as pool:  # nothing else has used memory there
                rows[-1]["memory_mb"] = pool.submit(extra_memory, config, device, case, name).result()
    return rows


def errors(found: tuple, true: tuple) -> dict[str, float]:
    """Of values (n,): the largest difference. Of gradients: |found - true| / |true|, all tensors together."""
    off = {"value_error": (found[0] - true[0]).abs().max().item()}
    if found[1]:
        gradient, exact = (torch.cat([x.double().flatten() for x in tensors]) for _, tensors in (found, true))
        off["gradient_error"] = ((gradient - exact).norm() / exact.norm()).item()
    return off


def extra_memory(config: Config, device: str, case: tuple[str, ...], name: str) -> float:
    """Peak MB of the second call of a step, above the state before it; on CPU that of the whole process."""
    step = STEPS[config.bench](config, device, *case)[0][name]
    step()  # loads kernels, makes optimizer states, fills caches
    if "cuda" in device:
        torch.cuda.reset_peak_memory_stats()
        before, _, after = torch.cuda.max_memory_allocated(), step(), torch.cuda.max_memory_allocated()
        return (after - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept would serve step() unseen
    Path("/proc/self/clear_refs").write_text("5")  # ru_maxrss, the high-water mark, starts again
    before, _, after = getrusage(RUSAGE_SELF), step(), getrusage(RUSAGE_SELF)
    return (after.ru_maxrss - before.ru_maxrss) / 2**10


def check_targets(where: str, rows: list[dict]) -> list[dict]:
    """A row per target of this case that has something to be compared with."""
    checked = []
    for place, variant, bounds in TARGETS:
        for rival, bound in bounds.items() if where.startswith(place) else ():
            unit, begins = "memory_mb" if "MB" in rival else "seconds", rival.removeprefix("MB of ")
            (value,) = (row[unit] for row in rows if row["variant"] == variant)
            others = [row[unit] for row in rows if row["variant"].startswith(begins)]
            if value and (others or rival == "MB"):
                value = min(others) / value if others else value
                row = {"case": where, "variant": variant, "rival": rival, "bound": bound, "value": value}
                checked.append(row | {"met": value >= bound if others else value <= bound})
    return checked


def table(rows: list[dict]) -> str:
    """Aligned columns under the keys of the rows."""
    text = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(rows[0], *text, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in [rows[0], *text])


def sizes(shape: str, letters: str) -> list[int]:
    """ "64x8x16" -> [64, 8, 16]; letters, say PxKxA, name them."""
    if not all(n.isdecimal() and int(n) for n in shape.split("x")) or shape.count("x") != letters.count("x"):
        raise ValueError(f"--shapes has {shape!r}, expected {letters} in whole numbers above 0")
    return [int(number) for number in shape.split("x")]


# --- logprob: log pi of response tokens and its gradient, under a frozen head -------------------------------
def naive(hidden: Tensor, weight: Tensor, targets: Tensor, *_) -> Tensor:
    """log pi (N,) from all logits (N, V), widened to float32 first; hidden (N, D), weight (V, D)."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def libraries(cuda: bool, kind: str, D: int) -> dict[str, Callable]:
    """What is installed of others: name -> f(hidden (N, D), weight (V, D), targets (N,)) -> log pi (N,)."""
    found, options = {}, getattr(torch.nn, "LinearCrossEntropyOptions", None)
    large = {"batch_chunk_size": 2048 if cuda else 512, "chunking_method": None}  # default: a few rows, slow
    settings = {"fp32 sums, large chunks": large} | ({"fp32 sums, default": {}} if cuda or D < 1024 else {})
    if kind == "bf16":  # any policy but "auto" sums in the dtype of its input
        settings["bf16 sums, large chunks"] = large | {"acc_policy": "balanced"}
    for name, own in settings.items() if options else ():
        found[f"torch, {name}"] = partial(F.linear_cross_entropy, reduction="none", options=options(**own))
    if cuda and find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as liger

        rest = (None, None, -100, 0.0, 0.0, "none", None, False, None, False, False, False, None, None)
        for const in (1, 4, 8, 16):  # 1 is its default
            found[f"liger-kernel, chunk_mem_const {const}"] = lambda *x, c=const: liger.apply(*x, *rest, c)[0]
    if cuda and find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut-cross-entropy"] = partial(cut, reduction="none")
        found["cut-cross-entropy, exact"] = partial(cut, reduction="none", filter_eps=None)
    return {name: lambda *x, loss=loss: -loss(*x) for name, loss in found.items()}


def logprob_steps(config: Config, device: str, shape: str, kind: str) -> tuple[dict, Callable]:
    """Forward and backward of sum_i w_i log pi_i; of 256 rows log pi and its gradient, and the true ones."""
    D, V, N, T = sizes(shape, "DxVxNxT")
    seed_everything(0)
    dtype, wide = (torch.float32, torch.float64) if kind == "fp32" else (torch.bfloat16, torch.float32)
    with torch.device(device):  # logits have a standard deviation of 3
        weight = torch.empty(V, D, dtype=dtype).uniform_(-1, 1).mul_(3 * (3 / D) ** 0.5)
        hidden, rows = torch.randn(T, D).to(dtype).requires_grad_(), torch.randperm(T)[:N].sort().values
        targets, upstream = torch.randint(V, (T,)), torch.randn(len(rows))

    def step(way: Callable) -> tuple[Tensor, list[Tensor]]:
        logp = way(hidden.index_select(0, rows), weight, targets[rows])
        (gradient,) = torch.autograd.grad(logp, hidden, upstream.to(logp.dtype))
        return logp.detach()[:256], [gradient[rows[:256]]]

    def truth() -> tuple[Tensor, list[Tensor]]:  # of the same rounded numbers, in a wider type
        exact = hidden.detach()[rows[:256]].to(wide).requires_grad_()
        logp = naive(exact, weight.to(wide), targets[rows[:256]])
        return logp.detach(), torch.autograd.grad(logp, exact, upstream[:256].to(wide))

    def recomputed(h: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        chunks = zip(h.split(256), y.split(256), strict=True)
        return torch.cat([checkpoint(naive, h, weight, y, use_reentrant=False) for h, y in chunks])

    ways = {"naive, response rows": naive, "checkpoint, 256 rows": recomputed, "ours": token_logprobs}
    ways |= libraries("cuda" in device, kind, D)
    ways["naive, all tokens"] = lambda *_: naive(hidden, weight, targets)[rows]
    return {name: partial(step, way) for name, way in ways.items()}, truth


# --- update: from the forwards of the papers' code to ours, one change at a time ----------------------------
RUNGS = ["0 papers' code", "1 shared forward", "2 response rows", "3 fused log-prob"]  # each adds one change
RUNGS += [
    "4 length buckets",
    "5 bf16 autocast",
    "6 frozen features",
    "7 frozen, compiled",
]  # 6: another reading


def all_positions(hidden, weight, input_ids, action_mask, *_, **__) -> tuple[Tensor, Tensor]:
    """sequence_logprobs by the logits of every token (B, T, V), prompt and padding included."""
    logp = (hidden @ weight.T)[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    per_token = F.pad(torch.where(action_mask[:, 1:], logp, 0.0), (1, 0))
    return per_token, per_token.sum(1)


def whole_lm(policy, input_ids: Tensor, level: Tensor) -> Tensor:
    """hidden_states by the whole causal LM, as in the papers' code: nothing reads its logits (B, T, V)."""
    if torch.is_grad_enabled():  # the logits of this one are in all_positions
        return hidden_states(policy, input_ids, level)
    return policy(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states[-1]


def update_steps(config: Config, device: str, _: str) -> tuple[dict, None]:
    """One update on each rung: its losses and the gradient of the policy."""
    seed_everything(0)
    ids = partial(random.choices, range(config.vocab))
    decisions = [  # prompts of 120 to 420 tokens, 300 on average, next ones of like length; answers 4 to 40
        Transition(
            level=LEVELS[row % 3], prompt=tuple(ids(k=n)), completion="",
            completion_ids=ids(k=4 + min(36, int(random.expovariate(1 / 8)))), behavior_logprobs=[],
            reward=random.gauss(0, 1), steps=1, terminated=row % 10 == 9, truncated=False,
            next_prompt=() if row % 10 > 8 else tuple(ids(k=median([120, n + random.randint(-90, 90), 420]))),
            next_level=LEVELS[row % 3], source="expert", episode_id="", turn=row,
        )
        for row, n in enumerate(int(random.triangular(120, 421, 360)) for _ in range(config.batch_size))
    ]  # fmt: skip
    tokenizer = mock.Mock(bos_token_id=None, eos_token_id=0, pad_token_id=0)  # the texts are token ids
    tokenizer.side_effect = lambda ids, **_: mock.Mock(input_ids=ids)

    def prepared(rung: int) -> tuple[Learner, list]:
        policy, critics = random_policy(config, device, config.vocab), Critics(config.hidden).to(device)
        options = {"precision": "fp32" if rung < 5 else "bf16", "compile": rung == 7}
        hidden_fn = partial(hidden_states, **options) if rung else whole_lm
        learner = Learner(policy, critics, hidden_fn, RLConfig(features="frozen" if rung >= 6 else "adapted"))
        if rung == 0:  # without the actor's hidden states, V and Q have a forward of their own
            learner._features = lambda batch, _: Learner._features(learner, batch)
        groups = [decisions[i : i + 8] for i in range(0, len(decisions), 8)]
        groups = groups if rung < 4 else micro_batches(decisions, tokenizer, max_tokens=4096)
        return learner, [collate(group, tokenizer).to(device) for group in groups]

    def step(rung: int, learner: Learner, batches: list) -> tuple[Tensor, list[Tensor]]:
        every = mock.patch("learner.sequence_logprobs", all_positions if rung < 2 else sequence_logprobs)
        with every, mock.patch("logprob.token_logprobs", naive if rung < 3 else token_logprobs):
            metrics = learner.update(batches)
        losses = [value for key, value in metrics.items() if key.endswith("_loss")]
        return torch.tensor(losses), [p.grad for p in learner.actor_parameters]

    return {name: partial(step, rung, *prepared(rung)) for rung, name in enumerate(RUNGS)}, None


# --- prefix: K answers to one prompt ------------------------------------------------------------------------
def prefix_steps(config: Config, device: str, shape: str, kind: str) -> tuple[dict, None]:
    """log pi of K answers (K,), each of A/2 to A tokens, and to train its gradient."""
    P, K, A = sizes(shape, "PxKxA")
    policy = random_policy(config, device, 2048)
    lm, head = lm_of(policy), policy.get_output_embeddings().weight
    lengths = [P, *torch.randint((A + 1) // 2, A + 1, (K,)).tolist()]
    prompt, *answers = (torch.randint(2048, (length,)).tolist() for length in lengths)
    with torch.device(device):
        upstream, packed = torch.randn(K), pack([prompt], [answers], fill=0)  # (1, P + K A)
        ids, segment = pack([prompt] * K, [[answer] for answer in answers], fill=0)  # (K, P + A)

    def cached_prompt() -> Tensor:
        """Keys and values of the prompt once, then copied K times."""
        known = DynamicCache(config=lm.config)
        trunk = partial(lm.model, past_key_values=known, use_cache=True)
        last = trunk(input_ids=ids[:1, :P]).last_hidden_state[:, -1:]
        known.batch_repeat_interleave(K)
        hidden = torch.cat([last.expand(K, -1, -1), trunk(input_ids=ids[:, P:]).last_hidden_state], 1)
        return sequence_logprobs(hidden, head, ids[:, P - 1 :], segment[:, P - 1 :] == 1)[1]

    def step(way: Callable) -> tuple[Tensor, list[Tensor]]:
        with torch.set_grad_enabled(kind == "train"):
            logp = way()
        trained = [p for p in policy.parameters() if p.requires_grad]
        return logp.detach(), torch.autograd.grad(logp, trained, upstream) if kind == "train" else []

    ways = {"padded rows": lambda: sequence_logprobs(hidden_states(policy, ids), head, ids, segment == 1)[1]}
    ways["cached prompt"] = cached_prompt
    ways["packed row"] = lambda: score_candidates(policy, packed)[0][0]
    return {name: partial(step, way) for name, way in ways.items()}, None


STEPS = {"logprob": logprob_steps, "update": update_steps, "prefix": prefix_steps}


def main(config: Config) -> None:
    device, bench, results, targets = pick_device(config.device), config.bench, [], []
    for package in ("liger_kernel", "cut_cross_entropy") if bench == "logprob" else ():
        print(f"{package}: {'installed, used on CUDA' if find_spec(package) else 'not installed'}")
    kinds = ("fp32", "bf16") if bench == "logprob" else ("train", "score")
    shapes = config.shapes or SHAPES.get(bench) or SHAPES.get(f"{bench} {device[:4]}")
    one = {"update": [(f"vocab {config.vocab}",)], "rollout": [(config.model or f"hidden {config.hidden}",)]}
    for case in one.get(bench) or product(shapes, kinds):
        where = " ".join((bench, device[:4], *case))
        rows = rollouts(config, device) if bench == "rollout" else compare(config, device, case)
        print(f"\n{where}\n{table(rows)}", flush=True)
        results += [{"case": where, **row} for row in rows]
        targets += check_targets(where, rows)
    out = config.out or Path(__file__).parent / "results" / f"bench_{bench}.json"
    record = {"config": asdict(config), "results": results, "targets": targets, "provenance": provenance()}
    out.write_text(json.dumps(record, indent=2, default=str) + "\n")
    print("\n" + table(targets) if targets else "", f"wrote {out}", sep="\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        fail(error)
