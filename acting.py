"""Acting: many prompts answered at once, token by token, on one key-value cache.

A context of B rows grows by left-padded blocks: read() appends given tokens, write() samples until EOS. What
every prompt of a role begins with is read once and its keys and values are reused; LoRA is folded into a copy
of the weights, which may be bfloat16. What this file does not do: word a prompt, or learn.
Shapes: B rows, T columns so far, D hidden size, V vocabulary.
"""

import copy
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from logprob import head_weight
from model import ROLES, SHARED, is_separate, lm_of, prompt_ids, text_ids, use_adapter


@dataclass(frozen=True)
class Request:
    """What a role is asked: prompt in, at most max_new_tokens out, drawn with `seed` (unused when greedy)."""

    role: str
    prompt: str
    max_new_tokens: int
    seed: int
    begun: str = field(default="", kw_only=True)  # how the answer begins, given


@dataclass(frozen=True)
class Answer:
    """What it said: ids end with EOS unless cut; logprobs are log pi of ids at temperature 1."""

    text: str
    ids: list[int]
    logprobs: list[float]
    prompt_tokens: int


class Context:
    """B rows of tokens that a causal LM has read. `hidden` (B, D) is what its head reads after them."""

    def __init__(self, lm, rows: int, eos: int):
        self.trunk, self.eos = getattr(lm, lm.base_model_prefix), eos
        self.weight, self.bias = head_weight(lm.get_output_embeddings(), lm.config)
        self.cache = DynamicCache(config=lm.config)
        self.mask = torch.zeros(rows, 0, dtype=torch.long, device=self.weight.device)  # (B, T), 0: padding
        self.sampled = [[] for _ in range(rows)]  # the last token of each row, until it is read
        self.hidden = None

    def begin(self, prefixes: list["Context"]) -> None:
        """Row b goes on from the one row of prefixes[b], whose keys and values are copied."""
        width = max(prefix.mask.shape[1] for prefix in prefixes)

        def stacked(tensors: list[Tensor]) -> Tensor:  # (1, heads, P, d) each -> (B, heads, width, d)
            return torch.cat([nn.functional.pad(x, (0, 0, width - x.shape[2], 0)) for x in tensors])

        for layer in range(len(prefixes[0].cache.layers)):
            own = [prefix.cache.layers[layer] for prefix in prefixes]
            self.cache.update(stacked([x.keys for x in own]), stacked([x.values for x in own]), layer)
        rows = [nn.functional.pad(prefix.mask, (width - prefix.mask.shape[1], 0)) for prefix in prefixes]
        self.mask, self.hidden = torch.cat(rows), torch.cat([prefix.hidden for prefix in prefixes])

    @torch.inference_mode()
    def read(self, tokens: list[list[int]]) -> Tensor:
        """Appends what was sampled last and then these tokens, row by row (none is fine) -> hidden (B, D)."""
        rows = [last + new for last, new in zip(self.sampled, tokens, strict=True)]
        if not (width := max(map(len, rows))):
            return self.hidden
        self.sampled, device = [[] for _ in rows], self.mask.device
        ids = torch.tensor([[self.eos] * (width - len(row)) + row for row in rows], device=device)
        new = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        position = (self.mask.sum(1, keepdim=True) + new.cumsum(1) - 1).clamp(min=0)
        self.mask = torch.cat([self.mask, new], 1)
        out = self.trunk(
            input_ids=ids, attention_mask=self.mask, position_ids=position, past_key_values=self.cache,
            use_cache=True,
        )  # fmt: skip
        self.cache = out.past_key_values
        if self.cache is None or self.cache.get_seq_length() != self.mask.shape[1]:
            fix = "gradient checkpointing drops it in training, call model.eval() before sampling"
            raise ValueError(f"the model kept no key-value cache and would forget its prompt: {fix}")
        last = out.last_hidden_state[:, -1]
        has_new = torch.tensor([[len(row) > 0] for row in rows], device=device)
        self.hidden = last if self.hidden is None else torch.where(has_new, last, self.hidden)
        return self.hidden

    @torch.inference_mode()
    def write(
        self, limits: list[int], temperature: list[float], noise: list, tempered: bool = False
    ) -> list[list[tuple]]:
        """Samples at most limits[b] tokens in row b, until EOS -> per row [(token, its log pi)].

        noise: a torch.Generator per row, None where temperature is 0. tempered: log pi is that of the softmax
        that was drawn from, else that at temperature 1. The last token is read by the next read().
        """
        device, running = self.mask.device, [limit > 0 for limit in limits]
        written, heat = [[] for _ in limits], torch.tensor(temperature, device=device)
        while any(running):
            if any(self.sampled):
                self.read([[] for _ in limits])
            logits = nn.functional.linear(self.hidden.to(self.weight.dtype), self.weight, self.bias)
            logp = logits.float().log_softmax(-1)  # (B, V)
            drawn = draw(logp, heat, [n if r else None for n, r in zip(noise, running, strict=True)])
            if tempered:
                logp = (logp / torch.where(heat > 0, heat, 1.0)[:, None]).log_softmax(-1)
            scores = logp.gather(1, drawn[:, None]).squeeze(1).tolist()
            for row, (token, score) in enumerate(zip(drawn.tolist(), scores, strict=True)):
                if running[row]:
                    written[row].append((token, score))
                    self.sampled[row] = [token]
                    running[row] = token != self.eos and len(written[row]) < limits[row]
        return written


