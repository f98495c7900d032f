"""1000 Layer Networks for Self-Supervised RL (Wang, Javali, Bortkiewicz, Trzcinski, Eysenbach; NeurIPS 2025,
arXiv 2503.14858): contrastive RL learns to reach goals without reward, and keeps improving as its networks get deeper.

The critic says how soon action a in state s leads to goal g: f(s, a, g) = -||phi(s, a) - psi(g)||_2.
It is a classifier: of all goals in a batch, which one did this state-action pair reach?          -> `contrastive_loss`
    L_critic = -mean_i [ f_ii - log sum_j exp f_ij ] + 0.1 mean_i (log sum_j exp f_ij)^2              (InfoNCE)
The goal g of a pair (s_t, a_t) is s_{t+k} of the same episode, k ~ Geometric(1 - gamma), truncated  -> `future_offset`
The policy picks the actions that the critic believes in, with entropy kept at a target:              -> `update`
    L_actor = mean [ alpha log pi(a|s,g) - f(s, a, g) ],   L_alpha = alpha mean [ -log pi(a|s,g) - H_target ]
phi, psi and pi are residual networks; "depth" counts the Dense layers inside their blocks:         -> `ResidualMLP`
    h <- h + block(h),   block = 4 x (Dense, LayerNorm, Swish)
Rhythm: 512 environments x 62 steps of data, then 800 gradient steps (1 per 40 environment steps).        -> `train`

    python crl_deep.py                        point mass in a room, 2 CPU cores, 1 minute: at least 0.9 of 24 goals
    python crl_deep.py --env-id point_u_maze  the same round a wall, 3 minutes: one to three of 3 far goals, by seed
    python crl_deep.py --env-id ant_u4_maze --depth 16       Fig. 1, one GPU, hours; not run yet (paper: 140 of 1000)
    SCALE=paper bash benchmark/crl_deep_fig1_depth.sh        all of Fig. 1, Table 1; the other figures: see README.md

Where this differs from the official code, and why:
 1. The paper prints f = +||phi - psi||; its code uses the negative, as here.
 2. MuJoCo simulates gymnasium's ant and humanoid, not Brax's spring backend its own. The ant's motors are weakened
    until it falls, stands and moves about as Brax's does under random actions; the humanoid falls four times
    as soon (benchmark/README.md has the numbers). Scores do not compare one to one. All geoms touch the walls (in
    Brax's maze only feet, torso and hip capsules do). Quaternions have norm 1 from the first observation on.
 3. Every reset draws a new start and goal; Brax's auto-reset repeats each environment's first (--fixed-resets).
 4. The humanoid's state does not contain the commanded goal (Brax's q, inertia and velocity of the target leak it).
    It is gymnasium's observation with x and y (272 numbers), of the state itself instead of one physics step late.
 5. Goals are relabelled by the closed form of the truncated geometric, not by a 1000 x 1000 matrix per environment.
 6. A replay window may start at every stored step; officially the newest possible window is never drawn.
 7. Batches of more than 639 draw further windows; officially they would silently do fewer gradient steps.
 8. --total-timesteps is honoured to one training step (3,133 of them in 100M); officially 100 epochs of 31 are run.
 9. psi(g) is computed once per gradient step; the actor's loss builds no gradient of phi's weights (both exact).
10. Matrix products are in float32; on a GPU, JAX's default is TensorFloat-32 (--tf32). log pi is exact where tanh
    saturates (a third of the initial actions at depth 64); log(1 - a^2 + 1e-6) errs there and loses its gradient.
11. The accuracy and the logits are logged; officially these are zeros. The flags `*_skip_connections` were dead there.
Kept as it is: the state after an episode's last action is not stored, so it is never a goal.
Not in this file: arm tasks, collector and learner of different depth, other energies, quasimetric heads, acting by the
best of K samples, the SAC / TD3 / HER / GCBC baselines.
"""

import copy
import fcntl
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import gymnasium
import mujoco
import mujoco.rollout
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """Deep contrastive RL. "env steps" count the steps of all environments together; None: from the table TASKS."""

    exp_name: str = "crl_deep"  # name of this experiment, part of the run folder's name
    seed: int = 1  # seeds python, numpy, torch and every environment reset
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks live; auto: a GPU where there is one
    torch_deterministic: bool = False  # deterministic GPU kernels (two CPU runs are bit-identical without it)
    track: bool = False  # log to Weights & Biases too (install wandb yourself)
    wandb_project_name: str = "clayrl"  # the Weights & Biases project
    wandb_entity: str | None = None  # the Weights & Biases user or team
    save_model: bool = False  # at the end, save the weights alone as model.pt
    checkpoint_every: int | None = None  # env steps between checkpoints; None: 1/50 of the run; always at the end
    checkpoint_replay: bool = True  # keep the replay in the checkpoint; else a resumed run refills it before it learns
    resume: str | None = None  # a run folder to continue; its args.json gives all flags but the few that may change

    # environment
    env_id: str = "point_room"  # <point|ant|humanoid>, alone or with _<maze>: ant_u4_maze, humanoid, point_room, ...
    eval_env_id: str | None = None  # None: the far goals of the same maze (..._eval) where the paper has such a set
    episode_length: int | None = None  # time limit in steps of one environment
    num_envs: int | None = None  # training environments, stepped side by side
    num_threads: int = 0  # simulator threads, 0: one per core; does not change results
    fixed_resets: bool = False  # every training environment repeats its first start and goal, as the official code does

    # rhythm: a training step collects num_envs * unroll_length env steps, then does gradient_steps updates
    total_timesteps: int | None = None  # env steps of the whole run
    unroll_length: int | None = None  # steps of each environment per training step
    gradient_steps: int | None = None  # gradient steps per training step
    buffer_size: int | None = None  # replay capacity in env steps
    learning_starts: int | None = None  # env steps before the first gradient step
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"  # where the replay lives; auto: the GPU where it fits
    eval_every: int | None = None  # env steps between evaluations, in training steps; None: 1/100 of the run
    eval_episodes: int = 128  # evaluation environments, one episode each

    # algorithm
    batch_size: int | None = None  # state-action-goal triples per gradient step; each goal is a negative for all others
    learning_rate: float | None = None  # Adam's, for actor, temperature and critic
    gamma: float = 0.99  # a goal lies Geometric(1 - gamma) steps ahead; nothing is bootstrapped
    logsumexp_coef: float = 0.1  # weight of mean(logsumexp^2) in the critic's loss
    entropy_coef: float = 0.5  # the target entropy is minus this, times the number of action dimensions
    repr_dim: int = 64  # dimension of phi(s, a) and psi(g)
    contrastive: Literal["forward", "backward", "symmetric"] = "forward"  # classify goals, state-actions, or both

    # networks
    depth: int = 4  # Dense layers inside the residual blocks of each network, a multiple of 4
    actor_depth: int | None = None  # the policy's depth; None: --depth
    critic_depth: int | None = None  # both encoders' depth; None: --depth
    width: int | None = None  # hidden units per layer
    actor_width: int | None = None  # the policy's width; None: --width
    critic_width: int | None = None  # both encoders' width; None: --width
    residual: bool = True  # a skip connection around every 4 Dense layers
    norm: Literal["layer", "none", "hypersphere"] = "layer"  # hypersphere: weights and hidden vectors of fixed norm
    activation: Literal["swish", "relu"] = "swish"  # after every hidden Dense layer

    # speed
    amp: bool = False  # the update's networks in bfloat16; acting, losses, distances and Adam stay in float32
    tf32: bool = False  # TensorFloat-32 matrix products on a GPU (JAX's default there, so the official code's)
    compile: bool = False  # compile the residual block (one block's code serves them all)
    cudagraphs: bool = False  # capture the whole update in one CUDA graph and replay it per batch

    # what to look at
    log_residual_norms: bool = False  # at evaluations, log the mean norm of every block's residual (Fig. 17)
    save_value_map: bool = False  # at the end, save the critic over the maze and the evaluation's paths (Fig. 9)
    save_embeddings: bool = False  # at the end, save phi(s, a) along the best evaluation episode (Fig. 10)


