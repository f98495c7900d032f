"""Adaptive RR, the method of Revisiting Plasticity in Visual Reinforcement Learning: Data, Modules and Training Stages
(Ma et al., ICLR 2024, arXiv 2310.07418): learn with a low replay ratio until the critic has recovered its plasticity,
then with a high one.

A high replay ratio (gradient steps per agent step) from the start makes the critic lose its plasticity for good; a low
one leaves data unused. The critic's fraction of active units says when to change (Eq. 1):                      -> `fau`
    FAU = 1/N sum_n 1[a_n(x) > 0]      a: after the ReLUs of both Q heads; averaged over a training batch
Every 50 episodes, with Phi the average over the gradient steps of the last episode:                -> `PlateauDetector`
    | Phi - Phi of 50 episodes ago | <= 0.001      then the replay ratio goes from 0.5 to 2, and stays there
The agent is DrQ-v2 (Yarats et al. 2022); f is its encoder, and o and o' are randomly shifted by up to 4 pixels:
    y   = sum_{i<n} gamma^i r_{t+i} + gamma^n min_k Q_target_k( f(o_{t+n}), a' )     a' ~ pi(f(o_{t+n})), noise clipped
    critic and encoder:  sum_k ( Q_k(f(o_t), a_t) - y )^2                                           -> `drqv2_update`
    actor:               - min_k Q_k( f(o_t), a )   a ~ pi(f(o_t)); f gets no gradient

    SCALE=small bash benchmark/adaptive_rr_cpu.sh           a switch on a CPU, in small
    python adaptive_rr.py --env-id dm_control/quadruped-run-v0    the paper's setting, 3M frames: for a GPU, not run yet
    SCALE=paper bash benchmark/adaptive_rr_fig9_returns.sh          Fig. 9; others: see README.md

What is new here stands in `PlateauDetector`, and in `train` under "The replay ratio of this step" and "Observe".
The detector finds a plateau, not a recovery: nothing checks that the fraction rose before. So it can fire at the early
minimum, on a slow rise or decline, after a collapse, and when two checks lie equally high on both sides of a valley;
its first check compares with one noisy batch. (--rr-min-step and --rr-required-rise are guards that the published
method does not have.) The paper's "recovered" is this plateau; it writes < and the value at the check, its code, and
this file, <= and the average over the last episode.
Where this differs from the official code (Guozheng-Ma/Adaptive-Replay-Ratio), and why:
 1. Frames are stored once, in one ring on the GPU: 21 GB for 1M steps instead of 63.5 GB; a batch is drawn from all of
    it, also from the current episode, where officially 4 loaders each have a part and see new episodes late.
 2. A check interval of 1 does not divide by zero: it is refused; the window can be longer than one episode.
 3. A termination cuts the bootstrap; officially a discount of 0 becomes 1 (no task of the paper terminates).
 4. The random shift copies whole pixels. Officially bilinear interpolation gives the same up to 3e-3 of 255.
 5. The actor's loss builds no gradient of the critic; officially it is computed and thrown away.
 6. The fraction is summed on the device and read once per episode; officially each update waits for the GPU.
 7. Resets and ReDo (Table 1) are not in the official code; their settings are ours.
Kept: the first check compares with the first batch of all, nothing switches back. The paper says "environment step" for
agent steps (replay ratio) and for frames (figures) alike.
A checkpoint may come at any step: on resume the interrupted episode is played again from its seed and actions.
Not in this file: the study of why (drqv2_plasticity.py), Atari-100k.
"""

import copy
import difflib
import fcntl
import json
import math
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """Adaptive RR on DrQ-v2. A step is an agent step, 2 frames, unless it says gradient step; None: from
    the table of tasks."""

    exp_name: str = "adaptive_rr"  # name of this experiment, part of the run folder's name
    seed: int = 1  # seeds python, numpy, torch and every episode
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the networks live; auto: a GPU where there is one
    torch_deterministic: bool = False  # deterministic GPU kernels (two CPU runs are bit-identical without it)
    track: bool = False  # log to Weights & Biases too (install wandb yourself)
    wandb_project_name: str = "clayrl"  # the Weights & Biases project
    wandb_entity: str | None = None  # the Weights & Biases user or team
    save_model: bool = False  # at the end, save the weights alone as model.pt
    checkpoint_every: int = 250_000  # steps between checkpoints; always one at the end
    checkpoint_replay: bool = True  # keep the replay in the checkpoint; else a resumed run refills it before it learns
    resume: str | None = None  # a run folder to continue; its args.json gives all flags but the few that may change

    # environment
    env_id: str = "dm_control/quadruped-run-v0"  # dm_control/<domain>-<task>-v0, or any environment with pixels
    image_size: int = 84  # height and width of the rendered frames in pixels

    # DrQ-v2
    preset: Literal["official", "paper-table"] = "official"  # what None means: the figures' values or the table's
    total_timesteps: int | None = None  # steps of the whole run
    learning_starts: int = 2000  # steps before the first gradient step
    exploration_steps: int = 2000  # first steps, with uniform random actions
    buffer_size: int | None = None  # frames in the replay, 21 kB each
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"  # where the replay lives; auto: the GPU where it fits
    batch_size: int | None = None  # transitions per gradient step
    n_step: int | None = None  # rewards per target before it bootstraps
    gamma: float = 0.99  # discount per step
    tau: float = 0.01  # share of the online critic that moves into the target critic at each gradient step
    learning_rate: float | None = None  # Adam's, of encoder, actor and critic
    feature_dim: int | None = None  # units of the trunks
    hidden_dim: int = 1024  # units of each hidden layer of the heads
    stddev_start: float = 1.0  # standard deviation of the exploration noise, at first
    stddev_end: float = 0.1  # and after its linear decay
    stddev_steps: int | None = None  # length in steps of the decay
    stddev_clip: float = 0.3  # bound of the noise in the updates (not when acting)
    shift_pad: int = 4  # largest random shift in pixels

    # replay ratio: gradient steps per step, k or 1/k
    rr_mode: Literal["adaptive", "static", "fixed-switch"] = "adaptive"  # static: rr_low always; fixed: at a given step
    rr_low: float = 0.5  # replay ratio at first
    rr_high: float = 2.0  # and after the switch
    rr_check_episodes: int = 50  # episodes between checks
    rr_window_episodes: int = 1  # episodes before a check that the fraction is averaged over
    rr_threshold: float = 0.001  # switch when two checks differ by at most this
    rr_switch_step: int | None = None  # the step of the switch with --rr-mode fixed-switch
    rr_min_step: int = 0  # no switch before this step (a guard that the published method does not have)
    rr_required_rise: float = 0.0  # nor before the fraction rose so far above its lowest check (another one; 0: none)

    # resets and ReDo, the baselines of Table 1
    reset_every: int = 0  # steps between resets; 0: none (100000: one after each tenth of 2M frames)
    reset_scope: Literal["mlp", "fc", "all"] = "fc"  # what is drawn anew: the heads; and the trunks; and the encoder
    reset_modules: tuple[Literal["actor", "critic"], ...] = ("actor", "critic")  # whose heads and trunks
    reset_optimizer: bool = True  # also make Adam forget them
    redo_period_gradient_steps: int = 0  # gradient steps between recyclings; 0: never
    redo_tau: float = 0.025  # recycle neurons with a score of at most this
    redo_batch_size: int = 64  # transitions that the scores are taken over
    redo_modules: tuple[Literal["encoder", "actor", "critic"], ...] = ("critic",)  # where neurons are recycled

    # what to look at
    eval_every: int = 5000  # steps between evaluations, also before the first and after the last
    eval_episodes: int = 10  # episodes of an evaluation, with the mean action
    log_every: int = 500  # steps between logs of losses, fractions of active units and speed

    # speed
    amp: bool = False  # convolutions and trunks of the update in bfloat16; heads, losses, Adam, acting in float32
    compile: bool = False  # compile the networks
    cudagraphs: bool = False  # capture the whole update in one CUDA graph and replay it per batch


