# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium==1.4.0",
#     "mujoco==3.17.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "moviepy==2.2.1",
# ]
# ///
"""SAC with ReDo: Figs. 14, 18, 19, 20 and Table 6 of The Dormant Neuron Phenomenon in Deep Reinforcement Learning
(Sokar, Agarwal, Castro, Evci; ICML 2023, arXiv 2302.12902), on Gymnasium's MuJoCo tasks.

Score of neuron i of a layer with H neurons, on a batch D of states (Eq. 1):                         -> `dormant_score`
    s_i = E_D |h_i(x)| / ( 1/H sum_k E_D |h_k(x)| )      h: after the activation function; tau-dormant if s_i <= tau
SAC (Haarnoja et al. 2018): critics q1 and q2, a policy pi = tanh(N(mean, std^2)), a temperature alpha       -> `update`
    critics  ( q_i(s, a) - r / 10 - gamma [ min_j q_target_j(s', a') - alpha log pi(a'|s') ] )^2     a' ~ pi( . |s')
    policy   alpha log pi(a|s) - min_i q_i(s, a)                                                      a ~ pi( . |s)
    alpha    log alpha ( -log pi(a|s) + action dimensions / 2 )          so the target entropy is minus half of them
In continuous control neurons fall dormant, too: after 1M steps on Ant about 10% of the policy's and 17% of the critics'
at tau 0 (Fig. 18). Recycling them changes little, resets cost return (--method):                     -> `intervene_sac`
    redo         recycle those of policy and critics every 200,000 gradient steps (Figs. 14, 20)            -> `recycle`
    reset        all networks anew, every 200,000 gradient steps                                       -> `reset_layers`
    prune        permanently silence every neuron that is ever dormant: no loss of return (Fig. 19)           -> `prune`
    sac          nothing; with --weight-decay 1e-5, the paper's weight-decay baseline (for SAC its value is not said)
Return after 1M steps, 10 seeds, of SAC, ReDo, weight decay and resets: Ant 5000, 4900, 4850, 4080; HalfCheetah 11500,
11200, 10300, 10550. In narrow networks (Table 6, Ant) the gain is within the spread: 2016 +- 102 -> 2115 +- 212 at
--width 0.25, 3964 +- 953 -> 4472 +- 648 at 0.5.
The primacy bias (Nikishin et al. 2022, on another task; also in Ma et al.'s slides): at a replay ratio of 9 SAC fails.
Does a new agent that starts with the failed one's replay (--replay-from) fail, too? If not, the network was to blame.

    SCALE=small bash benchmark/redo_dqn_atari/sac_fig14.sh       Figs. 14, 18 at small scale; others: README.md there
    python studies/redo_sac.py                   ReDo on Ant for 1M steps: hours on a CPU, not run yet
    python studies/redo_sac.py --method sac      SAC alone; --env-id HalfCheetah-v5, Hopper-v5, Walker2d-v5

Differences from the official code (google/dopamine, labs/redo/tfagents), and the reasons for them:
 1. Tasks are Gymnasium's -v5; Gymnasium no longer has -v2. Ant-v5 observes contact forces, too: returns and dormant
    neurons are not those of -v2.
 2. log std is clipped to [-20, 2] before it can overflow; officially it is not.
 3. Scores are computed on a fresh batch from the replay after the update; officially on the update's batch, before it.
 4. A reset zeroes Adam's moments of biases, too; officially those of weights alone. Neither resets the temperature.
 5. Weight decay is added to the gradients of weights, not of biases; officially it is part of the loss, the same for
    the critics, twice as large for the policy.
 6. The temperature learns from the actions of the policy's loss; officially from new ones, after the policy's step.
 7. The 10,000 random steps are part of the 1M; officially they come on top. Adam's epsilon is 1e-8; officially 1e-7.
 8. Scores are those of the hidden layers; officially the outputs count, too.
Kept: both Adam moments of recycled weights are zeroed while the step count goes on; their neurons' biases become 0.
The paper does not say how often it prunes; here, every 1000 gradient steps.
Your own intervention: `intervene_sac`. Your own environment: any with flat observations, bounded continuous actions and
a time limit. What is saved: `parts` and counters in `train`, between episodes; Ctrl-C cuts the episode.
"""

