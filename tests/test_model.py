"""model.py on tiny random models of four architectures, loading, adapters, acting, checkpoints."""

import functools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import model as model_file
from acting import Context, Policy, Request, draw, folded, length_groups
from batches import collate, encode
from data import Transition
from logprob import head_weight, sequence_logprobs
from model import (
    ROLES,
    SHARED,
    add_lora,
    file_hash,
    fingerprint,
    hidden_states,
    is_separate,
    lm_of,
    load_backbone,
    load_policy,
    prompt_ids,
    save_policy,
    trainable_state,
    use_adapter,
    without_adapters,
)

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),  # biases in attention; its tokenizer here has no BOS
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),  # scaled embeddings, tied head, its own norm
}
PROMPTS = [  # three of like but not equal length, which share a padded batch, and one far shorter
    "Plan the next subtask. Task: find a living thing. Subtask:",
    "Act on the next subtask. Subtask: go to the kitchen. Action:",
    "Update the progress. Action: pick up the box. Progress:",
    "Act:",
]


def make_tokenizer(**special):
    """Byte-level BPE of a few dozen merges."""
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"} | special
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", "<eos>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(PROMPTS, trainer)
    special = {name: token for name, token in special.items() if token}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_backbone(folder, architecture="llama", seed=0, **tokenizer_options):
    """A folder with a random model of `architecture` and its tokenizer."""
    if architecture == "qwen2":
        tokenizer_options = {"bos_token": None} | tokenizer_options
    tokenizer = make_tokenizer(**tokenizer_options)
    config_class, model_class = ARCHITECTURES[architecture]
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    config.initializer_range = 0.3  # answers that depend on the prompt
    torch.manual_seed(seed)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """architecture -> folder."""
    root = tmp_path_factory.mktemp("backbones")
    return {name: make_backbone(root / name, name) for name in ARCHITECTURES}


def load(folder, rank=4, **options):
    """(policy, tokenizer) whose adapters are not zero, so that what they add can be seen."""
    lm, tokenizer = load_backbone(str(folder))
    torch.manual_seed(1)
    policy = add_lora(lm, rank, **options)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return policy.eval(), tokenizer


def random_ids(policy, rows=4, columns=12):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, lm_of(policy).config.vocab_size, (rows, columns), generator=generator)


def save(policy, tokenizer, folder, backbone, **meta):
    """A checkpoint as the training scripts write it."""
    base, _ = load_backbone(str(backbone))
    meta = {"model": str(backbone), "rank": 4, "adapters": "shared"} | meta
    save_policy(policy, folder, meta | {"base": fingerprint(base, tokenizer)})
    return folder


# --- backbones ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_of_any_architecture_loads_in_fp32_on_the_cpu(backbones, architecture):
    lm, tokenizer = load_backbone(str(backbones[architecture]))
    assert type(lm) is ARCHITECTURES[architecture][1]
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    text = "go to the kitchen; 37 degrees"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_are_what_the_head_reads(backbones, architecture):
    policy, _ = load(backbones[architecture])
    ids = random_ids(policy)
    weight, bias = head_weight(policy.get_output_embeddings(), policy.config)
    logits = torch.nn.functional.linear(hidden_states(policy, ids), weight, bias)
    torch.testing.assert_close(logits, policy(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["base", "missing", "./missing", "/nowhere/missing", "out/missing"])
def test_a_missing_model_is_one_line_with_the_fix(name, monkeypatch, tmp_path):
    monkeypatch.setattr(model_file, "BASE", tmp_path / "empty")
    with pytest.raises(ValueError, match="a folder with .*hub id") as error:
        load_backbone(name)
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_are_one_line_with_the_fix(backbones, tmp_path):
    folder = shutil.copytree(backbones["llama"], tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="a folder with .*hub id") as error:
        load_backbone(str(folder))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    make_backbone(tmp_path / "m")
    make_tokenizer(eos_token=None).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="no EOS token.*set tokenizer.eos_token"):
        load_backbone(str(tmp_path / "m"))


