"""Reading runs, confidence bands, and one sweep from the command to the picture."""

import argparse
import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import unittest.mock
from pathlib import Path

import gymnasium
import helpers
import mujoco
import numpy as np
import plotting
import pytest
import torch
import torch.nn.functional as F
from moviepy import VideoFileClip
from test_redo_dqn_atari import FakeGames
from torch.utils.tensorboard import SummaryWriter

import adaptive_rr
import crl_deep
import drm
import drqv2_plasticity
import redo_dqn_atari

plot_crl_deep, crl_deep_peer = helpers.benchmark("crl_deep/plot.py"), helpers.benchmark("crl_deep/peer.py")
offline_plot = helpers.benchmark("redo_dqn_atari/offline_plot.py")
plot_rr, rr_detector = helpers.benchmark("adaptive_rr/plot.py"), helpers.benchmark("adaptive_rr/detector.py")
plot_drm, drm_schedules = helpers.benchmark("drm/plot.py"), helpers.benchmark("drm/schedules.py")
plot_drq, plot_redo = helpers.benchmark("drqv2_plasticity/plot.py"), helpers.benchmark("redo_dqn_atari/plot.py")
ROOT = Path(__file__).resolve().parent.parent


def write_run(name, seed, values, tag="eval/time_at_goal_last5", every=10, folder="point_room", **changes):
    """A fake finished run under runs/ with one logged tag."""
    folder = Path("runs") / f"{folder}__{name}__{seed}__0"
    writer = SummaryWriter(str(folder))
    for i, value in enumerate(values):
        writer.add_scalar(tag, value, i * every)
    writer.close()
    args = dict(env_id="point_room", exp_name=name, seed=seed, critic_depth=4, residual=True, norm="layer")
    description = dict(script="crl_deep", action_repeat=changes.pop("action_repeat", 1), args=args | changes)
    (folder / "args.json").write_text(json.dumps(description))


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_mean_and_band():
    mean, low, high = plotting.mean_and_band(np.array([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]]))
    assert mean.tolist() == [3, 5] and low[1] == high[1] == 5
    assert 1 <= low[0] < 2 and 4.5 < high[0] <= 6
    one = plotting.mean_and_band(np.array([[4.0]]))
    assert [x.tolist() for x in one] == [[4], [4], [4]]


def test_series_are_in_frames_and_aligned_to_the_shortest_run():
    write_run("a", 1, [0, 1, 2, 3], action_repeat=2)
    write_run("a", 2, [2, 3, 4], action_repeat=2)
    write_run("other", 1, [9])
    runs = plotting.load_runs("a")
    assert [run.args["seed"] for run in runs] == [1, 2]
    steps, values = plotting.aligned(runs, "eval/time_at_goal_last5")
    assert steps.tolist() == [0, 20, 40] and values.tolist() == [[0, 1, 2], [2, 3, 4]]
    assert plotting.aligned(runs, "no/such_tag")[1].shape == (1, 0)
    with pytest.raises(SystemExit, match="no run under runs/ has an --exp-name that matches nothing"):
        plotting.load_runs("nothing")
    assert [run.args["exp_name"] for run in plotting.load_runs("other", "a", "o*")] == ["a", "a", "other"]


def test_of_two_folders_of_one_run_the_finished_one_counts():
    """As the sweeps have it, which skip a run that any folder has finished."""
    write_run("a", 1, [0, 1, 2])
    (finished,) = Path("runs").iterdir()
    (finished / "summary.json").touch()
    finished.rename("runs/0")
    write_run("a", 1, [0, 1])  # begun later, and cut off
    (run,) = plotting.load_runs("a")
    assert run.folder == Path("runs/0")


def test_only_what_all_arms_have_is_compared(capsys):
    """Tasks that one arm has not evaluated yet are left out; arms are compared where the shortest ends."""
    for game, arm, values in (("Pong", "dqn", [0, 1, 2]), ("Pong", "redo", [0, 1]), ("Breakout", "dqn", [5, 5, 5])):
        write_atari_run(game, f"redo_c-smoke-{arm}", 1, values)
    runs = plotting.comparable(plotting.load_runs("redo_c-*"), plot_redo.RETURN)
    assert [run.args["env_id"] for run in runs] == ["ALE/Pong-v5"] * 2
    end, last = plot_redo.last_scores(plotting.group(runs, plot_redo.arm))
    assert end == 1_000_000 and last["dqn"][0] == last["redo"][0]
    with pytest.raises(SystemExit, match="no task has runs of all arms"):
        apart = {("ALE/Pong-v5", "redo"), ("ALE/Breakout-v5", "dqn")}
        runs = [run for run in plotting.load_runs("redo_c-*") if (run.args["env_id"], plot_redo.arm(run)) in apart]
        plotting.comparable(runs, plot_redo.RETURN)
    with pytest.raises(SystemExit, match="has logged no/such_tag yet"):
        plotting.logged(runs, "no/such_tag")


def test_tasks_of_one_arm_on_one_grid():
    write_atari_run("Pong", "redo_g-smoke-dqn", 1, [0, 2, 4])
    write_run("redo_g-smoke-dqn", 1, [1, 3], plot_redo.RETURN, 300_000, "ALE-Breakout-v5", env_id="ALE/Breakout-v5",
              action_repeat=4)  # fmt: skip
    steps, tasks = plotting.aligned_tasks(plotting.load_runs("redo_g-*"), plot_redo.RETURN)
    assert steps.tolist() == [0, 1_200_000] and tasks["ALE/Breakout-v5"].tolist() == [[1, 3]]
    assert tasks["ALE/Pong-v5"] == pytest.approx(np.array([[0, 2.4]]))  # every 1,000,000 frames


