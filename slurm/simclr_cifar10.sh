#!/usr/bin/env bash
# SimCLR, ResNet-18 with the CIFAR stem, CIFAR-10, global batch 512, on the 2 GPUs of one node:
#
#   widebatch pack torchvision:CIFAR10:train cifar10_train.beton
#   sbatch slurm/simclr_cifar10.sh --data.train cifar10_train.beton
#   sbatch --nodes 2 slurm/simclr_cifar10.sh --data.train cifar10_train.beton     # 4 GPUs, same numbers
#
# slurm/simclr_r50.sh explains every line and how settings are passed on.

##SBATCH --account=...
##SBATCH --partition=...

#SBATCH --job-name=simclr-cifar10
#SBATCH --nodes=1
#SBATCH --gpus-per-node=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
home=${WIDEBATCH_HOME:-$(dirname "$(dirname "${script%" $*"}")")}
source "$home/slurm/common.sh"
pretrain simclr-cifar10-r18 "$@"
