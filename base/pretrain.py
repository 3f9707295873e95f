"""Script: trains the small language model that ships in base/, from exploration text of train variations.

    python collect.py --source explore --panel full --limit 50 --max-steps 40 --out out/base/explore.jsonl
    python collect.py --env alfworld --source explore --max-steps 40 --out out/base/explore_alfworld.jsonl
    python base/pretrain.py --text out/base/explore.jsonl out/base/explore_alfworld.jsonl --tokens 30e6 \
        --words /usr/share/dict/american-english-small

The text holds observations, random actions and questions on what was just read: no gold path and no role
prompt, so what SFT and RL add is theirs. Resumable. `copied` says whether the model can spell a name that it
never saw before this text: what an agent needs in a world it does not know by heart.
"""

import json
import math
import random
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
import prompts  # noqa: E402
from data import Episode, read_episodes  # noqa: E402
from renaming import NUMBERED, new_names, rename, visible  # noqa: E402
from run import fast_precision, pick_device, provenance  # noqa: E402
from scripted import visible_names  # noqa: E402


@dataclass(frozen=True)
class Config:
    text: tuple[Path, ...]  # exploration episodes (JSONL)
    out: Path = Path(__file__).parent  # where model and tokenizer go
    vocab: int = 2048  # word pieces
    hidden: int = 192  # width
    layers: int = 4
    heads: int = 6
    feed_forward: int = 512
    words: Path | None = None  # English words, one a line, for new names; without it those of the text
    questions: float = 3.0  # mean number of questions on an observation
    dropout: float = 0.0  # of the merges of word pieces, in the renamed half of the text
    context: int = 320  # tokens per training row
    rows: int = 4  # rows per step: few, since what is short here is steps
    tokens: float = 11e6  # training tokens; the learning rate is annealed over them
    minutes: float = 0  # if not 0, train this long instead of --tokens (to compare sizes)
    lr: float = 2e-3  # peak learning rate
    seed: int = 0
    threads: int = 2
    device: str = "auto"


def document(episode: Episode, rng: random.Random, questions: float) -> str:
    """One episode as text: the whole observation at half of the steps, and whether each step was understood.

    Most actions that the world did not understand are left out. questions: mean number after an observation,
    from 1 on also after a result.
    """

    def asked(obs: str) -> list[str]:
        count = int(questions) + (rng.random() < questions % 1)
        return [question(things(obs), names, rng) for _ in range(count)]

    lines, names = [f"Task: {prompts.compact(episode.description)}"], visible(episode)
    for t, turn in enumerate(episode.turns):
        understood = not episode.obs_after(t).startswith(prompts.NOT_UNDERSTOOD)
        if not understood and rng.random() < 0.7:
            continue
        if t == 0 or rng.random() < 0.5:
            lines.append(f"Observation: {prompts.render(turn.obs)}")
            lines += asked(turn.obs)
        lines.append(f"Action: {turn.action}")
        lines.append(f"Result: {prompts.split_obs(episode.obs_after(t))[0]}; {understood}")
        lines += asked(episode.obs_after(t)) if questions >= 1 else []
    return "\n".join(lines)


def things(obs: str) -> dict[str, str]:
    """Names of the things that an observation lists -> the answer that says so: "mug" -> "mug 2"."""
    feedback, room, _ = prompts.split_obs(obs)
    if not room.startswith("room: "):
        return {name: f"{name}: yes" for name in visible_names(room)}
    return {kind: f"{kind} {number}" for kind, number in re.findall(NUMBERED, feedback.partition(": ")[2])}


def question(here: dict[str, str], names: list[str], rng: random.Random) -> str:
    """Is a thing of this episode in the list that was just read? Half of those asked for are."""
    name = rng.choice(list(here)) if here and rng.random() < 0.5 else rng.choice(names or ["air"])
    return f"Is there {name}? {here.get(name, 'no')}"


