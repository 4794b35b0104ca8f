"""Exercises: write the functions of instructgpt.py yourself.

    python data/course.py student                         lists the exercises
    python data/course.py student gae --out mine          writes a folder in which gae is empty
    python data/course.py student all --out mine          the same with every exercise empty
    python data/course.py judge gae                       in that folder: judges your gae alone
    python data/course.py student --break 3 --out mine    the whole file with one mistake; find it in a run
    python data/course.py student --reveal 3              which mistake that was, and what gave it away
    python data/course.py kl                              estimates of the KL, and what each is good for
    python data/course.py check                           for teachers: tests and judge, judged themselves

The exercises, and what people got wrong in them, stand in data/course.txt. The student's file is computed
from the true one. The true one travels in data/course_solution.bin, packed.
"""
import argparse
import ast
import copy
import inspect
import io
import itertools
import os
import re
import shutil
import sys
import tempfile
import textwrap
import zlib
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, is_dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from types import SimpleNamespace

DATA = Path(__file__).resolve().parent
ROOT = DATA.parent
SCRIPT, TESTS, SOLUTION = "instructgpt.py", "test_instructgpt.py", "course_solution.bin"


# ------------------------------------------------------------------------------------------------------------
# The exercises


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


def read_exercises(text):
    """{key: Exercise}; course.txt says how they are written."""
    exercises = {}
    for line in text.split("\n"):
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


parts = re.split(r"^== (.+) ==\n", (DATA / "course.txt").read_text(encoding="utf-8"), flags=re.M)
TEXTS = {name: text.strip("\n") for name, text in zip(parts[1::2], parts[2::2])}
EXERCISES = read_exercises(TEXTS["exercises"])
PLANTED = re.split(r"\n(?! )", TEXTS["planted mistakes"])


def planted(number):
    """The exercise, the wrong version and the sign of a mistake that is to be found in a run."""
    first, *sign = PLANTED[number - 1].split("\n")
    key, title = first.split(" | ")
    wrong = next(wrong for wrong in EXERCISES[key].wrong if wrong.title.startswith(title))
    return EXERCISES[key], wrong, " ".join(line.strip() for line in sign)


# ------------------------------------------------------------------------------------------------------------
# Functions cut out of a source and put into one


def true_source():
    """The true instructgpt.py: unpacked in a student's folder, else the file beside data/."""
    if (DATA / SOLUTION).exists():
        return zlib.decompress((DATA / SOLUTION).read_bytes()).decode()
    return (ROOT / SCRIPT).read_text(encoding="utf-8")


parsed = lru_cache(maxsize=8)(ast.parse)


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


def calling(source, exercise, name):
    """The text of a function that hands everything on to another one of this name."""
    given = ", ".join(argument.arg for argument in node_of(source, exercise.name).args.args)
    return with_body(source, exercise.name, f"return {name}({given})")


def wrong_text(source, exercise, wrong):
    """The text of a wrong version. Each edit must apply: course.txt stays in step with the file."""
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


# ------------------------------------------------------------------------------------------------------------
# Versions of a function are told apart by their answers. The questions are the calls that the tests make.


def compiled(ig, text):
    """A function of the module, made of another text."""
    scope = {}
    exec(compile(textwrap.dedent(text), "course", "exec"), vars(ig), scope)
    return scope.popitem()[1]


@contextmanager
def swapped(ig, exercise, text):
    """While this lasts, the exercise's function runs this text; whoever holds the function sees it too."""
    function = ig
    for part in exercise.name.split("."):
        function = getattr(function, part)
    function = inspect.unwrap(function)                    # without what its decorators put around it
    true, function.__code__ = function.__code__, compiled(ig, text).__code__
    try:
        yield
    finally:
        function.__code__ = true


def twins(torch, given):
    """Copies of a call's arguments, as a version may change what it gets; and those to take gradients of."""
    copies, leaves, memo = [], [], {}
    for x in given:
        if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
            leaves.append(x.detach().clone().requires_grad_())
            copies.append(leaves[-1] * 1)                  # no leaf: it may be changed in place
        else:
            copies.append(copy.deepcopy(x, memo))
        if isinstance(x, torch.nn.Module):
            for p in x.parameters():
                memo[id(p)].grad = copy.deepcopy(p.grad)   # which the copy of a model leaves behind
    return copies, leaves


