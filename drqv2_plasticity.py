# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "mujoco==3.17.0",
#     "gymnasium==1.4.0",
#     "shimmy==2.0.1",
#     "dm_control==1.0.50",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "moviepy==2.2.1",
# ]
# [tool.uv]  # labmaze, which dm_control asks for and which is not used here, has no wheel for Python 3.13
# override-dependencies = ["labmaze ; python_version < '3'"]
# ///
"""Revisiting Plasticity in Visual Reinforcement Learning: Data, Modules and Training Stages (Ma et al., ICLR 2024,
arXiv 2310.07418): data augmentation makes visual RL work because it preserves plasticity, above all the critic's, and
above all early in training. Each arm of the study is a flag: DrQ-v2 on pixels of the DeepMind Control Suite.

Plasticity is measured by the fraction of active units of a module with N units (Eq. 1):                       -> `fau`
    FAU = 1/N sum_n 1[a_n(x) > 0]      a: after each ReLU, feature maps included; averaged over a training batch
The agent is DrQ-v2 (Yarats et al. 2022). Data augmentation shifts o_t and o_{t+n} by up to 4 pixels; f: the encoder
    y   = sum_{i<n} gamma^i r_{t+i} + gamma^n min_k Q_target_k( f(o_{t+n}), a' )     a' ~ pi(f(o_{t+n})), noise clipped
    critic and encoder:  sum_k ( Q_k(f(o_t), a_t) - y )^2                                                 -> `update`
    actor:               - min_k Q_k( f(o_t), a )   a ~ pi(f(o_t)); f gets no gradient
What the study changes (Fig. 2's interventions and the plain agent run with --no-augmentation):
    augmentation on, off, switched (Figs. 1, 3, 6); replay ratio (Figs. 7, 8); heavy priming (Figs. 14, 15) -> `train`
    layer norm, spectral norm, CReLU; L2-Init, weight decay, from the beginning (Fig. 2)     -> `prepare` and `penalise`
    resets (Fig. 1), shrink and perturb (Fig. 2), plasticity injection (Fig. 5), ReDo (Table 1)           -> `intervene`

    python drqv2_plasticity.py --no-augmentation         Walker Run, 3M frames: for a GPU. Authors' figure: the critic's
                                                         FAU ends near .20, with augmentation near .42
    SCALE=small WORKERS=2 bash benchmark/drqv2_plasticity/pendulum.sh     24 small runs: over two hours on two cores

FAU counts active elements: it is not one minus the dormant ratio. At a plasticity injection the critic's FAU,
feature rank and weight norm jump though no output changes: from then on, only the head that learns is counted.
Differences from the official code (facebookresearch/drqv2, Guozheng-Ma/Adaptive-Replay-Ratio), and their reasons:
 1. One ring stores each frame once: 21 GB for 1M steps instead of 63.5 GB. Batches are drawn from all of it, including
    the current episode; officially, 4 loaders hold a part each, see it late, and draw short episodes as often as long.
 2. Termination stops the bootstrap; officially, a discount of 0 becomes 1 (no task in the paper terminates).
 3. The random shift copies whole pixels; the official bilinear interpolation differs by less than 0.004 (of 0 to 255).
 4. The actor's loss computes no gradients for the critic; officially, they are computed and thrown away.
 5. Metrics are summed on the device and read once per episode; officially, every update waits for the GPU.
 6. Evaluations play other episodes than training; officially, both begin with the same seed.
 7. An injected head gets new weights, as in its paper (Nikishin et al. 2023); in the authors' second repository,
    Guozheng-Ma/Plasticity-Injection_Torch, its own first ones.
The study's other changes are in no official code; a choice that the paper leaves open is marked at its flag: ours.
Your own environment: --env-id my_module:MyEnv-v0, or `make_env`. Your own intervention: `intervene`. What is saved:
`parts` and counters in `train`, between episodes; Ctrl-C cuts the episode, and a resumed run begins the next.
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
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

Count = Annotated[int, (1, 10**12)]  # lowest and highest value; check_values refuses any other
Share = Annotated[float, (0, 1)]
NonNegative = Annotated[float, (0, 1e12)]
Period = Annotated[int, (0, 10**12)]


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
    """DrQ-v2, and what the paper does to it. A step is an agent step, 2 frames; "ours": the paper leaves it open. Some
    tasks have defaults of their own: --env-id <task> --help."""

    exp_name: str = "drqv2_plasticity"  # name of this experiment, part of the run folder's name
    seed: Annotated[int, (0, 2**32 - 1)] = 1  # seeds python, numpy, torch and every episode
    env_id: str = "dm_control/walker-run-v0"  # dm_control/<domain>-<task>-v0, or any environment that renders frames
    image_size: Annotated[int, (15, 1000)] = 84  # height and width of the frames in pixels
    precision: Literal["float32", "tf32", "bfloat16"] = "tf32"  # of products; tf32 (GPUs), bfloat16 (updates): faster
    total_timesteps: Count = 1_500_500  # steps of the whole run: 3M frames and, as in the official code, 500 steps
    eval_every: Count = 5000  # steps between evaluations, at the next end of an episode; one more at the end
    eval_episodes: Count = 10  # episodes per evaluation, played with the mean action
    plasticity_every: Count = 5000  # steps between logs of dormant ratio, feature rank and weight norm
    plasticity_batch_size: Count = 256  # transitions, not augmented, that rank and dormant ratio are measured on

    # DrQ-v2
    learning_starts: Count = 2000  # steps before the first gradient step
    exploration_steps: Period = 2000  # steps with uniform random actions, at the beginning
    replay_ratio: Annotated[float, (1e-6, 1e6)] = 0.5  # gradient steps per step
    buffer_size: Count = 1_000_000  # images in the replay, 21 kB each: one per step, and one more per episode
    batch_size: Count = 256  # transitions per gradient step
    n_step: Count = 3  # rewards per target before it bootstraps
    gamma: Share = 0.99  # discount per step
    tau: Share = 0.01  # Polyak coefficient of the target critic, per gradient step
    learning_rate: NonNegative = 1e-4  # Adam's, for encoder, actor and critic
    feature_dim: Count = 50  # output units of the trunks, the linear layers between encoder and heads
    hidden_dim: Count = 1024  # units of each hidden layer of the heads
    stddev_start: NonNegative = 1.0  # standard deviation of the exploration noise at the beginning
    stddev_end: NonNegative = 0.1  # standard deviation of that noise after its linear decay
    stddev_steps: Count = 500_000  # length of the decay in steps
    stddev_clip: NonNegative = 0.3  # bound on the noise in the updates (not when acting)
    shift_pad: Annotated[int, (0, 1000)] = 4  # largest random shift in pixels

    # Data augmentation and heavy priming
    augmentation: bool = True  # random shifts of the training batches
    augmentation_switch_step: Annotated[int | None, (1, 10**12)] = None  # augmentation off (or on) from this step on
    priming_gradient_steps: Period = 0  # heavy priming: gradient steps at once when learning starts (paper: 100000)

    # Interventions: at their steps ...
    reset_every: Period = 0  # steps between resets of all heads (and trunks: ours), with Adam's state; 0: never
    shrink_perturb_every: Period = 0  # steps (ours) between critic := shrink * critic + perturb * new weights; 0: never
    shrink: Share = 0.2  # "multiplying the critic network weights by a small scalar" (paper; which one: ours)
    perturb: Share = 1.0  # "a perturbation equivalent to the weights of a randomly initialized network" (paper)
    redo_period_gradient_steps: Period = 0  # gradient steps between recyclings in the critic's heads (ours); 0: never
    redo_tau: NonNegative = 0.025  # recycle neurons with a score of at most this
    redo_batch_size: Count = 64  # transitions that the scores are taken over
    injection: Literal["none", "actor", "critic"] = "none"  # plasticity injection into this module's heads
    injection_step: Count = 500_000  # step of the plasticity injection (paper: frame 1M, which is step 500000)
    # ... and from the beginning
    weight_decay: NonNegative = 0.0  # times the weights, added to gradients before Adam (paper: 1e-5; all nets: ours)
    l2_init: NonNegative = 0.0  # times (weights - those of step 0)^2 of critic and encoder, in the loss (paper: 1e-2)
    layer_norm: bool = False  # before each ReLU of convolutions and heads (ours: over all channels and positions)
    spectral_norm: Literal["none", "trunk", "head"] = "none"  # of the first linear layer of trunks or heads
    crelu: bool = False  # [ReLU(x), ReLU(-x)] in the critic's heads: twice as many activations, the same units (ours)

    def task_defaults(self) -> dict:
        return TASKS.get(self.env_id.removeprefix("dm_control/").removesuffix("-v0"), {})


# Where the official code leaves the defaults (the paper's table has n 3, batch 256, buffer 1M, decay 500,000 for all)
EASY = dict(total_timesteps=500_500, stddev_steps=100_000)
HARD = dict(total_timesteps=15_050_000, stddev_steps=2_000_000, learning_rate=8e-5, feature_dim=100)
WALKER = dict(n_step=1, batch_size=512)
TASKS = {
    "cartpole-balance": EASY, "cartpole-balance_sparse": EASY, "cartpole-swingup": EASY, "ball_in_cup-catch": EASY,
    "finger-spin": EASY, "hopper-stand": EASY, "pendulum-swingup": EASY, "quadruped-run": dict(buffer_size=100_000),
    "walker-stand": EASY | WALKER, "walker-walk": EASY | WALKER, "walker-run": WALKER,
    "humanoid-stand": HARD, "humanoid-walk": HARD, "humanoid-run": HARD,
}  # fmt: skip
SCRIPT, ACTION_REPEAT = "drqv2_plasticity", 2
ACTION_LIMIT = 1 - 1e-6  # largest absolute value of an action
EPISODE_LIMIT = 1000  # steps of an episode in an environment that sets no limit
TAUS = (0.0, 0.025, 0.1)  # thresholds of the logged shares of dormant neurons


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
    """A Gymnasium environment with actions in [-1, 1], each played ACTION_REPEAT times. The observation is the frame
    after that, (3, image_size, image_size) uint8. Quadrupeds are seen by camera 2, all others by camera 0."""
    import gymnasium
    from gymnasium.wrappers import AddRenderObservation, RescaleAction, TimeLimit, TransformObservation

    class ActionRepeat(gymnasium.Wrapper):
        """Plays an action several times and sums the rewards. All else comes from the last of these frames."""

        def step(self, action):
            total = 0.0
            for _ in range(ACTION_REPEAT):
                obs, reward, terminated, truncated, info = self.env.step(action)
                total += float(reward)
                if terminated or truncated:
                    break
            return obs, total, terminated, truncated, info

    if multiprocessing.parent_process() is not None:
        os.setpgrp()  # the terminal's Ctrl-C is meant for the learner alone
    os.environ["SDL_NO_SIGNAL_HANDLERS"] = "1"  # or pygame would ignore Ctrl-C and SIGTERM, and the program never end
    size = dict(width=image_size, height=image_size)
    make = partial(gymnasium.make, env_id, render_mode="rgb_array", disable_env_checker=True)
    suite = "dm_control" if env_id.startswith("dm_control/") else "gymnasium"
    if suite == "dm_control":
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")
        import shimmy  # noqa: F401  registers the tasks, and opens the renderer

        env = make(render_kwargs=size | dict(camera_id=2 if "/quadruped" in env_id else 0))
    else:
        try:
            env = make(**size)
        except TypeError:  # it takes no size of its frames: to_pixels resizes them
            env = make()
    if env.spec.max_episode_steps is None:  # most of dm_control's tasks end earlier, after 1000 frames
        env = TimeLimit(env, EPISODE_LIMIT * ACTION_REPEAT)
    if suite == "dm_control" or hasattr(env.unwrapped, "mujoco_renderer"):
        if vars(sys.modules["mujoco"]).setdefault("first_suite", suite) != suite:
            raise RuntimeError("dm_control and another MuJoCo renderer in one process draw wrong pictures")
    env = AddRenderObservation(RescaleAction(ActionRepeat(env), -1, 1))
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


def init_layer(layer: nn.Module) -> None:
    """Orthogonal initial weights, times sqrt(2) in convolutions; biases 0. The layer remembers how: `layer.init`."""
    if isinstance(layer, nn.Linear | nn.Conv2d):
        layer.init = partial(nn.init.orthogonal_, gain=math.sqrt(2) if isinstance(layer, nn.Conv2d) else 1)
        layer.init(layer.weight)
        nn.init.zeros_(layer.bias)


class DrQv2Agent(nn.Module):
    """Encoder, actor, critic, and target critic. The target critic also reads the online encoder's features."""

    def __init__(self, action_dim, args):
        super().__init__()
        self.encoder = Encoder(image_size=args.image_size)
        sizes = (self.encoder.feature_size, action_dim, args.feature_dim, args.hidden_dim)
        self.actor = Actor(*sizes)
        self.critic = Critic(*sizes)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)

    def mean_action(self, obs):
        features, _ = self.encoder(obs)
        mean, _ = self.actor(features)
        return mean


