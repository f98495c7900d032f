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
#     "gymnasium-robotics==1.4.2",
# ]
# ///
"""DrM on Adroit, Figures 8 and 10 of DrM: Mastering Visual Reinforcement Learning through Dormant Ratio Minimization
(Xu et al., ICLR 2024, arXiv 2310.19668): a hand with 24 joints that must turn a pen, open a door, hammer a nail. The
algorithm is drm.py's: the share beta of dormant units of the actor's linear layers steers noise, perturbation and
exploitation (beta_hat = 0.2):
    beta     of all units, those with mean |h_i| < 0.025 * (mean of that over the layer's units)      -> `dormant_ratio`
    noise    sigma = 1 / (1 + exp(-(beta - beta_hat) / 0.1)), at least DrQ-v2's decay once awake    -> `exploration_std`
    perturb  w <- alpha w + (1 - alpha) w'  every 100,000 steps; alpha = clip(1 - 2 beta, 0.2, 0.9)         -> `perturb`
    exploit  y = sum_{i<n} gamma^i r_{t+i} + gamma^n ( lambda V(s') + (1 - lambda) min_k Q_target_k )       -> `update`
             lambda = 0.6 / (1 + exp((beta - beta_hat) / 0.02)), V: the 0.7-expectile of min_k Q_k   -> `expectile_loss`
What is new here: the environment (`make_env`), and that the agent feels its hand. An observation is a frame and the 24
joint angles q, which join the features behind each trunk; E and F are MLPs with one hidden layer       -> `FusedTrunk`
    h = F( trunk(f(o)) + E(q) )      the units of E and F count for beta: 4,270 in all for the pen     -> `hand_outputs`

    bash install.sh adroit                                        gymnasium-robotics beside the other packages
    python studies/drm_adroit.py --env-id pen                     3M steps: for a GPU, not run yet
    SCALE=smoke bash benchmark/drm/fig8_adroit.sh                 DrM and DrQ-v2 on a CPU, the plumbing alone

An episode has 50 steps (pen) or 100, each two of the simulator's; it is a success once the goal has been true in more
than 20 (pen) or 25 steps of the simulator. Rewards and returns are scaled as in the official code: 1/50, 1/20, 1/100.
Differences from the official code (XuGW-Kevin/DrM; 2, 3, 4 and 6 of drm.py hold, too), and the reasons for them:
 7. Gymnasium-Robotics 1.4.2 (-v1); officially, its ancestor on mujoco_py. The models are the same but for cameras and
    the pen's opacity, which are set as there; so are the goals of pen and door, and the end when the pen drops. The
    package rewards distance from handle and hammer, a wrong sign that it knows of (-v2); it is put right here.
 8. A seed decides where things are; officially, nothing does.
 9. A transition is drawn uniformly, from the current episode, too; officially, first an episode, which favours the
    pen's short ones.
Your own intervention: `train`, under "Perturb". What is saved: `parts` and counters in `train`, between episodes;
Ctrl-C cuts the episode, and a resumed run begins the next.
"""

import copy
import ctypes
import fcntl
import json
import math
import multiprocessing
import os
import random
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
Share = Annotated[float, (0, 1)]
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
    """DrM on Adroit. A step is an agent step, 2 of the simulator."""

    exp_name: str = "drm_adroit"  # name of this experiment, part of the run folder's name
    seed: Annotated[int, (0, 2**32 - 1)] = 1  # seeds python, numpy, torch and every episode
    env_id: Literal["pen", "door", "hammer"] = "pen"  # what the hand must do
    image_size: Annotated[int, (15, 1000)] = 84  # height and width of the frames in pixels
    precision: Literal["float32", "tf32", "bfloat16"] = "tf32"  # of products; tf32 (GPUs), bfloat16 (updates): faster
    total_timesteps: Count = 3_050_000  # steps of the whole run
    eval_every: Count = 5000  # steps between evaluations, at the next end of an episode; one more at the end
    eval_episodes: Count = 10  # episodes per evaluation, played with the mean action

    # DrQ-v2
    learning_starts: Count = 2000  # steps before the first gradient step
    exploration_steps: Annotated[int, (0, 10**12)] = 2000  # first steps: uniform random actions, no awakening
    buffer_size: Count = 1_000_000  # images in the replay, 21 kB each: one per step, and one more per episode
    replay_ratio: Annotated[float, (1e-6, 1e6)] = 0.5  # gradient steps per step
    batch_size: Count = 256  # transitions per gradient step
    n_step: Count = 3  # rewards per target before it bootstraps
    gamma: Share = 0.99  # discount per step
    tau: Share = 0.01  # Polyak coefficient of the target critic, per gradient step
    learning_rate: NonNegative = 1e-4  # Adam's, for encoder, actor, critic and value network
    feature_dim: Count = 50  # output units of the trunks, the linear layers between encoder and heads
    hidden_dim: Count = 1024  # units of each hidden layer of the heads
    stddev_start: NonNegative = 1.0  # standard deviation of the exploration noise at the beginning of its decay
    stddev_end: NonNegative = 0.1  # standard deviation of that noise after its linear decay
    stddev_steps: Count = 500_000  # length of the decay in steps
    stddev_clip: NonNegative = 0.3  # bound on the noise in the updates (not when acting)
    shift_pad: Annotated[int, (0, 1000)] = 4  # largest random shift in pixels

    # Dormant ratio
    dormant_tau: Share = 0.025  # dormant units have less than this share of their layer's mean output
    dormant_strict: bool = True  # strictly less: a layer of zeros has no dormant units
    target_dormant_ratio: Share = 0.2  # beta_hat: below it the agent awakens, and V counts

    # What it steers
    stddev_type: Literal["awake", "drqv2"] = "awake"  # of the noise: see `noise_std`; drqv2: the decay alone
    dormant_temperature: Annotated[float, (1e-6, 1e6)] = 0.1  # T: how gradually the noise follows the ratio
    perturb_every: Annotated[int, (0, 10**12)] = 100_000  # steps between perturbations; 0: none
    perturb_rate: NonNegative = 2.0  # k: a perturbation keeps a share of 1 - k * ratio of the weights
    min_perturb_factor: Share = 0.2  # at least this share
    max_perturb_factor: Share = 0.9  # at most this share; equal to the one above: always this
    perturb_target: Literal["independent", "same"] = "independent"  # the target critic's draw: its own or the critic's
    perturb_scope: Literal["linear", "actor", "all"] = "linear"  # all linear layers; the actor's; all parameters
    target_lambda: Share = 0.6  # largest weight of the value network in the critic's target; 0: it is not used
    lambda_type: Literal["dormant", "constant"] = "dormant"  # that weight grows as the ratio falls, or is constant
    lambda_temperature: Annotated[float, (1e-6, 1e6)] = 0.02  # T': how gradually that weight follows the ratio
    expectile: Annotated[float, (1e-6, 1 - 1e-6)] = 0.7  # expectile of the Q-values that the value network learns

    def task_defaults(self) -> dict:
        return {}