def test_names_and_footnotes_of_redo():
    assert [plot_redo.name_of(name) for name in ("rr0.25", "x2-redo", "rr-x")] == [
        "replay ratio 0.25", "ReDo, width x 2", "rr-x"]  # fmt: skip
    row = dict(tag=plot_redo.RETURN, seeds=1, paper=None)
    bands, games, stars = "Bands:", "IQM and means over games:", "Stars:"
    for rows, expected in (
        ([row], []), ([row, row | dict(seeds=2)], [bands]), ([dict(seeds="3-5", paper=None)], [games]),
        ([row | dict(seeds=2), row | dict(tag="iqm", paper=1.0)], [bands, games, stars]),
    ):  # fmt: skip
        note = plot_redo.note_of(rows)
        assert [part for part in (bands, games, stars) if part in note] == expected
    assert plotting.seeds_of([np.zeros((3, 1)), np.zeros((5, 1))]) == "3-5" and plotting.seeds_of([[0], [0]]) == 1


@pytest.mark.parametrize("game, star", [("DemonAttack", "0.34"), ("Asterix", "0.54"), ("Pong", ""), ("", "")])
def test_stars_of_fig4_are_those_of_its_game(game, star):
    for kind in ("all", *offline_plot.STATES):
        tag = offline_plot.DORMANT if kind == "all" else offline_plot.BY_STATES + kind
        write_run("redo_fig4-small-bootstrapped", 1, [0.2, 0.3], tag, replay=f"runs/ALE-{game}-v5__old")
    write_run("redo_fig4-small-bootstrapped", 1, [2.0, 1.0], offline_plot.LOSS, replay=f"runs/ALE-{game}-v5__a")
    offline_plot.draw(plotting.load_runs("redo_fig4-*"), "out")
    assert {row["paper"] for row in read_csv("out.csv") if row["tag"] == offline_plot.DORMANT} == {star}


def test_colours_of_method_and_baseline():
    assert plotting.colours(["augmentation", "plain"]) == dict(augmentation="C1", plain="C0")
    assert plotting.colours(["augmentation", "rr2"]) == dict(augmentation="C0", rr2="C2")
    assert plotting.colours(["redo", "static1", "adaptive"]) == dict(redo="C2", static1="C3", adaptive="C1")
    assert plot_drq.name_of("rr2") == "replay ratio 2" and plot_drq.name_of("plain-reset9").endswith(", 9 resets")


def test_a_final_score_is_taken_where_the_shortest_run_ends():
    write_run("s", 1, [0, 10, 90])
    write_run("s", 2, [0, 20])
    assert plot_crl_deep.final(plotting.load_runs("s"))[0] == 15


def test_table_2_counts_steps_to_a_score():
    write_run("t", 1, [0, 150, 300, 500], every=1_000_000, episode_length=1000)
    write_run("t", 2, [0, 250, 300, 300], every=1_000_000, episode_length=1000)
    plot_crl_deep.steps_to_score(plotting.load_runs("t"), "out")
    (row,) = read_csv("out.csv")
    assert (row["M steps to 200"], row["M steps to 400"], row["M steps to 600"]) == ("1", "3", "-")
    assert row["seeds"] == "2" and Path("out.png").stat().st_size > 1000


def test_iqm_and_stratified_bootstrap():
    """Eight runs of two games: without the lowest and the highest two, and seeds drawn anew within each game."""
    games = [np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([[10.0], [20.0], [30.0], [100.0]])]
    assert plotting.iqm(games).tolist() == [(2 + 3 + 10 + 20) / 4]
    assert plotting.iqm([np.array([[5.0, 1.0]])]).tolist() == [5, 1]
    means = np.array([plotting.iqm(games)])
    low, high = plotting.stratified_bootstrap(games, plotting.iqm)
    assert 0 <= low < means < high <= 100
    one_seed = [np.array([[1.0]]), np.array([[3.0]])]
    assert [x.tolist() for x in plotting.stratified_bootstrap(one_seed, plotting.iqm)] == [[2], [2]]


