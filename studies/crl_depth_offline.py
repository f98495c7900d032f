# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "mujoco==3.17.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
# ]
# ///
"""Depth without exploration: contrastive critics of different depth learn from one fixed set of data. A laptop's view
of 1000 Layer Networks for Self-Supervised RL (Wang et al., NeurIPS 2025, arXiv 2503.14858), in the spirit of Fig. 8.

The paper's agents get better as their networks get deeper. Deeper networks also collect other data, so the paper lets
learners of different depth share one collector (Fig. 8). Here the data are fixed: 1536 paths of a point mass through a
maze, 200 steps of 0.15 s each, led from one random cell to the next, and 40% of the time by random actions instead.
The critic says how soon action a in state s leads to goal g: f(s, a, g) = -||phi(s, a) - psi(g)||_2. The goal of a pair
(s_t, a_t) is where the point mass is k steps later, k ~ Geometric(1 - gamma), truncated             -> `future_offset`
    L = -mean_i [ f_ii - log sum_j exp f_ij ] + 0.1 mean_i (log sum_j exp f_ij)^2                         -> `info_nce`
phi and psi are residual networks; "depth" counts the Dense layers inside their blocks:        -> `ContrastiveEncoder`
    h <- h + block(h),   block = 4 x (Dense, LayerNorm, Swish)
There is no actor: the policy takes the best of 9 actions, argmax_a f(s, a, g), on the way to 128 goals.  -> `evaluate`

    python studies/crl_depth_offline.py --depth 32                 two minutes on one core; --depth 4: one
    SCALE=paper bash benchmark/crl_deep/depth_offline_fig8.sh      all depths; a second maze, a second set of data; as
                                                                   controls, wide networks and longer training
What it shows is expressivity alone: smooth gains, no critical depth, and not the factors of 2 to 50 of Fig. 1. In the
online loop of crl_deep.py we have found no effect of depth on this body: there, its agents fail at exploration.
Data, maze, body and greedy policy are ours. The learner differs from crl_deep.py's in that its learning rate falls
linearly to 0 over the last 40% of the gradient steps, in width (32) and batch size (256), and in gamma, 0.97, because
the steps are three times as long.
"""

import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import numpy as np
import torch
import torch.nn as nn

Count = Annotated[int, (1, 10**9)]  # (lowest, highest) value; check_args refuses any other
Share = Annotated[float, (0, 1)]


@dataclass
class Args:
    """Contrastive critics on fixed data of a point mass in a maze. Everything runs on the CPU, in one thread."""

    exp_name: str = "crl_depth_offline"  # name of this experiment, part of the run folder's name
    seed: Annotated[int, (0, 2**32 - 1)] = 1  # seeds initial weights and batches

    # data
    maze: Literal["hardest_maze", "big_maze"] = "hardest_maze"  # starts and goals are in all of its cells
    data_seed: Annotated[int, (0, 2**32 - 1)] = 1  # seeds the data, the held-out paths, starts and goals
    num_paths: Count = 1536  # paths that are learned from
    path_length: Annotated[int, (2, 10**5)] = 200  # steps of a path
    random_share: Share = 0.4  # of the time, a path follows random actions, each held for a while

    # learning
    depth: Annotated[int, (4, 4096)] = 4  # Dense layers inside the residual blocks of phi and of psi, a multiple of 4
    width: Count = 32  # units of a hidden layer
    gradient_steps: Count = 6000  # of the whole run
    batch_size: Annotated[int, (2, 10**5)] = 256  # pairs (s, a) per gradient step, with their goals
    learning_rate: Annotated[float, (0, 1)] = 1e-3  # Adam's, before it falls
    gamma: Annotated[float, (1e-6, 0.999999)] = 0.97  # a goal lies Geometric(1 - gamma) steps ahead
    logsumexp_coef: Annotated[float, (0, 1e6)] = 0.1  # weight of mean(logsumexp^2) in the loss
    repr_dim: Annotated[int, (1, 10**5)] = 64  # dimension of phi(s, a) and psi(g)

    # evaluation, the same starts, goals and held-out paths for every seed
    eval_every: Count = 2000  # gradient steps between evaluations; one more at the end
    eval_episodes: Annotated[int, (32, 10**5)] = 128  # pairs of start and goal
    eval_steps: Count = 150  # steps that the policy has for each


