"""
InstructGPT in one file: Ouyang et al. 2022, *Training language models to follow instructions with human feedback*
(arXiv 2203.02155), from pretraining to the table of results, on a toy world that shows the paper's findings.

    python instructgpt.py                                   everything: pretrain, sft, rm, ppo, evaluate; writes out/
    python instructgpt.py --smoke                           the same in miniature, about 20 seconds
    python instructgpt.py sft                               one stage (and what it needs, unless it is there already)
    python instructgpt.py --from out --out out_b --beta 0.1   another beta: reuses pretrain, sft and rm of out/
    python instructgpt.py ppo --ptx_coef 0                  plain PPO alone
    python instructgpt.py --device cuda --out out_gpu       on a GPU (chosen by itself where there is one)

Read it beside the paper, top to bottom; nothing refers to what comes later:

    Settings                  every hyperparameter: the toy's value, the paper's, which stage reads it        App. C
    Tokens and data           tiktoken encoding, text and JSON lines, rows of prompt + response               3.2
    GPT                       the decoder, with a language head or a scalar head                              3.5
    Rollout                   the batched sampler that keeps the log-probs                                    C.4
    Formulas                  every equation as a pure function: Eq. 1, KL rewards, GAE, PPO's losses         3.5
    Step 0  pretraining       GPT-3's place
    Step 1  SFT               demonstrations                                                                  C.1, C.3
    Step 2  reward model      K-wise comparisons                                                              C.2
    Step 3  PPO, PPO-ptx      Eq. 2                                                                           C.4
    Evaluation                preference, truth, manners, bias, the alignment tax                             4
    Command line              stages, checkpoints, flags

What differs from the paper, and why
  * People, customers and the web are simulated (data/toyworld.py), so the true quality ("gold") of every answer is known.
  * The models have 0.5 M parameters and responses of at most 16 tokens. So the learning rates, beta and the pretraining
    coefficient are the toy's own; each setting names the paper's value beside it.
  * One SFT model is baseline, start of RL and KL reference. The paper's RL starts from a second one (2 epochs, 10 %
    pretraining mix; C.3, C.4), and Fig. 37 finds that it hardly matters; ours is trained in that second way.
  * The reward model starts from the SFT model (section 3.5); the paper's final one from GPT-3 tuned on public tasks (C.2).
  * The SFT checkpoint is the last one; the paper picks it by reward-model score (C.1).
  * In the pretraining mix a minibatch carries as many pretraining rows as episodes; the paper has eight times as many.
What the paper does not say, and what we do: GAE lambda 0.95, value clip 0.2 and whitened advantages (as in the code of
Ziegler et al. 2019 and in Stiennon et al. 2020), all token losses are means over response tokens, the prompt is masked in the
SFT loss, the reward is read at the end-of-text token, an answer that does not end scores -1, gradients are clipped at norm 1,
no dropout in RL, the EMA is updated at each optimizer step and the raw weights do the sampling.
Left out: the FLAN and T0 baselines, the sweeps of appendix E, a second round of comparisons on the PPO policy.
"""
import argparse                                  # the command line
import importlib.util                            # loads data/toyworld.py by its path
import json
import math
import os
import random                                    # the labelers' noise
import shutil                                    # copies finished stages (--from)
import sys
import time
from base64 import b64decode                     # tiktoken's rank files
from copy import deepcopy                        # reference, value net and EMA start as copies
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np                               # the corpus as one array
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------------------------
# Settings (App. C). One line each: the toy's value, what it is, the paper's value. `stage` is the first stage that reads it:
# changing it makes that stage and the later ones stale, never the earlier ones.

STAGES = ["pretrain", "sft", "rm", "ppo", "evaluate"]


class UserError(Exception):
    """A mistake of the user's: printed as one line, exit code 2."""


def setting(default, text, paper=None, stage="run"):
    return field(default=default, metadata={"help": text + (f" [paper: {paper}]" if paper else ""), "stage": stage})


@dataclass
class Config:
    # where and how
    out: str = setting("out", "folder that the run writes to")
    data: str = setting(os.path.join(os.path.dirname(os.path.abspath(__file__)), "data"), "folder with the data sets")
    device: str = setting("", "cpu, cuda or mps; empty: the best there is")
    seed: int = setting(0, "every random draw follows from it", stage="pretrain")
    # the model: GPT-3's form in miniature
    n_layer: int = setting(2, "layers", "24 (1.3B) to 96 (175B)", "pretrain")
    n_head: int = setting(4, "attention heads", "24 to 96", "pretrain")
    n_embd: int = setting(128, "width", "2,048 to 12,288", "pretrain")
    block_size: int = setting(64, "context, tokens", "2,048", "pretrain")
    # step 0: pretraining
    pretrain_steps: int = setting(2500, "optimizer steps", "300B tokens", "pretrain")
    pretrain_batch: int = setting(32, "rows of block_size tokens a step", None, "pretrain")
    pretrain_lr: float = setting(2e-3, "peak learning rate, cosine to a tenth", "2e-4 to 0.6e-4", "pretrain")
    # step 1: supervised fine-tuning
    sft_epochs: int = setting(3, "passes over the demonstrations", "16 (baseline), 2 (start of RL)", "sft")
    sft_batch: int = setting(32, "demonstrations a step", "32", "sft")
    sft_lr: float = setting(1e-3, "peak learning rate, cosine to a tenth, no warm-up", "9.65e-6 (baseline), 5e-6", "sft")
    sft_dropout: float = setting(0.0, "residual dropout", "0.2 (baseline)", "sft")
    sft_mix: float = setting(0.1, "share of pretraining rows mixed in", "0.1", "sft")
    max_new_tokens: int = setting(16, "longest response, end-of-text included", "1,024", "sft")
    # step 2: comparisons and the reward model
    rm_prompts: int = setting(7000, "prompts to collect comparisons for", "33,207", "rm")
    k_min: int = setting(4, "fewest responses to a prompt", "4", "rm")
    k_max: int = setting(9, "most responses to a prompt", "9", "rm")
    rm_epochs: int = setting(1, "passes over the comparisons", "1", "rm")
    rm_batch: int = setting(8, "prompts a step, each with all its pairs", "64", "rm")
    rm_lr: float = setting(8e-4, "peak learning rate, cosine to a tenth", "9e-6", "rm")
    # step 3: reinforcement learning
    iterations: int = setting(100, "PPO iterations", "500", "ppo")
    episodes: int = setting(256, "episodes an iteration", "512", "ppo")
    minibatches: int = setting(8, "minibatches an iteration, one optimizer step each, one inner epoch", "8", "ppo")
    policy_lr: float = setting(3e-4, "policy's peak learning rate", "not stated; sweep 2.55e-6 to 2.55e-5", "ppo")
    value_lr: float = setting(1e-3, "value net's learning rate", "9e-6", "ppo")
    warmup: int = setting(10, "iterations of warm-up, from a tenth of the peak; constant after it", "10", "ppo")
    beta: float = setting(0.3, "KL coefficient, per nat; responses are ten tokens here, hundreds there", "0.02", "ppo")
    ptx_coef: float = setting(1.0, "weight of the pretraining loss (token mean) in PPO-ptx; given on the command line it trains "
                                   "that one run alone", "27.8", "ppo")
    ptx_rows: int = setting(1, "pretraining rows an episode", "8", "ppo")
    cliprange: float = setting(0.2, "PPO's clip of the ratio", "0.2", "ppo")
    value_clip: float = setting(0.2, "clip of the value's move", "not stated; 0.2 in its ancestors", "ppo")
    lam: float = setting(0.95, "GAE's lambda", "not stated; 0.95 in its ancestors", "ppo")
    temperature: float = setting(1.0, "of the rollouts", "1", "ppo")
    ema: float = setting(0.992, "decay of the averaged weights, an optimizer step", "0.992", "ppo")
    unfinished_score: float = setting(-1.0, "score of a response that does not end; demonstrations are at 0", "not stated", "ppo")
    # evaluation
    test_prompts: int = setting(600, "prompts that the models answer", "3,196", "evaluate")
    judges: int = setting(5, "labelers a pair of answers", "1", "evaluate")


SMOKE = dict(n_embd=32, pretrain_steps=60, pretrain_batch=16, sft_epochs=1, rm_prompts=240, iterations=3, episodes=64,
             test_prompts=60)

# ----------------------------------------------------------------------------------------------------------------------
# Tokens and data (3.2). A request ends with "\n>" and its reply starts with a space, as on many pages of the toy's web;
# the reply ends with end-of-text. Whatever a user types is encoded as plain text, so it can never hold a real end-of-text.

MARK = "\n>"
EOT = "<|endoftext|>"


def toyworld(data):
    """The module data/toyworld.py: the people, the web and the checker."""
    if "toyworld" not in sys.modules:
        spec = importlib.util.spec_from_file_location("toyworld", os.path.join(data, "toyworld.py"))
        sys.modules["toyworld"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["toyworld"])
    return sys.modules["toyworld"]


