"""Draws the figures of redo_dqn_atari.py from the runs under runs/, offline.

    python benchmark/redo_dqn_atari/plot.py fig1 --runs "redo_fig1-smoke-*" --out runs/figures/fig1

FIGURE is fig1, fig2, fig5, fig6, fig7, fig7_cpu, fig9, fig10a, fig10b, fig10c, fig11, fig12, fig13, fig15, fig16,
fig21, fig22, fig24, table7, adam, cpu, exploration, sac_fig14, sac_fig19, sac_table6, sac_priming, drq_fig10d,
drq_fig17 or drq_table. Each is written as PNG with the CSV behind it. Returns are those
of evaluations; aggregates are interquartile means (IQM) of human-normalised scores over runs x games, with 95%
stratified bootstrap intervals; other bands are 95% bootstrap intervals over seeds. Stars are the paper's numbers, where
it ends. A run's line is named by the end of its --exp-name.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plotting import (
    INTERVALS,
    aligned,
    aligned_tasks,
    arm,
    colours,
    comparable,
    group,
    iqm,
    load_runs,
    mean_and_band,
    panels,
    save,
    seeds_of,
    seeds_text,
    stratified_bootstrap,
)

RETURN, RANK = "eval/episodic_return", "feature_rank/dense"
TD_LOSS, Q_CHANGE, ALIVE = "losses/td", "events/redo_q_change", "events/alive"
DORMANT = "dormant_ratio_tau{}/all"
DORMANT_ACTOR, DORMANT_CRITIC = "dormant_ratio_tau0/actor", "dormant_ratio_tau0/critics"
STARS = "Stars: the paper, at its end (aggregates: over all its games)."
ARMS = {"least": "least active", "most": "most active", "cbp": "least useful (CBP)", "redo": "ReDo", "sac": "SAC",
        "dqn": "DQN", "drq": "DrQ(eps)",
        "reset": "resets", "weight-decay": "weight decay"}  # fmt: skip
LABELS = {RETURN: "return", RANK: "feature rank, dense", TD_LOSS: "TD loss", ALIVE: "neurons not pruned",
          Q_CHANGE: "q-change by recycling"}  # fmt: skip
PREFIXES = {"dormant_ratio_tau": "dormant neurons, tau ", "overlap_": "overlap, "}

# Scores of a random policy and of a human; first the paper's 17 games
HUMAN_NORMALISATION = {
    "Asterix": (210.0, 8503.3), "BeamRider": (363.9, 16926.5), "Breakout": (1.7, 30.5), "DemonAttack": (152.1, 1971.0),
    "DoubleDunk": (-18.6, -16.4), "Enduro": (0, 860.5), "IceHockey": (-11.2, 0.9), "Jamesbond": (29.0, 302.8),
    "MsPacman": (307.3, 6951.6), "Pong": (-20.7, 14.6), "Qbert": (163.9, 13455.0), "RoadRunner": (11.5, 7845.0),
    "Seaquest": (68.4, 42054.7), "SpaceInvaders": (148.0, 1668.7), "WizardOfWor": (563.5, 4756.5),
    "YarsRevenge": (3092.9, 54576.9), "Zaxxon": (32.5, 9173.3),
    # Further ones of Atari 100k, and of Ma et al.
    "Alien": (227.8, 7127.7), "Amidar": (5.8, 1719.5), "Assault": (222.4, 742.0), "BankHeist": (14.2, 753.1),
    "BattleZone": (2360.0, 37187.5), "Boxing": (0.1, 12.1), "ChopperCommand": (811.0, 7387.8),
    "CrazyClimber": (10780.5, 35829.4), "Freeway": (0.0, 29.6), "Frostbite": (65.2, 4334.7), "Gopher": (257.6, 2412.5),
    "Hero": (1027.0, 30826.4), "Kangaroo": (52.0, 3035.0), "Krull": (1598.0, 2665.5),
    "KungFuMaster": (258.5, 22736.3), "PrivateEye": (24.9, 69571.3), "UpNDown": (533.4, 11693.2),
}  # fmt: skip

# The paper's numbers at the end of its runs, read from its figures
PAPER_FIG1 = {"dqn": 0.30, "redo": 0.625, "reset": 0.325, "weight-decay": 0.415}
PAPER_FIG2 = {"ALE/DemonAttack-v5": {"dqn": 0.26}, "ALE/Asterix-v5": {"dqn": 0.30}}
PAPER_FIG5 = {"ALE/DemonAttack-v5": {"dqn": 0.68}, "ALE/Asterix-v5": {"dqn": 0.795}}
PAPER_FIG6 = {"ALE/DemonAttack-v5": {"dqn": 3650, "prune": 3950}, "ALE/Asterix-v5": {"dqn": 4330, "prune": 4640}}
PAPER_FIG7 = (dict(zip(("rr0.25", "rr0.5", "rr1", "rr2"), (0.09, 0.23, 0.38, 0.48))),
              dict(zip(("rr0.25", "rr0.5", "rr1", "rr2"), (3650, 2380, 1350, 740))))  # fmt: skip
PAPER_FIG9 = {"dqn": 0.28, "redo": 0.0175}, {"dqn": 4350, "redo": 7000}
PAPER_FIG10 = {
    "fig10a": {"dqn": (0.41, 0.475, 0.30, 0.09), "redo": (0.40, 0.575, 0.625, 0.54)},
    "fig10b": {"dqn": (0.655, 0.69, 0.555, 0.345), "redo": (0.69, 0.725, 0.727, 0.565)},
    "fig10c": {"dqn": (0.79, 0.78, 0.51, 0.22), "redo": (0.83, 1.0, 0.84, 0.53)},
}
PAPER_FIG10D = {"drq": (0.61, 0.53, 0.425, 0.35), "redo": (0.635, 0.615, 0.56, 0.515)}
PAPER_FIG14 = {
    "Ant-v5": {"sac": 5000, "redo": 4900, "reset": 4080, "weight-decay": 4850},
    "HalfCheetah-v5": {"sac": 11500, "redo": 11200, "reset": 10550, "weight-decay": 10300},
}
PAPER_FIG18 = ({"Ant-v5": {"sac": 0.10}}, {"Ant-v5": {"sac": 0.17}})
PAPER_TABLE6 = {"Ant-v5": {"x0.25-sac": 2016, "x0.25-redo": 2115, "x0.5-sac": 3964, "x0.5-redo": 4472}}
PAPER_ATARI_TABLE = {"static0.5": 0.423, "static1": 0.413, "static2": 0.351, "redo": 0.423, "adaptive": 0.558}
PAPER_FIG11 = {"dqn": 0.30, "redo": 0.625}, {"dqn": 0.47, "dqn-lr4": 0.40, "redo": 0.10}
PAPER_FIG12 = (
    {"dqn": 0.30, "x2-dqn": 0.375, "x4-dqn": 0.33, "redo": 0.625, "x2-redo": 0.695, "x4-redo": 0.71},
    {"dqn": 0.47, "x2-dqn": 0.52, "x4-dqn": 0.55, "redo": 0.115, "x2-redo": 0.115, "x4-redo": 0.115},
)
PAPER_TABLE7 = {"dqn": 449.2, "redo": 470.8}
PAPER_FIG15 = {"ALE/DemonAttack-v5": {"least": 3500, "random": 500, "most": 0},
               "ALE/Asterix-v5": {"least": 2200, "random": 500, "most": 500}}  # fmt: skip
PAPER_FIG13 = {"dqn": 690, "redo": 4580, "reset": 2950, "weight-decay": 1210}


def normalised(run_returns: np.ndarray, env_id: str) -> np.ndarray:
    """Human-normalised scores: 0 a random policy, 1 a human. SystemExit for games that are not in the papers."""
    game = env_id.removeprefix("ALE/").removesuffix("-v5")
    if game not in HUMAN_NORMALISATION:
        raise SystemExit(f"error: the scores of a random policy and of a human on {game} are not known here")
    low, high = HUMAN_NORMALISATION[game]
    return (run_returns - low) / (high - low)


def label_of(tag: str) -> str:
    for start, text in PREFIXES.items():
        if tag.startswith(start):
            return text + tag.removeprefix(start).removesuffix("/all").replace("/", ", ")
    return LABELS.get(tag, tag)


def name_of(name: str) -> str:
    """An arm in words: x2-redo -> ReDo, width x 2."""
    if found := re.fullmatch(r"rr([\d.]+)", name):
        return f"replay ratio {found[1]}"
    if found := re.fullmatch(r"x([\d.]+)-(.+)", name):
        return f"{name_of(found[2])}, width x {found[1]}"
    return ARMS.get(name, name)


def draw_line(axis, x, mean, low, high, name, color, star=None) -> None:
    axis.plot(x, mean, "o" if len(x) == 1 else "-", color=color, label=name_of(name))
    axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    if star is not None:
        axis.plot(1.02, star, "*", color=color, ms=9, transform=axis.get_yaxis_transform(), clip_on=False)


def finish(axis, title, ylabel, x="million frames") -> None:
    axis.set(title=title, xlabel=x, ylabel=ylabel)
    if axis.get_xscale() == "linear":
        axis.locator_params(axis="x", nbins=4)
    axis.legend(frameon=False, fontsize=7)


def draw_curves(axis, runs, tag, paper=None, against_gradient_steps=False) -> list:
    """One tag over million frames, or over million gradient steps, a line per arm -> rows of the CSV."""
    rows, unit = [], "million frames" if runs[0].action_repeat > 1 else "million steps"
    unit = "million gradient steps" if against_gradient_steps else unit
    arms = group(runs, arm)
    for name, seeds in arms.items():
        frames, values = aligned(seeds, tag)
        if not len(frames):
            continue
        x = np.interp(frames, *seeds[0].series("charts/gradient_steps")) if against_gradient_steps else frames
        mean, low, high = mean_and_band(values)
        draw_line(axis, x / 1e6, mean, low, high, name, colours(arms)[name], (paper or {}).get(name))
        rows += [
            dict(env_id=seeds[0].args["env_id"], arm=name, tag=tag, seeds=len(values), frames=int(f), x=a, mean=m,
                 low=lo, high=hi, paper=(paper or {}).get(name))
            for f, a, m, lo, hi in zip(frames, x / 1e6, mean, low, high)
        ]  # fmt: skip
    finish(axis, f"{runs[0].args['env_id']}\n{seeds_text(arms.values(), tag)}", label_of(tag), unit)
    return rows


def scores(runs) -> tuple:
    """One arm's human-normalised evaluation scores -> frames (points,), list over games of (seeds, points)."""
    frames, games = aligned_tasks(runs, RETURN)
    return frames, [normalised(values, env_id) for env_id, values in games.items()]


