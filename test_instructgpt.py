"""
Tests of instructgpt.py, named after equations and sections of the paper (arXiv 2203.02155).

    pytest -q test_instructgpt.py                 all of them; with -k eq1 those of Eq. 1
    python test_instructgpt.py bench              no test: how fast each part is on this machine (--help)

Beside most formulas stands a slow twin: the definition in plain Python, which the fast one has to equal.
"""
import argparse
import ast
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, namedtuple
from contextlib import redirect_stderr, redirect_stdout
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

HERE = os.path.dirname(os.path.abspath(ig.__file__))
DATA = os.path.join(HERE, "data")
VOCAB = os.path.join(DATA, "vocab.tiktoken")
CPU = torch.device("cpu")
tw = ig.module_at(os.path.join(DATA, "toyworld.py"))
picture = ig.module_at(os.path.join(DATA, "picture.py"))
pytestmark = pytest.mark.filterwarnings("error")
THREADS = torch.get_num_threads()                # the machine's own choice, for bench
torch.set_num_threads(1)                         # matrices of 16 columns: a second thread only waits
close = torch.testing.assert_close
near = partial(close, atol=1e-5, rtol=1e-4)
V, EOS = 11, 10                                  # tiny vocabulary; id 0, the filler, is a word like any other
PROMPTS = [[3], [1, 2, 0, 4, 5], [7, 7], [0, EOS, 9]]                  # with the filler's id and EOS inside
RESPONSES = [[4, 0, EOS], [EOS], [1, 2, 3, 0, 5, EOS], [6, 6]]         # the last one does not end
MASK = torch.tensor([[0, 0, 1, 1, 1, 1],         # action frame: response to the end
                     [1, 0, 0, 0, 0, 0],         # one-token prompt, one-token response
                     [0, 1, 1, 1, 0, 0],
                     [0, 0, 0, 0, 0, 0]]).bool()                       # no response at all

def seeded(n):
    return torch.Generator().manual_seed(n)

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))

def words(*shape, seed=0):
    return torch.randint(V, shape, generator=seeded(seed))

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
            p.add_(size * normal(*p.shape, seed=1000 * seed + i))
    return model

def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def gradients(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

class Words:
    """An encoding of the tiny vocabulary: one letter per id, a newline for id 3."""
    eot_token, n_vocab = EOS, V

    def decode(self, ids):
        return "".join("\n" if i == 3 else chr(97 + i) for i in ids)

def small_config(folder, **settings):
    """A run of seconds; its log goes into the folder."""
    values = dict(n_layer=1, n_embd=16, block_size=24, pretrain_steps=6, pretrain_batch=4, sft_epochs=1,
                  episodes=16, minibatches=4, iterations=2, max_new_tokens=6)
    return ig.Config(out=str(folder), **{**values, **settings})

def read(*path):
    with open(os.path.join(*map(str, path)), encoding="utf-8") as file:
        return file.read()

def lines_of(*path):
    return [json.loads(line) for line in read(*path).splitlines()]

def logged(cfg, stage):
    return [line for line in lines_of(cfg.out, "log.jsonl") if line["stage"] == stage]

def spy(monkeypatch, name):
    """Remembers the arguments and the result of each call of a function of the script."""
    calls, real = [], getattr(ig, name)

    def watched(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append((args, result))
        return result
    monkeypatch.setattr(ig, name, watched)
    return calls

@pytest.fixture(scope="session")
def enc():
    return ig.find_encoding(VOCAB)

@pytest.fixture(scope="session")
def tiny_corpus():
    """A text of the tiny vocabulary, 40 documents of 24 tokens, and easy to learn."""
    return (np.arange(960) % V).astype(np.uint16), np.arange(0, 960, 24)

def small_policy(enc):
    torch.manual_seed(0)
    return ig.freeze(ig.GPT(ig.GPTConfig(enc.n_vocab, 48, 1, 2, 16)))

# Small runs of the command: of own data in `home`, of a part of the toy world in `toy`. Each folder has
# mine/, the data, out/, the run, and said, what it printed. Tests that change something copy what they need.
STAGES = list(ig.READS)
TINY = ["--encoding", VOCAB] + """--smoke --n_layer 1 --n_embd 16 --pretrain_steps 24 --pretrain_batch 4
    --pretrain_lr 0.02 --sft_batch 8 --sft_lr 0.02 --sft_dropout 0.1 --rm_prompts 12 --rm_batch 4 --warmup 1
    --iterations 3 --episodes 8 --minibatches 2 --policy_lr 0.01 --test_prompts 12
    --device cpu""".split()
SMALL = ig.Config(encoding=VOCAB)
ANIMALS = "cat dog hen cow bee owl ant pig".split()
COLORS = "red blue green black white grey".split()
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")

class Killed(BaseException):
    """As if the process were gone: nothing may catch it."""

def command(*words):
    """The command in this process -> its code, None if it was killed, and what it wrote."""
    out, err, code = io.StringIO(), io.StringIO(), None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = ig.main([str(word) for word in words])
        except Killed:
            pass
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())

def on(data, out):
    return ["--data", data, "--out", out, *TINY]

def refused(words, *told):
    """The command ends with code 2 and one line that holds all that is `told`."""
    done = command(*words)
    assert done.code == 2, (done.code, done.out[-300:])
    assert done.err.count("\n") == 1 and len(done.err) < 800 and not CONTROL.search(done.err), done.err
    assert all(str(word) in done.err for word in told) and "UserError" not in done.err, (told, done.err)
    return done

def write_lines(path, rows):
    path.write_text(ig.json_lines(rows), encoding="utf-8")

def files_of(folder):
    """{path: bytes} of all files, to see that nothing was written."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

def text_row(prompt, *answers):
    """A prompt, a demonstration or a comparison, by the number of answers."""
    names = ["completion"] if len(answers) == 1 else ["chosen", "rejected"]
    return {"prompt": prompt, **dict(zip(names, answers))}

def own_rows(form=text_row):
    """{file: rows}: 80 demonstrations, 120 comparisons, 40 prompts for RL, 40 for the test."""
    rng = random.Random(0)
    prompts = [f"What color is {rng.choice(ANIMALS)} {n}?" for n in range(280)]
    answers = [f"It is {rng.choice(COLORS)}." for _ in prompts]
    return {"sft_train.jsonl": [form(p, a) for p, a in zip(prompts[:80], answers)],
            "comparisons.jsonl": [form(p, a, "No.") for p, a in zip(prompts[80:200], answers)],
            "ppo_train.jsonl": [form(p) for p in prompts[200:240]],
            "test.jsonl": [form(p) for p in prompts[240:]]}

@pytest.fixture(scope="session")
def home(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("home"), random.Random(1)
    os.mkdir(folder / "mine")
    for name, rows in own_rows().items():
        write_lines(folder / "mine" / name, rows)
    for name, n in (("pretrain.txt", 300), ("pretrain_valid.txt", 60)):
        documents = [" ".join(rng.choices(ANIMALS + COLORS, k=30)) for _ in range(n)]
        (folder / "mine" / name).write_text("\n\n".join(documents) + "\n")
    done = command(*"ppo ppo_ptx dpo kto evaluate".split(), *on(folder / "mine", folder / "out"))
    assert done.code == 0, done.err
    (folder / "said").write_text(done.out)
    return folder

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The first rows of each file, and all stages."""
    folder = tmp_path_factory.mktemp("toy")
    mine = folder / "mine"
    os.mkdir(mine)
    shutil.copy(os.path.join(DATA, "toyworld.py"), mine)
    for name in ("sft_train", "flan_train", "rm_train", "rm_valid", "ppo_train", "test"):
        write_lines(mine / f"{name}.jsonl", lines_of(DATA, name + ".jsonl")[:40])
    for name in ("pretrain.txt", "pretrain_valid.txt"):
        (mine / name).write_text("\n\n".join(read(DATA, name).split("\n\n")[:200]))
    probes = json.loads(read(DATA, "probes.json"))
    for name in ("truthful", "toxic", "bias", "unseen"):
        probes[name] = probes[name][:6]
    probes["fewshot"] = {name: items[:4] for name, items in probes["fewshot"].items()}
    (mine / "probes.json").write_text(json.dumps(probes))
    assert command(*STAGES, *on(mine, folder / "out")).code == 0
    return folder

@pytest.fixture
def there(home, tmp_path):
    """A copy of own data and their run, moved and renamed."""
    return shutil.copytree(home, tmp_path / "there")

def read_data(folder, **settings):
    said = io.StringIO()
    with redirect_stdout(said):
        return ig.Data(replace(SMALL, data=str(folder), **settings)), said.getvalue()

def part_of(run, folder, stages):
    """Another folder with these stages of the run, and its settings."""
    os.makedirs(folder)
    for name in [stage + ".pt" for stage in stages] + ["settings.json"]:
        shutil.copy(run / "out" / name, folder)
    return folder

def numbers_of(out):
    """results.json without seconds, folder and save_every."""
    results = json.loads(read(out, "results.json"))
    del results["seconds"], results["config"]["out"], results["config"]["save_every"]
    return results

def assert_same_checkpoints(a, b, stages):
    for stage in stages:
        one, other = [ig.load(os.path.join(out, stage + ".pt")) for out in (a, b)]
        close(one.pop("weights", {}), other.pop("weights", {}), atol=0, rtol=0)
        assert {**one, "seconds": 0} == {**other, "seconds": 0}, stage

def kill(monkeypatch, kills):
    """Each kill is (what is raised, the file, before or after, how many saves of it in one command). With
    --save_every 0 each step is saved: time passes when somebody looks at it, and saving takes none."""
    real_save, saved, clock = ig.save, Counter(), SimpleNamespace(now=0.0)

    def time():
        clock.now += 1
        return clock.now

    def save(path, x):
        name, due = os.path.basename(path), ()
        saved[name] += 1
        if kills and kills[0][1] == name and kills[0][3] == saved[name]:
            due = kills.pop(0)
            saved.clear()
        if "before" in due:
            raise due[0]
        real_save(path, x)
        clock.now -= 1
        if due:
            raise due[0]
    monkeypatch.setattr(ig, "save", save)
    monkeypatch.setattr(ig, "time", SimpleNamespace(time=time))

# ---- Settings (App. C) -------------------------------------------------------------------------------------

def test_appendix_c_values_of_the_paper_stand_beside_the_toys():
    paper = {"sft_epochs": "16", "sft_lr": "9.65e-6", "rm_lr": "9e-6", "beta": "0.02", "ptx_coef": "27.8"}
    same = dict(sft_batch=32, k_min=4, k_max=9, minibatches=8, warmup=10, cliprange=0.2, ema=0.992)
    for f in fields(ig.Config):
        value, said = same.get(f.name, f.default), f.metadata["help"].split("[")[-1]
        assert f.default == value and said.startswith(paper.get(f.name, str(same.get(f.name, "")))), f.name

def test_settings_come_from_flags_then_smoke_then_out_then_from_then_default(tmp_path, monkeypatch):
    for name, known in (("out", dict(beta=0.3, lam=0.8, n_embd=32)), ("other", dict(beta=0.4, ema=0.5))):
        os.mkdir(tmp_path / name)
        (tmp_path / name / "settings.json").write_text(json.dumps({"settings": known, "files": {}}))
    words = ["--out", f"{tmp_path}/out", "--from", f"{tmp_path}/other"]
    cfg = ig.parse([*words, "--lam", "0.9", "--smoke"])[1]
    assert (cfg.lam, cfg.n_embd, cfg.beta, cfg.ema) == (0.9, ig.SMOKE["n_embd"], 0.3, ig.SMOKE["ema"])
    cfg = ig.parse(words)[1]
    assert (cfg.n_embd, cfg.beta, cfg.ema, cfg.cliprange) == (32, 0.3, 0.5, ig.Config.cliprange)
    assert ig.parse(["--smoke"])[1].out == "out_smoke" and ig.parse(["--smoke", "--out", "x"])[1].out == "x"
    monkeypatch.chdir(tmp_path)
    os.mkdir("gpt2")                             # a name of tiktoken's is no folder of that name
    assert ig.parse(["--encoding", "gpt2"])[1].encoding == "gpt2"

FLAGS = """
--typo 1; typo; --beta; --beta cat; --beta -1; --beta nan; --beta inf; --episodes 1.5; --episodes 0; --n_layer
0; --n_embd 30 --n_head 4; --n_head 0; --k_min 1; --k_min 5 --k_max 4; --episodes 4 --minibatches 5; --ou x;
--block_size 16; --max_new_tokens 60; --sft_mix 1; --unfinished_score nan; --device typo; chat sft;
chat label; label evaluate; --models PPO; --models TYPO chat; --out typo chat; --out typo label; --from typo;
--from .; --out file; --out file/x; collect; rlaif evaluate"""

@pytest.mark.parametrize("words", FLAGS.split(";"))
def test_bad_flags_are_one_line_and_nothing_is_written(words, home, tmp_path, monkeypatch):    # case 21
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    refused(["--data", home / "mine", *TINY, *words.split()], words.split()[0].strip("-"))
    assert os.listdir(tmp_path) == ["file"]

def test_every_stage_and_step_has_a_seed_of_its_own():                 # case 9
    names, other = {"judge", "ppo rollout", "ppo_ptx rollout", "label", *ig.READS}, replace(SMALL, seed=1)
    seeds = {ig.seed(SMALL, name, step).initial_seed() for name in names for step in range(20)}
    assert len(seeds) == 20 * len(names) and ig.seed(other, "sft").initial_seed() not in seeds

# ---- Tokens and rows (3.2) ---------------------------------------------------------------------------------

def test_section_32_prompt_and_response_are_tokens_of_the_page_they_make(enc):
    for prompt, response in (("Say moo.", "It says moo."), ("Say " + ig.EOT + " twice.", ig.EOT + " é🦊")):
        x, y = ig.encode_prompt(enc, prompt), ig.encode_response(enc, response)
        assert x + y == enc.encode_ordinary(prompt + ig.MARK + " " + response) + [enc.eot_token]
        assert (x + y).count(enc.eot_token) == 1                       # what is typed stays text
        assert ig.decode_response(enc, y) == ig.decode_response(enc, y[:-1]) == response
    assert ig.encode_response(enc, "") == [enc.eot_token] and ig.decode_response(enc, [enc.eot_token]) == ""

def test_corpus_batch_takes_rows_from_where_documents_begin():
    corpus = np.arange(100, 160, dtype=np.uint16), np.array([0, 7, 30])
    rows = ig.corpus_batch(corpus, 64, 5, seeded(0), "cpu")
    assert rows.shape == (64, 5) and rows.dtype == torch.long
    assert set(rows[:, 0].tolist()) == {100, 107, 130}
    assert torch.equal(rows, rows[:, :1] + torch.arange(5))
    assert torch.equal(rows, ig.corpus_batch(corpus, 64, 5, seeded(0), "cpu"))
    assert not torch.equal(rows, ig.corpus_batch(corpus, 64, 5, seeded(1), "cpu"))

def test_stack_makes_the_action_frame():
    tokens, mask, last = ig.stack([[5, 6, 7], [4], [8, 8]], [[0, 9, EOS], [EOS], [1, 2, 3, EOS]])
    assert tokens.tolist() == [[5, 6, 7, 0, 9, EOS], [4, EOS, 0, 0, 0, 0], [8, 8, 1, 2, 3, EOS]]
    assert mask.int().tolist() == [[0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 1, 1]]  # with EOS and a real 0
    assert last.tolist() == [5, 1, 5] and mask.dtype == torch.bool
    assert [row[1:][m].tolist() for row, m in zip(tokens, mask)] == [[0, 9, EOS], [EOS], [1, 2, 3, EOS]]

def test_batches_and_parts_hold_every_row_once_and_little_filler():
    lengths = torch.randint(1, 60, (1000,), generator=seeded(0)).tolist()
    plan = ig.batches(lengths, 32, 2, seeded(1))
    assert plan == ig.batches(lengths, 32, 2, seeded(1)) != ig.batches(lengths, 32, 2, seeded(3))
    means = []
    for epoch in (plan[:32], plan[32:]):
        assert sorted(sum(epoch, [])) == list(range(1000)) and sorted(map(len, epoch)) == [8] + [32] * 31
        spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in epoch]
        means.append([sum(lengths[i] for i in batch) for batch in epoch])
        assert ig.mean(spread) < 12              # of 58 in a shuffled batch
    assert means[0] != means[1] and means[0][:8] != sorted(means[0][:8])       # else short rows came first
    parts = ig.parts_by_length(lengths, 300)
    assert sorted(sum(parts, [])) == list(range(1000)) and len(parts) < 110

