#!/usr/bin/env bash
# Fig. 2: the share of dormant neurons (tau 0) grows while DQN trains, over gradient steps.
# Expect, at paper scale (6.25M gradient steps): DemonAttack 13.5% at the start, 3-4% at 0.3-1M, 25-27% at the end;
# Asterix 17%, then 3-4%, then about 30%.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

growth_runs
draw benchmark/redo_dqn_atari/plot.py fig2 --runs "redo_fig2-$SCALE-*"
