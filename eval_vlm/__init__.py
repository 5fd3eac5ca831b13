"""Scores a VLM on POPE and MME from their standard files: `python -m eval_vlm.run CONFIG.yaml`."""
