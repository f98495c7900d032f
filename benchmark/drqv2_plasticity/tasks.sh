#!/usr/bin/env bash
# The authors' summary of the effect: last return with and without augmentation on the nine tasks of Figs. 18 and 19 (the runs
# of those figures), and the mean of their ratios. An article of theirs says 431% for nine tasks of this suite, but not which ones, nor
# after how many frames: no number of the paper.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

tasks="walker-stand walker-walk walker-run reacher-hard hopper-stand hopper-hop finger-spin quadruped-walk quadruped-run"
pixel_tiers "$tasks"
[ "$SCALE" != smoke ] || tasks="cartpole-balance walker-walk"
envs=$(printf "dm_control/%s-v0 " $tasks)
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
)
draw benchmark/drqv2_plasticity/plot.py tasks --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation plain
