"""Draws the figures of crl_deep.py from the runs under runs/, offline.

    python benchmark/crl_deep/plot.py fig1 --runs "fig1-smoke-*" --out runs/figures/fig1

FIGURE is quickstart, point, fig1, fig4, fig5, fig6, fig7, fig8, fig9, fig10, fig11, fig12, baselines, fig13, fig16,
fig17 or table2. Each is written as PNG with the CSV behind it. Scores are the paper's: steps per episode at the goal,
mean of the last five evaluations (fig1, fig8, fig11, baselines: single ones). Bands: 95% bootstrap intervals of seeds.
Stars are the paper's numbers, at its own number of steps and on Brax's physics, which is not the one simulated here;
the arm panels of the paper are omitted. What quickstart, fig9, fig10 and fig17 show is computed from the run's
checkpoint.pt: its last evaluation is played again.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plotting import INTERVALS, aligned, group, load_module, load_runs, logged, mean_and_band, panels, save, seeds_text

looks = load_module("crl_deep/looks.py")

SCORE = "eval/time_at_goal_last5"
BANDS = f"Bands: {INTERVALS}."
STARS = " Stars: the paper's numbers (Brax physics, its own steps). Its arm panels are omitted."
CUT = " Some runs ended earlier: the CSV has each point's steps."

# The paper's final time at goal, by environment and depth (Table 1 for 4 and 64, read from Fig. 1 between).
PAPER_FIG1 = {
    "ant_u4_maze": {4: 11.4, 8: 110, 16: 140, 32: 250, 64: 286},
    "ant_u5_maze": {4: 0.97, 64: 61},
    "ant_big_maze": {4: 61, 8: 320, 16: 430, 32: 440, 64: 441},
    "ant_hardest_maze": {4: 215, 8: 300, 16: 390, 32: 395, 64: 387},
    "humanoid": {4: 12.6, 8: 130, 16: 500, 32: 650, 64: 649},
    "humanoid_u_maze": {4: 3.2, 64: 159},
    "humanoid_big_maze": {4: 0.06, 64: 59},
}
PAPER_FIG4 = {  # width at depth 4, and depth at width 256; humanoid at 200M steps, ant_big_maze at 100M
    "humanoid": {"width": {256: 140, 512: 25, 1024: 85, 2048: 165}, "depth": {8: 580, 32: 775}},
    "ant_big_maze": {"width": {256: 60, 512: 275, 2048: 220}, "depth": {8: 325, 32: 445}},
}
PAPER_FIG6 = {  # (critic depth, actor depth) in rows 4 to 64 and columns 4 to 64
    "humanoid": [[13, 18, 22, 21, 21], [15, 80, 303, 263, 311], [14, 48, 454, 612, 432], [28, 622, 665, 636, 583],
                 [32, 462, 675, 583, 680]],
    "ant_big_maze": [[61, 147, 202, 349, 276], [18, 320, 350, 436, 170], [58, 316, 424, 504, 427],
                     [145, 325, 385, 439, 437], [45, 239, 462, 480, 441]],
}  # fmt: skip
PAPER_FIG7 = {  # humanoid: batch size by depth
    8: {512: 130, 1024: 260},
    16: {256: 30, 512: 510, 1024: 550, 2048: 550},
    64: {128: 30, 256: 300, 512: 695, 1024: 695, 2048: 695},
}
PAPER_FIG11 = {4: 171, 16: 240, 64: 357}
PAPER_FIG12 = {
    "humanoid_u_maze": {4: 3, 64: 33, 256: 62, 1024: 97},
    "humanoid_big_maze": {4: 0.1, 256: 6.2, 512: 4.8},
}


METHODS = {"crl": "contrastive RL", "gcbc": "GCBC", "gcsl": "GCSL", "sac": "SAC", "sac-her": "SAC + HER"}
PALETTE = {"contrastive RL": "C1", "SAC + HER": "C0", "GCBC": "C2", "GCSL": "C3", "SAC": "C4",
           "depth": "C1", "width": "C0", "residual": "C1", "no residual": "C0", "actor depth capped": "C1",
           "swish": "C1", "relu": "C0", "no LayerNorm, swish": "C2", "no LayerNorm, relu": "C3"}  # fmt: skip


def depth_of(run) -> int:
    return run.args["critic_depth" if "critic_depth" in run.args else "depth"]  # baselines have one depth


def note_of(rows) -> str:
    cut = len({(row["env_id"], row["step"]) for row in rows}) > len({row["env_id"] for row in rows})
    return BANDS + STARS * any(row["paper"] is not None for row in rows) + CUT * (cut and "x" in rows[0])


def method_of(run) -> str:
    return METHODS[run.args.get("method", "crl")]


def final(runs, tag=SCORE) -> tuple:
    """Mean, low and high over seeds of a tag's value where the shortest run ends, and these steps."""
    steps, values = aligned(logged(runs, tag), tag)
    return *(float(x[-1]) for x in mean_and_band(values)), steps[-1]


