# Sourced by the sbatch scripts: where the code is, where the ranks meet, how many threads each has.

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "$0 is a job's script: submit it with sbatch $0 ..." >&2
    exit 2
fi

# sbatch runs a copy of the script from its spool, so the checkout is where it was submitted from;
# in an installed package this file lies beside train.py.
env_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -f $env_folder/../train.py ]]; then
    MMSCALE_ROOT=$(dirname "$(dirname "$env_folder")")
else
    MMSCALE_ROOT=${MMSCALE_ROOT:-$SLURM_SUBMIT_DIR}
fi
if [[ ! -f $MMSCALE_ROOT/mmscale/train.py ]]; then
    echo "MMSCALE_ROOT=$MMSCALE_ROOT holds no mmscale/train.py; submit from the checkout or set MMSCALE_ROOT" >&2
    exit 2
fi
if [[ -z ${VIRTUAL_ENV:-} && -d $MMSCALE_ROOT/.venv/bin ]]; then
    export PATH="$MMSCALE_ROOT/.venv/bin:$PATH"
fi

# Leftovers of another launcher in the submitting shell would name the wrong world.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT

num_tasks=${SLURM_NTASKS:-$((${SLURM_JOB_NUM_NODES:-1} * ${SLURM_NTASKS_PER_NODE:-1}))}
if ((num_tasks > 1)); then
    # Every rank reads its own number from SLURM_PROCID; below the ephemeral ports, one a job.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    if ! getent hosts "$MASTER_ADDR" >/dev/null; then
        # A node's name in Slurm need not be one that the network knows.
        MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    fi
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export MASTER_ADDR MASTER_PORT
fi

# Some processors of a node for each of its tasks; srun does not inherit --cpus-per-task by itself.
num_cpus=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=$num_cpus
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$num_cpus}
export PYTHONUNBUFFERED=1

# queue_again WHY: let Slurm start this job again later, where it is not on its way out.
queue_again() {
    # A job that was cancelled, preempted or requeued is no longer RUNNING here.
    local state
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null || true)
    if [[ $state == RUNNING ]]; then
        echo "job $SLURM_JOB_ID: $1, queued again"
        scontrol requeue "$SLURM_JOB_ID"
        # Slurm ends this script; a return here would count as the job's own end.
        sleep 60
    fi
}
