"""Draws what the runs of studies/crl_depth_offline.py under runs/ have learned, offline.

    python benchmark/crl_deep/depth_offline_plot.py --runs "depth-paper-*" --out runs/figures/crl_depth_offline

Held-out loss and goals reached over depth, with the controls; the critic over the floor at the smallest and the largest
depth. A PNG with the CSV behind it.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plotting import INTERVALS, asked, group, mean_and_band, panels, save, seeds_text

TAGS = {"eval/nce": "held-out loss (InfoNCE)", "eval/success": "share of the goals reached"}
FIELDS = ("maze", "data_seed", "gradient_steps", "width", "depth")  # what the arms differ in


def rows_of(runs) -> list:
    """One row per arm and tag."""
    rows = []
    for values, seeds in group(runs, lambda run: tuple(run.args[name] for name in FIELDS)).items():
        summaries = [json.loads((run.folder / "summary.json").read_text()) for run in seeds]
        for tag in TAGS:
            points = np.array([summary[tag] for summary in summaries])
            mean, low, high = mean_and_band(points[:, None])
            row = dict(zip(FIELDS, values)) | dict(
                thousands=summaries[0]["parameters"] / 1e3, seeds=len(points), tag=tag
            )
            row |= dict(mean=mean[0], low=low[0], high=high[0], sd=points.std(ddof=1) if len(points) > 1 else "")
            rows.append(row | dict(each=" ".join(f"{point:.4g}" for point in points)))
    return rows


DATA_SET = {1: dict(fmt="o-", label="a set of data"), 2: dict(fmt="s--", label="another set")}


def line(axis, rows: list, x: str, **style) -> None:
    """Mean and 95% interval of the rows over their column x."""
    rows = sorted(rows, key=lambda row: row[x])
    mean = np.array([row["mean"] for row in rows])
    bars = np.abs([[row["low"] for row in rows], [row["high"] for row in rows]] - mean)
    axis.errorbar([row[x] for row in rows], mean, bars, capsize=3, ms=4, **style)


def select(rows: list, **values) -> list:
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def draw_depth(axis, rows: list) -> None:
    for data_seed, style in DATA_SET.items():
        if found := select(rows, data_seed=data_seed):
            line(axis, found, "depth", color="C1", **style)
    depths = sorted({row["depth"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(depths, depths)
    axis.set(xlabel="depth")
    if len({row["data_seed"] for row in rows}) > 1:
        axis.legend(frameon=False, fontsize=7)


def draw_size(axis, rows: list, steps: int, width: int, depth: int) -> None:
    """Deeper, wider or longer: over the number of weights."""
    line(axis, select(rows, gradient_steps=steps, width=width), "thousands", color="C1", fmt="o-", label="deeper")
    line(axis, select(rows, gradient_steps=steps, depth=depth), "thousands", color="C0", fmt="o-", label="wider")
    longer = [row for row in rows if row["gradient_steps"] != steps]
    line(axis, longer, "thousands", color="0.5", fmt="D", label="trained longer")
    axis.set_xscale("log")
    ticks = sorted({round(row["thousands"]) for row in rows if row["depth"] > depth or row["width"] != 2 * width})
    axis.set_xticks(ticks, [f"{tick}k" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="weights of both encoders")
    axis.legend(frameon=False, fontsize=7)


def draw_map(axis, run) -> None:
    """The critic's values for the last cell, in its own colours, and the walls."""
    saved = np.load(run.folder / "critic_map.npz")
    x, y, walls = saved["x"], saved["y"], saved["walls"]
    cell = x[-1] / (walls.shape[0] - 1)
    values = np.ma.array(saved["values"][-1], mask=walls[np.ix_(*(np.round(a / cell).astype(int) for a in (x, y)))])
    axis.pcolormesh(y, x, values, shading="nearest", cmap="viridis", rasterized=True)
    axis.plot(*saved["goals"][-1][::-1], "*", color="red", ms=10)
    axis.set(aspect="equal", xticks=[], yticks=[])
    axis.set_title(f"critic of depth {run.args['depth']}: near (yellow), far", fontsize=9)
    axis.invert_yaxis()
    axis.set_frame_on(False)
    axis.grid(False)


def draw(runs, out) -> None:
    runs = [run for run in runs if (run.folder / "summary.json").exists()]
    if not runs:
        raise SystemExit("error: none of these runs is finished")
    rows = rows_of(runs)
    steps, width, depth = (min(row[name] for row in rows) for name in ("gradient_steps", "width", "depth"))
    usual = select(rows, gradient_steps=steps, width=width)
    figure, axes = panels(8, width=3.1, height=2.7)
    for i, tag in enumerate(TAGS):
        over_depth, over_size, second_maze = axes[4 * i : 4 * i + 3]
        draw_depth(over_depth, select(usual, maze="hardest_maze", tag=tag))
        draw_size(over_size, select(rows, maze="hardest_maze", data_seed=1, tag=tag), steps, width, depth)
        draw_depth(second_maze, select(usual, maze="big_maze", tag=tag))
        over_depth.set_ylabel(TAGS[tag])
    for axis, title in zip(axes, ("hardest maze, deeper", "hardest maze, by size", "big maze, deeper")):
        axis.set_title(title)
    maps = [run for run in runs if run.args["maze"] == "hardest_maze" and run.args["data_seed"] == 1]
    maps = [run for run in maps if (run.args["width"], run.args["gradient_steps"]) == (width, steps)]
    if not maps:
        raise SystemExit("error: no run has the critic's map in the hardest maze, at the smallest width")
    maps.sort(key=lambda run: (run.args["seed"], run.args["depth"]))
    maps = [run for run in maps if run.args["seed"] == maps[0].args["seed"]]
    draw_map(axes[3], maps[0])
    draw_map(axes[7], maps[-1])
    arms = group(runs, lambda run: tuple(run.args[name] for name in FIELDS)).values()
    save(figure, rows, out, f"Bars: {INTERVALS}; here {seeds_text(arms)}. Maps: seed "
         f"{maps[0].args['seed']}, star: the goal, each in its own colours.")  # fmt: skip


if __name__ == "__main__":
    draw(*asked(__doc__))
