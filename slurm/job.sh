# shellcheck shell=bash
# What the job scripts share; sourced, never submitted.
#
# A job's life: snapshot the code (once), srun one task a rank, wait. Then, by how it ended:
#   all ranks exit 0, nobody asked to stop      the run is complete
#   USR1: the time limit is near                the ranks have saved: requeue
#   TERM: cancelled, preempted, a node failed   leave it to Slurm, which requeues all but the cancelled by itself
#   exit status 2 or 3                          cannot start as asked, or numbers went wrong: a restart would not help
#                                               (most of it is found before srun: a rank that is quick to refuse has Slurm
#                                               kill the slow ones, whose status then hides its own)
#   anything else (a rank died, a hang)         requeue
# A requeue is refused after MAX_RESTARTS in all, and after MAX_STALLED starts in a row that saved nothing new.

MAX_RESTARTS=${MAX_RESTARTS:-100}
MAX_STALLED=${MAX_STALLED:-3}

# A site's environment: modules, container, interface of the fast network. For example:
#   module load cuda/13 nccl
#   export NCCL_SOCKET_IFNAME=ib0
#   LAUNCH=(srun --container-image=IMAGE --container-mounts="$PWD:$PWD")
LAUNCH=(srun)

say() { echo "[$(date '+%F %T') job ${SLURM_JOB_ID:-none}, start $((${SLURM_RESTART_COUNT:-0} + 1))] $*"; }

find_python() { # the environment that `make install` leaves, else whatever is active
    if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"; elif [ -x .venv/bin/python ]; then echo "$PWD/.venv/bin/python"; else command -v python3; fi
}

# Runs a command once per task with the environment that torch.distributed expects; srun passes on its exit status.
launch() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MASTER_ADDR=$first MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    # shellcheck disable=SC2016  # the task's own shell expands them
    "${LAUNCH[@]}" --kill-on-bad-exit=1 --label \
        bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' task "$@"
}

last_saved_step() { # of the run in $1; -1 before the first checkpoint
    local step
    step=$(sed -n 's/.*"event": "saved", "step": \([0-9]*\).*/\1/p' "$1/journal.jsonl" 2>/dev/null | tail -n 1)
    echo "${step:--1}"
}

# train CONFIG [section.key=value ...]: trains until done, over as many starts as it takes.
train() {
    local config=$1 python run_dir status
    shift
    python=$(find_python)
    run_dir=$("$python" -m train.snapshot --config "$config" --world-size "$SLURM_NTASKS" "$@") || exit 2
    last_saved_step "$run_dir" >> "$run_dir/starts.txt"
    say "training in $run_dir on $SLURM_JOB_NODELIST, $SLURM_NTASKS ranks; newest checkpoint: step $(tail -n 1 "$run_dir/starts.txt")"
    asked=""
    trap 'asked=USR1; say "time is nearly up: saving"; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 # to the ranks alone
    trap 'asked=${asked:-TERM}; say "asked to end"' TERM # Slurm has sent it to the ranks too, and a second signal would end them at once
    launch "$python" "$run_dir/code/train/main.py" --config "$run_dir/resolved.json" &
    wait_for $!
    say "ranks ended with status $status"
    case "$asked$status" in
        0 | 2 | 3) exit "$status" ;;
        TERM*) exit 1 ;;
        *) requeue "$run_dir" ;;
    esac
}

wait_for() { # sets status; `wait` returns early for a trap
    while :; do
        wait "$1"
        status=$?
        kill -0 "$1" 2>/dev/null || return 0
    done
}

requeue() {
    local now stalled
    now=$(last_saved_step "$1")
    stalled=$(tail -n "$MAX_STALLED" "$1/starts.txt" | grep -cx -- "$now")
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
        say "not requeued: $MAX_RESTARTS restarts are enough (MAX_RESTARTS)"
        exit 1
    fi
    if [ "$stalled" -ge "$MAX_STALLED" ]; then
        say "not requeued: $stalled starts in a row saved nothing beyond step $now (MAX_STALLED); see $1/journal.jsonl"
        exit 1
    fi
    say "requeued; newest checkpoint: step $now"
    trap '' TERM USR1 # Slurm ends this script now
    if scontrol requeue "$SLURM_JOB_ID"; then
        sleep 600
        exit 0
    fi
    say "scontrol requeue failed: submit again to go on at step $now"
    exit 1
}
