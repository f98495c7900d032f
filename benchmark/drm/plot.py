"""Draws the figures of drm.py from the runs under runs/, offline.

    python benchmark/drm/plot.py curves --runs "drm-smoke-*" --envs dm_control/hopper-hop-v0 --arms drm drqv2 \
        --tags return drm/dormant_ratio --out runs/figures/drm
    python benchmark/drm/plot.py behaviour --runs "drm-smoke-film" --envs dm_control/hopper-hop-v0 --arms film \
        --out runs/figures/behaviour

KIND is curves (as in drqv2_plasticity/plot.py), aggregate (Fig. 1: interquartile mean of the returns over runs x tasks,
a line per arm) or behaviour (Fig. 2: dormant ratio and return of every seed of the first arm on the first task, and
pictures from one seed's films of --capture-video, at evaluations spread over the run or --at chosen steps). Stars are
DrQ-v2's published curves. Each figure is written as PNG with the CSV behind it.
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from moviepy import VideoFileClip

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plotting import (
    aligned_tasks,
    arm,
    colours,
    comparable,
    frames_unit,
    group,
    iqm,
    load_module,
    load_runs,
    panels,
    save,
    seeds_text,
    stratified_bootstrap,
    task_name,
)

drq = load_module("drqv2_plasticity/plot.py")

STARS = "DrQ-v2's published curves, means of up to 10 seeds, its own n-step and batch on walker"
# DrQ-v2's published curves: task -> [(million frames, mean return)]
DRQV2 = {
    "hopper-hop": [(0.5, 116), (1, 224), (2, 300), (2.98, 357)], "acrobot-swingup": [(2.98, 438)],
    "cheetah-run": [(0.5, 603), (1, 729), (2.98, 890)], "walker-run": [(2.98, 678)], "quadruped-run": [(2.98, 719)],
    "quadruped-walk": [(2.98, 892)], "reacher-easy": [(0.5, 751), (1, 939), (2.98, 962)],
    "reacher-hard": [(2.98, 971)], "cartpole-swingup_sparse": [(0.5, 383), (1, 775), (2.98, 840)],
    "humanoid-stand": [(10, 144), (30, 813)], "humanoid-walk": [(10, 270), (30, 768)],
    "humanoid-run": [(10, 41), (30, 225)],
}  # fmt: skip
drq.PAPER |= {(f"dm_control/{task}-v0", "return", "drqv2"): points for task, points in DRQV2.items()}
MOMENTS = (0.1, 0.4, 0.7)  # of an episode, where its pictures are taken


def film_steps(run, at: list, count: int = 6) -> list:
    """The steps of the films to show: those nearest to `at`, or `count` spread evenly. SystemExit without films."""
    steps = sorted(int(path.stem) for path in run.folder.glob("films/*.mp4"))
    if not steps:
        raise SystemExit(f"error: {run.folder} has no films/ (train with --capture-video)")
    if at:
        return sorted({min(steps, key=lambda step: abs(step - wanted)) for wanted in at})
    return sorted({steps[math.floor(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)})


def behaviour(runs, at: list, out) -> None:
    """Fig. 2: pictures of the first seed's evaluations above, dormant ratio and return of every seed below."""
    chosen, repeat = film_steps(runs[0], at), runs[0].action_repeat
    size, unit = frames_unit(chosen[-1] * repeat)
    figure = plt.figure(figsize=(1.35 * max(6, len(chosen)), 7), layout="constrained")
    films, panels = figure.add_gridspec(2, 1, height_ratios=(1.35, 1))
    grid, rows = films.subgridspec(len(MOMENTS), len(chosen)), []
    for column, step in enumerate(chosen):
        with VideoFileClip(str(runs[0].folder / "films" / f"{step}.mp4")) as film:
            for row, moment in enumerate(MOMENTS):
                axis = figure.add_subplot(grid[row, column])
                axis.imshow(film.get_frame(moment * film.duration))
                axis.set(xticks=[], yticks=[], title=f"{step * repeat:,}" if row == 0 else "")
                axis.spines[:].set_visible(False)
    for panel, tag in zip(panels.subgridspec(1, 2), ("drm/dormant_ratio", "return")):
        axis = figure.add_subplot(panel)
        for i, run in enumerate(runs):
            frames, values = run.series(drq.full_tag(tag))
            axis.plot(frames / size, values, color=f"C{i}", linewidth=1, label=f"seed {run.args['seed']}")
            rows += [dict(seed=run.args["seed"], tag=tag, frames=int(x), value=y) for x, y in zip(frames, values)]
        for step in chosen:
            axis.axvline(step * repeat / size, color="0.7", linestyle=":", linewidth=1)
        axis.set(xlabel=unit, ylabel=drq.label_of(tag))
        axis.locator_params(axis="x", nbins=4)
    axis.legend(frameon=False, fontsize=6)
    task = task_name(runs[0].args["env_id"])
    seed = runs[0].args["seed"]
    figure.suptitle(f"{task}: what seed {seed} does after so many frames (evaluation, mean action)")
    save(figure, rows, out, "Pictures: early, in the middle and late in one episode. Dotted: where they were taken.")