def curves(runs, out, paper=None, tag="eval/time_at_goal", label="steps at the goal", series=depth_of) -> None:
    """Figs. 1 and 11: a panel per environment, a curve per depth (or method), the paper's end points as stars."""
    environments = group(runs, lambda run: run.args["env_id"])
    figure, axes = panels(len(environments))
    rows = []
    for axis, (env_id, env_runs) in zip(axes, environments.items()):
        members = group(env_runs, series)
        for i, (name, seeds) in enumerate(members.items()):
            steps, values = aligned(logged(seeds, tag), tag)
            mean, low, high = mean_and_band(values)
            color = PALETTE.get(name, plt.cm.viridis(0.9 * i / max(len(members) - 1, 1)))
            axis.plot(steps / 1e6, mean, color=color, label=name if name in PALETTE else f"depth {name}")
            axis.fill_between(steps / 1e6, low, high, color=color, alpha=0.2, linewidth=0)
            known = (paper or {}).get(env_id, {}).get(name)
            if known is not None:
                axis.plot(1.02, known, "*", color=color, ms=9, transform=axis.get_yaxis_transform(), clip_on=False)
            rows += [
                dict(env_id=env_id, series=name, seeds=len(values), step=int(s), mean=m, low=lo, high=hi, paper=known)
                for s, m, lo, hi in zip(steps, mean, low, high)
            ]
        axis.set(
            title=f"{env_id}\n{seeds_text(members.values(), tag)}", xlabel="million environment steps", ylabel=label
        )
        axis.legend(frameon=False, fontsize=7)
    save(figure, rows, out, note_of(rows))


def methods(runs, out) -> None:
    """A curve per method. SystemExit where runs of several depths would be averaged."""
    depths = sorted({depth_of(run) for run in runs})
    if len(depths) > 1:
        raise SystemExit(f"error: --runs matches runs of depth {', '.join(map(str, depths))}; this draws those of one")
    curves(runs, out, series=method_of)


def collectors(runs, out) -> None:
    """Fig. 8: a panel per environment and depth of the collector, a curve for it and for each learner."""
    panes = group(runs, lambda run: (run.args["env_id"], run.args["collector_depth"]))
    figure, axes = panels(len(panes))
    rows = []
    for axis, ((env_id, depth), seeds) in zip(axes, panes.items()):
        for name, color in (("collector", "0.6"), ("shallow", "C0"), ("deep", "C1")):
            steps, values = aligned(seeds, f"eval/time_at_goal/{name}")
            mean, low, high = mean_and_band(values)
            label = name if name == "collector" else f"{name} learner, depth {seeds[0].args[name]}"
            axis.plot(steps / 1e6, mean, color=color, label=label)
            axis.fill_between(steps / 1e6, low, high, color=color, alpha=0.2, linewidth=0)
            rows += [
                dict(env_id=env_id, collector_depth=depth, agent=name, seeds=len(values), step=int(s), mean=m, low=lo,
                     high=hi)
                for s, m, lo, hi in zip(steps, mean, low, high)
            ]  # fmt: skip
        title = f"{env_id}, {seeds_text([seeds], 'eval/time_at_goal/deep')}\ncollector of depth {depth}"
        axis.set(title=title, xlabel="million environment steps", ylabel="steps at the goal")
        axis.legend(frameon=False, fontsize=7)
    save(figure, rows, out, BANDS)