class HandTask(NamedTuple):
    name: str  # in Gymnasium-Robotics: AdroitHand<name>-v1
    episode: int  # steps of the simulator
    reward_scale: float  # times the package's reward
    joints: slice  # of the simulator's positions: the hand's 24 joint angles
    camera: tuple  # its place, m; the pen's looks from the front, the others' from above
    hold: int  # steps of the simulator in which the goal must be true, and one more


TASKS = {
    "pen": HandTask("Pen", 100, 1 / 50, slice(None, -6), (0, -0.8, 0.8), hold=20),
    "door": HandTask("Door", 200, 1 / 20, slice(4, -2), (0, 0, 1.5), hold=25),
    "hammer": HandTask("Hammer", 200, 1 / 100, slice(2, -7), (0, 0, 1.1), hold=25),
}
JOINTS = 24
SCRIPT, ACTION_REPEAT = "drm_adroit", 2
ACTION_LIMIT = 1 - 1e-6  # largest absolute value of an action


# === Environment ======================================================================================================
def derived_seed(*numbers: int) -> int:
    """A seed derived from numbers: the run's seed, what it is for (0 training, 1 evaluation, 2 a stream of random
    numbers), and which one of these. Below 2**32, because torch's CPU generators ignore all higher bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def random_stream(seed: int, number: int) -> torch.Generator:
    """A CPU generator of its own for each purpose, so that drawing for one does not change another."""
    return torch.Generator().manual_seed(derived_seed(seed, 2, number))


def to_pixels(frame: np.ndarray, image_size: int) -> np.ndarray:
    """A rendered frame (height, width, 3) -> (3, image_size, image_size); resized by area averaging, if necessary."""
    pixels = np.ascontiguousarray(frame.transpose(2, 0, 1))
    if pixels.shape[1:] != (image_size, image_size):
        resized = F.interpolate(torch.tensor(pixels[None], dtype=torch.float32), (image_size, image_size), mode="area")
        pixels = resized[0].round().byte().numpy()
    return pixels


def make_env(env_id: str, image_size: int):
    """A task of Adroit as the official code plays it, each action ACTION_REPEAT times. The observation is the frame
    after that, (3, image_size, image_size) uint8; info has `joints` (24,) float32 and `success`: 1 from the step on in
    which the goal has been true for long enough."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    import gymnasium
    import gymnasium_robotics
    from gymnasium.wrappers import AddRenderObservation, TransformObservation

    task = TASKS[env_id]

    class Hand(gymnasium.Wrapper):
        """Reward, goal, end and pictures of the official code."""

        def reset(self, *, seed=None, options=None):
            obs, info = self.env.reset(seed=seed)
            self.held = 0
            return obs, info | self.extras()

        def step(self, action):
            total = 0.0
            for _ in range(ACTION_REPEAT):
                obs, reward, terminated, truncated, info = self.env.step(action)
                hand, wrong = self.unwrapped, 0.0
                data, goal = hand.data, info["success"]
                if env_id == "pen":
                    terminated = data.xpos[hand.obj_body_id][2] < 0.075  # it has dropped
                    ends = [data.site_xpos[i] for i in (hand.obj_t_site_id, hand.obj_b_site_id)]
                    wanted = [data.site_xpos[i] for i in (hand.tar_t_site_id, hand.tar_b_site_id)]
                    along = (ends[0] - ends[1]) / hand.pen_length
                    goal = along @ (wanted[0] - wanted[1]) / hand.tar_length > 0.95
                elif env_id == "door":
                    wrong = np.linalg.norm(data.site_xpos[hand.grasp_site_id] - data.site_xpos[hand.handle_site_id])
                    goal = data.qpos[hand.door_hinge_addrs] > 1.4
                else:
                    wrong = np.linalg.norm(data.site_xpos[hand.S_grasp_site_id] - data.xpos[hand.obj_body_id])
                total += task.reward_scale * float(reward - 0.2 * wrong)
                self.held += bool(goal)
                if terminated or truncated:
                    break
            return obs, total, bool(terminated), truncated, info | self.extras()

        def extras(self) -> dict:
            joints = self.unwrapped.data.qpos[task.joints].astype(np.float32)
            return dict(joints=joints, success=float(self.held > task.hold))

        def render(self):
            return self.env.render()[::-1]

    if multiprocessing.parent_process() is not None:
        os.setpgrp()  # the terminal's Ctrl-C is meant for the learner alone
    gymnasium.register_envs(gymnasium_robotics)
    options = dict(render_mode="rgb_array", camera_name="vil_camera", width=image_size, height=image_size)
    options |= dict(max_episode_steps=task.episode, disable_env_checker=True)
    env = gymnasium.make(f"AdroitHand{task.name}-v1", **options)
    if vars(sys.modules["mujoco"]).setdefault("first_suite", "gymnasium") != "gymnasium":
        raise RuntimeError("dm_control and another MuJoCo renderer in one process draw wrong pictures")
    model = env.unwrapped.model
    model.camera("vil_camera").pos = task.camera
    if env_id == "pen":
        for name in ("pen", "target"):
            model.geom(name).rgba[3] = 1
    else:
        model.camera("vil_camera").quat = (math.cos(1.57), 0, 0, math.sin(1.57))
    env = AddRenderObservation(Hand(env))
    space = gymnasium.spaces.Box(0, 255, (3, image_size, image_size), np.uint8)
    return TransformObservation(env, partial(to_pixels, image_size=image_size), space)


