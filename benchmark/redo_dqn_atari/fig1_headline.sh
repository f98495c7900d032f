#!/usr/bin/env bash
# Fig. 1: DQN, ReDo, periodic resets and weight decay at replay ratio 1; IQM of human-normalised scores over frames.
# Expect, at paper scale (17 games, 5 seeds), at 10M frames: ReDo 0.625, weight decay 0.415, resets 0.325, DQN 0.30.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

baseline_runs
draw benchmark/redo_dqn_atari/plot.py fig1 --runs "redo_fig1-$SCALE-*"
