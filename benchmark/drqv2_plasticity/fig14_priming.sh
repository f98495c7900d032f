#!/usr/bin/env bash
# Fig. 14: heavy priming: 100,000 gradient steps on the first 2000 transitions. Ruinous without augmentation, mostly
# harmless with it. Which tasks is our guess.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "cheetah-run walker-run quadruped-run"
[ "$SCALE" = smoke ] && priming=50 || priming=100000
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
  echo "primed-augmentation --priming-gradient-steps $priming"
  echo "primed-plain --no-augmentation --priming-gradient-steps $priming"
)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation plain primed-augmentation primed-plain \
  --tags return fau/critic
