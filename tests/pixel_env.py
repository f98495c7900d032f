"""A small environment with pixels: the action moves a dot, the reward is its nearness to the middle."""

import gymnasium
import numpy as np


class DotEnv(gymnasium.Env):
    """actions (2,), the second one in [-2, 2]; 2 * episode_length steps, unless `ends` and the dot is in the middle."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, width=84, height=84, episode_length=20, ends=False, render_mode=None):
        self.shape, self.episode_length, self.ends, self.render_mode = (
            (height, width),
            episode_length,
            ends,
            render_mode,
        )
        self.action_space = gymnasium.spaces.Box(np.float32([-1, -2]), np.float32([1, 2]))
        self.observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = self.np_random.uniform(-0.9, 0.9, 2), 0
        return self.place, {}

    def step(self, action):
        noise = self.np_random.normal(0, 0.02, 2)
        self.place = np.clip(self.place + 0.1 * action / [1, 2] + noise, -0.95, 0.95)
        self.time += 1
        reward = 1 - np.abs(self.place).mean()
        return self.place, reward, bool(self.ends and reward > 0.8), self.time >= 2 * self.episode_length, {}

    def render(self):
        y, x = np.mgrid[0 : self.shape[0], 0 : self.shape[1]] / (np.array(self.shape)[:, None, None] - 1) * 2 - 1
        near = np.exp(-20 * ((x - self.place[0]) ** 2 + (y - self.place[1]) ** 2))
        return (255 * np.stack([near, near * (1 + x) / 2, near * (1 + y) / 2], -1)).astype(np.uint8)


class DoubleDotEnv(DotEnv):
    """Bounds of actions in float64, which rescaling treats to the bit as PixelEnv did."""

    def __init__(self, **options):
        super().__init__(**options)
        self.action_space = gymnasium.spaces.Box(np.array([-1.0, -2.0]), np.array([1.0, 2.0]), dtype=np.float64)


class MatrixDotEnv(DotEnv):
    """Actions (2, 3)."""

    def __init__(self, **options):
        super().__init__(**options)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2, 3))


gymnasium.register("Dot-v0", DotEnv)
gymnasium.register("MatrixDot-v0", MatrixDotEnv)
gymnasium.register("LimitedDot-v0", DotEnv, max_episode_steps=20)
CHEETAH = "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv"
gymnasium.register("ShortHalfCheetah-v5", CHEETAH, max_episode_steps=40)
gymnasium.register("Dot64-v0", DoubleDotEnv)
gymnasium.register("EndlessDot-v0", DotEnv, kwargs=dict(episode_length=10**9))
gymnasium.register("EndingDot-v0", DotEnv, kwargs=dict(ends=True))
gymnasium.register("SmallDot-v0", DotEnv, kwargs=dict(width=8, height=8))
