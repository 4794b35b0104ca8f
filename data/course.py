"""Exercises: write the functions of instructgpt.py yourself.

    python data/course.py student                         lists the exercises
    python data/course.py student gae --out mine          writes a folder in which gae is empty
    python data/course.py student all --out mine          the same with every exercise empty
    python data/course.py judge gae                       in that folder: judges your gae alone
    python data/course.py student --break 3 --out mine    the whole file with one mistake; find it in a run
    python data/course.py student --reveal 3              which mistake that was, and what gave it away
    python data/course.py kl                              estimates of the KL, and what each is good for
    python data/course.py check                           for teachers: tests and judge, judged themselves

The student's file is computed from the true one. The true one travels in data/course_solution.bin, packed.
"""
import argparse
import ast
import functools
import importlib.util
import inspect
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import types
import warnings
import zlib
from base64 import b64decode, b64encode
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, is_dataclass
from statistics import median

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
SCRIPT, TESTS = "instructgpt.py", "test_instructgpt.py"
SOLUTION = os.path.join(HERE, "course_solution.bin")

# An exercise: key | function | minutes | where in the paper | whose idea | words in its tests' names. Below
# it the wrong versions that people wrote: "the version that ..." | where it was seen. Below each what changes
# in the true function: old >> new, or old and then the new lines, each behind a >>. Of the sources,
# sff-details is vwxyzjn/summarize_from_feedback_details, and microppo is no-magic's.
TABLE = r"""
stack | stack | 20 | 3.2 | ours: the action frame | stack
    masks the end-of-text out, so that ending is never trained | DeepSpeed-Chat ppo_trainer.py, nanochat
        (column < lens[:, None] - 1) >> (column < lens[:, None] - 2)
    starts the mask one column late, so the first response token is never trained | ttumiel summarize_gpt.py
        column >= prompt_lens[:, None] - 1 >> column >= prompt_lens[:, None]
        column < lens[:, None] - 1 >> column < lens[:, None]
    takes a word for filler because it has the filler's id | mlabonne/llm-course#33, trl PR #5303
        (column < lens[:, None] - 1) >> (column < lens[:, None] - 1) & (tokens[:, 1:] != 0)
    points at the token before the end-of-text as the last | trlx ec75e99
        (lens - 1).to(device) >> (lens - 2).to(device)
corpus_batch | corpus_batch | 10 | 3.5 | ours: rows begin where documents do | corpus_batch
    cuts rows anywhere, not where documents begin | nanoGPT train.py, on purpose there
        torch.randint(len(starts), >> torch.randint(len(tokens) - length,
        starts[chosen][:, None] >> chosen[:, None]
    draws from PyTorch's own generator, so that a resumed run sees other rows | trl#1643
        , generator=generator) >> )
batches | batches | 15 | C.1 | ours | batches
    makes one pass, whatever epochs says | trl ab0d11d81
        range(epochs) >> range(1)
    drops the rows that do not fill a batch | trl ppo_trainer.py, drop_last=True
        range(0, len(order), size) >> range(0, len(order) - size + 1, size)
    leaves the batches of a stretch in the order of their length | trlx 6f7f59d, an order of batches too
        [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()] >> cut
log_softmax | log_softmax | 5 | C.4 | the paper's: temperature 1 | log_softmax pick token_logprobs
    ignores the temperature | microppo, minimind
        if temperature != 1: >> if temperature == 0:
    stays in half precision | minimind PR #814
        logits.float() >> logits
    divides the caller's own logits, which somebody reads later | logits /= T in many samplers
        logits = logits / temperature >> logits /= temperature
pick | pick | 15 | C.4 | the paper's: samples of the policy | pick
    samples at the temperature but scores at 1 | microppo 828 and 843, rlhf-book utils.py
        logprobs.gather(1, token) >> log_softmax(logits, 1.0).gather(1, token)
    samples from the likeliest tokens but scores with the whole soft-max | nanochat chat_rl.py 49 and 264
        cumulative = logprobs
            >> kept = logprobs.topk(2).values[:, -1:]
            >>     cumulative = logprobs.where(logprobs >= kept, -math.inf)
    gives every row the first row's luck | nanochat, before 8f979a8
        goal = uniforms >> goal = uniforms[:1]
rollout | Sampler.step | 30 | C.4 | the paper's: batches of episodes | rollout
    does not count the end-of-text as an action | nanochat engine.py 281 and 291
        self.alive[:, None]) >> (self.alive & (token != self.eos))[:, None])
    keeps what rows sample after their end | Ziegler et al. 2019 on purpose; microRLHF
        token.masked_fill(~self.alive, 0) >> token
        logprob.masked_fill(~self.alive, 0) >> logprob
        self.alive[:, None]) >> torch.ones_like(self.alive)[:, None])
    waits for the host at each step to ask whether all rows have ended | transformers generate()
        self.cache.at(self.newest, width)
            >> if not self.alive.any():
            >>             return
            >>         self.cache.at(self.newest, width)
masked_mean | masked_mean | 5 | 3.5 | ours | masked_mean
    divides by all slots, not by those of the mask | sff-details 761-764, in its log
        mask.sum().clamp(min=1) >> mask.numel()
    multiplies by the mask, so that a NaN behind it comes through | SkyRL#1633
        zero_outside(mask, x).sum() >> (x * mask).sum()
    gives NaN for an empty mask | NeMo-RL#158
        mask.sum().clamp(min=1) >> mask.sum()
    averages each row first | trl 7c1fa85ad
        zero_outside(mask, x).sum() / mask.sum().clamp(min=1)
            >> (zero_outside(mask, x).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
whiten | whiten | 10 | not stated | the ancestors': Ziegler et al. 2019 | whiten
    counts the padding in mean and deviation | ttumiel, the mask left as a TODO
        masked_mean(x, mask) >> x.mean()
        masked_mean(centred ** 2, mask) >> (centred ** 2).mean()
    whitens each row by itself, padding included | minRLHF buffer.py 128-130
        masked_mean(x, mask) >> x.mean(1, keepdim=True)
        masked_mean(centred ** 2, mask) >> (centred ** 2).mean(1, keepdim=True)
    divides by n - 1, so that a single token gives NaN | stable-baselines3#265
        torch.rsqrt(masked_mean(centred ** 2, mask) + 1e-8) >> (1 / x[mask].std())
    keeps the mean | lm-human-preferences, shift_mean=False, for rewards
        + 1e-8)) >> + 1e-8) + masked_mean(x, mask))
token_logprobs | token_logprobs | 20 | Eq. 2 | the paper's | token_logprobs
    scores each token in the state that already holds it, one column late | PaLM-rlhf, before a159310
        F.pad(tokens[:, 1:], (0, 1)) >> tokens
        tokens[:, 1:][mask] >> tokens[:, :-1][mask]
    scores at temperature 1 what was sampled at another | minimind, rlhf-book utils.py
        log_softmax(model(tokens), temperature) >> log_softmax(model(tokens), 1.0)
        log_softmax(logits, temperature) >> log_softmax(logits, 1.0)
    ignores the mask | trlx 8edcd9d
        if mask is None: >> if True:
lm_loss | lm_loss | 10 | 3.5, C.1 | the paper's; that the prompt is masked, ours | lm_loss section_35_rows
    trains the prompt too | trl SFTTrainer, its default for years
        if mask is None:
            >> logprobs = token_logprobs(model, tokens)
            >>     if True:
    divides by all columns, prompt and filler included | sff-details 761-764, in its log
        -masked_mean(logprobs, mask) >> -logprobs.mean()
    averages each row first, so that a token of a short response weighs more | trl 7c1fa85ad, 1b1140aa6
        -masked_mean(logprobs, mask) >> -(logprobs.sum(1) / mask.sum(1).clamp(min=1)).mean()
reward_scores | reward_scores | 5 | 3.5 | the paper's; where it is read, ours | reward_scores section_35_rows
    reads the last column, filler or not | microRLHF train_ppo_gae.py
        == last[:, None] >> == torch.full_like(last, tokens.size(1) - 1)[:, None]
    reads the token before the end-of-text | trlx a369dad, ec75e99
        == last[:, None] >> == last[:, None] - 1
    averages over all positions, filler too | DeepSpeed-Chat trains its reward model so
        return reward_model(tokens, keep=read) >> return reward_model(tokens).mean(1)
reward_loss | reward_loss | 30 | Eq. 1 | the paper's; ties, ours | reward_loss eq1
    divides by C(K,2) twice | minChatGPT loss.py 82-84
        total / pairs.clamp(min=1) >> total / pairs.clamp(min=1) ** 2
    takes the log of the sigmoid, -inf at -100 | minChatGPT loss.py 81, DeepSpeedExamples#423
        F.logsigmoid(margin) >> torch.log(torch.sigmoid(margin))
    makes pairs of ties | rlhf-book#503, equal completions as a pair
        (ranks[:, :, None] < ranks[:, None, :]) >> (ranks[:, :, None] <= ranks[:, None, :])
normalise_reward | normalise_reward | 10 | 3.5 | the paper's | normalise_reward
    takes the mean over other texts than the demonstrations | microppo 755-794
        score_all(reward_model, prompts, responses) >> score_all(reward_model, prompts, prompts)
    scales the scores too, so that beta loses its unit | lm-human-preferences, on purpose there
        reward_model.head.bias -=
            >> spread = torch.tensor(score_all(reward_model, prompts, responses)).std()
            >>     reward_model.head.weight /= spread
            >>     reward_model.head.bias /= spread
            >>     reward_model.head.bias -=
kl_k1 | kl_k1 | 2 | Eq. 2 | the paper's | kl_k1
    has the sign of minus the KL, so that leaving is paid for | rlhf-book loss.py 49-59
        logprobs - ref_logprobs >> ref_logprobs - logprobs
    is half the squared log-ratio, k2 | minRLHF 93-94, microppo 905-911
        return logprobs - ref_logprobs >> return 0.5 * (logprobs - ref_logprobs) ** 2
    is k3, whose gradient as a reward is another one | trl kl_estimator="k3"
        return logprobs - ref_logprobs
            >> return torch.expm1(ref_logprobs - logprobs) - (ref_logprobs - logprobs)
kl_k3 | kl_k3 | 10 | 3.5 | Schulman 2020 | kl_k3
    has k3 the wrong way round | rlhf-book loss.py 23-33, minChatGPT trainers.py 174-177
        torch.expm1(ref_logprobs - logprobs) - (ref_logprobs - logprobs)
            >> torch.expm1(logprobs - ref_logprobs) - (logprobs - ref_logprobs)
    is half the squared log-ratio, k2 | minRLHF 93-94, microppo 905-911
        torch.expm1(ref_logprobs - logprobs) - (ref_logprobs - logprobs)
            >> 0.5 * (ref_logprobs - logprobs) ** 2
    loses its digits in exp(x) - 1 | rlhf-book, before PR #525
        torch.expm1(ref_logprobs - logprobs) - >> torch.exp(ref_logprobs - logprobs) - 1 -
token_rewards | token_rewards | 20 | Eq. 2, 3.5 | the paper's | token_rewards
    puts the score into the last column, filler or not | microRLHF train_ppo_gae.py
        mask & ~F.pad(mask[:, 1:], (0, 1)) >> F.pad(torch.zeros_like(mask[:, 1:]), (0, 1), value=True)
    puts the score one column behind the end | sff-details 670-685, with a second mask
        mask & ~F.pad(mask[:, 1:], (0, 1)) >> ~mask & F.pad(mask[:, :-1], (1, 0))
    pays for the KL instead of charging it | PaLM-rlhf, before 2bb47d4; Logic-RL#58
        -beta * k1 >> beta * k1
    charges the mean over the tokens, not their sum | rlhf-book, minChatGPT
        -beta * k1 >> -beta * k1 / mask.sum(1, keepdim=True).clamp(min=1)
gae | gae | 30 | C.4 | Schulman et al. 2016; lambda, the ancestors' | gae
    lets V after the end into the last delta | trl PR #5303, DeepSpeed-Chat before 9cf985e4
        zero_outside(mask, rewards), zero_outside(mask, values) >> zero_outside(mask, rewards), values
        advantages + values >> advantages + zero_outside(mask, values)
    lets the V of the last column in, although the episode is over | minRLHF buffer.py
        next_value = torch.zeros_like(values[:, 0]) >> next_value = values[:, -1]
    is the reward of the token minus its V | minChatGPT 224, PaLM-rlhf
        delta + discount * lam * next_advantage, 0.) >> rewards[:, t] - values[:, t], 0.)
    runs on through the columns outside the mask | radixark/miles PR #1827
        torch.where(mask[:, t], delta + discount * lam * next_advantage, 0.)
            >> delta + discount * lam * next_advantage
policy_loss | policy_loss | 20 | C.4 | Schulman et al. 2017 | policy_loss
    ignores the mask | minChatGPT loss.py 17-28
        zero_outside(mask, logprobs), zero_outside(mask, old_logprobs) >> logprobs, old_logprobs
        zero_outside(mask, advantages) >> advantages
        -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)
            >> -torch.minimum(ratio * advantages, clipped * advantages).mean()
    takes the minimum before the advantage is multiplied in | takuseno/ppo#3
        torch.minimum(ratio * advantages, clipped * advantages) >> torch.minimum(ratio, clipped) * advantages
    takes the maximum in place of the minimum | yandexdataschool/Practical_RL#248
        torch.minimum( >> torch.maximum(
    averages each row first | trl 7c1fa85ad, 1b1140aa6
        return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)
            >> rows = torch.minimum(ratio * advantages, clipped * advantages).sum(1)
            >>     return -(rows / mask.sum(1).clamp(min=1)).mean()
value_loss | value_loss | 15 | not stated | the ancestors': Ziegler et al. 2019, its code | value_loss
    takes the minimum, so that a move away from the return costs nothing | leggedrobotics/rsl_rl#152
        torch.maximum( >> torch.minimum(
    lets the padding count | trlx 8edcd9d, sff-details 761-764
        0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)
            >> 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).mean()
    takes the square after the maximum | implementation-matters/code-for-paper#1
        torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
            >> torch.maximum(values - returns, clipped - returns) ** 2
ema_update | ema_update | 5 | C.4 | the paper's | ema_update
    has the decay the wrong way round | marin-community/levanter PR #883
        1 - decay >> decay
    moves the average away from the weights | ostris/ai-toolkit#1034
        1 - decay >> decay - 1
cosine | cosine | 10 | C.1, C.2 | the paper's | cosine
    ends at 0, not at a tenth | PyTorch's CosineAnnealingLR, its default
        0.55 + 0.45 * >> 0.5 + 0.5 *
    never quite reaches its end | nanoGPT get_lr
        steps - 1 - warmup >> steps - warmup
    wastes the first step on a rate of 0 | nanoGPT get_lr, in its first form
        (step + 1) / warmup >> step / warmup
warmup_factor | warmup_factor | 5 | C.4 | the paper's | warmup_factor
    starts at 0, not at a tenth | transformers get_constant_schedule_with_warmup
        0.1 + 0.9 * min(1, iteration / warmup) >> min(1, iteration / warmup)
    falls again after the warm-up | transformers get_linear_schedule_with_warmup
        return 0.1 + 0.9 * min(1, iteration / warmup)
            >> return max(0, 1 - abs(iteration - warmup) * 0.9 / warmup)
adamw | adamw | 5 | App. C | the paper's | adamw
    uses the first beta twice | minChatGPT trainers.py 121-128
        (0.9, 0.95) >> (0.9, 0.9)
    has PyTorch's betas | PyTorch's default
        (0.9, 0.95) >> (0.9, 0.999)
    decays the weights | PyTorch's default
        weight_decay=0.0 >> weight_decay=0.01
clip_and_step | clip_and_step | 10 | not stated | ours | clip_and_step
    never clips, as if it clipped before backward | minChatGPT trainers.py 386-390
        model.parameters(), 1.0) >> model.parameters(), math.inf)
    leaves the gradients in place for the next step | minRLHF ppo_trainer.py
        optimizer.zero_grad() >> pass
make_experience | make_experience | 40 | C.4 | the paper's | make_experience
    takes the KL to the policy that sampled, not to the SFT model | PaLM-rlhf 542-548
        token_logprobs(reference, tokens, cfg.temperature, mask) >> r.logprobs[picked, :n - 1]
    scores at temperature 1 what was sampled at another | minimind, microppo 843
        token_logprobs(reference, tokens, cfg.temperature, mask)
            >> token_logprobs(reference, tokens, 1.0, mask)
    whitens the rewards, which pays for length or charges it | lm-human-preferences, but for its shift_mean
        token_rewards(scores, r.logprobs, ref_logprobs, r.mask, cfg.beta)
            >> whiten(token_rewards(scores, r.logprobs, ref_logprobs, r.mask, cfg.beta), r.mask)
update | update | 40 | Eq. 2, C.4 | the paper's | update
    takes the mix as a step of its own | DeepSpeed-Chat 362-371
        (ppo_loss + cfg.ptx_coef * ptx_loss).backward() >> ppo_loss.backward()
        # 7. The value net
            >> if web is not None:
            >>         (cfg.ptx_coef * lm_loss(policy, web)).backward()
            >>         clip_and_step(policy, adams[0], cfg.policy_lr * lr_factor)
            >>     # 7. The value net
    clips before backward, when there is nothing to clip | minChatGPT trainers.py 386-390
        norm = clip_and_step(policy, adams[0], cfg.policy_lr * lr_factor)
            >> adams[0].param_groups[0]["lr"] = cfg.policy_lr * lr_factor
            >>     adams[0].step()
            >>     adams[0].zero_grad()
            >>     norm = 0.0
    scores at temperature 1 what was sampled at another | microppo 843
        token_logprobs(policy, tokens, cfg.temperature, mask) >> token_logprobs(policy, tokens, 1.0, mask)
reinforce | reinforce | 10 | not in the paper | Williams 1992 | reinforce
    gives each token its own reward alone, so that only the last one gets the score | vivekkalyanarangan30
        zero_outside(mask, rewards).sum(1, keepdim=True).expand(mask.shape) >> zero_outside(mask, rewards)
    has no baseline | REINFORCE in its plainest form
        total - total[:, 0].mean() >> total
dpo_loss | dpo_loss | 15 | not in the paper | Rafailov et al. 2023 | dpo_loss
    leaves the reference out | DPO's own code with reference_free=True
        (logp_w - ref_logp_w) - (logp_l - ref_logp_l) >> logp_w - logp_l
    takes the log of the sigmoid, -inf at -900 | minChatGPT loss.py 81
        -F.logsigmoid(beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l)))
            >> -torch.log(torch.sigmoid(beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))))
kto_loss | kto_loss | 15 | not in the paper | Ethayarajh et al. 2024 | kto_loss
    subtracts the reference point after beta, not before | the first version of KTO's paper
        beta * (logp - ref_logp - kl0) >> beta * (logp - ref_logp) - kl0
    has no reference point | trl loss_type="apo_zero_unpaired"
        beta * (logp - ref_logp - kl0) >> beta * (logp - ref_logp)
train_dpo | train_dpo | 40 | not in the paper | Rafailov et al. 2023 | train_dpo dpo_trains dpo_and_kto_start
    has a reference that moves, because it is the policy itself | trl, which now refuses one object for both
        policy, reference = copy_of(sft_model), freeze(sft_model) >> policy = reference = copy_of(sft_model)
    divides the log-probs by the length | trl loss_type="ipo" and SimPO, on purpose there
        response_logprobs(reference, prompts, responses)
            >> response_logprobs(reference, prompts, responses) / torch.tensor([len(y) for y in responses])
        response_logprobs(policy, prompts, responses)
            >> response_logprobs(policy, prompts, responses) / torch.tensor([len(y) for y in responses])
    takes one pair of each batch and not all | Zephyr's binarised UltraFeedback: one pair of four answers
        .nonzero(as_tuple=True) >> .nonzero()[:1].T
"""

