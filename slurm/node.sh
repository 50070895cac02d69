#!/usr/bin/env bash
# What srun starts once on every node: this node's launcher, and the way of a stop request to its ranks.
#   srun bash slurm/node.sh ARGUMENTS OF ACCELERATE LAUNCH, but for the machine's rank
# SLURM signals this shell alone or every process of the node, as the cluster's ProctrackType has it. So the launcher, which
# would die of USR1, ignores it, and so do the ranks until they listen: they inherit it. Ranks are never told by way of the
# launcher: it would kill them 30 s after a TERM, whether or not they have saved.
set -u
asked=
trap 'asked=yes' USR1 TERM

# Send USR1 to the ranks that listen: one that is still starting does not yet, one that is ending would die of it.
tell_ranks() {
  local rank caught
  for rank in $(pgrep --parent "$launcher"); do
    caught=$(awk '/^SigCgt:/ { print $2 }' "/proc/$rank/status" 2>/dev/null)
    if ((0x${caught:-0} & 1 << 9)); then # 9: the bit of SIGUSR1
      kill -USR1 "$rank"
    fi
  done
}

(
  trap '' USR1
  exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"
) &
launcher=$!
wait "$launcher"
while [[ -n $asked ]] && kill -0 "$launcher" 2>/dev/null; do
  tell_ranks
  sleep 1
done
wait "$launcher"
