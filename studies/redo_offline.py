# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
# ]
# ///
"""Learning without an emulator: Figs. 4 and 8 of The Dormant Neuron Phenomenon in Deep Reinforcement Learning (Sokar,
Agarwal, Castro, Evci; ICML 2023, arXiv 2302.12902), and two questions around them.

Score of neuron i of a layer with H neurons, on a batch D of states (Eq. 1):                          -> `dormant_score`
    s_i = E_D |h_i(x)| / ( 1/H sum_k E_D |h_k(x)| )      h: after the activation function; tau-dormant if s_i <= tau
DQN learns from the replay that a finished run of redo_dqn_atari.py has kept. One gradient step is on        -> `update`
    Huber( q(o, a), y )        y = r + gamma max_a' q_target(o', a')

Is it new data or new targets that silence neurons? Fig. 4 fixes the data, and then the targets, too (--targets):
    bootstrapped   y as above, which moves with the network. Dormant at tau 0 after 6.25M gradient steps in the paper,
                   on DemonAttack and Asterix: 34 and 54%
    random         y = q_random(o, a) of a network that never learns: 25 and 20%, after a dip    -> `random_targets`
    monte-carlo    y = r + gamma r' + ... to the end of the episode; not in the paper              -> `returns_to_go`
Fixed targets need no update of their own: they become the rewards of transitions that all terminate. -> `fix_targets`

Do dormant neurons make it harder to learn something new? In Fig. 8 an old network, which has been learning for a long
time, and a new one learn the q-values of a good agent, of all actions at once (--targets teacher):       -> `distill`
    Huber( q(o, .), q_teacher(o, .) )
    Paper, DemonAttack, 50,000 gradient steps: the new network's loss falls from 7 to 0.1; the old one's from 0.25 to
    0.16, then rises to 0.7. Dormant (tau is not said): from 18 to 48% in the new one, from 61 to 98% in the old one.
Which neurons are dormant depends on the states: the shares in `dormant_ratio_*` are over the whole replay's, those in
`dormant_by_states_*` also over its oldest tenth, its newest tenth, and noise.                      -> `measured_states`

    SCALE=small bash benchmark/redo_dqn_atari/offline_fig8.sh             all that Fig. 8 needs; offline_fig4.sh: Fig. 4
    python redo_dqn_atari.py --method dqn --replay-ratio 1 --checkpoint-replay always       data for Fig. 4, 7 GB; or an
                                                                                            old network
    python redo_dqn_atari.py --replay-ratio 1 --checkpoint-replay always                    a good agent: ReDo
    python studies/redo_offline.py --replay runs/<dqn> --targets random                     Fig. 4; likewise the others
    python studies/redo_offline.py --replay runs/<redo> --targets teacher                   Fig. 8, the new network
    python studies/redo_offline.py --replay runs/<redo> --targets teacher --student runs/<dqn>          and the old one

There is no public code for these figures. Batch size, Adam, learning rate and target network are those of Dopamine's
offline DQN. What neither says is our choice:
 1. Random targets are scaled to the mean and standard deviation of the Monte-Carlo returns: as large as real ones.
 2. Returns sum the stored, clipped rewards with the run's discount. They end where an episode is truncated, where the
    data end and, with --protocol cleanrl, where a life is lost. Bootstrapped targets take 1 step.
 3. The teacher is the network of the run whose replay is used (--teacher: of another); students see states of that
    replay, learn by the Huber loss, and begin with a new Adam (--keep-adam: with that of their run).
 4. A new network is built like that of the run whose replay is used, with weights of its own.
 5. The data are the last million frames at most of a run of our own; in Fig. 4, all of the DQN Replay Dataset.
Your own targets: `fix_targets`. A run that was killed goes on with --resume, on a CPU bit for bit.
"""

import copy
import ctypes
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

Count = Annotated[int, (1, 10**12)]  # lowest and highest value; check_values refuses any other
NonNegative = Annotated[float, (0, 1e12)]