# Mistakes to be found in a run of the miniature: (key, how its title begins, what gave it away).
BREAKS = (
    ("gae", "is the reward of the token",
     "The first ledger: the return is 0 at every token but the last, though the score of 0.653 is still to "
     "come. So no credit flows back. In the first line of the iterations ev is -57; the healthy run has -8."),
    ("make_experience", "takes the KL to the policy that sampled",
     "The lines of the iterations: k1 and k3 stay exactly 0 to the end, while score and entropy move. The "
     "healthy run has k3 = 0.034 in its fourth line. Nothing holds this policy near the SFT model."),
    ("reward_loss", "divides by C(K,2) twice",
     "The reward model's loss: 0.115 in its first step. A model that knows nothing yet is near log 2 = 0.69, "
     "and the healthy run begins at 0.78. An accuracy of 0.58 says that it has not learned so much. Adam "
     "hides the wrong scale, so all later numbers look sound."),
    ("stack", "masks the end-of-text out",
     "The first line of the iterations: ended is 0.27 and the length 14.8 of 16; the healthy run has 1.00 "
     "and 7.2. The ledger's answer runs on over several lines. The losses look sound, since the mask takes "
     "away the very token that was not learned."),
    ("token_rewards", "puts the score one column behind",
     "The first ledger: the score is 0.653, but the reward of the last token is 0, so the rewards do not add "
     "up to what the line below says. The returns are near 0 too, and vloss falls to 0.007 at the end, "
     "because the value net learns to predict nothing."))