# The tasks of DrQ-v2 with the values that made the figures; PAPER_TABLE is the same for all
EASY = dict(total_timesteps=500_500, stddev_steps=100_000, buffer_size=1_000_000, batch_size=256, n_step=3,
            learning_rate=1e-4, feature_dim=50)  # fmt: skip
MEDIUM = EASY | dict(total_timesteps=1_500_500, stddev_steps=500_000)
HARD = EASY | dict(total_timesteps=15_050_000, stddev_steps=2_000_000, learning_rate=8e-5, feature_dim=100)
WALKER = dict(n_step=1, batch_size=512)
PAPER_TABLE = dict(stddev_steps=500_000, buffer_size=1_000_000, batch_size=256, n_step=3)
TASKS = {
    **dict.fromkeys(("cartpole-balance", "cartpole-balance_sparse", "cartpole-swingup", "ball_in_cup-catch",
                     "finger-spin", "hopper-stand", "pendulum-swingup"), EASY),
    **dict.fromkeys(("acrobot-swingup", "cartpole-swingup_sparse", "cheetah-run", "finger-turn_easy",
                     "finger-turn_hard", "hopper-hop", "quadruped-walk", "reacher-easy", "reacher-hard"), MEDIUM),
    **dict.fromkeys(("humanoid-stand", "humanoid-walk", "humanoid-run"), HARD),
    "walker-stand": EASY | WALKER, "walker-walk": EASY | WALKER, "walker-run": MEDIUM | WALKER,
    "quadruped-run": MEDIUM | dict(buffer_size=100_000),
}  # fmt: skip
# Flags that do nothing without another one
NEEDS = dict(
    reset_scope="reset_every", reset_modules="reset_every", reset_optimizer="reset_every",
    redo_tau="redo_period_gradient_steps", redo_modules="redo_period_gradient_steps",
)  # fmt: skip
SCRIPT, ACTION_REPEAT = "adaptive_rr", 2
ACTION_LIMIT = 1 - 1e-6  # actions are clamped to this
HEADS = {"actor": ["policy"], "critic": ["q1", "q2"]}  # the parts of a module that are multi-layer perceptrons
# What may be given anew with --resume: it does not change what is learned.
RESUMABLE = ("resume total_timesteps device buffer_device eval_every eval_episodes checkpoint_every checkpoint_replay "
             "track wandb_project_name wandb_entity save_model log_every compile cudagraphs "
             "torch_deterministic").split()  # fmt: skip


# === Environment ======================================================================================================
class PixelEnv(gymnasium.Wrapper):
    """A Gymnasium environment with continuous actions, seen through its pixels.

    Actions lie in [-1, 1] and are repeated ACTION_REPEAT times, the rewards added. The observation is the one frame
    after that, (3, height, width) uint8: stacks are built by who needs them.
    """

    def __init__(self, env, image_size: int):
        super().__init__(env)
        if not (isinstance(env.action_space, gymnasium.spaces.Box) and env.action_space.is_bounded()):
            raise TypeError(f"its actions are not numbers within bounds: {env.action_space}")
        self.low, self.high = env.action_space.low, env.action_space.high
        self.action_space = gymnasium.spaces.Box(-1, 1, env.action_space.shape, np.float32)
        self.observation_space = gymnasium.spaces.Box(0, 255, (3, image_size, image_size), np.uint8)

    def play(self, action) -> tuple:
        """One agent step without its picture -> reward, terminated, truncated."""
        total, action = 0.0, self.low + (self.high - self.low) * (action.astype(self.low.dtype) + 1) / 2
        for _ in range(ACTION_REPEAT):
            if not self.over:
                _, reward, terminated, truncated, _ = self.env.step(action)
                total, self.over = total + float(reward), terminated or truncated
                self.end = terminated, truncated
        return total, *self.end

    def frame(self) -> np.ndarray:
        return np.ascontiguousarray(self.env.render().transpose(2, 0, 1))

    def reset(self, *, seed=None, options=None):
        """Begins an episode; options {"actions": (k, action) float32} plays its first k steps again, unseen."""
        self.env.reset(seed=seed)
        self.over, self.end = False, (False, False)
        for action in (options or {}).get("actions", ()):
            self.play(action)
        return self.frame(), {}

    def step(self, action):
        """One agent step; when the episode is over nothing moves any more."""
        result = self.play(action)
        return self.frame(), *result, {}


def make_env(env_id: str, image_size: int) -> PixelEnv:
    """An environment that renders image_size x image_size pixels; camera 2 sees quadrupeds, camera 0 all others."""
    if multiprocessing.parent_process() is not None:
        os.setpgrp()  # signals to the learner's group are for the learner, which ends its environments
    options = dict(width=image_size, height=image_size)
    if env_id.startswith("dm_control/"):
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")
        import shimmy  # noqa: F401  registers the tasks, and opens the renderer

        options = dict(render_kwargs=options | dict(camera_id=2 if "/quadruped" in env_id else 0))
    return PixelEnv(gymnasium.make(env_id, render_mode="rgb_array", disable_env_checker=True, **options), image_size)


def make_envs(args, num_envs: int) -> AsyncVectorEnv:
    """`num_envs` environments, each in a process of its own: step_async(action) starts a step, step_wait() ends it.

    The processes descend from a server that has neither touched the GPU nor opened a renderer."""
    return AsyncVectorEnv([partial(make_env, args.env_id, args.image_size)] * num_envs, context="forkserver",
                          autoreset_mode=AutoresetMode.DISABLED)  # fmt: skip