# === What is measured =================================================================================================
def fau(activations: list) -> torch.Tensor:
    """Fraction of active units (Ma et al. 2024): the share of positive elements in a list of outputs of ReLUs (any
    shapes). All elements count alike, so it is not one minus the dormant ratio. NaN if one is not finite."""
    share = sum(torch.count_nonzero(a > 0) for a in activations) / sum(a.numel() for a in activations)
    finite = torch.stack([a.sum().float() for a in activations]).isfinite().all()
    return torch.where(finite, share, torch.nan)


def dormant_score(activation: torch.Tensor) -> torch.Tensor:
    """Sokar et al. 2023, Eq. 1: each neuron's mean |activation| over batch and positions, divided by the layer's mean.

    activation (batch, neurons) or (batch, channels, height, width), after the non-linearity -> (neurons,), of mean 1;
    all 0 when the whole layer is silent, all NaN when an activation is not finite. Flatten tokens into the batch.
    """
    mean = activation.abs().float().mean([0, *range(2, activation.dim())])
    average = mean.mean()
    return torch.where(average.isfinite(), mean / average.clamp_min(torch.finfo(torch.float32).tiny), math.nan)


def dormant_share(score: torch.Tensor, tau: float) -> torch.Tensor:
    """The share of neurons with a score of at most tau, 0-d; NaN when a score is."""
    return torch.where(score.isfinite().all(), (score <= tau).float().mean(), math.nan)