# The paper's values (Table 7; total env steps as in Fig. 1), and laptop-sized ones for the point mass.
PAPER = dict(total_timesteps=100_000_000, num_envs=512, episode_length=1000, unroll_length=62, gradient_steps=800,
             batch_size=512, width=256, learning_rate=3e-4, buffer_size=5_120_000, learning_starts=512_000)  # fmt: skip
POINT = dict(total_timesteps=400_000, num_envs=64, episode_length=300, unroll_length=50, gradient_steps=100,
             batch_size=512, width=64, learning_rate=1e-3, buffer_size=400_000, learning_starts=19_200,
             eval_every=25_000, checkpoint_every=50_000)  # fmt: skip
TASKS = {
    "point": POINT, "ant": PAPER, "humanoid": PAPER,
    "point_room": POINT | dict(total_timesteps=100_000, episode_length=150, learning_starts=9_600, eval_every=10_000),
    "ant_hardest_maze": PAPER | dict(total_timesteps=200_000_000),
    "ant_u5_maze": PAPER | dict(total_timesteps=400_000_000),
    "humanoid_u_maze": PAPER | dict(total_timesteps=400_000_000),
    "humanoid_big_maze": PAPER | dict(total_timesteps=400_000_000),
}  # fmt: skip
SCRIPT, ACTION_REPEAT = "crl_deep", 1
# What may be given anew with --resume: it does not change what is learned.
RESUMABLE = ("resume total_timesteps device buffer_device num_threads eval_every eval_episodes checkpoint_every "
             "checkpoint_replay track wandb_project_name wandb_entity save_model log_residual_norms "
             "save_value_map save_embeddings compile cudagraphs tf32").split()  # fmt: skip


# === Environments: a point mass, an ant or a humanoid, on an open floor or in a maze, simulated by MuJoCo =============
# 1 wall, R start, G goal, 0 free. Rows run along x, columns along y; a cell's centre is (row, column) * cell size.
LAYOUTS = {
    "room": "1111111 1GGGGG1 1GGGGG1 1GGRGG1 1GGGGG1 1GGGGG1 1111111",
    "u_maze": "11111 1RGG1 111G1 1GGG1 11111",
    "u_maze_eval": "11111 1R001 11101 1GGG1 11111",
    "u_maze_single_eval": "11111 1R001 11101 1G001 11111",
    "u4_maze": "11111 1GGG1 1R1G1 111G1 1G1G1 1GGG1 11111",
    "u4_maze_eval": "11111 10001 1R101 11101 1G101 1GGG1 11111",
    "u5_maze": "11111111 1GGGGGG1 1R1111G1 111111G1 1G1111G1 1GGGGGG1 11111111",
    "u5_maze_eval": "11111111 10000001 1R111101 11111101 1G1111G1 1GGGGGG1 11111111",
    "u5_maze_single_eval": "11111111 10000001 1R111101 11111101 1G111101 10000001 11111111",
    "big_maze": "11111111 1RG11GG1 1GG1GGG1 11GGG111 1GG1GGG1 1G1GG1G1 1GGG1GG1 11111111",
    "big_maze_eval": "11111111 1R011GG1 100100G1 11000111 10010001 101G01G1 10GG1GG1 11111111",
    "hardest_maze": "111111111111 1RGGG1GGGGG1 1G11G1G1G1G1 1GGGGGG1GGG1 1G1111G111G1 1GG1G1GGGGG1 11G1G1G1G111 "
                    "1GG1GGG1GGG1 111111111111",
}  # fmt: skip
HUMANOID_BIG_MAZE_EVAL = "11111111 1R011GG1 10010GG1 11000111 10010001 101G01G1 10GG1GG1 11111111"  # one goal more
CORRIDORS = ("u_maze", "u4_maze", "u5_maze")  # no fork: "d cells further" is one cell

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


# The ant's physics step is the official one. With gymnasium's, and its gear of 150, it threw itself out of its healthy
# range 26 times as often as Brax's; with 75 it falls, stands and moves about like that one (benchmark/README.md).
ANT_QPOS = (0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1)
ROBOTS = {  # state, goal and action dimensions; cell, noise; healthy heights; goal distances; physics; gear, positions
    "point": Robot(POINT_XML, 4, 2, 2, 2.0, 0.1, (-np.inf, np.inf), (1.0, 5.0), 0.01, 5),
    "ant": Robot("ant.xml", 29, 2, 8, 4.0, 0.1, (0.2, 1.0), (10.0, 10.0), 0.005, 10, 75.0, ANT_QPOS),
    "humanoid": Robot("humanoid.xml", 272, 3, 17, 2.0, 0.0, (1.0, 2.0), (1.0, 5.0), 0.003, 5),
}
GOAL_RADIUS, EASY_GOAL_RADIUS, HUMANOID_GOAL_HEIGHT = 0.5, 2.0, 1.25  # m
ENV_IDS = [robot + layout for robot in ROBOTS for layout in ("", *("_" + name for name in LAYOUTS))]


