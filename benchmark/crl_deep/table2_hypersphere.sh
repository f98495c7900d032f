#!/usr/bin/env bash
# Table 2: environment steps until 200, 400 and 600 steps at the goal, LayerNorm against Simba-v2's hypersphere norm.
# The paper, million steps: depth 16 64/75/- against 50/62/77; depth 32 54/64/77 against 42/48/67; depth 4 never.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

case $SCALE in
  smoke) seeds=1 envs=point_room depths="4 8" flags=$SMOKE ;;
  small) seeds=1 envs=ant_hardest_maze depths="4 16" flags="--total-timesteps 20000000 --eval-every 200000" ;;
  paper) seeds="1 2 3" envs=humanoid depths="4 16 32" flags="" ;;
esac
sweep crl_deep.py table2 "$envs" "$seeds" $flags < <(
  for depth in $depths; do
    echo "d$depth-layer --depth $depth"
    echo "d$depth-hypersphere --depth $depth --norm hypersphere"
  done
)
draw benchmark/crl_deep/plot.py table2 --runs "table2-$SCALE-*"