def feature_rank(features: torch.Tensor, delta: float = 0.01) -> torch.Tensor:
    """How many of the largest singular values of (batch, neurons) hold a share 1 - delta of the sum of all (Kumar et
    al. 2021; Sokar et al. 2023, Table 7): at most the batch size. NaN where a feature is not finite."""
    if not features.isfinite().all():
        return torch.tensor(math.nan)
    share = torch.linalg.svdvals(features.float()).cumsum(0)
    return (share < (1 - delta) * share[-1]).sum() + 1


@torch.no_grad()
def measure_modules(agent, obs, action) -> dict:
    """What is logged about encoder, actor and critic, beside the FAU, on a batch -> metrics.

    Dormant ratios (Sokar et al. 2023) count all hidden neurons of a module, a feature map as one. The feature rank is
    that of the last hidden layer, of the first Q head for the critic. The weight norm is over all weights that learn.
    """
    features, encoder_activations = agent.encoder(obs)
    _, actor_activations = agent.actor(features)
    _, _, critic_activations = agent.critic(features, action)
    metrics = {}
    for name, activations, last in (
        ("encoder", encoder_activations, features),
        ("actor", actor_activations, actor_activations[1]),
        ("critic", critic_activations, critic_activations[1]),
    ):
        score = torch.cat([dormant_score(activation) for activation in activations])
        for tau in TAUS:
            metrics[f"dormant_ratio_tau{tau:g}/{name}"] = dormant_share(score, tau)
        metrics[f"feature_rank/{name}"] = feature_rank(last)
        weights = [weight for weight in getattr(agent, name).parameters() if weight.requires_grad]
        metrics[f"weight_norm/{name}"] = torch.stack(torch._foreach_norm(weights)).norm()
    return metrics


