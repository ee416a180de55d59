#!/bin/bash
# sbatch examples/slurm.sh: two nodes of eight GPUs. A job that is killed or requeued resumes from its
# last finished checkpoint.
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=8 \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID" \
    examples/distill.py --student Qwen/Qwen3-8B --teacher Qwen/Qwen3-32B --teacher_quant nf4 \
    --data train.jsonl --output_dir out --bf16 --gradient_checkpointing --packing \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --save_steps 100 "$@"
