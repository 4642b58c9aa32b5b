# What every job needs before python starts. The one place to edit for a cluster.
#
#   FLUXFLOW_ENV=DIR     virtual environment, on a file system that all nodes see (default: .venv in the checkout)
#   FLUXFLOW_STAGE=DIR   shards to copy to each node's own disk before training; data.root then points at the copy
#   FLUXFLOW_LOCAL=DIR   where to (default: $TMPDIR, else /tmp)
#   FLUXFLOW_MAX_REQUEUES=N   how often a job may requeue itself (default 20)

# module load cuda python        # if your cluster has modules, name them here

set -u
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"   # since SLURM 22.05 srun doesn't take it from sbatch
cd "${FLUXFLOW_DIR:-$SLURM_SUBMIT_DIR}"
activate="${FLUXFLOW_ENV:-.venv}/bin/activate"
if [ ! -f "$activate" ]; then
    echo "no $activate: make the environment (README) or set FLUXFLOW_ENV" >&2
    exit 1
fi
. "$activate"

# Copies what has changed of $FLUXFLOW_STAGE to every node, once per node; two jobs on a node take turns.
stage() {
    [ -n "${FLUXFLOW_STAGE:-}" ] || return 0
    data_root="${FLUXFLOW_LOCAL:-${TMPDIR:-/tmp}}/fluxflow-$SLURM_JOB_USER"
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        bash -c 'mkdir -p "$2" && flock "$2/.staging" cp -ru "$1"/. "$2"/' - "$FLUXFLOW_STAGE" "$data_root" || exit 1
    data=("data.root=$data_root")
}

# Runs one command on all tasks of the job; requeues the job where the command asks for it.
run() {
    trap : TERM   # the tasks decide when to end; this shell only waits for them
    data=()
    stage
    local code=0
    # --wait: a rank that is alone after another ended with an error is not left hanging.
    srun --wait=120 python -m "$@" ${data[@]+"${data[@]}"} || code=$?
    case $code in
        85 | 138 | 140 | 143) ;;   # asked to end; 128 + a signal: asked before python could listen
        *) exit "$code" ;;
    esac
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${FLUXFLOW_MAX_REQUEUES:-20}" ]; then
        echo "requeued ${SLURM_RESTART_COUNT:-0} times already: leaving it at that (FLUXFLOW_MAX_REQUEUES)" >&2
        exit "$code"
    fi
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60   # the requeue ends this shell
}