# 1: wall, 0: free. Rows run along x, columns along y; a cell's centre is (row, column) * CELL
MAZES = {
    "hardest_maze": "111111111111 100001000001 101101010101 100000010001 101111011101 100101000001 110101010111 "
    "100100010001 111111111111",
    "big_maze": "11111111 10011001 10010001 11000111 10010001 10100101 10001001 11111111",
}
SCRIPT = "crl_depth_offline"
CELL, GOAL_RADIUS = 2.0, 0.5  # m
PHYSICS_STEP, PHYSICS_STEPS = 0.01, 15  # s, and how many make a step
ACTIONS = torch.tensor([(x, y) for x in (-1.0, 0.0, 1.0) for y in (-1.0, 0.0, 1.0)])  # what the policy chooses from


# === The maze and its data ============================================================================================
class PointMaze:
    """Copies of crl_deep.py's point mass in a maze, stepped together by MuJoCo: 5 N on 1.327 kg, radius 0.25 m, no
    damping, no friction. state (num, 4) float32: position and velocity."""

    def __init__(self, maze: str, num: int):
        import mujoco.rollout

        walls = np.array([[cell == "1" for cell in row] for row in MAZES[maze].split()])
        box = '<geom type="box" size="{0} {0} .5" pos="{1} {2} .5" contype="0" condim="1"/>'
        boxes = [box.format(CELL / 2, CELL * row, CELL * column) for row, column in np.argwhere(walls)]
        axes = dict(x="1 0 0", y="0 1 0")
        joints = [f'<joint name="{x}" type="slide" axis="{axis}" armature="1"/>' for x, axis in axes.items()]
        motors = [f'<motor joint="{x}" gear="5" ctrlrange="-1 1"/>' for x in axes]
        self.model = mujoco.MjModel.from_xml_string(f"""<mujoco> <option timestep="{PHYSICS_STEP}"/>
            <worldbody> {"".join(boxes)}
              <body pos="0 0 .25"> {"".join(joints)} <geom type="sphere" size=".25" mass=".327" condim="1"/> </body>
            </worldbody> <actuator> {"".join(motors)} </actuator> </mujoco>""")
        self.rollout, self.data = mujoco.rollout.Rollout(nthread=1), [mujoco.MjData(self.model)]
        self.cells = np.argwhere(~walls)  # (cells, 2)
        self.cell_at = np.full(walls.shape, -1)
        self.cell_at[tuple(self.cells.T)] = np.arange(len(self.cells))
        self.distance, self.towards = self.shortest_paths()
        self.physics = np.zeros((num, 5))  # time, position, velocity

    def shortest_paths(self) -> tuple:
        """For each cell and goal (cells, cells): the number of steps between them, and the next cell on the way."""
        neighbours = np.abs(self.cells[:, None] - self.cells).sum(-1) == 1
        distance = np.full(neighbours.shape, -1)
        towards = np.zeros(neighbours.shape, int)
        for goal in range(len(self.cells)):
            distance[goal, goal], towards[goal, goal] = 0, goal
            queue = [goal]
            for cell in queue:
                for neighbour in np.flatnonzero(neighbours[cell] & (distance[:, goal] < 0)):
                    distance[neighbour, goal] = distance[cell, goal] + 1
                    towards[neighbour, goal] = cell
                    queue.append(neighbour)
        return distance, towards

    @property
    def state(self) -> np.ndarray:
        return self.physics[:, 1:].astype(np.float32)

    def centre(self, cell: np.ndarray) -> np.ndarray:
        return self.cells[cell] * CELL

    def cell(self) -> np.ndarray:
        """The cell (num,) that each point mass is in."""
        return self.cell_at[tuple(np.round(self.physics[:, 1:3] / CELL).astype(int).T)]

    def reset(self, cell: np.ndarray, rng) -> None:
        """Begins in these cells (num,), within 0.1 m of the centre, at about 0.1 m/s."""
        self.physics[:] = 0
        self.physics[:, 1:3] = self.centre(cell) + rng.uniform(-0.1, 0.1, (len(cell), 2))
        self.physics[:, 3:] = 0.1 * rng.standard_normal((len(cell), 2))

    def step(self, action: np.ndarray) -> None:
        """action (num, 2) in [-1, 1], held for 0.15 s."""
        control = np.repeat(action[:, None], PHYSICS_STEPS, axis=1)
        states, _ = self.rollout.rollout(self.model, self.data, self.physics, control)
        self.physics[:] = states[:, -1]


