"""What the figures and the film of crl_deep.py look at: a finished run's agent, episodes that it plays, and what its
networks compute on them. Nothing of this is needed for training."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import crl_deep as crl

CPU = torch.device("cpu")


def load(run_dir: Path) -> tuple:
    """A run's folder -> its agent as in checkpoint.pt, its arguments, and how many steps it had taken. SystemExit where
    it has not been saved yet."""
    if not (run_dir / "checkpoint.pt").exists():
        raise SystemExit(f"error: {run_dir} has no checkpoint.pt yet")
    args = crl.Args(**json.loads((run_dir / "args.json").read_text())["args"])
    crl.set_precision(args.precision, CPU)  # as it was trained there, so that episodes can be played again
    robot = crl.ROBOTS[crl.parse_env_id(args.env_id)[0]]
    agent = crl.Agent(robot.state_dim, robot.goal_dim, robot.action_dim, args)
    saved = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    agent.load_state_dict(saved["agent"])
    return agent, args, saved["global_step"]


def play(agent, envs, number: int) -> dict:
    """The episodes of the evaluation of this number -> state, action and alive (T, num_envs, ...), goal and
    time_at_goal (num_envs, ...). alive: before the episode's first end."""
    envs.episode[:] = number
    envs.reset(np.ones(envs.num_envs, bool))
    alive, time_at_goal = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs)
    record = {"state": [], "action": [], "alive": []}
    while alive.any():
        action = crl.act(agent, envs, CPU, noise=False)
        for name, value in (("state", envs.state), ("action", action), ("alive", alive)):
            record[name].append(value.copy())
        done = envs.step(action)
        time_at_goal[alive] = envs.time_at_goal[alive]
        alive &= ~done
    record = {name: np.stack(values) for name, values in record.items()}
    return record | dict(goal=envs.goal.copy(), time_at_goal=time_at_goal)


def last_evaluation(run_dir: Path) -> tuple:
    """The evaluation at the end of a run, played again -> agent, environments, record."""
    agent, args, step = load(run_dir)
    envs = crl.MujocoEnvs(args.eval_env_id, args.eval_episodes, args.episode_length, (args.seed, 1))
    return agent, envs, play(agent, envs, step)


@torch.no_grad()
def value_map(agent, envs, record, points_per_cell: int = 8) -> dict:
    """The critic over the floor (Fig. 9): f(s, a, g) at the policy's mean a; s: the record's first state, but for x, y.

    -> x, y (m), goals (goals, goal_dim), values (goals, len(x), len(y)); walls (rows, columns) and cell size (m); paths
    (T, num_envs, goal_dim) of the record's episodes, with alive, goal and time_at_goal.
    """
    cell, goals = envs.robot.cell, np.unique(record["goal"], axis=0)
    if envs.maze:
        low, high = np.zeros(2), (np.array([len(envs.maze), len(envs.maze[0])]) - 1) * cell
    else:
        high, goals = np.full(2, envs.robot.goal_distance[1]), goals[:1]
        low = -high
    x, y = (np.linspace(a, b, int((b - a) / cell * points_per_cell) + 1) for a, b in zip(low, high))
    state = np.repeat(record["state"][0, :1], len(x) * len(y), axis=0)
    state[:, :2] = np.stack(np.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2)
    state, values = torch.from_numpy(state), []
    for g in torch.from_numpy(goals):
        action = torch.tanh(agent.actor(state, g.expand(len(state), -1))[0])
        values.append(-torch.linalg.vector_norm(agent.phi(state, action) - agent.psi(g[None]), dim=-1))
    values = torch.stack(values).view(len(goals), len(x), len(y)).numpy()
    walls = np.array([[c == "1" for c in row] for row in envs.maze])
    paths = dict(paths=record["state"][..., : envs.robot.goal_dim])
    paths |= {name: record[name] for name in ("alive", "goal", "time_at_goal")}
    return dict(x=x, y=y, goals=goals, values=values, walls=walls, cell=cell) | paths


@torch.no_grad()
def embeddings(agent, record) -> dict:
    """phi(s, a) (T, repr_dim) along the recorded episode that spent most time at its goal (Fig. 10), and distance (T,)
    to that goal in m."""
    best = record["time_at_goal"].argmax()
    state, action = (torch.from_numpy(record[name][record["alive"][:, best], best]) for name in ("state", "action"))
    goal = record["goal"][best]
    distance = np.linalg.norm(state[:, : len(goal)].numpy() - goal, axis=1)
    return dict(phi=agent.phi(state, action).numpy(), distance=distance)


def training_batch(agent, args) -> tuple:
    """A batch as in training, but all of it from the agent as it is: an episode's length of its noisy policy in every
    training environment, relabelled with future goals -> state, action, goal."""
    torch.manual_seed(args.seed)
    envs = crl.MujocoEnvs(args.env_id, args.num_envs, args.episode_length, (args.seed, 2))
    robot = envs.robot
    dims = robot.state_dim, robot.goal_dim, robot.action_dim
    replay = crl.Replay(args.episode_length, args.num_envs, *dims, CPU)
    envs.reset(np.ones(args.num_envs, bool))
    for _ in range(args.episode_length):
        action = crl.act(agent, envs, CPU)
        replay.add(envs.state, action, envs.episode)
        envs.reset(envs.step(action))
    indices = replay.sample(1, args.batch_size, args.episode_length, args.gamma)
    return replay.gather(*(index[0] for index in indices))


@torch.no_grad()
def residual_norms(agent, batch) -> dict:
    """Network -> the mean L2 norm of what each of its residual blocks adds to its input, on a batch (Fig. 17)."""
    state, action, goal = batch
    norms = {}
    for name, network, inputs in (
        ("actor", agent.actor.trunk, [state, goal]), ("goal_encoder", agent.goal_encoder, [goal]),
        ("state_action_encoder", agent.state_action_encoder, [state, action]),
    ):  # fmt: skip
        hidden, norms[name] = network.stem(torch.cat(inputs, -1)), []
        for block in network.blocks:
            residual = block.layers(hidden)
            norms[name].append(float(residual.norm(dim=-1).mean()))
            hidden = hidden + residual if block.residual else residual
    return norms
