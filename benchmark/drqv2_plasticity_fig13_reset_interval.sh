#!/usr/bin/env bash
# Fig. 13: the number of parts with a reset between them; the effect depends strongly on it. The list of numbers and
# Walker Run are our guess.
source "$(dirname "$0")/common.sh"

pixel_tiers "quadruped-run walker-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
  echo "augmentation-reset2 --reset-times 2"
  echo "plain-reset2 --no-augmentation --reset-times 2"
  echo "augmentation-reset5 --reset-times 5"
  echo "plain-reset5 --no-augmentation --reset-times 5"
  echo "augmentation-reset10 --reset-times 10"
  echo "plain-reset10 --no-augmentation --reset-times 10"
  echo "augmentation-reset20 --reset-times 20"
  echo "plain-reset20 --no-augmentation --reset-times 20"
)
draw benchmark/plot_drqv2_plasticity.py curves --runs "drqv2-$SCALE-*" --envs $envs \
  --arms augmentation plain augmentation-reset2 plain-reset2 augmentation-reset5 plain-reset5 augmentation-reset10 plain-reset10 augmentation-reset20 plain-reset20 \
  --tags return
