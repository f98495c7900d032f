#!/usr/bin/env bash
# Fig. 10c: as Fig. 10a, with the ResNet.
# Expect, at paper scale: DQN 0.79, 0.78, 0.51, 0.22; ReDo 0.83, 1.0, 0.84, 0.53.
source "$(dirname "$0")/common.sh"

atari_tiers "$GAMES17" 2500000
ratios="0.25 0.5 1 2"
[ "$SCALE" = paper ] || ratios="0.25 1"
flags="$flags --network resnet"
sweep redo_dqn_atari.py redo_fig10c "$envs" "$seeds" $flags < <(
  for ratio in $ratios; do
    echo "rr$ratio-dqn --method dqn --replay-ratio $ratio"
    echo "rr$ratio-redo --method redo --replay-ratio $ratio"
  done
)
draw benchmark/plot_redo_dqn_atari.py fig10c --runs "redo_fig10c-$SCALE-*"