# === Replay buffer ====================================================================================================
class PixelReplay:
    """A ring of single frames (capacity, 3, height, width) uint8; stacks and n-step returns are built when sampling.

    Each frame has a record: its age (how many frames of its episode came before it), the reward and the termination
    that came with it, and the action that led to it. `start` lists the frames that are followed by n steps of the same
    episode, and sampling is uniform over them (as in DrQ-v2, none of an episode's last n frames is a start). Frames and
    starts are numbered from 0 in the order of their arrival; number i is in slot i % capacity.
    """

    def __init__(self, capacity, action_dim, device, n_step=3, gamma=0.99, frame_shape=(3, 84, 84), stack=3):
        self.capacity = capacity
        self.n_step = n_step
        self.gamma = gamma
        self.stack = stack
        self.frames = torch.empty((capacity, *frame_shape), dtype=torch.uint8, device=device)
        self.record = torch.empty((capacity, 3 + action_dim), device=device)
        self.start = torch.zeros(capacity, dtype=torch.int64)  # on the CPU, where indices are drawn
        self.num_frames = self.num_steps = self.num_starts = self.oldest_start = self.age = 0

    def add_first(self, frame: np.ndarray) -> None:
        """An episode's first frame (3, height, width)."""
        self.age = -1
        self.add(np.zeros(self.record.shape[1] - 3, np.float32), 0.0, False, frame)

    def add(self, action: np.ndarray, reward: float, terminated: bool, frame: np.ndarray) -> None:
        """The action taken at the newest frame, and what followed: reward, termination, and the next frame."""
        self.age += 1
        slot = self.num_frames % self.capacity
        record = np.concatenate([[self.age, reward, terminated], action]).astype(np.float32)
        self.frames[slot] = torch.from_numpy(frame)
        self.record[slot] = torch.from_numpy(record)
        if self.age >= self.n_step:
            self.start[self.num_starts % self.capacity] = self.num_frames - self.n_step
            self.num_starts += 1
        self.num_frames += 1
        self.num_steps += self.age > 0  # no step led to an episode's first frame
        oldest = self.num_frames - self.capacity  # the oldest frame of a full ring; a start needs its whole stack
        while len(self) and oldest > max(0, self.start[self.oldest_start % self.capacity] - self.stack + 1):
            self.oldest_start += 1

    def __len__(self) -> int:
        """The number of transitions that can be sampled."""
        return self.num_starts - self.oldest_start

    def stacked(self, index: torch.Tensor) -> torch.Tensor:
        """Frame numbers (batch,) -> observations (batch, stack * 3, height, width) uint8, newest frame last. At the
        beginning of an episode, its first frame is repeated."""
        back = torch.arange(self.stack - 1, -1, -1, device=index.device)
        back = torch.minimum(back, self.record[index % self.capacity, 0, None].long())
        return self.frames[(index[:, None] - back) % self.capacity].flatten(1, 2)

    def newest(self) -> torch.Tensor:
        """The current observation (1, stack * 3, height, width) uint8."""
        return self.stacked(torch.tensor([self.num_frames - 1], device=self.frames.device))

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple:
        """A uniform batch, drawn with a CPU generator -> obs (batch, stack * 3, height, width) uint8, action (batch,
        action), the discounted reward of n steps (batch,), discount (batch,), and next_obs, n steps later.

        discount is gamma^n, or 0 if the last of these steps terminated the episode (a truncation changes nothing).
        """
        chosen = torch.randint(self.oldest_start, self.num_starts, (batch_size,), generator=generator)
        first = self.start[chosen % self.capacity].to(self.frames.device)
        steps = torch.arange(1, self.n_step + 1, device=first.device)
        record = self.record[(first[:, None] + steps) % self.capacity]  # (batch, n_step, 3 + action)
        reward = (record[:, :, 1] * self.gamma ** (steps - 1)).sum(1)
        discount = self.gamma**self.n_step * (1 - record[:, -1, 2])
        return self.stacked(first), record[:, 0, 3:], reward, discount, self.stacked(first + self.n_step)

    def state_dict(self) -> dict:
        """The counters, and the filled part of each ring: via NumPy, because torch.save writes whole storages."""
        state = dict(vars(self))
        for name in ("frames", "record", "start"):
            state[name] = torch.from_numpy(state[name][: self.num_frames].cpu().numpy())
        return state

    def load_state_dict(self, state: dict) -> None:
        if state["capacity"] != self.capacity and state["num_frames"] > min(state["capacity"], self.capacity):
            raise ValueError("its replay has wrapped around a ring of another size")
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                getattr(self, name)[: len(value)] = value
            elif name != "capacity":
                setattr(self, name, value)


class JointReplay(PixelReplay):
    """Single frames, each with the hand's joint angles. An observation is the pair."""

    def __init__(self, capacity, action_dim, device, n_step, gamma, frame_shape):
        super().__init__(capacity, action_dim, device, n_step, gamma, frame_shape, stack=1)
        self.joints = torch.empty((capacity, JOINTS), device=device)

    def add_first(self, frame: np.ndarray, joints: np.ndarray) -> None:
        self.age = -1
        self.add(np.zeros(self.record.shape[1] - 3, np.float32), 0.0, False, frame, joints)

    def add(self, action, reward, terminated, frame, joints) -> None:
        self.joints[self.num_frames % self.capacity] = torch.from_numpy(joints)
        super().add(action, reward, terminated, frame)

    def stacked(self, index: torch.Tensor) -> tuple:
        """Frame numbers (batch,) -> frames (batch, 3, height, width) uint8, joint angles (batch, 24)."""
        return super().stacked(index), self.joints[index % self.capacity]

    def state_dict(self) -> dict:
        return super().state_dict() | dict(joints=torch.from_numpy(self.joints[: self.num_frames].cpu().numpy()))