def finals(runs, out, x, series, xlabel, paper=None) -> None:
    """Final score over x(run), a line per series(run), a panel per environment. paper: env -> series -> {x: score}."""
    environments = group(runs, lambda run: run.args["env_id"])
    figure, axes = panels(len(environments))
    rows = []
    for axis, (env_id, env_runs) in zip(axes, environments.items()):
        lines = group(env_runs, series)
        for i, (name, members) in enumerate(lines.items()):
            points = group(members, x)
            scores = np.array([final(seeds)[:3] for seeds in points.values()])
            steps = [final(seeds)[3] for seeds in points.values()]
            color = PALETTE.get(name, plt.cm.viridis(0.9 * i / max(len(lines) - 1, 1)))
            axis.plot(list(points), scores[:, 0], "o-", color=color, label=name if name in PALETTE else f"depth {name}")
            axis.errorbar(list(points), scores[:, 0], abs(scores[:, 1:] - scores[:, :1]).T, color=color, alpha=0.5)
            known = (paper or {}).get(env_id, {}).get(name, {})
            axis.plot(list(known), list(known.values()), "*", color=color, ms=9)
            rows += [
                dict(env_id=env_id, series=name, x=value, seeds=len(seeds), step=int(step), mean=m, low=lo, high=hi,
                     paper=known.get(value))
                for (value, seeds), (m, lo, hi), step in zip(points.items(), scores, steps)
            ]  # fmt: skip
        axis.set_xscale("log", base=2)
        ticks = sorted({row["x"] for row in rows if row["env_id"] == env_id})
        axis.set_xticks(ticks, [f"{tick:g}" if tick < 1e4 else f"{tick / 1e6:.2g}M" for tick in ticks])
        title = f"{env_id}\n{seeds_text(group(env_runs, lambda run: run.args['exp_name']).values())}"
        axis.set(title=title, xlabel=xlabel, ylabel="final steps at the goal")
        axis.legend(frameon=False, fontsize=7)
    save(figure, rows, out, note_of(rows))


def parameters(run) -> float:
    """Parameters of the three networks' hidden layers, the paper's x axis in Fig. 4: linear in the depth, quadratic in
    the width (the paper's project page says it the other way round)."""
    width, layers = run.args["width"], run.args["actor_depth"] + 2 * run.args["critic_depth"]
    return layers * width * (width + 3)


def heatmap(runs, out) -> None:
    """Fig. 6: the final score over the actor's and the critic's depth; the paper's number in brackets."""
    environments = group(runs, lambda run: run.args["env_id"])
    figure, axes = panels(len(environments))
    rows, paper_depths = [], [4, 8, 16, 32, 64]
    for axis, (env_id, env_runs) in zip(axes, environments.items()):
        cells = group(env_runs, lambda run: (run.args["critic_depth"], run.args["actor_depth"]))
        critics, actors = (sorted({cell[i] for cell in cells}) for i in (0, 1))
        scores = np.full((len(critics), len(actors)), np.nan)
        for (critic, actor), seeds in cells.items():
            i, j = critics.index(critic), actors.index(actor)
            scores[i, j] = final(seeds)[0]
            known = None
            if env_id in PAPER_FIG6 and critic in paper_depths and actor in paper_depths:
                known = PAPER_FIG6[env_id][paper_depths.index(critic)][paper_depths.index(actor)]
            text = f"{scores[i, j]:.0f}" + (f"\n({known})" if known is not None else "")
            axis.text(j, i, text, ha="center", va="center", color="w", fontsize=8)
            rows.append(dict(env_id=env_id, critic_depth=critic, actor_depth=actor, seeds=len(seeds),
                             step=int(final(seeds)[3]), mean=scores[i, j], paper=known))  # fmt: skip
        axis.imshow(scores, origin="lower", cmap="viridis", aspect="auto", vmax=1.3 * max(np.nanmax(scores), 1))
        axis.grid(False)
        axis.set_xticks(range(len(actors)), actors)
        axis.set_yticks(range(len(critics)), critics)
        axis.set(title=f"{env_id}\n{seeds_text(cells.values())}", xlabel="actor depth", ylabel="critic depth")
    save(figure, rows, out, "In brackets: the paper's numbers (Brax physics)." * any(row["paper"] for row in rows))