# === Interventions ====================================================================================================
def initial_weight(layer: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """A new weight for a layer, on the CPU. The layer's attribute `init` draws it, a function like those of nn.init; a
    layer without one gets PyTorch's default, uniform within 1 / sqrt(fan_in)."""
    draw = getattr(layer, "init", partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
    return draw(torch.empty(layer.weight.shape), generator=generator)


@torch.no_grad()
def reset_layers(layers, optimizers: list, generator, step_counts: bool = False) -> None:
    """Resets layers (Nikishin et al. 2022), in place: linear layers and Conv2d get new weights and biases 0, LayerNorm
    and GroupNorm scales 1 and biases 0; other layers keep theirs. The optimizers forget their averages of all of these
    layers; with step_counts, they also count their steps from 0 again. layers: for example `module.modules()`."""
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.weight.copy_(initial_weight(layer, generator))
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.LayerNorm | nn.GroupNorm):
            layer.reset_parameters()
        for parameter in layer.parameters(recurse=False):
            for optimizer in optimizers:
                for value in optimizer.state.get(parameter, {}).values():
                    if value.dim() or step_counts:
                        value.zero_()


def forget(optimizer, parameter, mask) -> None:
    """Zeroes what an optimizer remembers of a parameter's elements, in place; mask (broadcastable to it) bool."""
    for value in optimizer.state.get(parameter, {}).values():
        if value.shape == parameter.shape:
            value.masked_fill_(mask, 0)


@torch.no_grad()
def recycle(layers, activations, optimizer, tau, generator) -> list:
    """ReDo (Sokar et al. 2023, Algorithm 1) for any network, in place -> per layer what was recycled, (neurons,) bool.

    layers: [(linear layer or convolution, [the layers that read it])]. activations: one for each of these, after its
    non-linearity, on the same batch, (batch, neurons) or (batch, channels, height, width). All incoming weights are
    drawn before outgoing ones become 0, so a weight between two recycled neurons ends as 0. The optimizer (Adam, SGD)
    forgets its averages of these weights; as in the official code, not those of the biases, which become 0.
    A reader's inputs must be exactly the layer's neurons (maps flattened channel by channel): no concatenation, groups
    or norm in between. generator: a CPU generator; for weights that are not PyTorch's default see `initial_weight`.
    """
    scores = [dormant_score(activation) for activation in activations]
    finite = torch.cat(scores).isfinite().all()  # else nothing is recycled
    masks = [(score <= tau) & finite for score in scores]
    for (layer, _), mask in zip(layers, masks):
        fresh = initial_weight(layer, generator).to(layer.weight)
        rows = mask.view(-1, *[1] * (fresh.dim() - 1))
        layer.weight.copy_(torch.where(rows, fresh, layer.weight))
        forget(optimizer, layer.weight, rows)
        if layer.bias is not None:
            layer.bias.masked_fill_(mask, 0)
    for (_, readers), mask in zip(layers, masks):
        for reader in readers:
            positions = reader.weight.shape[1] // len(mask)  # a dense layer reads height x width columns of a map
            columns = mask.repeat_interleave(positions).view(1, -1, *[1] * (reader.weight.dim() - 2))
            reader.weight.masked_fill_(columns, 0)
            forget(optimizer, reader.weight, columns)
    return masks


@torch.no_grad()
def shrink_and_perturb(module: nn.Module, shrink: float, perturb: float, generator) -> None:
    """Ash and Adams 2020, in place: weights := shrink * weights + perturb * freshly initialised ones, biases and norms,
    too, of the layers that `reset_layers` knows. What Adam remembers, and a target network, stay as they are (ours)."""
    fresh = copy.deepcopy(module)
    reset_layers(fresh.modules(), [], generator)
    for weight, new in zip(module.parameters(), fresh.parameters()):
        weight.mul_(shrink).add_(new, alpha=perturb)


class InjectableHead(nn.Module):
    """A head that plasticity can be injected into (Nikishin et al. 2023; Section 4): frozen(x) + head(x) - initial(x),
    of which only the head learns. Until then, the weights of the other two are 0, and so are their outputs. The
    activations are those of the head."""

    def __init__(self, head: Layers):
        super().__init__()
        self.head = head
        self.frozen = copy.deepcopy(head).requires_grad_(False)
        for weight in self.frozen.parameters():
            weight.zero_()
        self.initial = copy.deepcopy(self.frozen)

    def forward(self, x):
        output, activations = self.head(x)
        return self.frozen(x)[0] + (output - self.initial(x)[0]), activations


@torch.no_grad()
def inject(heads: list, optimizers: list, generator) -> None:
    """Plasticity injection, in place: each head's weights are frozen, and new ones, the same for all these heads (a
    head, and its target), learn. No output changes, nor does the number of weights that learn. Adam begins anew."""
    if any(weight.any() for head in heads for weight in head.frozen.parameters()):
        raise ValueError("plasticity has been injected into this head before")
    for head in heads:
        head.frozen.load_state_dict(head.head.state_dict())
    reset_layers(heads[0].head.modules(), optimizers, generator, step_counts=True)
    for head in heads:
        head.head.load_state_dict(heads[0].head.state_dict())
        head.initial.load_state_dict(heads[0].head.state_dict())


def l2_init(optimizer, coefficient: float) -> None:
    """L2-Init (Kumar et al. 2023): before each step, adds the gradient of coefficient * sum (w - w_0)^2; w_0: the first
    parameter group's weights at this call (a resumed run makes the same ones again, from its seed)."""
    weights = optimizer.param_groups[0]["params"]
    initial = [weight.detach().clone() for weight in weights]

    def add_gradient(*_):
        for weight, start in zip(weights, initial):
            weight.grad.add_(weight.detach() - start, alpha=2 * coefficient)

    optimizer.register_step_pre_hook(add_gradient)


def penalise(optimizers: list, args) -> None:
    """Weight decay for all networks; L2-Init for those that the critic's loss trains."""
    for optimizer in optimizers:
        optimizer.param_groups[0]["weight_decay"] = args.weight_decay
    if args.l2_init:
        l2_init(optimizers[0], args.l2_init)
        l2_init(optimizers[2], args.l2_init)


def layer_norm(layers: nn.Sequential) -> None:
    """A layer norm before each ReLU, in place. That of a convolution is over all channels and positions."""
    for i in reversed(range(len(layers))):
        if isinstance(layers[i], nn.ReLU):
            layers.insert(i, nn.GroupNorm(1, len(layers[i - 1].weight)))


class CReLULayers(Layers):
    """Linear layers and ReLUs, with [ReLU(x), ReLU(-x)] (Abbas et al. 2023) instead of each ReLU(x): the layers behind
    read twice as many inputs. The activations are ReLU(x) alone; of both, half is always active."""

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        for layer in layers:
            if isinstance(layer, nn.Linear) and len(self):
                layer = nn.Linear(2 * layer.in_features, layer.out_features)
                init_layer(layer)
            self.append(layer)

    def forward(self, x):
        activations = []
        for layer in self:
            if isinstance(layer, nn.ReLU):
                activations.append(layer(x))
                x = torch.cat([activations[-1], layer(-x)], 1)
            else:
                x = layer(x)
        return x, activations


def prepare(agent, args):
    """Builds in the interventions that hold from the beginning, then copies the critic to its target anew.

    The paper does not say which "initial linear layer" spectral norm is for. In the trunks a layer norm follows and
    cancels the weights' scale: only the effective learning rate changes.
    """
    actor, critic = agent.actor, agent.critic
    if args.crelu:
        critic.q1, critic.q2 = CReLULayers(critic.q1), CReLULayers(critic.q2)
    if args.layer_norm:
        for layers in (agent.encoder.convnet, actor.policy, critic.q1, critic.q2):
            layer_norm(layers)
    normalised = dict(none=[], trunk=[actor.trunk, critic.trunk], head=[actor.policy, critic.q1, critic.q2])
    for layers in normalised[args.spectral_norm]:
        nn.utils.parametrizations.spectral_norm(layers[0])
    if args.injection == "actor":
        actor.policy = InjectableHead(actor.policy)
    if args.injection == "critic":
        critic.q1, critic.q2 = InjectableHead(critic.q1), InjectableHead(critic.q2)
    agent.critic_target = copy.deepcopy(critic).requires_grad_(False)
    return agent


def intervene(agent, optimizers, replay, args, global_step, gradient_steps, updates, generator, device) -> dict:
    """Edits the networks at this step, after its `updates` gradient steps; mostly nothing -> events to log."""
    actor, critic, target = agent.actor, agent.critic, agent.critic_target
    events = {}
    if args.reset_every and global_step and global_step % args.reset_every == 0:
        for part in (actor.policy, actor.trunk, critic.q1, critic.q2, critic.trunk):
            reset_layers(part.modules(), optimizers, generator, step_counts=True)
        target.load_state_dict(critic.state_dict())
        events["events/reset"] = 1
    if args.shrink_perturb_every and global_step and global_step % args.shrink_perturb_every == 0:
        shrink_and_perturb(critic, args.shrink, args.perturb, generator)
        events["events/perturb_factor"] = args.shrink
    if args.injection != "none" and global_step == args.injection_step:
        groups = dict(actor=[[actor.policy]], critic=[[critic.q1, target.q1], [critic.q2, target.q2]])
        for heads in groups[args.injection]:
            inject(heads, optimizers, generator)
        events["events/injection"] = 1
    if args.redo_period_gradient_steps and gradient_steps % args.redo_period_gradient_steps < updates:
        obs, action, *_ = (x.to(device) for x in replay.sample(args.redo_batch_size, generator))
        with torch.no_grad():
            features, _ = agent.encoder(obs)
            _, _, activations = critic(features, action)
        layers = [(head[i], [head[i + 2]]) for head in (critic.q1, critic.q2) for i in (0, 2)]
        masks = recycle(layers, activations, optimizers[2], args.redo_tau, generator)
        events["redo_recycled/critic"] = sum(mask.sum() for mask in masks)
    return events


# === DrQ-v2 ===========================================================================================================
def make_optimizers(agent, args, device) -> list:
    """Adam for encoder, actor and critic."""
    options = dict(lr=args.learning_rate, fused=device.type != "mps", capturable=args.cudagraphs)
    return [torch.optim.Adam(m.parameters(), **options) for m in (agent.encoder, agent.actor, agent.critic)]


def truncated_normal(mean, std, clip: float) -> torch.Tensor:
    """mean plus noise with standard deviation std (0-d) that is clipped to +-clip. The sum is clamped to the action
    limits, but its gradient is that of mean."""
    action = mean + (torch.randn_like(mean) * std).clamp(-clip, clip)
    return action - action.detach() + action.detach().clamp(-ACTION_LIMIT, ACTION_LIMIT)


def update(agent, optimizers, args, batch: list) -> dict:
    """One gradient step of critic and encoder, one of the actor, a Polyak step of the target. batch: augmented obs,
    action, reward, discount, augmented next_obs, standard deviation of the noise -> detached metrics, on the device."""
    obs, action, reward, discount, next_obs, std = batch
    encoder_optimizer, actor_optimizer, critic_optimizer = optimizers
    agent.train(args.spectral_norm != "none")  # power iteration runs only here
    bfloat16 = args.precision == "bfloat16"
    autocast = partial(torch.autocast, device_type=obs.device.type, dtype=torch.bfloat16, enabled=bfloat16)
    with torch.no_grad(), autocast():  # a region of its own: weights cast here are cached without gradients
        next_features, _ = agent.encoder(next_obs)
        next_mean, _ = agent.actor(next_features)
        next_action = truncated_normal(next_mean, std, args.stddev_clip)
        target_q1, target_q2, _ = agent.critic_target(next_features, next_action)
        target = reward + discount * torch.minimum(target_q1, target_q2)
    with autocast():
        features, encoder_activations = agent.encoder(obs)
        q1, q2, critic_activations = agent.critic(features, action)
    critic_loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
    encoder_optimizer.zero_grad()
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()
    encoder_optimizer.step()

    # The actor learns from the updated critic; its loss changes neither critic nor encoder
    features = features.detach()
    with autocast():
        mean, actor_activations = agent.actor(features)
        actor_q1, actor_q2, _ = agent.critic(features, truncated_normal(mean, std, args.stddev_clip))
    actor_loss = -torch.minimum(actor_q1, actor_q2).mean()
    actor_optimizer.zero_grad()
    actor_loss.backward(inputs=[weight for weight in agent.actor.parameters() if weight.requires_grad])
    actor_optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.critic_target.parameters()), list(agent.critic.parameters()), args.tau)
    agent.eval()
    return {
        "losses/critic": critic_loss.detach(), "losses/actor": actor_loss.detach(), "losses/reward": reward.mean(),
        "losses/q_values": q1.detach().mean(), "losses/targets": target.mean(),
        "fau/encoder": fau(encoder_activations), "fau/actor": fau(actor_activations),
        "fau/critic": fau(critic_activations),
    }  # fmt: skip


