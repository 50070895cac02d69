# shellcheck shell=bash
# What train.sbatch and sweep.sbatch share: start a launcher on every node of the job, pass stop requests on, and put the job
# back into the queue where the run is not done. Nothing but functions; tested by tests/test_slurm.py.

# shellcheck source=slurm/cluster.sh
. "$MTL_DIST_HOME/slurm/cluster.sh"

die() {
  echo "error: $*" >&2
  exit 2
}

# Print the value that the last `$1 VALUE` or `$1=VALUE` among the other words gives; fail if there is none.
value_of() {
  local name=$1 value='' found=1
  shift
  while (($#)); do
    case $1 in
      "$name") value=${2:-} found=0 ;;
      "$name"=*) value=${1#*=} found=0 ;;
    esac
    shift
  done
  echo "$value"
  return "$found"
}

# Print "state round signal" of the run in folder $1, as its status.json has it; "none 0 None" where there is none yet.
status_of() {
  python - "$1/status.json" <<'PYTHON'
import json, pathlib, sys
file = pathlib.Path(sys.argv[1])
status = json.loads(file.read_text()) if file.exists() else {"state": "none", "round": 0, "signal": None}
print(status["state"], status["round"], status["signal"])
PYTHON
}

# Print the path of the launch file that is to be used.
launch_file() {
  local name=${MTL_DIST_LAUNCH:-}
  if [[ -z $name ]]; then
    ((${SLURM_GPUS_ON_NODE:-0} > 0)) && name=several_nodes || name=two_cpu_processes
  fi
  [[ -f $name ]] || name=$MTL_DIST_HOME/launch_configs/${name%.yaml}.yaml
  [[ -f $name ]] || die "MTL_DIST_LAUNCH: $name is not there; name a file of launch_configs/"
  echo "$name"
}

# Fill the array `launch` with the arguments of accelerate launch that say which processes there are and where they meet.
plan_launch() {
  local file gpus=${SLURM_GPUS_ON_NODE:-0} nodes=$SLURM_JOB_NUM_NODES first
  file=$(launch_file) || exit
  ((gpus > 0)) || export CUDA_VISIBLE_DEVICES='' # of other jobs, where the cluster does not hide them
  processes=${MTL_DIST_PROCESSES_PER_NODE:-$((gpus > 0 ? gpus : 1))}
  [[ $processes =~ ^[1-9][0-9]*$ ]] || die "MTL_DIST_PROCESSES_PER_NODE: $processes is not a number of processes"
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  [[ -n $first ]] || die "the job's first node is not known (SLURM_JOB_NODELIST '$SLURM_JOB_NODELIST')"
  launch=(--config_file "$file" --num_machines "$nodes" --num_processes "$((nodes * processes))")
  launch+=(--main_process_ip "$first" --main_process_port "$((20000 + SLURM_JOB_ID % 10000))")
  # shellcheck disable=SC2206  # several words
  launch+=(${MTL_DIST_LAUNCH_OPTIONS:-})
  local threads=$((${SLURM_CPUS_PER_TASK:-1} / processes))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
  echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $nodes nodes x $processes processes by $file;" \
    "they meet at $first:$((20000 + SLURM_JOB_ID % 10000))"
}

# Run one launcher a node with the words $@ and wait for all. Sets `code`, and `ended_by_slurm` if SLURM ends the job itself.
run_step() {
  local step interrupted=yes
  ended_by_slurm=
  # --wait: seconds that the other nodes have when one has ended. --export: whatever sbatch was told of the environment.
  srun --export=ALL --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --label --kill-on-bad-exit=0 --wait=60 \
    bash "$MTL_DIST_HOME/slurm/node.sh" "$@" &
  step=$!
  trap 'interrupted=yes; kill -USR1 "$step"' USR1 # the time is nearly up; srun passes it on to all nodes
  trap 'interrupted=yes ended_by_slurm=yes' TERM
  while [[ -n $interrupted ]]; do
    interrupted=
    wait "$step"
    code=$?
  done
}

# End the job as the run ended that began at round $1 and is now "$2 $3 $4" (state, round, signal) in the folder $5.
end_job() {
  local before=$1 state=$2 round=$3 asked=$4 run=$5 job=$SLURM_JOB_ID
  # An element of an array by its place: its job id may be that of the array, and all elements would be requeued.
  [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  echo "job $job: $run is $state at round $round (began at $before; signal $asked, exit code $code)"
  if [[ -n $ended_by_slurm && $(squeue --noheader --jobs="$job" --format=%r) != TimeLimit ]]; then
    exit "$code" # cancelled, or requeued already: not ours to decide
  fi
  case $state:$asked in
    stopped:SIGUSR1 | stopped:SIGTERM | running:*) ;;
    *) exit "$code" ;; # finished, failed, never begun, or stopped because the run was told to
  esac
  ((round > before)) || die "no progress since round $before: the job is not requeued. If it was stopped before its first" \
    "round, give it more --time; a checkpoint that takes longer than the time left wants --signal=B:USR1@SECONDS; else see" \
    "the errors above. Submit it again with --run.dir $run"
  scontrol requeue "$job" || die "SLURM does not requeue this job. Submit it again with --run.dir $run"
  exit 0
}

# Train in the run folder $1 with the other words, on all nodes of the job, going on where the run stands; then end the job.
train_in_job() {
  local run=$1 before status
  shift
  command -v accelerate >/dev/null || die "accelerate is not found: activate the environment before sbatch, or in" \
    "$MTL_DIST_HOME/slurm/cluster.sh"
  plan_launch
  status=$(status_of "$run") || exit
  read -r _ before _ <<<"$status"
  run_step "${launch[@]}" "$MTL_DIST_HOME/mtl_dist/train.py" "$@" --run.dir "$run" --run.resume auto
  status=$(status_of "$run") || exit
  # shellcheck disable=SC2086  # three words
  end_job "$before" $status "$run"
}
