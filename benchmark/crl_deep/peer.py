"""Times one gradient step of crl_deep.py beside the official one, and compares their losses and their memory.

    git clone https://github.com/wang-kevin3290/scaling-crl
    python -m venv jaxenv && jaxenv/bin/pip install jax flax optax        (on a GPU "jax[cuda12]")
    python benchmark/crl_deep/peer.py scaling-crl/train.py --jax jaxenv/bin/python --out runs/figures/crl_peer

The official networks and update functions are cut out of train.py as text, so that neither Brax nor wandb is needed. A
step is actor, temperature and critic at the paper's width 256 and batch 512, on the ant's dimensions; all start from
the same weights and get the same batch and the same noise, and the losses compared are those of the last step of the
first turn. Every variant runs in a process of its own, and they take
turns. The official step is jitted and steps in a lax.scan, as there; the products are exact on both sides (official
default on a GPU: TensorFloat-32).
"""

import argparse
import ast
import csv
import json
import os
import resource
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np

STATE, GOAL, ACTION, WIDTH, REPR = 29, 2, 8, 256, 64
CUT = "residual_block SA_encoder G_encoder Actor TrainingState Transition update_actor_and_alpha update_critic sgd_step"


def make_weights(depth: int) -> dict:
    """Network -> [(kernel (inputs, outputs), bias)] of its Dense layers: stem, blocks, heads; always the same.

    The actor's heads are small: where tanh saturates, log pi is another number there (1e-6 is added) than here (exact).
    """
    rng, weights = np.random.default_rng(0), {}
    for name, inputs, heads in (("actor", STATE + GOAL, [ACTION, ACTION]), ("sa", STATE + ACTION, [REPR]),
                                ("g", GOAL, [REPR])):  # fmt: skip
        sizes = [(inputs, WIDTH), *[(WIDTH, WIDTH)] * depth, *[(WIDTH, head) for head in heads]]
        weights[name] = []
        for n, m in sizes:
            kernel, bias = rng.uniform(-1, 1, (n, m)) * n**-0.5, 0.01 * rng.normal(size=m)
            if m == ACTION:
                kernel *= 0.01
            weights[name].append((kernel.astype(np.float32), bias.astype(np.float32)))
    return weights


def make_batch(size: int) -> tuple:
    """state, action, goal, and the noise of the policy; NumPy, always the same."""
    rng = np.random.default_rng(1)
    state, goal, noise = (rng.normal(size=(size, n)) for n in (STATE, GOAL, ACTION))
    return tuple(x.astype(np.float32) for x in (state, rng.uniform(-1, 1, (size, ACTION)), goal, noise))


# --- the official side ------------------------------------------------------------------------------------------------
def cut(path: str, names: list) -> dict:
    """The named classes and functions of a file, wherever they stand, as text without what decorates them."""
    text = Path(path).read_text()
    found = {}
    for node in ast.walk(ast.parse(text)):
        if getattr(node, "name", "") in names:
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            found[node.name] = textwrap.dedent("\n".join(lines))
    missing = [name for name in names if name not in found]
    if missing:
        print(f"error: {path} is not the official train.py: it has no {', '.join(missing)}", file=sys.stderr)
        raise SystemExit(2)
    return found


