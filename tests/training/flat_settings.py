"""What a run recorded when the settings of training had no groups: `make_spec`'s, as text.

Written by the release before; FOLDER is the run's folder, PLACE the working directory.
"""

SPEC = """\
{
 "phase": "pretrain",
 "folder": "FOLDER",
 "dataset": "PLACE/none",
 "dataset_version": 1,
 "split": "train",
 "mixed_in": [],
 "held_out_split": null,
 "features": null,
 "live": null,
 "backbone": null,
 "family": "stand-in",
 "model": {},
 "initial": null,
 "tokenizer": "PLACE/none",
 "max_tokens": 4,
 "answers": [],
 "objectives": {},
 "blind": false,
 "seed": 11,
 "training": {
  "global_batch_size": 8,
  "micro_batch_size": 2,
  "group_by_length": false,
  "steps": 8,
  "learning_rate": 0.02,
  "learning_rate_factors": {},
  "freeze": [],
  "tokens_per_micro_batch": null,
  "warmup_steps": 2,
  "decay": "linear",
  "weight_decay": 0.01,
  "betas": [
   0.9,
   0.999
  ],
  "epsilon": 1e-08,
  "clip_norm": 1.0,
  "precision": "auto",
  "ema_decay": null,
  "not_finite": "stop",
  "max_skips_in_a_row": 5,
  "max_roll_backs": 3,
  "zero_stage": 1,
  "recompute_layers": false,
  "evaluate_every_steps": null,
  "evaluate_examples": null,
  "best_by": "loss",
  "best_is": "lowest",
  "patience": null,
  "keep_best": false,
  "model_weights": "trained",
  "checkpoint_every_steps": 3,
  "keep_checkpoints": 2,
  "keep_best_checkpoints": 0,
  "keep_every_steps": null,
  "keep_every_hours": null,
  "log_every_steps": 1,
  "loader_threads": 2,
  "prefetch_steps": 4,
  "shuffle_window_shards": 8,
  "timeout_seconds": 60,
  "deepspeed": {}
 },
 "contents": null,
 "device_flops": null,
 "decoding": null,
 "card": {}
}
"""

SEQUENCE = """\
{
 "dataset": "PLACE/none",
 "dataset_version": 1,
 "split": "train",
 "mixed_in": [],
 "held_out_split": null,
 "features": null,
 "live": null,
 "backbone": null,
 "family": "stand-in",
 "model": {},
 "max_tokens": 4,
 "answers": [],
 "objectives": {},
 "blind": false,
 "seed": 11,
 "training": {
  "global_batch_size": 8,
  "group_by_length": false,
  "steps": 8,
  "learning_rate": 0.02,
  "learning_rate_factors": {},
  "freeze": [],
  "warmup_steps": 2,
  "decay": "linear",
  "weight_decay": 0.01,
  "betas": [
   0.9,
   0.999
  ],
  "epsilon": 1e-08,
  "clip_norm": 1.0,
  "precision": "auto",
  "ema_decay": null,
  "evaluate_every_steps": null,
  "patience": null,
  "keep_best": false,
  "model_weights": "trained",
  "shuffle_window_shards": 8
 },
 "contents": null
}
"""

# of `spec.json`: settings of every group that are not the defaults
TRAINING = """\
{
 "global_batch_size": 8,
 "micro_batch_size": 2,
 "group_by_length": true,
 "steps": 8,
 "learning_rate": 0.02,
 "learning_rate_factors": {
  "hidden.*": 0.3
 },
 "freeze": [
  "unused.*"
 ],
 "tokens_per_micro_batch": null,
 "warmup_steps": 2,
 "decay": "linear",
 "weight_decay": 0.01,
 "betas": [
  0.9,
  0.999
 ],
 "epsilon": 1e-08,
 "clip_norm": 1.0,
 "precision": "auto",
 "ema_decay": 0.9,
 "not_finite": "stop",
 "max_skips_in_a_row": 5,
 "max_roll_backs": 3,
 "zero_stage": 1,
 "recompute_layers": false,
 "evaluate_every_steps": 2,
 "evaluate_examples": 3,
 "best_by": "sq",
 "best_is": "lowest",
 "patience": 7,
 "keep_best": true,
 "model_weights": "average",
 "checkpoint_every_steps": 3,
 "keep_checkpoints": 2,
 "keep_best_checkpoints": 1,
 "keep_every_steps": 4,
 "keep_every_hours": null,
 "log_every_steps": 1,
 "loader_threads": 3,
 "prefetch_steps": 4,
 "shuffle_window_shards": 8,
 "timeout_seconds": 60,
 "deepspeed": {}
}
"""
