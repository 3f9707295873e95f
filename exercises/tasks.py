"""Ten exercises. Fill in a function, then check it: `python -m pytest exercises -k expectile`, or all.

Shapes: B decisions, T tokens or turns, V vocabulary. Nothing that is given may be changed in place. Our
answers are in solutions.py; the equations, with their papers, in docs/paper_map.md.
"""

from torch import Tensor

TODO = "this exercise is not filled in yet"


# 1
def expectile_loss(diff: Tensor, expectile: float) -> Tensor:
    """L_V = mean of |expectile - 1(u < 0)| u^2, u = Q(s,a) - V(s)  (IQL, arXiv:2110.06169, eq. 5).

    diff: u, (B,) -> scalar. Which way does V move if u > 0 weighs more than u < 0?
    """
    raise NotImplementedError(TODO)


# 2
def option_target(rewards: list[float], gamma: float, terminated: bool, next_value: float) -> float:
    """y of a subtask of k = len(rewards) environment steps, as an option (Sutton, Precup & Singh 1999).

    y = sum_i gamma^i rewards[i] + gamma^k V(s'), and no V(s') where the world has ended. A step limit is
    not an end. (The papers, and `--rl.discount smdp`, leave the sum of rewards inside undiscounted.)
    """
    raise NotImplementedError(TODO)


# 3
def awr_weight(advantage: Tensor, temperature: float, max_weight: float) -> Tensor:
    """w = exp(A / temperature), at most max_weight  (GLIDER, arXiv:2505.19761, eq. 7). (B,) -> (B,).

    Finite for any advantage, 1 everywhere at temperature inf, and without a gradient.
    """
    raise NotImplementedError(TODO)


# 4
def logprob_gradient(logits: Tensor, token: int) -> Tensor:
    """Gradient of log softmax(logits)[token] with respect to the logits, without autograd. (V,) -> (V,)."""
    raise NotImplementedError(TODO)


# 5
def answer_mask(prompt_tokens: list[int], answer_tokens: list[int], width: int) -> Tensor:
    """Which columns of the logits score a token of the answer, its EOS included? -> (B, width) bool.

    Row b of the input is prompt_tokens[b] of prompt (BOS among them), then answer_tokens[b] of answer (EOS
    among them), then padding up to `width`. The logits of column i score token i + 1.
    """
    raise NotImplementedError(TODO)


# 6
def executor_outcome(
    world_ended: bool, limit: bool, claimed: bool, verified: bool, understood: bool
) -> tuple[float, bool, bool]:
    """(reward, terminated, truncated) of the executor's last action of a subtask.

    The judge's verdict earns 1, the executor's own claim nothing; an action that the world does not
    understand costs 1. Over for good: completed, the world's end, or a claim (the planner takes over). Else
    it is cut off, by the step limit or by the cap on actions: the same subtask goes on.
    """
    raise NotImplementedError(TODO)


# 7
def judge(subtask: str, feedback: str) -> bool:
    """Is an ALFWorld subtask complete, from the answer to the last action? Four kinds:

    "find and take mug"       You pick up mug 1 from desk 2
    "clean mug"               You clean mug 1 using sinkbasin 1      (heat and cool alike)
    "put mug in shelf 3"      You move mug 1 to shelf 3              (that shelf, no other)
    "use desklamp"            You turn on desklamp 1
    """
    raise NotImplementedError(TODO)


# 8
def hierarchical_advantages(
    reward: Tensor,
    switch: Tensor,
    v_low: Tensor,
    v_high: Tensor,
    gamma: float,
    lam: float,
    lam_segment: float,
) -> tuple[Tensor, Tensor]:
    """HiPER's (A_low, A_high) of an episode that the world ended (arXiv:2602.16165, sec. 4). All (T,).

    A segment begins at turn 0 and wherever `switch` is true.
    Low:  d_t = r_t + gamma V' - V_low(s_t); V' is V_low of the next turn, or V_high where the next turn
          begins another segment, or 0 at the end. A_t = d_t + gamma lam A_{t+1}; nothing is carried across
          segments.
    High: a segment of n turns is one step: R = sum_i gamma^i r,
          D = R + gamma^n V_high(next segment) - V_high(s), A = D + gamma^n lam_segment A(next segment);
          nan between the turns where a segment begins.
    """
    raise NotImplementedError(TODO)


# 9
def temperature_for(advantage: Tensor, share: float) -> float:
    """The temperature at which exp(A / temperature) has an effective sample size of `share` of the batch.

    Kish: (sum w)^2 / sum w^2, between 1 and B, grows with the temperature; so halve an interval, from 1e-3 to
    1e3, until it is right to a thousandth. (B,), 0 < share < 1. Beware of overflow at small temperatures.
    """
    raise NotImplementedError(TODO)


# 10. Six runs of offline RL, each with one real fault of the two releases (docs/paper_map.md tells them all):
#   python exercises/hunt.py 1     # its numbers beside those of a sound run; 2 minutes, the first time 6
# Write the fault's name where you are sure. The suspects:
#   R-G4   below the planner there is only behaviour cloning
#   R-G6   offline RL starts from a fresh adapter, not from SFT's
#   R-G7   micro-batches are divided by their own count
#   R-G11  the last action is never trained (in the release: of a flat trajectory; here: of a subtask)
#   R-S1   the raw advantage is the weight, without exp
#   R-S2   the sign of the expectile is reversed
HUNT = {1: "", 2: "", 3: "", 4: "", 5: "", 6: ""}