def official_step(path: str, depth: int, options):
    """A function without arguments that takes options.steps gradient steps -> losses of the last one."""
    try:  # imported here, because our processes need none of it
        import flax
        import flax.linen as nn
        import jax
        import jax.numpy as jnp
        import optax
        from flax.training.train_state import TrainState
    except ImportError as error:
        print(f"error: {sys.executable} has no {error.name}: pip install jax flax optax", file=sys.stderr)
        raise SystemExit(2) from None
    jax.config.update("jax_default_matmul_precision", "highest")
    args = types.SimpleNamespace(
        batch_size=options.batch_size, obs_dim=STATE, goal_start_idx=0, goal_end_idx=GOAL, disable_entropy=0,
        logsumexp_penalty_coeff=0.1)  # fmt: skip
    state, action, goal, noise = make_batch(options.batch_size)
    jax.random.normal = lambda key, shape, dtype: jnp.asarray(noise)
    # What the cut text refers to, under its own names
    initializer = nn.initializers.variance_scaling
    scope = dict(jax=jax, jnp=jnp, nn=nn, flax=flax, args=args, TrainState=TrainState, NamedTuple=NamedTuple)
    scope |= dict(variance_scaling=initializer, lecun_unfirom=initializer(1 / 3, "fan_in", "uniform"))
    scope |= dict(bias_init=nn.initializers.zeros, target_entropy=-0.5 * ACTION)
    for name, text in cut(path, CUT.split()).items():
        exec(("@flax.struct.dataclass\n" if name == "TrainingState" else "") + text, scope)
    networks = dict(
        actor=scope["Actor"](action_size=ACTION, network_width=WIDTH, network_depth=depth),
        sa=scope["SA_encoder"](network_width=WIDTH, network_depth=depth),
        g=scope["G_encoder"](network_width=WIDTH, network_depth=depth),
    )
    inputs = dict(actor=[np.zeros((1, STATE + GOAL))], sa=[np.zeros((1, STATE)), np.zeros((1, ACTION))],
                  g=[np.zeros((1, GOAL))])  # fmt: skip
    parameters = {}
    for name, layers in make_weights(depth).items():
        shapes = networks[name].init(jax.random.PRNGKey(0), *inputs[name])
        for i, (kernel, bias) in enumerate(layers):
            shapes["params"][f"Dense_{i}"] = dict(kernel=jnp.asarray(kernel), bias=jnp.asarray(bias))
        parameters[name] = shapes
    scope |= dict(actor=networks["actor"], sa_encoder=networks["sa"], g_encoder=networks["g"])
    critic = dict(sa_encoder=parameters["sa"], g_encoder=parameters["g"])

    def learner(tree):
        return TrainState.create(apply_fn=None, params=tree, tx=optax.adam(3e-4))

    carry = scope["TrainingState"](
        env_steps=jnp.zeros(()), gradient_steps=jnp.zeros(()), actor_state=learner(parameters["actor"]),
        critic_state=learner(critic), alpha_state=learner({"log_alpha": jnp.asarray(0.0)}))  # fmt: skip
    carry = jax.tree_util.tree_map(np.asarray, (carry, jax.random.PRNGKey(1)))  # as it comes back: one compilation
    observation = jnp.asarray(np.concatenate([state, goal], 1))
    future = jnp.asarray(np.pad(goal, ((0, 0), (0, STATE - GOAL))))
    unused = jnp.zeros(options.batch_size)  # reward and discount
    batch = scope["Transition"](observation, jnp.asarray(action), unused, unused, {"future_state": future})
    batches = jax.tree_util.tree_map(lambda x: jnp.broadcast_to(x, (options.steps, *jnp.shape(x))), batch)
    scan = jax.jit(lambda carry, batches: jax.lax.scan(scope["sgd_step"], carry, batches))

    def step():
        nonlocal carry
        carry, metrics = scan(carry, batches)
        return [float(metrics[name][-1]) for name in ("critic_loss", "actor_loss")]

    def peak_gb():
        statistics = jax.devices()[0].memory_stats()
        return statistics["peak_bytes_in_use"] / 1e9 if statistics else resident_gb()

    return step, peak_gb


