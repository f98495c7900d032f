#!/usr/bin/env bash
# Fig. 2: DrQ-v2 on Hopper Hop, the first million frames: the actor's dormant ratio and the return, with pictures of what
# the agent does. In the paper the ratio falls while the return is still near 0; DrQ-v2's published seeds differ much in
# when they take off, hence 8 seeds.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drm/runs.sh

drm_tiers hopper-hop
[ "$SCALE" != smoke ] || flags="$flags --eval-every 500"
[ "$SCALE" != small ] || seeds="1 2"
[ "$SCALE" != paper ] || { seeds="1 2 3 4 5 6 7 8" flags="--total-timesteps 500000"; }
sweep drm.py drm "$envs" "$seeds" $flags --capture-video < <(echo "film $DRM_OFF")
draw benchmark/drm/plot.py behaviour --runs "drm-$SCALE-film" --envs $envs --arms film
