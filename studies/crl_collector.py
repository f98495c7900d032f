# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "mujoco==3.17.0",
#     "gymnasium==1.4.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "moviepy==2.2.1",
# ]
# ///
"""1000 Layer Networks for Self-Supervised RL (Wang, Javali, Bortkiewicz, Trzcinski, Eysenbach; NeurIPS 2025,
arXiv 2503.14858), Figure 8: do deep networks reach more goals because they explore better, or because they learn more
from the same data? One agent, the collector, acts; two others, a deep and a shallow one, learn from its data and
never act. All three are the contrastive agents of crl_deep.py, and learn from the same batches:
    f(s, a, g) = -||phi(s, a) - psi(g)||_2
    L_critic = -mean_i [ f_ii - log sum_j exp f_ij ] + 0.1 mean_i (log sum_j exp f_ij)^2       -> `contrastive_loss`
    L_actor = mean [ alpha log pi(a|s,g) - f(s, a, g) ],   L_alpha = alpha mean [ -log pi(a|s,g) + dim(a) / 2 ]
A training step: the collector takes 62 steps in each of 512 environments, then each of the three takes 800 gradient
steps, with the same pairs and goals                                                                        -> `train`
The paper: behind a deep collector (depth 32) the deep learner is far better than the shallow one (depth 4); behind a
shallow collector both are alike, and bad. So depth helps twice: it collects better data, and makes better use of them.

    SCALE=small bash benchmark/crl_deep/fig8_collector.sh       the point mass in a U-maze, two CPU cores
    python studies/crl_collector.py                             in a room: collector and deep learner of depth 16
    python studies/crl_collector.py --env-id ant_big_maze --collector-depth 4     the paper's size: for a GPU, not run

Differences from the official code: it has no such experiment. Beyond crl_deep.py's, none: what it says of environments,
networks, losses and goals holds here. That all learn from the very same batches is our choice. All draw from
one stream of random numbers, so that other learners make another collector, too. Not here: the arm task.
Your own learner: an entry of `depths` in `train`. What is saved: `parts` and counters in `train`, between training
steps. Ctrl-C finishes the current one, so that a resumed run equals, bit for bit, one that was never stopped.
"""

import copy
import ctypes
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

Count = Annotated[int, (1, 10**12)]  # lowest and highest value; check_values refuses any other
NonNegative = Annotated[float, (0, 1e12)]


@dataclass
class RunArgs:
    """Options that do not affect learning: a resumed run may change them."""

    resume: str | None = None  # folder of the run to continue; flags that are not given come from its args.json
    total_timesteps: Count = 1_000_000  # steps of the whole run
    eval_every: Count = 10_000  # steps between evaluations, at the next end of an episode; one more at the end
    checkpoint_every: Count = 250_000  # steps between checkpoints, at the next end of an episode; one more at the end
    checkpoint_replay: Literal["never", "unfinished", "always"] = "unfinished"  # when checkpoints contain the replay
    save_model: bool = False  # at the end, save the weights alone as model.pt
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks live; auto: the GPU, if there is one
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"  # where the replay lives; auto: on the GPU, if it fits
    compile: bool = False  # compile the networks
    cudagraphs: bool = False  # capture the whole update in one CUDA graph, and replay it for each batch
    torch_deterministic: bool = False  # deterministic GPU kernels (CPU runs are bit-identical without this)
    capture_video: bool = False  # film an episode of every evaluation: films/<step>.mp4 in the run's folder
    track: bool = False  # log to Weights & Biases, too: pip install wandb, and set WANDB_PROJECT and WANDB_ENTITY


@dataclass
class Args(RunArgs):
    """A collector and two learners. A step is one action in one environment. The defaults are the paper's (Table 7);
    the point mass and some mazes have others: see TASKS."""

    exp_name: str = "crl_collector"  # name of this experiment, part of the run folder's name
    seed: Annotated[int, (0, 2**32 - 1)] = 1  # seeds python, numpy, torch and every reset
    precision: Literal["float32", "tf32", "bfloat16"] = "tf32"  # of products; tf32 (GPUs), bfloat16 (updates): faster

    # Environment
    env_id: str = "point_room"  # <point|ant|humanoid>, alone or with _<maze>: ant_u4_maze, humanoid, point_room, ...
    eval_env_id: str = "point_room"  # from TASKS: the maze's far goals (..._eval), if the paper has such a set
    episode_length: Annotated[int, (2, 10**12)] = 1000  # time limit in steps of one environment
    num_envs: Count = 512  # training environments, stepped side by side

    # Rhythm: a training step takes num_envs * unroll_length steps, and then gradient_steps updates
    total_timesteps: Count = 100_000_000  # steps of the whole run
    unroll_length: Count = 62  # steps of each environment per training step
    gradient_steps: Count = 800  # gradient steps per training step
    buffer_size: Count = 5_120_000  # steps in the replay
    learning_starts: Count = 512_000  # steps before the first gradient step
    eval_every: Count = 1_000_000  # steps between evaluations, at the next end of a training step; one more at the end
    eval_episodes: Count = 128  # evaluation environments, one episode each
    checkpoint_every: Count = 2_000_000  # steps between checkpoints, after the next training step; one more at the end

    # Contrastive RL
    batch_size: Count = 512  # state-action-goal triples per gradient step; each goal is a negative for all others
    learning_rate: NonNegative = 3e-4  # Adam's, for actor, temperature and critic
    gamma: Annotated[float, (1e-6, 1 - 1e-6)] = 0.99  # a goal lies Geometric(1 - gamma) steps ahead; no bootstrapping
    logsumexp_coef: NonNegative = 0.1  # weight of mean(logsumexp^2) in the critic's loss
    entropy_coef: Annotated[float, (-1e12, 1e12)] = 0.5  # the target entropy is minus this, per action dimension
    repr_dim: Count = 64  # dimension of phi(s, a) and psi(g)

    # Networks
    width: Count = 256  # hidden units per layer
    collector_depth: Count = 32  # Dense layers in the blocks of each network of the agent that acts, a multiple of 4
    deep: Count = 32  # those of the deep learner
    shallow: Count = 4  # those of the shallow learner

    def task_defaults(self) -> dict:
        """Those of the environment, or else of its robot; and what follows from other flags."""
        robot = self.env_id.partition("_")[0]
        far_goals = self.env_id.partition("_gen_")[0] + "_eval"
        follows = dict(eval_env_id=far_goals if far_goals in ENV_IDS else self.env_id)
        return TASKS.get(self.env_id, TASKS.get(robot, {})) | follows


# What differs from the defaults: laptop-sized runs of the point mass, and the longer runs of Fig. 1
POINT = dict(total_timesteps=400_000, num_envs=64, episode_length=300, unroll_length=50, gradient_steps=100, width=64,
             learning_rate=1e-3, buffer_size=400_000, learning_starts=19_200, eval_every=22_400,
             checkpoint_every=50_000, collector_depth=16, deep=16)  # fmt: skip
LONG = dict(total_timesteps=400_000_000, eval_every=4_000_000, checkpoint_every=8_000_000)
TASKS = {
    "point": POINT,
    "point_room": POINT | dict(total_timesteps=100_000, episode_length=150, learning_starts=9_600, eval_every=9_600),
    "ant_hardest_maze": dict(total_timesteps=200_000_000, eval_every=2_000_000, checkpoint_every=4_000_000),
    "ant_u5_maze": LONG, "humanoid_u_maze": LONG, "humanoid_big_maze": LONG,
}  # fmt: skip
SCRIPT, ACTION_REPEAT = "crl_collector", 1
GOAL_RADIUS, EASY_GOAL_RADIUS = 0.5, 2.0  # m
LOG_STD_MIN, LOG_STD_MAX = -5, 2


