#!/usr/bin/env bash
# Ours: ReDo and DQN at replay ratio 1 on a CPU: 100,000 steps, exploration for 45,000 steps instead of 250,000, learning
# after 5,000 instead of 20,000, no padding (CleanRL's network), bfloat16.
# SCALE=small: with WORKERS=2 OMP_NUM_THREADS=1 on two cores about an hour for each of the two games. paper: 3 seeds.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

envs="ALE/DemonAttack-v5 ALE/RoadRunner-v5" seeds=1
flags="--total-timesteps 100000 --learning-starts 5000 --exploration-steps 45000 --padding valid
  --precision bfloat16 --eval-every 20000 --eval-steps 10000 --eval-envs 4 --dormant-every 5000
  --checkpoint-every 20000"
[ "$SCALE" != smoke ] || flags=$ATARI_SMOKE_ALL envs=ALE/DemonAttack-v5
[ "$SCALE" != paper ] || seeds="1 2 3"
sweep redo_dqn_atari.py redo_cpu "$envs" "$seeds" $flags --replay-ratio 1 < <(
  echo "dqn --method dqn"
  echo "redo --method redo"
)
draw benchmark/redo_dqn_atari/plot.py cpu --runs "redo_cpu-$SCALE-*"
