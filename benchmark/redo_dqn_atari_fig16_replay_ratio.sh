#!/usr/bin/env bash
# Fig. 16: Fig. 7 on five games (which five is our guess). DemonAttack's runs are those of Fig. 7.
source "$(dirname "$0")/common.sh"

atari_tiers "$GAMES5" 10000000
ratios="0.25 0.5 1 2"
[ "$SCALE" = paper ] || ratios="0.25 1"
sweep redo_dqn_atari.py redo_fig7 "$envs" "$seeds" $flags < <(
  for ratio in $ratios; do echo "rr$ratio --method dqn --replay-ratio $ratio"; done
)
draw benchmark/plot_redo_dqn_atari.py fig16 --runs "redo_fig7-$SCALE-*"
