#!/usr/bin/env bash
# Train the 1B model over several nodes. Submit from the root of the repository:
#   sbatch slurm/train_1b.sh [section.key=value ...]
#   CONFIG=configs/ereg.json sbatch --nodes=1 slurm/train_1b.sh data.path=datasets/mine
# Options given to sbatch override those below. The job continues after time limits, preemption and node failures, and
# keeps one log. `scancel` ends it; submit it again to resume.
#
# Set for your site: uncomment and fill in
##SBATCH --partition=gpu
##SBATCH --account=PROJECT
# Modules, container and network interface are set in slurm/job.sh.
#
#SBATCH --job-name=ereg_1b
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8         # not --gpus-per-task: each task must see all GPUs of its node
#SBATCH --ntasks-per-node=8       # one task per GPU
#SBATCH --cpus-per-task=8
#SBATCH --mem=0                   # all memory of the node
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300       # 300 s before the limit: time to finish a step and save
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?submit with sbatch, from the root of the repository}" || exit 2
# shellcheck source=slurm/job.sh
source slurm/job.sh
train "${CONFIG:-configs/ereg_1b.json}" "$@"