@dataclass
class Args:
    """Offline learning from the replay of a run of redo_dqn_atari.py."""

    resume: str = ""  # folder of the run to continue; all else comes from its args.json
    exp_name: str = "redo_offline"  # name of this experiment, part of the run folder's name
    seed: Annotated[int, (0, 2**32 - 1)] = 1  # seeds new networks, batches, and the states of the measurements
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute; auto: the GPU, if there is one
    precision: Literal["float32", "tf32", "bfloat16"] = "tf32"  # of products; tf32 (GPUs), bfloat16 (updates): faster

    # What is learned, and by whom
    replay: str = ""  # folder of a finished run that was made with --checkpoint-replay always
    targets: Literal["bootstrapped", "random", "monte-carlo", "teacher"] = "bootstrapped"  # see the top of this file
    teacher: str = ""  # folder of the run whose network gives the teacher's targets; without it, that of --replay
    student: str = ""  # folder of the run whose network goes on learning; without it, a new network
    keep_adam: bool = False  # the student's Adam goes on, too; without it, a new one

    # Learning
    gradient_steps: Count = 50_000  # of the whole run (the paper's Fig. 4: 6,250,000)
    batch_size: Annotated[int, (1, 8192)] = 32  # transitions per gradient step
    learning_rate: NonNegative = 6.25e-5  # Adam's
    adam_eps: Annotated[float, (1e-12, 1)] = 1.5e-4  # Adam's epsilon
    loss: Literal["huber", "mse"] = "huber"  # of the difference between q and its target
    target_network_frequency_gradient_steps: Count = 2000  # gradient steps between copies to the target network

    # Logging
    measure_every_gradient_steps: Count = 500  # between measurements, which are saved, too (Fig. 4: 20,000)
    dormant_batch_size: Annotated[int, (1, 8192)] = 256  # states that the scores are taken over


