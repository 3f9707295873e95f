"""candidates.py: one packed row equals separate rows in every architecture; best of K; frozen features."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_learner import assert_same, make_batch, make_learner, parameters, ragged_decisions
from test_learner import hidden_states as learner_hidden_states
from test_learner import make_policy as learner_policy
from test_model import ARCHITECTURES, load, make_backbone, requests, save

import eval as evaluation
import logprob
from acting import Answer, Policy, Request
from candidates import BestOfK, pack, predictor, score_candidates, tree_attention
from critic import Critics, save_critics
from learner import FrozenFeatures
from logprob import head_weight, sequence_logprobs
from model import ROLES, add_lora, hidden_states, lm_of, load_backbone, use_adapter

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15, 16, 17, 18]]
ANSWERS = [[[20, 21, 22], [23], [24, 25]], [[26, 27]], [], [[28, 29, 30, 31, 32], [28, 29, 33]]]
LEVELS = torch.tensor([2, 0, 0, 1])
HAVE = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
SIGNED = torch.tensor([[1.0, -2.0, 0.5], [3.0, 9.0, 9.0], [9.0, 9.0, 9.0], [-1.0, 0.7, 9.0]])  # (B, K)
IMPLEMENTATIONS = ["eager", "sdpa"]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """architecture -> folder."""
    root = tmp_path_factory.mktemp("candidates")
    return {name: make_backbone(root / name, name) for name in ARCHITECTURES}


def loaded(folder, implementation="eager", **options):
    policy, tokenizer = load(folder, **options)
    lm_of(policy).set_attn_implementation(implementation)
    return policy, tokenizer


def separate_rows(policy, prompts, answers, level=None):
    """(B, K) log pi of every answer from Hugging Face's logits: one unpadded row each, no mask, no batch."""
    K = max(map(len, answers))
    rows = []
    for b, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        if level is not None:
            use_adapter(policy, ROLES[level[b]])
        sums = [torch.tensor(0.0)] * K
        for k, answer in enumerate(group):
            logp = policy(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            sums[k] = sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(answer))
        rows.append(torch.stack(sums))
    return torch.stack(rows)


def gradients(policy, scores, upstream=SIGNED):
    """{name: d sum(upstream * scores)}, of all that trains; absent where an adapter was not used."""
    parameters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((upstream * scores).sum(), parameters.values(), allow_unused=True)
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


# --- by hand ------------------------------------------------------------------------------------------------
def test_pack_by_hand():
    packed = pack([[5, 6], [7], [8, 9]], [[[10], [11, 12]], [], [[], [13]]], fill=99)
    assert packed.input_ids.tolist() == [[5, 6, 10, 11, 12], [7, 99, 99, 99, 99], [8, 9, 13, 99, 99]]
    assert packed.segment.tolist() == [[0, 0, 1, 2, 2], [0, -1, -1, -1, -1], [0, 0, 2, -1, -1]]


def test_predictor_by_hand():
    segment = pack([[5, 6], [7]], [[[10], [11, 12]], [[13, 14]]], fill=0).segment
    found = predictor(segment)
    answers = segment > 0
    assert found[answers].tolist() == [1, 1, 3, 0, 1]  # both first tokens of row 0: the prompt's last column


def test_tree_attention_by_hand(backbones):
    lm, _ = load_backbone(str(backbones["llama"]))
    inputs = tree_attention(lm, pack([[5, 6], [7]], [[[10], [11, 12]], [[13]]], fill=0).segment)
    mask, low = inputs["attention_mask"], torch.finfo(torch.float32).min
    assert mask.shape == (2, 1, 5, 5) and set(mask.unique().tolist()) == {0.0, low}
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],  # the first answer
        [1, 1, 0, 1, 0],  # the second one does not see it
        [1, 1, 0, 1, 1],
    ]
    assert inputs["position_ids"][0].tolist() == [0, 1, 2, 2, 3]
    assert inputs["position_ids"][1, :2].tolist() == [0, 1]
    assert (mask[:, 0] == 0).any(-1).all(), "padding sees something too: a row of nothing would be nan"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_additive_in_the_dtype_of_the_model(backbones, dtype):
    lm, _ = load_backbone(str(backbones["llama"]))
    mask = tree_attention(lm.to(dtype), pack(PROMPTS, ANSWERS, 0).segment)["attention_mask"]
    assert mask.dtype == dtype and set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}