class Environments:
    """`num_envs` environments, each in a process of its own, that survive the death of one.

    step and step_wait then return None; the next reset starts new processes. That happens three times; after the fourth
    death `stop`, a list, gets the program's exit code, and reset returns None too.
    """

    def __init__(self, args, num_envs: int, stop: list):
        self.args, self.num_envs, self.stop = args, num_envs, stop
        self.envs, self.deaths = None, 0
        self.start()

    def start(self) -> None:
        while self.envs is None and self.deaths <= 3:
            try:
                self.envs = make_envs(self.args, self.num_envs)
            except (EOFError, OSError) as error:
                self.bury(error)

    def bury(self, error: Exception) -> None:
        self.close()
        self.deaths += 1
        times = "started anew" if self.deaths <= 3 else "for the fourth time: saving"
        print(f"{SCRIPT}.py: an environment's process died ({type(error).__name__}), {times}", file=sys.stderr)
        if self.deaths > 3:
            self.stop.append(1)

    def call(self, method: str, *values, **options):
        try:
            return None if self.envs is None else getattr(self.envs, method)(*values, **options)
        except (EOFError, OSError) as error:
            self.bury(error)

    def reset(self, **options) -> tuple | None:
        result = None
        while result is None and self.deaths <= 3:
            self.start()
            result = self.call("reset", **options)
        return result

    def step(self, action: np.ndarray) -> tuple | None:
        return self.call("step", action)

    def step_async(self, action: np.ndarray) -> None:
        self.call("step_async", action)

    def step_wait(self) -> tuple | None:
        return self.call("step_wait")

    def close(self) -> None:
        for process in getattr(self.envs, "processes", ()):  # their own way to close waits for the dead
            process.kill()
            process.join()
        if self.envs is not None:
            self.envs.closed = True
        self.envs = None


def episode_seed(*numbers: int) -> int:
    """A seed that the numbers determine: the run's seed, what it is for (0 training, 1 evaluation, 2 a stream of random
    numbers), and which one of these. Below 2**32: torch's generators on a CPU ignore all higher bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# === Replay buffer ====================================================================================================
class PixelReplay:
    """A ring of single frames (capacity, 3, height, width) uint8; stacks and n-step returns are built when sampling.

    Each frame's record: its age (the number of frames of its episode before it), the reward and the termination that
    came with it, and the action that led to it. `start` holds the numbers of the frames from which n steps have been
    taken inside the episode, so that sampling is uniform over them (as in DrQ-v2, an episode's last n - 1 frames start
    nothing). Frames and starts are numbered from 0 for ever; number n lies in slot n % capacity.
    """

    def __init__(self, capacity, action_dim, device, n_step=3, gamma=0.99, frame_shape=(3, 84, 84), stack=3):
        self.capacity, self.n_step, self.gamma, self.stack = capacity, n_step, gamma, stack
        self.frames = torch.empty((capacity, *frame_shape), dtype=torch.uint8, device=device)
        self.record = torch.empty((capacity, 3 + action_dim), device=device)
        self.start = torch.empty(capacity, dtype=torch.int64)  # on the CPU, where indices are drawn
        self.num_frames = self.num_starts = self.oldest_start = self.age = 0

    def add_first(self, frame: np.ndarray) -> None:
        """An episode's first frame (3, height, width)."""
        self.age = -1
        self.add(np.zeros(self.record.shape[1] - 3, np.float32), 0.0, False, frame)

    def add(self, action: np.ndarray, reward: float, terminated: bool, frame: np.ndarray) -> None:
        """What was done in the newest frame, and what came of it: reward, termination, the next frame."""
        number, self.age = self.num_frames, self.age + 1
        self.frames[number % self.capacity] = torch.from_numpy(frame)
        record = np.concatenate([[self.age, reward, terminated], action]).astype(np.float32)
        self.record[number % self.capacity] = torch.from_numpy(record)
        self.num_frames += 1
        if self.age >= self.n_step:
            self.start[self.num_starts % self.capacity] = number - self.n_step
            self.num_starts += 1
        reachable = self.num_frames - self.capacity  # the ring's oldest frame; its own stack may be incomplete
        while len(self) and 0 < reachable > self.start[self.oldest_start % self.capacity] - self.stack + 1:
            self.oldest_start += 1

    def __len__(self) -> int:
        """The number of transitions that can be sampled."""
        return self.num_starts - self.oldest_start

    def stacked(self, index: torch.Tensor) -> torch.Tensor:
        """Frame numbers (batch,) -> observations (batch, stack * 3, height, width) uint8, the newest frame last; before
        an episode's beginning its first frame is repeated."""
        back = torch.arange(self.stack - 1, -1, -1, device=index.device)
        back = torch.minimum(back, self.record[index % self.capacity, 0, None].long())
        return self.frames[(index[:, None] - back) % self.capacity].flatten(1, 2)

    def newest(self) -> torch.Tensor:
        """The observation now: (1, stack * 3, height, width) uint8."""
        return self.stacked(torch.tensor([self.num_frames - 1], device=self.frames.device))

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple:
        """Uniform, drawn from a generator on the CPU -> obs (batch, stack * 3, height, width) uint8, action (batch,
        action), reward (batch,) of n steps, discounted, discount (batch,), next_obs n steps later.

        discount is gamma^n, or 0 where the episode terminated on the way.
        """
        draw = torch.randint(self.oldest_start, self.num_starts, (batch_size,), generator=generator)
        first = self.start[draw % self.capacity].to(self.frames.device)
        steps = torch.arange(1, self.n_step + 1, device=first.device)
        record = self.record[(first[:, None] + steps) % self.capacity]  # (batch, n_step, 3 + action)
        alive = torch.cumprod(1 - record[:, :, 2], 1)
        reward = (record[:, :, 1] * self.gamma ** (steps - 1)).sum(1)
        discount = self.gamma**self.n_step * alive[:, -1]
        return self.stacked(first), record[:, 0, 3:], reward, discount, self.stacked(first + self.n_step)

    def state_dict(self) -> dict:
        state = {k: getattr(self, k) for k in ("num_frames", "num_starts", "oldest_start", "age")}
        for name, filled in dict(frames=self.num_frames, record=self.num_frames, start=self.num_starts).items():
            # Through NumPy: the filled part without a copy, where a mere view of the tensor would save all of it
            state[name] = torch.from_numpy(getattr(self, name)[:filled].cpu().numpy())
        return state

    def load_state_dict(self, state: dict) -> None:
        """Also from a ring of another capacity."""
        for name in ("num_frames", "num_starts", "oldest_start", "age"):
            setattr(self, name, state[name])
        self.oldest_start = max(self.oldest_start, self.num_starts - self.capacity)
        for name, last in dict(frames=self.num_frames, record=self.num_frames, start=self.num_starts).items():
            ring, saved = getattr(self, name), state[name]
            if len(saved) in (last, self.capacity) and len(saved) <= self.capacity:
                ring[: len(saved)] = saved
            else:
                numbers = torch.arange(max(0, last - min(len(saved), self.capacity)), last)
                ring[(numbers % self.capacity).to(ring.device)] = saved[numbers % len(saved)].to(ring.device)


def random_shift(obs: torch.Tensor, pad: int, shift: torch.Tensor | None = None) -> torch.Tensor:
    """DrQ-v2's augmentation: pads each image by repeating its border and crops it to its size at a random place.

    obs (batch, channels, height, width) of any type; shift (batch, 2), whole numbers (x, y) in [0, 2 * pad], drawn when
    not given -> the same shape and type. shift = pad moves nothing.
    """
    batch, _, height, width = obs.shape
    if shift is None:
        shift = torch.randint(2 * pad + 1, (batch, 2), device=obs.device)
    rows = (torch.arange(height, device=obs.device) + shift[:, 1:] - pad).clamp(0, height - 1)
    columns = (torch.arange(width, device=obs.device) + shift[:, :1] - pad).clamp(0, width - 1)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1)
    return obs.flatten(2).gather(2, pixels.expand(-1, obs.shape[1], -1)).view_as(obs)