def test_iqm_is_that_of_rliable():
    """Where rliable is installed (pip install rliable "arch<8")."""
    library = pytest.importorskip("rliable.library")
    metrics = pytest.importorskip("rliable.metrics")
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5, 17)) ** 2  # runs x games
    games = [scores[:, [i]] for i in range(17)]
    assert plotting.iqm(games)[0] == pytest.approx(metrics.aggregate_iqm(scores))
    _, intervals = library.get_interval_estimates(
        {"ours": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=20_000
    )
    ours = plotting.stratified_bootstrap(games, plotting.iqm, samples=20_000)
    assert np.ravel(ours) == pytest.approx(intervals["ours"].ravel(), abs=0.02)


def write_atari_run(game, name, seed, values, tag=plot_redo.RETURN, **changes):
    env_id = f"ALE/{game}-v5"
    write_run(name, seed, values, tag, 250_000, f"ALE-{game}-v5", env_id=env_id, action_repeat=4, **changes)


def test_human_normalised_aggregate_over_games():
    for game, returns in (("Pong", (-20.7, 14.6)), ("Breakout", (1.7, 30.5))):  # random and human
        write_atari_run(game, "redo_x-smoke-dqn", 1, [returns[0]] * 3)
        write_atari_run(game, "redo_x-smoke-redo", 1, returns)
    plot_redo.headline(plotting.load_runs("redo_x-*"), "out", plot_redo.PAPER_FIG1)
    rows = [(row["arm"], int(row["frames"]), round(float(row["mean"]), 5), row["paper"]) for row in read_csv("out.csv")]
    assert rows == [("dqn", 0, 0, "0.3"), ("dqn", 1_000_000, 0, "0.3"), ("dqn", 2_000_000, 0, "0.3"),
                    ("redo", 0, 0, "0.625"), ("redo", 1_000_000, 1, "0.625")]  # fmt: skip
    assert all(row["env_id"] == "2 games" for row in read_csv("out.csv")) and Path("out.png").stat().st_size > 5000


def test_final_score_by_replay_ratio():
    for method, ratio, score in (("dqn", 0.25, 30.5), ("dqn", 1, 1.7), ("redo", 0.25, 30.5), ("redo", 1, 59.3)):
        write_atari_run(
            "Breakout", f"redo_r-smoke-rr{ratio}-{method}", 1, [0, score], method=method, replay_ratio=ratio
        )
    plot_redo.by_replay_ratio(plotting.load_runs("redo_r-*"), "out", plot_redo.PAPER_FIG10["fig10a"])
    rows = {(r["method"], r["replay_ratio"]): (round(float(r["iqm"]), 5), r["paper"]) for r in read_csv("out.csv")}
    assert rows == {("dqn", "0.25"): (1, "0.41"), ("dqn", "1"): (0, "0.3"), ("redo", "0.25"): (1, "0.4"),
                    ("redo", "1"): (2, "0.625")}  # fmt: skip


def test_curves_over_gradient_steps():
    tag = "dormant_ratio_tau0/all"
    write_atari_run("Asterix", "redo_g-smoke-dqn", 1, [0.1, 0.2, 0.4], tag)
    write_atari_run("Asterix", "redo_g-smoke-dqn", 1, [0, 62_500, 125_000], "charts/gradient_steps")
    plot_redo.curves(plotting.load_runs("redo_g-*"), "out", [tag], [plot_redo.PAPER_FIG2], True)
    rows = [(float(row["x"]), float(row["mean"]), row["paper"]) for row in read_csv("out.csv")]
    assert rows == [(0, 0.1, "0.3"), (0.0625, 0.2, "0.3"), (0.125, 0.4, "0.3")]


def test_fig7_stays_one_game_when_fig16_has_run():
    for game, score in (("DemonAttack", 3650), ("Asterix", 900)):  # Fig. 16's runs have the same names
        write_atari_run(game, "redo_fig7-smoke-rr0.25", 1, [150, score])
        write_atari_run(game, "redo_fig7-smoke-rr0.25", 1, [0.1, 0.09], plot_redo.DORMANT.format(0))
    plot_redo.FIGURES["fig7"](plotting.load_runs("redo_fig7-*"), "out")
    rows = [(row["env_id"], row["paper"]) for row in read_csv("out.csv")]
    assert rows == [("ALE/DemonAttack-v5", "0.09")] * 2 + [("ALE/DemonAttack-v5", "3650")] * 2


def pixel_run(name, seed, values, task="walker-run", tag="fau/critic"):
    options = dict(tag=tag, every=50_000, folder=task, action_repeat=2, env_id=f"dm_control/{task}-v0")
    write_run(f"drqv2-small-{name}", seed, values, **options)


def test_curves_of_active_units_with_the_papers_marks():
    for seed in (1, 2):
        pixel_run("augmentation", seed, [0.5, 0.4 + 0.1 * seed, 0.3])
        pixel_run("plain", seed, [0.5, 0.2, 0.1])
    pixel_run("unasked", 1, [0.0, 0.0])
    runs = plotting.load_runs("drqv2-small-*")
    arms = ["augmentation", "plain"]
    runs = [run for run in runs if plot_drq.arm(run) in arms]
    plot_drq.curves(plot_drq.all_rows(runs, ["fau/critic"]), arms, "out")
    rows = read_csv("out.csv")
    ours = {(row["arm"], int(row["frames"])): float(row["mean"]) for row in rows if row["seeds"] == "2"}
    assert ours == pytest.approx({
        ("augmentation", 0): 0.5, ("augmentation", 100_000): 0.55, ("augmentation", 200_000): 0.3,
        ("plain", 0): 0.5, ("plain", 100_000): 0.2, ("plain", 200_000): 0.1})  # fmt: skip
    paper = {(row["arm"], int(row["frames"])): float(row["mean"]) for row in rows if row["seeds"] == "paper"}
    assert paper[("augmentation", 300_000)] == 0.433 and paper[("plain", 3_000_000)] == 0.204 and len(paper) == 12
    plot_drq.curves(plot_drq.all_rows(runs, ["fau/critic"], every_seed=True), arms, "seeds")
    by_seed = {
        (row["arm"], row["seed"]): row for row in read_csv("seeds.csv") if row["frames"] == "100000" and row["seed"]
    }
    assert float(by_seed[("augmentation", "2")]["mean"]) == pytest.approx(0.6) and len(by_seed) == 4


def test_bars_are_the_last_returns():
    for seed, value in ((1, 100.0), (2, 300.0)):
        pixel_run("layer-norm", seed, [0.0, value], "cheetah-run", "eval/episodic_return")
    runs = plotting.load_runs("drqv2-small-*")
    plot_drq.bars(runs, ["augmentation", "layer-norm"], ["return"], "out")
    first = read_csv("out.csv")[0]
    assert (first["arm"], first["tag"], float(first["mean"])) == ("layer-norm", "last return", 200)
    assert Path("out.png").stat().st_size > 10_000


def test_a_frozen_encoder_has_no_stars_of_a_learned_one():
    frozen = dict(encoder_weights="random")
    write_run("frozen-small-plain", 1, [0.0, 1.0], env_id="dm_control/walker-run-v0", tag="fau/critic", folder="f",
              action_repeat=2, **frozen)  # fmt: skip
    rows = plot_drq.all_rows(plotting.load_runs("frozen-small-*"), ["fau/critic"])
    assert rows and all(row["seeds"] != "paper" for row in rows)


def test_a_collectors_learners_are_drawn():
    options = dict(env_id="point_room", collector_depth=8, deep=8, shallow=4, folder="c")
    write_run("fig8-small-c8", 1, [1.0, 2.0], tag="eval/time_at_goal/deep", **options)
    write_scalars("runs/c__fig8-small-c8__1__0", **{"eval__time_at_goal/shallow": {0: 1.0, 50_000: 1.5},
                                                    "eval__time_at_goal/collector": {0: 3.0, 50_000: 4.0}})  # fmt: skip
    plot_crl_deep.collectors(plotting.load_runs("fig8-small-*"), "out")
    last = {row["agent"]: float(row["mean"]) for row in read_csv("out.csv")}
    assert last == {"collector": 4.0, "shallow": 1.5, "deep": 2.0}


def test_last_returns_by_task():
    """The mean of the tasks' ratios; a task with one arm alone, or nothing without augmentation, has none."""
    for task, name, value in (("cheetah-run", "augmentation", 300.0), ("cheetah-run", "plain", 100.0),
                              ("walker-run", "augmentation", 50.0), ("walker-run", "plain", 50.0),
                              ("hopper-hop", "augmentation", 10.0), ("hopper-hop", "plain", 0.0),
                              ("hopper-stand", "plain", 7.0)):  # fmt: skip
        pixel_run(name, 1, [0.0, value], task, "eval/episodic_return")
    runs = plotting.load_runs("drqv2-small-*")
    with unittest.mock.patch.object(plot_drq, "save", wraps=plot_drq.save) as saved:
        plot_drq.tasks(runs, ["augmentation", "plain"], "out")
    (axis,) = saved.call_args.args[0].axes
    assert axis.get_title() == "with augmentation / no augmentation: mean ratio 2.00\n1 seed"
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["cheetah-run  x 3.0", "hopper-hop", "hopper-stand", "walker-run  x 1.0"]
    last = {(row["env_id"], row["arm"]): float(row["mean"]) for row in read_csv("out.csv")}
    assert last[("dm_control/cheetah-run-v0", "augmentation")] == 300 and len(last) == 7


def write_scalars(folder, **series):
    """Further tags of a fake run: tag (with _ for its first /) -> {step: value}."""
    writer = SummaryWriter(str(folder))
    for tag, values in series.items():
        for step, value in values.items():
            writer.add_scalar(tag.replace("__", "/"), value, step)
    writer.close()


def test_detectors_replayed_on_logged_runs():
    """13 episodes, the first of 1 step, the others of 10; learning begins in the fourth, the FAU rests from then on."""
    options = dict(tag="charts/episodic_return", folder="quadruped-run", action_repeat=2)
    write_run("rr-small-static2", 1, [0.0] * 13, env_id="dm_control/quadruped-run-v0", **options)
    fau = {30: 0.3, 40: 0.2, **{10 * episode: 0.25 for episode in range(5, 13)}}
    write_scalars("runs/quadruped-run__rr-small-static2__1__0", adaptive_rr__reference={30: 0.5}, fau__critic=fau)
    rr_detector.draw(plotting.load_runs("rr-small-*"), [2, 4], [0.001, 0.2], "out")
    frames = {(row["check_episodes"], row["threshold"]): row["switch_frame"] for row in read_csv("out.csv")}
    # The checks after episodes 4 and 8 (steps 30 and 70) see 0.3 and 0.25, the one after episode 6 (step 50) too
    assert frames == {("2", "0.001"): "140", ("4", "0.001"): "220", ("2", "0.2"): "60", ("4", "0.2"): "60"}
    write_scalars("runs/quadruped-run__rr-small-static2__1__0", adaptive_rr__switched={60: 0.0, 65: 1.0, 80: 1.0})
    rr_detector.draw(plotting.load_runs("rr-small-*"), [2, 4], [0.001, 0.2], "out")
    cut = {(row["check_episodes"], row["threshold"]): row["switch_frame"] for row in read_csv("out.csv")}
    assert rr_detector.own_switch(plotting.load_runs("rr-small-*")[0]) == 120
    assert cut == {("2", "0.001"): "nan", ("4", "0.001"): "nan", ("2", "0.2"): "60", ("4", "0.2"): "60"}
    write_run("rr-empty-static2", 1, [0.0])
    with pytest.raises(SystemExit, match="no run is long enough"):
        rr_detector.draw(plotting.load_runs("rr-empty-*"), [2], [0.1], "out")


def test_behaviour_shows_the_films_of_the_chosen_steps(monkeypatch):
    flags = [*helpers.DRM, "--capture-video", "--exp-name", "drm-smoke-film", "--eval-every", "40"]
    run_dir = helpers.run(drm, *flags)
    (run,) = plotting.load_runs("drm-smoke-film")
    assert run.folder.resolve() == run_dir.resolve()
    assert plot_drm.film_steps(run, []) == [0, 40, 80, 120]
    assert plot_drm.film_steps(run, [], count=3) == [0, 40, 120]
    assert plot_drm.film_steps(run, [1, 70, 1000]) == [0, 80, 120]
    plot_drm.behaviour([run], [0, 120], "out")
    rows = read_csv("out.csv")
    assert {row["tag"] for row in rows} == {"drm/dormant_ratio", "return"}
    ratios = [float(row["value"]) for row in rows if row["tag"] == "drm/dormant_ratio"]
    assert ratios == pytest.approx(list(run.series("drm/dormant_ratio")[1]), rel=1e-4)
    assert Path("out.png").stat().st_size > 20_000
    write_run("drm-smoke-nothing", 1, [0.0])
    with pytest.raises(SystemExit, match="train with --capture-video"):
        plot_drm.film_steps(plotting.load_runs("drm-smoke-nothing")[0], [])


def test_aggregate_of_returns_over_tasks():
    for task, value in (("dog-run", 0.0), ("dog-walk", 100.0), ("dog-trot", 200.0), ("humanoid-run", 900.0)):
        options = dict(tag="eval/episodic_return", every=500, folder=task, action_repeat=2)
        for name, gain in (("drm", 10.0), ("drqv2", 0.0)):
            write_run(f"drm-paper-{name}", 1, [0.0, value + gain], env_id=f"dm_control/{task}-v0", **options)
    plot_drm.aggregate(plotting.load_runs("drm-paper-*"), ["drm", "drqv2"], "out")
    rows = {(row["arm"], int(row["frames"])): float(row["iqm"]) for row in read_csv("out.csv")}
    assert rows == {("drm", 0): 0, ("drm", 1000): 160, ("drqv2", 0): 0, ("drqv2", 1000): 150}
    assert {row["tasks"] for row in read_csv("out.csv")} == {"4"}


def test_dotted_lines_where_weights_were_perturbed(monkeypatch):
    import matplotlib.axes

    lines = []
    monkeypatch.setattr(matplotlib.axes.Axes, "axvline", lambda self, x, **style: lines.append(x))
    pixel_run("augmentation", 1, [0.5, 0.4, 0.3])
    write_scalars("runs/walker-run__drqv2-small-augmentation__1__0", events__perturb_factor={50_001: 0.3, 9: 0.2})
    rows = plot_drq.all_rows(plotting.load_runs("drqv2-small-*"), ["fau/critic"])
    plot_drq.curves(rows, ["augmentation"], "out")
    assert sorted(lines) == [18 / 1e6, 100_002 / 1e6]
    again = plotting.read_rows("out.csv")  # a picture can be drawn from its CSV
    assert [row["frames"] for row in again] == [row["frames"] for row in rows]
    plot_drq.curves(again, ["augmentation"], "again")
    assert Path("again.csv").read_text() == Path("out.csv").read_text() and len(lines) == 4


def test_the_unit_of_an_axis_fits_its_range():
    assert plotting.frames_unit(32_000) == (1e3, "thousand frames")
    assert plotting.frames_unit(3e6) == (1e6, "million frames")


def test_arms_in_the_papers_words():
    assert plot_drq.name_of("plain-reset9") == "no augmentation, 9 resets"
    assert plot_drq.name_of("switch-on-inject-critic") == "augmentation switched on, injection: critic"
    assert plot_drq.name_of("primed-augmentation") == "primed, with augmentation"
    assert plot_drq.name_of("layer-norm") == "layer norm"


def test_footnotes_name_only_what_is_there():
    row = dict(env_id="x", tag="return", arm="plain", seeds=1, frames=1, mean=1)
    assert plot_drq.note_of([row]) == "Returns: evaluations. Axes need not start at 0."
    more = plot_drq.note_of([row, row | dict(seeds=5), row | dict(seeds="paper"), row | dict(seeds="event")])
    assert all(word in more for word in ("Bands", "Stars", "Dotted"))
    assert "Stars" not in plot_drq.note_of([row, row | dict(seeds="paper", frames=2)])  # beyond the picture
    injected = plot_drq.note_of([row | dict(arm="switch-on-inject-critic", tag="fau/critic")])
    assert "only the new head counts" in injected and "only the new head" not in more


def test_schedules_of_the_dormant_ratio():
    drm_schedules.draw(drm.Args(stddev_steps=500_000), "out")
    rows = {(row["quantity"].split()[-1], row["curve"], float(row["dormant_ratio"])): float(row["value"])
            for row in read_csv("out.csv")}  # fmt: skip
    assert rows["sigma", "before awakening", 0.3] == pytest.approx(0.731059, abs=1e-5)
    assert rows["sigma", "awake, 50% of the decay", 0.0] == pytest.approx(0.55)
    assert rows["sigma", "awake, 100% of the decay", 0.1] == pytest.approx(0.268941, abs=1e-5)
    assert rows["alpha", "at most 0.6", 0.0] == 0.6 and rows["alpha", "at most 1.0", 0.25] == 0.5
    assert rows["lambda", "", 0.2] == pytest.approx(0.3) and len(rows) == 8 * 101


def test_table_1_has_the_papers_numbers_beside_ours():
    options = dict(tag="eval/episodic_return", every=500_000, folder="cheetah-run", action_repeat=2)
    for seed, value in ((1, 700.0), (2, 800.0)):
        write_run("rr-paper-static2-reset", seed, [0, 300.0, value, 0.0], env_id="dm_control/cheetah-run-v0", **options)
    plot_rr.table(plotting.load_runs("rr-paper-*"), list(plot_rr.ARMS), "out")
    (row,) = read_csv("out.csv")
    assert (row["arm"], float(row["mean"]), int(row["frames"])) == ("static2-reset", 750, 2_000_000)
    assert (row["paper_mean"], row["paper_std"], row["seeds"]) == ("885", "20", "2")


def test_final_scores_by_depth_and_variant():
    for depth, residual, score in ((4, True, 10), (8, True, 20), (4, False, 5), (8, False, 1)):
        write_run(f"f-{depth}-{residual}", 1, [0, score], critic_depth=depth, residual=residual)
    runs = plotting.load_runs("f-*")
    plot_crl_deep.finals(runs, "out", plot_crl_deep.depth_of, lambda run: str(run.args["residual"]), "depth")
    rows = {(row["series"], row["x"]): float(row["mean"]) for row in read_csv("out.csv")}
    assert rows == {("True", "4"): 10, ("True", "8"): 20, ("False", "4"): 5, ("False", "8"): 1}


def test_fig_4_gives_the_humanoid_the_papers_200_million_steps():
    command = ["bash", "benchmark/crl_deep/fig4_width.sh", "--dry-run"]
    sweep = subprocess.run(command, env=os.environ | {"SCALE": "paper"}, capture_output=True, text=True, cwd=ROOT)
    commands = [line for line in sweep.stdout.splitlines() if line.startswith("python crl_deep.py")]
    assert len(commands) == 2 * 9 * 3, sweep.stderr
    for command in commands:
        assert ("--total-timesteps 200000000" in command) == ("--env-id humanoid " in command)


def test_the_quickstart_shows_goals_far_from_the_start_and_from_each_other():
    goals = np.array([[x, y] for x in (2, 4, 6) for y in (2, 4, 6) if (x, y) != (4, 4)])
    saved = dict(goals=goals, paths=np.full((5, 8, 2), 4.1))
    corners = [tuple(goals[k]) for k in plot_crl_deep.spread_goals(saved)]
    assert len(set(corners)) == 3 and set(corners) <= {(2, 2), (2, 6), (6, 2), (6, 6)}


def test_a_sweep_from_command_to_picture(tmp_path):
    """Runs two trainings, draws, skips what is finished, resumes what was cut off, and fails when a run fails."""
    shutil.copytree(ROOT / "benchmark", tmp_path / "benchmark", ignore=shutil.ignore_patterns("results"))
    shutil.copy(ROOT / "crl_deep.py", tmp_path)
    shared = tmp_path / "benchmark" / "crl_deep" / "runs.sh"
    tiny = (
        'SMOKE="--num-envs 4 --episode-length 20 --unroll-length 10 --gradient-steps 2 --batch-size 8 --width 16 '
        '--learning-starts 80 --total-timesteps 400 --buffer-size 400 --eval-episodes 3 --eval-every 80"\n'
    )
    lines = [tiny if line.startswith("SMOKE=") else line for line in shared.read_text().splitlines(keepends=True)]
    shared.write_text("".join(lines))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "SCALE": "smoke", "WORKERS": "2"}

    def sweep():
        command = ["bash", "benchmark/crl_deep/fig9_value_map.sh"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)

    first = sweep()
    assert first.returncode == 0, first.stderr
    figure = tmp_path / "runs" / "figures" / "crl_deep_fig9_value_map_smoke"
    assert figure.with_suffix(".png").stat().st_size > 5000
    assert {row["depth"] for row in read_csv(figure.with_suffix(".csv"))} == {"4", "8"}
    assert sweep().stdout.count("finished: runs/") == 2

    (cut_off,) = tmp_path.glob("runs/*d8*/summary.json")
    cut_off.unlink()
    (broken,) = tmp_path.glob("runs/*d4*/summary.json")
    broken.unlink()
    (broken.parent / "checkpoint.pt").write_text("no checkpoint")
    again = sweep()
    assert again.returncode == 1 and "--resume" in again.stdout
    assert again.stdout.endswith("of 2 runs 0 were finished before, 1 are now, 1 failed\n")
    assert again.stderr.splitlines()[-1].startswith("FAILED: see runs/logs/point_u_maze__") or again.stderr
    assert cut_off.exists() and not broken.exists()


