"""Draws Fig. 3 of Sokar et al. from the runs of studies/redo_supervised.py under runs/, offline.

    python benchmark/redo_dqn_atari/supervised_plot.py --runs "redo_supervised-paper-*" --out runs/figures/fig3

Dormant neurons and training accuracy over epochs, mean and 95% bootstrap band over seeds: a PNG with the CSV behind it.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plotting import INTERVALS, aligned, arm, asked, group, mean_and_band, panels, save, seeds_text

DORMANT, ACCURACY = "dormant_ratio_tau0/all", "charts/accuracy"
LABELS = {DORMANT: "dormant neurons (tau = 0)", ACCURACY: "training accuracy"}
# A row of panels for either way to shuffle: its title, and its arms with their names and colours
FIXED, CHANGING, REDO = ("fixed labels", "0.5"), ("permuted", "C0"), ("permuted, ReDo", "C1")
ROWS = {
    "labels permuted among the images": {"fixed": FIXED, "shuffled": CHANGING, "shuffled-redo": REDO},
    "labels permuted among the classes": {"fixed": FIXED, "relabelled": CHANGING, "relabelled-redo": REDO},
}
# The paper's dormant neurons by epoch, read from its figure: at the beginning, after each change, at the end
PAPER_SHUFFLED = {20: 0.29, 40: 0.41, 60: 0.39, 80: 0.44, 100: 0.32}
PAPER = {"fixed": {0: 0.09, 100: 0.007}, "shuffled": PAPER_SHUFFLED, "relabelled": PAPER_SHUFFLED}


def draw_panel(axis, arms, names, tag, smoke) -> list:
    """One tag over epochs, a line per arm -> rows of the CSV."""
    rows = []
    for name in [name for name in names if name in arms]:
        label, color = names[name]
        epochs, values = aligned(arms[name], tag)
        mean, low, high = mean_and_band(values)
        axis.plot(epochs, mean, color=color, label=f"{label} ({seeds_text([arms[name]])})")
        axis.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
        paper = PAPER.get(name, {}) if tag == DORMANT and not smoke else {}
        axis.plot(list(paper), list(paper.values()), "*", color=color, ms=9, markeredgecolor="k", markeredgewidth=0.5)
        for epoch, m, lo, hi in zip(epochs, mean, low, high):
            rows.append(dict(arm=name, tag=tag, seeds=len(arms[name]), epoch=int(epoch), mean=m, low=lo, high=hi,
                             paper=paper.get(int(epoch))))  # fmt: skip
    changing = [run.args for runs in arms.values() for run in runs if run.args["targets"] != "fixed"]
    for epoch in {epoch for args in changing for epoch in range(0, args["epochs"], args["shuffle_every_epochs"])} - {0}:
        axis.axvline(epoch, color="k", linestyle=":", linewidth=0.8)
    axis.set(xlabel="epoch", ylabel=LABELS[tag])
    axis.set_ylim(bottom=0)
    return rows


def draw(runs, out) -> None:
    arms = group(runs, arm)
    data = " and ".join(sorted({json.loads((run.folder / "args.json").read_text())["data"] for run in runs}))
    smoke = any("-smoke-" in run.args["exp_name"] for run in runs)
    figure, axes = panels(4, width=4.2, height=3.2, columns=2)
    rows = []
    for i, (title, names) in enumerate(ROWS.items()):
        for axis, tag in zip(axes[2 * i :], LABELS):
            rows += [dict(data=data, shuffled=title) | row for row in draw_panel(axis, arms, names, tag, smoke)]
            axis.set_title(f"{data}: {title}", fontsize=9)
        axes[2 * i + 1].legend(frameon=False, fontsize=7)
    note = f"Dotted: the labels change. Bands: {INTERVALS}."
    save(figure, rows, out, note + (" Stars: the paper (CIFAR-10, 3 seeds), in both rows." if not smoke else ""))


if __name__ == "__main__":
    draw(*asked(__doc__))