def load_encoding(path):
    """tiktoken encoding from a rank file (lines of base64 token, rank). We parse it ourselves because tiktoken's loader
    caches local files by path and would miss a change. Pieces: a newline, a word with its space, a number, punctuation."""
    with open_data(path) as f:
        ranks = {b64decode(token): int(rank) for token, rank in (line.split() for line in f if line.strip())}
    return tiktoken.Encoding("toyworld", pat_str=r"\n| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+", mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


def open_data(path):
    """The file as UTF-8 text; UserError if it cannot be opened."""
    try:
        return open(path, encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); make the toy world with: python data/toyworld.py") from e


def read_jsonl(path, *needed):
    """List of the objects in a file of JSON lines; UserError with the line's number if one is broken or lacks a field."""
    rows = []
    with open_data(path) as f:
        for n, line in enumerate(f, 1):
            try:
                row = json.loads(line)
            except ValueError as e:
                raise UserError(f"{path}:{n}: not JSON ({e}); every line must be one JSON object") from e
            missing = [k for k in needed if not isinstance(row, dict) or k not in row]
            if missing:
                raise UserError(f"{path}:{n}: no field {missing[0]!r}; needed are {', '.join(needed)}")
            rows.append(row)
    if not rows:
        raise UserError(f"{path}: is empty; it needs one JSON object a line")
    return rows


def encode_prompt(enc, text):
    return enc.encode_ordinary(text + MARK)


def encode_response(enc, text):
    return (enc.encode_ordinary(" " + text) if text else []) + [enc.eot_token]


def load_corpus(path, enc, length):
    """Pretraining text, documents between blank lines -> (tokens uint16 array, starts of the documents that have `length`
    tokens from their start on). Rows begin where a document begins, as prompts do."""
    with open_data(path) as f:
        docs = [enc.encode_ordinary(d.strip("\n")) + [enc.eot_token] for d in f.read().split("\n\n") if d.strip()]
    starts = np.cumsum([0] + [len(d) for d in docs])[:-1]
    tokens = np.concatenate([np.array(d, np.uint16 if enc.n_vocab <= 65536 else np.int32) for d in docs]) if docs else []
    starts = starts[starts + length <= len(tokens)]
    if len(starts) == 0:
        raise UserError(f"{path}: holds fewer than {length} tokens; give more text or a smaller --block_size")
    return tokens, starts


def corpus_batch(corpus, n, length, generator, device):
    """n random rows of `length` tokens -> (n, length) int64."""
    tokens, starts = corpus
    chosen = starts[torch.randint(len(starts), (n,), generator=generator).numpy()]               # (n,)
    return torch.from_numpy(tokens[chosen[:, None] + np.arange(length)].astype(np.int64)).to(device)


def stack(prompts, responses, device):
    """Rows of prompt + response in the action frame, filled up on the right with id 0 (which nothing ever reads).

    prompts, responses: lists of B lists of ids -> tokens (B,T), mask (B,T-1) bool, last (B,) index of the last token.

        tokens      p0   p1   p2   r0   r1  EOS    0        column t of log-probs, values, rewards and mask speaks of the
        column       0    1    2    3    4    5             prediction of token t+1, made in the state "tokens 0..t";
        predicts    p1   p2   r0   r1  EOS    0             the mask is True where token t+1 belongs to the response
        mask         .    .    x    x    x    .             (EOS does)
    """
    p = torch.tensor([len(x) for x in prompts])                                                   # (B,)
    n = p + torch.tensor([len(x) for x in responses])                                             # (B,)
    tokens = torch.zeros(len(prompts), int(n.max()), dtype=torch.long)                            # (B,T)
    for row, x, y in zip(tokens, prompts, responses):
        row[:len(x) + len(y)] = torch.tensor(x + y)
    column = torch.arange(tokens.size(1) - 1)                                                     # (T-1,)
    mask = (column >= p[:, None] - 1) & (column < n[:, None] - 1)                                 # (B,T-1)
    return tokens.to(device), mask.to(device), (n - 1).to(device)


def batches(lengths, size, generator):
    """Random batches of indices, each of rows of about one length, so that little is spent on filler: shuffle, sort
    stretches of eight batches by length, cut, shuffle the batches."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    order = [i for s in range(0, len(order), 8 * size) for i in sorted(order[s:s + 8 * size], key=lambda i: lengths[i])]
    cut = [order[s:s + size] for s in range(0, len(order), size)]
    return [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# GPT (3.5): GPT-2's decoder, which is GPT-3's too but for its sparse attention. Parameter names are those of GPT-2's release.


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    gelu: str = "none"                           # F.gelu(approximate=): "none" is the exact erf (and fast), GPT-2 has "tanh"


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(c.n_embd, 3 * c.n_embd), nn.Linear(c.n_embd, c.n_embd)
        self.n_head = c.n_head

    def forward(self, x, cache=None, position=None, visible=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)    # 3 x (B,H,T,C/H)
        if cache is not None and visible is None:                      # prefill: keep the prompt's keys and values
            cache[0][:, :, :T], cache[1][:, :, :T] = k, v
        elif cache is not None:                                        # decode: each row writes at its own position
            rows = torch.arange(B, device=x.device)                                                     # (B,)
            cache[0][rows, :, position[:, 0]], cache[1][rows, :, position[:, 0]] = k[:, :, 0], v[:, :, 0]
            k, v = (c[:, :, :visible.size(-1)] for c in cache)                                          # (B,H,width,C/H)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)       # (B,H,T,C/H)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))                                          # (B,T,C)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)                # eps 1e-5
        self.attn = Attention(c)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(c.n_embd, 4 * c.n_embd), "c_proj": nn.Linear(4 * c.n_embd, c.n_embd)})
        self.c = c

    def forward(self, x, *cached):
        drop = lambda y: F.dropout(y, self.c.dropout, self.training)
        x = x + drop(self.attn(self.ln_1(x), *cached))
        return x + drop(self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate=self.c.gelu)))


class GPT(nn.Module):
    """Decoder with learned positions. head="lm": logits over the vocabulary, tied to the embedding. head="scalar": one number
    per position (reward model, value net): the unembedding is replaced by a projection to a scalar (3.5)."""

    def __init__(self, config, head="lm"):
        super().__init__()
        c = self.config = config
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd)
        for name, p in self.named_parameters():                        # GPT-2's initialisation (positions as well with 0.02)
            if p.ndim == 2:                                            # smaller where a layer adds to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.head = None
        if head == "scalar":
            self.head = nn.Linear(c.n_embd, 1)
            nn.init.normal_(self.head.weight, std=1 / math.sqrt(c.n_embd + 1))     # Stiennon et al. 2020
            nn.init.zeros_(self.head.bias)

    def hidden(self, tokens, cache=None, position=None, width=None):
        """(B,T) -> (B,T,C). With a cache and no position: prefill, tokens stand at 0..T-1. With position (B,1): one token a
        row; it sees the cache's columns 0..position out of the first `width`."""
        if position is None:
            if tokens.size(1) > self.config.block_size:
                raise ValueError(f"{tokens.size(1)} tokens do not fit the block of {self.config.block_size}")
            where, visible = torch.arange(tokens.size(1), device=tokens.device), None                   # (T,)
        else:
            where = position
            visible = (torch.arange(width, device=tokens.device) <= position)[:, None, None]            # (B,1,1,width)
        x = self.wte(tokens) + self.wpe(where)                                                          # (B,T,C)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], position, visible)
        return self.ln_f(x)

    def forward(self, tokens):
        """tokens (B,T) -> logits (B,T,vocab), or (B,T) with the scalar head."""
        return self.project(self.hidden(tokens))

    def project(self, x):
        return F.linear(x, self.wte.weight) if self.head is None else self.head(x).squeeze(-1)

    def new_cache(self, B, T):
        """Keys and values of each layer: a list of 2 tensors (B,H,T,C/H), written in place."""
        c, w = self.config, self.wte.weight
        return [torch.zeros(2, B, c.n_head, T, c.n_embd // c.n_head, dtype=w.dtype, device=w.device) for _ in self.h]


def scalar_copy(model):
    """The model's trunk under a fresh scalar head."""
    other = GPT(replace(model.config, dropout=0.0), head="scalar").to(model.wte.weight.device)
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def freeze(model):
    """For reference and reward model: no gradients, no dropout."""
    return model.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# Rollout (C.4). The whole batch decodes together, one token a step, prompts of any length: every row keeps its own position in
# a cache of fixed size, so no shape changes between steps and nothing waits for the host. Random numbers are drawn before the
# loop, and a token is picked by walking its row's cumulative distribution: on a CPU ten times cheaper than torch.multinomial,
# and the same numbers give every model the same luck (paired comparisons).


@dataclass
class Rollout:
    tokens: torch.Tensor                         # (B,T) prompt, response, 0s
    mask: torch.Tensor                           # (B,T-1) bool, action frame: token t+1 is a response token
    logprobs: torch.Tensor                       # (B,T-1) nats, of the distribution sampled from; 0 outside the mask
    prompt_lens: torch.Tensor                    # (B,)
    ended: torch.Tensor                          # (B,) bool: EOS was sampled

    def responses(self):
        """The response ids of each row (EOS included), as lists."""
        return [t[1:][m].tolist() for t, m in zip(self.tokens.cpu(), self.mask.cpu())]


def pick(logits, u, temperature):
    """logits (B,V), uniforms u (B,) -> token (B,), its log-prob (B,). Temperature 0 takes the likeliest token."""
    if temperature == 0:
        token = logits.argmax(-1)                                                                 # (B,)
        return token, torch.zeros_like(u)                              # a certain choice
    logprobs = F.log_softmax(logits.float() / temperature, dim=-1)                                # (B,V)
    cdf = logprobs.exp().cumsum(-1)                                                               # (B,V)
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)                        # (B,1) first cdf > u
    token = token.clamp(max=logits.size(-1) - 1)
    return token[:, 0], logprobs.gather(1, token)[:, 0]


def decode_step(policy, s, width, eos, temperature):
    """One token for every row. The state s holds tensors of fixed shape that are written in place."""
    at = s["at"]                                                                                  # (B,1) current token's place
    logits = policy.project(policy.hidden(s["tokens"].gather(1, at), s["cache"], at, width))[:, 0]   # (B,V)
    token, logprob = pick(logits, s["uniforms"].index_select(0, s["step"])[0], temperature)       # (B,), (B,)
    alive = s["alive"]                                                                            # (B,) no EOS yet
    s["tokens"].scatter_(1, at + 1, torch.where(alive, token, 0)[:, None])
    s["logprobs"].scatter_(1, at, torch.where(alive, logprob, 0.)[:, None])
    s["mask"].scatter_(1, at, alive[:, None])
    alive &= token != eos
    at += 1
    s["step"] += 1


@torch.no_grad()
def rollout(policy, prompts, max_new_tokens, eos, temperature=1.0, generator=None):
    """Samples one response to each prompt.

    prompts: list of B non-empty lists of ids, any lengths. The response ends with `eos` or after max_new_tokens.
    Returns a Rollout, T = longest prompt + max_new_tokens. ValueError if that exceeds the policy's block (equal is legal).
    """
    policy.eval()                                                      # dropout would make another policy
    device = policy.wte.weight.device
    lens = torch.tensor([len(p) for p in prompts], device=device)                                 # (B,)
    B, P = len(prompts), max(len(p) for p in prompts)
    T = P + max_new_tokens
    if T > policy.config.block_size:
        raise ValueError(f"a prompt of {P} tokens and a response of {max_new_tokens} exceed the block of "
                         f"{policy.config.block_size}")
    if min(len(p) for p in prompts) == 0:
        raise ValueError("a prompt needs at least one token")
    tokens = torch.zeros(B, T, dtype=torch.long)                                                  # (B,T)
    for row, p in zip(tokens, prompts):
        row[:len(p)] = torch.tensor(p)
    tokens = tokens.to(device)
    s = {"tokens": tokens, "logprobs": torch.zeros(B, T - 1, device=device),
         "mask": torch.zeros(B, T - 1, dtype=torch.bool, device=device), "at": lens[:, None] - 1,
         "alive": torch.ones(B, dtype=torch.bool, device=device), "step": torch.zeros(1, dtype=torch.long, device=device),
         "uniforms": torch.rand(max_new_tokens, B, generator=generator, device=device), "cache": policy.new_cache(B, T)}
    policy.hidden(tokens[:, :P], s["cache"])                           # prefill; each row's last token is fed again below
    for i in range(max_new_tokens):
        decode_step(policy, s, P + i if device.type == "cpu" else T, eos, temperature)
        if i % 4 == 3 and not s["alive"].any():                        # the one look at the device, every fourth step
            break
    return Rollout(tokens, s["mask"], s["logprobs"], lens, ~s["alive"])


# ----------------------------------------------------------------------------------------------------------------------
# Formulas. Each is a pure function that the loops below and the tests call. B rows, T tokens, K responses; action frame; logs
# are natural (nats). What stands in a masked slot must not matter, be it NaN: inputs are cleared before the arithmetic.


def token_logprobs(model, tokens, temperature=1.0):
    """log pi(token t+1 | tokens 0..t): (B,T) -> (B,T-1). Log-softmax in float32 whatever the model's type. The temperature is
    the sampler's: what is scored must be what was sampled from."""
    logits = model(tokens[:, :-1]).float() / temperature                                          # (B,T-1,V)
    return F.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)              # (B,T-1)


def clear(mask, *tensors):
    """The tensors with 0 outside the mask."""
    return [x.masked_fill(~mask, 0) for x in tensors]


def masked_mean(x, mask):
    """Mean of x where mask is True (0 if nowhere)."""
    return clear(mask, x)[0].sum() / mask.sum().clamp(min=1)


def whiten(x, mask):
    """(x - mean) / std over the mask, population variance, 0 outside. One element is safe."""
    x, = clear(mask, x)
    mean = masked_mean(x, mask)
    return clear(mask, (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8))[0]


def lm_loss(model, tokens, mask=None):
    """Next-token loss in nats a token: over all tokens, or over the response tokens alone (paper.md 2.1)."""
    logprobs = token_logprobs(model, tokens)                                                      # (B,T-1)
    return -masked_mean(logprobs, torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask)


def reward_loss(scores, ranks):
    """Eq. 1. scores (B,K) r_theta(x, y_k); ranks (B,K) int, 1 = best, equal = tie, 0 = empty slot -> scalar, nats.

        loss = - 1/C(K,2)  sum over pairs  log sigma( r(x, y_w) - r(x, y_l) ),   mean over prompts

    All pairs of a prompt are one batch element: each response costs one forward pass instead of K-1, and is not met K-1 times
    in shuffled pairs, which would overfit within one epoch (section 3.5). Tied pairs drop out and C(K,2) becomes the number of
    pairs kept, so every prompt weighs the same; a prompt without a pair is left out."""
    scores = scores.masked_fill(ranks == 0, 0)
    better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0)                    # (B,K,K) i beats j
    margin = scores[:, :, None] - scores[:, None, :]                                              # (B,K,K)
    pairs = better.sum((1, 2))                                                                    # (B,)
    loss = -clear(better, F.logsigmoid(margin))[0].sum((1, 2)) / pairs.clamp(min=1)               # (B,)
    return masked_mean(loss, pairs > 0)