# --- the chat template --------------------------------------------------------------------------------------
TEMPLATE = "{% for m in messages %}<eos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<eos>assistant\n{% endif %}"


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A backbone whose tokenizer has a chat template."""
    return make_backbone(tmp_path_factory.mktemp("instruct"), chat_template=TEMPLATE)


def test_a_prompt_is_the_users_message_of_the_chat_template(instruct):
    lm, tokenizer = load_backbone(str(instruct), prompt="chat")
    asked = "Act on the subtask.\nTask: go."
    text = f"<eos>user\n{asked}<eos>\n<eos>assistant\n"
    assert tokenizer.decode(prompt_ids(tokenizer, asked)) == text
    assert tokenizer.eos_token_id in prompt_ids(tokenizer, asked), "markers are tokens, not their letters"
    given, answer = encode(tokenizer, asked, " go")
    assert tokenizer.decode(given + answer) == text + " go<eos>", "what is trained is what is answered to"
    _, raw = load_backbone(str(instruct))
    assert raw.decode(prompt_ids(raw, asked)) == "<bos>" + asked


def test_who_was_trained_on_a_chat_template_answers_in_it_from_a_shared_prefix(instruct, tmp_path):
    policy, tokenizer = load(instruct)
    save(policy, tokenizer, tmp_path / "chat", instruct, prompt="chat")
    policy, tokenizer, _ = load_policy(tmp_path / "chat")
    assert tokenizer.prompt_format == "chat"
    asked = [replace(r, prompt=f"{r.prompt}\nTask: go to the {i}.") for i, r in enumerate(requests())]
    actor = Policy(policy, tokenizer)
    answers = actor.answer(asked)
    for request, answer in zip(asked, answers, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt_ids(tokenizer, request.prompt) + answer.ids])
            logits = policy(input_ids=ids).logits[0, -len(answer.ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer.ids
    assert len(actor.prefixes) == 4
    header = len(tokenizer("<eos>user\n", add_special_tokens=False).input_ids)
    assert all(p.mask.shape[1] > header + 1 for p in actor.prefixes.values()), "header and instruction"
    begun = actor.answer([replace(asked[0], begun=" go")])[0]
    with torch.no_grad():
        ids = prompt_ids(tokenizer, asked[0].prompt) + tokenizer(" go", add_special_tokens=False).input_ids
        assert policy(input_ids=torch.tensor([ids])).logits[0, -1].argmax() == begun.ids[0]


def test_a_model_without_a_chat_template_says_what_to_do(backbones):
    with pytest.raises(ValueError, match="no chat template: use --prompt raw, or an instruct model"):
        load_backbone(str(backbones["llama"]), prompt="chat")


def test_gradient_checkpointing_gives_the_same_gradients(backbones):
    gradients = []
    for checkpointing in (False, True):
        lm, _ = load_backbone(str(backbones["llama"]), gradient_checkpointing=checkpointing)
        torch.manual_seed(1)
        policy = add_lora(lm, 4).train()
        hidden_states(policy, random_ids(policy)).pow(2).sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.requires_grad})
    assert any(g.abs().max() > 0 for g in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_compiled_layers_give_the_same_states_and_gradients(backbones, monkeypatch):
    """With what torch.compile captures run as it is: writing C++ for it takes a minute."""
    captured = functools.partial(model_file.compile_regions, backend="aot_eager")
    monkeypatch.setattr(model_file, "compile_regions", captured)
    lm, _ = load_backbone(str(backbones["llama"]))
    policy = add_lora(lm, 4, adapters="separate").train()
    names, found = list(policy.state_dict()), []
    for _ in range(2):  # the weights move in between: a compiled layer reads them anew
        for parameter in policy.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        for compile in (False, True):
            policy.zero_grad()
            hidden = hidden_states(policy, random_ids(policy), torch.tensor([0, 2]), compile=compile)
            hidden.pow(2).sum().backward()
            grads = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
            found.append((hidden.detach(), grads))
    for eager, ours in (found[:2], found[2:]):
        torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)
    assert (found[0][0] - found[2][0]).abs().max() > 0.01
    assert list(policy.state_dict()) == names


def test_compiling_without_a_compiler_is_one_line_with_the_fix(backbones, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    policy, _ = load(backbones["llama"])
    with pytest.raises(ValueError, match="no-such-compiler.*leave out --compile"):
        hidden_states(policy, random_ids(policy), compile=True)


# --- LoRA ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("targets", "per_layer"), [("all", 7), ("attention", 4)])
def test_lora_sits_on_every_linear_layer_or_on_attention_and_never_on_the_head(
    backbones, architecture, targets, per_layer
):
    policy, _ = load(backbones[architecture], targets=targets)
    layers = [name for name, module in policy.named_modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 2 * per_layer
    assert all("self_attn" in name for name in layers) == (targets == "attention")
    assert type(policy.get_output_embeddings()) is torch.nn.Linear


def test_lora_scales_by_two_and_has_no_dropout(backbones):
    policy, _ = load(backbones["llama"], rank=4)
    config = policy.peft_config[SHARED]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0)


def test_only_lora_trains_and_rank_0_trains_everything(backbones):
    policy, _ = load(backbones["llama"])
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == {
        n for n, _ in policy.named_parameters() if "lora_" in n
    }
    assert set(trainable_state(policy)) == {n for n, p in policy.named_parameters() if p.requires_grad}
    full, _ = load(backbones["llama"], rank=0)
    assert not isinstance(full, PeftModel)
    assert all(p.requires_grad for p in full.parameters())


def test_a_fresh_adapter_changes_nothing(backbones):
    lm, _ = load_backbone(str(backbones["llama"]))
    ids = random_ids(lm)
    with torch.no_grad():
        before = hidden_states(lm, ids)
        torch.testing.assert_close(hidden_states(add_lora(lm, 4), ids), before)


@pytest.mark.parametrize("adapters", ["shared", "separate"])
def test_without_adapters_the_backbone_answers_and_afterwards_they_are_back(backbones, adapters):
    plain, _ = load_backbone(str(backbones["llama"]))
    policy, _ = load(backbones["llama"], adapters=adapters)
    ids, level = random_ids(policy, rows=5), torch.tensor([2, 0, 1, 0, 2])
    trains = {n: p.requires_grad for n, p in policy.named_parameters()}
    with torch.no_grad():
        before, expected = hidden_states(policy, ids, level), hidden_states(plain, ids, level)
        assert not torch.allclose(before, expected, atol=1e-2)
        with without_adapters(policy):
            torch.testing.assert_close(hidden_states(policy, ids, level), expected)
        assert torch.equal(hidden_states(policy, ids, level), before)
        with pytest.raises(KeyError), without_adapters(policy):
            raise KeyError
        assert torch.equal(hidden_states(policy, ids, level), before), "also after an error inside"
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == trains


# --- hidden states ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_right_padding_does_not_change_what_precedes_it(backbones, architecture):
    policy, _ = load(backbones[architecture])
    ids = random_ids(policy, rows=2, columns=9)
    with torch.no_grad():
        alone = hidden_states(policy, ids)
        for fill in (0, 5):
            padded = torch.cat([ids, torch.full((2, 7), fill)], dim=1)
            torch.testing.assert_close(hidden_states(policy, padded)[:, :9], alone, atol=1e-5, rtol=1e-5)


def test_bf16_is_close_to_fp32_and_keeps_the_dtype_of_the_head(backbones):
    policy, _ = load(backbones["llama"])
    ids = random_ids(policy)
    with torch.no_grad():
        exact, rounded = hidden_states(policy, ids), hidden_states(policy, ids, precision="bf16")
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).abs().mean() < 0.1 * exact.abs().mean()


LEVEL = torch.tensor([2, 0, 1, 0, 2])  # planner, executor, progress in no order


def test_separate_adapters_are_three_and_differ(backbones):
    policy, _ = load(backbones["llama"], adapters="separate")
    assert is_separate(policy) and set(policy.peft_config) == set(ROLES)
    assert not is_separate(load(backbones["llama"])[0]) and not is_separate(
        load(backbones["llama"], rank=0)[0]
    )
    ids, outputs = random_ids(policy, rows=1), []
    for role in ROLES:
        use_adapter(policy, role)
        outputs.append(policy(input_ids=ids).logits)
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])


def test_each_row_goes_through_the_adapter_of_its_level(backbones):
    policy, _ = load(backbones["llama"], adapters="separate")
    ids = random_ids(policy, rows=5)
    with torch.no_grad():
        mixed = hidden_states(policy, ids, LEVEL)
        for row, level in enumerate(LEVEL):
            policy.set_adapter(ROLES[level])  # peft's own way
            alone = policy(input_ids=ids[row : row + 1], output_hidden_states=True).hidden_states[-1]
            torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", range(3))
def test_a_level_trains_its_own_adapter_only(backbones, level):
    policy, _ = load(backbones["llama"], adapters="separate")
    hidden = hidden_states(policy, random_ids(policy, rows=5), LEVEL)  # all three are used ...
    hidden[LEVEL == level].pow(2).sum().backward()  # ... one has a loss
    moved = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    own = {n for n, _ in policy.named_parameters() if "lora_" in n and f".{ROLES[level]}." in n}
    assert moved == own


def test_all_adapters_train_after_one_was_used(backbones):
    policy, _ = load(backbones["llama"], adapters="separate")
    use_adapter(policy, "executor")
    assert all(p.requires_grad == ("lora_" in n) for n, p in policy.named_parameters())


# --- acting: greedy -----------------------------------------------------------------------------------------
def requests(new_tokens=12, roles=("planner", "executor", "progress", "executor"), seeds=(0, 1, 2, 3)):
    rows = zip(roles, PROMPTS, seeds, strict=True)
    return [Request(role, prompt, new_tokens, seed) for role, prompt, seed in rows]


def slow_greedy(policy, tokenizer, request):
    """No batch, no cache, no padding, one whole forward per token."""
    ids = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids += tokenizer(request.prompt, add_special_tokens=False).input_ids
    answer = []
    while len(answer) < request.max_new_tokens and tokenizer.eos_token_id not in answer:
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([ids + answer])).logits[0, -1]
        answer.append(logits.argmax().item())
    return answer


def prefer_eos(policy, tokenizer, strength):
    """Makes EOS likelier by a bias of the head, so that answers of a random model end by themselves."""
    head = policy.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    head.bias.data[tokenizer.eos_token_id] = strength


def test_a_further_batch_is_begun_where_it_saves_enough_padding():
    assert length_groups({}) == []
    assert length_groups({0: 10, 1: 300, 2: 290, 3: 12}, worth=500) == [[1, 2], [3, 0]]  # saves 288 + 290
    assert length_groups({0: 10, 1: 300, 2: 290, 3: 12}, worth=600) == [[1, 2, 3, 0]]


def test_prompts_share_a_padded_batch_whatever_their_roles(backbones, monkeypatch):
    """Also says that the batches of the tests below do have padding."""
    batches, original = [], Policy._answer

    def spy(self, adapter, asked, prompts):
        batches.append(sorted(map(len, prompts)))
        return original(self, adapter, asked, prompts)

    monkeypatch.setattr(Policy, "_answer", spy)
    for name in ("llama", "qwen2"):
        policy, tokenizer = load(backbones[name])
        Policy(policy, tokenizer).answer(requests(new_tokens=1))
    assert len(batches) == 2 and all(len(set(lengths)) == 4 for lengths in batches)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_greedy_answer_in_a_batch_is_the_slow_one(backbones, architecture):
    policy, tokenizer = load(backbones[architecture])
    answers = Policy(policy, tokenizer).answer(requests())
    assert [a.ids for a in answers] == [slow_greedy(policy, tokenizer, r) for r in requests()]
    assert len({tuple(a.ids) for a in answers}) == len(answers), "the answers depend on the prompts"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_greedy_answer_alone_is_the_one_in_a_batch(backbones, architecture):
    policy, tokenizer = load(backbones[architecture])
    actor = Policy(policy, tokenizer)
    together = actor.answer(requests())
    for request, other in zip(requests(), together, strict=True):
        (alone,) = actor.answer([request])
        assert (alone.ids, alone.text, alone.prompt_tokens) == (other.ids, other.text, other.prompt_tokens)
        assert alone.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_an_answer_ends_with_its_eos_while_others_go_on(backbones):
    policy, tokenizer = load(backbones["llama"])
    prefer_eos(policy, tokenizer, 2.0)
    asked = requests(new_tokens=40)
    answers = Policy(policy, tokenizer).answer(asked)
    assert len({len(a.ids) for a in answers}) > 1, "they end at different lengths"
    for request, answer in zip(asked, answers, strict=True):
        assert answer.ids == slow_greedy(policy, tokenizer, request)
        assert tokenizer.eos_token_id not in answer.ids[:-1]
        assert "<eos>" not in answer.text
        assert len(answer.logprobs) == len(answer.ids)
    assert any(a.ids[-1] == tokenizer.eos_token_id for a in answers)


def test_every_request_has_its_own_limit(backbones):
    policy, tokenizer = load(backbones["llama"])
    asked = [replace(r, max_new_tokens=n) for r, n in zip(requests(), (1, 7, 3, 5), strict=True)]
    answers = Policy(policy, tokenizer).answer(asked)
    assert [len(a.ids) for a in answers] == [1, 7, 3, 5]
    assert [a.ids for a in answers] == [slow_greedy(policy, tokenizer, r) for r in asked]


def test_prompt_tokens_count_the_prompt_with_bos_and_without_padding(backbones):
    for name, bos in (("llama", 1), ("qwen2", 0)):
        policy, tokenizer = load(backbones[name])
        answers = Policy(policy, tokenizer).answer(requests(new_tokens=1))
        lengths = [len(tokenizer(p, add_special_tokens=False).input_ids) + bos for p in PROMPTS]
        assert [a.prompt_tokens for a in answers] == lengths


def test_acting_leaves_no_gradient_and_counts_its_time(backbones):
    policy, tokenizer = load(backbones["llama"])
    actor = Policy(policy, tokenizer)
    actor.answer(requests(new_tokens=2))
    assert actor.seconds > 0
    assert all(p.grad is None for p in policy.parameters())


def test_separate_adapters_answer_a_mixed_batch_in_its_order(backbones):
    policy, tokenizer = load(backbones["llama"], adapters="separate")
    answers = Policy(policy, tokenizer).answer(requests())
    for request, answer in zip(requests(), answers, strict=True):
        use_adapter(policy, request.role)
        assert answer.ids == slow_greedy(policy, tokenizer, request)
    same = [Request(role, PROMPTS[0], 12, 0) for role in ROLES]
    assert len({tuple(a.ids) for a in Policy(policy, tokenizer).answer(same)}) == 3, (
        "each role has its own voice"
    )


# --- acting: sampling ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("adapters", ["shared", "separate"])
def test_a_sampled_answer_depends_on_its_seed_alone(backbones, adapters):
    policy, tokenizer = load(backbones["llama"], adapters=adapters)
    actor = Policy(policy, tokenizer, temperature=1.0)
    together = [a.ids for a in actor.answer(requests())]
    assert [actor.answer([r])[0].ids for r in requests()] == together
    assert [a.ids for a in actor.answer(requests()[::-1])] == together[::-1]
    torch.manual_seed(99)
    assert [a.ids for a in actor.answer(requests())] == together, "not on the global generator"
    others = [a.ids for a in actor.answer(requests(seeds=(10, 11, 12, 13)))]
    assert all(a != b for a, b in zip(together, others, strict=True))


def test_greedy_rows_ignore_the_seed(backbones):
    policy, tokenizer = load(backbones["llama"])
    actor = Policy(policy, tokenizer)
    first, second = actor.answer(requests()), actor.answer(requests(seeds=(7, 8, 9, 10)))
    assert [a.ids for a in first] == [a.ids for a in second]


def test_planner_and_progress_sample_colder_than_the_executor():
    assert Policy(None, None, 1.0).temperature == {"planner": 0.7, "executor": 1.0, "progress": 0.7}
    assert Policy(None, None, 0.5, planning_ratio=1.0).temperature == dict.fromkeys(ROLES, 0.5)
    assert Policy(None, None).temperature == dict.fromkeys(ROLES, 0.0)


def draw_frequencies(logits, temperatures, count=20_000):
    """Share of each token among `count` draws per row."""
    logp = torch.tensor(logits).log_softmax(-1)
    noise = [torch.Generator().manual_seed(7 + i) if t > 0 else None for i, t in enumerate(temperatures)]
    counts = torch.zeros_like(logp)
    for _ in range(count):
        token = draw(logp, torch.tensor(temperatures), noise)
        counts[torch.arange(len(logp)), token] += 1
    return counts / count


def test_draws_follow_the_softmax_at_the_temperature_of_the_row():
    """20,000 draws: a share p has a standard error of at most 0.0036."""
    logits, temperatures = [[1.0, 0.0, -1.0, 2.0]] * 3, [1.0, 0.7, 0.0]
    found = draw_frequencies(logits, temperatures)
    for row, temperature in enumerate(temperatures[:2]):
        expected = (torch.tensor(logits[row]) / temperature).softmax(-1)
        torch.testing.assert_close(found[row], expected, atol=0.015, rtol=0)
    assert found[2].tolist() == [0, 0, 0, 1], "a greedy row takes the likeliest, beside sampled rows too"


def test_a_first_token_follows_the_models_softmax(backbones):
    """The temperature of the role reaches the draw: the planner's is 0.7, the executor's 1."""
    policy, tokenizer = load(backbones["llama"])
    actor = Policy(policy, tokenizer, temperature=1.0)
    (answer,) = actor.answer([Request("executor", "Act:", 1, 0)])
    ids = [tokenizer.bos_token_id, *tokenizer("Act:", add_special_tokens=False).input_ids]
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([ids])).logits[0, -1]
    for role, temperature in (("executor", 1.0), ("planner", 0.7)):
        draws = [a.ids[0] for a in actor.answer([Request(role, "Act:", 1, seed) for seed in range(3000)])]
        share = torch.tensor(draws).bincount(minlength=len(logits)) / len(draws)
        expected = (logits / temperature).softmax(-1)
        assert (share - expected).abs().sum() / 2 < 0.13  # total variation; about 0.08 by chance
        assert share[expected.argmax()] == pytest.approx(expected.max().item(), abs=0.03)
    assert answer.logprobs == pytest.approx([logits.log_softmax(-1)[answer.ids[0]].item()], abs=1e-4)


# --- acting: one cache, in blocks ---------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_context_grows_by_uneven_blocks_as_each_row_would_alone(backbones, architecture):
    """Uneven rows, a row that a block leaves out, tokens given after sampled ones: as one forward."""
    lm, tokenizer = load_backbone(str(backbones[architecture]))
    eos = tokenizer.eos_token_id
    blocks = [[[5, 6, 7], [8], [9, 10, 11, 12]], [[], [13, 14], [15]]]
    context = Context(lm, 3, eos)
    context.read(blocks[0])
    written = context.write([2, 0, 3], [0.0] * 3, [None] * 3)
    assert [len(row) for row in written] == [2, 0, 3]
    hidden = context.read(blocks[1])
    for row in range(3):
        sampled = [token for token, _ in written[row]]
        ids = torch.tensor([blocks[0][row] + sampled + blocks[1][row]])
        with torch.no_grad():
            alone = hidden_states(lm, ids)[0]
            logp = lm(input_ids=ids).logits[0].log_softmax(-1)
        torch.testing.assert_close(hidden[row], alone[-1], atol=1e-4, rtol=1e-4)
        first = len(blocks[0][row])
        for i, (token, score) in enumerate(written[row]):
            assert score == pytest.approx(logp[first + i - 1, token].item(), abs=1e-4)
            assert token == logp[first + i - 1].argmax()


def test_a_cached_instruction_changes_no_answer_and_is_read_once(backbones):
    policy, tokenizer = load(backbones["llama"])
    asked = [replace(r, prompt=f"{r.prompt}\nTask: go to the {i}.") for i, r in enumerate(requests())]
    actor = Policy(policy, tokenizer)
    answers = actor.answer(asked)
    assert [a.ids for a in answers] == [slow_greedy(policy, tokenizer, r) for r in asked]
    assert len(actor.prefixes) == 4 and all(p.mask.shape[1] > 1 for p in actor.prefixes.values())
    before = dict(actor.prefixes)
    actor.answer(asked)
    assert actor.prefixes == before
    assert all(p.mask.shape[1] == p.cache.get_seq_length() for p in before.values()), "read by no other row"


def test_folded_copies_act_alike_and_leave_the_policy_alone(backbones):
    for adapters in ("shared", "separate"):
        policy, tokenizer = load(backbones["llama"], adapters=adapters)
        ids, before = random_ids(policy, rows=1), trainable_state(policy)
        copies = folded(policy)
        assert list(copies) == list(policy.peft_config)
        for name, lm in copies.items():
            assert not isinstance(lm, PeftModel) and not any(p.requires_grad for p in lm.parameters())
            use_adapter(policy, name)
            with torch.no_grad():
                expected = lm_of(policy)(input_ids=ids).logits
                torch.testing.assert_close(lm(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert all(torch.equal(p, before[n]) for n, p in trainable_state(policy).items())
        assert isinstance(policy, PeftModel)


def test_in_bf16_only_the_trunk_is_rounded(backbones):
    policy, tokenizer = load(backbones["gemma"])
    (lm,) = folded(policy, "bf16").values()
    assert lm.get_output_embeddings().weight.dtype == torch.float32
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}
    exact = Policy(policy, tokenizer).answer(requests(new_tokens=1))
    rounded = Policy(policy, tokenizer, precision="bf16").answer(requests(new_tokens=1))
    off = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(exact, rounded, strict=True) if a.ids == b.ids]
    assert off and 0 < max(off) < 0.2


# --- parity between rollout and training --------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("adapters", ["shared", "separate"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probs_of_a_rollout_are_those_of_training(backbones, architecture, adapters, temperature):
    """Left-padded with a cache while acting, right-padded in one forward in training: equal log pi(a_t)."""
    policy, tokenizer = load(backbones[architecture], adapters=adapters)
    asked = requests()
    answers = Policy(policy, tokenizer, temperature).answer(asked)
    items = [
        Transition(
            r.role, r.prompt, a.text, a.ids, a.logprobs, 0.0, 1, True, False, "", r.role, "test", "test/1", 0
        )
        for r, a in zip(asked, answers, strict=True)
    ]  # fmt: skip
    batch = collate(items, tokenizer)
    with torch.no_grad():
        hidden = hidden_states(policy, batch.input_ids, batch.level)
        weight, bias = head_weight(policy.get_output_embeddings(), policy.config)
        logp, sums = sequence_logprobs(hidden, weight, batch.input_ids, batch.action_mask, bias=bias)
    torch.testing.assert_close(sums, batch.behavior_logp, atol=1e-3, rtol=0)
    assert {t.level for t in items} == set(ROLES)
    for row, answer in enumerate(answers):
        assert batch.input_ids[row][batch.action_mask[row]].tolist() == answer.ids
        assert logp[row][batch.action_mask[row]].tolist() == pytest.approx(answer.logprobs, abs=1e-4)


# --- checkpoints --------------------------------------------------------------------------------------------
FORMS = {
    "shared": {"rank": 4, "adapters": "shared"},
    "separate": {"rank": 4, "adapters": "separate"},
    "attention": {"rank": 4, "adapters": "shared", "targets": "attention"},
    "rank 0": {"rank": 0, "adapters": "shared"},
}


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_comes_back_the_same(backbones, tmp_path, architecture, form):
    options = FORMS[form]
    policy, tokenizer = load(backbones[architecture], **options)
    if options["rank"] == 0:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    save(policy, tokenizer, tmp_path / "run", backbones[architecture], **options)
    trains, _, meta = load_policy(tmp_path / "run", trainable=True)
    acts, _, _ = load_policy(tmp_path / "run")  # a shared adapter is merged into the weights: other rounding
    ids = random_ids(policy, rows=5)
    with torch.no_grad():
        expected = hidden_states(policy, ids, LEVEL)
        assert torch.equal(hidden_states(trains, ids, LEVEL), expected)
        torch.testing.assert_close(hidden_states(acts, ids, LEVEL), expected, atol=1e-4, rtol=1e-4)
    for temperature in (0.0, 1.0):
        found, wanted = (Policy(p, tokenizer, temperature).answer(requests()) for p in (acts, policy))
        assert [a.ids for a in found] == [a.ids for a in wanted]
    assert meta["rank"] == options["rank"] and trains.training and not acts.training


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_loads_trainable_when_asked(backbones, tmp_path, form):
    policy, tokenizer = load(backbones["llama"], **FORMS[form])
    save(policy, tokenizer, tmp_path / "run", backbones["llama"], **FORMS[form])
    loaded, _, _ = load_policy(tmp_path / "run", trainable=True)
    assert loaded.training
    assert set(trainable_state(loaded)) == set(trainable_state(policy))
    hidden = hidden_states(loaded, random_ids(loaded, rows=5), LEVEL)
    loaded.get_output_embeddings()(hidden).pow(2).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)


@pytest.mark.parametrize("names", [[SHARED], list(ROLES)])
def test_an_adapter_is_a_plain_peft_folder(backbones, tmp_path, names):
    form = FORMS["shared" if names == [SHARED] else "separate"]
    policy, tokenizer = load(backbones["llama"], **form)
    save(policy, tokenizer, tmp_path / "run", backbones["llama"], **form)
    assert sorted(p.name for p in (tmp_path / "run/adapter").iterdir() if p.is_dir()) == sorted(names)
    base, _ = load_backbone(str(backbones["llama"]))
    plain = PeftModel.from_pretrained(base, tmp_path / "run/adapter" / names[-1]).eval()
    use_adapter(policy, names[-1])
    ids = random_ids(policy)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, policy(input_ids=ids).logits)


def test_a_missing_checkpoint_is_one_line_with_the_fix(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint at .*train one with train_sft.py"):
        load_policy(tmp_path / "nowhere")


@pytest.mark.parametrize("change", ["weights", "tokenizer"])
def test_a_checkpoint_refuses_another_base(tmp_path, change):
    backbone = make_backbone(tmp_path / "base")
    policy, tokenizer = load(backbone)
    save(policy, tokenizer, tmp_path / "run", backbone)
    load_policy(tmp_path / "run")
    if change == "weights":
        make_backbone(backbone, seed=5)
    else:
        path = backbone / "tokenizer.json"
        record = json.loads(path.read_text())
        vocabulary = record["model"]["vocab"]
        vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
        path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was trained on base .*load that base or train again"):
        load_policy(tmp_path / "run")


def test_a_base_is_the_same_in_fp32_and_in_bf16(backbones):
    """Trained on CUDA (bf16), evaluated on a CPU (fp32): one base, one fingerprint."""
    lm, tokenizer = load_backbone(str(backbones["llama"]))
    exact = fingerprint(lm, tokenizer)
    assert fingerprint(lm.to(torch.bfloat16), tokenizer) == exact


def test_every_tensor_of_the_base_counts_in_its_fingerprint(backbones):
    lm, tokenizer = load_backbone(str(backbones["llama"]))
    seen = {fingerprint(lm, tokenizer)}
    tensors = lm.state_dict()
    for tensor in tensors.values():
        tensor.flatten()[0] += 1
        seen.add(fingerprint(lm, tokenizer))
    assert len(seen) == len(tensors) + 1


def test_a_file_hash_sees_content_and_names(tmp_path):
    folder = tmp_path / "a"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x").write_text("1")
    first = file_hash(folder)
    assert file_hash(shutil.copytree(folder, tmp_path / "b")) == first
    (folder / "sub" / "x").write_text("2")
    second = file_hash(folder)
    (folder / "sub" / "x").rename(folder / "sub" / "y")
    assert len({first, second, file_hash(folder)}) == 3