# ---- GPT (3.5) ---------------------------------------------------------------------------------------------

def slow_gpt(w, c, row, conv1d=False):
    """The decoder for one row, every head and every position by itself -> (T,V). w: name -> tensor, c: its
    GPTConfig; GPT-2's published layout, Conv1D, holds matrices (in,out)."""
    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred ** 2).mean(-1, keepdim=True).add(1e-5).rsqrt()
        return centred * scale * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ (w[name + ".weight"] if conv1d else w[name + ".weight"].T) + w[name + ".bias"]

    x, size = w["wte.weight"][row] + w["wpe.weight"][:len(row)], c.n_embd // c.n_head          # (T,C)
    for n in range(c.n_layer):
        q, k, v = linear(norm(x, f"h.{n}.ln_1"), f"h.{n}.attn.c_attn").chunk(3, -1)            # (T,C) each
        y = torch.zeros_like(x)
        for t in range(len(row)):
            for start in range(0, c.n_embd, size):
                head = slice(start, start + size)
                seen = F.softmax(k[:t + 1, head] @ q[t, head] / math.sqrt(size), -1)           # (t+1,)
                y[t, head] = seen @ v[:t + 1, head]
        x = x + linear(y, f"h.{n}.attn.c_proj")
        wide = F.gelu(linear(norm(x, f"h.{n}.ln_2"), f"h.{n}.mlp.c_fc"), approximate=c.gelu)
        x = x + linear(wide, f"h.{n}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T

@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_section_35_gpt_is_its_definition(gelu):
    model, row = tiny(gelu=gelu), [3, 0, 10, 7, 7, 1, 9]               # so it sees nothing of what follows
    near(model(torch.tensor([row]))[0], slow_gpt(model.state_dict(), model.config, row))

def test_section_35_gpt_heads_and_block():
    lm, scalar, tokens = tiny(), tiny("scalar", block=5), words(3, 5)
    assert lm(tokens).shape == (3, 5, V) and scalar(tokens).shape == (3, 5)
    assert set(scalar.state_dict()) - set(lm.state_dict()) == {"head.weight", "head.bias"}     # lm's is tied
    with pytest.raises(ValueError, match="6 tokens exceed the block of 5"):
        scalar(words(1, 6))

def test_section_35_copies_share_nothing_and_frozen_models_have_no_dropout():
    lm, tokens = tiny(dropout=0.5).train(), words(1, 6)
    reward_model = ig.copy_of(lm, "scalar")
    for name, p in lm.named_parameters():
        copy = reward_model.get_parameter(name)
        assert torch.equal(p, copy) and p.data_ptr() != copy.data_ptr()
    assert torch.equal(weights(ig.copy_of(reward_model, "scalar")), weights(reward_model))
    assert not torch.equal(lm(tokens), lm(tokens)) and reward_model.config.dropout == 0
    assert ig.freeze(lm) is lm and torch.equal(lm(tokens), lm(tokens)) and not lm.wte.weight.requires_grad

# ---- Rollout (C.4) -----------------------------------------------------------------------------------------

def slow_rollout(model, prompt, luck, eos, temperature):
    """One row, no cache: a forward pass per token, picked by walking its distribution -> ids, log-probs."""
    response, logprobs = [], []
    for u in luck:
        logits = model(torch.tensor([prompt + response]))[0, -1].double()       # (V,)
        p = F.softmax(logits / (temperature if temperature > 0 else 1), -1).tolist()
        token, total = 0, p[0]
        while total <= u:
            token += 1
            total += p[token]
        if temperature == 0:
            token = p.index(max(p))
        response.append(token)
        logprobs.append(math.log(p[token]) if temperature > 0 else 0.0)
        if token == eos:
            break
    return response, logprobs

@torch.no_grad()
def assert_is_slow_rollout(r, model, prompts, n, eos, temperature, seed):
    luck, T = torch.rand(n, len(prompts), generator=seeded(seed)), max(map(len, prompts)) + n
    assert r.tokens.shape == (len(prompts), T) and r.mask.shape == r.logprobs.shape == (len(prompts), T - 1)
    for b, prompt in enumerate(prompts):
        response, logprobs = slow_rollout(model, prompt, luck[:, b].tolist(), eos, temperature)
        first, end = len(prompt) - 1, len(prompt) - 1 + len(response)
        assert r.tokens[b].tolist() == prompt + response + [0] * (T - len(prompt) - len(response))
        assert r.mask[b].nonzero()[:, 0].tolist() == list(range(first, end))
        close(r.logprobs[b, first:end], torch.tensor(logprobs), atol=1e-5, rtol=0)
        assert r.logprobs[b][~r.mask[b]].abs().sum() == 0
        assert r.ended[b] == (response[-1] == eos) and r.responses()[b] == response
    assert r.prompt_lens.tolist() == [len(prompt) for prompt in prompts]

@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5, 0])
def test_section_c4_rollout_is_the_slow_sampler_token_for_token(temperature):
    model = tiny(dropout=0.3).train()
    state = torch.get_rng_state()
    given = {} if temperature == 1 else {"temperature": temperature}   # the default is 1
    r = ig.rollout(model, PROMPTS * 6, 12, EOS, generator=seeded(1), **given)
    assert_is_slow_rollout(r, model.eval(), PROMPTS * 6, 12, EOS, temperature, seed=1)         # no dropout
    assert temperature == 0 or 0 < r.ended.sum() < 24                  # both kinds of ending were seen
    assert torch.equal(state, torch.get_rng_state())                   # luck comes from the generator alone

def stand_in(sampler):
    """In record's place: the warm-up leaves its traces, and a replay takes the whole width."""
    replay = partial(sampler.step, sampler.tokens.size(1))
    with torch.no_grad():
        replay()
    return SimpleNamespace(replay=replay)

@pytest.mark.parametrize("graph", [False, True])
def test_section_c4_rollout_of_one_sampler_follows_weights_that_change(graph, monkeypatch):
    monkeypatch.setattr(ig.Sampler, "record", stand_in)
    model, n, kept = tiny(), 9, []
    sampler = ig.Sampler(model, 4, 24, n, EOS, 0.8, graph)
    for seed, prompts in enumerate([PROMPTS, [[5, 8, 1, 2]] * 4, [[5], [4, 3], [2], [1, 8]], PROMPTS[::-1]]):
        r = sampler.sample(prompts, seeded(seed))
        assert_is_slow_rollout(r, model, prompts, n, EOS, 0.8, seed)
        kept.append((r, deepcopy(r)))
        move(model, seed)                        # an optimizer changes weights in place
    for r, before in kept:                       # what was handed out is not overwritten by the next sample
        close(vars(r), vars(before), atol=0, rtol=0)

def test_section_c4_rollout_may_fill_the_block_but_not_exceed_it():
    model, prompts = tiny(block=12), [[1], [2, 3, 4, 5, 6, 7]]
    r = ig.rollout(model, prompts, 6, 99, 1.0, seeded(0))
    assert_is_slow_rollout(r, model, prompts, 6, 99, 1.0, 0)           # the last position works too
    for wrong in ((prompts, 7, 99), (prompts + [[]], 2, 99)):
        with pytest.raises(ValueError, match="block"):
            ig.rollout(model, *wrong)

def test_section_c4_pick_and_log_softmax_walk_the_distribution_and_stay_in_the_vocabulary():
    logits = torch.tensor([[-math.inf, 1., 1., -math.inf]]).repeat(5, 1)
    u = torch.tensor([0., 0.4999, 0.5001, 0.75, 1 - 2 ** -24])         # the ends pick no impossible token
    before = logits.clone()
    token, logprob = ig.pick(logits, u, 0.5)
    assert token.tolist() == [1, 1, 2, 2, 2] and torch.equal(logits, before)
    close(logprob, torch.full((5,), math.log(0.5)))
    token, logprob = ig.pick(normal(5, 4), u, 0)
    assert token.tolist() == normal(5, 4).argmax(-1).tolist() and logprob.tolist() == [0] * 5
    token, logprob = ig.pick(torch.full((5, 4), math.nan), u, 1.0)
    assert token.max() < 4 and logprob.isnan().all()                   # NaN goes on to where it is named
    u, p = torch.rand(64, generator=seeded(0)), F.softmax(normal(1, 4).repeat(64, 1) / 0.5, -1)
    token, logprob = ig.pick(normal(1, 4).repeat(64, 1), u, 0.5)
    assert token.tolist() == (p.cumsum(-1) <= u[:, None]).sum(-1).tolist()
    close(logprob, p.log().gather(1, token[:, None])[:, 0])
    half = ig.pick(normal(5, 4).bfloat16(), u[:5], 1.0)
    close(half, ig.pick(normal(5, 4).bfloat16().float(), u[:5], 1.0))      # float32 whatever the logits

class Tape(TorchDispatchMode):
    """Writes down every operator that runs, with the shapes of its tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shapes = [tuple(x.shape) for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        self.calls.append((str(func), shapes))
        return out

def test_section_c4_rollout_step_keeps_its_shapes_and_never_waits_for_the_host():
    sampler, tapes = ig.Sampler(tiny(), 4, 24, 7, EOS), []
    step = sampler.step

    def taped(width):
        with Tape() as tape:
            tape.calls = []
            step(24)                             # full width, as on a GPU
        tapes.append(tape.calls)
    sampler.step = taped
    sampler.sample(PROMPTS, seeded(1))
    assert len(tapes) > 4 and len(tapes[0]) > 30 and all(tape == tapes[0] for tape in tapes)
    waits = "_local_scalar_dense nonzero aten.equal masked_select _to_copy scalar_tensor lift_fresh".split()
    assert not [name for name, _ in tapes[0] if any(wait in name for wait in waits)]

# ------------------------------------------------------------------------------------------------------------
# Formulas: log-probs and masked statistics; Eq. 1 and 2; advantages, losses, averages, rates (C.1, C.4)

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_column_t_speaks_of_token_t_plus_1(temperature):
    model, tokens = tiny(), words(4, 7)
    with torch.no_grad():
        got = ig.token_logprobs(model, tokens, temperature)
        kept = ig.token_logprobs(model, tokens, temperature, MASK)
        for b in range(4):
            for t in range(6):
                p = F.softmax(model(tokens[b:b + 1, :t + 1])[0, -1] / temperature, -1)[tokens[b, t + 1]]
                assert abs(got[b, t].item() - math.log(p)) < 1e-5
    close(kept, got.masked_fill(~MASK, 0))       # with a mask the same, and 0 elsewhere
    assert got.shape == (4, 6)

def batch_with_filler():
    """The rows of PROMPTS and RESPONSES, with filler of any kind behind them."""
    tokens, mask, last = ig.stack(PROMPTS, RESPONSES)
    for row, n in zip(tokens, last.tolist()):
        row[n + 1:] = 9
    return tokens, mask, last

def test_section_35_lm_loss_counts_all_tokens_or_the_response_alone():
    model, terms = tiny(), []
    for prompt, response in zip(PROMPTS, RESPONSES):
        row = prompt + response
        logprobs = F.log_softmax(model(torch.tensor([row]))[0], -1)             # (T,V)
        losses = [-logprobs[t - 1, row[t]] for t in range(1, len(row))]
        near(ig.lm_loss(model, torch.tensor([row])), sum(losses) / len(losses))
        terms += losses[len(prompt) - 1:]
    tokens, mask, _ = batch_with_filler()
    near(ig.lm_loss(model, tokens, mask), sum(terms) / len(terms))

def test_section_35_reward_scores_are_read_at_the_last_token():
    model, rows = tiny("scalar"), zip(PROMPTS, RESPONSES)
    alone = [model(torch.tensor([prompt + response]))[0, -1] for prompt, response in rows]
    tokens, _, last = batch_with_filler()
    near(ig.reward_scores(model, tokens, last), torch.stack(alone))

def test_masked_mean_is_the_mean_over_the_mask():
    x = normal(*MASK.shape)
    inside = [x[b, t].item() for b, t in MASK.nonzero().tolist()]
    assert ig.masked_mean(x, MASK).item() == pytest.approx(sum(inside) / len(inside))
    assert ig.masked_mean(x, MASK & False) == 0

def test_whiten_is_its_definition_and_safe_for_one_element_and_for_none():
    x, one = 3 + 2 * normal(*MASK.shape), torch.zeros_like(MASK)
    inside = [x[b, t].item() for b, t in MASK.nonzero().tolist()]
    mean = sum(inside) / len(inside)
    std = math.sqrt(sum((v - mean) ** 2 for v in inside) / len(inside))         # of the whole population
    near(ig.whiten(x, MASK), torch.where(MASK, (x - mean) / std, 0.))
    one[2, 3] = True
    assert ig.whiten(x, one).abs().max() < 1e-3 and ig.whiten(x, MASK & False).abs().max() == 0

# Whatever stands outside the mask: same value, same gradient. A case is the masked slots of each input, the
# formula and its other arguments; fixed random weights make one number of what returns tensors.
RANKS = torch.tensor([[1, 2, 0, 2], [0, 0, 0, 0], [3, 1, 2, 4], [0, 1, 0, 0]])
IGNORING = {
    "masked_mean": ([~MASK], ig.masked_mean, [MASK]), "whiten": ([~MASK], ig.whiten, [MASK]),
    "eq1_reward_loss": ([RANKS == 0], ig.reward_loss, [RANKS]),
    "eq2_token_rewards": ([~MASK.any(1), ~MASK, ~MASK], ig.token_rewards, [MASK, 0.3]),
    "gae": ([~MASK] * 2, ig.gae, [MASK, 0.9, 0.95]),
    "reinforce": ([~MASK], ig.reinforce, [None, MASK]),
    "policy_loss": ([~MASK] * 3, ig.policy_loss, [MASK]),
    "value_loss": ([~MASK] * 3, ig.value_loss, [MASK])}

@pytest.mark.parametrize("junk", [100., -1e9, math.nan, math.inf])
@pytest.mark.parametrize("name", IGNORING)
def test_masked_slots_change_neither_value_nor_gradient_of(name, junk):
    masks, formula, others = IGNORING[name]
    results = []
    for value in (0., junk):
        inputs = []
        for seed, masked in enumerate(masks):
            inputs.append(normal(*masked.shape, seed=seed).masked_fill(masked, value).requires_grad_())
        result = formula(*inputs, *others)
        if isinstance(result, tuple):
            result = torch.stack(result)
        upon = torch.randn(result.shape, generator=seeded(99))
        results.append([result.detach(), *torch.autograd.grad((result * upon).sum(), inputs)])
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)
    for masked, gradient in zip(masks, results[1][1:]):
        assert gradient[masked].abs().sum() == 0

def slow_reward_loss(scores, ranks):
    """Eq. 1, pair by pair: the mean over a prompt's pairs, then the mean over the prompts that have one."""
    losses = []
    for s, r in zip(scores, ranks):
        pairs = [(w, l) for w, l in itertools.permutations(range(len(r)), 2) if 0 < r[w] < r[l]]
        terms = [math.log1p(math.exp(s[l] - s[w])) for w, l in pairs]
        losses += [sum(terms) / len(terms)] if terms else []
    return sum(losses) / max(1, len(losses))

