#!/usr/bin/env bash
# Not a figure of the paper: what a CPU shows. Three seeds in the open room (at least 0.9 of the goals within 100k steps),
# and depth 4, 8 and 16 in the U-maze. Two cores: about 40 minutes with WORKERS=2 and OMP_NUM_THREADS=1.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

case $SCALE in
  smoke) seeds=1 depths="4 8" flags=$SMOKE ;;
  *) seeds="1 2 3" depths="4 8 16" flags="" ;;
esac
sweep crl_deep.py point point_room "$seeds" $flags <<<"room"
sweep crl_deep.py point point_u_maze "$seeds" $flags < <(
  for depth in $depths; do echo "d$depth --depth $depth"; done
)
draw benchmark/crl_deep/plot.py point --runs "point-$SCALE-*"
