#!/usr/bin/env bash
# Ours: a switch at small scale, on a CPU: Cartpole Balance, pictures of 48 x 48, small heads, a check every 2 episodes and a
# threshold of 0.005 instead of 50 and 0.001, 8000 steps. SCALE=small: two of the three runs took 40 minutes on two busy
# cores, the one with replay ratio 2 throughout was not finished. paper: 3 seeds.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/adaptive_rr/runs.sh

envs=dm_control/cartpole-balance-v0 seeds=1
flags="--total-timesteps 8000 --image-size 48 --hidden-dim 256 --batch-size 64 --precision bfloat16 --eval-every 2000
  --eval-episodes 4 --rr-check-episodes 2 --rr-threshold 0.005"
[ "$SCALE" != smoke ] || ratio_tiers cartpole-balance
[ "$SCALE" != paper ] || seeds="1 2 3"
sweep adaptive_rr.py rr_cpu "$envs" "$seeds" $flags < <(
  echo "static0.5 --rr-high 0.5"
  echo "static2 --rr-low 2"
  echo "adaptive"
)
draw benchmark/adaptive_rr/plot.py curves --runs "rr_cpu-$SCALE-*" --envs $envs --arms static0.5 static2 adaptive \
  --tags fau/critic charts/replay_ratio charts/gradient_steps return