def draw(logp: Tensor, temperature: Tensor, noise: list) -> Tensor:
    """Gumbel-max: argmax(logp / T + G) is a draw from softmax(logp / T).

    logp (B, V), temperature (B,) -> (B,). noise: a torch.Generator per row; a row without one is greedy.
    """
    if not any(noise):
        return logp.argmax(-1)
    gumbel = torch.zeros_like(logp, device="cpu")
    for row, generator in enumerate(noise):
        if generator is not None:
            gumbel[row].exponential_(generator=generator).log_().neg_()
    scaled = torch.where(temperature[:, None] > 0, logp / temperature.clamp(min=1e-6)[:, None], logp)
    return (scaled + gumbel.to(logp.device)).argmax(-1)


def length_groups(lengths: dict[int, int], worth: int = 1000) -> list[list[int]]:
    """Rows in batches of like length: a further batch is begun where it saves `worth` tokens of padding.

    A batch costs some ten small forwards of decoding, about as much as reading 1,000 tokens on CPU.
    """
    rows = sorted(lengths, key=lambda row: -lengths[row])
    groups = [[]]
    for position, row in enumerate(rows):
        if groups[-1] and (lengths[groups[-1][0]] - lengths[row]) * (len(rows) - position) > worth:
            groups.append([])
        groups[-1].append(row)
    return groups if rows else []


def folded(model, precision: str = "fp32") -> dict:
    """adapter -> a causal LM that acts: LoRA folded into a copy of fp32 weights, else the model itself.

    precision="bf16" makes the copy's trunk bfloat16; the head stays as it is. A copy per adapter is cheap
    where weights are fp32 (small models on CPU); bf16 models on CUDA act unfolded.
    """
    names = list(model.peft_config) if hasattr(model, "peft_config") else [SHARED]
    copies = {}
    for name in names:
        lm = lm_of(model)
        is_fp32 = lm.get_output_embeddings().weight.dtype == torch.float32
        if is_fp32 and (lm is not model or precision == "bf16"):
            lm = copy.deepcopy(model).requires_grad_(False).eval()
            if hasattr(lm, "merge_and_unload"):
                lm = lm.merge_and_unload(adapter_names=[name])
            if precision == "bf16":
                head = lm.get_output_embeddings()
                head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)  # no longer tied
                getattr(lm, lm.base_model_prefix).to(torch.bfloat16)
        copies[name] = lm
    return copies


