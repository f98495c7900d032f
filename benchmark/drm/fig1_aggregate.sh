#!/usr/bin/env bash
# Fig. 1, its part for dm_control: the hard tasks together (the runs of Fig. 6). How the paper aggregates is not known to
# us; here: the interquartile mean of the returns.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drm/runs.sh

hard_runs
draw benchmark/drm/plot.py aggregate --runs "drm-$SCALE-*" --envs $envs --arms drm drqv2
