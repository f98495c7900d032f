"""The offline study: targets that stay by hand, distillation, what is measured, whole runs, resume, mistakes."""

import copy
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same, checkpoint, scalars

import redo_dqn_atari as redo
import redo_offline as study

ATARI = (
    "--width 0.125 --padding valid --batch-size 8 --learning-starts 60 --total-timesteps 160 --replay-ratio 1 "
    "--exploration-steps 100 --max-episode-steps 40 --eval-every 80 --eval-steps 1 --eval-envs 1 --dormant-every 80 "
    "--dormant-batch-size 8 --rank-batch-size 16 --redo-batch-size 8 --log-every 20"
).split()
TINY = "--gradient-steps 40 --measure-every-gradient-steps 10 --dormant-batch-size 8 --batch-size 8".split()


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A finished run of redo_dqn_atari.py that keeps its replay -> its folder."""
    here = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("played"))
    run_dir = redo.train(redo.parse_args([*ATARI, "--checkpoint-replay", "always"])).resolve()
    os.chdir(here)
    return run_dir


def run(*flags):
    return study.train(study.read_args([str(flag) for flag in flags]))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- targets that stay ------------------------------------------------------------------------------------------------
def small_replay(capacity=12, episodes=((3, False), (2, True), (4, None)), gamma=0.5):
    """Frames of one pixel; rewards 1, 2, 3, ... An episode: its steps, whether it terminates."""
    replay, reward = study.FrameReplay(capacity, "cpu", gamma=gamma, frame_shape=(1, 1)), 0
    for steps, terminated in episodes:
        replay.add_first(np.full((1, 1), reward, np.uint8))
        for step in range(steps):
            reward += 1
            replay.add(reward % 2, reward, bool(terminated) and step == steps - 1, np.full((1, 1), reward, np.uint8))
    return replay


def test_returns_by_hand():
    """gamma 1/2; rewards 1 2 3 | 4 5 (terminates) | 6 7 8 9 and no more frames."""
    returns = study.returns_to_go(small_replay())
    expected = [1 + 2 / 2 + 3 / 4, 2 + 3 / 2, 3, 0, 4 + 5 / 2, 5, 0, 6 + 3.5 + 2 + 9 / 8, 7 + 4 + 9 / 4, 8 + 4.5, 9, 0]
    assert returns.tolist() == pytest.approx(expected)


def test_a_lost_life_ends_a_return_and_a_ring_wraps():
    replay = small_replay(episodes=((5, True),))
    replay.record[1, 2] = 1  # --protocol cleanrl: the game goes on
    assert study.returns_to_go(replay).tolist()[:6] == pytest.approx([1 + 1, 2, 3 + 2 + 5 / 4, 4 + 2.5, 5, 0])
    wrapped, whole = small_replay(capacity=6, episodes=((9, True),)), small_replay(episodes=((9, True),))
    returns = study.returns_to_go(whole)
    for number in range(4, 10):
        assert study.returns_to_go(wrapped)[number % 6] == returns[number]


@pytest.mark.parametrize("capacity", [6, 9, 12, 40])
def test_a_stored_ring_is_the_ring_that_was_stored(capacity):
    """Wrapped or not: the same samples; and random targets are those of their own frames."""
    replay = small_replay(capacity=capacity, episodes=((5, True), (3, False), (7, True)))
    stored = study.FrameReplay(min(capacity, replay.num_frames), "cpu", frame_shape=(1, 1))
    stored.load_state_dict(copy.deepcopy(replay.state_dict()))
    assert_same(list(stored.sample(50, generator())), list(replay.sample(50, generator())))
    values = study.random_targets(stored, pixel_network, study.returns_to_go(stored), torch.device("cpu"))
    study.fix_targets(stored, values)
    obs, action, target, _, _ = stored.sample(200, generator())
    raw = pixel_network(obs)[0].gather(1, action[:, None])[:, 0]
    assert np.corrcoef(raw, target)[0, 1] == pytest.approx(1, abs=1e-5)


def pixel_network(obs):
    """Two actions' values, of the newest frame's pixel."""
    x = obs[:, -1, 0, 0].double()
    return torch.stack([x.sin(), x.cos()], 1).float(), {}


def test_the_update_learns_fixed_targets_whatever_the_target_network_says(played):
    data, agent, _ = agents(played)
    replay = study.stored_replay(data, torch.device("cpu"))
    study.fix_targets(replay, torch.full((replay.capacity,), 7.0))
    with torch.no_grad():
        agent.target_network.layers["head"].bias.fill_(1e6)
    batch = replay.sample(8, generator())
    q = agent.q_network(batch[0])[0].gather(1, batch[1][:, None])[:, 0].detach()
    optimizer = torch.optim.Adam(agent.q_network.parameters())
    metrics = study.update(agent, optimizer, study.Args(), batch)
    assert metrics["losses/targets"] == 7
    assert metrics["losses/td"].item() == pytest.approx(((7 - q).abs() - 0.5).mean().item(), rel=1e-5)


def test_fixed_targets_belong_to_their_frames():
    """Every sampled transition's target is the value at its own frame."""
    replay = small_replay()
    study.fix_targets(replay, torch.arange(12.0) * 10)
    obs, action, reward, discount, _ = replay.sample(200, generator())
    frames = replay.frames[:12, 0, 0]
    slot = torch.tensor([(frames == value).nonzero()[0, 0] for value in obs[:, -1, 0, 0]])
    # An episode's last frame has the same pixel as the next one's first
    slot = torch.where(torch.isin(slot, torch.tensor([3, 6])), slot + 1, slot)
    assert not discount.any() and reward.tolist() == (slot * 10.0).tolist()
    assert set(slot.tolist()) == {0, 1, 2, 4, 5, 7, 8, 9, 10}