SCRIPT = "redo_offline"
INITS = dict(xavier=nn.init.xavier_uniform_, torch=partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
TAUS = (0.0, 0.025, 0.1)  # thresholds of the logged shares of dormant neurons


# === Replay buffer ====================================================================================================
def derived_seed(*numbers: int) -> int:
    """A seed derived from numbers: the run's seed, what it is for (0 training, 1 evaluation, 2 a stream of random
    numbers), and which one of these. Below 2**32, because torch's CPU generators ignore all higher bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def random_stream(seed: int, number: int) -> torch.Generator:
    """A CPU generator of its own for each purpose, so that drawing for one does not change another."""
    return torch.Generator().manual_seed(derived_seed(seed, 2, number))


class FrameReplay:
    """A ring of single frames (capacity, height, width) uint8; stacks and n-step returns are built when sampling.

    Each frame has a record (4,): the action taken from it (-1: none, it is an episode's last frame or the newest one),
    the reward and the termination that followed, and its age: how many frames of its episode came before it. `start`
    lists the frames from which an action was taken, and sampling is uniform over them. Frames and starts are numbered
    from 0 in the order of their arrival; number i is in slot i % capacity.
    """

    def __init__(self, capacity, device, n_step=1, gamma=0.99, frame_shape=(84, 84), stack=4):
        self.capacity = capacity
        self.n_step = n_step
        self.gamma = gamma
        self.stack = stack
        self.frames = torch.empty((capacity + 1, *frame_shape), dtype=torch.uint8, device=device)
        self.frames[capacity] = 0  # what stands before an episode's first frame
        self.record = torch.empty((capacity, 4), device=device)
        self.start = torch.zeros(capacity, dtype=torch.int64)  # on the CPU, where indices are drawn
        self.num_frames = self.num_starts = self.oldest_start = self.age = 0

    def add_first(self, frame: np.ndarray) -> None:
        """An episode's first frame (height, width)."""
        self.age = 0
        self._append(frame)

    def add(self, action: int, reward: float, terminated: bool, frame: np.ndarray) -> None:
        """The action taken at the newest frame, and what followed: reward, termination, and the next frame."""
        newest = self.num_frames - 1
        self.record[newest % self.capacity] = torch.tensor([action, reward, terminated, self.age])
        self.start[self.num_starts % self.capacity] = newest
        self.num_starts += 1
        self.age += 1
        self._append(frame)

    def _append(self, frame: np.ndarray) -> None:
        slot = self.num_frames % self.capacity
        self.frames[slot] = torch.from_numpy(frame)
        self.record[slot] = torch.tensor([-1.0, 0.0, 0.0, self.age])
        self.num_frames += 1
        oldest = self.num_frames - self.capacity  # the oldest frame of a full ring; a start needs its whole stack
        while oldest > 0 and oldest + self.stack - 1 > self.start[self.oldest_start % self.capacity]:
            self.oldest_start += 1

    def __len__(self) -> int:
        """The number of transitions that can be sampled: their n steps have been taken, or their episode is over."""
        return self.num_starts - min(self.n_step - 1, self.age) - self.oldest_start

    def stacked(self, index: torch.Tensor) -> torch.Tensor:
        """Frame numbers (batch,) -> observations (batch, stack, height, width) uint8, zeros before an episode."""
        back = torch.arange(self.stack - 1, -1, -1, device=index.device)
        inside = back <= self.record[index % self.capacity, 3, None]
        slot = torch.where(inside, (index[:, None] - back) % self.capacity, self.capacity)
        # Copies whole frames; indexing by a tensor and masking afterwards take many times as long on a CPU
        return self.frames.index_select(0, slot.flatten()).view(*slot.shape, *self.frames.shape[1:])

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple:
        """A uniform batch, drawn with a CPU generator -> obs (batch, stack, height, width) uint8, action (batch,), the
        discounted reward of n steps (batch,), discount (batch,), and next_obs.

        discount is gamma^n; 0 where the episode terminated, gamma^k where it was truncated after k < n steps.
        """
        end = self.oldest_start + len(self)
        chosen = torch.randint(self.oldest_start, end, (batch_size,), generator=generator)
        first = index = self.start[chosen % self.capacity].to(self.frames.device)
        reward = torch.zeros(batch_size, device=index.device)
        discount = torch.ones(batch_size, device=index.device)
        for _ in range(self.n_step):
            action, step_reward, terminated, _ = self.record[index % self.capacity].unbind(1)
            inside = action >= 0
            reward = reward + discount * step_reward  # 0 in an episode's last frame
            discount = torch.where(inside, discount * self.gamma * (1 - terminated), discount)
            index = index + inside
        action = self.record[first % self.capacity, 0].long()
        return self.stacked(first), action, reward, discount, self.stacked(index)

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


# === Network ==========================================================================================================
def initial_weight(layer: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """A new weight for a layer, on the CPU. The layer's attribute `init` draws it, a function like those of nn.init; a
    layer without one gets PyTorch's default, uniform within 1 / sqrt(fan_in)."""
    draw = getattr(layer, "init", partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
    return draw(torch.empty(layer.weight.shape), generator=generator)


def same_padding(size: int, kernel: int, stride: int) -> tuple:
    """Zeros before and after one axis so that a convolution gives ceil(size / stride) outputs (TensorFlow's SAME)."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class QNetwork(nn.Module):
    """Base of the Q-networks: layers by name, and which one reads which (for recycling).

    forward(obs (batch, 4, 84, 84) uint8) -> q-values (batch, actions), {layer: activation after its non-linearity}.
    `reader[a] = b`: neurons of layer a are read by layer b alone; these are recycled. All activations are scored.
    """

    def __init__(self, args):
        super().__init__()
        self.width = args.width
        self.init = args.init
        self.activate = F.relu if args.activation == "relu" else F.leaky_relu  # slope 0.01
        self.layers = nn.ModuleDict()
        self.reader = {}

    def add(self, name: str, layer: nn.Module, init=None) -> None:
        layer.init = init or INITS[self.init]
        self.layers[name] = layer

    def neurons(self, count: int) -> int:
        return math.ceil(count * self.width)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        for layer in self.layers.values():
            layer.weight.copy_(initial_weight(layer, generator))
            layer.bias.zero_()
            if layer.init is INITS["torch"]:
                layer.bias.uniform_(-1, 1, generator=generator).div_(math.sqrt(layer.weight[0].numel()))

    def hidden(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """One layer and its activation."""
        return self.activate(self.layers[name](x))

    def q_values(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 has too few digits for values
            return self.layers["head"](features.float())

    def recyclable(self) -> list:
        """[(layer, [the layers that read it])], as `recycle` wants them."""
        return [(self.layers[name], [self.layers[reader]]) for name, reader in self.reader.items()]


class NatureCNN(QNetwork):
    """Mnih et al. 2015: convolutions 32 8x8/4, 64 4x4/2, 64 3x3/1, dense 512 (Table 2), times the width."""

    def __init__(self, num_actions, args):
        super().__init__(args)
        channels, size = 4, 84
        self.pads = {}
        for name, out, kernel, stride in (("conv1", 32, 8, 4), ("conv2", 64, 4, 2), ("conv3", 64, 3, 1)):
            before, after = same_padding(size, kernel, stride) if args.padding == "same" else (0, 0)
            self.pads[name] = (before, after) * 2 if before != after else None  # uneven: padded by hand
            padding = before if before == after else 0
            self.add(name, nn.Conv2d(channels, self.neurons(out), kernel, stride, padding))
            channels = self.neurons(out)
            size = (size + before + after - kernel) // stride + 1
        self.add("dense", nn.Linear(channels * size * size, self.neurons(512)))
        self.add("head", nn.Linear(self.neurons(512), num_actions))
        self.reader = {"conv1": "conv2", "conv2": "conv3", "conv3": "dense", "dense": "head"}

    def forward(self, obs):
        x = obs.float() / 255
        activations = {}
        for name, pad in self.pads.items():
            x = activations[name] = self.hidden(name, x if pad is None else F.pad(x, pad))
        activations["dense"] = self.hidden("dense", x.flatten(1))
        return self.q_values(activations["dense"]), activations


class NatureAgent(nn.Module):
    """The Q-network that learns, and its target: a copy of it that is renewed from time to time."""

    def __init__(self, num_actions, args):
        super().__init__()
        self.q_network = NatureCNN(num_actions, args)
        self.q_network.initialise(random_stream(args.seed, 3))
        self.target_network = copy.deepcopy(self.q_network).requires_grad_(False)

    @torch.no_grad()
    def update_target(self) -> None:
        torch._foreach_copy_(list(self.target_network.parameters()), list(self.q_network.parameters()))


# === Dormant neurons (Section 3) ======================================================================================
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


@torch.no_grad()
def dormant_ratios(network, x) -> dict:
    """The shares of tau-dormant neurons (Definition 3.1) on inputs x, by layer and over all of them -> metrics."""
    _, activations = network(x)
    scores = {name: dormant_score(h) for name, h in activations.items()}
    scores["all"] = torch.cat(list(scores.values()))
    metrics = {}
    for name, score in scores.items():
        for tau in TAUS:
            metrics[f"dormant_ratio_tau{tau:g}/{name}"] = dormant_share(score, tau)
    return metrics


# === Targets that stay (Fig. 4) =======================================================================================
def returns_to_go(replay: FrameReplay) -> torch.Tensor:
    """Monte-Carlo targets: for each slot of the ring the discounted sum of the rewards from there on, until the episode
    terminates or its frames end -> (capacity,)."""
    action, reward, terminated, _ = replay.record.cpu().double().numpy().T
    result, following = np.zeros(replay.capacity, np.float32), 0.0
    for number in range(replay.num_frames - 1, max(0, replay.num_frames - replay.capacity) - 1, -1):
        slot = number % replay.capacity
        following = 0.0 if action[slot] < 0 else reward[slot] + replay.gamma * (1 - terminated[slot]) * following
        result[slot] = following
    return torch.from_numpy(result).to(replay.record.device)


@torch.no_grad()
def random_targets(replay: FrameReplay, network, returns: torch.Tensor, device) -> torch.Tensor:
    """What a network that never learns says about each stored action, with the mean and the standard deviation of the
    returns (capacity,) of `returns_to_go` -> (capacity,), 0 where no transition starts."""
    number = torch.arange(replay.oldest_start, replay.oldest_start + len(replay))
    index = replay.start[number % replay.capacity].to(returns.device)
    slots, values = index % replay.capacity, []
    for some in index.split(512):
        q_values, _ = network(replay.stacked(some).to(device))
        action = replay.record[some % replay.capacity, :1].long().to(device)
        values.append(q_values.gather(1, action)[:, 0])
    value, result = torch.cat(values).to(returns.device), torch.zeros_like(returns)
    result[slots] = (value - value.mean()) / value.std() * returns[slots].std() + returns[slots].mean()
    return result


def fix_targets(replay: FrameReplay, targets: torch.Tensor) -> None:
    """From now on `update` regresses onto targets (capacity,): they become the rewards of transitions that all
    terminate, so that nothing is bootstrapped."""
    replay.record[:, 1] = targets
    replay.record[:, 2] = 1


# === Learning =========================================================================================================
def regress(q, target, optimizer, args) -> dict:
    """One gradient step that draws q towards the targets, of the same shape -> metrics, detached, on the device."""
    loss = F.smooth_l1_loss(q, target) if args.loss == "huber" else F.mse_loss(q, target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"losses/td": loss.detach(), "losses/q_values": q.detach().mean(), "losses/targets": target.mean()}


def autocast(args, device):
    """Each network runs in a region of its own: weights that are cast without a gradient would stay so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16")


def update(agent, optimizer, args, batch: tuple) -> dict:
    """DQN: one gradient step on a batch from `FrameReplay.sample` -> metrics."""
    obs, action, reward, discount, next_obs = batch
    with torch.no_grad(), autocast(args, obs.device):
        next_q, _ = agent.target_network(next_obs)
    with autocast(args, obs.device):
        q_values, _ = agent.q_network(obs)
    return regress(q_values.gather(1, action[:, None])[:, 0], reward + discount * next_q.max(1).values, optimizer, args)


def distill(q_network, teacher, optimizer, args, batch: tuple) -> dict:
    """One gradient step towards all of the teacher's q-values on a batch's states (Fig. 8) -> metrics."""
    obs = batch[0]
    with torch.no_grad(), autocast(args, obs.device):
        target, _ = teacher(obs)
    with autocast(args, obs.device):
        q_values, _ = q_network(obs)
    return regress(q_values, target, optimizer, args)


def measured_states(replay: FrameReplay, count: int, generator, device) -> dict:
    """{where from: states (count, 4, 84, 84) uint8}: the whole replay, its oldest and its newest tenth, and noise."""
    size, tenth = len(replay), max(1, len(replay) // 10)
    states = {}
    for name, begin, end in (("replay", 0, size), ("oldest", 0, tenth), ("newest", size - tenth, size)):
        number = replay.oldest_start + torch.randint(begin, end, (count,), generator=generator)
        states[name] = replay.stacked(replay.start[number % replay.capacity].to(replay.frames.device)).to(device)
    noise = torch.randint(256, states["replay"].shape, generator=generator, dtype=torch.uint8)
    return states | dict(noise=noise.to(device))


def measure(q_network, states: dict) -> dict:
    """The shares of dormant neurons, on states from `measured_states` -> metrics."""
    metrics = {}
    for name, x in states.items():
        ratios = dormant_ratios(q_network, x)
        if name == "replay":
            metrics |= ratios
        for tau in TAUS:
            metrics[f"dormant_by_states_tau{tau:g}/{name}"] = ratios[f"dormant_ratio_tau{tau:g}/all"]
    return metrics


def train(args: Args) -> Path:
    """Learns, logs to a new folder under runs/ or to args.resume, and returns that folder."""
    data, teacher_data, student_data, device = check_args(args)
    set_precision(args.precision, device)
    batch_rng = random_stream(args.seed, 0)
    measure_rng = random_stream(args.seed, 2)

    # The replay, and in it the targets that stay
    replay = stored_replay(data, device)
    states = measured_states(replay, args.dormant_batch_size, measure_rng, device)
    if args.targets in ("random", "monte-carlo"):
        targets = returns_to_go(replay)
        if args.targets == "random":
            targets = random_targets(replay, new_agent(data, args.seed, 5).q_network.to(device), targets, device)
        fix_targets(replay, targets)

    # The student, and its teacher
    agent = stored_agent(student_data) if args.student else new_agent(data, args.seed, 6)
    agent = agent.to(device, memory_format=torch.channels_last)
    options = dict(lr=args.learning_rate, eps=args.adam_eps, fused=device.type != "mps")
    optimizer = torch.optim.Adam(agent.q_network.parameters(), **options)
    if args.keep_adam:
        options = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(student_data["optimizer"] | dict(param_groups=options))
    learn = partial(update, agent, optimizer, args)
    if args.targets == "teacher":
        teacher = stored_agent(teacher_data).q_network.to(device, memory_format=torch.channels_last)
        learn = partial(distill, agent.q_network, teacher, optimizer, args)

    run_dir, writer, lock, last_measured, metrics = open_run(args, agent, optimizer, batch_rng)
    start_time, losses = time.time(), []
    for step in range(max(0, last_measured), args.gradient_steps + 1):
        # After `step` gradient steps
        if args.targets == "bootstrapped" and step % args.target_network_frequency_gradient_steps == 0:
            agent.update_target()
        finished = step == args.gradient_steps
        if (finished or step % args.measure_every_gradient_steps == 0) and step > last_measured:
            if losses:
                metrics["losses/td"] = torch.stack(losses).mean()  # of all batches since the last measurement
                metrics["charts/gradient_steps_per_second"] = len(losses) / (time.time() - start_time)
            metrics = {tag: float(value) for tag, value in (metrics | measure(agent.q_network, states)).items()}
            with disk(run_dir):
                log_metrics(writer, step, metrics)
                save(run_dir, step, metrics, agent, optimizer, batch_rng)
            start_time, losses = time.time(), []
        if finished:
            break

        metrics = learn(tuple(x.to(device) for x in replay.sample(args.batch_size, batch_rng)))
        losses.append(metrics["losses/td"])

    with disk(run_dir):
        writer.close()
        finish(run_dir, dict(gradient_steps=args.gradient_steps) | metrics)
    lock.close()
    return run_dir


# === Housekeeping: arguments, files ===================================================================================
def refuse(flag: str, value: object, limit: str) -> None:
    """Ends the program because of a user's mistake: one line on stderr, exit code 2."""
    line = f"{SCRIPT}.py: error: --{flag.replace('_', '-')} {value}: {limit}"
    print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(2)


def read_args(command_line: list) -> Args:
    """The command line -> arguments; those of a resumed run are its own."""
    import tyro

    args = tyro.cli(Args, args=command_line)
    if not args.resume:
        return args
    if replace(args, resume="") != Args():
        refuse("resume", args.resume, "takes no other flag: a resumed run keeps its own")
    try:
        description = json.loads((Path(args.resume) / "args.json").read_text())
        if description["script"] != SCRIPT:
            raise ValueError(f"it is one of {description['script']}.py")
        return replace(Args(**description["args"]), resume=args.resume)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse("resume", args.resume, f"is not the folder of a run that this script can continue ({error})")


def check_args(args: Args) -> tuple:
    """Refuses what cannot work, before anything is written -> what the runs of --replay, --teacher and --student have
    left, and the device."""
    check_values(args)
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = args.device if args.device != "auto" else "cuda" if here["cuda"] else "cpu"
    default = Args().target_network_frequency_gradient_steps
    for name, fine, limit in (
        ("device", here[device], "torch sees no such device here"),
        ("replay", args.replay, "is missing: the folder of a finished run of redo_dqn_atari.py"),
        ("teacher", args.targets == "teacher" or not args.teacher, "does nothing without --targets teacher"),
        ("keep_adam", args.student or not args.keep_adam, "does nothing without --student"),
        ("target_network_frequency_gradient_steps", args.targets == "bootstrapped"
         or args.target_network_frequency_gradient_steps == default, "does nothing without --targets bootstrapped"),
        ("exp_name", args.exp_name.isprintable() and not set(args.exp_name) & set("/*?["), "is no valid folder name"),
    ):  # fmt: skip
        if not fine:
            refuse(name, getattr(args, name), limit)
    data = read_run("replay", args.replay)
    if "replay" not in data or not data["replay"]["num_starts"]:
        refuse("replay", args.replay, "its checkpoint contains no replay: that run needs --checkpoint-replay always")
    teacher = read_run("teacher", args.teacher) if args.teacher else data
    student = read_run("student", args.student) if args.student else None
    for name, run in (("teacher", teacher), ("student", student)):
        if run and run["args"]["env_id"] != data["args"]["env_id"]:
            played = f"played {run['args']['env_id']}, but the replay is of {data['args']['env_id']}"
            refuse(name, getattr(args, name), played)
    return data, teacher, student, torch.device(device)


def read_run(flag: str, folder: str) -> dict:
    """What is in a finished run's checkpoint, with its arguments as "args"."""
    try:
        description = json.loads((Path(folder) / "args.json").read_text())
        if description["script"] != "redo_dqn_atari" or description["args"]["network"] != "nature":
            raise ValueError("it is one of another script or network")
        content = torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        content["args"] = description["args"]
        stored_agent(content)
        if not (Path(folder) / "summary.json").exists():
            raise ValueError("it is not finished")
        return content
    except Exception as error:
        line = f"is not a run of redo_dqn_atari.py that can be used ({type(error).__name__}: {str(error)[:200]})"
        refuse(flag, folder, line)


def stored_replay(run: dict, device) -> FrameReplay:
    """The replay of a run, with 1-step returns; on the GPU if that does the computing and it fits."""
    state = run["replay"]
    capacity = min(state["capacity"], state["num_frames"])
    on_gpu = device.type == "cuda" and capacity * 84 * 84 < 0.8 * torch.cuda.mem_get_info()[0]
    replay = FrameReplay(capacity, device if on_gpu else torch.device("cpu"))
    replay.load_state_dict(state)
    replay.n_step = 1
    return replay


def new_agent(run: dict, seed: int, number: int) -> NatureAgent:
    """A network like the run's, with new weights: others than those that a run with this seed begins with."""
    num_actions = len(run["agent"]["q_network.layers.head.bias"])
    agent = NatureAgent(num_actions, SimpleNamespace(**run["args"]))
    agent.q_network.initialise(random_stream(seed, number))
    agent.update_target()
    return agent


def stored_agent(run: dict) -> NatureAgent:
    agent = new_agent(run, 0, 0)
    agent.load_state_dict(run["agent"])
    return agent


def open_run(args: Args, agent, optimizer, batch_rng) -> tuple:
    """Creates the run's folder, with this script and args.json, or loads the checkpoint of the run to continue -> the
    folder, its TensorBoard writer, its lock, the gradient step of the checkpoint (-1 without one) and its metrics."""
    from torch.utils.tensorboard import SummaryWriter

    run_dir = Path(args.resume or f"runs/{SCRIPT}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}")
    flag = "resume" if args.resume else "exp_name"
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        lock = open(run_dir / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        refuse(flag, run_dir, "another process is working on this run")
    except OSError as error:
        refuse(flag, run_dir, f"cannot create the folder ({error.strerror})")
    last_measured, metrics = -1, {}
    if args.resume:
        try:
            content = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
            agent.load_state_dict(content["agent"])
            optimizer.load_state_dict(content["optimizer"])
            batch_rng.set_state(content["batch_rng"])
            last_measured, metrics = content["step"], content["metrics"]
        except Exception as error:
            refuse(flag, run_dir, f"has no checkpoint.pt that fits ({type(error).__name__}: {str(error)[:200]})")
    else:
        shutil.copy(__file__, run_dir)
        versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
        description = dict(script=SCRIPT, action_repeat=1, args=asdict(args), versions=versions)
        save_file(run_dir / "args.json", description)
    return run_dir, SummaryWriter(str(run_dir), purge_step=last_measured + 1), lock, last_measured, metrics


@contextmanager
def disk(run_dir: Path):
    """Around what writes the folder: a full disk ends the program with one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises the one as the other
        print(f"{SCRIPT}.py: error: cannot write {run_dir}: {str(error)[:200]}", file=sys.stderr)
        raise SystemExit(1) from None


def save(run_dir: Path, step: int, metrics: dict, agent, optimizer, batch_rng) -> None:
    content = dict(agent=agent.state_dict(), optimizer=optimizer.state_dict(), batch_rng=batch_rng.get_state())
    save_file(run_dir / "checkpoint.pt", content | dict(step=step, metrics=metrics))


def log_metrics(writer, step: int, metrics: dict) -> None:
    """Logs the metrics; ends the program when one is not a finite number."""
    for tag, value in metrics.items():
        writer.add_scalar(tag, value, step)
    writer.flush()
    for tag, value in metrics.items():
        if not math.isfinite(value):
            print(f"{SCRIPT}.py: error: {tag} is not finite at gradient step {step}", file=sys.stderr)
            raise SystemExit(1)


def finish(run_dir: Path, summary: dict) -> None:
    """Writes summary.json: with it the run counts as finished."""
    save_file(run_dir / "summary.json", summary)
    print(f"{run_dir}: {summary['dormant_ratio_tau0/all']:.1%} of the neurons are dormant (tau 0)")


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


def save_file(path: Path, content) -> None:
    """Writes a .json or .pt file whole or not at all: a temporary file replaces the old one when it is complete."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(content, temporary) if path.suffix == ".pt" else temporary.write_text(json.dumps(content, indent=2))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a run without a traceback; --resume goes on
    train(read_args(sys.argv[1:]))
