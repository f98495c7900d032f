"""Draws what the runs of studies/crl_depth_offline.py under runs/ have learned, offline.

    python benchmark/crl_deep/depth_offline_plot.py --runs "depth-paper-*" --out runs/figures/crl_depth_offline

Held-out loss and goals reached over depth, with the controls; the critic over the floor at the smallest and the largest
depth. A PNG with the CSV behind it.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plotting import group, load_runs, mean_and_band, panels, save, seeds_text

TAGS = {"eval/nce": "held-out loss (InfoNCE, batches of 512)", "eval/success": "share of the goals reached"}
FIELDS = ("maze", "data_seed", "gradient_steps", "width", "depth")  # what the arms differ in
MAZES = {"hardest_maze": "hardest maze", "big_maze": "big maze"}


def rows_of(runs) -> list:
    """One row per arm and tag."""
    rows = []
    for values, seeds in group(runs, lambda run: tuple(run.args[name] for name in FIELDS)).items():
        summaries = [json.loads((run.folder / "summary.json").read_text()) for run in seeds]
        for tag in TAGS:
            points = np.array([summary[tag] for summary in summaries])
            mean, low, high = mean_and_band(points[:, None])
            row = dict(zip(FIELDS, values)) | dict(parameters=summaries[0]["parameters"], seeds=len(points), tag=tag)
            row |= dict(mean=mean[0], low=low[0], high=high[0], sd=points.std(ddof=1) if len(points) > 1 else "")
            rows.append(row | dict(each=" ".join(f"{point:.4g}" for point in points)))
    return rows


def draw_panel(axis, rows, maze: str, tag: str) -> None:
    rows = [row for row in rows if (row["maze"], row["tag"]) == (maze, tag)]
    usual = min(row["gradient_steps"] for row in rows), min(row["width"] for row in rows)
    lines = {(d, s, w) for d, s, w in ((row["data_seed"], row["gradient_steps"], row["width"]) for row in rows)}
    for data_seed, steps, width in sorted(lines):
        line = [
            row for row in rows if (row["data_seed"], row["gradient_steps"], row["width"]) == (data_seed, steps, width)
        ]
        x, y = [row["depth"] for row in line], [row["mean"] for row in line]
        bars = np.abs(np.array([[row["low"], row["high"]] for row in line]).T - y)
        name = [f"width {width}"] * (width != usual[1]) + [f"{steps:,} gradient steps"] * (steps != usual[0])
        name = ", ".join(name) or f"width {width}" + (f", data set {data_seed}" if data_seed > 1 else "")
        style = dict(color="C1", marker="o") if name == f"width {usual[1]}" else dict(marker="s", linestyle="--")
        axis.errorbar(x, y, bars, capsize=3, ms=4, label=f"{name}: {line[0]['parameters'] / 1e3:.0f}k weights"
                      if len(line) == 1 else name, **style)  # fmt: skip
    depths = sorted({row["depth"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(depths, [str(depth) for depth in depths])
    axis.set(xlabel="depth", ylabel=TAGS[tag], title=MAZES[maze])
    axis.legend(frameon=False, fontsize=6)


def draw_map(axis, run) -> None:
    """The critic's values for the last cell, in its own colours, and the walls."""
    saved = np.load(run.folder / "critic_map.npz")
    x, y, walls = saved["x"], saved["y"], saved["walls"]
    cell = x[-1] / (walls.shape[0] - 1)
    values = np.ma.array(saved["values"][-1], mask=walls[np.ix_(*(np.round(a / cell).astype(int) for a in (x, y)))])
    picture = axis.pcolormesh(y, x, values, shading="nearest", cmap="viridis", rasterized=True)
    axis.plot(*saved["goals"][-1][::-1], "*", color="red", ms=10)
    axis.set(
        aspect="equal",
        xticks=[],
        yticks=[],
        title=f"depth {run.args['depth']}: f(s, best a, goal), seed {run.args['seed']}",
    )
    axis.invert_yaxis()
    axis.grid(False)
    axis.figure.colorbar(picture, ax=axis, shrink=0.7)


def draw(runs, out) -> None:
    runs = [run for run in runs if (run.folder / "summary.json").exists()]
    rows = rows_of(runs)
    mazes = [maze for maze in MAZES if any(row["maze"] == maze for row in rows)]
    figure, axes = panels(2 * len(mazes) + 2, width=4.2, height=3.4, columns=2)
    for i, maze in enumerate(mazes):
        for axis, tag in zip(axes[2 * i :], TAGS):
            draw_panel(axis, rows, maze, tag)
    main = [run for run in runs if run.args["maze"] == "hardest_maze" and run.args["data_seed"] == 1]
    usual = min(run.args["width"] for run in main), min(run.args["gradient_steps"] for run in main)
    main = [run for run in main if (run.args["width"], run.args["gradient_steps"]) == usual]
    first = [run for run in main if run.args["seed"] == min(run.args["seed"] for run in main)]
    first.sort(key=lambda run: run.args["depth"])
    for axis, run in zip(axes[2 * len(mazes) :], (first[0], first[-1])):
        draw_map(axis, run)
    arms = group(runs, lambda run: tuple(run.args[name] for name in FIELDS)).values()
    if any("-smoke-" in run.args["exp_name"] for run in runs):
        figure.text(0.5, 0.5, "smoke: checks the plumbing, no result", ha="center", rotation=20, color="red", size=16)
    save(figure, rows, out, f"Bars: 95% bootstrap intervals over seeds ({seeds_text(arms)}).")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="a shell pattern of --exp-name")
    parser.add_argument("--out", required=True, help="path of the picture and its CSV, without ending")
    parser.add_argument("--folder", default="runs", help="the folder of the runs")
    arguments = parser.parse_args()
    draw(load_runs(arguments.runs, arguments.folder), arguments.out)


if __name__ == "__main__":
    main()