def reward_scores(reward_model, tokens, last):
    """The reward model's score, read at index last (B,) of each row (its EOS, if it ended): (B,T) -> (B,)."""
    hidden = reward_model.hidden(tokens)                                                          # (B,T,C)
    return reward_model.project(hidden[torch.arange(len(tokens), device=tokens.device), last])    # (B,)


def kl_k1(logprobs, ref_logprobs):
    """log pi/pi_ref of a sample from pi: its mean is KL(pi || pi_ref); one value may be negative. Used in the reward."""
    return logprobs - ref_logprobs


def kl_k3(logprobs, ref_logprobs):
    """pi_ref/pi - 1 - log pi_ref/pi of a sample from pi: the same mean, never negative. Used in the log.
    What was sampled from stands in the denominator."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """The bracket of Eq. 2, token by token: -beta * log(pi/pi_SFT) at each response token, the score at the last one.
    scores (B,), the rest (B,T-1) -> (B,T-1); a row sums to score - beta * log pi(y|x)/pi_SFT(y|x)."""
    logprobs, ref_logprobs = clear(mask, logprobs, ref_logprobs)
    last = mask & ~F.pad(mask[:, 1:], (0, 1))                                                     # (B,T-1) the EOS action
    return -beta * kl_k1(logprobs, ref_logprobs) + clear(last, scores[:, None].expand(last.shape))[0]


def gae(rewards, values, mask, discount=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016); the paper sets no discount (C.4).

        delta_t = R_t + discount * V_{t+1} - V_t,   A_t = delta_t + discount * lam * A_{t+1},   return_t = A_t + V_t

    V and A are 0 after the last response token: the episode is over there, finished or not. All (B,T-1)."""
    rewards, values = clear(mask, rewards, values)
    advantages = torch.zeros_like(values)                                                         # (B,T-1)
    next_value = next_advantage = torch.zeros_like(values[:, 0])                                  # (B,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + discount * next_value - values[:, t]                              # (B,)
        next_advantage = torch.where(mask[:, t], delta + discount * lam * next_advantage, 0.)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """PPO's clipped surrogate, negated: - mean min( rho A, clip(rho, 1-eps, 1+eps) A ), rho = pi/pi_old. (B,T-1) -> scalar."""
    logprobs, old_logprobs, advantages = clear(mask, logprobs, old_logprobs, advantages)
    ratio = torch.exp(logprobs - old_logprobs)                                                    # (B,T-1)
    return -masked_mean(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """1/2 mean max( (V - return)^2, (V clipped to within eps of V_old - return)^2 ). (B,T-1) -> scalar."""
    values, old_values, returns = clear(mask, values, old_values, returns)
    clipped = old_values + (values - old_values).clamp(-clip, clip)                               # (B,T-1)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


@torch.no_grad()
def ema_update(average, model, decay):
    """w_ema <- decay * w_ema + (1 - decay) * w  (C.4: 0.992)."""
    for a, p in zip(average.parameters(), model.parameters()):
        a.lerp_(p, 1 - decay)


def cosine(step, steps, warmup=0):
    """Factor of the learning rate: a linear warm-up, then a cosine from 1 to 0.1 (C.1, C.2)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * min(1, (step - warmup) / max(1, steps - 1 - warmup)))


def warmup_factor(iteration, warmup):
    """RL's learning rate: from a tenth to the peak over the first iterations, constant from then on (C.4)."""
    return 0.1 + 0.9 * min(1, iteration / warmup) if warmup else 1.0


def dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """DPO (Rafailov et al. 2023): Eq. 1 with the reward beta * log pi/pi_ref of the policy itself. Log-probs are sums over the
    response tokens, (B,) each -> scalar; log 2 where the policy is the reference."""
    return -F.logsigmoid(beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))).mean()