def draw_value_map(axis, saved, k, paths=6) -> None:
    """The critic's values for goal k, walls, the policy's paths from the start, and the goal."""
    cell, goal = float(saved["cell"]), saved["goals"][k]
    inside = np.ones(saved["values"].shape[1:], bool)
    for i, j in np.argwhere(saved["walls"]):
        inside &= ~np.outer(abs(saved["x"] - i * cell) < cell / 2, abs(saved["y"] - j * cell) < cell / 2)
        axis.add_patch(plt.Rectangle((i * cell - cell / 2, j * cell - cell / 2), cell, cell, color="0.25", zorder=2))
    values = np.where(inside, saved["values"][k], np.nan)
    image = axis.pcolormesh(saved["x"], saved["y"], values.T, cmap="viridis", shading="nearest")
    mine = np.flatnonzero((saved["goal"] == goal).all(1))[:paths]
    for row in mine:
        path = saved["paths"][saved["alive"][:, row], row]
        axis.plot(path[:, 0], path[:, 1], color="w", lw=1, alpha=0.9, zorder=3)
        axis.plot(*path[0, :2], "o", color="w", ms=3, zorder=4)
    axis.plot(*goal[:2], "*", color="tab:red", mec="w", ms=13, zorder=5)
    axis.set(aspect="equal", xlabel="x (m)", ylabel="y (m)")
    axis.grid(False)
    plt.colorbar(image, ax=axis, fraction=0.04, label="f(s, a, g)")


def steps_from(start, walls: np.ndarray) -> np.ndarray:
    """The length of the shortest way from a cell to each other one, walls (rows, columns) -> (rows, columns); -1 where
    there is none."""
    steps, front = np.full(walls.shape, -1), [tuple(start)]
    steps[front[0]] = 0
    for i, j in front:
        for cell in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if not walls[cell] and steps[cell] < 0:
                steps[cell] = steps[i, j] + 1
                front.append(cell)
    return steps


def value_maps(runs, out) -> None:
    """Fig. 9: one panel per depth, for the goal with the longest way from the start."""
    figure, axes = panels(len(runs), 4, 3.4)
    rows = []
    for axis, run in zip(axes, sorted(runs, key=depth_of)):
        saved = looks.value_map(*looks.last_evaluation(run.folder))
        cells = np.rint(np.vstack([saved["paths"][0, :1, :2], saved["goals"][:, :2]]) / saved["cell"]).astype(int)
        k = int(np.argmax(steps_from(cells[0], saved["walls"])[tuple(cells[1:].T)]))
        draw_value_map(axis, saved, k)
        axis.set_title(f"{run.args['env_id']}, depth {depth_of(run)}")
        for i, j in np.ndindex(saved["values"].shape[1:]):
            rows.append(dict(env_id=run.args["env_id"], depth=depth_of(run), x=saved["x"][i], y=saved["y"][j],
                             value=saved["values"][k, i, j]))  # fmt: skip
    save(figure, rows, out)


