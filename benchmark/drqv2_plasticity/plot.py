"""Draws the figures of drqv2_plasticity.py from the runs under runs/, offline.

    python benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-smoke-*" --envs dm_control/walker-run-v0 \
        --arms augmentation plain --tags return fau/critic --out runs/figures/fig3

KIND is curves (a row of panels per task, a column per tag, a line per arm), bars (the last returns, and the curves of
the first task beside them), tasks (the last returns of two arms on each task) or seeds (curves with a line per seed).
A tag is "return" (of evaluations) or one of the logs. An arm is the end of an --exp-name. Bands are 95%
bootstrap intervals over seeds; stars are values read from the paper's figures, dotted lines resets, perturbations and
injections. Each figure is written as PNG with the CSV behind it; --csv draws curves from such a CSV instead of runs.
"""

import argparse
import itertools
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plotting import (
    INTERVALS,
    aligned,
    arm,
    colours,
    frames_unit,
    group,
    load_runs,
    logged,
    mean_and_band,
    panels,
    read_rows,
    save,
    seeds_text,
    task_name,
)

LABELS = {
    "plain": "no augmentation", "augmentation": "with augmentation", "static0.5": "replay ratio 0.5",
    "static2": "replay ratio 2", "adaptive": "adaptive replay ratio", "drqv2": "DrQ-v2", "drm": "DrM",
    "drm-0.6": "DrM, alpha at most 0.6", "drm-head": "DrM, last settings", "switch-on": "augmentation switched on",
    "switch-off": "augmentation switched off",
}  # fmt: skip
SUFFIXES = {r"-inject-(\w+)$": r", injection: \1", r"-reset(\d+)$": r", \1 resets", r"^rr([\d.]+)$": r"replay ratio \1"}
STARS = "the paper, read from its figures"
MANY_EVENTS = 20  # more are not drawn
EVENTS = ("events/reset", "events/perturb_factor", "events/injection")
FRAMES = (0.1, 0.3, 0.5, 1, 2, 3)  # millions, where the paper's curves of active units were read
WALKER, QUADRUPED, CHEETAH = (f"dm_control/{task}-run-v0" for task in ("walker", "quadruped", "cheetah"))


def at(*values) -> list:
    return list(zip(FRAMES, values))


# (task, tag, arm) -> [(million frames, value)]
PAPER = {
    (WALKER, "fau/critic", "augmentation"): at(0.379, 0.433, 0.452, 0.462, 0.447, 0.418),
    (WALKER, "fau/critic", "plain"): at(0.331, 0.300, 0.283, 0.258, 0.214, 0.204),
    (WALKER, "fau/encoder", "augmentation"): at(0.429, 0.425, 0.429, 0.427, 0.421, 0.417),
    (WALKER, "fau/encoder", "plain"): at(0.412, 0.398, 0.392, 0.388, 0.378, 0.375),
    (WALKER, "fau/actor", "augmentation"): at(0.35, 0.26, 0.19, 0.145, 0.121, 0.102),
    (WALKER, "fau/actor", "plain"): at(0.46, 0.43, 0.40, 0.36, 0.31, 0.278),
    (QUADRUPED, "fau/critic", "augmentation"): at(0.388, 0.415, 0.459, 0.453, 0.412, 0.382),
    (QUADRUPED, "fau/critic", "rr2"): at(0.398, 0.338, 0.339, 0.300, 0.250, 0.221),
    (QUADRUPED, "fau/actor", "augmentation"): at(0.44, 0.37, 0.26, 0.156, 0.117, 0.102),
    (QUADRUPED, "fau/actor", "rr2"): at(0.29, 0.23, 0.19, 0.147, 0.126, 0.120),
    (QUADRUPED, "fau/encoder", "rr2"): at(0.357, 0.342, 0.338, 0.347, 0.338, 0.338),
    (QUADRUPED, "fau/encoder", "augmentation"): at(0.406, 0.377, 0.370, 0.339, 0.325, 0.328),
    (WALKER, "return", "augmentation"): [(0.3, 230), (0.5, 391), (1, 624), (2, 716), (3, 755)],
    (WALKER, "return", "plain"): [(0.3, 42), (0.5, 54), (1, 85), (2, 104), (3, 167)],
    (WALKER, "return", "switch-on"): [(3, 230)], (WALKER, "return", "switch-off"): [(3, 760)],
    (WALKER, "return", "switch-on-inject-actor"): [(3, 290)],
    (WALKER, "return", "switch-on-inject-critic"): [(2, 450), (3, 635)],
    (WALKER, "return", "augmentation-inject-actor"): [(3, 770)],
    (WALKER, "return", "augmentation-inject-critic"): [(3, 772)],
    (WALKER, "return", "rr2"): [(2, 709)],
    (CHEETAH, "return", "augmentation"): [(2, 828), (3, 880)], (CHEETAH, "return", "plain"): [(3, 270)],
    (CHEETAH, "return", "switch-on"): [(3, 275)], (CHEETAH, "return", "switch-off"): [(3, 865)],
    (CHEETAH, "return", "rr2"): [(2, 793)], (CHEETAH, "return", "layer-norm"): [(3, 655)],
    (CHEETAH, "return", "crelu"): [(3, 429)], (CHEETAH, "return", "shrink-perturb"): [(3, 312)],
    (CHEETAH, "return", "l2-init"): [(3, 301)], (CHEETAH, "return", "spectral-norm"): [(3, 254)],
    (CHEETAH, "return", "weight-decay"): [(3, 241)],
    (QUADRUPED, "return", "augmentation"): [(2, 579), (3, 640)], (QUADRUPED, "return", "plain"): [(3, 250)],
    (QUADRUPED, "return", "switch-on"): [(3, 300)], (QUADRUPED, "return", "switch-off"): [(3, 555)],
    (QUADRUPED, "return", "rr2"): [(2, 420), (3, 440)],
}  # fmt: skip