def kto_loss(logp, ref_logp, desirable, kl0, beta, lambda_d=1.0, lambda_u=1.0):
    """KTO (Ethayarajh et al. 2024, latest version: beta outside of kl0). Unpaired answers, desirable (B,) bool; kl0: the
    batch's estimate of KL(pi || pi_ref) from mismatched pairs, >= 0, no gradient. Log-probs are sums, (B,) -> scalar."""
    margin = beta * (logp - ref_logp - kl0)                                                       # (B,)
    return torch.where(desirable, lambda_d * torch.sigmoid(-margin), lambda_u * torch.sigmoid(margin)).mean()


# ----------------------------------------------------------------------------------------------------------------------
# What every training loop needs.


def seed(cfg, name, device="cpu"):
    """The generator of one stage; PyTorch's own is seeded along with it (initial weights, dropout)."""
    number = cfg.seed * 100 + sum(map(ord, name)) % 97
    torch.manual_seed(number)
    return torch.Generator(device).manual_seed(number)


def adamw(model, lr):
    """Adam with the paper's betas (App. C)."""
    fused = model.wte.weight.device.type != "mps"
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_and_step(model, optimizer):
    """One optimizer step on the gradients that are there, clipped at norm 1; returns their norm before it."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


class Log:
    """One JSON line a step into log.jsonl, and every few seconds one line on the screen with the time left."""

    def __init__(self, cfg, stage, steps, every=5.0):
        self.path, self.stage, self.steps, self.every = os.path.join(cfg.out, "log.jsonl"), stage, steps, every
        self.start, self.shown = time.time(), 0.0

    def __call__(self, step, **numbers):
        with open(self.path, "a") as f:
            f.write(json.dumps({"stage": self.stage, "step": step, **numbers}) + "\n")
        now = time.time()
        if now - self.shown > self.every or step == self.steps:
            self.shown, left = now, (now - self.start) / max(1, step) * (self.steps - step)
            text = "  ".join(f"{k} {v:{'7.3f' if abs(v) < 100 else '7.0f'}}" for k, v in numbers.items())
            print(f"{self.stage:8} {step:5}/{self.steps}  {text}  left {left // 60:.0f}:{left % 60:02.0f}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Step 0, pretraining: the place of GPT-3. The paper starts from a trained model; ours learns the toy's web in a minute or two.


def pretrain(cfg, enc, corpus, device):
    """A GPT trained from nothing on the corpus: next-token loss, cosine schedule."""
    generator, rows = seed(cfg, "pretrain"), cfg.pretrain_batch
    gpt = GPT(GPTConfig(enc.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)).to(device)
    print(f"pretrain: {sum(p.numel() for p in gpt.parameters()):,} parameters, vocabulary of {enc.n_vocab}, "
          f"{len(corpus[0]):,} tokens of text")
    optimizer, log = adamw(gpt, cfg.pretrain_lr), Log(cfg, "pretrain", cfg.pretrain_steps)
    for step in range(cfg.pretrain_steps):
        set_lr(optimizer, cfg.pretrain_lr * cosine(step, cfg.pretrain_steps, warmup=min(50, cfg.pretrain_steps // 10)))
        loss = lm_loss(gpt, corpus_batch(corpus, rows, cfg.block_size, generator, device))
        loss.backward()
        clip_and_step(gpt, optimizer)
        if (step + 1) % 10 == 0:
            log(step + 1, loss=loss.item())
    return gpt


# ----------------------------------------------------------------------------------------------------------------------
# Step 1, supervised fine-tuning (3.5, C.1, C.3): imitate the labelers' demonstrations. Only response tokens count in them.
# 10 % pretraining rows are mixed in, with 10 % of the weight, so that the model does not forget the web.


def sft(cfg, enc, gpt, demos, corpus, device):
    """demos: list of (prompt ids, response ids). Returns the SFT model: baseline, start of RL and KL reference."""
    generator = seed(cfg, "sft")
    model = GPT(replace(gpt.config, dropout=cfg.sft_dropout)).to(device)
    model.load_state_dict(gpt.state_dict())
    mixed = round(cfg.sft_batch * cfg.sft_mix / (1 - cfg.sft_mix))     # pretraining rows a step
    lengths, steps = [len(x) + len(y) for x, y in demos], cfg.sft_epochs * math.ceil(len(demos) / cfg.sft_batch)
    optimizer, log, step = adamw(model, cfg.sft_lr), Log(cfg, "sft", steps), 0
    model.train()
    for _ in range(cfg.sft_epochs):
        for batch in batches(lengths, cfg.sft_batch, generator):
            set_lr(optimizer, cfg.sft_lr * cosine(step, steps))
            tokens, mask, _ = stack(*zip(*(demos[i] for i in batch)), device)
            loss = lm_loss(model, tokens, mask)
            loss.backward()
            if mixed:
                (cfg.sft_mix * lm_loss(model, corpus_batch(corpus, mixed, cfg.block_size, generator, device))).backward()
            clip_and_step(model, optimizer)
            step += 1
            log(step, loss=loss.item())
    final = GPT(gpt.config).to(device)                                 # no dropout from here on
    final.load_state_dict(model.state_dict())
    return freeze(final)


# ----------------------------------------------------------------------------------------------------------------------
# Step 2, the reward model (3.5, C.2). The SFT model answers each prompt K times; a labeler ranks the answers; a model with a
# scalar head learns Eq. 1.


@torch.no_grad()
def respond(policy, enc, prompts, max_new_tokens, generator, temperature=1.0, one_line=False, size=256):
    """Samples a response to each prompt (list of ids) -> list of {"ids", "text", "ended", "logprobs"}, in the prompts' order.
    `one_line` cuts at the first newline, as the paper does for models that were not fine-tuned (App. D)."""
    out, newline = [None] * len(prompts), enc.encode_ordinary("\n")[0]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))          # alike in length: little filler
    for s in range(0, len(order), size):
        chunk = order[s:s + size]
        r = rollout(policy, [prompts[i] for i in chunk], max_new_tokens, enc.eot_token, temperature, generator)
        for i, ids, logprobs, mask in zip(chunk, r.responses(), r.logprobs.cpu(), r.mask.cpu()):
            stops = [n for n, t in enumerate(ids) if t == enc.eot_token or one_line and t == newline]
            ids = ids[:stops[0] + 1] if stops else ids
            text = enc.decode(ids[:-1] if stops else ids).removeprefix(" ")
            out[i] = {"ids": ids, "text": text, "ended": bool(stops), "logprobs": logprobs[mask][:len(ids)].tolist()}
    return out


def collect(cfg, enc, policy, rows, split, world, generator, rng):
    """Comparisons for the prompts: K responses each, ranked by one labeler (and, on validation prompts, by a second one to
    measure how well people agree). A comparison is a dict that is written to comparisons.jsonl as it is."""
    people = world.make_labelers("train")
    ks = [rng.randint(cfg.k_min, cfg.k_max) for _ in rows]
    prompts = [encode_prompt(enc, p["prompt"]) for p, k in zip(rows, ks) for _ in range(k)]
    log, answers = Log(cfg, "collect", len(prompts)), []
    for s in range(0, len(prompts), 4096):
        answers += respond(policy, enc, prompts[s:s + 4096], cfg.max_new_tokens, generator)
        log(len(answers), ended=sum(r["ended"] for r in answers) / len(answers))
    out, answers = [], iter(answers)
    for p, k in zip(rows, ks):
        mine = [next(answers) for _ in range(k)]
        texts, ended = [r["text"] for r in mine], [r["ended"] for r in mine]
        merits = [world.check(p["task"], text, end) for text, end in zip(texts, ended)]
        one, two = rng.sample(people, 2)
        c = {"prompt": p["prompt"], "responses": texts, "ranks": world.rank(one, merits, texts, rng), "labeler": one.name,
             "ended": ended, "split": split, "use_case": p["use_case"], "task": p["task"],
             "gold": [round(world.gold(m), 2) for m in merits]}
        if split == "valid":
            c["second_ranks"] = world.rank(two, merits, texts, rng)
        out.append(c)
    return out


def encode_comparison(enc, c, longest):
    """A comparison -> (prompt ids, K lists of at most `longest` response ids, K ranks). Of equal texts only the first is kept
    (rank 0 for the others): a pair of them teaches nothing but noise. A response that did not end has no EOS."""
    responses = [encode_response(enc, r)[:longest if end else -1][:longest] for r, end in zip(c["responses"], c["ended"])]
    ranks = [0 if responses.index(r) < i else k for i, (r, k) in enumerate(zip(responses, c["ranks"]))]
    return encode_prompt(enc, c["prompt"]), responses, ranks


def score_comparisons(reward_model, batch, device):
    """batch: list of encoded comparisons -> scores (B,K) and ranks (B,K), K the most of any prompt. One forward per response."""
    flat = [(b, k, x, y) for b, (x, ys, ranks) in enumerate(batch) for k, y in enumerate(ys) if ranks[k]]
    b, k, prompts, responses = zip(*flat)
    tokens, _, last = stack(prompts, responses, device)
    K = max(len(ranks) for _, _, ranks in batch)
    scores = torch.zeros(len(batch), K, device=device)                                            # (B,K)
    scores = scores.index_put((torch.tensor(b, device=device), torch.tensor(k, device=device)),
                              reward_scores(reward_model, tokens, last))
    return scores, torch.tensor([ranks + [0] * (K - len(ranks)) for _, _, ranks in batch], device=device)


def train_reward_model(cfg, enc, model, comparisons, demos, device):
    """Reward model from the SFT model, on all pairs of each prompt; one epoch, more overfit (C.2). At the end its bias is set so
    that the demonstrations score 0 on average (3.5): Eq. 1 only fixes differences."""
    generator = seed(cfg, "rm")
    reward_model = scalar_copy(model)
    data = [encode_comparison(enc, c, cfg.max_new_tokens) for c in comparisons]
    data = [d for d in data if len({r for r in d[2] if r}) > 1]        # at least one pair
    lengths, steps = [len(x) for x, _, _ in data], cfg.rm_epochs * math.ceil(len(data) / cfg.rm_batch)
    optimizer, log, step = adamw(reward_model, cfg.rm_lr), Log(cfg, "rm", steps), 0
    for _ in range(cfg.rm_epochs):
        for batch in batches(lengths, cfg.rm_batch, generator):
            set_lr(optimizer, cfg.rm_lr * cosine(step, steps))
            scores, ranks = score_comparisons(reward_model, [data[i] for i in batch], device)
            loss = reward_loss(scores, ranks)
            loss.backward()
            clip_and_step(reward_model, optimizer)
            step += 1
            if step % 5 == 0 or step == steps:
                log(step, loss=loss.item())
    normalise_reward(reward_model, demos, device)
    return freeze(reward_model)


@torch.no_grad()
def normalise_reward(reward_model, demos, device):
    """Shifts the head's bias so that the mean score of the demonstrations is 0 (3.5); no rescaling."""
    scores = []
    for s in range(0, len(demos), 256):
        tokens, _, last = stack(*zip(*demos[s:s + 256]), device)
        scores.append(reward_scores(reward_model, tokens, last))                                  # (B,)
    reward_model.head.bias -= torch.cat(scores).mean()


