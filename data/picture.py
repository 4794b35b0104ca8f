"""The table and the picture of a finished run, and the band of healthy runs. Python alone is enough.

    python data/picture.py OUT                     reads OUT/results.json and OUT/log.jsonl, prints the
                                                   table and writes OUT/picture.svg
    python data/picture.py --reference OUT1 OUT2   writes data/reference.json from the logs of these runs

With data/reference.json the first command also says whether the RL stages stay inside the band of healthy
runs. A run with other settings or other data than the reference's is drawn, but not compared.
"""
import argparse
import json
import math
import os
import sys
from itertools import cycle
from statistics import fmean, median
from xml.sax.saxutils import escape

REFERENCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "reference.json")
COMPARED = ("ppo", "ppo_ptx")       # the stages in the reference
SETTINGS = ("episodes", "minibatches", "policy_lr", "value_lr", "beta", "ptx_coef", "cliprange", "lam",
            "n_embd", "n_layer", "pretrain_steps")       # where one of them differs, so does the band
REACH = 2                           # curves are means over five iterations: one, and two on each side of it
EVERY = 2                           # of such curves the reference keeps every second iteration
WIDEN, NEARBY = 0.6, 2              # how far the band reaches beyond the healthy runs: see band(). With half a
                                    # range one of thirteen would leave the band of the others
STREAK = 3                          # a curve leaves the band when it stays outside for so many of the kept
                                    # iterations: five in a row, so that one spike is not enough

NAMES = {"pretrain": "GPT", "sft": "SFT", "flan": "FLAN", "rm": "RM", "ppo": "PPO", "ppo_ptx": "PPO-ptx",
         "reinforce": "REINFORCE", "dpo": "DPO", "kto": "KTO", "rlaif": "RLAIF"}
FROM_SFT = ("SFT", "PPO", "PPO-ptx", "REINFORCE", "DPO", "KTO", "RLAIF")     # models that began as SFT
# Most of these colours are Okabe and Ito's (2008): the colour-blind can tell them apart.
COLOURS = {"GPT": "9aa0a8", "GPT (prompted)": "5b6470", "SFT": "e69f00", "PPO": "d55e00", "PPO-ptx": "0072b2",
           "RM": "000000", "REINFORCE": "009e73", "DPO": "cc79a7", "KTO": "56b4e9", "FLAN": "999933",
           "RLAIF": "882255", "rival GPT": "8c510a"}
SPARE = ("44aa99", "332288", "ddcc77", "117733", "aa4499")                   # for names not known here


# ------------------------------------------------------------------------------------------------------------
# What a run left behind