def aggregate(runs, arms, out) -> None:
    """Fig. 1: the IQM of the evaluations' returns, with its 95% stratified bootstrap interval, over frames."""
    figure, (axis,) = panels(1, width=4.2)
    runs = comparable(runs, "eval/episodic_return")
    rows, last = [], max(run.series("eval/episodic_return")[0].max(initial=0) for run in runs)
    size, unit = frames_unit(last)
    members_of = group(runs, arm)
    for name in filter(members_of.get, arms):
        members = members_of[name]
        frames, tasks = aligned_tasks(members, "eval/episodic_return")
        returns = list(tasks.values())
        mean, (low, high) = iqm(returns), stratified_bootstrap(returns, iqm)
        color = colours(arms)[name]
        axis.plot(frames / size, mean, color=color, label=drq.name_of(name))
        axis.fill_between(frames / size, low, high, color=color, alpha=0.2, linewidth=0)
        rows += [dict(arm=name, tasks=len(tasks), seeds=len(returns[0]), frames=int(f), iqm=m, low=lo, high=hi)
                 for f, m, lo, hi in zip(frames, mean, low, high)]  # fmt: skip
    tasks, seeds = len(group(runs, task_of)), group(runs, lambda run: (arm(run), task_of(run)))
    title = f"{tasks} task{'s' * (tasks > 1)}, {seeds_text(seeds.values())}"
    axis.set(title=title, xlabel=unit, ylabel="IQM of returns")
    axis.locator_params(axis="x", nbins=4)
    axis.legend(frameon=False, fontsize=7)
    save(figure, rows, out, "Bands: 95% stratified bootstrap intervals over runs x tasks.")


def task_of(run) -> str:
    return run.args["env_id"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("curves", "aggregate", "behaviour"))
    parser.add_argument("--runs", required=True, help="a shell pattern of --exp-name")
    parser.add_argument("--envs", nargs="+", required=True, help="the tasks")
    parser.add_argument("--arms", nargs="+", required=True, help="the lines, in this order")
    parser.add_argument("--tags", nargs="+", default=["return"], help="the panels of curves")
    parser.add_argument(
        "--at", nargs="*", type=int, default=[], help="behaviour: show the films nearest to these steps"
    )
    parser.add_argument("--out", required=True, help="path of the picture and its CSV, without ending")
    parser.add_argument("--folder", default="runs", help="the folder of the runs")
    a = parser.parse_args()
    runs = drq.select(load_runs(a.runs, folder=a.folder), a.envs, a.arms)
    if a.kind == "behaviour":
        first = [run for run in runs if (run.args["env_id"], arm(run)) == (a.envs[0], a.arms[0])]
        behaviour(first, a.at, a.out)
    elif a.kind == "aggregate":
        aggregate(runs, a.arms, a.out)
    else:
        drq.curves(drq.all_rows(runs, a.tags), a.arms, a.out, STARS)


if __name__ == "__main__":
    main()
