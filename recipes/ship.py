"""Script: a checkpoint as one small folder that plays on a fresh clone; eval.py plays policies/<env>.

    python recipes/ship.py --checkpoint out/glider/seed0/orl --out policies/scienceworld

LoRA is folded into the weights, which become bfloat16; of other folders it needs `base` alone, for
its tokenizer. Its critics come along, so that --watch shows Q.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import fingerprint, is_separate, load_backbone, load_policy, save_policy  # noqa: E402
from run import fail  # noqa: E402


@dataclass(frozen=True)
class Config:
    checkpoint: Path  # of train_sft.py, train_orl.py or train_o2o.py, with one adapter for all roles
    out: Path  # the folder to write


def main(config: Config) -> dict:
    model, tokenizer, meta = load_policy(config.checkpoint)  # on CPU: one adapter is folded in
    base = load_backbone("base")
    if is_separate(model):
        raise ValueError(f"{config.checkpoint} has an adapter for each role: ship one with --adapters shared")
    if tokenizer.get_vocab() != base[1].get_vocab():
        raise ValueError(f"{config.checkpoint} has another tokenizer than base: expected one trained on base")
    meta |= {"model": "base", "base": fingerprint(*base), "rank": 0, "made_from": meta["base"]}
    save_policy(model.to(torch.bfloat16), config.out, meta)
    if (critic := config.checkpoint / "critic.safetensors").exists():
        shutil.copy(critic, config.out)
    size = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    print(f"{config.out}: {size / 1e6:.1f} MB")
    return meta


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except ValueError as error:
        fail(error)