def embeddings(runs, out) -> None:
    """Fig. 10: the first three principal components of phi(s, a) along an episode, coloured by time."""
    figure = plt.figure(figsize=(4 * len(runs), 3.6))
    rows = []
    for i, run in enumerate(sorted(runs, key=depth_of)):
        agent, _, record = looks.last_evaluation(run.folder)
        saved = looks.embeddings(agent, record)
        centred = saved["phi"] - saved["phi"].mean(0)
        _, scale, axes = np.linalg.svd(centred, full_matrices=False)
        points = centred @ axes[:3].T
        share = (scale[:3] ** 2).sum() / (scale**2).sum()
        axis = figure.add_subplot(1, len(runs), i + 1, projection="3d")
        axis.scatter(*points.T, c=np.arange(len(points)), cmap="plasma", s=6)
        axis.set_title(f"{run.args['env_id']}, depth {depth_of(run)}\n{100 * share:.0f}% of the variance; colour: time")
        axis.set(xlabel="component 1", ylabel="component 2", zlabel="component 3")
        rows += [
            dict(env_id=run.args["env_id"], depth=depth_of(run), step=t, pc1=p[0], pc2=p[1], pc3=p[2], distance=d)
            for t, (p, d) in enumerate(zip(points, saved["distance"]))
        ]
    save(figure, rows, out)


def residual_norms(runs, out) -> None:
    """Fig. 17: mean L2 norm of every block's residual at the end, on a batch of the trained policy's own episodes."""
    norms = {}
    for run in sorted(runs, key=depth_of):
        agent, args, _ = looks.load(run.folder)
        norms[run.args["env_id"], depth_of(run)] = looks.residual_norms(agent, looks.training_batch(agent, args))
    networks = ("actor", "state_action_encoder", "goal_encoder")
    figure, axes = panels(3)
    rows = []
    for axis, network in zip(axes, networks):
        for (env_id, depth), of_network in norms.items():
            values = of_network[network]
            axis.plot(np.arange(len(values)), values, "o-", ms=3, label=f"depth {depth}")
            rows += [
                dict(env_id=env_id, network=network, depth=depth, block=i, norm=norm) for i, norm in enumerate(values)
            ]
        axis.set(title=network, xlabel="block", ylabel="mean norm of the residual")
        axis.legend(frameon=False, fontsize=7)
    save(figure, rows, out)


