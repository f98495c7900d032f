#!/usr/bin/env bash
# Fig. 10d: DrQ(eps) with and without ReDo by replay ratio, 26 games, 400,000 steps.
# Expect, at paper scale, IQM at replay ratio 1, 2, 4, 8: DrQ(eps) 0.61, 0.53, 0.425, 0.35; ReDo 0.635, 0.615, 0.56, 0.515.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

drq_tiers "$GAMES26" "1 2 3 4 5 6 7 8 9 10"
ratios="1 2"
[ "$SCALE" != paper ] || ratios="1 2 4 8"
sweep studies/drq_eps_atari.py drq_fig10d "$envs" "$seeds" $flags < <(
  for ratio in $ratios; do
    for method in drq redo; do echo "rr$ratio-$method --method $method --replay-ratio $ratio"; done
  done
)
draw benchmark/redo_dqn_atari/plot.py drq_fig10d --runs "drq_fig10d-$SCALE-*"
