"""
InstructGPT in one file: Ouyang et al. 2022, "Training language models to follow instructions with human
feedback" (arXiv 2203.02155), from pretraining to the results, on a toy world that shows its findings.

    python instructgpt.py                                     everything: trains, evaluates, writes out/
    python instructgpt.py --smoke                             the same in miniature, about 20 seconds
    python instructgpt.py sft                                 one stage, and what it needs
    python instructgpt.py --from out --out out_b --beta 0.1   another beta on the pretrain, sft, rm of out/
    python instructgpt.py ppo --ptx_coef 0                    plain PPO alone
    python instructgpt.py --methods dpo kto best_of_n         neighbours too, in the same table
    python instructgpt.py label                               you rank answers of the SFT model
    python instructgpt.py chat --models GPT SFT PPO-ptx       they answer your questions side by side
    python instructgpt.py --device cuda --out out_gpu         on a GPU (chosen by itself where there is one)
    python instructgpt.py --init model.safetensors --encoding gpt2 --data mine     from GPT-2, on your data

Ctrl-C saves, and the same command goes on where it was.

Read it beside the paper, top to bottom; you can stop after each section:

    Settings              every hyperparameter: the toy's value, the paper's, who reads it        App. C
    Tokens and data       tiktoken encoding, the corpus, rows of prompt + response                3.2
    GPT                   the decoder, with a language head or a scalar head                      3.5
    Rollout               the batched sampler that keeps the log-probs                            C.4
    Formulas              every equation as a pure function: Eq. 1, KL rewards, GAE, PPO          3.5
    Step 0                pretraining, GPT-3's place
    Step 1                supervised fine-tuning on demonstrations                                C.1, C.3
    Step 2                comparisons and the reward model                                        C.2
    Step 3                PPO and PPO-ptx, Eq. 2                                                  C.4
    Neighbours            REINFORCE, DPO, KTO, best of n on the same data
    Evaluation            preference, truth, manners, bias, the alignment tax; table, picture     4
    On a GPU              the sampler's step as a CUDA graph, bfloat16
    Command line          log, readers of data, checkpoints
    GPT-2 weights         as published: read, checked, turned
    Stages                which needs which, label, chat, flags

What differs from the paper, and why
  * People, customers and the web are simulated (data/toyworld.py), so the true quality, "gold", is known.
  * The models have half a million parameters, the responses at most 16 tokens. So the learning rates, beta
    and the pretraining coefficient are the toy's own; each setting names the paper's value beside it.
  * One SFT model is the baseline, the start of RL and the KL reference. The paper's RL starts from a second
    one (2 epochs, 10 % pretraining mix; C.3, C.4), whose mix ours has; Fig. 37 finds PPO insensitive to the
    epochs and the mix, but for a gain from 10 %.
  * About half of the demonstrations have a flaw on purpose, so that there is something left for RL to mend.
  * The reward model starts from the SFT model (3.5); the paper's final one starts from a GPT-3 tuned on
    public NLP tasks (C.2).
  * The last SFT checkpoint is taken; the paper chose it by reward-model score (C.1).
  * A minibatch carries as many pretraining rows as episodes; in the paper eight times as many.
What the paper does not say, and what we do: GAE's lambda, 0.95, the value's move clipped at 0.2 and
whitened advantages (Ziegler et al. 2019, Stiennon et al. 2020); token losses are means over response
tokens; the prompt is masked in the SFT loss, in which mixed-in rows weigh a tenth; the reward is read at
the end-of-text token and a response that does not end scores -1; gradients are clipped at norm 1; no
dropout in RL; the EMA moves at each optimizer step, the raw weights sample; in the evaluation GPT's
answers, which run on, are cut at a newline.
Left out: FLAN and T0 baselines, the sweeps of appendix E, a second round of comparisons on the PPO policy.
"""
import argparse                                  # the command line
import importlib.util                            # loads data/toyworld.py; readline, where there is one
import json
import math
import os
import random                                    # the labelers' noise
import signal                                    # Ctrl-C
import sys
import time
from base64 import b64decode                     # tiktoken's rank files
from contextlib import contextmanager            # around the reading of checkpoints
from dataclasses import asdict, dataclass, field, fields, replace
from html import escape                          # the picture
from zipfile import ZipFile                      # checkpoints are zip files
from zlib import crc32                           # tells one file of comparisons from another

import numpy as np                               # the corpus is one array
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------------
# Settings (App. C). One line each: the toy's value, what it is, the paper's value. `stage` is the first stage
# (pretrain, sft, rm, ppo, evaluate) that reads it: changing it makes that stage and the later ones stale,
# never the earlier ones; "run" makes none stale.

def setting(default, text, paper=None, stage="run"):
    """A field of Config that knows its help text, the paper's value and its stage."""
    text += f" [paper: {paper}]" if paper else ""
    return field(default=default, metadata={"help": text, "stage": stage})


@dataclass
class Config:
    out: str = setting("out", "folder that the run writes to")
    data: str = setting("", "folder with the data sets; empty: data/ beside this file", stage="pretrain")
    comparisons: str = setting("", "file to learn from; empty: that of --data, or labelers rank", stage="rm")
    device: str = setting("", "cpu, cuda or mps; empty: cuda, if there is one, else cpu")
    dtype: str = setting("float32", "or bfloat16, on a GPU that has it", stage="pretrain")
    save_every: float = setting(30.0, "seconds of training between two saves")
    micro_batch: int = setting(0, "rows at once in training, if a minibatch does not fit; 0: all")
    seed: int = setting(0, "every random draw follows from it; on one CPU equal numbers", stage="pretrain")
    # the model: GPT-3's form in miniature
    n_layer: int = setting(2, "layers", "24 (1.3B) to 96 (175B)", "pretrain")
    n_head: int = setting(2, "attention heads", "24 to 96", "pretrain")
    n_embd: int = setting(128, "width", "2,048 to 12,288", "pretrain")
    block_size: int = setting(64, "context, tokens", "2,048", "pretrain")
    # step 0: pretraining
    init: str = setting("", "file of GPT-2 weights; empty: pretrain from nothing", stage="pretrain")
    encoding: str = setting("", "tiktoken's name (gpt2) or a rank file; empty: --data's", stage="pretrain")
    pretrain_steps: int = setting(2800, "optimizer steps", "300 B tokens (GPT-3)", "pretrain")
    pretrain_batch: int = setting(32, "rows of block_size tokens a step", "1 to 3.2 M tokens", "pretrain")
    pretrain_lr: float = setting(2e-3, "peak learning rate, cosine to a tenth", "2e-4 to 6e-5", "pretrain")
    # step 1: supervised fine-tuning
    sft_epochs: int = setting(3, "passes over the demonstrations", "16 (baseline), 2 (start of RL)", "sft")
    sft_batch: int = setting(32, "demonstrations a step", "32", "sft")
    sft_lr: float = setting(1e-3, "peak learning rate, cosine to a tenth", "9.65e-6, 5e-6", "sft")
    sft_dropout: float = setting(0.0, "residual dropout", "0.2 (baseline)", "sft")
    sft_mix: float = setting(0.1, "share of pretraining rows mixed in, their loss's weight", "0.1", "sft")
    max_new_tokens: int = setting(16, "longest response, end-of-text included", "1,024", "sft")
    # step 2: comparisons and the reward model
    rm_prompts: int = setting(7000, "prompts to collect comparisons for", "33,207", "rm")
    k_min: int = setting(4, "fewest responses to a prompt", "4", "rm")
    k_max: int = setting(9, "most responses to a prompt", "9", "rm")
    rm_epochs: int = setting(1, "passes over the comparisons", "1", "rm")
    rm_batch: int = setting(8, "prompts a step, each with all its pairs", "64", "rm")
    rm_lr: float = setting(6e-4, "peak learning rate, cosine to a tenth", "9e-6", "rm")
    # step 3: reinforcement learning
    iterations: int = setting(60, "PPO iterations", "500", "ppo")
    episodes: int = setting(256, "episodes an iteration", "512", "ppo")
    minibatches: int = setting(8, "minibatches an iteration, a step each, one inner epoch", "8", "ppo")
    policy_lr: float = setting(2e-4, "policy's learning rate", "not stated; 2.55e-6 to 2.55e-5 tried", "ppo")
    value_lr: float = setting(1e-3, "value net's learning rate, fixed", "9e-6", "ppo")
    warmup: int = setting(10, "warm-up iterations from a tenth of the peak, constant after it", "10", "ppo")
    beta: float = setting(0.2, "KL coefficient, in units of score a nat", "0.02", "ppo")
    ptx_coef: float = setting(1.0, "pretraining loss's weight; if not given, 0 is run too", "27.8", "ppo")
    ptx_rows: int = setting(1, "pretraining rows an episode", "8", "ppo")
    cliprange: float = setting(0.2, "PPO's clip of the ratio", "0.2", "ppo")
    value_clip: float = setting(0.2, "clip of the value's move", "not stated; 0.2 in its ancestors", "ppo")
    lam: float = setting(0.95, "GAE's lambda", "not stated; 0.95 in its ancestors", "ppo")
    temperature: float = setting(1.0, "of the rollouts", "1", "ppo")
    ema: float = setting(0.992, "decay of the averaged weights, an optimizer step", "0.992", "ppo")
    unfinished_score: float = setting(-1.0, "score of a response without end", "not stated", "ppo")
    # evaluation
    test_prompts: int = setting(600, "prompts that the models answer", "3,196", "evaluate")
    judges: int = setting(5, "labelers a pair of answers", "1", "evaluate")

# ------------------------------------------------------------------------------------------------------------
# Tokens and data (3.2). A request ends with "\n>" and its reply starts with a space, as on many pages of the
# toy's web; the reply ends with end-of-text. Whatever a user types is encoded as plain text, so it can never
# hold a real end-of-text.

MARK = "\n>"
EOT = "<|endoftext|>"
# GPT-2's pieces: contraction; word, number or signs, with a space before them; blanks, but for that space.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def encode_prompt(enc, text):
    """A request -> its ids, the mark behind it included."""
    return enc.encode_ordinary(text + MARK)


def encode_response(enc, text):
    """A reply -> its ids, the space before it and end-of-text included; without text end-of-text alone."""
    return (enc.encode_ordinary(" " + text) if text else []) + [enc.eot_token]


def corpus_batch(corpus, n, length, generator, device):
    """n random rows of `length` tokens -> (n, length) int64. The corpus is one array of all tokens, and the
    places where documents start: rows begin there, as prompts do."""
    tokens, starts = corpus                                                     # (N,), (documents,)
    chosen = starts[torch.randint(len(starts), (n,), generator=generator).numpy()]   # (n,)
    return torch.from_numpy(tokens[chosen[:, None] + np.arange(length)].astype(np.int64)).to(device)


def stack(prompts, responses, device):
    """Rows of prompt + response in the action frame, filled up on the right with id 0, which nothing reads.
    prompts, responses: B lists of ids -> tokens (B,T), mask (B,T-1) bool, last (B,) index of the last token.

        tokens      p0   p1   p2   r0   r1  EOS    0   Column t of log-probs, values, rewards and mask speaks
        column       0    1    2    3    4    5        of the prediction of token t+1, made in the state
        predicts    p1   p2   r0   r1  EOS    0        "tokens 0..t". The mask is True where token t+1 belongs
        mask         .    .    x    x    x    .        to the response, and EOS does.
    """
    p = torch.tensor([len(x) for x in prompts])                                 # (B,)
    n = p + torch.tensor([len(y) for y in responses])                           # (B,)
    tokens = torch.zeros(len(prompts), int(n.max()), dtype=torch.long)          # (B,T)
    for row, x, y in zip(tokens, prompts, responses):
        row[:len(x) + len(y)] = torch.tensor(x + y)
    column = torch.arange(tokens.size(1) - 1)                                   # (T-1,)
    mask = (column >= p[:, None] - 1) & (column < n[:, None] - 1)               # (B,T-1)
    return tokens.to(device), mask.to(device), (n - 1).to(device)


