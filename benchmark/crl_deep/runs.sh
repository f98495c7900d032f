# Sourced by the sweeps of this folder, after ../common.sh.

# Tiny runs of the point mass, for SCALE=smoke (in the room they learn a little)
SMOKE="--total-timesteps 60000 --eval-every 10000 --batch-size 128 --width 32 --eval-episodes 32"

depth_tiers() { # studies over depth, Figs. 5, 6 and 16: sets seeds, envs, depths and flags for this SCALE
  case $SCALE in
    smoke) seeds=1 envs=point_room depths="4 8" flags=$SMOKE ;;
    small) seeds=1 envs=ant_hardest_maze depths="4 16" flags="--total-timesteps 20000000 --eval-every 200000" ;;
    paper) seeds="1 2 3" envs="humanoid ant_big_maze" depths="4 8 16 32 64" flags="" ;;
  esac
}