def last_scores(arms: dict) -> tuple:
    """{arm: runs} -> the last frame that all runs have evaluations up to, {arm: scores there, by game (seeds, 1)}."""
    curves = {name: scores(runs) for name, runs in arms.items()}
    end = min(frames[-1] for frames, _ in curves.values())
    last = {name: (frames <= end).nonzero()[0][-1] for name, (frames, _) in curves.items()}
    return int(end), {name: [game[:, [last[name]]] for game in games] for name, (_, games) in curves.items()}


def about(runs) -> str:
    """For a caption: how many games and seeds."""
    games = len(group(runs, lambda run: run.args["env_id"]))
    seeds = seeds_text(group(runs, lambda run: (arm(run), run.args["env_id"])).values())
    return f"{games} game{'s' * (games > 1)}, {seeds}"


def note_of(rows) -> str:
    """The footnote: what of all this the picture has."""
    notes = [f"Bands: {INTERVALS}."] * any(row["seeds"] != 1 and row.get("tag", "iqm") != "iqm" for row in rows)
    notes += ["IQM and means over games: 95% stratified bootstrap intervals over runs x games."] * any(
        row.get("tag", "iqm") == "iqm" for row in rows)  # fmt: skip
    return " ".join(notes + [STARS] * any(row["paper"] is not None for row in rows))


