"""Deep contrastive RL: "1000 Layer Networks for Self-Supervised RL" (Wang et al., NeurIPS 2025, arXiv 2503.14858).

TODO docstring
"""

import copy
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple, Optional

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

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


@dataclass
class Args:
    exp_name: str = "crl_deep"
    """name of this experiment, part of the run folder's name"""
    seed: int = 1
    """seeds python, numpy, torch and every environment reset"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks live; auto takes a GPU where there is one"""
    torch_deterministic: bool = False
    """ask torch for deterministic kernels (only a GPU needs it: two CPU runs are bit-identical anyway)"""
    track: bool = False
    """also log to Weights & Biases (install wandb yourself)"""
    wandb_project_name: str = "clayrl"
    """the Weights & Biases project"""
    wandb_entity: Optional[str] = None
    """the Weights & Biases user or team"""
    capture_video: bool = False
    """at the end, film one evaluation episode (headless, needs EGL) into the run folder"""
    save_model: bool = False
    """at the end, save the networks' weights alone as model.pt"""
    checkpoint_every: Optional[int] = None
    """environment steps between checkpoints; default: a tenth of the run (one is always written at the end)"""
    checkpoint_replay: bool = True
    """keep the replay in the checkpoint; without it a resumed run refills the replay before it learns"""
    resume: Optional[str] = None
    """a run folder to continue; its args.json gives every flag but the few that may change"""

    # --- environment -------------------------------------------------------------------------------------------------
    env_id: str = "point_u_maze"
    """training environment, for instance point_u_maze, ant_u4_maze, humanoid, ant_u_maze_gen_1f2f3f"""
    eval_env_id: Optional[str] = None
    """evaluation environment; default: the training maze with its far goals (`..._eval`) where the paper has one"""
    episode_length: Optional[int] = None
    """time limit in environment steps; default: the task table"""
    num_envs: Optional[int] = None
    """training environments stepped side by side; default: the task table"""
    num_threads: int = 0
    """threads of the simulator, 0 for one per core; does not change the results"""
    fixed_resets: bool = False
    """every training environment repeats its first start and goal for ever, as the official code does"""

    # --- rhythm: one training step collects num_envs * unroll_length env steps, then does gradient_steps updates -----
    total_timesteps: Optional[int] = None
    """environment steps over all environments; default: the task table"""
    unroll_length: Optional[int] = None
    """environment steps of each environment per training step; default: the task table"""
    gradient_steps: Optional[int] = None
    """gradient steps per training step; default: the task table"""
    buffer_size: Optional[int] = None
    """replay capacity in environment steps over all environments; default: the task table"""
    learning_starts: Optional[int] = None
    """environment steps over all environments before the first gradient step; default: the task table"""
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the replay lives; auto: beside the networks where it fits, else in main memory"""
    eval_every: Optional[int] = None
    """environment steps between evaluations, rounded down to training steps; default: a hundredth of the run"""
    eval_episodes: int = 128
    """evaluation environments, one episode each"""

    # --- algorithm ---------------------------------------------------------------------------------------------------
    batch_size: Optional[int] = None
    """state-action-goal triples per gradient step; each is a negative for all others; default: the task table"""
    learning_rate: Optional[float] = None
    """Adam's learning rate for actor, critic and temperature; default: the task table"""
    gamma: float = 0.99
    """goals lie a geometric(1 - gamma) number of steps in the future (in environment steps); nothing is bootstrapped"""
    logsumexp_coef: float = 0.1
    """weight of the penalty mean(logsumexp^2) in the critic loss"""
    entropy_coef: float = 0.5
    """the policy's target entropy is minus this times the number of action dimensions"""
    repr_dim: int = 64
    """dimension of phi(s, a) and psi(g)"""
    contrastive: Literal["forward", "backward", "symmetric"] = "forward"
    """InfoNCE over goals per state-action (the paper's), over state-actions per goal, or both"""

    # --- networks ----------------------------------------------------------------------------------------------------
    depth: int = 4
    """Dense layers inside the residual blocks of all three networks, a multiple of 4"""
    actor_depth: Optional[int] = None
    """the actor's depth; default: --depth"""
    critic_depth: Optional[int] = None
    """the depth of both encoders; default: --depth"""
    width: Optional[int] = None
    """hidden units per layer; default: the task table"""
    actor_width: Optional[int] = None
    """the actor's width; default: --width"""
    critic_width: Optional[int] = None
    """the width of both encoders; default: --width"""
    residual: bool = True
    """skip connection around every 4 Dense layers"""
    norm: Literal["layer", "none", "hypersphere"] = "layer"
    """LayerNorm, nothing, or unit-norm weights and hidden vectors (Simba-v2) after every hidden Dense layer"""
    activation: Literal["swish", "relu"] = "swish"
    """activation after every hidden Dense layer"""

    # --- speed -------------------------------------------------------------------------------------------------------
    amp: bool = False
    """run the networks in bfloat16; losses, distances and Adam stay in float32"""
    compile: bool = False
    """compile the residual block (one block's code, reused for all)"""
    cudagraphs: bool = False
    """capture the whole update (three losses, three Adams) in one CUDA graph and replay it per batch"""

    # --- what to look at ---------------------------------------------------------------------------------------------
    log_residual_norms: bool = False
    """at every evaluation, log the mean L2 norm of each block's residual (paper Fig. 17)"""
    save_value_map: bool = False
    """at the end, save the critic's values over the maze and the evaluation's paths to value_map.npz (paper Fig. 9)"""
    save_embeddings: bool = False
    """at the end, save phi(s, a) along the best evaluation episode to embeddings.npz (paper Fig. 10)"""


# The paper's values (Table 7), and a laptop-sized row for the point mass; total steps as in Fig. 1.
PAPER = dict(
    total_timesteps=100_000_000, num_envs=512, episode_length=1000, unroll_length=62, gradient_steps=800,
    batch_size=512, width=256, learning_rate=3e-4, buffer_size=5_120_000, learning_starts=512_000,
)  # fmt: skip
POINT = dict(
    total_timesteps=500_000, num_envs=64, episode_length=150, unroll_length=50, gradient_steps=100,
    batch_size=256, width=64, learning_rate=1e-3, buffer_size=500_000, learning_starts=9_600,
)  # fmt: skip
TASKS = {
    "point": POINT,
    "ant": PAPER,
    "ant_hardest_maze": PAPER | dict(total_timesteps=200_000_000),
    "ant_u5_maze": PAPER | dict(total_timesteps=400_000_000),
    "humanoid": PAPER,
    "humanoid_u_maze": PAPER | dict(total_timesteps=400_000_000),
    "humanoid_big_maze": PAPER | dict(total_timesteps=400_000_000),
}
# What may be given anew with --resume.
RESUMABLE = {
    "resume", "total_timesteps", "device", "buffer_device", "eval_every", "eval_episodes", "checkpoint_every",
    "checkpoint_replay", "track", "wandb_project_name", "wandb_entity", "capture_video", "save_model",
    "log_residual_norms", "save_value_map", "save_embeddings", "num_threads", "compile", "cudagraphs",
}  # fmt: skip


def refuse(flag: str, value: object, limit: str) -> None:
    """Ends the program for a user's mistake: one line on stderr, exit code 2."""
    print(f"crl_deep.py: error: {flag} {value}: {limit}", file=sys.stderr)
    raise SystemExit(2)


