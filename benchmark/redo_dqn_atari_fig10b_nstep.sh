#!/usr/bin/env bash
# Fig. 10b: as Fig. 10a, with 3-step returns.
# Expect, at paper scale: DQN 0.655, 0.69, 0.555, 0.345; ReDo 0.69, 0.725, 0.727, 0.565.
source "$(dirname "$0")/common.sh"

atari_tiers "$GAMES17" 2500000
ratios="0.25 0.5 1 2"
[ "$SCALE" = paper ] || ratios="0.25 1"
flags="$flags --n-step 3"
sweep redo_dqn_atari.py redo_fig10b "$envs" "$seeds" $flags < <(
  for ratio in $ratios; do
    echo "rr$ratio-dqn --method dqn --replay-ratio $ratio"
    echo "rr$ratio-redo --method redo --replay-ratio $ratio"
  done
)
draw benchmark/plot_redo_dqn_atari.py fig10b --runs "redo_fig10b-$SCALE-*"
