"""
One test per formula of instructgpt.py, named after its equation or section of the paper (arXiv 2203.02155).

    pytest -q test_instructgpt.py                 all of them, about two minutes
    pytest -q test_instructgpt.py -k eq1          those of Eq. 1
    pytest -q test_instructgpt.py -k gae -x       one formula, to the first failure
    python test_instructgpt.py bench              no test: how fast each part is here, in two minutes (--help)

As exercises: empty a function of instructgpt.py, run the tests that name its equation, fill it in again.
Beside most formulas stands a slow twin: the definition in plain Python, which the fast one has to equal.
The order is the script's: tokens and data, GPT, rollout, formulas, toy world; then the steps, the run in
miniature, the command line and GPT-2's weights; last the bench.
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import random
import select
import shutil
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as tree
from base64 import b64decode, b64encode
from collections import Counter
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import instructgpt as ig

HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.join(HERE, "data")
tw = ig.toyworld(DATA)
pytestmark = pytest.mark.filterwarnings("error")
THREADS = torch.get_num_threads()                # the machine's own choice, for the bench
torch.set_num_threads(1)                         # matrices of 16 columns: a second thread only waits
close = torch.testing.assert_close

V, EOS = 11, 10                                  # tiny vocabulary; id 0, the filler, is a word like any other
PROMPTS = [[3], [1, 2, 0, 4, 5], [7, 7], [0, EOS, 9]]                  # with the filler's id and EOS inside
MASK = torch.tensor([[0, 0, 1, 1, 1, 1],         # action frame: response to the end
                     [1, 0, 0, 0, 0, 0],         # one-token prompt, one-token response
                     [0, 1, 1, 1, 0, 0],
                     [0, 0, 0, 0, 0, 0]]).bool()                       # no response at all


def seeded(n):
    return torch.Generator().manual_seed(n)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def tiny(head="lm", block=24, seed=0, dropout=0.0, gelu="none"):
    """2 layers of 16. Weights are large and biases random, so that every one of them shows in the output."""
    torch.manual_seed(seed)
    model = ig.GPT(ig.GPTConfig(V, block, 2, 2, 16, dropout, gelu), head)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(10 * p if p.ndim == 2 else p + 0.2 * torch.randn_like(p))
    return model


def move(model, seed=1, size=0.1):
    """The same model after an "optimizer step": weights changed in place."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(size * normal(*p.shape, seed=1000 * seed + i).to(p.device))
    return model


@pytest.fixture(scope="module")
def enc():
    return ig.load_encoding(os.path.join(DATA, "vocab.tiktoken"))


@pytest.fixture(scope="module")
def sets():
    """name -> rows, of every prompt set of the toy world."""
    kinds = {"use_case": str, "form": str, "customer": str, "task": dict}
    return {f[:-6]: ig.read_jsonl(os.path.join(DATA, f), prompt="text", **kinds)
            for f in sorted(os.listdir(DATA)) if f.endswith(("train.jsonl", "valid.jsonl", "test.jsonl"))}


# ------------------------------------------------------------------------------------------------------------
# Settings


def test_import_prints_reads_and_seeds_nothing():
    code = ("import builtins, pickle, random, torch, numpy as np, tiktoken\n"
            "torchs = lambda: torch.get_rng_state().tolist()\n"
            "states = lambda: pickle.dumps([random.getstate(), np.random.get_state(), torchs()])\n"
            "before, builtins.open = states(), None\n"                 # opening a file would be a TypeError
            "import instructgpt\n"
            "assert states() == before\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_appendix_c_settings_that_the_toy_leaves_as_they_are():
    c = ig.Config()
    assert (c.k_min, c.k_max, c.rm_epochs, c.sft_batch) == (4, 9, 1, 32)
    assert (c.minibatches, c.warmup, c.cliprange, c.temperature, c.ema) == (8, 10, 0.2, 1.0, 0.992)


def test_every_setting_names_its_meaning_and_its_stage():
    for f in fields(ig.Config):
        assert f.metadata["help"] and f.metadata["stage"] in ["run"] + ig.STAGES, f.name
    assert set(ig.SMOKE) <= {f.name for f in fields(ig.Config)}


# ------------------------------------------------------------------------------------------------------------
# Tokens and data (3.2)


def test_typed_end_of_text_stays_text(enc):
    typed = "Say " + ig.EOT + " twice."
    for ids in (ig.encode_prompt(enc, typed), ig.encode_response(enc, typed)[:-1]):
        assert enc.eot_token not in ids and typed in enc.decode(ids)


def test_response_ends_with_end_of_text_once(enc):
    ids = ig.encode_response(enc, "It says moo.")
    assert ids.count(enc.eot_token) == 1 and ids[-1] == enc.eot_token


def test_vocabulary_round_trip_of_any_bytes(enc):
    assert all(enc.decode_bytes([enc.encode_single_token(bytes([i]))]) == bytes([i]) for i in range(256))
    for text in ["", " ", "\n\n \t", "a\r\nb", "café, naïve", "\x00\x7f", "日本語 🦊", "cow12cow", " >\n> ",
                 "".join(map(chr, range(1, 999)))]:
        assert enc.decode(enc.encode_ordinary(text)) == text
    assert enc.eot_token == enc.n_vocab - 1 and enc.decode([enc.eot_token]) == ig.EOT


def test_prompt_and_response_are_tokens_of_the_page_they_make(enc, sets):
    for row in sets["sft_valid"]:
        page = row["prompt"] + ig.MARK + " " + row["completion"]
        rows = ig.encode_prompt(enc, row["prompt"]) + ig.encode_response(enc, row["completion"])
        assert rows == enc.encode_ordinary(page) + [enc.eot_token]


def test_every_prompt_and_response_fit_the_window(enc, sets):
    c = ig.Config()
    for name, rows in sets.items():
        prompts = [ig.encode_prompt(enc, r["prompt"]) for r in rows]
        if name.startswith("sft"):
            responses = [ig.encode_response(enc, r["completion"]) for r in rows]
            assert max(map(len, responses)) <= c.max_new_tokens, name
            assert max(len(x) + len(y) for x, y in zip(prompts, responses)) <= c.block_size, name
        else:
            assert max(map(len, prompts)) + c.max_new_tokens <= c.block_size, name


def test_corpus_rows_begin_where_documents_begin(enc, tmp_path):
    docs = ["The cow liked the lamp.", "Is it " + ig.EOT + "?\n> no.", "A\nB\nC"]
    path = tmp_path / "web.txt"
    path.write_text("\n\n\n" + "\n\n".join(docs) + "\n", encoding="utf-8")
    tokens, starts = ig.load_corpus(str(path), enc, 4)
    want = [enc.encode_ordinary(d) + [enc.eot_token] for d in docs]
    assert tokens.tolist() == sum(want, []) and tokens.itemsize == 2
    assert starts.tolist() == [0, len(want[0]), len(want[0] + want[1])]
    rows = ig.corpus_batch((tokens, starts), 64, 4, seeded(0), "cpu")
    assert rows.shape == (64, 4) and rows.dtype == torch.long
    assert sorted(set(map(tuple, rows.tolist()))) == sorted(tuple(tokens[s:s + 4].tolist()) for s in starts)
    assert torch.equal(rows, ig.corpus_batch((tokens, starts), 64, 4, seeded(0), "cpu"))
    with pytest.raises(ig.UserError, match="fewer than 400 tokens"):
        ig.load_corpus(str(path), enc, 400)


def test_action_frame_of_stack():
    tokens, mask, last = ig.stack([[5, 6, 7], [4], [8, 8]], [[0, 9, EOS], [EOS], [1, 2, 3, EOS]], "cpu")
    assert tokens.tolist() == [[5, 6, 7, 0, 9, EOS], [4, EOS, 0, 0, 0, 0], [8, 8, 1, 2, 3, EOS]]
    assert mask.int().tolist() == [[0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 1, 1]]  # with EOS and a real 0
    assert last.tolist() == [5, 1, 5] and mask.dtype == torch.bool
    assert [row[1:][m].tolist() for row, m in zip(tokens, mask)] == [[0, 9, EOS], [EOS], [1, 2, 3, EOS]]


def test_batches_hold_every_row_once_and_little_filler():
    lengths = torch.randint(1, 60, (1000,), generator=seeded(0)).tolist()
    cut = ig.batches(lengths, 32, 1, seeded(1))
    assert sorted(sum(cut, [])) == list(range(1000)) and sorted(map(len, cut)) == [8] + [32] * 31
    filler = lambda batches: sum(max(lengths[i] for i in b) - lengths[j] for b in batches for j in b)
    shuffled = torch.randperm(1000, generator=seeded(2)).tolist()
    assert filler(cut) < 0.25 * filler([shuffled[s:s + 32] for s in range(0, 1000, 32)])
    assert cut == ig.batches(lengths, 32, 1, seeded(1)) != ig.batches(lengths, 32, 1, seeded(3))
    first, second = ig.batches(lengths, 32, 2, seeded(1))[:32], ig.batches(lengths, 32, 2, seeded(1))[32:]
    assert first == cut and second != cut and sorted(sum(second, [])) == list(range(1000))
    means = [sum(lengths[i] for i in b) / len(b) for b in cut]
    assert means != sorted(means)  # else training would see short rows first


# ------------------------------------------------------------------------------------------------------------
# GPT (3.5)


def slow_gpt(model, row):
    """GPT-2's decoder for one row: every head and every position by itself -> (T,V)."""
    w, c = dict(model.named_parameters()), model.config
    norm = lambda x, n: F.layer_norm(x, x.shape[-1:], eps=1e-5) * w[n + ".weight"] + w[n + ".bias"]
    line = lambda x, n: x @ w[n + ".weight"].T + w[n + ".bias"]
    x = torch.stack([w["wte.weight"][t] + w["wpe.weight"][i] for i, t in enumerate(row)])             # (T,C)
    d = c.n_embd // c.n_head
    for b in (f"h.{i}." for i in range(c.n_layer)):
        q, k, v = line(norm(x, b + "ln_1"), b + "attn.c_attn").chunk(3, -1)  # (T,C) each
        y = torch.zeros_like(x)
        for t in range(len(row)):
            for h in (slice(s, s + d) for s in range(0, c.n_embd, d)):
                y[t, h] = F.softmax(k[:t + 1, h] @ q[t, h] / math.sqrt(d), -1) @ v[:t + 1, h]
        x = x + line(y, b + "attn.c_proj")
        x = x + line(F.gelu(line(norm(x, b + "ln_2"), b + "mlp.c_fc"), approximate=c.gelu), b + "mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_section_35_gpt_is_its_definition(gelu):
    model, row = tiny(gelu=gelu), [3, 0, 10, 7, 7, 1, 9]
    with torch.no_grad():
        close(model(torch.tensor([row]))[0], slow_gpt(model, row), atol=1e-5, rtol=1e-5)


def test_section_35_prediction_never_sees_what_follows():
    model, tokens = tiny(), torch.randint(V, (1, 12), generator=seeded(0))
    other = tokens.clone()
    other[0, 7:] = (tokens[0, 7:] + 1) % V
    with torch.no_grad():
        a, b = model(tokens), model(other)
    close(a[:, :7], b[:, :7], atol=1e-6, rtol=0)
    assert (a[:, 7:] - b[:, 7:]).abs().amax(-1).min() > 1e-3


def test_section_35_row_is_the_same_alone_and_in_a_padded_batch():
    model, rm = tiny(), tiny("scalar")
    tokens, mask, last = ig.stack(PROMPTS, [[4, 0, EOS], [EOS], [1, 2, 3, 4, 5, EOS], [6, 6]], "cpu")
    with torch.no_grad():
        logprobs, scores = ig.token_logprobs(model, tokens), ig.reward_scores(rm, tokens, last)
        for b in range(4):
            n = int(last[b]) + 1
            close(logprobs[b:b + 1, :n - 1], ig.token_logprobs(model, tokens[b:b + 1, :n]), atol=1e-5, rtol=0)
            alone = ig.reward_scores(rm, tokens[b:b + 1, :n], last[b:b + 1])
            close(scores[b:b + 1], alone, atol=1e-5, rtol=0)
        tokens[1, int(last[1]) + 1:] = 9                               # filler of any kind will do
        close(ig.reward_scores(rm, tokens, last), scores, atol=1e-6, rtol=0)


def test_section_35_heads():
    lm, scalar = tiny(), tiny("scalar")
    tokens = torch.randint(V, (3, 5), generator=seeded(0))
    assert lm(tokens).shape == (3, 5, V) and scalar(tokens).shape == (3, 5)
    more = {n for n, _ in scalar.named_parameters()} - {n for n, _ in lm.named_parameters()}
    assert more == {"head.weight", "head.bias"}  # the language head is tied: it has no weight
    torch.manual_seed(0)
    big = ig.GPT(ig.GPTConfig(50, 16, 8, 2, 64), "scalar")
    want = {"head.weight": 1 / math.sqrt(65), "wte.weight": 0.02, "h.3.attn.c_attn.weight": 0.02,
            "h.3.attn.c_proj.weight": 0.02 / 4, "h.3.mlp.c_proj.weight": 0.02 / 4}  # 1/sqrt(2 * 8 layers)
    for name, std in want.items():
        assert abs(big.get_parameter(name).std().item() / std - 1) < 0.25, name
    assert all(p.abs().max() == 0 for n, p in big.named_parameters() if n.endswith("bias"))


def test_section_35_reward_model_starts_from_the_language_model():
    lm = tiny(dropout=0.1)
    rm = ig.copy_of(lm, "scalar")
    trunk = dict(rm.named_parameters())
    for name, p in lm.named_parameters():
        assert torch.equal(p, trunk[name]) and p.data_ptr() != trunk[name].data_ptr()
    assert rm.head.out_features == 1 and rm.config.dropout == 0


def test_row_longer_than_the_block_is_refused():
    model = tiny(block=8)
    model(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="9 tokens"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_dropout_acts_in_training_only():
    model, tokens = tiny(dropout=0.5), torch.arange(6)[None]
    with torch.no_grad():
        torch.manual_seed(0)
        assert not torch.equal(model.train()(tokens), model(tokens))
        assert torch.equal(model.eval()(tokens), model(tokens))


def test_frozen_model_has_no_gradient_no_dropout_and_never_moves():
    policy = tiny(dropout=0.5).train()
    reference = ig.freeze(deepcopy(policy))
    before = [p.clone() for p in reference.parameters()]
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    ig.lm_loss(policy, torch.arange(8)[None]).backward()
    torch.optim.SGD(policy.parameters(), lr=1.0).step()
    assert all(map(torch.equal, before, reference.parameters()))
    assert not any(map(torch.equal, policy.parameters(), reference.parameters()))


# ------------------------------------------------------------------------------------------------------------
# Rollout (C.4)


def slow_rollout(model, prompt, luck, eos, temperature=1.0):
    """One row, no cache: a forward pass a token, picked by walking its distribution; ids, log-probs."""
    response, logprobs = [], []
    for u in luck:
        logits = model(torch.tensor([prompt + response]))[0, -1].double()
        p = F.softmax(logits / (temperature or 1), -1).tolist()
        walk = (v for v in range(V) if sum(p[:v + 1]) > u)
        token = next(walk) if temperature else p.index(max(p))
        response.append(token)
        logprobs.append(math.log(p[token]) if temperature else 0.)
        if token == eos:
            break
    return response, logprobs


def assert_is_slow_rollout(model, prompts, n, eos, temperature, seed):
    r = ig.rollout(model, prompts, n, eos, temperature, seeded(seed))
    luck = torch.rand(n, len(prompts), generator=seeded(seed))
    slow = [slow_rollout(model, p, luck[:, b].tolist(), eos, temperature) for b, p in enumerate(prompts)]
    T = max(map(len, prompts)) + n
    assert r.tokens.shape == (len(prompts), T) and r.mask.shape == r.logprobs.shape == (len(prompts), T - 1)
    for b, (p, (response, logprobs)) in enumerate(zip(prompts, slow)):
        first, end = len(p) - 1, len(p) - 1 + len(response)
        assert r.tokens[b].tolist() == p + response + [0] * (T - len(p) - len(response))
        assert r.mask[b].nonzero()[:, 0].tolist() == list(range(first, end))
        close(r.logprobs[b, first:end], torch.tensor(logprobs), atol=1e-5, rtol=0)
        assert r.ended[b] == (response[-1] == eos) and r.logprobs[b][~r.mask[b]].abs().sum() == 0
    assert r.prompt_lens.tolist() == [len(p) for p in prompts] and r.responses() == [x for x, _ in slow]
    return r


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5, 0])
def test_section_c4_rollout_is_the_slow_sampler_token_for_token(temperature):
    with torch.no_grad():
        r = assert_is_slow_rollout(tiny(), PROMPTS * 6, 12, EOS, temperature, seed=1)
    if temperature:
        assert 0 < r.ended.sum() < len(r.ended)                        # both kinds of ending were seen


def test_section_c4_rollout_follows_weights_that_change():
    model = tiny()
    with torch.no_grad():
        for step in range(3):                                          # same shapes: a stale cache would show
            assert_is_slow_rollout(model, PROMPTS, 10, EOS, 1.0, seed=2)
            move(model, seed=step)


def test_section_c4_cached_steps_are_uncached_logits():
    model, tokens = tiny(), torch.randint(V, (3, 14), generator=seeded(4))
    lens = torch.tensor([1, 6, 4])
    with torch.no_grad():
        whole, cache = model(tokens), model.new_cache(3, 14)
        prefill = model.project(model.hidden(tokens[:, :6], cache))  # beyond two rows' prompts: filler
        close(prefill, whole[:, :6], atol=1e-5, rtol=0)
        for i in range(8):
            at = (lens + i)[:, None]                                   # every row at a place of its own
            logits = model.project(model.hidden(tokens.gather(1, at), cache, at, 14))[:, 0]
            close(logits, whole[torch.arange(3), at[:, 0]], atol=1e-5, rtol=0)


def test_section_c4_ratio_is_one_before_the_first_update():
    policy = tiny(dropout=0.3).train()                                 # the rollout must switch dropout off
    r = ig.rollout(policy, PROMPTS * 8, 12, EOS, 1.0, seeded(0))
    new = ig.token_logprobs(policy, r.tokens)
    assert (new - r.logprobs)[r.mask].abs().max() < 1e-5
    old = new.detach()
    assert torch.exp(new - old)[r.mask].eq(1).all()
    advantages = normal(*old.shape)
    close(ig.policy_loss(new, old, advantages, r.mask), -ig.masked_mean(advantages, r.mask))


def test_section_c4_kl_is_zero_before_the_first_update():
    policy = tiny()
    reference = ig.freeze(deepcopy(policy))
    r = ig.rollout(policy, PROMPTS, 12, EOS, 1.0, seeded(0))
    ref = ig.token_logprobs(reference, r.tokens)
    assert ig.kl_k1(r.logprobs, ref)[r.mask].abs().max() < 1e-5 and ig.kl_k3(ref, ref).abs().max() == 0
    rewards = ig.token_rewards(torch.arange(4.), ref, ref, r.mask, beta=0.3)
    assert rewards.sum(1).tolist() == [0, 1, 2, 3] and rewards.count_nonzero() == 3


def first_pick(model, prompt):
    with torch.no_grad():
        return int(model(torch.tensor([prompt]))[0, -1].argmax())


def test_section_c4_immediate_end_is_an_episode_of_one_action():
    model = tiny()
    eos = first_pick(model, PROMPTS[1])  # the likeliest token is declared to be EOS
    r = ig.rollout(model, PROMPTS, 9, eos, 0)
    assert r.responses()[1] == [eos] and r.ended[1] and r.mask[1].nonzero().tolist() == [[4]]
    assert r.tokens[1].tolist() == PROMPTS[1] + [eos] + [0] * 8


def test_section_c4_response_without_end_and_with_its_end_at_the_limit():
    model = tiny()
    r = ig.rollout(model, PROMPTS * 8, 6, 99, 1.0, seeded(3))          # 99: a token that cannot come
    assert not r.ended.any() and r.mask.sum(1).eq(6).all()
    b = next(b for b, x in enumerate(r.responses()) if x[-1] not in x[:-1])
    again = ig.rollout(model, PROMPTS * 8, 6, r.responses()[b][-1], 1.0, seeded(3))
    assert again.ended[b] and again.responses()[b] == r.responses()[b]


def test_section_c4_steps_end_with_the_last_row_and_see_the_filled_part_only(monkeypatch):
    model, step, widths = tiny(), ig.decode_step, []
    monkeypatch.setattr(ig, "decode_step", lambda *how: widths.append(how[2]) or step(*how))
    ig.rollout(model, [PROMPTS[1]] * 3, 12, first_pick(model, PROMPTS[1]), 0)  # all end at their first token
    assert 0 < len(widths) < 12 and widths == list(range(5, 5 + len(widths)))  # one more a step


@pytest.mark.parametrize("prompts", [[[1]], [[1], [2, 3, 4, 5, 6, 7]]], ids=["one token", "unequal"])
def test_section_c4_block_may_be_filled_but_not_exceeded(prompts):
    model, room = tiny(block=12), 12 - max(map(len, prompts))
    assert ig.rollout(model, prompts, room, 99, 1.0, seeded(0)).mask.sum(1).eq(room).all()
    with torch.no_grad():
        assert_is_slow_rollout(model, prompts, room, 99, 1.0, 0)       # the last position works too
    with pytest.raises(ValueError, match="block"):
        ig.rollout(model, prompts, room + 1, 99)
    with pytest.raises(ValueError, match="needs 1 to 10 tokens"):
        ig.rollout(model, prompts + [[]], 2, 99)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_section_c4_samples_have_the_frequencies_of_the_softmax(temperature):
    model, n = tiny(), 4000
    r = ig.rollout(model, [[3, 1]] * n, 1, EOS, temperature, seeded(0))
    seen = torch.bincount(r.tokens[:, 2], minlength=V)
    with torch.no_grad():
        want = n * F.softmax(model(torch.tensor([[3, 1]]))[0, -1] / temperature, -1)
    assert (seen > 0).sum() > 5                                        # the samples' first tokens differ
    assert ((seen - want) ** 2 / want).sum() < 29.6  # chi-square, 10 degrees of freedom, p = 0.001


def test_section_c4_luck_comes_from_the_generator_alone():
    model = tiny()
    state = torch.get_rng_state()
    a, b, c = (ig.rollout(model, PROMPTS * 4, 8, EOS, 1.0, seeded(s)).tokens for s in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())


def test_section_c4_pick_walks_the_distribution_and_leaves_the_logits():
    logits = torch.tensor([[-math.inf, 1., 1., -math.inf]]).repeat(5, 1)
    u = torch.tensor([0., 0.4999, 0.5001, 0.75, 1 - 2 ** -24])  # the ends must not pick an impossible token
    before = logits.clone()
    token, logprob = ig.pick(logits, u, 0.5)
    assert token.tolist() == [1, 1, 2, 2, 2] and torch.equal(logits, before)
    close(logprob, torch.full((5,), math.log(0.5)))
    assert ig.pick(normal(5, 4), u, 0)[0].tolist() == normal(5, 4).argmax(-1).tolist()


def test_section_c4_pick_stays_in_the_vocabulary_when_the_logits_are_nan():
    token, logprob = ig.pick(torch.full((2, 4), math.nan), torch.tensor([0., 0.9]), 1.0)
    assert token.max() < 4 and logprob.isnan().all()                   # NaN goes on to where it is named


class Tape(TorchDispatchMode):
    """Writes down every operator that runs, with the shapes of its tensors."""
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        self.calls.append((str(func), [tuple(x.shape) for x in tensors]))
        return out


def test_section_c4_decode_step_keeps_its_shapes_and_never_waits_for_the_host(monkeypatch):
    step, tapes = ig.decode_step, []

    def taped(policy, s, width, eos, temperature):
        with Tape() as tape:
            step(policy, s, s["tokens"].size(1), eos, temperature)     # full width, as on a GPU
        tapes.append(tape.calls)
    monkeypatch.setattr(ig, "decode_step", taped)
    got = ig.rollout(tiny(), PROMPTS, 7, EOS, 1.0, seeded(1))
    monkeypatch.undo()
    assert len(tapes) > 4 and len(tapes[0]) > 30 and all(tape == tapes[0] for tape in tapes)
    waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.equal", "masked_select", "_to_copy",
             "scalar_tensor", "lift_fresh")                            # numbers made tensors: host copies
    assert not [name for name, _ in tapes[0] if any(w in name for w in waits)]
    narrow = ig.rollout(tiny(), PROMPTS, 7, EOS, 1.0, seeded(1))       # the filled part only, as on a CPU
    assert torch.equal(got.tokens, narrow.tokens)


class Graph:
    """A CUDA graph's stand-in: what capture() recorded, replayed on the same buffers."""

    def __init__(self, policy, s, width, eos, temperature):
        ig.decode_step(policy, s, width, eos, temperature)             # the warm-up leaves its traces
        assert width % 16 == 0 or width == policy.config.block_size
        self.replay = lambda: ig.decode_step(policy, s, width, eos, temperature)


def assert_same_rollout(a, b):
    assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in vars(a) if k != "logprobs")
    close(a.logprobs, b.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_section_c4_graph_and_eager_agree_token_for_token(monkeypatch, device):
    capture, made = Graph if device == "cpu" else ig.capture, []
    monkeypatch.setattr(ig, "capture", lambda *a: made.append(a) or capture(*a))
    model, luck = tiny(block=36).to(device), lambda seed: torch.Generator(device).manual_seed(seed)
    for step, prompts in enumerate([PROMPTS, PROMPTS[::-1], [[5], [4, 3], [2], [1, 8]], PROMPTS * 2]):
        for n in (9, 10):                                              # new prompts and weights, old buffers
            assert_same_rollout(*(ig.rollout(model, prompts, n, EOS, 1.0, luck(step), graphs=g)
                                  for g in (True, False)))
        with torch.no_grad():
            move(model, seed=step)
    assert len(made) == 4                                              # B of 4 or 8, n of 9 or 10; T is 16
    assert_same_rollout(*(ig.rollout(model, [[1] * 30], 6, EOS, 1.0, luck(0), graphs=g) for g in (1, 0)))
    assert len(model.kept) == len(made) == 4                           # a fifth shape goes without a graph
    assert set(model.state_dict()) == set(tiny().state_dict())


def test_section_c4_graph_of_a_block_that_is_no_multiple_of_16(monkeypatch):
    monkeypatch.setattr(ig, "capture", Graph)
    model = tiny(block=36)
    assert_same_rollout(*(ig.rollout(model, [[1] * 30, [2]], 6, EOS, 1.0, seeded(0), graphs=g)
                          for g in (True, False)))
    assert [key[1] for key in model.kept] == [36]


@pytest.mark.parametrize("n, width", [(11, 16), (12, 32), (27, 32), (28, 40), (35, 40)])
def test_section_c4_graph_has_the_fewest_columns_of_16_or_the_block(monkeypatch, n, width):
    made = []
    monkeypatch.setattr(ig, "capture", lambda policy, s, *how: made.append(how) or Graph(policy, s, *how))
    r = ig.rollout(tiny(block=40), PROMPTS, n, EOS, 1.0, seeded(0), graphs=True)
    assert made == [(width, EOS, 1.0)] and r.tokens.size(1) == 5 + n   # the longest prompt has five


def test_section_c4_results_of_a_graph_outlive_its_next_replay(monkeypatch):
    monkeypatch.setattr(ig, "capture", Graph)
    model = tiny()
    a = ig.rollout(model, PROMPTS, 8, EOS, 1.0, seeded(0), graphs=True)
    before = deepcopy(a)
    ig.rollout(model, PROMPTS[::-1], 8, EOS, 1.0, seeded(1), graphs=True)
    assert all(torch.equal(getattr(a, k), getattr(before, k)) for k in vars(a))


def test_section_c4_capture_warms_up_and_then_records_one_step(monkeypatch):
    steps, nothing = [], contextlib.nullcontext()
    stream = SimpleNamespace(wait_stream=lambda _: None)
    fake = dict(CUDAGraph=lambda: "graph", Stream=lambda: stream, current_stream=lambda: stream,
                stream=lambda s: nothing, graph=lambda g, stream: steps.append("record") or nothing)
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(ig, "decode_step", lambda *a: steps.append(a))
    assert ig.capture("policy", "s", 32, EOS, 1.0) == "graph"
    assert steps == [("policy", "s", 32, EOS, 1.0), "record", ("policy", "s", 32, EOS, 1.0)]


def test_section_c4_copies_of_a_policy_share_neither_weights_nor_graphs(monkeypatch):
    monkeypatch.setattr(ig, "capture", Graph)
    model = tiny()
    ig.rollout(model, PROMPTS, 8, EOS, 1.0, seeded(0), graphs=True)
    other = ig.copy_of(model)
    assert not other.kept and all(map(torch.equal, model.parameters(), other.parameters()))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}