def random_shift(obs: torch.Tensor, pad: int, shift: torch.Tensor | None = None) -> torch.Tensor:
    """DrQ-v2's augmentation: pads each image by repeating its border, then crops it to its size at a random place.

    obs (batch, channels, height, width) of any type; shift (batch, 2): whole numbers (x, y) in [0, 2 * pad], drawn if
    not given -> the same shape and type. A shift equal to pad moves nothing.
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
    """Layers in sequence: forward(x) -> output, [output of each ReLU]."""

    def forward(self, x):
        activations = []
        for layer in self:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                activations.append(x)
        return x, activations


class Encoder(nn.Module):
    """obs (batch, channels, height, width) uint8 -> features (batch, feature_size), the 4 convolutions' activations."""

    def __init__(self, channels=9, image_size=84):
        super().__init__()
        self.convnet = Layers()
        for stride in (2, 1, 1, 1):
            self.convnet.extend([nn.Conv2d(channels, 32, 3, stride), nn.ReLU(inplace=True)])
            channels = 32
        size = (image_size - 3) // 2 + 1 - 3 * 2  # of the last feature map
        self.feature_size = 32 * size * size
        self.apply(init_layer)

    def forward(self, obs):
        x = obs.to(torch.float32, memory_format=torch.channels_last).div(255).sub_(0.5)
        features, activations = self.convnet(x)
        return features.flatten(1), activations


def trunk(feature_size: int, feature_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(feature_size, feature_dim), nn.LayerNorm(feature_dim), nn.Tanh())


