#!/usr/bin/env bash
# Fig. 13: the runs of Fig. 1, with DemonAttack's return beside the aggregate.
# Expect, at paper scale, DemonAttack at 10M frames: ReDo 4580, resets 2950, weight decay 1210, DQN 690.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

baseline_runs
draw benchmark/redo_dqn_atari/plot.py fig13 --runs "redo_fig1-$SCALE-*"