def draw_aggregate(axis, runs, paper) -> list:
    """IQM of the human-normalised score over frames, a line per arm -> rows of the CSV."""
    runs = comparable(runs, RETURN)
    rows, arms = [], group(runs, arm)
    for name, members in arms.items():
        frames, games = scores(members)
        low, high = stratified_bootstrap(games, iqm)
        mean = iqm(games)
        draw_line(axis, frames / 1e6, mean, low, high, name, colours(arms)[name], paper.get(name))
        rows += [
            dict(env_id=f"{len(games)} games", arm=name, tag="iqm", seeds=seeds_of(games), frames=int(f), x=f / 1e6,
                 mean=m, low=lo, high=hi, paper=paper.get(name))
            for f, m, lo, hi in zip(frames, mean, low, high)
        ]  # fmt: skip
    finish(axis, about(runs), "IQM of human-normalised scores")
    return rows


def curves(runs, out, tags, papers=(), against_gradient_steps=False) -> None:
    """A row per game, a column per tag. papers: per tag, arm -> number, or game -> arm -> number."""
    games = group(runs, lambda run: run.args["env_id"])
    figure, axes = panels(len(games) * len(tags), columns=len(tags))
    rows = []
    for row, (env_id, members) in enumerate(games.items()):
        for column, tag in enumerate(tags):
            paper = papers[column] if column < len(papers) else None
            paper = paper.get(env_id, paper if len(games) == 1 else None) if paper else None
            axis = axes[row * len(tags) + column]
            rows += draw_curves(axis, members, tag, paper, against_gradient_steps)
    save(figure, rows, out, note_of(rows))


