# shellcheck shell=bash
# What differs from cluster to cluster, all of it. train.sbatch and sweep.sbatch read this file on the first node of a job.
#
# Account, partition, time, nodes, CPUs and GPUs are not among them, because sbatch wants to know these before any script
# runs: give them to sbatch (`sbatch --account=A --partition=P --time=12:00:00 ...`), or name your own once here and read
# this file into the shell that you submit from (`. slurm/cluster.sh`). Options of sbatch win over these, these over the
# #SBATCH lines of the scripts.
# export SBATCH_ACCOUNT=my_project SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=12:00:00

# Every setting below can also come from the submitting shell, which then wins: `MTL_DIST_LAUNCH=... sbatch ...`.

# Modules, and the environment in which mtl_dist is installed: the one that is active when you submit, or else .venv.
# module load cuda
if ! command -v accelerate >/dev/null && [[ -f ${MTL_DIST_HOME:-.}/.venv/bin/activate ]]; then
  # shellcheck disable=SC1091
  . "${MTL_DIST_HOME:-.}/.venv/bin/activate"
fi

# The folder of runs that are not given a --run.dir; on a disk that all nodes see.
: "${MTL_DIST_RUNS:=runs}"

# The network between nodes, where the first interface found is not the fast one.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Processes on each node: empty for one on every GPU of the allocation, or one where it holds no GPU.
: "${MTL_DIST_PROCESSES_PER_NODE:=}"

# A file of launch_configs/ (its name without .yaml) or a path, which chooses the engine: empty for several_nodes where the
# allocation holds GPUs and two_cpu_processes where it holds none. The numbers of nodes and processes in it are not used.
: "${MTL_DIST_LAUNCH:=}"

# More options of accelerate launch, such as --mixed_precision no.
: "${MTL_DIST_LAUNCH_OPTIONS:=}"