def corridor(layout: str) -> list:
    """Cells (row, column) of a maze without forks, from the start cell to its far end."""
    free = {(i, j): c for i, row in enumerate(LAYOUTS[layout].split()) for j, c in enumerate(row) if c != "1"}
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
    distances = tuple(int(d) for d in re.findall(r"(\d)f", config)) if re.fullmatch(r"(\df)*", config) else ()
    stitchable = layout in CORRIDORS and distances and 0 < min(distances) and max(distances) < len(corridor(layout))
    if base not in ENV_IDS or (gen and not stitchable):
        raise ValueError(f"unknown environment; known: {', '.join(ENV_IDS)}; stitching: ant_u_maze_gen_1f2f3f")
    return robot, layout, distances


class MujocoEnvs:
    """`num_envs` copies of one environment, stepped together by MuJoCo's C++ thread pool (`mujoco.rollout`).

    state (num_envs, state_dim): observations without the goal; goal (num_envs, goal_dim): commanded goals; steps and
    time_at_goal (num_envs,): env steps since the reset, and how many of them ended at the goal; episode (num_envs,):
    resets so far; fallen (num_envs,): whether the last step left the healthy range. A world is nothing but its row of
    physics (num_envs, 1 + nq + nv: time, positions, velocities), so a row is reset by writing it. Row i's k-th reset
    draws from a generator seeded with (*seed, i, k).
    """

    def __init__(self, env_id, num_envs, episode_length, seed, num_threads=0, fixed_resets=False):
        self.robot_name, layout, distances = parse_env_id(env_id)
        self.robot = robot = ROBOTS[self.robot_name]
        self.num_envs, self.episode_length, self.seed, self.fixed_resets = num_envs, episode_length, seed, fixed_resets
        self.maze = LAYOUTS.get(layout, "").split()
        if env_id == "humanoid_big_maze_eval":
            self.maze = HUMANOID_BIG_MAZE_EVAL.split()
        cells = {c: [(i, j) for i, row in enumerate(self.maze) for j in range(len(row)) if row[j] == c] for c in "1RG"}
        # A reset draws a class, then a pair of it (start, goal). Stitching has a class per distance, else there is one.
        classes = [[(start, goal) for start in cells["R"] for goal in cells["G"]]]
        if distances:
            path = corridor(layout)
            classes = [list(zip(path, path[d:])) for d in distances]
        self.pairs = [np.array(pairs) * robot.cell for pairs in classes]  # (pairs, 2, 2), m

        if robot.xml.endswith(".xml"):
            spec = mujoco.MjSpec.from_file(str(Path(gymnasium.__file__).parent / "envs/mujoco/assets" / robot.xml))
        else:
            spec = mujoco.MjSpec.from_string(robot.xml)
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER  # gymnasium's RK4 costs twice as much
        spec.option.timestep = robot.physics_step
        for actuator in spec.actuators:
            actuator.gear[0] = robot.gear or actuator.gear[0]
        for i, j in cells["1"]:  # boxes half a cell high; the point mass slides along them without friction
            spec.worldbody.add_geom(
                type=mujoco.mjtGeom.mjGEOM_BOX, size=[robot.cell / 2, robot.cell / 2, robot.cell / 4],
                pos=[i * robot.cell, j * robot.cell, robot.cell / 4], contype=0, conaffinity=1,
                condim=1 if self.robot_name == "point" else 3, rgba=[0.6, 0.55, 0.5, 1])  # fmt: skip
        if self.robot_name == "humanoid":  # what `_observe` needs of the bodies' inertial frames
            for sensor in ("POS", "XAXIS", "YAXIS", "ZAXIS", "LINVEL", "ANGVEL"):
                for body in spec.bodies[1:]:
                    spec.add_sensor(type=getattr(mujoco.mjtSensor, f"mjSENS_FRAME{sensor}"),
                                    objtype=mujoco.mjtObj.mjOBJ_BODY, objname=body.name)  # fmt: skip
            for joint in spec.joints[1:]:
                spec.add_sensor(type=mujoco.mjtSensor.mjSENS_JOINTACTFRC,
                                objtype=mujoco.mjtObj.mjOBJ_JOINT, objname=joint.name)  # fmt: skip
        self.model = spec.compile()
        self.qpos = np.array(robot.qpos or self.model.qpos0)
        self.rollout = mujoco.rollout.Rollout(nthread=num_threads or os.cpu_count())
        self.data = [mujoco.MjData(self.model) for _ in range(num_threads or os.cpu_count())]
        self.physics = np.zeros((num_envs, 1 + self.model.nq + self.model.nv))
        self.state = np.zeros((num_envs, robot.state_dim), np.float32)
        self.goal = np.zeros((num_envs, robot.goal_dim), np.float32)
        self.steps, self.time_at_goal, self.episode = np.zeros((3, num_envs), np.int64)
        self.fallen = np.zeros(num_envs, bool)

    def _observe(self, rows, sensors) -> None:
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

    def reset(self, mask: np.ndarray) -> None:
        """Starts a new episode in the rows of mask (num_envs,) and leaves every other row untouched."""
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
            if self.robot_name != "point":
                mujoco.mju_normalize4(qpos[3:7])  # the torso's quaternion, as it is after every step
            self.physics[i] = np.concatenate([[0.0], qpos, noise * rng.standard_normal(self.model.nv)])
            self.goal[i] = [*goal, HUMANOID_GOAL_HEIGHT][: self.robot.goal_dim]
        self.steps[rows] = self.time_at_goal[rows] = 0
        self.episode[rows] += 1
        rest = np.zeros((len(rows), 1, self.model.nu))  # without it, the thread's last control would be felt
        self._observe(rows, self.rollout.rollout(self.model, self.data, self.physics[rows], rest)[1][:, 0])

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
        self._observe(slice(None), sensors[:, -1])
        self.steps += 1
        self.time_at_goal += self.distance() < GOAL_RADIUS
        height, (low, high) = self.physics[:, 3], self.robot.healthy_height  # the point mass has none, and no limits
        expected = before + (needed - 0.5) * self.model.opt.timestep
        diverged = self.physics[:, 0] < expected  # MuJoCo starts a world and its clock anew when its physics blow up
        self.fallen = (height < low) | (height > high) | diverged
        return self.fallen | (self.steps >= self.episode_length)

    def distance(self) -> np.ndarray:
        """Distance (num_envs,) of every torso to its commanded goal, m."""
        return np.linalg.norm(self.state[:, : self.robot.goal_dim] - self.goal, axis=1)

    def state_dict(self) -> dict:
        names = ("physics", "state", "goal", "steps", "time_at_goal", "episode")
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in names}

    def load_state_dict(self, saved: dict) -> None:
        for name, value in saved.items():
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

    def __init__(self, capacity, num_envs, state_dim, action_dim, goal_dim, device):
        self.capacity, self.num_envs, self.goal_dim, self.device = capacity, num_envs, goal_dim, device
        self.state = torch.zeros(capacity, num_envs, state_dim, device=device)
        self.action = torch.zeros(capacity, num_envs, action_dim, device=device)
        self.episode = torch.zeros(capacity, num_envs, dtype=torch.int32, device=device)
        self.size = self.pointer = 0

    def add(self, state, action, episode) -> None:
        """A time step: state (num_envs, state_dim), action taken there (num_envs, action_dim), episode (num_envs,)."""
        self.state[self.pointer], self.action[self.pointer], self.episode[self.pointer] = state, action, episode
        self.pointer = (self.pointer + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, num_batches: int, batch_size: int, window: int, gamma: float) -> tuple:
        """Indices (anchor time, environment, goal time), each (num_batches, batch_size).

        Every environment gives one random window of consecutive time steps (more where one holds too few anchors), and
        all window - 1 anchors of all windows are shuffled and cut into batches: no anchor of a window comes twice.
        A goal lies in its anchor's episode and window.
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
        return self.blocks(self.stem(x).float())

    def forward(self, x):
        return self.head(self.hidden(x))


LOG_STD_MIN, LOG_STD_MAX = -5, 2


class GaussianActor(nn.Module):
    """pi(a | s, g): a Gaussian squashed by tanh; mean and log standard deviation are two heads of one trunk."""

    def __init__(self, state_dim, goal_dim, action_dim, width, depth, **options):
        super().__init__()
        self.trunk = ResidualMLP(state_dim + goal_dim, action_dim, width, depth, **options)
        self.log_std_head = Dense(width, action_dim)

    def forward(self, state, goal):
        """(batch, state_dim), (batch, goal_dim) -> mean and log standard deviation before tanh, (batch, action_dim)."""
        hidden = self.trunk.hidden(torch.cat([state, goal], -1))
        mean, raw = self.trunk.head(hidden).float(), self.log_std_head(hidden).float()
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(raw) + 1)


def sample_action(mean, log_std) -> tuple:
    """a = tanh(u), u ~ N(mean, std^2), reparameterised -> action (batch, action_dim), log pi(a | s, g) (batch,)."""
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * float(np.log(2 * np.pi))
    # log(1 - tanh(u)^2) = log(4 e / (1 + e)^2) with e = exp(-2 |u|): exact where tanh(u) rounds to 1, gradient included
    log_slope = 2 * (float(np.log(2)) - u.abs() - torch.log1p(torch.exp(-2 * u.abs())))
    return torch.tanh(u), (log_normal - log_slope).sum(-1)


class Agent(nn.Module):
    """Everything that learns: the policy, phi(s, a), psi(g), and the logarithm of the temperature alpha."""

    def __init__(self, state_dim, goal_dim, action_dim, args):
        super().__init__()
        options = dict(norm=args.norm, activation=args.activation, residual=args.residual)
        critic = dict(width=args.critic_width, depth=args.critic_depth, **options)
        self.actor = GaussianActor(state_dim, goal_dim, action_dim, args.actor_width, args.actor_depth, **options)
        self.state_action_encoder = ResidualMLP(state_dim + action_dim, args.repr_dim, **critic)
        self.goal_encoder = ResidualMLP(goal_dim, args.repr_dim, **critic)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def phi(self, state, action):
        return self.state_action_encoder(torch.cat([state, action], -1)).float()

    def psi(self, goal):
        return self.goal_encoder(goal).float()


@torch.no_grad()
def project_weights(module: nn.Module) -> None:
    """Scales every Dense layer's weights, unit by unit, to norm 1, in place (Simba-v2, Table 2)."""
    weights = [m.weight for m in module.modules() if isinstance(m, Dense)]
    torch._foreach_div_(weights, [w.norm(dim=1, keepdim=True) for w in weights])


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
    loss = -mean_i [f_ii - logsumexp_j f_ij] + logsumexp_coef mean_i (logsumexp_j (f_ij + 1e-6))^2.
    """
    # On a GPU float64 costs next to nothing and keeps the products out of TensorFloat-32: too few digits for distances.
    dtype = torch.float64 if phi.is_cuda else torch.float32
    energy = -PairwiseDistance.apply(phi.to(dtype), psi.to(dtype)).float()  # f_ij
    positive, row = energy.diagonal(), energy.logsumexp(1)
    if direction == "forward":
        nce = (row - positive).mean()
    elif direction == "backward":
        nce = (energy.logsumexp(0) - positive).mean()
    else:  # symmetric
        nce = (row + energy.logsumexp(0) - 2 * positive).mean()
    loss = nce + logsumexp_coef * (row + 1e-6).square().mean()
    n = len(energy)
    metrics = {
        "losses/critic": loss, "losses/nce": nce, "losses/logsumexp": row.mean(),
        "contrastive/categorical_accuracy": (energy.argmax(1) == torch.arange(n, device=energy.device)).float().mean(),
        "contrastive/logits_pos": positive.mean(),
        "contrastive/logits_neg": (energy.sum() - positive.sum()) / max(n * (n - 1), 1),
    }  # fmt: skip
    return loss, {name: value.detach() for name, value in metrics.items()}


def make_optimizers(agent, args, device) -> list:
    """Adam for the actor, for the temperature, and for the critic (both encoders)."""
    encoders = [*agent.state_action_encoder.parameters(), *agent.goal_encoder.parameters()]
    options = dict(lr=args.learning_rate, eps=1e-8, fused=device.type != "mps", capturable=args.cudagraphs)
    return [torch.optim.Adam(p, **options) for p in (list(agent.actor.parameters()), [agent.log_alpha], encoders)]


def update(agent, optimizers, batch, args) -> dict:
    """One gradient step on the actor, then the temperature, then the critic -> metrics, detached, on the device.

    All use the same batch: state (batch, state_dim), action (batch, action_dim), relabelled future goal (batch,
    goal_dim). The actor sees the critic and the temperature from before the step, and never a commanded goal.
    """
    (state, action, goal), (actor_optimizer, alpha_optimizer, critic_optimizer) = batch, optimizers
    autocast = dict(device_type=state.device.type, dtype=torch.bfloat16, enabled=args.amp)

    # Actor: alpha log pi(a|s,g) - f(s, a, g). The gradient passes through phi to the action; phi's weights get none.
    agent.state_action_encoder.requires_grad_(False)
    with torch.autocast(**autocast):
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
    with torch.autocast(**autocast):
        phi = agent.phi(state, action)
    critic_loss, metrics = contrastive_loss(phi, psi, args.logsumexp_coef, args.contrastive)
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()
    if args.norm == "hypersphere":
        project_weights(agent)
    metrics |= {"losses/actor": actor_loss.detach(), "losses/alpha": alpha_loss.detach()}
    return metrics | {"losses/entropy": entropy, "losses/alpha_value": alpha}


def capture_update(step, agent, optimizers, batch, args):
    """Captures step(agent, optimizers, batch, args) in a CUDA graph -> a function of a batch that replays it and
    overwrites the same metrics.

    Capture needs a few real updates first (Adam creates its state, libraries choose kernels). What they did to weights,
    Adam and random numbers is undone in place, because a graph keeps addresses.
    """
    static = [x.clone() for x in batch]
    weights, rng = copy.deepcopy(agent.state_dict()), torch.cuda.get_rng_state()
    moments = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in optimizers]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(agent, optimizers, static, args)
    torch.cuda.current_stream().wait_stream(stream)
    agent.load_state_dict(weights)
    for optimizer, saved in zip(optimizers, moments):
        for i, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                value.copy_(saved[i][name]) if i in saved else value.zero_()
        optimizer.zero_grad()  # the gradients are then allocated in the graph's own memory
    torch.cuda.set_rng_state(rng)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = step(agent, optimizers, static, args)

    def replay(batch):
        for buffer, value in zip(static, batch):
            buffer.copy_(value)
        graph.replay()
        return metrics

    return replay


# === Evaluation, and what to look at ==================================================================================
@torch.no_grad()
def evaluate(agent, envs, draw: int, device, keep_record: bool = False) -> tuple:
    """One episode per environment with the policy's mean -> metrics, record. Draws no random number from torch.

    time_at_goal: the mean number of steps that end within 0.5 m of the goal, until the episode's first end. `draw`
    numbers the set of starts and goals. record: goal, time_at_goal (num_envs, ...); where wanted state, action, alive
    (T, num_envs, ...).
    """
    envs.episode[:] = draw
    envs.reset(np.ones(envs.num_envs, bool))
    goal = torch.from_numpy(envs.goal).to(device)
    alive = np.ones(envs.num_envs, bool)
    time_at_goal, length, last, closest = (np.full(alive.shape, start) for start in (0.0, 0.0, np.inf, np.inf))
    record = {"state": [], "action": [], "alive": []}
    while alive.any():
        action = torch.tanh(agent.actor(torch.from_numpy(envs.state).to(device), goal)[0]).cpu().numpy()
        if keep_record:
            for name, value in (("state", envs.state), ("action", action), ("alive", alive)):
                record[name].append(value.copy())
        done, distance = envs.step(action), envs.distance()
        time_at_goal[alive], length[alive], last[alive] = envs.time_at_goal[alive], envs.steps[alive], distance[alive]
        closest[alive] = np.minimum(closest, distance)[alive]
        alive &= ~done
    metrics = {
        "eval/time_at_goal": time_at_goal, "eval/success_any": time_at_goal > 0, "eval/final_distance": last,
        "eval/success_easy": closest < EASY_GOAL_RADIUS, "eval/episodic_length": length,
    }  # fmt: skip
    record = {name: np.stack(values) for name, values in record.items() if values}
    return {name: float(value.mean()) for name, value in metrics.items()}, record | dict(
        goal=envs.goal.copy(), time_at_goal=time_at_goal)  # fmt: skip


@torch.no_grad()
def residual_norms(agent, batch) -> dict:
    """Mean L2 norm of what every residual block adds to its input, on a batch (Fig. 17)."""
    (state, action, goal), norms = batch, {}
    for name, network, inputs in (
        ("actor", agent.actor.trunk, [state, goal]), ("goal_encoder", agent.goal_encoder, [goal]),
        ("state_action_encoder", agent.state_action_encoder, [state, action]),
    ):  # fmt: skip
        hidden = network.stem(torch.cat(inputs, -1))
        for i, block in enumerate(network.blocks):
            residual = block.layers(hidden)
            norms[f"residual/{name}/block_{i:03d}"] = residual.norm(dim=-1).mean()
            hidden = hidden + residual if block.residual else residual
    return norms


@torch.no_grad()
def value_map(agent, envs, start, device, points_per_cell: int = 8) -> dict:
    """The critic over the floor (Fig. 9): f(s, a, g) at the policy's mean a; s is `start` (state_dim,) but for x, y.

    -> x, y (m), goals (goals, goal_dim), values (goals, len(x), len(y)); walls (rows, columns) and cell size (m).
    """
    cell, goals = envs.robot.cell, np.unique(envs.goal, axis=0)
    if envs.maze:
        low, high = np.zeros(2), (np.array([len(envs.maze), len(envs.maze[0])]) - 1) * cell
    else:
        high, goals = np.full(2, envs.robot.goal_distance[1]), goals[:1]
        low = -high
    x, y = (np.linspace(a, b, int((b - a) / cell * points_per_cell) + 1) for a, b in zip(low, high))
    state = np.repeat(start[None], len(x) * len(y), axis=0)
    state[:, :2] = np.stack(np.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2)
    state, values = torch.from_numpy(state).to(device), []
    for g in torch.from_numpy(goals).to(device):
        action = torch.tanh(agent.actor(state, g.expand(len(state), -1))[0])
        values.append(-torch.linalg.vector_norm(agent.phi(state, action) - agent.psi(g[None]), dim=-1))
    values = torch.stack(values).view(len(goals), len(x), len(y)).cpu().numpy()
    walls = np.array([[c == "1" for c in row] for row in envs.maze])
    return dict(x=x, y=y, goals=goals, values=values, walls=walls, cell=cell)


@torch.no_grad()
def embeddings(agent, record, device) -> dict:
    """phi(s, a) (T, repr_dim) along the recorded episode that spent most time at its goal (Fig. 10), and distance (T,)
    to that goal in m."""
    best = record["time_at_goal"].argmax()
    state, action = (torch.from_numpy(record[name][record["alive"][:, best], best]) for name in ("state", "action"))
    goal = record["goal"][best]
    distance = np.linalg.norm(state[:, : len(goal)].numpy() - goal, axis=1)
    return dict(phi=agent.phi(state.to(device), action.to(device)).cpu().numpy(), distance=distance)


# === Arguments and files ==============================================================================================
def refuse(flag: str, value: object, limit: str) -> None:
    """Ends the program for a user's mistake: one line on stderr, exit code 2."""
    print(f"{SCRIPT}.py: error: --{flag.replace('_', '-')} {value}: {limit}", file=sys.stderr)
    raise SystemExit(2)