def headline(runs, out, paper, tag=None, tag_paper=None) -> None:
    """The aggregate over frames, and one tag on DemonAttack beside it."""
    figure, axes = panels(1 if tag is None else 2)
    rows = draw_aggregate(axes[0], runs, paper)
    if tag is not None:
        rows += draw_curves(axes[1], demon_attack(runs), tag, tag_paper)
    save(figure, rows, out, note_of(rows))


def by_replay_ratio(runs, out, paper, ticks=(0.25, 0.5, 1, 2)) -> None:
    """Fig. 10: the final IQM over the replay ratio, a line per method. paper: method -> its IQM at the ticks."""
    figure, (axis,) = panels(1, width=4.2)
    runs = comparable(runs, RETURN)
    end, last = last_scores(group(runs, lambda run: (run.args["method"], run.args["replay_ratio"])))
    rows = []
    for (method, ratio), games in last.items():
        low, high = stratified_bootstrap(games, iqm)
        known = dict(zip(ticks, paper[method])).get(ratio)
        rows.append(dict(method=method, replay_ratio=ratio, games=len(games), seeds=seeds_of(games), frames=end,
                         iqm=iqm(games)[0], low=low[0], high=high[0], paper=known))  # fmt: skip
    methods = dict.fromkeys(row["method"] for row in rows)
    for method in methods:
        color = colours(methods)[method]
        line = [row for row in rows if row["method"] == method]
        ratios, mean, low, high = ([row[key] for row in line] for key in ("replay_ratio", "iqm", "low", "high"))
        axis.plot(ratios, mean, "o-", color=color, label=ARMS.get(method, method))
        axis.fill_between(ratios, low, high, color=color, alpha=0.2, linewidth=0)
        axis.plot(ticks, paper[method], "*", color=color, ms=9)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    finish(axis, f"{about(runs)}, at {end:,} frames", "IQM of human-normalised scores", "replay ratio")
    save(figure, rows, out, note_of(rows))


def final_scores(runs, out, paper) -> None:
    """The mean human-normalised score over the games at the end, a bar per arm."""
    figure, (axis,) = panels(1, width=4.2)
    runs = comparable(runs, RETURN)
    end, last = last_scores(group(runs, arm))
    rows = []
    for i, (name, games) in enumerate(last.items()):
        mean = np.mean([game.mean() for game in games])
        low, high = stratified_bootstrap(games, lambda games: np.mean([game.mean(0) for game in games], axis=0))
        axis.bar(i, mean, color=colours(last)[name])
        axis.errorbar(i, mean, [[mean - low[0]], [high[0] - mean]], color="0.3")
        axis.plot(i, paper[name], "k*", ms=9)
        median = np.median([game.mean() for game in games])
        rows.append(dict(arm=name, games=len(games), seeds=seeds_of(games), frames=end, median=median, mean=mean,
                         low=low[0], high=high[0], paper=paper[name]))  # fmt: skip
    axis.set_xticks(range(len(last)), [ARMS.get(name, name) for name in last])
    axis.set(title=f"{about(runs)}, at {end:,} frames", ylabel="mean human-normalised score")
    save(figure, rows, out, note_of(rows))


def demon_attack(runs) -> list:
    """The runs on the paper's example. SystemExit where there is none."""
    runs = [run for run in runs if run.args["env_id"] == "ALE/DemonAttack-v5"]
    if not runs:
        raise SystemExit("error: none of these runs plays DemonAttack, which this figure shows")
    return runs


