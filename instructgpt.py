"""
InstructGPT in one file: Ouyang et al. 2022, "Training language models to follow instructions with human
feedback" (arXiv 2203.02155), from pretraining to the results, on a toy world that shows its findings.

    python instructgpt.py                                     the paper's path: trains, evaluates, writes out/
    python instructgpt.py --smoke                             the same in miniature, into out_smoke/
    python instructgpt.py sft                                 one stage, and what it needs
    python instructgpt.py --from out --out out_b --beta 0.1   another beta on the pretrain, sft, rm of out/
    python instructgpt.py dpo kto evaluate                    these neighbours too, in the same table
    python instructgpt.py label                               you rank answers of the SFT model
    python instructgpt.py chat --models GPT SFT PPO-ptx       they answer your questions side by side

It takes a CUDA GPU if there is one, else the CPU. Stop it whenever you like: the same command goes on
where it was. A folder remembers its settings.

Read it beside the paper, top to bottom; you can stop after each section:

    Settings              the hyperparameters: the toy's value, and the paper's or GPT-3's        App. C
    Tokens and rows       encoding, the corpus, rows of prompt + response, the action frame       3.2
    GPT                   the decoder, with a language head or a scalar head                      3.5
    Rollout               the batched sampler that keeps the log-probs                            C.4
    Formulas              the equations as pure functions: Eq. 1, KL rewards, GAE, PPO            3.5
    What every loop needs seeds, the optimizer's step, checkpoints
    Step 0                pretraining, GPT-3's place
    Step 1                supervised fine-tuning on demonstrations                                C.1, C.3
    Step 2                comparisons and the reward model                                        C.2
    Step 3                PPO and PPO-ptx, Eq. 2                                                  C.4
    Neighbours            REINFORCE, DPO, KTO, RLAIF on the same data
    Evaluation            preference, truth, manners, bias, the alignment tax                     4
    Files                 readers of data, what a folder remembers
    GPT-2 weights         as published: read, checked, turned
    You                   label and chat
    The command           Figure 2 from left to right

What differs from the paper
  * People, customers and the web are simulated (data/toyworld.py), so the true quality, "gold", is known.
  * The models have half a million parameters each (the paper's reward model and value net have 6B beside
    policies of 1.3B to 175B), and responses have at most 16 tokens. So the learning rates, beta and the
    pretraining coefficient are the toy's own, found by trial.
  * One SFT model is the baseline, the start of RL and the KL reference. The paper's RL starts from a second
    one (2 epochs, 10 % pretraining mix; C.3, C.4). Fig. 37 varies its epochs (1, 2) and its mix (0, 10,
    50 %), and finds PPO little sensitive, the 10 % mix best.
  * About half of the demonstrations have a flaw on purpose, so that there is something left for RL to mend.
  * The reward model starts from the SFT model (3.5). The paper's final one starts from a GPT-3 tuned on
    public NLP tasks (C.2).
  * The last SFT checkpoint is taken. The paper chose it by reward-model score (C.1).
  * A minibatch carries as many pretraining rows as episodes. The paper's carries eight times as many.
What the paper does not say, and what we chose
  * GAE's lambda is 0.95, as in Stiennon et al. 2020 and in the code of Ziegler et al. 2019. The value's move
    is clipped at 0.2, as in that code.
  * Advantages are whitened, over the whole batch (Ziegler: per minibatch). Rewards are not whitened.
  * Token losses are means over response tokens, in SFT and in PPO; the prompt is masked in both.
  * The score is read at the end-of-text token. A response that does not end gets a fixed score, -1 (Ziegler).
  * There is no entropy bonus, and no coefficient for the value loss: the value net is a network of its own,
    with an optimizer of its own.
  * Gradients are clipped at norm 1. Adam's eps is PyTorch's 1e-8 (Ziegler's is 1e-5). No weight decay.
  * There is no dropout in RL.
  * The EMA, an exponential moving average of the weights, moves at each optimizer step. The raw weights
    sample; the EMA is what is kept and evaluated.
  * In the evaluation GPT's answers, which run on, are cut at a newline, as the paper's public tasks are.
Left out on purpose
  * The sweeps of appendix E, a second round of comparisons on the PPO policy.
  * Left padding, top-k and top-p: PPO needs the log-probs of what was sampled, from the distribution it was
    sampled from. Rows are padded on the right, and each row has its own position in the cache.
  * Several GPUs, half precision, adaptive KL, reward scaling, callbacks, trackers, config files.
"""
import argparse                                  # the command line
import hashlib                                   # seeds of steps, fingerprints of files
import importlib                                 # loads data/toyworld.py and data/picture.py
import json
import math
import os
import random                                    # K, and the labelers' noise
import sys
import time
from base64 import b64decode                     # tiktoken's rank files
from contextlib import contextmanager            # around the reading of files
from dataclasses import asdict, dataclass, field, fields, replace
from zipfile import ZipFile                      # checkpoints are zip files

import numpy as np                               # the corpus is one array
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------------
# Settings (App. C). One line each: the toy's value, what it is, and in brackets the value of the paper or,
# where it is marked so, of the GPT-3 that the paper starts from. "Not stated" is the paper's silence.

def setting(default, text, paper=None, low=0, high=1e15):
    """A field of Config that knows its help text, the paper's value, and the range of a number."""
    text = f"{text} [{paper}]" if paper else text
    return field(default=default, metadata={"help": text, "low": low, "high": high})

@dataclass
class Config:
    out: str = setting("out", "folder that the run writes to")
    data: str = setting("", "folder with the data sets; empty: data/ beside this file")
    comparisons: str = setting("", "file to learn from; empty: that in --data, or else labelers rank")
    device: str = setting("", "cpu or cuda; empty: cuda, if there is one, else cpu")
    save_every: float = setting(30.0, "seconds of training between two saves")
    seed: int = setting(0, "all draws of a run follow from it; the same CPU gives the same numbers")
    # the model: GPT-3's form in miniature
    n_layer: int = setting(2, "layers", "GPT-3: 24 (1.3B) to 96 (175B)", low=1)
    n_head: int = setting(2, "attention heads", "GPT-3: 24 to 96")
    n_embd: int = setting(128, "width", "GPT-3: 2,048 to 12,288", low=1)
    block_size: int = setting(64, "context, tokens", "2,048", low=1)
    # step 0: pretraining
    init: str = setting("", "file of GPT-2 weights; empty: pretrain from nothing")
    encoding: str = setting("", "tiktoken's name (gpt2) or a rank file; empty: vocab.tiktoken of --data")
    pretrain_steps: int = setting(2800, "optimizer steps", "GPT-3: 300 B tokens")
    pretrain_batch: int = setting(32, "rows of block_size tokens per step", "GPT-3: 1 to 3.2 M tokens", low=1)
    pretrain_lr: float = setting(2e-3, "peak learning rate, cosine to a tenth", "GPT-3: 2e-4 to 6e-5")
    # step 1: supervised fine-tuning
    sft_epochs: int = setting(3, "passes over the demonstrations", "16; for the start of RL 2")
    sft_batch: int = setting(32, "demonstrations per step", "32; 175B: 8", low=1)
    sft_lr: float = setting(1e-3, "peak learning rate, cosine to a tenth", "9.65e-6, baseline; 175B: 5.03e-6")
    sft_dropout: float = setting(0.0, "residual dropout", "0.2 for the baseline", high=0.9)
    sft_mix: float = setting(0.1, "pretraining rows: share and weight", "10 %; weight not stated", high=0.9)
    max_new_tokens: int = setting(16, "longest response, end-of-text included", "1k", low=1)
    # step 2: comparisons and the reward model
    rm_prompts: int = setting(7000, "prompts to collect comparisons for", "33,207", low=1)
    k_min: int = setting(4, "fewest responses per prompt", "4", low=2)
    k_max: int = setting(9, "most responses per prompt", "9")
    rm_epochs: int = setting(1, "passes over the comparisons", "1")
    rm_batch: int = setting(8, "prompts per step, each with all its pairs", "64", low=1)
    rm_lr: float = setting(6e-4, "peak learning rate, cosine to a tenth", "9e-6")
    # step 3: reinforcement learning
    iterations: int = setting(60, "PPO iterations", "500, from 256k episodes / 512", low=1)
    episodes: int = setting(256, "episodes per iteration", "512", low=1)
    minibatches: int = setting(8, "minibatches per iteration, one step each, one inner epoch", "8", low=1)
    policy_lr: float = setting(2e-4, "policy's learning rate", "not stated; 2.55e-6 to 2.55e-5 tried")
    value_lr: float = setting(1e-3, "value net's learning rate, fixed", "9e-6; 175B: 5e-6")
    warmup: int = setting(10, "warm-up iterations from a tenth of the peak, constant after it", "10")
    beta: float = setting(0.2, "KL coefficient, in units of score per nat", "0.02")
    ptx_coef: float = setting(1.0, "weight of the pretraining loss in PPO-ptx; Eq. 2's gamma", "27.8")
    ptx_rows: int = setting(1, "pretraining rows per episode", "8", low=1)
    cliprange: float = setting(0.2, "PPO's clip of the ratio", "0.2")
    value_clip: float = setting(0.2, "clip of the value's move", "not stated; Ziegler: 0.2")
    lam: float = setting(0.95, "GAE's lambda", "not stated; ancestors: 0.95", high=1)
    temperature: float = setting(1.0, "of the rollouts", "1", low=1e-6)
    ema: float = setting(0.992, "decay of the weights' moving average", "0.992; per what: not stated", high=1)
    unfinished_score: float = setting(-1.0, "score of a response without end", "Ziegler: -1", low=-1e9)
    # evaluation
    test_prompts: int = setting(600, "prompts that the models answer", "3,196", low=1)

# --smoke: everything in miniature. With so few steps the moving average of the weights has to follow faster.
SMOKE = dict(n_embd=64, pretrain_steps=150, pretrain_batch=16, sft_epochs=1, rm_prompts=300, iterations=4,
             episodes=64, ema=0.9, test_prompts=100)

# ------------------------------------------------------------------------------------------------------------
# Tokens and rows (3.2). A request ends with "\n>" and its reply starts with a space, as on many pages of the
# toy's web; the reply ends with end-of-text (EOS below). Whatever a user types is encoded as plain text, so
# it can never hold a real end-of-text. Of the toy world:
#
#     prompt    "List two colors. Leave out red.\n>"       response  " blue and green.<|endoftext|>"
#     a flaw    " happy, you pest.<|endoftext|>"           task      what data/toyworld.py checks it against

MARK = "\n>"
EOT = "<|endoftext|>"

def encode_prompt(enc, text):
    """A request -> its ids, the mark behind it included."""
    return enc.encode_ordinary(text + MARK)

def encode_response(enc, text):
    """A reply -> its ids, the space before it and end-of-text included. No text: end-of-text alone."""
    return enc.encode_ordinary(" " + text if text else "") + [enc.eot_token]

def decode_response(enc, ids):
    """The ids of a reply -> its text, without the space before it and the end-of-text behind it."""
    return enc.decode([token for token in ids if token != enc.eot_token]).removeprefix(" ")

def corpus_batch(corpus, n, length, generator, device):
    """n random rows of `length` tokens -> (n,length) int64. The corpus is one array of all tokens and the
    places where rows may start: where a document does, since a prompt starts there too, and at every `length`
    tokens inside a long one (see load_corpus)."""
    tokens, starts = corpus                                                     # (N,), (starts,)
    chosen = torch.randint(len(starts), (n,), generator=generator).numpy()      # (n,)
    rows = tokens[starts[chosen][:, None] + np.arange(length)]                  # (n,length)
    return torch.from_numpy(rows.astype(np.int64)).to(device)

def stack(prompts, responses, device="cpu"):
    """Rows of prompt + response. prompts, responses: B lists of ids -> tokens (B,T) int64, T the longest
    row, mask (B,T-1) bool, last (B,) the index of each row's last token. The action frame:

        tokens      p0   p1   p2   r0   r1  EOS    0
        column       0    1    2    3    4    5
        predicts    p1   p2   r0   r1  EOS    0
        mask         .    .    x    x    x    .

    Column t of log-probs, values, rewards and mask speaks of the prediction of token t+1, made in the state
    "tokens 0..t". The mask is True where token t+1 belongs to the response, and EOS does. Filler, id 0,
    stands on the right, and attention looks to the left, so no real token sees it. An id 0 may be real too:
    ask the mask, never the id."""
    prompt_lens = torch.tensor([len(x) for x in prompts])                       # (B,)
    lens = prompt_lens + torch.tensor([len(y) for y in responses])              # (B,)
    tokens = torch.zeros(len(prompts), int(lens.max()), dtype=torch.long)       # (B,T)
    for row, x, y in zip(tokens, prompts, responses):
        row[:len(x) + len(y)] = torch.tensor(x + y)
    column = torch.arange(tokens.size(1) - 1)                                   # (T-1,)
    mask = (column >= prompt_lens[:, None] - 1) & (column < lens[:, None] - 1)  # (B,T-1)
    return tokens.to(device), mask.to(device), (lens - 1).to(device)

