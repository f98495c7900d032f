#!/usr/bin/env bash
# Fig. 7: batch size times depth, on the final time at goal.
# Expect, at paper scale: larger batches help deep networks, and do nothing for depth 4. Paper: 3 seeds.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

case $SCALE in
  smoke) seeds=1 envs=point_room depths="4 8" batches="32 128" flags=$SMOKE ;;
  small) seeds=1 envs=ant_hardest_maze depths="4 16" batches="128 512" flags="--total-timesteps 20000000 --eval-every 200000" ;;
  paper) seeds="1 2 3" envs=humanoid depths="4 8 16 64" batches="128 256 512 1024 2048" flags="" ;;
esac
sweep crl_deep.py fig7 "$envs" "$seeds" $flags < <(
  for depth in $depths; do
    for batch in $batches; do echo "d$depth-b$batch --depth $depth --batch-size $batch"; done
  done
)
draw benchmark/crl_deep/plot.py fig7 --runs "fig7-$SCALE-*"