def head(inputs: int, hidden_dim: int, outputs: int) -> Layers:
    return Layers(nn.Linear(inputs, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU(),
                  nn.Linear(hidden_dim, outputs))  # fmt: skip


class Actor(nn.Module):
    """features (batch, feature_size) -> mean action (batch, action), activations of the 2 hidden layers."""

    def __init__(self, feature_size, action_dim, feature_dim=50, hidden_dim=1024):
        super().__init__()
        self.trunk = trunk(feature_size, feature_dim)
        self.policy = head(feature_dim, hidden_dim, action_dim)
        self.apply(init_layer)

    def forward(self, features):
        x = self.trunk(features).float()
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has too few digits for actions and values
            mean, activations = self.policy(x)
        return mean.tanh(), activations


class Critic(nn.Module):
    """features (batch, feature_size), action (batch, action) -> two values (batch,), activations of the 2 hidden layers
    of the first head and then of the second."""

    def __init__(self, feature_size, action_dim, feature_dim=50, hidden_dim=1024):
        super().__init__()
        self.trunk = trunk(feature_size, feature_dim)
        self.q1 = head(feature_dim + action_dim, hidden_dim, 1)
        self.q2 = head(feature_dim + action_dim, hidden_dim, 1)
        self.apply(init_layer)

    def forward(self, features, action):
        x = self.trunk(features).float()
        with torch.autocast(x.device.type, enabled=False):
            x = torch.cat([x, action], 1)
            q1, activations1 = self.q1(x)
            q2, activations2 = self.q2(x)
        return q1.squeeze(1), q2.squeeze(1), activations1 + activations2


class Value(nn.Module):
    """features (batch, feature_size) -> V (batch,)."""

    def __init__(self, feature_size, feature_dim=50, hidden_dim=1024):
        super().__init__()
        self.trunk = trunk(feature_size, feature_dim)
        self.v = head(feature_dim, hidden_dim, 1)
        self.apply(init_layer)

    def forward(self, features):
        x = self.trunk(features).float()
        with torch.autocast(x.device.type, enabled=False):
            value, _ = self.v(x)
        return value.squeeze(1)


def init_layer(layer: nn.Module) -> None:
    """Orthogonal initial weights, times sqrt(2) in convolutions; biases 0. The layer remembers how: `layer.init`."""
    if isinstance(layer, nn.Linear | nn.Conv2d):
        layer.init = partial(nn.init.orthogonal_, gain=math.sqrt(2) if isinstance(layer, nn.Conv2d) else 1)
        layer.init(layer.weight)
        nn.init.zeros_(layer.bias)


def initial_weight(layer: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """A new weight for a layer, on the CPU. The layer's attribute `init` draws it, a function like those of nn.init; a
    layer without one gets PyTorch's default, uniform within 1 / sqrt(fan_in)."""
    draw = getattr(layer, "init", partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
    return draw(torch.empty(layer.weight.shape), generator=generator)


class HandEncoder(Encoder):
    """obs: frames (batch, 3, height, width) uint8 and joint angles (batch, 24) -> features (batch, feature_size + 24),
    the last ones the angles themselves."""

    def forward(self, obs):
        frames, joints = obs
        features, activations = super().forward(frames)
        return torch.cat([features, joints], 1), activations


class FusedTrunk(nn.Module):
    """features (batch, feature_size + 24) -> F(trunk(features) + E(joint angles)) (batch, feature_dim)."""

    def __init__(self, image_trunk: nn.Sequential, feature_dim: int, hidden_dim: int):
        super().__init__()
        self.image_trunk = image_trunk
        self.joint_mlp = nn.Sequential(nn.Linear(JOINTS, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, feature_dim))
        self.fusion = nn.Sequential(nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, feature_dim))
        self.joint_mlp.apply(init_layer)
        self.fusion.apply(init_layer)

    def outputs(self, features) -> list:
        """Those of its linear layers, hidden ones after their ReLU, (batch, units) each."""
        linear_image, norm, tanh = self.image_trunk
        linear = linear_image(features[:, :-JOINTS])
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 has too few digits for angles
            hidden = F.relu(self.joint_mlp[0](features[:, -JOINTS:].float()))
            joined = self.joint_mlp[2](hidden)
            fused = F.relu(self.fusion[0](tanh(norm(linear.float())) + joined))
            return [linear, hidden, joined, fused, self.fusion[2](fused)]

    def forward(self, features):
        return self.outputs(features)[-1]


class HandAgent(nn.Module):
    """Encoder, actor, critic, target critic and value network; and what steers: the last batch's dormant ratio and the
    step of awakening (infinity until then), both 0-d. The target critic also reads the online encoder's features."""

    def __init__(self, action_dim, args):
        super().__init__()
        self.encoder = HandEncoder(channels=3, image_size=args.image_size)
        feature_size, dims = self.encoder.feature_size, (args.feature_dim, args.hidden_dim)
        self.actor = Actor(feature_size, action_dim, *dims)
        self.critic = Critic(feature_size, action_dim, *dims)
        self.value = Value(feature_size, *dims)
        for network in (self.actor, self.critic, self.value):
            network.trunk = FusedTrunk(network.trunk, *dims)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("dormant_ratio", torch.ones(()))
        self.register_buffer("awaken_step", torch.full((), math.inf))

    def mean_action(self, obs):
        features, _ = self.encoder(obs)
        mean, _ = self.actor(features)
        return mean


# === The dormant ratio and what it steers =============================================================================
def hand_outputs(actor, features) -> list:
    """What the ratio is taken over, (batch, units) per linear layer: hidden layers after their ReLU (before it, hardly
    any unit would be dormant), the image trunk's before its layer norm, the last one before its tanh."""
    outputs = actor.trunk.outputs(features)
    x = outputs[-1].float()
    with torch.autocast(x.device.type, enabled=False):
        mean, hidden = actor.policy(x)
    return [*outputs, *hidden, mean]


def dormant_ratio(outputs: list, tau: float, strict: bool = True) -> torch.Tensor:
    """beta (Xu et al. 2024) of any layers' outputs, [(batch, units)] -> 0-d: the share of units whose mean absolute
    output is below tau times their layer's mean (strict), or at most that. NaN if an output is not finite."""
    dormant = []
    for output in outputs:
        mean = output.abs().mean(0, dtype=torch.float32)
        limit = tau * mean.mean()
        units = (mean < limit if strict else mean <= limit).float()
        dormant.append(torch.where(mean.isfinite().all(), units, torch.nan))
    return torch.cat(dormant).mean()


def exploration_std(beta, target: float, temperature: float, lowest) -> torch.Tensor:
    """sigma, the exploration noise's standard deviation: max(sigmoid((beta - target) / temperature), lowest). 0-d."""
    return torch.maximum(torch.sigmoid((beta - target) / temperature), lowest)


def perturb_factor(beta, rate: float, lowest: float, highest: float) -> torch.Tensor:
    """alpha, the share of the old weights that a perturbation keeps: clip(1 - rate beta, lowest, highest). 0-d."""
    return (1 - rate * beta).clamp(lowest, highest)


def exploitation_lambda(beta, target: float, temperature: float, highest: float) -> torch.Tensor:
    """lambda, the weight of V in the critic's target: highest sigmoid((target - beta) / temperature). 0-d."""
    return highest * torch.sigmoid((target - beta) / temperature)


def expectile_loss(value, q, expectile: float) -> torch.Tensor:
    """The mean of w (value - q)^2, w = expectile if value <= q, else 1 - expectile: value (batch,) learns an upper
    expectile of q (batch,), which gets no gradient (Kostrikov et al. 2022)."""
    error = value - q.detach()
    return (torch.where(error > 0, 1 - expectile, expectile) * error**2).mean()


@torch.no_grad()
def perturb(network: nn.Module, factor, generator: torch.Generator, kinds=nn.Linear) -> None:
    """In all layers of these kinds, in place: weights := factor * weights + (1 - factor) * newly drawn ones, as
    `initial_weight` draws them; biases shrink towards 0. factor: a number or 0-d; generator: a CPU generator."""
    for layer in [module for module in network.modules() if isinstance(module, kinds)]:
        ones = isinstance(layer, nn.LayerNorm)
        fresh = torch.ones_like(layer.weight) if ones else initial_weight(layer, generator).to(layer.weight)
        layer.weight.copy_(factor * layer.weight + (1 - factor) * fresh)
        if layer.bias is not None:
            layer.bias.mul_(factor)


def restart_adam(optimizer) -> None:
    """Adam starts anew: its averages and step counts become 0, in place."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def perturb_agent(agent, optimizers, args, generator) -> torch.Tensor:
    """Perturbs what --perturb-scope says, by the agent's dormant ratio -> alpha. If it is NaN, all weights stay."""
    factor = perturb_factor(agent.dormant_ratio, args.perturb_rate, args.min_perturb_factor, args.max_perturb_factor)
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm) if args.perturb_scope == "all" else nn.Linear
    networks = [agent.actor, agent.critic, agent.critic_target, agent.encoder, agent.value]
    if args.perturb_scope == "actor":
        networks, optimizers = [agent.actor], optimizers[1:2]  # the actor's
    before = None
    for network in networks:
        if network is agent.critic_target and args.perturb_target == "same":
            generator.set_state(before)  # the critic came just before it: the same draws again
        before = generator.get_state()
        perturb(network, factor.nan_to_num(1.0), generator, kinds)
    for optimizer in optimizers:
        restart_adam(optimizer)
    return factor


def noise_std(agent, step, args) -> torch.Tensor:
    """Standard deviation of the exploration noise at this step (0-d): by the agent's dormant ratio and, once awake, no
    less than DrQ-v2's linear decay, which begins then; with --stddev-type drqv2, that decay alone, from step 0 on."""
    elapsed = step if args.stddev_type == "drqv2" else step - agent.awaken_step  # -infinity until it is awake
    progress = (elapsed / args.stddev_steps).clamp(0, 1)
    decay = (args.stddev_start + progress * (args.stddev_end - args.stddev_start)).float()
    if args.stddev_type == "drqv2":
        return decay
    lowest = torch.where(elapsed < 0, 0, decay)
    return exploration_std(agent.dormant_ratio, args.target_dormant_ratio, args.dormant_temperature, lowest)


# === Update ===========================================================================================================
def make_drm_optimizers(agent, args, device) -> list:
    """Adam for encoder, actor, critic and value network."""
    options = dict(lr=args.learning_rate, fused=device.type != "mps", capturable=args.cudagraphs)
    networks = [agent.encoder, agent.actor, agent.critic, agent.value]
    return [torch.optim.Adam(network.parameters(), **options) for network in networks]


def truncated_normal(mean, std, clip: float) -> torch.Tensor:
    """mean plus noise with standard deviation std (0-d) that is clipped to +-clip. The sum is clamped to the action
    limits, but its gradient is that of mean."""
    action = mean + (torch.randn_like(mean) * std).clamp(-clip, clip)
    return action - action.detach() + action.detach().clamp(-ACTION_LIMIT, ACTION_LIMIT)


def update(agent, optimizers, args, batch: list) -> dict:
    """Measures the dormant ratio; then one gradient step of the value network, one of critic and encoder, one of the
    actor, a Polyak step of the target. batch: augmented frames, joint angles, action, reward, discount, the next ones
    of both, step (0-d) -> detached metrics, on the device."""
    frames, joints, action, reward, discount, next_frames, next_joints, step = batch
    obs, next_obs = (frames, joints), (next_frames, next_joints)
    encoder_optimizer, actor_optimizer, critic_optimizer, value_optimizer = optimizers
    bfloat16 = args.precision == "bfloat16"
    autocast = partial(torch.autocast, device_type=frames.device.type, dtype=torch.bfloat16, enabled=bfloat16)
    with autocast():
        features, _ = agent.encoder(obs)
        q1, q2, _ = agent.critic(features, action)

    # What steers: the dormant ratio of this batch, and whether it awakens the agent
    detached = features.detach()
    with torch.no_grad(), autocast():  # a region of its own: weights cast here are cached without gradients
        beta = dormant_ratio(hand_outputs(agent.actor, detached), args.dormant_tau, args.dormant_strict)
    awake = (beta < args.target_dormant_ratio) & (step > args.exploration_steps)
    agent.dormant_ratio.copy_(beta)
    agent.awaken_step.copy_(torch.where(awake, torch.minimum(agent.awaken_step, step), agent.awaken_step))
    std = noise_std(agent, step, args)
    lam = exploitation_lambda(beta, args.target_dormant_ratio, args.lambda_temperature, args.target_lambda)
    if args.lambda_type == "constant":
        lam = torch.full_like(beta, args.target_lambda)

    # The value network learns from the critic as it is
    value_loss = torch.zeros_like(beta)
    if args.target_lambda:  # else nothing would learn from it
        with autocast():
            value = agent.value(detached)
        value_loss = expectile_loss(value, torch.minimum(q1, q2), args.expectile)
        value_optimizer.zero_grad()
        value_loss.backward()
        value_optimizer.step()

    # Critic and encoder learn from the updated value network and the target critic
    with torch.no_grad(), autocast():
        next_features, _ = agent.encoder(next_obs)
        next_mean, _ = agent.actor(next_features)
        next_action = truncated_normal(next_mean, std, args.stddev_clip)
        target_q1, target_q2, _ = agent.critic_target(next_features, next_action)
        next_value = torch.minimum(target_q1, target_q2)
        if args.target_lambda:
            next_value = lam * agent.value(next_features) + (1 - lam) * next_value
        target = reward + discount * next_value
    critic_loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
    encoder_optimizer.zero_grad()
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()
    encoder_optimizer.step()

    # The actor learns from the updated critic; its loss changes neither critic nor encoder
    with autocast():
        mean, _ = agent.actor(detached)
        actor_q1, actor_q2, _ = agent.critic(detached, truncated_normal(mean, std, args.stddev_clip))
    actor_loss = -torch.minimum(actor_q1, actor_q2).mean()
    actor_optimizer.zero_grad()
    actor_loss.backward(inputs=list(agent.actor.parameters()))
    actor_optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.critic_target.parameters()), list(agent.critic.parameters()), args.tau)
    return {
        "losses/critic": critic_loss.detach(), "losses/actor": actor_loss.detach(), "losses/reward": reward.mean(),
        "losses/q_values": q1.detach().mean(), "losses/targets": target.mean(), "losses/value": value_loss.detach(),
        "drm/dormant_ratio": beta, "drm/stddev": std, "drm/lambda": lam,
    }  # fmt: skip