def test_random_targets_have_the_spread_of_the_returns():
    replay = small_replay()
    returns = study.returns_to_go(replay)
    targets = study.random_targets(replay, pixel_network, returns, torch.device("cpu"))
    starts = [0, 1, 2, 4, 5, 7, 8, 9, 10]
    pixel = replay.frames[:12, 0, 0].double()
    value = torch.where(replay.record[:, 0] == 1, pixel.cos(), pixel.sin())[starts].float()
    assert targets[starts].mean().item() == pytest.approx(returns[starts].mean().item(), abs=1e-4)
    assert targets[starts].std().item() == pytest.approx(returns[starts].std().item(), rel=1e-4)
    assert np.corrcoef(targets[starts], value)[0, 1] == pytest.approx(1, abs=1e-5)
    assert not targets[[3, 6, 11]].any()


# --- distillation, and what is measured ------------------------------------------------------------------------------
def agents(played):
    data = study.read_run("replay", str(played))
    return data, study.new_agent(data, 1, 6), study.stored_agent(data)


@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_distillation_is_regression_on_all_actions(played, loss):
    data, agent, teacher = agents(played)
    args = study.Args(loss=loss)
    replay = study.stored_replay(data, torch.device("cpu"))
    batch = replay.sample(8, generator())
    difference = (agent.q_network(batch[0])[0] - teacher.q_network(batch[0])[0]).detach()
    expected = difference.square().mean()
    if loss == "huber":
        size = difference.abs()
        expected = torch.where(size < 1, size.square() / 2, size - 0.5).mean()
    optimizer = torch.optim.Adam(agent.q_network.parameters(), 1e-3)
    before = teacher.q_network(batch[0])[0]
    losses = [study.distill(agent.q_network, teacher.q_network, optimizer, args, batch)["losses/td"] for _ in range(40)]
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-5) and losses[-1] < losses[0] / 10
    assert torch.equal(before, teacher.q_network(batch[0])[0])


def test_measured_states_come_from_where_their_name_says():
    replay = small_replay(capacity=64, episodes=((40, True),))
    states = study.measured_states(replay, 500, generator(), torch.device("cpu"))
    newest = {name: x[:, -1, 0, 0] for name, x in states.items()}
    assert set(newest["oldest"].tolist()) == set(range(4)) and set(newest["newest"].tolist()) == set(range(36, 40))
    assert set(newest["replay"].tolist()) == set(range(40))
    assert newest["noise"].max() > 240 and newest["noise"].min() < 15


def test_a_measurement_counts_by_hand():
    def network(x):
        return None, {"dense": torch.stack([x.flatten(), torch.ones(len(x)), torch.zeros(len(x))], 1)}

    metrics = study.measure(network, dict(replay=torch.ones(4, 1), noise=torch.zeros(4, 1)))
    assert metrics["dormant_ratio_tau0/dense"] == metrics["dormant_by_states_tau0/replay"] == pytest.approx(1 / 3)
    assert metrics["dormant_by_states_tau0/noise"] == pytest.approx(2 / 3)


# --- whole runs -------------------------------------------------------------------------------------------------------
def test_the_replay_is_the_runs_and_is_sampled_alike(played):
    data = study.read_run("replay", str(played))
    replay = study.stored_replay(data, torch.device("cpu"))
    whole = redo.FrameReplay(data["replay"]["capacity"], "cpu")
    whole.load_state_dict(data["replay"])
    assert_same(list(replay.sample(50, generator())), list(whole.sample(50, generator())))
    assert replay.capacity == replay.num_frames < whole.capacity


