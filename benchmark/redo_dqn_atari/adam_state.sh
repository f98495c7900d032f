#!/usr/bin/env bash
# Not in the paper: what Adam forgets about recycled neurons, at replay ratio 1 on DemonAttack. The control arm resets
# Adam's step count every 1000 gradient steps and recycles nothing; flatten has the official code's wrong mask.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers ALE/DemonAttack-v5 2500000
[ "$SCALE" != smoke ] || flags=$ATARI_SMOKE
flags="$flags --replay-ratio 1"
sweep studies/redo_variants.py redo_adam "$envs" "$seeds" $flags < <(
  echo "dqn --method dqn"
  echo "step-reset-only --method adam-step-reset"
  for adam in none moments moments+tensor-step per-element; do echo "redo-${adam//+/-} --redo-adam $adam"; done
  echo "redo-flatten --redo-compat-flatten"
)
draw benchmark/redo_dqn_atari/plot.py adam --runs "redo_adam-$SCALE-*"
