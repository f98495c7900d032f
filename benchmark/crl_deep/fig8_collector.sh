#!/usr/bin/env bash
# Fig. 8: one collector, deep or shallow; a deep and a shallow learner on its data (the arm task is omitted).
# Expect (paper, curves only): behind the deep collector (depth 32) the deep learner is far better than the shallow one
# (depth 4); behind the shallow collector both are alike, and low.
# SCALE=small, for two cores: the point mass in the U-maze, collectors of depth 16 and 4, 3 seeds. Expected there, and written
# down before the runs: no difference, since online depth has shown none on the point mass.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

case $SCALE in
  smoke) seeds=1 envs=point_room depths="8 4" flags="$SMOKE --deep 8" ;;
  small) seeds="1 2 3" envs=point_u_maze depths="16 4" flags="" ;;
  paper) seeds="1 2 3" envs="humanoid ant_big_maze" depths="32 4" flags="" ;;
esac
sweep studies/crl_collector.py fig8 "$envs" "$seeds" $flags < <(
  for depth in $depths; do echo "c$depth --collector-depth $depth"; done
)
draw benchmark/crl_deep/plot.py fig8 --runs "fig8-$SCALE-*"
