#!/usr/bin/env bash
# Fig. 15: augmentation while priming x augmentation afterwards; augmentation afterwards recovers. Tasks: our guess.
source "$(dirname "$0")/common.sh"

pixel_tiers "cheetah-run walker-run quadruped-run"
[ "$SCALE" = smoke ] && priming=50 || priming=100000
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "primed-augmentation --priming-gradient-steps $priming"
  echo "primed-plain --no-augmentation --priming-gradient-steps $priming"
  echo "primed-plain-then-augmentation --priming-gradient-steps $priming --priming-augmentation off"
  echo "primed-augmentation-then-plain --no-augmentation --priming-gradient-steps $priming --priming-augmentation on"
)
draw benchmark/plot_drqv2_plasticity.py curves --runs "drqv2-$SCALE-*" --envs $envs \
  --arms primed-augmentation primed-plain primed-plain-then-augmentation primed-augmentation-then-plain \
  --tags return fau/critic
