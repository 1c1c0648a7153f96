"""What lies on disk: open, understand and write checkpoints. No torch, no transformers."""