# === Networks =========================================================================================================
class Layers(nn.Sequential):
    """Layers one after the other: forward(x) -> output, [what comes out of each ReLU]."""

    def forward(self, x):
        active = []
        for layer in self:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                active.append(x)
        return x, active


class Encoder(nn.Module):
    """obs (batch, channels, height, width) uint8 -> features (batch, feature_size), the 4 convolutions' activations."""

    def __init__(self, channels=9, image_size=84):
        super().__init__()
        self.convnet, size = Layers(), (image_size - 3) // 2 + 1 - 3 * 2
        for stride in (2, 1, 1, 1):
            self.convnet.extend([nn.Conv2d(channels, 32, 3, stride), nn.ReLU(inplace=True)])
            channels = 32
        self.feature_size = 32 * size * size
        self.apply(draw_layer)

    def forward(self, obs):
        x = obs.to(torch.float32, memory_format=torch.channels_last).div(255).sub_(0.5)
        features, active = self.convnet(x)
        return features.flatten(1), active


def trunk(feature_size: int, feature_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(feature_size, feature_dim), nn.LayerNorm(feature_dim), nn.Tanh())


def head(inputs: int, hidden_dim: int, outputs: int) -> Layers:
    return Layers(nn.Linear(inputs, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU(),
                  nn.Linear(hidden_dim, outputs))  # fmt: skip


class Actor(nn.Module):
    """features (batch, feature_size) -> mean action (batch, action), activations of the 2 hidden layers."""

    def __init__(self, feature_size, action_dim, feature_dim=50, hidden_dim=1024):
        super().__init__()
        self.trunk, self.policy = trunk(feature_size, feature_dim), head(feature_dim, hidden_dim, action_dim)
        self.apply(draw_layer)

    def forward(self, features):
        x = self.trunk(features).float()
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has too few digits for actions and values
            mean, active = self.policy(x)
        return mean.tanh(), active


class Critic(nn.Module):
    """features (batch, feature_size), action (batch, action) -> two values (batch,), activations of the 2 hidden layers
    of the first and then of the second."""

    def __init__(self, feature_size, action_dim, feature_dim=50, hidden_dim=1024):
        super().__init__()
        self.trunk = trunk(feature_size, feature_dim)
        self.q1, self.q2 = (head(feature_dim + action_dim, hidden_dim, 1) for _ in range(2))
        self.apply(draw_layer)

    def forward(self, features, action):
        x = self.trunk(features).float()
        with torch.autocast(x.device.type, enabled=False):
            x = torch.cat([x, action], 1)
            (q1, active1), (q2, active2) = self.q1(x), self.q2(x)
        return q1.squeeze(1), q2.squeeze(1), active1 + active2


@torch.no_grad()
def draw_layer(layer: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draws one layer's weights from their initial distribution, in place: orthogonal, in convolutions times
    sqrt(2); biases 0; a normalisation's scale 1."""
    if isinstance(layer, nn.Linear | nn.Conv2d):
        gain = math.sqrt(2) if isinstance(layer, nn.Conv2d) else 1
        layer.weight.copy_(nn.init.orthogonal_(torch.empty(layer.weight.shape), gain, generator=generator))
        layer.bias.zero_()
    elif isinstance(layer, nn.LayerNorm | nn.GroupNorm):
        layer.reset_parameters()


class DrQv2Agent(nn.Module):
    """Encoder, actor, critic, and the target critic, which reads the features of the online encoder."""

    def __init__(self, action_dim, args):
        super().__init__()
        self.encoder = Encoder(image_size=args.image_size)
        sizes = self.encoder.feature_size, action_dim, args.feature_dim, args.hidden_dim
        self.actor, self.critic = Actor(*sizes), Critic(*sizes)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)

    def mean_action(self, obs):
        return self.actor(self.encoder(obs)[0])[0]


# === Adaptive replay ratio ============================================================================================
def fau(activations: list) -> torch.Tensor:
    """Fraction of active units (Eq. 1): the share of positive elements in a list of tensors (batch, ...), all after a
    ReLU. Every element counts the same: an average over batch and positions, not one minus the dormant ratio. NaN when
    an element is not finite."""
    active = sum(torch.count_nonzero(a > 0) for a in activations) / sum(a.numel() for a in activations)
    finite = torch.stack([a.sum().float() for a in activations]).isfinite().all()
    return torch.where(finite, active, math.nan)


class PlateauDetector:
    """Says when the critic's fraction of active units (FAU) has settled (Section 5, as in the official code).

    It is told every episode's average. Every check_episodes episodes the average of the last window_episodes is
    compared with that of the check before; the first check compares with the first training batch of all. The FAU has
    settled when they differ by at most the threshold. It detects a plateau, not a recovery: it also fires at the early
    minimum, on a decline slower than the threshold per interval, and after a collapse. required_rise > 0 asks in
    addition that the FAU lies so far above the lowest one that a check has seen (not in the published method).
    An episode without a gradient step is not told, and no check follows it. `switched` is set once and for all.
    """

    def __init__(self, check_episodes=50, window_episodes=1, threshold=0.001, required_rise=0.0):
        self.check_episodes, self.window_episodes = check_episodes, window_episodes
        self.threshold, self.required_rise = threshold, required_rise
        self.reference = None  # what the next check compares with; at first the FAU of the first batch
        self.lowest, self.window, self.switched = math.inf, [], False

    def first_batch(self, fau: float) -> None:
        """Must come before the first episode's end."""
        self.reference = fau

    def end_episode(self, episode: int, average: float, may_switch: bool = True) -> tuple | None:
        """The `episode`-th episode of the run (counted from 1) has ended; average: the FAU over its gradient steps.

        At a check -> the window's FAU and its distance from the reference; else None.
        """
        self.window = [*self.window, average][-self.window_episodes :]
        if episode % self.check_episodes:
            return None
        now = sum(self.window) / len(self.window)
        difference = abs(now - self.reference)
        self.lowest = min(self.lowest, self.reference, now)
        settled = difference <= self.threshold and now - self.lowest >= self.required_rise
        self.switched |= settled and may_switch
        self.reference = now
        return now, difference

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("reference", "lowest", "window", "switched")}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


# === Resets and ReDo ==================================================================================================
def activations(agent, batch) -> tuple:
    """features (batch, feature_size) and, by module, the activations after every ReLU, for a batch from the replay."""
    obs, action, *_ = batch
    features, encoder_active = agent.encoder(obs)
    return features, dict(encoder=encoder_active, actor=agent.actor(features)[1],
                          critic=agent.critic(features, action)[2])  # fmt: skip


def dormant_score(activation: torch.Tensor) -> torch.Tensor:
    """Sokar et al. 2023, Eq. 1: each neuron's mean |activation| over batch and positions, divided by the layer's mean.

    activation (batch, neurons) or (batch, channels, height, width), after the non-linearity -> (neurons,), of mean 1;
    all 0 when the whole layer is silent, all NaN when an activation is not finite.
    """
    mean = activation.abs().float().mean([0, *range(2, activation.dim())])
    average = mean.mean()
    return torch.where(average.isfinite(), mean / average.clamp_min(torch.finfo(torch.float32).tiny), math.nan)


