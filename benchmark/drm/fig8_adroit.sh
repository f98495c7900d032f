#!/usr/bin/env bash
# Figs. 8 and 10: DrM and DrQ-v2 on Adroit (bash install.sh adroit), and DrM without each one of its mechanisms (Fig. 10 puts the
# tasks together; here each has its row). Expect (paper, curves of the success rate only): DrM on top on all tasks.
# SCALE=smoke and small: the pen alone.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drm/runs.sh

tasks=pen seeds=1 flags="--total-timesteps 200000 --eval-every 10000 --eval-episodes 5"
case $SCALE in
  smoke) flags="$DRQ_SMOKE --total-timesteps 300 --eval-every 300 --perturb-every 200" ;;
  paper) seeds="1 2 3 4" tasks="pen door hammer" flags="" ;;
esac
sweep studies/drm_adroit.py adroit "$tasks" "$seeds" $flags < <(
  drm_arms
  echo "no-perturbation --perturb-every 0"
  echo "no-awakening --stddev-type drqv2"
  echo "no-exploitation --target-lambda 0"
)
draw benchmark/drm/plot.py curves --runs "adroit-$SCALE-*" --envs $tasks \
  --arms drm drqv2 no-perturbation no-awakening no-exploitation --tags eval/success_rate drm/dormant_ratio
