"""Films one evaluation episode of a finished crl_deep.py run, with no display needed.

python benchmark/crl_deep/film.py runs/<run>            -> runs/<run>/episode.mp4; the goal is a red ball
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")  # before MuJoCo is imported

from moviepy import ImageSequenceClip

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plotting import load_module, run_to_film

looks = load_module("crl_deep/looks.py")
crl = looks.crl


def film(run_dir: Path) -> Path:
    """The run's checkpoint -> its best of 16 evaluation episodes as run_dir/episode.mp4, at real speed."""
    agent, args, _ = looks.load(run_dir)
    envs = crl.MujocoEnvs(args.eval_env_id, 16, args.episode_length, (args.seed, 2))
    record = looks.play(agent, envs, 0)
    best = record["time_at_goal"].argmax()
    states = record["state"][record["alive"][:, best], best]
    env_step = envs.robot.physics_step * envs.robot.physics_steps  # s
    every = max(1, round(0.04 / env_step))  # about 25 frames per second
    envs.goal[0] = record["goal"][best]
    frames = []
    try:
        for state in states[::every]:
            envs.physics[0, 1:] = state[: envs.physics.shape[1] - 1]
            frames.append(crl.render(envs, 480, 640))
    except Exception as error:
        print(f"error: MuJoCo cannot render here ({error}): {PACKAGES}", file=sys.stderr)
        raise SystemExit(2) from None
    clip = ImageSequenceClip(frames, fps=1 / (every * env_step))
    clip.write_videofile(str(run_dir / "episode.mp4"), logger=None)
    return run_dir / "episode.mp4"


PACKAGES = "apt-get install libegl1 libgl1-mesa-dri libglx-mesa0 libopengl0"
if __name__ == "__main__":
    print(film(run_to_film("crl_deep")))
