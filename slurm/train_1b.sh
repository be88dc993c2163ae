#!/usr/bin/env bash
# Trains the 1B model over several nodes:
#   sbatch slurm/train_1b.sh [section.key=value ...]                       from the repository's root
#   CONFIG=configs/ereg.json sbatch --nodes=1 slurm/train_1b.sh data.path=datasets/mine
# Any option below can be given to sbatch instead. The same job goes on over time limits, preemption and failed nodes,
# writing one log; `scancel` ends it, and submitting again goes on where it stopped.
#
# What a site must change: uncomment and fill in
##SBATCH --partition=gpu
##SBATCH --account=PROJECT
# modules, container and network interface: in slurm/job.sh
#
#SBATCH --job-name=ereg_1b
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8         # not --gpus-per-task: each task has to see all GPUs of its node
#SBATCH --ntasks-per-node=8       # one task a GPU
#SBATCH --cpus-per-task=8
#SBATCH --mem=0                   # all of a node
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300       # seconds before the limit: enough to finish a step and save
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?submit with sbatch, from the root of the repository}" || exit 2
# shellcheck source=slurm/job.sh
source slurm/job.sh
train "${CONFIG:-configs/ereg_1b.json}" "$@"