@pytest.mark.parametrize("K", [2, 9])
def test_eq1_reward_loss_is_the_mean_over_pairs(K):
    scores = 2 * normal(12, K, seed=K)
    full = torch.stack([torch.randperm(K, generator=seeded(b)) + 1 for b in range(12)])        # C(K,2) pairs
    ranks = torch.randint(0, K + 1, (12, K), generator=seeded(K))      # with ties and empty slots
    ranks[0], ranks[1], ranks[2], ranks[3] = 0, 1, 0, full[3]          # nothing, one tie, ...
    ranks[2, K - 1] = 1                                                # ... a single response
    for r in (full, ranks):
        want = slow_reward_loss(scores.tolist(), r.tolist())
        assert ig.reward_loss(scores, r).item() == pytest.approx(want, rel=1e-5)

def test_eq1_gradient_raises_the_better_and_no_pair_gives_none():
    scores, ranks = torch.zeros(2, 3, requires_grad=True), torch.tensor([[2, 1, 3], [1, 0, 1]])
    loss = ig.reward_loss(scores, ranks)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))                   # the second prompt has no pair
    assert scores.grad.flatten().tolist() == pytest.approx([0, -1 / 3, 1 / 3, 0, 0, 0])
    assert ig.reward_loss(scores[1:], ranks[1:]) == 0
    far = torch.tensor([[100., 0.], [0., 100.]], requires_grad=True)
    loss = ig.reward_loss(far, torch.tensor([[1, 2]] * 2))             # finite at large margins
    loss.backward()
    near(loss.detach(), torch.tensor(50.))
    near(far.grad, torch.tensor([[0., 0.], [-0.5, 0.5]]))

@pytest.mark.parametrize("gap", [0.1, 3.])
def test_eq2_kl_k1_and_kl_k3_have_the_exact_kl_as_their_mean(gap):
    pi, ref = F.log_softmax(gap * normal(2, 50).double(), -1)                   # (50,) each
    k1, k3 = ig.kl_k1(pi, ref), ig.kl_k3(pi, ref)
    close(k1, pi - ref)
    exact = F.kl_div(ref, pi, reduction="sum", log_target=True)
    close(((pi.exp() * k1).sum(), (pi.exp() * k3).sum()), (exact, exact))
    assert k1.min() < 0 <= k3.min() and ig.kl_k3(pi, pi).abs().max() == 0
    small = ig.kl_k3(torch.tensor(-1.), torch.tensor(-1.0001)).item()
    assert small == pytest.approx(5e-9, rel=0.1)                       # digits are not lost in exp(x) - 1

def slow_token_rewards(score, logprobs, ref_logprobs, mask, beta):
    rewards = [-beta * (p - q) if m else 0. for p, q, m in zip(logprobs, ref_logprobs, mask)]
    if any(mask):
        rewards[max(t for t in range(len(mask)) if mask[t])] += score
    return rewards

def test_eq2_token_rewards_are_their_definition():
    scores, new, ref = normal(4), normal(*MASK.shape, seed=1), normal(*MASK.shape, seed=2)
    got = ig.token_rewards(scores, new, ref, MASK, beta=0.3)
    rows = zip(scores.tolist(), new.tolist(), ref.tolist(), MASK.tolist())
    near(got, torch.tensor([slow_token_rewards(*row, 0.3) for row in rows]))
    near(got.sum(1)[:3], (scores - 0.3 * ((new - ref) * MASK).sum(1))[:3])     # Eq. 2's bracket

def slow_gae(rewards, values, discount, lam):
    """One response, by definition: A_t = sum over l of (discount lambda)^l delta_{t+l}."""
    n, v = len(rewards), values + [0.]           # after the end nothing is worth anything
    delta = [rewards[t] + discount * v[t + 1] - v[t] for t in range(n)]
    advantages = []
    for t in range(n):
        advantages.append(sum((discount * lam) ** l * delta[t + l] for l in range(n - t)))
    return advantages

@pytest.mark.parametrize("discount, lam", [(1.0, 0.0), (1.0, 0.95), (0.9, 0.7)])
def test_section_c4_gae_is_its_definition(discount, lam):
    rewards, values = normal(*MASK.shape), normal(*MASK.shape, seed=1)
    advantages, returns = ig.gae(rewards, values, MASK, discount, lam)
    for b, inside in enumerate(MASK):
        want = torch.tensor(slow_gae(rewards[b][inside].tolist(), values[b][inside].tolist(), discount, lam))
        close(advantages[b][inside], want)
        close(returns[b][inside], want + values[b][inside])
    assert advantages[~MASK].abs().max() == 0 and returns[~MASK].abs().max() == 0
    if (discount, lam) == (1.0, 0.95):
        close((advantages, returns), ig.gae(rewards, values, MASK))    # the defaults

def slow_policy_loss(new, old, advantage, clip):
    ratio = math.exp(new - old)
    return -min(ratio * advantage, max(1 - clip, min(1 + clip, ratio)) * advantage)

def slow_value_loss(value, old, goal, clip):
    clipped = max(old - clip, min(old + clip, value))
    return 0.5 * max((value - goal) ** 2, (clipped - goal) ** 2)

@pytest.mark.parametrize("clip", [0.1, 0.2])
@pytest.mark.parametrize("name, slow", [("policy_loss", slow_policy_loss), ("value_loss", slow_value_loss)])
def test_section_c4_definition_of(name, slow, clip):
    loss, inputs = getattr(ig, name), [0.4 * normal(*MASK.shape, seed=i) for i in range(3)]
    numbers = torch.stack(inputs)[:, MASK].T.tolist()                           # three per token
    terms = [slow(*three, clip) for three in numbers]
    given = [clip] if clip == 0.1 else []        # the default is 0.2
    assert loss(*inputs, MASK, *given).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)

def test_section_c4_ema_update_goes_1_minus_decay_of_the_way():
    average, model = tiny(), tiny(seed=1)
    start, goal = weights(average), weights(model)
    for _ in range(5):
        ig.ema_update(average, model, 0.992)
    close(weights(average), 0.992 ** 5 * start + (1 - 0.992 ** 5) * goal, atol=1e-6, rtol=1e-5)

def test_section_c1_cosine_ends_at_a_tenth():
    rates = [ig.cosine(step, 101) for step in range(101)]
    assert rates[0] == 1 and rates[50] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True) and ig.cosine(500, 101) == pytest.approx(0.1)
    warm = [ig.cosine(step, 110, warmup=10) for step in range(110)]
    assert warm[:11] == pytest.approx([i / 10 for i in range(1, 11)] + [1])
    assert warm[-1] == pytest.approx(0.1) and ig.cosine(0, 1) == 1

def test_section_c4_warmup_factor_starts_at_a_tenth_and_stays_at_1():
    assert [ig.warmup_factor(i, 10) for i in (0, 5, 10, 11, 500)] == pytest.approx([0.1, 0.55, 1, 1, 1])
    assert ig.warmup_factor(0, 0) == 1

# ---- Loops: what all need, steps 0 to 2, PPO and PPO-ptx (3.5, C.4) ----------------------------------------

def test_adamw_has_the_papers_betas_and_clip_and_step_clips_what_backward_left():
    model = tiny()
    group, = ig.adamw(model, 0.1).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.9, 0.95), 1e-8, 0, 0.1)
    optimizer, before = torch.optim.SGD(model.parameters(), 1.0), weights(model)
    want = gradients(1e3 * ig.lm_loss(model, words(1, 4)), model)
    (1e3 * ig.lm_loss(model, words(1, 4))).backward()
    assert ig.clip_and_step(model, optimizer, 0.5) == pytest.approx(want.norm().item(), rel=1e-4)
    close(before - weights(model), 0.5 * want / want.norm(), atol=1e-5, rtol=1e-3)
    assert all(p.grad is None for p in model.parameters())
    (math.nan * ig.lm_loss(model, words(1, 4))).backward()
    with pytest.raises(ig.NotFinite, match="gradient's norm became nan"):
        ig.clip_and_step(model, optimizer, 0.5)

def plain_sgd(model, lr):
    return torch.optim.SGD(model.parameters(), lr)