# === Environments: a point mass, an ant or a humanoid, on an open floor or in a maze, simulated by MuJoCo =============
# (To understand the algorithm, go on at "Replay".)
# 1 wall, 0 floor, R start. The goals in training: g h G E; in <maze>_eval, the far ones: G E, for the humanoid h, too;
# in <maze>_single_eval: E. Rows run along x, columns along y; a cell's centre is (row, column)
# times the cell's size. A maze whose name begins with u is a corridor without forks.
MAZES = {
    "room": "1111111 1ggggg1 1ggggg1 1ggRgg1 1ggggg1 1ggggg1 1111111",
    "u_maze": "11111 1Rgg1 111g1 1EGG1 11111",
    "u2_maze": "111111 1Rggg1 1111g1 1GGGG1 111111",
    "u3_maze": "1111111 1Rgggg1 11111g1 1EGGGG1 1111111",
    "u4_maze": "11111 1ggg1 1R1g1 111g1 1G1g1 1GGG1 11111",
    "u5_maze": "11111111 1gggggg1 1R1111g1 111111g1 1E1111G1 1GGGGGG1 11111111",
    "u6_maze": "1111111 1ggggg1 1R111g1 11111g1 1G111G1 1GGGGG1 1111111",
    "u7_maze": "111111 1gggg1 1R11g1 1111g1 1G11G1 1GGGG1 111111",
    "big_maze": "11111111 1Rg11GG1 1gg1ghG1 11ggg111 1gg1ggg1 1g1Gg1G1 1gGG1GG1 11111111",
    "hardest_maze": "111111111111 1Rggg1ggggg1 1g11g1g1g1g1 1gggggg1ggg1 1g1111g111g1 1gg1g1ggggg1 11g1g1g1g111 "
                    "1gg1ggg1ggg1 111111111111",
}  # fmt: skip
GOALS = {"": "ghGE", "_eval": "GE", "_single_eval": "E"}  # the end of a layout's name -> letters that are goals

# The point mass of JaxGCRL's simple maze: 5 N on 0.327 kg + 1 kg armature, no damping, radius 0.25 m.
POINT_XML = """<mujoco> <worldbody>
  <light pos="0 0 30" dir="0 0 -1"/>
  <geom type="plane" size="40 40 1" contype="0" conaffinity="0" rgba=".9 .9 .9 1"/>
  <body pos="0 0 0.25">
    <joint name="x" type="slide" axis="1 0 0" armature="1"/> <joint name="y" type="slide" axis="0 1 0" armature="1"/>
    <geom type="sphere" size="0.25" mass="0.327" condim="1" rgba=".2 .4 .8 1"/>
  </body> </worldbody>
  <actuator> <motor joint="x" gear="5" ctrlrange="-1 1"/> <motor joint="y" gear="5" ctrlrange="-1 1"/> </actuator>
</mujoco>"""


class Robot(NamedTuple):
    xml: str  # a file of the installed gymnasium package, or the XML itself
    state_dim: int
    goal_dim: int  # a goal is the first goal_dim numbers of a state: (x, y) or (x, y, z)
    action_dim: int
    cell: float  # maze cell, m
    reset_noise: float  # U(-noise, noise) on every position, noise * N(0, 1) on every velocity
    healthy_height: tuple  # the episode ends when the torso's height leaves this range, m
    goal_distance: tuple  # on the open floor: the goal's distance from the start, m
    physics_step: float  # s
    physics_steps: int  # per env step
    gear: float | None = None  # of every motor, N m at full control; None: the XML's own
    qpos: tuple = ()  # initial positions; (): the XML's own
    goal_height: float = 0.0  # of a goal (x, y, z), m


# Uniform random actions on the open floor, here and (in brackets) with Brax; more in benchmark/crl_deep/README.md
#            steps per fall   median height, m   median speed, m/s
# ant         1,580 (1,803)      0.591 (0.586)       0.586 (0.839)   gear and physics step were chosen for this; with
# humanoid       26   (102)      1.246 (1.221)       0.260 (0.295)   gymnasium's, 150 and 0.01 s, a fall per 108 steps
ROBOTS = {
    "point": Robot(POINT_XML, state_dim=4, goal_dim=2, action_dim=2, cell=2.0, reset_noise=0.1,
                   healthy_height=(-np.inf, np.inf), goal_distance=(1.0, 5.0), physics_step=0.01, physics_steps=5),
    "ant": Robot("ant.xml", state_dim=29, goal_dim=2, action_dim=8, cell=4.0, reset_noise=0.1,
                 healthy_height=(0.2, 1.0), goal_distance=(10.0, 10.0), physics_step=0.005, physics_steps=10,
                 gear=75.0, qpos=(0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1)),
    "humanoid": Robot("humanoid.xml", state_dim=272, goal_dim=3, action_dim=17, cell=2.0, reset_noise=0.0,
                      healthy_height=(1.0, 2.0), goal_distance=(1.0, 5.0), physics_step=0.003, physics_steps=5,
                      goal_height=1.25),
}  # fmt: skip


def maze_rows(robot: str, layout: str) -> list:
    """The rows of a layout like u_maze, u_maze_eval or u_maze_single_eval, of 1, 0, R and G; "" has none."""
    name = layout.removesuffix("_eval").removesuffix("_single")
    goals = GOALS[layout.removeprefix(name)]
    if robot == "humanoid":
        goals += "h"
    kind = dict.fromkeys(goals, "G") | {"1": "1", "R": "R"}
    return ["".join(kind.get(cell, "0") for cell in row) for row in MAZES.get(name, "").split()]


ENV_IDS = []
for robot_name in ROBOTS:
    ENV_IDS.append(robot_name)
    for maze, cells in MAZES.items():
        for ending, letters in GOALS.items():
            if set(letters) & set(cells):
                ENV_IDS.append(f"{robot_name}_{maze}{ending}")


def corridor(rows: list) -> list:
    """Cells (row, column) of a maze without forks, from the start cell to its far end."""
    free = {(i, j): c for i, row in enumerate(rows) for j, c in enumerate(row) if c != "1"}
    path = [cell for cell, c in free.items() if c == "R"]
    while True:
        i, j = path[-1]
        ahead = [c for c in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)) if c in free and c not in path]
        if not ahead:
            return path
        path.append(ahead[0])


def parse_env_id(env_id: str) -> tuple:
    """Environment id -> (robot, layout or "" for the open floor, stitching distances). ValueError for an unknown id.

    `ant_u_maze_gen_1f2f3f` (Fig. 11): start and goal are 1, 2 or 3 cells apart, anywhere along the corridor.
    """
    base, gen, config = env_id.partition("_gen_")
    robot, _, layout = base.partition("_")
    distances = tuple(int(d) for d in re.findall(r"(\d)f", config))
    known = base in ENV_IDS
    if known and gen:
        corridors = re.fullmatch(r"u\d?_maze", layout) and re.fullmatch(r"(\df)+", config)
        known = corridors and 0 < min(distances) and max(distances) < len(corridor(maze_rows(robot, layout)))
    if not known:
        raise ValueError(f"unknown environment; known: {', '.join(ENV_IDS)}; stitching: ant_u_maze_gen_1f2f3f")
    return robot, layout, distances


def make_model(robot_name: str, walls: list):
    """The MuJoCo model of a robot and of walls, a list of cells (row, column)."""
    import gymnasium
    import mujoco

    robot = ROBOTS[robot_name]
    if robot.xml.endswith(".xml"):
        spec = mujoco.MjSpec.from_file(str(Path(gymnasium.__file__).parent / "envs/mujoco/assets" / robot.xml))
    else:
        spec = mujoco.MjSpec.from_string(robot.xml)
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER  # gymnasium's RK4 costs twice as much
    spec.option.timestep = robot.physics_step
    for actuator in spec.actuators:
        actuator.gear[0] = robot.gear or actuator.gear[0]
    for i, j in walls:  # boxes half a cell high; the point mass slides along them without friction
        spec.worldbody.add_geom(
            type=mujoco.mjtGeom.mjGEOM_BOX, size=[robot.cell / 2, robot.cell / 2, robot.cell / 4],
            pos=[i * robot.cell, j * robot.cell, robot.cell / 4], contype=0, conaffinity=1,
            condim=1 if robot_name == "point" else 3, rgba=[0.6, 0.55, 0.5, 1])  # fmt: skip
    if robot_name == "humanoid":  # what `observe` needs of the bodies' inertial frames
        for sensor in ("POS", "XAXIS", "YAXIS", "ZAXIS", "LINVEL", "ANGVEL"):
            for body in spec.bodies[1:]:
                spec.add_sensor(type=getattr(mujoco.mjtSensor, f"mjSENS_FRAME{sensor}"),
                                objtype=mujoco.mjtObj.mjOBJ_BODY, objname=body.name)  # fmt: skip
        for joint in spec.joints[1:]:
            spec.add_sensor(type=mujoco.mjtSensor.mjSENS_JOINTACTFRC,
                            objtype=mujoco.mjtObj.mjOBJ_JOINT, objname=joint.name)  # fmt: skip
    return spec.compile()


