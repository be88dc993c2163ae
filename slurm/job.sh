# shellcheck shell=bash
# Functions that the job scripts share. Source this file; do not submit it.
#
# A job copies the code into the run's folder (once), starts one task per rank with srun, and waits for the ranks to end.
# What it does next depends on how they ended:
#   status 0, nobody asked to stop              the run is complete: exit
#   USR1: the time limit is near                the ranks have saved: requeue
#   TERM: cancelled, preempted, a node failed   exit; Slurm requeues the job by itself unless it was cancelled
#   status 2 (the run cannot start as asked)    exit: a restart would not help
#   status 3 (the numbers went wrong)           exit: a restart would not help
#   anything else (a rank died, a hang)         requeue
# At start the ranks compare what they run, so all of them end with status 2 if one refuses.
#
# A job is not requeued after MAX_RESTARTS restarts, or after MAX_STALLED starts in a row that saved nothing new.

MAX_RESTARTS=${MAX_RESTARTS:-100}
MAX_STALLED=${MAX_STALLED:-3}

# Set up your site here: modules, container, network interface. For example:
#   module load cuda/13 nccl
#   export NCCL_SOCKET_IFNAME=ib0
#   LAUNCH=(srun --container-image=IMAGE --container-mounts="$PWD:$PWD")
LAUNCH=(srun)

say() { echo "[$(date '+%F %T') job ${SLURM_JOB_ID:-none}, start $((${SLURM_RESTART_COUNT:-0} + 1))] $*"; }

find_python() { # prints $PYTHON, else the interpreter of `make install`, else the active one
    if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"; elif [ -x .venv/bin/python ]; then echo "$PWD/.venv/bin/python"; else command -v python3; fi
}

# Prints a port from 15000 to 31999, below those that systems give to connections. Each start of a job has another one,
# and so have jobs whose numbers differ by less than 168, which may share a node.
master_port() { echo $((15000 + (SLURM_JOB_ID * 101 + ${SLURM_RESTART_COUNT:-0} % 101) % 17000)); }

# read_words ARRAY TEXT: splits a text into words as a shell would, and sets ARRAY to them. Quotes and backslashes count,
# words may be on several lines, and nothing is expanded or run.
read_words() {
    mapfile -d '' -t "$1" < <("$(find_python)" -c 'import os, shlex, sys
for word in shlex.split(sys.argv[1]):
    sys.stdout.buffer.write(os.fsencode(word) + b"\0")' "$2" 2> /dev/null)
    wait $! || { say "cannot be split into words, is a quote missing? $2" >&2; exit 2; }
}

# launch COMMAND: runs it once per task with the variables that torch.distributed reads; returns srun's exit status.
launch() {
    MASTER_ADDR=127.0.0.1 MASTER_PORT=$(master_port)
    [ "$SLURM_JOB_NUM_NODES" = 1 ] || MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MASTER_ADDR MASTER_PORT
    # shellcheck disable=SC2016  # the shell of each task expands the variables
    "${LAUNCH[@]}" --kill-on-bad-exit=1 --label \
        bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' task "$@"
}

last_saved_step() { # RUN_DIR: prints the step of its newest checkpoint, -1 before the first
    local step
    step=$(sed -n 's/.*"event": "saved", "step": \([0-9]*\).*/\1/p' "$1/journal.jsonl" 2>/dev/null | tail -n 1)
    echo "${step:--1}"
}

# train CONFIG [section.key=value ...]: trains until the run is complete, over as many starts as that takes.
train() {
    local config=$1 python run_dir status word allowed=()
    shift
    for word in "$@"; do # the user's word that commands may run, which no file records
        case $word in data.allow_commands=* | data.path=pipe:*) allowed+=("$word") ;; esac
    done
    python=$(find_python)
    run_dir=$("$python" -m train.snapshot --config "$config" --world-size "$SLURM_NTASKS" "$@") || exit 2
    last_saved_step "$run_dir" >> "$run_dir/starts.txt"
    say "training in $run_dir on $SLURM_JOB_NODELIST, $SLURM_NTASKS ranks; newest checkpoint: step $(tail -n 1 "$run_dir/starts.txt")"
    asked=""
    trap 'asked=USR1; say "time is nearly up: saving"; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 # signals the ranks only
    trap 'asked=${asked:-TERM}; say "asked to end"' TERM # the ranks got it from Slurm; a second signal would kill them before they save
    launch "$python" "$run_dir/code/train/main.py" --config "$run_dir/resolved.json" "${allowed[@]}" &
    wait_for $!
    say "ranks ended with status $status"
    case "$asked$status" in
        0 | 2 | 3) exit "$status" ;;
        TERM*) exit 1 ;;
        *) requeue "$run_dir" ;;
    esac
}

wait_for() { # PID: waits for it and sets status; loops because `wait` returns early after a trap
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
    trap '' TERM USR1 # requeueing makes Slurm end this script
    if scontrol requeue "$SLURM_JOB_ID"; then
        sleep 600
        exit 0
    fi
    say "scontrol requeue failed: submit again to go on at step $now"
    exit 1
}