@pytest.mark.parametrize("mix, rows", [(0.0, 0), (0.4, 3)])
def test_section_35_sft_counts_the_response_and_mixes_rows_in(mix, rows, tmp_path, tiny_corpus, monkeypatch):
    monkeypatch.setattr(ig, "adamw", plain_sgd)
    gpt, demos = tiny(), list(zip(PROMPTS, RESPONSES))
    cfg = small_config(tmp_path, sft_mix=mix, sft_batch=4, sft_lr=0.5)
    start, batches = weights(gpt), spy(monkeypatch, "corpus_batch")
    model = ig.sft(cfg, "sft", gpt, demos, tiny_corpus)
    tokens, mask, _ = ig.stack(PROMPTS, RESPONSES)
    loss = -ig.token_logprobs(gpt, tokens)[mask].mean()
    assert logged(cfg, "sft")[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    if mix:
        (_, web), = batches
        assert web.shape == (rows, 24)
        loss = loss + mix * ig.lm_loss(gpt, web)
    slope = gradients(loss, gpt)
    close(start - weights(model), 0.5 * slope / max(1, slope.norm()), atol=1e-5, rtol=1e-3)
    assert torch.equal(weights(gpt), start) and not any(p.requires_grad for p in model.parameters())

COMPARED = []                                    # the last prompt has no pair, an answer of each other no end
for question, answers, given in (("What is a cat?", ["cat", "dog", "hat"], [2, 1, 9]),
                                 ("What is a hen?", ["hen", "cow"], [1, 2]),
                                 ("What is a map?", ["map", "map", "key", "box"], [1, 1, 3, 2]),
                                 ("What is a pen?", ["pen", "fox"], [1, 1])):
    COMPARED.append({"prompt": question, "responses": [f"a {answer}." for answer in answers], "ranks": given,
                     "ended": [answer not in ("hat", "cow", "box") for answer in answers]})

def test_section_35_normalise_reward_makes_demonstrations_0_and_keeps_differences(monkeypatch):
    reward_model, prompts, responses = ig.freeze(tiny("scalar")), PROMPTS * 3, RESPONSES * 3
    monkeypatch.setattr(ig, "tokens_at_once", {CPU: 12}.__getitem__)   # many parts
    before = [reward_model(torch.tensor([x + y]))[0, -1].item() for x, y in zip(prompts, responses)]
    near(torch.tensor(ig.score_all(reward_model, prompts, responses)), torch.tensor(before))
    ig.normalise_reward(reward_model, list(zip(prompts, responses)))
    after = torch.tensor(ig.score_all(reward_model, prompts, responses))
    near(after, torch.tensor(before) - sum(before) / 12)
    assert abs(after.mean()) < 1e-4 < abs(sum(before) / 12)

def experience(cfg, policy, reference):
    reward_model, value_net = tiny("scalar", seed=5), tiny("scalar", seed=6)
    sampler = ig.Sampler(policy, 16, 24, cfg.max_new_tokens, EOS, cfg.temperature)
    made = ig.make_experience(cfg, sampler, value_net, reference, reward_model, PROMPTS * 4, seeded(1))
    return made, reward_model, value_net

@pytest.mark.parametrize("temperature, at_once", [(1.0, 10 ** 6), (0.7, 30)])
def test_section_c4_make_experience_is_its_definition_row_by_row(temperature, at_once, monkeypatch):
    monkeypatch.setattr(ig, "tokens_at_once", {CPU: at_once}.__getitem__)      # 30: many parts
    cfg = ig.Config(temperature=temperature, max_new_tokens=9, beta=0.3, lam=0.8)
    policy, reference = tiny(), move(tiny())
    e, reward_model, value_net = experience(cfg, policy, reference)
    assert 0 < e.ended.sum() < 16 and len(set(e.lengths.tolist())) > 4
    for b, response in enumerate(e.responses()):
        row = torch.tensor([(PROMPTS * 4)[b] + response])
        n, mask = row.size(1), e.mask[b:b + 1, :row.size(1) - 1]
        assert e.lengths[b] == n and torch.equal(e.tokens[b, :n], row[0])
        score = reward_model(row)[0, -1] if response[-1] == EOS else torch.tensor(-1.)         # unfinished
        close(e.scores[b], score.detach(), atol=1e-5, rtol=0)
        ref = ig.token_logprobs(reference, row, temperature).detach()           # (1,n-1)
        values = value_net(row)[:, :-1].detach()                                # (1,n-1)
        rewards = torch.zeros(1, n - 1)
        rewards[mask] = -0.3 * (e.logprobs[b:b + 1, :n - 1] - ref)[mask]
        rewards[0, n - 2] += score.detach()      # on the action that ends
        advantages, returns = ig.gae(rewards, values, mask, 1.0, 0.8)
        for got, want in ((e.ref_logprobs, ref * mask), (e.values, values * mask), (e.rewards, rewards),
                          (e.raw_advantages, advantages), (e.returns, returns)):
            close(got[b:b + 1, :n - 1], want, atol=1e-4, rtol=1e-4)
            assert got[b, n - 1:].abs().sum() == 0
    close(e.advantages, ig.whiten(e.raw_advantages, e.mask))

@pytest.mark.parametrize("junk", [0., 100., math.nan])
@pytest.mark.parametrize("mixed", [False, True])
def test_section_c4_update_is_one_step_on_the_sum_of_both_gradients(mixed, junk):
    cfg = ig.Config(max_new_tokens=9, policy_lr=2., value_lr=3., ptx_coef=0.6, cliprange=0.1, value_clip=0.15,
                    temperature=0.7)
    e, _, value_net = experience(cfg, tiny(), tiny())
    policy, critic = move(tiny(), size=0.02), move(value_net, size=0.02)        # as after some minibatches
    rows, text = torch.tensor([9, 1, 5, 13, 2]), words(3, 12)
    mask, old = e.mask[rows], e.logprobs[rows]
    logprobs = ig.token_logprobs(policy, e.tokens[rows], 0.7)
    change = (logprobs - old)[mask].detach()
    ptx_loss = ig.lm_loss(policy, text) if mixed else torch.zeros(())
    loss = ig.policy_loss(logprobs, old, e.advantages[rows], mask, 0.1) + 0.6 * ptx_loss       # Eq. 2
    slope = gradients(loss, policy)
    v_loss = ig.value_loss(critic(e.tokens[rows])[:, :-1], e.values[rows], e.returns[rows], mask, 0.15)
    v_slope, starts = gradients(v_loss, critic), (weights(policy), weights(critic))
    for x in (e.logprobs, e.ref_logprobs, e.values, e.advantages, e.returns, e.rewards):
        x[~e.mask] = junk                        # changes nothing
    adams = plain_sgd(policy, 99.), plain_sgd(critic, 99.)             # the value net's rate does not warm up
    got = ig.update(cfg, policy, critic, adams, e, rows, text if mixed else None, 0.5)
    want = {"clip": ((change.exp() - 1).abs() > 0.1).float().mean().item(), "grad": slope.norm().item(),
            "ptx": ptx_loss.item(), "vloss": v_loss.item(), "change": change.abs().max().item()}
    assert got == pytest.approx(want, rel=1e-3) and 0 < got["clip"] < 1
    for model, start, g, lr in ((policy, starts[0], slope, 1.0), (critic, starts[1], v_slope, 3.0)):
        close(start - weights(model), lr * g / max(1, g.norm()), atol=1e-4, rtol=1e-3)

def run_ppo(folder, corpus, estimate=ig.gae, prompts=PROMPTS * 8, world=None, **settings):
    """PPO of tiny models -> average, config."""
    cfg, policy, reward_model = small_config(folder, **settings), tiny(), tiny("scalar", seed=10)
    prompts = [{"ids": ids, "task": None} for ids in prompts]
    before = weights(policy), weights(reward_model)
    average = ig.ppo(cfg, "ppo", Words(), policy, reward_model, prompts, corpus, world, estimate)
    assert torch.equal(weights(policy), before[0]) and torch.equal(weights(reward_model), before[1])
    return average, cfg

@pytest.mark.parametrize("mixed", [False, True])
def test_section_c4_ppo_goes_through_its_minibatches(mixed, tmp_path, tiny_corpus, monkeypatch):
    policies, update = [], ig.update

    def watched(*args):
        policies.append((args, update(*args), weights(args[1])))
        return policies[-1][1]
    monkeypatch.setattr(ig, "update", watched)
    made, prompts = spy(monkeypatch, "make_experience"), [[n % V, n // V] for n in range(20)]
    def golds(batch, texts, ended):              # each prompt stands beside its answer
        assert [p["ids"] for p in batch] == made[-1][1].tokens[:, :2].tolist()
        return [3.0] * len(texts)
    average, cfg = run_ppo(tmp_path, tiny_corpus if mixed else None, ig.reinforce, prompts, policy_lr=1e-2,
                           world=SimpleNamespace(golds=golds), ema=0.6, warmup=4, iterations=5, ptx_rows=3)
    asked, want = sum([args[5] for args, _ in made], []), weights(tiny())
    assert sorted(asked[:20]) == sorted(asked[20:40]) == sorted(prompts) and asked[:20] != asked[20:40]
    rows, factors = [args[5] for args, _, _ in policies], [args[7] for args, _, _ in policies]
    for i in range(0, 20, 4):
        assert sorted(torch.cat(rows[i:i + 4]).tolist()) == list(range(16))
        assert policies[i][1]["change"] < 1e-5 < policies[i + 1][1]["change"]   # at first the ratio is 1
    assert not torch.equal(torch.cat(rows[:4]), torch.cat(rows[4:8]))
    assert factors[::4] == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0])
    for args, numbers, moved in policies:        # the average follows each step
        want = 0.6 * want + 0.4 * moved
        assert args[6].shape == (12, 24) and numbers["ptx"] > 0 if mixed else args[6] is None
    near(weights(average), want)
    e, value_net = made[0][1], tiny("scalar", seed=10)                 # starts as the reward model
    near(e.values[e.mask], value_net(e.tokens[:, :-1])[e.mask].detach())
    near(e.raw_advantages, ig.reinforce(e.rewards, None, e.mask)[0])   # REINFORCE stands in the loop

def test_section_c4_ppo_learns_to_raise_the_score(tmp_path):
    _, cfg = run_ppo(tmp_path, None, episodes=128, iterations=12, policy_lr=3e-3, beta=0.01, warmup=0)
    scores = [line["score"] for line in logged(cfg, "ppo")]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.3

# ---- Neighbours: REINFORCE in PPO's place, DPO and KTO on the comparisons ----------------------------------

def test_reinforce_gives_each_token_its_whole_episode_less_the_mean():
    rewards, mask = normal(3, 6), MASK[:3]
    advantages, returns = ig.reinforce(rewards, None, mask)
    total = [rewards[b][mask[b]].sum() for b in range(3)]
    for b in range(3):
        close(returns[b], torch.where(mask[b], total[b], 0.))
        close(advantages[b], torch.where(mask[b], total[b] - sum(total) / 3, 0.))

def test_dpo_loss_is_log_2_at_the_reference_and_eq1_of_the_implicit_reward():
    w, l, ref_w, ref_l = (normal(6, seed=i) for i in range(4))
    assert ig.dpo_loss(w, l, w, l, 0.1).item() == pytest.approx(math.log(2))
    loss = ig.dpo_loss(w, l, ref_w, ref_l, 0.1)
    reward_w, reward_l = 0.1 * (w - ref_w), 0.1 * (l - ref_l)
    close(loss, ig.reward_loss(torch.stack([reward_w, reward_l], 1), torch.tensor([[1, 2]] * 6)))
    assert ig.dpo_loss(*torch.tensor([[-900.], [0.], [0.], [0.]]), 1.0).item() == pytest.approx(900)

def slow_kto_loss(ratios, desirable, kl0, beta, lambda_d=1.0, lambda_u=1.0):
    terms = []
    for ratio, good in zip(ratios, desirable):
        z = beta * (ratio - kl0) if good else beta * (kl0 - ratio)
        terms.append((lambda_d if good else lambda_u) * (1 - 1 / (1 + math.exp(-z))))
    return sum(terms) / len(terms)

def test_kto_loss_is_its_definition_and_one_half_at_the_reference():
    logp, ref, kl0 = torch.tensor([0.3, -1., 2.]), torch.tensor([0., 0.5, 1.]), torch.tensor(0.4)
    good = torch.tensor([True, False, True])
    want = slow_kto_loss((logp - ref).tolist(), good.tolist(), 0.4, 0.7, 1.5, 0.8)
    assert ig.kto_loss(logp, ref, good, kl0, 0.7, 1.5, 0.8).item() == pytest.approx(want, rel=1e-5)
    assert ig.kto_loss(logp, logp, good, torch.tensor(0.), 0.1).item() == pytest.approx(0.5)

def sums(model, enc, prompt, response, ended):
    """Slow twin: log pi(y|x), one response alone."""
    x, y = ig.encode_prompt(enc, prompt), ig.encode_response(enc, response)
    if not ended:
        y = y[:-1]
    logits = model(torch.tensor([x + y[:-1]]))[0].log_softmax(-1)
    return sum(logits[len(x) - 1 + t, token].item() for t, token in enumerate(y))

def first_loss(enc, folder, monkeypatch, train, stage):
    """The first loss, of a policy that has moved from the reference; and log pi/pi_ref of an answer."""
    reference = small_policy(enc)
    policy, cfg = move(deepcopy(reference), size=0.02), small_config(folder)
    monkeypatch.setattr(ig, "copy_of", lambda model: deepcopy(policy).requires_grad_(True))
    train(cfg, enc, reference, COMPARED)

    def ratio(c, n, prompt=None):
        answer = prompt or c["prompt"], c["responses"][n], c["ended"][n]
        return sums(policy, enc, *answer) - sums(reference, enc, *answer)
    return logged(cfg, stage)[0]["loss"], ratio

# of COMPARED: which question, which of its answers (no duplicates), how often it won less how often it lost
KEPT = [(0, 0, 0), (0, 1, 2), (0, 2, -2), (1, 0, 1), (1, 1, -1), (2, 0, 2), (2, 2, -2), (2, 3, 0)]

def test_train_dpo_takes_all_pairs_of_a_prompt_and_no_others(enc, tmp_path, monkeypatch):
    got, ratio = first_loss(enc, tmp_path, monkeypatch, ig.train_dpo, "dpo")
    losses = []
    for i, w, _ in KEPT:
        for j, l, _ in KEPT:
            c = COMPARED[i]
            if i == j and c["ranks"][w] < c["ranks"][l]:
                losses.append(math.log1p(math.exp(-0.2 * (ratio(c, w) - ratio(c, l)))))
    assert len(losses) == 7 and got == pytest.approx(sum(losses) / 7, rel=1e-4)

def test_kto_calls_desirable_what_wins_more_than_it_loses_and_mismatches_for_kl0(enc, tmp_path, monkeypatch):
    shifted = spy(monkeypatch, "kto_kl0")
    got, ratio = first_loss(enc, tmp_path, monkeypatch, ig.train_kto, "kto")
    (logp, ref), kl0 = shifted[0]
    want = []
    for i, n, _ in KEPT:                         # each prompt with the answers to the question after it
        want.append(ratio(COMPARED[i], n, COMPARED[i - 1 if i else 2]["prompt"]))
    close(torch.tensor(sorted((logp - ref).tolist())), torch.tensor(sorted(want)), atol=1e-4, rtol=0)
    assert kl0.item() == pytest.approx(max(0, sum(want) / 8), abs=1e-5)
    ratios = [ratio(COMPARED[i], n) for i, n, _ in KEPT]
    desirable = [merit > 0 for _, _, merit in KEPT]
    assert got == pytest.approx(slow_kto_loss(ratios, desirable, kl0.item(), 0.2), rel=1e-4)

@pytest.mark.parametrize("name, begin", [("dpo", math.log(2)), ("kto", 0.5)])
def test_dpo_and_kto_start_at_the_reference_and_learn_to_prefer(name, begin, enc, tmp_path):
    policy = small_policy(enc)
    before, cfg = weights(policy), small_config(tmp_path, policy_lr=1e-2, beta=0.5, rm_batch=4)
    train = {"dpo": ig.train_dpo, "kto": ig.train_kto}
    trained = train[name](cfg, enc, policy, COMPARED * 15)
    losses = [line["loss"] for line in logged(cfg, name)]
    assert losses[0] == pytest.approx(begin, abs=1e-5) and losses[-1] < 0.8 * begin
    assert torch.equal(weights(policy), before)  # reference and start
    ours, theirs = [sums(model, enc, "What is a hen?", "a hen.", True)
                    - sums(model, enc, "What is a hen?", "a cow.", False) for model in (trained, policy)]
    assert ours > theirs + 0.5

# ---- GPT-2's weights: small files in the published names and layout ----------------------------------------

def published(vocab=40, width=128, positions=64, layers=2, dtype=torch.float32, prefix=""):
    """The tensors of a random GPT-2: weights (in,out), and the masks that old files hold."""
    w = {"wte.weight": (vocab, width), "wpe.weight": (positions, width), "ln_f.weight": (width,),
         "ln_f.bias": (width,)}
    for n in range(layers):
        for name, rows, columns in (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4),
                                    ("mlp.c_proj", 4, 1)):
            w[f"h.{n}.{name}.weight"] = rows * width, columns * width
            w[f"h.{n}.{name}.bias"] = (columns * width,)
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            w[f"h.{n}.{name}"] = (width,)
    for seed, (name, shape) in enumerate(w.items()):
        scale, centre = 0.15 if len(shape) == 2 else 0.3, float("ln" in name and "weight" in name)
        w[name] = (scale * normal(*shape, seed=seed) + centre).to(dtype)
    for n in range(layers):
        w[f"h.{n}.attn.bias"] = torch.ones(1, 1, positions, positions, dtype=torch.uint8).tril()
        w[f"h.{n}.attn.masked_bias"] = torch.tensor(-1e4)
    return {prefix + name: x for name, x in w.items()}

def write_weights(path, w):
    """As published: with the ending .safetensors header and bytes, else a state dict."""
    if path.suffix != ".safetensors":
        torch.save(w, path)
        return path
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
             torch.bool: "BOOL", torch.int64: "I64"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in w.items():
        new = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape),
                        "data_offsets": [len(data), len(data) + len(new)]}
        data += new
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)    # so the tensors are not aligned
    return path

FILES = pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])

@FILES
@pytest.mark.parametrize("dtype, prefix, heads", [(torch.float32, "", 0), (torch.float16, "transformer.", 0),
                                                  (torch.bfloat16, "", 4)])
def test_gpt2_logits_are_those_of_the_published_layout(file, dtype, prefix, heads, tmp_path):
    w = published(dtype=dtype, prefix=prefix)
    model = ig.GPT.from_gpt2(write_weights(tmp_path / file, w), heads)
    assert model.config == ig.GPTConfig(40, 64, 2, heads or 2, 128, gelu="tanh")     # 64 wide, if not told
    row, w = list(range(40)), {name.removeprefix("transformer."): x.float() for name, x in w.items()}
    with torch.no_grad():
        got, want = model(torch.tensor([row]))[0], slow_gpt(w, model.config, row, conv1d=True)
    assert (got - want).abs().max() < 1e-4 < 1 < want.abs().max()      # the erf GELU would be 1e-3 away
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    w["lm_head.weight"], w["h.1.attn.bias"] = w["wte.weight"].clone(), torch.ones(3).bool()
    for name in ("h.0.attn.bias", "h.0.attn.masked_bias"):             # masks or none, a tied head: no harm
        del w[name]
    assert torch.equal(weights(model), weights(ig.from_gpt2(write_weights(tmp_path / file, w))))

@FILES
@pytest.mark.parametrize("name, x", [
    ("h.1.ln_2.bias", None), ("h.0.attn.c_attn.weight", torch.zeros(384, 128)), ("h.0.x", torch.zeros(2)),
    ("ln_f.bias", torch.zeros(128).long()), ("lm_head.weight", torch.zeros(40, 128))])
def test_gpt2_tensor_that_does_not_fit_is_named(name, x, file, tmp_path):
    w = {**published(), name: x}
    path = write_weights(tmp_path / file, {key: x for key, x in w.items() if x is not None})
    with pytest.raises(ig.UserError) as e:
        ig.from_gpt2(str(path))
    assert str(e.value).startswith(str(path)) and name in str(e.value) and "\n" not in str(e.value)

def test_gpt2_weights_and_a_small_rank_file_in_pretrainings_place(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.tiktoken").write_text("".join(read(VOCAB).splitlines(keepends=True)[:300]))
    for name, vocab in (("gpt2.bin", 301), ("other.bin", 551)):
        write_weights(tmp_path / name, published(vocab, 32))
    own = ["ppo", "evaluate", *on(home / "mine", "out"), "--encoding", "small.tiktoken", "--n_head", "4",
           "--max_new_tokens", "20", "--init", "gpt2.bin"]
    refused([*own, "--init", "other.bin"], "other.bin", "301", "551")   # cases 7 and 23
    for wrong in ("--n_head 5", "--n_head 0", "--block_size 96"):      # 0: narrower than a head of 64
        refused([*own, *wrong.split()], "gpt2.bin", wrong.split()[0])
    refused([*own, "--init", VOCAB], VOCAB, "GPT-2")
    textless = shutil.copytree(home / "mine", "mine", ignore=shutil.ignore_patterns("pretrain*"))
    refused([*own, "--data", textless], "pretrain.txt")                # the SFT mix takes it
    assert not os.path.exists("out")                                   # all of that is told first
    done = command(*own)
    assert done.code == 0 and "2 layers, 4 heads of 8" in done.out
    assert command(*own, "--data", textless, "--sft_mix", "0", "--out", "none").code == 0
    config = json.loads(read("out", "results.json"))["config"]
    assert (config["n_layer"], config["n_head"], config["n_embd"], config["vocab_size"]) == (2, 4, 32, 301)
    monkeypatch.chdir(home)                                            # a folder remembers whole paths
    assert command("ppo", "--out", tmp_path / "out").code == 0
    write_weights(tmp_path / "gpt2.bin", published(301, 32, layers=1))
    refused(["ppo", "--out", tmp_path / "out"], "pretrain.pt", "init")

# ---- Data and errors: "case n" is a kind of input that once went wrong -------------------------------------

def messages(*texts):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, texts)]