def read_json(path, *keys):
    """An object that holds an object under each of these keys; otherwise ValueError, with a line to show."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    for key in keys:
        if not isinstance(found, dict) or not isinstance(found.get(key), dict):
            raise ValueError(f'{path} must be an object with an object "{key}"')
    return found


def read_log(path):
    """log.jsonl as a list of dicts. Lines that cannot be read are skipped: a stopped run may leave half a
    line. Of a repeated step the last line counts. A missing file gives []."""
    if not os.path.exists(path):
        return []
    rows = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(row, dict):
                continue
            if isinstance(row.get("stage"), str) and isinstance(row.get("step"), int):
                rows[row["stage"], row["step"]] = row
    return list(rows.values())


def number(row, key):
    """row[key], or None if it is missing, no number, not finite or too large to draw."""
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, (int, float)) and abs(value) < 1e15:
        return value
    return None


def smooth(values, reach):
    """Each value's mean with its neighbours, at most `reach` on each side. The first value stays as it is and
    the next ones reach less far, as many curves rise steeply there."""
    return [fmean(values[max(0, i - reach):i + min(i, reach) + 1]) for i in range(len(values))]


def curve(history, stage, x, y, reach=REACH):
    """The smoothed points (x, y) of one stage, in the order of its steps. A step itself stays as it is."""
    rows = [row for row in history if row["stage"] == stage]
    rows.sort(key=lambda row: row["step"])
    points = [(number(row, x), number(row, y)) for row in rows]
    points = [point for point in points if None not in point]
    xs = [point[0] for point in points]
    ys = [point[1] for point in points]
    if x != "step":
        xs = smooth(xs, reach)
    return list(zip(xs, smooth(ys, reach)))


# ------------------------------------------------------------------------------------------------------------
# The band of healthy runs


def reference_of(histories):
    """Logs of healthy runs -> {"stages": {stage: {column: [[iteration, the value of each run], ...]}}}, of
    the runs' smoothed curves. The first iterations, hardly smoothed, are left out."""
    stages = {}
    for stage in COMPARED:
        names = {name for row in histories[0] if row["stage"] == stage for name in row}
        for name in sorted(names - {"stage", "step"}):
            runs = [dict(curve(history, stage, "step", name)) for history in histories]
            rows = []
            for step in sorted(set.intersection(*[set(run) for run in runs]))[REACH::EVERY]:
                rows.append([step] + [float(f"{run[step]:.3g}") for run in runs])
            if any(value for row in rows for value in row[1:]):            # plain PPO's ptx is 0 throughout
                stages.setdefault(stage, {})[name] = rows
    return {"stages": stages}


def band(reference, stage, column):
    """{iteration: (low, median, high)}. The band reaches from the least value of the healthy runs less WIDEN
    times their range to the largest value plus as much. The range is the widest of all kept iterations that
    are at most NEARBY away. So wide, a healthy run that is left out stays inside the band of the others."""
    rows = reference["stages"].get(stage, {}).get(column, [])
    ranges = [max(values) - min(values) for _, *values in rows]
    bounds = {}
    for i, (step, *values) in enumerate(rows):
        room = WIDEN * max(ranges[max(0, i - NEARBY):i + NEARBY + 1])
        room += 0.005 * max(abs(value) for value in values)      # the file holds three digits
        bounds[step] = (min(values) - room, median(values), max(values) + room)
    return bounds


def without(reference, place):
    """The reference without one of its runs, and that run's curves: {(stage, column): {iteration: value}}."""
    stages, curves_of_it = {}, {}
    for stage, columns in reference["stages"].items():
        for column, rows in columns.items():
            kept = [row[:place + 1] + row[place + 2:] for row in rows]
            stages.setdefault(stage, {})[column] = kept
            curves_of_it[stage, column] = {row[0]: row[place + 1] for row in rows}
    return {**reference, "stages": stages}, curves_of_it


def first_outside(values, bounds):
    """The iteration from which a curve is outside for STREAK kept iterations in a row; None if it never is."""
    outside = []
    for step in sorted(values.keys() & bounds.keys()):
        low, _, high = bounds[step]
        outside.append(step)
        if low <= values[step] <= high:
            outside = []
        if len(outside) == STREAK:
            return outside[0]
    return None


def leaves_band(history, reference):
    """{stage: None if it stays inside, else (column, iteration) of the column that leaves first}."""
    found = {}
    ran = {row["stage"] for row in history}
    for stage in [stage for stage in reference["stages"] if stage in ran]:
        exits = []
        for column in reference["stages"][stage]:
            values = dict(curve(history, stage, "step", column))
            step = first_outside(values, band(reference, stage, column))
            if step is not None:
                exits.append((column, step))
        found[stage] = min(exits, key=lambda leaving: leaving[1], default=None)
    return found


def misfit(config, history, reference):
    """Why a run with these settings cannot be compared with the reference; "" if it can."""
    if not any("gold" in row for row in history):
        return "not compared with healthy runs: the log holds no gold, so this was not the toy world"
    for name, theirs in reference["settings"].items():
        if config.get(name) != theirs:
            return f"not compared with healthy runs: {name} is {config.get(name)}, theirs {theirs}"
    return ""