HEALTHY = """    sft     1/94  loss 2.72         sft  94/94  loss 1.58
    rm      1/30  loss 0.779     reward model on held-out comparisons: accuracy 0.565

    Episode ledger, score 0.653
                       log pi    log ref  KL reward     reward      value  advantage     return
         ' Please'     -2.300     -2.300     -0.000      0.000      0.762     -0.414      0.348
           ' pass'     -2.284     -2.284      0.000      0.000     -1.411      1.851      0.440
               ...
    <|endoftext|>      -0.061     -0.061     -0.000      0.653      0.472      0.181      0.653

    ppo     1/4   score -0.013  ended 1.00  length 7.2  k1 3e-08  k3 4e-13  ev -8.5  vloss 1.70
    ppo     4/4   score  0.094  ended 0.98  length 7.3  k1 0.069  k3 0.034  ev 0.33  vloss 0.121"""

# ------------------------------------------------------------------------------------------------------------
# The table, and functions cut out of a source and put into one


@dataclass
class Wrong:
    title: str                                   # completes "the version that ..."
    source: str
    edits: list = field(default_factory=list)    # of [old, [lines of the new text]]


@dataclass
class Exercise:
    key: str
    name: str                                    # the function, or Class.method
    minutes: str
    place: str
    whose: str
    words: list                                  # a test with one of them in its name judges this exercise
    wrong: list = field(default_factory=list)


