#!/usr/bin/env bash
# Fig. 12: networks of 1, 2 and 4 times the width at replay ratio 1: IQM, and dormant neurons (tau 0.1) on DemonAttack.
# Expect, at paper scale: DQN 0.30, 0.375, 0.33 with 47, 52, 55% dormant; ReDo 0.625, 0.695, 0.71 with 11-12%.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers "$GAMES17" 2500000
headline_runs
widths="2 4"
[ "$SCALE" = paper ] || widths=2
[ "$SCALE" != smoke ] || widths=0.5
sweep redo_dqn_atari.py redo_fig12 "$envs" "$seeds" $flags --replay-ratio 1 < <(
  for width in $widths; do
    echo "x$width-dqn --method dqn --width $width"
    echo "x$width-redo --method redo --width $width"
  done
)
draw benchmark/redo_dqn_atari/plot.py fig12 --runs "redo_fig12-$SCALE-*" "redo_fig1-$SCALE-dqn" "redo_fig1-$SCALE-redo"