def test_bfloat16_rollout_samples_from_a_copy_that_follows_the_weights():
    model = tiny()
    with torch.no_grad():                                              # tiny's own are too peaked for 8 bits
        for p in model.parameters():
            p.mul_(0.5)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            r = ig.rollout(model, PROMPTS * 8, 10, EOS, 1.0, seeded(step))
            scored = ig.token_logprobs(model, r.tokens)
        assert r.logprobs.dtype == scored.dtype == torch.float32
        exact = ig.token_logprobs(model, r.tokens)
        for x in (r.logprobs, scored):                                 # rounding apart, the same distribution
            assert (x - exact)[r.mask].abs().mean() < 0.03
        low = model.kept["bfloat16"]
        assert all(torch.equal(a, p.bfloat16()) for a, p in zip(low.parameters(), model.parameters()))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        with torch.no_grad():
            move(model, seed=step)
    assert set(model.state_dict()) == set(tiny().state_dict())         # the copy is in no checkpoint


def test_bfloat16_training_sees_the_weights_of_each_step():
    model, tokens = tiny().requires_grad_(True), torch.randint(V, (4, 12), generator=seeded(0))
    with ig.precision(torch.device("cpu"), "bfloat16"):
        for step in range(3):
            ig.accumulate(lambda i: ig.lm_loss(model, tokens[i]), torch.ones(4))
            twin = ig.copy_of(model)                                   # a new model has nothing cached
            assert torch.equal(ig.token_logprobs(model, tokens), ig.token_logprobs(twin, tokens))
            with torch.no_grad():
                move(model, seed=step)
    assert not ig.precision(torch.device("cpu"), "float32")._enabled


def test_scores_and_values_are_float32_under_autocast():
    model, tokens = tiny("scalar"), torch.randint(V, (3, 9), generator=seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens)
    assert low.dtype == torch.float32 and not torch.equal(low, low.bfloat16().float())
    close(low, model(tokens), atol=0.3, rtol=0.1)


# ------------------------------------------------------------------------------------------------------------
# Formulas: log-probs, masked statistics


def test_token_logprobs_column_t_speaks_of_token_t_plus_1():
    model, tokens = tiny(), torch.randint(V, (3, 7), generator=seeded(0))
    with torch.no_grad():
        got = ig.token_logprobs(model, tokens)
        for b in range(3):
            for t in range(6):
                p = F.softmax(model(tokens[b:b + 1, :t + 1])[0, -1], -1)[tokens[b, t + 1]]
                assert abs(got[b, t].item() - math.log(p)) < 1e-5
    assert got.shape == (3, 6)


def test_token_logprobs_are_float32_whatever_the_model():
    logits, tokens = normal(2, 5, V).bfloat16(), torch.randint(V, (2, 5), generator=seeded(1))
    got = ig.token_logprobs(lambda _: logits, tokens)
    want = F.log_softmax(logits[:, :-1].double(), -1).gather(-1, tokens[:, 1:, None])[..., 0]
    assert got.dtype == torch.float32
    close(got.double(), want, atol=1e-6, rtol=0)


def test_token_logprobs_of_the_mask_alone_are_those_of_all():
    model, tokens = tiny(), torch.randint(V, MASK.shape, generator=seeded(0))
    tokens = F.pad(tokens, (0, 1))
    weights, upon = list(model.parameters()), normal(*MASK.shape)
    all_, some = ig.token_logprobs(model, tokens, 0.7), ig.token_logprobs(model, tokens, 0.7, MASK)
    close(some, ig.clear(MASK, all_)[0])
    assert some[~MASK].abs().sum() == 0
    for a, b in zip(torch.autograd.grad((ig.clear(MASK, all_)[0] * upon).sum(), weights),
                    torch.autograd.grad((some * upon).sum(), weights)):
        close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_kept_positions_are_those_of_all_and_no_others_meet_the_last_mlp(head):
    model, tokens = tiny(head), torch.randint(V, (4, 7), generator=seeded(0))
    rows = []
    model.h[1].mlp.c_fc.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[:-1].numel()))
    results = []
    for y in (model(tokens)[F.pad(MASK, (0, 1))], model(tokens, F.pad(MASK, (0, 1)))):
        results.append([y, *torch.autograd.grad((y * normal(*y.shape)).sum(), list(model.h.parameters()))])
    close(*results)
    assert rows == [tokens.numel(), int(MASK.sum())]


def test_token_values_are_those_of_the_mask():
    model, tokens = tiny("scalar"), torch.randint(V, (4, 7), generator=seeded(0))
    close(ig.token_values(model, tokens, MASK), model(tokens[:, :-1]).masked_fill(~MASK, 0))


def test_heads_are_not_spent_on_prompts(monkeypatch):
    model, seen = tiny(), []
    tokens, mask, _ = ig.stack(PROMPTS, [[4, EOS], [1], [2, 3, EOS], [EOS]], "cpu")
    project = model.project
    monkeypatch.setattr(model, "project", lambda x: seen.append(x.shape[:-1]) or project(x))
    ig.lm_loss(model, tokens, mask)
    assert seen == [(7,)]


def test_masked_mean_is_the_mean_over_the_mask():
    x = normal(*MASK.shape)
    inside = [x[b, t].item() for b, t in MASK.nonzero().tolist()]
    assert ig.masked_mean(x, MASK).item() == pytest.approx(sum(inside) / len(inside))
    assert ig.masked_mean(x, MASK & False) == 0


def test_whiten_is_its_definition():
    x = 3 + 2 * normal(*MASK.shape)
    inside = [x[b, t].item() for b, t in MASK.nonzero().tolist()]
    mean = sum(inside) / len(inside)
    std = math.sqrt(sum((v - mean) ** 2 for v in inside) / len(inside) + 1e-8)      # population variance
    got = ig.whiten(x, MASK)
    close(got, torch.where(MASK, (x - mean) / std, 0.), atol=1e-5, rtol=0)


def test_whiten_is_safe_for_one_element_and_for_none():
    one = torch.zeros_like(MASK)
    one[2, 3] = True
    assert ig.whiten(normal(*MASK.shape), one).abs().max() < 1e-3
    assert ig.whiten(normal(*MASK.shape), MASK & False).abs().max() == 0


def test_section_21_lm_loss_counts_all_tokens_or_the_response_alone():
    model = tiny()
    tokens, mask, _ = ig.stack([[5, 6, 7], [4]], [[0, 9, EOS], [1, EOS]], "cpu")
    logprobs = ig.token_logprobs(model, tokens)
    close(ig.lm_loss(model, tokens), -logprobs.mean())
    want = -(logprobs[0, 2] + logprobs[0, 3] + logprobs[0, 4] + logprobs[1, 0] + logprobs[1, 1]) / 5
    close(ig.lm_loss(model, tokens, mask), want)


# Whatever stands outside the mask: same value, same gradient. A case is the masked slots of each input and a
# scalar of the inputs; fixed random weights make one of what returns a tensor.
COLUMNS = normal(2, *MASK.shape, seed=99)
RANKS = torch.tensor([[1, 2, 0, 2], [0, 0, 0, 0], [3, 1, 2, 4], [0, 1, 0, 0]])
EMPTY_SCORE = ~MASK.any(1)  # a row without response: no score either
IGNORING = {
    "masked_mean": ([~MASK], lambda x: ig.masked_mean(x, MASK)),
    "whiten": ([~MASK], lambda x: (ig.whiten(x, MASK) * COLUMNS[0]).sum()),
    "reward_loss": ([RANKS == 0], lambda scores: ig.reward_loss(scores, RANKS)),
    "token_rewards": ([EMPTY_SCORE, ~MASK, ~MASK],
                      lambda s, new, ref: (ig.token_rewards(s, new, ref, MASK, 0.3) * COLUMNS[0]).sum()),
    "gae": ([~MASK, ~MASK], lambda r, v: (torch.stack(ig.gae(r, v, MASK, 0.9, 0.95)) * COLUMNS).sum()),
    "reinforce": ([~MASK], lambda r: (torch.stack(ig.reinforce(r, None, MASK)) * COLUMNS).sum()),
    "policy_loss": ([~MASK] * 3, lambda new, old, a: ig.policy_loss(new, old, a, MASK)),
    "value_loss": ([~MASK] * 3, lambda v, old, ret: ig.value_loss(v, old, ret, MASK)),
}


@pytest.mark.parametrize("junk", [100., -1e9, math.nan, math.inf])
@pytest.mark.parametrize("name", IGNORING)
def test_masked_slots_change_neither_value_nor_gradient(name, junk):
    masked, formula = IGNORING[name]
    results = []
    for filler in (0., junk):
        inputs = [normal(*m.shape, seed=i).masked_fill(m, filler) for i, m in enumerate(masked)]
        inputs = [x.requires_grad_() for x in inputs]
        value = formula(*inputs)
        results.append([value.detach(), *torch.autograd.grad(value, inputs)])
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)
    assert all(g[m].abs().sum() == 0 for m, g in zip(masked, results[1][1:]))


# ------------------------------------------------------------------------------------------------------------
# Eq. 1: the reward model's loss


def slow_reward_loss(scores, ranks):
    """Eq. 1, pair by pair: the mean over a prompt's pairs, then the mean over the prompts that have one."""
    losses = []
    for s, r in zip(scores, ranks):
        pairs = [(s[w], s[l]) for w in range(len(r)) for l in range(len(r)) if 0 < r[w] < r[l]]
        if pairs:
            losses.append(sum(math.log1p(math.exp(l - w)) for w, l in pairs) / len(pairs))
    return sum(losses) / max(1, len(losses))


@pytest.mark.parametrize("K", [2, 3, 4, 9])
def test_eq1_reward_loss_is_the_mean_over_pairs(K):
    scores = 2 * normal(12, K, seed=K)
    full = torch.stack([torch.randperm(K, generator=seeded(b)) + 1 for b in range(12)])  # C(K,2) pairs each
    ranks = torch.randint(0, K + 1, (12, K), generator=seeded(K))      # with ties and empty slots
    ranks[0], ranks[1], ranks[2], ranks[3] = 0, 1, 0, full[3]          # nothing, one tie, ...
    ranks[2, K - 1] = 1                                                # ... a single response
    for r in (full, ranks):
        want = slow_reward_loss(scores.tolist(), r.tolist())
        assert ig.reward_loss(scores, r).item() == pytest.approx(want, rel=1e-5)


def test_eq1_k2_is_stiennons_pairwise_loss():
    s = normal(8, 2)
    close(ig.reward_loss(s, torch.tensor([[1, 2]] * 8)), -F.logsigmoid(s[:, 0] - s[:, 1]).mean())


def test_eq1_prompt_without_a_pair_is_left_out():
    scores, ranks = normal(3, 4), torch.tensor([[1, 2, 3, 3], [2, 2, 2, 0], [0, 0, 0, 0]])
    close(ig.reward_loss(scores, ranks), ig.reward_loss(scores[:1], ranks[:1]))
    scores.requires_grad_()
    nothing = ig.reward_loss(scores, ranks.clamp(max=1))
    nothing.backward()
    assert nothing == 0 and scores.grad.abs().max() == 0


def test_eq1_every_prompt_weighs_the_same_whatever_its_k():
    ranks = torch.tensor([[1, 2, 0, 0, 0], [1, 2, 3, 4, 5]])
    a, b = (ig.reward_loss(normal(2, 5)[i:i + 1], ranks[i:i + 1]) for i in (0, 1))
    close(ig.reward_loss(normal(2, 5), ranks), (a + b) / 2)


def test_eq1_is_log_2_at_equal_scores_and_blind_to_a_constant():
    ranks = torch.tensor([[1, 2, 3, 4], [1, 1, 2, 0]])
    assert ig.reward_loss(torch.full((2, 4), 3.), ranks).item() == pytest.approx(math.log(2))
    close(ig.reward_loss(normal(2, 4), ranks), ig.reward_loss(normal(2, 4) + 7, ranks), atol=1e-5, rtol=0)


@pytest.mark.parametrize("margin", [100., -100.])
def test_eq1_is_finite_at_large_margins(margin):
    scores = torch.tensor([[margin, 0.]], requires_grad=True)
    loss = ig.reward_loss(scores, torch.tensor([[1, 2]]))
    loss.backward()
    assert loss.item() == pytest.approx(max(0., -margin), abs=1e-6)
    assert scores.grad[0].tolist() == pytest.approx([0, 0] if margin > 0 else [-1, 1])


def test_eq1_gradient_raises_the_better_and_lowers_the_worse():
    scores = torch.zeros(1, 3, requires_grad=True)
    ig.reward_loss(scores, torch.tensor([[2, 1, 3]])).backward()
    assert scores.grad[0].tolist() == pytest.approx([0, -1 / 3, 1 / 3])  # sigma(0) = 1/2, two of three pairs


def test_section_35_reward_is_read_at_the_end_of_text():
    rm = tiny("scalar")
    tokens, _, last = ig.stack(PROMPTS, [[4, 0, EOS], [EOS], [1, 2, 3, EOS], [6, EOS]], "cpu")
    with torch.no_grad():
        got = ig.reward_scores(rm, tokens, last)
        for b, (p, r) in enumerate(zip(PROMPTS, [[4, 0, EOS], [EOS], [1, 2, 3, EOS], [6, EOS]])):
            close(got[b], rm(torch.tensor([p + r]))[0, -1], atol=1e-5, rtol=0)
    assert tokens[torch.arange(4), last].eq(EOS).all() and got.shape == (4,)


# ------------------------------------------------------------------------------------------------------------
# Eq. 2: KL, rewards per token


def test_eq2_kl_estimators_have_the_exact_kl_as_their_mean():
    """Two steps of three tokens: all nine sequences, each weighted by pi, which samples come from."""
    for gap in (0.1, 1., 3.):
        pi = [F.log_softmax(gap * normal(*s, seed=i).double(), -1) for i, s in enumerate([(3,), (3, 3)])]
        ref = [F.log_softmax(gap * normal(*s, seed=i + 5).double(), -1) for i, s in enumerate([(3,), (3, 3)])]
        exact = k1 = k3 = 0
        for a in range(3):
            for b in range(3):
                new, old = torch.stack([pi[0][a], pi[1][a, b]]), torch.stack([ref[0][a], ref[1][a, b]])
                weight = new.sum().exp()
                exact += weight * (new.sum() - old.sum())
                k1 += weight * ig.kl_k1(new, old).sum()
                k3 += weight * ig.kl_k3(new, old).sum()
                assert (ig.kl_k3(new, old) >= 0).all()
        close(k1, exact)
        close(k3, exact)


def test_eq2_kl_estimators_are_not_interchangeable_as_losses():
    logits, ref = normal(5).double().requires_grad_(), F.log_softmax(normal(5, seed=1).double(), -1)
    gradient = lambda loss: torch.autograd.grad(loss, logits)[0]
    logp = lambda: F.log_softmax(logits, -1)
    p = logp().exp().detach()  # samples are fixed: no gradient through p
    forward, backward = (logp().exp() * (logp() - ref)).sum(), (ref.exp() * (ref - logp())).sum()
    close(gradient((p * ig.kl_k1(logp(), ref)).sum()), torch.zeros(5).double(), atol=1e-9, rtol=0)
    close(gradient((p * ig.kl_k3(logp(), ref)).sum()), gradient(backward))  # the other one: KL(ref || pi)
    charged = ig.kl_k1(logp(), ref).detach()  # as a reward, k1 does descend KL(pi || ref)
    close(gradient((p * logp() * charged).sum()), gradient(forward))


def test_eq2_k1_is_the_log_ratio_and_k3_vanishes_with_it():
    new, ref = normal(50), normal(50, seed=1)
    close(ig.kl_k1(new, ref), new - ref)
    close(ig.kl_k3(new, ref), torch.exp(ref - new) - 1 - (ref - new))
    assert ig.kl_k1(new, ref).min() < 0 <= ig.kl_k3(new, ref).min() and ig.kl_k3(new, new).abs().max() == 0
    tiny_gap = ig.kl_k3(torch.tensor(-1.), torch.tensor(-1.001)).item()
    assert tiny_gap == pytest.approx(5e-7, rel=0.1)                    # digits are not lost in exp(x) - 1


def slow_rewards(score, logprobs, ref_logprobs, mask, beta):
    rewards = [-beta * (p - q) if m else 0. for p, q, m in zip(logprobs, ref_logprobs, mask)]
    if any(mask):
        rewards[max(t for t in range(len(mask)) if mask[t])] += score
    return rewards


def test_eq2_token_rewards_are_their_definition():
    scores, new, ref = normal(4), normal(*MASK.shape, seed=1), normal(*MASK.shape, seed=2)
    got = ig.token_rewards(scores, new, ref, MASK, beta=0.3)
    want = [slow_rewards(*row, 0.3) for row in zip(*(x.tolist() for x in (scores, new, ref, MASK)))]
    close(got, torch.tensor(want))


def test_eq2_row_of_rewards_sums_to_score_minus_beta_log_ratio():
    scores, new, ref = normal(4), normal(*MASK.shape, seed=1), normal(*MASK.shape, seed=2)
    got = ig.token_rewards(scores, new, ref, MASK, beta=0.3).sum(1)
    close(got[:3], (scores - 0.3 * ((new - ref) * MASK).sum(1))[:3])


def test_eq2_score_stands_on_the_end_of_text_action():
    tokens, mask, last = ig.stack(PROMPTS, [[4, 0, EOS], [EOS], [1, 2, 3, EOS], [6, EOS]], "cpu")
    got = ig.token_rewards(torch.full((4,), 5.), *torch.zeros(2, *mask.shape), mask, beta=0.3)
    assert got.nonzero().tolist() == [[b, int(last[b]) - 1] for b in range(4)]  # column t predicts token t+1
    assert all(tokens[b, t + 1] == EOS for b, t in got.nonzero().tolist())


def test_eq2_unlikely_tokens_of_the_reference_are_punished():
    new, ref, mask = torch.tensor([[-1.]]), torch.tensor([[-3.]]), torch.tensor([[True]])
    assert ig.token_rewards(torch.zeros(1), new, ref, mask, beta=0.5).item() == -1.0        # beta * 2 nats


# ------------------------------------------------------------------------------------------------------------
# C.4: advantages, PPO's losses, the pretraining mix


def slow_gae(rewards, values, discount, lam):
    """One response, by definition: A_t = sum over l of (discount lambda)^l delta_{t+l}."""
    n, v = len(rewards), values + [0.]  # after the end nothing is worth anything
    delta = [rewards[t] + discount * v[t + 1] - v[t] for t in range(n)]
    return [sum((discount * lam) ** l * delta[t + l] for l in range(n - t)) for t in range(n)]


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_section_c4_gae_is_its_definition(lam, discount):
    rewards, values = normal(*MASK.shape), normal(*MASK.shape, seed=1)
    advantages, returns = ig.gae(rewards, values, MASK, discount, lam)
    for b, inside in enumerate(MASK):
        want = slow_gae(rewards[b][inside].tolist(), values[b][inside].tolist(), discount, lam)
        close(advantages[b][inside], torch.tensor(want))
        close(returns[b][inside], torch.tensor(want) + values[b][inside])
    assert advantages[~MASK].abs().max() == 0 and returns[~MASK].abs().max() == 0


def test_section_c4_gae_lambda_1_returns_the_rewards_to_come():
    rewards, values = normal(*MASK.shape) * MASK, normal(*MASK.shape, seed=1)
    _, returns = ig.gae(rewards, values, MASK, 1.0, 1.0)
    for b, t in MASK.nonzero().tolist():
        close(returns[b, t], rewards[b, t:].sum())


def test_section_c4_gae_knows_no_reward_after_the_end():
    values = torch.full(MASK.shape, 5.)                                # a value net that always hopes for 5
    advantages, _ = ig.gae(torch.zeros(MASK.shape), values, MASK, 1.0, 0.0)
    last = [[b, int(row.nonzero().max())] for b, row in enumerate(MASK) if row.any()]
    assert advantages.nonzero().tolist() == last and advantages.sum() == -5 * len(last)


def test_section_c4_gae_defaults_are_no_discount_and_lambda_095():
    rewards, values = normal(*MASK.shape), normal(*MASK.shape, seed=1)
    close(ig.gae(rewards, values, MASK), ig.gae(rewards, values, MASK, 1.0, 0.95))


def slow_policy_loss(new, old, advantages, mask, clip):
    terms = []
    for p, q, a in zip(*(x[mask].tolist() for x in (new, old, advantages))):
        ratio = math.exp(p - q)
        terms.append(min(ratio * a, max(1 - clip, min(1 + clip, ratio)) * a))
    return -sum(terms) / len(terms)


def test_section_c4_policy_loss_is_its_definition():
    new, old, advantages = (0.4 * normal(*MASK.shape, seed=i) for i in range(3))
    for clip in (0.1, 0.2):
        want = slow_policy_loss(new, old, advantages, MASK, clip)
        assert ig.policy_loss(new, old, advantages, MASK, clip).item() == pytest.approx(want, rel=1e-5)
    close(ig.policy_loss(new, old, advantages, MASK), ig.policy_loss(new, old, advantages, MASK, 0.2))


@pytest.mark.parametrize("ratio, advantage, moves", [
    (1.5, 2., False), (1.5, -2., True), (0.5, 2., True), (0.5, -2., False),
    (1.1, 2., True), (0.9, -2., True), (1., 2., True)])
def test_section_c4_clip_stops_the_gradient_only_of_what_went_too_far(ratio, advantage, moves):
    new = torch.tensor([[math.log(ratio), 0.]], requires_grad=True)
    advantages, mask = torch.tensor([[advantage, 9.]]), torch.tensor([[True, False]])
    ig.policy_loss(new, torch.zeros(1, 2), advantages, mask).backward()
    assert new.grad[0].tolist() == pytest.approx([-ratio * advantage if moves else 0., 0.])


def slow_value_loss(values, old, returns, mask, clip):
    terms = []
    for v, o, r in zip(*(x[mask].tolist() for x in (values, old, returns))):
        clipped = max(o - clip, min(o + clip, v))
        terms.append(0.5 * max((v - r) ** 2, (clipped - r) ** 2))
    return sum(terms) / len(terms)


def test_section_c4_value_loss_is_its_definition():
    values, old, returns = (normal(*MASK.shape, seed=i) for i in range(3))
    for clip in (0.2, 0.5):
        want = slow_value_loss(values, old, returns, MASK, clip)
        assert ig.value_loss(values, old, returns, MASK, clip).item() == pytest.approx(want, rel=1e-5)
    close(ig.value_loss(values, old, returns, MASK), ig.value_loss(values, old, returns, MASK, 0.2))


@pytest.mark.parametrize("value, goal, gradient", [
    (0.5, 1., 0.), (0.5, -1., 1.5), (-0.5, -1., 0.), (0.1, 1., -0.9)])
def test_section_c4_value_clip_stops_only_moves_towards_the_return(value, goal, gradient):
    values = torch.tensor([[value]], requires_grad=True)               # the old value is 0, the clip 0.2
    ig.value_loss(values, torch.zeros(1, 1), torch.tensor([[goal]]), torch.tensor([[True]])).backward()
    assert values.grad.item() == pytest.approx(gradient)


def episode(prompts, responses, seed=0):
    """Loss of one PPO update as a function of free logits -> their gradient (B,T,V), tokens."""
    tokens, mask, _ = ig.stack(prompts, responses, "cpu")
    logits = normal(len(tokens), tokens.size(1), V, seed=seed).requires_grad_()
    logprobs = ig.token_logprobs(lambda _: logits, tokens)
    ig.policy_loss(logprobs, logprobs.detach(), torch.ones(mask.shape), mask).backward()
    return logits.grad, tokens


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_accumulated_gradient_is_that_of_the_whole_minibatch(size):
    tokens, mask, _ = ig.stack(PROMPTS, [[4, 0, EOS], [EOS], [1, 2, 3, EOS], [6, EOS]], "cpu")
    whole, parts = tiny(), tiny()
    loss = ig.lm_loss(whole, tokens, mask)
    loss.backward()
    got = ig.accumulate(lambda i: ig.lm_loss(parts, tokens[i], mask[i]), mask.sum(1), size)
    close(got, loss.detach())
    for a, b in zip(whole.parameters(), parts.parameters()):
        close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


def test_fused_optimizer_moves_the_weights_as_the_plain_one_does():
    fused, plain = tiny(), tiny()                                      # their weights are not contiguous
    optimizers = ig.adamw(fused, 0.01), torch.optim.AdamW(
        plain.parameters(), 0.01, (0.9, 0.95), weight_decay=0.0, foreach=False, fused=False)
    for model, optimizer in zip((fused, plain), optimizers):
        for step in range(3):
            ig.accumulate(lambda i: ig.lm_loss(model, torch.arange(9)[None] + step % 2), torch.ones(1))
            ig.clip_and_step(model, optimizer, 0.01)
    for (name, a), b in zip(fused.named_parameters(), plain.parameters()):
        if not name.endswith("c_attn.bias"):                           # a key's has no gradient but rounding
            close(a, b, atol=1e-6, rtol=1e-5)
    assert any(not p.is_contiguous() for p in fused.parameters())


def test_section_c4_one_token_response_trains_one_row_of_logits():
    gradient, _ = episode([[5, 6, 7], [5, 6]], [[EOS], [1, 2, 3, EOS]])
    assert gradient[0].abs().sum(-1).nonzero().tolist() == [[2]]       # the last prompt position alone
    assert gradient[1].abs().sum(-1).nonzero().tolist() == [[1], [2], [3], [4]]


def test_section_c4_decision_to_stop_is_trained():
    model = tiny()
    r = ig.rollout(model, PROMPTS * 8, 12, EOS, 1.0, seeded(0))
    b = next(b for b in range(len(PROMPTS) * 8) if r.ended[b] and len(r.responses()[b]) > 1)
    logits = model(r.tokens).detach().requires_grad_()
    logprobs = ig.token_logprobs(lambda _: logits, r.tokens)
    ig.policy_loss(logprobs, r.logprobs, torch.ones(r.mask.shape), r.mask).backward()
    end = int(r.mask[b].nonzero().max())
    assert r.tokens[b, end + 1] == EOS and logits.grad[b, end, EOS] < 0          # a good advantage raises it
    assert logits.grad[b, end + 1:].abs().sum() == 0                             # nothing after it is trained


def test_eq2_ptx_gradient_is_the_sum_of_both():
    model, old = tiny(), tiny(seed=1)
    tokens, mask, _ = ig.stack(PROMPTS, [[4, 0, EOS], [EOS], [1, 2, 3, EOS], [6, EOS]], "cpu")
    web, advantages = torch.randint(V, (4, 12), generator=seeded(0)), normal(*mask.shape)
    before, weights = ig.token_logprobs(old, tokens).detach(), list(model.parameters())
    ppo = lambda: ig.policy_loss(ig.token_logprobs(model, tokens), before, advantages, mask)
    gradient = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
    one, two = gradient(ppo()), gradient(ig.lm_loss(model, web))
    for gamma in (0., 1., 27.8):
        close(gradient(ppo() + gamma * ig.lm_loss(model, web)), one + gamma * two, atol=1e-4, rtol=1e-4)
    assert one.norm() > 0.01 and two.norm() > 0.01


def test_section_c4_ema_after_n_steps_is_1_minus_decay_to_the_n_of_the_way():
    average, model = tiny(), tiny(seed=1)
    start, goal = [p.clone() for p in average.parameters()], [p.clone() for p in model.parameters()]
    for _ in range(5):
        ig.ema_update(average, model, 0.992)
    for a, s, g in zip(average.parameters(), start, goal):
        close(a, 0.992 ** 5 * s + (1 - 0.992 ** 5) * g, atol=1e-6, rtol=1e-5)
    assert all(map(torch.equal, model.parameters(), goal))             # the model itself stays


def test_section_c1_cosine_ends_at_a_tenth():
    rates = [ig.cosine(s, 101) for s in range(101)]
    assert rates[0] == 1 and rates[50] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True) and ig.cosine(500, 101) == pytest.approx(0.1)
    warm = [ig.cosine(s, 110, warmup=10) for s in range(110)]
    assert warm[:11] == pytest.approx([i / 10 for i in range(1, 11)] + [1])
    assert warm[-1] == pytest.approx(0.1) and ig.cosine(0, 1) > 0


def test_section_c4_learning_rate_warms_up_from_a_tenth_and_stays():
    assert [ig.warmup_factor(i, 10) for i in (0, 5, 10, 11, 500)] == pytest.approx([0.1, 0.55, 1, 1, 1])
    assert ig.warmup_factor(0, 0) == 1


# ------------------------------------------------------------------------------------------------------------
# Neighbours: REINFORCE, DPO, KTO