def instruction(line: list[int], prompt: list[int]) -> tuple[int, ...]:
    """What a prompt and its first line, asked alone, begin with; its last token may merge with "\n"."""
    shared = next((i for i, (a, b) in enumerate(zip(line, prompt, strict=False)) if a != b), len(line))
    return tuple(prompt[: min(shared, len(line) - 1, len(prompt) - 1)])


class Policy:
    """Answers requests in left-padded batches; stops each row at its EOS.

    temperature 0 is greedy. A sampled token is argmax(log pi / temperature + Gumbel noise), and the noise of
    a row comes from the row's own seed: an episode is the same alone and in any batch (in fp32, but for
    rounding). It acts with the weights as they are at its first answer: after training make a new one.
    """

    def __init__(
        self,
        model,
        tokenizer,
        temperature: float = 0.0,
        planning_ratio: float = 0.7,
        precision: str = "fp32",
    ):
        self.model, self.tokenizer, self.precision = model, tokenizer, precision
        self.temperature = dict.fromkeys(ROLES, temperature * planning_ratio) | {"executor": temperature}
        self.seconds, self.copies, self.prefixes = 0.0, None, {}

    def encode(self, prompt: str) -> list[int]:
        """Prompt ids  (model.prompt_ids)."""
        return prompt_ids(self.tokenizer, prompt)

    def answer(self, requests: list[Request]) -> list[Answer]:
        """One answer per request; prompts share batches whatever their roles, if one adapter serves them."""
        began, answers = time.perf_counter(), {}
        prompts = [self.encode(r.prompt) + [*text_ids(self.tokenizer, r.begun)] for r in requests]
        for adapter in ROLES if is_separate(self.model) else [SHARED]:
            rows = [i for i, r in enumerate(requests) if adapter in (SHARED, r.role)]
            for group in length_groups({i: len(prompts[i]) for i in rows}):
                batch = self._answer(adapter, [requests[i] for i in group], [prompts[i] for i in group])
                answers |= dict(zip(group, batch, strict=True))
        self.seconds += time.perf_counter() - began
        return [answers[row] for row in range(len(requests))]

    def context(self, adapter: str, requests: list[Request], prompts: list[list[int]]) -> Context:
        """A context that has read the prompts; the instruction they begin with comes from the cache."""
        self.copies = self.copies or folded(self.model, self.precision)
        lm, eos = self.copies[adapter], self.tokenizer.eos_token_id
        if is_separate(self.model):
            use_adapter(self.model, adapter)  # for a model that is not folded
        context = Context(lm, len(prompts), eos)
        begins = [
            instruction(self.encode(request.prompt.partition("\n")[0]), prompt)
            for request, prompt in zip(requests, prompts, strict=True)
        ]
        if all(begins):
            for begin in set(begins):
                if (adapter, begin) not in self.prefixes:
                    one = Context(lm, 1, eos)
                    one.read([list(begin)])
                    self.prefixes[adapter, begin] = one
            context.begin([self.prefixes[adapter, begin] for begin in begins])
            prompts = [prompt[len(begin) :] for prompt, begin in zip(prompts, begins, strict=True)]
        context.read(prompts)
        return context

    def _answer(self, adapter: str, requests: list[Request], prompts: list[list[int]]) -> list[Answer]:
        heat = [self.temperature[r.role] for r in requests]
        noise = [
            torch.Generator().manual_seed(r.seed) if t > 0 else None
            for r, t in zip(requests, heat, strict=True)
        ]
        context = self.context(adapter, requests, prompts)
        written = context.write([r.max_new_tokens for r in requests], heat, noise)
        answers = []
        for prompt, row in zip(prompts, written, strict=True):
            ids, scores = [token for token, _ in row], [score for _, score in row]
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            answers.append(Answer(text, ids, scores, len(prompt)))
        return answers