# ======================================================================================================================
# Environments: a point mass, an ant and a humanoid on an open floor or in a maze, simulated by MuJoCo
# ======================================================================================================================
# 1 wall, R start, G goal, 0 free. Rows run along x, columns along y; a cell's centre is (row, column) * cell size.
LAYOUTS = {
    "room": "1111111 1GGGGG1 1GGGGG1 1GGRGG1 1GGGGG1 1GGGGG1 1111111",
    "u": "11111 1RGG1 111G1 1GGG1 11111",
    "u_eval": "11111 1R001 11101 1GGG1 11111",
    "u_single_eval": "11111 1R001 11101 1G001 11111",
    "u4": "11111 1GGG1 1R1G1 111G1 1G1G1 1GGG1 11111",
    "u4_eval": "11111 10001 1R101 11101 1G101 1GGG1 11111",
    "u5": "11111111 1GGGGGG1 1R1111G1 111111G1 1G1111G1 1GGGGGG1 11111111",
    "u5_eval": "11111111 10000001 1R111101 11111101 1G1111G1 1GGGGGG1 11111111",
    "u5_single_eval": "11111111 10000001 1R111101 11111101 1G111101 10000001 11111111",
    "big": "11111111 1RG11GG1 1GG1GGG1 11GGG111 1GG1GGG1 1G1GG1G1 1GGG1GG1 11111111",
    "big_eval": "11111111 1R011GG1 100100G1 11000111 10010001 101G01G1 10GG1GG1 11111111",
    "hardest": "111111111111 1RGGG1GGGGG1 1G11G1G1G1G1 1GGGGGG1GGG1 1G1111G111G1 1GG1G1GGGGG1 11G1G1G1G111 1GG1GGG1GGG1 111111111111",
}  # fmt: skip
HUMANOID_BIG_EVAL = "11111111 1R011GG1 10010GG1 11000111 10010001 101G01G1 10GG1GG1 11111111"  # one more goal
CORRIDORS = ("u", "u4", "u5")  # mazes without a fork, in which "d cells further" is one cell

# A point mass with the dynamics of JaxGCRL's simple maze: 5 N on 0.327 kg + 1 kg armature, no damping, radius 0.25 m.
POINT_XML = """
<mujoco model="point">
  <option timestep="0.01"/>
  <visual><global offwidth="640" offheight="480"/></visual>
  <worldbody>
    <light pos="0 0 30" dir="0 0 -1" directional="true"/>
    <geom name="floor" type="plane" size="40 40 1" contype="0" conaffinity="0" rgba=".9 .9 .9 1"/>
    <body name="torso" pos="0 0 0.25">
      <joint name="x" type="slide" axis="1 0 0" armature="1"/>
      <joint name="y" type="slide" axis="0 1 0" armature="1"/>
      <geom name="torso" type="sphere" size="0.25" mass="0.327" condim="1" rgba=".2 .4 .8 1"/>
    </body>
  </worldbody>
  <actuator>
    <motor joint="x" gear="5" ctrlrange="-1 1" ctrllimited="true"/>
    <motor joint="y" gear="5" ctrlrange="-1 1" ctrllimited="true"/>
  </actuator>
</mujoco>"""


class Robot(NamedTuple):
    xml: str  # a file of the installed gymnasium package, or the XML itself
    state_dim: int
    goal_dim: int  # the goal is the first goal_dim entries of a state: (x, y) or (x, y, z)
    action_dim: int
    frame_skip: int  # physics steps per environment step
    cell: float  # maze cell, m
    reset_noise: float  # U(-noise, noise) on every position, noise * N(0, 1) on every velocity
    healthy_height: tuple  # the episode ends when the torso's height leaves this range, m
    goal_distance: tuple  # on the open floor: the goal's distance from the start, m
    initial_qpos: tuple = ()  # () for the XML's own


ROBOTS = {
    "point": Robot(POINT_XML, 4, 2, 2, 5, 2.0, 0.1, (-np.inf, np.inf), ()),
    "ant": Robot(
        "ant.xml", 29, 2, 8, 5, 4.0, 0.1, (0.2, 1.0), (10.0, 10.0), (0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1)
    ),
    "humanoid": Robot("humanoid.xml", 272, 3, 17, 5, 2.0, 0.0, (1.0, 2.0), (1.0, 5.0)),
}
GOAL_RADIUS, EASY_GOAL_RADIUS = 0.5, 2.0  # m
HUMANOID_GOAL_HEIGHT = 1.25  # m


def known_env_ids() -> dict:
    """Every environment id -> (robot, layout name or None for the open floor); stitching ids are parsed besides."""
    ids = {"point_room": ("point", "room"), "ant": ("ant", None), "humanoid": ("humanoid", None)}
    for robot in ROBOTS:
        for layout in LAYOUTS:
            name, _, variant = layout.partition("_")
            if name != "room":
                ids["_".join(filter(None, (robot, name, "maze", variant)))] = (robot, layout)
    return ids


def parse_env_id(env_id: str) -> tuple:
    """Environment id -> (robot, layout name or None, stitching distances). Raises ValueError for an unknown id.

    `ant_u_maze_gen_1f2f3f` (paper Fig. 11): start and goal lie 1, 2 or 3 cells apart, anywhere along the corridor.
    """
    ids = known_env_ids()
    base, _, distances = env_id.partition("_gen_")
    if base in ids and re.fullmatch(r"(\df)*", distances):
        robot, layout = ids[base]
        distances = tuple(int(d) for d in distances.split("f")[:-1])
        if not distances and "_gen" not in env_id:
            return robot, layout, ()
        if layout in CORRIDORS and distances and 0 < min(distances) and max(distances) < len(corridor(layout)):
            return robot, layout, distances
    raise ValueError(
        f"unknown environment; known: {', '.join(sorted(ids))}, and <point|ant|humanoid>_<u|u4|u5>_maze_gen_1f2f3f"
    )


def default_eval_env_id(env_id: str) -> str:
    """The environment that the paper evaluates on: the far goals of the same maze, where it has such a set."""
    eval_env_id = env_id.partition("_gen_")[0] + "_eval"
    return eval_env_id if eval_env_id in known_env_ids() else env_id


def corridor(layout: str) -> list:
    """Cells (row, column) of a fork-less maze, from the start cell to its far end."""
    maze = LAYOUTS[layout].split()
    free = {(i, j) for i, row in enumerate(maze) for j, c in enumerate(row) if c != "1"}
    path = [next(cell for cell in sorted(free) if maze[cell[0]][cell[1]] == "R")]
    while True:
        i, j = path[-1]
        ahead = [c for c in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)) if c in free and c not in path]
        if not ahead:
            return path
        path.append(ahead[0])


