"""Draws Fig. 3 of Sokar et al. from the runs of studies/redo_supervised.py under runs/, offline.

    python benchmark/plot_redo_supervised.py --runs "redo_supervised-paper-*" --out runs/figures/redo_supervised

Dormant neurons and training accuracy over epochs, mean and 95% bootstrap band over seeds: a PNG with the CSV behind it.
"""

import argparse
import json

from plotting import aligned, group, load_runs, mean_and_band, panels, save, seeds_text

DORMANT, ACCURACY, RECYCLED = "plasticity/dormant_ratio_tau0/all", "charts/accuracy", "plasticity/redo_recycled/all"
ARMS = {
    "fixed": ("fixed labels", "0.5"),
    "shuffled": ("permuted labels", "C0"),
    "redo": ("permuted labels, ReDo", "C1"),
}
# The paper's dormant neurons by epoch, read from its figure: at the beginning, after each permutation, at the end
PAPER = {"fixed": {0: 0.09, 100: 0.007}, "shuffled": {20: 0.29, 40: 0.41, 60: 0.39, 80: 0.44, 100: 0.32}}
LABELS = {DORMANT: "dormant neurons (tau = 0)", ACCURACY: "training accuracy"}


def arm(run) -> str:
    """redo_supervised-paper-shuffled -> shuffled."""
    return run.args["exp_name"].split("-", 2)[2]


def draw(runs, out) -> None:
    arms = group(runs, arm)
    data = sorted({json.loads((run.folder / "args.json").read_text())["data"] for run in runs})
    epochs = max(run.args["epochs"] for run in runs)
    permutations = {
        e for run in runs for e in range(0, epochs, run.args["shuffle_every_epochs"]) if arm(run) != "fixed"
    }
    smoke = any("-smoke-" in run.args["exp_name"] for run in runs)
    figure, axes = panels(2, width=4.2, height=3.2)
    rows = []
    for axis, tag in zip(axes, (DORMANT, ACCURACY)):
        for name in [name for name in ARMS if name in arms]:
            label, color = ARMS[name]
            steps, values = aligned(arms[name], tag)
            mean, low, high = mean_and_band(values)
            axis.plot(steps, mean, color=color, label=label)
            axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
            paper = PAPER.get(name, {}) if tag == DORMANT and not smoke else {}
            axis.plot(
                list(paper), list(paper.values()), "*", color=color, ms=9, markeredgecolor="k", markeredgewidth=0.5
            )
            rows += [
                dict(data="+".join(data), arm=name, tag=tag, seeds=len(arms[name]), epoch=int(epoch), mean=m, low=lo,
                     high=hi, paper=paper.get(int(epoch)))
                for epoch, m, lo, hi in zip(steps, mean, low, high)
            ]  # fmt: skip
        for epoch in sorted(permutations - {0}):
            axis.axvline(epoch, color="k", linestyle=":", linewidth=0.8)
        axis.set(title=f"{' and '.join(data)}, {seeds_text(arms.values())}", xlabel="epoch", ylabel=LABELS[tag])
        axis.set_ylim(bottom=0)
        if smoke:
            text = dict(ha="center", va="center", rotation=20, color="red", alpha=0.6, transform=axis.transAxes)
            axis.text(0.5, 0.5, "smoke: checks the plumbing, no result", **text)
    axes[1].legend(frameon=False, fontsize=7)
    note = "Dotted: all labels are permuted among the images." + " Bands: 95% bootstrap intervals over seeds."
    save(figure, rows, out, note + (" Stars: the paper (CIFAR-10, 3 seeds)." if not smoke else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="a shell pattern of --exp-name")
    parser.add_argument("--out", required=True, help="path of the picture and its CSV, without ending")
    parser.add_argument("--folder", default="runs", help="the folder of the runs")
    arguments = parser.parse_args()
    draw(load_runs(arguments.runs, arguments.folder), arguments.out)


if __name__ == "__main__":
    main()