import copy
import ctypes
import fcntl
import json
import math
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
    """SAC, and what keeps its networks plastic."""

    exp_name: str = "redo_sac"  # name of this experiment, part of the run folder's name
    seed: Annotated[int, (0, 2**32 - 1)] = 1  # seeds python, numpy, torch and every episode
    env_id: str = "Ant-v5"  # a Gymnasium environment with flat observations, bounded actions and a time limit
    precision: Literal["float32", "tf32", "bfloat16"] = "tf32"  # of products; tf32 (GPUs), bfloat16 (updates): faster
    total_timesteps: Count = 1_000_000  # steps of the whole run

    # SAC
    replay_ratio: Annotated[int, (1, 1000)] = 1  # gradient steps per step
    learning_starts: Count = 10_000  # steps before the first gradient step, with random actions
    buffer_size: Count = 1_000_000  # transitions in the replay
    replay_from: str = ""  # folder of a run with --checkpoint-replay always, whose replay this one begins with
    batch_size: Count = 256  # transitions per gradient step
    gamma: Share = 0.99  # discount per step
    learning_rate: NonNegative = 3e-4  # Adam's, of policy, critics and temperature
    weight_decay: NonNegative = 0.0  # this times the weights is added to their gradients, before Adam
    tau: Share = 0.005  # Polyak coefficient of the target critics, per gradient step
    reward_scale: NonNegative = 0.1  # factor of the rewards that are learned from
    width: Annotated[float, (0.01, 64)] = 1.0  # multiplies the 256 units of each of the two hidden layers

    # Dormant neurons
    method: Literal["redo", "sac", "reset", "prune"] = "redo"  # recycle, nothing, reset all networks, or prune
    redo_tau: NonNegative = 0.0  # recycle or prune neurons with a score of at most this
    redo_period_gradient_steps: Count = 200_000  # gradient steps between recyclings or prunings (for prune: 1000)
    redo_batch_size: Count = 256  # states that recycling and pruning score the neurons on
    reset_period_gradient_steps: Count = 200_000  # gradient steps between resets of all networks

    # Evaluation and logging
    eval_episodes: Annotated[int, (1, 1000)] = 30  # episodes of an evaluation, without noise, side by side
    dormant_every: Count = 10_000  # steps between measurements of dormant neurons, at the next end of an episode
    dormant_batch_size: Count = 256  # states that the logged scores are taken over

    def task_defaults(self) -> dict:
        return dict(redo_period_gradient_steps=1000 if self.method == "prune" else 200_000)


SCRIPT, ACTION_REPEAT = "redo_sac", 1
TAUS = (0.0, 0.025, 0.1)  # thresholds of the logged shares of dormant neurons


