#!/usr/bin/env bash
# Fig. 4: width against depth. Wide networks of depth 4, and deep ones of width 256, on the final time at goal.
# Expect, at paper scale: depth 8 beats most widths, at far fewer parameters. Paper: 3 seeds, humanoid for 200M steps.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

case $SCALE in
  smoke) seeds=1 envs=point_room widths="16 64" depths="8" flags=$SMOKE ;;
  small) seeds=1 envs=ant_hardest_maze widths="256 1024" depths="8 16" flags="--total-timesteps 20000000 --eval-every 200000" ;;
  paper) seeds="1 2 3" envs="humanoid ant_big_maze" widths="128 256 512 1024 2048" depths="8 16 32 64" flags="" ;;
esac
for env in $envs; do
  steps=$flags
  [ "$SCALE-$env" != paper-humanoid ] || steps="--total-timesteps 200000000 --eval-every 2000000"
  sweep crl_deep.py fig4 "$env" "$seeds" $steps < <(
    for width in $widths; do echo "w$width --width $width"; done
    for depth in $depths; do echo "d$depth --depth $depth"; done
  )
done
draw benchmark/crl_deep/plot.py fig4 --runs "fig4-$SCALE-*"