def updates_due(step: int, replay_ratio: float) -> int:
    """Gradient steps to take at this step: replay_ratio on average, spread evenly."""
    return math.ceil((step + 1) * replay_ratio) - math.ceil(step * replay_ratio)


def stddev_at(step: int, args) -> float:
    """Standard deviation of the exploration noise: from stddev_start to stddev_end, linearly over stddev_steps."""
    progress = min(step / args.stddev_steps, 1.0)
    return args.stddev_start + progress * (args.stddev_end - args.stddev_start)


def act(agent, obs, stddev: float, uniform: bool, generator) -> np.ndarray:
    """A training action (1, action) for obs (1, channels, height, width): mean plus noise (clamped together, the noise
    alone is not), or uniform. Both are drawn every time, with a CPU generator."""
    with torch.no_grad():
        mean = agent.mean_action(obs).cpu()
    noisy = mean + stddev * torch.randn(mean.shape, generator=generator)
    random_action = torch.rand(mean.shape, generator=generator) * 2 - 1
    return (random_action if uniform else noisy.clamp(-ACTION_LIMIT, ACTION_LIMIT)).numpy()


def sample_batch(replay, stddev: float, augmentation: bool, args, generator, device) -> list:
    """What `update` learns from: a batch from the replay, augmented or not, and the standard deviation of the noise."""
    obs, action, reward, discount, next_obs = (x.to(device) for x in replay.sample(args.batch_size, generator))
    if augmentation:
        obs = random_shift(obs, args.shift_pad)
        next_obs = random_shift(next_obs, args.shift_pad)
    return [obs, action, reward, discount, next_obs, torch.full((), stddev, device=device)]


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
        obs = torch.from_numpy(frame).to(device).repeat(1, 3, 1, 1)
        totals = np.zeros((3, envs.num_envs))
        running = np.ones(envs.num_envs, bool)
        film = [frame[0].copy()]
        while running.any():
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
            obs = torch.cat([obs[:, 3:], torch.from_numpy(frame).to(device)], 1)
            film.append(frame[0].copy())
            success = np.broadcast_to(info.get("success", 0), running.shape)
            totals += np.stack([reward, running, success]) * running
            running &= ~(terminated | truncated)
        episodes += totals.T.tolist()
    run.bar.set_description("training")
    if args.capture_video:
        run.film(number, [frame.transpose(1, 2, 0) for frame in film[: 1 + int(totals[1, 0])]])
    returns, lengths, successes = np.array(episodes[: args.eval_episodes]).T
    metrics = {"eval/episodic_return": float(returns.mean()), "eval/episodic_length": float(lengths.mean())}
    if "success" in info:
        metrics["eval/success_rate"] = float((successes > 0).mean())
    return metrics