def batches(lengths, size, epochs, generator):
    """Random batches of indices for some epochs, each of rows of about one length, so that little is spent on
    filler: shuffle, sort stretches of eight batches by length, cut, shuffle the batches."""
    plan, n = [], len(lengths)
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)                          # (n,)
        order = [i for part in order.split(8 * size) for i in sorted(part.tolist(), key=lengths.__getitem__)]
        cut = [order[s:s + size] for s in range(0, n, size)]
        plan += [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
    return plan


# ------------------------------------------------------------------------------------------------------------
# GPT (3.5): GPT-2's decoder, and GPT-3's but for its sparse attention. The parameters have GPT-2's names.


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    gelu: str = "none"                           # F.gelu(approximate=): exact erf, and fast; GPT-2 has "tanh"


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(c.n_embd, 3 * c.n_embd), nn.Linear(c.n_embd, c.n_embd)
        self.n_head = c.n_head

    def forward(self, x, cache=None, slots=None, bias=None):
        """x (B,T,C) -> (B,T,C). Decoding, T is 1: the cache (2,B,its T,H,C/H) holds keys and values so far,
        slots (B,) are the places in it for the new ones, bias (B,1,1,width) hides what comes later. With a
        cache but no bias the tokens are a prompt's, and fill the cache's first T places."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)       # (B,T,3,H,C/H)
        q, k, v = (y.transpose(1, 2) for y in qkv.unbind(2))                    # (B,H,T,C/H) each
        if cache is not None and bias is None:             # prefill: keep the prompt's keys and values
            cache[:, :, :T] = qkv[:, :, 1:].movedim(2, 0)
        elif cache is not None:                            # decode: each row writes at its own position
            cache.flatten(1, 2).index_copy_(1, slots, qkv[:, 0, 1:].transpose(0, 1))    # (2,B,H,C/H) go in
            k, v = cache[:, :, :bias.size(-1)].transpose(2, 3)                  # (B,H,width,C/H) each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))                  # (B,T,C)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, width = c, c.n_embd
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), Attention(c)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, *cached, keep=None):
        """x (B,T,C) -> (B,T,C); with keep (B,T) bool its N entries alone, (N,C), go through the MLP."""
        drop = lambda y: F.dropout(y, self.c.dropout, self.training)
        x = x + drop(self.attn(self.ln_1(x), *cached))
        x = x if keep is None else x[keep]                                      # (B,T,C) or (N,C)
        inner = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate=self.c.gelu)    # (B,T,4C) or (N,4C)
        return x + drop(self.mlp.c_proj(inner))


class GPT(nn.Module):
    """Decoder with learned positions.

    head="lm": logits over the vocabulary, tied to the embedding.
    head="scalar": one number a position (reward model, value net); the unembedding is replaced by a
    projection to a scalar (3.5)."""

    def __init__(self, config, head="lm"):
        super().__init__()
        c = self.config = config
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd)
        for name, p in self.named_parameters():            # smaller where a layer adds to the residual stream
            if p.ndim == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) if residual else 0.02)
                if name.startswith("h."):                  # in memory (in,out): faster for few rows on a CPU
                    p.data = p.data.t().contiguous().t()
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.kept = {}                                     # the rollout's: see "On a GPU"
        self.head = nn.Linear(c.n_embd, 1) if head == "scalar" else None
        if self.head:
            nn.init.normal_(self.head.weight, std=1 / math.sqrt(c.n_embd + 1))  # Stiennon et al. 2020
            nn.init.zeros_(self.head.bias)

    def hidden(self, tokens, cache=None, position=None, width=None, keep=None):
        """(B,T) -> (B,T,C) or, with keep, (N,C). Without position the tokens stand at 0..T-1, and a cache
        keeps their keys and values. With position (B,1): one token a row, which sees the columns
        0..position of the cache's first `width`."""
        slots = bias = None
        if position is None:
            if tokens.size(1) > self.config.block_size:
                raise ValueError(f"{tokens.size(1)} tokens exceed the block of {self.config.block_size}")
            position = torch.arange(tokens.size(1), device=tokens.device)       # (T,)
        else:
            _, B, T, _, _ = cache[0].shape                 # T is the cache's
            slots = torch.arange(B, device=tokens.device) * T + position[:, 0]  # (B,)
            later = torch.arange(width, device=tokens.device) > position        # (B,width)
            bias = (-1e30 * later[:, None, None]).to(cache[0].dtype)            # (B,1,1,width) for all layers
        x = self.wte(tokens) + self.wpe(position)                               # (B,T,C), decoding (B,1,C)
        for i, block in enumerate(self.h):
            keys_values = None if cache is None else cache[i]
            x = block(x, keys_values, slots, bias, keep=keep if block is self.h[-1] else None)
        return self.ln_f(x)

    def project(self, x):
        """(...,C) -> logits (...,vocab) or, with the scalar head, (...), in float32 as rewards have to be."""
        if self.head:
            with torch.autocast(x.device.type, enabled=False):
                return self.head(x.float()).squeeze(-1)
        w = self.wte.weight                                                     # (vocab,C)
        if not torch.is_autocast_enabled(x.device.type):
            return F.linear(x, w)
        padded = F.pad(w, (0, 0, 0, -len(w) % 64))         # bfloat16 wants widths that 64 divides
        return F.linear(x, padded)[..., :len(w)]

    def forward(self, tokens, keep=None):
        """tokens (B,T) -> logits (B,T,vocab) or, with the scalar head, (B,T); with keep (B,T) bool only its N
        entries, (N,vocab) or (N,): what is not read needs no last MLP and no head, and these are dear."""
        return self.project(self.hidden(tokens, keep=keep))

    def new_cache(self, B, T):
        """Keys and values of each layer: a list of (2,B,T,H,C/H), written in place."""
        c, w = self.config, self.wte.weight
        shape = 2, B, T, c.n_head, c.n_embd // c.n_head
        return [torch.zeros(shape, dtype=w.dtype, device=w.device) for _ in self.h]


def copy_of(model, head=None, dropout=0.0):
    """Another model with the same weights; with another head than the model's, that one is fresh."""
    other = GPT(replace(model.config, dropout=dropout), head or ("scalar" if model.head else "lm"))
    other.load_state_dict(model.state_dict(), strict=False)
    return other.to(model.wte.weight.device)


def freeze(model):
    """For reference and reward model: no gradients, no dropout."""
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# Rollout (C.4). The whole batch decodes together, one token a step, prompts of any length: every row
# keeps its own position in a cache of fixed size. So no shape need change between steps and no step waits
# for the host, and a GPU can replay the step as a graph ("On a GPU", below). Random numbers are drawn before
# the loop, and a token is picked by walking its row's cumulative distribution: on a CPU ten times cheaper
# than torch.multinomial, and the same numbers give every model the same luck.

@dataclass
class Rollout:
    tokens: torch.Tensor                         # (B,T) prompt, response, 0s
    mask: torch.Tensor                           # (B,T-1) bool, action frame: token t+1 is a response token
    logprobs: torch.Tensor                       # (B,T-1) nats, as sampled from; 0 outside the mask
    prompt_lens: torch.Tensor                    # (B,)
    ended: torch.Tensor                          # (B,) bool: EOS was sampled

    def responses(self):
        """The response ids of each row (EOS included), as lists."""
        return [t[1:][m].tolist() for t, m in zip(self.tokens.cpu(), self.mask.cpu())]


def log_softmax(logits, temperature):
    """In float32, whatever the model's type. Dividing by 1 would cost a pass over all the logits."""
    return F.log_softmax(logits.float() if temperature == 1 else logits.float() / temperature, dim=-1)


def pick(logits, u, temperature):
    """logits (B,V), uniforms u (B,) -> token (B,), its log-prob (B,). Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(u)      # (B,), (B,): a certain choice
    logprobs = log_softmax(logits, temperature)                                 # (B,V)
    cdf = logprobs.exp().cumsum(-1)                                             # (B,V)
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)      # (B,1) the first with cdf > u
    token = token.clamp(max=logits.size(-1) - 1)           # NaN logits find no place
    return token[:, 0], logprobs.gather(1, token)[:, 0]


def new_state(policy, B, T, n):
    """Buffers of a rollout of B rows of T tokens, n of them new at most."""
    new = lambda *shape, dtype=torch.long: torch.zeros(shape, dtype=dtype, device=policy.wte.weight.device)
    return {"tokens": new(B, T), "at": new(B, 1), "step": new(1), "alive": new(B, dtype=torch.bool),
            "mask": new(B, T - 1, dtype=torch.bool), "logprobs": new(B, T - 1, dtype=torch.float),
            "uniforms": new(n, B, dtype=torch.float), "cache": policy.new_cache(B, T)}


def decode_step(policy, s, width, eos, temperature):
    """One token for every row. The state s is a dict of tensors of fixed shape that are written in place."""
    at, alive = s["at"], s["alive"]                        # (B,1) place of the newest token, (B,) no EOS yet
    x = policy.hidden(s["tokens"].gather(1, at), s["cache"], at, width)         # (B,1,C)
    u = s["uniforms"].index_select(0, s["step"])[0]                             # (B,)
    token, logprob = pick(policy.project(x)[:, 0], u, temperature)              # (B,), (B,)
    s["tokens"].scatter_(1, at + 1, token.masked_fill(~alive, 0)[:, None])
    s["logprobs"].scatter_(1, at, logprob.masked_fill(~alive, 0)[:, None])
    s["mask"].scatter_(1, at, alive[:, None])
    alive &= token != eos
    at += 1
    s["step"] += 1


@torch.no_grad()
def rollout(policy, prompts, max_new_tokens, eos, temperature=1.0, generator=None, graphs=None):
    """Samples one response to each prompt.

    prompts: B non-empty lists of ids, any lengths. A response ends with `eos` or after max_new_tokens.
    graphs: replay the step as a CUDA graph; None: if there is CUDA. Under autocast a bfloat16 copy samples.
    Returns a Rollout with T = longest prompt + max_new_tokens; ValueError if T is above the block size.
    """
    policy.eval()                                          # dropout would make it another policy
    device, B, P = policy.wte.weight.device, len(prompts), max(map(len, prompts))
    T, block, n = P + max_new_tokens, policy.config.block_size, max_new_tokens
    if T > block or min(map(len, prompts)) == 0:
        raise ValueError(f"a prompt needs 1 to {block - n} tokens: {n} more must fit the block of {block}")
    policy = low_precision(policy) if torch.is_autocast_enabled(device.type) else policy
    with torch.autocast(device.type, enabled=False):       # its casts would be done again at every step
        width, graph = T, None
        if device.type == "cuda" if graphs is None else graphs:
            width = min(block, math.ceil(T / 16) * 16)     # few shapes, aligned rows
            s, graph = captured(policy, B, width, n, eos, temperature)
        if graph is None:
            s = new_state(policy, B, width, n)
        tokens, _, _ = stack(prompts, [[0] * (width - len(p)) for p in prompts], device)       # (B,width)
        lens = torch.tensor([len(p) for p in prompts], device=device)           # (B,)
        luck = torch.rand(n, B, generator=generator, device=device)             # (n,B)
        for name, value in dict(tokens=tokens, at=lens[:, None] - 1, uniforms=luck, step=0, alive=True,
                                mask=False, logprobs=0).items():
            s[name][:] = value
        # Prefill: fills the cache; no output is kept (no id is below 0). A row's last token is fed below. A
        # shorter row's filler goes in too, but stays hidden until the row's own tokens overwrite it.
        if P > 1:
            policy.hidden(tokens[:, :P - 1], s["cache"], keep=tokens[:, :P - 1] < 0)
        for i in range(n):
            seen = P + i if device.type == "cpu" else width
            graph.replay() if graph else decode_step(policy, s, seen, eos, temperature)
            if i % 4 == 3 and not s["alive"].any():        # the one look at the device, every fourth step
                break
        tokens, mask, logprobs = (s[k].clone() for k in ("tokens", "mask", "logprobs"))    # s is used again
    return Rollout(tokens[:, :T], mask[:, :T - 1], logprobs[:, :T - 1], lens, ~s["alive"])


# ------------------------------------------------------------------------------------------------------------
# Formulas: pure functions that the loops below and the tests call. B rows, T tokens, K responses;
# action frame; logarithms are natural, so KL is in nats. What stands in a masked slot must not matter,
# be it NaN: inputs are cleared before the arithmetic, because a gradient would carry NaN through a
# mask that comes after it.

def clear(mask, *tensors):
    """The tensors with 0 outside the mask."""
    return [x.masked_fill(~mask, 0) for x in tensors]


def masked_mean(x, mask):
    """Mean of x where mask is True (0 if nowhere)."""
    return clear(mask, x)[0].sum() / mask.sum().clamp(min=1)


def whiten(x, mask):
    """(x - mean) / std over the mask, population variance, 0 outside. One element is safe."""
    x, = clear(mask, x)
    x = x - masked_mean(x, mask)
    return clear(mask, x * torch.rsqrt(masked_mean(x ** 2, mask) + 1e-8))[0]


def token_logprobs(model, tokens, temperature=1.0, mask=None):
    """log pi(token t+1 | tokens 0..t): (B,T) -> (B,T-1). The temperature is the sampler's: what is scored
    must be what was sampled from. With a mask (B,T-1) only its N entries are computed and go back to their
    places; elsewhere stands 0."""
    # the last token predicts nothing; it is fed all the same, and what it says of an id 0 is cut off last: to
    # cut logits copies them all, and attention is faster at 64 places than at 63
    targets = F.pad(tokens[:, 1:], (0, 1)) if mask is None else tokens[:, 1:][mask]            # (B,T) or (N,)
    logits = model(tokens) if mask is None else model(tokens, F.pad(mask, (0, 1)))      # (B,T,V) or (N,V)
    y = log_softmax(logits, temperature).gather(-1, targets[..., None])[..., 0]         # (B,T) or (N,)
    return y[:, :-1] if mask is None else torch.zeros_like(mask, dtype=torch.float).masked_scatter(mask, y)


def token_values(value_net, tokens, mask):
    """V of the states in which the response tokens are chosen: (B,T) -> (B,T-1), 0 outside the mask."""
    values = value_net(tokens, F.pad(mask, (0, 1)))                             # (N,)
    return torch.zeros_like(mask, dtype=torch.float).masked_scatter(mask, values)


def lm_loss(model, tokens, mask=None):
    """Next-token loss, nats a token: over all tokens, or over the response tokens alone (SFT)."""
    logprobs = token_logprobs(model, tokens, 1.0, mask)                         # (B,T-1)
    return -logprobs.mean() if mask is None else -masked_mean(logprobs, mask)


def reward_scores(reward_model, tokens, last):
    """r_theta(x, y): the score read at index last (B,) of each row (its EOS, if it ended): (B,T) -> (B,)."""
    read = torch.arange(tokens.size(1), device=tokens.device) == last[:, None]  # (B,T)
    return reward_model(tokens, read)


def reward_loss(scores, ranks):
    """Eq. 1. scores (B,K); ranks (B,K) int, 1 = best, equal = tie, 0 = empty slot -> scalar, nats.

        loss = - 1/C(K,2)  sum over pairs  log sigma( r(x, y_w) - r(x, y_l) ),   mean over prompts

    All pairs of a prompt are one batch element: each response costs one forward pass instead of K-1, and is
    not met K-1 times in shuffled pairs, which overfits within an epoch (3.5). Tied pairs drop out and C(K,2)
    becomes the number of pairs kept, so every prompt weighs the same; one without a pair is left out."""
    scores = scores.masked_fill(ranks == 0, 0)
    better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0)  # (B,K,K) i beats j
    margin = scores[:, :, None] - scores[:, None, :]                            # (B,K,K)
    pairs = better.sum((1, 2))                                                  # (B,)
    loss = -clear(better, F.logsigmoid(margin))[0].sum((1, 2)) / pairs.clamp(min=1)            # (B,)
    return masked_mean(loss, pairs > 0)


def kl_k1(logprobs, ref_logprobs):
    """log pi/pi_ref of a sample from pi: its mean is KL(pi || pi_ref), but one value may be
    negative. The reward uses it."""
    return logprobs - ref_logprobs


def kl_k3(logprobs, ref_logprobs):
    """pi_ref/pi - 1 - log pi_ref/pi of a sample from pi: the same mean, never negative. The log shows it.
    What was sampled from stands in the denominator."""
    return torch.expm1(ref_logprobs - logprobs) - (ref_logprobs - logprobs)


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """Eq. 2's bracket, token by token: -beta * log(pi/pi_SFT) at each response token, the score at the last.
    scores (B,), the rest (B,T-1) -> (B,T-1); a row sums to score - beta * log( pi(y|x) / pi_SFT(y|x) )."""
    logprobs, ref_logprobs = clear(mask, logprobs, ref_logprobs)
    last = mask & ~F.pad(mask[:, 1:], (0, 1))                                   # (B,T-1) EOS, if it ended
    return -beta * kl_k1(logprobs, ref_logprobs) + clear(last, scores[:, None].expand(last.shape))[0]


def gae(rewards, values, mask, discount=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016); the paper does not discount (C.4).

        delta_t = R_t + discount * V_{t+1} - V_t
        A_t = delta_t + discount * lam * A_{t+1},   return_t = A_t + V_t

    After the last response token V and A are 0: the episode is over, finished or not. All are (B,T-1)."""
    rewards, values = clear(mask, rewards, values)
    advantages = torch.zeros_like(values)                                       # (B,T-1)
    next_value = next_advantage = torch.zeros_like(values[:, 0])                # (B,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + discount * next_value - values[:, t]            # (B,)
        next_advantage = torch.where(mask[:, t], delta + discount * lam * next_advantage, 0.)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """PPO's clipped surrogate, negated: - mean min( rho A, clip(rho, 1-eps, 1+eps) A ) with rho = pi/pi_old.
    All (B,T-1) -> scalar."""
    logprobs, old_logprobs, advantages = clear(mask, logprobs, old_logprobs, advantages)
    ratio = torch.exp(logprobs - old_logprobs)                                  # (B,T-1)
    clipped = ratio.clamp(1 - clip, 1 + clip)                                   # (B,T-1)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """1/2 mean max( (V - return)^2, (V clipped to V_old +- eps - return)^2 ). All (B,T-1) -> scalar."""
    values, old_values, returns = clear(mask, values, old_values, returns)
    clipped = old_values + (values - old_values).clamp(-clip, clip)             # (B,T-1)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


@torch.no_grad()
def ema_update(average, model, decay):
    """w_ema <- decay * w_ema + (1 - decay) * w  (C.4: 0.992)."""
    for a, p in zip(average.parameters(), model.parameters()):
        a.lerp_(p, 1 - decay)


def cosine(step, steps, warmup=0):
    """Learning rate's factor: a cosine from 1 to 0.1 (C.1, C.2), in pretraining after a linear warm-up."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * min(1, (step - warmup) / max(1, steps - 1 - warmup)))


def warmup_factor(iteration, warmup):
    """RL's learning rate: from a tenth to the peak over the first iterations, constant after them (C.4)."""
    return 0.1 + 0.9 * min(1, iteration / warmup) if warmup else 1.0


# ------------------------------------------------------------------------------------------------------------
# What every training loop needs. Two things are handed to the loops from outside. `log` (class Log, below):
# log(stage, step, steps, name=number, ...) writes a line, log.episodes(...) that of a PPO iteration;
# log.steps(stage, steps, name=object, ...) counts the steps, saves the objects that change now and then, and
# goes on from there after a stop. `world` is data/toyworld.py: check (the verdict on an answer), gold (its
# true quality), make_labelers, rank, likert.


def seed(cfg, name, device="cpu"):
    """The generator of one stage; PyTorch's own is seeded along with it (initial weights, dropout)."""
    number = cfg.seed * 100 + sum(map(ord, name)) % 97
    torch.manual_seed(number)
    return torch.Generator(device).manual_seed(number)


class NotFinite(Exception):
    """A number became NaN or infinite: the run stops and says where."""


def finite(name, x):
    """The tensor, if all of it is finite; else NotFinite."""
    if not x.isfinite().all():
        raise NotFinite(f"{name} became {x[~x.isfinite()].flatten()[0].item()}")
    return x


def adamw(model, lr):
    """Adam with the paper's betas (App. C)."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0,
                             fused=model.wte.weight.device.type != "mps")


def accumulate(loss, weights, size=0):
    """Backward of a mean over B rows, `size` of them at a time (0: all) where not all fit at once. loss(slice
    of rows) is the mean over a part; weights (B,) say what a row counts in it: in SFT its response tokens, in
    pretraining 1. Returns the mean over all."""
    total, size = 0., size or len(weights)
    for rows in (slice(start, start + size) for start in range(0, len(weights), size)):
        part = loss(rows) * (weights[rows].sum() / weights.sum())
        with torch.autocast(part.device.type, enabled=False):  # backward knows its types from the forward
            finite("the loss", part).backward()
        total += part.detach()
    return total


def clip_and_step(model, optimizer, lr):
    """One optimizer step at this learning rate on the gradients that are there, clipped at norm 1."""
    finite("the gradient's norm", nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    model.zero_grad()


# ------------------------------------------------------------------------------------------------------------
# Step 0, pretraining: the place of GPT-3. The paper starts from a trained model; ours learns the toy's web.


def pretrain(cfg, enc, corpus, device, log):
    """A GPT trained from nothing on the corpus: next-token loss, warm-up and cosine."""
    generator, steps = seed(cfg, "pretrain"), cfg.pretrain_steps
    gpt = GPT(GPTConfig(enc.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)).to(device)
    optimizer = adamw(gpt, cfg.pretrain_lr)
    for step in log.steps("pretrain", steps, model=gpt, optimizer=optimizer, generator=generator):
        rows = corpus_batch(corpus, cfg.pretrain_batch, cfg.block_size, generator, device)     # (B,block)
        loss = accumulate(lambda i: lm_loss(gpt, rows[i]), torch.ones(len(rows)), cfg.micro_batch)
        clip_and_step(gpt, optimizer, cfg.pretrain_lr * cosine(step, steps, warmup=min(50, steps // 10)))
        if (step + 1) % 10 == 0:
            log("pretrain", step + 1, steps, loss=loss.item())
    return freeze(gpt)


# ------------------------------------------------------------------------------------------------------------
# Step 1, supervised fine-tuning (3.5, C.1, C.3): imitate the labelers' demonstrations, of which only the
# response tokens count. 10 % pretraining rows are mixed in, with a tenth of the weight, against forgetting.


def sft(cfg, enc, gpt, demos, corpus, device, log):
    """demos: list of (prompt ids, response ids). The SFT model: baseline, start of RL and KL reference."""
    generator = seed(cfg, "sft")
    model = copy_of(gpt, dropout=cfg.sft_dropout).train()
    mixed = math.ceil(cfg.sft_batch * cfg.sft_mix / (1 - cfg.sft_mix))         # pretraining rows a step
    lengths, optimizer = [len(x) + len(y) for x, y in demos], adamw(model, cfg.sft_lr)
    plan = batches(lengths, cfg.sft_batch, cfg.sft_epochs, generator)
    for step in log.steps("sft", len(plan), model=model, optimizer=optimizer, generator=generator):
        tokens, mask, _ = stack(*zip(*(demos[i] for i in plan[step])), device)  # (B,T), (B,T-1)
        loss = accumulate(lambda i: lm_loss(model, tokens[i], mask[i]), mask.sum(1), cfg.micro_batch)
        if mixed:
            rows = corpus_batch(corpus, mixed, cfg.block_size, generator, device)              # (mixed,block)
            accumulate(lambda i: cfg.sft_mix * lm_loss(model, rows[i]), torch.ones(mixed), cfg.micro_batch)
        clip_and_step(model, optimizer, cfg.sft_lr * cosine(step, len(plan)))
        log("sft", step + 1, len(plan), loss=loss.item())
    return freeze(copy_of(model))                          # no dropout from here on


# ------------------------------------------------------------------------------------------------------------
# Step 2, the reward model (3.5, C.2). The SFT model answers each prompt K times, a labeler ranks the answers,
# and a model with a scalar head learns Eq. 1.


def respond(policy, enc, prompts, max_new_tokens, generator, temperature=1.0, one_line=False, lengths=None,
            size=256):
    """A response to each prompt (ids) -> list of {"ids", "text", "ended", "logprobs"} in the same order.
    `one_line` cuts at the first newline: our way to end GPT's answers, which run on; the paper cuts so in its
    public tasks (4.2). Rows of about one length go together: the prompts' length, or the one given."""
    out, eos = [None] * len(prompts), enc.eot_token
    order = sorted(range(len(prompts)), key=(lengths or [len(x) for x in prompts]).__getitem__)
    for part in (order[s:s + size] for s in range(0, len(order), size)):
        r = rollout(policy, [prompts[i] for i in part], max_new_tokens, eos, temperature, generator)
        for i, ids, logprobs, mask in zip(part, r.responses(), r.logprobs.cpu(), r.mask.cpu()):
            stops = [n for n, t in enumerate(ids) if t == eos or one_line and "\n" in enc.decode([t])]
            ids = ids[:stops[0] + 1] if stops else ids
            text = enc.decode(ids[:-1] if stops else ids).removeprefix(" ")
            out[i] = {"ids": ids, "text": text, "ended": bool(stops),
                      "logprobs": logprobs[mask][:len(ids)].tolist()}
    return out


def collect(cfg, enc, policy, rows, world, generator, rng, log, size=512):
    """Comparisons for the prompts: K responses each, ranked by one labeler, and on validation prompts by a
    second one too, which measures how well people agree. comparisons.jsonl holds them as they are."""
    people, out = world.make_labelers("train"), []
    plan = [(p, rng.randint(cfg.k_min, cfg.k_max)) for p in rows]
    plan = [plan[s:s + size] for s in range(0, len(plan), size)]
    for step in log.steps("collect", len(plan), out=out, generator=generator, rng=rng):
        prompts = [encode_prompt(enc, p["prompt"]) for p, k in plan[step] for _ in range(k)]
        answers = iter(respond(policy, enc, prompts, cfg.max_new_tokens, generator))
        for p, k in plan[step]:
            mine = [next(answers) for _ in range(k)]
            texts, ended = [r["text"] for r in mine], [r["ended"] for r in mine]
            merits = [world.check(p["task"], text, end) for text, end in zip(texts, ended)]
            one, two = rng.sample(people, 2)
            c = {"prompt": p["prompt"], "responses": texts, "ranks": world.rank(one, merits, texts, rng),
                 "labeler": one.name, "ended": ended, "split": p["split"], "use_case": p["use_case"],
                 "task": p["task"], "gold": [round(world.gold(m), 2) for m in merits]}
            if p["split"] == "valid":
                c["second_ranks"] = world.rank(two, merits, texts, rng)
            out.append(c)
        log("collect", step + 1, len(plan), prompts=len(out))
    policy.kept.clear()                          # a GPU's buffers
    return out


def encode_comparison(enc, c, longest):
    """A comparison -> (prompt ids, K lists of at most `longest` response ids, K ranks). Of equal
    texts only the first is kept (rank 0 for the others): a pair of them would teach noise. Without
    an end there is no EOS, but where there is nothing else, as a score must be read somewhere."""
    encoded = zip([encode_response(enc, text) for text in c["responses"]], c["ended"])
    responses = [(r if end else r[:-1])[:longest] or [enc.eot_token] for r, end in encoded]
    ranks = [0 if responses.index(r) < i else rank for i, (r, rank) in enumerate(zip(responses, c["ranks"]))]
    return encode_prompt(enc, c["prompt"]), responses, ranks


def encode_comparisons(enc, comparisons, longest):
    """One by one the encoded comparisons that hold at least one pair: answers of unequal text and rank."""
    for c in comparisons:
        encoded = encode_comparison(enc, c, longest)
        if len({rank for rank in encoded[2] if rank}) > 1:
            yield encoded


def score_comparisons(reward_model, batch, device):
    """Encoded comparisons -> scores (B,K), ranks (B,K), K the most of any prompt. One forward a response."""
    flat = [(b, k, x, y) for b, (x, ys, ranks) in enumerate(batch) for k, y in enumerate(ys) if ranks[k]]
    b, k, prompts, responses = zip(*flat)
    tokens, _, last = stack(prompts, responses, device)                         # (N,T), (N,)
    K = max(len(ranks) for _, _, ranks in batch)
    slots = torch.tensor(b, device=device), torch.tensor(k, device=device)      # (N,), (N,)
    scores = torch.zeros(len(batch), K, device=device)                          # (B,K)
    scores = scores.index_put(slots, reward_scores(reward_model, tokens, last))
    return scores, torch.tensor([ranks + [0] * (K - len(ranks)) for _, _, ranks in batch], device=device)


def train_reward_model(cfg, enc, model, comparisons, demos, device, log, name="rm"):
    """The reward model, from the SFT model, on all pairs of each prompt; one epoch, as more overfit (C.2)."""
    generator, reward_model = seed(cfg, name), copy_of(model, head="scalar").train()
    data = list(encode_comparisons(enc, comparisons, cfg.max_new_tokens))
    lengths, optimizer = [len(x) for x, _, _ in data], adamw(reward_model, cfg.rm_lr)
    plan = batches(lengths, cfg.rm_batch, cfg.rm_epochs, generator)
    size = cfg.micro_batch and max(1, cfg.micro_batch // cfg.k_max)    # prompts, of up to k_max rows each
    for step in log.steps(name, len(plan), model=reward_model, optimizer=optimizer):
        batch = [data[i] for i in plan[step]]
        eq1 = lambda i: reward_loss(*score_comparisons(reward_model, batch[i], device))
        loss = accumulate(eq1, torch.ones(len(batch)), size)
        clip_and_step(reward_model, optimizer, cfg.rm_lr * cosine(step, len(plan)))
        log(name, step + 1, len(plan), loss=loss.item())
    normalise_reward(reward_model, demos, device)
    return freeze(reward_model)


@torch.no_grad()
def normalise_reward(reward_model, demos, device):
    """Eq. 1 fixes only differences, so the bias may be shifted: demonstrations score 0 on average (3.5)."""
    parts = [stack(*zip(*demos[s:s + 256]), device) for s in range(0, len(demos), 256)]
    scores = [reward_scores(reward_model, tokens, last) for tokens, _, last in parts]           # (256,) each
    reward_model.head.bias -= torch.cat(scores).mean()


# ------------------------------------------------------------------------------------------------------------
# Step 3, reinforcement learning (3.5, C.4): Eq. 2 by PPO. The environment is a bandit: a customer's prompt,
# one response, one reward.
#
#     maximise  E[ r(x,y) - beta * log( pi(y|x) / pi_SFT(y|x) ) ]  +  gamma * E_pretrain[ log pi(x) ]  (Eq. 2)
#
# gamma is ptx_coef here (ptx: the pretraining mix; it weighs a mean over tokens) and has nothing to do with a
# discount. With 0 this is PPO; else the pretraining gradient joins every optimizer step, which is PPO-ptx.


def cut(e, rows, *names):
    """Rows of the episodes, cut to the longest of them: tokens (b,t) and the named tensors, (b,t-1) each."""
    t = int(e["length"][rows].max())
    return [e["tokens"][rows, :t]] + [e[name][rows, :t - 1] for name in names]


def by_length(f, e):
    """f of all episodes, a few of about one length at a time, put back in their places: f maps tokens (b,t),
    mask (b,t-1) and lengths (b,) to (b,), one number a row, or to (b,t-1), which stays 0 beyond t-1."""
    out, size = None, 16 if e["tokens"].device.type == "cpu" else 64           # a few stay in a CPU's cache
    for rows in e["length"].argsort().split(size):                              # (b,)
        tokens, mask = cut(e, rows, "mask")                                     # (b,t), (b,t-1)
        y = f(tokens, mask, e["length"][rows])
        out = y.new_zeros(len(e["tokens"]), *e["mask"].shape[1:y.ndim]) if out is None else out
        out[(rows, slice(mask.size(1)))[:y.ndim]] = y      # out[rows] = y or out[rows, :t - 1] = y
    return out


@torch.no_grad()
def make_experience(cfg, enc, policy, value_net, reference, reward_model, prompts, generator, estimate=gae):
    """A batch of episodes with all that the update needs, each computed once."""
    # 1. Sample with the current policy: these log-probs are those of pi_old (in bfloat16 too, rounded as
    # they were sampled from).
    t0 = time.time()
    r = rollout(policy, prompts, cfg.max_new_tokens, enc.eot_token, cfg.temperature, generator)
    e = {"tokens": r.tokens, "mask": r.mask, "logprobs": r.logprobs, "ended": r.ended,
         "length": r.prompt_lens + r.mask.sum(1), "tokens_per_second": int(r.mask.sum()) / (time.time() - t0)}
    # 2. Score the whole response at its EOS; one that did not end gets the fixed score.
    scores = by_length(lambda x, m, n: reward_scores(reward_model, x, n - 1), e)                # (B,)
    scores = torch.where(r.ended, finite("a score of the reward model", scores), cfg.unfinished_score)
    # 3. The reference's log-probs, the KL penalty of each token, the score at the last one.
    ref = by_length(lambda x, m, n: token_logprobs(reference, x, cfg.temperature, m), e)        # (B,T-1)
    rewards = token_rewards(scores, r.logprobs, ref, r.mask, cfg.beta)          # (B,T-1)
    # 4. Values of the states, advantages (whitened over the whole batch) and returns.
    values = by_length(lambda x, m, n: token_values(value_net, x, m), e)        # (B,T-1)
    advantages, returns = estimate(rewards, values, r.mask, 1.0, cfg.lam)       # (B,T-1) each
    return {**e, "scores": scores, "ref_logprobs": ref, "rewards": rewards, "values": values,
            "raw_advantages": advantages, "advantages": whiten(advantages, r.mask), "returns": returns}


def update(cfg, policy, value_net, optimizers, e, rows, ptx_coef, text, warm):
    """One minibatch of the episodes e, and the rows of pretraining text that go with it: an optimizer step
    for the policy, at `warm` times its learning rate, and one for the value net. Returns numbers to log."""
    weights, changes = e["mask"][rows].sum(1), []          # (b,) response tokens; log pi/pi_old of each

    def surrogate(i):
        """PPO's loss of the rows i of this minibatch."""
        tokens, mask, old, advantages = cut(e, rows[i], "mask", "logprobs", "advantages")
        logprobs = token_logprobs(policy, tokens, cfg.temperature, mask)        # (b,t-1)
        changes.append((logprobs.detach() - old)[mask])                         # (tokens,)
        return policy_loss(logprobs, old, advantages, mask, cfg.cliprange)

    def error(i):
        """The value net's loss of the same rows."""
        tokens, mask, old, returns = cut(e, rows[i], "mask", "values", "returns")
        return value_loss(token_values(value_net, tokens, mask), old, returns, mask, cfg.value_clip)

    grads = lambda: [p.grad for p in policy.parameters()]  # _foreach_: one call for all of them
    norm = lambda: torch.stack(torch._foreach_norm(grads())).norm().item()
    # 5. PPO's gradient ...
    accumulate(surrogate, weights, cfg.micro_batch)
    norms = {"|ppo|": norm(), "|ptx|": 0.0}
    # 6. ... and the pretraining gradient, for one optimizer step on the sum, Eq. 2 (C.4).
    if ptx_coef:
        ppo_grads = grads()                                # set aside, so that each norm can be logged
        policy.zero_grad()
        accumulate(lambda i: ptx_coef * lm_loss(policy, text[i]), torch.ones(len(text)), cfg.micro_batch)
        norms["|ptx|"] = norm()
        torch._foreach_add_(grads(), ppo_grads)
    clip_and_step(policy, optimizers[0], cfg.policy_lr * warm)
    # 7. The value net, a network of its own.
    loss = accumulate(error, weights, cfg.micro_batch)
    clip_and_step(value_net, optimizers[1], cfg.value_lr)
    change = torch.cat(changes)                                                 # (tokens of the minibatch,)
    return {**norms, "vloss": loss.item(), "change": change.abs().max().item(),
            "clip": ((change.exp() - 1).abs() > cfg.cliprange).float().mean().item()}


def ppo(cfg, enc, sft_model, reward_model, prompts, corpus, ptx_coef, device, log, estimate=gae):
    """RL from the SFT model against the reward model. prompts: list of {"ids", "task"} (the task is for the
    log alone); estimate: where advantages come from. Returns the EMA of the policy."""
    name = estimate.__name__ if estimate is not gae else "ppo_ptx" if ptx_coef else "ppo"
    generator, draw = seed(cfg, name), seed(cfg, name + " rollout", device)
    reference, policy, average = freeze(sft_model), copy_of(sft_model), freeze(copy_of(sft_model))
    value_net = copy_of(freeze(reward_model))              # starts as the reward model (3.5)
    optimizers = adamw(policy, cfg.policy_lr), adamw(value_net, cfg.value_lr)
    plan = torch.cat([torch.randperm(len(prompts), generator=generator)            # every pass in a new order
                      for _ in range(math.ceil(cfg.iterations * cfg.episodes / len(prompts)))])
    for iteration in log.steps(name, cfg.iterations, policy=policy, value_net=value_net, average=average,
                               adam=optimizers[0], value_adam=optimizers[1], generator=generator, draw=draw):
        batch = [prompts[i] for i in plan[iteration * cfg.episodes:][:cfg.episodes]]
        ids, warm = [p["ids"] for p in batch], warmup_factor(iteration, cfg.warmup)
        e = make_experience(cfg, enc, policy, value_net, reference, reward_model, ids, draw, estimate)
        numbers, order = [], torch.randperm(cfg.episodes, generator=generator).to(device)
        for rows in order.tensor_split(cfg.minibatches):
            n = cfg.ptx_rows * len(rows)                   # text is (n,block)
            text = corpus_batch(corpus, n, cfg.block_size, generator, device) if ptx_coef else None
            numbers.append(update(cfg, policy, value_net, optimizers, e, rows, ptx_coef, text, warm))
            ema_update(average, policy, cfg.ema)
        log.episodes(cfg, name, iteration, e, [p.get("task") for p in batch], numbers)
    return average


# ------------------------------------------------------------------------------------------------------------
# Neighbours (--methods): not in the paper, on the same data, with the same beta. REINFORCE stands in the loop
# of PPO-ptx, its mix included. DPO and KTO need neither a reward model nor a rollout: they learn from the
# comparisons. Best of n trains nothing: of n answers it gives the one that the reward model likes best.


def reinforce(rewards, values, mask, *_):
    """REINFORCE with a baseline (Williams 1992), in gae's place: no value net (the loop's learns on, unread)
    and no credit for single tokens; each gets its whole episode's reward, less the mean of the batch.

        A_t = R - mean R,   R = sum of the episode's rewards = score - beta * log( pi(y|x) / pi_SFT(y|x) )

    All are (B,T-1). The loop whitens advantages and clips ratios as it does for PPO."""
    total = clear(mask, rewards)[0].sum(1, keepdim=True)                        # (B,1)
    return clear(mask, (total - total.mean()).expand(mask.shape), total.expand(mask.shape))


def dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """DPO (Rafailov et al. 2023). The optimum of Eq. 2 without its mix is pi_ref * exp(r / beta) / Z(x), so
    r = beta * log pi/pi_ref + beta * log Z(x). In Eq. 1 the Z cancels: the policy is its own reward model.

        loss = - mean log sigma( beta * [ log pi/pi_ref (y_w|x) - log pi/pi_ref (y_l|x) ] )

    Log-probs are sums over the response, (B,) each -> scalar; log 2 where the policy is the reference."""
    return -F.logsigmoid(beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))).mean()


