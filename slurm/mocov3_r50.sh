#!/usr/bin/env bash
# MoCo v3, ResNet-50, ImageNet-1k, global batch 4096:
#
#   sbatch slurm/mocov3_r50.sh --data.train /data/in1k_train.beton --data.test /data/in1k_val.beton
#   sbatch --nodes 2 slurm/mocov3_r50.sh --data.train ...                  # the same run on fewer GPUs
#   sbatch slurm/mocov3_r50.sh --data.train ... --epochs 300 --optim.base-lr 0.3
#
# slurm/simclr_r50.sh explains every line and how settings are passed on.

##SBATCH --account=...
##SBATCH --partition=...
##SBATCH --constraint=...

#SBATCH --job-name=mocov3-r50
#SBATCH --nodes=4
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
pretrain mocov3-r50 "$@"