# === The algorithm ====================================================================================================
def train(args: Args) -> Path:
    """Trains, logs to a new folder under runs/ or to args.resume, and returns that folder."""
    device, buffer_device, action_dim = check_args(args)
    seed_everything(args.seed, args.torch_deterministic)
    set_precision(args.precision, device)
    agent = prepare(DrQv2Agent(action_dim, args), args)
    agent.to(device, memory_format=torch.channels_last).eval()
    optimizers = make_optimizers(agent, args, device)
    penalise(optimizers, args)
    frame_shape = (3, args.image_size, args.image_size)
    replay = PixelReplay(replay_capacity(args), action_dim, buffer_device, args.n_step, args.gamma, frame_shape)
    batch_rng, act_rng, edit_rng, measure_rng = (random_stream(args.seed, i) for i in range(4))
    learn = partial(update, agent, optimizers, args)
    if args.cudagraphs:
        learn = capture(learn, optimizers)
    if args.compile:
        compile_modules(agent.encoder, agent.actor, agent.critic, agent.critic_target)

    parts = dict(agent=agent, replay=replay) | {f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)}
    parts |= dict(batch_rng=batch_rng, act_rng=act_rng, edit_rng=edit_rng, measure_rng=measure_rng)
    run = Run(args, device, parts, global_step=0, gradient_steps=0, episode=0, next_eval=0)  # logs, saves
    global_step, gradient_steps, episode, next_eval = run.counters.values()  # not 0 in a resumed run
    next_eval = min(next_eval, global_step - global_step % args.eval_every + args.eval_every)  # --eval-every may be new
    learning_from = args.learning_starts + max(0, global_step - replay.num_steps)  # later, if resumed without replay
    first_update = gradient_steps
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
            run.finish(agent, results | dict(global_step=global_step, gradient_steps=gradient_steps))
            break
        if run.checkpoint_due(global_step):
            run.save(global_step=global_step, gradient_steps=gradient_steps, episode=episode, next_eval=next_eval)
        result = envs.reset([derived_seed(args.seed, 0, episode)])
        if result is None or run.stopped:
            continue

        frame, _ = result
        replay.add_first(frame[0])
        start_step, start_update, start_time = global_step, gradient_steps, time.time()
        episode_return, done, sums = 0.0, False, {}
        while not (done or run.stopped or global_step == args.total_timesteps):
            # Act: the environment plays this step in its own process ...
            stddev = stddev_at(global_step, args)
            action = act(agent, replay.newest().to(device), stddev, global_step < args.exploration_steps, act_rng)
            run.check_finite({"the actor's output": action.sum()}, global_step)
            if run.stopped:
                break
            envs.step_async(action)

            # Learn: ... while the networks learn from the steps before it
            primed = gradient_steps >= args.priming_gradient_steps  # a signal can cut the priming; then it goes on here
            switched = primed and global_step >= (args.augmentation_switch_step or math.inf)
            augmentation = args.augmentation != switched
            due = updates = 0
            if global_step >= learning_from and len(replay):
                due = updates_due(global_step, args.replay_ratio)
                due += max(0, args.priming_gradient_steps - gradient_steps)  # heavy priming: all of them now
            while updates < due and not run.stopped:
                metrics = learn(sample_batch(replay, stddev, augmentation, args, batch_rng, device))
                sums = {tag: value + sums.get(tag, 0) for tag, value in metrics.items()}
                gradient_steps += 1
                updates += 1

            # Intervene
            events = intervene(agent, optimizers, replay, args, global_step, gradient_steps, updates, edit_rng, device)

            # Observe
            result = envs.step_wait()
            global_step += 1
            run.bar.update()
            run.log(global_step, events)
            if result is None:  # its process died: the episode ends here, and this step is not stored
                break
            frame, reward, terminated, truncated, _ = result
            replay.add(action[0], reward[0], terminated[0], frame[0])
            episode_return += float(reward[0])
            done = terminated[0] or truncated[0]

        # After the episode
        if global_step == start_step:  # the run stops before its first step
            continue
        episode += 1
        steps, updates = global_step - start_step, gradient_steps - start_update
        metrics = {tag: float(total) / updates for tag, total in sums.items()}
        run.check_finite(metrics, start_step)
        metrics |= {
            "charts/stddev": stddev_at(global_step, args), "charts/replay_ratio": updates / steps,
            "charts/gradient_steps": gradient_steps, "charts/frames": global_step * ACTION_REPEAT,
            "charts/walltime": run.walltime(), "charts/augmentation": augmentation,
        }  # fmt: skip
        if start_update > first_update:  # without the first episode that learns, which warms up and compiles
            metrics["charts/SPS"] = steps / (time.time() - start_time)
        if done:
            metrics |= {"charts/episodic_return": episode_return, "charts/episodic_length": steps}
            run.bar.set_postfix(episodic_return=f"{episode_return:g}", refresh=False)
        if updates and global_step // args.plasticity_every > start_step // args.plasticity_every:
            obs, action, *_ = (x.to(device) for x in replay.sample(args.plasticity_batch_size, measure_rng))
            metrics |= measure_modules(agent, obs, action)
        run.log(global_step, metrics)

    run.save(global_step=global_step, gradient_steps=gradient_steps, episode=episode, next_eval=next_eval)
    envs.close()
    eval_envs.close()
    run.close()
    return run.dir