@pytest.fixture
def checkout(tmp_path):
    """benchmark/ and the scripts in an empty folder, with every run made tiny: sweep(name, **environment) runs one."""
    shutil.copytree(ROOT / "benchmark", tmp_path / "benchmark", ignore=shutil.ignore_patterns("results"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    shared = sorted(tmp_path.glob("benchmark/*/runs.sh"))
    texts = [path.read_text() for path in shared]
    for old, new in (
        ("dm_control/%s-v0", "pixel_env:%s-v0"), ("tasks=cartpole-balance", "tasks=Dot"),
        ("tasks=hopper-hop", "tasks=Dot"), ("--image-size 36", "--image-size 24"),
        ("--total-timesteps 2000 --eval-every 2000", "--total-timesteps 300 --eval-every 300"),
        ("--total-timesteps 600", "--total-timesteps 300"), ("--eval-steps 100", "--eval-steps 10"),
        ("--total-timesteps 1200 --eval-every 600 --plasticity-every 500 --plasticity-batch-size 64",
         "--total-timesteps 300 --eval-every 150 --plasticity-every 100 --plasticity-batch-size 16"),
    ):  # fmt: skip
        assert old in "".join(texts), old
        texts = [text.replace(old, new) for text in texts]
    for path, text in zip(shared, texts):
        path.write_text(text)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def sweep(name, *arguments, **changes):
        environment = os.environ | {"PATH": path, "SCALE": "smoke", "WORKERS": "2"} | changes
        command = ["bash", f"benchmark/{name}.sh", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)

    return sweep


@pytest.mark.parametrize("name, runs", [
    ("redo_dqn_atari/offline_fig8", 7), ("drqv2_plasticity/fig3_fau", 2),
    pytest.param("adaptive_rr/fig9_returns", 3, marks=pytest.mark.slow), ("drm/fig2_hopper", 1),
    ("redo_dqn_atari/supervised_fig3", 5), ("crl_deep/depth_offline_fig8", 6),
])  # fmt: skip
def test_a_sweep_of_every_other_script(name, runs, checkout, tmp_path):
    done = checkout(name)
    assert done.returncode == 0, done.stderr + "".join(log.read_text() for log in tmp_path.glob("runs/logs/*"))
    assert f"of {runs} runs 0 were finished before, {runs} are now, 0 failed" in done.stdout
    studies = {"supervised_fig3": "redo_supervised_fig3", "depth_offline_fig8": "crl_depth_offline_fig8"}
    figure = tmp_path / "runs" / "figures" / f"{studies.get(Path(name).name, name.replace('/', '_'))}_smoke"
    assert figure.with_suffix(".png").stat().st_size > 5000 and len(read_csv(figure.with_suffix(".csv"))) > 1


def test_slurm_submits_what_is_not_finished(checkout, tmp_path):
    """With an sbatch that runs its tasks at once, one after the other."""
    stub = tmp_path / "stubs"
    stub.mkdir()
    (stub / "sbatch").write_text("""#!/bin/bash
printf "%s\\n" "$@" > sbatch-arguments
for argument in "$@"; do [[ $argument == --array=* ]] && array=${argument#--array=}; command=$argument; done
for i in $(seq ${array%-*} ${array#*-}); do SLURM_ARRAY_TASK_ID=$i bash -c "$command"; done
""")
    (stub / "sbatch").chmod(0o755)
    path = f"{stub}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    name = "benchmark/redo_dqn_atari/fig9_redo.sh"
    first = checkout("slurm", name, "--time=1", PATH=path)
    assert first.returncode == 0, first.stderr
    submitted = (tmp_path / "sbatch-arguments").read_text().splitlines()
    assert {"--array=1-2", "--time=1", "--signal=B:TERM@300"} <= set(submitted)
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == 2
    assert "of 2 runs 2 were finished before" in checkout("redo_dqn_atari/fig9_redo").stdout
    assert "all runs of redo_dqn_atari_fig9_redo_smoke are finished" in checkout("slurm", name, PATH=path).stdout
    (cut_off,) = tmp_path.glob("runs/*-dqn__*/summary.json")
    cut_off.unlink()
    printed = checkout("slurm", name, "--dry-run", PATH=path)
    assert printed.stdout.startswith("sbatch --array=1-1 ") and not cut_off.exists()
    checkout("slurm", name, PATH=path)
    assert cut_off.exists()
    assert checkout("slurm", "no-such-sweep.sh").returncode == 2


def test_film(monkeypatch, capsys):
    """A run's episode as a video of the right length that shows something; one line where EGL is missing."""
    crl_deep_film = helpers.benchmark("crl_deep/film.py")
    flags = (
        "--num-envs 4 --episode-length 20 --unroll-length 10 --gradient-steps 2 --batch-size 8 --width 16 "
        "--learning-starts 80 --total-timesteps 200 --buffer-size 200 --eval-episodes 3"
    )
    run_dir = crl_deep.train(crl_deep.parse_args(flags.split()))
    with VideoFileClip(str(crl_deep_film.film(run_dir))) as clip:
        assert clip.size == [640, 480] and clip.duration == pytest.approx(20 * 0.05, abs=0.1)
        assert clip.get_frame(0).std() > 10
    monkeypatch.setattr(mujoco, "Renderer", None)
    with pytest.raises(SystemExit) as stopped:
        crl_deep_film.film(run_dir)
    assert stopped.value.code == 2 and "apt-get install libegl1" in capsys.readouterr().err


def test_a_picture_is_drawn_again_from_its_csv(monkeypatch):
    """Of the arms and panels that are asked for; without --tags, of all panels."""
    source = ROOT / "benchmark" / "drqv2_plasticity" / "results" / "drqv2_plasticity_pendulum_small.csv"
    for tags, panels in (([], 6), (["--tags", "return", "fau/critic"], 2)):
        command = ["plot.py", "curves", "--csv", str(source), "--arms", "plain", "switch-on", *tags, "--out", "again"]
        monkeypatch.setattr(sys, "argv", command)
        plot_drq.main()
        drawn = read_csv("again.csv")
        assert {row["arm"] for row in drawn} == {"plain", "switch-on"}
        assert len({row["tag"] for row in drawn}) == panels
        assert drawn == [row for row in read_csv(source) if row in drawn]


def test_a_film_refuses_what_it_cannot_film(monkeypatch, capsys):
    """Runs of other scripts, folders that are none: one line, no traceback."""
    Path("run").mkdir()
    for argv, line in (([], "usage: python film.py RUN_DIR"), (["run"], "usage: "), (["a", "b"], "usage: ")):
        monkeypatch.setattr(sys, "argv", ["film.py", *argv])
        with pytest.raises(SystemExit) as stopped:
            plotting.run_to_film("drm")
        assert stopped.value.code == 2 and capsys.readouterr().err.startswith(line)
    Path("run/args.json").write_text('{"script": "drm_adroit"}')
    Path("run/checkpoint.pt").touch()
    monkeypatch.setattr(sys, "argv", ["film.py", "run"])
    with pytest.raises(SystemExit) as stopped:
        plotting.run_to_film("drm", "adaptive_rr")
    assert stopped.value.code == 2 and "this films drm, adaptive_rr." in capsys.readouterr().err
    assert plotting.run_to_film("drm_adroit") == Path("run")


OFFICIAL = """
import wandb_that_nobody_has
class Actor:
    pass
if __name__ == "__main__":
    @wandb.jit
    def update_critic(x):
        def critic_loss(y):
            return y + 1
        return critic_loss(x)
"""


def test_the_peer_cuts_functions_out_of_a_file(capsys):
    Path("train.py").write_text(OFFICIAL)
    found = crl_deep_peer.cut("train.py", ["Actor", "update_critic"])
    scope = {}
    exec(found["update_critic"], scope)
    assert scope["update_critic"](1) == 2 and found["Actor"].startswith("class Actor")
    with pytest.raises(SystemExit) as stopped:
        crl_deep_peer.cut("train.py", ["Actor", "sgd_step"])
    assert stopped.value.code == 2 and "it has no sgd_step" in capsys.readouterr().err
    if importlib.util.find_spec("jax") is None:
        with pytest.raises(SystemExit) as stopped:
            crl_deep_peer.official_step("train.py", 4, None)
        assert stopped.value.code == 2 and "pip install jax flax optax" in capsys.readouterr().err


def test_the_peer_gives_both_sides_the_same_weights(monkeypatch):
    """Our networks with its weights compute what they say, by hand; its step learns."""
    monkeypatch.setattr(torch, "randn_like", torch.randn_like)  # which our_step replaces
    monkeypatch.setattr(crl_deep_peer, "WIDTH", 16)
    agents, make = [], crl_deep.Agent
    monkeypatch.setattr(crl_deep, "Agent", lambda *values: agents.append(make(*values)) or agents[0])
    options = argparse.Namespace(device="cpu", batch_size=8, steps=2)
    step, peak_gb = crl_deep_peer.our_step(4, options, precision="float32", width=16)
    x = torch.randn(3, crl_deep_peer.GOAL)
    h = [torch.from_numpy(a) for layer in crl_deep_peer.make_weights(4)["g"] for a in layer]
    kernels, biases = h[::2], h[1::2]

    def hidden(x, i):
        return F.silu(F.layer_norm(x @ kernels[i] + biases[i], (16,), eps=1e-6))

    stem = hidden(x, 0)
    block = stem
    for i in range(1, 5):
        block = hidden(block, i)
    torch.testing.assert_close(agents[0].psi(x), (stem + block) @ kernels[5] + biases[5])
    first, second = step(), step()
    assert first != second and peak_gb() > 0


def test_the_film_of_a_game_presses_fire_as_an_evaluation_does(monkeypatch):
    """After a lost life, under --protocol cleanrl; the fake games lose one in their second step of five."""
    redo_film, made = helpers.benchmark("redo_dqn_atari/film.py"), []

    def games(args, n, **options):
        made.append(FakeGames(n, longer=3))
        if options:  # in colour
            observe = made[-1].observe
            made[-1].observe = lambda: (np.zeros((1, 1, 210, 160, 3), np.uint8), observe()[1])
        return made[-1]

    monkeypatch.setattr(redo_dqn_atari, "make_envs", games)
    run_dir = helpers.run(redo_dqn_atari, *helpers.ATARI, "--protocol", "cleanrl", "--eval-epsilon", 0)
    monkeypatch.setattr(redo_dqn_atari, "act", lambda q_network, obs, *rest: np.full(len(obs), 2))
    redo_film.film(run_dir)
    fire = redo_dqn_atari.fire_action(made[-1])
    assert fire != 2 and [envs.actions for envs in made[-2:]] == [[[2], [2], [fire], [2], [2]]] * 2


def test_film_of_a_game():
    redo_film = helpers.benchmark("redo_dqn_atari/film.py")
    run_dir = helpers.run(redo_dqn_atari, *helpers.ATARI)
    with VideoFileClip(str(redo_film.film(run_dir))) as clip:
        assert clip.size == [320, 420] and clip.duration == pytest.approx(50 / 15, abs=0.1)
        first, last = clip.get_frame(0), clip.get_frame(3)
    assert first.std() > 10 and (first != last).any()
    colours = first.reshape(-1, 3).astype(int)
    assert np.abs(colours[:, 0] - colours[:, 2]).max() > 50


@pytest.mark.parametrize("script", [drqv2_plasticity, adaptive_rr, drm], ids=lambda script: script.SCRIPT)
def test_film_of_pixels(script):
    drq_film = helpers.benchmark("drqv2_plasticity/film.py")
    injection = ["--injection", "critic", "--injection-step", 60] * (script is drqv2_plasticity)
    run_dir = helpers.run(script, *helpers.TINY[script], *injection)
    with VideoFileClip(str(drq_film.film(run_dir, 64))) as clip:
        assert clip.size == [64, 64] and clip.duration == pytest.approx(20 / 25, abs=0.1)
        assert clip.get_frame(0).std() > 10 and (clip.get_frame(0) != clip.get_frame(0.7)).any()


def test_without_shadows_a_task_is_the_same_and_its_picture_another(monkeypatch):
    """Camera and rewards are those of dm_control; its time limit is known to --n-step."""
    pictures, rewards = [], []
    for env_id in ("dm_control/walker-walk-v0", "shadowless:walker-walk-v0"):
        env = adaptive_rr.make_env(env_id, 48)
        frame, _ = env.reset(seed=1)
        rng = np.random.default_rng(1)
        played = [env.step(rng.uniform(-1, 1, 6).astype(np.float32)) for _ in range(20)]
        pictures.append(np.int64(played[-1][0]))
        rewards.append([reward for _, reward, *_ in played])
        env.close()
    assert rewards[0] == rewards[1]
    difference = np.abs(pictures[0] - pictures[1])
    assert 0 < difference.mean() < 10 and (difference == 0).any()
    assert gymnasium.spec("walker-walk-v0").max_episode_steps == 1000


def test_the_longest_way_is_round_the_wall():
    """Beside the start, behind a wall."""
    walls = np.array([[c == "1" for c in row] for row in ("11111", "10001", "11101", "10001", "11111")])
    steps = plot_crl_deep.steps_from((1, 1), walls)
    assert steps[3].tolist() == [-1, 6, 5, 4, -1] and steps[1].tolist() == [-1, 0, 1, 2, -1]