def collect_paths(maze: str, num: int, length: int, random_share: float, seed: list) -> tuple:
    """Paths from random cells to one random cell after another -> states (length, num, 4), actions (length, num, 2).

    The controller heads for the next cell on the shortest path, with noise; every 3 to 14 steps it is decided anew
    whether it does, or whether a random action is held instead.
    """
    rng, point = np.random.default_rng(seed), PointMaze(maze, num)
    cells = len(point.cells)
    goal, left, wild, held = rng.integers(cells, size=num), np.zeros(num, int), np.zeros(num, bool), np.zeros((num, 2))
    point.reset(rng.integers(cells, size=num), rng)
    states, actions = torch.zeros(length, num, 4), torch.zeros(length, num, 2)
    for t in range(length):
        state, cell = point.state, point.cell()
        arrived = cell == goal
        goal[arrived] = rng.integers(cells, size=arrived.sum())
        new = left == 0
        left[new] = rng.integers(3, 15, new.sum())
        wild[new] = rng.random(new.sum()) < random_share
        held[new] = rng.uniform(-1, 1, (new.sum(), 2))
        left -= 1
        ahead = point.centre(point.towards[cell, goal]) - state[:, :2]
        ahead /= np.linalg.norm(ahead, axis=1, keepdims=True) + 1e-6
        chosen = np.where(wild[:, None], held - 0.15 * state[:, 2:], 0.8 * (2.5 * ahead - state[:, 2:]))
        action = (chosen + 0.3 * rng.standard_normal((num, 2))).clip(-1, 1)
        states[t], actions[t] = torch.from_numpy(state), torch.from_numpy(action)
        point.step(action)
    return states, actions


def future_offset(remaining: torch.Tensor, uniform: torch.Tensor, gamma: float) -> torch.Tensor:
    """How many steps ahead the goal lies: Geometric(1 - gamma), truncated to the `remaining` steps of the episode.

    P(k) is proportional to gamma^k, k = 1..n, by inverting its distribution function at `uniform` (float64, in [0, 1)):
    k = ceil(log(1 - u (1 - gamma^n)) / log gamma). An episode's last step (n = 0) is its own goal. Same shapes.
    """
    log_gamma = float(np.log(gamma))
    offset = torch.ceil(torch.log1p(uniform * torch.expm1(remaining * log_gamma)) / log_gamma)
    return torch.minimum(offset.clamp(min=1), remaining).long()


def sample_batch(states, actions, batch_size: int, gamma: float, generator) -> tuple:
    """Random pairs of state and action (batch, 6), and the goals (batch, 2) that these paths reach later."""
    length, num, _ = states.shape
    path = torch.randint(num, (batch_size,), generator=generator)
    t = torch.randint(length - 1, (batch_size,), generator=generator)
    uniform = torch.rand(batch_size, dtype=torch.float64, generator=generator)
    goal_time = t + future_offset(length - 1 - t, uniform, gamma)
    return torch.cat([states[t, path], actions[t, path]], 1), states[goal_time, path, :2]


# === The critic =======================================================================================================
def hidden_layers(inputs: int, width: int, number: int) -> nn.Sequential:
    layers = nn.Sequential()
    for _ in range(number):
        layers.extend([nn.Linear(inputs, width), nn.LayerNorm(width, eps=1e-6), nn.SiLU()])
        inputs = width
    return layers