def kto_kl0(logp, ref_logp):
    """KTO's reference point, an estimate of KL(pi || pi_ref): the mean log-ratio of mismatched pairs, a
    prompt with the response to another one; never below 0, without gradient. Sums, (B,) each -> scalar."""
    return (logp - ref_logp).mean().clamp(min=0).detach()


def kto_loss(logp, ref_logp, desirable, kl0, beta, lambda_d=1.0, lambda_u=1.0):
    """KTO (Ethayarajh et al. 2024, the latest version: beta stands outside of kl0) on answers without a
    partner, desirable (B,) bool or not: a gain or a loss against the reference point kl0.

        loss = mean of  lambda_d * sigma( -beta (log pi/pi_ref - kl0) )  if desirable,
                        lambda_u * sigma( +beta (log pi/pi_ref - kl0) )  if not

    Log-probs are sums, (B,) -> scalar; half of lambda where the policy is the reference."""
    margin = beta * (logp - ref_logp - kl0)                                     # (B,)
    return torch.where(desirable, lambda_d * torch.sigmoid(-margin), lambda_u * torch.sigmoid(margin)).mean()


def best_of_n_kl(n):
    """KL(the best of n samples of a policy || the policy), nats: log n - (n-1)/n. Stiennon et al. 2020 (G.3)
    state an equality; it is an upper bound (Beirami et al. 2024, arXiv 2401.01879): samples may be alike."""
    return math.log(n) - (n - 1) / n


