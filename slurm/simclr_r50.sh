#!/usr/bin/env bash
# SimCLR, ResNet-50, ImageNet-1k, global batch 4096:
#
#   sbatch slurm/simclr_r50.sh --data.train /data/in1k_train.beton --data.test /data/in1k_val.beton
#   sbatch --nodes 2 slurm/simclr_r50.sh --data.train ... --epochs 200     # the same batch on fewer GPUs
#   DATA=/data/in1k_train.beton sbatch --job-name tau02 slurm/simclr_r50.sh --objective.temperature 0.2
#
# Options of sbatch go before the script and win over the lines below; everything after it goes to
# `widebatch pretrain simclr-r50` (--help lists it). How many GPUs there are changes the time a run
# takes, not its numbers: nodes x tasks must only divide the batch.

# What your cluster calls things; many need at least the first two.
##SBATCH --account=...
##SBATCH --partition=...
##SBATCH --constraint=...

#SBATCH --job-name=simclr-r50
# One task per GPU: the last two are the GPUs of a node. All tasks of a node see all its GPUs (not
# --gpus-per-task), so that NCCL can use NVLink between them.
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
# Cores that decode images for one GPU. The run prints how long it waits for its loader.
#SBATCH --cpus-per-task=12
# All of the nodes' memory: the data set is read through the page cache.
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00

# Before the time limit, and when preempted: USR1 to this script, which has every rank save a
# checkpoint and requeues the job. 120 s must hold one step and one save; Slurm may be 30 s late.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# One log per job, which a requeued job goes on writing.
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail

# Where NCCL guesses the network wrong:
# export NCCL_SOCKET_IFNAME=ib0

# Slurm runs a copy of this file and knows where the original lies: ".../slurm/NAME.sh ARGUMENTS".
# WIDEBATCH_HOME names the checkout where that does not help (a script piped into sbatch).
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
home=${WIDEBATCH_HOME:-$(dirname "$(dirname "${script%" $*"}")")}
source "$home/slurm/common.sh"
pretrain simclr-r50 "$@"