# === Environment ======================================================================================================
def derived_seed(*numbers: int) -> int:
    """A seed derived from numbers: the run's seed, what it is for (0 training, 1 evaluation, 2 a stream of random
    numbers), and which one of these. Below 2**32, because torch's CPU generators ignore all higher bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def random_stream(seed: int, number: int) -> torch.Generator:
    """A CPU generator of its own for each purpose, so that drawing for one does not change another."""
    return torch.Generator().manual_seed(derived_seed(seed, 2, number))


def make_env(env_id: str, **options):
    """The environment, with actions from -1 to 1."""
    import gymnasium

    env = gymnasium.make(env_id, **options)
    flat = isinstance(env.observation_space, gymnasium.spaces.Box) and len(env.observation_space.shape) == 1
    bounded = isinstance(env.action_space, gymnasium.spaces.Box) and env.action_space.is_bounded()
    bounded = bounded and len(env.action_space.shape) == 1
    if not flat or not bounded or env.spec.max_episode_steps is None:
        raise ValueError("it needs flat observations, bounded continuous actions and a time limit")
    return gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


# === Replay buffer ====================================================================================================
class TransitionReplay:
    """A ring of transitions (capacity, 2 x obs + action + 2), a row each, so that a batch is one copy of rows."""

    def __init__(self, capacity, obs_dim, action_dim, device):
        self.capacity = capacity
        self.sizes = [obs_dim, action_dim, 1, 1, obs_dim]
        self.rows = torch.empty((capacity, sum(self.sizes)), device=device)
        self.num_added = 0

    def add(self, obs, action, reward: float, terminated: bool, next_obs) -> None:
        row = np.concatenate([obs, action, [reward, terminated], next_obs]).astype(np.float32)
        self.rows[self.num_added % self.capacity] = torch.from_numpy(row)
        self.num_added += 1

    def __len__(self) -> int:
        return min(self.num_added, self.capacity)

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple:
        """A uniform batch, drawn with a CPU generator -> obs (batch, obs), action (batch, action), reward (batch, 1),
        terminated (batch, 1) and next_obs."""
        index = torch.randint(len(self), (batch_size,), generator=generator)
        return self.rows.index_select(0, index.to(self.rows.device)).split(self.sizes, 1)

    def state_dict(self) -> dict:
        """The counters, and the filled part of the ring: via NumPy, because torch.save writes whole storages."""
        return dict(vars(self), rows=torch.from_numpy(self.rows[: self.num_added].cpu().numpy()))

    def load_state_dict(self, state: dict) -> None:
        if state["sizes"] != self.sizes:
            raise ValueError("its replay is one of another environment")
        if state["capacity"] != self.capacity and state["num_added"] > min(state["capacity"], self.capacity):
            raise ValueError("its replay has wrapped around a ring of another size")
        self.rows[: len(state["rows"])] = state["rows"]
        self.num_added = state["num_added"]


# === Networks =========================================================================================================
def initial_weight(layer: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """A new weight for a layer, on the CPU. The layer's attribute `init` draws it, a function like those of nn.init; a
    layer without one gets PyTorch's default, uniform within 1 / sqrt(fan_in)."""
    draw = getattr(layer, "init", partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
    return draw(torch.empty(layer.weight.shape), generator=generator)


class MLP(nn.Module):
    """Two hidden layers with ReLU, and a head; Glorot's uniform weights, biases 0.

    forward(x (batch, inputs)) -> outputs (batch, outputs), {layer: activation after its ReLU}.
    """

    def __init__(self, inputs, hidden, outputs, generator):
        super().__init__()
        self.hidden1 = nn.Linear(inputs, hidden)
        self.hidden2 = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, outputs)
        for layer in self.children():
            layer.init = nn.init.xavier_uniform_
            layer.weight.data.copy_(initial_weight(layer, generator))
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        first = F.relu(self.hidden1(x), inplace=True)
        second = F.relu(self.hidden2(first), inplace=True)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has too few digits for values
            return self.head(second.to(self.head.weight.dtype)), dict(hidden1=first, hidden2=second)

    def recyclable(self) -> list:
        """[(layer, [the layers that read it])], as `recycle` wants them."""
        return [(self.hidden1, [self.hidden2]), (self.hidden2, [self.head])]