def test_a_new_network_is_not_the_one_that_the_run_began_with(played):
    data, agent, _ = agents(played)
    args = redo.Args(**data["args"])
    begun = redo.DQNAgent(6, args).q_network.layers["dense"].weight
    ours = agent.q_network.layers["dense"].weight
    assert ours.shape == begun.shape and not torch.equal(ours, begun)
    assert torch.equal(ours, agent.target_network.layers["dense"].weight)
    other = study.new_agent(data, 1, 5).q_network.layers["dense"].weight  # the one of --targets random
    assert not torch.equal(ours, other)


def test_every_flag_changes_what_is_learned(played):
    shutil.copytree(played, "other")
    content = checkpoint(played)
    content["agent"]["q_network.layers.head.bias"] += 1
    torch.save(content, "other/checkpoint.pt")
    arms = [["--targets", targets] for targets in ("bootstrapped", "random", "monte-carlo", "teacher")]
    arms += [[], ["--student", played], ["--student", played, "--keep-adam"], ["--loss", "mse"], ["--seed", 2]]
    arms += [["--target-network-frequency-gradient-steps", 10], ["--learning-rate", 1e-3], ["--adam-eps", 1e-8]]
    arms += [["--targets", "teacher", "--teacher", "other"], ["--batch-size", 16], ["--precision", "bfloat16"]]
    outcomes = []
    for arm in arms:
        logged = scalars(run("--replay", played, *TINY, *arm))
        assert list(logged["losses/td"]) == [10, 20, 30, 40] and list(logged["dormant_ratio_tau0/all"])[0] == 0
        outcomes.append(logged["losses/td"][40])
    assert outcomes[4] == outcomes[0]  # the default
    assert len(set(outcomes)) == len(arms) - 1


@pytest.mark.parametrize("targets", ["monte-carlo", "random"])
def test_what_a_run_learns_and_from_which_streams(played, targets, monkeypatch):
    """Its rewards are the targets of its arm; the student is no teacher; every stream has its purpose."""
    rewards, drawn, streams = [], [], []
    update, stream, new_agent = study.update, study.random_stream, study.new_agent
    monkeypatch.setattr(study, "update", lambda a, o, r, batch: rewards.append(batch[2]) or update(a, o, r, batch))
    monkeypatch.setattr(study, "random_stream", lambda *given: streams.append(given) or stream(*given))
    monkeypatch.setattr(study, "new_agent", lambda *given: drawn.append(given[2]) or new_agent(*given))
    run("--replay", played, "--targets", targets, *TINY)
    replay = study.stored_replay(study.read_run("replay", played), torch.device("cpu"))
    expected = study.returns_to_go(replay)
    if targets == "random":
        network = new_agent(study.read_run("replay", played), 1, 5).q_network
        expected = study.random_targets(replay, network, expected, torch.device("cpu"))
    assert torch.isin(torch.cat(rewards), expected).all() and len(torch.cat(rewards).unique()) > 10
    assert drawn.count(6) == 1 and drawn.count(5) == (targets == "random") and {(1, 0), (1, 2)} <= set(streams)


def test_the_student_begins_as_the_run_ended_and_its_own_teacher_has_no_loss(played):
    run_dir = run("--replay", played, "--targets", "teacher", "--student", played, *TINY, "--learning-rate", 0)
    assert set(scalars(run_dir)["losses/td"].values()) == {0.0}
    assert_same(checkpoint(run_dir)["agent"], checkpoint(played)["agent"])
    other = run("--replay", played, "--targets", "teacher", "--student", played, *TINY, "--keep-adam")
    assert checkpoint(other)["optimizer"]["state"][0]["step"] == 96 + 40
    assert checkpoint(run_dir)["optimizer"]["state"][0]["step"] == 40


@pytest.mark.parametrize("flags", [["--targets", "bootstrapped", "--target-network-frequency-gradient-steps", 15],
                                   ["--targets", "teacher", "--student"]], ids=str)  # fmt: skip
def test_a_run_that_was_killed_goes_on_bit_for_bit(played, flags, monkeypatch):
    flags = [*flags, played] if flags[-1] == "--student" else flags
    whole = run("--replay", played, *TINY, *flags)

    def kill(run_dir, step, *more, save=study.save):
        save(run_dir, step, *more)
        if step == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study, "save", kill)
        run("--replay", played, *TINY, *flags, "--exp-name", "part")
    (part,) = Path("runs").glob("*part*")
    assert not (part / "summary.json").exists() and checkpoint(part)["step"] == 20
    gc.collect()  # closes the lock
    for _ in range(2):  # the second time, the run is finished
        run("--resume", part)
        a, b = checkpoint(whole), checkpoint(part)
        for content in (a, b):
            del content["metrics"]["charts/gradient_steps_per_second"]
        assert_same(a, b)
        assert scalars(whole) == scalars(part)
    summary = json.loads((part / "summary.json").read_text())
    assert summary["losses/td"] == pytest.approx(scalars(part)["losses/td"][40])


