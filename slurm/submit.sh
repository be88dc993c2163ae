#!/usr/bin/env bash
# Submit a configuration with the number of GPUs that it needs, after checking it:
#   slurm/submit.sh configs/ereg.json [section.key=value ...]             the fewest nodes that hold one replica
#   NODES=4 GPUS_PER_NODE=8 slurm/submit.sh configs/ereg_1b.json          4 nodes
# Further options go to sbatch through the environment, quoted as in a shell: SBATCH_OPTIONS="--partition=gpu --time=2:00:00"
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=slurm/job.sh
source slurm/job.sh
config=${1:?name a configuration, for instance configs/ereg.json}
shift
python=$(find_python) gpus=${GPUS_PER_NODE:-8}
ranks=$("$python" train/main.py --dry-run --config "$config" "$@" | sed -n 's/^ranks *\([0-9]*\) .*/\1/p')
nodes=${NODES:-$(((ranks + gpus - 1) / gpus))}
"$python" train/main.py --dry-run --world-size $((nodes * gpus)) --config "$config" "$@" > /dev/null || exit 2
options=()
read_words options "${SBATCH_OPTIONS:-}"
CONFIG=$config exec sbatch --job-name="$(basename "$config" .json)" --nodes="$nodes" --ntasks-per-node="$gpus" \
    --gpus-per-node="$gpus" "${options[@]}" slurm/train_1b.sh "$@"
