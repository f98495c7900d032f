"""Films one evaluation episode of a redo_dqn_atari.py run, in colour, with no display needed.

python benchmark/redo_dqn_atari/film.py runs/<run>            -> runs/<run>/episode.mp4, at the game's own speed
"""

import json
import sys
from pathlib import Path

import torch
from moviepy import ImageSequenceClip

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plotting import run_to_film

import redo_dqn_atari as redo


def film(run_dir: Path, max_steps: int = 4500) -> Path:
    """The run's checkpoint -> its first max_steps steps (5 minutes) of an episode, greedy but for --eval-epsilon.

    The game is played twice with the same seed and actions, in the grey that the network sees and in colour.
    """
    saved = json.loads((run_dir / "args.json").read_text())["args"]
    args, cpu = redo.Args(**saved), torch.device("cpu")
    grey = redo.make_envs(args, 1)
    colour = redo.make_envs(args, 1, grayscale=False, img_height=210, img_width=160, stack_num=1)
    num_actions = int(grey.single_action_space.n)
    agent = redo.DQNAgent(num_actions, args)
    agent.load_state_dict(torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)["agent"])
    first_episode = redo.derived_seed(args.seed, 0, 0)
    obs, info = redo.reset_envs(grey, args, torch.Generator().manual_seed(first_episode))
    picture, _ = redo.reset_envs(colour, args, torch.Generator().manual_seed(first_episode))
    rng = torch.Generator().manual_seed(redo.derived_seed(args.seed, 3))
    frames, done, lost_life = [], False, False
    while not done and len(frames) < max_steps:
        frames.append(picture[0, 0].repeat(2, axis=0).repeat(2, axis=1))
        action = redo.act(agent.q_network, obs, args.eval_epsilon, num_actions, rng, cpu)
        if args.fire_reset and lost_life:
            action[:] = redo.fire_action(grey)
        lives, picture = info["lives"][0], colour.step(action)[0]
        obs, _, terminated, truncated, info = grey.step(action)
        lost_life = info["lives"][0] < lives
        done = bool(terminated[0] | truncated[0])
    clip = ImageSequenceClip(frames, fps=60 / redo.ACTION_REPEAT)
    clip.write_videofile(str(run_dir / "episode.mp4"), logger=None)
    return run_dir / "episode.mp4"


if __name__ == "__main__":
    print(film(run_to_film("redo_dqn_atari")))
