#!/usr/bin/env bash
# Check the nodes before a big job: GPUs, interconnect, disk, data, clocks, versions.
#   sbatch --nodes=16 slurm/doctor.sh [section.key=value ...]
#   CONFIG=configs/ereg.json sbatch --nodes=2 slurm/doctor.sh
#
##SBATCH --partition=gpu
##SBATCH --account=PROJECT
#SBATCH --job-name=doctor
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=00:15:00
#SBATCH --output=%x-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?submit with sbatch, from the root of the repository}" || exit 2
# shellcheck source=slurm/job.sh
source slurm/job.sh
launch "$(find_python)" -m train.doctor --config "${CONFIG:-configs/ereg_1b.json}" "$@"