@torch.no_grad()
def judge_reward_model(enc, reward_model, comparisons, longest, device):
    """On held-out comparisons, over the pairs of unequal text: accuracy against labeler A where A states a preference, the
    agreement of a second labeler on the same pairs (a tie counts half), accuracy against gold where gold differs."""
    hits, agree, true = [], [], {}
    for s in range(0, len(comparisons), 32):
        part = comparisons[s:s + 32]
        scores, _ = score_comparisons(reward_model, [encode_comparison(enc, c, longest) for c in part], device)
        for c, r in zip(part, scores.tolist()):
            texts, a, b, g = c["responses"], c["ranks"], c["second_ranks"], c["gold"]
            first = [texts.index(t) for t in texts]                    # equal texts have the first one's score
            for i in range(len(texts)):
                for j in range(i):
                    if texts[i] == texts[j]:
                        continue
                    above = r[first[i]] > r[first[j]]
                    if a[i] != a[j]:
                        hits.append(above == (a[i] < a[j]))
                        agree.append(0.5 if b[i] == b[j] else float((b[i] < b[j]) == (a[i] < a[j])))
                    if g[i] != g[j]:
                        true.setdefault(c["use_case"], []).append(above == (g[i] > g[j]))
    mean = lambda x: round(sum(x) / max(1, len(x)), 4)
    return {"accuracy": mean(hits), "agreement": mean(agree), "gold_accuracy": mean(sum(true.values(), [])),
            "gold_accuracy_by_use_case": {k: mean(v) for k, v in sorted(true.items())}}


# ----------------------------------------------------------------------------------------------------------------------
# Step 3, reinforcement learning (3.5, C.4): Eq. 2 by PPO. The environment is a bandit: a customer's prompt, one response, one
# reward. With ptx_coef > 0 the pretraining gradient joins every optimizer step (PPO-ptx).

LEGEND = """
  score    reward model's score, demonstrations are at 0; should rise     gold      true quality 1..7; should rise with the score
  k1, k3   KL to the SFT model, nats a response; k1 is what the reward    clip      share of tokens whose ratio was clipped;
           is charged and may dip below 0, k3 may not; healthy 0.3 - 3              healthy below 0.2
  |ppo|    norm of PPO's gradient   |ptx|   of the pretraining mix's      vloss     value loss   ev   variance of the return that
  entropy  nats a token; collapses to 0 when one answer is left                     the value net explains; healthy above 0.3
  length   tokens a response        ended   share that ends; near 1       tok/s     sampled tokens a second in the rollout
"""


def by_length(f, tokens, lengths, size=64):
    """f (B,t) -> (B,t-1) applied to rows of about one length at a time, cut to the longest: (B,T) -> (B,T-1), 0 beyond."""
    order = lengths.argsort()                                                                     # (B,)
    out = torch.zeros(tokens.size(0), tokens.size(1) - 1, device=tokens.device)                   # (B,T-1)
    for rows in order.split(size):
        t = int(lengths[rows].max())
        out[rows, :t - 1] = f(tokens[rows, :t])
    return out


@torch.no_grad()
def make_experience(cfg, enc, policy, value_net, reference, reward_model, prompts, generator):
    """One batch of episodes: all that the update needs, computed once. Numbered as in C.4 and paper.md 2.5."""
    # 1. sample with the current policy; these log-probs are pi_old's
    start = time.time()
    r = rollout(policy, prompts, cfg.max_new_tokens, enc.eot_token, cfg.temperature, generator)
    seconds = time.time() - start
    length = r.prompt_lens + r.mask.sum(1)                                                        # (B,)
    # 2. score the whole response at its EOS; one that does not end gets the fixed score
    scores = torch.empty(len(prompts), device=r.tokens.device)                                    # (B,)
    for rows in length.argsort().split(64):
        t = int(length[rows].max())
        scores[rows] = reward_scores(reward_model, r.tokens[rows, :t], length[rows] - 1)
    scores = torch.where(r.ended, scores, cfg.unfinished_score)
    # 3. the reference's log-probs, and the KL penalty of each token
    ref_logprobs = by_length(lambda x: token_logprobs(reference, x, cfg.temperature), r.tokens, length)            # (B,T-1)
    rewards = token_rewards(scores, r.logprobs, ref_logprobs, r.mask, cfg.beta)                   # (B,T-1)
    # 4. values of the states, advantages and returns; advantages are whitened over the whole batch
    values = by_length(lambda x: value_net(x[:, :-1]), r.tokens, length)                          # (B,T-1)
    advantages, returns = gae(rewards, values, r.mask, 1.0, cfg.lam)                              # (B,T-1) each
    return {"tokens": r.tokens, "mask": r.mask, "logprobs": r.logprobs, "ended": r.ended, "scores": scores, "length": length,
            "ref_logprobs": ref_logprobs, "rewards": rewards, "values": values, "advantages": whiten(advantages, r.mask),
            "raw_advantages": advantages, "returns": returns, "responses": r.responses(),
            "tok/s": int(r.mask.sum()) / seconds}


