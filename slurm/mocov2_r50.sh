#!/usr/bin/env bash
# MoCo v2, ResNet-50, ImageNet-1k, global batch 256, on the 8 GPUs of one node:
#
#   sbatch slurm/mocov2_r50.sh --data.train /data/in1k_train.beton --data.test /data/in1k_val.beton
#   sbatch slurm/mocov2_r50.sh --data.train ... --epochs 800
#
# Keys are shuffled between the GPUs and each GPU's BatchNorm sees its own 32 images, as in the paper:
# another number of GPUs is another run. To have it the same on any number, add
#   --sync-batch-norm --objective.key-batch-norm sync
#
# slurm/simclr_r50.sh explains every line and how settings are passed on.

##SBATCH --account=...
##SBATCH --partition=...
##SBATCH --constraint=...

#SBATCH --job-name=mocov2-r50
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
home=${WIDEBATCH_HOME:-$(dirname "$(dirname "${script%" $*"}")")}
source "$home/slurm/common.sh"
pretrain mocov2-r50 "$@"
