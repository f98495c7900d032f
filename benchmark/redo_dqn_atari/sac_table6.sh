#!/usr/bin/env bash
# Table 6: ReDo in narrow networks, SAC on Ant.
# Expect, at paper scale, after 1M steps: 2016 +- 102 -> 2115 +- 212 at a quarter of the width, 3964 +- 953 -> 4472 +- 648 at
# half of it. That is below what few seeds can tell.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

sac_tiers Ant-v5
widths="0.25 0.5"
[ "$SCALE" != smoke ] || widths="0.1 0.2"
flags=${flags/--width 0.1/}
sweep studies/redo_sac.py redo_sac6 "$envs" "$seeds" $flags < <(
  for width in $widths; do
    echo "x$width-sac --method sac --width $width"
    echo "x$width-redo --method redo --width $width"
  done
)
draw benchmark/redo_dqn_atari/plot.py sac_table6 --runs "redo_sac6-$SCALE-*"