def test_the_logged_loss_is_the_mean_since_the_last_measurement(played, monkeypatch):
    losses, update = [], study.update

    def watched(*values):
        metrics = update(*values)
        losses.append(float(metrics["losses/td"]))
        return metrics

    monkeypatch.setattr(study, "update", watched)
    logged = scalars(run("--replay", played, *TINY))["losses/td"]
    assert logged == pytest.approx({step: np.mean(losses[step - 10 : step]) for step in (10, 20, 30, 40)}, rel=1e-5)


def test_a_full_disk_is_one_line(played, monkeypatch, capsys):
    def full(*values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stopped:
        run("--replay", played, *TINY)
    errors = capsys.readouterr().err
    assert stopped.value.code == 1 and errors.count("\n") == 1 and "No space left on device" in errors


def test_a_loss_that_is_not_finite_ends_with_one_line(played, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--replay", played, *TINY, "--learning-rate", 1e12, "--loss", "mse")
    errors = capsys.readouterr().err
    assert stopped.value.code == 1 and errors.count("\n") == 1 and "is not finite at gradient step" in errors


# --- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, message", [
    ("", "--replay : is missing"),
    ("--replay nowhere", "--replay nowhere: is not a run of redo_dqn_atari.py"),
    ("--replay RUN --teacher RUN", "does nothing without --targets teacher"),
    ("--replay RUN --keep-adam", "--keep-adam True: does nothing without --student"),
    ("--replay RUN --targets random --target-network-frequency-gradient-steps 3", "does nothing without --targets"),
    ("--replay RUN --batch-size 0", "--batch-size 0: must lie between 1"),
    ("--replay RUN --exp-name a/b", "--exp-name a/b: is no valid folder name"),
    ("--resume nowhere", "--resume nowhere: is not the folder of a run"),
    ("--resume RUN", "it is one of redo_dqn_atari.py"),
    ("--resume RUN --seed 3", "takes no other flag"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(flags, message, played, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*flags.replace("RUN", str(played)).split())
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert os.listdir() == []


@pytest.mark.parametrize("change, flag, message", [
    ("game", "--student", "played ALE/Pong-v5, but the replay is of ALE/DemonAttack-v5"),
    ("game", "--teacher", "played ALE/Pong-v5, but the replay is of ALE/DemonAttack-v5"),
    ("width", "--teacher", "is not a run of redo_dqn_atari.py that can be used (RuntimeError"),
    ("network", "--student", "it is one of another script or network"),
    ("replay", "--replay", "its checkpoint contains no replay"), ("empty", "--replay", "contains no replay"),
    ("cut", "--replay", "is not a run of redo_dqn_atari.py"), ("unfinished", "--replay", "it is not finished"),
    ("unfinished", "--teacher", "it is not finished"),
])  # fmt: skip
def test_a_run_that_does_not_fit_is_refused(change, flag, message, played, capsys):
    shutil.copytree(played, "other")
    description, content = Path("other/args.json"), checkpoint(played)
    if change in ("replay", "empty"):
        content["replay"]["num_starts"] = 0
        if change == "replay":
            del content["replay"]
        torch.save(content, "other/checkpoint.pt")
    elif change == "unfinished":
        Path("other/summary.json").unlink()
    elif change == "cut":
        Path("other/checkpoint.pt").write_bytes(Path("other/checkpoint.pt").read_bytes()[:5000])
    else:
        old, new = {"game": ("DemonAttack", "Pong"), "width": ("0.125", "0.25"), "network": ("nature", "resnet")}[
            change
        ]
        description.write_text(description.read_text().replace(old, new))
    flags = ["--replay", "other"] if flag == "--replay" else ["--replay", played, "--targets", "teacher", flag, "other"]
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{flag} other: " in errors and message in errors and errors.count("\n") == 1


def test_two_processes_cannot_work_on_one_run(played, capsys):
    run_dir = run("--replay", played, *TINY)
    lock = open(run_dir / "lock", "w")
    study.fcntl.flock(lock, study.fcntl.LOCK_EX)
    with pytest.raises(SystemExit) as stopped:
        run("--resume", run_dir)
    assert stopped.value.code == 2 and "another process is working on this run" in capsys.readouterr().err


def test_a_copy_in_an_empty_folder_runs(played):
    shutil.copy(study.__file__, "mine.py")
    command = [sys.executable, "mine.py", "--replay", str(played), *TINY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "of the neurons are dormant (tau 0)" in done.stdout, done.stderr
