#!/usr/bin/env bash
# Fig. 5: dormant neurons of the penultimate layer stay dormant: the overlap of one measurement with the one before. Same runs
# as Fig. 2. Expect, at paper scale: DemonAttack 41%, 52% at 0.25M gradient steps, 25-30% at 1.3-2M, 68% at the end;
# Asterix 46%, 49%, 27% at 0.55M, 79.5% at the end. Which earlier set the paper compares with is not known; the previous
# measurement fits its curves best.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

growth_runs
draw benchmark/redo_dqn_atari/plot.py fig5 --runs "redo_fig2-$SCALE-*"
