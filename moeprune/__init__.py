"""Score, prune and judge the experts of Mixture-of-Experts language models."""

VERSION = "0.1.0"