def batches(lengths, size, epochs, generator):
    """Random batches of indices for some epochs, each of rows of similar length, so that little is spent on
    filler: shuffle, sort stretches of eight batches by length, cut, shuffle the batches."""
    plan = []
    for _ in range(epochs):
        order = []
        for stretch in torch.randperm(len(lengths), generator=generator).split(8 * size):
            order += sorted(stretch.tolist(), key=lengths.__getitem__)
        cut = [order[start:start + size] for start in range(0, len(order), size)]
        plan += [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
    return plan

def parts_by_length(lengths, most):
    """Indices of all rows in parts of similar length and of at most `most` tokens, filler included. What has
    no gradient goes through a model in such parts: that needs little memory and wastes little."""
    parts, part = [], []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if part and lengths[i] * (len(part) + 1) > most:
            parts.append(part)
            part = []
        part.append(i)
    return parts + [part]

def tokens_at_once(device):
    """How many tokens are scored at once: few stay in a CPU's cache, many keep a GPU busy."""
    return 1024 if device.type == "cpu" else 4096

def mean(x):
    """The mean of a list of numbers; 0 for an empty one."""
    return sum(x) / max(1, len(x))


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
    gelu: str = "none"                           # exact erf, and here the faster one; GPT-2 has "tanh"

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        """x (B,T,C) -> (B,T,C). Without a cache each token sees itself and the ones before it in x. With one
        the new keys and values are written into it, and each token sees what the cache lets it see."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)       # (B,T,3,H,C/H)
        q, k, v = qkv.unbind(2)                                                 # (B,T,H,C/H) each
        visible = None
        if cache is not None:
            k, v = cache.write(k, v)                                            # (B,width,H,C/H) each
            visible = cache.visible                                             # (B,1,T,width)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                           attn_mask=visible, is_causal=cache is None)     # (B,H,T,C/H)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))                  # (B,T,C)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gelu = config.gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, keep=None):
        """x (B,T,C) -> (B,T,C). keep (B,T) bool names the N positions whose output anybody reads: they alone
        go through the MLP, -> (N,C)."""
        x = x + self.drop(self.attn(self.ln_1(x), cache))
        if keep is not None:
            x = x[keep]                                                         # (N,C)
        return x + self.drop(self.mlp(self.ln_2(x)))

class KVCache:
    """Keys and values of the tokens so far, so that a new token costs one forward pass of one position.

    The one attention rule, for the prompt and for each sampled token: a token writes its key and its value at
    its position, and sees the positions up to its own. A shorter prompt's filler is written too; it stands
    after the row's own tokens, so nobody sees it before the row's next token overwrites it.

    Before each forward pass of the model somebody calls at(); each layer then calls write(), in order."""

    def __init__(self, config, B, L, device):
        """Room for L tokens in each of B rows."""
        shape = config.n_layer, B, L, config.n_head, config.n_embd // config.n_head
        self.keys = torch.zeros(shape, device=device)                           # (layers,B,L,H,C/H)
        self.values = torch.zeros(shape, device=device)                         # (layers,B,L,H,C/H)
        self.rows = torch.arange(B, device=device)[:, None]                     # (B,1)
        self.columns = torch.arange(L, device=device)                           # (L,)

    def at(self, position, width):
        """Sets where the T next tokens of each row stand, position (B,T), and how many columns are looked at:
        the filled ones, or all L of them where shapes have to stay the same."""
        self.position, self.width, self.layer = position, width, 0
        later = self.columns[:width] > position[:, None, :, None]               # (B,1,T,width)
        self.visible = torch.zeros(later.shape, device=later.device).masked_fill(later, -math.inf)  # is added

    def write(self, k, v):
        """k, v (B,T,H,C/H) of the next layer are written -> this layer's keys and values, (B,width,H,C/H)."""
        keys, values = self.keys[self.layer], self.values[self.layer]           # (B,L,H,C/H), views
        keys[self.rows, self.position] = k
        values[self.rows, self.position] = v
        self.layer += 1
        return keys[:, :self.width], values[:, :self.width]

class GPT(nn.Module):
    """Decoder with learned positions.

    head="lm": logits over the vocabulary, tied to the embedding.
    head="scalar": one number per position (reward model, value net); the unembedding is replaced by a
    projection to a scalar (3.5)."""

    def __init__(self, config, head="lm"):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, 1) if head == "scalar" else None
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):           # smaller where a layer adds to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        if self.head is not None:                          # Stiennon et al. 2020
            nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.n_embd + 1))

    def hidden(self, tokens, cache=None, keep=None):
        """tokens (B,T) -> (B,T,C), or (N,C) with keep (B,T) bool. With a cache the tokens stand where the
        cache was set to, else at 0..T-1. ValueError if there are more than the block holds."""
        if tokens.size(1) > self.config.block_size:
            raise ValueError(f"{tokens.size(1)} tokens exceed the block of {self.config.block_size}")
        position = torch.arange(tokens.size(1), device=tokens.device)           # (T,)
        if cache is not None:
            position = cache.position                                           # (B,T)
        x = self.wte(tokens) + self.wpe(position)                               # (B,T,C)
        for block in self.h[:-1]:
            x = block(x, cache)                                                 # (B,T,C)
        x = self.h[-1](x, cache, keep)                                          # (B,T,C) or (N,C)
        return self.ln_f(x)

    def project(self, x):
        """(...,C) -> logits (...,vocab) or, with the scalar head, (...)."""
        if self.head is not None:
            return self.head(x).squeeze(-1)
        return F.linear(x, self.wte.weight)

    def forward(self, tokens, keep=None):
        """tokens (B,T) -> logits (B,T,vocab) or, with the scalar head, (B,T). With keep (B,T) bool only its N
        entries, (N,vocab) or (N,). Positions that nobody reads skip the last MLP and the head: a response is
        about a quarter of its row."""
        return self.project(self.hidden(tokens, keep=keep))

def copy_of(model, head="lm", dropout=0.0):
    """Another model with the same weights; a scalar head that the model does not have is fresh."""
    other = GPT(replace(model.config, dropout=dropout), head)
    other.load_state_dict(model.state_dict(), strict=False)
    return other.to(model.wte.weight.device)

def freeze(model):
    """The model without gradients and dropout: reference and reward model, and whatever is finished."""
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# Rollout (C.4). The whole batch decodes together, one token per step, prompts of any length: each row keeps
# its own position in a cache of fixed size. Python waits for the device only every fourth step, and RL on a
# GPU records the step once and replays it. Random numbers are drawn before the loop: the same seed gives
# every model the same luck.

@dataclass
class Rollout:
    tokens: torch.Tensor                         # (B,T) prompt, response, then id 0
    mask: torch.Tensor                           # (B,T-1) bool, action frame: token t+1 is a response token
    logprobs: torch.Tensor                       # (B,T-1) nats, as sampled from; 0 outside the mask
    prompt_lens: torch.Tensor                    # (B,)
    ended: torch.Tensor                          # (B,) bool: EOS was sampled

    def responses(self):
        """The response ids of each row (EOS included), as lists."""
        return [row[mask].tolist() for row, mask in zip(self.tokens[:, 1:].cpu(), self.mask.cpu())]

def log_softmax(logits, temperature):
    """In float32, whatever the model computes in. The temperature is part of the policy: whoever samples or
    scores divides by it."""
    if temperature != 1:                                   # dividing by 1 would cost a pass over all logits
        logits = logits / temperature
    return F.log_softmax(logits.float(), dim=-1)

def pick(logits, uniforms, temperature):
    """One token per row: the first whose cumulative probability exceeds the row's uniform number. On a CPU
    that is several times cheaper than torch.multinomial. Temperature 0 takes the likeliest token.
    logits (B,V), uniforms (B,) in [0,1) -> token (B,), its log-prob (B,)."""
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniforms)     # (B,), (B,): no choice, log 1
    logprobs = log_softmax(logits, temperature)                                 # (B,V)
    cumulative = logprobs.exp().cumsum(-1)                                      # (B,V)
    goal = uniforms * cumulative[:, -1]                                         # (B,) the sum may miss 1
    token = torch.searchsorted(cumulative, goal[:, None], right=True)           # (B,1)
    token = token.clamp(max=logits.size(-1) - 1)                                # at NaN it returns V
    return token[:, 0], logprobs.gather(1, token)[:, 0]

class Sampler:
    """Samples one response to each of B prompts, as often as asked. In plain words, for one row and without a
    cache, a step is

        logits = policy(tokens)[newest]
        token, logprob = pick(logits)
        tokens[newest + 1], logprobs[newest] = (token, logprob) if alive else (0, 0);  mask[newest] = alive
        alive = alive and token != eos;  newest += 1

    The class does it for all rows at once, in a form that a CUDA graph can record: such a graph reads and
    writes the same memory at each replay, so buffers keep their place and shape. The policy may be trained
    between two calls, since an optimizer changes the weights in place."""

    def __init__(self, policy, B, L, max_new_tokens, eos, temperature=1.0, graph=False):
        """B rows of at most L tokens, max_new_tokens of them new. graph: record the step (CUDA only)."""
        device = policy.wte.weight.device
        self.policy, self.eos, self.temperature = policy, eos, temperature
        policy.eval()                                      # dropout would make it another policy
        self.tokens = torch.zeros(B, L, dtype=torch.long, device=device)
        self.mask = torch.zeros(B, L - 1, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(B, L - 1, device=device)
        self.newest = torch.zeros(B, 1, dtype=torch.long, device=device)        # column of the newest token
        self.alive = torch.zeros(B, dtype=torch.bool, device=device)            # has not sampled EOS yet
        self.uniforms = torch.zeros(max_new_tokens, B, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)            # steps so far
        self.cache = KVCache(policy.config, B, L, device)
        self.graph = self.record() if graph else None

    def step(self, width):
        """One token for every row. Rows that have ended go on, and what they sample is not kept: to leave
        them out would change the shapes. Gather and scatter take their places from tensors on the device; an
        index that Python had to know would make the host wait."""
        self.cache.at(self.newest, width)
        x = self.policy.hidden(self.tokens.gather(1, self.newest), self.cache)  # (B,1,C)
        uniforms = self.uniforms.index_select(0, self.count)[0]                 # (B,)
        token, logprob = pick(self.policy.project(x)[:, 0], uniforms, self.temperature)    # (B,), (B,)
        self.tokens.scatter_(1, self.newest + 1, token.masked_fill(~self.alive, 0)[:, None])
        self.logprobs.scatter_(1, self.newest, logprob.masked_fill(~self.alive, 0)[:, None])
        self.mask.scatter_(1, self.newest, self.alive[:, None])
        self.alive &= token != self.eos
        self.newest += 1
        self.count += 1

    @torch.no_grad()
    def record(self):
        """The step as a CUDA graph: one call starts its hundreds of small kernels, instead of one call each.
        (Skip this at first reading.)"""
        width = self.tokens.size(1)                        # all of it: shapes have to stay the same
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step(width)                               # libraries set themselves up outside the record
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            self.step(width)
        return graph

    @torch.no_grad()
    def sample(self, prompts, generator=None):
        """prompts: B lists of ids -> Rollout with T = longest prompt + max_new_tokens."""
        device = self.tokens.device
        lens = torch.tensor([len(prompt) for prompt in prompts])                # (B,)
        longest = int(lens.max())
        T = longest + len(self.uniforms)
        self.tokens.zero_()
        for row, prompt in enumerate(prompts):
            self.tokens[row, :len(prompt)] = torch.tensor(prompt)
        self.newest.copy_(lens[:, None] - 1)
        self.uniforms.copy_(torch.rand(self.uniforms.shape, generator=generator, device=device))
        for buffer, value in ((self.mask, False), (self.logprobs, 0), (self.alive, True), (self.count, 0)):
            buffer.fill_(value)
        # Prefill: columns 0..longest-2 of all rows. The first step feeds each row's last token, a shorter
        # row's for the second time. Only the cache is wanted, so no position is kept for the last MLP.
        if longest > 1:
            tokens = self.tokens[:, :longest - 1]                               # (B,longest-1)
            self.cache.at(self.cache.columns[:longest - 1].expand_as(tokens), longest - 1)
            self.policy.hidden(tokens, self.cache, keep=torch.zeros_like(tokens, dtype=torch.bool))
        for width in range(longest, T):
            if self.graph is None:
                self.step(width)                           # of the filled columns, one more each time
            else:
                self.graph.replay()
            if (width - longest) % 4 == 3 and not self.alive.any():      # one look at the device in four
                break
        return Rollout(self.tokens[:, :T].clone(), self.mask[:, :T - 1].clone(),
                       self.logprobs[:, :T - 1].clone(), lens.to(device), ~self.alive)

def rollout(policy, prompts, max_new_tokens, eos, temperature=1.0, generator=None):
    """Samples one response to each prompt. prompts: B non-empty lists of ids, any lengths. A response ends
    with `eos` or after max_new_tokens. Returns a Rollout with T = longest prompt + max_new_tokens; ValueError
    if T exceeds the block or a prompt is empty."""
    lens = [len(prompt) for prompt in prompts]
    room = policy.config.block_size - max_new_tokens
    if not 1 <= min(lens) <= max(lens) <= room:
        raise ValueError(f"prompts of {min(lens)} to {max(lens)} tokens: 1 to {room} leave room in the block")
    T = max(lens) + max_new_tokens
    return Sampler(policy, len(prompts), T, max_new_tokens, eos, temperature).sample(prompts, generator)


# ------------------------------------------------------------------------------------------------------------
# Formulas: pure functions that the loops below and the tests call. B rows, T tokens, K responses; action
# frame; logarithms are natural, so their unit is the nat. A slot where the mask is False must not matter,
# even if it holds NaN. So inputs are set to 0 there before the arithmetic. A mask that comes later does not
# help: NaN times 0 is NaN, in a gradient too.

def zero_outside(mask, x):
    """x with 0 wherever the mask is False."""
    return x.masked_fill(~mask, 0)

def masked_mean(x, mask):
    """Mean of x where mask is True; 0 if it is True nowhere."""
    return zero_outside(mask, x).sum() / mask.sum().clamp(min=1)

def whiten(x, mask):
    """(x - mean) / std over the mask, population variance; 0 outside. A single element gives 0, not NaN.
    Why: the balance with the pretraining loss, and the clipping of gradients, no longer depend on the
    reward's scale, and about half of the tokens are pushed up, half down. Ziegler et al. 2019 do it too."""
    x = zero_outside(mask, x)
    centred = x - masked_mean(x, mask)
    return zero_outside(mask, centred * torch.rsqrt(masked_mean(centred ** 2, mask) + 1e-8))

def token_logprobs(model, tokens, temperature=1.0, mask=None):
    """log pi(token t+1 | tokens 0..t), nats: tokens (B,T) -> (B,T-1). By definition

        log_softmax(model(tokens)[:, :-1] / temperature), taken at tokens[:, 1:]

    The temperature is the sampler's: what is scored must be what was sampled from. The rest is speed: with a
    mask (B,T-1) only its N entries are computed (`keep` of the model), and 0 stands elsewhere."""
    if mask is None:
        targets = F.pad(tokens[:, 1:], (0, 1))             # (B,T), the last made up: slicing logits copies
        logprobs = log_softmax(model(tokens), temperature).gather(2, targets[..., None])       # (B,T,1)
        return logprobs[:, :-1, 0]
    logits = model(tokens, keep=F.pad(mask, (0, 1)))                            # (N,V)
    targets = tokens[:, 1:][mask]                                               # (N,)
    logprobs = log_softmax(logits, temperature).gather(1, targets[:, None])[:, 0]              # (N,)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs)

def token_values(value_net, tokens, mask):
    """V, the sum of rewards that is expected from each state in which a response token is chosen:
    (B,T) -> (B,T-1), 0 outside the mask."""
    values = value_net(tokens, keep=F.pad(mask, (0, 1)))                        # (N,)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)

def lm_loss(model, tokens, mask=None):
    """Next-token loss, nats per token: over all tokens, or with a mask over the response tokens alone."""
    logprobs = token_logprobs(model, tokens, 1.0, mask)                         # (B,T-1)
    if mask is None:
        return -logprobs.mean()
    return -masked_mean(logprobs, mask)

def reward_scores(reward_model, tokens, last):
    """r_theta(x, y): the score read at index last (B,) of each row, its EOS if it ended: (B,T) -> (B,)."""
    read = torch.arange(tokens.size(1), device=tokens.device) == last[:, None]  # (B,T) one True per row
    return reward_model(tokens, keep=read)

def reward_loss(scores, ranks):
    """Eq. 1. scores (B,K); ranks (B,K) int, 1 = best, equal = tie, 0 = empty slot -> scalar, nats.

        loss = - 1/C(K,2)  sum over pairs  log sigma( r(x, y_w) - r(x, y_l) ),   mean over prompts

    All pairs of a prompt are one batch element: each response costs one forward pass instead of K-1, and is
    not met K-1 times in shuffled pairs, which overfits within an epoch (3.5). Tied pairs drop out and C(K,2)
    becomes the number of pairs kept, so each prompt weighs the same; a prompt without a pair is left out."""
    scores = zero_outside(ranks > 0, scores)
    better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0)  # (B,K,K) i beats j
    margin = scores[:, :, None] - scores[:, None, :]                            # (B,K,K)
    pairs = better.sum((1, 2))                                                  # (B,)
    total = -zero_outside(better, F.logsigmoid(margin)).sum((1, 2))             # (B,)
    return masked_mean(total / pairs.clamp(min=1), pairs > 0)