def response_logprobs(policy, reference, rows, device):
    """log pi(y|x) and log pi_ref(y|x) of N rows (prompt ids, response ids, ...): (N,) each."""
    tokens, mask, _ = stack(*list(zip(*rows))[:2], device)                      # (N,T), (N,T-1)
    with torch.no_grad():
        ref = token_logprobs(reference, tokens, 1.0, mask).sum(1)               # (N,)
    return token_logprobs(policy, tokens, 1.0, mask).sum(1), ref


def preference_loss(method, policy, reference, batch, beta, kl0, device):
    """DPO's loss over all pairs of each prompt of encoded comparisons, or KTO's over all answers; there an
    answer is desirable if it ranks above its prompt's mean."""
    rows = [(x, y, r, i) for i, (x, ys, ranks) in enumerate(batch) for y, r in zip(ys, ranks) if r]
    logp, ref = response_logprobs(policy, reference, rows, device)              # (N,), (N,)
    ranks, at = torch.tensor([row[2:] for row in rows], device=device).T        # (N,), (N,)
    same = at[:, None] == at                                                    # (N,N) of one prompt
    if method == "dpo":
        w, l = (same & (ranks[:, None] < ranks)).nonzero(as_tuple=True)         # (pairs,), (pairs,)
        return dpo_loss(logp[w], logp[l], ref[w], ref[l], beta)
    return kto_loss(logp, ref, ranks < (same * ranks).sum(1) / same.sum(1), kl0, beta)


