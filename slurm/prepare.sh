#!/usr/bin/env bash
# Prepare a dataset on many machines. Each stage of data.prepare is one job; scan, encode and pack are arrays of TASKS tasks.
#
#   slurm/prepare.sh TASKS [sbatch options] -- [arguments of python -m data.prepare]
#   slurm/prepare.sh 16 --partition=cpu --cpus-per-task=8 -- --input /data/text --output /data/set --vocab-size 32000
#
# All nodes must see the folders. Relative paths start from this repository. After a failure, run the same command again:
# it keeps the parts that are finished. PYTHON names the interpreter (default: .venv/bin/python of this repository).
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || usage
tasks=$1
shift
sbatch_options=()
while [[ $# -gt 0 && "$1" != -- ]]; do sbatch_options+=("$1"); shift; done
[[ "${1:-}" == -- && $# -gt 1 ]] || usage
shift

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$repository/.venv/bin/python}

quoted() { # WORD...: prints the words as every POSIX shell reads them; what sbatch wraps runs under /bin/sh
    local word
    for word in "$@"; do printf "'%s' " "${word//\'/\'\\\'\'}"; done
}
command=$(quoted "$python" -m data.prepare "$@")

submit() { # STAGE LAST_TASK [JOB TO WAIT FOR]: prints the number of the job
    sbatch --parsable --job-name="prepare-$1" --chdir="$repository" --array="0-$2" \
        ${3:+--dependency=afterok:$3 --kill-on-invalid-dep=yes} "${sbatch_options[@]}" \
        --wrap "exec $command --stage $1 --task \$SLURM_ARRAY_TASK_ID/$(($2 + 1)) --workers \${SLURM_CPUS_PER_TASK:-1}"
}

scan=$(submit scan $((tasks - 1)))
merge=$(submit merge 0 "$scan")
encode=$(submit encode $((tasks - 1)) "$merge")
pack=$(submit pack $((tasks - 1)) "$encode")
finish=$(submit finish 0 "$pack")
echo "submitted: scan $scan, merge $merge, encode $encode, pack $pack, finish $finish"
