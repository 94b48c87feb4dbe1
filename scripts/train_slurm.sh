#!/usr/bin/env bash
# A training script on several machines under Slurm: torchrun with c10d rendezvous, ZeRO-3 over all GPUs, bfloat16.
#   sbatch --nodes=2 --export=ALL,LLM_NAME=alpaca,DATA_DIR=/shared/hh-split scripts/train_slurm.sh
#   sbatch --nodes=2 --export=ALL,STAGE=train_base_rm,CONFIG=configs/runs/llama7b_rm_base.yaml scripts/train_slurm.sh
# Submit from the repository; it, the model, the data and OUTPUT_DIR are on a file system that all machines see. Adapt
# partition, time and GPUs per machine (below) to the cluster. Environment: STAGE (default: train_apo_rm), and what
# scripts/common.sh lists (default of MODEL here: huggyllama/llama-7b). A job that Slurm stops saves a checkpoint within
# two minutes; requeued, or submitted again, it resumes.
#SBATCH --job-name=apo-rm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export NNODES=$SLURM_JOB_NUM_NODES NUM_GPUS=${SLURM_GPUS_ON_NODE:-8} RUN_ID=$SLURM_JOB_ID
if [[ -z ${CONFIG:-} ]]; then export MODEL=${MODEL:-huggyllama/llama-7b}; fi

srun bash "scripts/${STAGE:-train_apo_rm}.sh" --deepspeed configs/zero3_bf16.json --bf16 true \
    --resume_from_checkpoint true "$@"