def read_table(text):
    """{key: Exercise}."""
    exercises = {}
    for line in text.strip("\n").split("\n"):
        depth, line = len(line) - len(line.lstrip()), line.strip()
        if depth == 0:
            *cells, words = line.split(" | ")
            exercise = exercises[cells[0]] = Exercise(*cells, words.split())
        elif depth == 4:
            exercise.wrong.append(Wrong(*line.split(" | ")))
        elif line.startswith(">> "):
            exercise.wrong[-1].edits[-1][1].append(line[3:])
        else:
            old, _, new = line.partition(" >> ")
            exercise.wrong[-1].edits.append([old, [new] if new else []])
    return exercises


EXERCISES = read_table(TABLE)


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def write(path, text):
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)


def true_source():
    """The true instructgpt.py: unpacked in a student's folder, else the file beside data/."""
    if os.path.exists(SOLUTION):
        return zlib.decompress(b64decode(read(SOLUTION))).decode()
    return read(os.path.join(ROOT, SCRIPT))


parsed = functools.lru_cache(maxsize=8)(ast.parse)


def node_of(source, name):
    """The ast node of a function or Class.method."""
    node = parsed(source)
    for part in name.split("."):
        found = [n for n in node.body if getattr(n, "name", "") == part]
        if not found:
            raise SystemExit(f"{SCRIPT} has no {name}")
        node = found[0]
    return node


def text_of(source, name):
    """A function's lines, without its decorators."""
    node = node_of(source, name)
    return "\n".join(source.split("\n")[node.lineno - 1:node.end_lineno])


def with_texts(source, texts):
    """The source with other lines in the place of some functions. texts: {name: lines}."""
    lines = source.split("\n")
    for name in sorted(texts, key=lambda name: -node_of(source, name).lineno):    # from below: places stay
        node = node_of(source, name)
        lines[node.lineno - 1:node.end_lineno] = texts[name].split("\n")
    return "\n".join(lines)


def with_body(source, name, body):
    """A function's text with signature and docstring as they are, and one line as its body."""
    node = node_of(source, name)
    head = source.split("\n")[node.lineno - 1:node.body[0].end_lineno]
    return "\n".join(head + [" " * (node.col_offset + 4) + body])


def hole(source, exercise):
    """The text of an emptied function."""
    told = f"exercise {exercise.key}: python data/course.py judge {exercise.key}"
    return with_body(source, exercise.name, f'raise NotImplementedError("{told}")')


def wrong_text(source, exercise, wrong):
    """The text of a wrong version. Each edit must apply: the table stays in step with the file."""
    text = text_of(source, exercise.name)
    for old, new in wrong.edits:
        if old not in text:
            raise SystemExit(f"{exercise.key}, {wrong.title}: no longer in the function: {old}")
        text = text.replace(old, "\n".join(new))
    return text