# === Housekeeping of this script: what cannot work, processes =========================================================
# An intervention that edits weights, and those that it does not go with
CONFLICTS = dict(
    reset_every=("injection", "spectral_norm", "l2_init"),
    shrink_perturb_every=("injection", "spectral_norm"),
    redo_period_gradient_steps=("injection", "spectral_norm", "layer_norm", "crelu", "priming_gradient_steps"),
    l2_init=("injection",),
    injection=("spectral_norm",),
)
# Flags that do nothing without another one
NEEDS = dict(
    shrink="shrink_perturb_every", perturb="shrink_perturb_every", redo_tau="redo_period_gradient_steps",
    redo_batch_size="redo_period_gradient_steps", injection_step="injection",
)  # fmt: skip


def check_args(args: Args) -> tuple:
    """Refuses what cannot work, before anything is allocated or written -> the devices of the networks and of the
    replay, and the size of an action."""
    check_values(args)
    features = 32 * ((args.image_size - 3) // 2 - 5) ** 2
    needed = {  # rough bytes; a weight has a gradient and two moments
        "buffer_size": replay_capacity(args) * 3 * args.image_size**2,
        "batch_size": 5e8 + 500 * max(args.batch_size, args.plasticity_batch_size) * args.image_size**2,
        "hidden_dim": 80 * args.hidden_dim**2,
        "feature_dim": 64 * args.feature_dim * (features + args.hidden_dim),
    }
    device, buffer_device = check_devices(args, needed)
    if args.buffer_size < args.n_step + 4:
        refuse("buffer_size", args.buffer_size, f"must be at least --n-step {args.n_step} + 4")
    if args.total_timesteps <= args.learning_starts:
        refuse("total_timesteps", args.total_timesteps, f"must be more than --learning-starts {args.learning_starts}")
    for name in ("reset_every", "shrink_perturb_every", "injection_step", "augmentation_switch_step"):
        used = name != "injection_step" or args.injection != "none"
        if used and (getattr(args, name) or 0) >= args.total_timesteps and args.resume is None:
            refuse(name, getattr(args, name), f"must be less than --total-timesteps {args.total_timesteps}")
    if (args.augmentation_switch_step or math.inf) <= args.learning_starts:
        limit = f"must be more than --learning-starts {args.learning_starts}"
        refuse("augmentation_switch_step", args.augmentation_switch_step, limit)
    if not args.augmentation and args.augmentation_switch_step is None and args.shift_pad != Args.shift_pad:
        refuse("shift_pad", args.shift_pad, "does nothing with --no-augmentation")
    period, updates = args.redo_period_gradient_steps, (args.total_timesteps - args.learning_starts) * args.replay_ratio
    if period and not args.replay_ratio <= period <= updates and args.resume is None:
        limit = f"must lie between the gradient steps of a step, {args.replay_ratio:g}, and of the run, {updates:g}"
        refuse("redo_period_gradient_steps", period, limit)
    if args.layer_norm and args.hidden_dim == 1:
        refuse("hidden_dim", args.hidden_dim, "must be at least 2 with --layer-norm")
    for name, others in CONFLICTS.items():
        for other in others:
            if getattr(args, name) != getattr(Args, name) and getattr(args, other) != getattr(Args, other):
                refuse(name, getattr(args, name), f"does not go with --{other.replace('_', '-')}")
    for name, other in NEEDS.items():
        if getattr(args, name) != getattr(Args, name) and getattr(args, other) == getattr(Args, other):
            refuse(name, getattr(args, name), f"does nothing without --{other.replace('_', '-')}")
    return device, buffer_device, check_env(args)


def check_env(args: Args) -> int:
    """Refuses an environment that cannot be played, or that ends before --n-step -> the size of an action."""
    import gymnasium

    with suppress(ImportError):
        import_module("triton")  # torch does it later, and crashes if a software renderer has loaded its LLVM before
    try:
        env = make_env(args.env_id, args.image_size)
        env.reset(seed=0)
        env.close()
        if len(env.action_space.shape) != 1:
            raise ValueError(f"its actions are no vectors, but of shape {env.action_space.shape}")
    except Exception as error:
        refuse("env_id", args.env_id, f"cannot be played through its pixels ({type(error).__name__}: {error})")
    ends = args.env_id.startswith("dm_control/") and "/lqr" not in args.env_id  # dm_control itself ends all but LQR
    frames = 1000 if ends else gymnasium.spec(env.unwrapped.spec.id).max_episode_steps  # as registered
    if frames is None:
        print(f"{args.env_id} has no time limit: its episodes end after {EPISODE_LIMIT} steps at the latest")
    steps = EPISODE_LIMIT if frames is None else math.ceil(frames / ACTION_REPEAT)
    if args.n_step > steps:
        refuse("n_step", args.n_step, f"must be at most {steps}, the steps of an episode of --env-id {args.env_id}")
    return env.action_space.shape[0]


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
