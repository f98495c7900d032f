#!/usr/bin/env bash
# Ours: Cartpole Balance with and without augmentation on a CPU: 20,000 steps (40,000 frames), batches of 64 instead of 256,
# bfloat16. SCALE=small: with WORKERS=2 OMP_NUM_THREADS=1 on two cores about an hour. paper: 3 seeds.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

envs=dm_control/cartpole-balance-v0 seeds=1
flags="--total-timesteps 20000 --batch-size 64 --precision bfloat16 --eval-every 2000 --eval-episodes 4
  --plasticity-every 1000"
[ "$SCALE" != smoke ] || pixel_tiers cartpole-balance
[ "$SCALE" != paper ] || seeds="1 2 3"
sweep drqv2_plasticity.py drqv2_cpu "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2_cpu-$SCALE-*" --envs $envs --arms augmentation plain \
  --tags return fau/encoder fau/actor fau/critic dormant_ratio_tau0.025/critic feature_rank/critic