def filled(source, key):
    """A student's source with the true version in every exercise but this one."""
    truth = true_source()
    others = [exercise.name for exercise in EXERCISES.values() if exercise.key != key]
    return with_texts(source, {name: text_of(truth, name) for name in others})


def module_of(source, folder):
    """A source as a module, from a file in this folder."""
    path, name = os.path.join(folder, SCRIPT), "course_" + os.path.basename(folder)
    write(path, source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def function_of(ig, exercise):
    """The function itself, without what its decorators put around it."""
    found = ig
    for part in exercise.name.split("."):
        found = getattr(found, part)
    return inspect.unwrap(found)


@contextmanager
def swapped(ig, exercise, text):
    """While this lasts, the exercise's function runs this text; whoever holds the function sees it too."""
    scope, function = {}, function_of(ig, exercise)
    exec(compile(textwrap.dedent(text), exercise.key, "exec"), vars(ig), scope)
    true = function.__code__
    function.__code__ = scope[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = true


# ------------------------------------------------------------------------------------------------------------
# Probes: a function's answers to given inputs. Two versions are told apart by their answers alone.
# Five rounds: behind the mask stands 0, then 100, then NaN; in the last two the mask has one token or none.

WORDS, EOS = 11, 10
BEHIND, WITHOUT_NAN = (0.0, 100.0, math.nan, 0.0, 0.0), (0, 1, 3, 4)
BY_ROUND = {"temperature": (1.0, 0.7, 1.5, 1.0, 0.5), "step": (0, 3, 7, 40, 19), "warmup": (0, 5, 5, 5, 10),
            "iteration": (0, 0, 3, 5, 40)}
SLOW = ("rollout", "make_experience", "update", "train_dpo")                   # the first two rounds do
FIXED = {"prompts": [[3], [1, 2, 0, 4, 5], [7, 7], [0, EOS, 9]], "max_new_tokens": 6, "eos": EOS,
         "responses": [[4, 0, EOS], [EOS], [1, 2, 3, 0, 5, EOS], [6, 6]], "device": "cpu", "n": 6,
         "lengths": [7, 3, 9, 1, 4, 8, 2, 6, 5, 1, 3] * 9, "size": 4, "epochs": 2, "length": 5, "beta": 0.3,
         "discount": 0.9, "lam": 0.8, "clip": 0.1, "decay": 0.9, "steps": 20, "lr": 0.5, "lr_factor": 0.5}
TENSORS = {"last": [6, 2, 4, 3], "picked": [2, 0, 3], "desirable": [True, False, True, True], "kl0": 0.4,
           "ranks": [[1, 2, 0, 2], [0, 0, 0, 0], [3, 1, 2, 4], [0, 1, 0, 0]]}
MODELS = ("model", "policy", "average", "reference", "sft_model", "reward_model", "value_net")
IN_FRAME = ("x", "logprobs", "ref_logprobs", "old_logprobs", "advantages", "values", "old_values", "returns",
            "rewards")
PER_ROW = ("scores", "logp", "ref_logp", "logp_w", "logp_l", "ref_logp_w", "ref_logp_l")


class Letters:
    """An encoding: a letter is one of ten ids."""
    eot_token, n_vocab = EOS, WORDS

    def encode_ordinary(self, text):
        return [ord(letter) % 10 for letter in text]


class Given:
    """The inputs of one round, by the names of parameters, each made when it is first asked for."""

    def __init__(self, ig, key, number, folder):
        self.ig, self.torch, self.key, self.number, self.folder = ig, ig.torch, key, number, folder
        self.made = {}

    def __call__(self, name):
        """The input for this parameter; KeyError for one that keeps its default."""
        if name in FIXED:
            return FIXED[name]
        if name in BY_ROUND:
            return BY_ROUND[name][self.number]
        if name in TENSORS:
            return self.torch.tensor(TENSORS[name])
        if name not in self.made:
            if name in MODELS:
                self.made[name] = self.network(MODELS.index(name))
            elif name in IN_FRAME:
                self.made[name] = self.in_frame(name)
            elif name in PER_ROW:
                self.made[name] = self.per_row(name)
            elif hasattr(self, "make_" + name):
                self.made[name] = getattr(self, "make_" + name)()
        return self.made[name]

    def normal(self, name, *shape):
        seed = zlib.crc32(name.encode()) + self.number
        return self.torch.randn(*shape, generator=self.torch.Generator().manual_seed(seed))

    def in_frame(self, name):
        x = self.normal(name, 4, 6)
        if self.key == "kl_k3" and name == "ref_logprobs" and self.number == 3:
            return self("logprobs") + 1e-3 * x             # close together: digits matter
        return x.masked_fill(~self("mask"), BEHIND[self.number])

    def per_row(self, name):
        if self.key != "reward_loss":
            return self.normal(name, 4) * (900 if self.number == 3 else 1)
        scores = self.normal(name, 4, 4) * (100 if self.number == 1 else 1)
        return scores.masked_fill(self("ranks") == 0, math.nan if self.number == 2 else 0.0)

    def network(self, seed):
        """A small model with large weights, so that each of them shows; for clip_and_step with gradients."""
        torch, ig = self.torch, self.ig
        torch.manual_seed(seed)
        model = ig.GPT(ig.GPTConfig(WORDS, 24, 2, 2, 16), "scalar" if seed > 4 else "lm")
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(10 * p if p.ndim == 2 else p + 0.2 * torch.randn_like(p))
        if self.key == "clip_and_step":
            loss = 1e3 * ig.lm_loss(model, self("tokens"))
            loss.backward()
        return model

    def make_mask(self):
        mask = self.torch.zeros(4, 6, dtype=self.torch.bool)
        if self.number < 3:
            mask[0, 2:] = mask[1, 0] = mask[2, 1:4] = True
        mask[2, 3] = self.number != 4
        return mask

    def make_generator(self):
        return self.torch.Generator().manual_seed(self.number)

    def make_tokens(self):
        return self.torch.randint(WORDS, (4, 7), generator=self.torch.Generator().manual_seed(7))

    make_web = make_tokens

    def make_logits(self):
        logits = 3 * self.normal("logits", 6, WORDS)
        return logits.bfloat16() if self.number == 3 else logits

    def make_uniforms(self):
        return self.torch.rand(6, generator=self.torch.Generator().manual_seed(self.number))

    def make_corpus(self):
        starts = self.torch.tensor([0, 7, 30, 41])
        return self.torch.arange(60).numpy().astype("uint16"), starts.numpy()

    def make_demos(self):
        return list(zip(self("prompts"), self("responses")))

    def make_enc(self):
        return Letters()

    def make_cfg(self):
        return self.ig.Config(out=self.folder, max_new_tokens=6, temperature=0.7, beta=0.3, ptx_coef=0.6,
                              policy_lr=0.3, value_lr=0.5, cliprange=0.1, rm_batch=2, lam=0.8)

    def make_sampler(self):
        return self.ig.Sampler(self("policy"), 4, 24, 6, EOS, 0.7)

    def make_e(self):
        names = ("cfg", "sampler", "value_net", "reference", "reward_model", "prompts", "generator")
        return self.ig.make_experience(*[self(name) for name in names])

    def make_optimizer(self, model="model"):
        """Plain gradient descent: Adam would hide the size of a gradient."""
        return self.torch.optim.SGD(self(model).parameters(), 9.0)

    def make_adams(self):
        return self.make_optimizer("policy"), self.make_optimizer("value_net")

    def make_comparisons(self):
        questions = (("ab", ["c", "dd", "e", "ffg"], [2, 1, 2, 3]), ("xyz", ["k", "lm"], [1, 2]))
        return [{"prompt": prompt, "responses": texts, "ranks": ranks, "ended": [True] * len(texts)}
                for prompt, texts, ranks in questions * 2]


def flat(torch, x):
    """Everything in a result, as a list of tensors."""
    if isinstance(x, torch.nn.Module):
        x = list(x.parameters()) + [p.grad for p in x.parameters()]
    elif isinstance(x, torch.optim.Optimizer):
        x = [x.param_groups[0].get(name) for name in ("lr", "betas", "eps", "weight_decay")]
    elif is_dataclass(x):
        x = [value for name, value in vars(x).items() if name not in ("tokens_per_second", "out")]
    elif isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, (list, tuple)):
        return [part for item in x for part in flat(torch, item)]
    if isinstance(x, (torch.Tensor, int, float)):
        return [torch.as_tensor(x).detach().double()]
    return []


def host_waits(torch):
    """A context that counts how often Python waits for a number of the device."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
            self.count += any(word in str(func) for word in ("_local_scalar_dense", "nonzero"))
            return func(*args, **(kwargs or {}))
    return Waits()


def one_answer(ig, exercise, given):
    """Of one round: the result, what became of the inputs, and gradients."""
    torch, inputs, leaves = ig.torch, {}, []
    function = getattr(ig, "rollout" if exercise.key == "rollout" else exercise.name)
    for name in inspect.signature(function).parameters:
        try:
            value = given(name)
        except KeyError:
            continue
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            leaves.append(value.detach().requires_grad_())
            value = leaves[-1] * 1                         # no leaf: it may be changed in place
        inputs[name] = value
    waits = host_waits(torch) if exercise.key == "rollout" else nullcontext()
    with waits, redirect_stdout(io.StringIO()):
        result = function(**inputs)
    numbers = flat(torch, [result, list(inputs.values()), getattr(waits, "count", 0)])
    outputs = list(result) if isinstance(result, tuple) else [result]
    outputs = [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
    if leaves and outputs:
        total = sum((x * torch.linspace(1, 2, x.numel()).view(x.shape)).sum() for x in outputs)
        numbers += flat(torch, torch.autograd.grad(total, leaves, allow_unused=True))
    return numbers


def answers(ig, exercise):
    """A list of numbers per round; in place of one that failed, the name of the error."""
    found = []
    for number in range(2 if exercise.key in SLOW else 5):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found.append(one_answer(ig, exercise, Given(ig, exercise.key, number, folder)))
            except Exception as error:
                found.append(type(error).__name__)
    return found


def alike(mine, theirs):
    """Two rounds are equal, up to rounding: each number to 1e-4 of the largest beside it."""
    if isinstance(mine, str) or isinstance(theirs, str) or len(mine) != len(theirs):
        return mine == theirs
    for a, b in zip(mine, theirs):
        largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0
        if a.shape != b.shape or not a.allclose(b, rtol=0, atol=1e-4 * largest + 1e-10, equal_nan=True):
            return False
    return True


def same(mine, theirs, rounds):
    """Two lists of answers are equal in these rounds, and not errors alone."""
    works = any(not isinstance(x, str) for x in mine)
    return works and all(alike(mine[n], theirs[n]) for n in rounds if n < len(mine))


def references(ig, exercise, source):
    """[(None, the true answers), (a wrong version, its answers), ...] of a true module."""
    found = [(None, answers(ig, exercise))]
    for wrong in exercise.wrong:
        with swapped(ig, exercise, wrong_text(source, exercise, wrong)):
            found.append((wrong, answers(ig, exercise)))
    return found


def named(mine, known, rounds=range(5)):
    """All of the references that these answers equal: None is the true version."""
    return [version for version, theirs in known if same(mine, theirs, rounds)]


def opinions(mine, known):
    """What the probes say of these answers, as lines; none for those of the true version."""
    versions, lines = named(mine, known), []
    if not versions and named(mine, known, WITHOUT_NAN):
        versions = named(mine, known, WITHOUT_NAN)
        lines.append("a NaN behind the mask comes through: set inputs to 0 there before the arithmetic")
    for version in versions:
        if version is not None:
            lines.append(f"yours equals the version that {version.title}\n       (seen in: {version.source})")
    return lines


# ------------------------------------------------------------------------------------------------------------
# The judge


def run_tests(source, exercise):
    """The exercise's tests on this source, in a folder of their own: (they pass, the output's end)."""
    with tempfile.TemporaryDirectory() as folder:
        write(os.path.join(folder, SCRIPT), source)
        shutil.copy(os.path.join(ROOT, TESTS), folder)
        copy_data(folder)
        words = f"({' or '.join(exercise.words)}) and not course"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider",
                   "-k", words, TESTS]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode == 0, "\n".join(done.stdout.strip().split("\n")[-25:])


def judge(exercise):
    """Prints the verdict on one function of the file beside data/. True for green."""
    mine = read(os.path.join(ROOT, SCRIPT))
    try:
        source = filled(mine, exercise.key)
    except SyntaxError as error:
        print(f"red    {SCRIPT}, line {error.lineno}: {error.msg}")
        return False
    if f"exercise {exercise.key}:" in text_of(mine, exercise.name):
        print(f"red    {exercise.key} is still empty")
        return False
    passed, told = run_tests(source, exercise)
    truth = true_source()
    with tempfile.TemporaryDirectory() as true, tempfile.TemporaryDirectory() as other:
        known = references(module_of(truth, true), exercise, truth)
        mine = answers(module_of(source, other), exercise)
    lines = opinions(mine, known)
    if not passed:
        print(told)
    green = passed and not lines
    if green and not named(mine, known):
        lines = ["Its numbers differ from the file's own. The tests allow that."]
    print(f"{'green' if green else 'red':6} {exercise.key}: its tests {'pass' if passed else 'fail'}")
    for line in lines:
        print(f"       {line}")
    return green


def zeros(torch, x):
    """A result as zeros."""
    if isinstance(x, torch.nn.Module):
        for p in x.parameters():
            p.data.zero_()
        return x
    if isinstance(x, torch.optim.Optimizer):
        x.param_groups[0].update(lr=0.0, betas=(0.0, 0.0))
        return x
    if is_dataclass(x):
        return type(x)(**{name: zeros(torch, value) for name, value in vars(x).items()})
    if isinstance(x, dict):
        return {name: zeros(torch, value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)([zeros(torch, item) for item in x])
    return torch.zeros_like(x) if isinstance(x, torch.Tensor) else type(x)(0)


def bad_versions(ig, exercise, source):
    """[(what it is, its text)]: emptied, an answer of None, one of zeros, and the wrong versions."""
    node, function = node_of(source, exercise.name), function_of(ig, exercise)
    found = [("empty", hole(source, exercise)), ("None", with_body(source, exercise.name, "return None"))]
    if any(isinstance(n, ast.Return) and n.value for n in ast.walk(node)):
        ig.course_zeros = functools.partial(zeros, ig.torch)
        ig.course_true = types.FunctionType(function.__code__, vars(ig), argdefs=function.__defaults__)
        names = ", ".join(argument.arg for argument in node.args.args)
        body = f"return course_zeros(course_true({names}))"
        found.append(("zeros", with_body(source, exercise.name, body)))
    return found + [(wrong.title, wrong_text(source, exercise, wrong)) for wrong in exercise.wrong]


class Check:
    """A pytest plugin. In place of the tests' one run, each bad version of each exercise has a run that must
    fail; and the probes must call each wrong version by its own name and by no other."""

    def __init__(self, exercises):
        self.exercises, self.complaints, self.count = exercises, [], 0

    def pytest_runtestloop(self, session):
        for exercise in self.exercises:
            items = [item for item in session.items
                     if any(word in item.name for word in exercise.words) and "course" not in item.name]
            spare = next(item for item in session.items if item not in items)
            self.try_all(exercise, sys.modules["instructgpt"], items, spare)
        return True

    def try_all(self, exercise, ig, items, spare):
        source = true_source()
        known = references(ig, exercise, source)
        for version, theirs in known:
            if named(theirs, known) != [version]:
                title = version.title if version else "the true version"
                self.complain(exercise, f"the probes mistake it: {title}")
        for title, text in bad_versions(ig, exercise, source):
            self.count += 1
            with swapped(ig, exercise, text):
                if title in ("None", "zeros") and None in named(answers(ig, exercise), known):
                    self.complain(exercise, f"the probes take {title} for the true version")
                if not fails(items, spare):
                    self.complain(exercise, f"the tests are green: {title}")

    def complain(self, exercise, text):
        self.complaints.append(f"{exercise.key}: {text}")


def fails(items, spare):
    """Some test fails. The spare item, which does not run, keeps the session's fixtures alive."""
    from _pytest.runner import runtestprotocol
    for item in items:
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=spare)):
            return True
    return False


