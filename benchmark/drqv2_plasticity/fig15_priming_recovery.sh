#!/usr/bin/env bash
# Fig. 15: augmentation while priming x augmentation afterwards; augmentation afterwards recovers. Tasks: our guess. All of
# the priming comes at the first step that learns, so a switch at the next one divides the two.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "cheetah-run walker-run quadruped-run"
priming=100000 after=2001
[ "$SCALE" != smoke ] || priming=50 after=101
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "primed-augmentation --priming-gradient-steps $priming"
  echo "primed-plain --no-augmentation --priming-gradient-steps $priming"
  echo "primed-plain-then-augmentation --no-augmentation --priming-gradient-steps $priming --augmentation-switch-step $after"
  echo "primed-augmentation-then-plain --priming-gradient-steps $priming --augmentation-switch-step $after"
)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs \
  --arms primed-augmentation primed-plain primed-plain-then-augmentation primed-augmentation-then-plain \
  --tags return fau/critic