class MujocoEnvs:
    """`num_envs` copies of one environment, stepped together by MuJoCo's C++ thread pool (`mujoco.rollout`).

    Attributes that change: `state` (num_envs, state_dim) float32 observations without the goal; `goal` (num_envs,
    goal_dim) commanded goals; since the reset, `steps` (num_envs,) and how many of them ended at the goal,
    `time_at_goal` (num_envs,); `episode` (num_envs,) resets so far.
    A world is nothing but its row of `physics` (num_envs, 1 + nq + nv: time, positions, velocities), so a single world
    is reset by writing its row. Row i's k-th reset draws from a generator seeded with (seed, i, k).
    """

    def __init__(self, env_id, num_envs, episode_length, seed, num_threads=0, fixed_resets=False):
        self.robot_name, layout, distances = parse_env_id(env_id)
        self.robot = robot = ROBOTS[self.robot_name]
        self.num_envs, self.episode_length, self.seed, self.fixed_resets = num_envs, episode_length, seed, fixed_resets
        self.maze = []
        if layout is not None:
            text = HUMANOID_BIG_EVAL if env_id == "humanoid_big_maze_eval" else LAYOUTS[layout]
            self.maze = text.split()
        # Start-goal pairs by class: a reset draws a class, then a pair of it. (pairs, 2, 2): start and goal, each (x, y)
        cells = {c: [(i, j) for i, row in enumerate(self.maze) for j in range(len(row)) if row[j] == c] for c in "1RG"}
        if distances:
            path = corridor(layout)
            classes = [list(zip(path, path[d:])) for d in distances]
        else:
            classes = [[(start, goal) for start in cells["R"] for goal in cells["G"]]]
        self.pairs = [np.array(pairs, float).reshape(-1, 2, 2) * robot.cell for pairs in classes]

        self.model = self._build_model(cells["1"])
        self.nq, self.nv = self.model.nq, self.model.nv
        self.control_dt = self.model.opt.timestep * robot.frame_skip
        self.initial_qpos = np.array(robot.initial_qpos or self.model.qpos0)
        threads = num_threads or os.cpu_count()
        self.rollout = mujoco.rollout.Rollout(nthread=threads)
        self.data = [mujoco.MjData(self.model) for _ in range(threads)]
        # Sensor values belong to the state *before* a physics step: one more step than needed gives the new state's.
        self.physics_steps = robot.frame_skip + (self.model.nsensor > 0)
        self.physics = np.zeros((num_envs, 1 + self.nq + self.nv))
        self.state = np.zeros((num_envs, robot.state_dim), np.float32)
        self.goal = np.zeros((num_envs, robot.goal_dim), np.float32)
        self.steps = np.zeros(num_envs, np.int64)
        self.time_at_goal = np.zeros(num_envs, np.int64)
        self.episode = np.zeros(num_envs, np.int64)

    def _build_model(self, walls) -> mujoco.MjModel:
        robot = self.robot
        if robot.xml.endswith(".xml"):
            assets = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
            spec = mujoco.MjSpec.from_file(str(assets / robot.xml))
        else:
            spec = mujoco.MjSpec.from_string(robot.xml)
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER  # gymnasium's RK4 costs 3.5 times as much
        for i, j in walls:  # boxes one cell wide and half a cell high
            spec.worldbody.add_geom(
                type=mujoco.mjtGeom.mjGEOM_BOX,
                pos=[i * robot.cell, j * robot.cell, robot.cell / 4],
                size=[robot.cell / 2, robot.cell / 2, robot.cell / 4],
                contype=0, conaffinity=1, condim=1 if self.robot_name == "point" else 3, rgba=[0.6, 0.55, 0.5, 1],
            )  # fmt: skip
        if self.robot_name == "humanoid":
            frame = ("mjSENS_FRAMEPOS", "mjSENS_FRAMEQUAT", "mjSENS_FRAMELINVEL", "mjSENS_FRAMEANGVEL")
            for sensor in frame:
                for body in spec.bodies[1:]:
                    spec.add_sensor(
                        type=getattr(mujoco.mjtSensor, sensor), objtype=mujoco.mjtObj.mjOBJ_BODY, objname=body.name
                    )
            for joint in spec.joints[1:]:
                spec.add_sensor(
                    type=mujoco.mjtSensor.mjSENS_JOINTACTFRC, objtype=mujoco.mjtObj.mjOBJ_JOINT, objname=joint.name
                )
        return spec.compile()

    def _observe(self, rows, sensors) -> None:
        """Writes `state` from `physics`. Point and ant: positions and velocities. Humanoid: those, and as in gymnasium
        each body's inertia (10) and velocity (6) about the centre of mass, and the joints' actuator forces.
        The commanded goal is no part of it (in the official humanoid it leaks into the state)."""
        parts = [self.physics[rows, 1:]]
        if self.robot_name == "humanoid":
            n, bodies = len(sensors), self.model.nbody - 1
            split = np.cumsum([3 * bodies, 4 * bodies, 3 * bodies, 3 * bodies])
            position, quaternion, linear, angular, force = np.split(sensors, split, axis=1)
            position, linear, angular = (x.reshape(n, bodies, 3) for x in (position, linear, angular))
            w, x, y, z = np.moveaxis(quaternion.reshape(n, bodies, 4), -1, 0)
            rotation = np.stack(
                [
                    1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                    2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                    2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
                ], axis=-1,
            ).reshape(n, bodies, 3, 3)  # fmt: skip
            mass = self.model.body_mass[1:]
            offset = position - np.average(position, axis=1, weights=mass)[:, None]  # from the centre of mass
            # Parallel-axis theorem: R diag(I) R^T + m (|d|^2 1 - d d^T)
            inertia = np.einsum("nbij,bj,nbkj->nbik", rotation, self.model.body_inertia[1:], rotation)
            inertia += (mass[:, None] * (offset**2).sum(-1, keepdims=True))[..., None] * np.eye(3)
            inertia -= mass[:, None, None] * offset[..., :, None] * offset[..., None, :]
            inertia = inertia[..., [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
            masses = np.broadcast_to(mass[:, None], (n, bodies, 1))
            cinert = np.concatenate([inertia, mass[:, None] * offset, masses], -1)  # (n, 13, 10)
            cvel = np.concatenate([angular, linear - np.cross(angular, offset)], -1)  # (n, 13, 6)
            parts += [cinert.reshape(n, -1), cvel.reshape(n, -1), force]
        self.state[rows] = np.concatenate(parts, axis=1)

    def reset(self, mask: np.ndarray) -> None:
        """Starts a new episode in the rows of `mask` (num_envs,) and leaves every other row untouched."""
        rows = np.flatnonzero(mask)
        for i in rows:
            rng = np.random.default_rng([*self.seed, i, 0 if self.fixed_resets else self.episode[i]])
            if self.maze:
                pairs = self.pairs[rng.integers(len(self.pairs))]
                start, goal = pairs[rng.integers(len(pairs))]
            else:
                distance, angle = rng.uniform(*self.robot.goal_distance), rng.uniform(0, 2 * np.pi)
                start, goal = np.zeros(2), distance * np.array([np.cos(angle), np.sin(angle)])
            noise = self.robot.reset_noise
            qpos = self.initial_qpos + rng.uniform(-noise, noise, self.nq)
            qpos[:2] += start
            self.physics[i] = np.concatenate([[0.0], qpos, noise * rng.standard_normal(self.nv)])
            self.goal[i] = [*goal, HUMANOID_GOAL_HEIGHT][: self.robot.goal_dim]
        self.steps[rows] = self.time_at_goal[rows] = 0
        self.episode[rows] += 1
        sensors = None
        if self.model.nsensor and len(rows):
            sensors = self.rollout.rollout(self.model, self.data, self.physics[rows], nstep=1)[1][:, 0]
        self._observe(rows, sensors)

    def step(self, action: np.ndarray) -> np.ndarray:
        """action (num_envs, action_dim) in [-1, 1] -> done (num_envs,) bool: fallen over, or the time limit is reached.
        `state` is then the last one of the episode, until `reset`."""
        control = np.repeat((action * self.model.actuator_ctrlrange[:, 1])[:, None], self.physics_steps, axis=1)
        states, sensors = self.rollout.rollout(self.model, self.data, self.physics, control)
        before = self.physics[:, 0].copy()
        self.physics[:] = states[:, self.robot.frame_skip - 1]
        self._observe(slice(None), sensors[:, -1] if self.model.nsensor else None)
        self.steps += 1
        self.time_at_goal += self.distance() < GOAL_RADIUS
        low, high = self.robot.healthy_height
        height = self.physics[:, 3]
        diverged = self.physics[:, 0] < before  # MuJoCo starts a world anew when its physics blow up
        return (height < low) | (height > high) | diverged | (self.steps >= self.episode_length)

    def distance(self) -> np.ndarray:
        """Distance (num_envs,) of every torso to its commanded goal, m."""
        return np.linalg.norm(self.state[:, : self.robot.goal_dim] - self.goal, axis=1)

    def state_dict(self) -> dict:
        names = ("physics", "state", "goal", "steps", "time_at_goal", "episode")
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in names}

    def load_state_dict(self, saved: dict) -> None:
        for name, value in saved.items():
            getattr(self, name)[:] = value.numpy()


# ======================================================================================================================
# Replay: a ring of time steps x environments, relabelled with future goals when sampled (paper Section 3, spec of CRL)
# ======================================================================================================================
def future_offset(remaining: torch.Tensor, uniform: torch.Tensor, gamma: float) -> torch.Tensor:
    """How many steps ahead the goal lies: geometric(1 - gamma), truncated to the `remaining` steps of the episode.

    P(k) is proportional to gamma^k for k = 1..remaining, by inversion of its distribution function at `uniform` (float64
    in [0, 1), same shape): k = ceil(log(1 - u (1 - gamma^n)) / log gamma). The last step (0 remaining) is its own goal.
    """
    log_gamma = float(np.log(gamma))
    offset = torch.ceil(torch.log1p(uniform * torch.expm1(remaining * log_gamma)) / log_gamma)
    return torch.minimum(offset.clamp(min=1), remaining).long()


class Replay:
    """The last `capacity` time steps of every environment. A goal is a future state, so no goal is stored.

    state (capacity, num_envs, state_dim), action (capacity, num_envs, action_dim), episode (capacity, num_envs).
    """

    def __init__(self, capacity, num_envs, state_dim, action_dim, goal_dim, device):
        self.capacity, self.num_envs, self.goal_dim, self.device = capacity, num_envs, goal_dim, device
        self.state = torch.zeros(capacity, num_envs, state_dim, device=device)
        self.action = torch.zeros(capacity, num_envs, action_dim, device=device)
        self.episode = torch.zeros(capacity, num_envs, dtype=torch.int32, device=device)
        self.size = self.pointer = 0

    def add(self, state, action, episode) -> None:
        """One time step of all environments: state (num_envs, state_dim), the action taken there, the episode's id."""
        self.state[self.pointer], self.action[self.pointer], self.episode[self.pointer] = state, action, episode
        self.pointer = (self.pointer + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, num_batches: int, batch_size: int, window: int, gamma: float) -> tuple:
        """Indices (anchor time, environment, goal time), each (num_batches, batch_size).

        As in the official code, every environment gives a random window of `window` consecutive time steps, and no
        anchor is drawn twice: all window - 1 anchors of all windows are shuffled and cut into batches. Where one window
        per environment holds too few anchors, it takes as many as needed. The goal lies in the anchor's episode and window.
        """
        needed = num_batches * batch_size
        windows = -(-needed // (self.num_envs * (window - 1)))
        start = torch.randint(self.size - window + 1, (windows, self.num_envs), device=self.device)
        step = torch.arange(window, device=self.device).view(-1, 1, 1)
        time = (self.pointer - self.size + start + step) % self.capacity  # (window, windows, num_envs), oldest first
        env = torch.arange(self.num_envs, device=self.device).expand(window, windows, self.num_envs)
        episode = self.episode[time, env]
        # The last step of an anchor's episode inside the window: the nearest boundary at or after it.
        boundary = torch.where(episode[1:] != episode[:-1], step[:-1], window - 1)
        last = boundary.flip(0).cummin(0).values.flip(0)
        remaining = (last - step[:-1]).flatten()
        chosen = torch.randperm(len(remaining), device=self.device)[:needed]
        uniform = torch.rand(needed, dtype=torch.float64, device=self.device)
        offset = future_offset(remaining[chosen], uniform, gamma)
        time, env = time[:-1].flatten()[chosen], env[:-1].flatten()[chosen]
        goal_time = (time + offset) % self.capacity
        return tuple(x.view(num_batches, batch_size) for x in (time, env, goal_time))

    def gather(self, time, env, goal_time) -> tuple:
        """Indices (batch,) each -> state (batch, state_dim), action (batch, action_dim), future goal (batch, goal_dim)."""
        return self.state[time, env], self.action[time, env], self.state[goal_time, env, : self.goal_dim]

    def state_dict(self) -> dict:
        filled = {k: getattr(self, k)[: self.size].cpu() for k in ("state", "action", "episode")}
        return filled | {"size": self.size, "pointer": self.pointer}

    def load_state_dict(self, saved: dict) -> None:
        self.size, self.pointer = saved["size"], saved["pointer"]
        if self.size < self.capacity:
            self.pointer = self.size  # a longer run than the saved one has a longer ring
        for k in ("state", "action", "episode"):
            getattr(self, k)[: self.size] = saved[k]


# ======================================================================================================================
# Networks (paper Section 3 and Fig. 2)
# ======================================================================================================================
class Dense(nn.Linear):
    """nn.Linear with flax's initialisation of the official code: U(-1/sqrt(in), 1/sqrt(in)), and biases of zero."""

    def reset_parameters(self):
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)


class HypersphereNorm(nn.Module):
    """Projects hidden vectors on the sphere of radius sqrt(width), as LayerNorm without mean or gain would (Table 2)."""

    def forward(self, x):
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5


def hidden_layer(in_dim: int, width: int, norm: str, activation: str) -> list:
    """Dense, norm, activation: one hidden layer. LayerNorm's epsilon is flax's 1e-6."""
    norms = {"layer": lambda: nn.LayerNorm(width, eps=1e-6), "none": nn.Identity, "hypersphere": HypersphereNorm}
    return [Dense(in_dim, width), norms[norm](), {"swish": nn.SiLU, "relu": nn.ReLU}[activation]()]


class ResidualBlock(nn.Module):
    """Four hidden layers and a skip connection around them, added after the last activation."""

    def __init__(self, width, norm, activation, residual):
        super().__init__()
        self.layers = nn.Sequential(*[m for _ in range(4) for m in hidden_layer(width, width, norm, activation)])
        self.residual = residual

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


class ResidualMLP(nn.Module):
    """in_dim -> hidden layer -> depth / 4 residual blocks -> Dense -> out_dim.

    `depth` counts the Dense layers inside the blocks, as the paper does: depth 64 has 66 Dense layers in all.
    """

    def __init__(self, in_dim, out_dim, width, depth, norm="layer", activation="swish", residual=True):
        super().__init__()
        if depth <= 0 or depth % 4:
            raise ValueError(f"depth {depth} is not a positive multiple of 4")
        self.stem = nn.Sequential(*hidden_layer(in_dim, width, norm, activation))
        self.blocks = nn.Sequential(*[ResidualBlock(width, norm, activation, residual) for _ in range(depth // 4)])
        self.head = Dense(width, out_dim)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class Actor(nn.Module):
    """pi(a | s, g): a Gaussian squashed by tanh; its mean and standard deviation share the trunk."""

    def __init__(self, state_dim, goal_dim, action_dim, width, depth, **options):
        super().__init__()
        self.trunk = ResidualMLP(state_dim + goal_dim, action_dim, width, depth, **options)
        self.log_std_head = Dense(width, action_dim)

    def forward(self, state, goal):
        """(batch, state_dim), (batch, goal_dim) -> mean and log standard deviation before tanh, (batch, action_dim)."""
        hidden = self.trunk.blocks(self.trunk.stem(torch.cat([state, goal], -1)))
        mean, raw = self.trunk.head(hidden).float(), self.log_std_head(hidden).float()
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(raw) + 1)


def sample_action(mean, log_std):
    """Reparameterised a = tanh(u), u ~ N(mean, std^2) -> action (batch, action_dim), log pi(a | s, g) (batch,)."""
    noise = torch.randn_like(mean)
    action = torch.tanh(mean + log_std.exp() * noise)
    log_normal = -0.5 * noise**2 - log_std - 0.5 * float(np.log(2 * np.pi))
    return action, (log_normal - torch.log(1 - action**2 + 1e-6)).sum(-1)


class Agent(nn.Module):
    """Everything that learns: the policy, phi(s, a), psi(g) and the logarithm of the temperature."""

    def __init__(self, state_dim, goal_dim, action_dim, args):
        super().__init__()
        options = dict(norm=args.norm, activation=args.activation, residual=args.residual)
        self.actor = Actor(state_dim, goal_dim, action_dim, args.actor_width, args.actor_depth, **options)
        critic = dict(width=args.critic_width, depth=args.critic_depth, **options)
        self.state_action_encoder = ResidualMLP(state_dim + action_dim, args.repr_dim, **critic)
        self.goal_encoder = ResidualMLP(goal_dim, args.repr_dim, **critic)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def phi(self, state, action):
        return self.state_action_encoder(torch.cat([state, action], -1)).float()

    def psi(self, goal):
        return self.goal_encoder(goal).float()


@torch.no_grad()
def project_weights(module: nn.Module) -> None:
    """Scales the weights of every unit (row) of every Dense layer to norm 1, in place (Simba-v2, Table 2)."""
    weights = [m.weight for m in module.modules() if isinstance(m, Dense)]
    norms = [w.norm(dim=1, keepdim=True) for w in weights]
    torch._foreach_div_(weights, norms)


# ======================================================================================================================
# Contrastive RL (paper Section 3.1 and Appendix): the critic is minus a distance, f(s, a, g) = -||phi(s, a) - psi(g)||
# ======================================================================================================================
def contrastive_loss(phi, psi, logsumexp_coef, direction="forward"):
    """InfoNCE over all pairs of a batch: row i's positive is goal i, its negatives are all other goals.

    phi, psi (batch, repr_dim) -> loss (scalar), metrics. With f_ij = -||phi_i - psi_j||_2 (the paper prints the sign
    wrongly):  loss = -mean_i [f_ii - logsumexp_j f_ij] + logsumexp_coef * mean_i (logsumexp_j f_ij)^2.
    """
    # |a|^2 + |b|^2 - 2ab as a matrix product is far faster than all differences; float64 keeps it exact near 0, and
    # cdist's gradient is 0 instead of NaN at a distance of 0.
    double = torch.float32 if phi.device.type == "mps" else torch.float64
    f = -torch.cdist(phi.to(double), psi.to(double), compute_mode="use_mm_for_euclid_dist").float()
    positive = f.diagonal()
    row, column = f.logsumexp(1), f.logsumexp(0)
    nce = {
        "forward": lambda: row - positive,
        "backward": lambda: column - positive,
        "symmetric": lambda: row + column - 2 * positive,
    }[direction]().mean()
    penalty = (f + 1e-6).logsumexp(1).square().mean()
    with torch.no_grad():
        batch = len(f)
        metrics = {
            "losses/nce": nce,
            "losses/logsumexp": row.mean(),
            "contrastive/categorical_accuracy": (f.argmax(1) == torch.arange(batch, device=f.device)).float().mean(),
            "contrastive/logits_pos": positive.mean(),
            "contrastive/logits_neg": (f.sum() - positive.sum()) / max(batch * (batch - 1), 1),
        }
    return nce + logsumexp_coef * penalty, metrics


def make_optimizers(agent, args, device) -> list:
    """Adam for the actor, the temperature and the critic (both encoders)."""
    encoders = [*agent.state_action_encoder.parameters(), *agent.goal_encoder.parameters()]
    options = dict(lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-8, capturable=args.cudagraphs)
    options["fused"] = device.type != "mps"
    return [torch.optim.Adam(p, **options) for p in (list(agent.actor.parameters()), [agent.log_alpha], encoders)]


def update(agent, optimizers, batch, args) -> dict:
    """One gradient step on the actor, then the temperature, then the critic, all on the same batch.

    batch: state (batch, state_dim), action (batch, action_dim), future goal (batch, goal_dim). The actor sees the critic
    and the temperature from before the step, and is trained on the relabelled goals, never on the commanded ones.
    """
    state, action, goal = batch
    actor_optimizer, alpha_optimizer, critic_optimizer = optimizers
    autocast = dict(device_type=state.device.type, dtype=torch.bfloat16, enabled=args.amp)

    # Actor: minimise alpha log pi(a|s,g) - f(s, a, g). phi passes gradients on to the action but collects none itself.
    agent.state_action_encoder.requires_grad_(False)
    with torch.autocast(**autocast):
        psi = agent.psi(goal)  # the critic's step below uses it again
        mean, log_std = agent.actor(state, goal)
        new_action, log_prob = sample_action(mean, log_std)
        energy = -torch.linalg.vector_norm(agent.phi(state, new_action) - psi.detach(), dim=-1)
    alpha = agent.log_alpha.detach().exp()
    actor_loss = (alpha * log_prob - energy).mean()
    actor_optimizer.zero_grad()
    actor_loss.backward()
    actor_optimizer.step()

    # Temperature: it falls while the policy's entropy is above the target, -entropy_coef |A|.
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

    losses = {"actor": actor_loss, "alpha": alpha_loss, "alpha_value": alpha, "entropy": entropy, "critic": critic_loss}
    return {k: v.detach() for k, v in metrics.items()} | {f"losses/{k}": v.detach() for k, v in losses.items()}


def capture_update(agent, optimizers, batch, args):
    """Captures `update` on `batch` in a CUDA graph -> a function of a batch, as `update`, whose metrics it overwrites.

    Capture needs a few real updates first (Adam creates its state, libraries pick kernels): their effect on weights,
    Adam and random numbers is undone, in place, because the graph keeps the addresses.
    """
    static = [x.clone() for x in batch]
    weights = copy.deepcopy(agent.state_dict())
    moments = [copy.deepcopy(o.state_dict()["state"]) for o in optimizers]
    rng = torch.cuda.get_rng_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update(agent, optimizers, static, args)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad():
        for name, value in agent.state_dict().items():
            value.copy_(weights[name])
        for optimizer, saved in zip(optimizers, moments):
            for i, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    value.copy_(saved[i][name]) if i in saved else value.zero_()
    torch.cuda.set_rng_state(rng)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)  # gradients are then allocated in the graph's own memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = update(agent, optimizers, static, args)

    def replay(batch):
        for buffer, value in zip(static, batch):
            buffer.copy_(value, non_blocking=True)
        graph.replay()
        return metrics

    return replay


# ======================================================================================================================
# Evaluation and what to look at
# ======================================================================================================================
@torch.no_grad()
def evaluate(agent, envs, episode: int, device, keep_record: bool = False) -> tuple:
    """One episode per environment with the mean action -> metrics, record.

    time_at_goal: the mean number of steps that end within 0.5 m of the goal, counted until the episode's first end.
    `episode` picks the starts and goals. No random number is drawn from torch. record, where wanted: state
    (T, num_envs, state_dim), action (T, num_envs, action_dim), alive (T, num_envs); goal, time_at_goal (num_envs, ...).
    """
    envs.episode[:] = episode
    envs.reset(np.ones(envs.num_envs, bool))
    goal = torch.from_numpy(envs.goal).to(device)
    alive = np.ones(envs.num_envs, bool)
    time_at_goal, closest, last, length = envs.time_at_goal.copy(), envs.distance(), envs.distance(), envs.steps.copy()
    record = {"state": [], "action": [], "alive": []}
    while alive.any():
        mean, _ = agent.actor(torch.from_numpy(envs.state).to(device), goal)
        action = torch.tanh(mean).cpu().numpy()
        if keep_record:
            for name, value in (("state", envs.state), ("action", action), ("alive", alive)):
                record[name].append(value.copy())
        done = envs.step(action)
        distance = envs.distance()
        time_at_goal[alive], length[alive], last[alive] = envs.time_at_goal[alive], envs.steps[alive], distance[alive]
        closest[alive] = np.minimum(closest, distance)[alive]
        alive &= ~done
    metrics = {
        "eval/time_at_goal": time_at_goal.mean(),
        "eval/success_any": (time_at_goal > 0).mean(),
        "eval/success_easy": (closest < EASY_GOAL_RADIUS).mean(),
        "eval/final_distance": last.mean(),
        "eval/episodic_length": length.mean(),
    }
    record = {name: np.stack(values) for name, values in record.items() if values}
    return {k: float(v) for k, v in metrics.items()}, record | dict(goal=envs.goal.copy(), time_at_goal=time_at_goal)


@torch.no_grad()
def residual_norms(agent, batch) -> dict:
    """Mean L2 norm of each block's residual, the change that it makes to its input (paper Fig. 17)."""
    state, action, goal = batch
    inputs = {
        "actor": (agent.actor.trunk, torch.cat([state, goal], -1)),
        "state_action_encoder": (agent.state_action_encoder, torch.cat([state, action], -1)),
        "goal_encoder": (agent.goal_encoder, goal),
    }
    norms = {}
    for name, (network, x) in inputs.items():
        hidden = network.stem(x)
        for i, block in enumerate(network.blocks):
            norms[f"residual/{name}/block_{i:03d}"] = block.layers(hidden).norm(dim=-1).mean()
            hidden = block(hidden)
    return norms


@torch.no_grad()
def value_map(agent, envs, device, points_per_cell: int = 8) -> dict:
    """The critic over the maze: f(s, pi(s, g), g) for states that differ from a start state in x and y only (Fig. 9).

    -> x, y (grid lines, m), goals (goals, goal_dim), values (goals, len(x), len(y)).
    """
    cell, goals = envs.robot.cell, np.unique(envs.goal, axis=0)
    if envs.maze:
        low, high = np.array([0.0, 0.0]), np.array([len(envs.maze) - 1, len(envs.maze[0]) - 1]) * cell
    else:
        high = np.full(2, envs.robot.goal_distance[1])
        low, goals = -high, goals[:1]
    x, y = (np.linspace(a, b, int((b - a) / cell * points_per_cell) + 1) for a, b in zip(low, high))
    grid = np.stack(np.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2)
    state = np.repeat(envs.state[:1], len(grid), axis=0)
    state[:, :2] = grid
    state, values = torch.from_numpy(state).to(device), []
    for g in goals:
        goal = torch.from_numpy(g).to(device).expand(len(grid), -1)
        action = torch.tanh(agent.actor(state, goal)[0])
        value = -torch.linalg.vector_norm(agent.phi(state, action) - agent.psi(goal[:1]), dim=-1)
        values.append(value.view(len(x), len(y)).cpu().numpy())
    return dict(x=x, y=y, goals=goals, values=np.stack(values))


@torch.no_grad()
def embeddings(agent, record, device) -> dict:
    """phi(s, a) along the recorded episode that spent most time at its goal (Fig. 10).

    -> phi (T, repr_dim), distance (T,) to the goal in m, time (T,) in environment steps.
    """
    best = int(record["time_at_goal"].argmax())
    alive = record["alive"][:, best]
    state, action = (torch.from_numpy(record[k][alive, best]).to(device) for k in ("state", "action"))
    goal = record["goal"][best]
    distance = np.linalg.norm(state[:, : len(goal)].cpu().numpy() - goal, axis=1)
    return dict(phi=agent.phi(state, action).cpu().numpy(), distance=distance, time=np.arange(len(distance)))


def record_video(path: Path, envs, record) -> None:
    """Films the recorded episode of environment 0, half its frames, headless through EGL."""
    from moviepy import ImageSequenceClip
    from mujoco import egl

    width, height = 640, 480
    context = egl.GLContext(width, height)
    context.make_current()
    model, data = envs.model, mujoco.MjData(envs.model)
    renderer = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, renderer)
    scene, view = mujoco.MjvScene(model, maxgeom=1000), mujoco.MjvCamera()
    view.type, view.trackbodyid, view.distance, view.elevation = mujoco.mjtCamera.mjCAMERA_TRACKING, 1, 12, -50
    rectangle = mujoco.MjrRect(0, 0, width, height)
    frames = []
    for state in record["state"][record["alive"][:, 0], 0][::2]:
        data.qpos[:] = state[: envs.nq]
        mujoco.mj_forward(model, data)
        mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, view, mujoco.mjtCatBit.mjCAT_ALL, scene)
        goal = np.array([*record["goal"][0], 0.5])[:3]
        mujoco.mjv_initGeom(
            scene.geoms[scene.ngeom], mujoco.mjtGeom.mjGEOM_SPHERE, np.array([0.3, 0, 0]), goal, np.eye(3).flatten(),
            np.array([1, 0.2, 0.1, 1], np.float32),
        )  # fmt: skip
        scene.ngeom += 1
        mujoco.mjr_render(rectangle, scene, renderer)
        image = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, rectangle, renderer)
        frames.append(image[::-1])
    context.free()
    ImageSequenceClip(frames, fps=round(0.5 / envs.control_dt)).write_videofile(str(path), logger=None)