def check(keys):
    """Every bad version is red and named. Prints what is not; True if all is well."""
    import pytest
    plugin = Check([EXERCISES[key] for key in keys])
    os.chdir(ROOT)
    sys.path.insert(0, ROOT)
    with redirect_stdout(io.StringIO()):
        pytest.main(["-q", "--tb=native", "-p", "no:cacheprovider", TESTS], plugins=[plugin])
    print("\n".join(plugin.complaints + [f"{len(keys)} exercises, {plugin.count} bad versions, "
                                         f"{len(plugin.complaints)} complaints"]))
    return plugin.count > 0 and not plugin.complaints


# ------------------------------------------------------------------------------------------------------------
# The student's folder

GUIDE = """# Exercises

Of instructgpt.py {empty}. Signature and docstring say what each has to do. The rest
of the file runs up to the first of them, and then says which exercise stands there.

    python data/course.py judge {first}
        judges one function; all the others are true while it does
    python instructgpt.py --smoke ppo
        runs as far as it can

Go from top to bottom. Read first the place of the paper (arXiv 2203.02155), then the comment above the
section, then the docstring. The action frame, in the docstring of `stack`, is the one picture to learn by
heart. A slot where the mask is False must not matter, even if it holds NaN: `zero_outside` is there for
that. The tests are in test_instructgpt.py.

If your function equals a version that somebody published by mistake, the judge names it. For the judge the
true file lies packed in data/course_solution.bin. Unpacked it is the solution.

{table}
"""