def select(runs, envs, arms) -> list:
    """The runs of these tasks and arms. SystemExit where there is none."""
    chosen = [run for run in runs if run.args["env_id"] in envs and arm(run) in arms]
    if not chosen:
        raise SystemExit(f"error: no run of {' '.join(envs)} has one of the arms {' '.join(arms)}")
    return chosen


def full_tag(tag: str) -> str:
    return "eval/episodic_return" if tag == "return" else tag


def name_of(name: str) -> str:
    """An arm in the paper's words: plain-reset9 -> no augmentation, 9 resets."""
    for pattern, words in SUFFIXES.items():
        if found := re.search(pattern, name):
            return (name_of(name[: found.start()]) if found.start() else "") + found.expand(words)
    return f"primed, {name_of(name[7:])}" if name.startswith("primed-") else LABELS.get(name, name.replace("-", " "))


def label_of(tag: str) -> str:
    named = {"drm/dormant_ratio": "DrM's dormant ratio", "drm/stddev": "exploration noise", "drm/lambda": "lambda",
             "charts/episodic_return": "return of training episodes"}  # fmt: skip
    if tag in named:
        return named[tag]
    for start, text in (("fau/", "active units, "), ("charts/", ""), ("dormant_ratio_tau", "dormant neurons, tau ")):
        tag = text + tag.removeprefix(start) if tag.startswith(start) else tag
    return tag.replace("_", " ").replace("/", ", ")


def rows_of(runs, tag, every_seed=False) -> list:
    """Rows of the CSV for one tag on one task: our means and bands, the paper's values, when weights were changed."""
    rows, env_id = [], runs[0].args["env_id"]
    for name, seeds in group(runs, arm).items():
        about = dict(env_id=env_id, arm=name, tag=tag)
        for part in [[run] for run in seeds] if every_seed else [seeds]:
            seed = part[0].args["seed"] if every_seed else ""
            frames, values = aligned(part, full_tag(tag))
            rows += [about | dict(seeds=len(values), seed=seed, frames=int(f), mean=m, low=lo, high=hi)
                     for f, m, lo, hi in zip(frames, *mean_and_band(values))]  # fmt: skip
        known = {} if "encoder_weights" in seeds[0].args else PAPER  # Fig. 4 has other numbers, which we do not have
        marks = [("paper", x * 1e6, y) for x, y in known.get((env_id, tag, name), [])]
        marks += [("event", frame, "") for event in EVENTS for frame in seeds[0].series(event)[0]]
        rows += [about | dict(seeds=kind, seed="", frames=int(x), mean=y, low="", high="") for kind, x, y in marks]
    return rows


