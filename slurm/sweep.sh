#!/usr/bin/env bash
# Train several configurations, one per array task, each in its own run directory:
#   sbatch --array=0-2 slurm/sweep.sh configs/ereg.json configs/baseline.json configs/quickstart.json
# Overrides for every run go into the environment, quoted as in a shell:
#   OVERRIDES="training.train_steps=1000 data.path='datasets/my own'"
# Each task continues after time limits and failures, as slurm/train_1b.sh does.
#
##SBATCH --partition=gpu
##SBATCH --account=PROJECT
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?submit with sbatch, from the root of the repository}" || exit 2
# shellcheck source=slurm/job.sh
source slurm/job.sh
configs=("$@")
config=${configs[${SLURM_ARRAY_TASK_ID:?submit with --array=0-N}]:-}
if [ -z "$config" ]; then
    say "array task $SLURM_ARRAY_TASK_ID has no configuration: ${#configs[@]} were given; submit with --array=0-$((${#configs[@]} - 1))"
    exit 2
fi
overrides=()
read_words overrides "${OVERRIDES:-}"
train "$config" "${overrides[@]}"