def ranked_row(prompt, *answers):
    ranked = {"prompt": prompt, "responses": list(answers), "ranks": [1, 2], "id": 7}
    return ranked if len(answers) == 2 else text_row(prompt, *answers)

def conversational_row(prompt, *answers):
    row = text_row(prompt, *(messages(prompt, answer)[1:] for answer in answers))
    return {**row, "prompt": messages(prompt)}

def doubled_row(prompt, *answers):                                     # the prompt stands in all three
    row = text_row(prompt, *(messages(prompt, answer) for answer in answers))
    return {**row, "prompt": messages(prompt)}

def messages_row(prompt, *answers):
    row = doubled_row(prompt, *answers)                                # and here in the answers alone
    row["messages"] = row.pop("completion", row.pop("prompt"))
    return row

@pytest.mark.parametrize("as_list", [False, True], ids=["lines", "list"])
@pytest.mark.parametrize("form", [text_row, ranked_row, messages_row, conversational_row, doubled_row])
def test_formats_have_one_normal_form(form, as_list, home, tmp_path):  # cases 18 and 19
    mine = shutil.copytree(home / "mine", tmp_path / "mine")
    for name, rows in own_rows(form).items():
        write_lines(mine / name, rows)
        if as_list:
            (mine / name).write_text("\n" + json.dumps(rows, indent=1))
    os.rename(mine / "comparisons.jsonl", tmp_path / "mine.json")      # whose name does not matter
    data = read_data(mine, comparisons=str(tmp_path / "mine.json"))[0]
    right = read_data(home / "mine")[0]
    assert data.demos == right.demos and data.rl_prompts == right.rl_prompts and data.tests == right.tests
    assert data.comparisons == right.comparisons

TALK = [{"role": "system", "content": "Be short."}, *messages("Hi", "Hello.", "Bye", "See you.")]
TALKED = "Be short.\nHi\nHello.\nBye"
RANKED = {"prompt": "a", "responses": ["b", "c", "d", "e"]}

@pytest.mark.parametrize("kind, row, right", [
    ("demonstration", {"messages": TALK}, {"prompt": TALKED, "responses": ["See you."]}),
    ("prompt", {"messages": TALK}, {"prompt": TALKED, "responses": []}),
    ("comparison", {"prompt": "Hi", "chosen": messages("Hi", "Hello."), "rejected": "Go."},
     {"prompt": "Hi", "responses": ["Hello.", "Go."], "ranks": [1, 2]}),
    ("comparison", {**RANKED, "ranks": [1, 2, 2, 3]}, {"ranks": [1, 2, 2, 4]}),            # case 5
    ("comparison", {**RANKED, "ranks": [0, -5, 10 ** 30, 0]}, {"ranks": [2, 1, 4, 2]}),
    # columns of another kind are not read
    ("prompt", {**RANKED, "ranks": [1, 2, 3, 4]}, {"prompt": "a", "responses": []}),
    ("demonstration", {**text_row("a", "b"), "responses": 7, "ended": 7}, {"responses": ["b"]})])
def test_normal_form(kind, row, right):
    made = ig.normal_form(row, kind)
    assert {name: made[name] for name in right} == right

def test_text_files_of_any_system_are_the_same_data(there, enc):
    right = read_data(there / "mine")[0]
    row = text_row("a\u2028b \u0085 \N{CAT}", "\u2029c\nd")            # no ends of lines
    text = json.dumps(row, ensure_ascii=False)
    made = ig.read_rows(SMALL, enc, "x", text, "demonstration")[0]
    assert (made["prompt"], made["responses"]) == (row["prompt"], [row["completion"]])
    for path in (there / "mine").iterdir():
        text = path.read_bytes().replace(b"\n\n", b"\n \t\n")          # a line of blanks is empty
        path.write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    data = read_data(there / "mine")[0]
    assert data.files == right.files and data.demos == right.demos     # the fingerprints too
    assert all(map(np.array_equal, data.corpus, right.corpus))

def test_long_documents_give_many_starts_and_short_ones_keep_theirs(enc, there):           # case 1
    long = "cat" + " cat" * 8999
    length = len(enc.encode_ordinary(long)) + 1                        # the end-of-text behind it
    for name in ("pretrain.txt", "pretrain_valid.txt"):
        (there / "mine" / name).write_text(f"{long}\n\n{' dog' * 99}")
    data = read_data(there / "mine")[0]
    for tokens, starts in (data.corpus, data.corpus_valid):
        assert list(starts[starts < length]) == list(range(0, length, 64)) and length in starts
        assert starts[-1] + 64 <= len(tokens)
    tokens, starts = ig.load_corpus("cat dog\n\nhen\n\ncow and bee\n\n" + "owl " * 60, "x", enc, 30)
    ends = np.flatnonzero(tokens == enc.eot_token)
    assert list(starts[:4]) == [0, *(ends[:3] + 1)]                    # where the four documents start

def test_blank_and_long_rows_are_left_out_and_counted_once(there):     # case 17
    mine, rows = there / "mine", own_rows()
    odd = [text_row(" \n", "cat")] * 4 + [text_row("cat " * 60, "dog"), text_row("cat", "dog " * 30)]
    write_lines(mine / "sft_train.jsonl", odd + rows["sft_train.jsonl"])
    unfinished = {"prompt": "cat", "responses": ["dog", ""], "ranks": [1, 2], "ended": [True, False]}
    write_lines(mine / "comparisons.jsonl", rows["comparisons.jsonl"] + [text_row("a", "b", " "), unfinished])
    data, said = read_data(mine)
    demos, pairs = [line for line in said.splitlines() if "left out" in line]
    assert "sft_train.jsonl" in demos and " 6 of 86 " in demos and len(data.demos) == 80
    assert "comparisons.jsonl" in pairs and " 1 of 122 " in pairs
    assert data.comparisons[-1]["responses"] == ["dog", ""]

# file, line that is changed or None for the whole file -> (what stands there, told)
DEMO, PAIR = '{"prompt": "a", "completion": %s}', '{"prompt": "a", "responses": ["b", "c"], %s}'
ANSWERS = '{"prompt": "a", "responses": %s, "ranks": [1, 2]}'
SPLIT = '{"prompt": "a", "chosen": "b", "rejected": "c", "split": %s}'
BAD = {
    ("sft_train.jsonl", 9): [
        ('{"prompt": "a", "completion": "b"', "JSON"), ('{"prompt": "a"}', "1 responses"), ("7", "int"),
        ("[" * 100_000, "Recursion"), (DEMO % '"\\ud83d"', "surrogates"),
        (DEMO % "7", "int"), ('{"instruction": "a", "completion": "b"}', "prompt"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "1 responses"), ('{"messages": "a"}', "prompt"),
        (b'{"prompt": "\xff", "completion": "b"}', "utf-8"), (b'{"prompt": "a\0", "completion": "b"}', "NUL"),
        (DEMO % ('"' + "b" * 400_000 + '"'), "characters")],
    ("sft_train.jsonl", None): [
        (" \n\r\n\t\n", "blanks"), ('[{"prompt": "a", "completion": "b"}, 7]', "row 2")],
    ("comparisons.jsonl", 5): [
        (PAIR % '"ranks": "12"', "ranks 12"), (PAIR % '"ranks": [1.0, 2.0]', "ranks"),
        (PAIR % '"ranks": [true, false]', "ranks"), (PAIR % '"ranks": [1, 2, 3]', "ranks"),
        (PAIR % '"ended": [true, true]', "ranks"), (PAIR % '"ranks": [1, 2], "ended": [1, 0]', "ended"),
        (ANSWERS % '"bc"', "responses"), (ANSWERS % '["b"]', "1 responses"),
        ('{"prompt": "a", "chosen": "b"}', "rejected"),
        (json.dumps({"chosen": messages("a", "b"), "rejected": messages("c", "d")}), "prompt"),
        (SPLIT % '"validation"', "validation")],           # case 15
    ("comparisons.jsonl", None): [
        ((PAIR % '"ranks": [1, 1]' + "\n") * 8, "unequal"), ((SPLIT % '"train"' + "\n") * 8, "valid")],
    ("ppo_train.jsonl", 40): [('{"question": "a"}', "prompt")],
    ("test.jsonl", 2): [('{"prompt": 7}', "int")],
    ("pretrain.txt", 7): [(b"caf\xe9", "utf-8"), (" " * 400_001, "characters")],
    ("pretrain_valid.txt", None): [("cat", "--block_size")],
    ("vocab.tiktoken", 300): [("?? 299", "must be"), ("YWJj 300", "300"), ("AA== 299", "AA==")],
    ("vocab.tiktoken", None): [("AA== 0\n", "byte")]}

@pytest.mark.parametrize("name, line", BAD)
def test_bad_files_are_one_line_and_nothing_is_written(name, line, there):
    """With a finished run and without one; always before the first stage (case 16)."""
    path = there / "mine" / name
    shutil.copy(VOCAB, there / "mine")
    good = path.read_bytes()
    for text, told in BAD[name, line]:
        lines = good.split(b"\n")
        where = slice(line and line - 1, line)                         # None: the whole file
        lines[where] = [text if isinstance(text, bytes) else text.encode()]
        path.write_bytes(b"\n".join(lines))
        before = files_of(there)
        for out in (there / "new", there / "out"):
            words = ["evaluate", *on(there / "mine", out), "--encoding", there / "mine" / "vocab.tiktoken"]
            done = refused(words, f"{path}:{line}:" if line else name, told)
            assert "pretrain:" not in done.out
        assert files_of(there) == before and not (there / "new").exists()

@pytest.mark.parametrize("name", ["pretrain.txt", "sft_train.jsonl", "comparisons.jsonl", "ppo_train.jsonl",
                                  "test.jsonl", "--comparisons", "--encoding", "--init", "--data", "--rival"])
def test_missing_files_are_told_before_the_first_stage(name, there):
    if not name.startswith("--"):
        os.remove(there / "mine" / name)
    words = [name, "typo"] if name.startswith("--") else []
    refused(["ppo_ptx", "evaluate", *on(there / "mine", there / "new"), *words], (words or [name])[-1])
    assert not (there / "new").exists()

@pytest.mark.parametrize("name, line", [
    ("probes.json", "{"), ("probes.json", ""), ("ppo_train.jsonl", '{"prompt": "a"}'),
    ("test.jsonl", '{"prompt": "a", "task": {"kind": "fly"}, "use_case": "x", "form": "x"}')])
def test_bad_files_of_the_toy_world_are_one_line(name, line, tmp_path):
    for file in ("toyworld.py", "probes.json", "vocab.tiktoken", "sft_train.jsonl"):
        shutil.copy(os.path.join(DATA, file), tmp_path)
    (tmp_path / name).write_text(line + "\n")
    refused(["sft", "--data", tmp_path, "--out", tmp_path / "new"], name)
    assert not (tmp_path / "new").exists()

VALUES = [None, True, -1, 1.5, 10 ** 30, "", " ", "a", "\0", "\ud800", "a " * 300, "train", [], {}, ["a"],
          [1, 2], [[]], {"a": "b"}, [True, False], messages("a", "b")[1:]]
KEYS = "prompt messages chosen ranks ended split role".split()
JUNK = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"{", b"]", b'"', b"\\u", b"9" * 5000, b" " * 9]
GOOD = {"demonstration": [text_row("a cat", "a dog"), {"messages": messages("a", "b")}],
        "comparison": [{**text_row("a", "b", "c"), "split": "train"}, messages_row("a", "b", "c"),
                       {**RANKED, "ranks": [1, 2, 2, 3], "ended": [True, True, False, True]}],
        "prompt": [text_row("a"), {"messages": messages("a", "b", "c")}]}

def change_value(x, rng):
    """The value with one change somewhere inside."""
    if not isinstance(x, (list, dict)) or not x or rng.random() < 0.2:
        return rng.choice(VALUES)
    x, key = x.copy(), rng.choice(list(x) if isinstance(x, dict) else range(len(x)))
    if isinstance(x, dict) and rng.random() < 0.4:
        x[rng.choice(KEYS)] = x.pop(key)
    else:
        x[key] = change_value(x[key], rng)
    return x

def mutated(kind, rng):
    """The bytes of a file of this kind with a few changes."""
    lines = read(VOCAB).splitlines()[:rng.choice([255, 256, 300])]
    if kind in GOOD:
        lines = [json.dumps(row if rng.random() < 0.6 else change_value(row, rng)) for row in GOOD[kind]]
    data = "\n".join(lines).encode() + b"\n"
    for _ in range(rng.choice([0, 0, 1, 2])):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        put_in = data[:i] + rng.choice(JUNK) + data[i + 1:]
        data = rng.choice([put_in, data[:i] + data[j:], data[:j] + data[i:], data[:j]])
    return data

def read_mutated(kind, path, enc):
    """Reads the file as its kind: all is in its normal form, each text stands in the file, no row is lost."""
    if kind == "ranks":
        enc = ig.find_encoding(path)
        assert enc.decode(enc.encode_ordinary("a \N{CAT}")) == "a \N{CAT}"
        return
    text, said = ig.read_text(path), io.StringIO()
    with redirect_stdout(said):
        rows = ig.read_rows(SMALL, enc, path, text, kind)
    given = [json.loads(line) for line in text.split("\n") if line.strip()]
    given = given[0] if text.lstrip().startswith("[") else given
    assert len(rows) + int((re.findall(r": (\d+) of ", said.getvalue()) or [0])[0]) == len(given)
    for row in rows:
        n = len(row["responses"])
        assert {"prompt": n == 0, "demonstration": n == 1, "comparison": n > 1}[kind] and row["prompt"]
        assert len(row["ranks"]) == len(row["ended"]) == n and set(row["ranks"]) <= set(range(1, n + 1))
        for text in row["responses"] + row["prompt"].split("\n"):
            assert json.dumps(text)[1:-1] in json.dumps(given)

def test_mutated_files_are_taken_rightly_or_refused_in_one_line(tmp_path, enc):
    rng, taken, path = random.Random(0), 0, tmp_path / "mutated"
    for _ in range(200):                         # by hand: more, and other seeds
        kind = rng.choice([*GOOD, "ranks"])
        path.write_bytes(mutated(kind, rng))
        try:
            read_mutated(kind, str(path), enc)
            taken += 1
        except ig.UserError as e:
            assert str(e).startswith(str(path)) and "\n" not in str(e) and len(str(e)) < 800
    assert 40 < taken < 160

class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)

def packed(x):
    file = io.BytesIO()
    torch.save(x, file)
    return file.getvalue()