def draw_curves(axis, rows, arms) -> None:
    """One tag on one task over frames, from rows of the CSV: a line per arm, and per seed where it is given."""
    ours = [row for row in rows if row["seeds"] not in ("paper", "event")]
    end = max((row["frames"] for row in ours), default=0)
    size, unit = frames_unit(end)
    by_ratio = any(re.match(r"rr\d", name) for name in arms)  # Figs. 7, 8: all have augmentation
    for name in [name for name in arms if any(row["arm"] == name for row in ours)]:
        color, label = colours(arms)[name], name_of("rr0.5" if by_ratio and name == "augmentation" else name)
        for seed in dict.fromkeys(row["seed"] for row in ours if row["arm"] == name):
            line = [row for row in ours if (row["arm"], row["seed"]) == (name, seed)]
            x, mean, low, high = zip(*((row["frames"] / size, row["mean"], row["low"], row["high"]) for row in line))
            axis.plot(x, mean, color=color, label=label, linewidth=1)
            axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            label = None
        events = [row["frames"] for row in rows if (row["arm"], row["seeds"]) == (name, "event")]
        for frame in events if len(events) <= MANY_EVENTS else ():
            axis.axvline(frame / size, color=color, linestyle=":", linewidth=0.8)
        near = [(row["frames"] / size, row["mean"]) for row in rows  # what lies beyond the runs stands in the CSV only
                if (row["arm"], row["seeds"]) == (name, "paper") and row["frames"] <= 1.05 * end]  # fmt: skip
        axis.plot([x for x, _ in near], [y for _, y in near], "*", color=color, ms=7)
    counts = sorted({int(row["seeds"]) for row in ours}) if all(row["seed"] == "" for row in ours) else []
    counts = counts or [len({row["seed"] for row in ours})]
    seeds = f"{counts[0]} seed{'s' * (counts[0] > 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    task, tag = task_name(rows[0]["env_id"]), rows[0]["tag"]
    axis.set(title=f"{task}, {seeds}", xlabel=unit, ylabel=label_of(tag))
    axis.locator_params(axis="x", nbins=4)
    axis.legend(frameon=False, fontsize=6)


def note_of(rows, stars=STARS) -> str:
    """The footnote: what of all this the picture has."""
    kinds = {row["seeds"] for row in rows}
    notes = ["Returns: evaluations."] * any(row["tag"] == "return" for row in rows)
    training = any(row["tag"] == "charts/episodic_return" for row in rows)
    notes += ["Returns of training episodes: interpolated between a seed's episodes."] * training
    notes += [f"Bands: {INTERVALS}."] * any(kind not in (1, "paper", "event") for kind in kinds)
    ends = {}
    for row in (row for row in rows if row["seeds"] not in ("paper", "event")):
        ends[row["env_id"]] = max(row["frames"], ends.get(row["env_id"], 0))
    near = any(row["seeds"] == "paper" and row["frames"] <= 1.05 * ends[row["env_id"]] for row in rows)
    notes += [f"Stars: {stars}."] * near
    events = Counter((row["env_id"], row["tag"], row["arm"]) for row in rows if row["seeds"] == "event")
    notes += ["Dotted: here the weights were edited."] * (0 < min(events.values(), default=0) <= MANY_EVENTS)
    jump = any("inject" in str(row["arm"]) and row["tag"] == "fau/critic" for row in rows)
    notes += ["After an injection, only the new head counts as active or not: the FAU jumps."] * jump
    return " ".join([*notes, "Axes need not start at 0."])


def curves(rows, arms, out, stars=STARS) -> None:
    """A panel per task and tag of the rows, tasks below each other where there are several tags."""
    tags, tasks = (list(dict.fromkeys(row[key] for row in rows)) for key in ("tag", "env_id"))
    columns = len(tags) if len(tags) > 1 else min(3, len(tasks))
    figure, axes = panels(len(tasks) * len(tags), columns=min(4, columns))
    for axis, (task, tag) in zip(axes, itertools.product(tasks, tags)):
        part = [row for row in rows if (row["env_id"], row["tag"]) == (task, tag)]
        if not part:  # not logged yet
            axis.set_axis_off()
            continue
        draw_curves(axis, part, arms)
        if tag != tags[0]:  # the row's title and legend stand on its first panel
            axis.set_title("")
            axis.get_legend().remove()
    save(figure, rows, out, note_of(rows, stars))


def all_rows(runs, tags, every_seed=False) -> list:
    tasks = group(runs, lambda run: run.args["env_id"]).values()
    return [row for members in tasks for tag in tags for row in rows_of(members, tag, every_seed)]


def last_return(seeds, end=float("inf")) -> dict:
    """The last evaluation, up to a frame, of runs of one arm on one task, as a row of the CSV."""
    frames, values = aligned(seeds, full_tag("return"))
    last = (frames <= end).nonzero()[0][-1]
    mean, low, high = (line[last] for line in mean_and_band(values))
    about = dict(env_id=seeds[0].args["env_id"], arm=arm(seeds[0]), tag="last return", seeds=len(values), seed="")
    return about | dict(frames=int(frames[last]), mean=mean, low=low, high=high)


def draw_bar(axis, row, place, arms, height) -> None:
    error = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
    axis.barh(place, row["mean"], height, xerr=error, color=colours(arms)[row["arm"]], label=name_of(row["arm"]))


