"""Every reading of offline RL's equations by name, and those that belong together.

GLIDER (arXiv:2505.19761) and STEP-HRL (arXiv:2604.05808) leave choices open, and their released code computes
other things than they print. The first value is the default; docs/paper_map.md discusses the others. What
this file does not do: compute anything (learner.py does).
"""

from dataclasses import dataclass
from typing import Literal

Side = Literal["upper", "lower"]
Answers = Literal["dataset", "policy"]
Token = Literal["answer", "prompt"]
Bootstrap = Literal["v", "next_q"]
Features = Literal["adapted", "frozen"]
Actor = Literal["awr", "q_weighted", "signed_advantage", "bc", "td3_bc"]
Advantage = Literal["q", "return"]
Trained = Literal["all", "planner"]


@dataclass(frozen=True)
class RLConfig:
    """What the step depends on. GLIDER's two taus are `expectile` and `polyak`, its lambda `temperature`."""

    gamma: float = 0.99  # discount per decision, or per environment step with "smdp" (GLIDER Table 5)
    discount: Literal["subtask", "smdp"] = "subtask"  # published: one gamma per subtask; option: gamma^steps
    expectile: float = 0.7  # IQL's tau, in (0, 1); 0.5 is plain regression (GLIDER gives no value, IQL 0.7)
    expectile_side: Side = "upper"  # lower: 1 - expectile, V below mean Q (the sign slip of both releases)
    value_answers: Answers = "dataset"  # u in L_V: the data's (IQL), or the policy's own (GLIDER eq. 5)
    value_reads: Token = "answer"  # V's target: Q_target after the answer, or at the prompt's end (STEP-HRL)
    bootstrap: Bootstrap = "v"  # V(s') (eq. 4), or Q(s', a') of the data, 0 where none follows (GLIDER code)
    conservative: float = 0.0  # weight of CQL's penalty on Q of the policy's own answers; CQL's alpha is half
    features: Features = "adapted"  # what heads read: the actor's forward, or the backbone without adapter
    polyak: float = 0.2  # share of the online heads that enters the target each step (GLIDER Table 5)
    actor: Actor = "awr"  # weight of a decision in L_pi: the table in actor_weight
    advantage: Advantage = "q"  # what A compares with V: Q (eq. 7), or the return (AWR), Q where that is cut
    rl_levels: Trained = "all"  # "planner": the other levels clone the experts, as in GLIDER's code
    temperature: float = 0.99  # eq. 7's lambda (GLIDER Table 5), divides A; inf is behaviour cloning
    max_weight: float = 20.0  # ceiling of one decision's weight (STEP-HRL's code; GLIDER names none)
    td3_alpha: float = 2.5  # TD3+BC's alpha: weight of the policy gradient once Q is divided by mean |Q|
    token_norm: Literal["sum", "mean"] = "sum"  # log pi of a whole answer (eq. 7), or its mean per token
    actor_lr: float = 1e-4  # AdamW step size of the policy, weight decay 0.01 (GLIDER: 1e-5 for 7B to 8B)
    critic_lr: float = 1e-4  # AdamW step size of the heads, weight decay 0.01 (GLIDER Table 5)
    clip_norm: float = 1.0  # ceiling of the gradient norm, policy and heads apart (GLIDER's code: together)

    def __post_init__(self):
        if not 0 < self.expectile < 1:
            raise ValueError(f"expectile is {self.expectile}, expected in (0, 1): 0.5 is plain regression")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, expected > 0: inf is behaviour cloning")
        if not self.max_weight > 0:
            raise ValueError(f"max_weight is {self.max_weight}, expected > 0: inf is no ceiling")
        if not self.conservative >= 0:
            raise ValueError(f"conservative is {self.conservative}, expected >= 0: 0 is off")
        if self.value_reads == "prompt" and self.value_answers == "policy":
            raise ValueError("value_reads='prompt' reads no answer: leave value_answers at 'dataset'")
        if self.rl_levels == "planner" and self.actor == "td3_bc":
            raise ValueError("td3_bc trains all levels with Q: choose rl_levels='all' or another actor")

    @property
    def samples_answers(self) -> bool:
        """Whether the step needs answers that the policy samples for the batch's prompts."""
        return self.value_answers == "policy" or self.conservative > 0 or self.actor == "td3_bc"


# Readings that belong together: what the papers print, and what their code computes (docs/paper_map.md).
PRESETS = {
    "as_published_glider": {
        "rl": {"value_answers": "policy", "max_weight": float("inf")},
        "credit": {"invalid_penalty": 0.0},
    },
    "as_published_step_hrl": {"rl": {}, "credit": {"invalid_penalty": 0.0}},  # the defaults but for that
    "as_released_glider": {
        "rl": {
            "actor": "q_weighted", "bootstrap": "next_q", "rl_levels": "planner", "token_norm": "mean",
        },
        "credit": {"completion": "claim", "invalid_penalty": 0.0},
    },
    "as_released_step_hrl": {
        "rl": {
            "actor": "signed_advantage", "expectile": 0.95, "expectile_side": "lower",
            "value_reads": "prompt", "token_norm": "mean",
        },
        "credit": {"completion": "segment", "invalid_penalty": 1.0},
    },
}  # fmt: skip