def forget(optimizer, parameter, mask) -> None:
    """Zeroes what Adam remembers of a parameter's elements, in place; mask (broadcastable to the parameter) bool."""
    for value in optimizer.state.get(parameter, {}).values():
        if value.shape == parameter.shape:
            value.masked_fill_(mask, 0)


def optimizer_of(parameter, optimizers):
    return next(o for o in optimizers if any(parameter is p for p in o.param_groups[0]["params"]))


def forget_all(module, optimizers) -> None:
    """Adam starts anew for all of a module's weights, in place."""
    for parameter in module.parameters():
        for value in optimizer_of(parameter, optimizers).state.get(parameter, {}).values():
            value.zero_()


def reset_agent(agent, optimizers, args, generator) -> None:
    """Resets (Nikishin et al. 2022): draws parts of the agent anew, in place; the target gets the new ones, too.

    Scope mlp: the three linear layers of each head, "the last layers" of their text; fc: also the trunks, as in their
    code; all: also the encoder. The replay is kept.
    """
    drawn = ["encoder"] * (args.reset_scope == "all")
    for name in args.reset_modules:
        for part in HEADS[name] + ["trunk"] * (args.reset_scope != "mlp"):
            drawn.append(f"{name}.{part}")
    for name in drawn:
        module = agent.get_submodule(name)
        for layer in module.modules():
            draw_layer(layer, generator)
        if args.reset_optimizer:
            forget_all(module, optimizers)
        if name.startswith("critic"):
            agent.get_submodule(name.replace("critic", "critic_target")).load_state_dict(module.state_dict())


@torch.no_grad()
def recycle_units(agent, optimizers, batch, args, generator) -> dict:
    """ReDo (Sokar et al. 2023) on a batch, in place -> metrics: neurons with a score of at most redo_tau get newly
    drawn incoming weights, a bias of 0, outgoing weights of 0, and Adam forgets all these. The target critic is left
    alone, but for what it reads of recycled feature maps."""
    active = activations(agent, batch)[1]
    counts = {}
    for name in args.redo_modules:
        stacks = (
            [agent.encoder.convnet] if name == "encoder" else [getattr(getattr(agent, name), h) for h in HEADS[name]]
        )
        scores = iter(dormant_score(a) for a in active[name])
        for layers in stacks:
            weighted = [layer for layer in layers if not isinstance(layer, nn.ReLU)]
            readers = [[layer] for layer in weighted[1:]]
            if name == "encoder":  # also the target critic reads the features
                readers.append([module.trunk[0] for module in (agent.actor, agent.critic, agent.critic_target)])
            masks = [next(scores) <= args.redo_tau for _ in readers]
            for layer, mask in zip(weighted, masks):
                fresh = copy.deepcopy(layer)
                draw_layer(fresh, generator)
                for parameter, new in zip(layer.parameters(), fresh.parameters()):
                    rows = mask.view(-1, *[1] * (parameter.dim() - 1))
                    parameter.copy_(torch.where(rows, new, parameter))
                    forget(optimizer_of(parameter, optimizers), parameter, rows)
            for layer, mask in [(layer, mask) for group, mask in zip(readers, masks) for layer in group]:
                columns = mask.repeat_interleave(layer.weight.shape[1] // len(mask))  # a feature map's positions
                columns = columns.view(1, -1, *[1] * (layer.weight.dim() - 2))
                layer.weight.masked_fill_(columns, 0)
                if layer.weight.requires_grad:
                    forget(optimizer_of(layer.weight, optimizers), layer.weight, columns)
            tag = f"plasticity/redo_recycled/{name}"
            counts[tag] = counts.get(tag, 0) + sum(mask.sum() for mask in masks)
    return counts


# === DrQ-v2 ===========================================================================================================
def drqv2_optimizers(agent, args, device) -> list:
    """Adam for encoder, actor and critic."""
    options = dict(lr=args.learning_rate, fused=device.type != "mps", capturable=args.cudagraphs)
    return [torch.optim.Adam(m.parameters(), **options) for m in (agent.encoder, agent.actor, agent.critic)]


def truncated_normal(mean, std, clip: float) -> torch.Tensor:
    """mean + noise of standard deviation std (0-d), clipped to +-clip; the sum clamped to the action limits, with a
    gradient of 1."""
    action = mean + (torch.randn_like(mean) * std).clamp(-clip, clip)
    return action - action.detach() + action.detach().clamp(-ACTION_LIMIT, ACTION_LIMIT)


def drqv2_update(agent, optimizers, batch, args) -> dict:
    """One gradient step of critic and encoder, then of the actor, then of the target, on a batch: obs, action, reward,
    discount, next_obs from the replay, augmented, and the noise's standard deviation std (0-d) -> metrics, detached, on
    the device."""
    (obs, action, reward, discount, next_obs, std), (encoder_optimizer, actor_optimizer, critic_optimizer) = (
        batch, optimizers)  # fmt: skip
    autocast = partial(torch.autocast, obs.device.type, torch.bfloat16, args.amp)
    with torch.no_grad(), autocast():  # a region of its own: weights that it casts carry no gradient
        next_features, _ = agent.encoder(next_obs)
        next_action = truncated_normal(agent.actor(next_features)[0], std, args.stddev_clip)
        target_q1, target_q2, _ = agent.critic_target(next_features, next_action)
        target = reward + discount * torch.minimum(target_q1, target_q2)
    with autocast():
        features, encoder_active = agent.encoder(obs)
        q1, q2, critic_active = agent.critic(features, action)
    critic_loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
    encoder_optimizer.zero_grad()
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()
    encoder_optimizer.step()

    # The actor learns from the critic just updated; neither critic nor encoder learns from the actor
    critic_weights = critic_optimizer.param_groups[0]["params"]
    for weight in critic_weights:
        weight.requires_grad_(False)
    features = features.detach()
    with autocast():
        mean, actor_active = agent.actor(features)
        actor_q1, actor_q2, _ = agent.critic(features, truncated_normal(mean, std, args.stddev_clip))
    actor_loss = -torch.minimum(actor_q1, actor_q2).mean()
    actor_optimizer.zero_grad()
    actor_loss.backward()
    actor_optimizer.step()
    for weight in critic_weights:
        weight.requires_grad_(True)
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.critic_target.parameters()), list(agent.critic.parameters()), args.tau)
    return {
        "losses/critic": critic_loss.detach(), "losses/actor": actor_loss.detach(), "losses/reward": reward.mean(),
        "losses/q_values": q1.detach().mean(), "losses/targets": target.mean(),
        "plasticity/fau/encoder": fau(encoder_active), "plasticity/fau/actor": fau(actor_active),
        "plasticity/fau/critic": fau(critic_active),
    }  # fmt: skip


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


def stddev_at(step: int, args) -> float:
    """Standard deviation of the exploration noise: linear from stddev_start to stddev_end in stddev_steps steps."""
    progress = min(step / args.stddev_steps, 1.0)
    return args.stddev_start + progress * (args.stddev_end - args.stddev_start)


