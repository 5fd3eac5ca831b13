"""Trains a LLaVA around a CLIP-MoE vision tower: `deepspeed train_vlm/run.py CONFIG.yaml [key=value ...]`."""