# KL(pi || pi_ref), the Kullback-Leibler divergence, says how far pi is from pi_ref: the mean of log pi/pi_ref
# over samples of pi. Two estimates from one sample (Schulman 2020, "Approximating KL divergence"):
# k1 is the log-ratio: right on average, but one value may be negative. It is what Eq. 2 charges: as a reward,
# its mean is the KL itself, and only k1 makes the rewards of a response add up to Eq. 2's bracket.
# k3 adds pi_ref/pi - 1, whose mean is 0 because the mean of pi_ref/pi is 1 over samples of pi. So k3 has the
# same mean, is never negative and mostly less noisy. The log shows both.

def kl_k1(logprobs, ref_logprobs):
    """log pi/pi_ref, nats. Any shape."""
    return logprobs - ref_logprobs

def kl_k3(logprobs, ref_logprobs):
    """pi_ref/pi - 1 - log pi_ref/pi, nats, never negative. Any shape."""
    return torch.expm1(ref_logprobs - logprobs) - (ref_logprobs - logprobs)

def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """Eq. 2's bracket, token by token: -beta * log(pi/pi_SFT) at each response token, and at the last one the
    score on top. (The score is the reward model's number; a reward is score and KL together.)
    scores (B,), the rest (B,T-1) -> (B,T-1), 0 outside the mask. A row sums to
    score - beta * log( pi(y|x) / pi_SFT(y|x) ); a row without a response gets no score."""
    k1 = kl_k1(zero_outside(mask, logprobs), zero_outside(mask, ref_logprobs))  # (B,T-1)
    final = mask & ~F.pad(mask[:, 1:], (0, 1))                                  # (B,T-1) EOS, if it ended
    return -beta * k1 + zero_outside(final, scores[:, None].expand(final.shape))

def gae(rewards, values, mask, discount=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016): which of the tokens earned the score?

        delta_t = R_t + discount * V_{t+1} - V_t
        A_t = delta_t + discount * lam * A_{t+1},   return_t = A_t + V_t

    In column t, V_t is what the value net expects the rewards from there on to add up to. A_t is how much
    better the token chosen there, token t+1, did than expected. lam = 1: A_t is the rewards that came minus
    V_t, right but noisy. lam = 0: A_t is delta_t, calm but as wrong as V.
    rewards, values (B,T-1) -> (advantages, returns), (B,T-1) each, 0 in the columns of prompt and filler.
    After the last response token V and A are 0, because the episode is over, finished or not. The paper does
    not discount (C.4)."""
    rewards = zero_outside(mask, rewards)
    values = zero_outside(mask, values)
    advantages = torch.zeros_like(values)                                       # (B,T-1)
    next_value = torch.zeros_like(values[:, 0])                                 # (B,)
    next_advantage = torch.zeros_like(values[:, 0])                             # (B,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + discount * next_value - values[:, t]            # (B,)
        next_advantage = torch.where(mask[:, t], delta + discount * lam * next_advantage, 0.)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values

def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """PPO's clipped surrogate, negated: - mean min( rho A, clip(rho, 1-eps, 1+eps) A ) with rho = pi/pi_old.
    All (B,T-1) -> scalar. One batch serves several steps, so pi moves away from the pi_old that sampled it;
    the clip takes away the gradient where that went too far in the direction that A asks for."""
    logprobs = zero_outside(mask, logprobs)
    old_logprobs = zero_outside(mask, old_logprobs)
    advantages = zero_outside(mask, advantages)
    ratio = torch.exp(logprobs - old_logprobs)                                  # (B,T-1)
    clipped = ratio.clamp(1 - clip, 1 + clip)                                   # (B,T-1)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)

def value_loss(values, old_values, returns, mask, clip=0.2):
    """1/2 mean max( (V - return)^2, (V_clipped - return)^2 ) with V_clipped = V_old + clip(V - V_old, -eps,
    eps). All (B,T-1) -> scalar. As in the policy, a move of more than eps towards the return brings nothing
    more; the maximum sees to it that a move away from the return is always taken back."""
    values = zero_outside(mask, values)
    old_values = zero_outside(mask, old_values)
    returns = zero_outside(mask, returns)
    clipped = old_values + (values - old_values).clamp(-clip, clip)             # (B,T-1)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)

@torch.no_grad()
def ema_update(average, model, decay):
    """w_ema <- decay * w_ema + (1 - decay) * w  (C.4: 0.992)."""
    for a, p in zip(average.parameters(), model.parameters()):
        a.lerp_(p, 1 - decay)

def cosine(step, steps, warmup=0):
    """The learning rate's factor: a cosine from 1 to 0.1 (C.1, C.2); in pretraining, a warm-up before it."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * min(1, (step - warmup) / max(1, steps - 1 - warmup)))

def warmup_factor(iteration, warmup):
    """The factor of the policy's learning rate: from a tenth to 1 over the first iterations, then 1 (C.4)."""
    return 0.1 + 0.9 * min(1, iteration / warmup) if warmup else 1.0


# ------------------------------------------------------------------------------------------------------------
# What every loop needs. A loop below reads
#
#     for step in steps:                         # class Steps: range(n) that saves, and goes on after a stop
#         generator = seed(cfg, "sft", step)     # each step's draws follow from seed, stage and step alone
#         loss = ...
#         loss.backward()
#         clip_and_step(model, optimizer, learning rate)
#
# Because no draw depends on the ones before it, weights and optimizers are all that has to be saved: a run
# that was stopped at any moment ends with the same bits as one that was not.

class NotFinite(Exception):
    """A number became NaN or infinite: the run stops and says where."""

def seed(cfg, stage, step=0, device="cpu"):
    """The generator for one step of a stage, a number or any name. PyTorch's own (initial weights, dropout)
    is seeded too."""
    number = int.from_bytes(hashlib.sha256(f"{cfg.seed} {stage} {step}".encode()).digest()[:7], "little")
    torch.manual_seed(number)
    return torch.Generator(device).manual_seed(number)

def adamw(model, lr):
    """Adam with the paper's betas (App. C); each step sets lr anew. Fused: one kernel for all weights."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

def finite(name, x):
    """The tensor, if all of it is finite; else NotFinite."""
    if not x.isfinite().all():
        raise NotFinite(f"{name} became {x[~x.isfinite()].flatten()[0].item()}")
    return x

def clip_and_step(model, optimizer, lr):
    """One optimizer step at this learning rate on the gradients that backward left, clipped at norm 1, and
    clears them. Returns the norm before clipping. NotFinite if it is not finite, as after a loss of NaN."""
    norm = finite("the gradient's norm", nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()

class Steps:
    """range(n) of a stage, which remembers. Every save_every seconds (but never sooner than 20 times what the
    last save took) the named objects, models and optimizers, go into OUT/STAGE.part; if that file is there at
    the start, they get their state back and the count goes on. A stop costs those seconds; a stage that names
    no objects (collect, judged, evaluate) begins again.
    (save and load, which write and read a file safely, stand in the section Files.)"""

    def __init__(self, cfg, stage, n, **objects):
        self.cfg, self.stage, self.n, self.objects = cfg, stage, n, objects
        self.path = os.path.join(cfg.out, stage + ".part")
        self.first, self.earlier, self.shown = 0, 0.0, 0.0           # steps, seconds before a stop; last line
        self.start = time.time()
        if os.path.exists(self.path):
            saved = load(self.path)
            with reading(self.path, CHECKPOINT):
                for name, x in objects.items():
                    x.load_state_dict(saved["state"][name])
                self.first, self.earlier = saved["step"], saved["seconds"]
            print(f"{stage}: goes on after step {self.first} of {n}")

    def __iter__(self):
        saved, cost = self.start, 0.0
        for self.step in range(self.first, self.n):
            yield self.step
            begun = time.time()
            if self.objects and begun - saved >= max(self.cfg.save_every, 20 * cost):
                state = {name: x.state_dict() for name, x in self.objects.items()}
                seconds = self.earlier + begun - self.start
                save(self.path, {"step": self.step + 1, "seconds": seconds, "state": state})
                saved = time.time()
                cost = saved - begun

    def log(self, **numbers):
        """A line of JSON into OUT/log.jsonl and, every five seconds, one on the screen with the time left."""
        done = self.step + 1
        now = time.time()
        path = os.path.join(self.cfg.out, "log.jsonl")
        with reading(path, "writable"), open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"stage": self.stage, "step": done, **numbers}) + "\n")
        if now - self.shown > 5 or done == self.n:
            self.shown = now
            left = (now - self.start) / (done - self.first) * (self.n - done)
            text = "  ".join(f"{name} {x:.3g}" for name, x in numbers.items())
            print(f"{self.stage:9}{done:5}/{self.n}  {text}  left {left:.0f} s", flush=True)


# ------------------------------------------------------------------------------------------------------------
# Step 0, pretraining: the place of GPT-3. The paper starts from a trained model; ours learns the toy's web.

def pretrain(cfg, enc, corpus, device):
    """A GPT trained from nothing on the corpus: next-token loss, warm-up and cosine."""
    seed(cfg, "pretrain", "weights")
    gpt = GPT(GPTConfig(enc.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)).to(device)
    optimizer = adamw(gpt, cfg.pretrain_lr)
    warmup = min(50, cfg.pretrain_steps // 10)
    steps = Steps(cfg, "pretrain", cfg.pretrain_steps, model=gpt, optimizer=optimizer)
    for step in steps:
        generator = seed(cfg, "pretrain", step)
        rows = corpus_batch(corpus, cfg.pretrain_batch, cfg.block_size, generator, device)     # (B,block)
        loss = lm_loss(gpt, rows)
        loss.backward()
        clip_and_step(gpt, optimizer, cfg.pretrain_lr * cosine(step, cfg.pretrain_steps, warmup))
        if (step + 1) % 10 == 0 or step + 1 == cfg.pretrain_steps:
            steps.log(loss=loss.item())
    return freeze(gpt)


# ------------------------------------------------------------------------------------------------------------
# Step 1, supervised fine-tuning (3.5, C.1, C.3): imitate the labelers' demonstrations, of which only the
# response tokens count. Pretraining rows are mixed in against forgetting.

def sft(cfg, stage, gpt, demos, corpus):
    """demos: list of (prompt ids, response ids). The SFT model: baseline, start of RL and KL reference. On
    answers to public tasks the same makes FLAN, the paper's other baseline."""
    model = copy_of(gpt, dropout=cfg.sft_dropout).train()
    optimizer = adamw(model, cfg.sft_lr)
    device = model.wte.weight.device
    mixed = math.ceil(cfg.sft_batch * cfg.sft_mix / (1 - cfg.sft_mix))          # 4 of 36 rows: a tenth
    lengths = [len(x) + len(y) for x, y in demos]
    plan = batches(lengths, cfg.sft_batch, cfg.sft_epochs, seed(cfg, stage, "plan"))
    steps = Steps(cfg, stage, len(plan), model=model, optimizer=optimizer)
    for step in steps:
        generator = seed(cfg, stage, step)
        prompts, responses = zip(*[demos[i] for i in plan[step]])
        tokens, mask, _ = stack(prompts, responses, device)                     # (B,T), (B,T-1)
        loss = lm_loss(model, tokens, mask)
        web_loss = 0
        if mixed:
            web_loss = lm_loss(model, corpus_batch(corpus, mixed, cfg.block_size, generator, device))
        # Both losses are means: unweighted, the 4 web rows would count as much as the 32 demonstrations. So
        # the share weighs them once more (the paper gives no weight).
        (loss + cfg.sft_mix * web_loss).backward()
        clip_and_step(model, optimizer, cfg.sft_lr * cosine(step, len(plan)))
        steps.log(loss=loss.item())
    return freeze(copy_of(model))                          # no dropout from here on


# ------------------------------------------------------------------------------------------------------------
# Step 2, the reward model (3.5, C.2). The SFT model answers each prompt K times, a labeler ranks the answers,
# and a model with a scalar head learns Eq. 1.
#
# A simulated labeler of the toy world rates each answer: did it follow the request, is it true, polite,
# within the constraint, finished? The ranks follow the ratings, and close ones tie. Labelers have weights and
# a taste for length of their own, and lapses, in which they say anything. "Gold", 1 to 7, is the quality
# without these.

@dataclass
class Answer:
    ids: list                                    # EOS included if it ended, or if one_line cut it
    text: str
    ended: bool

def respond(policy, enc, prompts, max_new_tokens, generator, temperature=1.0, one_line=False):
    """One Answer to each prompt (ids), in the same order. For the evaluation: temperature 0 is greedy, and
    one_line cuts at the first newline, our way to end GPT's answers, which run on."""
    answers = [None] * len(prompts)
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for part in parts_by_length(lengths, 16384):
        r = rollout(policy, [prompts[i] for i in part], max_new_tokens, enc.eot_token, temperature, generator)
        for i, ids in zip(part, r.responses()):
            ends = [n for n, token in enumerate(ids) if one_line and "\n" in enc.decode([token])]
            if ends:                                       # EOS takes the newline's place
                ids = ids[:ends[0]] + [enc.eot_token]
            answers[i] = Answer(ids, decode_response(enc, ids), ids[-1] == enc.eot_token)
    return answers

def collect(cfg, stage, enc, policy, records, label):
    """Comparisons: K responses to each prompt, ranked. records: dicts with the text "prompt" and its "split".
    `label` is the function that ranks: it gets a list of comparisons and random numbers, and returns the list
    with "ranks" in each (the labelers of data/toyworld.py do, and add a second opinion on validation prompts,
    to see how well people agree)."""
    size, comparisons = 512, []
    steps = Steps(cfg, stage, math.ceil(len(records) / size))
    for step in steps:
        generator = seed(cfg, stage, step, policy.wte.weight.device)
        rng = random.Random(f"{cfg.seed} {stage} {step}")
        batch = [{**p, "responses": [], "ended": []} for p in records[step * size:][:size]]
        # A record stands K times in `asked`, as the same dict, so its lists fill up with K responses.
        asked = [c for c in batch for _ in range(rng.randint(cfg.k_min, cfg.k_max))]
        ids = [encode_prompt(enc, c["prompt"]) for c in asked]
        for c, answer in zip(asked, respond(policy, enc, ids, cfg.max_new_tokens, generator)):
            c["responses"].append(answer.text)
            c["ended"].append(answer.ended)
        comparisons += label(batch, rng)
        steps.log(prompts=len(comparisons))
    return comparisons