class ContrastiveEncoder(nn.Module):
    """(batch, inputs) -> a hidden layer, depth / 4 residual blocks of 4 hidden layers, a linear layer -> (batch,
    outputs). Initial weights are U(-1, 1) / sqrt(fan_in), biases 0."""

    def __init__(self, inputs, outputs, width, depth):
        super().__init__()
        self.stem = hidden_layers(inputs, width, 1)
        self.blocks = nn.ModuleList([hidden_layers(width, width, 4) for _ in range(depth // 4)])
        self.head = nn.Linear(width, outputs)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.uniform_(layer.weight, -(layer.in_features**-0.5), layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def info_nce(phi: torch.Tensor, psi: torch.Tensor) -> tuple:
    """Which goal of the batch belongs to which pair? phi, psi (batch, repr_dim) -> -mean_i [f_ii - logsumexp_j f_ij],
    logsumexp_j f_ij (batch,), and the share of pairs whose own goal has the largest f. f_ij = -||phi_i - psi_j||_2."""
    own = -torch.linalg.vector_norm(phi - psi, dim=1)  # cdist loses digits of small distances
    energy = -torch.cdist(phi, psi).diagonal_scatter(-own)
    logsumexp = energy.logsumexp(1)
    accuracy = (energy.argmax(1) == torch.arange(len(phi))).float().mean()
    return (logsumexp - own).mean(), logsumexp, accuracy


# === Evaluation =======================================================================================================
@torch.no_grad()
def evaluate(phi, psi, held_out: list, args) -> dict:
    """Plays the greedy policy to eval_episodes goals, and takes the loss on held-out batches of 512 -> metrics.

    success: the share of goals that were reached, within 0.5 m, at any time; far: the half that is farther away.
    """
    rng, point = np.random.default_rng([5, args.data_seed]), PointMaze(args.maze, args.eval_episodes)
    apart = np.argwhere(point.distance > 0)
    start, goal = apart[rng.integers(len(apart), size=args.eval_episodes)].T
    steps_apart = point.distance[start, goal]
    point.reset(start, rng)
    goal_at = point.centre(goal)
    goal_code = psi(torch.from_numpy(goal_at).float())
    time_at_goal = np.zeros(args.eval_episodes)
    for _ in range(args.eval_steps):
        state = torch.from_numpy(point.state)[:, None].expand(-1, len(ACTIONS), -1)
        pairs = torch.cat([state, ACTIONS.expand(len(state), -1, -1)], -1)
        energy = -torch.linalg.vector_norm(phi(pairs) - goal_code[:, None], dim=-1)
        point.step(ACTIONS[energy.argmax(1)].numpy())
        time_at_goal += np.linalg.norm(point.physics[:, 1:3] - goal_at, axis=1) < GOAL_RADIUS
    reached, far = time_at_goal > 0, steps_apart > np.median(steps_apart)
    losses = np.array([[float(x) for x in (loss, accuracy)] for loss, _, accuracy in
                       (info_nce(phi(pairs), psi(goals)) for pairs, goals in held_out)])  # fmt: skip
    return {
        "eval/nce": losses[:, 0].mean(), "eval/accuracy": losses[:, 1].mean(), "eval/success": reached.mean(),
        "eval/success_far": reached[far].mean(), "eval/time_at_goal": time_at_goal.mean(),
    }  # fmt: skip


@torch.no_grad()
def critic_map(phi, psi, maze: str, points_per_cell: int = 8) -> dict:
    """The critic over the floor, at rest, at the best action, for the first and the last cell as goals (as Fig. 9) ->
    x (points,), y (points,), goals (2, 2), values (2, points, points), walls (rows, columns)."""
    point = PointMaze(maze, 1)
    rows, columns = point.cell_at.shape
    x, y = (np.linspace(0, CELL * (n - 1), points_per_cell * (n - 1) + 1) for n in (rows, columns))
    floor = torch.from_numpy(np.stack(np.meshgrid(x, y, indexing="ij"), -1)).float()
    state = torch.cat([floor, torch.zeros_like(floor)], -1)[..., None, :].expand(-1, -1, len(ACTIONS), -1)
    codes = phi(torch.cat([state, ACTIONS.expand(*state.shape[:2], -1, -1)], -1))
    goals = point.centre(np.array([0, len(point.cells) - 1]))
    values = [-torch.linalg.vector_norm(codes - psi(torch.from_numpy(goal).float()), dim=-1) for goal in goals]
    return dict(x=x, y=y, goals=goals, values=torch.stack(values).amax(-1).numpy(), walls=point.cell_at < 0)


# === Learning =========================================================================================================
def train(args: Args) -> Path:
    """Trains, logs to a new folder under runs/, and returns that folder."""
    check_args(args)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # on a CPU numbers too small for float32's normal range are slow
    torch.manual_seed(args.seed)
    batch_rng = torch.Generator().manual_seed(derived_seed(args.seed, 2, 0))
    paths = collect_paths(args.maze, args.num_paths, args.path_length, args.random_share, [args.data_seed, 0])
    others = collect_paths(args.maze, 128, args.path_length, args.random_share, [args.data_seed, 1])
    held_out_rng = torch.Generator().manual_seed(0)
    held_out = [sample_batch(*others, 512, args.gamma, held_out_rng) for _ in range(8)]
    phi = ContrastiveEncoder(6, args.repr_dim, args.width, args.depth)
    psi = ContrastiveEncoder(2, args.repr_dim, args.width, args.depth)
    weights = [*phi.parameters(), *psi.parameters()]
    optimizer = torch.optim.Adam(weights, lr=args.learning_rate, fused=True)

    run_dir, writer = make_run_folder(args)
    start_time = time.process_time()
    for step in range(args.gradient_steps):
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1, (1 - step / args.gradient_steps) / 0.4)
        pairs, goals = sample_batch(*paths, args.batch_size, args.gamma, batch_rng)
        nce, logsumexp, _ = info_nce(phi(pairs), psi(goals))
        loss = nce + args.logsumexp_coef * logsumexp.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.gradient_steps:
            metrics = {"charts/cpu_seconds": time.process_time() - start_time, "losses/nce": nce.detach()}
            metrics |= evaluate(phi, psi, held_out, args)
            metrics = {tag: float(value) for tag, value in metrics.items()}
            for tag, value in metrics.items():
                writer.add_scalar(tag, value, step + 1)
            if not math.isfinite(metrics["losses/nce"]):
                print(f"{SCRIPT}.py: the loss is not finite, at gradient step {step + 1} or earlier", file=sys.stderr)
                raise SystemExit(1)
    writer.close()
    np.savez_compressed(run_dir / "critic_map.npz", **critic_map(phi, psi, args.maze))
    write_summary(run_dir, dict(parameters=sum(weight.numel() for weight in weights)) | metrics)
    return run_dir


# === Housekeeping: arguments, files ===================================================================================
def derived_seed(*numbers: int) -> int:
    """A seed derived from numbers: the run's seed, what it is for (0 training, 1 evaluation, 2 a stream of random
    numbers), and which one of these. Below 2**32, because torch's CPU generators ignore all higher bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def refuse(flag: str, value: object, limit: str) -> None:
    """Ends the program because of a user's mistake: one line on stderr, exit code 2."""
    line = f"{SCRIPT}.py: error: --{flag.replace('_', '-')} {value}: {limit}"
    print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(2)


def check_args(args: Args) -> None:
    """Refuses what cannot work, before anything is allocated or written."""
    for name, hint in get_type_hints(Args, include_extras=True).items():
        for low, high in getattr(hint, "__metadata__", ()):
            if not low <= getattr(args, name) <= high:
                refuse(name, getattr(args, name), f"must lie between {low} and {high}")
    if not args.exp_name.isprintable() or set(args.exp_name) & set("/*?["):
        refuse("exp_name", args.exp_name, "is no name for a folder")
    if args.depth % 4:
        refuse("depth", args.depth, "must be a multiple of 4")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = dict(num_paths=24.0 * args.num_paths * args.path_length, width=40.0 * args.depth * args.width**2,
                  batch_size=40.0 * args.batch_size * (args.batch_size + args.depth * args.width))  # fmt: skip
    if sum(needed.values()) > memory:
        name = max(needed, key=needed.get)
        refuse(name, getattr(args, name), f"the run needs about {sum(needed.values()) / 1e9:.1f} GB of memory")


def make_run_folder(args: Args) -> tuple:
    """Creates the run's folder, with this script and args.json -> the folder, its TensorBoard writer."""
    from torch.utils.tensorboard import SummaryWriter

    run_dir = Path("runs") / f"{SCRIPT}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
    try:
        run_dir.mkdir(parents=True)
    except OSError as error:
        refuse("exp_name", args.exp_name, f"cannot create the folder {run_dir} ({error.strerror})")
    shutil.copy(__file__, run_dir)
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
    description = dict(script=SCRIPT, action_repeat=1, args=asdict(args), versions=versions)
    (run_dir / "args.json").write_text(json.dumps(description, indent=2))
    return run_dir, SummaryWriter(str(run_dir))


def write_summary(run_dir: Path, summary: dict) -> None:
    """Writes summary.json, whole or not at all: with it the run counts as finished."""
    (run_dir / "summary.tmp").write_text(json.dumps(summary, indent=2))
    os.replace(run_dir / "summary.tmp", run_dir / "summary.json")
    print(f"{run_dir}: reached {summary['eval/success']:.0%} of the goals, held-out loss {summary['eval/nce']:.3f}")


if __name__ == "__main__":
    import tyro

    train(tyro.cli(Args))