class SACAgent(nn.Module):
    """Policy, two critics and their targets, and the logarithm of the temperature."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        generator, hidden = random_stream(args.seed, 3), max(1, round(256 * args.width))
        self.actor = MLP(obs_dim, hidden, 2 * action_dim, generator)
        self.critic1 = MLP(obs_dim + action_dim, hidden, 1, generator)
        self.critic2 = MLP(obs_dim + action_dim, hidden, 1, generator)
        self.target1 = copy.deepcopy(self.critic1).requires_grad_(False)
        self.target2 = copy.deepcopy(self.critic2).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def policy(self, obs) -> tuple:
        """Observations (batch, obs) -> mean and log std of the normal distribution before tanh, (batch, action)."""
        mean, log_std = self.actor(obs)[0].chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def critics(self, obs, action) -> tuple:
        """-> q1, q2 (batch, 1)."""
        x = torch.cat([obs, action], -1)
        return self.critic1(x)[0], self.critic2(x)[0]

    def min_target(self, obs, action) -> torch.Tensor:
        x = torch.cat([obs, action], -1)
        return torch.minimum(self.target1(x)[0], self.target2(x)[0])

    @torch.no_grad()
    def update_targets(self, tau: float) -> None:
        critics = [*self.critic1.parameters(), *self.critic2.parameters()]
        torch._foreach_lerp_([*self.target1.parameters(), *self.target2.parameters()], critics, tau)


def sample_action(mean, log_std) -> tuple:
    """a = tanh(u), u ~ N(mean, std^2), reparameterised -> action (batch, action_dim), log pi(a) (batch,)."""
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * float(np.log(2 * np.pi))
    # log(1 - tanh(u)^2) = log(4 e / (1 + e)^2) with e = exp(-2 |u|): exact where tanh(u) rounds to 1, gradient included
    log_slope = 2 * (float(np.log(2)) - u.abs() - torch.log1p(torch.exp(-2 * u.abs())))
    return torch.tanh(u), (log_normal - log_slope).sum(-1)


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


def hidden_activations(agent, states, actions) -> dict:
    """{network: {layer: activation}} of policy and critics on states and actions of the replay."""
    x = torch.cat([states, actions], -1)
    inputs = dict(actor=states, critic1=x, critic2=x)
    return {name: getattr(agent, name)(inputs[name])[1] for name in inputs}


@torch.no_grad()
def measure_networks(agent, states, actions) -> dict:
    """The shares of tau-dormant neurons by network, and of both critics together (Fig. 18) -> metrics."""
    activations = hidden_activations(agent, states, actions)
    scores = {name: torch.cat([dormant_score(h) for h in layers.values()]) for name, layers in activations.items()}
    scores["critics"] = torch.cat([scores["critic1"], scores["critic2"]])
    metrics = {}
    for name, score in scores.items():
        for tau in TAUS:
            metrics[f"dormant_ratio_tau{tau:g}/{name}"] = dormant_share(score, tau)
    return metrics


# === ReDo (Section 4), pruning, resets ================================================================================
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
def prune(layers, masks, optimizer=None) -> None:
    """Silences neurons for good (Fig. 6), in place: their incoming weights and biases become 0; ReLU then gives 0 and
    passes no gradient, so they stay 0, as the optimizer forgets its averages of them. layers: as for `recycle`; masks:
    (neurons,) bool, one per layer."""
    for (layer, _), mask in zip(layers, masks):
        for parameter in layer.parameters():
            rows = mask.view(-1, *[1] * (parameter.dim() - 1))
            parameter.masked_fill_(rows, 0)
            if optimizer is not None:
                forget(optimizer, parameter, rows)


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


@torch.no_grad()
def intervene_sac(agent, optimizers, replay, gradient_steps: int, args, generator, device) -> dict:
    """What --method does after this many gradient steps: usually nothing -> metrics (redo_q_change: of critic 1)."""
    actor_optimizer, critic_optimizer = optimizers
    if args.method == "reset" and gradient_steps % args.reset_period_gradient_steps == 0:
        networks = (agent.actor, agent.critic1, agent.critic2)
        reset_layers([layer for network in networks for layer in network.children()], optimizers, generator)
        agent.update_targets(1.0)
        return {"events/reset": 1}
    if args.method not in ("redo", "prune") or gradient_steps % args.redo_period_gradient_steps != 0:
        return {}
    states, actions, *_ = (x.to(device) for x in replay.sample(args.redo_batch_size, generator))
    q_before = agent.critics(states, actions)[0]
    activations, metrics = hidden_activations(agent, states, actions), {}
    for name, network, target, optimizer in (
        ("actor", agent.actor, None, actor_optimizer), ("critic1", agent.critic1, agent.target1, critic_optimizer),
        ("critic2", agent.critic2, agent.target2, critic_optimizer),
    ):  # fmt: skip
        hidden = list(activations[name].values())
        if args.method == "redo":
            masks = recycle(network.recyclable(), hidden, optimizer, args.redo_tau, generator)
            metrics[f"redo_recycled/{name}"] = torch.cat(masks).sum()
        else:
            scores = [dormant_score(h) for h in hidden]
            finite = torch.cat(scores).isfinite().all()
            masks = [(score <= args.redo_tau) & finite for score in scores]
            prune(network.recyclable(), masks, optimizer)
            if target is not None:
                prune(target.recyclable(), masks)
            metrics[f"pruned/{name}"] = torch.cat(masks).sum()
    return metrics | {"events/redo_q_change": (agent.critics(states, actions)[0] - q_before).abs().max()}


# === SAC ==============================================================================================================
def make_sac_optimizers(agent, args, device) -> list:
    """Adam for policy and temperature, and for the critics; weight decay is added to the gradients of weights."""
    options = dict(lr=args.learning_rate, fused=device.type != "mps", capturable=args.cudagraphs)
    critics, optimizers = [*agent.critic1.parameters(), *agent.critic2.parameters()], []
    for parameters in ([*agent.actor.parameters(), agent.log_alpha], critics):
        decayed = dict(params=[p for p in parameters if p.dim() > 1], weight_decay=args.weight_decay)
        optimizers.append(torch.optim.Adam([decayed, dict(params=[p for p in parameters if p.dim() <= 1])], **options))
    return optimizers


def update(agent, optimizers, args, batch: tuple) -> dict:
    """One gradient step of critics, policy and temperature on a batch from `TransitionReplay.sample` -> metrics,
    detached, on the device."""
    obs, action, reward, terminated, next_obs = batch
    actor_optimizer, critic_optimizer = optimizers
    bfloat16 = args.precision == "bfloat16"
    autocast = partial(torch.autocast, device_type=obs.device.type, dtype=torch.bfloat16, enabled=bfloat16)
    alpha = agent.log_alpha.detach().exp()

    with torch.no_grad(), autocast():  # a region of its own: weights cast here are cached without gradients
        next_action, next_log_prob = sample_action(*agent.policy(next_obs))
        next_value = agent.min_target(next_obs, next_action) - alpha * next_log_prob[:, None]
        target = args.reward_scale * reward + args.gamma * (1 - terminated) * next_value
    with autocast():
        q1, q2 = agent.critics(obs, action)
    critic_loss = 0.5 * (F.mse_loss(q1, target) + F.mse_loss(q2, target))
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()

    with autocast():
        new_action, log_prob = sample_action(*agent.policy(obs))
        new_q = torch.minimum(*agent.critics(obs, new_action))
    actor_loss = (alpha * log_prob[:, None] - new_q).mean()
    entropy = -log_prob.detach().mean()
    alpha_loss = agent.log_alpha * (entropy + action.shape[1] / 2)
    actor_optimizer.zero_grad()
    (actor_loss + alpha_loss).backward(inputs=[*agent.actor.parameters(), agent.log_alpha])
    actor_optimizer.step()
    agent.update_targets(args.tau)
    return {
        "losses/critic": critic_loss.detach(), "losses/actor": actor_loss.detach(), "losses/entropy": entropy,
        "losses/alpha": alpha, "losses/q_values": q1.detach().mean(), "losses/targets": target.mean(),
    }  # fmt: skip


def sample_batch(replay, args, generator, device) -> tuple:
    """What `update` learns from."""
    return tuple(x.to(device) for x in replay.sample(args.batch_size, generator))


@torch.no_grad()
def act(agent, obs: np.ndarray, generator, device) -> np.ndarray:
    """Actions (batch, action) for observations (batch, obs): with noise from a CPU generator, or the mean without."""
    mean, log_std = (x.cpu() for x in agent.policy(torch.from_numpy(obs).float().to(device)))
    noise = 0.0 if generator is None else torch.randn(mean.shape, generator=generator)
    return torch.tanh(mean + log_std.exp() * noise).numpy()


def evaluate(agent, envs: list, args, number: int, device, run) -> dict | None:
    """An episode in each of the environments, with mean actions -> metrics, or None if the run is to stop."""
    seeds = [derived_seed(args.seed, 1, number, i) for i in range(len(envs))]
    obs = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)])
    episode_return, episode_length = np.zeros(len(envs)), np.zeros(len(envs))
    running, film = np.ones(len(envs), bool), []
    run.bar.set_description("evaluating")
    while running.any():
        if run.stopped:
            return None
        action = act(agent, obs, None, device)
        if args.capture_video and running[0]:
            film.append(envs[0].render())
        for i in np.flatnonzero(running):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action[i])
            episode_return[i] += reward
            episode_length[i] += 1
            running[i] = not (terminated or truncated)
    run.bar.set_description("training")
    if args.capture_video:
        run.film(number, film)
    return {"eval/episodic_return": episode_return.mean(), "eval/episodic_length": episode_length.mean()}


def train(args: Args) -> Path:
    """Trains, logs to a new folder under runs/ or to args.resume, and returns that folder."""
    device, buffer_device, obs_dim, action_dim, given = check_args(args)
    seed_everything(args.seed, args.torch_deterministic)
    set_precision(args.precision, device)
    env = make_env(args.env_id)
    options = dict(render_mode="rgb_array") if args.capture_video else {}
    eval_envs = [make_env(args.env_id, **(options if i == 0 else {})) for i in range(args.eval_episodes)]
    agent = SACAgent(obs_dim, action_dim, args).to(device)
    optimizers = make_sac_optimizers(agent, args, device)
    replay = TransitionReplay(transition_capacity(args), obs_dim, action_dim, buffer_device)
    if given is not None:
        replay.load_state_dict(given)
    batch_rng, act_rng, edit_rng, measure_rng = (random_stream(args.seed, i) for i in (0, 4, 1, 2))  # 3: the weights
    learn = partial(update, agent, optimizers, args)
    interventions = partial(intervene_sac, agent, optimizers, replay, args=args, generator=edit_rng, device=device)
    if args.cudagraphs:
        learn = capture(learn, optimizers)
    if args.compile:
        compile_modules(agent.actor, agent.critic1, agent.critic2, agent.target1, agent.target2)

    parts = dict(agent=agent, replay=replay) | {f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)}
    parts |= dict(batch_rng=batch_rng, act_rng=act_rng, edit_rng=edit_rng, measure_rng=measure_rng)
    run = Run(args, device, parts, global_step=0, gradient_steps=0, episode=0, next_eval=args.eval_every)  # logs, saves
    global_step, gradient_steps, episode, next_eval = run.counters.values()  # not 0 in a resumed run
    next_eval = min(next_eval, global_step - global_step % args.eval_every + args.eval_every)  # --eval-every may be new
    learning_from = args.learning_starts + max(0, global_step - replay.num_added)  # later, if resumed without replay
    if args.replay_from and replay.num_added > global_step:  # the other run's replay is there
        learning_from = 0
    first_update = gradient_steps

    while not run.stopped:
        # Between episodes: evaluate, then save, so that a resumed run does not evaluate again
        finished = global_step == args.total_timesteps
        if finished or global_step >= next_eval:
            results = evaluate(agent, eval_envs, args, global_step, device, run)
            if results is None:  # the run is to stop
                break
            run.log(global_step, results)
            next_eval = global_step - global_step % args.eval_every + args.eval_every
        if finished:
            run.finish(agent, results | dict(global_step=global_step, gradient_steps=gradient_steps))
            break
        if run.checkpoint_due(global_step):
            run.save(global_step=global_step, gradient_steps=gradient_steps, episode=episode, next_eval=next_eval)

        obs, _ = env.reset(seed=derived_seed(args.seed, 0, episode))
        start_step, start_update, start_time = global_step, gradient_steps, time.time()
        episode_return, done, sums = 0.0, False, {}
        while not (done or run.stopped or global_step == args.total_timesteps):
            # Act
            if global_step < args.learning_starts and not args.replay_from:
                action = (2 * torch.rand(action_dim, generator=act_rng) - 1).numpy()
            else:
                action = act(agent, obs[None], act_rng, device)[0]
            next_obs, reward, terminated, truncated, _ = env.step(action)
            replay.add(obs, action, reward, terminated, next_obs)
            obs, done = next_obs, terminated or truncated
            global_step += 1
            episode_return += float(reward)
            run.bar.update()

            # Learn
            if global_step > learning_from:
                for _ in range(args.replay_ratio):
                    metrics = learn(sample_batch(replay, args, batch_rng, device))
                    sums = {tag: value + sums.get(tag, 0) for tag, value in metrics.items()}
                    gradient_steps += 1
                    run.log(global_step, interventions(gradient_steps))

        # After the episode
        if global_step == start_step:  # the run stops before its first step
            continue
        episode += 1
        steps, updates = global_step - start_step, gradient_steps - start_update
        metrics = {tag: float(total) / updates for tag, total in sums.items()}
        run.check_finite(metrics, start_step)
        metrics |= {"charts/gradient_steps": gradient_steps, "charts/walltime": run.walltime()}
        if start_update > first_update:  # without the first episode that learns, which warms up and compiles
            metrics["charts/SPS"] = steps / (time.time() - start_time)
        if done:
            metrics |= {"charts/episodic_return": episode_return, "charts/episodic_length": steps}
            run.bar.set_postfix(episodic_return=f"{episode_return:g}", refresh=False)
        if global_step // args.dormant_every > start_step // args.dormant_every:
            states, actions, *_ = (x.to(device) for x in replay.sample(args.dormant_batch_size, measure_rng))
            metrics |= measure_networks(agent, states, actions)
        run.log(global_step, metrics)

    run.save(global_step=global_step, gradient_steps=gradient_steps, episode=episode, next_eval=next_eval)
    run.close()
    return run.dir


# === Housekeeping of this script: what cannot work ====================================================================
def check_args(args: Args) -> tuple:
    """Refuses what cannot work, before anything is allocated or written -> the devices of networks and replay, the
    sizes of an observation and of an action, and the replay of --replay-from."""
    check_values(args)
    with suppress(ImportError):
        import_module("triton")  # torch does it later, and crashes if a software renderer has loaded its LLVM before
    try:
        env = make_env(args.env_id, **(dict(render_mode="rgb_array") if args.capture_video else {}))
        env.reset(seed=0)
        if args.capture_video:
            env.render()
        env.close()
    except Exception as error:
        refuse("env_id", args.env_id, f"cannot be played ({type(error).__name__}: {error})")
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    hidden = 256 * args.width
    needed = {  # rough bytes; a weight has a gradient and two moments, one of the critics a target, too
        "buffer_size": transition_capacity(args) * 4 * (2 * obs_dim + action_dim + 2),
        "width": 3e8 + 4 * 14 * hidden * (hidden + obs_dim + action_dim),
        **{name: 60 * hidden * getattr(args, name) for name in ("batch_size", "redo_batch_size", "dormant_batch_size")},
    }
    devices = check_devices(args, needed)
    default = Args(**Args(method=args.method).task_defaults())
    for name in ("redo_tau", "redo_batch_size"):  # the periods may be given to every method of a sweep
        if args.method not in ("redo", "prune") and getattr(args, name) != getattr(default, name):
            refuse(name, getattr(args, name), "does nothing without --method redo or prune")
    starts = 0 if args.replay_from else args.learning_starts
    if args.total_timesteps <= starts:
        refuse("total_timesteps", args.total_timesteps, f"must be more than --learning-starts {args.learning_starts}")
    if args.replay_from and args.checkpoint_replay == "never":
        refuse("checkpoint_replay", "never", "does not go with --replay-from: a resumed run could not go on with it")
    if args.replay_from and args.learning_starts != default.learning_starts:
        refuse("learning_starts", args.learning_starts, "does nothing with --replay-from")
    period = dict(reset="reset_period_gradient_steps", sac=None).get(args.method, "redo_period_gradient_steps")
    updates = (args.total_timesteps - starts) * args.replay_ratio
    if period and getattr(args, period) < args.replay_ratio:
        refuse(period, getattr(args, period), "is shorter than a burst of gradient steps")
    if period and getattr(args, period) > updates and args.resume is None:
        refuse(period, getattr(args, period), f"is longer than the run, which has {updates} gradient steps")
    given = None
    if args.replay_from and args.resume is None:
        try:
            path = Path(args.replay_from) / "checkpoint.pt"
            if not path.with_name("summary.json").exists():
                raise ValueError("it is not finished")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            given = content["replay"]
            if content["args"]["env_id"] != args.env_id or given["num_added"] == 0:
                raise ValueError(f"it is empty, or one of {content['args']['env_id']}")
            if given["num_added"] > min(args.buffer_size, given["capacity"]):
                raise ValueError(f"its {given['num_added']} transitions are more than a ring held, or ours will hold")
        except Exception as error:
            needs = "it must be a run with --checkpoint-replay always"
            refuse(
                "replay_from", args.replay_from, f"has no replay that fits ({type(error).__name__}: {error}); {needs}"
            )
    return *devices, obs_dim, action_dim, given


def transition_capacity(args) -> int:
    """Transitions in the ring."""
    return args.buffer_size if args.replay_from else min(args.buffer_size, args.total_timesteps)


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
