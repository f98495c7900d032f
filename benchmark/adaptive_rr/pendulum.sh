#!/usr/bin/env bash
# Fig. 9 at small scale on a CPU: Pendulum-v1 of Gymnasium from pixels, 8000 steps (16,000 frames, 80 episodes), pictures of
# 36 x 36 shifted by up to 2 pixels, heads of 256 units, batches of 64; a check every 5 episodes and a threshold of 0.003
# instead of 50 and 0.001. SCALE=small: 15 runs of 5 to 21 minutes beside other work. paper: twice as many seeds.
# Expected, and written down before the runs: averaged over the last three evaluations, the adaptive replay ratio is above
# 0.5 throughout by at least 400, with a spread of about 150 over seeds; it cannot be told from 2 throughout. The detector
# switches between 1000 and 3000 steps. (Chosen with seed 101: 0.5 throughout ended at -700 after 10,000 steps, 2 throughout
# reached -171 after 4000; other intervals and thresholds on the first run's log. --learning-rate, --shift-pad: first guess.)
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/adaptive_rr/runs.sh

envs=Pendulum-v1 seeds="1 2 3 4 5"
flags="--total-timesteps 8000 --image-size 36 --shift-pad 2 --hidden-dim 256 --batch-size 64 --learning-rate 3e-4
  --precision bfloat16 --learning-starts 500 --exploration-steps 500 --stddev-steps 5000 --eval-every 1000 --eval-episodes 10
  --rr-check-episodes 5 --rr-threshold 0.003"
[ "$SCALE" != smoke ] || { ratio_tiers none; envs=Pendulum-v1; }
[ "$SCALE" != paper ] || seeds="1 2 3 4 5 6 7 8 9 10"
sweep adaptive_rr.py rr_pendulum "$envs" "$seeds" $flags < <(
  echo "adaptive"
  echo "static0.5 --rr-high 0.5"
  echo "static2 --rr-low 2"
)
draw benchmark/adaptive_rr/plot.py curves --runs "rr_pendulum-$SCALE-*" --envs $envs --arms static0.5 static2 adaptive \
  --tags return fau/critic charts/replay_ratio charts/gradient_steps