def train_tokenizer(documents: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits apart, so that temperatures are read digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<bos>", "<eos>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def pruned(
    tokenizer: PreTrainedTokenizerFast, tokens: torch.Tensor, share: float = 1 / 15_000
) -> PreTrainedTokenizerFast:
    """Without the merges whose piece is rarer than `share` of `tokens` (N,) and no part of a common one.

    The embedding of a rare piece stays as it began, so its word can be neither read, copied nor written;
    spelled with common pieces it can. The numbers of the pieces stay.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    count = torch.bincount(tokens, minlength=len(model["vocab"]))
    made = {first + second: (first, second) for first, second in model["merges"]}
    wanted = [piece for piece in made if count[model["vocab"][piece]] >= share * len(tokens)]
    kept = set()
    while wanted:
        kept.add(piece := wanted.pop())
        wanted += [part for part in made[piece] if part in made and part not in kept]
    merges = [pair for piece, pair in made.items() if piece in kept]
    tokenizer.backend_tokenizer.model = models.BPE(vocab=model["vocab"], merges=merges)
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str], dropout: float = 0.0) -> list[list[int]]:
    """Documents as ids between BOS and EOS, each merge left out with probability `dropout` (BPE-dropout).

    Without it a piece such as " ex" is seen only inside "examine", and a model that is frozen afterwards can
    neither read nor write it in "explore"  (arXiv:1910.13267). The library's draws cannot be seeded.
    """
    merges = tokenizer.backend_tokenizer.model
    merges.dropout = dropout or None
    ids = tokenizer(documents, add_special_tokens=False).input_ids
    merges.dropout = None
    return [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in ids]


def stream(
    episodes: list[Episode], tokenizer, words: list[str], config: Config, epoch: int
) -> tuple[torch.Tensor, int]:
    """The tokens of all documents, as they are and under other names, and their characters.

    Which observations are shown, what is asked and the names are drawn anew in each epoch.
    """
    rng = random.Random(f"{config.seed}/{epoch}")
    documents = [document(episode, rng, config.questions) for episode in episodes]
    renamed = [
        rename(text, new_names(visible(episode), words, rng))
        for text, episode in zip(documents, episodes, strict=True)
    ]
    encoded = encode(tokenizer, documents) + encode(tokenizer, renamed, config.dropout)
    rng.shuffle(encoded)
    return torch.tensor([token for ids in encoded for token in ids]), sum(map(len, documents + renamed))


def spelled(text: str, names: list[str], tokenizer, context: int) -> tuple[list[int], list[bool]]:
    """First tokens of a text, and which of them spell on (all pieces but the first) a name read before."""
    row = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pattern, before, again = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)), set(), []
    for match in re.finditer(rf"\b({pattern})\b", text):
        again += [match.span()] if match[1] in before else []
        before.add(match[1])
    marks = [any(start < a < end for start, end in again) for a, _ in row.offset_mapping]
    return [tokenizer.bos_token_id, *row.input_ids][:context], [False, *marks][:context]


@torch.no_grad()
def copied(model, rows: list[tuple[list[int], list[bool]]]) -> float:
    """Share of the marked tokens that the model, which has read what stands before them, would write."""
    right, device = [], model.device
    for ids, marks in rows:
        guess = model(input_ids=torch.tensor([ids], device=device)).logits[0].argmax(-1).tolist()
        right += [guess[i - 1] == ids[i] for i in range(1, len(ids)) if marks[i]]
    return sum(right) / max(1, len(right))


def english(path: Path) -> list[str]:
    """Lower-case words of 3 to 10 letters, in a fixed random order."""
    if not path.exists():
        fix = "Debian, Ubuntu: apt install wamerican-small; or leave --words out"
        raise FileNotFoundError(f"no list of words at {path}, expected one word a line ({fix})")
    found = sorted(set(re.findall("^[a-z]{3,10}$", path.read_text(errors="ignore"), re.MULTILINE)))
    random.Random(0).shuffle(found)
    return found


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    print(json.dumps(asdict(config), indent=2, default=str))
    episodes = [episode for path in config.text for episode in read_episodes(path)]
    held_out, episodes = episodes[::50], [episode for i, episode in enumerate(episodes) if i % 50]
    if not episodes:
        raise ValueError(f"{len(held_out)} episodes in --text, expected 2 or more: one in fifty is held out")
    words = sorted({word for episode in episodes for name in visible(episode) for word in name.split()})
    words = english(config.words) if config.words else words
    kept, words = words[:100], words[100:] or words  # of a list, the first are never trained on
    config.out.mkdir(parents=True, exist_ok=True)
    if (config.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(config.out)
    else:
        rng = random.Random(config.seed)
        tokenizer = train_tokenizer([document(e, rng, config.questions) for e in episodes], config.vocab)
        tokenizer = pruned(tokenizer, stream(episodes, tokenizer, words, config, 0)[0])
        tokenizer.save_pretrained(config.out)
    unseen, _ = stream(held_out, tokenizer, words, config, 0)
    unseen = unseen[: len(unseen) // config.context * config.context].view(-1, config.context)
    unseen = unseen[:: math.ceil(len(unseen) / 64)].to(device)  # 64 rows at most, from all documents
    rng, probe = random.Random(config.seed), []
    for episode in held_out[:64]:
        new = {name: " ".join(rng.choices(kept, k=rng.randint(1, 2))) for name in visible(episode)}
        text = rename(document(episode, rng, config.questions), new)
        probe.append(spelled(text, list(new.values()), tokenizer, config.context))

    architecture = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.hidden, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.heads,
        intermediate_size=config.feed_forward, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(architecture).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters")
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))
    state = config.out / "pretrain_state.pt"
    step, seen, seconds, epoch, left = 0, 0, 0.0, 0, 0
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, seen, seconds, epoch = saved["step"], saved["seen"], saved["seconds"], saved["epoch"]

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast_precision() == "bf16"):
            return model(input_ids=rows, labels=rows).loss

    def evaluate() -> tuple[float, float]:
        with torch.no_grad():
            return loss_of(unseen).item(), copied(model, probe)

    total = None if config.minutes else int(config.tokens)
    bar = tqdm(total=total, initial=seen, unit="tok", unit_scale=True, mininterval=10)
    log = (config.out / "pretrain_log.csv").open("a")

    def done() -> float:  # share of the training
        return seconds / (60 * config.minutes) if config.minutes else seen / config.tokens

    while done() < 1:
        began = time.monotonic()
        if left <= 0:  # also when a stopped run goes on: the rest of its epoch is left out
            tokens, characters = stream(episodes, tokenizer, words, config, epoch)
            left, epoch = len(tokens), epoch + 1
            tqdm.write(
                f"epoch {epoch}: {len(episodes)} episodes, {left / 1e6:.1f}M tokens, "
                f"{characters / left:.2f} characters per token"
            )
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        starts = torch.randint(len(tokens) - config.context, (config.rows,), generator=generator)
        rows = torch.stack([tokens[s : s + config.context] for s in starts]).to(device)
        warmup = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done())))
        loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen, left = step + 1, seen + rows.numel(), left - rows.numel()
        seconds += time.monotonic() - began
        bar.update(rows.numel())
        if step % 200 == 0 or done() >= 1:
            held_out_loss, share = evaluate()
            bar.set_postfix(loss=f"{held_out_loss:.3f}", copied=f"{share:.2f}")
            log.write(f"{step},{seen},{seconds:.0f},{loss.item():.4f},{held_out_loss:.4f},{share:.4f}\n")
            log.flush()
        if step % 100 == 0 or done() >= 1:
            saved = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seen": seen,
                "seconds": seconds,
                "epoch": epoch,
            }
            torch.save(saved, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
    half = model.to(torch.bfloat16)
    half.save_pretrained(config.out)
    held_out_loss, share = evaluate()
    record = {
        "parameters": parameters, "steps": step, "tokens": seen, "minutes": round(seconds / 60, 1),
        "held_out_loss": round(held_out_loss, 4), "copied": round(share, 3), "config": asdict(config),
        **provenance(),
    }  # fmt: skip
    (config.out / "pretrain.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    print(f"done: {seen / 1e6:.1f}M tokens, held-out loss {held_out_loss:.3f}, copied {share:.0%}")


if __name__ == "__main__":
    main(tyro.cli(Config))