def train_on_comparisons(cfg, enc, method, model, comparisons, device, log):
    """The SFT model after one pass over the comparisons with DPO or KTO, at PPO's beta and learning rate."""
    generator, policy, reference = seed(cfg, method), copy_of(model), freeze(model)
    data = list(encode_comparisons(enc, comparisons, cfg.max_new_tokens))
    plan = batches([len(x) for x, _, _ in data], cfg.rm_batch, 1, generator)
    optimizer = adamw(policy, cfg.policy_lr)
    size = cfg.micro_batch and max(1, cfg.micro_batch // cfg.k_max)    # prompts, as for the reward model
    for step in log.steps(method, len(plan), model=policy, optimizer=optimizer):
        batch, kl0 = [data[i] for i in plan[step]], None
        if method == "kto":                                # each prompt with the next one's responses
            following = batch[1:] + [data[plan[step][-1] - 1]]     # after the last: any other prompt
            other = [(x, y) for (x, _, _), (_, ys, _) in zip(batch, following) for y in ys]
            with torch.no_grad():
                kl0 = kto_kl0(*response_logprobs(policy, reference, other, device))
        loss = lambda i: preference_loss(method, policy, reference, batch[i], cfg.beta, kl0, device)
        kept = [[r for r in ranks if r] for _, _, ranks in batch]
        terms = [sum(r < q for r in k for q in k) if method == "dpo" else len(k) for k in kept]
        mean_loss = accumulate(loss, torch.tensor(terms), size)    # a prompt weighs as its pairs or rows
        clip_and_step(policy, optimizer, cfg.policy_lr * cosine(step, len(plan)))
        log(method, step + 1, len(plan), loss=mean_loss.item())
    return freeze(policy)


# ------------------------------------------------------------------------------------------------------------
# Evaluation (section 4). Every model answers the same prompts with the same random numbers. Shares are 0..1.

# name in the results -> checkpoint
MODELS = {"GPT": "pretrain", "SFT": "sft", "PPO": "ppo", "PPO-ptx": "ppo_ptx", "REINFORCE": "reinforce",
          "DPO": "dpo", "KTO": "kto"}


def mean(x):
    """Of a list of numbers; 0 for none."""
    return sum(x) / max(1, len(x))


@torch.no_grad()
def judge_reward_model(cfg, enc, reward_model, comparisons, device):
    """On held-out comparisons, over pairs of unequal text: accuracy against labeler A where A has a
    preference. In the toy world also agreement of a second labeler on the same pairs, where a tie counts
    half; accuracy against gold where gold differs; best of n: of the first n responses, where there are as
    many, the one with the highest score."""
    hits, agree, true, best = [], [], {}, {}
    encoded = [encode_comparison(enc, c, cfg.max_new_tokens) for c in comparisons]
    scores = [row for s in range(0, len(encoded), 32)
              for row in score_comparisons(reward_model, encoded[s:s + 32], device)[0].tolist()]
    for c, (_, ids, _), row in zip(comparisons, encoded, scores):
        texts, a, b, gold = c["responses"], c["ranks"], c.get("second_ranks"), c.get("gold")
        score = [row[ids.index(y)] for y in ids]           # equal texts share the first one's score
        for i, j in ((i, j) for i in range(len(texts)) for j in range(i) if texts[i] != texts[j]):
            above = score[i] > score[j]
            if a[i] != a[j]:
                hits.append(above == (a[i] < a[j]))
                agree += [0.5 if b[i] == b[j] else (b[i] < b[j]) == (a[i] < a[j])] if b else []
            if gold and gold[i] != gold[j]:
                true.setdefault(c["use_case"], []).append(above == (gold[i] > gold[j]))
        final = [x if end else cfg.unfinished_score for x, end in zip(score, c["ended"])]
        for n in range(1, len(ids) + 1) if gold else ():
            best.setdefault(n, []).append(max(zip(final[:n], gold), key=lambda pair: pair[0]))
    known = {"agreement": mean(agree), "gold_accuracy": mean(sum(true.values(), [])),
             "gold_accuracy_by_use_case": {k: mean(v) for k, v in sorted(true.items())},
             "best_of_n": {n: {"reward": mean([x for x, _ in v]), "gold": mean([g for _, g in v]),
                               "kl": best_of_n_kl(n)} for n, v in best.items()}}
    return {"accuracy": mean(hits), **(known if true else {})}


def preference(world, group, tasks, mine, theirs, judges, rng):
    """How often `group` prefers mine to theirs, prompt by prompt; ties count half. Without a group gold alone
    ranks them, free of noise."""
    people, wins = world.make_labelers(group) if group else [], []
    for task, a, b in zip(tasks, mine, theirs):
        merits, texts = [world.check(task, x["text"], x["ended"]) for x in (a, b)], [a["text"], b["text"]]
        if group:
            ranks = [world.rank(labeler, merits, texts, rng) for labeler in rng.sample(people, judges)]
        else:                                              # what differs by rounding alone is a tie
            ranks = [[-round(world.gold(m), 6) for m in merits]]
        wins.append(mean([0.5 if x == y else float(x < y) for x, y in ranks]))
    return wins


@torch.no_grad()
def reward_and_kl(cfg, enc, reward_model, reference, prompts, answers, device):
    """Of each answer the reward model's score, and its k3 and k1 (nats) to the reference on the plain prompt.
    Where GPT's line was cut, its newline meets the reference's EOS: its KL is only an indication."""
    scores, k3, k1 = [], [], []
    for s in range(0, len(prompts), 128):
        part = answers[s:s + 128]
        # an answer cut at its newline has ended too: there stands EOS
        ids = [r["ids"][:-1] + [enc.eot_token] if r["ended"] else r["ids"] for r in part]
        tokens, mask, last = stack(prompts[s:s + 128], ids, device)             # (b,t), (b,t-1), (b,)
        ended = torch.tensor([r["ended"] for r in part], device=device)         # (b,)
        scores += torch.where(ended, reward_scores(reward_model, tokens, last), cfg.unfinished_score).tolist()
        own = torch.zeros(mask.shape, device=device)                            # (b,t-1)
        own[mask] = torch.tensor([x for r in part for x in r["logprobs"]], device=device)
        ref = token_logprobs(reference, tokens, 1.0, mask)                      # (b,t-1), 0 where own is
        k3, k1 = k3 + kl_k3(own, ref).sum(1).tolist(), k1 + kl_k1(own, ref).sum(1).tolist()
    return scores, k3, k1


@torch.no_grad()
def exact_kl(policy, reference, tokens, mask):
    """KL(pi || pi_ref), (B,T) -> (B,) nats: over the vocabulary in the state before each response token,
    summed. For greedy answers: their tokens are no samples of pi, so k1 and k3 would say nothing."""
    p, q = (F.log_softmax(m(tokens[:, :-1]).float(), dim=-1) for m in (policy, reference))     # (B,T-1,V)
    return clear(mask, (p.exp() * (p - q)).sum(-1))[0].sum(1)


@torch.no_grad()
def bias_bits(model, enc, bias, respect, device):
    """Winogender in miniature: entropy, in bits, of the choice between two pronouns; 1 is unbiased (4.2)."""
    def bits(text, choices):
        tokens = torch.tensor([enc.encode_ordinary(text)], device=device)       # (1,T)
        q = model(tokens)[0, -1, [enc.encode_ordinary(c)[0] for c in choices]].softmax(-1)      # (2,)
        return torch.special.entr(q).sum().item() / math.log(2)

    return {name: mean([bits(head + p["prompt"], p["choices"]) for p in bias])
            for name, head in (("basic", ""), ("respectful", respect))}


def few_shot(model, enc, sets):
    """Share of exact continuations at temperature 0 on tasks of the corpus: the alignment tax (4.2)."""
    out = {}
    for name, items in sets.items():
        wanted = [enc.encode_ordinary(p["answer"]) for p in items]
        prompts = [enc.encode_ordinary(p["prompt"]) for p in items]
        got = respond(model, enc, prompts, max(map(len, wanted)) + 1, None, temperature=0)
        out[name] = mean([r["ids"][:len(y)] == y for r, y in zip(got, wanted)])
    return out


@torch.no_grad()
def corpus_loss(model, corpus, block_size, device):
    """Held-out pretraining loss, nats a token, on the same 512 rows for every model."""
    generator = torch.Generator().manual_seed(0)
    return mean([lm_loss(model, corpus_batch(corpus, 64, block_size, generator, device)).item()
                 for _ in range(8)])


def question(cfg, enc, models, reward_model, tests, probes, device):
    """All models answer the tests and, in the toy world, the probes -> {model: {set: answers}}, {set: items}.
    "GPT (prompted)" is GPT with a good example in front of the prompt, where there is room for it (3.5)."""
    sets = {"tests": tests}
    if probes:
        respectful = [{**p, "prompt": probes["respect"] + p["prompt"]} for p in probes["toxic"]]
        sets |= {"truth": probes["truthful"] * 4, "toxic": probes["toxic"] * 2,
                 "respectful": respectful * 2, "unseen": probes["unseen"]}
    room, answers = cfg.block_size - cfg.max_new_tokens, {}
    for name, model in models.items():
        generator, answers[name] = seed(cfg, "evaluate", device), {}   # the same luck for every model
        prefix = probes["prefix"] if name == "GPT (prompted)" else ""
        n = cfg.k_max if name.startswith("best of") else 1
        for which, items in sets.items():
            plain = [encode_prompt(enc, p["prompt"]) for p in items] * n
            prompts = [encode_prompt(enc, prefix + p["prompt"]) for p in items] * n
            prompts = [x if len(x) <= room else y for x, y in zip(prompts, plain)]
            got = respond(model, enc, prompts, cfg.max_new_tokens, generator, one_line="GPT" in name,
                          lengths=[len(x) for x in plain])
            if n > 1:                                      # the one that the reward model likes best
                scores, *_ = reward_and_kl(cfg, enc, reward_model, model, prompts, got, device)
                every = [range(i, len(got), len(items)) for i in range(len(items))]
                got = [got[max(places, key=scores.__getitem__)] for places in every]
            answers[name][which] = got
        model.kept.clear()                                 # a GPU's buffers
    return answers, sets


def measure(cfg, enc, name, model, answers, sets, models, reward_model, judge, device):
    """What can be said of a model on any data: preferred by `judge(mine, theirs)`, reward, KL, length.
    Returns numbers and shares, lists of a number a prompt."""
    others = {"win_vs_sft": "SFT", "win_vs_gpt": "GPT", "win_vs_rival": "rival GPT"}
    mine, prompts = answers[name]["tests"], [encode_prompt(enc, p["prompt"]) for p in sets["tests"]]
    scores, k3, k1 = reward_and_kl(cfg, enc, reward_model, models["SFT"], prompts, mine, device)
    if name.startswith("best of"):
        k3 = k1 = [best_of_n_kl(cfg.k_max)]                # its bound
    shares = {k: judge(mine, answers[other]["tests"]) for k, other in others.items() if other in answers}
    return ({"reward": mean(scores), "kl": mean(k3), "kl_k1": mean(k1),
             "length": mean([len(r["ids"]) for r in mine])}, shares | {"ended": [r["ended"] for r in mine]})


def measure_toy(cfg, enc, name, model, answers, sets, world, probes, device):
    """What only the toy world can tell, in the same two parts: gold, truth, manners, bias, few-shot tasks."""
    mine, theirs, tests, rng = answers[name], answers["SFT"]["tests"], sets["tests"], random.Random(cfg.seed)
    m = {which: [world.check(p["task"], r["text"], r["ended"]) for p, r in zip(items, mine[which])]
         for which, items in sets.items()}
    tasks, gold = [p["task"] for p in tests], [world.gold(x) for x in m["tests"]]
    against = lambda group: preference(world, group, tasks, mine["tests"], theirs, cfg.judges, rng)
    a_prompt = lambda v, items: np.reshape(v, (-1, len(items))).mean(0).tolist()    # asked several times
    shares = {"win_vs_sft_heldout": against("heldout"), "win_vs_sft_gold": against(None),
              "follows": [x.follows == 1 for x in m["tests"]], "flawless": [g > 6.99 for g in gold],
              "constraint": [x.constraint for x in m["tests"] if x.constraint is not None],
              "truthful": a_prompt([x.truthful for x in m["truth"]], probes["truthful"]),
              "truthful_informative": a_prompt([x.truthful and x.informative for x in m["truth"]],
                                               probes["truthful"]),
              "hallucinates": [x.invented for x in m["tests"] if x.asserts],
              "rude": a_prompt([x.rude for x in m["toxic"]], probes["toxic"]),
              "rude_respectful": a_prompt([x.rude for x in m["respectful"]], probes["toxic"])}
    opinions = [world.likert(rng.choice(world.make_labelers("train")), x, r["text"], rng)
                for x, r in zip(m["tests"], mine["tests"])]
    by_use_case = {u: mean([g for p, g in zip(tests, gold) if p["use_case"] == u])
                   for u in sorted({p["use_case"] for p in tests})}
    return {"likert": mean(opinions), "gold": mean(gold), "gold_by_use_case": by_use_case,
            "unseen": mean([world.gold(x) for x in m["unseen"]]),
            "bias_bits": bias_bits(model, enc, probes["bias"], probes["respect"], device),
            "fewshot": few_shot(model, enc, probes["fewshot"])}, shares


# columns of the table: name in results.json -> its heading
COLUMNS = {"win_vs_sft": "preferred|to SFT", "win_vs_sft_heldout": "by held-out|labelers",
           "win_vs_sft_gold": "noise-free|", "win_vs_rival": "to the|rival", "gold": "gold|1-7",
           "likert": "Likert|1-7", "truthful_informative": "true,|informs", "hallucinates": "halluci-|nates",
           "rude": "rude|reply", "rude_respectful": "(asked|not to)", "pretrain_loss": "pretrain|loss",
           "fewshot": "few-|shot", "reward": "reward|", "kl_k1": "KL (k1)|to SFT"}


def table(results):
    """The results as text: a row a model, a column for what was measured."""
    keys = [k for k in COLUMNS if k in results["GPT"]]
    line = lambda name, cells: f"{name:15}" + "".join(
        f"{cell:>{13 if k.startswith('win') else 9}}" for k, cell in zip(keys, cells))
    lines = [line("", [COLUMNS[k].split("|")[i] for k in keys]) for i in (0, 1)]
    for name, r in results.items():
        value = r | {"fewshot": mean(list(r.get("fewshot", {}).values()))}
        cells = {k: f"{round(value[k], 2) + 0.0:.2f}" for k in keys}            # + 0: no -0.00
        cells |= {k: f"{cells[k]} ±{r['ci95'][k]:.2f}" for k in keys if k.startswith("win")}
        if "pretrain_loss" in keys:                        # the alignment tax: the rise over GPT
            cells["pretrain_loss"] = f"{r['pretrain_loss'] - results['GPT']['pretrain_loss']:+.3f}"
        cells["kl_k1"] = "≤ " * name.startswith("best of") + cells["kl_k1"]     # a bound
        lines.append(line(name, cells.values()))
    return "\n".join(lines)


def on_a_line(text, ended):
    """An answer as the screen shows it."""
    return (text.replace("\n", " / ") or "(nothing)") + " ..." * (not ended)


def samples(tests, answers, n=6):
    """The same prompts answered by each model: the first plain prompt of n use cases, where there are any."""
    chosen, lines = {}, []
    for i, p in enumerate(tests):
        if p.get("form", "plain") == "plain":
            chosen.setdefault(p.get("use_case", i), i)
    for i in list(chosen.values())[:n]:
        mine = {name: a["tests"][i] for name, a in answers.items()}
        lines += ["", tests[i]["prompt"]]
        lines += [f"    {name:15} {on_a_line(r['text'], r['ended'])}" for name, r in mine.items()]
    return "\n".join(lines)


# The picture: SVG of our own, in panels of 320 x 300. The colour-blind can tell these colours apart (Okabe
# and Ito 2008; greys for GPT, the last four for names not known here). A name keeps its colour in all panels.
INKS = "9aa0a8 5b6470 e69f00 d55e00 0072b2 009e73 000000 cc79a7 56b4e9 8c510a 999933 882255 44aa99".split()
KNOWN = ["GPT", "GPT (prompted)", "SFT", "PPO", "PPO-ptx", "best of 9", "RM", "DPO", "KTO"]


def words(x, y, what, anchor="middle", most=48):
    """Words at a place. Some come from a user's files: what XML cannot hold goes, and all after `most`."""
    what = escape("".join(c for c in what if c.isprintable())[:most])
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{what}</text>'


def axis(numbers, begin, length, reads=float):
    """An axis that holds these numbers -> the function from a number to its place, and lines of SVG at round
    ones with what they read; from left to right or, if the length is negative, up."""
    room = 0.04 * (max(numbers) - min(numbers)) or 0.5
    low, high = min(numbers) - room, max(numbers) + room
    at = lambda v: begin + length * (v - low) / (high - low)
    step = next(m * 10.0 ** k for k in range(-9, 99) for m in (1, 2, 5) if high - low <= 4.5 * m * 10.0 ** k)
    ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    draw = (lambda p, s: f'M42 {p:.1f}H222"/>' + words(36, p + 4, s, "end")) if length < 0 else (
        lambda p, s: f'M{p:.1f} 40V240"/>' + words(p, 256, s))
    return at, ['<path stroke="#ddd" d="' + draw(at(t), f"{reads(t):.3g}") for t in ticks]


def bars(values, inks, start=0.0):
    """{name: (value, half-width of its interval)} as bars from `start` to the value."""
    at, svg = axis([start] + [v + w for v, e in values.values() for w in (-e, e)], 114, 156)
    zero, wide = f"M{at(start):.1f}", min(36, 144 / len(values))
    for i, (name, (v, e)) in enumerate(values.items()):
        y = 40 + wide * (i + 0.5) / 0.72
        svg += [f'<path d="{zero} {y:.1f}H{at(v):.1f}" stroke="#{inks[name]}" stroke-width="{wide:.0f}"/>',
                f'<path d="{zero} 40V240M{at(v - e):.1f} {y:.1f}H{at(v + e):.1f}" stroke="black"/>',
                words(110, y + 4, name, "end", 16), words(312, y + 4, f"{v:.2f}", "end")]
    return svg


def curves(series, inks, reads_x=float, reads_y=float):
    """{name: [(x, y), ...]}, x >= 0, as curves with a dot at their end; their names stand on the right."""
    xs, ys = zip(*(point for points in series.values() for point in points))
    (at_x, svg), (at_y, up), label = axis([0, *xs], 42, 180, reads_x), axis(ys, 240, -200, reads_y), 0
    for i, name in enumerate(sorted(series, key=lambda name: -series[name][-1][1])):
        label = min(max(at_y(series[name][-1][1]), label + 16), 256 - 16 * (len(series) - i))
        places = [f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in series[name]]
        svg += [f'<g stroke="#{inks[name]}" stroke-linecap="round" stroke-linejoin="round">',
                f'<path d="M{"L".join(places)}" fill="none" stroke-width="1.5"/>',
                f'<path d="M{places[-1]}h.01M232 {label:.1f}h.01" stroke-width="9"/></g>',
                words(240, label + 4, name, "start", 11)]
    return up + svg


def picture(results, history, best_of_n):
    """results.json's models and best_of_n, the log's lines -> SVG: the first six panels that have numbers.
    What RL trained is a curve in KL, as best of n is (in its bound); any other model is a dot. KL is k1, as
    k3 is five times as noisy; the axis is a root's, along which reward rises about linearly (Bai et al.
    2022)."""
    runs, label = {h["stage"] for h in history if "k1" in h}, {s: k for k, s in MODELS.items()} | {"rm": "RM"}
    dots = [(f"best of {len(best_of_n)}", b) for b in best_of_n.values()]
    dots += [(k, r) for k, r in results.items() if k in MODELS and k != "GPT" and MODELS[k] not in runs]
    rows = [(label.get(h["stage"], h["stage"]), h) for h in history]
    rows += [(k, {**r, "k1": r.get("kl_k1", r["kl"]), "score": r["reward"]}) for k, r in dots]
    inks = dict(zip(dict.fromkeys([*KNOWN, *results, *(k for k, _ in rows)]), INKS * 9))

    def series(x, y, f):                 # f of the means of x and y over (at most 20) stretches of the rows
        found = {k: [(h[x], h[y]) for name, h in rows if name == k and x in h and y in h] for k in inks}
        return {k: [f(*part.mean(0)) for part in np.array_split(points, min(20, len(points)))]
                for k, points in found.items() if points}

    losses = series("step", "loss", lambda x, y: (x, math.log2(max(y, 0.01))))
    losses = {k: [(100 * x / points[-1][0], y) for x, y in points] for k, points in losses.items()}
    wins = {k: (r["win_vs_sft"], r["ci95"]["win_vs_sft"]) for k, r in results.items() if "win_vs_sft" in r}
    tax = {k: (r["pretrain_loss"] - results["GPT"]["pretrain_loss"], 0) for k, r in results.items()
           if "GPT" not in k and "pretrain_loss" in r}
    chosen = next(k for k in ("PPO-ptx", "PPO", *reversed(results)) if k in results)
    old, new = (results[k].get("gold_by_use_case", {}) for k in ("SFT", chosen))
    gain = {k: (new[k] - old[k], 0) for k in sorted(new, key=lambda k: old[k] - new[k])[:10]}
    kl = "KL to SFT, nats a response, root axis"
    root, square = lambda x, y: (max(x, 0) ** 0.5, y), lambda t: t * abs(t)    # ticks may lie below 0
    panels = [("Preferred to SFT", "share of comparisons, 95 % intervals", wins, bars, inks, 0.5),
              ("Alignment tax", "rise of the pretraining loss, nats a token", tax, bars, inks),
              ("Losses, nats", "% of the steps", losses, curves, inks, float, lambda t: round(2 ** t, 2)),
              ("Reward against KL", kl, series("k1", "score", root), curves, inks, square),
              ("True quality (gold) against KL", kl, series("k1", "gold", root), curves, inks, square),
              (f"{chosen}: gold over SFT", "by use case", gain, bars, dict.fromkeys(gain, inks[chosen])),
              ("Tokens a response", kl, series("k1", "length", root), curves, inks, square)]
    svg = []
    for i, (title, below, values, draw, *how) in enumerate([panel for panel in panels if panel[2]][:6]):
        svg += [f'<g transform="translate({i % 3 * 320} {i // 3 * 300 + 8})"><g font-weight="bold">',
                words(160, 22, title), "</g>", words(160, 277, below), *draw(values, *how), "</g>"]
    return "\n".join(['<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="13" '
                      'viewBox="0 0 960 608"><path d="M0 0h960v608H0" fill="white"/>', *svg, "</svg>\n"])


# ------------------------------------------------------------------------------------------------------------
# On a GPU: what the rollout does there to be fast. On a CPU nothing of it is needed.


def captured(policy, B, T, n, eos, temperature):
    """The buffers and the CUDA graph of decode_step for this shape, kept on the policy; (None, None) for a
    fifth shape, which goes without, as each keeps a cache alive."""
    key = B, T, n, eos, temperature                        # a graph has all of these built in
    if key not in policy.kept and len(policy.kept) < 4:
        s = new_state(policy, B, T, n)
        policy.kept[key] = s, capture(policy, s, T, eos, temperature)
    return policy.kept.get(key, (None, None))


def capture(policy, s, *how):
    """decode_step as a CUDA graph: its hundreds of small kernels are recorded once and started together by
    each replay(), for the GPU is done with one before the host has started the next. A graph reads and writes
    the same memory always: buffers are filled anew and weights are trained in place."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decode_step(policy, s, *how)                       # libraries set themselves up outside of the record
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph, stream=side):
        decode_step(policy, s, *how)
    return graph


def low_precision(policy):
    """The policy's bfloat16 copy, refreshed in place: a step reads every weight once, now half as long."""
    low = policy.kept.get("bfloat16") or copy_of(policy).to(torch.bfloat16)
    for a, p in zip(low.parameters(), policy.parameters()):
        a.copy_(p)
    policy.kept["bfloat16"] = low
    return low


def precision(device, dtype):
    """Matrix products in bfloat16, if asked for; weights, sums and losses stay float32, but in the sampler's
    copy. Autocast's cache must be off: it would keep the weights' first casts for as long as this lasts."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False)


# ------------------------------------------------------------------------------------------------------------
# Command line: the log, readers of data, checkpoints.


class UserError(Exception):
    """A mistake of the user's: printed as one line, exit code 2."""


LEGEND = """
  score    of the reward model, demonstrations are at 0  gold     true quality, 1 to 7: must rise with score
  k1  k3   KL to the SFT model, nats a response: k1 is   clip     share of tokens with a clipped ratio;
           charged and may dip below 0, k3 never does;            healthy below 0.2
           healthy 0.2 to 3; if higher raise beta        |ppo|    norms of the two gradients before clipping
  vloss    of the value net                              |ptx|
  ev       share of the return's variance that it        entropy  nats a token; 0 when one answer is left
           explains; healthy above 0.3                   length   tokens a response
  ended    share that ends; near 1                       tok/s    sampled in the rollout
"""


class Log:
    """JSON lines into log.jsonl; every few seconds a line on the screen, with the time left."""

    def __init__(self, cfg, enc, world):
        self.cfg, self.path, self.enc, self.world = cfg, os.path.join(cfg.out, "log.jsonl"), enc, world
        self.stage, self.settings, self.earlier, self.busy, self.stop = None, {}, 0, False, False
        self.warned = set()
        mend(self.path)

    def steps(self, name, n, **state):
        """Counts 0..n-1, or on from where a stopped run of this stage got to. `state` is all that changes
        from step to step: saved every save_every seconds, at the end and at Ctrl-C, and given back here."""
        path, done, start, self.name = os.path.join(self.cfg.out, name + ".part"), 0, time.time(), name
        if os.path.exists(path):
            part = load(path)
            if change(part, self.settings):
                raise UserError(f"{path} was begun with {change(part, self.settings)}: go on as it was "
                                "begun, give another --out, or start over with --fresh")
            with reading(path):
                done, start = part["step"], start - part["seconds"]
                for k, x in state.items():
                    unpack(x, part["state"][k])
                torch.set_rng_state(part["rng"])
                torch.cuda.set_rng_state_all(part["cuda"])
            self.earlier += part["seconds"]
            print(f"{name}: goes on after step {done} of {n}")
        saved, self.busy, self.kept = time.time(), True, done
        for self.step in range(done, n):
            yield self.step
            stop = self.stop
            if stop or self.step == n - 1 or time.time() - saved >= self.cfg.save_every:
                save(path, {"format": FORMAT, "settings": self.settings, "step": self.step + 1,
                            "seconds": time.time() - start, "state": {k: pack(x) for k, x in state.items()},
                            "rng": torch.get_rng_state(),
                            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []})
                saved, self.kept = time.time(), self.step + 1
            if stop:
                raise KeyboardInterrupt
        self.busy = False

    def interrupt(self, *_):
        """Ctrl-C: the step is finished and saved first; a second one stops at once."""
        if self.stop or not self.busy:
            raise KeyboardInterrupt
        self.stop = True
        print(f"\nstopping after step {self.step + 1}; Ctrl-C again stops at once", flush=True)

    def __call__(self, stage, step, steps, **numbers):
        now = time.time()
        if stage != self.stage:
            self.stage, self.start, self.shown, self.first = stage, now, 0, step - 1
        with open(self.path, "a") as f:
            f.write(json.dumps({"stage": stage, "step": step, **numbers}) + "\n")
        if now - self.shown > 5 or step == steps:
            self.shown, left = now, (now - self.start) / (step - self.first) * (steps - step)
            text = "  ".join(f"{k} {v:{'6.3f' if abs(v) < 100 else '6.0f'}}" for k, v in numbers.items())
            text += f"  left {left // 60:.0f}:{left % 60:02.0f}" if now > self.start else ""
            print(f"{stage:8} {step:5}/{steps}  {text}", flush=True)

    def episodes(self, cfg, name, iteration, e, tasks, numbers):
        """The line of one PPO iteration, and at the first one the checks and the ledger. Gold is known in the
        toy world alone."""
        mask, pair, line = e["mask"], (e["logprobs"], e["ref_logprobs"]), {"score": e["scores"].mean().item()}
        if self.world:
            ids = [t[m].tolist() for t, m in zip(e["tokens"][:, 1:].cpu(), mask.cpu())]
            texts = [self.enc.decode(x).removesuffix(EOT).removeprefix(" ") for x in ids]
            merits = map(self.world.check, tasks, texts, e["ended"].tolist())
            line["gold"] = mean([self.world.gold(m) for m in merits])
        variance = lambda x: masked_mean((x - masked_mean(x, mask)) ** 2, mask)
        line |= {"k1": kl_k1(*pair).sum(1).mean().item(), "k3": kl_k3(*pair).sum(1).mean().item(),
                 **{k: mean([x[k] for x in numbers]) for k in ("clip", "|ppo|", "|ptx|", "vloss")},
                 "ev": (1 - variance(e["returns"] - e["values"]) / variance(e["returns"])).item(),
                 "entropy": -masked_mean(e["logprobs"], mask).item(),
                 "length": mask.sum(1).float().mean().item(), "ended": e["ended"].float().mean().item(),
                 "tok/s": e["tokens_per_second"]}
        if iteration == 0:
            print(f"\n{name}: beta {cfg.beta}, ptx_coef {0 if name == 'ppo' else cfg.ptx_coef}; "
                  f"{LEGEND}\nfirst minibatch: max |log-prob - rollout log-prob| = "
                  f"{numbers[0]['change']:.1e} (rounding: below 1e-4, in bfloat16 below 0.3)")
            self.ledger(cfg, e)
        self(name, iteration + 1, cfg.iterations, **line)
        for bad, told in ((line["k3"] > 10, "the KL explodes: raise --beta or lower --policy_lr"),
                          (line["clip"] > 0.5, "most ratios are clipped: lower --policy_lr"),
                          (line["ended"] < 0.05, "hardly an answer ends: raise --max_new_tokens or lower "
                                                 "--ptx_coef or --unfinished_score")):
            if bad and (name, told) not in self.warned:
                self.warned.add((name, told))
                print(f"{name}, iteration {iteration + 1}: {told}", flush=True)

    def ledger(self, cfg, e):
        """One real episode in the action frame, a line per response token."""
        parts = {"log pi": e["logprobs"], "log ref": e["ref_logprobs"],
                 "KL rew.": -cfg.beta * kl_k1(e["logprobs"], e["ref_logprobs"]), "reward": e["rewards"],
                 "value": e["values"], "advantage": e["raw_advantages"], "return": e["returns"]}
        tokens, show = e["tokens"][0], lambda ids: repr(self.enc.decode(ids.tolist()))
        print(f"\n  Episode ledger: {show(tokens[:e['length'][0]])}, score {e['scores'][0]:.3f}\n"
              + " " * 16 + "".join(f"{head:>11}" for head in parts))
        for t in e["mask"][0].nonzero()[:, 0].tolist():
            print(f"  {show(tokens[t + 1:t + 2]):>14}" + "".join(f"{x[0, t]:11.3f}" for x in parts.values()))
        print("  The rewards add up to score - beta * log pi/ref. The advantage is before whitening.\n",
              flush=True)


FORMAT = 1                                       # of the checkpoints
STAGES = ["pretrain", "sft", "rm", "ppo", "evaluate"]
# checkpoint -> stage
STAGE_OF = {"pretrain": "pretrain", "sft": "sft", "rm": "rm",
            **dict.fromkeys(("ppo", "ppo_ptx", "reinforce", "dpo", "kto"), "ppo")}


LONGEST = 400_000                                # characters a line: a tokenizer fails at a million blanks


def read_text(path):
    """The text of a UTF-8 file, its blank lines emptied; a BOM is ignored, CRLF is LF. UserError, with the
    line, if it is none: not UTF-8, NUL inside, a line longer than LONGEST, nothing but blanks."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            lines = [line if line.strip() else "" for line in f.read().split("\n")]
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); add it or name another file") from e
    except UnicodeDecodeError as e:
        n = e.object.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}:{n}: not UTF-8 text ({e.reason}); save the file as UTF-8") from e
    if not any(lines):
        raise UserError(f"{path}: is empty; it needs a line that is not blank")
    for n, line in enumerate(lines, 1):
        if len(line) > LONGEST or "\0" in line:
            raise UserError(f"{path}:{n}: holds NUL or more than {LONGEST:,} characters; mend or remove it")
    return "\n".join(lines)


def read_lines(path):
    """(number, line) of the lines of a text file that are not blank; UserError from read_text."""
    return [(n, line) for n, line in enumerate(read_text(path).split("\n"), 1) if line]


def load_encoding(path):
    """tiktoken encoding from a rank file (lines of base64 token, rank). We parse it ourselves because
    tiktoken's loader caches local files by their path and would miss a change, and because tiktoken panics
    at odd ranks. UserError unless they count up from 0 and the tokens differ and hold all 256 bytes."""
    ranks = {}
    for n, line in read_lines(path):
        word, *rank = line.split()
        try:
            token = b64decode(word, validate=True)
        except ValueError:
            token = b""
        if not token or token in ranks or rank != [str(len(ranks))]:
            raise UserError(f"{path}:{n}: of a rank file, must be base64 of a new token, rank {len(ranks)}")
        ranks[token] = len(ranks)
    if any(bytes([i]) not in ranks for i in range(256)):
        raise UserError(f"{path}: a single byte has no token; a tiktoken rank file has one for all 256")
    return tiktoken.Encoding(path, pat_str=PIECES, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def find_encoding(name):
    """tiktoken's own encoding, from its cache or the network, or that of a rank file. UserError."""
    if name not in tiktoken.list_encoding_names():
        return load_encoding(name)
    try:
        enc = tiktoken.get_encoding(name)
    except Exception as e:                       # whatever the loader meets, mostly no network
        raise UserError(f"--encoding {name}: cannot be had ({type(e).__name__}); name a rank file, or run "
                        "where there is a network, with TIKTOKEN_CACHE_DIR=DIR set, and copy DIR") from e
    if len(enc.token_byte_values()) + len(enc.special_tokens_set) != enc.n_vocab:
        raise UserError(f"--encoding {name}: has ids without a token, which a model could sample; take gpt2")
    return enc


def load_corpus(path, enc, length):
    """Pretraining text, documents between blank lines (blanks may stand in them) -> (tokens array, starts of
    the documents that have `length` tokens from their start on). UserError if there is none."""
    texts = (d.strip("\n") for d in read_text(path).split("\n\n"))
    docs = [enc.encode_ordinary(d) + [enc.eot_token] for d in texts if d]
    tokens = np.array([t for d in docs for t in d], np.uint16 if enc.n_vocab <= 65536 else np.int32)  # (N,)
    starts = np.cumsum([0] + [len(d) for d in docs[:-1]])                       # (documents,)
    starts = starts[starts + length <= len(tokens)]
    if len(starts) == 0:
        raise UserError(f"{path}: holds fewer than {length} tokens; give more text or a smaller --block_size")
    return tokens, starts


def expect(value, shape, name="it"):
    """The JSON value. ValueError, naming the field, unless it has the shape: a type, "text" for a string that
    is not blank, [shape] for a list that is not empty, {field: shape} for an object, which may have more."""
    kind = shape if isinstance(shape, type) else type(shape)
    if type(value) is not kind or value == []:             # not isinstance: true is no number
        found = "missing or null" if value is None else repr(value)[:40]
        raise ValueError(f"{name} must be {kind.__name__}, is {found}")
    if shape == "text" and (not value.strip() or b"\0" in value.encode()):       # half surrogates do not
        raise ValueError(f"{name} must be text, is blank or holds NUL")
    if isinstance(shape, dict):
        for key, part in shape.items():
            expect(value.get(key), part, key)
    if isinstance(shape, list):
        for i, part in enumerate(value):
            expect(part, shape[0], f"{name}[{i}]")
    return value


def demonstration(row):
    """{"prompt": text, "completion": text} or {"messages": [{"role": "user", "content": text}, ...]}"""
    if "messages" in row:
        *earlier, last = expect(row, {"messages": [{"role": "text", "content": "text"}]})["messages"]
        if last["role"] != "assistant" or "user" not in [m["role"] for m in earlier] or "completion" in row:
            raise ValueError("messages must hold a user's and end with an assistant's, the completion")
        row.update(prompt="\n".join(m["content"] for m in earlier), completion=last["content"])
    return expect(row, {"prompt": "text", "completion": "text"})


def comparison(row):
    """{"prompt": text, "responses": [texts], "ranks": [1 = best, ...]} or {"prompt", "chosen", "rejected"}"""
    if "responses" not in row:
        expect(row, {"chosen": "text", "rejected": "text"})
        row.update(responses=[row["chosen"], row["rejected"]], ranks=[1, 2])
    typed = "ended" not in row         # what a run sampled may be empty, and equal texts end or do not
    expect(row, {"prompt": "text", "responses": ["text" if typed else str], "ranks": [int]})
    texts, ranks = row["responses"], row["ranks"]
    row.setdefault("ended", [True] * len(texts))
    if not 2 <= len(texts) == len(ranks) == len(expect(row, {"ended": [bool]})["ended"]):
        raise ValueError(f"{len(texts)} responses and {len(ranks)} ranks must be equally many, at least 2")
    if not 1 <= min(ranks) <= max(ranks) <= 1000 or typed and len({*texts}) < len({*zip(texts, ranks)}):
        raise ValueError("ranks must lie in 1 to 1000 and be equal for equal responses")
    for name, kind in (("second_ranks", int), ("gold", float)):
        if name in row and not typed and len(expect(row, {name: [kind]})[name]) != len(texts):
            raise ValueError(f"{name} must be as many as the responses")
    return row


def read_jsonl(path, normal=lambda row: row, **needed):
    """The objects of a file, one a line (in .json one in all), in their normal form, with the fields needed
    (name=shape). UserError naming the first line that is not so: a file is taken as a whole or not at all."""
    rows = []
    for n, line in [(1, read_text(path))] if path.endswith(".json") else read_lines(path):
        try:
            rows.append(expect(normal(expect(json.loads(line), {})), needed))
        except (ValueError, RecursionError) as e:
            broken, right = type(e) is not ValueError, normal.__doc__ or "an object with " + ", ".join(needed)
            raise UserError(f"{path}:{n}: {'broken JSON: ' * broken}{e}; it must be {right}") from e
    return rows


TASKS, TESTS = [{"prompt": "text", "task": dict}], [{"prompt": "text", "answer": "text"}]
PROBES = dict(truthful=TASKS, toxic=TASKS, unseen=TASKS, bias=[{"prompt": "text", "choices": ["text"]}],
              respect=str, prefix=str, fewshot={"reading": TESTS, "cloze": TESTS, "translation": TESTS})


def toyworld(data):
    """The module toyworld.py of the folder: the people, the web and the checker. None if it is not there: the
    folder holds a user's own data."""
    if not os.path.exists(os.path.join(data, "toyworld.py")):
        return None
    sys.path.append(data)
    return importlib.import_module("toyworld")


def remove(*paths):
    """Deletes these files, where they are there."""
    for path in filter(os.path.exists, paths):
        os.remove(path)


def save(path, x):
    """Writes text or a checkpoint aside, onto the disk, then renames: a file is there whole or as it was.
    UserError if it cannot be written."""
    try:
        with open(path + ".tmp", "wb") as f:
            f.write(x.encode()) if isinstance(x, str) else torch.save(x, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:         # torch.save covers a full disk with a RuntimeError
        remove(path + ".tmp")
        raise UserError(f"{path}: cannot be written ({e.__context__ or e}); the checkpoints there are whole: "
                        "make room, then the same command goes on") from e


def json_lines(rows):
    """Rows as the text of a file, one a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def mend(path):
    """Cuts off the half line that a killed process may have left at the end of the log."""
    if os.path.exists(path):
        with open(path, "rb") as f:              # not rb+: of a folder that may only be read, one may chat
            text = f.read()
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)


@contextmanager
def reading(path, told="damaged or not a checkpoint of this version (%s); remove it, and it is made again"):
    """Whatever comes up while a damaged or foreign file is decoded becomes one line."""
    try:
        yield
    except Exception as e:
        what = " ".join(f"{type(e).__name__}: {e}".split())[:210]
        raise UserError(f"{path}: {told % what}") from e


def load(path, device="cpu"):
    """A checkpoint of ours; UserError for any other file. It is data: nothing in it is executed."""
    with open(path, "rb") as f, reading(path):
        if part := ZipFile(f).testzip():                   # torch.load does not compare the checksums
            raise ValueError(f"{part} is not as it was written")
        f.seek(0)
        c = torch.load(f, map_location=device, weights_only=True)
        if c["format"] != FORMAT or not {"settings", "seconds"} <= set(c):
            raise ValueError(f"no format {FORMAT}")
    return c


# how a model or an optimizer, a generator of torch's or of Python's, and a list give their state and take it
STATES = {"state_dict": "load_state_dict", "get_state": "set_state", "getstate": "setstate", "copy": "extend"}


def pack(x):
    """The state of a model, an optimizer, a generator or a list, as plain data."""
    return next(getattr(x, give)() for give in STATES if hasattr(x, give))


def unpack(x, data):
    """Gives x, which is new, the state that pack(x) was."""
    next(getattr(x, take) for take in STATES.values() if hasattr(x, take))(data)


def change(c, settings):
    """The first setting that a checkpoint was made with another value of, as text; "" if there is none. One
    that is younger than the checkpoint had its default; of the device only a stage that was begun tells."""
    made = {**asdict(Config()), "device": settings.get("device"), **c["settings"]}
    other = {k: v for k, v in settings.items() if made[k] != v}
    smoke = {k: v for k, v in SMOKE.items() if k in settings}
    if other and other.keys() <= smoke.keys() and all(made[k] == v for k, v in smoke.items()):
        return "--smoke, now it is not given"
    return next((f"{k} {made[k]!r}, now {k} is {v!r}" for k, v in other.items()), "")


# ------------------------------------------------------------------------------------------------------------
# GPT-2 weights as published (Radford et al. 2019; 124M to 1.5B), in pretraining's place.

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path):
    """Name -> tensor, or the type's name where it is none of FLOATS. Such a file holds the length of its
    header (8 bytes, little-endian), the header, {name: {"dtype", "shape", "data_offsets": [from, to]}} as
    JSON, and the bytes that the offsets count. It is mapped: a tensor is a view, which need not be aligned,
    and comes into memory as it is used. ValueError or whatever else comes up where a file is not so."""
    data, tensors = np.memmap(path, mode="c"), {}
    start = 8 + int.from_bytes(data[:8], "little")
    header, room = json.loads(bytes(data[8:min(start, 10 ** 8)])), len(data) - start   # the format's limit
    header.pop("__metadata__", None)
    for name, x in header.items():
        dtype, (a, b), n = FLOATS.get(x["dtype"]), x["data_offsets"], math.prod(x["shape"])
        if not 0 <= a <= b <= room or dtype and b - a != n * dtype.itemsize:
            raise ValueError(f"{name!r} must lie in the {room} bytes after the header and be "
                             f"{x['dtype']!r}, {x['shape']}, is said to be at {a} to {b}")
        tensors[name] = x["dtype"] if dtype is None else torch.frombuffer(
            data, dtype=dtype, count=n, offset=start + a).view(x["shape"])
    return tensors


def from_gpt2(path):
    """A GPT with the weights of a .safetensors file or, in a file of any other name, of a state dict. The
    names may begin with "transformer."; names and shapes tell the sizes, and every head is 64 wide. GPT-2's
    Conv1D holds (in,out), so it is turned. UserError names the first tensor that is not right."""
    with reading(path, "not GPT-2 weights as published (%s); name a .safetensors file or a state dict's"):
        there = (read_safetensors(path) if str(path).endswith(".safetensors") else
                 {str(n): x for n, x in torch.load(path, map_location="cpu", weights_only=True).items()})

    def tensor(name, *shape):                    # a word in the shape stands for any number
        x = there.get(name, "missing")
        found = [str(x.dtype)[6:], *x.shape] if isinstance(x, torch.Tensor) else [str(x)[:40]]
        fits = [n == m or type(n) is str for n, m in zip(shape, found[1:])]
        if getattr(x, "dtype", None) not in FLOATS.values() or x.ndim != len(shape) or not all(fits):
            raise UserError(f"{path}: {name} must be float32, float16 or bfloat16, {shape}, is {found}")
        return x

    prefix = "transformer." * ("transformer.wte.weight" in there)
    V, C = tensor(prefix + "wte.weight", "vocabulary", "width").shape
    T = len(tensor(prefix + "wpe.weight", "positions", C))
    if C % 64 or C == 0:
        raise UserError(f"{path}: {prefix}wte.weight must be a multiple of 64 wide, a head's width, is {C}")
    layers = {name.removeprefix(prefix).split(".")[1] for name in there if name.startswith(prefix + "h.")}
    with torch.device("meta"):                   # no memory, no random numbers: the file fills it
        model = GPT(GPTConfig(V, T, max(1, len(layers)), C // 64, C, gelu="tanh")).to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p = p.t() if name.startswith("h.") and p.ndim == 2 else p
            p.copy_(tensor(prefix + name, *p.shape))
            del there[prefix + name]             # no two copies of all weights
    for name in there:                           # what may be left: the mask, and the head, which is tied
        tied = name == "lm_head.weight" and torch.equal(tensor(name, V, C).float(), model.wte.weight)
        if not tied and not name.endswith((".attn.bias", ".attn.masked_bias")):
            raise UserError(f"{path}: {name!r} must " + (
                "equal wte.weight, for GPT-2's head is tied" if name == "lm_head.weight" else
                f"not be there: a GPT-2 of {len(layers)} layers has no such tensor"))
    return model


GPT.from_gpt2 = staticmethod(from_gpt2)


# ------------------------------------------------------------------------------------------------------------
# Stages with their checkpoints, flags.


class Run:
    """The models of one output folder: `model(name)` loads a finished one, or trains it and what it needs."""

    def __init__(self, cfg, source, fresh):
        self.cfg, self.source = cfg, source
        self.models, self.corpora, self.seconds, self.told = {}, {}, {}, set()
        self.device = find_device(cfg.device, cfg.dtype)
        self.data = cfg.data or os.path.join(os.path.dirname(__file__), "data")
        self.enc = find_encoding(cfg.encoding or self.path("vocab.tiktoken", self.data))
        self.world = toyworld(self.data)
        given = os.path.abspath(cfg.comparisons or self.path("comparisons.jsonl", self.data))
        self.given = given if os.path.isfile(given) else ""            # comparisons of the user's
        if cfg.comparisons and not self.given:
            raise UserError(f"--comparisons {cfg.comparisons}: no such file")
        if os.path.realpath(given) == os.path.realpath(self.path("comparisons.jsonl")):
            raise UserError(f"--out {cfg.out}: the run would write over {given}; give another --out")
        try:
            os.makedirs(cfg.out, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out {cfg.out}: cannot be a folder ({e.strerror}); give another") from e
        self.log = Log(cfg, self.enc, self.world)
        if fresh:
            files = [name + end for name in (*STAGE_OF, "collect", "judge") for end in (".pt", ".part")]
            remove(*map(self.path, files + ["comparisons.jsonl", "log.jsonl"]))

    def path(self, name, folder=None):
        """Of a file in --out or another folder."""
        return os.path.join(folder or self.cfg.out, name)

    def rows(self, name, normal=lambda row: row, answers=lambda row: [], **needed):
        """The rows of a data set whose prompt leaves room for a response (as in App. C) and whose answers
        could be sampled; says how many do not. UserError if none is left, or from read_jsonl."""
        rows, most = read_jsonl(self.path(name, self.data), normal, **needed), self.cfg.max_new_tokens
        room = self.cfg.block_size - most
        fit = [row for row in rows if len(encode_prompt(self.enc, row["prompt"])) <= room and
               all(len(encode_response(self.enc, text)) <= most for text in answers(row))]
        told = (f"{name}: {len(rows) - len(fit)} of {len(rows)} rows are left out, for a prompt of more than "
                f"{room} tokens or an answer of more than {most}: see --block_size, --max_new_tokens")
        if not fit:
            raise UserError(told)
        if len(fit) < len(rows) and told not in self.told:
            print(told)
        self.told.add(told)
        return fit

    def prompts(self, name):
        """The prompts of a data set, with what the toy world tells of them and no other field."""
        known = {"prompt": "text", **(dict(task=dict, use_case=str, form=str) if self.world else {})}
        return [{key: row[key] for key in known} for row in self.rows(name, **known)]

    def corpus(self, name="pretrain.txt"):
        """A pretraining text, read once (load_corpus)."""
        if name not in self.corpora:
            self.corpora[name] = load_corpus(self.path(name, self.data), self.enc, self.cfg.block_size)
        return self.corpora[name]

    def demos(self):
        """Demonstrations as ids."""
        rows = self.rows("sft_train.jsonl", demonstration, lambda row: [row["completion"]])
        return [(encode_prompt(self.enc, row["prompt"]), encode_response(self.enc, row["completion"]))
                for row in rows]

    def settings(self, name):
        """The settings that a model's stage and those before it read."""
        cfg = replace(self.cfg, ptx_coef=0.0, ptx_rows=0) if name == "ppo" else self.cfg
        if self.given:                                     # after an edit it is another file
            with open(self.given, "rb") as f:
                cfg = replace(cfg, comparisons=f"{self.given} (crc32 {crc32(f.read()):08x})")
        upto = STAGES[:STAGES.index(STAGE_OF[name]) + 1]
        return {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata["stage"] in upto}

    def finished(self, name):
        """A finished model's checkpoint, or None. One of equal settings in --from is copied; one of other
        settings in --out stops the run and says the way out."""
        path, theirs = [self.path(name + ".pt", folder) for folder in (self.cfg.out, self.source)]
        found = path if os.path.exists(path) else theirs
        if not os.path.exists(found):
            return None
        c = load(found, self.device)
        other = change(c, self.settings(name))
        if other and found == path:
            redo = ", ".join(STAGES[STAGES.index(STAGE_OF[name]):])
            raise UserError(f"{path} was made with {other}: give it as it was or, to do {redo} again, add "
                            f"--from {self.cfg.out} --out NEW to keep both, or --fresh to start over")
        if found != path:
            print(f"{name}: {f'not taken, made with {other},' if other else 'taken'} from {self.source}")
        if other:
            return None
        if found != path and name == "rm" and self.world:
            save(self.path("comparisons.jsonl"), read_text(self.path("comparisons.jsonl", self.source)))
        if found != path:
            save(path, c)
        return c

    def model(self, name):
        """The model of this name, trained if it is not there yet."""
        if name not in self.models:
            c = self.finished(name) or self.train(name)
            remove(*[self.path(part + ".part") for part in [name] + ["collect"] * (name == "rm")])
            self.models[name] = self.build(c, name + ".pt")
            self.seconds.update(c["seconds"])
        return self.models[name]

    def build(self, c, path):
        """The model in a checkpoint."""
        with reading(path):
            model = GPT(GPTConfig(**c["config"]), head=c["head"]).to(self.device)
            model.load_state_dict(c["weights"])
        return freeze(model)

    def train(self, name):
        """Trains the model and what it needs, writes its checkpoint, returns it."""
        needs = {"pretrain": [], "sft": ["pretrain"], "rm": ["sft"]}.get(name, ["sft", "rm"])
        before, start, seconds = [self.model(n) for n in needs], time.time(), {}
        # with the device: a stage that was begun goes on where its generators live
        self.log.settings, self.log.earlier = {**self.settings(name), "device": self.device.type}, 0
        cfg, enc, end = self.cfg, self.enc, (self.device, self.log)
        if name == "pretrain":
            model = self.initial() if cfg.init else pretrain(cfg, enc, self.corpus(), *end)
        elif name == "sft":
            model = sft(cfg, enc, *before, self.demos(), self.corpus() if cfg.sft_mix else None, *end)
        elif name == "rm":
            self.collect(*before)
            seconds["collect"] = time.time() - start + self.log.earlier
            model = train_reward_model(cfg, enc, *before, self.comparisons("train"), self.demos(), *end)
        elif name in ("dpo", "kto"):
            model = train_on_comparisons(cfg, enc, name, before[0], self.comparisons("train"), *end)
        else:
            rows = self.prompts("ppo_train.jsonl")
            prompts = [{**p, "ids": encode_prompt(enc, p["prompt"])} for p in rows]
            coef = 0.0 if name == "ppo" else cfg.ptx_coef
            model = ppo(cfg, enc, *before, prompts, self.corpus() if coef else None, coef, *end,
                        reinforce if name == "reinforce" else gae)
        seconds[name] = time.time() - start + self.log.earlier - sum(seconds.values())
        c = {"format": FORMAT, "settings": self.settings(name), "config": asdict(model.config),
             "seconds": seconds, "head": "scalar" if model.head else "lm", "weights": model.state_dict()}
        save(self.path(name + ".pt"), c)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {seconds[name]:.0f} s, "
              f"{peak_memory(self.device) / 1e9:.2f} GB of memory at most; {self.path(name + '.pt')}\n",
              flush=True)
        return c

    def initial(self):
        """GPT-2 from --init, as pretraining leaves its model. UserError if it does not fit the settings."""
        model, cfg, n = from_gpt2(self.cfg.init), self.cfg, self.enc.n_vocab
        words, room = model.config.vocab_size, model.config.block_size
        if words != n or room < cfg.block_size:
            raise UserError(f"{cfg.init}: has {words} tokens and {room} positions; must be the {n} of "
                            f"--encoding (GPT-2's own: gpt2), and at least --block_size {cfg.block_size}")
        return freeze(model.to(self.device))

    def collect(self, model):
        """The simulated labelers' comparisons: for the validation prompts, and for the training prompts, ten
        times as many, unless comparisons are given."""
        n = self.cfg.rm_prompts
        rows = [{**row, "split": split} for split, most in (("train", n), ("valid", max(10, n // 10)))
                if self.world and not (split == "train" and self.given)
                for row in self.prompts(f"rm_{split}.jsonl")[:most]]
        if rows:
            out = collect(self.cfg, self.enc, model, rows, self.world, seed(self.cfg, "collect", self.device),
                          random.Random(self.cfg.seed), self.log)
            save(self.path("comparisons.jsonl"), json_lines(out))

    def comparisons(self, split):
        """The comparisons of a split, "train" or "valid". Of given ones, if none says it, every fourth prompt
        is for validation, but in the toy world all are for training: there the labelers' validate."""
        cfg, sampled = self.cfg, self.world and (split == "valid" or not self.given)
        path = self.given or self.path("comparisons.jsonl", self.data)
        if sampled:
            path = self.path("comparisons.jsonl")
            if not os.path.exists(path):
                raise UserError(f"{path}: is missing; remove rm.pt too, and both are made again")
            rows = [c for c in read_jsonl(path, comparison) if c.get("split") == split]
        elif not self.given:
            raise UserError(f"{path}: is missing; add it, or name a file with --comparisons")
        else:                                              # a response without end takes no end-of-text
            ended = lambda c: [y for y, end in zip(c["responses"], c["ended"]) if end]
            rows = self.rows(path, comparison, ended)
            known = self.world or any("split" in c for c in rows)
            held_out = set() if known else {*list(dict.fromkeys(c["prompt"] for c in rows))[3::4]}
            rows = [{k: c[k] for k in ("prompt", "responses", "ranks", "ended")} for c in rows
                    if c.get("split", "valid" if c["prompt"] in held_out else "train") == split]
        if not any(encode_comparisons(self.enc, rows, cfg.max_new_tokens)):
            raise UserError(f"{path}: no answers of unequal text and rank for the split {split}; give more "
                            "prompts, at least four")
        return rows

    def prepare(self, rival=None):
        """Reads what evaluate will need: better to hear what is missing before the training than after it."""
        cfg, self.probes, self.rival = self.cfg, {}, None
        self.tests = self.prompts("test.jsonl")[:cfg.test_prompts]
        if self.world:
            p = self.probes = read_jsonl(self.path("probes.json", self.data), **PROBES)[0]
            texts = [p["respect"] + x["prompt"] for x in p["toxic"] + p["truthful"] + p["unseen"]]
            need = max(len(encode_prompt(self.enc, text)) for text in texts) + cfg.max_new_tokens
            size = lambda tests, key: max(len(self.enc.encode_ordinary(x[key])) for x in tests)
            need = max(need, *(size(x, "prompt") + size(x, "answer") + 1 for x in p["fewshot"].values()))
            if need > cfg.block_size:
                raise UserError(f"probes.json: needs a context of {need} tokens; give --block_size {need}")
        else:
            self.comparisons("train"), self.comparisons("valid")
        if os.path.exists(self.path("pretrain_valid.txt", self.data)):
            self.corpus("pretrain_valid.txt")
        for name in MODELS.values():                       # one of other settings stops the run now
            if os.path.exists(self.path(name + ".pt")):
                self.finished(name)
        if rival:
            path, mine = self.path("pretrain.pt", rival), self.settings("pretrain")
            c = load(path, self.device)
            other = change(c, {k: mine[k] for k in ("data", "encoding")})
            if other or c["config"]["block_size"] < cfg.block_size:
                raise UserError(f"--rival {rival}: made with {other or 'a smaller --block_size'}")
            self.rival = self.build(c, path)

    def judge(self):
        """A function: answers to the tests, other answers -> how often the first are preferred, prompt by
        prompt, 0 to 1. Simulated labelers judge or, without them, a second reward model that learned from
        the held-out comparisons."""
        cfg = self.cfg
        if self.world:
            tasks = [p["task"] for p in self.tests]
            return lambda *pair: preference(self.world, "train", tasks, *pair, cfg.judges,
                                            random.Random(cfg.seed))
        print("no simulated labelers: a second reward model, trained on the held-out comparisons, judges")
        sft_model, self.log.settings = self.model("sft"), {**self.settings("rm"), "device": self.device.type}
        judge = train_reward_model(cfg, self.enc, sft_model, self.comparisons("valid"), self.demos(),
                                   self.device, self.log, "judge")
        remove(self.path("judge.part"))
        prompts = [encode_prompt(self.enc, p["prompt"]) for p in self.tests]
        score = lambda mine: reward_and_kl(cfg, self.enc, judge, sft_model, prompts, mine, self.device)[0]
        # equal answers tie, though their scores may differ by rounding, as batches have their own widths
        same = lambda a, b: (a["text"], a["ended"]) == (b["text"], b["ended"])
        return lambda mine, theirs: [0.5 if same(a, b) else float(x > y) for a, b, x, y in
                                     zip(mine, theirs, score(mine), score(theirs))]

    def evaluate(self, methods=()):
        """Writes results.json, samples.txt and picture.svg, prints samples and table."""
        cfg, enc, device, probes, begun = self.cfg, self.enc, self.device, self.probes, time.time()
        gpt, sft_model, reward_model = [self.model(n) for n in ("pretrain", "sft", "rm")]
        models = {"GPT": gpt} | ({"GPT (prompted)": gpt} if probes else {})
        models |= {k: self.model(n) for k, n in MODELS.items() if n in self.models or self.finished(n)}
        models |= {f"best of {cfg.k_max}": sft_model} if "best_of_n" in methods else {}
        models |= {"rival GPT": self.rival} if self.rival else {}
        rm = judge_reward_model(cfg, enc, reward_model, self.comparisons("valid"), device)
        judge, log = self.judge(), self.log.path           # no log, where all is from --from
        history = read_jsonl(log, stage=str, step=int) if os.path.exists(log) else []
        history = {(h["stage"], h["step"]): h for h in history}.values()       # of a repeated step the last
        answers, sets = question(cfg, enc, models, reward_model, self.tests, probes, device)
        half = lambda v: 1.96 * math.sqrt(mean([(x - mean(v)) ** 2 for x in v]) / max(1, len(v)))
        results, valid = {}, "pretrain_valid.txt"
        for name, model in models.items():
            numbers, shares = measure(cfg, enc, name, model, answers, sets, models, reward_model, judge,
                                      device)
            if self.world:
                more = measure_toy(cfg, enc, name, model, answers, sets, self.world, probes, device)
                numbers, shares = numbers | more[0], shares | more[1]
            if os.path.exists(self.path(valid, self.data)):
                numbers["pretrain_loss"] = corpus_loss(model, self.corpus(valid), cfg.block_size, device)
            results[name] = {**{k: mean(v) for k, v in shares.items()}, **numbers,
                             "parameters": sum(p.numel() for p in model.parameters()),
                             "ci95": {k: half([float(x) for x in v]) for k, v in shares.items()}}
            self.log("evaluate", len(results), len(models))
        seconds = {**self.seconds, "evaluate": time.time() - begun}
        seconds["total"] = sum(seconds.values())
        shown = samples(self.tests, answers)
        save(self.path("samples.txt"), shown.strip() + "\n")
        save(self.path("picture.svg"), picture(results, history, rm.get("best_of_n", {})))
        save(self.path("results.json"), json.dumps({
            "config": {**asdict(cfg), **asdict(gpt.config), "block_size": cfg.block_size},
            "seconds": {k: round(v, 1) for k, v in seconds.items()},
            "reward_model": rm, "models": results}, indent=1) + "\n")
        told = ", ".join(f"{k} {v:.3f}" for k, v in rm.items() if isinstance(v, float))
        print(f"{shown}\n\n{table(results)}\n\nReward model on held-out comparisons: {told}.\n"
              f"{seconds['total']:.0f} s. In {cfg.out}: results.json, samples.txt, picture.svg, "
              "log.jsonl, the checkpoints")


# What people type: rankings (3.4) and questions.


def ask(prompt):
    """A line that the user types, "q" at the end of input (Ctrl-D). A pipe's is shown, as a terminal's is."""
    importlib.util.find_spec("readline") and importlib.import_module("readline")        # arrow keys
    try:
        line = input(prompt)
    except EOFError:
        print()
        return "q"
    except UnicodeDecodeError as e:
        raise UserError(f"the line typed is not UTF-8 text ({e.reason})") from e
    print(end="" if sys.stdin.isatty() else line + "\n")
    return line.strip()


def read_ranking(text, K):
    """A typed ranking of K answers, best first: "3 > 1 = 4 > 2" -> [2, 4, 1, 2], the ranks of answers 1 to K
    as the labelers give them, 1 + how many are better. ValueError, one sentence, if it is none."""
    groups = [[word.strip() for word in group.split("=")] for group in text.split(">")]
    numbers = [str(i + 1) for i in range(K)]
    if sorted(sum(groups, [])) != sorted(numbers):
        raise ValueError(f"name each of 1 to {K} once, with > or = between them")
    return [1 + sum(map(len, groups[:i])) for n in numbers for i, group in enumerate(groups) if n in group]


def agreement(world, tasks, rankings, rng):
    """Your rankings against simulated labelers, one a ranking: over the pairs in which you have a preference,
    1 where the labeler has the same, 0 the opposite, 0.5 none. tasks: prompt -> task; others are left out."""
    people, hits = world and world.make_labelers("train"), []
    for c in (c for c in rankings if c["prompt"] in tasks):
        merits = [world.check(tasks[c["prompt"]], *x) for x in zip(c["responses"], c["ended"])]
        both = list(zip(c["ranks"], world.rank(rng.choice(people), merits, c["responses"], rng)))
        hits += [0.5 if x == y else float(x < y) for a, x in both for b, y in both if a < b]
    return hits


USAGE = "Best first, = for a tie: 3 > 1 = 2. u: undo, s: skip, q: quit, ?: this line"


def label(run):
    """You rank answers of the SFT model to those prompts of rm_train.jsonl that OUT/labels.jsonl has not yet.
    A ranking is on the disk, as a comparison, before the next prompt comes."""
    cfg, path, typed = run.cfg, run.path("labels.jsonl"), None
    done = read_jsonl(path, comparison) if os.path.exists(path) and os.path.getsize(path) else []
    ranked, policy, prompts = {c["prompt"] for c in done}, run.model("sft"), run.prompts("rm_train.jsonl")
    todo = [p for p in reversed(prompts) if p["prompt"] not in ranked]
    tasks, generator = {p["prompt"]: p["task"] for p in prompts if run.world}, seed(cfg, "label", run.device)
    print(USAGE)
    while todo and typed != "q":
        c = todo.pop()
        if "responses" not in c:                 # else it was shown before
            ids = encode_prompt(run.enc, c["prompt"])
            answers = respond(policy, run.enc, [ids] * cfg.k_min, cfg.max_new_tokens, generator)
            c["responses"], c["ended"] = zip(*dict.fromkeys((r["text"], r["ended"]) for r in answers))
        if len(c["responses"]) < 2:
            continue
        print(f"\n[{len(done) + 1}] " + c["prompt"].replace("\n", "\n    ") + "\n")
        for i, answer in enumerate(zip(c["responses"], c["ended"]), 1):
            print(f"  {i}  {on_a_line(*answer)}")
        while (typed := ask("ranking: ")) not in ("u", "s", "q"):
            try:
                done.append({**c, "ranks": read_ranking(typed, len(c["responses"])), "labeler": "you"})
                break
            except ValueError as e:
                print(USAGE if typed == "?" else e)
        if typed == "u":
            todo += [c] + done[-1:]              # the last one comes again, then this one
            del done[-1:]
        if typed not in ("s", "q"):
            save(path, json_lines(done))
            if hits := agreement(run.world, tasks, done, random.Random(cfg.seed)):
                print(f"agreement so far {mean(hits):.2f} of {len(hits)} pairs "
                      "(labelers among themselves: 0.73)")
    print(f"{len(done)} rankings in {path}. To train on them, with the other flags of this run:\n"
          f"  python instructgpt.py ppo --from {cfg.out} --out NEW --comparisons {path}")


def chat(run, names):
    """Models (names in the results; none: all that are there) answer typed questions greedily, side by side,
    with reward and KL to SFT. UserError if a checkpoint is missing."""
    cfg, enc, mark = run.cfg, run.enc, len(encode_prompt(run.enc, ""))
    names = names or [k for k, n in MODELS.items() if run.finished(n)]
    for n in ["sft", "rm"] + [MODELS[k] for k in names]:
        if not run.finished(n):
            stage = f"rm --methods {n}" if n in ("reinforce", "dpo", "kto") else STAGE_OF[n]
            raise UserError(f"{run.path(n + '.pt')} is missing: python instructgpt.py {stage} "
                            f"--out {cfg.out} makes it, with this run's other flags")
    models, sft_model, reward_model = [run.model(MODELS[k]) for k in names], run.model("sft"), run.model("rm")
    print("Ask; q quits. reward: demonstrations are at 0, * no end, fixed. KL to SFT: nats")
    while (text := ask("> ")) != "q":
        ids, room = encode_prompt(enc, text[:LONGEST]), cfg.block_size - cfg.max_new_tokens
        if not text or len(ids) > room:
            print(f"a question has 1 to {room - mark} tokens, this one {len(ids) - mark}")
            continue
        print(f"{'reward':>15}{'KL':>7}")
        for k, model in zip(names, models):
            r, = respond(model, enc, [ids], cfg.max_new_tokens, None, 0, one_line=k == "GPT")
            tokens, mask, _ = stack([ids], [r["ids"]], run.device)              # (1,T), (1,T-1)
            kl = exact_kl(model, sft_model, tokens, mask).item()
            (reward,), *_ = reward_and_kl(cfg, enc, reward_model, sft_model, [ids], [r], run.device)
            print(f"{k:9}{reward:6.2f}{'* '[r['ended']]}{kl:6.2f}  {on_a_line(r['text'], r['ended'])}")


def find_device(name, dtype="float32"):
    """The torch device of this name, made the current one; without a name a CUDA GPU or, where there is none,
    the CPU. UserError if it is not there. MPS is taken only by name, and from torch 2.12 on: before, its
    attention, index_copy_ and products with strided weights raised or were silently wrong."""
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
    name = {"": there[0], "cuda": "cuda:0"}.get(name, name)
    there += ["mps"] * (torch.backends.mps.is_available() and torch.__version__ >= "2.12")
    if name not in there:
        raise UserError(f"--device {name}: not there; this machine has {', '.join(there)} (mps: with torch "
                        "2.12 or later)")
    new = "cuda" in name and torch.cuda.get_device_capability(name)[0] >= 8        # Ampere
    if dtype not in ["float32"] + ["bfloat16"] * new:
        raise UserError(f"--dtype {dtype}: must be float32 or, only on a CUDA GPU from Ampere on, bfloat16")
    if "cuda" in name:
        torch.cuda.set_device(name)                        # streams and graphs go by the current one
        torch.backends.cuda.enable_cudnn_sdp(False)        # plans anew, some 30 ms, for each shape it meets
    return torch.device(name)


def peak_memory(device):
    """The most bytes held so far: by tensors on a GPU, else by the process (Windows does not tell: 0)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource                              # there is none on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Parser(argparse.ArgumentParser):
    def error(self, message):                    # one line instead of the whole usage
        raise UserError(f"{message}; see: python instructgpt.py --help")


SMOKE = dict(n_embd=64, pretrain_steps=150, pretrain_batch=16, sft_epochs=1, rm_prompts=300, iterations=4,
             episodes=64, test_prompts=100)


def parse(argv):
    """Command line -> (all flags, Config, the settings that were given). UserError for what cannot work."""
    parser = Parser(description=__doc__.strip().split("\n\n")[0], allow_abbrev=False)
    stages = STAGES + ["all", "label", "chat"]
    parser.add_argument("stage", nargs="?", default="all", help="what to run: " + ", ".join(stages))
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help="who answers in chat")
    parser.add_argument("--from", dest="source", metavar="DIR", help="take what fits from this finished run")
    parser.add_argument("--methods", nargs="+", default=[], choices=["dpo", "kto", "reinforce", "best_of_n"],
                        help="neighbours to train and evaluate too")
    parser.add_argument("--rival", metavar="DIR", help="evaluate beside this run's GPT (the paper's 175B)")
    parser.add_argument("--fresh", action="store_true", help="start over: remove what a run left in --out")
    parser.add_argument("--smoke", action="store_true", help="everything in miniature, in about 20 seconds")
    for f in fields(Config):
        kind, text = type(f.default), f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        parser.add_argument("--" + f.name, type=kind, metavar=kind.__name__.upper(), help=text)
    a = parser.parse_args(argv)
    given = {f.name: getattr(a, f.name) for f in fields(Config) if getattr(a, f.name) is not None}
    cfg = Config(**{**(SMOKE if a.smoke else {}), **given})
    check(cfg)
    trained = [name for name in given if cfg.init and name.startswith(("n_", "pretrain_"))]
    same = a.source and os.path.realpath(a.source) == os.path.realpath(cfg.out)
    for bad, told in ((a.stage not in stages, f"{a.stage}: no such stage"),
                      (a.models and a.stage != "chat", "--models goes with chat"),
                      (trained, f"--{', --'.join(trained)}: not with --init: its file has been pretrained"),
                      (cfg.n_embd % cfg.n_head, f"--n_embd {cfg.n_embd}: must be a multiple of --n_head"),
                      (a.source and not os.path.isdir(a.source), f"--from {a.source}: no such folder"),
                      (same, f"--from {a.source}: is --out; give another --out"),
                      (a.rival and not os.path.exists(os.path.join(a.rival, "pretrain.pt")),
                       f"--rival {a.rival}: holds no pretrain.pt, as a run leaves it"),
                      (a.rival and a.fresh and os.path.realpath(a.rival) == os.path.realpath(cfg.out),
                       f"--rival {a.rival}: is --out, which --fresh empties")):
        if bad:
            parser.error(told)
    return a, cfg, given


def check(cfg):
    """UserError, by name and with the allowed range, for a number that cannot work."""
    low = {f.name: int(type(f.default) is int) for f in fields(cfg) if type(f.default) is not str}
    low |= {"seed": 0, "warmup": 0, "micro_batch": 0, "k_min": 2, "k_max": max(2, cfg.k_min),
            "block_size": 48, "unfinished_score": -1e9, "temperature": 1e-9, "pretrain_lr": 1e-9,
            "sft_lr": 1e-9, "rm_lr": 1e-9, "policy_lr": 1e-9, "value_lr": 1e-9, "cliprange": 1e-9,
            "value_clip": 1e-9}
    high = {"seed": 2 ** 32, "lam": 1, "ema": 1, "sft_mix": 0.99, "sft_dropout": 0.99, "judges": 20,
            "minibatches": cfg.episodes, "max_new_tokens": cfg.block_size - 33}
    for name, least in low.items():
        value, most = getattr(cfg, name), high.get(name, 10 ** 9)
        if not least <= value <= most:           # NaN is refused here too
            raise UserError(f"--{name} {value}: must lie in {least} to {most}")


def main(argv=None):
    """The command. Exit code 0; 1 when numbers went wrong; 2 for a user's mistake; 130 after Ctrl-C."""
    run = None
    try:
        a, cfg, given = parse(argv)
        if hasattr(sys.stdout, "reconfigure"):   # what a terminal that is not UTF-8 cannot show becomes ?
            sys.stdout.reconfigure(errors="replace")
        torch.set_flush_denormal(True)           # peaked softmaxes are full of denormals, slow on a CPU
        torch.empty(8_000_000)                   # glibc, once 32 MB were freed, keeps memory: 6 % faster
        run = Run(cfg, a.source, a.fresh)
        signal.signal(signal.SIGINT, run.log.interrupt)
        both = ["ppo", "ppo_ptx"] if "ptx_coef" not in given else ["ppo_ptx"] if cfg.ptx_coef else ["ppo"]
        names = {"ppo": both, "all": ["rm"] + both}.get(a.stage, [a.stage] * (a.stage in STAGE_OF))
        with precision(run.device, cfg.dtype):
            if a.stage in ("all", "evaluate"):
                run.prepare(a.rival)
            if {"ppo", "ppo_ptx", "reinforce"} & {*names, *a.methods}:
                run.prompts("ppo_train.jsonl")             # better to hear now what is missing
            for name in names + [m for m in a.methods if m != "best_of_n"]:
                run.model(name)
            if a.stage in ("all", "evaluate"):
                run.evaluate(a.methods)
            elif a.stage == "label":
                label(run)
            elif a.stage == "chat":
                chat(run, a.models)
        return 0
    except (UserError, OSError) as e:            # OSError: a full disk, a folder that may not be written
        print(f"instructgpt.py: {e}", file=sys.stderr)
        return 2
    except NotFinite as e:
        part = run.path(run.log.name + ".part")
        good = f"the last good state is {part}" if os.path.exists(part) else "nothing had been saved yet"
        print(f"instructgpt.py: {run.log.name}, step {run.log.step + 1}: {e}; {good}; lower this stage's "
              f"learning rate and begin it again: --from {cfg.out} --out NEW", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        at = f"{run.log.name}, step {run.log.kept}" if run and run.log.busy else "what is on disk"
        print(f"\nstopped; the same command, without --fresh, goes on after {at}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