# --- our side ---------------------------------------------------------------------------------------------------------
def our_step(depth: int, options, **flags):
    """The same for crl_deep.py."""
    from functools import partial

    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import crl_deep as crl

    device = torch.device(options.device)
    args = crl.Args(actor_depth=depth, critic_depth=depth, batch_size=options.batch_size, **flags)
    crl.set_precision(args.precision, device)
    agent = crl.Agent(STATE, GOAL, ACTION, args)
    networks = dict(actor=agent.actor.trunk, sa=agent.state_action_encoder, g=agent.goal_encoder)
    for name, layers in make_weights(depth).items():
        dense = [module for module in networks[name].modules() if isinstance(module, crl.Dense)]
        dense += [agent.actor.log_std_head] if name == "actor" else []
        for module, (kernel, bias) in zip(dense, layers, strict=True):
            module.weight.data = torch.from_numpy(kernel.T.copy())
            module.bias.data = torch.from_numpy(bias)
    agent.to(device)
    state, action, goal, noise = (torch.from_numpy(x).to(device) for x in make_batch(options.batch_size))
    torch.randn_like = lambda x: noise
    optimizers = crl.adam_optimizers(agent, args, device)
    learn = partial(crl.update, agent, optimizers, args)
    if args.cudagraphs:
        learn = crl.capture(learn, optimizers)

    def step():
        for _ in range(options.steps):
            metrics = learn([state, action, goal])
        return [float(metrics[name]) for name in ("losses/critic", "losses/actor")]

    def peak_gb():
        return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else resident_gb()

    return step, peak_gb


def resident_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# --- in turn ----------------------------------------------------------------------------------------------------------
VARIANTS = {
    "official": None,
    "ours, float32": dict(precision="float32"),
    "ours, bfloat16": dict(precision="bfloat16"),
    "ours, float32, captured": dict(precision="float32", cudagraphs=True),
}


def work(options) -> None:
    """A process of one variant: takes its steps whenever it reads a line, and answers with one."""
    if options.work == "official":
        step, peak_gb = official_step(options.official, options.depth, options)
    else:
        step, peak_gb = our_step(options.depth, options, **VARIANTS[options.work])
    for _ in sys.stdin:
        start = time.perf_counter()
        losses = step()
        print(json.dumps(dict(seconds=time.perf_counter() - start, losses=losses, peak_GB=peak_gb())), flush=True)


def compare(depth: int, options) -> list:
    """All variants at this depth, in turn -> rows of the table."""
    captured = "captured" if options.device == "cpu" else "none"
    processes = {}
    for name in (name for name in VARIANTS if captured not in name):
        python = options.jax if name == "official" else sys.executable
        command = [python, __file__, options.official, "--work", name, "--device", options.device]
        for flag, value in (("depth", depth), ("steps", options.steps), ("batch-size", options.batch_size)):
            command += [f"--{flag}", str(value)]
        environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if options.device == "cpu" else {})
        processes[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    answers = {name: [] for name in processes}
    for _ in range(options.repeats + 1):  # the first one warms up and compiles
        for name, process in processes.items():
            print("go", file=process.stdin, flush=True)
            line = process.stdout.readline()
            if not line:
                raise SystemExit(process.wait())  # it has said why
            answers[name].append(json.loads(line))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    rows = []
    for name, of_variant in answers.items():
        seconds, official = (np.array([a["seconds"] for a in x[1:]]) for x in (of_variant, answers["official"]))
        difference = np.abs(np.subtract(of_variant[0]["losses"], answers["official"][0]["losses"]))
        rows.append({
            "depth": depth, "variant": name, "ms": 1e3 * np.median(seconds) / options.steps,
            "fastest": 1e3 * min(seconds) / options.steps, "slowest": 1e3 * max(seconds) / options.steps,
            "ratio": np.median(official / seconds), "peak_GB": of_variant[-1]["peak_GB"],
            "critic_loss": of_variant[0]["losses"][0], "actor_loss": of_variant[0]["losses"][1],
            "critic_difference": difference[0], "actor_difference": difference[1],
        })  # fmt: skip
        numbers = "".join(f"  {k} {v:.4g}" for k, v in rows[-1].items() if k not in ("depth", "variant"))
        print(f"depth {depth:4d}  {name:24s}{numbers}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("official", help="train.py of wang-kevin3290/scaling-crl")
    parser.add_argument("--jax", default=sys.executable, help="a Python with jax, flax and optax")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--depths", nargs="+", type=int, default=[4, 16, 64, 256])
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="gradient steps per turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="write <out>.csv")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options)
    cut(options.official, CUT.split())
    rows = [row for depth in options.depths for row in compare(depth, options)]
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{options.out}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
