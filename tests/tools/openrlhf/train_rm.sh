set -x
read -r -d '' training_commands <<EOF
openrlhf.cli.train_rm \
   --model.model_name_or_path org/sft --ckpt.output_dir ./rm\
   --ckpt.save_steps 50 --train.batch_size 256 --train.micro_batch_size 4 \
   --data.dataset org/pairs,my.jsonl@part --data.dataset_probs 0.4,1.2 --data.apply_chat_template \
   --data.max_len 8192 --adam.betas 0.9 0.99 --eval.dataset org/eval --eval.steps -1 \
   --model.loss_type logexp --model.compute_fp32_loss_enable --ds.packing_samples --ds.zero_stage 3 --ds.zpg 8
EOF
    # --logger.wandb.key [WANDB_TOKENS]
deepspeed --module $training_commands