def steps_to_score(runs, out) -> None:
    """Table 2: million steps until the mean over seeds is first at the goal for 200, 400, 600 of an episode's 1000
    steps, or as large a share of a shorter one; - for never."""
    thresholds = [runs[0].args["episode_length"] * share // 5 for share in (1, 2, 3)]
    runs, rows = logged(runs, SCORE), []
    for (env_id, depth, norm), seeds in group(
        runs, lambda run: (run.args["env_id"], depth_of(run), run.args["norm"])
    ).items():
        steps, values = aligned(seeds, SCORE)
        mean = values.mean(0)
        row = dict(env_id=env_id, depth=depth, norm=norm, seeds=len(seeds), steps=int(steps[-1]), best=mean.max())
        for threshold in thresholds:
            reached = steps[mean >= threshold]
            row[f"M steps to {threshold}"] = f"{reached[0] / 1e6:.3g}" if len(reached) else "-"
        rows.append(row)
    figure, axis = plt.subplots(figsize=(8, 0.5 + 0.3 * len(rows)))
    axis.set_axis_off()
    cells = [[f"{v:.1f}" if isinstance(v, float | np.floating) else v for v in row.values()] for row in rows]
    axis.table(cellText=cells, colLabels=list(rows[0]), loc="center", cellLoc="center").scale(1, 1.2)
    save(figure, rows, out)


def spread_goals(saved, count=3) -> list:
    """Numbers of goals that are far from the start and from each other, among those that the last evaluation drew."""
    goals, chosen = saved["goals"][:, :2], [saved["paths"][0, 0, :2]]
    for _ in range(min(count, len(goals))):
        nearest = np.min([np.linalg.norm(goals - place, axis=1) for place in chosen], axis=0)
        chosen.append(goals[nearest.argmax()])
    return [int(np.flatnonzero((goals == goal).all(1))[0]) for goal in chosen[1:]]


def quickstart(runs, out) -> None:
    """Success over steps, and for three far goals the critic's value map with the learned policy's paths."""
    run = runs[-1]
    saved = looks.value_map(*looks.last_evaluation(run.folder))
    numbers = spread_goals(saved)
    figure, axes = panels(1 + len(numbers), 3.9, 3.3)
    steps, success = run.series("eval/success_any")
    axes[0].plot(steps / 1e3, success, "o-", ms=3, color="tab:green", label="goal reached")
    time_at_goal = run.series("eval/time_at_goal")[1] / run.args["episode_length"]
    axes[0].plot(steps / 1e3, time_at_goal, "o-", ms=3, color="tab:blue", label="share of time at the goal")
    title = f"{run.args['eval_env_id']}, seed {run.args['seed']}: all {len(saved['goals'])} goals"
    axes[0].set(ylim=(-0.02, 1.02), xlabel="thousand environment steps", title=title)
    axes[0].legend(frameon=False, fontsize=7, loc="lower right")
    for k, axis in zip(numbers, axes[1:]):
        draw_value_map(axis, saved, k)
        axis.set_title("the critic's values for one goal (star)\nand episodes of the policy (white)")
    save(figure, [dict(step=int(s), success=a, share_at_goal=b) for s, a, b in zip(steps, success, time_at_goal)], out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure")
    parser.add_argument("--runs", required=True, help="a shell pattern of --exp-name")
    parser.add_argument("--out", required=True, help="path of the picture and its CSV, without ending")
    parser.add_argument("--folder", default="runs", help="the folder of the runs")
    arguments = parser.parse_args()

    def shape(run):
        return "width" if run.args["exp_name"].split("-")[-1].startswith("w") else "depth"

    def variant(run):
        return {"layer": "", "none": "no LayerNorm, "}[run.args["norm"]] + run.args["activation"]

    by_parameters = {env: {} for env in PAPER_FIG4}
    for env, series in PAPER_FIG4.items():
        for name, scores in series.items():
            layers = {v: (4, v) if name == "width" else (v, 256) for v in scores}
            by_parameters[env][name] = {3 * d * w * (w + 3): scores[v] for v, (d, w) in layers.items()}
    crl_scores = {env: {METHODS["crl"]: scores} for env, scores in PAPER_FIG1.items()}
    figures = {
        "quickstart": quickstart,
        "point": lambda runs, out: curves(runs, out, tag="eval/success_any", label="share of the goals reached"),
        "fig1": lambda runs, out: curves(runs, out, PAPER_FIG1),
        "fig4": lambda runs, out: finals(runs, out, parameters, shape, "parameters", by_parameters),
        "fig5": lambda runs, out: finals(
            runs, out, depth_of, lambda run: "residual" if run.args["residual"] else "no residual", "depth"
        ),
        "fig6": heatmap,
        "fig7": lambda runs, out: finals(
            runs, out, lambda run: run.args["batch_size"], depth_of, "batch size", {"humanoid": PAPER_FIG7}
        ),
        "fig8": collectors,
        "fig9": value_maps,
        "fig10": embeddings,
        "fig11": lambda runs, out: curves(runs, out, {"ant_u_maze_gen_1f2f3f": PAPER_FIG11}),
        "fig12": lambda runs, out: finals(
            runs, out, depth_of, lambda run: "actor depth capped", "critic depth",
            {env: {"actor depth capped": scores} for env, scores in PAPER_FIG12.items()},
        ),
        "baselines": methods,
        "fig13": lambda runs, out: finals(
            runs, out, depth_of, method_of, "depth",
            {env: scores for env, scores in crl_scores.items() if any(run.args["env_id"] == env for run in runs)},
        ),
        "fig16": lambda runs, out: finals(runs, out, depth_of, variant, "depth"),
        "fig17": residual_norms,
        "table2": steps_to_score,
    }  # fmt: skip
    if arguments.figure not in figures:
        raise SystemExit(f"error: unknown figure {arguments.figure}; known: {', '.join(figures)}")
    figures[arguments.figure](load_runs(arguments.runs, folder=arguments.folder), arguments.out)


if __name__ == "__main__":
    main()