FIGURES = {
    "fig1": lambda runs, out: headline(runs, out, PAPER_FIG1),
    "fig2": lambda runs, out: curves(runs, out, [DORMANT.format(0)], [PAPER_FIG2], True),
    "fig5": lambda runs, out: curves(runs, out, ["overlap_previous/dense"], [PAPER_FIG5], True),
    "fig6": lambda runs, out: curves(runs, out, [RETURN, ALIVE], [PAPER_FIG6]),
    "fig7": lambda runs, out: curves(demon_attack(runs), out, [DORMANT.format(0), RETURN], PAPER_FIG7),
    "fig7_cpu": lambda runs, out: curves(runs, out, [DORMANT.format(0), DORMANT.format(0.1), RETURN]),
    "fig9": lambda runs, out: curves(runs, out, [DORMANT.format(0.025), RETURN], PAPER_FIG9),
    "fig10a": lambda runs, out: by_replay_ratio(runs, out, PAPER_FIG10["fig10a"]),
    "fig10b": lambda runs, out: by_replay_ratio(runs, out, PAPER_FIG10["fig10b"]),
    "fig10c": lambda runs, out: by_replay_ratio(runs, out, PAPER_FIG10["fig10c"]),
    "fig11": lambda runs, out: headline(runs, out, PAPER_FIG11[0], DORMANT.format(0.1), PAPER_FIG11[1]),
    "fig12": lambda runs, out: headline(runs, out, PAPER_FIG12[0], DORMANT.format(0.1), PAPER_FIG12[1]),
    "fig13": lambda runs, out: headline(runs, out, PAPER_FIG1, RETURN, PAPER_FIG13),
    "fig15": lambda runs, out: curves(
        runs, out, [TD_LOSS, Q_CHANGE, DORMANT.format(0.1), RETURN], [0, 0, 0, PAPER_FIG15]
    ),
    "fig16": lambda runs, out: curves(runs, out, [DORMANT.format(0), RETURN]),
    "fig21": lambda runs, out: curves(runs, out, [DORMANT.format(0.025), DORMANT.format(0.1)]),
    "fig22": lambda runs, out: curves(runs, out, [TD_LOSS, Q_CHANGE, DORMANT.format(0.1), RETURN]),
    "fig24": lambda runs, out: curves(runs, out, [DORMANT.format(0.1)]),
    "table7": lambda runs, out: curves(
        [run for run in demon_attack(runs) if arm(run) in PAPER_TABLE7], out, [RANK], [PAPER_TABLE7]
    ),
    "adam": lambda runs, out: curves(runs, out, [DORMANT.format(0.1), DORMANT.format(0), RETURN]),
    "cpu": lambda runs, out: curves(runs, out, [DORMANT.format(0), DORMANT.format(0.1), RANK, RETURN]),
    "sac_fig14": lambda runs, out: curves(
        runs, out, [RETURN, DORMANT_ACTOR, DORMANT_CRITIC], [PAPER_FIG14, *PAPER_FIG18]
    ),
    "sac_fig19": lambda runs, out: curves(runs, out, [RETURN, DORMANT_ACTOR, DORMANT_CRITIC]),
    "sac_table6": lambda runs, out: curves(runs, out, [RETURN, DORMANT_ACTOR, DORMANT_CRITIC], [PAPER_TABLE6]),
    "sac_priming": lambda runs, out: curves(runs, out, [RETURN, DORMANT_ACTOR, DORMANT_CRITIC]),
    "drq_fig10d": lambda runs, out: by_replay_ratio(runs, out, PAPER_FIG10D, (1, 2, 4, 8)),
    "drq_fig17": lambda runs, out: curves(runs, out, [DORMANT.format(0), DORMANT.format(0.1), RETURN]),
    "drq_table": lambda runs, out: final_scores(runs, out, PAPER_ATARI_TABLE),
    "exploration": lambda runs, out: curves(runs, out, [DORMANT.format(0), DORMANT.format(0.1), RETURN]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("--runs", required=True, nargs="+", help="shell patterns of --exp-name")
    parser.add_argument("--out", required=True, help="path of the picture and its CSV, without ending")
    parser.add_argument("--folder", default="runs", help="the folder of the runs")
    arguments = parser.parse_args()
    FIGURES[arguments.figure](load_runs(*arguments.runs, folder=arguments.folder), arguments.out)


if __name__ == "__main__":
    main()