def tasks(runs, arms, out) -> None:
    """The last returns of two arms, side by side on each task; the title has the mean of their ratios (where both are
    at least 1: a ratio to nothing would rule the mean). Where one arm ended earlier, so is the other one's counted."""
    figure, (axis,) = panels(1, width=6, height=1 + 0.4 * len({run.args["env_id"] for run in runs}))
    rows, ratios, names = [], [], []
    for place, (env_id, members) in enumerate(group(runs, lambda run: run.args["env_id"]).items()):
        pair = group(members, arm)
        end = min(aligned(seeds, full_tag("return"))[0][-1] for seeds in pair.values())
        pair = {name: last_return(seeds, end) for name, seeds in pair.items()}
        for i, name in enumerate(name for name in arms if name in pair):
            draw_bar(axis, pair[name], place + 0.4 * i - 0.2, arms, 0.4)
        rows += pair.values()
        names.append(task_name(env_id))
        if min(pair[name]["mean"] if name in pair else 0 for name in arms[:2]) >= 1:
            ratios.append(pair[arms[0]]["mean"] / pair[arms[1]]["mean"])
            names[-1] += f"  x {ratios[-1]:.1f}"
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    mean = f"mean ratio {np.mean(ratios):.2f}" if ratios else "no ratio"
    counts = group(runs, lambda run: (run.args["env_id"], arm(run))).values()
    title = f"{name_of(arms[0])} / {name_of(arms[1])}: {mean}\n{seeds_text(counts)}"
    axis.set(title=title, xlabel="last return")
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    axis.legend(unique.values(), unique.keys(), frameon=False, fontsize=7)
    lines = f" Lines: {INTERVALS}." * any(row["seeds"] > 1 for row in rows)
    save(figure, rows, out, f"Evaluations at the end.{lines}")


def bars(runs, arms, tags, out) -> None:
    """Fig. 2: the last return of each arm on the first task, then its curves (Appendix B.3)."""
    runs = group(runs, lambda run: run.args["env_id"])
    env_id, runs = next(iter(runs.items()))
    figure, axes = panels(1 + len(tags), columns=5)
    rows = []
    for name, seeds in group(runs, arm).items():
        rows.append(last_return(seeds))
        place = arms.index(name)
        draw_bar(axes[0], rows[-1], place, arms, 0.8)
        paper = PAPER.get((env_id, "return", name), [])[-1:]
        axes[0].plot([y for _, y in paper], [place] * len(paper), "k*", ms=7)
    axes[0].set_yticks(range(len(arms)), [name_of(name) for name in arms])
    axes[0].invert_yaxis()
    known = any((env_id, "return", name) in PAPER for name in arms)
    title = f"{task_name(env_id)}, last return" + "\nstars: the paper at 3M frames" * known
    axes[0].set(title=title, xlabel="return")
    for axis, tag in zip(axes[1:], tags):
        part = rows_of(runs, tag)
        draw_curves(axis, part, arms)
        axis.get_legend().remove()  # the bars have the lines' colours
        rows += part
    save(figure, rows, out, note_of(rows))


def rows_of_csv(path: str) -> list:
    """The rows of a picture of curves. SystemExit where there is no such file."""
    try:
        rows = read_rows(path)
    except OSError as error:
        raise SystemExit(f"error: {error}") from None
    if not rows or not {"arm", "tag", "seeds", "seed", "frames"} <= rows[0].keys():
        raise SystemExit(f"error: {path} is not the CSV of a picture of curves")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("curves", "bars", "tasks", "seeds"))
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--runs", help="a shell pattern of --exp-name")
    source.add_argument("--csv", help="a CSV of curves to draw again")
    parser.add_argument("--envs", nargs="+", default=[], help="the tasks")
    parser.add_argument(
        "--arms", nargs="+", required=True, help="the lines, in this order; those without runs are left out"
    )
    parser.add_argument("--tags", nargs="+", help="the panels (return; of a CSV: all that it has)")
    parser.add_argument("--out", required=True, help="path of the picture and its CSV, without ending")
    parser.add_argument("--folder", default="runs", help="the folder of the runs")
    a = parser.parse_args()
    if a.csv:
        if a.kind != "curves":
            parser.error("--csv has curves only")
        rows = [row for row in rows_of_csv(a.csv) if row["arm"] in a.arms]
        rows = [row for row in rows if not a.envs or row["env_id"] in a.envs]
        rows = [row for row in rows if not a.tags or row["tag"] in a.tags]
        curves(rows, a.arms, a.out, "published curves of DrQ-v2" if "drqv2" in a.arms else STARS)
        return
    runs, tags = select(load_runs(a.runs, folder=a.folder), a.envs, a.arms), a.tags or ["return"]
    if a.kind in ("bars", "tasks"):
        runs = logged(runs, full_tag("return"))
    if a.kind == "bars":
        bars(runs, a.arms, tags, a.out)
    elif a.kind == "tasks":
        tasks(runs, a.arms, a.out)
    else:
        curves(all_rows(runs, tags, a.kind == "seeds"), a.arms, a.out)


if __name__ == "__main__":
    main()