def memory(device: str) -> int:
    """Bytes: what is free on the GPU, or all of the computer's memory."""
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.cuda.mem_get_info()[0] if device == "cuda" else everything


def resolve_args(args: Args) -> Args:
    """Fills in what depends on the task, and refuses what cannot work before anything is allocated or written."""
    args = copy.copy(args)
    check_numbers(args)
    if args.eval_env_id is None:
        far_goals = args.env_id.partition("_gen_")[0] + "_eval"
        args.eval_env_id = far_goals if far_goals in ENV_IDS else args.env_id
    for flag in ("env_id", "eval_env_id"):
        try:
            robot = parse_env_id(getattr(args, flag))[0]
        except ValueError as error:
            refuse(flag, getattr(args, flag), str(error))
    sizes = TASKS.get(args.env_id, TASKS[robot])
    total = args.total_timesteps or sizes["total_timesteps"]
    defaults = dict(eval_every=max(1, total // 100), checkpoint_every=max(1, total // 50)) | sizes
    for name in ("depth", "width"):
        value = getattr(args, name) or defaults.get(name, 0)
        defaults |= {f"actor_{name}": value, f"critic_{name}": value}
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"

    networks = 0  # per layer: weights, gradients and two moments (and their copies at capture), three activations
    for width, depth in ((args.actor_width, args.actor_depth), *[(args.critic_width, args.critic_depth)] * 2):
        networks += (depth + 1) * width * ((28 if args.cudagraphs else 16) * (width + 3) + 12 * args.batch_size)
    step_size = 4 * (ROBOTS[robot].state_dim + ROBOTS[robot].action_dim + 1)
    needed = {  # rough bytes, by the argument that asks for them
        "buffer_size": min(args.buffer_size, args.total_timesteps) * step_size,
        "depth": networks,
        "batch_size": 16 * args.batch_size**2,
        "repr_dim": 16 * args.repr_dim * (2 * args.critic_width + args.batch_size),
        "gradient_steps": 60 * args.gradient_steps * args.batch_size,
        "eval_episodes": 2 * args.eval_episodes * args.episode_length * step_size,
    }
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if args.buffer_device == "auto":
        fits = args.device == "cuda" and not missing["cuda"] and sum(needed.values()) < 0.9 * memory("cuda")
        args.buffer_device = "cuda" if fits else "cpu"

    value, episodes = vars(args), args.num_envs * args.episode_length
    ring = args.buffer_size // args.num_envs * args.num_envs if args.num_envs > 0 else 0  # what the replay can hold
    to_learn = args.learning_starts + 2 * args.num_envs * args.unroll_length
    same_robot = args.eval_env_id.split("_")[0] == args.env_id.split("_")[0]
    wrong = {  # limit -> the arguments that break it
        "must be greater than 0": [n for n in ("depth", *defaults, "repr_dim", "eval_episodes") if not value[n] > 0],
        "must lie between 0 and 2**32 - 1": ["seed"] * (not 0 <= args.seed < 2**32),
        "must not be negative": [n for n in ("num_threads", "logsumexp_coef") if not value[n] >= 0],
        "must be a multiple of 4: a block has 4 Dense layers":
            [n for n in ("depth", "actor_depth", "critic_depth") if value[n] % 4],
        "must be at most 1024": ["num_threads"] * (args.num_threads > 1024),
        "must not contain /": ["exp_name"] * ("/" in args.exp_name),
        "must lie between 0 and 1, exclusive": ["gamma"] * (not 0 < args.gamma < 1),
        "must be at least 2 steps": ["episode_length"] * (args.episode_length == 1),
        f"must be the same robot as --env-id {args.env_id}": ["eval_env_id"] * (not same_robot),
        f"must hold an episode of every environment, {episodes} steps": ["buffer_size"] * (args.buffer_size < episodes),
        f"must lie between an episode of every environment, {episodes} steps, and the {ring} that the replay holds":
            ["learning_starts"] * (not episodes <= args.learning_starts <= ring),
        f"must leave room to learn after --learning-starts: at least {to_learn} steps":
            ["total_timesteps"] * (args.total_timesteps < to_learn),
        "torch sees no such device here": [n for n in ("device", "buffer_device") if missing.get(value[n])],
        f"needs --device cuda, not {args.device}": ["cudagraphs"] * (args.cudagraphs and args.device != "cuda"),
    }  # fmt: skip
    for limit, names in wrong.items():
        for name in names:
            refuse(name, value[name], limit)
    places = dict(buffer_size=args.buffer_device, depth=args.device, batch_size=args.device, eval_episodes="cpu",
                  repr_dim=args.device, gradient_steps=args.buffer_device)  # fmt: skip
    for device in set(places.values()):
        here = {name: needed[name] for name in needed if places[name] == device}
        gigabytes, limit = sum(here.values()) / 1e9, memory(device) / 1e9
        if gigabytes > limit:
            name = max(here, key=here.get)
            refuse(name, value[name], f"the run needs about {gigabytes:.1f} GB, {device} has {limit:.1f} GB")
    try:
        if args.track:
            import wandb  # noqa: F401
    except ImportError:
        refuse("track", "", "needs Weights & Biases: pip install wandb")
    return args


def has_type(value, kind) -> bool:
    """Whether a flag of this type can have this value."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(has_type(part, get_args(kind)[0]) for part in value)
    if get_origin(kind) in (Union, UnionType):
        return any(has_type(value, part) for part in get_args(kind))
    return type(value) in ((int, float) if kind is float else (kind,))


def check_numbers(args: Args) -> None:
    """Refuses numbers that no flag can mean."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                refuse(name, value, "must be a finite number")
            if isinstance(number, int) and abs(number) > 10**12:
                refuse(name, value, "must be at most 10**12")


def parse_args(command_line: list) -> Args:
    """The command line -> arguments; with --resume, those not given come from the run's args.json."""
    args = tyro.cli(Args, args=command_line)
    if args.resume is None:
        return args
    path = Path(args.resume) / "args.json"
    try:
        complete = path.is_file() and path.with_name("checkpoint.pt").is_file()
    except OSError:  # the name is too long for a file
        complete = False
    if not complete:
        refuse("resume", args.resume, "is not a run folder with args.json and checkpoint.pt")
    try:
        description = json.loads(path.read_text())
        if description["script"] != SCRIPT:
            refuse("resume", args.resume, f"is a run of another script ({description['script']})")
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in description["args"].items()}
        saved = Args(**saved)
        for name, kind in get_type_hints(Args).items():
            if not has_type(getattr(saved, name), kind):
                raise TypeError(f"{name} is {getattr(saved, name)!r}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        refuse("resume", args.resume, f"has an args.json that this version cannot read ({error})")
    args = tyro.cli(Args, args=command_line, default=saved)
    for name in [field.name for field in fields(Args) if field.name not in RESUMABLE]:
        if getattr(args, name) != getattr(saved, name):
            refuse(name, getattr(args, name), f"a resumed run keeps its own value, {getattr(saved, name)}")
    return args


def lock_folder(run_dir: Path, args: Args):
    """Creates a new run's folder, and locks it for this process alone -> the open lock file."""
    try:
        run_dir.mkdir(parents=True, exist_ok=args.resume is not None)
        lock = open(run_dir / "lock", "w")
    except OSError as error:
        flag = "exp_name" if args.resume is None else "resume"
        refuse(flag, getattr(args, flag), f"cannot create the folder {run_dir} ({error.strerror})")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        refuse("resume", str(run_dir), "another process is working on this run")
    return lock


@contextmanager
def restoring(run_dir: Path, lock):
    """Around what reads a checkpoint: one that does not fit ends the program with one line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        lock.close()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        refuse("resume", str(run_dir), f"has a checkpoint.pt that does not fit ({reason})")
    except SystemExit:
        lock.close()
        raise


@contextmanager
def writing(run_dir: Path):
    """Around what writes to the run's folder: a full disk or a vanished folder ends the program with one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save turns the one into the other
        reason = " ".join(str(error).split())[:200]
        print(f"{SCRIPT}.py: error: cannot write to {run_dir}: {reason}", file=sys.stderr)
        raise SystemExit(1) from None


def save_file(path: Path, content) -> None:
    """Writes a .json, .npz or .pt file whole or not at all: a temporary file takes the old one's place when done."""
    temporary = path.with_suffix(".tmp")
    with writing(path.parent):
        try:
            with open(temporary, "wb") as file:
                if path.suffix == ".json":
                    file.write(json.dumps(content, indent=2).encode())
                elif path.suffix == ".npz":
                    np.savez_compressed(file, **content)
                else:
                    torch.save(content, file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def fixed_args(args: Args) -> dict:
    """The arguments that a resumed run keeps."""
    return {name: value for name, value in asdict(args).items() if name not in RESUMABLE}


def load_checkpoint(run_dir: Path, args: Args) -> dict:
    """A run's checkpoint.pt: tensors and plain Python only. The replay is mapped into memory, so that it is not there
    twice; all else is copied, because optimizers keep the tensors that they are given."""
    try:
        saved = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        saved = {name: value if name == "replay" else copy.deepcopy(value) for name, value in saved.items()}
        same = saved["args"] == fixed_args(args)
    except Exception as error:
        refuse("resume", str(run_dir), f"has a checkpoint.pt that cannot be read ({type(error).__name__})")
    if not same:
        refuse("resume", str(run_dir), "has a checkpoint.pt of another run")
    if not 0 <= saved["global_step"] <= args.total_timesteps:
        refuse("total_timesteps", args.total_timesteps, f"the run has already taken {saved['global_step']} steps")
    return saved


def start_logging(args: Args, run_dir: Path, first_step: int | None) -> SummaryWriter:
    """Writes args.json. What a killed part of the run had logged from first_step on is dropped."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        git = ""
    modules = [module for module in globals().values() if hasattr(module, "__version__")]
    versions = {module.__name__: str(module.__version__) for module in modules}
    versions |= {"python": platform.python_version(), "git": git}
    description = dict(script=SCRIPT, action_repeat=ACTION_REPEAT, args=asdict(args), versions=versions)
    save_file(run_dir / "args.json", description)
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name, config=asdict(args),
                   sync_tensorboard=True)  # fmt: skip
    return SummaryWriter(str(run_dir), purge_step=first_step)


def not_finite(metrics: dict) -> list:
    """The names of the losses that are no finite numbers: the networks have diverged."""
    return [tag for tag, value in metrics.items() if tag.startswith("losses/") and not math.isfinite(value)]


def fast_cpu() -> None:
    """On a CPU: numbers too small for float32's normal range become 0, and float32 matrix products go through oneDNN
    instead of MKL where a self-test finds them as exact (CPUs without bfloat16 matrix units): on AMD twice as fast.

    torch.set_float32_matmul_precision must come before: it undoes this."""
    torch.set_flush_denormal(True)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    if ((x @ x).double() - x.double() @ x.double()).abs().max() > 1e-3:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


# === The algorithm ====================================================================================================
def train(args: Args) -> Path:
    """Trains, logs to a new folder under runs/ (or to args.resume), and returns that folder."""
    args = resolve_args(args)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    device = torch.device(args.device)
    if device.type == "cpu":
        fast_cpu()

    seed, threads = (args.seed, 0), args.num_threads
    envs = MujocoEnvs(args.env_id, args.num_envs, args.episode_length, seed, threads, args.fixed_resets)
    eval_envs = MujocoEnvs(args.eval_env_id, args.eval_episodes, args.episode_length, (args.seed, 1), threads)
    dims = envs.robot.state_dim, envs.robot.goal_dim, envs.robot.action_dim
    agent = Agent(*dims, args).to(device)
    if args.norm == "hypersphere":
        project_weights(agent)
    if args.compile:  # once per width, batch size and kind of gradient
        torch._dynamo.config.recompile_limit = 32
        for block in [m for m in agent.modules() if isinstance(m, ResidualBlock)]:
            block.compile(dynamic=False)
    optimizers = make_optimizers(agent, args, device)
    capacity = min(args.buffer_size, args.total_timesteps) // args.num_envs
    replay = Replay(capacity, args.num_envs, dims[0], dims[2], dims[1], torch.device(args.buffer_device))
    steps_per_unroll = args.num_envs * args.unroll_length
    global_step = gradient_steps = 0
    walltime, eval_history = 0.0, {}

    if args.resume:
        run_dir = Path(args.resume)
        lock = lock_folder(run_dir, args)
        with restoring(run_dir, lock):
            saved = load_checkpoint(run_dir, args)
            global_step, gradient_steps = saved["global_step"], saved["gradient_steps"]
            if global_step + steps_per_unroll > args.total_timesteps:
                print(f"{run_dir} has already taken {global_step} steps; --total-timesteps makes it go on")
            agent.load_state_dict(saved["agent"])
            for optimizer, state in zip(optimizers, saved["optimizers"]):
                optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
            envs.load_state_dict(saved["envs"])
            if saved["replay"] is not None:
                replay.load_state_dict(saved["replay"])
            elif global_step + steps_per_unroll <= args.total_timesteps:
                print(f"the checkpoint holds no replay: {args.learning_starts} steps are collected before it learns on")
            walltime, eval_history = saved["walltime"], saved["eval_history"]
            torch.set_rng_state(saved["rng"])
            if device.type == "cuda" and saved["cuda_rng"] is not None:
                torch.cuda.set_rng_state(saved["cuda_rng"])
        del saved
    else:
        envs.reset(np.ones(args.num_envs, bool))
        run_dir = Path("runs") / f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
        lock = lock_folder(run_dir, args)
    writer = start_logging(args, run_dir, first_step=global_step + 1 if args.resume else None)
    start_time, learning_seconds, learning_steps, captured, stop = time.time(), 0.0, 0, None, []

    def request_stop(number, frame):
        stop.append(128 + number)
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nfinishing this training step, then saving; once more to stop at once\n")

    def log(metrics):
        metrics = {tag: float(value) for tag, value in metrics.items()}
        with writing(run_dir):
            for tag, value in metrics.items():
                writer.add_scalar(tag, value, global_step)

    def is_due(every):  # in env steps, rounded down to whole training steps
        return global_step // steps_per_unroll % max(1, every // steps_per_unroll) == 0

    def run_evaluation(keep_record=False):
        metrics, record = evaluate(agent, eval_envs, global_step, device, keep_record)
        history = eval_history | {global_step: metrics["eval/time_at_goal"]}
        if is_due(args.eval_every):  # an extra evaluation, at the end of a run that is then resumed, must not count
            eval_history.update(history)
        metrics["eval/time_at_goal_last5"] = float(np.mean(list(history.values())[-5:]))
        log(metrics)
        return metrics, record

    def save_checkpoint():
        with writing(run_dir):
            writer.flush()
        unfinished = global_step + steps_per_unroll <= args.total_timesteps  # else nobody continues from its replay
        cuda_rng = torch.cuda.get_rng_state() if device.type == "cuda" else None
        save_file(run_dir / "checkpoint.pt", dict(
            args=fixed_args(args), agent=agent.state_dict(),
            optimizers=[optimizer.state_dict()["state"] for optimizer in optimizers],
            envs=envs.state_dict(), replay=replay.state_dict() if args.checkpoint_replay and unfinished else None,
            global_step=global_step, gradient_steps=gradient_steps, eval_history=eval_history,
            walltime=walltime + time.time() - start_time, rng=torch.get_rng_state(), cuda_rng=cuda_rng))  # fmt: skip

    handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", unit_scale=True, smoothing=0.05,
               mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
    if global_step == 0:
        run_evaluation()
    while global_step + steps_per_unroll <= args.total_timesteps:
        step_start = time.time()
        learning = replay.size * args.num_envs >= args.learning_starts  # before collecting: 17 unrolls of prefill
        # Collect: the stochastic policy pursues the commanded goals
        returns, lengths, fallen = [], [], []
        with torch.no_grad():
            for _ in range(args.unroll_length):
                state, goal = torch.from_numpy(envs.state).to(device), torch.from_numpy(envs.goal).to(device)
                action, _ = sample_action(*agent.actor(state, goal))
                replay.add(state, action, torch.from_numpy(envs.episode))
                done = envs.step(action.cpu().numpy())
                returns.extend(envs.time_at_goal[done])
                lengths.extend(envs.steps[done])
                fallen.extend(envs.fallen[done])
                envs.reset(done)
        global_step += steps_per_unroll

        # Learn: batches of state, action and a future goal
        if learning:
            for indices in zip(*replay.sample(args.gradient_steps, args.batch_size, args.episode_length, args.gamma)):
                batch = [x.to(device) for x in replay.gather(*indices)]
                if args.cudagraphs:
                    captured = captured or capture_update(update, agent, optimizers, batch, args)
                    metrics = captured(batch)
                else:
                    metrics = update(agent, optimizers, batch, args)
            gradient_steps += args.gradient_steps
            log(metrics)
            for tag in not_finite(metrics)[:1]:
                print(f"{SCRIPT}.py: error: {tag} is not finite since step {global_step}: saving", file=sys.stderr)
                stop.append(1)
            if learning_steps:  # the first training step warms up and compiles
                learning_seconds += time.time() - step_start
                rate = learning_steps / learning_seconds
                log(
                    {
                        "charts/SPS": rate * steps_per_unroll,
                        "charts/gradient_steps_per_second": rate * args.gradient_steps,
                    }
                )
            learning_steps += 1

        # Log, evaluate, save
        log({"charts/gradient_steps": gradient_steps, "charts/walltime": walltime + time.time() - start_time,
             "charts/replay_size": replay.size * args.num_envs, "charts/frames": global_step,
             "charts/replay_ratio": args.gradient_steps / steps_per_unroll if learning else 0})  # fmt: skip
        if returns:  # of the sparse reward: 1 for every step that ends at the goal
            log({"charts/episodic_return": np.mean(returns), "charts/episodic_length": np.mean(lengths),
                 "charts/fallen": np.mean(fallen)})  # fmt: skip
            bar.set_postfix(time_at_goal=f"{np.mean(returns):.1f}")
        bar.update(steps_per_unroll)
        if args.log_residual_norms and learning and is_due(args.eval_every):
            log(residual_norms(agent, batch))
        if is_due(args.eval_every) and global_step + steps_per_unroll <= args.total_timesteps:
            run_evaluation()
        if stop or is_due(args.checkpoint_every):
            save_checkpoint()
        if stop:
            with writing(run_dir):
                writer.close()
            lock.close()
            raise SystemExit(stop[0])

    metrics, record = run_evaluation(keep_record=True)
    save_checkpoint()
    with writing(run_dir):
        writer.close()
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if args.save_value_map:
        paths = dict(paths=record["state"][..., : dims[1]]) | {k: record[k] for k in ("alive", "goal", "time_at_goal")}
        save_file(run_dir / "value_map.npz", value_map(agent, eval_envs, record["state"][0, 0], device) | paths)
    if args.save_embeddings:
        save_file(run_dir / "embeddings.npz", embeddings(agent, record, device))
    if args.save_model:
        save_file(run_dir / "model.pt", agent.state_dict())
    summary = dict(global_step=global_step, gradient_steps=gradient_steps, walltime=walltime + time.time() - start_time)
    save_file(run_dir / "summary.json", summary | metrics)
    print(f"{run_dir}: reached {metrics['eval/success_any']:.0%} of the goals and spent "
          f"{metrics['eval/time_at_goal']:.0f} of {args.episode_length} steps there")  # fmt: skip
    lock.close()
    return run_dir


if __name__ == "__main__":
    train(parse_args(sys.argv[1:]))