def updates_due(step: int, replay_ratio: float) -> int:
    """Gradient steps to take at this step: replay_ratio on average, spread evenly."""
    return math.ceil((step + 1) * replay_ratio) - math.ceil(step * replay_ratio)


def act(agent, obs, stddev: float, uniform: bool, generator) -> np.ndarray:
    """A training action (1, action) for obs (1, channels, height, width): mean plus noise (clamped together, the noise
    alone is not), or uniform. Both are drawn every time, with a CPU generator."""
    with torch.no_grad():
        mean = agent.mean_action(obs).cpu()
    noisy = mean + stddev * torch.randn(mean.shape, generator=generator)
    random_action = torch.rand(mean.shape, generator=generator) * 2 - 1
    return (random_action if uniform else noisy.clamp(-ACTION_LIMIT, ACTION_LIMIT)).numpy()


def sample_batch(replay, step, args, generator, device) -> list:
    """What `update` learns from: a batch from the replay, its frames augmented, and the step (0-d)."""
    (frames, joints), action, reward, discount, (next_frames, next_joints) = replay.sample(args.batch_size, generator)
    frames = random_shift(frames.to(device), args.shift_pad)
    next_frames = random_shift(next_frames.to(device), args.shift_pad)
    rest = (x.to(device) for x in (joints, action, reward, discount))
    return [frames, *rest, next_frames, next_joints.to(device), step]