def test_reinforce_gives_each_token_its_whole_episode_less_the_mean():
    rewards, rows = normal(*MASK.shape), [0, 1, 2]
    advantages, returns = ig.reinforce(rewards[rows], None, MASK[rows])
    totals = [sum(r for r, m in zip(rewards[i].tolist(), MASK[i]) if m) for i in rows]
    for i in rows:
        for t in range(MASK.size(1)):
            assert returns[i, t].item() == pytest.approx(totals[i] if MASK[i, t] else 0)
            want = totals[i] - sum(totals) / 3 if MASK[i, t] else 0
            assert advantages[i, t].item() == pytest.approx(want, abs=1e-6)


def test_reinforce_gradient_is_that_of_the_lecture_notes():
    """(1/B) sum_i (R_i - b) grad log p(s_i), but for the constant that makes a token mean of a sum."""
    logprobs, rewards, mask = normal(3, 6).requires_grad_(), normal(3, 6, seed=1), MASK[:3]
    advantages, _ = ig.reinforce(rewards, None, mask)
    got, = torch.autograd.grad(-ig.policy_loss(logprobs, logprobs.detach(), advantages, mask), logprobs)
    R = (rewards * mask).sum(1)
    likelihood = ((R - R.mean()) * (logprobs * mask).sum(1)).mean()
    want, = torch.autograd.grad(likelihood, logprobs)
    close(got, want * 3 / mask.sum())


def test_reinforce_stands_in_the_loop_of_ppo(enc, sets, small_corpus):
    cfg, log, seen, cpu = ig.Config(**SMALL), Quiet(), [], torch.device("cpu")
    policy, reward_model = small_models(enc)
    ig.ppo(cfg, enc, policy, reward_model, small_prompts(enc, sets), small_corpus, 1.0, cpu, log,
           lambda *a: seen.append(a) or ig.reinforce(*a))
    (e, numbers), (rewards, _, mask, discount, _) = log.iterations[0], seen[0]
    assert len(seen) == cfg.iterations and discount == 1.0 and torch.equal(rewards, e["rewards"])
    close(e["raw_advantages"], ig.reinforce(rewards, None, mask)[0])
    close(e["advantages"], ig.whiten(e["raw_advantages"], mask))
    assert numbers[0]["|ptx|"] > 0                                     # with the mix of PPO-ptx


def test_dpo_is_log_2_at_the_reference_and_its_gradient_by_hand():
    w, l, ref_w, ref_l = (normal(6, seed=i).requires_grad_() for i in range(4))
    assert ig.dpo_loss(w, l, w, l, 0.1).item() == pytest.approx(math.log(2))
    loss = ig.dpo_loss(w, l, ref_w, ref_l, 0.1)
    reward_w, reward_l = 0.1 * (w - ref_w), 0.1 * (l - ref_l)
    close(loss, -torch.log(torch.sigmoid(reward_w - reward_l)).mean())
    want = -0.1 * torch.sigmoid(reward_l - reward_w) / 6  # - beta sigma(r_l - r_w), mean over six
    got_w, got_l = torch.autograd.grad(loss, [w, l])
    close(got_w, want)
    close(got_l, -want)


def test_dpo_is_eq1_of_the_implicit_reward():
    w, l, ref_w, ref_l = (normal(6, seed=i) for i in range(4))
    implicit = 0.3 * torch.stack([w - ref_w, l - ref_l], 1)                                      # (6,2)
    close(ig.dpo_loss(w, l, ref_w, ref_l, 0.3), ig.reward_loss(implicit, torch.tensor([[1, 2]] * 6)))
    assert ig.dpo_loss(*torch.tensor([[-900.], [0.], [0.], [0.]]), 1.0).item() == pytest.approx(900)


def test_kto_is_one_half_at_the_reference():
    logp, desirable = normal(6), torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    assert ig.kto_loss(logp, logp, desirable, torch.tensor(0.), 0.1).item() == pytest.approx(0.5)


def test_kto_is_its_definition():
    logp, ref, good, kl0, beta = [0.3, -1., 2.], [0., 0.5, 1.], [True, False, True], 0.4, 0.7
    sigma, terms = lambda z: 1 / (1 + math.exp(-z)), []
    for ratio, g in zip([p - q for p, q in zip(logp, ref)], good):
        z = beta * (ratio - kl0)
        terms.append(1.5 * (1 - sigma(z)) if g else 0.8 * (1 - sigma(-z)))
    got = ig.kto_loss(*map(torch.tensor, (logp, ref, good, kl0)), beta, 1.5, 0.8)
    assert got.item() == pytest.approx(sum(terms) / 3, rel=1e-5)


def test_kto_kl0_is_the_mean_log_ratio_never_negative_and_without_gradient():
    logp, ref = normal(5).requires_grad_(), normal(5, seed=1)
    up, down = ig.kto_kl0(logp + 9, ref), ig.kto_kl0(logp - 9, ref)
    close(up, (logp + 9 - ref).mean().detach())
    assert down == 0 and not up.requires_grad and not down.requires_grad


COMPARED = [{"prompt": p, "responses": [f"a {w}." for w in words], "ranks": ranks,
             "ended": [True] * len(words)} for p, words, ranks in (
                ("What is a cat?", ["cat", "dog", "hat"], [2, 1, 2]),
                ("What is a hen?", ["hen", "cow"], [1, 2]),
                ("What is a map?", ["map", "map", "key", "box"], [1, 1, 3, 2]),
                ("What is a pen?", ["pen", "fox"], [1, 1]))]                       # the last has no pair


def sums(model, enc, prompt, response):
    """Slow twin: log pi(y|x), one response alone."""
    x, y = ig.encode_prompt(enc, prompt), ig.encode_response(enc, response)
    logits = model(torch.tensor([x + y[:-1]]))[0].log_softmax(-1)
    return sum(logits[len(x) - 1 + t, token] for t, token in enumerate(y))


def first_loss(enc, monkeypatch, method, moved):
    """train_on_comparisons' first loss, with the reference moved away from the policy so that it shows."""
    policy, _ = small_models(enc)
    reference, log = move(deepcopy(policy), size=moved), Quiet()
    monkeypatch.setattr(ig, "freeze", lambda m: reference if m is policy else m)   # its reference is ours
    ig.train_on_comparisons(ig.Config(), enc, method, policy, COMPARED, torch.device("cpu"), log)
    return policy, reference, log.lines[0][2]["loss"]


def test_dpo_trains_on_all_pairs_of_a_prompt_and_on_no_others(enc, monkeypatch):
    policy, reference, got = first_loss(enc, monkeypatch, "dpo", 0.02)
    ratio = lambda p, y: sums(policy, enc, p, y) - sums(reference, enc, p, y)
    pairs = [(c["prompt"], c["responses"][i], c["responses"][j]) for c in COMPARED
             for i, j in itertools.permutations(range(len(c["ranks"])), 2)
             if c["ranks"][i] < c["ranks"][j]]
    pairs = sorted(set(pairs))                                         # equal texts are one response
    losses = [-F.logsigmoid(0.2 * (ratio(p, w) - ratio(p, l))).item() for p, w, l in pairs]
    assert len({p for p, _, _ in pairs}) == 3 and got == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_kto_calls_desirable_what_ranks_above_the_mean_and_mismatches_for_kl0(enc, monkeypatch):
    shifted = []
    real = ig.kto_kl0
    monkeypatch.setattr(ig, "kto_kl0", lambda *a: shifted.append(a) or real(*a))
    policy, reference, got = first_loss(enc, monkeypatch, "kto", 0.02)
    rows = [(c["prompt"], text, rank, sum(kept) / len(kept)) for c in COMPARED[:3]
            for ranks in [dict(zip(c["responses"], c["ranks"]))] for kept in [list(ranks.values())]
            for text, rank in ranks.items()]
    ratio = lambda p, y: (sums(policy, enc, p, y) - sums(reference, enc, p, y)).item()
    mismatched = (shifted[0][0] - shifted[0][1]).tolist()
    others = [ratio(p, y) for p, _, _, _ in rows for q, y, _, _ in rows if p != q]
    assert len(mismatched) == 9 and all(min(abs(x - y) for y in others) < 1e-4 for x in mismatched)
    kl0 = max(0, sum(mismatched) / 9)                                  # each has another prompt's response
    sigma = lambda z: 1 / (1 + math.exp(-z))
    terms = [sigma(-0.2 * (ratio(p, y) - kl0)) if rank < mean else sigma(0.2 * (ratio(p, y) - kl0))
             for p, y, rank, mean in rows]
    assert got == pytest.approx(sum(terms) / len(rows), rel=1e-4)


def test_kto_mismatches_the_prompt_of_a_batch_of_one_too(enc, monkeypatch):
    asked, policy = [], small_models(enc)[0]
    real = ig.response_logprobs
    monkeypatch.setattr(ig, "response_logprobs", lambda *a: asked.append(a[2]) or real(*a))
    ig.train_on_comparisons(ig.Config(rm_batch=1), enc, "kto", policy, COMPARED, torch.device("cpu"), Quiet())
    own = {(tuple(x), tuple(y)) for rows in asked[1::2] for x, y, *_ in rows}  # of the losses
    assert len(asked) == 6 and not own & {(tuple(x), tuple(y)) for rows in asked[::2] for x, y in rows}


@pytest.mark.parametrize("method, begin", [("dpo", math.log(2)), ("kto", 0.5)])
def test_neighbours_start_at_the_reference_and_learn_to_prefer(enc, method, begin):
    (policy, _), log, cpu = small_models(enc), Quiet(), torch.device("cpu")
    before = weights(policy).clone()
    cfg = ig.Config(policy_lr=1e-2, beta=0.5, rm_batch=4)
    trained = ig.train_on_comparisons(cfg, enc, method, policy, COMPARED * 20, cpu, log)
    losses = [numbers["loss"] for _, _, numbers in log.lines]
    assert losses[0] == pytest.approx(begin, abs=1e-5) and losses[-1] < 0.8 * begin
    assert torch.equal(weights(policy), before)                                    # reference and start
    for c in COMPARED[:2]:
        best, worst = (c["responses"][c["ranks"].index(r)] for r in (min(c["ranks"]), max(c["ranks"])))
        margin = lambda m: (sums(m, enc, c["prompt"], best) - sums(m, enc, c["prompt"], worst)).item()
        assert margin(trained) > margin(policy) + 0.5


def test_neighbours_micro_batches_are_parts_of_the_same_batch(enc):
    (policy, _), cpu = small_models(enc), torch.device("cpu")
    for method in ("dpo", "kto"):
        whole = ig.Config(rm_batch=3, policy_lr=1e-3)
        one, parts = (ig.train_on_comparisons(cfg, enc, method, policy, COMPARED * 3, cpu, Quiet())
                      for cfg in (whole, replace(whole, micro_batch=9)))               # a prompt at once
        close(weights(one), weights(parts))
        assert (weights(one) - weights(policy)).abs().max() > 1e-3


def test_best_of_n_kl_is_an_upper_bound_and_close_where_no_two_samples_are_alike():
    p = [0.4, 0.3, 0.2, 0.1]                                           # outcome i has score i
    for n in range(1, 6):
        q = [0.] * 4
        for draws in itertools.product(range(4), repeat=n):            # every possible luck
            q[max(draws)] += math.prod(p[i] for i in draws)
        exact = sum(a * math.log(a / b) for a, b in zip(q, p))
        assert exact <= ig.best_of_n_kl(n) + 1e-12 and (n == 1 or exact > 0)
        M = 20000                                                      # as many outcomes, equally likely
        q = [((i + 1) / M) ** n - (i / M) ** n for i in range(M)]
        assert sum(a * math.log(a * M) for a in q if a) == pytest.approx(ig.best_of_n_kl(n), abs=1e-3)
    assert ig.best_of_n_kl(1) == 0


def test_best_of_n_is_the_best_scored_of_the_first_n(enc):
    """Against each response scored alone; with equal texts, unfinished ones and different numbers."""
    torch.manual_seed(0)
    model, cfg = ig.GPT(ig.GPTConfig(enc.n_vocab, 64, 1, 2, 16), "scalar"), ig.Config(unfinished_score=-0.2)
    rng, words = random.Random(0), ["sad.", "happy.", "I am sorry.", "no.", "The cow.", "", "a b c"]
    comparisons = []
    for i in range(70):
        k = rng.randint(2, 6)
        texts, shares = [rng.choice(words) for _ in range(k)], [rng.random() for _ in range(k)]
        comparisons.append({"prompt": f"a {i}", "responses": texts, "ended": [x < 0.7 for x in shares],
                            "ranks": [1] * k, "second_ranks": [1] * k, "gold": shares, "use_case": "u"})
    want = {}
    for c in comparisons:
        best = None
        for n, (text, ended, gold) in enumerate(zip(c["responses"], c["ended"], c["gold"]), 1):
            tokens = ig.encode_prompt(enc, c["prompt"]) + ig.encode_response(enc, text)
            score = model(torch.tensor([tokens]))[0, -1].item() if ended else -0.2
            if best is None or score > best[0] + 1e-6:                 # of equals the first
                best = score, gold
            want.setdefault(n, []).append(best)
    got = ig.judge_reward_model(cfg, enc, model, comparisons, "cpu")["best_of_n"]
    assert list(got) == [1, 2, 3, 4, 5, 6]
    for n, picked in want.items():
        reward, gold = (ig.mean(x) for x in zip(*picked))
        assert got[n]["kl"] == ig.best_of_n_kl(n)
        assert got[n]["reward"] == pytest.approx(reward, abs=1e-5) and got[n]["gold"] == pytest.approx(gold)


# ------------------------------------------------------------------------------------------------------------
# The toy world (3.2, 3.4, Tables 1, 3 and 6)


