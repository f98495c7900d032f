#!/usr/bin/env bash
# Fig. 11: a lower learning rate at replay ratio 1: IQM and dormant neurons.
# Expect, at paper scale: a quarter of the learning rate helps DQN some; about 40% dormant instead of 47%, ReDo 10%.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers "$GAMES17" 2500000
headline_runs
sweep redo_dqn_atari.py redo_fig11 "$envs" "$seeds" $flags --replay-ratio 1 < <(
  echo "dqn-lr4 --method dqn --learning-rate 1.5625e-5"
  echo "redo-lr4 --method redo --learning-rate 1.5625e-5"
)
draw benchmark/redo_dqn_atari/plot.py fig11 --runs "redo_fig11-$SCALE-*" "redo_fig1-$SCALE-dqn" "redo_fig1-$SCALE-redo"