def act(agent, obs, stddev: float, uniform: bool, generator) -> np.ndarray:
    """One training action (1, action) for obs (1, channels, height, width): the mean plus noise that is not clipped, or
    uniform. Drawn from a generator on the CPU."""
    with torch.no_grad():
        mean = agent.mean_action(obs).cpu()
    noisy = mean + stddev * torch.randn(mean.shape, generator=generator)
    random_action = torch.rand(mean.shape, generator=generator) * 2 - 1
    return (random_action if uniform else noisy.clamp(-ACTION_LIMIT, ACTION_LIMIT)).numpy()


def play_evaluation(agent, envs, args, draw: int, device, stop=()) -> dict:
    """eval_episodes whole episodes with the mean action, several side by side -> metrics. Draws no random number from
    torch. `draw` numbers the evaluation and so seeds its episodes. No metrics when the run is to stop (the
    list `stop` is not empty) or an action is not finite."""
    returns, lengths, n = [], [], envs.num_envs
    while len(returns) < args.eval_episodes:
        played = envs.reset(seed=[episode_seed(args.seed, 1, draw, len(returns) + i) for i in range(n)])
        if played is None:
            return {}
        frame, _ = played
        obs = torch.from_numpy(frame).to(device).repeat(1, 3, 1, 1)
        episode_return, episode_length, running = np.zeros(n), np.zeros(n, int), np.ones(n, bool)
        while running.any():
            with torch.no_grad():
                action = agent.mean_action(obs).cpu().numpy()
            if stop or not np.isfinite(action).all():
                return {}
            played = envs.step(action)
            if played is None:  # a process died: these episodes are played again
                break
            frame, reward, terminated, truncated, _ = played
            obs = torch.cat([obs[:, 3:], torch.from_numpy(frame).to(device)], 1)
            episode_return, episode_length = episode_return + reward * running, episode_length + running
            running &= ~(terminated | truncated)
        if running.any():
            continue
        returns, lengths = returns + episode_return.tolist(), lengths + episode_length.tolist()
    k = args.eval_episodes
    return {
        "eval/episodic_return": float(np.mean(returns[:k])), "eval/episodic_length": float(np.mean(lengths[:k])),
        "eval/episodes": k,
    }  # fmt: skip


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
    defaults = TASKS.get(args.env_id.removeprefix("dm_control/").removesuffix("-v0"), {})
    if not defaults:
        defaults = EASY | dict(total_timesteps=None, stddev_steps=None)
    if args.preset == "paper-table":
        defaults = defaults | PAPER_TABLE
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"

    value, default = vars(args), asdict(Args())
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    for name in ("total_timesteps", "stddev_steps"):
        if value[name] is None:
            refuse(name, None, f"the table of tasks has no {args.env_id}; give a number")
    switching = args.rr_mode != "static"

    def whole(ratio):  # k or 1/k
        return 1e-6 < ratio < 1e6 and abs(max(ratio, 1 / ratio) - round(max(ratio, 1 / ratio))) < 1e-6

    wrong = {  # limit -> the arguments that break it
        "must be greater than 0": [n for n in (
            "total_timesteps", "batch_size", "n_step", "learning_rate", "feature_dim", "hidden_dim", "stddev_steps",
            "buffer_size", "eval_every", "eval_episodes", "log_every", "rr_check_episodes", "rr_window_episodes",
            "checkpoint_every", "learning_starts", "redo_batch_size") if not value[n] > 0],
        "must not be negative": [n for n in (
            "exploration_steps", "stddev_start", "stddev_end", "stddev_clip", "shift_pad", "rr_threshold",
            "rr_min_step", "rr_required_rise", "reset_every", "redo_period_gradient_steps",
            "redo_tau") if not value[n] >= 0],
        "must lie between 0 and 2**32 - 1": ["seed"] * (not 0 <= args.seed < 2**32),
        "must lie between 0 and 1": [n for n in ("gamma", "tau") if not 0 <= value[n] <= 1],
        "must be at least 15: the convolutions leave nothing of less": ["image_size"] * (args.image_size < 15),
        f"must be less than --image-size {args.image_size}": ["shift_pad"] * (args.shift_pad >= args.image_size),
        "must be k or 1/k with a whole k": [n for n in ("rr_low", "rr_high") if not whole(value[n])],
        f"must be less than --rr-high {args.rr_high}": ["rr_low"] * (switching and args.rr_low >= args.rr_high),
        "must be at least 2": ["rr_check_episodes"] * (args.rr_check_episodes < 2),
        f"must be at most --rr-check-episodes {args.rr_check_episodes}":
            ["rr_window_episodes"] * (args.rr_window_episodes > args.rr_check_episodes),
        "is for --rr-mode adaptive only": [n for n in ("rr_min_step", "rr_required_rise") if value[n] != default[n]
                                           and args.rr_mode != "adaptive"],
        "is for runs that switch; --rr-mode static has --rr-low alone":
            ["rr_high"] * (not switching and args.rr_high != default["rr_high"]),
        "must be given with --rr-mode fixed-switch, and only then":
            ["rr_switch_step"] * ((args.rr_switch_step is None) == (args.rr_mode == "fixed-switch")),
        f"must be at most --learning-starts {args.learning_starts}": [n for n in (
            "batch_size", "n_step") if value[n] > args.learning_starts],
        f"must be at most --buffer-size {args.buffer_size}":
            ["learning_starts"] * (args.learning_starts > args.buffer_size),
        f"must be at least --n-step {args.n_step} + 4": ["buffer_size"] * (args.buffer_size < args.n_step + 4),
        f"must be more than --learning-starts {args.learning_starts}":
            ["total_timesteps"] * (args.total_timesteps <= args.learning_starts),
        f"must lie between 1 and --total-timesteps {args.total_timesteps} - 1": [n for n, given in (
            ("rr_switch_step", args.rr_switch_step is not None), ("reset_every", args.reset_every > 0),
            ) if given and not 0 < value[n] < args.total_timesteps],
        f"is more than --learning-starts {args.learning_starts}": ["redo_batch_size"] * bool(
            args.redo_period_gradient_steps and args.redo_batch_size > args.learning_starts),
        "must name a module": [n for n in ("reset_modules", "redo_modules") if not value[n]],
        "must not contain /": ["exp_name"] * ("/" in args.exp_name),
        "torch sees no such device here": [n for n in ("device", "buffer_device") if missing.get(value[n])],
        f"needs --device cuda, not {args.device}": ["cudagraphs"] * (args.cudagraphs and args.device != "cuda"),
    }  # fmt: skip
    for limit, names in wrong.items():
        for name in names:
            refuse(name, value[name], limit)
    for name, other in NEEDS.items():
        if value[name] != default[name] and value[other] == default[other]:
            refuse(name, value[name], f"does nothing without --{other.replace('_', '-')}")
    try:
        env = make_env(args.env_id, args.image_size)
        frame, actions = env.reset(seed=0)[0], env.unwrapped.action_space
        env.close()
    except gymnasium.error.UnregisteredEnv as error:
        close = difflib.get_close_matches(args.env_id, gymnasium.registry, n=1)
        refuse("env_id", args.env_id, f"did you mean {close[0]}?" if close else " ".join(str(error).split()))
    except Exception as error:
        packages = ("; without a screen MuJoCo needs MUJOCO_GL=egl and, on Debian or Ubuntu, the packages libegl1 "
                    "libgl1-mesa-dri libglx-mesa0 libopengl0") * args.env_id.startswith("dm_control/")  # fmt: skip
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        refuse("env_id", args.env_id, f"cannot be played through its pixels ({reason}){packages}")
    if frame.shape != (3, args.image_size, args.image_size):
        refuse("env_id", args.env_id, f"renders {frame.shape}, not (3, {args.image_size}, {args.image_size})")

    frame_bytes = 3 * args.image_size**2 + 4 * (3 + math.prod(actions.shape))
    replay_bytes = replay_capacity(args) * frame_bytes
    feature_size = 32 * ((args.image_size - 3) // 2 - 5) ** 2
    needed = {  # rough bytes but for the replay, by flag; a weight has a gradient and two moments
        "batch_size": 5e8 + 500 * args.batch_size * args.image_size**2,
        "hidden_dim": 16 * 5 * args.hidden_dim**2,
        "feature_dim": 16 * 4 * args.feature_dim * (feature_size + args.hidden_dim),
    }
    if args.buffer_device == "auto":
        fits = args.device == "cuda" and replay_bytes + sum(needed.values()) < 0.9 * memory("cuda")
        args.buffer_device = "cuda" if fits else "cpu"
    for device in {args.device, args.buffer_device}:
        here = needed if device == args.device else {}
        here = here | dict(buffer_size=replay_bytes) if device == args.buffer_device else here
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


def replay_capacity(args) -> int:
    """Frames in the ring: each episode has one more than steps, which is little."""
    return min(args.buffer_size, args.total_timesteps + args.total_timesteps // 10 + 1000)


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
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(args.device)
    if device.type == "cpu":
        fast_cpu()

    stop = []  # the exit code, when the run is to stop
    envs = Environments(args, 1, stop)
    eval_envs = Environments(args, min(args.eval_episodes, os.cpu_count()), stop)
    if stop:
        raise SystemExit(stop[0])
    action_dim = math.prod(envs.envs.single_action_space.shape)
    agent = DrQv2Agent(action_dim, args).to(device, memory_format=torch.channels_last)
    optimizers = drqv2_optimizers(agent, args, device)
    detector = PlateauDetector(
        args.rr_check_episodes, args.rr_window_episodes, args.rr_threshold, args.rr_required_rise
    )
    replay = PixelReplay(replay_capacity(args), action_dim, args.buffer_device, args.n_step, args.gamma,
                         (3, args.image_size, args.image_size))  # fmt: skip
    # Streams of random numbers of their own, so that resetting does not change the batches
    rng = {name: torch.Generator() for name in ("batch", "act", "intervention")}
    for i, generator in enumerate(rng.values()):
        generator.manual_seed(episode_seed(args.seed, 2, i))

    start = dict(global_step=0, gradient_steps=0, episode=0, episode_actions=[], episode_return=0.0, evaluated=-1)
    start |= dict(switch_step=None, learning_from=args.learning_starts, replay=None, sums={}, count=0, walltime=0.0)
    start |= dict(episode_fau=None, episode_updates=0)
    if args.resume:
        run_dir = Path(args.resume)
        lock = lock_folder(run_dir, args)
        with restoring(run_dir, lock):
            loaded = load_checkpoint(run_dir, args)
            start = {name: loaded.pop(name) for name in start} | loaded
            agent.load_state_dict(start["agent"])
            for optimizer, saved in zip(optimizers, start["optimizers"]):
                optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
                for p, state in optimizer.state.items():  # another device may want another memory layout
                    state.update({k: torch.empty_like(p).copy_(v) for k, v in state.items() if v.shape == p.shape})
            detector.load_state_dict(start["detector"])
            torch.set_rng_state(start["torch_rng"])
            if device.type == "cuda" and start["cuda_rng"] is not None:
                torch.cuda.set_rng_state(start["cuda_rng"])
            for name, generator in rng.items():
                generator.set_state(start["rng"][name])
    else:
        name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
        run_dir = Path("runs") / name
        lock = lock_folder(run_dir, args)
    global_step, gradient_steps, episode, evaluated, switch_step, learning_from, count, walltime = (start[k] for k in (
        "global_step", "gradient_steps", "episode", "evaluated", "switch_step", "learning_from", "count",
        "walltime"))  # fmt: skip
    sums, episode_updates = {tag: total.to(device) for tag, total in start["sums"].items()}, start["episode_updates"]
    episode_fau = start["episode_fau"].to(device) if episode_updates else 0
    episode_actions, episode_return = start["episode_actions"], start["episode_return"]

    if args.resume and start["replay"] is None and global_step < args.total_timesteps:
        print(f"the checkpoint holds no replay: collecting {args.learning_starts} steps before learning goes on")
        learning_from, episode_actions, episode_return = global_step + args.learning_starts, [], 0.0
        episode_fau, episode_updates = 0, 0  # the interrupted episode begins again
    # The simulator's state is not in the checkpoint: the same seed and the same actions lead to it again
    options = {"actions": np.array(episode_actions, np.float32)}
    played = envs.reset(seed=[episode_seed(args.seed, 0, episode)], options=options)
    if played is None:
        raise SystemExit(stop[0])
    frame = played[0][0]
    begun = False
    if start["replay"] is not None:
        with restoring(run_dir, lock):
            replay.load_state_dict(start["replay"])
        last = replay.newest()[0, -3:].cpu().numpy()
        begun = np.abs(frame.astype(int) - last).mean() <= 1  # renderers may differ by rounding
        if episode_actions and not begun:
            lock.close()
            refuse("resume", args.resume, "the environment plays the episode that was interrupted differently here")
    if not begun:
        replay.add_first(frame)
    del start

    writer = start_logging(args, run_dir, first_step=global_step + 1 if args.resume else None)
    start_time, captured = time.time(), None
    first_step = timer_step = global_step
    timer, paused = time.time(), 0.0  # for the speed since the last log
    if args.compile:  # once per batch size and kind of gradient
        torch._dynamo.config.recompile_limit = 64
        for module in (agent.encoder, agent.actor, agent.critic, agent.critic_target):
            module.compile(dynamic=False)

    def request_stop(number, frame):
        stop.append(128 + number)
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nsaving; once more to stop at once\n")

    def give_up(reason):
        print(f"{SCRIPT}.py: error: {reason}: saving", file=sys.stderr)
        stop.append(1)

    def log(values):
        values = {tag: float(value) for tag, value in values.items()}
        with writing(run_dir):
            for tag, value in values.items():
                writer.add_scalar(tag, value, global_step)

    def not_training(function):  # its time does not count for the speed
        def timed():
            nonlocal paused
            began = time.time()
            result = function()
            paused += time.time() - began
            return result

        return timed

    @not_training
    def run_evaluation():
        result = play_evaluation(agent, eval_envs, args, global_step, device, stop)
        log(result)
        return result

    @not_training
    def save_checkpoint():
        with writing(run_dir):
            writer.flush()
        unfinished = global_step < args.total_timesteps  # nobody continues from a finished run's replay
        save_file(run_dir / "checkpoint.pt", dict(
            args=fixed_args(args), agent=agent.state_dict(), optimizers=[o.state_dict()["state"] for o in optimizers],
            detector=detector.state_dict(), switch_step=switch_step, sums=sums, count=count,
            episode_fau=episode_fau if episode_updates else None, episode_updates=episode_updates,
            rng={name: generator.get_state() for name, generator in rng.items()}, torch_rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state() if device.type == "cuda" else None,
            replay=replay.state_dict() if args.checkpoint_replay and unfinished else None, episode=episode,
            episode_actions=[np.asarray(action).tolist() for action in episode_actions], episode_return=episode_return,
            global_step=global_step, gradient_steps=gradient_steps, evaluated=-1 if stop else evaluated,
            learning_from=learning_from, walltime=walltime + time.time() - start_time))  # fmt: skip

    def update():
        nonlocal captured, gradient_steps, sums, count, episode_fau, episode_updates
        stddev = torch.full((), stddev_at(global_step, args), device=device)
        obs, *others, next_obs = (x.to(device) for x in replay.sample(args.batch_size, rng["batch"]))
        batch = [random_shift(obs, args.shift_pad), *others, random_shift(next_obs, args.shift_pad), stddev]
        if args.cudagraphs:
            captured = captured or capture_update(drqv2_update, agent, optimizers, batch, args)
            metrics = captured(batch)
        else:
            metrics = drqv2_update(agent, optimizers, batch, args)
        sums = {tag: value + sums.get(tag, 0) for tag, value in metrics.items()}
        gradient_steps, count = gradient_steps + 1, count + 1
        critic_fau = metrics["plasticity/fau/critic"]
        if detector.reference is None:
            detector.first_batch(float(critic_fau))
            log({"adaptive_rr/fau_first": detector.reference})
        episode_fau, episode_updates = episode_fau + critic_fau, episode_updates + 1

    handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", unit_scale=True, smoothing=0.05,
               mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
    while True:
        if global_step == args.total_timesteps or (global_step % args.eval_every == 0 and global_step != evaluated):
            result, evaluated = run_evaluation(), global_step
            if not result and not stop:
                give_up(f"the actor's output is not finite at step {global_step}")
        if global_step == args.total_timesteps:
            break
        if global_step >= learning_from and not len(replay):
            refuse("n_step", args.n_step, f"no episode of the first {global_step} steps was that long")
        if stop:
            break  # resumed, the run goes on here, and evaluates again if the signal came then

        # The replay ratio of this step
        settled = {"adaptive": detector.switched, "static": False, "fixed-switch": global_step == args.rr_switch_step}
        if settled[args.rr_mode] and switch_step is None:
            switch_step = global_step
            reason = f"FAU has settled at {detector.reference:.4f}; " if args.rr_mode == "adaptive" else ""
            bar.write(f"step {global_step}: {reason}replay ratio {args.rr_low:g} -> {args.rr_high:g}")
        replay_ratio = args.rr_low if switch_step is None else args.rr_high
        events = {}
        if args.reset_every and global_step and global_step % args.reset_every == 0:
            reset_agent(agent, optimizers, args, rng["intervention"])
            events["plasticity/reset"] = 1

        # Act: the environment plays this step in its own process ...
        uniform = global_step < args.exploration_steps
        action = act(agent, replay.newest().to(device), stddev_at(global_step, args), uniform, rng["act"])
        if not np.isfinite(action).all():
            give_up(f"the actor's output is not finite since step {global_step}")
            break
        envs.step_async(action)

        # Learn: ... while the networks learn from the steps before it
        learning = global_step >= learning_from
        if learning and global_step % max(1, round(1 / replay_ratio)) == 0:
            for _ in range(max(1, round(replay_ratio))):
                update()
                if args.redo_period_gradient_steps and gradient_steps % args.redo_period_gradient_steps == 0:
                    batch = [x.to(device) for x in replay.sample(args.redo_batch_size, rng["intervention"])]
                    for tag, recycled in recycle_units(agent, optimizers, batch, args, rng["intervention"]).items():
                        events[tag] = events.get(tag, 0) + recycled

        # Observe
        played = envs.step_wait()
        global_step += 1
        bar.update()
        if played is None:  # the environment's process died: the episode is cut here, without this step
            over = True
        else:
            frame, reward, terminated, truncated, _ = played
            replay.add(action[0], reward[0], terminated[0], frame[0])
            episode_actions.append(action[0])
            episode_return += float(reward[0])
            over = terminated[0] or truncated[0]
        if over and played is not None:
            events |= {"charts/episodic_return": episode_return, "charts/episodic_length": len(episode_actions)}
            bar.set_postfix(episodic_return=f"{episode_return:g}", refresh=False)
        if over:
            episode, episode_actions, episode_return = episode + 1, [], 0.0
            if episode_updates:
                average = float(episode_fau) / episode_updates
                check = detector.end_episode(episode, average, may_switch=global_step >= args.rr_min_step)
                episode_fau, episode_updates = 0, 0
                events["adaptive_rr/fau_episode"] = average
                if check is not None:
                    events["adaptive_rr/fau_checkpoint"], events["adaptive_rr/fau_delta"] = check
            played = envs.reset(seed=[episode_seed(args.seed, 0, episode)])
            if played is not None:
                replay.add_first(played[0][0])

        # Log, save
        log(events)
        if global_step % args.log_every == 0:
            averages = {tag: float(total / count) for tag, total in sums.items()}
            if not_finite(averages) and not stop:
                give_up(f"{not_finite(averages)[0]} is not finite, after step {timer_step}")
            log(averages | {
                "charts/stddev": stddev_at(global_step, args), "charts/gradient_steps": gradient_steps,
                "charts/frames": global_step * ACTION_REPEAT, "charts/walltime": walltime + time.time() - start_time,
                "charts/replay_ratio": replay_ratio if learning else 0,
                "adaptive_rr/switched": switch_step is not None})  # fmt: skip
            if timer_step > max(learning_from, first_step):  # the first steps of learning warm up and compile
                log({"charts/SPS": (global_step - timer_step) / (time.time() - timer - paused)})
            sums, count, timer_step, timer, paused = {}, 0, global_step, time.time(), 0.0
        if global_step % args.checkpoint_every == 0 and global_step < args.total_timesteps:
            save_checkpoint()

    save_checkpoint()
    with writing(run_dir):
        writer.close()
    bar.close()
    envs.close()
    eval_envs.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop:
        lock.close()
        raise SystemExit(stop[0])
    if args.save_model:
        save_file(run_dir / "model.pt", agent.state_dict())
    summary = dict(global_step=global_step, gradient_steps=gradient_steps, switch_step=switch_step)
    summary["walltime"] = walltime + time.time() - start_time
    save_file(run_dir / "summary.json", summary | result)
    print(f"{run_dir}: mean return {result['eval/episodic_return']:.1f} over {result['eval/episodes']:g} episodes")
    lock.close()
    return run_dir


if __name__ == "__main__":
    train(parse_args(sys.argv[1:]))