def test_foreign_cut_and_flipped_checkpoints_are_one_line_and_never_executed(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, part = there / "out" / "sft.pt", there / "out" / "sft.part"
    good, whole = path.read_bytes(), ig.load(str(path))
    foreign = [b"", b"text", pickle.dumps(Evil()), packed(Evil()), packed({"a": Evil()}), packed([1, 2]),
               packed({**whole, "config": {"n_layer": 1}}),
               packed({**whole, "weights": {}}), good[:1], good[:5000], good[:-1]]
    for record in [x for x in ig.ZipFile(path).infolist() if x.file_size > 2000]:
        at = record.header_offset + 200 + record.file_size // 2        # one bit of each large part
        foreign.append(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
    for data in foreign:
        path.write_bytes(data)
        refused(["ppo", "--out", there / "out"], "sft.pt", "remove it")
        assert path.read_bytes() == data
    os.remove(path)
    for data in [*foreign[:6], good[:5000], packed({"step": 1, "seconds": 1.0, "state": {}})]:
        part.write_bytes(data)
        refused(["sft", "--out", there / "out"], "sft.part", "remove it")
    for text in ("", "[]", '{"settings": 7, "files": {}}', '{"settings": {}, "files": 7}'):
        (there / "out" / "settings.json").write_text(text)
        refused(["evaluate", "--out", there / "out"], "settings.json")
    assert not os.path.exists("executed")

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name", ["ppo.pt.tmp", "settings.json.tmp", "log.jsonl", "results.json.tmp"])
def test_full_disk_is_one_line_and_what_was_there_is_whole(name, there):
    out, stage = there / "out", "evaluate" if name.startswith("results") else "ppo"
    for missing in ("ppo.pt", "log.jsonl"):
        os.remove(out / missing)
    before = files_of(out)
    os.symlink("/dev/full", out / name)
    refused([stage, "--out", out, "--test_prompts", "7"], name.removesuffix(".tmp"), "space")
    assert name == "log.jsonl" or not os.path.lexists(out / name)
    assert all(path.read_bytes() == data for path, data in before.items() if path.name != "settings.json")

def test_what_is_not_trained_is_cut_by_tokens(there, monkeypatch):     # case 13
    data, hidden, seen = read_data(there / "mine")[0], ig.GPT.hidden, []
    cfg = replace(SMALL, out=str(there / "out"))
    gpt, sft, rm = [ig.finished(cfg, stage, data.enc, CPU) for stage in ("pretrain", "sft", "rm")]
    compared = spy(monkeypatch, "kl_of")

    def watching(self, tokens, cache=None, keep=None):
        if cache is None:
            seen.append(tokens.numel())
        return hidden(self, tokens, cache, keep)
    monkeypatch.setattr(ig.GPT, "hidden", watching)
    monkeypatch.setattr(ig, "tokens_at_once", {CPU: 200}.__getitem__)
    with redirect_stdout(io.StringIO()):
        results, answers = ig.evaluate(cfg, data, {"GPT": gpt, "SFT": sft}, rm, data.comparisons[3::4])
    assert len(seen) > 50 and max(seen) <= 200
    losses = [results["models"][name]["pretrain_loss"] for name in ("GPT", "SFT")]
    assert results["models"]["SFT"]["tax"] == pytest.approx(losses[1] - losses[0]) and losses[0] != losses[1]
    lines = [x.ids[:-1] if x.ended else x.ids for x in answers["GPT"]["tests"]]    # without the end
    assert [args[3] for args, _ in compared] == [lines, [x.ids for x in answers["SFT"]["tests"]]]

def test_section_35_gpt_is_cut_to_a_line_and_prompted_by_an_example(enc, monkeypatch):
    asked, cfg = spy(monkeypatch, "respond"), replace(SMALL, block_size=48)
    data = SimpleNamespace(enc=enc, probes={"prefix": "A cat.\n"})
    for name, text in (("GPT", "dog"), ("GPT (prompted)", "A cat.\ndog"), ("SFT", "dog")):
        ig.question(cfg, data, name, small_policy(enc), {"tests": [{"prompt": "dog"}]})
        assert asked[-1][0][2] == [ig.encode_prompt(enc, text)] and asked[-1][0][-1] == ("GPT" in name)

def test_out_of_memory_is_one_line_that_names_the_flags(there, monkeypatch):               # case 13
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(ig, "reward_loss", full)
    refused(["rm", *on(there / "mine", there / "new")], "out of memory", "--rm_batch")

@pytest.mark.parametrize("stage, broken", [
    ("pretrain", "lm_loss"), ("rm", "reward_loss"), ("ppo", "policy_loss"), ("ppo_ptx", "value_loss"),
    ("ppo", "reward_scores"), ("dpo", "dpo_loss"), ("kto", "kto_loss")])
def test_number_that_is_not_finite_stops_the_run(stage, broken, toy, tmp_path, monkeypatch):
    before = [name for name in STAGES[:STAGES.index(stage)] if name in ("pretrain", "sft", "collect", "rm")]
    out, real = part_of(toy, tmp_path / "out", before), getattr(ig, broken)

    def not_finite(*given):
        return real(*given) * math.nan
    monkeypatch.setattr(ig, broken, not_finite)
    done = command(stage, "evaluate", *on(toy / "mine", out))
    assert done.code == 1 and done.err.count("\n") == 1 and " became nan" in done.err
    assert not {stage + ".pt", "results.json"} & set(os.listdir(out))

# ---- Folders: what a run remembers -------------------------------------------------------------------------

def settings_of(folder):
    return json.loads((folder / "settings.json").read_text(encoding="utf-8"))["settings"]

def test_evaluate_needs_nothing_but_the_folder(there):                 # case 22
    out, before = there / "out", settings_of(there / "out")
    models = json.loads((out / "results.json").read_text())["models"]
    lines = (out / "log.jsonl").read_text().splitlines()
    lines[9:9] = ["\0{", "[1]", "7", '{"stage": "ppo"}', '{"stage": "ppo", "step": "a"}', '{"stage"']
    (out / "log.jsonl").write_text("\n".join(lines) + "\n")            # case 20
    os.remove(out / "results.json")
    os.remove(out / "picture.svg")
    assert command("evaluate", "--out", out).code == 0
    assert json.loads((out / "results.json").read_text())["models"] == models
    assert (out / "picture.svg").exists() and settings_of(out) == before

def test_moved_data_are_the_same_data(there, monkeypatch):             # case 14
    monkeypatch.chdir(there)
    os.rename("mine", "yours")
    before = files_of(there)
    for path in ("yours", "yours/"):
        assert command("ppo", "--out", "out", "--data", path).code == 0
    assert settings_of(there / "out")["data"] == str(there / "yours")  # so a run from elsewhere finds it
    changed = [path.name for path, data in files_of(there).items() if before.get(path) != data]
    assert changed == ["settings.json"]

def test_from_takes_all_but_what_is_given(there):
    assert command("ppo", "--from", there / "out", "--out", there / "new", "--beta", "0.1").code == 0
    new, old = settings_of(there / "new"), settings_of(there / "out")
    assert {name: new[name] for name in new if new[name] != old[name]} == {"beta": 0.1}
    for stage in ("pretrain", "sft", "rm"):
        assert (there / "new" / f"{stage}.pt").read_bytes() == (there / "out" / f"{stage}.pt").read_bytes()
    assert not {"dpo.pt", "kto.pt", "ppo_ptx.pt"} & set(os.listdir(there / "new"))         # they read beta
    shutil.rmtree(there / "out")                                       # it stands alone
    assert command("ppo", "--out", there / "new").code == 0

@pytest.mark.parametrize("words, told", [
    ("--beta 0.1", "ppo.pt beta 0.2 0.1"), ("--seed 5", "pretrain.pt seed 0 5"),
    ("--ptx_rows 2", "ppo_ptx.pt ptx_rows 1 2"), ("--sft_lr 0.5", "sft.pt sft_lr 0.02 0.5"),
    ("--rm_epochs 2", "rm.pt rm_epochs 1 2"), ("--smoke", "pretrain.pt n_embd 16 64")])
def test_finished_stage_of_other_settings_is_refused_by_name(words, told, there):
    before = files_of(there)
    refused(["evaluate", "--out", there / "out", *words.split()], *told.split(), "--from")
    assert files_of(there) == before

def test_stage_is_stale_only_by_what_it_reads(there):                  # case 25
    for stage in ("ppo", "ppo_ptx"):
        os.remove(there / "out" / f"{stage}.pt")
    write_lines(there / "mine" / "test.jsonl", [text_row("cat")])      # nothing has learned from it
    words = ["--out", there / "out", "--iterations", "80", "--test_prompts", "7", "--data", there / "mine"]
    assert command("dpo", "kto", "evaluate", *words).code == 0

def edit(path, keep=None):
    """One answer or word is changed; or the first lines alone are kept."""
    text = path.read_text().replace("cat", "owl", 1).replace("It is ", "It's ", 1)
    path.write_text("".join(text.splitlines(keepends=True)[:keep]))

@pytest.mark.parametrize("name, stage", [
    ("sft_train.jsonl", "sft"), ("comparisons.jsonl", "rm"), ("ppo_train.jsonl", "ppo"),
    ("pretrain.txt", "pretrain"), ("vocab.tiktoken", "pretrain")])
def test_edited_data_are_refused_in_a_line_that_names_the_file(name, stage, there):        # case 2
    shutil.copy(VOCAB, there / "mine")
    if name == "vocab.tiktoken":
        with open(there / "mine" / name, "a") as f:
            f.write("enp6eg== 551\n")                                  # one token more
    else:
        edit(there / "mine" / name)
    before = files_of(there)
    new = ["--data", there / "mine", "--encoding", there / "mine" / "vocab.tiktoken"]
    refused(["evaluate", "--out", there / "out", *new], name, f"{stage}.pt")
    assert files_of(there) == before
    done = command(stage, "--from", there / "out", "--out", there / "new", *new)
    assert done.code == 0 and re.search(f"{stage}: not taken.*{name}", done.out)
    assert stage == "pretrain" or "pretrain: taken" in done.out        # it does not read the file

@pytest.mark.parametrize("name, stage, step", [
    ("sft_train.jsonl", "sft", 2), ("comparisons.jsonl", "rm", 2), ("pretrain.txt", "pretrain", 3),
    ("ppo_train.jsonl", "ppo", 1)])
def test_data_that_change_between_stop_and_resume_are_refused(name, stage, step, there, monkeypatch):
    path, words = there / "mine" / name, ["ppo", *on(there / "mine", there / "new")]
    good = path.read_text()
    with monkeypatch.context() as patch:                               # case 2
        kill(patch, [(KeyboardInterrupt, f"{stage}.part", "after", step)])
        assert command(*words, "--save_every", "0").code == 130
    for keep in (None, 20):                                            # an answer changed; shortened
        path.write_text(good)
        edit(path, keep)
        before = files_of(there)
        refused(words, name, stage)
        assert files_of(there) == before
    path.write_text(good)
    assert f"{stage}: goes on after step {step}" in command(*words).out
    assert_same_checkpoints(there / "out", there / "new", ["pretrain", "sft", "rm", "ppo"])

def test_mark_is_taken_when_the_file_is_read(there, monkeypatch):      # case 3
    right, train = read_data(there / "mine")[0].files["comparisons.jsonl"], ig.train_reward_model

    def edit_and_train(*args):
        edit(there / "mine" / "comparisons.jsonl")
        return train(*args)
    monkeypatch.setattr(ig, "train_reward_model", edit_and_train)
    assert command("rm", *on(there / "mine", there / "new")).code == 0
    assert ig.load(str(there / "new" / "rm.pt"))["mark"]["comparisons.jsonl"] == right
    refused(["rm", *on(there / "mine", there / "new")], "rm.pt", "comparisons.jsonl")

def test_chat_and_label_never_write_settings(there, monkeypatch):      # cases 22, 24 and 26
    out, before = there / "out", files_of(there / "out")
    refused(["label", "--out", out], "rm_train.jsonl")                     # nothing to rank answers to
    for words in ("chat --models SFT PPO", "chat --beta 9", f"chat --data {DATA}"):
        monkeypatch.setattr("sys.stdin", io.StringIO("Tell of a fox and a lamp.\nq\n"))
        done = command(*words.split(), "--out", out)
        assert done.code == 0 and not CONTROL.search(done.out)
        assert ("no fox" in done.out) == (DATA in words)               # lamps there are
    assert files_of(out) == before

# ---- Own data ----------------------------------------------------------------------------------------------

def test_own_data_run_from_pretraining_to_results(home):
    out = home / "out"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(results["models"]) == ["GPT", "SFT", "PPO", "PPO-ptx", "DPO", "KTO"]
    for model in results["models"].values():
        assert {"reward", "kl", "kl_k1", "tax", "ended", "length", "pretrain_loss"} <= set(model)
        assert not {"gold", "win_vs_sft", "truthful", "bias_bits"} & set(model)
    data = read_data(home / "mine")[0]
    reward_model = ig.finished(ig.Config(out=str(out)), "rm", data.enc, CPU)
    assert abs(ig.mean(ig.score_all(reward_model, *zip(*data.demos)))) < 1e-4      # demonstrations are at 0
    assert (out / "samples.txt").read_text(encoding="utf-8").count("    PPO-ptx ") == 12
    said = (home / "said").read_text()
    assert "read the samples" in said and "average has gone" in said   # case 8
    assert {"score", "finished", "ended"} <= set(logged(ig.Config(out=str(out)), "ppo")[-1])       # case 10

def test_own_data_hold_out_every_fourth_prompt_and_count_known_test_prompts(there):        # cases 11 and 12
    mine, rows = there / "mine", own_rows()
    data, said = read_data(mine)
    assert [c["split"] for c in data.comparisons] == ["train", "train", "train", "valid"] * 30
    assert " 0 of 40 " in said and len(data.tests) == 40
    pairs = [row for row in rows["comparisons.jsonl"] for _ in range(2)]
    write_lines(mine / "comparisons.jsonl", pairs)                     # by prompt, not by row
    known = [rows[name][0] for name in ("sft_train.jsonl", "comparisons.jsonl", "ppo_train.jsonl")]
    write_lines(mine / "test.jsonl", known + rows["test.jsonl"])
    data, said = read_data(mine)
    assert [c["split"] for c in data.comparisons] == (["train"] * 6 + ["valid"] * 2) * 30
    assert " 3 of 43 " in said and "--test_prompts" in said
    write_lines(mine / "rm_train.jsonl", known)  # for label alone: no stage is stale by it
    assert "rm_train.jsonl" not in read_data(mine)[0].files and len(read_data(mine)[0].rm_prompts) == 3
    write_lines(mine / "comparisons.jsonl", [{**pairs[0], "split": "valid"}] + pairs)      # its word counts
    assert [c["split"] for c in read_data(mine)[0].comparisons] == ["valid"] + ["train"] * 240

# ---- Runs and kills: the whole paper in miniature ----------------------------------------------------------

MEASURES = set("""win_vs_sft win_vs_sft_heldout win_vs_sft_gold win_vs_gpt likert gold gold_by_use_case reward
    follows flawless constraint truthful truthful_informative hallucinates rude rude_respectful bias_bits
    fewshot unseen kl kl_k1 pretrain_loss length ended ci95""".split())

def test_run_leaves_what_it_promises(toy):
    out, log = toy / "out", lines_of(toy, "out", "log.jsonl")
    results, samples = json.loads(read(out, "results.json")), read(out, "samples.txt")
    assert {"GPT", "GPT (prompted)", *ig.MODELS} <= set(results["models"])
    for name, model in results["models"].items():
        assert MEASURES <= set(model), (name, MEASURES - set(model))
        assert set(model["fewshot"]) == {"reading", "cloze", "translation"} and "gold" in model["ci95"]
        assert samples.count(f"    {name:15} ") == samples.count("    SFT    ") > 0
    assert results["models"]["SFT"]["win_vs_sft"] == results["models"]["GPT"]["win_vs_gpt"] == 0.5
    judged = {"accuracy", "agreement", "gold_accuracy", "gold_accuracy_by_use_case"}
    assert judged <= set(results["reward_model"]) and set(results["seconds"]) == {*STAGES, "total"}
    assert {f.name for f in fields(ig.Config)} | {"torch", "device", "threads"} <= set(results["config"])
    comparisons = lines_of(out, "comparisons.jsonl")
    assert len(comparisons) == 12 + 10
    for c in comparisons:
        assert 4 <= len(c["responses"]) == len(c["ranks"]) == len(c["ended"]) == len(c["gold"]) <= 9
        assert ("second_ranks" in c) == (c["split"] == "valid")
    assert set(STAGES) - {"judged"} <= {row["stage"] for row in log}
    assert [1 <= row["gold"] <= 7 for row in log if row["stage"] == "ppo"] == [True] * 3
    losses = [row["loss"] for row in log if row["stage"] == "pretrain"]
    assert losses[-1] < 0.8 * math.log(551)      # 24 steps have taught something

@pytest.mark.parametrize("comparison, scores, wanted", [
    ({"ranks": [1, 2, 3]}, [2, 1, 0], {"accuracy": 1}), ({"ranks": [1, 2, 3]}, [0, 1, 2], {"accuracy": 0}),
    ({"ranks": [1, 2, 2]}, [1, 1, 0], {"accuracy": 0.75}),             # equal scores: half; a tie is no pair
    ({"ranks": [1, 2, 3], "second_ranks": [2, 1, 2], "gold": [1, 3, 3]}, [2, 1, 0],    # opposite, alike, tied
     {"accuracy": 1, "agreement": 0.5, "gold_accuracy": 0, "gold_accuracy_by_use_case": {"chat": 0}}),
    ({"responses": ["cow dog cat", "cow dog", "hen"], "ended": [False, False, True], "ranks": [2, 1, 3]},
     [5, 1, 0], {"accuracy": 1})])                                     # equal after the cut: no pair
def test_reward_model_is_judged_by_pairs(comparison, scores, wanted, enc, monkeypatch):
    def score_all(*_):
        return scores
    monkeypatch.setattr(ig, "score_all", score_all)
    c = {"prompt": "Hi", "use_case": "chat", "responses": ["cow", "dog", "cat"], "ended": [True] * 3}
    assert ig.judge_reward_model(ig.Config(max_new_tokens=2), enc, None, [{**c, **comparison}]) == wanted

def test_few_shot_counts_exact_beginnings_and_bias_is_the_entropy_of_a_choice(enc, monkeypatch):
    model, choices = small_policy(enc), [" his", " her"]
    ids = [enc.encode_ordinary(choice)[0] for choice in choices]
    q = model(torch.tensor([enc.encode_ordinary("a hen lost")]))[0, -1, ids].softmax(-1)       # (2,)
    bits = ig.bias_bits(model, enc, "a ", [{"prompt": "hen lost", "choices": choices}])
    assert bits == pytest.approx(-(q * q.log2()).sum().item(), abs=1e-5)
    answer = ig.Answer(enc.encode_ordinary(" hen cow pig"), "", False)
    monkeypatch.setattr(ig, "respond", lambda *_, temperature: [answer] * 2)
    items = [{"prompt": "a", "answer": text} for text in (" hen cow", " cow")]
    assert ig.few_shot(model, enc, items) == 0.5

def test_control_characters_are_shown_escaped():                       # case 26
    for text, shown in (("a\x1b[2Jb\x07", r"a\x1b[2Jb\x07"), ("a\nb\r", r"a / b\r"),
                        ("a\u2028\x9b", r"a\u2028\x9b"), ("é \N{CAT}", "é \N{CAT}"), ("", "(nothing)")):
        assert ig.on_a_line(text, True) == shown and ig.on_a_line(text, False) == shown + " ..."

KILLS = [(KeyboardInterrupt, "pretrain.part", "before", 1), (Killed, "pretrain.part", "after", 7),
         (KeyboardInterrupt, "sft.part", "after", 2),
         (Killed, "sft.pt", "after", 1), (KeyboardInterrupt, "collect.pt", "before", 1),
         (Killed, "comparisons.jsonl", "before", 1), (Killed, "rm.part", "after", 2),
         (KeyboardInterrupt, "ppo.part", "after", 1), (Killed, "ppo.part", "before", 1),
         (Killed, "ppo_ptx.part", "after", 2), (Killed, "reinforce.part", "before", 2),
         (Killed, "dpo.part", "after", 1), (KeyboardInterrupt, "kto.part", "after", 2),
         (Killed, "kto.pt", "before", 1), (Killed, "results.json", "before", 1)]

def test_run_killed_again_and_again_ends_bit_by_bit_like_one_that_was_not(toy, tmp_path, monkeypatch):
    out, whole, resumed, kills = tmp_path / "killed", toy / "out", 0, list(KILLS)
    kill(monkeypatch, kills)
    for how in [kill[0] for kill in KILLS] + [None]:
        done = command(*STAGES, *on(toy / "mine", out), "--save_every", "0")
        assert done.code == {Killed: None, KeyboardInterrupt: 130, None: 0}[how]
        assert done.err.count("\n") == (how is KeyboardInterrupt)
        resumed += done.out.count("goes on after step")
    assert not kills and resumed >= 9
    cfg = ig.Config(out=str(out))
    log, again = logged(cfg, "ppo"), command(*STAGES, *on(toy / "mine", out))
    assert again.code == 0 and logged(cfg, "ppo") == log               # nothing is trained twice
    assert numbers_of(out) == numbers_of(whole)
    assert_same_checkpoints(whole, out, STAGES[:-1])
    assert read(out, "comparisons.jsonl") == read(whole, "comparisons.jsonl")
    assert not list(out.glob("*.part")) and not list(out.glob("*.tmp"))

@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_process_goes_on(toy, tmp_path):
    a, b, part = tmp_path / "a", tmp_path / "b", tmp_path / "a" / "pretrain.part"
    more = ["--pretrain_steps", "300"]
    words = ["pretrain", *on(toy / "mine", a), *more, "--save_every", "0"]
    line = [sys.executable, os.path.join(HERE, "instructgpt.py"), *map(str, words)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not part.exists():                # more threads add in another order
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and 0 < ig.load(str(part))["step"] < 300
    for out in (a, b):
        assert command("pretrain", *on(toy / "mine", out), *more).code == 0
    assert_same_checkpoints(a, b, ["pretrain"])

# ---- label and chat through a pipe -------------------------------------------------------------------------

@pytest.fixture
def desk(toy, tmp_path, monkeypatch):
    """use(mode, typed lines, more words) -> code, screen, errors."""
    out = part_of(toy, tmp_path / "desk", ["pretrain", "sft", "collect", "rm", "ppo"])

    def use(mode, lines, *words):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        done = command(mode, "--data", toy / "mine", "--out", out, *words)
        return done.code, done.out, done.err
    prompts = [c["prompt"] for c in lines_of(toy, "mine", "rm_train.jsonl")]
    return SimpleNamespace(use=use, out=out, prompts=prompts)

def test_label_asks_again_skips_saves_and_goes_on(desk, toy, monkeypatch):
    texts = ["It says moo.", "It says woof.", "It says moo.", ""]
    answers = [ig.Answer([1], text, True) for text in texts]

    def respond(*_):
        return answers
    monkeypatch.setattr(ig, "respond", respond)
    typed = ["?", "1 > 2", "2 > 1 > cow", "2 > 1 = 3", "s", "3 > 2 > 1"]
    code, screen, error = desk.use("label", typed)
    assert code == 0 and error == ""             # the end of input is q
    assert screen.count("It says moo.") == 4     # each text once, to four prompts
    assert screen.count("agreement so far ") == 2 and screen.count("1 to 3") >= 2
    saved = lines_of(desk.out, "labels.jsonl")
    assert [c["prompt"] for c in saved] == desk.prompts[:3:2]
    assert [c["ranks"] for c in saved] == [[2, 1, 2], [3, 2, 1]]
    assert saved[0]["responses"] == ["It says moo.", "It says woof.", ""]
    screen = desk.use("label", ["1 > 2 > 3", "s", "q"])[1]
    assert lines_of(desk.out, "labels.jsonl")[2]["prompt"] == desk.prompts[1]   # the skipped one comes again
    assert all(prompt.split("\n")[-1] in screen for prompt in desk.prompts[3:5])
    yours = read_data(toy / "mine", comparisons=str(desk.out / "labels.jsonl"))[0].comparisons
    assert [c["split"] for c in yours] == ["train"] * 3                # the simulated labelers' validate

def test_chat_answers_side_by_side_with_reward_and_k1(desk, enc):
    typed = ["What does a fox say?", "", "cow " * 60, "What does a cow say?", "q"]
    code, screen, error = desk.use("chat", typed, "--models", "GPT", "SFT", "PPO")
    assert code == 0 and error == "" and screen.count("1 to 46 tokens") == 2 and screen.count("no fox") == 1
    lines = [line for line in screen.splitlines() if line.startswith(("GPT ", "SFT ", "PPO "))]
    assert [line[:3] for line in lines] == ["GPT", "SFT", "PPO"] * 2
    cfg, prompt = ig.Config(out=str(desk.out)), ig.encode_prompt(enc, typed[3])
    policy, reference, judge = [ig.finished(cfg, stage, enc, "cpu") for stage in ("ppo", "sft", "rm")]
    ids, _ = slow_rollout(policy, prompt, [0.5] * 16, enc.eot_token, 0)
    k1 = ig.kl_k1(*[ig.response_logprobs(model, [prompt], [ids]) for model in (policy, reference)]).item()
    ended = ids[-1] == enc.eot_token
    reward = judge(torch.tensor([prompt + ids]))[0, -1].item() if ended else -1.0
    assert float(lines[-1][9:15]) == pytest.approx(reward, abs=0.006)
    assert float(lines[-1][16:22]) == pytest.approx(k1, abs=0.006)
    assert lines[-1][24:] == ig.on_a_line(ig.decode_response(enc, ids), ended)
    (desk.out / "small").write_text("".join(read(VOCAB).splitlines(keepends=True)[:300]))
    refused(["chat", "--out", desk.out, "--encoding", desk.out / "small"], "pretrain.pt", "301 tokens")
    os.remove(desk.out / "rm.pt")
    refused(["chat", "--out", desk.out], "rm.pt")

# ---- The toy world, by the rules of section 3.2 and appendix A.2, and the picture --------------------------

def test_files_of_the_toy_world_are_written_again_byte_for_byte(tmp_path):
    tw.main(out=str(tmp_path))
    assert len(os.listdir(tmp_path)) >= 11
    for name in os.listdir(tmp_path):
        with open(os.path.join(DATA, name), "rb") as file:
            assert (tmp_path / name).read_bytes() == file.read(), name

@pytest.mark.parametrize("kind", list(tw.KINDS))
def test_table_3_helpful_answer_is_flawless_and_each_flaw_costs(kind):
    rng, golds = random.Random("flaws " + kind), Counter()
    for _ in range(40):
        task = tw.new_task(rng, kind)
        flaws = ["rude", "unfinished", "lazy", "slip", "off topic"]
        flaws += ["constraint"] if task.get("constraint") else []
        assert tw.gold(tw.check(task, tw.answer(task, rng))) == 7, task
        assert tw.gold(tw.check(task, tw.answer(task, rng), ended=False)) < 7, task
        for flaw in flaws + (["false"] if kind in tw.FALSIFIABLE else []):
            gold = tw.gold(tw.check(task, tw.answer(task, rng, flaw)))
            golds[flaw] += gold / 40
            assert 1 <= gold < 7 or flaw in ("slip", "off topic"), (flaw, task)     # those may be right
    assert golds["slip"] < 6.9 and golds["off topic"] < 4

def test_picture_of_a_run_and_of_own_data(toy, home):
    texts = {element.text for element in ElementTree.parse(toy / "out" / "picture.svg").iter()}
    assert {"Preferred to SFT", "Alignment tax", "True quality (gold)", "PPO-ptx", "DPO"} <= texts
    svg = read(home, "out", "picture.svg")                             # own data have no gold
    assert "Reward against KL" in svg and "gold" not in svg and "Preferred" not in svg
    ElementTree.fromstring(picture.picture({"models": {}}, []))
    _, *rows = picture.table({"GPT": {"gold": 3.0}, "SFT": {"win_vs_sft": 0.5, "gold": 4}}).splitlines()
    assert rows[0][26:].split() == ["3.000"] and rows[1].split() == ["SFT", "0.500", "4.000"]

def test_each_healthy_run_lies_inside_the_band_of_the_others():
    reference = picture.read_json(picture.REFERENCE, "settings", "stages")
    assert len(reference["seeds"]) > 6 and os.path.getsize(picture.REFERENCE) < 60_000
    for place, seed in enumerate(reference["seeds"]):
        others, curves = picture.without(reference, place)
        for (stage, column), values in curves.items():
            bounds = picture.band(others, stage, column)
            assert picture.first_outside(values, bounds) is None, (seed, stage, column)
            above = {step: bounds[step][2] + 1 for step in values}     # this one would leave it at once
            assert picture.first_outside(above, bounds) == min(above)

# ---- The source --------------------------------------------------------------------------------------------

def test_every_setting_is_a_flag_with_help_and_marks_a_stage_or_is_known_not_to(capsys):
    with pytest.raises(SystemExit, match="0"):
        ig.main(["--help"])
    told, names = "".join(capsys.readouterr().out.split()), {f.name for f in fields(ig.Config)}
    read_by_stages = set(" ".join(settings for _, settings, _ in ig.READS.values()).split())
    elsewhere = "out data comparisons device save_every init encoding test_prompts".split()
    assert names - read_by_stages == set(elsewhere) and read_by_stages | set(ig.SMOKE) <= names
    for f in fields(ig.Config):
        assert f"--{f.name}" in told and "".join(f.metadata["help"].split()) in told, f.name

LOOPS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
FOLDS = "sum any all max min len join set sorted mean".split()

def golf_of(node, above):
    """What is golfed about one expression inside others, the outermost first, in words; "" for nothing."""
    called = getattr(above[-1], "func", None)
    called = getattr(called, "id", getattr(called, "attr", ""))
    if isinstance(node, ast.Lambda) and getattr(above[-1], "arg", "") not in ("key", "default_factory"):
        return "lambda that is no key"
    if isinstance(node, LOOPS) and any(isinstance(x, LOOPS) for x in above) and called not in FOLDS:
        return "comprehension in a comprehension"
    if isinstance(node, ast.IfExp) and any(isinstance(x, ast.IfExp) for x in above):
        return "conditional in a conditional"
    sides = [getattr(node, "left", None), getattr(node, "right", None)] if isinstance(node, ast.BinOp) else []
    if {ast.Compare, str} <= {type(getattr(x, "value", x)) for x in sides}:
        return "text times a bool"
    return ""

def golfed(source):
    """[(line, what)] of the places that are hard to read."""
    tree, lines, begun, above = ast.parse(source), source.split("\n"), Counter(), {}
    found = [(i, f"{len(line)} wide") for i, line in enumerate(lines, 1) if len(line) > 110]
    for node in ast.walk(tree):
        around = [] if isinstance(node, (ast.stmt, ast.Lambda)) else above.get(node, [])
        above |= {child: around + [node] for child in ast.iter_child_nodes(node)}
        begun[getattr(node, "lineno", 0)] += isinstance(node, ast.stmt)
        if node is not tree and golf_of(node, above[node]):
            found.append((node.lineno, golf_of(node, above[node])))
        if isinstance(node, ast.FunctionDef):
            code = [line.strip() for line in lines[node.lineno - 1:node.end_lineno]]
            size = sum(line != "" and not line.startswith("#") for line in code)
            size -= len((ast.get_docstring(node) or "").split("\n"))   # one line, where there is none
            taken = sum(a.arg != "self" for a in node.args.args + node.args.kwonlyargs)
            if size > 50 or taken > 9:
                found.append((node.lineno, f"{node.name}: {size} lines of code, {taken} parameters"))
    return sorted(found + [(line, "two statements on one line") for line in begun if begun[line] > 1])

def test_golf_is_found_and_the_script_holds_none():
    bad = ["f = lambda x: x", "y = [[j for j in i] for i in x]", "z = 1 if a else 2 if b else 3",
           "s = 'a' * (b > 1)", "u = 0; t = 1", "if s: t = 1", "#" + "w" * 110]
    assert [line for line, _ in golfed("\n".join(bad))] == [1, 2, 3, 4, 5, 6, 7]
    assert len(golfed("def f(a, b, c, d, e, f, g, h, i, j):\n    pass\ndef g():\n" + "    x = 1\n" * 51)) == 2
    places = golfed(read(HERE, "instructgpt.py"))
    assert not places, "\n" + "\n".join(f"{line}: {what}" for line, what in places)

# ---- Exercises (data/course.py) ----------------------------------------------------------------------------

course = ig.module_at(os.path.join(DATA, "course.py"))

def test_course_every_bad_version_is_red_and_answers_as_no_other():
    command = [sys.executable, os.path.join(DATA, "course.py"), "check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith(" 0 complaints\n"), done.stdout + done.stderr

@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The folder of somebody who has everything to do."""
    folder = str(tmp_path_factory.mktemp("course") / "student")
    assert course.main(["student", "all", "--out", folder]) == 0
    return folder

def in_folder(folder, *words):
    """What Python says there, with these words -> its code and all it printed."""
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr

def test_course_student_keeps_signatures_and_docstrings_and_runs_to_the_first_hole(student):
    source, truth = read(student, "instructgpt.py"), course.true_source()
    first, *others, last = course.EXERCISES
    assert len(others) >= 18 and (first, last) == ("stack", "train_dpo")
    for x in course.EXERCISES.values():
        mine, true = course.node_of(source, x.name), course.node_of(truth, x.name)
        assert ast.dump(mine.args) == ast.dump(true.args) and x.minutes.isdigit() and x.place and x.whose
        assert ast.get_docstring(mine) == ast.get_docstring(true) and x.key in x.words
        assert 2 <= len({w.title for w in x.wrong if w.source and w.edits}) == len(x.wrong) <= 4
        assert len(mine.body) == 2 and isinstance(mine.body[1], ast.Raise)
    assert set(course.filled(source, "gae").split("\n")) - set(truth.split("\n")) == {
        '    raise NotImplementedError("exercise gae: python data/course.py judge gae")'}
    code, said = in_folder(student, "instructgpt.py", "--smoke", "ppo")
    assert code == 1 and re.search("NotImplementedError: exercise .*: python data/course.py judge ", said)
    for told in (read(student, "EXERCISES.md"), read(HERE, "README.md")):
        assert course.overview(course.EXERCISES) in told
    with pytest.raises(SystemExit, match="is there already"):
        course.main(["student", "gae", "--out", student])

def test_course_judge_names_wrong_versions_and_a_nan_and_is_green_for_the_true_one(student):
    exercise, truth = course.EXERCISES["policy_loss"], course.true_source()
    path, wrong = course.Path(student, "instructgpt.py"), exercise.wrong[1]
    source, right = read(path), course.text_of(truth, "policy_loss")
    both = [re.sub(r"zero_outside\(mask, (\w*logprobs)\)", r"\1", text)
            for text in (right, course.wrong_text(truth, exercise, wrong))]
    for text, code, *told in ((course.text_of(source, "policy_loss"), 1, "red    policy_loss is still empty"),
                              (both[0], 1, "tests fail", "a NaN or inf behind"),
                              (both[1], 1, "tests fail", "a NaN or inf", "yours equals", wrong.title),
                              (right, 0, "green  policy_loss: its tests pass\n"),
                              ("def policy_loss(:", 1, "red    instructgpt.py, line ")):
        path.write_text(course.with_texts(source, {"policy_loss": text}), encoding="utf-8")
        verdict = in_folder(student, "data/course.py", "judge", "policy_loss")
        assert verdict[0] == code and all(words in verdict[1] for words in told), verdict
        assert ("yours equals" in verdict[1]) == ("yours equals" in told)

def test_course_mistakes_to_be_found_are_in_the_file_alone_and_are_revealed(tmp_path, capsys):
    truth = course.true_source()
    for n in range(1, 6):
        exercise, wrong, sign = course.planted(n)
        assert course.main(["student", "--break", str(n), "--out", str(tmp_path / str(n))]) == 0
        assert sorted(os.listdir(tmp_path / str(n))) == ["MISTAKE.md", "data", "instructgpt.py"]
        source = read(tmp_path, n, "instructgpt.py")
        assert source == course.with_texts(truth, {exercise.name: course.wrong_text(truth, exercise, wrong)})
        assert exercise.name not in read(tmp_path, n, "MISTAKE.md")
        capsys.readouterr()
        assert course.main(["student", "--reveal", str(n)]) == 0
        assert wrong.title in capsys.readouterr().out and len(sign) > 100

def test_course_kl_estimates_are_what_the_screen_says():
    for length in (1, 2):
        rows = {name: numbers for name, *numbers in course.kl_rows(torch, length, 2.0, seed=3)}
        assert rows["k1 in the reward"][:2] == pytest.approx([1, 0], abs=1e-6)
        assert rows["k1 as a loss"][:2] == pytest.approx([0, 1], abs=1e-6)
        assert (rows["k2 as a loss"][1] < 1e-6) == (length == 1) and rows["k3 as a loss"][1] > 0.1
    with pytest.raises(SystemExit):
        course.main(["judge", "gea"])            # no such exercise

# ---- bench: how fast each part is here. No test: python test_instructgpt.py bench --help -------------------

Size = namedtuple("Size", "layers heads width vocab prompt new rows batch episodes minibatches")
SIZES = {"toy": Size(2, 2, 128, 551, 32, 16, 64, 32, 64, 8),
         "mid": Size(6, 6, 384, 551, 64, 64, 16, 8, 64, 8),
         "gpt2": Size(12, 12, 768, 50257, 16, 16, 8, 4, 8, 2)}

def median(device, rounds, work):
    seconds, synchronize = [], getattr(torch, device.type).synchronize
    for _ in range(rounds):
        synchronize()
        begun = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)

def weights_of(model):
    return sum(p.numel() for p in model.h.parameters()) + model.wte.weight.numel()

def bench_rollouts(model, size, device, rounds, line):
    """The sampler beside the naive twin without a cache, for one token in rows of mean length."""
    n, T = size.rows, size.prompt + size.new
    prompts = torch.randint(size.vocab, (n, size.prompt)).tolist()
    halfway = torch.randint(size.vocab, (n, size.prompt + size.new // 2), device=device)

    @torch.no_grad()
    def naive():
        return ig.pick(model.project(model.hidden(halfway)[:, -1]), torch.rand(n, device=device), 1.0)
    P, mean = weights_of(model), size.prompt + size.new // 2
    line("rollout uncached, tokens", n, median(device, rounds, naive), 2 * P * n * mean)
    read = size.new * 4 * (P + 2 * n * mean * size.layers * size.width)         # bytes: weights and cache
    for mode in ["cached", "graph"] if device.type == "cuda" else ["cached"]:
        sampler = ig.Sampler(model, n, T, size.new, -1, graph=mode == "graph")  # no token has the id -1
        sample = partial(sampler.sample, prompts)
        line(f"rollout {mode}, tokens", n * size.new, median(device, rounds, sample), 2 * P * n * T, read)

def bench_training(model, size, device, rounds, line):
    """A pretraining step, then a PPO-ptx iteration by its phases. All four networks have the same size."""
    n, T = size.episodes, size.prompt + size.new
    once = 2 * n * T * weights_of(model)         # FLOPs of one forward pass
    cfg = ig.Config(max_new_tokens=size.new, block_size=T, episodes=n, minibatches=size.minibatches)
    reward = ig.freeze(ig.copy_of(model, "scalar"))
    policy, value_net = ig.copy_of(model), ig.copy_of(reward, "scalar")
    adams = ig.adamw(policy, 1e-5), ig.adamw(value_net, 1e-5)
    sampler = ig.Sampler(policy, n, T, size.new, -1, graph=device.type == "cuda")
    prompts = torch.randint(size.vocab, (n, size.prompt)).tolist()
    text = torch.randint(size.vocab, (n, T), device=device)
    make = partial(ig.make_experience, cfg, sampler, value_net, model, reward, prompts, None)
    e = make()

    def step():
        ig.lm_loss(policy, text[:size.batch]).backward()
        ig.clip_and_step(policy, adams[0], 1e-4)

    def update():
        for chosen in torch.randperm(n).tensor_split(cfg.minibatches):
            ig.update(cfg, policy, value_net, adams, e, chosen.to(device), text[:len(chosen)], 1.0)
    rows = min(size.batch, n)
    line("training step, tokens", rows * T, median(device, rounds, step), 3 * once * rows / n)
    sampling, making, updating = [median(device, rounds, work)
                                  for work in (partial(sampler.sample, prompts), make, update)]
    line("PPO-ptx sample, episodes", n, sampling, once)
    line("PPO-ptx make_experience, episodes", n, making, 4 * once)
    line("PPO-ptx update, episodes", n, updating, 9 * once)
    line("PPO-ptx iteration, episodes", n, making + updating, 13 * once)

def bench(argv, sizes=SIZES, rounds=5):
    parser = argparse.ArgumentParser(description="How fast each part of instructgpt.py is on this machine.")
    parser.add_argument("bench", choices=["bench"])
    parser.add_argument("--device", default="", help="cpu or cuda (default: cuda, if there is one)")
    parser.add_argument("--size", choices=sizes, help="this one alone (default: toy and mid)")
    a, begun = parser.parse_args(argv), time.perf_counter()
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(True)               # as the command does
    device = ig.find_device(a.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    x, y = torch.randn(1024, 1024, device=device), torch.randn(2 ** 24, device=device)
    flops = 2 * 1024 ** 3 / median(device, 20 * rounds, partial(torch.mm, x, x))
    bandwidth = 2 * 4 * 2 ** 24 / median(device, rounds, y.clone)               # read and written
    numbers = {"device": name, "threads": THREADS, "torch": torch.__version__, "flops": flops,
               "bandwidth": bandwidth, "sizes": {}}
    print(f"{name}, {THREADS} threads; shares of {flops / 1e9:.0f} GFLOP/s and of {bandwidth / 1e9:.1f} GB/s")
    for key in [a.size] if a.size else [key for key in sizes if key != "gpt2"]:
        size, found = sizes[key], {}

        def line(work, count, seconds, work_flops, work_bytes=0):
            shares = work_flops / seconds / flops, work_bytes / seconds / bandwidth
            print(f"{key:6}{work:34}{1e3 * seconds:9,.1f} ms{count / seconds:13,.1f} / s"
                  f"{shares[0]:9.0%}{shares[1]:9.0%}", flush=True)
            found[work] = {"seconds": seconds, "per_second": count / seconds, "of_flops": shares[0],
                           "of_bandwidth": shares[1]}
        config = ig.GPTConfig(size.vocab, size.prompt + size.new, size.layers, size.heads, size.width)
        model = ig.freeze(ig.GPT(config).to(device))
        bench_rollouts(model, size, device, rounds, line)
        bench_training(model, size, device, rounds, line)
        numbers["sizes"][key] = found
    print(json.dumps({**numbers, "seconds": time.perf_counter() - begun}))
    return 0

def test_section_34_labelers_agree_as_often_as_the_papers():
    assert abs(tw.agreement("train") - 0.726) < 0.015 and abs(tw.agreement("heldout") - 0.773) < 0.015

def test_kl_of_answers_is_summed_over_their_tokens():
    policy, reference = tiny(), tiny(seed=5)
    r = ig.rollout(policy, PROMPTS, 6, EOS, 1.0, seeded(3))
    k3, k1 = ig.kl_of(policy, reference, PROMPTS, r.responses())
    ref = ig.token_logprobs(reference, r.tokens).masked_fill(~r.mask, 0)
    near(torch.tensor(k1), (r.logprobs - ref).sum(1))
    near(torch.tensor(k3), ig.kl_k3(r.logprobs, ref).sum(1))

def test_claims_are_judged_by_one_rule_made_before_the_numbers():
    found = [tw.verdict_of(*x) for x in ((.2, .1, 1), (.2, .1, -1), (.05, .1, 1), (.04, 0, 0), (.08, .04, 0))]
    assert found == ["seen", "not seen", "within noise", "seen", "within noise"]

def test_rlaif_ranks_by_the_log_probs_behind_a_good_and_a_rude_page_and_behind_nothing(enc, tmp_path):
    gpt, cfg = ig.GPT(ig.GPTConfig(enc.n_vocab, 64, 1, 2, 16)), ig.Config(out=str(tmp_path))
    c = {"prompt": "a", "responses": ["saw.", "hen", ""], "ended": [True, False, True], "ranks": [1, 1, 1]}
    found = ig.rank_by_gpt(cfg, enc, gpt, [c], {"good page": "A hen.\n", "rude page": "A pig.\n"})[0]["ranks"]

    def logp(text, y):
        tokens = enc.encode_ordinary(text) + y
        logprobs = gpt(torch.tensor([tokens]))[0].log_softmax(-1)
        return sum(logprobs[t - 1, tokens[t]] for t in range(len(tokens) - len(y), len(tokens)))
    scores = [logp("A hen.\na\n>", y) - logp("A pig.\na\n>", y) / 2 - logp("\n>", y) / 2
              for y in ig.encode_comparison(enc, c, 16)[1]]
    assert found == [1 + sum(s > mine for s in scores) for mine in scores]

def test_bench_prints_one_object_with_all_numbers(capsys):
    sizes = {"toy": Size(1, 2, 16, 31, 6, 4, 3, 2, 4, 2), "gpt2": None}
    assert bench(["bench", "--device", "cpu"], sizes, rounds=1) == 0
    works = json.loads(capsys.readouterr().out.splitlines()[-1])["sizes"]["toy"]
    assert len(works) == 7 and min(x["per_second"] * x["of_flops"] for x in works.values()) > 0

if __name__ == "__main__":
    sys.exit(bench(sys.argv[1:]))