def evaluate(agent, envs, args, number: int, device, run) -> dict | None:
    """Plays eval_episodes whole episodes with the mean action, several at once -> metrics, or None if the run is to
    stop or a process died. `number` seeds the episodes; torch's random numbers are not used."""
    episodes = []  # [return, length, steps with success]
    while len(episodes) < args.eval_episodes:
        run.bar.set_description(f"evaluating {len(episodes) + 1} of {args.eval_episodes}")
        seeds = [derived_seed(args.seed, 1, number, len(episodes) + i) for i in range(envs.num_envs)]
        result = envs.reset(seeds)
        if result is None:
            return None
        frame, info = result
        totals = np.zeros((3, envs.num_envs))
        running = np.ones(envs.num_envs, bool)
        film = [frame[0].copy()]
        while running.any():
            obs = [torch.from_numpy(x).to(device) for x in (frame, info["joints"])]
            with torch.no_grad():
                action = agent.mean_action(obs).cpu().numpy()
            run.check_finite({"the actor's output": action.sum()}, number)
            if run.stopped:
                return None
            envs.step_async(action)
            result = envs.step_wait()
            if result is None:
                return None
            frame, reward, terminated, truncated, info = result
            film.append(frame[0].copy())
            totals += np.stack([reward, running, info["success"]]) * running
            running &= ~(terminated | truncated)
        episodes += totals.T.tolist()
    run.bar.set_description("training")
    if args.capture_video:
        run.film(number, [frame.transpose(1, 2, 0) for frame in film[: 1 + int(totals[1, 0])]])
    returns, lengths, successes = np.array(episodes[: args.eval_episodes]).T
    return {"eval/episodic_return": float(returns.mean()), "eval/episodic_length": float(lengths.mean()),
            "eval/success_rate": float((successes > 0).mean())}  # fmt: skip


# === The algorithm ====================================================================================================
def train(args: Args) -> Path:
    """Trains, logs to a new folder under runs/ or to args.resume, and returns that folder."""
    device, buffer_device, action_dim = check_args(args)
    seed_everything(args.seed, args.torch_deterministic)
    set_precision(args.precision, device)
    agent = HandAgent(action_dim, args).to(device, memory_format=torch.channels_last)
    optimizers = make_drm_optimizers(agent, args, device)
    frame_shape = (3, args.image_size, args.image_size)
    replay = JointReplay(replay_capacity(args), action_dim, buffer_device, args.n_step, args.gamma, frame_shape)
    batch_rng = random_stream(args.seed, 0)
    act_rng = random_stream(args.seed, 1)
    perturb_rng = random_stream(args.seed, 2)
    learn = partial(update, agent, optimizers, args)
    if args.cudagraphs:
        learn = capture(learn, optimizers)
    if args.compile:
        compile_modules(agent.encoder, agent.actor, agent.critic, agent.critic_target, agent.value)

    parts = dict(agent=agent, replay=replay, batch_rng=batch_rng, act_rng=act_rng, perturb_rng=perturb_rng)
    parts |= {f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)}
    run = Run(args, device, parts, global_step=0, gradient_steps=0, episode=0, next_eval=0)  # logs, saves
    global_step, gradient_steps, episode, next_eval = run.counters.values()  # not 0 in a resumed run
    next_eval = min(next_eval, global_step - global_step % args.eval_every + args.eval_every)  # --eval-every may be new
    learning_from = args.learning_starts + max(0, global_step - replay.num_steps)  # later, if resumed without replay
    first_update = gradient_steps
    step_type = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    envs = Environments(args, 1, run)
    eval_envs = Environments(args, min(args.eval_episodes, os.cpu_count()), run)

    while not run.stopped:
        # Between episodes: evaluate, then save, so that a resumed run does not evaluate again
        finished = global_step == args.total_timesteps
        if finished or global_step >= next_eval:
            results = evaluate(agent, eval_envs, args, global_step, device, run)
            if results is None:  # the run is to stop, or a process died
                continue
            run.log(global_step, results)
            next_eval = global_step - global_step % args.eval_every + args.eval_every
        if finished:
            awaken_step = float(agent.awaken_step) if agent.awaken_step.isfinite() else None
            counts = dict(global_step=global_step, gradient_steps=gradient_steps, awaken_step=awaken_step)
            run.finish(agent, results | counts)
            break
        if run.checkpoint_due(global_step):
            run.save(global_step=global_step, gradient_steps=gradient_steps, episode=episode, next_eval=next_eval)
        result = envs.reset([derived_seed(args.seed, 0, episode)])
        if result is None or run.stopped:
            continue

        frame, info = result
        replay.add_first(frame[0], info["joints"][0])
        start_step, start_update, start_time = global_step, gradient_steps, time.time()
        episode_return, done, sums = 0.0, False, {}
        while not (done or run.stopped or global_step == args.total_timesteps):
            # Act: the environment plays this step in its own process ...
            step = torch.full((), global_step, dtype=step_type, device=device)
            stddev = float(noise_std(agent, step, args))
            obs = [x.to(device) for x in replay.newest()]
            action = act(agent, obs, stddev, global_step < args.exploration_steps, act_rng)
            run.check_finite({"the actor's output": action.sum()}, global_step)
            if run.stopped:
                break
            envs.step_async(action)

            # Perturb, by the dormant ratio of the last gradient step
            events = {}
            if args.perturb_every and global_step % args.perturb_every == 0 and global_step >= args.learning_starts:
                events = {"events/perturb_factor": perturb_agent(agent, optimizers, args, perturb_rng)}

            # Learn: ... while the networks learn from the steps before it
            if global_step >= learning_from and len(replay):
                for _ in range(updates_due(global_step, args.replay_ratio)):
                    metrics = learn(sample_batch(replay, step, args, batch_rng, device))
                    sums = {tag: value + sums.get(tag, 0) for tag, value in metrics.items()}
                    gradient_steps += 1

            # Observe
            result = envs.step_wait()
            global_step += 1
            run.bar.update()
            run.log(global_step, events)
            if result is None:  # its process died: the episode ends here, and this step is not stored
                break
            frame, reward, terminated, truncated, info = result
            replay.add(action[0], reward[0], terminated[0], frame[0], info["joints"][0])
            episode_return += float(reward[0])
            done = terminated[0] or truncated[0]

        # After the episode: log
        if global_step == start_step:  # the run stops before its first step
            continue
        episode += 1
        steps, updates = global_step - start_step, gradient_steps - start_update
        metrics = {tag: float(total) / updates for tag, total in sums.items()}
        run.check_finite(metrics, start_step)
        metrics |= {
            "charts/replay_ratio": updates / steps, "charts/gradient_steps": gradient_steps,
            "charts/frames": global_step * ACTION_REPEAT, "charts/walltime": run.walltime(),
            "drm/awakened": agent.awaken_step.isfinite(),
        }  # fmt: skip
        if start_update > first_update:  # without the first episode that learns, which warms up and compiles
            metrics["charts/SPS"] = steps / (time.time() - start_time)
        if done:
            metrics |= {"charts/episodic_return": episode_return, "charts/episodic_length": steps}
            run.bar.set_postfix(episodic_return=f"{episode_return:g}", refresh=False)
        run.log(global_step, metrics)

    run.save(global_step=global_step, gradient_steps=gradient_steps, episode=episode, next_eval=next_eval)
    envs.close()
    eval_envs.close()
    run.close()
    return run.dir