HUNT = """# One mistake

One function of instructgpt.py is wrong, as somebody once published it. Docstrings and comments are true.
Do not read the code first. Run

    python instructgpt.py --smoke ppo

and look at what it prints: losses, the first ledger, the lines of the iterations. This is a healthy run,
shortened. Its numbers differ a little between machines:

{healthy}

Which number is the first that cannot be right? Which function makes it? Now read that one. The answer:

    python data/course.py student --reveal {number}
"""


def overview(keys):
    """The exercises as a Markdown table, in the order to do them: the README's too."""
    rows = ["| paper | function | KEY | minutes | whose idea |", "|---|---|---|---:|---|"]
    for x in [EXERCISES[key] for key in EXERCISES if key in keys]:
        rows.append(f"| {x.place} | `{x.name}` | `{x.key}` | {x.minutes} | {x.whose} |")
    return "\n".join(rows)


def copy_data(folder):
    shutil.copytree(HERE, os.path.join(folder, "data"), ignore=shutil.ignore_patterns("__pycache__"))


def write_folder(folder, source, name, guide):
    """What every student's folder has: the script, data/ and a text that says what to do."""
    if os.path.exists(folder):
        raise SystemExit(f"{folder} is there already: --out names another folder")
    os.makedirs(folder)
    write(os.path.join(folder, SCRIPT), source)
    write(os.path.join(folder, name), guide)
    copy_data(folder)
    print(f"{folder} is written; read {os.path.join(folder, name)}")


