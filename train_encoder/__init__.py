"""Makes a CLIP-MoE out of a dense CLIP by DMU (diversified multiplet upcycling), with its baselines and controls."""