# === Housekeeping of this script: what cannot work, processes =========================================================
def check_args(args: Args) -> tuple:
    """Refuses what cannot work, before anything is allocated or written -> the devices of the networks and of the
    replay, and the size of an action."""
    check_values(args)
    features = 32 * ((args.image_size - 3) // 2 - 5) ** 2
    needed = {  # rough bytes; a weight has a gradient and two moments
        "buffer_size": replay_capacity(args) * 3 * args.image_size**2,
        "batch_size": 5e8 + 500 * args.batch_size * args.image_size**2,
        "hidden_dim": 80 * args.hidden_dim**2,
        "feature_dim": 64 * args.feature_dim * (features + 4 * args.hidden_dim),
    }
    device, buffer_device = check_devices(args, needed)
    if args.buffer_size < args.n_step + 4:
        refuse("buffer_size", args.buffer_size, f"must be at least --n-step {args.n_step} + 4")
    if args.total_timesteps <= args.learning_starts:
        refuse("total_timesteps", args.total_timesteps, f"must be more than --learning-starts {args.learning_starts}")
    if args.min_perturb_factor > args.max_perturb_factor:
        limit = f"must be at most --max-perturb-factor {args.max_perturb_factor}"
        refuse("min_perturb_factor", args.min_perturb_factor, limit)
    check_idle(args)
    with suppress(ImportError):
        import_module("triton")  # torch does it later, and crashes if a software renderer has loaded its LLVM before
    steps = TASKS[args.env_id].episode // ACTION_REPEAT
    if args.n_step > steps:
        refuse("n_step", args.n_step, f"must be at most {steps}, an episode of --env-id {args.env_id}")
    if not find_spec("gymnasium_robotics"):
        refuse("env_id", args.env_id, "needs Gymnasium-Robotics: bash install.sh adroit")
    try:
        env = make_env(args.env_id, args.image_size)
        env.reset(seed=0)
        env.close()
    except Exception as error:
        refuse("env_id", args.env_id, f"cannot be played through its pixels ({type(error).__name__}: {error})")
    return device, buffer_device, math.prod(env.action_space.shape)


def check_idle(args: Args) -> None:
    """Refuses flags that do nothing beside another one."""
    fixed = args.min_perturb_factor == args.max_perturb_factor
    first = math.ceil(args.learning_starts / max(1, args.perturb_every)) * args.perturb_every
    never = first >= args.total_timesteps and args.resume is None
    perturbation = ["perturb_rate", "min_perturb_factor", "max_perturb_factor", "perturb_target", "perturb_scope"]
    table = [
        ("--perturb-every 0", args.perturb_every == 0, perturbation),
        (f"--total-timesteps up to {first}, the first perturbation", never, ["perturb_every", *perturbation]),
        ("--min-perturb-factor equal to --max-perturb-factor", fixed, ["perturb_rate"]),
        ("--perturb-scope actor", args.perturb_scope == "actor", ["perturb_target"]),
        ("--target-lambda 0", args.target_lambda == 0, ["lambda_type", "lambda_temperature", "expectile"]),
        ("--lambda-type constant", args.lambda_type == "constant", ["lambda_temperature"]),
        ("--stddev-type drqv2", args.stddev_type == "drqv2", ["dormant_temperature"]),
    ]
    for other, idle, names in table:
        for name in names:
            defaults = (getattr(Args, name), args.task_defaults().get(name))
            if idle and getattr(args, name) not in defaults:
                refuse(name, getattr(args, name), f"does nothing with {other}")


def replay_capacity(args) -> int:
    """Frames in the ring. An episode has one frame more than steps: 10% more is enough if it has 10 or more."""
    return min(args.buffer_size, args.total_timesteps + args.total_timesteps // 10 + 1000)


class Environments:
    """`num_envs` environments, each in a process of its own: step_async starts a step, step_wait ends it.

    If a process dies, reset or step_wait returns None, and the next reset starts new ones; the fourth time, the run
    stops. The processes descend from a server that has neither touched the GPU nor opened a renderer.
    """

    def __init__(self, args, num_envs: int, run):
        self.make = [partial(make_env, args.env_id, args.image_size)] * num_envs
        self.num_envs = num_envs
        self.run = run
        self.envs = None
        self.deaths = 0

    def call(self, method: str, *values, **options):
        try:
            if self.envs is None and method == "reset_async":
                from gymnasium.vector import AsyncVectorEnv

                self.envs = AsyncVectorEnv(self.make, context="forkserver")
            return self.envs and getattr(self.envs, method)(*values, **options)
        except Exception as error:
            self.close()
            self.deaths += 1
            self.run.say(f"an environment's process died ({type(error).__name__}: {str(error)[:200]})")
            if self.deaths > 3:
                self.run.stop("error: an environment's process died for the fourth time", exit_code=1)

    def reset(self, seeds: list) -> tuple | None:
        self.call("reset_async", seed=seeds)
        return self.call("reset_wait", timeout=600)  # seconds; a process that hangs is treated as dead

    def step_async(self, action: np.ndarray) -> None:
        self.call("step_async", action)

    def step_wait(self) -> tuple | None:
        return self.call("step_wait", timeout=600)

    def close(self) -> None:
        if self.envs is not None:
            for process in self.envs.processes:
                process.kill()
                process.join()
            self.envs.closed = True  # its own close() would wait for the dead
            self.envs = None

    def __del__(self):  # the program ends through an error
        self.close()


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
