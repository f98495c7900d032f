# Sourced by the sweeps of this folder, after ../common.sh. Tiers are those of drqv2_plasticity.py.
source benchmark/drqv2_plasticity/runs.sh

ratio_tiers() { # pixel_tiers for adaptive_rr.py, which must see some episodes of 500 steps
  pixel_tiers "$1"
  [ "$SCALE" != smoke ] ||
    flags="$DRQ_SMOKE --total-timesteps 2000 --eval-every 2000 --rr-check-episodes 2 --rr-threshold 0.05"
}