def flat(ig, x):
    """All numbers in a result, as a list of tensors."""
    if isinstance(x, ig.nn.Module):
        x = [(p, p.grad) for p in x.parameters()]
    elif isinstance(x, ig.torch.optim.Optimizer):
        x = [x.param_groups[0].get(name) for name in ("lr", "betas", "eps", "weight_decay")]
    elif is_dataclass(x) or type(x).__module__ == ig.__name__:
        x = list(vars(x).values())
    elif isinstance(x, dict):
        x = [x[name] for name in sorted(x)]
    if isinstance(x, (list, tuple)):
        return [part for item in x for part in flat(ig, item)]
    return [ig.torch.as_tensor(x).detach().double()] if isinstance(x, (ig.torch.Tensor, int, float)) else []


def answer(ig, exercise, version, given):
    """What a version makes of a call: its result, what became of the arguments, gradients; or an error."""
    torch, tape = ig.torch, sys.modules["test_instructgpt"].Tape()
    tape.calls = []
    luck = torch.get_rng_state()
    try:
        copies, leaves = twins(torch, given)
        with tape if exercise.key == "rollout" else nullcontext(), redirect_stdout(io.StringIO()):
            result = version(*copies)
        waits = ["_local_scalar_dense" in name or "nonzero" in name for name, _ in tape.calls]
        numbers = flat(ig, [result, copies, sum(waits)])   # how often Python waited for the device
        outputs = result if isinstance(result, tuple) else [result]
        outputs = [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
        if leaves and outputs:
            total = sum((x * torch.linspace(1, 2, x.numel()).view(x.shape)).sum() for x in outputs)
            numbers += flat(ig, torch.autograd.grad(total, leaves, allow_unused=True))
        return numbers
    except Exception as error:
        return type(error).__name__
    finally:
        torch.set_rng_state(luck)


def alike(mine, theirs):
    """Two answers are equal, up to rounding: each number to 1e-4 of the largest beside it."""
    if isinstance(mine, str) or isinstance(theirs, str) or len(mine) != len(theirs):
        return mine == theirs
    for a, b in zip(mine, theirs):
        largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0
        if a.shape != b.shape or not a.allclose(b, rtol=0, atol=1e-4 * largest + 1e-10, equal_nan=True):
            return False
    return True


def compare(ig, exercise, texts, items):
    """Runs these tests with the true version. Whenever they call it, all versions, {title: text}, answer.
    -> [(whether the call holds a NaN or inf, {title: answer}), ...]."""
    versions, calls = {title: compiled(ig, text) for title, text in texts.items()}, []

    def asked(*given):
        odd = not all(bool(x.isfinite().all()) for x in flat(ig, list(given)))
        calls.append((odd, {title: answer(ig, exercise, f, given) for title, f in versions.items()}))
        return versions["true"](*given)
    ig.course_asked = asked
    with swapped(ig, exercise, calling(true_source(), exercise, "course_asked")):
        failures_of(items)
    return calls


def same(calls, title):
    """The titles of the versions that answer all these calls as this one does; none, if there is no call."""
    others = [other for other in calls[0][1] if other != title] if calls else []
    return [other for other in others if all(alike(by[title], by[other]) for _, by in calls)]


def versions_of(source, exercise):
    """{title: text} of the true version and of the wrong ones."""
    return {"true": text_of(source, exercise.name),
            **{wrong.title: wrong_text(source, exercise, wrong) for wrong in exercise.wrong}}


# ------------------------------------------------------------------------------------------------------------
# The judge


def with_tests(folder, work, tracebacks):
    """The tests of a folder are collected and, in place of being run, handed to `work` with the script.
    -> What was printed."""
    import pytest

    def pytest_runtestloop(session):
        work(sys.modules["instructgpt"], session.items)
        return True
    plugin = SimpleNamespace(pytest_runtestloop=pytest_runtestloop)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    with redirect_stdout(io.StringIO()) as said:
        pytest.main(["-q", "--tb=" + tracebacks, "-p", "no:cacheprovider", TESTS], plugins=[plugin])
    os.chdir(ROOT)
    return said.getvalue()


def tests_of(exercise, items):
    """Those that judge it."""
    return [item for item in items if "course" not in item.name
            and any(word in item.name for word in exercise.words)]


def failures_of(items, stop=False):
    """Runs the tests, or only to the first that fails. -> [what a failing test says, ...]."""
    from _pytest.runner import runtestprotocol
    # The spare test does not run: it is there so that the fixtures of the session live on.
    told, spare = [], next(item for item in items[0].session.items if item not in items)
    for item in items:
        for report in runtestprotocol(item, log=False, nextitem=spare):
            if report.failed:
                lines = [line for line in report.longreprtext.split("\n") if not line.startswith("E    +")]
                told.append("\n".join([item.name] + lines[-20:]))
        if told and stop:
            break
    return told


def opinions(exercise, calls):
    """What the answers of "yours" say, as lines; none for those of the true version."""
    versions, lines = same(calls, "yours"), []
    if not versions:
        versions = same([call for call in calls if not call[0]], "yours")
        if versions:
            lines.append("a NaN or inf behind the mask comes through: set inputs to 0 there before the rest")
    for wrong in exercise.wrong:
        if wrong.title in versions:
            lines.append(f"yours equals the version that {wrong.title}\n       (seen in: {wrong.source})")
    return lines


def judge(keys):
    """The verdict on one function of the file beside data/: whether it is green, and lines that say why."""
    exercise, = [EXERCISES[key] for key in keys]
    mine, truth, found = (ROOT / SCRIPT).read_text(encoding="utf-8"), true_source(), []
    try:
        source = filled(mine, exercise.key)
    except SyntaxError as error:
        return False, [f"{SCRIPT}, line {error.lineno}: {error.msg}"]
    if f"exercise {exercise.key}:" in text_of(mine, exercise.name):
        return False, [f"{exercise.key} is still empty"]

    def work(ig, items):
        items, texts = tests_of(exercise, items), versions_of(truth, exercise)
        found.append((failures_of(items), len(items)))
        found.append(compare(ig, exercise, {**texts, "yours": text_of(mine, exercise.name)}, items))
    with tempfile.TemporaryDirectory() as folder:
        copy_files(folder, source)
        shutil.copy(ROOT / TESTS, folder)
        said = with_tests(folder, work, "short")
    if len(found) < 2:                                     # the file cannot even be imported
        return False, [f"{exercise.key}: the tests do not begin", said]
    (failures, count), calls = found
    lines = opinions(exercise, calls)
    green = not failures and not lines
    if green and not same(calls, "yours"):
        lines = ["It does not give quite the numbers of the file's own, but nothing asks for these."]
    verdict = f"{len(failures)} of its {count} tests fail" if failures else "its tests pass"
    lines += [f"\nThe first that fails: {failure}" for failure in failures[:1]]
    return green, [f"{exercise.key}: {verdict}"] + lines


def zeros(torch, x):
    """A result as zeros."""
    if is_dataclass(x):
        return type(x)(**zeros(torch, vars(x)))
    if isinstance(x, dict):
        return {name: zeros(torch, value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)([zeros(torch, item) for item in x])
    if isinstance(x, torch.nn.Module):
        x.load_state_dict(zeros(torch, x.state_dict()))
        return x
    if isinstance(x, torch.optim.Optimizer):
        x.param_groups[0].update(lr=0.0, betas=(0.0, 0.0))
        return x
    return torch.zeros_like(x) if isinstance(x, torch.Tensor) else type(x)(0)


def empty_versions(ig, exercise, source):
    """{title: text}: emptied, an answer of None, one of zeros."""
    true = compiled(ig, text_of(source, exercise.name))

    def of_zeros(*given):
        return zeros(ig.torch, true(*given))
    ig.course_zeros = of_zeros
    found = {"empty": hole(source, exercise), "None": with_body(source, exercise.name, "return None")}
    returns = [n for n in ast.walk(node_of(source, exercise.name)) if isinstance(n, ast.Return) and n.value]
    return {**found, "zeros": calling(source, exercise, "course_zeros")} if returns else found


def check(keys):
    """Every bad version is red and answers as no other. -> (whether it is so, lines that say what is not)."""
    source, lines, count = true_source(), [], 0

    def work(ig, items):
        nonlocal count
        for exercise in [EXERCISES[key] for key in keys]:
            mine, texts = tests_of(exercise, items), versions_of(source, exercise)
            texts |= empty_versions(ig, exercise, source)
            calls = compare(ig, exercise, texts, mine)
            for title, text in texts.items():
                with swapped(ig, exercise, text):
                    green = not failures_of(mine, stop=True)
                if green != (title == "true"):
                    lines.append(f"{exercise.key}: the tests are {'green' if green else 'red'}: {title}")
                if same(calls, title):
                    lines.append(f"{exercise.key}: {title} answers as {same(calls, title)}")
                count += title != "true"
    said = with_tests(ROOT, work, "native")
    told = f"{len(keys)} exercises, {count} bad versions, {len(lines)} complaints"
    return count > 0 and not lines, lines + [told if count else said]


# ------------------------------------------------------------------------------------------------------------
# The student's folder


def overview(keys):
    """The exercises as a Markdown table, in the order to do them."""
    rows = ["| paper | function | KEY | minutes | whose idea |", "|---|---|---|---:|---|"]
    for x in [EXERCISES[key] for key in EXERCISES if key in keys]:
        rows.append(f"| {x.place} | `{x.name}` | `{x.key}` | {x.minutes} | {x.whose} |")
    return "\n".join(rows)


def copy_files(folder, source):
    """The script and data/."""
    (Path(folder) / SCRIPT).write_text(source, encoding="utf-8", newline="\n")
    shutil.copytree(DATA, Path(folder) / "data", ignore=shutil.ignore_patterns("__pycache__"))


def write_folder(folder, source, name, guide):
    """What every student's folder has: the script, data/ and a text that says what to do. -> Its path."""
    if os.path.exists(folder):
        raise SystemExit(f"{folder} is there already: --out names another folder")
    os.makedirs(folder)
    copy_files(folder, source)
    (Path(folder) / name).write_text(guide + "\n", encoding="utf-8", newline="\n")
    print(f"{folder} is written; read {Path(folder) / name}")
    return Path(folder)


def student(keys, folder):
    """Writes the folder with these exercises empty."""
    truth = true_source()
    source = with_texts(truth, {EXERCISES[key].name: hole(truth, EXERCISES[key]) for key in keys})
    count = "one function is empty" if len(keys) == 1 else f"{len(keys)} functions are empty"
    guide = TEXTS["EXERCISES.md"].format(empty=count, first=keys[0], table=overview(keys))
    folder = write_folder(folder, source, "EXERCISES.md", guide)
    shutil.copy(ROOT / TESTS, folder)
    (folder / "data" / SOLUTION).write_bytes(zlib.compress(truth.encode(), 9))


def student_with_mistake(number, folder):
    """Writes the folder with one wrong function, without tests, which would name it."""
    source, (exercise, wrong, _) = true_source(), planted(number)
    source = with_texts(source, {exercise.name: wrong_text(source, exercise, wrong)})
    write_folder(folder, source, "MISTAKE.md",
                 TEXTS["MISTAKE.md"].format(healthy=TEXTS["a healthy run"], number=number))


def reveal(number):
    exercise, wrong, sign = planted(number)
    print(f"{exercise.name}: the version that {wrong.title}\n(seen in: {wrong.source})\n")
    for old, new in wrong.edits:
        print("  true  " + old + "\n  here  " + "\n        ".join(new))
    print("\n" + textwrap.fill(sign, 100))


# ------------------------------------------------------------------------------------------------------------
# KL on one screen


def enumerated(torch, logits, length):
    """All responses of 1 or 2 tokens out of three words: the log-probs of their tokens, (N,length). logits
    (4,3): of the first token, and of the second after each first one."""
    logprobs = logits.log_softmax(-1)                                           # (4,3)
    if length == 1:
        return logprobs[0][:, None]
    return torch.stack([logprobs[0].repeat_interleave(3), logprobs[1:].flatten()], 1)


def kl_rows(torch, length, gap, seed):
    """[(estimate, cosine to the exact gradient, its bias, the variance of one sample)], the last two relative
    to the exact gradient."""
    true = {"torch": torch}                                # kl_k1 and kl_k3 of the true file
    for name in ("kl_k1", "kl_k3"):
        exec(text_of(true_source(), name), true)
    noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    logits, rows = (gap * noise[0]).requires_grad_(), []
    pi, ref = enumerated(torch, logits, length), enumerated(torch, gap * noise[1], length)      # (N,length)
    weight, k1 = pi.sum(1).exp(), true["kl_k1"](pi, ref)
    exact = torch.autograd.grad((weight * k1.sum(1)).sum(), logits, retain_graph=True)[0].flatten()
    to_come = k1.detach().flip(1).cumsum(1).flip(1)        # what each token is charged for, as by the rewards
    losses = {"k1 in the reward": to_come * pi, "k1 as a loss": k1, "k2 as a loss": 0.5 * k1 ** 2,
              "k3 as a loss": true["kl_k3"](pi, ref)}
    for name, loss in losses.items():
        slopes = [torch.autograd.grad(x, logits, retain_graph=True)[0].flatten() for x in loss.sum(1)]
        slopes = torch.stack(slopes)                                            # (N,12) of single samples
        mean, size = weight.detach() @ slopes, exact.norm()
        cosine = mean @ exact / (mean.norm() * size).clamp(min=1e-9)
        variance = weight.detach() @ (slopes - mean).square().sum(1) / size ** 2
        rows.append((name, float(cosine), float((mean - exact).norm() / size), float(variance)))
    return rows


def show_kl():
    import torch
    print(TEXTS["before the KL table"] + "\n")
    for length, gap in itertools.product((1, 2), (0.3, 2.0)):
        told = "near" if gap < 1 else "far from"
        print(f"{f'length {length}, pi {told} pi_ref':26}  cosine    bias  variance of a sample")
        for pairs in zip(*[kl_rows(torch, length, gap, seed) for seed in range(9)]):
            cosine, bias, variance = [round(median(x), 6) + 0.0 for x in list(zip(*pairs))[1:]]
            print(f"    {pairs[0][0]:20}{cosine:10.3f}{bias:8.3f}{variance:10.1f}")
    print("\n" + TEXTS["after the KL table"])


# ------------------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = argparse.ArgumentParser(prog="course.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["student", "judge", "kl", "check"])
    parser.add_argument("keys", nargs="*", metavar="KEY")
    parser.add_argument("--out", default="student", metavar="DIR", help="the folder that `student` writes")
    for name in ("--break", "--reveal"):
        parser.add_argument(name, type=int, default=0, choices=range(1, len(PLANTED) + 1))
    a = parser.parse_args(argv)
    a.keys = list(EXERCISES) if a.keys == ["all"] else a.keys
    for key in a.keys:
        if key not in EXERCISES:
            parser.error(f"{key} is no exercise; these are: {' '.join(EXERCISES)}")
    if a.command == "judge" and len(a.keys) != 1:
        parser.error("judge takes one KEY")
    return a, vars(a)["break"]


def main(argv=None):
    a, broken = parse(argv)
    if a.command in ("judge", "check"):
        green, lines = judge(a.keys) if a.command == "judge" else check(a.keys or list(EXERCISES))
        print(f"{'green' if green else 'red':6} " + "\n       ".join(lines))
        return 0 if green else 1
    if a.command == "kl":
        show_kl()
    elif a.reveal:
        reveal(a.reveal)
    elif broken:
        student_with_mistake(broken, a.out)
    elif a.keys:
        student(a.keys, a.out)
    else:
        print(overview(EXERCISES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
