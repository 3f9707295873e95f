"""The language model: backbone, LoRA, hidden states for training, checkpoints.

`--model base` is the small Llama-architecture model in base/; any folder or hub id that AutoModelForCausalLM
loads works the same. LoRA: arXiv:2106.09685 (peft). What this file does not do: any loss (learner.py), any
prompt (prompts.py), sample (acting.py).
"""

import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import compile_regions
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()  # one bar per script is enough
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft still reads it


BASE = Path(__file__).parent / "base"
ROLES = ("planner", "executor", "progress")  # data.LEVELS, in the same order
SHARED = "shared"  # name of the one adapter that serves all roles
PromptFormat = Literal["raw", "chat"]  # the prompt as it is, or in the chat template of an instruct model
ATTENTION_ONLY = ["q_proj", "k_proj", "v_proj", "o_proj"]  # the papers' LoRA targets


# --- backbone and adapters ------------------------------------------------------------------------------
def attention(device: str) -> dict[str, str]:
    """Plain matrix products on CPU: the fused kernel is 1.3x slower per training step at our lengths."""
    return {} if device.startswith("cuda") else {"attn_implementation": "eager"}


def load_backbone(
    model: str, device: str = "cpu", gradient_checkpointing: bool = False, prompt: PromptFormat = "raw"
):
    """(causal LM, tokenizer) of `model`: "base", a folder or a hub id. fp32 on CPU, bf16 on CUDA.

    prompt: how the tokenizer wraps a prompt from now on (prompt_ids). ValueError when the folder is missing,
    or the tokenizer has no EOS token (answers could never end), or for prompt="chat" no chat template.
    """
    path = str(BASE) if model == "base" else model
    if (model == "base" or model[0] in "./") and not (Path(path) / "config.json").exists():
        raise ValueError(
            f"no model at {path}: give a folder with config.json "
            "or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **attention(device)).to(device)
    except OSError as error:  # transformers says it in several lines
        reason = str(error).splitlines()[0]
        fix = "Give a folder with model and tokenizer, or a hub id"
        raise ValueError(f"cannot load the model {model}: {reason} {fix}") from None
    if tokenizer.eos_token_id is None:
        fix = "answers could never end; set tokenizer.eos_token"
        raise ValueError(f"the tokenizer of {model} has no EOS token: {fix}")
    if prompt == "chat" and not tokenizer.chat_template:
        fix = "use --prompt raw, or an instruct model"
        raise ValueError(f"the tokenizer of {model} has no chat template: {fix}")
    tokenizer.prompt_format = prompt
    if gradient_checkpointing:
        lm.gradient_checkpointing_enable()
        lm.enable_input_require_grads()
    return lm, tokenizer


@functools.lru_cache(maxsize=200_000)
def text_ids(tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a text without BOS and EOS; kept, so that training does not encode again what acting did."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """Ids of what a policy answers to: BOS, where there is one, and the prompt.

    --prompt chat: the prompt as the user's message in the model's chat template, up to where it is to speak.
    """
    if getattr(tokenizer, "prompt_format", "raw") == "chat":
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(text_ids(tokenizer, text))  # templates write BOS themselves
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return [*bos, *text_ids(tokenizer, prompt)]


def refuse_checkpointing(adapters: str) -> None:
    """ValueError for separate adapters: the second forward, in backward, would run with the last role's."""
    if adapters == "separate":
        raise ValueError("--gradient-checkpointing needs one adapter for all roles: use --adapters shared")


def refuse_format(folder: Path, meta: dict, needed: str) -> None:
    """ValueError where the checkpoint speaks another format: it would answer prompts it never learned."""
    if (found := meta.get("format", "roles")) != needed:
        how = (
            "train_sft.py --plan-execute"
            if needed == "plan-execute"
            else "train_sft.py; train_hiper.py goes on"
        )
        raise ValueError(f"{folder} speaks {found!r}, expected {needed!r}: train it with {how}")


def add_lora(
    lm,
    rank: int = 16,
    targets: Literal["all", "attention"] = "all",
    adapters: Literal["shared", "separate"] = "shared",
):
    """LoRA (alpha = 2 rank, no dropout) on every linear layer but the head, or as in the papers on attention.

    adapters="separate" gives each role its own; rank 0 trains all weights instead.
    """
    if rank == 0:
        return lm
    names = [SHARED] if adapters == "shared" else list(ROLES)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules="all-linear" if targets == "all" else ATTENTION_ONLY,
    )  # fmt: skip
    model = get_peft_model(lm, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    _train_all_adapters(model)
    return model


def _train_all_adapters(model: PeftModel) -> None:
    """peft trains the active adapter only; roles share a batch, so here all adapters get their gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def use_adapter(model, name: str) -> None:
    """Routes the next forward through adapter `name`, leaving requires_grad alone."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._active_adapter = [name]


@contextmanager
def without_adapters(model) -> Iterator[None]:
    """The backbone as it was before LoRA, for the forwards inside; requires_grad is left alone."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def is_separate(model) -> bool:
    return isinstance(model, PeftModel) and SHARED not in model.peft_config


def lm_of(model):
    """The causal LM inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@functools.lru_cache(maxsize=1)
def compiled(trunk):
    """The trunk with its layers compiled, for rows of any number and length; `trunk` itself stays as it is.

    Same weights, same adapters. The first forwards take a minute or two, of which later runs find most done.
    """
    compiler = os.environ.get("CXX", "g++")
    if next(trunk.parameters()).device.type == "cpu" and not shutil.which(compiler):
        raise ValueError(f"no C++ compiler {compiler}: install one (apt install g++), or leave out --compile")
    torch._dynamo.config.recompile_limit = 64  # anew for each adapter, and without gradient
    return compile_regions(trunk, dynamic=True)


def hidden_states(
    model, input_ids: Tensor, level: Tensor | None = None, precision="fp32", compile=False, **inputs
):
    """Final-layer normed hidden states (B, T, D) of right-padded ids (B, T).

    level (B,) picks among separate adapters. Right padding follows every real token and attention is causal,
    so no mask is needed and the fast kernel is used; `inputs` (B, ...) are for packed rows (candidates.py).
    precision="bf16" runs the matrix products in bfloat16; the result is in the dtype of the head.
    compile=True runs compiled layers.
    """
    lm = lm_of(model)
    trunk, dtype = getattr(lm, lm.base_model_prefix), lm.get_output_embeddings().weight.dtype
    trunk = compiled(trunk) if compile else trunk
    with torch.autocast(
        input_ids.device.type, torch.bfloat16, enabled=precision == "bf16" and dtype == torch.float32
    ):
        if not is_separate(model):
            return trunk(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state.to(dtype)
        parts, order = [], []
        for index, name in enumerate(ROLES):
            rows = (level == index).nonzero().squeeze(1)
            if len(rows):
                use_adapter(model, name)
                own = {"input_ids": input_ids, **inputs}
                own = {name: value[rows] for name, value in own.items()}
                parts.append(trunk(use_cache=False, **own).last_hidden_state.to(dtype))
                order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]


def trainable_state(model) -> dict[str, Tensor]:
    """The parameters that training changes, for state.pt."""
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


# --- checkpoints ----------------------------------------------------------------------------------------
def fingerprint(lm, tokenizer) -> str:
    """Hash of the base weights (a sample of every tensor) and the tokenizer: an adapter fits one base only.

    Weights are compared as bfloat16, so that a base loaded in fp32 (CPU) and in bf16 (CUDA) is the same base.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(lm.state_dict().items()):
        sample = tensor.flatten()[:: max(1, tensor.numel() // 512)].bfloat16().float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.tobytes())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()


def save_policy(model, folder: Path, meta: dict) -> None:
    """Writes adapter/ (a PEFT folder per adapter, or the whole model when rank is 0) and policy.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "adapter")
    (folder / "policy.json").write_text(json.dumps(meta, indent=2) + "\n")


def load_policy(
    folder: Path, device: str = "cpu", trainable: bool = False, gradient_checkpointing: bool = False
):
    """(model, tokenizer, meta) of a checkpoint folder; refuses a base that the adapter was not trained on."""
    folder = Path(folder)
    if not (folder / "policy.json").exists():
        raise ValueError(
            f"no checkpoint at {folder}: train one with train_sft.py, or give a folder that holds policy.json"
        )
    meta = json.loads((folder / "policy.json").read_text())
    if gradient_checkpointing:
        refuse_checkpointing(meta["adapters"])
    lm, tokenizer = load_backbone(meta["model"], device, gradient_checkpointing, meta.get("prompt", "raw"))
    if (found := fingerprint(lm, tokenizer)) != meta["base"]:
        raise ValueError(
            f"{folder} was trained on base {meta['base']}, but {meta['model']} is {found}: "
            "load that base or train again"
        )
    if meta["rank"] == 0:
        weights = AutoModelForCausalLM.from_pretrained(
            folder / "adapter", dtype=torch.float32 if trainable else lm.dtype, **attention(device)
        )
        model = weights.to(device)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
    else:
        names = [SHARED] if meta["adapters"] == "shared" else list(ROLES)
        model = PeftModel.from_pretrained(
            lm, folder / "adapter" / names[0], adapter_name=names[0], is_trainable=trainable
        )
        for name in names[1:]:
            model.load_adapter(folder / "adapter" / name, adapter_name=name, is_trainable=trainable)
        if trainable:
            _train_all_adapters(model)
        elif not is_separate(model) and lm.dtype == torch.float32:
            model = model.merge_and_unload()  # the same function with fewer operations; exact enough in fp32
    return model.train(trainable), tokenizer, meta


def file_hash(folder: Path) -> str:
    """Hash of every file below `folder`: names a checkpoint in results/test_log.jsonl."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()