# --- a packed row is its rows one by one --------------------------------------------------------------------
@pytest.mark.parametrize("adapters", ["shared", "separate"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_answers_have_the_log_probs_and_gradients_of_separate_rows(
    backbones, architecture, implementation, adapters
):
    policy, _ = loaded(backbones[architecture], implementation, adapters=adapters)
    level = LEVELS if adapters == "separate" else None
    scores, hidden = score_candidates(policy, pack(PROMPTS, ANSWERS, fill=1), level)
    expected = separate_rows(policy, PROMPTS, ANSWERS, level)
    assert scores.dtype == torch.float32 and hidden.shape == (4, 12, 32)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    assert (scores[~HAVE] == 0).all() and (scores[HAVE] < -0.1).all()
    found, wanted = gradients(policy, scores), gradients(policy, expected)
    roles = [f".{role}." for role in (ROLES if adapters == "separate" else ["shared"])]
    assert all(any(role in name for name in wanted) for role in roles)
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


@pytest.mark.parametrize("architecture", ["llama", "gemma"])  # gemma's head is its embedding
def test_gradients_of_all_weights_are_those_of_separate_rows(backbones, architecture):
    policy, _ = loaded(backbones[architecture], rank=0)
    scores, _ = score_candidates(policy, pack(PROMPTS, ANSWERS, fill=1))
    found = gradients(policy, scores)
    wanted = gradients(policy, separate_rows(policy, PROMPTS, ANSWERS))
    assert len(wanted) == len(list(policy.parameters()))
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


@pytest.fixture(scope="module")
def policies(backbones):
    return {name: loaded(backbones["llama"], name)[0] for name in IMPLEMENTATIONS}


tokens = st.lists(st.integers(3, 250), min_size=1, max_size=7)
asked = st.lists(st.tuples(tokens, st.lists(tokens, max_size=3)), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(rows=asked.filter(lambda rows: any(group for _, group in rows)), name=st.sampled_from(IMPLEMENTATIONS))
def test_any_ragged_batch_is_its_rows_one_by_one(policies, rows, name):
    prompts, answers = map(list, zip(*rows, strict=True))
    with torch.no_grad():
        scores, _ = score_candidates(policies[name], pack(prompts, answers, fill=0))
        expected = separate_rows(policies[name], prompts, answers)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_neither_padding_nor_order_nor_other_answers_change_a_score(policies):
    with torch.no_grad():
        first, _ = score_candidates(policies["eager"], pack(PROMPTS, ANSWERS, fill=0))
        other, _ = score_candidates(policies["eager"], pack(PROMPTS, ANSWERS, fill=9))
        turned, _ = score_candidates(
            policies["eager"], pack(PROMPTS[::-1], [group[::-1] for group in ANSWERS[::-1]], fill=0)
        )
        fewer, _ = score_candidates(policies["eager"], pack(PROMPTS, [group[:1] for group in ANSWERS], 0))
    tolerance = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(first, other, **tolerance)
    torch.testing.assert_close(first[0], turned[3].flip(0), **tolerance)
    torch.testing.assert_close(first[3, :2], turned[0, :2].flip(0), **tolerance)
    torch.testing.assert_close(first[:, :1], fewer, **tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_answer_each_is_a_plain_row(policies, implementation):
    policy = policies[implementation]
    prompts, answers = PROMPTS[:2] + PROMPTS[3:], [[group[0]] for group in ANSWERS if group]
    packed = pack(prompts, answers, fill=0)
    weight, bias = head_weight(policy.get_output_embeddings(), policy.config)
    with torch.no_grad():
        scores, packed_hidden = score_candidates(policy, packed)
        hidden = hidden_states(policy, packed.input_ids)
        _, sums = sequence_logprobs(hidden, weight, packed.input_ids, packed.segment == 1, bias=bias)
    torch.testing.assert_close(scores, sums[:, None], atol=1e-5, rtol=0)
    real = packed.segment >= 0
    torch.testing.assert_close(packed_hidden[real], hidden[real], atol=1e-5, rtol=1e-5)


def test_neither_prompt_nor_padding_reaches_the_head(policies, monkeypatch):
    rows, original = [], logprob.token_logprobs

    def spy(hidden, *args, **options):
        rows.append(len(hidden))
        return original(hidden, *args, **options)

    monkeypatch.setattr(logprob, "token_logprobs", spy)
    score_candidates(policies["eager"], pack(PROMPTS, ANSWERS, fill=0))
    assert rows == [sum(len(answer) for group in ANSWERS for answer in group)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bf16_is_close(policies, implementation):
    policy, packed = policies[implementation], pack(PROMPTS, ANSWERS, fill=0)
    with torch.no_grad():
        exact, _ = score_candidates(policy, packed)
        rounded, _ = score_candidates(policy, packed, precision="bf16")
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


# --- what transformers would do in silence ------------------------------------------------------------------
def sums_with(policy, packed, **inputs):
    """As score_candidates, with other inputs to the backbone."""
    weight, bias = head_weight(policy.get_output_embeddings(), policy.config)
    segment = packed.segment
    with torch.no_grad():
        hidden = hidden_states(policy, packed.input_ids, **inputs)
        per_token, _ = sequence_logprobs(
            hidden, weight, packed.input_ids, segment > 0, predictor(segment), bias=bias
        )
    return torch.stack([torch.where(segment == k, per_token, 0.0).sum(1) for k in (1, 2, 3)], 1)


def wrong_inputs(inputs):
    """name -> what one might pass instead of the tree mask and its positions."""
    mask, position = inputs["attention_mask"], inputs["position_ids"]
    return {
        "right": inputs,
        "a bool mask": {"attention_mask": mask == 0, "position_ids": position},
        "no positions": {"attention_mask": mask},
        "positions alone": {"position_ids": position},
        "positions and a mask of padding": {
            "attention_mask": torch.ones_like(position),
            "position_ids": position,
        },
        "nothing": {},
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_else_one_might_pass_is_wrong_without_a_word(policies, implementation):
    """An upgrade of transformers that changes one of these is noticed here; see tree_attention."""
    policy, packed = policies[implementation], pack(PROMPTS, ANSWERS, fill=0)
    with torch.no_grad():
        truth = separate_rows(policy, PROMPTS, ANSWERS)
    error = {
        name: (sums_with(policy, packed, **inputs) - truth).abs().max().item()
        for name, inputs in wrong_inputs(tree_attention(policy, packed.segment)).items()
    }
    fine = {name for name, value in error.items() if value < 1e-4}
    assert fine == ({"right"} if implementation == "eager" else {"right", "a bool mask"}), error
    assert all(value > 0.02 for name, value in error.items() if name not in fine), error


def windowed(window):
    config_class, model_class = ARCHITECTURES["mistral"]
    config = config_class(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, sliding_window=window, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return model_class(config).eval()


def test_a_sliding_window_is_refused_below_the_width_of_the_batch_and_else_does_nothing():
    packed = pack(PROMPTS, ANSWERS, fill=0)  # 12 columns
    for window in (4, 11):
        with pytest.raises(ValueError, match=f"rows of 12 tokens, .*window is {window}.*shorter prompts"):
            score_candidates(windowed(window), packed)
    for window in (12, None):
        scores, _ = score_candidates(lm := windowed(window), packed)
        torch.testing.assert_close(scores, separate_rows(lm, PROMPTS, ANSWERS), atol=1e-4, rtol=0)


def test_a_head_with_lora_is_refused(backbones):
    lm, _ = load_backbone(str(backbones["llama"]))
    policy = get_peft_model(lm, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="lm_head is .*leave lm_head out of target_modules"):
        score_candidates(policy, pack(PROMPTS, ANSWERS, fill=0))


def test_a_backbone_that_caps_its_logits_is_refused(backbones):
    lm, _ = load_backbone(str(backbones["gemma"]))
    lm.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping=30.0"):
        score_candidates(add_lora(lm, 4), pack(PROMPTS, ANSWERS, fill=0))


def test_sampling_with_gradient_checkpointing_is_refused_until_eval(backbones):
    """transformers drops the key-value cache with a warning: every token but the first saw no prompt."""
    lm, tokenizer = load_backbone(str(backbones["llama"]), gradient_checkpointing=True)
    torch.manual_seed(1)
    actor = Policy(lm.train(), tokenizer, temperature=1.0)
    with pytest.raises(ValueError, match=r"would forget its prompt: .*model\.eval\(\)"):
        actor.answer(requests())
    lm.eval()
    plain, _ = load_backbone(str(backbones["llama"]))
    expected = Policy(plain, tokenizer, temperature=1.0).answer(requests())
    assert [a.ids for a in actor.answer(requests())] == [a.ids for a in expected]
    policy = add_lora(lm, 4).train()  # a fresh adapter changes nothing; its folded copy is never in training
    assert Policy(policy, tokenizer, temperature=1.0).answer(requests()) == expected


# --- best of K ----------------------------------------------------------------------------------------------
def drawn(policy, tokenizer, request, K):
    """The greedy answer and K - 1 samples, each asked for alone."""
    sampler = Policy(policy, tokenizer, temperature=1.0, planning_ratio=1.0)
    seeds = [replace(request, seed=request.seed + k) for k in range(1, K)]
    return Policy(policy, tokenizer).answer([request]) + [sampler.answer([r])[0] for r in seeds]


def value_alone(policy, tokenizer, critics, request, answer):
    """Q(s,a) from a row of its own."""
    if len(policy.peft_config) > 1:
        use_adapter(policy, request.role)
    ids = torch.tensor([Policy(policy, tokenizer).encode(request.prompt) + answer.ids])
    with torch.no_grad():
        hidden = policy(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        return critics.q(hidden[:, -1], torch.tensor([ROLES.index(request.role)])).item()


def random_critics():
    """Heads that tell answers apart."""
    torch.manual_seed(3)
    critics = Critics(32)
    with torch.no_grad():
        for parameter in critics.parameters():
            parameter.normal_(std=0.3)
    return critics


@pytest.mark.parametrize("adapters", ["shared", "separate"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # with and without BOS
def test_the_candidate_of_highest_q_acts(backbones, architecture, adapters):
    policy, tokenizer = load(backbones[architecture], adapters=adapters)
    critics = random_critics()
    best = BestOfK(policy, tokenizer, critics, K=4)
    ranks = []
    for request, answer in zip(requests(), best.answer(requests()), strict=True):
        answers = drawn(policy, tokenizer, request, 4)
        q = [value_alone(policy, tokenizer, critics, request, a) for a in answers]
        assert best.values(request, answers).tolist() == pytest.approx(q, abs=1e-4)
        assert max(q) - sorted(q)[-2] > 1e-3 and len({tuple(a.ids) for a in answers}) == 4
        assert answer.ids == answers[q.index(max(q))].ids
        assert answer.logprobs == pytest.approx(answers[q.index(max(q))].logprobs, abs=1e-4)
        ranks.append(q.index(max(q)))
    assert len(set(ranks)) > 1, "the critic chooses, not the order"


def test_values_of_answers_of_any_length_are_those_of_each_alone(backbones):
    policy, tokenizer = load(backbones["llama"])
    best = BestOfK(policy, tokenizer, random_critics(), K=2)
    for request in requests():
        answers = [Answer("", ids, [], 0) for ids in ([9], [9, 10, 2], [11] * 9, [9, 10, 2], [2])]
        expected = [value_alone(policy, tokenizer, best.critics, request, a) for a in answers]
        values = best.values(request, answers)
        assert values.shape == (5,) and values.tolist() == pytest.approx(expected, abs=1e-4)
        assert len({round(x, 4) for x in expected}) == 4


@pytest.mark.parametrize("chosen", range(3))
def test_the_choice_among_candidates_by_hand(backbones, monkeypatch, chosen):
    policy, tokenizer = load(backbones["llama"])
    best = BestOfK(policy, tokenizer, random_critics(), K=3)
    q = torch.zeros(3)
    monkeypatch.setattr(best, "values", lambda request, answers: q)
    greedy = [a.ids for a in Policy(policy, tokenizer).answer(requests())]
    assert [a.ids for a in best.answer(requests())] == greedy, "of equals the first: the greedy one"
    q[chosen] = 0.1
    expected = [drawn(policy, tokenizer, r, 3)[chosen].ids for r in requests()]
    assert [a.ids for a in best.answer(requests())] == expected
    assert (expected == greedy) == (chosen == 0)


def test_one_candidate_is_the_greedy_answer(backbones):
    policy, tokenizer = load(backbones["llama"])
    best = BestOfK(policy, tokenizer, random_critics(), K=1)
    assert best.answer(requests()) == Policy(policy, tokenizer).answer(requests())
    assert best.answer([]) == []


def test_a_constant_critic_chooses_the_greedy_answer(backbones):
    policy, tokenizer = load(backbones["llama"])
    critics = random_critics()
    with torch.no_grad():
        for head in critics.online.q.values():
            head[-1].weight.zero_()
    best = BestOfK(policy, tokenizer, critics, K=3)
    expected = Policy(policy, tokenizer).answer(requests())
    assert [a.ids for a in best.answer(requests())] == [a.ids for a in expected]


# --- frozen features ----------------------------------------------------------------------------------------
class Counting:
    """hidden_fn that counts the rows of each forward."""

    def __init__(self):
        self.rows = []

    def __call__(self, policy, ids, level, **inputs):
        self.rows.append(len(ids))
        return learner_hidden_states(policy, ids, level, **inputs)


def plain_features(ids, columns):
    """(B, k, D) of a backbone that never had an adapter, one unpadded prefix at a time."""
    lm = learner_policy(lora=False)
    with torch.no_grad():
        return torch.stack([
            torch.stack([lm.model(input_ids=row[None, : end + 1]).last_hidden_state[0, -1] for end in ends])
            for row, ends in zip(ids, columns.tolist(), strict=True)
        ])  # fmt: skip


def columns_of(batch):
    return torch.stack([batch.state_index, batch.action_index], 1)


def test_frozen_features_are_computed_once_and_are_those_of_the_backbone():
    count, batch = Counting(), make_batch(ragged_decisions())
    frozen = FrozenFeatures(learner_policy(), count)
    first = frozen(batch.input_ids, columns_of(batch), batch.level)
    expected = plain_features(batch.input_ids, columns_of(batch))
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)
    assert count.rows == [8] and not first.requires_grad
    assert torch.equal(frozen(batch.input_ids, columns_of(batch), batch.level), first) and count.rows == [8]


def test_frozen_features_do_not_depend_on_padding_order_or_level():
    count, decisions = Counting(), ragged_decisions()
    frozen, batch = FrozenFeatures(learner_policy(), count), make_batch(ragged_decisions())
    first = frozen(batch.input_ids, columns_of(batch), batch.level)
    other = make_batch(decisions[::-1], extra=3, fill=17)
    again = frozen(other.input_ids, columns_of(other), (other.level + 1) % 3)
    assert torch.equal(again.flip(0), first) and count.rows == [8]
    fresh = FrozenFeatures(learner_policy(), count)
    cold = fresh(other.input_ids, columns_of(other), other.level)
    torch.testing.assert_close(cold.flip(0), first, atol=1e-5, rtol=1e-5)


def test_frozen_features_compute_the_rows_with_something_new_alone():
    count, decisions = Counting(), ragged_decisions()
    frozen = FrozenFeatures(learner_policy(), count)
    for rows in (decisions[:3], decisions[1:6], decisions):
        batch = make_batch(rows)
        found = frozen(batch.input_ids, columns_of(batch), batch.level)
        torch.testing.assert_close(
            found, plain_features(batch.input_ids, columns_of(batch)), atol=1e-5, rtol=1e-5
        )
    assert count.rows == [3, 3, 2]
    known = decisions[0]
    batch = make_batch([known._replace(answer=[*known.answer, 9])])  # a known prompt, another answer
    frozen(batch.input_ids, columns_of(batch), batch.level)
    assert count.rows == [3, 3, 2, 1]


def test_a_next_prompt_is_known_from_the_decision_made_there():
    learner, count = make_learner(features="frozen"), Counting()
    learner.frozen.hidden_fn = count
    learner.decide(make_batch([([5, 6, 7], [8, 2], [30, 31], 1, 0.0, 1, True)]))  # nothing follows
    assert count.rows == [1]
    learner.decide(make_batch([([20, 21], [8, 2], [5, 6, 7], 1, 0.0, 1, False)]))  # leads to the first
    assert count.rows == [1, 1]
    learner.decide(make_batch([([20, 21], [8, 2], [5, 6], 1, 0.0, 1, False)]))  # a prefix was not kept
    assert count.rows == [1, 1, 1]


def test_a_warm_cache_changes_no_metric_and_no_step():
    rows = ragged_decisions()
    cold, warm = make_learner(features="frozen"), make_learner(features="frozen")
    count = warm.frozen.hidden_fn = Counting()
    for part in (rows[2:], rows[:5]):  # in other company than below
        warm.decide(make_batch(part))
    count.rows.clear()
    for _ in range(3):
        cold.frozen.known.clear()
        metrics = [learner.update([make_batch(rows)]) for learner in (cold, warm)]
        assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5, nan_ok=True)
    assert count.rows == []
    assert_same(parameters(cold), parameters(warm), atol=2e-5, rtol=1e-4)


def test_steps_of_the_adapter_leave_frozen_features_as_they_are():
    batch, learner = make_batch(ragged_decisions()), make_learner(features="frozen", actor_lr=0.05)
    before = learner._features(batch)
    adapted = learner_hidden_states(learner.policy, batch.input_ids, None).detach()
    learner.update([batch])
    assert (learner_hidden_states(learner.policy, batch.input_ids, None) - adapted).abs().max() > 0.01
    learner.frozen.known.clear()
    for a, b in zip(before, learner._features(batch), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


# --- eval.py --candidates -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [{"agent": "random"}, {"agent": "gold"}, {"agent": "zero-shot"}, {"temperature": 0.5}]
)
def test_candidates_need_a_greedy_policy(tmp_path, options):
    config = evaluation.Config(tmp_path, "x", checkpoint=tmp_path, candidates=4, **options)
    with pytest.raises(ValueError, match="--candidates needs --agent policy, and --temperature 0"):
        evaluation.main(config)
    assert list(tmp_path.iterdir()) == []


def test_candidates_need_critics_that_read_what_the_policy_computes(backbones, tmp_path, monkeypatch):
    policy, tokenizer = load(backbones["llama"])
    monkeypatch.setattr(evaluation, "EnvPool", lambda *args: nullcontext())  # nothing is played
    for name, meta in {"frozen": {"features": "frozen"}, "sft": {}, "other": {}}.items():
        save(policy, tokenizer, tmp_path / name, backbones["llama"], history="progress", stage="x", **meta)
    save_critics(Critics(16), tmp_path / "other/critic.safetensors")
    save_critics(Critics(32), tmp_path / "frozen/critic.safetensors")
    for name, message in [
        ("frozen", "these critics read features without the adapter: leave out --candidates"),
        ("sft", "no critic at .*train_orl.py writes it"),
        ("other", "has hidden size 16, expected 32"),
    ]:
        config = evaluation.Config(
            tmp_path / "e", "x", checkpoint=tmp_path / name, candidates=2, device="cpu"
        )
        with pytest.raises(ValueError, match=message):
            evaluation.main(replace(config, threads=1))
    assert not (tmp_path / "e").exists()


def test_the_policy_of_an_evaluation_with_candidates_is_best_of_k(backbones, tmp_path, monkeypatch):
    """And what it chooses depends on the critics of the checkpoint."""
    policy, tokenizer = load(backbones["llama"])
    folder = save(
        policy, tokenizer, tmp_path / "run", backbones["llama"], history="progress", stage="orl",
        features="adapted",
    )  # fmt: skip
    save_critics(random_critics(), folder / "critic.safetensors")
    played = []
    monkeypatch.setattr(
        evaluation, "rollout", lambda pool, panel, policy, *args, **rest: played.append(policy) or []
    )
    for candidates in (1, 4):
        config = evaluation.Config(tmp_path, "x", checkpoint=folder, candidates=candidates, device="cpu")
        evaluation.play(config, [], None, None)
    greedy, best = played
    assert type(greedy) is Policy and type(best) is BestOfK and best.K == 4
    request = Request("executor", requests()[1].prompt, 6, 0)
    expected = max(
        drawn(policy, tokenizer, request, 4),
        key=lambda answer: value_alone(policy, tokenizer, best.critics, request, answer),
    )
    assert best.answer([request])[0].ids == expected.ids
    assert math.isfinite(best.values(request, [expected]).item())