def student(keys, folder):
    """Writes the folder with these exercises empty."""
    truth = true_source()
    source = with_texts(truth, {EXERCISES[key].name: hole(truth, EXERCISES[key]) for key in keys})
    count = "one function is empty" if len(keys) == 1 else f"{len(keys)} functions are empty"
    guide = GUIDE.format(empty=count, first=keys[0], table=overview(keys))
    write_folder(folder, source, "EXERCISES.md", guide)
    shutil.copy(os.path.join(ROOT, TESTS), folder)
    packed = b64encode(zlib.compress(truth.encode(), 9)).decode()
    write(os.path.join(folder, "data", os.path.basename(SOLUTION)), packed)


def mistake(number):
    """The exercise, the wrong version and what gave it away."""
    key, title, sign = BREAKS[number - 1]
    exercise = EXERCISES[key]
    return exercise, next(wrong for wrong in exercise.wrong if wrong.title.startswith(title)), sign


def student_with_mistake(number, folder):
    """Writes the folder with one wrong function, without tests, which would name it."""
    source = true_source()
    exercise, wrong, _ = mistake(number)
    source = with_texts(source, {exercise.name: wrong_text(source, exercise, wrong)})
    write_folder(folder, source, "MISTAKE.md", HUNT.format(healthy=HEALTHY, number=number))


def reveal(number):
    exercise, wrong, sign = mistake(number)
    print(f"{exercise.name}: the version that {wrong.title}\n(seen in: {wrong.source})\n")
    for old, new in wrong.edits:
        print("  true  " + old + "\n  here  " + "\n        ".join(new))
    print("\n" + textwrap.fill(sign, 100))


# ------------------------------------------------------------------------------------------------------------
# KL on one screen


SCREEN = """The gradient of KL(pi || pi_ref) from samples of pi, beside the exact one: all responses of three
words, enumerated; medians of nine random pairs of policies. Bias and variance are relative to the exact
gradient.
""", """In the reward, k1 is exact whatever the length, so Eq. 2 charges it there; as a loss its gradient is
noise around 0. As a loss, k2 is exact for one token but does not see what a token does to later ones, and k3
follows another KL, that of pi_ref from pi, which differs more the farther pi has gone."""


def enumerated(torch, logits, length):
    """All responses of 1 or 2 tokens out of three words: the log-probs of their tokens, (N,length). logits
    (4,3): of the first token, and of the second after each first one."""
    logprobs = logits.log_softmax(-1)                                           # (4,3)
    if length == 1:
        return logprobs[0][:, None]
    return torch.stack([logprobs[0].repeat_interleave(3), logprobs[1:].flatten()], 1)


def kl_rows(ig, length, gap, seed):
    """[(estimate, cosine to the exact gradient, its bias, the variance of one sample)], the last two relative
    to the exact gradient."""
    torch, rows = ig.torch, []
    noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    logits = (gap * noise[0]).requires_grad_()
    pi, ref = enumerated(torch, logits, length), enumerated(torch, gap * noise[1], length)      # (N,length)
    weight, k1 = pi.sum(1).exp(), ig.kl_k1(pi, ref)
    exact = torch.autograd.grad((weight * k1.sum(1)).sum(), logits, retain_graph=True)[0].flatten()
    to_come = k1.detach().flip(1).cumsum(1).flip(1)        # what each token is charged for, as by the rewards
    losses = {"k1 in the reward": to_come * pi, "k1 as a loss": k1, "k2 as a loss": 0.5 * k1 ** 2,
              "k3 as a loss": ig.kl_k3(pi, ref)}
    for name, loss in losses.items():
        slopes = [torch.autograd.grad(x, logits, retain_graph=True)[0].flatten() for x in loss.sum(1)]
        slopes = torch.stack(slopes)                                            # (N,12) of single samples
        mean, size = weight.detach() @ slopes, exact.norm()
        cosine = mean @ exact / (mean.norm() * size).clamp(min=1e-9)
        variance = weight.detach() @ (slopes - mean).square().sum(1) / size ** 2
        rows.append((name, float(cosine), float((mean - exact).norm() / size), float(variance)))
    return rows


def show_kl(ig):
    print(f"{SCREEN[0]}")
    for length, gap, told in ((1, 0.3, "1 token,  pi near pi_ref"), (1, 2.0, "1 token,  pi far from it"),
                              (2, 0.3, "2 tokens, pi near pi_ref"), (2, 2.0, "2 tokens, pi far from it")):
        print(f"{told:26}  cosine    bias  variance of a sample")
        for pairs in zip(*[kl_rows(ig, length, gap, seed) for seed in range(9)]):
            cosine, bias, variance = [round(median(x), 6) + 0.0 for x in list(zip(*pairs))[1:]]
            print(f"    {pairs[0][0]:20}{cosine:10.3f}{bias:8.3f}{variance:10.1f}")
    print(f"\n{SCREEN[1]}")


def parse(argv):
    parser = argparse.ArgumentParser(prog="course.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, numbers = parser.add_subparsers(dest="command", required=True), range(1, len(BREAKS) + 1)
    writer = commands.add_parser("student", help="write a student's folder; without KEY list the exercises")
    writer.add_argument("keys", nargs="*", metavar="KEY")
    writer.add_argument("--out", default="student", metavar="DIR")
    writer.add_argument("--break", dest="broken", type=int, choices=numbers)
    writer.add_argument("--reveal", type=int, choices=numbers)
    commands.add_parser("judge", help="judge one function").add_argument("keys", nargs=1, metavar="KEY")
    commands.add_parser("check", help="judge the judge").add_argument("keys", nargs="*", metavar="KEY")
    commands.add_parser("kl", help="estimates of the KL").set_defaults(keys=[])
    a = parser.parse_args(argv)
    if a.command == "student" and a.keys == ["all"]:
        a.keys = list(EXERCISES)
    for key in a.keys:
        if key not in EXERCISES:
            parser.error(f"{key} is no exercise; these are: {' '.join(EXERCISES)}")
    return a


def main(argv=None):
    a = parse(argv)
    if a.command == "judge":
        return 0 if judge(EXERCISES[a.keys[0]]) else 1
    if a.command == "check":
        return 0 if check(a.keys or list(EXERCISES)) else 1
    if a.command == "kl":
        with tempfile.TemporaryDirectory() as folder:
            show_kl(module_of(true_source(), folder))
    elif a.reveal:
        reveal(a.reveal)
    elif a.broken:
        student_with_mistake(a.broken, a.out)
    elif a.keys:
        student(a.keys, a.out)
    else:
        print(overview(EXERCISES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