class MujocoEnvs:
    """`num_envs` copies of one environment, stepped together by MuJoCo's C++ thread pool (`mujoco.rollout`), which has
    as many threads as torch (OMP_NUM_THREADS; the simulation does not depend on it).

    state (num_envs, state_dim): observations without the goal; goal (num_envs, goal_dim): commanded goals; steps and
    time_at_goal (num_envs,): env steps since the reset, and how many of them ended at the goal; episode (num_envs,):
    resets so far; fallen (num_envs,): whether the last step left the healthy range. A world's whole state is its
    row of physics (num_envs, 1 + nq + nv: time, positions, velocities): writing a row resets it. Row i's k-th reset
    draws from a generator seeded with (*seed, i, k).
    """

    def __init__(self, env_id: str, num_envs: int, episode_length: int, seed: tuple, fixed_resets: bool = False):
        import mujoco
        import mujoco.rollout

        self.robot_name, layout, distances = parse_env_id(env_id)
        self.robot = ROBOTS[self.robot_name]
        self.num_envs = num_envs
        self.episode_length = episode_length
        self.seed = seed
        self.fixed_resets = fixed_resets
        self.maze = maze_rows(self.robot_name, layout)
        cells = {"1": [], "R": [], "G": [], "0": []}
        for i, row in enumerate(self.maze):
            for j, cell in enumerate(row):
                cells[cell].append((i, j))
        # A reset draws a class, then a pair of it (start, goal). Stitching has a class per distance, else there is one.
        classes = [[(start, goal) for start in cells["R"] for goal in cells["G"]]]
        if distances:
            path = corridor(self.maze)
            classes = [list(zip(path, path[d:])) for d in distances]
        self.pairs = [np.array(pairs) * self.robot.cell for pairs in classes]  # (pairs, 2, 2), m
        self.model = make_model(self.robot_name, cells["1"])
        self.qpos = np.array(self.robot.qpos or self.model.qpos0)
        self.rollout = mujoco.rollout.Rollout(nthread=torch.get_num_threads())
        self.data = [mujoco.MjData(self.model) for _ in range(torch.get_num_threads())]
        self.physics = np.zeros((num_envs, 1 + self.model.nq + self.model.nv))
        self.state = np.zeros((num_envs, self.robot.state_dim), np.float32)
        self.goal = np.zeros((num_envs, self.robot.goal_dim), np.float32)
        self.steps, self.time_at_goal, self.episode = np.zeros((3, num_envs), np.int64)
        self.fallen = np.zeros(num_envs, bool)
        self.renderer = None  # `render` makes it

    def reset(self, mask: np.ndarray) -> None:
        """Starts a new episode in the rows of mask (num_envs,) and leaves every other row untouched."""
        import mujoco

        rows, noise = np.flatnonzero(mask), self.robot.reset_noise
        if not len(rows):
            return
        for i in rows:
            rng = np.random.default_rng([*self.seed, i, 0 if self.fixed_resets else self.episode[i]])
            if self.maze:
                pairs = self.pairs[rng.integers(len(self.pairs))]
                start, goal = pairs[rng.integers(len(pairs))]
            else:
                distance, angle = rng.uniform(*self.robot.goal_distance), rng.uniform(0, 2 * np.pi)
                start, goal = np.zeros(2), distance * np.array([np.cos(angle), np.sin(angle)])
            qpos = self.qpos + rng.uniform(-noise, noise, self.model.nq)
            qpos[:2] += start
            if self.model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE:
                mujoco.mju_normalize4(qpos[3:7])  # the torso's quaternion, as it is after every step
            self.physics[i] = np.concatenate([[0.0], qpos, noise * rng.standard_normal(self.model.nv)])
            self.goal[i] = [*goal, self.robot.goal_height][: self.robot.goal_dim]
        self.steps[rows] = self.time_at_goal[rows] = 0
        self.episode[rows] += 1
        rest = np.zeros((len(rows), 1, self.model.nu))  # without it, the thread's last control would be felt
        _, sensors = self.rollout.rollout(self.model, self.data, self.physics[rows], rest)
        self.observe(rows, sensors[:, 0])

    def step(self, action: np.ndarray) -> np.ndarray:
        """action (num_envs, action_dim) in [-1, 1] -> done (num_envs,): fallen over, or the time limit is reached.
        state is then the episode's last, until `reset`."""
        # Sensor values belong to the state before a physics step: a robot with sensors takes one step more than needed.
        needed = self.robot.physics_steps
        repeats = needed + (self.model.nsensor > 0)
        control = np.repeat((action * self.model.actuator_ctrlrange[:, 1])[:, None], repeats, axis=1)
        before = self.physics[:, 0].copy()
        physics, sensors = self.rollout.rollout(self.model, self.data, self.physics, control)
        self.physics[:] = physics[:, needed - 1]
        self.observe(slice(None), sensors[:, -1])
        self.steps += 1
        self.time_at_goal += self.distance() < GOAL_RADIUS
        height, (low, high) = self.physics[:, 3], self.robot.healthy_height  # the point mass has none, and no limits
        expected = before + (needed - 0.5) * self.model.opt.timestep
        diverged = self.physics[:, 0] < expected  # MuJoCo starts a world and its clock anew when its physics blow up
        self.fallen = (height < low) | (height > high) | diverged
        return self.fallen | (self.steps >= self.episode_length)

    def observe(self, rows, sensors: np.ndarray) -> None:
        """Writes state from physics. Point and ant: positions and velocities. Humanoid: as in gymnasium also each
        body's inertia and mass (10) and velocity (6) about the centre of mass, and the joints' actuator forces."""
        parts = [self.physics[rows, 1:]]
        if self.robot_name == "humanoid":
            n, bodies, mass = len(sensors), self.model.nbody - 1, self.model.body_mass[1:, None]
            position, *axes, linear, angular = sensors[:, : 18 * bodies].reshape(n, 6, bodies, 3).swapaxes(0, 1)
            rotation = np.stack(axes, -1)  # (n, bodies, 3, 3), columns are the body's axes
            offset = position - (mass * position).sum(1, keepdims=True) / mass.sum()  # from the centre of mass
            # Parallel axes: R diag(I) R^T + m (|d|^2 1 - d d^T), as xx yy zz xy xz yz
            inertia = np.einsum("nbij,bj,nbkj->nbik", rotation, self.model.body_inertia[1:], rotation)
            inertia += (mass * (offset**2).sum(-1, keepdims=True))[..., None] * np.eye(3)
            inertia -= mass[..., None] * offset[..., :, None] * offset[..., None, :]
            inertia = inertia[..., [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
            inertia = np.concatenate([inertia, mass * offset, np.broadcast_to(mass, (n, bodies, 1))], -1)
            velocity = np.concatenate([angular, linear - np.cross(angular, offset)], -1)
            parts += [inertia.reshape(n, -1), velocity.reshape(n, -1), sensors[:, 18 * bodies :]]
        self.state[rows] = np.concatenate(parts, axis=1)

    def distance(self) -> np.ndarray:
        """Distance (num_envs,) of every torso to its commanded goal, m."""
        return np.linalg.norm(self.state[:, : self.robot.goal_dim] - self.goal, axis=1)

    def state_dict(self) -> dict:
        names = ("physics", "state", "goal", "steps", "time_at_goal", "episode")
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in names}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            getattr(self, name)[:] = value.numpy()


# === Replay: the last time steps of all environments, relabelled with future goals when sampled =======================
def future_offset(remaining: torch.Tensor, uniform: torch.Tensor, gamma: float) -> torch.Tensor:
    """How many steps ahead the goal lies: Geometric(1 - gamma), truncated to the `remaining` steps of the episode.

    P(k) is proportional to gamma^k, k = 1..n, by inverting its distribution function at `uniform` (float64, in [0, 1)):
    k = ceil(log(1 - u (1 - gamma^n)) / log gamma). An episode's last step (n = 0) is its own goal. Same shapes.
    """
    log_gamma = float(np.log(gamma))
    offset = torch.ceil(torch.log1p(uniform * torch.expm1(remaining * log_gamma)) / log_gamma)
    return torch.minimum(offset.clamp(min=1), remaining).long()


class Replay:
    """A ring of `capacity` time steps x num_envs: state, action and the episode's number. Goals are future states."""

    def __init__(self, capacity, num_envs, state_dim, goal_dim, action_dim, device):
        self.capacity, self.num_envs, self.goal_dim, self.device = capacity, num_envs, goal_dim, device
        self.state = torch.zeros(capacity, num_envs, state_dim, device=device)
        self.action = torch.zeros(capacity, num_envs, action_dim, device=device)
        self.episode = torch.zeros(capacity, num_envs, dtype=torch.int32, device=device)
        self.size = self.pointer = 0

    def add(self, state, action, episode) -> None:
        """A time step: state (num_envs, state_dim), action taken there (num_envs, action_dim), episode (num_envs,)."""
        for ring, values in ((self.state, state), (self.action, action), (self.episode, episode)):
            ring[self.pointer] = torch.as_tensor(values)
        self.pointer = (self.pointer + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, num_batches: int, batch_size: int, window: int, gamma: float) -> tuple:
        """Indices (anchor time, environment, goal time), each (num_batches, batch_size).

        Every environment gives one random window of consecutive time steps (more if one is too few). All steps but a
        window's last are anchors, shuffled and cut into batches: no anchor of a window comes twice.
        A goal lies in its anchor's episode and window. `train`'s windows are as long as an episode, and straddle two.
        """
        needed = num_batches * batch_size
        windows = -(-needed // (self.num_envs * (window - 1)))
        start = torch.randint(self.size - window + 1, (windows, self.num_envs), device=self.device)
        step = torch.arange(window, device=self.device).view(-1, 1, 1)
        time_index = (self.pointer - self.size + start + step) % self.capacity  # (window, windows, num_envs)
        env = torch.arange(self.num_envs, device=self.device).expand_as(time_index)
        episode = self.episode[time_index, env]
        # The last step of the anchor's episode in the window is the nearest boundary at or after the anchor.
        boundary = torch.where(episode[1:] != episode[:-1], step[:-1], window - 1)
        remaining = (boundary.flip(0).cummin(0).values.flip(0) - step[:-1]).flatten()
        chosen = torch.randperm(len(remaining), device=self.device)[:needed]
        uniform = torch.rand(needed, dtype=torch.float64, device=self.device)
        anchor_time, env = time_index[:-1].flatten()[chosen], env[:-1].flatten()[chosen]
        goal_time = (anchor_time + future_offset(remaining[chosen], uniform, gamma)) % self.capacity
        return tuple(index.view(num_batches, batch_size) for index in (anchor_time, env, goal_time))

    def gather(self, anchor_time, env, goal_time) -> tuple:
        """Indices (batch,) -> state (batch, state_dim), action (batch, action_dim), future goal (batch, goal_dim)."""
        goal = self.state[goal_time, env, : self.goal_dim]
        return self.state[anchor_time, env], self.action[anchor_time, env], goal

    def state_dict(self) -> dict:
        state = {"size": self.size, "pointer": self.pointer}
        for name in ("state", "action", "episode"):
            # Through NumPy: the filled part without a copy, where a mere view of the tensor would save all of it
            state[name] = torch.from_numpy(getattr(self, name)[: self.size].cpu().numpy())
        return state

    def load_state_dict(self, saved: dict) -> None:
        self.size = saved["size"]  # a longer run than the saved one has a longer ring, which is then not full
        self.pointer = saved["pointer"] if self.size == self.capacity else self.size
        for name in ("state", "action", "episode"):
            getattr(self, name)[: self.size] = saved[name]


# === Networks (Section 3.2 and Fig. 2) ================================================================================
class Dense(nn.Linear):
    """nn.Linear, initialised as in the official code: weights U(-1, 1) / sqrt(in_features), biases 0."""

    def reset_parameters(self):
        nn.init.uniform_(self.weight, -(self.in_features**-0.5), self.in_features**-0.5)
        nn.init.zeros_(self.bias)


class HypersphereNorm(nn.Module):
    """Scales hidden vectors to length sqrt(width) (Simba-v2 instead of LayerNorm, Table 2)."""

    def forward(self, x):
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


def hidden_layer(in_dim: int, width: int, norm: str, activation: str) -> list:
    """Dense, norm, activation. LayerNorm's epsilon is flax's 1e-6."""
    norms = {"layer": lambda: nn.LayerNorm(width, eps=1e-6), "none": nn.Identity, "hypersphere": HypersphereNorm}
    return [Dense(in_dim, width), norms[norm](), {"swish": nn.SiLU, "relu": nn.ReLU}[activation]()]


class ResidualBlock(nn.Module):
    """Four hidden layers; the skip connection is added after the last activation."""

    def __init__(self, width, norm, activation, residual):
        super().__init__()
        self.layers = nn.Sequential(*[m for _ in range(4) for m in hidden_layer(width, width, norm, activation)])
        self.residual = residual

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


class ResidualMLP(nn.Module):
    """(batch, in_dim) -> hidden layer -> depth / 4 residual blocks -> Dense -> (batch, out_dim).

    `depth` counts the Dense layers inside the blocks, as the paper does: depth 64 has 66 Dense layers in all.
    """

    def __init__(self, in_dim, out_dim, width, depth, norm="layer", activation="swish", residual=True):
        super().__init__()
        if depth <= 0 or depth % 4:
            raise ValueError(f"depth {depth} is not a positive multiple of 4")
        self.stem = nn.Sequential(*hidden_layer(in_dim, width, norm, activation))
        self.blocks = nn.Sequential(*[ResidualBlock(width, norm, activation, residual) for _ in range(depth // 4)])
        self.head = Dense(width, out_dim)

    def hidden(self, x):
        """What the head reads. In bfloat16 a CPU's layers return bfloat16, and deep sums h + block(h) would be rounded
        at every block: the residual stream stays in float32."""
        return self.blocks(self.stem(x).float()).float()

    def forward(self, x):
        hidden = self.hidden(x)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has too few digits for distances
            return self.head(hidden)


class GaussianActor(nn.Module):
    """pi(a | s, g): a Gaussian squashed by tanh; mean and log standard deviation are two heads of one trunk."""

    def __init__(self, state_dim, goal_dim, action_dim, width, depth, **options):
        super().__init__()
        self.trunk = ResidualMLP(state_dim + goal_dim, action_dim, width, depth, **options)
        self.log_std_head = Dense(width, action_dim)

    def forward(self, state, goal):
        """(batch, state_dim), (batch, goal_dim) -> mean and log standard deviation before tanh, (batch, action_dim)."""
        hidden = self.trunk.hidden(torch.cat([state, goal], -1))
        with torch.autocast(hidden.device.type, enabled=False):
            mean, raw = self.trunk.head(hidden), self.log_std_head(hidden)
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(raw) + 1)


def sample_action(mean, log_std) -> tuple:
    """a = tanh(u), u ~ N(mean, std^2), reparameterised -> action (batch, action_dim), log pi(a) (batch,)."""
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * float(np.log(2 * np.pi))
    # log(1 - tanh(u)^2) = log(4 e / (1 + e)^2) with e = exp(-2 |u|): exact where tanh(u) rounds to 1, gradient included
    log_slope = 2 * (float(np.log(2)) - u.abs() - torch.log1p(torch.exp(-2 * u.abs())))
    return torch.tanh(u), (log_normal - log_slope).sum(-1)


class ContrastiveAgent(nn.Module):
    """Everything of one agent that learns: the policy, phi(s, a), psi(g), and the logarithm of the temperature."""

    def __init__(self, state_dim, goal_dim, action_dim, depth, args):
        super().__init__()
        self.actor = GaussianActor(state_dim, goal_dim, action_dim, args.width, depth)
        self.state_action_encoder = ResidualMLP(state_dim + action_dim, args.repr_dim, args.width, depth)
        self.goal_encoder = ResidualMLP(goal_dim, args.repr_dim, args.width, depth)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def phi(self, state, action):
        return self.state_action_encoder(torch.cat([state, action], -1))

    def psi(self, goal):
        return self.goal_encoder(goal)


# === Contrastive RL (Section 3.1) =====================================================================================
class PairwiseDistance(torch.autograd.Function):
    """a, b (n, dim) -> ||a_i - b_j|| (n, n), and its gradient, both by matrix products: far cheaper than differences.

    |a|^2 + |b|^2 - 2ab loses digits where a pair is near, and far from the origin. So both are centred, and positives,
    which training brings together, are taken from differences. The gradient at distance 0 is 0.
    """

    @staticmethod
    def forward(ctx, a, b):
        centre, difference = b.mean(0), a - b
        a, b = a - centre, b - centre
        squared = torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1, keepdim=True))
        squared.diagonal().copy_(difference.square().sum(1))
        distance = squared.clamp_(min=0).sqrt_()
        ctx.save_for_backward(a, b, difference, distance)
        return distance

    @staticmethod
    def backward(ctx, gradient):
        a, b, difference, distance = ctx.saved_tensors
        weight = (gradient / distance).masked_fill_(distance == 0, 0)  # d ||a - b|| / da = (a - b) / ||a - b||
        positives = weight.diagonal()[:, None] * difference
        weight.fill_diagonal_(0)
        gradient_a = torch.addmm(positives + weight.sum(1)[:, None] * a, weight, b, alpha=-1)
        gradient_b = torch.addmm(weight.sum(0)[:, None] * b - positives, weight.T, a, alpha=-1)
        return gradient_a, gradient_b


def contrastive_loss(phi, psi, logsumexp_coef, direction="forward") -> tuple:
    """InfoNCE over all pairs of a batch: row i's positive is goal i, its negatives are all the other goals.

    phi, psi (batch, repr_dim) -> loss (scalar), metrics. f_ij = -||phi_i - psi_j||_2;
    loss = -mean_i [f_ii - logsumexp_j f_ij] + logsumexp_coef mean_i (logsumexp_j (f_ij + 1e-6))^2. direction: forward
    classifies goals, as written here; backward state-action pairs; symmetric both.
    """
    # On a GPU float64 keeps these small products out of TensorFloat-32, which has too few digits for distances
    dtype = torch.float64 if phi.is_cuda else torch.float32
    energy = -PairwiseDistance.apply(phi.to(dtype), psi.to(dtype)).float()  # f_ij
    positive, logsumexp = energy.diagonal(), energy.logsumexp(1)
    if direction == "forward":
        nce = (logsumexp - positive).mean()
    elif direction == "backward":
        nce = (energy.logsumexp(0) - positive).mean()
    else:  # symmetric
        nce = (logsumexp + energy.logsumexp(0) - 2 * positive).mean()
    loss = nce + logsumexp_coef * (logsumexp + 1e-6).square().mean()  # 1e-6: as in the official code
    n = len(energy)
    metrics = {
        "losses/critic": loss, "losses/nce": nce, "losses/logsumexp": logsumexp.mean(),
        "contrastive/categorical_accuracy": (energy.argmax(1) == torch.arange(n, device=energy.device)).float().mean(),
        "contrastive/logits_pos": positive.mean(),
        "contrastive/logits_neg": (energy.sum() - positive.sum()) / max(n * (n - 1), 1),
    }  # fmt: skip
    return loss, {name: value.detach() for name, value in metrics.items()}


def adam_optimizers(agent, args, device) -> list:
    """Adam for the actor, for the temperature, and for the critic (both encoders)."""
    encoders = [*agent.state_action_encoder.parameters(), *agent.goal_encoder.parameters()]
    options = dict(lr=args.learning_rate, fused=device.type != "mps", capturable=args.cudagraphs)
    return [torch.optim.Adam(p, **options) for p in (list(agent.actor.parameters()), [agent.log_alpha], encoders)]


def update(agent, optimizers, args, batch: list) -> dict:
    """One gradient step on the actor, then the temperature, then the critic -> metrics, detached, on the device.

    All use the same batch: state (batch, state_dim), action (batch, action_dim), relabelled future goal (batch,
    goal_dim). The actor sees the critic and the temperature from before the step, and never a commanded goal.
    """
    state, action, goal = batch
    actor_optimizer, alpha_optimizer, critic_optimizer = optimizers
    bfloat16 = args.precision == "bfloat16"
    autocast = partial(torch.autocast, device_type=state.device.type, dtype=torch.bfloat16, enabled=bfloat16)

    # Actor: alpha log pi(a|s,g) - f(s, a, g). The gradient passes through phi to the action; phi's weights get none.
    agent.state_action_encoder.requires_grad_(False)
    with autocast():
        psi = agent.psi(goal)  # the critic below uses it again
        new_action, log_prob = sample_action(*agent.actor(state, goal))
        energy = -torch.linalg.vector_norm(agent.phi(state, new_action) - psi.detach(), dim=-1)
    alpha = agent.log_alpha.detach().exp()
    actor_loss = (alpha * log_prob - energy).mean()
    actor_optimizer.zero_grad()
    actor_loss.backward()
    actor_optimizer.step()

    # Temperature: falls while the entropy is above its target, -entropy_coef |A|.
    entropy = -log_prob.detach().mean()
    alpha_loss = agent.log_alpha.exp() * (entropy + args.entropy_coef * action.shape[-1])
    alpha_optimizer.zero_grad()
    alpha_loss.backward()
    alpha_optimizer.step()

    # Critic: InfoNCE.
    agent.state_action_encoder.requires_grad_(True)
    with autocast():
        phi = agent.phi(state, action)
    critic_loss, metrics = contrastive_loss(phi, psi, args.logsumexp_coef)
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()
    metrics |= {"losses/actor": actor_loss.detach(), "losses/alpha": alpha_loss.detach()}
    return metrics | {"losses/entropy": entropy, "losses/alpha_value": alpha}


# === Acting and evaluation ============================================================================================
@torch.no_grad()
def act(agent, envs, device, noise: bool = True) -> np.ndarray:
    """Actions (num_envs, action_dim) towards the commanded goals, drawn from the policy; without noise, its mean."""
    mean, log_std = agent.actor(torch.from_numpy(envs.state).to(device), torch.from_numpy(envs.goal).to(device))
    action = sample_action(mean, log_std)[0] if noise else torch.tanh(mean)
    return action.cpu().numpy()


def render(envs, height: int = 240, width: int = 320) -> np.ndarray:
    """A picture (height, width, 3) uint8 of the first environment from above; the red ball is its goal."""
    import mujoco

    if envs.renderer is None:
        envs.renderer = mujoco.Renderer(envs.model, height, width)
    data, scene = mujoco.MjData(envs.model), envs.renderer.scene
    data.qpos[:] = envs.physics[0, 1 : 1 + envs.model.nq]
    mujoco.mj_forward(envs.model, data)
    camera = mujoco.MjvCamera()
    camera.type, camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
    camera.distance, camera.elevation = 3.5 * envs.robot.cell, -60
    envs.renderer.update_scene(data, camera)
    place, red = np.array([*envs.goal[0], 0.5])[:3], np.array([1, 0.1, 0.1, 1], np.float32)
    ball, sphere = scene.geoms[scene.ngeom], mujoco.mjtGeom.mjGEOM_SPHERE
    mujoco.mjv_initGeom(ball, sphere, np.array([0.3, 0, 0]), place, np.eye(3).ravel(), red)
    scene.ngeom += 1
    return envs.renderer.render().copy()


def evaluate(agent, envs, args, number: int, device, run, filmed: bool = False) -> dict | None:
    """One episode per environment with the policy's mean -> metrics, or None if the run is to stop. `number` picks the
    starts and goals; torch's random numbers are not used.

    time_at_goal, the paper's score: the mean number of steps that end within 0.5 m of the goal, until the episode's
    first end. It is the return for a sparse reward.
    """
    run.bar.set_description("evaluating")
    envs.episode[:] = number
    envs.reset(np.ones(envs.num_envs, bool))
    alive = np.ones(envs.num_envs, bool)
    time_at_goal, length, last, closest = (np.full(envs.num_envs, start) for start in (0.0, 0.0, np.inf, np.inf))
    film = []
    while alive.any():
        action = act(agent, envs, device, noise=False)
        run.check_finite({"the actor's output": action.sum()}, number)
        if run.stopped:
            return None
        if filmed and alive[0]:
            film.append(render(envs))
        done, distance = envs.step(action), envs.distance()
        time_at_goal[alive] = envs.time_at_goal[alive]
        length[alive] = envs.steps[alive]
        last[alive] = distance[alive]
        closest[alive] = np.minimum(closest, distance)[alive]
        alive &= ~done
    run.bar.set_description("training")
    if filmed:
        run.film(number, film)
    metrics = {
        "eval/time_at_goal": time_at_goal, "eval/episodic_return": time_at_goal, "eval/success_any": time_at_goal > 0,
        "eval/success_easy": closest < EASY_GOAL_RADIUS, "eval/final_distance": last, "eval/episodic_length": length,
    }  # fmt: skip
    return {name: float(value.mean()) for name, value in metrics.items()}


# === The algorithm ====================================================================================================
def train(args: Args) -> Path:
    """Trains, logs to a new folder under runs/ or to args.resume, and returns that folder."""
    device, buffer_device = check_args(args)
    seed_everything(args.seed, args.torch_deterministic)
    set_precision(args.precision, device)
    envs = MujocoEnvs(args.env_id, args.num_envs, args.episode_length, (args.seed, 0))
    eval_envs = MujocoEnvs(args.eval_env_id, args.eval_episodes, args.episode_length, (args.seed, 1))
    envs.reset(np.ones(args.num_envs, bool))
    dims = envs.robot.state_dim, envs.robot.goal_dim, envs.robot.action_dim
    depths = dict(collector=args.collector_depth, deep=args.deep, shallow=args.shallow)
    agents = {name: ContrastiveAgent(*dims, depth, args).to(device) for name, depth in depths.items()}
    replay = Replay(replay_steps(args), args.num_envs, *dims, buffer_device)
    parts, learners = dict(replay=replay, envs=envs), {}
    for name, agent in agents.items():
        optimizers = adam_optimizers(agent, args, device)
        parts |= {f"{name}_optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)}
        learners[name] = partial(update, agent, optimizers, args)
        if args.cudagraphs:
            learners[name] = capture(learners[name], optimizers)
        if args.compile:  # one block's code serves them all
            compile_modules(*[module for module in agent.modules() if isinstance(module, ResidualBlock)])

    run = Run(args, device, agents | parts, global_step=0, gradient_steps=0, next_eval=0)  # logs, saves
    global_step, gradient_steps, next_eval = run.counters.values()  # not 0 in a resumed run
    next_eval = min(next_eval, global_step - global_step % args.eval_every + args.eval_every)  # --eval-every may be new
    first_update = gradient_steps
    steps = args.num_envs * args.unroll_length  # of a training step

    while not run.stopped:
        # Between training steps: evaluate all agents, then save, so that a resumed run does not evaluate again
        finished = global_step + steps > args.total_timesteps
        if finished or global_step >= next_eval:
            results = {}
            for name, agent in agents.items():
                filmed = args.capture_video and name == "collector"
                metrics = evaluate(agent, eval_envs, args, global_step, device, run, filmed)
                if metrics is None:  # the run is to stop
                    break
                results |= {f"{tag}/{name}": value for tag, value in metrics.items()}
            if run.stopped:
                break
            results["eval/episodic_return"] = results["eval/episodic_return/collector"]
            run.log(global_step, results)
            next_eval = global_step - global_step % args.eval_every + args.eval_every
        if finished:
            weights = nn.ModuleDict(agents)
            run.finish(weights, results | dict(global_step=global_step, gradient_steps=gradient_steps))
            break
        if run.checkpoint_due(global_step):
            run.save(global_step=global_step, gradient_steps=gradient_steps, next_eval=next_eval)

        # Collect: the collector's policy, with its noise, pursues the commanded goals
        start_update, start_time = gradient_steps, time.time()
        learning = replay.size * args.num_envs >= args.learning_starts
        ended = []  # of each episode: time at goal, length, whether it ended with a fall
        for _ in range(args.unroll_length):
            action = act(agents["collector"], envs, device)
            replay.add(envs.state, action, envs.episode)
            done = envs.step(action)
            ended.append(np.stack([envs.time_at_goal, envs.steps, envs.fallen])[:, done])
            envs.reset(done)
        global_step += steps
        run.check_finite({"the actor's output": action.sum()}, global_step - steps)

        # Learn: all three agents, from the same batches of state, action and a future goal
        metrics = {}
        if learning:
            batches = replay.sample(args.gradient_steps, args.batch_size, args.episode_length, args.gamma)
            for indices in zip(*batches):
                batch = [x.to(device) for x in replay.gather(*indices)]
                for name, learn in learners.items():
                    metrics |= {f"{tag}/{name}": value for tag, value in learn(batch).items()}
                gradient_steps += 1
        run.check_finite(metrics, global_step - steps)

        # Log: the losses are those of the last gradient step
        run.bar.update(steps)
        metrics |= {
            "charts/gradient_steps": gradient_steps, "charts/replay_size": replay.size * args.num_envs,
            "charts/replay_ratio": (gradient_steps - start_update) / steps,
            "charts/frames": global_step * ACTION_REPEAT, "charts/walltime": run.walltime(),
        }  # fmt: skip
        if start_update > first_update:  # without the first training step that learns, which warms up and compiles
            metrics["charts/SPS"] = steps / (time.time() - start_time)
        time_at_goal, lengths, fallen = np.concatenate(ended, axis=1)
        if len(lengths):
            metrics |= {"charts/episodic_return": time_at_goal.mean(), "charts/episodic_length": lengths.mean(),
                        "charts/fallen": fallen.mean()}  # fmt: skip
            run.bar.set_postfix(time_at_goal=f"{time_at_goal.mean():.1f}", refresh=False)
        run.log(global_step, metrics)

    run.save(global_step=global_step, gradient_steps=gradient_steps, next_eval=next_eval)
    run.close()
    return run.dir


# === Housekeeping of this script: what cannot work ====================================================================
def check_args(args: Args) -> tuple:
    """Refuses what cannot work, before anything is allocated or written -> the devices of the networks and of the
    replay."""
    check_values(args)
    robots = []
    for name in ("env_id", "eval_env_id"):
        try:
            robots.append(parse_env_id(getattr(args, name))[0])
        except ValueError as error:
            refuse(name, getattr(args, name), str(error))
    if robots[0] != robots[1]:
        refuse("eval_env_id", args.eval_env_id, f"must be the same robot as --env-id {args.env_id}")
    for name in ("collector_depth", "deep", "shallow"):
        if getattr(args, name) % 4:
            refuse(name, getattr(args, name), "must be a multiple of 4: a block has 4 Dense layers")
    episodes = args.num_envs * args.episode_length
    ring = args.buffer_size // args.num_envs * args.num_envs
    if args.buffer_size < episodes:
        refuse("buffer_size", args.buffer_size, f"must hold an episode of every environment, {episodes} steps")
    if not episodes <= args.learning_starts <= ring:
        limits = f"an episode of every environment, {episodes} steps, and the {ring} that the replay holds"
        refuse("learning_starts", args.learning_starts, f"must lie between {limits}")
    to_learn = args.learning_starts + 2 * args.num_envs * args.unroll_length
    if args.total_timesteps < to_learn:
        limit = f"must leave room to learn after --learning-starts: at least {to_learn} steps"
        refuse("total_timesteps", args.total_timesteps, limit)
    robot = ROBOTS[robots[0]]
    needed = {  # rough bytes; a weight has a gradient and two moments, a layer three activations
        "buffer_size": 4 * replay_steps(args) * args.num_envs * (robot.state_dim + robot.action_dim + 1),
        "batch_size": 16 * args.batch_size**2,
        "repr_dim": 16 * args.repr_dim * (2 * args.width + args.batch_size),
        "gradient_steps": 60 * args.gradient_steps * args.batch_size,
        "num_envs": 20_000 * args.num_envs,
        "eval_episodes": 20_000 * args.eval_episodes,
    }
    layer = args.width * (16 * (args.width + 3) + 12 * args.batch_size)
    needed |= {name: 3 * (getattr(args, name) + 1) * layer for name in ("collector_depth", "deep", "shallow")}
    devices = check_devices(args, needed)
    if args.capture_video:
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")  # before MuJoCo is imported
        with suppress(ImportError):
            import_module(
                "triton"
            )  # torch does it later, and crashes if a software renderer has loaded its LLVM before
        try:
            render(MujocoEnvs(args.eval_env_id, 1, 2, (0,)))
        except Exception as error:
            refuse("capture_video", True, f"MuJoCo cannot render here ({type(error).__name__}: {str(error)[:200]})")
    return devices


def replay_steps(args) -> int:
    """Time steps in the ring, each of all environments."""
    return min(args.buffer_size, args.total_timesteps) // args.num_envs


# === Housekeeping, the same text in every script: arguments, precision, CUDA graphs, files, signals ===================
def refuse(flag: str, value: object, limit: str) -> None:
    """Ends the program because of a user's mistake: one line on stderr, exit code 2."""
    line = f"{SCRIPT}.py: error: --{flag.replace('_', '-')} {value}: {limit}"
    print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(2)


def parse_args(command_line: list) -> Args:
    """The command line -> arguments. What is not given comes from the task's defaults, or from the resumed run."""
    import tyro

    args = tyro.cli(Args, args=[word for word in command_line if word not in ("-h", "--help")])  # that is for below
    if args.resume is None:
        return tyro.cli(Args, args=command_line, default=Args(**args.task_defaults()))
    try:
        description = json.loads((Path(args.resume) / "args.json").read_text())
        if description["script"] != SCRIPT:
            raise ValueError(f"it is one of {description['script']}.py")
        default = Args(**description["args"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        refuse("resume", args.resume, f"is not the folder of a run that this script can continue ({error})")
    check_values(default)
    args = tyro.cli(Args, args=command_line, default=default)
    for name, value in fixed_args(default).items():
        if getattr(args, name) != value:
            refuse(name, getattr(args, name), f"a resumed run keeps its own value, {value}")
    return args


def fixed_args(args: Args) -> dict:
    """The arguments that a resumed run keeps."""
    return {name: value for name, value in asdict(args).items() if not hasattr(RunArgs, name)}


def check_values(args: Args) -> None:
    """Refuses values of a wrong type, which args.json can contain, and values outside the bounds of their type."""
    kinds = get_type_hints(Args)
    for name, hint in get_type_hints(Args, include_extras=True).items():
        value, kind = getattr(args, name), kinds[name]
        choices = get_args(kind) if get_origin(kind) is Literal else None
        if not (value in choices if choices else isinstance(value, int | float if kind is float else kind)):
            refuse(name, value, f"must be {getattr(kind, '__name__', kind)}")
        for low, high in getattr(hint, "__metadata__", ()):
            if value is not None and not low <= value <= high:  # true for NaN, too
                refuse(name, value, f"must lie between {low} and {high}")


def check_devices(args: Args, needed: dict) -> tuple:
    """Refuses what this computer does not have -> the devices of the networks and of the replay. needed: roughly how
    many bytes the run takes, by the flag that decides it; those of buffer_size are the replay's."""
    found = dict(auto=True, cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    for name in ("device", "buffer_device"):
        if not found[getattr(args, name)]:
            refuse(name, getattr(args, name), "torch sees no such device here")
    gpu = found["cuda"] and args.device in ("auto", "cuda")
    device = ("cuda" if gpu else "cpu") if args.device == "auto" else args.device
    fits = gpu and sum(needed.values()) < 0.9 * memory("cuda")
    buffer_device = ("cuda" if fits else "cpu") if args.buffer_device == "auto" else args.buffer_device
    for place in (device, buffer_device):
        here = {k: v for k, v in needed.items() if place == (buffer_device if k == "buffer_size" else device)}
        if sum(here.values()) > memory(place):
            name = max(here, key=here.get)
            sizes = f"about {sum(here.values()) / 1e9:.1f} GB, {place} has {memory(place) / 1e9:.1f} GB"
            refuse(name, getattr(args, name), f"the run needs {sizes}")
    if args.cudagraphs and device != "cuda":
        refuse("cudagraphs", True, f"needs --device cuda, not {device}")
    if args.track and not find_spec("wandb"):
        refuse("track", True, "needs Weights & Biases: pip install wandb")
    return torch.device(device), torch.device(buffer_device)


def memory(device: str) -> int:
    """Bytes: what is free on the GPU, or all of the computer's memory, or what its container may take of it."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no such file, or no limit ("max")
        return min(everything, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return everything


def seed_everything(seed: int, deterministic: bool) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def set_precision(precision: str, device: torch.device) -> None:
    """float32: exact. tf32: faster convolutions and matrix products on a GPU. bfloat16: the update runs under autocast.

    On a CPU, products in float32 go through oneDNN instead of MKL (on AMD twice as fast) if its "bf16" mode proves to
    be as exact as float32, which it is on CPUs without bfloat16 matrix units.
    """
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")  # first: it resets oneDNN's
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    if device.type == "cpu":
        torch.set_flush_denormal(True)
        keep_freed_memory()
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
        if ((x @ x).double() - x.double() @ x.double()).abs().max() > 1e-3:
            torch.backends.mkldnn.matmul.fp32_precision = "none"


def keep_freed_memory() -> None:
    """glibc gives freed tensors above 32 MB back to the system, and each page of the next one is zeroed anew: a quarter
    of an update on 256 images of 84 x 84. Here it keeps what is freed, up to 1 GB a tensor."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # not every C library has it
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def compile_modules(*modules: nn.Module) -> None:
    torch._dynamo.config.recompile_limit = 64  # one compilation per batch size and kind of gradient
    for module in modules:
        module.compile(dynamic=False)


def capture(update, optimizers: list):
    """update(batch) -> metrics, as a function that replays it as a CUDA graph. The metrics are overwritten each time.

    The first 3 updates run as they are, on a stream of their own: Adam creates its state, libraries choose kernels. The
    4th is captured. A graph keeps addresses: from then on, weights and Adam's state may only be changed in place.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    warm_up, static, metrics = iter(range(3)), [], {}

    def captured(batch):
        if next(warm_up, None) is not None:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                eager = update(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return eager
        if not static:
            static.extend(x.clone() for x in batch)
            for optimizer in optimizers:
                optimizer.zero_grad()  # the gradients are then allocated in the graph's own memory
            with torch.cuda.graph(graph):
                metrics.update(update(static))
        for buffer, value in zip(static, batch):
            buffer.copy_(value)
        graph.replay()
        return dict(metrics)

    return captured


class Run:
    """Everything around learning: folder, log, checkpoints, signals, progress bar. It calls nothing of the algorithm.

    A checkpoint contains counters (whole numbers) and parts: modules, optimizers, random generators, and anything else
    with state_dict and load_state_dict. With --resume, the constructor restores both.
    """

    FORMAT = 5  # of checkpoint.pt

    def __init__(self, args: Args, device: torch.device, parts: dict, **counters):
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.args = args
        self.parts = parts | dict(torch_rng=torch.default_generator)
        if "cuda" in (device.type, args.buffer_device):
            self.parts["cuda_rng"] = torch.cuda.default_generators[torch.cuda.current_device()]
        self.counters = counters
        self.checkpoint, self.keep_replay = "checkpoint.pt", args.checkpoint_replay != "never"
        self.stopped = None  # exit code, when the run is to stop
        self.finished = False
        self.start_time = time.time()
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}".replace("/", "-")
        self.dir = Path(args.resume or f"runs/{name}")
        with self.disk():
            self.dir.mkdir(parents=True, exist_ok=args.resume is not None)
            self.lock = open(self.dir / "lock", "w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refuse("resume", self.dir, "another process is working on this run")
            if args.resume is not None:
                self.load()
            self.describe()
            # What a killed run logged after its last checkpoint is dropped
            purge_step = self.counters["global_step"] + 1 if args.resume is not None else None
            self.writer = SummaryWriter(str(self.dir), purge_step=purge_step)
            rows = [f"|{name}|{value}|" for name, value in asdict(args).items()]
            self.writer.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *rows]))
        self.saved_step = self.counters["global_step"]
        options = dict(unit="step", unit_scale=True, smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 30)
        self.bar = tqdm(total=args.total_timesteps, initial=self.saved_step, **options)
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        self.handlers = {n: signal.signal(n, self.request_stop) for n in numbers}

    def say(self, line: str) -> None:
        """One line on stderr, above the progress bar."""
        from tqdm import tqdm

        tqdm.write(f"{SCRIPT}.py: {' '.join(line.split())}", file=sys.stderr)

    @contextmanager
    def disk(self):
        """Around what reads or writes the folder: a full disk or a vanished folder ends the program with one line."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save raises the one as the other
            self.say(f"error: cannot read or write {self.dir}: {str(error)[:200]}")
            raise SystemExit(1) from None

    def describe(self) -> None:
        """Stores the script, its arguments and the versions of all packages in the folder."""
        if self.args.resume is None:
            shutil.copy(__file__, self.dir)
        versions = {package.name: package.version for package in metadata.distributions()}
        versions |= dict(python=sys.version.split()[0])
        description = dict(script=SCRIPT, action_repeat=ACTION_REPEAT, args=asdict(self.args), versions=versions)
        save_file(self.dir / "args.json", description)
        if self.args.track:
            import wandb

            try:
                wandb.init(name=self.dir.name, config=asdict(self.args), sync_tensorboard=True)
            except Exception as error:
                refuse("track", True, f"wandb does not start: {' '.join(str(error).split())[:200]}")

    def stop(self, reason: str, exit_code: int) -> None:
        """From now on `train` saves and ends as soon as it can, with this line and exit code."""
        if self.stopped is None:
            self.reason = reason
            self.stopped = exit_code

    def request_stop(self, number, frame):
        self.stop(f"stopped by {signal.Signals(number).name}", 128 + number)
        signal.signal(number, signal.SIG_DFL)
        try:
            os.write(2, b"\nsaving; once more to stop at once\n")
        except OSError:  # its reader is gone, as after Ctrl-C in "2>&1 | tee": print nothing from now on
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def check_finite(self, metrics: dict, since: int) -> None:
        """Stops the run at the first metric that is not a finite number. since: the first step that they cover."""
        bad = [tag for tag, value in metrics.items() if not math.isfinite(value)]
        if bad and self.checkpoint != "diverged.pt":
            self.checkpoint, self.keep_replay = "diverged.pt", False  # the last good one stays
            self.stopped = None  # also if a signal came before
            self.stop(f"error: {bad[0]} is not finite, at step {since} or later", exit_code=1)

    def walltime(self) -> float:
        """Seconds, those before a resume included."""
        return time.time() - self.start_time

    def log(self, global_step: int, metrics: dict) -> None:
        values = {tag: float(value) for tag, value in metrics.items()}
        with self.disk():
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, global_step)

    def film(self, global_step: int, frames: list) -> None:
        """Writes frames (height, width, 3) uint8 to films/<step>.mp4; TensorBoard shows where."""
        from moviepy import ImageSequenceClip

        path = self.dir / "films" / f"{global_step}.mp4"
        height, width = np.array(frames[0].shape[:2]) // 2 * 2  # the format wants even numbers
        try:
            path.parent.mkdir(exist_ok=True)
            ImageSequenceClip([f[:height, :width] for f in frames], fps=25).write_videofile(str(path), logger=None)
            self.writer.add_text("eval/film", str(path), global_step)
        except OSError as error:  # Ctrl-C, for instance, ends ffmpeg, too
            self.say(f"no film of step {global_step}: {str(error)[:200]}")

    def checkpoint_due(self, global_step: int) -> bool:
        return global_step // self.args.checkpoint_every > self.saved_step // self.args.checkpoint_every

    def save(self, **counters) -> None:
        content = counters | dict(format=self.FORMAT, args=fixed_args(self.args), walltime=self.walltime())
        for name, part in self.parts.items():
            if name != "replay" or self.keep_replay:
                content[name] = part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
        with self.disk():
            self.writer.flush()
            save_file(self.dir / self.checkpoint, content)
            if self.finished:
                save_file(self.dir / "summary.json", self.summary)
        self.saved_step = counters["global_step"]

    def load(self) -> None:
        """Maps the file into memory, so that the replay is never there twice. All else is copied, because Adam keeps
        the very tensors that it is given."""
        try:
            content = torch.load(self.dir / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
            self.counters = {name: content[name] for name in self.counters}
            same = content["format"] == self.FORMAT and content["args"] == fixed_args(self.args)
            if not same or min(self.counters.values()) < 0:
                raise ValueError("it is one of another run or version")
            self.start_time -= content["walltime"]
            for name in self.parts.keys() - ({"replay", "cuda_rng"} - content.keys()):
                part = self.parts[name]
                state = content[name] if name == "replay" else copy.deepcopy(content[name])
                if isinstance(part, torch.optim.Optimizer):  # options like fused and capturable are this run's
                    state["param_groups"] = part.state_dict()["param_groups"]
                part.set_state(state) if isinstance(part, torch.Generator) else part.load_state_dict(state)
        except Exception as error:
            refuse("resume", self.dir, f"has no checkpoint.pt that fits ({type(error).__name__}: {str(error)[:200]})")
        if self.counters["global_step"] > self.args.total_timesteps:
            refuse("total_timesteps", self.args.total_timesteps, "the run has already taken more steps")
        (self.dir / "summary.json").unlink(missing_ok=True)  # until it has finished again
        if "replay" not in content and self.counters["global_step"] < self.args.total_timesteps:
            self.say("the checkpoint contains no replay: it is refilled before learning goes on (--learning-starts)")

    def finish(self, module: nn.Module, results: dict) -> None:
        """The results of a run that took all its steps; `save` writes them. module: what --save-model saves."""
        with self.disk():
            if self.args.save_model:
                save_file(self.dir / "model.pt", module.state_dict())
        self.summary = results | dict(walltime=self.walltime())
        self.finished, self.keep_replay = True, self.args.checkpoint_replay == "always"
        print(f"{self.dir}: mean return {results['eval/episodic_return']:.1f}")

    def close(self) -> None:
        """Ends the log, and if the run was stopped, the program."""
        with self.disk():
            self.writer.close()
        self.bar.close()
        self.lock.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.stopped is not None and not self.finished:
            way = f"; to continue: --resume {self.dir}" if self.checkpoint == "checkpoint.pt" else ""
            self.say(f"{self.reason}; saved as {self.checkpoint}{way}")
            raise SystemExit(self.stopped)


def save_file(path: Path, content) -> None:
    """Writes a .json or .pt file whole or not at all: a temporary file replaces the old one when it is complete."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(content, temporary) if path.suffix == ".pt" else temporary.write_text(json.dumps(content, indent=2))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before the run has begun ends it without a traceback
    train(parse_args(sys.argv[1:]))