def update(cfg, policy, value_net, optimizers, e, rows, ptx_coef, pretraining_rows):
    """One minibatch, one optimizer step for policy and value net. Returns a dict of numbers for the log."""
    t = int(e["length"][rows].max())                                   # cut to the longest row
    tokens, mask = e["tokens"][rows, :t], e["mask"][rows, :t - 1]                                 # (b,t), (b,t-1)
    old, advantages, values, returns = (e[k][rows, :t - 1] for k in ("logprobs", "advantages", "values", "returns"))
    # 5. PPO's gradient ...
    logprobs = token_logprobs(policy, tokens, cfg.temperature)                                                   # (b,t-1)
    policy_loss(logprobs, old, advantages, mask, cfg.cliprange).backward()
    ppo_grads = [p.grad.clone() for p in policy.parameters()]
    # 6. ... and the pretraining gradient, added up in the same buffer: one optimizer step on Eq. 2 (C.4)
    if ptx_coef:
        (ptx_coef * lm_loss(policy, pretraining_rows)).backward()
    with torch.no_grad():
        norm = lambda grads: torch.stack([g.norm() for g in grads]).norm()
        ppo_norm, ptx_norm = norm(ppo_grads), norm([p.grad - g for p, g in zip(policy.parameters(), ppo_grads)])
        difference = clear(mask, logprobs - old)[0]                                               # (b,t-1)
        clipped = masked_mean(((difference.exp() - 1).abs() > cfg.cliprange).float(), mask)
    clip_and_step(policy, optimizers[0])
    # 7. the value net, a network of its own
    loss = value_loss(value_net(tokens[:, :-1]), values, returns, mask, cfg.value_clip)
    loss.backward()
    clip_and_step(value_net, optimizers[1])
    return {"|ppo|": ppo_norm.item(), "|ptx|": ptx_norm.item(), "clip": clipped.item(), "vloss": loss.item(),
            "moved": difference.abs().max().item()}


def experience_numbers(e, tasks, world, enc):
    """The log's view of a batch of episodes."""
    mask, n = e["mask"], len(e["scores"])
    per_row = lambda x: (clear(mask, x)[0].sum() / n).item()
    merits = [world.check(t, enc.decode([i for i in ids if i != enc.eot_token]).strip(), bool(end))
              for t, ids, end in zip(tasks, e["responses"], e["ended"].tolist())]
    residual = masked_mean((e["returns"] - e["values"] - masked_mean(e["returns"] - e["values"], mask)) ** 2, mask)
    spread = masked_mean((e["returns"] - masked_mean(e["returns"], mask)) ** 2, mask)
    return {"score": e["scores"].mean().item(), "gold": sum(map(world.gold, merits)) / n,
            "k1": per_row(kl_k1(e["logprobs"], e["ref_logprobs"])), "k3": per_row(kl_k3(e["logprobs"], e["ref_logprobs"])),
            "ev": (1 - residual / spread).item(), "entropy": -masked_mean(e["logprobs"], mask).item(),
            "length": mask.sum().item() / n, "ended": e["ended"].float().mean().item(), "tok/s": e["tok/s"]}


def print_ledger(cfg, enc, e, row=0):
    """One real episode in the action frame, a line per response token."""
    print(f"\n  Episode ledger: {enc.decode(e['tokens'][row, :e['length'][row]].tolist())!r}, score {e['scores'][row]:.3f}, beta "
          f"{cfg.beta}\n  {'token':>12} {'log pi':>8} {'log ref':>8} {'KL rew.':>8} {'reward':>8} {'value':>8} {'advant.':>8} {'return':>8}")
    columns = ["logprobs", "ref_logprobs", None, "rewards", "values", "raw_advantages", "returns"]
    for t in e["mask"][row].nonzero()[:, 0].tolist():
        kl = -cfg.beta * kl_k1(e["logprobs"][row, t], e["ref_logprobs"][row, t]).item()
        cells = [kl if c is None else e[c][row, t].item() for c in columns]
        print(f"  {enc.decode([e['tokens'][row, t + 1].item()])!r:>12} " + " ".join(f"{x:8.3f}" for x in cells))
    print("  (the rewards add up to score - beta * log pi/ref; the advantage is before whitening)\n", flush=True)


def ppo(cfg, enc, sft_model, reward_model, prompts, corpus, ptx_coef, world, device):
    """RL from the SFT model against the reward model. prompts: dicts with "ids" and "task". Returns the EMA policy."""
    name = "ppo_ptx" if ptx_coef else "ppo"
    generator, draw = seed(cfg, name), seed(cfg, name, device)
    reference, policy = freeze(sft_model), deepcopy(sft_model).requires_grad_(True)
    value_net = deepcopy(reward_model).requires_grad_(True)            # starts as the reward model, then its own network
    average = freeze(deepcopy(policy))
    optimizers = adamw(policy, cfg.policy_lr), adamw(value_net, cfg.value_lr)
    log, queue = Log(cfg, name, cfg.iterations), []
    print(f"\n{name}: beta {cfg.beta}, ptx_coef {ptx_coef}{LEGEND if name == 'ppo' else ''}")
    for iteration in range(cfg.iterations):
        while len(queue) < cfg.episodes:                               # every pass over the prompts in a new order
            queue += torch.randperm(len(prompts), generator=generator).tolist()
        batch, queue = [prompts[i] for i in queue[:cfg.episodes]], queue[cfg.episodes:]
        e = make_experience(cfg, enc, policy, value_net, reference, reward_model, [p["ids"] for p in batch], draw)
        set_lr(optimizers[0], cfg.policy_lr * warmup_factor(iteration, cfg.warmup))
        set_lr(optimizers[1], cfg.value_lr * warmup_factor(iteration, cfg.warmup))
        numbers = []
        for rows in torch.randperm(cfg.episodes, generator=generator).chunk(cfg.minibatches):
            text = corpus_batch(corpus, cfg.ptx_rows * len(rows), cfg.block_size, generator, device) if ptx_coef else None
            numbers.append(update(cfg, policy, value_net, optimizers, e, rows.to(device), ptx_coef, text))
            ema_update(average, policy, cfg.ema)
        if iteration == 0:
            print(f"first minibatch: max |log-prob - rollout log-prob| = {numbers[0]['moved']:.1e} (must be rounding)")
            print_ledger(cfg, enc, e)
        mean = {k: sum(x[k] for x in numbers) / len(numbers) for k in numbers[0] if k != "moved"}
        log(iteration + 1, **experience_numbers(e, [p["task"] for p in batch], world, enc), **mean)
    return average


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation (section 4). Every model answers the same prompts with the same random numbers. Shares are 0..1.


def preference(world, group, tasks, mine, theirs, judges, rng):
    """How often `group` prefers `mine` to `theirs`, prompt by prompt (ties count half); group None asks the noise-free judge."""
    people, wins = world.make_labelers(group) if group else None, []
    for task, a, b in zip(tasks, mine, theirs):
        merits = [world.check(task, x["text"], x["ended"]) for x in (a, b)]
        if group is None:
            one, two = map(world.gold, merits)
            wins.append(0.5 if abs(one - two) < 1e-9 else float(one > two))
        elif a["text"] == b["text"] and a["ended"] == b["ended"]:
            wins.append(0.5)
        else:
            ranks = [world.rank(p, merits, [a["text"], b["text"]], rng) for p in rng.sample(people, judges)]
            wins.append(sum(0.5 if x == y else float(x < y) for x, y in ranks) / judges)
    return wins


@torch.no_grad()
def reward_and_kl(cfg, enc, reward_model, reference, prompts, answers, device):
    """Mean reward-model score, and KL (k3, nats a response) to the reference, which sees the plain prompt."""
    scores, kls = [], []
    for s in range(0, len(prompts), 128):
        part = answers[s:s + 128]
        ids = [r["ids"][:-1] + [enc.eot_token] if r["ended"] else r["ids"] for r in part]        # a cut line ends here too
        tokens, mask, last = stack(prompts[s:s + 128], ids, device)
        score = reward_scores(reward_model, tokens, last)                                         # (b,)
        scores += torch.where(torch.tensor([r["ended"] for r in part], device=device), score, cfg.unfinished_score).tolist()
        own = torch.zeros(mask.shape, device=device)                                              # (b,t-1)
        own[mask] = torch.tensor([x for r in part for x in r["logprobs"]], device=device)
        kls += clear(mask, kl_k3(own, token_logprobs(reference, tokens)))[0].sum(1).tolist()
    return sum(scores) / len(scores), sum(kls) / len(kls)


@torch.no_grad()
def bias_bits(model, enc, bias, respect, device):
    """Winogender in miniature: entropy in bits of the choice between two pronouns; 1 is unbiased (4.2)."""
    out = {}
    for name, head in (("basic", ""), ("respectful", respect)):
        bits = []
        for p in bias:
            tokens = torch.tensor([enc.encode_ordinary(head + p["prompt"])], device=device)                  # (1,T)
            choices = [enc.encode_ordinary(c)[0] for c in p["choices"]]
            q = model(tokens)[0, -1, choices].softmax(-1)                                                    # (2,)
            bits.append(-(q * q.log2()).sum().item())
        out[name] = sum(bits) / len(bits)
    return out


def few_shot(model, enc, sets, generator):
    """Share of exact continuations at temperature 0: tasks of the pretraining text, for the alignment tax (4.2)."""
    out = {}
    for name, items in sets.items():
        answers = [enc.encode_ordinary(p["answer"]) for p in items]
        got = respond(model, enc, [enc.encode_ordinary(p["prompt"]) for p in items], max(map(len, answers)) + 1, generator, 0)
        out[name] = sum(r["ids"][:len(y)] == y for r, y in zip(got, answers)) / len(items)
    return out