def verdicts(history, reference):
    """A line per stage: inside the band, or which column leaves it first, and where."""
    lines = []
    for stage, leaving in leaves_band(history, reference).items():
        if leaving is None:
            lines.append(f"{stage}: inside the band of healthy runs")
            continue
        column, step = leaving
        value = dict(curve(history, stage, "step", column))[step]
        low, _, high = band(reference, stage, column)[step]
        lines.append(f"{stage}: {column} leaves the band of healthy runs at iteration {step} "
                     f"({value:.3g}; the band is {low:.3g} to {high:.3g})")
    return lines


def write_reference(folders):
    """Finished runs -> data/reference.json."""
    histories = [read_log(os.path.join(folder, "log.jsonl")) for folder in folders]
    configs = [read_json(os.path.join(folder, "results.json"), "config")["config"] for folder in folders]
    settings = {name: configs[0].get(name) for name in SETTINGS}
    for folder, config in zip(folders, configs):
        if settings != {name: config.get(name) for name in SETTINGS}:
            raise ValueError(f"{folder}: its settings differ from those of {folders[0]}")
    seeds = [config.get("seed") for config in configs]
    reference = {"seeds": seeds, "settings": settings, **reference_of(histories)}
    with open(REFERENCE, "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(reference, separators=(",", ":")) + "\n")


# ------------------------------------------------------------------------------------------------------------
# The table: name in results.json -> heading of its column. Held-out: by labelers who gave no training data;
# no noise: by gold; true: truthful and informative; KL: k1, which Eq. 2 charges.

COLUMNS = {"win_vs_sft": "over SFT", "win_vs_sft_heldout": "held-out", "win_vs_sft_gold": "no noise",
           "win_vs_rival": "over rival", "gold": "gold 1-7", "truthful_informative": "true", "rude": "rude",
           "hallucinates": "invents", "tax": "tax", "reward": "reward", "kl_k1": "KL", "ended": "ended"}


def table(models):
    """results.json's models as text: a row each, a column for what was measured."""
    models = {name: model for name, model in models.items() if isinstance(model, dict)}
    keys = [key for key in COLUMNS if any(number(model, key) is not None for model in models.values())]
    lines = [" " * 15 + "".join(f"{COLUMNS[key]:>11}" for key in keys)]
    for name, model in models.items():
        cells = [number(model, key) for key in keys]
        cells = ["" if cell is None else f"{cell:.3f}" for cell in cells]
        lines.append(f"{name:15}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Drawing. A panel holds bars between their names and their values, or curves between numbers and their names.

WIDTH, HEIGHT = 280, 296                             # of a panel
TOP, BOTTOM = 42, 238                                # of what is drawn in it
BARS = (122, 222)                                    # from left to right
CURVES = (42, 182)
MOST = 12                                            # bars or curves in a panel


def words(x, y, text, anchor="middle", most=48):
    """Text at a place. Names come from files: what XML cannot hold goes, and what exceeds `most` is cut."""
    text = "".join(letter for letter in text if letter.isprintable())
    if len(text) > most:
        text = text[:most - 1] + "\u2026"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


class Axis:
    """Places numbers between two pixels, with a little room at both ends."""

    def __init__(self, numbers, begin, end):
        size = max(abs(value) for value in numbers)
        room = 0.04 * (max(numbers) - min(numbers))
        if room <= 1e-6 * size:                      # all are equal
            room = 0.1 * size + 0.001
        self.low = min(numbers) - room
        self.high = max(numbers) + room
        self.begin = begin
        self.scale = (end - begin) / (self.high - self.low)

    def place(self, value):
        return self.begin + self.scale * (value - self.low)

    def ticks(self):
        """Two to five round numbers, in steps of 1, 2 or 5 times a power of ten."""
        least = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(least))
        step = min(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def plain(tick):
    return tick


def square(tick):
    return tick * tick


def power_of_two(tick):
    return 2 ** tick


def grid_x(axis, reads=plain):
    """Upright lines at round numbers. Below them stands what `reads` makes of each, or of every n-th one
    if there is no room for all."""
    ticks = axis.ticks()
    texts = [f"{reads(tick):.6g}" for tick in ticks]
    pitch = axis.place(ticks[-1]) - axis.place(ticks[-2])
    every = math.ceil(9 * max(len(text) for text in texts) / pitch)
    svg = [f'<path stroke="#ddd" d="M{axis.place(tick):.1f} {TOP}V{BOTTOM}"/>' for tick in ticks]
    svg += [words(axis.place(tick), BOTTOM + 16, text) for tick, text in list(zip(ticks, texts))[::every]]
    return svg


def grid_y(axis, reads=plain):
    """Level lines at round numbers."""
    svg = []
    for tick in axis.ticks():
        y = axis.place(tick)
        svg.append(f'<path stroke="#ddd" d="M{CURVES[0]} {y:.1f}H{CURVES[1]}"/>')
        svg.append(words(CURVES[0] - 5, y + 4.5, f"{reads(tick):.3g}", "end"))
    return svg


def bars(values, colours, start, form):
    """{name: (value, half width of its interval)} as bars from `start` to the value."""
    if not values:
        return []
    values = dict(list(values.items())[:MOST])
    lows = [value - half for value, half in values.values()]
    highs = [value + half for value, half in values.values()]
    axis = Axis([start] + lows + highs, *BARS)
    zero = axis.place(start)
    pitch = min(40, (BOTTOM - TOP) / len(values))
    svg = grid_x(axis)
    for i, (name, (value, half)) in enumerate(values.items()):
        y = TOP + pitch * (i + 0.5)
        bar = f"M{zero:.1f} {y:.1f}H{axis.place(value):.1f}"
        interval = f"M{axis.place(value - half):.1f} {y:.1f}H{axis.place(value + half):.1f}"
        svg.append(f'<path stroke="#{colours[name]}" stroke-width="{0.72 * pitch:.1f}" d="{bar}"/>')
        svg.append(f'<path stroke="black" stroke-width="1.3" d="{interval}"/>')
        svg.append(words(BARS[0] - 4, y + 4.5, name, "end", 14))
        svg.append(words(WIDTH - 10, y + 4.5, format(value, form), "end"))
    svg.append(f'<path stroke="black" d="M{zero:.1f} {TOP}V{BOTTOM}"/>')
    return svg


def curves(series, colours, bands=(), reads_x=plain, reads_y=plain):
    """{name: [(x, y), ...]}, x at least 0, as curves with a dot at their end, their names on the right.
    Behind them stands each band, {x: (low, median, high)}, from low to high in grey."""
    if not series:
        return []
    series = dict(list(series.items())[:MOST])
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    outlines = []
    for bounds in bands:
        reached = [x for x in bounds if x <= max(xs)]
        lower = [(x, bounds[x][0]) for x in reached]
        upper = [(x, bounds[x][2]) for x in reached]
        outlines.append(lower + upper[::-1])
        ys += [y for _, y in outlines[-1]]
    across = Axis([0] + xs, *CURVES)
    up = Axis(ys, BOTTOM, TOP)

    def path(points):
        places = [f"{across.place(x):.1f} {up.place(y):.1f}" for x, y in points]
        return "M" + "L".join(places)

    svg = grid_x(across, reads_x) + grid_y(up, reads_y)
    for outline in outlines:
        svg.append(f'<path fill="#888" fill-opacity="0.25" d="{path(outline)}Z"/>')
    label = 0
    for i, name in enumerate(sorted(series, key=lambda name: -series[name][-1][1])):
        points = series[name]
        lowest = BOTTOM + 8 - 16 * (len(series) - i)             # so that the names below it have room
        label = min(max(up.place(points[-1][1]), label + 16), lowest)
        svg.append(f'<g stroke="#{colours[name]}" stroke-linecap="round" stroke-linejoin="round">')
        svg.append(f'<path fill="none" stroke-width="1.8" d="{path(points)}"/>')
        dots = f"{path(points[-1:])}h.01M{CURVES[1] + 10} {label:.1f}h.01"
        svg.append(f'<path stroke-width="8" d="{dots}"/></g>')
        svg.append(words(CURVES[1] + 17, label + 4.5, name, "start", 9))
    return svg


# ------------------------------------------------------------------------------------------------------------
# The panels


def colours_of(models, history):
    """{name: its colour in all panels}."""
    names = [*models, *[NAMES.get(row["stage"], row["stage"]) for row in history]]
    unknown = [name for name in dict.fromkeys(names) if name not in COLOURS]
    return {**COLOURS, **dict(zip(unknown, cycle(SPARE)))}


def all_losses(history):
    """{name: its points (% of its steps, log2 of its loss)}."""
    series = {}
    for name, points in all_curves(history, "step", "loss", 3 * REACH).items():
        last = points[-1][0]
        series[name] = [(100 * step / max(last, 1), math.log2(max(loss, 0.01))) for step, loss in points]
    return series


def preferences(models):
    """{name: (share of comparisons with SFT that it wins, half width of its interval)}."""
    values = {}
    for name, model in models.items():
        share = number(model, "win_vs_sft")
        half = number(model.get("ci95"), "win_vs_sft")
        if share is not None:
            values[name] = (share, half or 0)
    return values


def gains(before, after):
    """{key: (its number after less that before, 0)} of what has both."""
    values = {}
    for key in after:
        if None not in (number(before, key), number(after, key)):
            values[key] = (after[key] - before[key], 0)
    return values


def all_curves(history, x, y, reach=REACH):
    """{name: its points} of each stage that logged both."""
    series = {}
    for stage in dict.fromkeys(row["stage"] for row in history):
        points = curve(history, stage, x, y, reach)
        if points:
            series[NAMES.get(stage, stage)] = points
    return series


def against_kl(models, history, logged, judged):
    """{name: its points over the root of KL}. What has no log of RL is a dot, by its evaluation. Along the
    root reward rises about linearly (Bai et al. 2022). KL is k1, as k3 is noisier far from SFT."""
    series = all_curves(history, "k1", logged, 2 * REACH)
    for name in FROM_SFT:
        point = (number(models.get(name), "kl_k1"), number(models.get(name), judged))
        if name not in series and None not in point:
            series[name] = [point]
    for name, points in series.items():
        series[name] = [(max(kl, 0) ** 0.5, y) for kl, y in points]
    return series


def alignment_tax(models):
    """{name: (rise of its pretraining loss over GPT's, 0)}."""
    losses = {name: number(model, "pretrain_loss") for name, model in models.items() if "GPT" not in name}
    base = number(models.get("GPT"), "pretrain_loss")
    return gains(dict.fromkeys(losses, base), losses)


def use_cases(models, chosen):
    """{use case: (gold of the chosen model over SFT's, 0)}, the largest first."""
    tables = [models.get(name, {}).get("gold_by_use_case", {}) for name in ("SFT", chosen)]
    return dict(sorted(gains(*tables).items(), key=lambda item: -item[1][0]))


def all_panels(models, history, reference):
    """(title, what the axis shows, lines of SVG) of each panel, the most telling first. A panel without
    numbers has no lines."""
    colours = colours_of(models, history)
    chosen = [name for name in (*models, "PPO", "PPO-ptx") if name in models][-1:]
    chosen = "".join(chosen)                         # PPO-ptx, else PPO, else the last model
    cases = use_cases(models, chosen)
    kl = "KL to SFT, nats per response, root axis"
    steps = "iteration"
    if reference:
        steps = "iteration; grey: healthy runs"

    def over_kl(logged, judged):
        return curves(against_kl(models, history, logged, judged), colours, reads_x=square)

    def over_time(column):
        bands = []
        if reference:
            bands = [band(reference, stage, column) for stage in COMPARED]
        return curves(all_curves(history, "step", column), colours, bands)

    preferred = bars(preferences(models), colours, 0.5, ".2f")
    tax = bars(alignment_tax(models), colours, 0, "+.3f")
    gain = bars(cases, dict.fromkeys(cases, colours.get(chosen)), 0, "+.2f")
    losses = curves(all_losses(history), colours, reads_y=power_of_two)
    return [("Preferred to SFT", "share of comparisons, 95 % interval", preferred),
            ("Alignment tax", "rise of pretraining loss, nats per token", tax),
            ("Reward against KL", kl, over_kl("score", "reward")),
            ("True quality (gold) against KL", kl, over_kl("gold", "gold")),
            ("Reward", steps, over_time("score")),
            ("True quality (gold)", steps, over_time("gold")),
            ("KL to SFT, nats per response", steps, over_time("k1")),
            (f"{chosen}: gold over SFT", "by use case", gain),
            ("Losses, nats", "% of the steps", losses),
            ("Tokens per response", steps, over_time("length")),
            ("Entropy, nats per token", steps, over_time("entropy")),
            ("Explained variance of values", steps, over_time("ev"))]


def picture(results, history, reference=None):
    """results.json's dict, read_log's rows, perhaps the reference -> SVG: the first eight panels that have
    numbers, in two rows."""
    models = {name: model for name, model in results["models"].items() if isinstance(model, dict)}
    panels = [panel for panel in all_panels(models, history, reference) if panel[2]][:8]
    columns = max(1, math.ceil(len(panels) / 2))
    size = f"{columns * WIDTH} {2 * HEIGHT}"
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" '
           'font-size="13"><rect width="100%" height="100%" fill="white"/>']
    for i, (title, below, body) in enumerate(panels):
        corner = f"{i % columns * WIDTH} {i // columns * HEIGHT}"
        svg.append(f'<g transform="translate({corner})"><g font-weight="bold">')
        svg += [words(WIDTH / 2, 26, title), "</g>", words(WIDTH / 2, BOTTOM + 37, below), *body, "</g>"]
    return "\n".join(svg) + "\n</svg>\n"


def draw(out):
    """Writes picture.svg into a run's folder -> the lines of the verdict; none without a reference."""
    results = read_json(os.path.join(out, "results.json"), "config", "models")
    history = read_log(os.path.join(out, "log.jsonl"))
    reference = None
    lines = []
    if os.path.exists(REFERENCE):
        reference = read_json(REFERENCE, "settings", "stages")
        reason = misfit(results["config"], history, reference)
        if reason:
            lines = [reason]
            reference = None
        else:
            lines = verdicts(history, reference)
    with open(os.path.join(out, "picture.svg"), "w", encoding="utf-8", newline="\n") as file:
        file.write(picture(results, history, reference))
    return lines


def main():
    parser = argparse.ArgumentParser(description="Draws a finished run, or makes the band of healthy runs.")
    parser.add_argument("folders", nargs="+", metavar="OUT", help="folder of a finished run")
    parser.add_argument("--reference", action="store_true", help="write data/reference.json from these runs")
    choice = parser.parse_args()
    if len(choice.folders) > 1 and not choice.reference:
        parser.error("several folders make a reference: give --reference")
    try:
        if choice.reference:
            write_reference(choice.folders)
            print(f"wrote {REFERENCE}")
        else:
            out = choice.folders[0]
            lines = draw(out)
            print(table(read_json(os.path.join(out, "results.json"), "models")["models"]) + "\n")
            print("\n".join([*lines, f"wrote {os.path.join(out, 'picture.svg')}"]))
    except (OSError, ValueError) as error:
        print(f"picture.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