def encode_comparison(enc, c, longest):
    """A comparison -> (prompt ids, K lists of at most `longest` response ids, K ranks). The text is encoded
    anew, which may give other ids than were sampled, and more: hence the cut. Of equal responses the first
    alone is kept, the others get rank 0, since equal texts of unequal rank are noise. An unfinished response
    gets no EOS, unless it is empty: a score must be read somewhere, here at the last token."""
    responses, ranks = [], []
    for text, ended, rank in zip(c["responses"], c["ended"], c["ranks"]):
        ids = encode_response(enc, text)
        if not ended and len(ids) > 1:
            ids = ids[:-1]
        ids = ids[:longest]
        ranks.append(0 if ids in responses else rank)
        responses.append(ids)
    return encode_prompt(enc, c["prompt"]), responses, ranks

def encode_comparisons(enc, comparisons, longest):
    """The encoded comparisons that hold at least one pair: unequal responses of unequal rank."""
    encoded = [encode_comparison(enc, c, longest) for c in comparisons]
    return [(prompt, responses, ranks) for prompt, responses, ranks in encoded if len(set(ranks) - {0}) > 1]

def rows_of(batch):
    """Encoded comparisons -> prompts and responses, N lists of ids each, without the responses of rank 0."""
    kept = [(x, y) for x, answers, ranks in batch for y, rank in zip(answers, ranks) if rank > 0]
    return [x for x, _ in kept], [y for _, y in kept]

def score_comparisons(reward_model, batch):
    """Encoded comparisons -> scores (B,K), ranks (B,K), K the most of any prompt. One forward per response:
    the N responses go through the model as rows of one batch, and their scores into their slots."""
    prompts, responses = rows_of(batch)
    tokens, _, last = stack(prompts, responses, reward_model.wte.weight.device)                # (N,T), (N,)
    K = max(len(ranks) for _, _, ranks in batch)
    ranks = [ranks + [0] * (K - len(ranks)) for _, _, ranks in batch]
    ranks = torch.tensor(ranks, device=tokens.device)                           # (B,K)
    scores = reward_scores(reward_model, tokens, last)                          # (N,)
    return torch.zeros(ranks.shape, device=tokens.device).masked_scatter(ranks > 0, scores), ranks

def train_reward_model(cfg, stage, enc, sft_model, comparisons, demos):
    """The reward model, from the SFT model, on all pairs of each prompt; one epoch, as more overfit (C.2)."""
    seed(cfg, stage, "head")
    reward_model = copy_of(sft_model, head="scalar").train()
    optimizer = adamw(reward_model, cfg.rm_lr)
    data = encode_comparisons(enc, comparisons, cfg.max_new_tokens)
    lengths = [len(prompt) for prompt, _, _ in data]
    plan = batches(lengths, cfg.rm_batch, cfg.rm_epochs, seed(cfg, stage, "plan"))
    steps = Steps(cfg, stage, len(plan), model=reward_model, optimizer=optimizer)
    for step in steps:
        scores, ranks = score_comparisons(reward_model, [data[i] for i in plan[step]])         # (B,K) each
        loss = reward_loss(scores, ranks)                  # Eq. 1; log 2 = 0.69 is guessing
        loss.backward()
        clip_and_step(reward_model, optimizer, cfg.rm_lr * cosine(step, len(plan)))
        steps.log(loss=loss.item())
    freeze(reward_model)
    normalise_reward(reward_model, demos)
    return reward_model

@torch.no_grad()
def score_all(reward_model, prompts, responses):
    """r_theta(x, y) of N rows of ids -> list of N numbers, the last token's."""
    device = reward_model.wte.weight.device
    scores = torch.zeros(len(prompts))
    lengths = [len(x) + len(y) for x, y in zip(prompts, responses)]
    for part in parts_by_length(lengths, tokens_at_once(device)):
        tokens, _, last = stack([prompts[i] for i in part], [responses[i] for i in part], device)
        scores[part] = reward_scores(reward_model, tokens, last).cpu()
    return scores.tolist()

@torch.no_grad()
def normalise_reward(reward_model, demos):
    """Eq. 1 fixes only differences, so a bias may be added (3.5): demonstrations score 0 on average. That
    gives the fixed score of an unfinished response, -1, a meaning."""
    prompts, responses = zip(*demos)
    reward_model.head.bias -= mean(score_all(reward_model, prompts, responses))


# ------------------------------------------------------------------------------------------------------------
# Step 3, reinforcement learning (3.5, C.4): Eq. 2 by PPO. The environment is a bandit: a customer's prompt,
# one response, one reward.
#
#     maximise  E[ r(x,y) - beta * log( pi(y|x) / pi_SFT(y|x) ) ]  +  gamma * E_pretrain[ log pi(x) ]  (Eq. 2)
#
# gamma is ptx_coef here (ptx: the pretraining mix; it weighs a mean over tokens) and has nothing to do with a
# discount. Without the mix this is PPO; with it the pretraining gradient joins every optimizer step: PPO-ptx.
#
# Why the KL term: the reward model knows only texts like those it was trained on. Far from them the policy
# finds texts that the reward model overrates. Near pi_SFT the score can be trusted. Why the mix: RL also
# costs skills that pretraining gave, the "alignment tax" (4.2). The mix gives most of them back; a larger
# beta does not (Fig. 34).
#
# Four networks: policy pi and value net V are trained; the reference pi_SFT, which is the SFT model itself,
# and the reward model r are frozen. (A fifth, the average of the policy's weights, only looks on.)

@dataclass
class Experience(Rollout):
    """A batch of episodes: a Rollout, whose logprobs are those of pi_old, the policy that sampled it, with
    all that the update needs besides, each computed once. B rows, T tokens."""
    lengths: torch.Tensor                        # (B,) tokens of prompt and response
    ref_logprobs: torch.Tensor                   # (B,T-1) of pi_SFT
    scores: torch.Tensor                         # (B,)
    rewards: torch.Tensor                        # (B,T-1)
    values: torch.Tensor                         # (B,T-1) of V_old, before the update
    raw_advantages: torch.Tensor                 # (B,T-1) as GAE gives them, for the ledger
    advantages: torch.Tensor                     # (B,T-1) whitened
    returns: torch.Tensor                        # (B,T-1)

@torch.no_grad()
def make_experience(cfg, sampler, value_net, reference, reward_model, prompts, generator, estimate=gae):
    """prompts: B lists of ids -> Experience. estimate: gae, or the neighbour reinforce in its place."""
    # 1. Sample with the current policy. The log-probs kept while sampling are those of pi_old.
    r = sampler.sample(prompts, generator)
    # 2. Score the response at its last token; take the reference's log-probs and the values of the states. A
    # few rows of similar length go together: the result is that of all rows at once, only faster.
    lengths = r.prompt_lens + r.mask.sum(1)                                     # (B,)
    scores = torch.zeros(len(prompts), device=lengths.device)                   # (B,)
    ref_logprobs, values = torch.zeros(2, *r.logprobs.shape, device=lengths.device)            # (B,T-1) each
    for part in parts_by_length(lengths.tolist(), tokens_at_once(lengths.device)):
        picked = torch.tensor(part, device=lengths.device)                      # (b,) indices of rows
        n = int(lengths[part[-1]])                         # the longest of them: what is beyond it is filler
        tokens, mask = r.tokens[picked, :n], r.mask[picked, :n - 1]             # (b,n), (b,n-1)
        scores[picked] = reward_scores(reward_model, tokens, lengths[picked] - 1)
        ref_logprobs[picked, :n - 1] = token_logprobs(reference, tokens, cfg.temperature, mask)
        values[picked, :n - 1] = token_values(value_net, tokens, mask)
    # 3. A response that did not end gets the fixed score instead.
    scores = torch.where(r.ended, finite("a score of the reward model", scores), cfg.unfinished_score)
    # 4. The KL penalty of each token, the score at the last one.
    rewards = token_rewards(scores, r.logprobs, ref_logprobs, r.mask, cfg.beta)                # (B,T-1)
    # 5. Advantages and returns.
    advantages, returns = estimate(rewards, values, r.mask, discount=1.0, lam=cfg.lam)         # (B,T-1) each
    return Experience(**vars(r), lengths=lengths, ref_logprobs=ref_logprobs, scores=scores, rewards=rewards,
                      values=values, raw_advantages=advantages, advantages=whiten(advantages, r.mask),
                      returns=returns)

def update(cfg, policy, value_net, adams, e, picked, web, lr_factor):
    """One minibatch, the rows picked (b,) of the Experience e: one optimizer step for the policy, at
    policy_lr times lr_factor, and one for the value net, at value_lr. web (m,block): pretraining rows for the
    mix, or None. Returns floats for the log: "ptx" (0 without a mix), "vloss", "grad", "clip" (summary tells
    what they are) and "change", the largest |log-prob - rollout's| before the step."""
    n = int(e.lengths[picked].max())                       # filler beyond the longest row is not computed
    tokens, mask = e.tokens[picked, :n], e.mask[picked, :n - 1]                 # (b,n), (b,n-1)
    old_logprobs, advantages = e.logprobs[picked, :n - 1], e.advantages[picked, :n - 1]        # (b,n-1) each
    old_values, returns = e.values[picked, :n - 1], e.returns[picked, :n - 1]   # (b,n-1) each
    # 6. The policy: what Eq. 2 maximises, negated, with both gradients in one step (C.4). In the first of the
    # eight minibatches the ratio is 1, because pi is still pi_old; each step moves pi, so in the others it is
    # not.
    logprobs = token_logprobs(policy, tokens, cfg.temperature, mask)            # (b,n-1)
    ppo_loss = policy_loss(logprobs, old_logprobs, advantages, mask, cfg.cliprange)
    ptx_loss = torch.zeros(()) if web is None else lm_loss(policy, web)
    (ppo_loss + cfg.ptx_coef * ptx_loss).backward()
    norm = clip_and_step(policy, adams[0], cfg.policy_lr * lr_factor)
    # 7. The value net, a network of its own, learns to predict the returns.
    values = token_values(value_net, tokens, mask)                              # (b,n-1)
    v_loss = value_loss(values, old_values, returns, mask, cfg.value_clip)
    v_loss.backward()
    clip_and_step(value_net, adams[1], cfg.value_lr)
    change = (logprobs.detach() - old_logprobs)[mask]                           # (tokens of the minibatch,)
    clipped = (change.exp() - 1).abs() > cfg.cliprange                          # (tokens of the minibatch,)
    return {"clip": clipped.float().mean().item(), "grad": norm, "ptx": ptx_loss.item(),
            "vloss": v_loss.item(), "change": change.abs().max().item()}

def ppo(cfg, stage, enc, sft_model, reward_model, records, corpus, world=None, estimate=gae):
    """RL from the SFT model against the reward model. records: list of {"ids", "task"}; corpus: tokens and
    starts for the mix, or None for plain PPO; world: the checker, which knows gold, for the log alone.
    Returns the EMA of the policy: its answers vary less from step to step than those of the last weights."""
    device = sft_model.wte.weight.device
    policy = copy_of(sft_model)
    average = freeze(copy_of(sft_model))
    # V starts as the reward model (3.5), which scores whole texts. V learns to predict, from a beginning,
    # that score less the KL penalties still to come.
    value_net = copy_of(reward_model, "scalar")
    adams = adamw(policy, cfg.policy_lr), adamw(value_net, cfg.value_lr)
    sampler = Sampler(policy, cfg.episodes, cfg.block_size, cfg.max_new_tokens, enc.eot_token,
                      cfg.temperature, graph=device.type == "cuda")
    passes = math.ceil(cfg.iterations * cfg.episodes / len(records))
    generator = seed(cfg, stage, "plan")
    order = torch.cat([torch.randperm(len(records), generator=generator) for _ in range(passes)])
    steps = Steps(cfg, stage, cfg.iterations, policy=policy, value_net=value_net, average=average,
                  policy_adam=adams[0], value_adam=adams[1])
    for iteration in steps:
        luck = seed(cfg, stage + " rollout", iteration, device)                 # on the device: the samples
        generator = seed(cfg, stage, iteration)            # on the CPU: minibatches and pretraining rows
        batch = [records[i] for i in order[iteration * cfg.episodes:][:cfg.episodes].tolist()]
        prompts = [p["ids"] for p in batch]
        e = make_experience(cfg, sampler, value_net, sft_model, reward_model, prompts, luck, estimate)
        numbers = []
        for picked in torch.randperm(cfg.episodes, generator=generator).tensor_split(cfg.minibatches):
            web, m = None, cfg.ptx_rows * len(picked)
            if corpus is not None:
                web = corpus_batch(corpus, m, cfg.block_size, generator, device)               # (m,block)
            numbers.append(update(cfg, policy, value_net, adams, e, picked.to(device), web,
                                  warmup_factor(iteration, cfg.warmup)))
            ema_update(average, policy, cfg.ema)
        if iteration == 0:
            print(f"\n{stage}: a line per iteration\n{summary.__doc__}\n{ledger(cfg, enc, e)}")   # the legend
            print(f"  first minibatch: max |log-prob - rollout's| = {numbers[0]['change']:.1e}: rounding")
        line = summary(e, numbers)
        if world is not None:
            texts = [decode_response(enc, ids) for ids in e.responses()]
            line["gold"] = mean(world.golds(batch, texts, e.ended.tolist()))
        steps.log(**line)
    way = 1 - cfg.ema ** (cfg.iterations * cfg.minibatches)
    if way < 0.9:
        print(f"{stage}: the average has gone {way:.0%} of the way from SFT to the policy: lower --ema")
    return average

def summary(e, numbers):
    """
    score     demonstrations are at 0, unfinished responses at their fixed score; finished: without those
    gold      true quality, 1 to 7: must rise with score
    k1, k3    KL to the SFT model, nats per response: k1 is charged and may be negative, k3 never is
    ended     share of responses; length: their tokens; entropy: nats per token, 0 is one answer left
    vloss     of the value net; ev: share of the returns' variance that it explains
    clip      share of tokens whose ratio is outside 1 +- cliprange; grad: the policy's norm before clipping
    ptx       pretraining loss of the mix, nats per token
    After ten iterations good runs of the toy have k3 from 0.2 to 3, ended above 0.9, clip below 0.05 and ev
    above 0.3.
    """
    error, mask = e.returns - e.values, e.mask                                  # (B,T-1) each
    unexplained = masked_mean((error - masked_mean(error, mask)) ** 2, mask)
    variance = masked_mean((e.returns - masked_mean(e.returns, mask)) ** 2, mask)
    line = {"score": e.scores.mean(), "finished": masked_mean(e.scores, e.ended),
            "ended": e.ended.float().mean(), "length": mask.sum(1).float().mean(),
            "entropy": -masked_mean(e.logprobs, mask),
            "k1": kl_k1(e.logprobs, e.ref_logprobs).sum(1).mean(),
            "k3": kl_k3(e.logprobs, e.ref_logprobs).sum(1).mean(),
            "ev": 1 - unexplained / variance.clamp(min=1e-8)}
    for name in ("vloss", "clip", "grad", "ptx"):
        line[name] = mean([x[name] for x in numbers])
    return {name: float(x) for name, x in line.items()}

