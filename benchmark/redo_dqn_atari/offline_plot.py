"""Draws Figs. 4 and 8 of Sokar et al. from the runs of studies/redo_offline.py under runs/, offline.

    python benchmark/redo_dqn_atari/offline_plot.py --runs "redo_fig8-small-*" --out runs/figures/fig8

Dormant neurons and loss over gradient steps, mean and 95% bootstrap band over seeds; and dormant neurons by the kind of
states they are measured on, at the beginning and at the end: a PNG with the CSV behind it. A run's arm is the end of
its --exp-name.
"""

import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plotting import INTERVALS, aligned, arm, asked, group, mean_and_band, panels, save, seeds_text

DORMANT, LOSS, BY_STATES = "dormant_ratio_tau0/all", "losses/td", "dormant_by_states_tau0/"
STATES = ("oldest", "replay", "newest", "noise")
# An arm's name and colour: what the paper says suffers (bootstrapped targets, the old network) blue
ARMS = {
    "bootstrapped": ("bootstrapped targets", "C0"), "random": ("fixed random targets", "C1"),
    "monte-carlo": ("Monte-Carlo returns", "C2"), "old": ("old network", "C0"), "new": ("new network", "C1"),
    "old-adam": ("old network, its Adam", "C2"), "old-rr0.25": ("old network, replay ratio 0.25", "C4"),
}  # fmt: skip
# The paper's numbers at its end: (game, tag) -> arm -> number
PAPER = {
    ("DemonAttack", DORMANT): {"bootstrapped": 0.34, "random": 0.25, "old": 0.98, "new": 0.48},
    ("DemonAttack", LOSS): {"old": 0.7, "new": 0.1}, ("Asterix", DORMANT): {"bootstrapped": 0.54, "random": 0.20},
}  # fmt: skip


def style(name: str, arms) -> tuple:
    """An arm's label and colour."""
    return ARMS.get(name, (name, f"C{3 + list(arms).index(name)}"))


def draw_curves(axis, arms, tag, game) -> list:
    """One tag over gradient steps, a line per arm -> rows of the CSV."""
    rows = []
    for name, runs in arms.items():
        label, color = style(name, arms)
        steps, values = aligned(runs, tag)
        mean, low, high = mean_and_band(values)
        axis.plot(steps / 1000, mean, color=color, label=label)
        axis.fill_between(steps / 1000, low, high, color=color, alpha=0.2, linewidth=0)
        paper = PAPER.get((game, tag), {}).get(name)
        if paper is not None:
            axis.plot(1.02, paper, "*", color=color, ms=9, transform=axis.get_yaxis_transform(), clip_on=False)
        for step, m, lo, hi in zip(steps, mean, low, high):
            rows.append(dict(arm=name, tag=tag, seeds=len(runs), gradient_steps=int(step), mean=m, low=lo, high=hi,
                             paper=paper))  # fmt: skip
    axis.set_xlabel("thousand gradient steps")
    return rows


def draw_states(axis, arms) -> list:
    """Dormant neurons at the first measurement (light) and the last, a group of bars per kind of states -> rows."""
    rows, width = [], 0.8 / len(arms)
    for i, (name, runs) in enumerate(arms.items()):
        for j, states in enumerate(STATES):
            steps, values = aligned(runs, BY_STATES + states)
            place = j + (i - (len(arms) - 1) / 2) * width
            for point, alpha in ((0, 0.35), (-1, 1.0)):
                mean, low, high = (x[0] for x in mean_and_band(values[:, [point]]))
                offset = (-0.22 if point == 0 else 0.22) * width
                axis.bar(place + offset, mean, 0.44 * width, color=style(name, arms)[1], alpha=alpha)
                axis.errorbar(place + offset, mean, [[mean - low], [high - mean]], color="0.3", linewidth=0.8)
                rows.append(dict(arm=name, tag=BY_STATES + states, seeds=len(runs), gradient_steps=int(steps[point]),
                                 mean=mean, low=low, high=high, paper=None))  # fmt: skip
    axis.set_xticks(np.arange(len(STATES)), STATES)
    axis.set(
        xlabel="states measured on",
        ylabel="dormant neurons (tau = 0)",
        title="by input distribution; light: at the start",
    )
    return rows


def draw(runs, out) -> None:
    arms = group(runs, arm)
    games = set(re.findall(r"ALE-(\w+)-v5", " ".join(run.args["replay"] for run in runs)))
    smoke = any("-smoke-" in run.args["exp_name"] for run in runs)
    game = games.pop() if len(games) == 1 and not smoke else None  # whose stars are drawn
    figure, axes = panels(3, width=4.0, height=3.0, columns=3)
    rows = draw_curves(axes[0], arms, DORMANT, game)
    axes[0].set(ylabel="dormant neurons (tau = 0)", title=seeds_text(arms.values()))
    axes[0].set_ylim(bottom=0)
    rows += draw_curves(axes[1], arms, LOSS, game)
    axes[1].set(ylabel="loss", yscale="log")
    axes[1].legend(frameon=False, fontsize=7)
    rows += draw_states(axes[2], arms)
    note = f"Bands and bars: {INTERVALS}."
    stars = any(row["paper"] is not None for row in rows)
    tau = " (its tau is not said)" if "old" in arms else ""  # Fig. 8
    save(figure, rows, out, note + f" Stars: the paper at its end, {game}{tau}." * stars)


if __name__ == "__main__":
    draw(*asked(__doc__))