# ======================================================================================================================
# Arguments, checkpoints, signals
# ======================================================================================================================
def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if Path("/proc/meminfo").exists():
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_needed(args: Args) -> tuple:
    """(bytes of the replay, rough bytes of networks, gradients, Adam and activations) for resolved arguments."""
    robot = ROBOTS[parse_env_id(args.env_id)[0]]
    replay = min(args.buffer_size, args.total_timesteps) * 4 * (robot.state_dim + robot.action_dim + 1)
    networks = 16 * args.batch_size**2
    for width, depth in ((args.actor_width, args.actor_depth), *[(args.critic_width, args.critic_depth)] * 2):
        networks += 16 * (depth + 1) * width * (width + 3) + 12 * (depth + 1) * width * args.batch_size
    return replay, networks


def resolve_args(args: Args) -> Args:
    """Fills in what depends on the task, and refuses (exit code 2) what cannot work before anything is created."""
    args = copy.copy(args)
    for flag in ("env_id", "eval_env_id"):
        if flag == "eval_env_id" and args.eval_env_id is None:
            args.eval_env_id = default_eval_env_id(args.env_id)
        try:
            robot = parse_env_id(getattr(args, flag))[0]
        except ValueError as error:
            refuse(f"--{flag.replace('_', '-')}", getattr(args, flag), str(error))
    if robot != parse_env_id(args.env_id)[0]:
        refuse("--eval-env-id", args.eval_env_id, f"must be the same robot as --env-id {args.env_id}")

    defaults = TASKS.get(args.env_id, TASKS[robot])
    derived = dict(actor_depth="depth", critic_depth="depth", actor_width="width", critic_width="width")
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    for name, source in derived.items():
        setattr(args, name, getattr(args, source) if getattr(args, name) is None else getattr(args, name))
    args.eval_every = max(1, args.total_timesteps // 100) if args.eval_every is None else args.eval_every
    args.checkpoint_every = max(1, args.total_timesteps // 10) if args.checkpoint_every is None else args.checkpoint_every

    at_least_one = [*defaults, *derived, "repr_dim", "eval_every", "eval_episodes", "checkpoint_every"]
    limits = [(name, 0, "must be greater than 0", lambda x: x > 0) for name in at_least_one]
    limits += [(name, 0, "must not be negative", lambda x: x >= 0) for name in ("seed", "num_threads", "logsumexp_coef")]
    limits += [(n, 0, "must be a multiple of 4 (one residual block has 4 Dense layers)", lambda x: x % 4 == 0) for n in ("actor_depth", "critic_depth")]
    limits += [("gamma", 0, "must lie between 0 and 1, exclusive", lambda x: 0 < x < 1)]
    limits += [("episode_length", 0, "must be at least 2 steps", lambda x: x >= 2)]
    for name, _, limit, holds in limits:
        if not holds(getattr(args, name)):
            refuse(f"--{name.replace('_', '-')}", getattr(args, name), limit)
    n, unroll = args.num_envs, args.num_envs * args.unroll_length
    if args.buffer_size < n * args.episode_length:
        refuse("--buffer-size", args.buffer_size, f"must hold an episode of every environment, {n * args.episode_length} steps")
    if not n * args.episode_length <= args.learning_starts <= args.buffer_size:
        refuse("--learning-starts", args.learning_starts, f"must lie between an episode of every environment, {n * args.episode_length}, and --buffer-size {args.buffer_size}")
    if args.total_timesteps < args.learning_starts + 2 * unroll:
        refuse("--total-timesteps", args.total_timesteps, f"must leave room to learn after --learning-starts: at least {args.learning_starts + 2 * unroll}")

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    for flag, name in (("--device", args.device), ("--buffer-device", args.buffer_device)):
        if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
            refuse(flag, name, "torch sees no such device here")
    if args.cudagraphs and args.device != "cuda":
        refuse("--cudagraphs", "", f"needs --device cuda, not {args.device}")
    replay, networks = memory_needed(args)
    if args.buffer_device == "auto":
        fits = args.device == "cuda" and replay + networks < 0.9 * available_memory(torch.device("cuda"))
        args.buffer_device = "cuda" if fits else "cpu"
    for device in {args.device, args.buffer_device} - {"mps"}:
        needed = replay * (args.buffer_device == device) + networks * (args.device == device)
        if needed > available_memory(torch.device(device)):
            flag, value = ("--buffer-size", args.buffer_size) if replay > networks else ("--depth", args.depth)
            refuse(flag, value, f"the run needs about {needed / 1e9:.1f} GB, but {device} has {available_memory(torch.device(device)) / 1e9:.1f} GB left")
    if args.capture_video:
        try:
            from mujoco import egl  # noqa: F401
        except Exception:
            refuse("--capture-video", "", "rendering needs EGL: apt-get install libegl1 libgl1-mesa-dri libglx-mesa0 libopengl0")
    if args.track:
        try:
            import wandb  # noqa: F401
        except ImportError:
            refuse("--track", "", "needs Weights & Biases: pip install wandb")
    return args


def parse_args(command_line: list) -> Args:
    """The command line -> arguments; with --resume, every flag that is not given comes from the run's args.json."""
    args = tyro.cli(Args, args=command_line)
    if args.resume is None:
        return args
    path = Path(args.resume) / "args.json"
    if not path.exists() or not (Path(args.resume) / "checkpoint.pt").exists():
        refuse("--resume", args.resume, "is not a run folder with args.json and checkpoint.pt")
    saved = json.loads(path.read_text())
    if saved.get("script") != "crl_deep":
        refuse("--resume", args.resume, f"is a run of another script ({saved.get('script')})")
    saved = Args(**{f.name: saved["args"][f.name] for f in fields(Args)})
    args = tyro.cli(Args, args=command_line, default=saved)
    for field in fields(Args):
        new, old = getattr(args, field.name), getattr(saved, field.name)
        if new != old and field.name not in RESUMABLE:
            refuse(f"--{field.name.replace('_', '-')}", new, f"a resumed run keeps its own value, {old}")
    return args


def save_file(path: Path, write) -> None:
    """Writes a file whole or not at all: to a temporary name first, then renamed. A full disk leaves the old file."""
    temporary = path.with_suffix(".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        print(f"crl_deep.py: error: could not write {path}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def save_arrays(path: Path, arrays: dict) -> None:
    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    save_file(path, write)


def versions() -> dict:
    """What a result depends on besides its arguments."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    modules = dict(torch=torch, mujoco=mujoco, gymnasium=gymnasium, numpy=np)
    return {"python": platform.python_version(), "git": git.stdout.strip()} | {k: m.__version__ for k, m in modules.items()}


class StopSignal:
    """Makes the first SIGINT or SIGTERM a number that `train` reads after each training step; a second one kills."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("finishing this training step, then saving; once more to stop at once", file=sys.stderr)


# ======================================================================================================================
# The algorithm
# ======================================================================================================================
def train(args: Args) -> Path:
    """Trains with `args`, logs to a new folder under runs/ (or args.resume) and returns that folder."""
    args = resolve_args(args)
    stop = StopSignal()
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    device = torch.device(args.device)

    envs = MujocoEnvs(
        args.env_id, args.num_envs, args.episode_length, (args.seed, 0), args.num_threads, args.fixed_resets
    )
    eval_envs = MujocoEnvs(args.eval_env_id, args.eval_episodes, args.episode_length, (args.seed, 1), args.num_threads)
    robot = envs.robot
    agent = Agent(robot.state_dim, robot.goal_dim, robot.action_dim, args).to(device)
    if args.norm == "hypersphere":
        project_weights(agent)
    optimizers = make_optimizers(agent, args, device)
    capacity = min(args.buffer_size, args.total_timesteps) // args.num_envs
    replay = Replay(
        capacity, args.num_envs, robot.state_dim, robot.action_dim, robot.goal_dim, torch.device(args.buffer_device)
    )
    if args.compile:
        for block in [m for m in agent.modules() if isinstance(m, ResidualBlock)]:
            block.compile(dynamic=False)

    global_step = gradient_steps = 0
    walltime, eval_history = 0.0, deque(maxlen=5)
    if args.resume:
        run_dir = Path(args.resume)
        saved = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        agent.load_state_dict(saved["agent"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        envs.load_state_dict(saved["envs"])
        if saved["replay"] is None:
            print(f"the checkpoint holds no replay: collecting {args.learning_starts} steps before learning goes on")
        else:
            replay.load_state_dict(saved["replay"])
        global_step, gradient_steps = saved["global_step"], saved["gradient_steps"]
        if global_step + args.num_envs * args.unroll_length > args.total_timesteps:
            refuse("--total-timesteps", args.total_timesteps, f"the run in {run_dir} has already taken {global_step}")
        walltime, eval_history = saved["walltime"], deque(saved["eval_history"], maxlen=5)
        torch.set_rng_state(saved["rng"])
        if device.type == "cuda" and saved["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["cuda_rng"])
        del saved
    else:
        envs.reset(np.ones(args.num_envs, bool))
        run_dir = Path("runs") / f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
        run_dir.mkdir(parents=True)
    description = {"script": "crl_deep", "action_repeat": 1, "args": asdict(args), "versions": versions()}
    save_file(run_dir / "args.json", lambda path: path.write_text(json.dumps(description, indent=2)))
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name, config=asdict(args),
            sync_tensorboard=True,
        )  # fmt: skip
    writer = SummaryWriter(str(run_dir), purge_step=global_step + 1 if args.resume else None)

    def log(metrics):
        for tag, value in metrics.items():
            writer.add_scalar(tag, float(value), global_step)

    def run_evaluation(keep_record=False):
        metrics, record = evaluate(agent, eval_envs, global_step, device, keep_record)
        recent = [*eval_history, metrics["eval/time_at_goal"]][-5:]
        metrics["eval/time_at_goal_last5"] = sum(recent) / len(recent)
        log(metrics)
        return metrics, record

    def save_checkpoint():
        checkpoint = {
            "agent": agent.state_dict(),
            "optimizers": [o.state_dict()["state"] for o in optimizers],
            "envs": envs.state_dict(),
            "replay": replay.state_dict() if args.checkpoint_replay else None,
            "global_step": global_step,
            "gradient_steps": gradient_steps,
            "walltime": walltime + time.time() - start_time,
            "eval_history": list(eval_history),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        }
        save_file(run_dir / "checkpoint.pt", lambda path: torch.save(checkpoint, path))

    steps_per_unroll = args.num_envs * args.unroll_length
    learning_seconds, learning_steps, captured = 0.0, 0, None
    start_time = time.time()
    if global_step == 0:
        eval_history.append(run_evaluation()[0]["eval/time_at_goal"])
    bar = tqdm(
        total=args.total_timesteps, initial=global_step, unit="step", unit_scale=True, smoothing=0.05,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )  # fmt: skip
    while global_step + steps_per_unroll <= args.total_timesteps:
        training_step_start = time.time()
        learning = replay.size * args.num_envs >= args.learning_starts  # the last steps before it are still prefill
        # Collect: the stochastic policy, with the commanded goals
        returns, lengths = [], []
        with torch.no_grad():
            for _ in range(args.unroll_length):
                state, goal = torch.from_numpy(envs.state).to(device), torch.from_numpy(envs.goal).to(device)
                action, _ = sample_action(*agent.actor(state, goal))
                replay.add(state, action, torch.from_numpy(envs.episode))
                done = envs.step(action.cpu().numpy())
                returns.extend(envs.time_at_goal[done])
                lengths.extend(envs.steps[done])
                envs.reset(done)
        global_step += steps_per_unroll

        # Learn: gradient_steps batches, in which no anchor comes twice
        if learning:
            indices = replay.sample(args.gradient_steps, args.batch_size, args.episode_length, args.gamma)
            for time_index, env_index, goal_index in zip(*indices):
                batch = [x.to(device, non_blocking=True) for x in replay.gather(time_index, env_index, goal_index)]
                if args.cudagraphs and captured is None:
                    captured = capture_update(agent, optimizers, batch, args)
                metrics = captured(batch) if args.cudagraphs else update(agent, optimizers, batch, args)
            gradient_steps += args.gradient_steps
            log(metrics)
            if learning_steps:  # the first training step warms up and compiles
                learning_seconds += time.time() - training_step_start
                speed = (learning_steps * steps_per_unroll) / learning_seconds
                log({"charts/SPS": speed, "charts/gradient_steps_per_second": learning_steps * args.gradient_steps / learning_seconds})
            learning_steps += 1

        log({"charts/gradient_steps": gradient_steps, "charts/walltime": walltime + time.time() - start_time})
        log({"charts/replay_size": replay.size * args.num_envs})
        if returns:
            log({"charts/episodic_return": np.mean(returns), "charts/episodic_length": np.mean(lengths)})
            bar.set_postfix(time_at_goal=f"{np.mean(returns):.1f}")
        bar.update(steps_per_unroll)

        unroll, finished = global_step // steps_per_unroll, global_step + steps_per_unroll > args.total_timesteps
        scheduled = unroll % max(1, args.eval_every // steps_per_unroll) == 0
        if scheduled or finished:
            metrics, record = run_evaluation(keep_record=finished)
            if scheduled:  # the mean of the last five must not depend on where a run was stopped and resumed
                eval_history.append(metrics["eval/time_at_goal"])
            if args.log_residual_norms and learning:
                log(residual_norms(agent, batch))
        if stop.number or finished or unroll % max(1, args.checkpoint_every // steps_per_unroll) == 0:
            save_checkpoint()
        if stop.number:
            raise SystemExit(128 + stop.number)

    bar.close()
    writer.close()
    if args.save_value_map:
        paths = dict(paths=record["state"][..., : robot.goal_dim], **{k: record[k] for k in ("alive", "goal", "time_at_goal")})
        maze = dict(walls=np.array([[c == "1" for c in row] for row in eval_envs.maze]), cell=robot.cell)
        save_arrays(run_dir / "value_map.npz", value_map(agent, eval_envs, device) | paths | maze)
    if args.save_embeddings:
        save_arrays(run_dir / "embeddings.npz", embeddings(agent, record, device))
    if args.save_model:
        save_file(run_dir / "model.pt", lambda path: torch.save(agent.state_dict(), path))
    if args.capture_video:
        record_video(run_dir / "episode.mp4", eval_envs, record)
    summary = metrics | dict(
        global_step=global_step, gradient_steps=gradient_steps, walltime=walltime + time.time() - start_time,
        SPS=learning_steps * steps_per_unroll / max(learning_seconds, 1e-9),
    )
    save_file(run_dir / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2)))
    print(f"{run_dir}: time at goal {metrics['eval/time_at_goal_last5']:.1f} of {args.episode_length} (mean of the last 5 evaluations), success {metrics['eval/success_any']:.2f}")
    return run_dir


if __name__ == "__main__":
    train(parse_args(sys.argv[1:]))