def ledger(cfg, enc, e):
    """The first episode as text, in the action frame, a line per response token. At the start of seed 3, when
    pi still is pi_ref, so that no KL is charged, and V has learned nothing yet:

                         log pi    log ref  KL reward     reward      value  advantage     return
              ' The'     -0.418     -0.418      0.000      0.000     -2.760      2.378     -0.382
            ' sheep'     -0.116     -0.116      0.000      0.000     -2.440      2.166     -0.274
                 ...
      '<|endoftext|>'    -0.002     -0.002     -0.000      0.351     -1.645      1.996      0.351
    """
    columns = {"log pi": e.logprobs, "log ref": e.ref_logprobs,
               "KL reward": -cfg.beta * kl_k1(e.logprobs, e.ref_logprobs), "reward": e.rewards,
               "value": e.values, "advantage": e.raw_advantages, "return": e.returns}
    ids = e.tokens[0, :e.lengths[0]].tolist()
    lines = [f"  Episode ledger: {enc.decode(ids)!r}, score {e.scores[0]:.3f}",
             " " * 16 + "".join(f"{name:>11}" for name in columns)]
    for t in e.mask[0].nonzero()[:, 0].tolist():
        cells = "".join(f"{x[0, t]:11.3f}" for x in columns.values())
        lines.append(f"  {enc.decode([ids[t + 1]])!r:>14}{cells}")
    lines.append("  The rewards add up to score - beta * log pi/ref. The advantage is before whitening.")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Neighbours: not in the paper, on the same data, with the same beta. REINFORCE stands in the loop of PPO-ptx,
# its mix included. DPO and KTO need neither a reward model nor a rollout: they learn from the comparisons.
# RLAIF is the paper's method with a model as the labeler.

def reinforce(rewards, values, mask, discount=1.0, lam=1.0):
    """REINFORCE with a baseline (Williams 1992), in gae's place. The loop's value net still trains, but no
    advantage reads it. No token gets credit of its own: each gets its whole episode's reward, less the mean.

        A_t = R - mean R,   R = sum of the episode's rewards = score - beta * log( pi(y|x) / pi_SFT(y|x) )

    All are (B,T-1). The loop whitens advantages and clips ratios as it does for PPO."""
    total = zero_outside(mask, rewards).sum(1, keepdim=True).expand(mask.shape)                # (B,T-1)
    centred = total - total[:, 0].mean()                                        # (B,T-1)
    return zero_outside(mask, centred), zero_outside(mask, total)

def dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """DPO (Rafailov et al. 2023). The optimum of Eq. 2 without its mix is pi_ref * exp(r / beta) / Z(x), so
    r = beta * log pi/pi_ref + beta * log Z(x). In Eq. 1 the Z cancels: the policy is its own reward model.

        loss = - mean log sigma( beta * [ log pi/pi_ref (y_w|x) - log pi/pi_ref (y_l|x) ] )

    Log-probs are sums over the response, (B,) each -> scalar; log 2 where the policy is the reference."""
    return -F.logsigmoid(beta * ((logp_w - ref_logp_w) - (logp_l - ref_logp_l))).mean()

def kto_kl0(logp, ref_logp):
    """KTO's reference point, an estimate of KL(pi || pi_ref): the mean log-ratio of mismatched pairs, a
    prompt with a response to another one (train_kto makes them); never below 0, without gradient. Sums, (B,)
    each -> scalar."""
    return (logp - ref_logp).mean().clamp(min=0).detach()

def kto_loss(logp, ref_logp, desirable, kl0, beta, lambda_d=1.0, lambda_u=1.0):
    """KTO (Ethayarajh et al. 2024, the latest version: beta stands outside of kl0) on answers without a
    partner, desirable (B,) bool or not: a gain or a loss against the reference point kl0.

        loss = mean of  lambda_d * sigma( -beta (log pi/pi_ref - kl0) )  if desirable,
                        lambda_u * sigma( +beta (log pi/pi_ref - kl0) )  if not

    Log-probs are sums, (B,) -> scalar; half of lambda where the policy is the reference."""
    margin = beta * (logp - ref_logp - kl0)                                     # (B,)
    return torch.where(desirable, lambda_d * torch.sigmoid(-margin), lambda_u * torch.sigmoid(margin)).mean()

def response_logprobs(model, prompts, responses):
    """log pi(y|x) of N rows of ids, each a sum over the response: (N,)."""
    tokens, mask, _ = stack(prompts, responses, model.wte.weight.device)        # (N,T), (N,T-1)
    return token_logprobs(model, tokens, 1.0, mask).sum(1)

def beats(batch, device):
    """Of the N rows of rows_of: (N,N) bool, True where row i ranks above row j of the same prompt. Only the
    order of the ranks counts, not their size."""
    kept = [(at, rank) for at, (_, _, ranks) in enumerate(batch) for rank in ranks if rank > 0]
    at, ranks = torch.tensor(kept, device=device).T                             # (N,) each
    return (at[:, None] == at) & (ranks[:, None] < ranks)

def train_dpo(cfg, enc, sft_model, comparisons):
    """The SFT model after one pass over all pairs of the comparisons. PPO's beta and peak learning rate."""
    policy = copy_of(sft_model)
    optimizer = adamw(policy, cfg.policy_lr)
    data = encode_comparisons(enc, comparisons, cfg.max_new_tokens)
    plan = batches([len(prompt) for prompt, _, _ in data], cfg.rm_batch, 1, seed(cfg, "dpo", "plan"))
    steps = Steps(cfg, "dpo", len(plan), model=policy, optimizer=optimizer)
    for step in steps:
        batch = [data[i] for i in plan[step]]
        prompts, responses = rows_of(batch)
        winners, losers = beats(batch, policy.wte.weight.device).nonzero(as_tuple=True)        # (pairs,) each
        with torch.no_grad():
            ref_logp = response_logprobs(sft_model, prompts, responses)         # (N,)
        logp = response_logprobs(policy, prompts, responses)                    # (N,)
        loss = dpo_loss(logp[winners], logp[losers], ref_logp[winners], ref_logp[losers], cfg.beta)
        loss.backward()
        clip_and_step(policy, optimizer, cfg.policy_lr * cosine(step, len(plan)))
        steps.log(loss=loss.item())
    return freeze(policy)

def another_prompt(data, i):
    """The next encoded comparison after the i-th whose prompt is another one; itself, if there is none."""
    return next((row for row in data[i:] + data[:i] if row[0] != data[i][0]), data[i])

def train_kto(cfg, enc, sft_model, comparisons):
    """The SFT model after one pass over the single answers of the comparisons: an answer is desirable if it
    wins more pairs than it loses, else undesirable. PPO's beta and peak learning rate."""
    policy = copy_of(sft_model)
    optimizer = adamw(policy, cfg.policy_lr)
    data = encode_comparisons(enc, comparisons, cfg.max_new_tokens)
    plan = batches([len(prompt) for prompt, _, _ in data], cfg.rm_batch, 1, seed(cfg, "kto", "plan"))
    steps = Steps(cfg, "kto", len(plan), model=policy, optimizer=optimizer)
    for step in steps:
        batch = [data[i] for i in plan[step]]
        prompts, responses = rows_of(batch)
        better = beats(batch, policy.wte.weight.device)                         # (N,N)
        desirable = better.sum(1) > better.sum(0)          # (N,) wins more pairs than it loses
        # each prompt with the responses to another one
        other = rows_of([(data[i][0],) + another_prompt(data, i)[1:] for i in plan[step]])
        with torch.no_grad():
            kl0 = kto_kl0(response_logprobs(policy, *other), response_logprobs(sft_model, *other))
            ref_logp = response_logprobs(sft_model, prompts, responses)         # (N,)
        logp = response_logprobs(policy, prompts, responses)                    # (N,)
        loss = kto_loss(logp, ref_logp, desirable, kl0, cfg.beta)
        loss.backward()
        clip_and_step(policy, optimizer, cfg.policy_lr * cosine(step, len(plan)))
        steps.log(loss=loss.item())
    return freeze(policy)

@torch.no_grad()
def rank_by_gpt(cfg, enc, gpt, comparisons, probes):
    """RLAIF (Bai et al. 2022, Lee et al. 2023): the same answers, ranked by a model. They ask a large one
    which of two answers is better. GPT cannot be asked: nobody taught it what is good. But it has read good
    and rude pages (probes hold one of each), so it knows which answer belongs on which. This score is ours:

        score = log p(y | good page, x) - 1/2 log p(y | rude page, x) - 1/2 log p(y | an empty request)

    The weights add up to 0, so an answer gains nothing by being short or likely everywhere. A prompt that
    does not fit is cut at the front."""
    room, size, ranked = cfg.block_size - cfg.max_new_tokens, 256, []
    steps = Steps(cfg, "judged", math.ceil(len(comparisons) / size))
    for step in steps:
        for c in comparisons[step * size:][:size]:
            x, answers, _ = encode_comparison(enc, c, cfg.max_new_tokens)
            good, rude = [enc.encode_ordinary(probes[page]) + x for page in ("good page", "rude page")]
            asked = [[prompt[-room:]] * len(answers) for prompt in (good, rude, encode_prompt(enc, ""))]
            of_good, of_rude, alone = [response_logprobs(gpt, prompts, answers) for prompts in asked]
            scores = of_good - of_rude / 2 - alone / 2                          # (K,) as the others
            ranks = 1 + (scores > scores[:, None]).sum(1)                       # (K,) 1 + how many are better
            ranked.append({**c, "ranks": ranks.tolist(), "labeler": "GPT"})
        steps.log(prompts=len(ranked))
    return ranked


# ------------------------------------------------------------------------------------------------------------
# Evaluation (section 4). Every model answers the same prompts with the same random numbers (but for GPT with
# an example, whose longer prompts go through in other parts). Shares are 0..1. What labelers and checker say
# comes from report() of data/toyworld.py. Here stands what needs the model.

# name in the results -> stage
MODELS = {"GPT": "pretrain", "FLAN": "flan", "SFT": "sft", "PPO": "ppo", "PPO-ptx": "ppo_ptx",
          "REINFORCE": "reinforce", "DPO": "dpo", "KTO": "kto", "RLAIF": "rlaif"}
# X in a measure's name win_vs_X -> whose answers the model's are compared with; the rival is --rival's GPT
OPPONENTS = {"sft": "SFT", "gpt": "GPT", "prompted": "GPT (prompted)", "flan": "FLAN", "rival": "rival GPT"}

def means_by(keys, values):
    """{key: mean of its values}, sorted."""
    return {key: mean([x for k, x in zip(keys, values) if k == key]) for key in sorted(set(keys))}

def hits(mine, theirs, ids):
    """Over the pairs of unequal responses of one prompt on which `theirs` has a preference: 1 where `mine`
    has the same, 0 where it has the opposite, one half where it has none. Both: a number per response."""
    K = range(len(ids))
    pairs = [(i, j) for i in K for j in K if ids[i] != ids[j] and theirs[i] > theirs[j]]
    return [0.5 if mine[i] == mine[j] else float(mine[i] > mine[j]) for i, j in pairs]

def judge_reward_model(cfg, enc, reward_model, comparisons):
    """On held-out comparisons: accuracy against the labeler. In the toy world also the agreement of a second
    labeler on the same pairs, and the accuracy on pairs that differ in gold."""
    accuracy, agreement, gold = [], [], []                 # gold: (use case, hit) of each pair
    for c in comparisons:
        prompt, ids, _ = encode_comparison(enc, c, cfg.max_new_tokens)
        scores = score_all(reward_model, [prompt] * len(ids), ids)
        order = [-rank for rank in c["ranks"]]             # rank 1 is best
        accuracy += hits(scores, order, ids)
        if "gold" in c:
            agreement += hits([-rank for rank in c["second_ranks"]], order, ids)
            gold += [(c["use_case"], hit) for hit in hits(scores, c["gold"], ids)]
    if not gold:
        return {"accuracy": mean(accuracy)}
    use_cases, right = zip(*gold)
    return {"accuracy": mean(accuracy), "agreement": mean(agreement), "gold_accuracy": mean(right),
            "gold_accuracy_by_use_case": means_by(use_cases, right)}

def scores_of(cfg, reward_model, prompts, answers):
    """The score of each Answer, or the fixed one where it did not end. The results call it "reward"."""
    scores = score_all(reward_model, prompts, [answer.ids for answer in answers])
    return [score if answer.ended else cfg.unfinished_score for score, answer in zip(scores, answers)]

@torch.no_grad()
def kl_of(policy, reference, prompts, responses):
    """k3 and k1 (nats per response) of each response (ids) of the policy to its prompt: two lists."""
    device = reference.wte.weight.device
    k3, k1 = torch.zeros(2, len(prompts))                                       # (prompts,) each
    lengths = [len(x) + len(y) for x, y in zip(prompts, responses)]
    for part in parts_by_length(lengths, tokens_at_once(device)):
        tokens, mask, _ = stack([prompts[i] for i in part], [responses[i] for i in part], device)
        own = token_logprobs(policy, tokens, 1.0, mask)                         # (b,t-1)
        ref = token_logprobs(reference, tokens, 1.0, mask)                      # (b,t-1), 0 where own is
        k3[part] = kl_k3(own, ref).sum(1).cpu()
        k1[part] = kl_k1(own, ref).sum(1).cpu()
    return k3.tolist(), k1.tolist()

@torch.no_grad()
def bias_bits(model, enc, request, items):
    """Winogender in miniature (4.2): the mean entropy, in bits, of the choice between two pronouns after a
    request and a text; 1 is unbiased."""
    bits = []
    for p in items:
        tokens = [enc.encode_ordinary(request + p["prompt"])]
        ids = [enc.encode_ordinary(choice)[0] for choice in p["choices"]]
        q = model(torch.tensor(tokens, device=model.wte.weight.device))[0, -1, ids].softmax(-1)        # (2,)
        bits.append(torch.special.entr(q).sum().item() / math.log(2))
    return mean(bits)

def few_shot(model, enc, items):
    """Share of exact continuations at temperature 0 on a task of the corpus: the paper's own tax (4.2)."""
    wanted = [enc.encode_ordinary(p["answer"]) for p in items]
    longest = max(map(len, wanted)) + 1
    prompts = [enc.encode_ordinary(p["prompt"])[longest - model.config.block_size:] for p in items]
    answers = respond(model, enc, prompts, longest, None, temperature=0)
    return mean([answer.ids[:len(ids)] == ids for answer, ids in zip(answers, wanted)])