def test_toy_world_is_written_again_byte_for_byte(tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        tw.main(str(tmp_path))
    made = sorted(os.listdir(tmp_path))
    assert len(made) == 11 and {"pretrain.txt", "vocab.tiktoken", "probes.json", "test.jsonl"} <= set(made)
    for name in made:
        with open(os.path.join(DATA, name), "rb") as f:
            assert (tmp_path / name).read_bytes() == f.read(), name


def test_toy_world_stays_under_8_mb_and_knows_all_bytes():
    files = [f for f in os.scandir(DATA) if f.is_file() and not f.name.endswith((".py", ".md"))]
    assert sum(f.stat().st_size for f in files) < 8e6
    with open(os.path.join(DATA, "vocab.tiktoken"), encoding="utf-8") as f:
        ranks = {b64decode(token): int(rank) for token, rank in map(str.split, f)}
    assert {bytes([i]) for i in range(256)} <= set(ranks)
    assert sorted(ranks.values()) == list(range(len(ranks)))


def test_table_1_shares_of_the_use_cases(sets):
    for name, rows in sets.items():
        count, n = Counter(r["use_case"] for r in rows), len(rows)
        for use_case, percent in tw.USE_CASES.items():  # of 99.9; the rounded rest is generation's
            assert abs(count[use_case] - n * percent / 99.9) <= 5, (name, use_case)
        assert all(tw.USE_CASE_OF[r["task"]["kind"]] == r["use_case"] for r in rows), name


def test_table_6_who_wrote_the_prompts(sets):
    share = lambda name: sum(not r["customer"].startswith("customer") for r in sets[name]) / len(sets[name])
    for name, labelers in [("sft", 0.89), ("rm", 0.2), ("ppo", 0.)]:
        assert share(name + "_train") == share(name + "_valid") == pytest.approx(labelers, abs=0.005)
    assert share("test") == 0
    assert {r["form"] for r in sets["sft_train"]} == {"plain", "few-shot", "user-based"}


def test_section_32_no_customer_stands_in_two_splits(sets):
    writers = {name: {r["customer"] for r in rows} for name, rows in sets.items()}
    labelers = {w for ws in writers.values() for w in ws if not w.startswith("customer")}
    for a in writers:
        for b in writers:
            both = writers[a] & writers[b]
            assert a == b or not both - labelers, (a, b)
            assert a.endswith("train") == b.endswith("train") or not both, (a, b)  # labelers: train or valid


def test_section_32_prompts_per_customer_are_capped(sets):
    for name, rows in sets.items():
        most = Counter(r["customer"] for r in rows if r["customer"].startswith("customer")).most_common(1)
        assert most[0][1] <= tw.CAP, name


def test_section_32_no_phone_number_in_a_training_split(sets):
    found = {name: sum(bool(tw.PHONE.search(r["prompt"])) for r in rows) for name, rows in sets.items()}
    assert sum(found.values()) > 0                                     # validation and test keep them
    assert {name: n for name, n in found.items() if name.endswith("train") and n} == {}


def test_held_out_questions_are_in_no_training_prompt(sets):
    for name in ("sft_train", "rm_train", "ppo_train"):
        text = "\n".join(r["prompt"] for r in sets[name])
        assert "Tell me about" not in text, name
        assert not set(tw.HELD_OUT_MISCONCEPTIONS) & set(tw.words_of(text)), name
    with open(os.path.join(DATA, "pretrain.txt"), encoding="utf-8") as f:
        web = f.read()
    assert "Tell me about" not in web and all(s in web for s in tw.HELD_OUT_MISCONCEPTIONS)  # the web knows
    with open(os.path.join(DATA, "probes.json"), encoding="utf-8") as f:
        probes = json.load(f)
    assert all("Tell me about" in p["prompt"] for p in probes["unseen"])
    asked = {p["task"]["args"][0] for p in probes["truthful"] if p["held_out"]}
    assert asked == set(tw.HELD_OUT_MISCONCEPTIONS)


def tasks(kind, n=40):
    rng = random.Random("tasks " + kind)
    for _ in range(n):
        t = tw.new_task(rng, "sentence" if kind == "tell" else kind)
        yield ({"kind": "tell", "args": t["args"]} if kind == "tell" else t), rng


@pytest.mark.parametrize("kind", [*tw.USE_CASE_OF, "tell"])
def test_table_3_helpful_answer_is_flawless_and_each_flaw_costs(kind):
    mean = Counter()
    for t, rng in tasks(kind):
        grade = lambda flaw: tw.gold(tw.check(t, tw.answer(t, rng, flaw)))
        assert grade(None) == 7, t
        assert tw.gold(tw.check(t, tw.good_answer(t, rng), ended=False)) < 7
        flaws = ["rude", "unfinished"] + ["constraint"] * bool(t.get("constraint"))
        for flaw in flaws + ["false"] * (kind in tw.FALSIFIABLE):
            assert 1 <= grade(flaw) < 7, (flaw, t)
        for flaw in ("slip", "off topic"):                             # chance may make these right
            mean[flaw] += grade(flaw) / 40
    assert mean["slip"] < 6.9 and mean["off topic"] < 4


def test_table_3_verdicts_one_by_one():
    t = {"kind": "sound", "args": ["cow"], "constraint": "Use one word."}
    verdict = lambda text, **kw: tw.check(t, text, **kw)
    assert verdict("moo.").truthful and verdict("moo.").constraint and verdict("moo.").finished
    assert not verdict("woof.").truthful and verdict("It says moo.").constraint is False
    assert not verdict("moo.", ended=False).finished and not verdict("moo").finished
    assert verdict("moo, you fool.").rude and not verdict("moo.").rude
    t = {"kind": "hue", "args": ["lamp", "red", "cup", "blue", 1]}
    assert verdict("The cup is blue.").truthful and not verdict("The cup is blue.").invented
    assert verdict("The cup is green.").invented and not verdict("The cup is red.").truthful
    assert tw.gold(verdict("Go away, you fool.")) < 3


def test_section_34_labelers_are_the_same_every_time():
    train, heldout = tw.make_labelers("train"), tw.make_labelers("heldout")
    assert (len(train), len(heldout)) == (40, 20) and train == tw.make_labelers("train")
    assert not {x.name for x in train} & {x.name for x in heldout}


def test_section_34_ranks_are_ranks_and_equal_merits_tie():
    t = {"kind": "sound", "args": ["cow"], "constraint": ""}
    texts = ["It says moo.", "It says woof.", "It says moo.", "Go away, you fool.", "It says quack.", ""]
    merits = [tw.check(t, x) for x in texts]
    first = Counter()
    for i, labeler in enumerate(tw.make_labelers("train")):
        ranks = tw.rank(labeler, merits, texts, random.Random(i))
        assert ranks[0] == ranks[2] and ranks[1] == ranks[4]           # equal merits, equally long
        assert all(r == 1 + sum(x < r for x in ranks) for r in ranks)  # 1 is best; two firsts, then a third
        assert ranks == tw.rank(labeler, merits, texts, random.Random(i))
        first[ranks.index(1)] += 1
        score = tw.opinions(labeler, merits, texts, random.Random(i))
        assert all(score[i] > score[j] for i in range(6) for j in range(6) if ranks[i] < ranks[j])
        assert tw.likert(labeler, merits[0], texts[0], random.Random(i)) in range(1, 8)
    assert 14 < first[0] < 40  # the true answer wins mostly: people are noisy


@pytest.mark.skipif(not os.path.exists(os.path.join(DATA, "sft_samples.jsonl")), reason="no SFT samples")
@pytest.mark.parametrize("group, percent, error", [("train", 72.6, 1.5), ("heldout", 77.3, 1.3)])
def test_section_34_agreement_of_the_labelers(group, percent, error):
    assert abs(100 * tw.agreement(group) - percent) <= error


# ------------------------------------------------------------------------------------------------------------
# The steps: tiny networks on the toy's own tokens


class Quiet:
    """Stands where the log does and remembers."""

    def __init__(self):
        self.lines, self.iterations = [], []

    def __call__(self, stage, step, steps, **numbers):
        self.lines.append((stage, step, numbers))

    def steps(self, stage, n, **state):
        return range(n)

    def episodes(self, cfg, name, iteration, e, tasks, numbers):
        self.iterations.append((e, numbers))


SMALL = dict(n_layer=1, n_embd=16, block_size=48, pretrain_steps=6, pretrain_batch=4, sft_epochs=1,
             episodes=32, minibatches=4, iterations=2, max_new_tokens=6)


def small_models(enc, seed=0, block=48):
    torch.manual_seed(seed)
    policy = ig.GPT(ig.GPTConfig(enc.n_vocab, block, 1, 2, 16))
    return ig.freeze(policy), ig.freeze(ig.copy_of(policy, "scalar"))


def small_prompts(enc, sets, n=64):
    return [{"ids": ig.encode_prompt(enc, r["prompt"]), "task": r["task"]} for r in sets["ppo_train"][:400]
            if len(r["prompt"]) < 60][:n]


@pytest.fixture(scope="module")
def small_corpus(enc):
    return ig.load_corpus(os.path.join(DATA, "pretrain_valid.txt"), enc, 48)


def run_ppo(enc, sets, corpus, ptx_coef, **settings):
    cfg, log = ig.Config(**{**SMALL, **settings}), Quiet()
    policy, reward_model = small_models(enc)
    prompts, cpu = small_prompts(enc, sets), torch.device("cpu")
    average = ig.ppo(cfg, enc, policy, reward_model, prompts, corpus, ptx_coef, cpu, log)
    return average, policy, reward_model, log


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_section_35_normalised_reward_is_0_on_demonstrations_and_keeps_differences(enc, sets):
    _, reward_model = small_models(enc)
    demos = [(ig.encode_prompt(enc, r["prompt"]), ig.encode_response(enc, r["completion"]))
             for r in sets["sft_train"][:300] if len(r["prompt"]) < 60]
    tokens, _, last = ig.stack(*zip(*demos), "cpu")
    before = ig.reward_scores(reward_model, tokens, last).detach()
    ig.normalise_reward(reward_model, demos, "cpu")
    after = ig.reward_scores(reward_model, tokens, last).detach()
    assert abs(after.mean()) < 1e-4
    close(after - after[0], before - before[0], atol=1e-5, rtol=0)


def test_section_c4_first_minibatch_has_ratio_1_and_later_ones_have_not(enc, sets, small_corpus):
    *_, log = run_ppo(enc, sets, small_corpus, 0.0, policy_lr=1e-2)
    first = [numbers["change"] for numbers in log.iterations[1][1]]    # the policy is no longer the reference
    assert log.iterations[0][1][0]["change"] < 1e-5 and first[0] < 1e-5 < min(first[1:])


def test_section_c4_reference_and_reward_model_never_move(enc, sets, small_corpus):
    policy, reward_model = small_models(enc)
    average, reference, scorer, _ = run_ppo(enc, sets, small_corpus, 1.0, policy_lr=1e-2)
    assert torch.equal(weights(policy), weights(reference))
    assert torch.equal(weights(reward_model), weights(scorer))
    assert not torch.equal(weights(average), weights(reference))


def test_section_c4_kl_and_reward_before_the_first_update(enc, sets, small_corpus):
    *_, log = run_ppo(enc, sets, small_corpus, 0.0)
    e = log.iterations[0][0]
    mask = e["mask"]
    close(e["logprobs"][mask], e["ref_logprobs"][mask], atol=1e-5, rtol=0)     # no KL yet
    close(e["rewards"].sum(1), e["scores"], atol=1e-4, rtol=0)         # so the score is all there is
    assert (e["scores"][~e["ended"]] == ig.Config().unfinished_score).all()
    _, reward_model = small_models(enc)                                # the value net starts as it
    close(e["values"][mask], reward_model(e["tokens"][:, :-1])[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_section_c4_update_is_one_step_on_the_sum_of_both_gradients(enc, sets, small_corpus, micro_batch):
    cfg, (policy, reward_model) = ig.Config(**SMALL, micro_batch=micro_batch), small_models(enc)
    prompts = [p["ids"] for p in small_prompts(enc, sets, 16)]
    e = ig.make_experience(cfg, enc, policy, reward_model, policy, reward_model, prompts, seeded(1))
    e["mask"] &= e["mask"].cumsum(1) <= 1 + torch.arange(16)[:, None] % 6      # responses of 1 to 6 tokens
    text = ig.corpus_batch(small_corpus, 4, 48, seeded(2), "cpu")
    actor, critic = deepcopy(policy).requires_grad_(True), deepcopy(reward_model).requires_grad_(True)
    optimizers, steps = (ig.adamw(actor, 0.1), ig.adamw(critic, 0.1)), []
    for o in optimizers:
        o.register_step_pre_hook(lambda o, *_: steps.append(o.param_groups[0]["lr"]))
    stepped_on, weights = [], list(actor.parameters())
    optimizers[0].register_step_pre_hook(lambda *_: stepped_on.extend(p.grad.clone() for p in weights))
    rows, t = torch.arange(16), int(e["length"].max())
    got = ig.update(cfg, actor, critic, optimizers, e, rows, 2.0, text, 0.5)
    assert steps == [0.5 * cfg.policy_lr, cfg.value_lr]                # one step each
    assert all(group["betas"] == (0.9, 0.95) for o in optimizers for group in o.param_groups)
    values, returns, mask = (e[k][:, :t - 1] for k in ("values", "returns", "mask"))
    error = ig.value_loss(reward_model(e["tokens"][:, :t - 1]), values, returns, mask)
    assert got["vloss"] == pytest.approx(error.item(), rel=1e-4)
    twin = deepcopy(policy).requires_grad_(True)
    old, advantages, mask = (e[k][:, :t - 1] for k in ("logprobs", "advantages", "mask"))
    ig.policy_loss(ig.token_logprobs(twin, e["tokens"][:, :t]), old, advantages, mask).backward()
    norm = lambda: torch.stack([p.grad.norm() for p in twin.parameters()]).norm().item()
    assert got["|ppo|"] == pytest.approx(norm(), rel=1e-4)
    first = [p.grad.clone() for p in twin.parameters()]
    twin.zero_grad()
    (2.0 * ig.lm_loss(twin, text)).backward()
    assert got["|ptx|"] == pytest.approx(norm(), rel=1e-4)
    for p, g in zip(twin.parameters(), first):
        p.grad += g
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    for p, g in zip(twin.parameters(), stepped_on, strict=True):       # the step is on the sum
        close(g, p.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_section_c4_what_is_scored_is_what_was_sampled_from(enc, sets, small_corpus, temperature):
    *_, log = run_ppo(enc, sets, small_corpus, 0.0, temperature=temperature)
    assert log.iterations[0][1][0]["change"] < 1e-5
    e = log.iterations[0][0]
    close(e["logprobs"][e["mask"]], e["ref_logprobs"][e["mask"]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("times", [1, 12])
def test_section_c4_rows_scored_by_length_come_back_in_their_places(times):
    model = tiny()
    r = ig.rollout(model, PROMPTS * times, 12, EOS, 1.0, seeded(1))
    e = {"tokens": r.tokens, "mask": r.mask, "length": r.prompt_lens + r.mask.sum(1)}

    def logprobs(tokens, mask, n):
        assert len(n) <= 16 and n.max() == tokens.size(1) == mask.size(1) + 1        # no filler for all
        return ig.token_logprobs(model, tokens, 1.0, mask)
    with torch.no_grad():
        close(ig.by_length(logprobs, e), r.logprobs, atol=1e-5, rtol=0)
    assert torch.equal(ig.by_length(lambda tokens, mask, n: n, e), e["length"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_section_c4_ppo_learns_to_raise_the_score(small_corpus, seed):
    cfg = ig.Config(**{**SMALL, "episodes": 128, "iterations": 15, "policy_lr": 3e-3, "beta": 0.01,
                       "warmup": 0, "seed": seed})
    words, log = SimpleNamespace(eot_token=EOS), Quiet()
    prompts = [{"ids": p, "task": None} for p in PROMPTS] * 32
    policy, reward_model, cpu = tiny(seed=seed), tiny("scalar", seed=seed + 10), torch.device("cpu")
    ig.ppo(cfg, words, policy, reward_model, prompts, small_corpus, 0.0, cpu, log)
    scores = [e["scores"].mean().item() for e, _ in log.iterations]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.3


def test_section_c4_clip_and_step_clips_what_backward_left():
    model = tiny()
    optimizer, before = torch.optim.SGD(model.parameters(), 1.0), weights(model).clone()
    (1e3 * ig.lm_loss(model, torch.tensor([[1, 2, 3, 4]]))).backward()
    ig.clip_and_step(model, optimizer, 0.5)
    assert (weights(model) - before).norm() == pytest.approx(0.5, rel=1e-3)    # norm 1, learning rate 0.5
    assert all(p.grad is None for p in model.parameters())


def test_same_seed_same_numbers(enc, small_corpus, sets):
    cfg, device = ig.Config(**SMALL), torch.device("cpu")
    demos = [(p["ids"], [260, 261, enc.eot_token]) for p in small_prompts(enc, sets)]
    runs = []
    for _ in range(2):
        gpt = ig.pretrain(cfg, enc, small_corpus, device, Quiet())
        runs.append(weights(ig.sft(cfg, enc, gpt, demos, small_corpus, device, Quiet())))
        torch.rand(3)                                                  # others may draw in between
    assert torch.equal(*runs)
    other = ig.pretrain(ig.Config(**{**SMALL, "seed": 1}), enc, small_corpus, device, Quiet())
    assert not torch.equal(weights(gpt), weights(other))


def test_micro_batches_train_the_same_models(enc, sets, small_corpus):
    cut = lambda r: ig.encode_response(enc, r["completion"])[:1 + len(r["prompt"]) % 6]            # unequal
    demos = [(ig.encode_prompt(enc, r["prompt"]), cut(r))
             for r in sets["sft_train"][:200] if len(r["prompt"]) < 60]
    ranked = [{"prompt": r["prompt"], "responses": ["Yes.", "No.", "I do not know."], "ranks": [1, 3, 2],
               "ended": [True] * 3} for r in sets["rm_train"][:40] if len(r["prompt"]) < 60]
    runs, log = [], Quiet()
    for micro_batch in (0, 3):
        cfg, cpu = ig.Config(**SMALL, micro_batch=micro_batch), torch.device("cpu")
        gpt = ig.pretrain(cfg, enc, small_corpus, cpu, Quiet())
        model = ig.sft(cfg, enc, gpt, demos, small_corpus, cpu, log)
        runs.append((gpt, model, ig.train_reward_model(cfg, enc, model, ranked, demos, cpu, Quiet())))
    losses = [numbers["loss"] for *_, numbers in log.lines]
    n = len(losses) // 2
    assert losses[:n] == pytest.approx(losses[n:], rel=1e-4)
    tokens, _, last = ig.stack(*zip(*demos), "cpu")
    assert abs(ig.reward_scores(runs[0][2], tokens, last).mean()) < 1e-4   # normalised at the end
    for a, b in zip(*runs):
        assert (weights(a) - weights(b)).abs().median() < 1e-5         # a key's bias moves by rounding alone


def test_section_c2_equal_texts_are_one_response(enc):
    c = {"prompt": "I lost my hat.", "responses": ["sad.", "happy.", "sad.", ""], "ranks": [2, 1, 3, 4],
         "ended": [True, True, True, True]}
    _, responses, ranks = ig.encode_comparison(enc, c, 16)
    assert ranks == [2, 1, 0, 4] and responses[3] == [enc.eot_token]
    c["ended"] = [False] * 4
    assert all(enc.eot_token not in r for r in ig.encode_comparison(enc, c, 16)[1][:3])


# ------------------------------------------------------------------------------------------------------------
# What users hand in. A reader takes a file as a whole or refuses it with one line, which holds the file, the
# line's number, what is wrong and what to do.

LINES = {                                        # what is read: file name -> good lines
    "pretrain.txt": ["The cow is here.", "It is so.", "", "A hat. 世 <|endoftext|> x"],
    "prompts.jsonl": [{"prompt": "Say moo."}, {"prompt": "Is it <|endoftext|>?\n", "use_case": "chat"},
                      {"prompt": "世"}],
    "demonstrations.jsonl": [
        {"prompt": "Say moo.", "completion": "moo."}, {"prompt": "a", "completion": " <|endoftext|>"},
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say moo."},
                      {"role": "assistant", "content": "moo."}], "labeler": 7}],
    "comparisons.jsonl": [
        {"prompt": "Say moo.", "chosen": "moo.", "rejected": "no. <|endoftext|>"},
        {"prompt": "a", "responses": ["x", "y", "x"], "ranks": [1, 2, 1], "split": "valid"},
        {"prompt": "b", "responses": ["", "y", "y"], "ranks": [1, 1, 2], "ended": [True, True, False]}],
    "probes.json": [{
        **{k: [{"prompt": "a", "task": {"kind": "class"}}] for k in ("truthful", "toxic", "unseen")},
        "fewshot": {k: [{"prompt": "a", "answer": " b"}] for k in ("reading", "cloze", "translation")},
        "bias": [{"prompt": "a", "choices": [" her", " his"]}], "respect": "", "prefix": "a\n"}],
    "vocab.tiktoken": [f"{b64encode(bytes([i])).decode()} {i}" for i in range(256)] + ["IGNvdw== 256"]}
JSONL = [name for name in LINES if name.endswith(".jsonl")]
READERS = {"pretrain.txt": lambda path, enc: ig.load_corpus(path, enc, 2),
           "prompts.jsonl": lambda path, enc: ig.read_jsonl(path, prompt="text"),
           "demonstrations.jsonl": lambda path, enc: ig.read_jsonl(path, ig.demonstration),
           "comparisons.jsonl": lambda path, enc: ig.read_jsonl(path, ig.comparison),
           "probes.json": lambda path, enc: ig.read_jsonl(path, **ig.PROBES),
           "vocab.tiktoken": lambda path, enc: ig.load_encoding(path)}


def read(path, enc):
    return READERS[path.name](str(path), enc)


def written(*lines):
    """Lines (text or JSON values) as the bytes of a file."""
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()


@pytest.fixture
def put(tmp_path):
    """put(name, line, line ...) or put(name, bytes) -> path of a file with these lines."""
    def put(name, *lines):
        (tmp_path / name).write_bytes(lines[0] if isinstance(lines[0], bytes) else written(*lines))
        return tmp_path / name
    return put


def assert_one_line(message, path):
    assert message.startswith(f"{path}:") and "\n" not in message and len(message) < len(str(path)) + 300


def refusal(path, enc):
    """What the reader says of a bad file, without the file's name."""
    with pytest.raises(ig.UserError) as e:
        read(path, enc)
    assert_one_line(str(e.value), path)
    return str(e.value).removeprefix(str(path))


def assert_right(got, path, enc):
    """What the rest of the script relies on, of a file that was taken."""
    lines = sum(line.strip() != "" for line in path.read_text(encoding="utf-8-sig").split("\n"))
    if path.name == "pretrain.txt":
        tokens, starts = got
        ends = tokens == enc.eot_token                                 # of documents, none of which is empty
        assert tokens.dtype == np.uint16 and ends[-1] and not (ends[:-1] & ends[1:]).any()
        assert starts[0] == 0 and ends[starts[1:] - 1].all() and starts[-1] + 2 <= len(tokens)
    elif path.name == "vocab.tiktoken":
        assert got.n_vocab == lines + 1 == got.eot_token + 1
        assert got.decode(got.encode_ordinary("The cow 世\n\0 12")) == "The cow 世\n\0 12"
    elif path.name == "probes.json":
        assert all(p["prompt"].strip() and type(p["task"]) is dict
                   for k in ("truthful", "toxic", "unseen") for p in got[0][k])
        assert all(got[0]["fewshot"].values()) and all(all(p["choices"]) for p in got[0]["bias"])
    else:
        assert len(got) == lines                                       # all or nothing
        for row in got:
            assert_text(row["prompt"], ig.encode_prompt(enc, row["prompt"]), enc)
            if path.name == "demonstrations.jsonl":
                ids = ig.encode_response(enc, row["completion"])
                assert ids[-1] == enc.eot_token
                assert_text(row["completion"], ids[:-1], enc)
            if path.name == "comparisons.jsonl":
                assert_comparison(row, enc)


def assert_text(text, ids, enc):
    assert type(text) is str and text.strip() and "\0" not in text and text in enc.decode(ids)
    assert enc.eot_token not in ids


def assert_comparison(c, enc):
    types = lambda key: set(map(type, c[key]))
    assert 2 <= len(c["responses"]) == len(c["ranks"]) == len(c["ended"]) and types("responses") == {str}
    assert types("ranks") == {int} and types("ended") == {bool} and all(1 <= r <= 1000 for r in c["ranks"])
    _, responses, ranks = ig.encode_comparison(enc, c, 16)
    assert len(responses) == len(ranks) == len(c["ranks"]) and max(ranks) > 0
    assert all(ids and enc.eot_token not in ids[:-1] for ids in responses)


@pytest.mark.parametrize("name", LINES)
def test_reader_takes_a_good_file_and_ignores_bom_crlf_and_blank_lines(name, enc, put):
    plain = {"pretrain.txt": lambda got: [x.tolist() for x in got],
             "vocab.tiktoken": lambda got: got.encode_ordinary("a cow")}.get(name, lambda got: got)
    data, blank = written(*LINES[name]), b"\n\n" if name == "pretrain.txt" else b" \t\n\n"
    want = read(put(name, data), enc)
    assert_right(want, put(name, data), enc)
    for other in (b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), blank + data + blank):
        assert plain(read(put(name, other), enc)) == plain(want)


@pytest.mark.parametrize("name", LINES)
def test_reader_refuses_what_is_no_text_file(name, enc, put, tmp_path):
    good = written(*LINES[name])
    end = f":{good.count(10) + 1}:"                                    # the bad line comes last
    assert refusal(tmp_path / name, enc).startswith(": cannot be read (No such file or directory); add it")
    for bad, where, what, advice in [
            (b"", ":", "is empty", "needs a line"), (b"\xef\xbb\xbf", ":", "is empty", "needs a line"),
            (b" \r\n\t\n\n", ":", "is empty", "needs a line"),
            (good + b"a\xff", end, "not UTF-8 text (invalid start byte)", "save the file as UTF-8"),
            (good + b"a\xed\xa0\x80", end, "not UTF-8 text", "save the file as UTF-8"),    # half a surrogate
            (good.decode().encode("utf-16"), ":1:", "not UTF-8 text", "save the file as UTF-8"),
            (good + b"a\0b", end, "holds NUL or more", "remove it"), (b"\0", ":1:", "holds NUL", "remove it"),
            (good + b"a" * 10 ** 7, end, f"holds NUL or more than {ig.LONGEST:,} characters", "remove")]:
        start, told = time.process_time(), refusal(put(name, bad), enc)
        assert told.startswith(f"{where} {what}") and advice in told and time.process_time() - start < 2
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert refusal(tmp_path / name, enc).startswith(": cannot be read (Is a directory); add it or name")


def test_reader_takes_long_lines_in_reasonable_time(enc, put):
    n, start = ig.LONGEST, time.process_time()
    words = ["x" * n, " " * (n - 1) + "x", "é" * n, "= " * (n // 2)]
    assert len(read(put("pretrain.txt", *words), enc)[0]) > n
    for word in ("x", " "):
        row, = read(put("prompts.jsonl", {"prompt": word * (n - 20) + "x"}), enc)
        assert len(ig.encode_prompt(enc, row["prompt"])) > n - 20 and time.process_time() - start < 10


def test_blanks_in_blank_lines_change_nothing_and_a_million_of_them_do_no_harm(enc, put):
    blanks = [" " * ig.LONGEST] * 3              # GPT-2's pattern gives up at a million in one piece
    many = blanks[0][9:]
    got = read(put("pretrain.txt", "a cow", *blanks, "a hat" + many, many + "is here"), enc)
    want = enc.encode_ordinary("a cow") + [enc.eot_token] + enc.encode_ordinary("a hat")
    assert got[0][:len(want)].tolist() == want and got[1].tolist() == [0, want.index(enc.eot_token) + 1]
    (tokens, starts), plain = [read(put("pretrain.txt", "a", gap, "b c"), enc) for gap in (" \t", "")]
    assert tokens.tolist() == plain[0].tolist() and starts.tolist() == plain[1].tolist()


@pytest.mark.parametrize("name", JSONL)
@pytest.mark.parametrize("line, told", [
    ('{"prompt": ', "broken JSON: Expecting value"), ("{'prompt': 'a'}", "broken JSON: Expecting property"),
    ('{"prompt": "a"} {"prompt": "b"}', "broken JSON: Extra data"),
    ('{"prompt": "a\tb"}', "broken JSON: Invalid control"), ('{"prompt": "\\x"}', "broken JSON: Invalid"),
    ("[" * 10 ** 5, "broken JSON: maximum recursion"), ('{"a":' * 50_000, "broken JSON: maximum recursion"),
    ('{"prompt": %s}' % ("9" * 5000), "has 5000 digits"), ("[]", "it must be dict, is []"),
    ('["prompt"]', "it must be dict, is ['prompt']"), ("17", "it must be dict, is 17"),
    ('"prompt"', "it must be dict, is 'prompt'"), ("null", "it must be dict, is missing or null"),
    ("NaN", "it must be dict, is nan"), ("{}", " must be str, is missing or null")])
def test_reader_refuses_broken_json_lines(name, line, told, enc, put):
    for n in (1, 3):
        message = refusal(put(name, *LINES[name][:n - 1], line, *LINES[name]), enc)
        assert message.startswith(f":{n}: ") and told in message
        assert "; it must be an object with prompt" in message or '; it must be {"prompt": text, "' in message


GONE = object()                                  # a field that is left out


@pytest.mark.parametrize("name, i, field", [
    ("prompts.jsonl", 0, "prompt"), *(("demonstrations.jsonl", 0, k) for k in ("prompt", "completion")),
    *(("comparisons.jsonl", 0, k) for k in ("prompt", "chosen", "rejected")),
    ("comparisons.jsonl", 1, "prompt"), ("comparisons.jsonl", 2, "prompt")])
def test_reader_refuses_what_is_no_text_in_a_text_field(name, i, field, enc, put):
    for value, told in [
            (GONE, f"{field} must be str, is missing"), (None, f"{field} must be str, is missing or null"),
            (17, f"{field} must be str, is 17"), (True, "is True"), (["a"], "is ['a']"), ({"a": 1}, "is {"),
            (math.nan, "is nan"), (-math.inf, "is -inf"), (10 ** 40, "is 10000"),
            ("", f"{field} must be text, is blank"), (" \n\t", f"{field} must be text, is blank"),
            ("a\0b", f"{field} must be text, is blank or holds NUL"),
            ("\ud800", "surrogates not allowed"), ("a\udfff b", "surrogates not allowed")]:
        row = {k: v for k, v in {**LINES[name][i], field: value}.items() if v is not GONE}
        message = refusal(put(name, LINES[name][0], "", row), enc)
        assert message.startswith(":3: ") and told in message and "; it must be " in message


def chat(*roles, content="a", **more):
    return {"messages": [{"role": role, "content": content} for role in roles], **more}


TALK = "messages must hold a user's and end with an assistant's"


@pytest.mark.parametrize("row, told", [
    (chat("user"), TALK), (chat("assistant"), TALK), (chat("assistant", "user"), TALK),
    (chat("user", "user"), TALK), (chat("User", "assistant"), TALK), (chat("system", "assistant"), TALK),
    (chat("user", "assistant", completion="b"), TALK), (chat(), "messages must be list, is []"),
    ({"messages": None}, "messages must be list, is missing or null"),
    ({"messages": "a"}, "messages must be list, is 'a'"), ({"messages": ["a"]}, "messages[0] must be dict"),
    ({"messages": [{"role": "user"}, {}]}, "content must be str, is missing"),
    ({"messages": [{"content": "a"}]}, "role must be str, is missing"),
    (chat("user", "assistant", content=" "), "content must be text, is blank"),
    (chat("user", "assistant", content=["a"]), "content must be str, is ['a']"),
    (chat("user", ["assistant"]), "role must be str, is ['assistant']"),
    (chat("user", "assistant", content="\ud800"), "surrogates not allowed")])
def test_demonstrations_in_messages_that_are_none_are_refused(row, told, enc, put):
    message = refusal(put("demonstrations.jsonl", row), enc)
    assert message.startswith(":1: ") and told in message and '; it must be {"prompt": text, "comp' in message


def ranked(*ranks, **more):
    return {"prompt": "a", "responses": ["x", "y", "z"], "ranks": list(ranks), **more}


FIT, LIE = "must be equally many, at least 2", "ranks must lie in 1 to 1000 and be equal for equal responses"


@pytest.mark.parametrize("row, told", [
    (ranked(1, 2), "3 responses and 2 ranks " + FIT), (ranked(1, 2, 3, 4), "3 responses and 4 ranks " + FIT),
    (ranked(1, 2, 3, responses=["x", "y"]), FIT), (ranked(1, responses=["x"]), FIT),
    (ranked(1, 2, 3, ended=[True, True]), FIT), (ranked(1, ended=[True], responses=["x"]), FIT),
    (ranked(), "ranks must be list, is []"), (ranked(1, responses=[]), "responses must be list, is []"),
    (ranked(0, 1, 2), LIE), (ranked(-1, 1, 2), LIE), (ranked(1, 2, 1001), LIE), (ranked(1, 2, 10 ** 30), LIE),
    (ranked(1, 2, 3, responses=["x", "y", "x"]), LIE), (ranked(1, 2, chosen="x", responses=["x", "x"]), LIE),
    ({"prompt": "a", "chosen": "x", "rejected": "x"}, LIE),
    (ranked(1, 2, True), "ranks[2] must be int, is True"), (ranked(1, 2., 3), "ranks[1] must be int, is 2.0"),
    (ranked(1, math.nan, 3), "ranks[1] must be int, is nan"),
    (ranked(math.inf, 1, 2), "ranks[0] must be int, is inf"),
    (ranked("1", 2, 3), "ranks[0] must be int, is '1'"), (ranked(1, [2], 3), "ranks[1] must be int, is [2]"),
    (ranked(None, 2, 3), "ranks[0] must be int, is missing or null"),
    (ranked(ranks=7), "ranks must be list, is 7"), (ranked(ranks=None), "ranks must be list, is missing"),
    (ranked(ranks={"x": 1}), "ranks must be list, is {'x': 1}"),
    (ranked(1, 2, 3, responses="xyz"), "responses must be list, is 'xyz'"),
    (ranked(1, 2, 3, responses=["x", "", "z"]), "responses[1] must be text, is blank"),
    (ranked(1, 2, 3, responses=["x", "y", " \n"]), "responses[2] must be text, is blank"),
    (ranked(1, 2, 3, responses=["x", None, "z"]), "responses[1] must be str, is missing or null"),
    (ranked(1, 2, 3, responses=["x", 17, "z"]), "responses[1] must be str, is 17"),
    (ranked(1, 2, 3, responses=["x", "\udc00", "z"]), "surrogates not allowed"),
    (ranked(1, 2, 3, responses=["x", None, ""], ended=[True] * 3), "responses[1] must be str, is missing"),
    (ranked(1, 2, 3, ended=[1, 1, 1]), "ended[0] must be bool, is 1"),
    (ranked(1, 2, 3, ended=None), "ended must be list, is missing or null"),
    ({"prompt": "a", "ranks": [1, 2]}, "chosen must be str, is missing")])
def test_comparisons_that_are_none_are_refused(row, told, enc, put):
    message = refusal(put("comparisons.jsonl", LINES["comparisons.jsonl"][0], row), enc)
    assert message.startswith(":2: ") and told in message and '; it must be {"prompt": text, "resp' in message


def test_demonstrations_and_comparisons_have_one_normal_form(enc, put):
    lines = LINES["demonstrations.jsonl"]
    plain, _, talk = read(put("demonstrations.jsonl", *lines), enc)
    assert plain == lines[0]
    assert talk == {**lines[2], "prompt": "Be kind.\nSay moo.", "completion": "moo."}
    lines = LINES["comparisons.jsonl"]
    pair, ties, sampled = read(put("comparisons.jsonl", *lines), enc)
    both = {"responses": ["moo.", "no. <|endoftext|>"], "ranks": [1, 2], "ended": [True, True]}
    assert pair == {**lines[0], **both} and ties == {**lines[1], "ended": [True] * 3}
    assert ig.encode_comparison(enc, ties, 16)[2] == [1, 2, 0]         # of equal texts the first counts
    assert sampled == lines[2]                                         # a run's own: empty, equal, unended


@pytest.mark.parametrize("line", [
    "AA== 0", "Ag== 1", "Ag== 3", "Ag== -2", "Ag== 2.0", "Ag== " + "9" * 20, "Ag== " + "9" * 5000, "Ag== ٢",
    "Ag== +2", "Ag== 0_2", "Ag== 02", "Ag==", "2", "Ag== 2 3", "AQ== 2", "== 2", "A 2", "Ag 2", "A?g= 2",
    "=Ag= 2", "Ag==Ag== 2", "éé== 2", "junk"])
def test_rank_file_is_refused_at_its_first_odd_line(line, enc, put):
    lines = LINES["vocab.tiktoken"]
    message = refusal(put("vocab.tiktoken", *lines[:2], line, *lines[3:]), enc)
    assert message.startswith(":3: of a rank file, must be base64 of a new token")
    assert message.endswith(" rank 2")


def test_rank_file_needs_all_bytes_and_no_junk(enc, put):
    words = [line.split()[0] for line in LINES["vocab.tiktoken"]]
    del words[77]
    message = refusal(put("vocab.tiktoken", *(f"{word} {i}" for i, word in enumerate(words))), enc)
    assert message == ": a single byte has no token; a tiktoken rank file has one for all 256"
    for junk in (bytes(range(11, 256)) * 9, bytes(range(14, 128)) * 9, b64encode(bytes(range(256)))):
        assert refusal(put("vocab.tiktoken", junk), enc).startswith((":1: ", ":2: "))


def test_probes_of_another_structure_are_refused(enc, put):
    good, = LINES["probes.json"]
    none = [None, [], {}, "a", ["a"], [[]], [None], [{"prompt": "a"}], [{"task": {}}],
            [{"prompt": "a", "task": 7}], [{"prompt": " ", "task": {}}]]
    bad = [{**good, key: v} for key in ("truthful", "toxic", "unseen", "bias", "fewshot") for v in none]
    bad += [{**good, "fewshot": {**good["fewshot"], "cloze": value}} for value in none]
    bad += [{**good, "bias": [{"prompt": "a", "choices": value}]} for value in ([], [" ", "b"], "ab", [1, 2])]
    bad += [{**good, "respect": None}, {**good, "prefix": 7}, [good], 7]
    bad += [{k: v for k, v in good.items() if k != key} for key in good]
    for line in [*map(json.dumps, bad), "{", "[" * 10 ** 5, json.dumps(good) * 2]:
        message = refusal(put("probes.json", line), enc)
        assert message.startswith(":1: ") and "; it must be an object with truthful, toxic, " in message
    assert read(put("probes.json", json.dumps(good, indent=1)), enc) == [good]


def test_long_prompts_are_counted_and_left_out(put, tmp_path, capsys):
    put("vocab.tiktoken", *LINES["vocab.tiktoken"])
    run = ig.Run(ig.Config(data=str(tmp_path), out=str(tmp_path / "out"), device="cpu"), None, False)
    row = lambda prompt, completion: {"prompt": prompt, "completion": completion}
    put("sft_train.jsonl", row("x" * 46, "y" * 14), row("x" * 47, "y"), row("x" * 390_000, "y"),
        row("x", "y" * 15), chat("user", "assistant", content=ig.EOT))
    (one, full), (two, whole) = run.demos()
    told = "sft_train.jsonl: 3 of 5 rows are left out, for a prompt of more than 48 tokens or an answer of "
    assert told + "more than 16: see --block_size, --max_new_tokens" in capsys.readouterr().out
    assert len(one) == 48 and len(full) == 16 and full[-1] == whole[-1] == run.enc.eot_token
    assert run.enc.eot_token not in one + full[:-1] + two + whole[:-1]
    put("sft_train.jsonl", row("x", "y" * 15))
    with pytest.raises(ig.UserError, match="sft_train.jsonl: 1 of 1 rows are left out, .* --max_new_tokens"):
        run.demos()
    put("test.jsonl", {"prompt": "x" * 47, "task": {}})
    with pytest.raises(ig.UserError, match="test.jsonl: 1 of 1 rows are left out, .* --block_size"):
        run.rows("test.jsonl", prompt="text", task=dict)


@pytest.mark.parametrize("name, line", [
    ("vocab.tiktoken", "AA== 1"), ("pretrain.txt", "\0"), ("pretrain.txt", " ")])
def test_bad_data_get_one_line_and_exit_code_2(name, line, put, tmp_path, capsys):
    put("vocab.tiktoken", *LINES["vocab.tiktoken"])
    path, out = put(name, line), str(tmp_path / "out")
    assert ig.main(["pretrain", "--data", str(tmp_path), "--out", out, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"instructgpt.py: {path}:") and error.count("\n") == 1


# Fuzzing: good files are changed value by value, line by line and byte by byte.

JUNK = [b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n", b"\n\n", b"\\ud800",
        b"\\u0000", b'"', b"\\", b",", b" ", b"= 7", b"\xe2\x80\xa8", b"<|endoftext|>", b"NaN", b"9" * 5000,
        b"[" * 5000, b'{"a":' * 3000]
VALUES = [None, True, 0, -1, 2, 10 ** 30, 1.5, math.nan, math.inf, "", " ", "a", "\ud800", "a\0", ig.EOT, [],
          {}, [1], ["a"], [1, 2], [1, 2, 3], ["a", "a"], ["a", "b", "c"], [True, False], [None],
          {"prompt": "a"}, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
FIELDS = ("prompt completion messages role content chosen rejected responses ranks ended truthful bias "
          "choices fewshot respect").split()


def change_value(value, rng):
    """The JSON value with one change somewhere inside."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.3:
        return rng.choice(VALUES)
    value, key = deepcopy(value), rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = rng.choice(["deeper", "deeper", "deeper", "drop", "move"])
    if how == "deeper":
        value[key] = change_value(value[key], rng)
    elif how == "drop":
        del value[key]
    elif isinstance(value, dict):
        value[rng.choice(FIELDS)] = value.pop(key)
    else:
        value.append(value[key])
    return value


def change_lines(lines, name, rng):
    i, j, how = rng.randrange(len(lines)), rng.randrange(len(lines)), rng.choice("vvvrsd")
    if how == "v" and ".json" in name:
        lines[i] = json.dumps(change_value(json.loads(lines[i]), rng))
    elif how == "v" and name == "vocab.tiktoken":
        lines[i] = f"{lines[j].split()[0]} {rng.choice([i, j, -i, 10 ** 12])}"
    elif how == "r":
        lines.insert(j, lines[i])
    elif how == "s":
        lines[i], lines[j] = lines[j], lines[i]
    elif how == "d" and len(lines) > 1:
        del lines[i]


def change_bytes(data, rng):
    i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    one = bytes([rng.randrange(256)])
    return rng.choice([data[:i] + one + data[i + 1:], data[:i] + rng.choice(JUNK) + data[i:],
                       data[:i] + data[min(i + 9, j):], data[:j] + data[i:], data[:j]])


def test_fuzzed_files_are_taken_rightly_or_refused_in_one_line(enc, put):
    rng, taken, refused = random.Random(0), Counter(), Counter()
    for n in range(12_000):
        name = list(LINES)[n % len(LINES)]
        lines = written(*LINES[name]).decode().splitlines()
        for _ in range(rng.choice([0, 1, 1, 2])):
            change_lines(lines, name, rng)
        data = written(*lines)
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            data = change_bytes(data, rng)
        path = put(name, data)
        try:
            got = read(path, enc)                                      # anything but UserError fails the test
        except ig.UserError as e:
            assert_one_line(str(e), path)
            refused[name] += 1
        else:
            assert_right(got, path, enc)
            taken[name] += 1
    assert min(taken[name] for name in LINES) > 100 and min(refused[name] for name in LINES) > 100


# ------------------------------------------------------------------------------------------------------------
# The whole run in miniature, and the command line


def command(*words, cwd=HERE):
    script = os.path.join(HERE, "instructgpt.py")
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}                # small matrices: a second one waits
    return subprocess.run([sys.executable, script, *map(str, words)], cwd=cwd, text=True, capture_output=True,
                          timeout=600, encoding="utf-8", env=one_thread)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke") / "out"
    done = command("--smoke", "--device", "cpu", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_smoke_run_leaves_what_it_promises(smoke):
    out, text = smoke
    r = json.loads((out / "results.json").read_text())
    assert set(r) == {"config", "seconds", "reward_model", "models"}
    assert all(r["config"][k] == v for k, v in dict(n_layer=2, n_embd=64, block_size=64, gelu="none").items())
    assert set(r["seconds"]) == {"pretrain", "sft", "collect", "rm", "ppo", "ppo_ptx", "evaluate", "total"}
    assert set(r["reward_model"]) == {"accuracy", "agreement", "gold_accuracy", "gold_accuracy_by_use_case",
                                      "best_of_n"}
    best = r["reward_model"]["best_of_n"]
    assert list(best) == [str(n) for n in range(1, 10)] and best["1"]["kl"] == 0
    assert best["4"]["reward"] > best["1"]["reward"]                   # of the same comparisons: k_min is 4
    assert list(r["models"]) == ["GPT", "GPT (prompted)", "SFT", "PPO", "PPO-ptx"]
    names = ("win_vs_sft win_vs_sft_heldout win_vs_sft_gold win_vs_gpt likert gold reward follows constraint "
             "truthful truthful_informative hallucinates rude rude_respectful bias_bits fewshot unseen kl "
             "pretrain_loss length ended")
    for m in r["models"].values():
        assert set(names.split()) <= set(m)
        assert set(m["bias_bits"]) == {"basic", "respectful"}
        assert set(m["fewshot"]) == {"reading", "cloze", "translation"}
        assert 1 <= m["gold"] <= 7 and 0 <= m["win_vs_sft"] <= 1 and m["kl"] >= -1e-4
    assert r["models"]["SFT"]["win_vs_sft_gold"] == 0.5 and abs(r["models"]["SFT"]["kl"]) < 1e-3
    for name in "samples.txt picture.svg comparisons.jsonl log.jsonl pretrain.pt sft.pt rm.pt ppo.pt".split():
        assert (out / name).stat().st_size > 0
    assert not list(out.glob("*.tmp"))
    assert "Episode ledger" in text and "left" in text
    lines = [line for line in text.splitlines() if line.startswith("first minibatch")]
    differences = [float(line.split("= ")[1].split()[0]) for line in lines]
    assert len(differences) == 2 and max(differences) < 1e-4


def panels_of(svg):
    """A picture -> {title: (its texts, its colours)}. It must be XML, small, of numbers; no text may touch
    another (characters taken as 7 wide and 12 high) or leave its panel."""
    assert len(svg.encode()) < 40_000 and "nan" not in svg and "inf" not in svg
    out, root = {}, tree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for panel in root.findall("{*}g"):
        boxes = []
        for t in panel.iter(root.tag[:-3] + "text"):
            wide, x, y = 7 * len(t.text), float(t.get("x")), float(t.get("y"))
            left = x - wide * {"start": 0, "middle": 0.5, "end": 1}[t.get("text-anchor")]
            boxes.append((left, left + wide, y - 12, y))
        for a, b in itertools.combinations(boxes, 2):
            assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2], (a, b)
        assert all(a[0] >= -4 and a[1] <= 322 and 0 <= a[2] and a[3] <= 292 for a in boxes)
        title, *rest = [t.text for t in panel.iter(root.tag[:-3] + "text")]
        out[title] = rest, {e.get("stroke") for e in panel.iter() if e.get("stroke")}
    height = float(root.get("viewBox").split()[3])
    assert 300 * ((len(out) + 2) // 3) <= height < 300 * ((len(out) + 2) // 3) + 20
    return out


TITLES = ["Preferred to SFT", "Alignment tax", "Losses, nats", "Reward against KL",
          "True quality (gold) against KL", "PPO-ptx: gold over SFT", "Tokens a response"]


@pytest.fixture(scope="module")
def drawn(smoke):
    """What picture() is given at the end of the run in miniature: models, history, best of n."""
    r = json.loads((smoke[0] / "results.json").read_text())
    history = [json.loads(line) for line in open_lines(smoke[0] / "log.jsonl")]
    return r["models"], [h for h in history if h["stage"] != "evaluate"], r["reward_model"]["best_of_n"]


def test_picture_of_a_run_has_six_panels_and_a_colour_a_model(smoke, drawn):
    svg = (smoke[0] / "picture.svg").read_text(encoding="utf-8")
    assert svg == ig.picture(*drawn)
    panels = panels_of(svg)
    assert list(panels) == TITLES[:6]
    texts = {title: texts for title, (texts, _) in panels.items()}
    assert {"GPT", "SFT", "PPO", "PPO-ptx"} <= set(texts["Preferred to SFT"])
    assert {"GPT", "SFT", "RM"} <= set(texts["Losses, nats"])
    assert not {"GPT", "GPT (prompted)"} & set(texts["Alignment tax"])
    for title in TITLES[3:5]:
        assert {"SFT", "PPO", "PPO-ptx", "best of 9"} <= set(texts[title]) and "GPT" not in texts[title]
    for title in TITLES[:2] + TITLES[3:5]:
        assert {"#d55e00", "#0072b2"} <= panels[title][1]              # PPO, PPO-ptx


def test_picture_holds_ten_models_known_and_unknown(drawn, monkeypatch):
    models, history, best = drawn
    monkeypatch.setattr(ig, "MODELS", {k: n for k, n in ig.MODELS.items() if k != "KTO"})
    new = ("DPO", "KTO", "REINFORCE", "best of 9", "rival GPT")
    models = {**models, **{k: {**models["PPO"], "kl": 0.1 * i} for i, k in enumerate(new)}}
    history = history + [{**h, "stage": "reinforce"} for h in history if h["stage"] == "ppo"]
    history += [{"stage": "dpo", "step": i + 1, "loss": 0., "gold": 3.} for i in range(500)]     # may reach 0
    panels = panels_of(ig.picture(models, history, best))
    assert list(panels) == TITLES[:6]
    for name in models:
        assert name in panels["Preferred to SFT"][0] and (name in panels["Alignment tax"][0] or name in (
            "GPT", "GPT (prompted)", "rival GPT"))                     # a rival pays no tax
    assert len(panels["Preferred to SFT"][1] - {"#ddd", "black"}) == 10
    for title in TITLES[3:5]:                                          # what has no checkpoint has no dot
        assert {"DPO", "REINFORCE", "best of 9"} <= set(panels[title][0])
        assert "KTO" not in panels[title][0] and "rival GPT" not in panels[title][0]
    assert "DPO" in panels["Losses, nats"][0] and "DPO" not in panels_of(
        ig.picture(*drawn))["Losses, nats"][0]
    few = {k: models[k] for k in ("GPT", "SFT", "rival GPT")}
    assert "rival GPT: gold over SFT" in panels_of(ig.picture(few, history, best))


def test_picture_keeps_names_apart_inside_of_their_panel():
    for ys in ([0.] * 9 + [1.], [1.] * 9 + [0.], [0.5] * 10, list(range(10)), [0., 0., 0., 1., 1., 1.]):
        series = {f"{i}": [(0, 0), (1, 1), (2, y)] for i, y in enumerate(ys)}
        svg = "".join(ig.curves(series, dict.fromkeys(series, "000000")))
        names = [t for t in tree.fromstring(f"<g>{svg}</g>").iter("text") if t.get("x") == "240"]
        places = [float(t.get("y")) for t in names]
        assert all(b - a >= 15 for a, b in zip(places, places[1:])) and 40 < places[0] and places[-1] < 246
        ends = [ys[int(t.text)] for t in names]
        assert len(ends) == len(ys) and ends == sorted(ys, reverse=True)


def test_picture_leaves_out_what_has_no_numbers(drawn):
    models, history, best = drawn
    bare = {k: {f: x for f, x in m.items() if "gold" not in f and "win" not in f} for k, m in models.items()}
    no_gold = [{k: x for k, x in h.items() if k != "gold"} for h in history]
    best = {n: {k: x for k, x in b.items() if k != "gold"} for n, b in best.items()}
    assert list(panels_of(ig.picture(bare, no_gold, best))) == [TITLES[i] for i in (1, 2, 3, 6)]
    assert list(panels_of(ig.picture(bare, no_gold, {}))) == [TITLES[i] for i in (1, 2, 3, 6)]
    later = [h for h in history if h["stage"] not in ("pretrain", "sft", "rm")]          # a run with --from
    assert list(panels_of(ig.picture(models, later, best))) == TITLES[:2] + TITLES[3:]
    dots = panels_of(ig.picture(models, [], {}))                       # every model from another run
    assert list(dots) == TITLES[:2] + TITLES[3:] and "PPO" in dots["Reward against KL"][0]
    start = {k: models[k] for k in ("GPT", "GPT (prompted)", "SFT")}
    panels_of(ig.picture(start, [h for h in history if h["stage"] == "pretrain"][:1], {}))


def test_picture_survives_names_that_xml_cannot_hold(drawn):
    models, history, best = drawn
    evil = ["</text><script>", "&amp;\"'", "\0\x1b[0m\ufffe\ud800", "世" * 5000, "]]>"]
    models = {**models, **{name: models["PPO"] for name in evil}}
    use_cases = {**dict.fromkeys(evil, 1.0), **{f"u{i}": float(i) for i in range(40)}}
    models = {k: {**m, "gold_by_use_case": use_cases} for k, m in models.items()}
    history = history + [{**h, "stage": evil[0] + "\n"} for h in history if h["stage"] == "ppo"]
    svg = ig.picture(models, history, best)
    root = tree.fromstring(svg.encode())
    assert {e.tag.split("}")[1] for e in root.iter()} == {"svg", "g", "path", "text"}
    texts = [e.text or "" for e in root.iter(root.tag[:-3] + "text")]
    assert "</text><script>" in texts[:40] and max(map(len, texts)) <= 48
    assert [t for t in texts if t in use_cases and t[0] == "u"] == [f"u{i}" for i in range(5)]   # ten rows


def test_picture_means_over_stretches_and_takes_roots(drawn):
    """Twenty groups of three lines: in the root of KL their means lie on a straight line, evenly."""
    lines = [{"stage": "ppo", "step": i + 1, "k1": (i // 3) ** 2 - 1e-9 * (i == 1),
              "score": i // 3 + (i % 3 - 1) * (-1) ** (i // 3)} for i in range(60)]
    root = tree.fromstring(ig.picture(drawn[0], lines, {}))
    line, = [p.get("d") for p in root.iter(root.tag[:-3] + "path") if p.get("d").count("L") == 19]
    places = [tuple(map(float, place.split())) for place in line[1:].split("L")]
    for k in (0, 1):
        moves = [b[k] - a[k] for a, b in zip(places, places[1:])]
        assert max(moves) - min(moves) < 0.21 and (moves[0] > 8 if k == 0 else moves[0] < -8)


def test_readme_shows_a_picture_of_this_version():
    with open(os.path.join(DATA, "picture.svg"), encoding="utf-8") as f:
        assert list(panels_of(f.read())) == TITLES[:6]


def test_finished_stages_are_not_trained_again_and_evaluation_repeats_itself(smoke):
    out, _ = smoke
    before, stages = json.loads((out / "results.json").read_text()), Counter(
        json.loads(line)["stage"] for line in open_lines(out / "log.jsonl"))
    picture = (out / "picture.svg").read_text()
    with open(out / "log.jsonl", "a") as f:
        f.write(json.dumps({"stage": "rm", "step": 1, "loss": 100.}) + "\n")
    stages["rm"] += 1
    assert command("evaluate", "--smoke", "--device", "cpu", "--out", out).returncode == 0
    after = json.loads((out / "results.json").read_text())
    assert after["models"] == before["models"] and after["reward_model"] == before["reward_model"]
    again = Counter(json.loads(line)["stage"] for line in open_lines(out / "log.jsonl"))
    assert {k for k in again if again[k] != stages[k]} == {"evaluate"}
    lines = [json.loads(line) for line in open_lines(out / "log.jsonl")]   # the last of a step counts
    lines.remove(next(h for h in lines if h["stage"] == "rm" and h["step"] == 1))
    lines.sort(key=lambda h: h["step"])
    drawn = ig.picture(after["models"], lines, after["reward_model"]["best_of_n"])
    assert (out / "picture.svg").read_text() == drawn != picture


def open_lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_changed_setting_is_refused_by_name_and_from_reuses_the_rest(smoke, tmp_path):
    out, _ = smoke
    done = command("--smoke", "--device", "cpu", "--out", out, "--beta", 0.5)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in ("beta", "0.5", "ppo, evaluate", "--from", "--fresh"))
    new = tmp_path / "new"
    other = ["--from", out, "--out", new, "--beta", 0.5, "--ptx_coef", 0]
    done = command("ppo", "--smoke", "--device", "cpu", *other)
    assert done.returncode == 0, done.stderr
    assert {json.loads(line)["stage"] for line in open_lines(new / "log.jsonl")} == {"ppo"}
    assert (new / "rm.pt").read_bytes() == (out / "rm.pt").read_bytes() and not (new / "ppo_ptx.pt").exists()


@pytest.mark.parametrize("words, told", [
    (["--bta", "1"], "--bta"), (["--beta", "x"], "--beta"), (["--beta", "-1"], "beta"), (["dpo"], "dpo"),
    (["--k_min", "1"], "k_min"), (["--temperature", "0"], "temperature"), (["--device", "tpu"], "tpu"),
    (["--n_embd", "30", "--n_head", "4"], "n_embd"), (["--max_new_tokens", "64"], "max_new_tokens"),
    (["--data", "nowhere"], "nowhere"), (["--from", "nowhere"], "nowhere"),
    (["--episodes", "4"], "--minibatches 8: must lie in 1 to 4"), (["--iterations", "0"], "iterations"),
    (["--warmup", "-1"], "warmup"), (["--ptx_rows", "0"], "ptx_rows"), (["--sft_lr", "0"], "sft_lr"),
    (["--beta", "nan"], "beta"), (["--rm_lr", "inf"], "rm_lr"), (["--seed", "-1"], "seed"),
    (["--beta", "-0.1"], "--beta -0.1: must lie in 0 to"), (["--k_max", "3"], "--k_max 3: must lie in 4 to"),
    (["--device", "cuda:99"], "cuda:99"), (["--device", "cpu:x"], "cpu:x"), (["--dtype", "float16"], "dtype"),
    (["--micro_batch", "-1"], "micro_batch"),
    (["--device", "cpu", "--dtype", "bfloat16"], "only on a CUDA GPU"),
    (["--temperature", "-1"], "temperature"), (["--save_every", "-1"], "save_every"), (["--ema", "2"], "ema"),
    (["--block_size", "20"], "block_size")])
def test_wrong_flags_get_one_line_and_exit_code_2(words, told, capsys, tmp_path):
    assert ig.main([*words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error and "Traceback" not in error
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_every_setting_is_a_flag_with_help_and_a_stage():
    for f in fields(ig.Config):
        assert f.metadata["help"] and f.metadata["stage"] in ["run", *ig.STAGES]
        value = {str: "x", int: 2, float: 0.5}[type(f.default)]
        given = {"k_min": 4, "episodes": 16, "block_size": 96, "dtype": "bfloat16"}.get(f.name, value)
        extra = {"k_max": ["--k_min", "2"]}.get(f.name, [])
        assert getattr(ig.parse([f"--{f.name}", str(given), *extra])[1], f.name) == given


def test_bad_probes_and_comparisons_of_a_finished_run_get_one_line(smoke, tmp_path):
    shutil.copytree(DATA, tmp_path / "data")
    (tmp_path / "data" / "probes.json").write_text("{}")
    for path in shutil.copytree(smoke[0], tmp_path / "out") and (tmp_path / "out").glob("*.pt"):
        c = ig.load(str(path))
        c["settings"]["data"] = str(tmp_path / "data")                 # as if it had been trained on these
        torch.save(c, path)
    done = command("evaluate", "--smoke", "--device", "cpu", "--out", tmp_path / "out", "--data",
                   tmp_path / "data")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "probes.json:1: truthful must be list, is missing" in done.stderr
    rows = ig.read_jsonl(str(smoke[0] / "comparisons.jsonl"), ig.comparison)
    assert {row["split"] for row in rows if "second_ranks" not in row} == {"train"}
    assert {row["split"] for row in rows if "second_ranks" in row} == {"valid"}


def test_data_card_counts_are_the_files(sets):
    with open(os.path.join(DATA, "README.md"), encoding="utf-8") as f:
        card = f.read().splitlines()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in card if line.startswith("|")]
    rows = [row for row in rows if ".jsonl`" in row[0] and len(row) == 6]              # the table of sizes
    assert len(rows) == 4
    for name, train, valid, *_ in rows:
        for split, count in (("train", train), ("valid", valid)):
            if count:
                key = name.split("`")[1].replace("*", split).removesuffix(".jsonl")
                assert len(sets[key]) == int(count.replace(",", "")), key


# ------------------------------------------------------------------------------------------------------------
# A user's own data, preferences, methods and rivals

FAST = ("--device cpu --n_layer 1 --n_head 2 --n_embd 16 --pretrain_steps 20 --pretrain_batch 4 "
        "--sft_epochs 1 --rm_prompts 30 --iterations 2 --episodes 16 --minibatches 2 --test_prompts 12 "
        "--judges 1").split()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def own(tmp_path_factory, sets):
    """A folder of a user's own data, in the field's formats, without the toy world."""
    folder, demos = tmp_path_factory.mktemp("own"), sets["sft_train"][:80]
    for name in ("vocab.tiktoken", "pretrain_valid.txt"):
        shutil.copy(os.path.join(DATA, name), folder)
    shutil.copy(os.path.join(DATA, "pretrain_valid.txt"), folder / "pretrain.txt")
    write_rows(folder / "sft_train.jsonl", [
        {"prompt": d["prompt"], "completion": d["completion"]} if i % 2 else
        {"messages": [{"role": "user", "content": d["prompt"]},
                      {"role": "assistant", "content": d["completion"]}]} for i, d in enumerate(demos)])
    write_rows(folder / "comparisons.jsonl", [
        {"prompt": f"Who has key {i // 2}?", "chosen": "Tom has it.", "rejected": f"the {i}"} if i % 3 else
        {"prompt": f"Who has key {i // 2}?", "responses": ["I do.", "no", "Tom."], "ranks": [1, 2, 1]}
        for i in range(40)])
    for name in ("ppo_train.jsonl", "test.jsonl"):
        write_rows(folder / name, [{"prompt": d["prompt"]} for d in demos])
    return folder


def test_own_data_train_and_are_judged_by_a_second_reward_model(own, tmp_path, capsys):
    out = tmp_path / "out"
    assert ig.main([*FAST, "--data", str(own), "--out", str(out), "--methods", "dpo", "best_of_n"]) == 0
    text, r = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    assert "a second reward model, trained on the held-out comparisons" in text
    assert not list(out.glob("*.part"))
    assert list(r["models"]) == ["GPT", "SFT", "PPO", "PPO-ptx", "DPO", "best of 9"]
    assert r["models"]["SFT"]["win_vs_sft"] == 0.5 and set(r["reward_model"]) >= {"accuracy"}
    assert all("gold" not in m and m["pretrain_loss"] > 0 and 0 <= m["win_vs_sft"] <= 1
               for m in r["models"].values())
    assert not (out / "comparisons.jsonl").exists()                    # given, so none were collected
    assert "gold" not in text.replace("gold     true quality", "").replace("rise with score", "")
    stages = Counter(json.loads(line)["stage"] for line in open_lines(out / "log.jsonl"))
    assert "collect" not in stages and stages["judge"] == 2 and stages["rm"] == 4     # 5 and 15 of 20 prompts
    drawn = (out / "picture.svg").read_bytes()
    again = [*FAST, "evaluate", "--data", str(own), "--out", str(out), "--methods", "dpo", "best_of_n"]
    assert ig.main(again) == 0 and (out / "picture.svg").read_bytes() == drawn     # the judge's losses too
    assert json.loads((out / "results.json").read_text())["models"] == r["models"]


def test_own_datas_judge_calls_equal_answers_a_tie_whatever_rounding_says(own, tmp_path, monkeypatch):
    run = ig.Run(ig.Config(data=str(own), out=str(tmp_path), device="cpu"), None, False)
    run.tests, model = [{"prompt": "a"}] * 3, ig.freeze(tiny("scalar"))
    monkeypatch.setattr(run, "model", lambda name: model)
    monkeypatch.setattr(ig, "train_reward_model", lambda *_: model)
    scores = iter([[0.5, 0.5, 0.7], [0.5000001, 0.5000001, 0.6]])
    monkeypatch.setattr(ig, "reward_and_kl", lambda *_: (next(scores), None))
    answers = lambda *texts: [{"text": text, "ended": True} for text in texts]
    assert run.judge()(answers("x", "y", "z"), answers("x", "Y", "Z")) == [0.5, 0.0, 1.0]


def test_held_out_comparisons_share_no_prompt_with_the_training_ones(own, tmp_path):
    run = ig.Run(ig.Config(data=str(own), out=str(tmp_path), device="cpu"), None, False)
    train, valid = ({c["prompt"] for c in run.comparisons(split)} for split in ("train", "valid"))
    assert (len(train), len(valid)) == (15, 5) and not train & valid


def test_own_split_of_comparisons_is_kept(own, tmp_path):
    path = tmp_path / "c.jsonl"
    write_rows(path, [{**c, "split": "valid" if i < 3 else "train"} for i, c in enumerate(COMPARED)])
    cfg = ig.Config(data=str(own), comparisons=str(path), out=str(tmp_path), device="cpu")
    run = ig.Run(cfg, None, False)
    assert [c["prompt"] for c in run.comparisons("valid")] == [c["prompt"] for c in COMPARED[:3]]


@pytest.mark.parametrize("change, told", [
    (lambda folder: (folder / "comparisons.jsonl").unlink(), "--comparisons"),
    (lambda folder: write_rows(folder / "comparisons.jsonl", COMPARED[:3]), "at least four"),
    (lambda folder: write_rows(folder / "comparisons.jsonl", COMPARED[3:]), "unequal text and rank"),
    (lambda folder: (folder / "test.jsonl").unlink(), "test.jsonl"),
    (lambda folder: write_rows(folder / "comparisons.jsonl", [
        {"prompt": f"a {i}", "chosen": "hat " * 40, "rejected": "no"} for i in range(9)]), "9 of 9 rows"),
    (lambda folder: (folder / "pretrain.txt").unlink(), "pretrain.txt"),
    (lambda folder: (folder / "vocab.tiktoken").unlink(), "vocab.tiktoken")])
def test_own_data_that_lack_something_get_one_line(own, change, told, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(own, folder)
    change(folder)
    assert ig.main([*FAST, "--data", str(folder), "--out", str(tmp_path / "out"), "--ptx_coef", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error and not list((tmp_path / "out").glob("*.tmp"))
    assert told in ("pretrain.txt", "vocab.tiktoken") or not (tmp_path / "out" / "pretrain.pt").exists()


def test_own_comparisons_with_a_long_response_are_left_out_and_counted(own, tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    write_rows(path, [*COMPARED, {"prompt": "a", "chosen": "hat " * 40, "rejected": "no", "use_case": [0]}])
    cfg = ig.Config(data=str(own), comparisons=str(path), out=str(tmp_path), device="cpu")
    run = ig.Run(cfg, None, False)
    assert len(run.comparisons("train")) == 3 and "1 of 5 rows" in capsys.readouterr().out


def test_own_comparisons_keep_a_sampled_response_that_did_not_end(enc, own, tmp_path):
    text = "The cat is in the barn. The dog is in the park. Where"             # 16 tokens and more
    ids = enc.encode_ordinary(" " + text)[:16]
    full = enc.decode(ids).removeprefix(" ")
    rows = [{"prompt": f"a {i}", "responses": [full, "no"], "ranks": [2, 1], "ended": [i > 1, True],
             "split": "train"} for i in range(4)]
    write_rows(tmp_path / "c.jsonl", rows)
    cfg = ig.Config(data=str(own), comparisons=str(tmp_path / "c.jsonl"), out=str(tmp_path), device="cpu")
    kept = [c["prompt"] for c in ig.Run(cfg, None, False).comparisons("train")]
    assert len(ids) == 16 and kept == ["a 0", "a 1"]                           # with its end it would be 17


def test_own_comparisons_in_the_folder_of_the_run_are_not_overwritten(own, tmp_path, capsys):
    folder = shutil.copytree(own, tmp_path / "mine")
    before = (folder / "comparisons.jsonl").read_bytes()
    for words in (["--data", str(folder), "--out", str(folder), "--fresh"],
                  ["--out", str(folder), "--comparisons", str(folder / "comparisons.jsonl")]):
        assert ig.main(["rm", "--smoke", "--device", "cpu", *words]) == 2
        assert "the run would write over" in capsys.readouterr().err
        assert (folder / "comparisons.jsonl").read_bytes() == before


def test_own_comparisons_edited_without_a_change_of_size_are_another_file(own, tmp_path):
    path = tmp_path / "c.jsonl"
    write_rows(path, COMPARED)
    cfg = ig.Config(data=str(own), comparisons=str(path), out=str(tmp_path / "out"), device="cpu")
    run = ig.Run(cfg, None, False)
    before, size = run.settings("rm"), path.stat().st_size
    path.write_text(path.read_text().replace('"ranks": [1, 2', '"ranks": [2, 1'))
    assert path.stat().st_size == size and ig.change({"settings": before}, run.settings("rm"))


@pytest.mark.parametrize("rows", [
    [{"prompt": f"a {i}", "responses": ["x", "x"], "ranks": [1, 2], "ended": [True, True]} for i in range(9)],
    [{"prompt": f"a {i}", "responses": ["x", "y"], "ranks": [1, 1]} for i in range(9)]])
def test_own_comparisons_without_a_pair_to_learn_from_are_refused(rows, own, tmp_path):
    write_rows(tmp_path / "c.jsonl", rows)
    cfg = ig.Config(data=str(own), comparisons=str(tmp_path / "c.jsonl"), out=str(tmp_path), device="cpu")
    with pytest.raises(ig.UserError, match="c.jsonl: no answers of unequal text and rank for the split"):
        ig.Run(cfg, None, False).comparisons("train")


def test_rows_left_out_are_told_once(own, tmp_path, capsys):
    write_rows(tmp_path / "c.jsonl", [*COMPARED, {"prompt": "a", "chosen": "hat " * 40, "rejected": "no"}])
    cfg = ig.Config(data=str(own), comparisons=str(tmp_path / "c.jsonl"), out=str(tmp_path), device="cpu")
    run = ig.Run(cfg, None, False)
    assert run.comparisons("train") == run.comparisons("train")
    assert capsys.readouterr().out.count("left out") == 1


@pytest.mark.parametrize("name, lines, told", [
    ("pretrain_valid.txt", "short", "pretrain_valid.txt: holds fewer than"),
    ("ppo_train.jsonl", "{}", "ppo_train.jsonl:1: ")])
def test_what_comes_late_is_read_before_the_training(name, lines, told, own, tmp_path, capsys):
    folder, out = shutil.copytree(own, tmp_path / "mine"), tmp_path / "out"
    (folder / name).write_text(lines)
    assert ig.main([*FAST, "--data", str(folder), "--out", str(out)]) == 2
    assert told in capsys.readouterr().err and not list(out.glob("*.pt"))


def test_checkpoint_of_other_settings_stops_the_run_before_the_training(smoke, tmp_path, capsys):
    out = shutil.copytree(smoke[0], tmp_path / "out")
    (out / "ppo.pt").unlink()
    assert ig.main(["--smoke", "--device", "cpu", "--out", str(out), "--ptx_coef", "0"]) == 2
    assert "ppo_ptx.pt was made with ptx_coef" in capsys.readouterr().err and not (out / "ppo.pt").exists()


def test_probes_too_long_for_the_context_are_told_before_the_training(tmp_path, capsys):
    out, path = tmp_path / "out", rank_file(tmp_path / "bytes", [])[0]
    assert ig.main(["--smoke", "--device", "cpu", "--encoding", path, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--block_size" in error and not (out / "pretrain.pt").exists()


def test_own_data_without_text_train_without_the_mixes(own, tmp_path, capsys):
    folder, out = tmp_path / "data", str(tmp_path / "out")
    shutil.copytree(own, folder)
    assert ig.main(["pretrain", *FAST, "--data", str(folder), "--out", out]) == 0
    (folder / "pretrain.txt").unlink()
    (folder / "pretrain_valid.txt").unlink()
    words = [*FAST, "--data", str(folder), "--out", out, "--sft_mix", "0", "--ptx_coef", "0"]
    assert ig.main(words) == 0, capsys.readouterr().err
    models = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    assert list(models) == ["GPT", "SFT", "PPO"] and "pretrain_loss" not in models["PPO"]


def test_given_comparisons_train_the_reward_model_in_the_toy_world(smoke, tmp_path, capsys):
    """As `label` writes them: none are collected but those that validate, and more lines are another file."""
    path, out = tmp_path / "labels.jsonl", str(tmp_path / "out")
    write_rows(path, COMPARED)
    words = ["rm", "--smoke", "--device", "cpu", "--out", out, "--comparisons", str(path)]
    assert ig.main([*words, "--from", str(smoke[0])]) == 0
    split = [json.loads(line)["split"] for line in open_lines(tmp_path / "out" / "comparisons.jsonl")]
    assert set(split) == {"valid"} and len(split) == 30
    run = ig.Run(ig.Config(comparisons=str(path), out=out, device="cpu"), None, False)
    assert [c["prompt"] for c in run.comparisons("train")] == [c["prompt"] for c in COMPARED]
    assert "rm " in capsys.readouterr().out
    assert ig.main(words) == 0                                         # finished: nothing to do
    write_rows(path, COMPARED * 2)
    capsys.readouterr()
    assert ig.main(words) == 2 and "labels.jsonl" in capsys.readouterr().err
    assert ig.main([*words[:-1], str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err


def test_methods_stand_in_the_table_beside_a_rival(smoke, tmp_path, capsys):
    out, rival = tmp_path / "out", tmp_path / "rival"
    shutil.copytree(smoke[0], out)
    words = ["--smoke", "--device", "cpu"]
    assert ig.main(["pretrain", *words, "--n_embd", "96", "--pretrain_steps", "20", "--out", str(rival)]) == 0
    words += ["evaluate", "--test_prompts", "30", "--out", str(out)]
    assert ig.main([*words, "--methods", "reinforce", "dpo", "kto", "best_of_n", "--rival", str(rival)]) == 0
    text, r = capsys.readouterr().out, json.loads((out / "results.json").read_text())["models"]
    assert list(r) == ["GPT", "GPT (prompted)", "SFT", "PPO", "PPO-ptx", "REINFORCE", "DPO", "KTO",
                       "best of 9", "rival GPT"]
    table = text[text.index("preferred"):]
    assert all(name in table for name in r) and "rival" in table.splitlines()[1]
    assert r["rival GPT"]["parameters"] > 1.5 * r["PPO-ptx"]["parameters"]
    assert r["rival GPT"]["win_vs_rival"] == 0.5 and 0 <= r["PPO-ptx"]["win_vs_rival"] <= 1
    assert r["best of 9"]["reward"] > r["SFT"]["reward"] + 0.1
    assert r["best of 9"]["kl"] == pytest.approx(math.log(9) - 8 / 9)
    assert r["SFT"] == {**r["SFT"], "win_vs_sft": 0.5, "win_vs_sft_gold": 0.5}
    reinforce = [json.loads(line) for line in open_lines(out / "log.jsonl")]
    assert sum(line["stage"] == "reinforce" for line in reinforce) == 4


def test_a_model_is_measured_alike_whoever_stands_beside_it(smoke, tmp_path):
    """The judges' luck belongs to the pair of models, not to their order."""
    out = tmp_path / "out"
    shutil.copytree(smoke[0], out)
    before = json.loads((out / "results.json").read_text())["models"]
    (out / "ppo.pt").unlink()
    assert ig.main(["evaluate", "--smoke", "--device", "cpu", "--out", str(out)]) == 0
    after = json.loads((out / "results.json").read_text())["models"]
    assert list(after) == ["GPT", "GPT (prompted)", "SFT", "PPO-ptx"]
    assert after == {k: v for k, v in before.items() if k != "PPO"}


def test_rival_of_other_data_or_without_a_checkpoint_is_refused(smoke, tmp_path, capsys):
    words = ["evaluate", "--smoke", "--device", "cpu", "--out", str(smoke[0]), "--rival"]
    assert ig.main([*words, str(tmp_path)]) == 2 and "holds no pretrain.pt" in capsys.readouterr().err
    c = ig.load(str(smoke[0] / "pretrain.pt"))
    ig.save(str(tmp_path / "pretrain.pt"), {**c, "settings": {**c["settings"], "data": "mine"}})
    assert ig.main([*words, str(tmp_path)]) == 2 and "made with data 'mine'" in capsys.readouterr().err
    ig.save(str(tmp_path / "pretrain.pt"), {**c, "config": {**c["config"], "block_size": 32}})
    assert ig.main([*words, str(tmp_path)]) == 2 and "smaller --block_size" in capsys.readouterr().err
    assert ig.main([*words, "nowhere"]) == 2 and "--rival nowhere" in capsys.readouterr().err
    assert ig.main([*words, str(smoke[0]), "--fresh"]) == 2                # would delete the rival
    assert "is --out, which --fresh empties" in capsys.readouterr().err and (smoke[0] / "pretrain.pt").exists()


def test_evaluation_of_a_run_that_trained_nothing_itself(smoke, tmp_path):
    words = ["evaluate", "--smoke", "--device", "cpu", "--judges", "3", "--from", str(smoke[0])]
    assert ig.main([*words, "--out", str(tmp_path / "out")]) == 0
    r = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    before = json.loads((smoke[0] / "results.json").read_text())["models"]
    assert list(r) == list(before) and r["SFT"]["gold"] == before["SFT"]["gold"]


# ------------------------------------------------------------------------------------------------------------
# Killed, interrupted, broken: nothing is lost, nothing lies

TINY = ("--smoke --device cpu --n_embd 32 --pretrain_steps 40 --pretrain_batch 8 --rm_prompts 80 "
        "--iterations 5 --episodes 16 --minibatches 2 --test_prompts 30 --sft_dropout 0.1 "
        "--save_every 0").split()


@contextlib.contextmanager
def running(out, *words):
    """The command, on its way; what it says on stderr goes to OUT.err."""
    script, one_thread = os.path.join(HERE, "instructgpt.py"), {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(f"{out}.err", "w") as err, subprocess.Popen(
            [sys.executable, script, *map(str, words), "--out", out], stdout=subprocess.DEVNULL, stderr=err,
            env=one_thread) as process:
        yield process


def until_it_logs(process, out):
    """Waits until the process has written to its log, or has ended; the stage that it is in."""
    log = out / "log.jsonl"
    size = lambda: log.stat().st_size if log.exists() else 0
    before = size()
    while size() == before and process.poll() is None:
        time.sleep(0.002)
    return json.loads(log.read_text().rsplit("\n", 2)[-2])["stage"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = command(*TINY, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def assert_same_run(a, b):
    one, two = (json.loads((out / "results.json").read_text()) for out in (a, b))
    for r in (one, two):
        r.pop("seconds"), r["config"].pop("out"), r["config"].pop("device")
    assert one == two
    assert (a / "comparisons.jsonl").read_bytes() == (b / "comparisons.jsonl").read_bytes()
    for name in ("pretrain", "sft", "rm", "ppo", "ppo_ptx"):
        x, y = (ig.load(str(out / f"{name}.pt"))["weights"] for out in (a, b))
        assert all(torch.equal(x[k], y[k]) for k in x), name
    assert not list(b.glob("*.part"))


def test_run_killed_again_and_again_ends_like_one_that_was_not(whole, tmp_path):
    out, rng, kills = tmp_path / "out", random.Random(0), Counter()
    for stage in 2 * ["pretrain", "sft", "collect", "rm", "ppo", "ppo_ptx", "evaluate"]:
        with running(out, *TINY) as process:
            while until_it_logs(process, out) != stage and process.poll() is None and not kills[stage]:
                pass                                                   # the second time: wherever it is
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
        assert process.returncode in (0, -signal.SIGKILL), open_lines(tmp_path / "out.err")
        kills[until_it_logs(process, out)] += process.returncode != 0
    assert sum(kills.values()) >= 10 and len(kills) >= 6, kills
    assert command(*TINY, "--out", out).returncode == 0
    assert_same_run(whole, out)


def test_same_command_twice_gives_the_same_numbers_and_fresh_starts_over(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    os.remove(out / "ppo.pt")
    assert command(*TINY, "--out", out, "--fresh").returncode == 0
    assert_same_run(whole, out)


def test_fresh_leaves_nothing_of_the_old_run_and_finished_stages_no_parts(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("mine.pt", "rm.part", "sft.part", "collect.part"):
        shutil.copy(out / "rm.pt", out / name)
    assert command("sft", *TINY, "--out", out).returncode == 0
    assert not (out / "sft.part").exists() and (out / "rm.part").exists()          # rm was not looked at
    assert command("pretrain", *TINY, "--out", out, "--fresh").returncode == 0
    assert sorted(p.name for p in out.glob("*.p*t*")) == ["mine.pt", "pretrain.pt"]
    assert not (out / "comparisons.jsonl").exists()
    assert {json.loads(line)["stage"] for line in open_lines(out / "log.jsonl")} == {"pretrain"}


def test_interrupt_saves_says_where_and_goes_on(whole, tmp_path):
    out = tmp_path / "out"
    with running(out, "pretrain", *TINY, "--save_every", 1e9) as process:          # only Ctrl-C saves
        until_it_logs(process, out)
        process.send_signal(signal.SIGINT)
    step, said = ig.load(str(out / "pretrain.part"))["step"], (tmp_path / "out.err").read_text()
    assert process.returncode == 130 and 10 <= step < 40 and f"goes on after pretrain, step {step}" in said
    again = command("pretrain", *TINY, "--out", out)
    assert again.returncode == 0 and f"pretrain: goes on after step {step} of 40" in again.stdout
    x, y = (ig.load(str(o / "pretrain.pt"))["weights"] for o in (out, whole))
    assert all(torch.equal(x[k], y[k]) for k in x)


def test_begun_stage_of_other_settings_is_refused(whole, tmp_path):
    out = tmp_path / "out"
    with running(out, "pretrain", *TINY) as process:
        until_it_logs(process, out)
        process.kill()
    done = command("pretrain", *TINY, "--pretrain_lr", 0.5, "--out", out)
    assert done.returncode == 2 and "pretrain_lr 0.002, now pretrain_lr is 0.5" in done.stderr
    part = ig.load(str(out / "pretrain.part"))
    part["settings"]["device"] = "cuda"                                # its generators live there
    torch.save(part, out / "pretrain.part")
    done = command("pretrain", *TINY, "--out", out)
    assert done.returncode == 2 and "begun with device 'cuda', now device is 'cpu'" in done.stderr
    assert command("pretrain", *TINY, "--pretrain_lr", 0.5, "--out", out, "--fresh").returncode == 0


def test_a_change_of_settings_is_named_and_smoke_by_its_name():
    cfg, stages = vars(ig.Config()), ("pretrain_steps", "pretrain_batch", "n_embd", "beta")
    now, smoke = {k: cfg[k] for k in stages}, {"settings": {**cfg, **ig.SMOKE}}
    assert ig.change({"settings": cfg}, now) == "" and ig.change(smoke, now) == "--smoke, now it is not given"
    assert ig.change({"settings": {**cfg, "n_embd": 64}}, now) == "n_embd 64, now n_embd is 128"
    smoke["settings"]["beta"] = 0.1
    assert "--smoke" not in ig.change(smoke, now) and ig.change(smoke, {**now, "n_embd": 64}) != ""


def one_line(done, *told, code=2):
    assert done.returncode == code and done.stderr.count("\n") == 1, done.stderr
    assert all(x in done.stderr for x in told), done.stderr


def test_checkpoints_older_than_a_setting_are_taken_as_made_with_its_default(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    c = ig.load(str(out / "sft.pt"))
    del c["settings"]["init"], c["settings"]["encoding"]
    torch.save(c, out / "sft.pt")
    log = (out / "log.jsonl").read_bytes()
    assert command("sft", *TINY, "--out", out).returncode == 0 and (out / "log.jsonl").read_bytes() == log
    done = command("sft", *TINY, "--out", out, "--encoding", os.path.join(DATA, "vocab.tiktoken"))
    one_line(done, "sft.pt was made with encoding '', now encoding is ")


def test_full_disk_is_one_line_and_the_last_checkpoint_stays(whole, tmp_path):
    resource = pytest.importorskip("resource")
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(whole / "pretrain.pt", out)
    before, limit = (out / "pretrain.pt").read_bytes(), 20_000        # no file may grow beyond it
    script = os.path.join(HERE, "instructgpt.py")
    words = [sys.executable, script, "sft", *TINY, "--out", out]
    done = subprocess.run(words, text=True, capture_output=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    one_line(done, "too large", "sft.part", "whole")
    assert (out / "pretrain.pt").read_bytes() == before and not list(out.glob("sft*"))
    assert command("sft", *TINY, "--out", out).returncode == 0


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    one_line(command(*TINY, "--out", tmp_path / "file" / "out"), "file")
    one_line(command(*TINY, "--out", tmp_path / "file"), "file")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_flipped_bytes_in_a_checkpoint_are_found(whole, tmp_path):
    data, path = bytearray((whole / "pretrain.pt").read_bytes()), tmp_path / "pretrain.pt"
    for at in (len(data) // 3, len(data) // 2):                        # among the weights
        path.write_bytes(bytes([*data[:at], data[at] ^ 1, *data[at + 1:]]))
        with pytest.raises(ig.UserError, match="pretrain.pt: damaged"):
            ig.load(str(path))
    path.write_bytes(data)
    assert ig.load(str(path))["weights"]


def test_comparisons_that_were_removed_are_missed_before_the_evaluation(smoke, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(smoke[0], out)
    (out / "comparisons.jsonl").unlink()
    capsys.readouterr()
    assert ig.main(["evaluate", "--smoke", "--device", "cpu", "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "comparisons.jsonl: is missing; remove rm.pt too" in said.err
    (out / "rm.pt").unlink(), (out / "log.jsonl").unlink()
    assert ig.main(["rm", "--smoke", "--device", "cpu", "--out", str(out)]) == 0
    again, before = (ig.load(str(o / "rm.pt"))["weights"] for o in (out, smoke[0]))
    assert all(torch.equal(again[k], before[k]) for k in before)       # as it was


@pytest.mark.parametrize("name", ["pretrain.pt", "sft.part"])
def test_foreign_checkpoints_are_one_line_and_never_executed(whole, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, path = (whole / "pretrain.pt").read_bytes(), tmp_path / name
    torch.save(Evil(), tmp_path / "evil"), torch.save({"format": 1}, tmp_path / "bare")
    torch.save([1, 2], tmp_path / "list"), torch.save({"format": 99, "settings": {}}, tmp_path / "new")
    foreign = {"pickle": pickle.dumps(Evil()), "text": b"hello", "empty": b"", "zip": b"PK\3\4" + b"x" * 99,
               **{x: (tmp_path / x).read_bytes() for x in ("evil", "bare", "list", "new")},
               **{f"first {n}": good[:n] for n in (1, 100, 5000, len(good) // 2, len(good) - 1)}}
    for what, data in foreign.items():
        path.write_bytes(data)
        with pytest.raises(ig.UserError) as e:
            ig.load(str(path))
        assert str(path) in str(e.value) and "\n" not in str(e.value), what
        assert ("version" if what in ("bare", "new") else "remove it") in str(e.value), what
    assert not os.path.exists("executed")


def test_foreign_checkpoint_in_a_run(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    c = ig.load(str(out / "sft.pt"))
    for broken in ({**c, "weights": {"x": torch.zeros(1)}}, {**c, "config": {"n_layer": 1}},
                   {k: v for k, v in c.items() if k != "head"}):
        torch.save(broken, out / "sft.pt")
        one_line(command("sft", *TINY, "--out", out), "sft.pt", "remove it")
    torch.save({**c, "state": {"model": 1}, "step": 1, "rng": 0}, out / "sft.part")
    os.remove(out / "sft.pt")
    one_line(command("sft", *TINY, "--out", out), "sft.part", "remove it")
    os.remove(out / "sft.part")
    assert command("sft", *TINY, "--out", out).returncode == 0


def test_cut_line_of_the_log_does_not_stop_a_run(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    with open(out / "log.jsonl", "a") as f:
        f.write('{"stage": "ppo", "ste')
    assert command("evaluate", *TINY, "--out", out).returncode == 0
    assert_same_run(whole, out)


# Numbers that go wrong


def test_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path):
    done = command("pretrain", *TINY, "--pretrain_lr", 1e9, "--out", tmp_path / "out")
    one_line(done, "pretrain, step", "became", "pretrain.part", "learning rate", code=1)
    step = int(done.stderr.split("step ")[1].split(":")[0])
    part = ig.load(str(tmp_path / "out" / "pretrain.part"))
    assert part["step"] == step - 1 and not (tmp_path / "out" / "pretrain.pt").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_losses_gradients_and_scores_are_named(bad, enc, sets):
    model = tiny()
    optimizer, before = ig.adamw(model, 0.1), weights(model)
    with pytest.raises(ig.NotFinite, match="the loss became"):
        ig.accumulate(lambda i: weights(model).sum() * 0 + bad, torch.ones(1))
    ig.lm_loss(model, torch.arange(6)[None]).backward()
    model.h[1].mlp.c_fc.weight.grad[2, 3] = bad
    with pytest.raises(ig.NotFinite, match="the gradient's norm became"):
        ig.clip_and_step(model, optimizer, 0.1)
    assert torch.equal(weights(model), before)                         # no step was made
    policy, reward_model = small_models(enc)
    with torch.no_grad():
        reward_model.head.bias.fill_(bad)
    with pytest.raises(ig.NotFinite, match="a score of the reward model became"):
        prompts = [p["ids"] for p in small_prompts(enc, sets, 16)]
        ig.make_experience(ig.Config(**SMALL), enc, policy, reward_model, policy, reward_model, prompts,
                           seeded(1))


def test_log_says_which_knob_to_turn_once(enc, sets, small_corpus, tmp_path, capsys):
    cfg = ig.Config(**SMALL, out=str(tmp_path), policy_lr=3.0, warmup=0)
    policy, reward_model = small_models(enc)
    log = ig.Log(replace(cfg, iterations=6), enc, tw)
    ig.ppo(replace(cfg, iterations=6), enc, policy, reward_model, small_prompts(enc, sets), small_corpus, 0.0,
           torch.device("cpu"), log)
    text = capsys.readouterr().out
    assert text.count("--policy_lr") in (1, 2) and text.count("--max_new_tokens") == 1


# Edge shapes


def test_edge_vocabulary_of_gpt2():
    torch.manual_seed(0)
    model = ig.GPT(ig.GPTConfig(50257, 32, 1, 2, 16, gelu="tanh"))
    r = ig.rollout(model, [[50256], [1, 50000]], 8, 50256, 1.0, seeded(0))
    assert r.tokens.max() > 511 and r.tokens.max() < 50257
    close(ig.token_logprobs(model, r.tokens)[r.mask], r.logprobs[r.mask], atol=1e-4, rtol=1e-5)


def test_edge_comparisons_of_2_and_of_9_in_one_batch(enc):
    _, reward_model = small_models(enc)
    words = ["moo", "woof", "quack", "meow", "yes", "no", "red", "blue", "green"]
    c = lambda k: {"prompt": "What does a cow say?", "responses": [f"{w}." for w in words[:k]],
                   "ranks": list(range(1, k + 1)), "ended": [True] * k}
    mixed = [ig.encode_comparison(enc, c(k), 8) for k in (2, 9)]
    loss = ig.reward_loss(*ig.score_comparisons(reward_model, mixed, "cpu"))
    alone = [ig.reward_loss(*ig.score_comparisons(reward_model, [x], "cpu")) for x in mixed]
    close(loss, sum(alone) / 2)


def test_edge_batch_of_one_episode_prompt_and_response_of_one_token(enc):
    policy, reward_model = small_models(enc)
    cfg = ig.Config(**{**SMALL, "max_new_tokens": 1, "episodes": 1, "minibatches": 1})
    actor, critic = ig.copy_of(policy), ig.copy_of(reward_model)
    e = ig.make_experience(cfg, enc, policy, critic, policy, reward_model, [[5]], seeded(0))
    optimizers = ig.adamw(actor, 0.1), ig.adamw(critic, 0.1)
    got = ig.update(cfg, actor, critic, optimizers, e, torch.arange(1), 0.0, None, 1.0)
    assert e["tokens"].shape == (1, 2) and e["advantages"].tolist() == [[0.0]]     # one whitened number: 0
    assert all(math.isfinite(v) for v in got.values())


@pytest.mark.parametrize("eos", ["at once", "never"])
def test_edge_everybody_ends_at_once_or_nobody_does(enc, eos):
    policy, reward_model = small_models(enc)
    with torch.no_grad():                        # the tied head answers with the row of largest norm
        policy.wte.weight.zero_()
        policy.ln_f.bias.fill_(1.0)
        policy.wte.weight[7 if eos == "never" else enc.eot_token] = 9.0
    prompts, cfg = [[1, 2, 3], [4], [5] * 42], ig.Config(**SMALL)
    e = ig.make_experience(cfg, enc, policy, reward_model, policy, reward_model, prompts, seeded(0))
    assert e["ended"].all() == (eos != "never") and e["mask"].sum(1).tolist() == ([6] * 3 if eos == "never"
                                                                                  else [1] * 3)
    assert e["tokens"].shape[1] == 48                                  # longest prompt + response = block
    assert all(x.isfinite().all() for x in e.values() if isinstance(x, torch.Tensor))
    if eos == "never":
        assert (e["scores"] == cfg.unfinished_score).all()


def test_edge_one_thread_and_two_agree():
    torch.manual_seed(0)
    model = ig.GPT(ig.GPTConfig(512, 64, 2, 2, 128))                   # wide enough to be shared out
    tokens, runs = torch.randint(512, (32, 64), generator=seeded(0)), []
    prompts = torch.randint(512, (32, 20), generator=seeded(1)).tolist()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model.zero_grad()
        loss = ig.accumulate(lambda i: ig.lm_loss(model, tokens[i]), torch.ones(32))
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        runs.append((loss, gradient, ig.rollout(model, prompts, 16, EOS, 1.0, seeded(2))))
    torch.set_num_threads(1)
    (loss, gradient, r), (loss2, gradient2, r2) = runs
    close(loss, loss2)
    close(gradient, gradient2, atol=1e-5, rtol=1e-3)
    assert_same_rollout(r, r2)


# ------------------------------------------------------------------------------------------------------------
# GPT-2's weights and tokens: small files in the published names and layout


def published(vocab=40, width=128, positions=64, layers=2, dtype=torch.float32, prefix="", masks=True):
    """The tensors of a random GPT-2 of 64-wide heads: weights (in,out), and the masks that old files hold."""
    shapes = {"wte.weight": (vocab, width), "wpe.weight": (positions, width), "ln_f.weight": (width,),
              "ln_f.bias": (width,)}
    for h in (f"h.{i}." for i in range(layers)):
        shapes |= {h + f"{ln}.{k}": (width,) for ln in ("ln_1", "ln_2") for k in ("weight", "bias")}
        for name, n, m in (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4),
                           ("mlp.c_proj", 4, 1)):
            shapes |= {f"{h}{name}.weight": (n * width, m * width), f"{h}{name}.bias": (m * width,)}
    w = {prefix + k: ((0.15 if len(s) == 2 else 0.3) * normal(*s, seed=i) + ("ln" in k and "weight" in k))
         .to(dtype) for i, (k, s) in enumerate(shapes.items())}
    for h in (f"{prefix}h.{i}." for i in range(layers if masks else 0)):
        w[h + "attn.bias"] = torch.ones(1, 1, positions, positions, dtype=torch.uint8).tril()
        w[h + "attn.masked_bias"] = torch.tensor(-1e4)
    return w


def write_weights(path, w, odd=0, **change):
    """As published: with the ending .safetensors header and bytes, else a state dict. odd: blanks behind the
    header, after which the tensors are not aligned; change: fields of the header's first entry."""
    if path.suffix != ".safetensors":
        torch.save(w, path)
        return path
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
             torch.bool: "BOOL", torch.float64: "F64", torch.int64: "I64"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in w.items():
        new = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape),
                        "data_offsets": [len(data), len(data) + len(new)]}
        data += new
    header[next(iter(w))].update(change)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8 + odd)
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path


def slow_gpt2(w, row, heads):
    """GPT-2's forward pass as published (Conv1D, tanh GELU, tied head) for one row of ids -> (T,V)."""
    w, T = {k.removeprefix("transformer."): x.float() for k, x in w.items()}, len(row)
    conv1d = lambda x, name: x @ w[name + ".weight"] + w[name + ".bias"]
    norm = lambda x, name: ((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5)
                            .sqrt() * w[name + ".weight"] + w[name + ".bias"])
    gelu = lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    x = w["wte.weight"][row] + w["wpe.weight"][:T]                     # (T,C)
    for h in (f"h.{i}." for i in range(sum(k.endswith("ln_1.bias") for k in w))):
        qkv = conv1d(norm(x, h + "ln_1"), h + "attn.c_attn")            # (T,3C)
        q, k, v = (y.view(T, heads, 64).transpose(0, 1) for y in qkv.chunk(3, -1))       # (H,T,64) each
        scores = (q @ k.transpose(1, 2) / 8).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + conv1d((scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1), h + "attn.c_proj")
        x = x + conv1d(gelu(conv1d(norm(x, h + "ln_2"), h + "mlp.c_fc")), h + "mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpt2_logits_are_those_of_the_published_layout(name, dtype, prefix, tmp_path):
    w = published(dtype=dtype, prefix=prefix)
    model = ig.GPT.from_gpt2(write_weights(tmp_path / name, w))
    assert model.config == ig.GPTConfig(40, 64, 2, 2, 128, gelu="tanh")
    row = torch.randint(40, (64,), generator=seeded(0)).tolist()
    with torch.no_grad():
        got, want = model(torch.tensor([row]))[0], slow_gpt2(w, row, 2)
    assert (got - want).abs().max() < 1e-4 < 1 < want.abs().max()
    erf = ig.GPT(replace(model.config, gelu="none"))
    erf.load_state_dict(model.state_dict())
    assert (erf(torch.tensor([row]))[0] - want).abs().max() > 1e-4     # so the tanh is seen
    for n, p in model.named_parameters():        # in memory as GPT has it: (in,out), faster for few rows
        assert p.dtype == torch.float32 and p.requires_grad
        assert (p.t() if n.startswith("h.") and p.ndim == 2 else p).is_contiguous(), n


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_gpt2_masks_metadata_tied_head_and_odd_bytes_do_no_harm(name, tmp_path):
    plain = ig.from_gpt2(write_weights(tmp_path / name, published(masks=False))).state_dict()
    w = published(prefix="transformer.")
    w |= {"lm_head.weight": w["transformer.wte.weight"], "transformer.h.1.attn.bias": torch.ones(3).bool(),
          "transformer.h.0.attn.masked_bias": torch.tensor([1, 2])}    # buffers of whatever type
    for odd in (0, 1, 3):
        got = ig.from_gpt2(str(write_weights(tmp_path / name, w, odd))).state_dict()
        assert got.keys() == plain.keys() and all(torch.equal(got[k], plain[k]) for k in plain)
    torch.save(w, tmp_path / "2019.bin", _use_new_zipfile_serialization=False)
    assert all(torch.equal(x, plain[k]) for k, x in ig.from_gpt2(tmp_path / "2019.bin").state_dict().items())


def test_safetensors_are_views_of_the_file_and_never_change_it(tmp_path):
    w = published(dtype=torch.bfloat16)
    path = write_weights(tmp_path / "model.safetensors", w, odd=1)
    before, got = path.read_bytes(), ig.read_safetensors(path)
    assert got.keys() == w.keys() and got["h.0.attn.bias"] == "U8"
    for name, x in got.items():
        if name != "h.0.attn.bias" and name != "h.1.attn.bias":
            assert x.dtype == w[name].dtype and torch.equal(x, w[name])
    starts = {x.data_ptr() - 2 * w["wte.weight"].numel() for n, x in got.items() if n == "wpe.weight"}
    assert starts == {got["wte.weight"].data_ptr()}                    # one behind the other, as in the file
    got["wte.weight"].zero_()
    assert path.read_bytes() == before


def without(w, name):
    return {k: x for k, x in w.items() if k != name}


FLOAT = "must be float32, float16 or bfloat16, "
WRONG = {                                        # what is wrong -> weights, and what is told of it
    "missing": lambda w: (without(w, "h.1.ln_2.bias"), f"h.1.ln_2.bias {FLOAT}(128,), is ['missing']"),
    "no embedding": lambda w: (without(w, "wte.weight"),
                               f"wte.weight {FLOAT}('vocabulary', 'width'), is ['missing']"),
    "no positions": lambda w: (without(w, "wpe.weight"), f"wpe.weight {FLOAT}('positions', 128), is ['missi"),
    "no layers": lambda w: ({k: x for k, x in w.items() if k[:2] != "h."}, "h.0.ln_1.weight must be"),
    "misnamed": lambda w: ({**without(w, "ln_f.bias"), "ln_f.beta": w["ln_f.bias"]}, "ln_f.bias must be"),
    "a layer left out": lambda w: ({k.replace("h.1.", "h.2."): x for k, x in w.items()},
                                   "h.1.ln_1.weight must be"),
    "not turned": lambda w: (w | {"h.0.attn.c_attn.weight": w["h.0.attn.c_attn.weight"].t()},
                             f"h.0.attn.c_attn.weight {FLOAT}(128, 384), is ['float32', 384, 128]"),
    "shape": lambda w: (w | {"h.1.mlp.c_fc.bias": torch.zeros(513)},
                        f"h.1.mlp.c_fc.bias {FLOAT}(512,), is ['float32', 513]"),
    "dimensions": lambda w: (w | {"ln_f.bias": torch.zeros(128, 1)},
                             f"ln_f.bias {FLOAT}(128,), is ['float32', 128, 1]"),
    "fewer dimensions": lambda w: (w | {"wte.weight": torch.zeros(40)},
                                   f"wte.weight {FLOAT}('vocabulary', 'width'), is ['float32', 40]"),
    "width": lambda w: (w | {"wpe.weight": torch.zeros(64, 64)},
                        f"wpe.weight {FLOAT}('positions', 128), is ['float32', 64, 64]"),
    "float64": lambda w: (w | {"ln_f.bias": w["ln_f.bias"].double()}, f"ln_f.bias {FLOAT}(128,), is ['F64']"),
    "int64": lambda w: (w | {"ln_f.bias": w["ln_f.bias"].long()}, f"ln_f.bias {FLOAT}(128,), is ['I64']"),
    "heads": lambda w: (published(width=96), "wte.weight must be a multiple of 64 wide, a head's width"),
    "unexpected": lambda w: (w | {"h.0.attn.rotary": torch.zeros(2)},
                             "'h.0.attn.rotary' must not be there: "),
    "unexpected prefix": lambda w: (w | {"transformer.ln_f.bias": torch.zeros(128)},
                                    "'transformer.ln_f.bias' must not be there"),
    "untied head": lambda w: (w | {"lm_head.weight": w["wte.weight"] + 1e-3},
                              "'lm_head.weight' must equal wte.weight, for GPT-2's head is tied"),
    "head's shape": lambda w: (w | {"lm_head.weight": w["wte.weight"][1:]},
                               f"lm_head.weight {FLOAT}(40, 128), is ['float32', 39, 128]")}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("what", WRONG)
def test_gpt2_tensor_that_does_not_fit_is_named(what, name, tmp_path):
    w, told = WRONG[what](published(masks=what != "misnamed"))
    path = write_weights(tmp_path / name, w)
    with pytest.raises(ig.UserError) as e:
        ig.GPT.from_gpt2(str(path))
    assert_one_line(str(e.value), path)
    if path.suffix != ".safetensors":            # whose types have other names
        told = told.replace("'F64'", "'float64', 128").replace("'I64'", "'int64', 128")
    assert str(e.value).startswith(f"{path}: {told}")


def test_gpt2_names_with_prefix_are_told_with_it(tmp_path):
    w = without(published(prefix="transformer."), "transformer.h.1.ln_2.bias")
    with pytest.raises(ig.UserError, match=r"transformer\.h\.1\.ln_2\.bias must be"):
        ig.from_gpt2(write_weights(tmp_path / "model.safetensors", w))


def refused_weights(path):
    with pytest.raises(ig.UserError) as e:
        ig.from_gpt2(path)
    assert_one_line(str(e.value), path)
    return str(e.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("change, told", [
    (dict(data_offsets=[0, 10 ** 9]), "'wte.weight' must lie in the "),
    (dict(data_offsets=[-20480, 0]), "'wte.weight' must lie in the "),
    (dict(data_offsets=[20480, 0]), "'wte.weight' must lie in the "),
    (dict(data_offsets=[0, 20476]), "'F32', [40, 128], is said to be at 0 to 20476"),
    (dict(shape=[40, 129]), "'F32', [40, 129], is said to be at 0 to 20480"),
    (dict(shape=[10 ** 30, 10 ** 30]), "'wte.weight' must lie in the "),
    (dict(dtype="F16"), "'F16', [40, 128], is said to be at 0 to 20480"),
    (dict(dtype="F8_E4M3"), f"wte.weight {FLOAT}('vocabulary', 'width'), is ['F8_E4M3']"),
    *((change, "not GPT-2 weights as published (") for change in (
        dict(shape=[-40, -128]), dict(shape=[40., 128.]), dict(shape=7), dict(data_offsets=[0]),
        dict(data_offsets=["0", "1"]), dict(dtype=[]), dict(data_offsets=[0, 0], shape=[0, 128])))])
def test_safetensors_header_that_lies_is_one_line(change, told, tmp_path):
    assert told in refused_weights(write_weights(tmp_path / "model.safetensors", published(), **change))


def test_damaged_weights_are_one_line_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, state = tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"
    good, n = write_weights(path, published()).read_bytes(), lambda n: n.to_bytes(8, "little")
    size = int.from_bytes(good[:8], "little")
    broken = {"absurd": n(2 ** 64 - 1) + good[8:], "too long": n(len(good)) + good[8:], "empty": b"",
              "none": n(0) + good[8:], "short": n(9) + good[8:], "text": b"hello, you", "list": n(2) + b"[]",
              "JSON": n(size) + good[8:].replace(b":", b";", 1), "not UTF-8": n(2) + b"\xff{",
              "number": n(1) + b"7", "no fields": n(9) + b'{"a": {}}', "deep": n(10 ** 5) + b"[" * 10 ** 5,
              "pickle": pickle.dumps(Evil()), **{k: good[:k] for k in (1, 7, 8, 9, 500, size, size + 7)}}
    for what, data in broken.items():
        path.write_bytes(data)
        told = refused_weights(path)
        assert told.startswith("not GPT-2 weights as published (") and "name a .safetensors" in told, what
    path.write_bytes(n(2) + b"{}")
    assert refused_weights(path).startswith("wte.weight must be")
    path.write_bytes(good[:-1])                  # the last tensor is cut
    told = "not GPT-2 weights as published (ValueError: 'h.1.attn.masked_bias' must lie in the "
    assert refused_weights(path).startswith(told)
    good = write_weights(state, published()).read_bytes()
    for data in (b"", b"hello", good[:100], good[:-1], pickle.dumps(Evil())):
        state.write_bytes(data)
        assert refused_weights(state).startswith("not GPT-2 weights as published (")
    for foreign in (Evil(), [1, 2], torch.zeros(2), 7):
        torch.save(foreign, state)
        assert refused_weights(state).startswith("not GPT-2 weights as published (")
    for foreign in ({}, {1: 2}, {"wte.weight": "a\nb"}, {"format": 1, "weights": published()}):
        torch.save(foreign, state)
        assert refused_weights(state).startswith("wte.weight must be")
    torch.save({"wte.weight": torch.zeros(40, 0), "wpe.weight": torch.zeros(64, 0)}, state)
    assert refused_weights(state).startswith("wte.weight must be a multiple of 64 wide")
    assert not os.path.exists("executed")
    for name in ("nowhere", "nowhere.safetensors"):
        assert "No such file" in refused_weights(tmp_path / name)
    (tmp_path / "folder.safetensors").mkdir()
    assert "Is a directory" in refused_weights(tmp_path / "folder.safetensors")


def test_fuzzed_safetensors_are_taken_or_refused_in_one_line(tmp_path):
    path, rng, taken, refused = tmp_path / "model.safetensors", random.Random(0), 0, 0
    good = write_weights(path, published(vocab=3, width=64, positions=2, layers=1)).read_bytes()
    size = 8 + int.from_bytes(good[:8], "little")
    for _ in range(300):
        path.write_bytes(change_bytes(good[:size], rng) + good[size:])
        try:
            model = ig.from_gpt2(path)                                 # anything but UserError fails the test
        except ig.UserError as e:
            assert_one_line(str(e), path)
            refused += 1
        else:
            assert model.config.n_embd == 64
            taken += 1
    assert taken > 2 and refused > 200


def rank_file(path, pieces):
    """The 256 bytes and these pieces, a token each; and the numbers of the pieces."""
    words = [bytes([i]) for i in range(256)] + [p.encode() for p in pieces]
    path.write_bytes(written(*(f"{b64encode(word).decode()} {i}" for i, word in enumerate(words))))
    return str(path), list(range(256, len(words)))


def test_gpt2_pattern_cuts_text_into_gpt2s_pieces(tmp_path):
    texts = [["Tom", "'s", "  ", " hat", ",", " it", "'ll", " cost", " 12", "é", "5", " $_%!'", "\n"],
             ["x", "\n\n \n ", " Is", "_", "世界", "\t", "x", "\n", ">", " no", "?", "\n  "]]
    long = list(dict.fromkeys(p for p in sum(texts, []) if len(p.encode()) > 1))     # each becomes a token
    enc = ig.find_encoding(rank_file(tmp_path / "gpt2.tiktoken", long)[0])
    for text in texts:
        assert enc.encode_ordinary("".join(text)) == [enc.encode_single_token(p) for p in text]
    assert enc.eot_token == 256 + len(long) == enc.n_vocab - 1


def test_toy_worlds_pieces_are_gpt2s(enc, sets):
    with open(os.path.join(DATA, "pretrain_valid.txt"), encoding="utf-8") as f:
        texts = [f.read(), *(row["prompt"] + ig.MARK + " " for rows in sets.values() for row in rows[:300])]
    for text in texts:                           # toyworld.py cuts by a simpler pattern
        pieces = tw.PIECES.findall(text)
        assert "".join(pieces) == text
        assert enc.encode_ordinary(text) == [i for p in pieces for i in enc.encode_ordinary(p)]


def test_encoding_by_name_is_tiktokens_and_any_other_word_a_rank_file(monkeypatch, tmp_path):
    asked, path = [], rank_file(tmp_path / "mine", [" cow"])[0]
    theirs = ig.load_encoding(path)
    monkeypatch.setattr(ig.tiktoken, "get_encoding", lambda name: asked.append(name) or theirs)
    assert ig.find_encoding("gpt2") is theirs and asked == ["gpt2"]
    assert ig.find_encoding(path).n_vocab == 258 and asked == ["gpt2"]
    with pytest.raises(ig.UserError, match="gpt3: cannot be read .* name another file"):
        ig.find_encoding("gpt3")
    theirs = ig.tiktoken.Encoding("gap", pat_str=ig.PIECES, mergeable_ranks=theirs._mergeable_ranks,
                                  special_tokens={ig.EOT: 300})
    with pytest.raises(ig.UserError, match="has ids without a token"):                 # a model could sample
        ig.find_encoding("gpt2")


def test_encoding_without_network_and_cache_is_one_line_that_says_how(monkeypatch, tmp_path, capsys):
    def fails(name):
        raise OSError("HTTPSConnectionPool(host='example.org', port=443):\nMax retries exceeded")
    monkeypatch.setattr(ig.tiktoken, "get_encoding", fails)
    assert ig.main(["sft", "--encoding", "gpt2", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "example.org" not in error and not (tmp_path / "out").exists()
    assert all(x in error for x in ("--encoding gpt2", "OSError", "TIKTOKEN_CACHE_DIR=DIR", "rank file"))


def test_gpts_answer_is_cut_at_any_token_that_holds_a_newline(tmp_path, monkeypatch):
    path, (two, word) = rank_file(tmp_path / "ranks", ["\n\n", " moo"])
    ids, enc = [word, two, word, 258], ig.find_encoding(path)
    monkeypatch.setattr(ig, "rollout", lambda *_: ig.Rollout(
        torch.tensor([[1] + ids]), torch.ones(1, 4).bool(), torch.zeros(1, 4), torch.ones(1), torch.ones(1)))
    cut, = ig.respond(None, enc, [[1]], 4, None, one_line=True)
    whole, = ig.respond(None, enc, [[1]], 4, None)
    assert (cut["text"], cut["ids"], cut["ended"]) == ("moo", [word, two], True)
    assert (whole["text"], whole["ids"], whole["ended"]) == ("moo\n\n moo", ids, True)


def test_run_from_gpt2_weights_with_its_encoding(tmp_path, capsys):
    with open(os.path.join(DATA, "vocab.tiktoken"), encoding="utf-8") as f:
        ranks = f.read() + f"{b64encode(' zebrafish'.encode()).decode()} 551\n"
    (tmp_path / "ranks").write_text(ranks)
    w = published(vocab=553, width=64, positions=80, prefix="transformer.")
    init, out = write_weights(tmp_path / "model.safetensors", w), tmp_path / "out"
    words = ["sft", "--smoke", "--device", "cpu", "--out", str(out), "--encoding", str(tmp_path / "ranks")]
    assert ig.main([*words, "--init", str(init)]) == 0
    base, model = (ig.load(str(out / f"{name}.pt")) for name in ("pretrain", "sft"))
    want = ig.from_gpt2(init)
    assert base["config"] == model["config"] == dict(vocab_size=553, block_size=80, n_layer=2, n_head=1,
                                                     n_embd=64, dropout=0.0, gelu="tanh")
    assert all(torch.equal(x, base["weights"][k]) for k, x in want.state_dict().items())    # not a step
    assert not torch.equal(base["weights"]["wte.weight"], model["weights"]["wte.weight"])
    assert {json.loads(line)["stage"] for line in open_lines(out / "log.jsonl")} == {"sft"}
    losses = [json.loads(line)["loss"] for line in open_lines(out / "log.jsonl")]
    assert statistics.mean(losses[-5:]) < 0.7 * losses[0]
    before, _ = (out / "sft.pt").stat().st_mtime_ns, capsys.readouterr()
    assert ig.main([*words, "--init", str(init)]) == 0 and (out / "sft.pt").stat().st_mtime_ns == before
    shutil.copy(init, tmp_path / "other.safetensors")
    for other in ([*words, "--init", str(tmp_path / "other.safetensors")], [*words]):
        assert ig.main(other) == 2
        assert f"sft.pt was made with init {str(init)!r}, now init is" in capsys.readouterr().err
    assert ig.main([*words[:-2], "--init", str(init)]) == 2
    assert "now encoding is" in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    (["--encoding", "RANKS"], "model.safetensors: has 552 tokens and 64 positions; must be the 257 of "
                              "--encoding (GPT-2's own: gpt2), and"),
    (["--block_size", "65"], "at least --block_size 65"), (["--n_layer", "2"], "--n_layer: not with --init"),
    (["--n_head", "2"], "--n_head: not with --init"), (["--n_embd", "64"], "--n_embd: not with --init"),
    (["--pretrain_steps", "5"], "--pretrain_steps: not with --init"),
    (["--init", "nowhere.safetensors"], "nowhere.safetensors: not GPT-2 weights as published (FileNot")])
def test_init_that_does_not_fit_is_one_line_and_leaves_no_checkpoint(words, told, tmp_path, capsys):
    init = write_weights(tmp_path / "model.safetensors", published(vocab=552, width=64))
    words = [rank_file(tmp_path / "ranks", [])[0] if word == "RANKS" else word for word in words]
    assert ig.main(["sft", "--smoke", "--device", "cpu", "--out", str(tmp_path / "out"), "--init", str(init),
                    *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error and not list(tmp_path.glob("out/*.pt"))


# ------------------------------------------------------------------------------------------------------------
# You are the labeler (3.4), and talk to it: the two commands that wait for what a user types

MINI = ["--smoke", "--device", "cpu", "--out"]


@pytest.mark.parametrize("text, ranks", [
    ("3 > 1 = 4 > 2", [2, 4, 1, 2]), ("3>1=4>2", [2, 4, 1, 2]), (" 1=2 =3= 4 ", [1, 1, 1, 1]),
    ("2 > 1", [2, 1]), ("2=1", [1, 1]), ("\t1 >2\n> 3", [1, 2, 3]), ("4=2 > 1 > 3", [3, 1, 4, 1])])
def test_section_34_ranking_in_one_line(text, ranks):
    assert ig.read_ranking(text, len(ranks)) == ranks


@pytest.mark.parametrize("text", [
    "1 > 2", "3 > 2 > 2 > 1", "1 > 1 > 2", "1 > 2 > 4", "0 > 1 = 2", "", "1 2 > 3", "1 > 2 >", "1 < 2",
    "1 >= 2 > 3", "-1 > 2 > 3", "01 > 2 > 3", "1 > 2 > ٣", "1.0 = 2 = 3", "x" * 99])
def test_section_34_wrong_ranking_is_told_in_a_sentence(text):
    with pytest.raises(ValueError, match="name each of 1 to 3 once"):
        ig.read_ranking(text, 3)


def test_section_34_any_text_is_a_ranking_or_one_sentence():
    rng, right = random.Random(0), 0
    for _ in range(20_000):
        K, letters = rng.randint(2, 5), rng.choices("12345>>== \0x\n-é\ud800", k=rng.randrange(12))
        text = "".join(letters)
        if rng.random() < 0.3:                   # a good one, with now and then a letter changed
            order = rng.sample(range(1, K + 1), K)
            text = "".join(str(n) + rng.choice([">", "=", " > ", " ="]) for n in order)[:-1].rstrip(" >=")
            text = text.replace(*rng.choice([("1", "1"), ("1", "2"), (">", "")]))
        try:
            ranks = ig.read_ranking(text, K)
        except ValueError as e:
            assert str(e).count("\n") == 0 and str(e).isprintable()
        else:
            right += 1
            assert len(ranks) == K and all(r == 1 + sum(x < r for x in ranks) for r in ranks)
            for i, j in itertools.permutations(range(K), 2):
                between = text.split(str(i + 1))[1].split(str(j + 1))
                if len(between) == 2:            # i stands before j
                    assert (ranks[i] < ranks[j]) == (">" in between[0])
    assert right > 2000


@pytest.fixture
def desk(smoke, tmp_path, monkeypatch, capsys):
    """A copy of the small run, and `sit(stage, turns, *words)`, which runs a stage with a user at the keys:
    turns() yields what is typed and is sent what the screen shows next; when it ends, Ctrl-D is pressed."""
    out = shutil.copytree(smoke[0], tmp_path / "out")

    def sit(stage, turns, *words):
        user, _ = turns(), capsys.readouterr()
        next(user)

        def type_a_line(prompt=""):
            try:
                line = user.send(capsys.readouterr().out + prompt)
            except StopIteration:
                raise EOFError from None
            if isinstance(line, BaseException):
                raise line
            return line
        monkeypatch.setattr("builtins.input", type_a_line)
        code = ig.main([stage, *MINI, str(out), *words])
        return (code, *capsys.readouterr())
    return out, sit


def question_on(screen):
    """Number, prompt and answers that the screen asks to rank."""
    number, rest = screen.split("\n[")[-1].split("] ", 1)
    prompt, answers = rest.rsplit("\n\n", 1)
    answers = answers.removesuffix("ranking: ").splitlines()
    assert [x[:5] for x in answers] == [f"  {i}  " for i in range(1, len(answers) + 1)]
    return int(number), prompt.replace("\n    ", "\n"), [x[5:] for x in answers]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def nobody():
    yield                                        # presses Ctrl-D at once


def as_shown(c):
    return [ig.on_a_line(*x) for x in zip(c["responses"], c["ended"])]


def downwards(K):
    return " > ".join(str(i) for i in range(K, 0, -1))


def test_section_34_label_writes_each_ranking_at_once_undoes_and_skips(desk, sets, enc):
    out, sit = desk
    path, told = out / "labels.jsonl", {}

    def turns():
        screen = yield
        assert screen.count(ig.USAGE) == 1
        n, prompt, answers = question_on(screen)
        assert n == 1
        for wrong in ("?", "", "1 > 2 > 99", "U > 1", "1"):            # asked again, nothing written
            screen = yield wrong
            assert screen.count("\n") == 2 and (ig.USAGE in screen) == (wrong == "?") and not path.exists()
        screen = yield f" {downwards(len(answers))} "
        first, = lines_of(path)
        row = next(r for r in sets["rm_train"] if r["prompt"] == prompt)
        assert first == {"prompt": prompt, "responses": first["responses"], "ended": first["ended"],
                         "ranks": list(range(len(answers), 0, -1)), "labeler": "you",
                         "task": row["task"], "use_case": row["use_case"], "form": row["form"]}
        assert as_shown(first) == answers
        hits = ig.agreement(tw, {prompt: row["task"]}, [first], random.Random(0))
        assert f"\nagreement so far {ig.mean(hits):.2f} of {len(hits)} pairs (labelers among" in screen
        second = question_on(screen)
        screen = yield "s"
        third = question_on(screen)
        assert (second[0], third[0]) == (2, 2) and second[1] != third[1] and lines_of(path) == [first]
        screen = yield downwards(len(third[2]))
        assert [c["prompt"] for c in lines_of(path)] == [prompt, third[1]]
        fourth = question_on(screen)
        screen = yield "u"
        assert question_on(screen) == third and lines_of(path) == [first]
        screen = yield "=".join(str(i + 1) for i in range(len(third[2])))
        assert question_on(screen) == fourth and lines_of(path)[0] == first
        assert set(lines_of(path)[1]["ranks"]) == {1} and as_shown(lines_of(path)[1]) == third[2]
        assert f"so far {ig.mean(hits):.2f} of {len(hits)} pairs" in screen        # ties state no preference
        assert question_on((yield "u")) == third and question_on((yield "u")) == (1, prompt, answers)
        assert lines_of(path) == [] and question_on((yield "u")) == (1, prompt, answers)
        told["first"] = (yield downwards(len(answers))) and first
        assert question_on((yield "u"))[1:] == (prompt, answers)
        screen = yield downwards(len(answers))
        assert question_on(screen) == third
        yield "q"
    code, said, error = sit("label", turns)
    assert code == 0 and not error and lines_of(path) == [told["first"]]
    assert f"1 rankings in {path}" in said and said.endswith(
        f"python instructgpt.py ppo --from {out} --out NEW --comparisons {path}\n")
    c, = ig.read_jsonl(str(path), ig.comparison)                       # the reward model can learn from it
    scores, ranks = ig.score_comparisons(small_models(enc)[1], [ig.encode_comparison(enc, c, 16)], "cpu")
    assert c == told["first"] and ranks.tolist() == [c["ranks"]] and ig.reward_loss(scores, ranks) > 0


def test_section_34_label_goes_on_with_the_next_prompt_and_undoes_over_sessions(desk, sets):
    out, sit = desk
    path, shown = out / "labels.jsonl", []

    def one():
        for _ in range(3):
            screen = yield (downwards(len(shown[-1][2])) if shown else None)
            shown.append(question_on(screen))
    assert sit("label", one)[0] == 0             # two rankings, then Ctrl-D at the third
    assert [c["prompt"] for c in lines_of(path)] == [x[1] for x in shown[:2]]

    def two():
        screen = yield
        assert question_on(screen)[:2] == shown[2][:2]
        assert question_on((yield "u")) == shown[1] and len(lines_of(path)) == 1
    code, said, error = sit("label", two)
    assert code == 0 and said.startswith("\n1 rankings in ") and not error
    assert [c["prompt"] for c in lines_of(path)] == [shown[0][1]]

    def three():
        yield
        assert question_on((yield "u"))[0] == 1
    assert sit("label", three)[0] == 0 and lines_of(path) == []
    code, said, error = sit("label", nobody)     # its file is empty now, which is no mistake
    assert (code, error) == (0, "") and "0 rankings" in said
    lines = [json.dumps({**ranked(1, 2, 2), "prompt": p["prompt"]}) + "\n" for p in sets["rm_train"]]
    path.write_text("".join(lines))
    code, said, error = sit("label", nobody)     # and now nothing is left to rank
    assert (code, error) == (0, "") and said.startswith(f"{ig.USAGE}\n{len(sets['rm_train'])} rankings")


def test_section_34_label_shows_samples_of_the_sft_model_each_text_once(desk, sets, enc, monkeypatch):
    out, sit = desk
    run = ig.Run(ig.parse([*MINI, str(out)])[1], None, False)
    generator, real, drawn = ig.seed(run.cfg, "label"), ig.respond, []
    for row in sets["rm_train"][:3]:
        prompts = 4 * [ig.encode_prompt(enc, row["prompt"])]
        drawn.append(real(run.model("sft"), enc, prompts, run.cfg.max_new_tokens, generator))
    assert len(drawn[0][0]["logprobs"]) and any(min(r["logprobs"]) < -0.1 for r in drawn[0])   # temperature 1
    again = iter([[{"text": "a", "ended": True}] * 4,                  # nothing to rank: left out silently
                  [{"text": t, "ended": e} for t, e in (("b", True), ("", True), ("b", True), ("b", False))]])

    def turns():
        screen = yield
        want = [list(dict.fromkeys(ig.on_a_line(r["text"], r["ended"]) for r in d)) for d in drawn]
        assert all(len(texts) > 1 for texts in want)
        for row, texts in zip(sets["rm_train"], want):
            assert question_on(screen)[1:] == (row["prompt"], texts)
            assert row["prompt"].replace("\n", "\n    ") in screen
            if row is sets["rm_train"][2]:
                monkeypatch.setattr(ig, "respond", lambda *_: next(again))
            screen = yield "s"
        assert question_on(screen)[1:] == (sets["rm_train"][4]["prompt"], ["b", "(nothing)", "b ..."])
    assert sit("label", turns)[0] == 0


def test_section_34_label_refuses_a_broken_line(desk):
    out, sit = desk
    path = out / "labels.jsonl"
    good = json.dumps(ranked(1, 2, 2)) + "\n"
    path.write_text(good + "{}\n" + good)
    code, _, error = sit("label", nobody)
    assert code == 2 and error.count("\n") == 1 and f"{path}:2: chosen must be str" in error
    assert path.read_text() == good + "{}\n" + good


def test_section_34_label_without_a_toy_world_knows_no_tasks(desk, monkeypatch):
    out, sit = desk
    monkeypatch.setattr(ig, "toyworld", lambda data: None)

    def turns():
        screen = yield
        screen = yield downwards(len(question_on(screen)[2]))
        assert "agreement" not in screen and question_on(screen)[0] == 2
        row, = lines_of(out / "labels.jsonl")
        # no split: one would keep every fourth prompt from the judge
        assert set(row) == {"prompt", "responses", "ended", "ranks", "labeler"}
    assert sit("label", turns)[0] == 0


def test_section_34_agreement_counts_the_pairs_in_which_you_have_a_preference(sets):
    class World:
        make_labelers, check = staticmethod(lambda group: [group]), staticmethod(lambda task, text, end: text)

        @staticmethod
        def rank(labeler, merits, texts, rng):
            assert labeler == "train" and merits == texts
            return [int(text[-1]) for text in texts]
    c = {"prompt": "p", "responses": ["a1", "b2", "c2", "d4"], "ended": [True] * 4}
    share = lambda *ranks, tasks={"p": {}}: sorted(
        ig.agreement(World, tasks, [{**c, "ranks": ranks}], random.Random(0)))
    assert share(1, 2, 3, 4) == [0.5] + 5 * [1.0] and share(4, 3, 2, 1) == 5 * [0.0] + [0.5]
    assert share(1, 1, 1, 1) == [] and share(1, 2, 2, 1) == [0.0, 0.0, 1.0, 1.0]
    assert share(1, 2, 2, 2) == 3 * [1.0] and share(1, 2, 3, 4, tasks={}) == []
    rows, people = sets["rm_train"][:300], tw.make_labelers("train")   # the simulated among themselves
    tasks, rng, mine = {p["prompt"]: p["task"] for p in rows}, random.Random(0), []
    for p in rows:
        texts = [tw.answer(p["task"], rng, flaw) for flaw in (None, "rude", "lazy", "slip")]
        ranks = tw.rank(rng.choice(people), [tw.check(p["task"], t) for t in texts], texts, rng)
        mine.append({"prompt": p["prompt"], "responses": texts, "ended": [True] * 4, "ranks": ranks})
    assert 0.6 < ig.mean(ig.agreement(tw, tasks, mine, rng)) < 0.9
    World.make_labelers, World.rank = lambda group: [0, 1], lambda one, merits, texts, rng: [1 + one, 2 - one]
    pair = {"prompt": "p", "responses": ["a", "b"], "ended": [True] * 2, "ranks": [1, 2]}
    assert set(ig.agreement(World, {"p": {}}, 20 * [pair], random.Random(0))) == {0.0, 1.0}    # one a ranking


def test_label_and_chat_stop_at_ctrl_c_with_130(desk):
    def turns():
        yield
        yield KeyboardInterrupt()
    for stage in ("label", "chat"):
        code, _, error = desk[1](stage, turns)
        assert code == 130 and "stopped" in error and "Traceback" not in error
    run = ig.Run(ig.parse([*MINI, str(desk[0])])[1], None, False)     # so it is after a training, too
    assert list(run.log.steps("x", 2)) == [0, 1] and pytest.raises(KeyboardInterrupt, run.log.interrupt)


def slow_kl(policy, reference, prompt, response):
    """KL(pi || pi_ref) in nats: one state at a time, one word at a time."""
    total = 0.0
    for t in range(len(prompt), len(prompt) + len(response)):
        seen = torch.tensor([(prompt + response)[:t]])
        p, q = (m(seen)[0, -1].double().softmax(-1).tolist() for m in (policy, reference))
        total += sum(a * math.log(a / b) for a, b in zip(p, q))
    return total


def test_eq2_exact_kl_is_its_definition_and_the_mean_of_k1():
    policy, reference = tiny(), tiny(seed=1)
    responses = [[4, EOS], [0, 2, 7, 7], [EOS], [1, 2, 3]]
    tokens, mask, _ = ig.stack(PROMPTS, responses, "cpu")
    kl = ig.exact_kl(policy, reference, tokens, mask)
    slow = torch.tensor([slow_kl(policy, reference, *x) for x in zip(PROMPTS, responses)])
    close(kl, slow, rtol=1e-4, atol=1e-5)
    assert torch.equal(ig.exact_kl(policy, policy, tokens, mask), torch.zeros(4)) and (kl > 0.01).all()
    junk = tokens.clone()
    junk[2, 3:] = 5                              # filler behind the last token
    assert torch.equal(ig.exact_kl(policy, reference, junk, mask), kl)
    r = ig.rollout(policy, 20_000 * [[3]], 1, EOS, generator=seeded(0))
    k1 = ig.kl_k1(r.logprobs, ig.token_logprobs(reference, r.tokens, 1.0, r.mask))[r.mask]
    assert abs(k1.mean() - ig.exact_kl(policy, reference, r.tokens[:1], r.mask[:1])) < 0.05


def table_on(screen):
    """name -> (reward, KL, answer) of the last table on the screen; a star stays on the reward."""
    rows = screen.split("reward     KL\n")[-1].split("\n> ")[0].splitlines()
    rows = [row.split(None, 3) for row in rows]
    return {name: (reward, float(kl), answer) for name, reward, kl, answer in rows}


def test_chat_answers_side_by_side_with_reward_and_kl(desk, enc, monkeypatch):
    out, sit = desk
    run = ig.Run(ig.parse([*MINI, str(out)])[1], None, False)
    questions = ["What is a bat?", "I lost my map.", "Repeat: " + ig.EOT, "List two fruits.", "x" * 46]
    seen, real, stars = [], ig.respond, 0

    def watched(*a, one_line):
        assert one_line == (len(seen) == 0)      # GPT's answer alone, the first, is cut at a newline
        seen.append(real(*a, one_line=one_line))
        return seen[-1]
    monkeypatch.setattr(ig, "respond", watched)

    def turns():
        nonlocal stars
        yield
        for q in questions:
            seen.clear()
            table = table_on((yield f"  {q} "))
            assert list(table) == ["GPT", "SFT", "PPO", "PPO-ptx"]
            ids = ig.encode_prompt(enc, q)
            assert enc.eot_token not in ids
            for (name, (reward, kl, answer)), (r,) in zip(table.items(), seen):
                model, reward_model = run.model(ig.MODELS[name]), run.model("rm")
                greedy, = real(model, enc, [ids], 16, None, 0, name == "GPT")
                assert answer == ig.on_a_line(greedy["text"], greedy["ended"]).strip() and greedy == r
                for t, token in enumerate(r["ids"]):                   # each token is the likeliest
                    assert model(torch.tensor([ids + r["ids"][:t]]))[0, -1].argmax() == token
                whole = ids + r["ids"][:-1] + [enc.eot_token]
                score = reward_model(torch.tensor([whole]))[0, -1].item()
                assert reward == (f"{score:.2f}" if r["ended"] else "-1.00*")
                stars += not r["ended"]
                assert abs(kl - slow_kl(model, run.model("sft"), ids, r["ids"])) < 0.006
            assert table["SFT"][1] == 0 and table["GPT"][1] > 0
        for wrong, n in (("", 0), ("x" * 47, 47), ("x" * 2 * ig.LONGEST, ig.LONGEST)):
            screen = yield wrong
            assert screen.count("\n") == 2 and f"\na question has 1 to 46 tokens, this one {n}\n" in screen
    code, said, error = sit("chat", turns)
    assert (code, said, error) == (0, "\n", "") and 0 < stars < 20


def test_chat_wants_models_that_are_there(desk):
    out, sit = desk

    def turns():
        yield
        table = (yield "I lost my map.").splitlines()[-3:-1]
        assert [row.split()[0] for row in table] == ["PPO-ptx", "GPT"]
    assert sit("chat", turns, "--models", "PPO-ptx", "GPT")[0] == 0

    for words, told in ((["PPO", "Claude"], ["Claude", *ig.MODELS]), ([], ["--models: expected at least"])):
        code, _, error = sit("chat", nobody, "--models", *words)
        assert code == 2 and error.count("\n") == 1 and all(x in error for x in told)
    assert "--models goes with chat" in sit("evaluate", nobody, "--models", "PPO")[2]
    os.remove(out / "ppo.pt")
    code, _, error = sit("chat", nobody, "--models", "PPO")
    assert code == 2 and f"ppo.pt is missing: python instructgpt.py ppo --out {out} makes it" in error
    error = sit("chat", nobody, "--models", "DPO")[2]
    assert f"dpo.pt is missing: python instructgpt.py rm --methods dpo --out {out} makes it" in error

    def three():
        yield
        assert [row.split()[0] for row in (yield "moo").splitlines()[-4:-1]] == ["GPT", "SFT", "PPO-ptx"]
    assert sit("chat", three)[0] == 0
    for name in ("rm", "sft"):
        os.remove(out / f"{name}.pt")
        code, _, error = sit("chat", nobody, "--models", "GPT")
        assert code == 2 and error.count("\n") == 1
        assert f"{name}.pt is missing: python instructgpt.py {name} --out {out} makes it" in error
    assert not (out / "rm.part").exists() and not (out / "ppo.pt").exists()


def test_chat_reads_a_pipe_and_shows_each_question_once(smoke, monkeypatch, capsys):
    words = [sys.executable, os.path.join(HERE, "instructgpt.py"), "chat", *MINI, str(smoke[0])]
    done = subprocess.run([*words, "--models", "SFT", "PPO"], input="Is it é?\n\nI lost my map.", text=True,
                          capture_output=True, encoding="utf-8", env={**os.environ, "PYTHONUTF8": "1"})
    said = done.stdout.split("\n> ")
    assert (done.returncode, done.stderr) == (0, "") and [x.split("\n")[0] for x in said[1:]] == [
        "Is it é?", "", "I lost my map.", ""]
    assert list(table_on(done.stdout)) == ["SFT", "PPO"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"moo\xff\n"), encoding="utf-8"))
    assert ig.main(["chat", *MINI, str(smoke[0])]) == 2
    error = capsys.readouterr().err
    assert error == "instructgpt.py: the line typed is not UTF-8 text (invalid start byte)\n"


@pytest.mark.parametrize("text, mended", [
    ('{"a": 1}\n{"b"', '{"a": 1}\n'), ('{"a": 1}\n', '{"a": 1}\n'),
    ('{"a"', ''), ('', '')])
def test_half_a_last_line_is_cut(text, mended, tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    ig.mend(str(path))
    assert path.read_text() == mended
    if mended:                                   # a whole log is only read: its folder may forbid to write
        monkeypatch.setattr(ig.os, "truncate", None)
        ig.mend(str(path))


@pytest.mark.parametrize("name", ["file", "file/x", ""])
def test_out_that_can_be_no_folder_is_refused(name, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    out = name and str(tmp_path / name)
    assert ig.main(["pretrain", "--smoke", "--device", "cpu", "--out", out]) == 2
    assert f"--out {out}: cannot be a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


class Terminal:
    """The command in a terminal of its own, at which a test types and reads as a user does."""

    def __init__(self, *words):
        pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
        self.fd, inner = pty.openpty()
        script, calm = os.path.join(HERE, "instructgpt.py"), {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
        self.process = subprocess.Popen([sys.executable, script, *map(str, words)], stdin=inner, stdout=inner,
                                        stderr=inner, start_new_session=True, env={**os.environ, **calm},
                                        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(inner)
        self.screen = ""

    def until(self, text, patience=300):
        """Reads until the text stands on the screen, or to the end of the process (text None); what came."""
        data, self.screen, limit = self.screen, "", time.time() + patience
        while text is None or text not in data:
            assert select.select([self.fd], [], [], max(0, limit - time.time()))[0], data
            try:
                piece = os.read(self.fd, 4096)
            except OSError:                      # so Linux says that the other end is closed
                piece = b""
            if not piece:
                assert text is None, data
                return data
            data += piece.decode().replace("\r", "")
        if text:
            cut = data.index(text) + len(text)
            data, self.screen = data[:cut], data[cut:]
        return data

    def type(self, keys):
        os.write(self.fd, keys.encode())

    def interrupt(self):
        """Ctrl-C, with nothing typed before it, which it would drop and readline wait for; again, as one that
        comes just before readline waits is noticed at the next."""
        for _ in range(100):
            if self.process.poll() is None:
                self.type("\x03")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(3)
        return self.end()

    def end(self):
        rest = self.until(None)
        os.close(self.fd)
        return rest, self.process.wait(300)


def test_section_34_label_in_a_terminal_killed_resumed_and_interrupted(smoke, tmp_path):
    out = shutil.copytree(smoke[0], tmp_path / "out")
    terminal = Terminal("label", *MINI, out)
    _, prompt, answers = question_on(terminal.until("ranking: "))
    terminal.type("x\x7f" + downwards(len(answers)) + "\n")            # x, backspace, a ranking, enter
    terminal.until("\n[2] "), terminal.until("ranking: ")
    terminal.type("1 >")
    terminal.process.kill()
    assert terminal.end()[1] == -signal.SIGKILL
    first, = lines_of(out / "labels.jsonl")
    assert first["prompt"] == prompt and first["ranks"] == list(range(len(answers), 0, -1))
    terminal = Terminal("label", *MINI, out)
    assert question_on(terminal.until("ranking: "))[0] == 2
    said, code = terminal.interrupt()
    assert code == 130 and "\nstopped; " in said and "Traceback" not in said
    assert lines_of(out / "labels.jsonl") == [first]


def test_chat_in_a_terminal_with_arrow_keys(smoke):
    terminal = Terminal("chat", *MINI, smoke[0], "--models", "SFT")
    terminal.until("> ")
    terminal.type("I lost my map.\n")
    screen = terminal.until("\n> ")
    table = table_on(screen)
    assert screen.split("\n")[0] == "I lost my map." and "\nI lost" not in screen
    terminal.type("moo\n")
    assert table_on(terminal.until("\n> ")) != table
    terminal.type("\x1b[A\x1b[A\n")                                    # up, up, enter
    assert table_on(terminal.until("\n> ")) == table
    terminal.type("\x04")                                              # Ctrl-D
    assert terminal.end() == ("\n", 0)


# ------------------------------------------------------------------------------------------------------------
# Bench: how fast each part is on this machine, beside what the machine could do. No test asserts it: a speed
# belongs to a machine and a moment, so compare numbers of one table only.

SIZES = {                    # layers, heads, width, vocabulary, prompt, new tokens; an LM step's rows, tokens
    "toy": (2, 2, 128, 2048, 32, 16, 32, 64), "small": (4, 4, 128, 512, 32, 32, 64, 64),
    "mid": (6, 6, 384, 1024, 64, 64, 16, 128), "gpt2": (12, 12, 768, 50257, 64, 64, 8, 128)}
PHASES = {                   # the functions that a PPO iteration calls, and what their calls are for, in turn
    "rollout": ["rollout"], "by_length": ["scores", "reference", "values"], "gae": ["GAE"],
    "accumulate": ["PPO gradient", "ptx gradient", "value gradient"], "clip_and_step": ["clip, optimizers"]}
WIDTHS = {"rows": 6, "ms": 10, "per_second": 12, "step_ms": 10, "share": 9, "uncached": 10, "eager": 7}
LEGEND = """\
per second  GB, GFLOP, new tokens (the prefill's time included), trained tokens, episodes
share       rollout: of a step's time, what the roofline needs: weights and KV cache at the mean context over
            the copy's bandwidth (caches may beat it), or FLOPs over the matrix product's, what takes longer;
            LM step: of its time, (6 N + 12 layers width length) FLOPs a token over the matrix product's, N
            being the weights in matrix products; below PPO-ptx: of the iteration
uncached    times slower with a forward of the whole row for a token; eager: without CUDA graphs
-           would take too long, or more memory than there is; peak: on a CPU that of the process so far
"""


def clock(device, work, *args):
    """Seconds that work(*args) takes, and its result."""
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    start, result = time.perf_counter(), work(*args)
    synchronize()
    return time.perf_counter() - start, result


def timed(device, patience, **works):
    """Median seconds of each work. They take turns, so that a slow moment of the machine hits all. The first
    round is the warm-up; on a CPU it counts if it alone takes all the time."""
    rounds, start, least = [], time.perf_counter(), 1 if device.type == "cpu" else 3
    while len(rounds) < least or len(rounds) < 8 and time.perf_counter() - start < patience:
        rounds.append([clock(device, work)[0] for work in works.values()])
    return dict(zip(works, map(statistics.median, zip(*rounds[len(rounds) > 1:]))))


def phases(device, iteration):
    """Seconds of a PPO iteration in the functions of PHASES, by what the call was for, and elsewhere."""
    def watched(f, kinds):
        def g(*args):
            seconds, result = clock(device, f, *args)
            spent[next(kinds)] += seconds
            return result
        return g
    spent = Counter()
    with pytest.MonkeyPatch.context() as patch:                      # puts everything back
        for name, kinds in PHASES.items():
            patch.setattr(ig, name, watched(getattr(ig, name), itertools.cycle(kinds)))
        total, _ = clock(device, iteration)
    return {**spent, "rest": total - sum(spent.values())}


def room(device):
    """Bytes to use at most: on a CPU half of all, for what is free leaves out what the disk's cache holds."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    there = hasattr(os, "sysconf")                                   # not on Windows
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 if there else math.inf


def bench_size(name, device, low, bandwidth, flops, line, batches, part, patience):
    L, H, C, V, P, N, R, S = SIZES[name]
    gpu, big = device.type == "cuda", name == "gpt2"
    R, S = (32, 1024) if gpu and big else (R // part, S)
    E, M = (8, 2) if big and not gpu else (64 // part, 8)            # episodes, minibatches
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    model = ig.GPT(ig.GPTConfig(V, max(P + N, S), L, H, C, gelu="tanh" if big else "none")).to(device)
    ids = lambda *shape: torch.randint(V, shape, generator=seeded(0))
    fits = lambda work, n, seconds, size: (                          # if not, None and a row with "-"
        seconds < 3 * patience and size < room(device) or line(work, rows=n, ms=None))

    used = torch.no_grad()(ig.low_precision)(model) if low else model    # what samples
    w, kv = V * C + 12 * L * C * C, 2 * L * C * (P + N / 2)          # weights in products, cache of a row
    size, slower, done = used.wte.weight.element_size(), 2, 0        # a first guess: twice the roofline
    step = lambda B: max((w + B * kv) * size / bandwidth, 2 * B * (w + kv) / flops)      # roofline, seconds
    whole = lambda B: N * step(B) + 2 * B * P * w / flops
    roll = lambda B, n=N, **how: ig.rollout(model, ids(B, P).tolist(), n, V, **how)      # id V never comes
    for B in batches:
        if not fits("rollout", B, slower * whole(B), 3 * B * (2 * L * C * (P + N) * size + 24 * V)):
            continue
        used.kept.clear()                                            # only so many graphs are kept
        works = {"all": lambda: roll(B), "one": lambda: roll(B, 1)}
        if gpu:
            works["eager"] = lambda: roll(B, graphs=False)
        if B == 8:                                                   # a row of the mean length stands for all
            row, u = ids(B, P + N // 2).to(device), torch.rand(B, device=device)
            works["uncached"] = torch.no_grad()(torch.autocast(device.type, enabled=False)(
                lambda: ig.pick(used.project(used.hidden(row)[:, -1]), u, 1.0)))
        t = timed(device, patience, **works)
        each, slower, done = (t["all"] - t["one"]) / (N - 1), t["all"] / whole(B), B
        line("rollout", rows=B, ms=1e3 * t["all"], per_second=B * N / t["all"], step_ms=1e3 * each,
             share=step(B) / each,
             **{k: t[k] * n / t["all"] for k, n in (("eager", 1), ("uncached", N)) if k in t})
    peaks = [ig.peak_memory(device) for _ in range(6) if done and roll(done, min(N, 8))]
    used.kept.clear()                                                # graphs

    cost, rate, text = R * (S - 1) * (6 * w + 12 * L * C * S), flops / 2, ids(R, S).to(device)
    activations = lambda tokens: tokens * (16 * V + 80 * L * C)      # bytes, roughly
    if fits("LM step", R, cost / rate, 16 * w + activations(R * S)):
        optimizer = ig.adamw(model, 1e-4)
        t = timed(device, patience, step=lambda: (
            ig.accumulate(lambda i: ig.lm_loss(model, text[i]), torch.ones(R)),
            ig.clip_and_step(model, optimizer, 1e-4)))["step"]
        line("LM step", rows=R, ms=1e3 * t, per_second=R * (S - 1) / t, share=cost / t / flops)
        rate, optimizer = cost / t, None

    # An iteration is many works, so it may take longer: forwards of 4 nets, 3 gradients, 24 w FLOPs a token.
    seconds = slower * whole(E) + 24 * w * E * (P + N) / rate
    if fits("PPO-ptx iteration", E, seconds / 5, 56 * w + activations(E // M * (P + N))):
        cfg, enc, runs = ig.Config(max_new_tokens=N), SimpleNamespace(eot_token=V), []
        reference, reward = ig.freeze(model), ig.freeze(ig.copy_of(model, "scalar"))
        policy, value, text = ig.copy_of(model), ig.copy_of(reward), ids(E // M, P + N).to(device)
        optimizers = ig.adamw(policy, 1e-5), ig.adamw(value, 1e-5)

        def iteration():
            e = ig.make_experience(cfg, enc, policy, value, reference, reward, ids(E, P).tolist(), None,
                                   ig.gae)
            for rows in torch.randperm(E, device=device).tensor_split(M):
                ig.update(cfg, policy, value, optimizers, e, rows, 1.0, text, 1.0)
        timed(device, patience, iteration=lambda: runs.append(phases(device, iteration)))
        run = sorted(runs[len(runs) > 1:], key=lambda run: sum(run.values()))[(len(runs) - 1) // 2]
        t = sum(run.values())
        line("PPO-ptx iteration", rows=E, ms=1e3 * t, per_second=E / t)
        for phase, seconds in run.items():
            line("  " + phase, ms=1e3 * seconds, share=seconds / t)
    peak, growth = ig.peak_memory(device) / 1e6, (peaks[-1] - peaks[0]) / 1e6 if done else 0.0
    line(f"peak {peak:,.0f} MB, {growth:+.1f} MB by 5 more rollouts", peak_mb=peak, growth_mb=growth)


def bench(argv, batches=(1, 8, 64, 512), part=1, patience=3.0):
    """The command line. A test shrinks it: fewer batches, a part of the rows, fewer seconds for each work."""
    parser = argparse.ArgumentParser(description="How fast each part of instructgpt.py is on this machine.")
    parser.add_argument("bench", choices=["bench"])
    parser.add_argument("--size", choices=SIZES, help="this one alone (default: all, about two minutes)")
    parser.add_argument("--json", metavar="FILE", default=os.devnull, help="writes all numbers to it as well")
    parser.add_argument("--device", default="", help="cuda or cpu (default: the best there is)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=THREADS, help="of the CPU (default: %(default)s)")
    a, rows, start = parser.parse_args(argv), [], time.perf_counter()
    try:
        device, low = ig.find_device(a.device, a.dtype), a.dtype == "bfloat16"
        torch.set_num_threads(a.threads)
        torch.set_flush_denormal(True), torch.empty(8_000_000)         # as the command does
        file = open(a.json, "w", encoding="utf-8")
    except (ig.UserError, OSError, RuntimeError) as e:               # RuntimeError: no such device or number
        parser.error(str(e))
    chip = f"{device}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    info = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else chip, "dtype": a.dtype,
            "threads": a.threads, "torch": torch.__version__, "python": platform.python_version()}

    def line(size, work, **numbers):
        show = lambda x: "-" if x is None else f"{x:,.0f}" if x >= 100 or type(x) is int else f"{x:.3g}"
        cells = {k: show(x) if k != "share" else f"{100 * x:.1f} %" for k, x in numbers.items()}
        row = f"{size:9}{work:20}" + "".join(f"{cells.get(k, ''):>{n}}" for k, n in WIDTHS.items())
        print(row.rstrip(), flush=True)
        rows.append({"size": size, "work": work.strip(), **numbers})

    print("\n".join(f"{k:12}{x}" for k, x in info.items()), LEGEND, sep="\n")
    print(f"{'size':9}{'work':20}" + "".join(f"{k.replace('_', ' '):>{n}}" for k, n in WIDTHS.items()))
    with file, ig.precision(device, a.dtype):
        n, m = (2 ** 30, 8192) if device.type == "cuda" else (2 ** 27, 2048)           # n: beyond the caches
        x, y = torch.zeros(n // 4, device=device), torch.ones(n // 4, device=device)
        z = torch.randn(m, m, device=device, dtype=torch.bfloat16 if low else torch.float32)
        t = timed(device, patience, copy=lambda: x.copy_(y), product=lambda: z @ z)
        bandwidth, flops, x, y, z = 2 * n / t["copy"], 2 * m ** 3 / t["product"], None, None, None
        line("machine", "copy", ms=1e3 * t["copy"], per_second=bandwidth / 1e9)
        line("machine", "matrix product", ms=1e3 * t["product"], per_second=flops / 1e9)
        for name in [a.size] if a.size else SIZES:
            bench_size(name, device, low, bandwidth, flops, partial(line, name), batches, part, patience)
        json.dump({**info, "seconds": time.perf_counter() - start, "rows": rows}, file, indent=1)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


def test_bench_prints_its_table_and_writes_its_numbers(tmp_path, capsys):
    words = "bench --size toy --device cpu --threads 1 --json".split() + [str(tmp_path / "b.json")]
    assert bench(words, batches=(1, 8), part=8, patience=0.1) == 0
    table, kept = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    assert {"device", "dtype", "threads", "torch", "python", "seconds", "rows"} <= set(kept)
    works = {(r["work"], r.get("rows")): r for r in kept["rows"]}
    expected = [("copy", None, "per_second"), ("matrix product", None, "per_second"),
                ("rollout", 1, "per_second step_ms share"), ("LM step", 4, "per_second share"),
                ("rollout", 8, "per_second step_ms share uncached"), ("PPO-ptx iteration", 8, "per_second")]
    for work, n, keys in expected + [(k, None, "share") for k in [*sum(PHASES.values(), []), "rest"]]:
        assert all(0 < works[work, n][k] < math.inf for k in ["ms", *keys.split()]), work
        assert f" {work} " in table
    assert kept["rows"][-1]["peak_mb"] >= kept["rows"][-1]["growth_mb"] >= 0
    assert max(map(len, table.splitlines())) <= 110


@pytest.mark.parametrize("words", [
    "", "x", "bench --size big", "bench --device tpu", "bench --threads 0",
    "bench --threads 1 --json no/where", "bench --device cpu --dtype bfloat16"])
def test_bench_refuses_wrong_words_before_it_starts(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench(words.split())
    out, error = capsys.readouterr()
    assert not out and ": error: " in error and "Traceback" not in error


def test_section_c4_graphs_are_kept_apart_by_temperature_and_end(monkeypatch):
    monkeypatch.setattr(ig, "capture", Graph)
    model = tiny()
    for eos, temperature in ((EOS, 1.0), (EOS, 0.5), (3, 1.0)):        # a graph has both built in
        assert_same_rollout(*(ig.rollout(model, PROMPTS, 8, eos, temperature, seeded(0), graphs=g)
                              for g in (True, False)))


def test_eq2_kl_is_to_the_reference_not_to_the_sampler(enc, sets):
    reference, reward_model = small_models(enc)
    prompts = [p["ids"] for p in small_prompts(enc, sets, 16)]
    e = ig.make_experience(ig.Config(**SMALL), enc, move(deepcopy(reference)), reward_model, reference,
                           reward_model, prompts, seeded(1))
    close(e["ref_logprobs"], ig.token_logprobs(reference, e["tokens"], 1.0, e["mask"]), atol=1e-5, rtol=0)
    assert (e["logprobs"] - e["ref_logprobs"]).abs().max() > 0.01


def test_bfloat16_logits_come_from_a_product_of_a_width_that_64_divides(monkeypatch):
    model, tokens, widths, linear = tiny(), torch.randint(V, (3, 8), generator=seeded(0)), [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *b: widths.append(len(w)) or linear(x, w, *b))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens)
    exact = model(tokens)
    assert widths[len(widths) // 2 - 1] == 64 and widths[-1] == V      # the head's is the last of a forward
    assert low.shape == exact.shape == (3, 8, V)
    assert (low - exact).abs().mean() < 0.02 * exact.abs().mean()
    low.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("version, there", [("2.11.1", False), ("2.12.0", True), ("2.13.0+cpu", True)])
def test_mps_is_taken_by_name_alone_and_from_the_version_in_which_it_is_right(monkeypatch, version, there):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
    assert ig.find_device("").type == "cpu"
    with contextlib.nullcontext() if there else pytest.raises(ig.UserError, match="2.12"):
        assert ig.find_device("mps").type == "mps"


def test_cuda_is_chosen_where_it_is_and_made_the_current_one_without_cudnn_attention(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    for name, index in (("", 0), ("cuda", 0), ("cuda:1", 1)):
        assert ig.find_device(name, "bfloat16") == torch.device("cuda", index)
    assert calls == ["cuda:0", False, "cuda:0", False, "cuda:1", False]


def test_bfloat16_copy_is_made_once_and_steps_without_autocast(monkeypatch):
    model, step, seen = tiny(), ig.decode_step, []
    monkeypatch.setattr(ig, "decode_step", lambda policy, *a: seen.append(
        (policy, torch.is_autocast_enabled("cpu"))) or step(policy, *a))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            ig.rollout(model, PROMPTS, 4, EOS, 1.0, seeded(0))
    assert set(seen) == {(model.kept["bfloat16"], False)}              # a new one would lose its graphs


def test_what_a_model_keeps_for_a_gpu_goes_when_it_has_answered(enc, sets, tmp_path):
    policy, reward_model = small_models(enc)
    cfg = ig.Config(**SMALL, k_max=4, out=str(tmp_path))
    rows = [{**r, "split": "train"} for r in sets["rm_train"] if len(r["prompt"]) < 60][:3]
    with torch.autocast("cpu", torch.bfloat16):                        # here it is a copy in bfloat16
        out = ig.collect(cfg, enc, policy, rows, tw, seeded(0), random.Random(0), ig.Log(cfg, enc, tw))
        assert len(out) == 3 and not policy.kept
        ig.question(cfg, enc, {"SFT": policy}, reward_model, rows, {}, torch.device("cpu"))
        assert not policy.kept
        ig.rollout(policy, [[1]], 2, EOS)
        assert policy.kept


def test_section_c4_average_is_returned_and_stands_still_at_decay_1(enc, sets, small_corpus):
    average, reference, *_ = run_ppo(enc, sets, small_corpus, 0.0, policy_lr=1e-2, ema=1.0)
    assert torch.equal(weights(average), weights(reference))


def test_stage_stopped_at_a_step_goes_on_with_all_its_state(tmp_path):
    def stage(out, stop):
        cfg = ig.Config(out=str(out), save_every=1e9)
        log, model, rng, draw, out = ig.Log(cfg, None, None), tiny(), random.Random(0), seeded(0), []
        optimizer = ig.adamw(model.requires_grad_(True), 0.1)
        torch.manual_seed(0)
        with contextlib.suppress(KeyboardInterrupt):
            average = tiny(seed=1)
            for step in log.steps("x", 6, model=model, average=average, adam=optimizer, rng=rng, draw=draw,
                                  out=out):
                tokens = torch.randint(V, (2, 6), generator=draw)
                ig.accumulate(lambda i: ig.lm_loss(model, tokens[i]), torch.ones(2))
                ig.clip_and_step(model, optimizer, 0.1), ig.ema_update(average, model, 0.9)
                out.append((rng.random(), torch.rand(1).item()))
                log.stop = step == stop
        return out, weights(model), weights(average)
    for name in "ab":
        (tmp_path / name).mkdir()
    stage(tmp_path / "a", 2)
    for a, b in zip(stage(tmp_path / "a", None), stage(tmp_path / "b", None)):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


if __name__ == "__main__":
    sys.exit(bench(sys.argv[1:]))