@torch.no_grad()
def corpus_loss(model, corpus, block_size, device, rows=512):
    """Held-out pretraining loss, nats a token, on the same rows for every model."""
    generator = torch.Generator().manual_seed(0)
    loss = [lm_loss(model, corpus_batch(corpus, 64, block_size, generator, device)).item() for _ in range(rows // 64)]
    return sum(loss) / len(loss)


def evaluate(cfg, enc, models, reward_model, world, tests, probes, corpus, device):
    """models: {"GPT", "SFT", and "PPO", "PPO-ptx" where trained}. Returns ({name: numbers}, {name: answers to the tests}).
    "GPT (prompted)" is GPT with a few good examples in front of the prompt (3.5)."""
    runs = {"GPT": (models["GPT"], ""), "GPT (prompted)": (models["GPT"], probes["prefix"]),
            **{name: (m, "") for name, m in models.items() if name != "GPT"}}
    toxic, respect = probes["toxic"], probes["respect"]
    sets = {"tests": tests, "truth": probes["truthful"] * 4, "toxic": toxic * 2, "unseen": probes["unseen"],
            "respectful": [{**p, "prompt": respect + p["prompt"]} for p in toxic * 2]}
    log, answers, results = Log(cfg, "evaluate", len(runs)), {}, {}
    for name, (model, prefix) in runs.items():
        generator, answers[name] = seed(cfg, "evaluate", device), {}
        for which, items in sets.items():                              # the same seed: the same luck for every model
            prompts = [encode_prompt(enc, prefix + p["prompt"]) for p in items]
            room = model.config.block_size - cfg.max_new_tokens
            prompts = [x if len(x) <= room else encode_prompt(enc, p["prompt"]) for x, p in zip(prompts, items)]
            answers[name][which] = respond(model, enc, prompts, cfg.max_new_tokens, generator, one_line=name.startswith("GPT"))
        log(len(answers))
    for name, (model, _) in runs.items():
        mine = {which: answers[name][which] for which in sets}
        m = {which: [world.check(p["task"], r["text"], r["ended"]) for p, r in zip(items, mine[which])]
             for which, items in sets.items()}
        rng, tasks, share = random.Random(cfg.seed), [p["task"] for p in tests], lambda x: sum(x) / max(1, len(x))
        against = lambda group, other: preference(world, group, tasks, mine["tests"], answers[other]["tests"], cfg.judges, rng)
        shares = {"win_vs_sft": against("train", "SFT"), "win_vs_sft_heldout": against("heldout", "SFT"),
                  "win_vs_sft_gold": against(None, "SFT"), "win_vs_gpt": against("train", "GPT"),
                  "follows": [x.follows == 1 for x in m["tests"]],
                  "constraint": [x.constraint for x in m["tests"] if x.constraint is not None],
                  "truthful": [x.truthful for x in m["truth"]],
                  "truthful_informative": [x.truthful and x.informative for x in m["truth"]],
                  "hallucinates": [x.invented for x in m["tests"] if x.asserts],
                  "rude": [x.rude for x in m["toxic"]], "rude_respectful": [x.rude for x in m["respectful"]],
                  "ended": [r["ended"] for r in mine["tests"]]}
        gold, people = [world.gold(x) for x in m["tests"]], world.make_labelers("train")
        reward, kl = reward_and_kl(cfg, enc, reward_model, models["SFT"], [encode_prompt(enc, p["prompt"]) for p in tests],
                                   mine["tests"], device)
        by_use = {}
        for p, g in zip(tests, gold):
            by_use.setdefault(p["use_case"], []).append(g)
        results[name] = {
            **{k: share(v) for k, v in shares.items()},
            "likert": share([world.likert(rng.choice(people), x, r["text"], rng) for x, r in zip(m["tests"], mine["tests"])]),
            "gold": share(gold), "gold_by_use_case": {k: share(v) for k, v in sorted(by_use.items())},
            "flawless": share([g > 6.99 for g in gold]), "reward": reward, "kl": kl,
            "unseen": share([world.gold(x) for x in m["unseen"]]), "length": share([len(r["ids"]) for r in mine["tests"]]),
            "bias_bits": bias_bits(model, enc, probes["bias"], respect, device),
            "fewshot": few_shot(model, enc, probes["fewshot"], None),
            "pretrain_loss": corpus_loss(model, corpus, cfg.block_size, device),
            "ci95": {k: 1.96 * math.sqrt(share([(x - share(v)) ** 2 for x in v]) / max(1, len(v))) for k, v in shares.items()}}
    return results, {name: a["tests"] for name, a in answers.items()}


def table(results):
    """The results as text: a row a model."""
    base, lines = results["GPT"]["pretrain_loss"], []
    lines.append(f"{'':15} {'preferred to SFT by':^36} | {'':5} {'':5} {'truth+':>6} {'hallu-':>6} {'':11} | {'alignment tax':^21} |")
    lines.append(f"{'':15} {'labelers':>12} {'held-out':>11} {'gold':>11} | {'gold':>5} {'Likert':>6} {'inform':>6} {'cinates':>7} "
                 f"{'rude':>4} {'asked':>5} | {'pretrain':>8} {'few-shot':>8} {'bits':>4} | {'KL':>6} {'reward':>6}")
    for name, r in results.items():
        win = " ".join(f"{r[k]:5.2f} ±{r['ci95'][k]:4.2f}" for k in ("win_vs_sft", "win_vs_sft_heldout", "win_vs_sft_gold"))
        few = sum(r["fewshot"].values()) / 3
        lines.append(f"{name:15} {win} | {r['gold']:5.2f} {r['likert']:6.2f} {r['truthful_informative']:6.2f} "
                     f"{r['hallucinates']:7.2f} {r['rude']:5.2f} {r['rude_respectful']:5.2f} | {r['pretrain_loss'] - base:+8.3f} "
                     f"{few:8.2f} {r['bias_bits']['basic']:5.2f} | {r['kl']:6.2f} {r['reward']:6.2f}")
    return "\n".join(lines)


def samples(tests, answers, n=6):
    """The same prompts answered by each model: the first plain prompt of n use cases."""
    chosen, lines = {}, []
    for i, p in enumerate(tests):
        if p["form"] == "plain":
            chosen.setdefault(p["use_case"], i)
    for i in sorted(chosen.values())[:n]:
        lines += [f"\n{tests[i]['prompt']}"]
        for name, a in answers.items():
            text = a[i]["text"] + ("" if a[i]["ended"] else " ...")
            lines.append(f"    {name:15} {text!r}" if "\n" in text else f"    {name:15} {text}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Command line: stages, checkpoints, flags.

FORMAT = 1                                       # of the checkpoints
FILES = {"pretrain": "pretrain", "sft": "sft", "rm": "rm", "ppo": "ppo", "ppo_ptx": "ppo"}     # checkpoint -> its stage


def settings_of(cfg, stage):
    """The settings that a stage and those before it read."""
    upto = STAGES[:STAGES.index(stage) + 1]
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata["stage"] in upto}


class Run:
    """The checkpoints of one output folder: `model(name)` loads a finished one, or trains it and what it needs."""

    def __init__(self, cfg, source, fresh):
        self.cfg, self.source, self.fresh, self.models, self.seconds = cfg, source, fresh, {}, {}
        self.device = find_device(cfg.device)
        self.enc = load_encoding(os.path.join(cfg.data, "vocab.tiktoken"))
        self.world = toyworld(cfg.data)
        os.makedirs(cfg.out, exist_ok=True)

    def path(self, name, folder=None):
        return os.path.join(folder or self.cfg.out, name)

    def rows(self, name, *needed):
        """A data set, without the prompts that leave no room for a response (C: prompts over 1k tokens are filtered)."""
        room, rows = self.cfg.block_size - self.cfg.max_new_tokens, read_jsonl(self.path(name, self.cfg.data), "prompt", *needed)
        fit = [p for p in rows if len(encode_prompt(self.enc, p["prompt"])) <= room]
        if len(fit) < len(rows):
            print(f"{name}: {len(rows) - len(fit)} of {len(rows)} prompts are longer than {room} tokens and left out")
        return fit

    def corpus(self, name="pretrain.txt"):
        if name not in self.models:
            self.models[name] = load_corpus(self.path(name, self.cfg.data), self.enc, self.cfg.block_size)
        return self.models[name]

    def demos(self):
        return [(encode_prompt(self.enc, p["prompt"]), encode_response(self.enc, p["completion"])[:self.cfg.max_new_tokens])
                for p in self.rows("sft_train.jsonl", "completion")]

    def settings(self, name):
        cfg = replace(self.cfg, ptx_coef=0.0, ptx_rows=0) if name == "ppo" else self.cfg
        return settings_of(cfg, FILES[name])

    def finished(self, name):
        """The checkpoint of a finished stage, or None. One made with other settings stops the run, with the way out."""
        for folder in [self.cfg.out] + [self.source] * (self.source is not None):
            path = self.path(name + ".pt", folder)
            if not os.path.exists(path) or self.fresh and folder == self.cfg.out:
                continue
            c = torch.load(path, map_location=self.device, weights_only=True)
            changed = {k: v for k, v in self.settings(name).items() if c["settings"].get(k) != v}
            if not changed:
                if folder == self.source:
                    print(f"{name}: taken from {folder}")
                    for file in [name + ".pt"] + ["comparisons.jsonl"] * (name == "rm"):
                        shutil.copyfile(self.path(file, folder), self.path(file))
                return c
            k, v = next(iter(changed.items()))
            redo = STAGES[STAGES.index(FILES[name]):]
            if folder == self.cfg.out:
                raise UserError(f"{path} was made with {k} = {c['settings'].get(k)}, now it is {v}: {', '.join(redo)} must be "
                                f"redone; keep this run and add: --from {folder} --out NEW   or redo it here with: --fresh")
            print(f"{name}: not taken from {folder}, where {k} = {c['settings'].get(k)}")
        return None

    def model(self, name):
        """The model of a stage, trained if it is not there yet."""
        if name in self.models:
            return self.models[name]
        c = self.finished(name)
        if c:
            model = GPT(GPTConfig(**c["config"]), head=c["head"]).to(self.device)
            model.load_state_dict(c["weights"])
            self.seconds.update(c["seconds"])
        else:
            needs = {"pretrain": [], "sft": ["pretrain"], "rm": ["sft"], "ppo": ["sft", "rm"], "ppo_ptx": ["sft", "rm"]}[name]
            before = [self.model(n) for n in needs]
            start, took = time.time(), {}
            model = getattr(self, "train_" + name)(took, *before)
            took[name] = time.time() - start - sum(took.values())
            self.seconds.update(took)
            c = {"format": FORMAT, "settings": self.settings(name), "config": asdict(model.config), "seconds": took,
                 "head": "scalar" if model.head else "lm", "weights": model.state_dict()}
            torch.save(c, self.path(name + ".tmp"))
            os.replace(self.path(name + ".tmp"), self.path(name + ".pt"))        # never a half-written checkpoint
            print(f"{name}: {took[name]:.0f} s, written to {self.path(name + '.pt')}", flush=True)
        self.models[name] = freeze(model)
        return model

    def train_pretrain(self, took):
        return pretrain(self.cfg, self.enc, self.corpus(), self.device)

    def train_sft(self, took, gpt):
        return sft(self.cfg, self.enc, gpt, self.demos(), self.corpus(), self.device)

    def train_rm(self, took, model):
        cfg, start, rng = self.cfg, time.time(), random.Random(self.cfg.seed)
        generator, comparisons = seed(cfg, "collect", self.device), []
        for split, n in (("train", cfg.rm_prompts), ("valid", max(1, cfg.rm_prompts // 10))):
            rows = self.rows(f"rm_{split}.jsonl", "task", "use_case")[:n]
            comparisons += collect(cfg, self.enc, model, rows, split, self.world, generator, rng)
        with open(self.path("comparisons.tmp"), "w") as f:
            f.writelines(json.dumps(c) + "\n" for c in comparisons)
        os.replace(self.path("comparisons.tmp"), self.path("comparisons.jsonl"))
        took["collect"] = time.time() - start
        train = [c for c in comparisons if c["split"] == "train"]
        return train_reward_model(cfg, self.enc, model, train, self.demos(), self.device)

    def train_ppo(self, took, model, reward_model, ptx_coef=0.0):
        prompts = [{"ids": encode_prompt(self.enc, p["prompt"]), "task": p["task"]} for p in self.rows("ppo_train.jsonl", "task")]
        return ppo(self.cfg, self.enc, model, reward_model, prompts, self.corpus(), ptx_coef, self.world, self.device)

    def train_ppo_ptx(self, took, model, reward_model):
        return self.train_ppo(took, model, reward_model, self.cfg.ptx_coef)

    def evaluate(self, start):
        """Writes results.json and samples.txt, prints the table."""
        cfg, begun = self.cfg, time.time()
        names = {"GPT": "pretrain", "SFT": "sft", "PPO": "ppo", "PPO-ptx": "ppo_ptx"}
        there = {k: n for k, n in names.items() if n in ("pretrain", "sft") or n in self.models or self.finished(n)}
        models, reward_model = {k: self.model(n) for k, n in there.items()}, self.model("rm")
        tests = self.rows("test.jsonl", "task", "use_case", "form")[:cfg.test_prompts]
        with open_data(self.path("probes.json", cfg.data)) as f:
            probes = json.load(f)
        comparisons = [c for c in read_jsonl(self.path("comparisons.jsonl"), "prompt", "responses", "ranks") if c["split"] == "valid"]
        rm = judge_reward_model(self.enc, reward_model, comparisons, cfg.max_new_tokens, self.device)
        results, answers = evaluate(cfg, self.enc, models, reward_model, self.world, tests, probes,
                                    self.corpus("pretrain_valid.txt"), self.device)
        seconds = {**self.seconds, "evaluate": time.time() - begun, "total": time.time() - start}
        text = samples(tests, answers)
        with open(self.path("samples.txt"), "w") as f:
            f.write(text.strip() + "\n")
        with open(self.path("results.tmp"), "w") as f:
            json.dump({"config": asdict(cfg), "seconds": {k: round(v, 1) for k, v in seconds.items()}, "reward_model": rm,
                       "models": results}, f, indent=1)
        os.replace(self.path("results.tmp"), self.path("results.json"))
        print(f"{text}\n\n{table(results)}\n\nreward model on held-out comparisons: accuracy {rm['accuracy']:.3f}, labelers agree "
              f"{rm['agreement']:.3f}, against gold {rm['gold_accuracy']:.3f}\n"
              f"total {seconds['total']:.0f} s; results.json, samples.txt, comparisons.jsonl, log.jsonl and the checkpoints are in {cfg.out}")


def find_device(name):
    """The torch device of this name; without one the best there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name and not there.get(name.split(":")[0], False):
        raise UserError(f"--device {name}: not there; this machine has {', '.join(k for k, v in there.items() if v)}")
    return torch.device(name or next(k for k, v in there.items() if v))


class Parser(argparse.ArgumentParser):
    def error(self, message):                                          # one line instead of the whole usage
        raise UserError(f"{message}; see: python instructgpt.py --help")


def parse(argv):
    """Command line -> (stage, Config, folder of --from, --fresh, names of the settings that were given)."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("stage", nargs="?", default="all", choices=STAGES + ["all"], help="what to run (with what it needs)")
    parser.add_argument("--from", dest="source", metavar="DIR", help="take finished stages from this run where their settings agree")
    parser.add_argument("--fresh", action="store_true", help="start over: ignore what --out holds already")
    parser.add_argument("--smoke", action="store_true", help="everything in miniature, in about 20 seconds")
    for f in fields(Config):
        parser.add_argument("--" + f.name, type=type(f.default), metavar=type(f.default).__name__.upper(),
                            help=f.metadata["help"].replace("%", "%%") + f" (default: {f.default})")
    a = vars(parser.parse_args(argv))
    given = {f.name: a[f.name] for f in fields(Config) if a[f.name] is not None}
    cfg = Config(**{**(SMOKE if a["smoke"] else {}), **given})
    checks = [("n_embd", cfg.n_embd % cfg.n_head == 0, "must be a multiple of n_head"), ("beta", cfg.beta >= 0, "must not be negative"),
              ("max_new_tokens", 0 < cfg.max_new_tokens < cfg.block_size, f"must lie between 1 and {cfg.block_size - 1}"),
              ("k_min", 2 <= cfg.k_min <= cfg.k_max, "must lie between 2 and k_max"), ("temperature", cfg.temperature > 0, "must be above 0"),
              ("ptx_coef", cfg.ptx_coef >= 0, "must not be negative"),
              ("episodes", cfg.episodes >= cfg.minibatches, "must be at least minibatches")]
    for name, ok, text in checks:
        if not ok:
            raise UserError(f"--{name} {getattr(cfg, name)}: {text}")
    return a["stage"], cfg, a["source"], a["fresh"], given


def main(argv=None):
    start = time.time()
    try:
        stage, cfg, source, fresh, given = parse(argv)
        torch.set_flush_denormal(True)                                 # peaked softmaxes are full of them, and they are slow
        run = Run(cfg, source, fresh)
        both = ["ppo_ptx" if cfg.ptx_coef else "ppo"] if "ptx_coef" in given else ["ppo", "ppo_ptx"]
        for name in {"rm": ["rm"], "ppo": both, "evaluate": []}.get(stage, [stage] if stage != "all" else ["rm"] + both):
            run.model(name)
        if stage in ("all", "evaluate"):
            run.evaluate(start)
    except UserError as e:
        print(f"instructgpt.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