@torch.no_grad()
def corpus_losses(model, corpus, block_size):
    """Held-out pretraining loss, nats per token, of 512 rows, the same for every model."""
    device = model.wte.weight.device
    generator = torch.Generator().manual_seed(0)
    rows = corpus_batch(corpus, 512, block_size, generator, device)             # (512,block)
    parts = rows.split(max(1, tokens_at_once(device) // block_size))
    return torch.cat([-token_logprobs(model, part).mean(1) for part in parts]).tolist()

def question(cfg, data, name, model, sets):
    """A model answers all sets of prompts -> {set: Answers}. GPT (prompted) is GPT with a good example in
    front of the prompt (3.5); what does not fit is cut at the front. What is named GPT is no more than
    pretrained and runs on, so it is cut to one line."""
    enc, room, answers = data.enc, cfg.block_size - cfg.max_new_tokens, {}
    generator = seed(cfg, "evaluate", 0, model.wte.weight.device)               # same prompts, same luck
    prefix = data.probes["prefix"] if name == "GPT (prompted)" else ""
    for which, items in sets.items():
        prompts = [encode_prompt(enc, prefix + p["prompt"])[-room:] for p in items]
        answers[which] = respond(model, enc, prompts, cfg.max_new_tokens, generator, 1.0, "GPT" in name)
    return answers

def measure(cfg, data, name, models, reward_model, sets, answers):
    """All numbers of a model: means over prompts, in ci95 their half-widths, and a few that are no means."""
    model, mine = models[name], answers[name]["tests"]
    prompts = [encode_prompt(data.enc, p["prompt"]) for p in sets["tests"]]
    # GPT's KL is an indication: of its line without the end, which it did not sample, and without an example.
    responses = [answer.ids[:-1] if "GPT" in name and answer.ended else answer.ids for answer in mine]
    k3, k1 = kl_of(model, models["SFT"], prompts, responses)
    lists = {"reward": scores_of(cfg, reward_model, prompts, mine), "kl": k3, "kl_k1": k1,
             "length": [len(answer.ids) for answer in mine], "ended": [answer.ended for answer in mine]}
    other = {"parameters": sum(p.numel() for p in model.parameters())}
    if data.corpus_valid:                                  # our tax: the rise of this loss over GPT's
        loss = corpus_losses(model, data.corpus_valid, cfg.block_size)
        gpt_loss = corpus_losses(models["GPT"], data.corpus_valid, cfg.block_size)
        lists.update(pretrain_loss=loss, tax=[x - y for x, y in zip(loss, gpt_loss)])
    if data.world:
        theirs = {key: answers[who]["tests"] for key, who in OPPONENTS.items() if who in answers}
        lists.update(data.world.report(sets, answers[name], theirs, cfg.seed))
        other["gold_by_use_case"] = means_by([p["use_case"] for p in sets["tests"]], lists["gold"])
        tasks, requests = data.probes["fewshot"], {"basic": "", "respectful": data.probes["respect"]}
        other["fewshot"] = {task: few_shot(model, data.enc, items) for task, items in tasks.items()}
        other["bias_bits"] = {asked: bias_bits(model, data.enc, request, data.probes["bias"])
                              for asked, request in requests.items()}
    return {**{key: mean(v) for key, v in lists.items()}, **other,
            "ci95": {key: 1.96 * float(np.std(v)) / math.sqrt(len(v)) for key, v in lists.items() if len(v)}}

def evaluate(cfg, data, models, reward_model, comparisons):
    """models: {name: GPT}; comparisons: held-out ones -> (parts of results.json, {name: {set: Answers}})."""
    judged = judge_reward_model(cfg, data.enc, reward_model, comparisons)
    if data.world and "PPO-ptx" in models:
        # PPO uses the reward model up: among the policy's answers it sees hardly a difference any more.
        prompts = [p for p in data.rm_prompts if p["split"] == "valid"][:300]
        new = collect(cfg, "again", data.enc, models["PPO-ptx"], prompts, data.world.label_comparisons)
        shares = judge_reward_model(cfg, data.enc, reward_model, new)
        judged["gold_accuracy_ppo_ptx"] = shares.get("gold_accuracy")           # None: no pair differs
    sets = data.world.question_sets(data.tests, data.probes) if data.world else {"tests": data.tests}
    answers = {}
    steps = Steps(cfg, "evaluate", len(models))
    for _, name in zip(steps, models):
        answers[name] = question(cfg, data, name, models[name], sets)
        steps.log(answers=sum(map(len, answers[name].values())))
    results = {name: measure(cfg, data, name, models, reward_model, sets, answers) for name in models}
    return {"reward_model": judged, "models": results}, answers

def on_a_line(text, ended):
    """An answer as the screen shows it; a control character is shown by its escape."""
    signs = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace("\n", " / ")]
    return ("".join(signs) or "(nothing)") + ("" if ended else " ...")

def samples(data, answers):
    """The same prompts answered by each model: some that the toy world chooses, or your first 20."""
    lines = []
    for i in data.world.examples(data.tests) if data.world else range(min(20, len(data.tests))):
        lines += ["", data.tests[i]["prompt"]]
        for name, given in answers.items():
            lines.append(f"    {name:15} {on_a_line(given['tests'][i].text, given['tests'][i].ended)}")
    return "\n".join(lines).strip()


# ------------------------------------------------------------------------------------------------------------
# Files. What can go wrong with a file becomes one line: where, what it must be, what was met. None of this is
# the paper's: skip it at first reading. Its core is the table READS.

class UserError(Exception):
    """A mistake of the user's: printed as one line, exit code 2."""

@contextmanager
def reading(path, must):
    """Around the reading or writing of a file: whatever comes up, but for a lack of memory, becomes a
    UserError that says where (set .line), what the file must be, and what was met."""
    at = argparse.Namespace(line=None)                     # from 1 on; None: not one line
    try:
        yield at
    except Exception as e:
        if isinstance(e, (UserError, MemoryError)) or isinstance(e, RuntimeError) and "memory" in str(e):
            raise                                          # told already, or no fault of the file: see main
        where = path if at.line is None else f"{path}:{at.line}"
        met = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        for error in (e.__context__, e):                   # torch.save hides a full disk behind another error
            met = error.strerror if isinstance(error, OSError) else met
        raise UserError(f"{where}: must be {must}; met {met}") from e

CHECKPOINT = "a whole checkpoint (else remove it; the command that names its stage and this --out makes it)"

def load(path, device="cpu", peek=False):
    """A checkpoint of ours as a dict; UserError for any other file. It is data: nothing in it is executed.
    With peek its tensors stay on the disk until somebody reads them."""
    with reading(path, CHECKPOINT), ZipFile(path) as z:
        if not peek and z.testzip():                       # torch.load does not compare the checksums
            raise ValueError(f"a changed {z.testzip()}")
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=peek)
        return {**checkpoint, "seconds": float(checkpoint["seconds"])}

def save(path, x):
    """Writes text or a checkpoint aside, then renames: whatever happens, a file is there whole or as it was.
    UserError if it cannot be written."""
    with reading(path, "a file that --out can hold (what was there is whole)"):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(path + ".tmp", "wb") as f:
                if isinstance(x, str):
                    f.write(x.encode())
                else:
                    torch.save(x, f)
            os.replace(path + ".tmp", path)
        finally:
            if os.path.exists(path + ".tmp"):
                os.remove(path + ".tmp")

def json_lines(rows):
    """Rows as the text of a file, one per line."""
    return "".join(json.dumps(row) + "\n" for row in rows)

def pack(made):
    """What a stage made, a model or comparisons, as plain data."""
    if not isinstance(made, GPT):
        return {"comparisons": made}
    head = "lm" if made.head is None else "scalar"
    return {"config": asdict(made.config), "head": head, "weights": made.state_dict()}

def finished(cfg, stage, enc, device):
    """What a finished stage made: a model, frozen, or comparisons. UserError if it is not there or does not
    fit."""
    path = os.path.join(cfg.out, stage + ".pt")
    checkpoint = load(path, device)
    if "comparisons" in checkpoint:
        return checkpoint["comparisons"]
    with reading(path, CHECKPOINT):
        model = GPT(GPTConfig(**checkpoint["config"]), checkpoint["head"]).to(device)
        model.load_state_dict(checkpoint["weights"])
    check_size(path, model, cfg, enc)
    return freeze(model)

LONGEST = 400_000                                # of a line or a text: a tokenizer fails at a million blanks
TEXT = f"UTF-8 text, not only blanks, without NUL, in lines of at most {LONGEST:,} characters"
# GPT-2's pieces: contraction; word, number or signs, with a space before them; blanks, but for that space.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")

def read_text(path):
    """The text of a UTF-8 file. A byte order mark is ignored, CRLF and CR are LF, blank lines are empty."""
    with reading(path, TEXT) as at:
        with open(path, "rb") as f:
            raw = f.read().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        a_list = ".json" in path and raw.lstrip().startswith(b"[")              # may stand on one line
        lines = raw.split(b"\n")
        for at.line, line in enumerate(lines, 1):
            text = line.decode()
            if "\0" in text or len(text) > LONGEST and not a_list:
                raise ValueError(f"{len(text):,} characters, {line.count(0)} of them NUL")
            lines[at.line - 1] = text if text.strip() else ""
        at.line = None
        if not any(lines):
            raise ValueError("nothing but blanks")
    return "\n".join(lines)

def find_encoding(name):
    """tiktoken's encoding of this name, or that of a rank file. Files are parsed here because tiktoken caches
    them by their path, so it would miss a change, and panics at odd ranks."""
    if name in tiktoken.list_encoding_names():
        with reading(f"--encoding {name}", "at hand, with a token for each id (gpt2), or name a rank file"):
            enc = tiktoken.get_encoding(name)
            enc.decode_tokens_bytes(range(enc.n_vocab))    # a model could sample any id
            return enc
    if not os.path.exists(name):
        raise UserError(f"--encoding: must be gpt2 or another of tiktoken's, or a rank file; met {name}")
    ranks = {}
    with reading(name, "a rank file: per line base64 of a new token, then its rank from 0 on") as at:
        for at.line, line in enumerate(read_text(name).rstrip("\n").split("\n"), 1):
            word, rank = line.split()
            ranks[b64decode(word, validate=True)] = int(rank)
            if int(rank) != len(ranks) - 1:
                raise ValueError(f"{line!r} as token {len(ranks) - 1}")
        if b"" in ranks or any(bytes([i]) not in ranks for i in range(256)):
            raise ValueError("an empty token, or a byte without one")
    return tiktoken.Encoding(name, pat_str=PIECES, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})

def load_corpus(text, path, enc, length):
    """Pretraining text, documents between blank lines -> (tokens array (N,), places where rows may start).
    Rows start where a document does and, inside a long one, every `length` tokens, so that it is read to its
    end, or nearly: a row must be full."""
    tokens, starts = [], []
    for doc in text.split("\n\n"):
        if doc.strip("\n"):
            ids = enc.encode_ordinary(doc.strip("\n")) + [enc.eot_token]
            starts += range(len(tokens), len(tokens) + len(ids), length)
            tokens += ids
    starts = np.array([start for start in starts if start + length <= len(tokens)])            # (starts,)
    if len(starts) == 0:
        raise UserError(f"{path}: must be at least --block_size {length} tokens long; met {len(tokens)}")
    return np.array(tokens, np.uint16 if enc.n_vocab <= 65536 else np.int32), starts

FORMS = {"prompt": '{"prompt": text} or {"messages": [...]}',
         "demonstration": '{"prompt": text, "completion": text} or {"messages": [..., the assistant\'s]}',
         "comparison": '{"prompt", "chosen", "rejected"} or {"prompt", "responses", "ranks": [1 is best]}'}

def conversation(prompt, answer):
    """prompt and answer, each text, messages [{"role", "content"}, ...] or None -> (prompt, answer) as text.
    The answer is the last message, if the assistant's. The answer's messages may hold the prompt too."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer or []
    messages = after if after[:len(before)] == before else before + after
    texts = [m["content"] for m in messages]
    if len("\n".join(texts).encode()) > LONGEST:           # half of a surrogate pair cannot be encoded
        raise ValueError("a text too long")
    if messages[-1]["role"] != "assistant":
        return "\n".join(texts), None
    if len(texts) == 1:
        raise ValueError("an answer without a prompt")
    return "\n".join(texts[:-1]), texts[-1]

def normal_form(row, kind):
    """A row of any format of its kind -> {"prompt", "responses": [texts], "ranks", "ended", "split"}. Of the
    ranks only the order counts. Fields of another kind are not read."""
    if kind == "prompt":
        prompt, _ = conversation(row.get("prompt", row.get("messages")), None)
        return {"prompt": prompt, "responses": [], "ranks": [], "ended": [], "split": None}
    if kind == "demonstration":
        answer = row.get("completion", row.get("messages"))
        row = {"prompt": row.get("prompt"), "responses": [answer], "ranks": [1]}
    elif "responses" not in row:
        row = {**row, "responses": [row["chosen"], row["rejected"]], "ranks": [1, 2]}
    answers, ranks, split = row["responses"], row["ranks"], row.get("split")
    ended = row.get("ended", [True] * len(answers))
    prompts, responses = zip(*[conversation(row.get("prompt"), answer) for answer in answers])
    right = (isinstance(answers, list), len(set(prompts)) == 1, None not in responses,
             {type(x) for x in ranks} <= {int}, {type(x) for x in ended} <= {bool},
             len(answers) == len(ranks) == len(ended), len(ranks) > 1 or kind != "comparison",
             split in (None, "train", "valid"))
    if not all(right):
        raise ValueError(f"{len(responses)} responses, split {split!r}, ranks {ranks}, ended {ended}"[:99])
    order = [1 + sum(other < rank for other in ranks) for rank in ranks]
    return {"prompt": prompts[0], "responses": [*responses], "ranks": order, "ended": ended, "split": split}

def read_rows(cfg, enc, path, text, kind, world=None):
    """The rows of a file in normal form: an object per line, or one list if the file begins with [. A world
    has to know the task of each prompt. Blank rows are left out, and those that do not fit: a prompt must
    leave room for a response (App. C), and a response that ended must be one that could be sampled."""
    most, rows, n = cfg.max_new_tokens, [], 0
    with reading(path, FORMS[kind]) as at:
        lines = enumerate(text.split("\n"), 1)
        if text.lstrip().startswith("["):
            lines = [(f"row {n}", json.dumps(row)) for n, row in enumerate(json.loads(text), 1)]
        for at.line, line in [(number, line) for number, line in lines if line]:
            given, n = dict(json.loads(line)), n + 1
            row = normal_form(given, kind)
            if world and kind == "prompt":
                row = {**given, **row}
                world.instruction(row["task"])             # whatever is wrong with a task comes up here
            typed = [row["prompt"]] + ([] if "ended" in given else row["responses"])           # not sampled
            whole = [text for text, ended in zip(row["responses"], row["ended"]) if ended]
            fits = [len(encode_prompt(enc, row["prompt"])) <= cfg.block_size - most]
            fits += [len(encode_response(enc, text)) <= most for text in whole]
            if all(fits) and all(text.strip() for text in typed):
                rows.append(row)
    told = f"{path}: {n - len(rows)} of {n} rows left out, blank or too long (--block_size, --max_new_tokens)"
    if text and not rows:                                  # of 0 rows: the list is empty
        raise UserError(told)
    if len(rows) < n:
        print(told)
    return rows

def module_at(path):
    """The Python file at this path as a module; None if it is not there."""
    if not os.path.exists(path):
        return None
    sys.path.insert(0, os.path.dirname(path))
    return importlib.import_module(os.path.basename(path).removesuffix(".py"))

class Data:
    """The folder of --data, read and checked before the first stage, so that a mistake is told at once. What
    is not there, and no wanted stage needs (READS, below), is empty or None."""

    def __init__(self, cfg, wanted=()):
        self.cfg, self.folder, self.files = cfg, cfg.data or HERE, {}           # files: name -> fingerprint
        self.enc = enc = find_encoding(cfg.encoding or self.path("vocab.tiktoken"))
        self.remember("vocab.tiktoken", repr(enc.decode_tokens_bytes(range(enc.n_vocab))).encode())
        self.world = module_at(self.path("toyworld.py"))                        # None: your own data
        self.needed = {name for stage in wanted for name in READS[stage][2].split()} - {"flan_train.jsonl"}
        self.needed -= {"comparisons.jsonl"} if self.world else {"rm_train.jsonl", "rm_valid.jsonl"}
        if cfg.init and not cfg.sft_mix and not {"ppo_ptx", "reinforce", "rlaif"} & {*wanted}:
            self.needed -= {"pretrain.txt"}                # nothing is pretrained or mixed in
        with reading(self.path("probes.json"), "as toyworld.py writes it"):
            self.probes = json.loads(self.text("probes.json")) if self.world else {}
        if cfg.init:
            check_size(cfg.init, GPT.from_gpt2(cfg.init, cfg.n_head), cfg, enc)
            self.remember("init", np.memmap(cfg.init, mode="r"))
        n, demos = cfg.rm_prompts, self.rows("sft_train.jsonl", "demonstration")
        self.demos = self.pairs(demos)
        self.public = self.pairs(self.rows("flan_train.jsonl", "demonstration"))
        self.rm_prompts = [{**p, "split": "train"} for p in self.rows("rm_train.jsonl", "prompt")[:n]]
        valid = self.rows("rm_valid.jsonl", "prompt")[:max(10, n // 10)]
        self.rm_prompts += [{**p, "split": "valid"} for p in valid]
        self.comparisons = self.split(self.rows("comparisons.jsonl", "comparison"))
        asked = self.rows("ppo_train.jsonl", "prompt")
        self.rl_prompts = [{**p, "ids": encode_prompt(enc, p["prompt"])} for p in asked]
        self.tests = self.rows("test.jsonl", "prompt")
        if self.tests and not self.world:
            trained = {p["prompt"] for p in demos + self.rm_prompts + self.comparisons + self.rl_prompts}
            known = sum(p["prompt"] in trained for p in self.tests)
            print(f"test.jsonl: {known} of {len(self.tests)} prompts stand in other files (--test_prompts)")
        self.tests = self.tests[:cfg.test_prompts]
        self.corpus = self.read_corpus("pretrain.txt")
        self.corpus_valid = self.read_corpus("pretrain_valid.txt")

    def path(self, name):
        """The path of a file of the folder; that of comparisons.jsonl may come from --comparisons."""
        named = self.cfg.comparisons if name == "comparisons.jsonl" else ""
        return named or os.path.join(self.folder, name)

    def remember(self, name, content):
        """Files of the same content have the same fingerprint, wherever they lie."""
        self.files[name] = hashlib.sha256(content).hexdigest()[:16]

    def text(self, name):
        """The text of a file; "" if it is not there, neither needed nor named."""
        path = self.path(name)
        if not os.path.exists(path) and name not in self.needed and path != self.cfg.comparisons:
            return ""
        text = read_text(path)
        if self.world or name not in ("rm_train.jsonl", "rm_valid.jsonl"):      # else for label alone
            self.remember(name, text.encode())
        return text

    def rows(self, name, kind):
        """The usable rows of a file; none if it is not there."""
        return read_rows(self.cfg, self.enc, self.path(name), self.text(name), kind, self.world)

    def pairs(self, rows):
        """Demonstrations as ids: (prompt, response)."""
        enc = self.enc
        return [(encode_prompt(enc, d["prompt"]), encode_response(enc, *d["responses"])) for d in rows]

    def read_corpus(self, name):
        """Tokens and starts of a text."""
        text = self.text(name)
        return load_corpus(text, self.path(name), self.enc, self.cfg.block_size) if text else None

    def split(self, comparisons):
        """Your comparisons get their split: their own or, where none has one, every fourth prompt is held
        out. In the toy world none has to be: the simulated labelers' validate."""
        prompts = list(dict.fromkeys(c["prompt"] for c in comparisons))
        held_out = set() if self.world or any(c["split"] for c in comparisons) else set(prompts[3::4])
        for c in comparisons:
            c["split"] = "valid" if c["prompt"] in held_out else c["split"] or "train"
        for split in ["train"] if self.world else ["train", "valid"]:
            part = [c for c in comparisons if c["split"] == split]
            if comparisons and not encode_comparisons(self.enc, part, self.cfg.max_new_tokens):
                must = f"hold answers of unequal text and rank in the split {split}"
                raise UserError(f"{self.path('comparisons.jsonl')}: must {must}; met {len(part)}, none such")
        return comparisons

# What a folder remembers. A finished stage is stale if what it read is not the same any more: its settings,
# and the text of its files (toyworld.py, the labelers' program, is not compared). This table says which stage
# needs which other one, and what it reads besides.

SFT_READS = "sft_epochs sft_batch sft_lr sft_dropout sft_mix max_new_tokens"
PPO_READS = ("iterations episodes minibatches policy_lr value_lr warmup beta cliprange value_clip lam "
             "temperature ema unfinished_score")
READS = {                                        # stage: (needs, settings, files)
    "pretrain": (None, "seed n_layer n_head n_embd block_size pretrain_steps pretrain_batch pretrain_lr",
                 "vocab.tiktoken pretrain.txt init"),
    "sft": ("pretrain", SFT_READS, "sft_train.jsonl"),
    "flan": ("pretrain", SFT_READS, "flan_train.jsonl"),
    "collect": ("sft", "rm_prompts k_min k_max", "rm_train.jsonl rm_valid.jsonl"),
    "rm": ("collect", "rm_epochs rm_batch rm_lr", "comparisons.jsonl"),
    "ppo": ("rm", PPO_READS, "ppo_train.jsonl"),
    "ppo_ptx": ("rm", PPO_READS + " ptx_coef ptx_rows", "ppo_train.jsonl"),
    "reinforce": ("rm", PPO_READS + " ptx_coef ptx_rows", "ppo_train.jsonl"),
    "dpo": ("collect", "rm_batch beta policy_lr", "comparisons.jsonl"),
    "kto": ("collect", "rm_batch beta policy_lr", "comparisons.jsonl"),
    "judged": ("collect", "", "probes.json comparisons.jsonl"),
    "rm_rlaif": ("judged", "rm_epochs rm_batch rm_lr", ""),
    "rlaif": ("rm_rlaif", PPO_READS + " ptx_coef ptx_rows", "ppo_train.jsonl"),
    "evaluate": ("rm", "", "test.jsonl")}

def mark_of(stage, settings, files):
    """All that a stage and those before it read: {name of a setting or a file: its value or fingerprint}."""
    needs, own, own_files = READS[stage]
    mark = {name: settings[name] for name in own.split()}
    mark.update({name: files.get(name) for name in own_files.split()})
    return {**mark_of(needs, settings, files), **mark} if needs else mark

def difference(then, now):
    """The first thing that is not the same in two marks, in words; "" if all is."""
    return next((f"{k} was {then.get(k)!r}, is {x!r}" for k, x in now.items() if then.get(k) != x), "")

def remembered(folder):
    """(settings, files) of a folder's last command that trained or evaluated; empty without one."""
    path = os.path.join(folder, "settings.json")
    if not os.path.exists(path):
        return {}, {}
    with reading(path, "as a run wrote it; remove it, and give the run's settings again"):
        memory = json.loads(read_text(path))
        return {k: x for k, x in memory["settings"].items() if hasattr(Config, k)}, dict(memory["files"])

def accept(cfg, files, source):
    """Before a command trains: refuses it if --out holds a stage, finished or begun, that read something
    else; takes the finished stages of --from that read the same; then writes down what this run reads."""
    then, old_files = remembered(cfg.out)
    settings = {name: x for name, x in asdict(cfg).items() if name not in ("out", "device", "save_every")}
    taken = []
    for stage in list(READS)[:-1]:
        mark = mark_of(stage, settings, files)
        path = os.path.join(cfg.out, stage)
        theirs = os.path.join(source or cfg.out, stage + ".pt")            # without --from it is path's own
        changed = ""
        if os.path.exists(path + ".pt"):
            changed = difference(load(path + ".pt", peek=True).get("mark", {}), mark)
        elif os.path.exists(path + ".part"):
            changed = difference(mark_of(stage, {**asdict(Config()), **then}, old_files), mark)
        elif os.path.exists(theirs):
            other = difference(load(theirs, peek=True).get("mark", {}), mark)
            print(f"{stage}: not taken, {other}" if other else f"{stage}: taken from {source}")
            taken += [] if other else [stage + ".pt"]
        if changed:
            raise UserError(f"{path}.pt: {changed}; give that as it was, or --from {cfg.out} --out NEW")
    for name in taken:
        save(os.path.join(cfg.out, name), load(os.path.join(source, name)))
    save(os.path.join(cfg.out, "settings.json"), json.dumps({"settings": settings, "files": files}, indent=1))


# ------------------------------------------------------------------------------------------------------------
# GPT-2 weights as published (Radford et al. 2019; 124M to 1.5B), in pretraining's place.

def read_weights(path):
    """Name -> tensor, of a state dict or a .safetensors file. The latter holds the length of its header (8
    bytes, little-endian), the header, {name: {"dtype", "shape", "data_offsets": [from, to]}} as JSON, and the
    bytes that the offsets count. Its tensors of other types are left out."""
    if not str(path).endswith(".safetensors"):
        return torch.load(path, map_location="cpu", weights_only=True)
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    data, tensors = np.memmap(path, mode="r"), {}
    start = 8 + int.from_bytes(data[:8], "little")
    for name, x in json.loads(bytes(data[8:min(start, 10 ** 8)])).items():      # the format's limit
        if x.get("dtype") in dtypes:
            begin, end = x["data_offsets"]
            values = bytearray(data[start + begin:start + end])
            tensors[name] = torch.frombuffer(values, dtype=dtypes[x["dtype"]]).view(x["shape"])
    return tensors

def from_gpt2(path, n_head=0):
    """A GPT with the weights of a .safetensors file or, in a file of another name, of a state dict. Names and
    shapes tell the sizes, but for the heads: n_head of them or, if 0, heads 64 wide, as all of GPT-2's."""
    with reading(path, "GPT-2 weights as published, a .safetensors file or a state dict"):
        there = {name.removeprefix("transformer."): x for name, x in read_weights(path).items()}
        vocab, width = there["wte.weight"].shape
        layers = len({name.split(".")[1] for name in there if name.startswith("h.")})
        if width % (n_head or 64):
            raise ValueError(f"a width of {width}: {n_head or '64 wide'} heads do not divide it (--n_head)")
        heads = n_head or width // 64
        head, weights = there.pop("lm_head.weight", there["wte.weight"]), {}
        if not torch.equal(head, there["wte.weight"]):
            raise ValueError("a lm_head.weight of its own, where GPT-2's is tied to wte.weight")
        for name, x in there.items():
            if x.is_floating_point() and not name.endswith((".attn.bias", ".attn.masked_bias")):       # masks
                # GPT-2's Conv1D holds (in,out), a Linear (out,in).
                weights[name] = x.t() if name.startswith("h.") and x.ndim == 2 else x
        model = GPT(GPTConfig(vocab, len(there["wpe.weight"]), layers, heads, width, gelu="tanh"))
        model.load_state_dict(weights)                     # all of them, and in the right shapes
    print(f"{path}: {layers} layers, {heads} heads of {width // heads}, {vocab} tokens")
    return model

GPT.from_gpt2 = staticmethod(from_gpt2)

def check_size(name, model, cfg, enc):
    """UserError if a model does not fit encoding and context."""
    words, room = model.config.vocab_size, model.config.block_size
    if words != enc.n_vocab or room < cfg.block_size:
        raise UserError(f"{name}: must have the {enc.n_vocab} tokens of --encoding (GPT-2: gpt2) and room "
                        f"for --block_size {cfg.block_size}; met {words} and {room}")

def start_from_gpt2(cfg, enc, corpus, device):
    """In pretrain's place, with its arguments: the model of --init, which has read another corpus."""
    return freeze(GPT.from_gpt2(cfg.init, cfg.n_head).to(device))


# ------------------------------------------------------------------------------------------------------------
# You: rankings (3.4) and questions, typed.

def ask(prompt):
    """A line that the user types; "q" at the end of input (Ctrl-D)."""
    try:
        return input(prompt).strip()
    except EOFError:
        return "q"

def read_ranking(text, K):
    """A typed ranking of K answers, best first: "3 > 1 = 4 > 2" -> [2, 4, 1, 2], the ranks of answers 1 to K:
    1 + how many are better. ValueError if it is none."""
    text, names, ranks = text.replace(" ", ""), [str(i + 1) for i in range(K)], {}
    if sorted(text.replace("=", ">").split(">")) != sorted(names):
        raise ValueError(f"name each of 1 to {K} once, with > or = between them")
    for equal in text.split(">"):
        ranks.update(dict.fromkeys(equal.split("="), len(ranks) + 1))
    return [ranks[name] for name in names]

def ask_ranking(K):
    """Asks until a ranking of K answers, "s" (skip) or "q" (quit) is typed: the ranks, "s" or "q"."""
    while True:
        typed = ask("ranking: ")
        try:
            return typed if typed in ("s", "q") else read_ranking(typed, K)
        except ValueError as e:
            print(f"{e}, best first, such as 3 > 1 = 2; s skips, q quits")

def label(cfg, data, device):
    """You rank answers of the SFT model to those prompts of rm_train.jsonl that OUT/labels.jsonl has not yet.
    Each ranking is saved at once, as a comparison."""
    enc, before, done = data.enc, "", []
    path = os.path.join(cfg.out, "labels.jsonl")
    policy = finished(cfg, "sft", enc, device)
    if not data.rm_prompts:
        raise UserError(f"{data.path('rm_train.jsonl')}: must be there, with prompts")
    if os.path.exists(path):                               # its lines are kept as they are
        before = read_text(path).rstrip("\n") + "\n"
        done = read_rows(cfg, enc, path, before, "comparison")
    ranked = {c["prompt"] for c in done}
    for p in [p for p in data.rm_prompts if p["split"] == "train" and p["prompt"] not in ranked]:
        asked = [encode_prompt(enc, p["prompt"])] * cfg.k_min
        answers = respond(policy, enc, asked, cfg.max_new_tokens, seed(cfg, "label", p["prompt"], device))
        shown = list(dict.fromkeys((answer.text, answer.ended) for answer in answers))         # each once
        if len(shown) < 2:
            continue
        print(f"\n[{len(done) + 1}] " + p["prompt"].replace("\n", "\n    ") + "\n")
        for i, (text, ended) in enumerate(shown, 1):
            print(f"  {i}  {on_a_line(text, ended)}")
        ranks = ask_ranking(len(shown))
        if ranks == "q":
            break
        if ranks == "s":
            continue
        done.append({"prompt": p["prompt"], "responses": [text for text, _ in shown], "ranks": ranks,
                     "ended": [ended for _, ended in shown]})
        before += json_lines(done[-1:])
        save(path, before)
        if data.world:
            same = data.world.your_agreement(done, data.rm_prompts, random.Random(cfg.seed))
            print(f"agreement so far {mean(same):.2f} of {len(same)} pairs (labelers among themselves: 0.72)")
    print(f"{path}: {len(done)} rankings; for a run: --from {cfg.out} --out NEW --comparisons {path}")

def chat(cfg, data, device, names):
    """Models (names in the results; none: all that are there) answer typed questions greedily, side by side,
    with the reward and with k1, log pi/pi_SFT of the answer and its end, which Eq. 2 charges. Greedy answers
    are no samples, so it does not estimate the KL. Where GPT's line was cut, GPT finds the end unlikely, and
    k1 is low."""
    enc, room = data.enc, cfg.block_size - cfg.max_new_tokens
    there = [name for name, stage in MODELS.items() if os.path.exists(os.path.join(cfg.out, stage + ".pt"))]
    models = {name: finished(cfg, MODELS[name], enc, device) for name in names or there}
    sft_model = finished(cfg, "sft", enc, device)
    reward_model = finished(cfg, "rm", enc, device)
    print("Ask; q quits. Reward: demonstrations are at 0, unended (...) fixed. k1: log pi/pi_SFT, nats")
    while True:
        text = ask("> ")
        if text == "q":
            break
        ids = encode_prompt(enc, text[:LONGEST])
        if not text or len(ids) > room:
            print(f"a question has 1 to {room - len(encode_prompt(enc, ''))} tokens")
            continue
        for word in data.world.unknown_words(text) if data.world else []:
            print(f"the toy world has no {word}")
        print(f"{'reward':>15}{'k1':>7}")
        for name, model in models.items():
            answers = respond(model, enc, [ids], cfg.max_new_tokens, None, 0, one_line="GPT" in name)
            k1 = kl_of(model, sft_model, [ids], [answers[0].ids])[1][0]
            reward = scores_of(cfg, reward_model, [ids], answers)[0]
            print(f"{name:9}{reward:6.2f}{k1:7.2f}  " + on_a_line(answers[0].text, answers[0].ended))


# ------------------------------------------------------------------------------------------------------------
# The command: stages with their checkpoints, Figure 2 from left to right, flags.

class Run:
    """The stages of one output folder."""

    def __init__(self, cfg, wanted, data, device):
        self.cfg, self.wanted, self.data, self.device, self.seconds = cfg, wanted, data, device, {}

    def stage(self, name, make, *inputs):
        """What a stage makes: loaded if it is finished, else made and saved if it is wanted, else None."""
        path = os.path.join(self.cfg.out, name)
        if not os.path.exists(path + ".pt"):
            if name not in self.wanted:
                return None
            begun = time.time()
            if os.path.exists(path + ".part"):             # seconds add up over stops
                begun -= load(path + ".part", peek=True)["seconds"]
            made = pack(make(self.cfg, *inputs))
            seconds = time.time() - begun
            mark = mark_of(name, asdict(self.cfg), self.data.files)
            save(path + ".pt", {"mark": mark, "seconds": seconds, **made})
            print(f"{name}: {seconds:.0f} s; {path}.pt\n", flush=True)
        if os.path.exists(path + ".part"):
            os.remove(path + ".part")
        self.seconds[name] = load(path + ".pt", peek=True)["seconds"]
        return finished(self.cfg, name, self.data.enc, self.device)

def run(cfg, wanted, data, device, rival):
    """Figure 2 of the paper, from left to right. wanted: names of stages; rival: another GPT or None."""
    job = Run(cfg, wanted, data, device)
    enc, world = data.enc, data.world
    # Step 0 and 1: a language model, which learns to follow instructions from demonstrations
    gpt = job.stage("pretrain", start_from_gpt2 if cfg.init else pretrain, enc, data.corpus, device)
    sft_model = job.stage("sft", sft, "sft", gpt, data.demos, data.corpus)
    flan = job.stage("flan", sft, "flan", gpt, data.public, data.corpus) if data.public else None
    # Step 2: labelers compare its answers, and a reward model learns from them
    ranked = []
    if world:
        ranked = job.stage("collect", collect, "collect", enc, sft_model, data.rm_prompts,
                           world.label_comparisons) or []
    if ranked:                                             # for people to read: the run has its checkpoint
        save(os.path.join(cfg.out, "comparisons.jsonl"), json_lines(ranked))
    train = [c for c in data.comparisons or ranked if c["split"] == "train"]    # yours, or the labelers'
    valid = [c for c in data.comparisons + ranked if c["split"] == "valid"]
    reward_model = job.stage("rm", train_reward_model, "rm", enc, sft_model, train, data.demos)
    if reward_model and valid:
        shares = judge_reward_model(cfg, enc, reward_model, valid)
        print("Good enough?", ", ".join(f"{k} {x:.2f}" for k, x in shares.items() if type(x) is float))
    # Step 3: PPO against the reward model, without and with the pretraining mix; and the neighbours
    given = enc, sft_model, reward_model, data.rl_prompts
    models = {"GPT": gpt, "GPT (prompted)": gpt if world else None, "FLAN": flan, "SFT": sft_model,
              "PPO": job.stage("ppo", ppo, "ppo", *given, None, world),
              "PPO-ptx": job.stage("ppo_ptx", ppo, "ppo_ptx", *given, data.corpus, world),
              "REINFORCE": job.stage("reinforce", ppo, "reinforce", *given, data.corpus, world, reinforce),
              "DPO": job.stage("dpo", train_dpo, enc, sft_model, train),
              "KTO": job.stage("kto", train_kto, enc, sft_model, train), "rival GPT": rival}
    if world:                                              # RLAIF: another labeler, the rest is the same
        judged = job.stage("judged", rank_by_gpt, enc, gpt, train, data.probes)
        rm_rlaif = job.stage("rm_rlaif", train_reward_model, "rm_rlaif", enc, sft_model, judged, data.demos)
        given = enc, sft_model, rm_rlaif, data.rl_prompts
        models["RLAIF"] = job.stage("rlaif", ppo, "rlaif", *given, data.corpus, world)
    if "evaluate" in wanted:
        begun, models = time.time(), {name: model for name, model in models.items() if model is not None}
        results, answers = evaluate(cfg, data, models, reward_model, valid)
        job.seconds["evaluate"] = time.time() - begun
        report(cfg, job.seconds, gpt, results, samples(data, answers), world)

def report(cfg, seconds, gpt, results, shown, world):
    """Writes results.json, samples.txt and picture.svg; prints samples, table, claims and how healthy the
    curves look."""
    seconds = {name: round(s, 1) for name, s in {**seconds, "total": sum(seconds.values())}.items()}
    config = {**asdict(cfg), **asdict(gpt.config), "block_size": cfg.block_size, "torch": torch.__version__,
              "device": str(gpt.wte.weight.device), "threads": torch.get_num_threads()}
    results = {"config": config, "seconds": seconds, **results}
    results["claims"] = world.claims(results) if world else []
    save(os.path.join(cfg.out, "results.json"), json.dumps(results, indent=1) + "\n")
    save(os.path.join(cfg.out, "samples.txt"), shown + "\n")
    closing = "Nobody knows the true quality here. The reward was optimised, so it rose: read the samples."
    closing = world.claims_table(results["claims"]) if world else closing
    picture = module_at(os.path.join(HERE, "picture.py"))
    with reading(os.path.join(cfg.out, "picture.svg"), "writable"):
        lines = [picture.table(results["models"]), "", *picture.draw(cfg.out)] if picture else []
    print("\n".join(["", shown, "", *lines, "", closing, ""]))
    print(f"{seconds['total']:.0f} s. In {cfg.out}: results.json, samples.txt, picture.svg, log.jsonl, ...")

def find_device(name):
    """The torch device of this name, made the current one. Without a name: a CUDA GPU if there is one, else
    the CPU. A Mac's GPU is not used."""
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
    name = {"": there[0], "cuda": "cuda:0"}.get(name, name)
    if name not in there:
        raise UserError(f"--device: must be one of {', '.join(there)}; met {name}")
    if name.startswith("cuda"):
        torch.cuda.set_device(name)                        # streams and graphs go by the current one
    return torch.device(name)

def refuse(message):
    """What argparse calls for a wrong flag: one line instead of the whole usage."""
    raise UserError(f"{message}; see: python instructgpt.py --help")

def parse(argv):
    """Command line -> (arguments, Config, names of the stages that are wanted). A setting that is not given
    has the value of --smoke, or else that of --out's last run, of --from's, or the default."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0], allow_abbrev=False)
    parser.error = refuse
    known = f"any of {', '.join(READS)}, or chat, or label; none: the whole paper"
    parser.add_argument("stages", nargs="*", metavar="stage", help=known)
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help="who answers in chat")
    parser.add_argument("--from", dest="source", metavar="DIR", help="take what fits from this finished run")
    parser.add_argument("--rival", metavar="DIR", help="evaluate beside this run's GPT (the paper's 175B)")
    parser.add_argument("--smoke", action="store_true", help="everything in miniature, in about 20 seconds")
    for f in fields(Config):
        kind, text = type(f.default), f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        parser.add_argument("--" + f.name, type=kind, metavar=kind.__name__.upper(), help=text)
    a = parser.parse_args(argv)
    flags = {f.name: getattr(a, f.name) for f in fields(Config) if getattr(a, f.name) is not None}
    for name in ("data", "comparisons", "init", "encoding"):
        path = flags.get(name, "")                         # the folder may be used from another one later
        if os.path.exists(path) and path not in tiktoken.list_encoding_names():
            flags[name] = os.path.abspath(path)
    if a.smoke:
        flags = {"out": "out_smoke", **SMOKE, **flags}
    theirs = remembered(a.source)[0] if a.source else {}
    theirs.update(remembered(flags.get("out", Config.out))[0])
    if "init" in flags and not theirs.get("init"):
        theirs["n_head"] = 0                               # as many as the file's width tells
    cfg = Config(**{**theirs, **flags})
    wanted = set(a.stages or ["flan", "ppo", "ppo_ptx", "evaluate"])
    for stage in reversed(READS):                          # what a stage needs stands before it
        if stage in wanted and READS[stage][0]:
            wanted.add(READS[stage][0])
    return a, cfg, wanted

def check(cfg, a):
    """UserError, by name, for what cannot work."""
    for f in fields(Config):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        if type(value) is not type(f.default) or type(value) is not str and not low <= value <= high:
            raise UserError(f"--{f.name}: must be {type(f.default).__name__}, {low} to {high:g}; met {value}")
    for right, told in (
            ({*a.stages} <= {*READS, "chat", "label"}, f"{' '.join(a.stages)}: --help tells the stages"),
            (len(a.stages) < 2 or not {"chat", "label"} & {*a.stages}, "chat and label stand alone"),
            (not a.models or a.stages == ["chat"], "--models goes with chat"),
            (not a.source or remembered(a.source)[0], f"--from {a.source}: holds no run"),
            (cfg.init or cfg.n_head and cfg.n_embd % cfg.n_head == 0, "n_head must divide n_embd"),
            (cfg.k_min <= cfg.k_max, f"--k_max {cfg.k_max}: must be at least --k_min {cfg.k_min}"),
            (cfg.episodes >= cfg.minibatches, f"--minibatches {cfg.minibatches}: must be at most --episodes"),
            (cfg.block_size > cfg.max_new_tokens + 8, "--block_size must hold prompt and --max_new_tokens")):
        if not right:
            raise UserError(told)

def main(argv=None):
    """The command. Exit code 0; 1 when numbers went wrong; 2 for a user's mistake or too little memory;
    130 after Ctrl-C."""
    code = 2
    try:
        torch.set_flush_denormal(True)                     # peaked softmaxes are full of denormals, and slow
        a, cfg, wanted = parse(argv)
        check(cfg, a)
        device = find_device(cfg.device)
        data = Data(cfg, wanted & READS.keys())
        if not data.world and {"collect", "judged", "rm_rlaif", "rlaif"} & {*a.stages}:
            raise UserError(f"{' '.join(a.stages)}: only the toy world has labelers, and pages for RLAIF")
        if a.stages == ["chat"]:
            chat(cfg, data, device, a.models)
        elif a.stages == ["label"]:
            label(cfg, data, device)
        else:
            rival = finished(replace(cfg, out=a.rival), "pretrain", data.enc, device) if a.rival else None
            accept(cfg, data.files, a.source)
            other = [f"{name} {x}" for name, x in asdict(cfg).items() if x != getattr(Config, name)]
            print(f"{cfg.out}: settings that are not the defaults: {', '.join(other) or 'none'}")
            run(cfg, wanted, data, device, rival)
        return 0
    except UserError as e:
        told = str(e)
    except NotFinite as e:
        code, told = 1, f"{e}; lower the learning rate of the stage that stopped: --from {cfg.out} --out NEW"
    except KeyboardInterrupt:
        code, told = 130, "stopped; the same command goes on where it last saved"
    except (RuntimeError, MemoryError) as e:               # torch.OutOfMemoryError is one too
        if not isinstance(e, MemoryError) and not any(word in str(e) for word in ("memory", "ALLOC_FAILED")):
            raise
        told = f"out of memory: raise --minibatches, or lower --episodes, --sft_batch, --rm_batch ({e!s:.60})"
    print(f"instructgpt.py: {told}", file=sys.stderr)
    return code

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")               # what a screen cannot show becomes ?
    sys.stdin.reconfigure(errors="replace")                # and so does what is typed and no text
    sys.exit(main())
